//! Pipeline: from WAL to durable, encrypted, per-tenant objects, against pgoutput and pg_recvlogical to one plain file.
//!
//! Both sides are whole processes, timed from their start. Ours is done when `/healthz` says that the durable LSN has
//! passed the end of the WAL; the peer when pg_recvlogical has synced its file and ended. No base is in the figure: the
//! agent had taken its bases before the workload was written. Before every repetition the slot, the repository and the
//! keyring are put back to what they were then.

use crate::figure::{Figure, Took, Unit};
use crate::null_client::{children_cpu, cpu_seconds};
use crate::world::{DB, REPETITIONS, World, lsn};
use coffer_tests::agent::Agent;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const SLOT: &str = "coffer_shop";
const SAVED_SLOT: &str = "pipeline_saved";
const PEER_SLOT: &str = "pipeline_peer";
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(10);

pub fn run(world: &mut World) -> Figure {
    let mut agent = world.agent.take().expect("this benchmark asks for an agent");
    let world = &*world;
    save(world, &agent);
    let (mut ours_runs, mut peer_runs) = (Vec::new(), Vec::new());
    let mut what = (0, 0, 0);
    // The first of each is thrown away: it brings the WAL and the programs into memory.
    for n in 0..=REPETITIONS {
        for ours_first in [n % 2 == 0, n % 2 == 1] {
            let took = if ours_first {
                let (took, peak_kib) = ours(world, &mut agent);
                let (objects, bytes) = usage(&agent.repository());
                what = (objects, bytes >> 20, peak_kib >> 10);
                println!("  ours {:.2} s, {:.2} s CPU, peak {} MiB", took.seconds, took.cpu, peak_kib >> 10);
                took
            } else {
                let (took, bytes) = peer(world, &agent.dir().join("peer.out"));
                println!("  peer {:.2} s, {:.2} s CPU, {} MB", took.seconds, took.cpu, bytes >> 20);
                took
            };
            if n > 0 {
                if ours_first { ours_runs.push(took) } else { peer_runs.push(took) }
            }
        }
    }
    Figure {
        name: "pipeline",
        unit: Unit::Seconds,
        bar: Some(0.70),
        ours: format!(
            "coffer run, start to durable: {} files, {} MB in one file store, ship interval 1s, peak memory {} MiB",
            what.0, what.1, what.2
        ),
        peer: "pgoutput and pg_recvlogical to one plain file, start to synced".into(),
        ours_runs,
        peer_runs,
    }
}

/// What every repetition of ours begins with.
const STATE: [&str; 2] = ["repository", "keyring"];

fn save(world: &World, agent: &Agent) {
    world.wait_free(SLOT);
    copy_slot(world, SLOT, SAVED_SLOT);
    for name in STATE {
        shell("cp", &["-a", &path(agent, name), &path(agent, &format!("{name}.saved"))]);
    }
}

fn put_back(world: &World, agent: &Agent) {
    world.wait_free(SLOT);
    world.cluster.psql(DB, &format!("SELECT pg_drop_replication_slot('{SLOT}')"));
    copy_slot(world, SAVED_SLOT, SLOT);
    for name in STATE {
        shell("rm", &["-r", &path(agent, name)]);
        shell("cp", &["-a", &path(agent, &format!("{name}.saved")), &path(agent, name)]);
    }
}

fn ours(world: &World, agent: &mut Agent) -> (Took, u64) {
    put_back(world, agent);
    // What earlier steps left in the page cache is not to be paid for by this one's syncs.
    shell("sync", &[]);
    let begun = Instant::now();
    agent.start();
    loop {
        if durable_lsn(agent.status_port).is_some_and(|at| at >= world.identity.end) {
            break;
        }
        if let Some(code) = agent.ended() {
            panic!("the agent ended with {code:?}: {}", agent.log());
        }
        assert!(begun.elapsed() < LIMIT, "not durable after {LIMIT:?}: {}", agent.log());
        std::thread::sleep(POLL);
    }
    let took = Took { seconds: begun.elapsed().as_secs_f64(), cpu: cpu_seconds(agent.pid()) };
    let peak = agent.peak_kib();
    agent.stop();
    (took, peak)
}

fn peer(world: &World, file: &Path) -> (Took, u64) {
    copy_slot(world, &format!("{}_peer", world.identity.name), PEER_SLOT);
    let _ = std::fs::remove_file(file);
    shell("sync", &[]);
    let end = world.identity.end;
    let mut c = world.cluster.client("pg_recvlogical", DB);
    c.args(["-d", DB, "-S", PEER_SLOT, "--start", "--no-loop", "-o", "proto_version=1"]);
    c.args(["-o", &format!("publication_names={}", world.identity.name), "-f"]).arg(file);
    c.arg(format!("--endpos={:X}/{:X}", end >> 32, end & 0xffff_ffff));
    let cpu = children_cpu();
    let begun = Instant::now();
    let status = c.status().expect("pg_recvlogical starts");
    let took = Took { seconds: begun.elapsed().as_secs_f64(), cpu: children_cpu() - cpu };
    assert!(status.success(), "pg_recvlogical: {status}");
    let bytes = std::fs::metadata(file).map_or(0, |m| m.len());
    world.wait_free(PEER_SLOT);
    world.cluster.psql(DB, &format!("SELECT pg_drop_replication_slot('{PEER_SLOT}')"));
    (took, bytes)
}

fn copy_slot(world: &World, from: &str, to: &str) {
    world.cluster.psql(DB, &format!("SELECT pg_copy_logical_replication_slot('{from}', '{to}')"));
}

/// The source's durable LSN as the agent reports it; `None` while it does not answer.
fn durable_lsn(port: u16) -> Option<u64> {
    let mut s = TcpStream::connect(("127.0.0.1", port)).ok()?;
    s.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    s.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    s.read_to_string(&mut text).ok()?;
    let (_, body) = text.split_once("\r\n\r\n")?;
    // Chunked or not, the document is what lies between the outermost braces.
    let body = body.get(body.find('{')?..=body.rfind('}')?)?;
    let doc: serde_json::Value = serde_json::from_str(body).ok()?;
    Some(lsn(doc["sources"][0]["durable_lsn"].as_str()?))
}

/// Files below a folder, and their bytes.
fn usage(dir: &Path) -> (u64, u64) {
    let mut sum = (0, 0);
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(m) = entry.metadata() else { continue };
        let (n, b) = if m.is_dir() { usage(&entry.path()) } else { (1, m.len()) };
        sum = (sum.0 + n, sum.1 + b);
    }
    sum
}

fn path(agent: &Agent, name: &str) -> String {
    agent.dir().join(name).display().to_string()
}

fn shell(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().expect("a standard program");
    assert!(status.success(), "{program} {args:?}: {status}");
}
