//! One job of bases: all tables that lack one are read, merged with what their snapshots do not see, and recorded at
//! one cut.
//!
//! ```text
//!  tables ─ COPY ─► merge ◄─ changesets and truncates that the snapshots do not see, up to the cut
//!                     └─► one full per tenant ─► record
//! ```
//!
//! Why each step is where it is:
//! - the horizon is read after the rules: a transaction that ran when a table's rule took effect may have written rows
//!   before the rule that the stream left out, so every snapshot has to see it whole;
//! - the marker is written by the session that was open before the first snapshot: a server that crashed in between,
//!   and forgot rows that the snapshots saw, has taken that session with it;
//! - the cut is the marker's commit: the stream has delivered it, so everything that a snapshot could see is archived;
//! - nothing exists before the record names it. A job that dies leaves objects that nobody names.

use crate::crypto::{Codec, Header, ObjectKind, random};
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::merge::{Holes, Image, Merge, MergeStats, Pick, RowSink, Scratch};
use crate::repository::model::{Base, BaseTable, DatabaseLocale, LogRecord};
use crate::repository::{ObjectRef, paths};
use crate::run::AgentContext;
use crate::schema_dump;
use crate::sequences;
use crate::snapshot::catalog::Rule;
use crate::snapshot::fulls::{Full, FullWriter, Groups, Job};
use crate::snapshot::progress::{BaseProgress, Phase};
use crate::snapshot::read::{self, Outcome, Rows, TableRead};
use crate::sql::{self, SqlClient, SqlContext};
use coffer_wire::{Begin, Lsn, Relation, TenantKind};
use futures::StreamExt;
use std::collections::HashMap;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use uuid::Uuid;

/// Tables read at a time, and sessions that one table is read by.
const TABLES: usize = 3;
const SESSIONS: usize = 2;
/// Batches of rows on their way to the merge.
const BATCHES_AHEAD: usize = 8;
/// How often a wait for old transactions looks again, how often it looks which, and how often it says so in the log.
const HORIZON_CHECK: Duration = Duration::from_millis(300);
const HORIZON_LOOK: Duration = Duration::from_secs(3);
const HORIZON_COMPLAINT: Duration = Duration::from_secs(30);

/// Tables read under their snapshots, waiting for the cut.
pub struct ReadTables {
    /// Open since before the first snapshot: it writes the marker.
    session: SqlClient,
    tables: Vec<TableRead>,
    /// Tables that were not read this time, and why.
    pub left_out: Vec<(String, String)>,
    /// In a mutex only because it may not be shared, which a reference across an await is.
    merge: Mutex<Merge>,
    groups: Groups,
}

/// A base, complete but for its record.
pub struct Finished {
    pub base: Base,
    pub rows: u64,
}

/// Reads the tables.
pub async fn read_tables(ctx: &AgentContext, rules: Vec<Rule>, progress: &Arc<BaseProgress>) -> Result<ReadTables> {
    // One server for all sessions of the job: rows of another one under this one's marker would be wrong rows.
    let dsn = ctx.source_dsn().await?.with_application_name("coffer base").sending_little();
    let session = sql::connect(&dsn).await?;
    refuse_standby(&session).await?;
    progress.phase(Phase::WaitingForTransactions);
    let horizon = wait_for_horizon(ctx, &session, progress).await?;
    failpoints::hit(failpoints::BASE_AFTER_HORIZON)?;

    progress.phase(Phase::Reading);
    let scratch = Scratch::new(&ctx.config.spool.dir)?;
    let memory = usize::try_from(ctx.memory.base).unwrap_or(usize::MAX);
    let (tx, rx) = mpsc::channel(BATCHES_AHEAD);
    let merging = tokio::task::spawn_blocking(move || take_rows(&scratch, memory, rx));
    let results: Vec<(Rule, Result<Outcome>)> = futures::stream::iter(rules)
        .map(|rule| {
            let (dsn, tx) = (&dsn, &tx);
            async move {
                let r = read::read_table(dsn, &rule, horizon, SESSIONS, tx, progress).await;
                progress.table_read();
                (rule, r)
            }
        })
        .buffer_unordered(TABLES)
        .collect()
        .await;
    drop(tx);
    let (merge, groups) =
        merging.await.map_err(|e| Error::other(format!("the merge of base rows broke off: {e}")))??;

    let (mut tables, mut left_out) = (Vec::new(), Vec::new());
    for (rule, result) in results {
        match result {
            Ok(Outcome::Done(t)) => {
                tracing::info!(table = %rule.qualified(), rows = t.rows, at = %t.insert_lsn, "table read");
                tables.push(*t);
            }
            Ok(Outcome::Yielded(why)) => {
                tracing::info!(table = %rule.qualified(), "the base of this table waits: {why}");
                left_out.push((rule.qualified(), why.to_owned()));
            }
            // The server went away: so has the session for the marker.
            Err(e) if e.kind() == Kind::Unreachable => return Err(e),
            // One table that cannot be read is no reason to leave the others without a base.
            Err(e) => {
                tracing::warn!(table = %rule.qualified(), "no base of this table: {e}");
                left_out.push((rule.qualified(), e.to_string()));
            }
        }
    }
    tables.sort_by_key(|t| t.rule.relid);
    failpoints::hit(failpoints::BASE_AFTER_COPY)?;
    Ok(ReadTables { session, tables, left_out, merge: Mutex::new(merge), groups })
}

