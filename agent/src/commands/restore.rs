//! `coffer restore`: one tenant, at one point, into the live database, a new one, or files.

use super::progress::Progress;
use crate::clock::parse_duration;
use crate::config::Config;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::opened::{Opened, Reserved, scratch};
use crate::restore::files::Format;
use crate::restore::request::merge_memory;
use crate::restore::{self, Means, Mode, Place, Request, Watch};
use crate::tenant::Tenant;
use coffer_wire::Class;
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

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

fn class(s: &str) -> Result<Class, String> {
    Class::from_name(s).ok_or_else(|| {
        let all: Vec<_> = Class::ALL.iter().map(|c| c.name()).collect();
        format!("'{s}' is no class; there is: {}", all.join(", "))
    })
}

/// Restores; the exit code.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &RestoreArgs) -> Result<u8> {
    let to = args.to.parse().map_err(|e: String| Error::usage(format!("--to: {e}")))?;
    let tenant = match (&args.tenant, args.reserved) {
        (_, Some(r)) => r.tenant(),
        (Some(k), None) => Tenant::normal(k),
        (None, None) => return Err(Error::usage("--tenant is missing")),
    };
    let request = Request {
        tables: args.tables.clone(),
        classes: args.classes.clone(),
        roles: args.roles,
        wait: args.wait,
        allow_incomplete: args.allow_incomplete,
        dry_run: args.dry_run || !args.confirm,
        ..Request::new(tenant, to, place(config, source, args)?)
    };
    let opened = Opened::new(config, args.from.as_deref()).await?;
    let (name, uid) = opened.source(config, source).await?;
    let progress = Progress::new("restoring", "rows", 0, json);
    let means = Means {
        opened: &opened,
        source: (&name, uid),
        scratch: scratch(config)?,
        memory: merge_memory(config.limits.memory),
        watch: Watch::counting(progress.count.clone()),
    };
    let report = restore::run(&means, &request).await?;
    drop(progress);
    print(&report.document(), json, args)?;
    Ok(if report.incomplete > 0 && !report.dry_run { Kind::Partial.exit_code() } else { 0 })
}

fn place(config: &Config, source: Option<&str>, args: &RestoreArgs) -> Result<Place> {
    let need = |what: &str| {
        args.target.clone().ok_or_else(|| Error::usage(format!("--mode {} needs --target {what}", args.mode.name())))
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
            Ok(Place::InPlace(Box::new(Dsn::parse(&url)?)))
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
    if let Some(u) = d["undo"].as_str() {
        out.push_str(&format!("to take it back: restore to {u}\n"));
    }
    if d["dry_run"] == true && !args.dry_run {
        out.push_str("nothing was changed; add --confirm to do it\n");
    }
    out
}
