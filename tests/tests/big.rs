//! The large cases, each within 512 MiB of the agent's memory and of the restore's.
//!
//! The sizes are those of one major. The other takes the same ways with a twentieth, whose values are still beyond one write of
//! the plugin; a row that COPY does not take cannot be smaller. `COFFER_TEST_BIG` scales the sizes of both, for a look by hand.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Out, Scratch};
use std::time::Instant;

/// The bound of the configuration's default, in KiB.
const LIMIT_KIB: u64 = 512 << 10;

on_majors! {
    a_transaction_of_five_million_rows: a_transaction_of_five_million_rows;
    a_row_of_two_hundred_megabytes: a_row_of_two_hundred_megabytes;
    large_values_that_move: large_values_that_move;
    a_gigabyte_of_large_values_in_a_transaction: a_gigabyte_of_large_values_in_a_transaction;
    ten_thousand_tenants_in_one_table: ten_thousand_tenants_in_one_table;
}

#[test]
fn a_row_beyond_what_copy_takes() {
    beyond_copy(first_major());
}

fn first_major() -> u32 {
    *coffer_tests::majors().first().expect("a major")
}

fn scaled(major: u32, n: u64) -> u64 {
    let default = if major == first_major() { 1.0 } else { 0.05 };
    let scale: f64 = std::env::var("COFFER_TEST_BIG").map_or(default, |v| v.parse().expect("a number"));
    ((n as f64 * scale) as u64).max(1)
}

fn large_cluster(major: u32) -> Cluster {
    Cluster::start_with(major, "max_wal_size = 4GB\nlogical_decoding_work_mem = 256MB\nwal_sender_timeout = 60s\n", &[])
}

fn start(cluster: &Cluster, interval: &str, tenants: &[String]) -> Agent {
    let mut setup = Setup::of(cluster, "shop");
    setup.ship_interval = interval.into();
    let mut agent = Agent::new(&setup);
    agent.start();
    restored::wait_windows(&mut agent, tenants);
    agent
}

fn assert_peak(what: &str, kib: u64) {
    println!("{what}: peak {} MiB", kib >> 10);
    assert!(kib <= LIMIT_KIB, "{what}: {} MiB of memory, the limit is {} MiB", kib >> 10, LIMIT_KIB >> 10);
}

/// Restores a tenant to files under the eye of the kernel: its peak is checked, its output returned.
fn restore(agent: &Agent, what: &str, tenant: &str, to: &str) -> Out {
    let out = Out::new();
    let begun = Instant::now();
    let (done, peak) = agent.coffer_peak(&restored::args(tenant, to, "files", out.arg()));
    assert!(done.status.success(), "{what}: {}", String::from_utf8_lossy(&done.stderr));
    println!("{what}: restored in {:.1} s", begun.elapsed().as_secs_f64());
    assert_peak(&format!("{what}, restore"), peak);
    out
}

fn a_transaction_of_five_million_rows(major: u32) {
    let rows = scaled(major, 5_000_000);
    block_on(async {
        let cluster = large_cluster(major);
        cluster.create_protected_db("shop");
        let ddl = "CREATE TABLE big (tenant int NOT NULL, id bigint, v text, PRIMARY KEY (tenant, id));";
        cluster.script("shop", ddl);
        cluster.psql("shop", "SELECT * FROM coffer.add_table('big', 'tenant')");
        cluster.psql("shop", "INSERT INTO big SELECT t, -t, 'first' FROM generate_series(0, 9) t");
        let tenants: Vec<String> = (0..10).map(|t| t.to_string()).collect();
        let agent = start(&cluster, "1s", &tenants);
        let begun = Instant::now();
        cluster
            .psql("shop", &format!("INSERT INTO big SELECT i % 10, i, md5(i::text) FROM generate_series(1, {rows}) i"));
        println!("{rows} rows committed in {:.0} s", begun.elapsed().as_secs_f64());
        cluster.psql("shop", "SELECT coffer.restore_point('all')");
        let begun = Instant::now();
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '15min')");
        println!("durable {:.0} s after the commit", begun.elapsed().as_secs_f64());
        assert_peak("5 million rows in a transaction, agent", agent.peak_kib());
        let scratch = Scratch::new(&cluster, ddl).await;
        let out = restore(&agent, "5 million rows in a transaction", "4", "name:all");
        assert_eq!(scratch.load(&out).await, rows / 10 + 1);
        let sum = "SELECT count(*), sum(hashtextextended(v, id)) FROM big WHERE tenant = 4";
        assert_eq!(cluster.psql(&scratch.db, sum), cluster.psql("shop", sum));
    });
}

