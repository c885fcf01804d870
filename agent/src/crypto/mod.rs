//! The sealed container: every object of a repository is one (FORMAT.md, "Container").
//!
//! ```text
//! header (clear) | chunk 0 | chunk 1 | … | index chunk (last) | trailer
//! ```
//!
//! Invariants:
//! - each object has its own key, nonce prefix and commitment, derived from the tenant's data key, a random salt and the
//!   header: nothing of an object opens under another header, another tenant or another object;
//! - plaintext is handed out only after its chunk's tag verified, and the end only after the index said so;
//! - what is read back decides no allocation before it is authenticated.
//!
//! No I/O of its own and no tokio: a [`Sealer`] writes to any `Write`, an [`Opener`] reads from any `Read`.

mod codec;
mod derive;
mod header;
mod key;
mod open;
pub mod random;
mod seal;
mod sections;
pub mod spool;
#[cfg(test)]
mod tests;

pub use codec::Codec;
pub use derive::{CONTEXT_BYTES, derive};
pub use header::{CHUNK_BYTES, Expect, HEADER_BYTES, Header, ObjectKind};
pub use key::{DataKey, KeyId, KeySource, SecretBytes};
pub use open::Opener;
pub use seal::{Sealed, Sealer};
pub use sections::{RangeRead, Section, SectionReader};

/// Bytes of an AES-256-GCM-SIV tag.
const TAG_BYTES: usize = 16;

/// Lower-case hexadecimal, as hashes and names are written everywhere.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut s = String::with_capacity(bytes.len() * 2);
    for b in bytes {
        s.push(char::from(DIGITS[usize::from(b >> 4)]));
        s.push(char::from(DIGITS[usize::from(b & 15)]));
    }
    s
}

/// SHA-256 of bytes in one go.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}
