//! The rows of each tenant in the repository against its live ones: by schedule, one tenant after the other, for as long
//! as the agent runs; and what such a comparison comes to, for whoever asked for it.

use super::results::{LIVE, Results, newest_check};
use super::turns::Turns;
use crate::alarms;
use crate::catalog::Catalog;
use crate::error::{Error, Kind, Result};
use crate::jobs::Mirror;
use crate::keyring::TenantEntry;
use crate::opened::{Opened, scratch};
use crate::restore::Watch;
use crate::run::AgentContext;
use crate::schedule::Schedule;
use crate::tenant::Tenant;
use crate::validation::{Validated, Validation};
use crate::verify::objects::is_finding;
use coffer_wire::TenantKind;
use futures::{StreamExt, stream};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// How often it is looked whose turn it is.
const TICK: Duration = Duration::from_secs(1);
/// How long a comparison waits for the repository to catch up with its snapshot.
const PATIENCE: Duration = Duration::from_secs(300);
/// Comparisons that could not be made, one after the other, before somebody is told.
const FAILURES: u32 = 3;
/// Catalogs read at a time.
const CATALOGS_AHEAD: usize = 8;

/// What came of a comparison.
pub enum Compared {
    Done(Validated),
    /// An object that the comparison needs is not what it was.
    Damaged(Error),
}

impl Compared {
    pub fn is_same(&self) -> bool {
        matches!(self, Self::Done(v) if v.is_same())
    }

    /// What is wrong, for the catalog: no key of a row stands there.
    pub fn note(&self) -> Option<String> {
        match self {
            Self::Damaged(e) => Some(e.to_string()),
            Self::Done(v) => {
                let skipped = v.skipped.iter().map(|(relation, why)| format!("{relation} was not compared: {why}"));
                let all: Vec<String> = v.counts().into_iter().chain(skipped).collect();
                (!all.is_empty()).then(|| all.join("; "))
            }
        }
    }

    /// The same for an alarm, with the keys.
    pub fn words(&self) -> String {
        match self {
            Self::Damaged(e) => format!("what the comparison with the live rows needs cannot be read: {e}"),
            Self::Done(v) => format!("the repository differs from the live rows: {}", v.keys()),
        }
    }
}

/// Whether a tenant's rows have a place that is theirs alone; those of reference data, and those that nobody could
/// attribute, have none.
pub fn is_comparable(tenant: &Tenant) -> bool {
    matches!(tenant.kind, TenantKind::Normal | TenantKind::Unassigned)
}

/// Compares one tenant.
///
/// # Errors
/// As [`Validation::run`], but for what is found to be damaged.
pub async fn compare(validation: &Validation<'_>, tenant: &TenantEntry) -> Result<Compared> {
    match validation.run(&tenant.tenant).await {
        Ok(v) => Ok(Compared::Done(v)),
        Err(e) if is_finding(&e) => Ok(Compared::Damaged(e)),
        Err(e) => Err(e),
    }
}

/// Compares a tenant for the running agent, and tells what was found.
pub async fn check(ctx: &AgentContext, mirror: &Mirror, tenant: &TenantEntry, watch: Watch) -> Result<Compared> {
    let opened = Opened { keyring: ctx.keyring.clone(), repo: ctx.repo.clone(), from: None };
    let validation = Validation {
        opened: &opened,
        source: (&ctx.source, ctx.source_uid),
        dsn: &ctx.dsn,
        scratch: scratch(&ctx.config)?,
        memory: ctx.memory.check,
        watch,
        patience: PATIENCE,
    };
    let compared = compare(&validation, tenant).await?;
    if let Compared::Done(v) = &compared
        && v.tables.is_empty()
        && !v.skipped.is_empty()
    {
        return Err(
            Error::new(Kind::OutsideWindow, "none of its tables has a base yet: nothing was compared").code("no_base")
        );
    }
    Results { ctx, mirror }.live(tenant, &compared).await?;
    Ok(compared)
}

/// Compares every tenant in its turn, for as long as it is polled.
pub async fn watch(ctx: Arc<AgentContext>, mirror: Arc<Mirror>) {
    let turns = match Schedule::parse(&ctx.config.schedule.validate) {
        Ok(s) => Turns::new(s),
        // The configuration was checked when it was read.
        Err(e) => return tracing::error!("nothing is compared with the live rows: {e}"),
    };
    let mut w = Watcher { ctx, mirror, turns, waits: HashMap::new(), failures: 0, began_us: None };
    loop {
        tokio::time::sleep(TICK).await;
        if !w.ctx.status.is_streaming() {
            continue;
        }
        if let Err(e) = w.learn().await {
            tracing::debug!("when tenants were last compared could not be read: {e}");
            tokio::time::sleep(TICK * 10).await;
            continue;
        }
        while let Some(tenant) = w.next() {
            w.turn(&tenant).await;
        }
    }
}

