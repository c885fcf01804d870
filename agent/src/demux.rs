//! Cuts the stream by tenant, on a thread of its own.
//!
//! Frames are read, rows are not: a run is copied as it stands into its tenant's buffer, behind the BEGIN frame of its
//! transaction (once per transaction and tenant) and the descriptors that the buffer does not hold yet. TRUNCATE and
//! MARKER go to the common buffer.
//!
//! Invariants:
//! - a batch is frozen between transactions, never inside one, so every changeset holds whole transactions;
//! - a transaction at or below the position that was already handed on is dropped: the server may send it again;
//! - a COMMIT whose row count differs from the rows seen is an error, not a batch;
//! - the memory of the open batch and of the frozen ones is bounded; beyond it the open batch goes to the spool, and when
//!   that is full too while older batches still wait to be shipped, the stream is not read any further.

use crate::batch::{Batch, Buffer, Held, SeenMarker, TenantChanges};
use crate::error::{Error, Kind, Result};
use crate::replication::sink::{Accepted, Packet, Sink};
use crate::repository::model::TxnEntry;
use crate::spool::Spool;
use crate::tenant::Tenant;
use bytes::Bytes;
use coffer_wire::{Begin, Commit, Frame, FrameReader, Lsn, Marker, RunHeader, TenantKind, Truncate};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc, oneshot};

/// Bytes that may wait between the socket and the demultiplexer.
const INTAKE_BYTES: u64 = 16 << 20;
/// Frozen batches that may wait to be shipped, whatever their size.
const MAX_FROZEN: usize = 8;
/// Transactions in one batch beyond which the stream waits for ships: their index is held in memory.
const MAX_TRANSACTIONS: usize = 2_000_000;
/// Longest time between two records of an idle source, unless a third of the RPO's limit is shorter.
pub const IDLE_RECORD: Duration = Duration::from_secs(60);

/// What reaches the demultiplexer, in order.
enum Input {
    Data(Bytes),
    Position {
        upto: Lsn,
        urgent: bool,
    },
    /// The connection is gone; what is not whole goes too. Answers where the next one begins.
    EndSession(oneshot::Sender<Lsn>),
    /// Freeze what is whole, at once.
    Flush(oneshot::Sender<()>),
    /// The log goes on from another position (a gap, another timeline).
    Jump(Lsn),
}

/// What goes to the shipper, in the log's order.
pub enum ShipItem {
    Batch(Box<Batch>),
    /// Nothing changed up to here.
    Idle(Lsn),
    /// Answered when everything before it is durable.
    Barrier(oneshot::Sender<()>),
}

/// How much memory and disk, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Memory of the open batch and the frozen ones.
    pub memory: u64,
    /// Bytes in the spool beyond which the stream stands still while batches wait to be shipped.
    pub spool: u64,
    pub interval: Duration,
    /// Longest time between two records.
    pub idle: Duration,
}

/// Shared between the demultiplexer, the stream in front of it and the shipper behind it.
pub struct Flow {
    limits: Limits,
    held: Held,
    spool: Spool,
    waiting_bytes: AtomicU64,
    paused: AtomicBool,
    room: Notify,
    /// Items handed to the shipper and not durable yet.
    undurable: AtomicUsize,
    /// Batches among them whose buffers are still held.
    frozen: AtomicUsize,
    /// Milliseconds between ships; the shipper stretches it.
    interval_ms: AtomicU64,
    /// Somebody waits for this position to be durable.
    wanted: AtomicU64,
    unresolved_rows: AtomicU64,
    contradictions: AtomicU64,
    received: AtomicU64,
    failure: Mutex<Option<Error>>,
}

impl Flow {
    pub fn new(limits: Limits, spool: Spool) -> Arc<Self> {
        Arc::new(Self {
            limits,
            held: Held::default(),
            spool,
            waiting_bytes: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            room: Notify::new(),
            undurable: AtomicUsize::new(0),
            frozen: AtomicUsize::new(0),
            interval_ms: AtomicU64::new(limits.interval.as_millis() as u64),
            wanted: AtomicU64::new(0),
            unresolved_rows: AtomicU64::new(0),
            contradictions: AtomicU64::new(0),
            received: AtomicU64::new(0),
            failure: Mutex::new(None),
        })
    }

    /// Makes what is at or below `lsn` durable as soon as it has been received.
    pub fn want(&self, lsn: Lsn) {
        self.wanted.fetch_max(lsn.0, Ordering::Relaxed);
    }

    /// The time between ships from now on.
    pub fn set_interval(&self, d: Duration) {
        self.interval_ms.store(d.as_millis() as u64, Ordering::Relaxed);
    }

    /// A batch's buffers are gone.
    pub fn batch_released(&self) {
        self.frozen.fetch_sub(1, Ordering::Relaxed);
    }

