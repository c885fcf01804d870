//! A schema per tenant, found by itself; a database per tenant, several in one agent; and both beside shared tables. Partitions
//! and tables that inherit.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database};
use coffer_tests::wait_for;

on_majors! {
    a_schema_per_tenant: a_schema_per_tenant;
    a_database_per_tenant: a_database_per_tenant;
    schemas_of_another_name: schemas_of_another_name;
    tables_that_change_schemas: tables_that_change_schemas;
    partitions_in_a_tenants_schema: partitions_in_a_tenants_schema;
    columns_of_parents: columns_of_parents;
    heirs_that_come_and_go: heirs_that_come_and_go;
}

const OF_A_TENANT: &str = "
CREATE TABLE items (id int PRIMARY KEY, v text);
CREATE TABLE log (v text);
";

fn in_schema(schema: &str) -> String {
    format!("CREATE SCHEMA {schema}; SET search_path = {schema}; {OF_A_TENANT}")
}

/// What the tenant's tables hold, as one text.
fn contents(cluster: &Cluster, db: &str, schema: &str) -> String {
    cluster.psql(
        db,
        &format!(
            "SELECT concat_ws(' / ', (SELECT string_agg(t::text, ' ' ORDER BY id) FROM {schema}.items t),
                              (SELECT string_agg(t::text, ' ' ORDER BY v) FROM {schema}.log t))"
        ),
    )
}

fn a_schema_per_tenant(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        for schema in ["t_acme", "t_globex", "special"] {
            cluster.script("shop", &in_schema(schema));
        }
        cluster.script(
            "shop",
            "CREATE TABLE plans (id int PRIMARY KEY, name text); INSERT INTO plans VALUES (1, 'gold');
            CREATE TABLE visits (tenant text, id int, PRIMARY KEY (tenant, id));",
        );
        cluster.script(
            "shop",
            "SELECT coffer.add_schema_pattern('t\\_%'); SELECT coffer.add_schema('special', 'Special/One');
             SELECT coffer.add_shared('plans'); SELECT coffer.add_table('visits', 'tenant');
             INSERT INTO t_acme.items VALUES (1, 'a'), (2, 'b'); INSERT INTO t_acme.log VALUES ('x'), ('x');
             INSERT INTO special.items VALUES (1, 's'); INSERT INTO visits VALUES ('t_acme', 1), ('other', 2);",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["t_acme", "Special/One", "other"]);
        // A tenant that comes while the agent runs, and tables that an old one gets.
        cluster.script("shop", &in_schema("t_new"));
        cluster.script(
            "shop",
            "INSERT INTO t_new.items VALUES (7, 'n'); UPDATE t_acme.items SET v = 'A' WHERE id = 1; DELETE FROM t_acme.items WHERE id = 2;
             CREATE TABLE t_acme.extra (id int PRIMARY KEY); INSERT INTO t_acme.extra VALUES (1);
             UPDATE t_acme.log SET v = 'y' WHERE ctid IN (SELECT ctid FROM t_acme.log LIMIT 1);",
        );
        restored::wait_windows(&mut agent, &["t_new"]);
        cluster.psql("shop", "INSERT INTO t_acme.extra VALUES (2)");
        let uncovered = "SELECT count(*) FROM coffer.coverage WHERE NOT covered";
        assert_eq!(cluster.psql("shop", uncovered), "0");
        cluster.psql("shop", "SELECT coffer.restore_point('p')");
        let want: Vec<_> = ["t_acme", "special", "t_new"].map(|s| contents(&cluster, "shop", s)).into();
        for (tenant, schema, want) in
            [("t_acme", "t_acme", &want[0]), ("Special/One", "special", &want[1]), ("t_new", "t_new", &want[2])]
        {
            let db = Database::restore(&agent, &cluster, tenant, "name:p");
            assert_eq!(contents(&cluster, &db.name, schema), *want, "{tenant}");
            assert_eq!(
                cluster.psql(&db.name, "SELECT name FROM plans"),
                "gold",
                "shared tables come with every tenant"
            );
            let others =
                "SELECT count(*) FROM pg_namespace WHERE nspname IN ('t_globex', 't_acme', 'special', 't_new')";
            let rows = "SELECT (SELECT count(*) FROM visits WHERE tenant <> 't_acme')";
            assert_eq!(cluster.psql(&db.name, rows), "0", "{tenant}");
            println!("{tenant}: {} tenants' schemas in its database", cluster.psql(&db.name, others));
        }
        assert_eq!(cluster.psql("shop", "SELECT sum(id) FROM t_acme.extra"), "3");
        let db = Database::restore(&agent, &cluster, "t_acme", "name:p");
        assert_eq!(cluster.psql(&db.name, "SELECT sum(id) FROM t_acme.extra"), "3");
        assert_eq!(cluster.psql(&db.name, "SELECT count(*) FROM visits"), "1");
        // In place: its schema is the tenant's, and so is its row in a table that it shares.
        let special = contents(&cluster, "shop", "special");
        cluster.script("shop", "DELETE FROM t_acme.items; TRUNCATE t_acme.log; DELETE FROM visits WHERE tenant = 't_acme'; UPDATE special.items SET v = 'kept';");
        agent.json(&restored::in_place("t_acme", "name:p"));
        assert_eq!(contents(&cluster, "shop", "t_acme"), want[0]);
        assert_ne!(contents(&cluster, "shop", "special"), special, "another tenant's schema is as it was");
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM visits"), "2");
    });
}

