//! Stores that lose answers, refuse, hang, fill up or go away; a source that restarts; a slot that is dropped.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::proxy::{Fault, Proxy};
use coffer_tests::restored::{self, Scratch};
use coffer_tests::s3::S3;
use coffer_tests::truth::{self, Truth, Watched};
use coffer_tests::workload::{self, TENANTS, Workload};
use coffer_tests::{block_on, seed, wait_for};
use serde_json::Value;
use std::time::{Duration, Instant};
use tokio_postgres::Client;

on_majors! {
    the_source_restarts: the_source_restarts;
    the_slot_is_dropped: the_slot_is_dropped;
}

/// A protected database under load.
struct Scene {
    cluster: Cluster,
    observer: Client,
    tables: Vec<Watched>,
    seed: u64,
}

impl Scene {
    async fn new(major: u32) -> Self {
        let seed = seed();
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let observer = workload::observer(&cluster, "shop").await;
        Self { cluster, observer, tables: workload::watched(), seed }
    }

    fn any() -> u32 {
        *coffer_tests::majors().first().expect("a major")
    }

    fn load(&self) -> Workload {
        Workload::start(&self.cluster, "shop", 4, self.seed, Duration::from_millis(15))
    }

    fn setup(&self, stores: String) -> Setup {
        let mut setup = Setup::of(&self.cluster, "shop");
        setup.stores = stores;
        setup
    }

    async fn take(&mut self, name: &str) -> Truth {
        truth::take(&mut self.observer, &self.tables, name).await
    }

    async fn check(&self, agent: &Agent, truths: &[&Truth], tenants: &[&str]) {
        let scratch = Scratch::new(&self.cluster, workload::DDL).await;
        let mut wrong = Vec::new();
        for truth in truths {
            for tenant in tenants {
                wrong.extend(scratch.check(agent, truth, &self.tables, tenant).await);
            }
        }
        assert!(wrong.is_empty(), "SEED={}: {wrong:#?}", self.seed);
        let verify = agent.json(&["verify"]);
        assert_eq!(verify["ok"], true, "{verify}");
    }

    /// Whether everything becomes durable within this time.
    fn durable_within(&self, time: &str) -> bool {
        let mut c = self.cluster.client("psql", "shop");
        c.args(["-X", "-q", "-c", &format!("SELECT coffer.wait_durable(timeout => '{time}')")]);
        c.output().expect("psql starts").status.success()
    }
}

fn s3_agent(scene: &Scene, port: u16) -> Agent {
    let setup = scene.setup(S3::store_at(port, "main", "backups", true));
    let mut agent = Agent::unready(&setup);
    agent.env = S3::env();
    agent.init();
    agent
}

#[test]
fn answers_are_lost_after_the_write() {
    block_on(async {
        let mut scene = Scene::new(Scene::any()).await;
        let s3 = S3::start();
        s3.bucket("backups");
        let proxy = Proxy::start(s3.port);
        let mut agent = s3_agent(&scene, proxy.port);
        let load = scene.load();
        // From the very first object on: keys' objects, bases, changesets, records.
        proxy.set(Fault::LoseAnswers(0.2));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        load.after(200).await;
        let during = scene.take("during").await;
        load.after(100).await;
        agent.kill9();
        agent.start();
        load.after(200).await;
        load.stop().await;
        let end = scene.take("end").await;
        assert!(scene.durable_within("3min"), "{}", agent.log());
        assert!(proxy.hits() >= 10, "only {} answers were lost", proxy.hits());
        proxy.set(Fault::None);
        scene.check(&agent, &[&during, &end], &TENANTS).await;
        println!("{} answers lost after the write", proxy.hits());
    });
}

