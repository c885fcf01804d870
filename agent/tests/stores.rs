//! One contract for every kind of store: local directories, and a real S3 server (SeaweedFS) that is started here.
//!
//! The server's program is `$COFFER_WEED`, else `target/tools/py/bin/weed`. Without it the S3 half is skipped, loudly;
//! with `COFFER_TEST_S3=required` its absence is a failure.

use bytes::Bytes;
use coffer::clock::SystemClock;
use coffer::config::Config;
use coffer::crypto::{Codec, Header, KeySource, ObjectKind, random};
use coffer::error::{Error, Kind, Result};
use coffer::keyring::{Kek, Keyring};
use coffer::repository::model::Ship;
use coffer::repository::{
    Access, Body, Created, Directory, Draft, Log, ObjectRef, Repository, Store, connect, paths, probe,
};
use coffer::tenant::Tenant;
use coffer_wire::Lsn;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use uuid::Uuid;

const ACCESS_KEY: &str = "storesaccess";
const SECRET_KEY: &str = "storessecret";

/// SeaweedFS on the loopback.
struct Weed {
    program: PathBuf,
    dir: tempfile::TempDir,
    ports: Vec<u16>,
    child: Option<Child>,
}

impl Weed {
    fn start() -> Option<Self> {
        let program = std::env::var_os("COFFER_WEED")
            .map(PathBuf::from)
            .unwrap_or_else(|| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/py/bin/weed"));
        if !program.exists() {
            let required = std::env::var("COFFER_TEST_S3").is_ok_and(|v| v == "required");
            assert!(!required, "COFFER_TEST_S3=required, but there is no {}", program.display());
            eprintln!("SKIPPED: no S3 server at {}; `make setup` brings it", program.display());
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let config = serde_json::json!({"identities": [{"name": "coffer",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]});
        std::fs::write(dir.path().join("s3.json"), config.to_string()).unwrap();
        let listeners: Vec<_> = (0..8).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports = listeners.iter().map(|l| l.local_addr().unwrap().port()).collect();
        drop(listeners);
        let mut weed = Self { program, dir, ports, child: None };
        weed.up();
        Some(weed)
    }

    fn up(&mut self) {
        let log = std::fs::File::create(self.dir.path().join("log")).unwrap();
        let p = &self.ports;
        let mut command = Command::new(&self.program);
        command.args(["-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=1000"]);
        command.args(["-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=1", "-master.telemetry=false", "-s3"]);
        command.args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]);
        command.arg(format!("-dir={}", self.dir.path().join("data").display()));
        command.arg(format!("-s3.config={}", self.dir.path().join("s3.json").display()));
        for (i, flag) in ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"].iter().enumerate() {
            command.arg(format!("-{flag}={}", p[i]));
        }
        for (i, flag) in ["filer.port", "filer.port.grpc", "s3.port.grpc", "s3.port"].iter().enumerate() {
            command.arg(format!("-{flag}={}", p[i + 4]));
        }
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        let started = Instant::now();
        while !self.answers() {
            assert!(started.elapsed() < Duration::from_secs(120), "SeaweedFS does not answer");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn answers(&self) -> bool {
        let Ok(mut s) = TcpStream::connect(("127.0.0.1", self.ports[7])) else { return false };
        let _ = s.set_read_timeout(Some(Duration::from_secs(2)));
        let mut head = [0; 12];
        s.write_all(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n").is_ok()
            && s.read_exact(&mut head).is_ok()
            && head.ends_with(b"403")
    }

    fn bucket(&self, name: &str) {
        let mut shell = Command::new(&self.program)
            .args(["shell", &format!("-master=127.0.0.1:{}.{}", self.ports[0], self.ports[1])])
            .arg(format!("-filer=127.0.0.1:{}.{}", self.ports[4], self.ports[5]))
            .current_dir(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        shell.stdin.take().unwrap().write_all(format!("s3.bucket.create -name {name}\n").as_bytes()).unwrap();
        let out = shell.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("create"), "{said}");
    }

    fn url(&self, bucket: &str, secret: &str) -> String {
        format!(
            "s3://{bucket}/some/prefix?region=us-east-1&endpoint=http://127.0.0.1:{}&access_key_id={ACCESS_KEY}\
             &secret_access_key={secret}",
            self.ports[7]
        )
    }

    fn kill9(&mut self) {
        if let Some(mut c) = self.child.take() {
            c.kill().unwrap();
            c.wait().unwrap();
        }
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.signal("-CONT");
            self.kill9();
        }
    }
}

fn noise(n: usize) -> Bytes {
    let mut b = vec![0; n];
    random::fill(&mut b);
    b.into()
}

/// What every store must do.
async fn contract(store: &Arc<Store>) {
    probe(store).await.unwrap();
    assert!(store.list("probe").await.unwrap().is_empty(), "the trial leaves nothing");
    assert_eq!(store.get("s/none").await.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(store.get_opt("s/none").await.unwrap(), None);
    assert_eq!(store.size("s/none").await.unwrap(), None);
    assert!(store.list("s").await.unwrap().is_empty());
    store.delete("s/none").await.unwrap();

    for n in [0, 1, 5 << 20] {
        let (path, bytes) = (format!("s/size/{n:08}"), noise(n));
        store.put(&path, bytes.clone()).await.unwrap();
        assert!(store.get(&path).await.unwrap() == bytes);
        assert_eq!(store.size(&path).await.unwrap(), Some(n as u64));
    }
    let bytes = store.get("s/size/05242880").await.unwrap();
    let (part, size) = store.get_range("s/size/05242880", 1000..2000).await.unwrap();
    assert_eq!((&part[..], size), (&bytes[1000..2000], 5 << 20));
    let listed = store.list("s/size").await.unwrap();
    assert_eq!(
        listed.iter().map(|(n, s)| (n.as_str(), *s)).collect::<Vec<_>>(),
        [("s/size/00000000", 0), ("s/size/00000001", 1), ("s/size/05242880", 5 << 20)]
    );
    let after = store.list_after("s/size", "s/size/00000001").await.unwrap();
    assert_eq!(after.len(), 1);
    store.delete("s/size/00000001").await.unwrap();
    assert_eq!(store.get_opt("s/size/00000001").await.unwrap(), None);

    assert_eq!(store.create("s/n/1", "ours".into()).await.unwrap(), Created::Won);
    assert_eq!(
        store.create("s/n/1", "ours".into()).await.unwrap(),
        Created::Won,
        "the same bytes again: a lost answer"
    );
    assert_eq!(store.create("s/n/1", "theirs".into()).await.unwrap(), Created::Lost("ours".into()));
    assert_eq!(&store.get("s/n/1").await.unwrap()[..], b"ours");
    for n in 0..5 {
        let path = format!("s/race/{n}");
        let racers = (0..24).map(|i| {
            let (store, path) = (store.clone(), path.clone());
            tokio::spawn(async move { store.create(&path, format!("racer {i}").into()).await.unwrap() })
        });
        let outcomes = futures::future::join_all(racers).await;
        let won = outcomes.iter().filter(|o| matches!(o, Ok(Created::Won))).count();
        assert_eq!(won, 1, "race {n}: {outcomes:?}");
    }
}

struct World {
    dir: tempfile::TempDir,
    config: Config,
}

impl World {
    /// The keyring's second place and the stores by URL.
    fn new(stores: &[(&str, String, bool)], second_place: Option<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        let second = second_place.map(|u| format!(", \"{u}\"")).unwrap_or_default();
        let mut text = format!(
            "[keys]\nprovider = \"file\"\npath = \"{root}/kek\"\nkeyring = [\"file://{root}/keyring\"{second}]\n"
        );
        for (name, url, required) in stores {
            let url = url.replace("$DIR", &root.to_string());
            text.push_str(&format!("[[store]]\nname = \"{name}\"\nurl = \"{url}\"\nrequired = {required}\n"));
        }
        Self { config: Config::from_text(&text, std::iter::empty()).unwrap(), dir }
    }

    async fn init(&self) {
        coffer::commands::init::run(&self.config, true, true).await.unwrap();
        assert!(self.dir.path().join("kek").exists());
        let again = coffer::commands::init::run(&self.config, false, true).await.unwrap_err();
        assert_eq!(again.kind(), Kind::Refused);
    }

    async fn open(&self, access: Access) -> Result<Arc<Repository>> {
        let clock = Arc::new(SystemClock);
        let keyring = Keyring::open(&self.config.keys, clock.clone()).await?;
        Repository::open(&self.config, keyring, clock, access).await
    }
}

fn draft(from: u64, upto: u64, body: Body) -> Draft {
    Draft {
        system_identifier: 77,
        timeline: 1,
        slot: "coffer_shop".into(),
        from_lsn: Lsn(from),
        upto_lsn: Lsn(upto),
        upto_time_us: 0,
        body,
    }
}

async fn object(repo: &Arc<Repository>, source: Uuid, plain: Bytes) -> ObjectRef {
    let entry = repo.keyring().ensure(source, &Tenant::normal("acme")).await.unwrap();
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
        let path = paths::changeset(source, entry.uid, Lsn(2), header.object);
        let key = repo.keyring().key(entry.key_id()).unwrap();
        repo.seal_to(rt, path, &header, &key, |s| {
            s.write_all(&plain).map(|()| 1).map_err(|e| Error::other(e.to_string()))
        })
        .unwrap()
    })
    .await
    .unwrap()
}

async fn read_back(repo: &Arc<Repository>, r: &ObjectRef, from: Option<&'static str>) -> Result<Vec<u8>> {
    let (repo, rt, r) = (repo.clone(), Handle::current(), r.clone());
    tokio::task::spawn_blocking(move || repo.open_object(&rt, &r, from)?.read_all()).await.unwrap()
}

fn ship(objects: Vec<ObjectRef>) -> Body {
    Body::Ship(Ship { txns: 1, objects, ..Ship::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn local_directories_keep_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    // Characters that a URL or a store might make something else of.
    for name in ["plain", "with space", "ünïcode", "percent%41"] {
        let url = url::Url::from_directory_path(dir.path().join(name)).unwrap();
        contract(&Arc::new(connect("x", url.as_str(), true, Directory::Make).unwrap())).await;
        assert!(dir.path().join(name).join("s/n/1").exists(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_s3_server_keeps_the_contract() {
    let Some(mut weed) = Weed::start() else { return };
    for bucket in ["contract", "region-eu", "region-us", "keyring"] {
        weed.bucket(bucket);
    }
    let store = |url: &str| Arc::new(connect("x", url, true, Directory::MustExist).unwrap());
    contract(&store(&weed.url("contract", SECRET_KEY))).await;
    refusals(&weed).await;
    two_regions(&mut weed).await;
}

/// Wrong credentials, no bucket, nobody there, a black hole: each says what it is, and in time.
async fn refusals(weed: &Weed) {
    let store = |url: &str| connect("x", url, true, Directory::MustExist).unwrap();
    let denied = store(&weed.url("contract", "wrong"));
    for e in [denied.get("s/n/1").await.unwrap_err(), denied.create("s/n/9", "x".into()).await.unwrap_err()] {
        assert!(e.kind() == Kind::Unreachable && e.is_code("store_denied"), "{e}");
        assert!(!e.to_string().contains("wrong"), "no secret in {e}");
    }
    let nowhere = store(&weed.url("nobucket", SECRET_KEY));
    let e = nowhere.put("s/x", "x".into()).await.unwrap_err();
    assert!(e.kind() == Kind::Unreachable && e.is_code("store_missing"), "{e}");

    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nobody =
        store(&format!("s3://b?region=x&endpoint=http://127.0.0.1:{free}&access_key_id=a&secret_access_key=b"));
    let at = Instant::now();
    assert_eq!(nobody.get("s/x").await.unwrap_err().kind(), Kind::Unreachable);
    assert_eq!(nobody.create("s/x", "x".into()).await.unwrap_err().kind(), Kind::Unreachable);
    assert!(at.elapsed() < Duration::from_secs(20), "{:?}", at.elapsed());
    assert!(nobody.health().down_since.is_some());

    let frozen = store(&weed.url("contract", SECRET_KEY));
    weed.signal("-STOP");
    let at = Instant::now();
    let e = frozen.get("s/n/1").await;
    weed.signal("-CONT");
    assert_eq!(e.unwrap_err().kind(), Kind::Unreachable);
    assert!(at.elapsed() < Duration::from_secs(100), "{:?}", at.elapsed());
    frozen.get("s/n/1").await.unwrap();
    assert!(frozen.health().down_since.is_none());
}

/// A required local store and an optional S3 store that dies and comes back; then both the other way round.
async fn two_regions(weed: &mut Weed) {
    let w = World::new(
        &[
            ("eu", weed.url("region-eu", SECRET_KEY), true),
            ("disk", "file://$DIR/disk".into(), true),
            ("us", weed.url("region-us", SECRET_KEY), false),
        ],
        Some(weed.url("keyring", SECRET_KEY)),
    );
    w.init().await;
    let repo = w.open(Access::Write).await.unwrap();
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    let plain = noise(30 << 20);
    let at = Instant::now();
    let large = object(&repo, source, plain.clone()).await;
    println!("30 MiB sealed into S3 and a directory: {:.2} s", at.elapsed().as_secs_f64());
    let small = object(&repo, source, "a few rows".into()).await;
    let mut log = Log::open(&repo, source, None).await.unwrap();
    log.append(draft(0, 1, Body::Init)).await.unwrap();
    log.append(draft(1, 2, ship(vec![large.clone(), small.clone()]))).await.unwrap();
    for from in [None, Some("eu"), Some("disk")] {
        assert!(read_back(&repo, &large, from).await.unwrap() == plain);
        assert_eq!(read_back(&repo, &small, from).await.unwrap(), b"a few rows");
    }
    assert_eq!(repo.replicate_to("us", source).await.unwrap().objects, 2);
    assert!(read_back(&repo, &large, Some("us")).await.unwrap() == plain);

    let mut rival = Log::open(&w.open(Access::Write).await.unwrap(), source, None).await.unwrap();
    for n in 2..40 {
        log.append(draft(n, n + 1, Body::Idle)).await.unwrap();
    }
    assert_eq!(rival.append(draft(2, 9, Body::Idle)).await.unwrap_err().kind(), Kind::Fenced);

    // The server dies in the middle; the append waits for it and goes on.
    weed.kill9();
    let append = log.append(draft(40, 41, Body::Idle));
    tokio::pin!(append);
    assert!(tokio::time::timeout(Duration::from_secs(3), &mut append).await.is_err());
    assert_eq!(w.open(Access::Write).await.unwrap_err().kind(), Kind::Unreachable);
    let reader = w.open(Access::Read).await.unwrap();
    assert!(Log::open(&reader, source, None).await.is_err());
    assert_eq!(Log::open(&reader, source, Some("disk")).await.unwrap().records().len(), 40);
    assert!(read_back(&reader, &large, None).await.unwrap() == plain, "the other store serves");
    weed.up();
    append.await.unwrap();
    let reader = w.open(Access::Read).await.unwrap();
    let at = Instant::now();
    assert_eq!(Log::open(&reader, source, None).await.unwrap().records().len(), 41);
    println!("41 records read in {:.3} s", at.elapsed().as_secs_f64());
    assert_eq!(reader.keyring().tenants(source).len(), 1);
    assert_eq!(repo.replicate_to("us", source).await.unwrap().records, 39);
    assert_eq!(Log::open(&reader, source, Some("us")).await.unwrap().upto_lsn(), Some(Lsn(41)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kek_in_the_environment_serves_as_well() {
    let mut w = World::new(&[("a", "file://$DIR/a".into(), true)], None);
    w.config.keys.provider = coffer::config::ProviderKind::Command;
    w.config.keys.command =
        ["sh", "-c", "echo QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI="].map(String::from).to_vec();
    assert!(Kek::load(&w.config.keys).await.is_ok());
    let keyring = Keyring::create(&w.config.keys, Arc::new(SystemClock)).await.unwrap();
    Repository::create(&w.config, keyring, Arc::new(SystemClock)).await.unwrap();
    assert!(w.open(Access::Write).await.is_ok());
}
