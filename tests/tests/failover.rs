//! Other timelines: a standby that takes over, with and without the slot; a primary that comes back beside it; two standbys
//! that do; a server that was put back; a slot that fell too far behind. What was durable before and what comes after is
//! restored exactly, and what lies between is refused.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Scratch};
use coffer_tests::stall::Stall;
use coffer_tests::truth::{self, Truth, Watched};
use coffer_tests::wait_for;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

on_majors! {
    a_standby_takes_over: a_standby_takes_over;
    an_old_primary_comes_back: an_old_primary_comes_back;
    promoted_apart: promoted_apart;
    promoted_beside: promoted_beside;
    the_slot_falls_behind: the_slot_falls_behind;
    the_server_is_put_back: the_server_is_put_back;
}

const DDL: &str = "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
    CREATE TABLE ev (tenant int NOT NULL, n int, v text);";
const TENANTS: [&str; 2] = ["1", "2"];

fn watched() -> Vec<Watched> {
    ["a", "ev"].map(|t| Watched::new(t, "tenant")).to_vec()
}

fn prepare(cluster: &Cluster) {
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    cluster.script("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
    write(cluster, 0);
}

/// Some changes of both tenants; those of another number are others.
fn write(cluster: &Cluster, n: u32) {
    cluster.psql(
        "shop",
        &format!(
            "INSERT INTO a SELECT t, {n} * 100 + i, 'v' || i FROM generate_series(1, 2) t, generate_series(1, 20) i;
             UPDATE a SET v = v || '{n}' WHERE id % 7 = {n} % 7; DELETE FROM a WHERE id % 11 = {n} % 11;
             INSERT INTO ev SELECT t, {n}, 'e' FROM generate_series(1, 2) t, generate_series(1, 3);
             DELETE FROM ev WHERE ctid IN (SELECT ctid FROM ev WHERE n < {n} LIMIT 1)"
        ),
    );
}

async fn take(cluster: &Cluster, name: &str) -> Truth {
    truth::take(&mut cluster.connect("shop").await, &watched(), name).await
}

fn durable(cluster: &Cluster) {
    cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '1min')");
}

