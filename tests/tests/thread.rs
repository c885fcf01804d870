//! The thin thread: from a row that changes to that tenant's rows restored, by every mode, target and format.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Out, Scratch};
use coffer_tests::truth::{self, Watched};
use serde_json::Value;
use std::path::Path;

on_majors! {
    restores: restores;
    targets: targets;
    refusals: refusals;
    in_place: in_place;
    formats: formats;
}

const DDL: &str = "
CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
CREATE TABLE b (id int PRIMARY KEY, tenant int NOT NULL, v text, UNIQUE (v));
CREATE TABLE c (tenant int NOT NULL, v text);
CREATE INDEX a_v ON a (v);
CREATE SEQUENCE numbers;
";

fn tables() -> Vec<Watched> {
    ["a", "b", "c"].map(|t| Watched::new(t, "tenant")).to_vec()
}

/// A protected database with a table of each strategy and some rows of tenants 1 to 3.
fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    for (table, strategy) in [("a", "identity"), ("b", "tag"), ("c", "full_row")] {
        let got = cluster.psql("shop", &format!("SELECT strategy FROM coffer.add_table('{table}', 'tenant')"));
        assert_eq!(got, strategy, "table {table}");
    }
    cluster.script(
        "shop",
        "INSERT INTO a SELECT t, i, 'a' || i FROM generate_series(1, 3) t, generate_series(1, 50) i;
         INSERT INTO b SELECT i, 1 + i % 3, 'b' || i FROM generate_series(1, 90) i;
         INSERT INTO c SELECT 1 + i % 3, 'c' || i % 7 FROM generate_series(1, 60) i;
         SELECT setval('numbers', 41);",
    );
    cluster
}

