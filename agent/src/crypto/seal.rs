//! Writing a container.

use super::derive::ContainerKeys;
use super::header::{CHUNK_BYTES, Header, RawHeader};
use super::key::DataKey;
use super::sections::{Index, Section, TRAILER_BYTES};
use crate::error::{Context, Error, Kind, Result};
use coffer_cipher::{Compressor, Sha256, TAG_BYTES};
use std::io::{self, Write};

/// Bit of a chunk's length word: the plaintext is stored as it is.
pub(super) const RAW: u32 = 1 << 31;
/// Bit of a chunk's length word: the last chunk, the index.
pub(super) const LAST: u32 = 1 << 30;
/// The length itself.
pub(super) const LEN_MASK: u32 = LAST - 1;
/// Bytes in front of a chunk: length word, sealed length.
pub(super) const CHUNK_HEAD: usize = 8;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Length of the object.
    pub bytes: u64,
    pub plain_bytes: u64,
    /// SHA-256 of the object's bytes.
    pub sha256: [u8; 32],
}

/// Compresses and seals what is written to it, chunk by chunk, into `W`. Without [`Sealer::finish`] the object lacks its
/// last chunk and never opens.
pub struct Sealer<W: Write> {
    out: W,
    keys: ContainerKeys,
    /// SHA-256 of the header: part of every chunk's associated data.
    header_hash: [u8; 32],
    compressor: Compressor,
    hash: Sha256,
    /// Plaintext of the chunk being filled.
    plain: Vec<u8>,
    /// The chunk being sealed, with its head.
    sealed: Vec<u8>,
    chunks: u32,
    /// Bytes written so far.
    at: u64,
    plain_at: u64,
    sections: Vec<Section>,
}

impl<W: Write> Sealer<W> {
    /// Starts an object under a random salt. The key must be the header's: same uid, same version.
    pub fn new(out: W, header: &Header, key: &DataKey) -> Result<Self> {
        Self::with_salt(out, header, key, super::random::bytes())
    }

    /// The same with a given salt. A salt used twice with one key and header would repeat nonces: only for vectors.
    pub(super) fn with_salt(mut out: W, header: &Header, key: &DataKey, salt: [u8; 32]) -> Result<Self> {
        if key.id.uid != header.tenant || key.id.version != header.key_version {
            return Err(Error::other(format!(
                "an object of {} version {} was to be sealed under the key {}",
                header.tenant, header.key_version, key.id
            )));
        }
        let mut raw: RawHeader = header.encode(&salt);
        let keys = ContainerKeys::new(key.secret(), &salt, raw.context());
        raw.set_commitment(&keys.commitment);
        out.write_all(&raw.bytes).context(Kind::Other, "cannot write a sealed object")?;
        let mut hash = Sha256::new();
        hash.update(&raw.bytes);
        Ok(Self {
            out,
            keys,
            header_hash: super::sha256(&raw.bytes),
            compressor: Compressor::new(header.codec).map_err(|_| Error::other("cannot start the compressor"))?,
            hash,
            plain: Vec::new(),
            sealed: Vec::new(),
            chunks: 0,
            at: raw.bytes.len() as u64,
            plain_at: 0,
            sections: Vec::new(),
        })
    }

    /// Begins a section: what follows can be read without what came before.
    pub fn section(&mut self, label: &str) -> Result<()> {
        self.flush_chunk().map_err(from_io)?;
        if label.len() > usize::from(u16::MAX) {
            return Err(Error::other("a section's label is longer than 65535 bytes"));
        }
        self.sections.push(Section {
            label: label.to_owned(),
            chunk: self.chunks,
            offset: self.at,
            plain_offset: self.plain_at,
        });
        Ok(())
    }

    /// Plaintext bytes so far.
    pub fn plain_bytes(&self) -> u64 {
        self.plain_at + self.plain.len() as u64
    }

