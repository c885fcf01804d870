//! The index at the end of a container, and reading one section without the rest.

use super::header::{Expect, HEADER_BYTES, Header};
use super::key::KeySource;
use super::open::{ChunkHead, Chunks, corrupt};
use super::seal::CHUNK_HEAD;
use crate::error::{Error, Result};
use std::borrow::BorrowMut;
use std::io::{self, Read};
use std::marker::PhantomData;
use std::ops::Range;

pub(super) const TRAILER_BYTES: usize = 16;
const TRAILER_MAGIC: [u8; 4] = *b"CEND";
/// Most bytes of an index: some hundred thousand sections.
pub(super) const MAX_INDEX: usize = 16 << 20;

/// Where a section begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    pub label: String,
    /// Number of its first chunk.
    pub chunk: u32,
    /// Where that chunk begins in the object.
    pub offset: u64,
    /// Plaintext bytes before it.
    pub plain_offset: u64,
}

/// Content of the last chunk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Index {
    pub sections: Vec<Section>,
    /// Chunks before the index.
    pub chunks: u32,
    /// Where the index begins in the object.
    pub offset: u64,
    pub plain_bytes: u64,
}

impl Index {
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut b = Vec::with_capacity(24 + self.sections.len() * 32);
        b.extend_from_slice(&self.chunks.to_le_bytes());
        b.extend_from_slice(&self.offset.to_le_bytes());
        b.extend_from_slice(&self.plain_bytes.to_le_bytes());
        b.extend_from_slice(&(self.sections.len() as u32).to_le_bytes());
        for s in &self.sections {
            b.extend_from_slice(&(s.label.len() as u16).to_le_bytes());
            b.extend_from_slice(s.label.as_bytes());
            b.extend_from_slice(&s.chunk.to_le_bytes());
            b.extend_from_slice(&s.offset.to_le_bytes());
            b.extend_from_slice(&s.plain_offset.to_le_bytes());
        }
        if b.len() > MAX_INDEX {
            return Err(Error::other("an object has too many sections"));
        }
        Ok(b)
    }

    pub fn decode(mut b: &[u8]) -> Result<Self> {
        let bad = || corrupt("the index of the object is malformed");
        let mut take = |n: usize| -> Result<&[u8]> {
            let (a, rest) = b.split_at_checked(n).ok_or_else(bad)?;
            b = rest;
            Ok(a)
        };
        let u32_of = |s: &[u8]| u32::from_le_bytes(s.try_into().expect("four bytes were taken"));
        let u64_of = |s: &[u8]| u64::from_le_bytes(s.try_into().expect("eight bytes were taken"));
        let chunks = u32_of(take(4)?);
        let offset = u64_of(take(8)?);
        let plain_bytes = u64_of(take(8)?);
        let n = u32_of(take(4)?);
        let mut sections = Vec::new();
        for _ in 0..n {
            let len = take(2)?;
            let label = take(usize::from(u16::from_le_bytes([len[0], len[1]])))?;
            let label = std::str::from_utf8(label).map_err(|_| bad())?.to_owned();
            sections.push(Section {
                label,
                chunk: u32_of(take(4)?),
                offset: u64_of(take(8)?),
                plain_offset: u64_of(take(8)?),
            });
        }
        if !b.is_empty() {
            return Err(bad());
        }
        Ok(Self { sections, chunks, offset, plain_bytes })
    }

    pub fn trailer(&self) -> [u8; TRAILER_BYTES] {
        let mut t = [0; TRAILER_BYTES];
        t[..8].copy_from_slice(&self.offset.to_le_bytes());
        t[8..12].copy_from_slice(&self.chunks.to_le_bytes());
        t[12..].copy_from_slice(&TRAILER_MAGIC);
        t
    }

    /// Where the index is, by a trailer that nobody has authenticated yet.
    fn locate(trailer: &[u8; TRAILER_BYTES]) -> Result<(u64, u32)> {
        if trailer[12..] != TRAILER_MAGIC {
            return Err(corrupt("the object has no trailer: it is cut short"));
        }
        let offset = u64::from_le_bytes(trailer[..8].try_into().expect("eight bytes"));
        let chunks = u32::from_le_bytes(trailer[8..12].try_into().expect("four bytes"));
        Ok((offset, chunks))
    }
}

/// An object that can be read at any place.
pub trait RangeRead {
    /// Bytes of the object.
    fn size(&self) -> u64;
    /// Exactly these bytes; a shorter answer is an error of the implementation.
    fn read_range(&mut self, range: Range<u64>) -> Result<Vec<u8>>;
}

impl RangeRead for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_range(&mut self, range: Range<u64>) -> Result<Vec<u8>> {
        usize::try_from(range.start)
            .ok()
            .zip(usize::try_from(range.end).ok())
            .and_then(|(a, b)| self.get(a..b))
            .map(<[u8]>::to_vec)
            .ok_or_else(|| corrupt("the object is cut short"))
    }
}

/// Reads single sections of a container.
pub struct SectionReader<R: RangeRead> {
    source: R,
    chunks: Chunks,
    header: Header,
    index: Index,
}

/// How many bytes a section is fetched by.
const FETCH_BYTES: u64 = 4 << 20;
/// How much of the end is fetched at once in the hope that the whole index is in it.
const TAIL_BYTES: u64 = 64 << 10;