/// Restores every tenant to each of these points, with `on` for the server of the scratch database.
async fn exact(agent: &Agent, on: &Cluster, truths: &[&Truth]) {
    let scratch = Scratch::new(on, DDL).await;
    let mut wrong = Vec::new();
    for truth in truths {
        for tenant in TENANTS {
            wrong.extend(scratch.check(agent, truth, &watched(), tenant).await);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let verify = agent.json(&["verify"]);
    assert_eq!(verify["ok"], true, "{verify}");
}

/// A target that nobody can restore to; nothing is written, and where it is outside the window, the window is told.
fn refused(agent: &Agent, to: &str) {
    let out = restored::Out::new();
    let (code, doc) = agent.json_err(&restored::args_now("1", to, out.arg()));
    assert!(out.names().is_empty());
    if to.starts_with("name:") && code == 3 {
        return;
    }
    assert_eq!(code, 4, "{to}: {doc}");
    let window = doc["error"]["window"].as_array().expect("a window");
    assert!(!window.is_empty(), "{to}: {doc}");
}

/// Gaps and windows of the first tenant, once there are so many.
fn spans(agent: &mut Agent, gaps: usize, windows: usize) -> Value {
    wait_for(&format!("{gaps} gaps and {windows} windows"), 90, || {
        assert_eq!(agent.ended(), None, "{}", agent.log());
        let listed = restored::listed(agent, "1");
        let of = |f: &str| listed[f].as_array().map_or(0, Vec::len);
        (of("gaps") == gaps && of("window") == windows).then_some(listed)
    })
}

/// Points the source of an agent elsewhere.
fn point_at(agent: &Agent, url: &str) {
    let text = std::fs::read_to_string(agent.config()).expect("the configuration");
    let line = text.lines().find(|l| l.starts_with("url = ")).expect("the source's");
    std::fs::write(agent.config(), text.replacen(line, &format!("url = \"{url}\""), 1)).expect("our folder");
}

fn of_these(servers: &[&Cluster]) -> String {
    let ports: Vec<String> = servers.iter().map(|c| c.port.to_string()).collect();
    format!(
        "host={} port={} user=coffer_agent dbname=shop target_session_attrs=primary",
        vec!["127.0.0.1"; servers.len()].join(","),
        ports.join(",")
    )
}

/// Stops the process that sends the stream. The kill of its server ends it all the same.
fn stall_the_stream(cluster: &Cluster) {
    let pid = cluster.psql("shop", "SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'coffer_shop'");
    // SAFETY: a plain signal to a process of our own cluster.
    assert_eq!(unsafe { libc::kill(pid.parse().expect("a pid"), libc::SIGSTOP) }, 0);
}

fn a_standby_takes_over(major: u32) {
    block_on(async {
        let first = Cluster::start(major);
        prepare(&first);
        first.psql("shop", "CREATE TABLE late (owner int NOT NULL, id int NOT NULL, PRIMARY KEY (owner, id))");
        let second = Cluster::standby_of(&first, "");
        standbys_are_refused(&second);

        // The standby is the first host: it is passed over.
        let source_url = of_these(&[&second, &first]);
        let mut agent = Agent::new(&Setup { source_url, ..Setup::of(&first, "shop") });
        agent.env = vec![("COFFER_FAILPOINTS".into(), "base-after-horizon@3=sleep(4000)".into())];
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        write(&first, 1);
        let before = take(&first, "before").await;
        durable(&first);
        caught_up(&first, &second);
        second.stop("fast");

        // What the standby never gets, archived all the same: a little, then more than follows after the promotion.
        first.psql("shop", "INSERT INTO a VALUES (1, 9999, 'lost')");
        let lost_at = first.psql("shop", "SELECT pg_current_wal_insert_lsn()");
        take(&first, "lost").await;
        let lost_time = first
            .psql("shop", "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
        first.psql("shop", "INSERT INTO ev SELECT 1, i, repeat(md5(i::text), 30) FROM generate_series(1, 4000) i");
        durable(&first);
        // A base whose marker goes down with the server.
        stall_the_stream(&first);
        first.psql("shop", "SELECT * FROM coffer.add_table('late', 'owner')");
        wait_for("a base to wait for its marker", 60, || {
            (agent.bases()["phase"] == "waiting for the stream").then_some(())
        });
        first.kill9();
        second.up();
        second.promote();

        let alarm = wait_for("the alarm", 60, || agent.alarms("gap").into_iter().next());
        assert!(alarm["message"].as_str().is_some_and(|m| m.contains("new bases follow")), "{alarm}");
        write(&second, 2);
        second.psql("shop", "INSERT INTO ev SELECT 2, i, repeat(md5(i::text), 3) FROM generate_series(1, 500) i");
        let listed = spans(&mut agent, 1, 2);
        assert_eq!(listed["gaps"][0]["reason"], "slot_lost", "{listed}");
        wait_for("the alarm to end", 60, || agent.alarms("gap").is_empty().then_some(()));
        // Nobody tells the new server, whose log is behind what the old one's was archived to, that more is durable than
        // it has written.
        durable(&second);
        let sane = "SELECT bool_and(l <= pg_current_wal_insert_lsn()) FROM (SELECT durable_lsn FROM coffer.agent_state
            UNION ALL SELECT confirmed_flush_lsn FROM pg_replication_slots) x (l)";
        assert_eq!(second.psql("shop", sane), "t");
        agent.kill9();
        write(&second, 3);
        agent.env.clear();
        agent.start();
        let after = take(&second, "after").await;
        exact(&agent, &second, &[&before, &after]).await;
        spans(&mut agent, 1, 2);
        refused(&agent, "name:lost");
        refused(&agent, &lost_at);
        refused(&agent, &lost_time);

        the_old_primary_is_left(&agent, &first);
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());
        a_slot_that_is_ahead(&mut agent, &second, &[&before, &after]).await;
    });
}

/// An agent that is pointed at a standby says so and leaves, and nothing is made there.
fn standbys_are_refused(standby: &Cluster) {
    let mut agent = Agent::new(&Setup::of(standby, "shop"));
    agent.start();
    assert_eq!(agent.wait_end(60), Some(10), "{}", agent.log());
    let log = agent.log();
    assert!(log.contains("is a standby") && log.contains("primary"), "{log}");
    assert_eq!(standby.psql("postgres", "SELECT count(*) FROM pg_replication_slots"), "0");
}

/// The primary of before comes back: an agent that is pointed there ends, and has told nobody there anything.
fn the_old_primary_is_left(agent: &Agent, old: &Cluster) {
    old.up();
    let told = "SELECT durable_lsn, reported_at FROM coffer.agent_state";
    let before = old.psql("shop", told);
    let mut twin = agent.twin();
    point_at(&twin, &old.url("coffer_agent", "shop"));
    twin.start();
    assert_eq!(twin.wait_end(60), Some(6), "{}", twin.log());
    let log = twin.log();
    assert!(log.contains("the server is on timeline 1, the log on 2"), "{log}");
    assert_eq!(old.psql("shop", told), before);
}

/// Waits until a standby has everything up to now.
fn caught_up(primary: &Cluster, standby: &Cluster) {
    let end = primary.psql("shop", "SELECT pg_current_wal_insert_lsn()");
    wait_for("the standby", 60, || {
        let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'");
        (standby.psql("postgres", &sql) == "t").then_some(())
    });
}

/// A job of the first tenant that has to end well.
fn job(cluster: &Cluster, call: &str) {
    let id = cluster.psql("shop", &format!("SELECT coffer.{call}('1')"));
    assert_eq!(cluster.psql("shop", &format!("SELECT state FROM coffer.wait({id}, '1min')")), "done");
}

/// The primary of before comes back, and takes writes: it is the first host, and nothing is read there or told to it, not by
/// an agent that runs and not by one that is started.
fn an_old_primary_comes_back(major: u32) {
    block_on(async {
        let first = Cluster::start(major);
        prepare(&first);
        first.psql("shop", "CREATE TABLE late (owner int NOT NULL, id int NOT NULL, PRIMARY KEY (owner, id))");
        let second = Cluster::standby_of(&first, "");
        let mut agent = Agent::new(&Setup { source_url: of_these(&[&first, &second]), ..Setup::of(&first, "shop") });
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let before = take(&first, "before").await;
        durable(&first);
        caught_up(&first, &second);
        first.kill9();
        second.promote();
        spans(&mut agent, 1, 2);
        durable(&second);

        first.up();
        write(&first, 7);
        first.psql("shop", "INSERT INTO late SELECT t, 70 + i FROM generate_series(1, 2) t, generate_series(1, 5) i");
        let told = "SELECT durable_lsn, reported_at FROM coffer.agent_state";
        let nothing = first.psql("shop", told);
        // Every session but the stream is opened again.
        let sessions = "FROM pg_stat_activity WHERE usename = 'coffer_agent' AND backend_type = 'client backend'";
        second.psql("shop", &format!("SELECT count(pg_terminate_backend(pid)) {sessions}"));
        second.psql("shop", "INSERT INTO late SELECT t, i FROM generate_series(1, 2) t, generate_series(1, 5) i");
        second.psql("shop", "SELECT * FROM coffer.add_table('late', 'owner')");
        wait_for("a base of the new table", 60, || {
            let log = agent.log();
            let (_, after) = log.split_once("taking bases of public.late\"")?;
            after.contains("bases are recorded").then_some(())
        });
        write(&second, 2);
        job(&second, "backup");
        let tables: Vec<Watched> = watched().into_iter().chain([Watched::new("late", "owner")]).collect();
        let after = truth::take(&mut second.connect("shop").await, &tables, "after").await;
        assert_eq!(agent.ended(), None, "{}", agent.log());
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());

        agent.start();
        write(&second, 3);
        let last = truth::take(&mut second.connect("shop").await, &tables, "last").await;
        durable(&second);
        exact(&agent, &second, &[&before]).await;
        let ddl = format!("{DDL} CREATE TABLE late (owner int NOT NULL, id int NOT NULL, PRIMARY KEY (owner, id));");
        let scratch = Scratch::new(&second, &ddl).await;
        for truth in [&after, &last] {
            for tenant in TENANTS {
                assert_eq!(scratch.check(&agent, truth, &tables, tenant).await, Vec::<String>::new(), "{}", truth.name);
            }
        }
        drop(scratch);
        job(&second, "verify");
        let live = agent.json(&["verify", "--against-live"]);
        assert_eq!(live["ok"], true, "{live}");
        agent.json(&["backup", "--tenant", "1", "--wait"]);
        assert_eq!(first.psql("shop", told), nothing);
        assert_eq!(first.psql("shop", &format!("SELECT count(*) {sessions}")), "0");

        // With the new primary away the old one is no way out: the agent waits, and says who is what.
        second.stop("fast");
        let alarm = wait_for("the alarm", 60, || {
            agent.alarms("source_down").into_iter().find(|a| a.to_string().contains("timeline 1, the log on 2"))
        });
        let message = alarm["message"].as_str().unwrap_or_default().to_owned();
        assert!([&first, &second].iter().all(|c| message.contains(&format!(":{}", c.port))), "{message}");
        second.up();
        durable(&second);
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());
    });
}

