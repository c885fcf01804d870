//! Archives: restored exactly when nothing else of the repository is left; made once a month by the schedule.

use crate::isolation::files;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Out, Scratch};
use coffer_tests::truth::{self, Truth, Watched};
use coffer_tests::{block_on, wait_for};
use serde_json::Value;
use std::collections::BTreeSet;

on_majors! {
    complete_by_itself: complete_by_itself;
    once_a_month: once_a_month;
    stays_when_the_rest_goes: stays_when_the_rest_goes;
    interrupted: interrupted;
}

const TYPES: &str = "CREATE TYPE mood AS ENUM ('sad', 'ok');";
const TABLES: &str = "
    CREATE TABLE kinds (id int PRIMARY KEY, label text NOT NULL);
    CREATE TABLE a (tenant int NOT NULL, id serial, kind int REFERENCES kinds, m mood, v text, PRIMARY KEY (tenant, id));
    CREATE TABLE settings (tenant int NOT NULL, name text NOT NULL, value jsonb, PRIMARY KEY (tenant, name));
    CREATE TABLE notes (tenant int NOT NULL, at timestamptz, v text);
    CREATE TABLE docs (tenant int NOT NULL, id int NOT NULL, body oid, PRIMARY KEY (tenant, id));";

fn watched() -> Vec<Watched> {
    ["a", "settings", "notes", "docs"].map(|t| Watched::new(t, "tenant")).to_vec()
}

fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        &format!(
            "{TYPES} {TABLES}
             ALTER DATABASE shop SET work_mem = '5MB';
             CREATE ROLE clerk_1 LOGIN; GRANT SELECT ON a TO clerk_1; SELECT coffer.add_role('clerk_1', '1');
             SELECT * FROM coffer.add_shared('kinds'); SELECT * FROM coffer.add_table('a', 'tenant');
             SELECT * FROM coffer.add_table('settings', 'tenant', class => 'config');
             SELECT * FROM coffer.add_table('notes', 'tenant'); SELECT * FROM coffer.add_table('docs', 'tenant');
             SELECT coffer.add_large_objects('docs', 'body');
             SELECT lo_from_bytea(70001, 'the first'), lo_from_bytea(70002, decode(repeat('ab', 300000), 'hex')), lo_from_bytea(70011, 'of two');
             INSERT INTO docs VALUES (1, 1, 70001), (1, 2, 70002), (2, 1, 70011);
             INSERT INTO kinds VALUES (1, 'one'), (2, 'two');
             INSERT INTO a (tenant, kind, m, v) SELECT t, 1 + i % 2, 'ok', E'a\\t' || i FROM generate_series(1, 2) t, generate_series(1, 300) i;
             INSERT INTO settings SELECT t, 'color', '{{\"x\": 1}}' FROM generate_series(1, 2) t;
             INSERT INTO notes SELECT t, '2026-01-01 00:00:00Z', 'n' || i % 3 FROM generate_series(1, 2) t, generate_series(1, 9) i;"
        ),
    );
    cluster
}

/// A source with two tenants whose rows and large objects are archived; the agent still runs.
fn begin(major: u32, more: &str) -> (Cluster, Agent) {
    let cluster = database(major);
    let mut agent = Agent::new(&Setup { more: more.to_owned(), ..Setup::of(&cluster, "shop") });
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    wait_objects(&agent);
    wait_for("the tenants to register themselves", 60, || {
        (cluster.psql("shop", "SELECT count(*) FROM coffer.tenants WHERE kind = 'normal'") == "2").then_some(())
    });
    (cluster, agent)
}

/// Waits until the large objects of both tenants are archived.
fn wait_objects(agent: &Agent) {
    let have = || files(&agent.repository()).iter().filter(|f| f.to_str().is_some_and(|f| f.contains("/o/"))).count();
    wait_for("the large objects to be archived", 60, || (have() >= 2).then_some(()));
    wait_for("a reading in the log", 60, || {
        let dry = [
            "restore",
            "--tenant",
            "1",
            "--to",
            "latest",
            "--mode",
            "files",
            "--target",
            "/tmp/coffer-none",
            "--dry-run",
        ];
        (agent.json(&dry)["large_objects"]["missing_count"] == 0).then_some(())
    });
}

