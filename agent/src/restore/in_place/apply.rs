//! The one transaction that changes rows, and the attempts at it.
//!
//! Order is everything here, and was found by experiment: the fences exist before the first row is touched (a restore
//! that fenced afterwards deadlocked with clients); the rows to change are locked before the tenant's advisory lock is
//! taken exclusively; only then is the difference final. `deadlock_timeout` of 5 ms makes this session, not a client,
//! the one that gives way; a timeout or a deadlock rolls back everything and the attempt is made again.

use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::restore::in_place::compare::{Comparison, Pass};
use crate::restore::in_place::constraints::{self, ForeignKey, Guards, Unique};
use crate::restore::in_place::live::{self, LiveTable, literal};
use crate::restore::in_place::statements::{self, TableSql};
use crate::restore::in_place::{fence, sequences, stage};
use crate::restore::once::Note;
use crate::restore::sink::Watch;
use crate::sql::{self, SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::TenantKind;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio_postgres::error::{Severity, SqlState};
use uuid::Uuid;

/// How long attempts go on.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long one attempt waits for a lock.
const LOCK_TIMEOUT_MS: u32 = 2000;

/// What was done.
#[derive(Clone, Debug)]
pub struct Applied {
    pub comparison: Comparison,
    /// What takes this restore back: the id of its marker or, without the extension's leave to write one, a position
    /// read while the tenant's writers were out, just before the commit.
    pub undo: String,
}

/// Why an attempt ended without a result.
enum Stop {
    /// Another attempt may succeed.
    Again(String),
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(e: Error) -> Self {
        Self::Failed(e)
    }
}

/// Tells what may pass from what will not.
fn stop(e: tokio_postgres::Error, what: impl std::fmt::Display) -> Stop {
    match e.code() {
        Some(c)
            if [SqlState::T_R_DEADLOCK_DETECTED, SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_SERIALIZATION_FAILURE]
                .contains(c) =>
        {
            Stop::Again(sql::sql_error(e, what).to_string())
        }
        Some(c) if *c == SqlState::UNIQUE_VIOLATION || *c == SqlState::EXCLUSION_VIOLATION => {
            Stop::Failed(refused(sql::sql_error(e, what)))
        }
        Some(c) if c.code().starts_with("22") || c.code().starts_with("23") => {
            // A constraint or a type that is newer than the target.
            Stop::Failed(refused(sql::sql_error(e, what)))
        }
        Some(c) if *c == SqlState::INSUFFICIENT_PRIVILEGE => {
            Stop::Failed(sql::sql_error(e, what).hint(
                "let --target name a role that may write to the tenant's tables, or run coffer.setup_agent again",
            ))
        }
        _ => Stop::Failed(sql::sql_error(e, what)),
    }
}

/// Only a plain error says that nothing was committed: a session that is ended meanwhile may have committed before.
fn not_committed(e: tokio_postgres::Error) -> Stop {
    if e.as_db_error().is_some_and(|d| d.parsed_severity() == Some(Severity::Error)) {
        return stop(e, "cannot commit");
    }
    let what = "the connection was lost during the commit: it may have happened or not";
    Stop::Failed(
        Error::new(Kind::Unreachable, what)
            .code("commit_unknown")
            .hint("run the same restore with --dry-run: no difference means that it was committed")
            .source(e),
    )
}

fn differs(live: &LiveTable, verb: &str, found: u64, expected: u64) -> Stop {
    let what =
        format!("{}: {verb} would change {found} rows where {expected} differ; nothing was changed", live.name());
    Stop::Failed(Error::new(Kind::Refused, what).hint("a trigger, a rule or a partition of the table interferes"))
}

/// Switches off triggers until the transaction ends; rows that come back to a table whose tenant the session names are
/// the tenant's.
pub fn restore_settings(tenant: &Tenant) -> String {
    let key = match tenant.kind {
        TenantKind::Normal => literal(&tenant.key),
        _ => "NULL".to_owned(),
    };
    format!("SELECT coffer._agent_restore_settings({key})")
}

fn refused(e: Error) -> Error {
    Error::new(Kind::Refused, format!("the rows at the target do not fit the tables as they are now: {e}"))
        .hint("nothing was changed; restore to a schema or to files and move the rows by hand")
}

/// The transaction and what it needs.
pub struct Apply<'a> {
    pub client: &'a SqlClient,
    pub tenant: &'a Tenant,
    /// The tenant's.
    pub uid: Uuid,
    /// Of single rows only.
    pub rows: bool,
    /// Tables in which the tenant is to have no row before.
    pub nobodys: &'a [LiveTable],
    pub pass: Pass<'a>,
    /// Staging tables that exist, with the comparison they come from.
    pub staged: BTreeSet<u32>,
    pub comparison: Comparison,
    /// `coffer._agent_restore_settings` may be called.
    pub settings: bool,
    /// The job that it is for.
    pub note: Option<&'a Note>,
    pub watch: &'a Watch,
}

