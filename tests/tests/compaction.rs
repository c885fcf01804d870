//! Synthetic fulls: every restore from them equals the restore without, and only what changed is written.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database};
use coffer_tests::truth::{self, Watched};
use coffer_tests::{block_on, wait_for};
use serde_json::{Value, json};

on_majors! {
    fulls: fulls;
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