/// Two standbys that were promoted without knowing of each other are both on timeline 2: the log follows one of them.
fn promoted_apart(major: u32) {
    block_on(async {
        let first = Cluster::start(major);
        prepare(&first);
        let second = Cluster::standby_of(&first, "");
        let third = Cluster::standby_of(&first, "");
        let mut agent = Agent::new(&Setup { source_url: of_these(&[&first, &second]), ..Setup::of(&first, "shop") });
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        third.stop("fast");
        write(&first, 1);
        let before = take(&first, "before").await;
        durable(&first);
        caught_up(&first, &second);
        first.stop("fast");
        second.promote();
        spans(&mut agent, 1, 2);
        write(&second, 2);
        durable(&second);
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());

        third.up();
        third.promote();
        write(&third, 7);
        let far =
            "SELECT count(pg_logical_emit_message(false, 'pad', repeat('x', 1000000))) FROM generate_series(1, 8)";
        third.psql("shop", far);
        let further =
            format!("SELECT pg_current_wal_flush_lsn() > '{}'", second.psql("shop", "SELECT pg_current_wal_lsn()"));
        assert_eq!(third.psql("shop", &further), "t");
        point_at(&agent, &of_these(&[&third]));
        agent.start();
        assert_eq!(agent.wait_end(60), Some(10), "{}", agent.log());
        assert!(agent.log().contains("promoted apart from each other"), "{}", agent.log());
        assert_eq!(third.psql("postgres", "SELECT count(*) FROM pg_replication_slots"), "0");

        point_at(&agent, &of_these(&[&third, &second]));
        agent.start();
        write(&second, 3);
        let after = take(&second, "after").await;
        exact(&agent, &second, &[&before, &after]).await;
        spans(&mut agent, 1, 2);
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());
    });
}

