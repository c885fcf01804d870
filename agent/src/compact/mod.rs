//! Compaction: what the stream and the bases left, made into what is quick to restore and cheap to keep.
//!
//! [`Compactor::take_full`] makes a synthetic full: every row of a tenant at a point, merged from the full before (or the
//! bases) and the changes since, without touching the database. It writes only the parts that a change touched and refers
//! to the rest; a tenant that did nothing costs one catalog entry.
//!
//! [`Compactor::take_incremental`] makes of a tenant's changesets one object that says what they come to, every hour or so.
//!
//! Both are recorded when they were read back from the stores and were what had been written. What a worker leaves that dies
//! before is objects that nobody names.

mod all;
mod full;
mod incremental;
mod occasion;
mod share;

pub use all::{PARALLEL, on_schedule};
pub use incremental::Spans;
pub use occasion::{ARCHIVE, By, Occasion, SCHEDULE};
pub use share::Outcome;

use crate::catalog::{Catalog, Entry, FullEntry, FullTable, State};
use crate::clock::SharedClock;
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::history::line::TableAt;
use crate::history::{History, Target};
use crate::keyring::{Keyring, TenantEntry};
use crate::merge::{Holes, Scratch, TenantAt};
use crate::repository::{ObjectRef, Repository};
use crate::restore::Watch;
use crate::retention::FUTURE_US;
pub(crate) use full::Written;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use tokio::runtime::Handle;
use uuid::Uuid;

/// Bytes of rows after which a part of a full ends.
pub const DEFAULT_PART_BYTES: u64 = 8 << 20;

/// The code of the error that says that a tenant has no table that is covered.
const NO_TABLES: &str = "no_tables";

/// Makes synthetic fulls of a source's tenants.
#[derive(Clone)]
pub struct Compactor {
    pub repo: Arc<Repository>,
    pub keyring: Arc<Keyring>,
    pub rt: Handle,
    pub clock: SharedClock,
    pub source: Uuid,
    pub scratch: Scratch,
    /// For one merge, in bytes.
    pub memory: usize,
    pub part_bytes: u64,
    /// Whether tenants that another worker has are left to it.
    pub share: bool,
    /// Counts the rows that are written, and ends a full that nobody wants any longer.
    pub watch: Watch,
}

/// The tables of a full. `rows`: by table and part.
pub(crate) fn tables(history: &History, covered: Vec<TableAt>, rows: &[(u32, u64)]) -> Vec<FullTable> {
    let mut by_table: HashMap<u32, u64> = HashMap::new();
    for (relid, n) in rows {
        *by_table.entry(*relid).or_default() += n;
    }
    let table = |t: TableAt| FullTable {
        relid: t.relid,
        class: history.class(t.relid).map(str::to_owned),
        rows: by_table.get(&t.relid).copied().unwrap_or(0),
        name: t.name,
    };
    covered.into_iter().map(table).collect()
}

async fn write(job: full::Job, at: TenantAt) -> Result<Written> {
    let written = tokio::task::spawn_blocking(move || full::write(&job, &at));
    written.await.context(Kind::Other, "a worker thread broke off")?
}

impl Compactor {
    /// Writes every row of a merge into objects of their own, in a tenant's folder, as `like` has its point.
    pub(crate) async fn write_rows(
        &self,
        entry: &TenantEntry,
        at: TenantAt,
        like: &FullEntry,
        folder: Uuid,
    ) -> Result<Written> {
        let job = full::Job {
            compactor: self.clone(),
            entry: entry.clone(),
            point: like.point_lsn,
            system_identifier: like.system_identifier,
            timeline: like.timeline,
            fresh: true,
            folder: Some(folder),
        };
        write(job, at).await
    }

