//! Rows inside a tenant run.
//!
//! A row is `op u8 | rel u16 | …` where `rel` indexes the run's list of descriptor ids:
//!
//! | op | rest |
//! |---|---|
//! | insert, update | key, image |
//! | move of key | old key, key, image |
//! | delete | key |
//! | opaque | reason, raw bytes |
//!
//! each a `u32` length and bytes. Key and image are lines of COPY text without the newline. For a relation whose
//! rows are told apart by the whole row, the key is empty and the image stands for it; the key of a delete and the
//! old key of a change are then the old image.

use crate::{Cursor, WireError, put_bytes};

/// What happened to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    Insert = 1,
    Update = 2,
    Delete = 3,
    /// An update that changed the key (or, for whole-row relations, the row).
    UpdateKey = 4,
    /// A change that could not be rendered; only in runs of the unresolved tenant.
    Opaque = 5,
}

/// One row, borrowed from a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    pub op: Op,
    /// Index into the run's descriptor ids.
    pub rel: u16,
    /// Set for [`Op::UpdateKey`].
    pub old_key: Option<&'a [u8]>,
    /// For [`Op::Opaque`]: the reason, UTF-8.
    pub key: &'a [u8],
    /// Empty for [`Op::Delete`]; may hold unchanged fields for updates. For [`Op::Opaque`]: raw bytes.
    pub image: &'a [u8],
}

fn head(out: &mut Vec<u8>, op: Op, rel: u16) {
    out.push(op as u8);
    out.extend_from_slice(&rel.to_le_bytes());
}

pub fn put_insert(out: &mut Vec<u8>, rel: u16, key: &[u8], image: &[u8]) {
    head(out, Op::Insert, rel);
    put_bytes(out, key);
    put_bytes(out, image);
}

/// An update; `old_key` when the key changed.
pub fn put_update(out: &mut Vec<u8>, rel: u16, old_key: Option<&[u8]>, key: &[u8], image: &[u8]) {
    match old_key {
        None => head(out, Op::Update, rel),
        Some(old) => {
            head(out, Op::UpdateKey, rel);
            put_bytes(out, old);
        }
    }
    put_bytes(out, key);
    put_bytes(out, image);
}

pub fn put_delete(out: &mut Vec<u8>, rel: u16, key: &[u8]) {
    head(out, Op::Delete, rel);
    put_bytes(out, key);
}

pub fn put_opaque(out: &mut Vec<u8>, rel: u16, reason: &str, raw: &[u8]) {
    head(out, Op::Opaque, rel);
    put_bytes(out, reason.as_bytes());
    put_bytes(out, raw);
}

/// Iterates the rows of a run's bytes.
pub struct RowReader<'a> {
    c: Cursor<'a>,
}

impl<'a> RowReader<'a> {
    pub fn new(rows: &'a [u8]) -> Self {
        Self { c: Cursor::new(rows) }
    }

    /// How many bytes of the run have been read.
    pub fn position(&self) -> usize {
        self.c.at
    }

    fn row(&mut self) -> Result<Row<'a>, WireError> {
        let c = &mut self.c;
        let op = match c.u8("row op")? {
            1 => Op::Insert,
            2 => Op::Update,
            3 => Op::Delete,
            4 => Op::UpdateKey,
            5 => Op::Opaque,
            _ => return Err(c.err("known row op")),
        };
        let rel = c.u16("row relation")?;
        let old_key = if op == Op::UpdateKey { Some(c.bytes("old key")?) } else { None };
        let key = c.bytes("row key")?;
        let image = if op == Op::Delete { &[][..] } else { c.bytes("row image")? };
        Ok(Row { op, rel, old_key, key, image })
    }
}

impl<'a> Iterator for RowReader<'a> {
    type Item = Result<Row<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.c.is_empty() {
            return None;
        }
        let row = self.row();
        if row.is_err() {
            self.c.at = self.c.buf.len();
        }
        Some(row)
    }
}
