//! Random lives of a source over simulated months: ships, bases, fulls, incrementals, holds, damages, losses, promotions, restores
//! that run, and prunings that die. After each pruning everything that was promised is asked for, and what a restore
//! would read has to be complete, and to be there.

use super::floor_tests::{draft, sealed, ship};
use super::tests::Life;
use super::*;
use crate::catalog::{Catalog, Entry, FullEntry, FullTable, IncrementalEntry};
use crate::compact::Spans;
use crate::crypto::{ObjectKind, random};
use crate::error::Error;
use crate::history::{Inputs, Target, When};
use crate::lease::Lease;
use crate::repository::model::{Base, BaseTable};
use crate::repository::{Body, Log, ObjectRef};
use crate::verify::listing::list;
use coffer_wire::Lsn;
use std::collections::BTreeSet;

const HOUR_US: i64 = 3_600 * 1_000_000;
const DAY_US: i64 = 24 * HOUR_US;
const STORES: [&str; 2] = ["a", "b"];
/// A life that is asked for by its seed is a long one.
const STEPS: (usize, usize) = (30, 70);
const LIVES: u64 = 2;

/// Numbers that a seed gives (xorshift64*, Vigna 2016).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What is asked for: a position, or a time.
type Asked = (Uuid, String);

struct World {
    life: Life,
    log: Log,
    dice: Dice,
    tenants: Vec<Uuid>,
    /// Objects that were lost by an accident.
    damaged: BTreeSet<String>,
    /// Those that come back, with what was in them.
    lost: Vec<(ObjectRef, Vec<u8>)>,
    timeline: u32,
    holds: Vec<(Uuid, Uuid)>,
    /// Tables that have a base.
    relids: BTreeSet<u32>,
    policy: Policy,
    /// How often a floor was raised, and what was promised and looked at.
    raised: usize,
    looked_at: usize,
    /// How often the log began with a newer checkpoint.
    shortened: usize,
    /// Nothing is held, and fulls are good: floors rise everywhere.
    is_calm: bool,
}

impl World {
    async fn begin(seed: u64, is_calm: bool) -> Self {
        let life = Life::begin(&[("a", true), ("b", true)]).await;
        let mut tenants = vec![life.tenant.uid];
        let keyring = life.repo.keyring().clone();
        tenants.push(keyring.ensure(life.source, &Tenant::normal("umbrella")).await.unwrap().uid);
        tenants.push(keyring.ensure(life.source, &Tenant::reserved(TenantKind::Shared)).await.unwrap().uid);
        let mut log = Log::open(&life.repo, life.source, None).await.unwrap();
        log.append(draft(0, 1000, life.now(), Body::Init)).await.unwrap();
        let policy = life.pruner().policy;
        let (damaged, lost, holds, relids) = Default::default();
        let dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let (raised, looked_at, shortened) = (0, 0, 0);
        let timeline = 1;
        let mut w = Self {
            life,
            log,
            dice,
            tenants,
            damaged,
            lost,
            timeline,
            holds,
            relids,
            policy,
            raised,
            looked_at,
            shortened,
            is_calm,
        };
        w.ship().await;
        w.base(&[1]).await;
        w
    }

    fn end(&self) -> u64 {
        self.log.upto_lsn().unwrap().0
    }

    async fn append(&mut self, from: u64, upto: u64, body: Body) {
        let mut d = draft(from, upto, self.life.now(), body);
        d.timeline = self.timeline;
        self.log.append(d).await.unwrap();
    }

    async fn ship(&mut self) {
        let (from, upto) = (self.end(), self.end() + 100);
        let mut objects = Vec::new();
        for t in self.tenants.clone() {
            if !self.dice.one_in(3) {
                objects.push(sealed(&self.life, ObjectKind::Changeset, t, from, upto).await);
            }
        }
        let common = sealed(&self.life, ObjectKind::Common, self.life.repo.uid(), from, upto).await;
        let body = ship(objects, Some(common), self.life.now());
        self.append(from, upto, body).await;
    }

