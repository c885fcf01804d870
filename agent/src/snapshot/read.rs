//! Reads one table under one snapshot.
//!
//! The order of the first statements is what makes the snapshot whole: REPEATABLE READ takes its snapshot at the first
//! statement that needs one, LOCK TABLE needs none, so the lock comes first and no TRUNCATE and no rewrite can commit
//! between the snapshot and the read (they would make it see an empty table). The lock is ACCESS SHARE, and a
//! migration that waits for it would hold up everyone behind it, so the read is given up and tried again instead.
//!
//! A large table is read by several sessions that share the exported snapshot, each taking ranges of blocks. Rows with
//! large values are left out of that and read one by one afterwards ([`super::large`]).

use crate::dsn::Dsn;
use crate::error::{Error, Result};
use crate::snapshot::catalog::{self, Rule};
use crate::snapshot::large::{self, LargeColumns, LargeRow};
use crate::snapshot::progress::BaseProgress;
use crate::snapshot::rows::RowShape;
use crate::snapshot::visibility::PgSnapshot;
use crate::sql::{self, SqlClient, SqlContext};
use coffer_wire::{Lsn, TenantKind, quote_ident};
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_postgres::error::SqlState;

/// How long a base waits for a table's lock before it lets others pass.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a reader looks for migrations that wait behind it, and how long it lets one wait: a TRUNCATE that soon gives
/// up by itself, or is one of many, must not keep a table from ever being read.
const YIELD_CHECK: Duration = Duration::from_millis(500);
const YIELD_AFTER: Duration = Duration::from_secs(1);
/// A table is cut into ranges of this many blocks (256 MiB with blocks of 8 KiB).
const RANGE_BLOCKS: i64 = 32_768;
/// Rows travel to the sorter in batches of about this size.
const BATCH_BYTES: usize = 256 << 10;

/// A table as it was read.
#[derive(Clone, Debug)]
pub struct TableRead {
    pub rule: Rule,
    pub snapshot: PgSnapshot,
    /// The insert position that was read together with the snapshot.
    pub insert_lsn: Lsn,
    /// The OIDs under which its rows are stored: its own, or its leaves'.
    pub leaves: Vec<u32>,
    pub rows: u64,
}

/// What travels to the merge.
pub enum Rows {
    Batch(Batch),
    Large(LargeRow),
}

/// Rows of one table (or leaf) on their way to the merge.
pub struct Batch {
    /// The encoded descriptor that the rows are under.
    pub relation: Arc<Vec<u8>>,
    /// Per row: tenant kind, then tenant key, key, image, each `u32` length and bytes.
    rows: Vec<u8>,
}

/// One row of a [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRow<'a> {
    pub kind: TenantKind,
    pub tenant: &'a [u8],
    /// Empty where rows are told apart by the image.
    pub key: &'a [u8],
    pub image: &'a [u8],
}

impl Batch {
    pub fn rows(&self) -> impl Iterator<Item = BatchRow<'_>> {
        let mut b = &self.rows[..];
        std::iter::from_fn(move || {
            let (kind, rest) = b.split_first()?;
            b = rest;
            let mut part = || {
                let (n, rest) = b.split_first_chunk::<4>()?;
                let (part, rest) = rest.split_at_checked(u32::from_le_bytes(*n) as usize)?;
                b = rest;
                Some(part)
            };
            let (tenant, key, image) = (part()?, part()?, part()?);
            Some(BatchRow { kind: TenantKind::from_u8(*kind)?, tenant, key, image })
        })
    }
}

fn put_row(out: &mut Vec<u8>, r: &BatchRow<'_>) {
    out.push(r.kind as u8);
    for part in [r.tenant, r.key, r.image] {
        out.extend_from_slice(&(part.len() as u32).to_le_bytes());
        out.extend_from_slice(part);
    }
}

