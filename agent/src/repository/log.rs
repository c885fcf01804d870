//! The commit log of a source: numbered, hash-chained, sealed records of what is durable.
//!
//! A number is won at the sequencer by put-if-absent. Whoever loses it learns that another agent writes the log and stops:
//! that is the whole fencing, without leases. The record then goes to the other required stores; a store that missed some
//! gets them, data first, before the next record.

use super::checkpoint::Checkpoint;
use super::model::{Body, LogRecord, RECORD_VERSION};
use super::packs::{self, Shelf};
use super::store::{Created, Store};
use super::{Access, Repository, paths, patiently};
use crate::clock::rfc3339;
use crate::crypto::{Codec, Expect, Header, ObjectKind, Opener, Sealer, hex, random, sha256};
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use bytes::Bytes;
use coffer_wire::Lsn;
use futures::future::try_join_all;
use futures::{StreamExt, stream};
use std::io::Write;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Records that are read at once, and packs or such handfuls of records at a time.
const TOGETHER: u64 = 32;
const PARALLEL: usize = 4;
/// How long a reader waits for a required store that is behind: a writer may be between two stores.
const BEHIND_WAIT: Duration = Duration::from_secs(5);
/// How often a log is listed anew because something of it went into a checkpoint while it was read.
const LISTS: u32 = 5;

/// What a record says besides what the log knows itself.
#[derive(Clone, Debug)]
pub struct Draft {
    pub system_identifier: u64,
    pub timeline: u32,
    pub slot: String,
    pub from_lsn: Lsn,
    pub upto_lsn: Lsn,
    pub upto_time_us: i64,
    pub body: Body,
}

/// See the module.
pub struct Log {
    repository: Arc<Repository>,
    source: Uuid,
    /// This process, in its records.
    writer: Uuid,
    head: Option<Head>,
    /// Empty after [`Self::forget_records`].
    records: Vec<Arc<LogRecord>>,
    /// Where the checkpoint ended that it was read from; 0: there was none.
    begins: u64,
    keep_records: bool,
    /// The objects that it was read from, where one store was named.
    names: Vec<String>,
    /// Every required store has every record.
    level: bool,
    /// A reason why nothing can be appended any more.
    broken: Option<String>,
}

/// The newest record and the hash of its object.
struct Head {
    hash: String,
    record: Arc<LogRecord>,
}

impl Log {
    /// Reads and verifies the log of a source; of a source without one, an empty log.
    ///
    /// Without `from`, the head is the highest among all stores, and for readers a required store that does not answer or
    /// stays behind is an error. With it, the log is what that store has.
    pub async fn open(repository: &Arc<Repository>, source: Uuid, from: Option<&str>) -> Result<Self> {
        let mut log = Self {
            repository: repository.clone(),
            source,
            writer: random::uuid(),
            head: None,
            records: Vec::new(),
            begins: 0,
            keep_records: true,
            names: Vec::new(),
            level: false,
            broken: None,
        };
        let mut lists = 1;
        let copies = loop {
            let copies = copies(repository, source, from).await?;
            match log.read(&copies).await {
                Ok(()) => break copies,
                Err(e) if e.kind() == Kind::NotFound && lists < LISTS => lists += 1,
                Err(e) => return Err(e),
            }
        };
        if from.is_some() {
            log.names = copies.iter().flat_map(|(_, shelf)| shelf.names_from(source, log.begins)).collect();
        }
        if let Some(head) = &log.head {
            for (store, shelf) in &copies {
                if shelf.last() == Some(head.record.n)
                    && let Some(m) = repository.members.iter().find(|m| Arc::ptr_eq(&m.store, store))
                {
                    m.set_durable(source, head.record.upto_lsn);
                }
            }
        }
        Ok(log)
    }

    /// Reads it from what was listed. What is missing may have gone into a checkpoint since.
    pub(super) async fn read(&mut self, copies: &[(Arc<Store>, Shelf)]) -> Result<()> {
        let (repository, source) = (&self.repository.clone(), self.source);
        (self.head, self.records, self.begins) = (None, Vec::new(), 0);
        if let Some(c) = Checkpoint::newest(repository, source, copies).await? {
            self.begins = c.end;
            self.head = c.last().map(|record| Head { hash: c.hash.clone(), record: record.clone() });
            self.records = c.records;
        }
        let each: Vec<_> = pieces(copies, source, self.begins)?
            .into_iter()
            .map(|p| async move {
                let objects = p.objects(source).await?;
                let opened =
                    p.records.clone().zip(objects).map(|(n, bytes)| {
                        open_record(repository, source, n, &bytes).map(|r| (r, hex(&sha256(&bytes))))
                    });
                opened.collect::<Result<Vec<_>>>().map_err(|e| match p.packed {
                    true => e.during(format_args!("in {}", paths::pack(source, &p.records))),
                    false => e,
                })
            })
            .collect();
        let mut read = stream::iter(each).buffered(PARALLEL);
        while let Some(piece) = read.next().await {
            for (record, hash) in piece? {
                self.follow(record, hash)?;
            }
        }
        Ok(())
    }

