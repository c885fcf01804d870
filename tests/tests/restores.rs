//! The ways to restore beyond files and databases: side by side in a schema, and what is compared with it.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_majors! {
    side_by_side: side_by_side;
    what_changed_since: what_changed_since;
    single_rows: single_rows;
    undone: undone;
    in_place_keeps_its_promises: in_place_keeps_its_promises;
    as_another_tenant: as_another_tenant;
    nobody_elses_rows: nobody_elses_rows;
    keys_as_they_are_written: keys_as_they_are_written;
    undone_whole_or_named: undone_whole_or_named;
    values_that_are_not_kept: values_that_are_not_kept;
}

const DDL: &str = "
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE TABLE customer (tenant int NOT NULL, id int NOT NULL, name text NOT NULL, m mood, loud text GENERATED ALWAYS AS (upper(name)) STORED,
  PRIMARY KEY (tenant, id));
CREATE INDEX customer_name ON customer (lower(name)) WHERE name <> '';
CREATE TABLE bill (tenant int NOT NULL, id bigserial PRIMARY KEY, customer int NOT NULL, amount numeric(10,2),
  FOREIGN KEY (tenant, customer) REFERENCES customer, UNIQUE (tenant, amount, id));
CREATE TABLE line (id int PRIMARY KEY, bill bigint NOT NULL REFERENCES bill ON DELETE CASCADE, what text);
CREATE TABLE note (tenant int NOT NULL, v text);
CREATE TABLE trail (tenant int NOT NULL, id int PRIMARY KEY, v text);
CREATE TABLE never (tenant int NOT NULL, id int PRIMARY KEY);
CREATE FUNCTION noisy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a trigger fired'; END $$;
";

const ROWS: &str = "
INSERT INTO customer SELECT t, i, 'c' || i, 'ok' FROM generate_series(1, 3) t, generate_series(1, 20) i;
INSERT INTO bill (tenant, customer, amount) SELECT t, i, i * 1.5 FROM generate_series(1, 3) t, generate_series(1, 20) i;
INSERT INTO line SELECT i, i, 'line ' || i FROM generate_series(1, 60) i;
INSERT INTO note SELECT 1 + i % 3, 'n' || i % 5 FROM generate_series(1, 60) i;
INSERT INTO trail SELECT i, 1 + i % 3, 'first' FROM generate_series(1, 30) i;
";

/// A protected database with tables of several strategies, and an agent with windows for tenants 1 to 3.
fn protected(major: u32) -> (Cluster, Agent) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    for (table, more) in [
        ("customer", "'tenant'"),
        ("bill", "'tenant'"),
        ("line", "parent => 'bill'"),
        ("note", "'tenant'"),
        ("trail", "'tenant', class => 'audit'"),
        ("never", "'tenant'"),
    ] {
        cluster.psql("shop", &format!("SELECT * FROM coffer.add_table('{table}', {more})"));
    }
    cluster.script("shop", &ROWS.replace("SELECT i, 1 + i % 3, 'first'", "SELECT 1 + i % 3, i, 'first'"));
    cluster.script(
        "shop",
        "CREATE TRIGGER noisy BEFORE INSERT ON customer FOR EACH ROW EXECUTE FUNCTION noisy();
         ALTER DEFAULT PRIVILEGES FOR ROLE coffer_agent GRANT SELECT ON TABLES TO PUBLIC;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2", "3"]);
    (cluster, agent)
}

/// Restores, with more arguments; the document.
fn restore(agent: &Agent, tenant: &str, to: &str, mode: &str, more: &[&str]) -> Value {
    let mut args = vec!["restore", "--tenant", tenant, "--to", to, "--mode", mode, "--wait", "120s", "--confirm"];
    args.extend(more);
    agent.json(&args)
}

