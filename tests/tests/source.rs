//! What goes on in the server beside the rows: a slot that waits, the log of other databases, transaction ids that begin anew.

use crate::isolation::files;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Scratch};
use coffer_tests::truth::{self, Watched};
use coffer_tests::wait_for;
use std::process::Command;
use std::time::{Duration, Instant};

on_majors! {
    a_slot_that_waits: a_slot_that_waits;
    log_of_other_databases: log_of_other_databases;
    ids_that_wrap: ids_that_wrap;
}

const DDL: &str = "
CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
CREATE TABLE b (id int PRIMARY KEY, tenant int NOT NULL, v text);
";

fn protect(cluster: &Cluster) {
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    cluster.script(
        "shop",
        "SELECT coffer.add_table('a', 'tenant'); SELECT coffer.add_table('b', 'tenant');
         INSERT INTO a SELECT t, i, 'a' || i FROM generate_series(1, 2) t, generate_series(1, 20) i;
         INSERT INTO b SELECT i, 1 + i % 2, 'b' || i FROM generate_series(1, 40) i;",
    );
}

/// A transaction anywhere in the server holds up the first start: the agent names it, stops when told to, and goes on when it ends.
fn a_slot_that_waits(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        protect(&cluster);
        let writer = cluster.connect("postgres").await;
        writer.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.expect("a transaction");
        let pid: i32 = writer.query_one("SELECT pg_backend_pid()", &[]).await.expect("a row").get(0);
        let told = |agent: &Agent, what: &str| {
            let says = || agent.alarms("source_down").iter().any(|a| a.to_string().contains(what)).then_some(());
            wait_for(what, 30, says);
        };
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        let named = format!("pid {pid} in database postgres");
        told(&agent, &named);
        assert!(agent.log().contains(&named), "{}", agent.log());
        let begun = Instant::now();
        assert_eq!(agent.stop(), Some(0));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        // In the server the wait goes on: what is there of the slot is no place to begin at.
        agent.start();
        told(&agent, "still being made for another session");
        writer.batch_execute("COMMIT").await.expect("ok");
        restored::wait_windows(&mut agent, &["1", "2"]);
        wait_for("the alarm to end", 10, || agent.alarms("source_down").is_empty().then_some(()));
        assert!(agent.alarms("gap").is_empty());
        assert_eq!(agent.stop(), Some(0));
    });
}

/// Where only other databases write, the slot follows, and nothing is archived for it.
fn log_of_other_databases(major: u32) {
    let cluster = Cluster::start(major);
    protect(&cluster);
    cluster.psql("postgres", "CREATE DATABASE other");
    let mut agent = Agent::new(&Setup { more: "[rpo]\nlimit = \"6s\"\n".into(), ..Setup::of(&cluster, "shop") });
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let changesets =
        || files(&agent.repository()).into_iter().filter(|f| f.to_string_lossy().contains("/c/")).collect::<Vec<_>>();
    let (before, from) = (changesets(), cluster.psql("other", "SELECT pg_current_wal_insert_lsn()"));
    cluster.psql(
        "other",
        "CREATE TABLE x AS SELECT i, repeat(md5(i::text), 32) FROM generate_series(1, 90000) i; UPDATE x SET i = i WHERE i < 10000",
    );
    let end = cluster.psql("other", "SELECT pg_current_wal_insert_lsn()");
    assert_eq!(cluster.psql("other", &format!("SELECT pg_wal_lsn_diff('{end}', '{from}') > 90000000")), "t");
    // The server notes running transactions every 15 s, and with a checkpoint.
    cluster.psql("other", "CHECKPOINT");
    for lsn in ["confirmed_flush_lsn", "restart_lsn"] {
        wait_for(lsn, 30, || {
            let follows = format!("SELECT {lsn} >= '{end}' FROM pg_replication_slots WHERE slot_name = 'coffer_shop'");
            (cluster.psql("postgres", &follows) == "t").then_some(())
        });
    }
    assert_eq!(changesets(), before);
    assert_eq!(agent.stop(), Some(0));
}

