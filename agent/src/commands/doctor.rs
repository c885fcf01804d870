//! `coffer doctor`: every precondition, what was found, and what to do about it.

use crate::clock::SystemClock;
use crate::config::{Config, SourceConfig};
use crate::dial;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::keyring::Keyring;
use crate::replication::client::ReplicationClient;
use crate::repository::{Access, Directory, Repository, connect, probe};
use crate::sql::{self, SqlContext};
use serde::Serialize;
use std::sync::Arc;

/// One precondition.
#[derive(Debug, Serialize)]
struct Check {
    /// The source that it is about; empty for the repository and the agent.
    source: String,
    check_name: String,
    ok: bool,
    found: String,
    /// What to do; with `ok`, a warning.
    fix: Option<String>,
}

/// All of them, in the order in which they were looked at.
#[derive(Default)]
struct Checks(Vec<Check>);

impl Checks {
    fn add(&mut self, source: &str, name: impl Into<String>, ok: bool, found: impl Into<String>, fix: Option<String>) {
        self.0.push(Check { source: source.to_owned(), check_name: name.into(), ok, found: found.into(), fix });
    }

    /// What the step gave, or its error as a failed check.
    fn step<T>(&mut self, source: &str, name: impl Into<String>, found: &str, r: Result<T>) -> Option<T> {
        match r {
            Ok(v) => {
                self.add(source, name, true, found, None);
                Some(v)
            }
            Err(e) => {
                let fix = e.to_json()["error"]["hint"].as_str().map(str::to_owned);
                self.add(source, name, false, e.to_string(), fix);
                None
            }
        }
    }
}

/// Prints the checks; whether all of them passed.
pub async fn run(config: &Config, source: Option<&str>, json: bool) -> Result<bool> {
    dial::install_crypto_provider();
    let mut checks = Checks::default();
    repository(config, &mut checks).await;
    match source {
        Some(_) => {
            let (name, c) = config.pick_source(source)?;
            one_source(name, c, &mut checks).await;
        }
        None => {
            for (name, c) in &config.source {
                one_source(name, c, &mut checks).await;
            }
        }
    }
    let ok = checks.0.iter().all(|c| c.ok);
    if json {
        let document = serde_json::json!({"version": 1, "ok": ok, "checks": checks.0});
        println!("{}", serde_json::to_string(&document).context(Kind::Other, "cannot encode the checks")?);
        return Ok(ok);
    }
    for c in &checks.0 {
        let scope = if c.source.is_empty() { String::new() } else { format!("{}: ", c.source) };
        let word = match (c.ok, &c.fix) {
            (true, None) => "ok  ",
            (true, Some(_)) => "warn",
            (false, _) => "FAIL",
        };
        println!("{word} {scope}{}: {}", c.check_name, c.found);
        if let Some(fix) = &c.fix {
            println!("       {}", fix.replace('\n', "\n       "));
        }
    }
    Ok(ok)
}

async fn repository(config: &Config, checks: &mut Checks) {
    let clock = Arc::new(SystemClock);
    if config.source.is_empty() {
        checks.add(
            "",
            "configuration",
            false,
            "no [source.NAME] section",
            Some("add [source.NAME] with url".to_owned()),
        );
    }
    let mut reachable = true;
    for s in &config.store {
        let tried = match connect(&s.name, &s.url, s.required, Directory::MustExist) {
            Ok(store) => probe(&store).await,
            Err(e) => Err(e),
        };
        let found = format!("{}, does what is asked of it", if s.required { "required" } else { "optional" });
        reachable &= checks.step("", format!("store {}", s.name), &found, tried).is_some() || !s.required;
    }
    let keyring = checks.step(
        "",
        "keyring",
        &format!("opens at {}", config.keys.keyring.join(", ")),
        Keyring::open(&config.keys, clock.clone()).await,
    );
    checks.add(
        "",
        "keyring places",
        config.keys.keyring.len() > 1,
        format!("{}", config.keys.keyring.len()),
        Some(
            "a keyring in a single place is lost with it, and every backup too: name a second in [keys] keyring".into(),
        ),
    );
    if let (Some(k), true) = (keyring, reachable) {
        let opened = Repository::open(config, k, clock, Access::Read).await;
        checks.step("", "repository", "opens under the keyring's key", opened);
    }
    let dir = &config.spool.dir;
    let made = std::fs::create_dir_all(dir).and_then(|()| tempfile_in(dir));
    checks.step(
        "",
        "spool",
        &format!("{} can be written", dir.display()),
        made.context(Kind::Other, format_args!("cannot write to {}", dir.display()))
            .map_err(|e| e.hint("[spool] dir must be a directory that the agent can write to")),
    );
}

/// Writes and removes a file.
fn tempfile_in(dir: &std::path::Path) -> std::io::Result<()> {
    let path = dir.join(format!("{}.probe", uuid::Uuid::new_v4().simple()));
    std::fs::write(&path, b"probe")?;
    std::fs::remove_file(&path)
}

async fn one_source(name: &str, config: &SourceConfig, checks: &mut Checks) {
    let Some(dsn) = checks.step(name, "url", "is understood", Dsn::parse(&config.url)) else { return };
    let Some(client) = checks.step(name, "connection", &dsn.to_string(), sql::connect(&dsn).await) else { return };
    let replication = match ReplicationClient::connect(&dsn).await {
        Ok(mut c) => c.identify().await,
        Err(e) => {
            Err(e.hint("pg_hba.conf must let the agent's role in for its database, and the role needs REPLICATION"))
        }
    };
    checks.step(name, "replication", "is allowed", replication);
    let rows = client.query("SELECT check_name, ok, found, fix FROM coffer.doctor()", &[]).await;
    match rows.sql("cannot ask coffer.doctor()") {
        Ok(rows) => {
            for r in rows {
                let text = |i: usize| r.try_get::<_, Option<String>>(i).ok().flatten();
                let ok = r.try_get::<_, Option<bool>>(1).ok().flatten().unwrap_or(false);
                checks.add(name, text(0).unwrap_or_default(), ok, text(2).unwrap_or_default(), text(3));
            }
        }
        Err(e) => {
            let e: Error = e.hint("CREATE EXTENSION pg_coffer; then SELECT coffer.setup_agent('role')");
            checks.step::<()>(name, "extension", "", Err(e));
        }
    }
}
