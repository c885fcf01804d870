//! What a restore and a full hold in memory of a tenant that is twenty times as large as `limits.memory`: the peak over
//! what the same verb takes for a tenant of a few rows, against the limit.

use crate::figure::{Figure, Took, Unit};
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Out};
use std::sync::OnceLock;

const DB: &str = "large";
const LIMIT_MIB: u64 = 64;

/// By how much the peaks of verbs are over those for a small tenant, in MiB.
struct Peaks {
    restore: f64,
    compact: f64,
}

fn peaks() -> &'static Peaks {
    static PEAKS: OnceLock<Peaks> = OnceLock::new();
    PEAKS.get_or_init(measure)
}

fn measure() -> Peaks {
    let cluster =
        Cluster::start_with(15, "shared_buffers = 512MB\nmax_wal_size = 16GB\ncheckpoint_timeout = 1h\n", &[]);
    cluster.create_protected_db(DB);
    // About 1 KiB a row that does not compress.
    let rows = 20 * LIMIT_MIB * 1024;
    cluster.script(
        DB,
        &format!(
            "CREATE TABLE t (tenant int NOT NULL, id bigint NOT NULL, v text, PRIMARY KEY (tenant, id));
             SELECT coffer.add_table('t', 'tenant');
             INSERT INTO t SELECT 1, i, (SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 30) j) FROM generate_series(1, {rows}) i;
             INSERT INTO t VALUES (2, 1, 'small');"
        ),
    );
    let more = format!("[limits]\nmemory = \"{LIMIT_MIB}MiB\"\n");
    let mut agent = Agent::new(&Setup { more, ..Setup::of(&cluster, DB) });
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    // Every row has a change to be merged with.
    cluster.psql(DB, "UPDATE t SET v = v || 'x'");
    cluster.psql(DB, "SELECT coffer.wait_durable(coffer.restore_point('changed'))");
    let peak = |args: &[&str]| {
        let (done, kib) = agent.coffer_peak(args);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        kib as f64 / 1024.0
    };
    let over = |what: &str, peak: &dyn Fn(&str) -> f64| {
        let (small, large) = (peak("2"), peak("1"));
        println!("  {what}: peak {large:.0} MiB, of a small tenant {small:.0} MiB, the limit is {LIMIT_MIB} MiB");
        large - small
    };
    let restore = over("restore", &|tenant| {
        let out = Out::new();
        peak(&restored::args(tenant, "name:changed", "files", out.arg()))
    });
    let compact = over("compact", &|tenant| peak(&["compact", "--tenant", tenant]));
    Peaks { restore, compact }
}

/// A restore reads the base and all changes.
pub fn restore() -> Figure {
    figure("memory", "a restore", peaks().restore)
}

/// So does the first full.
pub fn compact() -> Figure {
    figure("memory-compact", "coffer compact", peaks().compact)
}

fn figure(name: &'static str, what: &str, over_mib: f64) -> Figure {
    let mb = |mib: f64| Took::seconds(mib * 1.048_576);
    Figure {
        name,
        unit: Unit::Megabytes,
        bar: Some(1.0),
        ours: format!(
            "peak of {what} of {} MiB of rows, each changed once, over that of a small tenant",
            20 * LIMIT_MIB
        ),
        peer: "limits.memory".into(),
        ours_runs: vec![mb(over_mib)],
        peer_runs: vec![mb(LIMIT_MIB as f64)],
    }
}
