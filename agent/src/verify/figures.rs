//! What the status document, the page and `coffer status` say of the checks of a source.

use super::rounds::Look;
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
    /// The same of restores into a scratch database: when one was last good, tenants, those that it failed for.
    #[serde(default)]
    pub drilled_at: Option<String>,
    #[serde(default)]
    pub drilled_tenants: usize,
    #[serde(default)]
    pub failing_tenants: usize,
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
        if self.drilled_tenants > 0 {
            out.push(format!(
                "restored into a scratch database: {} tenants, {} of them failed; last good: {}",
                self.drilled_tenants,
                self.failing_tenants,
                self.drilled_at.clone().unwrap_or_else(never),
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
    live: Checked,
    drill: Checked,
    scrub: Option<Scrubbed>,
}

/// Of one kind of check.
#[derive(Debug, Default)]
struct Checked {
    /// When each tenant was checked last.
    last: BTreeMap<Uuid, i64>,
    /// Those with something wrong then.
    wrong: BTreeSet<Uuid>,
    good_us: Option<i64>,
}

impl Noted {
    fn of(&mut self, look: Look) -> &mut Checked {
        match look {
            Look::Live => &mut self.live,
            Look::Drill => &mut self.drill,
        }
    }
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
    /// A tenant was checked.
    pub fn note(&self, look: Look, tenant: Uuid, at_us: i64, ok: bool) {
        let mut n = self.lock();
        let c = n.of(look);
        c.last.insert(tenant, at_us);
        if ok {
            c.wrong.remove(&tenant);
            c.good_us = c.good_us.max(Some(at_us));
        } else {
            c.wrong.insert(tenant);
        }
    }

    /// How far the scrub is: when its round began, how much of it is done, objects read and those damaged, when the
    /// round before was over.
    pub fn scrub(&self, began_us: i64, done: f64, (objects, damaged): (u64, usize), last_us: Option<i64>) {
        self.lock().scrub = (began_us > 0).then_some(Scrubbed { began_us, done, objects, damaged, last_us });
    }

    /// When a tenant was last checked.
    pub fn last(&self, look: Look, tenant: Uuid) -> Option<i64> {
        self.lock().of(look).last.get(&tenant).copied()
    }

    pub fn view(&self) -> ChecksView {
        let n = self.lock();
        ChecksView {
            validated_at: n.live.good_us.map(rfc3339),
            oldest_validation: n.live.last.values().min().copied().map(rfc3339),
            validated_tenants: n.live.last.len(),
            differing_tenants: n.live.wrong.len(),
            drilled_at: n.drill.good_us.map(rfc3339),
            drilled_tenants: n.drill.last.len(),
            failing_tenants: n.drill.wrong.len(),
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
        if let Some(us) = n.live.good_us {
            metrics::gauge!("coffer_last_validation_timestamp_seconds", "source" => source()).set(seconds(us));
        }
        if let Some(us) = n.live.last.values().min() {
            metrics::gauge!("coffer_oldest_validation_timestamp_seconds", "source" => source()).set(seconds(*us));
        }
        if let Some(s) = n.scrub {
            metrics::gauge!("coffer_scrub_round_ratio", "source" => source()).set(s.done);
            if let Some(us) = s.last_us {
                metrics::gauge!("coffer_scrub_round_timestamp_seconds", "source" => source()).set(seconds(us));
            }
        }
        metrics::gauge!("coffer_validation_differing_tenants", "source" => source()).set(n.live.wrong.len() as f64);
        if let Some(us) = n.drill.good_us {
            metrics::gauge!("coffer_last_drill_timestamp_seconds", "source" => source()).set(seconds(us));
        }
        metrics::gauge!("coffer_drill_failing_tenants", "source" => source()).set(n.drill.wrong.len() as f64);
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
        f.note(Look::Live, a, 5_000_000, true);
        f.note(Look::Live, b, 7_000_000, false);
        let v = f.view();
        assert_eq!((v.validated_tenants, v.differing_tenants, f.last(Look::Live, b)), (2, 1, Some(7_000_000)));
        assert_eq!(v.validated_at.as_deref(), Some("1970-01-01T00:00:05.000000Z"));
        f.note(Look::Live, b, 9_000_000, true);
        assert_eq!((f.view().differing_tenants, f.view().validated_at), (0, Some(rfc3339(9_000_000))));
        assert_eq!(f.view().oldest_validation, Some(rfc3339(5_000_000)));
        assert!(f.view().lines()[0].contains("2 tenants, 0 of them differ"));
    }
}
