//! Names and keys that need quoting, escaping or measuring.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Scratch, quote};
use coffer_tests::truth::{self, Watched};
use coffer_tests::{block_on, wait_for};

on_majors! {
    identifiers: identifiers;
    tenant_keys: tenant_keys;
}

/// A literal in quotes.
fn literal(s: &str) -> String {
    format!("E'{}'", s.replace('\\', "\\\\").replace('\'', "''"))
}

fn identifiers(major: u32) {
    block_on(async {
        // 63 bytes each: the longest that PostgreSQL takes.
        let long_ascii = "L".repeat(63);
        let long_unicode = format!("{}x", "ж".repeat(31));
        assert_eq!(long_unicode.len(), 63);
        let names = [
            "plain",
            "With Space",
            "quote\"d",
            "sla/sh\\es",
            "dots.and.more",
            "..",
            "select",
            "%s%2f$1",
            "it's",
            "new\nline\ttab",
            "Таблица",
            "日本語",
            "e\u{301}combining",
            &long_ascii,
            &long_unicode,
        ];
        let mut ddl = String::new();
        let mut tables = Vec::new();
        for schema in ["public", "Odd \"Schema\" é"] {
            if schema != "public" {
                ddl.push_str(&format!("CREATE SCHEMA {};", quote(schema)));
            }
            for (n, name) in names.iter().enumerate() {
                let table = format!("{}.{}", quote(schema), quote(name));
                // The same name for the table and one of its columns; the tenant column has an odd name too.
                let tenant = if n % 2 == 0 { "tenant" } else { "te\"nant Ж" };
                let (t, c) = (quote(tenant), quote(&format!("{}c", &name[..name.floor_char_boundary(62)])));
                ddl.push_str(&match n % 3 {
                    0 => format!("CREATE TABLE {table} ({t} int NOT NULL, id int, {c} text, PRIMARY KEY ({t}, id));"),
                    1 => format!("CREATE TABLE {table} (id int PRIMARY KEY, {t} int NOT NULL, {c} text);"),
                    _ => format!("CREATE TABLE {table} ({t} int NOT NULL, id int, {c} text);"),
                });
                tables.push((Watched::new(&table, &t), c));
            }
        }
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", &ddl);
        for (w, c) in &tables {
            let (rel, tenant) = (literal(&w.table), literal(&w.tenant_column.trim_matches('"').replace("\"\"", "\"")));
            cluster.psql("shop", &format!("SELECT * FROM coffer.add_table({rel}, {tenant})"));
            let sql = format!(
                "INSERT INTO {} ({}, id, {c}) SELECT 1 + i % 2, i, 'v' || i FROM generate_series(1, 6) i",
                w.table, w.tenant_column
            );
            cluster.script("shop", &sql);
        }
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2"]);
        for (w, c) in &tables {
            let sql = format!(
                "UPDATE {t} SET {c} = 'new' WHERE id = 3; DELETE FROM {t} WHERE id = 2; UPDATE {t} SET id = 99 WHERE id = 5;",
                t = w.table
            );
            cluster.script("shop", &sql);
        }
        let watched: Vec<Watched> = tables.into_iter().map(|(w, _)| w).collect();
        let mut db = cluster.connect("shop").await;
        let truth = truth::take(&mut db, &watched, "a \"point\" / ё").await;
        let scratch = Scratch::new(&cluster, &ddl).await;
        for tenant in ["1", "2"] {
            let mut wrong = scratch.check(&agent, &truth, &watched, tenant).await;
            wrong.extend(Database::check(&agent, &cluster, &truth, &watched, tenant).await);
            assert!(wrong.is_empty(), "{wrong:#?}");
        }
        let table = &watched[3].table;
        cluster.script("shop", &format!("DELETE FROM {table}"));
        agent.json(&restored::in_place("2", &format!("name:{}", truth.name)));
        let wrong = truth.differences(&db, &watched, "2").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}

fn tenant_keys(major: u32) {
    block_on(async {
        let long = "k".repeat(400);
        let texts = [
            "plain",
            "with space",
            " padded ",
            "a/b/c",
            "..",
            ".",
            "~",
            "it's",
            "\"quoted\"",
            "back\\slash",
            "\\N",
            "NULL",
            "new\nline",
            "tab\there",
            "Юникод",
            "日本語",
            "e\u{301}",
            "é",
            "UPPER",
            "upper",
            "%2e%2e",
            "-dash",
            "--tenant",
            "$(id)",
            "*",
            "🦀",
            "shared",
            "unassigned",
            "42",
            &long,
        ];
        let uuids = ["00000000-0000-0000-0000-000000000000", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"];
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        let ddl = "CREATE TABLE t (tenant text NOT NULL, id int, v text, PRIMARY KEY (tenant, id));
             CREATE TABLE u (id int PRIMARY KEY, tenant uuid NOT NULL, v text);
             CREATE TABLE i (tenant bigint NOT NULL, v text);
             CREATE TABLE n (tenant text, id int PRIMARY KEY, v text);";
        cluster.script("shop", ddl);
        for t in ["t", "u", "i", "n"] {
            cluster.psql("shop", &format!("SELECT * FROM coffer.add_table('{t}', 'tenant')"));
        }
        let watched: Vec<Watched> = ["t", "u", "i", "n"].map(|t| Watched::new(t, "tenant")).to_vec();
        // Half of the tenants are born before the base, half after it. The empty key is a tenant, NULL is none.
        let insert = |half: usize| {
            let mut sql = String::new();
            for (n, key) in texts.iter().chain([&""]).enumerate().filter(|(n, _)| n % 2 == half) {
                let key = literal(key);
                sql.push_str(&format!("INSERT INTO t VALUES ({key}, 1, 'one'), ({key}, 2, {key});"));
                sql.push_str(&format!("INSERT INTO n VALUES ({key}, {n}, 'n'), (NULL, 1000 + {n}, 'nobody');"));
            }
            sql.push_str(&format!("INSERT INTO u VALUES ({half}, '{}', 'u');", uuids[half]));
            sql.push_str(&format!("INSERT INTO i VALUES (42, 'x{half}'), ({}, 'y'), (-1, 'z');", i64::MIN));
            cluster.script("shop", &sql);
        };
        insert(0);
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &[texts[0], "42", uuids[0]]);
        insert(1);
        cluster.script(
            "shop",
            "UPDATE t SET v = v || '!' WHERE id = 1; DELETE FROM n WHERE id % 5 = 0; UPDATE i SET v = v || '!';",
        );
        let mut db = cluster.connect("shop").await;
        let truth = truth::take(&mut db, &watched, "p").await;
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let scratch = Scratch::new(&cluster, ddl).await;
        let min = i64::MIN.to_string();
        let numbers = ["-1", &min];
        let mut wrong = Vec::new();
        for key in texts.into_iter().chain([""]).chain(uuids).chain(numbers) {
            assert!(truth.tenants.contains_key(key), "{key:?} has no rows");
            let shown = format!("--tenant={key}");
            let out = restored::Out::new();
            agent.json(&[
                "restore",
                &shown,
                "--to",
                "name:p",
                "--mode",
                "files",
                "--target",
                out.arg(),
                "--wait",
                "60s",
                "--confirm",
            ]);
            scratch.load(&out).await;
            wrong.extend(truth.differences(&scratch.client, &watched, key).await);
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        let list = agent.json(&["list"]);
        let listed: Vec<&str> =
            list["tenants"].as_array().expect("tenants").iter().filter_map(|t| t["tenant"].as_str()).collect();
        for key in truth.tenants.keys() {
            assert!(listed.contains(&key.as_str()), "{key:?} is not listed");
        }
        wait_for("the tenants to register themselves", 60, || {
            let registered = cluster.psql("shop", "SELECT count(*) FROM coffer.tenants WHERE kind = 'normal'");
            (registered == truth.tenants.len().to_string()).then_some(())
        });
    });
}
