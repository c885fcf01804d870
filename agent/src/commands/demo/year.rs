//! The last chapter of the demo: a year in the life of one tenant's backups, in seconds.
//!
//! The rows, the changes and the fulls are real, made by the same compactor as every night's, the first of a month as an
//! archive. Only the calendar is not: each full is dated back to its day. What retention keeps of them is then asked for
//! today.

use super::{Demo, prove, say, step};
use crate::clock::Clock;
use crate::compact::{Compactor, Occasion};
use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};
use crate::history::When;
use crate::lease::Lease;
use crate::opened::{Opened, scratch};
use crate::restore::Watch;
use crate::tenant::Tenant;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::{Handle, Runtime};

/// A small customer, who joined a year ago.
const TENANT: &str = "11";
const DAYS: i64 = 365;
const ACCOUNTS: i64 = 200;
const DAY_US: i64 = 24 * 3600 * 1_000_000;

/// The machine's clock, so many days back.
#[derive(Debug)]
struct Back(i64);

impl Clock for Back {
    fn now_us(&self) -> i64 {
        jiff::Timestamp::now().as_microsecond().saturating_add(self.skew_us())
    }

    fn skew_us(&self) -> i64 {
        -self.0 * DAY_US
    }
}

impl Demo<'_> {
    pub(super) fn year(&mut self) -> Result<()> {
        step(format_args!("8. A year of daily backups of tenant {TENANT}, simulated"));
        let begun = Instant::now();
        for sql in days() {
            self.psql(&sql)?;
        }
        self.psql("SELECT coffer.wait_durable()")?;
        let taken = Runtime::new().context(Kind::Other, "no runtime")?.block_on(self.fulls())?;
        say(format_args!(
            "  {DAYS} days, each with its changes and a full at its end: {} MB written, {:.0} s",
            taken.bytes >> 20,
            begun.elapsed().as_secs_f64()
        ));

        let before = self.backups()?.len();
        say(format_args!("  coffer prune --tenant {TENANT} --confirm"));
        let plan = self.coffer_json(&["prune", "--tenant", TENANT, "--confirm"])?;
        let mut kept: BTreeMap<String, u32> = BTreeMap::new();
        let mut months = Vec::new();
        let verdicts = plan["sources"][0]["tenants"][0]["backups"].as_array().cloned().unwrap_or_default();
        for b in verdicts.iter().filter(|b| b["keep"] == Value::Bool(true)) {
            for r in b["reasons"].as_array().into_iter().flatten() {
                let code = r["code"].as_str().unwrap_or("?").to_owned();
                if code == "monthly" {
                    months.push(b.clone());
                }
                *kept.entry(code).or_default() += 1;
            }
        }
        let why: Vec<String> = kept.iter().map(|(code, n)| format!("{code} {n}")).collect();
        let backups = self.backups()?;
        say(format_args!("  kept {} of {before} backups, for {} (some for several)", backups.len(), why.join(", ")));

        say(format_args!("  coffer list --tenant {TENANT}"));
        let listed = |id: &Value| backups.iter().any(|b| b["id"] == *id);
        for b in &months {
            say(format_args!("    {} {}, kept for its month", text(&b["kind"]), text(&b["point_time"])));
        }
        let there = months.iter().filter(|b| listed(&b["id"]) && b["kind"] == "archive").count();
        prove("every month of the year has an archive that stays", there == 12, format_args!("{there} months"))?;

        let chosen = &months[months.len() / 2];
        let day =
            taken.days.get(text(&chosen["id"])).copied().ok_or_else(|| Error::other("a backup that nobody made"))?;
        let (to, into) = (format!("backup:{}", text(&chosen["id"])), self.dir.join("half-a-year-ago"));
        say(format_args!(
            "  coffer restore --tenant {TENANT} --to {to} --mode files   # as of {}",
            text(&chosen["point_time"])
        ));
        let into_text = into.display().to_string();
        let args = [
            "restore", "--tenant", TENANT, "--to", &to, "--mode", "files", "--format", "jsonl", "--target", &into_text,
        ];
        self.coffer_json(&[&args[..], &["--confirm"]].concat())?;
        let rows = std::fs::read_to_string(into.join("public.pgbench_accounts.jsonl"))
            .context(Kind::Other, format_args!("no accounts in {into_text}"))?;
        let right = rows
            .lines()
            .filter(|l| serde_json::from_str::<Value>(l).is_ok_and(|r| r["abalance"].as_i64() == Some(day)));
        let right = right.count() as i64;
        prove(
            "the archive of half a year ago gives back every account as it was that day",
            right == ACCOUNTS && rows.lines().count() as i64 == ACCOUNTS,
            format_args!("{right} of {ACCOUNTS} accounts have the balance of day {day}"),
        )
    }

    /// A full at the end of each day, dated back.
    async fn fulls(&self) -> Result<Taken> {
        let config = Config::load(&self.config())?;
        let opened = Opened::for_writing(&config).await?;
        let (name, source) = opened.source(&config, None).await?;
        let tenant = opened.tenant((&name, source), &Tenant::normal(TENANT)).await?;
        let intent = Lease::intent(&opened.repo, source).await?;
        let mut history = opened.history(source).await?;
        let mut taken = Taken::default();
        for day in 1..=DAYS {
            history.load_catalog(tenant.uid).await?;
            let clock = Arc::new(Back(DAYS - day));
            let compactor = Compactor {
                repo: opened.repo.clone(),
                keyring: opened.keyring.clone(),
                rt: Handle::current(),
                clock,
                source,
                scratch: scratch(&config)?,
                memory: usize::try_from(config.limits.memory / 4).unwrap_or(usize::MAX),
                part_bytes: config.compact.part,
                share: false,
                watch: Watch::default(),
            };
            let point = history.resolve(&When::Name(format!("day {day}"))).await?;
            let occasion = Occasion::of_schedule();
            let full = compactor.take_full(&history, &tenant, &point, &occasion).await?;
            taken.bytes += full.bytes;
            taken.days.insert(full.id.to_string(), day);
        }
        intent.release().await;
        Ok(taken)
    }

    fn backups(&self) -> Result<Vec<Value>> {
        let list = self.coffer_json(&["list", "--tenant", TENANT])?;
        Ok(list["tenants"][0]["backups"].as_array().cloned().unwrap_or_default())
    }
}

#[derive(Default)]
struct Taken {
    bytes: u64,
    /// The day of each backup.
    days: BTreeMap<String, i64>,
}

fn text(v: &Value) -> &str {
    v.as_str().unwrap_or("?")
}

/// The customer joins; then a transaction for each day, which names its end.
fn days() -> [String; 2] {
    let joins = format!(
        "INSERT INTO pgbench_branches (bid, bbalance) VALUES ({TENANT}, 0);
         INSERT INTO pgbench_tellers (tid, bid, tbalance) SELECT 1000 + i, {TENANT}, 0 FROM generate_series(1, 10) i;
         INSERT INTO pgbench_accounts (aid, bid, abalance) SELECT 9000000 + i, {TENANT}, 0 FROM generate_series(1, {ACCOUNTS}) i"
    );
    let lives = format!(
        "DO $$BEGIN FOR day IN 1..{DAYS} LOOP
           UPDATE pgbench_accounts SET abalance = day WHERE aid > 9000000;
           INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (1001, {TENANT}, 9000001, 1, now());
           PERFORM coffer.restore_point('day ' || day);
           COMMIT;
         END LOOP; END$$"
    );
    [joins, lives]
}
