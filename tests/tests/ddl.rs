//! Definitions that change while nobody writes: a tenant's rows come back under the names and columns of the target.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::generate::catalogs;
use coffer_tests::restored::{self, Database};

on_majors! {
    changes_without_rows: changes_without_rows;
    tables_added_by_hand: tables_added_by_hand;
    tables_that_leave_the_log: tables_that_leave_the_log;
    partitions_of_another_name: partitions_of_another_name;
    labels_in_a_tenants_schema: labels_in_a_tenants_schema;
    definitions_of_another_moment: definitions_of_another_moment;
    locks_that_are_not_free: locks_that_are_not_free;
    partitions_that_come_and_go: partitions_that_come_and_go;
    restarted_sequences_and_views: restarted_sequences_and_views;
    types_of_another_shape: types_of_another_shape;
    values_in_other_words: values_in_other_words;
    prepared_and_undone: prepared_and_undone;
    names_that_come_again: names_that_come_again;
    parts_of_tables: parts_of_tables;
}

fn changes_without_rows(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE t (tenant int NOT NULL, id int, v text, PRIMARY KEY (tenant, id));
             CREATE TABLE d (id int PRIMARY KEY, tenant int NOT NULL, v text);
             CREATE TABLE parts (tenant int NOT NULL, id int, v text, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (id);
             CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
             CREATE TABLE parts_2 (v text, id int NOT NULL, tenant int NOT NULL);
             ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (10) TO (20);
             SELECT coffer.discover('tenant', true);
             INSERT INTO t SELECT t, i, 'x' FROM generate_series(1, 2) t, generate_series(1, 3) i;
             INSERT INTO d SELECT i, 1 + i % 2, 'y' FROM generate_series(1, 6) i;
             INSERT INTO parts SELECT t, i * 7, 'p' FROM generate_series(1, 2) t, generate_series(1, 2) i;",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        cluster.psql("shop", "SELECT coffer.restore_point('before')");
        cluster.script(
            "shop",
            "ALTER TABLE t RENAME TO renamed; ALTER TABLE renamed RENAME v TO w;
             ALTER TABLE d ADD COLUMN n int NOT NULL DEFAULT 7; VACUUM FULL d; ALTER TABLE d ADD COLUMN o text;
             ALTER TABLE parts ADD COLUMN q text DEFAULT 'q';",
        );
        cluster.psql("shop", "SELECT coffer.restore_point('after')");
        // Rows of the one tenant only, then a move back and forth.
        cluster.script(
            "shop",
            "UPDATE renamed SET w = 'later' WHERE tenant = 2; UPDATE d SET n = 8, o = 'o' WHERE tenant = 2;",
        );
        let rows = |db: &str, sql: &str| {
            cluster.psql(db, &format!("SELECT string_agg(x::text, ' ' ORDER BY x) FROM ({sql}) x"))
        };
        for tenant in ["1", "2"] {
            let before = Database::restore(&agent, &cluster, tenant, "name:before");
            assert_eq!(rows(&before.name, "SELECT id, v FROM t"), "(1,x) (2,x) (3,x)");
            assert_eq!(cluster.psql(&before.name, "SELECT count(*) FROM d WHERE v = 'y'"), "3");
            let after = Database::restore(&agent, &cluster, tenant, "name:after");
            assert_eq!(rows(&after.name, "SELECT id, w FROM renamed"), "(1,x) (2,x) (3,x)", "tenant {tenant}");
            assert_eq!(cluster.psql(&after.name, "SELECT to_regclass('t') IS NULL"), "t");
            assert_eq!(
                cluster.psql(&after.name, "SELECT string_agg(DISTINCT concat(n, o), ' ') FROM d"),
                "7",
                "tenant {tenant}"
            );
            assert_eq!(
                cluster.psql(&after.name, "SELECT string_agg(DISTINCT q, ' ') || count(*) FROM parts"),
                "q2",
                "tenant {tenant}"
            );
        }
        // In place to before anybody wrote under the new columns: those of the target are the target's.
        agent.json(&restored::in_place("2", "name:after"));
        assert_eq!(rows("shop", "SELECT DISTINCT w FROM renamed"), "(x)");
        assert_eq!(rows("shop", "SELECT DISTINCT n, o FROM d"), "(7,)");
    });
}

/// Tables that are made and then covered by hand come back with everything that defines them, without any base.
fn tables_added_by_hand(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant int NOT NULL, id int, PRIMARY KEY (tenant, id));
         SELECT coffer.discover('tenant', true); INSERT INTO t VALUES (1, 1);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1"]);
    cluster.script(
        "shop",
        "CREATE TABLE rates (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED);
         SELECT coffer.add_shared('rates'); INSERT INTO rates VALUES (3);
         CREATE TABLE claims (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED);
         SELECT coffer.add_table('claims'); SET coffer.tenant = '1'; INSERT INTO claims VALUES (4);
         SELECT coffer.restore_point('now');",
    );
    let made = Database::restore(&agent, &cluster, "1", "name:now");
    for (table, row) in [("rates", "(3,6)"), ("claims", "(4,8)")] {
        assert_eq!(cluster.psql(&made.name, &format!("SELECT t FROM {table} t")), row);
        let keys = format!("SELECT count(*) FROM pg_index WHERE indrelid = '{table}'::regclass AND indisprimary");
        assert_eq!(cluster.psql(&made.name, &keys), "1", "{table}");
    }
}

