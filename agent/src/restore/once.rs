//! A restore that a job of the source asked for is made once.
//!
//! The transaction that makes it also writes the job's result beside the job's row (`coffer._agent_job_commits`). Whoever
//! takes the job up again, because an agent died before it could say so or lost its session, finds the result there and
//! restores nothing: what was written since is left alone.

use super::request::{Report, TableReport};
use crate::error::{Error, Kind, Result};
use crate::sql::{SqlClient, SqlContext};
use serde_json::Value;
use std::time::Instant;
use tokio_postgres::types::Json;
use uuid::Uuid;

/// The job that a restore is for, as its row has it while it runs.
#[derive(Clone, Copy, Debug)]
pub struct OfJob {
    pub job: i64,
    /// Who is at it.
    pub claim: Uuid,
}

/// What an attempt committed.
#[derive(Debug)]
pub struct Committed {
    /// [`Report::document`], without what was done after the commit.
    pub result: Value,
    /// The source's clock, microseconds since 1970-01-01 UTC.
    pub at_us: i64,
}

impl OfJob {
    /// What an earlier attempt committed. `None` is certain: an attempt that is about to commit is waited for.
    pub async fn committed(self, client: &SqlClient) -> Result<Option<Committed>> {
        let what = "cannot look whether the job is done";
        // The same key as that of an attempt whose commit is under way.
        client.batch_execute("BEGIN").await.sql(what)?;
        client
            .query_one("SELECT coffer._agent_job_commits($1, $2, '{}')", &[&self.job, &self.claim])
            .await
            .sql(what)?;
        client.batch_execute("ROLLBACK").await.sql(what)?;
        let found = client
            .query_opt(
                "SELECT result, (extract(epoch FROM committed_at) * 1000000)::int8 FROM coffer._agent_job_committed($1)",
                &[&self.job],
            )
            .await
            .sql(what)?;
        Ok(found.map(|r| Committed { result: r.get(0), at_us: r.get(1) }))
    }
}

/// What is known of a job's restore before it is made.
pub(super) struct Note {
    of: OfJob,
    report: Report,
    began: Instant,
}

impl Note {
    pub(super) fn new(of: OfJob, report: Report, began: Instant) -> Self {
        Self { of, report, began }
    }

    /// Writes the job's result, in the transaction that makes the restore.
    pub(super) async fn write(
        &self,
        client: &SqlClient,
        tables: Vec<TableReport>,
        bytes: u64,
        undo: Option<String>,
        warnings: Vec<String>,
    ) -> std::result::Result<Written, tokio_postgres::Error> {
        let seconds = self.began.elapsed().as_secs_f64();
        let report = Report { tables, bytes, seconds, undo, warnings, ..self.report.clone() };
        let row = client
            .query_one(
                "SELECT coffer._agent_job_commits($1, $2, $3)",
                &[&self.of.job, &self.of.claim, &Json(report.document())],
            )
            .await?;
        Ok(Written { is_ours: row.get(0), job: self.of.job })
    }
}

/// Whether the job was still there to be done.
#[must_use]
pub(super) struct Written {
    is_ours: bool,
    job: i64,
}

impl Written {
    /// # Errors
    /// Code `cancelled`: the job is no longer this claim's, and the transaction is to be rolled back.
    pub(super) fn require(self) -> Result<()> {
        if self.is_ours {
            return Ok(());
        }
        let what = format!("job {} was cancelled, or is done or claimed by another; nothing was changed", self.job);
        Err(Error::new(Kind::Refused, what).code("cancelled"))
    }
}