/// A standby that is promoted while its primary goes on, which nobody has fenced: the agent leaves that one by itself.
fn promoted_beside(major: u32) {
    block_on(async {
        let first = Cluster::start(major);
        prepare(&first);
        let second = Cluster::standby_of(&first, "");
        let mut agent = Agent::new(&Setup { source_url: of_these(&[&first, &second]), ..Setup::of(&first, "shop") });
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let before = take(&first, "before").await;
        durable(&first);
        caught_up(&first, &second);
        second.promote();
        write(&first, 7);
        write(&second, 2);
        spans(&mut agent, 1, 2);
        let after = take(&second, "after").await;
        durable(&second);
        exact(&agent, &second, &[&before, &after]).await;
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'coffer_agent'";
        wait_for("the old primary to be left", 60, || (first.psql("shop", sessions) == "0").then_some(()));
        assert!(agent.log().contains("was promoted, and leaves"), "{}", agent.log());
        assert_eq!(agent.stop(), Some(0), "{}", agent.log());
    });
}

/// An address that leads to the standby before it is promoted ends no agent that streamed.
fn the_address_is_moved_early(agent: &mut Agent, from: &Cluster, to: &Cluster) {
    let address = Stall::start(from.port);
    point_at(agent, &format!("postgres://coffer_agent@127.0.0.1:{}/shop", address.port));
    agent.start();
    durable(from);
    address.lead_to(to.port);
    let alarm = wait_for("an alarm", 60, || {
        agent.alarms("source_down").into_iter().find(|a| a.to_string().contains("standby"))
    });
    assert!(alarm["message"].as_str().is_some_and(|m| m.ends_with("trying again")), "{alarm}");
    address.lead_to(from.port);
    wait_for("the alarm to end", 60, || agent.alarms("source_down").is_empty().then_some(()));
    assert_eq!(agent.stop(), Some(0), "{}", agent.log());
}

