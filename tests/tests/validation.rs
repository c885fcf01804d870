//! The repository against the live rows: never a false alarm under load, and nothing that differs goes unseen.

use crate::isolation::files;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use coffer_tests::workload::{self, TENANTS, Workload};
use coffer_tests::{block_on, seed, wait_for};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

on_majors! {
    exact_under_load: exact_under_load;
    planted_damage: planted_damage;
    by_schedule: by_schedule;
    reference_data: reference_data;
    what_was_not_compared: what_was_not_compared;
    noted_from_the_command_line: noted_from_the_command_line;
}

/// How often each tenant is compared.
fn rounds() -> u32 {
    std::env::var("COFFER_TEST_CYCLES").map_or(2, |v| v.parse().expect("a number"))
}

fn exact_under_load(major: u32) {
    block_on(async {
        let seed = seed();
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let load = Workload::start(&cluster, "shop", 4, seed, Duration::from_millis(10));
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let (mut rows, mut runs) = (0, 0);
        for round in 0..rounds() {
            for tenant in TENANTS {
                let said = agent.json(&["verify", "--tenant", tenant, "--against-live"]);
                let live = &said["live"][0];
                assert_eq!(
                    (&said["ok"], &live["ok"]),
                    (&true.into(), &true.into()),
                    "round {round}, SEED={seed}: {said}"
                );
                assert_eq!(live["skipped"], serde_json::json!([]), "{said}");
                assert!(!live["tables"].as_array().expect("tables").is_empty(), "{said}");
                rows +=
                    live["tables"].as_array().expect("tables").iter().filter_map(|t| t["same"].as_u64()).sum::<u64>();
                runs += 1;
            }
            load.after(10).await;
        }
        assert!(rows > 0);
        println!("PostgreSQL {major}: {runs} comparisons under load, {rows} rows the same");
        // All of them at once, those without a tenant, too.
        let said = agent.json(&["verify", "--against-live"]);
        assert!(said["live"].as_array().expect("tenants").len() >= TENANTS.len(), "{said}");
        load.stop().await;
    });
}

/// Changes rows of a table while its rule is away: the output plugin does not see it.
fn unseen(cluster: &Cluster, table: &str, sql: &str) {
    cluster.script(
        "shop",
        &format!(
            "BEGIN; CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT * FROM coffer.rules WHERE relid = '{table}'::regclass;
             DELETE FROM coffer.rules WHERE relid = '{table}'::regclass; SELECT coffer._invalidate('{table}'::regclass);
             SET LOCAL session_replication_role = replica; {sql};
             INSERT INTO coffer.rules SELECT * FROM kept; SELECT coffer._invalidate('{table}'::regclass); COMMIT;"
        ),
    );
}

/// Kind and key of what differs, sorted.
fn found(said: &Value) -> Vec<String> {
    let of = |f: &Value| {
        format!("{} {} {}", f["kind"].as_str().expect("a kind"), f["relation"].as_str()?, f["key"].as_str()?).into()
    };
    let mut all: Vec<String> = said["failures"].as_array().expect("failures").iter().filter_map(of).collect();
    all.sort();
    all
}