    /// Makes and records a full of every row of the tenant at a point. `history` has the tenant's catalog.
    ///
    /// # Errors
    /// `OutsideWindow`: the point cannot be restored to. Code `cancelled`: [`Watch::cancel`] was called in time; nothing is
    /// recorded.
    pub async fn take_full(
        &self,
        history: &History,
        tenant: &TenantEntry,
        point: &Target,
        occasion: &Occasion,
    ) -> Result<FullEntry> {
        let covered = history.require(point, tenant.uid, &|_| true)?;
        if covered.is_empty() {
            // It would count as a good one, and have older ones removed, while there may be rows in what is not covered.
            let what = format!("no table of tenant {} is covered at {}", tenant.tenant, point.asked);
            return Err(Error::new(Kind::OutsideWindow, what)
                .code(NO_TABLES)
                .hint("`coffer.coverage` tells why; until then its older backups stay as they are"));
        }
        let inputs = history.inputs(tenant.uid, point.lsn, covered.clone()).await?;
        // Where time is simulated, the point is as far away as the clock is.
        let point_time_us = point.time_us.saturating_add(self.clock.skew_us());
        let is_archive = occasion.is_archive(history, tenant, (point, point_time_us), &inputs)?;
        let trigger = if is_archive { ARCHIVE } else { occasion.trigger.as_str() };
        let newest = history.records().last().ok_or_else(|| Error::other("the log is empty"))?;
        let schema = inputs.schema.clone();
        let at = TenantAt {
            repo: self.repo.clone(),
            rt: self.rt.clone(),
            tenant: tenant.tenant.clone(),
            inputs: Arc::new(inputs),
            from: history.from_store().map(str::to_owned),
            scratch: self.scratch.clone(),
            memory: self.memory,
            // A row that came from another tenant may have values that only a later change brings.
            holes: Holes::Keep,
            seen: None,
        };
        let job = full::Job {
            compactor: self.clone(),
            entry: tenant.clone(),
            point: point.lsn,
            system_identifier: newest.system_identifier,
            timeline: newest.timeline,
            fresh: is_archive,
            folder: None,
        };
        let written = write(job, at).await?;
        failpoints::hit(failpoints::FULL_AFTER_OBJECTS)?;
        let Written { manifest, objects, rows, bytes, taken_over } = written;
        self.still_there(&taken_over).await?;
        let tables = tables(history, covered, &rows);
        let mut full = FullEntry {
            id: crate::crypto::random::uuid(),
            trigger: trigger.to_owned(),
            reason: occasion.reason.clone(),
            point_lsn: point.lsn,
            point_time_us,
            log_n: newest.n,
            system_identifier: newest.system_identifier,
            timeline: newest.timeline,
            rows: tables.iter().map(|t| t.rows).sum(),
            tables,
            manifest,
            objects,
            schema,
            roles: history.roles(tenant.uid, point).cloned(),
            sequences: history.sequences(point).await?,
            database: history.database(point.lsn).cloned(),
            bytes,
            read_back_us: Some(self.clock.now_us()),
            archive: Vec::new(),
        };
        if is_archive {
            full = match self.complete(history, tenant, point, full.clone()).await {
                Ok(archive) => archive,
                // Its rows are whole: what an archive has beside them keeps no night's full from being there.
                Err(e) if occasion.by == By::Schedule => {
                    tracing::warn!(tenant_uid = %tenant.uid, "the month's archive waits for the next full: {e}");
                    FullEntry { trigger: occasion.trigger.clone(), ..full }
                }
                Err(e) => return Err(e),
            };
        }
        self.watch.check()?;
        let mut catalog = Catalog::open(&self.repo, self.source, tenant.uid, None).await?;
        // Another attempt at the same job may have been quicker; then ours is objects that nobody names.
        let wanted = |s: &State| occasion.made(&s.fulls, point).is_none() && stay(s, &taken_over, self.clock.now_us());
        let recorded = catalog.append_if(Entry::Full(full.clone()), wanted).await?;
        if recorded.is_none() {
            if let Some(theirs) = occasion.made(&catalog.state().fulls, point) {
                return Ok(theirs.clone());
            }
            return Err(Error::other(format!(
                "the full of tenant {} at {} is not recorded: what it takes over from an older one is being removed",
                tenant.uid, point.lsn
            ))
            .hint("make it again"));
        }
        tracing::debug!(
            tenant_uid = %tenant.uid,
            point = %full.point_lsn,
            rows = full.rows,
            bytes = full.bytes,
            "full taken ({})",
            full.trigger
        );
        Ok(full)
    }

    /// Whether every object is where a full that refers to it needs it, and as long as it was. Its bytes were read back
    /// when it was written.
    async fn still_there(&self, taken_over: &[ObjectRef]) -> Result<()> {
        for store in self.repo.required_stores() {
            for o in taken_over {
                let size = store.size(&o.path).await?;
                if size != Some(o.bytes) {
                    let found = size.map_or_else(|| "is missing".to_owned(), |n| format!("has {n} bytes"));
                    let what = format!("object {} {found} in store {}, it had {} bytes", o.path, store.name(), o.bytes);
                    return Err(Error::new(Kind::Verification, what)
                        .code(if size.is_none() { "missing" } else { "corrupt" })
                        .hint("`coffer verify` shows what else is concerned"));
                }
            }
        }
        Ok(())
    }
}

/// Whether nobody removes the objects before a full that takes them over is recorded: a backup that counts has them, or
/// their removal is not due for longer than clocks may differ.
fn stay(s: &State, taken_over: &[ObjectRef], now_us: i64) -> bool {
    let soon_us = now_us.saturating_add(FUTURE_US);
    let later = s.removals.iter().filter(|r| r.not_before_us > soon_us).flat_map(|r| &r.objects);
    let safe: HashSet<&str> = s.objects().chain(later).map(|o| o.path.as_str()).collect();
    taken_over.iter().all(|o| safe.contains(o.path.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::model::Removal;
    use crate::crypto::ObjectKind;
    use coffer_wire::Lsn;

    #[test]
    fn what_is_about_to_be_removed_is_not_taken_over() {
        let object = |n: u64| ObjectRef {
            path: format!("o{n}"),
            kind: ObjectKind::Full,
            tenant: Uuid::nil(),
            object: Uuid::nil(),
            key_version: 1,
            bytes: n,
            sha256: String::new(),
            lsn_start: Lsn::ZERO,
            lsn_end: Lsn::ZERO,
            rows: 0,
        };
        let removal = |not_before_us, objects| Removal { n: 1, backups: vec![], objects, not_before_us, at_us: 0 };
        let now_us = 7 * FUTURE_US;
        let mut s = State::default();
        assert!(stay(&s, &[], now_us));
        assert!(!stay(&s, &[object(1)], now_us), "nothing that counts has it");
        s.removals =
            vec![removal(now_us + FUTURE_US + 1, vec![object(1)]), removal(now_us + FUTURE_US, vec![object(2)])];
        assert!(stay(&s, &[object(1)], now_us));
        assert!(!stay(&s, &[object(1), object(2)], now_us), "it may be gone by now");
    }
}
