//! What is not in the replication stream: where sequences stand, whose roles there are, what a schema has beside tables.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database};
use coffer_tests::wait_for;

on_majors! {
    sequences: sequences;
    sequences_of_locked_tables: sequences_of_locked_tables;
    roles: roles;
    passwords: passwords;
    schema_of_a_tenant: schema_of_a_tenant;
    classes: classes;
}

/// A protected database with a table whose tenants are 1 and 2, and sequences that no column owns.
fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id serial, v text, PRIMARY KEY (tenant, id));
         CREATE SEQUENCE numbers; CREATE SEQUENCE \"Quoted name\" START 7; CREATE SEQUENCE down INCREMENT -1;
         SELECT * FROM coffer.add_table('a', 'tenant');
         INSERT INTO a (tenant, v) SELECT 1 + i % 2, 'v' || i FROM generate_series(1, 10) i;
         SELECT setval('numbers', 41);",
    );
    cluster
}

fn started(cluster: &Cluster) -> Agent {
    let mut agent = Agent::new(&Setup::of(cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    agent
}

/// `last_value` and `is_called` of the sequences, in a fixed order.
fn state(cluster: &Cluster, db: &str) -> String {
    ["numbers", "\"Quoted name\"", "down", "a_id_seq"]
        .map(|s| cluster.psql(db, &format!("SELECT last_value || ' ' || is_called FROM {s}")))
        .join(", ")
}

fn sequences(major: u32) {
    let cluster = database(major);
    let mut agent = started(&cluster);
    let bases = || restored::listed(&agent, "1")["backups"].as_array().expect("backups").len();
    let before = bases();
    // Beyond any row: nothing but the sequences says so.
    let mut points = Vec::new();
    for n in 0..3 {
        cluster.psql("shop", &format!("SELECT coffer.restore_point('p{n}')"));
        points.push((format!("name:p{n}"), state(&cluster, "shop")));
        cluster.psql(
            "shop",
            "SELECT nextval('numbers'), nextval('\"Quoted name\"'), nextval('down'), nextval('a_id_seq') \
             FROM generate_series(1, 100)",
        );
    }
    assert_eq!(points[0].1, "41 true, 7 false, -1 false, 10 true");
    assert_eq!(points[2].1, "241 true, 206 true, -200 true, 210 true");
    for (to, want) in &points {
        let restored = Database::restore(&agent, &cluster, "1", to);
        assert_eq!(&state(&cluster, &restored.name), want, "{to}");
    }

    // Points without a name: the newest reading below them, and at the end the newest of all.
    let now = state(&cluster, "shop");
    let read = || {
        cluster.psql("shop", "UPDATE a SET v = v || '.'");
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let restored = Database::restore(&agent, &cluster, "1", "latest");
        (state(&cluster, &restored.name) == now).then_some(())
    };
    wait_for("the sequences to be archived without a restore point", 60, read);
    let at = cluster.psql("shop", "SELECT pg_current_wal_insert_lsn()");
    cluster.psql("shop", "SELECT setval('numbers', 5000); UPDATE a SET v = 'x' WHERE id = 1");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let restored = Database::restore(&agent, &cluster, "1", &at);
    assert_eq!(state(&cluster, &restored.name), now);
    assert_eq!(bases(), before, "a new base would have told");

    // In place nothing moves back.
    let now = state(&cluster, "shop");
    agent.json(&restored::in_place("1", "name:p0"));
    assert_eq!(state(&cluster, "shop"), now);

    // Another process of the agent reads them anew.
    agent.kill9();
    cluster.psql("shop", "SELECT setval('numbers', 9000), coffer.restore_point('away')");
    agent.start();
    let restored = Database::restore(&agent, &cluster, "1", "name:away");
    assert_eq!(cluster.psql(&restored.name, "SELECT nextval('numbers')"), "9001");
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// A migration that holds sequences locked holds up neither ships nor restore points.
fn sequences_of_locked_tables(major: u32) {
    block_on(async {
        let cluster = database(major);
        let agent = started(&cluster);
        let migration = cluster.connect("shop").await;
        let locks = "BEGIN; ALTER SEQUENCE numbers INCREMENT BY 2; ALTER SEQUENCE a_id_seq RESTART WITH 77";
        migration.batch_execute(locks).await.expect("the migration begins");
        cluster.psql("shop", "SELECT nextval('down')");
        cluster.psql("shop", "SELECT coffer.restore_point('meanwhile')");
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '20s')");
        migration.batch_execute("ROLLBACK").await.expect("the migration ends");
        let restored = Database::restore(&agent, &cluster, "1", "name:meanwhile");
        assert_eq!(state(&cluster, &restored.name), "41 true, 7 false, -1 true, 10 true");
    });
}

/// Roles of tenant 1: a group, a member of it, and an outsider who is a member of the member.
const ROLES: &str = "
CREATE ROLE \"The group\" NOLOGIN; CREATE ROLE anna LOGIN CONNECTION LIMIT 3 VALID UNTIL '2030-01-01' PASSWORD 'hidden';
CREATE ROLE outsider; COMMENT ON ROLE anna IS 'it''s anna';
GRANT \"The group\" TO anna WITH ADMIN OPTION; GRANT anna TO outsider;
ALTER ROLE anna SET search_path = \"$user\", \"My schema\", public; ALTER ROLE anna SET work_mem = '7MB';
ALTER ROLE anna IN DATABASE shop SET statement_timeout = '11s';
ALTER DATABASE shop SET application_name = 'it''s the shop';
GRANT SELECT, INSERT ON a TO \"The group\"; GRANT UPDATE (v) ON a TO anna WITH GRANT OPTION; GRANT USAGE ON SEQUENCE numbers TO anna;
GRANT TEMPORARY ON DATABASE shop TO anna;
ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO anna; ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE ON SEQUENCES TO anna WITH GRANT OPTION;
SELECT coffer.add_role('anna', '1'); SELECT coffer.add_role('The group', '1');
";

/// What the cluster says of the roles, and what a database says of them.
const OF_ROLES: &str = "
SELECT concat_ws(' ', rolname, rolcanlogin, rolconnlimit, rolvaliduntil AT TIME ZONE 'UTC', rolconfig, shobj_description(oid, 'pg_authid'))
FROM pg_roles WHERE rolname IN ('anna', 'The group') ORDER BY rolname;
SELECT concat_ws(' ', roleid::regrole, member::regrole, admin_option) FROM pg_auth_members WHERE 'anna'::regrole IN (roleid, member) ORDER BY 1;
SELECT concat_ws(' ', setrole, setconfig) FROM pg_db_role_setting WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
AND setrole = 0 ORDER BY 1;
SELECT setconfig FROM pg_db_role_setting WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()) AND setrole <> 0
AND setrole <> 'coffer_agent'::regrole;
SELECT concat_ws(' ', has_table_privilege('The group', 'a', 'SELECT, INSERT'), has_column_privilege('anna', 'a', 'v', 'UPDATE WITH GRANT OPTION'),
has_sequence_privilege('anna', 'numbers', 'USAGE'), has_database_privilege('anna', current_database(), 'TEMPORARY'));
SELECT concat_ws(' ', defaclnamespace::regnamespace, defaclobjtype, x.privilege_type, x.is_grantable)
FROM pg_default_acl, aclexplode(defaclacl) x WHERE x.grantee = 'anna'::regrole ORDER BY 1;
";

/// Removes the roles from the cluster, whatever they have.
fn drop_roles(cluster: &Cluster) {
    cluster.script(
        "shop",
        "DROP OWNED BY anna; DROP OWNED BY \"The group\"; DROP ROLE anna; DROP ROLE \"The group\";
         ALTER DATABASE shop RESET ALL;",
    );
}

/// Waits until roles of the tenant are archived that contain this.
fn wait_roles(agent: &Agent, tenant: &str, says: &str) {
    wait_for(&format!("roles of {tenant} with: {says}"), 90, || {
        let out = restored::to_files(agent, tenant, "latest");
        let script = std::fs::read_to_string(out.dir.join("roles.sql")).unwrap_or_default();
        script.contains(says).then_some(())
    });
}

fn roles(major: u32) {
    let cluster = database(major);
    let agent = started(&cluster);
    cluster.script("shop", ROLES);
    let truth = cluster.psql("shop", OF_ROLES);
    wait_roles(&agent, "1", "11s");
    cluster.psql("shop", "SELECT coffer.restore_point('whole')");

    let out = restored::to_files(&agent, "1", "name:whole");
    assert_eq!(out.manifest()["roles"], "roles.sql");
    let script = std::fs::read_to_string(out.dir.join("roles.sql")).expect("roles.sql");
    assert!(!script.contains("SCRAM") && !script.contains("PASSWORD '"), "{script}");
    let other = restored::to_files(&agent, "2", "name:whole");
    assert!(other.manifest()["roles"].is_null() && !other.names().contains(&"roles.sql".to_owned()));
    let out = restored::Out::new();
    let mut args = restored::args("1", "name:whole", "files", out.arg());
    args.extend(["--class", "data"]);
    agent.json(&args);
    assert!(out.manifest()["roles"].is_null());

    // The roles are lost, and others come to be.
    drop_roles(&cluster);
    cluster.psql("shop", "CREATE ROLE berta; SELECT coffer.add_role('berta', '1')");
    wait_roles(&agent, "1", "berta");

    // Not without being asked to.
    let target = |name: &str| cluster.url("postgres", name);
    let said = agent.json(&restored::args("1", "name:whole", "database", &target("left_alone")));
    let warnings = said["warnings"].to_string();
    assert!(warnings.contains("anna") && warnings.contains("--roles"), "{said}");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM pg_roles WHERE rolname IN ('anna', 'The group')"), "0");

    // With --roles everything is as it was; a second time, too, when they exist.
    for name in ["with_roles", "once more"] {
        let url = target(&name.replace(' ', "%20"));
        let mut args = restored::args("1", "name:whole", "database", &url);
        args.push("--roles");
        let said = agent.json(&args);
        assert_eq!(said["warnings"], serde_json::json!([]), "{said}");
        assert_eq!(cluster.psql(name, OF_ROLES), truth, "{name}");
    }
    let (exit, said) = agent.json_err(&["restore", "--tenant", "1", "--to", "latest", "--mode", "in-place", "--roles"]);
    assert_eq!(exit, 2, "{said}");

    // The script does the same.
    cluster.psql("postgres", "DROP DATABASE with_roles");
    cluster.psql("postgres", "DROP DATABASE \"once more\"");
    cluster.psql("postgres", "DROP DATABASE left_alone");
    cluster.script("postgres", "DROP ROLE anna; DROP ROLE \"The group\"; CREATE DATABASE by_hand");
    let target = target("by_hand");
    let args = restored::args("1", "name:whole", "files", out.arg());
    std::fs::remove_dir_all(&out.dir).expect("our folder");
    agent.json(&args);
    cluster.psql("by_hand", "CREATE TABLE a (v text); CREATE SEQUENCE numbers");
    cluster.script("by_hand", &script);
    assert_eq!(cluster.psql("by_hand", OF_ROLES), truth, "{target}");

    // A tenant without roles any more has none from then on.
    cluster.psql("shop", "SELECT coffer.remove_role('berta')");
    wait_for("the last role to be gone from the archive", 90, || {
        restored::to_files(&agent, "1", "latest").manifest()["roles"].is_null().then_some(())
    });
    let verify = agent.json(&["verify"]);
    assert_eq!(verify["ok"], true, "{verify}");
}

/// Password verifiers, when the configuration asks for them.
fn passwords(major: u32) {
    let cluster = database(major);
    cluster.script("shop", "CREATE ROLE anna LOGIN PASSWORD 'hidden'; SELECT coffer.add_role('anna', '1')");
    let verifier = cluster.psql("shop", "SELECT rolpassword FROM pg_authid WHERE rolname = 'anna'");
    let mut setup = Setup::of(&cluster, "shop");
    setup.more = "[accounts]\npasswords = true".into();
    let mut agent = Agent::new(&setup);
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    wait_roles(&agent, "1", &verifier);
    cluster.psql("shop", "ALTER ROLE anna PASSWORD NULL");
    let url = cluster.url("postgres", "with_passwords");
    let mut args = restored::args("1", "latest", "database", &url);
    args.push("--roles");
    agent.json(&args);
    assert_eq!(cluster.psql("shop", "SELECT rolpassword FROM pg_authid WHERE rolname = 'anna'"), verifier);
    assert_eq!(agent.json(&["status"])["healthy"], true);
}

/// What a tenant's schema has beside its tables.
const OBJECTS: &str = "
CREATE SCHEMA acme; CREATE SCHEMA other;
CREATE TYPE acme.mood AS ENUM ('glad', 'sad');
CREATE TABLE acme.letters (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, mood acme.mood DEFAULT 'glad', upper_v text);
CREATE TABLE other.letters (id int PRIMARY KEY, v text);
CREATE FUNCTION acme.shout(t text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT upper(t)';
CREATE FUNCTION acme.fill() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.upper_v := acme.shout(NEW.v); RETURN NEW; END';
CREATE TRIGGER fill BEFORE INSERT OR UPDATE ON acme.letters FOR EACH ROW EXECUTE FUNCTION acme.fill();
CREATE VIEW acme.loud AS SELECT id, acme.shout(v) AS v FROM acme.letters;
CREATE MATERIALIZED VIEW acme.counted AS SELECT count(*) AS n FROM acme.letters;
CREATE INDEX letters_v ON acme.letters (acme.shout(v));
CREATE RULE quiet AS ON DELETE TO acme.loud DO INSTEAD NOTHING;
ALTER TABLE acme.letters ENABLE ROW LEVEL SECURITY;
CREATE POLICY visible ON acme.letters FOR SELECT TO PUBLIC USING (id > 1);
CREATE STATISTICS acme.st ON v, mood FROM acme.letters;
COMMENT ON FUNCTION acme.shout(text) IS 'loud';
SELECT * FROM coffer.add_schema('acme', 'acme'); SELECT * FROM coffer.add_schema('other', 'other');
INSERT INTO acme.letters (v) SELECT 'v' || i FROM generate_series(1, 5) i; INSERT INTO other.letters VALUES (1, 'theirs');
";

/// What a database has of it.
const OF_OBJECTS: &str = "
SELECT p.oid::regprocedure || md5(p.prosrc) || coalesce(obj_description(p.oid, 'pg_proc'), '') FROM pg_proc p WHERE pronamespace = 'acme'::regnamespace ORDER BY 1;
SELECT viewname || md5(definition) FROM pg_views WHERE schemaname = 'acme';
SELECT matviewname || ispopulated FROM pg_matviews WHERE schemaname = 'acme';
SELECT concat(tgname, tgenabled) FROM pg_trigger WHERE NOT tgisinternal AND tgrelid = 'acme.letters'::regclass;
SELECT concat(polname, polcmd) || pg_get_expr(polqual, polrelid) FROM pg_policy; SELECT relrowsecurity FROM pg_class WHERE oid = 'acme.letters'::regclass;
SELECT rulename FROM pg_rules WHERE schemaname = 'acme'; SELECT stxname FROM pg_statistic_ext;
SELECT indexname FROM pg_indexes WHERE schemaname = 'acme' ORDER BY 1;
SELECT enumlabel FROM pg_enum ORDER BY enumsortorder;
SELECT concat(attname, attidentity, atthasdef) FROM pg_attribute WHERE attrelid = 'acme.letters'::regclass AND attnum > 0 ORDER BY attnum;
SELECT * FROM acme.letters ORDER BY id; SELECT * FROM acme.loud ORDER BY id;
";

fn schema_of_a_tenant(major: u32) {
    let cluster = database(major);
    cluster.script("shop", OBJECTS);
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["acme", "other"]);
    cluster.script(
        "shop",
        "CREATE FUNCTION acme.later() RETURNS int LANGUAGE sql AS 'SELECT 42'; UPDATE acme.letters SET v = 'new' WHERE id = 3",
    );
    let truth = cluster.psql("shop", OF_OBJECTS);
    cluster.psql("shop", "SELECT coffer.restore_point('whole')");
    // A table of another tenant is not among this one's.
    let tables = restored::listed(&agent, "acme")["tables"].clone();
    assert_eq!(tables, serde_json::json!([{"relation": "acme.letters", "class": "data", "rows": 5}]));
    // Waits for the definitions, too.
    drop(Database::restore(&agent, &cluster, "acme", "name:whole"));
    cluster.script("shop", "DROP SCHEMA acme CASCADE");
    let restored = Database::restore(&agent, &cluster, "acme", "name:whole");
    assert_eq!(cluster.psql(&restored.name, OF_OBJECTS), truth);
    assert_eq!(cluster.psql(&restored.name, "SELECT acme.later()"), "42");
    assert_eq!(cluster.psql(&restored.name, "SELECT count(*) FROM other.letters"), "0");
    assert_eq!(cluster.psql(&restored.name, "SELECT n FROM acme.counted"), "5");
    let new = "INSERT INTO acme.letters (v) VALUES ('more') RETURNING id || upper_v";
    assert_eq!(cluster.psql(&restored.name, new), "6MORE");
}

/// Restores of some classes, by every mode.
fn classes(major: u32) {
    let cluster = database(major);
    cluster.script(
        "shop",
        "CREATE TABLE settings (tenant int, k text, v text, PRIMARY KEY (tenant, k)); CREATE TABLE people (tenant int, id int, PRIMARY KEY (tenant, id));
         SELECT * FROM coffer.add_table('settings', 'tenant', class => 'config'); SELECT * FROM coffer.add_table('people', 'tenant', class => 'accounts');
         CREATE TABLE skins (tenant int, id int, PRIMARY KEY (tenant, id)); CREATE TABLE trail (tenant int, id int, PRIMARY KEY (tenant, id));
         SELECT * FROM coffer.add_table('skins', 'tenant', class => 'customization'); SELECT * FROM coffer.add_table('trail', 'tenant', class => 'audit');
         INSERT INTO skins SELECT t, i FROM generate_series(1, 2) t, generate_series(1, 2) i;
         INSERT INTO trail SELECT t, i FROM generate_series(1, 2) t, generate_series(1, 6) i;
         INSERT INTO settings SELECT t, 'k' || i, 'v' FROM generate_series(1, 2) t, generate_series(1, 4) i;
         INSERT INTO people SELECT t, i FROM generate_series(1, 2) t, generate_series(1, 3) i;",
    );
    let agent = started(&cluster);
    cluster.psql("shop", "SELECT coffer.restore_point('good')");
    cluster.script(
        "shop",
        "DELETE FROM settings WHERE tenant = 1; DELETE FROM people WHERE tenant = 1; DELETE FROM a WHERE tenant = 1;
         DELETE FROM skins WHERE tenant = 1; DELETE FROM trail WHERE tenant = 1",
    );
    let with = |mut args: Vec<&'static str>, classes: &[&'static str]| {
        args.extend(classes.iter().flat_map(|c| ["--class", c]));
        args
    };
    let relations = |said: &serde_json::Value| -> Vec<String> {
        let tables = said["tables"].as_array().expect("tables").iter();
        let mut names: Vec<_> = tables.map(|t| t["relation"].as_str().expect("a name").to_owned()).collect();
        names.sort();
        names
    };
    let counts = |db: &str| {
        cluster.psql(db, "SELECT (SELECT count(*) FROM a WHERE tenant = 1), (SELECT count(*) FROM settings WHERE tenant = 1), (SELECT count(*) FROM people WHERE tenant = 1),
            (SELECT count(*) FROM skins WHERE tenant = 1), (SELECT count(*) FROM trail WHERE tenant = 1)")
    };

    // What there is to choose from.
    let listed = restored::listed(&agent, "1");
    let table = |relation: &str, class: &str, rows: u64| serde_json::json!({"relation": relation, "class": class, "rows": rows});
    let want = serde_json::json!([
        table("public.people", "accounts", 3),
        table("public.trail", "audit", 6),
        table("public.settings", "config", 4),
        table("public.skins", "customization", 2),
        table("public.a", "data", 5)
    ]);
    assert_eq!(listed["tables"], want);
    let text = agent.coffer(&["list", "--tenant", "1"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("table   public.settings (config): 4 rows in its newest base"), "{text}");

    let out = restored::Out::new();
    let mut args = restored::args("1", "name:good", "files", out.arg());
    args.extend(["--class", "config", "--class", "accounts"]);
    assert_eq!(relations(&agent.json(&args)), ["public.people", "public.settings"]);
    for (class, relation, name, rows) in [
        ("config", "public.settings", "some", "0|4|0|0|0"),
        ("customization", "public.skins", "skins_only", "0|0|0|2|0"),
        ("audit", "public.trail", "trail_only", "0|0|0|0|6"),
    ] {
        let url = cluster.url("postgres", name);
        let mut args = restored::args("1", "name:good", "database", &url);
        args.extend(["--class", class]);
        assert_eq!(relations(&agent.json(&args)), [relation]);
        assert_eq!(counts(name), rows);
    }
    let said = agent.json(&with(restored::in_place("1", "name:good"), &["accounts"]));
    assert_eq!(relations(&said), ["public.people"]);
    assert_eq!(counts("shop"), "0|0|3|0|0");
    let said = agent.json(&with(restored::in_place("1", "name:good"), &["customization", "audit"]));
    assert_eq!(relations(&said), ["public.skins", "public.trail"]);
    assert_eq!(counts("shop"), "0|0|3|2|6");
    agent.json(&with(restored::in_place("1", "name:good"), &["data", "config"]));
    assert_eq!(counts("shop"), "5|4|3|2|6");
    let (exit, said) = agent.json_err(&with(restored::in_place("1", "name:good"), &["neither"]));
    assert_eq!(exit, 2, "{said}");
}
