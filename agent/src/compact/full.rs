//! The rows of a synthetic full: parts that no change touched are taken over, the others are merged and written.

use super::Compactor;
use crate::catalog::{PartAt, manifest};
use crate::crypto::{Codec, Header, KeySource, ObjectKind, random};
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::keyring::TenantEntry;
use crate::merge::{Image, KnownPart, RowSink, TenantAt, check, from_io};
use crate::repository::ObjectRef;
use crate::restore::Watch;
use crate::snapshot::fulls::{Cuts, FullWriter, Job as WriteJob};
use crate::tenant::Tenant;
use coffer_wire::{Lsn, Relation};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// Objects that a full may refer to beside the one written for it.
const MOST_OBJECTS: usize = 32;
/// An object of which less than this share of its rows still counts is read one last time.
const LEAST_LIVE: f64 = 0.25;

/// One full to be written.
pub(super) struct Job {
    pub compactor: Compactor,
    pub entry: TenantEntry,
    pub point: Lsn,
    pub system_identifier: u64,
    pub timeline: u32,
    /// Nothing is taken over from older fulls.
    pub fresh: bool,
    /// The tenant whose folder it goes to, where that is not its own.
    pub folder: Option<Uuid>,
}

/// What is in the stores now.
pub(crate) struct Written {
    pub manifest: Option<ObjectRef>,
    pub objects: Vec<ObjectRef>,
    /// By table and part.
    pub rows: Vec<(u32, u64)>,
    /// Sealed bytes that were written.
    pub bytes: u64,
    /// Of the objects and the manifest, those that an older full wrote.
    pub taken_over: Vec<ObjectRef>,
}

/// The rows of a full on their way to its writer: somebody may ask how far it is, or end it.
struct Watched<'a> {
    watch: &'a Watch,
    writer: &'a mut FullWriter,
}

impl RowSink for Watched<'_> {
    fn begin_group(&mut self, group: u32) -> Result<()> {
        self.writer.begin_group(group)
    }

    fn last_change(&mut self, at: Lsn) {
        self.writer.last_change(at);
    }

    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        failpoints::hit(failpoints::FULL_AT_TABLE)?;
        self.writer.begin_table(rel)
    }

    fn leaf(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.writer.leaf(rel)
    }

    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        self.watch.row()?;
        self.writer.row(key, image)
    }

    fn end_table(&mut self) -> Result<()> {
        self.writer.end_table()
    }

    fn end_group(&mut self) -> Result<()> {
        self.writer.end_group()
    }
}

/// Blocking.
pub(super) fn write(job: &Job, at: &TenantAt) -> Result<Written> {
    let c = &job.compactor;
    let before = &at.inputs.parts;
    let mut merge = at.changes()?;
    merge.keep_leaves();
    let known: Vec<KnownPart> = before
        .iter()
        .map(|p| KnownPart { relid: p.relid, first: p.first.clone(), relations: p.relations.clone() })
        .collect();
    let mut touched = merge.touched(0, &known)?;
    retire(before, &mut touched);
    if job.fresh {
        touched.fill(true);
    }
    at.fulls(&mut merge, &|n| touched[n])?;
    let kept: Vec<&PartAt> = before.iter().zip(&touched).filter(|(_, t)| !**t).map(|(p, _)| p).collect();
    let borders = kept.iter().map(|p| (p.relid, p.first.clone().unwrap_or_default())).collect();
    let mut writer =
        FullWriter::new(write_job(job), vec![at.tenant.clone()]).in_parts(Cuts { part_bytes: c.part_bytes, borders });
    let stats = merge.run(&mut Watched { watch: &c.watch, writer: &mut writer })?;
    if stats.duplicates > 0 {
        return Err(Error::new(
            Kind::Verification,
            format!("{} rows have the key of another row: the full is not recorded", stats.duplicates),
        )
        .code("base_mismatch"));
    }
    let new_parts = writer.take_parts();
    let new_object = writer.finish()?.pop().map(|f| f.object);
    let mut bytes = 0;
    let mut parts: Vec<PartAt> = kept.into_iter().cloned().collect();
    if let Some(object) = &new_object {
        bytes += object.bytes;
        read_back(job, object, &at.tenant)?;
        parts.extend(new_parts.into_iter().map(|p| PartAt {
            object: object.clone(),
            section: p.section,
            relid: p.relid,
            first: Some(p.first),
            rows: p.rows,
            bytes: p.bytes,
            relations: p.relations,
        }));
    }
    parts.sort_by(|a, b| (a.relid, &a.first).cmp(&(b.relid, &b.first)));
    let rows = parts.iter().map(|p| (p.relid, p.rows)).collect();
    let objects = objects_of(&parts);
    let same = at
        .inputs
        .full
        .as_ref()
        .filter(|f| new_object.is_none() && !job.fresh && parts.len() == whole(at, f.manifest.as_ref()));
    let manifest = match same {
        _ if parts.is_empty() => None,
        Some(f) => f.manifest.clone(),
        None => {
            let key = c.keyring.key(job.entry.key_id())?;
            let folder = job.folder.unwrap_or(job.entry.uid);
            let m = manifest::write(&c.repo, &c.rt, &key, (&header(job), folder), job.point, &parts)?;
            bytes += m.bytes;
            read_back(job, &m, &at.tenant)?;
            Some(m)
        }
    };
    let old = |o: &&ObjectRef| new_object.as_ref().is_none_or(|n| n.object != o.object);
    let taken_over = objects.iter().filter(old).chain(manifest.iter().filter(|_| same.is_some())).cloned().collect();
    Ok(Written { manifest, objects, rows, bytes, taken_over })
}

