//! `coffer list`: tenants, what each can be restored to, its backups.

use super::hold;
use crate::catalog::{Hold, State};
use crate::clock::rfc3339;
use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};
use crate::history::History;
use crate::keyring::TenantEntry;
use crate::opened::Opened;
use crate::repository::ObjectRef;
use crate::tenant::Tenant;
use coffer_wire::TenantKind;
use serde_json::{Value, json};
use uuid::Uuid;

#[derive(clap::Args, Debug)]
pub struct ListArgs {
    /// Only this tenant
    #[arg(long, value_name = "KEY")]
    pub tenant: Option<String>,
    /// Read from this store alone, as it is
    #[arg(long, value_name = "STORE")]
    pub from: Option<String>,
}

/// Prints the tenants of a source, or of all.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &ListArgs) -> Result<()> {
    let opened = Opened::new(config, args.from.as_deref()).await?;
    let (mut tenants, mut reserved) = (Vec::new(), Vec::new());
    for (name, uid) in opened.sources(source).await? {
        let mut history = opened.history(uid).await?;
        history.load_catalogs().await?;
        if let Err(e) = opened.keyring.require(history.records().iter().flat_map(|r| r.objects()).map(ObjectRef::key)) {
            tracing::warn!("the list is not whole: {e}");
        }
        for e in opened.keyring.tenants(uid) {
            let wanted = match e.tenant.kind {
                TenantKind::Normal => args.tenant.as_ref().is_none_or(|t| *t == e.tenant.key),
                _ => args.tenant.is_none(),
            };
            if !wanted {
                continue;
            }
            let none = State::default();
            let state = history.catalog(e.uid).unwrap_or(&none);
            let list = if e.tenant.kind == TenantKind::Normal { &mut tenants } else { &mut reserved };
            list.push(tenant(&name, &history, &e, state));
        }
    }
    if let (Some(t), true) = (&args.tenant, tenants.is_empty()) {
        return Err(Error::new(
            Kind::NotFound,
            format!("there is no tenant '{}' in the repository", Tenant::normal(t)),
        )
        .hint("a tenant is known once its first rows are durable"));
    }
    let document = json!({"version": 1, "tenants": tenants, "reserved": reserved});
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let written = if json { writeln!(out, "{document}") } else { out.write_all(text(&document).as_bytes()) };
    written.context(Kind::Other, "cannot write to standard output")
}

fn tenant(source: &str, history: &History, e: &TenantEntry, state: &State) -> Value {
    let gaps: Vec<_> = history
        .gaps(Some(e.uid))
        .into_iter()
        .map(|g| json!({"from_lsn": g.from.to_string(), "to_lsn": g.to.to_string(), "reason": g.reason}))
        .collect();
    let backups: Vec<_> = history
        .backups(e.uid)
        .into_iter()
        .map(|b| {
            json!({"id": b.id, "kind": b.kind, "trigger": b.trigger, "reason": b.reason,
                "point_lsn": b.point.to_string(), "point_time": rfc3339(b.time_us), "bytes": b.bytes, "rows": b.rows,
                "tables": b.tables, "verified_at": b.verified_us.map(rfc3339), "holds": holding(state, b.time_us)})
        })
        .collect();
    let tables: Vec<_> = history
        .holdings(e.uid)
        .into_iter()
        .map(|h| json!({"relation": h.relation, "class": h.class, "rows": h.rows}))
        .collect();
    json!({"source": source, "tenant": e.tenant.key, "kind": e.tenant.kind.name(), "uid": e.uid, "state": "active",
        "created_at": rfc3339(e.created_us), "window": history.windows(Some(e.uid)), "gaps": gaps, "backups": backups,
        "tables": tables, "holds": state.holds.iter().map(hold::to_json).collect::<Vec<_>>()})
}

/// The holds whose span a backup's point is in.
fn holding(state: &State, point_us: i64) -> Vec<Uuid> {
    let covers = |h: &&Hold| h.from_us.is_none_or(|f| f <= point_us) && h.to_us.is_none_or(|t| point_us <= t);
    state.holds.iter().filter(covers).map(|h| h.id).collect()
}

fn text(d: &Value) -> String {
    let s = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let mut out = String::new();
    for t in ["tenants", "reserved"].iter().flat_map(|k| d[*k].as_array().into_iter().flatten()) {
        let name = if t["kind"] == "normal" { s(&t["tenant"]) } else { format!("({})", s(&t["kind"])) };
        out.push_str(&format!("{} {name}  {}\n", s(&t["source"]), s(&t["uid"])));
        for w in t["window"].as_array().into_iter().flatten() {
            out.push_str(&format!(
                "  window  {} ({}) to {} ({})\n",
                s(&w["from_time"]),
                s(&w["from_lsn"]),
                s(&w["to_time"]),
                s(&w["to_lsn"])
            ));
        }
        for g in t["gaps"].as_array().into_iter().flatten() {
            out.push_str(&format!("  gap     {} to {}: {}\n", s(&g["from_lsn"]), s(&g["to_lsn"]), s(&g["reason"])));
        }
        for h in t["tables"].as_array().into_iter().flatten() {
            let class = h["class"].as_str().unwrap_or("class not noted");
            let rows = h["rows"].as_u64().map_or_else(|| "rows not noted".to_owned(), |n| format!("{n} rows"));
            out.push_str(&format!("  table   {} ({class}): {rows} in its newest base\n", s(&h["relation"])));
        }
        for h in t["holds"].as_array().into_iter().flatten() {
            let end = |k: &str, none: &str| h[k].as_str().unwrap_or(none).to_owned();
            let (from, to) = (end("from", "the beginning"), end("to", "whatever comes"));
            let until = h["until"].as_str().map(|u| format!(", until {u}")).unwrap_or_default();
            out.push_str(&format!("  hold    {} from {from} to {to}{until}: {}\n", s(&h["hold"]), s(&h["reason"])));
        }
        for b in t["backups"].as_array().into_iter().flatten() {
            out.push_str(&format!(
                "  {:<7} {} ({}) at {} ({}), {} rows, {} bytes\n",
                s(&b["kind"]),
                s(&b["id"]),
                s(&b["trigger"]),
                s(&b["point_time"]),
                s(&b["point_lsn"]),
                b["rows"],
                b["bytes"]
            ));
        }
    }
    if out.is_empty() {
        out.push_str("no tenant yet\n");
    }
    out
}
