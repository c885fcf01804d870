//! `coffer demo`: the main job on real traffic, with proof.
//!
//! A private PostgreSQL cluster with pgbench's own schema (the tenant is `bid`), an agent on a local repository, real
//! pgbench clients, a restore point, a disaster for tenant 3, its restore in place while the others work on. Everything
//! is done by the programs that a person would use: initdb, pgbench, psql and this binary's own verbs.
//!
//! The proofs do not trust the restore's own report: the truth is read while commits are held back by table locks, in
//! the very transaction that names the restore point; afterwards it is compared row for row, and what the restore's
//! transaction wrote is looked for in the other tenants' rows.

mod year;

use crate::error::{Context, Error, Kind, Result};
use serde_json::Value;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The customer that is lost and brought back.
const TENANT: u32 = 3;
/// pgbench's scale: this many tenants, 100,000 accounts each.
const SCALE: u32 = 10;
const DATABASE: &str = "shop";
const TABLES: [&str; 4] = ["accounts", "tellers", "branches", "history"];

#[derive(clap::Args, Debug)]
pub struct DemoArgs {
    /// Leave the cluster and the agent running to play with
    #[arg(long)]
    pub keep: bool,
    /// Where initdb, pg_ctl, pgbench and psql are
    #[arg(long, env = "COFFER_PG15_BIN", default_value = "/usr/lib/postgresql/15/bin", value_name = "DIR")]
    pub pg_bin: PathBuf,
    /// Root of an unpacked package of the extension; without it, the installed extension is used
    #[arg(long, env = "COFFER_PG15_PACKAGE", value_name = "DIR")]
    pub package: Option<PathBuf>,
    /// The folder of the extension's library in that package
    #[arg(long, env = "COFFER_PG15_LIB", value_name = "DIR")]
    pub package_lib: Option<PathBuf>,
    /// How long the traffic runs before the restore point is named, in seconds
    #[arg(long, default_value_t = 6, value_name = "SECONDS")]
    pub warmup: u64,
}

/// Runs the story; an error if any proof failed.
pub fn run(args: &DemoArgs) -> Result<()> {
    let started = Instant::now();
    let mut demo = Demo::new(args)?;
    let result = demo.story(started);
    match &result {
        Ok(()) if args.keep => demo.leave_running(),
        _ => demo.tear_down(result.is_err()),
    }
    result
}

struct Demo<'a> {
    args: &'a DemoArgs,
    dir: PathBuf,
    port: u16,
    status_port: u16,
    agent: Option<Child>,
    traffic: Vec<(&'static str, Child)>,
    server_up: bool,
}

struct Restored {
    rows: u64,
    seconds: f64,
}

struct Traffic {
    processed: u64,
    failed: usize,
}

#[derive(Default)]
struct Rpo {
    worst: f64,
    readings: u32,
}

fn say(text: impl Display) {
    println!("{text}");
}

