//! Which tables need a base, and which ships a base has to be merged with: both from the log's records.

use crate::repository::model::{Body, LargeObjectsRead, LogRecord, ObjectRef};
use crate::snapshot::catalog::Rule;
use coffer_wire::Lsn;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use uuid::Uuid;

/// The log as bases see it. Fed with every record, in order.
#[derive(Debug, Default)]
pub struct Seen {
    /// By table, the registration that its newest base was taken for, and the base's cut.
    covered: HashMap<u32, (u64, Lsn)>,
    /// Tables that had a base before the last break and have none since.
    lost: BTreeSet<u32>,
    /// By table, where rows of it that could not be attributed were shipped: a base has to lie after that.
    doubtful: HashMap<u32, Lsn>,
    /// Objects with rows that could not be attributed, of which it is not known yet which tables they are from.
    unread: Vec<(Lsn, ObjectRef)>,
    /// Ships that a snapshot taken from now on may not see whole.
    ships: VecDeque<Arc<LogRecord>>,
    /// By tenant, the newest object with its roles.
    roles: BTreeMap<Uuid, ObjectRef>,
    /// The newest reading of large objects.
    large_objects: Option<LargeObjectsRead>,
    /// The next record's number.
    next: u64,
    /// Counts gaps and promotions: a base that began before one is not to be recorded after it.
    breaks: u64,
}

impl Seen {
    /// Takes a record in; one that was seen already is nothing. False when records in between are missing.
    /// `unresolved`: the uid of the reserved tenant whose objects hold what could not be attributed.
    pub fn record(&mut self, r: &Arc<LogRecord>, unresolved: Option<Uuid>) -> bool {
        if r.n < self.next {
            return true;
        }
        if r.n > self.next {
            return false;
        }
        self.next = r.n + 1;
        match &r.body {
            Body::Base(b) => {
                self.lost.retain(|relid| !b.tables.iter().any(|t| t.relid == *relid));
                self.covered.extend(b.tables.iter().map(|t| (t.relid, (t.registered_xid, t.cut_lsn))));
                self.roles.extend(b.roles.iter().map(|o| (o.tenant, o.clone())));
                if let Some(r) = &b.large_objects_read {
                    self.large_objects = Some((**r).clone());
                }
            }
            Body::Ship(s) => {
                self.ships.push_back(r.clone());
                let of = s.objects.iter().filter(|o| Some(o.tenant) == unresolved);
                self.unread.extend(of.map(|o| (r.upto_lsn, o.clone())));
            }
            // What lies before is closed: everything is read anew. (After a promotion only what the old timeline
            // archived beyond it would have to be; which rows that were, no table says.)
            Body::Gap { .. } | Body::Timeline { .. } => {
                self.lost.extend(self.covered.drain().map(|(relid, _)| relid));
                self.doubtful.clear();
                self.unread.clear();
                self.ships.clear();
                self.breaks += 1;
            }
            Body::Init | Body::Idle => {}
        }
        true
    }

    /// Takes in the next record of a log that is read: of those that a checkpoint joined, the numbers before its own are none.
    pub fn read(&mut self, r: &Arc<LogRecord>, unresolved: Option<Uuid>) {
        self.next = self.next.max(r.n);
        self.record(r, unresolved);
    }

    /// The number of the record that comes next.
    pub fn next(&self) -> u64 {
        self.next
    }

    pub fn roles(&self) -> &BTreeMap<Uuid, ObjectRef> {
        &self.roles
    }

    pub fn large_objects(&self) -> Option<&LargeObjectsRead> {
        self.large_objects.as_ref()
    }

    pub fn breaks(&self) -> u64 {
        self.breaks
    }

    /// How many of these had a base before the last gap or promotion, and have none since.
    pub fn lost(&self, missing: &[Rule]) -> usize {
        missing.iter().filter(|r| self.lost.contains(&r.relid)).count()
    }

    /// Tables whose registration no base was taken for, or that rows which could not be attributed came from since.
    pub fn missing(&self, rules: Vec<Rule>) -> Vec<Rule> {
        let covered = |r: &Rule| {
            self.covered.get(&r.relid).is_some_and(|(xid, cut)| {
                *xid == r.registered_xid && self.doubtful.get(&r.relid).is_none_or(|at| at <= cut)
            })
        };
        rules.into_iter().filter(|r| !covered(r)).collect()
    }

    /// Objects whose tables are to be told by [`Self::doubt`].
    pub fn take_unread(&mut self) -> Vec<(Lsn, ObjectRef)> {
        std::mem::take(&mut self.unread)
    }

    /// Rows of these tables that could not be attributed were shipped up to here.
    pub fn doubt(&mut self, at: Lsn, relids: &BTreeSet<u32>) {
        for relid in relids {
            let d = self.doubtful.entry(*relid).or_insert(at);
            *d = (*d).max(at);
        }
    }

    /// Where rows of the table that could not be attributed were shipped last.
    pub fn doubtful(&self, relid: u32) -> Option<Lsn> {
        self.doubtful.get(&relid).copied()
    }

    /// Whether snapshots from now on may not see all that was shipped up to this position (see [`Self::prune`]).
    pub fn may_miss(&self, at: Lsn) -> bool {
        self.ships.iter().any(|r| r.from_lsn < at)
    }

    /// Drops ships whose every transaction any snapshot from now on sees. `xmin`: of a snapshot taken now.
    pub fn prune(&mut self, xmin: u64) {
        self.ships.retain(|r| matches!(&r.body, Body::Ship(s) if s.max_xid >= xmin));
    }

