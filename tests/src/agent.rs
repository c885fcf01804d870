//! A real agent: its configuration, its process, its command line.

use crate::cluster::Cluster;
use crate::{env_path, free_port, wait_for};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A repository, a keyring, a KEK and the configuration that joins them; `run` processes come and go.
pub struct Agent {
    dir: PathBuf,
    pub status_port: u16,
    child: Option<Child>,
    runs: u32,
    /// Environment of the processes that are started.
    pub env: Vec<(String, String)>,
    keep: bool,
}

/// What `Agent::new` puts in the configuration.
pub struct Setup {
    pub source_url: String,
    /// `[[store]]` sections; empty: one file store `main` in the agent's folder.
    pub stores: String,
    pub ship_interval: String,
    /// More TOML.
    pub more: String,
}

impl Setup {
    pub fn of(cluster: &Cluster, db: &str) -> Self {
        Self {
            source_url: cluster.url("coffer_agent", db),
            stores: String::new(),
            ship_interval: "300ms".into(),
            more: String::new(),
        }
    }
}

impl Agent {
    /// Writes the configuration and initialises repository and keyring.
    pub fn new(setup: &Setup) -> Self {
        let this = Self::unready(setup);
        this.init();
        this
    }

    /// Writes the configuration only: stores that want credentials want `env` before [`Agent::init`].
    pub fn unready(setup: &Setup) -> Self {
        let this = Self::unconfigured();
        this.configure(setup);
        this
    }

