//! Jobs from SQL against a running agent: what psql sees of them, and what becomes of them when the agent dies.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use coffer_tests::truth::{self, Watched};
use coffer_tests::{block_on, wait_for};

on_majors! {
    backup: backup;
    backup_of_an_agent_that_dies: backup_of_an_agent_that_dies;
    command_line: command_line;
    restore_and_verify: restore_and_verify;
    an_agent_that_dies: an_agent_that_dies;
    restored_once: restored_once;
    copied_once: copied_once;
    locked_row: locked_row;
    lost_session: lost_session;
    a_panic: a_panic;
    taken_locks: taken_locks;
    words_in_order: words_in_order;
    words: words;
    without_an_agent: without_an_agent;
}

fn tables() -> Vec<Watched> {
    ["a", "b"].map(|t| Watched::new(t, "tenant")).to_vec()
}

/// A protected database with three tenants.
pub fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
         CREATE TABLE b (id int PRIMARY KEY, tenant int NOT NULL, v text);
         SELECT * FROM coffer.add_table('a', 'tenant');
         SELECT * FROM coffer.add_table('b', 'tenant');
         INSERT INTO a SELECT t, i, 'a' || i FROM generate_series(1, 3) t, generate_series(1, 200) i;
         INSERT INTO b SELECT i, 1 + i % 3, 'b' || i FROM generate_series(1, 90) i;",
    );
    cluster
}