fn a_database_per_tenant(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        let databases = ["acme", "globex"];
        for db in databases {
            cluster.create_protected_db(db);
            cluster.script(
                db,
                &format!(
                    "{OF_A_TENANT} SELECT coffer.add_schema('public', '{db}'); INSERT INTO items VALUES (1, '{db}');"
                ),
            );
        }
        let mut setup = Setup::of(&cluster, "acme");
        setup.more =
            format!("[source.globex]\nurl = \"{}\"\nslot = \"coffer_globex\"\n", cluster.url("coffer_agent", "globex"));
        let mut agent = Agent::new(&setup);
        agent.start();
        restored::wait_windows(&mut agent, &databases);
        for db in databases {
            cluster.script(db, "INSERT INTO items VALUES (2, 'later'); INSERT INTO log VALUES ('l'); SELECT coffer.restore_point('p');");
        }
        cluster.psql("acme", "DELETE FROM items");
        for (source, db) in [("shop", "acme"), ("globex", "globex")] {
            let name = format!("again_{db}");
            let to = cluster.url("postgres", &name);
            let mut args = vec!["--source", source];
            args.extend(restored::args(db, "name:p", "database", &to));
            agent.json(&args);
            let items = cluster.psql(&name, "SELECT string_agg(v, ' ' ORDER BY id) FROM items");
            assert_eq!(items, format!("{db} later"));
        }
        // A verb that acts on one source asks which; each source has tenants of its own.
        let (code, said) = agent.json_err(&["restore", "--tenant", "acme", "--to", "latest", "--mode", "in-place"]);
        assert!(code == 2 && said.to_string().contains("--source"), "{code} {said}");
        let (code, _) = agent
            .json_err(&["--source", "globex", "restore", "--tenant", "acme", "--to", "latest", "--mode", "in-place"]);
        assert_eq!(code, 3);
        let status = agent.json(&["status"]);
        assert_eq!(status["sources"].as_array().map(Vec::len), Some(2), "{status}");
        // One database that is gone does not stop the other.
        cluster.psql("postgres", "ALTER DATABASE globex ALLOW_CONNECTIONS false");
        cluster.psql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'globex'");
        cluster.psql("acme", "INSERT INTO items VALUES (3, 'alone')");
        cluster.psql("acme", "SELECT coffer.wait_durable(timeout => '1min')");
        cluster.psql("postgres", "ALTER DATABASE globex ALLOW_CONNECTIONS true");
        cluster.psql("globex", "INSERT INTO items VALUES (3, 'back')");
        wait_for("the other to be back", 60, || {
            let s: serde_json::Value = serde_json::from_slice(&agent.coffer(&["--json", "status"]).stdout).ok()?;
            let states = s["sources"].as_array()?.iter().all(|s| s["state"] == "streaming");
            states.then_some(())
        });
        cluster.psql("globex", "SELECT coffer.wait_durable(timeout => '1min')");
        assert_eq!(agent.json(&["verify"])["ok"], true);
    });
}

