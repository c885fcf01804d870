//! The repository's rows of a tenant against its live rows, exact while everybody goes on writing.
//!
//! The live rows are read under one snapshot. What the snapshot sees is what the archive has to hold: the newest fulls
//! from before the first transaction that it does not see, and the transactions that it sees, whatever the order in the
//! log of those that it does not ([`crate::snapshot::visibility`]). Both sides come sorted by key and are compared row by
//! row.
//!
//! Why nothing is called lost that is only late: a marker is committed, flushed, after the snapshot was taken, and the
//! comparison waits until the log has what was flushed then. Why nothing is compared with a table of another shape: the
//! tables are locked before the snapshot (and given up when a migration waits), and their rules and columns are read
//! under it; when they are others than a moment before, it begins again.

use crate::crypto::random;
use crate::dsn::Dsn;
use crate::error::{Error, Kind, Result};
use crate::history::{History, Inputs};
use crate::lease::Lease;
use crate::merge::{Holes, Image, RowSink, Scratch, TenantAt};
use crate::opened::Opened;
use crate::repository::{Body, Log};
use crate::restore::in_place::compare::{Comparison, CoveredTable, Pass, Staged, Target, TargetSink};
use crate::restore::in_place::live::{self, LiveTable};
use crate::restore::in_place::mapping::Mapping;
use crate::restore::{Watch, line_to_compare};
use crate::snapshot::catalog;
use crate::snapshot::read::migration_waits;
use crate::snapshot::visibility::PgSnapshot;
use crate::sql::{self, SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::{KeyMode, Lsn, Relation, copy_text};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// Differing keys that are named, for each table and kind.
pub const NAMED: usize = 20;
/// The same in an alarm.
const KEYS_IN_ALARM: usize = 5;
/// How often it begins again when tables change under it, and how long it pauses before.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(500);
/// How long a lock is waited for.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the log is looked at while the marker is waited for.
const POLL: Duration = Duration::from_millis(500);
/// Longest key in a message.
const KEY_CHARS: usize = 200;

/// What a validation works with.
pub struct Validation<'a> {
    pub opened: &'a Opened,
    /// Name and uid.
    pub source: (&'a str, Uuid),
    pub dsn: &'a Dsn,
    pub scratch: Scratch,
    /// Bytes of memory.
    pub memory: usize,
    pub watch: Watch,
    /// How long the repository may take to catch up with the snapshot.
    pub patience: Duration,
}

/// How a row differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// A live row that the archive does not have.
    LostRow,
    /// A row that the archive has with other values.
    ChangedValue,
    /// A row that the archive has and that is not there.
    ExtraRow,
}

impl Difference {
    /// As the document of `coffer verify` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::LostRow => "lost_row",
            Self::ChangedValue => "changed_value",
            Self::ExtraRow => "extra_row",
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::LostRow => "rows that are not in the repository",
            Self::ChangedValue => "rows with other values in the repository",
            Self::ExtraRow => "rows in the repository that are not in the database",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::LostRow => "is not in the repository",
            Self::ChangedValue => "has other values in the repository",
            Self::ExtraRow => "is in the repository and not in the database",
        }
    }
}

/// A row that differs.
#[derive(Clone, Debug)]
pub struct RowFailure {
    pub kind: Difference,
    pub relation: String,
    /// `None`: stands for those beyond the ones that are named.
    pub key: Option<String>,
    pub message: String,
}

/// What was compared, and what differs.
#[derive(Clone, Debug)]
pub struct Validated {
    pub tenant: Tenant,
    /// The live rows are as of here.
    pub lsn: Lsn,
    /// Rows that are the same, by table.
    pub tables: Vec<(String, u64)>,
    /// By table and kind: how many rows, and the keys of the first of them.
    pub differences: BTreeMap<(String, Difference), (u64, Vec<String>)>,
    /// Tables without a key: what stands for one is the whole row.
    pub keyless: BTreeSet<String>,
    /// Tables with live rows that could not be compared, and why.
    pub skipped: Vec<(String, String)>,
    pub warnings: Vec<String>,
}

impl Validated {
    /// Nothing differs of what was compared.
    pub fn is_same(&self) -> bool {
        self.differences.is_empty()
    }

    /// The differences one by one, as far as their keys are named.
    pub fn failures(&self) -> Vec<RowFailure> {
        let mut out = Vec::new();
        for ((relation, kind), (count, keys)) in &self.differences {
            let failure = |key, message| RowFailure { kind: *kind, relation: relation.clone(), key, message };
            for k in keys {
                out.push(failure(Some(k.clone()), format!("{relation}: the row with {k} {}", kind.words())));
            }
            let more = count - keys.len() as u64;
            if more > 0 {
                out.push(failure(None, format!("{relation}: {more} more rows like these: each {}", kind.words())));
            }
        }
        out
    }