    /// A base of these tables as of the log's end, or a bit before.
    async fn base(&mut self, relids: &[u32]) {
        let cut = Lsn(self.end() - self.dice.below(2) * 30);
        let mut fulls = Vec::new();
        for t in self.tenants.clone() {
            if !self.dice.one_in(4) {
                fulls.push(sealed(&self.life, ObjectKind::Full, t, 0, cut.0).await);
            }
        }
        let table = |relid: &u32| BaseTable {
            relid: *relid,
            name: format!("public.t{relid}"),
            cut_lsn: cut,
            registered_xid: 1,
            rows: 0,
            owner: None,
        };
        let tables = relids.iter().map(table).collect();
        let body = Body::Base(Base { job: random::uuid(), tables, cut_lsn: cut, fulls, ..Base::default() });
        self.append(self.end(), self.end(), body).await;
        self.relids.extend(relids);
    }

    async fn history(&self) -> History {
        let life = &self.life;
        let mut h = History::load(&life.repo, life.repo.keyring(), life.source, None).await.unwrap();
        h.load_catalogs().await.unwrap();
        h
    }

    async fn catalog(&self, tenant: Uuid) -> Catalog {
        Catalog::open(&self.life.repo, self.life.source, tenant, None).await.unwrap()
    }

    /// A full as compaction makes it; `late`: a base is recorded between its making and its own record.
    async fn full(&mut self, tenant: Uuid, late: bool) {
        let h = self.history().await;
        let (point_lsn, point_time_us) = h.end();
        let target = Target { asked: String::new(), lsn: point_lsn, time_us: point_time_us };
        let Ok(tables) = h.require(&target, tenant, &|_| true) else { return };
        let inputs = h.inputs(tenant, point_lsn, tables.clone()).await;
        let Ok(inputs) = inputs else { return };
        if let Err(e) = self.complete(&h, tenant, &inputs) {
            // Damage above the floor, where the changes are: no full until there is a base.
            assert!(!self.damaged.is_empty(), "{e}");
            return;
        }
        let log_n = h.records().last().unwrap().n;
        if late {
            let some = [*self.relids.first().unwrap()];
            self.base(&some).await;
        }
        let mut objects = vec![sealed(&self.life, ObjectKind::Full, tenant, 0, point_lsn.0).await];
        if self.dice.one_in(2) {
            objects.extend(inputs.full.iter().flat_map(|f| &f.objects).take(2).cloned());
        }
        let triggers = ["schedule", "schedule", "schedule", "manual", "archive", "incident"];
        let trigger = triggers[self.dice.below(if self.is_calm { 3 } else { 6 }) as usize];
        let f = FullEntry {
            id: random::uuid(),
            trigger: trigger.into(),
            reason: None,
            point_lsn,
            point_time_us,
            log_n,
            system_identifier: 1,
            timeline: self.timeline,
            tables: tables
                .iter()
                .map(|t| FullTable { relid: t.relid, name: t.name.clone(), class: None, rows: 1 })
                .collect(),
            objects,
            read_back_us: (self.is_calm || !self.dice.one_in(6)).then(|| self.life.now()),
            ..FullEntry::default()
        };
        self.catalog(tenant).await.append(Entry::Full(f)).await.unwrap();
    }

    async fn incremental(&mut self, tenant: Uuid) {
        let h = self.history().await;
        let Some((from_lsn, to, read)) = Spans::of(&h).reads(&h, tenant) else { return };
        if read.iter().any(|o| self.damaged.contains(&o.path)) {
            return;
        }
        for o in &read {
            self.must_be_there(o).unwrap_or_else(|e| panic!("an incremental from {from_lsn} reads what is gone: {e}"));
        }
        let object = sealed(&self.life, ObjectKind::Incremental, tenant, from_lsn.0, to.lsn.0).await;
        let i = IncrementalEntry {
            id: object.object,
            from_lsn,
            to_lsn: to.lsn,
            to_time_us: to.time_us,
            log_n: h.records().last().unwrap().n,
            object: Some(object),
            rows: 1,
            bytes: 100,
            read_back_us: None,
        };
        self.catalog(tenant).await.append(Entry::Incremental(i)).await.unwrap();
    }

