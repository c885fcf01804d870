//! `coffer compact`: a synthetic full of each tenant at what is durable now, merged from the repository alone.

use super::progress::Progress;
use crate::catalog::FullEntry;
use crate::clock::rfc3339;
use crate::compact::{Compactor, Occasion, PARALLEL};
use crate::config::Config;
use crate::error::{Context, Kind, Result};
use crate::history::When;
use crate::lease::Lease;
use crate::opened::{Opened, scratch};
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
}

/// Compacts; the exit code: 0, or 9 when some tenants could not be.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &CompactArgs) -> Result<u8> {
    let opened = Opened::for_writing(config).await?;
    let (mut fulls, mut skipped) = (Vec::new(), Vec::new());
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
        };
        let progress = Progress::new(&format!("compacting {name}"), "tenants", tenants.len() as u64, json);
        let occasion = Occasion { trigger: "schedule".to_owned(), reason: None };
        let mut done = std::pin::pin!(compactor.all(&history, tenants, &point, &occasion));
        while let Some((t, made)) = done.next().await {
            progress.add(1);
            let who = json!({"source": name, "tenant": t.tenant.key, "kind": t.tenant.kind.name(), "uid": t.uid});
            match made {
                Ok(full) => fulls.push(merged(who, shown(&full))),
                Err(e) if matches!(e.kind(), Kind::OutsideWindow | Kind::Verification) => {
                    let code = e.kind().exit_code();
                    skipped.push(merged(who, json!({"reason": e.to_string(), "exit": code})));
                }
                Err(e) => return Err(e.during(format_args!("tenant {}", t.tenant))),
            }
        }
        intent.release().await;
    }
    let nothing_done = fulls.is_empty() && !skipped.is_empty();
    let code = match skipped.first() {
        None => 0,
        Some(first) if nothing_done => first["exit"].as_u64().and_then(|c| u8::try_from(c).ok()).unwrap_or(1),
        Some(_) => Kind::Partial.exit_code(),
    };
    let document = json!({"version": 1, "fulls": fulls, "skipped": skipped});
    let mut out = std::io::stdout().lock();
    let written = if json { writeln!(out, "{document}") } else { out.write_all(text(&document).as_bytes()) };
    written.context(Kind::Other, "cannot write to standard output")?;
    Ok(code)
}

fn shown(f: &FullEntry) -> Value {
    json!({"id": f.id, "point_lsn": f.point_lsn.to_string(), "point_time": rfc3339(f.point_time_us), "rows": f.rows,
        "bytes": f.bytes, "objects": f.objects.len()})
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
    for t in d["skipped"].as_array().into_iter().flatten() {
        out.push_str(&format!("{}: no full: {}\n", who(t), s(&t["reason"])));
    }
    if out.is_empty() {
        out.push_str("no tenant yet\n");
    }
    out
}