/// An agent that has a window for each.
pub fn agent(cluster: &Cluster) -> Agent {
    let mut agent = Agent::new(&Setup::of(cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2", "3"]);
    registered(cluster);
    agent
}

/// The agent tells the source of the tenants that it met.
pub fn registered(cluster: &Cluster) {
    wait_for("the tenants to register themselves", 60, || {
        (cluster.psql("shop", "SELECT count(*) FROM coffer.tenants WHERE kind = 'normal'") == "3").then_some(())
    });
}

/// Asks in one transaction, waits in the next; what the job's row says.
fn job(cluster: &Cluster, call: &str, columns: &str) -> String {
    let n = cluster.psql("shop", &format!("SELECT coffer.{call}"));
    cluster.psql("shop", &format!("SELECT {columns} FROM coffer.wait({n}, '2min')"))
}

/// One tenant's backups that somebody asked for, in SQL.
const ASKED_FOR: &str = "SELECT count(*), min(backup::text), min(reason), min(cardinality(holds)) FROM coffer.backups \
    WHERE tenant = '1' AND trigger <> 'base' AND trigger <> 'schedule'";

fn backup(major: u32) {
    block_on(async {
        let cluster = database(major);
        let agent = agent(&cluster);
        let mut asks = cluster.connect("shop").await;
        let (before, after) = (cluster.connect("shop").await, cluster.connect("shop").await);
        let db = cluster.connect("shop").await;

        // The point is the commit: what commits before it is in, whatever it began after; what commits later is not.
        after
            .batch_execute("BEGIN; INSERT INTO a VALUES (1, 5002, 'began before, committed after')")
            .await
            .expect("insert");
        let t = asks.transaction().await.expect("begin");
        t.execute("INSERT INTO a VALUES (1, 5000, 'with it')", &[]).await.expect("insert");
        let job: i64 = t
            .query_one("SELECT coffer.backup('1', 'before migration 42', 'pre-migration')", &[])
            .await
            .expect("a job")
            .get(0);
        let said = t.query_one("SELECT coffer.wait($1)", &[&job]).await.expect_err("it is not committed");
        assert!(format!("{said:?}").contains("not committed yet"), "{said:?}");
        drop(t);
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM coffer.jobs"), "0", "a rolled back job is none");

        let t = asks.transaction().await.expect("begin");
        t.execute("INSERT INTO a VALUES (1, 5000, 'with it')", &[]).await.expect("insert");
        let job: i64 = t
            .query_one("SELECT coffer.backup('1', 'before migration 42', 'pre-migration')", &[])
            .await
            .expect("a job")
            .get(0);
        before.batch_execute("INSERT INTO a VALUES (1, 5001, 'committed before')").await.expect("insert");
        t.commit().await.expect("commit");
        after.batch_execute("COMMIT; DELETE FROM a WHERE tenant = 1 AND id < 50; DELETE FROM b").await.expect("damage");

        // What psql sees of the waiting: progress, then the row.
        let said = cluster.psql_err("shop", &format!("SELECT * FROM coffer.wait({job}, '1min'); SELECT 1 / 0"));
        assert!(
            said.contains(&format!("NOTICE:  job {job} (backup of tenant 1): ")) && said.contains("division"),
            "{said}"
        );
        let row = cluster.psql(
            "shop",
            &format!("SELECT state, progress, result ->> 'trigger', result ->> 'rows', result ->> 'id' FROM coffer.wait({job})"),
        );
        let id = row.strip_prefix("done|1|pre-migration|232|").unwrap_or_else(|| panic!("{row}")).to_owned();
        wait_for("the backup to be listed", 30, || {
            (cluster.psql("shop", ASKED_FOR) == format!("1|{id}|before migration 42|0")).then_some(())
        });
        let listed = restored::listed(&agent, "1")["backups"].to_string();
        assert!(listed.contains(&id) && listed.contains("before migration 42"), "{listed}");

        let to = format!("backup:{id}");
        let state = job_of(&cluster, &format!("restore('1', '{to}', dry_run => false)"));
        assert_eq!(state, "done");
        let have = truth::rows_of(&db, &tables()[0], "1").await;
        assert_eq!(have.len(), 202, "{have:?}");
        assert!(have.iter().any(|r| r.contains("5000")) && have.iter().any(|r| r.contains("5001")), "{have:?}");
        assert!(!have.iter().any(|r| r.contains("5002")), "{have:?}");
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM b"), "30", "only tenant 1 came back");

        // An incident's is held.
        assert_eq!(job_of(&cluster, "backup('1', 'break-in', 'incident')"), "done");
        wait_for("the hold to be listed", 30, || {
            // The restore's undo is held, too.
            let held = "SELECT h.reason, h.state, count(b.*) FROM coffer.holds h JOIN coffer.backups b ON h.hold = ANY (b.holds) \
                WHERE h.reason LIKE 'incident%' GROUP BY 1, 2";
            (cluster.psql("shop", held) == "incident: break-in|held|1").then_some(())
        });
        // While somebody writes without an end.
        cluster.psql("shop", "INSERT INTO a SELECT 2, 10000 + i, 'x' FROM generate_series(1, 50000) i");
        assert_eq!(job_of(&cluster, "backup('2', kind => 'compliance')"), "done");
        let rows = "SELECT result ->> 'rows' FROM coffer.jobs WHERE tenant = '2' AND kind = 'backup'";
        assert_eq!(cluster.psql("shop", rows), "50200");
        assert_eq!(agent.json(&["verify"])["ok"], true);
    });
}

pub fn job_of(cluster: &Cluster, call: &str) -> String {
    job(cluster, call, "state")
}

fn backup_of_an_agent_that_dies(major: u32) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    agent.stop();
    for (n, point) in ["job-after-claim", "full-after-objects", "job-before-finish"].iter().enumerate() {
        let job = cluster.psql("shop", &format!("SELECT coffer.backup('1', '{point}')"));
        cluster.psql("shop", "DELETE FROM a WHERE tenant = 1 AND id = (SELECT max(id) FROM a WHERE tenant = 1)");
        agent.env = vec![("COFFER_FAILPOINTS".into(), format!("{point}=abort"))];
        agent.start();
        agent.wait_end(60);
        agent.env.clear();
        agent.start();
        let done = cluster.psql("shop", &format!("SELECT state, result ->> 'rows' FROM coffer.wait({job}, '1min')"));
        assert_eq!(done, format!("done|{}", 230 - n), "at {point}");
        let id = cluster.psql("shop", &format!("SELECT result ->> 'id' FROM coffer.jobs WHERE job = {job}"));
        let backups = restored::listed(&agent, "1")["backups"].clone();
        let of_this: Vec<_> = backups
            .as_array()
            .expect("a list")
            .iter()
            .filter(|b| b["reason"] == *point)
            .map(|b| b["id"].clone())
            .collect();
        assert_eq!(of_this, [id], "one backup, at {point}");
        agent.stop();
    }
}

fn command_line(major: u32) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    let doc = agent.json(&["backup", "--tenant", "1", "--reason", "by hand", "--kind", "pre-maintenance", "--wait"]);
    assert_eq!((&doc["version"], &doc["tenant"]), (&1.into(), &"1".into()), "{doc}");
    assert_eq!((&doc["backup"]["trigger"], &doc["backup"]["rows"]), (&"pre-maintenance".into(), &230.into()), "{doc}");
    let id = doc["backup"]["id"].as_str().expect("an id");
    let out = restored::to_files(&agent, "1", &format!("backup:{id}"));
    assert!(out.names().contains(&"manifest.json".to_owned()));
    let by = cluster.psql("shop", "SELECT requested_by LIKE 'coffer backup%', state FROM coffer.jobs");
    assert_eq!(by, "t|done");
    let audit = "SELECT detail ->> 'by' LIKE 'coffer backup%' FROM coffer.audit_log WHERE action = 'backup'";
    assert_eq!(cluster.psql("shop", audit), "t");

    assert_eq!(agent.json_err(&["backup", "--tenant", "nobody"]).0, 3);
    assert_eq!(agent.coffer(&["backup", "--tenant", "1", "--kind", "yearly"]).status.code(), Some(2));
    agent.stop();
    let doc = agent.json(&["backup", "--tenant", "1"]);
    assert!(doc["job"].as_i64().is_some() && doc["backup"].is_null(), "{doc}");
    // Nobody is there: it says so, and waits.
    cluster.psql("shop", "UPDATE coffer.agent_state SET reported_at = now() - interval '1 hour'");
    let job = &doc["job"];
    cluster.psql("shop", &format!("SELECT coffer.cancel({job})"));
    cluster.stop("fast");
    assert_eq!(agent.json_err(&["backup", "--tenant", "1"]).0, 8);
}

