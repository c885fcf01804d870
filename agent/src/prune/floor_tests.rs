//! Floors over local directories: a log with a base and a ship a day, fulls, and what pruning leaves to be restored.

use super::tests::Life;
use super::*;
use crate::catalog::{Catalog, Entry, FullEntry, FullTable};
use crate::crypto::{Codec, Header, KeySource, ObjectKind, random};
use crate::error::Error;
use crate::history::When;
use crate::repository::model::{Base, BaseTable, Ship, TxnEntry, TxnIndex};
use crate::repository::{Body, Draft, Log, ObjectRef, paths};
use crate::restore::undo;
use coffer_wire::Lsn;
use std::io::Write;
use tokio::runtime::Handle;

const DAYS: usize = 10;

/// A life with a log: a base at 50, a ship of a hundred positions each day, a full at the end of each.
struct Days {
    life: Life,
    log: Log,
    base: ObjectRef,
    commons: Vec<ObjectRef>,
    changes: Vec<ObjectRef>,
    fulls: Vec<FullEntry>,
}

impl Days {
    async fn new(stores: &[(&str, bool)]) -> Self {
        let life = Life::begin(stores).await;
        let mut log = Log::open(&life.repo, life.source, None).await.unwrap();
        log.append(draft(0, 10, 0, Body::Init)).await.unwrap();
        let base = sealed(&life, ObjectKind::Full, life.tenant.uid, 10, 50).await;
        log.append(draft(10, 60, 0, ship(Vec::new(), None, 0))).await.unwrap();
        log.append(draft(60, 60, 0, based(1, 50, vec![base.clone()]))).await.unwrap();
        log.append(draft(60, 100, 0, ship(Vec::new(), None, 0))).await.unwrap();
        Self { life, log, base, commons: Vec::new(), changes: Vec::new(), fulls: Vec::new() }
    }

    /// Ten days with a full of this table each.
    async fn live(&mut self, relid: u32) {
        for _ in 0..DAYS {
            self.day().await;
            let f = self.full(self.life.tenant.uid, relid).await;
            self.fulls.push(f);
        }
        self.life.pass(1);
    }

    async fn day(&mut self) {
        let from = self.log.upto_lsn().unwrap().0;
        self.life.pass(1);
        let us = self.life.now();
        let common = sealed(&self.life, ObjectKind::Common, self.life.repo.uid(), from, from + 100).await;
        let change = sealed(&self.life, ObjectKind::Changeset, self.life.tenant.uid, from, from + 100).await;
        let body = ship(vec![change.clone()], Some(common.clone()), us);
        self.log.append(draft(from, from + 100, us, body)).await.unwrap();
        self.commons.push(common);
        self.changes.push(change);
    }

    /// A verified full as of the log's end.
    async fn full(&self, tenant: Uuid, relid: u32) -> FullEntry {
        self.full_at(tenant, relid, self.log.upto_lsn().unwrap(), "schedule").await
    }

    async fn full_at(&self, tenant: Uuid, relid: u32, end: Lsn, trigger: &str) -> FullEntry {
        let f = FullEntry {
            id: random::uuid(),
            trigger: trigger.into(),
            reason: None,
            point_lsn: end,
            point_time_us: self.life.now(),
            log_n: self.log.last().unwrap().n,
            system_identifier: 1,
            timeline: 1,
            tables: vec![FullTable { relid, name: format!("public.t{relid}"), class: None, rows: 1 }],
            manifest: None,
            objects: vec![sealed(&self.life, ObjectKind::Full, tenant, 0, end.0).await],
            schema: None,
            roles: None,
            sequences: Vec::new(),
            database: None,
            rows: 1,
            bytes: 10,
            read_back_us: Some(self.life.now()),
            archive: Vec::new(),
        };
        let mut c = Catalog::open(&self.life.repo, self.life.source, tenant, None).await.unwrap();
        c.append(Entry::Full(f.clone())).await.unwrap();
        f
    }

    async fn history(&self) -> History {
        let mut h = History::load(&self.life.repo, self.life.repo.keyring(), self.life.source, None).await.unwrap();
        h.load_catalog(self.life.tenant.uid).await.unwrap();
        h
    }

    fn there(&self, objects: &[ObjectRef]) -> Vec<bool> {
        objects.iter().map(|o| self.life.is_there("a", o)).collect()
    }

