//! The fence of a restore in place: the tenant's writers wait while it is applied, and nobody else does.

use crate::restores::{counts, protected, restore};
use coffer_tests::agent::Agent;
use coffer_tests::cluster::Cluster;
use coffer_tests::{block_on, restored, wait_for};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_majors! {
    in_place_keeps_its_promises: in_place_keeps_its_promises;
    the_tenants_writers_wait: the_tenants_writers_wait;
    readers_that_stay: readers_that_stay;
}

/// Sessions that wait for a lock that a fence's trigger takes.
const WAITING: &str = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE l.locktype = 'advisory' AND NOT l.granted AND a.application_name <> 'coffer restore'";
/// The restore has the tenant for itself.
const CLOSED: &str = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory'
    AND l.classid = 6516582 AND l.mode = 'ExclusiveLock' AND l.granted AND a.application_name = 'coffer restore'";
const FENCES: &str = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa\\_coffer\\_fence%'";

/// A statement in a session of its own; the time that it took.
fn writer(cluster: &Arc<Cluster>, sql: &'static str) -> tokio::task::JoinHandle<Duration> {
    let cluster = cluster.clone();
    tokio::spawn(async move {
        let db = cluster.connect("shop").await;
        let begun = Instant::now();
        db.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
        begun.elapsed()
    })
}

fn the_tenants_writers_wait(major: u32) {
    block_on(async {
        let (cluster, mut agent) = protected(major);
        let cluster = Arc::new(cluster);
        let sql = |s: &str| cluster.psql("shop", s);
        cluster.script(
            "shop",
            "ALTER TABLE customer DISABLE TRIGGER noisy; SELECT coffer.restore_point('before');
             UPDATE customer SET name = name || '?' WHERE tenant = 2 AND id <= 5; DELETE FROM note WHERE tenant = 2 AND v = 'n1';",
        );
        agent.env = vec![(
            "COFFER_FAILPOINTS".into(),
            "restore-after-fence=sleep(2500);restore-before-commit=sleep(4000)".into(),
        )];
        let restoring = tokio::task::spawn_blocking(move || restore(&agent, "2", "name:before", "in-place", &[]));

        // The difference is known and the fences stand: a transaction that is short goes through, and is taken back with
        // the rest, since it came before.
        wait_for("a fence", 60, || (sql(FENCES) != "0").then_some(()));
        sql("UPDATE customer SET name = 'too early' WHERE tenant = 2 AND id = 10; INSERT INTO never VALUES (2, 1)");

        // The tenant's rows are what they were at the target, and that is not committed: rows that did not differ, new
        // rows and rows behind a foreign key wait.
        wait_for("the tenant's writers to be out", 60, || (sql(CLOSED) == "1").then_some(()));
        let waiting = [
            "UPDATE customer SET name = 'on top' WHERE tenant = 2 AND id = 11",
            "INSERT INTO note VALUES (2, 'on top')",
            "UPDATE line SET what = 'on top' WHERE id = 25",
        ]
        .map(|s| writer(&cluster, s));
        wait_for("three of the tenant's writers to wait", 10, || (sql(WAITING) == "3").then_some(()));
        // Everybody else does not.
        let took = [
            "UPDATE customer SET name = 'another' WHERE tenant = 3 AND id = 11",
            "INSERT INTO note VALUES (1, 'another')",
            "UPDATE line SET what = 'another' WHERE id = 5",
        ]
        .map(|s| writer(&cluster, s));
        for t in took {
            let took = t.await.expect("another tenant's writer");
            assert!(took < Duration::from_secs(2), "another tenant's writer took {took:?}");
        }
        assert_eq!(sql(WAITING), "3", "others were let through while the tenant's writers waited");

        let done = restoring.await.expect("the restore");
        for w in waiting {
            w.await.expect("the tenant's writer");
        }
        assert_eq!(counts(&done, "public.customer"), [0, 6, 0, 14], "{done}");
        assert_eq!(counts(&done, "public.never"), [0, 0, 1, 0], "{done}");
        let changed = "SELECT string_agg(id || ' ' || name, ',' ORDER BY id) FROM customer WHERE tenant = 2 AND name <> 'c' || id";
        assert_eq!(sql(changed), "11 on top");
        let notes = "SELECT count(*) FILTER (WHERE v = 'on top'), count(*) FROM note WHERE tenant = 2";
        assert_eq!(sql(notes), "1|21");
        assert_eq!(sql("SELECT what FROM line WHERE id = 25"), "on top");
        assert_eq!(sql("SELECT string_agg(name, ',') FROM customer WHERE tenant = 3 AND id = 11"), "another");
        assert_eq!(sql(FENCES), "0");
    });
}

