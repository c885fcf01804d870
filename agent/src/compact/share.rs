//! Several workers share the tenants of a source: each takes those that nobody else has.
//!
//! Who has a tenant says so with a lease, and whoever comes second passes on. Leases save work and nothing else: a worker
//! that died holds its tenant until its lease is over, and where two had one all the same, the catalog takes one result.

use super::Compactor;
use crate::catalog::{Catalog, State};
use crate::error::Result;
use crate::history::History;
use crate::keyring::TenantEntry;
use crate::lease::Lease;

/// What became of a tenant.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome<T> {
    Made(T),
    /// There was nothing to be made.
    Unchanged,
    /// Another worker makes it, or made it since this one began.
    Elsewhere,
}

impl Compactor {
    /// Does the work with the tenant's lease, where tenants are shared. `made`: whether a catalog, compared with the one that was read when this
    /// began, has it already.
    pub(super) async fn alone<T>(
        &self,
        history: &History,
        tenant: &TenantEntry,
        made: impl Fn(&State, &State) -> bool,
        work: impl Future<Output = Result<Outcome<T>>>,
    ) -> Result<Outcome<T>> {
        if !self.share {
            return work.await;
        }
        let Some(lease) = Lease::claim(&self.repo, self.source, tenant.uid).await? else {
            tracing::info!(tenant_uid = %tenant.uid, "another worker has this tenant");
            return Ok(Outcome::Elsewhere);
        };
        let now = Catalog::open(&self.repo, self.source, tenant.uid, None).await?;
        let none = State::default();
        let done = if made(now.state(), history.catalog(tenant.uid).unwrap_or(&none)) {
            tracing::info!(tenant_uid = %tenant.uid, "another worker did this tenant meanwhile");
            Ok(Outcome::Elsewhere)
        } else {
            work.await
        };
        lease.release().await;
        done
    }
}
