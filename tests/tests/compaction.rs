//! Synthetic fulls: every restore from them equals the restore without, and only what changed is written. Incrementals:
//! they are read instead of the changesets of their span, and points inside it stay.

use crate::isolation::files;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database};
use coffer_tests::truth::{self, Watched};
use coffer_tests::{block_on, seed, wait_for};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

on_majors! {
    fulls: fulls;
    incrementals: incrementals;
    incrementals_by_schedule: by_schedule;
    workers: workers;
    idle_and_without_the_source: idle_and_without_the_source;
    killed_at_any_moment: killed_at_any_moment;
}

const DDL: &str = "
CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
CREATE TABLE b (id int PRIMARY KEY, tenant int NOT NULL, v text);
CREATE TABLE c (tenant int NOT NULL, v text);
CREATE TABLE p (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (id);
CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (500);
CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (500) TO (100000);
";

const ROWS: &str = "
INSERT INTO a SELECT t, i, repeat('a' || i, 20) FROM generate_series(1, 2) t, generate_series(1, 2000) i;
INSERT INTO b SELECT i, 1 + i % 2, 'b' || i FROM generate_series(1, 2000) i;
INSERT INTO c SELECT 1 + i % 2, 'c' || i % 7 FROM generate_series(1, 60) i;
INSERT INTO p SELECT t, i, 'p' || i FROM generate_series(1, 2) t, generate_series(1, 1000) i;
";

/// Between one full and the next.
const CHANGES: &[&str] = &[
    "SELECT 1",
    "UPDATE a SET v = 'changed' WHERE id = 1000",
    "SELECT 1",
    "INSERT INTO a SELECT 1, 5000 + i, 'new' FROM generate_series(1, 500) i; DELETE FROM a WHERE tenant = 1 AND id < 700",
    "UPDATE b SET tenant = 3 - tenant WHERE id % 3 = 0; UPDATE b SET id = id + 10000 WHERE id % 5 = 0",
    "DELETE FROM c WHERE v = 'c3'; INSERT INTO c VALUES (1, 'c1'), (1, 'c1'), (2, 'c1')",
    "TRUNCATE p1; INSERT INTO p SELECT 1, i, 'again' FROM generate_series(1, 20) i",
    "ALTER TABLE a ADD COLUMN more int DEFAULT 7; ALTER TABLE b RENAME COLUMN v TO w",
    "DELETE FROM p WHERE id > 500; TRUNCATE c",
];

fn watched() -> Vec<Watched> {
    ["a", "b", "c", "p"].map(|t| Watched::new(t, "tenant")).to_vec()
}

fn fulls(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", DDL);
        cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
        cluster.script("shop", ROWS);
        let more = "[compact]\npart = \"8KiB\"".to_owned();
        let mut agent = Agent::new(&Setup { more, ..Setup::of(&cluster, "shop") });
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        let mut client = cluster.connect("shop").await;
        let (mut points, mut written) = (Vec::new(), Vec::new());
        for (n, sql) in CHANGES.iter().enumerate() {
            cluster.script("shop", sql);
            let truth = truth::take(&mut client, &watched(), &format!("point {n}")).await;
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            let doc = wait_for("fulls of every tenant", 60, || {
                let out = agent.coffer(&["--json", "compact"]);
                let doc: Value = serde_json::from_slice(&out.stdout).expect("JSON");
                (out.status.success() && doc["skipped"] == json!([])).then_some(doc)
            });
            let full = of_tenant_1(&doc);
            written.push((full["bytes"].as_u64().expect("bytes"), full["rows"].as_u64().expect("rows")));
            points.push((truth, full["id"].as_str().expect("an id").to_owned()));
        }
        println!("PostgreSQL {major}: bytes and rows of tenant 1's fulls: {written:?}");
        assert!(written[1].0 * 4 < written[0].0, "one row changed: {written:?}");
        assert_eq!(written[2].0, 0, "nothing changed: {written:?}");
        for (truth, id) in &points {
            let mut wrong = Database::check(&agent, &cluster, truth, &watched(), "1").await;
            // Nothing was written between the point and the full behind it.
            let db = Database::restore(&agent, &cluster, "1", &format!("backup:{id}"));
            wrong.extend(truth.differences(&db.connect().await, &watched(), "1").await);
            assert!(wrong.is_empty(), "{}: {wrong:#?}", truth.name);
        }
        let (last, _) = points.last().expect("points");
        let wrong = Database::check(&agent, &cluster, last, &watched(), "2").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        for point in ["full-after-objects", "catalog-after-sequencer"] {
            agent.env = vec![("COFFER_FAILPOINTS".into(), format!("{point}=abort"))];
            let out = agent.coffer(&["compact", "--tenant", "1"]);
            assert!(out.status.code().is_none(), "{point}: {out:?}");
            agent.env.clear();
            let wrong = Database::check(&agent, &cluster, last, &watched(), "1").await;
            assert!(wrong.is_empty(), "after {point}: {wrong:#?}");
        }
        let verified = agent.json(&["verify"]);
        assert_eq!(verified["ok"], true, "{verified}");
        let listed = restored::listed(&agent, "1");
        let backups = listed["backups"].as_array().expect("backups");
        // That of the second abort is in the catalog: the sequencer had its record.
        assert_eq!(backups.iter().filter(|b| b["trigger"] == "schedule").count(), CHANGES.len() + 1, "{listed}");
    });
}