    /// An item's record is durable.
    pub fn item_durable(&self) {
        self.undurable.fetch_sub(1, Ordering::Relaxed);
    }

    /// Bytes of memory in buffers.
    pub fn held_bytes(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    pub fn spool_bytes(&self) -> u64 {
        self.spool.used_bytes()
    }

    /// Rows of the unresolved tenant since the start.
    pub fn unresolved_rows(&self) -> u64 {
        self.unresolved_rows.load(Ordering::Relaxed)
    }

    /// How often since the start a transaction changed rows of a table that are another tenant's than the session named.
    pub fn contradictions(&self) -> u64 {
        self.contradictions.load(Ordering::Relaxed)
    }

    /// Everything up to here has arrived.
    pub fn received(&self) -> Lsn {
        Lsn(self.received.load(Ordering::Relaxed))
    }

    /// Whether the stream stands still because what is behind it is full.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    fn has_room(&self) -> bool {
        self.waiting_bytes.load(Ordering::Relaxed) < INTAKE_BYTES && !self.paused.load(Ordering::Relaxed)
    }
}

/// The way in: what the replication stream writes to.
#[derive(Clone)]
pub struct Intake {
    tx: Sender<Input>,
    flow: Arc<Flow>,
}

impl Intake {
    /// Drops what is not whole and says where the next session begins.
    pub async fn end_session(&self) -> Result<Lsn> {
        let (tx, rx) = oneshot::channel();
        self.send(Input::EndSession(tx))?;
        rx.await.map_err(|_| stopped())
    }

    /// Freezes what is whole, whatever its age.
    pub async fn flush(&self) -> Result<()> {
        let (tx, rx) = oneshot::channel();
        self.send(Input::Flush(tx))?;
        rx.await.map_err(|_| stopped())
    }

    /// Goes on at another position: only between sessions, when everything before is durable.
    pub fn jump(&self, to: Lsn) -> Result<()> {
        self.send(Input::Jump(to))
    }

    fn send(&self, input: Input) -> Result<()> {
        self.tx.send(input).map_err(|_| stopped())
    }
}

fn stopped() -> Error {
    Error::other("the demultiplexer has stopped")
}

impl Sink for Intake {
    fn offer(&mut self, packet: Packet) -> Result<Accepted> {
        if let Some(e) = self.flow.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(e);
        }
        match packet {
            Packet::Data(b) => {
                self.flow.waiting_bytes.fetch_add(b.len() as u64, Ordering::Relaxed);
                self.send(Input::Data(b))?;
            }
            Packet::Position { upto, urgent } => self.send(Input::Position { upto, urgent })?,
        }
        Ok(Accepted)
    }

    async fn room(&self) {
        loop {
            let notified = self.flow.room.notified();
            if self.flow.has_room() {
                return;
            }
            notified.await;
        }
    }

    fn has_room(&self) -> bool {
        self.flow.has_room()
    }
}

/// Starts the thread. It ends when every [`Intake`] is gone.
pub fn spawn(
    name: &str,
    flow: Arc<Flow>,
    resume: Lsn,
    out: mpsc::UnboundedSender<ShipItem>,
) -> Result<(Intake, std::thread::JoinHandle<()>)> {
    let (tx, rx) = crossbeam_channel::unbounded();
    let demux = Demux::new(flow.clone(), resume, out);
    let thread = std::thread::Builder::new()
        .name(format!("demux {name}"))
        .spawn(move || demux.run(&rx))
        .map_err(|e| Error::other("cannot start a thread").source(e))?;
    Ok((Intake { tx, flow }, thread))
}

/// A transaction that is arriving.
struct Open {
    begin: Begin,
    /// The BEGIN frame.
    raw: Vec<u8>,
    rows: u64,
    /// Already handed on in an earlier batch.
    skip: bool,
    ordinal: u64,
    in_common: bool,
    /// A run whose rows come in pieces: its tenant and the bytes that are missing.
    run: Option<(usize, u64)>,
}

struct Demux {
    flow: Arc<Flow>,
    out: mpsc::UnboundedSender<ShipItem>,
    /// The session's descriptors: id to RELATION frame.
    relations: HashMap<u64, Vec<u8>>,
    batch: Batch,
    /// Per tenant kind: key to index in the batch.
    by_key: [HashMap<Box<str>, usize>; 4],
    /// Descriptors that the common buffer holds.
    common_relations: HashSet<u64>,
    open: Option<Open>,
    transactions: u64,
    /// Everything up to here is in this batch or was handed on.
    reached: Lsn,
    /// The last item handed on ends here.
    handed: Lsn,
    batch_since: Option<Instant>,
    last_item: Instant,
    /// The last item was a batch: an idle record soon after it says that nothing followed.
    after_batch: bool,
    /// After an error: everything is ignored until the session ends.
    broken: bool,
    /// After a flush: the log may go on from another position or on another timeline, and what was reached says nothing
    /// until a session does.
    resting: bool,
}

