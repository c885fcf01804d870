//! Restore into the live database, while everybody else goes on working.
//!
//! The difference between the tenant's rows at the target and its live rows is computed first and staged in temporary
//! tables; then the tenant's writers are fenced off, the difference is applied in one transaction, checked and
//! committed, and the fences are removed. Rows that do not differ are not touched, rows of other tenants cannot be:
//! every statement asks whose the row is. No table is locked beyond ROW EXCLUSIVE, but for the instant in which a
//! fence is made or removed.

mod apply;
pub mod compare;
mod constraints;
pub mod diff;
mod fence;
pub(crate) mod live;
pub(crate) mod mapping;
mod sequences;
mod stage;
mod statements;

use crate::dsn::Dsn;
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::merge::Scratch;
use crate::restore::keys::RowKey;
use crate::restore::once::Note;
use crate::restore::request::TableReport;
use crate::restore::sink::Watch;
use crate::snapshot::catalog;
use crate::sql::{self, SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::{Class, Lsn, TenantKind};
use compare::{Comparison, CoveredTable, Pass, RowChange, TableOutcome, Target};
pub(crate) use fence::any as any_fence;
use live::LiveTable;
pub(crate) use live::literal;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// How long a restore that is over waits for whoever keeps it from removing its fences: they hold nobody up, and `coffer
/// run` goes on trying.
const REMOVAL: Duration = Duration::from_secs(10);

/// What the caller asks for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Counts only; nothing is staged, fenced or changed.
    pub dry_run: bool,
    /// `name` or `schema.name`; empty: all.
    pub tables: Vec<String>,
    /// Empty: all.
    pub classes: Vec<Class>,
    /// Only these rows of the one table; empty: all.
    pub keys: Vec<RowKey>,
    /// The tenant is to be new here: refused when it has rows.
    pub new_tenant: bool,
}

/// What a restore in place did, or would do.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub tables: Vec<TableReport>,
    /// Of the target's rows, as text.
    pub bytes: u64,
    /// What takes this one back ([`When::Undo`](crate::history::When), or a position); `None` when nothing was changed.
    pub undo: Option<String>,
    pub warnings: Vec<String>,
}

/// What a table's rows then and now differ in. Counts and operations are those of a restore to then.
pub struct Looked {
    pub relation: String,
    /// Names of the key's columns; none: rows are told apart by the whole row.
    pub key: Vec<String>,
    /// Columns that the target does not have.
    pub added: Vec<String>,
    /// Columns that the target had.
    pub dropped: Vec<String>,
    pub counts: diff::Counts,
    pub rows: Vec<RowChange>,
}

/// A restore in place: where, whose, and what with.
pub struct InPlace<'a> {
    pub dsn: &'a Dsn,
    pub tenant: &'a Tenant,
    /// The tenant's uid.
    pub uid: Uuid,
    pub target: Arc<dyn Target>,
    pub scratch: &'a Scratch,
    /// Bytes for sorting.
    pub memory: usize,
    pub options: &'a Options,
    /// The job that it is for.
    pub(super) note: Option<&'a Note>,
    /// Asked between steps until the commit; the target asks it at every row.
    pub watch: &'a Watch,
}

