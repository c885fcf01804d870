//! The side-by-side benchmarks: ours and a peer, on one cluster, over the same WAL, in one run.
//!
//! `make bench` builds both halves in release and runs this; `make bench BENCH='decode'` runs those whose name contains
//! a word. A benchmark is one file here: a function from the [`World`](world::World) to [`Figure`](figure::Figure)s and a
//! line in [`ALL`]. Figures are ratios of medians of alternating repetitions, because a shared machine's absolute seconds
//! mean little; the raw seconds are printed beside them and everything goes to `target/bench.json`. When a figure misses
//! its bar, the run fails after the last of them.

mod compaction;
mod decode;
mod figure;
mod in_place;
mod load;
mod memory;
mod null_client;
mod one_of_many;
mod pipeline;
mod snapshot;
mod tags;
mod world;

use figure::Figure;
use std::process::ExitCode;
use world::World;

/// One benchmark.
struct Benchmark {
    name: &'static str,
    /// Whether it needs an agent that has taken its bases before the workload is written.
    with_agent: bool,
    run: Run,
}

/// Where a benchmark takes place.
enum Run {
    /// In the cluster that several share.
    In(fn(&mut World) -> Figure),
    /// In one of its own.
    Own(fn() -> Figure),
}

/// In this order: those after `pipeline` write WAL of their own, and `decode-tag` makes a large table that every snapshot would
/// have to read through.
const ALL: &[Benchmark] = &[
    Benchmark { name: "decode", with_agent: false, run: Run::In(decode::identity) },
    Benchmark { name: "pipeline", with_agent: true, run: Run::In(pipeline::run) },
    Benchmark { name: "snapshot", with_agent: false, run: Run::In(snapshot::one_table) },
    Benchmark { name: "snapshot-20", with_agent: false, run: Run::In(snapshot::many_tables) },
    Benchmark { name: "decode-tag", with_agent: false, run: Run::In(decode::tag) },
    Benchmark { name: "path-insert", with_agent: false, run: Run::In(tags::path_insert) },
    Benchmark { name: "path-update", with_agent: false, run: Run::In(tags::path_update) },
    Benchmark { name: "tag-delete", with_agent: false, run: Run::In(tags::tag_delete) },
    Benchmark { name: "in-place", with_agent: false, run: Run::Own(in_place::run) },
    Benchmark { name: "one-of-100", with_agent: false, run: Run::Own(one_of_many::restore) },
    Benchmark { name: "full-size", with_agent: false, run: Run::Own(one_of_many::size) },
    Benchmark { name: "compaction", with_agent: false, run: Run::Own(compaction::run) },
    Benchmark { name: "memory", with_agent: false, run: Run::Own(memory::restore) },
    Benchmark { name: "memory-compact", with_agent: false, run: Run::Own(memory::compact) },
    Benchmark { name: "load", with_agent: false, run: Run::Own(load::elapsed) },
    Benchmark { name: "load-cpu", with_agent: false, run: Run::Own(load::backends) },
    Benchmark { name: "load-one", with_agent: false, run: Run::Own(load::one_client) },
];

fn main() -> ExitCode {
    // `cargo bench` passes --bench; what is left are words to choose by.
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let chosen: Vec<&Benchmark> =
        ALL.iter().filter(|b| words.is_empty() || words.iter().any(|w| b.name.contains(w.as_str()))).collect();
    if chosen.is_empty() {
        eprintln!("no benchmark is named so; there is: {}", ALL.iter().map(|b| b.name).collect::<Vec<_>>().join(", "));
        return ExitCode::from(2);
    }
    let mut world: Option<World> = None;
    let with_agent = chosen.iter().any(|b| b.with_agent);
    let mut figures = Vec::new();
    for b in chosen {
        println!("\n{}", b.name);
        figures.push(match b.run {
            Run::In(f) => f(world.get_or_insert_with(|| World::new(with_agent))),
            Run::Own(f) => f(),
        });
        // After each: a later one that fails takes nothing with it.
        figure::write(&figures);
    }
    figure::print(&figures);
    let missed: Vec<String> = figures.iter().filter_map(Figure::miss).collect();
    if missed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("\nmissed: {}", missed.join(", "));
    ExitCode::FAILURE
}