/// Waits for the next base after `sql`, which asks for one.
fn with_a_new_base(cluster: &Cluster, agent: &Agent, sql: &str) {
    let based = || agent.log().matches("bases are recorded").count();
    let before = based();
    cluster.script("shop", sql);
    wait_for("a new base", 60, || (based() > before).then_some(()));
}

/// A schema that gets a name which a pattern fits is a tenant's from then on; one that is a tenant's stays the tenant's
/// under any name, and comes back under the one that it had.
fn schemas_of_another_name(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    for schema in ["t_acme", "plain"] {
        cluster.script("shop", &in_schema(schema));
    }
    cluster.script(
        "shop",
        "CREATE SCHEMA mixed; CREATE TABLE mixed.visits (tenant text, id int, PRIMARY KEY (tenant, id));
         SELECT coffer.add_schema_pattern('t\\_%'); SELECT coffer.add_table('mixed.visits', 'tenant');
         INSERT INTO t_acme.items VALUES (1, 'a'), (2, 'b'); INSERT INTO t_acme.log VALUES ('x'), ('x');
         INSERT INTO plain.items VALUES (1, 'p'), (2, 'q'); INSERT INTO plain.log VALUES ('l'), ('l');
         INSERT INTO mixed.visits VALUES ('t_acme', 1), ('other', 2);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["t_acme", "other"]);
    cluster.psql("shop", "SELECT coffer.restore_point('before')");
    let acme = contents(&cluster, "shop", "t_acme");

    // Out of the pattern, and a table with a rule of its own along with its schema: nobody writes a row.
    cluster.script("shop", "ALTER SCHEMA t_acme RENAME TO closed; ALTER SCHEMA mixed RENAME TO stirred; SELECT coffer.restore_point('closed');");
    let uncovered =
        "SELECT string_agg(relation::text, ' ' ORDER BY relation::text) FROM coffer.coverage WHERE NOT covered";
    assert_eq!(cluster.psql("shop", uncovered), "plain.items plain.log");
    for (point, schema, visits) in [("before", "t_acme", "mixed"), ("closed", "closed", "stirred")] {
        let made = Database::restore(&agent, &cluster, "t_acme", &format!("name:{point}"));
        assert_eq!(contents(&cluster, &made.name, schema), acme, "at {point}");
        assert_eq!(cluster.psql(&made.name, &format!("SELECT id FROM {visits}.visits")), "1", "at {point}");
    }
    cluster.script("shop", "INSERT INTO closed.items VALUES (3, 'c'); SELECT coffer.restore_point('written');");
    let made = Database::restore(&agent, &cluster, "t_acme", "name:written");
    assert_eq!(contents(&cluster, &made.name, "closed"), contents(&cluster, "shop", "closed"));
    agent.json(&restored::in_place("t_acme", "name:before"));
    assert_eq!(contents(&cluster, "shop", "closed"), acme);

    // Into it: covered from a base on.
    with_a_new_base(
        &cluster,
        &agent,
        "ALTER SCHEMA plain RENAME TO t_plain; INSERT INTO t_plain.items VALUES (3, 'r');",
    );
    assert_eq!(cluster.psql("shop", uncovered), "");
    restored::wait_windows(&mut agent, &["t_plain"]);
    cluster.script("shop", "UPDATE t_plain.items SET v = 'P' WHERE id = 1; DELETE FROM t_plain.items WHERE id = 2; SELECT coffer.restore_point('found');");
    let made = Database::restore(&agent, &cluster, "t_plain", "name:found");
    assert_eq!(contents(&cluster, &made.name, "t_plain"), contents(&cluster, "shop", "t_plain"));
    let made = Database::restore(&agent, &cluster, "t_acme", "name:found");
    assert_eq!(contents(&cluster, &made.name, "closed"), acme);
    assert_eq!(cluster.psql("shop", "SELECT coffer.wait_durable() IS NOT NULL"), "t");
}

