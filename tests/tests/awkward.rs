//! Transactions and rows of awkward shapes: storms of savepoints, thousands of tenants at once, hot rows, rows as wide as
//! they get, and long silence on the stream.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Scratch};
use coffer_tests::truth::{self, Watched};
use std::time::{Duration, Instant};

on_majors! {
    shapes: shapes;
    silence: silence;
}

/// As many columns as a table can have.
const COLUMNS: usize = 1600;
const TENANTS: u32 = 5000;

fn ddl() -> String {
    let wide: String = (3..=COLUMNS).map(|n| format!(", c{n} int")).collect();
    format!(
        "CREATE TABLE by_key (tenant int NOT NULL, id int, v int, PRIMARY KEY (tenant, id));
         CREATE TABLE by_tag (id int PRIMARY KEY, tenant int NOT NULL, v int);
         CREATE TABLE below (id int PRIMARY KEY, up int NOT NULL REFERENCES by_tag ON DELETE CASCADE, v int);
         CREATE TABLE wide (tenant int NOT NULL, id int{wide}, PRIMARY KEY (tenant, id));"
    )
}

fn watched() -> Vec<Watched> {
    vec![
        Watched::new("by_key", "t.tenant"),
        Watched::new("by_tag", "t.tenant"),
        Watched::new("below", "(SELECT u.tenant FROM by_tag u WHERE u.id = t.up)"),
        Watched::new("wide", "t.tenant"),
    ]
}

fn shapes(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", &ddl());
        cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', true)");
        cluster.psql("shop", "INSERT INTO by_key VALUES (1, 0, 0), (2, 0, 0)");
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        let mut db = cluster.connect("shop").await;
        let scratch = Scratch::new(&cluster, &ddl()).await;
        let mut point = async |name: &str, script: &str, tenants: &[&str]| {
            cluster.script("shop", script);
            let truth = truth::take(&mut db, &watched(), name).await;
            for tenant in tenants {
                let mut wrong = scratch.check(&agent, &truth, &watched(), tenant).await;
                wrong.extend(Database::check(&agent, &cluster, &truth, &watched(), tenant).await);
                assert!(wrong.is_empty(), "{name}: {wrong:#?}");
            }
        };
        // 10,000 subtransactions in one transaction, of which a third is rolled back, nested ones among them.
        let storm = "DO $$BEGIN FOR i IN 1..5000 LOOP
               BEGIN
                 INSERT INTO by_tag VALUES (i, 1 + i % 2, 0);
                 INSERT INTO below VALUES (i, i, 0);
                 BEGIN
                   UPDATE by_tag SET tenant = 3 - tenant, v = i WHERE id = i;
                   IF i % 3 = 0 THEN RAISE EXCEPTION 'inner'; END IF;
                 EXCEPTION WHEN raise_exception THEN NULL; END;
                 IF i % 5 = 0 THEN RAISE EXCEPTION 'outer'; END IF;
               EXCEPTION WHEN raise_exception THEN NULL; END;
             END LOOP; END$$";
        point("storm", storm, &["1", "2"]).await;
        let many = format!(
            "BEGIN; INSERT INTO by_key SELECT t, 1, t FROM generate_series(1, {TENANTS}) t;
             UPDATE by_key SET v = v + 1; DELETE FROM by_key WHERE tenant % 7 = 3; COMMIT;"
        );
        point("many", &many, &["1", "2", "3", "2500", "4999"]).await;
        // In one transaction it would be quadratic: its own dead versions are in the way of each update.
        let hot = "DO $$BEGIN FOR i IN 1..100000 LOOP
               UPDATE by_key SET v = i WHERE tenant = 1 AND id = 0;
               IF i % 50 = 0 THEN COMMIT; END IF;
             END LOOP; END$$";
        point("hot", hot, &["1"]).await;
        let values: String = (3..=COLUMNS).map(|n| format!(", {n}")).collect();
        let wide = format!(
            "INSERT INTO wide VALUES (1, 1{values}), (2, 1{values}); UPDATE wide SET c{COLUMNS} = NULL, c3 = -1 WHERE tenant = 1;
             UPDATE wide SET id = 2 WHERE tenant = 2; INSERT INTO wide (tenant, id) VALUES (1, 3);"
        );
        point("wide", &wide, &["1", "2"]).await;
        assert_eq!(agent.json(&["status"])["sources"][0]["unresolved_rows"], 0);
        assert_eq!(agent.json(&["verify"])["ok"], true);
    });
}

/// A transaction of which nothing concerns us, and whose decoding takes longer than the server waits for a sign of life.
fn silence(major: u32) {
    block_on(async {
        let cluster = Cluster::start_with(major, "wal_sender_timeout = 2s\nlogical_decoding_work_mem = 64kB\n", &[]);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE ours (tenant int NOT NULL, id int, PRIMARY KEY (tenant, id)); CREATE TABLE noise (id int, v text);
             SELECT coffer.add_table('ours', 'tenant'); SELECT coffer.exclude('noise', 'not of interest');
             INSERT INTO ours VALUES (1, 1);",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1"]);
        let begins = |log: String| log.matches("the stream begins").count();
        let before = begins(agent.log());
        cluster.psql("shop", "INSERT INTO noise SELECT i, md5(i::text) FROM generate_series(1, 1500000) i");
        cluster.psql("shop", "INSERT INTO ours VALUES (1, 2)");
        let silent = stood_still(&cluster).await;
        println!("PostgreSQL {major}: silent for {silent:?}");
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '3min')");
        assert_eq!(begins(agent.log()), before, "the stream broke off:\n{}", agent.log());
        assert!(!cluster.log().contains("terminating walsender"), "{}", cluster.log());
        assert!(silent > Duration::from_secs(2), "the server had no reason to lose patience: {silent:?}");
    });
}

/// How long the walsender stood at one place at the longest, until it has all that is written: a place is a record, and that of
/// a commit is passed when the whole transaction is decoded.
async fn stood_still(cluster: &Cluster) -> Duration {
    let client = cluster.connect("shop").await;
    let end = cluster.psql("shop", "SELECT pg_current_wal_lsn()");
    let look = format!("SELECT sent_lsn::text, sent_lsn < '{end}' FROM pg_stat_replication");
    let (mut place, mut since, mut longest) = (String::new(), Instant::now(), Duration::ZERO);
    loop {
        let seen = client.query_one(&look, &[]).await.expect("one walsender");
        if !seen.get::<_, bool>(1) {
            return longest;
        }
        let at: String = seen.get(0);
        if at != place {
            (place, since) = (at, Instant::now());
        }
        longest = longest.max(since.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