/// Whoever stops an agent that is still waiting for its store, its keyring or its source does not wait for them.
#[test]
fn an_agent_is_stopped_while_it_starts() {
    // Takes connections and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = silent.local_addr().expect("its address").port();
    let (heard, connections) = std::sync::mpsc::channel();
    std::thread::spawn(move || silent.incoming().try_for_each(|c| heard.send(c)));
    let source = format!("postgresql://nobody@127.0.0.1:{port}/shop?sslmode=disable");
    let setup = |stores: String| Setup {
        source_url: source.clone(),
        stores,
        ship_interval: "300ms".into(),
        more: String::new(),
    };
    let mut agent = Agent::new(&setup(String::new()));
    agent.env = S3::env();
    let keyring = format!("file://{}/keyring", agent.dir().display());
    let elsewhere = format!("s3://keys/one?region=us-east-1&endpoint=http://127.0.0.1:{port}");
    let mut kept = Vec::new();
    for (what, stores, keys) in [
        ("source", String::new(), &keyring),
        ("store", S3::store_at(port, "main", "backups", true), &keyring),
        ("keyring", String::new(), &elsewhere),
    ] {
        agent.configure(&setup(stores));
        let text = std::fs::read_to_string(agent.config()).expect("the configuration").replace(&keyring, keys);
        std::fs::write(agent.config(), text).expect("our folder");
        agent.start();
        kept.push(
            connections.recv_timeout(Duration::from_secs(30)).unwrap_or_else(|_| panic!("{what}: {}", agent.log())),
        );
        let begun = Instant::now();
        assert_eq!(agent.stop(), Some(0), "{what}: {}", agent.log());
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}: stopped after {:?}", begun.elapsed());
        kept.extend(connections.try_iter());
    }
}

#[test]
fn refusals_hangs_and_a_full_store() {
    block_on(async {
        let mut scene = Scene::new(Scene::any()).await;
        let s3 = S3::start();
        s3.bucket("backups");
        let proxy = Proxy::start(s3.port);
        let mut agent = s3_agent(&scene, proxy.port);
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let load = scene.load();
        let mut truths = Vec::new();
        for fault in [Fault::Unavailable(0.4), Fault::Unavailable(1.0), Fault::Full, Fault::Hang] {
            proxy.set(fault);
            let before = proxy.hits();
            load.after(100).await;
            wait_for("the fault to bite", 60, || (proxy.hits() > before + 2).then_some(()));
            truths.push(scene.take(&format!("under {fault:?}")).await);
            if fault != Fault::Unavailable(0.4) {
                assert!(!scene.durable_within("3s"), "durable under {fault:?}");
            }
            assert_eq!(agent.ended(), None, "{fault:?} ended the agent:\n{}", agent.log());
            proxy.set(Fault::None);
            let begun = Instant::now();
            assert!(scene.durable_within("3min"), "after {fault:?}: {}", agent.log());
            println!("{fault:?}: durable {:.1} s after it was over", begun.elapsed().as_secs_f64());
        }
        load.stop().await;
        let all: Vec<&Truth> = truths.iter().collect();
        scene.check(&agent, &all, &["1", "4", "7"]).await;
        println!("{} requests were hit", proxy.hits());
    });
}

#[test]
fn the_server_of_the_store_stalls_and_dies() {
    block_on(async {
        let mut scene = Scene::new(Scene::any()).await;
        let mut s3 = S3::start();
        s3.bucket("backups");
        let mut agent = s3_agent(&scene, s3.port);
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let load = scene.load();
        s3.freeze();
        load.after(100).await;
        let frozen = scene.take("frozen").await;
        assert!(!scene.durable_within("3s"));
        s3.thaw();
        assert!(scene.durable_within("3min"), "{}", agent.log());
        s3.kill9();
        load.after(100).await;
        let dead = scene.take("dead").await;
        assert!(!scene.durable_within("3s"));
        // A restore without any store says so.
        let out = restored::Out::new();
        let args =
            ["restore", "--tenant", "1", "--to", "latest", "--mode", "files", "--target", out.arg(), "--confirm"];
        let (code, doc) = agent.json_err(&args);
        assert_eq!(code, 8, "{doc}");
        assert!(out.names().is_empty());
        s3.up();
        assert!(scene.durable_within("3min"), "{}", agent.log());
        assert_eq!(agent.ended(), None, "{}", agent.log());
        load.stop().await;
        scene.check(&agent, &[&frozen, &dead], &["2", "6"]).await;
    });
}

