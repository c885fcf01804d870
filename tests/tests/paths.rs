//! Tables whose rows do not say whose they are: tenants behind foreign keys, tenants that only the session named. From
//! bases, through the stream, to every mode of restore.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Scratch};
use coffer_tests::truth::{self, Truth, Watched};
use tokio_postgres::Client;

on_majors! {
    behind_foreign_keys: behind_foreign_keys;
    writers_race_with_moves: writers_race_with_moves;
    lookups_that_waited: lookups_that_waited;
    parents_that_others_bring: parents_that_others_bring;
    without_a_key: without_a_key;
    two_ways: two_ways;
}

const DDL: &str = "
CREATE TABLE orgs (id int PRIMARY KEY, tenant text, name text);
CREATE TABLE projects (id bigint PRIMARY KEY, org int NOT NULL REFERENCES orgs ON DELETE CASCADE ON UPDATE CASCADE, body text);
ALTER TABLE projects ALTER body SET STORAGE EXTERNAL;
CREATE TABLE tasks (project bigint REFERENCES projects ON DELETE CASCADE ON UPDATE CASCADE, n int, body text, PRIMARY KEY (project, n));
CREATE TABLE notes (id int PRIMARY KEY, project bigint, n int, body text,
    FOREIGN KEY (project, n) REFERENCES tasks ON DELETE SET NULL ON UPDATE CASCADE);
CREATE TABLE labels (org int NOT NULL REFERENCES orgs ON DELETE CASCADE ON UPDATE CASCADE, word text);
CREATE TABLE files (id int, project bigint NOT NULL REFERENCES projects ON DELETE CASCADE ON UPDATE CASCADE, body text, PRIMARY KEY (id))
    PARTITION BY RANGE (id);
CREATE TABLE files_1 PARTITION OF files FOR VALUES FROM (0) TO (100);
CREATE TABLE files_2 PARTITION OF files DEFAULT;
CREATE TABLE seen (id int PRIMARY KEY, claim text, body text);
";

/// The tenants by the test's own account.
fn watched() -> Vec<Watched> {
    let org = "(SELECT o.tenant FROM orgs o WHERE o.id = t.org)";
    let project = "(SELECT o.tenant FROM projects p JOIN orgs o ON o.id = p.org WHERE p.id = t.project)";
    vec![
        Watched::new("orgs", "t.tenant"),
        Watched::new("projects", org),
        Watched::new("tasks", project),
        // A note without its number refers to no task.
        Watched::new("notes", &format!("(CASE WHEN t.n IS NOT NULL THEN {project} END)")),
        Watched::new("labels", org),
        Watched::new("files", project),
        Watched::new("seen", "t.claim"),
    ]
}

const ROWS: &str = "
INSERT INTO orgs SELECT i, chr(96 + i), 'org ' || i FROM generate_series(1, 4) i;
INSERT INTO projects SELECT 10 * o.id + i, o.id, repeat(md5(o.id::text || i), 100) FROM orgs o, generate_series(1, 3) i;
INSERT INTO tasks SELECT p.id, i, 'task ' || i FROM projects p, generate_series(1, 4) i;
INSERT INTO notes SELECT row_number() OVER (), t.project, t.n, 'note' FROM tasks t;
INSERT INTO labels SELECT o.id, w FROM orgs o, unnest(ARRAY['x', 'x', 'y']) w;
INSERT INTO files SELECT row_number() OVER () * 9, p.id, 'file' FROM projects p, generate_series(1, 3);
";

fn prepare(cluster: &Cluster) {
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', true)");
    cluster.psql("shop", "SELECT * FROM coffer.add_table('seen')");
    let strategies = "SELECT string_agg(strategy, ' ' ORDER BY relation::text) FROM coffer.coverage";
    assert_eq!(cluster.psql("shop", strategies), "path path path tag path session path");
    cluster.script("shop", ROWS);
    for t in ["a", "b"] {
        cluster.script(
            "shop",
            &format!("SET coffer.tenant = '{t}'; INSERT INTO seen SELECT ascii('{t}') * 10 + i, '{t}', 'old' FROM generate_series(1, 3) i;"),
        );
    }
}

