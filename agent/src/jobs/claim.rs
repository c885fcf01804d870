//! A job's row, as the agent holds it: the SQL side of a lane.

use super::step::Step;
use crate::error::{Error, Result};
use crate::restore::once::OfJob;
use crate::run::AgentContext;
use crate::sql::{SqlClient, SqlContext};
use coffer_wire::Lsn;
use serde_json::Value;
use std::time::Duration;
use uuid::Uuid;

/// A job that is ours to do.
#[derive(Debug)]
pub struct Claimed {
    pub job: i64,
    pub kind: String,
    /// The tenant's key.
    pub tenant: String,
    pub args: Value,
    pub requested_by: String,
    pub attempt: i32,
    /// Once everything up to here is durable, the job's own commit is.
    pub goal: Lsn,
    claim: Uuid,
}

/// What the row says to a job that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Go,
    /// Somebody called `coffer.cancel()`.
    Cancel,
    /// Another claim has it.
    Lost,
}

/// Marks the session as one that jobs are claimed for.
pub async fn begin(client: &SqlClient) -> Result<()> {
    client.execute("SELECT coffer._agent_jobs_begin()", &[]).await.sql("cannot serve jobs").map(drop)
}

/// Claims the oldest job of these kinds that nobody is at.
pub async fn next(client: &SqlClient, kinds: &[&str], ctx: &AgentContext) -> Result<Option<Claimed>> {
    let claim = crate::crypto::random::uuid();
    let agent = format!("coffer {} pid {}", env!("CARGO_PKG_VERSION"), std::process::id());
    let row = client
        .query_opt(
            "SELECT job, kind, tenant, args, requested_by, attempt, goal::text FROM coffer._agent_claim_job($1, $2, $3)",
            &[&kinds, &claim, &agent],
        )
        .await
        .sql("cannot claim a job")?;
    let Some(r) = row else { return Ok(None) };
    let goal: Lsn = r.get::<_, &str>(6).parse().map_err(Error::other)?;
    tracing::debug!(source = ctx.source, "job {} waits for {goal}", r.get::<_, i64>(0));
    Ok(Some(Claimed {
        job: r.get(0),
        kind: r.get(1),
        tenant: r.get(2),
        args: r.get(3),
        requested_by: r.get(4),
        attempt: r.get(5),
        goal,
        claim,
    }))
}

impl Claimed {
    /// An argument that is text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.args[name].as_str()
    }

    /// Whether somebody said something (a hold, its release, a policy) that is carried into the repository however often
    /// it takes.
    pub fn is_word(&self) -> bool {
        matches!(self.kind.as_str(), "hold" | "release" | "policy")
    }

    /// The job as its restore notes it.
    pub fn of_job(&self) -> OfJob {
        OfJob { job: self.job, claim: self.claim }
    }

    /// Says how far it is.
    pub async fn progress(&self, client: &SqlClient, step: &Step) -> Result<Verdict> {
        let (progress, message) = step.now();
        let row = client
            .query_one(
                "SELECT coffer._agent_job_progress($1, $2, $3, $4)",
                &[&self.job, &self.claim, &progress, &message],
            )
            .await
            .sql("cannot report a job's progress")?;
        Ok(match row.get::<_, &str>(0) {
            "go" => Verdict::Go,
            "cancel" => Verdict::Cancel,
            _ => Verdict::Lost,
        })
    }

    /// Ends it: `done`, `failed` or `cancelled`.
    pub async fn finish(
        &self,
        client: &SqlClient,
        state: &str,
        result: Option<&Value>,
        error: Option<&str>,
    ) -> Result<()> {
        let ours = client
            .query_one(
                "SELECT coffer._agent_finish_job($1, $2, $3, $4, $5)",
                &[&self.job, &self.claim, &state, &result, &error],
            )
            .await
            .sql("cannot report a job's end")?
            .get::<_, bool>(0);
        if !ours {
            tracing::warn!("job {} was claimed by another agent meanwhile", self.job);
        }
        Ok(())
    }

    /// Leaves it to the next claim, after a while.
    pub async fn give_back(&self, client: &SqlClient, after: Duration, message: &str) -> Result<()> {
        let after = after.as_secs_f64();
        client
            .execute(
                "SELECT coffer._agent_return_job($1, $2, pg_catalog.make_interval(secs => $3), $4)",
                &[&self.job, &self.claim, &after, &message],
            )
            .await
            .sql("cannot give a job back")
            .map(drop)
    }
}

/// The error as `coffer.wait()` takes it apart.
pub fn error_text(e: &Error) -> String {
    let report = e.report();
    report.strip_prefix("error: ").unwrap_or(&report).to_owned()
}