/// The faults of a store on a file system, made inside the agent: those that S3 shows from outside, on every place that
/// objects go to: two stores and the keyring.
#[test]
fn faults_of_the_file_system() {
    block_on(async {
        let mut scene = Scene::new(Scene::any()).await;
        let regions = tempfile::tempdir().expect("a folder");
        let store = |name: &str| {
            format!("[[store]]\nname = \"{name}\"\nurl = \"file://{}/{name}\"\n", regions.path().display())
        };
        let mut agent = Agent::new(&scene.setup(store("eu") + &store("us")));
        let load = scene.load();
        // Shares of the calls, from the first base on.
        let shares = [
            "put:lost-answer:0.15",
            "eu/put:503:0.1;us/put:503:0.1;get:503:0.05;list:503:0.1",
            "put:timeout:0.05;get:timeout:0.02",
            "keyring-1/put:lost-answer:0.5;keyring-1/get:timeout:0.1",
        ];
        let mut truths = Vec::new();
        for rules in shares {
            agent.env = vec![("COFFER_STORE_FAULTS".into(), format!("{rules};seed={}", scene.seed))];
            agent.start();
            restored::wait_windows(&mut agent, &TENANTS);
            load.after(150).await;
            // A tenant that is new in this round: its key is made under the faults.
            let key = 1000 + truths.len();
            scene.cluster.psql("shop", &format!("INSERT INTO seats VALUES ({key}, 1, 1)"));
            truths.push(scene.take(&format!("under {rules}")).await);
            assert!(scene.durable_within("3min"), "{rules}: {}", agent.log());
            assert_eq!(agent.ended(), None, "{rules} ended the agent:\n{}", agent.log());
            agent.kill9();
            agent.env.clear();
            // The kill may have come between two stores: a run without faults makes them level again.
            agent.start();
            assert!(scene.durable_within("1min"), "after {rules}: {}", agent.log());
            assert_eq!(agent.stop(), Some(0));
            scene.check(&agent, &[truths.last().expect("one")], &["2", "7", &key.to_string()]).await;
            println!("survived {rules}");
        }
        // All calls, for a while: nothing becomes durable, nothing ends, and afterwards nothing is missing.
        let switch = regions.path().join("fault");
        for rules in ["put:enospc:1", "us/any:503:1", "eu/put:timeout:1", "any:denied:1"] {
            agent.env = vec![("COFFER_STORE_FAULTS".into(), format!("{rules};while={}", switch.display()))];
            agent.start();
            assert!(scene.durable_within("2min"), "{}", agent.log());
            std::fs::write(&switch, "").expect("our folder");
            load.after(60).await;
            truths.push(scene.take(&format!("all {rules}")).await);
            assert!(!scene.durable_within("3s"), "durable under {rules}");
            assert_eq!(agent.ended(), None, "{rules} ended the agent:\n{}", agent.log());
            std::fs::remove_file(&switch).expect("it is there");
            let begun = Instant::now();
            assert!(scene.durable_within("3min"), "after {rules}: {}", agent.log());
            println!("{rules}: durable {:.1} s after it was over", begun.elapsed().as_secs_f64());
            agent.kill9();
        }
        load.stop().await;
        agent.env.clear();
        agent.start();
        assert!(scene.durable_within("1min"), "{}", agent.log());
        assert_eq!(agent.stop(), Some(0));
        let all: Vec<&Truth> = truths.iter().collect();
        scene.check(&agent, &all, &["1", "6"]).await;
    });
}

/// A disk of a few megabytes that fills up and is made larger. Needs the right to mount; without it the same fault is
/// shown by the S3 server above alone.
#[test]
fn the_disk_of_the_store_is_full() {
    block_on(async {
        let disk = tempfile::tempdir().expect("a folder");
        let mount = |options: &str| {
            std::process::Command::new("mount")
                .args(["-t", "tmpfs", "-o", options, "tmpfs"])
                .arg(disk.path())
                .output()
                .is_ok_and(|o| o.status.success())
        };
        if !mount("size=8m") {
            println!("left out: no right to mount a small disk here");
            return;
        }
        let unmount = Unmount(disk.path().to_owned());
        let mut scene = Scene::new(Scene::any()).await;
        let stores = format!("[[store]]\nname = \"main\"\nurl = \"file://{}/repository\"\n", disk.path().display());
        let mut agent = Agent::new(&scene.setup(stores));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let before = scene.take("before").await;
        assert!(scene.durable_within("1min"));
        // Twelve megabytes that do not compress.
        scene.cluster.psql(
            "shop",
            "INSERT INTO wide SELECT 1 + i % 8, i, (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 100) WHERE i > 0)
             FROM generate_series(1, 8000) i",
        );
        let after = scene.take("after").await;
        assert!(!scene.durable_within("5s"), "durable on a full disk");
        assert_eq!(agent.ended(), None, "{}", agent.log());
        scene.check(&agent, &[&before], &["3"]).await;
        assert!(mount("remount,size=256m"), "remount");
        assert!(scene.durable_within("3min"), "{}", agent.log());
        scene.check(&agent, &[&before, &after], &["3", "8"]).await;
        drop(agent);
        drop(unmount);
    });
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn store_of<'d>(status: &'d Value, name: &str) -> &'d Value {
    let stores = status["stores"].as_array().expect("stores");
    stores.iter().find(|s| s["name"] == name).unwrap_or_else(|| panic!("no store {name} in {status}"))
}