fn a_row_of_two_hundred_megabytes(major: u32) {
    let pieces = scaled(major, 6_553_600);
    block_on(async {
        let cluster = large_cluster(major);
        cluster.create_protected_db("shop");
        let ddl = "CREATE TABLE docs (id int PRIMARY KEY, tenant int NOT NULL, n int, body text);
                   ALTER TABLE docs ALTER body SET STORAGE EXTERNAL;";
        cluster.script("shop", ddl);
        cluster.psql("shop", "SELECT * FROM coffer.add_table('docs', 'tenant')");
        // Text that hardly compresses: 32 bytes a piece.
        let insert = |id: u32| {
            cluster.psql(
                "shop",
                &format!("INSERT INTO docs SELECT {id}, 1, 0, string_agg(md5((i + {id})::text), '') FROM generate_series(1, {pieces}) i"),
            );
        };
        insert(1);
        cluster.psql("shop", "INSERT INTO docs VALUES (10, 2, 0, 'small')");
        let agent = start(&cluster, "1s", &["1".into(), "2".into()]);
        assert_peak("a row of 200 MB, base", agent.peak_kib());
        insert(2);
        cluster.psql("shop", "UPDATE docs SET n = 1");
        cluster.psql("shop", "SELECT coffer.restore_point('both')");
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '15min')");
        assert_peak("a row of 200 MB, agent", agent.peak_kib());
        let scratch = Scratch::new(&cluster, ddl).await;
        let out = restore(&agent, "a row of 200 MB", "1", "name:both");
        assert_eq!(scratch.load(&out).await, 2);
        let sum = "SELECT string_agg(id || ' ' || n || ' ' || length(body) || ' ' || md5(body), ', ' ORDER BY id) FROM docs WHERE tenant = 1";
        let want = cluster.psql("shop", sum);
        assert!(want.contains(&(pieces * 32).to_string()), "{want}");
        assert_eq!(cluster.psql(&scratch.db, sum), want);
    });
}

fn beyond_copy(major: u32) {
    let pieces = scaled(major, 17_600_000);
    block_on(async {
        let cluster = large_cluster(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE DOMAIN scan AS bytea CHECK (octet_length(VALUE) > 0);
             CREATE TABLE docs (tenant int NOT NULL, id int GENERATED ALWAYS AS IDENTITY, note text, page scan, about jsonb,
                nothing text, empty text NOT NULL, code varchar(5), plan text, PRIMARY KEY (tenant, id));
             ALTER TABLE docs ALTER page SET STORAGE EXTERNAL, ALTER plan SET STORAGE EXTERNAL",
        );
        cluster.psql("shop", "SELECT * FROM coffer.add_table('docs', 'tenant')");
        let small = "INSERT INTO docs (tenant, note, page, about, empty) VALUES (1, E'a\\tb', '\\x00', '{}', '')";
        cluster.psql("shop", small);
        let agent = start(&cluster, "1s", &["1".into()]);
        // Above 1 GB as text, since each byte of a bytea takes two digits; with the plan, above 1 GB as it is.
        cluster.psql(
            "shop",
            &format!(
                "INSERT INTO docs (tenant, note, page, about, empty)
                 VALUES (1, repeat(E'\\\\ä\\t\\n', 500000), convert_to(repeat(md5('page'), {pieces}), 'UTF8'), '{{\"a\": [1, \"\\\"\"]}}', '')"
            ),
        );
        cluster.psql(
            "shop",
            &format!("UPDATE docs SET code = 'abcde', plan = repeat(md5('plan'), {pieces}) WHERE about <> '{{}}'"),
        );
        cluster.psql("shop", small);
        cluster.psql("shop", "SELECT coffer.restore_point('wide')");
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '15min')");
        assert_peak("a row beyond COPY, agent", agent.peak_kib());
        let target = cluster.url("postgres", "copy");
        let begun = Instant::now();
        let (done, peak) = agent.coffer_peak(&restored::args("1", "name:wide", "database", &target));
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        println!("a row beyond COPY: restored in {:.1} s", begun.elapsed().as_secs_f64());
        assert_peak("a row beyond COPY, restore", peak);
        let sum = "SELECT string_agg(concat_ws('|', id, md5(note), octet_length(page), md5(page), about, nothing, '<' || empty || '>', code, md5(plan)), ', ' ORDER BY id)
                   FROM docs WHERE tenant = 1";
        let want = cluster.psql("shop", sum);
        assert!(want.contains(&(pieces * 32).to_string()), "{want}");
        assert_eq!(cluster.psql("copy", sum), want);
    });
}

