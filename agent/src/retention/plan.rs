//! The verdicts. Each rule adds its reasons to the items that it keeps; what has none in the end goes.

use super::calendar::{Period, years_later};
use super::{Changes, Check, FUTURE_US, Full, Hold, Input, Reason, Rule, Trigger};
use crate::repository::ObjectRef;
use coffer_wire::Lsn;
use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

/// By how much a source's clock may step back unnoticed: a full that is used for a point is older by more than that.
const CLOCK_STEP_US: i64 = 1_000_000;

/// A window is longer by this part of it, or by what clocks may differ by.
const CLOCKS_SHARE: i64 = 100;

/// What is to become of an item of the input, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub keep: bool,
    /// Never empty.
    pub reasons: Vec<Reason>,
}

/// See [`plan`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In the order of the input's.
    pub fulls: Vec<Verdict>,
    pub changes: Vec<Verdict>,
    pub bases: Vec<Verdict>,
    /// Up to where changes of the log are gone when this is carried out.
    pub floor: Option<Lsn>,
    /// What nobody needs any more, by path.
    pub objects: Vec<ObjectRef>,
}

impl Plan {
    /// Whether nothing is to be removed.
    pub fn is_empty(&self) -> bool {
        self.fulls.iter().chain(&self.changes).chain(&self.bases).all(|v| v.keep)
    }

    /// Bytes that removing frees in each store.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|o| o.bytes).sum()
    }
}

/// Decides what is kept and what goes.
pub fn plan(input: &Input) -> Plan {
    let mut p = Planner {
        input,
        fulls: vec![Vec::new(); input.fulls.len()],
        changes: vec![Vec::new(); input.changes.len()],
        bases: vec![Vec::new(); input.bases.len()],
        floor: None,
    };
    p.future();
    p.window();
    p.periods();
    p.on_demand();
    p.last();
    p.holds();
    p.running();
    p.log();
    p.finish()
}

/// The reasons so far.
struct Planner<'a> {
    input: &'a Input,
    fulls: Vec<Vec<Reason>>,
    changes: Vec<Vec<Reason>>,
    bases: Vec<Vec<Reason>>,
    floor: Option<Lsn>,
}

