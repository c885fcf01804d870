//! The life of backups beside the workload: what a lively case has the agent do every second or so, the verbs that run
//! between rounds, and what the agent's log says came of it.

use super::Case;
use super::tally::Tally;
use coffer_tests::generate::observed::{Truth, Whose};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use std::time::Duration;

/// Alarms that nothing in these cases is a reason for.
const NEVER: [&str; 6] = [
    "validation_differs",
    "validation_failed",
    "damaged_object",
    "prune_failed",
    "fulls_failed",
    "incrementals_failed",
];
/// What a validation says, and rightly, while a transaction of the case is open for longer than its retention of seconds
/// keeps what a snapshot is compared with.
const OLD_SNAPSHOT: &str = "cannot be compared with the repository";

/// How lively a case is. It draws from a generator of its own: the schema and the workload of a seed are the same either way.
#[derive(Debug)]
pub struct Life {
    pub rng: StdRng,
    /// The intervals, if there is anything beside the workload.
    pace: Option<Pace>,
}

/// Intervals in seconds, and what is kept. Pruning comes in odd seconds and fulls in even ones: while somebody writes,
/// nothing is deleted.
#[derive(Clone, Debug)]
struct Pace {
    incremental: u32,
    full: u32,
    validate: u32,
    pitr: u64,
    daily: u32,
    grace: u32,
}

impl Life {
    pub fn of(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x6c69_6665);
        let pace = (seed % 2 == 1).then(|| Pace {
            incremental: 2 * rng.random_range(1..3),
            full: 2 * rng.random_range(1..3),
            validate: rng.random_range(1..4),
            pitr: rng.random_range(1..5),
            daily: rng.random_range(0..3),
            grace: rng.random_range(0..2),
        });
        Self { rng, pace }
    }

    pub fn is_lively(&self) -> bool {
        self.pace.is_some()
    }

    /// For the agent's configuration.
    pub fn settings(&self) -> String {
        let Some(p) = &self.pace else { return String::new() };
        format!(
            "[schedule]\nincremental = \"*/{} * * * * *\"\nfull = \"*/{} * * * * *\"\nprune = \"1-59/2 * * * * *\"\n\
             validate = \"*/{} * * * * *\"\n[retention]\npitr = \"{}s\"\ndaily = {}\nweekly = 0\nmonthly = 0\nannual = 0\n\
             grace = \"{}s\"\n[verify]\nscrub_rate = \"64MiB\"\nscrub_period = \"2s\"\n",
            p.incremental, p.full, p.validate, p.pitr, p.daily, p.grace
        )
    }

    /// Whether retention may have taken a point away by now.
    pub fn may_forget(&self, truth: &Truth) -> bool {
        self.pace.as_ref().is_some_and(|p| truth.taken.elapsed() > Duration::from_secs(p.pitr))
    }
}

impl Case<'_> {
    /// Verbs from the command line, beside those that the agent's schedules run.
    pub fn look_after(&mut self) {
        if !self.life.is_lively() {
            return;
        }
        let chosen =
            [("prune", 0.4), ("live", 0.3), ("verify", 0.3)].map(|(verb, p)| (verb, self.life.rng.random_bool(p)));
        for (verb, _) in chosen.into_iter().filter(|(_, yes)| *yes) {
            let args: &[&str] = match verb {
                "prune" => &["--json", "prune", "--confirm"],
                "live" => &["--json", "verify", "--against-live"],
                _ => &["--json", "verify"],
            };
            self.script.say(format!("-- coffer {}", args[1..].join(" ")));
            let out = self.agent.coffer(args);
            let (code, said) = (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned());
            if verb == "live" && code == Some(4) && said.contains(OLD_SNAPSHOT) {
                continue;
            }
            // Another may be reading what would go; a table may wait for its base.
            let fine = code == Some(0) || verb == "prune" && code == Some(6) || verb == "live" && code == Some(9);
            assert!(
                fine,
                "SEED={}: coffer {args:?}: {code:?}: {said} {}",
                self.seed,
                String::from_utf8_lossy(&out.stderr)
            );
            let said: Value = serde_json::from_str(&said).expect("JSON");
            match verb {
                "prune" => self.tally.pruned(&said),
                "live" => self.tally.validations += said["live"].as_array().map_or(0, Vec::len),
                _ => {}
            }
        }
    }

    /// Compares something that was, while backups come and go.
    pub async fn look_back(&mut self) {
        if !self.life.is_lively() || self.life.rng.random_bool(0.3) {
            return;
        }
        self.promises();
        let mut wrong = Vec::new();
        for _ in 0..2 {
            let (who, rng) = (self.everyone(), &mut self.life.rng);
            let truth = self.truths.choose(rng).expect("a point").clone();
            let whose = who.choose(rng).expect("somebody");
            let database = matches!(whose, Whose::Tenant(_)) && rng.random_bool(0.2);
            wrong.extend(self.elsewhere(&truth, whose, database, "1s").await);
        }
        self.must_be_right(wrong);
    }

    /// Stops the agent, and reads in its log what it did and what it found.
    pub fn close_down(&mut self) {
        assert_eq!(self.agent.stop(), Some(0), "a stop is orderly");
        if !self.life.is_lively() {
            return;
        }
        self.tally.lively += 1;
        let mut wrong = Vec::new();
        for line in self.agent.log().lines() {
            let Ok(said) = serde_json::from_str::<Value>(line) else { continue };
            self.tally.logged(&said);
            let is_alarm = said["level"] == "ERROR" && said["alarm"].as_str().is_some_and(|a| NEVER.contains(&a));
            if is_alarm && !line.contains(OLD_SNAPSHOT) {
                wrong.push(format!("an alarm: {line}"));
            }
        }
        self.must_be_right(wrong);
    }
}

impl Tally {
    /// A line of the agent's log.
    fn logged(&mut self, said: &Value) {
        let number = |field: &str| said[field].as_u64().unwrap_or(0);
        match said["message"].as_str().unwrap_or_default() {
            "checked: live" => self.validations += 1,
            "scheduled fulls" => self.fulls += number("made"),
            "scheduled incrementals" => self.incrementals += number("made"),
            "a round of the scrub is over" => self.scrubs += 1,
            m if m.starts_with("pruned: ") => self.removal(number("backups"), number("objects")),
            _ => {}
        }
    }

    /// The document of `coffer prune`.
    fn pruned(&mut self, said: &Value) {
        let tenants =
            || said["sources"].as_array().into_iter().flatten().flat_map(|s| s["tenants"].as_array()).flatten();
        let sum = |what: &str, field: &str| tenants().filter_map(|t| t[what][field].as_u64()).sum();
        self.removal(sum("recorded", "backups"), sum("deleted", "objects"));
    }

    fn removal(&mut self, backups: u64, objects: u64) {
        self.prunes += usize::from(backups + objects > 0);
        self.removed += backups;
        self.deleted += objects;
    }
}
