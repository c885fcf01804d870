//! Tenants in their turns: compared with their live rows, restored into a scratch database; by schedule, one after the
//! other, for as long as the agent runs.

use super::results::{DRILL, LIVE, Verdict, count, newest_check};
use super::turns::Turns;
use super::{drills, live};
use crate::alarms;
use crate::catalog::Catalog;
use crate::error::Result;
use crate::jobs::Mirror;
use crate::keyring::TenantEntry;
use crate::repository::Log;
use crate::restore::Watch;
use crate::run::AgentContext;
use crate::schedule::Schedule;
use futures::{StreamExt, stream};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// How often it is looked whose turn it is.
const TICK: Duration = Duration::from_secs(1);
/// Checks that could not be made, one after the other, before somebody is told.
const FAILURES: u32 = 3;
/// Catalogs read at a time.
const CATALOGS_AHEAD: usize = 8;

/// What is done in a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Look {
    /// The repository's rows against the live ones.
    Live,
    /// A restore into a scratch database.
    Drill,
}

impl Look {
    /// As a catalog's record has it.
    pub fn what(self) -> &'static str {
        match self {
            Self::Live => LIVE,
            Self::Drill => DRILL,
        }
    }

    /// The alarm about a tenant of which it finds something wrong.
    pub fn found(self) -> &'static str {
        match self {
            Self::Live => alarms::VALIDATION_DIFFERS,
            Self::Drill => alarms::DRILL_FAILED,
        }
    }

    /// The alarm about that it cannot be done.
    fn failed(self) -> &'static str {
        match self {
            Self::Live => alarms::VALIDATION_FAILED,
            Self::Drill => alarms::DRILL_IMPOSSIBLE,
        }
    }

    /// The counter of its results.
    pub fn counter(self) -> &'static str {
        match self {
            Self::Live => "coffer_validations_total",
            Self::Drill => "coffer_drills_total",
        }
    }

    fn schedule(self, ctx: &AgentContext) -> Option<&str> {
        match self {
            Self::Live => Some(&ctx.config.schedule.validate),
            Self::Drill => ctx.config.drill_schedule(),
        }
    }
}

/// Gives every tenant its turn, for as long as it is polled.
pub async fn watch(ctx: Arc<AgentContext>, mirror: Arc<Mirror>, look: Look) {
    let turns = match look.schedule(&ctx).map(Schedule::parse) {
        None => return,
        Some(Ok(s)) => Turns::new(s),
        // The configuration was checked when it was read.
        Some(Err(e)) => return tracing::error!("no tenant is checked ({}): {e}", look.what()),
    };
    let mut w = Watcher { ctx, mirror, look, turns, waits: HashMap::new(), failures: 0, began_us: None };
    loop {
        tokio::time::sleep(TICK).await;
        if !w.ctx.status.is_streaming() {
            continue;
        }
        if let Err(e) = w.learn().await {
            tracing::debug!("when tenants were last checked could not be read: {e}");
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
    look: Look,
    turns: Turns,
    /// The tenants whose catalogs were read; until when one waits whose check could not be made.
    waits: HashMap<Uuid, i64>,
    /// Of those, one after the other.
    failures: u32,
    /// When the source's log began: who was never checked is due at the first time after it.
    began_us: Option<i64>,
}

/// Ends what a check does on threads of its own when the check is dropped.
struct Ends(Watch);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Watcher {
    fn tenants(&self) -> Vec<TenantEntry> {
        let mut all = self.ctx.keyring.tenants(self.ctx.source_uid);
        all.retain(|t| live::is_comparable(&t.tenant));
        all
    }

    /// Reads of tenants that are not known yet when they were checked, and raises the alarms that stood.
    async fn learn(&mut self) -> Result<()> {
        if self.began_us.is_none() {
            let log = Log::open(&self.ctx.repo, self.ctx.source_uid, None).await?;
            self.began_us = log.records().first().map(|r| r.at_us);
        }
        let new: Vec<TenantEntry> = self.tenants().into_iter().filter(|t| !self.waits.contains_key(&t.uid)).collect();
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
            self.waits.insert(t.uid, i64::MIN);
            let Some(last) = newest_check(catalog.state(), self.look.what()) else { continue };
            self.ctx.status.checks.note(self.look, t.uid, last.at_us, last.ok);
            if !last.ok {
                let who = t.tenant.to_string();
                let found = last.message.as_deref().unwrap_or("something was not as it is to be");
                let at = crate::clock::rfc3339(last.at_us);
                let message = format!(
                    "tenant {who}: {found} (found at {at}; `coffer verify` with --against-live or --drill says more)"
                );
                self.ctx.alarms.raise_for(self.look.found(), &self.ctx.source, &who, message);
            }
        }
        Ok(())
    }

    /// Who has been due for longest.
    fn next(&self) -> Option<TenantEntry> {
        if self.ctx.is_stopping() || !self.ctx.status.is_streaming() {
            return None;
        }
        let now_us = self.ctx.clock.now_us();
        let began_us = self.began_us.unwrap_or(now_us);
        let due = |t: &TenantEntry| {
            let last_us = self.ctx.status.checks.last(self.look, t.uid).unwrap_or(began_us).min(now_us);
            let wait_us = self.waits.get(&t.uid).copied()?;
            self.turns.due(t.uid, last_us).filter(|at| *at <= now_us && wait_us <= now_us)
        };
        let all = self.tenants().into_iter().filter_map(|t| Some((due(&t)?, t)));
        all.min_by_key(|(at, t)| (*at, t.uid)).map(|(_, t)| t)
    }

    async fn turn(&mut self, tenant: &TenantEntry) {
        let ends = Ends(Watch::default());
        let (ctx, mirror, watch) = (&*self.ctx, &*self.mirror, ends.0.clone());
        let checked = match self.look {
            Look::Live => live::check(ctx, mirror, tenant, watch).await.map(|c| (c.verdict(), c.note())),
            Look::Drill => drills::check(ctx, mirror, tenant, watch).await.map(|t| (t.verdict(), t.note())),
        };
        let now_us = self.ctx.clock.now_us();
        let soon_us = now_us.saturating_add(self.turns.again(now_us));
        match checked {
            Ok((verdict, note)) => {
                let note = note.as_deref();
                tracing::info!(tenant_uid = %tenant.uid, ?verdict, note, "checked: {}", self.look.what());
                self.failures = 0;
                let wait_us = match (verdict, self.look) {
                    // A base comes soon; for what a drill leaves out it takes a change of the table.
                    (Verdict::Open, Look::Live) => soon_us,
                    (Verdict::Open, Look::Drill) => self.turns.due(tenant.uid, now_us).unwrap_or(i64::MAX),
                    _ => i64::MIN,
                };
                self.waits.insert(tenant.uid, wait_us);
                self.ctx.alarms.clear(self.look.failed(), &self.ctx.source);
            }
            Err(e) => {
                self.waits.insert(tenant.uid, soon_us);
                count(self.look, &self.ctx.source, "not_made");
                self.ctx.damage.complain(&e);
                tracing::warn!(tenant_uid = %tenant.uid, "not checked ({}), and tried again: {e}", self.look.what());
                self.failures += 1;
                if self.failures >= FAILURES {
                    let message = format!("tenants cannot be checked ({}): {}", self.look.what(), e.report());
                    self.ctx.alarms.raise(self.look.failed(), &self.ctx.source, message);
                }
            }
        }
    }
}
