//! Agents and servers that die, at every named point and at random moments; a second agent beside the first.
//!
//! `COFFER_TEST_CYCLES` (default 8) sets the number of random kills of the agent, a third as many of the server.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Scratch};
use coffer_tests::truth::{self, Watched};
use coffer_tests::workload::{self, TENANTS, Workload};
use coffer_tests::{block_on, seed, wait_for};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use std::time::Duration;
use tokio_postgres::Client;

on_majors! {
    random_kills: random_kills;
    sequences_go_with_the_rows: sequences_go_with_the_rows;
}

/// The points of agent/src/failpoints.rs that `coffer run` passes, with the hit at which it dies. A base is taken once.
const RUN_POINTS: [(&str, u32); 17] = [
    ("ship-after-objects", 1),
    ("ship-after-objects", 4),
    ("ship-before-objects", 2),
    ("log-after-sequencer", 1),
    ("log-after-sequencer", 3),
    ("ship-after-record", 1),
    ("ship-after-record", 5),
    ("keyring-after-put", 1),
    ("keyring-after-put", 3),
    ("slot-after-create", 1),
    ("base-after-horizon", 1),
    ("base-after-copy", 1),
    ("base-after-marker", 1),
    ("base-after-fulls", 1),
    ("pack-after-write", 1),
    ("pack-after-write", 3),
    ("pack-before-remove", 6),
];

/// The log is packed every few records.
fn small_packs() -> Vec<(String, String)> {
    vec![("COFFER_TEST_PACK".into(), "4".into())]
}

/// Those that an in-place restore passes.
const RESTORE_POINTS: [&str; 2] = ["restore-after-fence", "restore-before-commit"];

fn failpoint(spec: &str) -> Vec<(String, String)> {
    vec![("COFFER_FAILPOINTS".into(), spec.into())]
}

fn cycles() -> u32 {
    std::env::var("COFFER_TEST_CYCLES").map_or(8, |v| v.parse().expect("a number"))
}

/// Ends whoever holds the slot, and the slot: the next agent starts from nothing.
fn drop_slot(cluster: &Cluster) {
    wait_for("the slot to be free", 30, || {
        let sql = "SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots WHERE NOT active";
        cluster.psql("shop", sql);
        (cluster.psql("shop", "SELECT count(*) FROM pg_replication_slots") == "0").then_some(())
    });
}

/// A fresh truth, and every tenant compared with it; the differences.
async fn check_all(
    agent: &Agent,
    observer: &mut Client,
    scratch: &Scratch<'_>,
    tables: &[Watched],
    name: &str,
    tenants: &[&str],
) -> Vec<String> {
    let truth = truth::take(observer, tables, name).await;
    let mut wrong = Vec::new();
    for tenant in tenants {
        wrong.extend(scratch.check(agent, &truth, tables, tenant).await);
    }
    wrong
}

#[test]
fn the_list_of_failpoints_is_complete() {
    let source = include_str!("../../agent/src/failpoints.rs");
    let names: std::collections::BTreeSet<&str> = source
        .lines()
        .filter(|l| l.starts_with("pub const ") && l.contains(": &str = "))
        .filter_map(|l| l.split('"').nth(1))
        .collect();
    let mut ours: std::collections::BTreeSet<&str> = RUN_POINTS.iter().map(|(n, _)| *n).collect();
    ours.extend(RESTORE_POINTS);
    // By `sequences_go_with_the_rows`.
    ours.insert("restore-after-commit");
    ours.insert("spool-after-write");
    // large_objects.rs has it.
    ours.insert("large-objects-after-write");
    // jobs.rs and retention.rs, compaction.rs, archive.rs have these.
    ours.extend(["job-after-claim", "job-before-finish", "full-after-objects", "incremental-after-object"]);
    ours.insert("archive-after-objects");
    // busy.rs and readers.rs have these.
    ours.extend(["full-at-table", "restore-after-inputs"]);
    ours.extend(["prune-after-record", "prune-after-delete", "prune-before-removed", "catalog-after-sequencer"]);
    ours.extend(["checkpoint-after-write", "checkpoint-before-remove", "verify-after-list"]);
    assert_eq!(names, ours, "crash.rs does not go through every failpoint");
}

