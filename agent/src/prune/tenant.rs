//! One tenant: its plan from its catalog, the record of what goes, and the deletions whose grace is over.

use super::orphans::needed;
use super::report::{Backup, Pending, Removed, TenantReport};
use super::{Orphan, Pruner, Survey};
use crate::catalog::{self, Catalog, Entry, Floor, Floors, FullEntry, State, model::Removal};
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::lease::Purpose;
use crate::repository::{ObjectRef, paths};
use crate::retention::{
    Changes, ChangesKind, Check, FUTURE_US, Full, Hold, Input, Plan, Policy, Reason, Running, Trigger, plan,
};
use coffer_wire::Lsn;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{HashMap, HashSet};
use uuid::Uuid;

/// Objects deleted at a time.
const PARALLEL: usize = 8;
/// How often a plan is made anew because somebody wrote to the catalog meanwhile.
const ATTEMPTS: usize = 5;

/// Who released a hold that nobody released.
const OVER: &str = "prune: its time is over";

/// What goes besides what the plan says.
struct More<'a> {
    orphans: &'a [Orphan],
    /// Where the tenant's floor is raised to.
    floor: Option<Floor>,
    /// Where that of what concerns all is raised to.
    commons: Option<(&'a Survey, Floor)>,
}

/// The code of the error that says that a survey is older than what a tenant's catalog tells.
pub(super) const PRUNED_SINCE: &str = "pruned_since";

impl Pruner {
    /// Plans one tenant and, if it is confirmed, acts.
    ///
    /// `commons`: up to where what concerns all is needed by nobody.
    pub(super) async fn tenant(
        &self,
        survey: &Survey,
        orphans: &[Orphan],
        commons: Option<Floor>,
        report: &mut TenantReport,
    ) -> Result<()> {
        let mut catalog = Catalog::open(&self.repo, self.source.1, report.uid, None).await?;
        let is_over = |h: &catalog::Hold| h.is_over(survey.now_us);
        report.over = catalog.state().holds.iter().filter(|h| is_over(h)).cloned().collect();
        for h in report.over.iter().filter(|_| self.confirm) {
            let (id, by) = (h.id, OVER.to_owned());
            catalog.append_if(Entry::Release { id, by }, |s| s.holds.iter().any(|h| h.id == id)).await?;
        }
        for _ in 0..ATTEMPTS {
            let mut state = catalog.state().clone();
            state.holds.retain(|h| !is_over(h));
            if state.floor.is_some_and(|f| f.log_n > survey.log.newest()) {
                return Err(Error::new(
                    Kind::Refused,
                    "somebody who knew more of the log has pruned it since it was read",
                )
                .code(PRUNED_SINCE)
                .hint("run `coffer prune` again"));
            }
            let input = self.input(survey, report.uid, &state)?;
            let plan = plan(&input);
            report.policy = Some(input.policy.clone());
            report.backups = backups(&state, &plan);
            let raised = self.raised(survey, report.uid, &state, (&input, &plan));
            (report.log_keep, report.log_remove) = log_sums(&input, &plan);
            if let Some(to) = commons {
                report.log_remove += sum(&survey.log.times_below(state.commons, to));
            }
            report.floor = raised.or(state.floor);
            report.locked = self.is_locked(&input, &plan, &state);
            report.pending = state.removals.iter().map(|r| self.pending(survey, report.uid, &state, r)).collect();
            let more = More { orphans, floor: raised, commons: commons.map(|to| (survey, to)) };
            let recorded = !self.confirm || self.record(&mut catalog, &input, &plan, &more, report).await?;
            if recorded {
                if self.confirm {
                    report.floor = catalog.state().floor;
                }
                return if self.confirm { self.carry_out(&mut catalog, survey, report).await } else { Ok(()) };
            }
        }
        Err(Error::other(format!("the catalog of tenant {} changes faster than it can be planned for", report.uid)))
    }