    async fn hold(&mut self, tenant: Uuid) {
        let from_us = (!self.dice.one_in(6)).then(|| self.life.now() - self.dice.below(60) as i64 * DAY_US);
        let to_us =
            (!self.dice.one_in(4)).then(|| from_us.unwrap_or(self.life.now()) + self.dice.below(20) as i64 * DAY_US);
        let (id, by) = (random::uuid(), String::new());
        let entry = Entry::Hold { id, number: 0, reason: "case".into(), from_us, to_us, by, until_us: None };
        self.catalog(tenant).await.append(entry).await.unwrap();
        self.holds.push((tenant, id));
    }

    async fn release(&mut self) {
        if let Some((tenant, id)) = self.holds.pop() {
            self.catalog(tenant).await.append(Entry::Release { id, by: String::new() }).await.unwrap();
        }
        for tenant in self.tenants.clone() {
            let mut c = self.catalog(tenant).await;
            let incident = c.state().fulls.iter().find(|f| f.trigger == "incident").map(|f| f.id);
            if let Some(id) = incident {
                c.append(Entry::Release { id, by: String::new() }).await.unwrap();
            }
        }
    }

    /// The objects of a full get lost in all stores, and a scrub finds it.
    async fn damage(&mut self, tenant: Uuid) {
        let mut c = self.catalog(tenant).await;
        let fulls = c.state().fulls.clone();
        if fulls.is_empty() {
            return;
        }
        let lost = fulls[self.dice.below(fulls.len() as u64) as usize].objects[0].clone();
        for s in STORES {
            // It may have been lost before.
            let _ = std::fs::remove_file(self.life.world.path(&format!("{s}/{}", lost.path)));
        }
        self.damaged.insert(lost.path.clone());
        for f in fulls.iter().filter(|f| f.objects.iter().any(|o| o.path == lost.path)) {
            let (what, message) = ("read_back".to_owned(), None);
            c.append(Entry::Verified { backup: f.id, ok: false, what, message }).await.unwrap();
        }
    }

    /// A changeset or the rows of a base get lost in all stores for a while, and a scrub finds it.
    async fn lose(&mut self, tenant: Uuid) {
        let h = self.history().await;
        let of_rows = |o: &&ObjectRef| o.tenant == tenant && matches!(o.kind, ObjectKind::Changeset | ObjectKind::Full);
        let mut all: Vec<ObjectRef> = h.records().iter().flat_map(|r| r.objects()).filter(of_rows).cloned().collect();
        all.retain(|o| self.must_be_there(o).is_ok());
        if all.is_empty() {
            return;
        }
        let lost = all.swap_remove(self.dice.below(all.len() as u64) as usize);
        let bytes = std::fs::read(self.life.world.path(&format!("a/{}", lost.path))).unwrap();
        for s in STORES {
            std::fs::remove_file(self.life.world.path(&format!("{s}/{}", lost.path))).unwrap();
        }
        self.read_back(&lost, false).await;
        self.damaged.insert(lost.path.clone());
        self.lost.push((lost, bytes));
    }

    /// What was lost is there again.
    async fn find(&mut self) {
        for (o, bytes) in std::mem::take(&mut self.lost) {
            for s in STORES {
                std::fs::write(self.life.world.path(&format!("{s}/{}", o.path)), &bytes).unwrap();
            }
            self.read_back(&o, true).await;
            self.damaged.remove(&o.path);
        }
    }

    async fn read_back(&self, o: &ObjectRef, ok: bool) {
        let entry = Entry::Verified { backup: o.object, ok, what: "read_back".into(), message: None };
        self.catalog(o.tenant).await.append(entry).await.unwrap();
    }

