//! Fulls of many tenants, a few at a time; and the schedule that asks for them inside `coffer run`.

use super::{Compactor, Occasion};
use crate::catalog::FullEntry;
use crate::error::{Kind, Result};
use crate::history::{History, Target, When};
use crate::keyring::TenantEntry;
use crate::lease::Lease;
use crate::opened;
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
    /// Makes a full of each of these tenants at one point. Rows that capture could not attribute are in no full.
    pub fn all<'a>(
        &'a self,
        history: &'a History,
        tenants: Vec<TenantEntry>,
        point: &'a Target,
        occasion: &'a Occasion,
    ) -> impl Stream<Item = (TenantEntry, Result<FullEntry>)> + 'a {
        let each = tenants.into_iter().filter(|t| t.tenant.kind != TenantKind::Unresolved);
        stream::iter(each)
            .map(move |t| async move {
                let made = self.take_full(history, &t, point, occasion).await;
                (t, made)
            })
            .buffer_unordered(PARALLEL)
    }
}

/// Makes fulls whenever the schedule says so, for as long as it is polled.
pub async fn on_schedule(ctx: Arc<AgentContext>) {
    let schedule = match Schedule::parse(&ctx.config.schedule.full) {
        Ok(s) => s,
        Err(e) => {
            // The configuration was checked when it was read.
            tracing::error!("no fulls are made: {e}");
            return;
        }
    };
    let last_us = match newest(&ctx).await {
        Ok(t) => t,
        Err(e) => {
            tracing::warn!("when the last fulls were made could not be read: {e}");
            None
        }
    };
    let mut timer = Timer::new(schedule, last_us, ctx.clock.now_us());
    loop {
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            () = ctx.stopped() => return,
        }
        if !timer.due(ctx.clock.now_us()) {
            continue;
        }
        if let Err(e) = once(&ctx).await {
            tracing::error!("the scheduled fulls were not made, and are tried again at the next time: {e}");
        }
    }
}

/// The time of the newest scheduled full of the source.
async fn newest(ctx: &AgentContext) -> Result<Option<i64>> {
    let mut history = History::load(&ctx.repo, &ctx.keyring, ctx.source_uid, None).await?;
    history.load_catalogs().await?;
    let tenants = ctx.keyring.tenants(ctx.source_uid);
    let fulls = tenants.iter().flat_map(|t| history.fulls(t.uid)).filter(|f| f.trigger == "schedule");
    Ok(fulls.map(|f| f.point_time_us).max())
}

/// A full of every tenant, at what is durable now.
async fn once(ctx: &AgentContext) -> Result<()> {
    // Before the catalogs are read: what they name by then is not removed until the fulls that refer to it are recorded.
    let _intent = Lease::intent(&ctx.repo, ctx.source_uid).await?;
    let mut history = History::load(&ctx.repo, &ctx.keyring, ctx.source_uid, None).await?;
    history.load_catalogs().await?;
    let point = history.resolve(&When::Latest).await?;
    let compactor = Compactor {
        repo: ctx.repo.clone(),
        keyring: ctx.keyring.clone(),
        rt: ctx.rt.clone(),
        clock: ctx.clock.clone(),
        source: ctx.source_uid,
        scratch: opened::scratch(&ctx.config)?,
        memory: usize::try_from(ctx.memory.compact).unwrap_or(usize::MAX) / PARALLEL,
        part_bytes: ctx.config.compact.part,
    };
    let occasion = Occasion { trigger: "schedule".to_owned(), reason: None };
    let (mut made, mut bytes, mut failed) = (0u64, 0, 0u64);
    let mut done = std::pin::pin!(compactor.all(&history, ctx.keyring.tenants(ctx.source_uid), &point, &occasion));
    while let Some((t, r)) = done.next().await {
        if ctx.is_stopping() {
            return Ok(());
        }
        match r {
            Ok(f) => (made, bytes) = (made + 1, bytes + f.bytes),
            // One tenant's trouble is not another's.
            Err(e) => {
                failed += 1;
                let level = if e.kind() == Kind::OutsideWindow { "not possible now" } else { "failed" };
                tracing::warn!(tenant_uid = %t.uid, "the scheduled full is {level}: {e}");
            }
        }
    }
    metrics::gauge!("coffer_last_full_timestamp_seconds", "source" => ctx.source.clone())
        .set(ctx.clock.now_us() as f64 / 1e6);
    tracing::info!(source = ctx.source, made, failed, bytes, at = %point.lsn, "scheduled fulls");
    Ok(())
}
