//! Large objects: kept with the tenant whose rows refer to them, and back in every mode.

use crate::isolation::files;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database};
use coffer_tests::sql_proxy::{self, SqlProxy};
use coffer_tests::{block_on, wait_for};
use serde_json::Value;
use std::path::PathBuf;

on_majors! {
    every_mode: every_mode;
    isolation_and_damage: isolation_and_damage;
    killed_in_the_middle: killed_in_the_middle;
    committed_or_not: committed_or_not;
    only_what_is_wanted: only_what_is_wanted;
}

/// Tenants 1 and 2 with documents of 0 bytes, 3 bytes and 5 MB; one that nobody refers to, one of no tenant's row.
const TABLES: &str = "
CREATE ROLE app; CREATE DOMAIN lo AS oid;
CREATE TABLE docs (tenant int NOT NULL, id int NOT NULL, body oid, scan lo, PRIMARY KEY (tenant, id));
CREATE TABLE pages (tenant int NOT NULL, id int NOT NULL, n int, PRIMARY KEY (tenant, id));
ALTER TABLE docs OWNER TO app;
SELECT * FROM coffer.add_table('docs', 'tenant'); SELECT * FROM coffer.add_table('pages', 'tenant');
SELECT coffer.add_large_objects('docs', 'body'); SELECT coffer.add_large_objects('docs', 'scan');
CREATE FUNCTION noise(mark text, bytes int) RETURNS bytea LANGUAGE sql AS
$$ SELECT substring(string_agg(decode(md5(mark || i), 'hex') || convert_to(mark, 'UTF8'), '' ORDER BY i) FROM 1 FOR bytes)
   FROM generate_series(1, bytes / 16 + 1) i $$;
SELECT lo_from_bytea(70001, ''), lo_from_bytea(70002, 'abc'), lo_from_bytea(70003, noise('<<of one>>', 5000000));
SELECT lo_from_bytea(70011, ''), lo_from_bytea(70012, 'xyz'), lo_from_bytea(70013, noise('<<of two>>', 5000000));
SELECT lo_from_bytea(70099, noise('<<of nobody>>', 1000));
INSERT INTO docs VALUES (1, 1, 70001, NULL), (1, 2, 70002, 70003), (1, 3, NULL, 70003), (1, 4, 0, NULL),
    (2, 1, 70011, 70012), (2, 2, 70013, NULL);
INSERT INTO pages VALUES (1, 1, 1), (2, 1, 1);
";

/// OID and digest of every large object.
const OBJECTS: &str = "SELECT m.oid || ' ' || md5(lo_get(m.oid)) FROM pg_largeobject_metadata m ORDER BY m.oid";

fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script("shop", TABLES);
    cluster
}

/// Paths of the large objects of the tenants in the store.
fn archived(agent: &Agent) -> Vec<PathBuf> {
    files(&agent.repository()).into_iter().filter(|f| f.to_str().is_some_and(|f| f.contains("/o/"))).collect()
}

/// The restore, as a dry run counts it.
fn counted(agent: &Agent, tenant: &str, to: &str, mode: &str) -> Value {
    let target = format!("/tmp/coffer-not-there-{}", std::process::id());
    let mut args = vec!["restore", "--tenant", tenant, "--to", to, "--mode", mode, "--wait", "60s", "--dry-run"];
    if mode == "files" {
        args.extend(["--target", &target]);
    }
    agent.json(&args)["large_objects"].clone()
}

/// Waits until the objects of both tenants are archived with as many readings.
fn wait_archived(agent: &Agent, objects: usize) {
    wait_for("the large objects to be archived", 60, || (archived(agent).len() >= objects).then_some(()));
    wait_for("a reading in the log", 60, || {
        ["1", "2"].iter().all(|t| counted(agent, t, "latest", "files")["missing_count"] == 0).then_some(())
    });
}