fn of_tenant_1(doc: &Value) -> &Value {
    let fulls = doc["fulls"].as_array().expect("fulls");
    fulls.iter().find(|f| f["tenant"] == "1").unwrap_or_else(|| panic!("tenant 1 has no full: {doc}"))
}

/// No schedule interferes.
const NEVER: &str =
    "[schedule]\nincremental = \"0 0 1 1 *\"\nfull = \"0 0 1 1 *\"\nprune = \"0 0 1 1 *\"\n[compact]\npart = \"8KiB\"";

fn lsn(v: &Value) -> u64 {
    let (high, low) = v.as_str().and_then(|s| s.split_once('/')).unwrap_or_else(|| panic!("no LSN: {v}"));
    let part = |s| u64::from_str_radix(s, 16).expect("hexadecimal");
    part(high) << 32 | part(low)
}

/// What was made of tenant 1, if anything.
fn incremental(agent: &Agent) -> Option<Value> {
    let doc = agent.json(&["compact", "--incremental", "--tenant", "1"]);
    assert_eq!((&doc["fulls"], &doc["skipped"]), (&json!([]), &json!([])), "{doc}");
    let made = doc["incrementals"].as_array().expect("incrementals");
    assert_eq!(made.len() as u64 + doc["unchanged"].as_u64().expect("a number"), 1, "{doc}");
    made.first().cloned()
}

/// The changesets of tenant 1 that end after one position, up to another.
fn changesets(agent: &Agent, from: u64, to: u64) -> Vec<PathBuf> {
    let uid = restored::listed(agent, "1")["uid"].as_str().expect("a uid").replace('-', "");
    let source = only(&agent.repository().join("s"));
    let all =
        std::fs::read_dir(source.join("t").join(uid).join("c")).expect("changesets").map(|e| e.expect("a file").path());
    let end = |p: &Path| {
        let name = p.file_name().expect("a name").to_string_lossy().into_owned();
        u64::from_str_radix(&name[..16], 16).expect("a position")
    };
    all.filter(|p| (from + 1..=to).contains(&end(p))).collect()
}

fn only(folder: &Path) -> PathBuf {
    let mut all = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path());
    let first = all.next().expect("one entry");
    assert!(all.next().is_none(), "{} has more than one entry", folder.display());
    first
}

/// Moves files aside, and back when it is dropped.
struct Hidden(Vec<PathBuf>);

