//! The keyring over local directories: several places, two agents, wrong keys, altered entries.

use super::*;
use crate::clock::SystemClock;
use coffer_wire::TenantKind;
use std::path::{Path, PathBuf};

struct World {
    dir: tempfile::TempDir,
    config: KeysConfig,
}

impl World {
    fn new(places: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: String| dir.path().join(name);
        let config = KeysConfig {
            provider: crate::config::ProviderKind::File,
            path: Some(at("kek".into())),
            variable: None,
            command: Vec::new(),
            keyring: (1..=places).map(|i| format!("file://{}", at(format!("k{i}")).display())).collect(),
        };
        Kek::create_file(&config).unwrap();
        Self { dir, config }
    }

    fn place(&self, i: usize) -> PathBuf {
        self.dir.path().join(format!("k{i}"))
    }

    async fn create(&self) -> Arc<Keyring> {
        Keyring::create(&self.config, Arc::new(SystemClock)).await.unwrap()
    }

    async fn try_open(&self) -> Result<Arc<Keyring>> {
        Keyring::open(&self.config, Arc::new(SystemClock)).await
    }

    async fn open(&self) -> Arc<Keyring> {
        self.try_open().await.unwrap()
    }
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for e in std::fs::read_dir(from).unwrap().flatten() {
        match e.path().is_dir() {
            true => copy_dir(&e.path(), &to.join(e.file_name())),
            false => drop(std::fs::copy(e.path(), to.join(e.file_name())).unwrap()),
        }
    }
}