/// What a comparison from the command line finds stands in `coffer.verifications`, and as an alarm after a restart.
fn noted_from_the_command_line(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
         SELECT * FROM coffer.add_table('a', 'tenant');
         INSERT INTO a SELECT t, i, 'v' || i FROM generate_series(1, 2) t, generate_series(1, 9) i",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    let live = ["verify", "--tenant", "1", "--against-live"];
    // The views are brought up to date when the agent starts.
    let noted = |agent: &mut Agent, want: &str| {
        assert_eq!(agent.stop(), Some(0));
        agent.start();
        let sql = "SELECT ok || ' ' || coalesce(message, '-') FROM coffer.verifications WHERE tenant = '1' AND what = 'live' \
                   ORDER BY verified_at DESC LIMIT 1";
        wait_for(want, 90, || (cluster.psql("shop", sql) == want).then_some(()));
    };
    let said = agent.json(&live);
    assert_eq!((&said["ok"], &said["warnings"]), (&true.into(), &serde_json::json!([])), "{said}");
    noted(&mut agent, "true -");
    unseen(&cluster, "a", "UPDATE a SET v = 'other' WHERE tenant = 1 AND id = 1");
    let (exit, said) = agent.json_err(&live);
    assert_eq!(exit, 5, "{said}");

    // Where nothing can be written the comparison is made, and says that it is not noted.
    agent.env = vec![("COFFER_STORE_FAULTS".into(), "main/put:denied:1".into())];
    let (exit, said) = agent.json_err(&live);
    assert!(exit == 5 && said["warnings"].to_string().contains("is not noted"), "{exit} {said}");
    agent.env.clear();
    noted(&mut agent, "false public.a: 1 rows with other values in the repository");
    let alarm = wait_for("the alarm", 60, || agent.alarms("validation_differs").into_iter().next());
    assert_eq!(alarm["tenant"], "1", "{alarm}");
    // No key is noted, and no value.
    assert!(!alarm["message"].to_string().contains("id = 1"), "{alarm}");
}

