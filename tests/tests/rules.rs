//! Rules of exactness as they show from outside: bases that give way and that wait, sessions with hostile settings,
//! commits that wait for a standby.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Scratch};
use coffer_tests::stall::Stall;
use coffer_tests::truth::{self, Truth, Watched};
use coffer_tests::wait_for;
use std::time::{Duration, Instant};
use tokio_postgres::Client;

on_majors! {
    bases_give_way_and_wait: bases_give_way_and_wait;
    hostile_settings: hostile_settings;
    commits_that_wait_for_a_standby: commits_that_wait_for_a_standby;
}

const TENANTS: [&str; 2] = ["1", "2"];

async fn take(cluster: &Cluster, tables: &[Watched], name: &str) -> Truth {
    truth::take(&mut cluster.connect("shop").await, tables, name).await
}

/// A transaction that stays open, and its process.
async fn open(cluster: &Cluster, sql: &str) -> (Client, i32) {
    let client = cluster.connect("shop").await;
    client.batch_execute(&format!("BEGIN; {sql}")).await.expect("an open transaction");
    let pid = client.query_one("SELECT pg_backend_pid()", &[]).await.expect("its pid").get(0);
    (client, pid)
}

fn restored_now(agent: &Agent, table: &str) -> bool {
    let out = restored::Out::new();
    let mut args = restored::args_now("1", "latest", out.arg());
    args.extend(["--table", table]);
    agent.coffer(&args).status.success()
}

fn waits_for(agent: &Agent, pid: i32) {
    wait_for("the status to name the transaction that a base waits for", 60, || {
        let bases = agent.bases();
        let named = bases["waits_for"].as_str().is_some_and(|w| w.contains(&format!("pid {pid} in database shop")));
        (named && bases["phase"] == "waiting for transactions").then_some(())
    });
}

/// A migration that holds a table or waits for it does not wait for a base; a base waits for transactions that are older
/// than what it has to see whole. Either way it follows by itself, and is exact.
fn bases_give_way_and_wait(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        let ddl = "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
             CREATE TABLE b (LIKE a INCLUDING ALL); CREATE TABLE c (LIKE a INCLUDING ALL); CREATE TABLE d (LIKE a INCLUDING ALL);
             CREATE TABLE big (LIKE a INCLUDING ALL); ALTER TABLE big ALTER v SET STORAGE EXTERNAL;";
        cluster.script("shop", ddl);
        for t in ["a", "b", "c", "d"] {
            let rows = "SELECT t, i, 'v' || i FROM generate_series(1, 2) t, generate_series(1, 50) i";
            cluster.psql("shop", &format!("INSERT INTO {t} {rows}"));
        }
        cluster.script(
            "shop",
            "SELECT * FROM coffer.add_table('a', 'tenant'); SELECT * FROM coffer.add_table('b', 'tenant')",
        );
        let mut tables: Vec<Watched> = ["a", "b"].map(|t| Watched::new(t, "tenant")).to_vec();
        let stall = Stall::start(cluster.port);
        let source_url = format!("postgres://coffer_agent@127.0.0.1:{}/shop", stall.port);
        let mut agent = Agent::new(&Setup { source_url, ..Setup::of(&cluster, "shop") });

        // Held: the lock is taken when the base is about to read.
        agent.env = vec![("COFFER_FAILPOINTS".into(), "base-after-horizon@1=sleep(3000)".into())];
        agent.start();
        wait_for("the base to begin", 60, || agent.log().contains("failpoint base-after-horizon").then_some(()));
        let (migration, pid) = open(&cluster, "LOCK TABLE a IN ACCESS EXCLUSIVE MODE; UPDATE a SET v = v || '+'").await;
        wait_for("the base of the other table", 60, || restored_now(&agent, "public.b").then_some(()));
        assert!(!restored_now(&agent, "public.a"));
        waits_for(&agent, pid);
        let alarm = wait_for("an alarm", 60, || agent.alarms("base_failed").into_iter().next());
        assert!(
            alarm["message"].as_str().is_some_and(|m| m.contains("public.a") && !m.contains("public.b")),
            "{alarm}"
        );
        migration
            .batch_execute("ALTER TABLE a ADD COLUMN w int DEFAULT 7; COMMIT")
            .await
            .expect("it was never held up");
        restored::wait_windows(&mut agent, &TENANTS);
        wait_for("the alarm to end", 60, || agent.alarms("base_failed").is_empty().then_some(()));
        let held = take(&cluster, &tables, "held").await;

        // Waits behind a base that is being read: its session stalls in the network.
        let rows = "SELECT 1 + i % 2, i, repeat(md5(i::text), 125) FROM generate_series(1, 8000) i";
        cluster.psql("shop", &format!("INSERT INTO big {rows}"));
        stall.hold(true);
        cluster.psql(
            "shop",
            "SELECT * FROM coffer.add_table('big', 'tenant') UNION ALL SELECT * FROM coffer.add_table('c', 'tenant')",
        );
        wait_for("the base to be under way", 60, || {
            let sql =
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY%big%' AND wait_event = 'ClientWrite'";
            (cluster.psql("shop", sql) != "0").then_some(())
        });
        let begun = Instant::now();
        cluster.psql("shop", "SET lock_timeout = '20s'; ALTER TABLE big ADD COLUMN w int DEFAULT 7");
        println!("PostgreSQL {major}: the migration waited {:.1} s", begun.elapsed().as_secs_f64());
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
        wait_for("the base of the other table", 60, || restored_now(&agent, "public.c").then_some(()));
        assert!(!restored_now(&agent, "public.big"));
        stall.hold(false);
        wait_for("the base of the table", 60, || restored_now(&agent, "public.big").then_some(()));
        assert!(agent.log().contains("a migration waits for it"), "{}", agent.log());
        tables.extend(["big", "c"].map(|t| Watched::new(t, "tenant")));

        // A transaction that is older than the registration.
        let (older, pid) = open(&cluster, "INSERT INTO b VALUES (1, 1001, 'older')").await;
        cluster.psql("shop", "SELECT * FROM coffer.add_table('d', 'tenant')");
        waits_for(&agent, pid);
        older
            .batch_execute("INSERT INTO d VALUES (1, 1001, 'older'); UPDATE d SET v = 'o' WHERE id = 7")
            .await
            .expect("a write");
        assert!(!restored_now(&agent, "public.d"));
        older.batch_execute("COMMIT").await.expect("committed");
        wait_for("the base of the table", 60, || restored_now(&agent, "public.d").then_some(()));
        tables.push(Watched::new("d", "tenant"));
        let end = take(&cluster, &tables, "end").await;

        let with = ["a", "big"].map(|t| format!("ALTER TABLE {t} ADD COLUMN w int;"));
        let scratch = Scratch::new(&cluster, &format!("{ddl} {}", with.concat())).await;
        let mut wrong = Vec::new();
        for tenant in TENANTS {
            wrong.extend(scratch.check(&agent, &held, &tables[..2], tenant).await);
            wrong.extend(scratch.check(&agent, &end, &tables, tenant).await);
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());
    });
}