fn restore_and_verify(major: u32) {
    block_on(async {
        let cluster = database(major);
        let agent = agent(&cluster);
        let mut db = cluster.connect("shop").await;
        cluster.psql("shop", "UPDATE a SET v = v || '!' WHERE id % 3 = 0");
        let good = truth::take(&mut db, &tables(), "good").await;
        cluster.script("shop", "DELETE FROM a WHERE tenant = 2 AND id < 50; UPDATE b SET v = 'lost' WHERE tenant = 2;");
        let bad = truth::take(&mut db, &tables(), "bad").await;

        // A dry run is what is asked for unless said otherwise.
        let columns = "state, result ->> 'dry_run', result ->> 'mode', result #>> '{tables,0,inserted}', progress";
        assert_eq!(job(&cluster, "restore('2', 'name:good')", columns), "done|true|in-place|49|1");
        assert!(bad.differences(&db, &tables(), "2").await.is_empty(), "a dry run changed something");
        let counted = cluster.psql("shop", "SELECT max(job) FROM coffer.jobs");
        let row = job(&cluster, "restore('2', 'name:good', dry_run => false)", &format!("{columns}, job"));
        let number = row.strip_prefix("done|false|in-place|49|1|").unwrap_or_else(|| panic!("{row}"));
        let wrong = good.differences(&db, &tables(), "2").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
        for t in ["1", "3"] {
            assert!(bad.differences(&db, &tables(), t).await.is_empty(), "tenant {t} was touched");
        }
        let left = cluster.psql("shop", "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa_coffer_fence%'");
        assert_eq!(left, "0", "the fence is still there");

        // By its number it is taken back; what changed nothing is not.
        let undo = |n: &str| ["restore", "--undo", n, "--wait", "60s", "--confirm"].map(str::to_owned);
        let undone = agent.json(&undo(number).each_ref().map(String::as_str));
        assert_eq!((&undone["tenant"], &undone["tables"][0]["deleted"]), (&"2".into(), &49.into()), "{undone}");
        assert!(bad.differences(&db, &tables(), "2").await.is_empty(), "it was not taken back");
        for (n, code, said) in [(counted.as_str(), 10, "changed nothing"), ("999999", 3, "no job 999999")] {
            let (exit, e) = agent.json_err(&undo(n).each_ref().map(String::as_str));
            let message = e["error"]["message"].as_str().expect("a message");
            assert!(exit == code && message.contains(said), "{exit}: {e}");
        }

        // Beside the live rows, by an operator, who can read what came.
        cluster.psql("shop", "CREATE ROLE op LOGIN IN ROLE coffer_operator");
        let op = |sql: &str| cluster.psql("shop", &format!("SET SESSION AUTHORIZATION op; {sql}"));
        let n = op("SELECT coffer.restore('2', 'name:bad', 'schema', false)");
        let schema = op(&format!("SELECT quote_ident(result ->> 'schema') FROM coffer.wait({n}, '1min')"));
        assert_eq!(op(&format!("SELECT count(*) FROM {schema}.a")), "151", "schema {schema}");

        // A point that is not there, and one before everything.
        let n = cluster.psql("shop", "SELECT coffer.restore('2', 'name:never')");
        let said = cluster.psql_err("shop", &format!("SELECT coffer.wait({n})"));
        assert!(said.contains("there is no durable restore point 'never'") && said.contains("HINT"), "{said}");
        assert_eq!(
            cluster
                .psql("shop", &format!("SELECT state, result #>> '{{error,exit}}' FROM coffer.jobs WHERE job = {n}")),
            "failed|3"
        );

        // What is read back is noted, and seen as soon as the views are brought up to date.
        assert_eq!(
            job(
                &cluster,
                "verify('2')",
                "state, result ->> 'ok', (result ->> 'objects')::int > 1, (result #>> '{live,0,ok}')"
            ),
            "done|true|t|true"
        );
        wait_for("the verification to be listed", 30, || {
            let seen = cluster.psql("shop", "SELECT tenant, ok, what FROM coffer.verifications ORDER BY what");
            (seen == "2|t|live\n2|t|read_back").then_some(())
        });
        assert_eq!(
            cluster.psql(
                "shop",
                "SELECT bool_and(restorable), count(*), bool_and(to_lsn = (SELECT durable_lsn FROM coffer.status)) \
                 FROM coffer.recovery_window"
            ),
            "t|3|t"
        );
        assert_eq!(
            cluster.psql(
                "shop",
                "SELECT count(DISTINCT tenant), bool_and(rows > 0), bool_and(as_of IS NOT NULL) FROM coffer.backups"
            ),
            "3|t|t"
        );

        // Of what is damaged the job says so.
        let object = wait_for("an object", 5, || {
            let folder = agent.repository();
            find_largest(&folder)
        });
        std::fs::write(&object, b"not what it was").expect("our store");
        let failing = ["1", "2", "3"].iter().filter(|t| {
            let n = cluster.psql("shop", &format!("SELECT coffer.verify('{t}')"));
            wait_for("the job to end", 60, || {
                let state = cluster.psql("shop", &format!("SELECT state FROM coffer.jobs WHERE job = {n}"));
                (state == "done" || state == "failed").then_some(state)
            }) == "failed"
        });
        assert_eq!(failing.count(), 1, "one tenant's object is damaged");
        let said = cluster.psql(
            "shop",
            "SELECT error LIKE '%not everything is as it was written%', result ->> 'ok' FROM coffer.jobs WHERE state = 'failed' AND kind = 'verify'",
        );
        assert_eq!(said, "t|false");
        let _ = agent;
    });
}

