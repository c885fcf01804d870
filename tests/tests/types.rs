//! Every built-in type with its edge values goes through a base and through the stream and comes back as it was.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Scratch};
use coffer_tests::truth::{self, Watched};
use coffer_tests::{block_on, wait_for};

on_majors! {
    edge_values: edge_values;
    shapes: shapes;
    encodings: encodings;
    tenants_of_no_encoding: tenants_of_no_encoding;
    tenant_columns: tenant_columns;
}

/// Types of the application's own that the list below uses.
const OWN_TYPES: &str = r#"
CREATE TYPE mood AS ENUM ('sad', 'ok', 'it''s, "fine"', '');
CREATE TYPE pair AS (a int, b text);
CREATE TYPE nest AS (p pair, ps pair[], at timestamptz, "odd ""name" mood);
CREATE DOMAIN short AS text CHECK (length(VALUE) <= 5);
CREATE DOMAIN pairs AS pair[];
CREATE TYPE textrange AS RANGE (subtype = text);
"#;

/// Type, whether it can be a key, its values as SQL. NULL is added to all of them.
fn values(major: u32) -> Vec<(&'static str, bool, Vec<String>)> {
    let mut all = vec![
        ("boolean", true, vec!["true", "false"]),
        ("smallint", true, vec!["-32768", "32767", "0"]),
        ("int", true, vec!["-2147483648", "2147483647", "0"]),
        ("bigint", true, vec!["-9223372036854775808", "9223372036854775807", "0"]),
        (
            "numeric",
            true,
            vec![
                "'NaN'",
                "'Infinity'",
                "'-Infinity'",
                "0",
                "0.000",
                "1.0",
                "-0.10",
                "repeat('9', 1000)::numeric",
                "('0.' || repeat('0', 500) || '1')::numeric",
                "1e131071",
                "12345678901234567890.12345678901234567890",
            ],
        ),
        ("numeric(12,3)", true, vec!["1", "-999999999.999"]),
        ("numeric(5,-2)", true, vec!["12345", "100"]),
        ("real", true, vec!["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "1e-45", "3.4028235e38", "0.1"]),
        (
            "double precision",
            true,
            vec![
                "'NaN'",
                "'Infinity'",
                "'-Infinity'",
                "'-0'",
                "4.9e-324",
                "1.7976931348623157e308",
                "0.1",
                "0.30000000000000004",
                "1e15",
                "1e16",
                "123456789012345680",
            ],
        ),
        ("money", true, vec!["'-92233720368547758.08'", "'92233720368547758.07'", "0", "'-0.01'"]),
        ("\"char\"", true, vec!["'a'", "''", "'\\'", "E'\\x01'"]),
        ("name", true, vec!["'n'", "''", "repeat('ж', 31)"]),
        (
            "text",
            true,
            vec![
                "''",
                "'\\N'",
                "E'\\\\.'",
                "E'\\t\\n\\r\\b\\f\\v\\x01\\x7f\\x1b'",
                "'é日🦀'",
                "E'e\\u0301'",
                "'  '",
                "E'line\\nline\\r\\n'",
                "E'back\\\\slash\\\\'",
                "repeat('long ', 500)",
                "'NULL'",
                "'\"'",
                "'\u{feff}bom'",
            ],
        ),
        ("varchar(5)", true, vec!["''", "'é日🦀ab'", "'a    '"]),
        ("char(5)", true, vec!["''", "'a'", "'  b'"]),
        (
            "bytea",
            true,
            vec![
                "''",
                "'\\x00'",
                "'\\xff5c4e0a09'",
                "decode(repeat('ab', 1000), 'hex')",
                "(SELECT string_agg(decode(lpad(to_hex(i), 2, '0'), 'hex'), ''::bytea ORDER BY i) FROM generate_series(0, 255) i)",
            ],
        ),
        ("bit(3)", true, vec!["B'101'", "B'000'"]),
        ("bit varying", true, vec!["B''", "B'1'", "repeat('10', 500)::varbit"]),
        (
            "date",
            true,
            vec!["'infinity'", "'-infinity'", "'4714-11-24 BC'", "'5874897-12-31'", "'0001-01-01 BC'", "'2000-02-29'"],
        ),
        ("time", true, vec!["'24:00:00'", "'00:00:00'", "'12:34:56.789012'"]),
        ("time(2)", true, vec!["'12:34:56.789012'"]),
        ("timetz", true, vec!["'24:00:00-15:59'", "'00:00:00.000001+15:59:59'"]),
        (
            "timestamp",
            true,
            vec![
                "'infinity'",
                "'-infinity'",
                "'4714-11-24 00:00:00 BC'",
                "'294276-12-31 23:59:59.999999'",
                "'2000-01-01 00:00:00.1'",
            ],
        ),
        (
            "timestamptz",
            true,
            vec![
                "'infinity'",
                "'-infinity'",
                "'4714-11-24 00:00:00Z BC'",
                "'294276-12-31 23:59:59.999999Z'",
                "'1883-11-18 12:00:00 America/New_York'",
            ],
        ),
        (
            "interval",
            true,
            vec![
                "'178000000 years'",
                "'-178000000 years'",
                "'1 mon -1 day 00:00:00.000001'",
                "'0'",
                "'-1 year -2 mons +3 days -04:05:06.07'",
            ],
        ),
        (
            "json",
            false,
            vec![
                r#"'{"a": "\u00e9\n\"\\/", "a":  1, "b" : [ ] }'"#,
                r#"'"\u0000"'"#,
                "'null'",
                "' 1.50e+3 '",
                r#"'"\ud83d\ude00"'"#,
                "E'{\"k\":\\n\\t\"v\"}'",
            ],
        ),
        ("jsonb", true, vec![r#"'{"b":"\u00e9\n\"\\","a":[1.50,null,{}]}'"#, "'null'", "'1e400'", "'\"\"'", "'[]'"]),
        ("jsonpath", false, vec!["'$.a[*] ? (@ > 1 && @.b like_regex \"^x\")'", "'strict $.\"k\\\"\"'"]),
        ("tsvector", true, vec!["$$'a':1A,2B 'it''s':3 'b\\\\c':16383$$", "''", "'ж日'"]),
        ("tsquery", true, vec!["$$'a' & !('b':*A | 'c') <2> 'it''s'$$", "''"]),
        ("inet", true, vec!["'::ffff:1.2.3.4/96'", "'192.168.0.1/24'", "'2001:db8::1'", "'0.0.0.0/0'"]),
        ("cidr", true, vec!["'10.0.0.0/8'", "'2001:db8::/32'", "'1.2.3.4'"]),
        ("macaddr", true, vec!["'08:00:2b:01:02:03'"]),
        ("macaddr8", true, vec!["'08:00:2b:01:02:03:04:05'"]),
        ("point", false, vec!["'(1e308,-0)'", "'(NaN,Infinity)'", "'(0.1,0.30000000000000004)'"]),
        ("line", false, vec!["'{1,-1,0}'"]),
        ("lseg", false, vec!["'[(0,0),(1e-300,2)]'"]),
        ("box", false, vec!["'(2,2),(-1,-1)'"]),
        ("path", false, vec!["'((0,0),(1,1),(2,0))'", "'[(0,0),(1,1)]'"]),
        ("polygon", false, vec!["'((0,0),(1,1),(2,0))'"]),
        ("circle", false, vec!["'<(0,0),0>'", "'<(1.5,-2),Infinity>'"]),
        ("uuid", true, vec!["'00000000-0000-0000-0000-000000000000'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'"]),
        ("pg_lsn", true, vec!["'0/0'", "'FFFFFFFF/FFFFFFFF'"]),
        ("xid", false, vec!["'4294967295'", "'0'"]),
        ("xid8", true, vec!["'18446744073709551615'", "'0'"]),
        ("cid", false, vec!["'4294967295'"]),
        ("tid", true, vec!["'(4294967295,65535)'", "'(0,0)'"]),
        ("oid", true, vec!["4294967295", "0"]),
        ("oidvector", true, vec!["'1 2 3'", "''"]),
        ("int2vector", false, vec!["'1 -2 3'", "''"]),
        ("regclass", false, vec!["'pg_class'", "0"]),
        ("regtype", false, vec!["'integer'", "'timestamp with time zone'", "0"]),
        ("regproc", false, vec!["'pg_catalog.pg_backend_pid'"]),
        ("regprocedure", false, vec!["'pg_catalog.lower(text)'"]),
        ("regoper", false, vec!["'pg_catalog.||/'"]),
        ("regoperator", false, vec!["'+(integer,integer)'"]),
        ("regnamespace", false, vec!["'pg_catalog'", "'public'"]),
        ("regrole", false, vec!["'postgres'"]),
        ("regconfig", false, vec!["'english'"]),
        ("regdictionary", false, vec!["'simple'"]),
        ("regcollation", false, vec!["'\"C\"'"]),
        ("pg_snapshot", false, vec!["'10:20:10,14,15'"]),
        ("txid_snapshot", false, vec!["'10:20:10,14,15'"]),
        ("refcursor", false, vec!["'a cursor'"]),
        ("aclitem", false, vec!["'postgres=r*w/postgres'"]),
        ("int[]", true, vec!["'{}'", "'{{1,NULL},{3,4}}'", "'[2:3]={1,2}'", "'{NULL}'"]),
        (
            "text[]",
            true,
            vec![
                r#"'{}'"#,
                r#"'{"",NULL,"NULL","a,b","{}","\"\\"}'"#,
                "ARRAY[E'tab\\t', E'nl\\n', '\\N', ' sp ']",
                "'[-1:0][2:2]={{a},{b}}'",
            ],
        ),
        ("bytea[]", true, vec!["ARRAY['\\x00ff'::bytea, '']"]),
        ("timestamptz[]", true, vec!["ARRAY['infinity'::timestamptz, NULL, '2000-01-01Z']"]),
        ("json[]", false, vec![r#"ARRAY['{"a": "b,c"}'::json, '"\\"', NULL]"#]),
        ("pair", true, vec!["ROW(1, 'x')", "ROW(NULL, NULL)", "ROW(0, '')", r#"ROW(-1, E'q"uo,te\\ (p)\n')"#]),
        (
            "nest",
            true,
            vec![
                "ROW(ROW(1, 'a,b'), ARRAY[ROW(2, '\"')::pair, NULL], 'infinity', 'ok')",
                "ROW(NULL, '{}', NULL, NULL)",
                "ROW(ROW(NULL, E'\\\\'), ARRAY[ROW(NULL, NULL)::pair], '2000-01-01Z', 'it''s, \"fine\"')",
            ],
        ),
        ("mood", true, vec!["'sad'", "'it''s, \"fine\"'", "''"]),
        ("mood[]", true, vec!["ARRAY['ok', NULL, 'it''s, \"fine\"', '']::mood[]"]),
        ("short", true, vec!["'abcde'", "''"]),
        ("pairs", false, vec!["ARRAY[ROW(1, 'x')]::pair[]", "'{}'"]),
        ("int4range", true, vec!["'empty'", "'[1,5)'", "'(,)'", "'[-2147483648,0]'"]),
        ("int8range", true, vec!["'[1,)'"]),
        ("numrange", true, vec!["'(1.50,2.5]'", "'[NaN,)'"]),
        ("daterange", true, vec!["'[-infinity,infinity]'"]),
        ("tsrange", true, vec!["'[2000-01-01 00:00,infinity)'"]),
        ("tstzrange", true, vec!["'[\"2000-01-01 00:00:00+00\",]'"]),
        ("textrange", true, vec![r#"'["a b","c\"d"]'"#, r#"'["",)'"#]),
        ("int4multirange", true, vec!["'{}'", "'{[1,2),[5,6)}'"]),
        ("nummultirange", true, vec!["'{(,1.0],[3.50,)}'"]),
        ("hstore", true, vec![r#"'"a"=>NULL, "b"=>"", "c\"d"=>"=>,"'"#, "''"]),
        ("citext", true, vec!["'Abc'", "'aBD'"]),
    ];
    if major == 15 {
        // The wheel of 18 is built without libxml.
        all.push((
            "xml",
            false,
            vec![
                "'<a b=\"c\">&lt;x&gt; &#233; é</a>'",
                "'text<b/>text'",
                "''",
                "'<?xml version=\"1.0\" standalone=\"yes\"?><ü><![CDATA[ ]]&gt; ]]></ü>'",
            ],
        ));
    } else {
        all.push(("interval", true, vec!["'infinity'", "'-infinity'"]));
        all.push(("\"char\"", true, vec!["'\\377'"]));
    }
    all.into_iter()
        .map(|(ty, key, values)| (ty, key, values.into_iter().map(|v| format!("({v})::{ty}")).collect()))
        .collect()
}

/// hstore and citext are contrib modules: they are there or they are not.
fn has(cluster: &Cluster, extension: &str) -> bool {
    cluster.psql("postgres", &format!("SELECT count(*) FROM pg_available_extensions WHERE name = '{extension}'")) == "1"
}

fn edge_values(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        let mut ddl = String::from(OWN_TYPES);
        let mut types = values(major);
        for contrib in ["hstore", "citext"] {
            if has(&cluster, contrib) {
                ddl.push_str(&format!("CREATE EXTENSION {contrib};"));
            } else {
                println!("PostgreSQL {major} has no {contrib} here");
                types.retain(|(ty, _, _)| *ty != contrib);
            }
        }
        // Per type: one table with a key beside it, one keyed by it, one without any key.
        let (mut tables, mut before, mut after) = (Vec::new(), String::new(), String::new());
        for (n, (ty, key, values)) in types.iter().enumerate() {
            let (plain, keyed, free) = (format!("ty_{n}"), format!("key_{n}"), format!("free_{n}"));
            ddl.push_str(&format!(
                "CREATE TABLE {plain} (tenant int NOT NULL, id int, v {ty}, w text, PRIMARY KEY (tenant, id));"
            ));
            ddl.push_str(&format!("CREATE TABLE {free} (tenant int NOT NULL, v {ty}, w text);"));
            tables.extend([plain.clone(), free.clone()]);
            if *key {
                ddl.push_str(&format!(
                    "CREATE TABLE {keyed} (v {ty}, tenant int NOT NULL, w text, PRIMARY KEY (tenant, v));"
                ));
                tables.push(keyed.clone());
            }
            let nulls = [&values[..], &["NULL".to_owned()]].concat();
            for (i, v) in nulls.iter().enumerate() {
                let next = &nulls[(i + 1) % nulls.len()];
                before.push_str(&format!("INSERT INTO {plain} VALUES (1, {i}, {v}, 'base'), (2, {i}, {v}, 'base');\n"));
                before.push_str(&format!(
                    "INSERT INTO {free} VALUES (1, {v}, 'base'), (1, {v}, 'base'), (2, {v}, 'base');\n"
                ));
                after.push_str(&format!("INSERT INTO {plain} VALUES (1, 100 + {i}, {v}, 'stream');\n"));
                after.push_str(&format!("UPDATE {plain} SET v = {next} WHERE tenant = 1 AND id = {i};\n"));
                after.push_str(&format!("UPDATE {plain} SET w = 'touched' WHERE tenant = 2 AND id = {i};\n"));
                after.push_str(&format!("INSERT INTO {free} VALUES (1, {v}, 'stream');\n"));
                if *key && v != "NULL" {
                    before.push_str(&format!(
                        "INSERT INTO {keyed} VALUES ({v}, 1, 'base'), ({v}, 2, 'base') ON CONFLICT DO NOTHING;\n"
                    ));
                    after.push_str(&format!("INSERT INTO {keyed} VALUES ({v}, 3, 'stream') ON CONFLICT DO NOTHING;\n"));
                }
            }
            // Without a key every row is told apart by its whole image, which goes through the type as well.
            after.push_str(&format!("UPDATE {free} SET w = 'touched' WHERE tenant = 2;\n"));
            after.push_str(&format!(
                "DELETE FROM {free} WHERE ctid = (SELECT min(ctid) FROM {free} WHERE tenant = 1);\n"
            ));
            if *key {
                after.push_str(&format!("UPDATE {keyed} SET w = 'touched' WHERE tenant IN (1, 3);\n"));
                after.push_str(&format!("DELETE FROM {keyed} WHERE tenant = 2 AND v = {};\n", values[0]));
            }
            if *ty == "numeric" {
                // Equal to the type, different in text: still a change of the key as it is written.
                after.push_str(&format!("UPDATE {keyed} SET v = 1.00 WHERE tenant = 1 AND v = 1;\n"));
            }
        }
        cluster.script("shop", &ddl);
        let mut add = String::new();
        for t in &tables {
            add.push_str(&format!("SELECT * FROM coffer.add_table('{t}', 'tenant');"));
        }
        cluster.script("shop", &add);
        cluster.script("shop", &before);
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        let watched: Vec<Watched> = tables.iter().map(|t| Watched::new(t, "tenant")).collect();
        let mut db = cluster.connect("shop").await;
        let base = truth::take(&mut db, &watched, "base").await;
        cluster.script("shop", &after);
        let stream = truth::take(&mut db, &watched, "stream").await;

        let scratch = Scratch::new(&cluster, &ddl).await;
        let mut wrong = Vec::new();
        for (truth, tenants) in [(&base, &["1", "2"][..]), (&stream, &["1", "2", "3"][..])] {
            for tenant in tenants {
                wrong.extend(scratch.check(&agent, truth, &watched, tenant).await);
                wrong.extend(Database::check(&agent, &cluster, truth, &watched, tenant).await);
            }
        }
        for w in &mut wrong {
            if let Some((ty, _, _)) =
                w.split(['_', ' ']).nth(1).and_then(|n| n.parse::<usize>().ok()).and_then(|n| types.get(n))
            {
                w.insert_str(0, &format!("{ty}: "));
            }
        }
        assert!(wrong.is_empty(), "{} differences: {wrong:#?}", wrong.len());

        // In place too, which compares live values with archived ones: nothing differs, so nothing is written.
        let done = agent.json(&restored::in_place("1", "name:stream"));
        for t in done["tables"].as_array().expect("tables") {
            let changed = ["inserted", "updated", "deleted"].map(|k| t[k].as_u64().unwrap_or(0));
            assert_eq!(changed, [0, 0, 0], "an in-place restore to where it is would change {t}");
        }
        let mut wipe = String::new();
        for t in &tables {
            wipe.push_str(&format!("DELETE FROM {t} WHERE tenant = 2;"));
        }
        cluster.script("shop", &wipe);
        agent.json(&restored::in_place("2", "name:stream"));
        let wrong = stream.differences(&db, &watched, "2").await;
        assert!(wrong.is_empty(), "in place: {wrong:#?}");
        println!("PostgreSQL {major}: {} types, {} tables", types.len(), tables.len());
    });
}

/// Tables whose columns are more than values: generated, identity, dropped, added, renamed, of another type.
fn shapes(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE gen (tenant int NOT NULL, id int GENERATED ALWAYS AS IDENTITY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED,
               PRIMARY KEY (tenant, id));
             CREATE TABLE dropped (tenant int NOT NULL, gone text, id int, v text, PRIMARY KEY (tenant, id));
             CREATE TABLE added (tenant int NOT NULL, id int, PRIMARY KEY (tenant, id));
             CREATE TABLE renamed (tenant int NOT NULL, id int, old text, PRIMARY KEY (tenant, id));
             CREATE TABLE retyped (tenant int NOT NULL, id int, v int, PRIMARY KEY (tenant, id));
             CREATE TABLE empty (tenant int NOT NULL, id int, PRIMARY KEY (tenant, id));
             ALTER TABLE dropped DROP COLUMN gone;
             INSERT INTO gen (tenant, v) SELECT 1 + i % 2, i FROM generate_series(1, 10) i;
             INSERT INTO dropped SELECT 1 + i % 2, i, 'd' FROM generate_series(1, 10) i;
             INSERT INTO added SELECT 1 + i % 2, i FROM generate_series(1, 10) i;
             ALTER TABLE added ADD COLUMN early text DEFAULT 'before the base';
             INSERT INTO renamed SELECT 1 + i % 2, i, 'r' FROM generate_series(1, 10) i;
             INSERT INTO retyped SELECT 1 + i % 2, i, i FROM generate_series(1, 10) i;",
        );
        let tables = ["gen", "dropped", "added", "renamed", "retyped", "empty"];
        for t in tables {
            cluster.psql("shop", &format!("SELECT * FROM coffer.add_table('{t}', 'tenant')"));
        }
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        let watched: Vec<Watched> = tables.iter().map(|t| Watched::new(t, "tenant")).collect();
        let mut db = cluster.connect("shop").await;
        let before = truth::take(&mut db, &watched, "before").await;
        cluster.script(
            "shop",
            "UPDATE gen SET v = v + 1 WHERE id % 2 = 0; INSERT INTO gen (tenant, v) VALUES (1, 100);
             UPDATE dropped SET v = 'x' WHERE id = 3;
             ALTER TABLE added ADD COLUMN late numeric DEFAULT 1.50; UPDATE added SET late = 2 WHERE id = 4;
             INSERT INTO added VALUES (1, 99, 'e', NULL);
             ALTER TABLE renamed RENAME COLUMN old TO new; UPDATE renamed SET new = 'n' WHERE id = 5;
             ALTER TABLE dropped ADD COLUMN gone text; UPDATE dropped SET gone = 'back' WHERE id = 6;",
        );
        let after = truth::take(&mut db, &watched, "after").await;
        let mut wrong = Vec::new();
        for tenant in ["1", "2"] {
            wrong.extend(Database::check(&agent, &cluster, &before, &watched, tenant).await);
            // The tables as they are now can be rebuilt from what was known at the point.
            wrong.extend(Database::check(&agent, &cluster, &after, &watched, tenant).await);
        }
        assert!(wrong.is_empty(), "{wrong:#?}");

        // A rewrite.
        cluster.script("shop", "ALTER TABLE retyped ALTER v TYPE text USING 'n' || v; UPDATE retyped SET v = 'u' WHERE id = 7; VACUUM FULL added;");
        // Closed until the new base of the table whose type changed.
        let mut n = 0;
        wait_for("a window after the rewrite", 120, || {
            n += 1;
            cluster.psql("shop", &format!("SELECT coffer.restore_point('rewritten {n}')"));
            let out = restored::Out::new();
            let done = agent.coffer(&restored::args("1", &format!("name:rewritten {n}"), "files", out.arg()));
            assert!(matches!(done.status.code(), Some(0 | 4)), "{}", String::from_utf8_lossy(&done.stderr));
            done.status.success().then_some(())
        });
        let rewritten = truth::take(&mut db, &watched, "rewritten").await;
        for tenant in ["1", "2"] {
            wrong.extend(Database::check(&agent, &cluster, &rewritten, &watched, tenant).await);
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}

/// Tenant columns, and keys, of types whose cast to text is something else than what the server writes. The tenant is what it
/// writes, whoever asks: the stream, a base, a trigger, a fence, a restore in place.
fn tenant_columns(major: u32) {
    // Type, two tenants as the server writes them.
    const CASES: [(&str, [&str; 2]); 4] = [
        ("bool", ["t", "f"]),
        ("char(6)", ["acme  ", "beta  "]),
        ("address", ["10.0.0.1", "fe80::/64"]),
        ("bit(3)", ["101", "110"]),
    ];
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        let (mut ddl, mut add) = (String::from("CREATE DOMAIN address AS inet;"), String::new());
        let (mut before, mut after, mut spoil) = (String::new(), String::new(), String::new());
        let mut watched = Vec::new();
        for (n, (ty, tenants)) in CASES.iter().enumerate() {
            ddl.push_str(&format!(
                "CREATE TABLE ident_{n} (tenant {ty} NOT NULL, id int, v text, w {ty}, UNIQUE (id), PRIMARY KEY (tenant, id));
                 CREATE TABLE top_{n} (id int PRIMARY KEY, tenant {ty} NOT NULL, v text);
                 CREATE TABLE below_{n} (id int PRIMARY KEY, up int NOT NULL REFERENCES top_{n} ON DELETE CASCADE, v text);"
            ));
            add.push_str(&format!(
                "SELECT coffer.add_table('ident_{n}', 'tenant'), coffer.add_table('top_{n}', 'tenant');
                 SELECT coffer.add_table('below_{n}', parent => 'top_{n}');"
            ));
            watched.push(Watched::new(&format!("ident_{n}"), "format('%s', t.tenant)"));
            watched.push(Watched::new(&format!("top_{n}"), "format('%s', t.tenant)"));
            let up = format!("(SELECT format('%s', u.tenant) FROM top_{n} u WHERE u.id = t.up)");
            watched.push(Watched::new(&format!("below_{n}"), &up));
            for (i, t) in tenants.iter().enumerate() {
                for (script, at) in [(&mut before, 0), (&mut after, 10)] {
                    let id = 20 * i + at;
                    script.push_str(&format!(
                        "INSERT INTO ident_{n} VALUES ('{t}', {id}, 'one'), ('{t}', {id} + 1, 'two');
                         INSERT INTO top_{n} VALUES ({id}, '{t}', 'one'), ({id} + 1, '{t}', 'two');
                         INSERT INTO below_{n} VALUES ({id}, {id}, 'one'), ({id} + 1, {id} + 1, 'two'), ({id} + 2, {id}, 'three');"
                    ));
                }
            }
            after.push_str(&format!(
                "UPDATE below_{n} SET v = 'touched' WHERE id % 10 = 1; DELETE FROM below_{n} WHERE id = 2;
                 UPDATE top_{n} SET tenant = '{}' WHERE id = 1; DELETE FROM top_{n} WHERE id = 20;
                 UPDATE ident_{n} SET tenant = '{}' WHERE id = 1;",
                tenants[1], tenants[1]
            ));
            spoil.push_str(&format!(
                "DELETE FROM top_{n} WHERE id = 10; DELETE FROM below_{n} WHERE id = 11; UPDATE ident_{n} SET v = 'spoilt' WHERE id = 0;
                 INSERT INTO below_{n} VALUES (90, 0, 'too many'); DELETE FROM ident_{n} WHERE id = 10;"
            ));
        }
        // Whose its rows are only the session says, by a key of such types.
        ddl.push_str("CREATE TABLE told (a bool, b char(4), c inet, v text, PRIMARY KEY (a, b, c));");
        add.push_str("SELECT coffer.add_table('told');");
        before.push_str("SET coffer.tenant = 'acme  '; INSERT INTO told VALUES (true, 'x', '10.0.0.1', 'base');");
        after.push_str("SET coffer.tenant = 'acme  '; INSERT INTO told VALUES (false, 'y', '::1', 'stream'); UPDATE told SET v = v || '!';");
        spoil.push_str("SET coffer.tenant = 'acme  '; DELETE FROM told WHERE a; UPDATE told SET v = 'spoilt';");
        watched.push(Watched::new("told", "'acme  '"));
        for script in [&ddl, &add, &before] {
            cluster.script("shop", script);
        }
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        let everybody: Vec<&str> = CASES.iter().flat_map(|(_, tenants)| *tenants).collect();
        restored::wait_windows(&mut agent, &everybody);
        let mut db = cluster.connect("shop").await;
        let base = truth::take(&mut db, &watched, "base").await;
        cluster.script("shop", &after);
        let stream = truth::take(&mut db, &watched, "stream").await;
        let scratch = Scratch::new(&cluster, &ddl).await;
        let mut wrong = Vec::new();
        for (n, tenant) in everybody.iter().enumerate() {
            let truth = if n % 2 == 0 { &base } else { &stream };
            wrong.extend(scratch.check(&agent, truth, &watched, tenant).await);
        }
        assert!(wrong.is_empty(), "{} differences: {wrong:#?}", wrong.len());

        let live = agent.json(&["verify", "--against-live"]);
        assert_eq!(live["ok"], true, "{live}");
        cluster.script("shop", &spoil);
        for tenant in &everybody {
            agent.json(&restored::in_place(tenant, "name:stream"));
        }
        for tenant in &everybody {
            wrong.extend(stream.differences(&db, &watched, tenant).await);
            let rows: usize = watched.iter().map(|w| stream.rows(tenant, &w.table).len()).sum();
            let seen = cluster.psql("shop", &format!("SELECT count(*) FROM coffer.snapshot('{tenant}')"));
            if seen != rows.to_string() {
                wrong.push(format!("coffer.snapshot of {tenant}: {seen} rows, should be {rows}"));
            }
        }
        assert!(wrong.is_empty(), "in place: {} differences: {wrong:#?}", wrong.len());

        // The fence of a restore keeps out this tenant, and nobody else. No agent is there to remove what is nobody's.
        agent.stop();
        for (n, (ty, [ours, other])) in CASES.iter().enumerate() {
            let fences = [("ident", "'tenant'"), ("below", "NULL")];
            for (table, column) in fences {
                cluster.psql("shop", &format!("SELECT coffer._agent_fence('{table}_{n}', {column}, '{ours}')"));
            }
            db.batch_execute(&format!("BEGIN; SELECT pg_advisory_xact_lock(6516582, hashtext('{ours}'))"))
                .await
                .expect("the fence's lock");
            for (table, at) in [(format!("ident_{n}"), "id"), (format!("below_{n}"), "up")] {
                let write = |id| format!("SET lock_timeout = '300ms'; UPDATE {table} SET v = v WHERE {at} = {id}");
                let said = cluster.psql_err("shop", &write(0));
                assert!(said.contains("lock timeout"), "{ty}: {table} of {ours}: {said}");
                assert_eq!(cluster.psql("shop", &write(21)), "", "{ty}: {table} of {other}");
            }
            db.batch_execute("COMMIT").await.expect("commit");
            for (table, _) in fences {
                cluster.psql("shop", &format!("SELECT coffer._agent_unfence('{table}_{n}')"));
            }
        }
    });
}

/// Names and tenants that are not ASCII, in tables under `tag` and `path`. psql says it in UTF-8.
const STREETS: &str = r#"SET client_encoding = 'UTF8';
CREATE TABLE "straße" ("nö" text PRIMARY KEY, "mandant é" text, "größe" text);
CREATE TABLE "häuser" (id int PRIMARY KEY, "straße" text NOT NULL REFERENCES "straße" ON DELETE CASCADE ON UPDATE CASCADE, "wörter" text);
SELECT coffer.add_table('"straße"', 'mandant é'); SELECT coffer.add_table('"häuser"', parent => '"straße"');
"#;

/// What a tenant has of them, whatever bytes it is made of.
fn streets(cluster: &Cluster, db: &str, tenant: &str) -> String {
    let bytes = |from: &str| {
        format!(
            "SELECT coalesce(string_agg(x, ' ' ORDER BY x), '') FROM (SELECT encode(convert_to(t::text, getdatabaseencoding()), 'hex') AS x FROM {from}) y;"
        )
    };
    let top = format!("\"straße\" t WHERE \"mandant é\" = '{tenant}'");
    let below = format!("\"häuser\" t WHERE \"straße\" IN (SELECT \"nö\" FROM {top})");
    cluster.script(db, &format!("SET client_encoding = 'UTF8'; {} {}", bytes(&top), bytes(&below)))
}

/// Changes after the bases, a point, and every way back to it.
fn back_to_the_streets(cluster: &Cluster, agent: &Agent, db: &str, text: &str) {
    let utf8 = |sql: &str| cluster.script(db, &format!("SET client_encoding = 'UTF8'; {sql}"));
    utf8(&format!(
        r#"INSERT INTO "straße" VALUES ('ß3', 'süd', {text}), ('ß4', 'öst', 'x');
           UPDATE "straße" SET "größe" = "größe" || {text} WHERE "nö" = 'ß1'; UPDATE "straße" SET "nö" = 'ä1' WHERE "nö" = 'ß1';
           UPDATE "straße" SET "mandant é" = 'öst' WHERE "nö" = 'ß2'; DELETE FROM "häuser" WHERE id = 2;
           INSERT INTO "häuser" VALUES (3, 'ß3', {text}), (4, 'ß4', 'y'); SELECT coffer.restore_point('streets');"#
    ));
    let want = ["süd", "öst"].map(|t| streets(cluster, db, t));
    assert!(want.iter().all(|w| w.lines().count() == 2), "{db}: {want:?}");
    for (tenant, want) in ["süd", "öst"].into_iter().zip(&want) {
        let made = Database::restore(agent, cluster, tenant, "name:streets");
        assert_eq!(streets(cluster, &made.name, tenant), *want, "{db}: {tenant} in a new database");
    }
    utf8(&format!(
        r#"DELETE FROM "straße" WHERE "nö" = 'ß3'; UPDATE "häuser" SET "wörter" = {text} || '?'; INSERT INTO "häuser" VALUES (9, 'ß2', {text});"#
    ));
    let changed = |tenant: &str| {
        let said = agent.json(&["diff", "--tenant", tenant, "--to", "name:streets"]);
        let tables = said["tables"].as_array().expect("tables").clone();
        let counts = tables.iter().flat_map(|t| ["inserted", "updated", "deleted"].map(|k| t[k].as_u64().unwrap_or(0)));
        counts.sum::<u64>()
    };
    assert_eq!([changed("süd"), changed("öst")], [3, 2], "{db}");
    for (tenant, want) in ["süd", "öst"].into_iter().zip(&want) {
        agent.json(&restored::in_place(tenant, "name:streets"));
        assert_eq!(streets(cluster, db, tenant), *want, "{db}: {tenant} in place");
        assert_eq!(changed(tenant), 0, "{db}: {tenant}");
    }
    let live = agent.json(&["verify", "--against-live"]);
    assert_eq!(live["ok"], true, "{db}: {live}");
}

/// Tenants that are not UTF-8, where the server does not ask: nobody's, under an alarm; what is others' is exact.
fn tenants_of_no_encoding(major: u32) {
    let cluster = Cluster::start_with(major, "", &["--locale=C", "-E", "SQL_ASCII"]);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant text NOT NULL, id int, PRIMARY KEY (tenant, id)); SELECT coffer.add_table('t', 'tenant');
         INSERT INTO t VALUES ('a', 1), ('b', 1), (E'a\\xff', 1);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["a", "b"]);
    let point = |name: &str| cluster.psql("shop", &format!("SELECT coffer.restore_point('{name}')"));
    point("before");
    cluster.psql("shop", "INSERT INTO t VALUES ('a', 2), ('b', 2), (E'a\\xff', 2), (E'\\xff', 2)");
    coffer_tests::wait_for("the alarm", 60, || (!agent.alarms("unresolved_rows").is_empty()).then_some(()));
    coffer_tests::wait_for("the window to open again", 60, || {
        let spans = |t| restored::listed(&agent, t)["window"].as_array().map(Vec::len);
        (spans("a") == Some(2) && spans("b") == Some(2)).then_some(())
    });
    cluster.psql("shop", "INSERT INTO t VALUES ('a', 3)");
    point("after");
    for (tenant, name, want) in [("a", "before", "1"), ("a", "after", "1 2 3"), ("b", "after", "1 2")] {
        let made = Database::restore(&agent, &cluster, tenant, &format!("name:{name}"));
        let ids = cluster.psql(&made.name, "SELECT string_agg(id::text, ' ' ORDER BY id) FROM t");
        assert_eq!(ids, want, "{tenant} {name}");
    }
    agent.json(&restored::in_place("a", "name:before"));
    let rows =
        "SELECT string_agg(encode(convert_to(tenant, 'SQL_ASCII'), 'hex') || id, ' ' ORDER BY tenant, id) FROM t";
    assert_eq!(cluster.psql("shop", rows), "611 61ff1 61ff2 621 622 ff2");
    let live = agent.json(&["verify", "--against-live"]);
    assert_eq!(live["ok"], true, "{live}");
    let list = agent.json(&["list"]);
    let names: Vec<_> =
        list["tenants"].as_array().expect("tenants").iter().filter_map(|t| t["tenant"].as_str()).collect();
    assert!(!names.iter().any(|n| n.contains('\u{fffd}')) && names.contains(&"a") && names.contains(&"b"), "{list}");
    assert_eq!(agent.stop(), Some(0));
}

/// Databases that are not UTF-8.
fn encodings(major: u32) {
    let cluster = Cluster::start(major);
    // Name, a literal for the database's own bytes.
    let cases = [
        ("LATIN1", "E'caf\\xe9 \\xff'"),
        ("WIN1251", "E'\\xc6\\xfe'"),
        ("EUC_JP", "E'\\xa4\\xa2\\xb0\\xa1'"),
        ("SQL_ASCII", "E'not UTF-8 \\xe9\\xff \\\\ \\t'"),
    ];
    for (encoding, text) in cases {
        let db = format!("db_{}", encoding.to_lowercase());
        cluster.psql(
            "postgres",
            &format!("CREATE DATABASE {db} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"),
        );
        cluster.script(
            &db,
            "CREATE EXTENSION pg_coffer;
             DO $$BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'coffer_agent') THEN
               CREATE ROLE coffer_agent LOGIN REPLICATION BYPASSRLS; END IF; END$$;
             SELECT coffer.setup_agent('coffer_agent');
             CREATE TABLE t (tenant int NOT NULL, id int, v text, PRIMARY KEY (tenant, id));
             SELECT * FROM coffer.add_table('t', 'tenant');",
        );
        let beyond = matches!(encoding, "LATIN1" | "SQL_ASCII");
        if beyond {
            cluster.script(&db, STREETS);
            cluster.script(
                &db,
                &format!(
                    r#"SET client_encoding = 'UTF8'; INSERT INTO "straße" VALUES ('ß1', 'süd', {text}), ('ß2', 'süd', 'plain');
                       INSERT INTO "häuser" VALUES (1, 'ß1', {text}), (2, 'ß2', 'é');"#
                ),
            );
        }
        let own = format!("SET client_encoding = '{encoding}';");
        cluster.script(&db, &format!("{own} INSERT INTO t VALUES (1, 1, {text}), (1, 2, 'plain');"));
        let mut agent = Agent::new(&Setup::of(&cluster, &db));
        agent.start();
        restored::wait_windows(&mut agent, if beyond { &["1", "süd"][..] } else { &["1"] });
        cluster.script(
            &db,
            &format!("{own} INSERT INTO t VALUES (1, 3, {text} || '!'); UPDATE t SET v = v || {text} WHERE id = 2;"),
        );
        cluster.psql(&db, "SELECT coffer.restore_point('p')");
        let sql = "SET client_encoding = 'SQL_ASCII'; SELECT string_agg(id || ':' || \
                   encode(convert_to(v, getdatabaseencoding()), 'hex'), ' ' ORDER BY id) FROM t";
        let bytes = |db: &str| cluster.script(db, sql);
        let want = bytes(&db);
        let restored = Database::restore(&agent, &cluster, "1", "name:p");
        assert_eq!(
            cluster.psql(
                "postgres",
                &format!("SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = '{}'", restored.name)
            ),
            encoding,
            "a database that the restore creates has the source's encoding"
        );
        assert_eq!(bytes(&restored.name), want, "{encoding}");
        drop(restored);
        if beyond {
            back_to_the_streets(&cluster, &agent, &db, text);
        }
        assert_eq!(agent.stop(), Some(0));
        // One slot name serves all the databases of this test.
        cluster.psql(&db, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots");
    }
}
