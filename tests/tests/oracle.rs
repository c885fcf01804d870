//! Random schemas under random workloads: every tenant, at every point, equals what it was there by the model's own account.
//!
//! Every other case is a lively one ([`life`]): fulls, incrementals, pruning, validation and the scrub go on every second
//! or so beside the workload, and a point is there for as long as `coffer list` promises it.
//!
//! `COFFER_TEST_CASES` (default 6) cases per version, with the seeds 1 and up; `SEED` repeats one of them; with
//! `COFFER_TEST_MINUTES` cases run until the time is over, from `SEED` on, and every point is compared for everybody, in a
//! database, too (`COFFER_TEST_THOROUGH=1`: without the minutes). The seed of each case is printed, and the script of one
//! that fails is saved.

mod compare;
mod life;
mod tally;

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::generate::Model;
use coffer_tests::generate::observed::{self, PINNED, Truth};
use coffer_tests::generate::sessions::{Script, Sessions};
use coffer_tests::generate::{Owner, values};
use coffer_tests::{block_on, wait_for};
use coffer_wire::Lsn;
use compare::Promise;
use life::Life;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use std::time::{Duration, Instant};
use tally::Tally;
use tokio_postgres::Client;

/// So many cases are enough for each kind of work to have been done.
const ALL_KINDS: u64 = 6;

on_majors! {
    random: random;
    every_kind_of_change: every_kind_of_change;
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Whether every point is compared, and not a sample.
fn is_thorough() -> bool {
    ["COFFER_TEST_MINUTES", "COFFER_TEST_THOROUGH"].iter().any(|v| number(v).is_some_and(|n| n > 0))
}

fn random(major: u32) {
    let cluster = Cluster::start_with(major, "autovacuum = off\n", &[]);
    let end = number("COFFER_TEST_MINUTES").map(|m| Instant::now() + Duration::from_secs(60 * m));
    let (first, cases) = match (number("SEED"), end) {
        (Some(seed), None) => (seed, 1),
        (seed, Some(_)) => (seed.unwrap_or(1), u64::MAX),
        (None, None) => (1, number("COFFER_TEST_CASES").unwrap_or(6)),
    };
    let mut all = Tally::default();
    let mut run = 0;
    for seed in first..first.saturating_add(cases) {
        if end.is_some_and(|end| Instant::now() > end) {
            break;
        }
        println!("PostgreSQL {major}: SEED={seed}");
        let begun = Instant::now();
        let tally = block_on(Case::run(&cluster, seed));
        println!("PostgreSQL {major}: SEED={seed}: {tally} in {:.1} s", begun.elapsed().as_secs_f64());
        all.add(&tally);
        run += 1;
    }
    println!("PostgreSQL {major}: {run} cases: {all}");
    if run >= ALL_KINDS {
        all.require_every_kind();
    }
    // A refusal is an honest answer, but one that everything gets would hide what is wrong. A single case may well be one in
    // which a base waits for a transaction that stays open.
    assert!(run < 20 || all.refused * 10 <= all.restores, "{} of {} restores were refused", all.refused, all.restores);
}

/// Changes of the schema that never succeed would never be tested: each kind does, before long, and what fails does so for
/// a reason that is known.
fn every_kind_of_change(major: u32) {
    let cluster = Cluster::start_with(major, "autovacuum = off\n", &[]);
    let mut tally = Tally::default();
    for seed in 1..=20 {
        tally.add(&block_on(async {
            let mut case = Case::new(&cluster, seed).await;
            let mut sessions = Sessions::new(&cluster, &case.db, 1).await;
            case.protect();
            case.first_rows(&mut sessions, true).await;
            case.each_once = true;
            case.changes(&mut sessions, 150).await;
            drop(sessions);
            case.clean_up()
        }));
        if tally.missing_changes().is_empty() {
            break;
        }
    }
    println!("PostgreSQL {major}: {:?}", tally.changes);
    assert!(tally.missing_changes().is_empty(), "never succeeded: {:?}; {:?}", tally.missing_changes(), tally.changes);
}

struct Case<'c> {
    cluster: &'c Cluster,
    seed: u64,
    db: String,
    rng: StdRng,
    model: Model,
    script: Script,
    observer: Client,
    agent: Agent,
    truths: Vec<Truth>,
    /// Every table can be restored to what comes now.
    settled: bool,
    life: Life,
    promise: Promise,
    tally: Tally,
    /// A kind of change that stood is not made again.
    each_once: bool,
}