/// Tables with rows that move between schemas: into a tenant's, from one tenant's into another's, out of it. Each point
/// has them with whom they were then.
fn tables_that_change_schemas(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE a.own (id int PRIMARY KEY); CREATE TABLE b.own (id int PRIMARY KEY);
         SELECT coffer.add_schema('a', 'A'); SELECT coffer.add_schema('b', 'B');
         INSERT INTO a.own VALUES (1); INSERT INTO b.own VALUES (2);
         CREATE TABLE public.keyed (id int PRIMARY KEY, v text); CREATE TABLE public.heap (v text);
         INSERT INTO keyed SELECT i, 'v' || i FROM generate_series(1, 3) i; INSERT INTO heap VALUES ('x'), ('x');",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["A", "B"]);
    let point = |name: &str| cluster.psql("shop", &format!("SELECT coffer.restore_point('{name}')"));
    let moved = |from: &str, to: &str| {
        format!("BEGIN; ALTER TABLE {from}.keyed SET SCHEMA {to}; ALTER TABLE {from}.heap SET SCHEMA {to}; COMMIT;")
    };
    point("outside");
    with_a_new_base(&cluster, &agent, &moved("public", "a"));
    cluster.script("shop", "UPDATE a.keyed SET v = 'of a' WHERE id = 1; INSERT INTO a.heap VALUES ('y');");
    point("of a");
    with_a_new_base(&cluster, &agent, &moved("a", "b"));
    cluster.script("shop", "UPDATE b.keyed SET v = 'of b' WHERE id = 2; DELETE FROM b.heap WHERE v = 'y';");
    point("of b");
    cluster.script("shop", &moved("b", "public"));
    cluster.script("shop", "UPDATE keyed SET v = 'of nobody'; SELECT coffer.restore_point('outside again');");
    let rows = |db: &str, schema: &str| {
        let there = cluster.psql(db, &format!("SELECT to_regclass('{schema}.keyed') IS NOT NULL"));
        let sql = format!(
            "SELECT concat_ws(' / ', (SELECT string_agg(v, ' ' ORDER BY id) FROM {schema}.keyed), (SELECT string_agg(v, ' ') FROM {schema}.heap))"
        );
        if there == "t" { cluster.psql(db, &sql) } else { String::new() }
    };
    let points = [
        ("outside", "", ""),
        ("of a", "of a v2 v3 / x x y", ""),
        ("of b", "", "of a of b v3 / x x"),
        ("outside again", "", ""),
    ];
    for (point, of_a, of_b) in points {
        for (tenant, schema, own, want) in [("A", "a", "1", of_a), ("B", "b", "2", of_b)] {
            let made = Database::restore(&agent, &cluster, tenant, &format!("name:{point}"));
            assert_eq!(rows(&made.name, schema), want, "{tenant} at {point}");
            assert_eq!(cluster.psql(&made.name, &format!("SELECT id FROM {schema}.own")), own, "{tenant} at {point}");
        }
    }
    let uncovered =
        "SELECT string_agg(relation::text, ' ' ORDER BY relation::text) FROM coffer.coverage WHERE NOT covered";
    assert_eq!(cluster.psql("shop", uncovered), "heap keyed");
}