/// A base whose marker a crash of the server has forgotten is taken again.
#[test]
fn a_forgotten_marker() {
    let major = *coffer_tests::majors().first().expect("a major");
    let conf = "wal_writer_delay = 10s\nautovacuum = off\nbgwriter_lru_maxpages = 0\ncheckpoint_timeout = 1d\n";
    let cluster = Cluster::start_with(major, conf, &[]);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, PRIMARY KEY (tenant, id)); INSERT INTO a VALUES (1, 1), (2, 2);
         SELECT * FROM coffer.add_table('a', 'tenant'); ALTER ROLE coffer_agent SET synchronous_commit = off",
    );
    // So often there is a record of an idle source.
    let more = "[rpo]\nlimit = \"6s\"".into();
    let mut agent = Agent::new(&Setup { more, ..Setup::of(&cluster, "shop") });
    agent.start();
    wait_for("a base to wait for its marker", 60, || {
        let waits = agent.bases()["phase"] == "waiting for the stream";
        let sql = "SELECT pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn()";
        (waits && cluster.psql("shop", sql) == "t").then_some(())
    });
    assert!(restored::restorable(&agent).is_empty());
    cluster.kill9();
    cluster.up();
    restored::wait_windows(&mut agent, &TENANTS);
    assert!(agent.log().contains("has forgotten the marker of a base"), "{}", agent.log());
    assert_eq!(agent.stop(), Some(0), "{}", agent.log());
}

