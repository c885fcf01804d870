//! The cluster, the tables and the WAL that every benchmark of a run shares.
//!
//! Order matters: the agent's bases are taken first, from small tables, and the agent stops; then the slots are made;
//! then the workload is written. So each contestant has the workload before it and nothing else, and no base is part of
//! any figure.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::wait_for;

pub const DB: &str = "bench";
pub const TENANTS: u32 = 100;
/// Alternating repetitions of each side.
pub const REPETITIONS: usize = 5;

const CONF: &str = "
shared_buffers = 512MB
max_wal_size = 16GB
checkpoint_timeout = 1h
autovacuum = off
wal_sender_timeout = 60s
synchronous_commit = off
";

/// A stretch of WAL with slots at its beginning.
pub struct Stretch {
    /// `<name>_ours` and `<name>_peer` are its slots, `<name>` its publication.
    pub name: &'static str,
    /// The first position after it.
    pub end: u64,
    pub wal_bytes: u64,
}

pub struct World {
    pub cluster: Cluster,
    /// Tables of the `identity` strategy: what the bars are measured on.
    pub identity: Stretch,
    /// Stopped, its slot where the stretch begins.
    pub agent: Option<Agent>,
}

/// A position as a number.
pub fn lsn(text: &str) -> u64 {
    let (high, low) = text.trim().split_once('/').unwrap_or_else(|| panic!("'{text}' is not an LSN"));
    let part = |s| u64::from_str_radix(s, 16).unwrap_or_else(|_| panic!("'{text}' is not an LSN"));
    part(high) << 32 | part(low)
}

impl World {
    pub fn new(with_agent: bool) -> Self {
        println!("a private cluster, {TENANTS} tenants");
        let cluster = Cluster::start_with(15, CONF, &[]);
        cluster.create_protected_db(DB);
        create_tables(&cluster, "identity", "tenant_id, id");
        let agent = with_agent.then(|| agent_with_bases(&cluster));
        let identity = write(&cluster, "identity");
        Self { cluster, identity, agent }
    }

    /// A stretch of the same rows in tables whose key lacks the tenant.
    pub fn write_tag_stretch(&self) -> Stretch {
        create_tables(&self.cluster, "tag", "id");
        write(&self.cluster, "tag")
    }

    /// Waits until nobody uses the slot.
    pub fn wait_free(&self, slot: &str) {
        wait_for("the slot to be free", 60, || {
            let active =
                self.cluster.psql(DB, &format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{slot}'"));
            (active != "t").then_some(())
        });
    }
}

/// Two protected tables as an application would have them, each with one row per tenant.
fn create_tables(cluster: &Cluster, strategy: &str, key: &str) {
    let schema = strategy;
    cluster.psql(
        DB,
        &format!(
            "CREATE SCHEMA {schema};
             CREATE TABLE {schema}.orders (tenant_id int NOT NULL, id bigint NOT NULL, customer_id int,
                 amount numeric(12,2), status text, note text, placed_at timestamptz, PRIMARY KEY ({key}));
             CREATE TABLE {schema}.payments (tenant_id int NOT NULL, id bigint NOT NULL, order_id bigint,
                 paid boolean, reference uuid, ratio float8, day date, PRIMARY KEY ({key}));
             INSERT INTO {schema}.orders (tenant_id, id) SELECT i, -i FROM generate_series(1, {TENANTS}) i;
             INSERT INTO {schema}.payments (tenant_id, id) SELECT i, -i FROM generate_series(1, {TENANTS}) i;"
        ),
    );
    for table in ["orders", "payments"] {
        let add = format!("SELECT strategy FROM coffer.add_table('{schema}.{table}', 'tenant_id')");
        assert_eq!(cluster.psql(DB, &add), strategy, "the registry chose another strategy for {table}");
    }
}

/// An agent whose bases are done and which is stopped.
fn agent_with_bases(cluster: &Cluster) -> Agent {
    println!("the agent takes its bases (not part of any figure)");
    let mut setup = Setup::of(cluster, DB);
    setup.ship_interval = "1s".into();
    let mut agent = Agent::new(&setup);
    agent.start();
    wait_for("a window for every tenant", 600, || {
        if let Some(code) = agent.ended() {
            panic!("the agent ended with {code:?}: {}", agent.log());
        }
        let list = agent.json(&["list"]);
        let ready = list["tenants"].as_array().map_or(0, |tenants| {
            tenants.iter().filter(|t| t["window"].as_array().is_some_and(|w| !w.is_empty())).count()
        });
        (ready >= TENANTS as usize).then_some(())
    });
    agent.stop();
    agent
}

/// Slots first, then 1.0 M rows in five inserts and 100,000 one-row updates, each its own transaction.
fn write(cluster: &Cluster, schema: &'static str) -> Stretch {
    cluster.psql(DB, &format!("CREATE PUBLICATION {schema} FOR TABLE {schema}.orders, {schema}.payments"));
    for (slot, plugin) in [("ours", "pg_coffer"), ("peer", "pgoutput")] {
        cluster.psql(DB, &format!("SELECT pg_create_logical_replication_slot('{schema}_{slot}', '{plugin}')"));
    }
    let begin = lsn(&cluster.psql(DB, "SELECT pg_current_wal_insert_lsn()"));
    for n in 0..5u32 {
        let (from, to) = (n * 200_000 + 1, (n + 1) * 200_000);
        let rows = format!("generate_series({from}, {to}) i");
        cluster.psql(
            DB,
            &if n < 3 {
                format!(
                    "INSERT INTO {schema}.orders SELECT i % {TENANTS} + 1, i, i % 5000, (i % 100000) / 100.0, 'open', \
                     'order number ' || i || ' of a customer', timestamptz '2026-01-01 00:00Z' + i * interval '1 second' FROM {rows}"
                )
            } else {
                format!(
                    "INSERT INTO {schema}.payments SELECT i % {TENANTS} + 1, i, i - 600000, i % 3 = 0, md5(i::text)::uuid, \
                     i / 7.0, date '2026-01-01' + i % 365 FROM {rows}"
                )
            },
        );
    }
    cluster.script(
        DB,
        &format!(
            "DO $$BEGIN FOR i IN 1..100000 LOOP
                 UPDATE {schema}.orders SET status = 'paid', amount = amount + 1 WHERE tenant_id = i % {TENANTS} + 1 AND id = i;
                 COMMIT;
             END LOOP; END$$;"
        ),
    );
    let end = lsn(&cluster.psql(DB, "SELECT pg_current_wal_insert_lsn()"));
    // One more transaction, so that every plugin has something to send that lies beyond the end.
    cluster.psql(
        DB,
        &format!(
            "SET synchronous_commit = on; UPDATE {schema}.orders SET status = 'last' WHERE tenant_id = 2 AND id = 1"
        ),
    );
    let wal_bytes = end - begin;
    println!("{schema}: 1.0 M rows in 5 inserts, 100,000 one-row updates, {} MB of WAL", wal_bytes >> 20);
    Stretch { name: schema, end, wal_bytes }
}
