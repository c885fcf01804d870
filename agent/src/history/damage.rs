//! What of a tenant's rows no store has as it was written, and the positions that cannot be restored to because of it.
//!
//! A full or an incremental that was found damaged is passed over, and costs no position above the floor. For a
//! changeset, and for the rows that a base read, nothing else stands until a later full, base or incremental does. Who
//! asks for such a position is not refused: whether the object is what it was again, reading it says.

use super::History;
use super::line::Closed;
use crate::catalog::model::READ_BACK;
use crate::repository::ObjectRef;
use coffer_wire::Lsn;
use std::collections::BTreeSet;
use uuid::Uuid;

/// An object that no store has as it was written.
struct Lost<'a> {
    object: &'a ObjectRef,
    /// The first position that cannot do without it, …
    from: Lsn,
    /// … the first that could, …
    end: Lsn,
    /// … and the first that does.
    to: Option<Lsn>,
}

impl History {
    /// What is lost of a tenant's rows.
    fn lost(&self, tenant: Uuid) -> Vec<Lost<'_>> {
        let checks = self.catalogs.get(&tenant).map_or(&[][..], |c| &c.checks);
        let bad: BTreeSet<Uuid> = checks.iter().filter(|c| c.what == READ_BACK && !c.ok).map(|c| c.backup).collect();
        if bad.is_empty() {
            return Vec::new();
        }
        let is_bad = |o: &&ObjectRef| o.tenant == tenant && bad.contains(&o.object);
        let of_ships = self.line.ships.iter().flat_map(|s| {
            let objects = s.ship().objects.iter().filter(is_bad);
            objects.map(move |o| (Lsn(s.record.from_lsn.0 + 1), o.lsn_end.min(s.limit), o))
        });
        let of_bases = self.line.bases.iter().flat_map(|b| {
            let first = b.base().tables.iter().map(|t| t.cut_lsn).min();
            let objects = b.base().fulls.iter().filter(is_bad);
            objects.filter_map(move |o| Some((first?, Lsn(first?.0 + 1), o)))
        });
        of_ships
            .chain(of_bases)
            .map(|(from, end, object)| Lost { from, end, to: self.first_without(tenant, end, object.object), object })
            .collect()
    }

    /// The first position at which a new base would stand for what is lost of a tenant's rows, if nothing else does yet.
    pub fn wants_base_from(&self, tenant: Uuid) -> Option<Lsn> {
        self.lost(tenant).iter().filter(|l| l.to.is_none()).map(|l| l.end).max()
    }

    /// The spans that only damaged objects lead to, ascending and apart from one another.
    pub(super) fn damaged(&self, tenant: Uuid) -> Vec<Closed> {
        let closed = |l: &Lost<'_>| {
            let reason = format!("damaged: {}", l.object.path);
            Closed { from: l.from, to: l.to.unwrap_or(Lsn::MAX), reason }
        };
        let mut all: Vec<Closed> = self.lost(tenant).iter().map(closed).collect();
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

    /// The first position from `from` on that is restored to without reading an object: one where something begins that may
    /// stand for it.
    fn first_without(&self, tenant: Uuid, from: Lsn, object: Uuid) -> Option<Lsn> {
        let fulls = self.fulls(tenant).into_iter().map(|f| f.point_lsn);
        let incrementals = self.incrementals(tenant).into_iter().map(|i| i.to_lsn);
        let cuts = self.line.bases.iter().flat_map(|b| b.base().tables.iter().map(|t| t.cut_lsn));
        let mut all: Vec<Lsn> = fulls.chain(incrementals).chain(cuts).filter(|at| *at >= from).collect();
        all.sort();
        all.dedup();
        all.into_iter().find(|at| self.is_without(tenant, *at, object))
    }

    fn is_without(&self, tenant: Uuid, at: Lsn, object: Uuid) -> bool {
        let Ok(tables) = self.line.tables_at(at, &self.facts, Some(tenant), &|_| true) else { return false };
        let Some((read, _)) = self.sources(tenant, at, at, tables) else { return false };
        let fulls = read.fulls.iter().map(|(o, _)| o);
        !fulls.chain(read.ships.iter().filter_map(|s| s.changeset.as_ref())).any(|o| o.object == object)
    }
}

/// Spans without what is closed of them, both ends in.
pub(super) fn without(mut spans: Vec<(Lsn, Lsn)>, closed: &[Closed]) -> Vec<(Lsn, Lsn)> {
    for c in closed {
        let before = |(from, to): (Lsn, Lsn)| (from, to.min(Lsn(c.from.0.saturating_sub(1))));
        let after = |(from, to): (Lsn, Lsn)| (from.max(c.to), to);
        spans = spans.into_iter().flat_map(|s| [before(s), after(s)]).filter(|(from, to)| from <= to).collect();
    }
    spans
}