struct Watcher {
    ctx: Arc<AgentContext>,
    mirror: Arc<Mirror>,
    turns: Turns,
    /// Until when a tenant waits whose comparison could not be made.
    waits: HashMap<Uuid, i64>,
    /// Of those, one after the other.
    failures: u32,
    /// When the source's log began: who was never compared is due at the first time after it.
    began_us: Option<i64>,
}

impl Watcher {
    fn tenants(&self) -> Vec<TenantEntry> {
        let mut all = self.ctx.keyring.tenants(self.ctx.source_uid);
        all.retain(|t| is_comparable(&t.tenant));
        all
    }

    /// Reads of tenants that are not known yet when they were compared, and raises the alarms that stood.
    async fn learn(&mut self) -> Result<()> {
        if self.began_us.is_none() {
            let log = crate::repository::Log::open(&self.ctx.repo, self.ctx.source_uid, None).await?;
            self.began_us = log.records().first().map(|r| r.at_us);
        }
        let new: Vec<TenantEntry> =
            self.tenants().into_iter().filter(|t| self.ctx.status.checks.last_live(t.uid).is_none()).collect();
        let new: Vec<TenantEntry> = new.into_iter().filter(|t| !self.waits.contains_key(&t.uid)).collect();
        let each: Vec<_> = new
            .iter()
            .map(|t| {
                let (repo, source, uid) = (self.ctx.repo.clone(), self.ctx.source_uid, t.uid);
                async move { Catalog::open(&repo, source, uid, None).await }
            })
            .collect();
        let read: Vec<Result<Catalog>> = stream::iter(each).buffered(CATALOGS_AHEAD).collect().await;
        for (t, catalog) in new.into_iter().zip(read) {
            let catalog = catalog?;
            // Known from now on, if only that it waits for its first turn.
            self.waits.insert(t.uid, i64::MIN);
            let Some(last) = newest_check(catalog.state(), LIVE) else { continue };
            self.ctx.status.checks.live(t.uid, last.at_us, last.ok);
            if !last.ok {
                let who = t.tenant.to_string();
                let found = last.message.as_deref().unwrap_or("the repository differs from the live rows");
                let message = format!(
                    "tenant {who}: {found} (found at {}; `coffer verify --tenant KEY --against-live` names the keys)",
                    crate::clock::rfc3339(last.at_us)
                );
                self.ctx.alarms.raise_for(alarms::VALIDATION_DIFFERS, &self.ctx.source, &who, message);
            }
        }
        Ok(())
    }

    /// Who has been due for longest.
    fn next(&self) -> Option<TenantEntry> {
        let now_us = self.ctx.clock.now_us();
        let began_us = self.began_us.unwrap_or(now_us);
        let due = |t: &TenantEntry| {
            let last_us = self.ctx.status.checks.last_live(t.uid).unwrap_or(began_us).min(now_us);
            let wait_us = self.waits.get(&t.uid).copied()?;
            self.turns.due(t.uid, last_us).filter(|at| *at <= now_us && wait_us <= now_us)
        };
        let all = self.tenants().into_iter().filter_map(|t| Some((due(&t)?, t)));
        if self.ctx.is_stopping() || !self.ctx.status.is_streaming() {
            return None;
        }
        all.min_by_key(|(at, t)| (*at, t.uid)).map(|(_, t)| t)
    }

    async fn turn(&mut self, tenant: &TenantEntry) {
        match check(&self.ctx, &self.mirror, tenant, Watch::default()).await {
            Ok(compared) => {
                self.failures = 0;
                self.waits.insert(tenant.uid, i64::MIN);
                self.ctx.alarms.clear(alarms::VALIDATION_FAILED, &self.ctx.source);
                if let Compared::Done(v) = &compared {
                    let rows: u64 = v.tables.iter().map(|t| t.1).sum();
                    let ok = v.is_same();
                    tracing::info!(tenant_uid = %tenant.uid, rows, ok, at = %v.lsn, "compared with the live rows");
                }
            }
            Err(e) => {
                let now_us = self.ctx.clock.now_us();
                self.waits.insert(tenant.uid, now_us.saturating_add(self.turns.again(now_us)));
                metrics::counter!("coffer_validations_total", "source" => self.ctx.source.clone(), "result" => "failed")
                    .increment(1);
                if e.is_code("no_base") {
                    return;
                }
                tracing::warn!(tenant_uid = %tenant.uid, "not compared with the live rows, and tried again: {e}");
                self.failures += 1;
                if self.failures >= FAILURES {
                    let message = format!("tenants cannot be compared with their live rows: {}", e.report());
                    self.ctx.alarms.raise(alarms::VALIDATION_FAILED, &self.ctx.source, message);
                }
            }
        }
    }
}
