//! The agent's conversation with the source over SQL, beside the stream.
//!
//! Twice a second it reads the source's clock and the end of its log (what a record's time rests on, see
//! [`crate::ship`]), whether somebody waits in `coffer.wait_durable()`, and how far the slot is behind; it reports
//! progress and new tenants, and sees to fences that restores left behind. Nothing here is needed for anything to become durable: when the session fails, it is opened
//! again, and the stream goes on.

use crate::alarms;
use crate::clock::rfc3339;
use crate::demux::Flow;
use crate::error::{Error, Result};
use crate::keyring::TenantEntry;
use crate::replication::sink::Durable;
use crate::restore::in_place;
use crate::run::AgentContext;
use crate::ship::Anchors;
use crate::sql::{self, SqlClient, SqlContext};
use coffer_wire::Lsn;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::Statement;

/// How often the source is asked.
const TICK: Duration = Duration::from_millis(500);
/// How often progress is reported when nobody waits.
const REPORT: Duration = Duration::from_secs(10);
/// How often the tables without a rule are counted.
const COVERAGE: Duration = Duration::from_secs(60);
/// Wait before the next session.
const RECONNECT: Duration = Duration::from_secs(2);
/// Tenants registered with one statement.
const TENANTS_AT_ONCE: usize = 500;

/// The clock before the position: `now()` is when the statement began.
const LOOK: &str = "SELECT (extract(epoch FROM now()) * 1000000)::bigint, \
    pg_catalog.pg_current_wal_insert_lsn()::text, current_setting('wal_block_size')::bigint, coffer._agent_waiting(), \
    s.wal_status, pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_insert_lsn(), s.confirmed_flush_lsn)::bigint \
    FROM (VALUES (1)) one LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = $1";
const UNCOVERED: &str = "SELECT relation::text FROM coffer.coverage \
    WHERE NOT covered AND strategy IS DISTINCT FROM 'excluded' ORDER BY 1";

/// See the module. One per source.
pub struct Reporter {
    ctx: Arc<AgentContext>,
    flow: Arc<Flow>,
    anchors: Arc<Anchors>,
    new_tenants: mpsc::UnboundedReceiver<TenantEntry>,
    durable: watch::Receiver<Durable>,
    agent: String,
    waiting: bool,
    last_report: Option<Instant>,
    last_coverage: Option<Instant>,
    rpo_told: bool,
    /// Removing fences.
    fences: JoinSet<()>,
}

impl Reporter {
    pub fn new(
        ctx: Arc<AgentContext>,
        flow: Arc<Flow>,
        anchors: Arc<Anchors>,
        new_tenants: mpsc::UnboundedReceiver<TenantEntry>,
        durable: watch::Receiver<Durable>,
    ) -> Self {
        let agent = format!("coffer {} pid {}", env!("CARGO_PKG_VERSION"), std::process::id());
        Self {
            ctx,
            flow,
            anchors,
            new_tenants,
            durable,
            agent,
            waiting: false,
            last_report: None,
            last_coverage: None,
            rpo_told: false,
            fences: JoinSet::new(),
        }
    }

