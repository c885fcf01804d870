//! Decode: our plugin against pgoutput, the same null client, the same WAL.

use crate::figure::{Figure, Unit};
use crate::null_client::{self, Pass};
use crate::world::{DB, REPETITIONS, Stretch, World};

/// Tables whose replica identity holds the tenant: what the bar is set for.
pub fn identity(world: &mut World) -> Figure {
    measure(world, &world.identity, "decode")
}

/// Tables whose key lacks the tenant: it is read from the new rows, and deletes (none here) would carry a tag.
pub fn tag(world: &mut World) -> Figure {
    let stretch = world.write_tag_stretch();
    measure(world, &stretch, "decode-tag")
}

fn measure(world: &World, stretch: &Stretch, name: &'static str) -> Figure {
    let ours = Side { slot: format!("{}_ours", stretch.name), options: "\"format\" 'frames'".into() };
    let peer = Side {
        slot: format!("{}_peer", stretch.name),
        options: format!("\"proto_version\" '1', \"publication_names\" '{}'", stretch.name),
    };
    // Once unmeasured: the WAL into the page cache, the server's libraries into memory.
    let warm = [ours.pass(world, stretch), peer.pass(world, stretch)];
    for (side, pass) in [&ours, &peer].iter().zip(&warm) {
        println!("  {name}: {}: {} messages, {} MB", side.slot, pass.messages, pass.bytes >> 20);
    }
    let (mut ours_runs, mut peer_runs) = (Vec::new(), Vec::new());
    for n in 0..REPETITIONS {
        // Alternating who goes first, so that a drift of the machine is no advantage.
        for which in [n % 2, 1 - n % 2] {
            let (side, runs) = if which == 0 { (&ours, &mut ours_runs) } else { (&peer, &mut peer_runs) };
            let pass = side.pass(world, stretch);
            assert_eq!(pass.messages, warm[which].messages, "{}: every pass sees the same WAL", side.slot);
            println!("  {name}: {} {:.2} s, {:.2} s CPU", side.slot, pass.took.seconds, pass.took.cpu);
            runs.push(pass.took);
        }
    }
    Figure {
        name,
        unit: Unit::Seconds,
        bar: Some(0.60),
        ours: format!("pg_coffer, frames, {} MB of WAL to a null client", stretch.wal_bytes >> 20),
        peer: "pgoutput, protocol 1, the same WAL to the same client".into(),
        ours_runs,
        peer_runs,
    }
}

struct Side {
    slot: String,
    options: String,
}

impl Side {
    fn pass(&self, world: &World, stretch: &Stretch) -> Pass {
        world.wait_free(&self.slot);
        null_client::decode(world.cluster.port, DB, &self.slot, &self.options, stretch.end)
    }
}
