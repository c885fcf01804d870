//! One pass of the comparison: all rows of the tenant at the target against all of its live rows, table by table.
//!
//! The target's rows are pushed by the merge on a blocking thread; the live rows of a table are read when its first
//! row comes; differences go to the staging tables through a channel. Nothing but one sort and one row is in memory.

use crate::error::{Error, Kind, Result};
use crate::merge::{Scratch, Sorter};
use crate::restore::in_place::diff::{Changes, Counts, Op, Purpose, TableDiff};
use crate::restore::in_place::live::{self, LiveTable, SortedRows};
use crate::restore::in_place::mapping::Mapping;
use crate::sql::{self, SqlClient, SqlContext};
use coffer_wire::{Class, Relation, copy_text};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Receives the tenant's rows at the target, sorted by (relid, key).
pub trait TargetSink {
    fn begin_table(&mut self, relation: &Relation) -> Result<()>;
    fn row(&mut self, key: &[u8], image: &[u8]) -> Result<()>;
    fn end_table(&mut self) -> Result<()>;
}

/// A table that the target covers, with or without rows of the tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoveredTable {
    pub relid: u32,
    /// Qualified and quoted as SQL needs it.
    pub name: String,
}

/// The tenant at the target. Read twice when its live rows change meanwhile.
pub trait Target: Send + Sync {
    /// Pushes every row. Blocking.
    fn rows(&self, sink: &mut dyn TargetSink) -> Result<()>;
    /// Tables whose rows are known at the target: live rows that it does not have are deleted from these alone.
    fn covered(&self) -> &[CoveredTable];
}

/// Where lines of the difference go: to the staging of the table with this relid (of now).
pub enum Staged {
    Begin(u32, Arc<Mapping>),
    /// Lines of COPY text, each with its operation's letter in front.
    Lines(Vec<u8>),
    End,
}

const BATCH_BYTES: usize = 256 << 10;

/// What one table came to.
#[derive(Clone, Debug)]
pub struct TableOutcome {
    /// Of the live table.
    pub relid: u32,
    pub mapping: Arc<Mapping>,
    pub counts: Counts,
    /// The first differences, as many as were asked for.
    pub rows: Vec<RowChange>,
}

/// A row that differs. Values are text as the server writes it; `None`: NULL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange {
    /// What a restore would do with it.
    pub op: Op,
    /// Column and value; of a table without a key, all columns.
    pub key: Vec<(String, Option<String>)>,
    /// Of an update.
    pub columns: Vec<String>,
}

/// What one pass came to.
#[derive(Clone, Debug)]
pub struct Comparison {
    pub tables: Vec<TableOutcome>,
    pub warnings: Vec<String>,
    /// `pg_snapshot` xmin of the live rows.
    pub xmin: u64,
}

/// What a pass needs.
pub struct Pass<'a> {
    pub dsn: &'a crate::dsn::Dsn,
    pub target: &'a Arc<dyn Target>,
    /// The tables of the restore, by relid.
    pub tables: &'a BTreeMap<u32, LiveTable>,
    /// Covered tables that are not, by relid: none of them has become another one of its name.
    pub others: &'a BTreeSet<u32>,
    /// Not all of the tenant's tables are in the restore, by the user's wish.
    pub restricted: bool,
    pub scratch: &'a Scratch,
    /// Bytes for the sorts.
    pub memory: usize,
    /// To look, with at most so many rows of each table.
    pub look: Option<usize>,
    /// For a validation: the exported snapshot to read the live rows under, and no row is let off for its class.
    pub exact: Option<&'a str>,
}

