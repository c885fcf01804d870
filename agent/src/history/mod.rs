//! The history of a source: from its commit log to what can be restored, from where, with which objects.
//!
//! [`History::load`] reads and verifies the log; [`History::resolve`] turns what a person asked for into a position;
//! [`History::windows`] says what can be asked for; [`History::inputs`] gives the objects that a tenant is merged from.
//!
//! A target is never rounded: a position that is not known in full is refused, with the window in the error.

mod archived;
mod damage;
mod facts;
mod floor;
mod incrementals;
pub mod line;
#[cfg(test)]
mod tests;
mod when;

pub use floor::Cut;
pub use when::When;

use crate::catalog::{self, Catalog, Floor, FullEntry, PartAt, State, manifest};
use crate::clock::rfc3339;
use crate::error::{Error, Kind, Result, WindowSpan};
use crate::keyring::Keyring;
use crate::repository::model::{Base, DatabaseLocale, LargeObjectsRead, SequenceState};
use crate::repository::{Log, LogRecord, ObjectRef, Repository};
use crate::tenant::Tenant;
use coffer_wire::{Lsn, TenantKind};
use futures::{StreamExt, stream};
use incrementals::Placed;
use line::{Closed, Facts, Line, Restored, ShipAt, TableAt};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use uuid::Uuid;

/// By how much a source's clock may step back before the times between become ambiguous, in microseconds.
const CLOCK_STEP_US: i64 = 1_000_000;
/// Catalogs read at a time.
const CATALOGS_AHEAD: usize = 16;

/// A position to restore to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As it was asked for.
    pub asked: String,
    /// Transactions with `end_lsn` at or below it are in.
    pub lsn: Lsn,
    /// The source's clock there, microseconds since 1970-01-01 UTC.
    pub time_us: i64,
}

/// One ship's part of a tenant's changes.
#[derive(Clone, Debug)]
pub struct ShipInput {
    pub common: Option<ObjectRef>,
    /// Or the incremental that stands for those of several ships.
    pub changeset: Option<ObjectRef>,
    /// Transactions beyond it do not count.
    pub limit: Lsn,
}

/// What a tenant at a target is merged from.
#[derive(Clone, Debug)]
pub struct Inputs {
    pub target: Lsn,
    /// Every table that is covered there, whether the tenant has rows in it or not.
    pub tables: Vec<TableAt>,
    /// Fulls of bases and the tables that are read from each.
    pub fulls: Vec<(ObjectRef, BTreeSet<u32>)>,
    /// Parts of a synthetic full that the other tables are read from, in order.
    pub parts: Vec<PartAt>,
    /// That full.
    pub full: Option<FullEntry>,
    /// In order.
    pub ships: Vec<ShipInput>,
    /// The definitions as they were at the target.
    pub schema: Option<ObjectRef>,
    /// Why they are not.
    pub schema_warning: Option<String>,
}

impl Inputs {
    /// The same of some tables.
    pub fn only(&self, wanted: &dyn Fn(u32) -> bool) -> Self {
        let mut some = self.clone();
        some.tables.retain(|t| wanted(t.relid));
        some.parts.retain(|p| wanted(p.relid));
        for (_, tables) in &mut some.fulls {
            tables.retain(|relid| wanted(*relid));
        }
        some.fulls.retain(|(_, tables)| !tables.is_empty());
        some
    }

    /// Changes alone.
    pub fn of_ships(target: Lsn, ships: Vec<ShipInput>) -> Self {
        Self {
            target,
            tables: Vec::new(),
            fulls: Vec::new(),
            parts: Vec::new(),
            full: None,
            ships,
            schema: None,
            schema_warning: None,
        }
    }
}

/// A backup as `list` shows it: a synthetic full, an incremental, or a tenant's part of a base.
#[derive(Clone, Debug)]
pub struct Backup {
    pub id: Uuid,
    /// `full`, `incremental` or `archive`.
    pub kind: &'static str,
    /// As [`FullEntry::trigger`]; `base` for what was read from the database, `incremental` for one.
    pub trigger: String,
    pub reason: Option<String>,
    /// When it was read back and was what had been written.
    pub verified_us: Option<i64>,
    pub point: Lsn,
    pub time_us: i64,
    pub bytes: u64,
    pub rows: u64,
    pub tables: usize,
    pub object: Option<ObjectRef>,
}

/// A table that a tenant has rows in, or may have.
#[derive(Clone, Debug)]
pub struct Holding {
    pub relation: String,
    /// `None` in records of versions that did not note it.
    pub class: Option<String>,
    /// Of the tenant in the table's newest base; `None` where it is not noted.
    pub rows: Option<u64>,
}

/// See the module.
pub struct History {
    repo: Arc<Repository>,
    keyring: Arc<Keyring>,
    source: Uuid,
    from: Option<String>,
    records: Vec<Arc<LogRecord>>,
    /// Records below this number are as a checkpoint has them.
    begins: u64,
    line: Line,
    facts: Facts,
    catalogs: BTreeMap<Uuid, State>,
    /// All that it says is of one archive.
    is_archive: bool,
    /// Up to where the times of transactions are gone.
    commons: Option<Floor>,
    /// Up to where changes of the shared tables are gone, which are restored together with every tenant's.
    shared: Option<Floor>,
}