/// A table that becomes unlogged, with rows in the same transaction, holds nobody's window; it is covered again when it
/// comes back.
fn tables_that_leave_the_log(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant int NOT NULL, id int, PRIMARY KEY (tenant, id));
         CREATE TABLE d (tenant int NOT NULL, id int PRIMARY KEY);
         SELECT coffer.discover('tenant', true); INSERT INTO t VALUES (1, 1); INSERT INTO d VALUES (1, 1);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1"]);
    cluster.script(
        "shop",
        "BEGIN; INSERT INTO d VALUES (1, 2); ALTER TABLE d REPLICA IDENTITY FULL; ALTER TABLE d SET UNLOGGED; INSERT INTO d VALUES (1, 3); COMMIT;
         INSERT INTO t VALUES (1, 2); INSERT INTO d VALUES (1, 4); SELECT coffer.restore_point('without');",
    );
    let coverage = "SELECT covered::text || ' ' || reason FROM coffer.coverage WHERE relation = 'd'::regclass";
    assert_eq!(cluster.psql("shop", coverage), "false unlogged: its changes are not in the log");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let made = Database::restore(&agent, &cluster, "1", "name:without");
    assert_eq!(cluster.psql(&made.name, "SELECT string_agg(id::text, ' ' ORDER BY id) FROM t"), "1 2");
    cluster.script("shop", "ALTER TABLE d SET LOGGED; INSERT INTO d VALUES (1, 5);");
    let based = || (agent.log().matches("bases are recorded").count() == 2).then_some(());
    coffer_tests::wait_for("the base of the table that came back", 60, based);
    cluster.psql("shop", "SELECT coffer.restore_point('with')");
    let made = Database::restore(&agent, &cluster, "1", "name:with");
    assert_eq!(cluster.psql(&made.name, "SELECT string_agg(id::text, ' ' ORDER BY id) FROM d"), "1 2 3 4 5");

    // When all have left it, the window still stands, and there is nothing of the tenant then.
    cluster
        .script("shop", "ALTER TABLE d SET UNLOGGED; ALTER TABLE t SET UNLOGGED; SELECT coffer.restore_point('none');");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let made = Database::restore(&agent, &cluster, "1", "name:none");
    assert_eq!(cluster.psql(&made.name, "SELECT count(*) FROM t, d"), "0");
    let out = restored::Out::new();
    let said = agent.json(&restored::args("1", "name:none", "files", out.arg()));
    assert!(said["warnings"][0].as_str().is_some_and(|w| w.contains("no table of tenant 1 is covered")), "{said}");
    assert_eq!(out.manifest()["tables"], serde_json::json!([]));
    let (exit, said) = agent.json_err(&[&restored::in_place("1", "name:none")[..], &["--table", "t"]].concat());
    assert_eq!(exit, 3, "{said}");
    // In place there is nothing to bring back, and no table to bring it to.
    let (exit, said) = agent.json_err(&restored::in_place("1", "name:none"));
    assert_eq!(exit, 3, "{said}");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM d"), "5", "what is not covered was changed");
    // Nothing that is empty becomes a backup.
    let fulls = || restored::listed(&agent, "1")["backups"].as_array().expect("backups").len();
    let before = fulls();
    agent.json(&["compact"]);
    assert_eq!(fulls(), before);
    Database::restore(&agent, &cluster, "1", "name:with");
}