/// How an attempt at a table ended.
#[derive(Debug)]
pub enum Outcome {
    Done(Box<TableRead>),
    /// Somebody else's lock, or somebody who waits for ours. Rows of the table may have been sent: they do not count.
    Yielded(&'static str),
}

/// Reads the table once. `horizon`: the snapshot's xmin must not lie before it.
pub async fn read_table(
    dsn: &Dsn,
    rule: &Rule,
    horizon: u64,
    sessions: usize,
    rows: &mpsc::Sender<Rows>,
    progress: &BaseProgress,
) -> Result<Outcome> {
    let table = rule.qualified();
    let client = sql::connect(dsn).await?;
    let begin = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = {}; \
         LOCK TABLE {} IN ACCESS SHARE MODE",
        LOCK_TIMEOUT.as_millis(),
        rule.lock_list(),
    );
    if let Err(e) = client.batch_execute(&begin).await {
        if e.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Ok(Outcome::Yielded("its lock is not free"));
        }
        if e.code() == Some(&SqlState::UNDEFINED_TABLE) {
            return Ok(Outcome::Yielded("it was dropped or renamed a moment ago"));
        }
        return Err(sql::sql_error(e, format!("cannot lock {table} for reading")));
    }
    let row = client
        .query_one(
            "SELECT pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_current_wal_insert_lsn()::text, \
             pg_catalog.pg_export_snapshot()",
            &[],
        )
        .await
        .sql("cannot take a snapshot")?;
    let snapshot: PgSnapshot = row.get::<_, &str>(0).parse()?;
    let insert_lsn: Lsn = row.get::<_, &str>(1).parse().map_err(Error::other)?;
    let exported: String = row.get(2);
    if snapshot.xmin < horizon {
        // Cannot happen after the wait for the horizon: xmin never goes back on a primary.
        return Err(Error::other(format!(
            "{table}: the snapshot's xmin {} precedes {horizon}, when the table's registration took effect",
            snapshot.xmin
        )));
    }
    let now = catalog::rules(&client).await?.into_iter().find(|r| r.relid == rule.relid);
    let Some(now) = now.filter(|r| r.registered_xid == rule.registered_xid) else {
        return Ok(Outcome::Yielded("its registration changed a moment ago"));
    };
    let ranges = ranges(&client, &now).await?;
    let copy = CopyJob { ranges: &ranges, next: AtomicUsize::new(0), rows, progress };
    let reading = copy.all(dsn, client, &now, &exported, sessions);
    let relids = [now.relid];
    let waiting = migration_waits(dsn, &relids);
    let n = tokio::select! {
        n = reading => match n? {
            Some(n) => n,
            None => return Ok(Outcome::Yielded("its lock is not free for a second session")),
        },
        w = waiting => { w?; return Ok(Outcome::Yielded("a migration waits for it")) }
    };
    let mut leaves: Vec<u32> = ranges.iter().map(|r| r.leaf.oid).collect();
    leaves.dedup();
    Ok(Outcome::Done(Box::new(TableRead { rule: now, snapshot, insert_lsn, leaves, rows: n })))
}

/// What the ranges of one leaf share.
pub(super) struct Leaf {
    oid: u32,
    /// After FROM.
    pub from: String,
    pub relation: Arc<Vec<u8>>,
    pub shape: RowShape,
    /// `None`: no row of it can be large.
    pub large: Option<LargeColumns>,
}

/// A piece of a table: one COPY.
pub(super) struct Range {
    leaf: Arc<Leaf>,
    /// On `ctid`; empty: the whole table.
    condition: String,
}

impl Range {
    fn statement(&self) -> String {
        let small = self.leaf.large.as_ref().map(|l| l.row_is_small.as_str());
        format!(
            "COPY (SELECT {} FROM {}{}) TO STDOUT",
            self.leaf.shape.select.join(", "),
            self.leaf.from,
            self.filter(small)
        )
    }

    /// A WHERE of the range and of this, or nothing.
    pub fn filter(&self, and: Option<&str>) -> String {
        let both: Vec<&str> = [self.condition.as_str()].into_iter().chain(and).filter(|c| !c.is_empty()).collect();
        if both.is_empty() { String::new() } else { format!(" WHERE {}", both.join(" AND ")) }
    }
}