    /// Initialises repository, keyring and KEK.
    pub fn init(&self) {
        let out = self.coffer(&["init", "--create-kek"]);
        assert!(out.status.success(), "init: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn unconfigured() -> Self {
        let dir =
            std::env::temp_dir().join(format!("coffer-agent-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        std::fs::create_dir(&dir).expect("a folder for the agent");
        Self { dir, status_port: free_port(), child: None, runs: 0, env: Vec::new(), keep: false }
    }

    /// A second agent over the same repository, keyring and configuration (another host, as it were).
    pub fn twin(&self) -> Self {
        let twin = Self::unconfigured();
        let text = std::fs::read_to_string(self.config()).expect("our configuration");
        let text = text
            .replace(&format!("127.0.0.1:{}", self.status_port), &format!("127.0.0.1:{}", twin.status_port))
            .replace(&self.dir.join("spool").display().to_string(), &twin.dir.join("spool").display().to_string());
        std::fs::write(twin.config(), text).expect("our folder");
        twin
    }

    /// (Re)writes the configuration.
    pub fn configure(&self, setup: &Setup) {
        let d = self.dir.display();
        let stores = if setup.stores.is_empty() {
            format!("[[store]]\nname = \"main\"\nurl = \"file://{d}/repository\"\n")
        } else {
            setup.stores.clone()
        };
        let text = format!(
            "[source.shop]\nurl = \"{}\"\nslot = \"coffer_shop\"\n{stores}\n[keys]\nprovider = \"file\"\npath = \"{d}/kek\"\n\
             keyring = [\"file://{d}/keyring\"]\n[ship]\ninterval = \"{}\"\n[spool]\ndir = \"{d}/spool\"\n\
             [status]\nlisten = \"127.0.0.1:{}\"\n{}\n",
            setup.source_url, setup.ship_interval, self.status_port, setup.more
        );
        std::fs::write(self.config(), text).expect("our folder");
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the default store is.
    pub fn repository(&self) -> PathBuf {
        self.dir.join("repository")
    }

    pub fn config(&self) -> PathBuf {
        self.dir.join("coffer.toml")
    }

    fn command(&self) -> Command {
        let mut c = Command::new(env_path("COFFER_BIN"));
        c.arg("--config").arg(self.config());
        // Where pg_dump and pg_restore of every major are.
        let mut path: Vec<PathBuf> =
            ["COFFER_PG15_BIN", "COFFER_PG18_BIN"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        c.env("PATH", std::env::join_paths(path).expect("no colon in a folder's name"));
        c.envs(self.env.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        c
    }

    /// Runs a verb to its end.
    pub fn coffer(&self, args: &[&str]) -> Output {
        self.command().args(args).stdin(Stdio::null()).output().expect("coffer starts")
    }

    /// Runs a verb and kills it after a while; whether it was still running.
    pub fn killed_after(&self, args: &[&str], after: std::time::Duration) -> bool {
        let mut c = self.command();
        let mut child = c
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("coffer starts");
        std::thread::sleep(after);
        let running = child.try_wait().expect("our child").is_none();
        let _ = child.kill();
        let _ = child.wait();
        running
    }

    #[expect(clippy::zombie_processes, reason = "wait4 takes the usage together with the end")]
    /// Runs a verb to its end; its peak resident memory in KiB, too, as the kernel counted it.
    pub fn coffer_peak(&self, args: &[&str]) -> (Output, u64) {
        use std::os::unix::process::ExitStatusExt;
        let log = tempfile::NamedTempFile::new().expect("a file");
        let errors = log.reopen().expect("a handle");
        let child = self.command().args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn();
        let child = child.expect("coffer starts");
        let mut status = 0;
        // SAFETY: rusage is plain data, and the child is ours and not waited for elsewhere.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            let pid = child.id() as i32;
            assert_eq!(libc::wait4(pid, &mut status, 0, &mut usage), pid, "wait4");
            usage
        };
        let stderr = std::fs::read(log.path()).expect("its log");
        let out = Output { status: std::process::ExitStatus::from_raw(status), stdout: Vec::new(), stderr };
        (out, usage.ru_maxrss as u64)
    }

    /// Runs a verb with `--json` that must end well; its document.
    pub fn json(&self, args: &[&str]) -> Value {
        let out = self.command().arg("--json").args(args).stdin(Stdio::null()).output().expect("coffer starts");
        assert!(
            out.status.success(),
            "coffer {args:?}: exit {:?}\n{}\n{}",
            out.status.code(),
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        serde_json::from_slice(&out.stdout)
            .unwrap_or_else(|e| panic!("coffer {args:?}: {e}: {}", String::from_utf8_lossy(&out.stdout)))
    }

    /// Runs a verb with `--json` that must fail; exit code and document.
    pub fn json_err(&self, args: &[&str]) -> (i32, Value) {
        let out = self.command().arg("--json").args(args).stdin(Stdio::null()).output().expect("coffer starts");
        let code = out.status.code().expect("an exit code");
        assert_ne!(code, 0, "coffer {args:?} should have failed: {}", String::from_utf8_lossy(&out.stdout));
        let doc = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
            panic!(
                "coffer {args:?}: {e}: {} {}",
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            )
        });
        (code, doc)
    }

    /// Starts `coffer run` in the background; its log goes to a file.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "the agent runs already");
        self.runs += 1;
        let log = std::fs::File::create(self.dir.join(format!("run-{}.log", self.runs))).expect("our folder");
        let mut c = self.command();
        c.arg("run").stdin(Stdio::null()).stdout(log.try_clone().expect("a handle")).stderr(log);
        self.child = Some(c.spawn().expect("coffer starts"));
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running agent").id()
    }

    /// kill -9.
    pub fn kill9(&mut self) {
        let mut child = self.child.take().expect("a running agent");
        let _ = child.kill();
        let _ = child.wait();
    }

    /// SIGTERM, then waits; the exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("a running agent");
        // A process that has not come to its own first line yet dies of any signal, and there is nothing to be seen in that.
        wait_for("the agent to listen for signals", 60, || {
            (listens_for_term(child.id()) || child.try_wait().expect("our child").is_some()).then_some(())
        });
        // SAFETY: a plain signal to our own child.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        let code = wait_for("the agent to stop", 60, || child.try_wait().expect("our child"));
        code.code()
    }

    /// Whether it has ended by itself, and how.
    pub fn ended(&mut self) -> Option<Option<i32>> {
        let status = self.child.as_mut()?.try_wait().expect("our child")?;
        self.child = None;
        Some(status.code())
    }

    /// Waits for the process to end by itself.
    pub fn wait_end(&mut self, seconds: u64) -> Option<i32> {
        wait_for("the agent to end", seconds, || self.ended())
    }

    /// The logs of all its runs.
    pub fn log(&self) -> String {
        (1..=self.runs)
            .map(|n| std::fs::read_to_string(self.dir.join(format!("run-{n}.log"))).unwrap_or_default())
            .collect::<Vec<_>>()
            .join("\n---- next run ----\n")
    }

    /// What the running agent's status server answers; empty when nobody does.
    pub fn page(&self, path: &str) -> String {
        use std::io::{Read, Write};
        let mut text = String::new();
        let Ok(mut s) = std::net::TcpStream::connect(("127.0.0.1", self.status_port)) else { return text };
        let asked = s.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes());
        if asked.and_then(|()| s.read_to_string(&mut text)).is_err() {
            text.clear();
        }
        text
    }

    /// The value of a metric of the running agent, summed over its labels; 0 when it is not there.
    pub fn metric(&self, name: &str) -> f64 {
        let of = |l: &str| {
            let rest = l.strip_prefix(name).filter(|r| r.starts_with(['{', ' ']))?;
            rest.rsplit(' ').next()?.parse::<f64>().ok()
        };
        self.page("/metrics").lines().filter_map(of).sum()
    }

    /// The standing alarms of a code, as the health check has them.
    pub fn alarms(&self, code: &str) -> Vec<Value> {
        let text = self.page("/healthz");
        let Some((_, body)) = text.split_once("\r\n\r\n") else { return Vec::new() };
        let Ok(d) = serde_json::from_str::<Value>(body) else { return Vec::new() };
        d["alarms"].as_array().into_iter().flatten().filter(|a| a["code"] == code).cloned().collect()
    }

    /// What the status document says of bases.
    pub fn bases(&self) -> Value {
        // An unhealthy agent has the same document.
        let out = self.coffer(&["--json", "status"]);
        let status: Value = serde_json::from_slice(&out.stdout).expect("the status document");
        status["sources"][0]["bases"].clone()
    }

    /// Peak resident memory of the running agent, in KiB.
    pub fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("a running agent");
        status
            .lines()
            .find_map(|l| l.strip_prefix("VmHWM:"))
            .and_then(|l| l.trim().trim_end_matches(" kB").trim().parse().ok())
            .expect("VmHWM")
    }

    /// Keep the folder when dropped (to look at after a failure).
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

/// Whether a process has a handler for SIGTERM (signal 15), as the kernel says.
fn listens_for_term(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:"));
    caught.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).is_some_and(|m| m & (1 << 14) != 0)
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut c) = self.child.take() {
            let _ = c.kill();
            let _ = c.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("last lines of the agent's log:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
            self.keep |= std::env::var_os("COFFER_TEST_KEEP").is_some();
        }
        if self.keep {
            eprintln!("kept: {}", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