fn agent(cluster: &Cluster, tenants: &[&str]) -> Agent {
    let mut agent = Agent::new(&Setup::of(cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, tenants);
    agent
}

/// Changes of every kind to every table.
const CHANGES: &str = "
UPDATE a SET v = v || '!' WHERE id % 3 = 0;
DELETE FROM a WHERE id % 5 = 0;
UPDATE a SET id = id + 1000 WHERE id % 7 = 0;
INSERT INTO a SELECT t, 2000 + i, NULL FROM generate_series(1, 4) t, generate_series(1, 10) i;
UPDATE b SET v = v || '!' WHERE id % 3 = 0;
DELETE FROM b WHERE id % 5 = 0;
UPDATE b SET tenant = 3 WHERE tenant = 2 AND id % 4 = 0;
UPDATE b SET id = id + 1000, tenant = 1 WHERE tenant = 3 AND id % 7 = 0;
INSERT INTO b SELECT 5000 + i, 1 + i % 4, NULL FROM generate_series(1, 20) i;
UPDATE c SET v = v || '!' WHERE v = 'c3';
DELETE FROM c WHERE v = 'c5';
INSERT INTO c SELECT 1 + i % 4, '\\N' FROM generate_series(1, 12) i;
";

fn restores(major: u32) {
    block_on(async {
        let cluster = database(major);
        cluster.script(
            "shop",
            "CREATE TABLE currency (code text PRIMARY KEY, name text);
             INSERT INTO currency VALUES ('EUR', 'euro'), ('USD', 'dollar');
             SELECT * FROM coffer.add_shared('currency');
             CREATE SCHEMA acme; CREATE TABLE acme.letters (id int PRIMARY KEY, v text);
             SELECT * FROM coffer.add_schema('acme', 'acme');
             INSERT INTO acme.letters VALUES (1, 'one'), (2, 'two');",
        );
        let agent = agent(&cluster, &["1", "2", "3", "acme"]);
        let mut db = cluster.connect("shop").await;
        let scratch = Scratch::new(&cluster, DDL).await;
        let base = truth::take(&mut db, &tables(), "base").await;
        cluster.script("shop", CHANGES);
        cluster.script(
            "shop",
            "UPDATE acme.letters SET v = 'zwei' WHERE id = 2; INSERT INTO acme.letters VALUES (3, 'three');
             INSERT INTO currency VALUES ('CHF', 'franc');",
        );
        let changed = truth::take(&mut db, &tables(), "changed").await;
        cluster.script("shop", "DELETE FROM b; TRUNCATE c; UPDATE a SET v = 'x'; DELETE FROM acme.letters;");
        let emptied = truth::take(&mut db, &tables(), "emptied").await;

        let mut wrong = Vec::new();
        for truth in [&base, &changed, &emptied] {
            for tenant in ["1", "2", "3", "4"] {
                if tenant == "4" && truth.name == "base" {
                    continue; // not born yet
                }
                wrong.extend(scratch.check(&agent, truth, &tables(), tenant).await);
                wrong.extend(Database::check(&agent, &cluster, truth, &tables(), tenant).await);
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");

        // What else a fresh database has: constraints, indexes, sequences, reference data, and of no other tenant a row.
        let restored = Database::restore(&agent, &cluster, "1", "name:changed");
        let sql = "SELECT count(*) FROM pg_index WHERE indrelid IN ('a'::regclass, 'b'::regclass)";
        assert_eq!(cluster.psql(&restored.name, sql), cluster.psql("shop", sql));
        assert_eq!(
            cluster.psql(&restored.name, "SELECT string_agg(code, ',' ORDER BY code) FROM currency"),
            "CHF,EUR,USD"
        );
        assert_eq!(cluster.psql(&restored.name, "SELECT nextval('numbers') > 41"), "t");
        for t in ["a", "b", "c"] {
            assert_eq!(cluster.psql(&restored.name, &format!("SELECT count(*) FROM {t} WHERE tenant <> 1")), "0");
        }
        let said = cluster.psql_err(&restored.name, "INSERT INTO a SELECT * FROM a LIMIT 1");
        assert!(said.contains("a_pkey"), "{said}");

        // A tenant by namespace.
        let restored = Database::restore(&agent, &cluster, "acme", "name:changed");
        assert_eq!(
            cluster.psql(&restored.name, "SELECT string_agg(id || v, ',' ORDER BY id) FROM acme.letters"),
            "1one,2zwei,3three"
        );

        let verify = agent.json(&["verify"]);
        assert_eq!(verify["ok"], true, "{verify}");
        assert!(verify["objects"].as_u64().expect("a number") > 10, "{verify}");
        let status = agent.json(&["status"]);
        assert_eq!(status["healthy"], true, "{status}");
        assert_eq!(status["sources"][0]["unresolved_rows"], 0, "{status}");
        assert_eq!(status["stores"][0]["up"], true, "{status}");
    });
}

fn targets(major: u32) {
    block_on(async {
        let cluster = database(major);
        let agent = agent(&cluster, &["1", "2", "3"]);
        let mut db = cluster.connect("shop").await;
        let scratch = Scratch::new(&cluster, DDL).await;
        // Between these commits lies a moment by the server's clock, and an LSN.
        let mut points = Vec::new();
        for n in 0..3 {
            let mut truth = truth::take(&mut db, &tables(), &format!("p{n}")).await;
            let row = db
                .query_one(
                    "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), \
                     pg_current_wal_insert_lsn()::text",
                    &[],
                )
                .await
                .expect("now");
            let (time, lsn): (String, String) = (row.get(0), row.get(1));
            // A time of microseconds may be the next commit's too; wait until the clock has moved on.
            db.batch_execute(&format!(
                "DO $$BEGIN WHILE clock_timestamp() <= '{time}'::timestamptz LOOP NULL; END LOOP; END$$"
            ))
            .await
            .expect("the clock moves");
            cluster.psql("shop", &format!("UPDATE a SET v = 'after {n}' WHERE tenant = 1"));
            cluster.psql("shop", &format!("INSERT INTO c VALUES (2, 'after {n}')"));
            truth.name = format!("p{n}, before {time} and {lsn}");
            points.push((truth, n, time, lsn));
        }
        for (truth, n, time, lsn) in &points {
            for to in [format!("name:p{n}"), time.clone(), lsn.clone()] {
                for tenant in ["1", "2"] {
                    let out = restored::to_files(&agent, tenant, &to);
                    scratch.load(&out).await;
                    let wrong = truth.differences(&scratch.client, &tables(), tenant).await;
                    assert!(wrong.is_empty(), "--to {to}: {wrong:#?}");
                }
            }
        }
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let out = restored::to_files(&agent, "2", "latest");
        scratch.load(&out).await;
        let have = truth::rows_of(&scratch.client, &tables()[2], "2").await;
        assert_eq!(have, truth::rows_of(&db, &tables()[2], "2").await);
    });
}

fn refusals(major: u32) {
    let cluster = database(major);
    let agent = agent(&cluster, &["1", "2", "3"]);
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let window = restored::listed(&agent, "1")["window"].clone();
    assert!(!window.as_array().expect("a list").is_empty());
    let out = Out::new();
    let restore = |tenant: &str, to: &str| {
        agent.json_err(&[
            "restore",
            "--tenant",
            tenant,
            "--to",
            to,
            "--mode",
            "files",
            "--target",
            out.arg(),
            "--confirm",
        ])
    };
    let code = |answer: &(i32, Value)| {
        assert_eq!(answer.1["error"]["exit"], answer.0, "{}", answer.1);
        answer.0
    };

    for (to, why) in [
        ("0/1", "before"),
        ("FFFFFF/0", "after"),
        ("2001-01-01T00:00:00Z", "before"),
        ("2101-01-01T00:00:00Z", "after"),
    ] {
        let answer = restore("1", to);
        assert_eq!(code(&answer), 4, "{why} the window: {}", answer.1);
        let said = answer.1["error"]["window"].as_array().expect("the window").clone();
        assert_eq!(said.first().map(|w| &w["from_lsn"]), window.get(0).map(|w| &w["from_lsn"]), "{}", answer.1);
    }
    assert_eq!(code(&restore("nobody", "latest")), 3);
    assert_eq!(code(&restore("1", "name:never")), 3);
    assert_eq!(code(&restore("1", "not a time")), 2);
    assert!(out.names().is_empty(), "a refusal wrote {:?}", out.names());

    std::fs::create_dir(&out.dir).expect("a folder");
    std::fs::write(out.dir.join("mine"), "mine").expect("a file");
    assert_eq!(code(&restore("1", "latest")), 10);
    assert_eq!(out.names(), ["mine"]);

    // A database that is not empty.
    cluster.psql("postgres", "CREATE DATABASE taken");
    cluster.psql("taken", "CREATE TABLE mine (x int)");
    let answer = agent.json_err(&restored::args("1", "latest", "database", &cluster.url("postgres", "taken")));
    assert_eq!(code(&answer), 10, "{}", answer.1);
    assert_eq!(cluster.psql("taken", "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"), "1");

    // Without --confirm nothing happens.
    cluster.psql("shop", "DELETE FROM a WHERE tenant = 1");
    let before = cluster.psql("shop", "SELECT count(*) FROM a");
    let done = agent.coffer(&[
        "restore",
        "--tenant",
        "1",
        "--to",
        "latest",
        "--mode",
        "in-place",
        "--target",
        &cluster.url("coffer_agent", "shop"),
    ]);
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM a"), before);

    // A second use of a restore point's name.
    cluster.psql("shop", "SELECT coffer.restore_point('once')");
    cluster.psql_err("shop", "SELECT coffer.restore_point('once')");
    assert_eq!(agent.coffer(&["restore", "--tenant", "1"]).status.code(), Some(2));
}

fn in_place(major: u32) {
    block_on(async {
        let cluster = database(major);
        let agent = agent(&cluster, &["1", "2", "3"]);
        let mut db = cluster.connect("shop").await;
        let good = truth::take(&mut db, &tables(), "good").await;
        cluster.script(
            "shop",
            "DELETE FROM a WHERE tenant = 2 AND id <= 20; UPDATE a SET v = 'bad' WHERE tenant = 2 AND id > 45;
             INSERT INTO a VALUES (2, 777, 'new'); DELETE FROM b WHERE tenant = 2; DELETE FROM c WHERE tenant = 2 AND v = 'c1';
             INSERT INTO c VALUES (2, 'extra');
             UPDATE a SET v = 'kept' WHERE tenant = 1; DELETE FROM b WHERE tenant = 3;",
        );
        let bad = truth::take(&mut db, &tables(), "bad").await;

        let mut dry = restored::in_place("2", "name:good");
        dry.retain(|a| *a != "--confirm");
        dry.push("--dry-run");
        let plan = agent.json(&dry);
        assert_eq!(plan["dry_run"], true, "{plan}");
        assert_eq!(plan["mode"], "in-place", "{plan}");
        let of = |doc: &Value, table: &str| {
            let tables = doc["tables"].as_array().expect("tables").clone();
            tables.into_iter().find(|t| t["relation"] == table).unwrap_or_else(|| panic!("{table} is not in {doc}"))
        };
        let a = of(&plan, "public.a");
        assert_eq!((&a["inserted"], &a["updated"], &a["deleted"]), (&20.into(), &5.into(), &1.into()), "{plan}");
        assert_eq!(of(&plan, "public.b")["inserted"], 30, "{plan}");
        assert_eq!(of(&plan, "public.c")["deleted"], 1, "{plan}");
        for t in ["1", "2", "3"] {
            assert!(bad.differences(&db, &tables(), t).await.is_empty(), "a dry run changed tenant {t}");
        }

        let done = agent.json(&restored::in_place("2", "name:good"));
        assert_eq!(done["dry_run"], false);
        assert_eq!(of(&done, "public.a")["inserted"], 20, "{done}");
        let wrong = good.differences(&db, &tables(), "2").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        for t in ["1", "3"] {
            let wrong = bad.differences(&db, &tables(), t).await;
            assert!(wrong.is_empty(), "another tenant was touched: {wrong:#?}");
        }
        let left = cluster.psql("shop", "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa_coffer_fence%'");
        assert_eq!(left, "0", "the fence is still there");

        // Undo is one more restore, to just before.
        agent.json(&restored::in_place("2", "name:bad"));
        assert!(bad.differences(&db, &tables(), "2").await.is_empty());

        // A row that belongs to another tenant now: refused, and nothing changed.
        cluster.psql("shop", "UPDATE b SET tenant = 1 WHERE id = (SELECT min(id) FROM b WHERE tenant = 2)");
        cluster.psql("shop", "INSERT INTO b SELECT 1, 1, 'taken over' WHERE NOT EXISTS (SELECT FROM b WHERE id = 1)");
        cluster.psql("shop", "UPDATE b SET tenant = 1 WHERE id = 1");
        let before = truth::take(&mut db, &tables(), "before_refusal").await;
        let (code, doc) = agent.json_err(&restored::in_place("2", "name:good"));
        assert_eq!(code, 10, "{doc}");
        for t in ["1", "2", "3"] {
            assert!(before.differences(&db, &tables(), t).await.is_empty(), "a refused restore changed tenant {t}");
        }
    });
}

/// What Parquet has types for, and what goes as text there.
const TYPED: &str = "
CREATE TABLE d (tenant int, id int, ok bool, big bigint, small smallint, r real, f double precision, day date,
    at timestamptz, n numeric, raw bytea, PRIMARY KEY (tenant, id))";

fn copy_csv(relation: &str, columns: &str, file: &Path) -> String {
    format!("\\copy {relation} ({columns}) FROM '{}' WITH (FORMAT csv, HEADER)", file.display())
}

fn formats(major: u32) {
    block_on(async {
        let cluster = database(major);
        cluster.script(
            "shop",
            "INSERT INTO a VALUES (1, 9001, ''), (1, 9002, NULL), (1, 9003, E'tab\\there, \"q\"\\nline\\\\N')",
        );
        cluster.script("shop", TYPED);
        cluster.psql("shop", "SELECT * FROM coffer.add_table('d', 'tenant')");
        cluster.script(
            "shop",
            "INSERT INTO d VALUES
                (1, 1, true, 9223372036854775807, -32768, 1.17549435e-38, 0.1, '0044-03-15', '2026-11-23 10:00:00.000001+01', 1.50, '\\x00ff'),
                (1, 2, false, -1, 1, 'Infinity', 'NaN', '9999-12-31', '1969-12-31 23:59:59.999999+00', -0.000, ''),
                (1, 3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
                (1, 4, true, 0, 0, '-0', -1.7976931348623157e308, '1970-01-01', '1970-01-01 00:00+00', 'NaN', NULL)",
        );
        let tables = || [tables(), vec![Watched::new("d", "tenant")]].concat();
        let agent = agent(&cluster, &["1"]);
        let mut db = cluster.connect("shop").await;
        cluster.psql("shop", "UPDATE a SET v = v || E',\\r\\n''x''' WHERE tenant = 1 AND id = 3");
        let truth = truth::take(&mut db, &tables(), "p").await;
        let mut args = restored::args("1", "name:p", "files", "");
        let at = args.iter().position(|a| a.is_empty()).expect("the target");

        for format in ["copy", "csv", "sql", "jsonl", "parquet"] {
            let out = Out::new();
            let mut with = args.clone();
            with[at] = out.arg();
            with.extend(["--format", format]);
            agent.json(&with);
            let scratch = Scratch::new(&cluster, &format!("{DDL}{TYPED}")).await;
            let manifest = out.manifest();
            for t in manifest["tables"].as_array().expect("tables") {
                let file = out.dir.join(t["file"].as_str().expect("a file"));
                let shown = file.display();
                let (relation, columns) =
                    (t["relation"].as_str().expect("a name"), t["columns"].as_array().expect("names"));
                let columns: Vec<_> = columns.iter().map(|c| restored::quote(c.as_str().expect("a name"))).collect();
                let columns = columns.join(", ");
                match format {
                    "copy" => cluster.script(&scratch.db, &format!("\\copy {relation} ({columns}) FROM '{shown}'")),
                    "csv" => cluster.script(&scratch.db, &copy_csv(relation, &columns, &file)),
                    "parquet" => {
                        let read = restored::csv_of_parquet(&file);
                        cluster.script(&scratch.db, &copy_csv(relation, &columns, &read))
                    }
                    "sql" => cluster.script(&scratch.db, &format!("\\i {shown}")),
                    _ => {
                        let text = std::fs::read_to_string(&file).expect("the file");
                        for line in text.lines() {
                            let sql = format!(
                                "INSERT INTO {relation} SELECT * FROM json_populate_record(NULL::{relation}, ($1::text)::json)"
                            );
                            scratch.client.execute(&sql, &[&line]).await.expect("insert");
                        }
                        String::new()
                    }
                };
            }
            let wrong = truth.differences(&scratch.client, &tables(), "1").await;
            assert!(wrong.is_empty(), "--format {format}: {wrong:#?}");
        }

        // One table of them.
        let out = Out::new();
        args[at] = out.arg();
        args.extend(["--table", "public.a"]);
        agent.json(&args);
        let manifest = out.manifest();
        let names: Vec<_> =
            manifest["tables"].as_array().expect("tables").iter().map(|t| t["relation"].clone()).collect();
        assert_eq!(names, ["public.a"], "{manifest}");
    });
}
