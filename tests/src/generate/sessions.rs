//! A few connections that are driven one statement at a time, so that a seed repeats the order in which they meet.
//!
//! A statement that has to wait for another connection's lock is left waiting, and the others go on; only commits are
//! always waited for, so that nothing commits while the truth is read.

use super::Model;
use super::changes::Step;
use super::values::literal;
use crate::cluster::Cluster;
use bytes::Bytes;
use futures::SinkExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error};

/// After so long without an answer a statement counts as waiting.
const PATIENCE: Duration = Duration::from_millis(60);

/// What was run, in order; saved when a test panics.
pub struct Script {
    lines: Vec<String>,
    title: String,
}

impl Script {
    pub fn new(title: &str) -> Self {
        Self { lines: Vec::new(), title: title.to_owned() }
    }

    pub fn say(&mut self, what: impl Into<String>) {
        self.lines.push(what.into());
    }

    pub fn text(&self) -> String {
        self.lines.join("\n")
    }

    fn save(&self) {
        let path = std::env::temp_dir().join(format!("coffer-oracle-{}.sql", self.title));
        match std::fs::write(&path, self.text()) {
            Ok(()) => eprintln!("{}: the script is in {}", self.title, path.display()),
            Err(e) => eprintln!("{}: the script could not be saved: {e}", self.title),
        }
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.save();
        }
    }
}

struct Connection {
    client: Arc<Client>,
    open: bool,
    /// The transaction can only be rolled back.
    failed: bool,
    savepoint: bool,
    waiting: Option<JoinHandle<Result<(), Error>>>,
}

pub struct Sessions {
    connections: Vec<Connection>,
    /// For what belongs to no transaction.
    aside: Client,
    prepared: Vec<String>,
    serial: usize,
    pub committed: usize,
    pub failures: usize,
}

async fn perform(client: &Client, step: &Step) -> Result<(), Error> {
    match step {
        Step::Sql(sql) => client.batch_execute(sql).await,
        Step::Copy(sql, data) => {
            let sink = client.copy_in(sql.as_str()).await?;
            let mut sink = std::pin::pin!(sink);
            sink.send(Bytes::from(data.clone())).await?;
            sink.finish().await.map(drop)
        }
    }
}

fn said(result: &Result<(), Error>) -> String {
    match result {
        Ok(()) => "ok".into(),
        Err(e) => format!("-- {}", e.as_db_error().map_or_else(|| e.to_string(), |d| d.message().to_owned())),
    }
}

/// Classes of SQLSTATEs that a random statement may well end with: the data, the others, or the shape that a table has are
/// against it.
const CLASSES: [&str; 8] = ["0A", "21", "22", "23", "25", "27", "2B", "40"];
/// The same, single ones: a lock that is not free; a savepoint, a schema or a prepared transaction that is not there; what
/// an open cursor or pending trigger events are in the way of; a label that is not committed yet; a conflict that no index
/// stands for; a partition of another shape.
const CODES: [&str; 11] =
    ["55P03", "3B001", "3F000", "42704", "55006", "55000", "55P04", "42P10", "42P16", "42P17", "42804"];
/// What the extension itself refuses or has the server refuse, by code and words, as the README says.
const REFUSALS: [(&str, &str); 2] =
    [("2BP01", "are found through it"), ("0A000", "cannot alter type of a column used in a trigger definition")];

/// Why a statement should not have failed so; `None`: it may.
fn unexpected(e: &Error) -> Option<String> {
    let Some(d) = e.as_db_error() else { return Some(format!("the connection is gone: {e}")) };
    let code = d.code().code();
    let words = [Some(d.message()), d.detail(), d.hint(), d.where_()];
    let ours = words.into_iter().flatten().any(|w| w.contains("coffer"))
        || code.starts_with("CF")
        || d.schema() == Some("coffer");
    let passes = code.starts_with("40") || code == "55P03";
    let refused = REFUSALS.iter().any(|(c, w)| *c == code && d.message().contains(w));
    let known = CLASSES.iter().any(|c| code.starts_with(c)) || CODES.contains(&code);
    if passes || refused || known && !ours {
        return None;
    }
    Some(format!("{code}: {words:?}"))
}