fn started(cluster: &Cluster) -> Agent {
    let mut agent = Agent::new(&Setup::of(cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    wait_archived(&agent, 2);
    agent
}

/// What the database has of the objects from one to another.
fn truth(cluster: &Cluster, db: &str, from: u32, to: u32) -> String {
    let all = cluster.psql(db, OBJECTS);
    let within = |l: &&str| l.split(' ').next().and_then(|o| o.parse().ok()).is_some_and(|o: u32| from <= o && o <= to);
    all.lines().filter(within).collect::<Vec<_>>().join("\n")
}

fn every_mode(major: u32) {
    let cluster = database(major);
    let agent = started(&cluster);
    // The rows that refer to them are read from a full.
    agent.json(&["compact"]);
    cluster.psql("shop", "SELECT coffer.restore_point('whole')");
    let want = truth(&cluster, "shop", 70001, 70003);
    assert_eq!(want.lines().count(), 3);

    // A new database: with their numbers, of the tables' owner.
    let restored = Database::restore(&agent, &cluster, "1", "name:whole");
    assert_eq!(cluster.psql(&restored.name, OBJECTS), want);
    let owners = cluster.psql(&restored.name, "SELECT DISTINCT lomowner::regrole FROM pg_largeobject_metadata");
    assert_eq!(owners, "app");
    let other = Database::restore(&agent, &cluster, "2", "name:whole");
    assert_eq!(cluster.psql(&other.name, OBJECTS), truth(&cluster, "shop", 70011, 70013));
    let url = cluster.url("postgres", &restored.name);
    let (exit, said) = agent.json_err(&restored::args("1", "name:whole", "database", &url));
    assert_eq!(exit, 10, "{said}");

    // Files.
    let out = restored::Out::new();
    let said = agent.json(&restored::args("1", "name:whole", "files", out.arg()));
    let warnings = said["warnings"].to_string();
    assert!(warnings.contains("3 large objects are as they were at "), "{said}");
    assert_eq!(out.manifest()["large_objects"]["folder"], "large_objects");
    let folder = out.dir.join("large_objects");
    assert_eq!(std::fs::read_dir(&folder).expect("a folder").count(), 4);
    let list = std::fs::read_to_string(folder.join("list.jsonl")).expect("the list");
    let of = |oid: u32| std::fs::read(folder.join(oid.to_string())).expect("a large object's file");
    assert_eq!((of(70001).len(), of(70002).as_slice(), of(70003).len()), (0, &b"abc"[..], 5_000_000));
    for line in list.lines() {
        let l: Value = serde_json::from_str(line).expect("JSON");
        let oid = u32::try_from(l["oid"].as_u64().expect("an OID")).expect("32 bits");
        assert_eq!(l["bytes"].as_u64(), Some(of(oid).len() as u64));
        let sql = format!("SELECT encode(sha256(lo_get({oid})), 'hex')");
        assert_eq!(cluster.psql("shop", &sql), l["sha256"].as_str().expect("a digest"));
        std::fs::write(folder.join(oid.to_string()), []).expect("our file");
    }

    // In place: one is gone, one was changed, one is as it was.
    let dry = counted(&agent, "1", "name:whole", "in-place");
    assert_eq!((dry["created"].as_u64(), dry["existing"].as_u64()), (Some(0), Some(3)), "{dry}");
    cluster.psql(
        "shop",
        "SELECT lo_unlink(70003), lo_put(70002, 0, 'ABCD'); DELETE FROM docs WHERE tenant = 1 AND id = 2",
    );
    let dry = counted(&agent, "1", "name:whole", "in-place");
    assert_eq!((dry["created"].as_u64(), dry["existing"].as_u64()), (Some(1), Some(2)), "{dry}");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM pg_largeobject_metadata WHERE oid = 70003"), "0");
    let said = agent.json(&restored::in_place("1", "name:whole"));
    assert_eq!(said["large_objects"]["differing"], serde_json::json!([70002]), "{said}");
    assert!(said["warnings"].to_string().contains("left as they are: 70002"), "{said}");
    assert_eq!(cluster.psql("shop", "SELECT convert_from(lo_get(70002), 'UTF8')"), "ABCD");
    assert_eq!(truth(&cluster, "shop", 70003, 70003), want.lines().last().expect("three"));
    let owner = cluster.psql("shop", "SELECT lomowner::regrole FROM pg_largeobject_metadata WHERE oid = 70003");
    assert_eq!(owner, "app");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM docs WHERE tenant = 1"), "4");
    assert_eq!(truth(&cluster, "shop", 70011, 70099).lines().count(), 4, "those of others are there");

    // A restore that is refused leaves none behind: a foreign key of another table names a row that the target lacks.
    cluster.script(
        "shop",
        "INSERT INTO docs VALUES (1, 9, NULL, NULL); SELECT lo_unlink(70003);
         CREATE TABLE notes (tenant int, doc int, FOREIGN KEY (tenant, doc) REFERENCES docs (tenant, id));
         INSERT INTO notes VALUES (1, 9);",
    );
    let (exit, said) = agent.json_err(&restored::in_place("1", "name:whole"));
    assert_eq!(exit, 10, "{said}");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM pg_largeobject_metadata WHERE oid = 70003"), "0");
    cluster.psql("shop", "DROP TABLE notes");
    agent.json(&restored::in_place("1", "name:whole"));
    assert_eq!(truth(&cluster, "shop", 70003, 70003), want.lines().last().expect("three"));

    // What rows refer to and no reading has is said; a column's end of registration ends it.
    cluster.psql("shop", "INSERT INTO docs VALUES (2, 7, 4000000001, NULL), (2, 8, 70099, NULL)");
    cluster.psql("shop", "SELECT coffer.restore_point('more')");
    let said = restored::Out::new();
    let said = agent.json(&restored::args("2", "name:more", "files", said.arg()));
    assert_eq!(said["large_objects"]["missing"], serde_json::json!([70099, 4_000_000_001u32]), "{said}");
    assert!(said["warnings"].to_string().contains("not kept: 70099, 4000000001"), "{said}");
    let said = agent.json(&restored::in_place("2", "name:more"));
    assert_eq!(said["large_objects"]["missing"], serde_json::json!([4_000_000_001u32]), "it exists: {said}");
    cluster.psql("shop", "SELECT coffer.remove_large_objects('docs', 'scan')");
    wait_archived_after_change(&agent, &cluster);
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// The readings follow the registry: that of column `scan` alone is over, and the newest has what is new.
fn wait_archived_after_change(agent: &Agent, cluster: &Cluster) {
    cluster.psql("shop", "DELETE FROM docs WHERE body = 4000000001");
    wait_for("a reading of the columns that are left", 60, || {
        cluster.psql("shop", "UPDATE pages SET n = n + 1 WHERE tenant = 2");
        let o = counted(agent, "2", "latest", "files");
        (o["created"] == 3 && o["missing_count"] == 0).then_some(())
    });
}

fn isolation_and_damage(major: u32) {
    let cluster = database(major);
    let mut agent = started(&cluster);
    assert_eq!(agent.json(&["verify"])["ok"], true);
    let list = agent.json(&["list"]);
    let uid = |tenant: &str| {
        let entry = list["tenants"].as_array().expect("tenants").iter().find(|t| t["tenant"] == tenant);
        entry.expect("the tenant")["uid"].as_str().expect("a uid").replace('-', "")
    };
    let repository = agent.repository();
    for (tenant, ours, theirs) in [("1", "<<of one>>", "<<of two>>"), ("2", "<<of two>>", "<<of one>>")] {
        let of_tenant: Vec<PathBuf> =
            archived(&agent).into_iter().filter(|f| f.to_str().is_some_and(|f| f.contains(&uid(tenant)))).collect();
        assert_eq!(of_tenant.len(), 1);
        let raw = std::fs::read(&of_tenant[0]).expect("a file");
        let contains = |hay: &[u8], needle: &str| hay.windows(needle.len()).any(|w| w == needle.as_bytes());
        assert!(!contains(&raw, ours));
        let path = of_tenant[0].strip_prefix(&repository).expect("inside").to_str().expect("ASCII");
        let plain = agent.coffer(&["show", "--object", path, "--plaintext"]).stdout;
        assert!(plain.len() > 5_000_000 && contains(&plain, ours));
        assert!(!contains(&plain, theirs) && !contains(&plain, "<<of nobody>>"), "{tenant}");
    }
    let backups = restored::listed(&agent, "1");
    let id = backups["backups"][0]["id"].as_str().expect("a backup").to_owned();
    let shown = agent.json(&["show", &id]);
    assert_eq!(shown["large_objects"][0]["rows"], 3, "{shown}");

    // A flipped bit; a restore does not get past it either.
    assert_eq!(agent.stop(), Some(0));
    let victim = archived(&agent).remove(0);
    let mut bytes = std::fs::read(&victim).expect("a file");
    let at = bytes.len() / 2;
    bytes[at] ^= 4;
    std::fs::write(&victim, bytes).expect("our file");
    let (exit, said) = agent.json_err(&["verify"]);
    assert_eq!(exit, 5, "{said}");
    let name = victim.strip_prefix(&repository).expect("inside").to_str().expect("ASCII");
    assert!(said["failures"].to_string().contains(name), "{said}");
    let tenant = if name.contains(&uid("1")) { "1" } else { "2" };
    let out = restored::Out::new();
    let (exit, said) = agent.json_err(&restored::args_now(tenant, "latest", out.arg()));
    assert_eq!(exit, 5, "{said}");
    assert!(out.names().is_empty());
}

fn killed_in_the_middle(major: u32) {
    let cluster = database(major);
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.env = vec![("COFFER_FAILPOINTS".into(), "large-objects-after-write@1=abort".into())];
    agent.start();
    assert_eq!(agent.wait_end(90), None, "it should have been killed by a signal");
    assert!(agent.log().contains("failpoint large-objects-after-write: abort"), "{}", agent.log());
    assert_eq!(archived(&agent).len(), 2, "objects that nobody names");
    let said = agent.json(&["verify"]);
    assert_eq!(said["ok"], true, "{said}");
    agent.env.clear();
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    wait_archived(&agent, 4);
    let restored = Database::restore(&agent, &cluster, "2", "latest");
    assert_eq!(cluster.psql(&restored.name, OBJECTS), truth(&cluster, "shop", 70011, 70013));
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// Large objects go only with a restore that did not commit, and that nobody else's counts on.
fn committed_or_not(major: u32) {
    let cluster = database(major);
    let agent = started(&cluster);
    cluster.psql("shop", "SELECT coffer.restore_point('whole')");
    let want = truth(&cluster, "shop", 70001, 70003);
    let lose = || {
        cluster.psql("shop", "SELECT lo_unlink(70003)");
        cluster.psql("shop", "DELETE FROM docs WHERE tenant = 1 AND id = 2");
    };
    // The server commits and the answer is lost; the server ends the session behind the commit.
    for instead in [Vec::new(), sql_proxy::fatal()] {
        lose();
        let proxy = SqlProxy::start(cluster.port, "_agent_restore_marker", instead);
        let url = format!("postgres://coffer_agent@127.0.0.1:{}/shop", proxy.port);
        let mut args = restored::in_place("1", "name:whole");
        args.extend(["--target", &url]);
        let (exit, said) = agent.json_err(&args);
        assert_eq!((exit, said["error"]["code"].as_str(), proxy.hits()), (8, Some("commit_unknown"), 1), "{said}");
        assert_eq!(cluster.psql("shop", "SELECT scan FROM docs WHERE tenant = 1 AND id = 2"), "70003");
        assert_eq!(truth(&cluster, "shop", 70001, 70003), want);
    }

    // While another restore is in the database, none makes an object that the other would take for one that was there.
    lose();
    block_on(async {
        let other = cluster.connect("shop").await;
        other.batch_execute("SELECT pg_advisory_lock(6516584, 0)").await.expect("the lock of a restore in place");
        cluster.psql("shop", "ALTER ROLE coffer_agent SET log_statement = 'all'");
        let before = cluster.log().len();
        let (exit, said) = agent.json_err(&restored::in_place("1", "name:whole"));
        assert_eq!((exit, said["error"]["code"].as_str()), (6, Some("busy")), "{said}");
        let log = cluster.log()[before..].to_owned();
        assert!(log.contains("pg_try_advisory_lock") && !log.contains("_agent_large_object_create("), "{log}");
        cluster.psql("shop", "ALTER ROLE coffer_agent RESET log_statement");
    });
    agent.json(&restored::in_place("1", "name:whole"));
    assert_eq!(truth(&cluster, "shop", 70001, 70003), want);
}

/// Those of the rows that are restored; one that reference data and a tenant refer to is made once.
fn only_what_is_wanted(major: u32) {
    let cluster = database(major);
    cluster.script(
        "shop",
        "CREATE TABLE plans (id int PRIMARY KEY, paper oid); SELECT coffer.add_shared('plans');
         SELECT coffer.add_large_objects('plans', 'paper'); INSERT INTO plans VALUES (1, 70002), (2, 70099);",
    );
    let agent = started(&cluster);
    wait_for("the large objects of reference data, too", 60, || (archived(&agent).len() >= 3).then_some(()));
    cluster.psql("shop", "SELECT coffer.restore_point('whole')");
    let want = [truth(&cluster, "shop", 70001, 70003), truth(&cluster, "shop", 70099, 70099)].join("\n");
    let copy = Database::named(&cluster, "copy");
    let url = cluster.url("postgres", &copy.name);
    let said = agent.json(&restored::args("1", "name:whole", "database", &url));
    assert_eq!(cluster.psql(&copy.name, OBJECTS), want);
    let o = &said["large_objects"];
    assert_eq!((o["created"].as_u64(), o["missing_count"].as_u64()), (Some(4), Some(0)), "{said}");

    cluster.psql("shop", "SELECT lo_unlink(70003)");
    let mut args = restored::in_place("1", "name:whole");
    args.extend(["--table", "docs", "--where-key", "1"]);
    let said = agent.json(&args);
    assert_eq!(said["large_objects"]["created"], 0, "{said}");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM pg_largeobject_metadata WHERE oid = 70003"), "0");
    let last = args.len() - 1;
    args[last] = "3";
    assert_eq!(agent.json(&args)["large_objects"]["created"], 1);
}
