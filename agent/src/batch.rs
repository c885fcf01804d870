//! What is collected between two ships: one buffer per tenant, one for what concerns all, and the facts of the record.

use crate::error::Result;
use crate::repository::model::TxnEntry;
use crate::spool::{Segment, SpoolFile, SpoolReader};
use crate::tenant::Tenant;
use coffer_wire::Lsn;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Buffers grow by chunks between these sizes: small for the many tenants that change a row, large for the few that
/// change many.
const MIN_CHUNK: usize = 1 << 10;
const MAX_CHUNK: usize = 256 << 10;

/// Bytes of memory that buffers hold, everywhere in the process that shares this counter.
pub type Held = Arc<AtomicU64>;

/// An append-only byte buffer whose older part may be in the spool.
pub struct Buffer {
    segments: VecDeque<Segment>,
    chunks: VecDeque<Vec<u8>>,
    len: u64,
    /// Capacity of the chunks; counted in `held` as long as they live.
    memory: u64,
    held: Held,
}

impl Buffer {
    pub fn new(held: Held) -> Self {
        Self { segments: VecDeque::new(), chunks: VecDeque::new(), len: 0, memory: 0, held }
    }

    /// Bytes appended so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory that it occupies.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Whether part of it is in the spool.
    pub fn is_spooled(&self) -> bool {
        !self.segments.is_empty()
    }

    /// Appends; returns by how much the memory grew.
    pub fn push(&mut self, mut bytes: &[u8]) -> u64 {
        let before = self.memory;
        self.len += bytes.len() as u64;
        while !bytes.is_empty() {
            let room = self.chunks.back().map_or(0, |c| c.capacity() - c.len());
            if room == 0 {
                // As much again as there is, so that a chunk is at least half full on average.
                let size = (self.memory as usize).max(bytes.len()).clamp(MIN_CHUNK, MAX_CHUNK);
                let chunk = Vec::with_capacity(size);
                self.memory += chunk.capacity() as u64;
                self.held.fetch_add(chunk.capacity() as u64, Ordering::Relaxed);
                self.chunks.push_back(chunk);
                continue;
            }
            let n = room.min(bytes.len());
            self.chunks.back_mut().expect("a chunk was there or was added").extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
        }
        self.memory - before
    }

    /// Moves what is in memory to the spool; returns how many bytes of memory that freed.
    pub fn spill(&mut self, file: &mut SpoolFile) -> Result<u64> {
        let mut freed = 0;
        while let Some(chunk) = self.chunks.pop_front() {
            let size = chunk.capacity() as u64;
            self.release(size);
            freed += size;
            self.segments.push_back(file.append(chunk)?);
        }
        Ok(freed)
    }

    fn release(&mut self, n: u64) {
        self.memory -= n;
        self.held.fetch_sub(n, Ordering::Relaxed);
    }

    /// Reads all of it, piece by piece, and keeps it.
    pub fn for_each(&self, spool: Option<&SpoolReader>, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        for segment in &self.segments {
            take(&spool.expect("a spooled buffer is read with its spool").read(*segment)?)?;
        }
        self.chunks.iter().try_for_each(|c| take(c))
    }

    /// Takes the oldest piece out; `None` when all are out. `spool` is needed when [`Buffer::is_spooled`].
    pub fn next_piece(&mut self, spool: Option<&SpoolReader>) -> Result<Option<Vec<u8>>> {
        if let Some(segment) = self.segments.pop_front() {
            return spool.expect("a spooled buffer is read with its spool").read(segment).map(Some);
        }
        let Some(chunk) = self.chunks.pop_front() else { return Ok(None) };
        self.release(chunk.capacity() as u64);
        Ok(Some(chunk))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.held.fetch_sub(self.memory, Ordering::Relaxed);
    }
}

/// One tenant's part of a batch.
pub struct TenantChanges {
    pub tenant: Tenant,
    pub buffer: Buffer,
    pub rows: u64,
    /// The first and the last of its transactions, by `end_lsn`.
    pub first_lsn: Lsn,
    pub last_lsn: Lsn,
    /// Descriptors that the buffer holds already.
    pub(crate) relations: HashSet<u64>,
    /// The list of the run before: most runs of a tenant touch the same tables.
    pub(crate) last_relations: Vec<u8>,
    /// Ordinal of the transaction whose BEGIN is in the buffer.
    pub(crate) begun: u64,
}