/// Sets the stopped cluster's next transaction id; to be at most 2^31 ahead.
fn reset_xid(cluster: &Cluster, epoch: u32, xid: u32) {
    let dir = cluster.data();
    // The server expects the page of the next id, 2^20 ids a file.
    let segment = dir.join("pg_xact").join(format!("{:04X}", xid >> 20));
    std::fs::write(&segment, vec![0; 256 << 10]).expect("the cluster is ours");
    let owner = Command::new("chown").arg("--reference").arg(dir.join("PG_VERSION")).arg(&segment).status();
    assert!(owner.expect("chown").success());
    cluster.program("pg_resetwal", &["-e", &epoch.to_string(), "-x", &xid.to_string()]);
}

/// Ends transactions until so many ids are left before the 32-bit counter begins anew.
fn burn_until(cluster: &Cluster, left: u32) {
    let at = (1u64 << 32) - u64::from(left);
    cluster.psql(
        "postgres",
        &format!("DO $$BEGIN WHILE pg_current_xact_id()::text::numeric % 4294967296 BETWEEN 2147483648 AND {at} LOOP COMMIT; END LOOP; END$$"),
    );
}

/// Transaction ids beyond 2^32, and a counter of 32 bits that begins anew while everything runs.
fn ids_that_wrap(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        // Nothing may be 2^31 ids old: there in steps, with everything frozen between them.
        for (epoch, xid) in [(0, 1_500_000_000), (0, 3_000_000_000), (1, 4_294_965_000)] {
            cluster.psql("postgres", "ALTER DATABASE template0 ALLOW_CONNECTIONS true");
            let frozen = cluster.client("vacuumdb", "postgres").args(["--all", "--freeze", "--quiet"]).status();
            assert!(frozen.expect("vacuumdb").success());
            cluster.stop("fast");
            reset_xid(&cluster, epoch, xid);
            cluster.up();
        }
        protect(&cluster);
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        let mut db = cluster.connect("shop").await;
        let tables: Vec<Watched> = ["a", "b"].map(|t| Watched::new(t, "tenant")).to_vec();
        let change = |n: u32| {
            cluster.script(
                "shop",
                &format!(
                    "UPDATE a SET v = v || '{n}' WHERE id % 3 = {n} % 3; DELETE FROM b WHERE id % 10 = {n};
                     UPDATE b SET tenant = 3 - tenant WHERE id % 10 = {n} + 5; INSERT INTO b SELECT 100 * {n} + i, 1, 'new' FROM generate_series(1, 5) i;"
                ),
            );
        };
        burn_until(&cluster, 60);
        change(1);
        let mut truths = vec![truth::take(&mut db, &tables, "before").await];
        // Begins before, and is seen by a base only after.
        let long = cluster.connect("shop").await;
        long.batch_execute("BEGIN; INSERT INTO a VALUES (1, 1000, 'long'), (2, 1000, 'long')").await.expect("rows");
        assert!(cluster.psql("shop", "SELECT pg_current_xact_id()::text::numeric < 2 * 4294967296") == "t");
        burn_until(&cluster, 0);
        change(2);
        assert!(cluster.psql("shop", "SELECT pg_current_xact_id()::text::numeric > 2 * 4294967296") == "t");
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let based = agent.log().matches("bases are recorded").count();
        cluster.psql("shop", "SELECT coffer.remove_table('b'); SELECT coffer.add_table('b', 'tenant')");
        change(3);
        long.batch_execute("COMMIT").await.expect("ok");
        wait_for("the new base", 60, || (agent.log().matches("bases are recorded").count() > based).then_some(()));
        truths.push(truth::take(&mut db, &tables, "across").await);
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        assert_eq!(agent.stop(), Some(0));
        change(4);
        agent.start();
        truths.push(truth::take(&mut db, &tables, "after").await);
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let scratch = Scratch::new(&cluster, DDL).await;
        for truth in &truths {
            for tenant in ["1", "2"] {
                let wrong = scratch.check(&agent, truth, &tables, tenant).await;
                assert!(wrong.is_empty(), "{tenant} at {}: {wrong:#?}", truth.name);
            }
        }
        let live = agent.json(&["verify", "--against-live"]);
        assert_eq!(live["ok"], true, "{live}");
        assert_eq!(agent.stop(), Some(0));
    });
}
