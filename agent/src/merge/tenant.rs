//! A tenant at a position: its fulls and changesets, read from the repository, merged.

use super::parts_reader::PartsReader;
use super::{Holes, Merge, MergeStats, NetSink, NetStats, Pick, RowSink, Scratch};
use crate::catalog::PartAt;
use crate::crypto::Opener;
use crate::error::{Error, Result};
use crate::history::Inputs;
use crate::repository::{ObjectRef, Repository};
use crate::snapshot::visibility::PgSnapshot;
use crate::tenant::Tenant;
use bytes::Bytes;
use coffer_wire::{Begin, Lsn, TenantKind};
use futures::{StreamExt, stream};
use std::collections::{HashMap, VecDeque};
use std::io::Read;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Objects up to this many sealed bytes are fetched ahead; larger ones are streamed.
const SMALL_BYTES: u64 = 1 << 20;
/// Small objects under way at a time.
const FETCHES_AHEAD: usize = 8;
/// Small objects that wait to be read.
const FETCHED: usize = 2;

/// Everything that is needed to read a tenant at a position, as often as wanted.
#[derive(Clone)]
pub struct TenantAt {
    pub repo: Arc<Repository>,
    pub rt: Handle,
    pub tenant: Tenant,
    pub inputs: Arc<Inputs>,
    /// One store to read from; `None`: the best.
    pub from: Option<String>,
    pub scratch: Scratch,
    /// Bytes of memory.
    pub memory: usize,
    pub holes: Holes,
    /// Only transactions that this snapshot sees count; `None`: all up to the target.
    pub seen: Option<Arc<PgSnapshot>>,
}

impl TenantAt {
    /// Gives all rows to the sink, sorted by table and key. Blocking: never on a thread of the async runtime.
    pub fn read(&self, sink: &mut dyn RowSink) -> Result<MergeStats> {
        let mut merge = self.changes()?;
        self.fulls(&mut merge, &|_| true)?;
        merge.run(sink)
    }

    /// A merge that has read the changes, and no fulls yet.
    pub fn changes(&self) -> Result<Merge> {
        let mut merge = Merge::new(&self.scratch, self.memory)?;
        merge.on_holes(self.holes);
        let cuts: HashMap<u32, Lsn> = self.inputs.tables.iter().map(|t| (t.relid, t.cut)).collect();
        let wanted = Wanted::Tables(&cuts);
        self.feed(&mut merge, wanted)?;
        Ok(merge)
    }

    /// Writes what the changes after a position come to, of every table. Blocking.
    pub fn net(&self, after: Lsn, out: &mut dyn NetSink) -> Result<NetStats> {
        let mut merge = Merge::for_net(&self.scratch, self.memory)?;
        self.feed(&mut merge, Wanted::After(after))?;
        merge.net(&self.tenant, after, out)
    }

    fn feed(&self, merge: &mut Merge, wanted: Wanted<'_>) -> Result<()> {
        let mut pick = TenantPick { tenant: &self.tenant, wanted, limit: Lsn::MAX, seen: self.seen.as_deref() };
        let mut objects = self.fetch_ahead();
        for ship in &self.inputs.ships {
            pick.limit = ship.limit.min(self.inputs.target);
            // A truncate comes with the ship's common object, the rows around it with the changeset: each carries its
            // position, so the order of the two does not matter.
            for object in ship.common.iter().chain(&ship.changeset) {
                let during = |e: Error| e.during(format_args!("object {}", object.path));
                let mut plain = self.open(object, &mut objects)?;
                merge.changes(&mut *plain, &mut pick).map_err(during)?;
            }
        }
        Ok(())
    }