fn side_by_side(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        let sql = |s: &str| cluster.psql("shop", s);
        sql("SELECT coffer.restore_point('before')");
        let rows_then = |t: &str| {
            sql(&format!(
                "SELECT count(*) || ' ' || md5(string_agg(t::text, ',' ORDER BY t::text)) FROM {t} t WHERE tenant = 2"
            ))
        };
        let (customers, bills, notes) = (rows_then("customer"), rows_then("bill"), rows_then("note"));
        let sequence = sql("SELECT last_value FROM bill_id_seq");
        cluster.script(
            "shop",
            "UPDATE customer SET name = name || '!' WHERE id < 5; DELETE FROM note WHERE v = 'n1';
             DELETE FROM bill WHERE id % 4 = 0; ALTER TABLE bill RENAME amount TO total; ALTER TABLE bill ADD extra int DEFAULT 7;",
        );
        let before = sql("SELECT count(*) FROM coffer.coverage WHERE covered");

        // A plan makes nothing.
        let dry =
            agent.json(&["restore", "--tenant", "2", "--to", "name:before", "--mode", "schema", "--wait", "120s"]);
        assert_eq!((dry["dry_run"].as_bool(), dry["tables"][0]["inserted"].as_u64()), (Some(true), Some(20)), "{dry}");
        assert!(dry["schema"].as_str().is_some_and(|s| s.starts_with("coffer_2_2")), "{dry}");
        assert_eq!(sql("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'coffer\\_2%'"), "0");

        let done = restore(&agent, "2", "name:before", "schema", &["--target", "Then"]);
        assert_eq!(done["schema"], "Then");
        assert_eq!(done["warnings"].as_array().map(Vec::len), Some(0), "{done}");
        // The rows are those of the target, under its columns.
        let rows = |t: &str| {
            sql(&format!(
                "SELECT count(*) || ' ' || md5(string_agg(t::text, ',' ORDER BY t::text)) FROM \"Then\".{t} t"
            ))
        };
        assert_eq!((rows("customer"), rows("bill"), rows("note")), (customers, bills, notes));
        assert_eq!(sql("SELECT count(*) FROM \"Then\".line"), "20");
        assert_eq!(sql("SELECT count(*) FROM \"Then\".never"), "0");
        assert_eq!(
            sql(
                "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = '\"Then\".bill'::regclass AND attname = 'amount'"
            ),
            "numeric(10,2)"
        );
        // Keys and indexes, and nothing that acts.
        let index = "SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.relnamespace =";
        assert_eq!(sql(&format!("{index} '\"Then\"'::regnamespace")), sql(&format!("{index} 'public'::regnamespace")));
        assert!(sql("SELECT pg_get_indexdef('\"Then\".customer_name'::regclass)").contains("lower(name)"));
        let acts = "SELECT (SELECT count(*) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE c.relnamespace = n.oid)
            + (SELECT count(*) FROM pg_constraint WHERE connamespace = n.oid AND contype = 'f')
            + (SELECT count(*) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid WHERE c.relnamespace = n.oid AND a.atthasdef AND a.attgenerated = '')
            FROM pg_namespace n WHERE nspname = 'Then'";
        assert_eq!(sql(acts), "0");
        assert_eq!(sql("SELECT last_value FROM bill_id_seq"), sequence);
        // It says what it is, only its owner gets in, and nobody's backup has it.
        assert!(sql("SELECT obj_description('\"Then\"'::regnamespace)").contains("tenant 2 of shop as at name:before"));
        assert!(sql("SELECT obj_description('\"Then\".bill'::regclass)").contains("public.bill"));
        assert_eq!(
            sql(
                "SELECT count(*) FROM pg_namespace n, aclexplode(n.nspacl) a WHERE nspname = 'Then' AND a.grantee <> n.nspowner"
            ),
            "0"
        );
        assert_eq!(
            sql(
                "SELECT count(*) FROM pg_class c, aclexplode(c.relacl) a WHERE c.relnamespace = '\"Then\"'::regnamespace AND a.grantee <> c.relowner"
            ),
            "0"
        );
        assert_eq!(sql("SELECT count(*) FROM coffer.coverage WHERE covered"), before);

        // A schema that exists is left alone.
        let (code, error) = agent.json_err(&[
            "restore",
            "--tenant",
            "2",
            "--to",
            "name:before",
            "--mode",
            "schema",
            "--target",
            "Then",
            "--confirm",
        ]);
        assert_eq!((code, error["error"]["code"].as_str()), (10, Some("exists")), "{error}");
        let (code, _) = agent.json_err(&[
            "restore",
            "--tenant",
            "2",
            "--to",
            "name:before",
            "--mode",
            "schema",
            "--target",
            "pg_then",
            "--confirm",
        ]);
        assert_eq!(code, 2);

        // A type that changed since, and a choice of tables; a name by itself.
        cluster.script("shop", "ALTER TYPE mood RENAME VALUE 'ok' TO 'fine'");
        let done = restore(&agent, "3", "name:before", "schema", &["--table", "customer"]);
        let name = done["schema"].as_str().expect("a name").to_owned();
        assert_eq!(sql(&format!("SELECT count(*) FROM {name}.customer WHERE m = 'ok'")), "20");
        assert!(
            done["warnings"][0].as_str().is_some_and(|w| w.contains("column m of public.customer is text here")),
            "{done}"
        );
        assert_eq!(
            sql(&format!(
                "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relnamespace = '{name}'::regnamespace"
            )),
            "1"
        );
    });
}

/// One table's entry of a document.
fn table<'a>(doc: &'a Value, relation: &str) -> &'a Value {
    let tables = doc["tables"].as_array().expect("tables");
    tables.iter().find(|t| t["relation"] == relation).unwrap_or_else(|| panic!("{relation} is not in {doc}"))
}

/// inserted, updated, deleted, unchanged.
fn counts(doc: &Value, relation: &str) -> [u64; 4] {
    ["inserted", "updated", "deleted", "unchanged"].map(|c| table(doc, relation)[c].as_u64().expect("a count"))
}

