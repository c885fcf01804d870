//! Writes fulls: the merge gives every tenant's rows one after another, and each tenant's are sealed and uploaded by a
//! worker of their own, a few at a time.
//!
//! A base's full has one section per table. A synthetic full is cut into parts ([`Cuts`]), sections that hold a range of
//! keys each, so that the next one can take over those that no change touched.

use crate::crypto::{Codec, Header, KeySource, ObjectKind, Sealer, random};
use crate::error::{Error, Result};
use crate::keyring::Keyring;
use crate::merge::{Image, RowSink, sort_key_of_row};
use crate::repository::{ObjectRef, ObjectWriter, Repository, paths};
use crate::snapshot::progress::BaseProgress;
use crate::tenant::Tenant;
use coffer_wire::{
    KeyMode, Lsn, Relation, RunHeader, TenantKind, put_insert, put_relation, put_run_data, put_run_header,
};
use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::runtime::Handle;
use uuid::Uuid;

/// Rows of a RUN frame, in bytes.
const RUN_BYTES: usize = 256 << 10;
/// Frames on their way to a worker.
const FRAMES_AHEAD: usize = 4;
/// Tenants that are sealed and uploaded at a time.
const WORKERS: usize = 8;

/// What all fulls of a job have in common.
pub struct Job {
    pub repository: Arc<Repository>,
    pub keyring: Arc<Keyring>,
    pub rt: Handle,
    pub source: Uuid,
    pub system_identifier: u64,
    pub timeline: u32,
    pub cut: Lsn,
    pub progress: Option<Arc<BaseProgress>>,
    /// The tenant whose folder everything goes to; `None`: each full to its own tenant's.
    pub folder: Option<Uuid>,
}

/// A full and how many rows it has of each table that it has rows of.
pub struct Full {
    pub object: ObjectRef,
    pub rows: BTreeMap<u32, u64>,
}

/// Where a full is cut into parts.
#[derive(Clone, Debug, Default)]
pub struct Cuts {
    /// Rows of a part, in bytes, after which the next one begins.
    pub part_bytes: u64,
    /// Keys before which a part ends, in order: there are rows elsewhere that come between. By table and
    /// [`sort_key_of_row`].
    pub borders: Vec<(u32, Vec<u8>)>,
}

/// A part that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub relid: u32,
    pub section: String,
    /// Of its first row: [`sort_key_of_row`].
    pub first: Vec<u8>,
    pub rows: u64,
    /// Of the rows, as they stand in the frames.
    pub bytes: u64,
    /// The descriptors that its rows are under, encoded.
    pub relations: Vec<Vec<u8>>,
}

/// What a worker is sent.
enum Piece {
    /// Rows of this table follow: a section of the container.
    Section(u32, String),
    /// Whole frames, and how many rows they hold.
    Frames(Vec<u8>, u64),
    /// The tenant is complete. Without it, nothing is recorded.
    End,
}

/// The sink of a base's merge; groups are indexes into `tenants`.
pub struct FullWriter {
    job: Arc<Job>,
    tenants: Vec<Tenant>,
    workers: Vec<std::thread::JoinHandle<()>>,
    results: Arc<Mutex<Vec<Result<Full>>>>,
    /// Lends a place to each worker.
    places: (SyncSender<()>, Receiver<()>),
    out: Option<SyncSender<Piece>>,
    table: Option<Table>,
    frame: Vec<u8>,
    tenant: Option<Tenant>,
    cuts: Option<Cuts>,
    next_border: usize,
    parts: Vec<Part>,
}

struct Table {
    relid: u32,
    mode: KeyMode,
    /// Descriptors that the section has already.
    written: HashSet<u64>,
    /// Of the leaf that rows come from.
    leaf: u64,
    encoded: Vec<u8>,
    /// Sections of the table so far.
    sections: usize,
    /// Of the row before; empty before the first.
    sort_key: Vec<u8>,
    /// Ids of the descriptors of the run, eight bytes each, and the leaf's place among them.
    run: Vec<u8>,
    place: Option<u16>,
    full_row: bool,
    rows: Vec<u8>,
    count: u32,
}

impl FullWriter {
    pub fn new(job: Job, tenants: Vec<Tenant>) -> Self {
        let places = sync_channel(WORKERS);
        for _ in 0..WORKERS {
            // The channel has room for all of them.
            let _ = places.0.send(());
        }
        Self {
            job: Arc::new(job),
            tenants,
            workers: Vec::new(),
            results: Arc::default(),
            places,
            out: None,
            table: None,
            frame: Vec::new(),
            tenant: None,
            cuts: None,
            next_border: 0,
            parts: Vec::new(),
        }
    }

