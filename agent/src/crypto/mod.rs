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

pub use coffer_cipher::{Codec, Sha256, sha256};
pub use derive::{CONTEXT_BYTES, derive};
pub use header::{CHUNK_BYTES, Expect, HEADER_BYTES, Header, ObjectKind};
pub use key::{DataKey, KeyId, KeySource, SecretBytes};
pub use open::Opener;
pub use seal::{Sealed, Sealer};
pub use sections::{RangeRead, Section, SectionRead, SectionReader};

/// Lower-case hexadecimal, as hashes and names are written everywhere.
pub fn hex(bytes: &[u8]) -> String {
    let mut digits = Vec::with_capacity(bytes.len() * 2);
    put_hex(&mut digits, bytes);
    digits.into_iter().map(char::from).collect()
}

/// Appends the same digits.
pub fn put_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for b in bytes {
        out.extend_from_slice(&[DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]);
    }
}