/// What a role's and a database's settings can do to how values look, to what a session may and to how long it may.
const HOSTILE: &[(&str, &str)] = &[
    ("datestyle", "'German, DMY'"),
    ("intervalstyle", "iso_8601"),
    ("extra_float_digits", "'-15'"),
    ("bytea_output", "escape"),
    ("timezone", "'Asia/Kolkata'"),
    ("search_path", "hostile, pg_catalog"),
    ("statement_timeout", "'1ms'"),
    ("lock_timeout", "'1ms'"),
    ("idle_in_transaction_session_timeout", "'1ms'"),
    ("idle_session_timeout", "'1ms'"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("row_security", "on"),
    ("quote_all_identifiers", "on"),
    ("standard_conforming_strings", "off"),
    ("backslash_quote", "off"),
    ("client_encoding", "'LATIN1'"),
    ("session_replication_role", "replica"),
    ("array_nulls", "off"),
    ("transform_null_equals", "on"),
    ("xmloption", "document"),
    ("lc_monetary", "'C.UTF-8'"),
    ("synchronous_commit", "remote_apply"),
];

const TYPES: &str = "CREATE TYPE \"Mood\" AS ENUM ('so so', 'fine'); CREATE TABLE t (tenant int NOT NULL, id int NOT NULL,
    ts timestamptz, d date, iv interval, f float8, g float4, b bytea, m money, a text[], n int[], x xml, md \"Mood\",
    rc regclass, tx text, PRIMARY KEY (tenant, id)); COMMENT ON TABLE t IS '漢字'; ALTER TABLE t ENABLE ROW LEVEL SECURITY;
    ALTER TABLE t FORCE ROW LEVEL SECURITY; CREATE POLICY nobody ON t USING (false);
    CREATE TABLE r (tenant int NOT NULL, at timestamptz, tx text);";

/// The server of the one version comes without XML.
fn xml(major: u32) -> &'static str {
    if major == 15 { "xmlparse(CONTENT 'x<y/>' || i)" } else { "NULL" }
}

fn rows(from: u32, to: u32, xml: &str) -> String {
    format!(
        "INSERT INTO t SELECT 1 + i % 2, i, timestamptz '2024-03-04 05:06:07.891234+01' + i * interval '1 h', date '2024-03-04' + i,
            make_interval(-1, i, 0, 2, -3, 4, 5.006), i / 3.0::float8, i / 7.0::float4, decode(md5(i::text), 'hex') || '\\x5c00',
            (i * 1.5)::numeric::money, ARRAY['NULL', NULL, E'a\\\\b''\"', i::text], ARRAY[i, NULL], {xml},
            CASE WHEN i % 2 = 0 THEN 'so so'::public.\"Mood\" END, 'public.t'::regclass, E'\\\\N \\t漢 ''' || i
         FROM generate_series({from}, {to}) i;
         INSERT INTO r SELECT 1 + i % 2, timestamptz '2024-03-04 05:06:07+01', 'r' || i % 3 FROM generate_series({from}, {to}) i;"
    )
}

/// The agent's sessions, and those of the programs that it starts, are what they have to be, whatever the settings of role and
/// database are.
fn hostile_settings(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            &format!(
                "{TYPES} {} SELECT * FROM coffer.discover('tenant', apply => true); CREATE SCHEMA hostile;
                 CREATE FUNCTION hostile.now() RETURNS timestamptz LANGUAGE sql AS $$SELECT timestamptz '2001-01-01'$$;
                 CREATE FUNCTION hostile.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$SELECT timestamptz '2001-01-01'$$;
                 GRANT USAGE ON SCHEMA hostile TO PUBLIC; CREATE ROLE restorer LOGIN SUPERUSER;",
                rows(1, 40, xml(major))
            ),
        );
        let mut settings: Vec<(&str, &str)> = HOSTILE.to_vec();
        if major >= 17 {
            settings.push(("transaction_timeout", "'200ms'"));
        }
        for (name, value) in &settings {
            for role in ["coffer_agent", "restorer"] {
                cluster.psql("postgres", &format!("ALTER ROLE {role} SET {name} = {value}"));
            }
            // The database's own come into a restored one as well; ours, who looks on, are what they always are.
            let (default, sql) = (format!("SHOW {name}"), format!("ALTER DATABASE shop SET {name} = {value}"));
            if !["client_encoding", "session_replication_role", "search_path"].contains(name) {
                let default = cluster.psql("postgres", &default);
                cluster.psql("postgres", &format!("{sql}; ALTER ROLE postgres SET {name} = '{default}'"));
            }
        }
        let tables = ["t", "r"].map(|t| Watched::new(t, "tenant"));
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        cluster.script("shop", &rows(41, 60, xml(major)));
        cluster.psql("shop", "UPDATE t SET tx = tx || '!', f = f / 3 WHERE id % 5 = 0; DELETE FROM t WHERE id % 7 = 0; DELETE FROM r WHERE tx = 'r1'");
        let good = take(&cluster, &tables, "good").await;
        for tenant in TENANTS {
            let name = format!("restored_{tenant}");
            agent.json(&restored::args(tenant, "name:good", "database", &cluster.url("restorer", &name)));
            let db = cluster.connect(&name).await;
            let mut wrong = good.differences(&db, &tables, tenant).await;
            let comment = db.query_one("SELECT obj_description('public.t'::regclass)", &[]).await.expect("a comment");
            wrong.extend((comment.get::<_, &str>(0) != "漢字").then(|| "the comment".to_owned()));
            assert!(wrong.is_empty(), "{wrong:#?}");
        }
        let compared = agent.json(&["verify", "--against-live"]);
        assert_eq!(compared["ok"], true, "{compared}");
        let seen: u64 = compared["live"]
            .as_array()
            .expect("tenants")
            .iter()
            .flat_map(|l| l["tables"].as_array().expect("tables"))
            .filter_map(|t| t["same"].as_u64())
            .sum();
        let live = cluster.psql("shop", "SELECT (SELECT count(*) FROM t) + (SELECT count(*) FROM r)");
        assert_eq!(seen.to_string(), live, "{compared}");

        cluster.psql("shop", "DELETE FROM t WHERE id % 3 = 0; UPDATE t SET ts = NULL, a = NULL, b = ''; DELETE FROM r");
        agent.json(&restored::in_place("1", "name:good"));
        let wrong = good.differences(&cluster.connect("shop").await, &tables, "1").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        wait_for("the tenants in SQL", 30, || {
            (cluster.psql("shop", "SELECT count(*) FROM coffer.tenants WHERE tenant IN ('1', '2')") == "2")
                .then_some(())
        });
        agent.json(&["backup", "--tenant", "1", "--wait"]);
        assert_eq!(
            agent.page("/healthz").lines().next().map(|l| l.contains(" 200 ")),
            Some(true),
            "{}",
            agent.page("/healthz")
        );
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());
    });
}

