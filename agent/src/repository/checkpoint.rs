//! Checkpoints: the older part of a commit log in one object, without what retention removed, so that a log of years is
//! read as quickly as one of the recovery window.
//!
//! A checkpoint stands for the records below a number. Records that still mean something stand in it as they were; those
//! whose every object is below a floor become one record for many ([`shortened`]), which still says who had changes there, so
//! that a reader finds a hole and never an idle time. The first record behind it names the hash of the last one that it
//! stands for, so the chain goes on.
//!
//! Invariants:
//! - a store's packs and records are removed below a checkpoint of the same store only, after that was read back;
//! - a number below a checkpoint is taken, as one in a pack is;
//! - what a record says to a reader who knows the floors is what the records said that it stands for, or that it is unknown.

use super::packs::{self, Shelf};
use super::store::{Created, Store};
use super::{Body, LogRecord, Member, ObjectRef, Repository, paths};
use crate::crypto::{Codec, Expect, Header, ObjectKind, Opener, Sealer, random};
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::repository::model::{SequencesAt, Ship};
use bytes::Bytes;
use coffer_wire::Lsn;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use uuid::Uuid;

const VERSION: u32 = 1;
/// Objects removed at a time.
const PARALLEL: usize = 32;
const HOUR_US: i64 = 3_600 * 1_000_000;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    v: u32,
    /// It stands for the records below this number.
    pub end: u64,
    /// SHA-256 (hexadecimal) of the object that held record `end`-1.
    pub hash: String,
    /// Never empty; the last one has number `end`-1.
    pub records: Vec<Arc<LogRecord>>,
}

impl Checkpoint {
    /// Stands for the records of a log below `end`, which is the number of one of them. `before`: those below were in a
    /// checkpoint already. `None`: there is nothing to be won.
    pub fn of(
        log: &[Arc<LogRecord>],
        before: u64,
        end: u64,
        is_gone: &dyn Fn(&LogRecord, &ObjectRef) -> bool,
    ) -> Option<Self> {
        let hash = log.iter().find(|r| r.n == end)?.prev.clone()?;
        let below = log.iter().take_while(|r| r.n < end).cloned().collect::<Vec<_>>();
        let left = |r: &Arc<LogRecord>| match &r.body {
            Body::Timeline { at, .. } => Some(*at),
            _ => None,
        };
        let left: Vec<Lsn> = log.iter().filter_map(left).collect();
        let records = shortened(&below, before, &left, is_gone);
        (before < end).then_some(Self { v: VERSION, end, hash, records })
    }

    /// The newest record that it stands for.
    pub fn last(&self) -> Option<&Arc<LogRecord>> {
        self.records.last()
    }

    fn seal(&self, repository: &Repository, source: Uuid) -> Result<Bytes> {
        let last = self.last().ok_or_else(|| Error::other("a checkpoint without records"))?;
        let key = repository.keyring.repository_key();
        let header = Header {
            kind: ObjectKind::Checkpoint,
            codec: Codec::Zstd,
            tenant: repository.uid,
            object: random::uuid(),
            source,
            system_identifier: last.system_identifier,
            timeline: last.timeline,
            lsn_start: self.records[0].from_lsn,
            lsn_end: last.upto_lsn,
            key_version: key.id.version,
        };
        let mut sealer = Sealer::new(Vec::new(), &header, &key)?;
        let text = serde_json::to_vec(self).context(Kind::Other, "cannot encode a checkpoint")?;
        sealer.write_all(&text).context(Kind::Other, "cannot seal a checkpoint")?;
        Ok(sealer.finish()?.0.into())
    }

