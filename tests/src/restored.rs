//! Restores and what came out of them: into files that are loaded with COPY, into fresh databases.

use crate::agent::Agent;
use crate::cluster::Cluster;
use crate::truth::{Truth, Watched};
use crate::wait_for;
use bytes::Bytes;
use futures::SinkExt;
use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};
use tokio_postgres::Client;

/// How long a restore may wait for its target to become durable.
const WAIT: &str = "120s";

/// A folder that does not exist yet, inside one that goes when dropped.
pub struct Out {
    _parent: tempfile::TempDir,
    pub dir: PathBuf,
}

impl Out {
    pub fn new() -> Self {
        let parent = tempfile::tempdir().expect("a folder");
        let dir = parent.path().join("out");
        Self { _parent: parent, dir }
    }

    /// The folder's name for a command line.
    pub fn arg(&self) -> &str {
        self.dir.to_str().expect("UTF-8")
    }

    /// The names in it; none when it does not exist.
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return Vec::new() };
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    /// What the restore says is in it.
    pub fn manifest(&self) -> Value {
        let text = std::fs::read_to_string(self.dir.join("manifest.json")).expect("manifest.json");
        serde_json::from_str(&text).expect("manifest.json is JSON")
    }
}

impl Default for Out {
    fn default() -> Self {
        Self::new()
    }
}

/// The arguments of a restore.
pub fn args<'a>(tenant: &'a str, to: &'a str, mode: &'a str, target: &'a str) -> Vec<&'a str> {
    vec!["restore", "--tenant", tenant, "--to", to, "--mode", mode, "--target", target, "--wait", WAIT, "--confirm"]
}

/// The arguments of a restore into files that does not wait: for targets that will never be there.
pub fn args_now<'a>(tenant: &'a str, to: &'a str, target: &'a str) -> Vec<&'a str> {
    vec!["restore", "--tenant", tenant, "--to", to, "--mode", "files", "--target", target, "--confirm"]
}

/// The arguments of an in-place restore.
pub fn in_place<'a>(tenant: &'a str, to: &'a str) -> Vec<&'a str> {
    vec!["restore", "--tenant", tenant, "--to", to, "--mode", "in-place", "--wait", WAIT, "--confirm"]
}

/// Restores a tenant to files, COPY text.
pub fn to_files(agent: &Agent, tenant: &str, to: &str) -> Out {
    let out = Out::new();
    agent.json(&args(tenant, to, "files", out.arg()));
    out
}

/// What DuckDB reads in a Parquet file, as CSV in a file beside it.
pub fn csv_of_parquet(file: &Path) -> PathBuf {
    const SCRIPT: &str = "import duckdb, sys\n\
        db = duckdb.connect()\n\
        db.execute(\"SET TimeZone = 'UTC'\")\n\
        db.execute(f\"COPY (FROM read_parquet('{sys.argv[1]}')) TO '{sys.argv[2]}' (FORMAT csv, HEADER)\")";
    let to = file.with_extension("read.csv");
    let done = std::process::Command::new(crate::env_path("COFFER_DUCKDB_PYTHON"))
        .args(["-c", SCRIPT])
        .args([file, to.as_path()])
        .output()
        .expect("python");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    to
}

/// A database without the extension, with the application's tables, to load files into.
pub struct Scratch<'c> {
    cluster: &'c Cluster,
    pub db: String,
    pub client: Client,
}

impl<'c> Scratch<'c> {
    pub async fn new(cluster: &'c Cluster, ddl: &str) -> Self {
        let db = format!("scratch_{:08x}", rand::random::<u32>());
        cluster.psql("postgres", &format!("CREATE DATABASE {db}"));
        cluster.script(&db, ddl);
        let client = cluster.connect(&db).await;
        Self { cluster, db, client }
    }

    /// Empties every table and loads what a restore wrote; the number of rows.
    pub async fn load(&self, out: &Out) -> u64 {
        self.client
            .batch_execute(
                "DO $$DECLARE l text; BEGIN SELECT string_agg(oid::regclass::text, ', ') INTO l FROM pg_class \
                 WHERE relkind IN ('r', 'p') AND relnamespace NOT IN ('pg_catalog'::regnamespace, \
                 'information_schema'::regnamespace); EXECUTE 'TRUNCATE ' || l; END$$",
            )
            .await
            .expect("truncate");
        load(&self.client, out).await
    }

    /// Restores a tenant to files, loads them, compares; the differences.
    pub async fn check(&self, agent: &Agent, truth: &Truth, tables: &[Watched], tenant: &str) -> Vec<String> {
        let out = to_files(agent, tenant, &format!("name:{}", truth.name));
        self.load(&out).await;
        truth.differences(&self.client, tables, tenant).await
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.cluster.psql("postgres", &format!("DROP DATABASE {} WITH (FORCE)", self.db));
        }
    }
}

/// Loads COPY text files into tables that exist; the number of rows.
pub async fn load(client: &Client, out: &Out) -> u64 {
    let manifest = out.manifest();
    let mut rows = 0;
    for t in manifest["tables"].as_array().expect("tables") {
        let relation = t["relation"].as_str().expect("relation");
        let columns: Vec<String> =
            t["columns"].as_array().expect("columns").iter().map(|c| quote(c.as_str().expect("a name"))).collect();
        let sql = format!("COPY {relation} ({}) FROM STDIN", columns.join(", "));
        let Some(file) = t["file"].as_str() else { continue };
        rows += copy_in(client, &sql, &out.dir.join(file)).await;
    }
    rows
}