impl Pass<'_> {
    /// Compares. With `staged`, every difference is sent there.
    pub async fn run(&self, staged: Option<mpsc::Sender<Staged>>) -> Result<Comparison> {
        let client = sql::connect(self.dsn).await?;
        let mut begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY".to_owned();
        if let Some(snapshot) = self.exact {
            begin.push_str(&format!("; SET TRANSACTION SNAPSHOT {}", live::literal(snapshot)));
        }
        client.batch_execute(&begin).await.sql("cannot begin to read")?;
        let row = client
            .query_one("SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text", &[])
            .await
            .sql("cannot take a snapshot")?;
        let xmin = row.get::<_, &str>(0).parse().map_err(|_| Error::other("the server's snapshot has no xmin"))?;
        let mut sink = Sink {
            rt: Handle::current(),
            client,
            tables: self.tables.clone(),
            others: self.others.clone(),
            restricted: self.restricted,
            exact: self.exact.is_some(),
            scratch: self.scratch.clone(),
            memory: self.memory,
            out: Outlet { staged, batch: Vec::new(), rows: Vec::new(), limit: self.look.unwrap_or(0), mapping: None },
            look: self.look.is_some(),
            current: None,
            done: BTreeSet::new(),
            outcomes: Vec::new(),
            warnings: Vec::new(),
        };
        let target = self.target.clone();
        let sink = tokio::task::spawn_blocking(move || -> Result<Sink> {
            target.rows(&mut sink)?;
            sink.tables_without_rows(target.covered())?;
            Ok(sink)
        })
        .await
        .map_err(|e| Error::other(format!("the comparison broke off: {e}")))??;
        sink.client.batch_execute("COMMIT").await.sql("cannot end the reading transaction")?;
        let mut warnings = sink.warnings;
        warnings.sort();
        warnings.dedup();
        Ok(Comparison { tables: sink.outcomes, warnings, xmin })
    }
}

struct Outlet {
    staged: Option<mpsc::Sender<Staged>>,
    batch: Vec<u8>,
    /// Of the table at hand.
    rows: Vec<RowChange>,
    limit: usize,
    mapping: Option<Arc<Mapping>>,
}

impl Outlet {
    /// Keeps a difference to be shown.
    fn keep(&mut self, op: Op, line: &[u8], now: Option<&[u8]>) {
        let Some(m) = self.mapping.as_ref().filter(|_| self.rows.len() < self.limit) else { return };
        let fields: Vec<&[u8]> = copy_text::fields(line).collect();
        let text = |f: &[u8]| copy_text::unescape(f).map(|b| String::from_utf8_lossy(&b).into_owned());
        let all: Vec<usize> = (0..m.columns.len()).collect();
        let places = if m.key.is_empty() { &all } else { &m.key };
        let key = places.iter().filter_map(|i| Some((m.columns[*i].name.clone(), text(fields.get(*i)?)))).collect();
        let differs = |(i, (was, is)): (usize, (&[u8], &[u8]))| (was != is).then(|| m.columns[i].name.clone());
        let columns = now
            .map(|now| copy_text::fields(line).zip(copy_text::fields(now)).enumerate().filter_map(differs).collect())
            .unwrap_or_default();
        self.rows.push(RowChange { op, key, columns });
    }

    fn send(&mut self, s: Staged) -> Result<()> {
        match &self.staged {
            None => Ok(()),
            // The staging's own error is the one that is reported.
            Some(tx) => tx.blocking_send(s).map_err(|_| Error::other("the staging of differences has stopped")),
        }
    }

    fn flush(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() { Ok(()) } else { self.send(Staged::Lines(batch)) }
    }
}

impl Changes for Outlet {
    fn change(&mut self, op: Op, line: &[u8], now: Option<&[u8]>) -> Result<()> {
        self.keep(op, line, now);
        if self.staged.is_none() {
            return Ok(());
        }
        self.batch.push(op.letter());
        // A table without columns has empty lines, which are no field.
        if !line.is_empty() {
            self.batch.push(b'\t');
        }
        self.batch.extend_from_slice(line);
        self.batch.push(b'\n');
        if self.batch.len() >= BATCH_BYTES { self.flush() } else { Ok(()) }
    }
}

/// The table whose rows are coming.
struct Current {
    relid: u32,
    diff: TableDiff<SortedRows>,
    /// Where the target's rows do not come in the order of the live key, they are sorted first.
    resort: Option<Sorter>,
    line: Vec<u8>,
    key: Vec<u8>,
}

struct Sink {
    rt: Handle,
    client: SqlClient,
    tables: BTreeMap<u32, LiveTable>,
    others: BTreeSet<u32>,
    restricted: bool,
    exact: bool,
    scratch: Scratch,
    memory: usize,
    look: bool,
    out: Outlet,
    current: Option<Current>,
    done: BTreeSet<u32>,
    outcomes: Vec<TableOutcome>,
    warnings: Vec<String>,
}

impl Sink {
    /// What a table of the target is now: itself, whatever its name; or, where it is gone, the one that has its name.
    fn table_now(&self, relid: u32, name: &str) -> Option<&LiveTable> {
        self.tables.get(&relid).or_else(|| {
            let gone = !self.others.contains(&relid);
            self.tables.values().find(|t| gone && t.name() == name)
        })
    }

