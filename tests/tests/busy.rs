//! Jobs that are cancelled, at whatever they are, and jobs of an agent that has other things to do.

use crate::jobs::{agent, database, job_of, registered};
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use coffer_tests::{block_on, wait_for};

on_majors! {
    cancelled: cancelled;
    at_work: at_work;
    a_restore_that_waits: a_restore_that_waits;
    beside_a_scheduled_full: beside_a_scheduled_full;
    behind_a_large_transaction: behind_a_large_transaction;
}

/// Nothing is made by schedule.
const NEVER: &str = "[schedule]\nincremental = \"0 0 1 1 *\"\nfull = \"0 0 1 1 *\"\nprune = \"0 0 1 1 *\"\n[verify]\nscrub_rate = \"0\"\n";

/// An agent with more configuration, and with failpoints.
fn busy(cluster: &Cluster, more: &str, failpoints: &str) -> Agent {
    let mut agent = Agent::new(&Setup { more: more.to_owned(), ..Setup::of(cluster, "shop") });
    agent.env = vec![("COFFER_FAILPOINTS".into(), failpoints.into())];
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2", "3"]);
    registered(cluster);
    agent
}

fn state(cluster: &Cluster, job: &str) -> String {
    cluster.psql("shop", &format!("SELECT state FROM coffer.jobs WHERE job = {job}"))
}

fn cancelled(major: u32) {
    let cluster = database(major);
    let mut agent = agent(&cluster);
    agent.stop();
    let queued = cluster.psql("shop", "SELECT coffer.backup('1')");
    assert_eq!(cluster.psql("shop", &format!("SELECT coffer.cancel({queued})")), "t");
    let job = cluster.psql("shop", "SELECT coffer.backup('1')");
    agent.env = vec![("COFFER_FAILPOINTS".into(), "job-after-claim=sleep(10000)".into())];
    agent.start();
    wait_for("the job to begin", 30, || (state(&cluster, &job) == "running").then_some(()));
    assert_eq!(cluster.psql("shop", &format!("SELECT coffer.cancel({job})")), "t");
    assert_eq!(state(&cluster, &job), "running", "a running job ends at its next step");
    for n in [&job, &queued] {
        let said = cluster.psql_err("shop", &format!("SELECT coffer.wait({n}, '1min')"));
        assert!(said.contains("was cancelled"), "{said}");
        assert_eq!(cluster.psql("shop", &format!("SELECT coffer.cancel({n})")), "f");
    }
    assert!(!restored::listed(&agent, "1")["backups"].to_string().contains("manual"), "it was not taken");
    assert_eq!(job_of(&cluster, "backup('1')"), "done");
}

/// How often a full has come to a table.
fn tables_begun(agent: &Agent) -> usize {
    agent.log().matches("failpoint full-at-table: sleep").count()
}

