//! Rules of exactness as they show from outside: sessions with hostile settings, commits that
//! wait for a standby.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Scratch};
use coffer_tests::truth::{self, Truth, Watched};
use coffer_tests::wait_for;

on_majors! {
    hostile_settings: hostile_settings;
    commits_that_wait_for_a_standby: commits_that_wait_for_a_standby;
}

const TENANTS: [&str; 2] = ["1", "2"];

async fn take(cluster: &Cluster, tables: &[Watched], name: &str) -> Truth {
    truth::take(&mut cluster.connect("shop").await, tables, name).await
}

fn restored_now(agent: &Agent, table: &str) -> bool {
    let out = restored::Out::new();
    let mut args = restored::args_now("1", "latest", out.arg());
    args.extend(["--table", table]);
    agent.coffer(&args).status.success()
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
