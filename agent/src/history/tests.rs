//! Points in time against a log that lies in a temporary repository.

use super::*;
use crate::clock::SystemClock;
use crate::config::Config;
use crate::crypto::{Codec, Header, KeySource, ObjectKind, random};
use crate::repository::model::{Base, BaseTable, Ship, TxnEntry, TxnIndex};
use crate::repository::{Access, Body, Draft, paths};
use coffer_wire::{
    Begin, Class, KeyMode, Marker, Relation, RunHeader, Strategy, put_begin, put_marker, put_relation, put_run_header,
};
use std::io::Write;
use tokio::runtime::Handle;

/// Commit time in seconds, as the log has it.
const S: i64 = 1_000_000;

struct World {
    _dir: tempfile::TempDir,
    config: Config,
    repo: Arc<Repository>,
    keyring: Arc<Keyring>,
    source: Uuid,
    log: Log,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        let text = format!(
            "[keys]\nprovider = \"file\"\npath = \"{root}/kek\"\nkeyring = [\"file://{root}/k\"]\n\
             [[store]]\nname = \"a\"\nurl = \"file://{root}/a\"\n"
        );
        let config = Config::from_text(&text, std::iter::empty()).unwrap();
        crate::keyring::Kek::create_file(&config.keys).unwrap();
        let clock = Arc::new(SystemClock);
        let keyring = Keyring::create(&config.keys, clock.clone()).await.unwrap();
        Repository::create(&config, keyring.clone(), clock.clone()).await.unwrap();
        let repo = Repository::open(&config, keyring.clone(), clock, Access::Write).await.unwrap();
        let source = keyring.ensure_source("shop").await.unwrap();
        let log = Log::open(&repo, source, None).await.unwrap();
        let mut w = Self { _dir: dir, config, repo, keyring, source, log };
        w.append(0, 10, 0, Body::Init).await;
        w
    }

    async fn append(&mut self, from: u64, upto: u64, upto_time_us: i64, body: Body) {
        let d = Draft {
            system_identifier: 7,
            timeline: 1,
            slot: "s".into(),
            from_lsn: Lsn(from),
            upto_lsn: Lsn(upto),
            upto_time_us,
            body,
        };
        self.log.append(d).await.unwrap();
    }

    /// A ship of these transactions: end LSN, commit time in seconds; a restore point for each name.
    async fn ship(&mut self, from: u64, upto: u64, txns: &[(u64, i64)], points: &[(&str, u64)]) {
        let entries: Vec<TxnEntry> =
            txns.iter().map(|(l, t)| TxnEntry { end_lsn: Lsn(*l), commit_us: t * S, xid: *l }).collect();
        let mut plain = Vec::new();
        TxnIndex { entries: entries.clone() }.encode(&mut plain);
        for (name, at) in points {
            put_begin(&mut plain, &Begin { xid: *at, commit_lsn: Lsn(*at), end_lsn: Lsn(*at), commit_time_us: 0 });
            put_marker(&mut plain, &Marker { seq: 0, kind: "restore_point", payload: name.as_bytes() });
        }
        let key = self.keyring.repository_key();
        let header = Header {
            kind: ObjectKind::Common,
            codec: Codec::Lz4,
            tenant: key.id.uid,
            object: random::uuid(),
            source: self.source,
            system_identifier: 7,
            timeline: 1,
            lsn_start: Lsn(from),
            lsn_end: Lsn(upto),
            key_version: key.id.version,
        };
        let path = paths::common(self.source, Lsn(upto), header.object);
        let (repo, rt) = (self.repo.clone(), Handle::current());
        let common = tokio::task::spawn_blocking(move || {
            repo.seal_to(rt, path, &header, &key, |s| {
                s.write_all(&plain).unwrap();
                Ok(0)
            })
        })
        .await
        .unwrap()
        .unwrap();
        let max = entries.iter().map(|e| e.commit_us).max().unwrap_or(0);
        let ship = Ship {
            txns: txns.len() as u64,
            first_commit_us: entries.first().map_or(0, |e| e.commit_us),
            last_commit_us: entries.last().map_or(0, |e| e.commit_us),
            max_commit_us: max,
            min_commit_us: entries.iter().map(|e| e.commit_us).min(),
            eventful: Some(!points.is_empty()),
            common: Some(common),
            ..Ship::default()
        };
        self.append(from, upto, max - 1, Body::Ship(ship)).await;
    }

    /// A ship of one transaction with a row of table 1 that could not be attributed.
    async fn ship_of_nobody(&mut self, from: u64, upto: u64) {
        let nobody = Tenant::reserved(TenantKind::Unresolved);
        let entry = self.keyring.ensure(self.source, &nobody).await.unwrap();
        let key = self.keyring.key(entry.key_id()).unwrap();
        let rel = Relation {
            relid: 1,
            leaf: 1,
            schema: "public".into(),
            name: "a".into(),
            class: Class::Data,
            strategy: Strategy::Schema,
            key_mode: KeyMode::FullRow,
            columns: Vec::new(),
            key: Vec::new(),
        };
        let (encoded, mut plain) = (rel.encode(), Vec::new());
        let relations = Relation::id_of(&encoded).to_le_bytes();
        put_begin(&mut plain, &Begin { xid: 9, commit_lsn: Lsn(upto), end_lsn: Lsn(upto), commit_time_us: 0 });
        put_relation(&mut plain, Relation::id_of(&encoded), &encoded);
        let run = RunHeader {
            seq: 0,
            tenant_kind: TenantKind::Unresolved,
            tenant_key: "",
            relations: &relations,
            rows: 1,
            rows_len: 1,
        };
        put_run_header(&mut plain, &run, Some(b"x"));
        let header = Header {
            kind: ObjectKind::Changeset,
            codec: Codec::Lz4,
            tenant: entry.uid,
            object: random::uuid(),
            source: self.source,
            system_identifier: 7,
            timeline: 1,
            lsn_start: Lsn(from),
            lsn_end: Lsn(upto),
            key_version: key.id.version,
        };
        let path = paths::changeset(self.source, entry.uid, Lsn(upto), header.object);
        let (repo, rt) = (self.repo.clone(), Handle::current());
        let seal = move || {
            repo.seal_to(rt, path, &header, &key, |s| {
                s.write_all(&plain).unwrap();
                Ok(0)
            })
        };
        let object = tokio::task::spawn_blocking(seal).await.unwrap().unwrap();
        let ship = Ship { txns: 1, objects: vec![object], ..Ship::default() };
        self.append(from, upto, 0, Body::Ship(ship)).await;
    }

    async fn base(&mut self, upto: u64, cut: u64) {
        let table =
            BaseTable { relid: 1, name: "public.a".into(), cut_lsn: Lsn(cut), registered_xid: 1, rows: 0, owner: None };
        let body = Base { job: Uuid::from_u128(9), tables: vec![table], cut_lsn: Lsn(cut), ..Base::default() };
        self.append(upto, upto, 0, Body::Base(body)).await;
    }

    async fn history(&self) -> History {
        History::load(&self.repo, &self.keyring, self.source, None).await.unwrap()
    }
}

