//! `coffer diff`: what changed of a tenant since a point, per table and per row. It changes nothing.

use super::progress::Progress;
use super::restore::class;
use crate::clock::parse_duration;
use crate::config::Config;
use crate::dial;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::opened::{Opened, Reserved, scratch};
use crate::primary;
use crate::restore::difference::difference;
use crate::restore::keys::RowKey;
use crate::restore::request::merge_memory;
use crate::restore::{Means, Place, Request, Watch};
use crate::tenant::Tenant;
use coffer_wire::Class;
use std::io::Write;
use std::time::Duration;

#[derive(clap::Args, Debug)]
pub struct DiffArgs {
    /// The tenant: the text of its tenant column
    #[arg(long, value_name = "KEY", required_unless_present = "reserved")]
    pub tenant: Option<String>,
    /// Rows of no tenant instead
    #[arg(long, value_enum, conflicts_with = "tenant")]
    pub reserved: Option<Reserved>,
    /// Since when: an RFC 3339 time, an LSN, name:RESTORE_POINT, backup:ID, or latest
    #[arg(long, value_name = "WHEN")]
    pub to: String,
    /// The database with the live rows; default the source
    #[arg(long, value_name = "DSN")]
    pub target: Option<String>,
    /// Only this table (name or schema.name); may be repeated
    #[arg(long = "table", value_name = "TABLE")]
    pub tables: Vec<String>,
    /// Only the row of this --table with this key: a value, or a JSON object of the key's columns; may be repeated
    #[arg(long = "where-key", value_name = "KEY", requires = "tables")]
    pub where_keys: Vec<RowKey>,
    /// Only tables of this class: data, config, accounts, customization or audit; may be repeated
    #[arg(long = "class", value_name = "CLASS", value_parser = class)]
    pub classes: Vec<Class>,
    /// Name this many rows of each table that differ
    #[arg(long = "keys", value_name = "N", default_value_t = 20)]
    pub rows: usize,
    /// Read from this store alone, as it is
    #[arg(long, value_name = "STORE")]
    pub from: Option<String>,
    /// Wait this long for the point to become durable, for example 60s
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub wait: Option<Duration>,
}

/// Compares and prints.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &DiffArgs) -> Result<()> {
    let to = args.to.parse().map_err(|e: String| Error::usage(format!("--to: {e}")))?;
    let tenant = match (&args.tenant, args.reserved) {
        (_, Some(r)) => r.tenant(),
        (Some(k), None) => Tenant::normal(k),
        (None, None) => return Err(Error::usage("--tenant is missing")),
    };
    dial::install_crypto_provider();
    let dsn = match &args.target {
        Some(t) => Dsn::parse(t)?,
        None => primary::newest(&Dsn::parse(&config.pick_source(source)?.1.url)?).await?,
    };
    let request = Request {
        tables: args.tables.clone(),
        classes: args.classes.clone(),
        keys: args.where_keys.clone(),
        wait: args.wait,
        dry_run: true,
        ..Request::new(tenant, to, Place::InPlace(Box::new(dsn)))
    };
    let opened = Opened::new(config, args.from.as_deref()).await?;
    let (name, uid) = opened.source(config, source).await?;
    let progress = Progress::new("comparing", "rows", 0, json);
    let means = Means {
        opened: &opened,
        source: (&name, uid),
        scratch: scratch(config)?,
        memory: merge_memory(config.limits.memory),
        watch: Watch::counting(progress.count.clone()),
    };
    let found = difference(&means, &request, args.rows).await?;
    drop(progress);
    let mut out = std::io::stdout().lock();
    let written = if json { writeln!(out, "{}", found.document()) } else { out.write_all(found.text().as_bytes()) };
    written.context(Kind::Other, "cannot write to standard output")
}