    /// What a restore to a position does: where it is read from, or why it is refused.
    async fn restore(&self, when: When) -> Result<(Option<Uuid>, usize)> {
        let h = self.history().await;
        let target = h.resolve(&when).await?;
        let tables = h.require(&target, self.life.tenant.uid, &|_| true)?;
        let inputs = h.inputs(self.life.tenant.uid, target.lsn, tables).await?;
        Ok((inputs.full.map(|f| f.id), inputs.ships.len()))
    }

    async fn refused(&self, when: When) -> Error {
        let e = self.restore(when).await.unwrap_err();
        assert!(e.kind() == Kind::OutsideWindow && e.is_code("removed"), "{e}");
        e
    }

    async fn floor(&self) -> Option<Lsn> {
        self.life.catalog().await.state().floor.map(|f| f.lsn)
    }
}

/// What an error advises.
fn hint(e: &Error) -> String {
    e.to_json()["error"]["hint"].to_string()
}

pub(super) fn draft(from: u64, upto: u64, us: i64, body: Body) -> Draft {
    let (from_lsn, upto_lsn) = (Lsn(from), Lsn(upto));
    Draft { system_identifier: 1, timeline: 1, slot: "s".into(), from_lsn, upto_lsn, upto_time_us: us, body }
}

pub(super) fn ship(objects: Vec<ObjectRef>, common: Option<ObjectRef>, us: i64) -> Body {
    let eventful = Some(false);
    let (max_commit_us, min_commit_us) = (us, Some(us));
    let (first_commit_us, last_commit_us) = (us, us);
    let txns = u64::from(common.is_some());
    Body::Ship(Ship {
        txns,
        objects,
        common,
        eventful,
        max_commit_us,
        min_commit_us,
        first_commit_us,
        last_commit_us,
        ..Ship::default()
    })
}

fn based(relid: u32, cut: u64, fulls: Vec<ObjectRef>) -> Body {
    owned(relid, cut, None, fulls)
}

fn owned(relid: u32, cut: u64, owner: Option<Uuid>, fulls: Vec<ObjectRef>) -> Body {
    let name = format!("public.t{relid}");
    let table = BaseTable { relid, name, cut_lsn: Lsn(cut), registered_xid: 1, rows: 0, owner };
    Body::Base(Base { job: random::uuid(), tables: vec![table], cut_lsn: Lsn(cut), fulls, ..Base::default() })
}

