//! The rows of a tenant in the repository against its live ones, and what such a comparison comes to for whoever asked.

use super::results::Results;
use crate::error::{Error, Kind, Result};
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
    pub fn is_same(&self) -> bool {
        matches!(self, Self::Done(v) if v.is_same())
    }

    /// Whether anything was looked at: without a base of any of its tables, nothing is.
    pub fn is_made(&self) -> bool {
        !matches!(self, Self::Done(v) if v.tables.is_empty() && !v.skipped.is_empty())
    }

    /// What is wrong, for the catalog: no key of a row stands there.
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

/// Whether a tenant's rows have a place that is theirs alone; those of reference data, and those that nobody could
/// attribute, have none.
pub fn is_comparable(tenant: &Tenant) -> bool {
    matches!(tenant.kind, TenantKind::Normal | TenantKind::Unassigned)
}

/// Compares one tenant; a second time when something is found. What DDL made of a table while it was read (a label of an
/// enum has no snapshot, a table may be gone) looks like a difference, and is none any more; what is wrong is wrong still.
///
/// # Errors
/// As [`Validation::run`], but for what is found to be damaged.
pub async fn compare(validation: &Validation<'_>, tenant: &TenantEntry) -> Result<Compared> {
    let first = once(validation, tenant).await?;
    if first.is_same() { Ok(first) } else { once(validation, tenant).await }
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
    if !compared.is_made() {
        return Err(
            Error::new(Kind::OutsideWindow, "none of its tables has a base yet: nothing was compared").code("no_base")
        );
    }
    Results { ctx, mirror }.live(tenant, &compared).await?;
    Ok(compared)
}