/// A partition that is detached after its tenant column was renamed stays covered.
fn partitions_of_another_name(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant int NOT NULL, id int, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (id);
         CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (0) TO (10);
         SELECT coffer.discover('tenant', true);
         ALTER TABLE t RENAME tenant TO owner; ALTER TABLE t DETACH PARTITION t_1;",
    );
    let coverage =
        "SELECT string_agg(concat(relation, covered, tenant_column), ' ' ORDER BY relation::text) FROM coffer.coverage";
    assert_eq!(cluster.psql("shop", coverage), "ttowner t_1towner");

    // Partitioned partitions go and come back, with triggers of their own meanwhile: of the strategies and of a parent.
    cluster.script(
        "shop",
        "CREATE TABLE u (id int, sub int, tenant int NOT NULL, v text, PRIMARY KEY (id, sub)) PARTITION BY RANGE (id);
         CREATE TABLE u_1 PARTITION OF u FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (sub);
         CREATE TABLE u_11 PARTITION OF u_1 DEFAULT; CREATE TABLE u_2 PARTITION OF u DEFAULT;
         CREATE TABLE w (tenant int, id int, sub int, v text, PRIMARY KEY (tenant, id, sub)) PARTITION BY RANGE (id);
         CREATE TABLE w_1 PARTITION OF w FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (sub);
         CREATE TABLE w_11 PARTITION OF w_1 DEFAULT;
         CREATE TABLE below (id int PRIMARY KEY, u int, sub int, FOREIGN KEY (u, sub) REFERENCES u);
         SELECT coffer.discover('tenant', true);
         ALTER TABLE u DETACH PARTITION u_1; ALTER TABLE w DETACH PARTITION w_1;
         CREATE TABLE below_1 (id int PRIMARY KEY, u int, sub int, FOREIGN KEY (u, sub) REFERENCES u_1);",
    );
    let triggers =
        "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal AND tgname ~* 'coffer' AND tgrelid = 'u_11'::regclass";
    assert_ne!(cluster.psql("shop", triggers), "0");
    // What is below a partition that went is that one's now.
    let detached = "SELECT count(*) FROM coffer._findings('u_1'::regclass) UNION ALL SELECT count(*) FROM coffer._findings('w_1'::regclass)
        UNION ALL SELECT count(*) FROM coffer.rule_relations m WHERE m.relid = 'u_11'::regclass AND m.root = 'u_1'::regclass";
    assert_eq!(cluster.psql("shop", detached), "0\n0\n1");
    cluster.script(
        "shop",
        "DROP TABLE below_1; ALTER TABLE u ATTACH PARTITION u_1 FOR VALUES FROM (0) TO (10);
         ALTER TABLE w ATTACH PARTITION w_1 FOR VALUES FROM (0) TO (10);",
    );
    assert_eq!(cluster.psql("shop", coverage), "belowt ttowner t_1towner uttenant wttenant");
    let not_intact = "SELECT count(*) FROM coffer._findings('u'::regclass) UNION ALL SELECT count(*) FROM coffer._findings('w'::regclass)";
    assert_eq!(cluster.psql("shop", not_intact), "0\n0");
}

/// A label of an enum that gets another name has it in the tables of a tenant's schema, too.
fn labels_in_a_tenants_schema(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE SCHEMA one;
         CREATE TABLE one.t (id int PRIMARY KEY, m mood); SELECT coffer.add_schema('one', '1');
         INSERT INTO one.t VALUES (1, 'sad'), (2, 'glad');",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1"]);
    let based = agent.log().matches("bases are recorded").count();
    cluster.script("shop", "ALTER TYPE mood RENAME VALUE 'sad' TO 'blue';");
    let again = || (agent.log().matches("bases are recorded").count() > based).then_some(());
    coffer_tests::wait_for("a new base", 60, again);
    cluster.psql("shop", "SELECT coffer.restore_point('renamed')");
    let made = Database::restore(&agent, &cluster, "1", "name:renamed");
    assert_eq!(cluster.psql(&made.name, "SELECT string_agg(m::text, ' ' ORDER BY id) FROM one.t"), "blue glad");
}

/// A partition that is detached between a base and the reading of its definitions: no restore takes those for what they
/// were at the base.
fn definitions_of_another_moment(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant int NOT NULL, id int, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (id);
         CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (0) TO (10);
         CREATE TABLE t_2 PARTITION OF t FOR VALUES FROM (10) TO (20);
         INSERT INTO t SELECT 1, i FROM generate_series(8, 11) i;
         SELECT coffer.discover('tenant', true);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.env = vec![("COFFER_FAILPOINTS".into(), "base-after-marker@1=sleep(5000)".into())];
    agent.start();
    coffer_tests::wait_for("the base's marker", 60, || agent.log().contains("base-after-marker").then_some(()));
    cluster.psql("shop", "SELECT coffer.restore_point('whole')");
    cluster.psql("shop", "ALTER TABLE t DETACH PARTITION t_1 CONCURRENTLY");
    restored::wait_windows(&mut agent, &["1"]);
    let based = || (agent.log().matches("bases are recorded").count() == 2).then_some(());
    coffer_tests::wait_for("the base of the table that was a partition", 60, based);
    cluster.psql("shop", "SELECT coffer.restore_point('in two')");
    let made = Database::named(&cluster, "restored_whole");
    let target = cluster.url("postgres", "restored_whole");
    let args =
        ["restore", "--tenant", "1", "--to", "name:whole", "--mode", "database", "--target", &target, "--confirm"];
    // Their definitions as they were then nobody has read.
    let (code, doc) = agent.json_err(&args);
    assert!(code == 10 && matches!(doc["error"]["code"].as_str(), Some("definitions_unknown" | "no_schema")), "{doc}");
    drop(made);
    let count = "SELECT concat((SELECT count(*) FROM t), (SELECT count(*) FROM t_1))";
    let made = Database::restore(&agent, &cluster, "1", "name:in two");
    assert_eq!(cluster.psql(&made.name, count), "22");
}