async fn check(agent: &Agent, cluster: &Cluster, scratch: &Scratch<'_>, truth: &Truth) {
    for tenant in ["a", "b", "c", "d", "q"] {
        if !truth.tenants.contains_key(tenant) {
            continue;
        }
        let mut wrong = scratch.check(agent, truth, &watched(), tenant).await;
        wrong.extend(Database::check(agent, cluster, truth, &watched(), tenant).await);
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

/// Restores in place, and compares every tenant with what `then` (of the one) and `now` (of the others) say.
async fn in_place(agent: &Agent, db: &Client, tenant: &str, then: &Truth, now: &Truth) {
    let done = agent.json(&restored::in_place(tenant, &format!("name:{}", then.name)));
    let mut wrong = then.differences(db, &watched(), tenant).await;
    for other in now.tenants.keys().filter(|t| *t != tenant) {
        wrong.extend(now.differences(db, &watched(), other).await);
    }
    assert!(wrong.is_empty(), "in place, {tenant} to {}: {wrong:#?}\n{done}", then.name);
}

fn behind_foreign_keys(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        prepare(&cluster);
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["a", "b", "c", "d"]);
        let mut db = cluster.connect("shop").await;
        let scratch = Scratch::new(&cluster, DDL).await;
        let base = truth::take(&mut db, &watched(), "base").await;
        cluster.script(
            "shop",
            "UPDATE projects SET org = 2 WHERE id = 11;
             UPDATE tasks SET body = 'changed' WHERE n = 2;
             UPDATE orgs SET tenant = 'q' WHERE id = 3;
             UPDATE orgs SET id = 40 WHERE id = 4;
             UPDATE projects SET id = 999, body = 'short' WHERE id = 21;
             DELETE FROM projects WHERE id = 12;
             UPDATE files SET id = 1000 WHERE id = 9;
             UPDATE labels SET word = 'z' WHERE org = 1 AND word = 'y';
             SET coffer.tenant = 'b'; UPDATE seen SET body = 'new'; DELETE FROM seen WHERE id = 971;
             INSERT INTO seen VALUES (5, 'b', 'later');",
        );
        let moved = truth::take(&mut db, &watched(), "moved").await;
        cluster.script(
            "shop",
            "DELETE FROM orgs WHERE id = 2; INSERT INTO orgs VALUES (2, 'c', 'other'); TRUNCATE files;",
        );
        let gone = truth::take(&mut db, &watched(), "gone").await;
        for truth in [&base, &moved, &gone] {
            check(&agent, &cluster, &scratch, truth).await;
        }
        // b's rows are gone, and its key 2 is c's now: refused by name, then not.
        let (code, refused) = agent.json_err(&restored::in_place("b", "name:moved"));
        assert!(code == 10 && refused.to_string().contains("belong to another tenant"), "{code} {refused}");
        cluster.script("shop", "DELETE FROM orgs WHERE id = 2");
        let freed = truth::take(&mut db, &watched(), "freed").await;
        in_place(&agent, &db, "b", &moved, &freed).await;
        // a's subtree: re-parented, deleted, new parents that were not there then.
        cluster.script(
            "shop",
            "INSERT INTO orgs VALUES (100, 'a', 'new'); INSERT INTO projects VALUES (1001, 100, 'new');
             UPDATE projects SET org = 100 WHERE org = 1; UPDATE notes SET project = NULL WHERE project = 13;
             DELETE FROM tasks WHERE project = 13 AND n > 2; INSERT INTO labels VALUES (100, 'n'), (1, 'x');
             SET coffer.tenant = 'a'; DELETE FROM seen WHERE claim = 'a' AND id = 972; INSERT INTO seen VALUES (6, 'a', 'n');",
        );
        let mixed = truth::take(&mut db, &watched(), "mixed").await;
        in_place(&agent, &db, "a", &moved, &mixed).await;
        in_place(&agent, &db, "a", &mixed, &mixed).await;
        let (code, status) = agent.json_err(&["status"]);
        assert!(code == 11 && status["sources"][0]["unresolved_rows"] == 0, "{code} {status}");
        // b's session changed a's rows: those stay a's, and it is said.
        let codes: Vec<_> = status["alarms"].as_array().expect("alarms").iter().map(|a| &a["code"]).collect();
        assert!(codes.iter().any(|c| **c == "claim_contradicted"), "{status}");
        // What the restores wrote is in the stream like any other change.
        let last = truth::take(&mut db, &watched(), "last").await;
        check(&agent, &cluster, &scratch, &last).await;
        assert_eq!(agent.json(&["verify"])["ok"], true);
    });
}