impl Planner<'_> {
    fn is_future(&self, us: i64) -> bool {
        us > self.input.now_us.saturating_add(FUTURE_US)
    }

    /// The fulls that rules look at, with their indexes, newest first.
    fn newest_first(&self) -> Vec<(usize, &Full)> {
        let mut fulls: Vec<_> =
            self.input.fulls.iter().enumerate().filter(|(_, f)| !self.is_future(f.point_us)).collect();
        fulls.sort_by_key(|(_, f)| std::cmp::Reverse((f.point_us, f.point, f.id)));
        fulls
    }

    fn future(&mut self) {
        for (reasons, f) in self.fulls.iter_mut().zip(&self.input.fulls) {
            if f.point_us > self.input.now_us.saturating_add(FUTURE_US) {
                reasons.push(Reason::Future);
            }
        }
        for (reasons, c) in self.changes.iter_mut().zip(&self.input.changes) {
            if c.to_us > self.input.now_us.saturating_add(FUTURE_US) {
                reasons.push(Reason::Future);
            }
        }
    }

    /// The position of the full that points from `us` on are restored from; `None` when everything is needed for them.
    fn stands_for(&self, us: Option<i64>) -> Option<Lsn> {
        let us = us?.saturating_sub(CLOCK_STEP_US);
        let below = |f: &&Full| f.point_us <= us && f.point <= self.input.settled && !self.is_future(f.point_us);
        let good = |f: &&Full| f.check == Check::Verified && f.whole && below(f);
        self.input.fulls.iter().filter(good).max_by_key(|f| (f.point_us, f.point)).map(|f| f.point)
    }

    /// Keeps what points from `from` to `to` are restored from.
    fn span(&mut self, from: Option<i64>, to: Option<i64>, reason: &Reason) {
        let floor = self.stands_for(from);
        for (reasons, f) in self.fulls.iter_mut().zip(&self.input.fulls) {
            let from_here = floor.is_none_or(|floor| f.point >= floor);
            if from_here && to.is_none_or(|to| f.point_us <= to) {
                reasons.push(reason.clone());
            }
        }
        // Changes up to the first that reach beyond the end, that one included.
        let beyond = |c: &Changes| to.is_some_and(|to| c.to_us > to);
        let end = self.input.changes.iter().filter(|c| beyond(c)).map(|c| c.to).min();
        for (reasons, c) in self.changes.iter_mut().zip(&self.input.changes) {
            if floor.is_none_or(|floor| c.to > floor) && end.is_none_or(|end| c.from < end) {
                reasons.push(reason.clone());
            }
        }
    }

    fn window(&mut self) {
        self.span(Some(self.window_from()), None, &Reason::Window { pitr: self.input.policy.pitr });
    }

    fn window_from(&self) -> i64 {
        let pitr = micros(self.input.policy.pitr);
        // The source's clock, by which points have their times, may be behind ours by as much as clocks may differ.
        let clocks = FUTURE_US.min(pitr / CLOCKS_SHARE);
        self.input.now_us.saturating_sub(pitr).saturating_sub(clocks).min(self.input.settled_us)
    }

    fn periods(&mut self) {
        let p = &self.input.policy;
        let counts = [p.daily, p.weekly, p.monthly, p.annual];
        for (rule, asked) in Rule::ALL.into_iter().zip(counts) {
            for (i, reason) in self.of_rule(rule, asked) {
                self.fulls[i].push(reason);
            }
        }
    }

    /// What a rule keeps: walks the periods from the newest on and counts those with a verified full.
    fn of_rule(&self, rule: Rule, asked: u32) -> Vec<(usize, Reason)> {
        let mut kept = Vec::new();
        if asked == 0 {
            return kept;
        }
        let fulls = self.newest_first();
        let mut periods: BTreeMap<Period, Vec<(usize, &Full)>> = BTreeMap::new();
        for (i, f) in fulls.iter().copied().filter(|(_, f)| f.check.is_usable()) {
            periods.entry(Period::of(rule, f.point_us)).or_default().push((i, f));
        }
        let mut found = 0;
        for (period, of_period) in periods.iter().rev() {
            if found == asked {
                return kept;
            }
            // Newest first, so the first of the best is the last of the period.
            let best = |check| {
                of_period.iter().filter(|(_, f)| f.check == check).min_by_key(|(_, f)| (f.needs_log, standing(rule, f)))
            };
            let period = period.text(rule);
            if let Some((i, _)) = best(Check::Verified) {
                found += 1;
                kept.push((*i, Reason::Period { rule, period }));
            } else if let Some((i, _)) = best(Check::Unchecked) {
                kept.push((*i, Reason::Unverified { rule, period }));
            }
        }
        let oldest = |check| fulls.iter().rev().find(|(_, f)| f.check == check);
        if found < asked
            && let Some((i, _)) = oldest(Check::Verified).or_else(|| oldest(Check::Unchecked))
        {
            kept.push((*i, Reason::Oldest { rule, found, asked }));
        }
        kept
    }

    /// Kinds with a retention of their own.
    fn on_demand(&mut self) {
        let (policy, now_us) = (&self.input.policy, self.input.now_us);
        for (reasons, f) in self.fulls.iter_mut().zip(&self.input.fulls) {
            let until_us = match f.trigger {
                Trigger::Schedule | Trigger::Archive => continue,
                Trigger::Incident if !f.released => {
                    reasons.push(Reason::Incident);
                    continue;
                }
                Trigger::Manual | Trigger::PreMigration | Trigger::PreMaintenance | Trigger::Incident => {
                    f.point_us.saturating_add(micros(policy.on_demand))
                }
                Trigger::Compliance => years_later(f.point_us, policy.compliance_years),
            };
            if until_us > now_us {
                reasons.push(Reason::OnDemand { trigger: f.trigger, until_us });
            }
        }
    }

    fn last(&mut self) {
        let fulls = self.newest_first();
        let newest = |check| fulls.iter().find(|(_, f)| f.check == check).map(|(i, _)| *i);
        let last = newest(Check::Verified)
            .or_else(|| newest(Check::Unchecked))
            .or_else(|| newest(Check::Failed))
            .or_else(|| newest(Check::Abandoned));
        if let Some(i) = last {
            self.fulls[i].push(Reason::Last);
        }
    }

    fn holds(&mut self) {
        for h in &self.input.holds {
            self.span(h.from_us, h.to_us, &Reason::Held { hold: h.id, reason: h.reason.clone() });
        }
    }

    fn running(&mut self) {
        for r in self.input.running.iter().filter(|r| r.until_us > self.input.now_us) {
            let reason = Reason::Running { restore: r.id, until_us: r.until_us };
            self.fulls.iter_mut().chain(&mut self.changes).for_each(|reasons| reasons.push(reason.clone()));
        }
    }

    /// Changes of the log, and what bases hold, go below the floor only.
    fn log(&mut self) {
        let floor = self.log_floor();
        for (reasons, c) in self.changes.iter_mut().zip(&self.input.changes) {
            let named = c.objects.iter().any(|o| self.input.named_by_log.contains(&o.path));
            if named || c.kind == super::ChangesKind::Changeset && floor.is_none_or(|floor| c.to > floor) {
                reasons.push(Reason::Log);
            }
        }
        for (reasons, b) in self.bases.iter_mut().zip(&self.input.bases) {
            if floor.is_none_or(|floor| b.cut >= floor) {
                reasons.push(Reason::Log);
            }
        }
        // Whatever the spans are: nothing is below the floor but fulls, so the one that it stands at has to be there.
        self.stands(floor);
        self.floor = floor;
    }

    /// Keeps the full that changes of the log are restored from, whatever asks for it.
    fn stands(&mut self, floor: Option<Lsn>) {
        for (reasons, f) in self.fulls.iter_mut().zip(&self.input.fulls) {
            if floor == Some(f.point) && reasons.is_empty() {
                reasons.push(Reason::Floor);
            }
        }
    }

    /// The lowest of the positions that a span, or a full that does not stand alone, is restored from. It never goes back; a
    /// span that lies below it already has its fulls only.
    fn log_floor(&mut self) -> Option<Lsn> {
        let now = self.input.floor;
        if self.input.running.iter().any(|r| r.until_us > self.input.now_us) {
            return now;
        }
        let stands = now.and_then(|now| self.input.fulls.iter().filter(|f| f.point == now).map(|f| f.point_us).max());
        let end = |h: &Hold| h.to_us.map(|to| h.from_us.map_or(to, |from| from.max(to)));
        let holds = self.input.holds.iter().filter(|h| end(h).is_none_or(|to| stands.is_none_or(|at| to > at)));
        let mut lowest = self.stands_for(Some(self.window_from()));
        let input = self.input;
        let held: Vec<Option<Lsn>> = holds.map(|h| self.stands_for(h.from_us)).collect();
        for stands in held {
            self.stands(stands);
            lowest = lowest.min(stands);
        }
        let kept: Vec<&Full> =
            input.fulls.iter().zip(&self.fulls).filter(|(_, reasons)| !reasons.is_empty()).map(|(f, _)| f).collect();
        // At the floor itself a base of the same point is there still; a full that is damaged there has nothing to lean on.
        let at_floor = |f: &Full, now| f.point == now && f.check == Check::Verified;
        let reachable = |f: &Full| now.is_none_or(|now| f.point > now || at_floor(f, now));
        for f in kept.into_iter().filter(|f| f.leans_on_log() && reachable(f)) {
            let whole = input.fulls.iter().filter(|w| w.check == Check::Verified && w.whole && w.point <= f.point);
            let stands = whole.map(|w| w.point).max();
            self.stands(stands);
            lowest = lowest.min(stands);
        }
        // A span that nothing stands for needs all that there is.
        now.max(lowest)
    }

    fn finish(self) -> Plan {
        let pitr = self.input.policy.pitr;
        let verdict = |reasons: Vec<Reason>, check: Check| match reasons.is_empty() {
            false => Verdict { keep: true, reasons },
            true => {
                let why = match check {
                    Check::Failed => Reason::Damaged,
                    Check::Abandoned => Reason::Abandoned,
                    Check::Verified | Check::Unchecked => Reason::Expired { pitr },
                };
                Verdict { keep: false, reasons: vec![why] }
            }
        };
        let checks = self.input.fulls.iter().map(|f| f.check);
        let mut plan = Plan {
            fulls: self.fulls.into_iter().zip(checks).map(|(r, c)| verdict(r, c)).collect(),
            changes: self.changes.into_iter().map(|r| verdict(r, Check::Verified)).collect(),
            bases: self.bases.into_iter().map(|r| verdict(r, Check::Verified)).collect(),
            floor: self.floor,
            objects: Vec::new(),
        };
        plan.objects = unneeded(self.input, &plan);
        plan
    }
}

