//! Restore drills: a tenant restored into a scratch database, compared with the repository's own merge, and dropped.

use crate::isolation::files;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use coffer_tests::wait_for;
use serde_json::Value;

on_majors! {
    by_hand_and_by_schedule: by_hand_and_by_schedule;
    private_server: private_server;
}

fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TYPE mood AS ENUM ('sad', 'ok');
         CREATE TABLE kinds (id int PRIMARY KEY, label text NOT NULL);
         CREATE TABLE a (tenant int NOT NULL, id serial, kind int REFERENCES kinds, m mood, f float8, v text, PRIMARY KEY (tenant, id));
         CREATE TABLE c (tenant int NOT NULL, at timestamptz, v text);
         SELECT * FROM coffer.add_shared('kinds');
         SELECT * FROM coffer.add_table('a', 'tenant'); SELECT * FROM coffer.add_table('c', 'tenant');
         INSERT INTO kinds VALUES (1, 'one'), (2, 'two');
         INSERT INTO a (tenant, kind, m, f, v) SELECT t, 1 + i % 2, 'ok', i / 3.0, E'a\\t\\\\' || i FROM generate_series(1, 2) t, generate_series(1, 100) i;
         INSERT INTO c SELECT t, '2026-01-01 00:00:00Z', 'c' || i % 3 FROM generate_series(1, 2) t, generate_series(1, 9) i;",
    );
    cluster
}

/// Databases of drills that are there now.
fn left(cluster: &Cluster) -> String {
    cluster.psql("postgres", "SELECT count(*) FROM pg_database WHERE datname LIKE 'coffer_drill%'")
}

fn by_hand_and_by_schedule(major: u32) {
    let cluster = database(major);
    let mut setup = Setup::of(&cluster, "shop");
    setup.more = format!("[verify]\ndrill_url = \"{}\"\n", cluster.url("postgres", "postgres"));
    let mut agent = Agent::new(&setup);
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.psql("shop", "UPDATE a SET v = v || '!' WHERE id % 2 = 0; DELETE FROM c WHERE v = 'c1'");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    agent.json(&["compact"]);
    let said = agent.json(&["verify", "--drill"]);
    let drills = said["drills"].as_array().expect("drills");
    assert!(said["ok"] == true && drills.len() == 3, "{said}");
    let shared = &drills[2];
    assert_eq!((&shared["kind"], &shared["ok"]), (&"shared".into(), &true.into()), "{said}");
    let kinds = serde_json::json!([{"relation": "public.kinds", "rows": 2, "restored": 2, "ok": true}]);
    assert_eq!(shared["tables"], kinds, "{said}");
    let tables = drills[0]["tables"].as_array().expect("tables");
    let rows: Vec<(&str, &Value)> =
        tables.iter().map(|t| (t["relation"].as_str().expect("a name"), &t["restored"])).collect();
    assert_eq!(rows, [("public.a", &100.into()), ("public.c", &6.into()), ("public.kinds", &2.into())], "{said}");
    assert_eq!(left(&cluster), "0");
    let seen = "SELECT tenant, ok FROM coffer.verifications WHERE what = 'drill' ORDER BY kind, tenant, verified_at";
    wait_for("the records of it", 90, || (cluster.psql("shop", seen) == "1|t\n2|t\n(shared)|t").then_some(()));

    // A tenant that cannot be restored any more; the other one can.
    let uid = restored::listed(&agent, "1")["uid"].as_str().expect("a uid").replace('-', "");
    let folder = format!("/t/{uid}/f/");
    for f in files(&agent.repository()).into_iter().filter(|f| f.to_str().is_some_and(|f| f.contains(&folder))) {
        std::fs::remove_file(f).expect("our store");
    }
    let (exit, said) = agent.json_err(&["verify", "--drill"]);
    let failed: Vec<&Value> =
        said["failures"].as_array().expect("failures").iter().filter(|f| f["kind"] == "drill").collect();
    assert!(exit == 5 && failed.len() == 1 && failed[0]["object"] == "tenant 1", "{exit} {said}");
    let good: Vec<bool> = said["drills"].as_array().expect("drills").iter().map(|d| d["ok"] == true).collect();
    assert_eq!((good.iter().filter(|g| **g).count(), good.len()), (2, 3), "{said}");
    assert_eq!(left(&cluster), "0", "a drill that failed leaves nothing behind");

    // By schedule: a server is named for it, so it is every week.
    agent.stop();
    agent.env = vec![("COFFER_TEST_CLOCK".into(), "16d".into())];
    agent.start();
    wait_for("the drills", 300, || (agent.metric("coffer_drills_total") == 3.0).then_some(()));
    let alarms = wait_for("the alarm", 60, || Some(agent.alarms("drill_failed")).filter(|a| !a.is_empty()));
    assert!(alarms.len() == 1 && alarms[0]["tenant"] == "1", "{alarms:?}");
    let newest = "SELECT DISTINCT ON (kind, tenant) tenant, ok FROM coffer.verifications WHERE what = 'drill' \
        ORDER BY kind, tenant, verified_at DESC";
    wait_for("the records of it", 90, || (cluster.psql("shop", newest) == "1|f\n2|t\n(shared)|t").then_some(()));
    wait_for("the gauge", 10, || (agent.metric("coffer_drill_failing_tenants") == 1.0).then_some(()));
    assert!(agent.metric("coffer_last_drill_timestamp_seconds") > 1.7e9);
    assert!(agent.page("/").contains("3 tenants, 1 of them failed"), "{}", agent.page("/"));
    assert_eq!(left(&cluster), "0");

    // Reference data that cannot be restored, and with it nobody.
    let reserved = agent.json(&["list"])["reserved"].clone();
    let shared = reserved.as_array().expect("reserved").iter().find(|t| t["kind"] == "shared").expect("reference data");
    let folder = format!("/t/{}/", shared["uid"].as_str().expect("a uid").replace('-', ""));
    for f in files(&agent.repository()).into_iter().filter(|f| f.to_str().is_some_and(|f| f.contains(&folder))) {
        std::fs::remove_file(f).expect("our store");
    }
    let (exit, said) = agent.json_err(&["verify", "--drill"]);
    let failed: Vec<&Value> =
        said["failures"].as_array().expect("failures").iter().filter(|f| f["kind"] == "drill").collect();
    assert!(exit == 5 && failed.iter().any(|f| f["object"] == "tenant (shared)"), "{exit} {said}");
}

fn private_server(major: u32) {
    let cluster = database(major);
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    let said = agent.json(&["verify", "--drill", "--tenant", "2"]);
    assert_eq!(
        (&said["ok"], &said["drills"][0]["ok"], &said["drills"][0]["tables"][0]["restored"]),
        (&true.into(), &true.into(), &100.into()),
        "{said}"
    );
    let spool = std::fs::read_dir(agent.dir().join("spool")).expect("the spool");
    let names: Vec<String> = spool.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    assert!(!names.iter().any(|n| n.starts_with("drill-")), "{names:?}");
}