fn what_changed_since(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        cluster.psql("shop", "SELECT coffer.restore_point('before')");
        let same = agent.json(&["diff", "--tenant", "2", "--to", "name:before", "--wait", "120s"]);
        assert_eq!(counts(&same, "public.customer"), [0, 0, 0, 20], "{same}");
        assert_eq!(counts(&same, "public.never"), [0, 0, 0, 0], "{same}");
        cluster.script(
            "shop",
            "UPDATE customer SET name = name || '!', m = NULL WHERE id = 7;
             DELETE FROM note WHERE v = 'n1' AND tenant = 2;
             INSERT INTO trail VALUES (2, 500, 'added'), (3, 501, 'added');
             UPDATE line SET what = 'x' WHERE bill IN (SELECT id FROM bill WHERE tenant = 2 AND customer < 4);
             INSERT INTO never VALUES (2, 1), (2, 2), (2, 3);",
        );
        // A writer that locks the tables against everything but readers does not hold it up, nor does it change a thing.
        let locker = cluster.connect("shop").await;
        locker
            .batch_execute("BEGIN; LOCK TABLE customer, bill, line, note, trail, never IN EXCLUSIVE MODE")
            .await
            .expect("locks");
        let before = cluster.psql("shop", "SELECT pg_current_xact_id()::text::int8 % 1000000000 > 0");
        assert_eq!(before, "t");
        let d = agent.json(&["diff", "--tenant", "2", "--to", "name:before", "--keys", "2", "--wait", "120s"]);
        locker.batch_execute("ROLLBACK").await.expect("rollback");
        assert_eq!(counts(&d, "public.customer"), [0, 1, 0, 19], "{d}");
        let row = &table(&d, "public.customer")["rows"][0];
        assert_eq!((row["op"].as_str(), row["key"]["id"].as_str()), (Some("updated"), Some("7")), "{d}");
        assert_eq!(row["columns"], serde_json::json!(["name", "m"]), "{d}");
        assert_eq!(counts(&d, "public.line"), [0, 3, 0, 17], "{d}");
        assert_eq!(table(&d, "public.line")["rows"].as_array().map(Vec::len), Some(2), "{d}");
        assert_eq!(table(&d, "public.line")["more"], 1, "{d}");
        // Rows of the class audit that came are inserted like others; a restore would let them stay.
        assert_eq!(counts(&d, "public.trail"), [1, 0, 0, 10], "{d}");
        assert_eq!(table(&d, "public.trail")["rows"][0]["op"], "inserted", "{d}");
        assert_eq!(counts(&d, "public.never"), [3, 0, 0, 0], "{d}");
        let gone = counts(&d, "public.note");
        assert!(gone[2] > 0 && gone[2] + gone[3] == 20 && gone[0] + gone[1] == 0, "{d}");
        assert_eq!(table(&d, "public.note")["rows"][0]["key"], serde_json::json!({"tenant": "2", "v": "n1"}), "{d}");

        // Of one row, of one table.
        let d =
            agent.json(&["diff", "--tenant", "2", "--to", "name:before", "--table", "customer", "--where-key", "7"]);
        assert_eq!(d["tables"].as_array().map(Vec::len), Some(1));
        assert_eq!(counts(&d, "public.customer"), [0, 1, 0, 0], "{d}");
        let text = agent.coffer(&["diff", "--tenant", "2", "--to", "name:before"]);
        let text = String::from_utf8_lossy(&text.stdout).into_owned();
        assert!(text.contains("    updated tenant=2 id=7: name, m\n"), "{text}");
        let (code, _) = agent.json_err(&["diff", "--tenant", "nobody", "--to", "name:before"]);
        assert_eq!(code, 3);
    });
}