    /// How many rows differ in which tables, without a key: for what is kept where no tenant's data may be.
    pub fn counts(&self) -> Option<String> {
        let one = |((relation, kind), (count, _)): (&(String, Difference), &(u64, Vec<String>))| {
            format!("{relation}: {count} {}", kind.noun())
        };
        let all: Vec<String> = self.differences.iter().map(one).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// The same with the keys of the first rows of each kind, and never a value: a table without a key has its count
    /// alone.
    pub fn keys(&self) -> String {
        let one = |((relation, kind), (count, keys)): (&(String, Difference), &(u64, Vec<String>))| {
            let mut text = format!("{relation}: {count} {}", kind.noun());
            if !self.keyless.contains(relation) {
                let first: Vec<&str> = keys.iter().take(KEYS_IN_ALARM).map(String::as_str).collect();
                let more = if *count > first.len() as u64 { ", …" } else { "" };
                text.push_str(&format!(" ({}{more})", first.join("; ")));
            }
            text
        };
        self.differences.iter().map(one).collect::<Vec<_>>().join("; ")
    }

    /// For the document of `coffer verify`.
    pub fn document(&self) -> Value {
        let count = |relation: &str, d| self.differences.get(&(relation.to_owned(), d)).map_or(0, |(n, _)| *n);
        let table = |(relation, same): &(String, u64)| {
            json!({"relation": relation, "same": same, "lost": count(relation, Difference::LostRow),
                "changed": count(relation, Difference::ChangedValue), "extra": count(relation, Difference::ExtraRow)})
        };
        let skipped = |(relation, why): &(String, String)| json!({"relation": relation, "reason": why});
        json!({"tenant": self.tenant.key, "kind": self.tenant.kind.name(), "ok": self.is_same() && self.skipped.is_empty(),
            "lsn": self.lsn.to_string(), "tables": self.tables.iter().map(table).collect::<Vec<_>>(),
            "skipped": self.skipped.iter().map(skipped).collect::<Vec<_>>(), "warnings": self.warnings})
    }
}

/// The live rows, held still.
struct Still {
    /// Holds locks and snapshot.
    session: SqlClient,
    snapshot: PgSnapshot,
    exported: String,
    lsn: Lsn,
}

impl Validation<'_> {
    /// Compares.
    ///
    /// # Errors
    /// `Verification`, `NotFound`, `Key`: an object that is needed cannot be read. `OutsideWindow` (code `not_durable`):
    /// the repository does not catch up. `Fenced`: tables changed all the time.
    pub async fn run(&self, tenant: &Tenant) -> Result<Validated> {
        let uid = self.opened.tenant(self.source, tenant).await?.uid;
        // What is read must not be removed meanwhile: it would be missed, and called lost.
        let lease = Lease::take(&self.opened.repo, self.source.1, uid).await?;
        let done = self.attempts(tenant, uid).await;
        lease.release().await;
        done
    }