async fn at(h: &History, seconds: i64) -> Result<u64> {
    h.resolve(&When::Time(seconds * S)).await.map(|t| t.lsn.0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_is_the_prefix_before_the_first_later_commit() {
    let mut w = World::new().await;
    w.ship(10, 100, &[(20, 10), (40, 11), (60, 12)], &[("p", 40)]).await;
    w.base(100, 60).await;
    // A commit may be a little earlier than the one before it: clocks of two backends.
    w.ship(100, 200, &[(120, 20), (140, 19), (160, 21)], &[]).await;
    w.append(200, 250, 30 * S, Body::Idle).await;
    let h = w.history().await;
    assert_eq!(at(&h, 12).await.unwrap(), 100, "everything before the first commit of the next ship");
    assert_eq!(at(&h, 11).await.unwrap(), 40);
    assert_eq!(at(&h, 9).await.unwrap(), 10);
    assert_eq!(at(&h, 19).await.unwrap(), 100, "the commit at 20 comes first in the log");
    assert_eq!(at(&h, 20).await.unwrap(), 140);
    assert_eq!(at(&h, 30).await.unwrap(), 250, "an idle record reaches it");
    let e = at(&h, 31).await.unwrap_err();
    assert!(e.is_code("not_durable") && e.kind() == Kind::OutsideWindow, "{e}");
    assert_eq!(h.resolve(&When::Name("p".into())).await.unwrap().lsn, Lsn(40));
    assert_eq!(h.resolve(&When::Name("q".into())).await.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(h.resolve(&When::Lsn(Lsn(251))).await.unwrap_err().kind(), Kind::OutsideWindow);
    assert_eq!(h.resolve(&When::Lsn(Lsn(130))).await.unwrap().time_us, 20 * S);
    assert_eq!(h.resolve(&When::Backup(Uuid::from_u128(9))).await.unwrap().lsn, Lsn(60));
    let windows = h.windows(None);
    assert_eq!(windows.len(), 1);
    assert_eq!((windows[0].from_lsn, windows[0].to_lsn), (Lsn(60), Lsn(250)));
    // What `list` shows can be asked for.
    for t in [&windows[0].from_time, &windows[0].to_time] {
        let target = h.resolve(&t.parse().unwrap()).await.unwrap();
        h.require(&target, Uuid::nil(), &|_| true).unwrap();
    }
    let p = h.resolve(&When::Name("p".into())).await.unwrap();
    let e = h.require(&p, Uuid::nil(), &|_| true).unwrap_err();
    assert_eq!(e.kind(), Kind::OutsideWindow);
    assert_eq!(e.to_json()["error"]["window"][0]["from_lsn"], "0/3C");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_stepped_back_makes_the_span_ambiguous() {
    let mut w = World::new().await;
    w.base(10, 10).await;
    w.ship(10, 100, &[(20, 100), (40, 200)], &[]).await;
    // Back to 150, on from there; the step lies between two ships.
    w.ship(100, 200, &[(120, 150), (140, 160)], &[]).await;
    w.ship(200, 300, &[(220, 205), (240, 300)], &[]).await;
    // And one inside a ship.
    w.ship(300, 400, &[(320, 310), (340, 305), (360, 320)], &[]).await;
    w.append(400, 450, 900 * S, Body::Idle).await;
    let h = w.history().await;
    assert_eq!(at(&h, 120).await.unwrap(), 20, "before the step's lowest time nothing is ambiguous");
    let e = at(&h, 170).await.unwrap_err();
    assert!(e.is_code("ambiguous_time"), "{e}");
    assert!(e.message().contains("0/28") && e.message().contains("0/78"), "both LSNs: {e}");
    assert_eq!(at(&h, 200).await.unwrap(), 200, "nothing later than 200 comes before the step");
    assert_eq!(at(&h, 250).await.unwrap(), 220);
    assert!(at(&h, 307).await.unwrap_err().is_code("ambiguous_time"));
    assert_eq!(at(&h, 310).await.unwrap(), 340);
    assert_eq!(h.resolve(&When::Lsn(Lsn(130))).await.unwrap().lsn, Lsn(130), "an LSN is never ambiguous");
}

#[test]
fn a_table_that_came_and_went_in_one_transaction_is_waited_for_by_nobody() {
    let registered = |what| line::Registered { relid: 7, at: Lsn(50), xid: 3, what, owner: None, name: None };
    let added = line::Registration::Add { rebase: true, fresh: false };
    let registry = vec![registered(added), registered(line::Registration::Remove)];
    let facts = Facts { registry, ..Facts::default() };
    assert_eq!(Line::default().all_closed(&facts, None), []);
}

/// A base that is recorded when a full beyond its cut was made already is not in that full.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_stands_for_the_bases_that_it_was_made_from() {
    let mut w = World::new().await;
    w.base(10, 10).await;
    w.ship(10, 200, &[(100, 1), (150, 2)], &[]).await;
    let made_from = w.log.last().unwrap().n;
    w.base(200, 80).await;
    let mut h = w.history().await;
    let tenant = Uuid::from_u128(77);
    let full = FullEntry {
        point_lsn: Lsn(100),
        log_n: made_from,
        timeline: 1,
        tables: vec![catalog::FullTable { relid: 1, name: "public.a".into(), class: None, rows: 0 }],
        ..FullEntry::default()
    };
    let check = |ok| catalog::model::Check { backup: full.id, what: "read_back".into(), ok, message: None, at_us: 1 };
    for (log_n, checks, from_full) in [
        (made_from, vec![], false),
        (made_from + 1, vec![check(true)], true),
        (made_from + 1, vec![check(false)], false),
    ] {
        let fulls = vec![FullEntry { log_n, ..full.clone() }];
        h.set_catalog(tenant, State { fulls, checks, ..State::default() });
        let target = h.resolve(&When::Lsn(Lsn(150))).await.unwrap();
        let tables = h.require(&target, tenant, &|_| true).unwrap();
        let inputs = h.inputs(tenant, target.lsn, tables).await.unwrap();
        assert_eq!(inputs.tables[0].cut, Lsn(if from_full { 100 } else { 80 }), "made from record {log_n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_nobody_close_the_window_for_whoever_read_the_keyring_before_them() {
    let mut w = World::new().await;
    w.base(20, 20).await;
    let keyring = Keyring::open(&w.config.keys, Arc::new(SystemClock)).await.unwrap();
    let repo = Repository::open(&w.config, keyring.clone(), Arc::new(SystemClock), Access::Read).await.unwrap();
    w.ship_of_nobody(20, 40).await;
    let h = History::load(&repo, &keyring, w.source, None).await.unwrap();
    assert_eq!(h.facts.unresolved, [(1, Lsn(40))]);
    assert_eq!(h.line.closed(1, &h.facts).len(), 2, "from the log's beginning to the base, and behind it");
}