/// Of a backup that takes long psql is told how far it is, and cancelling it ends it where it is.
fn at_work(major: u32) {
    let cluster = database(major);
    let agent = busy(&cluster, NEVER, "full-at-table=sleep(2000)");
    // The first of two tables has 200 of 230 rows.
    let job = cluster.psql("shop", "SELECT coffer.backup('1', 'slowly')");
    let said = cluster.psql_err("shop", &format!("SELECT * FROM coffer.wait({job}, '1min'); SELECT 1 / 0"));
    let notices: Vec<&str> =
        said.lines().filter(|l| l.contains(&format!("job {job} (backup of tenant 1): "))).collect();
    let percent = |l: &&str| l.split("): ").nth(1)?.split_once(" %: ")?.0.parse::<u32>().ok();
    let parts: Vec<u32> = notices.iter().filter_map(percent).collect();
    assert!(parts.is_sorted() && parts.iter().any(|p| (50..100).contains(p)), "{said}");
    assert!(notices.iter().any(|n| n.contains("taking a full at") && n.ends_with(": 200 rows")), "{said}");
    assert_eq!(
        cluster.psql("shop", &format!("SELECT progress, result ->> 'rows' FROM coffer.jobs WHERE job = {job}")),
        "1|230"
    );

    cluster.psql("shop", "UPDATE a SET v = v || '!'");
    let before = tables_begun(&agent);
    let job = cluster.psql("shop", "SELECT coffer.backup('2', 'not wanted any more')");
    wait_for("the full to be under way", 30, || (tables_begun(&agent) > before).then_some(()));
    assert_eq!(state(&cluster, &job), "running");
    assert_eq!(cluster.psql("shop", &format!("SELECT coffer.cancel({job})")), "t");
    let said = cluster.psql_err("shop", &format!("SELECT coffer.wait({job}, '20 s')"));
    assert!(said.contains("was cancelled"), "{said}");
    let listed = restored::listed(&agent, "2")["backups"].to_string();
    assert!(!listed.contains("not wanted any more"), "{listed}");
    // It is no worse for it.
    assert_eq!(job_of(&cluster, "backup('2', 'wanted again')"), "done");
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// A restore in place that waits for a client's row is cancelled: nothing is changed, no fence stands.
fn a_restore_that_waits(major: u32) {
    block_on(async {
        let cluster = database(major);
        let agent = agent(&cluster);
        cluster.psql("shop", "SELECT coffer.restore_point('good')");
        cluster.psql("shop", "UPDATE a SET v = 'bad' WHERE tenant = 3 AND id <= 50");
        let client = cluster.connect("shop").await;
        client.batch_execute("BEGIN; SELECT FROM a WHERE tenant = 3 AND id = 7 FOR UPDATE").await.expect("a row");
        let job = cluster.psql("shop", "SELECT coffer.restore('3', 'name:good', dry_run => false)");
        let fences = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'aaa\\_coffer\\_fence%'";
        wait_for("both tables to be fenced", 60, || (cluster.psql("shop", fences) == "6").then_some(()));
        wait_for("it to say how far it is", 10, || {
            let row = format!(
                "SELECT progress > 0.1 AND progress < 1, message LIKE 'restoring: % rows' FROM coffer.jobs WHERE job = {job}"
            );
            (cluster.psql("shop", &row) == "t|t").then_some(())
        });
        assert_eq!(cluster.psql("shop", &format!("SELECT coffer.cancel({job})")), "t");
        // The client's row holds up that a fence is removed, too.
        let removes =
            "SELECT count(*) > 0 FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.relation = 'a'::regclass
            AND l.mode = 'AccessExclusiveLock' AND a.application_name = 'coffer restore'";
        wait_for("it to give up", 30, || (cluster.psql("shop", removes) == "t").then_some(()));
        client.batch_execute("ROLLBACK").await.expect("rollback");
        let said = cluster.psql_err("shop", &format!("SELECT coffer.wait({job}, '20 s')"));
        assert!(said.contains("was cancelled"), "{said}");
        assert_eq!(cluster.psql("shop", fences), "0", "the fence is still there");
        let bad = "SELECT count(*) FROM a WHERE tenant = 3 AND v = 'bad'";
        assert_eq!(cluster.psql("shop", bad), "50", "a cancelled restore changed something");
        assert_eq!(job_of(&cluster, "restore('3', 'name:good', dry_run => false)"), "done");
        assert_eq!(cluster.psql("shop", bad), "0");
        drop(agent);
    });
}

/// Somebody before a migration does not wait for the night's fulls.
fn beside_a_scheduled_full(major: u32) {
    let cluster = database(major);
    let more = NEVER.replace("full = \"0 0 1 1 *\"", "full = \"* * * * * *\"");
    let agent = busy(&cluster, &more, "full-at-table@1=sleep(60000)");
    wait_for("a scheduled full to be under way", 60, || (tables_begun(&agent) > 0).then_some(()));
    for tenant in ["1", "2", "3"] {
        let job = cluster.psql("shop", &format!("SELECT coffer.backup('{tenant}', 'before migration 42')"));
        let row = cluster.psql("shop", &format!("SELECT state, result ->> 'rows' FROM coffer.wait({job}, '20 s')"));
        assert_eq!(row, "done|230", "tenant {tenant}");
    }
    let log = agent.log();
    let since = log.split_once("failpoint full-at-table: sleep").map_or("", |(_, since)| since);
    assert!(!since.contains("scheduled fulls"), "they are over: nothing was shown");
}

/// One that is asked for while a transaction is spooled has it in, if that was committed before.
fn behind_a_large_transaction(major: u32) {
    let cluster = database(major);
    let more = format!("{NEVER}[limits]\nmemory = \"64MiB\"\n");
    let mut agent = busy(&cluster, &more, "");
    agent.stop();
    cluster.psql("shop", "INSERT INTO a SELECT 1, 1000 + i, repeat(md5(i::text), 20) FROM generate_series(1, 30000) i");
    let job = cluster.psql("shop", "SELECT coffer.backup('1', 'right after it')");
    agent.env = vec![("COFFER_FAILPOINTS".into(), "spool-after-write@1=sleep(2000)".into())];
    agent.start();
    let row = cluster.psql("shop", &format!("SELECT state, result ->> 'rows' FROM coffer.wait({job}, '2min')"));
    assert_eq!(row, "done|30230");
    assert!(agent.log().contains("failpoint spool-after-write: sleep"), "nothing was spooled: {}", agent.log());
}