fn planted_damage(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
         CREATE TABLE b (id int PRIMARY KEY, tenant int NOT NULL, v text);
         CREATE TABLE c (tenant int NOT NULL, v text);
         SELECT * FROM coffer.add_table('a', 'tenant'); SELECT * FROM coffer.add_table('b', 'tenant');
         SELECT * FROM coffer.add_table('c', 'tenant', class => 'audit');
         INSERT INTO a SELECT t, i, 'v' || i FROM generate_series(1, 2) t, generate_series(1, 50) i;
         INSERT INTO b SELECT t * 100 + i, t, 'v' || i FROM generate_series(1, 2) t, generate_series(1, 50) i;
         INSERT INTO c SELECT t, 'v' || i % 3 FROM generate_series(1, 2) t, generate_series(1, 9) i;",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.psql("shop", "UPDATE a SET v = v || '+' WHERE id % 2 = 0; DELETE FROM b WHERE id % 10 = 0");
    let live = |tenant: &str| ["verify", "--tenant", tenant, "--against-live"].map(str::to_owned);
    for tenant in ["1", "2"] {
        let args = live(tenant);
        let said = agent.json(&args.each_ref().map(String::as_str));
        assert_eq!((said["live"][0]["ok"].as_bool(), found(&said)), (Some(true), vec![]), "{said}");
        assert_eq!(said["live"][0]["tables"][0]["same"], 50, "{said}");
    }

    // A column that no row has been written with since: every row has what it came with.
    cluster.psql("shop", "ALTER TABLE a ADD COLUMN w int DEFAULT 5, ADD COLUMN u text");
    let said = agent.json(&live("1").each_ref().map(String::as_str));
    assert_eq!((said["live"][0]["ok"].as_bool(), found(&said)), (Some(true), vec![]), "{said}");
    unseen(&cluster, "a", "UPDATE a SET w = 6 WHERE tenant = 1 AND id = 31");
    let (exit, said) = agent.json_err(&live("1").each_ref().map(String::as_str));
    assert_eq!((exit, found(&said)), (5, vec!["changed_value public.a tenant = 1, id = 31".to_owned()]), "{said}");
    unseen(&cluster, "a", "UPDATE a SET w = 5 WHERE tenant = 1 AND id = 31");

    // A row that the archive never got, one with another value, one that is gone, one that is another tenant's.
    unseen(&cluster, "a", "INSERT INTO a VALUES (1, 100, 'new')");
    unseen(&cluster, "a", "UPDATE a SET v = 'other' WHERE tenant = 1 AND id = 1");
    unseen(&cluster, "a", "DELETE FROM a WHERE tenant = 1 AND id = 2");
    unseen(&cluster, "b", "UPDATE b SET tenant = 2 WHERE id = 103");
    // One of three equal rows of a table of the class audit, whose rows a restore would not take away.
    unseen(&cluster, "c", "INSERT INTO c VALUES (1, 'v1')");
    // What comes after is seen, and is no difference.
    cluster.psql(
        "shop",
        "UPDATE a SET v = 'later' WHERE tenant = 1 AND id BETWEEN 10 AND 20; INSERT INTO c VALUES (1, 'v1')",
    );
    let (exit, said) = agent.json_err(&live("1").each_ref().map(String::as_str));
    assert_eq!(exit, 5, "{said}");
    let want = [
        "changed_value public.a tenant = 1, id = 1",
        "extra_row public.a tenant = 1, id = 2",
        "extra_row public.b id = 103",
        "lost_row public.a tenant = 1, id = 100",
        "lost_row public.c tenant = 1, v = v1",
    ];
    assert_eq!(found(&said), want, "{said}");
    let (exit, said) = agent.json_err(&live("2").each_ref().map(String::as_str));
    assert_eq!((exit, found(&said)), (5, vec!["lost_row public.b id = 103".to_owned()]), "{said}");

    // An object that is missing.
    let uid = restored::listed(&agent, "2")["uid"].as_str().expect("a uid").replace('-', "");
    let of_tenant = |kind: &str| {
        let folder = format!("/t/{uid}/{kind}/");
        files(&agent.repository()).into_iter().find(|f| f.to_str().is_some_and(|f| f.contains(&folder))).expect("one")
    };
    let full = of_tenant("f");
    std::fs::remove_file(&full).expect("our file");
    let (exit, said) = agent.json_err(&live("2").each_ref().map(String::as_str));
    assert_eq!(exit, 5, "{said}");
    let missing: Vec<&Value> =
        said["failures"].as_array().expect("failures").iter().filter(|f| f["kind"] == "missing").collect();
    assert!(!missing.is_empty() && said["live"][0]["ok"] == false, "{said}");
    let name = missing[0]["object"].as_str().expect("a name");
    assert!(full.to_str().expect("ASCII").ends_with(name), "{said}");

    // An older full in the place of the newest, each of them sound in itself.
    agent.json(&["compact", "--tenant", "1"]);
    cluster.psql("shop", "UPDATE a SET v = v || '?' WHERE tenant = 1");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    agent.json(&["compact", "--tenant", "1"]);
    let uid = restored::listed(&agent, "1")["uid"].as_str().expect("a uid").replace('-', "");
    let folder = format!("/t/{uid}/f/");
    let mut fulls: Vec<_> =
        files(&agent.repository()).into_iter().filter(|f| f.to_str().is_some_and(|f| f.contains(&folder))).collect();
    fulls.sort();
    let [.., older, newest] = fulls.as_slice() else { panic!("two fulls: {fulls:?}") };
    std::fs::copy(older, newest).expect("our store");
    let (exit, said) = agent.json_err(&live("1").each_ref().map(String::as_str));
    let stale = |f: &Value| newest.to_str().is_some_and(|n| f["object"].as_str().is_some_and(|o| n.ends_with(o)));
    let all = said["failures"].as_array().expect("failures");
    assert!(exit == 5 && all.iter().any(stale) && said["live"][0]["ok"] == false, "{said}");

    // Without anybody who ships, nothing is said about the rows.
    let (exit, said) = agent.json_err(&["verify", "--tenant", "nobody", "--against-live"]);
    assert_eq!(exit, 3, "{said}");
}

