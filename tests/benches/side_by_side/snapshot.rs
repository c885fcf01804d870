//! `coffer.snapshot()` beside the same rows by plain SQL: at least as fast, in one table and in twenty.

use crate::figure::{Figure, Took, Unit};
use crate::load::backends_cpu;
use crate::world::{DB, REPETITIONS, World};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Each is asked so many times in a repetition.
const TIMES: usize = 20;

/// 6,000 rows of one tenant among five, in one table.
pub fn one_table(world: &mut World) -> Figure {
    run(world, "snapshot", 1)
}

/// As many in twenty.
pub fn many_tables(world: &mut World) -> Figure {
    run(world, "snapshot-20", 20)
}

fn run(world: &World, name: &'static str, tables: u32) -> Figure {
    let rows = 6000 / tables;
    let mut ddl = String::from(
        "SET client_min_messages = error; DROP SCHEMA IF EXISTS shot, cost CASCADE; CREATE SCHEMA shot;\n",
    );
    for n in 1..=tables {
        write!(
            ddl,
            "CREATE TABLE shot.t{n} (t int NOT NULL, id int, a text, b timestamptz, c numeric, PRIMARY KEY (t, id));
             INSERT INTO shot.t{n} SELECT t, i, 'note ' || i, '2024-01-01Z'::timestamptz + i * interval '1 min', i / 7.0
             FROM generate_series(990001, 990005) t, generate_series(1, {rows}) i;
             SELECT coffer.add_table('shot.t{n}', 't');\n"
        )
        .expect("a string");
    }
    world.cluster.script(DB, &ddl);
    world.cluster.psql(DB, "VACUUM ANALYZE");
    let plain: Vec<String> = (1..=tables)
        .map(|n| format!("SELECT 'shot.t{n}' AS relation, to_jsonb(x) AS row_data FROM shot.t{n} x WHERE x.t = 990001"))
        .collect();
    let time = |query: &str| {
        let script = format!("COPY ({query}) TO '/dev/null';\n").repeat(TIMES);
        let (before, start) = (backends_cpu(&world.cluster), Instant::now());
        world.cluster.script(DB, &script);
        let seconds = start.elapsed().as_secs_f64();
        std::thread::sleep(Duration::from_millis(200));
        Took { seconds, cpu: backends_cpu(&world.cluster) - before }
    };
    let (ours, peer) = ("SELECT * FROM coffer.snapshot('990001')".to_owned(), plain.join(" UNION ALL "));
    let (mut ours_runs, mut peer_runs) = (Vec::new(), Vec::new());
    for n in 0..=REPETITIONS {
        let (o, p) = (time(&ours), time(&peer));
        println!("  {name}: {:.2} s against {:.2} s, {TIMES} times", o.seconds, p.seconds);
        if n > 0 {
            ours_runs.push(o);
            peer_runs.push(p);
        }
    }
    Figure {
        name,
        unit: Unit::Seconds,
        bar: Some(1.0),
        ours: format!("{ours}, 6,000 rows in {tables} table(s), {TIMES} times"),
        peer: "SELECT its name, to_jsonb(row) of each table WHERE the tenant column = the tenant, UNION ALL".into(),
        ours_runs,
        peer_runs,
    }
}