/// The largest file below a folder that is a tenant's.
fn find_largest(folder: &std::path::Path) -> Option<std::path::PathBuf> {
    let mut best: Option<(u64, std::path::PathBuf)> = None;
    let mut folders = vec![folder.to_owned()];
    while let Some(f) = folders.pop() {
        for e in std::fs::read_dir(f).ok()?.flatten() {
            let meta = e.metadata().ok()?;
            if meta.is_dir() {
                folders.push(e.path());
            } else if e.path().components().any(|c| c.as_os_str() == "t")
                && best.as_ref().is_none_or(|(n, _)| meta.len() > *n)
            {
                best = Some((meta.len(), e.path()));
            }
        }
    }
    best.map(|(_, p)| p)
}

fn an_agent_that_dies(major: u32) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    cluster.psql("shop", "SELECT coffer.restore_point('good')");
    cluster.psql("shop", "DELETE FROM a WHERE tenant = 3");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    agent.stop();
    for (n, point) in ["job-after-claim", "restore-after-fence", "job-before-finish"].iter().enumerate() {
        let job = cluster.psql("shop", "SELECT coffer.restore('3', 'name:good', dry_run => false)");
        agent.env = vec![("COFFER_FAILPOINTS".into(), format!("{point}=abort"))];
        agent.start();
        agent.wait_end(60);
        let of_job =
            |columns: &str| cluster.psql("shop", &format!("SELECT {columns} FROM coffer.jobs WHERE job = {job}"));
        assert_eq!(of_job("state"), "running", "at {point}");
        agent.env.clear();
        agent.start();
        assert_eq!(
            cluster.psql("shop", &format!("SELECT state FROM coffer.wait({job}, '1min')")),
            "done",
            "at {point}"
        );
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM a WHERE tenant = 3"), "200", "at {point}");
        let left = cluster.psql("shop", "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa_coffer_fence%'");
        assert_eq!(left, "0", "the fence is still there, after {point}");
        agent.stop();
        cluster.psql("shop", &format!("DELETE FROM a WHERE tenant = 3 AND id > {n}"));
    }
    // One that is stopped at a job gives it back.
    let job = cluster.psql("shop", "SELECT coffer.verify('1')");
    agent.env = vec![("COFFER_FAILPOINTS".into(), "job-after-claim=sleep(1500)".into())];
    agent.start();
    let attempts = format!("SELECT state, attempts FROM coffer.job_entries WHERE job = {job}");
    wait_for("the job to begin", 30, || (cluster.psql("shop", &attempts) == "running|1").then_some(()));
    assert_eq!(agent.stop(), Some(0));
    assert_eq!(cluster.psql("shop", &attempts), "queued|0");
}