    /// Cuts what is written into parts: for one tenant.
    pub fn in_parts(mut self, cuts: Cuts) -> Self {
        self.cuts = Some(cuts);
        self
    }

    /// The parts written so far, in order.
    pub fn take_parts(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.parts)
    }

    /// Begins the section that a row with this key is to be in, where it is not the one at hand.
    fn place(&mut self, sort_key: Option<&[u8]>) -> Result<()> {
        let (Some(cuts), Some(t)) = (&self.cuts, &self.table) else { return Ok(()) };
        let Some(key) = sort_key else { return Ok(()) };
        let at = (t.relid, key);
        let mut crossed = false;
        while let Some((relid, first)) = cuts.borders.get(self.next_border)
            && (*relid, first.as_slice()) <= at
        {
            crossed = true;
            self.next_border += 1;
        }
        let full = self.parts.last().is_some_and(|p| p.bytes >= cuts.part_bytes);
        // Rows of one key stay together: a table without a key may have a row several times.
        if t.sections == 0 || (crossed || full) && t.sort_key != key {
            let first = key.to_vec();
            self.section(first)?;
        }
        if let Some(t) = &mut self.table {
            t.sort_key.clear();
            t.sort_key.extend_from_slice(key);
        }
        Ok(())
    }

    fn section(&mut self, first: Vec<u8>) -> Result<()> {
        self.flush()?;
        let Some(t) = &mut self.table else { return Ok(()) };
        let label = if t.sections == 0 { t.relid.to_string() } else { format!("{}/{}", t.relid, t.sections) };
        t.sections += 1;
        t.written.clear();
        let relid = t.relid;
        self.frame.clear();
        self.parts.push(Part { relid, section: label.clone(), first, rows: 0, bytes: 0, relations: Vec::new() });
        self.send(Piece::Section(relid, label))?;
        self.describe();
        Ok(())
    }

    /// Puts the descriptor of the leaf at hand before the run that is being filled, so before every row that refers to it.
    fn describe(&mut self) {
        let Some(t) = &mut self.table else { return };
        if t.written.insert(t.leaf) {
            put_relation(&mut self.frame, t.leaf, &t.encoded);
            if let (Some(_), Some(p)) = (&self.cuts, self.parts.last_mut()) {
                p.relations.push(t.encoded.clone());
            }
        }
    }

    fn count(&mut self, bytes: u64) {
        if let (Some(_), Some(p)) = (&self.cuts, self.parts.last_mut()) {
            p.rows += 1;
            p.bytes += bytes;
        }
    }

    /// Waits for the workers. All fulls are in the stores when this returns.
    pub fn finish(mut self) -> Result<Vec<Full>> {
        self.out = None;
        for w in std::mem::take(&mut self.workers) {
            w.join().map_err(|_| Error::other("a worker that writes fulls broke off"))?;
        }
        std::mem::take(&mut *self.results.lock().unwrap_or_else(PoisonError::into_inner)).into_iter().collect()
    }

    fn send(&mut self, p: Piece) -> Result<()> {
        let sent = self.out.as_ref().is_some_and(|o| o.send(p).is_ok());
        if sent {
            return Ok(());
        }
        // The worker has put down why it stopped.
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = results.iter().position(std::result::Result::is_err).map(|i| results.swap_remove(i));
        Err(match failed {
            Some(Err(e)) => e,
            _ => Error::other("a worker that writes fulls has stopped"),
        })
    }

    fn flush(&mut self) -> Result<()> {
        let (Some(t), Some(tenant)) = (&mut self.table, &self.tenant) else { return Ok(()) };
        if t.count == 0 {
            return Ok(());
        }
        let header = RunHeader {
            seq: 0,
            tenant_kind: tenant.kind,
            tenant_key: &tenant.key,
            relations: &t.run,
            rows: t.count,
            rows_len: t.rows.len() as u64,
        };
        put_run_header(&mut self.frame, &header, Some(&t.rows));
        let n = u64::from(t.count);
        t.rows.clear();
        t.run.clear();
        t.place = None;
        t.count = 0;
        let frame = std::mem::take(&mut self.frame);
        self.send(Piece::Frames(frame, n))
    }

    /// A row that is larger than a frame: its bytes go past in pieces.
    fn large_row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        let by_key = self.table.as_ref().is_some_and(|t| t.mode == KeyMode::Key);
        if by_key {
            self.place(Some(key))?;
        } else if self.cuts.is_some() && self.table.as_ref().is_some_and(|t| t.sections == 0) {
            // The least of all: what orders it is not at hand.
            self.section(Vec::new())?;
        }
        self.flush()?;
        self.count(image.len());
        let (Some(t), Some(tenant)) = (&self.table, &self.tenant) else { return Ok(()) };
        let length = u32::try_from(image.len())
            .map_err(|_| Error::other("a row is longer than 4 GiB as text: no frame can hold it"))?;
        let mut head = Vec::new();
        put_insert(&mut head, 0, key, b"");
        let at = head.len() - 4;
        head[at..].copy_from_slice(&length.to_le_bytes());
        let header = RunHeader {
            seq: 0,
            tenant_kind: tenant.kind,
            tenant_key: &tenant.key,
            relations: &t.leaf.to_le_bytes(),
            rows: 1,
            rows_len: head.len() as u64 + u64::from(length),
        };
        // The table's descriptor may still wait for its first row.
        let mut frame = std::mem::take(&mut self.frame);
        put_run_header(&mut frame, &header, None);
        self.send(Piece::Frames(frame, 1))?;
        let mut pieces = Pieces { writer: self, buf: head, error: None };
        let written = image
            .write_to(&mut pieces)
            .and_then(|()| pieces.flush().map_err(|e| Error::other("cannot pass a large row on").source(e)));
        match pieces.error.take() {
            Some(e) => Err(e),
            None => written,
        }
    }
}