    fn open(repository: &Repository, source: Uuid, end: u64, bytes: &[u8]) -> Result<Self> {
        let path = paths::checkpoint(source, end);
        let during = |e: Error| e.during(format_args!("checkpoint {path}"));
        let expect =
            Expect { tenant: Some(repository.uid), source: Some(source), ..Expect::kind(ObjectKind::Checkpoint) };
        let text = Opener::new(bytes, &*repository.keyring, &expect).and_then(Opener::read_all).map_err(during)?;
        let c: Self = serde_json::from_slice(&text).map_err(|e| {
            Error::new(Kind::Verification, format!("checkpoint {path} says something this coffer does not understand"))
                .code("malformed")
                .hint("a newer coffer wrote it: upgrade this one")
                .source(e)
        })?;
        let is_whole = c.v == VERSION
            && c.end == end
            && c.last().is_some_and(|r| r.n + 1 == end)
            && c.records.iter().all(|r| r.source == source)
            && c.records.is_sorted_by(|a, b| a.n < b.n);
        if !is_whole {
            return Err(Error::new(Kind::Verification, format!("{path} is no checkpoint of this place in the log"))
                .code("replayed"));
        }
        Ok(c)
    }

    /// The checkpoint of one store that ends there.
    pub(super) async fn read(repository: &Repository, store: &Store, source: Uuid, end: u64) -> Result<Self> {
        let bytes = store.get(&paths::checkpoint(source, end)).await?;
        Self::open(repository, source, end, &bytes)
    }

    /// The newest checkpoint that one of these stores has, and that can be read. What is damaged in one store is taken from
    /// another; when none is left, what it stood for may still be there.
    pub(super) async fn newest(
        repository: &Repository,
        source: Uuid,
        copies: &[(Arc<Store>, Shelf)],
    ) -> Result<Option<Self>> {
        let mut all: Vec<(u64, &Arc<Store>)> =
            copies.iter().flat_map(|(store, s)| s.checkpoint_ends().map(move |end| (end, store))).collect();
        all.sort_by_key(|(end, _)| std::cmp::Reverse(*end));
        let mut damaged = None;
        for (end, store) in all {
            match Self::read(repository, store, source, end).await {
                Ok(c) => return Ok(Some(c)),
                // A damaged header may name a key that nobody has.
                Err(e) if matches!(e.kind(), Kind::Verification | Kind::Key) => {
                    tracing::warn!("store {}: {e}", store.name());
                    damaged.get_or_insert(e);
                }
                Err(e) => return Err(e),
            }
        }
        match damaged {
            Some(e) if !copies.iter().any(|(_, s)| s.contains_itself(0)) => Err(e),
            _ => Ok(None),
        }
    }
}

/// The same log in fewer records: those whose objects are all gone are joined where they lie side by side, but not across a
/// position where a timeline was `left`. `before`: records below this number were joined already.
fn shortened(
    records: &[Arc<LogRecord>],
    before: u64,
    left: &[Lsn],
    is_gone: &dyn Fn(&LogRecord, &ObjectRef) -> bool,
) -> Vec<Arc<LogRecord>> {
    let is_spent = |r: &LogRecord| match &r.body {
        Body::Idle => true,
        Body::Ship(s) => s.eventful == Some(false) && r.objects().all(|o| is_gone(r, o)),
        _ => false,
    };
    let mut out: Vec<Arc<LogRecord>> = Vec::new();
    // The hour of the newest reading of sequences of the record before, and the place of that hour's first one there.
    let mut hour: Option<(i64, usize)> = None;
    for r in records {
        let this_hour = (r.n >= before).then_some(r.upto_time_us.div_euclid(HOUR_US));
        let joined = out.last().filter(|a| is_spent(a) && is_spent(r)).and_then(|a| {
            let first = hour.filter(|(h, _)| Some(*h) == this_hour).map(|(_, first)| first);
            let joined = join(a, r, first)?;
            let is_left = left.iter().any(|at| joined.from_lsn < *at && *at < joined.upto_lsn);
            (!is_left).then_some(joined)
        });
        let readings = |r: &LogRecord| match &r.body {
            Body::Ship(s) => s.sequences.len(),
            _ => 0,
        };
        let had = out.last().filter(|_| joined.is_some()).map_or(0, |a| readings(a));
        match joined {
            Some(j) => *out.last_mut().expect("it was joined to it") = Arc::new(j),
            None => {
                out.push(r.clone());
                hour = None;
            }
        }
        // Unless they went into those of the hour.
        let now = out.last().map_or(0, |a| readings(a));
        if readings(r) > 0 && hour.map(|(h, _)| h) != this_hour {
            hour = this_hour.map(|h| (h, had.min(now - 1)));
        }
    }
    out
}

