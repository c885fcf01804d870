//! A set of OIDs. The server gives them out by counting, so they lie close together and a bit each is enough.

use std::collections::BTreeMap;

const WORDS: usize = 1024;

/// A set of OIDs, kept in blocks of 65536.
#[derive(Clone, Debug, Default)]
pub struct OidSet {
    blocks: BTreeMap<u16, Box<[u64; WORDS]>>,
    len: u64,
}

impl OidSet {
    /// True when it was not there.
    pub fn insert(&mut self, oid: u32) -> bool {
        let (block, word, bit) = place(oid);
        let word = &mut self.blocks.entry(block).or_insert_with(|| Box::new([0; WORDS]))[word];
        let new = *word & bit == 0;
        *word |= bit;
        self.len += u64::from(new);
        new
    }

    /// True when it was there.
    pub fn remove(&mut self, oid: u32) -> bool {
        let (block, word, bit) = place(oid);
        let Some(words) = self.blocks.get_mut(&block) else { return false };
        let had = words[word] & bit != 0;
        words[word] &= !bit;
        self.len -= u64::from(had);
        had
    }

    pub fn contains(&self, oid: u32) -> bool {
        let (block, word, bit) = place(oid);
        self.blocks.get(&block).is_some_and(|w| w[word] & bit != 0)
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Ascending, from `first` on.
    pub fn from(&self, first: u32) -> impl Iterator<Item = u32> + '_ {
        let blocks = self.blocks.range((first >> 16) as u16..);
        blocks
            .flat_map(|(block, words)| {
                let block = u32::from(*block) << 16;
                words.iter().enumerate().filter(|(_, w)| **w != 0).flat_map(move |(i, w)| {
                    let w = *w;
                    (0..64u32).filter(move |b| w >> b & 1 == 1).map(move |b| block | (i as u32) << 6 | b)
                })
            })
            .skip_while(move |o| *o < first)
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.from(0)
    }
}

fn place(oid: u32) -> (u16, usize, u64) {
    ((oid >> 16) as u16, (oid >> 6) as usize & (WORDS - 1), 1 << (oid & 63))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(oids in proptest::collection::vec(prop_oneof![0..200u32, any::<u32>()], 0..60), out in 0..60usize, at: u32) {
            let (mut set, mut truth) = (OidSet::default(), BTreeSet::new());
            for o in &oids {
                prop_assert_eq!(set.insert(*o), truth.insert(*o));
            }
            for o in oids.iter().take(out) {
                prop_assert_eq!(set.remove(*o), truth.remove(o));
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), truth.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.from(at).next(), truth.range(at..).next().copied());
            prop_assert_eq!((set.len(), set.is_empty()), (truth.len() as u64, truth.is_empty()));
            prop_assert!(oids.iter().all(|o| set.contains(*o) == truth.contains(o)));
        }
    }
}
