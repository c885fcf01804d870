//! Where a tenant's recovery window begins because retention removed what is older, and what is left before it: single
//! points, each with a full of its own.

use super::line::TableAt;
use super::{History, Target};
use crate::catalog::{Floor, FullEntry};
use crate::clock::rfc3339;
use crate::error::{Error, Kind};
use crate::repository::ObjectRef;
use coffer_wire::Lsn;
use std::collections::BTreeSet;
use uuid::Uuid;

/// What of a tenant's rows at its point a full has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Every table that is covered there and concerns the tenant, but those that begin there: nothing older is needed from
    /// there on.
    pub is_whole: bool,
    /// Every table whose rows are known there: nothing else is needed for its own point.
    pub stands_alone: bool,
}

/// A table, and where its newest base was cut: see [`History::cuts_at`].
pub type Cut = (u32, Option<(Lsn, u64)>);

impl History {
    /// The first position of the tenant's recovery window, where something before it was removed. From there on every
    /// change is there; before it only points that have a full can be restored to.
    pub fn floor(&self, tenant: Uuid) -> Option<Lsn> {
        let own = self.catalogs.get(&tenant).and_then(|c| c.floor).map(|f| {
            if self.line.goes_through(f.lsn, f.log_n) {
                self.sound_floor(tenant, f)
            } else {
                self.new_floor(tenant, f.log_n)
            }
        });
        let of_all = [self.commons, self.shared].into_iter().flatten();
        let of_all = of_all.filter(|f| self.line.goes_through(f.lsn, f.log_n)).map(|f| f.lsn).max();
        own.max(of_all)
    }

    /// The floor, or where everything is known again when the full that it stands at was found damaged since.
    fn sound_floor(&self, tenant: Uuid, floor: Floor) -> Lsn {
        let fulls = self.fulls(tenant);
        let mut sound = fulls.iter().filter(|f| f.point_lsn >= floor.lsn && self.is_sound(tenant, f.id));
        // At its own point the full was whole when it was recorded; of a later one that is to be asked.
        let stands =
            |f: &&&FullEntry| f.point_lsn == floor.lsn || self.extent(tenant, f, &self.cuts_at(f.point_lsn)).is_whole;
        let full = sound.find(stands).map(|f| f.point_lsn);
        if full == Some(floor.lsn) {
            return floor.lsn;
        }
        full.into_iter().chain(self.based_since(tenant, |t, _| t.cut >= floor.lsn)).min().unwrap_or(Lsn::MAX)
    }

    /// Where everything is known again when the full that the floor stood at is on a timeline that was left.
    fn new_floor(&self, tenant: Uuid, log_n: u64) -> Lsn {
        let is_new = |f: &&FullEntry| f.log_n > log_n && self.is_sound(tenant, f.id);
        let stands = |f: &&FullEntry| self.extent(tenant, f, &self.cuts_at(f.point_lsn)).is_whole;
        let full = self.fulls(tenant).into_iter().filter(is_new).find(stands).map(|f| f.point_lsn);
        let is_new = |_: &TableAt, record: Option<u64>| record.is_some_and(|n| n > log_n);
        full.into_iter().chain(self.based_since(tenant, is_new)).min().unwrap_or(Lsn::MAX)
    }

    /// The first cut of a base at which of every table that concerns a tenant `there` is true: of where its rows are known
    /// from, and of the number of that record; `None`: it was empty when it was registered.
    fn based_since(&self, tenant: Uuid, there: impl Fn(&TableAt, Option<u64>) -> bool) -> Option<Lsn> {
        let all_there = |at: &Lsn| {
            let tables = self.line.tables_at(*at, &self.facts, Some(tenant), &|_| true);
            let record = |t: &TableAt| t.base.map(|b| self.line.bases[b].record.n);
            tables.is_ok_and(|all| !all.is_empty() && all.iter().all(|t| there(t, record(t))))
        };
        self.line.bases.iter().map(|b| b.base().cut_lsn).filter(all_there).min()
    }

    /// Whether an object that record `n` names was removed with what is below the tenant's floor.
    pub(super) fn is_gone(&self, n: u64, o: &ObjectRef) -> bool {
        self.catalogs.get(&o.tenant).and_then(|c| c.floor).is_some_and(|f| f.covers(n, o))
    }

    /// Whether changes of the tenant between two positions were removed.
    pub(super) fn has_hole(&self, tenant: Uuid, after: Lsn, upto: Lsn) -> bool {
        if after >= upto {
            return false;
        }
        let reaches = |s: &&super::ShipAt| s.record.upto_lsn.min(s.limit) > after && s.record.from_lsn < upto;
        let between = self.line.ships.iter().filter(reaches);
        between
            .flat_map(|s| s.ship().objects.iter().map(move |o| (s, o)))
            .any(|(s, o)| o.tenant == tenant && o.lsn_end > after && (s.ship().joined || self.is_gone(s.record.n, o)))
    }