/// Carries a restore of tenant 3 to `good` out with an agent that dies when it is done; the job.
fn die_after(cluster: &Cluster, agent: &mut Agent, call: &str) -> String {
    let job = cluster.psql("shop", &format!("SELECT coffer.{call}"));
    agent.env = vec![("COFFER_FAILPOINTS".into(), "job-before-finish=abort".into())];
    agent.start();
    agent.wait_end(60);
    agent.env.clear();
    assert_eq!(cluster.psql("shop", &format!("SELECT state FROM coffer.jobs WHERE job = {job}")), "running");
    job
}

fn damaged(major: u32) -> (Cluster, Agent) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    cluster.psql("shop", "SELECT coffer.restore_point('good')");
    cluster.psql("shop", "DELETE FROM a WHERE tenant = 3 AND id <= 50");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    agent.stop();
    (cluster, agent)
}

/// What clients write after a restore's commit stays, though its job is taken up again.
fn restored_once(major: u32) {
    let (cluster, mut agent) = damaged(major);
    let job = die_after(&cluster, &mut agent, "restore('3', 'name:good', dry_run => false)");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM a WHERE tenant = 3"), "200", "it was committed");
    cluster.script("shop", "INSERT INTO a VALUES (3, 1000, 'later'); DELETE FROM a WHERE tenant = 3 AND id <= 10;");
    // Nobody can take back what is done.
    assert_eq!(cluster.psql("shop", &format!("SELECT coffer.cancel({job})")), "t");
    agent.start();
    let columns =
        "state, result #>> '{tables,0,inserted}', result ->> 'mode', result #>> '{target,asked}', result ->> 'undo'";
    let row = cluster.psql("shop", &format!("SELECT {columns} FROM coffer.wait({job}, '1min')"));
    let undo = row.strip_prefix("done|50|in-place|name:good|").unwrap_or_else(|| panic!("{row}")).to_owned();
    assert_eq!(cluster.psql("shop", "SELECT count(*), max(id) FROM a WHERE tenant = 3"), "191|1000");
    let holds = restored::listed(&agent, "3")["holds"].clone();
    assert!(holds.as_array().expect("holds").iter().any(|h| h["hold"] == *undo), "what an undo needs is held: {holds}");

    // A restore that found nothing to do was done, too.
    agent.stop();
    cluster.psql("shop", "SELECT coffer.restore_point('better')");
    let job = die_after(&cluster, &mut agent, "restore('3', 'name:better', dry_run => false)");
    cluster.psql("shop", "INSERT INTO a VALUES (3, 1001, 'later')");
    agent.start();
    let row = cluster.psql("shop", &format!("SELECT state, result ->> 'undo' FROM coffer.wait({job}, '1min')"));
    assert_eq!(row, "done|");
    assert_eq!(cluster.psql("shop", "SELECT max(id) FROM a WHERE tenant = 3"), "1001");
}