/// A failure that hides a fault ends the test.
fn judge(result: &Result<(), Error>, script: &Script) {
    if let Err(e) = result
        && let Some(why) = unexpected(e)
    {
        panic!("{}: a statement failed that should not fail so: {why}", script.title);
    }
}

impl Sessions {
    pub async fn new(cluster: &Cluster, db: &str, number: usize) -> Self {
        let mut connections = Vec::new();
        for _ in 0..number {
            let client = Arc::new(cluster.connect(db).await);
            client
                .batch_execute(
                    "SET deadlock_timeout = '20ms'; SET lock_timeout = '300ms'; SET client_min_messages = error",
                )
                .await
                .expect("settings");
            connections.push(Connection { client, open: false, failed: false, savepoint: false, waiting: None });
        }
        let aside = cluster.connect(db).await;
        aside.batch_execute("SET lock_timeout = '300ms'; SET client_min_messages = error").await.expect("settings");
        Self { connections, aside, prepared: Vec::new(), serial: 0, committed: 0, failures: 0 }
    }

    /// One move of one connection.
    pub async fn step(&mut self, rng: &mut StdRng, model: &Model, script: &mut Script) {
        // Its own generator: how long a statement takes must not decide what the next one is.
        let rng = &mut StdRng::seed_from_u64(rng.next_u64());
        let n = rng.random_range(0..self.connections.len());
        self.collect(n, false, script).await;
        if self.connections[n].waiting.is_some() {
            return;
        }
        if let Some(gid) = self.prepared.choose(rng).cloned()
            && rng.random_bool(0.2)
        {
            self.settle_prepared(rng.random_bool(0.8), &gid, script).await;
        }
        if !self.connections[n].open {
            return self.begin(rng, model, n, script).await;
        }
        if self.connections[n].failed {
            let back = if self.connections[n].savepoint && rng.random_bool(0.6) {
                "ROLLBACK TO SAVEPOINT s"
            } else {
                "ROLLBACK"
            };
            return self.end(n, back, script).await;
        }
        match rng.random_range(0..20) {
            0..4 => self.end(n, "COMMIT", script).await,
            4 => self.end(n, "ROLLBACK", script).await,
            5 => {
                self.serial += 1;
                let gid = format!("oracle {}", self.serial);
                self.end(n, &format!("PREPARE TRANSACTION '{gid}'"), script).await;
                // What failed is rolled back and nobody knows it: then both endings below fail, too.
                self.prepared.push(gid);
            }
            6..8 => {
                let sql = if self.connections[n].savepoint {
                    *["ROLLBACK TO SAVEPOINT s", "RELEASE SAVEPOINT s"].choose(rng).expect("two")
                } else {
                    "SAVEPOINT s"
                };
                self.connections[n].savepoint = !sql.starts_with("RELEASE");
                self.run(n, Step::Sql(sql.into()), script).await;
            }
            _ => {
                let step = model.change(rng);
                self.run(n, step, script).await;
            }
        }
    }

    async fn begin(&mut self, rng: &mut StdRng, model: &Model, n: usize, script: &mut Script) {
        let level = *["", "", "", "", " ISOLATION LEVEL REPEATABLE READ", " ISOLATION LEVEL SERIALIZABLE"]
            .choose(rng)
            .expect("some");
        let claim = if rng.random_bool(0.7) {
            format!("; SET LOCAL coffer.tenant = {}", literal(&model.tenant(rng)))
        } else {
            String::new()
        };
        let late = if rng.random_bool(0.3) { "; SET LOCAL synchronous_commit = off" } else { "" };
        self.connections[n].open = true;
        self.run(n, Step::Sql(format!("BEGIN{level}{claim}{late}")), script).await;
        let step = model.change(rng);
        self.run(n, step, script).await;
    }

