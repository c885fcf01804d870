//! The source's definitions as `pg_dump -Fc --schema-only` writes them.
//!
//! Descriptors in the stream are the truth for columns; a dump adds what no row needs and a fresh database does:
//! indexes, constraints, functions, triggers, grants. `pg_dump` has to be as new as the server, so all that are
//! installed are looked at and the oldest that is new enough is taken. It connects as the agent does; the password
//! travels in its environment, never in its arguments, which other users of the machine can read.

use crate::dsn::{Dsn, RootCerts, SessionTarget, SslMode};
use crate::error::{Context, Error, Kind, Result};
use crate::sql;
use secrecy::ExposeSecret;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Names a `pg_dump` to use before any other.
pub const PG_DUMP_VARIABLE: &str = "COFFER_PG_DUMP";
/// How long `pg_dump` waits for a table's lock; a migration is not to queue behind it for longer.
const LOCK_WAIT: &str = "--lock-wait-timeout=10000";

/// Writes the dump to `out`. Blocking. `server_version`: `server_version_num`; `encoding`: the database's, which the role's
/// settings may not be. Returns the dump's length in bytes.
pub fn dump_schema(dsn: &Dsn, server_version: u32, encoding: &str, out: &mut dyn Write) -> Result<u64> {
    let program = find_pg_dump(server_version / 10_000)?;
    let mut command = Command::new(&program);
    command.args(["--format=custom", "--schema-only", "--no-password", LOCK_WAIT]);
    command.arg(format!("--encoding={encoding}"));
    connection_environment(&mut command, dsn)?;
    // No variable of the environment says this. It sends no more than statements.
    command.arg(format!("--dbname={}", keepalives(&dsn.sending_little())));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(Kind::Other, format_args!("cannot start {}", program.display()))?;
    let mut errors = child.stderr.take().expect("stderr is piped");
    let complaints = std::thread::spawn(move || {
        let mut text = String::new();
        // What could be read is worth showing even when the rest could not.
        let _ = errors.read_to_string(&mut text);
        text
    });
    let mut stdout = child.stdout.take().expect("stdout is piped");
    let copied = std::io::copy(&mut stdout, out);
    drop(stdout);
    let status = child.wait().context(Kind::Other, "cannot wait for pg_dump")?;
    let complaints = complaints.join().unwrap_or_default();
    let bytes = copied.context(Kind::Other, "cannot store the schema dump")?;
    if !status.success() {
        return Err(Error::other(format!("{} failed ({status}): {}", program.display(), complaints.trim())));
    }
    if !complaints.trim().is_empty() {
        tracing::warn!("pg_dump: {}", complaints.trim());
    }
    Ok(bytes)
}

/// The oldest installed `pg_dump` whose major version is at least the server's.
pub fn find_pg_dump(server_major: u32) -> Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    if let Some(p) = std::env::var_os(PG_DUMP_VARIABLE).map(PathBuf::from) {
        let major = major_of(&p)
            .ok_or_else(|| Error::usage(format!("{PG_DUMP_VARIABLE}={} is not a pg_dump that runs", p.display())))?;
        if major >= server_major {
            return Ok(p);
        }
        found.push((major, p));
    }
    for p in candidates() {
        match major_of(&p) {
            // No other is older and new enough.
            Some(major) if major == server_major => return Ok(p),
            Some(major) => found.push((major, p)),
            None => {}
        }
    }
    choose(&found, server_major).cloned().ok_or_else(|| {
        let have = found.iter().map(|(v, p)| format!("{} ({v})", p.display())).collect::<Vec<_>>().join(", ");
        Error::other(format!(
            "no pg_dump of version {server_major} or newer; found: {}",
            if have.is_empty() { "none".to_owned() } else { have }
        ))
        .code("pg_dump_missing")
        .hint(format!(
            "install postgresql-client-{server_major} on the agent's machine, or name one in {PG_DUMP_VARIABLE}"
        ))
    })
}

fn choose(found: &[(u32, PathBuf)], server_major: u32) -> Option<&PathBuf> {
    found.iter().filter(|(v, _)| *v >= server_major).min_by_key(|(v, _)| *v).map(|(_, p)| p)
}

/// Every `pg_dump` that can be found.
pub(crate) fn candidates() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> =
        std::env::var_os("PATH").map(|p| std::env::split_paths(&p).collect()).unwrap_or_default();
    if let Ok(o) = Command::new("pg_config").arg("--bindir").output() {
        dirs.push(PathBuf::from(String::from_utf8_lossy(&o.stdout).trim()));
    }
    // Where Debian and the PGDG packages for Red Hat keep versions side by side.
    for (parent, prefix) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")] {
        let Ok(entries) = std::fs::read_dir(parent) else { continue };
        dirs.extend(
            entries
                .flatten()
                .filter(|e| e.file_name().to_string_lossy().starts_with(prefix))
                .map(|e| e.path().join("bin")),
        );
    }
    let mut out: Vec<PathBuf> = dirs.into_iter().map(|d| d.join("pg_dump")).filter(|p| p.is_file()).collect();
    out.dedup();
    out
}

