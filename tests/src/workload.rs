//! Writers that do to a database what applications do: savepoints, rollbacks, two-phase commits, asynchronous commits,
//! upserts, changes of keys, rows that move between tenants and partitions, TOASTed values that stay while other
//! columns change, and now and then a TRUNCATE.
//!
//! Tenants are `1` to `8`. Rows move only among 5 to 8, so that 1 to 4 can be restored in place without being refused.

use crate::cluster::Cluster;
use crate::truth::Watched;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

pub const TENANTS: [&str; 8] = ["1", "2", "3", "4", "5", "6", "7", "8"];

/// The application's tables.
pub const DDL: &str = "
CREATE TABLE orders (tenant int NOT NULL, id bigint NOT NULL, note text, amount numeric, body text, PRIMARY KEY (tenant, id));
ALTER TABLE orders ALTER body SET STORAGE EXTERNAL;
CREATE TABLE items (id bigint PRIMARY KEY, tenant int NOT NULL, qty int NOT NULL, label text);
CREATE TABLE docs (id bigint PRIMARY KEY, tenant int NOT NULL, rev int NOT NULL, body text);
ALTER TABLE docs ALTER body SET STORAGE EXTERNAL;
CREATE TABLE events (tenant int NOT NULL, kind text, n int, at timestamptz);
CREATE TABLE wide (tenant int NOT NULL, n int, body text);
ALTER TABLE wide ALTER body SET STORAGE EXTERNAL;
CREATE TABLE parts (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (id);
CREATE TABLE parts_a PARTITION OF parts FOR VALUES FROM (0) TO (30);
CREATE TABLE parts_b PARTITION OF parts FOR VALUES FROM (30) TO (60);
CREATE TABLE parts_c PARTITION OF parts DEFAULT;
CREATE TABLE seats (tenant int NOT NULL, id bigint NOT NULL, v int, PRIMARY KEY (tenant, id));
CREATE TABLE pad (tenant int NOT NULL, id bigint NOT NULL, v int, PRIMARY KEY (tenant, id));
";

/// What the restores are compared on.
pub fn watched() -> Vec<Watched> {
    TABLES.iter().map(|t| Watched::new(t, "tenant")).collect()
}

const TABLES: [&str; 8] = ["orders", "items", "docs", "events", "wide", "parts", "seats", "pad"];

/// A protected database with these tables, registered, and with some rows.
pub fn prepare(cluster: &Cluster, db: &str) {
    cluster.create_protected_db(db);
    cluster.script(db, DDL);
    for t in TABLES {
        cluster.psql(db, &format!("SELECT * FROM coffer.add_table('{t}', 'tenant')"));
    }
    cluster.script(
        db,
        "INSERT INTO orders SELECT t, i, 'first ' || i, i * 1.50, CASE WHEN i % 5 = 0 THEN repeat(md5(i::text), 90) END
           FROM generate_series(1, 8) t, generate_series(1, 40) i;
         INSERT INTO items SELECT i, 1 + i % 8, i, 'item ' || i FROM generate_series(1, 300) i;
         INSERT INTO docs SELECT i, 1 + i % 8, 0, repeat(md5(i::text), 100) FROM generate_series(1, 80) i;
         INSERT INTO events SELECT 1 + i % 8, 'k' || i % 3, i % 20, '2024-02-29 12:00:00Z' FROM generate_series(1, 300) i;
         INSERT INTO wide SELECT 1 + i % 8, i % 10, repeat(md5((i % 10)::text), 80) FROM generate_series(1, 60) i;
         INSERT INTO parts SELECT t, i, 'p' || i FROM generate_series(1, 8) t, generate_series(1, 80, 3) i;
         INSERT INTO seats SELECT t, i, i FROM generate_series(1, 8) t, generate_series(1, 30) i;
         INSERT INTO pad SELECT t, i, i FROM generate_series(1, 8) t, generate_series(1, 20) i;",
    );
}

/// A connection for [`crate::truth::take`]: in a deadlock with a writer it is the writer that gives way.
pub async fn observer(cluster: &Cluster, db: &str) -> Client {
    let client = cluster.connect(db).await;
    client.batch_execute("SET deadlock_timeout = '60s'").await.expect("set");
    client
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    committed: AtomicU64,
    failed: AtomicU64,
    /// The tenant that is left alone; 0 none.
    frozen: AtomicI32,
}

/// Running writers.
pub struct Workload {
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<()>>,
}

impl Workload {
    /// Starts `writers` connections that begin a transaction every `pace` at most. They survive the server's death.
    pub fn start(cluster: &Cluster, db: &str, writers: u64, seed: u64, pace: Duration) -> Self {
        let shared = Arc::new(Shared::default());
        let url = cluster.url("postgres", db);
        let writers = (0..writers)
            .map(|n| {
                let writer = Writer {
                    url: url.clone(),
                    prefix: format!("w{n}_{:08x}", rand::random::<u32>()),
                    rng: StdRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(n)),
                    shared: shared.clone(),
                    pace,
                };
                tokio::spawn(writer.run())
            })
            .collect();
        Self { shared, writers }
    }

    /// Transactions committed so far.
    pub fn committed(&self) -> u64 {
        self.shared.committed.load(Ordering::Relaxed)
    }

    /// Waits for `n` more commits.
    pub async fn after(&self, n: u64) {
        let goal = self.committed() + n;
        let end = Instant::now() + Duration::from_secs(120);
        while self.committed() < goal {
            assert!(Instant::now() < end, "the writers are stuck at {} commits", self.committed());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Leaves a tenant alone from now on; transactions in flight may still touch it until the next table lock is had.
    pub fn freeze(&self, tenant: i32) {
        self.shared.frozen.store(tenant, Ordering::SeqCst);
    }

    /// Ends the writers; transactions committed, and failed ones (deadlocks, duplicate keys, a dead server).
    pub async fn stop(self) -> (u64, u64) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for w in self.writers {
            w.await.expect("a writer");
        }
        (self.shared.committed.load(Ordering::Relaxed), self.shared.failed.load(Ordering::Relaxed))
    }
}

struct Writer {
    url: String,
    prefix: String,
    rng: StdRng,
    shared: Arc<Shared>,
    pace: Duration,
}

impl Writer {
    async fn run(mut self) {
        let mut serial = 0;
        while !self.shared.stop.load(Ordering::SeqCst) {
            let Some(db) = self.connect().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let mut tick = tokio::time::interval(self.pace);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            while !self.shared.stop.load(Ordering::SeqCst) && !db.is_closed() {
                tick.tick().await;
                serial += 1;
                let counter = match self.transaction(&db, serial).await {
                    Ok(()) => &self.shared.committed,
                    Err(_) => &self.shared.failed,
                };
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Connects, and settles what this writer had prepared before the server died.
    async fn connect(&mut self) -> Option<Client> {
        let (db, connection) = tokio_postgres::connect(&self.url, tokio_postgres::NoTls).await.ok()?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        // The server looks for a deadlock once per wait, so one that forms later is for the lock timeout to end.
        db.batch_execute("SET deadlock_timeout = '50ms'; SET lock_timeout = '300ms'").await.ok()?;
        let left = "SELECT gid FROM pg_prepared_xacts WHERE starts_with(gid, $1) AND database = current_database()";
        for row in db.query(left, &[&self.prefix]).await.ok()? {
            let end = if self.rng.random_bool(0.5) { "COMMIT" } else { "ROLLBACK" };
            db.batch_execute(&format!("{end} PREPARED '{}'", row.get::<_, &str>(0))).await.ok()?;
        }
        Some(db)
    }

    async fn transaction(&mut self, db: &Client, serial: u64) -> Result<(), tokio_postgres::Error> {
        let mut sql = String::from("BEGIN;");
        if self.rng.random_bool(0.3) {
            sql.push_str("SET LOCAL synchronous_commit = off;");
        }
        for n in 0..self.rng.random_range(1..6) {
            let savepoint = self.rng.random_bool(0.3);
            if savepoint {
                sql.push_str(&format!("SAVEPOINT s{n};"));
            }
            for _ in 0..self.rng.random_range(1..3) {
                sql.push_str(&self.operation());
            }
            if savepoint {
                let end = if self.rng.random_bool(0.4) { "ROLLBACK TO SAVEPOINT" } else { "RELEASE SAVEPOINT" };
                sql.push_str(&format!("{end} s{n};"));
            }
        }
        let gid = format!("{}_{serial}", self.prefix);
        let (end, second) = match self.rng.random_range(0..20) {
            0..2 => ("ROLLBACK;".to_owned(), None),
            2..4 => {
                let second = if self.rng.random_bool(0.75) { "COMMIT" } else { "ROLLBACK" };
                (format!("PREPARE TRANSACTION '{gid}';"), Some(format!("{second} PREPARED '{gid}'")))
            }
            _ => ("COMMIT;".to_owned(), None),
        };
        if let Err(e) = db.batch_execute(&sql).await {
            let _ = db.batch_execute("ROLLBACK").await;
            return Err(e);
        }
        db.batch_execute(&end).await?;
        if let Some(second) = second {
            db.batch_execute(&second).await?;
        }
        Ok(())
    }

    fn tenant(&mut self, among: std::ops::Range<i32>) -> i32 {
        loop {
            let t = self.rng.random_range(among.clone());
            if t != self.shared.frozen.load(Ordering::SeqCst) {
                return t;
            }
        }
    }

    /// A statement or a few; every one of them names its tenant.
    fn operation(&mut self) -> String {
        let t = self.tenant(1..9);
        let (from, to) = (self.tenant(5..9), self.tenant(5..9));
        let r = &mut self.rng;
        let id = r.random_range(1..61);
        // Keys of tables whose key lacks the tenant: none is ever taken over by another tenant, unless its row moves.
        let item = r.random_range(1..76) * 8 + t - 1;
        let doc = r.random_range(1..12) * 8 + t - 1;
        let (moving_item, moving_doc) =
            (r.random_range(1..76) * 8 + r.random_range(4..8), r.random_range(1..12) * 8 + r.random_range(4..8));
        let n = r.random_range(0..20);
        let x: u32 = r.random();
        let big = format!("repeat(md5('{x}'), {})", r.random_range(70..140));
        match r.random_range(0..34) {
            0..3 => format!(
                "INSERT INTO orders VALUES ({t}, {id}, 'n{x}', {x} / 100.0, {big}) \
                 ON CONFLICT (tenant, id) DO UPDATE SET note = excluded.note, amount = excluded.amount;"
            ),
            3..5 => format!("UPDATE orders SET amount = amount + 1 WHERE tenant = {t} AND id = {id};"),
            5 => format!("UPDATE orders SET body = {big} WHERE tenant = {t} AND id = {id};"),
            6 => format!(
                "UPDATE orders SET id = id + 100 WHERE tenant = {t} AND id = {id} AND NOT EXISTS \
                 (SELECT FROM orders o WHERE o.tenant = {t} AND o.id = {id} + 100);"
            ),
            7 => format!("DELETE FROM orders WHERE tenant = {t} AND id IN ({id}, {id} + 100);"),
            8 => format!("UPDATE orders SET note = note || '.' WHERE tenant = {t} AND id % 7 = {};", n % 7),
            9..11 => format!(
                "INSERT INTO items VALUES ({item}, {t}, {n}, E'l\\t{x}\\\\N') \
                 ON CONFLICT (id) DO UPDATE SET qty = items.qty + 1 WHERE items.tenant = {t};"
            ),
            11 => format!("UPDATE items SET tenant = {to} WHERE id = {moving_item} AND tenant = {from};"),
            12 => format!(
                "UPDATE items SET tenant = {to}, id = id + 8000 WHERE id = {moving_item} AND tenant = {from} AND NOT EXISTS \
                 (SELECT FROM items i WHERE i.id = {moving_item} + 8000);"
            ),
            13 => format!("DELETE FROM items WHERE tenant = {t} AND id / 8 % 40 = {n};"),
            14 => format!(
                "UPDATE items SET id = id + 1000, label = NULL WHERE id = {item} AND tenant = {t} AND NOT EXISTS \
                 (SELECT FROM items i WHERE i.id = {item} + 1000);"
            ),
            15 => format!(
                "INSERT INTO docs VALUES ({doc}, {t}, 1, {big}) ON CONFLICT (id) DO UPDATE SET rev = docs.rev + 1 \
                 WHERE docs.tenant = {t};"
            ),
            16 => format!("UPDATE docs SET rev = rev + 1 WHERE tenant = {t};"),
            17 => format!(
                "UPDATE docs SET id = id + 200 WHERE tenant = {t} AND id = {doc} AND NOT EXISTS \
                 (SELECT FROM docs d WHERE d.id = {doc} + 200);"
            ),
            18 => format!("DELETE FROM docs WHERE tenant = {t} AND id IN ({doc}, {doc} + 200);"),
            19..21 => format!(
                "INSERT INTO events SELECT {t}, 'k{}', {n}, now() FROM generate_series(1, {});",
                n % 3,
                1 + n % 3
            ),
            21 => format!("UPDATE events SET kind = kind || 'u' WHERE tenant = {t} AND n = {n} AND length(kind) < 6;"),
            22 => format!("UPDATE events SET tenant = {to} WHERE tenant = {from} AND n = {n};"),
            23 => format!("DELETE FROM events WHERE tenant = {t} AND n = {n};"),
            24 => format!("INSERT INTO wide VALUES ({t}, {}, {big});", n % 10),
            25 => format!("UPDATE wide SET n = n + 1 WHERE tenant = {t} AND n = {};", n % 10),
            26 => format!("DELETE FROM wide WHERE tenant = {t} AND n >= {n};"),
            27 => format!(
                "INSERT INTO parts VALUES ({t}, {id}, 'p{x}') ON CONFLICT (tenant, id) DO UPDATE SET v = excluded.v;\
                 UPDATE parts SET id = 100 + {n} WHERE tenant = {t} AND id = {n} AND NOT EXISTS \
                 (SELECT FROM parts p WHERE p.tenant = {t} AND p.id = 100 + {n});\
                 DELETE FROM parts WHERE tenant = {t} AND id = {};",
                30 + n
            ),
            28 => format!(
                "INSERT INTO seats VALUES ({t}, {id}, {n}) ON CONFLICT (tenant, id) DO UPDATE SET v = seats.v + 1;\
                 UPDATE seats SET tenant = {to} WHERE tenant = {from} AND id = {id} AND NOT EXISTS \
                 (SELECT FROM seats s WHERE s.tenant = {to} AND s.id = {id});"
            ),
            29 => format!(
                "DELETE FROM seats WHERE tenant = {t} AND id = {id}; INSERT INTO seats VALUES ({t}, {id}, 0);\
                 UPDATE seats SET v = v + 1 WHERE tenant = {t} AND id = {id};\
                 DELETE FROM seats WHERE tenant = {t} AND id = {id}; INSERT INTO seats VALUES ({t}, {id}, {n});"
            ),
            // Rows that move and take values along that the statement does not touch.
            30 => format!(
                "UPDATE orders SET tenant = {to} WHERE tenant = {from} AND id = {id} AND NOT EXISTS \
                 (SELECT FROM orders o WHERE o.tenant = {to} AND o.id = {id});"
            ),
            31 => format!("UPDATE docs SET tenant = {to}, rev = rev + 1 WHERE tenant = {from} AND id = {moving_doc};"),
            32 => format!("UPDATE wide SET tenant = {to} WHERE tenant = {from} AND n = {};", n % 10),
            _ => {
                let upsert = format!(
                    "INSERT INTO pad VALUES ({t}, {id}, {n}) ON CONFLICT (tenant, id) DO UPDATE SET v = excluded.v;"
                );
                let alone = self.shared.frozen.load(Ordering::SeqCst) == 0;
                match self.rng.random_range(0..40) {
                    0 if alone => format!("TRUNCATE pad;{upsert}"),
                    1 if alone => format!("{upsert}TRUNCATE pad;"),
                    2 if alone => "TRUNCATE parts_b;".to_owned(),
                    _ => upsert,
                }
            }
        }
    }
}