/// Rows are added, changed and deleted below parents that other sessions move, while bases are taken.
fn writers_race_with_moves(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        prepare(&cluster);
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let mut writers = Vec::new();
        for n in 0..5u32 {
            let (db, stop) = (cluster.connect("shop").await, stop.clone());
            writers.push(tokio::spawn(async move {
                let isolation = ["READ COMMITTED", "REPEATABLE READ"][n as usize % 2];
                let (mut i, mut done) = (0u32, 0u32);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    i += 1;
                    let id = 10_000 * (n + 1) + i;
                    let change = match (n, i % 4) {
                        (4, 0) => "UPDATE orgs SET tenant = chr(97 + (ascii(tenant) - 96) % 4) WHERE id = 1".to_owned(),
                        (4, 1) => "UPDATE projects SET org = 1 + org % 4 WHERE id % 10 = 2".to_owned(),
                        (4, _) => format!("UPDATE projects SET org = 1 + {i} % 4 WHERE id = 33"),
                        (_, 0) => format!("INSERT INTO notes SELECT {id}, project, n, 'r' FROM tasks ORDER BY random() LIMIT 1"),
                        (_, 1) => format!("INSERT INTO projects VALUES ({id}, 1 + {i} % 4, 'r'); INSERT INTO tasks VALUES ({id}, 1)"),
                        (_, 2) => "UPDATE notes SET body = body || 'u' WHERE id IN (SELECT id FROM notes ORDER BY random() LIMIT 2)".to_owned(),
                        _ => "DELETE FROM tasks WHERE (project, n) IN (SELECT project, n FROM tasks ORDER BY random() LIMIT 1)".to_owned(),
                    };
                    let script = format!("BEGIN ISOLATION LEVEL {isolation}; {change}; SELECT pg_sleep(0.002); COMMIT");
                    match db.batch_execute(&script).await {
                        Ok(()) => done += 1,
                        // Deadlocks and serialization failures are the clients' own business.
                        Err(_) => db.batch_execute("ROLLBACK").await.expect("rollback"),
                    }
                }
                done
            }));
        }
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["a", "b", "c", "d"]);
        let mut db = cluster.connect("shop").await;
        let mut truths = Vec::new();
        for n in 0..6 {
            tokio::time::sleep(std::time::Duration::from_millis(700)).await;
            truths.push(truth::take(&mut db, &watched(), &format!("race {n}")).await);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let mut done = 0;
        for w in writers {
            done += w.await.expect("a writer");
        }
        println!("PostgreSQL {major}: {done} transactions");
        assert!(done > 100, "only {done} transactions committed");
        let scratch = Scratch::new(&cluster, DDL).await;
        let mut wrong = Vec::new();
        for truth in &truths {
            for tenant in ["a", "b", "c", "d"] {
                wrong.extend(scratch.check(&agent, truth, &watched(), tenant).await);
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}

/// What of a tenant is in the log, as the plugin says it.
fn decoded(cluster: &Cluster, tenant: &str) -> String {
    cluster.psql(
        "shop",
        &format!(
            "SELECT data FROM pg_logical_slot_peek_changes('look', NULL, NULL, 'format', 'json', 'tenant', '{tenant}')"
        ),
    )
}

/// A parent that moves, or is replaced, while somebody waits to put a row below it: the row is of whom the parent is then.
fn lookups_that_waited(major: u32) {
    const WAITED: [(&str, &str, &str); 9] = [
        ("", "UPDATE orgs SET tenant = 'b' WHERE id = 1", "INSERT INTO notes VALUES (1, 'moved')"),
        (
            "",
            "WITH d AS (DELETE FROM orgs WHERE id = 2 RETURNING id) INSERT INTO orgs SELECT id, 'b' FROM d",
            "INSERT INTO notes VALUES (2, 'replaced')",
        ),
        (
            "",
            "UPDATE orgs SET tenant = 'b' WHERE id = 3",
            "UPDATE notes SET org = 3, body = 'led there' WHERE org = 20",
        ),
        (
            "ISOLATION LEVEL REPEATABLE READ",
            "UPDATE orgs SET tenant = 'b' WHERE id = 4",
            "INSERT INTO notes VALUES (4, 'repeatable')",
        ),
        ("", "UPDATE lists SET org = 11 WHERE id = 5", "INSERT INTO items VALUES (5, 'list moved')"),
        ("", "UPDATE orgs SET tenant = 'b' WHERE id = 6", "INSERT INTO items VALUES (6, 'above the list')"),
        // The parent's own parent gets another key: the parent's row has been led there by the time that it is found.
        ("", "UPDATE orgs SET id = 31 WHERE id = 30", "INSERT INTO things VALUES (30, 'below a new key')"),
        ("", "UPDATE orgs SET id = 33 WHERE id = 32", "DELETE FROM things WHERE body = 'taken from below a new key'"),
        (
            "",
            "UPDATE orgs SET id = 35 WHERE id = 34; INSERT INTO orgs VALUES (34, 'a')",
            "INSERT INTO things VALUES (34, 'below a key that another has now')",
        ),
    ];
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE orgs (id int PRIMARY KEY, tenant text NOT NULL);
             CREATE TABLE notes (org int NOT NULL REFERENCES orgs, body text);
             CREATE TABLE lists (id int PRIMARY KEY, org int NOT NULL REFERENCES orgs);
             CREATE TABLE items (list int NOT NULL REFERENCES lists, body text);
             CREATE TABLE racks (id int PRIMARY KEY, org int NOT NULL REFERENCES orgs ON UPDATE CASCADE);
             CREATE TABLE things (rack int NOT NULL REFERENCES racks, body text);
             SELECT coffer.discover('tenant', true);
             INSERT INTO orgs SELECT i, 'a' FROM generate_series(1, 10) i UNION ALL SELECT 11, 'b' UNION ALL SELECT 20, 'c'
                 UNION ALL SELECT i, 'b' FROM generate_series(30, 34, 2) i;
             INSERT INTO racks SELECT i, i FROM generate_series(30, 34, 2) i;
             INSERT INTO things VALUES (32, 'taken from below a new key');
             INSERT INTO notes VALUES (20, 'of c');
             INSERT INTO lists VALUES (5, 10), (6, 6);
             DO $$BEGIN IF EXISTS (SELECT FROM pg_settings WHERE name = 'output_plugin_libraries') THEN
                 EXECUTE 'ALTER ROLE postgres SET output_plugin_libraries = pg_coffer'; END IF; END$$;",
        );
        cluster.psql("shop", "SELECT pg_create_logical_replication_slot('look', 'pg_coffer')");
        let (mover, waiter) = (cluster.connect("shop").await, std::sync::Arc::new(cluster.connect("shop").await));
        for (isolation, change, waits) in WAITED {
            mover.batch_execute("BEGIN").await.expect("begin");
            mover.batch_execute(change).await.expect(change);
            let script = format!("BEGIN {isolation}; {waits}; COMMIT");
            let waiting = tokio::spawn({
                let waiter = waiter.clone();
                async move { waiter.batch_execute(&script).await }
            });
            let waiters = "SELECT count(*) FROM pg_locks WHERE NOT granted";
            coffer_tests::wait_for("the other to wait", 20, || (cluster.psql("shop", waiters) == "1").then_some(()));
            mover.batch_execute("COMMIT").await.expect("commit");
            waiting.await.expect("a task").expect(waits);
        }
        let (a, b) = (decoded(&cluster, "a"), decoded(&cluster, "b"));
        for (_, change, waits) in WAITED {
            let body = waits.split('\'').nth(1).expect("a body");
            assert!(!a.contains(body) && b.contains(body), "{change} against {waits}:\na:\n{a}\nb:\n{b}");
        }
    });
}