impl History {
    /// Reads the log of a source, verified, and what its common objects say. `from`: one store, as it is.
    pub async fn load(
        repo: &Arc<Repository>,
        keyring: &Arc<Keyring>,
        source: Uuid,
        from: Option<&str>,
    ) -> Result<Self> {
        let log = Log::open(repo, source, from).await?;
        Self::of_log(repo, keyring, &log, from).await
    }

    /// The same of a log that is open.
    pub async fn of_log(repo: &Arc<Repository>, keyring: &Arc<Keyring>, log: &Log, from: Option<&str>) -> Result<Self> {
        let records = log.records().to_vec();
        let line = Line::new(&records);
        let facts = facts::read(repo, keyring, &line.ships, from).await?;
        let (commons, shared) = Self::of_all(repo, keyring, log.source(), from).await?;
        Ok(Self {
            repo: repo.clone(),
            keyring: keyring.clone(),
            source: log.source(),
            from: from.map(str::to_owned),
            records,
            begins: log.begins(),
            line,
            facts,
            catalogs: BTreeMap::new(),
            is_archive: false,
            commons,
            shared,
        })
    }

    /// Up to where the times of transactions, and changes of the shared tables, were removed. A catalog that says nothing
    /// readable stops no restore: then what is missing is an error where it is needed.
    async fn of_all(
        repo: &Arc<Repository>,
        keyring: &Arc<Keyring>,
        source: Uuid,
        from: Option<&str>,
    ) -> Result<(Option<Floor>, Option<Floor>)> {
        let shared = keyring.tenant_uid(source, &Tenant::reserved(TenantKind::Shared));
        match Catalog::open(repo, source, shared, from).await {
            Ok(c) => Ok((c.state().commons, c.state().floor)),
            Err(e) if e.kind() == Kind::Unreachable => Err(e),
            Err(e) => {
                tracing::warn!("the catalog of what concerns every tenant cannot be read: {e}");
                Ok((None, None))
            }
        }
    }

    /// Takes a tenant's catalog in: its backups can be named, and are read from.
    pub async fn load_catalog(&mut self, tenant: Uuid) -> Result<()> {
        if self.is_archive {
            return Ok(());
        }
        let c = Catalog::open(&self.repo, self.source, tenant, self.from.as_deref()).await?;
        self.catalogs.insert(tenant, c.state().clone());
        Ok(())
    }

    /// The same of a catalog that is open elsewhere.
    pub fn set_catalog(&mut self, tenant: Uuid, state: State) {
        self.catalogs.insert(tenant, state);
    }

    /// The same of every tenant that has one.
    pub async fn load_catalogs(&mut self) -> Result<()> {
        let having = catalog::tenants(&self.repo, self.source, self.from.as_deref()).await?;
        let (repo, source, from) = (&self.repo, self.source, self.from.as_deref());
        let each: Vec<_> = having.into_keys().map(|t| Catalog::open(repo, source, t, from)).collect();
        let mut read = stream::iter(each).buffer_unordered(CATALOGS_AHEAD);
        let mut all = BTreeMap::new();
        while let Some(c) = read.next().await {
            let c = c?;
            all.insert(c.tenant(), c.state().clone());
        }
        drop(read);
        self.catalogs = all;
        Ok(())
    }

    /// A tenant's catalog, if it was taken in.
    pub fn catalog(&self, tenant: Uuid) -> Option<&State> {
        self.catalogs.get(&tenant)
    }

    /// The synthetic fulls of a tenant that count, oldest first.
    pub fn fulls(&self, tenant: Uuid) -> Vec<&FullEntry> {
        let newest = self.records.last().map_or(0, |r| r.n);
        let counts = |f: &&FullEntry| f.log_n <= newest && self.line.goes_through(f.point_lsn, f.log_n);
        let mut all: Vec<&FullEntry> =
            self.catalogs.get(&tenant).into_iter().flat_map(|c| &c.fulls).filter(counts).collect();
        all.sort_by_key(|f| (f.point_lsn, f.log_n));
        all
    }

    /// Whether no check found a backup's objects damaged: what can be merged without it is.
    pub fn is_sound(&self, tenant: Uuid, backup: Uuid) -> bool {
        self.catalogs.get(&tenant).is_none_or(|c| c.read_back(backup) != Some(false))
    }

    pub fn source(&self) -> Uuid {
        self.source
    }

    pub fn repository(&self) -> &Arc<Repository> {
        &self.repo
    }

    pub fn keyring(&self) -> &Arc<Keyring> {
        &self.keyring
    }

    /// The one store to read from, if one was named.
    pub fn from_store(&self) -> Option<&str> {
        self.from.as_deref()
    }

    pub fn records(&self) -> &[Arc<LogRecord>] {
        &self.records
    }

    /// Records below this number are as a checkpoint has them.
    pub fn begins(&self) -> u64 {
        self.begins
    }

    pub fn line(&self) -> &Line {
        &self.line
    }

    /// The newest durable position and the source's clock there.
    pub fn end(&self) -> (Lsn, i64) {
        (self.line.end, self.line.times.last().map_or(0, |t| t.upto_us))
    }