    async fn attempts(&self, tenant: &Tenant, uid: Uuid) -> Result<Validated> {
        let mut why = String::new();
        for _ in 0..ATTEMPTS {
            self.watch.check()?;
            match self.attempt(tenant, uid).await {
                Err(e) if e.is_code("again") => why = e.to_string(),
                done => return done,
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(Error::new(Kind::Fenced, format!("the tables change too often to be compared; last: {why}"))
            .hint("try again when no migration runs"))
    }

    async fn attempt(&self, tenant: &Tenant, uid: Uuid) -> Result<Validated> {
        let dsn = self.dsn.with_application_name("coffer validation");
        // Open before the snapshot: a server that crashed after it, and forgot what it saw, takes this session along.
        let marker = sql::connect(&dsn).await?;
        self.same_server(&marker).await?;
        marker.batch_execute("SET synchronous_commit = local").await.sql("cannot set up the session")?;
        let tables = live::tables(&marker, tenant, &|_| true).await?;
        let still = hold_still(&dsn, &tables).await?;
        let relids: Vec<u32> = tables.iter().map(|t| t.rule.relid).collect();
        let compared = async {
            let flushed = mark(&marker).await?;
            let mut history = self.wait_for(flushed).await?;
            history.load_catalog(uid).await?;
            self.compare(tenant, uid, tables, &still, &history).await
        };
        tokio::select! {
            done = compared => done,
            w = migration_waits(&dsn, &relids) => {
                w?;
                Err(again("a migration waits for a table"))
            }
        }
    }

    /// The database is of the cluster that the archive is of.
    async fn same_server(&self, client: &SqlClient) -> Result<()> {
        let row = client
            .query_one(
                "SELECT pg_catalog.pg_is_in_recovery(), system_identifier::text, \
                    CASE WHEN NOT pg_catalog.pg_is_in_recovery() \
                        THEN pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) END \
                 FROM pg_catalog.pg_control_system()",
                &[],
            )
            .await
            .sql("cannot ask for the server's identity")?;
        if row.get(0) {
            return Err(Error::new(Kind::Refused, "the server is a standby: no marker can be written there")
                .hint("let the source's url name the primary"));
        }
        let log = Log::open(&self.opened.repo, self.source.1, self.opened.from.as_deref()).await?;
        let archived = log.last().map(|r| r.system_identifier.to_string()).unwrap_or_default();
        let timeline = log.last().map_or(0, |r| r.timeline);
        let theirs = row.get::<_, Option<&str>>(2).and_then(|f| u32::from_str_radix(f.get(..8)?, 16).ok());
        if theirs.is_some_and(|t| t < timeline) {
            let what = format!("the server is on timeline {}, the archive on {timeline}", theirs.unwrap_or_default());
            return Err(Error::new(Kind::Refused, what)
                .code("old_timeline")
                .hint("this server was left behind by a promotion: let the source's url name the new primary"));
        }
        let found: String = row.get(1);
        if archived != found {
            return Err(Error::new(
                Kind::Refused,
                format!("the server's system identifier is {found}, the archive is of {archived}"),
            )
            .hint("the source's url names another server than the one that is backed up"));
        }
        Ok(())
    }

    /// The history in which everything up to there is.
    async fn wait_for(&self, flushed: Lsn) -> Result<History> {
        let began = Instant::now();
        loop {
            self.watch.check()?;
            let log = Log::open(&self.opened.repo, self.source.1, self.opened.from.as_deref()).await?;
            let upto = log.upto_lsn().unwrap_or_default();
            if upto >= flushed {
                return self.opened.history(self.source.1).await;
            }
            if began.elapsed() > self.patience {
                return Err(Error::new(
                    Kind::OutsideWindow,
                    format!("the repository has everything up to {upto} only, after {:?}", self.patience),
                )
                .code("not_durable")
                .hint("validation needs `coffer run` to ship what was just written; see `coffer status`"));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn compare(
        &self,
        tenant: &Tenant,
        uid: Uuid,
        tables: Vec<LiveTable>,
        still: &Still,
        history: &History,
    ) -> Result<Validated> {
        if history
            .records()
            .iter()
            .rev()
            .any(|r| matches!(r.body, Body::Gap { .. } | Body::Timeline { .. }) && r.upto_lsn >= still.lsn)
        {
            return Err(again("the log broke off a moment ago"));
        }
        let (end, time_us) = history.end();
        let target = crate::history::Target { asked: "live".to_owned(), lsn: end, time_us };
        let unseen = history.first_unseen(still.snapshot.xmin, &|xid| still.snapshot.sees(xid)).await?;
        let mut usable = history.known(&target);
        let is_ours = |relid: u32| tables.iter().any(|t| t.rule.relid == relid);
        if usable.iter().any(|t| is_ours(t.relid) && unseen.is_some_and(|at| t.cut >= at)) {
            return Err(again("a table got its base a moment ago"));
        }
        let has = |t: &LiveTable| usable.iter().any(|u| u.relid == t.rule.relid);
        let mut skipped = Vec::new();
        for t in tables.iter().filter(|t| !has(t)) {
            let there = live::any_with_rows(&still.session, std::slice::from_ref(t)).await;
            if there.sql(format_args!("cannot read {}", t.name()))?.is_some() {
                let why = "its rows are not known to the repository now: it waits for a base";
                skipped.push((t.name(), why.to_owned()));
            }
        }
        let tables: BTreeMap<u32, LiveTable> =
            tables.into_iter().filter(|t| has(t)).map(|t| (t.rule.relid, t)).collect();
        usable.retain(|t| tables.contains_key(&t.relid));
        let covered = usable.iter().map(|t| CoveredTable { relid: t.relid, name: t.name.clone() }).collect();
        let begin = unseen.map_or(end, |at| Lsn(at.0 - 1));
        let inputs: Inputs = history.inputs_from(uid, begin, end, usable).await?;
        let at = TenantAt {
            repo: self.opened.repo.clone(),
            rt: Handle::current(),
            tenant: tenant.clone(),
            inputs: Arc::new(inputs),
            from: self.opened.from.clone(),
            scratch: self.scratch.clone(),
            memory: self.memory / 2,
            // What the archive lacks of a row is a difference.
            holes: Holes::Null,
            seen: Some(Arc::new(still.snapshot.clone())),
        };
        let target: Arc<dyn Target> = Arc::new(Archived { at, covered, watch: self.watch.clone() });
        let pass = Pass {
            dsn: self.dsn,
            target: &target,
            tables: &tables,
            others: &BTreeSet::new(),
            restricted: true,
            scratch: &self.scratch,
            memory: self.memory / 2,
            look: None,
            exact: Some(&still.exported),
        };
        let (tx, rx) = mpsc::channel(8);
        let (found, differences) = tokio::join!(pass.run(Some(tx)), differences(&tables, rx));
        Ok(validated(tenant, still, &tables, (found?, differences?), skipped))
    }
}

/// By table and kind: how many, and some of the keys.
type Differences = BTreeMap<(String, Difference), (u64, Vec<String>)>;

fn validated(
    tenant: &Tenant,
    still: &Still,
    tables: &BTreeMap<u32, LiveTable>,
    (found, mut differences): (Comparison, Differences),
    skipped: Vec<(String, String)>,
) -> Validated {
    let same = |t: &crate::restore::in_place::compare::TableOutcome| (tables[&t.relid].name(), t.counts.unchanged);
    for v in differences.values_mut() {
        v.1.sort();
    }
    let keyless = tables.values().filter(|t| t.relation.key_mode == KeyMode::FullRow).map(LiveTable::name).collect();
    Validated {
        tenant: tenant.clone(),
        lsn: still.lsn,
        tables: found.tables.iter().map(same).collect(),
        differences,
        keyless,
        skipped,
        warnings: found.warnings,
    }
}

/// The archive's rows, for the comparison.
struct Archived {
    at: TenantAt,
    covered: Vec<CoveredTable>,
    watch: Watch,
}

struct Rows<'a>(&'a mut dyn TargetSink, &'a Watch);

impl RowSink for Rows<'_> {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.0.begin_table(rel)
    }

    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        self.1.check()?;
        match image.as_line() {
            Some(line) => self.0.row(key, line),
            None => self.0.row(key, &line_to_compare(image)?),
        }
    }

    fn end_table(&mut self) -> Result<()> {
        self.0.end_table()
    }
}

impl Target for Archived {
    fn rows(&self, sink: &mut dyn TargetSink) -> Result<()> {
        self.at.read(&mut Rows(sink, &self.watch)).map(drop)
    }

    fn covered(&self) -> &[CoveredTable] {
        &self.covered
    }
}

fn again(why: &str) -> Error {
    Error::new(Kind::Fenced, why.to_owned()).code("again")
}

/// Locks the tables, takes a snapshot, and sees to it that they are what they were found to be.
async fn hold_still(dsn: &Dsn, tables: &[LiveTable]) -> Result<Still> {
    let session = sql::connect(dsn).await?;
    let mut text = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = {}",
        LOCK_TIMEOUT.as_millis()
    );
    for t in tables {
        text.push_str(&format!("; LOCK TABLE {} IN ACCESS SHARE MODE", t.rule.lock_list()));
    }
    match session.batch_execute(&text).await {
        Err(e) if e.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => return Err(again("a table's lock is not free")),
        Err(e) if e.code() == Some(&SqlState::UNDEFINED_TABLE) => return Err(again("a table was dropped or renamed")),
        r => r.sql("cannot lock the tables")?,
    }
    let row = session
        .query_one(
            "SELECT pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_current_wal_insert_lsn()::text, \
             pg_catalog.pg_export_snapshot()",
            &[],
        )
        .await
        .sql("cannot take a snapshot")?;
    let snapshot = row.get::<_, &str>(0).parse()?;
    let lsn: Lsn = row.get::<_, &str>(1).parse().map_err(Error::other)?;
    let exported = row.get(2);
    let rules = catalog::rules(&session).await?;
    for t in tables {
        let same = rules.iter().any(|r| r.relid == t.rule.relid && r.registered_xid == t.rule.registered_xid);
        if !same || catalog::describe(&session, &t.rule, t.rule.relid).await? != t.relation {
            return Err(again(&format!("{} changed a moment ago", t.name())));
        }
    }
    Ok(Still { session, snapshot, exported, lsn })
}

/// Commits something, flushed: what the snapshot saw was committed before it. Returns how far the server's log is safe.
async fn mark(session: &SqlClient) -> Result<Lsn> {
    let id: [u8; 16] = random::bytes();
    session.execute("SELECT coffer._agent_base_marker($1)", &[&id.as_slice()]).await.sql("cannot write a marker")?;
    let row = session
        .query_one("SELECT pg_catalog.pg_current_wal_flush_lsn()::text", &[])
        .await
        .sql("cannot read the position of the log")?;
    row.get::<_, &str>(0).parse().map_err(Error::other)
}

/// Takes the lines of the difference; keeps the first keys of each kind.
async fn differences(
    tables: &BTreeMap<u32, LiveTable>,
    mut rx: mpsc::Receiver<Staged>,
) -> Result<BTreeMap<(String, Difference), (u64, Vec<String>)>> {
    let mut out: BTreeMap<(String, Difference), (u64, Vec<String>)> = BTreeMap::new();
    let mut table: Option<(String, Arc<Mapping>)> = None;
    while let Some(s) = rx.recv().await {
        let lines = match s {
            Staged::Begin(relid, mapping) => {
                table = tables.get(&relid).map(|t| (t.name(), mapping));
                continue;
            }
            Staged::End => continue,
            Staged::Lines(l) => l,
        };
        let Some((name, mapping)) = &table else { return Err(Error::other("a difference came before its table")) };
        for line in lines.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let kind = match line[0] {
                b'I' => Difference::ExtraRow,
                b'U' => Difference::ChangedValue,
                _ => Difference::LostRow,
            };
            let (count, keys) = out.entry((name.clone(), kind)).or_default();
            *count += 1;
            if keys.len() < NAMED {
                keys.push(key_words(mapping, line.get(2..).unwrap_or_default()));
            }
        }
    }
    Ok(out)
}