/// Partitions in a tenant's schema that are made, attached and detached, also to a table that every tenant has rows in. Each
/// point has their rows once, and those of before stay.
fn partitions_in_a_tenants_schema(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE SCHEMA acme; SET search_path = acme;
         CREATE TABLE keyed (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         CREATE TABLE keyed_1 PARTITION OF keyed FOR VALUES FROM (0) TO (10);
         CREATE TABLE keyed_2 (id int PRIMARY KEY, v text);
         CREATE TABLE heap (id int, v text) PARTITION BY RANGE (id);
         CREATE TABLE heap_1 PARTITION OF heap FOR VALUES FROM (0) TO (10);
         CREATE TABLE given (tenant text, id int, PRIMARY KEY (tenant, id));
         CREATE TABLE public.mixed (tenant text, id int, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (id);
         SELECT coffer.add_schema('acme', 'Acme'); SELECT coffer.add_table('public.mixed', 'tenant');
         INSERT INTO keyed SELECT i, 'v' FROM generate_series(1, 3) i; INSERT INTO keyed_2 SELECT i, 'v' FROM generate_series(11, 13) i;
         INSERT INTO heap SELECT i, 'v' FROM generate_series(1, 3) i; INSERT INTO given VALUES ('Acme', 1), ('Acme', 2), ('other', 3);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["Acme"]);
    let rows = |db: &str| {
        let tables = ["keyed", "keyed_1", "keyed_2", "heap", "heap_1", "given"];
        let each = tables
            .map(|t| cluster.psql(db, &format!("SELECT string_agg(t::text, ' ' ORDER BY t::text) FROM acme.{t} t")));
        each.join(" / ")
    };
    let check = |point: &str, want: &str| {
        let made = Database::restore(&agent, &cluster, "Acme", &format!("name:{point}"));
        assert_eq!(rows(&made.name), want, "at {point}");
    };
    let mut points = Vec::new();
    let mut point = |name: &'static str| {
        cluster.psql("shop", &format!("SELECT coffer.restore_point('{name}')"));
        // Of a table that all have rows in, the tenant's.
        let own = if points.len() < 3 { rows("shop") } else { rows("shop").replace(" (other,3)", "") };
        check(name, &own);
        points.push((name, own));
    };
    point("before");
    cluster.script(
        "shop",
        "CREATE TABLE acme.heap_2 PARTITION OF acme.heap FOR VALUES FROM (10) TO (20);
         INSERT INTO acme.heap VALUES (10, 'new'), (11, 'new'), (12, 'new');
         UPDATE acme.heap SET v = 'changed' WHERE id = 11; DELETE FROM acme.heap WHERE id IN (3, 12);",
    );
    point("made");
    assert_eq!(agent.log().matches("bases are recorded").count(), 1, "a partition that is made asks for no base");
    let attach = |to: &str, what: &str, bounds: &str| {
        let sql = format!("ALTER TABLE {to} ATTACH PARTITION acme.{what} FOR VALUES {bounds}");
        with_a_new_base(&cluster, &agent, &sql);
    };
    attach("acme.keyed", "keyed_2", "FROM (10) TO (20)");
    cluster.psql("shop", "DELETE FROM acme.keyed WHERE id IN (1, 11)");
    point("attached");
    attach("public.mixed", "given", "FROM (0) TO (10)");
    cluster.psql("shop", "DELETE FROM mixed WHERE id = 1");
    point("shared");
    with_a_new_base(&cluster, &agent, "ALTER TABLE acme.keyed DETACH PARTITION acme.keyed_1");
    let based = agent.log().matches("bases are recorded").count();
    cluster.script("shop", "ALTER TABLE acme.keyed ADD COLUMN n int; DELETE FROM acme.keyed_1 WHERE id = 2;");
    point("detached");
    assert!(points[3].1.ends_with("(Acme,2)"), "{points:?}");
    for (name, want) in &points {
        check(name, want);
    }
    assert_eq!(
        agent.log().matches("bases are recorded").count(),
        based,
        "a partition that is gone is none of the table's"
    );
}

/// Columns that a table's heirs have from it change with it: the heirs are written to as before, and come back so.
fn columns_of_parents(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE parent (tenant int NOT NULL, id int PRIMARY KEY, v text);
         CREATE TABLE tagged (PRIMARY KEY (id)) INHERITS (parent);
         CREATE TABLE keyed (PRIMARY KEY (tenant, id)) INHERITS (parent);
         SELECT coffer.discover('tenant', true);
         INSERT INTO tagged SELECT 1 + i % 2, i, 'x' FROM generate_series(1, 6) i;
         INSERT INTO keyed SELECT 1 + i % 2, i, repeat('long', 4000) FROM generate_series(11, 16) i;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    let check = |point: &str| {
        cluster.psql("shop", &format!("SELECT coffer.restore_point('{point}')"));
        for tenant in ["1", "2"] {
            let rows = format!(
                "SELECT string_agg(concat_ws(',', tableoid::regclass, number, md5(v), n), ' ' ORDER BY number) FROM parent WHERE owner = {tenant}"
            );
            let made = Database::restore(&agent, &cluster, tenant, &format!("name:{point}"));
            assert_eq!(cluster.psql(&made.name, &rows), cluster.psql("shop", &rows), "tenant {tenant} at {point}");
        }
    };
    cluster.script(
        "shop",
        "ALTER TABLE parent RENAME tenant TO owner; ALTER TABLE parent RENAME id TO number; ALTER TABLE parent ADD COLUMN n int DEFAULT 7;",
    );
    check("renamed");
    cluster.script(
        "shop",
        "DELETE FROM parent WHERE number IN (1, 2, 11, 12); UPDATE parent SET owner = 3 - owner WHERE number IN (3, 4, 13, 14);",
    );
    check("written");
    assert_eq!(agent.log().matches("bases are recorded").count(), 1, "names are no rows");
    with_a_new_base(&cluster, &agent, "ALTER TABLE tagged ADD COLUMN at timestamptz DEFAULT clock_timestamp()");
    check("based");
}