#[test]
fn at_every_failpoint_of_run() {
    let major = *coffer_tests::majors().last().expect("a major");
    block_on(async {
        let seed = seed();
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let tables = workload::watched();
        let mut observer = workload::observer(&cluster, "shop").await;
        let scratch = Scratch::new(&cluster, workload::DDL).await;
        let load = Workload::start(&cluster, "shop", 4, seed, Duration::from_millis(20));
        let mut rng = StdRng::seed_from_u64(seed);
        for (name, hit) in RUN_POINTS {
            let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
            agent.env = small_packs();
            agent.env.extend(failpoint(&format!("{name}@{hit}=abort")));
            agent.start();
            assert_eq!(agent.wait_end(90), None, "{name}: the agent should have been killed by a signal");
            assert!(agent.log().contains(&format!("failpoint {name}: abort")), "{}", agent.log());
            load.after(20).await;
            agent.env = small_packs();
            agent.start();
            restored::wait_windows(&mut agent, &TENANTS);
            let two: Vec<&str> = TENANTS.sample(&mut rng, 2).copied().collect();
            let point = format!("{name} {hit}");
            let wrong = check_all(&agent, &mut observer, &scratch, &tables, &point, &two).await;
            assert!(wrong.is_empty(), "{name}@{hit}, SEED={seed}: {wrong:#?}");
            let verify = agent.json(&["verify"]);
            assert_eq!(verify["ok"], true, "{name}: {verify}");
            assert_eq!(agent.stop(), Some(0), "{name}");
            drop_slot(&cluster);
            println!("survived {name}, hit {hit}");
        }
        load.stop().await;
    });
}

#[test]
fn while_a_large_transaction_is_in_the_spool() {
    let major = *coffer_tests::majors().last().expect("a major");
    block_on(async {
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let tables = workload::watched();
        let mut observer = workload::observer(&cluster, "shop").await;
        let scratch = Scratch::new(&cluster, workload::DDL).await;
        let mut setup = Setup::of(&cluster, "shop");
        setup.more = "[limits]\nmemory = \"64MiB\"\n".into();
        let mut agent = Agent::new(&setup);
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        agent.stop();
        cluster.psql(
            "shop",
            "INSERT INTO wide SELECT 1 + i % 8, i, md5(i::text) || repeat(md5((-i)::text), 20) FROM generate_series(1, 150000) i",
        );
        agent.env = failpoint("spool-after-write@2=abort");
        agent.start();
        assert_eq!(agent.wait_end(120), None, "a signal ends it");
        let spool: Vec<_> = std::fs::read_dir(agent.dir().join("spool")).into_iter().flatten().collect();
        println!("{} files are left in the spool", spool.len());
        agent.env.clear();
        agent.start();
        let wrong = check_all(&agent, &mut observer, &scratch, &tables, "large", &["1", "8"]).await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        println!("peak of the agent with a limit of 64 MiB: {} MiB", agent.peak_kib() >> 10);
    });
}

#[test]
fn an_in_place_restore_at_its_failpoints() {
    let major = *coffer_tests::majors().first().expect("a major");
    block_on(async {
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let tables = workload::watched();
        let mut observer = workload::observer(&cluster, "shop").await;
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let good = truth::take(&mut observer, &tables, "good").await;
        cluster.psql("shop", "DELETE FROM orders WHERE tenant = 2; UPDATE items SET qty = -1 WHERE tenant = 2");
        let bad = truth::take(&mut observer, &tables, "bad").await;
        for point in RESTORE_POINTS {
            agent.env = failpoint(&format!("{point}=abort"));
            let out = agent.coffer(&restored::in_place("2", "name:good"));
            assert_eq!(out.status.code(), None, "{point}: {}", String::from_utf8_lossy(&out.stderr));
            agent.env.clear();
            for t in TENANTS {
                let wrong = bad.differences(&observer, &tables, t).await;
                assert!(wrong.is_empty(), "{point} left something behind: {wrong:#?}");
            }
            // The application goes on although a fence may still stand.
            cluster.psql("shop", "UPDATE seats SET v = v WHERE tenant = 2");
        }
        agent.json(&restored::in_place("2", "name:good"));
        let wrong = good.differences(&observer, &tables, "2").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        let left = cluster.psql("shop", "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa_coffer_fence%'");
        assert_eq!(left, "0", "fences are left");
    });
}