/// The objects of what goes that nothing needs that stays.
fn unneeded(input: &Input, plan: &Plan) -> Vec<ObjectRef> {
    let fulls = || input.fulls.iter().map(|f| &f.objects).zip(&plan.fulls);
    let changes = || input.changes.iter().map(|c| &c.objects).zip(&plan.changes);
    let bases =
        |keep: bool| input.bases.iter().zip(&plan.bases).filter(move |(_, v)| v.keep == keep).map(|(b, _)| &b.object);
    let of = |keep: bool| {
        fulls().chain(changes()).filter(move |(_, v)| v.keep == keep).flat_map(|(o, _)| o).chain(bases(keep))
    };
    let needed: HashSet<&str> = of(true).map(|o| o.path.as_str()).collect();
    let free = |o: &&ObjectRef| !needed.contains(o.path.as_str()) && !input.named_by_log.contains(&o.path);
    let gone: BTreeMap<&str, &ObjectRef> = of(false).filter(free).map(|o| (o.path.as_str(), o)).collect();
    gone.into_values().cloned().collect()
}

/// Who stands for a period when several could: for months and years an archive before others; a scheduled full before
/// one that somebody asked for and that has a retention of its own.
fn standing(rule: Rule, f: &Full) -> u8 {
    match f.trigger {
        Trigger::Archive if matches!(rule, Rule::Monthly | Rule::Annual) => 0,
        t if t.on_demand() => 2,
        _ => 1,
    }
}

fn micros(d: Duration) -> i64 {
    i64::try_from(d.as_micros()).unwrap_or(i64::MAX)
}