/// Cuts what is written into RUN_DATA frames.
struct Pieces<'a> {
    writer: &'a mut FullWriter,
    buf: Vec<u8>,
    error: Option<Error>,
}

impl Pieces<'_> {
    fn send(&mut self) -> std::io::Result<()> {
        let mut frame = Vec::with_capacity(self.buf.len() + 8);
        put_run_data(&mut frame, &self.buf);
        self.buf.clear();
        self.writer.send(Piece::Frames(frame, 0)).map_err(|e| {
            self.error = Some(e);
            std::io::Error::other("the worker has stopped")
        })
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
        let n = b.len().min(RUN_BYTES);
        self.buf.extend_from_slice(&b[..n]);
        if self.buf.len() >= RUN_BYTES {
            self.send()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.buf.is_empty() { Ok(()) } else { self.send() }
    }
}

impl RowSink for FullWriter {
    fn begin_group(&mut self, group: u32) -> Result<()> {
        let tenant = self.tenants[group as usize].clone();
        self.places.1.recv().map_err(|_| Error::other("no worker is left to write fulls"))?;
        let (tx, rx) = sync_channel(FRAMES_AHEAD);
        let (job, results, place) = (self.job.clone(), self.results.clone(), self.places.0.clone());
        let whose = tenant.clone();
        let worker = std::thread::Builder::new()
            .name("coffer-full".to_owned())
            .spawn(move || {
                let result = write_full(&job, &whose, &rx);
                drop(rx);
                results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                let _ = place.send(());
            })
            .map_err(|e| Error::other("cannot start a worker").source(e))?;
        self.workers.retain(|w| !w.is_finished());
        self.workers.push(worker);
        self.out = Some(tx);
        self.tenant = Some(tenant);
        Ok(())
    }

    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        if self.cuts.is_none() {
            self.send(Piece::Section(rel.relid, rel.relid.to_string()))?;
        }
        self.table = Some(Table {
            relid: rel.relid,
            mode: rel.key_mode,
            written: HashSet::new(),
            leaf: 0,
            encoded: Vec::new(),
            sections: 0,
            sort_key: Vec::new(),
            run: Vec::new(),
            place: None,
            full_row: rel.key_mode == KeyMode::FullRow,
            rows: Vec::new(),
            count: 0,
        });
        self.leaf(rel)
    }

    fn leaf(&mut self, rel: &Arc<Relation>) -> Result<()> {
        let Some(t) = &mut self.table else { return Ok(()) };
        t.encoded = rel.encode();
        t.leaf = Relation::id_of(&t.encoded);
        t.place = None;
        if self.cuts.is_none() || t.sections > 0 {
            self.describe();
        }
        Ok(())
    }

    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        let Some(line) = image.as_line().filter(|l| l.len() < RUN_BYTES) else { return self.large_row(key, image) };
        if self.cuts.is_some() {
            let mode = self.table.as_ref().map_or(KeyMode::Key, |t| t.mode);
            self.place(Some(&sort_key_of_row(mode, key, line)))?;
            self.describe();
            self.count((key.len() + line.len()) as u64);
        }
        let Some(t) = &mut self.table else { return Ok(()) };
        let place = match t.place {
            Some(p) => p,
            None => {
                let id = t.leaf.to_le_bytes();
                let known = t.run.chunks_exact(8).position(|c| c == id);
                let place = known.unwrap_or(t.run.len() / 8);
                if known.is_none() {
                    t.run.extend_from_slice(&id);
                }
                let place = u16::try_from(place).map_err(|_| Error::other("a table has more than 65535 leaves"))?;
                *t.place.insert(place)
            }
        };
        put_insert(&mut t.rows, place, if t.full_row { b"" } else { key }, line);
        t.count += 1;
        if t.rows.len() >= RUN_BYTES { self.flush() } else { Ok(()) }
    }

    fn end_table(&mut self) -> Result<()> {
        self.flush()?;
        self.table = None;
        Ok(())
    }

    fn end_group(&mut self) -> Result<()> {
        self.send(Piece::End)?;
        self.out = None;
        self.tenant = None;
        Ok(())
    }
}