    /// Ships that may hold transactions which commit at or before `cut` and which snapshots from `xmin` on do not see.
    pub fn ships(&self, xmin: u64, cut: Lsn) -> Vec<Arc<LogRecord>> {
        self.ships
            .iter()
            .filter(|r| r.from_lsn < cut && matches!(&r.body, Body::Ship(s) if s.max_xid >= xmin))
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::model::{Base, BaseTable, Ship};
    use coffer_wire::{Class, Strategy};

    fn record(n: u64, upto: u64, body: Body) -> Arc<LogRecord> {
        Arc::new(LogRecord {
            v: 1,
            n,
            prev: None,
            source: Uuid::nil(),
            writer: Uuid::nil(),
            at_us: 0,
            system_identifier: 1,
            timeline: 1,
            slot: "s".into(),
            from_lsn: Lsn(upto.saturating_sub(10)),
            upto_lsn: Lsn(upto),
            upto_time_us: 0,
            body,
        })
    }

    fn rule(relid: u32, registered_xid: u64) -> Rule {
        Rule {
            relid,
            schema: "public".into(),
            name: format!("t{relid}"),
            strategy: Strategy::Identity,
            class: Class::Data,
            tenant_column: Some("t".into()),
            registered_xid,
            key_columns: None,
            tenant: None,
            partitioned: false,
            tenant_expression: None,
            parents: vec![],
        }
    }

    fn base(tables: &[(u32, u64)]) -> Body {
        let table = |(relid, registered_xid): &(u32, u64)| BaseTable {
            relid: *relid,
            name: String::new(),
            cut_lsn: Lsn(5),
            registered_xid: *registered_xid,
            rows: 0,
            owner: None,
        };
        Body::Base(Base {
            job: Uuid::nil(),
            tables: tables.iter().map(table).collect(),
            cut_lsn: Lsn(5),
            ..Base::default()
        })
    }

    fn missing(s: &Seen) -> Vec<u32> {
        s.missing(vec![rule(1, 100), rule(2, 100)]).iter().map(|r| r.relid).collect()
    }

    #[test]
    fn a_table_is_covered_by_a_base_for_its_registration_after_the_last_break() {
        let mut s = Seen::default();
        assert_eq!(missing(&s), [1, 2]);
        assert!(
            s.record(&record(0, 10, Body::Init), None) && s.record(&record(1, 10, base(&[(1, 100), (2, 99)])), None)
        );
        assert_eq!(missing(&s), [2]);
        s.record(&record(2, 10, base(&[(2, 100)])), None);
        assert!(missing(&s).is_empty());
        s.record(&record(3, 20, Body::Gap { reason: "slot_lost".into() }), None);
        assert_eq!(missing(&s), [1, 2]);
        assert_eq!(s.breaks(), 1);
        let lost = |s: &Seen| s.lost(&[rule(1, 100), rule(2, 100), rule(3, 100)]);
        assert_eq!(lost(&s), 2);
        s.record(&record(4, 20, base(&[(2, 100)])), None);
        assert_eq!(lost(&s), 1);
    }

    #[test]
    fn ships_stay_until_every_snapshot_sees_them() {
        let ship = |max_xid| Body::Ship(Ship { max_xid, ..Ship::default() });
        let mut s = Seen::default();
        for (n, upto, xid) in [(0, 10, 5), (1, 20, 8), (2, 30, 7)] {
            s.record(&record(n, upto, ship(xid)), None);
        }
        let ns = |v: Vec<Arc<LogRecord>>| v.iter().map(|r| r.n).collect::<Vec<_>>();
        assert_eq!(ns(s.ships(7, Lsn(100))), [1, 2]);
        assert_eq!(ns(s.ships(0, Lsn(15))), [0, 1]);
        s.prune(8);
        assert_eq!(ns(s.ships(0, Lsn(100))), [1]);
    }

    #[test]
    fn a_missing_record_is_noticed() {
        let mut s = Seen::default();
        assert!(s.record(&record(0, 10, Body::Init), None));
        assert!(s.record(&record(0, 10, Body::Init), None));
        assert!(!s.record(&record(2, 10, Body::Idle), None));
        assert_eq!(s.next(), 1);
    }

    #[test]
    fn rows_that_could_not_be_attributed_ask_for_a_base_after_them() {
        let nobody = Uuid::from_u128(7);
        let object = ObjectRef {
            path: "p".into(),
            kind: crate::crypto::ObjectKind::Changeset,
            tenant: nobody,
            object: Uuid::nil(),
            key_version: 1,
            bytes: 1,
            sha256: String::new(),
            lsn_start: Lsn(0),
            lsn_end: Lsn(20),
            rows: 1,
        };
        let mut s = Seen::default();
        s.record(&record(0, 10, base(&[(1, 100), (2, 100)])), Some(nobody));
        let ship = Body::Ship(Ship { objects: vec![object], ..Ship::default() });
        s.record(&record(1, 20, ship), Some(nobody));
        let unread = s.take_unread();
        assert_eq!(unread.len(), 1);
        s.doubt(unread[0].0, &BTreeSet::from([1]));
        assert_eq!(missing(&s), [1]);
        let Body::Base(mut b) = base(&[(1, 100)]) else { panic!("a base") };
        b.tables[0].cut_lsn = Lsn(20);
        s.record(&record(2, 20, Body::Base(b)), Some(nobody));
        assert!(missing(&s).is_empty());
    }
}
