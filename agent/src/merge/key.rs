//! The sort key: one byte string per version of a row, so that sorting is `memcmp`.
//!
//! `group u32 | relid u32 | epoch u32 | row key, escaped | 00 00 | end_lsn u64 | seq u64 | index u32 | sub u8`, integers
//! big-endian. A zero byte in the row key becomes `00 FF`, so no key is a prefix of another and the order of escaped
//! keys is the order of the keys. LSNs repeat inside a transaction: `seq` and `index` order what happened there.

use coffer_wire::Lsn;
use sha2::{Digest, Sha256};

/// Bytes of group, relid and epoch.
pub(super) const TABLE_LEN: usize = 12;
/// Bytes of the position at the end of a sort key.
pub(super) const POSITION_LEN: usize = 21;
/// Whole-row keys longer than this are cut and told apart by a hash.
const FULL_ROW_PREFIX: usize = 512;

/// What happens inside one change, in this order: the old key goes, the values it leaves arrive, the new row is there.
pub(super) const SUB_OUT: u8 = 0;
pub(super) const SUB_FILL: u8 = 1;
pub(super) const SUB_IN: u8 = 2;

/// Where in the history a change stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// End of the transaction's commit record.
    pub end_lsn: Lsn,
    /// Frame counter inside the transaction.
    pub seq: u64,
    /// Row in the run.
    pub index: u32,
}

impl Position {
    /// Before every change: rows of a base.
    pub const BASE: Self = Self { end_lsn: Lsn::ZERO, seq: 0, index: 0 };
}

/// Appends the part that all versions of a table's rows share.
pub(super) fn put_table(out: &mut Vec<u8>, group: u32, relid: u32, epoch: u32) {
    out.extend_from_slice(&group.to_be_bytes());
    out.extend_from_slice(&relid.to_be_bytes());
    out.extend_from_slice(&epoch.to_be_bytes());
}

/// Appends an escaped row key and its terminator.
pub(super) fn put_row_key(out: &mut Vec<u8>, key: &[u8]) {
    let mut from = 0;
    for at in memchr::memchr_iter(0, key) {
        out.extend_from_slice(&key[from..=at]);
        out.push(0xff);
        from = at + 1;
    }
    out.extend_from_slice(&key[from..]);
    out.extend_from_slice(&[0, 0]);
}

pub(super) fn put_position(out: &mut Vec<u8>, p: Position, sub: u8) {
    out.extend_from_slice(&p.end_lsn.0.to_be_bytes());
    out.extend_from_slice(&p.seq.to_be_bytes());
    out.extend_from_slice(&p.index.to_be_bytes());
    out.push(sub);
}

/// A sort key taken apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct SortKey<'a>(pub &'a [u8]);

impl<'a> SortKey<'a> {
    pub fn group(self) -> u32 {
        u32::from_be_bytes(self.0[..4].try_into().expect("sort keys start with twelve bytes"))
    }

    pub fn relid(self) -> u32 {
        u32::from_be_bytes(self.0[4..8].try_into().expect("sort keys start with twelve bytes"))
    }

    /// Everything but the position: equal for all versions of one row.
    pub fn row(self) -> &'a [u8] {
        &self.0[..self.0.len() - POSITION_LEN]
    }

    /// The row key as it stands in the sort key: escaped, with its terminator.
    pub fn escaped_row_key(self) -> &'a [u8] {
        &self.row()[TABLE_LEN..]
    }

    pub fn position(self) -> Position {
        read_position(&self.0[self.0.len() - POSITION_LEN..])
    }

    /// The row key, unescaped into `out`.
    pub fn row_key(self, out: &mut Vec<u8>) {
        row_key_of(self.row(), out);
    }
}

/// The row key in a sort key without its position, unescaped into `out`.
pub(super) fn row_key_of(row: &[u8], out: &mut Vec<u8>) {
    out.clear();
    let escaped = &row[TABLE_LEN..row.len() - 2];
    let mut from = 0;
    for at in memchr::memchr_iter(0, escaped) {
        out.extend_from_slice(&escaped[from..=at]);
        from = at + 2;
    }
    out.extend_from_slice(&escaped[from..]);
}

pub(super) fn read_position(b: &[u8]) -> Position {
    let at8 = |i: usize| u64::from_be_bytes(b[i..i + 8].try_into().expect("a position has 21 bytes"));
    Position {
        end_lsn: Lsn(at8(0)),
        seq: at8(8),
        index: u32::from_be_bytes(b[16..20].try_into().expect("a position has 21 bytes")),
    }
}

/// The row key of a row that is told apart by its whole image. `hash` is of the whole image and is asked for only when
/// the image is long; `prefix` holds at least its first bytes.
pub(super) fn full_row_key(prefix: &[u8], len: u64, hash: impl FnOnce() -> [u8; 32]) -> Vec<u8> {
    if len <= FULL_ROW_PREFIX as u64 {
        return prefix.to_vec();
    }
    let mut key = prefix[..FULL_ROW_PREFIX].to_vec();
    key.extend_from_slice(&hash());
    key
}

/// The same for an image in memory.
pub(super) fn full_row_key_of(image: &[u8]) -> Vec<u8> {
    full_row_key(image, image.len() as u64, || Sha256::digest(image).into())
}

/// How much of an image [`full_row_key`] needs.
pub(super) const fn full_row_prefix() -> usize {
    FULL_ROW_PREFIX
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn escaped_keys_sort_as_keys_and_come_back(a in proptest::collection::vec(0u8..4, 0..6), b in proptest::collection::vec(0u8..4, 0..6)) {
            let make = |k: &[u8]| {
                let mut out = Vec::new();
                put_table(&mut out, 1, 2, 3);
                put_row_key(&mut out, k);
                put_position(&mut out, Position { end_lsn: Lsn(u64::MAX), seq: 7, index: 9 }, SUB_IN);
                out
            };
            let (ka, kb) = (make(&a), make(&b));
            prop_assert_eq!(ka.cmp(&kb), a.cmp(&b));
            let mut back = Vec::new();
            SortKey(&ka).row_key(&mut back);
            prop_assert_eq!(&back, &a);
            prop_assert_eq!(SortKey(&ka).position(), Position { end_lsn: Lsn(u64::MAX), seq: 7, index: 9 });
            prop_assert_eq!((SortKey(&ka).group(), SortKey(&ka).relid()), (1, 2));
        }
    }
}