    /// Takes in the record that comes next.
    fn follow(&mut self, record: LogRecord, hash: String) -> Result<()> {
        let before = self.head.as_ref().map(|h| &h.hash);
        if record.prev.as_ref() != before {
            return Err(Error::new(
                Kind::Verification,
                format!(
                    "record {} does not follow the record before it: the hash that it names is another",
                    paths::log_record(self.source, record.n)
                ),
            )
            .code("chain_gap"));
        }
        let record = Arc::new(record);
        self.records.push(record.clone());
        self.head = Some(Head { hash, record });
        Ok(())
    }

    pub fn source(&self) -> Uuid {
        self.source
    }

    /// The id that this log's appends carry.
    pub fn writer(&self) -> Uuid {
        self.writer
    }

    /// All records, those of the checkpoint first, unless they were forgotten.
    pub fn records(&self) -> &[Arc<LogRecord>] {
        &self.records
    }

    /// Where the checkpoint ended that it was read from; 0: there was none.
    pub fn begins(&self) -> u64 {
        self.begins
    }

    /// The objects that it was read from; empty unless one store was named.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Frees the records: a writer needs only the newest.
    pub fn forget_records(&mut self) {
        self.records = Vec::new();
        self.keep_records = false;
    }

    /// The newest record.
    pub fn last(&self) -> Option<&Arc<LogRecord>> {
        self.head.as_ref().map(|h| &h.record)
    }

    /// Where the next transaction to be archived begins; `None` for an empty log.
    pub fn upto_lsn(&self) -> Option<Lsn> {
        self.last().map(|r| r.upto_lsn)
    }

    /// Appends a record: in every required store when this returns. Every object that it names must be there already.
    /// Losing the number to another agent is [`Kind::Fenced`]. Waits for stores that do not answer.
    ///
    /// A log whose append was dropped half-way must be opened anew.
    pub async fn append(&mut self, draft: Draft) -> Result<Arc<LogRecord>> {
        if let Some(why) = &self.broken {
            return Err(Error::new(Kind::Fenced, format!("the log is closed for this agent: {why}")));
        }
        self.level().await?;
        let n = self.head.as_ref().map_or(0, |h| h.record.n + 1);
        let record = LogRecord {
            v: RECORD_VERSION,
            n,
            prev: self.head.as_ref().map(|h| h.hash.clone()),
            source: self.source,
            writer: self.writer,
            at_us: self.repository.clock.now_us(),
            system_identifier: draft.system_identifier,
            timeline: draft.timeline,
            slot: draft.slot,
            from_lsn: draft.from_lsn,
            upto_lsn: draft.upto_lsn,
            upto_time_us: draft.upto_time_us,
            body: draft.body,
        };
        let bytes = seal_record(&self.repository, &record)?;
        let path = paths::log_record(self.source, n);
        self.broken = Some(format!("the append of record {n} was cut off"));
        let sequencer = &self.repository.members[self.repository.sequencer];
        self.win(&sequencer.store, &path, &record, &bytes).await?;
        self.is_unpacked(&sequencer.store, n).await?;
        failpoints::hit(failpoints::LOG_AFTER_SEQUENCER)?;
        let others = self.repository.required().filter(|m| !Arc::ptr_eq(&m.store, &sequencer.store));
        try_join_all(others.map(|m| self.win(&m.store, &path, &record, &bytes))).await?;
        self.broken = None;
        for m in self.repository.required() {
            m.set_durable(self.source, record.upto_lsn);
            m.set_complete(self.source, n + 1);
        }
        let record = Arc::new(record);
        if self.keep_records {
            self.records.push(record.clone());
        }
        self.head = Some(Head { hash: hex(&sha256(&bytes)), record: record.clone() });
        self.repository.ends.lock().unwrap_or_else(PoisonError::into_inner).insert(self.source, n + 1);
        self.repository.grown.notify_waiters();
        Ok(record)
    }

