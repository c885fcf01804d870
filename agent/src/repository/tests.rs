//! The repository over local directories: everything that needs no server.

use super::model::Ship;
use super::packs::{self, Packed};
use super::*;
use crate::clock::SystemClock;
use crate::crypto::{Codec, ObjectKind, random};
use crate::tenant::Tenant;
use std::io::{Read, Write};
use std::path::Path;
use tokio::runtime::Handle;

/// A repository in a temporary directory: `a` is the sequencer, `b` required, `c` optional.
pub(crate) struct World {
    dir: tempfile::TempDir,
    pub(crate) config: Config,
}

impl World {
    pub(crate) fn new(stores: &[(&str, bool)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        let mut text = format!(
            "[keys]\nprovider = \"file\"\npath = \"{root}/kek\"\nkeyring = [\"file://{root}/k1\", \"file://{root}/k2\"]\n"
        );
        for (name, required) in stores {
            text.push_str(&format!(
                "[[store]]\nname = \"{name}\"\nurl = \"file://{root}/{name}\"\nrequired = {required}\n"
            ));
        }
        let config = Config::from_text(&text, std::iter::empty()).unwrap();
        crate::keyring::Kek::create_file(&config.keys).unwrap();
        Self { dir, config }
    }

    pub(crate) fn path(&self, below: &str) -> std::path::PathBuf {
        self.dir.path().join(below)
    }

    pub(crate) async fn init(&self) -> Arc<Repository> {
        let clock = Arc::new(SystemClock);
        let keyring = Keyring::create(&self.config.keys, clock.clone()).await.unwrap();
        Repository::create(&self.config, keyring, clock).await.unwrap()
    }

    pub(crate) async fn try_open(&self, access: Access) -> Result<Arc<Repository>> {
        let clock = Arc::new(SystemClock);
        let keyring = Keyring::open(&self.config.keys, clock.clone()).await?;
        Repository::open(&self.config, keyring, clock, access).await
    }

    pub(crate) async fn open(&self, access: Access) -> Arc<Repository> {
        self.try_open(access).await.unwrap()
    }
}

pub(crate) fn draft(from: u64, upto: u64, body: Body) -> Draft {
    Draft {
        system_identifier: 77,
        timeline: 1,
        slot: "coffer_shop".into(),
        from_lsn: Lsn(from),
        upto_lsn: Lsn(upto),
        upto_time_us: upto as i64,
        body,
    }
}

/// Seals an object of a tenant on a blocking thread, as workers do.
pub(crate) async fn object(repo: &Arc<Repository>, source: Uuid, tenant: &str, plain: Vec<u8>) -> ObjectRef {
    let entry = repo.keyring().ensure(source, &Tenant::normal(tenant)).await.unwrap();
    let header = Header {
        kind: ObjectKind::Changeset,
        codec: Codec::Lz4,
        tenant: entry.uid,
        object: random::uuid(),
        source,
        system_identifier: 77,
        timeline: 1,
        lsn_start: Lsn(1),
        lsn_end: Lsn(2),
        key_version: entry.version,
    };
    let (repo, rt) = (repo.clone(), Handle::current());
    tokio::task::spawn_blocking(move || {
        use crate::crypto::KeySource;
        let path = paths::changeset(source, entry.uid, Lsn(2), header.object);
        let key = repo.keyring().key(entry.key_id()).unwrap();
        repo.seal_to(rt, path, &header, &key, |s| {
            s.write_all(&plain).unwrap();
            Ok(3)
        })
        .unwrap()
    })
    .await
    .unwrap()
}

async fn read_back(repo: &Arc<Repository>, r: &ObjectRef, from: Option<&str>) -> Result<Vec<u8>> {
    let (repo, rt, r, from) = (repo.clone(), Handle::current(), r.clone(), from.map(str::to_owned));
    tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        let mut opener = repo.open_object(&rt, &r, from.as_deref())?;
        match opener.read_to_end(&mut all) {
            Ok(_) => Ok(all),
            Err(e) => Err(e.downcast::<Error>().unwrap()),
        }
    })
    .await
    .unwrap()
}

pub(crate) fn ship(objects: Vec<ObjectRef>) -> Body {
    Body::Ship(Ship { txns: 1, objects, ..Ship::default() })
}