fn entry_file(place: &Path, uid: Uuid) -> PathBuf {
    place.join(paths::key_entry(uid, 1))
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_and_sources_keep_their_uids_and_keys() {
    let w = World::new(2);
    let k = w.create().await;
    let shop = k.ensure_source("shop").await.unwrap();
    let other = k.ensure_source("other").await.unwrap();
    assert_ne!(shop, other);
    let acme = k.ensure(shop, &Tenant::normal("acme")).await.unwrap();
    let reserved = k.ensure(shop, &Tenant::reserved(TenantKind::Unassigned)).await.unwrap();
    let empty = k.ensure(shop, &Tenant::normal("")).await.unwrap();
    let elsewhere = k.ensure(other, &Tenant::normal("acme")).await.unwrap();
    let uids: std::collections::BTreeSet<_> = [&acme, &reserved, &empty, &elsewhere].map(|e| e.uid).into();
    assert_eq!(uids.len(), 4);
    let secret = *k.key(acme.key_id()).unwrap().secret();

    let k2 = w.open().await;
    assert_eq!(k2.repository_uid(), k.repository_uid());
    assert_eq!(k2.repository_key().secret(), k.repository_key().secret());
    assert_eq!(k2.source("shop"), Some(shop));
    assert_eq!(k2.find(shop, &Tenant::normal("acme")), Some(acme.clone()));
    assert_eq!(k2.ensure(shop, &Tenant::normal("acme")).await.unwrap(), acme);
    assert_eq!(k2.by_uid(acme.uid), Some(acme.clone()));
    assert_eq!(k2.key(acme.key_id()).unwrap().secret(), &secret);
    assert_eq!(k2.tenants(shop).len(), 3);
    assert_eq!(k2.find(shop, &Tenant::normal("nobody")), None);
    let unknown = KeyId { uid: Uuid::from_u128(1), version: 1 };
    assert_eq!(k2.key(unknown).unwrap_err().kind(), Kind::Key);

    // Another agent's tenant is learned on request.
    let late = k2.ensure(shop, &Tenant::normal("late")).await.unwrap();
    assert!(k.key(late.key_id()).is_err());
    k.refresh().await.unwrap();
    assert_eq!(k.key(late.key_id()).unwrap().secret(), k2.key(late.key_id()).unwrap().secret());
    assert_eq!(k.find(shop, &Tenant::normal("late")), Some(late));
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_meet_a_tenant_at_once_agree_on_its_key() {
    let w = World::new(2);
    let source = w.create().await.ensure_source("shop").await.unwrap();
    let mut agents = Vec::new();
    for _ in 0..6 {
        agents.push(w.open().await);
    }
    let tenants: Vec<Tenant> = (0..20).map(|n| Tenant::normal(format!("t{n}"))).collect();
    let all = futures::future::try_join_all(agents.iter().map(|k| k.ensure_all(source, &tenants))).await.unwrap();
    for (k, entries) in agents.iter().zip(&all) {
        assert_eq!(entries, &all[0]);
        for (e, t) in entries.iter().zip(&tenants) {
            assert_eq!(&e.tenant, t);
            assert_eq!(k.key(e.key_id()).unwrap().secret(), agents[0].key(e.key_id()).unwrap().secret());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_keyring_is_never_replaced() {
    let w = World::new(2);
    let k = w.create().await;
    let again = Keyring::create(&w.config, Arc::new(SystemClock)).await.unwrap_err();
    assert_eq!(again.kind(), Kind::Refused);
    assert_eq!(Keyring::refuse_existing(&w.config).await.unwrap_err().kind(), Kind::Refused);
    assert_eq!(w.open().await.repository_uid(), k.repository_uid());
    k.take_back().await;
    Keyring::refuse_existing(&w.config).await.unwrap();
    assert_eq!(w.try_open().await.unwrap_err().kind(), Kind::Key);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_kek_says_so() {
    let w = World::new(1);
    w.create().await;
    let kek = w.dir.path().join("kek");
    std::fs::remove_file(&kek).unwrap();
    assert_eq!(w.try_open().await.unwrap_err().kind(), Kind::Key);
    Kek::create_file(&w.config).unwrap();
    let e = w.try_open().await.unwrap_err();
    assert!(e.kind() == Kind::Key && e.is_code("wrong_kek"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_lacks_entries_gets_them() {
    let w = World::new(2);
    let k = w.create().await;
    let source = k.ensure_source("shop").await.unwrap();
    let acme = k.ensure(source, &Tenant::normal("acme")).await.unwrap();
    std::fs::remove_file(entry_file(&w.place(2), acme.uid)).unwrap();
    w.open().await;
    assert!(entry_file(&w.place(2), acme.uid).exists());
    // A new disk in place of the first.
    std::fs::remove_dir_all(w.place(1)).unwrap();
    std::fs::create_dir(w.place(1)).unwrap();
    let k = w.open().await;
    assert_eq!(k.find(source, &Tenant::normal("acme")), Some(acme.clone()));
    assert!(entry_file(&w.place(1), acme.uid).exists());
    std::fs::remove_dir_all(w.place(2)).unwrap();
    std::fs::rename(w.place(1), w.place(2)).unwrap();
    std::fs::create_dir(w.place(1)).unwrap();
    assert_eq!(w.open().await.repository_uid(), k.repository_uid());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_is_away_blocks_new_keys_only_and_is_taken_back() {
    let w = World::new(2);
    let k = w.create().await;
    let source = k.ensure_source("shop").await.unwrap();
    let acme = k.ensure(source, &Tenant::normal("acme")).await.unwrap();
    let away = w.dir.path().join("away");
    std::fs::rename(w.place(2), &away).unwrap();
    let e = k.ensure(source, &Tenant::normal("new")).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Unreachable);
    let k = w.open().await;
    assert!(k.incomplete());
    assert_eq!(k.ensure(source, &Tenant::normal("acme")).await.unwrap(), acme);
    assert_eq!(k.ensure(source, &Tenant::normal("newer")).await.unwrap_err().kind(), Kind::Unreachable);
    assert!(!w.place(2).exists(), "nothing is written where the place was");
    std::fs::rename(&away, w.place(2)).unwrap();
    k.ensure(source, &Tenant::normal("newer")).await.unwrap();
    assert!(!k.incomplete());
    let new = k.ensure(source, &Tenant::normal("new")).await.unwrap();
    assert!(entry_file(&w.place(2), new.uid).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn places_that_differ_are_an_error_that_names_one() {
    let w = World::new(2);
    let k = w.create().await;
    let source = k.ensure_source("shop").await.unwrap();
    let acme = k.ensure(source, &Tenant::normal("acme")).await.unwrap();
    // The second place comes to hold a key of its own for the tenant: both were split once.
    let backup = w.dir.path().join("backup");
    copy_dir(&w.place(2), &backup);
    for i in [1, 2] {
        std::fs::remove_file(entry_file(&w.place(i), acme.uid)).unwrap();
    }
    w.open().await.ensure(source, &Tenant::normal("acme")).await.unwrap();
    std::fs::copy(entry_file(&backup, acme.uid), entry_file(&w.place(2), acme.uid)).unwrap();
    let e = w.try_open().await.unwrap_err();
    assert!(e.kind() == Kind::Key && e.to_string().contains("keyring-2"), "{e}");

    // A place of another keyring.
    let other = World::new(1);
    other.create().await;
    std::fs::remove_dir_all(w.place(2)).unwrap();
    copy_dir(&other.place(1), &w.place(2));
    let e = w.try_open().await.unwrap_err();
    assert!(e.is_code("keyring_differs"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn altered_moved_and_foreign_entries_are_refused() {
    let w = World::new(1);
    let k = w.create().await;
    let source = k.ensure_source("shop").await.unwrap();
    let a = k.ensure(source, &Tenant::normal("a")).await.unwrap();
    let b = k.ensure(source, &Tenant::normal("b")).await.unwrap();
    let (fa, fb) = (entry_file(&w.place(1), a.uid), entry_file(&w.place(1), b.uid));
    let (ba, bb) = (std::fs::read(&fa).unwrap(), std::fs::read(&fb).unwrap());
    std::fs::write(&fa, &bb).unwrap();
    assert_eq!(w.try_open().await.unwrap_err().kind(), Kind::Verification);
    std::fs::write(&fa, &ba[..ba.len() / 2]).unwrap();
    assert_eq!(w.try_open().await.unwrap_err().kind(), Kind::Verification);
    std::fs::write(&fa, &ba).unwrap();
    std::fs::write(fb.with_file_name("0000000001.bak"), &bb).unwrap();
    assert_eq!(w.try_open().await.unwrap_err().kind(), Kind::Key);
}

/// `cargo test --release -p coffer --lib keyring::tests::speed -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn speed() {
    let w = World::new(2);
    let k = w.create().await;
    let source = k.ensure_source("shop").await.unwrap();
    let tenants: Vec<Tenant> = (0..10_000).map(|n| Tenant::normal(format!("t{n}"))).collect();
    let at = std::time::Instant::now();
    k.ensure_all(source, &tenants).await.unwrap();
    println!("10,000 new tenants, two places: {:.1} s", at.elapsed().as_secs_f64());
    let at = std::time::Instant::now();
    assert_eq!(w.open().await.tenants(source).len(), 10_000);
    println!("open: {:.1} s", at.elapsed().as_secs_f64());
}