/// A commit that waits for a synchronous standby is in the log, and seen by nobody. It is archived once, also where a base
/// is read meanwhile, and neither the agent nor who waits for durability waits for the standby.
fn commits_that_wait_for_a_standby(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        // Without a key: a row that came twice would be there twice.
        let ddl = "CREATE TABLE a (tenant int NOT NULL, v text); CREATE TABLE b (tenant int NOT NULL, v text);";
        cluster.script("shop", &format!("{ddl} INSERT INTO a VALUES (1, 'x'), (2, 'y'); INSERT INTO b TABLE a"));
        cluster.script("shop", "SELECT * FROM coffer.add_table('a', 'tenant')");
        let tables = ["a", "b"].map(|t| Watched::new(t, "tenant"));
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.env = vec![("COFFER_FAILPOINTS".into(), "base-after-horizon@2=sleep(4000)".into())];
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let scratch = Scratch::new(&cluster, ddl).await;
        scratch.client.batch_execute("SET synchronous_commit = local").await.expect("the setting");

        cluster.psql("shop", "SELECT * FROM coffer.add_table('b', 'tenant')");
        wait_for("the base to begin", 60, || {
            (agent.log().matches("failpoint base-after-horizon").count() == 1).then_some(())
        });
        cluster.psql("shop", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
        cluster.psql("shop", "SELECT pg_reload_conf()");
        wait_for("the setting", 20, || {
            (cluster.psql("shop", "SHOW synchronous_standby_names") == "nobody").then_some(())
        });
        let writer = cluster.connect("shop").await;
        let waiting = tokio::spawn(async move {
            let sql = "BEGIN; INSERT INTO a VALUES (1, 'waits'); INSERT INTO b VALUES (1, 'waits'); UPDATE b SET v = v || '+' WHERE v = 'x'; COMMIT";
            writer.batch_execute(sql).await.expect("committed at last");
        });
        wait_for("the commit to wait", 20, || {
            (cluster.psql("shop", "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") != "0")
                .then_some(())
        });
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '30s')");
        wait_for("the base", 60, || restored_now(&agent, "public.b").then_some(()));
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM a WHERE v = 'waits'"), "0", "nobody sees it yet");
        assert!(!waiting.is_finished());
        let out = restored::Out::new();
        agent.json(&restored::args_now("1", "latest", out.arg()));
        scratch.load(&out).await;
        let has =
            "SELECT (SELECT count(*) FROM a WHERE v = 'waits'), (SELECT count(*) FROM b WHERE v IN ('waits', 'x+'))";
        assert_eq!(cluster.psql(&scratch.db, has), "1|2");

        cluster.psql("shop", "ALTER SYSTEM RESET synchronous_standby_names");
        cluster.psql("shop", "SELECT pg_reload_conf()");
        waiting.await.expect("the writer");
        let released = take(&cluster, &tables, "released").await;
        assert_eq!(released.rows("1", "a").len(), 2);
        let mut wrong = Vec::new();
        for tenant in TENANTS {
            wrong.extend(scratch.check(&agent, &released, &tables, tenant).await);
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        let compared = agent.json(&["verify", "--against-live"]);
        assert_eq!(compared["ok"], true, "{compared}");
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());
    });
}