/// Reference data, which is nobody's, is compared as a tenant's rows are.
fn reference_data(major: u32) {
    block_on(async {
        let cluster = Arc::new(Cluster::start(major));
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE kinds (id int PRIMARY KEY, label text NOT NULL);
             CREATE TABLE rates (at date, rate int) PARTITION BY RANGE (at);
             CREATE TABLE rates_2026 PARTITION OF rates FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
             CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
             INSERT INTO kinds SELECT i, 'kind ' || i FROM generate_series(1, 40) i;
             SELECT * FROM coffer.add_shared('kinds'); SELECT * FROM coffer.add_shared('rates');
             SELECT * FROM coffer.add_table('a', 'tenant');
             INSERT INTO a VALUES (1, 1, 'one');
             INSERT INTO rates SELECT '2026-01-01', 1 FROM generate_series(1, 3)",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1"]);
        let live = ["verify", "--against-live"];

        // Sound, while somebody writes.
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (cluster, stop) = (cluster.clone(), stop.clone());
            tokio::spawn(async move {
                let db = cluster.connect("shop").await;
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    let id = 100 + n;
                    let sql = format!(
                        "BEGIN; UPDATE kinds SET label = 'written {n}' WHERE id = 1 + {n} % 40; INSERT INTO kinds VALUES ({id}, 'new');
                         INSERT INTO rates VALUES ('2026-05-05', {n}); DELETE FROM kinds WHERE id = {id} - 5; COMMIT"
                    );
                    db.batch_execute(&sql).await.expect("a write");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                n
            })
        };
        for _ in 0..rounds() {
            let said = agent.json(&live);
            let all = said["live"].as_array().expect("live");
            let shared = all.iter().find(|l| l["kind"] == "shared").unwrap_or_else(|| panic!("{said}"));
            assert_eq!((&said["ok"], &shared["ok"]), (&true.into(), &true.into()), "{said}");
            let same = |name: &str| {
                let of = shared["tables"].as_array().expect("tables").iter().find(|t| t["relation"] == name);
                of.and_then(|t| t["same"].as_u64()).unwrap_or_else(|| panic!("{name}: {said}"))
            };
            assert!(same("public.kinds") >= 40 && same("public.rates") >= 3, "{said}");
        }
        stop.store(true, Ordering::Relaxed);
        assert!(writer.await.expect("the writer") > 10);

        unseen(&cluster, "kinds", "INSERT INTO kinds VALUES (99, 'new')");
        unseen(&cluster, "kinds", "UPDATE kinds SET label = 'other secret' WHERE id = 7");
        unseen(
            &cluster,
            "rates",
            "DELETE FROM rates WHERE ctid = (SELECT min(ctid) FROM rates WHERE at = '2026-01-01')",
        );
        let (exit, said) = agent.json_err(&live);
        assert_eq!(exit, 5, "{said}");
        let want = [
            "changed_value public.kinds id = 7",
            "extra_row public.rates at = 2026-01-01, rate = 1",
            "lost_row public.kinds id = 99",
        ];
        assert_eq!(found(&said), want, "{said}");
        agent.stop();

        // By schedule it has its turn, too.
        agent.env = vec![("COFFER_TEST_CLOCK".into(), "8d".into())];
        agent.start();
        // What was found from the command line is no key's business; what the agent finds names them.
        let (tenant, message) = wait_for("the agent's alarm", 60, || {
            alarm(&agent, "validation_differs").filter(|(_, message)| message.contains("id = 7"))
        });
        assert_eq!(tenant, "(shared)");
        assert!(message.contains("public.kinds: 1 rows with other values"), "{message}");
        assert!(!message.contains("secret"), "{message}");
        let seen = "SELECT DISTINCT tenant, kind, ok, message FROM coffer.verifications WHERE what = 'live' AND NOT ok";
        let want = "(shared)|shared|f|public.kinds: 1 rows that are not in the repository; \
            public.kinds: 1 rows with other values in the repository; \
            public.rates: 1 rows in the repository that are not in the database";
        wait_for("the view to say so", 90, || (cluster.psql("shop", seen) == want).then_some(()));
    });
}

/// The tenant of an alarm of that code, and its words.
fn alarm(agent: &Agent, code: &str) -> Option<(String, String)> {
    let a = agent.alarms(code).into_iter().next()?;
    Some((a["tenant"].as_str()?.to_owned(), a["message"].as_str()?.to_owned()))
}

