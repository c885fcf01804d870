//! The rows of a tenant in the repository against its live ones, and what such a comparison comes to for whoever asked.

use super::results::{Results, Verdict};
use crate::error::{Error, Result};
use crate::jobs::Mirror;
use crate::keyring::TenantEntry;
use crate::opened::{Opened, scratch};
use crate::restore::Watch;
use crate::run::AgentContext;
use crate::tenant::Tenant;
use crate::validation::{Validated, Validation};
use crate::verify::objects::is_finding;
use coffer_wire::TenantKind;
use std::time::Duration;

/// How long a comparison waits for the repository to catch up with its snapshot.
const PATIENCE: Duration = Duration::from_secs(300);

/// What came of a comparison.
pub enum Compared {
    Done(Validated),
    /// An object that the comparison needs is not what it was.
    Damaged(Error),
}

impl Compared {
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Done(v) if v.is_same() && v.skipped.is_empty() => Verdict::Good,
            Self::Done(v) if v.is_same() => Verdict::Open,
            _ => Verdict::Bad,
        }
    }

    /// What is wrong, or was left out, for the catalog: no key of a row stands there.
    pub fn note(&self) -> Option<String> {
        match self {
            Self::Damaged(e) => Some(e.to_string()),
            Self::Done(v) => {
                let skipped = v.skipped.iter().map(|(relation, why)| format!("{relation} was not compared: {why}"));
                let all: Vec<String> = v.counts().into_iter().chain(skipped).collect();
                (!all.is_empty()).then(|| all.join("; "))
            }
        }
    }

    /// The same for an alarm, with the keys.
    pub fn words(&self) -> String {
        match self {
            Self::Damaged(e) => format!("what the comparison with the live rows needs cannot be read: {e}"),
            Self::Done(v) => format!("the repository differs from the live rows: {}", v.keys()),
        }
    }
}

/// Whether a tenant's rows have a place in the live tables; those that nobody could attribute have none.
pub fn is_comparable(tenant: &Tenant) -> bool {
    tenant.kind != TenantKind::Unresolved
}

/// Compares one tenant; a second time when something is found. What DDL made of a table while it was read (a label of an
/// enum has no snapshot, a table may be gone) looks like a difference, and is none any more; what is wrong is wrong still.
///
/// # Errors
/// As [`Validation::run`], but for what is found to be damaged.
pub async fn compare(validation: &Validation<'_>, tenant: &TenantEntry) -> Result<Compared> {
    let first = once(validation, tenant).await?;
    if first.verdict() == Verdict::Bad { once(validation, tenant).await } else { Ok(first) }
}

async fn once(validation: &Validation<'_>, tenant: &TenantEntry) -> Result<Compared> {
    match validation.run(&tenant.tenant).await {
        Ok(v) => Ok(Compared::Done(v)),
        Err(e) if is_finding(&e) => Ok(Compared::Damaged(e)),
        Err(e) => Err(e),
    }
}

/// Compares a tenant for the running agent, and tells what was found.
pub async fn check(ctx: &AgentContext, mirror: &Mirror, tenant: &TenantEntry, watch: Watch) -> Result<Compared> {
    let opened = Opened { keyring: ctx.keyring.clone(), repo: ctx.repo.clone(), from: None };
    let dsn = ctx.source_dsn().await?;
    let validation = Validation {
        opened: &opened,
        source: (&ctx.source, ctx.source_uid),
        dsn: &dsn,
        scratch: scratch(&ctx.config)?,
        memory: ctx.memory.check,
        watch,
        patience: PATIENCE,
    };
    let compared = compare(&validation, tenant).await?;
    Results { ctx, mirror }.live(tenant, &compared).await?;
    Ok(compared)
}