    /// The position that `when` means. Whether it can be restored to is [`Self::require`]'s to say.
    ///
    /// # Errors
    /// `NotFound`: no such restore point or backup. `OutsideWindow`: not durable yet (code `not_durable`), or ambiguous
    /// because the source's clock stepped back (code `ambiguous_time`).
    pub async fn resolve(&self, when: &When) -> Result<Target> {
        let asked = when.to_string();
        match when {
            When::Latest => {
                let (lsn, time_us) = self.end();
                Ok(Target { asked, lsn, time_us })
            }
            When::Lsn(lsn) => {
                if *lsn > self.line.end {
                    return Err(self.not_durable(&asked));
                }
                Ok(Target { asked, lsn: *lsn, time_us: self.commit_time(*lsn).await? })
            }
            When::Name(name) => {
                let found: Vec<_> = self.facts.restore_points.iter().filter(|p| p.0 == *name).collect();
                match found.as_slice() {
                    [] => Err(self.no_such_point(name)),
                    [(_, lsn, time_us)] => Ok(Target { asked, lsn: *lsn, time_us: *time_us }),
                    several => Err(Error::new(
                        Kind::Refused,
                        format!(
                            "restore point '{name}' exists more than once, at {}",
                            several.iter().map(|p| p.1.to_string()).collect::<Vec<_>>().join(" and ")
                        ),
                    )
                    .hint("name the LSN of the one that is meant")),
                }
            }
            When::Undo(id) => {
                // Every commit that ended before its own.
                let lsn = Lsn(self.restored(*id)?.at.0.saturating_sub(1));
                Ok(Target { asked, lsn, time_us: self.commit_time(lsn).await? })
            }
            When::Backup(id) => {
                let found = self.line.bases.iter().find(|b| {
                    let base = b.base();
                    base.job == *id || base.fulls.iter().any(|f| f.object == *id)
                });
                let fulls = self.catalogs.keys().flat_map(|t| self.fulls(*t));
                if let Some(f) = fulls.into_iter().find(|f| f.id == *id) {
                    return Ok(Target { asked, lsn: f.point_lsn, time_us: f.point_time_us });
                }
                let incrementals = self.catalogs.keys().flat_map(|t| self.incrementals(*t));
                if let Some(i) = incrementals.into_iter().find(|i| i.id == *id) {
                    return Ok(Target { asked, lsn: i.to_lsn, time_us: i.to_time_us });
                }
                let base = found.ok_or_else(|| self.no_such_backup(*id))?;
                let lsn = base.base().cut_lsn;
                Ok(Target { asked, lsn, time_us: self.commit_time(lsn).await? })
            }
            When::Time(t) => match self.full_at_time(*t) {
                Some(f) => Ok(Target { asked, lsn: f.point_lsn, time_us: *t }),
                None => self.resolve_time(*t, asked).await,
            },
        }
    }

    /// The first point of this name whose commit is after a position.
    pub fn restore_point_from(&self, name: &str, from: Lsn) -> Option<Target> {
        let named = self.facts.restore_points.iter().filter(|p| p.0 == name && p.1 > from);
        named.min_by_key(|p| p.1).map(|(name, lsn, time_us)| Target {
            asked: When::Name(name.clone()).to_string(),
            lsn: *lsn,
            time_us: *time_us,
        })
    }

    /// The prefix before the first commit later than `t`.
    async fn resolve_time(&self, t: i64, asked: String) -> Result<Target> {
        let ships = &self.line.ships;
        let mut later = None;
        for (i, s) in ships.iter().enumerate().filter(|(_, s)| s.ship().max_commit_us > t) {
            let Some(entries) = self.entries(s).await? else {
                let target = Target { asked, lsn: s.record.from_lsn, time_us: t };
                return Err(self.below_floor(&target, self.only_tenant()));
            };
            if let Some(at) = entries.iter().position(|e| e.commit_us > t) {
                later = Some((i, at, entries));
                break;
            }
        }
        let Some((i, at, entries)) = later else {
            if self.line.times.iter().any(|r| r.upto_us >= t) {
                return Ok(Target { asked, lsn: self.line.end, time_us: t });
            }
            return Err(self.not_durable(&asked));
        };
        let first_later = entries[at];
        let lsn = match at.checked_sub(1) {
            Some(before) => entries[before].end_lsn,
            None => ships[i].record.from_lsn,
        };
        // A commit behind it that is not later than `t`: the clock went back.
        let mut highest = first_later.commit_us;
        let mut rest = entries[at + 1..].to_vec();
        let mut next = i + 1;
        loop {
            for e in &rest {
                if e.commit_us <= t && highest - e.commit_us > CLOCK_STEP_US {
                    return Err(Error::new(
                        Kind::OutsideWindow,
                        format!(
                            "{} is ambiguous: the source's clock stepped back by {:.1} s, between {} and {}",
                            rfc3339(t),
                            (highest - e.commit_us) as f64 / 1e6,
                            first_later.end_lsn,
                            e.end_lsn
                        ),
                    )
                    .code("ambiguous_time")
                    .hint(format!(
                        "say the LSN: {lsn} is before the first commit that was later, {} after the step",
                        e.end_lsn
                    ))
                    .window(self.windows(None)));
                }
                highest = highest.max(e.commit_us);
            }
            let Some(s) = ships.get(next) else { break };
            let ship = s.ship();
            let suspect = match ship.min_commit_us {
                Some(min) => min <= t,
                None => ship.first_commit_us <= t || ship.last_commit_us <= t,
            };
            rest = match suspect {
                // Whether the clock stepped back there, nobody knows any more.
                true => self.entries(s).await?.ok_or_else(|| {
                    let target = Target { asked: asked.clone(), lsn, time_us: t };
                    self.below_floor(&target, self.only_tenant())
                })?,
                false => Vec::new(),
            };
            if !suspect {
                highest = highest.max(ship.max_commit_us);
            }
            next += 1;
        }
        // Between the last commit that counts and the first that does not, all positions are the same.
        let floor = self.only_tenant().and_then(|tenant| self.floor(tenant));
        let lsn = floor.filter(|f| lsn < *f && *f < first_later.end_lsn).unwrap_or(lsn);
        Ok(Target { asked, lsn, time_us: t })
    }