/// DDL beside a reader: what the extension repairs after it needs no lock that the reader refuses, or the DDL fails like
/// any that a lock is not free for. It never stands without its repair.
fn locks_that_are_not_free(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE t (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id)) PARTITION BY LIST (tenant);
             CREATE TABLE t_1 PARTITION OF t FOR VALUES IN (1);
             CREATE TABLE t_2 (v text, id int NOT NULL, tenant int NOT NULL, PRIMARY KEY (tenant, id));
             CREATE TABLE tagged (id int PRIMARY KEY, tenant int NOT NULL);
             SELECT coffer.discover('tenant', true);
             INSERT INTO t VALUES (1, 1, 'a'); INSERT INTO t_2 VALUES ('b', 1, 2), ('c', 2, 2);",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        let rules = || {
            cluster.psql(
                "shop",
                "SELECT string_agg(relid::regclass::text, ' ' ORDER BY relid::regclass::text) FROM coffer.rules",
            )
        };
        assert_eq!(rules(), "t t_2 tagged");

        let based = agent.log().matches("bases are recorded").count();
        // Reads of a partitioned table lock it first and its partitions then; ATTACH lets them.
        let reader = cluster.connect("shop").await;
        reader.batch_execute("BEGIN; LOCK TABLE ONLY t, tagged IN ACCESS SHARE MODE").await.expect("a lock");
        let attach = "ALTER TABLE t ATTACH PARTITION t_2 FOR VALUES IN (2)";
        cluster.psql("shop", &format!("SET lock_timeout = '500ms'; {attach}"));
        assert_eq!(rules(), "t tagged");
        let said = cluster
            .psql_err("shop", "SET lock_timeout = '500ms'; ALTER TABLE tagged DISABLE TRIGGER zzz_coffer_tag_delete");
        assert!(said.contains("lock timeout"), "{said}");
        let enabled = "SELECT bool_and(tgenabled = 'A') FROM pg_trigger WHERE tgrelid = 'tagged'::regclass";
        assert_eq!(cluster.psql("shop", enabled), "t");
        reader.batch_execute("COMMIT").await.expect("ok");

        let again = || (agent.log().matches("bases are recorded").count() > based).then_some(());
        coffer_tests::wait_for("a new base", 60, again);
        cluster.psql("shop", "SELECT coffer.restore_point('attached')");
        let db = Database::restore(&agent, &cluster, "2", "name:attached");
        assert_eq!(cluster.psql(&db.name, "SELECT string_agg(id || v, ' ' ORDER BY id) FROM t"), "1b 2c");

        // Nor does ATTACH wait for who is at the table that was the partition's way to its tenants.
        cluster.script(
            "shop",
            "CREATE TABLE orgs (org int PRIMARY KEY, tenant int NOT NULL); CREATE TABLE t_3 (LIKE t INCLUDING ALL, FOREIGN KEY (id) REFERENCES orgs);
             SELECT coffer.remove_table('t_3'); SELECT coffer.add_table('t_3', parent => 'orgs');",
        );
        assert_eq!(rules(), "orgs t t_3 tagged");
        reader.batch_execute("BEGIN; LOCK TABLE orgs IN ACCESS SHARE MODE").await.expect("a lock");
        let attach = "ALTER TABLE t ATTACH PARTITION t_3 FOR VALUES IN (3)";
        // A lock timeout would be caught where the lock is asked for.
        cluster.psql("shop", &format!("SET statement_timeout = '5s'; {attach}"));
        assert_eq!(rules(), "orgs t tagged");
        reader.batch_execute("COMMIT").await.expect("ok");
    });
}

/// What a database says of a partitioned table's rows, by their ids.
fn ids(cluster: &Cluster, db: &str, table: &str) -> String {
    cluster.psql(db, &format!("SELECT string_agg(id::text, ' ' ORDER BY id) FROM {table} WHERE tenant = 1"))
}