/// An identifier in quotes.
pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

async fn copy_in(client: &Client, sql: &str, file: &Path) -> u64 {
    let sink = client.copy_in(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let mut sink = std::pin::pin!(sink);
    let mut file = std::fs::File::open(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let mut chunk = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut chunk).expect("a readable file");
        if n == 0 {
            break;
        }
        sink.send(Bytes::copy_from_slice(&chunk[..n])).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }
    sink.finish().await.unwrap_or_else(|e| panic!("{sql}: {e:?}"))
}

/// A database that a restore makes; dropped with it.
pub struct Database<'c> {
    cluster: &'c Cluster,
    pub name: String,
}

impl<'c> Database<'c> {
    pub fn restore(agent: &Agent, cluster: &'c Cluster, tenant: &str, to: &str) -> Self {
        let this = Self { cluster, name: format!("restored_{:08x}", rand::random::<u32>()) };
        agent.json(&args(tenant, to, "database", &cluster.url("postgres", &this.name)));
        this
    }

    /// One that is still to be made.
    pub fn named(cluster: &'c Cluster, name: &str) -> Self {
        Self { cluster, name: name.to_owned() }
    }

    pub async fn connect(&self) -> Client {
        self.cluster.connect(&self.name).await
    }

    /// Restores a tenant to a fresh database and compares; the differences.
    pub async fn check(
        agent: &Agent,
        cluster: &Cluster,
        truth: &Truth,
        tables: &[Watched],
        tenant: &str,
    ) -> Vec<String> {
        let db = Database::restore(agent, cluster, tenant, &format!("name:{}", truth.name));
        let client = db.connect().await;
        truth.differences(&client, tables, tenant).await
    }
}

impl Drop for Database<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.cluster.psql("postgres", &format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name));
        }
    }
}

/// Tenants (of the application) that can be restored now.
pub fn restorable(agent: &Agent) -> Vec<String> {
    let out = agent.coffer(&["--json", "list"]);
    // A repository without its first record has no source yet.
    let Ok(doc) = serde_json::from_slice::<Value>(&out.stdout) else { return Vec::new() };
    let Some(tenants) = doc["tenants"].as_array() else { return Vec::new() };
    tenants
        .iter()
        .filter(|t| t["window"].as_array().is_some_and(|w| !w.is_empty()))
        .filter_map(|t| t["tenant"].as_str().map(str::to_owned))
        .collect()
}

/// Waits until each of these tenants has a recovery window.
pub fn wait_windows<T: AsRef<str>>(agent: &mut Agent, tenants: &[T]) {
    wait_for("a recovery window of every tenant", 180, || {
        if let Some(code) = agent.ended() {
            panic!("the agent ended ({code:?}) before its first bases:\n{}", agent.log());
        }
        let have = restorable(agent);
        tenants.iter().all(|t| have.iter().any(|h| h == t.as_ref())).then_some(())
    });
}

/// `coffer.recovery_window` comes to have the windows and the gaps of `coffer list`.
pub fn shown_in_sql(cluster: &Cluster, agent: &Agent, tenant: &str) {
    let sql = format!(
        "SELECT from_lsn, CASE WHEN to_lsn = (SELECT durable_lsn FROM coffer.status) THEN 'open' ELSE to_lsn::text END, \
         reason FROM coffer.recovery_window WHERE tenant = '{tenant}' AND restorable = (reason IS NULL) AND as_of IS NOT NULL \
         ORDER BY from_lsn, to_lsn"
    );
    wait_for("the same windows and gaps in coffer.recovery_window", 90, || {
        let listed = listed(agent, tenant);
        let (windows, gaps) = (listed["window"].as_array()?, listed["gaps"].as_array()?);
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let mut spans: Vec<[String; 3]> = Vec::new();
        for (n, w) in windows.iter().enumerate() {
            // The end of what goes on is what is durable by now.
            let to = if n + 1 == windows.len() { "open".to_owned() } else { text(&w["to_lsn"]) };
            spans.push([text(&w["from_lsn"]), to, String::new()]);
        }
        spans.extend(gaps.iter().map(|g| ["from_lsn", "to_lsn", "reason"].map(|f| text(&g[f]))));
        let seen = cluster.psql("shop", &sql);
        let mut seen: Vec<&str> = seen.lines().collect();
        let mut want: Vec<String> = spans.iter().map(|s| s.join("|")).collect();
        seen.sort_unstable();
        want.sort_unstable();
        (seen == want).then_some(())
    });
}

/// One tenant's entry of `coffer list`.
pub fn listed(agent: &Agent, tenant: &str) -> Value {
    let doc = agent.json(&["list", "--tenant", tenant]);
    doc["tenants"]
        .as_array()
        .and_then(|t| t.iter().find(|t| t["tenant"] == tenant))
        .unwrap_or_else(|| panic!("tenant {tenant} is not in {doc}"))
        .clone()
}