    /// The restore in place with this id.
    ///
    /// # Errors
    /// `NotFound`: it is not durable yet, or there was none.
    pub fn restored(&self, id: Uuid) -> Result<&Restored> {
        self.facts.restores.iter().find(|r| r.id == id).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("no restore with the undo id {id} is durable in the repository"))
                .hint("a restore in place prints its id; just after it, add --wait 60s")
        })
    }

    /// The transactions of a ship that count; `None`: retention removed the list of them.
    async fn entries(&self, s: &ShipAt) -> Result<Option<Vec<crate::repository::model::TxnEntry>>> {
        if s.ship().joined {
            return Ok(None);
        }
        let Some(common) = &s.ship().common else { return Ok(Some(Vec::new())) };
        if catalog::floor::is_index_only(&s.record) && self.commons.is_some_and(|f| f.covers(s.record.n, common)) {
            return Ok(None);
        }
        let mut entries = facts::index(&self.repo, common, self.from_store()).await?.entries;
        entries.retain(|e| self.line.keeps(s, e.end_lsn));
        Ok(Some(entries))
    }

    /// Where the first transaction ends that a snapshot does not see. `xmin`: it sees every one below.
    pub async fn first_unseen(&self, xmin: u64, sees: &(dyn Fn(u64) -> bool + Sync)) -> Result<Option<Lsn>> {
        for s in self.line.ships.iter().filter(|s| s.ship().max_xid >= xmin) {
            let entries = self.entries(s).await?.ok_or_else(|| {
                Error::new(
                    Kind::OutsideWindow,
                    format!(
                        "a snapshot that is older than {} cannot be compared with the repository",
                        s.record.upto_lsn
                    ),
                )
                .hint("a transaction is open for longer than retention keeps changes: end it")
            })?;
            if let Some(e) = entries.iter().find(|e| !sees(e.xid)) {
                return Ok(Some(e.end_lsn));
            }
        }
        Ok(None)
    }

    /// The commit time of the last transaction at or before a position.
    async fn commit_time(&self, at: Lsn) -> Result<i64> {
        for s in self.line.ships.iter().rev().filter(|s| s.record.from_lsn < at) {
            if s.record.upto_lsn <= at && s.limit == Lsn::MAX && s.ship().txns > 0 {
                return Ok(s.ship().last_commit_us);
            }
            match self.entries(s).await? {
                Some(entries) => {
                    if let Some(e) = entries.iter().rev().find(|e| e.end_lsn <= at) {
                        return Ok(e.commit_us);
                    }
                }
                None => break,
            }
        }
        // Below the floors a full may be all that there is.
        let full = self.catalogs.keys().flat_map(|t| self.fulls(*t)).find(|f| f.point_lsn == at);
        Ok(full.map_or_else(|| self.line.time_before(at), |f| f.point_time_us))
    }

    /// The spans, both ends in, in which a tenant's (`None`: anybody's) rows were archived and kept.
    fn kept(&self, tenant: Option<Uuid>) -> Vec<(Lsn, Lsn)> {
        let floor = tenant.and_then(|t| self.floor(t)).unwrap_or_default();
        let open = self.line.open(&self.facts, tenant).into_iter();
        open.map(|(from, to)| (from.max(floor), to)).filter(|(from, to)| from <= to).collect()
    }

    /// What a tenant (`None`: any) can be restored to.
    pub fn windows(&self, tenant: Option<Uuid>) -> Vec<WindowSpan> {
        let damaged = tenant.map(|t| self.damaged(t)).unwrap_or_default();
        damage::without(self.kept(tenant), &damaged)
            .into_iter()
            .map(|(from, to)| {
                let to_us = self.line.time_before(to);
                WindowSpan {
                    from_lsn: from,
                    to_lsn: to,
                    from_time: rfc3339(self.line.time_at(from).min(to_us)),
                    to_time: rfc3339(to_us),
                }
            })
            .collect()
    }

    /// Spans within the line that cannot be restored to; those before the first base are no gap.
    pub fn gaps(&self, tenant: Option<Uuid>) -> Vec<Closed> {
        let Some(first) = self.line.open(&self.facts, tenant).first().map(|w| w.0) else { return Vec::new() };
        let first = first.max(tenant.and_then(|t| self.floor(t)).unwrap_or_default());
        let mut gaps = self.line.all_closed(&self.facts, tenant);
        for d in tenant.map(|t| self.damaged(t)).unwrap_or_default() {
            // Where rows were never archived, that is why.
            let rest = damage::without(vec![(d.from, Lsn(d.to.0 - 1))], &gaps);
            gaps.extend(rest.into_iter().map(|(from, to)| Closed {
                from,
                to: Lsn(to.0 + 1),
                reason: d.reason.clone(),
            }));
        }
        gaps.sort_by_key(|c| c.from);
        gaps.retain(|c| c.to > first && c.from <= self.line.end);
        for g in &mut gaps {
            g.from = g.from.max(first);
            g.to = g.to.min(self.line.end);
        }
        gaps
    }

    /// The tables that are covered at the target, concern the tenant and are wanted, or an error with the tenant's window.
    pub fn require(&self, target: &Target, tenant: Uuid, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<TableAt>> {
        let outside = |message: String| {
            Error::new(Kind::OutsideWindow, message)
                .window(self.windows(Some(tenant)))
                .hint("choose a point inside the recovery window (`coffer list`)")
        };
        if self.line.bases.is_empty() {
            return Err(outside("there is no base yet: nothing can be restored".into())
                .hint("`coffer run` takes a base of every covered table by itself; see `coffer status`"));
        }
        if target.lsn > self.line.end {
            return Err(self.not_durable(&target.asked));
        }
        if self.floor(tenant).is_some_and(|floor| target.lsn < floor)
            && !self.fulls(tenant).iter().any(|f| f.point_lsn == target.lsn)
        {
            return Err(self.below_floor(target, Some(tenant)));
        }
        let tables = self.line.tables_at(target.lsn, &self.facts, Some(tenant), wanted).map_err(|unknown| {
            let (_, first) = &unknown[0];
            let more =
                if unknown.len() > 1 { format!(" and {} more tables", unknown.len() - 1) } else { String::new() };
            outside(format!("{} ({}) cannot be restored to: {}{more}", target.asked, target.lsn, first.reason))
        })?;
        if tables.is_empty() {
            let any =
                self.line.tables_at(target.lsn, &self.facts, Some(tenant), &|_| true).is_ok_and(|t| !t.is_empty());
            if any {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("no covered table at {} matches --table", target.asked),
                )
                .hint("write it as schema.name"));
            }
            // Every table that could have rows of the tenant was dropped or left out before: there is nothing of it then.
            if self.kept(Some(tenant)).iter().any(|(from, to)| *from <= target.lsn && target.lsn <= *to) {
                return Ok(tables);
            }
            return Err(outside(format!("{} ({}) is before the first base, or in a gap", target.asked, target.lsn)));
        }
        Ok(tables)
    }

    /// What the tenant's rows in these tables at the target are merged from.
    ///
    /// The newest synthetic full up to the target that holds a table stands for what is older of it, and incrementals up to
    /// the target for the changesets of their spans, if the tenant's catalog was taken in.
    pub async fn inputs(&self, tenant: Uuid, target: Lsn, tables: Vec<TableAt>) -> Result<Inputs> {
        self.inputs_from(tenant, target, target, tables).await
    }

    /// The same from a full and incrementals at or before `begin`.
    pub async fn inputs_from(&self, tenant: Uuid, begin: Lsn, target: Lsn, known: Vec<TableAt>) -> Result<Inputs> {
        let Some((mut inputs, from_it)) = self.sources(tenant, begin, target, known) else {
            // What was removed is never left out in silence.
            let target = Target { asked: target.to_string(), lsn: target, time_us: 0 };
            return Err(self.below_floor(&target, Some(tenant)));
        };
        if let Some(f) = &inputs.full
            && let Some(m) = &f.manifest
        {
            inputs.parts = manifest::read(&self.repo, m, &f.objects, self.from_store()).await?;
            check_rows(f, m, &inputs.parts)?;
            inputs.parts.retain(|p| from_it.contains(&p.relid));
        }
        Ok(inputs)
    }

    /// The same without the parts of the full, and the tables that are read from these. `None`: something of it was removed.
    fn sources(
        &self,
        tenant: Uuid,
        begin: Lsn,
        target: Lsn,
        mut known: Vec<TableAt>,
    ) -> Option<(Inputs, BTreeSet<u32>)> {
        let definitions: Vec<usize> = known.iter().filter_map(|t| t.base).collect();
        // What another tenant alone has rows of is in none of this one's fulls.
        known.retain(|t| self.line.concerns(t.relid, &self.facts, Some(tenant)));
        // Whether the tenant's part of the base that a table is read from was removed.
        let lost = |t: &TableAt| {
            let Some(b) = t.base.map(|b| &self.line.bases[b]) else { return false };
            b.base().fulls.iter().any(|o| o.tenant == tenant && self.is_gone(b.record.n, o))
        };
        let follows = |f: &&FullEntry| {
            f.point_lsn <= begin && self.is_sound(tenant, f.id) && !self.has_hole(tenant, f.point_lsn, target)
        };
        // The tables with those that are read from the full, and which these are.
        let from = |f: &FullEntry| {
            // A base that was recorded after the full was made is not in it, wherever its cut is.
            let knows = |t: &TableAt| t.base.is_none_or(|b| self.line.bases[b].record.n <= f.log_n);
            // Of a base at the same point the full takes the place when it is gone.
            let older = |t: &TableAt| t.cut < f.point_lsn || t.cut == f.point_lsn && lost(t);
            let (mut all, mut from_it) = (known.clone(), BTreeSet::new());
            for t in all.iter_mut().filter(|t| older(t) && knows(t)) {
                let is_in = f.tables.iter().any(|h| h.relid == t.relid);
                if is_in || self.is_left_out(tenant, f, t.relid) {
                    (t.cut, t.base) = (f.point_lsn, None);
                }
                if is_in {
                    from_it.insert(t.relid);
                }
            }
            (all, from_it)
        };
        let least = |tables: &[TableAt]| tables.iter().map(|t| t.cut).min().unwrap_or(target);
        let is_there = |tables: &[TableAt]| !tables.iter().any(lost) && !self.has_hole(tenant, least(tables), target);
        // The newest that nothing is missing beside.
        let mut usable = self.fulls(tenant).into_iter().rev().filter(follows);
        let full = usable.find(|f| is_there(&from(f).0)).cloned();
        let (tables, from_it) = full.as_ref().map_or_else(|| (known.clone(), BTreeSet::new()), from);
        let fulls = self.line.fulls(&tables, tenant);
        if !is_there(&tables) {
            return None;
        }
        let least = least(&tables);
        let mut ships = Vec::new();
        for s in &self.line.ships {
            // At the cut itself nothing is added, were it inside of a ship.
            if s.record.upto_lsn.min(s.limit) <= least || s.record.from_lsn >= target || least >= target {
                continue;
            }
            let ship = s.ship();
            let changeset = ship.objects.iter().find(|o| o.tenant == tenant && o.lsn_end > least).cloned();
            let common = ship.common.clone().filter(|_| ship.eventful != Some(false));
            if changeset.is_some() || common.is_some() {
                let input = ShipInput { common, changeset, limit: s.limit.min(target) };
                ships.push(Placed { from: s.record.from_lsn, to: s.record.upto_lsn.min(s.limit), input });
            }
        }
        let ships = self.stand_in(tenant, ships, begin);
        // A table's own base may be the only one there is: its schema is younger than some of its tables' cuts.
        let of_tables = || definitions.iter().map(|b| self.line.bases[*b].base());
        let (schema, schema_warning) = self.schema_at(target, &mut of_tables().map(|b| b.schema.as_ref()));
        let inputs = Inputs { target, tables, fulls, parts: Vec::new(), full, ships, schema, schema_warning };
        Some((inputs, from_it))
    }

    /// Where the sequences stood at the target: of each the newest state that was read at or before it, by bases, by
    /// ships, and by the restore point that the target is. At the log's end everything counts that was read.
    pub async fn sequences(&self, target: &Target) -> Result<Vec<SequenceState>> {
        let at_end = target.lsn == self.line.end;
        let known = |s: &ShipAt, lsn: Lsn| self.line.keeps(s, lsn) && (lsn <= target.lsn || at_end);
        let of_bases = self.line.bases.iter().map(|b| b.base()).filter(|b| b.cut_lsn <= target.lsn);
        let mut read: Vec<(Lsn, Vec<SequenceState>)> = of_bases.map(|b| (b.cut_lsn, b.sequences.clone())).collect();
        for s in &self.line.ships {
            let of_ship = s.ship().sequences.iter().filter(|r| known(s, r.lsn));
            read.extend(of_ship.map(|r| (r.lsn, r.states.clone())));
        }
        let holds = |s: &&ShipAt| s.record.from_lsn < target.lsn && target.lsn <= s.record.upto_lsn;
        for s in self.line.ships.iter().filter(holds) {
            let marked = facts::sequences(&self.repo, s.ship(), self.from_store()).await?;
            read.extend(marked.into_iter().filter(|(at, _)| known(s, *at)));
        }
        // Stable: what a base read for its cut gives way to what was read there later.
        read.sort_by_key(|(at, _)| *at);
        let mut newest = BTreeMap::new();
        for s in read.into_iter().flat_map(|(_, states)| states) {
            newest.insert(s.name.clone(), s);
        }
        Ok(newest.into_values().collect())
    }

    /// The tenant's roles: the newest that were read at or before the target; at the log's end, the newest of all.
    pub fn roles(&self, tenant: Uuid, target: &Target) -> Option<&ObjectRef> {
        let at_end = target.lsn == self.line.end;
        let of_bases = self.line.bases.iter().flat_map(|b| &b.base().roles);
        of_bases.filter(|o| o.tenant == tenant && (at_end || o.lsn_end <= target.lsn)).max_by_key(|o| o.lsn_end)
    }

    /// Readings of large objects and what they have of the tenant: the newest at or before the target, then the next one.
    pub fn large_objects(&self, tenant: Uuid, target: &Target) -> Vec<(LargeObjectsRead, Vec<ObjectRef>)> {
        let readings =
            || self.line.bases.iter().map(|b| b.base()).filter_map(|b| Some((b.large_objects_read.as_ref()?, b)));
        let before = readings().filter(|(r, _)| r.lsn <= target.lsn).max_by_key(|(r, _)| r.lsn);
        let after = readings().filter(|(r, _)| r.lsn > target.lsn).min_by_key(|(r, _)| r.lsn);
        let of_tenant = |b: &Base| b.large_objects.iter().filter(|o| o.tenant == tenant).cloned().collect();
        before.into_iter().chain(after).map(|(r, b)| ((**r).clone(), of_tenant(b))).collect()
    }

    /// The settings of the database itself, as the newest base up to the target found them.
    pub fn database_settings(&self, target: &Target) -> &[String] {
        self.database(target.lsn).map_or(&[], |d| &d.settings)
    }

    /// The definitions at a position: the newest that were archived up to it or, when they changed since, the next ones,
    /// if nothing changed between. `others` are better than none.
    fn schema_at(
        &self,
        target: Lsn,
        others: &mut dyn Iterator<Item = Option<&ObjectRef>>,
    ) -> (Option<ObjectRef>, Option<String>) {
        let archived =
            || self.line.bases.iter().map(|b| b.base()).filter_map(|b| Some((b.cut_lsn, b.schema.as_ref()?)));
        let before = archived().filter(|(cut, _)| *cut <= target).max_by_key(|(cut, _)| *cut);
        let changed = self.facts.ddl.iter().filter(|d| **d <= target).max().copied().unwrap_or_default();
        if let Some((cut, s)) = before
            && cut >= changed
        {
            return (Some(s.clone()), None);
        }
        let after = archived().filter(|(cut, _)| *cut > target).min_by_key(|(cut, _)| *cut);
        if let Some((cut, s)) = after
            && !self.facts.ddl.iter().any(|d| *d > target && *d <= cut)
        {
            return (Some(s.clone()), None);
        }
        let some = before.map(|(_, s)| s.clone()).or_else(|| others.flatten().next().cloned());
        let warning = format!(
            "definitions of covered tables changed at {changed}, and as they were at {target} they are not archived"
        );
        (some, Some(warning))
    }

    /// Whether definitions changed at or before the target and were not archived since: they may be on their way.
    pub fn definitions_pending(&self, target: &Target) -> bool {
        let changes = self.facts.ddl.iter().chain(&self.facts.definitions);
        let changed = changes.filter(|d| **d <= target.lsn).max().copied().unwrap_or_default();
        let mut archived = self.line.bases.iter().map(|b| b.base()).filter(|b| b.schema.is_some()).peekable();
        archived.peek().is_some() && !archived.any(|b| b.cut_lsn >= changed)
    }

    /// Tables whose rows are known at the target; others are left out.
    pub fn known(&self, target: &Target) -> Vec<TableAt> {
        match self.line.tables_at(target.lsn, &self.facts, None, &|_| true) {
            Ok(t) => t,
            Err(unknown) => {
                let closed: BTreeSet<u32> = unknown.into_iter().map(|(relid, _)| relid).collect();
                self.line.tables_except(target.lsn, &self.facts, &closed)
            }
        }
    }

    /// The tables that are covered at the log's end, but those that the tenant had no row in.
    pub fn holdings(&self, tenant: Uuid) -> Vec<Holding> {
        let (lsn, time_us) = self.end();
        let end = Target { asked: When::Latest.to_string(), lsn, time_us };
        let mut out = Vec::new();
        for t in self.known(&end) {
            let Some(base) = self.line.bases.iter().rev().find(|b| b.cut(t.relid).is_some()) else { continue };
            let base = base.base();
            let noted = base.fulls.is_empty() || !base.holds.is_empty();
            let relid = t.relid.to_string();
            let rows = noted.then(|| base.holds.get(&tenant).and_then(|h| h.get(&relid)).copied().unwrap_or(0));
            if rows != Some(0) {
                out.push(Holding { relation: t.name, class: base.classes.get(&relid).cloned(), rows });
            }
        }
        out.sort_by(|a, b| (&a.class, &a.relation).cmp(&(&b.class, &b.relation)));
        out
    }

    /// The database's encoding and settings, as the newest base up to the target found them.
    pub fn database(&self, target: Lsn) -> Option<&DatabaseLocale> {
        let of_bases = self.line.bases.iter().map(|b| b.base()).filter(|b| b.cut_lsn <= target);
        of_bases.filter_map(|b| Some((b.cut_lsn, b.database.as_ref()?))).max_by_key(|(cut, _)| *cut).map(|(_, d)| d)
    }

    /// Tables whose rows at the target are not known, each with the reason, but those in which only others than the tenant
    /// were ever found to have rows.
    pub fn unknown(&self, target: &Target, tenant: Uuid) -> Vec<(String, String)> {
        let unknown = self.line.tables_at(target.lsn, &self.facts, Some(tenant), &|_| true).err().unwrap_or_default();
        let others = |relid: u32| {
            let relid = relid.to_string();
            let holders =
                || self.line.bases.iter().flat_map(|b| &b.base().holds).filter(|(_, h)| h.contains_key(&relid));
            holders().next().is_some() && !holders().any(|(who, _)| *who == tenant)
        };
        let named = |relid: u32| self.table_name(relid).map_or_else(|| format!("OID {relid}"), str::to_owned);
        unknown.into_iter().filter(|(r, _)| !others(*r)).map(|(r, c)| (named(r), c.reason.to_string())).collect()
    }

    /// What a table is called, as far as the log says.
    pub fn table_name(&self, relid: u32) -> Option<&str> {
        self.line.name(relid, &self.facts)
    }

    /// The class of a table, as the newest base that notes it has it.
    pub fn class(&self, relid: u32) -> Option<&str> {
        let relid = relid.to_string();
        self.line.bases.iter().rev().find_map(|b| b.base().classes.get(&relid)).map(String::as_str)
    }

    /// What was read from the database for a tenant, oldest first: its part of each base.
    pub fn bases(&self, tenant: Uuid) -> Vec<Backup> {
        let floor = self.floor(tenant).unwrap_or_default();
        self.line
            .bases
            .iter()
            // One without tables brings definitions only.
            .filter(|b| !b.base().tables.is_empty() && b.base().cut_lsn >= floor)
            .map(|b| {
                let base = b.base();
                let full = base.fulls.iter().find(|f| f.tenant == tenant);
                Backup {
                    id: full.map_or(base.job, |f| f.object),
                    kind: "full",
                    trigger: "base".to_owned(),
                    reason: None,
                    verified_us: None,
                    point: base.cut_lsn,
                    time_us: self.line.time_at(base.cut_lsn),
                    bytes: full.map_or(0, |f| f.bytes),
                    rows: full.map_or(0, |f| f.rows),
                    tables: base.tables.len(),
                    object: full.cloned(),
                }
            })
            .collect()
    }

    /// The tenant's backups, oldest first.
    pub fn backups(&self, tenant: Uuid) -> Vec<Backup> {
        let mut all = self.bases(tenant);
        all.extend(self.fulls(tenant).into_iter().map(|f| Backup {
            id: f.id,
            kind: f.kind(),
            trigger: f.trigger.clone(),
            reason: f.reason.clone(),
            point: f.point_lsn,
            time_us: f.point_time_us,
            bytes: f.bytes,
            rows: f.rows,
            tables: f.tables.len(),
            verified_us: f.read_back_us,
            object: None,
        }));
        // Below the floor nothing is restored from them.
        let floor = self.floor(tenant).unwrap_or_default();
        all.extend(self.incrementals(tenant).into_iter().filter(|i| i.to_lsn >= floor).map(|i| Backup {
            id: i.id,
            kind: "incremental",
            trigger: "incremental".to_owned(),
            reason: None,
            point: i.to_lsn,
            time_us: i.to_time_us,
            bytes: i.bytes,
            rows: i.rows,
            tables: 0,
            verified_us: i.read_back_us,
            object: i.object.clone(),
        }));
        all.sort_by_key(|b| b.point);
        all
    }

    fn not_durable(&self, asked: &str) -> Error {
        let (lsn, time) = self.end();
        Error::new(
            Kind::OutsideWindow,
            format!("{asked} is not durable yet: the repository holds everything up to {lsn} ({})", rfc3339(time)),
        )
        .code("not_durable")
        .window(self.windows(None))
        .hint("add --wait 60s to wait for it")
    }

    fn no_such_backup(&self, id: Uuid) -> Error {
        let removed = self.catalogs.iter().find(|(_, c)| c.gone.contains(&id));
        match removed {
            Some((tenant, _)) => {
                Error::new(Kind::OutsideWindow, format!("backup {id} was removed: retention keeps it no more"))
                    .code("removed")
                    .window(self.windows(Some(*tenant)))
                    .hint("`coffer list` shows the backups that there are")
            }
            None => Error::new(Kind::NotFound, format!("there is no backup {id}")).hint("see `coffer list`"),
        }
    }

    fn no_such_point(&self, name: &str) -> Error {
        let mut known: Vec<&str> = self.facts.restore_points.iter().rev().map(|p| p.0.as_str()).take(10).collect();
        known.dedup();
        let hint = if known.is_empty() {
            "there is none; SELECT coffer.restore_point('name') makes one".to_owned()
        } else {
            format!("the newest are: {}", known.join(", "))
        };
        Error::new(Kind::NotFound, format!("there is no durable restore point '{name}'")).hint(hint)
    }
}

/// A full's manifest has the rows of each table that its entry says it has.
fn check_rows(f: &FullEntry, m: &ObjectRef, parts: &[PartAt]) -> Result<()> {
    let mut by_table: BTreeMap<u32, u64> = BTreeMap::new();
    for p in parts {
        *by_table.entry(p.relid).or_default() += p.rows;
    }
    for t in &f.tables {
        let found = by_table.get(&t.relid).copied().unwrap_or(0);
        if found != t.rows {
            let what = format!("object {}: it has {found} rows of {}, full {} has {}", m.path, t.name, f.id, t.rows);
            return Err(Error::new(Kind::Verification, what).code("malformed"));
        }
    }
    Ok(())
}