/// One record for two that follow each other on a timeline. Of each tenant the last changeset stands for all of its own, and
/// one list of times for the others. `hour`: where in the first the readings of sequences begin that are of the same hour.
fn join(a: &LogRecord, b: &LogRecord, hour: Option<usize>) -> Option<LogRecord> {
    if (a.timeline, a.system_identifier, a.upto_lsn) != (b.timeline, b.system_identifier, b.from_lsn) {
        return None;
    }
    let body = match (&a.body, &b.body) {
        (Body::Idle, Body::Idle) => Body::Idle,
        (Body::Ship(s), Body::Idle) | (Body::Idle, Body::Ship(s)) => Body::Ship(Ship { joined: true, ..s.clone() }),
        (Body::Ship(s), Body::Ship(t)) => Body::Ship(join_ships(s, t, hour)),
        _ => return None,
    };
    Some(LogRecord { from_lsn: a.from_lsn, prev: a.prev.clone(), body, ..b.clone() })
}

fn join_ships(a: &Ship, b: &Ship, hour: Option<usize>) -> Ship {
    let mut last: BTreeMap<Uuid, &ObjectRef> = BTreeMap::new();
    for o in a.objects.iter().chain(&b.objects) {
        let kept = last.entry(o.tenant).or_insert(o);
        if o.lsn_end >= kept.lsn_end {
            *kept = o;
        }
    }
    let mut sequences = a.sequences.clone();
    for reading in &b.sequences {
        match hour {
            Some(first) if take_in(&mut sequences, first, reading) => {}
            _ => sequences.push(reading.clone()),
        }
    }
    // A ship without transactions stands for an idle record: it has no times.
    let times = |of: fn(&Ship) -> i64| [a, b].into_iter().filter(|s| s.txns > 0).map(of).collect::<Vec<_>>();
    let min_xid = [a, b].into_iter().filter(|s| s.txns > 0).map(|s| s.min_xid).min();
    let known_min = [a, b].into_iter().filter(|s| s.txns > 0).all(|s| s.min_commit_us.is_some());
    Ship {
        txns: a.txns + b.txns,
        min_xid: min_xid.unwrap_or(0),
        max_xid: a.max_xid.max(b.max_xid),
        first_commit_us: times(|s| s.first_commit_us).first().copied().unwrap_or(a.first_commit_us),
        last_commit_us: times(|s| s.last_commit_us).last().copied().unwrap_or(b.last_commit_us),
        max_commit_us: times(|s| s.max_commit_us).into_iter().max().unwrap_or(b.max_commit_us),
        min_commit_us: match known_min {
            true => times(|s| s.min_commit_us.unwrap_or(i64::MIN)).into_iter().min().or(b.min_commit_us),
            false => None,
        },
        eventful: Some(false),
        common: b.common.clone().or_else(|| a.common.clone()),
        objects: last.into_values().cloned().collect(),
        sequences,
        joined: true,
    }
}

/// Puts a reading among those of its hour, which begin at `first`: the newest states at the first position and at the last. A
/// sequence that stands higher than it did then does no harm there. One that stands lower is for later positions only: from
/// there on the hour's readings stay as they are.
fn take_in(sequences: &mut Vec<SequencesAt>, first: usize, reading: &SequencesAt) -> bool {
    let Some(begin) = sequences.get(first).filter(|_| sequences.len() <= first + 2) else { return false };
    let known = |name: &str| begin.states.iter().find(|s| s.name == name);
    if reading.states.iter().any(|s| known(&s.name).is_some_and(|k| k.last_value > s.last_value)) {
        return false;
    }
    let mut begin = begin.clone();
    for s in &reading.states {
        match begin.states.iter_mut().find(|k| k.name == s.name) {
            Some(k) => *k = s.clone(),
            None => begin.states.push(s.clone()),
        }
    }
    let end = SequencesAt { lsn: reading.lsn, states: begin.states.clone() };
    sequences.truncate(first);
    sequences.extend([begin, end]);
    true
}

