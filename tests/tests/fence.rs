//! The fence of a restore in place: the tenant's writers wait while it is applied, and nobody else does.

use crate::restores::{counts, protected, restore};
use coffer_tests::cluster::Cluster;
use coffer_tests::{block_on, wait_for};
use std::collections::BTreeMap;
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

/// The longest that a lock above ROW EXCLUSIVE is held or awaited, and a little for the time that looking takes.
const STRONG_LOCK: Duration = Duration::from_millis(200 + 150);

/// The longest that a session of the restore was seen to hold, or to wait for, a lock above ROW EXCLUSIVE on a table of
/// the application; and how often it was looked.
async fn watch_locks(cluster: &Cluster, stop: Arc<AtomicBool>) -> (Duration, BTreeMap<String, Duration>, u64) {
    let db = cluster.connect("shop").await;
    let sql = "SELECT l.pid || ' ' || l.relation::regclass || ' ' || l.mode || CASE WHEN l.granted THEN '' ELSE ' awaited' END
        FROM pg_locks l JOIN pg_stat_activity a USING (pid) JOIN pg_class c ON c.oid = l.relation
        WHERE a.application_name = 'coffer restore' AND l.locktype = 'relation' AND c.relkind = 'r'
          AND c.relnamespace = 'public'::regnamespace
          AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')";
    let (mut since, mut longest, mut looks): (BTreeMap<String, Instant>, BTreeMap<String, Duration>, u64) =
        Default::default();
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let before = Instant::now();
        if before - last > Duration::from_millis(50) {
            // Nobody saw whether it was given up meanwhile.
            since.clear();
        }
        last = before;
        let seen: Vec<String> = db.query(sql, &[]).await.expect("locks").iter().map(|r| r.get(0)).collect();
        since.retain(|lock, _| seen.contains(lock));
        for lock in seen {
            let first = *since.entry(lock.clone()).or_insert(before);
            let entry = longest.entry(lock.split_once(' ').map_or("", |l| l.1).to_owned()).or_default();
            *entry = (*entry).max(before - first);
        }
        looks += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (longest.values().max().copied().unwrap_or_default(), longest, looks)
}

/// How long a restore is kept from a fence.
const HELD_UP: Duration = Duration::from_secs(3);

fn in_place_keeps_its_promises(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        let cluster = Arc::new(cluster);
        cluster.script(
            "shop",
            "ALTER TABLE customer DISABLE TRIGGER noisy;
             INSERT INTO customer SELECT t, i, 'c' || i, 'ok' FROM generate_series(1, 3) t, generate_series(1000, 20000) i;
             INSERT INTO bill (tenant, customer, amount) SELECT t, i, i FROM generate_series(1, 3) t, generate_series(1000, 8000) i;
             SELECT coffer.restore_point('before');
             UPDATE customer SET name = name || '?' WHERE tenant = 2 AND id % 3 = 0;
             DELETE FROM bill WHERE tenant = 2 AND id % 4 = 0;
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
        let (longest, locks, looks) = watching.await.expect("the watcher");
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
        assert!(locks.keys().any(|l| l.ends_with("awaited")), "no lock was awaited: {locks:#?}");
        assert!(slowest < HELD_UP / 2, "a writer of another tenant was held up for {slowest:?}");
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