fn single_rows(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        let sql = |s: &str| cluster.psql("shop", s);
        sql("SELECT coffer.restore_point('before')");
        cluster.script(
            "shop",
            "UPDATE customer SET name = 'gone wrong';
             DELETE FROM line WHERE id IN (25, 26); UPDATE line SET what = 'wrong' WHERE id = 27;
             ALTER TABLE customer DISABLE TRIGGER noisy; INSERT INTO customer VALUES (2, 100, 'new', 'sad');
             DELETE FROM bill WHERE id = 30;",
        );
        // Two of them come back, and a row that was not there goes; nothing else changes, of nobody.
        let others = "SELECT count(*) FROM customer WHERE name = 'gone wrong'";
        assert_eq!(sql(others), "60");
        let keys = [
            "--table",
            "customer",
            "--where-key",
            "3",
            "--where-key",
            "{\"id\": 4}",
            "--where-key",
            "{\"tenant\": 2, \"id\": 100}",
        ];
        let done = restore(&agent, "2", "name:before", "in-place", &keys);
        assert_eq!(counts(&done, "public.customer"), [0, 2, 1, 0], "{done}");
        assert_eq!(sql(others), "58");
        assert_eq!(
            sql(
                "SELECT string_agg(tenant || name, ' ' ORDER BY id) FROM customer WHERE id IN (3, 4) AND name LIKE 'c%'"
            ),
            "2c3 2c4"
        );
        // A path table, by its own key; the parent of one row is gone, so that row is refused and nothing changes.
        let done = restore(
            &agent,
            "2",
            "name:before",
            "in-place",
            &["--table", "line", "--where-key", "25", "--where-key", "27"],
        );
        assert_eq!(counts(&done, "public.line"), [1, 1, 0, 0], "{done}");
        let (code, error) = agent.json_err(&[
            "restore",
            "--tenant",
            "2",
            "--to",
            "name:before",
            "--mode",
            "in-place",
            "--confirm",
            "--table",
            "line",
            "--where-key",
            "30",
        ]);
        assert_eq!((code, error["error"]["code"].as_str()), (10, Some("conflict")), "{error}");
        assert!(
            error["error"]["message"].as_str().is_some_and(|m| m.contains("refer to rows that do not exist")),
            "{error}"
        );
        // Another tenant's key is nobody's here.
        let done = restore(&agent, "2", "name:before", "in-place", &["--table", "line", "--where-key", "1"]);
        assert_eq!(counts(&done, "public.line"), [0, 0, 0, 0], "{done}");

        // The same choice in the other modes.
        let some = ["--table", "bill", "--where-key", "30", "--where-key", "1"];
        let out = restored::Out::new();
        let mut more = vec!["--target", out.arg()];
        more.extend(some);
        let done = restore(&agent, "2", "name:before", "files", &more);
        assert_eq!(counts(&done, "public.bill")[0], 1, "{done}");
        assert!(done["warnings"][0].as_str().is_some_and(|w| w.starts_with("1 of 2 keys")), "{done}");
        let mut more = vec!["--target", "one_bill"];
        more.extend(some);
        restore(&agent, "2", "name:before", "schema", &more);
        assert_eq!(sql("SELECT string_agg(id::text, ',') FROM one_bill.bill"), "30");
        // Exports are files at the newest point.
        let out = restored::Out::new();
        let done =
            agent.json(&["export", "--tenant", "2", "--target", out.arg(), "--format", "csv", "--table", "trail"]);
        assert_eq!((counts(&done, "public.trail")[0], done["dry_run"].as_bool()), (10, Some(false)), "{done}");
        assert!(out.names().contains(&"public.trail.csv".to_owned()), "{:?}", out.names());

        let bad: [&[&str]; 5] = [
            &["--table", "note", "--where-key", "1"],
            &["--table", "customer", "--where-key", "one"],
            &["--table", "customer", "--where-key", "{\"name\": \"c1\"}"],
            &["--table", "customer", "--table", "bill", "--where-key", "1"],
            &["--where-key", "1"],
        ];
        for more in bad {
            let mut args = vec!["restore", "--tenant", "2", "--to", "name:before", "--mode", "in-place", "--confirm"];
            args.extend(more);
            assert_eq!(agent.json_err(&args).0, 2, "{more:?}");
        }
    });
}

fn undone(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        let sql = |s: &str| cluster.psql("shop", s);
        let state = || {
            ["customer", "bill", "note", "trail", "line"]
                .map(|t| sql(&format!("SELECT count(*) || md5(string_agg(t::text, ',' ORDER BY t::text)) FROM {t} t")))
        };
        sql("SELECT coffer.restore_point('before')");
        cluster.script(
            "shop",
            "UPDATE customer SET name = name || '?' WHERE tenant = 2; DELETE FROM note WHERE v = 'n1';
             INSERT INTO never VALUES (2, 7);",
        );
        let changed = state();
        let done = restore(&agent, "2", "name:before", "in-place", &[]);
        let id = done["undo"].as_str().expect("an undo id").to_owned();
        assert_ne!(state(), changed);
        assert_eq!(done["warnings"].as_array().map(Vec::len), Some(0), "{done}");
        // What came after it in other tables, and of others, stays.
        cluster.script(
            "shop",
            "INSERT INTO trail VALUES (2, 900, 'after'); UPDATE bill SET amount = 0 WHERE tenant = 2 AND id = 25;",
        );
        let after = state();
        let plan = agent.json(&["restore", "--undo", &id, "--wait", "120s"]);
        assert_eq!((plan["dry_run"].as_bool(), plan["tenant"].as_str()), (Some(true), Some("2")), "{plan}");
        assert_eq!(state(), after, "a plan changes nothing");
        let undone = agent.json(&["restore", "--undo", &id, "--wait", "120s", "--confirm"]);
        assert_eq!(counts(&undone, "public.customer"), [0, 20, 0, 0], "{undone}");
        let now = state();
        assert_eq!((&now[0], &now[2]), (&changed[0], &changed[2]));
        assert_eq!((&now[1], &now[3], &now[4]), (&after[1], &after[3], &after[4]));
        assert_eq!(sql("SELECT count(*) FROM never"), "1");
        // An undo is a restore, and can be undone.
        let again = undone["undo"].as_str().expect("an undo id").to_owned();
        agent.json(&["restore", "--undo", &again, "--wait", "120s", "--confirm"]);
        assert_eq!(state(), after);
        assert_eq!(sql("SELECT count(*) FROM never"), "0");

        let (code, _) = agent.json_err(&["restore", "--undo", "00000000-0000-4000-8000-000000000000", "--confirm"]);
        assert_eq!(code, 3);
        let (code, _) = agent.json_err(&["restore", "--undo", "1/2", "--confirm"]);
        assert_eq!(code, 2);
        // Of single rows: the same rows are to be named.
        let done = restore(&agent, "2", "name:before", "in-place", &["--table", "bill", "--where-key", "25"]);
        let id = done["undo"].as_str().expect("an undo id").to_owned();
        assert_eq!(agent.json_err(&["restore", "--undo", &id, "--wait", "120s", "--confirm"]).0, 10);
        let rows = ["restore", "--undo", &id, "--wait", "120s", "--confirm", "--table", "bill", "--where-key", "25"];
        assert_eq!(counts(&agent.json(&rows), "public.bill"), [0, 1, 0, 0]);
        assert_eq!(state(), after);
    });
}

