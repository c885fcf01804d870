//! Reading a container from its start to its end.

use super::derive::{ContainerKeys, equal};
use super::header::{Expect, HEADER_BYTES, Header};
use super::key::{KeyId, KeySource};
use super::seal::{CHUNK_HEAD, LAST, LEN_MASK, RAW, aad};
use super::sections::{Index, MAX_INDEX, TRAILER_BYTES};
use crate::error::{Error, Kind, Result};
use coffer_cipher::{Decompressor, TAG_BYTES};
use std::io::{self, BufRead, Read};

pub(super) fn corrupt(what: &str) -> Error {
    Error::new(Kind::Verification, what).code("corrupt")
}

/// The clear bytes before a chunk, checked against what a chunk can be.
pub(super) struct ChunkHead {
    pub plain_len: usize,
    pub sealed_len: usize,
    pub last: bool,
    raw: bool,
    word: u32,
}

impl ChunkHead {
    pub fn parse(b: &[u8], chunk_bytes: usize) -> Result<Self> {
        if b.len() < CHUNK_HEAD {
            return Err(corrupt("the object is cut short"));
        }
        let word = u32::from_le_bytes(b[..4].try_into().expect("four bytes"));
        let sealed_len = u32::from_le_bytes(b[4..8].try_into().expect("four bytes")) as usize;
        let plain_len = (word & LEN_MASK) as usize;
        let (raw, last) = (word & RAW != 0, word & LAST != 0);
        let limit = if last { MAX_INDEX } else { chunk_bytes };
        let fits = match raw {
            true => sealed_len == plain_len + TAG_BYTES,
            false => sealed_len >= TAG_BYTES && sealed_len < plain_len + TAG_BYTES,
        };
        if plain_len > limit || !fits || (plain_len == 0 && !last) {
            return Err(corrupt("a chunk's lengths are impossible"));
        }
        Ok(Self { plain_len, sealed_len, last, raw, word })
    }
}

/// Opens the chunks of one container, one after the other.
pub(super) struct Chunks {
    keys: ContainerKeys,
    header_hash: [u8; 32],
    decompressor: Decompressor,
    chunk_bytes: usize,
    /// Number of the next chunk.
    next: u32,
}

impl Chunks {
    /// Decodes the header, checks it against what is expected, finds the key and checks the commitment.
    pub fn start(head: [u8; HEADER_BYTES], keys: &dyn KeySource, expect: &Expect) -> Result<(Header, Self)> {
        let (header, raw) = Header::decode(head)?;
        expect.check(&header)?;
        let id = KeyId { uid: header.tenant, version: header.key_version };
        let key = keys.key(id)?;
        let container = ContainerKeys::new(key.secret(), raw.salt(), raw.context());
        if !equal(&container.commitment, raw.commitment()) {
            return Err(Error::new(
                Kind::Verification,
                format!(
                    "the header does not belong to key {id}: it was altered, or the object was sealed under another key"
                ),
            )
            .code("wrong_key"));
        }
        let chunks = Self {
            keys: container,
            header_hash: super::sha256(&raw.bytes),
            decompressor: Decompressor::new(header.codec),
            chunk_bytes: 1 << raw.chunk_log2,
            next: 0,
        };
        Ok((header, chunks))
    }

    /// Most plaintext bytes of a chunk.
    pub fn limit(&self) -> usize {
        self.chunk_bytes
    }

    pub fn seek(&mut self, chunk: u32) {
        self.next = chunk;
    }

    /// Opens the next chunk: `sealed` is its ciphertext and tag and is overwritten; the plaintext replaces `plain`.
    pub fn open(&mut self, head: &ChunkHead, sealed: &mut [u8], plain: &mut Vec<u8>) -> Result<()> {
        plain.clear();
        let (body, tag) = sealed.split_at_mut(head.sealed_len - TAG_BYTES);
        let tag: [u8; TAG_BYTES] = (&*tag).try_into().map_err(|_| corrupt("a chunk is cut short"))?;
        let nonce = self.keys.nonce(self.next, head.last);
        self.keys
            .cipher
            .open(nonce, &aad(&self.header_hash, head.word), body, &tag)
            .map_err(|_| corrupt(&format!("chunk {} does not authenticate", self.next)))?;
        self.next = self.next.wrapping_add(1);
        if head.raw {
            plain.extend_from_slice(body);
            return Ok(());
        }
        // The length is authenticated by now.
        plain.resize(head.plain_len, 0);
        self.decompressor
            .decompress(body, plain)
            .map_err(|_| corrupt("a chunk does not decompress to its stated length"))
    }
}