fn noise(n: usize) -> Vec<u8> {
    let mut b = vec![0; n];
    random::fill(&mut b);
    b
}

pub(crate) fn files_below(p: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for e in std::fs::read_dir(p).into_iter().flatten().flatten() {
        match e.path().is_dir() {
            true => found.extend(files_below(&e.path())),
            false => found.push(e.path()),
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_read_back_from_every_required_store() {
    let w = World::new(&[("a", true), ("b", true), ("c", false)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let small = object(&repo, source, "acme", b"acme's rows".to_vec()).await;
    // Three parts, the last one short.
    let plain = noise(20 << 20);
    let large = object(&repo, source, "umbrella", plain.clone()).await;
    let empty = object(&repo, source, "umbrella", Vec::new()).await;
    let mut log = Log::open(&repo, source, None).await.unwrap();
    assert!(log.last().is_none());
    log.append(draft(0, 1, Body::Init)).await.unwrap();
    let shipped = log.append(draft(1, 2, ship(vec![small.clone(), large.clone()]))).await.unwrap();
    assert_eq!(shipped.n, 1);

    let repo = w.open(Access::Read).await;
    let again = Log::open(&repo, source, None).await.unwrap();
    assert_eq!(again.records().len(), 2);
    assert_eq!(again.records()[1], shipped);
    assert_eq!(again.upto_lsn(), Some(Lsn(2)));
    for from in [None, Some("a"), Some("b")] {
        assert_eq!(read_back(&repo, &small, from).await.unwrap(), b"acme's rows");
        assert!(read_back(&repo, &large, from).await.unwrap() == plain);
        assert_eq!(read_back(&repo, &empty, from).await.unwrap(), b"");
        assert_eq!(repo.open_small(&small, from).await.unwrap(), b"acme's rows");
    }
    assert_eq!(read_back(&repo, &small, Some("c")).await.unwrap_err().kind(), Kind::Verification);
    assert_eq!(read_back(&repo, &small, Some("x")).await.unwrap_err().kind(), Kind::Usage);
    let names: String = files_below(w.dir.path()).iter().map(|p| p.display().to_string()).collect();
    assert!(!names.contains("acme") && !names.contains("shop"), "{names}");
}

/// The stores `a` and `b` with two objects and three records.
async fn three_records(w: &World) -> (Uuid, Vec<ObjectRef>) {
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let objects =
        vec![object(&repo, source, "acme", noise(1000)).await, object(&repo, source, "umbrella", noise(1000)).await];
    let mut log = Log::open(&repo, source, None).await.unwrap();
    log.append(draft(0, 1, Body::Init)).await.unwrap();
    log.append(draft(1, 2, ship(objects.clone()))).await.unwrap();
    log.append(draft(2, 3, Body::Idle)).await.unwrap();
    (source, objects)
}

impl World {
    fn record(&self, store: &str, source: Uuid, n: u64) -> std::path::PathBuf {
        self.path(store).join(paths::log_record(source, n))
    }

    fn file(&self, store: &str, object: &ObjectRef) -> std::path::PathBuf {
        self.path(store).join(&object.path)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_repository_is_never_replaced_and_a_foreign_one_never_used() {
    let w = World::new(&[("a", true), ("b", true)]);
    let repo = w.init().await;
    let clock = Arc::new(SystemClock);
    let before = files_below(w.dir.path()).len();
    let again = Repository::create(&w.config, repo.keyring().clone(), clock.clone()).await.unwrap_err();
    assert_eq!(again.kind(), Kind::Refused);
    assert_eq!(crate::commands::init::run(&w.config, false, true).await.unwrap_err().kind(), Kind::Refused);
    assert_eq!(files_below(w.dir.path()).len(), before, "nothing was changed");

    // Stores swapped, and the sequencer moved.
    let mut swapped = w.config.clone();
    (swapped.store[0].url, swapped.store[1].url) = (w.config.store[1].url.clone(), w.config.store[0].url.clone());
    let mut reordered = w.config.clone();
    reordered.store.reverse();
    for c in [swapped, reordered] {
        let e = Repository::open(&c, repo.keyring().clone(), clock.clone(), Access::Write).await.unwrap_err();
        assert_eq!(e.kind(), Kind::Usage, "{e}");
    }
    // A reader may know one store only, whichever it is.
    let mut second = w.config.clone();
    second.store.remove(0);
    Repository::open(&second, repo.keyring().clone(), clock.clone(), Access::Read).await.unwrap();
    // Another keyring.
    let other = World::new(&[("a", true)]);
    other.init().await;
    let foreign = Keyring::open(&other.config.keys, clock.clone()).await.unwrap();
    let e = Repository::open(&w.config, foreign, clock, Access::Read).await.unwrap_err();
    assert!(matches!(e.kind(), Kind::Key | Kind::Verification), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn init_takes_back_what_it_made_when_a_later_step_fails() {
    let mut w = World::new(&[("a", true), ("b", true)]);
    // A file where the second store's directory should be.
    std::fs::write(w.path("b"), "x").unwrap();
    assert!(crate::commands::init::run(&w.config, false, true).await.is_err());
    assert!(files_below(&w.path("k1")).is_empty(), "the keyring is gone again");
    assert!(files_below(&w.path("a")).is_empty());
    std::fs::remove_file(w.path("b")).unwrap();
    crate::commands::init::run(&w.config, false, true).await.unwrap();
    w.open(Access::Write).await;
    // --create-kek never touches a KEK.
    w.config.store[0].url = format!("file://{}", w.path("a2").display());
    assert_eq!(crate::commands::init::run(&w.config, true, true).await.unwrap_err().kind(), Kind::Refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_writer_is_fenced_by_the_number() {
    let w = World::new(&[("a", true), ("b", true)]);
    let (source, _) = three_records(&w).await;
    let (one, two) = (w.open(Access::Write).await, w.open(Access::Write).await);
    let mut first = Log::open(&one, source, None).await.unwrap();
    let mut second = Log::open(&two, source, None).await.unwrap();
    first.append(draft(3, 4, Body::Idle)).await.unwrap();
    let e = second.append(draft(3, 5, Body::Idle)).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Fenced);
    let text = e.to_string();
    assert!(text.contains(&first.writer().to_string()) && text.contains(&second.writer().to_string()), "{text}");
    assert_eq!(second.append(draft(3, 5, Body::Idle)).await.unwrap_err().kind(), Kind::Fenced);
    first.append(draft(4, 5, Body::Idle)).await.unwrap();
    assert_eq!(Log::open(&one, source, None).await.unwrap().records().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_store_that_missed_something_is_an_error_to_readers_and_healed_by_writers() {
    let w = World::new(&[("a", true), ("b", true)]);
    let (source, objects) = three_records(&w).await;
    for n in [1, 2] {
        std::fs::remove_file(w.record("b", source, n)).unwrap();
    }
    std::fs::remove_file(w.file("b", &objects[1])).unwrap();
    let reader = w.open(Access::Read).await;
    let e = Log::open(&reader, source, None).await.err().unwrap();
    assert!(e.is_code("store_behind"), "{e}");
    assert_eq!(Log::open(&reader, source, Some("a")).await.unwrap().records().len(), 3);
    assert_eq!(Log::open(&reader, source, Some("b")).await.unwrap().records().len(), 1);

    let writer = w.open(Access::Write).await;
    let mut log = Log::open(&writer, source, None).await.unwrap();
    assert_eq!(log.upto_lsn(), Some(Lsn(3)));
    log.append(draft(3, 4, Body::Idle)).await.unwrap();
    assert_eq!(Log::open(&reader, source, None).await.unwrap().records().len(), 4);
    assert!(read_back(&reader, &objects[1], Some("b")).await.is_ok());
    let durable: Vec<_> = writer.status(source).into_iter().map(|s| (s.up, s.durable_lsn)).collect();
    assert_eq!(durable, [(true, Some(Lsn(4))), (true, Some(Lsn(4)))]);

    // The sequencer itself was lost and came back empty but for its descriptor.
    for n in 0..4 {
        std::fs::remove_file(w.record("a", source, n)).unwrap();
    }
    for o in &objects {
        std::fs::remove_file(w.file("a", o)).unwrap();
    }
    let writer = w.open(Access::Write).await;
    let mut log = Log::open(&writer, source, None).await.unwrap();
    log.level().await.unwrap();
    assert!(read_back(&reader, &objects[0], Some("a")).await.is_ok());
    assert_eq!(Log::open(&reader, source, Some("a")).await.unwrap().records().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_optional_store_catches_up_on_its_own() {
    let w = World::new(&[("a", true), ("c", false)]);
    let (source, objects) = three_records(&w).await;
    let reader = w.open(Access::Read).await;
    assert_eq!(Log::open(&reader, source, None).await.unwrap().records().len(), 3, "it lags, which is no error");
    assert!(Log::open(&reader, source, Some("c")).await.unwrap().last().is_none());
    let writer = w.open(Access::Write).await;
    let copier = tokio::spawn({
        let writer = writer.clone();
        async move { writer.replicate_optional(source).await }
    });
    let reach = async |lsn: u64| {
        for _ in 0..200 {
            if writer.status(source)[1].durable_lsn == Some(Lsn(lsn)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the store never reached {lsn}: {:?}", writer.status(source));
    };
    reach(3).await;
    let mut log = Log::open(&writer, source, None).await.unwrap();
    let large = object(&writer, source, "acme", noise(20 << 20)).await;
    log.append(draft(3, 4, ship(vec![large.clone()]))).await.unwrap();
    reach(4).await;
    for o in objects.iter().chain([&large]) {
        assert!(read_back(&reader, o, Some("c")).await.is_ok());
    }
    copier.abort();
    // The disk was replaced by an empty one.
    std::fs::remove_dir_all(w.path("c")).unwrap();
    std::fs::create_dir(w.path("c")).unwrap();
    let writer = w.open(Access::Write).await;
    assert!(!writer.status(source)[1].up);
    let copied = writer.replicate_to("c", source).await.unwrap();
    assert_eq!((copied.records, copied.objects), (4, 3));
    assert_eq!(writer.replicate_to("c", source).await.unwrap().records, 0);
    assert!(writer.status(source)[1].up);
    // A damaged original is not spread.
    std::fs::remove_file(w.record("c", source, 3)).unwrap();
    std::fs::remove_file(w.file("c", &large)).unwrap();
    flip(&w.file("a", &large), 10 << 20);
    let writer = w.open(Access::Write).await;
    assert_eq!(writer.replicate_to("c", source).await.unwrap_err().kind(), Kind::Verification);
    assert!(!w.file("c", &large).exists() && !w.record("c", source, 3).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_store_that_is_away_makes_writers_wait() {
    let w = World::new(&[("a", true), ("b", true)]);
    let (source, objects) = three_records(&w).await;
    let repo = w.open(Access::Write).await;
    let mut log = Log::open(&repo, source, None).await.unwrap();
    log.level().await.unwrap();
    std::fs::rename(w.path("b"), w.path("away")).unwrap();
    let append = log.append(draft(3, 4, Body::Idle));
    tokio::pin!(append);
    assert!(tokio::time::timeout(Duration::from_millis(1500), &mut append).await.is_err());
    let b = &repo.status(source)[1];
    assert!(!b.up && b.last_error.is_some() && b.durable_lsn == Some(Lsn(3)), "{b:?}");
    assert!(!w.path("b").exists(), "nothing is written where the store was");
    // Readers go on with the other one when they name it; new writers do not start.
    let reader = w.open(Access::Read).await;
    let e = Log::open(&reader, source, None).await.err().unwrap();
    assert_eq!(e.kind(), Kind::Unreachable, "{e}");
    assert_eq!(Log::open(&reader, source, Some("a")).await.unwrap().records().len(), 4);
    assert!(read_back(&reader, &objects[0], None).await.is_ok());
    assert_eq!(read_back(&reader, &objects[0], Some("b")).await.unwrap_err().kind(), Kind::Unreachable);
    assert_eq!(w.try_open(Access::Write).await.unwrap_err().kind(), Kind::Unreachable);
    std::fs::rename(w.path("away"), w.path("b")).unwrap();
    append.await.unwrap();
    assert!(repo.status(source)[1].up);
    assert_eq!(Log::open(&w.open(Access::Read).await, source, None).await.unwrap().records().len(), 4);
}

fn flip(file: &Path, at: usize) {
    let mut b = std::fs::read(file).unwrap();
    let at = at.min(b.len() - 1);
    b[at] ^= 4;
    std::fs::write(file, b).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_done_to_the_log_is_found() {
    let w = World::new(&[("a", true)]);
    let (source, _) = three_records(&w).await;
    let repo = w.open(Access::Read).await;
    let records: Vec<_> = (0..3).map(|n| w.record("a", source, n)).collect();
    let good: Vec<_> = records.iter().map(|p| std::fs::read(p).unwrap()).collect();
    let failing = async |what: &str, code: &str| {
        let e = Log::open(&repo, source, None).await.err().unwrap_or_else(|| panic!("{what} went unnoticed"));
        assert_eq!(e.kind(), Kind::Verification, "{what}: {e}");
        assert!(e.is_code(code), "{what}: {e}");
        assert!(e.to_string().contains("/log/0"), "{what}: {e}");
        for (p, b) in records.iter().zip(&good) {
            std::fs::write(p, b).unwrap();
        }
    };
    for n in 0..3 {
        for at in [0, 20, 100, 150, 170, 1_000_000] {
            flip(&records[n], at);
            let e = Log::open(&repo, source, None).await.err().unwrap();
            assert!(matches!(e.kind(), Kind::Verification | Kind::Key), "{e}");
            std::fs::write(&records[n], &good[n]).unwrap();
        }
        std::fs::write(&records[n], &good[n][..good[n].len() - 1]).unwrap();
        failing("a cut record", "corrupt").await;
    }
    std::fs::write(&records[1], &good[2]).unwrap();
    std::fs::write(&records[2], &good[1]).unwrap();
    failing("swapped records", "replayed").await;
    std::fs::remove_file(&records[1]).unwrap();
    failing("a missing record", "chain_gap").await;
    // A record of the right number, sealed under the right key, of another history.
    let key = repo.keyring().repository_key();
    let mut forged = (**Log::open(&repo, source, None).await.unwrap().last().unwrap()).clone();
    forged.prev = Some("00".into());
    let header = Header {
        kind: ObjectKind::Log,
        codec: Codec::None,
        tenant: repo.uid(),
        object: random::uuid(),
        source,
        system_identifier: 77,
        timeline: 1,
        lsn_start: Lsn(2),
        lsn_end: Lsn(3),
        key_version: 1,
    };
    let mut s = crate::crypto::Sealer::new(Vec::new(), &header, &key).unwrap();
    s.write_all(&serde_json::to_vec(&forged).unwrap()).unwrap();
    std::fs::write(&records[2], s.finish().unwrap().0).unwrap();
    failing("another history", "chain_gap").await;
    Log::open(&repo, source, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_done_to_an_object_is_found() {
    let w = World::new(&[("a", true), ("b", true)]);
    let (_, objects) = three_records(&w).await;
    let repo = w.open(Access::Read).await;
    let file = w.file("a", &objects[0]);
    let good = std::fs::read(&file).unwrap();
    let failing = async |what: &str, code: &str| {
        for e in [
            read_back(&repo, &objects[0], None).await.expect_err(what),
            repo.open_small(&objects[0], None).await.expect_err(what),
        ] {
            assert!(e.kind() == Kind::Verification && e.is_code(code), "{what}: {e}");
            assert!(e.to_string().contains(&objects[0].path), "{what}: {e}");
        }
    };
    for at in [0, 8, 40, 130, 165, 500, 1_000_000] {
        flip(&file, at);
        let e = read_back(&repo, &objects[0], None).await.expect_err("a flipped bit");
        assert!(matches!(e.kind(), Kind::Verification | Kind::Key), "{e}");
        assert!(e.to_string().contains(&objects[0].path), "{e}");
        std::fs::write(&file, &good).unwrap();
    }
    for n in [0, 1, good.len() - 1] {
        std::fs::write(&file, &good[..n]).unwrap();
        failing("a cut object", "corrupt").await;
    }
    std::fs::write(&file, std::fs::read(w.file("a", &objects[1])).unwrap()).unwrap();
    let e = read_back(&repo, &objects[0], None).await.expect_err("another tenant's object");
    assert_eq!(e.kind(), Kind::Verification, "{e}");
    std::fs::remove_file(&file).unwrap();
    failing("a missing object", "missing").await;
    assert!(read_back(&repo, &objects[0], Some("b")).await.is_ok());
}

/// Records of a source's log: objects of their own and packs, by store.
fn log_files(w: &World, store: &str, source: Uuid) -> (usize, usize) {
    let below = |folder: String| files_below(&w.path(store).join(folder)).len();
    (below(paths::log_dir(source)), below(paths::packs_dir(source)))
}

async fn idle_upto(log: &mut Log, end: u64) {
    for n in log.last().map_or(0, |r| r.n + 1)..end {
        log.append(draft(n, n + 1, if n == 0 { Body::Init } else { Body::Idle })).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_are_read_as_the_records_they_were_made_of() {
    const PACK: u64 = 1024;
    let w = World::new(&[("a", true), ("b", true), ("c", false)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let mut log = Log::open(&repo, source, None).await.unwrap();
    idle_upto(&mut log, 1000).await;
    let stood_still = w.open(Access::Write).await;
    let mut stale = Log::open(&stood_still, source, None).await.unwrap();
    stale.level().await.unwrap();
    idle_upto(&mut log, 2 * PACK).await;
    let before: Vec<_> = log.records().to_vec();
    for m in &repo.members[..2] {
        // The newest record is never packed.
        let packed = repo.pack_log_of(m, source, 2 * PACK).await.unwrap();
        assert_eq!((packed.packs, packed.removed), (1, PACK));
    }
    idle_upto(&mut log, 2 * PACK + 50).await;
    for m in &repo.members[..2] {
        let packed = repo.pack_log_of(m, source, 2 * PACK + 50).await.unwrap();
        assert_eq!((packed.packs, packed.removed), (1, PACK));
        assert_eq!(repo.pack_log_of(m, source, 2 * PACK + 50).await.unwrap(), Packed::default());
    }
    for from in [None, Some("a"), Some("b")] {
        let again = Log::open(&repo, source, from).await.unwrap();
        assert_eq!(again.records()[..before.len()], before[..]);
        assert_eq!(again.records().len() as u64, 2 * PACK + 50);
        assert_eq!(again.names().len(), if from.is_some() { 52 } else { 0 });
    }
    assert_eq!(log_files(&w, "a", source), (50, 2));

    // The numbers are taken, packed away or not.
    let e = stale.append(draft(1000, 1001, Body::Idle)).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Fenced);
    assert!(e.to_string().contains("written long ago"), "{e}");
    assert_eq!(stale.append(draft(1000, 1001, Body::Idle)).await.unwrap_err().kind(), Kind::Fenced);
    let again = Log::open(&repo, source, None).await.unwrap();
    assert_eq!(again.records()[1000], before[1000]);
    assert!(!w.record("a", source, 1000).exists(), "nothing of it is left");
    std::fs::write(w.record("a", source, 1000), "left over nevertheless").unwrap();
    log.append(draft(2 * PACK + 50, 2 * PACK + 51, Body::Idle)).await.unwrap();

    // A store that has nothing yet gets packs; one that has some of a pack's records gets those that it lacks.
    let copied = repo.replicate_to("c", source).await.unwrap();
    assert_eq!(copied.records, 2 * PACK + 51);
    assert_eq!(log_files(&w, "c", source), (51, 2));
    assert_eq!(Log::open(&repo, source, Some("c")).await.unwrap().records().len() as u64, 2 * PACK + 51);
    std::fs::remove_dir_all(w.path("b").join(paths::packs_dir(source))).unwrap();
    std::fs::remove_dir_all(w.path("c").join(paths::packs_dir(source))).unwrap();
    let some = w.path("b").join(paths::log_record(source, 3));
    let third = packs::record(&repo.members[0].store, source, 3).await.unwrap();
    std::fs::write(some, third).unwrap();
    let writer = w.open(Access::Write).await;
    let mut log = Log::open(&writer, source, None).await.unwrap();
    log.level().await.unwrap();
    assert_eq!(log_files(&w, "b", source), (PACK as usize + 51, 1));
    std::fs::remove_file(w.record("a", source, 1000)).unwrap();
    assert_eq!(Log::open(&repo, source, Some("b")).await.unwrap().records().len() as u64, 2 * PACK + 51);
}

#[tokio::test(flavor = "multi_thread")]
async fn packing_goes_on_where_it_was_cut_off_and_takes_nothing_that_differs() {
    const PACK: u64 = 1024;
    let w = World::new(&[("a", true), ("b", true)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let mut log = Log::open(&repo, source, None).await.unwrap();
    idle_upto(&mut log, PACK + 10).await;
    let (a, b) = (&repo.members[0], &repo.members[1]);

    // A reader that listed the records before they were packed away.
    let reader = w.open(Access::Read).await;
    let listed = log::copies(&reader, source, Some("a")).await.unwrap();
    repo.pack_log_of(a, source, PACK + 10).await.unwrap();
    let mut late = Log::open(&reader, source, Some("b")).await.unwrap();
    late.read(&listed).await.unwrap();
    assert_eq!(late.records().len() as u64, PACK + 10);

    // Cut off after the pack, and in the middle of the removal.
    let bytes = std::fs::read(w.path("a").join(paths::pack(source, &(0..PACK)))).unwrap();
    b.store.create(&paths::pack(source, &(0..PACK)), bytes.clone().into()).await.unwrap();
    for n in 5..100 {
        std::fs::remove_file(w.record("b", source, n)).unwrap();
    }
    assert_eq!(Log::open(&repo, source, Some("b")).await.unwrap().records().len() as u64, PACK + 10);
    let packed = repo.pack_log_of(b, source, PACK + 10).await.unwrap();
    assert_eq!((packed.packs, packed.removed), (0, PACK - 95));
    assert_eq!(log_files(&w, "b", source), (10, 1));

    // A pack that is damaged is told by its name, and nothing is removed for its sake.
    let mut bad = bytes.clone();
    bad[bytes.len() / 2] ^= 1;
    std::fs::write(w.path("b").join(paths::pack(source, &(0..PACK))), &bad).unwrap();
    let e = Log::open(&repo, source, Some("b")).await.err().unwrap();
    assert!(e.kind() == Kind::Verification && e.to_string().contains("/packs/00000000000000000000-1024"), "{e}");
    assert_eq!(Log::open(&repo, source, Some("a")).await.unwrap().records().len() as u64, PACK + 10);
    let n = (0..PACK).find(|n| {
        let own = decoded(&bytes, *n);
        std::fs::write(w.record("b", source, *n), &own).unwrap();
        let differs = decoded(&bad, *n) != own;
        if !differs {
            std::fs::remove_file(w.record("b", source, *n)).unwrap();
        }
        differs
    });
    let n = n.expect("one record is damaged");
    assert!(repo.pack_log_of(b, source, PACK + 10).await.is_err());
    assert!(w.record("b", source, n).exists());
}

/// The object of record `n` in a pack that begins with record 0.
fn decoded(pack: &[u8], n: u64) -> Vec<u8> {
    let mut rest = pack;
    for i in 0.. {
        let (len, after) = rest.split_first_chunk::<4>().unwrap();
        let (record, after) = after.split_at(u32::from_le_bytes(*len) as usize);
        if i == n {
            return record.to_vec();
        }
        rest = after;
    }
    unreachable!("the pack is endless")
}

/// `cargo test --release -p coffer --lib repository::tests::speed -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn speed() {
    let w = World::new(&[("a", true)]);
    let repo = w.init().await;
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let object = object(&repo, source, "acme", noise(1000)).await;
    let mut log = Log::open(&repo, source, None).await.unwrap();
    let at = Instant::now();
    for n in 0..10_000 {
        log.append(draft(n, n + 1, ship(vec![object.clone(); 20]))).await.unwrap();
    }
    println!("append: {:.2} ms each", at.elapsed().as_secs_f64() / 10.0);
    let at = Instant::now();
    assert_eq!(Log::open(&repo, source, None).await.unwrap().records().len(), 10_000);
    println!("10,000 records of 20 objects read in {:.2} s", at.elapsed().as_secs_f64());
    let at = Instant::now();
    let bytes = Bytes::from(noise(4096));
    let puts = (0..2000).map(|_| repo.put_owned(format!("s/x/{}", random::uuid().simple()), bytes.clone()));
    futures::StreamExt::collect::<Vec<_>>(futures::StreamExt::buffer_unordered(futures::stream::iter(puts), 32)).await;
    println!("2,000 objects of 4 KiB, 32 at a time: {:.2} s", at.elapsed().as_secs_f64());
}

impl Repository {
    async fn put_owned(&self, path: String, bytes: Bytes) {
        self.put(&path, bytes).await.unwrap();
    }
}