    /// Writes the index and the trailer.
    pub fn finish(mut self) -> Result<(W, Sealed)> {
        self.flush_chunk().map_err(from_io)?;
        let index = Index {
            sections: std::mem::take(&mut self.sections),
            chunks: self.chunks,
            offset: self.at,
            plain_bytes: self.plain_at,
        };
        let encoded = index.encode()?;
        self.seal_chunk(&encoded, true).map_err(from_io)?;
        let trailer: [u8; TRAILER_BYTES] = index.trailer();
        self.put(&trailer).map_err(from_io)?;
        self.out.flush().map_err(from_io)?;
        let sha256 = self.hash.finish();
        Ok((self.out, Sealed { bytes: self.at, plain_bytes: self.plain_at, sha256 }))
    }

    fn flush_chunk(&mut self) -> io::Result<()> {
        if self.plain.is_empty() {
            return Ok(());
        }
        let mut plain = std::mem::take(&mut self.plain);
        let done = self.seal_chunk(&plain, false);
        plain.clear();
        self.plain = plain;
        done
    }

    /// Compresses, seals and writes one chunk. In the buffer: head, then the ciphertext in place of the compressed
    /// bytes, then the tag, so that it leaves in one write.
    fn seal_chunk(&mut self, plain: &[u8], last: bool) -> io::Result<()> {
        let counter = self.chunks;
        self.chunks = counter.checked_add(1).ok_or_else(|| io::Error::other("an object has more than 2^32 chunks"))?;
        self.sealed.resize(CHUNK_HEAD + Compressor::bound(plain.len()).max(plain.len()) + TAG_BYTES, 0);
        let mut word = plain.len() as u32;
        let n = match self.compressor.compress(plain, &mut self.sealed[CHUNK_HEAD..]) {
            Some(n) => n,
            None => {
                word |= RAW;
                self.sealed[CHUNK_HEAD..CHUNK_HEAD + plain.len()].copy_from_slice(plain);
                plain.len()
            }
        };
        if last {
            word |= LAST;
        }
        let aad = aad(&self.header_hash, word);
        let nonce = self.keys.nonce(counter, last);
        let tag = self
            .keys
            .cipher
            .seal(nonce, &aad, &mut self.sealed[CHUNK_HEAD..CHUNK_HEAD + n])
            .map_err(|_| io::Error::other("a chunk is too long to seal"))?;
        self.sealed[..4].copy_from_slice(&word.to_le_bytes());
        self.sealed[4..8].copy_from_slice(&((n + TAG_BYTES) as u32).to_le_bytes());
        self.sealed[CHUNK_HEAD + n..CHUNK_HEAD + n + TAG_BYTES].copy_from_slice(&tag);
        let sealed = std::mem::take(&mut self.sealed);
        let done = self.put(&sealed[..CHUNK_HEAD + n + TAG_BYTES]);
        self.sealed = sealed;
        if !last {
            self.plain_at += plain.len() as u64;
        }
        done
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

impl<W: Write> Write for Sealer<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // A whole chunk is sealed from where it is; only what does not fill one is kept.
        if self.plain.is_empty() && buf.len() >= CHUNK_BYTES {
            self.seal_chunk(&buf[..CHUNK_BYTES], false)?;
            return Ok(CHUNK_BYTES);
        }
        let n = buf.len().min(CHUNK_BYTES - self.plain.len());
        self.plain.extend_from_slice(&buf[..n]);
        if self.plain.len() == CHUNK_BYTES {
            self.flush_chunk()?;
        }
        Ok(n)
    }

    /// Does nothing: a chunk leaves when it is full, when a section begins, or at the end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Associated data of a chunk.
pub(super) fn aad(header_hash: &[u8; 32], word: u32) -> [u8; 36] {
    let mut a = [0; 36];
    a[..32].copy_from_slice(header_hash);
    a[32..].copy_from_slice(&word.to_le_bytes());
    a
}

/// Our error out of an `io::Error` that may carry one.
pub(super) fn from_io(e: io::Error) -> Error {
    match e.downcast::<Error>() {
        Ok(ours) => ours,
        Err(e) => Error::new(Kind::Other, "cannot write a sealed object").source(e),
    }
}
