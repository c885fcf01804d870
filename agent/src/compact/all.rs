//! Fulls and incrementals of many tenants, a few at a time; and the schedules that ask for them inside `coffer run`.

use super::{ARCHIVE, Compactor, NO_TABLES, Occasion, Outcome, SCHEDULE, Spans};
use crate::alarms;
use crate::catalog::{FullEntry, IncrementalEntry, State};
use crate::error::{Kind, Result};
use crate::history::{History, Target, When};
use crate::keyring::TenantEntry;
use crate::lease::Lease;
use crate::opened;
use crate::restore::Watch;
use crate::run::AgentContext;
use crate::schedule::{Schedule, Timer};
use coffer_wire::TenantKind;
use futures::{Stream, StreamExt, stream};
use std::sync::Arc;
use std::time::Duration;

/// Tenants at a time.
pub const PARALLEL: usize = 2;
/// How often the schedule is looked at.
const TICK: Duration = Duration::from_secs(1);

impl Compactor {
    /// Makes a full of each of these tenants at one point, those that no other worker takes. Rows that capture could not
    /// attribute are in no full.
    pub fn all<'a>(
        &'a self,
        history: &'a History,
        tenants: Vec<TenantEntry>,
        point: &'a Target,
        occasion: &'a Occasion,
    ) -> impl Stream<Item = (TenantEntry, Result<Outcome<FullEntry>>)> + 'a {
        stream::iter(compacted(tenants))
            .map(move |t| async move {
                let work = async {
                    match self.take_full(history, &t, point, occasion).await {
                        Err(e) if e.is_code(NO_TABLES) => Ok(Outcome::Unchanged),
                        made => made.map(Outcome::Made),
                    }
                };
                let since = |now: &State, then: &State| {
                    now.fulls.iter().filter(|f| occasion.is_of(f)).any(|f| then.full(f.id).is_none())
                };
                let made = self.alone(history, &t, since, work).await;
                (t, made)
            })
            .buffer_unordered(PARALLEL)
    }

    /// Makes an incremental of each of these tenants that changed, up to the end of the log.
    pub fn all_incrementals<'a>(
        &'a self,
        history: &'a History,
        tenants: Vec<TenantEntry>,
    ) -> impl Stream<Item = (TenantEntry, Result<Outcome<IncrementalEntry>>)> + 'a {
        let spans = Arc::new(Spans::of(history));
        stream::iter(compacted(tenants))
            .map(move |t| {
                let spans = spans.clone();
                async move {
                    let made = self.take_incremental(history, &spans, &t).await;
                    (t, made)
                }
            })
            .buffer_unordered(PARALLEL)
    }
}

fn compacted(tenants: Vec<TenantEntry>) -> impl Iterator<Item = TenantEntry> {
    tenants.into_iter().filter(|t| t.tenant.kind != TenantKind::Unresolved)
}

/// What a schedule asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Incrementals,
    Fulls,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Incrementals => "incrementals",
            Self::Fulls => "fulls",
        }
    }

    fn alarm(self) -> &'static str {
        match self {
            Self::Incrementals => alarms::INCREMENTALS_FAILED,
            Self::Fulls => alarms::FULLS_FAILED,
        }
    }
}

/// Makes incrementals and fulls whenever their schedules say so, for as long as it is polled. Where both are due,
/// incrementals come first: the fulls read them.
pub async fn on_schedule(ctx: Arc<AgentContext>) {
    let at = &ctx.config.schedule;
    let parsed = |text: &str| Schedule::parse(text);
    let (incremental, full) = match (parsed(&at.incremental), parsed(&at.full)) {
        (Ok(i), Ok(f)) => (i, f),
        // The configuration was checked when it was read.
        (Err(e), _) | (_, Err(e)) => {
            tracing::error!("neither incrementals nor fulls are made: {e}");
            return;
        }
    };
    let (last_incremental, last_full) = match newest(&ctx).await {
        Ok(t) => t,
        Err(e) => {
            tracing::warn!("when the last fulls were made could not be read: {e}");
            (None, None)
        }
    };
    if let Some(us) = last_full {
        ctx.status.full_complete(us);
    }
    let now_us = ctx.clock.now_us();
    let mut timers = [
        (Work::Incrementals, Timer::new(incremental, last_incremental, now_us)),
        (Work::Fulls, Timer::new(full, last_full, now_us)),
    ];
    loop {
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            () = ctx.stopped() => return,
        }
        for (work, timer) in &mut timers {
            if !timer.due(ctx.clock.now_us()) {
                continue;
            }
            if let Err(e) = once(&ctx, *work).await {
                // What it was about to read is taken from it: nobody has to look.
                if ctx.is_stopping() {
                    return;
                }
                let what = work.name();
                let message = format!("no {what} were made: {e}");
                ctx.alarms.raise(work.alarm(), &ctx.source, message);
                tracing::error!("the scheduled {what} were not made, and are tried again at the next time: {e}");
            }
        }
    }
}

