//! `coffer prune`: what retention keeps, what it keeps no more, and why; with `--confirm`, what is kept no more goes.

use crate::clock::parse_duration;
use crate::config::Config;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::opened::Opened;
use crate::prune::{Pruner, Report};
use crate::repository::records_of_a_pack;
use crate::retention::Policy;
use crate::tenant::Tenant;
use serde_json::json;
use std::time::Duration;

#[derive(clap::Args, Debug)]
pub struct PruneArgs {
    /// Only this tenant
    #[arg(long, value_name = "KEY")]
    pub tenant: Option<String>,
    /// Record what goes, and delete what was recorded a grace ago; without it, only the plan
    #[arg(long)]
    pub confirm: bool,
    /// Between the record and the deletion; default: the configuration's, `retention.grace`
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub grace: Option<Duration>,
}

/// Plans and, with `--confirm`, acts; the exit code.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &PruneArgs) -> Result<u8> {
    let grace = args.grace.unwrap_or(config.retention.grace);
    crate::config::check_grace(grace).map_err(|e| Error::usage(format!("--grace: {e}")))?;
    let opened = if args.confirm { Opened::for_writing(config).await? } else { Opened::new(config, None).await? };
    let mut reports = Vec::new();
    for (name, uid) in opened.sources(source).await? {
        let tenant = match &args.tenant {
            Some(key) => Some(opened.tenant((&name, uid), &Tenant::normal(key)).await?),
            None => None,
        };
        let dsn = config.source.get(&name).map(|s| Dsn::parse(&s.url)).transpose()?;
        let pruner = Pruner {
            repo: opened.repo.clone(),
            keyring: opened.keyring.clone(),
            source: (name, uid),
            dsn,
            policy: Policy::from(&config.retention),
            grace,
            tenant,
            confirm: args.confirm,
            checkpoint_step: records_of_a_pack(),
        };
        reports.push(pruner.run().await?);
    }
    print(&reports, json, args.confirm)?;
    Ok(exit_code(&reports))
}

/// 0, or what the tenants that were not pruned make.
fn exit_code(reports: &[Report]) -> u8 {
    let tenants = || reports.iter().flat_map(|r| &r.tenants);
    let failed: Vec<&Error> = tenants().filter_map(|t| t.error.as_ref()).collect();
    let kind = match failed.as_slice() {
        [] if reports.iter().any(|r| r.confirmed) && tenants().any(|t| t.locked) => Kind::Fenced,
        [] => return 0,
        [one] if tenants().count() == 1 => one.kind(),
        _ => Kind::Partial,
    };
    kind.exit_code()
}

fn print(reports: &[Report], json: bool, confirmed: bool) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let written = if json {
        let sources: Vec<_> = reports.iter().map(Report::to_json).collect();
        writeln!(out, "{}", json!({"version": 1, "confirmed": confirmed, "sources": sources}))
    } else {
        reports.iter().try_for_each(|r| out.write_all(r.text().as_bytes()))
    };
    written.context(Kind::Other, "cannot write to standard output")
}