/// A partition that is dropped takes its rows along, for a restore to later; one that is made while everything runs keeps
/// what it gets. Neither asks for a base, whatever names the rows: the key, a tag, the whole row.
fn partitions_that_come_and_go(major: u32) {
    const TABLES: [(&str, &str); 3] =
        [("t", "PRIMARY KEY (tenant, id)"), ("d", "PRIMARY KEY (id)"), ("w", "CHECK (true)")];
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    for (t, key) in TABLES {
        cluster.script(
            "shop",
            &format!(
                "CREATE TABLE {t} (tenant int NOT NULL, id int NOT NULL, v text, {key}) PARTITION BY RANGE (id);
                 CREATE TABLE {t}_1 PARTITION OF {t} FOR VALUES FROM (0) TO (10);
                 CREATE TABLE {t}_2 PARTITION OF {t} FOR VALUES FROM (10) TO (20);
                 INSERT INTO {t} SELECT 1 + i % 2, i, 'base' FROM generate_series(1, 18) i;"
            ),
        );
    }
    cluster.psql("shop", "SELECT coffer.discover('tenant', true)");
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    for (t, _) in TABLES {
        cluster
            .script("shop", &format!("UPDATE {t} SET v = 'later' WHERE id IN (2, 12); DELETE FROM {t} WHERE id = 4;"));
    }
    cluster.psql("shop", "SELECT coffer.restore_point('whole')");
    for (t, _) in TABLES {
        cluster.script("shop", &format!("BEGIN; INSERT INTO {t} VALUES (1, 0, 'last'); DROP TABLE {t}_1; COMMIT;"));
    }
    cluster.psql("shop", "SELECT coffer.restore_point('dropped')");
    // Of the definitions only, before they change again.
    let read = || (agent.log().matches("base record written").count() > 1).then_some(());
    coffer_tests::wait_for("the definitions at that point", 60, read);
    for (t, _) in TABLES {
        cluster.script(
            "shop",
            &format!(
                "CREATE TABLE {t}_3 PARTITION OF {t} FOR VALUES FROM (20) TO (30);
                 CREATE TABLE {t}_1 PARTITION OF {t} FOR VALUES FROM (0) TO (10);
                 INSERT INTO {t} VALUES (1, 6, 'anew'), (1, 20, 'new'), (1, 22, 'new'), (2, 23, 'new'); UPDATE {t} SET id = 24 WHERE id = 22;
                 UPDATE {t} SET id = 9 WHERE id = 10;"
            ),
        );
    }
    cluster.psql("shop", "SELECT coffer.restore_point('made')");
    assert_eq!(agent.log().matches("bases are recorded").count(), 1, "no table needed another base");
    let check = |db: &str, of: &str, want: &str| {
        for (t, _) in TABLES {
            assert_eq!(ids(&cluster, db, t), want, "{t} at {of}");
        }
    };
    let points = [("whole", "2 6 8 10 12 14 16 18"), ("dropped", "10 12 14 16 18"), ("made", "6 9 12 14 16 18 20 24")];
    // From the base and the stream, then from incrementals and fulls.
    for compacted in [false, true] {
        for (point, want) in points {
            let made = Database::restore(&agent, &cluster, "1", &format!("name:{point}"));
            check(&made.name, point, want);
            let leaves = "SELECT count(*) FROM pg_inherits WHERE inhparent = 't'::regclass";
            assert_eq!(
                cluster.psql(&made.name, leaves),
                if point == "dropped" {
                    "1"
                } else if point == "made" {
                    "3"
                } else {
                    "2"
                }
            );
        }
        if !compacted {
            agent.json(&["compact", "--incremental"]);
            agent.json(&["compact"]);
            for (t, _) in TABLES {
                cluster.script("shop", &format!("UPDATE {t} SET v = 'after' WHERE id IN (6, 20)"));
            }
            cluster.psql("shop", "SELECT coffer.restore_point('after')");
            let made = Database::restore(&agent, &cluster, "1", "name:after");
            check(&made.name, "after", points[2].1);
        }
    }
    // In place to when the partition was gone; its rows are those of the one that took its place.
    agent.json(&restored::in_place("1", "name:dropped"));
    check("shop", "dropped, in place", points[1].1);
    agent.json(&restored::in_place("1", "name:whole"));
    check("shop", "whole, in place", points[0].1);
    let others = "SELECT count(*) FROM t WHERE tenant = 2";
    assert_eq!(cluster.psql("shop", others), "5", "the other tenant's rows are as they were");
}

/// TRUNCATE … RESTART IDENTITY: the sequence of a point is the one of that point. A materialized view is left out, and
/// said to be; a new database fills it.
fn restarted_sequences_and_views(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant int NOT NULL, id int GENERATED ALWAYS AS IDENTITY, v text, PRIMARY KEY (tenant, id));
         CREATE TABLE s (id serial PRIMARY KEY, tenant int NOT NULL);
         CREATE MATERIALIZED VIEW totals AS SELECT tenant, count(*) AS n FROM t GROUP BY tenant;
         SELECT coffer.discover('tenant', true);
         INSERT INTO t (tenant) SELECT 1 + i % 2 FROM generate_series(1, 6) i; INSERT INTO s (tenant) VALUES (1), (2), (1);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.script(
        "shop",
        "SELECT coffer.restore_point('before');
         BEGIN; TRUNCATE t, s RESTART IDENTITY; SELECT coffer.restore_point('restarted'); COMMIT;
         INSERT INTO t (tenant) VALUES (1), (1), (2); INSERT INTO s (tenant) VALUES (1);
         SELECT coffer.restore_point('later');",
    );
    let standing = "SELECT concat_ws(' ', (SELECT last_value FROM t_id_seq), (SELECT is_called FROM t_id_seq), \
                    (SELECT last_value FROM s_id_seq), (SELECT is_called FROM s_id_seq), (SELECT count(*) FROM t), (SELECT n FROM totals))";
    for (point, want) in [("before", "6 t 3 t 3 3"), ("restarted", "1 f 1 f 0"), ("later", "2 t 1 t 2 2")] {
        let made = Database::restore(&agent, &cluster, "1", &format!("name:{point}"));
        let standing = cluster.psql(&made.name, standing);
        // Another tenant's row may have had the last number.
        let standing = if point == "later" { standing.replacen("3 t", "2 t", 1) } else { standing };
        assert_eq!(standing, want, "at {point}");
    }
    let coverage = "SELECT concat_ws(' ', covered, strategy, left(reason, 36)) FROM coffer.coverage WHERE relation = 'totals'::regclass";
    assert_eq!(cluster.psql("shop", coverage), "f excluded a materialized view: left out, since");
    let status = agent.json(&["status"]);
    assert_eq!(status["sources"][0]["uncovered_tables"], serde_json::json!([]), "{status}");
}

