//! A server for restore drills: the one that the configuration names, or a private cluster where PostgreSQL's server
//! programs are at hand.
//!
//! The private cluster lives in a folder of the spool that nobody else can enter, answers on a socket in it alone, and
//! is gone with its folder when it is dropped; one that a killed agent left is stopped and removed by the next.

use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::schema_dump;
use crate::sql::{self, SqlContext};
use coffer_wire::quote_ident;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use uuid::Uuid;

/// What a private cluster's folder begins with; the process that made it follows.
const FOLDER: &str = "drill-";
/// What a drill's database begins with; the source, the time and something random follow.
const DATABASE: &str = "coffer_drill_";
/// A database of a drill that is older is left over, in seconds.
const LEFT_OVER: i64 = 86_400;
/// A scratch that may be lost: nothing is flushed for it.
const SETTINGS: &str = "listen_addresses = ''\nport = 5432\nfsync = off\nfull_page_writes = off\nsynchronous_commit = off\n\
    autovacuum = off\nwal_level = minimal\nmax_wal_senders = 0\nshared_buffers = 64MB\nmax_wal_size = 1GB\n";

/// Where drills are done.
pub struct DrillServer {
    /// Of any database there.
    dsn: Dsn,
    _private: Option<Cluster>,
}

impl DrillServer {
    /// The server that `url` names, or a private one whose folder is in `spool`.
    ///
    /// # Errors
    /// Code `no_server`: neither is there.
    pub async fn start(url: Option<&str>, spool: &Path) -> Result<Self> {
        if let Some(url) = url {
            let dsn = Dsn::parse(url).map_err(|e| e.during("[verify] drill_url"))?;
            return Ok(Self { dsn, _private: None });
        }
        let spool = spool.to_owned();
        let cluster = tokio::task::spawn_blocking(move || Cluster::start(&spool))
            .await
            .context(Kind::Other, "a worker thread broke off")??;
        let dir = cluster.dir.display().to_string().replace('\'', "\\'");
        let dsn = Dsn::parse(&format!("host='{dir}' port=5432 user=postgres dbname=postgres"))?;
        Ok(Self { dsn, _private: Some(cluster) })
    }

    /// A database that is not there yet.
    pub fn fresh(&self, source: Uuid, now_us: i64) -> Dsn {
        let random = crate::crypto::random::uuid().simple().to_string();
        let name = format!("{}{:x}_{}", prefix(source), now_us / 1_000_000, &random[..8]);
        self.dsn.with_dbname(&name)
    }

    /// Drops what drills of this source left that were killed.
    pub async fn sweep(&self, source: Uuid, now_us: i64) -> Result<()> {
        let client = sql::connect(&self.dsn.with_dbname("postgres")).await?;
        let rows = client
            .query(
                "SELECT datname::text FROM pg_catalog.pg_database WHERE pg_catalog.starts_with(datname, $1)",
                &[&prefix(source)],
            )
            .await
            .sql("cannot list databases")?;
        for name in rows.iter().map(|r| r.get::<_, &str>(0)).filter(|n| is_left_over(n, source, now_us)) {
            let drop = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quote_ident(name));
            client.batch_execute(&drop).await.sql(format!("cannot drop the database {name}"))?;
        }
        Ok(())
    }
}

fn prefix(source: Uuid) -> String {
    format!("{DATABASE}{}_", &source.simple().to_string()[..8])
}

fn is_left_over(name: &str, source: Uuid, now_us: i64) -> bool {
    let made = name.strip_prefix(&prefix(source)).and_then(|r| i64::from_str_radix(r.split('_').next()?, 16).ok());
    made.is_some_and(|s| s < now_us / 1_000_000 - LEFT_OVER)
}

struct Cluster {
    bin: PathBuf,
    dir: PathBuf,
}