    /// What the planner is told.
    fn input(&self, survey: &Survey, tenant: Uuid, state: &State) -> Result<Input> {
        let policy = match &state.policy {
            Some(own) => Policy::parse(own, &self.policy)?,
            None => self.policy.clone(),
        };
        let incremental = |i: &crate::catalog::IncrementalEntry| Changes {
            id: i.id,
            kind: ChangesKind::Incremental,
            from: i.from_lsn,
            to: i.to_lsn,
            to_us: i.to_time_us,
            objects: i.object.iter().cloned().collect(),
        };
        let hold =
            |h: &crate::catalog::Hold| Hold { id: h.id, reason: h.reason.clone(), from_us: h.from_us, to_us: h.to_us };
        let grace_us = i64::try_from(self.grace.as_micros()).unwrap_or(i64::MAX);
        let (mut settled_us, mut settled) = (survey.now_us.saturating_sub(grace_us), Lsn::MAX);
        if let Some(since) = survey.writing_since_us {
            settled_us = settled_us.min(since.saturating_sub(FUTURE_US));
        }
        if tenant == self.shared() {
            // Every tenant's fulls are restored together with it.
            let (us, lsn) = survey.oldest.unwrap_or((i64::MIN, Lsn::ZERO));
            (settled_us, settled) = (settled_us.min(us), lsn);
        }
        // A floor on a timeline that was left: nothing more goes until the new one has come as far.
        let is_left = state.floor.is_some_and(|f| !survey.is_on_line(f));
        let (mut changes, bases) = match self.keeps_log(tenant) || is_left {
            true => Default::default(),
            false => survey.log.of(tenant, state.floor),
        };
        changes.extend(state.incrementals.iter().map(incremental));
        Ok(Input {
            now_us: survey.now_us,
            policy,
            fulls: state.fulls.iter().map(|f| full(f, state, survey, tenant)).collect(),
            changes,
            bases,
            floor: state.floor.map(|f| f.lsn),
            settled_us,
            settled,
            holds: state.holds.iter().map(hold).collect(),
            running: survey.restores_of(tenant).map(|h| Running { id: h.id, until_us: i64::MAX }).collect(),
            named_by_log: survey.log.others().clone(),
        })
    }

    /// The floor that the plan raises a tenant's to.
    fn raised(&self, survey: &Survey, tenant: Uuid, state: &State, (input, plan): (&Input, &Plan)) -> Option<Floor> {
        // Whatever goes is below a floor that says so, were it of records that came after the last one.
        let (_, goes) = log_sums(input, plan);
        let above = |lsn: &Lsn| state.floor.is_none_or(|f| *lsn > f.lsn || goes.objects > 0);
        let lsn = plan.floor.filter(above).filter(|_| !self.keeps_log(tenant))?;
        Some(Floor { lsn, log_n: survey.log.newest() })
    }

    /// Whether a running restore is all that keeps something.
    fn is_locked(&self, input: &Input, with: &Plan, state: &State) -> bool {
        if input.running.is_empty() {
            return false;
        }
        let without = plan(&Input { running: Vec::new(), ..input.clone() });
        without != *with && !without.is_empty() || state.removals.iter().any(|r| r.not_before_us <= input.now_us)
    }

    fn pending(&self, survey: &Survey, tenant: Uuid, state: &State, r: &Removal) -> Pending {
        let waits_for = if let Some(h) = survey.restores_of(tenant).next() {
            Some(format!("restore {} is running", h.id))
        } else {
            held_since(state, r).map(|h| format!("hold {h} was placed since"))
        };
        Pending {
            removal: r.n,
            backups: r.backups.len() as u64,
            objects: r.objects.len() as u64,
            bytes: r.objects.iter().map(|o| o.bytes).sum(),
            not_before_us: r.not_before_us,
            due: r.not_before_us <= survey.now_us && waits_for.is_none(),
            waits_for,
        }
    }

    /// Records what goes. False: somebody wrote to the catalog meanwhile, and the plan is to be made anew.
    async fn record(
        &self,
        catalog: &mut Catalog,
        input: &Input,
        plan: &Plan,
        more: &More<'_>,
        report: &mut TenantReport,
    ) -> Result<bool> {
        let gone = |b: &&Backup| !b.keep;
        let backups: Vec<Uuid> = report.backups.iter().filter(gone).map(|b| b.id).collect();
        let mut reasons: Vec<String> =
            report.backups.iter().filter(gone).flat_map(|b| &b.reasons).map(ToString::to_string).collect();
        let mut objects = plan.objects.clone();
        let of_log = input.changes.iter().zip(&plan.changes).filter(|(c, _)| c.kind == ChangesKind::Changeset);
        if of_log.map(|(_, v)| v).chain(&plan.bases).any(|v| !v.keep) {
            reasons.push(Reason::BelowFloor.to_string());
        }
        if input.running.is_empty() && !more.orphans.is_empty() {
            objects.extend(more.orphans.iter().map(Orphan::object));
            reasons.push("objects that no record names".into());
        }
        let mut commons = None;
        if let Some((survey, to)) = more.commons.filter(|_| input.running.is_empty()) {
            let times = survey.log.times_below(catalog.state().commons, to);
            if !times.is_empty() {
                objects.extend(times);
                reasons.push("times of transactions below every tenant's floor".into());
                commons = Some(to);
            }
        }
        objects.retain(|o| self.is_ours(report.uid, o));
        if backups.is_empty() && objects.is_empty() {
            return Ok(true);
        }
        reasons.sort();
        reasons.dedup();
        let grace_us = i64::try_from(self.grace.as_micros()).unwrap_or(i64::MAX);
        let planned = catalog.state().clone();
        let removed = Removed {
            backups: backups.len() as u64,
            objects: objects.len() as u64,
            bytes: objects.iter().map(|o| o.bytes).sum(),
        };
        // From now on, not from when the run began: between the two everybody else was planned for.
        let not_before_us = self.repo.clock().now_us().saturating_add(grace_us);
        let entry = Entry::Removal { backups, objects, not_before_us, reasons, floor: more.floor, commons };
        // Another backup, hold or policy may keep what this one thought was free.
        let recorded = catalog.append_if(entry, |state| *state == planned).await?;
        if recorded.is_some() {
            report.recorded = removed;
            failpoints::hit(failpoints::PRUNE_AFTER_RECORD)?;
        }
        Ok(recorded.is_some())
    }