    /// Never returns; drop it to end it.
    pub async fn run(mut self) {
        let ctx = self.ctx.clone();
        let connect = async || {
            sql::connect(&ctx.source_dsn().await?.with_application_name("coffer reporter").sending_little()).await
        };
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let failed = match connect().await {
                Ok(client) => match self.session(&client).await {
                    Ok(()) => return,
                    Err(e) => e,
                },
                Err(e) => e,
            };
            if began.elapsed() > REPORT {
                failures = 0;
            }
            // Once is a restart of the server, of which the stream says more.
            failures += 1;
            if failures > 3 {
                self.ctx.alarms.raise(
                    alarms::REPORTING_FAILED,
                    &self.ctx.source,
                    format!("{}; trying again", failed.report()),
                );
            }
            self.judge_rpo(None).await;
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn session(&mut self, client: &SqlClient) -> Result<()> {
        client.commit_locally().await?;
        let look = client.prepare(LOOK).await.sql("cannot read the source's state")?;
        self.last_report = None;
        self.look(client, &look).await?;
        self.report(client).await?;
        self.leftover_fences(client).await?;
        self.ctx.alarms.clear(alarms::REPORTING_FAILED, &self.ctx.source);
        // Whoever was met before this session began.
        let known = self.ctx.keyring.tenants(self.ctx.source_uid);
        let mut registered: HashSet<_> = known.iter().map(|e| e.uid).collect();
        self.register(client, known).await?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    self.look(client, &look).await?;
                    self.judge_rpo(Some(client)).await;
                    if self.last_report.is_none_or(|t| t.elapsed() >= REPORT) {
                        self.report(client).await?;
                        // Whoever a base met first.
                        let mut known = self.ctx.keyring.tenants(self.ctx.source_uid);
                        known.retain(|e| registered.insert(e.uid));
                        self.register(client, known).await?;
                        self.leftover_fences(client).await?;
                    }
                    if self.last_coverage.is_none_or(|t| t.elapsed() >= COVERAGE) {
                        self.coverage(client).await?;
                    }
                }
                changed = self.durable.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    if self.waiting {
                        self.report(client).await?;
                    }
                }
                Some(first) = self.new_tenants.recv() => {
                    let mut batch = vec![first];
                    while let Ok(next) = self.new_tenants.try_recv() {
                        batch.push(next);
                    }
                    registered.extend(batch.iter().map(|e| e.uid));
                    self.register(client, batch).await?;
                }
            }
        }
    }

    async fn look(&mut self, client: &SqlClient, look: &Statement) -> Result<()> {
        let asked_us = self.ctx.clock.now_us();
        let row = client.query_one(look, &[&self.ctx.slot]).await.sql("cannot read the source's state")?;
        let time_us: i64 = row.get(0);
        let end: Lsn = row.get::<_, &str>(1).parse().map_err(Error::other)?;
        self.ctx.require_followed(client)?;
        let at = before_page_header(end, row.get::<_, i64>(2));
        self.anchors.add_if(at, time_us, || self.ctx.follows(client));
        self.ctx.status.set_source_clock(time_us - asked_us);
        let waiting: bool = row.get(3);
        if waiting {
            self.flow.want(at);
            // It may be durable already, and only not known there.
            if !self.waiting {
                self.last_report = None;
            }
        }
        self.waiting = waiting;
        self.ctx.status.set_slot_lag(row.get::<_, Option<i64>>(5));
        match row.get::<_, Option<&str>>(4) {
            Some("unreserved") => {
                self.ctx.alarms.raise(
                    alarms::SLOT_AT_RISK,
                    &self.ctx.source,
                    format!("slot {} is behind max_slot_wal_keep_size: its log is about to be removed", self.ctx.slot),
                );
            }
            _ => self.ctx.alarms.clear(alarms::SLOT_AT_RISK, &self.ctx.source),
        }
        Ok(())
    }

    async fn report(&mut self, client: &SqlClient) -> Result<()> {
        self.ctx.require_followed(client)?;
        let (lsn, time_us) = self.ctx.status.durable();
        let lsn_text = lsn.to_string();
        let time = rfc3339(time_us);
        client
            .execute(
                "SELECT coffer._agent_progress($1::text::pg_catalog.pg_lsn, $2::text::timestamptz, $3)",
                &[&lsn_text, &time, &self.agent],
            )
            .await
            .sql("cannot report progress")?;
        self.last_report = Some(Instant::now());
        Ok(())
    }

    /// A restore that died, or that somebody kept from removing its fences, left them.
    async fn leftover_fences(&mut self, client: &SqlClient) -> Result<()> {
        while self.fences.try_join_next().is_some() {}
        if self.fences.is_empty() && in_place::any_fence(client).await? {
            let dsn = self.ctx.source_dsn().await?;
            self.fences.spawn(async move {
                if let Err(e) = in_place::remove_leftover_fences(&dsn).await {
                    tracing::info!("fences that a restore left behind are still there: {e}");
                }
            });
        }
        Ok(())
    }

    async fn register(&self, client: &SqlClient, entries: Vec<TenantEntry>) -> Result<()> {
        for part in entries.chunks(TENANTS_AT_ONCE) {
            let keys: Vec<String> = part.iter().map(|e| e.tenant.to_string()).collect();
            let uids: Vec<uuid::Uuid> = part.iter().map(|e| e.uid).collect();
            let kinds: Vec<&str> = part.iter().map(|e| e.tenant.kind.name()).collect();
            // Without its schema: unnest of several arrays is the parser's, not a function's.
            client
                .execute(
                    "SELECT coffer._agent_tenant(key, uid, kind) \
                     FROM unnest($1::text[], $2::uuid[], $3::text[]) t (key, uid, kind)",
                    &[&keys, &uids, &kinds],
                )
                .await
                .sql("cannot register tenants")?;
        }
        Ok(())
    }

    async fn coverage(&mut self, client: &SqlClient) -> Result<()> {
        let rows = client.query(UNCOVERED, &[]).await.sql("cannot read the coverage")?;
        self.ctx.status.set_uncovered(rows.iter().map(|r| r.get(0)).collect());
        self.last_coverage = Some(Instant::now());
        Ok(())
    }

    /// Raises and clears the alarm about the recovery point; tells the database's listeners too.
    async fn judge_rpo(&mut self, client: Option<&SqlClient>) {
        let limit = self.ctx.config.rpo.limit;
        let Some(rpo) = self.ctx.status.rpo(self.ctx.clock.now_us()) else { return };
        if rpo <= limit {
            self.rpo_told = false;
            self.ctx.alarms.clear(alarms::RPO_EXCEEDED, &self.ctx.source);
            return;
        }
        let message =
            format!("what is durable is {} s behind the source; the limit is {} s", rpo.as_secs(), limit.as_secs());
        self.ctx.alarms.raise(alarms::RPO_EXCEEDED, &self.ctx.source, message.clone());
        if let Some(c) = client
            && !self.rpo_told
        {
            // Best effort: the log and the health check say it too.
            self.rpo_told = c.execute("SELECT pg_catalog.pg_notify('coffer_alarm', $1)", &[&message]).await.is_ok();
        }
    }
}

/// The insert position may stand behind a page header that no record has reached; no record ends between the page's
/// start and there, so the page's start says the same and is a position that the stream does reach.
fn before_page_header(lsn: Lsn, block: i64) -> Lsn {
    let block = block.max(1) as u64;
    match lsn.0 % block {
        into @ (24 | 40) => Lsn(lsn.0 - into),
        _ => lsn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_behind_a_page_header_is_the_pages_start() {
        assert_eq!(before_page_header(Lsn(8192 * 3 + 24), 8192), Lsn(8192 * 3));
        assert_eq!(before_page_header(Lsn(8192 * 3 + 40), 8192), Lsn(8192 * 3));
        assert_eq!(before_page_header(Lsn(8192 * 3 + 48), 8192), Lsn(8192 * 3 + 48));
        assert_eq!(before_page_header(Lsn(8192 * 3 + 24), 16384), Lsn(8192 * 3 + 24));
    }
}