impl Cluster {
    /// Blocking.
    fn start(spool: &Path) -> Result<Self> {
        let bin = programs()?;
        std::fs::create_dir_all(spool).context(Kind::Other, format_args!("cannot make {}", spool.display()))?;
        sweep_folders(&bin, spool);
        let random = crate::crypto::random::uuid().simple().to_string();
        let dir = spool.join(format!("{FOLDER}{}-{}", std::process::id(), &random[..8]));
        {
            use std::os::unix::fs::DirBuilderExt;
            let made = std::fs::DirBuilder::new().mode(0o700).create(&dir);
            made.context(Kind::Other, format_args!("cannot make {}", dir.display()))?;
        }
        // From here on its drop cleans up.
        let this = Self { bin, dir };
        if is_root() {
            let mut c = Command::new("chown");
            c.arg("postgres").arg(&this.dir);
            run(c)?;
        }
        let data = this.dir.join("data");
        let mut c = this.program("initdb");
        c.args(["-U", "postgres", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8", "-D"]).arg(&data);
        run(c)?;
        let path = data.join("postgresql.conf");
        let mut conf = std::fs::read_to_string(&path).context(Kind::Other, "initdb wrote no configuration")?;
        let socket = this.dir.display().to_string().replace('\'', "''");
        conf.push_str(&format!("\n{SETTINGS}unix_socket_directories = '{socket}'\n"));
        std::fs::write(&path, conf).context(Kind::Other, format_args!("cannot write {}", path.display()))?;
        let mut c = this.program("pg_ctl");
        c.arg("-D").arg(&data).arg("-l").arg(this.dir.join("log")).args(["-w", "start"]);
        // Its output is not read: the server would inherit the pipe and keep it open.
        let up = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !up.is_ok_and(|s| s.success()) {
            let log = std::fs::read_to_string(this.dir.join("log")).unwrap_or_default();
            let last = log.lines().rev().take(3).collect::<Vec<_>>().join(" | ");
            return Err(Error::other(format!("the private server for drills did not start: {last}")));
        }
        Ok(this)
    }

    fn program(&self, name: &str) -> Command {
        as_server(&self.bin.join(name))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        stop(&self.bin, &self.dir);
    }
}

/// Stops what runs in a folder, if anything does, and removes it.
fn stop(bin: &Path, dir: &Path) {
    let mut c = as_server(&bin.join("pg_ctl"));
    c.arg("-D").arg(dir.join("data")).args(["-m", "immediate", "-w", "stop"]);
    let _ = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if let Err(e) = std::fs::remove_dir_all(dir) {
        tracing::warn!("the folder of a drill is left behind: {}: {e}", dir.display());
    }
}

/// Removes what processes left that are no more.
fn sweep_folders(bin: &Path, spool: &Path) {
    let Ok(entries) = std::fs::read_dir(spool) else { return };
    for e in entries.flatten() {
        let name = e.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(FOLDER).and_then(|r| r.split('-').next()?.parse::<u32>().ok()) else {
            continue;
        };
        if !Path::new("/proc").join(pid.to_string()).exists() {
            stop(bin, &e.path());
        }
    }
}

/// The folder with the newest server programs.
fn programs() -> Result<PathBuf> {
    let with_server = |dump: &PathBuf| {
        let bin = dump.parent()?.to_owned();
        let all = ["initdb", "pg_ctl", "postgres"].iter().all(|p| bin.join(p).is_file());
        if all { Some((schema_dump::major_of(dump)?, bin)) } else { None }
    };
    let found = schema_dump::candidates().iter().filter_map(with_server).max_by_key(|(major, _)| *major);
    found.map(|(_, bin)| bin).ok_or_else(|| {
        Error::new(
            Kind::Refused,
            "there is no server for a drill: no [verify] drill_url, and no PostgreSQL server programs",
        )
        .code("no_server")
        .hint("name a server in [verify] drill_url whose role may create databases, or install PostgreSQL's server")
    })
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

/// A server-side program, as a user that may run servers.
fn as_server(program: &Path) -> Command {
    if is_root() {
        let mut c = Command::new("runuser");
        c.args(["-u", "postgres", "--"]).arg(program).current_dir("/");
        return c;
    }
    Command::new(program)
}

fn run(mut c: Command) -> Result<()> {
    let out =
        c.stdin(Stdio::null()).output().context(Kind::Other, format_args!("cannot start {:?}", c.get_program()))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(Error::other(format!("{:?} failed ({}): {}", c.get_program(), out.status, said.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_drill_left_is_known_by_its_name() {
        let (ours, other) = (Uuid::from_u128(7 << 100), Uuid::from_u128(9 << 100));
        let now_us = 2_000_000_000_000_000;
        let server = DrillServer { dsn: Dsn::parse("host=/tmp user=x dbname=postgres").unwrap(), _private: None };
        let name = server.fresh(ours, now_us).dbname.clone();
        assert!(!is_left_over(&name, ours, now_us) && !is_left_over(&name, ours, now_us + 3_600_000_000), "{name}");
        assert!(is_left_over(&name, ours, now_us + 90_000_000_000), "{name}");
        assert!(!is_left_over(&name, other, now_us + 90_000_000_000));
        assert!(!is_left_over("coffer_drill_mine", ours, now_us + 90_000_000_000));
    }
}
