//! The log as one line of history, and what of it can be restored to.
//!
//! After a promotion the positions of the abandoned timeline are used anew. Here the log is cut where it was abandoned,
//! so that a position means one thing. Then, per table, the spans that are closed: from where rows may have come or
//! gone without a trace, to the table's next base.

use crate::repository::model::PendingTable;
use crate::repository::{Body, LogRecord, ObjectRef};
use crate::ship::CLOCK_MARGIN_US;
use coffer_wire::Lsn;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use uuid::Uuid;

/// A ship on the line.
#[derive(Clone, Debug)]
pub struct ShipAt {
    pub record: Arc<LogRecord>,
    /// Nothing beyond it counts: the timeline was abandoned there. [`Lsn::MAX`] for most.
    pub limit: Lsn,
}

impl ShipAt {
    pub fn ship(&self) -> &crate::repository::model::Ship {
        match &self.record.body {
            Body::Ship(s) => s,
            _ => unreachable!("only ships are put here"),
        }
    }
}

/// A base on the line.
#[derive(Clone, Debug)]
pub struct BaseAt {
    pub record: Arc<LogRecord>,
}

impl BaseAt {
    pub fn base(&self) -> &crate::repository::model::Base {
        match &self.record.body {
            Body::Base(b) => b,
            _ => unreachable!("only bases are put here"),
        }
    }

    pub fn cut(&self, relid: u32) -> Option<Lsn> {
        self.base().tables.iter().find(|t| t.relid == relid).map(|t| t.cut_lsn)
    }
}

/// Positions `from..to` that cannot be restored to, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    pub from: Lsn,
    /// Exclusive: the first position that is open again; [`Lsn::MAX`] when there is none.
    pub to: Lsn,
    pub reason: String,
}

/// A restore in place, from the marker in its own transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    pub id: Uuid,
    /// The tenant's uid.
    pub tenant: Uuid,
    /// The tables that it changed.
    pub relids: Vec<u32>,
    /// It was of single rows.
    pub rows: bool,
    /// Its commit's end.
    pub at: Lsn,
}

/// What the markers of the common objects say, in the order of the log.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Name, position, commit time.
    pub restore_points: Vec<(String, Lsn, i64)>,
    pub restores: Vec<Restored>,
    pub registry: Vec<Registered>,
    /// Tables that were rewritten without their rows being given anew.
    pub rewrites: Vec<(u32, Lsn)>,
    pub drops: Vec<(u32, Lsn)>,
    /// Where definitions of covered tables changed.
    pub ddl: Vec<Lsn>,
    /// Where other definitions changed: no row depends on them.
    pub definitions: Vec<Lsn>,
    /// Tables with changes that capture could not attribute.
    pub unresolved: Vec<(u32, Lsn)>,
}

/// A change of the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    pub relid: u32,
    pub at: Lsn,
    pub xid: u64,
    pub what: Registration,
    /// The tenant that all of its rows belong to.
    pub owner: Option<Uuid>,
    /// Of a fresh table.
    pub name: Option<String>,
}

impl Registered {
    /// Where a table that was empty when it was registered begins: before the transaction that registered it.
    fn fresh_cut(&self) -> Option<Lsn> {
        matches!(self.what, Registration::Add { fresh: true, .. }).then(|| Lsn(self.at.0 - 1))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// `rebase`: rows archived before do not continue into what follows.
    /// `fresh`: it was empty then, so that no base is needed to know its rows.
    Add {
        rebase: bool,
        fresh: bool,
    },
    Remove,
}

/// A table as the log knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableAt {
    pub relid: u32,
    pub name: String,
    pub cut: Lsn,
    /// Index into [`Line::bases`]; `None`: it was empty at its cut.
    pub base: Option<usize>,
}

/// What a record says about the source's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeAt {
    pub lsn: Lsn,
    /// Every commit up to this time is at or below `lsn`.
    pub upto_us: i64,
    /// No commit up to `lsn` is later than this.
    pub latest_us: i64,
}

