//! Where buffers go that outgrow memory: sealed segments in a file without a name.
//!
//! The file is unlinked as soon as it is open and its key lives in this process alone, so nothing is left behind, and
//! nothing can be read, whatever happens to the process. What is in it is also still in the source's log.

use crate::crypto::spool::SpoolCipher;
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The directory and what of it is in use.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    used: Arc<AtomicU64>,
}

impl Spool {
    /// Spools into `dir`, which is made, readable by nobody else, when the first file is.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, used: Arc::default() }
    }

    /// Bytes in files that still exist.
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A new, empty file.
    pub fn file(&self) -> Result<SpoolFile> {
        let what = || format!("cannot make a spool file in {}", self.dir.display());
        let hint = "[spool] dir must be a directory that the agent can write to";
        std::fs::create_dir_all(&self.dir).context(Kind::Other, what()).map_err(|e| e.hint(hint))?;
        let path = self.dir.join(format!("{}.spool", uuid::Uuid::new_v4().simple()));
        let file = {
            use std::os::unix::fs::OpenOptionsExt;
            let mut o = File::options();
            o.read(true).write(true).create_new(true).mode(0o600);
            o.open(&path).context(Kind::Other, what()).map_err(|e| e.hint(hint))?
        };
        std::fs::remove_file(&path).context(Kind::Other, what())?;
        Ok(SpoolFile {
            inner: Arc::new(Inner {
                file,
                cipher: SpoolCipher::ephemeral(),
                used: self.used.clone(),
                size: AtomicU64::new(0),
            }),
            segments: 0,
        })
    }
}

struct Inner {
    file: File,
    cipher: SpoolCipher,
    used: Arc<AtomicU64>,
    size: AtomicU64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.used.fetch_sub(*self.size.get_mut(), Ordering::Relaxed);
    }
}

/// A file being written. Its space is given back when the writer and every [`SpoolReader`] are gone.
pub struct SpoolFile {
    inner: Arc<Inner>,
    segments: u64,
}

/// Where a sealed segment lies.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    number: u64,
    at: u64,
    len: u32,
}

impl SpoolFile {
    /// Seals `plain`, in its own memory, and writes it.
    pub fn append(&mut self, mut plain: Vec<u8>) -> Result<Segment> {
        let number = self.segments;
        self.inner.cipher.seal(number, &mut plain)?;
        let at = self.inner.size.load(Ordering::Relaxed);
        self.inner.file.write_all_at(&plain, at).map_err(|e| {
            Error::new(Kind::Other, "cannot write to the spool").code("spool").source(e).hint(
                "a transaction larger than memory needs room in [spool] dir; the source keeps what is not shipped",
            )
        })?;
        let len = plain.len() as u64;
        self.inner.size.fetch_add(len, Ordering::Relaxed);
        self.inner.used.fetch_add(len, Ordering::Relaxed);
        self.segments += 1;
        failpoints::hit(failpoints::SPOOL_AFTER_WRITE)?;
        Ok(Segment { number, at, len: u32::try_from(len).expect("a segment is a buffer's chunk, far below 4 GiB") })
    }

    /// A reader of what was written.
    pub fn reader(&self) -> SpoolReader {
        SpoolReader(self.inner.clone())
    }
}

/// Reads segments back, from any thread.
#[derive(Clone)]
pub struct SpoolReader(Arc<Inner>);

impl SpoolReader {
    /// The segment's plaintext.
    pub fn read(&self, s: Segment) -> Result<Vec<u8>> {
        let mut b = vec![0; s.len as usize];
        self.0.file.read_exact_at(&mut b, s.at).context(Kind::Other, "cannot read the spool back")?;
        self.0.cipher.open(s.number, &mut b)?;
        Ok(b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_come_back_and_the_space_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path().join("spool"));
        let mut f = spool.file().unwrap();
        let a = f.append(b"first".to_vec()).unwrap();
        let b = f.append(vec![7; 100_000]).unwrap();
        let r = f.reader();
        assert_eq!(r.read(b).unwrap(), vec![7; 100_000]);
        assert_eq!(r.read(a).unwrap(), b"first");
        assert!(spool.used_bytes() > 100_005);
        drop(f);
        assert!(spool.used_bytes() > 0);
        drop(r);
        assert_eq!(spool.used_bytes(), 0);
        assert_eq!(std::fs::read_dir(dir.path().join("spool")).unwrap().count(), 0);
    }
}
