//! `coffer restore`: one tenant, at one point, into the live database, a new one, or files.

use super::opened::{Opened, Reserved, scratch};
use super::progress::Progress;
use crate::accounts::Roles;
use crate::clock::{parse_duration, rfc3339};
use crate::config::Config;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::history::{History, Target, When};
use crate::merge::{Holes, Image, MergeStats, RowSink, Scratch, TenantAt};
use crate::restore::database::{self, Beside, NewDatabase};
use crate::restore::files::{self, Files, Format};
use crate::restore::in_place::compare::{self, CoveredTable, TargetSink};
use crate::restore::in_place::{InPlace, Options};
use crate::restore::{Counts, Selected};
use crate::tenant::Tenant;
use coffer_wire::{Class, Relation};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// How often the log is looked at while a target is waited for.
const POLL: Duration = Duration::from_millis(500);

#[derive(clap::Args, Debug)]
pub struct RestoreArgs {
    /// The tenant: the text of its tenant column
    #[arg(long, value_name = "KEY", required_unless_present = "reserved")]
    pub tenant: Option<String>,
    /// Rows of no tenant instead
    #[arg(long, value_enum, conflicts_with = "tenant")]
    pub reserved: Option<Reserved>,
    /// The point: an RFC 3339 time, an LSN, name:RESTORE_POINT, backup:ID, or latest
    #[arg(long, value_name = "WHEN")]
    pub to: String,
    #[arg(long, value_enum)]
    pub mode: Mode,
    /// in-place: a connection string, default the source; database: a connection string, created if absent; files: a folder
    #[arg(long, value_name = "DSN|NAME|DIR")]
    pub target: Option<String>,
    /// For --mode files
    #[arg(long, value_enum, default_value = "copy")]
    pub format: Format,
    /// Only this table (name or schema.name); may be repeated
    #[arg(long = "table", value_name = "TABLE")]
    pub tables: Vec<String>,
    /// Only tables of this class: data, config, accounts, customization or audit; may be repeated
    #[arg(long = "class", value_name = "CLASS", value_parser = class)]
    pub classes: Vec<Class>,
    /// For --mode database: create and alter the tenant's roles, too, with their memberships, settings and grants
    #[arg(long)]
    pub roles: bool,
    /// Read from this store alone, as it is
    #[arg(long, value_name = "STORE")]
    pub from: Option<String>,
    /// Wait this long for the point to become durable, for example 60s
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub wait: Option<Duration>,
    /// Leave values NULL that came with a row from another tenant and are not in this one's backup (exit code 9)
    #[arg(long)]
    pub allow_incomplete: bool,
    /// Count what would be done, per table; change nothing
    #[arg(long, conflicts_with = "confirm")]
    pub dry_run: bool,
    /// Do it; without it, the plan is printed
    #[arg(long)]
    pub confirm: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Into the live database: only what differs is changed, in one transaction
    InPlace,
    /// Side by side, in a new schema (not in this version)
    Schema,
    /// Into a new database: definitions, shared tables, the tenant's rows
    Database,
    /// Into a folder
    Files,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::InPlace => "in-place",
            Self::Schema => "schema",
            Self::Database => "database",
            Self::Files => "files",
        }
    }
}

fn class(s: &str) -> Result<Class, String> {
    Class::from_name(s).ok_or_else(|| {
        let all: Vec<_> = Class::ALL.iter().map(|c| c.name()).collect();
        format!("'{s}' is no class; there is: {}", all.join(", "))
    })
}

/// What a restore did, or would do, as the document has it.
#[derive(Default)]
struct Report {
    tables: Vec<Value>,
    bytes: u64,
    undo: Option<String>,
    warnings: Vec<String>,
    incomplete: u64,
}

/// Restores; the exit code.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &RestoreArgs) -> Result<u8> {
    args.to.parse::<When>().map_err(|e| Error::usage(format!("--to: {e}")))?;
    let place = Destination::of(config, source, args).await?;
    let opened = Opened::new(config, args.from.as_deref()).await?;
    let (name, uid) = opened.source(config, source).await?;
    let progress = Progress::new("restoring", "rows", 0, json);
    let means =
        Means { scratch: scratch(config)?, memory: merge_memory(config.limits.memory), rows: progress.count.clone() };
    let (document, code) = restore(&opened, (&name, uid), args, place, means).await?;
    drop(progress);
    print(&document, json, args)?;
    Ok(code)
}