fn status(agent: &Agent) -> Value {
    // An unhealthy one exits 11 with the same document.
    let out = agent.coffer(&["--json", "status"]);
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

#[test]
fn an_optional_store_is_down_and_catches_up() {
    block_on(async {
        let mut scene = Scene::new(Scene::any()).await;
        let mut s3 = S3::start();
        s3.bucket("second");
        let regions = tempfile::tempdir().expect("a folder");
        let stores = format!("[[store]]\nname = \"first\"\nurl = \"file://{}/first\"\n", regions.path().display())
            + &s3.store("second", "second", false);
        let mut agent = Agent::unready(&scene.setup(stores));
        agent.env = S3::env();
        agent.init();
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let load = scene.load();
        load.after(50).await;
        s3.kill9();
        load.after(100).await;
        // The required store goes on, and restores come from it.
        assert!(scene.durable_within("1min"), "an optional store holds the slot: {}", agent.log());
        let apart = scene.take("apart").await;
        wait_for("status to notice", 60, || (store_of(&status(&agent), "second")["up"] == false).then_some(()));
        // The agent starts without it, too.
        agent.kill9();
        agent.start();
        load.after(100).await;
        load.stop().await;
        let end = scene.take("end").await;
        assert!(scene.durable_within("1min"), "{}", agent.log());
        s3.up();
        wait_for("the optional store to catch up", 180, || {
            let status = status(&agent);
            let (first, second) = (store_of(&status, "first"), store_of(&status, "second"));
            (second["up"] == true && second["durable_lsn"] == first["durable_lsn"]).then_some(())
        });
        scene.check(&agent, &[&apart, &end], &["1", "5"]).await;
        let scratch = Scratch::new(&scene.cluster, workload::DDL).await;
        for truth in [&apart, &end] {
            for tenant in TENANTS {
                let out = restored::Out::new();
                let to = format!("name:{}", truth.name);
                let mut args = restored::args(tenant, &to, "files", out.arg());
                args.extend(["--from", "second"]);
                agent.json(&args);
                scratch.load(&out).await;
                let wrong = truth.differences(&scratch.client, &scene.tables, tenant).await;
                assert!(wrong.is_empty(), "from the second store: {wrong:#?}");
            }
        }
    });
}

fn the_source_restarts(major: u32) {
    block_on(async {
        let mut scene = Scene::new(major).await;
        let mut agent = Agent::new(&scene.setup(String::new()));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let mut truths = Vec::new();
        for mode in ["fast", "immediate", "fast"] {
            let load = scene.load();
            load.after(60).await;
            scene.cluster.stop(mode);
            scene.cluster.up();
            load.after(60).await;
            load.stop().await;
            scene.observer = workload::observer(&scene.cluster, "shop").await;
            truths.push(scene.take(&format!("after {mode} {}", truths.len())).await);
            assert_eq!(agent.ended(), None, "the agent ended with the server:\n{}", agent.log());
            assert!(scene.durable_within("2min"), "{}", agent.log());
        }
        let all: Vec<&Truth> = truths.iter().collect();
        scene.check(&agent, &all, &["1", "6"]).await;
        assert_eq!(status(&agent)["sources"][0]["state"], "streaming");
    });
}

fn the_slot_is_dropped(major: u32) {
    block_on(async {
        let mut scene = Scene::new(major).await;
        let mut agent = Agent::new(&scene.setup(String::new()));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let load = scene.load();
        load.after(100).await;
        let before = scene.take("before").await;
        assert!(scene.durable_within("1min"));
        assert_eq!(agent.stop(), Some(0));
        wait_for("the slot to be free", 30, || {
            let sql = "SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots WHERE NOT active";
            scene.cluster.psql("shop", sql);
            (scene.cluster.psql("shop", "SELECT count(*) FROM pg_replication_slots") == "0").then_some(())
        });
        load.after(100).await;
        let lost = scene.take("lost").await;
        load.after(20).await;
        agent.start();

        let listed = wait_for("the gap and a new window", 120, || {
            assert_eq!(agent.ended(), None, "{}", agent.log());
            let listed = restored::listed(&agent, "1");
            let (gaps, windows) = (listed["gaps"].as_array()?.len(), listed["window"].as_array()?.len());
            (gaps >= 1 && windows >= 2).then_some(listed)
        });
        assert_eq!(listed["gaps"][0]["reason"], "slot_lost", "{listed}");
        restored::shown_in_sql(&scene.cluster, &agent, "1");
        load.after(100).await;
        let after = scene.take("after").await;
        load.stop().await;
        // The old window and the new one; between them nothing.
        scene.check(&agent, &[&before, &after], &["1", "5"]).await;
        let out = restored::Out::new();
        let args = restored::args_now("1", "name:lost", out.arg());
        let (code, doc) = agent.json_err(&args);
        assert!(code == 4 || code == 3, "{code} {doc}");
        assert!(out.names().is_empty());
        // The alarm was raised; it ends with the new bases.
        let log = agent.log();
        assert!(log.contains("\"alarm\":\"gap\"") && log.contains("slot_lost"), "{log}");
        drop(lost);
    });
}

/// Each reason of a gap that the log gives, in the order of the list, and the same in SQL. What is damaged the scrub finds.
#[test]
fn every_reason_of_a_gap() {
    let cluster = Cluster::start(Scene::any());
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, PRIMARY KEY (tenant, id));
         CREATE TABLE b (tenant int NOT NULL, owner int NOT NULL, id int NOT NULL, PRIMARY KEY (tenant, owner, id));
         CREATE TABLE tagged (id int PRIMARY KEY, tenant int NOT NULL);
         SELECT coffer.add_table('a', 'tenant'), coffer.add_table('b', 'tenant'), coffer.add_table('tagged', 'tenant');
         INSERT INTO a SELECT 1, i FROM generate_series(1, 9) i; INSERT INTO b SELECT 1, 1, i FROM generate_series(1, 9) i;
         INSERT INTO tagged SELECT i, 1 FROM generate_series(1, 9) i;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1"]);
    let tag = |enabled| {
        format!(
            "UPDATE pg_trigger SET tgenabled = '{enabled}' WHERE tgrelid = 'tagged'::regclass AND tgname = 'zzz_coffer_tag_delete';
             SELECT coffer._invalidate('tagged'::regclass);"
        )
    };
    let drop_slot = "SELECT pg_drop_replication_slot('coffer_shop');";
    // Whether the agent is away, what happens, and why that is a gap.
    let all: [(bool, String, &str); 6] = [
        (
            true,
            format!("{drop_slot} SELECT coffer.remove_table('a'); SELECT coffer.add_table('a', 'tenant');"),
            "registration_changed: public.a",
        ),
        (
            false,
            "CREATE TABLE late (tenant int, id int, PRIMARY KEY (tenant, id)); INSERT INTO late VALUES (1, 1);
             SELECT coffer.add_table('late', 'tenant');"
                .to_owned(),
            "first_base_pending: public.late",
        ),
        (false, "SELECT coffer.add_table('b', 'owner');".to_owned(), "new_base_pending: public.b"),
        (
            false,
            format!("{} DELETE FROM tagged WHERE id = 1; {}", tag('D'), tag('A')),
            "unresolved_rows: public.tagged",
        ),
        (true, drop_slot.to_owned(), "slot_lost"),
        (
            true,
            "INSERT INTO a VALUES (1, 50); SELECT pg_replication_slot_advance('coffer_shop', pg_current_wal_flush_lsn());"
                .to_owned(),
            "slot_ahead",
        ),
    ];
    for (n, (is_away, sql, reason)) in all.iter().enumerate() {
        if *is_away {
            assert_eq!(agent.stop(), Some(0), "{}", agent.log());
            wait_for("the slot to be free", 30, || {
                let free = "SELECT NOT active FROM pg_replication_slots";
                (cluster.psql("shop", free) == "t").then_some(())
            });
        }
        cluster.script("shop", sql);
        if *is_away {
            agent.start();
        }
        let open =
            |listed: &Value| (listed["gaps"].as_array().map(Vec::len), listed["window"].as_array().map(Vec::len));
        wait_for(&format!("the end of the gap {reason}"), 60, || {
            assert_eq!(agent.ended(), None, "{}", agent.log());
            (open(&restored::listed(&agent, "1")) == (Some(n + 1), Some(n + 2))).then_some(())
        });
    }
    let listed = restored::listed(&agent, "1");
    let reasons = listed["gaps"].as_array().expect("gaps").iter().map(|g| g["reason"].as_str().expect("a reason"));
    assert_eq!(reasons.collect::<Vec<_>>(), all.each_ref().map(|(.., reason)| *reason), "{listed}");
    restored::shown_in_sql(&cluster, &agent, "1");
}
