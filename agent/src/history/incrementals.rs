//! Incrementals in a tenant's history: which of them count, and which changesets they stand for.
//!
//! An incremental holds what the changesets of its span come to, so a reader whose target is at or beyond its end reads it
//! instead of them. It is taken whole or not at all: one whose end is beyond the target, or whose ends do not fall
//! between two ships as the line has them now, is left aside, and the changesets are read. Of two that overlap one is
//! read: a row without a key would count twice.

use super::{History, ShipInput};
use crate::catalog::IncrementalEntry;
use coffer_wire::Lsn;
use uuid::Uuid;

/// One ship's part of a tenant's changes, and where it lies on the line.
pub(super) struct Placed {
    pub from: Lsn,
    pub to: Lsn,
    pub input: ShipInput,
}

impl History {
    /// The incrementals of a tenant that count, oldest first.
    pub fn incrementals(&self, tenant: Uuid) -> Vec<&IncrementalEntry> {
        let newest = self.records.last().map_or(0, |r| r.n);
        let counts = |i: &&IncrementalEntry| i.log_n <= newest && self.line.goes_through(i.to_lsn, i.log_n);
        let all = self.catalogs.get(&tenant).into_iter().flat_map(|c| &c.incrementals);
        let mut all: Vec<&IncrementalEntry> = all.filter(counts).collect();
        all.sort_by_key(|i| (i.from_lsn, i.to_lsn));
        all
    }

    /// The ships with incrementals in the places of the changesets that they stand for. `upto`: every change up to there
    /// counts.
    pub(super) fn stand_in(&self, tenant: Uuid, ships: Vec<Placed>, upto: Lsn) -> Vec<ShipInput> {
        let mut all = self.incrementals(tenant);
        all.retain(|i| i.to_lsn <= upto && self.is_sound(tenant, i.id));
        stand_in(ships, &all)
    }
}

fn stand_in(ships: Vec<Placed>, incrementals: &[&IncrementalEntry]) -> Vec<ShipInput> {
    let mut chosen: Vec<&IncrementalEntry> = Vec::new();
    let mut longest_first = incrementals.to_vec();
    longest_first.sort_by_key(|i| (i.from_lsn, std::cmp::Reverse(i.to_lsn)));
    for i in longest_first {
        let follows = chosen.last().is_none_or(|c| c.to_lsn <= i.from_lsn);
        let inside = |s: &&Placed| s.from >= i.from_lsn && s.to <= i.to_lsn;
        let mut near = ships.iter().filter(|s| s.input.changeset.is_some() && s.to > i.from_lsn && s.from < i.to_lsn);
        if follows && near.clone().next().is_some() && near.all(|s| inside(&s)) {
            chosen.push(i);
        }
    }
    let mut out = Vec::with_capacity(ships.len());
    let mut chosen = chosen.into_iter().peekable();
    let mut last: Option<&IncrementalEntry> = None;
    for Placed { from, to, mut input } in ships {
        if input.changeset.is_some() {
            if let Some(i) = chosen.next_if(|i| i.from_lsn <= from && to <= i.to_lsn) {
                last = Some(i);
                if let Some(object) = &i.object {
                    out.push(ShipInput { common: None, changeset: Some(object.clone()), limit: i.to_lsn });
                }
            }
            if last.is_some_and(|i| i.from_lsn <= from && to <= i.to_lsn) {
                input.changeset = None;
            }
        }
        if input.changeset.is_some() || input.common.is_some() {
            out.push(input);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::ObjectKind;
    use crate::repository::ObjectRef;

    fn object(path: &str) -> ObjectRef {
        ObjectRef {
            path: path.to_owned(),
            kind: ObjectKind::Changeset,
            tenant: Uuid::nil(),
            object: Uuid::nil(),
            key_version: 1,
            bytes: 1,
            sha256: String::new(),
            lsn_start: Lsn::ZERO,
            lsn_end: Lsn::ZERO,
            rows: 1,
        }
    }

    fn incremental(from: u64, to: u64) -> IncrementalEntry {
        IncrementalEntry {
            id: Uuid::nil(),
            from_lsn: Lsn(from),
            to_lsn: Lsn(to),
            to_time_us: 0,
            log_n: 0,
            object: Some(object(&format!("i{from}-{to}"))),
            rows: 1,
            bytes: 1,
            read_back_us: None,
        }
    }

    /// Ships of ten each from 0 to 60; `common`: the second and the fifth have one.
    fn read(incrementals: &[(u64, u64)]) -> String {
        let all: Vec<IncrementalEntry> = incrementals.iter().map(|(f, t)| incremental(*f, *t)).collect();
        let ships = (0..6).map(|n| Placed {
            from: Lsn(n * 10),
            to: Lsn(n * 10 + 10),
            input: ShipInput {
                common: (n % 3 == 1).then(|| object(&format!("common{n}"))),
                changeset: (n != 3).then(|| object(&format!("c{n}"))),
                limit: Lsn::MAX,
            },
        });
        let inputs = stand_in(ships.collect(), &all.iter().collect::<Vec<_>>());
        let paths = inputs.iter().flat_map(|i| i.common.iter().chain(&i.changeset)).map(|o| o.path.clone());
        paths.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn incrementals_stand_for_the_changesets_of_their_span_and_nothing_else() {
        assert_eq!(read(&[]), "c0 common1 c1 c2 common4 c4 c5");
        assert_eq!(read(&[(0, 20)]), "i0-20 common1 c2 common4 c4 c5");
        assert_eq!(read(&[(0, 20), (20, 50)]), "i0-20 common1 i20-50 common4 c5");
        assert_eq!(read(&[(0, 60)]), "i0-60 common1 common4");
        // Of a ship without changes of the tenant nobody asks where it ends.
        assert_eq!(read(&[(0, 35)]), "i0-35 common1 common4 c4 c5");
    }

    #[test]
    fn an_incremental_that_overlaps_another_or_cuts_a_ship_is_left_aside() {
        assert_eq!(read(&[(0, 20), (10, 50), (50, 60)]), "i0-20 common1 c2 common4 c4 i50-60");
        assert_eq!(read(&[(0, 20), (0, 30)]), "i0-30 common1 common4 c4 c5");
        assert_eq!(read(&[(0, 15), (15, 30)]), "c0 common1 c1 c2 common4 c4 c5");
        assert_eq!(read(&[(30, 40), (70, 80)]), "c0 common1 c1 c2 common4 c4 c5");
    }
}
