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

pub use backup::HOLDER;
pub use mirror::Mirror;

use crate::alarms;
use crate::demux::Flow;
use crate::dsn::Dsn;
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::run::AgentContext;
use crate::sql::{self, SqlClient, SqlContext};
use claim::{Claimed, Verdict};
use futures::FutureExt;
use kinds::Work;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
/// What is said sooner than this after the last time waits.
const DEAF: Duration = Duration::from_millis(50);
/// Wait before the next session.
const RECONNECT: Duration = Duration::from_secs(2);
/// Wait before a hold, its release, a policy, or a restore beside another, is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Serves a source's jobs until the agent stops.
pub async fn run(ctx: Arc<AgentContext>, flow: Arc<Flow>, mirror: Arc<Mirror>) {
    let lane = |kinds| Lane {
        ctx: ctx.clone(),
        flow: flow.clone(),
        mirror: mirror.clone(),
        kinds,
        broke_off: AtomicBool::new(false),
    };
    let (all, quick) = (lane(ALL), lane(QUICK));
    let (mut lanes, mut views) = (JoinSet::new(), JoinSet::new());
    lanes.spawn(all.run());
    lanes.spawn(quick.run());
    // Goes on until the lanes have ended: dropping the set ends it.
    views.spawn(async move { mirror.run().await });
    while lanes.join_next().await.is_some() {}
}

/// What wakes a lane: whoever is connected can say it, and as often as it likes.
struct Woken {
    notified: mpsc::Receiver<Notification>,
    heard: Option<Instant>,
}

impl Woken {
    /// Something was said, once for all that was said together and not more often than every [`DEAF`]. False: the session
    /// has ended. What is dropped half-way says it again.
    async fn news(&mut self) -> bool {
        if let Some(heard) = self.heard {
            tokio::time::sleep_until(heard + DEAF).await;
        }
        if self.notified.recv().await.is_none() {
            return false;
        }
        while self.notified.try_recv().is_ok() {}
        self.heard = Some(Instant::now());
        true
    }
}

/// One job after the other.
struct Lane {
    ctx: Arc<AgentContext>,
    flow: Arc<Flow>,
    mirror: Arc<Mirror>,
    kinds: &'static [&'static str],
    /// A job ended in a panic, and none has ended otherwise since.
    broke_off: AtomicBool,
}

impl Lane {
    async fn run(self) {
        let mut failures = 0;
        while !self.ctx.is_stopping() {
            let began = Instant::now();
            let ended = AssertUnwindSafe(self.session()).catch_unwind().await;
            if began.elapsed() > POLL * 5 {
                failures = 0;
            }
            failures += 1;
            let why = match ended {
                Ok(Ok(())) => return,
                Ok(Err(e)) => e.report(),
                Err(_) => {
                    self.broke_off.store(true, Ordering::Relaxed);
                    "a job ended in a panic, see the log for where".to_owned()
                }
            };
            // Once is a restart of the server, of which the stream says more.
            if failures > 3 || self.broke_off.load(Ordering::Relaxed) {
                self.ctx.alarms.raise(alarms::JOBS_FAILED, &self.ctx.source, format!("{why}; trying again"));
            }
            tokio::select! {
                () = tokio::time::sleep(RECONNECT) => {}
                () = self.ctx.stopped() => {}
            }
        }
    }

    /// `Ok` when the agent stops.
    async fn session(&self) -> Result<()> {
        let dsn = self.ctx.source_dsn().await?.with_application_name("coffer jobs");
        let (client, notified) = sql::connect_listening(&dsn.sending_little()).await?;
        let mut woken = Woken { notified, heard: None };
        client.commit_locally().await?;
        client.batch_execute("LISTEN coffer_jobs").await.sql("cannot listen for jobs")?;
        claim::begin(&client).await?;
        if !self.broke_off.load(Ordering::Relaxed) {
            self.ctx.alarms.clear(alarms::JOBS_FAILED, &self.ctx.source);
        }
        while !self.ctx.is_stopping() {
            self.ctx.require_followed(&client)?;
            if let Some(job) = claim::next(&client, self.kinds, &self.ctx).await? {
                // A session that broke meanwhile shows at the next claim.
                self.work((&dsn, &client), &mut woken, &job).await?;
                if self.broke_off.swap(false, Ordering::Relaxed) {
                    self.ctx.alarms.clear(alarms::JOBS_FAILED, &self.ctx.source);
                }
                continue;
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                alive = woken.news() => {
                    if !alive {
                        return Err(Error::new(Kind::Unreachable, "the session that listens for jobs has ended"));
                    }
                }
                () = self.ctx.stopped() => {}
            }
        }
        Ok(())
    }

    /// Carries a job out, and says so.
    async fn work(&self, (dsn, client): (&Dsn, &SqlClient), woken: &mut Woken, job: &Claimed) -> Result<()> {
        tracing::info!(source = self.ctx.source, job = job.job, kind = job.kind, "begun, attempt {}", job.attempt);
        failpoints::hit(failpoints::JOB_AFTER_CLAIM)?;
        let step = Step::default();
        let work = Work { ctx: &self.ctx, dsn, flow: &self.flow, mirror: &self.mirror, job, step: &step };
        let done = work.carry_out();
        tokio::pin!(done);
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut broken = None;
        let done = loop {
            tokio::select! {
                biased;
                r = &mut done => break r,
                () = self.ctx.stopped(), if !step.is_cancelled() => {
                    step.cancel();
                    continue;
                }
                _ = beat.tick() => {}
                // A cancellation says so; whatever else was said is found by the next claim.
                true = woken.news() => {}
            }
            if broken.is_some() {
                continue;
            }
            let verdict = tokio::select! {
                biased;
                // Whatever the row waits for, the work does not.
                r = &mut done => break r,
                v = job.progress(client, &step) => v,
            };
            match verdict {
                Ok(Verdict::Go) => {}
                // Lost: another has it, which will find what is recorded; two are of no use.
                Ok(Verdict::Cancel | Verdict::Lost) => step.cancel(),
                Err(e) => {
                    broken = Some(e);
                    step.cancel();
                }
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
            Err(e) if job.is_word() && e.kind() == Kind::Unreachable || e.is_code("busy") => {
                job.give_back(client, AGAIN, &format!("{e}; trying again")).await
            }
            Err(e) => {
                self.ctx.damage.complain(&e);
                tracing::warn!(source = self.ctx.source, job = job.job, kind = job.kind, "failed: {e}");
                let document = e.to_json();
                job.finish(client, "failed", Some(&document), Some(&claim::error_text(&e))).await
            }
        }
    }
}
