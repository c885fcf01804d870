//! Pruning over local directories: catalogs with real objects, no server.

use super::report::Removed;
use super::*;
use crate::catalog::{Catalog, Entry, FullEntry, IncrementalEntry};
use crate::clock::{Clock, SharedClock};
use crate::crypto::random;
use crate::error::Error;
use crate::keyring::Keyring;
use crate::lease::Lease;
use crate::repository::tests::{World, draft, object, ship};
use crate::repository::{Access, Body, Log, ObjectRef, paths};
use crate::retention::{Reason, Trigger};
use coffer_wire::Lsn;
use std::sync::atomic::{AtomicI64, Ordering};

const DAY_US: i64 = 86_400 * 1_000_000;

/// A clock that stands where it is put.
#[derive(Debug)]
struct Fixed(AtomicI64);

impl Clock for Fixed {
    fn now_us(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A repository with one tenant whose life is told by the test.
pub(super) struct Life {
    pub world: World,
    pub repo: Arc<Repository>,
    clock: Arc<Fixed>,
    pub source: Uuid,
    pub tenant: TenantEntry,
}

impl Life {
    pub(super) async fn begin(stores: &[(&str, bool)]) -> Self {
        let world = World::new(stores);
        drop(world.init().await);
        let clock = Arc::new(Fixed(AtomicI64::new(crate::clock::SystemClock.now_us())));
        let shared: SharedClock = clock.clone();
        let keyring = Keyring::open(&world.config.keys, shared.clone()).await.unwrap();
        let repo = Repository::open(&world.config, keyring, shared, Access::Write).await.unwrap();
        let source = repo.keyring().ensure_source("shop").await.unwrap();
        let tenant = repo.keyring().ensure(source, &Tenant::normal("acme")).await.unwrap();
        Self { world, repo, clock, source, tenant }
    }

    pub(super) fn now(&self) -> i64 {
        self.clock.now_us()
    }

    pub(super) fn pass(&self, days: i64) {
        self.pass_us(days * DAY_US);
    }

    pub(super) fn pass_us(&self, us: i64) {
        self.clock.0.fetch_add(us, Ordering::Relaxed);
    }

    pub(super) fn pruner(&self) -> Pruner {
        Pruner {
            repo: self.repo.clone(),
            keyring: self.repo.keyring().clone(),
            source: ("shop".into(), self.source),
            dsn: None,
            policy: Policy {
                pitr: Duration::from_secs(2 * 86_400),
                daily: 3,
                weekly: 0,
                monthly: 0,
                annual: 0,
                ..Policy::default()
            },
            grace: Duration::ZERO,
            tenant: None,
            confirm: false,
            // No life here is long enough for packs.
            checkpoint_step: 5,
        }
    }

    pub(super) async fn catalog(&self) -> Catalog {
        Catalog::open(&self.repo, self.source, self.tenant.uid, None).await.unwrap()
    }

    /// A verified full as of now with an object of its own, and what else it refers to.
    pub(super) async fn full(&self, trigger: &str, others: &[ObjectRef]) -> FullEntry {
        let own = object(&self.repo, self.source, "acme", vec![1; 500]).await;
        let f = FullEntry {
            id: random::uuid(),
            trigger: trigger.into(),
            reason: None,
            point_lsn: Lsn(self.now() as u64),
            point_time_us: self.now(),
            log_n: 0,
            system_identifier: 1,
            timeline: 1,
            tables: Vec::new(),
            manifest: None,
            objects: [&[own], others].concat(),
            schema: None,
            roles: None,
            sequences: Vec::new(),
            database: None,
            rows: 1,
            bytes: 500,
            read_back_us: Some(self.now()),
            archive: vec![],
        };
        self.catalog().await.append(Entry::Full(f.clone())).await.unwrap();
        f
    }

    pub(super) async fn incremental(&self, from: i64) -> IncrementalEntry {
        let i = IncrementalEntry {
            id: random::uuid(),
            from_lsn: Lsn(from as u64),
            to_lsn: Lsn(self.now() as u64),
            to_time_us: self.now(),
            log_n: 0,
            object: Some(object(&self.repo, self.source, "acme", vec![2; 100]).await),
            rows: 1,
            bytes: 100,
            read_back_us: None,
        };
        self.catalog().await.append(Entry::Incremental(i.clone())).await.unwrap();
        i
    }

    /// Ten days of a full and an incremental each.
    pub(super) async fn ten_days(&self) -> Vec<FullEntry> {
        let mut fulls = Vec::new();
        for _ in 0..10 {
            fulls.push(self.full("schedule", &[]).await);
            let from = self.now();
            self.pass(1);
            self.incremental(from).await;
        }
        fulls
    }

    pub(super) fn is_there(&self, store: &str, o: &ObjectRef) -> bool {
        self.world.path(&format!("{store}/{}", o.path)).exists()
    }

    /// What a run does, with the clocks of the stores left alone: they are the machine's.
    pub(super) async fn act(&self, p: Pruner) -> TenantReport {
        let mut report = self.try_act(p).await.unwrap();
        let at = report.tenants.iter().position(|t| t.uid == self.tenant.uid).unwrap();
        report.tenants.swap_remove(at)
    }

    pub(super) async fn try_act(&self, mut p: Pruner) -> Result<Report> {
        // What was recorded before is earlier.
        self.clock.0.fetch_add(1000, Ordering::Relaxed);
        p.confirm = true;
        p.run_unchecked().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_confirm_nothing_is_touched_and_with_it_exactly_the_plan_goes_everywhere() {
    let life = Life::begin(&[("a", true), ("b", true), ("c", false)]).await;
    let fulls = life.ten_days().await;
    life.repo.replicate_to("c", life.source).await.unwrap();
    let before = crate::repository::tests::files_below(&life.world.path(""));
    let report = life.pruner().run().await.unwrap();
    assert_eq!(crate::repository::tests::files_below(&life.world.path("")), before);
    let t = report.tenants.iter().find(|t| t.uid == life.tenant.uid).unwrap();
    let gone: Vec<Uuid> = t.backups.iter().filter(|b| !b.keep && b.kind == "full").map(|b| b.id).collect();
    // Three days and the full at or before the window's start: the eighth to the tenth, here the eighth is both.
    assert_eq!(gone, fulls[..7].iter().map(|f| f.id).collect::<Vec<_>>());
    assert!(t.backups.iter().all(|b| !b.reasons.is_empty()) && report.text().contains("nothing was changed"));

    let t = life.act(life.pruner()).await;
    assert_eq!((t.recorded, t.deleted), (Removed { backups: 14, objects: 14, bytes: t.recorded.bytes }, t.recorded));
    for store in ["a", "b", "c"] {
        for (n, f) in fulls.iter().enumerate() {
            assert_eq!(life.is_there(store, &f.objects[0]), n >= 7, "{store} {n}");
        }
    }
    let state = life.catalog().await.state().clone();
    assert_eq!((state.fulls.len(), state.incrementals.len(), state.removals.len()), (3, 3, 0));
    let again = life.act(life.pruner()).await;
    assert_eq!((again.recorded, again.deleted), (Removed::default(), Removed::default()));
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_go_after_the_grace_and_what_is_needed_again_does_not() {
    let life = Life::begin(&[("a", true)]).await;
    let fulls = life.ten_days().await;
    let pruner = || Pruner { grace: Duration::from_secs(86_400), ..life.pruner() };
    let t = life.act(pruner()).await;
    assert_eq!((t.recorded.backups, t.deleted.objects), (14, 0));
    assert!(!t.pending[0].due && t.pending[0].objects == 14);
    assert!(life.is_there("a", &fulls[0].objects[0]));
    // A full that takes over an object of one that goes.
    life.full("schedule", &[fulls[1].objects[0].clone()]).await;
    life.pass(1);
    let t = life.act(pruner()).await;
    assert_eq!(t.deleted.objects, 13);
    assert!(!life.is_there("a", &fulls[0].objects[0]) && life.is_there("a", &fulls[1].objects[0]));
    // Nor what the log names, though the record does so, too.
    let (named, free) = (fulls[8].objects[0].clone(), fulls[7].objects[0].clone());
    let mut log = Log::open(&life.repo, life.source, None).await.unwrap();
    log.append(draft(0, 1, Body::Init)).await.unwrap();
    log.append(draft(1, 2, ship(vec![named.clone()]))).await.unwrap();
    let backups = vec![fulls[7].id, fulls[8].id];
    let objects = vec![named.clone(), free.clone()];
    life.catalog()
        .await
        .append(Entry::Removal { backups, objects, not_before_us: 0, reasons: vec![], floor: None, commons: None })
        .await
        .unwrap();
    assert_eq!(life.act(pruner()).await.deleted.objects, 1);
    assert!(life.is_there("a", &named) && !life.is_there("a", &free));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_counts_out_when_it_was_not_read_back_as_written_and_for_no_other_check() {
    let life = Life::begin(&[("a", true)]).await;
    let fulls = life.ten_days().await;
    let mut catalog = life.catalog().await;
    for (n, what, ok) in [(5, "live", false), (5, "drill", false), (6, "read_back", false), (6, "live", true)] {
        let entry = Entry::Verified { backup: fulls[n].id, ok, what: what.into(), message: None };
        catalog.append(entry).await.unwrap();
    }
    let policy = Policy { daily: 5, ..life.pruner().policy };
    let t = life.act(Pruner { policy, ..life.pruner() }).await;
    let kept: Vec<bool> = fulls.iter().map(|f| life.is_there("a", &f.objects[0])).collect();
    assert_eq!(kept, [false, false, false, false, true, true, false, true, true, true]);
    let gone = t.backups.iter().find(|b| b.id == fulls[6].id).unwrap();
    assert_eq!(gone.reasons, [Reason::Damaged]);
}

#[tokio::test(flavor = "multi_thread")]
async fn restores_and_holds_keep_what_they_need() {
    let life = Life::begin(&[("a", true)]).await;
    let fulls = life.ten_days().await;
    let lease = Lease::take(&life.repo, life.source, life.tenant.uid).await.unwrap();
    let t = life.act(life.pruner()).await;
    assert!(t.locked && t.backups.iter().all(|b| b.keep) && t.recorded == Removed::default());
    lease.release().await;
    // Another tenant's restore is nobody's business.
    let other = Lease::take(&life.repo, life.source, Uuid::from_u128(9)).await.unwrap();
    let hold = Entry::Hold {
        id: Uuid::from_u128(1),
        number: 0,
        reason: "case 7".into(),
        from_us: Some(fulls[2].point_time_us + DAY_US / 2),
        to_us: Some(fulls[3].point_time_us),
        by: "ann".into(),
        until_us: None,
    };
    life.catalog().await.append(hold).await.unwrap();
    let t = life.act(life.pruner()).await;
    assert!(!t.locked);
    let kept: Vec<bool> = fulls.iter().map(|f| life.is_there("a", &f.objects[0])).collect();
    assert_eq!(kept, [false, false, true, true, false, false, false, true, true, true]);
    life.catalog().await.append(Entry::Release { id: Uuid::from_u128(1), by: "ann".into() }).await.unwrap();
    life.act(life.pruner()).await;
    assert!(!life.is_there("a", &fulls[2].objects[0]) && !life.is_there("a", &fulls[3].objects[0]));
    other.release().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_or_a_restore_that_comes_within_the_grace_stops_the_deletion() {
    let life = Life::begin(&[("a", true)]).await;
    let fulls = life.ten_days().await;
    let pruner = || Pruner { grace: Duration::from_secs(86_400), ..life.pruner() };
    assert_eq!(life.act(pruner()).await.recorded.backups, 14);
    life.pass(2);
    let lease = Lease::take(&life.repo, life.source, life.tenant.uid).await.unwrap();
    let t = life.act(pruner()).await;
    assert!(t.locked && t.deleted.objects == 0, "{t:?}");
    lease.release().await;
    let id = Uuid::from_u128(1);
    let (reason, by) = ("case 7".to_owned(), "ann".to_owned());
    let hold = Entry::Hold { id, number: 0, reason, from_us: None, to_us: None, by, until_us: None };
    // The clock of who places it is behind: the number of its record says that it came later.
    life.pass(-30);
    life.catalog().await.append(hold).await.unwrap();
    life.pass(30);
    let t = life.act(pruner()).await;
    assert_eq!((t.deleted.objects, t.pending.len(), t.pending[0].due), (0, 1, false));
    life.catalog().await.append(Entry::Release { id, by: "ann".into() }).await.unwrap();
    assert_eq!(life.act(pruner()).await.deleted.objects, 14);
    assert!(!life.is_there("a", &fulls[0].objects[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn incidents_go_some_time_after_their_hold_was_released() {
    let life = Life::begin(&[("a", true)]).await;
    let incident = life.full("incident", &[]).await;
    assert_eq!(Trigger::parse(&incident.trigger), Trigger::Incident);
    let at = incident.point_time_us;
    let id = Uuid::from_u128(1);
    let (reason, by) = ("leak".to_owned(), "ann".to_owned());
    let hold = Entry::Hold { id, number: 3, reason, from_us: Some(at), to_us: Some(at), by, until_us: None };
    life.catalog().await.append(hold).await.unwrap();
    life.pass(400);
    life.ten_days().await;
    life.act(life.pruner()).await;
    assert!(life.is_there("a", &incident.objects[0]));
    life.catalog().await.append(Entry::Release { id, by: "ann".into() }).await.unwrap();
    life.act(life.pruner()).await;
    assert!(!life.is_there("a", &incident.objects[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn orphans_go_after_a_day_and_what_is_not_ours_stays() {
    let life = Life::begin(&[("a", true), ("b", true)]).await;
    let mut log = Log::open(&life.repo, life.source, None).await.unwrap();
    log.append(draft(0, 9, Body::Init)).await.unwrap();
    life.full("schedule", &[]).await;
    // Beyond the log's end: the record that names it may be to come.
    let coming = paths::common(life.source, Lsn(10), random::uuid());
    life.repo.put(&coming, "on its way".into()).await.unwrap();
    let orphan = object(&life.repo, life.source, "acme", vec![3; 100]).await;
    let common = paths::common(life.source, Lsn(5), random::uuid());
    life.repo.put(&common, "left over".into()).await.unwrap();
    let strange = paths::tenant_dir(life.source, life.tenant.uid) + "/c/not-ours";
    life.repo.put(&strange, "somebody else's".into()).await.unwrap();
    let found = |r: &Report| r.orphans.iter().map(|o| o.path.clone()).collect::<Vec<_>>();
    assert_eq!(found(&life.pruner().run().await.unwrap()), [] as [String; 0]);
    life.pass(2);
    let mut expected = vec![common.clone(), orphan.path.clone()];
    expected.sort();
    assert_eq!(found(&life.pruner().run().await.unwrap()), expected);
    life.try_act(life.pruner()).await.unwrap();
    let there = |path: &str| ["a", "b"].map(|s| life.world.path(&format!("{s}/{path}")).exists());
    assert_eq!((there(&common), there(&orphan.path), there(&strange)), ([false; 2], [false; 2], [true; 2]));
    assert_eq!(there(&coming), [true; 2]);
    assert_eq!(found(&life.try_act(life.pruner()).await.unwrap()), [] as [String; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_gets_its_deletions_when_it_is_back() {
    let life = Life::begin(&[("a", true), ("c", false)]).await;
    let fulls = life.ten_days().await;
    life.repo.replicate_to("c", life.source).await.unwrap();
    std::fs::rename(life.world.path("c"), life.world.path("away")).unwrap();
    let t = life.act(life.pruner()).await;
    assert_eq!((t.deleted.objects, t.deleted.backups, t.pending.len()), (14, 0, 1));
    assert!(!life.is_there("a", &fulls[0].objects[0]));
    std::fs::rename(life.world.path("away"), life.world.path("c")).unwrap();
    assert!(life.is_there("c", &fulls[0].objects[0]));
    let t = life.act(life.pruner()).await;
    assert!(t.pending.is_empty() && !life.is_there("c", &fulls[0].objects[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tenants_trouble_stops_no_other_and_a_policy_of_its_own_counts() {
    let life = Life::begin(&[("a", true)]).await;
    let fulls = life.ten_days().await;
    let umbrella = life.repo.keyring().ensure(life.source, &Tenant::normal("umbrella")).await.unwrap();
    let mut c = Catalog::open(&life.repo, life.source, umbrella.uid, None).await.unwrap();
    c.append(Entry::Policy { policy: serde_json::json!({"dayly": 3}), by: "ann".into() }).await.unwrap();
    let own = Entry::Policy { policy: serde_json::json!({"daily": 5}), by: "ann".into() };
    life.catalog().await.append(own).await.unwrap();
    let report = life.try_act(life.pruner()).await.unwrap();
    let failed: Vec<(Uuid, &Error)> = report.failed().map(|(t, e)| (t.uid, e)).collect();
    assert!(failed.len() == 1 && failed[0].0 == umbrella.uid && failed[0].1.to_string().contains("dayly"));
    let kept: Vec<bool> = fulls.iter().map(|f| life.is_there("a", &f.objects[0])).collect();
    assert_eq!(kept, [false, false, false, false, false, true, true, true, true, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_another_tenant_goes_whatever_a_record_says() {
    let life = Life::begin(&[("a", true)]).await;
    life.full("schedule", &[]).await;
    let theirs = object(&life.repo, life.source, "umbrella", vec![4; 100]).await;
    let record = paths::catalog_record(life.source, life.tenant.uid, 0);
    let objects = [theirs.path.clone(), record.clone(), "coffer-repository".into(), "../kek".into()]
        .map(|path| ObjectRef { path, ..theirs.clone() })
        .to_vec();
    life.catalog()
        .await
        .append(Entry::Removal {
            backups: vec![],
            objects,
            not_before_us: 0,
            reasons: vec![],
            floor: None,
            commons: None,
        })
        .await
        .unwrap();
    let t = life.act(life.pruner()).await;
    assert_eq!(t.deleted.objects, 0);
    for path in [theirs.path, record, "coffer-repository".into()] {
        assert!(life.world.path(&format!("a/{path}")).exists(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_clock_is_another_refuses_everything() {
    let life = Life::begin(&[("a", true)]).await;
    life.pass(1);
    let e = Pruner { confirm: true, ..life.pruner() }.run().await.unwrap_err();
    assert!(e.kind() == Kind::Refused && e.is_code("clocks_differ"), "{e}");
}
