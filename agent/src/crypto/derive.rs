//! HKDF-SHA256 (RFC 5869) with our labels, and the keys of one container.

use coffer_cipher::Cipher;
use zeroize::Zeroizing;

/// Bytes of the header that go into the derivation: all before the salt.
pub const CONTEXT_BYTES: usize = 96;

/// Label of the derivation of a container's keys.
const CONTAINER_LABEL: &[u8] = b"pg_coffer container 1";

/// `out` from a secret, a salt and the context; equal inputs give equal output, anything else an unrelated one.
pub fn derive(secret: &[u8], salt: &[u8], context: &[&[u8]], out: &mut [u8]) {
    coffer_cipher::hkdf(secret, salt, context, out);
}

/// What one container is sealed with.
pub(super) struct ContainerKeys {
    pub cipher: Cipher,
    pub nonce_prefix: [u8; 7],
    /// Binds the object to this key: GCM-SIV alone lets one ciphertext open under two keys made for it.
    pub commitment: [u8; 32],
}

impl ContainerKeys {
    pub fn new(data_key: &[u8; 32], salt: &[u8; 32], context: &[u8; CONTEXT_BYTES]) -> Self {
        let mut okm = Zeroizing::new([0u8; 32 + 7 + 32]);
        derive(data_key, salt, &[CONTAINER_LABEL, context], &mut *okm);
        let cipher = Cipher::new(okm[..32].try_into().expect("32 bytes are a key"));
        let mut keys = Self { cipher, nonce_prefix: [0; 7], commitment: [0; 32] };
        keys.nonce_prefix.copy_from_slice(&okm[32..39]);
        keys.commitment.copy_from_slice(&okm[39..]);
        keys
    }

    /// prefix | counter (big-endian) | 1 for the last chunk: the STREAM construction.
    pub fn nonce(&self, counter: u32, last: bool) -> [u8; 12] {
        let mut n = [0u8; 12];
        n[..7].copy_from_slice(&self.nonce_prefix);
        n[7..11].copy_from_slice(&counter.to_be_bytes());
        n[11] = u8::from(last);
        n
    }
}

/// Equal, in a time that does not tell where they differ.
pub(super) fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |acc, (x, y)| acc | (x ^ y)) == 0
}
