//! Packs: many records of a commit log in one object, so that a log of years is read with few requests and listed in few
//! names.
//!
//! A pack holds the very bytes of the objects of consecutive records (FORMAT.md, "Packs"). Nothing is sealed anew and
//! nothing has to be believed: every record is opened and checked against the hash of the one before, wherever its bytes
//! come from.
//!
//! Invariants:
//! - a pack is made from what the same store has, and read back before the first of its records is removed there;
//! - packs begin at multiples of their length, so that everybody makes the same ones; the newest record is never packed;
//! - a number whose record was packed away is still taken: a writer looks for the pack after it won a number
//!   ([`super::Log::append`]).

use super::log::open_record;
use super::store::{Created, Store};
use super::{Member, Repository, paths};
use crate::crypto::{hex, sha256};
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// Records read or removed at a time.
const PARALLEL: usize = 32;
/// How often the agent looks whether there is something to pack.
const LOOK: Duration = Duration::from_secs(60);

/// Records of a pack: some hours of a log at the default interval.
#[cfg(not(feature = "failpoints"))]
pub fn records_of_a_pack() -> u64 {
    1024
}

/// Records of a pack: 1,024, or what `COFFER_TEST_PACK` says. Only in builds with the feature `failpoints`.
#[cfg(feature = "failpoints")]
pub fn records_of_a_pack() -> u64 {
    static RECORDS: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| {
        let Ok(text) = std::env::var("COFFER_TEST_PACK") else { return 1024 };
        let n = text.parse().ok().filter(|n| *n > 0);
        n.unwrap_or_else(|| panic!("COFFER_TEST_PACK: '{text}' is not a number of records"))
    });
    *RECORDS
}

/// What one store has of a log: records in objects of their own, and packs.
#[derive(Clone, Debug, Default)]
pub(super) struct Shelf {
    singles: BTreeSet<u64>,
    /// By the number of the first record, the number after the last.
    packs: BTreeMap<u64, u64>,
    /// Where checkpoints end: each stands for all records before.
    checkpoints: BTreeSet<u64>,
}

