//! What records of the log name, by tenant; and which of it is below the floors.

use super::{PARALLEL, Pruner, Survey, TenantReport};
use crate::catalog::floor::is_index_only;
use crate::catalog::{Catalog, Floor, Floors, State};
use crate::repository::{Body, LogRecord, ObjectRef};
use crate::retention::{Based, Changes, ChangesKind};
use coffer_wire::{Lsn, TenantKind};
use futures::{StreamExt, stream};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// An object of a ship's `objects` or a base's `fulls`, by the record's place in the log and its own in the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct At {
    record: usize,
    object: usize,
}

/// The objects of a log.
#[derive(Debug, Default)]
pub(super) struct Logged {
    records: Vec<Arc<LogRecord>>,
    /// Changesets and parts of bases.
    by_tenant: HashMap<Uuid, Vec<At>>,
    by_path: HashMap<String, At>,
    /// Lists of times: the places of their records.
    times: HashMap<String, usize>,
    /// All others: they stay.
    others: Arc<HashSet<String>>,
}

impl Logged {
    pub fn new(records: &[Arc<LogRecord>]) -> Self {
        let mut log = Self { records: records.to_vec(), ..Self::default() };
        let mut others = HashSet::new();
        for (record, r) in records.iter().enumerate() {
            let floored: &[ObjectRef] = match &r.body {
                Body::Ship(s) => &s.objects,
                Body::Base(b) => &b.fulls,
                _ => &[],
            };
            for (object, o) in floored.iter().enumerate() {
                let at = At { record, object };
                log.by_path.insert(o.path.clone(), at);
                log.by_tenant.entry(o.tenant).or_default().push(at);
            }
            for o in r.objects().filter(|o| !log.by_path.contains_key(&o.path)) {
                if is_index_only(r) && matches!(&r.body, Body::Ship(s) if s.common.as_ref() == Some(o)) {
                    log.times.insert(o.path.clone(), record);
                } else {
                    others.insert(o.path.clone());
                }
            }
        }
        log.others = Arc::new(others);
        log
    }

    fn get(&self, at: At) -> (&LogRecord, &ObjectRef) {
        let r = &self.records[at.record];
        match &r.body {
            Body::Ship(s) => (r, &s.objects[at.object]),
            Body::Base(b) => (r, &b.fulls[at.object]),
            _ => unreachable!("only ships and bases are put here"),
        }
    }

    /// Where the log ends: what is beyond may be on its way.
    pub fn end(&self) -> Lsn {
        self.records.iter().map(|r| r.upto_lsn).max().unwrap_or_default()
    }

    pub fn newest(&self) -> u64 {
        self.records.last().map_or(0, |r| r.n)
    }

    /// What stays whatever any floor says.
    pub fn others(&self) -> &Arc<HashSet<String>> {
        &self.others
    }

    /// Whether a reader of the log expects an object: a record names it, and no floor is above it.
    pub fn expects(&self, path: &str, floors: &Floors) -> bool {
        if let Some(at) = self.by_path.get(path) {
            let (r, o) = self.get(*at);
            return !floors.is_gone(r, o);
        }
        if let Some(record) = self.times.get(path) {
            let r = &self.records[*record];
            return !r.objects().any(|o| o.path == path && floors.is_gone(r, o));
        }
        self.others.contains(path)
    }

    /// Whether an object is a changeset, or a part of a base, that a record names.
    pub fn names(&self, path: &str) -> bool {
        self.by_path.contains_key(path)
    }

    /// Whether records name changes, or parts of bases, of a tenant.
    pub fn has(&self, tenant: Uuid) -> bool {
        self.by_tenant.contains_key(&tenant)
    }

    /// What of a tenant's there is that is not below its floor.
    pub fn of(&self, tenant: Uuid, floor: Option<Floor>) -> (Vec<Changes>, Vec<Based>) {
        let (mut changes, mut bases) = (Vec::new(), Vec::new());
        for at in self.by_tenant.get(&tenant).into_iter().flatten() {
            let (r, o) = self.get(*at);
            if r.is_joined() || floor.is_some_and(|f| f.covers(r.n, o)) {
                continue;
            }
            match &r.body {
                Body::Base(_) => bases.push(Based { cut: o.lsn_end, object: o.clone() }),
                _ => changes.push(Changes {
                    id: o.object,
                    kind: ChangesKind::Changeset,
                    from: r.from_lsn,
                    to: o.lsn_end,
                    to_us: r.upto_time_us,
                    objects: vec![o.clone()],
                }),
            }
        }
        (changes, bases)
    }