    /// Runs a statement, or leaves it waiting.
    async fn run(&mut self, n: usize, step: Step, script: &mut Script) {
        if self.connections[n].waiting.is_some() {
            return;
        }
        script.say(match &step {
            Step::Sql(sql) => format!("/* {n} */ {sql};"),
            Step::Copy(sql, data) => format!("/* {n} */ {sql};\n{data}\\."),
        });
        let client = self.connections[n].client.clone();
        self.connections[n].waiting = Some(tokio::spawn(async move { perform(&client, &step).await }));
        self.collect(n, false, script).await;
    }

    /// Takes the answer of a statement, if there is one by now; `anyway` waits until there is.
    async fn collect(&mut self, n: usize, anyway: bool, script: &mut Script) {
        let c = &mut self.connections[n];
        let Some(waiting) = &mut c.waiting else { return };
        let limit = if anyway { Duration::from_secs(60) } else { PATIENCE };
        let Ok(done) = tokio::time::timeout(limit, waiting).await else {
            assert!(!anyway, "connection {n} waits for ever:\n{}", script.text());
            script.say(format!("/* {n} */ -- waits"));
            return;
        };
        c.waiting = None;
        let done = done.expect("a statement's task");
        script.say(format!("/* {n} */ {}", said(&done)));
        judge(&done, script);
        if done.is_err() {
            c.failed = true;
            self.failures += 1;
        }
    }

    /// Ends a transaction, or goes back to its savepoint.
    async fn end(&mut self, n: usize, sql: &str, script: &mut Script) {
        let c = &mut self.connections[n];
        let done = perform(&c.client, &Step::Sql(sql.into())).await;
        script.say(format!("/* {n} */ {sql}; {}", said(&done)));
        judge(&done, script);
        c.failed = false;
        if sql.contains("TO SAVEPOINT") {
            return;
        }
        c.open = false;
        c.savepoint = false;
        self.committed += usize::from(sql == "COMMIT" && done.is_ok());
        if done.is_err() {
            let _ = c.client.batch_execute("ROLLBACK").await;
        }
    }

    async fn settle_prepared(&mut self, commit: bool, gid: &str, script: &mut Script) {
        let sql = format!("{} PREPARED '{gid}'", if commit { "COMMIT" } else { "ROLLBACK" });
        let done = self.aside.batch_execute(&sql).await;
        script.say(format!("{sql}; {}", said(&done)));
        judge(&done, script);
        self.prepared.retain(|g| g != gid);
    }

    /// Ends every transaction.
    pub async fn drain(&mut self, rng: &mut StdRng, script: &mut Script) {
        let rng = &mut StdRng::seed_from_u64(rng.next_u64());
        for gid in self.prepared.clone() {
            self.settle_prepared(rng.random_bool(0.8), &gid, script).await;
        }
        let coin = rng.next_u32();
        for wait in [false, true] {
            for n in 0..self.connections.len() {
                self.collect(n, wait, script).await;
                if self.connections[n].open && self.connections[n].waiting.is_none() {
                    let rollback = self.connections[n].failed || coin & (1 << n) == 0 && coin & 64 == 0;
                    self.end(n, if rollback { "ROLLBACK" } else { "COMMIT" }, script).await;
                }
            }
        }
    }

    /// Runs statements alone, as a transaction of their own or, `bare`, as a single statement outside of any; whether they
    /// stand.
    pub async fn alone(&mut self, steps: &[Step], bare: bool, script: &mut Script) -> bool {
        let client = &self.connections[0].client;
        let mut done = if bare { Ok(()) } else { client.batch_execute("BEGIN").await };
        for step in steps {
            if done.is_ok() {
                done = perform(client, step).await;
                script.say(match step {
                    Step::Sql(sql) => format!("{sql}; {}", said(&done)),
                    Step::Copy(sql, data) => format!("{sql};\n{data}\\. {}", said(&done)),
                });
                judge(&done, script);
            }
        }
        if !bare {
            let end = if done.is_ok() { "COMMIT" } else { "ROLLBACK" };
            let ended = client.batch_execute(end).await;
            script.say(format!("-- the above in a transaction: {end}; {}", said(&ended)));
            judge(&ended, script);
            if ended.is_err() {
                let _ = client.batch_execute("ROLLBACK").await;
            }
            return done.is_ok() && ended.is_ok();
        }
        done.is_ok()
    }
}