/// Another promotion, with the agent away and a slot made by hand, too late.
async fn a_slot_that_is_ahead(agent: &mut Agent, from: &Cluster, truths: &[&Truth]) {
    let third = Cluster::standby_of(from, "");
    the_address_is_moved_early(agent, from, &third);
    from.stop("fast");
    third.promote();
    write(&third, 4);
    third.psql("shop", "SELECT pg_create_logical_replication_slot('coffer_shop', 'pg_coffer')");
    write(&third, 5);
    point_at(agent, &third.url("coffer_agent", "shop"));
    agent.start();
    let listed = spans(agent, 2, 3);
    assert_eq!(listed["gaps"][1]["reason"], "slot_ahead", "{listed}");
    let last = take(&third, "last").await;
    let all: Vec<&Truth> = truths.iter().copied().chain([&last]).collect();
    exact(agent, &third, &all).await;
}

/// With a failover slot that the standby keeps up, a promotion loses nothing and leaves no gap.
#[test]
fn a_failover_slot() {
    crate::on_major(18, |major| {
        block_on(async {
            let first = Cluster::start(major);
            prepare(&first);
            first.psql(
                "shop",
                "SELECT pg_create_logical_replication_slot('coffer_shop', 'pg_coffer', failover => true)",
            );
            first.psql("shop", "SELECT pg_create_physical_replication_slot('standby', true)");
            let conf = "primary_slot_name = 'standby'\nhot_standby_feedback = on\nsync_replication_slots = on\n";
            let second = Cluster::standby_of(&first, conf);
            // The agent gets nothing that the standby does not have.
            first.psql("postgres", "ALTER SYSTEM SET synchronized_standby_slots = 'standby'");
            first.psql("postgres", "SELECT pg_reload_conf()");
            let source_url = of_these(&[&second, &first]);
            let mut agent = Agent::new(&Setup { source_url, ..Setup::of(&first, "shop") });
            agent.start();
            restored::wait_windows(&mut agent, &TENANTS);
            write(&first, 1);
            let before = take(&first, "before").await;
            // The slot has to pass the horizon that the standby began with: it does with records of the running transactions,
            // which an idle server writes seldom. The standby looks every half minute after a while.
            wait_for("the slot on the standby", 180, || {
                first.psql("postgres", "SELECT pg_log_standby_snapshot()");
                let sql = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'coffer_shop' AND synced AND NOT temporary";
                (second.psql("postgres", sql) == "1").then_some(())
            });
            write(&first, 2);
            let last = take(&first, "last").await;
            first.stop("fast");
            second.promote();
            write(&second, 3);
            let after = take(&second, "after").await;
            durable(&second);
            exact(&agent, &second, &[&before, &last, &after]).await;
            let listed = spans(&mut agent, 0, 1);
            assert_eq!(listed["gaps"], serde_json::json!([]), "{listed}");
            assert_eq!(agent.stop(), Some(0), "{}", agent.log());
        });
    });
}

/// Writes so much to the log, of nobody's.
fn pad(cluster: &Cluster, megabytes: u32) {
    let sql = "SELECT count(pg_logical_emit_message(false, 'pad', repeat('x', 1000000))) FROM generate_series(1, ";
    cluster.psql("shop", &format!("{sql}{megabytes})"));
}

