//! The ways to restore beyond files and databases: side by side in a schema, and what is compared with it.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use serde_json::Value;

on_majors! {
    side_by_side: side_by_side;
    what_changed_since: what_changed_since;
    single_rows: single_rows;
    undone: undone;
    as_another_tenant: as_another_tenant;
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
pub fn protected(major: u32) -> (Cluster, Agent) {
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
pub fn restore(agent: &Agent, tenant: &str, to: &str, mode: &str, more: &[&str]) -> Value {
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

        // A column that another was generated from has another name by now.
        cluster.script("shop", "ALTER TABLE customer RENAME name TO called");
        let done = restore(&agent, "3", "name:before", "schema", &["--table", "customer", "--target", "renamed"]);
        assert_eq!(sql("SELECT count(name) FROM renamed.customer"), "20");
        assert!(
            done["warnings"].to_string().contains("the generated columns of public.customer are left out"),
            "{done}"
        );
    });
}

/// One table's entry of a document.
fn table<'a>(doc: &'a Value, relation: &str) -> &'a Value {
    let tables = doc["tables"].as_array().expect("tables");
    tables.iter().find(|t| t["relation"] == relation).unwrap_or_else(|| panic!("{relation} is not in {doc}"))
}

/// inserted, updated, deleted, unchanged.
pub fn counts(doc: &Value, relation: &str) -> [u64; 4] {
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
        let one = restored::Database::named(&cluster, "one_bill");
        let url = cluster.url("postgres", &one.name);
        let mut more = vec!["--target", url.as_str()];
        more.extend(some);
        restore(&agent, "2", "name:before", "database", &more);
        assert_eq!(cluster.psql(&one.name, "SELECT string_agg(id::text, ',') FROM bill"), "30");
        // By class.
        let audit = ["--class", "audit"];
        let done = restore(&agent, "2", "name:before", "schema", &["--target", "audit_only", "--class", "audit"]);
        assert_eq!(
            (done["tables"].as_array().map(Vec::len), counts(&done, "public.trail")[0]),
            (Some(1), 10),
            "{done}"
        );
        assert_eq!(sql("SELECT count(*) FROM audit_only.trail"), "10");
        let d = agent.json(&[&["diff", "--tenant", "2", "--to", "name:before"][..], &audit].concat());
        assert_eq!((d["tables"].as_array().map(Vec::len), counts(&d, "public.trail")), (Some(1), [0, 0, 0, 10]), "{d}");
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

        // The same beside the live rows and in files.
        let done = restore(&agent, "2", "name:before", "schema", &["--target", "as_200", "--as", "200"]);
        assert_eq!((done["tenant"].as_str(), done["as"].as_str()), (Some("2"), Some("200")), "{done}");
        for (t, rows) in [("customer", 20), ("bill", 20), ("note", 20), ("trail", 10)] {
            assert_eq!(
                sql(&format!("SELECT count(*) || ' ' || min(tenant) || ' ' || max(tenant) FROM as_200.{t}")),
                format!("{rows} 200 200")
            );
        }
        let out = restored::Out::new();
        let done =
            restore(&agent, "2", "name:before", "files", &["--target", out.arg(), "--format", "jsonl", "--as", "200"]);
        assert_eq!((counts(&done, "public.customer")[0], done["as"].as_str()), (20, Some("200")), "{done}");
        let text = std::fs::read_to_string(out.dir.join("public.customer.jsonl")).expect("a file");
        let tenants: Vec<Value> =
            text.lines().map(|l| serde_json::from_str::<Value>(l).expect("JSON")["tenant"].clone()).collect();
        assert!(tenants.len() == 20 && tenants.iter().all(|t| t == 200), "{text}");
        assert_eq!(out.manifest()["tenant"], "200", "{}", out.manifest());

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