/// The major version of a program of PostgreSQL's.
pub(crate) fn major_of(program: &Path) -> Option<u32> {
    let o = Command::new(program).arg("--version").stderr(Stdio::null()).output().ok()?;
    parse_major(&String::from_utf8_lossy(&o.stdout))
}

/// `pg_dump (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)` → 15; `18beta1` → 18.
fn parse_major(version: &str) -> Option<u32> {
    let number = version.split_once(") ")?.1;
    let end = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
    number[..end].parse().ok()
}

/// The same connection for a libpq program. Variables of this process's environment are already in the DSN.
pub fn connection_environment(command: &mut Command, dsn: &Dsn) -> Result<()> {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    let list = |f: &dyn Fn(&crate::dsn::Host) -> String| dsn.hosts.iter().map(f).collect::<Vec<_>>().join(",");
    command.env("PGHOST", list(&|h| h.name.clone())).env("PGPORT", list(&|h| h.port.to_string()));
    if dsn.hosts.iter().any(|h| h.addr.is_some()) {
        command.env("PGHOSTADDR", list(&|h| h.addr.map(|a| a.to_string()).unwrap_or_default()));
    }
    command.env("PGUSER", &dsn.user).env("PGDATABASE", &dsn.dbname).env("PGAPPNAME", &dsn.application_name);
    command.env(
        "PGSSLMODE",
        match dsn.sslmode {
            SslMode::Disable => "disable",
            SslMode::Allow => "allow",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        },
    );
    match &dsn.roots {
        RootCerts::File(f) => {
            command.env("PGSSLROOTCERT", f);
        }
        RootCerts::System => {
            command.env("PGSSLROOTCERT", "system");
        }
        RootCerts::None => {}
    }
    for (name, file) in [("PGSSLCERT", &dsn.sslcert), ("PGSSLKEY", &dsn.sslkey)] {
        if let Some(f) = file {
            command.env(name, f);
        }
    }
    if dsn.target == SessionTarget::Primary {
        // `read-write` is what every libpq knows; `primary` came with 14.
        command.env("PGTARGETSESSIONATTRS", "read-write");
    }
    if let Some(t) = dsn.connect_timeout {
        command.env("PGCONNECT_TIMEOUT", t.as_secs().max(1).to_string());
    }
    command.env("PGOPTIONS", sql::startup_options(dsn));
    for h in &dsn.hosts {
        if let Some(p) = dsn.password_for(h)? {
            command.env("PGPASSWORD", p.expose_secret());
            break;
        }
    }
    Ok(())
}

/// Keywords for libpq.
fn keepalives(dsn: &Dsn) -> String {
    let k = &dsn.keepalive;
    let seconds = |t: Option<std::time::Duration>| t.map_or(0, |t| t.as_secs());
    format!(
        "keepalives={} keepalives_idle={} keepalives_interval={} keepalives_count={} tcp_user_timeout={}",
        u8::from(k.is_on),
        seconds(k.idle),
        seconds(k.interval),
        k.count.unwrap_or(0),
        dsn.user_timeout().map_or(0, |t| t.as_millis())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_pg_dump_prints_them() {
        assert_eq!(parse_major("pg_dump (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_major("pg_dump (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(parse_major("something else"), None);
    }

    #[test]
    fn the_oldest_that_is_new_enough_is_taken() {
        let found = [(18, "b".into()), (15, "a".into()), (16, "c".into())];
        assert_eq!(choose(&found, 15), Some(&PathBuf::from("a")));
        assert_eq!(choose(&found, 17), Some(&PathBuf::from("b")));
        assert_eq!(choose(&found, 19), None);
    }

    #[test]
    fn the_password_is_in_the_environment_only() {
        let dsn = Dsn::parse("postgres://u:hunter2@h1:1,h2:2/db?sslmode=require").unwrap();
        let mut c = Command::new("pg_dump");
        connection_environment(&mut c, &dsn).unwrap();
        assert!(c.get_args().next().is_none());
        let get = |n: &str| {
            c.get_envs().find(|(k, _)| *k == n).and_then(|(_, v)| v).map(|v| v.to_string_lossy().into_owned())
        };
        assert_eq!(get("PGPASSWORD").as_deref(), Some("hunter2"));
        assert_eq!(get("PGHOST").as_deref(), Some("h1,h2"));
        assert_eq!(get("PGPORT").as_deref(), Some("1,2"));
        assert_eq!(get("PGSSLMODE").as_deref(), Some("require"));
    }
}