/// The pieces of the table, partitions one by one.
async fn ranges(client: &SqlClient, rule: &Rule) -> Result<Vec<Range>> {
    let leaves = client
        .query(
            "SELECT c.oid, n.nspname::text, c.relname::text, \
                CASE WHEN am.amname = 'heap' THEN pg_catalog.pg_relation_size(c.oid) \
                    / pg_catalog.current_setting('block_size')::int8 ELSE 0 END, \
                CASE WHEN c.reltoastrelid <> 0 THEN pg_catalog.pg_relation_size(c.reltoastrelid) ELSE 0 END \
             FROM (SELECT $1::oid AS oid WHERE NOT $2::bool \
                   UNION ALL SELECT p.relid FROM pg_catalog.pg_partition_tree($1::oid) p WHERE $2 AND p.isleaf) t \
             JOIN pg_catalog.pg_class c ON c.oid = t.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             LEFT JOIN pg_catalog.pg_am am ON am.oid = c.relam \
             WHERE c.relkind = 'r' ORDER BY c.oid",
            &[&rule.relid, &rule.partitioned],
        )
        .await
        .sql(format_args!("cannot measure {}", rule.qualified()))?;
    let mut out = Vec::new();
    for l in &leaves {
        let relation = catalog::describe(client, rule, l.get(0)).await?;
        let shape = RowShape::new(rule, &relation)?;
        let toasted: i64 = l.get(4);
        let large =
            if toasted >= large::TOAST_BYTES { LargeColumns::of(client, l.get(0), &shape).await? } else { None };
        let leaf = Arc::new(Leaf {
            oid: l.get(0),
            large,
            shape,
            from: format!("ONLY {}.{} t", quote_ident(l.get(1)), quote_ident(l.get(2))),
            relation: Arc::new(relation.encode()),
        });
        out.extend(cut_blocks(l.get(3)).into_iter().map(|condition| Range { leaf: leaf.clone(), condition }));
    }
    Ok(out)
}

/// Conditions that cover a table of so many blocks.
fn cut_blocks(blocks: i64) -> Vec<String> {
    let pieces = (blocks / RANGE_BLOCKS).max(1);
    (0..pieces)
        .map(|i| {
            let low = i * RANGE_BLOCKS;
            match (pieces, i) {
                (1, _) => String::new(),
                // Blocks added after they were counted hold nothing that the snapshot sees, but cost little to ask for.
                (n, i) if i == n - 1 => format!("ctid >= '({low},0)'"),
                _ => format!("ctid >= '({low},0)' AND ctid < '({},0)'", low + RANGE_BLOCKS),
            }
        })
        .collect()
}

struct CopyJob<'a> {
    ranges: &'a [Range],
    next: AtomicUsize,
    rows: &'a mpsc::Sender<Rows>,
    progress: &'a BaseProgress,
}

impl CopyJob<'_> {
    /// All ranges, by `first` and as many more sessions as there is work for. `None`: another session did not get the
    /// lock at once; to wait for it while the first holds it could wait for ever.
    async fn all(
        &self,
        dsn: &Dsn,
        first: SqlClient,
        rule: &Rule,
        exported: &str,
        sessions: usize,
    ) -> Result<Option<u64>> {
        let more = sessions.min(self.ranges.len()).saturating_sub(1);
        let mut clients = vec![first];
        for _ in 0..more {
            let c = sql::connect(dsn).await?;
            c.batch_execute(&format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{exported}'"
            ))
            .await
            .sql("cannot share the snapshot")?;
            match c.batch_execute(&format!("LOCK TABLE {} IN ACCESS SHARE MODE NOWAIT", rule.lock_list())).await {
                Ok(()) => clients.push(c),
                Err(e) if e.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => return Ok(None),
                Err(e) => return Err(sql::sql_error(e, format!("cannot lock {} for reading", rule.qualified()))),
            }
        }
        let counts = futures::future::try_join_all(clients.iter().map(|c| self.take_ranges(c))).await?;
        for c in &clients {
            c.batch_execute("COMMIT").await.sql("cannot end the reading transaction")?;
        }
        Ok(Some(counts.into_iter().sum()))
    }

    async fn take_ranges(&self, client: &SqlClient) -> Result<u64> {
        let mut n = 0;
        while let Some(r) = self.ranges.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            n += self.copy(client, r).await?;
        }
        Ok(n)
    }

    async fn copy(&self, client: &SqlClient, range: &Range) -> Result<u64> {
        let leaf = &*range.leaf;
        let what = || format!("cannot read {}", leaf.from);
        let stream = client.copy_out(&range.statement()).await.sql(what())?;
        let mut stream = std::pin::pin!(stream);
        let (mut lines, mut batch, mut key) = (Lines::default(), Vec::new(), Vec::new());
        let mut n = 0;
        while let Some(chunk) = stream.next().await {
            let mut broken = None;
            lines.feed(&chunk.sql(what())?, |line| match leaf.shape.cut(line, &mut key) {
                Ok(cut) => {
                    let row = BatchRow { kind: cut.kind, tenant: &cut.tenant, key: &key, image: cut.image };
                    put_row(&mut batch, &row);
                    n += 1;
                }
                Err(e) => broken = Some(e),
            });
            if let Some(e) = broken {
                return Err(e.during(what()));
            }
            if batch.len() >= BATCH_BYTES {
                self.send(leaf, std::mem::take(&mut batch)).await?;
            }
        }
        self.send(leaf, batch).await?;
        if let Some(l) = &leaf.large {
            n += large::rows(client, leaf, l, &range.filter(Some(&l.row_is_large())), self.rows).await?;
        }
        self.progress.add_rows(n);
        Ok(n)
    }

    async fn send(&self, leaf: &Leaf, rows: Vec<u8>) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        self.progress.add_bytes(rows.len() as u64);
        // The merge's own error is what the job reports; this one only ends the read.
        let batch = Batch { relation: leaf.relation.clone(), rows };
        self.rows.send(Rows::Batch(batch)).await.map_err(|_| Error::other("the merge of base rows has stopped"))
    }
}