/// Just below the limit for values that a moved row takes along, and just above it.
fn large_values_that_move(major: u32) {
    let below = scaled(major, 255 << 20);
    block_on(async {
        let cluster = large_cluster(major);
        cluster.create_protected_db("shop");
        let ddl = "CREATE TABLE docs (tenant int NOT NULL, id int, n int, body text, PRIMARY KEY (tenant, id));
                   CREATE TABLE tagged (id int PRIMARY KEY, tenant int NOT NULL, n int, body text);
                   ALTER TABLE docs ALTER body SET STORAGE EXTERNAL; ALTER TABLE tagged ALTER body SET STORAGE EXTERNAL;";
        cluster.script("shop", ddl);
        cluster.script(
            "shop",
            &format!(
                "SELECT coffer.add_table('docs', 'tenant'), coffer.add_table('tagged', 'tenant');
                 INSERT INTO docs VALUES (1, 1, 0, repeat('d', {below})), (2, 10, 0, 'small');
                 INSERT INTO tagged VALUES (1, 1, 0, repeat('t', {below})), (10, 2, 0, 'small');"
            ),
        );
        let agent = start(&cluster, "1s", &["1".into(), "2".into()]);
        assert_peak("large values, base", agent.peak_kib());
        cluster.psql("shop", "UPDATE docs SET tenant = 2 WHERE id = 1; UPDATE tagged SET tenant = 2 WHERE id = 1");
        cluster.psql("shop", "SELECT coffer.restore_point('moved')");
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '15min')");
        assert_peak("large values that move, agent", agent.peak_kib());
        let sum = "SELECT string_agg(x, ' ' ORDER BY x) FROM (
                       SELECT concat_ws('/', 'docs', tenant, id, n, length(body), md5(body)) FROM docs
                       UNION ALL SELECT concat_ws('/', 'tagged', tenant, id, n, length(body), md5(body)) FROM tagged) y (x)";
        let want = cluster.psql("shop", sum);
        assert_eq!(want.matches(&below.to_string()).count(), 2, "{want}");
        let scratch = Scratch::new(&cluster, ddl).await;
        let out = restore(&agent, "large values that move", "2", "name:moved");
        assert_eq!(scratch.load(&out).await, 4);
        assert_eq!(cluster.psql(&scratch.db, sum), want);
        let back = Scratch::new(&cluster, ddl).await;
        assert_eq!(back.load(&restore(&agent, "large values that left", "1", "name:moved")).await, 0);
        if major != first_major() {
            return;
        }

        // Above it the value stays behind: refused by row and column, and there again with the next base.
        for table in ["docs", "tagged"] {
            let sql = format!(
                "UPDATE {table} SET body = repeat('x', 257 << 20) WHERE id = 1; UPDATE {table} SET tenant = 3 WHERE id = 1;
                 SELECT coffer.restore_point('above {table}')"
            );
            cluster.script("shop", &sql);
        }
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '15min')");
        assert_peak("values above the limit, agent", agent.peak_kib());
        for table in ["docs", "tagged"] {
            let out = Out::new();
            let done = agent.coffer(&restored::args("3", &format!("name:above {table}"), "files", out.arg()));
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(
                !done.status.success() && said.contains("body") && said.contains("--allow-incomplete"),
                "{table}: {said}"
            );
        }
    });
}