/// The longest that a session of the restore was seen to hold, or to wait for, a lock above ROW EXCLUSIVE on a table of
/// the application; and how often it was looked.
async fn watch_locks(cluster: &Cluster, stop: Arc<AtomicBool>) -> (Duration, BTreeMap<String, Duration>, u64) {
    let db = cluster.connect("shop").await;
    let sql = "SELECT l.pid || ' ' || l.relation::regclass || ' ' || l.mode || CASE WHEN l.granted THEN '' ELSE ' awaited' END
        FROM pg_locks l JOIN pg_stat_activity a USING (pid) JOIN pg_class c ON c.oid = l.relation
        WHERE a.application_name = 'coffer restore' AND l.locktype = 'relation' AND c.relkind = 'r'
          AND c.relnamespace = 'public'::regnamespace
          AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')";
    let (mut since, mut longest, mut looks): (BTreeMap<String, Instant>, BTreeMap<String, Duration>, u64) =
        Default::default();
    while !stop.load(Ordering::Relaxed) {
        let before = Instant::now();
        let seen: Vec<String> = db.query(sql, &[]).await.expect("locks").iter().map(|r| r.get(0)).collect();
        since.retain(|lock, _| seen.contains(lock));
        for lock in seen {
            let first = *since.entry(lock.clone()).or_insert(before);
            let entry = longest.entry(lock.split_once(' ').map_or("", |l| l.1).to_owned()).or_default();
            *entry = (*entry).max(before - first);
        }
        looks += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (longest.values().max().copied().unwrap_or_default(), longest, looks)
}

fn in_place_keeps_its_promises(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        let cluster = Arc::new(cluster);
        cluster.script(
            "shop",
            "ALTER TABLE customer DISABLE TRIGGER noisy;
             INSERT INTO customer SELECT t, i, 'c' || i, 'ok' FROM generate_series(1, 3) t, generate_series(1000, 20000) i;
             INSERT INTO bill (tenant, customer, amount) SELECT t, i, i FROM generate_series(1, 3) t, generate_series(1000, 8000) i;
             SELECT coffer.restore_point('before');
             UPDATE customer SET name = name || '?' WHERE tenant = 2 AND id % 3 = 0;
             DELETE FROM bill WHERE tenant = 2 AND id % 4 = 0;
             INSERT INTO trail VALUES (2, 700, 'later'), (2, 701, 'later');",
        );
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = Vec::new();
        for n in 0..4 {
            let (cluster, stop) = (cluster.clone(), stop.clone());
            writers.push(tokio::spawn(async move {
                let db = cluster.connect("shop").await;
                let (mut done, mut longest) = (0u64, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let (tenant, id) = (if n % 2 == 0 { 1 } else { 3 }, 1000 + rand::random::<u32>() % 5000);
                    let begun = Instant::now();
                    let sql = format!(
                        "BEGIN; UPDATE customer SET name = 'w{n}' WHERE tenant = {tenant} AND id = {id};
                         UPDATE bill SET amount = 1 WHERE tenant = {tenant} AND customer = {id};
                         INSERT INTO note VALUES ({tenant}, 'load'); COMMIT"
                    );
                    db.batch_execute(&sql).await.expect("a writer of another tenant is not disturbed");
                    longest = longest.max(begun.elapsed());
                    done += 1;
                }
                (done, longest)
            }));
        }
        let watching = {
            let (cluster, stop) = (cluster.clone(), stop.clone());
            tokio::spawn(async move { watch_locks(&cluster, stop).await })
        };
        let done = restore(&agent, "2", "name:before", "in-place", &[]);
        stop.store(true, Ordering::Relaxed);
        let (longest, locks, looks) = watching.await.expect("the watcher");
        let mut slowest = Duration::ZERO;
        for w in writers {
            let (n, longest) = w.await.expect("a writer");
            assert!(n > 0, "a writer wrote nothing");
            slowest = slowest.max(longest);
        }
        println!(
            "PostgreSQL {major}: {looks} looks, longest {longest:?}, others' slowest transaction {slowest:?}: {locks:?}"
        );
        assert!(looks > 20, "the locks were looked at {looks} times only");
        assert!(longest <= Duration::from_millis(200), "a strong lock was seen for {longest:?}: {locks:#?}");
        assert!(counts(&done, "public.customer")[1] > 6000 && counts(&done, "public.bill")[0] > 1500, "{done}");
        // Rows of the class audit stay, and the restore says so.
        assert_eq!(counts(&done, "public.trail")[2], 0);
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM trail WHERE v = 'later'"), "2");
        let warned = done["warnings"]
            .as_array()
            .expect("warnings")
            .iter()
            .any(|w| w.as_str().is_some_and(|w| w.contains("class audit")));
        assert!(warned, "{done}");
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa%fence%'"), "0");
    });
}

