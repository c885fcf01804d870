//! Sealing of what outgrows memory: segments under a key that never leaves the process.
//!
//! A spool needs no header, no key id and no way to be opened later: when the process ends, its content is noise. Each
//! file takes a [`SpoolCipher`] of its own; segment n of a file opens only as segment n of that file.

use super::derive::derive;
use crate::error::{Error, Kind, Result};
use coffer_cipher::{Cipher, TAG_BYTES};
use std::sync::Arc;
use zeroize::Zeroizing;

/// Bytes that sealing adds to a segment.
pub const OVERHEAD: usize = TAG_BYTES;

/// The process's own key for spool files. Clone it freely; the key is one.
#[derive(Clone)]
pub struct SpoolKey(Arc<Zeroizing<[u8; 32]>>);

impl SpoolKey {
    /// A random key.
    #[must_use]
    pub fn ephemeral() -> Self {
        let mut k = Zeroizing::new([0; 32]);
        super::random::fill(&mut *k);
        Self(Arc::new(k))
    }

    /// The cipher of a new file.
    pub fn file(&self) -> SpoolCipher {
        let mut okm = Zeroizing::new([0; 32]);
        derive(&**self.0, &super::random::bytes::<32>(), &[b"pg_coffer spool 1"], &mut *okm);
        SpoolCipher { cipher: Cipher::new(&okm) }
    }
}

impl std::fmt::Debug for SpoolKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SpoolKey")
    }
}

/// Seals and opens the segments of one spool file. A segment's number is its place in the file (a counter or its
/// offset); sealing two different segments under one number is the caller's error, which GCM-SIV survives.
pub struct SpoolCipher {
    cipher: Cipher,
}

impl SpoolCipher {
    /// A cipher under a key of its own, for a single file.
    #[must_use]
    pub fn ephemeral() -> Self {
        SpoolKey::ephemeral().file()
    }

    /// Seals a segment in place and appends its tag.
    pub fn seal(&self, number: u64, segment: &mut Vec<u8>) -> Result<()> {
        let tag = self
            .cipher
            .seal(nonce(number), &[], segment)
            .map_err(|_| Error::other("a spool segment is too long to seal"))?;
        segment.extend_from_slice(&tag);
        Ok(())
    }

    /// Appends a sealed copy of `plain` to `out`.
    pub fn seal_into(&self, number: u64, plain: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let at = out.len();
        out.extend_from_slice(plain);
        let tag = self
            .cipher
            .seal(nonce(number), &[], &mut out[at..])
            .map_err(|_| Error::other("a spool segment is too long to seal"))?;
        out.extend_from_slice(&tag);
        Ok(())
    }

    /// Opens a sealed segment in place and drops its tag.
    pub fn open(&self, number: u64, segment: &mut Vec<u8>) -> Result<()> {
        let bad = || Error::new(Kind::Verification, "a spool segment was altered on disk").code("corrupt");
        let at = segment.len().checked_sub(OVERHEAD).ok_or_else(bad)?;
        let tag: [u8; OVERHEAD] = segment[at..].try_into().expect("the tag's bytes");
        segment.truncate(at);
        self.cipher.open(nonce(number), &[], segment, &tag).map_err(|_| bad())
    }
}

fn nonce(number: u64) -> [u8; 12] {
    let mut n = [0; 12];
    n[4..].copy_from_slice(&number.to_be_bytes());
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_opens_only_in_its_place_and_its_file() {
        let key = SpoolKey::ephemeral();
        let (a, b) = (key.file(), key.file());
        let mut s = b"rows of several tenants".to_vec();
        a.seal(7, &mut s).unwrap();
        assert_eq!(s.len(), 23 + OVERHEAD);
        assert!(a.open(8, &mut s.clone()).is_err());
        assert!(b.open(7, &mut s.clone()).is_err());
        for i in 0..s.len() {
            let mut t = s.clone();
            t[i] ^= 1;
            assert!(a.open(7, &mut t).is_err(), "byte {i}");
        }
        let mut again = b"before ".to_vec();
        a.seal_into(7, b"rows of several tenants", &mut again).unwrap();
        assert_eq!(again[7..], s[..]);
        a.open(7, &mut s).unwrap();
        assert_eq!(s, b"rows of several tenants");
        assert!(a.open(0, &mut vec![0; OVERHEAD - 1]).is_err());
    }
}