/// How many parts the full before has; those of tables that are read from elsewhere were left out of the inputs.
fn whole(at: &TenantAt, manifest: Option<&ObjectRef>) -> usize {
    let Some(m) = manifest else { return 0 };
    let all: u64 = at.inputs.parts.iter().map(|p| p.rows).sum();
    // The manifest's record says how many rows it has in all.
    if all == m.rows { at.inputs.parts.len() } else { usize::MAX }
}

fn objects_of(parts: &[PartAt]) -> Vec<ObjectRef> {
    let mut seen = HashSet::new();
    parts.iter().map(|p| &p.object).filter(|o| seen.insert(o.object)).cloned().collect()
}

/// Has the parts of objects written anew that hardly count any more, or that are too many.
fn retire(parts: &[PartAt], touched: &mut [bool]) {
    let mut live: BTreeMap<Uuid, (u64, u64)> = BTreeMap::new();
    for (p, _) in parts.iter().zip(touched.iter()).filter(|(_, t)| !**t) {
        let e = live.entry(p.object.object).or_insert((0, p.object.rows));
        e.0 += p.rows;
    }
    let mut gone: HashSet<Uuid> = HashSet::new();
    for (uid, (rows, all)) in &live {
        if (*rows as f64) < LEAST_LIVE * *all as f64 {
            gone.insert(*uid);
        }
    }
    let mut rest: Vec<(u64, Uuid)> =
        live.iter().filter(|(u, _)| !gone.contains(u)).map(|(u, (rows, _))| (*rows, *u)).collect();
    rest.sort_unstable();
    let over = rest.len().saturating_sub(MOST_OBJECTS);
    // Not one every time: half of them at once.
    let many = if over > 0 { over.max(MOST_OBJECTS / 2) } else { 0 };
    gone.extend(rest.into_iter().take(many).map(|(_, u)| u));
    for (p, t) in parts.iter().zip(touched.iter_mut()) {
        *t |= gone.contains(&p.object.object);
    }
}

fn write_job(job: &Job) -> WriteJob {
    let c = &job.compactor;
    WriteJob {
        repository: c.repo.clone(),
        keyring: c.keyring.clone(),
        rt: c.rt.clone(),
        source: c.source,
        system_identifier: job.system_identifier,
        timeline: job.timeline,
        cut: job.point,
        progress: None,
        folder: job.folder,
    }
}

fn header(job: &Job) -> Header {
    Header {
        kind: ObjectKind::Manifest,
        codec: Codec::Zstd,
        tenant: job.entry.uid,
        object: random::uuid(),
        source: job.compactor.source,
        system_identifier: job.system_identifier,
        timeline: job.timeline,
        lsn_start: Lsn::ZERO,
        lsn_end: job.point,
        key_version: job.entry.version,
    }
}

/// Reads an object back from every required store: every byte authenticated, its hash as it was written, its rows
/// counted.
fn read_back(job: &Job, object: &ObjectRef, tenant: &Tenant) -> Result<()> {
    let c = &job.compactor;
    for store in c.repo.required_stores() {
        let mut plain = c.repo.open_object(&c.rt, object, Some(store.name()))?;
        if object.kind == ObjectKind::Full {
            let found = check(&mut plain, Some(tenant), None)?;
            if found.rows != object.rows {
                let what = format!("object {} holds {} rows, {} were written", object.path, found.rows, object.rows);
                return Err(Error::new(Kind::Verification, what).code("corrupt"));
            }
        } else {
            std::io::copy(&mut plain, &mut std::io::sink()).map_err(from_io)?;
        }
    }
    Ok(())
}
