//! `coffer compact`: a synthetic full, or an incremental, of each tenant at what is durable now, merged from the repository
//! alone.

use super::progress::Progress;
use crate::catalog::{FullEntry, IncrementalEntry};
use crate::clock::rfc3339;
use crate::compact::{Compactor, Occasion, Outcome, PARALLEL};
use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};
use crate::history::When;
use crate::keyring::TenantEntry;
use crate::lease::Lease;
use crate::opened::{Opened, scratch};
use crate::restore::Watch;
use crate::tenant::Tenant;
use futures::StreamExt;
use serde_json::{Value, json};
use std::io::Write;
use tokio::runtime::Handle;

#[derive(clap::Args, Debug)]
pub struct CompactArgs {
    /// Only this tenant
    #[arg(long, value_name = "KEY")]
    pub tenant: Option<String>,
    /// Make incrementals: what each tenant's changes since the last one come to
    #[arg(long)]
    pub incremental: bool,
    /// Make archives: fulls that are complete by themselves, with definitions, roles and reference data
    #[arg(long, conflicts_with = "incremental")]
    pub archive: bool,
}

/// Compacts; the exit code: 0, or 9 when some tenants could not be.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &CompactArgs) -> Result<u8> {
    let opened = Opened::for_writing(config).await?;
    let (mut fulls, mut incrementals, mut unchanged) = (Vec::new(), Vec::new(), 0u64);
    let (mut elsewhere, mut skipped) = (Vec::new(), Vec::new());
    for (name, uid) in opened.sources(source).await? {
        // Before the catalogs are read: what they name by then is not removed until the fulls that refer to it are recorded.
        let intent = Lease::intent(&opened.repo, uid).await?;
        let mut history = opened.history(uid).await?;
        history.load_catalogs().await?;
        let tenants = match &args.tenant {
            Some(k) => vec![opened.tenant((&name, uid), &Tenant::normal(k)).await?],
            None => opened.keyring.tenants(uid),
        };
        let point = history.resolve(&When::Latest).await?;
        let compactor = Compactor {
            repo: opened.repo.clone(),
            keyring: opened.keyring.clone(),
            rt: Handle::current(),
            clock: opened.repo.clock().clone(),
            source: uid,
            scratch: scratch(config)?,
            memory: usize::try_from(config.limits.memory / 2).unwrap_or(usize::MAX) / PARALLEL,
            part_bytes: config.compact.part,
            // Who names a tenant wants it done.
            share: args.tenant.is_none(),
            watch: Watch::default(),
        };
        let who = |t: &TenantEntry| json!({"source": name, "tenant": t.tenant.key, "kind": t.tenant.kind.name(), "uid": t.uid});
        let progress = Progress::new(&format!("compacting {name}"), "tenants", tenants.len() as u64, json);
        let mut skip = |t: &TenantEntry, e: Error| match e.kind() {
            Kind::OutsideWindow | Kind::Verification => {
                let code = e.kind().exit_code();
                skipped.push(merged(who(t), json!({"reason": e.to_string(), "exit": code})));
                Ok(())
            }
            _ => Err(e.during(format_args!("tenant {}", t.tenant))),
        };
        if args.incremental {
            let mut done = std::pin::pin!(compactor.all_incrementals(&history, tenants));
            while let Some((t, made)) = done.next().await {
                progress.add(1);
                match made {
                    Ok(Outcome::Made(i)) => incrementals.push(merged(who(&t), net(&i))),
                    Ok(Outcome::Unchanged) => unchanged += 1,
                    Ok(Outcome::Elsewhere) => elsewhere.push(who(&t)),
                    Err(e) => skip(&t, e)?,
                }
            }
        } else {
            let occasion = Occasion::of_command(args.archive);
            let mut done = std::pin::pin!(compactor.all(&history, tenants, &point, &occasion));
            while let Some((t, made)) = done.next().await {
                progress.add(1);
                match made {
                    Ok(Outcome::Made(full)) => fulls.push(merged(who(&t), shown(&full))),
                    Ok(Outcome::Unchanged) => unchanged += 1,
                    Ok(Outcome::Elsewhere) => elsewhere.push(who(&t)),
                    Err(e) => skip(&t, e)?,
                }
            }
        }
        intent.release().await;
    }
    let nothing_done = fulls.is_empty() && incrementals.is_empty() && !skipped.is_empty();
    let code = match skipped.first() {
        None => 0,
        Some(first) if nothing_done => first["exit"].as_u64().and_then(|c| u8::try_from(c).ok()).unwrap_or(1),
        Some(_) => Kind::Partial.exit_code(),
    };
    let document = json!({"version": 1, "fulls": fulls, "incrementals": incrementals, "unchanged": unchanged,
        "elsewhere": elsewhere, "skipped": skipped});
    let mut out = std::io::stdout().lock();
    let written = if json { writeln!(out, "{document}") } else { out.write_all(text(&document).as_bytes()) };
    written.context(Kind::Other, "cannot write to standard output")?;
    Ok(code)
}

fn shown(f: &FullEntry) -> Value {
    json!({"id": f.id, "point_lsn": f.point_lsn.to_string(), "point_time": rfc3339(f.point_time_us), "rows": f.rows,
        "bytes": f.bytes, "objects": f.objects.len()})
}

fn net(i: &IncrementalEntry) -> Value {
    json!({"id": i.id, "from_lsn": i.from_lsn.to_string(), "point_lsn": i.to_lsn.to_string(),
        "point_time": rfc3339(i.to_time_us), "rows": i.rows, "bytes": i.bytes,
        "object": i.object.as_ref().map(|o| o.path.clone())})
}

fn merged(mut a: Value, b: Value) -> Value {
    if let (Some(a), Value::Object(b)) = (a.as_object_mut(), b) {
        a.extend(b);
    }
    a
}

fn text(d: &Value) -> String {
    let s = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let who = |t: &Value| {
        let name = if t["kind"] == "normal" { s(&t["tenant"]) } else { format!("({})", s(&t["kind"])) };
        format!("{} {name}", s(&t["source"]))
    };
    let mut out = String::new();
    for f in d["fulls"].as_array().into_iter().flatten() {
        out.push_str(&format!(
            "{}: full {} at {} ({}), {} rows, {} bytes written\n",
            who(f),
            s(&f["id"]),
            s(&f["point_time"]),
            s(&f["point_lsn"]),
            f["rows"],
            f["bytes"]
        ));
    }
    for i in d["incrementals"].as_array().into_iter().flatten() {
        out.push_str(&format!(
            "{}: incremental {} from {} to {} ({}), {} changes, {} bytes written\n",
            who(i),
            s(&i["id"]),
            s(&i["from_lsn"]),
            s(&i["point_lsn"]),
            s(&i["point_time"]),
            i["rows"],
            i["bytes"]
        ));
    }
    for t in d["elsewhere"].as_array().into_iter().flatten() {
        out.push_str(&format!("{}: left to another worker, which has this tenant\n", who(t)));
    }
    for t in d["skipped"].as_array().into_iter().flatten() {
        out.push_str(&format!("{}: not done: {}\n", who(t), s(&t["reason"])));
    }
    if let Some(n) = d["unchanged"].as_u64().filter(|n| *n > 0) {
        out.push_str(&format!("{n} tenants did not change since their last incrementals\n"));
    }
    if out.is_empty() {
        out.push_str("no tenant yet\n");
    }
    out
}
