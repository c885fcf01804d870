//! Every tenant, at random points of a busy database, equals what it was there.
//!
//! `COFFER_TEST_POINTS` (default 20) sets the number of restore points, `COFFER_TEST_ALL=1` restores every tenant at
//! every point in both modes; `SEED` repeats a run's random choices.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Scratch};
use coffer_tests::truth::{self, Truth, Watched};
use coffer_tests::workload::{self, TENANTS, Workload};
use coffer_tests::{block_on, seed, wait_for};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use std::time::{Duration, Instant};

on_majors! {
    under_load: under_load;
    phantom: phantom;
}

/// Waits for the first bases. Now and then, on an overloaded machine, the server cannot decode the first transactions of a
/// slot that was made while TRUNCATEs ran ("could not map filenode"), and stays silent on the next connection: then the
/// agent is started anew, which is said. Any other delay is a failure.
fn first_windows(agent: &mut Agent) {
    for _ in 0..2 {
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end {
            if restored::restorable(agent).len() >= TENANTS.len() {
                return restored::wait_windows(agent, &TENANTS);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        if !agent.log().contains("could not map filen") {
            break;
        }
        println!("the stream is silent after a decoding error of the server: the agent is started anew");
        agent.kill9();
        agent.start();
    }
    restored::wait_windows(agent, &TENANTS);
}

fn under_load(major: u32) {
    block_on(async {
        let seed = seed();
        let mut rng = StdRng::seed_from_u64(seed);
        let points: usize = std::env::var("COFFER_TEST_POINTS").map_or(20, |v| v.parse().expect("a number"));
        let all = std::env::var_os("COFFER_TEST_ALL").is_some();
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let tables = workload::watched();
        let mut observer = workload::observer(&cluster, "shop").await;
        let load = Workload::start(&cluster, "shop", 8, seed, Duration::from_millis(8));
        load.after(200).await;
        let too_early = truth::take(&mut observer, &tables, "too_early").await;

        // The bases are taken while the writers write.
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        let begun = Instant::now();
        first_windows(&mut agent);
        println!(
            "PostgreSQL {major}: first bases in {:.1} s, {} commits",
            begun.elapsed().as_secs_f64(),
            load.committed()
        );

        let mut truths: Vec<Truth> = Vec::new();
        for n in 0..points {
            load.after(rng.random_range(1..150)).await;
            truths.push(truth::take(&mut observer, &tables, &format!("point {n}")).await);
            // Neither a crash nor a stop of the agent may show in what is restored.
            if n == points / 3 {
                agent.kill9();
                load.after(50).await;
                agent.start();
            } else if n == points * 2 / 3 {
                assert_eq!(agent.stop(), Some(0), "a stop is orderly");
                load.after(50).await;
                agent.start();
            }
        }
        let status = agent.json(&["status"]);
        assert_eq!(status["sources"][0]["unresolved_rows"], 0, "{status}");

        let scratch = Scratch::new(&cluster, workload::DDL).await;
        // A tenant that is left alone from now on comes back in place while the writers go on with the others.
        load.freeze(1);
        let others_go_on = load.committed();
        // The table locks of a restore point wait for whatever still touches it.
        let still = truth::take(&mut observer, &tables, "frozen").await;
        for (mode, truth) in [("back", truths.choose(&mut rng).expect("a point")), ("forth", &still)] {
            let wrong = scratch.check(&agent, truth, &tables, "1").await;
            assert!(wrong.is_empty(), "to files before in place, {mode}, SEED={seed}: {wrong:#?}");
            let done = agent.json(&restored::in_place("1", &format!("name:{}", truth.name)));
            let wrong = truth.differences(&observer, &tables, "1").await;
            assert!(wrong.is_empty(), "in place, {mode}, SEED={seed}: {wrong:#?}\n{done}");
        }
        load.after(20).await;
        let (committed, failed) = load.stop().await;
        assert!(committed > others_go_on);
        println!("{committed} transactions committed, {failed} failed (deadlocks, rolled back by themselves)");
        truths.push(truth::take(&mut observer, &tables, "the end").await);

        let (code, doc) = agent.json_err(&restored::args_now("1", "name:too_early", "/nonexistent/coffer"));
        assert!(code == 4 || code == 3, "before the first base: {code} {doc}");
        drop(too_early);

        let mut wrong = Vec::new();
        let (mut files, mut databases) = (0, 0);
        let begun = Instant::now();
        for (n, truth) in truths.iter().enumerate() {
            for tenant in TENANTS {
                let last = n + 1 == truths.len();
                if !(all || last || n % 5 == 0 || rng.random_range(0..TENANTS.len()) < 3) {
                    continue;
                }
                if all || rng.random_bool(0.75) {
                    wrong.extend(scratch.check(&agent, truth, &tables, tenant).await);
                    files += 1;
                }
                if all || rng.random_bool(0.25) {
                    wrong.extend(Database::check(&agent, &cluster, truth, &tables, tenant).await);
                    databases += 1;
                }
            }
        }
        println!(
            "{} points, {files} restores to files and {databases} to databases in {:.0} s",
            truths.len(),
            begun.elapsed().as_secs_f64()
        );
        assert!(wrong.is_empty(), "SEED={seed}: {} differences: {wrong:#?}", wrong.len());

        // In place again, the writers gone: now all that another tenant has must be as it was.
        let end = truths.last().expect("the end");
        for tenant in ["2", "3"] {
            let target = truths.choose(&mut rng).expect("a point");
            agent.json(&restored::in_place(tenant, &format!("name:{}", target.name)));
            let mut wrong = target.differences(&observer, &tables, tenant).await;
            agent.json(&restored::in_place(tenant, "name:the end"));
            for t in TENANTS {
                wrong.extend(end.differences(&observer, &tables, t).await);
            }
            assert!(wrong.is_empty(), "in place, SEED={seed}: {wrong:#?}");
        }
        let verify = agent.json(&["verify"]);
        assert_eq!(verify["ok"], true, "{verify}");
    });
}

/// A row that a base has read and a crash of the server has undone must not be in any restore.
fn phantom(major: u32) {
    block_on(async {
        // Asynchronous commits stay in shared memory for as long as the WAL writer sleeps.
        let conf = "wal_writer_delay = 10s\nautovacuum = off\nbgwriter_lru_maxpages = 0\ncheckpoint_timeout = 1d\n";
        for attempt in 1..=8 {
            let cluster = Cluster::start_with(major, conf, &[]);
            workload::prepare(&cluster, "shop");
            cluster.psql("shop", "CREATE TABLE late (tenant int NOT NULL, id int PRIMARY KEY, v text)");
            let mut tables = workload::watched();
            tables.push(Watched::new("late", "tenant"));
            let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
            agent.start();
            restored::wait_windows(&mut agent, &TENANTS);
            agent.kill9();
            // What the agent commits beside the base would flush the phantom, too.
            cluster.psql("shop", "ALTER ROLE coffer_agent SET synchronous_commit = off");
            // The next base pauses twice: before its snapshot, for the row to be written at that moment, and before the
            // marker that would make it valid (and, being a synchronous commit, would flush the phantom too).
            let pauses = "base-after-horizon@1=sleep(1000);base-after-copy@1=sleep(3000)";
            agent.env = vec![("COFFER_FAILPOINTS".into(), pauses.into())];
            agent.start();
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            let db = cluster.connect("shop").await;
            db.batch_execute("SET synchronous_commit = off").await.expect("the setting");
            cluster.psql("shop", "SELECT coffer.add_table('late', 'tenant')");
            wait_for("the base to begin", 60, || agent.log().contains("failpoint base-after-horizon").then_some(()));
            db.batch_execute("INSERT INTO late VALUES (1, 1, 'phantom')").await.expect("an asynchronous commit");
            wait_for("the base to have read", 60, || agent.log().contains("failpoint base-after-copy").then_some(()));
            cluster.kill9();
            cluster.up();
            if cluster.psql("shop", "SELECT count(*) FROM late") != "0" {
                println!("attempt {attempt}: the row survived the crash");
                continue;
            }
            // Another row, which a restore has as soon as there is a base.
            cluster.psql("shop", "INSERT INTO late VALUES (2, 2, 'real')");
            let mut observer = workload::observer(&cluster, "shop").await;
            let scratch =
                Scratch::new(&cluster, &format!("{} CREATE TABLE late (tenant int, id int, v text)", workload::DDL))
                    .await;
            let end = Instant::now() + Duration::from_secs(90);
            for n in 0.. {
                let truth = truth::take(&mut observer, &tables, &format!("after {n}")).await;
                let out = restored::Out::new();
                let to = format!("name:{}", truth.name);
                let done = agent.coffer(&restored::args("2", &to, "files", out.arg()));
                if done.status.success() {
                    let mut wrong = scratch.check(&agent, &truth, &tables, "2").await;
                    wrong.extend(scratch.check(&agent, &truth, &tables, "1").await);
                    assert!(wrong.is_empty(), "{wrong:#?}\n{}", agent.log());
                    break;
                }
                // Outside the window until the table has its base.
                assert_eq!(done.status.code(), Some(4), "{}", String::from_utf8_lossy(&done.stderr));
                assert!(Instant::now() < end, "no base:\n{}", agent.log());
            }
            println!("PostgreSQL {major}: lost at attempt {attempt}");
            return;
        }
        panic!("the asynchronous commit survived every crash: this test shows nothing");
    });
}
