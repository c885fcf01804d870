//! What the status document, the page and `coffer status` say of the checks of a source.

use crate::clock::rfc3339;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use uuid::Uuid;

/// As the status document has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChecksView {
    /// When a tenant's rows were last found to be its live ones.
    #[serde(default)]
    pub validated_at: Option<String>,
    /// The longest ago that a tenant was compared, of those that were.
    #[serde(default)]
    pub oldest_validation: Option<String>,
    /// Tenants that were compared, and those whose rows differed then.
    #[serde(default)]
    pub validated_tenants: usize,
    #[serde(default)]
    pub differing_tenants: usize,
    /// When the round of the scrub began, how much of it is done (0 to 1), and when the one before was over.
    #[serde(default)]
    pub scrub_began: Option<String>,
    #[serde(default)]
    pub scrub_done: f64,
    #[serde(default)]
    pub scrub_last: Option<String>,
    /// Objects read in this round, and those that are not as they were written.
    #[serde(default)]
    pub scrub_objects: u64,
    #[serde(default)]
    pub scrub_damaged: usize,
}

impl ChecksView {
    /// The same for people, a line each.
    pub fn lines(&self) -> Vec<String> {
        let mut out = Vec::new();
        let never = || "never".to_owned();
        if self.validated_tenants > 0 {
            out.push(format!(
                "compared with the live rows: {} tenants, {} of them differ; last {}, longest ago {}",
                self.validated_tenants,
                self.differing_tenants,
                self.validated_at.clone().unwrap_or_else(never),
                self.oldest_validation.clone().unwrap_or_else(never),
            ));
        }
        if let Some(began) = &self.scrub_began {
            out.push(format!(
                "scrub: {} objects read back since {began}, {:.0} % of the round; {} not as they were written; last round: {}",
                self.scrub_objects,
                self.scrub_done * 100.0,
                self.scrub_damaged,
                self.scrub_last.clone().unwrap_or_else(never),
            ));
        }
        out
    }
}

/// What is known of the checks of a source.
#[derive(Debug, Default)]
pub struct Figures {
    noted: Mutex<Noted>,
}

#[derive(Debug, Default)]
struct Noted {
    /// When each tenant was compared last.
    live: BTreeMap<Uuid, i64>,
    live_differing: BTreeSet<Uuid>,
    live_same_us: Option<i64>,
    scrub: Option<Scrubbed>,
}

#[derive(Clone, Copy, Debug)]
struct Scrubbed {
    began_us: i64,
    done: f64,
    objects: u64,
    damaged: usize,
    last_us: Option<i64>,
}

impl Figures {
    /// A tenant was compared with its live rows.
    pub fn live(&self, tenant: Uuid, at_us: i64, ok: bool) {
        let mut n = self.lock();
        n.live.insert(tenant, at_us);
        if ok {
            n.live_differing.remove(&tenant);
            n.live_same_us = n.live_same_us.max(Some(at_us));
        } else {
            n.live_differing.insert(tenant);
        }
    }

    /// How far the scrub is: when its round began, how much of it is done, objects read and those damaged, when the
    /// round before was over.
    pub fn scrub(&self, began_us: i64, done: f64, (objects, damaged): (u64, usize), last_us: Option<i64>) {
        self.lock().scrub = (began_us > 0).then_some(Scrubbed { began_us, done, objects, damaged, last_us });
    }

    /// When a tenant was last compared.
    pub fn last_live(&self, tenant: Uuid) -> Option<i64> {
        self.lock().live.get(&tenant).copied()
    }

    pub fn view(&self) -> ChecksView {
        let n = self.lock();
        ChecksView {
            validated_at: n.live_same_us.map(rfc3339),
            oldest_validation: n.live.values().min().copied().map(rfc3339),
            validated_tenants: n.live.len(),
            differing_tenants: n.live_differing.len(),
            scrub_began: n.scrub.map(|s| rfc3339(s.began_us)),
            scrub_done: n.scrub.map_or(0.0, |s| s.done),
            scrub_last: n.scrub.and_then(|s| s.last_us).map(rfc3339),
            scrub_objects: n.scrub.map_or(0, |s| s.objects),
            scrub_damaged: n.scrub.map_or(0, |s| s.damaged),
        }
    }

    /// Sets the gauges that follow from it.
    pub fn gauges(&self, source: &str) {
        let n = self.lock();
        let seconds = |us: i64| us as f64 / 1e6;
        let source = || source.to_owned();
        if let Some(us) = n.live_same_us {
            metrics::gauge!("coffer_last_validation_timestamp_seconds", "source" => source()).set(seconds(us));
        }
        if let Some(us) = n.live.values().min() {
            metrics::gauge!("coffer_oldest_validation_timestamp_seconds", "source" => source()).set(seconds(*us));
        }
        if let Some(s) = n.scrub {
            metrics::gauge!("coffer_scrub_round_ratio", "source" => source()).set(s.done);
            if let Some(us) = s.last_us {
                metrics::gauge!("coffer_scrub_round_timestamp_seconds", "source" => source()).set(seconds(us));
            }
        }
        metrics::gauge!("coffer_validation_differing_tenants", "source" => source()).set(n.live_differing.len() as f64);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_differs_until_it_is_found_the_same() {
        let f = Figures::default();
        assert!(f.view().lines().is_empty());
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        f.live(a, 5_000_000, true);
        f.live(b, 7_000_000, false);
        let v = f.view();
        assert_eq!((v.validated_tenants, v.differing_tenants, f.last_live(b)), (2, 1, Some(7_000_000)));
        assert_eq!(v.validated_at.as_deref(), Some("1970-01-01T00:00:05.000000Z"));
        f.live(b, 9_000_000, true);
        assert_eq!((f.view().differing_tenants, f.view().validated_at), (0, Some(rfc3339(9_000_000))));
        assert_eq!(f.view().oldest_validation, Some(rfc3339(5_000_000)));
        assert!(f.view().lines()[0].contains("2 tenants, 0 of them differ"));
    }
}