/// The archive's document, as a human opens it.
fn document(agent: &Agent, id: &str) -> (String, Value) {
    let end = format!("-{}", id.replace('-', ""));
    let file = files(&agent.repository()).into_iter().find(|f| {
        f.to_str().is_some_and(|f| f.contains("/a/") && (f.ends_with(&end) || f.ends_with(&format!("-{id}"))))
    });
    let file = file.expect("the archive's document");
    let path = file.strip_prefix(agent.repository()).expect("inside").to_str().expect("ASCII").to_owned();
    let out = agent.coffer(&["show", "--object", &path, "--plaintext"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).expect("UTF-8");
    assert!(text.contains("\n  \"how_to_restore\""), "a human reads it: {text}");
    (path, serde_json::from_str(&text).expect("JSON"))
}

fn complete_by_itself(major: u32) {
    block_on(async {
        let (cluster, mut agent) = begin(major, "");
        agent.json(&["compact"]);
        cluster.psql("shop", "UPDATE a SET v = v || '!' WHERE id % 3 = 0; DELETE FROM notes WHERE v = 'n1'; INSERT INTO kinds VALUES (3, 'three'); UPDATE a SET kind = 3 WHERE id % 7 = 0");
        let mut db = cluster.connect("shop").await;
        let kept = truth::take(&mut db, &watched(), "kept").await;
        let sequence = cluster.psql("shop", "SELECT last_value FROM a_id_seq");
        let made = agent.json(&["backup", "--tenant", "1", "--kind", "archive", "--reason", "for the shelf", "--wait"]);
        assert_eq!(
            (&made["backup"]["kind"], &made["backup"]["trigger"]),
            (&"archive".into(), &"archive".into()),
            "{made}"
        );
        let id = made["backup"]["id"].as_str().expect("an id").to_owned();
        cluster.psql(
            "shop",
            "DELETE FROM a; UPDATE kinds SET label = 'other'; DELETE FROM settings; SELECT lo_unlink(70001)",
        );
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        agent.json(&["compact"]);
        assert_eq!(agent.json(&["verify"])["ok"], true);
        let (path, d) = document(&agent, &id);
        agent.stop();

        // A human learns from it what there is.
        let table = |list: &str, name: &str| {
            d[list].as_array().expect("tables").iter().find(|t| t["relation"] == name).cloned()
        };
        let a = table("tables", "public.a").expect("a");
        assert_eq!((&a["rows"], &a["key"]), (&300.into(), &serde_json::json!(["tenant", "id"])), "{a}");
        let m = &a["columns"][3];
        assert!(m["name"] == "m" && m["type"].as_str().is_some_and(|t| t.ends_with("mood")), "{a}");
        assert_eq!(table("reference_tables", "public.kinds").expect("kinds")["rows"], 3);
        assert_eq!(
            (&d["tenant"]["key"], &d["configuration"]["tables"][0]),
            (&"1".into(), &"public.settings".into()),
            "{d}"
        );
        assert!(d["configuration"]["database_settings"].to_string().contains("work_mem"), "{d}");
        assert!(d["how_to_restore"].to_string().contains(&format!("backup:{id}")), "{d}");

        let holds: BTreeSet<&str> =
            d["objects"].as_array().expect("objects").iter().filter_map(|o| o["holds"].as_str()).collect();
        assert_eq!(
            holds,
            BTreeSet::from(["rows", "reference rows", "manifest", "definitions", "roles", "large objects"])
        );
        let uid = d["tenant"]["uid"].as_str().expect("a uid").replace('-', "");
        let mut named = paths(&d);
        assert!(
            named.iter().all(|p| p.contains(&format!("/t/{uid}/"))),
            "all of it is in the tenant's folder: {named:?}"
        );
        named.insert(path);
        // Other fulls, bases, changesets, commons, the log, the catalogs.
        assert!(remove_others(&agent, &named) > 20);

        let to = format!("backup:{id}");
        let out = Out::new();
        agent.json(&restored::args("1", &to, "files", out.arg()));
        let scratch = Scratch::new(&cluster, &format!("{TYPES} {}", TABLES.replace(" REFERENCES kinds", ""))).await;
        scratch.load(&out).await;
        let wrong = kept.differences(&scratch.client, &watched(), "1").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(
            out.names().iter().any(|n| n == "roles.sql") && out.names().iter().any(|n| n == "large_objects"),
            "{:?}",
            out.names()
        );
        let restored = Database::restore(&agent, &cluster, "1", &to);
        let client = restored.connect().await;
        let wrong = kept.differences(&client, &watched(), "1").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        let of = |sql: &str| cluster.psql(&restored.name, sql);
        assert_eq!(of("SELECT string_agg(label, ',' ORDER BY id) FROM kinds"), "one,two,three");
        assert_eq!(of("SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND convalidated"), "1");
        assert_eq!(of("SELECT last_value FROM a_id_seq"), sequence);
        assert_eq!(of("SHOW work_mem"), "5MB");
        assert_eq!(of("SELECT convert_from(lo_get(70001), 'UTF8') || length(lo_get(70002))"), "the first300000");
        assert_eq!(of("SELECT count(*) FROM a WHERE tenant <> 1"), "0");
        // Beside the live rows, and in their place.
        agent.json(&["restore", "--tenant", "1", "--to", &to, "--mode", "schema", "--target", "beside", "--confirm"]);
        let sql = "SELECT count(*), count(*) FILTER (WHERE v LIKE '%!') FROM beside.a";
        assert_eq!(cluster.psql("shop", sql), "300|100");
        agent.json(&restored::in_place("1", &to));
        let wrong = kept.differences(&cluster.connect("shop").await, &watched(), "1").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert_eq!(cluster.psql("shop", "SELECT convert_from(lo_get(70001), 'UTF8')"), "the first");
        let (exit, said) = agent.json_err(&restored::args_now("2", &to, "/tmp/coffer-none"));
        assert_ne!(exit, 0, "it is of tenant 1 alone: {said}");
    });
}

/// The objects that a document names.
fn paths(document: &Value) -> BTreeSet<String> {
    let objects = document["objects"].as_array().expect("objects");
    objects.iter().map(|o| o["path"].as_str().expect("a path").to_owned()).collect()
}

/// Deletes every file of the store but these, and what says that it is a store; how many.
fn remove_others(agent: &Agent, named: &BTreeSet<String>) -> usize {
    let mut removed = 0;
    for f in files(&agent.repository()) {
        let name = f.strip_prefix(agent.repository()).expect("inside").to_str().expect("ASCII").to_owned();
        if !named.contains(&name) && name != "coffer-repository" {
            std::fs::remove_file(&f).expect("our store");
            removed += 1;
        }
    }
    removed
}

/// No schedule interferes; of each month its archive is kept, and of days nothing.
const MONTHS: &str = "[schedule]\nincremental = \"0 0 1 1 *\"\nfull = \"0 0 1 1 *\"\nprune = \"0 0 1 1 *\"\n[compact]\npart = \"8KiB\"\n\
    [retention]\npitr = \"1h\"\ndaily = 0\nweekly = 0\nmonthly = 3\nannual = 0\n";

/// The verbs that follow have their clock so many days ahead.
fn today(agent: &mut Agent, day: u32) {
    agent.env = vec![("COFFER_TEST_CLOCK".into(), format!("{day}d"))];
}

/// The id of the one full that a call made.
fn made(doc: &Value) -> String {
    assert_eq!(doc["skipped"], serde_json::json!([]), "{doc}");
    let fulls = doc["fulls"].as_array().expect("fulls");
    assert_eq!(fulls.len(), 1, "{doc}");
    fulls[0]["id"].as_str().expect("an id").to_owned()
}

async fn restores(agent: &Agent, cluster: &Cluster, id: &str, truth: &Truth, kinds: &str) -> Vec<String> {
    let restored = Database::restore(agent, cluster, "1", &format!("backup:{id}"));
    let mut wrong = truth.differences(&restored.connect().await, &watched(), "1").await;
    let found = cluster.psql(&restored.name, "SELECT string_agg(label, ',' ORDER BY id) FROM kinds");
    if found != kinds {
        wrong.push(format!("reference data: {found}, not {kinds}"));
    }
    wrong
}

fn stays_when_the_rest_goes(major: u32) {
    block_on(async {
        let (cluster, mut agent) = begin(major, MONTHS);
        let mut db = cluster.connect("shop").await;
        let mut months = Vec::new();
        for month in 0..3 {
            let kinds = format!("one,two {month}");
            cluster.script(
                "shop",
                &format!(
                    "UPDATE a SET v = 'month {month}' WHERE id % 50 = {month}; DELETE FROM a WHERE id = {month} + 200;
                     UPDATE kinds SET label = 'two {month}' WHERE id = 2"
                ),
            );
            let truth = truth::take(&mut db, &watched(), &format!("month {month}")).await;
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            today(&mut agent, month * 31);
            // One whose parts the archive could take over, and one that takes over the archive's.
            let mut others = vec![made(&agent.json(&["compact", "--tenant", "1"]))];
            let id = made(&agent.json(&["compact", "--tenant", "1", "--archive"]));
            cluster.psql("shop", "INSERT INTO notes SELECT 1, now(), 'later'");
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            others.push(made(&agent.json(&["compact", "--tenant", "1"])));
            months.push((id, truth, kinds, others));
        }
        agent.stop();
        today(&mut agent, 3 * 31);
        let plan = agent.json(&["prune", "--tenant", "1", "--confirm", "--grace", "0s"]);
        let verdicts = plan["sources"][0]["tenants"][0]["backups"].as_array().expect("backups").clone();
        for (id, _, _, others) in &months[..2] {
            let of =
                |id: &String| verdicts.iter().find(|v| v["id"] == **id).unwrap_or_else(|| panic!("{plan}")).clone();
            let archive = of(id);
            assert_eq!((&archive["kind"], &archive["keep"]), (&"archive".into(), &true.into()), "{archive}");
            assert!(archive["reasons"].to_string().contains("\"monthly\""), "{archive}");
            assert!(others.iter().all(|o| of(o)["keep"] == false), "{plan}");
        }
        assert_eq!(agent.json(&["verify"])["ok"], true);
        for (id, truth, kinds, _) in &months {
            let wrong = restores(&agent, &cluster, id, truth, kinds).await;
            assert!(wrong.is_empty(), "{}: {wrong:#?}", truth.name);
        }

        // One that lost an object gives way to what else has its point.
        let (damaged, truth, kinds, _) = &months[1];
        let (path, d) = document(&agent, damaged);
        let objects = d["objects"].as_array().expect("objects");
        let lost = objects.iter().find(|o| o["holds"] == "reference rows").expect("reference rows");
        let lost = agent.repository().join(lost["path"].as_str().expect("a path"));
        let bytes = std::fs::read(&lost).expect("an object");
        std::fs::remove_file(&lost).expect("our store");
        assert_eq!(agent.json_err(&["verify"]).0, 5);
        let wrong = restores(&agent, &cluster, damaged, truth, kinds).await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        std::fs::write(&lost, bytes).expect("our store");

        // Nothing else of the whole repository.
        let mut named = paths(&d);
        named.insert(path);
        let away = tempfile::tempdir().expect("a folder");
        let all = files(&agent.repository());
        for f in &all {
            let to = away.path().join(f.strip_prefix(agent.repository()).expect("inside"));
            std::fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
            std::fs::copy(f, to).expect("a copy");
        }
        assert!(remove_others(&agent, &named) > 20);
        let wrong = restores(&agent, &cluster, damaged, truth, kinds).await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        for f in &all {
            std::fs::copy(away.path().join(f.strip_prefix(agent.repository()).expect("inside")), f).expect("a copy");
        }

        // When no rule wants them any more, all of them goes but what the newest full took over.
        agent.configure(&Setup { more: MONTHS.replace("monthly = 3", "monthly = 0"), ..Setup::of(&cluster, "shop") });
        agent.json(&["prune", "--tenant", "1", "--confirm", "--grace", "0s"]);
        let left = files(&agent.repository());
        let left: Vec<&str> = left.iter().filter_map(|f| f.to_str()).filter(|f| f.contains("/a/")).collect();
        assert!(left.is_empty(), "{left:#?}");
        assert_eq!(agent.json(&["verify"])["ok"], true);
    });
}

fn interrupted(major: u32) {
    block_on(async {
        let (cluster, mut agent) = begin(major, MONTHS);
        cluster.psql("shop", "UPDATE a SET v = 'now'");
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let mut db = cluster.connect("shop").await;
        let truth = truth::take(&mut db, &watched(), "now").await;
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        agent.stop();
        let archives = |agent: &Agent| {
            let backups = restored::listed(agent, "1")["backups"].clone();
            let backups = backups.as_array().expect("backups");
            let ids = backups.iter().filter(|b| b["kind"] == "archive").filter_map(|b| b["id"].as_str());
            ids.map(str::to_owned).collect::<Vec<_>>()
        };
        for (point, there) in [("full-after-objects", 0), ("archive-after-objects", 0), ("catalog-after-sequencer", 1)]
        {
            agent.env = vec![("COFFER_FAILPOINTS".into(), format!("{point}=abort"))];
            let out = agent.coffer(&["compact", "--tenant", "1", "--archive"]);
            assert!(out.status.code().is_none(), "{point}: {out:?}");
            agent.env.clear();
            assert_eq!(agent.json(&["verify"])["ok"], true, "{point}");
            assert_eq!(archives(&agent).len(), there, "{point}");
            let wrong = Database::check(&agent, &cluster, &truth, &watched(), "1").await;
            assert!(wrong.is_empty(), "after {point}: {wrong:#?}");
        }
        let id = made(&agent.json(&["compact", "--tenant", "1", "--archive"]));
        for id in archives(&agent).iter().chain([&id]) {
            let wrong = restores(&agent, &cluster, id, &truth, "one,two").await;
            assert!(wrong.is_empty(), "{wrong:#?}");
        }
        // What nobody names goes after a day, and none of what the archives need.
        today(&mut agent, 3);
        agent.json(&["prune", "--confirm", "--grace", "0s"]);
        assert_eq!(agent.json(&["verify"])["ok"], true);
        let (path, d) = document(&agent, &id);
        let mut named = paths(&d);
        named.insert(path);
        assert!(remove_others(&agent, &named) > 10);
        agent.env.clear();
        let wrong = restores(&agent, &cluster, &id, &truth, "one,two").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}

fn once_a_month(major: u32) {
    let cluster = database(major);
    let mut setup = Setup::of(&cluster, "shop");
    setup.more = "[schedule]\nfull = \"* * * * *\"\n".to_owned();
    let mut agent = Agent::new(&setup);
    // The first attempt fails when the rows are there: the full of the night is not lost over it.
    agent.env = vec![("COFFER_FAILPOINTS".into(), "archive-after-objects@1=error".into())];
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    let of = |agent: &Agent, tenant: &str, kind: &str| {
        let all = restored::listed(agent, tenant)["backups"].clone();
        all.as_array().expect("backups").iter().filter(|b| b["kind"] == kind && b["trigger"] != "base").count()
    };
    wait_for("a full in the place of the archive", 120, || {
        (of(&agent, "1", "full") + of(&agent, "2", "full") > 0).then_some(())
    });
    assert!(agent.log().contains("the month's archive waits for the next full: failpoint"), "{}", agent.log());
    wait_for("the archive of each", 180, || {
        (of(&agent, "1", "archive") == 1 && of(&agent, "2", "archive") == 1).then_some(())
    });
    wait_for("the next one", 120, || (of(&agent, "1", "full") >= 1 && of(&agent, "2", "full") >= 1).then_some(()));
    assert_eq!((of(&agent, "1", "archive"), of(&agent, "2", "archive")), (1, 1), "a month has one");
    agent.env.clear();
    // By hand there are as many as somebody wants.
    agent.json(&["compact", "--tenant", "2", "--archive"]);
    assert_eq!((of(&agent, "1", "archive"), of(&agent, "2", "archive")), (1, 2));
    assert_eq!(agent.json(&["verify"])["ok"], true);
    let kept = agent.json(&["prune", "--tenant", "2"]).to_string();
    assert!(kept.contains("archive"), "{kept}");
}
