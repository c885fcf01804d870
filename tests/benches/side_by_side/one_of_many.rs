//! One tenant of a hundred into an empty database, against what a person with a backup of the whole cluster does:
//! `pgbackrest restore`, a second server, the tenant's rows copied out. And the stored size of that tenant's full against
//! `pg_dump -Fc` of the same rows.

use crate::figure::{Figure, Took, Unit};
use crate::world::{REPETITIONS, TENANTS};
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::{Cluster, as_postgres};
use coffer_tests::restored::{self, Database};
use coffer_tests::{free_port, wait_for};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const DB: &str = "many";
/// In each of two tables, of all tenants.
const ROWS: u32 = 1_000_000;
const TENANT: &str = "7";
const STANZA: &str = "bench";

/// The cluster, its backups of both kinds, and where they are.
pub struct Many {
    cluster: Cluster,
    agent: Agent,
    dir: PathBuf,
}

pub fn restore() -> Figure {
    let many = Many::prepare();
    let (mut ours_runs, mut peer_runs) = (Vec::new(), Vec::new());
    for n in 0..=REPETITIONS {
        let begun = Instant::now();
        let ours = Database::restore(&many.agent, &many.cluster, TENANT, "name:before");
        let of_ours = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let peer = many.whole_cluster();
        let of_peer = begun.elapsed().as_secs_f64();
        let count = "SELECT (SELECT count(*) FROM orders) || ' ' || (SELECT count(*) FROM payments)";
        let rows = many.cluster.psql(&ours.name, count);
        assert_eq!(rows, many.cluster.psql(&peer.name, count));
        println!("  {of_ours:.2} s, pgBackRest {of_peer:.2} s ({rows} rows)");
        if n > 0 {
            ours_runs.push(Took::seconds(of_ours));
            peer_runs.push(Took::seconds(of_peer));
        }
    }
    Figure {
        name: "one-of-100",
        unit: Unit::Seconds,
        bar: Some(0.10),
        ours: format!("coffer restore --mode database of one tenant of {TENANTS}"),
        peer: "pgbackrest restore, start the server, pg_dump of the schema, COPY of the tenant's rows".into(),
        ours_runs,
        peer_runs,
    }
}

pub fn size() -> Figure {
    let many = Many::prepare();
    let taken = many.agent.json(&["compact", "--tenant", TENANT]);
    let bytes: u64 = taken["fulls"].as_array().expect("fulls").iter().filter_map(|t| t["bytes"].as_u64()).sum();
    assert!(bytes > 0, "{taken}");
    let db = Database::restore(&many.agent, &many.cluster, TENANT, "name:before");
    let dump = many.dir.join("tenant.dump");
    let mut c = many.cluster.client("pg_dump", &db.name);
    assert!(c.args(["-Fc", "-f"]).arg(&dump).status().expect("pg_dump starts").success());
    let mb = |bytes: u64| Took::seconds(bytes as f64 / 1e6);
    Figure {
        name: "full-size",
        unit: Unit::Megabytes,
        bar: Some(1.0),
        ours: "a full of one tenant, sealed".into(),
        peer: "pg_dump -Fc of a database with the same rows".into(),
        ours_runs: vec![mb(bytes)],
        peer_runs: vec![mb(std::fs::metadata(&dump).expect("pg_dump wrote it").len())],
    }
}