impl InPlace<'_> {
    /// The session to [`Self::run`] over: nobody else restores in place while it lasts, unless this is a dry run.
    ///
    /// # Errors
    /// `Fenced`: another restore runs. `Refused`: not with this tenant, or not in this server.
    pub async fn session(&self) -> Result<SqlClient> {
        if self.tenant.kind == TenantKind::Shared {
            return Err(Error::new(
                Kind::Refused,
                "shared tables are everybody's: they are not restored in place, only to files or to a new database",
            ));
        }
        let client = sql::connect(&self.dsn.with_application_name("coffer restore")).await?;
        standby_is_refused(&client).await?;
        if !self.options.dry_run {
            fence::only_one(&client).await?;
        }
        Ok(client)
    }

    /// Does it.
    ///
    /// # Errors
    /// `Refused`: rows of the target belong to others now, or a constraint would break; nothing was changed. `Fenced`:
    /// locks were not to be had; nothing was changed. Code `commit_unknown`: the session was lost in the commit.
    pub async fn run(&self, client: &SqlClient) -> Result<Outcome> {
        let mut warnings = Vec::new();
        let (tables, others) = self.tables(client).await?;
        if tables.is_empty() {
            return Err(Error::new(Kind::NotFound, "none of the covered tables can hold rows of this tenant")
                .hint("see coffer.coverage; --table takes name or schema.name"));
        }
        let nobodys = self.nobodys(client).await?;
        let pass = || Pass {
            dsn: self.dsn,
            target: &self.target,
            tables: &tables,
            others: &others,
            restricted: !self.options.tables.is_empty() || !self.options.classes.is_empty(),
            scratch: self.scratch,
            memory: self.memory,
            look: None,
            exact: None,
        };
        if self.options.dry_run {
            let found = pass().run(None).await?;
            return Ok(outcome(&tables, found, None, warnings));
        }
        fence::remove_leftovers(client, fence::PATIENCE).await?;
        let settings = restore_settings(client, self.tenant, &mut warnings).await?;
        let mut staged = BTreeSet::new();
        let (tx, rx) = tokio::sync::mpsc::channel(8);
        let first = pass();
        let (found, written) = tokio::join!(first.run(Some(tx)), stage::write(client, &tables, &mut staged, rx));
        // A staging that failed ends the comparison too; its own error says why.
        written?;
        let found = found?;
        if found.tables.iter().all(|t| t.counts.is_empty()) {
            let done = outcome(&tables, found, None, warnings);
            if let Some(n) = self.note {
                let written = n.write(client, done.tables.clone(), done.bytes, None, done.warnings.clone()).await;
                written.sql("cannot note that the job is done")?.require()?;
            }
            return Ok(done);
        }
        let compared: Vec<&LiveTable> = found.tables.iter().map(|t| &tables[&t.relid]).collect();
        let done = match self.fence(client, &compared).await {
            Err(e) => Err(e),
            Ok(()) => {
                let (tenant, uid, note, watch) = (self.tenant, self.uid, self.note, self.watch);
                let rows = !self.options.keys.is_empty();
                apply::Apply {
                    client,
                    tenant,
                    pass: pass(),
                    staged,
                    comparison: found,
                    settings,
                    note,
                    watch,
                    uid,
                    rows,
                    nobodys: &nobodys,
                }
                .run()
                .await
            }
        };
        let unfenced = unfence(self.dsn, client, &compared).await;
        let done = match (done, unfenced) {
            (Err(e), Err(u)) => return Err(e.hint(format!("fences are left behind: {u}; `coffer run` removes them"))),
            (Err(e), Ok(())) => return Err(e),
            (Ok(d), Ok(())) => d,
            (Ok(d), Err(u)) => {
                warnings.push(format!("fences are left behind and hold nobody up: {u}; `coffer run` removes them"));
                d
            }
        };
        Ok(outcome(&tables, done.comparison, Some(done.undo), warnings))
    }

    /// The tables in which the tenant is to have no row: where it is to be new here, all of them, whatever the restore
    /// is of; else none.
    async fn nobodys(&self, client: &SqlClient) -> Result<Vec<LiveTable>> {
        if !self.options.new_tenant {
            return Ok(Vec::new());
        }
        let all = live::tables(client, self.tenant, &|_| true).await?;
        match live::any_with_rows(client, &all).await.sql("cannot look for rows of the new tenant")? {
            None => Ok(all),
            Some(t) => Err(Error::new(
                Kind::Refused,
                format!("tenant {} has rows in {}: a copy goes to a key of nobody", self.tenant, t.name()),
            )
            .code("conflict")),
        }
    }

    /// Compares, and changes and locks nothing: every table with at most `rows` of its differences.
    pub async fn look(&self, rows: usize) -> Result<(Vec<Looked>, Vec<String>)> {
        let client = sql::connect(&self.dsn.with_application_name("coffer diff")).await?;
        let (tables, others) = self.tables(&client).await?;
        let found = Pass {
            dsn: self.dsn,
            target: &self.target,
            tables: &tables,
            others: &others,
            restricted: !self.options.tables.is_empty() || !self.options.classes.is_empty(),
            scratch: self.scratch,
            memory: self.memory,
            look: Some(rows),
            exact: None,
        }
        .run(None)
        .await?;
        let looked = |t: TableOutcome| {
            let m = &t.mapping;
            let key = m.key.iter().map(|k| m.columns[*k].name.clone()).collect();
            Looked {
                relation: tables[&t.relid].name(),
                key,
                added: m.newer.clone(),
                dropped: m.dropped.clone(),
                counts: t.counts,
                rows: t.rows,
            }
        };
        Ok((found.tables.into_iter().map(looked).collect(), found.warnings))
    }

    /// The tables of the restore, and the relids of all covered ones that are not in it.
    async fn tables(&self, client: &SqlClient) -> Result<(BTreeMap<u32, LiveTable>, BTreeSet<u32>)> {
        let o = self.options;
        let mut out = BTreeMap::new();
        let mut asked: BTreeSet<&String> = o.tables.iter().collect();
        for mut t in live::tables(client, self.tenant, &|rule| {
            let plain = format!("{}.{}", rule.schema, rule.name);
            let named = o.tables.iter().any(|n| *n == rule.name || *n == plain || *n == rule.qualified());
            (o.tables.is_empty() || named) && (o.classes.is_empty() || o.classes.contains(&rule.class))
        })
        .await?
        {
            let plain = format!("{}.{}", t.rule.schema, t.rule.name);
            asked.retain(|n| **n != t.rule.name && **n != plain && **n != t.rule.qualified());
            if !o.keys.is_empty() {
                live::only(client, &mut t, &o.keys, self.tenant).await?;
            }
            out.insert(t.rule.relid, t);
        }
        if let Some(n) = asked.first() {
            return Err(Error::new(Kind::NotFound, format!("no covered table {n} can hold rows of this tenant")));
        }
        let mut others: BTreeSet<u32> = catalog::rules(client).await?.iter().map(|r| r.relid).collect();
        others.retain(|relid| !out.contains_key(relid));
        Ok((out, others))
    }

    async fn fence(&self, client: &SqlClient, tables: &[&LiveTable]) -> Result<()> {
        for t in tables {
            fence::make(client, t, self.tenant).await?;
        }
        failpoints::hit(failpoints::RESTORE_AFTER_FENCE)
    }
}