/// `tenant = 1, id = 7`: the key of a line, or what the whole line says where there is none.
fn key_words(mapping: &Mapping, line: &[u8]) -> String {
    let fields: Vec<&[u8]> = copy_text::fields(line).collect();
    let all: Vec<usize> = (0..mapping.columns.len()).collect();
    let places = if mapping.key.is_empty() { &all } else { &mapping.key };
    let words: Vec<String> = places
        .iter()
        .filter_map(|p| {
            let value = copy_text::unescape(fields.get(*p)?);
            let value = value.map_or("NULL".to_owned(), |v| String::from_utf8_lossy(&v).into_owned());
            Some(format!("{} = {value}", mapping.columns[*p].name))
        })
        .collect();
    let text = words.join(", ");
    match text.char_indices().nth(KEY_CHARS) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::rows::tests::column;
    use coffer_wire::{Class, KeyMode, Strategy};

    fn mapping(key: &[u16]) -> Mapping {
        let r = Relation {
            relid: 1,
            leaf: 1,
            schema: "s".into(),
            name: "t".into(),
            class: Class::Data,
            strategy: Strategy::Identity,
            key_mode: if key.is_empty() { KeyMode::FullRow } else { KeyMode::Key },
            columns: vec![column(1, "id", 0), column(2, "v", 0)],
            key: key.to_vec(),
        };
        Mapping::live_only(&r).unwrap()
    }

    #[test]
    fn keys_are_named_with_their_columns() {
        assert_eq!(key_words(&mapping(&[0]), b"7\ta"), "id = 7");
        assert_eq!(key_words(&mapping(&[]), b"7\t\\N"), "id = 7, v = NULL");
        let long = key_words(&mapping(&[0]), format!("{}\ta", "x".repeat(300)).as_bytes());
        assert!(long.ends_with('…') && long.chars().count() == KEY_CHARS + 1);
    }

    #[test]
    fn differences_that_are_not_named_are_counted() {
        let v = Validated {
            tenant: Tenant::normal("1"),
            lsn: Lsn(1),
            tables: vec![("s.t".into(), 5)],
            differences: [(("s.t".to_owned(), Difference::LostRow), (3, vec!["id = 7".to_owned()]))].into(),
            keyless: BTreeSet::new(),
            skipped: vec![],
            warnings: vec![],
        };
        let f = v.failures();
        assert_eq!((f.len(), f[0].kind.name(), f[0].key.as_deref()), (2, "lost_row", Some("id = 7")));
        assert!(f[1].message.contains("2 more rows"), "{}", f[1].message);
        assert_eq!(v.document()["tables"][0]["lost"], 3);
        assert_eq!(v.counts().as_deref(), Some("s.t: 3 rows that are not in the repository"));
        assert_eq!(v.keys(), "s.t: 3 rows that are not in the repository (id = 7, …)");
        let keyless = Validated { keyless: ["s.t".to_owned()].into(), ..v };
        assert_eq!(keyless.keys(), "s.t: 3 rows that are not in the repository");
    }
}