/// Types that change: those that a table's old images are read with ask for a base, those that only allow more do not.
fn types_of_another_shape(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TYPE place AS (street text, town text);
         CREATE TABLE t (tenant int NOT NULL, id int, at place, PRIMARY KEY (tenant, id));
         CREATE TABLE d (tenant int NOT NULL, id int PRIMARY KEY, short varchar(10), code varchar(5), n numeric(6,2), stamp timestamp(0));
         SELECT coffer.discover('tenant', true);
         INSERT INTO t SELECT t, i, ROW('s' || i, 'x')::place FROM generate_series(1, 2) t, generate_series(1, 2) i;
         INSERT INTO d SELECT 1 + i % 2, i, 'short', 'c' || i, i, '2026-01-01' FROM generate_series(1, 4) i;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    let based = || agent.log().matches("bases are recorded").count();
    cluster.psql("shop", "SELECT coffer.restore_point('narrow')");
    // No row is written anew.
    cluster.script(
        "shop",
        "ALTER TABLE d ALTER short TYPE varchar(20); ALTER TABLE d ALTER code TYPE text;
         ALTER TABLE d ALTER n TYPE numeric(12,2); ALTER TABLE d ALTER stamp TYPE timestamp(6);
         INSERT INTO d VALUES (1, 10, 'no longer short', 'of any length', 123456789.25, '2026-01-01 00:00:00.123456');
         UPDATE d SET short = 'longer than before' WHERE id = 2; SELECT coffer.restore_point('wide');",
    );
    let rows =
        "SELECT string_agg(concat_ws(',', id, short, code, n, stamp), ' / ' ORDER BY id) FROM d WHERE tenant = 1";
    let types = "SELECT string_agg(format_type(atttypid, atttypmod), ' ' ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'd'::regclass AND attnum > 2";
    let (now, types_now) = (cluster.psql("shop", rows), cluster.psql("shop", types));
    let made = Database::restore(&agent, &cluster, "1", "name:wide");
    assert_eq!((cluster.psql(&made.name, rows), cluster.psql(&made.name, types)), (now.clone(), types_now));
    let made = Database::restore(&agent, &cluster, "1", "name:narrow");
    assert_eq!(cluster.psql(&made.name, "SELECT count(*) FROM d WHERE short = 'short'"), "2");
    assert!(cluster.psql(&made.name, types).starts_with("character varying(10) character varying(5) numeric(6,2)"));
    agent.json(&restored::in_place("1", "name:narrow"));
    agent.json(&restored::in_place("1", "name:wide"));
    assert_eq!(cluster.psql("shop", rows), now);
    assert_eq!(based(), 1, "no row was written anew");

    cluster.script(
        "shop",
        "ALTER TYPE place ADD ATTRIBUTE country text; UPDATE t SET at.country = 'late' WHERE tenant = 2;",
    );
    coffer_tests::wait_for("a new base", 60, || (based() > 1).then_some(()));
    cluster.script("shop", "UPDATE t SET at.country = 'de' WHERE id = 1; SELECT coffer.restore_point('three');");
    let places = "SELECT string_agg(at::text, ' ' ORDER BY id) FROM t WHERE tenant =";
    for (tenant, want) in [("1", "(s1,x,de) (s2,x,)"), ("2", "(s1,x,de) (s2,x,late)")] {
        let made = Database::restore(&agent, &cluster, tenant, "name:three");
        assert_eq!(cluster.psql(&made.name, &format!("{places} {tenant}")), want);
    }
    let made = Database::restore(&agent, &cluster, "1", "name:narrow");
    assert_eq!(cluster.psql(&made.name, &format!("{places} 1")), "(s1,x) (s2,x)");
    // Beside the live rows a type is what it is now: rows of another shape are kept as text.
    for (point, want) in [("narrow", "text (s1,x) (s2,x)"), ("three", "place (s1,x,de) (s2,x,)")] {
        agent.json(&[
            "restore",
            "--tenant",
            "1",
            "--to",
            &format!("name:{point}"),
            "--mode",
            "schema",
            "--target",
            point,
            "--confirm",
        ]);
        let copied = format!(
            "SELECT concat(pg_typeof((array_agg(at))[1]), ' ', string_agg(at::text, ' ' ORDER BY id)) FROM {point}.t"
        );
        assert_eq!(cluster.psql("shop", &copied), want, "{point}");
    }
    cluster.psql("shop", "UPDATE t SET at = NULL WHERE tenant = 1");
    agent.json(&restored::in_place("1", "name:three"));
    assert_eq!(cluster.psql("shop", &format!("{places} 1")), "(s1,x,de) (s2,x,)");
}