fn as_another_tenant(major: u32) {
    block_on(async {
        let (cluster, agent) = protected(major);
        let sql = |s: &str| cluster.psql("shop", s);
        sql("SELECT coffer.restore_point('before')");
        let copy = restored::Database::named(&cluster, "copy");
        let url = cluster.url("postgres", &copy.name);
        let done = restore(&agent, "2", "name:before", "database", &["--target", &url, "--as", "200"]);
        assert_eq!((done["tenant"].as_str(), done["as"].as_str()), (Some("2"), Some("200")), "{done}");
        let there = |s: &str| cluster.psql(&copy.name, s);
        for (t, rows) in [("customer", 20), ("bill", 20), ("note", 20), ("trail", 10)] {
            assert_eq!(
                there(&format!("SELECT count(*) || ' ' || min(tenant) || ' ' || max(tenant) FROM {t}")),
                format!("{rows} 200 200")
            );
        }
        // What is behind a foreign key goes along, and the keys hold.
        assert_eq!(there("SELECT count(*) FROM line JOIN bill ON bill.id = line.bill WHERE tenant = 200"), "20");
        assert_eq!(there("SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND convalidated"), "2");

        // Beside the tenant itself, keys without the tenant collide: refused, nothing is changed.
        let place =
            ["restore", "--tenant", "2", "--to", "name:before", "--mode", "in-place", "--as", "200", "--confirm"];
        let (code, error) = agent.json_err(&place);
        assert_eq!((code, error["error"]["code"].as_str()), (10, Some("conflict")), "{error}");
        assert_eq!(sql("SELECT count(*) FROM customer WHERE tenant = 200"), "0");
        // Where the key has the tenant, or there is none, they do not.
        let some = ["--as", "200", "--table", "customer", "--table", "note"];
        let done = restore(&agent, "2", "name:before", "in-place", &some);
        assert_eq!((counts(&done, "public.customer")[0], counts(&done, "public.note")[0]), (20, 20), "{done}");
        assert_eq!(
            sql(
                "SELECT count(*) FROM customer a JOIN customer b ON a.id = b.id AND a.name = b.name WHERE a.tenant = 2 AND b.tenant = 200"
            ),
            "20"
        );
        assert_eq!(sql("SELECT count(*) FROM customer WHERE tenant = 2"), "20");
        // A key that somebody has is no key for a copy.
        let mut again = place.to_vec();
        again.extend(["--table", "customer"]);
        let (code, error) = agent.json_err(&again);
        assert_eq!((code, error["error"]["code"].as_str()), (10, Some("conflict")), "{error}");
        again[8] = "3";
        assert_eq!(agent.json_err(&again).0, 10);
        again[8] = "2";
        assert_eq!(agent.json_err(&again).0, 2);
        assert_eq!(sql("SELECT count(*) FROM customer WHERE tenant = 3"), "20");
    });
}

/// Tenants with orders, with what is behind their foreign keys, and with tables that stand alone.
const MORE: &str = "
CREATE TABLE orders (id int PRIMARY KEY, org int NOT NULL, UNIQUE (org, id));
CREATE TABLE items (id int PRIMARY KEY, order_id int NOT NULL REFERENCES orders, what text);
CREATE TABLE memos (org int NOT NULL, order_id int NOT NULL, body text, FOREIGN KEY (org, order_id) REFERENCES orders (org, id));
CREATE TABLE stock (org int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (org, id));
CREATE TABLE days (org int NOT NULL, day date NOT NULL, v text, PRIMARY KEY (org, day));
CREATE TABLE things (org int NOT NULL, id uuid NOT NULL, v text, PRIMARY KEY (org, id));
SELECT * FROM coffer.add_table('orders', 'org'); SELECT * FROM coffer.add_table('items', parent => 'orders');
SELECT * FROM coffer.add_table('memos', parent => 'orders'); SELECT * FROM coffer.add_table('stock', 'org');
SELECT * FROM coffer.add_table('days', 'org'); SELECT * FROM coffer.add_table('things', 'org');
INSERT INTO orders SELECT 100 * t + i, t FROM generate_series(2, 4) t, generate_series(1, 5) i;
INSERT INTO items SELECT id, id, 'item' FROM orders;
INSERT INTO memos SELECT org, id, 'memo' FROM orders, generate_series(1, 2);
INSERT INTO stock SELECT t, i, 'then' FROM generate_series(2, 4) t, generate_series(1, 5) i;
INSERT INTO days SELECT t, date '2024-01-05', 'then' FROM generate_series(2, 4) t;
INSERT INTO things SELECT t, '0a1b2c3d-0000-4000-8000-00000000000a', 'then' FROM generate_series(2, 4) t;
";