/// What the log makes of a table without a key, from its beginning: each tenant's rows, those of nobody under none.
fn replayed(cluster: &Cluster, relation: &str) -> Vec<(Option<String>, String)> {
    let log =
        cluster.psql("shop", "SELECT data FROM pg_logical_slot_peek_changes('look', NULL, NULL, 'format', 'json')");
    let mut rows = Vec::new();
    for line in log.lines() {
        let change: serde_json::Value = serde_json::from_str(line).expect("a document");
        if change["relation"] != relation {
            continue;
        }
        let tenant = change["tenant"].as_str().map(str::to_owned);
        let body = |side: &str| change[side]["body"].as_str().map(|b| (tenant.clone(), b.to_owned()));
        if let Some(old) = body("old") {
            let at = rows.iter().position(|r| *r == old).unwrap_or_else(|| panic!("no such row: {line}\n{log}"));
            rows.remove(at);
        }
        rows.extend(body("new"));
    }
    rows.sort();
    rows
}

/// A constraint that is checked late: the child is written, another session brings the parent and rows of its own below
/// it, and the child commits. It is the tenant's then, and no row twice.
fn parents_that_others_bring(major: u32) {
    // Under REPEATABLE READ the constraint itself does not see the other's parent.
    const ENDS: [&[&str]; 2] = [&["COMMIT"], &["PREPARE TRANSACTION 'late'", "COMMIT PREPARED 'late'"]];
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE orgs (id int PRIMARY KEY, tenant text);
             CREATE TABLE lists (id int PRIMARY KEY, org int NOT NULL REFERENCES orgs DEFERRABLE INITIALLY DEFERRED);
             CREATE TABLE items (list int NOT NULL REFERENCES lists DEFERRABLE INITIALLY DEFERRED, body text);
             CREATE TABLE notes (org int REFERENCES orgs DEFERRABLE INITIALLY DEFERRED, body text);
             CREATE TABLE shelves (id int PRIMARY KEY, org int REFERENCES orgs DEFERRABLE INITIALLY DEFERRED);
             CREATE TABLE books (shelf int REFERENCES shelves, body text);
             SELECT coffer.discover('tenant', true);
             DO $$BEGIN IF EXISTS (SELECT FROM pg_settings WHERE name = 'output_plugin_libraries') THEN
                 EXECUTE 'ALTER ROLE postgres SET output_plugin_libraries = pg_coffer'; END IF; END$$;",
        );
        cluster.psql("shop", "SELECT pg_create_logical_replication_slot('look', 'pg_coffer')");
        let (early, other) = (cluster.connect("shop").await, cluster.connect("shop").await);
        let run = async |db: &Client, script: &str| {
            db.batch_execute(script).await.unwrap_or_else(|e| panic!("{script}: {e:?}"))
        };
        for (n, end) in ENDS.iter().enumerate() {
            let org = n + 1;
            // Nobody's, and what lies below, until the shelf is led to somebody who is not there yet.
            run(&other, &format!("INSERT INTO shelves VALUES ({org}); INSERT INTO books VALUES ({org}, 'theirs')"))
                .await;
            run(&early, "BEGIN").await;
            run(&early, &format!("UPDATE shelves SET org = {org} WHERE id = {org}")).await;
            run(&early, &format!("INSERT INTO books VALUES ({org}, 'joined')")).await;
            run(&early, &format!("INSERT INTO notes VALUES ({org}, 'early'), ({org}, 'early'), (NULL, 'of nobody')"))
                .await;
            run(&early, &format!("INSERT INTO items VALUES ({org}0, 'two steps'), ({org}1, 'a list of theirs')")).await;
            run(&early, &format!("INSERT INTO lists VALUES ({org}0, {org})")).await;
            run(&early, &format!("SAVEPOINT s; INSERT INTO notes VALUES ({org}, 'undone'); ROLLBACK TO s")).await;
            run(
                &other,
                &format!(
                    "INSERT INTO orgs VALUES ({org}, 'b'); INSERT INTO notes VALUES ({org}, 'theirs'), ({org}, 'changed');
                     INSERT INTO lists VALUES ({org}1, {org}); INSERT INTO items VALUES ({org}1, 'theirs')"
                ),
            )
            .await;
            run(
                &early,
                &format!("INSERT INTO notes VALUES ({org}, 'joined'); INSERT INTO items VALUES ({org}0, 'joined')"),
            )
            .await;
            run(&early, "UPDATE notes SET body = 'changed by the early one' WHERE body = 'changed'").await;
            // What they brought, we change.
            run(&early, &format!("INSERT INTO notes VALUES ({org}5, 'waits')")).await;
            run(
                &other,
                &format!("INSERT INTO orgs VALUES ({org}5, 'b'); INSERT INTO notes VALUES ({org}5, 'below theirs')"),
            )
            .await;
            run(&early, &format!("UPDATE orgs SET tenant = 'c' WHERE id = {org}5")).await;
            run(&early, "UPDATE notes SET body = 'early, changed' WHERE body = 'early'").await;
            for statement in *end {
                run(&early, statement).await;
            }
        }
        for (table, tenant) in [
            ("books", "(SELECT o.tenant FROM shelves s JOIN orgs o ON o.id = s.org WHERE s.id = t.shelf)"),
            ("notes", "(SELECT o.tenant FROM orgs o WHERE o.id = t.org)"),
            ("items", "(SELECT o.tenant FROM lists l JOIN orgs o ON o.id = l.org WHERE l.id = t.list)"),
        ] {
            let live = early.query(&format!("SELECT {tenant}, t.body FROM {table} t"), &[]).await.expect("rows");
            let mut live: Vec<(Option<String>, String)> = live.iter().map(|r| (r.get(0), r.get(1))).collect();
            live.sort();
            assert_eq!(replayed(&cluster, &format!("public.{table}")), live, "{table}");
        }
    });
}

