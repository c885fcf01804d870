//! External sort: entries of a key and a value, bounded memory, runs in the scratch, merged k ways.
//!
//! Keys compare as bytes. Entries with equal keys come out in no particular order.

use super::scratch::{Scratch, ScratchFile, ScratchReader, ScratchWriter};
use crate::error::Result;
use std::cmp::Ordering;

/// A chunk of the arena; larger entries get one of their own.
const CHUNK_BYTES: usize = 1 << 20;
/// The bytes of a key that sit in the index, so that most comparisons touch nothing else.
const HEAD: usize = 24;
/// Runs merged at once at most; more are first merged into longer ones.
const MAX_FAN_IN: usize = 128;

#[derive(Clone, Copy)]
struct Slot {
    head: [u8; HEAD],
    chunk: u32,
    at: u32,
    key_len: u32,
    value_len: u32,
}

/// Takes entries in any order.
pub struct Sorter {
    scratch: Scratch,
    memory: usize,
    chunk_bytes: usize,
    chunks: Vec<Vec<u8>>,
    /// The chunk being filled.
    current: usize,
    arena_bytes: usize,
    index: Vec<Slot>,
    /// Runs by level: a run of level n + 1 is `fan_in` runs of level n.
    runs: Vec<Vec<ScratchFile>>,
    fan_in: usize,
}

impl Sorter {
    /// Uses about `memory` bytes, and files in `scratch` beyond them.
    pub fn new(scratch: &Scratch, memory: usize) -> Self {
        let scratch = scratch.clone().for_memory(memory);
        let fan_in = (memory / 2 / (2 * scratch.segment_bytes())).clamp(4, MAX_FAN_IN);
        Self {
            scratch,
            memory,
            chunk_bytes: (memory / 16).clamp(512, CHUNK_BYTES),
            chunks: Vec::new(),
            current: 0,
            arena_bytes: 0,
            index: Vec::new(),
            runs: Vec::new(),
            fan_in,
        }
    }

    fn held(&self) -> usize {
        self.arena_bytes + self.index.len() * size_of::<Slot>()
    }

    /// Adds an entry.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let len = key.len() + value.len();
        if !self.index.is_empty() && self.held() + len + size_of::<Slot>() > self.memory {
            self.spill()?;
        }
        let chunk = self.chunk_for(len);
        let buf = &mut self.chunks[chunk];
        let at = buf.len();
        buf.extend_from_slice(key);
        buf.extend_from_slice(value);
        self.arena_bytes += len;
        let mut head = [0; HEAD];
        let n = key.len().min(HEAD);
        head[..n].copy_from_slice(&key[..n]);
        self.index.push(Slot {
            head,
            chunk: chunk as u32,
            at: at as u32,
            key_len: key.len() as u32,
            value_len: value.len() as u32,
        });
        Ok(())
    }

    fn chunk_for(&mut self, len: usize) -> usize {
        while self.current < self.chunks.len() {
            let c = &self.chunks[self.current];
            if c.capacity() - c.len() >= len {
                return self.current;
            }
            self.current += 1;
        }
        self.chunks.push(Vec::with_capacity(self.chunk_bytes.max(len)));
        self.current = self.chunks.len() - 1;
        self.current
    }

    fn sort(&mut self) {
        let chunks = &self.chunks;
        self.index.sort_unstable_by(|a, b| match a.head.cmp(&b.head) {
            Ordering::Equal => key_of(chunks, a).cmp(key_of(chunks, b)),
            other => other,
        });
    }

    /// Writes what is held as a run.
    fn spill(&mut self) -> Result<()> {
        self.sort();
        let mut w = RunWriter::new(&self.scratch)?;
        for s in &self.index {
            let (k, v) = entry_of(&self.chunks, s);
            w.push(k, v)?;
        }
        let run = w.finish()?;
        self.index.clear();
        self.arena_bytes = 0;
        self.current = 0;
        let keep = self.chunk_bytes;
        self.chunks.retain_mut(|c| {
            c.clear();
            c.capacity() <= keep
        });
        self.add_run(0, run)
    }

    fn add_run(&mut self, level: usize, run: ScratchFile) -> Result<()> {
        if self.runs.len() <= level {
            self.runs.resize_with(level + 1, Vec::new);
        }
        self.runs[level].push(run);
        if self.runs[level].len() < self.fan_in {
            return Ok(());
        }
        let runs = std::mem::take(&mut self.runs[level]);
        let longer = merge_runs(&self.scratch, &runs)?;
        self.add_run(level + 1, longer)
    }

    /// Nothing more comes.
    pub fn finish(mut self) -> Result<Sorted> {
        let spilled: usize = self.runs.iter().map(Vec::len).sum();
        if spilled > 0 && !self.index.is_empty() {
            // The memory is needed for the runs' buffers.
            self.spill()?;
        }
        let mut runs: Vec<ScratchFile> = self.runs.drain(..).flatten().collect();
        while runs.len() > self.fan_in {
            runs.sort_by_key(|r| std::cmp::Reverse(r.len()));
            let short = runs.split_off(runs.len() - self.fan_in);
            runs.push(merge_runs(&self.scratch, &short)?);
        }
        if runs.is_empty() {
            self.sort();
        } else {
            self.chunks = Vec::new();
            self.index = Vec::new();
        }
        Ok(Sorted { chunks: self.chunks, index: self.index, runs })
    }
}