    async fn promote(&mut self) {
        let at = self.end() - self.dice.below(500).min(self.end() - 1100);
        self.timeline += 1;
        let body = Body::Timeline { from: self.timeline - 1, to: self.timeline, at: Lsn(at) };
        self.append(at, at, body).await;
        let all: Vec<u32> = self.relids.iter().copied().collect();
        if self.dice.one_in(2) {
            self.ship().await;
        }
        self.ship().await;
        self.base(&all).await;
    }

    async fn step(&mut self) {
        self.life.pass_us(HOUR_US * (6 + self.dice.below(60) as i64));
        for _ in 0..1 + self.dice.below(3) {
            self.ship().await;
            self.life.pass_us(HOUR_US);
        }
        if self.dice.one_in(9) {
            let some = [&[1][..], &[2], &[1, 2]][self.dice.below(3) as usize];
            self.base(some).await;
        }
        if self.dice.one_in(25) {
            self.promote().await;
        }
        for t in self.tenants.clone() {
            if !self.dice.one_in(3) {
                self.incremental(t).await;
            }
            if !self.dice.one_in(3) {
                let late = self.dice.one_in(12);
                self.full(t, late).await;
            }
            if !self.is_calm && self.dice.one_in(25) {
                self.hold(t).await;
            }
            if self.dice.one_in(if self.is_calm { 60 } else { 20 }) {
                self.damage(t).await;
            }
            if self.dice.one_in(12) {
                self.lose(t).await;
            }
        }
        if self.dice.one_in(4) {
            self.find().await;
        }
        if self.dice.one_in(8) {
            self.release().await;
        }
        if !self.is_calm && self.dice.one_in(15) {
            let days = [0, 1, 5, 30];
            self.policy.pitr = Duration::from_secs(86_400 * days[self.dice.below(4) as usize]);
            self.policy.daily = self.dice.below(5) as u32;
            self.policy.monthly = self.dice.below(4) as u32;
        }
    }

    fn must_be_there(&self, o: &ObjectRef) -> Result<(), String> {
        match STORES.iter().find(|s| !self.life.is_there(s, o)) {
            Some(s) => Err(format!("{} is not in store {s}", o.path)),
            None => Ok(()),
        }
    }

    /// Whether what a tenant is merged from is everything that there was, and is there.
    fn complete(&self, h: &History, tenant: Uuid, i: &Inputs) -> Result<(), String> {
        let from_full = i.tables.iter().any(|t| t.base.is_none());
        for o in i.full.iter().filter(|_| from_full).flat_map(|f| &f.objects) {
            self.must_be_there(o)?;
        }
        for (o, _) in &i.fulls {
            self.must_be_there(o)?;
        }
        for t in &i.tables {
            let of_base = t.base.map(|b| h.line().bases[b].base());
            let parts = of_base.iter().flat_map(|b| &b.fulls).filter(|o| o.tenant == tenant);
            for part in parts {
                if !i.fulls.iter().any(|(o, relids)| o.path == part.path && relids.contains(&t.relid)) {
                    return Err(format!("{} is read by nobody", part.path));
                }
            }
            if t.base.is_none() && i.full.as_ref().is_none_or(|f| f.point_lsn != t.cut) {
                return Err(format!("table {} begins nowhere", t.relid));
            }
        }
        let read: BTreeSet<&str> = i.ships.iter().flat_map(|s| &s.changeset).map(|o| o.path.as_str()).collect();
        for o in i.ships.iter().flat_map(|s| s.common.iter().chain(&s.changeset)) {
            self.must_be_there(o)?;
        }
        let least = i.tables.iter().map(|t| t.cut).min().unwrap();
        let stand_ins: Vec<(Lsn, Lsn)> = h
            .catalog(tenant)
            .into_iter()
            .flat_map(|c| &c.incrementals)
            .filter(|x| x.object.as_ref().is_some_and(|o| read.contains(o.path.as_str())))
            .map(|x| (x.from_lsn, x.to_lsn))
            .collect();
        for s in &h.line().ships {
            let (from, upto) = (s.record.from_lsn, s.record.upto_lsn.min(s.limit));
            for o in s
                .ship()
                .objects
                .iter()
                .filter(|o| o.tenant == tenant && upto > least && from < i.target && least < i.target)
            {
                let within = |(f, t): &(Lsn, Lsn)| *f <= from && upto <= *t && *t <= i.target;
                if !read.contains(o.path.as_str()) && !stand_ins.iter().any(within) {
                    return Err(format!("{} is read by nobody", o.path));
                }
            }
        }
        Ok(())
    }

