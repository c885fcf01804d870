//! What a restore in place refuses, or says, instead of doing what nobody asked for: rows of others, keys in another
//! spelling, tables that cannot be taken back, values that are not kept.

use crate::restores::{counts, restore};
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use serde_json::Value;

on_majors! {
    nobody_elses_rows: nobody_elses_rows;
    keys_as_they_are_written: keys_as_they_are_written;
    undone_whole_or_named: undone_whole_or_named;
    values_that_are_not_kept: values_that_are_not_kept;
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