    fn begin(&mut self, live: &LiveTable, mapping: Mapping) -> Result<()> {
        let (client, memory) = (&self.client, self.memory / 2);
        let sorted = self.rt.block_on(live::read(client, live, &mapping, &self.scratch, memory))?;
        let purpose = if self.look {
            Purpose::Look
        } else {
            // Rows of the class are never deleted.
            Purpose::Apply { keep_extra: live.rule.class == Class::Audit && !self.exact }
        };
        let resort = (!mapping.same_order).then(|| Sorter::new(&self.scratch, self.memory / 2));
        self.out.send(Staged::Begin(live.rule.relid, Arc::new(mapping.clone())))?;
        self.out.mapping = Some(Arc::new(mapping.clone()));
        let diff = TableDiff::new(mapping, purpose, SortedRows::new(sorted)?)?;
        self.current = Some(Current { relid: live.rule.relid, diff, resort, line: Vec::new(), key: Vec::new() });
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let Some(mut c) = self.current.take() else { return Ok(()) };
        if let Some(sorter) = c.resort.take() {
            let sorted = sorter.finish()?;
            let mut cursor = sorted.cursor()?;
            while let Some((_, line)) = cursor.entry() {
                c.diff.target(line, &mut self.out)?;
                cursor.advance()?;
            }
        }
        let mapping = Arc::new(c.diff.mapping().clone());
        let counts = c.diff.finish(&mut self.out)?;
        self.out.flush()?;
        self.out.send(Staged::End)?;
        let name = self.tables[&c.relid].name();
        if counts.kept > 0 {
            self.warnings.push(format!(
                "{name}: {} rows that are not at the target stay, since rows of the class audit are never deleted",
                counts.kept
            ));
        }
        if !mapping.newer.is_empty() && counts.inserted > 0 && !self.look {
            self.warnings.push(format!(
                "{name}: rows that come back get the default of columns newer than the target: {}",
                mapping.newer.join(", ")
            ));
        }
        if !mapping.dropped.is_empty() && !self.look {
            self.warnings.push(format!(
                "{name}: columns of the target that no longer exist are left out: {}",
                mapping.dropped.join(", ")
            ));
        }
        self.done.insert(c.relid);
        let rows = std::mem::take(&mut self.out.rows);
        self.outcomes.push(TableOutcome { relid: c.relid, mapping, counts, rows });
        Ok(())
    }

    /// Tables that the target knows and has no row of: every live row there is one too many.
    fn tables_without_rows(&mut self, covered: &[CoveredTable]) -> Result<()> {
        let mut left: Vec<LiveTable> = Vec::new();
        let mut warnings = Vec::new();
        for t in self.tables.values().filter(|t| !self.done.contains(&t.rule.relid)) {
            let is_now =
                |c: &CoveredTable| self.table_now(c.relid, &c.name).is_some_and(|n| n.rule.relid == t.rule.relid);
            if covered.iter().any(is_now) {
                left.push(t.clone());
            } else {
                warnings.push(format!("{}: not backed up at the target, so it is left as it is", t.name()));
            }
        }
        self.warnings.extend(warnings);
        for live in left {
            let mapping = Mapping::live_only(&live.relation)?;
            self.begin(&live, mapping)?;
            self.finish()?;
        }
        Ok(())
    }
}

impl TargetSink for Sink {
    fn begin_table(&mut self, relation: &Relation) -> Result<()> {
        let live = self.table_now(relation.relid, &relation.qualified()).cloned();
        let Some(live) = live else {
            if !self.restricted {
                let name = relation.qualified();
                self.warnings.push(format!("{name}: not restored, it is not among the covered tables now"));
            }
            return Ok(());
        };
        if self.done.contains(&live.rule.relid) {
            return Err(Error::new(
                Kind::Refused,
                format!("{}: the target has rows of it from two tables of that name", live.name()),
            ));
        }
        let map = if self.exact { Mapping::up_to_now } else { Mapping::new };
        let mapping = map(relation, &live.relation, live.rule.relid != relation.relid)?;
        self.begin(&live, mapping)
    }

    fn row(&mut self, key: &[u8], image: &[u8]) -> Result<()> {
        let Some(c) = &mut self.current else { return Ok(()) };
        c.diff.mapping().stage(key, image, &mut c.line)?;
        match &mut c.resort {
            None => c.diff.target(&c.line, &mut self.out),
            Some(sorter) => {
                c.diff.mapping().key_of(&c.line, &mut c.key)?;
                sorter.push(&c.key, &c.line)
            }
        }
    }

    fn end_table(&mut self) -> Result<()> {
        self.finish()
    }
}
