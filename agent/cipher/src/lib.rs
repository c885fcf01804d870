//! The loops that touch every byte: compress, seal, hash.
//!
//! A crate of its own because their generics are compiled where they are used: here they are optimised in every profile,
//! and the agent around them still builds quickly. Nothing here knows keys, headers or files; `agent/src/crypto` does.

mod codec;

pub use codec::{Codec, CodecError, Compressor, Decompressor, lz4_bound, lz4_compress, lz4_decompress};

use aes_gcm_siv::{AeadInOut, Aes256GcmSiv, KeyInit};
use sha2::Digest;

/// Bytes of a tag.
pub const TAG_BYTES: usize = 16;

/// AES-256-GCM-SIV (RFC 8452) under one key; the key is wiped when it is dropped.
pub struct Cipher(Aes256GcmSiv);

/// What was opened is not what was sealed, or something is longer than the cipher allows (64 GiB).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

impl Cipher {
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Aes256GcmSiv::new(key.into()))
    }

    /// Seals in place; returns the tag.
    #[inline(never)]
    pub fn seal(&self, nonce: [u8; 12], aad: &[u8], text: &mut [u8]) -> Result<[u8; TAG_BYTES], Refused> {
        let tag = self.0.encrypt_inout_detached(&nonce.into(), aad, text.into()).map_err(|_| Refused)?;
        Ok(tag.into())
    }

    /// Opens in place; on an error the content of `text` is worthless.
    #[inline(never)]
    pub fn open(&self, nonce: [u8; 12], aad: &[u8], text: &mut [u8], tag: &[u8; TAG_BYTES]) -> Result<(), Refused> {
        self.0.decrypt_inout_detached(&nonce.into(), aad, text.into(), tag.into()).map_err(|_| Refused)
    }
}

/// SHA-256 of what is given piece by piece.
#[derive(Clone, Default)]
pub struct Sha256(sha2::Sha256);

impl Sha256 {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[inline(never)]
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    #[inline(never)]
    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// SHA-256 of bytes in one go.
#[inline(never)]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    sha2::Sha256::digest(bytes).into()
}

/// HKDF-SHA256 (RFC 5869): `out`, at most 8160 bytes, from a secret, a salt and a context in pieces.
#[inline(never)]
pub fn hkdf(secret: &[u8], salt: &[u8], context: &[&[u8]], out: &mut [u8]) {
    hkdf::Hkdf::<sha2::Sha256>::new(Some(salt), secret)
        .expand_multi_info(context, out)
        .expect("no more than the 8160 bytes that HKDF-SHA256 can give");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // RFC 8452, appendix C.2, the case of an 8-byte plaintext without associated data.
        let mut key = [0u8; 32];
        key[0] = 1;
        let mut nonce = [0u8; 12];
        nonce[0] = 3;
        let mut text = [1u8, 0, 0, 0, 0, 0, 0, 0];
        let tag = Cipher::new(&key).seal(nonce, &[], &mut text).unwrap();
        assert_eq!(text, [0xc2, 0xef, 0x32, 0x8e, 0x5c, 0x71, 0xc8, 0x3b]);
        assert_eq!(
            tag,
            [0x84, 0x31, 0x22, 0x13, 0x0f, 0x73, 0x64, 0xb7, 0x61, 0xe0, 0xb9, 0x74, 0x27, 0xe3, 0xdf, 0x28]
        );
        Cipher::new(&key).open(nonce, &[], &mut text, &tag).unwrap();
        assert_eq!(text[0], 1);
        // RFC 5869, A.3: no salt, no info.
        let mut out = [0; 42];
        hkdf(&[0x0b; 22], &[], &[], &mut out);
        assert_eq!(out[..4], [0x8d, 0xa4, 0xe7, 0x75]);
        let mut h = Sha256::new();
        h.update(b"ab");
        h.update(b"c");
        assert_eq!(h.finish(), sha256(b"abc"));
        assert_eq!(sha256(b"abc")[..4], [0xba, 0x78, 0x16, 0xbf]);
    }
}