impl<'c> Case<'c> {
    async fn run(cluster: &'c Cluster, seed: u64) -> Tally {
        Self::new(cluster, seed).await.through().await
    }

    /// The generated schema in a database of its own, nothing covered yet.
    async fn new(cluster: &'c Cluster, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let db = format!("case_{seed}");
        let model = Model::generate(&mut rng, cluster.major);
        let mut script = Script::new(&format!("{}-{seed}", cluster.major));
        script.say(model.script());
        cluster.create_protected_db(&db);
        cluster.script(&db, &format!("SET client_min_messages = error;\n{}", model.script()));
        let observer = cluster.connect(&db).await;
        observer.batch_execute(PINNED).await.expect("settings");
        observer.batch_execute("SET lock_timeout = '300ms'").await.expect("settings");
        let life = Life::of(seed);
        script.say(format!("-- {life:?}"));
        let agent = Agent::new(&Setup {
            ship_interval: "100ms".into(),
            more: format!("[compact]\npart = \"4KiB\"\n{}", life.settings()),
            ..Setup::of(cluster, &db)
        });
        Self {
            cluster,
            seed,
            db,
            rng,
            model,
            script,
            observer,
            agent,
            truths: Vec::new(),
            settled: false,
            life,
            promise: Promise::default(),
            tally: Tally::default(),
            each_once: false,
        }
    }

    async fn through(mut self) -> Tally {
        let mut sessions = Sessions::new(self.cluster, &self.db, self.rng.random_range(1..4)).await;
        self.first_rows(&mut sessions, false).await;
        self.protect();
        self.first_rows(&mut sessions, true).await;
        self.agent.start();
        self.settle();
        for round in 0..self.rng.random_range(2..5) {
            for _ in 0..self.rng.random_range(10..40) {
                sessions.step(&mut self.rng, &self.model, &mut self.script).await;
            }
            if self.rng.random_bool(0.6) {
                self.alter(&mut sessions).await;
            }
            self.disturb(round);
            self.compact();
            self.look_after();
            self.point(&mut sessions, &format!("point {round}")).await;
            self.look_back().await;
        }
        sessions.drain(&mut self.rng, &mut self.script).await;
        self.settle();
        self.point(&mut sessions, "the end").await;
        let truths = std::mem::take(&mut self.truths);
        self.check_all(truths).await;
        if self.in_place().await {
            self.point(&mut sessions, "after restores in place").await;
            let truths = self.truths.split_off(self.truths.len() - 1);
            self.check_all(truths).await;
        }
        self.tally.points = self.truths.len();
        self.tally.rows = self.truths.last().map_or(0, Truth::rows);
        (self.tally.committed, self.tally.failed) = (sessions.committed, sessions.failures);
        drop(sessions);
        self.close_down();
        self.clean_up()
    }

    /// Rows from before the tables are covered, or from after.
    async fn first_rows(&mut self, sessions: &mut Sessions, covered: bool) {
        let tables: Vec<_> = self.model.tables.keys().copied().collect();
        for t in tables {
            // Whom the session named is not known of rows from before.
            if !covered && (matches!(self.model.tables[&t].owner, Owner::Claim(_)) || self.rng.random_bool(0.3)) {
                continue;
            }
            let step = self.model.first_rows(&mut self.rng, t);
            sessions.alone(&[step], false, &mut self.script).await;
        }
    }