impl ReadTables {
    /// Takes out the tables for which `why` has an answer.
    pub fn leave_out(&mut self, why: impl Fn(&TableRead) -> Option<String>) {
        let left_out = &mut self.left_out;
        self.tables.retain(|t| match why(t) {
            None => true,
            Some(w) => {
                left_out.push((t.rule.qualified(), w));
                false
            }
        });
    }

    /// Nothing could be read.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// The oldest transaction that some snapshot does not see.
    pub fn xmin(&self) -> u64 {
        self.tables.iter().map(|t| t.snapshot.xmin).min().unwrap_or(u64::MAX)
    }

    /// The session that writes the marker.
    pub fn session(&self) -> &SqlClient {
        &self.session
    }

    /// Merges, writes the fulls and the definitions. `ships`: those that may hold what the snapshots do not see.
    pub async fn finish(
        self,
        ctx: &AgentContext,
        job: Uuid,
        cut: Lsn,
        ships: Vec<Arc<LogRecord>>,
        progress: &Arc<BaseProgress>,
    ) -> Result<Finished> {
        progress.phase(Phase::Writing);
        if let Some(t) = self.tables.iter().find(|t| t.insert_lsn > cut) {
            return Err(Error::other(format!(
                "the marker of the base committed at {cut}, before {} was read at {}",
                t.rule.qualified(),
                t.insert_lsn
            )));
        }
        let (system_identifier, timeline) = ctx.system();
        let sequences = match sequences::all(&self.session).await {
            Ok(read) => read.states,
            Err(e) if self.session.is_closed() => return Err(e),
            // Ships bring them; a migration that holds one locked does not hold the base up.
            Err(e) => {
                tracing::warn!("the base goes without the sequences: {e}");
                Vec::new()
            }
        };
        let database = Some(locale(&self.session).await?);
        let schema = dump(ctx, &self.session, cut);
        let tables: Vec<BaseTable> = self
            .tables
            .iter()
            .map(|t| BaseTable {
                relid: t.rule.relid,
                name: t.rule.qualified(),
                cut_lsn: cut,
                registered_xid: t.rule.registered_xid,
                rows: t.rows,
                owner: t.rule.owner(ctx),
            })
            .collect();
        let classes = self.tables.iter().map(|t| (t.rule.relid.to_string(), t.rule.class.name().to_owned())).collect();
        let writing = Job {
            repository: ctx.repo.clone(),
            keyring: ctx.keyring.clone(),
            rt: ctx.rt.clone(),
            source: ctx.source_uid,
            system_identifier,
            timeline,
            cut,
            progress: Some(progress.clone()),
            folder: None,
        };
        let pick = NotSeen {
            tables: self.tables.into_iter().map(|t| (t.rule.relid, t)).collect(),
            groups: self.groups,
            cut,
            refused: None,
        };
        let merge = self.merge.into_inner().unwrap_or_else(PoisonError::into_inner);
        let merging = tokio::task::spawn_blocking(move || merge_all(writing, merge, pick, &ships));
        let (merged, schema) = tokio::join!(merging, schema);
        let (fulls, stats) = merged.map_err(|e| Error::other(format!("the merge of a base broke off: {e}")))??;
        let schema = match schema {
            Ok(s) => Some(s),
            // Rows are worth more than definitions, which the next base brings.
            Err(e) => {
                tracing::warn!("the base goes without the schema's definitions: {e}");
                None
            }
        };
        failpoints::hit(failpoints::BASE_AFTER_FULLS)?;
        let by_text = |f: &Full| f.rows.iter().map(|(relid, n)| (relid.to_string(), *n)).collect();
        let holds = fulls.iter().map(|f| (f.object.tenant, by_text(f))).collect();
        let fulls = fulls.into_iter().map(|f| f.object).collect();
        let base =
            Base { job, tables, cut_lsn: cut, fulls, schema, sequences, classes, holds, database, ..Base::default() };
        Ok(Finished { base, rows: stats.rows })
    }
}