impl Shelf {
    /// Records first, checkpoints last: what goes from one list to the next between the two is in the second.
    pub async fn list(store: &Store, source: Uuid) -> Result<Self> {
        let singles = store.list(&paths::log_dir(source)).await?;
        let packs = store.list(&paths::packs_dir(source)).await?;
        Ok(Self {
            singles: singles.iter().filter_map(|(name, _)| paths::log_number(name)).collect(),
            packs: packs.iter().filter_map(|(name, _)| paths::pack_range(name)).map(|r| (r.start, r.end)).collect(),
            checkpoints: checkpoints(store, source).await?,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.singles.is_empty() && self.packs.is_empty() && self.checkpoints.is_empty()
    }

    /// The newest record's number.
    pub fn last(&self) -> Option<u64> {
        let before = self.packs.values().max().max(self.checkpoints.last()).map(|end| end - 1);
        self.singles.last().copied().max(before)
    }

    /// Where its checkpoints end.
    pub fn checkpoint_ends(&self) -> impl Iterator<Item = u64> {
        self.checkpoints.iter().copied()
    }

    /// Where the newest checkpoint ends.
    pub fn checkpoint(&self) -> Option<u64> {
        self.checkpoints.last().copied()
    }

    /// Whether it has a record, or a checkpoint that stands for it.
    pub fn contains(&self, n: u64) -> bool {
        self.checkpoint().is_some_and(|end| n < end) || self.contains_itself(n)
    }

    /// Whether it has a record as it was written.
    pub fn contains_itself(&self, n: u64) -> bool {
        self.singles.contains(&n) || self.pack_with(n).is_some()
    }

    /// The pack that holds a record.
    pub fn pack_with(&self, n: u64) -> Option<Range<u64>> {
        let (first, end) = self.packs.range(..=n).next_back()?;
        (n < *end).then_some(*first..*end)
    }

    /// Whether any record of a range is there.
    fn has_some(&self, range: &Range<u64>) -> bool {
        self.singles.range(range.clone()).next().is_some() || range.clone().any(|n| self.pack_with(n).is_some())
    }

    /// The names of what a log is read from that begins with the checkpoint of this end, or with record 0.
    pub fn names_from(&self, source: Uuid, first: u64) -> Vec<String> {
        let checkpoint = self.checkpoints.get(&first).map(|end| paths::checkpoint(source, *end));
        let packs = self.packs.iter().filter(|(_, end)| **end > first);
        let packs = packs.map(|(first, end)| paths::pack(source, &(*first..*end)));
        let singles = self.singles.range(first..).map(|n| paths::log_record(source, *n));
        checkpoint.into_iter().chain(packs).chain(singles).collect()
    }

    /// The names of what the checkpoint of this end stands for, older checkpoints among them.
    pub fn names_below(&self, source: Uuid, end: u64) -> Vec<String> {
        let older = self.checkpoints.range(..end).map(|end| paths::checkpoint(source, *end));
        let packs = self.packs.iter().filter(|(_, pack_end)| **pack_end <= end);
        let packs = packs.map(|(first, end)| paths::pack(source, &(*first..*end)));
        let singles = self.singles.range(..end).map(|n| paths::log_record(source, *n));
        older.chain(packs).chain(singles).collect()
    }
}

/// Where the checkpoints of one store end.
pub(super) async fn checkpoints(store: &Store, source: Uuid) -> Result<BTreeSet<u64>> {
    let listed = store.list(&paths::checkpoints_dir(source)).await?;
    Ok(listed.iter().filter_map(|(name, _)| paths::log_number(name)).collect())
}

/// The objects of records one after another, each behind its length.
fn encode(records: &[Bytes]) -> Result<Bytes> {
    let mut out = BytesMut::with_capacity(records.iter().map(|r| r.len() + 4).sum());
    for r in records {
        let len = u32::try_from(r.len()).map_err(|_| Error::other(format!("a record has {} bytes", r.len())))?;
        out.put_u32_le(len);
        out.extend_from_slice(r);
    }
    Ok(out.freeze())
}

/// The objects of a pack's records.
fn decode(path: &str, range: &Range<u64>, mut bytes: Bytes) -> Result<Vec<Bytes>> {
    let bad = || Error::new(Kind::Verification, format!("pack {path} does not add up")).code("malformed");
    let mut out = Vec::new();
    while !bytes.is_empty() {
        if bytes.len() < 4 {
            return Err(bad());
        }
        let head = bytes.split_to(4);
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if bytes.len() < len {
            return Err(bad());
        }
        out.push(bytes.split_to(len));
    }
    if out.len() as u64 != range.end - range.start {
        return Err(bad());
    }
    Ok(out)
}

/// The objects of a pack's records, from one store.
pub(super) async fn read(store: &Store, source: Uuid, range: &Range<u64>) -> Result<Vec<Bytes>> {
    let path = paths::pack(source, range);
    let bytes = store.get(&path).await?;
    decode(&path, range, bytes)
}

/// The object that a record has for itself.
pub(super) async fn single(store: &Store, source: Uuid, n: u64) -> Result<Bytes> {
    store.get(&paths::log_record(source, n)).await
}

/// The object of one record, from one store: its own, or out of the pack that took it in meanwhile.
pub(super) async fn record(store: &Store, source: Uuid, n: u64) -> Result<Bytes> {
    match single(store, source, n).await {
        Err(e) if e.kind() == Kind::NotFound => match Shelf::list(store, source).await?.pack_with(n) {
            Some(range) => Ok(read(store, source, &range).await?.swap_remove((n - range.start) as usize)),
            None => Err(e),
        },
        r => r,
    }
}

/// What was done for one store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    pub packs: u64,
    /// Objects of records that are in a pack now.
    pub removed: u64,
}

impl Repository {
    /// Packs what this process's log has grown to, for as long as it is polled; never returns.
    pub async fn pack_log(&self, source: Uuid) {
        let mut done = 0;
        loop {
            let end = self.ends.lock().unwrap_or_else(PoisonError::into_inner).get(&source).copied().unwrap_or(0);
            if end / records_of_a_pack() > done {
                done = self.pack_everywhere(source, end).await;
            }
            tokio::time::sleep(LOOK.min(Duration::from_millis(50 * records_of_a_pack()))).await;
        }
    }