    /// Covers everything: by discovery, and what that leaves by hand. Nothing may stay uncovered.
    fn protect(&mut self) {
        let mut sql = Vec::new();
        for t in self.model.tables.values() {
            match &t.owner {
                Owner::Shared => {
                    sql.push(format!("SELECT coffer.add_shared({}::regclass)", values::literal(&t.name())))
                }
                Owner::Claim(_) => {
                    sql.push(format!("SELECT coffer.add_table({}::regclass)", values::literal(&t.name())))
                }
                Owner::Schema(tenant) => {
                    let (schema, tenant) = (values::literal(&t.schema), values::literal(tenant));
                    sql.push(format!("SELECT coffer.add_schema({schema}, {tenant})"));
                }
                _ => {}
            }
        }
        sql.dedup();
        let discover = "SELECT coffer.discover('tenant', apply => true)".to_owned();
        sql.insert(if self.rng.random_bool(0.5) { 0 } else { sql.len() }, discover);
        for statement in sql {
            self.cluster.psql(&self.db, &statement);
            self.script.say(format!("{statement};"));
        }
        self.covered();
    }

    /// What coffer.coverage says of every table.
    fn covered(&self) {
        let sql = "SELECT coalesce(json_agg(json_build_array(n.nspname, c.relname, v.covered, v.strategy, v.cost, v.reason)), '[]') \
                   FROM coffer.coverage v JOIN pg_class c ON c.oid = v.relation JOIN pg_namespace n ON n.oid = c.relnamespace";
        let said: Value = serde_json::from_str(&self.cluster.psql(&self.db, sql)).expect("JSON");
        let said = said.as_array().expect("a list");
        assert_eq!(said.len(), self.model.tables.len(), "{said:?}");
        for t in self.model.tables.values() {
            let own = |r: &&Value| {
                r[0] == t.schema.as_str() && Some(r[1].as_str().expect("a name")) == t.names.last().map(String::as_str)
            };
            let row = said.iter().find(own).unwrap_or_else(|| panic!("{} is not in {said:?}", t.name()));
            if t.unlogged {
                let says = row[5].as_str().is_some_and(|r| r.starts_with("unlogged"));
                assert!(row[2] == false && says, "{}: {row}", t.name());
                continue;
            }
            let strategies: &[&str] = match t.owner {
                Owner::Column(_) => &["identity", "tag", "full_row"],
                Owner::Parent { .. } => &["path"],
                Owner::Claim(_) => &["session"],
                Owner::Schema(_) => &["schema"],
                Owner::Shared => &["shared"],
            };
            let strategy = row[3].as_str().unwrap_or_default();
            assert!(strategies.contains(&strategy) && row[2] == true, "{}: {row}", t.name());
            assert!(row[4].as_str().is_some_and(|c| !c.is_empty()), "{}: {row}", t.name());
        }
    }

    /// Waits until every table can be restored to what comes now.
    fn settle(&mut self) {
        let lsn = self.cluster.psql(&self.db, "SELECT pg_current_wal_insert_lsn()");
        self.cluster.psql(&self.db, "SELECT coffer.wait_durable()");
        wait_for("a base of every table", 90, || {
            if let Some(code) = self.agent.ended() {
                panic!("the agent ended ({code:?}):\n{}", self.agent.log());
            }
            let out = self.agent.coffer(&["--json", "list"]);
            let doc: Value = serde_json::from_slice(&out.stdout).ok()?;
            // A base of a tenant's own table is waited for by that tenant alone.
            let everybody = doc["tenants"].as_array()?.iter().chain(doc["reserved"].as_array()?);
            let ends: Option<Vec<String>> = everybody
                .map(|t| Some(format!("pg_lsn '{}'", t["window"].as_array()?.last()?["to_lsn"].as_str()?)))
                .collect();
            let all = format!(
                "SELECT coalesce(bool_and(pg_lsn '{lsn}' <= e), false) FROM unnest(ARRAY[{}]::pg_lsn[]) e",
                ends?.join(", ")
            );
            (self.cluster.psql(&self.db, &all) == "t").then_some(())
        });
        self.settled = true;
    }

    /// Kills the agent, or stops it, and starts it again; or lets it be.
    fn disturb(&mut self, round: usize) {
        match self.rng.random_range(0..5) {
            0 => self.agent.kill9(),
            1 => assert_eq!(self.agent.stop(), Some(0), "a stop is orderly"),
            _ => return,
        }
        self.script.say(format!("-- the agent is started again in round {round}"));
        self.agent.start();
    }

