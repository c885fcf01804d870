//! A private PostgreSQL cluster with the extension at hand, in a folder of its own, gone when dropped.

use crate::{env_path, free_port};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub struct Cluster {
    pub major: u32,
    pub port: u16,
    bin: PathBuf,
    dir: PathBuf,
}

fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// A command as the user that may run a server: postgres when we are root.
pub fn as_postgres(program: &Path) -> Command {
    if is_root() {
        let mut c = Command::new("runuser");
        c.args(["-u", "postgres", "--"]).arg(program);
        c.current_dir("/");
        c
    } else {
        Command::new(program)
    }
}

fn run(mut c: Command) -> String {
    let out = c.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("cannot start {c:?}: {e}"));
    assert!(
        out.status.success(),
        "{c:?} failed: {}\n{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

impl Cluster {
    /// A new running cluster; user postgres, trust on the loopback.
    pub fn start(major: u32) -> Self {
        Self::start_with(major, "", &[])
    }

    /// The same with more lines in postgresql.conf and more arguments for initdb.
    pub fn start_with(major: u32, conf: &str, initdb: &[&str]) -> Self {
        let this = Self::in_a_folder(major);
        let mut c = as_postgres(&this.bin.join("initdb"));
        c.args(["-U", "postgres", "-A", "trust", "--no-sync", "-D"]).arg(this.data());
        if initdb.is_empty() {
            c.args(["--locale=C", "-E", "UTF8"]);
        }
        c.args(initdb);
        run(c);
        let mut text = std::fs::read_to_string(this.data().join("postgresql.conf")).expect("initdb wrote it");
        text.push_str(&this.settings());
        text.push_str(conf);
        std::fs::write(this.data().join("postgresql.conf"), text).expect("the configuration is ours");
        this.up();
        this
    }

    fn in_a_folder(major: u32) -> Self {
        let bin = env_path(&format!("COFFER_PG{major}_BIN"));
        let dir =
            std::env::temp_dir().join(format!("coffer-test-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        std::fs::create_dir(&dir).expect("a folder for the cluster");
        if is_root() {
            run({
                let mut c = Command::new("chown");
                c.arg("postgres").arg(&dir);
                c
            });
        }
        Self { major, port: free_port(), bin, dir }
    }

    /// A running hot standby of `primary`, which streams to it; `conf` counts before what the primary has.
    pub fn standby_of(primary: &Self, conf: &str) -> Self {
        let this = Self::in_a_folder(primary.major);
        let mut c = as_postgres(&this.bin.join("pg_basebackup"));
        c.arg("-d").arg(format!("host=127.0.0.1 port={} user=postgres dbname=postgres", primary.port));
        c.args(["-X", "stream", "-c", "fast", "--no-sync", "-R", "-D"]).arg(this.data());
        run(c);
        this.configure(&format!("port = {}\nunix_socket_directories = '{}'\n{conf}", this.port, this.dir.display()));
        this.up();
        this
    }

    /// What `pg_upgrade` makes of `old`, which is stopped for good: a cluster of the same version.
    pub fn upgrade_of(old: &Self) -> Self {
        let this = Self::start(old.major);
        this.stop("fast");
        old.stop("fast");
        let mut c = as_postgres(&this.bin.join("pg_upgrade"));
        c.arg("-b").arg(&old.bin).arg("-B").arg(&this.bin).arg("-d").arg(old.data()).arg("-D").arg(this.data());
        c.args(["-U", "postgres", "--no-sync", "-p", &old.port.to_string(), "-P", &this.port.to_string()]);
        // It writes where it stands.
        c.current_dir(&this.dir);
        run(c);
        this.up();
        this
    }

    /// Lines behind those of postgresql.conf, for the next start.
    pub fn configure(&self, conf: &str) {
        let file = self.data().join("postgresql.conf");
        let text = std::fs::read_to_string(&file).expect("initdb wrote it");
        std::fs::write(file, format!("{text}\n{conf}\n")).expect("the configuration is ours");
    }

    /// Makes a standby the primary, on a timeline of its own.
    pub fn promote(&self) {
        assert_eq!(self.psql("postgres", "SELECT pg_promote()"), "t", "{}", self.log());
    }

    fn settings(&self) -> String {
        let lib = env_path(&format!("COFFER_PG{}_LIB", self.major));
        let found = if self.major == 15 {
            format!("extension_destdir = '{}'\n", env_path("COFFER_PG15_PACKAGE").display())
        } else {
            let share = env_path(&format!("COFFER_PG{}_SHARE", self.major));
            format!("extension_control_path = '{}:$system'\n", share.display())
        };
        // fsync off: a killed server keeps what the kernel has, which is all that these tests need.
        format!(
            "\nport = {}\nunix_socket_directories = '{}'\nlisten_addresses = '127.0.0.1'\nwal_level = logical\n\
             max_wal_senders = 10\nmax_replication_slots = 10\nmax_prepared_transactions = 20\nmax_connections = 100\n\
             fsync = off\nfull_page_writes = off\nshared_buffers = 64MB\nautovacuum_naptime = 5s\n\
             output_plugin_libraries = 'pgoutput, test_decoding, pg_coffer'\nwal_sender_timeout = 10s\n\
             dynamic_library_path = '{}:$libdir'\n{found}",
            self.port,
            self.dir.display(),
            lib.display(),
        )
    }

    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The folder of the Unix socket.
    pub fn socket_dir(&self) -> &Path {
        &self.dir
    }

    /// Starts the stopped (or killed) server and waits until it answers.
    pub fn up(&self) {
        let mut c = as_postgres(&self.bin.join("pg_ctl"));
        c.arg("-D").arg(self.data()).arg("-l").arg(self.dir.join("log")).args(["-w", "-t", "60", "start"]);
        // Not run(): the server would inherit the pipe and output() would wait for it.
        let ok = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().expect("pg_ctl starts");
        assert!(ok.success(), "the server did not start: {}", self.log());
    }

    pub fn stop(&self, mode: &str) {
        let mut c = as_postgres(&self.bin.join("pg_ctl"));
        c.arg("-D").arg(self.data()).args(["-w", "-t", "60", "-m", mode, "stop"]);
        let _ = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }

    /// kill -9 of the postmaster and all its children, as the kernel's out-of-memory killer would.
    pub fn kill9(&self) {
        let pid = std::fs::read_to_string(self.data().join("postmaster.pid")).expect("a running server");
        let pid: i32 = pid.lines().next().and_then(|l| l.trim().parse().ok()).expect("a pid");
        let children = Command::new("pgrep").args(["-P", &pid.to_string()]).output().expect("pgrep");
        // SAFETY: plain signals to processes of our own cluster.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            for child in String::from_utf8_lossy(&children.stdout).lines() {
                if let Ok(c) = child.trim().parse() {
                    libc::kill(c, libc::SIGKILL);
                }
            }
        }
        crate::wait_for("the server to be gone", 20, || {
            // SAFETY: signal 0 only asks whether the process exists.
            (unsafe { libc::kill(pid, 0) } != 0).then_some(())
        });
        let _ = std::fs::remove_file(self.data().join("postmaster.pid"));
    }

    /// Runs a server program upon the stopped cluster's folder.
    pub fn program(&self, name: &str, args: &[&str]) {
        let mut c = as_postgres(&self.bin.join(name));
        c.args(args).arg("-D").arg(self.data());
        run(c);
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// A client program of this version, connected by the environment.
    pub fn client(&self, program: &str, db: &str) -> Command {
        let mut c = Command::new(self.bin.join(program));
        c.env("PGHOST", "127.0.0.1")
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", db);
        c
    }

    /// Runs SQL by psql, which commits statement by statement; its output, unaligned, without headers.
    pub fn psql(&self, db: &str, sql: &str) -> String {
        let mut c = self.client("psql", db);
        c.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql]);
        run(c).trim_end().to_owned()
    }

    /// The same for SQL that must fail; what psql said.
    pub fn psql_err(&self, db: &str, sql: &str) -> String {
        let mut c = self.client("psql", db);
        let out = c.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql]).output().expect("psql starts");
        assert!(!out.status.success(), "this should have failed: {sql}");
        String::from_utf8_lossy(&out.stderr).into_owned()
    }

    /// A script file's worth of SQL through psql's standard input.
    pub fn script(&self, db: &str, sql: &str) -> String {
        use std::io::Write;
        let mut c = self.client("psql", db);
        c.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-"]);
        let mut child =
            c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("psql starts");
        // A psql that stops at an error reads no further; what it says is the news then.
        let _ = child.stdin.take().expect("piped").write_all(sql.as_bytes());
        let out = child.wait_with_output().expect("psql ends");
        assert!(out.status.success(), "psql: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim_end().to_owned()
    }

    /// A libpq URL.
    pub fn url(&self, user: &str, db: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{db}", self.port)
    }

    /// The same by the Unix-domain socket.
    pub fn socket_url(&self, user: &str, db: &str) -> String {
        let dir = self.dir.display().to_string().replace('/', "%2F");
        format!("postgres://{user}@{dir}:{}/{db}", self.port)
    }

    pub async fn connect(&self, db: &str) -> tokio_postgres::Client {
        let url = self.url("postgres", db);
        let (client, connection) =
            tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap_or_else(|e| panic!("connect {url}: {e}"));
        tokio::spawn(async move {
            let _ = connection.await;
        });
        client
    }

    /// A session that LISTENs; what arrives there, from now on.
    pub async fn listen(&self, db: &str, channel: &str) -> std::sync::Arc<std::sync::Mutex<Vec<String>>> {
        use futures::StreamExt;
        let url = self.url("postgres", db);
        let (client, mut connection) =
            tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap_or_else(|e| panic!("connect {url}: {e}"));
        let heard = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let to = heard.clone();
        tokio::spawn(async move {
            let mut said = futures::stream::poll_fn(move |cx| connection.poll_message(cx));
            while let Some(Ok(m)) = said.next().await {
                if let tokio_postgres::AsyncMessage::Notification(n) = m {
                    to.lock().expect("no panic").push(n.payload().to_owned());
                }
            }
        });
        client.batch_execute(&format!("LISTEN {channel}")).await.expect("LISTEN");
        // The session lives as long as its connection is polled: the test's runtime.
        std::mem::forget(client);
        heard
    }

    /// A database with the extension and an agent's role `coffer_agent` set up.
    pub fn create_protected_db(&self, db: &str) {
        self.psql("postgres", &format!("CREATE DATABASE {db}"));
        self.psql(db, "CREATE EXTENSION pg_coffer");
        self.psql(
            db,
            "DO $$BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'coffer_agent') THEN \
             CREATE ROLE coffer_agent LOGIN REPLICATION BYPASSRLS; END IF; END$$",
        );
        self.psql(db, "SELECT coffer.setup_agent('coffer_agent')");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop("immediate");
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("last lines of the server's log:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