/// What a restore may use, and where it says how far it is.
pub(crate) struct Means {
    pub scratch: Scratch,
    /// For the merge, in bytes.
    pub memory: usize,
    /// Rows that were read from the repository.
    pub rows: Arc<AtomicU64>,
}

/// Restores as `args` say; the document, and the exit code of what ended well.
pub(crate) async fn restore(
    opened: &Opened,
    (name, uid): (&str, uuid::Uuid),
    args: &RestoreArgs,
    place: Destination,
    means: Means,
) -> Result<(Value, u8)> {
    let started = Instant::now();
    let when: When = args.to.parse().map_err(|e: String| Error::usage(format!("the target: {e}")))?;
    let tenant = match (&args.tenant, args.reserved) {
        (_, Some(r)) => r.tenant(),
        (Some(k), None) => Tenant::normal(k),
        (None, None) => return Err(Error::usage("--tenant is missing")),
    };
    let entry = opened.tenant((name, uid), &tenant).await?;
    let (history, target) = wait_for(opened, uid, &when, args).await?;
    let wanted = |qualified: &str| wanted(&args.tables, qualified);
    let tables = history.require(&target, entry.uid, &wanted)?;
    let inputs = Arc::new(history.inputs(entry.uid, target.lsn, tables));
    let at = TenantAt {
        repo: opened.repo.clone(),
        rt: Handle::current(),
        tenant: tenant.clone(),
        inputs,
        from: opened.from.clone(),
        scratch: means.scratch,
        memory: means.memory,
        holes: if args.allow_incomplete { Holes::Null } else { Holes::Refuse },
    };
    let dry_run = args.dry_run || !args.confirm;
    let counts = Counts::watched(means.rows);
    let report = match place {
        Destination::Live(dsn) => in_place(&dsn, &tenant, at, args, dry_run).await?,
        Destination::Folder(_) | Destination::Database(_) if dry_run => count(at, args, counts).await?,
        Destination::Folder(dir) => {
            let roles = roles(opened, &history, entry.uid, &target, args).await?;
            to_files(dir, at, args, counts, (&target, roles)).await?
        }
        Destination::Database(dsn) => {
            let shared = shared(opened, uid, &history, &target, &at)?;
            let beside = Beside {
                sequences: history.sequences(&target).await?,
                settings: history.database_settings(&target).to_vec(),
                roles: roles(opened, &history, entry.uid, &target, args).await?,
            };
            to_database(dsn, (shared, at), beside, args, counts).await?
        }
    };
    let document = json!({
        "version": 1, "dry_run": dry_run, "source": name, "tenant": tenant.key, "kind": tenant.kind.name(),
        "mode": args.mode.name(),
        "target": {"asked": target.asked, "lsn": target.lsn.to_string(), "time": rfc3339(target.time_us)},
        "tables": report.tables, "bytes": report.bytes, "seconds": started.elapsed().as_secs_f64(),
        "undo": report.undo, "warnings": report.warnings,
    });
    Ok((document, if report.incomplete > 0 && !dry_run { Kind::Partial.exit_code() } else { 0 }))
}

/// What the merge may use of `limits.memory`: readers, the other end and the process itself have the rest.
fn merge_memory(limit: u64) -> usize {
    const REST: u64 = 40 << 20;
    usize::try_from((limit.saturating_sub(REST) / 2).max(8 << 20)).unwrap_or(usize::MAX)
}

/// Where a restore goes, looked at before anything is read.
pub(crate) enum Destination {
    Live(Box<Dsn>),
    Database(Box<Dsn>),
    Folder(PathBuf),
}