/// A marker as the stream brought it, with its transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenMarker {
    pub kind: String,
    pub payload: Vec<u8>,
    pub xid: u64,
    pub end_lsn: Lsn,
    pub commit_us: i64,
    pub seq: u64,
}

/// Whole transactions, ready to be sealed.
pub struct Batch {
    /// Holds what committed after this …
    pub from_lsn: Lsn,
    /// … up to and including this.
    pub upto_lsn: Lsn,
    pub index: Vec<TxnEntry>,
    pub tenants: Vec<TenantChanges>,
    /// TRUNCATE, MARKER and what they need, without the transaction index.
    pub common: Buffer,
    pub markers: Vec<SeenMarker>,
    pub rows: u64,
    /// Rows that capture could not attribute.
    pub unresolved_rows: u64,
    pub spool: Option<SpoolFile>,
    /// Memory of all buffers, as the demultiplexer counted it.
    pub memory: u64,
}

impl Batch {
    pub fn new(from_lsn: Lsn, held: &Held) -> Self {
        Self {
            from_lsn,
            upto_lsn: from_lsn,
            index: Vec::new(),
            tenants: Vec::new(),
            common: Buffer::new(held.clone()),
            markers: Vec::new(),
            rows: 0,
            unresolved_rows: 0,
            spool: None,
            memory: 0,
        }
    }

    /// Whether it holds no transaction.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Objects that shipping it will put into each store, the record aside.
    pub fn objects(&self) -> usize {
        self.tenants.len() + 1
    }

    /// Moves the largest buffers to the spool until at most `keep` bytes of memory are left.
    pub fn spill(&mut self, keep: u64, new_file: impl FnOnce() -> Result<SpoolFile>) -> Result<()> {
        if self.spool.is_none() {
            self.spool = Some(new_file()?);
        }
        let file = self.spool.as_mut().expect("it was just made");
        let mut order: Vec<usize> = (0..self.tenants.len()).filter(|i| self.tenants[*i].buffer.memory() > 0).collect();
        order.sort_unstable_by_key(|i| std::cmp::Reverse(self.tenants[*i].buffer.memory()));
        for i in order {
            if self.memory <= keep {
                return Ok(());
            }
            self.memory -= self.tenants[i].buffer.spill(file)?;
        }
        if self.memory > keep {
            self.memory -= self.common.spill(file)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spool::Spool;

    #[test]
    fn a_buffer_gives_back_what_it_took_spooled_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path().to_owned());
        let held = Held::default();
        let mut file = spool.file().unwrap();
        let mut b = Buffer::new(held.clone());
        let mut expect = Vec::new();
        for i in 0..2000u32 {
            let piece = vec![i as u8; (i as usize * 7) % 900];
            b.push(&piece);
            expect.extend_from_slice(&piece);
            if i == 700 || i == 1500 {
                let held_before = held.load(Ordering::Relaxed);
                let memory = b.memory();
                assert_eq!(b.spill(&mut file).unwrap(), memory);
                assert_eq!(held.load(Ordering::Relaxed), held_before - memory);
            }
        }
        assert_eq!(b.len(), expect.len() as u64);
        assert_eq!(held.load(Ordering::Relaxed), b.memory());
        let reader = file.reader();
        let mut got = Vec::new();
        while let Some(p) = b.next_piece(Some(&reader)).unwrap() {
            got.extend(p);
        }
        assert!(got == expect);
        assert_eq!(held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn small_buffers_stay_small_and_large_ones_waste_little() {
        let held = Held::default();
        let mut small = Buffer::new(held.clone());
        small.push(b"row");
        assert_eq!(small.memory(), MIN_CHUNK as u64);
        let mut large = Buffer::new(held.clone());
        for _ in 0..10_000 {
            large.push(&[1; 300]);
        }
        assert!(large.memory() < large.len() * 5 / 4, "{} for {}", large.memory(), large.len());
        drop((small, large));
        assert_eq!(held.load(Ordering::Relaxed), 0);
    }
}
