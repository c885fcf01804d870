//! Load: what everything switched on costs the source. pgbench on tables whose keys hold the tenant, protected, with a
//! streaming agent, against the same pgbench on a server that has `wal_level = logical` and nothing else.
//!
//! Two clusters, one idle while the other runs, in interleaved pairs. The agent and the walsender run on the same machine
//! as the server and its clients, so what they take is in the figure. With several clients no processor is ever idle, and
//! whatever they take is missing to the clients; with one, a machine of two processors has some to spare, as one in use has.

use crate::figure::{Figure, Took, Unit};
use crate::world::REPETITIONS;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const DB: &str = "load";
const BRANCHES: u32 = 10;
const CLIENTS: u32 = 4;
/// Transactions of each client in a repetition.
const TRANSACTIONS: u32 = 4000;

/// As a server is run: commits reach the disk.
const CONF: &str = "
fsync = on
full_page_writes = on
synchronous_commit = on
shared_buffers = 256MB
max_wal_size = 4GB
";

/// pgbench's own transaction, by keys that hold the branch.
const SCRIPT: &str = "\\set bid random(1, 10)
\\set aid random(1, 100000)
\\set tid random(1, 10)
\\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE bid = :bid AND aid = :aid;
SELECT abalance FROM pgbench_accounts WHERE bid = :bid AND aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE bid = :bid AND tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP);
END;
";

struct Runs {
    ours: Vec<Took>,
    peer: Vec<Took>,
}

/// Elapsed seconds of a fixed number of transactions: 1 / 0.95 is 0.95 of the transactions a second.
pub fn elapsed() -> Figure {
    figure("load", "elapsed", 1.0 / 0.95, (CLIENTS, busy()), |t| t)
}

/// Processor seconds of the server's backends for the same.
pub fn backends() -> Figure {
    let cpu = |t: Took| Took { seconds: t.cpu, cpu: t.cpu };
    figure("load-cpu", "processor seconds of backends", 1.05, (CLIENTS, busy()), cpu)
}

/// Elapsed seconds with one client.
pub fn one_client() -> Figure {
    figure("load-one", "elapsed", 1.0 / 0.95, (1, &measure(1)), |t| t)
}

/// Both figures of several clients are of the same runs.
fn busy() -> &'static Runs {
    static RUNS: OnceLock<Runs> = OnceLock::new();
    RUNS.get_or_init(|| measure(CLIENTS))
}

fn figure(name: &'static str, what: &str, bar: f64, (clients, runs): (u32, &Runs), which: fn(Took) -> Took) -> Figure {
    let transactions = TRANSACTIONS * clients;
    Figure {
        name,
        unit: Unit::Seconds,
        bar: Some(bar),
        ours: format!("{what}, {transactions} transactions, clients: {clients}; protected, the agent streaming"),
        peer: "the same, wal_level = logical alone".into(),
        ours_runs: runs.ours.iter().map(|t| which(*t)).collect(),
        peer_runs: runs.peer.iter().map(|t| which(*t)).collect(),
    }
}

fn fill(cluster: &Cluster) {
    cluster.script(
        DB,
        &format!(
            "CREATE TABLE pgbench_branches (bid int PRIMARY KEY, bbalance int DEFAULT 0, filler char(88)) WITH (fillfactor = 70);
             CREATE TABLE pgbench_tellers (tid int, bid int, tbalance int DEFAULT 0, filler char(84), PRIMARY KEY (bid, tid)) WITH (fillfactor = 70);
             CREATE TABLE pgbench_accounts (aid int, bid int, abalance int DEFAULT 0, filler char(84), PRIMARY KEY (bid, aid)) WITH (fillfactor = 90);
             CREATE TABLE pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22));
             INSERT INTO pgbench_branches SELECT i FROM generate_series(1, {BRANCHES}) i;
             INSERT INTO pgbench_tellers SELECT t, b FROM generate_series(1, {BRANCHES}) b, generate_series(1, 10) t;
             INSERT INTO pgbench_accounts SELECT a, b, 0, '' FROM generate_series(1, {BRANCHES}) b, generate_series(1, 100000) a;
             VACUUM ANALYZE; CHECKPOINT;"
        ),
    );
}

fn measure(clients: u32) -> Runs {
    println!("two private clusters, pgbench scale {BRANCHES}, clients: {clients}");
    let plain = Cluster::start_with(15, CONF, &[]);
    plain.psql("postgres", &format!("CREATE DATABASE {DB}"));
    fill(&plain);
    let protected = Cluster::start_with(15, CONF, &[]);
    protected.create_protected_db(DB);
    fill(&protected);
    let strategies = "SELECT string_agg(strategy, ' ' ORDER BY relation::text) FROM coffer.discover('bid', true)";
    assert_eq!(protected.psql(DB, strategies), "identity identity full_row identity");
    let mut setup = Setup::of(&protected, DB);
    // As a sidecar does it that runs beside the server.
    setup.source_url = protected.socket_url("coffer_agent", DB);
    setup.ship_interval = "10s".into();
    let mut agent = Agent::new(&setup);
    agent.start();
    let tenants: Vec<String> = (1..=BRANCHES).map(|b| b.to_string()).collect();
    restored::wait_windows(&mut agent, &tenants);
    let mut runs = Runs { ours: Vec::new(), peer: Vec::new() };
    for n in 0..=REPETITIONS {
        for ours in [n % 2 == 0, n % 2 == 1] {
            let cluster = if ours { &protected } else { &plain };
            let took = pgbench(cluster, clients);
            println!(
                "  {} {:.2} s, {:.0} tps, {:.2} s CPU of backends",
                if ours { "ours" } else { "peer" },
                took.seconds,
                f64::from(TRANSACTIONS * clients) / took.seconds,
                took.cpu
            );
            // What is still on its way is not to run beside the other side.
            protected.psql(DB, "SELECT coffer.wait_durable()");
            // The first of each is thrown away.
            if n > 0 {
                if ours { runs.ours.push(took) } else { runs.peer.push(took) }
            }
        }
    }
    agent.stop();
    runs
}

fn pgbench(cluster: &Cluster, clients: u32) -> Took {
    let script = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(script.path(), SCRIPT).expect("our file");
    let mut c = cluster.client("pgbench", DB);
    c.args(["-n", "-c", &clients.to_string(), "-j", "1", "-t", &TRANSACTIONS.to_string(), "-f"]).arg(script.path());
    let cpu = backends_cpu(cluster);
    let begun = Instant::now();
    let out = c.output().expect("pgbench starts");
    let seconds = begun.elapsed().as_secs_f64();
    assert!(out.status.success(), "pgbench: {}", String::from_utf8_lossy(&out.stderr));
    Took { seconds, cpu: backends_cpu(cluster) - cpu }
}

/// Processor seconds of the postmaster's children that have ended: the clients' backends are the only ones that end.
pub fn backends_cpu(cluster: &Cluster) -> f64 {
    // A backend is reaped a moment after its client has ended, those of the client before included.
    std::thread::sleep(Duration::from_millis(200));
    let pid = std::fs::read_to_string(cluster.data().join("postmaster.pid")).expect("a running server");
    let pid = pid.lines().next().expect("a line").trim().to_owned();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the postmaster");
    // The program's name, in parentheses, may have spaces; cutime and cstime are the 16th and 17th fields.
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    let ticks: f64 = fields[13..15].iter().map(|f| f.parse::<f64>().expect("a number")).sum();
    // SAFETY: asks for a constant of the system.
    ticks / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
}