/// Columns whose values are written in other words from a change on that writes no row: each table gets a new base, and until
/// then its rows are in both words.
fn values_in_other_words(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE k (tenant int NOT NULL, at timestamp, v text, PRIMARY KEY (tenant, at));
         CREATE TABLE w (tenant int NOT NULL, at timestamp, net cidr);
         CREATE TABLE g (tenant int NOT NULL, id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED);
         CREATE SCHEMA acme; CREATE TABLE acme.k (at timestamp PRIMARY KEY, v text);
         SELECT coffer.discover('tenant', true); SELECT coffer.add_schema('acme', '1');
         INSERT INTO k SELECT 1, timestamp '2026-01-01' + i * interval '1 day', 'v' FROM generate_series(1, 4) i;
         INSERT INTO w SELECT 1, timestamp '2026-01-01' + i * interval '1 day', '10.0.0.1' FROM generate_series(1, 4) i;
         INSERT INTO g SELECT 1, i FROM generate_series(1, 4) i;
         INSERT INTO acme.k SELECT at, v FROM k;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1"]);
    let rows = "SELECT concat_ws(' | ', (SELECT string_agg(k::text, ' ' ORDER BY at) FROM k), (SELECT string_agg(w::text, ' ' ORDER BY at) FROM w),
                    (SELECT string_agg(g::text, ' ' ORDER BY id) FROM g), (SELECT string_agg(k::text, ' ' ORDER BY at) FROM acme.k k))";
    let point = |name: &str| {
        cluster.psql("shop", &format!("SELECT coffer.restore_point('{name}')"));
        cluster.psql("shop", rows)
    };
    let before = point("before");
    cluster.script(
        "shop",
        "SET timezone = 'UTC';
         ALTER TABLE k ALTER at TYPE timestamptz; ALTER TABLE w ALTER at TYPE timestamptz, ALTER net TYPE inet;
         ALTER TABLE g ALTER twice DROP EXPRESSION; ALTER TABLE acme.k ALTER at TYPE timestamptz;
         DELETE FROM k WHERE at < '2026-01-03'; DELETE FROM w WHERE at < '2026-01-03'; DELETE FROM acme.k WHERE at < '2026-01-03';
         UPDATE k SET v = 'later' WHERE at < '2026-01-04'; UPDATE g SET twice = 0 WHERE id = 1;",
    );
    // None of them is restored from the rows of before.
    let mut tries = 0;
    coffer_tests::wait_for("new bases", 90, || {
        tries += 1;
        point(&format!("try {tries}"));
        let out = restored::Out::new();
        let to = format!("name:try {tries}");
        agent.coffer(&restored::args("1", &to, "files", out.arg())).status.success().then_some(())
    });
    cluster.psql("shop", "DELETE FROM k WHERE v = 'later'; UPDATE g SET twice = 1 WHERE id = 2");
    let after = point("after");
    for (name, want) in [("before", before), ("after", after)] {
        let made = Database::restore(&agent, &cluster, "1", &format!("name:{name}"));
        assert_eq!(cluster.psql(&made.name, rows), want, "{name}");
    }
}

/// What belongs to covered tables and is no column: a new database has it as it was at the target, whichever statement
/// changed it, and however soon before.
fn parts_of_tables(major: u32) {
    const CHANGES: [&str; 7] = [
        // Rows come that were not allowed before.
        "ALTER DOMAIN short DROP CONSTRAINT is_short; INSERT INTO t VALUES (1, 10, 'longer than it could be')",
        "ALTER TABLE t RENAME CONSTRAINT small TO renamed",
        "DROP INDEX by_v",
        "CREATE POLICY mine ON t USING (id > 0)",
        "DROP POLICY theirs ON t",
        "DROP TRIGGER before_it ON one.t",
        "ALTER SEQUENCE t_n_seq INCREMENT 5",
    ];
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE DOMAIN short AS text CONSTRAINT is_short CHECK (length(VALUE) < 9);
             CREATE TABLE t (tenant int NOT NULL, id int, v short, n serial, CONSTRAINT small CHECK (id < 1000), PRIMARY KEY (tenant, id));
             CREATE INDEX by_v ON t (v); CREATE POLICY theirs ON t USING (true); ALTER TABLE t ENABLE ROW LEVEL SECURITY;
             CREATE FUNCTION pass() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
             CREATE SCHEMA one; CREATE TABLE one.t (id int PRIMARY KEY, v short);
             CREATE TRIGGER before_it BEFORE UPDATE ON one.t FOR EACH ROW EXECUTE FUNCTION pass();
             SELECT coffer.discover('tenant', true), coffer.add_schema('one', '1'); INSERT INTO t VALUES (1, 1, 'x'); INSERT INTO one.t VALUES (1, 'x');",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1"]);
        let based = agent.log().matches("bases are recorded").count();
        let tables = ["public.t".to_owned(), "one.t".to_owned()];
        let mut wrong = Vec::new();
        for (n, change) in CHANGES.iter().enumerate() {
            cluster.psql("shop", &format!("{change}; SELECT coffer.restore_point('{n}')"));
            let want = catalogs::definitions(&cluster.connect("shop").await, &tables).await.expect("the source's");
            let made = Database::restore(&agent, &cluster, "1", &format!("name:{n}"));
            let have = catalogs::definitions(&cluster.connect(&made.name).await, &tables).await.expect("the restored");
            wrong.extend(catalogs::differ(change, &have, &want));
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert_eq!(agent.log().matches("bases are recorded").count(), based, "no row means anything else than before");
    });
}

