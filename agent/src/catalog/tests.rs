//! Catalogs over local directories.

use super::*;
use crate::repository::tests::{World, object};
use crate::repository::{Access, ObjectRef};
use crate::tenant::Tenant;

fn full(id: u128, objects: Vec<ObjectRef>) -> Entry {
    Entry::Full(FullEntry {
        id: Uuid::from_u128(id),
        trigger: "manual".into(),
        reason: None,
        point_lsn: Lsn(7),
        point_time_us: 5,
        log_n: 3,
        system_identifier: 1,
        timeline: 1,
        tables: Vec::new(),
        manifest: None,
        objects,
        schema: None,
        roles: None,
        sequences: Vec::new(),
        database: None,
        rows: 0,
        bytes: 0,
        read_back_us: None,
        archive: vec![],
    })
}

fn verified(n: u128) -> Entry {
    Entry::Verified { backup: Uuid::from_u128(n), ok: true, what: "read_back".into(), message: None }
}

async fn of(repo: &Arc<Repository>) -> (Uuid, Uuid) {
    let source = repo.keyring().ensure_source("shop").await.unwrap();
    (source, repo.keyring().ensure(source, &Tenant::normal("acme")).await.unwrap().uid)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_writers_lose_no_entry_and_every_store_has_all() {
    let w = World::new(&[("a", true), ("b", true), ("c", false)]);
    let repo = w.init().await;
    let (source, tenant) = of(&repo).await;
    let writer = |from: u128| {
        let repo = repo.clone();
        async move {
            let mut c = Catalog::open(&repo, source, tenant, None).await.unwrap();
            for n in 0..75 {
                c.append(verified(from + n)).await.unwrap();
            }
        }
    };
    tokio::join!(writer(0), writer(1000));
    for store in [None, Some("a"), Some("b")] {
        let c = Catalog::open(&repo, source, tenant, store).await.unwrap();
        assert_eq!((c.next(), c.state().checks.len()), (150, 150), "{store:?}");
    }
    // A reader begins where the state stands, so older records may go.
    let gone = w.path(&format!("a/{}", paths::catalog_record(source, tenant, 5)));
    std::fs::remove_file(gone).unwrap();
    assert_eq!(Catalog::open(&repo, source, tenant, Some("a")).await.unwrap().state().checks.len(), 150);
    repo.replicate_to("c", source).await.unwrap();
    let c = Catalog::open(&repo, source, tenant, Some("c")).await.unwrap();
    assert_eq!((c.next(), c.state().checks.len()), (150, 150));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_append_left_in_one_store_reaches_the_others_and_optional_ones_get_the_objects() {
    let w = World::new(&[("a", true), ("b", true), ("c", false)]);
    let repo = w.init().await;
    let (source, tenant) = of(&repo).await;
    let o = object(&repo, source, "acme", vec![7; 100]).await;
    let mut c = Catalog::open(&repo, source, tenant, None).await.unwrap();
    c.append(full(1, vec![o.clone()])).await.unwrap();
    let second = w.path(&format!("b/{}", paths::catalog_record(source, tenant, 0)));
    // As a store that was optional until now may be: without what the record names.
    let named = w.path(&format!("b/{}", o.path));
    for gone in [&second, &named] {
        std::fs::remove_file(gone).unwrap();
    }
    c.append(verified(1)).await.unwrap();
    assert!(second.exists() && named.exists(), "levelled before the next record");
    repo.replicate_to("c", source).await.unwrap();
    assert!(w.path(&format!("c/{}", o.path)).exists());
    c.append(full(2, vec![])).await.unwrap();
    repo.replicate_to("c", source).await.unwrap();
    assert_eq!(Catalog::open(&repo, source, tenant, Some("c")).await.unwrap().state().fulls.len(), 2);
    // A condition that no longer holds writes nothing.
    assert!(c.append_if(verified(2), |s| s.full(Uuid::from_u128(9)).is_some()).await.unwrap().is_none());
    assert_eq!(c.next(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn removals_and_holds_come_and_go() {
    let w = World::new(&[("a", true)]);
    let repo = w.init().await;
    let (source, tenant) = of(&repo).await;
    let mut c = Catalog::open(&repo, source, tenant, None).await.unwrap();
    for n in [1, 2] {
        c.append(full(n, vec![])).await.unwrap();
    }
    let id = Uuid::from_u128(50);
    let (reason, by) = ("lawsuit".to_owned(), "ann".to_owned());
    let hold = Entry::Hold { id, number: 4, reason, from_us: None, to_us: Some(9), by, until_us: None };
    c.append(hold).await.unwrap();
    let r = c.append(Entry::Removal {
        backups: vec![Uuid::from_u128(1)],
        objects: vec![],
        not_before_us: 5,
        reasons: vec!["older than the policy keeps".into()],
        floor: Some(Floor { lsn: Lsn(7), log_n: 3 }),
        commons: None,
    });
    let n = r.await.unwrap().n;
    let s = Catalog::open(&repo, source, tenant, None).await.unwrap().state().clone();
    assert_eq!((s.fulls.len(), s.removals.len(), s.holds[0].number), (1, 1, 4));
    c.append(Entry::Removed { removal: n }).await.unwrap();
    c.append(Entry::Release { id, by: "ann".into() }).await.unwrap();
    let again = Catalog::open(&repo, source, tenant, None).await.unwrap();
    assert_eq!(again.state(), c.state());
    assert!(again.state().removals.is_empty() && again.state().holds.is_empty());
    assert_eq!((again.state().floor, again.state().commons), (Some(Floor { lsn: Lsn(7), log_n: 3 }), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_done_to_a_record_is_found() {
    let w = World::new(&[("a", true)]);
    let repo = w.init().await;
    let (source, tenant) = of(&repo).await;
    let mut c = Catalog::open(&repo, source, tenant, None).await.unwrap();
    for n in 0..3 {
        c.append(verified(n)).await.unwrap();
    }
    let repo = w.open(Access::Read).await;
    let file = |n| w.path(&format!("a/{}", paths::catalog_record(source, tenant, n)));
    let good: Vec<_> = (0..3).map(|n| std::fs::read(file(n)).unwrap()).collect();
    let fails = async |what: &str| {
        let e = Catalog::open(&repo, source, tenant, None).await.err().unwrap_or_else(|| panic!("{what}: unnoticed"));
        assert!(matches!(e.kind(), Kind::Verification | Kind::Key) && e.to_string().contains("/k/0"), "{what}: {e}");
        for (n, b) in good.iter().enumerate() {
            std::fs::write(file(n as u64), b).unwrap();
        }
    };
    for n in 0..3u64 {
        for at in [0, 20, 100, 150, 170, 300] {
            let mut b = good[n as usize].clone();
            let at = at.min(b.len() - 1);
            b[at] ^= 1;
            std::fs::write(file(n), b).unwrap();
            fails("a flipped bit").await;
        }
    }
    std::fs::write(file(1), &good[2]).unwrap();
    std::fs::write(file(2), &good[1]).unwrap();
    fails("swapped records").await;
    std::fs::remove_file(file(1)).unwrap();
    fails("a missing record").await;
}