impl Apply<'_> {
    /// Attempts until one commits.
    pub async fn run(mut self) -> Result<Applied> {
        let relids: Vec<u32> = self.pass.tables.keys().copied().collect();
        let fks = constraints::foreign_keys(self.client, &relids).await?;
        let guards = Guards::of(self.client, &relids).await?;
        let began = Instant::now();
        for n in 1u32.. {
            match self.attempt(&fks, &guards).await {
                Ok(done) => return Ok(done),
                Err(s) => {
                    let rolled_back = self.client.batch_execute("ROLLBACK").await;
                    match s {
                        // Of a session that is gone this is the news, not that it cannot roll back.
                        Stop::Failed(e) => return Err(e),
                        Stop::Again(why) if began.elapsed() < PATIENCE => {
                            rolled_back.sql("cannot roll back")?;
                            tracing::info!(attempt = n, "the restore gives way and tries again: {why}");
                            let pause = 20 * u64::from(n.min(25)) + u64::from(rand::random::<u8>());
                            tokio::time::sleep(Duration::from_millis(pause)).await;
                        }
                        Stop::Again(why) => {
                            return Err(Error::new(
                                Kind::Fenced,
                                format!("the tenant's rows could not be locked for {PATIENCE:?}, last: {why}"),
                            )
                            .hint("nothing was changed; a client holds rows of the tenant in an open transaction"));
                        }
                    }
                }
            }
        }
        Err(Error::other("attempts are endless"))
    }

    async fn attempt(&mut self, fks: &[ForeignKey], guards: &Guards) -> std::result::Result<Applied, Stop> {
        let (client, uniques) = (self.client, &guards.uniques);
        self.watch.check()?;
        client
            .batch_execute(&format!("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}"))
            .await
            .map_err(|e| stop(e, "cannot begin"))?;
        if self.settings {
            client
                .batch_execute(&restore_settings(self.tenant))
                .await
                .map_err(|e| stop(e, "cannot switch off triggers"))?;
        }
        let (mut staged, mut comparison) = (self.staged.clone(), self.comparison.clone());
        self.lock_rows(&comparison, uniques).await?;
        fence::close(client, self.tenant).await.map_err(|e| stop(e, "cannot hold off the tenant's writers"))?;
        if self.changed_since(&comparison, uniques).await? {
            tracing::info!("the tenant's rows changed since they were compared: comparing again, with its writers out");
            let (tx, rx) = tokio::sync::mpsc::channel(8);
            let tables = self.pass.tables;
            let (again, written) = tokio::join!(self.pass.run(Some(tx)), stage::write(client, tables, &mut staged, rx));
            // A staging that failed ends the comparison too; its own error says why.
            written?;
            comparison = again?;
            self.lock_rows(&comparison, uniques).await?;
        }
        if let Some(t) = live::any_with_rows(client, self.nobodys)
            .await
            .map_err(|e| stop(e, "cannot look for rows of the new tenant"))?
        {
            let what =
                format!("tenant {} got rows of its own in {} meanwhile; nothing was changed", self.tenant, t.name());
            return Err(Stop::Failed(Error::new(Kind::Refused, what).code("conflict")));
        }
        self.write(&mut comparison, fks, guards).await?;
        let moved = sequences::move_forward(client, self.pass.tables, &mut comparison).await;
        moved.map_err(|e| stop(e, "cannot move the sequences on"))?;
        failpoints::hit(failpoints::RESTORE_BEFORE_COMMIT)?;
        self.watch.check()?;
        let undo = self.mark(&comparison).await?;
        client.batch_execute("COMMIT").await.map_err(not_committed)?;
        failpoints::hit(failpoints::RESTORE_AFTER_COMMIT)?;
        Ok(Applied { comparison, undo })
    }

    /// Notes where this restore is, and that its job is done with it.
    async fn mark(&self, comparison: &Comparison) -> std::result::Result<String, Stop> {
        let undo = self.position(comparison).await?;
        if let Some(note) = self.note {
            let done = super::outcome(self.pass.tables, comparison.clone(), Some(undo.clone()), Vec::new());
            let written = note.write(self.client, done.tables, done.bytes, done.undo, done.warnings).await;
            written.map_err(|e| stop(e, "cannot note that the job is done"))?.require()?;
        }
        Ok(undo)
    }

    /// Notes in the log where this restore is.
    async fn position(&self, comparison: &Comparison) -> std::result::Result<String, Stop> {
        if !self.settings {
            let row = self
                .client
                .query_one("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[])
                .await
                .map_err(|e| stop(e, "cannot read the position in the log"))?;
            return Ok(row.get(0));
        }
        let id = Uuid::new_v4();
        let changed: Vec<u32> = comparison.tables.iter().filter(|t| !t.counts.is_empty()).map(|t| t.relid).collect();
        self.client
            .execute("SELECT coffer._agent_restore_marker($1, $2, $3, $4)", &[&id, &self.uid, &changed, &self.rows])
            .await
            .map_err(|e| stop(e, "cannot mark the restore in the log"))?;
        Ok(id.to_string())
    }

    fn tables<'b>(
        &'b self,
        comparison: &'b Comparison,
        uniques: &'b BTreeMap<u32, Vec<Unique>>,
    ) -> impl Iterator<Item = (&'b LiveTable, &'b crate::restore::in_place::diff::Counts, TableSql<'b>)> {
        comparison.tables.iter().map(move |t| {
            let live = &self.pass.tables[&t.relid];
            (live, &t.counts, TableSql::new(live, &t.mapping, &uniques[&t.relid]))
        })
    }

    async fn lock_rows(
        &self,
        comparison: &Comparison,
        uniques: &BTreeMap<u32, Vec<Unique>>,
    ) -> std::result::Result<(), Stop> {
        for (live, counts, sql) in self.tables(comparison, uniques) {
            if counts.updated + counts.deleted == 0 {
                continue;
            }
            if let Some(s) = sql.lock_rows() {
                let what = format!("cannot lock the rows of {} that change", live.name());
                self.client.batch_execute(&s).await.map_err(|e| stop(e, what))?;
            }
        }
        Ok(())
    }

    /// Whether the tenant's rows are other rows than the comparison saw. Nobody can write to them now.
    async fn changed_since(
        &self,
        comparison: &Comparison,
        uniques: &BTreeMap<u32, Vec<Unique>>,
    ) -> std::result::Result<bool, Stop> {
        for (live, counts, sql) in self.tables(comparison, uniques) {
            let row = self
                .client
                .query_one(&sql.changed_since(comparison.xmin), &[])
                .await
                .map_err(|e| stop(e, format!("cannot look for changes of {}", live.name())))?;
            let (now, newer): (i64, i64) = (row.get(0), row.get(1));
            if newer > 0 || now as u64 != counts.live {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn write(
        &self,
        comparison: &mut Comparison,
        fks: &[ForeignKey],
        guards: &Guards,
    ) -> std::result::Result<(), Stop> {
        let uniques = &guards.uniques;
        let mut touched: Vec<_> = self.tables(&*comparison, uniques).filter(|(_, c, _)| !c.is_empty()).collect();
        touched.sort_by_key(|(live, _, _)| live.rule.parents.len());
        let mut taken_back = Vec::new();
        for (live, counts, sql) in &touched {
            if counts.inserted + counts.updated > 0 {
                self.refuse_rows_of_others(live, sql, &uniques[&live.rule.relid]).await?;
            }
            if counts.inserted > 0
                && let Some(s) = sql.take_back()
            {
                let n = self.client.execute(&s, &[]).await.map_err(|e| stop(e, "cannot take back rows of nobody"))?;
                if n > 0 {
                    taken_back
                        .push(format!("{}: {n} rows that had become nobody's are the tenant's again", live.name()));
                }
            }
        }
        let kept = self.keep_referenced(&touched, fks).await?;
        for (live, counts, sql) in &touched {
            if counts.updated + counts.deleted > 0
                && let Some(s) = sql.note_rows()
            {
                let what = format!("cannot note the rows of {} that change", live.name());
                self.client.batch_execute(&s).await.map_err(|e| stop(e, what))?;
            }
        }
        // Children go before the parents that say whose they are, and come after them.
        for (live, counts, sql) in touched.iter().rev() {
            if counts.deleted > 0 {
                self.change(live, "delete", &sql.delete(), Some(counts.deleted)).await?;
            }
        }
        for (live, counts, sql) in &touched {
            if counts.updated > 0
                && let Some(s) = sql.update(&counts.changed_columns)
            {
                self.update(live, sql, &s, counts.updated).await?;
            }
        }
        for (live, counts, sql) in &touched {
            if counts.inserted > 0 {
                let s = sql.insert();
                let expected = (!s.starts_with("DO ")).then_some(counts.inserted);
                self.change(live, "insert", &s, expected).await?;
            }
        }
        self.check_written(&touched, fks, &kept, guards).await?;
        for (live, counts, _) in &touched {
            self.all_are_the_tenants(live, counts).await?;
        }
        drop(touched);
        comparison.warnings.extend(taken_back);
        Ok(())
    }

    /// What the server does not check for a restore, and what it does beside it.
    async fn check_written(
        &self,
        touched: &[(&LiveTable, &crate::restore::in_place::diff::Counts, TableSql<'_>)],
        fks: &[ForeignKey],
        kept: &BTreeSet<usize>,
        guards: &Guards,
    ) -> std::result::Result<(), Stop> {
        for (i, fk) in fks.iter().enumerate() {
            for (live, counts, sql) in touched {
                if live.rule.relid == fk.child && counts.inserted + counts.updated > 0 {
                    self.check_parents(live, sql, fk).await?;
                }
            }
            if kept.contains(&i) {
                let what = format!("rows still refer to rows that the restore removes ({})", fk.name);
                self.must_be_empty(&statements::left_behind(fk, i), &what).await?;
            }
        }
        for (live, _, sql) in touched.iter().filter(|(_, c, _)| c.inserted + c.updated > 0) {
            for d in &guards.deferrables[&live.rule.relid] {
                let what = format!("the restore would break {} of {}", d.name, live.name());
                self.must_be_empty(&statements::duplicates(d, &live.is_tenants), &what).await?;
            }
            let triggers = &guards.triggers[&live.rule.relid];
            if !triggers.is_empty() {
                let what = format!(
                    "triggers that fire always ({}) make rows of {} other than they were at the target",
                    triggers.join(", "),
                    live.name()
                );
                self.must_be_empty(&sql.written_otherwise(), &what).await?;
            }
        }
        Ok(())
    }

    /// Whose a row is may stand elsewhere, in a parent that is another tenant's by now, say: the tenant has the rows that
    /// it was to have, or some were written to another.
    async fn all_are_the_tenants(
        &self,
        live: &LiveTable,
        counts: &crate::restore::in_place::diff::Counts,
    ) -> std::result::Result<(), Stop> {
        let row = self
            .client
            .query_one(&live.count(), &[])
            .await
            .map_err(|e| stop(e, format!("cannot count the tenant's rows of {}", live.name())))?;
        let (found, expected) = (row.get::<_, i64>(0) as u64, counts.live - counts.deleted + counts.inserted);
        if found == expected {
            return Ok(());
        }
        let what = format!(
            "rows of {} at the target would be another tenant's: the tenant would have {found} of {expected} rows; \
             nothing was changed",
            live.name()
        );
        Err(Stop::Failed(
            Error::new(Kind::Refused, what).code("conflict").hint(
                "what they refer to is another tenant's now: restore to a schema or to files and decide row by row",
            ),
        ))
    }

    async fn refuse_rows_of_others(
        &self,
        live: &LiveTable,
        sql: &TableSql<'_>,
        uniques: &[Unique],
    ) -> std::result::Result<(), Stop> {
        for u in uniques {
            if let Some(s) = sql.taken_by_others(u) {
                let what = format!(
                    "rows of {} at the target belong to another tenant {} ({})",
                    live.name(),
                    if self.rows { "or to rows that are not restored" } else { "now" },
                    u.columns.join(", ")
                );
                self.must_be_empty(&s, &what).await?;
            }
        }
        Ok(())
    }

    /// Returns the numbers of the foreign keys for which something was kept.
    async fn keep_referenced(
        &self,
        touched: &[(&LiveTable, &crate::restore::in_place::diff::Counts, TableSql<'_>)],
        fks: &[ForeignKey],
    ) -> std::result::Result<BTreeSet<usize>, Stop> {
        let mut kept = BTreeSet::new();
        for (i, fk) in fks.iter().enumerate() {
            let Some((live, counts, sql)) = touched.iter().find(|(l, _, _)| l.rule.relid == fk.parent) else {
                continue;
            };
            if counts.deleted + counts.updated == 0 {
                continue;
            }
            let Some(s) = sql.keep_referenced(fk, i) else {
                return Err(Stop::Failed(Error::new(
                    Kind::Refused,
                    format!("{}: {} refers to columns that are newer than the target", live.name(), fk.name),
                )));
            };
            self.client
                .batch_execute(&s)
                .await
                .map_err(|e| stop(e, format!("cannot prepare the check of {}", fk.name)))?;
            kept.insert(i);
        }
        Ok(kept)
    }

    async fn check_parents(
        &self,
        live: &LiveTable,
        sql: &TableSql<'_>,
        fk: &ForeignKey,
    ) -> std::result::Result<(), Stop> {
        let what = format!("rows of {} at the target refer to rows that do not exist ({})", live.name(), fk.name);
        if let Some(lock) = sql.lock_parents(fk) {
            self.client
                .batch_execute(&lock)
                .await
                .map_err(|e| stop(e, format!("cannot lock the parents for {}", fk.name)))?;
        }
        match sql.orphans(fk) {
            Some(s) => self.must_be_empty(&s, &what).await,
            None => Ok(()),
        }
    }

    /// Updates; where that meets a unique index or an exclusion constraint, by deleting and inserting.
    async fn update(
        &self,
        live: &LiveTable,
        sql: &TableSql<'_>,
        statement: &str,
        expected: u64,
    ) -> std::result::Result<(), Stop> {
        let client = self.client;
        let savepoint = |e| stop(e, "cannot set a savepoint");
        client.batch_execute("SAVEPOINT coffer_update").await.map_err(savepoint)?;
        match client.execute(statement, &[]).await {
            Err(e) if [Some(&SqlState::UNIQUE_VIOLATION), Some(&SqlState::EXCLUSION_VIOLATION)].contains(&e.code()) => {
                client.batch_execute("ROLLBACK TO SAVEPOINT coffer_update").await.map_err(savepoint)?;
                for (i, s) in sql.update_by_replacing().iter().enumerate() {
                    let expected = (i > 0).then_some(expected);
                    self.change(live, "replace", s, expected).await?;
                }
                Ok(())
            }
            Err(e) => Err(stop(e, format!("cannot update rows of {}", live.name()))),
            Ok(n) if n != expected => Err(differs(live, "update", n, expected)),
            Ok(_) => Ok(()),
        }
    }

    async fn change(
        &self,
        live: &LiveTable,
        verb: &str,
        statement: &str,
        expected: Option<u64>,
    ) -> std::result::Result<(), Stop> {
        let n = self
            .client
            .execute(statement, &[])
            .await
            .map_err(|e| stop(e, format!("cannot {verb} rows of {}", live.name())))?;
        match expected {
            Some(e) if e != n => Err(Stop::Failed(
                Error::new(
                    Kind::Refused,
                    format!("{}: {verb} would change {n} rows where {e} differ; nothing was changed", live.name()),
                )
                .hint("a trigger, a rule or a partition of the table interferes"),
            )),
            _ => Ok(()),
        }
    }

    /// Runs a check; each row it returns is one that the restore must not leave behind.
    async fn must_be_empty(&self, check: &str, what: &str) -> std::result::Result<(), Stop> {
        let rows = self.client.query(check, &[]).await.map_err(|e| stop(e, format!("cannot check: {what}")))?;
        if rows.is_empty() {
            return Ok(());
        }
        let listed: Vec<String> =
            rows.iter().map(|r| r.get::<_, Option<String>>(0).unwrap_or_else(|| "NULL".to_owned())).collect();
        let more = if listed.len() == statements::SHOWN { " and maybe more" } else { "" };
        Err(Stop::Failed(
            Error::new(Kind::Refused, format!("{what}: {}{more}; nothing was changed", listed.join("; ")))
                .code("conflict")
                .hint("restore to a schema or to files and decide row by row"),
        ))
    }
}