fn the_slot_falls_behind(major: u32) {
    block_on(async {
        let conf = "max_slot_wal_keep_size = 4MB\nmin_wal_size = 2MB\nautovacuum = off\n";
        let cluster = Cluster::start_with(major, conf, &["--locale=C", "-E", "UTF8", "--wal-segsize=1"]);
        prepare(&cluster);
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let state =
            || cluster.psql("shop", "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'coffer_shop'");

        // At risk: said, and caught up with.
        assert_eq!(agent.stop(), Some(0));
        write(&cluster, 1);
        pad(&cluster, 8);
        assert_eq!(state(), "unreserved");
        agent.start();
        wait_for("the slot to be at risk", 60, || agent.log().contains("\"alarm\":\"slot_at_risk\"").then_some(()));
        let before = take(&cluster, "before").await;
        durable(&cluster);
        wait_for("the slot to keep up", 60, || {
            // Where nothing runs: the slot can begin there.
            let name = format!("nudge_{:08x}", rand::random::<u32>());
            cluster.psql("shop", &format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput', true)"));
            (state() == "reserved" && agent.alarms("slot_at_risk").is_empty()).then_some(())
        });
        spans(&mut agent, 0, 1);

        // Lost.
        assert_eq!(agent.stop(), Some(0));
        write(&cluster, 2);
        let lost_at = cluster.psql("shop", "SELECT pg_current_wal_insert_lsn()");
        take(&cluster, "lost").await;
        pad(&cluster, 8);
        cluster.psql("shop", "CHECKPOINT");
        assert_eq!(state(), "lost");
        // The alarm stands again in an agent that finds the gap recorded, and no base after it.
        agent.env = vec![("COFFER_FAILPOINTS".into(), "base-after-horizon=abort".into())];
        agent.start();
        assert_eq!(agent.wait_end(60), None, "killed by a signal");
        agent.env = vec![("COFFER_FAILPOINTS".into(), "base-after-horizon@1=sleep(2000)".into())];
        agent.start();
        let alarm = wait_for("the alarm", 60, || agent.alarms("gap").into_iter().next());
        assert!(alarm["message"].as_str().is_some_and(|m| m.contains("2 tables have no base since a gap")), "{alarm}");
        let listed = spans(&mut agent, 1, 2);
        assert_eq!(listed["gaps"][0]["reason"], "slot_lost", "{listed}");
        assert!(agent.log().contains("\"alarm\":\"gap\""), "{}", agent.log());
        write(&cluster, 3);
        let after = take(&cluster, "after").await;
        exact(&agent, &cluster, &[&before, &after]).await;
        refused(&agent, "name:lost");
        refused(&agent, &lost_at);
        wait_for("health", 60, || agent.page("/healthz").starts_with("HTTP/1.0 200").then_some(()));
        assert_eq!(agent.stop(), Some(0));
    });
}

/// A server that is put back to an earlier state would use positions of its log again, for something else: refused. After
/// recovery to that point it has a timeline of its own, and with its slot it goes on there without a gap.
fn the_server_is_put_back(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        prepare(&cluster);
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let before = take(&cluster, "before").await;
        durable(&cluster);
        assert_eq!(agent.stop(), Some(0));
        cluster.stop("fast");
        let copy = cluster.data().with_file_name("copy");
        put(&cluster.data(), &copy);
        cluster.up();
        agent.start();
        write(&cluster, 1);
        take(&cluster, "lost").await;
        cluster.psql("shop", "INSERT INTO ev SELECT 1, i, repeat(md5(i::text), 30) FROM generate_series(1, 1000) i");
        durable(&cluster);
        assert_eq!(agent.stop(), Some(0));

        cluster.stop("fast");
        put(&copy, &cluster.data());
        cluster.up();
        agent.start();
        assert_eq!(agent.wait_end(60), Some(10), "{}", agent.log());
        assert!(agent.log().contains("was put back to an earlier state"), "{}", agent.log());

        cluster.stop("fast");
        put(&copy, &cluster.data());
        cluster.configure("restore_command = '/bin/false'");
        put(&cluster.data().join("PG_VERSION"), &cluster.data().join("recovery.signal"));
        cluster.up();
        wait_for("the end of recovery", 60, || {
            (cluster.psql("postgres", "SELECT NOT pg_is_in_recovery()") == "t").then_some(())
        });
        write(&cluster, 2);
        agent.start();
        write(&cluster, 3);
        let after = take(&cluster, "after").await;
        exact(&agent, &cluster, &[&before, &after]).await;
        refused(&agent, "name:lost");
        spans(&mut agent, 0, 1);
        assert!(agent.log().contains("abandoned branch"), "{}", agent.log());
        assert_eq!(agent.stop(), Some(0));
    });
}

/// A copy with the owners, in the place of what is there.
fn put(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let cp = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(cp.is_ok_and(|s| s.success()), "cp {} {}", from.display(), to.display());
}