    /// Deletes what removals name whose grace is over.
    async fn carry_out(&self, catalog: &mut Catalog, survey: &Survey, report: &mut TenantReport) -> Result<()> {
        // Somebody may have begun to read since the survey, or be making a full from what goes.
        let mut held = crate::lease::live(&self.repo, self.source.1).await?;
        held.retain(|h| h.tenant.is_none_or(|t| t == report.uid));
        if held.iter().any(|h| h.purpose == Purpose::Restore) {
            return Ok(());
        }
        let writing_since_us = held.iter().map(|h| h.since_us).min();
        catalog.refresh().await?;
        let due: Vec<Removal> = catalog.state().removals.clone();
        let mut unsupported: HashMap<u64, String> = HashMap::new();
        for removal in due {
            let state = catalog.state();
            let floors = Floors {
                tenants: state.floor.map(|f| (report.uid, f)).into_iter().collect(),
                commons: state.commons.filter(|_| report.uid == self.shared()),
            };
            if removal.not_before_us > self.repo.clock().now_us() || held_since(state, &removal).is_some() {
                continue;
            }
            // It began before the record, so it may count on what the record says is to go.
            if writing_since_us.is_some_and(|since| since < removal.at_us.saturating_add(FUTURE_US)) {
                continue;
            }
            let needed: HashSet<&str> = needed(state).map(|o| o.path.as_str()).collect();
            let free = |o: &&ObjectRef| {
                self.is_ours(report.uid, o)
                    && !needed.contains(o.path.as_str())
                    && !survey.log.expects(&o.path, &floors)
            };
            let objects: Vec<&ObjectRef> = removal.objects.iter().filter(free).collect();
            let of_log = objects.iter().any(|o| survey.log.names(&o.path));
            if of_log && let Some(why) = self.without_support(survey, report.uid, state).await? {
                tracing::warn!("changes of tenant {} below its floor are not deleted: {why}", report.uid);
                unsupported.insert(removal.n, why);
                continue;
            }
            let (bytes, count) = (objects.iter().map(|o| o.bytes).sum::<u64>(), objects.len() as u64);
            let each: Vec<_> = objects.into_iter().map(|o| self.delete(o.path.clone())).collect();
            let away: Vec<Vec<String>> = stream::iter(each).buffer_unordered(PARALLEL).try_collect().await?;
            report.deleted.objects += count;
            report.deleted.bytes += bytes;
            // A store that was away, or is not attached, may still have them: the removal stays until it answers.
            if away.iter().all(Vec::is_empty) {
                failpoints::hit(failpoints::PRUNE_BEFORE_REMOVED)?;
                let n = removal.n;
                catalog.append_if(Entry::Removed { removal: n }, |s| s.removals.iter().any(|r| r.n == n)).await?;
                report.deleted.backups += removal.backups.len() as u64;
            }
        }
        let state = catalog.state().clone();
        report.pending = state.removals.iter().map(|r| self.pending(survey, report.uid, &state, r)).collect();
        for p in &mut report.pending {
            if let Some(why) = unsupported.remove(&p.removal) {
                (p.due, p.waits_for) = (false, Some(why));
            }
        }
        Ok(())
    }

    /// Why changes below a tenant's floor are not to be deleted now: the full that it stands at is not what it was.
    async fn without_support(&self, survey: &Survey, tenant: Uuid, state: &State) -> Result<Option<String>> {
        let Some(floor) = state.floor else { return Ok(None) };
        let at = state.fulls.iter().filter(|f| f.point_lsn == floor.lsn);
        let mut sound = at.filter(|f| full(f, state, survey, tenant).check == Check::Verified);
        let Some(support) = sound.next() else {
            return Ok(Some(format!("no full at {} is known to be sound", floor.lsn)));
        };
        for store in self.repo.required_stores() {
            for o in support.needs() {
                let size = store.size(&o.path).await?;
                if size != Some(o.bytes) {
                    let found =
                        size.map_or_else(|| "is missing".to_owned(), |n| format!("has {n} bytes, not {}", o.bytes));
                    return Ok(Some(format!(
                        "object {} of full {} {found} in store {}",
                        o.path,
                        support.id,
                        store.name()
                    )));
                }
            }
        }
        Ok(None)
    }