/// A restore that dies right after its commit leaves no sequence behind the rows that it brought back.
fn sequences_go_with_the_rows(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE SEQUENCE down INCREMENT -1;
         CREATE TABLE t (tenant int NOT NULL, id bigserial, down int NOT NULL DEFAULT nextval('down'), PRIMARY KEY (tenant, id));
         CREATE TABLE one (tenant int NOT NULL, id int GENERATED ALWAYS AS IDENTITY, PRIMARY KEY (tenant, id));
         ALTER SEQUENCE down OWNED BY t.down; INSERT INTO t (tenant) SELECT 1 FROM generate_series(1, 5);
         INSERT INTO one (tenant) VALUES (1); SELECT * FROM coffer.discover('tenant', apply => true)",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1"]);
    let sql = |s: &str| cluster.psql("shop", s);
    sql("SELECT coffer.restore_point('good')");
    // As a migration of keys might leave them.
    sql("DELETE FROM t; DELETE FROM one; SELECT setval('t_id_seq', 1, false); SELECT setval('down', -1, false); \
         SELECT setval('one_id_seq', 1, false)");
    agent.env = failpoint("restore-after-commit=abort");
    let out = agent.coffer(&restored::in_place("1", "name:good"));
    assert_eq!(out.status.code(), None, "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(sql("SELECT count(*) FROM t"), "5", "it was committed");
    let stand = "SELECT nextval('t_id_seq'), nextval('down'), nextval('one_id_seq')";
    assert_eq!(sql(stand), "6|-6|2");

    // None moves back.
    agent.env.clear();
    sql("SELECT setval('t_id_seq', 100), setval('down', -100); DELETE FROM t WHERE id = 3");
    let done = agent.json(&restored::in_place("1", "name:good"));
    assert_eq!(done["warnings"], serde_json::json!([]), "{done}");
    assert_eq!(sql(stand), "101|-101|3");

    // One that a migration holds is no reason to wait for long, nor to fail.
    sql("DELETE FROM t; SELECT setval('t_id_seq', 1), setval('down', -1)");
    block_on(async {
        let holder = cluster.connect("shop").await;
        holder.batch_execute("BEGIN; ALTER SEQUENCE down INCREMENT BY -2").await.expect("a lock");
        let done = agent.json(&restored::in_place("1", "name:good"));
        let warnings = done["warnings"].as_array().expect("warnings");
        assert!(
            warnings.len() == 1 && warnings[0].to_string().contains("cannot move the sequence public.down"),
            "{done}"
        );
        holder.batch_execute("ROLLBACK").await.expect("rolled back");
    });
    assert_eq!(sql("SELECT count(*), max(id), nextval('t_id_seq') FROM t"), "5|5|6");
}