impl TimeAt {
    /// What the record before promises holds at a later position too, however small the step back of its claim is: a
    /// record without commits leaves [`CLOCK_MARGIN_US`]. A larger step is the clock's own, and told.
    fn goes_on(&mut self, before: &Self) {
        let on = |before: i64, now: i64| if before - now <= CLOCK_MARGIN_US { before.max(now) } else { now };
        self.upto_us = on(before.upto_us, self.upto_us);
        self.latest_us = on(before.latest_us, self.latest_us);
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Line {
    pub start: Lsn,
    pub end: Lsn,
    pub ships: Vec<ShipAt>,
    pub bases: Vec<BaseAt>,
    /// Lost positions, both exclusive of what is there: `(last before, first after, reason)`.
    pub gaps: Vec<(Lsn, Lsn, String)>,
    /// Records in order, for times.
    pub times: Vec<TimeAt>,
    /// Spans of abandoned timelines: from, to, the record that left them.
    pub abandoned: Vec<(Lsn, Lsn, u64)>,
}

impl Line {
    pub fn new(records: &[Arc<LogRecord>]) -> Self {
        let mut line = Self::default();
        let mut timeline = None;
        for r in records {
            match &r.body {
                Body::Init => {
                    if line.times.is_empty() {
                        line.start = r.upto_lsn;
                    }
                }
                Body::Ship(_) => line.ships.push(ShipAt { record: r.clone(), limit: Lsn::MAX }),
                Body::Base(_) => line.bases.push(BaseAt { record: r.clone() }),
                Body::Idle => {}
                Body::Gap { reason } => line.gaps.push((line.end, r.upto_lsn, reason.clone())),
                Body::Timeline { at, .. } => line.abandon(*at, r.n),
            }
            if let Body::Timeline { at, .. } = &r.body {
                line.end = line.end.min(*at).max(r.upto_lsn.min(*at));
            } else {
                line.end = line.end.max(r.upto_lsn);
            }
            if matches!(r.body, Body::Init | Body::Ship(_) | Body::Idle | Body::Gap { .. }) {
                let latest_us = match &r.body {
                    Body::Ship(s) => r.upto_time_us.max(s.max_commit_us),
                    _ => r.upto_time_us,
                };
                let mut at = TimeAt { lsn: r.upto_lsn, upto_us: r.upto_time_us, latest_us };
                if let Some((before, _)) = line.times.last().zip(timeline).filter(|(_, t)| *t == r.timeline) {
                    at.goes_on(before);
                }
                timeline = Some(r.timeline);
                line.times.push(at);
            }
        }
        line
    }

    /// Cuts off what was archived beyond `at`.
    fn abandon(&mut self, at: Lsn, n: u64) {
        if self.end > at {
            self.abandoned.push((at, self.end, n));
        }
        self.ships.retain(|s| s.record.from_lsn < at);
        for s in &mut self.ships {
            if s.record.upto_lsn > at || s.ship().sequences.iter().any(|r| r.lsn > at) {
                s.limit = s.limit.min(at);
            }
        }
        self.bases.retain(|b| b.base().cut_lsn <= at);
        self.gaps.retain(|g| g.0 < at);
        self.times.retain(|t| t.lsn <= at);
        self.end = self.end.min(at);
    }

    /// Whether what was made of the records up to `log_n`, at this position, is on the line still.
    pub fn goes_through(&self, at: Lsn, log_n: u64) -> bool {
        !self.abandoned.iter().any(|(left, _, n)| *n > log_n && at > *left)
    }

    /// Drops facts of abandoned timelines: a ship's facts count up to its limit.
    pub fn keeps(&self, ship: &ShipAt, at: Lsn) -> bool {
        at <= ship.limit
    }

    fn relids(&self, facts: &Facts) -> BTreeSet<u32> {
        let based = self.bases.iter().flat_map(|b| b.base().tables.iter().map(|t| t.relid));
        let added = facts.registry.iter().filter(|r| matches!(r.what, Registration::Add { .. })).map(|r| r.relid);
        based.chain(added).chain(self.pending().map(|p| p.relid)).collect()
    }

    /// Tables that a base was to hold and did not.
    fn pending(&self) -> impl Iterator<Item = &PendingTable> {
        self.bases.iter().flat_map(|b| &b.base().pending)
    }

    /// The name that the newest base, or the registration, has for the table.
    pub fn name<'a>(&'a self, relid: u32, facts: &'a Facts) -> Option<&'a str> {
        let based = self.bases.iter().rev().flat_map(|b| &b.base().tables).find(|t| t.relid == relid);
        let pending = || self.pending().find(|p| p.relid == relid).map(|p| p.name.as_str());
        let fresh = || facts.registry.iter().rev().find(|r| r.relid == relid)?.name.as_deref();
        based.map(|t| t.name.as_str()).or_else(pending).or_else(fresh)
    }

    /// The first cut at or after `from` of a base that saw the registration `xid`.
    fn next_cut(&self, relid: u32, from: Lsn, xid: u64) -> Lsn {
        self.bases
            .iter()
            .flat_map(|b| &b.base().tables)
            .filter(|t| t.relid == relid && t.cut_lsn >= from && t.registered_xid >= xid)
            .map(|t| t.cut_lsn)
            .min()
            .unwrap_or(Lsn::MAX)
    }

    /// When the table was covered: spans `from..to`.
    fn present(&self, relid: u32, facts: &Facts) -> Vec<(Lsn, Lsn)> {
        let mut events: Vec<(Lsn, bool)> = facts
            .registry
            .iter()
            .filter(|r| r.relid == relid)
            .map(|r| (r.at, matches!(r.what, Registration::Add { .. })))
            .chain(facts.drops.iter().filter(|d| d.0 == relid).map(|d| (d.1, false)))
            .collect();
        // In the order of the log: of one transaction, all have its position.
        events.sort_by_key(|e| e.0);
        let first_base = self.bases.iter().flat_map(|b| &b.base().tables).find(|t| t.relid == relid);
        // Registered before the log began, unless its first base answers a registration that is in the log.
        let registered_later = match first_base {
            Some(t) => facts
                .registry
                .iter()
                .any(|r| r.relid == relid && r.xid == t.registered_xid && matches!(r.what, Registration::Add { .. })),
            None => events.iter().any(|e| e.1) || !self.pending().any(|p| p.relid == relid),
        };
        let mut out = Vec::new();
        let mut since = (!registered_later).then_some(self.start);
        for (at, add) in events {
            match (add, since) {
                (true, None) => since = Some(at),
                (false, Some(s)) => {
                    out.push((s, at));
                    since = None;
                }
                _ => {}
            }
        }
        if let Some(s) = since {
            out.push((s, Lsn::MAX));
        }
        out
    }

    /// Spans in which the table was covered and its rows are not known, ascending; they may overlap.
    pub fn closed(&self, relid: u32, facts: &Facts) -> Vec<Closed> {
        let mut out = Vec::new();
        let name = self.name(relid, facts).map_or_else(|| format!("relation {relid}"), str::to_owned);
        let mut close = |from: Lsn, to: Lsn, reason: String| {
            if from < to {
                out.push(Closed { from, to, reason });
            }
        };
        let present = self.present(relid, facts);
        for (from, to) in &present {
            let adds: Vec<_> = facts.registry.iter().filter(|r| r.relid == relid && r.at == *from).collect();
            if adds.iter().any(|r| r.fresh_cut().is_some()) {
                continue;
            }
            let xid = adds.iter().map(|r| r.xid).max().unwrap_or(0);
            close(*from, self.next_cut(relid, *from, xid).min(*to), format!("first_base_pending: {name}"));
        }
        for r in facts.registry.iter().filter(|r| r.relid == relid) {
            if r.what == (Registration::Add { rebase: true, fresh: false }) {
                close(r.at, self.next_cut(relid, r.at, r.xid), format!("new_base_pending: {name}"));
            }
        }
        for (_, at) in facts.rewrites.iter().filter(|w| w.0 == relid) {
            close(*at, self.next_cut(relid, *at, 0), format!("rewritten: {name}"));
        }
        for (_, at) in facts.unresolved.iter().filter(|w| w.0 == relid) {
            close(*at, self.next_cut(relid, *at, 0), format!("unresolved_rows: {name}"));
        }
        for (last, first, reason) in &self.gaps {
            close(Lsn(last.0 + 1), self.next_cut(relid, *first, 0), reason.clone());
        }
        // A base that answers a registration which the log does not have.
        let bases: Vec<_> = self.bases.iter().flat_map(|b| &b.base().tables).filter(|t| t.relid == relid).collect();
        for pair in bases.windows(2) {
            let known = facts.registry.iter().any(|r| r.relid == relid && r.xid == pair[1].registered_xid);
            if pair[1].registered_xid != pair[0].registered_xid && !known {
                close(Lsn(pair[0].cut_lsn.0 + 1), pair[1].cut_lsn, format!("registration_changed: {name}"));
            }
        }
        // What was closed while the table was not covered does not matter.
        let mut within = Vec::new();
        for c in out {
            for (from, to) in &present {
                let (from, to) = (c.from.max(*from), c.to.min(*to));
                if from < to {
                    within.push(Closed { from, to, reason: c.reason.clone() });
                }
            }
        }
        within.sort_by_key(|c| (c.from, c.to));
        within
    }

    /// Whether a table can hold rows of a tenant (`None`: of any): one of another tenant's schema cannot. A table that was
    /// not always the same tenant's concerns everybody.
    pub(super) fn concerns(&self, relid: u32, facts: &Facts, tenant: Option<Uuid>) -> bool {
        tenant.is_none_or(|tenant| self.concerned(relid, facts, tenant, (Lsn::MAX, u64::MAX)))
    }

    /// The same as far as it was known from what had happened up to a position, and from records up to a number.
    pub(super) fn concerned(&self, relid: u32, facts: &Facts, tenant: Uuid, (at, n): (Lsn, u64)) -> bool {
        let registered = facts
            .registry
            .iter()
            .filter(|r| r.relid == relid && r.at <= at && matches!(r.what, Registration::Add { .. }))
            .map(|r| r.owner);
        let bases = || self.bases.iter().filter(|b| b.record.n <= n).map(BaseAt::base);
        let based = bases().flat_map(|b| &b.tables).filter(|t| t.relid == relid).map(|t| t.owner);
        let pending = bases().flat_map(|b| &b.pending).filter(|p| p.relid == relid).map(|p| p.owner);
        let owners: BTreeSet<Option<Uuid>> = registered.chain(based).chain(pending).collect();
        owners.len() != 1 || owners.contains(&None) || owners.contains(&Some(tenant))
    }

    /// All closed spans of the tables that concern a tenant (`None`: of all), merged, within the line.
    pub fn all_closed(&self, facts: &Facts, tenant: Option<Uuid>) -> Vec<Closed> {
        let mut all: Vec<Closed> = self
            .relids(facts)
            .into_iter()
            .filter(|r| self.concerns(*r, facts, tenant))
            .flat_map(|r| self.closed(r, facts))
            .collect();
        // Which tables there were in a gap is known when the first base behind it is, whatever there was before it.
        for (last, first, reason) in &self.gaps {
            let based = self.bases.iter().map(|b| b.base().cut_lsn).filter(|cut| cut >= first);
            let fresh = facts.registry.iter().filter_map(|r| r.fresh_cut()).filter(|cut| cut >= first);
            let to = based.chain(fresh).min().unwrap_or(Lsn::MAX);
            all.push(Closed { from: Lsn(last.0 + 1), to, reason: reason.clone() });
        }
        all.sort_by_key(|c| (c.from, c.to));
        let mut merged: Vec<Closed> = Vec::new();
        for c in all {
            match merged.last_mut() {
                Some(m) if c.from <= m.to => m.to = m.to.max(c.to),
                _ => merged.push(c),
            }
        }
        merged
    }

    /// The spans `from..=to` that a tenant (`None`: any) can be restored to.
    pub fn open(&self, facts: &Facts, tenant: Option<Uuid>) -> Vec<(Lsn, Lsn)> {
        let based = self.bases.iter().flat_map(|b| &b.base().tables);
        let Some(first) = based.filter(|t| self.concerns(t.relid, facts, tenant)).map(|t| t.cut_lsn).min() else {
            return Vec::new();
        };
        let mut out = Vec::new();
        let mut from = first;
        for c in self.all_closed(facts, tenant) {
            if c.from > from && from <= self.end {
                out.push((from, Lsn(c.from.0 - 1).min(self.end)));
            }
            from = from.max(c.to);
        }
        if from <= self.end {
            out.push((from, self.end));
        }
        out
    }

    /// The tables that are covered at `at` and concern the tenant, each with the newest base that is not newer. `Err`: tables whose rows are
    /// not known there.
    pub fn tables_at(
        &self,
        at: Lsn,
        facts: &Facts,
        tenant: Option<Uuid>,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<TableAt>, Vec<(u32, Closed)>> {
        let (mut tables, mut unknown) = (Vec::new(), Vec::new());
        for relid in self.covered_at(at, facts).into_iter().filter(|r| self.concerns(*r, facts, tenant)) {
            if !wanted(self.name(relid, facts).unwrap_or_default()) {
                continue;
            }
            match self.closed(relid, facts).into_iter().find(|c| c.from <= at && at < c.to) {
                Some(c) => unknown.push((relid, c)),
                None => tables.extend(self.newest_base(relid, at, facts)),
            }
        }
        if unknown.is_empty() { Ok(tables) } else { Err(unknown) }
    }

    /// The same without these tables, whatever is known of them.
    pub fn tables_except(&self, at: Lsn, facts: &Facts, except: &BTreeSet<u32>) -> Vec<TableAt> {
        let covered = self.covered_at(at, facts);
        covered.into_iter().filter(|r| !except.contains(r)).filter_map(|r| self.newest_base(r, at, facts)).collect()
    }

    fn covered_at(&self, at: Lsn, facts: &Facts) -> Vec<u32> {
        let covered = |r: &u32| self.present(*r, facts).iter().any(|(from, to)| *from <= at && at < *to);
        self.relids(facts).into_iter().filter(covered).collect()
    }

    fn newest_base(&self, relid: u32, at: Lsn, facts: &Facts) -> Option<TableAt> {
        let based = self
            .bases
            .iter()
            .enumerate()
            .filter_map(|(i, b)| b.base().tables.iter().find(|t| t.relid == relid).map(|t| (t, i)))
            .filter(|(t, _)| t.cut_lsn <= at)
            .max_by_key(|(t, i)| (t.cut_lsn, *i))
            .map(|(t, base)| TableAt { relid, name: t.name.clone(), cut: t.cut_lsn, base: Some(base) });
        let fresh = facts
            .registry
            .iter()
            .filter(|r| r.relid == relid && r.at <= at)
            .filter_map(|r| Some(TableAt { relid, name: r.name.clone()?, cut: r.fresh_cut()?, base: None }))
            .max_by_key(|t| t.cut);
        based.into_iter().chain(fresh).max_by_key(|t| t.cut)
    }

    /// The tenant's fulls that these tables are read from, each with its tables.
    pub fn fulls(&self, tables: &[TableAt], tenant: uuid::Uuid) -> Vec<(ObjectRef, BTreeSet<u32>)> {
        let mut by_base: BTreeMap<usize, BTreeSet<u32>> = BTreeMap::new();
        for (base, relid) in tables.iter().filter_map(|t| Some((t.base?, t.relid))) {
            by_base.entry(base).or_default().insert(relid);
        }
        let mut out = Vec::new();
        for (base, relids) in by_base {
            for full in self.bases[base].base().fulls.iter().filter(|f| f.tenant == tenant) {
                out.push((full.clone(), relids.clone()));
            }
        }
        out
    }

    /// A time that is not before any commit up to this position.
    pub fn time_at(&self, at: Lsn) -> i64 {
        self.times.iter().find(|t| t.lsn >= at).or(self.times.last()).map_or(0, |t| t.latest_us)
    }

    /// A time up to which every commit is at or below this position.
    pub fn time_before(&self, at: Lsn) -> i64 {
        self.times.iter().rev().find(|t| t.lsn <= at).map_or(0, |t| t.upto_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::model::{Base, BaseTable, Ship};
    use uuid::Uuid;

    fn record(n: u64, from: u64, upto: u64, body: Body) -> Arc<LogRecord> {
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
            from_lsn: Lsn(from),
            upto_lsn: Lsn(upto),
            upto_time_us: upto as i64 * 1000,
            body,
        })
    }

    fn base(tables: &[(u32, u64, u64)]) -> Body {
        Body::Base(Base {
            job: Uuid::nil(),
            tables: tables
                .iter()
                .map(|(relid, cut, xid)| BaseTable {
                    relid: *relid,
                    name: format!("public.t{relid}"),
                    cut_lsn: Lsn(*cut),
                    registered_xid: *xid,
                    rows: 0,
                    owner: None,
                })
                .collect(),
            cut_lsn: Lsn(tables.iter().map(|t| t.1).max().unwrap()),
            ..Base::default()
        })
    }

    fn ship() -> Body {
        Body::Ship(Ship::default())
    }

    fn add(relid: u32, at: u64, xid: u64, rebase: bool) -> Registered {
        Registered {
            relid,
            at: Lsn(at),
            xid,
            what: Registration::Add { rebase, fresh: false },
            owner: None,
            name: None,
        }
    }

    fn open(l: &Line, f: &Facts) -> Vec<(u64, u64)> {
        l.open(f, None).into_iter().map(|(a, b)| (a.0, b.0)).collect()
    }

    #[test]
    fn times_rise_with_positions() {
        let at = |n: u64, timeline: u32, time_us: i64, body: Body| {
            let r = record(n, 10 * n, 10 * n + 10, body);
            Arc::new(LogRecord { timeline, upto_time_us: time_us, ..(*r).clone() })
        };
        let committed = |us: i64| Body::Ship(Ship { max_commit_us: us, ..Ship::default() });
        const S: i64 = 1_000_000;
        let times = |records: &[Arc<LogRecord>]| -> Vec<(i64, i64)> {
            Line::new(records).times.iter().map(|t| (t.upto_us, t.latest_us)).collect()
        };
        let begun = [at(0, 1, 0, Body::Init), at(1, 1, 20 * S - 1, committed(20 * S))];
        // Nothing was committed behind the ship, and its time is known less a margin.
        let margin = [&begun[..], &[at(2, 1, 19 * S + S / 2, Body::Idle), at(3, 1, 22 * S, Body::Idle)]].concat();
        assert_eq!(times(&margin)[1..], [(20 * S - 1, 20 * S), (20 * S - 1, 20 * S), (22 * S, 22 * S)]);
        // The clock itself stepped back.
        let step = [&begun[..], &[at(2, 1, 18 * S, Body::Idle)]].concat();
        assert_eq!(times(&step)[2], (18 * S, 18 * S));
        // Another timeline is another server, with a clock of its own.
        let promoted = [
            &begun[..],
            &[at(2, 2, 0, Body::Timeline { from: 1, to: 2, at: Lsn(20) }), at(3, 2, 19 * S + S / 2, Body::Idle)],
        ];
        assert_eq!(times(&promoted.concat())[2], (19 * S + S / 2, 19 * S + S / 2));
    }

    #[test]
    fn the_window_begins_when_every_table_has_its_base() {
        let l = Line::new(&[
            record(0, 0, 10, Body::Init),
            record(1, 10, 50, ship()),
            record(2, 50, 50, base(&[(1, 30, 5), (2, 40, 5)])),
            record(3, 50, 90, ship()),
        ]);
        assert_eq!(open(&l, &Facts::default()), [(40, 90)]);
        // A table that is all another tenant's concerns nobody else.
        let (mine, theirs) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let owned = |(relid, owner)| Registered { owner: Some(owner), ..add(relid, 1, 5, false) };
        let mut of_theirs = base(&[(1, 30, 5), (2, 40, 5)]);
        if let Body::Base(b) = &mut of_theirs {
            b.tables[1].owner = Some(theirs);
        }
        let o = Line::new(&[record(0, 0, 10, Body::Init), record(1, 10, 90, ship()), record(2, 90, 90, of_theirs)]);
        assert_eq!(o.open(&Facts::default(), Some(mine)), [(Lsn(30), Lsn(90))]);
        assert_eq!(o.open(&Facts::default(), Some(theirs)), [(Lsn(40), Lsn(90))]);
        assert_eq!(o.tables_at(Lsn(60), &Facts::default(), Some(mine), &|_| true).unwrap().len(), 1);
        // Unless it was not always.
        let moved = Facts { registry: vec![owned((2, mine))], ..Facts::default() };
        assert_eq!(o.open(&moved, Some(mine)), [(Lsn(40), Lsn(90))]);
        let t = l.tables_at(Lsn(60), &Facts::default(), None, &|_| true).unwrap();
        assert_eq!(t.iter().map(|t| (t.relid, t.cut.0)).collect::<Vec<_>>(), [(1, 30), (2, 40)]);
        assert!(l.tables_at(Lsn(35), &Facts::default(), None, &|_| true).is_err());
        assert_eq!(l.tables_at(Lsn(35), &Facts::default(), None, &|n| n == "public.t1").unwrap().len(), 1);
    }

    #[test]
    fn a_table_that_was_empty_when_it_was_registered_needs_no_base() {
        let l = Line::new(&[
            record(0, 0, 10, Body::Init),
            record(1, 10, 50, ship()),
            record(2, 50, 50, base(&[(1, 30, 5)])),
            record(3, 50, 90, ship()),
        ]);
        let name = Some("public.new".to_owned());
        let what = Registration::Add { rebase: true, fresh: true };
        let f = Facts { registry: vec![Registered { what, name, ..add(2, 60, 9, true) }], ..Facts::default() };
        assert_eq!(open(&l, &f), [(30, 90)]);
        assert_eq!(l.tables_at(Lsn(59), &f, None, &|_| true).unwrap().len(), 1);
        let t = l.tables_at(Lsn(60), &f, None, &|n| n == "public.new").unwrap();
        // What the transaction that registered it wrote counts.
        assert_eq!((t[0].cut, t[0].base), (Lsn(59), None));
    }

    #[test]
    fn a_table_that_the_first_base_had_to_leave_out_closes_everything_until_its_own() {
        let mut first = base(&[(1, 30, 5)]);
        if let Body::Base(b) = &mut first {
            b.pending.push(PendingTable { relid: 2, name: "public.t2".into(), owner: None });
        }
        let mut records = vec![record(0, 0, 10, Body::Init), record(1, 10, 50, ship()), record(2, 50, 50, first)];
        records.push(record(3, 50, 90, ship()));
        let l = Line::new(&records);
        assert_eq!(open(&l, &Facts::default()), []);
        assert!(l.tables_at(Lsn(60), &Facts::default(), None, &|_| true).is_err());
        records.push(record(4, 90, 90, base(&[(2, 80, 5)])));
        let l = Line::new(&records);
        assert_eq!(open(&l, &Facts::default()), [(80, 90)]);
    }

    #[test]
    fn a_table_added_later_closes_only_from_its_registration_to_its_base() {
        let l = Line::new(&[
            record(0, 0, 10, Body::Init),
            record(1, 10, 20, base(&[(1, 20, 5)])),
            record(2, 20, 90, ship()),
            record(3, 90, 90, base(&[(2, 70, 77)])),
            record(4, 90, 120, ship()),
        ]);
        let f = Facts { registry: vec![add(2, 60, 77, true)], ..Facts::default() };
        assert_eq!(open(&l, &f), [(20, 59), (70, 120)]);
        assert_eq!(l.tables_at(Lsn(50), &f, None, &|_| true).unwrap().len(), 1);
        assert_eq!(l.tables_at(Lsn(80), &f, None, &|_| true).unwrap().len(), 2);
        // Not yet based: closed to the end.
        let f = Facts { registry: vec![add(2, 60, 77, true), add(3, 100, 99, true)], ..Facts::default() };
        assert_eq!(open(&l, &f), [(20, 59), (70, 99)]);
        // A rule that was only touched up closes nothing.
        let f = Facts { registry: vec![add(2, 60, 77, true), add(1, 100, 99, false)], ..Facts::default() };
        assert_eq!(open(&l, &f), [(20, 59), (70, 120)]);
    }

    #[test]
    fn gaps_rewrites_and_unresolved_rows_close_to_the_next_base() {
        let l = Line::new(&[
            record(0, 0, 10, Body::Init),
            record(1, 10, 10, base(&[(1, 10, 5), (2, 10, 5)])),
            record(2, 10, 30, ship()),
            record(3, 30, 50, Body::Gap { reason: "slot_lost".into() }),
            record(4, 50, 70, ship()),
            record(5, 70, 70, base(&[(1, 60, 5), (2, 65, 5)])),
            record(6, 70, 200, ship()),
            record(7, 200, 200, base(&[(1, 150, 5), (2, 150, 5)])),
        ]);
        assert_eq!(open(&l, &Facts::default()), [(10, 30), (65, 200)]);
        let closed = l.all_closed(&Facts::default(), None);
        assert_eq!((closed[0].from, closed[0].to, closed[0].reason.as_str()), (Lsn(31), Lsn(65), "slot_lost"));
        let f = Facts { rewrites: vec![(1, Lsn(100))], ..Facts::default() };
        assert_eq!(open(&l, &f), [(10, 30), (65, 99), (150, 200)]);
        let f = Facts { unresolved: vec![(2, Lsn(160))], ..Facts::default() };
        assert_eq!(open(&l, &f), [(10, 30), (65, 159)]);
    }

    #[test]
    fn a_dropped_table_is_not_missed() {
        let l = Line::new(&[
            record(0, 0, 10, Body::Init),
            record(1, 10, 10, base(&[(1, 10, 5), (2, 10, 5)])),
            record(2, 10, 100, ship()),
        ]);
        let f = Facts { drops: vec![(2, Lsn(50))], rewrites: vec![(2, Lsn(60))], ..Facts::default() };
        assert_eq!(open(&l, &f), [(10, 100)]);
        assert_eq!(l.tables_at(Lsn(49), &f, None, &|_| true).unwrap().len(), 2);
        assert_eq!(l.tables_at(Lsn(50), &f, None, &|_| true).unwrap().len(), 1);
    }

    #[test]
    fn what_an_abandoned_timeline_held_is_cut_off() {
        let timeline = Body::Timeline { from: 1, to: 2, at: Lsn(60) };
        let l = Line::new(&[
            record(0, 0, 10, Body::Init),
            record(1, 10, 10, base(&[(1, 10, 5)])),
            record(2, 10, 50, ship()),
            record(3, 50, 80, ship()),
            record(4, 80, 80, base(&[(1, 75, 5)])),
            record(5, 80, 90, ship()),
            record(6, 60, 60, timeline),
            record(7, 60, 85, ship()),
        ]);
        assert_eq!(l.abandoned, [(Lsn(60), Lsn(90), 6)]);
        assert!(l.goes_through(Lsn(60), 5) && !l.goes_through(Lsn(61), 5) && l.goes_through(Lsn(61), 6));
        assert_eq!(l.bases.len(), 1);
        let ships: Vec<_> = l.ships.iter().map(|s| (s.record.n, s.limit)).collect();
        assert_eq!(ships, [(2, Lsn::MAX), (3, Lsn(60)), (7, Lsn::MAX)]);
        assert_eq!(open(&l, &Facts::default()), [(10, 85)]);
    }

    #[test]
    fn a_registration_that_the_log_does_not_have_closes_between_two_bases() {
        let l = Line::new(&[
            record(0, 0, 10, Body::Init),
            record(1, 10, 10, base(&[(1, 10, 5)])),
            record(2, 10, 100, ship()),
            record(3, 100, 100, base(&[(1, 80, 6)])),
        ]);
        assert_eq!(open(&l, &Facts::default()), [(10, 10), (80, 100)]);
    }
}
