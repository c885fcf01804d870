//! Where the merge keeps what outgrows its memory: files under a key that dies with the process.
//!
//! A file is unlinked as soon as it is open, so a crash leaves nothing behind but noise without a name. It is a row of
//! segments `len u32 | sealed`, each compressed (lz4) and sealed under its offset, so a segment that was swapped or
//! altered on disk does not open.

use crate::crypto::spool::{SpoolCipher, SpoolKey};
use crate::error::{Context, Error, Kind, Result};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Plain bytes of a segment, unless the memory is too small for it.
pub const DEFAULT_SEGMENT_BYTES: usize = 256 << 10;

/// A folder for scratch files, and the key they are sealed under. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Scratch {
    dir: Arc<PathBuf>,
    key: SpoolKey,
    written: Arc<AtomicU64>,
    segment_bytes: usize,
}

impl Scratch {
    /// Creates the folder when it is absent.
    pub fn new(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .context(Kind::Other, format_args!("cannot create the spool folder {}", dir.display()))
            .map_err(|e| e.hint("set [spool] dir to a folder that the agent may write to"))?;
        Ok(Self {
            dir: Arc::new(dir.to_owned()),
            key: SpoolKey::ephemeral(),
            written: Arc::default(),
            segment_bytes: DEFAULT_SEGMENT_BYTES,
        })
    }

    /// The same with segments small enough that several fit in `memory` bytes.
    #[must_use]
    pub fn for_memory(mut self, memory: usize) -> Self {
        self.segment_bytes = (memory / 32).clamp(256, DEFAULT_SEGMENT_BYTES);
        self
    }

    /// Bytes written to all files so far.
    pub fn bytes_written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Plain bytes of a segment: what a reader of a file holds in memory.
    pub(super) fn segment_bytes(&self) -> usize {
        self.segment_bytes
    }

    fn file(&self) -> Result<SealedFile> {
        let path = self.dir.join(format!("merge-{}", uuid::Uuid::new_v4().simple()));
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .context(Kind::Other, format_args!("cannot create the spool file {}", path.display()))?;
        std::fs::remove_file(&path).context(Kind::Other, format_args!("cannot unlink {}", path.display()))?;
        Ok(SealedFile { file, cipher: self.key.file() })
    }

    pub(super) fn writer(&self) -> Result<ScratchWriter> {
        Ok(ScratchWriter {
            out: Segments { file: Arc::new(self.file()?), at: 0, scratch: self.clone(), sealed: Vec::new() },
            buf: Vec::new(),
        })
    }

    /// A store for values that are too large for the sort.
    pub fn blobs(&self) -> Result<Blobs> {
        let out = Segments { file: Arc::new(self.file()?), at: 0, scratch: self.clone(), sealed: Vec::new() };
        Ok(Blobs { file: out.file.clone(), out: Mutex::new(out) })
    }
}

struct SealedFile {
    file: File,
    cipher: SpoolCipher,
}

impl SealedFile {
    /// Reads the segment at `at` into `plain`; returns the offset after it.
    fn read(&self, at: u64, sealed: &mut Vec<u8>, plain: &mut Vec<u8>) -> Result<u64> {
        let io = |e| Error::new(Kind::Other, "cannot read back a spool file").source(e);
        let mut len = [0; 4];
        self.file.read_exact_at(&mut len, at).map_err(io)?;
        let len = u32::from_le_bytes(len) as usize;
        sealed.clear();
        sealed.resize(len, 0);
        self.file.read_exact_at(sealed, at + 4).map_err(io)?;
        self.cipher.open(at, sealed)?;
        let (size, packed) = sealed
            .split_first_chunk::<4>()
            .ok_or_else(|| Error::new(Kind::Verification, "a spool segment is malformed"))?;
        plain.clear();
        plain.resize(u32::from_le_bytes(*size) as usize, 0);
        coffer_cipher::lz4_decompress(packed, plain)
            .map_err(|e| Error::new(Kind::Verification, "a spool segment is malformed").source(e))?;
        Ok(at + 4 + len as u64)
    }
}

/// The writing end of a file.
struct Segments {
    file: Arc<SealedFile>,
    at: u64,
    scratch: Scratch,
    sealed: Vec<u8>,
}

impl Segments {
    fn put(&mut self, plain: &[u8]) -> Result<()> {
        let io = |e| {
            Error::new(Kind::Other, "cannot write a spool file").source(e).hint("the folder of [spool] dir may be full")
        };
        self.sealed.clear();
        self.sealed.resize(4 + coffer_cipher::lz4_bound(plain.len()), 0);
        let n = coffer_cipher::lz4_compress(plain, &mut self.sealed[4..])
            .map_err(|e| Error::other("cannot compress a spool segment").source(e))?;
        self.sealed[..4].copy_from_slice(&(plain.len() as u32).to_le_bytes());
        self.sealed.truncate(4 + n);
        self.file.cipher.seal(self.at, &mut self.sealed)?;
        let len = self.sealed.len() as u64;
        self.file.file.write_all_at(&(len as u32).to_le_bytes(), self.at).map_err(io)?;
        self.file.file.write_all_at(&self.sealed, self.at + 4).map_err(io)?;
        self.at += 4 + len;
        self.scratch.written.fetch_add(4 + len, Ordering::Relaxed);
        Ok(())
    }
}

/// Writes a file from start to end.
pub(super) struct ScratchWriter {
    out: Segments,
    buf: Vec<u8>,
}

impl ScratchWriter {
    pub fn write(&mut self, mut b: &[u8]) -> Result<()> {
        let limit = self.out.scratch.segment_bytes;
        while !b.is_empty() {
            let room = limit - self.buf.len();
            let (now, later) = b.split_at(b.len().min(room));
            self.buf.extend_from_slice(now);
            b = later;
            if self.buf.len() == limit {
                self.out.put(&self.buf)?;
                self.buf.clear();
            }
        }
        Ok(())
    }