fn key_of<'a>(chunks: &'a [Vec<u8>], s: &Slot) -> &'a [u8] {
    let at = s.at as usize;
    &chunks[s.chunk as usize][at..at + s.key_len as usize]
}

fn entry_of<'a>(chunks: &'a [Vec<u8>], s: &Slot) -> (&'a [u8], &'a [u8]) {
    let at = s.at as usize;
    let (key, value) = (s.key_len as usize, s.value_len as usize);
    chunks[s.chunk as usize][at..at + key + value].split_at(key)
}

fn merge_runs(scratch: &Scratch, runs: &[ScratchFile]) -> Result<ScratchFile> {
    let mut cursors: Vec<Box<dyn Cursor>> = Vec::new();
    for r in runs {
        cursors.push(Box::new(RunCursor::new(r)?));
    }
    let mut merged = KWay::new(cursors);
    let mut w = RunWriter::new(scratch)?;
    while let Some((k, v)) = merged.entry() {
        w.push(k, v)?;
        merged.advance()?;
    }
    w.finish()
}

/// Sorted entries; can be read more than once.
pub struct Sorted {
    chunks: Vec<Vec<u8>>,
    index: Vec<Slot>,
    runs: Vec<ScratchFile>,
}

impl Sorted {
    /// Nothing at all.
    pub fn empty() -> Self {
        Self { chunks: Vec::new(), index: Vec::new(), runs: Vec::new() }
    }

    /// A run that was written in order.
    pub(super) fn of_run(run: ScratchFile) -> Self {
        Self { chunks: Vec::new(), index: Vec::new(), runs: vec![run] }
    }

    /// From the first entry on.
    pub fn cursor(&self) -> Result<Box<dyn Cursor + '_>> {
        if self.runs.is_empty() {
            return Ok(Box::new(MemoryCursor { sorted: self, at: 0 }));
        }
        let mut cursors: Vec<Box<dyn Cursor + '_>> = Vec::with_capacity(self.runs.len());
        for r in &self.runs {
            cursors.push(Box::new(RunCursor::new(r)?));
        }
        Ok(Box::new(KWay::new(cursors)))
    }
}

impl Sorted {
    /// The same as [`Self::cursor`], for a reader that outlives this.
    pub fn into_cursor(self) -> Result<Box<dyn Cursor>> {
        if self.runs.is_empty() {
            return Ok(Box::new(OwnedMemoryCursor { sorted: self, at: 0 }));
        }
        let cursors = self.runs.iter().map(RunCursor::new).collect::<Result<Vec<_>>>()?;
        Ok(Box::new(KWay::new(cursors)))
    }
}

/// Entries in order.
pub trait Cursor: Send {
    /// The entry it stands on; `None` at the end.
    fn entry(&self) -> Option<(&[u8], &[u8])>;
    fn advance(&mut self) -> Result<()>;
}

impl<C: Cursor + ?Sized> Cursor for Box<C> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        (**self).entry()
    }

    fn advance(&mut self) -> Result<()> {
        (**self).advance()
    }
}

impl<C: Cursor + ?Sized> Cursor for &mut C {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        (**self).entry()
    }

    fn advance(&mut self) -> Result<()> {
        (**self).advance()
    }
}

struct MemoryCursor<'a> {
    sorted: &'a Sorted,
    at: usize,
}

impl Cursor for MemoryCursor<'_> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.sorted.index.get(self.at).map(|s| entry_of(&self.sorted.chunks, s))
    }

    fn advance(&mut self) -> Result<()> {
        self.at += 1;
        Ok(())
    }
}

struct OwnedMemoryCursor {
    sorted: Sorted,
    at: usize,
}

impl Cursor for OwnedMemoryCursor {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.sorted.index.get(self.at).map(|s| entry_of(&self.sorted.chunks, s))
    }

    fn advance(&mut self) -> Result<()> {
        self.at += 1;
        Ok(())
    }
}

/// Writes a run whose entries come in order.
pub(super) struct RunWriter {
    out: ScratchWriter,
}

