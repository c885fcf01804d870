//! From batches to durable records: seal, upload, commit in order, and only then say so.
//!
//! Batches are prepared (keys ensured, buffers sealed, objects put) several at a time; their records are appended one by
//! one in the stream's order. Only an appended record makes anything durable: then the position goes to the stream's
//! feedback, and the record to whoever listens.
//!
//! A store that does not answer makes this wait, for as long as it takes: the source keeps its log, the open batch goes
//! to the spool, an alarm stands. Losing a record's number to another agent ends the source's stream with exit code 6.
//!
//! # The time of a record
//!
//! `upto_time_us` promises that every commit up to that time, by the source's clock, is at or below `upto_lsn`.
//!
//! - The time of a keepalive promises nothing of the kind: a sender that lags sends the time of now with a position of
//!   long ago.
//! - A pair (t, L) read from the source, the clock first and the insert position of the log after it, does: a commit
//!   record above L is inserted after t. Its commit time is taken by the backend just before that insertion, so it can
//!   be earlier than t only by as long as a backend can be held up between the two. [`CLOCK_MARGIN_US`] is taken off for
//!   that; a larger step back of commit times is what the log's readers call ambiguous and refuse.
//! - So a record whose `upto_lsn` has reached L claims t less the margin. Without such a pair a ship claims one
//!   microsecond less than its latest commit: a commit later than every time claimed is then durable itself.

use crate::alarms;
use crate::batch::{Batch, Buffer, SeenMarker, TenantChanges};
use crate::crypto::{Codec, DataKey, Header, KeySource, ObjectKind, Sealer, random};
use crate::demux::{Flow, ShipItem};
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::keyring::TenantEntry;
use crate::replication::sink;
use crate::repository::model::{Ship, TxnIndex};
use crate::repository::{Body, Draft, Log, LogRecord, ObjectRef, Repository, paths};
use crate::run::{AgentContext, System};
use crate::seal_pool::SealPool;
use crate::sequences::SequenceNotes;
use crate::spool::SpoolReader;
use crate::tenant::Tenant;
use bytes::Bytes;
use coffer_wire::Lsn;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// Taken off a time read from the source before a record claims it. See the module.
pub const CLOCK_MARGIN_US: i64 = 1_000_000;
/// Batches that are prepared at a time.
const IN_FLIGHT: usize = 3;
/// Objects of one batch that are sealed and put at a time.
const PUTS: usize = 32;
/// Objects written through from the spool at a time: each holds parts in memory.
const LARGE_PUTS: usize = 2;
/// First and longest wait before something that failed is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// A record that is in every required store, with the markers of its transactions.
#[derive(Clone, Debug)]
pub struct Durable {
    pub record: Arc<LogRecord>,
    pub markers: Arc<Vec<SeenMarker>>,
}

/// Pairs of a time of the source's clock and a position of its log that was read after it.
#[derive(Debug, Default)]
pub struct Anchors(Mutex<VecDeque<(Lsn, i64)>>);

impl Anchors {
    const MOST: usize = 4096;

    /// Adds a pair. Pairs come in the order in which they were read.
    pub fn add(&self, lsn: Lsn, time_us: i64) {
        self.add_if(lsn, time_us, || true);
    }

    /// The same, if the pair still counts: asked when no [`Self::clear`] can come in between.
    pub fn add_if(&self, lsn: Lsn, time_us: i64, holds: impl FnOnce() -> bool) {
        let mut a = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !holds() {
            return;
        }
        if a.back().is_some_and(|(l, _)| *l > lsn) {
            // Another timeline: what was read before says nothing about it.
            a.clear();
        }
        if a.back().is_some_and(|(l, _)| *l == lsn) {
            a.pop_back();
        }
        if a.len() == Self::MOST {
            // The stream is far behind: every other pair will do.
            let mut keep = false;
            a.retain(|_| {
                keep = !keep;
                keep
            });
        }
        a.push_back((lsn, time_us));
    }

    /// The latest time that a record up to `lsn` may claim.
    pub fn claim(&self, lsn: Lsn) -> Option<i64> {
        let mut a = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let n = a.partition_point(|(l, _)| *l <= lsn);
        // The newest below stays: a record further on may have nothing newer.
        a.drain(..n.saturating_sub(1));
        (n > 0).then(|| a[0].1 - CLOCK_MARGIN_US)
    }