    /// What a restore would do: `Err`: it is refused, or fails for a damage that is known. One that would not be exact is a
    /// failure of the test.
    async fn restore(&mut self, h: &mut History, tenant: Uuid, when: &When) -> Result<Lsn> {
        let target = h.resolve(when).await?;
        let tables = h.require(&target, tenant, &|_| true)?;
        let inputs = h.inputs(tenant, target.lsn, tables).await?;
        self.looked_at += 1;
        if let Err(e) = self.complete(h, tenant, &inputs) {
            let known = self.damaged.iter().any(|d| e.contains(d.as_str()));
            assert!(known, "tenant {tenant} at {when} ({}): {e}", target.lsn);
            return Err(Error::other(e));
        }
        Ok(target.lsn)
    }

    /// Everything that could be asked for of one tenant, with the time of each.
    fn targets(&self, h: &History, tenant: Uuid) -> Vec<(When, i64)> {
        let mut all = Vec::new();
        for s in &h.line().ships {
            let us = s.record.upto_time_us;
            let upto = s.record.upto_lsn.min(s.limit);
            all.push((When::Lsn(upto), us));
            if upto.0 > s.record.from_lsn.0 + 60 {
                all.push((When::Lsn(Lsn(upto.0 - 50)), us));
            }
            // Commits are an hour apart at least.
            all.push((When::Time(us + HOUR_US / 2), us + HOUR_US / 2));
        }
        all.extend(h.fulls(tenant).into_iter().map(|f| (When::Backup(f.id), f.point_time_us)));
        all
    }

    /// What of everything can be restored now.
    async fn restorable(&mut self) -> BTreeMap<Asked, i64> {
        let mut all = BTreeMap::new();
        for tenant in self.tenants.clone() {
            let mut h = History::load(&self.life.repo, self.life.repo.keyring(), self.life.source, None).await.unwrap();
            h.load_catalog(tenant).await.unwrap();
            for (when, us) in self.targets(&h, tenant) {
                if self.restore(&mut h, tenant, &when).await.is_ok() {
                    all.insert((tenant, when.to_string()), us);
                }
            }
            self.windows_are_true(&mut h, tenant, &all).await;
        }
        all
    }

    /// What is shown as a window can be restored, and what is outside cannot, but for the points of fulls.
    async fn windows_are_true(&mut self, h: &mut History, tenant: Uuid, found: &BTreeMap<Asked, i64>) {
        let windows = h.windows(Some(tenant));
        let ends: Vec<Lsn> = windows.iter().flat_map(|w| [w.from_lsn, w.to_lsn]).collect();
        for lsn in ends {
            let done = self.restore(h, tenant, &When::Lsn(lsn)).await;
            assert!(done.is_ok(), "the window of {tenant} has {lsn}: {:?}", done.err().map(|e| e.to_string()));
        }
        let points: Vec<Lsn> = h.fulls(tenant).into_iter().map(|f| f.point_lsn).collect();
        for s in &h.line().ships {
            for lsn in [s.record.upto_lsn.min(s.limit), Lsn(s.record.upto_lsn.min(s.limit).0 - 50)] {
                let is_in = windows.iter().any(|w| w.from_lsn <= lsn && lsn <= w.to_lsn);
                let is_found = found.contains_key(&(tenant, When::Lsn(lsn).to_string()));
                if lsn.0 > s.record.from_lsn.0 + 10 {
                    assert!(is_in == is_found || is_found && points.contains(&lsn), "{tenant} {lsn}: {windows:?}");
                }
            }
        }
    }