    /// Puts the record into one store, or says who was first.
    async fn win(&self, store: &Arc<Store>, path: &str, record: &LogRecord, bytes: &Bytes) -> Result<()> {
        let created = patiently(store, || async { store.create(path, bytes.clone()).await }).await?;
        let Created::Lost(theirs) = created else { return Ok(()) };
        let by = match open_record(&self.repository, self.source, record.n, &theirs) {
            Ok(r) => format!("agent {} wrote it at {}", r.writer, rfc3339(r.at_us)),
            Err(e) => format!("what lies there is no record of this log ({e})"),
        };
        Err(Error::new(
            Kind::Fenced,
            format!(
                "record {} of the log is taken in store {}: {by}; this agent is {}",
                record.n,
                store.name(),
                self.writer
            ),
        )
        .hint("one agent writes a source's log: stop one of the two; the one that goes on resumes from the log"))
    }

    /// A number whose record is in a pack or behind a checkpoint can be won by a writer that stood still meanwhile: it is
    /// somebody else's.
    async fn is_unpacked(&self, sequencer: &Arc<Store>, n: u64) -> Result<()> {
        let first = n - n % packs::records_of_a_pack();
        let pack = paths::pack(self.source, &(first..first + packs::records_of_a_pack()));
        // In the order in which a record goes on: from the pack into the checkpoint.
        let mut place = patiently(sequencer, || sequencer.size(&pack)).await?.map(|_| pack);
        if place.is_none() {
            let checkpoints = patiently(sequencer, || packs::checkpoints(sequencer, self.source)).await?;
            place = checkpoints.last().filter(|end| **end > n).map(|end| paths::checkpoint(self.source, *end));
        }
        let Some(place) = place else { return Ok(()) };
        // What was won is ours alone, and nobody is to take it for the record.
        if let Err(e) = sequencer.delete(&paths::log_record(self.source, n)).await {
            tracing::warn!("a record that counts for nothing stays in store {}: {e}", sequencer.name());
        }
        Err(Error::new(
            Kind::Fenced,
            format!("record {n} of the log was written long ago: it is in {place}; this agent is {}", self.writer),
        )
        .hint("another agent went on with this log while this one stood still: stop this one"))
    }

    /// Brings every required store to this log's head, which only then is durable: an append that was cut off may have
    /// reached the sequencer alone.
    pub async fn level(&mut self) -> Result<()> {
        if self.level {
            return Ok(());
        }
        if let Some(head) = &self.head {
            self.level_to(head).await?;
        }
        self.level = true;
        Ok(())
    }

    async fn level_to(&self, head: &Head) -> Result<()> {
        for m in self.repository.required() {
            patiently(&m.store, || async {
                self.repository.catch_up(m, self.source, head.record.n + 1).await.map(drop)
            })
            .await?;
        }
        Ok(())
    }
}