    /// Nothing that was read holds any more.
    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// See the module. One per source.
pub struct Shipper {
    pub ctx: Arc<AgentContext>,
    pub flow: Arc<Flow>,
    pub anchors: Arc<Anchors>,
    pub pool: Arc<SealPool>,
    pub durable: watch::Sender<sink::Durable>,
    pub new_tenants: mpsc::UnboundedSender<TenantEntry>,
    pub sequences: Arc<SequenceNotes>,
}

/// A batch whose objects are in the stores.
struct Prepared {
    from_lsn: Lsn,
    upto_lsn: Lsn,
    ship: Ship,
    markers: Vec<SeenMarker>,
    bytes: u64,
    rows: u64,
}

enum InFlight {
    Batch(Task<Result<Box<Prepared>>>),
    Idle(Lsn),
    Barrier(oneshot::Sender<()>),
}

/// A task that ends when nobody waits for it any more.
struct Task<T>(JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Shipper {
    /// Ships until the way in is closed and everything is durable, or until it cannot go on.
    pub async fn run(self, mut items: mpsc::UnboundedReceiver<ShipItem>) -> Result<()> {
        let shipper = Arc::new(self);
        let mut in_flight: VecDeque<InFlight> = VecDeque::new();
        let mut open = true;
        loop {
            tokio::select! {
                item = items.recv(), if open && in_flight.len() < IN_FLIGHT => match item {
                    None => open = false,
                    Some(ShipItem::Batch(b)) => {
                        let s = shipper.clone();
                        in_flight.push_back(InFlight::Batch(Task(tokio::spawn(async move { s.prepare(*b).await }))));
                    }
                    Some(ShipItem::Idle(lsn)) => in_flight.push_back(InFlight::Idle(lsn)),
                    Some(ShipItem::Barrier(done)) => in_flight.push_back(InFlight::Barrier(done)),
                },
                first = front(&mut in_flight), if !in_flight.is_empty() => {
                    in_flight.pop_front();
                    shipper.commit(first?).await?;
                }
                else => return Ok(()),
            }
        }
    }

    /// Makes what was prepared durable.
    async fn commit(&self, ready: Ready) -> Result<()> {
        let (from_lsn, upto_lsn, body, markers, max_commit_us) = match ready {
            Ready::Barrier(done) => {
                // Whoever waited may have given up.
                let _ = done.send(());
                return Ok(());
            }
            Ready::Idle(lsn) => {
                let from = self.ctx.log.lock().await.upto_lsn().unwrap_or(lsn);
                self.sequences.freshen().await;
                let sequences = self.sequences.take();
                let body = match sequences.is_empty() {
                    true => Body::Idle,
                    // Nothing changed but what no transaction says.
                    false => Body::Ship(Ship { eventful: Some(false), sequences, ..Ship::default() }),
                };
                (from, lsn, body, Vec::new(), None)
            }
            Ready::Batch(mut p) => {
                self.sequences.freshen().await;
                p.ship.sequences = self.sequences.take();
                let objects = p.ship.objects.len() + usize::from(p.ship.common.is_some());
                self.pace(objects);
                metrics::counter!("coffer_shipped_bytes_total", "source" => self.ctx.source.clone()).increment(p.bytes);
                metrics::counter!("coffer_shipped_rows_total", "source" => self.ctx.source.clone()).increment(p.rows);
                metrics::counter!("coffer_shipped_transactions_total", "source" => self.ctx.source.clone())
                    .increment(p.ship.txns);
                metrics::counter!("coffer_shipped_objects_total", "source" => self.ctx.source.clone())
                    .increment(objects as u64);
                let max = p.ship.max_commit_us;
                (p.from_lsn, p.upto_lsn, Body::Ship(p.ship), p.markers, Some(max))
            }
        };
        let claimed = self.anchors.claim(upto_lsn);
        let upto_time_us = match (claimed, max_commit_us.map(|t| t - 1)) {
            (Some(a), Some(b)) => a.max(b),
            (Some(a), None) => a,
            (None, Some(b)) => b,
            (None, None) => self.ctx.log.lock().await.last().map_or(0, |r| r.upto_time_us),
        };
        let record = self.ctx.append(from_lsn, upto_lsn, upto_time_us, body).await?;
        metrics::counter!("coffer_records_total", "source" => self.ctx.source.clone()).increment(1);
        self.ctx.persist(alarms::SHIP_FAILED, || async { failpoints::hit(failpoints::SHIP_AFTER_RECORD) }).await?;
        self.flow.item_durable();
        self.ctx.status.set_durable(upto_lsn, upto_time_us);
        self.durable.send_replace(sink::Durable(upto_lsn));
        // Nobody listening is no error.
        let _ = self.ctx.durable.send(Durable { record, markers: Arc::new(markers) });
        Ok(())
    }

    /// Stretches the interval when ships put more objects than `[ship] max_puts` a second, up to a third of the RPO's
    /// limit.
    fn pace(&self, objects: usize) {
        let ship = &self.ctx.config.ship;
        let needed = Duration::from_secs_f64(objects as f64 / f64::from(ship.max_puts.max(1)));
        let most = (self.ctx.config.rpo.limit / 3).max(ship.interval);
        self.flow.set_interval(needed.clamp(ship.interval, most));
    }

    async fn prepare(&self, mut batch: Batch) -> Result<Box<Prepared>> {
        // However this ends, the batch's buffers are gone with it.
        let _released = Released(&self.flow);
        self.ctx.persist(alarms::SHIP_FAILED, || async { failpoints::hit(failpoints::SHIP_BEFORE_OBJECTS) }).await?;
        let tenants = std::mem::take(&mut batch.tenants);
        let entries = self.entries(&tenants).await?;
        let spool = batch.spool.take().map(|f| f.reader());
        let (from_lsn, upto_lsn) = (batch.from_lsn, batch.upto_lsn);
        let eventful = !batch.common.is_empty();
        let common = self.common(&mut batch, spool.as_ref()).await?;
        let (large, small): (Vec<_>, Vec<_>) =
            tenants.into_iter().zip(entries).partition(|(t, _)| t.buffer.is_spooled());
        let mut objects: Vec<ObjectRef> = stream::iter(small)
            .map(|(t, e)| self.changeset(t, e, from_lsn))
            .buffer_unordered(PUTS)
            .try_collect()
            .await?;
        let rest: Vec<ObjectRef> = stream::iter(large)
            .map(|(t, e)| self.large_changeset(t, e, from_lsn, spool.clone()))
            .buffer_unordered(LARGE_PUTS)
            .try_collect()
            .await?;
        objects.extend(rest);
        objects.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        self.ctx.persist(alarms::SHIP_FAILED, || async { failpoints::hit(failpoints::SHIP_AFTER_OBJECTS) }).await?;
        let index = &batch.index;
        let ship = Ship {
            txns: index.len() as u64,
            min_xid: index.iter().map(|t| t.xid).min().unwrap_or(0),
            max_xid: index.iter().map(|t| t.xid).max().unwrap_or(0),
            first_commit_us: index.first().map_or(0, |t| t.commit_us),
            last_commit_us: index.last().map_or(0, |t| t.commit_us),
            max_commit_us: index.iter().map(|t| t.commit_us).max().unwrap_or(0),
            min_commit_us: index.iter().map(|t| t.commit_us).min(),
            eventful: Some(eventful),
            common: Some(common),
            objects,
            sequences: Vec::new(),
            joined: false,
        };
        let bytes = ship.objects.iter().chain(&ship.common).map(|o| o.bytes).sum();
        let markers = std::mem::take(&mut batch.markers);
        Ok(Box::new(Prepared { from_lsn, upto_lsn, ship, markers, bytes, rows: batch.rows }))
    }

    /// The keyring's entries of a batch's tenants; new ones are made, and read back from every place, first.
    async fn entries(&self, tenants: &[TenantChanges]) -> Result<Vec<TenantEntry>> {
        let (keyring, source) = (&self.ctx.keyring, self.ctx.source_uid);
        let unknown: Vec<Tenant> =
            tenants.iter().filter(|t| keyring.find(source, &t.tenant).is_none()).map(|t| t.tenant.clone()).collect();
        if !unknown.is_empty() {
            let made = self.ctx.persist(alarms::SHIP_FAILED, || keyring.ensure_all(source, &unknown)).await?;
            for e in made {
                // The reporter may be between two connections; it asks the keyring for all when it starts.
                let _ = self.new_tenants.send(e);
            }
        }
        tenants
            .iter()
            .map(|t| {
                keyring
                    .find(source, &t.tenant)
                    .ok_or_else(|| Error::new(Kind::Key, "a new tenant is not in the keyring"))
            })
            .collect()
    }

    fn header(&self, kind: ObjectKind, key: &DataKey, from_lsn: Lsn, upto_lsn: Lsn) -> Header {
        let (system_identifier, timeline) = self.ctx.system();
        Header {
            kind,
            codec: Codec::Lz4,
            tenant: key.id.uid,
            object: random::uuid(),
            source: self.ctx.source_uid,
            system_identifier,
            timeline,
            lsn_start: from_lsn,
            lsn_end: upto_lsn,
            key_version: key.id.version,
        }
    }

    async fn common(&self, batch: &mut Batch, spool: Option<&SpoolReader>) -> Result<ObjectRef> {
        let key = self.ctx.keyring.repository_key();
        let header = self.header(ObjectKind::Common, &key, batch.from_lsn, batch.upto_lsn);
        let path = paths::common(self.ctx.source_uid, batch.upto_lsn, header.object);
        let buffer = std::mem::replace(&mut batch.common, Buffer::new(Default::default()));
        let mut index = Vec::new();
        TxnIndex { entries: batch.index.clone() }.encode(&mut index);
        self.seal_and_put(path, header, key, 0, index, buffer, spool.cloned()).await
    }

    async fn changeset(&self, t: TenantChanges, entry: TenantEntry, from_lsn: Lsn) -> Result<ObjectRef> {
        let key = self.ctx.keyring.key(entry.key_id())?;
        let header = self.header(ObjectKind::Changeset, &key, from_lsn, t.last_lsn);
        let path = paths::changeset(self.ctx.source_uid, entry.uid, t.last_lsn, header.object);
        self.seal_and_put(path, header, key, t.rows, Vec::new(), t.buffer, None).await
    }

    #[expect(clippy::too_many_arguments, reason = "one call each for the two kinds of small objects")]
    async fn seal_and_put(
        &self,
        path: String,
        header: Header,
        key: Arc<DataKey>,
        rows: u64,
        head: Vec<u8>,
        mut buffer: Buffer,
        spool: Option<SpoolReader>,
    ) -> Result<ObjectRef> {
        let (sealed, bytes, header) = self
            .pool
            .run(move || -> Result<_> {
                // lz4 leaves a third to a half of COPY text.
                let mut sealer = Sealer::new(Vec::with_capacity(buffer.len() as usize / 2 + 1024), &header, &key)?;
                sealer.write_all(&head).context(Kind::Other, "cannot seal")?;
                while let Some(piece) = buffer.next_piece(spool.as_ref())? {
                    sealer.write_all(&piece).context(Kind::Other, "cannot seal")?;
                }
                let (bytes, sealed) = sealer.finish()?;
                Ok((sealed, Bytes::from(bytes), header))
            })
            .await??;
        self.ctx.persist(alarms::SHIP_FAILED, || self.ctx.repo.put(&path, bytes.clone())).await?;
        Ok(Repository::object_ref(path, &header, &sealed, rows))
    }

    /// An object whose plaintext is in the spool: written through in parts, anew from the start when that fails.
    async fn large_changeset(
        &self,
        t: TenantChanges,
        entry: TenantEntry,
        from_lsn: Lsn,
        spool: Option<SpoolReader>,
    ) -> Result<ObjectRef> {
        let key = self.ctx.keyring.key(entry.key_id())?;
        let t = Arc::new(t);
        self.ctx
            .persist(alarms::SHIP_FAILED, || async {
                let header = self.header(ObjectKind::Changeset, &key, from_lsn, t.last_lsn);
                let path = paths::changeset(self.ctx.source_uid, entry.uid, t.last_lsn, header.object);
                let (ctx, t, key, spool) = (self.ctx.clone(), t.clone(), key.clone(), spool.clone());
                // Writing through waits for the network: not on a sealing thread.
                tokio::task::spawn_blocking(move || {
                    ctx.repo.seal_to(ctx.rt.clone(), path, &header, &key, |sealer| {
                        t.buffer.for_each(spool.as_ref(), |piece| {
                            sealer.write_all(piece).context(Kind::Other, "cannot seal a changeset")
                        })?;
                        Ok(t.rows)
                    })
                })
                .await
                .map_err(|e| Error::other("sealing a changeset panicked").source(e))?
            })
            .await
    }
}

/// Counts a batch's buffers as gone when dropped.
struct Released<'a>(&'a Flow);

impl Drop for Released<'_> {
    fn drop(&mut self) {
        self.0.batch_released();
    }
}