/// Writes a marker; what the session read before is as good as the stream's delivery of it.
pub async fn mark(session: &SqlClient) -> Result<[u8; 16]> {
    let id: [u8; 16] = random::bytes();
    // A standby that is away holds no base up.
    session.commit_locally().await?;
    session
        .execute("SELECT coffer._agent_base_marker($1)", &[&id.as_slice()])
        .await
        .sql("cannot write the marker of a base")?;
    Ok(id)
}

/// Sorts the rows that come, by tenant, table and key.
fn take_rows(scratch: &Scratch, memory: usize, mut rows: mpsc::Receiver<Rows>) -> Result<(Merge, Groups)> {
    let mut merge = Merge::new(scratch, memory)?;
    let mut groups = Groups::default();
    while let Some(rows) = rows.blocking_recv() {
        match rows {
            Rows::Batch(batch) => {
                let desc = merge.relation(&batch.relation)?;
                for r in batch.rows() {
                    let group = groups.of(r.kind, r.tenant)?;
                    merge.base_row(group, desc, r.key, r.image)?;
                }
            }
            Rows::Large(mut row) => {
                let desc = merge.relation(&row.relation)?;
                let group = groups.of(row.kind, &row.tenant)?;
                let key = std::mem::take(&mut row.key);
                merge.base_row_in_pieces(group, desc, &key, &mut |piece| row.next(piece))?;
            }
        }
    }
    Ok((merge, groups))
}

/// Chooses the changes that a base lacks: those of transactions that the table's snapshot does not see, up to the cut.
struct NotSeen {
    tables: HashMap<u32, TableRead>,
    groups: Groups,
    cut: Lsn,
    /// What went wrong while choosing, which has no way to say so.
    refused: Option<Error>,
}

impl Pick for NotSeen {
    fn group(&mut self, _txn: &Begin, kind: TenantKind, key: &str) -> Option<u32> {
        match self.groups.of(kind, key.as_bytes()) {
            Ok(g) => Some(g),
            Err(e) => {
                self.refused = Some(e);
                None
            }
        }
    }

    fn table(&mut self, txn: &Begin, relid: u32) -> bool {
        txn.end_lsn <= self.cut && self.tables.get(&relid).is_some_and(|t| !t.snapshot.sees(txn.xid))
    }

    fn dropped(&mut self, txn: &Begin, relid: u32) -> bool {
        // A leaf that no snapshot knows is younger than they are, and so are all of its rows.
        let table = self.tables.values().find(|t| t.rule.relid == relid || t.leaves.contains(&relid));
        txn.end_lsn <= self.cut && table.is_none_or(|t| !t.snapshot.sees(txn.xid))
    }
}

