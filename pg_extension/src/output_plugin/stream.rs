//! The frames of the transaction at hand, and when they are written: one write per transaction, or per 256 KiB of it.

use super::hash::ByNumber;
use super::relations::Covered;
use super::runs::Runs;
use coffer_wire::{
    Begin, Commit, Hello, Lsn, Marker, RunHeader, TenantKind, Truncate, WIRE_VERSION, put_begin, put_commit, put_hello,
    put_marker, put_relation, put_run_data, put_run_header, put_truncate,
};
use pgrx::pg_sys;

/// How much is gathered before it is written.
pub const WRITE_BYTES: usize = 256 << 10;

/// Microseconds from 1970-01-01 to 2000-01-01, where PostgreSQL counts from.
pub const EPOCH_US: i64 = 946_684_800_000_000;

/// The transaction that is being decoded.
#[derive(Clone, Copy, Default)]
pub struct Transaction {
    xid: u32,
    commit_lsn: u64,
    pub end_lsn: u64,
    /// Since 2000-01-01, as the server counts.
    pub commit_time_us: i64,
    /// Whether a BEGIN frame is out, or waiting in the buffer.
    begun: bool,
    /// 64 bits, known once begun.
    full_xid: u64,
    seq: u64,
    rows: u64,
}

impl Transaction {
    pub fn new(xid: u32, commit_lsn: u64, end_lsn: u64, commit_time_us: i64) -> Self {
        Self { xid, commit_lsn, end_lsn, commit_time_us, ..Self::default() }
    }

    /// The transaction id in 64 bits.
    pub fn full_xid(&self) -> u64 {
        widen(self.xid)
    }
}

/// The id of a transaction at most 2^31 before now, in 64 bits. A slot keeps the server from falling further behind.
fn widen(xid: u32) -> u64 {
    // SAFETY: reads shared memory.
    let next = unsafe { pg_sys::ReadNextFullTransactionId() }.value;
    let epoch = next >> 32;
    let epoch = if xid > next as u32 { epoch.saturating_sub(1) } else { epoch };
    epoch << 32 | u64::from(xid)
}

/// What waits to be written.
#[derive(Default)]
pub struct Stream {
    frames: Vec<u8>,
    pub runs: Runs,
    said_hello: bool,
    announced: ByNumber<u64, ()>,
    pub txn: Transaction,
}

impl Stream {
    /// A transaction begins. Nothing is written for it until something in it concerns us.
    pub fn begin(&mut self, txn: Transaction) {
        self.txn = txn;
        self.frames.clear();
        self.runs.clear();
    }

    fn ensure_begun(&mut self) {
        if self.txn.begun {
            return;
        }
        self.txn.begun = true;
        self.txn.full_xid = self.txn.full_xid();
        if !self.said_hello {
            self.said_hello = true;
            let hello = Hello {
                wire_version: WIRE_VERSION,
                server_version: pg_sys::PG_VERSION_NUM,
                extension_version: env!("CARGO_PKG_VERSION"),
            };
            put_hello(&mut self.frames, &hello);
        }
        let begin = Begin {
            xid: self.txn.full_xid,
            commit_lsn: Lsn(self.txn.commit_lsn),
            end_lsn: Lsn(self.txn.end_lsn),
            commit_time_us: self.txn.commit_time_us.saturating_add(EPOCH_US),
        };
        put_begin(&mut self.frames, &begin);
    }

    /// Makes sure that the reader has BEGIN and the descriptor before what follows.
    #[inline]
    pub fn announce(&mut self, relation: &Covered) {
        self.ensure_begun();
        if self.announced.insert(relation.id, ()).is_none() {
            put_relation(&mut self.frames, relation.id, &relation.encoded);
        }
    }

    fn close_runs(&mut self) {
        self.txn.rows += self.runs.close_into(&mut self.frames, &mut self.txn.seq);
    }

    /// A TRUNCATE; its relations were announced.
    pub fn truncate(&mut self, restart_sequences: bool, tenant: Option<(TenantKind, &str)>, relations: &[u8]) {
        self.ensure_begun();
        self.close_runs();
        let seq = self.txn.seq;
        self.txn.seq += 1;
        put_truncate(&mut self.frames, &Truncate { seq, restart_sequences, tenant, relations });
    }