fn with_orders(major: u32) -> (Cluster, Agent) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script("shop", MORE);
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["2", "3", "4"]);
    cluster.psql("shop", "SELECT coffer.restore_point('before')");
    (cluster, agent)
}

/// A restore in place that is refused: exit code and code.
fn refused(agent: &Agent, tenant: &str, more: &[&str]) -> (i32, Value) {
    let mut args = vec!["restore", "--tenant", tenant, "--to", "name:before", "--mode", "in-place", "--wait", "120s"];
    args.extend(more);
    agent.json_err(&args)
}

fn conflicts(agent: &Agent, tenant: &str, more: &[&str]) -> Value {
    let (exit, said) = refused(agent, tenant, more);
    assert_eq!((exit, said["error"]["code"].as_str()), (10, Some("conflict")), "{more:?}: {said}");
    said
}

fn nobody_elses_rows(major: u32) {
    block_on(async {
        let (cluster, mut agent) = with_orders(major);
        let sql = |s: &str| cluster.psql("shop", s);
        // An order became another tenant's, and one of its items went: that would come back as the other's.
        sql("DELETE FROM memos WHERE order_id = 301");
        sql("DELETE FROM items WHERE id = 301; UPDATE orders SET org = 4 WHERE id = 301");
        let said = conflicts(&agent, "3", &["--table", "items", "--confirm"]);
        assert!(said.to_string().contains("would be another tenant's"), "{said}");
        assert_eq!(sql("SELECT count(*) FROM items WHERE id = 301"), "0");
        // The rows of a table behind a foreign key say the tenant, and a copy does not rewrite them.
        let memos = sql("SELECT org, count(*) FROM memos GROUP BY 1 ORDER BY 1");
        conflicts(&agent, "2", &["--as", "900", "--table", "memos", "--confirm"]);
        assert_eq!(sql("SELECT org, count(*) FROM memos GROUP BY 1 ORDER BY 1"), memos);

        // A key that somebody has is no key for a copy, whatever tables are chosen; nor one that somebody gets meanwhile.
        sql("INSERT INTO days VALUES (400, '2026-01-01', 'of 400')");
        for how in ["--dry-run", "--confirm"] {
            conflicts(&agent, "2", &["--as", "400", "--table", "things", how]);
        }
        agent.env = vec![("COFFER_FAILPOINTS".into(), "restore-after-fence=sleep(5000)".into())];
        std::thread::scope(|scope| {
            let agent = &agent;
            let copy = scope
                .spawn(move || conflicts(agent, "2", &["--as", "500", "--table", "things", "--confirm"]).to_string());
            coffer_tests::wait_for("the fence", 60, || {
                (sql("SELECT count(*) > 0 FROM pg_trigger WHERE tgname LIKE 'aaa%fence%'") == "t").then_some(())
            });
            sql("INSERT INTO days VALUES (500, '2026-01-01', 'of 500')");
            let said = copy.join().expect("the copy");
            assert!(said.contains("meanwhile"), "{said}");
        });
        agent.env.clear();
        assert_eq!(sql("SELECT count(*) FROM things WHERE org IN (400, 500)"), "0");
        let done = restore(&agent, "2", "name:before", "in-place", &["--as", "600", "--table", "things"]);
        assert_eq!(counts(&done, "public.things")[0], 1, "{done}");

        // A table that took another's name since is not the one that was backed up.
        cluster.script(
            "shop",
            "CREATE TABLE stock_new (LIKE stock INCLUDING ALL); SELECT * FROM coffer.add_table('stock_new', 'org');
             INSERT INTO stock_new SELECT t, i, 'now' FROM generate_series(2, 4) t, generate_series(4, 9) i;
             BEGIN; ALTER TABLE stock RENAME TO stock_old; ALTER TABLE stock_new RENAME TO stock; COMMIT;
             DELETE FROM stock_old WHERE id = 1;",
        );
        let done = restore(&agent, "2", "name:before", "in-place", &["--table", "stock"]);
        assert!(done["warnings"].to_string().contains("public.stock: not backed up at the target"), "{done}");
        let done = restore(&agent, "2", "name:before", "in-place", &["--table", "stock", "--table", "stock_old"]);
        assert_eq!(counts(&done, "public.stock_old"), [1, 0, 0, 4], "{done}");
        assert_eq!(sql("SELECT count(*) || min(v) FROM stock WHERE org = 2"), "6now");
    });
}

fn keys_as_they_are_written(major: u32) {
    let (cluster, agent) = with_orders(major);
    let sql = |s: &str| cluster.psql("shop", s);
    sql("UPDATE things SET v = 'now'; UPDATE days SET v = 'now'");
    let one = |table: &'static str, key: &'static str| ["--table", table, "--where-key", key, "--confirm"];
    for (table, key, written) in [
        ("things", "0a1b2c3d00004000800000000000000a", "0a1b2c3d-0000-4000-8000-00000000000a"),
        ("days", "2024-1-5", "2024-01-05"),
    ] {
        let (exit, said) = refused(&agent, "2", &one(table, key));
        assert!(exit == 2 && said["error"]["hint"].as_str().is_some_and(|h| h.ends_with(written)), "{exit} {said}");
        assert_eq!(sql(&format!("SELECT v FROM {table} WHERE org = 2")), "now");
    }
    for (table, key) in [("things", "0A1B2C3D-0000-4000-8000-00000000000A"), ("days", "2024-01-05")] {
        let done = restore(&agent, "2", "name:before", "in-place", &one(table, key)[..4]);
        assert_eq!(counts(&done, &format!("public.{table}")), [0, 1, 0, 0], "{done}");
        assert_eq!(sql(&format!("SELECT v FROM {table} WHERE org = 2")), "then");
    }
}

