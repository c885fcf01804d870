//! Restores in place against what the server does not look after for them: deferrable constraints, and triggers of the
//! application that fire always. All or nothing, and never a row that is not allowed to be there.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;

on_majors! {
    deferrable_constraints: deferrable_constraints;
    triggers_that_fire_always: triggers_that_fire_always;
    rows_that_refer_to_their_own_table: rows_that_refer_to_their_own_table;
}

/// The table as it is, in one line.
fn rows(cluster: &Cluster, table: &str) -> String {
    cluster.psql("shop", &format!("SELECT string_agg(t::text, ' ' ORDER BY t::text) FROM {table} t"))
}

/// Restores that must be refused, for this reason, and change nothing; what was said.
fn refused(cluster: &Cluster, agent: &Agent, tenant: &str, table: &str, why: &str) -> String {
    let before = rows(cluster, table);
    let mut args = restored::in_place(tenant, "name:before");
    args.extend(["--table", table]);
    let (code, said) = agent.json_err(&args);
    let message = said["error"]["message"].as_str().expect("a message").to_owned();
    assert!(code == 10 && message.contains(why), "{table}: {code} {said}");
    assert_eq!(rows(cluster, table), before, "{table}");
    message
}

fn deferrable_constraints(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE codes (tenant int NOT NULL, id int, code text, PRIMARY KEY (tenant, id), UNIQUE (code) DEFERRABLE INITIALLY DEFERRED);
         CREATE TABLE stays (tenant int NOT NULL, id int, a int, b int, cancelled bool NOT NULL DEFAULT false, PRIMARY KEY (tenant, id),
             EXCLUDE USING gist (int4range(a, b) WITH &&) WHERE (NOT cancelled) DEFERRABLE INITIALLY DEFERRED);
         CREATE TABLE ranges (tenant int NOT NULL, id int PRIMARY KEY, r int4range, EXCLUDE USING gist (r WITH &&) DEFERRABLE);
         CREATE TABLE turns (tenant int NOT NULL, id int PRIMARY KEY, r int4range, EXCLUDE USING gist (r WITH &&));
         CREATE TABLE parts (tenant int NOT NULL, id int, code text, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (id);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
         ALTER TABLE parts_1 ADD UNIQUE (code) DEFERRABLE INITIALLY DEFERRED;
         SELECT coffer.discover('tenant', true);
         INSERT INTO codes VALUES (1, 1, 'x'), (1, 2, 'y'), (1, 3, 'z'), (2, 1, 'other');
         INSERT INTO stays VALUES (1, 1, 0, 10), (1, 2, 20, 30), (2, 1, 40, 50);
         INSERT INTO ranges VALUES (1, 1, '[0,10)'), (1, 2, '[20,30)'), (2, 3, '[40,50)');
         INSERT INTO turns VALUES (1, 1, '[0,10)'), (1, 2, '[20,30)'), (2, 3, '[40,50)');
         INSERT INTO parts VALUES (1, 1, 'x'), (1, 2, 'y'), (2, 1, 'other');",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.psql("shop", "SELECT coffer.restore_point('before')");
    // What the tenant had is another's by now, or its own under another key that stays.
    cluster.script(
        "shop",
        "BEGIN; UPDATE codes SET code = 'y' WHERE id = 1 AND tenant = 1; UPDATE codes SET code = 'x' WHERE id = 2; DELETE FROM codes WHERE id = 3; COMMIT;
         INSERT INTO codes VALUES (2, 9, 'z');
         DELETE FROM stays WHERE tenant = 1; INSERT INTO stays VALUES (2, 9, 5, 6, false), (2, 8, 25, 26, true);
         UPDATE turns SET r = '[60,70)' WHERE id = 1; UPDATE turns SET r = '[5,6)' WHERE id = 2; UPDATE turns SET r = '[25,26)' WHERE id = 1;
         DELETE FROM ranges WHERE id = 2; INSERT INTO ranges VALUES (2, 9, '[25,26)');
         UPDATE parts SET code = 'gone ' || id WHERE tenant = 1; INSERT INTO parts VALUES (2, 9, 'y');",
    );
    refused(&cluster, &agent, "1", "codes", "belong to another tenant now (code)");
    let said = refused(&cluster, &agent, "1", "stays", "would break stays_int4range_excl of public.stays: [0,10)");
    assert!(!said.contains("[20,30)"), "a row that the constraint is not about stands in nobody's way: {said}");
    refused(&cluster, &agent, "1", "ranges", "would break ranges_r_excl of public.ranges: [20,30)");
    refused(&cluster, &agent, "1", "parts", "would break parts_1_code_key of public.parts: y");
    // With the others out of the way the same restores go through; values change places among the tenant's own rows.
    cluster.script("shop", "DELETE FROM codes WHERE id = 9; DELETE FROM stays WHERE id = 9; DELETE FROM ranges WHERE id = 9; DELETE FROM parts WHERE id = 9;");
    agent.json(&restored::in_place("1", "name:before"));
    assert_eq!(rows(&cluster, "codes"), "(1,1,x) (1,2,y) (1,3,z) (2,1,other)");
    assert_eq!(rows(&cluster, "stays"), "(1,1,0,10,f) (1,2,20,30,f) (2,1,40,50,f) (2,8,25,26,t)");
    assert_eq!(rows(&cluster, "turns"), "(1,1,\"[0,10)\") (1,2,\"[20,30)\") (2,3,\"[40,50)\")");
    assert_eq!(rows(&cluster, "ranges"), "(1,1,\"[0,10)\") (1,2,\"[20,30)\") (2,3,\"[40,50)\")");
    assert_eq!(rows(&cluster, "parts"), "(1,1,x) (1,2,y) (2,1,other)");
}

fn triggers_that_fire_always(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant int NOT NULL, id int, v text, PRIMARY KEY (tenant, id));
         CREATE TABLE heap (tenant int NOT NULL, v text);
         CREATE TABLE log (what text);
         SELECT coffer.discover('tenant', true); SELECT coffer.exclude('log', 'a log');
         CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.v := NEW.v || '!'; RETURN NEW; END $$;
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.log VALUES (TG_OP); RETURN NULL; END $$;
         INSERT INTO t SELECT t, i, 'v' || i FROM generate_series(1, 2) t, generate_series(1, 3) i;
         INSERT INTO heap SELECT 1 + i % 2, 'h' FROM generate_series(1, 6) i;
         CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION note();
         ALTER TABLE t ENABLE ALWAYS TRIGGER note;
         GRANT INSERT ON log TO coffer_agent;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.script(
        "shop",
        "SELECT coffer.restore_point('before'); DELETE FROM t WHERE tenant = 1 AND id = 1; UPDATE t SET v = 'x' WHERE tenant = 1 AND id = 2;
         DELETE FROM heap WHERE tenant = 1; TRUNCATE log;
         CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION stamp(); ALTER TABLE t ENABLE ALWAYS TRIGGER stamp;
         CREATE TRIGGER stamp BEFORE INSERT ON heap FOR EACH ROW EXECUTE FUNCTION stamp(); ALTER TABLE heap ENABLE REPLICA TRIGGER stamp;",
    );
    refused(
        &cluster,
        &agent,
        "1",
        "t",
        "triggers that fire always (note, stamp) make rows of public.t other than they were",
    );
    refused(
        &cluster,
        &agent,
        "1",
        "heap",
        "triggers that fire always (stamp) make rows of public.heap other than they were",
    );
    assert_eq!(rows(&cluster, "log"), "", "what is refused leaves nothing");
    // One that fires as usual does not fire for a restore; one that touches no row of the table may fire.
    cluster.script("shop", "ALTER TABLE t ENABLE TRIGGER stamp; ALTER TABLE heap ENABLE TRIGGER stamp;");
    agent.json(&restored::in_place("1", "name:before"));
    assert_eq!(rows(&cluster, "t"), "(1,1,v1) (1,2,v2) (1,3,v3) (2,1,v1) (2,2,v2) (2,3,v3)");
    assert_eq!(rows(&cluster, "heap"), "(1,h) (1,h) (1,h) (2,h) (2,h) (2,h)");
    assert_eq!(rows(&cluster, "log"), "(INSERT) (UPDATE)");
}