/// Two tables of two tenants, backed up.
fn two_tables(cluster: &Cluster) -> Agent {
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant int NOT NULL, id int, v text, PRIMARY KEY (tenant, id));
         CREATE TABLE d (id int PRIMARY KEY, tenant int NOT NULL, v text);
         SELECT coffer.discover('tenant', true);
         INSERT INTO t SELECT t, i, 'x' || i FROM generate_series(1, 2) t, generate_series(1, 3) i;
         INSERT INTO d SELECT i, 1 + i % 2, 'y' || i FROM generate_series(1, 6) i;",
    );
    let mut agent = Agent::new(&Setup::of(cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    agent
}

/// Tenant 1 as it is in both, whatever their columns.
const BOTH_TABLES: &str = "SELECT concat_ws(' | ', (SELECT string_agg(t::text, ' ' ORDER BY id) FROM t WHERE tenant = 1),
                                                   (SELECT string_agg(d::text, ' ' ORDER BY id) FROM d WHERE tenant = 1))";

/// Restores tenant 1 to each point, and compares.
fn compare_points(agent: &Agent, cluster: &Cluster, points: &[(&str, String)]) {
    for (name, want) in points {
        let made = Database::restore(agent, cluster, "1", &format!("name:{name}"));
        assert_eq!(cluster.psql(&made.name, BOTH_TABLES), *want, "{name}");
    }
}

/// Definitions that change in a transaction that is prepared, and decided on by another agent's time, and those that a
/// savepoint takes back.
fn prepared_and_undone(major: u32) {
    let cluster = Cluster::start(major);
    let mut agent = two_tables(&cluster);
    let point = |name: &'static str| {
        cluster.psql("shop", &format!("SELECT coffer.restore_point('{name}')"));
        (name, cluster.psql("shop", BOTH_TABLES))
    };
    let mut points = vec![point("before")];
    cluster.script(
        "shop",
        "BEGIN; UPDATE t SET v = 'old shape' WHERE id = 2; ALTER TABLE t ADD COLUMN n int DEFAULT 7; ALTER TABLE d RENAME v TO w;
         INSERT INTO t VALUES (1, 10, 'p', 8); DELETE FROM d WHERE id = 2; PREPARE TRANSACTION 'stays';",
    );
    assert_eq!(agent.stop(), Some(0));
    agent.start();
    cluster.psql("shop", "COMMIT PREPARED 'stays'");
    points.push(point("prepared"));
    cluster.script(
        "shop",
        "BEGIN; ALTER TABLE t DROP COLUMN v; TRUNCATE d; INSERT INTO t VALUES (1, 20, 1); PREPARE TRANSACTION 'goes'; ROLLBACK PREPARED 'goes';
         UPDATE t SET v = 'after' WHERE id = 3;",
    );
    points.push(point("rolled back"));
    cluster.script(
        "shop",
        "BEGIN; INSERT INTO t VALUES (1, 30, 'first', 1); SAVEPOINT s;
         ALTER TABLE t DROP COLUMN v; TRUNCATE d; ALTER TABLE t ADD COLUMN x int DEFAULT 3; INSERT INTO t VALUES (1, 40, 1, 4);
         ROLLBACK TO s; UPDATE t SET v = v || '!' WHERE id < 30; DELETE FROM d WHERE id = 4; COMMIT;",
    );
    points.push(point("undone"));
    compare_points(&agent, &cluster, &points);
}

/// Columns and tables that go and come again under their names, and tables that swap them.
fn names_that_come_again(major: u32) {
    let cluster = Cluster::start(major);
    let agent = two_tables(&cluster);
    let mut points = Vec::new();
    let steps = [
        ("before", "SELECT 1"),
        ("column", "ALTER TABLE t DROP COLUMN v; ALTER TABLE t ADD COLUMN v int DEFAULT 5; UPDATE t SET v = 6 WHERE id = 1"),
        ("swapped", "BEGIN; ALTER TABLE t RENAME TO x; ALTER TABLE d RENAME TO t; ALTER TABLE x RENAME TO d; INSERT INTO t VALUES (8, 1, 'of d');
                     DELETE FROM d WHERE id = 2; COMMIT"),
        ("made anew", "BEGIN; DROP TABLE t; CREATE TABLE t (tenant int NOT NULL, id int, w date, PRIMARY KEY (tenant, id)); COMMIT;
                       INSERT INTO t VALUES (1, 1, '2026-01-01'); UPDATE d SET v = 9 WHERE id = 3"),
    ];
    for (name, sql) in steps {
        cluster.script("shop", &format!("{sql}; SELECT coffer.restore_point('{name}');"));
        points.push((name, cluster.psql("shop", BOTH_TABLES)));
        // The definitions have to be archived before they change again.
        compare_points(&agent, &cluster, &points);
    }
}