    /// Whether a point has to be there still after a pruning, if it was before.
    async fn is_promised(&self, tenant: Uuid, when: &str, us: i64) -> bool {
        let c = self.catalog(tenant).await;
        let held = |h: &catalog::Hold| h.from_us.is_none_or(|f| f <= us) && h.to_us.is_none_or(|t| us <= t);
        let from = self.life.now() - i64::try_from(self.policy.pitr.as_micros()).unwrap();
        let kept = |f: &FullEntry| when == When::Backup(f.id).to_string();
        us >= from || c.state().holds.iter().any(held) || c.state().fulls.iter().any(kept)
    }

    async fn prune(&mut self) {
        let before = self.restorable().await;
        let floors: Vec<Option<Floor>> = self.floors().await;
        // Hours pass meanwhile, which no lease outlives here.
        let dies = self.dice.one_in(5);
        if dies {
            self.die_while_deleting().await;
        }
        let reading = match !dies && self.dice.one_in(6) {
            true => {
                let t = self.tenants[self.dice.below(3) as usize];
                Some((t, Lease::take(&self.life.repo, self.life.source, t).await.unwrap()))
            }
            false => None,
        };
        let grace = Duration::from_secs(86_400 * [0, 0, 3][self.dice.below(3) as usize]);
        let p = Pruner { policy: self.policy.clone(), grace, ..self.life.pruner() };
        let report = self.life.try_act(p).await.unwrap();
        for t in &report.tenants {
            assert!(t.error.is_none(), "{:?}", t.error);
        }
        let after = self.restorable().await;
        let now = self.floors().await;
        self.raised += floors.iter().zip(&now).filter(|(a, b)| a != b).count();
        assert!(floors.iter().zip(&now).all(|(a, b)| a.map(|f| f.lsn) <= b.map(|f| f.lsn)), "a floor went back");
        for ((tenant, when), us) in &before {
            let is_read = reading.as_ref().is_some_and(|(t, _)| t == tenant);
            let is_there = after.contains_key(&(*tenant, when.clone()));
            if !is_there && (is_read || self.is_promised(*tenant, when, *us).await) {
                let c = self.catalog(*tenant).await;
                for f in &c.state().fulls {
                    let check = c.state().read_back(f.id) == Some(false);
                    println!(
                        "{} {} n {} {} {:?} damaged {check}",
                        f.id, f.point_lsn, f.log_n, f.trigger, f.read_back_us
                    );
                }
                println!("{:?} holds {:?}", c.state().floor, c.state().holds);
                println!("{:?}", report.tenants.iter().find(|t| t.uid == *tenant));
                panic!("{tenant} cannot be restored to {when} any more");
            }
        }
        self.shared_goes_along(&after).await;
        if let Some((_, lease)) = reading {
            lease.release().await;
        }
        self.shorten().await;
        for store in STORES {
            let listed = list(&self.life.repo, (self.life.source, None), store, false).await.unwrap();
            for o in listed.objects.iter().filter(|o| !self.damaged.contains(&o.path)) {
                self.must_be_there(o).unwrap_or_else(|e| panic!("what a scrub expects: {e}"));
            }
        }
    }

    /// What can be asked for, and what the answer is.
    async fn answers(&mut self, asked: &[(Uuid, When)]) -> Vec<Option<Lsn>> {
        let mut all = Vec::new();
        let mut histories: BTreeMap<Uuid, History> = BTreeMap::new();
        for (tenant, when) in asked {
            if !histories.contains_key(tenant) {
                let life = &self.life;
                let mut h = History::load(&life.repo, life.repo.keyring(), life.source, None).await.unwrap();
                h.load_catalog(*tenant).await.unwrap();
                histories.insert(*tenant, h);
            }
            let h = histories.get_mut(tenant).expect("it was put there");
            all.push(self.restore(h, *tenant, when).await.ok());
        }
        all
    }