impl Destination {
    pub(crate) async fn of(config: &Config, source: Option<&str>, args: &RestoreArgs) -> Result<Self> {
        let need = |what: &str| {
            args.target
                .clone()
                .ok_or_else(|| Error::usage(format!("--mode {} needs --target {what}", args.mode.name())))
        };
        match args.mode {
            _ if args.roles && args.mode != Mode::Database => {
                Err(Error::usage("--roles goes with --mode database; --mode files writes roles.sql by itself"))
            }
            Mode::Schema => Err(Error::new(Kind::Refused, "--mode schema is not available in this version")
                .code("not_available")
                .hint("use --mode database for a copy beside the live data")),
            Mode::InPlace => {
                let url = match &args.target {
                    Some(t) => t.clone(),
                    None => config.pick_source(source)?.1.url.clone(),
                };
                Ok(Self::Live(Box::new(Dsn::parse(&url)?)))
            }
            Mode::Database => {
                crate::dial::install_crypto_provider();
                let dsn = Dsn::parse(&need("DSN")?)?;
                database::require_absent_or_empty(&dsn).await?;
                Ok(Self::Database(Box::new(dsn)))
            }
            Mode::Files => {
                args.format.require()?;
                let dir = PathBuf::from(need("DIR")?);
                files::require_empty(&dir)?;
                Ok(Self::Folder(dir))
            }
        }
    }
}

/// Whether a table is asked for: `name`, `schema.name`, or as SQL quotes it.
fn wanted(asked: &[String], qualified: &str) -> bool {
    let plain = unquoted(qualified);
    asked.is_empty()
        || asked
            .iter()
            .any(|a| a == qualified || *a == plain || plain.rsplit_once('.').is_some_and(|(_, name)| a == name))
}

/// `"S"."t"` as `S.t`.
fn unquoted(qualified: &str) -> String {
    let mut out = String::with_capacity(qualified.len());
    let mut chars = qualified.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '"' {
            out.push(c);
        } else if chars.peek() == Some(&'"') {
            out.push('"');
            chars.next();
        }
    }
    out
}