/// Seals one tenant's full.
fn write_full(job: &Job, tenant: &Tenant, pieces: &Receiver<Piece>) -> Result<Full> {
    let entry = job.rt.block_on(job.keyring.ensure(job.source, tenant))?;
    let key = job.keyring.key(entry.key_id())?;
    let header = Header {
        kind: ObjectKind::Full,
        codec: Codec::Zstd,
        tenant: entry.uid,
        object: random::uuid(),
        source: job.source,
        system_identifier: job.system_identifier,
        timeline: job.timeline,
        lsn_start: Lsn::ZERO,
        lsn_end: job.cut,
        key_version: entry.version,
    };
    let path = paths::full(job.source, job.folder.unwrap_or(entry.uid), job.cut, header.object);
    let mut rows = BTreeMap::new();
    let fill = |sealer: &mut Sealer<ObjectWriter>| {
        rows = copy(sealer, pieces)?;
        Ok(rows.values().sum())
    };
    let object = job.repository.seal_to(job.rt.clone(), path, &header, &key, fill)?;
    if let Some(p) = &job.progress {
        p.full_written();
    }
    tracing::debug!(tenant_uid = %entry.uid, rows = object.rows, bytes = object.bytes, "full written");
    Ok(Full { object, rows })
}

fn copy(sealer: &mut Sealer<ObjectWriter>, pieces: &Receiver<Piece>) -> Result<BTreeMap<u32, u64>> {
    let (mut rows, mut table) = (BTreeMap::new(), 0);
    loop {
        match pieces.recv() {
            Ok(Piece::Section(relid, label)) => {
                table = relid;
                sealer.section(&label)?;
            }
            Ok(Piece::Frames(bytes, n)) => {
                *rows.entry(table).or_insert(0) += n;
                sealer.write_all(&bytes).map_err(|e| Error::other("cannot seal a full").source(e))?;
            }
            Ok(Piece::End) => return Ok(rows),
            Err(_) => return Err(Error::other("the merge stopped in the middle of a tenant").code("cut_off")),
        }
    }
}

/// The tenants of a job by the number of their group.
#[derive(Default)]
pub struct Groups {
    tenants: Vec<Tenant>,
    by_kind: [std::collections::HashMap<Vec<u8>, u32>; 4],
}

impl Groups {
    /// The group of a tenant, made on first use.
    pub fn of(&mut self, kind: TenantKind, key: &[u8]) -> Result<u32> {
        let known = &mut self.by_kind[kind as usize];
        if let Some(g) = known.get(key) {
            return Ok(*g);
        }
        // Nobody can name such a tenant: the row is kept as the stream keeps it, and holds no other tenant's base up.
        let Ok(text) = String::from_utf8(key.to_vec()) else { return self.of(TenantKind::Unresolved, b"") };
        let g = u32::try_from(self.tenants.len()).map_err(|_| Error::other("more than 2^32 tenants"))?;
        known.insert(key.to_vec(), g);
        self.tenants.push(Tenant { kind, key: text });
        Ok(g)
    }

    pub fn into_tenants(self) -> Vec<Tenant> {
        self.tenants
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_keeps_its_group_and_reserved_ones_have_their_own() {
        let mut g = Groups::default();
        let a = g.of(TenantKind::Normal, b"a").unwrap();
        let none = g.of(TenantKind::Unassigned, b"").unwrap();
        let empty = g.of(TenantKind::Normal, b"").unwrap();
        assert_eq!(g.of(TenantKind::Normal, b"a").unwrap(), a);
        assert_ne!(none, empty);
        let nameless = g.of(TenantKind::Normal, b"a\xff").unwrap();
        assert_eq!(g.of(TenantKind::Normal, b"\xfe").unwrap(), nameless);
        let tenants = g.into_tenants();
        assert_eq!(tenants[none as usize], Tenant::reserved(TenantKind::Unassigned));
        assert_eq!(tenants[nameless as usize], Tenant::reserved(TenantKind::Unresolved));
        assert_eq!(tenants.len(), 4);
    }
}
