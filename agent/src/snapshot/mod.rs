//! Bases: fulls that are read from the database under a snapshot.
//!
//! [`BaseTaker`] compares the rules with the log: a table is covered when the newest base that has it was taken for the
//! rule's registration and lies after the last gap or promotion. All tables that are not are taken in one [`job`];
//! the stream is shipped meanwhile. Only this room ever sees a `pg_snapshot`: what it records is a clean cut.

pub mod catalog;
pub mod fulls;
mod job;
pub mod plan;
pub mod progress;
pub mod read;
pub mod rows;
pub mod visibility;

use crate::alarms;
use crate::error::{Error, Kind, Result};
use crate::repository::model::Body;
use crate::repository::{Draft, Log};
use crate::restore::in_place;
use crate::run::AgentContext;
use crate::ship::Durable;
use crate::snapshot::plan::Seen;
use crate::snapshot::progress::{BaseProgress, Phase};
use crate::sql::{self, SqlContext};
use coffer_wire::Lsn;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::task::JoinHandle;
use uuid::Uuid;

/// Rules are compared with the log at least this often; most changes are noticed by their markers.
const RECHECK: Duration = Duration::from_secs(10);
/// First and longest wait after a job that failed, or that left tables out.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Takes bases while the agent runs.
pub struct BaseTaker {
    ctx: Arc<AgentContext>,
    durable: Receiver<Durable>,
    seen: Seen,
    progress: Arc<BaseProgress>,
}

impl BaseTaker {
    /// Starts it; it ends with the agent, or with an error that it cannot go on after.
    pub fn spawn(ctx: Arc<AgentContext>) -> JoinHandle<Result<()>> {
        // Subscribed before the log is read: no record falls in between.
        let durable = ctx.durable.subscribe();
        tokio::spawn(async move {
            let taker = Self { ctx, durable, seen: Seen::default(), progress: Arc::default() };
            taker.run().await
        })
    }

    async fn run(mut self) -> Result<()> {
        if let Err(e) = in_place::remove_leftover_fences(&self.ctx.dsn).await {
            tracing::warn!("cannot look for fences that a restore may have left: {e}");
        }
        self.read_log().await?;
        let mut pause = RETRY.0;
        loop {
            if self.ctx.is_stopping() {
                return Ok(());
            }
            let wait = match self.take_missing().await {
                Ok(true) => {
                    self.ctx.alarms.clear(alarms::BASE_FAILED, &self.ctx.source);
                    pause = RETRY.0;
                    RECHECK
                }
                Ok(false) => {
                    pause = (pause * 2).min(RETRY.1);
                    pause
                }
                Err(e) if e.kind() == Kind::Fenced && !e.is_code("base_again") => return Err(e),
                Err(_) if self.ctx.is_stopping() => return Ok(()),
                Err(e) => {
                    self.progress.finish(Some(e.to_string()));
                    self.ctx.status.set_snapshotting(false);
                    let message = format!("bases fail and are tried again: {e}");
                    tracing::warn!("{message}");
                    self.ctx.alarms.raise(alarms::BASE_FAILED, &self.ctx.source, message);
                    pause = (pause * 2).min(RETRY.1);
                    pause
                }
            };
            self.idle(wait).await?;
        }
    }

    /// Takes in the whole log.
    async fn read_log(&mut self) -> Result<()> {
        self.seen = Seen::default();
        let log = Log::open(&self.ctx.repo, self.ctx.source_uid, None).await?;
        for r in log.records() {
            self.seen.record(r);
        }
        Ok(())
    }

