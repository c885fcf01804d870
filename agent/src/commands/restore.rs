//! `coffer restore`: one tenant, at one point, into the live database, a new one, or files.

use super::hold::actor;
use super::progress::Progress;
use crate::clock::parse_duration;
use crate::config::Config;
use crate::dial;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::history::When;
use crate::opened::{Opened, Reserved, scratch};
use crate::primary;
use crate::restore::files::Format;
use crate::restore::keys::RowKey;
use crate::restore::rename::As;
use crate::restore::request::merge_memory;
use crate::restore::{self, Means, Mode, Place, Request, Watch, undo};
use crate::sql::{self, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::Class;
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;
use uuid::Uuid;

#[derive(clap::Args, Debug)]
pub struct RestoreArgs {
    /// The tenant: the text of its tenant column
    #[arg(long, value_name = "KEY", required_unless_present_any = ["reserved", "undo"])]
    pub tenant: Option<String>,
    /// Rows of no tenant instead
    #[arg(long, value_enum, conflicts_with = "tenant")]
    pub reserved: Option<Reserved>,
    /// The point: an RFC 3339 time, an LSN, name:RESTORE_POINT, backup:ID, or latest
    #[arg(long, value_name = "WHEN", required_unless_present = "undo")]
    pub to: Option<String>,
    /// Take a restore in place back, by the id that it printed or the number of the job that asked for it: to just before
    /// its commit, the tables that it changed
    #[arg(long, value_name = "ID|JOB", conflicts_with_all = ["to", "mode", "tenant", "reserved", "classes"])]
    pub undo: Option<String>,
    #[arg(long, value_enum, required_unless_present = "undo")]
    pub mode: Option<Mode>,
    /// in-place: a connection string, default the source; schema: the name of a new schema of the source, or a connection
    /// string; database: a connection string, created if absent; files: a folder
    #[arg(long, value_name = "DSN|NAME|DIR")]
    pub target: Option<String>,
    /// For --mode files
    #[arg(long, value_enum, default_value = "copy")]
    pub format: Format,
    /// Only this table (name or schema.name); may be repeated
    #[arg(long = "table", value_name = "TABLE")]
    pub tables: Vec<String>,
    /// Only the row of this --table with this key: a value, or a JSON object of the key's columns; may be repeated
    #[arg(long = "where-key", value_name = "KEY", requires = "tables")]
    pub keys: Vec<RowKey>,
    /// Only tables of this class: data, config, accounts, customization or audit; may be repeated
    #[arg(long = "class", value_name = "CLASS", value_parser = class)]
    pub classes: Vec<Class>,
    /// Restore the tenant as another one, whose key nobody has: its tenant column is rewritten
    #[arg(long = "as", value_name = "KEY", conflicts_with_all = ["undo", "reserved"])]
    pub other_key: Option<String>,
    /// With --as: the tenant's column, where the source is not at hand to say it
    #[arg(long, value_name = "COLUMN", requires = "other_key")]
    pub tenant_column: Option<String>,
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

pub(super) fn class(s: &str) -> Result<Class, String> {
    Class::from_name(s).ok_or_else(|| {
        let all: Vec<_> = Class::ALL.iter().map(|c| c.name()).collect();
        format!("'{s}' is no class; there is: {}", all.join(", "))
    })
}

/// Restores; the exit code.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &RestoreArgs) -> Result<u8> {
    let mode = args.mode.unwrap_or(Mode::InPlace);
    let to = match (&args.to, &args.undo) {
        (Some(to), _) => to.parse().map_err(|e: String| Error::usage(format!("--to: {e}")))?,
        (None, Some(id)) => When::Undo(undo_id(config, source, id).await?),
        (None, None) => return Err(Error::usage("--to is missing")),
    };
    let place = place(config, source, args, mode).await?;
    let opened = Opened::new(config, args.from.as_deref()).await?;
    let (name, uid) = opened.source(config, source).await?;
    let (tenant, tables) = match (&args.tenant, args.reserved, &to) {
        (_, _, When::Undo(id)) => undone(&opened, uid, *id, args).await?,
        (_, Some(r), _) => (r.tenant(), args.tables.clone()),
        (Some(k), None, _) => (Tenant::normal(k), args.tables.clone()),
        (None, None, _) => return Err(Error::usage("--tenant is missing")),
    };
    let request = Request {
        tables,
        classes: args.classes.clone(),
        keys: args.keys.clone(),
        rename: renamed(config, source, args).await?,
        roles: args.roles,
        wait: args.wait,
        allow_incomplete: args.allow_incomplete,
        dry_run: args.dry_run || !args.confirm,
        ..Request::new(tenant, to, place)
    };
    let progress = Progress::new("restoring", "rows", 0, json);
    let means = Means {
        opened: &opened,
        source: (&name, uid),
        scratch: scratch(config)?,
        memory: merge_memory(config.limits.memory),
        watch: Watch::counting(progress.count.clone()),
    };
    let mut report = restore::run(&means, &request).await?;
    if let Some(id) = report.undo.clone() {
        match hold(config, &opened, uid, &request.written_tenant(), &id).await {
            Ok(until_us) => report.undo_until_us = until_us,
            Err(e) => {
                report
                    .warnings
                    .push(format!("what an undo needs is not held, and goes when its retention says so: {e}"));
            }
        }
    }
    drop(progress);
    print(&report.document(), json, args)?;
    Ok(if report.incomplete > 0 && !report.dry_run { Kind::Partial.exit_code() } else { 0 })
}

/// What `--as` asks for.
async fn renamed(config: &Config, source: Option<&str>, args: &RestoreArgs) -> Result<Option<As>> {
    let Some(key) = args.other_key.clone() else { return Ok(None) };
    let column = args.tenant_column.clone();
    let source = match &column {
        Some(_) => None,
        None => Some(Box::new(source_dsn(config, source).await?)),
    };
    Ok(Some(As { key, column, source }))
}

/// Which restore is to be taken back. What a job did only its source knows.
async fn undo_id(config: &Config, source: Option<&str>, id: &str) -> Result<Uuid> {
    if let Ok(id) = Uuid::try_parse(id) {
        return Ok(id);
    }
    match id.parse::<i64>() {
        Ok(job) => undo_of_job(config, source, job).await,
        Err(_) => {
            Err(Error::usage(format!("--undo: '{id}' is neither the id of a restore in place nor a job's number"))
                .hint("a restore in place prints its id; where it printed a position, use --to with that"))
        }
    }
}

/// The id of the restore that a job made.
async fn undo_of_job(config: &Config, source: Option<&str>, job: i64) -> Result<Uuid> {
    let (name, _) = config.pick_source(source)?;
    let dsn = source_dsn(config, source).await?;
    let client = sql::connect(&dsn.with_application_name("coffer restore")).await?;
    // What is committed counts, whatever the job's row says by now.
    let row = client
        .query_opt(
            "SELECT j.kind, j.state, coalesce((SELECT c.result FROM coffer._agent_job_committed(j.job) c), j.result) \
             FROM coffer.jobs j WHERE j.job = $1",
            &[&job],
        )
        .await
        .sql("cannot look at the job")?
        .ok_or_else(|| Error::new(Kind::NotFound, format!("source {name} has no job {job}")).hint("see coffer.jobs"))?;
    let (kind, state, result): (&str, &str, Option<Value>) = (row.get(0), row.get(1), row.get(2));
    let result = result.unwrap_or_default();
    let refused = |why: String| Error::new(Kind::Refused, format!("there is nothing to take back of job {job}: {why}"));
    match (kind, result["mode"].as_str(), result["undo"].as_str()) {
        (_, _, Some(undo)) => Uuid::try_parse(undo)
            .map_err(|_| refused(format!("it noted the position {undo}, and no id")).hint(format!("use --to {undo}"))),
        ("restore", Some("in-place"), None) if result["dry_run"] == true => {
            Err(refused("it counted, and changed nothing".to_owned()))
        }
        ("restore", Some("in-place"), None) => Err(refused("its restore found no difference".to_owned())),
        ("restore", Some(mode), None) => Err(refused(format!("it is a restore in mode {mode}"))),
        ("restore", None, None) => Err(refused(format!("it is {state}, and committed nothing"))),
        _ => Err(refused(format!("it is a {kind}"))),
    }
}

/// Whose an undo is, and of which tables.
async fn undone(opened: &Opened, source: Uuid, id: Uuid, args: &RestoreArgs) -> Result<(Tenant, Vec<String>)> {
    let found = undo::find(opened, source, id, &args.tables, args.wait).await?;
    if found.rows && args.keys.is_empty() {
        return Err(Error::new(
            Kind::Refused,
            format!("restore {id} was of single rows of {}", found.tables.join(", ")),
        )
        .hint("name the rows to take back: --table TABLE --where-key KEY, as for the restore"));
    }
    Ok((found.tenant, if args.tables.is_empty() { found.tables } else { args.tables.clone() }))
}

/// Holds what an undo needs, through a repository that is open for writing; until when.
async fn hold(config: &Config, opened: &Opened, source: Uuid, tenant: &Tenant, id: &str) -> Result<Option<i64>> {
    let uid = opened.keyring.tenant_uid(source, tenant);
    let opened = Opened::for_writing(config).await?;
    undo::hold(&opened.repo, source, uid, id, &actor()).await
}

/// Where the source is now.
async fn source_dsn(config: &Config, source: Option<&str>) -> Result<Dsn> {
    dial::install_crypto_provider();
    let (name, at) = config.pick_source(source)?;
    let dsn = Dsn::parse(&at.url).map_err(|e| e.during(format_args!("[source.{name}] url")))?;
    primary::newest(&dsn).await
}

async fn place(config: &Config, source: Option<&str>, args: &RestoreArgs, mode: Mode) -> Result<Place> {
    let need = |what: &str| {
        args.target.clone().ok_or_else(|| Error::usage(format!("--mode {} needs --target {what}", mode.name())))
    };
    match mode {
        _ if args.roles && mode != Mode::Database => {
            Err(Error::usage("--roles goes with --mode database; --mode files writes roles.sql by itself"))
        }
        Mode::Schema => {
            // A name has neither: what has is a connection string.
            let (url, name) = match &args.target {
                Some(t) if t.contains("://") || t.contains('=') => (Some(t.clone()), None),
                name => (None, name.clone()),
            };
            let dsn = match url {
                Some(url) => Dsn::parse(&url)?,
                None => source_dsn(config, source).await?,
            };
            Ok(Place::Schema { dsn: Box::new(dsn), name, readers: Vec::new() })
        }
        Mode::InPlace => {
            let dsn = match &args.target {
                Some(t) => Dsn::parse(t)?,
                None => source_dsn(config, source).await?,
            };
            Ok(Place::InPlace(Box::new(dsn)))
        }
        Mode::Database => Ok(Place::Database(Box::new(Dsn::parse(&need("DSN")?)?))),
        Mode::Files => Ok(Place::Files { dir: PathBuf::from(need("DIR")?), format: args.format }),
    }
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
    if let Some(o) = d["large_objects"].as_object() {
        let differing = o["differing"].as_array().map_or(0, Vec::len);
        out.push_str(&format!(
            "  large objects: {} created, {} exist already ({differing} differ), {} not kept\n",
            o["created"], o["existing"], o["missing_count"]
        ));
    }
    for w in d["warnings"].as_array().into_iter().flatten() {
        out.push_str(&format!("warning: {}\n", s(w)));
    }
    if let Some(key) = d["as"].as_str() {
        out.push_str(&format!("as tenant {key}\n"));
    }
    if let Some(name) = d["schema"].as_str() {
        out.push_str(&format!("schema: {name}\n"));
    }
    if let Some(u) = d["undo"].as_str() {
        let until = d["undo_until"].as_str().map(|t| format!(" (what that needs is held until {t})"));
        out.push_str(&format!("to take it back: coffer restore --undo {u}{}\n", until.unwrap_or_default()));
    }
    if d["dry_run"] == true && !args.dry_run {
        out.push_str("nothing was changed; add --confirm to do it\n");
    }
    out
}