/// Whoever reads every table and stays in the transaction keeps a restore from nothing but removing its fences: it is
/// over soon, nobody is held up by what it left, and `coffer run` removes it.
fn readers_that_stay(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        let sql = |s: &str| cluster.psql("shop", s);
        sql("ALTER TABLE customer DISABLE TRIGGER noisy; SELECT coffer.restore_point('before')");
        sql("UPDATE customer SET name = name || '?' WHERE tenant = 2");
        cancelled(&cluster, &agent).await;
        let reader = cluster.connect("shop").await;
        let reads = "BEGIN; SELECT FROM customer; SELECT FROM bill; SELECT FROM line; SELECT FROM note; SELECT FROM trail; SELECT FROM never";
        reader.batch_execute(reads).await.expect("reads");
        let begun = Instant::now();
        let done = restore(&agent, "2", "name:before", "in-place", &[]);
        let took = begun.elapsed();
        println!("PostgreSQL {major}: over after {took:?}, beside a reader of every table");
        assert!(took < Duration::from_secs(40), "the restore took {took:?}");
        assert_eq!(counts(&done, "public.customer"), [0, 20, 0, 0], "{done}");
        assert!(done["warnings"].to_string().contains("fences are left behind and hold nobody up"), "{done}");
        assert_eq!(sql("SELECT count(*) FROM customer WHERE tenant = 2 AND name <> 'c' || id"), "0");
        assert_ne!(sql(FENCES), "0", "the reader held nothing up: nothing was shown");
        let cluster = Arc::new(cluster);
        let took = writer(&cluster, "UPDATE customer SET name = 'on top' WHERE tenant = 2 AND id = 11").await;
        assert!(took.expect("the tenant's writer") < Duration::from_secs(3));
        reader.batch_execute("COMMIT").await.expect("commit");
        let fences = || cluster.psql("shop", FENCES);
        wait_for("the fences to go", 60, || (fences() == "0").then_some(()));
        assert_eq!(cluster.psql("shop", "SELECT name FROM customer WHERE tenant = 2 AND id = 11"), "on top");
        drop(agent);
    });
}