/// The history in which the target is durable, and the target. For a new database, its definitions count, too: the agent
/// archives them a moment after they changed.
async fn wait_for(opened: &Opened, source: uuid::Uuid, when: &When, args: &RestoreArgs) -> Result<(History, Target)> {
    let deadline = args.wait.map(|w| Instant::now() + w);
    let over = || deadline.is_none_or(|d| Instant::now() + POLL > d);
    loop {
        let history = opened.history(source).await?;
        match history.resolve(when).await {
            Ok(target) if args.mode != Mode::Database || over() || !history.definitions_pending(&target) => {
                return Ok((history, target));
            }
            Ok(_) => {}
            Err(e) => {
                let may_come =
                    e.is_code("not_durable") || (e.kind() == Kind::NotFound && matches!(when, When::Name(_)));
                if !may_come || over() {
                    return Err(e);
                }
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f).await.context(Kind::Other, "a worker thread broke off")?
}

fn counted(counts: &Counts) -> Vec<Value> {
    let row = |t: &crate::restore::TableRows| json!({"relation": t.rel.qualified(), "inserted": t.rows, "updated": 0, "deleted": 0, "unchanged": 0});
    counts.tables.iter().map(row).collect()
}

fn warnings_of(stats: &[MergeStats], warnings: &mut Vec<String>) -> u64 {
    let sum = |f: fn(&MergeStats) -> u64| stats.iter().map(f).sum::<u64>();
    let (incomplete, duplicates) = (sum(|s| s.incomplete), sum(|s| s.duplicates));
    if incomplete > 0 {
        warnings
            .push(format!("{incomplete} rows came from another tenant with values that are not in this backup: NULL"));
    }
    if duplicates > 0 {
        warnings.push(format!("{duplicates} rows of a base had the key of another row: the source's index is damaged"));
    }
    incomplete
}

/// Without --confirm: reads everything and counts.
async fn count(at: TenantAt, args: &RestoreArgs, mut counts: Counts) -> Result<Report> {
    let classes = args.classes.clone();
    let (stats, counts) = blocking(move || {
        let stats = at.read(&mut Selected::new(&classes, None, &mut counts))?;
        Ok((stats, counts))
    })
    .await?;
    let mut report = Report { tables: counted(&counts), bytes: counts.bytes, ..Report::default() };
    report.incomplete = warnings_of(&[stats], &mut report.warnings);
    Ok(report)
}

/// The tenant's roles at the target, unless the restore is of other classes.
async fn roles(
    opened: &Opened,
    history: &History,
    tenant: uuid::Uuid,
    target: &Target,
    args: &RestoreArgs,
) -> Result<Option<Roles>> {
    if !args.classes.is_empty() && !args.classes.contains(&Class::Accounts) {
        return Ok(None);
    }
    let Some(object) = history.roles(tenant, target) else { return Ok(None) };
    let plain = opened.repo.open_small(object, opened.from.as_deref()).await?;
    let roles = Roles::decode(&plain).map_err(|e| e.during(format_args!("object {}", object.path)))?;
    Ok((!roles.roles.is_empty()).then_some(roles))
}

async fn to_files(
    dir: PathBuf,
    at: TenantAt,
    args: &RestoreArgs,
    mut counts: Counts,
    (target, roles): (&Target, Option<Roles>),
) -> Result<Report> {
    let (classes, format, target) = (args.classes.clone(), args.format, target.clone());
    let (stats, counts) = blocking(move || {
        let mut files = Files::create(&dir, format)?;
        let stats = at.read(&mut Selected::new(&classes, Some(&mut files), &mut counts))?;
        files.finish(&at.tenant.key, &target, roles.as_ref())?;
        Ok((stats, counts))
    })
    .await?;
    let mut report = Report { tables: counted(&counts), bytes: counts.bytes, ..Report::default() };
    report.incomplete = warnings_of(&[stats], &mut report.warnings);
    Ok(report)
}

/// The shared tables at the same point, when there are any.
fn shared(
    opened: &Opened,
    source: uuid::Uuid,
    history: &History,
    target: &Target,
    at: &TenantAt,
) -> Result<Option<TenantAt>> {
    let tenant = Reserved::Shared.tenant();
    if at.tenant == tenant {
        return Ok(None);
    }
    let Some(entry) = opened.keyring.find(source, &tenant) else { return Ok(None) };
    // Which tables are shared is known from the rows alone; what is not known at the target is the tenant's, or was asked
    // for and refused before.
    let inputs = Arc::new(history.inputs(entry.uid, target.lsn, history.known(target)));
    Ok(Some(TenantAt { tenant, inputs, ..at.clone() }))
}

async fn to_database(
    dsn: Box<Dsn>,
    (shared, at): (Option<TenantAt>, TenantAt),
    mut beside: Beside,
    args: &RestoreArgs,
    counts: Counts,
) -> Result<Report> {
    let inputs = at.inputs.clone();
    if let Some(w) = &inputs.schema_warning
        && inputs.schema.is_some()
    {
        // Never a table of another moment's shape.
        return Err(Error::new(Kind::Refused, format!("{w}: a new database would have the wrong ones"))
            .code("definitions_unknown")
            .hint("wait for them with --wait 60s, choose a point after the change was archived, or use --mode files"));
    }
    let schema = inputs.schema.clone().ok_or_else(|| {
        Error::new(Kind::Refused, "the bases up to the target hold no definitions: a new database cannot be made")
            .code("no_schema")
            .hint("use --mode files; `coffer run` archives definitions with pg_dump, see its log for why it could not")
    })?;
    let mut warnings = Vec::new();
    if let Some(r) = beside.roles.take_if(|_| !args.roles) {
        let names = r.roles.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        warnings.push(format!(
            "the tenant's roles are archived and were left alone ({names}): add --roles, or see roles.sql of --mode files"
        ));
    } else if args.roles && beside.roles.is_none() {
        warnings.push("no roles are archived for this tenant at the target: coffer.add_role() ties some to it".into());
    }
    let done = NewDatabase {
        dsn: *dsn,
        // A choice of tables is of the tenant's; the shared ones come whole, as its rows refer to them.
        rows: shared.into_iter().chain([at]).collect(),
        classes: args.classes.clone(),
        schema,
        beside,
        spool: std::env::temp_dir(),
        counts,
    }
    .run()
    .await?;
    let mut report = Report {
        tables: counted(&done.counts),
        bytes: done.counts.bytes,
        warnings: warnings.into_iter().chain(done.warnings).collect(),
        ..Report::default()
    };
    report.incomplete = warnings_of(&done.stats, &mut report.warnings);
    Ok(report)
}

/// The merge as the restore in place wants it.
struct Merged {
    at: TenantAt,
    covered: Vec<CoveredTable>,
}

struct Adapter<'a>(&'a mut dyn TargetSink);

impl RowSink for Adapter<'_> {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.0.begin_table(rel)
    }

    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        match image.as_line() {
            Some(line) => self.0.row(key, line),
            None => self.0.row(key, &image.to_line()?),
        }
    }

    fn end_table(&mut self) -> Result<()> {
        self.0.end_table()
    }
}

