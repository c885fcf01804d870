//! What a row costs whose tenant has to be tagged: processor seconds of the backend that the trigger adds to a million rows.

use crate::figure::{Figure, Took, Unit};
use crate::load::backends_cpu;
use crate::world::{DB, REPETITIONS, World};

const ROWS: u32 = 200_000;
const PER: f64 = 1e6 / ROWS as f64;

/// Inserts behind a foreign key, a hundred parents: at most two microseconds a row with the parent known.
pub fn path_insert(world: &mut World) -> Figure {
    prepare(world);
    added(world, "path-insert", Some(1.0), &|t| {
        format!("INSERT INTO cost.{t} SELECT i, 1 + i % 100, 'row ' || i FROM generate_series(1, {ROWS}) i")
    })
}

/// Updates of the same, with what the server does for any trigger before an update: it fetches the row once more, locks it,
/// and logs the lock.
pub fn path_update(world: &mut World) -> Figure {
    prepare(world);
    fill(world);
    added(world, "path-update", Some(1.0), &|t| format!("UPDATE cost.{t} SET v = 'u' || id"))
}

/// Deletes of rows whose key lacks the tenant.
pub fn tag_delete(world: &mut World) -> Figure {
    prepare(world);
    world.cluster.psql(DB, "SELECT coffer.remove_table('cost.path'); SELECT coffer.add_table('cost.path', 'parent')");
    fill(world);
    added(world, "tag-delete", None, &|t| format!("DELETE FROM cost.{t}"))
}

fn prepare(world: &World) {
    world.cluster.script(
        DB,
        "SET client_min_messages = error;
         DROP SCHEMA IF EXISTS cost CASCADE; CREATE SCHEMA cost;
         CREATE TABLE cost.parents (tenant int NOT NULL, id int PRIMARY KEY);
         CREATE TABLE cost.path (id int PRIMARY KEY, parent int NOT NULL REFERENCES cost.parents, v text);
         CREATE TABLE cost.plain (id int PRIMARY KEY, parent int NOT NULL REFERENCES cost.parents, v text);
         INSERT INTO cost.parents SELECT i, i FROM generate_series(1, 100) i;
         SELECT coffer.add_table('cost.parents', 'tenant');
         SELECT coffer.add_table('cost.path', parent => 'cost.parents');",
    );
}

fn fill(world: &World) {
    for t in ["path", "plain"] {
        world
            .cluster
            .psql(DB, &format!("INSERT INTO cost.{t} SELECT i, 1 + i % 100, '' FROM generate_series(1, {ROWS}) i"));
    }
}

/// Runs a statement on `cost.path` and on `cost.plain`, each time rolled back, so that every repetition finds the same.
fn added(world: &World, name: &'static str, bar: Option<f64>, statement: &dyn Fn(&str) -> String) -> Figure {
    // Processor time of the backend, which ends with its session: the same on a busy machine.
    let time = |table: &str| {
        let before = backends_cpu(&world.cluster);
        world.cluster.script(DB, &format!("BEGIN; {}; ROLLBACK;", statement(table)));
        backends_cpu(&world.cluster) - before
    };
    let mut ours_runs = Vec::new();
    for n in 0..=REPETITIONS {
        let (ours, theirs) = (time("path"), time("plain"));
        println!("  {name}: {ours:.2} s with the trigger, {theirs:.2} s without, {ROWS} rows");
        world.cluster.psql(DB, "VACUUM cost.path, cost.plain");
        if n > 0 {
            let seconds = (ours - theirs) * PER;
            ours_runs.push(Took { seconds, cpu: seconds });
        }
    }
    Figure {
        name,
        unit: Unit::Seconds,
        bar,
        ours: format!("processor seconds that the trigger adds to a million rows ({ROWS} measured)"),
        peer: "2 µs a row".into(),
        ours_runs,
        peer_runs: vec![Took { seconds: 2.0, cpu: 2.0 }],
    }
}