/// A restore whose attempt at a fence somebody cancels is over, and does not take that for a table that is busy.
async fn cancelled(cluster: &Cluster, agent: &Agent) {
    let (busy, db) = (cluster.connect("shop").await, cluster.connect("shop").await);
    busy.batch_execute("BEGIN; INSERT INTO customer VALUES (3, 9999, 'busy', 'ok')").await.expect("a write");
    let canceller = tokio::spawn(async move {
        let attempt = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'coffer restore' \
            AND query LIKE '%coffer.\\_agent\\_fence(%' AND wait_event_type = 'Lock'";
        loop {
            db.batch_execute(attempt).await.expect("a cancel");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let begun = Instant::now();
    let (code, said) = agent.json_err(&restored::in_place("2", "name:before"));
    canceller.abort();
    let message = said["error"]["message"].as_str().unwrap_or_default();
    assert!(code == 1 && message.contains("cannot fence") && message.contains("57014"), "{code} {said}");
    assert!(begun.elapsed() < Duration::from_secs(40), "it went on for {:?}", begun.elapsed());
    assert_eq!(cluster.psql("shop", FENCES), "0");
    busy.batch_execute("ROLLBACK").await.expect("rollback");
}

/// The longest that a lock above ROW EXCLUSIVE is waited for and held, together.
const STRONG_LOCK: Duration = Duration::from_millis(200);

/// The longest that a transaction of a restore was seen to wait for, or to hold, a lock above ROW EXCLUSIVE on a table of
/// the application, by table and mode; which of them were awaited; and how often it was looked.
async fn watch_locks(cluster: &Cluster, stop: Arc<AtomicBool>) -> (BTreeMap<String, Duration>, BTreeSet<String>, u64) {
    let db = cluster.connect("shop").await;
    let sql = "SELECT l.virtualtransaction, l.relation::regclass || ' ' || l.mode, l.granted
        FROM pg_locks l JOIN pg_stat_activity a USING (pid) JOIN pg_class c ON c.oid = l.relation
        WHERE a.application_name IN ('coffer restore', 'coffer fences') AND l.locktype = 'relation' AND c.relkind IN ('r', 'p')
          AND c.relnamespace = 'public'::regnamespace
          AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')";
    let (mut longest, mut awaited, mut looks) = (BTreeMap::new(), BTreeSet::new(), 0);
    let mut since: BTreeMap<(String, String), Instant> = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        let before = Instant::now();
        let rows = db.query(sql, &[]).await.expect("locks");
        let after = Instant::now();
        let seen: BTreeMap<(String, String), bool> = rows.iter().map(|r| ((r.get(0), r.get(1)), r.get(2))).collect();
        since.retain(|lock, _| seen.contains_key(lock));
        for (lock, is_granted) in seen {
            if !is_granted {
                awaited.insert(lock.1.clone());
            }
            // It was there by the end of the first look, and at the beginning of this one: for so long at least.
            let first = *since.entry(lock.clone()).or_insert(after);
            let entry: &mut Duration = longest.entry(lock.1).or_default();
            *entry = (*entry).max(before.saturating_duration_since(first));
        }
        looks += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (longest, awaited, looks)
}

/// Partitions that writers of another tenant keep from the restore, and for how long: each is short, all are not.
const KEPT_PARTITIONS: u32 = 3;
const KEPT: Duration = Duration::from_millis(120);

/// Somebody who again and again writes to a partition, and commits a while after the restore began to wait for that.
async fn keep_a_partition(cluster: &Cluster, n: u32, stop: Arc<AtomicBool>) -> u32 {
    let (db, looks) = (cluster.connect("shop").await, cluster.connect("shop").await);
    let held_up = format!(
        "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
         WHERE a.application_name = 'coffer restore' AND NOT l.granted AND l.relation = 'part_{n}'::regclass"
    );
    let mut times = 0;
    while !stop.load(Ordering::Relaxed) {
        let write = format!(
            "BEGIN; INSERT INTO part_{n} (tenant, id, v) SELECT 3, coalesce(max(id) + 1, {n}000), 'kept' FROM part_{n}"
        );
        db.batch_execute(&write).await.expect("a write");
        while !stop.load(Ordering::Relaxed) {
            if looks.query_one(&held_up, &[]).await.expect("locks").get::<_, i64>(0) > 0 {
                times += 1;
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(KEPT).await;
        db.batch_execute("COMMIT").await.expect("commit");
        tokio::time::sleep(KEPT * 20).await;
    }
    times
}

/// How long a restore is kept from a fence.
const HELD_UP: Duration = Duration::from_secs(3);

/// A table with forty partitions of a thousand ids.
fn partitioned() -> String {
    let mut ddl =
        "CREATE TABLE part (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (id);\n"
            .to_owned();
    for n in 0..40 {
        ddl.push_str(&format!("CREATE TABLE part_{n} PARTITION OF part FOR VALUES FROM ({n}000) TO ({}000);\n", n + 1));
    }
    ddl + "SELECT * FROM coffer.add_table('part', 'tenant')"
}

fn in_place_keeps_its_promises(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        let cluster = Arc::new(cluster);
        cluster.script("shop", &partitioned());
        cluster.script(
            "shop",
            "ALTER TABLE customer DISABLE TRIGGER noisy;
             INSERT INTO part SELECT t, i, 'p' || i FROM generate_series(1, 3) t, generate_series(0, 39999, 500) i;
             INSERT INTO customer SELECT t, i, 'c' || i, 'ok' FROM generate_series(1, 3) t, generate_series(1000, 20000) i;
             INSERT INTO bill (tenant, customer, amount) SELECT t, i, i FROM generate_series(1, 3) t, generate_series(1000, 8000) i;
             SELECT coffer.restore_point('before');
             UPDATE customer SET name = name || '?' WHERE tenant = 2 AND id % 3 = 0;
             DELETE FROM bill WHERE tenant = 2 AND id % 4 = 0;
             UPDATE part SET v = v || '?' WHERE tenant = 2 AND id % 1000 = 0;
             INSERT INTO trail VALUES (2, 700, 'later'), (2, 701, 'later');",
        );
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = Vec::new();
        for n in 0..4 {
            let (cluster, stop) = (cluster.clone(), stop.clone());
            writers.push(tokio::spawn(async move {
                let db = cluster.connect("shop").await;
                let (mut done, mut longest) = (0u64, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let (tenant, id) = (if n % 2 == 0 { 1 } else { 3 }, 1000 + rand::random::<u32>() % 5000);
                    let begun = Instant::now();
                    let sql = format!(
                        "BEGIN; UPDATE customer SET name = 'w{n}' WHERE tenant = {tenant} AND id = {id};
                         UPDATE bill SET amount = 1 WHERE tenant = {tenant} AND customer = {id};
                         INSERT INTO note VALUES ({tenant}, 'load'); COMMIT"
                    );
                    db.batch_execute(&sql).await.expect("a writer of another tenant is not disturbed");
                    longest = longest.max(begun.elapsed());
                    done += 1;
                }
                (done, longest)
            }));
        }
        let watching = {
            let (cluster, stop) = (cluster.clone(), stop.clone());
            tokio::spawn(async move { watch_locks(&cluster, stop).await })
        };
        let keepers: Vec<_> = (1..=KEPT_PARTITIONS)
            .map(|n| {
                let (cluster, stop) = (cluster.clone(), stop.clone());
                tokio::spawn(async move { keep_a_partition(&cluster, n, stop).await })
            })
            .collect();
        // One that wrote, and is idle in its transaction: whoever comes behind the restore's attempts at a fence goes on.
        let idle = {
            let cluster = cluster.clone();
            tokio::spawn(async move {
                let (idle, looks) = (cluster.connect("shop").await, cluster.connect("shop").await);
                idle.batch_execute("BEGIN; INSERT INTO note VALUES (3, 'idle')").await.expect("a write");
                let held_up = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                    WHERE a.application_name = 'coffer restore' AND NOT l.granted AND l.relation = 'note'::regclass";
                let begun = Instant::now();
                while looks.query_one(held_up, &[]).await.expect("locks").get::<_, i64>(0) == 0 {
                    assert!(begun.elapsed() < Duration::from_secs(90), "nothing was held up by an idle writer");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                tokio::time::sleep(HELD_UP).await;
                idle.batch_execute("COMMIT").await.expect("commit");
            })
        };
        let done = restore(&agent, "2", "name:before", "in-place", &[]);
        stop.store(true, Ordering::Relaxed);
        idle.await.expect("the idle writer");
        let (locks, awaited, looks) = watching.await.expect("the watcher");
        for k in keepers {
            assert!(k.await.expect("whoever keeps a partition") > 0, "a partition was never waited for");
        }
        let longest = locks.values().max().copied().unwrap_or_default();
        let mut slowest = Duration::ZERO;
        for w in writers {
            let (n, longest) = w.await.expect("a writer");
            assert!(n > 0, "a writer wrote nothing");
            slowest = slowest.max(longest);
        }
        println!(
            "PostgreSQL {major}: {looks} looks, longest {longest:?}, others' slowest transaction {slowest:?}: {locks:?}"
        );
        assert!(looks > 20, "the locks were looked at {looks} times only");
        assert!(longest <= STRONG_LOCK, "a strong lock was seen for {longest:?}: {locks:#?}");
        assert!(awaited.iter().any(|l| l.starts_with("note ")), "no lock was awaited: {awaited:#?}");
        assert!(awaited.iter().any(|l| l.starts_with("part_1 ")), "no partition was awaited: {awaited:#?}");
        assert!(slowest < HELD_UP / 2, "a writer of another tenant was held up for {slowest:?}");
        assert_eq!(counts(&done, "public.part")[1], 40, "{done}");
        assert!(counts(&done, "public.customer")[1] > 6000 && counts(&done, "public.bill")[0] > 1500, "{done}");
        // Rows of the class audit stay, and the restore says so.
        assert_eq!(counts(&done, "public.trail")[2], 0);
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM trail WHERE v = 'later'"), "2");
        let warned = done["warnings"]
            .as_array()
            .expect("warnings")
            .iter()
            .any(|w| w.as_str().is_some_and(|w| w.contains("class audit")));
        assert!(warned, "{done}");
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa%fence%'"), "0");
    });
}