fn by_schedule(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
             CREATE TABLE c (tenant int NOT NULL, v text);
             SELECT * FROM coffer.add_table('a', 'tenant'); SELECT * FROM coffer.add_table('c', 'tenant');
             INSERT INTO a SELECT t, i, 'secret' || i FROM generate_series(1, 3) t, generate_series(1, 50) i;
             INSERT INTO c SELECT t, 'secret' || i FROM generate_series(1, 3) t, generate_series(1, 9) i;",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2", "3"]);
        assert!(agent.json(&["compact"])["skipped"].as_array().is_some_and(Vec::is_empty));
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM coffer.verifications"), "0", "a week has not gone by");
        unseen(&cluster, "a", "UPDATE a SET v = 'other secret' WHERE tenant = 2 AND id = 7");
        unseen(&cluster, "c", "DELETE FROM c WHERE tenant = 2 AND v = 'secret3'");
        agent.stop();

        // The next Sunday was missed: every tenant is compared, once.
        let heard = cluster.listen("shop", "coffer_alarm").await;
        agent.env = vec![("COFFER_TEST_CLOCK".into(), "8d".into())];
        agent.start();
        let (tenant, message) = wait_for("the alarm", 60, || alarm(&agent, "validation_differs"));
        assert_eq!(tenant, "2");
        assert!(
            message.contains("public.a: 1 rows with other values") && message.contains("tenant = 2, id = 7"),
            "{message}"
        );
        assert!(message.contains("public.c: 1 rows in the repository that are not"), "{message}");
        assert!(!message.contains("secret"), "values are nobody's business: {message}");
        let seen = "SELECT tenant, ok, what, message, count(*) FROM coffer.verifications v JOIN coffer.backups b USING (tenant, backup) \
            WHERE b.trigger IN ('schedule', 'archive') GROUP BY 1, 2, 3, 4 ORDER BY 1";
        let want = "1|t|live||1\n2|f|live|public.a: 1 rows with other values in the repository; \
            public.c: 1 rows in the repository that are not in the database|1\n3|t|live||1";
        wait_for("the checks to be listed", 60, || (cluster.psql("shop", seen) == want).then_some(()));
        wait_for("the NOTIFY", 20, || {
            let heard = heard.lock().expect("no panic");
            heard.iter().any(|m| m.contains("tenant = 2, id = 7") && !m.contains("secret")).then_some(())
        });
        assert!(agent.log().contains("validation_differs"), "{}", agent.log());
        assert_eq!(agent.coffer(&["status"]).status.code(), Some(11));
        assert_eq!(agent.metric("coffer_validations_total"), 3.0);
        wait_for("the gauge", 10, || (agent.metric("coffer_validation_differing_tenants") == 1.0).then_some(()));
        wait_for("the gauge", 10, || (agent.metric("coffer_last_validation_timestamp_seconds") > 1.7e9).then_some(()));
        assert!(agent.metric("coffer_oldest_validation_timestamp_seconds") > 1.7e9);
        assert!(agent.page("/").contains("3 tenants, 1 of them differ"), "{}", agent.page("/"));
        // It stands after a restart, until a comparison of this very tenant finds nothing.
        agent.stop();
        agent.start();
        let (tenant, message) = wait_for("the alarm to stand again", 60, || alarm(&agent, "validation_differs"));
        assert!(tenant == "2" && message.contains("public.a: 1 rows"), "{message}");
        let verify = |tenant: &str| {
            let n = cluster.psql("shop", &format!("SELECT coffer.verify('{tenant}')"));
            wait_for("the job to end", 60, || {
                let row = cluster.psql("shop", &format!("SELECT state, error FROM coffer.jobs WHERE job = {n}"));
                (row.starts_with("done") || row.starts_with("failed")).then_some(row)
            })
        };
        assert_eq!(verify("1"), "done|");
        let row = verify("2");
        assert!(row.starts_with("failed|") && row.contains("tenant = 2, id = 7"), "{row}");
        assert!(alarm(&agent, "validation_differs").is_some());
        unseen(&cluster, "a", "UPDATE a SET v = 'secret7' WHERE tenant = 2 AND id = 7");
        unseen(&cluster, "c", "INSERT INTO c VALUES (2, 'secret3')");
        assert_eq!(verify("2"), "done|");
        wait_for("the alarm to be gone", 20, || alarm(&agent, "validation_differs").is_none().then_some(()));
        wait_for("the gauge", 10, || (agent.metric("coffer_validation_differing_tenants") == 0.0).then_some(()));
        // Nobody was compared again without being due.
        let runs = "SELECT count(*) FROM coffer.verifications WHERE tenant = '3'";
        assert_eq!(cluster.psql("shop", runs), "1");
    });
}