    /// Waits for something that may ask for a base, or for `wait`.
    async fn idle(&mut self, wait: Duration) -> Result<()> {
        let until = tokio::time::Instant::now() + wait;
        loop {
            let ctx = self.ctx.clone();
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Ok(()),
                () = ctx.stopped() => return Ok(()),
                d = self.durable.recv() => if self.take_in(d).await?.0 { return Ok(()) },
            }
        }
    }

    /// Takes a record in: whether it may ask for a base, and the record itself unless some were missed.
    async fn take_in(&mut self, d: std::result::Result<Durable, RecvError>) -> Result<(bool, Option<Durable>)> {
        let d = match d {
            Ok(d) => d,
            Err(RecvError::Lagged(n)) => {
                tracing::debug!("{n} records were not heard of: the log is read again");
                self.read_log().await?;
                return Ok((true, None));
            }
            Err(RecvError::Closed) => return Err(Error::other("the stream has ended").code("stopping")),
        };
        if !self.seen.record(&d.record) {
            self.read_log().await?;
        }
        let mut asks = matches!(d.record.body, Body::Gap { .. } | Body::Timeline { .. });
        for m in d.markers.iter() {
            match m.kind.as_str() {
                "registry" | "ddl" | "drop" => asks = true,
                "rewrite" => {
                    asks = true;
                    if let Some(relid) = rewritten(&m.payload) {
                        self.seen.forget(relid);
                    }
                }
                _ => {}
            }
        }
        Ok((asks, Some(d)))
    }

    /// One job for every table that lacks a base. False: some table has to be tried again soon.
    async fn take_missing(&mut self) -> Result<bool> {
        let rules = {
            let client = sql::connect(&self.ctx.dsn).await?;
            let row = client
                .query_one("SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text", &[])
                .await
                .sql("cannot take a snapshot")?;
            if let Ok(xmin) = row.get::<_, &str>(0).parse() {
                self.seen.prune(xmin);
            }
            catalog::rules(&client).await?
        };
        let missing = self.seen.missing(rules);
        if missing.is_empty() {
            return Ok(true);
        }
        let names: Vec<String> = missing.iter().map(catalog::Rule::qualified).collect();
        tracing::info!(tables = missing.len(), "taking bases of {}", names.join(", "));
        self.ctx.status.set_snapshotting(true);
        self.progress.begin(names);
        let (job, breaks) = (Uuid::new_v4(), self.seen.breaks());
        let read = job::read_tables(&self.ctx, missing, &self.progress).await?;
        let left_out = read.left_out.clone();
        if !read.is_empty() {
            let cut = self.wait_for_marker(&read).await?;
            let ships = self.seen.ships(read.xmin(), cut);
            let done = read.finish(&self.ctx, job, cut, ships, &self.progress).await?;
            self.record(done, breaks).await?;
        }
        self.ctx.status.set_snapshotting(false);
        let failed = left_out.iter().map(|(t, why)| format!("{t}: {why}")).collect::<Vec<_>>().join("; ");
        self.progress.finish((!failed.is_empty()).then_some(failed.clone()));
        if !failed.is_empty() {
            let message = format!("tables without a base: {failed}");
            self.ctx.alarms.raise(alarms::BASE_FAILED, &self.ctx.source, message);
        }
        Ok(failed.is_empty())
    }

    /// Writes a marker and waits until the stream has delivered it: its commit is the cut.
    async fn wait_for_marker(&mut self, read: &job::ReadTables) -> Result<Lsn> {
        self.progress.phase(Phase::WaitingForStream);
        let mut id = read.mark().await?;
        loop {
            let ctx = self.ctx.clone();
            let d = tokio::select! {
                d = self.durable.recv() => d,
                () = ctx.stopped() => return Err(Error::other("the agent is stopping").code("stopping")),
            };
            let Some(d) = self.take_in(d).await?.1 else {
                // The marker may have been among what was not heard.
                id = read.mark().await?;
                continue;
            };
            if let Some(m) = d.markers.iter().find(|m| m.kind == "base" && m.payload == id) {
                crate::failpoints::hit(crate::failpoints::BASE_AFTER_MARKER)?;
                return Ok(m.end_lsn);
            }
        }
    }

    /// Appends the record, unless the log broke off since the job began.
    async fn record(&mut self, done: job::Finished, breaks: u64) -> Result<()> {
        let (tables, fulls, rows, cut) = (done.base.tables.len(), done.base.fulls.len(), done.rows, done.base.cut_lsn);
        let job = done.base.job;
        let log = self.ctx.log.clone();
        loop {
            let mut log = log.lock().await;
            self.hear_all()?;
            let Some(last) = log.last().cloned() else {
                return Err(Error::other("the log has no record yet"));
            };
            if self.seen.next() <= last.n {
                // Appended and not announced yet.
                drop(log);
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            if self.seen.breaks() != breaks {
                return Err(Error::new(Kind::Fenced, "the log broke off while the base was taken: it is taken again")
                    .code("base_again"));
            }
            let (system_identifier, timeline) = self.ctx.system();
            let draft = Draft {
                system_identifier,
                timeline,
                slot: self.ctx.slot.clone(),
                from_lsn: last.upto_lsn,
                upto_lsn: last.upto_lsn,
                upto_time_us: last.upto_time_us,
                body: Body::Base(done.base),
            };
            let record = match log.append(draft).await {
                Ok(r) => r,
                Err(e) if e.kind() == Kind::Fenced => return Err(e),
                Err(e) => {
                    // It may be there all the same; the log tells.
                    let writer = log.writer();
                    let mut again = Log::open(&self.ctx.repo, self.ctx.source_uid, None).await?;
                    again.forget_records();
                    let head = again.last().cloned();
                    *log = again;
                    match head {
                        Some(r) if r.writer == writer && matches!(&r.body, Body::Base(b) if b.job == job) => r,
                        _ => return Err(e),
                    }
                }
            };
            // Announced under the lock, so that the order of announcements is the log's.
            self.ctx.publish(record);
            drop(log);
            self.hear_all()?;
            tracing::info!(tables, fulls, rows, %cut, "bases are recorded");
            return Ok(());
        }
    }

    /// Takes in what was announced already.
    fn hear_all(&mut self) -> Result<()> {
        loop {
            match self.durable.try_recv() {
                Ok(d) => {
                    if !self.seen.record(&d.record) {
                        return Err(again("records of the log were not heard of"));
                    }
                    for m in d.markers.iter().filter(|m| m.kind == "rewrite") {
                        if let Some(relid) = rewritten(&m.payload) {
                            self.seen.forget(relid);
                        }
                    }
                }
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Lagged(_)) => return Err(again("records of the log were not heard of")),
                Err(TryRecvError::Closed) => return Err(Error::other("the stream has ended").code("stopping")),
            }
        }
    }
}

fn again(why: &str) -> Error {
    Error::new(Kind::Fenced, format!("{why}: the base is taken again")).code("base_again")
}

/// The table of a `rewrite` marker.
fn rewritten(payload: &[u8]) -> Option<u32> {
    let v: serde_json::Value = serde_json::from_slice(payload).ok()?;
    v.get("relid")?.as_u64()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rewrite_names_its_table() {
        assert_eq!(rewritten(br#"{"relid":16384}"#), Some(16384));
        assert_eq!(rewritten(b"{}"), None);
        assert_eq!(rewritten(b"x"), None);
    }
}
