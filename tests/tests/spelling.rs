//! Names and keys that look like others: a tenant is its text, and a name in a statement of ours is what it is in
//! `pg_catalog`, whoever writes and under whatever settings.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;

on_majors! {
    tenants_of_equal_values: tenants_of_equal_values;
    names_of_another_schema: names_of_another_schema;
}

const DDL: &str = "
CREATE TABLE a (tenant text NOT NULL, id int, PRIMARY KEY (tenant, id));
CREATE TABLE b (tenant int NOT NULL, id int, PRIMARY KEY (tenant, id));
CREATE TABLE below (id int PRIMARY KEY, b_tenant int NOT NULL, b_id int NOT NULL, FOREIGN KEY (b_tenant, b_id) REFERENCES b);
CREATE TABLE claimed (id int PRIMARY KEY, v text);
SELECT coffer.add_table('a', 'tenant'); SELECT coffer.add_table('b', 'tenant'); SELECT coffer.add_table('below', parent => 'b'); SELECT coffer.add_table('claimed');
";

fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    cluster
}

/// '007' and 7 are two tenants: what is restored of the one touches nothing of the other.
fn tenants_of_equal_values(major: u32) {
    let cluster = database(major);
    cluster.script(
        "shop",
        "INSERT INTO a VALUES ('007', 1), ('007', 2), ('7', 1);
         INSERT INTO b VALUES (7, 1), (7, 2); INSERT INTO below VALUES (1, 7, 1);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["007", "7"]);
    let snapshot =
        "SELECT string_agg(relation || row_data, ' ' ORDER BY relation, row_data::text) FROM coffer.snapshot('007')";
    assert_eq!(
        cluster.psql("shop", snapshot),
        r#"public.a{"id": 1, "tenant": "007"} public.a{"id": 2, "tenant": "007"}"#,
        "rows of tenant 7 are not those of tenant 007"
    );
    cluster.script("shop", "SELECT coffer.restore_point('good'); DELETE FROM a WHERE tenant = '007' AND id = 2;");
    let everything = "SELECT (SELECT string_agg(a::text, ' ' ORDER BY a) FROM a), (SELECT count(*) FROM b), (SELECT count(*) FROM below)";
    agent.json(&restored::in_place("007", "name:good"));
    assert_eq!(cluster.psql("shop", everything), "(007,1) (007,2) (7,1)|2|1");
    // The other way round nothing is left out.
    cluster.script("shop", "DELETE FROM below; DELETE FROM b WHERE id = 1; DELETE FROM a WHERE tenant = '7';");
    agent.json(&restored::in_place("7", "name:good"));
    assert_eq!(cluster.psql("shop", everything), "(007,1) (007,2) (7,1)|2|1");
    let live = agent.json(&["verify", "--against-live"]);
    assert_eq!(live["ok"], true, "{live}");
}

/// Who writes a row runs nothing of their own with the rights of the extension's owner, or of the tables'.
fn names_of_another_schema(major: u32) {
    let cluster = database(major);
    cluster.script(
        "shop",
        "INSERT INTO b VALUES (7, 1);
         CREATE ROLE mallory; CREATE SCHEMA mallory AUTHORIZATION mallory;
         GRANT SELECT, INSERT, UPDATE, DELETE ON a, b, below, claimed TO mallory;
         SET ROLE mallory;
         CREATE TABLE mallory.seen (who name);
         CREATE FUNCTION mallory.spy() RETURNS bool LANGUAGE plpgsql AS $$BEGIN
             INSERT INTO mallory.seen VALUES (current_user); RETURN true; END$$;
         CREATE FUNCTION mallory.array_to_string(pg_catalog.text[], pg_catalog.text) RETURNS pg_catalog.text LANGUAGE sql
             AS $$SELECT CASE WHEN mallory.spy() THEN pg_catalog.array_to_string($1, $2) END$$;
         CREATE FUNCTION mallory.same(pg_catalog.text, pg_catalog.text) RETURNS bool LANGUAGE sql
             AS $$SELECT mallory.spy() AND $1 OPERATOR(pg_catalog.=) $2$$;
         CREATE FUNCTION mallory.same(pg_catalog.oid, pg_catalog.oid) RETURNS bool LANGUAGE sql
             AS $$SELECT mallory.spy() AND $1 OPERATOR(pg_catalog.=) $2$$;
         CREATE OPERATOR mallory.= (FUNCTION = mallory.same, LEFTARG = pg_catalog.text, RIGHTARG = pg_catalog.text);
         CREATE OPERATOR mallory.= (FUNCTION = mallory.same, LEFTARG = pg_catalog.oid, RIGHTARG = pg_catalog.oid);
         CREATE DOMAIN mallory.text AS pg_catalog.text CHECK (mallory.spy());
         CREATE DOMAIN mallory.oid AS pg_catalog.oid CHECK (mallory.spy());
         CREATE DOMAIN mallory.int4 AS pg_catalog.int4 CHECK (mallory.spy());",
    );
    for path in ["mallory", "mallory, pg_catalog"] {
        cluster.script(
            "shop",
            &format!(
                "SET ROLE mallory; SET search_path = {path}; SET coffer.tenant = '7';
                 INSERT INTO public.below VALUES (1, 7, 1); UPDATE public.below SET b_id = 1; DELETE FROM public.below;
                 INSERT INTO public.claimed VALUES (1, 'v'); UPDATE public.claimed SET v = 'w'; DELETE FROM public.claimed;
                 INSERT INTO public.below VALUES (1, 7, 1);
                 UPDATE public.b SET id = id; DELETE FROM public.below;"
            ),
        );
    }
    assert_eq!(
        cluster.psql("shop", "SELECT string_agg(DISTINCT who, ' ') FROM mallory.seen WHERE who <> 'mallory'"),
        ""
    );
    // A partition that somebody else makes of a table under a path gets the triggers of the root.
    cluster.script(
        "shop",
        "CREATE TABLE tree (id int, b_tenant int NOT NULL, b_id int NOT NULL, PRIMARY KEY (id), FOREIGN KEY (b_tenant, b_id) REFERENCES b)
             PARTITION BY RANGE (id);
         SELECT coffer.add_table('tree', parent => 'b'); ALTER TABLE tree OWNER TO mallory; GRANT REFERENCES ON b TO mallory;
         GRANT CREATE ON SCHEMA public TO mallory;
         SET ROLE mallory; CREATE TABLE tree_1 PARTITION OF tree FOR VALUES FROM (0) TO (10); INSERT INTO tree VALUES (1, 7, 1);",
    );
}