enum Ready {
    Batch(Box<Prepared>),
    Idle(Lsn),
    Barrier(oneshot::Sender<()>),
}

/// The oldest item, when it is ready. Safe to cancel: the item stays where it is until it is.
async fn front(in_flight: &mut VecDeque<InFlight>) -> Result<Ready> {
    let Some(first) = in_flight.front_mut() else { return std::future::pending().await };
    match first {
        InFlight::Batch(task) => {
            let done = (&mut task.0).await.map_err(|e| Error::other("preparing a ship panicked").source(e))?;
            done.map(Ready::Batch)
        }
        InFlight::Idle(lsn) => Ok(Ready::Idle(*lsn)),
        InFlight::Barrier(done) => {
            let (unused, _) = oneshot::channel();
            Ok(Ready::Barrier(std::mem::replace(done, unused)))
        }
    }
}

impl AgentContext {
    /// Repeats what fails for as long as it is not fenced, under an alarm.
    pub async fn persist<T, F: Future<Output = Result<T>>>(
        &self,
        alarm: &'static str,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T> {
        let mut wait = RETRY.0;
        loop {
            match attempt().await {
                Ok(v) => {
                    self.alarms.clear(alarm, &self.source);
                    return Ok(v);
                }
                Err(e) if e.kind() == Kind::Fenced => return Err(e),
                Err(e) => {
                    self.alarms.raise(alarm, &self.source, format!("{}; trying again", e.report()));
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY.1);
        }
    }

    /// Appends a record to the log. An append that was cut short is settled by reading the log again: if our record is
    /// there, it counts.
    pub async fn append(&self, from_lsn: Lsn, upto_lsn: Lsn, upto_time_us: i64, body: Body) -> Result<Arc<LogRecord>> {
        self.append_on(None, from_lsn, upto_lsn, upto_time_us, body).await
    }

    /// The same of another server, which is the one that is followed from there on: whoever waits for the log meanwhile
    /// writes behind this record.
    pub(crate) async fn append_on(
        &self,
        to: Option<System>,
        from_lsn: Lsn,
        upto_lsn: Lsn,
        upto_time_us: i64,
        body: Body,
    ) -> Result<Arc<LogRecord>> {
        let mut log = self.log.lock().await;
        let (system_identifier, timeline) =
            to.as_ref().map_or_else(|| self.system(), |s| (s.system_identifier, s.timeline));
        let followed = |r: Arc<LogRecord>| {
            if let Some(s) = to.clone() {
                self.set_system(s);
            }
            Ok(r)
        };
        let draft =
            Draft { system_identifier, timeline, slot: self.slot.clone(), from_lsn, upto_lsn, upto_time_us, body };
        let mut wait = RETRY.0;
        loop {
            let e = match log.append(draft.clone()).await {
                Ok(r) => {
                    self.alarms.clear(alarms::SHIP_FAILED, &self.source);
                    return followed(r);
                }
                Err(e) if e.kind() == Kind::Fenced => return Err(e),
                Err(e) => e,
            };
            self.alarms.raise(alarms::SHIP_FAILED, &self.source, format!("{e}; trying again"));
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY.1);
            let (writer, n) = (log.writer(), log.last().map_or(0, |r| r.n + 1));
            let mut again = match Log::open(&self.repo, self.source_uid, None).await {
                Ok(l) => l,
                Err(e) => {
                    tracing::warn!("cannot read the log again: {e}");
                    continue;
                }
            };
            again.forget_records();
            // What was found may be in the sequencer alone; it counts when it is in every required store.
            if let Err(e) = again.level().await {
                tracing::warn!("cannot bring the stores level: {e}");
                continue;
            }
            let head = again.last().cloned();
            *log = again;
            match head {
                Some(r) if r.n == n && r.writer == writer && r.upto_lsn == upto_lsn => return followed(r),
                Some(r) if r.n >= n => {
                    return Err(Error::new(
                        Kind::Fenced,
                        format!("record {} of the log was written by agent {}: this one stops", r.n, r.writer),
                    ));
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_claims_the_newest_time_that_it_has_reached() {
        let a = Anchors::default();
        assert_eq!(a.claim(Lsn(5)), None);
        a.add(Lsn(10), 100_000_000);
        a.add(Lsn(20), 200_000_000);
        a.add(Lsn(30), 300_000_000);
        assert_eq!(a.claim(Lsn(9)), None);
        assert_eq!(a.claim(Lsn(25)), Some(200_000_000 - CLOCK_MARGIN_US));
        assert_eq!(a.claim(Lsn(25)), Some(200_000_000 - CLOCK_MARGIN_US), "what was claimed stays");
        assert_eq!(a.claim(Lsn(30)), Some(300_000_000 - CLOCK_MARGIN_US));
        a.add(Lsn(30), 400_000_000);
        assert_eq!(a.claim(Lsn(30)), Some(400_000_000 - CLOCK_MARGIN_US), "an idle source's time goes on");
        a.add(Lsn(7), 500_000_000);
        assert_eq!(a.claim(Lsn(6)), None, "the position went back: another timeline");
    }

    #[test]
    fn pairs_are_bounded() {
        let a = Anchors::default();
        for i in 0..20_000 {
            a.add(Lsn(i), i as i64);
        }
        assert!(a.0.lock().unwrap().len() <= Anchors::MOST);
        assert!(a.claim(Lsn(10_000)).is_some());
    }
}