    /// Packs the log of every store; what to compare with next time.
    async fn pack_everywhere(&self, source: Uuid, end: u64) -> u64 {
        let mut done = end / records_of_a_pack();
        for m in self.members.iter().filter(|m| m.attached()) {
            match self.pack_log_of(m, source, end).await {
                Ok(p) => tracing::debug!(store = m.store.name(), packs = p.packs, removed = p.removed, "log packed"),
                // Two records of one number, or a pack that does not hold what it should: somebody has to look.
                Err(e) if e.kind() == Kind::Verification => {
                    tracing::warn!("the log of store {} is not packed: {e}", m.store.name());
                }
                // Nothing is the worse for it; a store that keeps what is to be removed keeps it.
                Err(e) => {
                    tracing::debug!("the log of store {} is not packed: {e}", m.store.name());
                    if e.kind() == Kind::Unreachable {
                        done = 0;
                    }
                }
            }
        }
        done
    }

    /// Packs the records below `end` that one store has, and removes there what is in a pack.
    pub(super) async fn pack_log_of(&self, m: &Member, source: Uuid, end: u64) -> Result<Packed> {
        let (store, size) = (&m.store, records_of_a_pack());
        let shelf = Shelf::list(store, source).await?;
        let mut packed = Packed::default();
        let begins = shelf.checkpoint().unwrap_or(0);
        if !shelf.names_below(source, begins).is_empty() {
            packed.removed += self.remove_below(m, source).await?;
        }
        let mut ranges: Vec<Range<u64>> = shelf.packs.iter().map(|(first, end)| *first..*end).collect();
        let whole = (0..end.saturating_sub(1) / size).map(|i| i * size..(i + 1) * size);
        ranges.extend(whole.filter(|r| r.clone().all(|n| shelf.singles.contains(&n))));
        ranges.retain(|r| r.end > begins);
        ranges.sort_by_key(|r| r.start);
        ranges.dedup();
        for range in ranges {
            let singles: Vec<u64> = shelf.singles.range(range.clone()).copied().collect();
            if singles.is_empty() {
                continue;
            }
            let path = paths::pack(source, &range);
            if !shelf.packs.contains_key(&range.start) {
                let bytes = self.gather(store, source, &range).await?;
                if let Created::Lost(_) = store.create(&path, bytes).await? {
                    return Err(Error::new(Kind::Verification, format!("{path} holds other records than the log"))
                        .code("chain_gap"));
                }
                packed.packs += 1;
                failpoints::hit(failpoints::PACK_AFTER_WRITE)?;
            }
            packed.removed += remove(store, source, &range, &singles).await?;
        }
        Ok(packed)
    }

    /// A pack of these records, as a store has them.
    async fn gather(&self, store: &Arc<Store>, source: Uuid, range: &Range<u64>) -> Result<Bytes> {
        let each: Vec<_> = range.clone().map(|n| record(store, source, n)).collect();
        let objects: Vec<Bytes> = stream::iter(each).buffered(PARALLEL).try_collect().await?;
        let mut before = None;
        for (n, bytes) in range.clone().zip(&objects) {
            let record = open_record(self, source, n, bytes)?;
            if before.is_some() && record.prev != before {
                let path = paths::log_record(source, n);
                return Err(Error::new(Kind::Verification, format!("record {path} does not follow the one before it"))
                    .code("chain_gap"));
            }
            before = Some(hex(&sha256(bytes)));
        }
        encode(&objects)
    }