/// A copy beside the live rows is there once, and its job is done.
fn copied_once(major: u32) {
    let (cluster, mut agent) = damaged(major);
    let job = die_after(&cluster, &mut agent, "restore('3', 'name:good', 'schema', false)");
    agent.start();
    let row = cluster
        .psql("shop", &format!("SELECT state, result ->> 'schema', result ->> 'mode' FROM coffer.wait({job}, '1min')"));
    let schemas =
        cluster.psql("shop", "SELECT string_agg(nspname, ',') FROM pg_namespace WHERE nspname LIKE 'coffer\\_3%'");
    assert_eq!(row, format!("done|{schemas}|schema"));
    assert!(schemas.ends_with(&format!("z_j{job}")), "{schemas}");
    assert_eq!(cluster.psql("shop", &format!("SELECT count(*) FROM {schemas}.a")), "200");
    // The same target once more is another copy.
    assert_eq!(job_of(&cluster, "restore('3', 'name:good', 'schema', false)"), "done");
}

/// Whoever locks a job's row holds up what is said of it, and not the job.
fn locked_row(major: u32) {
    block_on(async {
        let (cluster, mut agent) = damaged(major);
        let job = cluster.psql("shop", "SELECT coffer.restore('3', 'name:good', dry_run => false)");
        agent.env = vec![("COFFER_FAILPOINTS".into(), "job-after-claim=sleep(3000)".into())];
        agent.start();
        let state = format!("SELECT state FROM coffer.jobs WHERE job = {job}");
        wait_for("the job to begin", 30, || (cluster.psql("shop", &state) == "running").then_some(()));
        let forgetful = cluster.connect("shop").await;
        forgetful.batch_execute(&format!("BEGIN; SELECT coffer.cancel({job})")).await.expect("cancel");
        wait_for("the rows to come back", 60, || {
            (cluster.psql("shop", "SELECT count(*) FROM a WHERE tenant = 3") == "200").then_some(())
        });
        wait_for("the fences to go", 30, || {
            let left = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa_coffer_fence%'";
            (cluster.psql("shop", left) == "0").then_some(())
        });
        assert_eq!(cluster.psql("shop", &state), "running", "nobody can say that it is done");
        forgetful.batch_execute("ROLLBACK").await.expect("rollback");
        assert_eq!(cluster.psql("shop", &format!("SELECT state FROM coffer.wait({job}, '1min')")), "done");
        assert_eq!(agent.stop(), Some(0));
    });
}

/// A job whose session broke is begun anew while the first attempt is still at work: one backup comes of it.
fn lost_session(major: u32) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    agent.stop();
    let job = cluster.psql("shop", "SELECT coffer.backup('1', 'once')");
    agent.env = vec![("COFFER_FAILPOINTS".into(), "full-after-objects@1=sleep(8000)".into())];
    agent.start();
    wait_for("the full to be written", 60, || agent.log().contains("full-after-objects: sleep").then_some(()));
    let ended = cluster.psql(
        "shop",
        &format!(
            "SELECT pg_terminate_backend(backend) FROM coffer.job_entries WHERE job = {job} AND state = 'running'"
        ),
    );
    assert_eq!(ended, "t");
    let id = cluster.psql("shop", &format!("SELECT result ->> 'id' FROM coffer.wait({job}, '1min')"));
    assert_eq!(cluster.psql("shop", &format!("SELECT attempts FROM coffer.job_entries WHERE job = {job}")), "2");
    // The first attempt has slept and is over.
    std::thread::sleep(std::time::Duration::from_secs(9));
    let backups = restored::listed(&agent, "1")["backups"].clone();
    let of_this: Vec<_> =
        backups.as_array().expect("a list").iter().filter(|b| b["reason"] == "once").map(|b| b["id"].clone()).collect();
    assert_eq!(of_this, [id], "{}", agent.log());
}