fn a_gigabyte_of_large_values_in_a_transaction(major: u32) {
    let pieces = scaled(major, 3_276_800);
    block_on(async {
        let cluster = large_cluster(major);
        cluster.create_protected_db("shop");
        let ddl = "CREATE TABLE docs (tenant int NOT NULL, id int, body text, PRIMARY KEY (tenant, id));
                   ALTER TABLE docs ALTER body SET STORAGE EXTERNAL;";
        cluster.script("shop", ddl);
        cluster.psql("shop", "SELECT * FROM coffer.add_table('docs', 'tenant')");
        cluster.psql("shop", "INSERT INTO docs VALUES (1, 0, 'first'), (2, 0, 'first')");
        let agent = start(&cluster, "1s", &["1".into(), "2".into()]);
        // Ten values of 100 MB.
        cluster.psql(
            "shop",
            &format!(
                "INSERT INTO docs SELECT 1 + d % 2, d, (SELECT string_agg(md5((i + d)::text), '') FROM generate_series(1, {pieces}) i)
                 FROM generate_series(1, 10) d"
            ),
        );
        cluster.psql("shop", "SELECT coffer.restore_point('all')");
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '15min')");
        assert_peak("a gigabyte of large values, agent", agent.peak_kib());
        let scratch = Scratch::new(&cluster, ddl).await;
        let out = restore(&agent, "a gigabyte of large values", "2", "name:all");
        assert_eq!(scratch.load(&out).await, 6);
        let sum = "SELECT string_agg(id || ' ' || length(body) || ' ' || md5(body), ', ' ORDER BY id) FROM docs WHERE tenant = 2";
        assert_eq!(cluster.psql(&scratch.db, sum), cluster.psql("shop", sum));
    });
}

fn ten_thousand_tenants_in_one_table(major: u32) {
    let tenants = scaled(major, 10_000);
    block_on(async {
        let cluster = large_cluster(major);
        cluster.create_protected_db("shop");
        let ddl = "CREATE TABLE many (tenant int NOT NULL, id int, v text, PRIMARY KEY (tenant, id));";
        cluster.script("shop", ddl);
        cluster.psql("shop", "SELECT * FROM coffer.add_table('many', 'tenant')");
        cluster.psql("shop", &format!("INSERT INTO many SELECT t, i, md5(t || ' ' || i) FROM generate_series(1, {tenants}) t, generate_series(1, 20) i"));
        let begun = Instant::now();
        let agent = start(&cluster, "2s", &["1".into(), tenants.to_string()]);
        println!("{tenants} tenants: bases in {:.0} s", begun.elapsed().as_secs_f64());
        for round in 1..=4 {
            // All tenants in one transaction, then many small ones.
            cluster.psql("shop", &format!("UPDATE many SET v = v || '{round}' WHERE id = {round}"));
            cluster.script(
                "shop",
                &format!("DO $$BEGIN FOR t IN 1..{tenants} BY 7 LOOP INSERT INTO many VALUES (t, 100 + {round}, 'new'); COMMIT; END LOOP; END$$"),
            );
        }
        cluster.psql("shop", "SELECT coffer.restore_point('all')");
        let begun = Instant::now();
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '15min')");
        println!("{tenants} tenants: durable {:.0} s after the last commit", begun.elapsed().as_secs_f64());
        assert_peak("10,000 tenants, agent", agent.peak_kib());
        let scratch = Scratch::new(&cluster, ddl).await;
        for t in [1, 7, tenants / 2, tenants] {
            let t = t.to_string();
            let out = restore(&agent, &format!("tenant {t} of {tenants}"), &t, "name:all");
            scratch.load(&out).await;
            let sum =
                format!("SELECT count(*), md5(string_agg(id || v, ',' ORDER BY id)) FROM many WHERE tenant = {t}");
            assert_eq!(cluster.psql(&scratch.db, &sum), cluster.psql("shop", &sum), "tenant {t}");
        }
        let list = agent.json(&["list"]);
        let listed =
            list["tenants"].as_array().expect("tenants").iter().filter(|t| t["window"][0].is_object()).count() as u64;
        assert!(listed >= tenants, "{listed} tenants have a window");
    });
}