/// An object as a ship, a base or a compaction writes it; a common has one transaction, at its end.
pub(super) async fn sealed(life: &Life, kind: ObjectKind, tenant: Uuid, from: u64, upto: u64) -> ObjectRef {
    let (repo, source, rt) = (life.repo.clone(), life.source, Handle::current());
    let commit_us = life.now();
    let key = match kind {
        ObjectKind::Common => repo.keyring().repository_key(),
        _ => repo.keyring().key(repo.keyring().by_uid(tenant).unwrap().key_id()).unwrap(),
    };
    let header = Header {
        kind,
        codec: Codec::Lz4,
        tenant,
        object: random::uuid(),
        source,
        system_identifier: 1,
        timeline: 1,
        lsn_start: Lsn(from),
        lsn_end: Lsn(upto),
        key_version: key.id.version,
    };
    let path = match kind {
        ObjectKind::Common => paths::common(source, Lsn(upto), header.object),
        ObjectKind::Changeset => paths::changeset(source, tenant, Lsn(upto), header.object),
        _ => paths::full(source, tenant, Lsn(upto), header.object),
    };
    let mut plain = vec![0; 100];
    if kind == ObjectKind::Common {
        plain.clear();
        TxnIndex { entries: vec![TxnEntry { end_lsn: Lsn(upto), commit_us, xid: upto }] }.encode(&mut plain);
    }
    let put = move || {
        repo.seal_to(rt, path, &header, &key, |s| {
            s.write_all(&plain).unwrap();
            Ok(1)
        })
    };
    tokio::task::spawn_blocking(put).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn below_the_floor_changes_go_and_fulls_stay_as_single_points() {
    let mut d = Days::new(&[("a", true), ("b", true), ("c", false)]).await;
    let umbrella = d.life.repo.keyring().ensure(d.life.source, &Tenant::normal("umbrella")).await.unwrap();
    let theirs = sealed(&d.life, ObjectKind::Changeset, umbrella.uid, 100, 150).await;
    d.log.append(draft(100, 150, 0, ship(vec![theirs.clone()], None, 0))).await.unwrap();
    d.live(1).await;
    // Two days, and a clock's step: the full of the eighth day stands at the window's start.
    let t = d.life.act(d.life.pruner()).await;
    let floor = d.fulls[7].point_lsn;
    assert_eq!((d.floor().await, t.floor.map(|f| f.lsn)), (Some(floor), Some(floor)));
    assert_eq!((t.log_remove.objects, t.log_keep.objects), (9, 2));
    assert_eq!(d.there(&d.changes), [&[false; 8][..], &[true; 2]].concat());
    assert!(!d.life.is_there("a", &d.base) && !d.life.is_there("b", &d.changes[0]));
    // A tenant that never had a full keeps everything, and with it the times of all.
    assert!(d.life.is_there("a", &theirs) && d.there(&d.commons).iter().all(|t| *t));

    let h = d.history().await;
    assert_eq!(h.windows(Some(d.life.tenant.uid))[0].from_lsn, floor);
    assert!(h.bases(d.life.tenant.uid).is_empty());
    assert_eq!(d.restore(When::Lsn(floor)).await.unwrap(), (Some(d.fulls[7].id), 0));
    assert_eq!(d.restore(When::Lsn(Lsn(floor.0 + 1))).await.unwrap(), (Some(d.fulls[7].id), 1));
    assert_eq!(d.restore(When::Latest).await.unwrap(), (Some(d.fulls[9].id), 0));
    let e = d.refused(When::Lsn(Lsn(floor.0 - 1))).await;
    assert!(hint(&e).contains(&d.fulls[7].id.to_string()) && !e.to_json()["error"]["window"].is_null(), "{e}");

    // A store that comes anew gets what there is, and misses nothing that was removed.
    d.life.repo.replicate_to("c", d.life.source).await.unwrap();
    assert!(d.life.is_there("c", &d.changes[9]) && !d.life.is_there("c", &d.changes[0]));
    let again = d.life.act(d.life.pruner()).await;
    assert_eq!((again.recorded, again.log_remove.objects), (Default::default(), 0));

    // When everybody has a floor, times of transactions go, too.
    d.full(umbrella.uid, 1).await;
    for _ in 0..3 {
        d.day().await;
        d.full(d.life.tenant.uid, 1).await;
    }
    let last = d.life.now();
    d.life.pass(1);
    d.life.try_act(d.life.pruner()).await.unwrap();
    assert!(!d.life.is_there("a", &theirs));
    assert_eq!(d.there(&d.commons), [&[false; 10][..], &[true; 3]].concat());
    d.restore(When::Lsn(Lsn(d.floor().await.unwrap().0 + 1))).await.unwrap();
    let e = d.refused(When::Time(d.fulls[9].point_time_us - 1)).await;
    assert!(e.to_string().contains("were removed"), "{e}");
    assert_eq!(d.restore(When::Time(last)).await.unwrap().1, 0);
    // What is missing above the floors is a loss still.
    std::fs::remove_file(d.life.world.path(&format!("a/{}", d.changes[12].path))).unwrap();
    std::fs::remove_file(d.life.world.path(&format!("b/{}", d.changes[12].path))).unwrap();
    assert!(d.life.repo.replicate_to("c", d.life.source).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn fulls_below_the_floor_are_restored_from_at_their_points_and_between_two_both_are_named() {
    let mut d = Days::new(&[("a", true)]).await;
    d.live(1).await;
    let weekly = || Pruner { policy: Policy { daily: 6, ..d.life.pruner().policy }, ..d.life.pruner() };
    d.life.act(weekly()).await;
    assert_eq!(d.floor().await, Some(d.fulls[7].point_lsn));
    for f in &d.fulls[4..7] {
        assert_eq!(d.restore(When::Backup(f.id)).await.unwrap(), (Some(f.id), 0));
        assert_eq!(d.restore(When::Lsn(f.point_lsn)).await.unwrap(), (Some(f.id), 0));
        assert_eq!(d.restore(When::Time(f.point_time_us)).await.unwrap(), (Some(f.id), 0));
        let e = d.refused(When::Lsn(Lsn(f.point_lsn.0 + 1))).await;
        assert!(hint(&e).contains(&f.id.to_string()) && hint(&e).contains(" and backup:"), "{e}");
    }
    d.refused(When::Backup(d.fulls[3].id)).await;
    d.refused(When::Lsn(Lsn(60))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_no_full_holds_keeps_its_base_and_all_changes() {
    let mut d = Days::new(&[("a", true)]).await;
    d.live(2).await;
    d.life.act(d.life.pruner()).await;
    assert_eq!(d.floor().await, None);
    assert!(d.there(&d.changes).iter().all(|t| *t) && d.life.is_there("a", &d.base));
    assert_eq!(d.restore(When::Lsn(Lsn(70))).await.unwrap(), (None, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_another_tenants_alone_is_missed_in_no_full() {
    let mut d = Days::new(&[("a", true)]).await;
    let (me, umbrella) = (d.life.tenant.uid, Uuid::from_u128(7));
    let part = sealed(&d.life, ObjectKind::Full, me, 60, 100).await;
    d.log.append(draft(100, 100, 0, owned(2, 100, Some(umbrella), vec![part.clone()]))).await.unwrap();
    d.live(1).await;
    d.life.act(d.life.pruner()).await;
    let floor = d.fulls[7].point_lsn;
    assert!(d.floor().await == Some(floor) && !d.life.is_there("a", &part));
    // Who reads the shared tables does not say which tables those are.
    let h = d.history().await;
    let end = h.resolve(&When::Latest).await.unwrap();
    let inputs = h.inputs(me, end.lsn, h.known(&end)).await.unwrap();
    assert_eq!(inputs.full.map(|f| f.id), Some(d.fulls[9].id));
    // It becomes everybody's, from a new base on.
    let end = d.log.upto_lsn().unwrap().0;
    d.log.append(draft(end, end, d.life.now(), owned(2, end, None, Vec::new()))).await.unwrap();
    d.day().await;
    assert_eq!(d.history().await.windows(Some(me))[0].from_lsn, floor);
    for (at, from) in [(floor.0, 7), (floor.0 + 1, 7), (d.fulls[8].point_lsn.0 + 1, 8), (end + 1, 9)] {
        let (full, _) = d.restore(When::Lsn(Lsn(at))).await.unwrap();
        assert_eq!(full, Some(d.fulls[from].id), "at {at}");
    }
    d.life.pass(5);
    d.life.act(d.life.pruner()).await;
    assert_eq!(d.floor().await, Some(d.fulls[9].point_lsn));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_floor_on_a_timeline_that_was_left_stands_for_nothing_and_takes_nothing_of_the_new_one() {
    let mut d = Days::new(&[("a", true)]).await;
    d.live(1).await;
    d.life.act(d.life.pruner()).await;
    let floor = d.fulls[7].point_lsn;
    assert_eq!(d.floor().await, Some(floor));
    let at = Lsn(floor.0 - 50);
    let from_end = d.log.upto_lsn().unwrap();
    d.log.append(draft(at.0, at.0, d.life.now(), Body::Timeline { from: 1, to: 2, at })).await.unwrap();
    assert!(from_end > at);
    let change = sealed(&d.life, ObjectKind::Changeset, d.life.tenant.uid, at.0, at.0 + 20).await;
    let us = d.life.now();
    d.log.append(draft(at.0, at.0 + 20, us, ship(vec![change.clone()], None, us))).await.unwrap();
    // Nothing reaches there: the base and the changes are gone, and the full was of the other timeline.
    let h = d.history().await;
    assert_eq!(h.windows(Some(d.life.tenant.uid)).len(), 0);
    d.refused(When::Latest).await;
    // A new base does.
    let base = sealed(&d.life, ObjectKind::Full, d.life.tenant.uid, at.0, at.0 + 10).await;
    d.log.append(draft(at.0 + 20, at.0 + 20, us, based(1, at.0 + 10, vec![base.clone()]))).await.unwrap();
    assert_eq!(d.history().await.windows(Some(d.life.tenant.uid))[0].from_lsn, Lsn(at.0 + 10));
    assert_eq!(d.restore(When::Latest).await.unwrap(), (None, 1));
    d.full(d.life.tenant.uid, 1).await;
    d.life.pass(5);
    d.life.act(d.life.pruner()).await;
    assert!(d.life.is_there("a", &change) && d.life.is_there("a", &base));
    d.restore(When::Lsn(Lsn(at.0 + 10))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_floor_rises_again_when_what_an_undo_needs_was_held_for_a_month() {
    let mut d = Days::new(&[("a", true)]).await;
    let (tenant, id) = (d.life.tenant.uid, random::uuid());
    for _ in 0..5 {
        d.day().await;
        d.fulls.push(d.full(tenant, 1).await);
    }
    d.life.pass_us(3_600_000_000);
    let incident = d.full_at(tenant, 1, d.log.upto_lsn().unwrap(), "incident").await;
    let held = undo::hold(&d.life.repo, d.life.source, tenant, &id.to_string(), "ann").await.unwrap();
    assert_eq!(held, Some(d.life.now() + 30 * 86_400_000_000));
    d.live(1).await;
    d.life.pass(18);
    let t = d.life.act(d.life.pruner()).await;
    assert!(t.over.is_empty() && d.floor().await == Some(d.fulls[4].point_lsn), "{t:?}");
    d.life.pass(2);
    let t = d.life.pruner().run_unchecked().await.unwrap().tenants.into_iter().find(|t| t.uid == tenant).unwrap();
    assert!(t.over.len() == 1 && t.log_remove.objects > 0 && !d.life.catalog().await.state().holds.is_empty(), "{t:?}");
    let t = d.life.act(d.life.pruner()).await;
    assert_eq!((t.over[0].id, d.floor().await), (id, d.fulls.last().map(|f| f.point_lsn)));
    // It was nobody who released anything: an incident that it happened to cover stays.
    let state = d.life.catalog().await.state().clone();
    assert!(state.holds.is_empty() && state.released.is_empty() && state.full(incident.id).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_back_below_the_floor_is_left_over_and_what_is_beyond_the_end_is_not() {
    let mut d = Days::new(&[("a", true)]).await;
    d.live(1).await;
    let path = d.life.world.path(&format!("a/{}", d.changes[0].path));
    let bytes = std::fs::read(&path).unwrap();
    d.life.act(d.life.pruner()).await;
    assert!(!path.exists());
    std::fs::write(&path, bytes).unwrap();
    let end = d.log.upto_lsn().unwrap().0;
    let coming = sealed(&d.life, ObjectKind::Changeset, d.life.tenant.uid, end, end + 1).await;
    d.life.pass(2);
    let report = d.life.try_act(d.life.pruner()).await.unwrap();
    assert_eq!(report.orphans.iter().map(|o| &o.path).collect::<Vec<_>>(), [&d.changes[0].path]);
    assert!(!path.exists() && d.life.is_there("a", &coming));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_floor_whose_full_was_found_damaged_is_the_next_fulls() {
    let mut d = Days::new(&[("a", true)]).await;
    d.live(1).await;
    d.life.act(d.life.pruner()).await;
    let (floor, next) = (d.fulls[7].point_lsn, d.fulls[8].point_lsn);
    let (backup, what) = (d.fulls[7].id, "read_back".to_owned());
    d.life.catalog().await.append(Entry::Verified { backup, ok: false, what, message: None }).await.unwrap();
    assert_eq!(d.history().await.windows(Some(d.life.tenant.uid))[0].from_lsn, next);
    for lsn in [floor, Lsn(floor.0 + 1), Lsn(next.0 - 1)] {
        let e = d.refused(When::Lsn(lsn)).await;
        assert!(e.to_string().contains(&next.to_string()), "{e}");
    }
    assert_eq!(d.restore(When::Lsn(Lsn(next.0 + 1))).await.unwrap(), (Some(d.fulls[8].id), 1));
    // It stands for nothing, and stays where it is the floor.
    d.life.act(d.life.pruner()).await;
    assert_eq!(d.floor().await, Some(floor));
    assert!(d.life.catalog().await.state().full(backup).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_damaged_object_leads_to_is_a_gap_and_no_window() {
    let mut d = Days::new(&[("a", true)]).await;
    d.live(1).await;
    let (changes, fulls, tenant) = (d.changes.clone(), d.fulls.clone(), d.life.tenant.uid);
    let seen = async |d: &Days| {
        let h = d.history().await;
        let windows: Vec<(u64, u64)> = h.windows(Some(tenant)).iter().map(|w| (w.from_lsn.0, w.to_lsn.0)).collect();
        let gaps: Vec<_> = h.gaps(Some(tenant)).into_iter().map(|g| (g.from.0, g.to.0, g.reason)).collect();
        (windows, gaps)
    };
    let read_back = async |d: &Days, backup: Uuid, ok: bool| {
        let entry = Entry::Verified { backup, ok, what: "read_back".into(), message: None };
        d.life.catalog().await.append(entry).await.unwrap();
    };
    let damaged = |o: &ObjectRef| format!("damaged: {}", o.path);
    assert_eq!(seen(&d).await, (vec![(50, 1100)], vec![]));
    // The full at the day's end stands for it; without that one, the next.
    read_back(&d, changes[3].object, false).await;
    assert_eq!(seen(&d).await, (vec![(50, 400), (500, 1100)], vec![(401, 500, damaged(&changes[3]))]));
    read_back(&d, fulls[3].id, false).await;
    assert_eq!(seen(&d).await, (vec![(50, 400), (600, 1100)], vec![(401, 600, damaged(&changes[3]))]));
    // The rows of a base, up to the first full.
    read_back(&d, d.base.object, false).await;
    let gaps = vec![(50, 200, damaged(&d.base)), (401, 600, damaged(&changes[3]))];
    assert_eq!(seen(&d).await, (vec![(200, 400), (600, 1100)], gaps));
    // Of the last day nothing stands for anything; a comparison with live rows says nothing of objects.
    for backup in [d.base.object, changes[3].object, fulls[3].id] {
        read_back(&d, backup, true).await;
    }
    let entry = Entry::Verified { backup: changes[5].object, ok: false, what: "live".into(), message: None };
    d.life.catalog().await.append(entry).await.unwrap();
    read_back(&d, changes[9].object, false).await;
    read_back(&d, fulls[9].id, false).await;
    assert_eq!(seen(&d).await, (vec![(50, 1000)], vec![(1001, 1100, damaged(&changes[9]))]));
    // What another tenant lost is no gap of this one.
    assert_eq!(d.history().await.gaps(Some(Uuid::from_u128(7))), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_below_a_floor_stay_while_its_full_is_not_there() {
    let mut d = Days::new(&[("a", true), ("b", true)]).await;
    d.live(1).await;
    let pruner = || Pruner { grace: Duration::from_secs(86_400), ..d.life.pruner() };
    let t = d.life.act(pruner()).await;
    assert!(t.recorded.objects > 0 && d.there(&d.changes).iter().all(|t| *t));
    let path = d.life.world.path(&format!("b/{}", d.fulls[7].objects[0].path));
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    d.life.pass(1);
    let later = || Pruner { policy: Policy { pitr: Duration::from_secs(9 * 86_400), ..pruner().policy }, ..pruner() };
    let t = d.life.act(later()).await;
    assert!(d.there(&d.changes).iter().all(|t| *t) && d.life.is_there("a", &d.base));
    let why = t.pending[0].waits_for.as_ref().expect("a reason");
    assert!(why.contains("is missing in store b") && !t.pending[0].due, "{why}");
    std::fs::write(&path, bytes).unwrap();
    d.life.act(later()).await;
    assert_eq!(d.there(&d.changes), [&[false; 8][..], &[true; 2]].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_inside_of_a_ship_that_went_is_a_point_still() {
    let mut d = Days::new(&[("a", true)]).await;
    d.day().await;
    let inside = Lsn(d.log.upto_lsn().unwrap().0 - 50);
    let f = d.full_at(d.life.tenant.uid, 1, inside, "pre-migration").await;
    d.live(1).await;
    d.life.act(d.life.pruner()).await;
    assert!(d.floor().await > Some(inside) && !d.life.is_there("a", &d.changes[0]));
    assert_eq!(d.restore(When::Backup(f.id)).await.unwrap(), (Some(f.id), 0));
    d.refused(When::Lsn(Lsn(inside.0 + 1))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_behind_another_prunes_with_what_is_known_by_then() {
    let mut d = Days::new(&[("a", true)]).await;
    d.live(1).await;
    let pruner = d.life.pruner();
    let old = pruner.survey(&pruner.tenants().await.unwrap()).await.unwrap();
    // Ten days later another has raised the floor.
    d.live(1).await;
    d.life.act(d.life.pruner()).await;
    let raised = d.floor().await;
    assert_eq!(raised, Some(d.fulls[17].point_lsn));
    let uid = d.life.tenant.uid;
    let behind = pruner.tenant(&old, &[], None, &mut TenantReport::new(uid, None)).await.unwrap_err();
    assert!(behind.is_code(PRUNED_SINCE), "{behind}");
    let report = pruner.one((&old, &OnceCell::new()), uid, Vec::new(), None).await;
    assert!(report.error.is_none(), "{:?}", report.error);
    assert_eq!((report.floor.map(|f| f.lsn), d.floor().await), (raised, raised));
}
