//! Restores of every mode against the truth, and against what `coffer list` promises.

use super::Case;
use coffer_tests::agent::Agent;
use coffer_tests::generate::observed::{self, Truth, Whose};
use coffer_tests::restored::{Database, Out};
use coffer_wire::Lsn;
use rand::RngExt;
use rand::seq::IndexedRandom;
use serde_json::Value;
use std::collections::BTreeMap;

/// How long a restore may wait for its target, with everybody's transactions ended.
const WAIT: &str = "60s";

/// What a refusal of a restore in place may say.
const CONFLICTS: [&str; 2] = ["conflict", "refused"];

/// The windows that `coffer list` had.
#[derive(Default)]
pub struct Promise(BTreeMap<Whose, Vec<(Lsn, Lsn)>>);

impl Promise {
    fn now(agent: &Agent) -> Self {
        let doc = agent.json(&["list"]);
        let everybody = ["tenants", "reserved"].map(|k| doc[k].as_array().expect("a list").clone()).concat();
        let lsn = |v: &Value| v.as_str().expect("a position").parse::<Lsn>().expect("an LSN");
        let one = |t: Value| {
            let whose = match t["kind"].as_str().expect("a kind") {
                "normal" => Whose::Tenant(t["tenant"].as_str().expect("a key").to_owned()),
                "unassigned" => Whose::Nobody,
                "shared" => Whose::Everybody,
                _ => return None,
            };
            let spans = t["window"].as_array().expect("a window").iter();
            Some((whose, spans.map(|w| (lsn(&w["from_lsn"]), lsn(&w["to_lsn"]))).collect()))
        };
        Self(everybody.into_iter().filter_map(one).collect())
    }

    /// Whether a point is inside; `None` where it cannot be told: so close to an end, or of somebody who has no backup.
    fn of(&self, whose: &Whose, truth: &Truth) -> Option<bool> {
        let (after, upto) = truth.between;
        let spans = self.0.get(whose)?;
        if spans.iter().any(|(from, to)| *from <= after && upto <= *to) {
            return Some(true);
        }
        spans.iter().all(|(from, to)| upto < *from || *to <= after).then_some(false)
    }
}