    /// Deletes an object everywhere; the names of optional stores that did not answer.
    async fn delete(&self, path: String) -> Result<Vec<String>> {
        let away = self.repo.remove(&path).await?;
        failpoints::hit(failpoints::PRUNE_AFTER_DELETE)?;
        Ok(away)
    }

    /// Whether an object is one that this tenant's catalog may remove: in the tenant's folder and of a name of ours. The
    /// reserved tenant `shared` answers for what concerns all.
    fn is_ours(&self, tenant: Uuid, o: &ObjectRef) -> bool {
        let source = self.source.1;
        let within = |folder: String| o.path.strip_prefix(&folder).is_some_and(|rest| rest.starts_with('/'));
        let own = within(paths::tenant_dir(source, tenant));
        let common =
            tenant == self.shared() && (within(paths::commons_dir(source)) || within(paths::schemas_dir(source)));
        (own || common) && paths::parse_leaf(&o.path).is_some()
    }
}

/// A hold that was placed after a removal was recorded, which the numbers of their records say and no clock: it stops what
/// is not deleted yet.
fn held_since(state: &State, r: &Removal) -> Option<Uuid> {
    state.holds.iter().find(|h| h.n > r.n || (h.n == 0 && h.at_us >= r.at_us)).map(|h| h.id)
}

fn full(f: &FullEntry, state: &State, survey: &Survey, tenant: Uuid) -> Full {
    let check = match state.read_back(f.id).or_else(|| f.read_back_us.map(|_| true)) {
        _ if !survey.history.line().goes_through(f.point_lsn, f.log_n) => Check::Abandoned,
        Some(false) => Check::Failed,
        Some(true) => Check::Verified,
        None => Check::Unchecked,
    };
    let extent = survey.history.extent(tenant, f, &survey.cuts(f.point_lsn));
    Full {
        id: f.id,
        point: f.point_lsn,
        point_us: f.point_time_us,
        check,
        trigger: Trigger::parse(&f.trigger),
        released: state.released.contains(&f.id),
        whole: extent.is_whole,
        needs_log: !extent.stands_alone,
        objects: f.needs().cloned().collect(),
    }
}

/// The verdicts as a report has them.
fn backups(state: &State, plan: &Plan) -> Vec<Backup> {
    let fulls = state.fulls.iter().zip(&plan.fulls).map(|(f, v)| Backup {
        id: f.id,
        kind: f.kind(),
        trigger: Some(f.trigger.clone()),
        point: f.point_lsn,
        time_us: f.point_time_us,
        bytes: f.bytes,
        keep: v.keep,
        reasons: v.reasons.clone(),
    });
    // Changes of the log come first.
    let of_log = plan.changes.len() - state.incrementals.len();
    let incrementals = state.incrementals.iter().zip(&plan.changes[of_log..]).map(|(i, v)| Backup {
        id: i.id,
        kind: "incremental",
        trigger: None,
        point: i.to_lsn,
        time_us: i.to_time_us,
        bytes: i.bytes,
        keep: v.keep,
        reasons: v.reasons.clone(),
    });
    let mut all: Vec<Backup> = fulls.chain(incrementals).collect();
    all.sort_by_key(|b| (b.time_us, b.point, b.kind));
    all
}

/// What of the log stays and what goes: how many objects, how many bytes.
fn log_sums(input: &Input, plan: &Plan) -> (Removed, Removed) {
    let of = |keep: bool| {
        let changes = input.changes.iter().zip(&plan.changes);
        let changes = changes.filter(|(c, v)| c.kind == ChangesKind::Changeset && v.keep == keep);
        let bases = input.bases.iter().zip(&plan.bases).filter(|(_, v)| v.keep == keep);
        let objects = changes.flat_map(|(c, _)| &c.objects).chain(bases.map(|(b, _)| &b.object));
        objects.fold(Removed::default(), |s, o| Removed { objects: s.objects + 1, bytes: s.bytes + o.bytes, ..s })
    };
    (of(true), of(false))
}

fn sum(objects: &[ObjectRef]) -> Removed {
    Removed { backups: 0, objects: objects.len() as u64, bytes: objects.iter().map(|o| o.bytes).sum() }
}
