//! Hashing for look-ups that happen for every row. Keys come from the database's own users, a flood of collisions would
//! only slow their own backup down: speed counts, not resistance.

use std::hash::{BuildHasherDefault, Hasher};

/// A map from numbers.
pub type ByNumber<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<Multiply>>;

const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Multiplies and folds.
#[derive(Default)]
pub struct Multiply(u64);

impl Multiply {
    #[inline]
    fn mix(&mut self, n: u64) {
        let wide = u128::from(self.0 ^ n).wrapping_mul(u128::from(ODD));
        self.0 = (wide >> 64) as u64 ^ wide as u64;
    }
}

impl Hasher for Multiply {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        self.mix(of_bytes(bytes));
    }

    #[inline]
    fn write_u32(&mut self, n: u32) {
        self.mix(n.into());
    }

    #[inline]
    fn write_u64(&mut self, n: u64) {
        self.mix(n);
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

/// The hash of some bytes.
#[inline]
pub fn of_bytes(bytes: &[u8]) -> u64 {
    let mut h = Multiply(bytes.len() as u64 ^ ODD);
    let mut words = bytes.chunks_exact(8);
    for w in &mut words {
        h.mix(u64::from_le_bytes(w.try_into().expect("chunks of eight")));
    }
    let mut last = [0; 8];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    h.mix(u64::from_le_bytes(last));
    h.0
}