/// A job that panics ends neither its lane nor unnoticed.
fn a_panic(major: u32) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    agent.stop();
    agent.env = vec![("COFFER_FAILPOINTS".into(), "job-after-claim@1=panic".into())];
    agent.start();
    assert_eq!(job_of(&cluster, "verify('1')"), "done");
    let log = agent.log();
    assert!(log.contains("jobs_failed") && log.contains("a job ended in a panic"), "{log}");
    assert_eq!(cluster.psql("shop", "SELECT attempts FROM coffer.job_entries"), "2");
}

/// The advisory locks of the agent's sessions are everybody's to take: then it says so, and goes on.
fn taken_locks(major: u32) {
    block_on(async {
        let cluster = database(major);
        let mut agent = agent(&cluster);
        agent.stop();
        cluster.psql("shop", "CREATE ROLE nobody LOGIN");
        let nobody = cluster.connect("shop").await;
        nobody
            .batch_execute(
                "SET ROLE nobody; SELECT pg_advisory_lock(6516585, pg_backend_pid() + i) FROM generate_series(1, 5000) i",
            )
            .await
            .expect("locks");
        agent.start();
        wait_for("the alarm", 60, || agent.log().contains("holds the advisory lock (6516585,").then_some(()));
        // NOTIFY is everybody's, too.
        nobody
            .batch_execute("SELECT pg_notify('coffer_jobs', i::text) FROM generate_series(1, 20000) i")
            .await
            .expect("notify");
        nobody.batch_execute("SELECT pg_advisory_unlock_all()").await.expect("unlock");
        assert_eq!(job_of(&cluster, "verify('1')"), "done");
    });
}

/// Two lanes carry out what was said of a tenant's retention in the order in which it was said.
fn words_in_order(major: u32) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    agent.stop();
    cluster.psql("shop", "SELECT coffer.set_policy('1', '{\"daily\": 7}')");
    let hold = cluster.psql("shop", "SELECT coffer.hold('1', 'first')");
    cluster.psql("shop", "SELECT coffer.set_policy('1', '{\"daily\": 90}')");
    cluster.psql("shop", &format!("SELECT coffer.release({hold})"));
    cluster.psql("shop", "SELECT coffer.set_policy('2', '{\"daily\": 5}')");
    // The first is held up: the second lane has nothing to do but the other tenant's.
    agent.env = vec![("COFFER_FAILPOINTS".into(), "job-after-claim@1=sleep(4000)".into())];
    agent.start();
    wait_for("all to be done", 60, || {
        (cluster.psql("shop", "SELECT count(*) FROM coffer.jobs WHERE state <> 'done'") == "0").then_some(())
    });
    let order = "SELECT string_agg(kind, ' ' ORDER BY finished_at) FROM coffer.jobs WHERE tenant = '1'";
    assert_eq!(cluster.psql("shop", order), "policy hold policy release");
    wait_for("the last word to be seen", 30, || {
        let policy = "SELECT policy ->> 'daily', state FROM coffer.policies WHERE tenant = '1'";
        (cluster.psql("shop", policy) == "90|in force").then_some(())
    });
    wait_for("the release to be seen", 30, || {
        (cluster.psql("shop", "SELECT state FROM coffer.holds") == "released").then_some(())
    });
    assert_eq!(restored::listed(&agent, "1")["holds"], serde_json::json!([]));
}

