//! A restore in place after 0.1 % of a tenant's rows were damaged, against giving the tenant all of its rows anew: reading
//! them from the same backup, deleting, and loading with COPY in one transaction.

use crate::figure::{Figure, Took, Unit};
use crate::world::REPETITIONS;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Out};
use std::time::Instant;

const DB: &str = "damaged";
/// Of the tenant, in two tables; the others have as many together.
const ROWS: u32 = 400_000;

pub fn run() -> Figure {
    let cluster = Cluster::start_with(15, "shared_buffers = 512MB\nmax_wal_size = 8GB\ncheckpoint_timeout = 1h\n", &[]);
    let agent = prepare(&cluster);
    let name = "name:before";
    let (mut ours_runs, mut peer_runs) = (Vec::new(), Vec::new());
    for n in 0..=REPETITIONS {
        damage(&cluster);
        let begun = Instant::now();
        let done = agent.json(&restored::in_place("1", name));
        let ours = begun.elapsed().as_secs_f64();
        let updated: u64 =
            done["tables"].as_array().expect("tables").iter().filter_map(|t| t["updated"].as_u64()).sum();
        assert_eq!(updated, u64::from(ROWS / 1000), "{done}");

        damage(&cluster);
        let begun = Instant::now();
        let out = restored::to_files(&agent, "1", name);
        let extracted = begun.elapsed().as_secs_f64();
        reload(&cluster, &out);
        let peer = begun.elapsed().as_secs_f64();
        println!("  in-place: {ours:.2} s, reload {peer:.2} s (of it {extracted:.2} s to read the rows)");
        if n > 0 {
            ours_runs.push(Took { seconds: ours, cpu: 0.0 });
            peer_runs.push(Took { seconds: peer, cpu: 0.0 });
        }
    }
    Figure {
        name: "in-place",
        unit: Unit::Seconds,
        bar: Some(0.33),
        ours: format!("coffer restore --mode in-place, {} of {ROWS} rows differ", ROWS / 1000),
        peer: "coffer restore --mode files, then DELETE and COPY in one transaction".into(),
        ours_runs,
        peer_runs,
    }
}

fn prepare(cluster: &Cluster) -> Agent {
    cluster.create_protected_db(DB);
    cluster.script(
        DB,
        &format!(
            "CREATE TABLE orders (tenant int NOT NULL, id bigint NOT NULL, customer int, amount numeric(12,2), status text,
               note text, placed_at timestamptz, PRIMARY KEY (tenant, id));
             CREATE INDEX ON orders (tenant, customer); CREATE INDEX ON orders (placed_at);
             CREATE TABLE payments (tenant int NOT NULL, id bigint NOT NULL, order_id bigint NOT NULL, reference uuid, day date,
               PRIMARY KEY (tenant, id), FOREIGN KEY (tenant, order_id) REFERENCES orders);
             CREATE INDEX ON payments (tenant, order_id);
             SELECT coffer.add_table('orders', 'tenant'), coffer.add_table('payments', 'tenant');
             INSERT INTO orders SELECT CASE WHEN i % 2 = 0 THEN 1 ELSE 2 + i % 50 END, i, i % 5000, (i % 100000) / 100.0, 'open',
               'order number ' || i || ' of a customer', timestamptz '2026-01-01 00:00Z' + i * interval '1 second' FROM generate_series(1, {ROWS}) i;
             INSERT INTO payments SELECT tenant, id, id, md5(id::text)::uuid, date '2026-01-01' + id::int % 365 FROM orders;
             VACUUM ANALYZE;"
        ),
    );
    let mut agent = Agent::new(&Setup::of(cluster, DB));
    agent.start();
    restored::wait_windows(&mut agent, &["1"]);
    cluster.psql(DB, "SELECT coffer.wait_durable(coffer.restore_point('before'))");
    agent
}

fn damage(cluster: &Cluster) {
    cluster.psql(
        DB,
        "UPDATE orders SET status = 'damaged' WHERE tenant = 1 AND id % 2000 = 0;
         UPDATE payments SET day = NULL WHERE tenant = 1 AND id % 2000 = 0",
    );
}

/// What a person without us would do.
fn reload(cluster: &Cluster, out: &Out) {
    let file = |t: &str| out.dir.join(format!("public.{t}.copy")).display().to_string();
    cluster.script(
        DB,
        &format!(
            "BEGIN;
             DELETE FROM payments WHERE tenant = 1; DELETE FROM orders WHERE tenant = 1;
             \\copy orders FROM '{}'
             \\copy payments FROM '{}'
             COMMIT;",
            file("orders"),
            file("payments")
        ),
    );
}