    /// The lists of times that go when the floor of what concerns all is raised.
    pub fn times_below(&self, from: Option<Floor>, to: Floor) -> Vec<ObjectRef> {
        let of = |floor| Floors { commons: floor, ..Floors::default() };
        let (before, after) = (of(from), of(Some(to)));
        let objects = self.times.values().flat_map(|record| {
            let r = &self.records[*record];
            r.objects().map(move |o| (r, o))
        });
        let mut gone: Vec<ObjectRef> = objects
            .filter(|(r, o)| self.times.contains_key(&o.path) && after.is_gone(r, o) && !before.is_gone(r, o))
            .map(|(_, o)| o.clone())
            .collect();
        gone.sort_by(|a, b| a.path.cmp(&b.path));
        gone
    }
}

impl Pruner {
    /// The floors of these tenants as their catalogs have them now. A catalog that cannot be read is its tenant's trouble:
    /// what concerns all stays.
    pub(super) async fn read_floors(&self, survey: &mut Survey, tenants: &[Uuid]) {
        let each: Vec<_> = tenants.iter().map(|t| Catalog::open(&self.repo, self.source.1, *t, None)).collect();
        let mut read = stream::iter(each).buffer_unordered(PARALLEL);
        let (mut oldest, shared) = (Some((i64::MAX, Lsn::MAX)), self.shared());
        while let Some(c) = read.next().await {
            let Ok(c) = c else {
                oldest = None;
                continue;
            };
            let state = c.state();
            let pending = state.removals.iter().flat_map(|r| &r.objects).map(|o| o.path.clone());
            survey.pending.extend(pending);
            if let Some(f) = state.floor {
                survey.floors.tenants.insert(c.tenant(), f);
            }
            if c.tenant() == shared {
                survey.floors.commons = state.commons;
            } else if !self.keeps_log(c.tenant()) {
                let of_this = oldest_of(survey, c.tenant(), state);
                oldest = oldest.zip(of_this).map(|((us, lsn), (us_2, lsn_2))| (us.min(us_2), lsn.min(lsn_2)));
            }
        }
        drop(read);
        survey.oldest = oldest.filter(|_| self.tenant.is_none());
    }

    /// Whether all changes of a tenant stay: rows that capture could not attribute are in no full, and they tell which
    /// tables have to be doubted; and nobody knows whose those are that the keyring does not know.
    pub(super) fn keeps_log(&self, tenant: Uuid) -> bool {
        self.keyring.by_uid(tenant).is_none_or(|t| t.tenant.kind == TenantKind::Unresolved)
    }

    /// Up to where nobody needs what concerns all: the lowest floor of those who have something in the log.
    pub(super) fn commons_floor(&self, survey: &Survey, reports: &[TenantReport]) -> Option<Floor> {
        let unattributed = |t: &Uuid| self.keyring.by_uid(*t).is_some_and(|t| t.tenant.kind == TenantKind::Unresolved);
        let mut lowest: Option<Lsn> = None;
        for t in reports.iter().filter(|t| survey.log.has(t.uid) && !unattributed(&t.uid)) {
            let floor = t.floor.filter(|f| t.error.is_none() && survey.is_on_line(*f))?;
            lowest = Some(lowest.map_or(floor.lsn, |l| l.min(floor.lsn)));
        }
        let shared = self.shared();
        if survey.log.has(shared) {
            let floor = survey.floors.tenants.get(&shared).filter(|f| survey.is_on_line(**f))?;
            lowest = lowest.map(|l| l.min(floor.lsn));
        }
        let floor = Floor { lsn: lowest?, log_n: survey.log.newest() };
        survey.floors.commons.is_none_or(|f| floor.lsn > f.lsn).then_some(floor)
    }
}

/// Time and point of a tenant's oldest full; `None`: its window begins before all of them.
fn oldest_of(survey: &Survey, tenant: Uuid, state: &State) -> Option<(i64, Lsn)> {
    if survey.log.has(tenant) && state.floor.is_none_or(|f| !survey.is_on_line(f)) {
        return None;
    }
    let us = state.fulls.iter().map(|f| f.point_time_us).min().unwrap_or(i64::MAX);
    Some((us, state.fulls.iter().map(|f| f.point_lsn).min().unwrap_or(Lsn::MAX)))
}

impl Survey {
    /// Whether a floor is on the timeline that the log is on.
    pub(super) fn is_on_line(&self, f: Floor) -> bool {
        self.history.line().goes_through(f.lsn, f.log_n)
    }
}