impl Hidden {
    fn new(files: Vec<PathBuf>) -> Self {
        for f in &files {
            std::fs::rename(f, f.with_extension("hidden")).expect("a file that can be moved");
        }
        Self(files)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        for f in &self.0 {
            let _ = std::fs::rename(f.with_extension("hidden"), f);
        }
    }
}

fn incrementals(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", DDL);
        cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
        cluster.script("shop", ROWS);
        let mut agent = Agent::new(&Setup { more: NEVER.to_owned(), ..Setup::of(&cluster, "shop") });
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        let mut client = cluster.connect("shop").await;
        let (mut points, mut made) = (Vec::new(), Vec::new());
        incremental(&agent);
        assert_eq!(incremental(&agent), None, "nothing changed");
        for (n, sql) in CHANGES.iter().enumerate() {
            cluster.script("shop", sql);
            points.push(truth::take(&mut client, &watched(), &format!("point {n}")).await);
            // In ships of their own.
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            if n % 3 == 2 {
                made.push((n, incremental(&agent).expect("changes")));
            }
            if n == 5 {
                agent.json(&["compact", "--tenant", "1"]);
            }
        }
        assert_eq!(made.len(), 3);
        assert!(lsn(&made[0].1["point_lsn"]) <= lsn(&made[1].1["from_lsn"]));
        for truth in &points {
            let wrong = Database::check(&agent, &cluster, truth, &watched(), "1").await;
            assert!(wrong.is_empty(), "{}: {wrong:#?}", truth.name);
        }
        // Without the changesets of their spans.
        for (n, i) in &made {
            let files = changesets(&agent, lsn(&i["from_lsn"]), lsn(&i["point_lsn"]));
            assert!(!files.is_empty(), "{i}");
            println!("PostgreSQL {major}: {} changesets, {} changes in {} bytes", files.len(), i["rows"], i["bytes"]);
            let _hidden = Hidden::new(files);
            let db = Database::restore(&agent, &cluster, "1", &format!("backup:{}", i["id"].as_str().expect("an id")));
            let wrong = points[*n].differences(&db.connect().await, &watched(), "1").await;
            assert!(wrong.is_empty(), "{}: {wrong:#?}", points[*n].name);
            let out = restored::Out::new();
            let inside = format!("name:point {}", n - 1);
            let (code, said) = agent.json_err(&restored::args_now("1", &inside, out.arg()));
            let message = said["error"]["message"].as_str().expect("a message");
            assert!(code == 5 && message.contains("/c/") && message.contains("missing"), "{code}: {said}");
            assert!(out.names().is_empty(), "{:?}", out.names());
        }
        {
            // A full reads incrementals, too.
            let (from, to) = (lsn(&made[2].1["from_lsn"]), lsn(&made[2].1["point_lsn"]));
            let _hidden = Hidden::new(changesets(&agent, from, to));
            agent.json(&["compact", "--tenant", "1"]);
        }
        let last = points.last().expect("points");
        let wrong = Database::check(&agent, &cluster, last, &watched(), "1").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        shown(&agent, &made[2].1);
        aborted(&cluster, &mut agent).await;
        damaged(&cluster, &agent).await;
    });
}

/// What `list`, `show` and `verify` say of an incremental.
fn shown(agent: &Agent, made: &Value) {
    let listed = restored::listed(agent, "1");
    let backups = listed["backups"].as_array().expect("backups");
    let mine = backups.iter().find(|b| b["id"] == made["id"]).unwrap_or_else(|| panic!("not in {listed}"));
    assert_eq!((&mine["kind"], &mine["point_lsn"]), (&json!("incremental"), &made["point_lsn"]), "{mine}");
    assert!(mine["verified_at"].is_string(), "{mine}");
    let shown = agent.json(&["show", made["id"].as_str().expect("an id")]);
    assert_eq!((&shown["kind"], &shown["from_lsn"]), (&json!("incremental"), &made["from_lsn"]), "{shown}");
    let object = agent.json(&["show", "--object", made["object"].as_str().expect("a path")]);
    assert_eq!((&object["kind"], &object["rows"]), (&json!("incremental"), &made["rows"]), "{object}");
    let verified = agent.json(&["verify"]);
    assert_eq!(verified["ok"], true, "{verified}");
}