/// Without a foreign key: a row and its parent, written at the same time by two who do not see each other's; whoever
/// commits last.
fn without_a_key(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE orgs (id int PRIMARY KEY, tenant text);
             CREATE TABLE notes (org int CONSTRAINT guard REFERENCES orgs, body text);
             SELECT coffer.discover('tenant', true);
             ALTER TABLE notes DROP CONSTRAINT guard;
             DO $$BEGIN IF EXISTS (SELECT FROM pg_settings WHERE name = 'output_plugin_libraries') THEN
                 EXECUTE 'ALTER ROLE postgres SET output_plugin_libraries = pg_coffer'; END IF; END$$;",
        );
        cluster.psql("shop", "SELECT pg_create_logical_replication_slot('look', 'pg_coffer')");
        let (child, parent) =
            (std::sync::Arc::new(cluster.connect("shop").await), std::sync::Arc::new(cluster.connect("shop").await));
        let run = async |db: &Client, script: &str| {
            db.batch_execute(script).await.unwrap_or_else(|e| panic!("{script}: {e:?}"))
        };
        let waiting = |db: &std::sync::Arc<Client>, script: &'static str| {
            let db = db.clone();
            let task = tokio::spawn(async move { db.batch_execute(script).await.expect(script) });
            let waiters = "SELECT count(*) FROM pg_locks WHERE NOT granted";
            coffer_tests::wait_for("the other to wait", 20, || (cluster.psql("shop", waiters) == "1").then_some(()));
            task
        };
        // The parent is there and not committed: the row's commit waits for it.
        run(&child, "BEGIN; INSERT INTO notes VALUES (1, 'first')").await;
        run(&parent, "BEGIN; INSERT INTO orgs VALUES (1, 'a')").await;
        let task = waiting(&child, "COMMIT");
        run(&parent, "COMMIT").await;
        task.await.expect("a task");
        // The row is as good as committed: the parent waits for it.
        run(&child, "BEGIN; INSERT INTO notes VALUES (2, 'prepared'); PREPARE TRANSACTION 'p'").await;
        let task = waiting(&parent, "INSERT INTO orgs VALUES (2, 'b')");
        run(&child, "COMMIT PREPARED 'p'").await;
        task.await.expect("a task");
        // The parent goes while somebody waits to put a row below it, and the row stays without it.
        run(&parent, "BEGIN; DELETE FROM orgs WHERE id = 1").await;
        let task = waiting(&child, "INSERT INTO notes VALUES (1, 'left')");
        run(&parent, "COMMIT").await;
        task.await.expect("a task");
        let tenant = "(SELECT o.tenant FROM orgs o WHERE o.id = t.org)";
        let live = child.query(&format!("SELECT {tenant}, t.body FROM notes t"), &[]).await.expect("rows");
        let mut live: Vec<(Option<String>, String)> = live.iter().map(|r| (r.get(0), r.get(1))).collect();
        live.sort();
        assert_eq!(replayed(&cluster, "public.notes"), live);
    });
}