    /// The tables that are covered at a position, each with where its newest base was cut and the number of its record;
    /// `None`: its rows are not known there.
    pub fn cuts_at(&self, at: Lsn) -> Vec<Cut> {
        let record = |t: &TableAt| t.base.map_or(0, |b| self.line.bases[b].record.n);
        let known = |t: Vec<TableAt>| t.into_iter().map(|t| (t.relid, Some((t.cut, record(&t))))).collect::<Vec<_>>();
        match self.line.tables_at(at, &self.facts, None, &|_| true) {
            Ok(tables) => known(tables),
            Err(unknown) => {
                let closed: BTreeSet<u32> = unknown.into_iter().map(|(relid, _)| relid).collect();
                let mut all = known(self.line.tables_except(at, &self.facts, &closed));
                all.extend(closed.into_iter().map(|relid| (relid, None)));
                all
            }
        }
    }

    /// How much of the tenant a full has at its point. `cuts`: of its point, see [`Self::cuts_at`].
    pub fn extent(&self, tenant: Uuid, f: &FullEntry, cuts: &[Cut]) -> Extent {
        let held: BTreeSet<u32> = f.tables.iter().map(|t| t.relid).collect();
        let concerns = |relid: u32| self.line.concerns(relid, &self.facts, Some(tenant));
        // Of what was recorded after it was made it knows nothing.
        let has = |relid: u32, n: u64| n <= f.log_n && (held.contains(&relid) || self.is_left_out(tenant, f, relid));
        let mut extent = Extent { is_whole: true, stands_alone: true };
        for (relid, cut) in cuts.iter().filter(|(relid, _)| concerns(*relid)) {
            let known = cut.map(|(cut, n)| (has(*relid, n), cut >= f.point_lsn));
            extent.is_whole &= known.is_some_and(|(has, begins)| has || begins);
            extent.stands_alone &= known.is_none_or(|(has, _)| has);
        }
        extent
    }

    /// Whether a table that a full does not name was another tenant's alone when it was made: it had no rows of this one.
    pub(super) fn is_left_out(&self, tenant: Uuid, f: &FullEntry, relid: u32) -> bool {
        !self.line.concerned(relid, &self.facts, tenant, (f.point_lsn, f.log_n))
    }

    /// The full at exactly this time, below the floor of its tenant: there, times have no other meaning.
    pub(super) fn full_at_time(&self, us: i64) -> Option<&FullEntry> {
        let below = |t: Uuid| {
            let floor = self.floor(t).unwrap_or(Lsn::ZERO);
            self.fulls(t).into_iter().filter(move |f| f.point_lsn < floor && f.point_time_us == us)
        };
        let mut found = self.catalogs.keys().flat_map(|t| below(*t));
        let first = found.next()?;
        found.all(|f| f.point_lsn == first.point_lsn).then_some(first)
    }

    /// The error of a target below the floor.
    pub(super) fn below_floor(&self, target: &Target, tenant: Option<Uuid>) -> Error {
        let fulls = tenant.map(|t| self.fulls(t)).unwrap_or_default();
        let named = |f: &&FullEntry| format!("backup:{} ({}, {})", f.id, f.point_lsn, rfc3339(f.point_time_us));
        let before = fulls.iter().rfind(|f| f.point_lsn <= target.lsn);
        let after = fulls.iter().find(|f| f.point_lsn > target.lsn);
        let hint = match (before, after) {
            (Some(b), Some(a)) => format!("the fulls that are kept around it are {} and {}", named(b), named(a)),
            (Some(f), None) => format!("the full that is kept before it is {}", named(f)),
            (None, Some(f)) => format!("the first full that is kept after it is {}", named(f)),
            (None, None) => "choose a point inside the recovery window (`coffer list`)".to_owned(),
        };
        let asked = match target.asked == target.lsn.to_string() {
            true => target.asked.clone(),
            false => format!("{} ({})", target.asked, target.lsn),
        };
        let begins = tenant.and_then(|t| self.floor(t)).or(self.commons.map(|f| f.lsn)).unwrap_or_default();
        let recorded = tenant.and_then(|t| self.catalogs.get(&t)).and_then(|c| c.floor).map(|f| f.lsn);
        let why = match recorded {
            _ if begins == Lsn::MAX => "and no full or base since is sound: nothing is, until the next full".to_owned(),
            Some(at) if at < begins => {
                format!("and the full at {at} is of no use any more: the next one is at {begins}")
            }
            _ => format!("the recovery window begins at {begins}"),
        };
        Error::new(
            Kind::OutsideWindow,
            format!(
                "{asked} cannot be restored to: older changes were removed, as retention keeps them no more; {why}"
            ),
        )
        .code("removed")
        .window(self.windows(tenant))
        .hint(hint)
    }

    /// The tenant whose catalog was taken in, if it is one only.
    pub(super) fn only_tenant(&self) -> Option<Uuid> {
        let mut all = self.catalogs.keys();
        all.next().copied().filter(|_| all.next().is_none())
    }
}