/// The times of the newest incremental of the source, and of the newest scheduled full of each tenant the oldest.
async fn newest(ctx: &AgentContext) -> Result<(Option<i64>, Option<i64>)> {
    let mut history = History::load(&ctx.repo, &ctx.keyring, ctx.source_uid, None).await?;
    history.load_catalogs().await?;
    let tenants = ctx.keyring.tenants(ctx.source_uid);
    let incrementals = tenants.iter().flat_map(|t| history.incrementals(t.uid)).map(|i| i.to_time_us);
    let scheduled = |f: &&FullEntry| matches!(f.trigger.as_str(), SCHEDULE | ARCHIVE);
    let of_schedule =
        |t: &TenantEntry| history.fulls(t.uid).into_iter().filter(scheduled).map(|f| f.point_time_us).max();
    // The tenant that waits longest: a run that was cut short is made up for.
    Ok((incrementals.max(), tenants.iter().filter_map(of_schedule).min()))
}

/// Does it for every tenant, at what is durable now.
async fn once(ctx: &AgentContext, work: Work) -> Result<()> {
    // Before the catalogs are read: what they name by then is not removed until the fulls that refer to it are recorded.
    let _intent = Lease::intent(&ctx.repo, ctx.source_uid).await?;
    let mut history = History::load(&ctx.repo, &ctx.keyring, ctx.source_uid, None).await?;
    history.load_catalogs().await?;
    let compactor = Compactor {
        repo: ctx.repo.clone(),
        keyring: ctx.keyring.clone(),
        rt: ctx.rt.clone(),
        clock: ctx.clock.clone(),
        source: ctx.source_uid,
        scratch: opened::scratch(&ctx.config)?,
        memory: usize::try_from(ctx.memory.compact).unwrap_or(usize::MAX) / PARALLEL,
        part_bytes: ctx.config.compact.part,
        share: true,
        watch: Watch::default(),
    };
    let tenants = ctx.keyring.tenants(ctx.source_uid);
    match work {
        Work::Incrementals => incrementals(ctx, &history, &compactor, tenants).await,
        Work::Fulls => fulls(ctx, &history, &compactor, tenants).await,
    }
}

async fn incrementals(
    ctx: &AgentContext,
    history: &History,
    compactor: &Compactor,
    tenants: Vec<TenantEntry>,
) -> Result<()> {
    let (mut made, mut bytes, mut failed) = (0u64, 0, 0u64);
    let mut done = std::pin::pin!(compactor.all_incrementals(history, tenants));
    while let Some((t, r)) = done.next().await {
        if ctx.is_stopping() {
            return Ok(());
        }
        match r {
            Ok(Outcome::Made(i)) => (made, bytes) = (made + 1, bytes + i.bytes),
            Ok(Outcome::Unchanged | Outcome::Elsewhere) => {}
            Err(e) => {
                failed += 1;
                ctx.damage.complain(&e);
                tracing::warn!(tenant_uid = %t.uid, "the scheduled incremental failed: {e}");
            }
        }
    }
    finished(ctx, Work::Incrementals, failed);
    tracing::info!(source = ctx.source, made, failed, bytes, upto = %history.end().0, "scheduled incrementals");
    Ok(())
}

/// A full of every tenant, at what is durable now.
async fn fulls(ctx: &AgentContext, history: &History, compactor: &Compactor, tenants: Vec<TenantEntry>) -> Result<()> {
    let point = history.resolve(&When::Latest).await?;
    let occasion = Occasion::of_schedule();
    let (mut made, mut bytes, mut failed) = (0u64, 0, 0u64);
    let mut done = std::pin::pin!(compactor.all(history, tenants, &point, &occasion));
    while let Some((t, r)) = done.next().await {
        if ctx.is_stopping() {
            return Ok(());
        }
        match r {
            Ok(Outcome::Made(f)) => (made, bytes) = (made + 1, bytes + f.bytes),
            Ok(Outcome::Unchanged | Outcome::Elsewhere) => {}
            // One tenant's trouble is not another's.
            Err(e) => {
                // A table that waits for its base is an alarm of its own.
                let possible = e.kind() != Kind::OutsideWindow;
                failed += u64::from(possible);
                ctx.damage.complain(&e);
                let level = if possible { "failed" } else { "not possible now" };
                tracing::warn!(tenant_uid = %t.uid, "the scheduled full is {level}: {e}");
            }
        }
    }
    finished(ctx, Work::Fulls, failed);
    tracing::info!(source = ctx.source, made, failed, bytes, at = %point.lsn, "scheduled fulls");
    Ok(())
}

/// A run is over: the time of the last one counts only if no tenant failed; else somebody has to look.
fn finished(ctx: &AgentContext, work: Work, failed: u64) {
    if failed == 0 {
        let now_us = ctx.clock.now_us();
        match work {
            Work::Incrementals => {
                metrics::gauge!("coffer_last_incremental_timestamp_seconds", "source" => ctx.source.clone())
                    .set(now_us as f64 / 1e6);
            }
            Work::Fulls => ctx.status.full_complete(now_us),
        }
        ctx.alarms.clear(work.alarm(), &ctx.source);
    } else {
        let message = format!("the scheduled {} of {failed} tenants failed: the log names them", work.name());
        ctx.alarms.raise(work.alarm(), &ctx.source, message);
    }
}
