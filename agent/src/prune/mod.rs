//! Removing what retention keeps no more: plan, record, wait, delete, record.
//!
//! Invariants:
//! - nothing is deleted that a removal record in the tenant's catalog does not name exactly, and not before the grace
//!   that the record states is over;
//! - right before it is deleted, an object is looked up once more in everything that counts: what the log, or a backup
//!   that stands, names is passed over, whoever recorded it since;
//! - a process that dies at any moment leaves a record that the next one carries out, or objects that nobody names;
//! - what one tenant's catalog says stops nobody else's removals.
//!
//! An object of a tenant is removed by a record of that tenant's catalog; what concerns every tenant, by one of the
//! reserved tenant `shared`.

mod clocks;
#[cfg(test)]
mod floor_model;
#[cfg(test)]
mod floor_tests;
mod log;
mod orphans;
pub mod report;
mod tenant;
#[cfg(test)]
mod tests;
mod watch;

pub use report::{Orphan, Report, TenantReport};
pub use watch::watch;

use crate::catalog::{self, Floor, Floors};
use crate::dsn::Dsn;
use crate::error::{Kind, Result};
use crate::history::{Cut, History};
use crate::keyring::{Keyring, TenantEntry};
use crate::lease::{self, Held, Purpose};
use crate::repository::{Checkpoint, LogRecord, ObjectRef, Repository};
use crate::retention::Policy;
use crate::tenant::Tenant;
use coffer_wire::{Lsn, TenantKind};
use futures::{StreamExt, stream};
use log::Logged;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tenant::PRUNED_SINCE;
use tokio::sync::OnceCell;
use uuid::Uuid;

/// Tenants looked at at a time.
const PARALLEL: usize = 8;

/// What is pruned, and how.
pub struct Pruner {
    pub repo: Arc<Repository>,
    pub keyring: Arc<Keyring>,
    /// The source's name and uid.
    pub source: (String, Uuid),
    /// To compare clocks with; `None`: the source is no more.
    pub dsn: Option<Dsn>,
    /// For tenants without one of their own.
    pub policy: Policy,
    /// Between a removal's record and its deletions.
    pub grace: Duration,
    /// Only this tenant.
    pub tenant: Option<TenantEntry>,
    /// Whether anything is done.
    pub confirm: bool,
    /// Checkpoints of the log end at multiples of it: at the end of a pack.
    pub checkpoint_step: u64,
}

/// Tables and where their newest bases were cut.
type Cuts = Arc<Vec<Cut>>;

/// What holds for all tenants of a source, read before any of them is looked at.
struct Survey {
    now_us: i64,
    log: Logged,
    history: History,
    /// Of the points of fulls, which many tenants have in common: see [`History::cuts_at`].
    cuts: Mutex<HashMap<Lsn, Cuts>>,
    /// As they were recorded when the run began; of the tenant alone when only one is looked at.
    floors: Floors,
    /// Objects that removal records name and that may be there still.
    pending: HashSet<String>,
    /// Time and point of the oldest full that any tenant has; `None`: some tenant needs everything that there is.
    oldest: Option<(i64, Lsn)>,
    restores: Vec<Held>,
    /// Since when somebody writes objects that are not recorded yet.
    writing_since_us: Option<i64>,
}

impl Pruner {
    /// Plans and, if it is confirmed, acts.
    ///
    /// # Errors
    /// `Refused`: clocks differ too much. `Unreachable`: a required store or the source does not answer. What goes wrong
    /// with one tenant stands in its report.
    pub async fn run(&self) -> Result<Report> {
        if self.confirm {
            clocks::require_equal(&self.repo, self.dsn.as_ref()).await?;
        }
        self.run_unchecked().await
    }

    /// The same whatever the clocks say.
    async fn run_unchecked(&self) -> Result<Report> {
        let mut report = Report::new(&self.source.0, self.confirm);
        report.warnings.extend(self.repo.stores_away().into_iter().map(|s| {
            format!("store {s} does not answer: what is removed stays there until it does, and a later run removes it")
        }));
        let tenants = self.tenants().await?;
        let survey = self.survey(&tenants).await?;
        let again = OnceCell::new();
        let again = &again;
        let mut orphans = self.orphans(&survey, &tenants).await?;
        report.orphans = orphans.values().flatten().cloned().collect();
        report.orphans.sort_by(|a, b| a.path.cmp(&b.path));
        let shared = self.shared();
        let work: Vec<(Uuid, Vec<Orphan>)> = tenants
            .iter()
            .filter(|uid| **uid != shared)
            .map(|uid| (*uid, orphans.remove(uid).unwrap_or_default()))
            .collect();
        let survey = &survey;
        let each: Vec<_> =
            work.into_iter().map(|(uid, orphans)| self.one((survey, again), uid, orphans, None)).collect();
        let mut done = stream::iter(each).buffer_unordered(PARALLEL);
        while let Some(tenant) = done.next().await {
            report.tenants.push(tenant);
        }
        drop(done);
        // Last, because what concerns all goes below the floors of all.
        if tenants.contains(&shared) {
            // What is known now holds for what concerns all: floors may have been raised by it.
            let survey = again.get().unwrap_or(survey);
            let commons = self.commons_floor(survey, &report.tenants);
            let orphans = orphans.remove(&shared).unwrap_or_default();
            report.tenants.push(self.one((survey, again), shared, orphans, commons).await);
        }
        report.tenants.sort_by(|a, b| (&a.tenant, a.uid).cmp(&(&b.tenant, b.uid)));
        if self.confirm && self.tenant.is_none() {
            // By the floors that were recorded before: what they cover, every reader knows to be gone.
            match self.shorten_log(survey).await {
                Ok(()) => {}
                Err(e) => report.warnings.push(format!("the commit log keeps its old records for now: {e}")),
            }
        }
        if self.confirm {
            lease::sweep(&self.repo, self.source.1).await;
        }
        Ok(report)
    }