impl Demux {
    fn new(flow: Arc<Flow>, resume: Lsn, out: mpsc::UnboundedSender<ShipItem>) -> Self {
        let batch = Batch::new(resume, &flow.held);
        flow.received.store(resume.0, Ordering::Relaxed);
        Self {
            flow,
            out,
            relations: HashMap::new(),
            batch,
            by_key: Default::default(),
            common_relations: HashSet::new(),
            open: None,
            transactions: 0,
            reached: resume,
            handed: resume,
            batch_since: None,
            last_item: Instant::now(),
            after_batch: false,
            broken: false,
            resting: false,
        }
    }

    fn run(mut self, rx: &Receiver<Input>) {
        loop {
            let wait = if self.batch_since.is_some() || self.flow.is_paused() { 20 } else { 100 };
            match rx.recv_timeout(Duration::from_millis(wait)) {
                Ok(input) => {
                    self.input(input);
                    // The clock is looked at once per handful, not once per small transaction.
                    for _ in 0..64 {
                        let Ok(more) = rx.try_recv() else { break };
                        self.input(more);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.tick();
        }
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Data(bytes) => {
                self.resting = false;
                if !self.broken
                    && let Err(e) = self.data(&bytes)
                {
                    self.fail(e);
                }
                let before = self.flow.waiting_bytes.fetch_sub(bytes.len() as u64, Ordering::Relaxed);
                if before >= INTAKE_BYTES {
                    self.flow.room.notify_one();
                }
            }
            Input::Position { upto, urgent } => {
                // Inside a transaction the server does not say more than the transaction before it.
                self.resting = false;
                if !self.broken && self.open.is_none() {
                    self.reach(upto);
                    if urgent {
                        self.flow.want(upto);
                    }
                }
            }
            Input::EndSession(answer) => {
                if self.open.take().is_some() || self.broken {
                    // Its part of the buffers cannot be taken out again; the server sends all of it anew.
                    self.reset(self.handed);
                }
                self.broken = false;
                self.relations.clear();
                *self.flow.failure.lock().unwrap_or_else(PoisonError::into_inner) = None;
                let _ = answer.send(self.reached);
            }
            Input::Flush(answer) => {
                // Nothing of the session is read after a flush, so what is not whole never will be.
                if self.open.take().is_some() || self.broken {
                    self.reset(self.handed);
                    self.broken = true;
                }
                self.freeze();
                if self.reached > self.handed {
                    self.hand_on(ShipItem::Idle(self.reached));
                }
                self.resting = true;
                let _ = answer.send(());
            }
            Input::Jump(to) => {
                self.handed = to;
                self.reset(to);
            }
        }
    }

    fn fail(&mut self, e: Error) {
        self.broken = true;
        *self.flow.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
    }

    /// Forgets the open batch.
    fn reset(&mut self, from: Lsn) {
        self.open = None;
        self.batch = Batch::new(from, &self.flow.held);
        self.by_key = Default::default();
        self.common_relations.clear();
        self.batch_since = None;
        self.reached = from;
        self.flow.received.store(from.0, Ordering::Relaxed);
    }

    fn reach(&mut self, lsn: Lsn) {
        if lsn > self.reached {
            self.reached = lsn;
            self.flow.received.store(lsn.0, Ordering::Relaxed);
        }
    }

    fn data(&mut self, bytes: &[u8]) -> Result<()> {
        let mut frames = FrameReader::new(bytes);
        while let Some(next) = frames.next_raw() {
            let (frame, raw) = next?;
            match frame {
                Frame::Run(run) => self.run_frame(&run.header, raw, false)?,
                Frame::RunOpen(header) => self.run_frame(&header, raw, true)?,
                Frame::RunData(data) => self.run_data(data.len() as u64, raw)?,
                Frame::Begin(begin) => self.begin(begin, raw)?,
                Frame::Commit(commit) => self.commit(commit)?,
                Frame::Relation(id, _) => {
                    self.relations.insert(id, raw.to_vec());
                }
                Frame::Truncate(t) => self.truncate(&t, raw)?,
                Frame::Marker(m) => self.marker(&m, raw)?,
                Frame::Hello(h) => {
                    tracing::info!(
                        server_version = h.server_version,
                        extension = h.extension_version,
                        "the stream begins"
                    );
                    self.relations.clear();
                }
            }
        }
        self.spill_if_needed()
    }

    fn begin(&mut self, begin: Begin, raw: &[u8]) -> Result<()> {
        if self.open.is_some() {
            return Err(malformed("a transaction begins inside another"));
        }
        // A batch that is due leaves before a transaction that may be long.
        self.tick_batch();
        self.transactions += 1;
        self.open = Some(Open {
            begin,
            raw: raw.to_vec(),
            rows: 0,
            skip: begin.end_lsn <= self.reached,
            ordinal: self.transactions,
            in_common: false,
            run: None,
        });
        Ok(())
    }

    fn commit(&mut self, commit: Commit) -> Result<()> {
        let Some(open) = self.open.take() else { return Err(malformed("a transaction ends that did not begin")) };
        if open.run.is_some() {
            return Err(malformed("a transaction ends inside a row"));
        }
        if commit.xid != open.begin.xid || commit.end_lsn != open.begin.end_lsn {
            return Err(malformed("a transaction ends under another name than it began"));
        }
        if commit.rows != open.rows {
            return Err(Error::new(
                Kind::Verification,
                format!(
                    "transaction {} at {} has {} rows by its COMMIT and {} by its runs",
                    commit.xid, commit.end_lsn, commit.rows, open.rows
                ),
            )
            .code("row_count"));
        }
        if open.skip {
            return Ok(());
        }
        self.batch.index.push(TxnEntry {
            end_lsn: open.begin.end_lsn,
            commit_us: open.begin.commit_time_us,
            xid: open.begin.xid,
        });
        self.batch.rows += open.rows;
        self.reach(open.begin.end_lsn);
        self.batch_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// A run, or the header of one whose rows follow in pieces.
    fn run_frame(&mut self, header: &RunHeader<'_>, raw: &[u8], in_pieces: bool) -> Result<()> {
        let Some(open) = &mut self.open else { return Err(malformed("rows outside a transaction")) };
        if open.run.is_some() {
            return Err(malformed("a run inside another"));
        }
        open.rows += u64::from(header.rows);
        if open.skip {
            if in_pieces {
                open.run = Some((usize::MAX, header.rows_len));
            }
            return Ok(());
        }
        let kind = header.tenant_kind as usize;
        let index = match self.by_key[kind].get(header.tenant_key) {
            Some(i) => *i,
            None => {
                let i = self.batch.tenants.len();
                self.by_key[kind].insert(header.tenant_key.into(), i);
                self.batch.tenants.push(TenantChanges {
                    tenant: Tenant { kind: header.tenant_kind, key: header.tenant_key.to_owned() },
                    buffer: Buffer::new(self.flow.held.clone()),
                    rows: 0,
                    first_lsn: open.begin.end_lsn,
                    last_lsn: open.begin.end_lsn,
                    relations: HashSet::new(),
                    last_relations: Vec::new(),
                    begun: 0,
                });
                i
            }
        };
        let t = &mut self.batch.tenants[index];
        let mut grown = 0;
        if t.last_relations != header.relations {
            for id in header.relation_ids() {
                if t.relations.insert(id) {
                    let frame = self.relations.get(&id).ok_or_else(|| malformed("a row of an unknown descriptor"))?;
                    grown += t.buffer.push(frame);
                }
            }
            t.last_relations.clear();
            t.last_relations.extend_from_slice(header.relations);
        }
        if t.begun != open.ordinal {
            t.begun = open.ordinal;
            t.last_lsn = open.begin.end_lsn;
            grown += t.buffer.push(&open.raw);
        }
        grown += t.buffer.push(raw);
        t.rows += u64::from(header.rows);
        self.batch.memory += grown;
        if header.tenant_kind == TenantKind::Unresolved {
            self.batch.unresolved_rows += u64::from(header.rows);
            self.flow.unresolved_rows.fetch_add(u64::from(header.rows), Ordering::Relaxed);
        }
        if in_pieces && header.rows_len > 0 {
            open.run = Some((index, header.rows_len));
        }
        Ok(())
    }

    fn run_data(&mut self, len: u64, raw: &[u8]) -> Result<()> {
        let Some((index, left)) = self.open.as_mut().and_then(|o| o.run.as_mut()) else {
            return Err(malformed("a piece of a row outside a run"));
        };
        *left = left.checked_sub(len).ok_or_else(|| malformed("more of a row than was announced"))?;
        let (index, done) = (*index, *left == 0);
        if done {
            self.open.as_mut().expect("a run is open").run = None;
        }
        if index != usize::MAX {
            self.batch.memory += self.batch.tenants[index].buffer.push(raw);
        }
        Ok(())
    }

    fn truncate(&mut self, t: &Truncate<'_>, raw: &[u8]) -> Result<()> {
        let Some(open) = &self.open else { return Err(malformed("TRUNCATE outside a transaction")) };
        if open.skip {
            return Ok(());
        }
        self.describe_in_common(t.relation_ids())?;
        self.push_common(raw);
        Ok(())
    }

    /// The common buffer names only descriptors that it holds.
    fn describe_in_common(&mut self, ids: impl Iterator<Item = u64>) -> Result<()> {
        for id in ids {
            if self.common_relations.insert(id) {
                let frame = self.relations.get(&id).ok_or_else(|| malformed("an unknown descriptor is named"))?;
                self.batch.memory += self.batch.common.push(frame);
            }
        }
        Ok(())
    }

    fn marker(&mut self, m: &Marker<'_>, raw: &[u8]) -> Result<()> {
        let Some(open) = &self.open else {
            // Not transactional: it only says that somebody waits for what came before it.
            self.flow.want(Lsn(self.reached.0 + 1));
            return Ok(());
        };
        if open.skip {
            return Ok(());
        }
        if m.kind == "claim" {
            self.flow.contradictions.fetch_add(1, Ordering::Relaxed);
        }
        self.batch.markers.push(SeenMarker {
            kind: m.kind.to_owned(),
            payload: m.payload.to_vec(),
            xid: open.begin.xid,
            end_lsn: open.begin.end_lsn,
            commit_us: open.begin.commit_time_us,
            seq: m.seq,
        });
        if m.kind == "described" {
            self.describe_in_common(coffer_wire::relation_ids(m.payload))?;
        }
        self.push_common(raw);
        Ok(())
    }

    /// Appends to the common buffer, behind the transaction's BEGIN.
    fn push_common(&mut self, raw: &[u8]) {
        let open = self.open.as_mut().expect("the caller is inside a transaction");
        if !open.in_common {
            open.in_common = true;
            self.batch.memory += self.batch.common.push(&open.raw);
        }
        self.batch.memory += self.batch.common.push(raw);
    }

    fn spill_if_needed(&mut self) -> Result<()> {
        let most = self.flow.limits.memory / 2;
        if self.batch.memory > most {
            let flow = self.flow.clone();
            self.batch.spill(most / 4, || flow.spool.file())?;
        }
        Ok(())
    }

    /// Freezes or writes an idle record when it is time, and opens or closes the stream's tap.
    fn tick(&mut self) {
        self.tick_batch();
        self.tick_idle();
        let frozen = self.flow.frozen.load(Ordering::Relaxed);
        // With nothing on its way out, waiting would wait for ever: a single transaction may be larger than the limit.
        let much = self.flow.spool.used_bytes() >= self.flow.limits.spool || self.batch.index.len() >= MAX_TRANSACTIONS;
        let full = much && frozen > 0;
        if self.flow.paused.swap(full, Ordering::Relaxed) != full {
            if full {
                tracing::warn!("the spool is full: the source is not read until a ship makes room");
            } else {
                self.flow.room.notify_one();
            }
        }
    }

    fn tick_batch(&mut self) {
        if self.open.is_some() || self.broken {
            return;
        }
        let Some(since) = self.batch_since else { return };
        let interval = Duration::from_millis(self.flow.interval_ms.load(Ordering::Relaxed));
        let due = since.elapsed() >= interval
            || self.batch.memory >= self.flow.limits.memory / 4
            || self.batch.spool.is_some()
            || self.is_wanted();
        let frozen_bytes = self.flow.held_bytes().saturating_sub(self.batch.memory);
        let allowed =
            self.flow.frozen.load(Ordering::Relaxed) < MAX_FROZEN && frozen_bytes <= self.flow.limits.memory / 4;
        if due && allowed {
            self.freeze();
        }
    }

    /// Whether somebody waits for a position that has arrived and was not handed on.
    fn is_wanted(&self) -> bool {
        let wanted = self.flow.wanted.load(Ordering::Relaxed);
        wanted > self.handed.0 && self.reached.0 >= wanted
    }

    fn tick_idle(&mut self) {
        if self.open.is_some() || self.broken || self.resting || !self.batch.is_empty() {
            return;
        }
        if self.flow.undurable.load(Ordering::Relaxed) > 0 {
            return;
        }
        let quiet = self.last_item.elapsed();
        let interval = Duration::from_millis(self.flow.interval_ms.load(Ordering::Relaxed));
        if quiet >= self.flow.limits.idle || (self.after_batch && quiet >= interval) || self.is_wanted() {
            self.after_batch = false;
            self.hand_on(ShipItem::Idle(self.reached));
        }
    }

    /// Hands the open batch to the shipper, if there is anything in it.
    fn freeze(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let mut batch = std::mem::replace(&mut self.batch, Batch::new(self.reached, &self.flow.held));
        batch.upto_lsn = self.reached;
        self.by_key = Default::default();
        self.common_relations.clear();
        self.batch_since = None;
        self.after_batch = true;
        self.flow.frozen.fetch_add(1, Ordering::Relaxed);
        self.hand_on(ShipItem::Batch(Box::new(batch)));
    }

    fn hand_on(&mut self, item: ShipItem) {
        self.handed = self.reached;
        // A batch that begins after an idle record begins where that ended.
        if self.batch.is_empty() {
            self.batch.from_lsn = self.reached;
        }
        self.last_item = Instant::now();
        self.flow.undurable.fetch_add(1, Ordering::Relaxed);
        if self.out.send(item).is_err() {
            self.fail(Error::other("the shipping of changes has stopped"));
        }
    }
}

fn malformed(what: &str) -> Error {
    Error::new(Kind::Verification, format!("the stream is not what it should be: {what}")).code("malformed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffer_wire::{
        Truncate, put_begin, put_commit, put_insert, put_marker, put_relation, put_run_data, put_run_header,
        put_truncate,
    };

    struct Rig {
        demux: Demux,
        items: mpsc::UnboundedReceiver<ShipItem>,
        flow: Arc<Flow>,
        _dir: tempfile::TempDir,
    }

    fn rig(memory: u64) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let hour = Duration::from_secs(3600);
        let limits = Limits { memory, spool: 1 << 30, interval: hour, idle: hour };
        let flow = Flow::new(limits, Spool::new(dir.path().to_owned()));
        let (tx, items) = mpsc::unbounded_channel();
        Rig { demux: Demux::new(flow.clone(), Lsn(100), tx), items, flow, _dir: dir }
    }

    impl Rig {
        fn batch(&mut self) -> Box<Batch> {
            self.demux.freeze();
            match self.items.try_recv() {
                Ok(ShipItem::Batch(b)) => b,
                _ => panic!("a batch was handed on"),
            }
        }
    }

    fn begin(end: u64) -> Begin {
        Begin { xid: end, commit_lsn: Lsn(end - 8), end_lsn: Lsn(end), commit_time_us: end as i64 }
    }

    fn relation(out: &mut Vec<u8>, id: u64) {
        put_relation(out, id, &id.to_le_bytes());
    }

    fn run(out: &mut Vec<u8>, key: &str, rel: u64, rows: u32) -> Vec<u8> {
        let mut data = Vec::new();
        for i in 0..rows {
            put_insert(&mut data, 0, i.to_string().as_bytes(), b"image");
        }
        let header = RunHeader {
            seq: 1,
            tenant_kind: TenantKind::Normal,
            tenant_key: key,
            relations: &rel.to_le_bytes(),
            rows,
            rows_len: data.len() as u64,
        };
        let at = out.len();
        put_run_header(out, &header, Some(&data));
        out[at..].to_vec()
    }

    fn commit(out: &mut Vec<u8>, end: u64, rows: u64) {
        put_commit(out, &Commit { xid: end, end_lsn: Lsn(end), rows });
    }

    fn content(t: &mut TenantChanges, spool: Option<&crate::spool::SpoolReader>) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(p) = t.buffer.next_piece(spool).unwrap() {
            all.extend(p);
        }
        all
    }

    fn kinds(bytes: &[u8]) -> String {
        FrameReader::new(bytes)
            .map(|f| match f.unwrap() {
                Frame::Relation(..) => 'R',
                Frame::Begin(_) => 'B',
                Frame::Run(_) => 'r',
                Frame::RunOpen(_) => 'o',
                Frame::RunData(_) => 'd',
                Frame::Truncate(_) => 'T',
                Frame::Marker(_) => 'M',
                _ => '?',
            })
            .collect()
    }

    #[test]
    fn a_tenant_gets_its_runs_verbatim_behind_what_they_need_once() {
        let mut rig = rig(64 << 20);
        let mut s = Vec::new();
        put_begin(&mut s, &begin(200));
        relation(&mut s, 7);
        let a1 = run(&mut s, "a", 7, 3);
        let b1 = run(&mut s, "b", 7, 1);
        let a2 = run(&mut s, "a", 7, 2);
        commit(&mut s, 200, 6);
        put_begin(&mut s, &begin(300));
        let a3 = run(&mut s, "a", 7, 1);
        commit(&mut s, 300, 1);
        rig.demux.data(&s).unwrap();
        let mut b = rig.batch();
        assert_eq!((b.from_lsn, b.upto_lsn, b.index.len(), b.rows), (Lsn(100), Lsn(300), 2, 7));
        assert_eq!(b.tenants.len(), 2);
        let a = content(&mut b.tenants[0], None);
        assert_eq!(kinds(&a), "RBrrBr");
        let runs: Vec<u8> = [a1, a2, a3].concat();
        let of_runs: Vec<u8> = {
            let mut r = FrameReader::new(&a);
            let mut out = Vec::new();
            while let Some(f) = r.next_raw() {
                if let (Frame::Run(_), raw) = f.unwrap() {
                    out.extend_from_slice(raw);
                }
            }
            out
        };
        assert_eq!(of_runs, runs);
        assert_eq!((b.tenants[0].rows, b.tenants[0].first_lsn, b.tenants[0].last_lsn), (6, Lsn(200), Lsn(300)));
        let b_content = content(&mut b.tenants[1], None);
        assert_eq!(kinds(&b_content), "RBr");
        assert!(b_content.ends_with(&b1));
        assert_eq!(rig.flow.held_bytes(), 0);
        // The next changeset stands on its own: the descriptor comes again, without the server sending it.
        let mut s = Vec::new();
        put_begin(&mut s, &begin(400));
        run(&mut s, "a", 7, 1);
        commit(&mut s, 400, 1);
        rig.demux.data(&s).unwrap();
        let mut b = rig.batch();
        assert_eq!((b.from_lsn, kinds(&content(&mut b.tenants[0], None)).as_str()), (Lsn(300), "RBr"));
    }

    #[test]
    fn what_was_handed_on_is_dropped_when_it_comes_again() {
        let mut rig = rig(64 << 20);
        let mut s = Vec::new();
        relation(&mut s, 7);
        for end in [90, 100, 110] {
            put_begin(&mut s, &begin(end));
            run(&mut s, "a", 7, 2);
            commit(&mut s, end, 2);
        }
        rig.demux.data(&s).unwrap();
        let b = rig.batch();
        assert_eq!((b.index.len(), b.rows, b.index[0].end_lsn), (1, 2, Lsn(110)));
    }

    #[test]
    fn a_wrong_row_count_and_broken_nesting_are_errors() {
        let good = |s: &mut Vec<u8>| {
            relation(s, 7);
            put_begin(s, &begin(200));
            run(s, "a", 7, 2);
        };
        let mut cases: Vec<Vec<u8>> = Vec::new();
        let mut case = |f: &dyn Fn(&mut Vec<u8>)| {
            let mut s = Vec::new();
            good(&mut s);
            f(&mut s);
            cases.push(s);
        };
        case(&|s| commit(s, 200, 3));
        case(&|s| commit(s, 201, 2));
        case(&|s| put_begin(s, &begin(300)));
        case(&|s| put_run_data(s, b"x"));
        case(&|s| {
            run(s, "a", 8, 1);
        });
        for s in &cases {
            assert!(rig(64 << 20).demux.data(s).is_err());
        }
        let mut s = Vec::new();
        run(&mut s, "a", 7, 1);
        assert!(rig(64 << 20).demux.data(&s).is_err(), "rows outside a transaction");
    }

    #[test]
    fn a_transaction_that_breaks_off_leaves_nothing() {
        let mut rig = rig(64 << 20);
        let mut s = Vec::new();
        relation(&mut s, 7);
        put_begin(&mut s, &begin(200));
        run(&mut s, "a", 7, 2);
        commit(&mut s, 200, 2);
        put_begin(&mut s, &begin(300));
        run(&mut s, "a", 7, 2);
        rig.demux.input(Input::Data(s.into()));
        let (tx, mut rx) = oneshot::channel();
        rig.demux.input(Input::EndSession(tx));
        // The whole one shares the buffers with the broken one: both come again, from where the last batch ended.
        assert_eq!(rx.try_recv().unwrap(), Lsn(100));
        rig.demux.freeze();
        assert!(rig.items.try_recv().is_err());
        assert_eq!(rig.flow.held_bytes(), 0);
    }

    #[test]
    fn nothing_is_said_between_a_flush_and_the_next_session() {
        let mut rig = rig(64 << 20);
        let mut s = Vec::new();
        relation(&mut s, 7);
        put_begin(&mut s, &begin(200));
        run(&mut s, "a", 7, 1);
        commit(&mut s, 200, 1);
        rig.demux.input(Input::Data(s.into()));
        let (tx, _rx) = oneshot::channel();
        rig.demux.input(Input::Flush(tx));
        assert!(matches!(rig.items.try_recv(), Ok(ShipItem::Batch(_))));
        rig.flow.item_durable();
        // Long ago, and somebody waits: at this position another timeline may begin.
        rig.flow.want(Lsn(200));
        rig.demux.handed = Lsn(100);
        rig.demux.tick_idle();
        assert!(rig.items.try_recv().is_err(), "an idle record of what may be another history by now");
        rig.demux.input(Input::Position { upto: Lsn(300), urgent: false });
        rig.demux.tick_idle();
        assert!(matches!(rig.items.try_recv(), Ok(ShipItem::Idle(Lsn(300)))));
    }

    #[test]
    fn positions_count_between_transactions_only() {
        let mut rig = rig(64 << 20);
        let mut s = Vec::new();
        relation(&mut s, 7);
        put_begin(&mut s, &begin(300));
        run(&mut s, "a", 7, 1);
        rig.demux.input(Input::Data(s.into()));
        rig.demux.input(Input::Position { upto: Lsn(900), urgent: true });
        let mut s = Vec::new();
        commit(&mut s, 300, 1);
        rig.demux.input(Input::Data(s.into()));
        assert_eq!(rig.flow.received(), Lsn(300));
        rig.demux.input(Input::Position { upto: Lsn(500), urgent: true });
        rig.demux.tick();
        let Ok(ShipItem::Batch(b)) = rig.items.try_recv() else { panic!("an urgent position ships") };
        assert_eq!(b.upto_lsn, Lsn(500));
        // Durable; then somebody waits for a later position, and nothing happened up to it.
        rig.flow.item_durable();
        rig.flow.want(Lsn(600));
        rig.demux.tick();
        assert!(rig.items.try_recv().is_err(), "the position has not arrived");
        rig.demux.input(Input::Position { upto: Lsn(600), urgent: false });
        rig.demux.tick();
        assert!(matches!(rig.items.try_recv(), Ok(ShipItem::Idle(Lsn(600)))));
    }

    #[test]
    fn a_transaction_larger_than_memory_goes_through_the_spool_whole() {
        let mut rig = rig(1 << 20);
        let mut first = Vec::new();
        relation(&mut first, 7);
        put_begin(&mut first, &begin(200));
        rig.demux.data(&first).unwrap();
        let mut expect = 0;
        for i in 0..200 {
            let mut s = Vec::new();
            run(&mut s, if i % 3 == 0 { "a" } else { "b" }, 7, 1000);
            expect += 1000;
            rig.demux.data(&s).unwrap();
            assert!(rig.flow.held_bytes() <= (1 << 20), "{}", rig.flow.held_bytes());
        }
        assert!(rig.flow.spool_bytes() > 2 << 20);
        // A row in pieces, larger than the memory.
        let piece = vec![b'x'; 256 << 10];
        let mut s = Vec::new();
        let header = RunHeader {
            seq: 9,
            tenant_kind: TenantKind::Normal,
            tenant_key: "a",
            relations: &7u64.to_le_bytes(),
            rows: 1,
            rows_len: 8 * piece.len() as u64,
        };
        put_run_header(&mut s, &header, None);
        rig.demux.data(&s).unwrap();
        for _ in 0..8 {
            let mut s = Vec::new();
            put_run_data(&mut s, &piece);
            rig.demux.data(&s).unwrap();
        }
        let mut s = Vec::new();
        commit(&mut s, 200, expect + 1);
        rig.demux.data(&s).unwrap();
        let mut b = rig.batch();
        let spool = b.spool.take().unwrap().reader();
        let mut rows = 0;
        for t in &mut b.tenants {
            let bytes = content(t, Some(&spool));
            for f in FrameReader::new(&bytes) {
                match f.unwrap() {
                    Frame::Run(r) => rows += u64::from(r.header.rows),
                    Frame::RunOpen(h) => rows += u64::from(h.rows),
                    _ => {}
                }
            }
        }
        assert_eq!(rows, expect + 1);
    }

    #[test]
    fn what_concerns_all_goes_to_the_common_buffer() {
        let mut rig = rig(64 << 20);
        let mut s = Vec::new();
        relation(&mut s, 7);
        put_begin(&mut s, &begin(200));
        put_truncate(
            &mut s,
            &Truncate { seq: 1, restart_sequences: false, tenant: None, relations: &7u64.to_le_bytes() },
        );
        put_marker(&mut s, &Marker { seq: 2, kind: "restore_point", payload: b"p" });
        commit(&mut s, 200, 0);
        rig.demux.data(&s).unwrap();
        let mut b = rig.batch();
        assert!(b.tenants.is_empty());
        assert_eq!(
            b.markers,
            [SeenMarker {
                kind: "restore_point".into(),
                payload: b"p".to_vec(),
                xid: 200,
                end_lsn: Lsn(200),
                commit_us: 200,
                seq: 2
            }]
        );
        let mut all = Vec::new();
        while let Some(p) = b.common.next_piece(None).unwrap() {
            all.extend(p);
        }
        assert_eq!(kinds(&all), "RBTM");
    }

    #[test]
    fn rows_without_a_known_tenant_are_counted() {
        let mut rig = rig(64 << 20);
        let mut s = Vec::new();
        relation(&mut s, 7);
        put_begin(&mut s, &begin(200));
        let header = RunHeader {
            seq: 1,
            tenant_kind: TenantKind::Unresolved,
            tenant_key: "",
            relations: &7u64.to_le_bytes(),
            rows: 4,
            rows_len: 0,
        };
        put_run_header(&mut s, &header, Some(b""));
        commit(&mut s, 200, 4);
        rig.demux.data(&s).unwrap();
        assert_eq!((rig.flow.unresolved_rows(), rig.batch().unresolved_rows), (4, 4));
    }
}