impl RunWriter {
    pub fn new(scratch: &Scratch) -> Result<Self> {
        Ok(Self { out: scratch.writer()? })
    }

    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let mut head = [0; 8];
        head[..4].copy_from_slice(&(key.len() as u32).to_le_bytes());
        head[4..].copy_from_slice(&(value.len() as u32).to_le_bytes());
        self.out.write(&head)?;
        self.out.write(key)?;
        self.out.write(value)
    }

    pub fn finish(self) -> Result<ScratchFile> {
        self.out.finish()
    }
}

pub(super) struct RunCursor {
    reader: ScratchReader,
    entry: Vec<u8>,
    key_len: usize,
    ended: bool,
}

impl RunCursor {
    pub fn new(run: &ScratchFile) -> Result<Self> {
        let mut c = Self { reader: run.reader(), entry: Vec::new(), key_len: 0, ended: false };
        c.advance()?;
        Ok(c)
    }
}

impl Cursor for RunCursor {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        (!self.ended).then(|| self.entry.split_at(self.key_len))
    }

    fn advance(&mut self) -> Result<()> {
        let mut head = [0; 8];
        if !self.reader.read(&mut head)? {
            self.ended = true;
            return Ok(());
        }
        let len = |i: usize| u32::from_le_bytes(head[i..i + 4].try_into().expect("four of eight bytes")) as usize;
        self.key_len = len(0);
        self.entry.clear();
        self.entry.resize(len(0) + len(4), 0);
        if !self.entry.is_empty() {
            self.reader.read(&mut self.entry)?;
        }
        Ok(())
    }
}

/// Several cursors as one: a binary heap of cursors by the key they stand on.
pub struct KWay<C> {
    cursors: Vec<C>,
    /// Indexes of cursors that have an entry; the least key is at 0.
    heap: Vec<usize>,
}

impl<C: Cursor> KWay<C> {
    pub fn new(cursors: Vec<C>) -> Self {
        let heap = (0..cursors.len()).filter(|i| cursors[*i].entry().is_some()).collect();
        let mut k = Self { cursors, heap };
        for i in (0..k.heap.len() / 2).rev() {
            k.sift(i);
        }
        k
    }

    fn less(&self, a: usize, b: usize) -> bool {
        // The cursor's number breaks ties, so that the order is the same every time.
        (self.cursors[self.heap[a]].entry().map(|e| e.0), self.heap[a])
            < (self.cursors[self.heap[b]].entry().map(|e| e.0), self.heap[b])
    }

    fn sift(&mut self, mut at: usize) {
        loop {
            let mut least = at;
            for child in [2 * at + 1, 2 * at + 2] {
                if child < self.heap.len() && self.less(child, least) {
                    least = child;
                }
            }
            if least == at {
                return;
            }
            self.heap.swap(at, least);
            at = least;
        }
    }
}

impl<C: Cursor> Cursor for KWay<C> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.cursors[*self.heap.first()?].entry()
    }

    fn advance(&mut self) -> Result<()> {
        let Some(&top) = self.heap.first() else { return Ok(()) };
        self.cursors[top].advance()?;
        if self.cursors[top].entry().is_none() {
            self.heap.swap_remove(0);
        }
        if !self.heap.is_empty() {
            self.sift(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain(mut c: Box<dyn Cursor + '_>) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut out = Vec::new();
        while let Some((k, v)) = c.entry() {
            out.push((k.to_vec(), v.to_vec()));
            c.advance().unwrap();
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_memory_gives_the_same_order(
            entries in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..40), 0usize..200), 0..400),
            memory in prop_oneof![Just(600usize), Just(5_000), Just(10_000_000)],
        ) {
            let dir = tempfile::tempdir().unwrap();
            let scratch = Scratch::new(dir.path()).unwrap();
            let mut s = Sorter::new(&scratch, memory);
            let mut expect = Vec::new();
            for (i, (k, n)) in entries.into_iter().enumerate() {
                // A unique tail, so that the order is total.
                let k = [k.as_slice(), &(i as u32).to_be_bytes()].concat();
                let v = vec![i as u8; n];
                s.push(&k, &v).unwrap();
                expect.push((k, v));
            }
            expect.sort();
            let sorted = s.finish().unwrap();
            prop_assert_eq!(&drain(sorted.cursor().unwrap()), &expect);
            prop_assert_eq!(&drain(sorted.cursor().unwrap()), &expect);
            prop_assert_eq!(&drain(sorted.into_cursor().unwrap()), &expect);
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_is_held_stays_within_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap();
        let mut s = Sorter::new(&scratch, 64 << 10);
        for i in 0..20_000u32 {
            s.push(&i.to_be_bytes(), &[7; 50]).unwrap();
            assert!(s.held() <= 64 << 10);
        }
        assert!(s.runs.iter().all(|r| r.len() < s.fan_in));
        assert_eq!(drain(s.finish().unwrap().cursor().unwrap()).len(), 20_000);
        assert!(scratch.bytes_written() > 0);
    }
}