fn words(major: u32) {
    let cluster = database(major);
    let agent = agent(&cluster);
    let hold = cluster.psql("shop", "SELECT coffer.hold('1', 'lawsuit', from_time => '2020-01-01Z')");
    let state = format!("SELECT state, from_time = '2020-01-01Z', to_time FROM coffer.holds WHERE hold = {hold}");
    wait_for("the hold to be in force", 30, || (cluster.psql("shop", &state) == "held|t|").then_some(()));
    wait_for("the backups to be held", 30, || {
        let held = "SELECT bool_and(holds = ARRAY[1::bigint]) FROM coffer.backups WHERE tenant = '1'";
        (cluster.psql("shop", held) == "t").then_some(())
    });
    cluster.psql("shop", &format!("SELECT coffer.release({hold})"));
    wait_for("the hold to be released", 30, || cluster.psql("shop", &state).starts_with("released").then_some(()));
    cluster.psql("shop", "SELECT coffer.set_policy('1', '{\"daily\": 90, \"pitr\": \"14d\"}')");
    wait_for("the policy to be in force", 30, || {
        (cluster.psql("shop", "SELECT state, policy ->> 'daily' FROM coffer.policies") == "in force|90").then_some(())
    });
    let all = cluster.psql("shop", "SELECT string_agg(kind || ' ' || state, ', ' ORDER BY job) FROM coffer.jobs");
    assert_eq!(all, "hold done, release done, policy done");

    // Times that the repository or the source cannot say are without an end; the views go on.
    cluster.psql("shop", "SELECT coffer.hold('2', 'for ever', '0044-03-15 BC', '9999-12-31')");
    agent.json(&["hold", "--tenant", "2", "--reason", "since Caesar", "--from=-000043-03-15T00:00:00Z"]);
    wait_for("both holds to be in force", 30, || {
        let held = "SELECT string_agg(reason, ', ' ORDER BY hold) FROM coffer.holds \
            WHERE state = 'held' AND from_time IS NULL AND to_time IS NULL";
        (cluster.psql("shop", held) == "for ever, since Caesar").then_some(())
    });

    // An incident's backup is released by its own id.
    assert_eq!(job_of(&cluster, "backup('3', 'break-in', 'incident')"), "done");
    let of_incident = "SELECT state FROM coffer.holds WHERE reason = 'incident: break-in'";
    wait_for("the incident to be held", 30, || (cluster.psql("shop", of_incident) == "held").then_some(()));
    let id = wait_for("the incident's backup to be shown", 30, || {
        let id = cluster.psql("shop", "SELECT backup FROM coffer.backups WHERE trigger = 'incident'");
        (!id.is_empty()).then_some(id)
    });
    agent.json(&["release", &id]);
    assert_eq!(restored::listed(&agent, "3")["holds"], serde_json::json!([]));
    wait_for("the incident to be released", 90, || (cluster.psql("shop", of_incident) == "released").then_some(()));
    assert_eq!(agent.json_err(&["release", &id]).0, 3, "it is released");
}

fn without_an_agent(major: u32) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    agent.stop();
    let job = cluster.psql("shop", "SELECT coffer.verify('1')");
    cluster.psql("shop", "UPDATE coffer.agent_state SET reported_at = now() - interval '40 s'");
    let said = cluster.psql_err("shop", &format!("SELECT coffer.wait({job}, '2 s')"));
    assert!(said.contains("NOTICE") && said.contains("no agent has reported for 4"), "{said}");
    assert!(said.contains("is not done after") && said.contains("It is queued. No agent has reported for 4"), "{said}");
    cluster.psql("shop", &format!("SELECT coffer.cancel({job})"));
    agent.start();
    let said = cluster.psql_err("shop", &format!("SELECT coffer.wait({job})"));
    assert!(said.contains("was cancelled"), "{said}");
    // Who restores in place is an administrator; a tenant's administrator sees its own.
    cluster.script(
        "shop",
        "CREATE ROLE op LOGIN IN ROLE coffer_operator; CREATE ROLE one LOGIN; SELECT coffer.grant_tenant('1', 'one');",
    );
    let said = cluster.psql_err("shop", "SET ROLE op; SELECT coffer.restore('1', 'latest')");
    assert!(said.contains("permission denied to restore in place"), "{said}");
    let n = cluster.psql("shop", "SELECT coffer.verify('2')");
    cluster.psql("shop", &format!("SELECT state FROM coffer.wait({n}, '1min')"));
    let seen = cluster.psql(
        "shop",
        "SET ROLE one; SELECT (SELECT string_agg(DISTINCT tenant, ',') FROM coffer.jobs), \
         (SELECT string_agg(DISTINCT tenant, ',') FROM coffer.backups)",
    );
    assert!(seen.ends_with("1|1"), "{seen}");
}
