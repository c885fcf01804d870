//! What needs attention now. An alarm is raised with a code and a scope, says what to do, and is cleared by who raised it.
//!
//! Raising is logged at error once, clearing at info; what is standing is in the status document and makes it unhealthy.

use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A standing alarm, as in the status document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alarm {
    pub code: &'static str,
    pub message: String,
    /// The tenant's key, where it concerns one.
    pub tenant: Option<String>,
    /// The source or the store that it is about; empty for the whole agent.
    pub scope: String,
}

/// Durability is further behind than `[rpo] limit`.
pub const RPO_EXCEEDED: &str = "rpo_exceeded";
/// The source does not answer, or the stream cannot be started.
pub const SOURCE_DOWN: &str = "source_down";
/// A store does not take what is to be shipped.
pub const STORE_DOWN: &str = "store_down";
/// A ship or its record fails and is tried again.
pub const SHIP_FAILED: &str = "ship_failed";
/// Rows arrived that capture could not attribute to a tenant.
pub const UNRESOLVED_ROWS: &str = "unresolved_rows";
/// Sessions changed rows of another tenant than the one that they named.
pub const CLAIM_CONTRADICTED: &str = "claim_contradicted";
/// The slot was lost or moved without us: what lies between is not in the repository.
pub const GAP: &str = "gap";
/// The slot's WAL is about to be removed.
pub const SLOT_AT_RISK: &str = "slot_at_risk";
/// The spool is full.
pub const SPOOL_FULL: &str = "spool_full";
/// The source's clock went back.
pub const SOURCE_CLOCK: &str = "source_clock";
/// Progress and tenants cannot be reported to the source: who waits there waits in vain.
pub const REPORTING_FAILED: &str = "reporting_failed";
/// Bases fail.
pub const BASE_FAILED: &str = "base_failed";
/// Jobs from SQL cannot be claimed.
pub const JOBS_FAILED: &str = "jobs_failed";
/// The SQL views of the repository cannot be brought up to date.
pub const VIEWS_FAILED: &str = "views_failed";
/// The roles of tenants cannot be read or archived.
pub const ROLES_FAILED: &str = "roles_failed";
/// Scheduled incrementals are not made.
pub const INCREMENTALS_FAILED: &str = "incrementals_failed";
/// Scheduled fulls are not made.
pub const FULLS_FAILED: &str = "fulls_failed";
/// What retention keeps no more cannot be removed.
pub const PRUNE_FAILED: &str = "prune_failed";

/// The rows of a tenant in the repository are not its live rows.
pub const VALIDATION_DIFFERS: &str = "validation_differs";
/// Tenants cannot be compared with their live rows.
pub const VALIDATION_FAILED: &str = "validation_failed";
/// An object in a store, or a chain of records, is not as it was written.
pub const DAMAGED_OBJECT: &str = "damaged_object";
/// A tenant cannot be restored into a scratch database, or not to what the repository has.
pub const DRILL_FAILED: &str = "drill_failed";
/// Restore drills cannot be made.
pub const DRILL_IMPOSSIBLE: &str = "drill_impossible";
/// The scrub does not come round in its period.
pub const SCRUB_LATE: &str = "scrub_late";
/// Large objects cannot be read or archived.
pub const LARGE_OBJECTS_FAILED: &str = "large_objects_failed";

/// By code, scope and tenant.
type Standing = BTreeMap<(&'static str, String, Option<String>), Alarm>;

/// All standing alarms.
#[derive(Debug, Default)]
pub struct Alarms {
    standing: Mutex<Standing>,
}

impl Alarms {
    /// Raises an alarm, or changes the words of one that stands. True when it is new.
    pub fn raise(&self, code: &'static str, scope: &str, message: impl Into<String>) -> bool {
        self.stand(code, scope, None, message.into())
    }

    /// The same for one tenant, named by its key.
    pub fn raise_for(&self, code: &'static str, scope: &str, tenant: &str, message: impl Into<String>) -> bool {
        self.stand(code, scope, Some(tenant.to_owned()), message.into())
    }

    fn stand(&self, code: &'static str, scope: &str, tenant: Option<String>, message: String) -> bool {
        let alarm = Alarm { code, message: message.clone(), tenant: tenant.clone(), scope: scope.to_owned() };
        let new = self.lock().insert((code, scope.to_owned(), tenant), alarm).is_none();
        if new {
            tracing::error!(alarm = code, scope, "{message}");
        }
        new
    }

    /// Clears an alarm; nothing when it does not stand.
    pub fn clear(&self, code: &'static str, scope: &str) {
        self.end(code, scope, None);
    }

    /// Clears a tenant's.
    pub fn clear_for(&self, code: &'static str, scope: &str, tenant: &str) {
        self.end(code, scope, Some(tenant.to_owned()));
    }

    fn end(&self, code: &'static str, scope: &str, tenant: Option<String>) {
        if self.lock().remove(&(code, scope.to_owned(), tenant)).is_some() {
            tracing::info!(alarm = code, scope, "cleared");
        }
    }

    /// Whether an alarm that is of no tenant stands.
    pub fn stands(&self, code: &'static str, scope: &str) -> bool {
        self.lock().contains_key(&(code, scope.to_owned(), None))
    }

    /// Those that stand, by code and scope.
    pub fn standing(&self) -> Vec<Alarm> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_stands_until_it_is_cleared() {
        let a = Alarms::default();
        assert!(a.raise(GAP, "shop", "one"));
        assert!(!a.raise(GAP, "shop", "two"));
        assert!(a.raise(GAP, "crm", "three"));
        assert_eq!(a.standing().len(), 2);
        assert!(a.stands(GAP, "crm") && !a.stands(GAP, "7"));
        assert_eq!(a.standing()[1].message, "two");
        assert!(a.raise_for(GAP, "shop", "7", "four"));
        a.clear(GAP, "shop");
        a.clear(GAP, "shop");
        assert_eq!(a.standing().len(), 2);
        a.clear_for(GAP, "shop", "7");
        assert_eq!(a.standing().len(), 1);
    }
}