fn random_kills(major: u32) {
    block_on(async {
        let seed = seed();
        let mut rng = StdRng::seed_from_u64(seed);
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let tables = workload::watched();
        // Beside the server that is killed.
        let beside = Cluster::start(major);
        let scratch = Scratch::new(&beside, workload::DDL).await;
        let load = Workload::start(&cluster, "shop", 4, seed, Duration::from_millis(15));
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.env = small_packs();
        agent.start();
        let (mut agents, mut servers) = (0, 0);
        let n = cycles();
        for cycle in 0..n {
            // From a moment after the start, when bases are being taken, to a while of shipping.
            load.after(rng.random_range(1..120)).await;
            agent.kill9();
            agents += 1;
            if cycle % 3 == 2 {
                cluster.kill9();
                cluster.up();
                servers += 1;
            }
            agent.start();
            if cycle % 3 == 1 {
                // The server dies under a running agent, which connects again by itself.
                load.after(rng.random_range(1..60)).await;
                cluster.kill9();
                cluster.up();
                servers += 1;
                assert_eq!(agent.ended(), None, "the agent ended with the server");
            }
            if cycle % 2 == 1 || cycle + 1 == n {
                restored::wait_windows(&mut agent, &TENANTS);
                let mut observer = workload::observer(&cluster, "shop").await;
                let two: Vec<&str> = TENANTS.sample(&mut rng, 2).copied().collect();
                let wrong = check_all(&agent, &mut observer, &scratch, &tables, &format!("cycle {cycle}"), &two).await;
                assert!(wrong.is_empty(), "cycle {cycle}, SEED={seed}: {wrong:#?}");
            }
        }
        let (committed, failed) = load.stop().await;
        let mut observer = workload::observer(&cluster, "shop").await;
        let wrong = check_all(&agent, &mut observer, &scratch, &tables, "the end", &TENANTS).await;
        assert!(wrong.is_empty(), "SEED={seed}: {wrong:#?}");
        let verify = agent.json(&["verify"]);
        assert_eq!(verify["ok"], true, "{verify}");
        println!("{agents} kills of the agent, {servers} of the server, {committed} commits ({failed} failed)");
    });
}

/// Two agents over one repository: the second says so and leaves; a stalled one that comes back finds itself fenced.
#[test]
fn a_second_agent() {
    let major = *coffer_tests::majors().first().expect("a major");
    block_on(async {
        let seed = seed();
        let cluster = Cluster::start_with(major, "wal_sender_timeout = 2s\n", &[]);
        workload::prepare(&cluster, "shop");
        let tables = workload::watched();
        let mut observer = workload::observer(&cluster, "shop").await;
        let scratch = Scratch::new(&cluster, workload::DDL).await;
        let load = Workload::start(&cluster, "shop", 4, seed, Duration::from_millis(15));
        let mut first = Agent::new(&Setup::of(&cluster, "shop"));
        first.start();
        restored::wait_windows(&mut first, &TENANTS);

        let mut second = first.twin();
        second.start();
        assert_eq!(second.wait_end(90), Some(6), "{}", second.log());
        load.after(50).await;
        assert_eq!(first.ended(), None, "the first one goes on");

        // The first one's machine stalls; the server gives its connection up, and another one takes over.
        let stalled = first.pid() as i32;
        // SAFETY: plain signals to a process of ours.
        unsafe { libc::kill(stalled, libc::SIGSTOP) };
        wait_for("the server to give the stalled agent up", 60, || {
            (cluster.psql("shop", "SELECT bool_or(active) FROM pg_replication_slots") == "f").then_some(())
        });
        let mut third = first.twin();
        third.start();
        load.after(100).await;
        let wrong = check_all(&third, &mut observer, &scratch, &tables, "third", &["1", "5"]).await;
        assert!(wrong.is_empty(), "SEED={seed}: {wrong:#?}");
        // SAFETY: as above.
        unsafe { libc::kill(stalled, libc::SIGCONT) };
        assert_eq!(first.wait_end(90), Some(6), "{}", first.log());
        assert_eq!(third.ended(), None, "the one that took over goes on:\n{}", third.log());
        load.after(50).await;
        load.stop().await;
        let wrong = check_all(&third, &mut observer, &scratch, &tables, "the end", &TENANTS).await;
        assert!(wrong.is_empty(), "SEED={seed}: {wrong:#?}");
        let verify = third.json(&["verify"]);
        assert_eq!(verify["ok"], true, "{verify}");
    });
}