fn merge_all(
    job: Job,
    mut merge: Merge,
    mut pick: NotSeen,
    ships: &[Arc<LogRecord>],
) -> Result<(Vec<Full>, MergeStats)> {
    for record in ships {
        // The common object first: truncates of a ship are known before its rows.
        for object in record.objects() {
            let mut plain = job.repository.open_object(&job.rt, object, None)?;
            merge
                .changes(&mut plain as &mut dyn Read, &mut pick)
                .map_err(|e| e.during(format_args!("object {}", object.path)))?;
            if let Some(e) = pick.refused.take() {
                return Err(e);
            }
        }
    }
    let tables = pick.tables;
    // A row that came from another tenant with values that did not change has holes here; a later change may fill them.
    merge.on_holes(Holes::Keep);
    merge.keep_leaves();
    let writer = FullWriter::new(job, pick.groups.into_tenants());
    let mut sink = OnlyRead { tables: &tables, inner: writer, group: 0, in_group: false, in_table: false };
    let stats = merge.run(&mut sink)?;
    if stats.unmatched + stats.duplicates > 0 {
        // Something was lost or doubled between snapshot and stream, so this is not what the tables held at the cut.
        return Err(Error::new(
            Kind::Verification,
            format!(
                "the base does not fit the changes after it and is not recorded: {} changes of rows that are not \
                 there, {} rows with the key of another",
                stats.unmatched, stats.duplicates
            ),
        )
        .code("base_mismatch"));
    }
    if stats.incomplete > 0 {
        tracing::warn!("{} rows came from another tenant with values that nothing holds yet", stats.incomplete);
    }
    Ok((sink.inner.finish()?, stats))
}

/// Passes on the tables of the job. Rows of a table whose read was given up came too, and do not count.
struct OnlyRead<'a> {
    tables: &'a HashMap<u32, TableRead>,
    inner: FullWriter,
    group: u32,
    /// The inner sink knows of the group.
    in_group: bool,
    in_table: bool,
}

impl RowSink for OnlyRead<'_> {
    fn begin_group(&mut self, group: u32) -> Result<()> {
        self.group = group;
        Ok(())
    }

    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        if !self.tables.contains_key(&rel.relid) {
            return Ok(());
        }
        if !self.in_group {
            self.inner.begin_group(self.group)?;
            self.in_group = true;
        }
        self.in_table = true;
        self.inner.begin_table(rel)
    }

    fn leaf(&mut self, rel: &Arc<Relation>) -> Result<()> {
        if self.in_table { self.inner.leaf(rel) } else { Ok(()) }
    }

    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        if self.in_table { self.inner.row(key, image) } else { Ok(()) }
    }

    fn end_table(&mut self) -> Result<()> {
        if std::mem::take(&mut self.in_table) { self.inner.end_table() } else { Ok(()) }
    }

    fn end_group(&mut self) -> Result<()> {
        if std::mem::take(&mut self.in_group) { self.inner.end_group() } else { Ok(()) }
    }
}

async fn refuse_standby(client: &SqlClient) -> Result<()> {
    let row =
        client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await.sql("cannot ask for the server's role")?;
    if row.get(0) {
        return Err(Error::new(
            Kind::Refused,
            "the server is a standby: its snapshots leave running transactions out, so no base is taken there",
        )
        .hint("let the source's url name the primary, or add target_session_attrs=primary"));
    }
    Ok(())
}

/// Waits until every transaction has ended that ran when the rules were read, and returns the first one that did not.
async fn wait_for_horizon(ctx: &AgentContext, client: &SqlClient, progress: &BaseProgress) -> Result<u64> {
    let number = |row: &tokio_postgres::Row| -> Result<u64> {
        row.get::<_, &str>(0).parse().map_err(|_| Error::other("the server's snapshot is not a number"))
    };
    let what = "cannot read which transactions run";
    let row = client
        .query_one("SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text", &[])
        .await
        .sql(what)?;
    let horizon = number(&row)?;
    let (mut looked, mut complained) = (None::<Instant>, Instant::now());
    loop {
        let row = client
            .query_one("SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text", &[])
            .await
            .sql(what)?;
        if number(&row)? >= horizon {
            return Ok(horizon);
        }
        if looked.is_none_or(|l| l.elapsed() >= HORIZON_LOOK) {
            looked = Some(Instant::now());
            let oldest = oldest_transaction(client).await?;
            if complained.elapsed() >= HORIZON_COMPLAINT {
                complained = Instant::now();
                tracing::warn!("bases wait for {oldest}");
            }
            progress.wait_for(oldest);
        }
        tokio::select! {
            () = tokio::time::sleep(HORIZON_CHECK) => {}
            () = ctx.stopped() => return Err(Error::other("the agent is stopping").code("stopping")),
        }
    }
}