/// Hands out the plaintext of a container, chunk by chunk, each only after it authenticated; says that it is at its end
/// only after the index and the trailer did.
pub struct Opener<R: Read> {
    input: R,
    header: Header,
    chunks: Chunks,
    sealed: Vec<u8>,
    plain: Vec<u8>,
    given: usize,
    /// Bytes of the object read so far.
    at: u64,
    plain_at: u64,
    done: bool,
    failed: bool,
    /// Name for errors.
    name: Option<String>,
}

impl<R: Read> Opener<R> {
    /// Reads the header, finds the key.
    pub fn new(mut input: R, keys: &dyn KeySource, expect: &Expect) -> Result<Self> {
        let mut head = [0; HEADER_BYTES];
        read_exact(&mut input, &mut head)?;
        let (header, chunks) = Chunks::start(head, keys, expect)?;
        Ok(Self {
            input,
            header,
            chunks,
            sealed: Vec::new(),
            plain: Vec::new(),
            given: 0,
            at: HEADER_BYTES as u64,
            plain_at: 0,
            done: false,
            failed: false,
            name: None,
        })
    }

    /// Errors from here on name the object.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next chunk's plaintext; `None` at the authenticated end.
    pub fn next_chunk(&mut self) -> Result<Option<&[u8]>> {
        if self.failed {
            return Err(corrupt("reading goes on after an error"));
        }
        match self.advance() {
            Ok(true) => Ok(Some(&self.plain)),
            Ok(false) => Ok(None),
            Err(e) => {
                self.failed = true;
                self.plain.clear();
                self.given = 0;
                Err(match &self.name {
                    Some(n) => e.during(format_args!("object {n}")),
                    None => e,
                })
            }
        }
    }

    /// The whole plaintext; only for objects that are known to be small.
    pub fn read_all(mut self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(chunk) = self.next_chunk()? {
            all.extend_from_slice(chunk);
        }
        Ok(all)
    }

    fn advance(&mut self) -> Result<bool> {
        if self.done {
            self.plain.clear();
            self.given = 0;
            return Ok(false);
        }
        let mut head = [0; CHUNK_HEAD];
        read_exact(&mut self.input, &mut head)?;
        let head = ChunkHead::parse(&head, self.chunks.limit())?;
        // Grows with the bytes that really come, not with the length that the file claims.
        self.sealed.clear();
        let got = (&mut self.input).take(head.sealed_len as u64).read_to_end(&mut self.sealed).map_err(read_error)?;
        if got != head.sealed_len {
            return Err(corrupt("the object is cut short"));
        }
        let chunk = self.chunks.next;
        self.chunks.open(&head, &mut self.sealed, &mut self.plain)?;
        self.given = 0;
        let offset = self.at;
        self.at += (CHUNK_HEAD + head.sealed_len) as u64;
        if !head.last {
            self.plain_at += self.plain.len() as u64;
            return Ok(true);
        }
        let index = Index::decode(&self.plain)?;
        self.plain.clear();
        if index.chunks != chunk || index.offset != offset || index.plain_bytes != self.plain_at {
            return Err(corrupt("the index does not describe this object"));
        }
        let mut trailer = [0; TRAILER_BYTES];
        read_exact(&mut self.input, &mut trailer)?;
        if trailer != index.trailer() {
            return Err(corrupt("the trailer does not belong to the object"));
        }
        if self.input.read(&mut [0]).map_err(read_error)? != 0 {
            return Err(corrupt("bytes follow the end of the object"));
        }
        self.done = true;
        Ok(false)
    }
}

impl<R: Read> BufRead for Opener<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.given == self.plain.len() {
            self.next_chunk().map_err(io::Error::other)?;
        }
        Ok(&self.plain[self.given..])
    }

    fn consume(&mut self, n: usize) {
        self.given = (self.given + n).min(self.plain.len());
    }
}

impl<R: Read> Read for Opener<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let got = self.fill_buf()?;
        let n = out.len().min(got.len());
        out[..n].copy_from_slice(&got[..n]);
        self.consume(n);
        Ok(n)
    }
}

fn read_exact(input: &mut impl Read, out: &mut [u8]) -> Result<()> {
    input.read_exact(out).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => corrupt("the object is cut short"),
        _ => read_error(e),
    })
}

fn read_error(e: io::Error) -> Error {
    match e.downcast::<Error>() {
        Ok(ours) => ours,
        Err(e) => Error::new(Kind::Unreachable, "cannot read the object").source(e),
    }
}
