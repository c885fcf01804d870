//! The repository over local directories: everything that needs no server.

use super::model::Ship;
use super::*;
use crate::clock::SystemClock;
use crate::crypto::{Codec, ObjectKind, random};
use crate::tenant::Tenant;
use std::io::{Read, Write};
use std::path::Path;
use tokio::runtime::Handle;

/// A repository in a temporary directory: `a` is the sequencer, `b` required, `c` optional.
struct World {
    dir: tempfile::TempDir,
    config: Config,
}

impl World {
    fn new(stores: &[(&str, bool)]) -> Self {
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

    fn path(&self, below: &str) -> std::path::PathBuf {
        self.dir.path().join(below)
    }

    async fn init(&self) -> Arc<Repository> {
        let clock = Arc::new(SystemClock);
        let keyring = Keyring::create(&self.config.keys, clock.clone()).await.unwrap();
        Repository::create(&self.config, keyring, clock).await.unwrap()
    }

    async fn try_open(&self, access: Access) -> Result<Arc<Repository>> {
        let clock = Arc::new(SystemClock);
        let keyring = Keyring::open(&self.config.keys, clock.clone()).await?;
        Repository::open(&self.config, keyring, clock, access).await
    }

    async fn open(&self, access: Access) -> Arc<Repository> {
        self.try_open(access).await.unwrap()
    }
}

fn draft(from: u64, upto: u64, body: Body) -> Draft {
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
async fn object(repo: &Arc<Repository>, source: Uuid, tenant: &str, plain: Vec<u8>) -> ObjectRef {
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

fn ship(objects: Vec<ObjectRef>) -> Body {
    Body::Ship(Ship { txns: 1, objects, ..Ship::default() })
}

fn noise(n: usize) -> Vec<u8> {
    let mut b = vec![0; n];
    random::fill(&mut b);
    b
}

fn files_below(p: &Path) -> Vec<std::path::PathBuf> {
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