    /// Where a store's missing records are copied from. `listed`: what the other stores have is looked up first.
    pub(super) async fn elsewhere(&self, target: &Member, source: Uuid, listed: bool) -> Result<Elsewhere> {
        let mut shelves = Vec::new();
        for store in self.others(target) {
            let shelf = match listed {
                true => Shelf::list(store, source).await,
                false => Ok(Shelf::default()),
            };
            match shelf {
                Ok(s) => shelves.push((store.clone(), s)),
                Err(e) if e.kind() == Kind::Unreachable => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Elsewhere { source, shelves, pack: None })
    }

    /// A pack that begins at a record, from another store than `target`, if `has` has none of its records.
    pub(super) async fn pack_from_others(
        &self,
        target: &Member,
        source: Uuid,
        n: u64,
        has: &Shelf,
    ) -> Result<Option<(Range<u64>, Vec<Bytes>)>> {
        let range = n..n + records_of_a_pack();
        if !n.is_multiple_of(records_of_a_pack()) || has.has_some(&range) {
            return Ok(None);
        }
        let path = paths::pack(source, &range);
        for store in self.others(target) {
            if let Ok(Some(bytes)) = store.get_opt(&path).await {
                return Ok(Some((range.clone(), decode(&path, &range, bytes)?)));
            }
        }
        Ok(None)
    }

    /// Puts a pack of another store's records into this one.
    pub(super) async fn put_pack(&self, m: &Member, source: Uuid, range: &Range<u64>, records: &[Bytes]) -> Result<()> {
        let path = paths::pack(source, range);
        match m.store.create(&path, encode(records)?).await? {
            Created::Lost(_) => Err(Error::new(
                Kind::Verification,
                format!("store {} holds another {path} than the others", m.store.name()),
            )
            .code("chain_gap")),
            _ => Ok(()),
        }
    }
}

/// Records of other stores than the one that they are copied to.
pub(super) struct Elsewhere {
    source: Uuid,
    shelves: Vec<(Arc<Store>, Shelf)>,
    /// The pack that was read last.
    pack: Option<(Range<u64>, Vec<Bytes>)>,
}

impl Elsewhere {
    /// The object of a record. What is in a pack is taken from there: beside it a writer that came too late may have left one.
    pub async fn object(&mut self, n: u64) -> Result<Bytes> {
        if let Some((range, objects)) = self.pack.as_ref().filter(|(range, _)| range.contains(&n)) {
            return Ok(objects[(n - range.start) as usize].clone());
        }
        let mut last = None;
        for (store, shelf) in &self.shelves {
            let got = match shelf.pack_with(n) {
                Some(range) => read(store, self.source, &range).await.map(|objects| {
                    let one = objects[(n - range.start) as usize].clone();
                    self.pack = Some((range, objects));
                    one
                }),
                None => record(store, self.source, n).await,
            };
            match got {
                Ok(b) => return Ok(b),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| super::replicate::nowhere(&paths::log_record(self.source, n))))
    }
}

/// Removes the objects of records that a pack of the same store has, byte for byte.
async fn remove(store: &Arc<Store>, source: Uuid, range: &Range<u64>, singles: &[u64]) -> Result<u64> {
    let packed = read(store, source, range).await?;
    let each: Vec<_> = singles
        .iter()
        .map(|n| {
            let (n, packed) = (*n, &packed[(n - range.start) as usize]);
            async move {
                let path = paths::log_record(source, n);
                match store.get_opt(&path).await? {
                    None => Ok(0),
                    Some(own) if own == *packed => {
                        failpoints::hit(failpoints::PACK_BEFORE_REMOVE)?;
                        store.delete(&path).await.map(|()| 1)
                    }
                    Some(_) => Err(Error::new(
                        Kind::Verification,
                        format!("record {path} is another than the one in {}", paths::pack(source, range)),
                    )
                    .code("chain_gap")),
                }
            }
        })
        .collect();
    Ok(stream::iter(each).buffered(PARALLEL).try_collect::<Vec<u64>>().await?.into_iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_gives_its_records_back_and_a_cut_one_is_refused() {
        let records: Vec<Bytes> = [&b"one"[..], b"", b"three"].map(Bytes::from_static).to_vec();
        let packed = encode(&records).unwrap();
        assert_eq!(decode("p", &(8..11), packed.clone()).unwrap(), records);
        for cut in 0..packed.len() {
            assert!(decode("p", &(8..11), packed.slice(..cut)).is_err(), "cut at {cut}");
        }
        assert!(decode("p", &(8..12), packed).is_err());
    }

    #[test]
    fn a_shelf_has_what_its_objects_and_its_packs_have() {
        let s = Shelf { singles: [7, 12].into(), packs: [(0, 4), (8, 12)].into(), ..Shelf::default() };
        let has: Vec<u64> = (0..14).filter(|n| s.contains(*n)).collect();
        assert_eq!(has, [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]);
        assert_eq!((s.last(), s.pack_with(3), s.pack_with(7)), (Some(12), Some(0..4), None));
        assert!(s.has_some(&(3..6)) && !s.has_some(&(4..7)));
        assert_eq!(Shelf::default().last(), None);
    }
}
