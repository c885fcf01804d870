//! Pruning inside `coffer run`, by schedule.

use super::{Pruner, Report};
use crate::alarms;
use crate::error::Result;
use crate::repository::records_of_a_pack;
use crate::retention::Policy;
use crate::run::AgentContext;
use crate::schedule::{Schedule, Timer};
use std::sync::Arc;
use std::time::Duration;

/// When a process starts, nobody knows whether the last run was missed: one is made up for when it has been up for so
/// long.
const AFTER_START: Duration = Duration::from_secs(15 * 60);
/// The longest wait in one piece: a clock may be set meanwhile.
const LOOK: Duration = Duration::from_secs(30);
/// Wait after a run that failed.
const AGAIN: Duration = Duration::from_secs(600);

/// Prunes a source by schedule for as long as it is polled.
pub async fn watch(ctx: Arc<AgentContext>) {
    let schedule = match Schedule::parse(&ctx.config.schedule.prune) {
        Ok(s) => s,
        // The configuration was checked when it was read.
        Err(e) => return tracing::error!("nothing is pruned: {e}"),
    };
    let started_us = ctx.clock.now_us();
    let mut timer = Timer::new(schedule, None, started_us);
    let mut extra = Some(started_us.saturating_add(AFTER_START.as_micros() as i64));
    loop {
        let now_us = ctx.clock.now_us();
        if timer.due(now_us) || extra.is_some_and(|at| at <= now_us) {
            extra = None;
            if !run(&ctx).await {
                extra = Some(ctx.clock.now_us().saturating_add(AGAIN.as_micros() as i64));
            }
        }
        tokio::time::sleep(timer.wait(ctx.clock.now_us()).clamp(Duration::from_millis(100), LOOK)).await;
    }
}

/// One run; whether all of it went well.
async fn run(ctx: &Arc<AgentContext>) -> bool {
    let source = ctx.source.clone();
    let done = prune(ctx).await;
    if let Ok(report) = &done {
        note(ctx, report);
    }
    let failure = match &done {
        Err(e) => Some(e.report()),
        Ok(report) => report.failed().next().map(|(t, e)| {
            format!("{} tenants were not pruned, the first of them {}: {e}", report.failed().count(), t.uid)
        }),
    };
    let ok = failure.is_none();
    match failure {
        // What it was about to read is taken from it: nobody has to look.
        Some(_) if ctx.is_stopping() => {}
        Some(why) => {
            ctx.alarms.raise(alarms::PRUNE_FAILED, &source, format!("what is to go stays: {why}"));
        }
        None => {
            ctx.alarms.clear(alarms::PRUNE_FAILED, &source);
            metrics::gauge!("coffer_last_prune_timestamp_seconds", "source" => source.clone())
                .set(ctx.clock.now_us() as f64 / 1e6);
        }
    }
    metrics::counter!("coffer_prune_runs_total", "source" => source, "result" => if ok { "ok" } else { "failed" })
        .increment(1);
    ok
}

async fn prune(ctx: &Arc<AgentContext>) -> Result<Report> {
    let pruner = Pruner {
        repo: ctx.repo.clone(),
        keyring: ctx.keyring.clone(),
        source: (ctx.source.clone(), ctx.source_uid),
        dsn: Some(ctx.dsn.clone()),
        policy: Policy::from(&ctx.config.retention),
        grace: ctx.config.retention.grace,
        tenant: None,
        confirm: true,
        checkpoint_step: records_of_a_pack(),
    };
    pruner.run().await
}

/// The log line and the counters of a run.
fn note(ctx: &AgentContext, report: &Report) {
    let (recorded, deleted) = (report.sum(|t| t.recorded), report.sum(|t| t.deleted));
    let source = &ctx.source;
    for (what, n) in [
        ("coffer_pruned_backups_total", recorded.backups),
        ("coffer_pruned_objects_total", deleted.objects),
        ("coffer_pruned_bytes_total", deleted.bytes),
    ] {
        metrics::counter!(what, "source" => source.clone()).increment(n);
    }
    let (backups, objects, bytes) = (recorded.backups, deleted.objects, deleted.bytes);
    let (tenants, orphans) = (report.tenants.len(), report.orphans.len());
    tracing::info!(
        source,
        tenants,
        backups,
        objects,
        bytes,
        orphans,
        "pruned: {backups} backups no longer count, {objects} objects deleted"
    );
    for w in &report.warnings {
        tracing::warn!(source, "{w}");
    }
}
