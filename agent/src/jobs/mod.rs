//! What the source is asked for in SQL (`coffer.backup()` and its like), carried out.
//!
//! Two lanes claim jobs over sessions of their own: one takes all kinds, the other only those that are quick, so that a
//! backup before a migration does not wait for a verification. A claim is a token in the job's row; it is renewed every
//! second with how far the job is, and a job whose session or agent is gone is claimed again, here or elsewhere. So every
//! kind can be done twice: what a first attempt has recorded is found by the second.
//!
//! A job's own commit is waited for before anything else: what it names (its restore point, times up to now) is durable.

mod backup;
mod claim;
mod kinds;
mod mirror;
mod step;

pub use mirror::Mirror;

use crate::alarms;
use crate::demux::Flow;
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::reporter;
use crate::run::AgentContext;
use crate::sql::{self, SqlContext};
use claim::{Claimed, Verdict};
use std::sync::Arc;
use std::time::Duration;
use step::Step;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::Notification;

/// Every kind; the quick ones.
const ALL: &[&str] = &["backup", "restore", "verify", "hold", "release", "policy"];
const QUICK: &[&str] = &["backup", "hold", "release", "policy"];
/// Jobs are looked for at least this often; NOTIFY says it at once.
const POLL: Duration = Duration::from_secs(2);
/// How often a running job says how far it is, and hears whether it is to end.
const BEAT: Duration = Duration::from_secs(1);
/// Wait before the next session.
const RECONNECT: Duration = Duration::from_secs(2);
/// Wait before a hold, its release or a policy is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Serves a source's jobs until the agent stops.
pub async fn run(ctx: Arc<AgentContext>, flow: Arc<Flow>, mirror: Arc<Mirror>) {
    let all = Lane { ctx: ctx.clone(), flow: flow.clone(), mirror: mirror.clone(), kinds: ALL };
    let quick = Lane { ctx, flow, mirror: mirror.clone(), kinds: QUICK };
    let mut lanes = JoinSet::new();
    lanes.spawn(all.run());
    lanes.spawn(quick.run());
    lanes.spawn(async move { mirror.run().await });
    // The mirror ends when the lanes have: dropping the set ends it.
    for _ in 0..2 {
        lanes.join_next().await;
    }
}

/// What wakes a lane.
type Woken = mpsc::UnboundedReceiver<Notification>;

/// One job after the other.
struct Lane {
    ctx: Arc<AgentContext>,
    flow: Arc<Flow>,
    mirror: Arc<Mirror>,
    kinds: &'static [&'static str],
}

impl Lane {
    async fn run(self) {
        let mut failures = 0;
        while !self.ctx.is_stopping() {
            let began = Instant::now();
            let Err(e) = self.session().await else { return };
            if began.elapsed() > POLL * 5 {
                failures = 0;
            }
            failures += 1;
            // Once is a restart of the server, of which the stream says more.
            if failures > 3 {
                let message = format!("{}; trying again", e.report());
                self.ctx.alarms.raise(alarms::JOBS_FAILED, &self.ctx.source, message);
            }
            tokio::select! {
                () = tokio::time::sleep(RECONNECT) => {}
                () = self.ctx.stopped() => {}
            }
        }
    }

    /// `Ok` when the agent stops.
    async fn session(&self) -> Result<()> {
        let dsn = self.ctx.dsn.with_application_name("coffer jobs");
        let (client, mut woken) = sql::connect_listening(&dsn).await?;
        reporter::require_same_system(&self.ctx, &client).await?;
        client.batch_execute("LISTEN coffer_jobs").await.sql("cannot listen for jobs")?;
        claim::begin(&client).await?;
        self.ctx.alarms.clear(alarms::JOBS_FAILED, &self.ctx.source);
        while !self.ctx.is_stopping() {
            if let Some(job) = claim::next(&client, self.kinds, &self.ctx).await? {
                // A session that broke meanwhile shows at the next claim.
                self.work(&client, &mut woken, &job).await?;
                continue;
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                n = woken.recv() => {
                    if n.is_none() {
                        return Err(Error::new(Kind::Unreachable, "the session that listens for jobs has ended"));
                    }
                }
                () = self.ctx.stopped() => {}
            }
        }
        Ok(())
    }

    /// Carries a job out, and says so.
    async fn work(&self, client: &sql::SqlClient, woken: &mut Woken, job: &Claimed) -> Result<()> {
        tracing::info!(source = self.ctx.source, job = job.job, kind = job.kind, "begun, attempt {}", job.attempt);
        failpoints::hit(failpoints::JOB_AFTER_CLAIM)?;
        let step = Step::default();
        let done = kinds::carry_out(&self.ctx, &self.flow, &self.mirror, job, &step);
        tokio::pin!(done);
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut broken = None;
        let done = loop {
            tokio::select! {
                r = &mut done => break r,
                () = self.ctx.stopped(), if !step.is_cancelled() => {
                    step.cancel();
                    continue;
                }
                // A cancellation says so; whatever else was said is found by the next claim.
                Some(_) = woken.recv() => {}
                _ = beat.tick() => {}
            }
            if broken.is_some() {
                continue;
            }
            match job.progress(client, &step).await {
                Ok(Verdict::Go) => {}
                // Lost: another has it, which will find what is recorded; two are of no use.
                Ok(Verdict::Cancel | Verdict::Lost) => step.cancel(),
                Err(e) => broken = Some(e),
            }
        };
        // The session is gone, and with it the claim's life: whoever claims it next finds what is done.
        if let Some(e) = broken {
            return Err(e);
        }
        failpoints::hit(failpoints::JOB_BEFORE_FINISH)?;
        match done {
            Ok(done) => {
                let said = if done.error.is_none() { "done" } else { "failed" };
                tracing::info!(source = self.ctx.source, job = job.job, kind = job.kind, "{said}");
                job.finish(client, said, Some(&done.result), done.error.as_deref()).await
            }
            Err(_) if self.ctx.is_stopping() => job.give_back(client, Duration::ZERO, "the agent was stopped").await,
            Err(e) if e.is_code("cancelled") => job.finish(client, "cancelled", None, None).await,
            Err(e) if job.is_word() && e.kind() == Kind::Unreachable => {
                job.give_back(client, AGAIN, &format!("{e}; trying again")).await
            }
            Err(e) => {
                tracing::warn!(source = self.ctx.source, job = job.job, kind = job.kind, "failed: {e}");
                let document = e.to_json();
                job.finish(client, "failed", Some(&document), Some(&claim::error_text(&e))).await
            }
        }
    }
}
