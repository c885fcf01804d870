//! What changed since a point: the difference that a restore in place would apply, told from the other side. It reads,
//! and locks nothing above ACCESS SHARE.

use super::in_place::InPlace;
use super::in_place::Looked;
use super::in_place::compare::RowChange;
use super::in_place::diff::Op;
use super::request::{Means, Place, Request};
use super::run::{Prepared, leased, merged, options};
use crate::clock::rfc3339;
use crate::error::{Error, Result};
use crate::history::Target;
use crate::tenant::Tenant;
use serde_json::{Map, Value, json};
use std::time::Instant;

/// What changed since the target.
pub struct Difference {
    source: String,
    tenant: Tenant,
    target: Target,
    tables: Vec<Looked>,
    warnings: Vec<String>,
    seconds: f64,
}

/// Compares the tenant at the request's target with its live rows. `rows`: how many of each table are named.
pub async fn difference(means: &Means<'_>, request: &Request, rows: usize) -> Result<Difference> {
    leased(means, request, look(means, request, rows)).await
}

async fn look(means: &Means<'_>, request: &Request, rows: usize) -> Result<Difference> {
    let started = Instant::now();
    let Place::InPlace(dsn) = &request.place else { return Err(Error::usage("live rows are in a database")) };
    let Prepared { uid, target, at, selection, .. } = Prepared::new(means, request).await?;
    let (scratch, memory, options) = (at.scratch.clone(), at.memory / 2, options(request));
    let (target_rows, watch) = (merged(at, memory, selection, &means.watch), &means.watch);
    let (tenant, note) = (&request.tenant, None);
    let pass =
        InPlace { dsn, tenant, uid, target: target_rows, scratch: &scratch, memory, options: &options, note, watch };
    let (tables, warnings) = pass.look(rows).await?;
    Ok(Difference {
        source: means.source.0.to_owned(),
        tenant: request.tenant.clone(),
        target,
        tables,
        warnings,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// What happened to a row since.
fn since(op: Op) -> &'static str {
    match op {
        Op::Insert => "deleted",
        Op::Update => "updated",
        Op::Delete => "inserted",
    }
}

fn row(r: &RowChange) -> Value {
    let key: Map<String, Value> =
        r.key.iter().map(|(c, v)| (c.clone(), v.clone().map_or(Value::Null, Value::String))).collect();
    json!({"op": since(r.op), "key": key, "columns": r.columns})
}

impl Difference {
    /// Whether anything changed.
    pub fn is_empty(&self) -> bool {
        self.tables.iter().all(|t| t.counts.is_empty())
    }

    /// The document of `coffer diff --json`.
    pub fn document(&self) -> Value {
        let table = |t: &Looked| {
            let c = &t.counts;
            json!({"relation": t.relation, "key": t.key, "inserted": c.deleted, "updated": c.updated, "deleted": c.inserted,
                "unchanged": c.unchanged, "columns_added": t.added, "columns_dropped": t.dropped,
                "rows": t.rows.iter().map(row).collect::<Vec<_>>(),
                "more": (c.deleted + c.updated + c.inserted).saturating_sub(t.rows.len() as u64)})
        };
        json!({"version": 1, "source": self.source, "tenant": self.tenant.key, "kind": self.tenant.kind.name(),
            "target": {"asked": self.target.asked, "lsn": self.target.lsn.to_string(), "time": rfc3339(self.target.time_us)},
            "tables": self.tables.iter().map(table).collect::<Vec<_>>(), "seconds": self.seconds, "warnings": self.warnings})
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut out = format!(
            "tenant {} of {} since {} (lsn {}, {})\n",
            self.tenant,
            self.source,
            self.target.asked,
            self.target.lsn,
            rfc3339(self.target.time_us)
        );
        for t in &self.tables {
            let c = &t.counts;
            out.push_str(&format!(
                "  {}: {} inserted, {} updated, {} deleted, {} unchanged\n",
                t.relation, c.deleted, c.updated, c.inserted, c.unchanged
            ));
            for (what, columns) in [("newer", &t.added), ("gone", &t.dropped)] {
                if !columns.is_empty() {
                    out.push_str(&format!("    columns {what}: {}\n", columns.join(", ")));
                }
            }
            for r in &t.rows {
                let value = |v: &Option<String>| v.clone().unwrap_or_else(|| "NULL".into());
                let key: Vec<_> = r.key.iter().map(|(c, v)| format!("{c}={}", value(v))).collect();
                let columns = if r.columns.is_empty() { String::new() } else { format!(": {}", r.columns.join(", ")) };
                out.push_str(&format!("    {} {}{columns}\n", since(r.op), key.join(" ")));
            }
            let more = (c.deleted + c.updated + c.inserted).saturating_sub(t.rows.len() as u64);
            if more > 0 && !t.rows.is_empty() {
                out.push_str(&format!("    and {more} more; --keys N names more\n"));
            }
        }
        for w in &self.warnings {
            out.push_str(&format!("warning: {w}\n"));
        }
        out
    }
}