    /// Makes fulls of what is durable, or not: restores to later points begin there.
    fn compact(&mut self) {
        if self.rng.random_bool(0.6) {
            let out = self.agent.coffer(&["--json", "compact", "--incremental"]);
            assert!(out.status.success(), "compact --incremental: {}", String::from_utf8_lossy(&out.stdout));
            self.script.say("-- incrementals are made");
        }
        if self.rng.random_bool(0.5) {
            return;
        }
        let out = self.agent.coffer(&["--json", "compact"]);
        // A table may wait for its base.
        let code = out.status.code();
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(matches!(code, Some(0 | 3 | 4 | 9)), "compact: {code:?}: {said}");
        self.script.say("-- fulls are made");
    }

    /// TRUNCATE or DDL, with everybody else's transactions ended, in a transaction with changes of rows or alone.
    async fn alter(&mut self, sessions: &mut Sessions) {
        sessions.drain(&mut self.rng, &mut self.script).await;
        if self.rng.random_bool(0.3) {
            let step = self.model.truncate(&mut self.rng);
            sessions.alone(&[step], false, &mut self.script).await;
            return;
        }
        let number = self.rng.random_range(2..7);
        self.changes(sessions, number).await;
        // A point before the bases that this asks for may well be refused.
        if self.rng.random_bool(0.8) {
            self.settle();
        }
    }

    /// DDL, one after the other.
    async fn changes(&mut self, sessions: &mut Sessions, number: usize) {
        for _ in 0..number {
            let Some(mut a) = self.model.alteration(&mut self.rng) else { continue };
            if self.each_once && self.tally.changes.get(a.kind).is_some_and(|(succeeded, _)| *succeeded > 0) {
                continue;
            }
            if !a.bare && self.rng.random_bool(0.3) {
                a.steps.insert(0, self.model.change(&mut self.rng));
            }
            if !a.bare && self.rng.random_bool(0.3) {
                a.steps.push(a.after.change(&mut self.rng));
            }
            self.settled = false;
            let stands = sessions.alone(&a.steps, a.bare, &mut self.script).await;
            let (succeeded, failed) = self.tally.changes.entry(a.kind).or_default();
            *(if stands { succeeded } else { failed }) += 1;
            if stands {
                self.model = a.after;
                self.tally.altered += 1;
                self.covered();
            }
        }
    }

    /// Names a point, and notes what everybody has there.
    async fn point(&mut self, sessions: &mut Sessions, name: &str) {
        for attempt in 0.. {
            match self.try_point(name).await {
                Ok(mut truth) => {
                    truth.promised = self.settled;
                    self.script.say(format!("-- {name}"));
                    self.truths.push(truth);
                    return;
                }
                // An open transaction has locked a table against readers.
                Err(e) => {
                    assert!(attempt < 3, "SEED={}: {name}: {e:?}", self.seed);
                    let _ = self.observer.batch_execute("ROLLBACK").await;
                    sessions.drain(&mut self.rng, &mut self.script).await;
                }
            }
        }
    }

    async fn try_point(&self, name: &str) -> Result<Truth, tokio_postgres::Error> {
        self.observer.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        let mut truth = observed::observe(&self.observer, &self.model, name).await?;
        self.observer.query_one("SELECT coffer.restore_point($1)", &[&name]).await?;
        let from = self.position().await?;
        self.observer.batch_execute("COMMIT").await?;
        truth.between = (from, self.position().await?);
        Ok(truth)
    }

    /// Where the server's log ends.
    async fn position(&self) -> Result<Lsn, tokio_postgres::Error> {
        let row = self.observer.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?;
        Ok(row.get::<_, String>(0).parse().expect("an LSN"))
    }

    fn clean_up(self) -> Tally {
        drop(self.observer);
        self.cluster.psql("postgres", "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots");
        self.cluster.psql("postgres", &format!("DROP DATABASE {} WITH (FORCE)", self.db));
        self.tally
    }
}