    pub fn marker(&mut self, kind: &str, payload: &[u8]) {
        self.ensure_begun();
        self.close_runs();
        let seq = self.txn.seq;
        self.txn.seq += 1;
        put_marker(&mut self.frames, &Marker { seq, kind, payload });
    }

    /// Writes what has been gathered if it is enough.
    ///
    /// # Safety
    /// `ctx` is the context of the callback that runs.
    #[inline]
    pub unsafe fn write_if_full(&mut self, ctx: *mut pg_sys::LogicalDecodingContext) {
        if self.frames.len() + self.runs.bytes() >= WRITE_BYTES {
            self.close_runs();
            // SAFETY: by the caller.
            unsafe { self.write(ctx, true) };
        }
    }

    /// Ends the transaction. `false` when nothing of it concerned us.
    ///
    /// # Safety
    /// As for [`Stream::write_if_full`].
    pub unsafe fn commit(&mut self, ctx: *mut pg_sys::LogicalDecodingContext) -> bool {
        if !self.txn.begun {
            return false;
        }
        self.close_runs();
        let commit = Commit { xid: self.txn.full_xid, end_lsn: Lsn(self.txn.end_lsn), rows: self.txn.rows };
        put_commit(&mut self.frames, &commit);
        // SAFETY: by the caller.
        unsafe { self.write(ctx, true) };
        true
    }

    unsafe fn write(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, last: bool) {
        // SAFETY: by the caller.
        unsafe { write(ctx, &self.frames, last) };
        self.frames.clear();
    }

    /// Opens a run of one row that is written in pieces; `rows_len` bytes follow.
    ///
    /// # Safety
    /// As for [`Stream::write_if_full`].
    pub unsafe fn large_row(
        &mut self,
        ctx: *mut pg_sys::LogicalDecodingContext,
        relation: &Covered,
        tenant: (TenantKind, &str),
        rows_len: u64,
    ) -> LargeRow<'_> {
        self.announce(relation);
        self.close_runs();
        let header = RunHeader {
            seq: self.txn.seq,
            tenant_kind: tenant.0,
            tenant_key: tenant.1,
            relations: &relation.id.to_le_bytes(),
            rows: 1,
            rows_len,
        };
        put_run_header(&mut self.frames, &header, None);
        self.txn.seq += 1;
        self.txn.rows += 1;
        LargeRow { stream: self, ctx, slice: Vec::with_capacity(WRITE_BYTES), left: rows_len }
    }
}

/// Takes the bytes of one large row.
pub struct LargeRow<'a> {
    stream: &'a mut Stream,
    ctx: *mut pg_sys::LogicalDecodingContext,
    slice: Vec<u8>,
    left: u64,
}

impl LargeRow<'_> {
    pub fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let take = bytes.len().min(WRITE_BYTES - self.slice.len());
            self.slice.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.slice.len() == WRITE_BYTES {
                self.flush();
            }
        }
    }

    /// Writes what is left. The length must have come out as announced.
    pub fn finish(mut self) {
        self.flush();
        assert_eq!(self.left, 0, "a large row is as long as was announced");
    }

    fn flush(&mut self) {
        if self.slice.is_empty() {
            return;
        }
        self.left = self.left.checked_sub(self.slice.len() as u64).expect("a large row is as long as was announced");
        put_run_data(&mut self.stream.frames, &self.slice);
        self.slice.clear();
        // SAFETY: the context was given for this callback.
        unsafe { self.stream.write(self.ctx, self.left == 0) };
    }
}

/// One message of the replication stream, or one row of the SQL functions.
///
/// # Safety
/// `ctx` is the context of the callback that runs.
pub unsafe fn write(ctx: *mut pg_sys::LogicalDecodingContext, bytes: &[u8], last: bool) {
    // SAFETY: by the caller; a write is far below the 1 GB that a StringInfo holds.
    unsafe {
        pg_sys::OutputPluginPrepareWrite(ctx, last);
        pg_sys::appendBinaryStringInfo((*ctx).out, bytes.as_ptr().cast(), bytes.len() as i32);
        pg_sys::OutputPluginWrite(ctx, last);
    }
}