    /// With the floors as they are now: whatever is asked for, a log that begins with a checkpoint answers as it did before.
    async fn shorten(&mut self) {
        let before = self.history().await;
        let mut asked = Vec::new();
        for t in self.tenants.clone() {
            asked.extend(self.targets(&before, t).into_iter().map(|(when, _)| (t, when)));
        }
        let answers = self.answers(&asked).await;
        let windows = |h: &History| self.tenants.iter().map(|t| h.windows(Some(*t))).collect::<Vec<_>>();
        let shown = windows(&before);
        let p = self.life.pruner();
        let survey = p.survey(&p.tenants().await.unwrap()).await.unwrap();
        p.shorten_log(&survey).await.unwrap();
        let after = self.history().await;
        self.shortened += usize::from(after.begins() > before.begins());
        assert_eq!(shown, windows(&after), "windows");
        for (((tenant, when), a), b) in asked.iter().zip(&answers).zip(self.answers(&asked).await) {
            assert_eq!(*a, b, "{tenant} at {when}, now that the log begins at {}", after.begins());
        }
    }

    async fn floors(&self) -> Vec<Option<Floor>> {
        let mut all = Vec::new();
        for t in &self.tenants {
            all.push(self.catalog(*t).await.state().floor);
        }
        all
    }

    /// A process that was killed left some of what was due deleted, and no record of it.
    async fn die_while_deleting(&mut self) {
        for t in self.tenants.clone() {
            let p = Pruner { policy: self.policy.clone(), grace: Duration::from_secs(60), ..self.life.pruner() };
            self.life.try_act(p).await.unwrap();
            self.life.pass_us(HOUR_US);
            let c = self.catalog(t).await;
            let needed: BTreeSet<&str> = c.state().objects().map(|o| o.path.as_str()).collect();
            for o in c.state().removals.iter().flat_map(|r| &r.objects).filter(|o| !needed.contains(o.path.as_str())) {
                let store = STORES[self.dice.below(2) as usize];
                if self.dice.one_in(2) {
                    let _ = std::fs::remove_file(self.life.world.path(&format!("{store}/{}", o.path)));
                }
            }
        }
    }

    /// Wherever a tenant can be restored to, the shared tables can.
    async fn shared_goes_along(&mut self, found: &BTreeMap<Asked, i64>) {
        let mut h = self.history().await;
        let shared = self.tenants[2];
        for (_, when) in found.keys().filter(|(t, _)| *t != shared) {
            let when: When = when.parse().unwrap();
            let Ok(target) = h.resolve(&when).await else { continue };
            let done = self.restore(&mut h, shared, &When::Lsn(target.lsn)).await;
            // Damage to their own fulls is none of the floor's.
            let floor = h.catalog(shared).and_then(|c| c.floor);
            let is_above = floor.is_some_and(|f| h.line().goes_through(f.lsn, f.log_n) && f.lsn > target.lsn);
            let why = done.err().map(|e| e.to_string());
            assert!(why.is_none() || !is_above && !self.damaged.is_empty(), "shared tables at {when}: {why:?}");
        }
    }
}

async fn live(seed: u64, steps: usize) -> (usize, usize, usize) {
    let mut w = World::begin(seed, seed.is_multiple_of(2)).await;
    for n in 0..steps {
        w.step().await;
        if n % 3 == 2 {
            w.prune().await;
        }
    }
    (w.raised, w.looked_at, w.shortened)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_every_promised_point_stays() {
    let asked = std::env::var("COFFER_FLOOR_SEED");
    let (seeds, steps): (Vec<u64>, usize) = match &asked {
        Ok(s) => (vec![s.parse().unwrap()], STEPS.1),
        Err(_) => ((1..=LIVES).collect(), STEPS.0),
    };
    let mut shortened = 0;
    for seed in seeds {
        println!("seed {seed} (COFFER_FLOOR_SEED)");
        let (floors, looked_at, n) = live(seed, steps).await;
        println!("{floors} floors raised, {looked_at} restores looked at, {n} checkpoints");
        assert!(floors > 0, "in this life nothing was ever removed");
        shortened += n;
    }
    // One life alone may be too short for it.
    assert!(shortened > 0 || asked.is_ok(), "the log never began with a checkpoint");
}