impl<R: RangeRead> SectionReader<R> {
    /// Reads and authenticates the header and the index.
    pub fn new(mut source: R, keys: &dyn KeySource, expect: &Expect) -> Result<Self> {
        let size = source.size();
        let least = (HEADER_BYTES + CHUNK_HEAD + TRAILER_BYTES) as u64;
        if size < least {
            return Err(corrupt("the object is cut short"));
        }
        let head = source.read_range(0..HEADER_BYTES as u64)?;
        let head: [u8; HEADER_BYTES] = head.try_into().map_err(|_| corrupt("the object is cut short"))?;
        let (header, mut chunks) = Chunks::start(head, keys, expect)?;
        let tail_from = size.saturating_sub(TAIL_BYTES).max(HEADER_BYTES as u64);
        let mut tail = source.read_range(tail_from..size)?;
        let trailer_at = tail.len() - TRAILER_BYTES;
        let trailer: [u8; TRAILER_BYTES] = tail[trailer_at..].try_into().expect("the trailer's bytes");
        let (offset, count) = Index::locate(&trailer)?;
        let end = size - TRAILER_BYTES as u64;
        if offset < HEADER_BYTES as u64 || offset >= end || end - offset > (MAX_INDEX + 1024) as u64 {
            return Err(corrupt("the trailer points outside the object"));
        }
        if offset < tail_from {
            tail = source.read_range(offset..size)?;
        } else {
            tail.drain(..usize::try_from(offset - tail_from).expect("within the tail"));
        }
        tail.truncate(tail.len() - TRAILER_BYTES);
        let head = ChunkHead::parse(&tail, chunks.limit())?;
        if !head.last || tail.len() != CHUNK_HEAD + head.sealed_len {
            return Err(corrupt("the trailer does not point to the index"));
        }
        chunks.seek(count);
        let mut plain = Vec::new();
        chunks.open(&head, &mut tail[CHUNK_HEAD..], &mut plain)?;
        let index = Index::decode(&plain)?;
        if index.offset != offset || index.chunks != count {
            return Err(corrupt("trailer and index disagree"));
        }
        Ok(Self { source, chunks, header, index })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    pub fn sections(&self) -> &[Section] {
        &self.index.sections
    }

    /// The plaintext of the `n`-th section, authenticated as it is read.
    pub fn open(&mut self, n: usize) -> Result<SectionRead<&mut Self, R>> {
        SectionRead::new(self, n)
    }

    /// The same for who keeps it; [`SectionRead::into_reader`] gives the reader back.
    pub fn into_section(self, n: usize) -> Result<SectionRead<Self, R>> {
        SectionRead::new(self, n)
    }

    /// Where the `n`-th section is, and its chunks: from, to, first, end.
    fn bounds(&mut self, n: usize) -> Result<(u64, u64, u32, u32)> {
        let s = self.index.sections.get(n).ok_or_else(|| Error::other("there is no such section"))?;
        let (end, end_chunk) = match self.index.sections.get(n + 1) {
            Some(next) => (next.offset, next.chunk),
            None => (self.index.offset, self.index.chunks),
        };
        let (at, chunk) = (s.offset, s.chunk);
        self.chunks.seek(chunk);
        Ok((at, end, chunk, end_chunk))
    }
}

/// A section being read.
pub struct SectionRead<O: BorrowMut<SectionReader<R>>, R: RangeRead> {
    owner: O,
    of: PhantomData<R>,
    /// Next byte to fetch.
    at: u64,
    end: u64,
    /// Next chunk to open.
    chunk: u32,
    end_chunk: u32,
    buf: Vec<u8>,
    used: usize,
    plain: Vec<u8>,
    given: usize,
}

impl<O: BorrowMut<SectionReader<R>>, R: RangeRead> SectionRead<O, R> {
    fn new(mut owner: O, n: usize) -> Result<Self> {
        let (at, end, chunk, end_chunk) = owner.borrow_mut().bounds(n)?;
        Ok(Self {
            owner,
            of: PhantomData,
            at,
            end,
            chunk,
            end_chunk,
            buf: Vec::new(),
            used: 0,
            plain: Vec::new(),
            given: 0,
        })
    }

    /// The reader, for another section.
    pub fn into_reader(self) -> O {
        self.owner
    }

    /// Makes at least `n` unread bytes available.
    fn need(&mut self, n: usize) -> Result<()> {
        while self.buf.len() - self.used < n {
            if self.at >= self.end {
                return Err(corrupt("a section ends inside a chunk"));
            }
            let to = self.end.min(self.at + FETCH_BYTES);
            self.buf.drain(..self.used);
            self.used = 0;
            let more = self.owner.borrow_mut().source.read_range(self.at..to)?;
            self.buf.extend_from_slice(&more);
            self.at = to;
        }
        Ok(())
    }

    fn next_chunk(&mut self) -> Result<bool> {
        if self.chunk == self.end_chunk {
            return Ok(false);
        }
        self.need(CHUNK_HEAD)?;
        let head = ChunkHead::parse(&self.buf[self.used..], self.owner.borrow().chunks.limit())?;
        if head.last {
            return Err(corrupt("the index comes too early"));
        }
        self.need(CHUNK_HEAD + head.sealed_len)?;
        let from = self.used + CHUNK_HEAD;
        self.owner.borrow_mut().chunks.open(&head, &mut self.buf[from..from + head.sealed_len], &mut self.plain)?;
        self.used = from + head.sealed_len;
        self.chunk += 1;
        self.given = 0;
        Ok(true)
    }
}

impl<O: BorrowMut<SectionReader<R>>, R: RangeRead> Read for SectionRead<O, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.given >= self.plain.len() {
            if !self.next_chunk().map_err(io::Error::other)? {
                return Ok(0);
            }
        }
        let n = out.len().min(self.plain.len() - self.given);
        out[..n].copy_from_slice(&self.plain[self.given..self.given + n]);
        self.given += n;
        Ok(n)
    }
}