/// A row with two ways to a tenant is of the one that was chosen, wherever the other leads: in a base, in the stream and in
/// restores.
fn two_ways(major: u32) {
    const TABLES: &str = "
        CREATE TABLE orgs (id int PRIMARY KEY, tenant text);
        CREATE TABLE projects (id int PRIMARY KEY, org int NOT NULL REFERENCES orgs ON DELETE CASCADE);
        CREATE TABLE crossed (id int PRIMARY KEY, project int, org int NOT NULL REFERENCES orgs ON DELETE CASCADE, body text);";
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", TABLES);
        cluster.script("shop", "ALTER TABLE crossed ADD FOREIGN KEY (project) REFERENCES projects ON DELETE SET NULL");
        cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', true)");
        assert_eq!(
            cluster.psql("shop", "SELECT parent FROM coffer.coverage WHERE relation = 'crossed'::regclass"),
            "orgs"
        );
        cluster.script(
            "shop",
            "INSERT INTO orgs VALUES (1, 'a'), (2, 'b'), (3, 'c');
             INSERT INTO projects VALUES (11, 1), (12, 1), (21, 2), (31, 3);
             INSERT INTO crossed VALUES (1, 11, 1, 'a'), (2, 21, 1, 'a, beside b'), (3, NULL, 2, 'b'), (4, 12, 2, 'b, beside a'), (5, 31, 3, 'c')",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        let tenants = ["a", "b", "c"];
        restored::wait_windows(&mut agent, &tenants);
        let org = "(SELECT o.tenant FROM orgs o WHERE o.id = t.org)";
        let watched =
            vec![Watched::new("orgs", "t.tenant"), Watched::new("projects", org), Watched::new("crossed", org)];
        let mut db = cluster.connect("shop").await;
        let base = truth::take(&mut db, &watched, "base").await;
        cluster.script(
            "shop",
            "UPDATE crossed SET org = 2 WHERE id = 2;
             UPDATE crossed SET project = 21 WHERE id = 1;
             UPDATE projects SET org = 3 WHERE id = 12;
             INSERT INTO crossed VALUES (6, 11, 3, 'c, beside a');
             DELETE FROM projects WHERE id = 31",
        );
        let crossed = truth::take(&mut db, &watched, "crossed").await;
        // The way that was not chosen leads to rows that are not in the backup of the tenant.
        let scratch = Scratch::new(&cluster, TABLES).await;
        for truth in [&base, &crossed] {
            for tenant in tenants {
                let mut wrong = scratch.check(&agent, truth, &watched, tenant).await;
                wrong.extend(Database::check(&agent, &cluster, truth, &watched, tenant).await);
                assert!(wrong.is_empty(), "{wrong:#?}");
            }
        }
        // In place there they are.
        cluster.script("shop", "UPDATE crossed SET body = 'changed'; DELETE FROM crossed WHERE id IN (1, 4)");
        let changed = truth::take(&mut db, &watched, "changed").await;
        agent.json(&restored::in_place("b", "name:crossed"));
        let mut wrong = crossed.differences(&db, &watched, "b").await;
        for other in ["a", "c"] {
            wrong.extend(changed.differences(&db, &watched, other).await);
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}