impl Repository {
    /// Puts a checkpoint into every store that answers, and removes there what it stands for. Returns how many objects.
    pub async fn begin_log_with(&self, source: Uuid, checkpoint: &Checkpoint) -> Result<u64> {
        let bytes = checkpoint.seal(self, source)?;
        let (mut removed, mut failed) = (0, None);
        for m in self.members.iter().filter(|m| m.attached()) {
            match self.begin_with(m, source, checkpoint.end, &bytes).await {
                Ok(n) => removed += n,
                // What is wrong with one keeps no other from it.
                Err(e) => drop(failed.get_or_insert(e)),
            }
        }
        failed.map_or(Ok(removed), Err)
    }

    async fn begin_with(&self, m: &Member, source: Uuid, end: u64, bytes: &Bytes) -> Result<u64> {
        // One that lacks some of them, and perhaps of what they name, is brought up to date by the copier, and as a whole.
        let shelf = Shelf::list(&m.store, source).await?;
        if !(0..end).all(|n| shelf.contains(n)) {
            return Ok(0);
        }
        self.put_checkpoint(m, source, end, bytes.clone()).await?;
        failpoints::hit(failpoints::CHECKPOINT_AFTER_WRITE)?;
        self.remove_below(m, source).await
    }

    /// Puts a checkpoint into a store. Two may be made of the same records at once: either will do.
    pub(super) async fn put_checkpoint(&self, m: &Member, source: Uuid, end: u64, bytes: Bytes) -> Result<()> {
        match m.store.create(&paths::checkpoint(source, end), bytes).await? {
            Created::Lost(theirs) => Checkpoint::open(self, source, end, &theirs).map(drop),
            _ => Ok(()),
        }
    }

    /// Removes from a store what its newest checkpoint stands for, which is read first.
    pub(super) async fn remove_below(&self, m: &Member, source: Uuid) -> Result<u64> {
        let shelf = Shelf::list(&m.store, source).await?;
        let Some(end) = shelf.checkpoint() else { return Ok(0) };
        let below = shelf.names_below(source, end);
        if below.is_empty() {
            return Ok(0);
        }
        Checkpoint::read(self, &m.store, source, end).await?;
        let each = below.iter().map(|path| async move {
            failpoints::hit(failpoints::CHECKPOINT_BEFORE_REMOVE)?;
            m.store.delete(path).await
        });
        stream::iter(each.collect::<Vec<_>>()).buffered(PARALLEL).try_collect::<Vec<()>>().await?;
        Ok(below.len() as u64)
    }

    /// The newest checkpoint of another store than `target` that stands for record `n`.
    pub(super) async fn checkpoint_from_others(
        &self,
        target: &Member,
        source: Uuid,
        n: u64,
    ) -> Result<Option<(Checkpoint, Bytes)>> {
        let is_passed_over =
            |e: &Error| matches!(e.kind(), Kind::Unreachable | Kind::Verification | Kind::Key | Kind::NotFound);
        for store in self.others(target) {
            let found = async {
                let listed = packs::checkpoints(store, source).await?;
                let Some(end) = listed.into_iter().max().filter(|end| *end > n) else { return Ok(None) };
                let bytes = store.get(&paths::checkpoint(source, end)).await?;
                Ok(Some((Checkpoint::open(self, source, end, &bytes)?, bytes)))
            };
            match found.await {
                Ok(None) => {}
                Err(e) if is_passed_over(&e) => tracing::debug!("store {}: {e}", store.name()),
                found => return found,
            }
        }
        Ok(None)
    }
}