/// Cuts COPY's bytes into lines; the server sends a line per message, the protocol does not promise it.
#[derive(Default)]
pub(crate) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    pub(crate) fn feed(&mut self, chunk: &[u8], mut line: impl FnMut(&[u8])) {
        let mut from = 0;
        for end in memchr::memchr_iter(b'\n', chunk) {
            if self.rest.is_empty() {
                line(&chunk[from..end]);
            } else {
                self.rest.extend_from_slice(&chunk[from..end]);
                line(&self.rest);
                self.rest.clear();
            }
            from = end + 1;
        }
        self.rest.extend_from_slice(&chunk[from..]);
    }
}

/// Returns when a session has waited for [`YIELD_AFTER`] for a lock on one of the tables that a reader's own lock refuses.
pub(crate) async fn migration_waits(dsn: &Dsn, relids: &[u32]) -> Result<()> {
    let client = sql::connect(dsn).await?;
    let check = client
        .prepare(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE NOT l.granted AND l.locktype = 'relation' \
             AND l.mode = 'AccessExclusiveLock' \
             AND l.waitstart < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2) \
             AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()) \
             AND (l.relation = ANY ($1) OR l.relation IN (SELECT p.relid FROM pg_catalog.unnest($1::oid[]) r (oid) \
                  CROSS JOIN LATERAL pg_catalog.pg_partition_tree(r.oid) p)))",
        )
        .await
        .sql("cannot look for waiting migrations")?;
    loop {
        tokio::time::sleep(YIELD_CHECK).await;
        let row = client
            .query_one(&check, &[&relids, &YIELD_AFTER.as_secs_f64()])
            .await
            .sql("cannot look for waiting migrations")?;
        if row.get(0) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_every_block_once() {
        assert_eq!(cut_blocks(0), [""]);
        assert_eq!(cut_blocks(RANGE_BLOCKS), [""]);
        assert_eq!(
            cut_blocks(3 * RANGE_BLOCKS + 5),
            [
                "ctid >= '(0,0)' AND ctid < '(32768,0)'",
                "ctid >= '(32768,0)' AND ctid < '(65536,0)'",
                "ctid >= '(65536,0)'"
            ]
        );
    }

    #[test]
    fn lines_survive_any_cut_of_the_stream() {
        let text = b"a\tb\n\nccc\n";
        for cut in 0..=text.len() {
            let (mut l, mut got) = (Lines::default(), Vec::new());
            l.feed(&text[..cut], |x| got.push(x.to_vec()));
            l.feed(&text[cut..], |x| got.push(x.to_vec()));
            assert_eq!(got, [&b"a\tb"[..], b"", b"ccc"], "cut at {cut}");
        }
    }

    #[test]
    fn a_batch_gives_back_its_rows() {
        let rows = [
            BatchRow { kind: TenantKind::Normal, tenant: b"acme", key: b"k1", image: b"image" },
            BatchRow { kind: TenantKind::Unassigned, tenant: b"", key: b"", image: b"" },
        ];
        let mut b = Batch { relation: Arc::default(), rows: Vec::new() };
        for r in &rows {
            put_row(&mut b.rows, r);
        }
        assert_eq!(b.rows().collect::<Vec<_>>(), rows);
    }
}