/// Rows that wait for their base were not found to be the same, nor to differ.
fn what_was_not_compared(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, PRIMARY KEY (tenant, id));
         SELECT * FROM coffer.add_table('a', 'tenant'); INSERT INTO a VALUES (1, 1), (2, 1);",
    );
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.env = vec![("COFFER_FAILPOINTS".into(), "base-after-copy@2=sleep(60000)".into())];
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    agent.env.clear();
    let verify = |tenant: &str| {
        let n = cluster.psql("shop", &format!("SELECT coffer.verify('{tenant}')"));
        wait_for("the job to end", 60, || {
            let row = cluster.psql("shop", &format!("SELECT state, error FROM coffer.jobs WHERE job = {n}"));
            (row.starts_with("done") || row.starts_with("failed")).then_some(row)
        })
    };
    let known = "SELECT count(*) FROM coffer.tenants";
    wait_for("the tenants to be known", 60, || (cluster.psql("shop", known) == "2").then_some(()));
    // Something that differs, and does no more when it is looked at again.
    unseen(&cluster, "a", "INSERT INTO a VALUES (1, 2)");
    assert!(verify("1").starts_with("failed|not everything is as it was written"));
    unseen(&cluster, "a", "DELETE FROM a WHERE tenant = 1 AND id = 2");
    cluster.script(
        "shop",
        "CREATE TABLE b (tenant int NOT NULL, id int NOT NULL, PRIMARY KEY (tenant, id)); INSERT INTO b VALUES (1, 1);
         SELECT * FROM coffer.add_table('b', 'tenant');",
    );
    let live = ["verify", "--tenant", "1", "--against-live"];
    let (exit, said) = agent.json_err(&live);
    assert_eq!((exit, &said["ok"], &said["failures"]), (9, &false.into(), &serde_json::json!([])), "{said}");
    let of = &said["live"][0];
    assert_eq!((&of["ok"], &of["skipped"][0]["relation"]), (&false.into(), &"public.b".into()), "{said}");
    let row = verify("1");
    assert!(
        row.starts_with("failed|nothing is known to be wrong") && row.contains("public.b was not compared"),
        "{row}"
    );
    // That was no check: what the last one found stands.
    assert_eq!(alarm(&agent, "validation_differs").expect("the alarm").0, "1");
    assert_eq!(agent.metric("coffer_last_validation_timestamp_seconds"), 0.0);
    // Another tenant has no row there.
    let said = agent.json(&["verify", "--tenant", "2", "--against-live"]);
    assert_eq!((&said["live"][0]["ok"], &said["live"][0]["skipped"]), (&true.into(), &serde_json::json!([])), "{said}");
    let noted = "SELECT ok, message FROM coffer.verifications WHERE tenant = '1' AND what = 'live'";
    wait_for("the check", 60, || {
        (cluster.psql("shop", noted) == "f|public.a: 1 rows that are not in the repository").then_some(())
    });
    wait_for("the base of the new table", 120, || verify("1").starts_with("done").then_some(()));
    wait_for("the alarm to be gone", 20, || alarm(&agent, "validation_differs").is_none().then_some(()));
    assert_eq!(agent.json(&live)["ok"], true);
}