/// A tree in a table: rows that refer to others of their own table, parents with higher keys than their children, go and
/// come back whole, in place and into a new database.
fn rows_that_refer_to_their_own_table(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE nodes (tenant int NOT NULL, id int, up int, v text, PRIMARY KEY (tenant, id),
             FOREIGN KEY (tenant, up) REFERENCES nodes ON DELETE CASCADE ON UPDATE CASCADE);
         CREATE TABLE staff (id int PRIMARY KEY, tenant int NOT NULL, boss int REFERENCES staff ON DELETE SET NULL);
         CREATE TABLE marks (id int PRIMARY KEY, staff int NOT NULL REFERENCES staff ON DELETE CASCADE, up int REFERENCES marks ON DELETE CASCADE);
         SELECT coffer.discover('tenant', true);
         INSERT INTO nodes SELECT t, i, CASE WHEN i < 6 THEN i + 1 END, 'n' FROM generate_series(1, 2) t, generate_series(1, 6) i;
         INSERT INTO staff SELECT i, 1 + i % 2, CASE WHEN i < 9 THEN i + 2 END FROM generate_series(1, 10) i;
         INSERT INTO marks SELECT i, i, CASE WHEN i < 9 THEN i + 2 END FROM generate_series(1, 10) i;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.psql("shop", "SELECT coffer.restore_point('before')");
    let all = || ["nodes", "staff", "marks"].map(|t| rows(&cluster, t));
    let before = all();
    // Each cascades through the tenant's whole tree.
    cluster.script("shop", "UPDATE nodes SET id = 70 WHERE id = 3 AND tenant = 1; DELETE FROM nodes WHERE tenant = 1 AND id = 6; DELETE FROM staff WHERE tenant = 1 AND id >= 6;");
    assert_ne!(all(), before);
    cluster.psql("shop", "SELECT coffer.restore_point('gone')");
    let gone = all();
    agent.json(&restored::in_place("1", "name:before"));
    assert_eq!(all(), before);
    agent.json(&restored::in_place("1", "name:gone"));
    assert_eq!(all(), gone);
    for (point, want) in [("before", "6 5 5"), ("gone", "0 2 0")] {
        let made = restored::Database::restore(&agent, &cluster, "1", &format!("name:{point}"));
        let counts = "SELECT concat_ws(' ', (SELECT count(*) FROM nodes), (SELECT count(*) FROM staff), (SELECT count(*) FROM marks))";
        assert_eq!(cluster.psql(&made.name, counts), want, "at {point}");
        let keys = "SELECT bool_and(convalidated) FROM pg_constraint WHERE contype = 'f' AND conrelid = confrelid";
        assert_eq!(cluster.psql(&made.name, keys), "t");
    }
}