/// Tables with rows that become heirs of another and cease to be: both are what they were, at each point and after it.
fn heirs_that_come_and_go(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE parent (tenant int NOT NULL, id int PRIMARY KEY, v text);
         CREATE TABLE tagged (LIKE parent INCLUDING ALL); CREATE TABLE keyed (tenant int NOT NULL, id int, v text, PRIMARY KEY (tenant, id));
         CREATE TABLE below (id int PRIMARY KEY, up int NOT NULL REFERENCES tagged ON DELETE CASCADE);
         SELECT coffer.discover('tenant', true);
         INSERT INTO parent SELECT 1 + i % 2, i, 'parent' FROM generate_series(1, 4) i;
         INSERT INTO tagged SELECT 1 + i % 2, i, 'tagged' FROM generate_series(11, 18) i;
         INSERT INTO keyed SELECT 1 + i % 2, i, 'keyed' FROM generate_series(21, 28) i;
         INSERT INTO below SELECT i, i FROM generate_series(11, 18) i;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    let rows = |db: &str, tenant: &str| {
        let each = ["parent", "tagged", "keyed"].map(|t| {
            cluster.psql(
                db,
                &format!("SELECT '{t}', string_agg(concat_ws(',', id, v), ' ' ORDER BY id) FROM ONLY {t} WHERE tenant = {tenant}"),
            )
        });
        let below = format!(
            "SELECT string_agg(b.id::text, ' ' ORDER BY b.id) FROM below b JOIN tagged t ON t.id = b.up WHERE t.tenant = {tenant}"
        );
        format!("{} / {}", each.join(" / "), cluster.psql(db, &below))
    };
    let check = |(name, want): &(&str, [String; 2])| {
        for (tenant, want) in ["1", "2"].into_iter().zip(want) {
            let made = Database::restore(&agent, &cluster, tenant, &format!("name:{name}"));
            assert_eq!(rows(&made.name, tenant), *want, "tenant {tenant} at {name}");
            let heirs =
                cluster.psql(&made.name, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'parent'::regclass");
            assert_eq!(heirs, if *name == "heirs" { "2" } else { "0" }, "at {name}");
        }
    };
    let mut points = Vec::new();
    for (name, ddl, first) in [
        ("apart", "", 1),
        ("heirs", "ALTER TABLE tagged INHERIT parent; ALTER TABLE keyed INHERIT parent", 2),
        ("apart again", "ALTER TABLE tagged NO INHERIT parent; ALTER TABLE keyed NO INHERIT parent", 3),
    ] {
        cluster.script(
            "shop",
            &format!(
                "{ddl}; UPDATE parent SET v = v || '+' WHERE id % 10 IN (1, {first}); DELETE FROM ONLY parent WHERE id = {first};
                 UPDATE tagged SET tenant = 3 - tenant WHERE id = 10 + {first}; DELETE FROM tagged WHERE id = 14 + {first};
                 DELETE FROM keyed WHERE id = 24 + {first}; UPDATE keyed SET v = 'k{first}' WHERE id = 20 + {first};
                 SELECT coffer.restore_point('{name}');"
            ),
        );
        let point = (name, ["1", "2"].map(|t| rows("shop", t)));
        // The definitions have to be archived before they change again.
        check(&point);
        points.push(point);
    }
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM coffer.coverage WHERE NOT covered"), "0");
    points.iter().for_each(check);
    agent.json(&restored::in_place("1", "name:apart again"));
    assert_eq!(["1", "2"].map(|t| rows("shop", t)), points[2].1);
    assert_eq!(agent.json(&["verify", "--against-live"])["ok"], true);
    assert_eq!(agent.json(&["status"])["sources"][0]["unresolved_rows"], 0);
}