fn step(text: impl Display) {
    println!("\n\x1b[1m{text}\x1b[0m");
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

fn free_port() -> Result<u16> {
    std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .map(|a| a.port())
        .context(Kind::Other, "no free port on the loopback")
}

/// Runs a command to its end; its standard output.
fn output(mut c: Command) -> Result<String> {
    let out =
        c.stdin(Stdio::null()).output().context(Kind::Other, format_args!("cannot start {:?}", c.get_program()))?;
    if !out.status.success() {
        return Err(Error::other(format!(
            "{:?} failed ({}): {}{}",
            c.get_program(),
            out.status,
            String::from_utf8_lossy(&out.stdout).trim_end(),
            String::from_utf8_lossy(&out.stderr).trim_end()
        )));
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim_end().to_owned())
}

fn prove(what: &str, ok: bool, detail: impl Display) -> Result<()> {
    if !ok {
        return Err(Error::new(Kind::Verification, format!("PROOF FAILED: {what}: {detail}")));
    }
    say(format_args!("  proved: {what} ({detail})"));
    Ok(())
}

impl<'a> Demo<'a> {
    fn new(args: &'a DemoArgs) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("coffer-demo-{}", std::process::id()));
        std::fs::create_dir_all(&dir).context(Kind::Other, format_args!("cannot create {}", dir.display()))?;
        let (port, status_port) = (free_port()?, free_port()?);
        Ok(Self { args, dir, port, status_port, agent: None, traffic: Vec::new(), server_up: false })
    }

    /// A server-side program, as the user that may run servers.
    fn server(&self, program: &str) -> Command {
        let path = self.args.pg_bin.join(program);
        if is_root() {
            let mut c = Command::new("runuser");
            c.args(["-u", "postgres", "--"]).arg(path).current_dir("/");
            c
        } else {
            Command::new(path)
        }
    }

    fn client(&self, program: &str) -> Command {
        let mut c = Command::new(self.args.pg_bin.join(program));
        c.env("PGHOST", "127.0.0.1").env("PGPORT", self.port.to_string());
        c.env("PGUSER", "postgres").env("PGDATABASE", DATABASE);
        c
    }

    fn psql(&self, sql: &str) -> Result<String> {
        let mut c = self.client("psql");
        c.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql]);
        output(c)
    }

    fn config(&self) -> PathBuf {
        self.dir.join("coffer.toml")
    }

    fn coffer(&self, args: &[&str]) -> Result<Command> {
        let exe = std::env::current_exe().context(Kind::Other, "where is this binary?")?;
        let mut c = Command::new(exe);
        c.arg("--config").arg(self.config()).args(args);
        Ok(c)
    }

    fn coffer_json(&self, args: &[&str]) -> Result<Value> {
        let mut c = self.coffer(&["--json"])?;
        c.args(args);
        let text = output(c)?;
        serde_json::from_str(&text).context(Kind::Other, format_args!("coffer {args:?} did not print JSON"))
    }

    fn story(&mut self, started: Instant) -> Result<()> {
        self.start_server()?;
        self.protect()?;
        self.start_agent()?;

        step("3. Real traffic");
        self.start_traffic()?;
        let mut rpo = Rpo::default();
        self.watch(&mut rpo, Duration::from_secs(self.args.warmup))?;
        say(format_args!("  two pgbench processes: one over all tenants, one that leaves tenant {TENANT} alone"));
        say(format_args!("  {} transactions so far", self.psql("SELECT count(*) FROM pgbench_history")?));

        step("4. A restore point, from psql");
        self.take_truth()?;
        say("  SELECT coffer.restore_point('before_the_disaster');   -- every tenant can go back to this commit");
        self.watch(&mut rpo, Duration::from_secs(2))?;

        step(format_args!("5. The disaster: tenant {TENANT} is gone, traffic goes on"));
        let lost = self.disaster()?;
        say(format_args!("  {lost} rows of tenant {TENANT} deleted and committed"));
        self.watch(&mut rpo, Duration::from_secs(2))?;
        // From here on the customer is in maintenance, as it would be; all the others work on.
        self.stop_traffic("everybody")?;

        step(format_args!("6. Restore tenant {TENANT} in place, to the restore point"));
        let restore = self.restore()?;

        step("7. Proof");
        self.prove_tenant()?;
        self.prove_others(&restore)?;
        self.watch(&mut rpo, Duration::from_secs(1))?;
        let done = self.stop_traffic("the others")?;
        let detail = format!("{} transactions, {} failed", done.processed, done.failed);
        prove("the other clients never failed", done.failed == 0, detail)?;
        let verify = self.coffer_json(&["verify"])?;
        prove(
            "everything in the repository reads back and authenticates",
            verify["ok"] == Value::Bool(true),
            format_args!("{} objects", verify["objects"]),
        )?;

        self.year()?;

        step("In figures");
        let repository = folder_size(&self.dir.join("repository"));
        let database = self.psql(&format!("SELECT pg_database_size('{DATABASE}')"))?.parse::<u64>().unwrap_or(0);
        say(format_args!(
            "  database {} MB, repository {} MB (compressed, encrypted)",
            database >> 20,
            repository >> 20
        ));
        say(format_args!("  restore: {} rows written in {:.2} s", restore.rows, restore.seconds));
        say(format_args!("  RPO seen: worst {:.1} s over {} readings (limit 300 s)", rpo.worst, rpo.readings));
        say(format_args!("  all of it took {:.0} s", started.elapsed().as_secs_f64()));
        Ok(())
    }

    fn start_server(&mut self) -> Result<()> {
        step("1. A private PostgreSQL cluster with pgbench's schema");
        let data = self.dir.join("data");
        if is_root() {
            let mut c = Command::new("chown");
            c.arg("postgres").arg(&self.dir);
            output(c)?;
        }
        let mut c = self.server("initdb");
        c.args(["-U", "postgres", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8", "-D"]).arg(&data);
        output(c)?;
        let path = data.join("postgresql.conf");
        let mut conf = std::fs::read_to_string(&path).context(Kind::Other, "initdb wrote no configuration")?;
        conf.push_str(&format!(
            "\nport = {}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nwal_level = logical\n\
             shared_buffers = 256MB\nmax_wal_size = 2GB\n",
            self.port,
            self.dir.display()
        ));
        if let Some(p) = &self.args.package {
            conf.push_str(&format!("extension_destdir = '{}'\n", p.display()));
        }
        if let Some(p) = &self.args.package_lib {
            conf.push_str(&format!("dynamic_library_path = '{}:$libdir'\n", p.display()));
        }
        std::fs::write(&path, conf).context(Kind::Other, format_args!("cannot write {}", path.display()))?;
        let mut c = self.server("pg_ctl");
        c.arg("-D").arg(&data).arg("-l").arg(self.dir.join("server.log")).args(["-w", "start"]);
        // Not output(): the server would inherit the pipe and keep it open.
        let up = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !up.is_ok_and(|s| s.success()) {
            let log = std::fs::read_to_string(self.dir.join("server.log")).unwrap_or_default();
            return Err(Error::other(format!("the server did not start: {log}")));
        }
        self.server_up = true;
        let mut c = self.client("psql");
        c.env("PGDATABASE", "postgres").args(["-X", "-q", "-c", &format!("CREATE DATABASE {DATABASE}")]);
        output(c)?;
        let mut c = self.client("pgbench");
        c.args(["-i", "-q", "-s", &SCALE.to_string()]);
        output(c)?;
        say(format_args!(
            "  {} on port {}, {} accounts of {SCALE} tenants (the tenant is bid)",
            self.psql("SELECT 'PostgreSQL ' || current_setting('server_version')")?,
            self.port,
            self.psql("SELECT count(*) FROM pgbench_accounts")?
        ));
        Ok(())
    }

    fn protect(&self) -> Result<()> {
        step("2. Protect it");
        self.psql("CREATE EXTENSION pg_coffer")?;
        self.psql("CREATE ROLE coffer_agent LOGIN REPLICATION BYPASSRLS")?;
        self.psql("SELECT coffer.setup_agent('coffer_agent')")?;
        say("  SELECT * FROM coffer.discover('bid', apply => true);");
        let found = self.psql(
            "SELECT format('    %s  %s  %s', rpad(relation::text, 18), rpad(coalesce(strategy, action), 9), reason) \
             FROM coffer.discover('bid', apply => true) ORDER BY relation::text",
        )?;
        say(found);
        Ok(())
    }

    fn start_agent(&mut self) -> Result<()> {
        let d = self.dir.display();
        let text = format!(
            "[source.{DATABASE}]\nurl = \"postgres://coffer_agent@127.0.0.1:{}/{DATABASE}\"\n\n[[store]]\nname = \"local\"\n\
             url = \"file://{d}/repository\"\n\n[keys]\nprovider = \"file\"\npath = \"{d}/kek\"\n\
             keyring = [\"file://{d}/keyring\"]\n\n[ship]\ninterval = \"1s\"\n\n[spool]\ndir = \"{d}/spool\"\n\n\
             [status]\nlisten = \"127.0.0.1:{}\"\n",
            self.port, self.status_port
        );
        std::fs::write(self.config(), text).context(Kind::Other, "cannot write coffer.toml")?;
        output(self.coffer(&["init", "--create-kek"])?)?;
        let log = std::fs::File::create(self.dir.join("agent.log")).context(Kind::Other, "cannot write agent.log")?;
        let mut c = self.coffer(&["run"])?;
        c.stdin(Stdio::null());
        c.stdout(log.try_clone().context(Kind::Other, "agent.log")?).stderr(log);
        self.agent = Some(c.spawn().context(Kind::Other, "cannot start the agent")?);
        let begun = Instant::now();
        self.until("a first full of every tenant", 180, |d| {
            let list = d.coffer_json(&["list"])?;
            let ready = list["tenants"].as_array().is_some_and(|t| {
                t.iter().filter(|t| t["window"].as_array().is_some_and(|w| !w.is_empty())).count() >= SCALE as usize
            });
            Ok(ready)
        })?;
        say(format_args!(
            "  coffer run: a full of each tenant taken in one pass over each table, {:.1} s",
            begun.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    /// One pgbench over all tenants, one that leaves tenant 3 alone; the latter runs to the very end.
    fn start_traffic(&mut self) -> Result<()> {
        let per_tenant = 100_000;
        let (from, to) = ((TENANT - 1) * per_tenant, TENANT * per_tenant);
        let (tfrom, tto) = ((TENANT - 1) * 10, TENANT * 10);
        // pgbench's own transaction; what would fall on tenant 3 falls on its neighbour instead.
        let script = format!(
            "\\set aid random(1, {max})\n\\if :aid > {from} and :aid <= {to}\n\\set aid :aid + {per_tenant}\n\\endif\n\
             \\set bid random(1, {SCALE})\n\\if :bid = {TENANT}\n\\set bid :bid + 1\n\\endif\n\
             \\set tid random(1, {tellers})\n\\if :tid > {tfrom} and :tid <= {tto}\n\\set tid :tid + 10\n\\endif\n\
             \\set delta random(-5000, 5000)\nBEGIN;\n\
             UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;\n\
             SELECT abalance FROM pgbench_accounts WHERE aid = :aid;\n\
             UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;\n\
             UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;\n\
             INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP);\n\
             END;\n",
            max = SCALE * per_tenant,
            tellers = SCALE * 10,
        );
        let path = self.dir.join("others.sql");
        std::fs::write(&path, script).context(Kind::Other, "cannot write others.sql")?;
        let script = path.display().to_string();
        for (name, extra) in [("everybody", vec![]), ("the others", vec!["-f", script.as_str()])] {
            let log =
                std::fs::File::create(self.traffic_log(name)).context(Kind::Other, "cannot write pgbench's log")?;
            let mut c = self.client("pgbench");
            // A steady rate: the point is that nobody is disturbed, not how much this machine can do.
            c.args(["-n", "-c", "4", "-j", "1", "-T", "900", "-R", "200"]).args(extra);
            c.stdin(Stdio::null()).stdout(log.try_clone().context(Kind::Other, "pgbench's log")?).stderr(log);
            self.traffic.push((name, c.spawn().context(Kind::Other, "cannot start pgbench")?));
        }
        Ok(())
    }

    fn traffic_log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("pgbench-{}.log", name.replace(' ', "-")))
    }

    /// Ends one pgbench; an error if it had ended before, as it does when a client fails.
    fn stop_traffic(&mut self, name: &'static str) -> Result<Traffic> {
        let at = self.traffic.iter().position(|(n, _)| *n == name).ok_or_else(|| Error::other("no such traffic"))?;
        let (_, mut child) = self.traffic.remove(at);
        let ended = child.try_wait().context(Kind::Other, "pgbench")?;
        let log = || std::fs::read_to_string(self.traffic_log(name)).unwrap_or_default();
        if let Some(status) = ended {
            return Err(Error::other(format!("pgbench ({name}) ended by itself, {status}: {}", log())));
        }
        // pgbench has no graceful stop; that all its clients still ran, and what is committed, are the evidence.
        child.kill().and_then(|()| child.wait()).context(Kind::Other, "cannot stop pgbench")?;
        let failed = log().lines().filter(|l| l.contains("ERROR") || l.contains("aborted")).count();
        let processed = self.psql("SELECT count(*) FROM pgbench_history")?.parse().unwrap_or(0);
        Ok(Traffic { processed, failed })
    }

    /// In one transaction: holds commits back, copies tenant 3 aside, names the restore point.
    fn take_truth(&self) -> Result<()> {
        self.psql("CREATE SCHEMA truth")?;
        let mut sql = String::from(
            "BEGIN; LOCK TABLE pgbench_accounts, pgbench_tellers, pgbench_branches, pgbench_history IN EXCLUSIVE MODE;\n",
        );
        for t in TABLES {
            // Unlogged: it is the demo's own evidence, not a table to back up.
            sql.push_str(&format!(
                "CREATE UNLOGGED TABLE truth.{t} AS SELECT * FROM pgbench_{t} WHERE bid = {TENANT};\n"
            ));
        }
        sql.push_str("SELECT coffer.restore_point('before_the_disaster'); COMMIT;");
        self.psql(&sql).map(drop)
    }

    fn disaster(&self) -> Result<u64> {
        let mut lost = 0;
        for t in ["accounts", "tellers", "history"] {
            let n = self.psql(&format!(
                "WITH gone AS (DELETE FROM pgbench_{t} WHERE bid = {TENANT} RETURNING 1) SELECT count(*) FROM gone"
            ))?;
            lost += n.parse::<u64>().unwrap_or(0);
        }
        Ok(lost)
    }

    fn restore(&self) -> Result<Restored> {
        let tenant = TENANT.to_string();
        let mut args = vec!["restore", "--tenant", &tenant, "--to", "name:before_the_disaster", "--mode", "in-place"];
        args.push("--confirm");
        say(format_args!("  coffer {}", args.join(" ")));
        args.extend(["--wait", "60s"]);
        let begun = Instant::now();
        let doc = self.coffer_json(&args)?;
        let seconds = begun.elapsed().as_secs_f64();
        let mut rows = 0;
        for t in doc["tables"].as_array().map(Vec::as_slice).unwrap_or_default() {
            say(format_args!(
                "    {}: {} inserted, {} updated, {} deleted, {} unchanged",
                t["relation"].as_str().unwrap_or("?"),
                t["inserted"],
                t["updated"],
                t["deleted"],
                t["unchanged"]
            ));
            rows += ["inserted", "updated", "deleted"].iter().filter_map(|k| t[*k].as_u64()).sum::<u64>();
        }
        Ok(Restored { rows, seconds })
    }

    fn prove_tenant(&self) -> Result<()> {
        for t in TABLES {
            let n = self.psql(&format!(
                "SELECT (SELECT count(*) FROM (SELECT * FROM pgbench_{t} WHERE bid = {TENANT} EXCEPT ALL \
                 SELECT * FROM truth.{t}) a) + (SELECT count(*) FROM (SELECT * FROM truth.{t} EXCEPT ALL \
                 SELECT * FROM pgbench_{t} WHERE bid = {TENANT}) b) || ' of ' || (SELECT count(*) FROM truth.{t})"
            ))?;
            prove(
                &format!("pgbench_{t} of tenant {TENANT} equals, row for row, the restore point"),
                n.starts_with("0 of "),
                format_args!("{n} rows differ"),
            )?;
        }
        let sums = self.psql(&format!(
            "SELECT bbalance || ' = ' || (SELECT sum(delta) FROM pgbench_history WHERE bid = {TENANT}) \
             FROM pgbench_branches WHERE bid = {TENANT}"
        ))?;
        let equal = sums.split_once(" = ").is_some_and(|(a, b)| a == b);
        prove(&format!("tenant {TENANT}'s balance is the sum of its history"), equal, sums)
    }

    fn prove_others(&self, restore: &Restored) -> Result<()> {
        // All accounts of tenant 3 were written by the restore's transaction, so its id is their xmin.
        let xids =
            self.psql(&format!("SELECT count(DISTINCT xmin::text) FROM pgbench_accounts WHERE bid = {TENANT}"))?;
        let detail = format!("{} rows, {xids} transaction", restore.rows);
        prove("one transaction wrote the restore", xids == "1", detail)?;
        let count =
            |t: &str| format!("(SELECT count(*) FROM pgbench_{t} t, x WHERE bid <> {TENANT} AND t.xmin::text = x)");
        let touched = self.psql(&format!(
            "WITH x AS (SELECT xmin::text AS x FROM pgbench_accounts WHERE bid = {TENANT} LIMIT 1) SELECT {}",
            TABLES.map(count).join(" + ")
        ))?;
        prove("the restore wrote no row of another tenant", touched == "0", format_args!("{touched} rows"))?;
        let whole = self.psql(&format!(
            "SELECT count(*) FROM pgbench_branches b WHERE bid <> {TENANT} \
             AND (SELECT count(*) FROM pgbench_accounts a WHERE a.bid = b.bid) = 100000 \
             AND (SELECT count(*) FROM pgbench_tellers t WHERE t.bid = b.bid) = 10 \
             AND bbalance = (SELECT coalesce(sum(delta), 0) FROM pgbench_history h WHERE h.bid = b.bid)"
        ))?;
        prove(
            "the other tenants are whole: accounts, tellers, balance equal to history",
            whole == (SCALE - 1).to_string(),
            format_args!("{whole} of {} tenants", SCALE - 1),
        )
    }

    /// Lets time pass while reading the RPO.
    fn watch(&mut self, rpo: &mut Rpo, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.check_agent()?;
            if let Ok(doc) = self.coffer_json(&["status"])
                && let Some(s) = doc["sources"][0]["rpo_s"].as_f64()
            {
                rpo.readings += 1;
                rpo.worst = rpo.worst.max(s);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    }

    fn check_agent(&mut self) -> Result<()> {
        let Some(agent) = &mut self.agent else { return Ok(()) };
        if let Some(status) = agent.try_wait().context(Kind::Other, "the agent")? {
            let log = std::fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(15).collect();
            self.agent = None;
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            return Err(Error::other(format!("the agent ended, {status}:\n{}", tail.join("\n"))));
        }
        Ok(())
    }

    fn until(&mut self, what: &str, seconds: u64, done: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(seconds);
        loop {
            self.check_agent()?;
            if done(self)? {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(Error::other(format!("waited {seconds} s in vain for {what}; see {}", self.dir.display())));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn leave_running(&mut self) {
        step("Left running");
        say(format_args!("  psql -h 127.0.0.1 -p {} -U postgres {DATABASE}", self.port));
        say(format_args!("  coffer --config {} list", self.config().display()));
        say(format_args!("  repository:  {}", self.dir.join("repository").display()));
        say(format_args!("  status page: http://127.0.0.1:{}/", self.status_port));
        say(format_args!(
            "  to end it:   kill {}; {}{} -D {} stop; rm -r {}",
            self.agent.as_ref().map_or(0, Child::id),
            if is_root() { "runuser -u postgres -- " } else { "" },
            self.args.pg_bin.join("pg_ctl").display(),
            self.dir.join("data").display(),
            self.dir.display()
        ));
    }

    fn tear_down(&mut self, failed: bool) {
        for (_, mut c) in self.traffic.drain(..) {
            let _ = c.kill();
            let _ = c.wait();
        }
        if let Some(mut a) = self.agent.take() {
            let _ = a.kill();
            let _ = a.wait();
        }
        if self.server_up {
            let mut c = self.server("pg_ctl");
            c.arg("-D").arg(self.dir.join("data")).args(["-m", "immediate", "-w", "stop"]);
            let _ = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        if failed {
            eprintln!("kept to look at: {} (server.log, agent.log, repository)", self.dir.display());
        } else if let Err(e) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("could not remove {}: {e}", self.dir.display());
        } else {
            say("\nRun `make demo DEMO_ARGS=--keep` to leave it all running and look around.");
        }
    }
}

fn folder_size(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => folder_size(&e.path()),
            Ok(m) => m.len(),
            Err(_) => 0,
        })
        .sum()
}