    /// Prunes one. Where somebody else was faster and knew more, with what is known by now, which is read once for all.
    async fn one(
        &self,
        (survey, again): (&Survey, &OnceCell<Survey>),
        uid: Uuid,
        orphans: Vec<Orphan>,
        commons: Option<Floor>,
    ) -> TenantReport {
        let mut report = TenantReport::new(uid, self.keyring.by_uid(uid).map(|t| t.tenant));
        let mut done = self.tenant(survey, &orphans, commons, &mut report).await;
        if done.as_ref().is_err_and(|e| e.is_code(PRUNED_SINCE)) {
            let newer = again.get_or_try_init(|| async { self.survey(&self.tenants().await?).await }).await;
            done = match newer {
                // What the older survey took for an orphan may have a name by now: another run finds out.
                Ok(newer) => self.tenant(newer, &[], None, &mut report).await,
                Err(e) => Err(e),
            };
        }
        if let Err(e) = done {
            tracing::warn!("tenant {uid} is not pruned: {e}");
            report.error = Some(e);
        }
        report
    }

    /// Puts what the log says of the time before all floors into a checkpoint, once that is worth it.
    async fn shorten_log(&self, survey: &Survey) -> Result<()> {
        let Some(commons) = survey.floors.commons else { return Ok(()) };
        let history = &survey.history;
        let is_beyond = |r: &&Arc<LogRecord>| r.n > commons.log_n || r.upto_lsn > commons.lsn;
        let Some(beyond) = history.records().iter().find(is_beyond) else { return Ok(()) };
        let end = beyond.n - beyond.n % self.checkpoint_step;
        let is_gone = |r: &LogRecord, o: &ObjectRef| survey.floors.is_gone(r, o) && !survey.pending.contains(&o.path);
        if let Some(c) = Checkpoint::of(history.records(), history.begins(), end, &is_gone) {
            let removed = self.repo.begin_log_with(self.source.1, &c).await?;
            tracing::info!(
                "the commit log begins with a checkpoint: {} records stand for the first {end}, {removed} objects removed",
                c.records.len()
            );
        }
        Ok(())
    }

    async fn survey(&self, tenants: &[Uuid]) -> Result<Survey> {
        let source = self.source.1;
        // Leases first: a restore that begins after this reads a catalog that is at least as new as ours.
        let held = lease::live(&self.repo, source).await?;
        let history = History::load(&self.repo, &self.keyring, source, None).await?;
        let mut survey = Survey {
            now_us: self.repo.clock().now_us(),
            log: Logged::new(history.records()),
            history,
            cuts: Mutex::default(),
            floors: Floors::default(),
            pending: HashSet::new(),
            oldest: None,
            restores: held.iter().filter(|h| h.purpose == Purpose::Restore).cloned().collect(),
            writing_since_us: held.iter().filter(|h| h.purpose == Purpose::Write).map(|h| h.since_us).min(),
        };
        self.read_floors(&mut survey, tenants).await;
        Ok(survey)
    }

    /// Whose catalogs are looked at.
    async fn tenants(&self) -> Result<Vec<Uuid>> {
        if let Some(t) = &self.tenant {
            return Ok(vec![t.uid]);
        }
        let mut uids: Vec<Uuid> = self.keyring.tenants(self.source.1).into_iter().map(|t| t.uid).collect();
        uids.extend(catalog::tenants(&self.repo, self.source.1, None).await?.into_keys());
        uids.push(self.shared());
        uids.sort_unstable();
        uids.dedup();
        Ok(uids)
    }

    /// Who stands for what concerns every tenant.
    fn shared(&self) -> Uuid {
        self.keyring.tenant_uid(self.source.1, &Tenant::reserved(TenantKind::Shared))
    }

    async fn orphans(&self, survey: &Survey, tenants: &[Uuid]) -> Result<BTreeMap<Uuid, Vec<Orphan>>> {
        let mut found: BTreeMap<Uuid, Vec<Orphan>> = BTreeMap::new();
        for o in orphans::find(self, survey, tenants).await? {
            found.entry(o.tenant).or_default().push(o);
        }
        Ok(found)
    }
}

impl Survey {
    fn cuts(&self, at: Lsn) -> Cuts {
        let mut all = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(at).or_insert_with(|| Arc::new(self.history.cuts_at(at))).clone()
    }

    /// The restores that may be reading a tenant's backups.
    fn restores_of(&self, tenant: Uuid) -> impl Iterator<Item = &Held> {
        self.restores.iter().filter(move |h| h.tenant.is_none_or(|t| t == tenant))
    }
}

/// Whether an error is of a store that may answer later.
fn is_passing(e: &crate::error::Error) -> bool {
    e.kind() == Kind::Unreachable
}