    pub fn finish(mut self) -> Result<ScratchFile> {
        if !self.buf.is_empty() {
            self.out.put(&self.buf)?;
        }
        Ok(ScratchFile { file: self.out.file, end: self.out.at })
    }
}

/// A finished file; can be read more than once.
pub(super) struct ScratchFile {
    file: Arc<SealedFile>,
    end: u64,
}

impl ScratchFile {
    pub fn reader(&self) -> ScratchReader {
        ScratchReader { file: self.file.clone(), at: 0, end: self.end, sealed: Vec::new(), plain: Vec::new(), taken: 0 }
    }

    pub fn len(&self) -> u64 {
        self.end
    }
}

/// Reads a file from start to end; holds one segment.
pub(super) struct ScratchReader {
    file: Arc<SealedFile>,
    at: u64,
    end: u64,
    sealed: Vec<u8>,
    plain: Vec<u8>,
    taken: usize,
}

impl ScratchReader {
    /// Fills `out` or, at the very end, returns false.
    pub fn read(&mut self, out: &mut [u8]) -> Result<bool> {
        let mut done = 0;
        while done < out.len() {
            if self.taken == self.plain.len() {
                if self.at == self.end {
                    if done == 0 {
                        return Ok(false);
                    }
                    return Err(Error::new(Kind::Verification, "a spool file ends inside an entry").code("corrupt"));
                }
                self.at = self.file.read(self.at, &mut self.sealed, &mut self.plain)?;
                self.taken = 0;
            }
            let n = (out.len() - done).min(self.plain.len() - self.taken);
            out[done..done + n].copy_from_slice(&self.plain[self.taken..self.taken + n]);
            self.taken += n;
            done += n;
        }
        Ok(true)
    }
}

/// Values too large for the sort, each in segments of its own.
pub struct Blobs {
    file: Arc<SealedFile>,
    out: Mutex<Segments>,
}

/// Where a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobRef {
    at: u64,
    /// Plain bytes.
    pub len: u64,
}

pub(super) const BLOB_REF_LEN: usize = 16;

impl BlobRef {
    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.at.to_le_bytes());
        out.extend_from_slice(&self.len.to_le_bytes());
    }

    pub(super) fn decode(b: &[u8]) -> Self {
        let at8 = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().expect("a blob reference has 16 bytes"));
        Self { at: at8(0), len: at8(8) }
    }
}

impl Blobs {
    /// A new blob. Others wait until it is finished or dropped.
    pub(super) fn writer(&self) -> BlobWriter<'_> {
        let out = self.out.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        BlobWriter { at: out.at, out, buf: Vec::new(), len: 0 }
    }

    pub(super) fn reader(&self, r: BlobRef) -> BlobReader {
        BlobReader { file: self.file.clone(), at: r.at, left: r.len, sealed: Vec::new(), plain: Vec::new(), taken: 0 }
    }
}

pub(super) struct BlobWriter<'a> {
    out: MutexGuard<'a, Segments>,
    at: u64,
    buf: Vec<u8>,
    len: u64,
}

impl BlobWriter<'_> {
    pub fn write(&mut self, mut b: &[u8]) -> Result<()> {
        self.len += b.len() as u64;
        let limit = self.out.scratch.segment_bytes;
        while !b.is_empty() {
            let (now, later) = b.split_at(b.len().min(limit - self.buf.len()));
            self.buf.extend_from_slice(now);
            b = later;
            if self.buf.len() == limit {
                self.out.put(&self.buf)?;
                self.buf.clear();
            }
        }
        Ok(())
    }

    pub fn finish(mut self) -> Result<BlobRef> {
        if !self.buf.is_empty() {
            self.out.put(&self.buf)?;
        }
        Ok(BlobRef { at: self.at, len: self.len })
    }
}

/// Reads a blob; holds one segment.
pub(super) struct BlobReader {
    file: Arc<SealedFile>,
    at: u64,
    left: u64,
    sealed: Vec<u8>,
    plain: Vec<u8>,
    taken: usize,
}

impl Read for BlobReader {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 || out.is_empty() {
            return Ok(0);
        }
        if self.taken == self.plain.len() {
            self.at = self.file.read(self.at, &mut self.sealed, &mut self.plain).map_err(std::io::Error::other)?;
            self.taken = 0;
        }
        let n = out.len().min(self.plain.len() - self.taken).min(usize::try_from(self.left).unwrap_or(usize::MAX));
        out[..n].copy_from_slice(&self.plain[self.taken..self.taken + n]);
        self.taken += n;
        self.left -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_the_folder_stays_empty() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap().for_memory(4096);
        let data: Vec<u8> = (0..10_000u32).flat_map(u32::to_le_bytes).collect();
        let mut w = scratch.writer().unwrap();
        for c in data.chunks(77) {
            w.write(c).unwrap();
        }
        let f = w.finish().unwrap();
        for _ in 0..2 {
            let mut r = f.reader();
            let mut back = vec![0; data.len()];
            assert!(r.read(&mut back).unwrap());
            assert_eq!(back, data);
            assert!(!r.read(&mut [0]).unwrap());
        }
        let blobs = scratch.blobs().unwrap();
        let mut refs = Vec::new();
        for n in [0, 1, 255, 256, 257, 9999] {
            let mut w = blobs.writer();
            w.write(&data[..n]).unwrap();
            refs.push((n, w.finish().unwrap()));
        }
        for (n, r) in refs {
            let mut back = Vec::new();
            blobs.reader(r).read_to_end(&mut back).unwrap();
            assert_eq!(back, &data[..n]);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(scratch.bytes_written() > 0);
    }
}
