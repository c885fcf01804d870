//! The frames that the output plugin writes and the agent reads (FORMAT.md, "Frames").
//!
//! The same frames are what a changeset and a full contain once opened, so there is one reader for the stream, for
//! changesets and for fulls. No pgrx, no tokio, no I/O here: bytes in, bytes out.
//!
//! Invariants:
//! - a reader never panics on any input; it returns [`WireError`] with the offset;
//! - integers are little-endian; strings are UTF-8 behind a `u32` length;
//! - a frame that a reader does not know is an error, never skipped: skipping would lose rows.

pub mod copy_text;
mod frame;
mod lsn;
mod relation;
mod row;
pub mod tag;

pub use frame::{
    Begin, Commit, Frame, FrameReader, Hello, Marker, Run, RunHeader, Truncate, WIRE_VERSION, kind, put_begin,
    put_commit, put_frame, put_hello, put_marker, put_relation, put_run_data, put_run_header, put_truncate,
    relation_ids,
};
pub use lsn::Lsn;
pub use relation::{Class, Column, ColumnFlags, KeyMode, Relation, Strategy, quote_ident};
pub use row::{Op, Row, RowReader, put_delete, put_insert, put_opaque, put_update};

/// A tenant as the stream names it. Reserved tenants are a kind, never a key that an application could use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum TenantKind {
    /// An application's tenant; the key is the tenant column's text.
    Normal = 0,
    /// Rows whose tenant is NULL, or an orphan by data. The key is empty.
    Unassigned = 1,
    /// Rows that capture could not attribute; an alarm. The key is empty.
    Unresolved = 2,
    /// Reference data that belongs to no tenant. The key is empty.
    Shared = 3,
}

impl TenantKind {
    /// The kind's number in frames, or `None` for a number that this version does not know.
    pub fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            0 => Self::Normal,
            1 => Self::Unassigned,
            2 => Self::Unresolved,
            3 => Self::Shared,
            _ => return None,
        })
    }

    /// The word used in SQL and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Unassigned => "unassigned",
            Self::Unresolved => "unresolved",
            Self::Shared => "shared",
        }
    }
}

/// Bytes that are not what FORMAT.md says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireError {
    /// Where in the input, in bytes from its start.
    pub at: usize,
    /// What was expected.
    pub what: &'static str,
}

impl std::fmt::Display for WireError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "malformed frame at byte {}: {}", self.at, self.what)
    }
}

impl std::error::Error for WireError {}

/// A cursor over bytes; every read is checked.
#[derive(Clone, Copy)]
pub(crate) struct Cursor<'a> {
    pub buf: &'a [u8],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(buf: &'a [u8]) -> Self {
        Self { buf, at: 0 }
    }

    pub fn err(&self, what: &'static str) -> WireError {
        WireError { at: self.at, what }
    }

    pub fn is_empty(&self) -> bool {
        self.at >= self.buf.len()
    }

    pub fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], WireError> {
        let end = self.at.checked_add(n).filter(|e| *e <= self.buf.len()).ok_or(WireError { at: self.at, what })?;
        let out = &self.buf[self.at..end];
        self.at = end;
        Ok(out)
    }

    pub fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        Ok(self.take(1, what)?[0])
    }

    pub fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.take(2, what)?.try_into().expect("two bytes were taken")))
    }

    pub fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.take(4, what)?.try_into().expect("four bytes were taken")))
    }

    pub fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.take(8, what)?.try_into().expect("eight bytes were taken")))
    }

    pub fn i64(&mut self, what: &'static str) -> Result<i64, WireError> {
        Ok(self.u64(what)? as i64)
    }

    pub fn bytes(&mut self, what: &'static str) -> Result<&'a [u8], WireError> {
        let n = self.u32(what)? as usize;
        self.take(n, what)
    }

    pub fn str(&mut self, what: &'static str) -> Result<&'a str, WireError> {
        let at = self.at;
        std::str::from_utf8(self.bytes(what)?).map_err(|_| WireError { at, what })
    }
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, b: &[u8]) {
    out.extend_from_slice(&(b.len() as u32).to_le_bytes());
    out.extend_from_slice(b);
}
