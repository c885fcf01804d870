//! Restore drills: a tenant restored into a scratch database, compared with the repository's own merge, dropped.

use super::results::{Results, Verdict};
use super::server::DrillServer;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::history::When;
use crate::jobs::Mirror;
use crate::keyring::TenantEntry;
use crate::opened::{Opened, scratch};
use crate::restore::drill::{Drilled, drill, is_failure};
use crate::restore::{Means, Watch};
use crate::run::AgentContext;
use serde_json::{Value, json};
use uuid::Uuid;

/// What came of a drill.
pub enum Tried {
    Done(Drilled),
    /// The tenant could not be restored.
    Failed(Error),
}

impl Tried {
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Done(d) if d.is_same() && d.skipped.is_empty() => Verdict::Good,
            Self::Done(d) if d.is_same() => Verdict::Open,
            _ => Verdict::Bad,
        }
    }

    /// What is wrong, or was left out, without any tenant's data.
    pub fn note(&self) -> Option<String> {
        match self {
            Self::Failed(e) => Some(format!("it could not be restored: {e}")),
            Self::Done(d) => {
                let skipped = d.skipped.iter().map(|(relation, why)| format!("{relation} was not compared: {why}"));
                let all: Vec<String> = d.counts().into_iter().chain(skipped).collect();
                (!all.is_empty()).then(|| all.join("; "))
            }
        }
    }

    /// For the document of `coffer verify`.
    pub fn document(&self, tenant: &TenantEntry) -> Value {
        let who = json!({"tenant": tenant.tenant.key, "kind": tenant.tenant.kind.name(), "ok": self.verdict() == Verdict::Good});
        let rest = match self {
            Self::Failed(e) => json!({"lsn": null, "tables": [], "skipped": [], "seconds": null,
                "warnings": [e.to_string()]}),
            Self::Done(d) => {
                let tables = d
                    .tables
                    .iter()
                    .map(|t| json!({"relation": t.relation, "rows": t.rows, "restored": t.restored, "ok": t.same}));
                let skipped = d.skipped.iter().map(|(relation, why)| json!({"relation": relation, "reason": why}));
                json!({"lsn": d.target.lsn.to_string(), "tables": tables.collect::<Vec<_>>(),
                    "skipped": skipped.collect::<Vec<_>>(), "seconds": d.seconds, "warnings": d.warnings})
            }
        };
        match (who, rest) {
            (Value::Object(mut a), Value::Object(b)) => {
                a.extend(b);
                Value::Object(a)
            }
            (who, _) => who,
        }
    }
}

/// Drills one tenant at the newest point.
///
/// # Errors
/// Those that say that it could not be tried now.
pub async fn try_one(
    (opened, source): (&Opened, (&str, Uuid)),
    (config, memory): (&Config, usize),
    server: &DrillServer,
    tenant: &TenantEntry,
    watch: Watch,
) -> Result<Tried> {
    let means = Means { opened, source, scratch: scratch(config)?, memory, watch };
    let dsn = server.fresh(source.1, opened.repo.clock().now_us());
    match drill(&means, &tenant.tenant, &When::Latest, &dsn).await {
        Ok(d) => Ok(Tried::Done(d)),
        Err(e) if is_failure(&e) => Ok(Tried::Failed(e)),
        Err(e) => Err(e),
    }
}

/// Drills a tenant for the running agent, and tells what was found.
pub async fn check(ctx: &AgentContext, mirror: &Mirror, tenant: &TenantEntry, watch: Watch) -> Result<Tried> {
    let opened = Opened { keyring: ctx.keyring.clone(), repo: ctx.repo.clone(), from: None };
    let config = &ctx.config;
    let server = DrillServer::start(config.verify.drill_url.as_deref(), &config.spool.dir).await?;
    if let Err(e) = server.sweep(ctx.source_uid, ctx.clock.now_us()).await {
        tracing::debug!("databases that drills left were not looked for: {e}");
    }
    let source = (ctx.source.as_str(), ctx.source_uid);
    let tried = try_one((&opened, source), (config, ctx.memory.check), &server, tenant, watch).await?;
    Results { ctx, mirror }.drill(tenant, &tried).await?;
    Ok(tried)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Target;
    use crate::restore::drill::DrilledTable;

    #[test]
    fn what_was_left_out_was_not_found_to_be_good() {
        let tried = |same: &[bool], skipped: usize| {
            let table = |same: &bool| DrilledTable { relation: "s.t".into(), rows: 1, restored: 1, same: *same };
            Tried::Done(Drilled {
                target: Target { asked: "latest".into(), lsn: coffer_wire::Lsn(1), time_us: 0 },
                tables: same.iter().map(table).collect(),
                skipped: vec![("s.u".to_owned(), "why".to_owned()); skipped],
                warnings: vec![],
                seconds: 0.0,
            })
        };
        assert_eq!(tried(&[true], 0).verdict(), Verdict::Good);
        assert_eq!(tried(&[], 0).verdict(), Verdict::Good, "a tenant without rows");
        assert_eq!(tried(&[], 1).verdict(), Verdict::Open);
        assert_eq!(tried(&[true], 1).verdict(), Verdict::Open);
        assert_eq!(tried(&[true, false], 1).verdict(), Verdict::Bad);
        assert_eq!(Tried::Failed(Error::other("no")).verdict(), Verdict::Bad);
    }
}