    /// Adds the fulls: of the parts, those with a number that is `wanted`.
    pub fn fulls(&self, merge: &mut Merge, wanted: &dyn Fn(usize) -> bool) -> Result<()> {
        for (full, tables) in &self.inputs.fulls {
            let opener = self.repo.open_object(&self.rt, full, self.from.as_deref())?;
            merge.full(0, Box::new(opener), Some(tables.clone()));
        }
        let numbered = self.inputs.parts.iter().enumerate();
        let parts: VecDeque<PartAt> = numbered.filter(|(n, _)| wanted(*n)).map(|(_, p)| p.clone()).collect();
        if !parts.is_empty() {
            let (repo, rt, from) = (self.repo.clone(), self.rt.clone(), self.from.clone());
            let rows = parts.iter().map(|p| p.rows).sum();
            merge.parts(0, Box::new(PartsReader { repo, rt, from, parts, open: None, current: None }), rows);
        }
        Ok(())
    }

    fn open(&self, object: &ObjectRef, ahead: &mut mpsc::Receiver<Result<Bytes>>) -> Result<Box<dyn Read + Send>> {
        if object.bytes > SMALL_BYTES {
            return Ok(Box::new(self.repo.open_object(&self.rt, object, self.from.as_deref())?));
        }
        let bytes = ahead.blocking_recv().unwrap_or_else(|| Err(Error::other("reading ahead has stopped")))?;
        let opener = Opener::new(std::io::Cursor::new(bytes), &**self.repo.keyring(), &object.expect())
            .map_err(|e| e.during(format_args!("object {}", object.path)))?;
        Ok(Box::new(opener.named(&object.path)))
    }

    /// The sealed bytes of the small objects, in their order.
    fn fetch_ahead(&self) -> mpsc::Receiver<Result<Bytes>> {
        let (tx, rx) = mpsc::channel(FETCHED);
        let (repo, inputs, from) = (self.repo.clone(), self.inputs.clone(), self.from.clone());
        self.rt.spawn(async move {
            let objects: Vec<ObjectRef> = inputs
                .ships
                .iter()
                .flat_map(|s| s.common.iter().chain(&s.changeset))
                .filter(|o| o.bytes <= SMALL_BYTES)
                .cloned()
                .collect();
            let mut fetched = stream::iter(objects)
                .map(|o| {
                    let (repo, from) = (repo.clone(), from.clone());
                    async move { repo.fetch(&o, from.as_deref()).await }
                })
                .buffered(FETCHES_AHEAD);
            while let Some(b) = fetched.next().await {
                let stop = b.is_err();
                if tx.send(b).await.is_err() || stop {
                    return;
                }
            }
        });
        rx
    }
}

/// Which tables' changes count, and from where on.
#[derive(Clone, Copy)]
enum Wanted<'a> {
    /// These, each after its cut.
    Tables(&'a HashMap<u32, Lsn>),
    /// All, after this.
    After(Lsn),
}

impl Wanted<'_> {
    fn has(self, relid: u32, at: Lsn, unknown: bool) -> bool {
        match self {
            Self::Tables(cuts) => cuts.get(&relid).map_or(unknown, |cut| at > *cut),
            Self::After(cut) => at > cut,
        }
    }
}

/// Changes of the tenant's tables up to the target.
struct TenantPick<'a> {
    tenant: &'a Tenant,
    wanted: Wanted<'a>,
    limit: Lsn,
    seen: Option<&'a PgSnapshot>,
}

impl TenantPick<'_> {
    fn counts(&self, txn: &Begin) -> bool {
        txn.end_lsn <= self.limit && self.seen.is_none_or(|s| s.sees(txn.xid))
    }
}

impl Pick for TenantPick<'_> {
    fn group(&mut self, _: &Begin, kind: TenantKind, key: &str) -> Option<u32> {
        (kind == self.tenant.kind && key == self.tenant.key).then_some(0)
    }

    fn table(&mut self, txn: &Begin, relid: u32) -> bool {
        self.counts(txn) && self.wanted.has(relid, txn.end_lsn, false)
    }

    fn dropped(&mut self, txn: &Begin, relid: u32) -> bool {
        // What is not a table may be a leaf of one; a dropped leaf has no rows in a base behind it.
        self.counts(txn) && self.wanted.has(relid, txn.end_lsn, true)
    }
}