impl Many {
    fn prepare() -> Self {
        let dir =
            std::env::temp_dir().join(format!("coffer-bench-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        std::fs::create_dir(&dir).expect("a folder");
        let config = dir.join("pgbackrest.conf");
        let archive = format!("pgbackrest --config={} --stanza={STANZA} archive-push %p", config.display());
        let cluster = Cluster::start_with(
            15,
            &format!(
                "shared_buffers = 512MB\nmax_wal_size = 8GB\ncheckpoint_timeout = 1h\narchive_mode = on\narchive_command = '{archive}'\n"
            ),
            &[],
        );
        let text = format!(
            "[global]\nrepo1-path={dir}/repo\nlog-path={dir}\nlock-path={dir}\nspool-path={dir}\nprocess-max=2\ncompress-type=lz4\nstart-fast=y\n\
             [{STANZA}]\npg1-path={}\npg1-port={}\npg1-socket-path={}\npg1-user=postgres\n",
            cluster.data().display(),
            cluster.port,
            cluster.socket_dir().display(),
            dir = dir.display(),
        );
        std::fs::write(&config, text).expect("its configuration");
        own(&dir);
        cluster.create_protected_db(DB);
        cluster.script(
            DB,
            &format!(
                "CREATE TABLE orders (tenant int NOT NULL, id bigint NOT NULL, customer int, amount numeric(12,2), status text,
                   note text, placed_at timestamptz, PRIMARY KEY (tenant, id));
                 CREATE INDEX ON orders (tenant, customer);
                 CREATE TABLE payments (tenant int NOT NULL, id bigint NOT NULL, order_id bigint NOT NULL, reference uuid, day date,
                   PRIMARY KEY (tenant, id), FOREIGN KEY (tenant, order_id) REFERENCES orders);
                 CREATE INDEX ON payments (tenant, order_id);
                 SELECT coffer.add_table('orders', 'tenant'), coffer.add_table('payments', 'tenant');
                 INSERT INTO orders SELECT i % {TENANTS}, i, i % 5000, (i % 100000) / 100.0, 'open',
                   'order number ' || i || ' of a customer', timestamptz '2026-01-01 00:00Z' + i * interval '1 second' FROM generate_series(1, {ROWS}) i;
                 INSERT INTO payments SELECT tenant, id, id, md5(id::text)::uuid, date '2026-01-01' + id::int % 365 FROM orders;
                 VACUUM ANALYZE;"
            ),
        );
        let many = Self { agent: Agent::new(&Setup::of(&cluster, DB)), cluster, dir };
        many.pgbackrest(&["stanza-create"]);
        many.pgbackrest(&["--type=full", "backup"]);
        let mut many = many;
        many.agent.start();
        restored::wait_windows(&mut many.agent, &[TENANT]);
        many.cluster.psql(DB, "SELECT coffer.wait_durable(coffer.restore_point('before'))");
        many
    }

    fn pgbackrest(&self, args: &[&str]) {
        let mut c = as_postgres(Path::new("pgbackrest"));
        c.arg(format!("--config={}", self.dir.join("pgbackrest.conf").display()))
            .arg(format!("--stanza={STANZA}"))
            .args(args);
        ran(c);
    }

    /// The whole cluster beside the living one, and the tenant's rows from there into a database of the living one.
    fn whole_cluster(&self) -> Database<'_> {
        let (data, port) = (self.dir.join("data"), free_port().to_string());
        self.pgbackrest(&[
            &format!("--pg1-path={}", data.display()),
            "--type=immediate",
            "--target-action=promote",
            "restore",
        ]);
        let options = format!("-p {port} -c unix_socket_directories={} -c archive_mode=off", self.dir.display());
        let server = |args: &[&str]| {
            let mut c = as_postgres(&coffer_tests::env_path("COFFER_PG15_BIN").join("pg_ctl"));
            c.arg("-D").arg(&data).arg("-l").arg(self.dir.join("log")).args(args);
            // Not a pipe, which the server would keep open.
            let done =
                c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().expect("pg_ctl starts");
            assert!(done.success(), "{args:?}: {}", std::fs::read_to_string(self.dir.join("log")).unwrap_or_default());
        };
        server(&["-w", "-t", "300", "-o", &options, "start"]);
        let there = |program: &str| {
            let mut c = self.cluster.client(program, DB);
            c.env("PGPORT", &port);
            c
        };
        wait_for("the end of the recovery", 300, || {
            let mut c = there("psql");
            let out = c.args(["-X", "-A", "-t", "-c", "SELECT pg_is_in_recovery()"]).output().expect("psql starts");
            (out.stdout.starts_with(b"f")).then_some(())
        });
        let name = format!("copied_{:08x}", rand::random::<u32>());
        self.cluster.psql("postgres", &format!("CREATE DATABASE {name}"));
        let schema = self.dir.join("schema.dump");
        let mut c = there("pg_dump");
        c.args(["-Fc", "-s", "-t", "orders", "-t", "payments", "-f"]).arg(&schema);
        ran(c);
        let entries = self.without_our_triggers(&schema);
        let section = |which: &str| {
            let mut c = self.cluster.client("pg_restore", &name);
            c.args(["-d", &name, &format!("--section={which}"), "-L"]).arg(&entries).arg(&schema);
            ran(c);
        };
        section("pre-data");
        for table in ["orders", "payments"] {
            let rows = self.dir.join("rows");
            let mut c = there("psql");
            let out = format!("\\copy (SELECT * FROM {table} WHERE tenant = {TENANT}) TO '{}'", rows.display());
            c.args(["-X", "-q", "-c", &out]);
            ran(c);
            self.cluster.psql(&name, &format!("\\copy {table} FROM '{}'", rows.display()));
        }
        section("post-data");
        server(&["-m", "immediate", "stop"]);
        std::fs::remove_dir_all(&data).expect("it was restored there");
        Database::named(&self.cluster, &name)
    }

    /// What `pg_restore -L` is to restore of a dump: all but the triggers of the extension, which the empty database lacks.
    fn without_our_triggers(&self, dump: &Path) -> PathBuf {
        let mut c = self.cluster.client("pg_restore", DB);
        c.arg("-l").arg(dump);
        let all = ran(c);
        let ours = |entry: &&str| entry.contains(" TRIGGER ") && entry.contains("_coffer_");
        let kept: Vec<&str> = all.lines().filter(|e| !ours(e)).collect();
        let list = self.dir.join("entries");
        std::fs::write(&list, kept.join("\n") + "\n").expect("our folder");
        list
    }
}

impl Drop for Many {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Servers run as user postgres when we are root.
fn own(dir: &Path) {
    let mut c = Command::new("chmod");
    c.arg("777").arg(dir);
    ran(c);
}

/// What the command, which must end well, wrote to its standard output.
fn ran(mut c: Command) -> String {
    let out = c.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("cannot start {c:?}: {e}"));
    let said = || [String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)].concat();
    assert!(out.status.success(), "{c:?}: {}", said());
    String::from_utf8_lossy(&out.stdout).into_owned()
}