impl Case<'_> {
    pub fn everyone(&self) -> Vec<Whose> {
        let tenants = self.model.tenants.iter().map(|t| Whose::Tenant(t.clone()));
        tenants.chain([Whose::Nobody, Whose::Everybody]).collect()
    }

    /// Reads what is promised, of everything that was committed by now.
    pub fn promises(&mut self) {
        self.cluster.psql(&self.db, "SELECT coffer.wait_durable()");
        self.promise = Promise::now(&self.agent);
    }

    pub async fn check_all(&mut self, truths: Vec<Truth>) {
        self.promises();
        let mut wrong = Vec::new();
        let last = truths.len() - 1;
        for (n, truth) in truths.into_iter().enumerate() {
            for whose in self.everyone() {
                // All at the last point; of the others a sample, for a case to stay short, unless it need not.
                let left_out = n < last && self.rng.random_bool(0.4);
                if left_out && !super::is_thorough() {
                    continue;
                }
                let tenant = matches!(whose, Whose::Tenant(_));
                // What a seed makes next is the same either way.
                let database = !left_out && tenant && self.rng.random_bool(0.15);
                wrong.extend(self.elsewhere(&truth, &whose, database, WAIT).await);
                if super::is_thorough() && tenant && !database {
                    wrong.extend(self.in_database(&truth, &whose, WAIT).await);
                }
            }
            self.truths.push(truth);
        }
        // It may be unhealthy: sessions that contradict each other are told on, and rightly.
        let out = self.agent.coffer(&["--json", "status"]);
        let status: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        if status["sources"][0]["unresolved_rows"] != 0 {
            wrong.push(format!("rows that could not be attributed: {status}"));
        }
        self.must_be_right(wrong);
    }

    /// Compares in a database if that is said, else in files or in a schema.
    pub async fn elsewhere(&mut self, truth: &Truth, whose: &Whose, database: bool, wait: &str) -> Vec<String> {
        if database {
            self.in_database(truth, whose, wait).await
        } else if self.life.rng.random_bool(0.25) {
            self.in_schema(truth, whose, wait).await
        } else {
            self.in_files(truth, whose, wait)
        }
    }

    pub fn must_be_right(&self, mut wrong: Vec<String>) {
        let number = wrong.len();
        wrong.truncate(12);
        let major = self.cluster.major;
        assert!(wrong.is_empty(), "PostgreSQL {major}, SEED={}: {number} differences, {wrong:#?}", self.seed);
    }

    /// Restores some into the live database, to points of its present shape: they are what they were, all others what
    /// they are. Whether anything was restored.
    pub async fn in_place(&mut self) -> bool {
        self.promises();
        let mut done = false;
        for _ in 0..3 {
            let version = self.model.version;
            let fits = |t: &&Truth| t.version == version;
            let fitting: Vec<_> = self.truths.iter().filter(fits).cloned().collect();
            let who: Vec<_> = self.everyone().into_iter().filter(|w| *w != Whose::Everybody).collect();
            let (Some(truth), Some(whose)) = (fitting.choose(&mut self.rng), who.choose(&mut self.rng)) else { break };
            let before = self.look().await;
            let result = self.restore(truth, whose, ("in-place", &self.cluster.url("postgres", &self.db)), WAIT);
            let now = self.look().await;
            self.script.say(format!("-- {whose:?} in place to {}: {:?}", truth.name, result.as_ref().err()));
            let mut wrong = Vec::new();
            match &result {
                Ok(_) => {
                    done = true;
                    self.tally.in_place += 1;
                    wrong.extend(self.was_promised(truth, whose));
                    wrong.extend(truth.against(whose, &now));
                }
                // Rows belong to others now, or others' rows refer to them: nothing is changed then.
                Err((10, said)) => {
                    self.tally.in_place_refused += 1;
                    self.script.say(format!("-- {said}"));
                    wrong.extend(self.no_conflict(truth, whose, &before, said));
                }
                Err(e) => wrong.extend(self.refused(truth, whose, e.clone())),
            }
            // Rows that became nobody's are taken back; every other row of others stays.
            let spared = |o: &&Whose| result.is_err() || *o != whose && **o != Whose::Nobody;
            for other in self.everyone().iter().filter(spared) {
                wrong.extend(before.against(other, &now));
            }
            wrong.iter_mut().for_each(|w| w.insert_str(0, &format!("{whose:?} in place to {}: ", truth.name)));
            self.must_be_right(wrong);
        }
        done
    }

    /// What is wrong with a refusal: it names no conflict, or there can be none, since all others have what they had, and
    /// all of it together stood at the target.
    fn no_conflict(&self, truth: &Truth, whose: &Whose, now: &Truth, said: &str) -> Option<String> {
        let said: Value = serde_json::from_str(said).expect("JSON");
        let code = said["error"]["code"].as_str().unwrap_or_default();
        if !CONFLICTS.contains(&code) {
            return Some(format!("refused, and no conflict: {said}"));
        }
        let others_differ = self.everyone().iter().any(|o| o != whose && !truth.against(o, now).is_empty());
        (!others_differ).then(|| format!("refused, while nobody else has anything else than then: {said}"))
    }

    /// What everybody has now.
    async fn look(&self) -> Truth {
        self.observer.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await.expect("begin");
        let now = observed::observe(&self.observer, &self.model, "now").await.expect("nobody holds a lock");
        self.observer.batch_execute("COMMIT").await.expect("commit");
        now
    }

    fn restore(
        &mut self,
        truth: &Truth,
        whose: &Whose,
        (mode, target): (&str, &str),
        wait: &str,
    ) -> Result<Value, (i32, String)> {
        let [flag, key] = whose.args();
        let to = format!("name:{}", truth.name);
        let which = ["--json", "restore", flag, key, "--to", &to, "--mode", mode, "--target", target];
        let out = self.agent.coffer(&[&which[..], &["--wait", wait, "--confirm"]].concat());
        self.tally.restores += 1;
        match out.status.code() {
            Some(0) => Ok(serde_json::from_slice(&out.stdout).expect("JSON")),
            code => Err((code.unwrap_or(-1), String::from_utf8_lossy(&out.stdout).into_owned())),
        }
    }

    /// What is wrong with that a restore was done: its point was not in the window, before and after.
    fn was_promised(&mut self, truth: &Truth, whose: &Whose) -> Option<String> {
        let outside = self.stays(truth, whose, false);
        outside.then(|| format!("{whose:?} at {}: restored, and outside of the window", truth.name))
    }

    /// Whether a point was inside of the window (or outside), as listed last, and is so now.
    fn stays(&mut self, truth: &Truth, whose: &Whose, inside: bool) -> bool {
        if self.promise.of(whose, truth) != Some(inside) {
            return false;
        }
        self.promise = Promise::now(&self.agent);
        self.promise.of(whose, truth) == Some(inside)
    }

    /// Sorts an answer other than success: an honest one is counted, any other is wrong.
    fn refused(&mut self, truth: &Truth, whose: &Whose, (code, said): (i32, String)) -> Vec<String> {
        let is_wrong = match code {
            // Whoever never had a row is not known.
            3 if !truth.has(whose) => return Vec::new(),
            // Nothing that asks for a base happened between a moment of which that was so and this one.
            4 if truth.promised && !self.life.may_forget(truth) => "which was promised",
            4 if self.stays(truth, whose, true) => "inside of the window",
            4 if serde_json::from_str::<Value>(&said).is_ok_and(|d| d["error"]["window"].is_array()) => {
                match truth.promised {
                    true => self.tally.expired += 1,
                    false => self.tally.refused += 1,
                }
                return Vec::new();
            }
            _ => "not an answer",
        };
        vec![format!("{whose:?} at {}, {is_wrong}: exit {code}: {said}", truth.name)]
    }

    fn in_files(&mut self, truth: &Truth, whose: &Whose, wait: &str) -> Vec<String> {
        let out = Out::new();
        match self.restore(truth, whose, ("files", out.arg()), wait) {
            Ok(_) => {
                self.tally.files += 1;
                let wrong = truth.against_files(whose, &out);
                self.was_promised(truth, whose).into_iter().chain(wrong).collect()
            }
            Err(e) => self.refused(truth, whose, e),
        }
    }

    async fn in_schema(&mut self, truth: &Truth, whose: &Whose, wait: &str) -> Vec<String> {
        let name = format!("copy {}", self.tally.restores);
        match self.restore(truth, whose, ("schema", &name), wait) {
            Ok(_) => {
                self.tally.schema += 1;
                let wrong = truth.against_schema(whose, &self.observer, &name).await;
                self.cluster
                    .script(&self.db, &format!("SET client_min_messages = error; DROP SCHEMA {name:?} CASCADE"));
                self.was_promised(truth, whose).into_iter().chain(wrong).collect()
            }
            Err(e) => self.refused(truth, whose, e),
        }
    }

    async fn in_database(&mut self, truth: &Truth, whose: &Whose, wait: &str) -> Vec<String> {
        let name = format!("restored_{}_{}", self.seed, self.tally.restores);
        let made = Database::named(self.cluster, &name);
        match self.restore(truth, whose, ("database", &self.cluster.url("postgres", &name)), wait) {
            Ok(done) => {
                self.tally.database += 1;
                let mut warned = done["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str);
                let complete = !warned.any(|w| w.starts_with("foreign key"));
                self.tally.with_keys += usize::from(complete);
                let wrong = truth.against_database(whose, &made.connect().await, complete).await;
                self.was_promised(truth, whose).into_iter().chain(wrong).collect()
            }
            // Rather none than one of another moment's shape; it says that files will do, and so they must.
            Err((10, said)) if said.contains("\"definitions_unknown\"") || said.contains("\"columns_changed\"") => {
                self.tally.without_definitions += 1;
                self.in_files(truth, whose, wait)
            }
            Err(e) => self.refused(truth, whose, e),
        }
    }
}
