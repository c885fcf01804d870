//! Up to where the log's changes were removed on purpose (FORMAT.md, "Floors").
//!
//! A floor says of a tenant's changesets and of its parts of bases that those up to a position are gone, or will be. It
//! stands at the point of a full that stays, so that everything from there on can be restored. What a record wrote that
//! came after the floor is never meant: after a promotion the same positions are used again.

use crate::crypto::ObjectKind;
use crate::repository::model::lsn_text;
use crate::repository::{Body, LogRecord, ObjectRef};
use coffer_wire::Lsn;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use uuid::Uuid;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Floor {
    #[serde(with = "lsn_text")]
    pub lsn: Lsn,
    /// The newest record of the log that it is about.
    pub log_n: u64,
}

impl Floor {
    /// Whether an object that record `n` names may be gone: changes up to the floor, and what a base read before it.
    pub fn covers(&self, n: u64, o: &ObjectRef) -> bool {
        n <= self.log_n
            && match o.kind {
                ObjectKind::Changeset | ObjectKind::Common => o.lsn_end <= self.lsn,
                ObjectKind::Full => o.lsn_end < self.lsn,
                _ => false,
            }
    }

    /// What both cover.
    pub fn least(self, other: Self) -> Self {
        Self { lsn: self.lsn.min(other.lsn), log_n: self.log_n.min(other.log_n) }
    }
}

/// The floors of a source's tenants, and that of what concerns them all.
#[derive(Clone, Debug, Default)]
pub struct Floors {
    pub tenants: HashMap<Uuid, Floor>,
    pub commons: Option<Floor>,
}

impl Floors {
    /// Whether an object of a record was removed, or is about to be, because its tenant's floor is above it.
    pub fn is_gone(&self, r: &LogRecord, o: &ObjectRef) -> bool {
        if r.is_joined() {
            return true;
        }
        match o.kind {
            ObjectKind::Common => is_index_only(r) && self.commons.is_some_and(|f| f.covers(r.n, o)),
            _ => self.tenants.get(&o.tenant).is_some_and(|f| f.covers(r.n, o)),
        }
    }
}

/// Whether the common object of a record has nothing but the times of its transactions: all others stay.
pub fn is_index_only(r: &LogRecord) -> bool {
    matches!(&r.body, Body::Ship(s) if s.eventful == Some(false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::model::Ship;

    fn object(kind: ObjectKind, end: u64) -> ObjectRef {
        ObjectRef {
            path: String::new(),
            kind,
            tenant: Uuid::from_u128(1),
            object: Uuid::nil(),
            key_version: 1,
            bytes: 1,
            sha256: String::new(),
            lsn_start: Lsn(0),
            lsn_end: Lsn(end),
            rows: 0,
        }
    }

    #[test]
    fn a_floor_is_about_changes_and_bases_below_it_and_about_nothing_that_came_later() {
        let f = Floor { lsn: Lsn(100), log_n: 7 };
        assert!(f.covers(7, &object(ObjectKind::Changeset, 100)) && !f.covers(7, &object(ObjectKind::Changeset, 101)));
        // A base at the floor itself is read for tables that the full may not have.
        assert!(f.covers(7, &object(ObjectKind::Full, 99)) && !f.covers(7, &object(ObjectKind::Full, 100)));
        assert!(!f.covers(8, &object(ObjectKind::Changeset, 50)));
        for kind in [ObjectKind::Roles, ObjectKind::Schema, ObjectKind::LargeObjects, ObjectKind::Manifest] {
            assert!(!f.covers(1, &object(kind, 1)), "{kind:?}");
        }
    }

    #[test]
    fn of_what_concerns_all_only_lists_of_times_go() {
        let floors = Floors { tenants: HashMap::new(), commons: Some(Floor { lsn: Lsn(100), log_n: 7 }) };
        let ship = |eventful| LogRecord {
            v: 1,
            n: 3,
            prev: None,
            source: Uuid::nil(),
            writer: Uuid::nil(),
            at_us: 0,
            system_identifier: 1,
            timeline: 1,
            slot: String::new(),
            from_lsn: Lsn(0),
            upto_lsn: Lsn(50),
            upto_time_us: 0,
            body: Body::Ship(Ship { eventful, ..Ship::default() }),
        };
        let common = object(ObjectKind::Common, 50);
        assert!(floors.is_gone(&ship(Some(false)), &common));
        assert!(!floors.is_gone(&ship(Some(true)), &common) && !floors.is_gone(&ship(None), &common));
        assert!(!floors.is_gone(&ship(Some(false)), &object(ObjectKind::Changeset, 50)), "nobody's floor");
    }
}