/// Killed between the object and the record, or with the record in one store: nothing is wrong, and the next one is made.
async fn aborted(cluster: &Cluster, agent: &mut Agent) {
    let mut client = cluster.connect("shop").await;
    for point in ["incremental-after-object", "catalog-after-sequencer"] {
        cluster.script("shop", "UPDATE a SET v = v || 'x' WHERE id % 10 = 1");
        let truth = truth::take(&mut client, &watched(), point).await;
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        agent.env = vec![("COFFER_FAILPOINTS".into(), format!("{point}=abort"))];
        let out = agent.coffer(&["compact", "--incremental", "--tenant", "1"]);
        assert!(out.status.code().is_none(), "{point}: {out:?}");
        agent.env.clear();
        let wrong = Database::check(agent, cluster, &truth, &watched(), "1").await;
        assert!(wrong.is_empty(), "after {point}: {wrong:#?}");
        // The sequencer had the second one's record.
        assert_eq!(incremental(agent).is_some(), point == "incremental-after-object");
        let wrong = Database::check(agent, cluster, &truth, &watched(), "1").await;
        assert!(wrong.is_empty(), "behind {point}: {wrong:#?}");
    }
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// A flipped bit is an error that names the object; a point inside its span needs it not.
async fn damaged(cluster: &Cluster, agent: &Agent) {
    let mut client = cluster.connect("shop").await;
    let mut truths = Vec::new();
    for name in ["before", "behind"] {
        cluster.script("shop", "DELETE FROM b WHERE id IN (SELECT id FROM b WHERE tenant = 1 LIMIT 5)");
        truths.push(truth::take(&mut client, &watched(), name).await);
        cluster.psql("shop", "SELECT coffer.wait_durable()");
    }
    let made = incremental(agent).expect("changes");
    let path = made["object"].as_str().expect("a path");
    let file = agent.repository().join(path);
    let good = std::fs::read(&file).expect("the object");
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 4;
    std::fs::write(&file, &bad).expect("a file");
    let out = restored::Out::new();
    let (code, said) = agent.json_err(&restored::args_now("1", "latest", out.arg()));
    assert!(code == 5 && said["error"]["message"].as_str().is_some_and(|m| m.contains(path)), "{code}: {said}");
    assert!(out.names().is_empty(), "{:?}", out.names());
    let (code, said) = agent.json_err(&["verify"]);
    assert!(code == 5 && said["failures"][0]["object"] == path, "{code}: {said}");
    let wrong = Database::check(agent, cluster, &truths[0], &watched(), "1").await;
    assert!(wrong.is_empty(), "{wrong:#?}");
    std::fs::write(&file, &good).expect("a file");
    let wrong = Database::check(agent, cluster, &truths[1], &watched(), "1").await;
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// `coffer run` makes them by itself; tenants that did nothing get none.
fn by_schedule(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
    cluster.script("shop", ROWS);
    let more = NEVER.replacen("0 0 1 1 *", "* * * * *", 1);
    let mut agent = Agent::new(&Setup { more, ..Setup::of(&cluster, "shop") });
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    let of = |tenant: &str| {
        let listed = restored::listed(&agent, tenant);
        let backups = listed["backups"].as_array().expect("backups").clone();
        backups.into_iter().filter(|b| b["kind"] == "incremental").collect::<Vec<_>>()
    };
    let idle = of("2").len();
    for _ in 0..2 {
        let before = of("1").len();
        cluster.script("shop", "UPDATE a SET v = v || 'x' WHERE tenant = 1 AND id < 100");
        wait_for("the scheduled incremental", 180, || (of("1").len() > before).then_some(()));
    }
    // What was there when they were covered may be in a first one.
    assert!(of("2").len() <= idle + 1, "{:?}", of("2"));
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// Two workers at once: every tenant gets one full and one incremental, and both have a part in it.
fn workers(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
    let tenants: Vec<String> = (1..=10).map(|t| t.to_string()).collect();
    cluster
        .script("shop", "INSERT INTO a SELECT t, i, 'a' || i FROM generate_series(1, 10) t, generate_series(1, 50) i");
    let mut agent = Agent::new(&Setup { more: NEVER.to_owned(), ..Setup::of(&cluster, "shop") });
    agent.start();
    restored::wait_windows(&mut agent, &tenants);
    cluster.script("shop", "UPDATE a SET v = v || 'x'");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    agent.stop();
    let mut twins = [agent.twin(), agent.twin()];
    for t in &mut twins {
        // Slow enough for both to be there at once.
        let slow = "full-after-objects=sleep(200);incremental-after-object=sleep(200)";
        t.env = vec![("COFFER_FAILPOINTS".into(), slow.into())];
    }
    for (what, args) in [("incrementals", &["compact", "--incremental"][..]), ("fulls", &["compact"])] {
        let docs: Vec<Value> = std::thread::scope(|s| {
            let each: Vec<_> = twins.iter().map(|t| s.spawn(move || t.json(args))).collect();
            each.into_iter().map(|t| t.join().expect("a worker")).collect()
        });
        let of = |d: &Value, field: &str| {
            let all = d[field].as_array().expect("a list").iter().filter(|t| t["kind"] == "normal");
            all.map(|t| t["tenant"].as_str().expect("a tenant").to_owned()).collect::<Vec<_>>()
        };
        let mut made: Vec<String> = docs.iter().flat_map(|d| of(d, what)).collect();
        made.sort_by_key(|t| t.parse::<u32>().expect("a number"));
        assert_eq!(made, tenants, "{what}: {docs:#?}");
        for d in &docs {
            assert!(!of(d, what).is_empty() && !of(d, "elsewhere").is_empty(), "{what}: {d}");
        }
    }
    for t in &tenants {
        let listed = restored::listed(&agent, t);
        let of = |kind: &str, trigger: &str| {
            let backups = listed["backups"].as_array().expect("backups").iter();
            backups.filter(|b| b["kind"] == kind && b["trigger"] == trigger).count()
        };
        assert_eq!((of("incremental", "incremental"), of("full", "schedule")), (1, 1), "{listed}");
    }
    // Killed: what it had is left to it for a minute, and no longer. Whoever names the tenant has it done at once.
    cluster.script("shop", "UPDATE a SET v = v || 'y' WHERE tenant = 3");
    agent.start();
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    agent.stop();
    twins[0].env = vec![("COFFER_FAILPOINTS".into(), "incremental-after-object=abort".into())];
    let out = twins[0].coffer(&["compact", "--incremental"]);
    assert!(out.status.code().is_none(), "{out:?}");
    let doc = twins[1].json(&["compact", "--incremental"]);
    assert_eq!((&doc["incrementals"], &doc["elsewhere"][0]["tenant"]), (&json!([]), &json!("3")), "{doc}");
    twins[1].env = vec![("COFFER_TEST_CLOCK".into(), "61s".into())];
    let doc = twins[1].json(&["compact", "--incremental"]);
    assert_eq!(doc["incrementals"][0]["tenant"], "3", "{doc}");
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// A full of tenants that did nothing since the last one is an entry in each one's catalog and nothing else, and the
/// source is not asked. The agent learns of it, whoever made it.
fn idle_and_without_the_source(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", DDL);
        cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
        cluster.script("shop", ROWS);
        let more = format!("{NEVER}\n[verify]\nscrub_rate = \"0\"");
        let mut agent = Agent::new(&Setup { more, ..Setup::of(&cluster, "shop") });
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        let mut client = cluster.connect("shop").await;
        let truth = truth::take(&mut client, &watched(), "idle").await;
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let last_full = |agent: &Agent| agent.metric("coffer_last_full_timestamp_seconds");
        let now = || SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs_f64();

        // Beside the agent: it looks at every catalog within a minute, and when one was written to for a job.
        let began = now();
        wait_for("the time of the bases", 30, || (last_full(&agent) > 0.0).then_some(()));
        assert!(last_full(&agent) < began);
        agent.json(&["compact"]);
        cluster.psql("shop", "SELECT coffer.hold('1', 'look')");
        wait_for("the time of the fulls", 90, || (last_full(&agent) > began).then_some(()));

        agent.stop();
        drop(client);
        cluster.stop("fast");
        let (began, before) = (now(), files(&agent.repository()));
        let doc = agent.json(&["compact"]);
        let after = files(&agent.repository());
        let fulls = doc["fulls"].as_array().expect("fulls");
        assert_eq!(doc["skipped"], json!([]), "{doc}");
        assert!(fulls.len() >= 2 && fulls.iter().all(|f| f["bytes"] == 0), "{doc}");
        assert_eq!(before.iter().find(|f| !after.contains(f)), None, "something was removed");
        let new: Vec<&PathBuf> = after.iter().filter(|f| !before.contains(f)).collect();
        assert_eq!(new.len(), fulls.len(), "{new:?}");
        let size = |f: &Path| f.metadata().expect("a file").len();
        println!("PostgreSQL {major}: an idle full is {:?} bytes", new.iter().map(|f| size(f)).collect::<Vec<_>>());
        for f in new {
            assert!(
                f.to_str().is_some_and(|f| f.contains("/k/") && !f.contains('#')) && size(f) < 4096,
                "{}: {}",
                f.display(),
                size(f)
            );
        }

        cluster.up();
        agent.start();
        wait_for("the time of the fulls that it did not see", 60, || (last_full(&agent) > began).then_some(()));
        let to = format!("backup:{}", of_tenant_1(&doc)["id"].as_str().expect("an id"));
        let db = Database::restore(&agent, &cluster, "1", &to);
        let wrong = truth.differences(&db.connect().await, &watched(), "1").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}

/// Where a worker dies, of fulls and of incrementals.
const DEATHS: [(&str, bool); 5] = [
    ("full-at-table", false),
    ("full-after-objects", false),
    ("catalog-after-sequencer", false),
    ("incremental-after-object", true),
    ("catalog-after-sequencer", true),
];

/// Of two workers that share the tenants one is killed, at a random moment or at a certain one: that leaves nothing wrong
/// in either store, and nothing that stops the other or the next.
fn killed_at_any_moment(major: u32) {
    block_on(async {
        const KILLS: usize = 9;
        let seed = seed();
        let mut rng = StdRng::seed_from_u64(seed);
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", DDL);
        cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
        cluster.script("shop", ROWS);
        // More than one worker takes at a time.
        cluster.psql("shop", "INSERT INTO a SELECT t, i, 'few' FROM generate_series(3, 8) t, generate_series(1, 50) i");
        let mut setup = Setup { more: NEVER.to_owned(), ..Setup::of(&cluster, "shop") };
        let mut agent = Agent::unready(&setup);
        let stores = ["one", "two"].map(|s| agent.dir().join(s));
        let store = |s: &str, dir: &Path| format!("[[store]]\nname = \"{s}\"\nurl = \"file://{}\"\n", dir.display());
        setup.stores = [store("one", &stores[0]), store("two", &stores[1])].concat();
        agent.configure(&setup);
        agent.init();
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2", "8"]);
        let mut client = cluster.connect("shop").await;
        let (full, incremental) = (&["compact"][..], &["compact", "--incremental"][..]);
        // How long one takes that is left alone.
        let begun = Instant::now();
        agent.json(full);
        let alone = begun.elapsed();
        let mut workers = [agent.twin(), agent.twin()];
        let (mut points, mut killed) = (Vec::new(), 0);
        for n in 0..KILLS + DEATHS.len() {
            cluster.script(
                "shop",
                &format!("UPDATE a SET v = v || '{n}' WHERE id % 7 = {n} % 7; DELETE FROM b WHERE id % 50 = {n}"),
            );
            let truth = truth::take(&mut client, &watched(), &format!("kill {n}")).await;
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            points.push(truth);
            let death = n.checked_sub(KILLS).map(|n| DEATHS[n]);
            let args = if death.map_or(n % 3 == 1, |(_, is_incremental)| is_incremental) { incremental } else { full };
            // By then the leases of those who died before are over.
            let clock = ("COFFER_TEST_CLOCK".to_owned(), format!("{}s", 61 * (n + 1)));
            let slow = "full-after-objects=sleep(100);incremental-after-object=sleep(100)".to_owned();
            let ends = death.map_or(slow.clone(), |(point, _)| format!("{point}=abort"));
            workers[0].env = vec![clock.clone(), ("COFFER_FAILPOINTS".to_owned(), ends)];
            workers[1].env = vec![clock, ("COFFER_FAILPOINTS".to_owned(), slow)];
            let after = alone.mul_f64(rng.random_range(0.15..1.1));
            let [victim, other] = &workers;
            let doc = std::thread::scope(|s| {
                let done = s.spawn(|| other.json(args));
                match death {
                    None => killed += u32::from(victim.killed_after(args, after)),
                    Some((point, _)) => {
                        let out = victim.coffer(args);
                        assert!(out.status.code().is_none(), "{point}: {out:?}");
                    }
                }
                done.join().expect("the other worker")
            });
            assert_eq!(doc["skipped"], json!([]), "SEED={seed}: {doc}");
        }
        println!("PostgreSQL {major}: {killed} of {KILLS} workers were killed at work, {alone:?} when left alone");
        assert!(killed >= 2, "{killed} were killed: most were over before");
        let verified = agent.json(&["verify"]);
        assert_eq!(verified["ok"], true, "SEED={seed}: {verified}");
        let last = points.last().expect("points");
        for (n, truth) in points.iter().enumerate().rev().step_by(5) {
            let wrong = Database::check(&agent, &cluster, truth, &watched(), "1").await;
            assert!(wrong.is_empty(), "kill {n}, SEED={seed}: {wrong:#?}");
        }
        // The next ones are made, of everybody, and restores begin at them.
        workers[0].env = vec![("COFFER_TEST_CLOCK".to_owned(), format!("{}s", 61 * (points.len() + 1)))];
        workers[0].json(incremental);
        let doc = workers[0].json(full);
        assert_eq!(
            (doc["elsewhere"].as_array().map(Vec::len), &doc["skipped"]),
            (Some(0), &json!([])),
            "SEED={seed}: {doc}"
        );
        let catalogs = |s: &PathBuf| {
            // What a writer that was killed had begun to put is no object.
            let all =
                files(s).into_iter().filter(|f| f.to_str().is_some_and(|f| f.contains("/k/") && !f.contains('#')));
            all.map(|f| f.strip_prefix(s).expect("in the store").to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(catalogs(&stores[0]), catalogs(&stores[1]), "SEED={seed}");
        let to = format!("backup:{}", of_tenant_1(&doc)["id"].as_str().expect("an id"));
        let db = Database::restore(&agent, &cluster, "1", &to);
        let wrong = last.differences(&db.connect().await, &watched(), "1").await;
        assert!(wrong.is_empty(), "SEED={seed}: {wrong:#?}");
        assert_eq!(agent.json(&["verify"])["ok"], true);
    });
}
