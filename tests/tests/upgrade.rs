//! OIDs that do not stay: `pg_upgrade` keeps those of tables, and gives schemas and foreign keys others.

use coffer_tests::cluster::Cluster;

on_majors! {
    rules_follow_names: rules_follow_names;
    unheard_of: unheard_of;
}

/// Whose the rows are that the statement writes, by the schemas that they are in.
fn decoded(cluster: &Cluster, sql: &str) -> String {
    cluster.psql("shop", "SELECT pg_create_logical_replication_slot('peek', 'pg_coffer')");
    cluster.script("shop", sql);
    let tenants = cluster.psql(
        "shop",
        "SELECT string_agg(format('%s:%s', split_part(r, '.', 1), t), ' ' ORDER BY r COLLATE \"C\") FROM (
            SELECT d.data::jsonb ->> 'relation' AS r, coalesce(d.data::jsonb ->> 'tenant', d.data::jsonb ->> 'tenant_kind') AS t
            FROM pg_logical_slot_get_changes('peek', NULL, NULL, 'format', 'json') d WHERE d.data::jsonb ->> 'op' IN ('insert', 'opaque')) x",
    );
    cluster.psql("shop", "SELECT pg_drop_replication_slot('peek')");
    tenants
}

fn rules_follow_names(major: u32) {
    let old = Cluster::start(major);
    old.psql("postgres", "CREATE DATABASE shop");
    // One after the other, here and there: so the OIDs of some are those of others in the end.
    let each = |sql: &str| (0..40).map(|i| sql.replace("NN", &format!("{i:02}"))).collect::<String>();
    old.script("shop", &each("CREATE SCHEMA sNN;"));
    old.script("shop", &each("CREATE TABLE sNN.t (id int PRIMARY KEY);"));
    old.script(
        "shop",
        "CREATE EXTENSION pg_coffer;
         SELECT count(*) FROM coffer.add_schema_pattern('s__');
         CREATE TABLE a (tenant int, id int PRIMARY KEY); CREATE TABLE b (tenant int, id int PRIMARY KEY);
         CREATE TABLE below (id int PRIMARY KEY, a int NOT NULL REFERENCES a, b int NOT NULL REFERENCES b DEFERRABLE);
         SELECT coffer.add_table('a', 'tenant'); SELECT coffer.add_table('b', 'tenant');
         SELECT coffer.add_table('below', parent => 'b');
         INSERT INTO a VALUES (1, 1); INSERT INTO b VALUES (2, 1);",
    );
    let new = Cluster::upgrade_of(&old);
    let sql = |s: &str| new.psql("shop", s);
    let exchanged = "SELECT count(*) > 10 FROM coffer.schema_rules s JOIN pg_namespace n ON n.oid = s.nspid WHERE n.nspname <> s.schema";
    assert_eq!(
        sql(exchanged),
        "t",
        "no OID of a rule is another schema's: {}",
        sql("SELECT nspid, schema FROM coffer.schema_rules")
    );

    let rows = |id: u32| each(&format!("INSERT INTO sNN.t VALUES ({id});"));
    let own = (0..40).map(|i| format!("s{i:02}:s{i:02}")).collect::<Vec<_>>().join(" ");
    assert_eq!(decoded(&new, &rows(1)), own, "rows of a tenant's schema are another tenant's");
    assert_eq!(sql("SELECT count(*) FROM coffer.snapshot('s07')"), "1");
    assert_eq!(
        sql("SELECT string_agg(check_name, ' ') FROM coffer.doctor() WHERE NOT ok AND check_name ~ '^(schema|table)'"),
        ""
    );
    // The foreign key that was chosen is not another, and still one that is checked late.
    assert_eq!(sql("SELECT parent FROM coffer.coverage WHERE relation = 'below'::regclass"), "b");
    sql("ALTER TABLE below ADD v text");
    assert_eq!(sql("SELECT parent FROM coffer.coverage WHERE relation = 'below'::regclass"), "b");
    assert_eq!(decoded(&new, "INSERT INTO below VALUES (1, 1, 1)"), "public:2");

    // Schemas that are renamed and dropped are those that were meant.
    new.script("shop", "ALTER SCHEMA s03 RENAME TO moved; DROP SCHEMA s05 CASCADE; CREATE SCHEMA s05; CREATE TABLE s05.t (id int PRIMARY KEY)");
    let after = decoded(&new, &rows(2).replace("s03", "moved"));
    let expected = own.replace("s03:s03 ", "");
    assert_eq!(after, format!("moved:s03 {expected}"));
    assert_eq!(sql(&exchanged.replace("> 10", "= 0")), "t");
}

/// Names that change hands while nobody listens: whose the rows are nobody knows, so they are no tenant's.
fn unheard_of(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE SCHEMA one; CREATE TABLE one.t (id int PRIMARY KEY); CREATE SCHEMA two; CREATE TABLE two.t (id int PRIMARY KEY);
         SELECT coffer.add_schema('one', 'acme'); SELECT coffer.add_schema('two', 'globex');",
    );
    let rows = |id: u32| format!("INSERT INTO one.t VALUES ({id}); INSERT INTO two.t VALUES ({id});");
    assert_eq!(decoded(&cluster, &rows(1)), "one:acme two:globex");
    cluster
        .script("shop", "ALTER SCHEMA one RENAME TO x; ALTER SCHEMA two RENAME TO one; ALTER SCHEMA x RENAME TO two;");
    assert_eq!(decoded(&cluster, &rows(2)), "one:globex two:acme");
    let triggers = |what: &str| {
        ["ddl", "drop", "rewrite", "schema"].map(|t| format!("ALTER EVENT TRIGGER coffer_{t} {what};")).concat()
    };
    cluster.script("shop", &triggers("DISABLE"));
    cluster
        .script("shop", "ALTER SCHEMA one RENAME TO x; ALTER SCHEMA two RENAME TO one; ALTER SCHEMA x RENAME TO two;");
    cluster.script("shop", &triggers("ENABLE ALWAYS"));
    assert_eq!(decoded(&cluster, &rows(3)), "one:unresolved two:unresolved");
    // Another change of the schema does not make it right.
    cluster.script("shop", "ALTER SCHEMA one OWNER TO pg_database_owner");
    assert_eq!(decoded(&cluster, &rows(4)), "one:unresolved two:unresolved");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM coffer.snapshot('acme')"), "0");
    let doctor = "SELECT string_agg(check_name || ' ' || (found ~ 'is not the schema') || ' ' || (fix ~ 'if it was renamed'), ', ' ORDER BY check_name)
                  FROM coffer.doctor() WHERE check_name ~ '^schema'";
    assert_eq!(cluster.psql("shop", doctor), "schema one true true, schema two true true");
    cluster.script("shop", "SELECT coffer.add_schema('one', 'acme'); SELECT coffer.add_schema('two', 'globex');");
    assert_eq!(decoded(&cluster, &rows(5)), "one:acme two:globex");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM coffer.doctor() WHERE check_name ~ '^schema'"), "0");
    // A schema that was dropped unheard of leaves a rule that only its name ends.
    cluster.script("shop", &format!("{} DROP SCHEMA two CASCADE; {}", triggers("DISABLE"), triggers("ENABLE ALWAYS")));
    assert_eq!(
        cluster.psql("shop", "SELECT found ~ 'there is none' FROM coffer.doctor() WHERE check_name ~ '^schema'"),
        "t"
    );
    cluster.psql("shop", "SELECT * FROM coffer.remove_schema('two')");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM coffer.schema_rules"), "1");
}