pub(super) async fn standby_is_refused(client: &SqlClient) -> Result<()> {
    let row =
        client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await.sql("cannot ask for the server's role")?;
    if row.get(0) {
        return Err(Error::new(Kind::Refused, "the server is a standby and takes no writes")
            .hint("let the source's url, or --target, name the primary"));
    }
    Ok(())
}

/// Whether the extension lets this role switch off triggers and give way to clients at once. Without, what the role
/// itself may set is set for the session, each with a warning of what follows where it may not.
async fn restore_settings(client: &SqlClient, tenant: &Tenant, warnings: &mut Vec<String>) -> Result<bool> {
    // In a transaction of its own: the settings end with it.
    match client.batch_execute(&apply::restore_settings(tenant)).await {
        Ok(()) => return Ok(true),
        Err(e)
            if e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)
                || e.code() == Some(&SqlState::UNDEFINED_FUNCTION) => {}
        Err(e) => return Err(sql::sql_error(e, "cannot prepare the session")),
    }
    for (statement, without) in [
        (
            "SET session_replication_role = replica",
            "triggers of the tables fire during the restore: the role may not set session_replication_role",
        ),
        (
            "SET deadlock_timeout = '5ms'",
            "clients of the tenant may be the ones to give way in a deadlock: the role may not set deadlock_timeout",
        ),
    ] {
        match client.batch_execute(statement).await {
            Ok(()) => {}
            Err(e) if e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                tracing::warn!("{without}");
                warnings.push(without.to_owned());
            }
            Err(e) => return Err(sql::sql_error(e, statement)),
        }
    }
    Ok(false)
}

/// Removes the fences, over a new session when the restore's own is gone.
async fn unfence(dsn: &Dsn, client: &SqlClient, tables: &[&LiveTable]) -> Result<()> {
    let new = if client.is_closed() { Some(sql::connect(dsn).await?) } else { None };
    let tables: Vec<(u32, String)> = tables.iter().map(|t| (t.rule.relid, t.name())).collect();
    fence::remove(new.as_ref().unwrap_or(client), &tables, REMOVAL).await
}

/// Removes fences that restores left behind, unless one is running: one attempt for each.
pub async fn remove_leftover_fences(dsn: &Dsn) -> Result<()> {
    let client = sql::connect(&dsn.with_application_name("coffer fences")).await?;
    if fence::first(&client).await? {
        fence::remove_leftovers(&client, Duration::ZERO).await?;
    }
    Ok(())
}

fn outcome(
    tables: &BTreeMap<u32, LiveTable>,
    comparison: Comparison,
    undo: Option<String>,
    mut warnings: Vec<String>,
) -> Outcome {
    warnings.extend(comparison.warnings);
    let bytes = comparison.tables.iter().map(|t| t.counts.bytes).sum();
    let tables = comparison
        .tables
        .iter()
        .map(|t| TableReport {
            relation: tables[&t.relid].name(),
            inserted: t.counts.inserted,
            updated: t.counts.updated,
            deleted: t.counts.deleted,
            unchanged: t.counts.unchanged + t.counts.kept,
        })
        .collect();
    Outcome { tables, bytes, undo, warnings }
}

/// Tables that the log's bases cover at a target, for a [`Target`].
pub fn covered_at<'a>(
    records: impl Iterator<Item = &'a crate::repository::model::LogRecord>,
    target: Lsn,
) -> Vec<CoveredTable> {
    use crate::repository::model::Body;
    let mut out: BTreeMap<u32, CoveredTable> = BTreeMap::new();
    for r in records {
        match &r.body {
            Body::Base(b) => {
                for t in b.tables.iter().filter(|t| t.cut_lsn <= target) {
                    out.insert(t.relid, CoveredTable { relid: t.relid, name: t.name.clone() });
                }
            }
            // What was covered before is covered again only by its new base.
            Body::Gap { .. } if r.upto_lsn <= target => out.clear(),
            _ => {}
        }
    }
    out.into_values().collect()
}