/// A table that cannot be taken back to before a restore is no reason to say that the restore was taken back.
fn undone_whole_or_named(major: u32) {
    let (cluster, mut agent) = with_orders(major);
    let sql = |s: &str| cluster.psql("shop", s);
    agent.json(&["diff", "--tenant", "2", "--to", "name:before", "--wait", "120s"]);
    assert_eq!(agent.stop(), Some(0));
    // Nobody takes a base of the new table before the restore.
    cluster.script(
        "shop",
        "UPDATE days SET v = 'now'; DROP TABLE things;
         CREATE TABLE things (org int NOT NULL, id uuid NOT NULL, v text, PRIMARY KEY (org, id));
         INSERT INTO things VALUES (2, '0a1b2c3d-0000-4000-8000-00000000000b', 'now');
         SELECT * FROM coffer.add_table('things', 'org');",
    );
    let done = restore(&agent, "2", "name:before", "in-place", &["--table", "days", "--table", "things"]);
    assert_eq!(counts(&done, "public.things"), [1, 0, 1, 0], "{done}");
    cluster.script(
        "shop",
        "CREATE TABLE fees (id int PRIMARY KEY); INSERT INTO fees VALUES (1); SELECT coffer.add_shared('fees');
         SELECT coffer.restore_point('fees');",
    );
    let id = done["undo"].as_str().expect("an undo id").to_owned();
    agent.start();
    let undo = ["restore", "--undo", &id, "--wait", "120s", "--confirm"];
    // The new table has no name in the log before its base.
    coffer_tests::wait_for("the table's name", 60, || {
        let (exit, said) = agent.json_err(&undo);
        let (message, hint) = (said["error"]["message"].to_string(), said["error"]["hint"].to_string());
        assert!(exit == 4 && hint.contains("--table takes others back: public.days"), "{exit} {said}");
        message.contains("before it: public.things").then_some(())
    });
    assert_eq!(sql("SELECT v FROM days WHERE org = 2"), "then");
    let some = [&undo[..], &["--table", "days"]].concat();
    assert_eq!(counts(&agent.json(&some), "public.days"), [0, 1, 0, 0]);
    assert_eq!(sql("SELECT v FROM days WHERE org = 2"), "now");

    // A shared table without a base at the target is not in a new database, and that is said.
    let copy = restored::Database::named(&cluster, "copy");
    let url = cluster.url("postgres", &copy.name);
    let done = restore(&agent, "2", "name:fees", "database", &["--target", &url, "--table", "days"]);
    assert!(done["warnings"].to_string().contains("public.fees: if it is shared"), "{done}");
}

/// A value that did not come along with a row is refused, or NULL and said so.
fn values_that_are_not_kept(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE papers (org int NOT NULL, id int NOT NULL, body text, PRIMARY KEY (org, id));
         ALTER TABLE papers ALTER body SET STORAGE EXTERNAL; SELECT * FROM coffer.add_table('papers', 'org');
         INSERT INTO papers VALUES (2, 1, repeat('x', 9000)), (3, 2, 'short');",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["2", "3"]);
    // As the value of a row that moves would be if it were too large.
    cluster.script(
        "shop",
        "BEGIN; SELECT coffer._ddl('ALTER TABLE public.papers DISABLE TRIGGER aaa_coffer_fill');
         UPDATE papers SET org = 3 WHERE id = 1;
         SELECT coffer._ddl('ALTER TABLE public.papers ENABLE ALWAYS TRIGGER aaa_coffer_fill'); COMMIT;
         SELECT coffer.restore_point('before'); UPDATE papers SET body = 'written since' WHERE id = 1;",
    );
    let (exit, said) = refused(&agent, "3", &["--confirm"]);
    assert_eq!(said["error"]["code"], "incomplete_row", "{exit} {said}");
    assert_eq!(cluster.psql("shop", "SELECT body FROM papers WHERE id = 1"), "written since");
    for how in ["--dry-run", "--confirm"] {
        let mut args = vec!["--json", "restore", "--tenant", "3", "--to", "name:before", "--mode", "in-place"];
        args.extend(["--allow-incomplete", how]);
        let out = agent.coffer(&args);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert_eq!(out.status.code(), Some(if how == "--confirm" { 9 } else { 0 }), "{said}");
        assert!(said.contains("1 rows came from another tenant with values that are not in this backup"), "{said}");
    }
    assert_eq!(cluster.psql("shop", "SELECT body IS NULL FROM papers WHERE id = 1"), "t");
}
