//! A full of a tenant from a base and the changes since, by `coffer compact` as a whole process, against the sum of its
//! parts, each measured alone and in memory: decrypt, decompress, merge, compress, encrypt (`agent/benches/parts.rs`).
//!
//! What is in ours and in no part: opening the repository, reading and writing files with their syncs, hashes, encoding
//! the rows, and reading back what was written.

use crate::figure::{Figure, Took, Unit};
use crate::null_client::children_cpu;
use crate::world::REPETITIONS;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use std::process::Command;
use std::time::Instant;

const DB: &str = "grown";
const ROWS: u32 = 800_000;

pub fn run() -> Figure {
    let cluster = Cluster::start_with(15, "shared_buffers = 512MB\nmax_wal_size = 8GB\ncheckpoint_timeout = 1h\n", &[]);
    let agent = prepare(&cluster);
    let saved = agent.dir().join("repository.saved");
    copy(&agent.repository(), &saved);
    let (mut ours_runs, mut peer_runs, mut what) = (Vec::new(), Vec::new(), String::new());
    for n in 0..=REPETITIONS {
        std::fs::remove_dir_all(agent.repository()).expect("our store");
        copy(&saved, &agent.repository());
        let (begun, cpu) = (Instant::now(), children_cpu());
        let made = agent.json(&["compact", "--tenant", "1"]);
        let ours = Took { seconds: begun.elapsed().as_secs_f64(), cpu: children_cpu() - cpu };
        assert_eq!(made["fulls"][0]["rows"], ROWS, "{made}");
        let parts = parts(&agent);
        let sum: f64 = PARTS.iter().map(|p| parts[p].as_f64().expect("seconds")).sum();
        assert_eq!(parts["rows"], ROWS, "{parts}");
        println!("  {:.2} s ({:.2} s CPU), the parts {sum:.2} s: {parts}", ours.seconds, ours.cpu);
        what = format!("{} MB read, {} MB written", mb(&parts["read_bytes"]), mb(&parts["written_bytes"]));
        if n > 0 {
            ours_runs.push(ours);
            peer_runs.push(Took { seconds: sum, cpu: sum });
        }
    }
    Figure {
        name: "compaction",
        unit: Unit::Seconds,
        bar: None,
        ours: format!(
            "coffer compact, a full of {ROWS} rows, half of them changed since the base: {what}, before compression"
        ),
        peer: format!("the sum of its parts alone, in memory: {}", PARTS.join(", ")),
        ours_runs,
        peer_runs,
    }
}

const PARTS: [&str; 5] = ["decrypt", "decompress", "merge", "compress", "seal"];

fn prepare(cluster: &Cluster) -> Agent {
    cluster.create_protected_db(DB);
    cluster.script(
        DB,
        &format!(
            "CREATE TABLE orders (tenant int NOT NULL, id bigint NOT NULL, customer int, amount numeric(12,2), status text,
               note text, placed_at timestamptz, reference uuid, PRIMARY KEY (tenant, id));
             SELECT coffer.add_table('orders', 'tenant');
             INSERT INTO orders SELECT 1, i, i % 5000, (i % 100000) / 100.0, 'open', 'order number ' || i || ' of a customer',
               timestamptz '2026-01-01 00:00Z' + i * interval '1 second', md5(i::text)::uuid FROM generate_series(1, {ROWS}) i;"
        ),
    );
    let mut agent = Agent::new(&Setup::of(cluster, DB));
    agent.start();
    restored::wait_windows(&mut agent, &["1"]);
    cluster.psql(DB, "UPDATE orders SET status = 'paid', amount = amount + 1 WHERE id % 2 = 0");
    cluster.psql(DB, "SELECT coffer.wait_durable(coffer.restore_point('changed'))");
    agent.stop();
    agent
}

fn parts(agent: &Agent) -> serde_json::Value {
    let program = std::env::var_os("COFFER_PARTS_BIN").expect("COFFER_PARTS_BIN: `make bench` builds it");
    let out = Command::new(program).arg(agent.config()).arg("1").output().expect("it starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

fn mb(bytes: &serde_json::Value) -> u64 {
    bytes.as_u64().expect("bytes") / 1_000_000
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    let done = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp starts");
    assert!(done.success());
}