impl compare::Target for Merged {
    fn rows(&self, sink: &mut dyn TargetSink) -> Result<()> {
        self.at.read(&mut Adapter(sink)).map(drop)
    }

    fn covered(&self) -> &[CoveredTable] {
        &self.covered
    }
}

async fn in_place(dsn: &Dsn, tenant: &Tenant, at: TenantAt, args: &RestoreArgs, dry_run: bool) -> Result<Report> {
    let covered = at.inputs.tables.iter().map(|t| CoveredTable { relid: t.relid, name: t.name.clone() }).collect();
    let (scratch, memory) = (at.scratch.clone(), at.memory / 2);
    let options = Options { dry_run, tables: args.tables.clone(), classes: args.classes.clone() };
    let target = Arc::new(Merged { at: TenantAt { memory, ..at }, covered });
    let done = InPlace { dsn, tenant, target, scratch: &scratch, memory, options: &options }.run().await?;
    let row = |t: &crate::restore::in_place::TableCount| {
        json!({"relation": t.relation, "inserted": t.inserted, "updated": t.updated, "deleted": t.deleted,
            "unchanged": t.unchanged})
    };
    Ok(Report {
        tables: done.tables.iter().map(row).collect(),
        bytes: done.bytes,
        undo: done.undo.map(|l| l.to_string()),
        warnings: done.warnings,
        incomplete: 0,
    })
}

fn print(document: &Value, json: bool, args: &RestoreArgs) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let written = if json { writeln!(out, "{document}") } else { out.write_all(text(document, args).as_bytes()) };
    written.context(Kind::Other, "cannot write to standard output")
}

fn text(d: &Value, args: &RestoreArgs) -> String {
    let s = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let verb = if d["dry_run"] == true { "would restore" } else { "restored" };
    let mut out = format!(
        "{verb} tenant {} of {} to {} (lsn {}, {}), mode {}\n",
        s(&d["tenant"]),
        s(&d["source"]),
        s(&d["target"]["asked"]),
        s(&d["target"]["lsn"]),
        s(&d["target"]["time"]),
        s(&d["mode"])
    );
    for t in d["tables"].as_array().into_iter().flatten() {
        out.push_str(&format!(
            "  {}: {} inserted, {} updated, {} deleted, {} unchanged\n",
            s(&t["relation"]),
            t["inserted"],
            t["updated"],
            t["deleted"],
            t["unchanged"]
        ));
    }
    for w in d["warnings"].as_array().into_iter().flatten() {
        out.push_str(&format!("warning: {}\n", s(w)));
    }
    if let Some(u) = d["undo"].as_str() {
        out.push_str(&format!("to take it back: restore to {u}\n"));
    }
    if d["dry_run"] == true && !args.dry_run {
        out.push_str("nothing was changed; add --confirm to do it\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_named_as_people_do() {
        let asked = |a: &str, q: &str| wanted(&[a.to_owned()], q);
        assert!(wanted(&[], "public.a"));
        assert!(asked("a", "public.a") && asked("public.a", "public.a"));
        assert!(
            asked("S.My \"t\"", "\"S\".\"My \"\"t\"\"\"") && asked("\"S\".\"My \"\"t\"\"\"", "\"S\".\"My \"\"t\"\"\"")
        );
        assert!(!asked("b", "public.a") && !asked("other.a", "public.a") && !asked("ublic.a", "public.a"));
    }
}