async fn oldest_transaction(client: &SqlClient) -> Result<String> {
    let row = client
        .query_opt(
            "SELECT pid, COALESCE(datname, ''), COALESCE(state, ''), \
                COALESCE((pg_catalog.now() - xact_start)::text, '') \
             FROM pg_catalog.pg_stat_activity WHERE backend_xid IS NOT NULL \
             ORDER BY pg_catalog.age(backend_xid) DESC LIMIT 1",
            &[],
        )
        .await
        .sql("cannot look for the oldest transaction")?;
    Ok(match row {
        Some(r) => format!(
            "a transaction that began before the tables were covered: pid {} in database {} ({}), for {}",
            r.get::<_, i32>(0),
            r.get::<_, &str>(1),
            r.get::<_, &str>(2),
            r.get::<_, &str>(3)
        ),
        None => "a prepared transaction that began before the tables were covered: see pg_prepared_xacts".to_owned(),
    })
}

/// What the database was created with, and its own settings.
pub async fn locale(client: &SqlClient) -> Result<DatabaseLocale> {
    let row = client
        .query_one(
            "SELECT pg_catalog.pg_encoding_to_char(d.encoding)::text, d.datcollate::text, d.datctype::text, \
                    ARRAY(SELECT coffer._agent_setting(c) FROM pg_catalog.pg_db_role_setting s \
                          CROSS JOIN pg_catalog.unnest(s.setconfig) c WHERE s.setdatabase = d.oid AND s.setrole = 0) \
             FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()",
            &[],
        )
        .await
        .sql("cannot read the database's encoding and settings")?;
    Ok(DatabaseLocale { encoding: row.get(0), collate: row.get(1), ctype: row.get(2), settings: row.get(3) })
}

/// The source's definitions as an object of the repository, as they are at `cut` or a little later.
pub async fn dump(ctx: &AgentContext, client: &SqlClient, cut: Lsn) -> Result<ObjectRef> {
    let row = client
        .query_one(
            "SELECT pg_catalog.current_setting('server_version_num')::int4, pg_catalog.current_setting('server_encoding')",
            &[],
        )
        .await
        .sql("cannot ask for the server's version")?;
    let encoding: String = row.get(1);
    let version = u32::try_from(row.get::<_, i32>(0)).map_err(|_| Error::other("the server's version is negative"))?;
    let (system_identifier, timeline) = ctx.system();
    let key = ctx.keyring.repository_key();
    let header = Header {
        kind: ObjectKind::Schema,
        // The dump is compressed already.
        codec: Codec::None,
        tenant: ctx.repo.uid(),
        object: random::uuid(),
        source: ctx.source_uid,
        system_identifier,
        timeline,
        lsn_start: Lsn::ZERO,
        lsn_end: cut,
        key_version: key.id.version,
    };
    let path = paths::schema(ctx.source_uid, cut, header.object);
    let dsn = ctx.source_dsn().await?.with_application_name("coffer schema");
    let (repo, rt) = (ctx.repo.clone(), ctx.rt.clone());
    let dumped = tokio::task::spawn_blocking(move || {
        repo.seal_to(rt, path, &header, &key, |sealer| {
            schema_dump::dump_schema(&dsn, version, &encoding, sealer)?;
            Ok(0)
        })
    })
    .await
    .map_err(|e| Error::other(format!("the schema dump broke off: {e}")))??;
    // pg_dump asks nobody who it is; what it read counts if the session beside it did not move.
    client.batch_execute("SELECT 1").await.sql("the server went away while its definitions were dumped")?;
    ctx.require_followed(client)?;
    Ok(dumped)
}