/// Which records each store has.
pub(super) async fn copies(
    repository: &Arc<Repository>,
    source: Uuid,
    from: Option<&str>,
) -> Result<Vec<(Arc<Store>, Shelf)>> {
    if from.is_some() {
        let store = repository.readable(from)?.remove(0);
        let shelf = Shelf::list(&store, source).await?;
        return Ok(vec![(store, shelf)]);
    }
    let started = Instant::now();
    loop {
        let found = shelves(repository, source).await?;
        let end = found.iter().filter_map(|(_, s)| s.last()).max();
        let behind: Vec<&str> =
            found.iter().filter(|(s, n)| s.required() && n.last() != end).map(|(s, _)| s.name()).collect();
        if behind.is_empty() || repository.access == Access::Write {
            return Ok(found);
        }
        if started.elapsed() > BEHIND_WAIT {
            return Err(Error::new(
                Kind::Unreachable,
                format!("store {} lacks the newest records of the log", behind.join(", ")),
            )
            .code("store_behind")
            .hint("`coffer run` brings it up to date; to read from one store as it is, add --from STORE"));
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// The same, of every store that counts.
async fn shelves(repository: &Arc<Repository>, source: Uuid) -> Result<Vec<(Arc<Store>, Shelf)>> {
    let mut found = Vec::new();
    let mut order: Vec<_> = repository.members.iter().collect();
    order.sort_by_key(|m| !m.store.required());
    for m in order {
        let listed = match m.attached() {
            true => Shelf::list(&m.store, source).await,
            false => Err(Error::new(
                Kind::Unreachable,
                format!("store {} ({}) did not answer", m.store.name(), m.store.shown()),
            )),
        };
        match listed {
            Ok(n) => found.push((m.store.clone(), n)),
            Err(e) if e.kind() == Kind::Unreachable && !m.store.required() => {
                tracing::warn!("an optional store is left out: {e}");
            }
            Err(e) if e.kind() == Kind::Unreachable => {
                return Err(e.hint("its log could be newer than the others'; to read from one store, add --from STORE"));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// A part of a log as it is read: a pack, or some records.
struct Piece {
    records: Range<u64>,
    packed: bool,
    /// Of each record, or of the pack.
    stores: Vec<Arc<Store>>,
}

impl Piece {
    async fn objects(&self, source: Uuid) -> Result<Vec<Bytes>> {
        if self.packed {
            return packs::read(&self.stores[0], source, &self.records).await;
        }
        let each = self.records.clone().zip(&self.stores).map(|(n, store)| packs::single(store, source, n));
        match try_join_all(each).await {
            Err(e) if e.kind() == Kind::NotFound => self.packed_meanwhile(source).await,
            r => r,
        }
    }

    /// The same when one of the records was packed away after it was listed.
    async fn packed_meanwhile(&self, source: Uuid) -> Result<Vec<Bytes>> {
        let mut out = Vec::new();
        let mut pack: Option<(Range<u64>, Vec<Bytes>)> = None;
        for (n, store) in self.records.clone().zip(&self.stores) {
            if pack.as_ref().is_none_or(|(range, _)| !range.contains(&n)) {
                let found = Shelf::list(store, source).await?.pack_with(n);
                pack = match found {
                    Some(range) => Some((range.clone(), packs::read(store, source, &range).await?)),
                    None => None,
                };
            }
            out.push(match &pack {
                Some((range, objects)) => objects[(n - range.start) as usize].clone(),
                None => packs::single(store, source, n).await?,
            });
        }
        Ok(out)
    }
}

/// All records from a number up to the newest that some store has.
fn pieces(copies: &[(Arc<Store>, Shelf)], source: Uuid, first: u64) -> Result<Vec<Piece>> {
    let end = copies.iter().filter_map(|(_, s)| s.last()).max().map_or(0, |n| n + 1);
    let mut out: Vec<Piece> = Vec::new();
    let mut n = first;
    while n < end {
        let pack = copies.iter().find_map(|(store, s)| Some((store, s.pack_with(n).filter(|r| r.start == n)?)));
        if let Some((store, records)) = pack {
            n = records.end;
            out.push(Piece { records, packed: true, stores: vec![store.clone()] });
            continue;
        }
        let (store, _) = copies.iter().find(|(_, s)| s.contains_itself(n)).ok_or_else(|| {
            let path = paths::log_record(source, n);
            Error::new(Kind::Verification, format!("record {path} is missing: the log has a gap")).code("chain_gap")
        })?;
        match out.last_mut().filter(|p| !p.packed && p.records.end - p.records.start < TOGETHER) {
            Some(p) => {
                p.records.end = n + 1;
                p.stores.push(store.clone());
            }
            None => out.push(Piece { records: n..n + 1, packed: false, stores: vec![store.clone()] }),
        }
        n += 1;
    }
    Ok(out)
}

fn seal_record(repository: &Repository, r: &LogRecord) -> Result<Bytes> {
    let key = repository.keyring.repository_key();
    let header = Header {
        kind: ObjectKind::Log,
        codec: Codec::Lz4,
        tenant: repository.uid,
        object: random::uuid(),
        source: r.source,
        system_identifier: r.system_identifier,
        timeline: r.timeline,
        lsn_start: r.from_lsn,
        lsn_end: r.upto_lsn,
        key_version: key.id.version,
    };
    let mut sealer = Sealer::new(Vec::new(), &header, &key)?;
    let text = serde_json::to_vec(r).context(Kind::Other, "cannot encode a record")?;
    sealer.write_all(&text).context(Kind::Other, "cannot seal a record")?;
    Ok(sealer.finish()?.0.into())
}

/// Opens the object at the name of record `n` and checks that it is that record of that source.
pub(super) fn open_record(repository: &Repository, source: Uuid, n: u64, bytes: &[u8]) -> Result<LogRecord> {
    let path = || paths::log_record(source, n);
    let expect = Expect { tenant: Some(repository.uid), source: Some(source), ..Expect::kind(ObjectKind::Log) };
    let text = Opener::new(bytes, &*repository.keyring, &expect)
        .and_then(Opener::read_all)
        .map_err(|e| e.during(format_args!("record {}", path())))?;
    let r: LogRecord = serde_json::from_slice(&text).map_err(|e| {
        Error::new(Kind::Verification, format!("record {} says something this coffer does not understand", path()))
            .code("malformed")
            .hint("a newer coffer wrote it: upgrade this one")
            .source(e)
    })?;
    if r.v != RECORD_VERSION {
        return Err(Error::new(
            Kind::Verification,
            format!("record {} has version {}; this coffer reads version {RECORD_VERSION}", path(), r.v),
        ));
    }
    if r.n != n || r.source != source {
        return Err(Error::new(
            Kind::Verification,
            format!("record {} is record {} of source {}: it was moved here", path(), r.n, r.source),
        )
        .code("replayed"));
    }
    Ok(r)
}
