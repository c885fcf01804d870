//! Logs that begin with a checkpoint, over local directories.

use super::model::{SequenceState, SequencesAt, Ship};
use super::tests::{World, draft, files_below, object, ship};
use super::*;
use crate::crypto::ObjectKind;

fn all_gone(_: &LogRecord, _: &ObjectRef) -> bool {
    true
}

async fn grow(log: &mut Log, end: u64) {
    for n in log.last().map_or(0, |r| r.n + 1)..end {
        let body = if n == 0 { Body::Init } else { Body::Idle };
        log.append(draft(n, n + 1, body)).await.unwrap();
    }
}

/// Shortens the log in every store.
async fn shorten(repo: &Arc<Repository>, log: &Log, end: u64) -> u64 {
    let c = Checkpoint::of(log.records(), log.begins(), end, &all_gone).unwrap();
    repo.begin_log_with(log.source(), &c).await.unwrap()
}

fn names(w: &World, store: &str, folder: &str) -> Vec<String> {
    let mut all: Vec<String> = files_below(&w.path(store).join(folder))
        .iter()
        .map(|p| p.file_name().unwrap().to_string_lossy().trim_start_matches('0').to_owned())
        .collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_goes_on_behind_a_checkpoint() {
    let w = World::new(&[("a", true), ("b", true), ("c", false)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let mut log = Log::open(&repo, source, None).await.unwrap();
    grow(&mut log, 30).await;
    let stood_still = w.open(Access::Write).await;
    let mut stale = Log::open(&stood_still, source, None).await.unwrap();
    stale.level().await.unwrap();
    grow(&mut log, 60).await;
    let reader = w.open(Access::Read).await;
    let listed = log::copies(&reader, source, Some("a")).await.unwrap();
    let last = log.last().unwrap().clone();
    assert_eq!(shorten(&repo, &log, 40).await, 80, "forty records in two stores");
    assert!(Checkpoint::of(log.records(), 40, 40, &all_gone).is_none(), "nothing is won twice");

    let (logs, checkpoints) = (paths::log_dir(source), paths::checkpoints_dir(source));
    for from in [None, Some("a"), Some("b")] {
        let again = Log::open(&repo, source, from).await.unwrap();
        let numbers: Vec<u64> = again.records().iter().map(|r| r.n).collect();
        assert_eq!(numbers, [0, 39].into_iter().chain(40..60).collect::<Vec<_>>());
        assert_eq!((again.begins(), again.last()), (40, Some(&last)));
        assert_eq!((again.records()[1].from_lsn, again.records()[1].upto_lsn), (Lsn(1), Lsn(40)));
        assert_eq!(again.names().len(), if from.is_some() { 21 } else { 0 });
        assert_eq!(names(&w, from.unwrap_or("a"), &logs).len(), 20);
    }

    // A reader that had listed the records before: what it misses is in the checkpoint by now.
    let mut late = Log::open(&reader, source, Some("a")).await.unwrap();
    assert_eq!(late.read(&listed).await.unwrap_err().kind(), Kind::NotFound);
    // The numbers are taken.
    let e = stale.append(draft(30, 31, Body::Idle)).await.unwrap_err();
    assert!(e.kind() == Kind::Fenced && e.to_string().contains("/checkpoints/"), "{e}");
    assert_eq!(names(&w, "a", &logs).len(), 20, "nothing of it is left");

    // It grows, also for somebody who begins with the checkpoint, and the next one takes its place.
    let mut again = Log::open(&w.open(Access::Write).await, source, None).await.unwrap();
    grow(&mut again, 70).await;
    shorten(&repo, &again, 65).await;
    for store in ["a", "b"] {
        assert_eq!(names(&w, store, &checkpoints), ["65"]);
        assert_eq!(names(&w, store, &logs), ["65", "66", "67", "68", "69"]);
    }
    // A store that has nothing yet gets the checkpoint.
    assert_eq!(w.open(Access::Write).await.replicate_to("c", source).await.unwrap().records, 70);
    assert_eq!(names(&w, "c", &checkpoints), ["65"]);
    let of_c = Log::open(&repo, source, Some("c")).await.unwrap();
    assert_eq!(of_c.records(), Log::open(&repo, source, None).await.unwrap().records());
    std::fs::remove_dir_all(w.path("b").join(paths::source_dir(source))).unwrap();
    let mut leveled = Log::open(&w.open(Access::Write).await, source, None).await.unwrap();
    leveled.level().await.unwrap();
    assert_eq!((names(&w, "b", &checkpoints), names(&w, "b", &logs).len()), (vec!["65".to_owned()], 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_and_records_of_a_store_that_was_away_go_once_it_has_the_checkpoint() {
    let w = World::new(&[("a", true), ("c", false)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let mut log = Log::open(&repo, source, None).await.unwrap();
    grow(&mut log, 20).await;
    repo.replicate_to("c", source).await.unwrap();
    grow(&mut log, 2100).await;
    for m in &repo.members[..1] {
        repo.pack_log_of(m, source, 2100).await.unwrap();
    }
    // Inside of a pack nothing is cut.
    shorten(&repo, &log, 1024).await;
    let (packs, logs, checkpoints) = (paths::packs_dir(source), paths::log_dir(source), paths::checkpoints_dir(source));
    assert_eq!(names(&w, "a", &packs), ["1024-1024"]);
    assert_eq!((names(&w, "a", &checkpoints), names(&w, "c", &checkpoints)), (vec!["1024".to_owned()], vec![]));
    assert_eq!(Log::open(&repo, source, None).await.unwrap().records().len(), 2 + 2100 - 1024);

    // The same process knows up to where it was, another one lists.
    for (who, n) in [(repo.clone(), 2100), (w.open(Access::Write).await, 2110)] {
        grow(&mut log, n).await;
        who.replicate_to("c", source).await.unwrap();
        assert_eq!(names(&w, "c", &checkpoints), ["1024"]);
        assert_eq!(Log::open(&repo, source, Some("c")).await.unwrap().last().unwrap().n, n - 1);
    }
    let c = repo.members.iter().find(|m| m.store.name() == "c").unwrap();
    let before = names(&w, "c", &logs).len();
    repo.pack_log_of(c, source, 2110).await.unwrap();
    assert!(names(&w, "c", &logs).len() <= before - 20 && names(&w, "c", &logs).len() < 100);
    assert_eq!(Log::open(&repo, source, Some("c")).await.unwrap().records().len(), 2 + 2110 - 1024);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_is_told_and_taken_from_another_store() {
    let w = World::new(&[("a", true), ("b", true)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let mut log = Log::open(&repo, source, None).await.unwrap();
    grow(&mut log, 30).await;
    let records: Vec<_> = (0..20).map(|n| paths::log_record(source, n)).collect();
    let saved: Vec<_> = records.iter().map(|p| std::fs::read(w.path("a").join(p)).unwrap()).collect();
    shorten(&repo, &log, 20).await;
    let path = w.path("a").join(paths::checkpoint(source, 20));
    let good = std::fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&path, bad).unwrap();
        assert_eq!(Log::open(&repo, source, None).await.unwrap().records().len(), 12);
        let e = Log::open(&repo, source, Some("a")).await.err().unwrap();
        let is_told = matches!(e.kind(), Kind::Verification | Kind::Key) && e.to_string().contains("checkpoints/");
        assert!(is_told, "byte {at}: {e}");
    }
    // What was to be removed is still needed then, if it is there.
    for (p, bytes) in records.iter().zip(&saved) {
        std::fs::write(w.path("a").join(p), bytes).unwrap();
    }
    assert_eq!(Log::open(&repo, source, Some("a")).await.unwrap().records().len(), 30);
    assert!(repo.pack_log_of(&repo.members[0], source, 30).await.is_err());
    assert_eq!(names(&w, "a", &paths::log_dir(source)).len(), 30);
    // One that is damaged before anything was removed for its sake: the one before is good.
    let second = w.path("a").join(paths::checkpoint(source, 25));
    for n in 0..20 {
        std::fs::remove_file(w.path("a").join(paths::log_record(source, n))).unwrap();
    }
    std::fs::write(&path, &good).unwrap();
    std::fs::write(&second, "no checkpoint").unwrap();
    assert_eq!(Log::open(&repo, source, Some("a")).await.unwrap().begins(), 20);
    std::fs::remove_file(&second).unwrap();
    for (p, bytes) in records.iter().zip(&saved) {
        std::fs::write(w.path("a").join(p), bytes).unwrap();
    }
    // Another one's place in the log.
    std::fs::write(&path, &good).unwrap();
    std::fs::rename(&path, w.path("a").join(paths::checkpoint(source, 21))).unwrap();
    assert!(Log::open(&repo, source, Some("a")).await.is_ok_and(|l| l.begins() == 0));
    std::fs::remove_file(w.path("a").join(paths::log_record(source, 0))).unwrap();
    assert_eq!(Log::open(&repo, source, Some("a")).await.err().unwrap().kind(), Kind::Verification);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_lost_records_gets_no_checkpoint_before_it_has_them_again() {
    let w = World::new(&[("a", true), ("b", true)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let mut log = Log::open(&repo, source, None).await.unwrap();
    grow(&mut log, 30).await;
    std::fs::remove_file(w.path("b").join(paths::log_record(source, 7))).unwrap();
    assert_eq!(shorten(&repo, &log, 20).await, 20);
    assert_eq!(names(&w, "b", &paths::checkpoints_dir(source)), Vec::<String>::new());
    let mut again = Log::open(&w.open(Access::Write).await, source, None).await.unwrap();
    again.level().await.unwrap();
    assert_eq!(names(&w, "b", &paths::checkpoints_dir(source)), ["20"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_read_whole_while_it_is_shortened() {
    let w = World::new(&[("a", true)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let mut log = Log::open(&repo, source, None).await.unwrap();
    grow(&mut log, 100).await;
    let reader = w.open(Access::Read).await;
    let reading = tokio::spawn(async move {
        let mut seen = std::collections::BTreeSet::new();
        loop {
            let log = Log::open(&reader, source, None).await.unwrap();
            assert_eq!(log.last().unwrap().n, 99);
            assert!(log.records().windows(2).all(|p| p[0].upto_lsn == p[1].from_lsn));
            seen.insert(log.begins());
            if log.begins() == 95 {
                return seen.len();
            }
        }
    });
    for end in (5..=95).step_by(5) {
        let now = Log::open(&repo, source, None).await.unwrap();
        shorten(&repo, &now, end).await;
    }
    let seen = reading.await.unwrap();
    println!("{seen} states of the log were read");
}

/// Records of ships and others, with what is gone by the number of the newest record that a floor covers.
#[tokio::test(flavor = "multi_thread")]
async fn records_are_joined_as_far_as_they_say_the_same() {
    let w = World::new(&[("a", true)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let (acme, umbrella) =
        (object(&repo, source, "acme", b"x".to_vec()).await, object(&repo, source, "umbrella", b"x".to_vec()).await);
    let of = |o: &ObjectRef, end: u64| ObjectRef { lsn_end: Lsn(end), ..o.clone() };
    let common = |end: u64| Some(ObjectRef { kind: ObjectKind::Common, ..of(&acme, end) });
    let states = |lsn: u64, value: i64| {
        vec![SequencesAt {
            lsn: Lsn(lsn),
            states: vec![SequenceState { name: "s".into(), last_value: value, is_called: true }],
        }]
    };
    let plain = |n: u64, objects: Vec<ObjectRef>| Ship {
        txns: 2,
        min_xid: 100 + n,
        max_xid: 110 + n,
        first_commit_us: n as i64 * 10,
        last_commit_us: n as i64 * 10 + 5,
        max_commit_us: n as i64 * 10 + 9,
        min_commit_us: Some(n as i64 * 10 - 3),
        eventful: Some(false),
        common: common(n + 1),
        objects,
        sequences: states(n + 1, n as i64),
        joined: false,
    };
    let bodies = [
        Body::Init,
        Body::Ship(plain(1, vec![of(&acme, 2), of(&umbrella, 2)])),
        Body::Idle,
        Body::Ship(plain(3, vec![of(&acme, 4)])),
        // Events stay, with all that the record names.
        Body::Ship(Ship { eventful: Some(true), ..plain(4, vec![of(&acme, 5)]) }),
        Body::Ship(plain(5, vec![of(&umbrella, 6)])),
        Body::Ship(plain(6, vec![of(&umbrella, 7)])),
        Body::Gap { reason: "slot_lost".into() },
        Body::Idle,
        ship(Vec::new()),
        Body::Idle,
        Body::Idle,
    ];
    let mut log = Log::open(&repo, source, None).await.unwrap();
    for (n, body) in bodies.into_iter().enumerate() {
        log.append(draft(n as u64, n as u64 + 1, body)).await.unwrap();
    }
    let of_gone = |floor: u64| {
        move |r: &LogRecord, o: &ObjectRef| r.n <= floor && o.tenant == acme.tenant || o.tenant == umbrella.tenant
    };
    let c = Checkpoint::of(log.records(), 0, 11, &of_gone(100)).unwrap();
    let spans: Vec<(u64, u64, u64)> = c.records.iter().map(|r| (r.from_lsn.0, r.upto_lsn.0, r.n)).collect();
    assert_eq!(spans, [(0, 1, 0), (1, 4, 3), (4, 5, 4), (5, 7, 6), (7, 8, 7), (8, 9, 8), (9, 10, 9), (10, 11, 10)]);
    let Body::Ship(joined) = &c.records[1].body else { panic!("{:?}", c.records[1]) };
    // Of each tenant the last one tells that there were changes.
    let ends: Vec<(Uuid, Lsn)> = joined.objects.iter().map(|o| (o.tenant, o.lsn_end)).collect();
    assert!(ends.len() == 2 && ends.contains(&(umbrella.tenant, Lsn(2))) && ends.contains(&(acme.tenant, Lsn(4))));
    assert_eq!((joined.txns, joined.min_xid, joined.max_xid, joined.common.clone()), (4, 101, 113, common(4)));
    let times = (joined.first_commit_us, joined.last_commit_us, joined.max_commit_us, joined.min_commit_us);
    assert_eq!(times, (10, 35, 39, Some(7)));
    // Of an hour the newest states where its first reading was, and its last.
    assert_eq!(joined.sequences, [states(2, 3), states(4, 3)].concat());
    assert!(joined.joined);
    for n in [4, 7, 9] {
        let kept = c.records.iter().find(|r| r.n == n).unwrap();
        assert_eq!(**kept, *log.records()[n as usize]);
    }
    // Nothing is gone: idle records alone are joined.
    let c = Checkpoint::of(log.records(), 0, 11, &|_: &LogRecord, _: &ObjectRef| false).unwrap();
    assert_eq!(c.records.len(), 11);
    // Not across the place where a timeline was left.
    let mut promoted = log.records().to_vec();
    let timeline = Body::Timeline { from: 1, to: 2, at: Lsn(3) };
    promoted.push(Arc::new(LogRecord { n: 12, body: timeline, ..(*promoted[11]).clone() }));
    let c = Checkpoint::of(&promoted, 0, 11, &of_gone(100)).unwrap();
    assert_eq!(c.records[1..4].iter().map(|r| r.n).collect::<Vec<_>>(), [2, 3, 4]);
    // A sequence that was set back stands lower only from there on.
    let back: Vec<_> = [0, 1, 2, 3, 4, 5]
        .map(|n| match n {
            0 => log.records()[0].clone(),
            _ => {
                let value = [0, 5, 7, 2, 3, 4][n as usize];
                let ship = Ship { sequences: states(n + 1, value), ..plain(n, Vec::new()) };
                Arc::new(LogRecord {
                    n,
                    from_lsn: Lsn(n),
                    upto_lsn: Lsn(n + 1),
                    body: Body::Ship(ship),
                    ..(*log.records()[1]).clone()
                })
            }
        })
        .into();
    let c = Checkpoint::of(&back, 0, 5, &of_gone(100)).unwrap();
    let Body::Ship(joined) = &c.records[1].body else { panic!("{:?}", c.records[1]) };
    assert_eq!(joined.sequences, [states(2, 7), states(3, 7), states(4, 2), states(5, 3)].concat());
    // Joined again with what came since, readings stay as they are.
    let first = Checkpoint::of(log.records(), 0, 3, &of_gone(100)).unwrap();
    let mut rest = first.records.clone();
    rest.extend_from_slice(&log.records()[3..]);
    let c = Checkpoint::of(&rest, 3, 11, &of_gone(100)).unwrap();
    assert_eq!(c.records[1].upto_lsn, Lsn(4));
    let Body::Ship(joined) = &c.records[1].body else { panic!("{:?}", c.records[1]) };
    assert_eq!(joined.sequences, [states(2, 1), states(4, 3)].concat());
}
