//! `coffer.toml`: plain structs, one `validate`, overrides from `COFFER_*`.
//!
//! `COFFER_SHIP__INTERVAL=5s` overrides `[ship] interval`: the section and the key are joined by two underscores.
//! Unknown keys are refused, in the file and in the environment. Secrets come from files, commands or the environment
//! and are never printed.

use crate::clock::parse_duration;
use crate::error::{Context, Error, Kind, Result};
use crate::schedule::Schedule;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the configuration is looked for without `--config`.
pub const DEFAULT_PATH: &str = "/etc/coffer/coffer.toml";

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// By name; the name is what `--source` takes.
    #[serde(default)]
    pub source: BTreeMap<String, SourceConfig>,
    #[serde(default)]
    pub store: Vec<StoreConfig>,
    pub keys: KeysConfig,
    #[serde(default)]
    pub ship: ShipConfig,
    #[serde(default)]
    pub rpo: RpoConfig,
    #[serde(default)]
    pub retention: RetentionConfig,
    #[serde(default)]
    pub schedule: ScheduleConfig,
    #[serde(default)]
    pub compact: CompactConfig,
    #[serde(default)]
    pub verify: VerifyConfig,
    #[serde(default)]
    pub limits: LimitsConfig,
    #[serde(default)]
    pub spool: SpoolConfig,
    #[serde(default)]
    pub status: StatusConfig,
    #[serde(default)]
    pub accounts: AccountsConfig,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// A libpq connection string or URL; may hold a password, so never printed whole.
    pub url: String,
    /// Default `coffer_<name>`.
    pub slot: Option<String>,
}

impl std::fmt::Debug for SourceConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceConfig").field("slot", &self.slot).finish_non_exhaustive()
    }
}

impl SourceConfig {
    pub fn slot_name(&self, source: &str) -> String {
        self.slot.clone().unwrap_or_else(|| format!("coffer_{source}"))
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    pub name: String,
    pub url: String,
    /// A required store holds the slot until it has the data; the others catch up on their own.
    #[serde(default = "yes")]
    pub required: bool,
    #[serde(default)]
    pub lock: LockMode,
}

fn yes() -> bool {
    true
}

/// Object Lock of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LockMode {
    #[default]
    None,
    Governance,
    Compliance,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeysConfig {
    pub provider: ProviderKind,
    /// `file`: the KEK's file (32 bytes, base64, mode 0600).
    pub path: Option<PathBuf>,
    /// `env`: the variable that holds the KEK, base64. Default `COFFER_KEK`.
    pub variable: Option<String>,
    /// `command`: program and arguments; it prints the KEK, base64.
    #[serde(default)]
    pub command: Vec<String>,
    /// Places of the keyring, store URLs; kept equal. Never under object lock.
    pub keyring: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProviderKind {
    File,
    Env,
    Command,
    Transit,
    AwsKms,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShipConfig {
    /// How often changes are shipped.
    #[serde(deserialize_with = "duration")]
    pub interval: Duration,
    /// Above this many object puts a second the interval is stretched, up to a third of `rpo.limit`.
    pub max_puts: u32,
}

impl Default for ShipConfig {
    fn default() -> Self {
        Self { interval: Duration::from_secs(10), max_puts: 500 }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RpoConfig {
    #[serde(deserialize_with = "duration")]
    pub limit: Duration,
}

impl Default for RpoConfig {
    fn default() -> Self {
        Self { limit: Duration::from_secs(300) }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Every point of this span up to now can be restored.
    #[serde(deserialize_with = "duration")]
    pub pitr: Duration,
    /// Of how many days, ISO weeks, months and years the last verified full is kept.
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
    pub annual: u32,
    /// How long fulls of the kinds manual, pre-migration and pre-maintenance are kept.
    #[serde(deserialize_with = "duration")]
    pub on_demand: Duration,
    /// How many years fulls of the kind compliance are kept.
    pub compliance_years: u32,
    /// Between the record of a removal and the removal: longer than any restore goes without a sign of life.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self {
            pitr: Duration::from_secs(7 * 86_400),
            daily: 30,
            weekly: 12,
            monthly: 12,
            annual: 7,
            on_demand: Duration::from_secs(30 * 86_400),
            compliance_years: 7,
            grace: Duration::from_secs(86_400),
        }
    }
}

/// Cron expressions, UTC.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    pub incremental: String,
    pub full: String,
    pub validate: String,
    /// What retention keeps no more is removed then; best some time after the fulls.
    pub prune: String,
    /// Every tenant is restored into a scratch database. Without it: weekly, if `[verify] drill_url` names a server for it.
    pub drill: Option<String>,
}

/// When tenants are restored into a scratch database, where a server is named for it and no time.
const DEFAULT_DRILL: &str = "0 6 * * 0";

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            incremental: "0 * * * *".into(),
            full: "0 2 * * *".into(),
            validate: "0 4 * * 0".into(),
            prune: "30 3 * * *".into(),
            drill: None,
        }
    }
}

impl ScheduleConfig {
    fn validate(&self) -> Result<()> {
        let all = [
            ("incremental", &self.incremental),
            ("full", &self.full),
            ("validate", &self.validate),
            ("prune", &self.prune),
        ];
        for (key, expression) in all.into_iter().chain(self.drill.as_ref().map(|d| ("drill", d))) {
            Schedule::parse(expression).map_err(|e| e.during(format_args!("[schedule] {key}")))?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompactConfig {
    /// Bytes of rows after which a part of a full ends: what is written anew when one row in it changes.
    #[serde(deserialize_with = "bytes")]
    pub part: u64,
}

impl Default for CompactConfig {
    fn default() -> Self {
        Self { part: crate::compact::DEFAULT_PART_BYTES }
    }
}

/// What is read back, compared and restored to see that it can be.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyConfig {
    /// Bytes that the scrub reads from the stores in a second, at most; 0: there is none.
    #[serde(deserialize_with = "bytes")]
    pub scrub_rate: u64,
    /// Everything is read back once in this time.
    #[serde(deserialize_with = "duration")]
    pub scrub_period: Duration,
    /// A server where restore drills make databases and drop them; it may hold a password, so it is never printed.
    pub drill_url: Option<String>,
}

impl std::fmt::Debug for VerifyConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut d = f.debug_struct("VerifyConfig");
        d.field("scrub_rate", &self.scrub_rate).field("scrub_period", &self.scrub_period).finish_non_exhaustive()
    }
}

impl Default for VerifyConfig {
    fn default() -> Self {
        Self { scrub_rate: 8 << 20, scrub_period: Duration::from_secs(30 * 86_400), drill_url: None }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Bound of the agent's buffers, all together.
    #[serde(deserialize_with = "bytes")]
    pub memory: u64,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { memory: 512 << 20 }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpoolConfig {
    /// Sealed; only for what outgrows memory. Emptied at start.
    pub dir: PathBuf,
}

impl Default for SpoolConfig {
    fn default() -> Self {
        Self { dir: "/var/lib/coffer/spool".into() }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StatusConfig {
    /// Address of `/metrics`, `/healthz` and the status page; empty: none.
    pub listen: String,
}

impl Default for StatusConfig {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9187".into() }
    }
}

/// What of tenants' roles is archived.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccountsConfig {
    /// Their password verifiers, too.
    pub passwords: bool,
}

fn duration<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    let s = String::deserialize(d)?;
    parse_duration(&s).map_err(serde::de::Error::custom)
}

fn bytes<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    let s = String::deserialize(d)?;
    parse_bytes(&s).map_err(serde::de::Error::custom)
}

/// A size as people write it: `512MiB`, `1GiB`, `64KiB`, `4096`.
pub fn parse_bytes(s: &str) -> Result<u64, String> {
    let bad = || format!("'{s}' is not a size; write for example 64KiB, 512MiB or 1GiB");
    let s2 = s.trim();
    let cut = s2.find(|c: char| !c.is_ascii_digit()).unwrap_or(s2.len());
    let n: u64 = s2[..cut].parse().map_err(|_| bad())?;
    let unit = match s2[cut..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1u64 << 30,
        _ => return Err(bad()),
    };
    n.checked_mul(unit).ok_or_else(bad)
}

/// The shortest time between a removal's record and its deletions: a restore that began before the record has put its
/// lease by then. Tests need not wait.
const MIN_GRACE: Duration = if cfg!(feature = "failpoints") { Duration::ZERO } else { Duration::from_secs(3600) };

/// Why a grace is refused, if it is.
pub fn check_grace(grace: Duration) -> Result<(), String> {
    if grace >= MIN_GRACE { Ok(()) } else { Err("at least 1h: restores that run may still read what goes".into()) }
}

impl Config {
    /// Reads the file, applies the environment, validates.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .context(Kind::Usage, format_args!("cannot read the configuration {}", path.display()))
            .map_err(|e| e.hint("name it with --config FILE, or create /etc/coffer/coffer.toml (see README)"))?;
        Self::from_text(&text, std::env::vars()).map_err(|e| e.during(path.display()))
    }

    /// The same from text, with an environment of the caller's.
    pub fn from_text(text: &str, env: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let mut table: toml::Table =
            toml::from_str(text).context(Kind::Usage, "the configuration is not valid TOML")?;
        for (name, value) in env {
            let Some(path) = name.strip_prefix("COFFER_") else { continue };
            // One underscore pair separates section and key; other COFFER_ variables are not ours to judge.
            let Some((section, key)) = path.split_once("__") else { continue };
            set(&mut table, &section.to_lowercase(), &key.to_lowercase(), &value)
                .map_err(|e| e.during(format_args!("environment variable {name}")))?;
        }
        let config: Self = table.try_into().context(Kind::Usage, "the configuration is refused")?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        let mut names = std::collections::BTreeSet::new();
        for s in &self.store {
            if s.name.is_empty() || !s.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
                return Err(Error::usage(format!("store name '{}': use letters, digits, '-' and '_'", s.name)));
            }
            if !names.insert(&s.name) {
                return Err(Error::usage(format!("two stores are named '{}'", s.name)));
            }
            if s.lock != LockMode::None {
                return Err(Error::usage(format!("store '{}': this version sets no Object Lock dates", s.name))
                    .hint("remove `lock`, and let the bucket's own default retention lock what is written"));
            }
        }
        if !self.store.is_empty() && !self.store.iter().any(|s| s.required) {
            return Err(Error::usage("no [[store]] is required: nothing would ever be durable; set required = true"));
        }
        for name in self.source.keys() {
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') {
                return Err(Error::usage(format!(
                    "source name '{name}': use lower-case letters, digits and '_' (it names the slot too)"
                )));
            }
        }
        if self.keys.keyring.is_empty() {
            return Err(Error::usage(
                "[keys] keyring is empty: name at least one place, for example file:///var/lib/coffer/keyring",
            ));
        }
        let need = |ok: bool, what: &str| if ok { Ok(()) } else { Err(Error::usage(what)) };
        match self.keys.provider {
            ProviderKind::File => need(self.keys.path.is_some(), "[keys] provider = \"file\" needs path")?,
            ProviderKind::Command => {
                need(!self.keys.command.is_empty(), "[keys] provider = \"command\" needs command")?
            }
            ProviderKind::Env => {}
            ProviderKind::Transit | ProviderKind::AwsKms => {
                return Err(Error::usage("[keys] this version knows the providers file, env and command"));
            }
        }
        need(self.ship.interval >= Duration::from_millis(100), "[ship] interval: at least 100ms")?;
        need(self.rpo.limit >= self.ship.interval, "[rpo] limit is below [ship] interval: it could never be met")?;
        need(self.verify.scrub_period >= Duration::from_secs(1), "[verify] scrub_period: at least 1s")?;
        need(self.limits.memory >= 64 << 20, "[limits] memory: at least 64MiB")?;
        let policy = crate::retention::Policy::from(&self.retention).validate();
        policy.map_err(|e| Error::usage(format!("[retention] {e}")))?;
        check_grace(self.retention.grace).map_err(|e| Error::usage(format!("[retention] grace: {e}")))?;
        self.schedule.validate()
    }

    /// When tenants are restored into a scratch database; `None`: only when somebody asks.
    pub fn drill_schedule(&self) -> Option<&str> {
        let by_default = self.verify.drill_url.as_ref().map(|_| DEFAULT_DRILL);
        self.schedule.drill.as_deref().or(by_default)
    }

    /// The source a verb acts on.
    pub fn pick_source(&self, name: Option<&str>) -> Result<(&str, &SourceConfig)> {
        match name {
            Some(n) => self.source.get_key_value(n).map(|(k, v)| (k.as_str(), v)).ok_or_else(|| {
                Error::usage(format!("no [source.{n}] in the configuration; there is: {}", self.source_names()))
            }),
            None if self.source.len() == 1 => {
                let (k, v) = self.source.iter().next().expect("one source");
                Ok((k, v))
            }
            None if self.source.is_empty() => Err(Error::usage("the configuration has no [source.NAME] section")),
            None => Err(Error::usage(format!(
                "several sources are configured ({}): add --source NAME",
                self.source_names()
            ))),
        }
    }

    fn source_names(&self) -> String {
        self.source.keys().cloned().collect::<Vec<_>>().join(", ")
    }
}

/// Sets `[section] key` (for sources `source.NAME`: the section is written SOURCE__NAME__KEY). The value keeps the type
/// that TOML would give it, else it is a string.
fn set(table: &mut toml::Table, section: &str, key: &str, value: &str) -> Result<()> {
    let entry = table.entry(section.to_owned()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    let toml::Value::Table(t) = entry else {
        return Err(Error::usage(format!("[{section}] cannot be overridden")));
    };
    if let Some((first, rest)) = key.split_once("__") {
        return set(t, first, rest, value);
    }
    let typed = match value.parse::<i64>() {
        Ok(n) => toml::Value::Integer(n),
        Err(_) => match value {
            "true" => toml::Value::Boolean(true),
            "false" => toml::Value::Boolean(false),
            _ if value.starts_with('[') => toml::from_str::<toml::Table>(&format!("v = {value}"))
                .ok()
                .and_then(|mut t| t.remove("v"))
                .unwrap_or_else(|| toml::Value::String(value.to_owned())),
            _ => toml::Value::String(value.to_owned()),
        },
    };
    t.insert(key.to_owned(), typed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"
        [source.shop]
        url = "postgres://localhost/shop"
        [[store]]
        name = "a"
        url = "file:///tmp/a"
        [keys]
        provider = "file"
        path = "/tmp/kek"
        keyring = ["file:///tmp/k"]
    "#;

    fn load(text: &str, env: &[(&str, &str)]) -> Result<Config> {
        Config::from_text(text, env.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())))
    }

    #[test]
    fn defaults_are_the_designs() {
        let c = load(MINIMAL, &[]).unwrap();
        assert_eq!(c.ship.interval, Duration::from_secs(10));
        assert_eq!(c.rpo.limit, Duration::from_secs(300));
        assert_eq!(c.limits.memory, 512 << 20);
        assert_eq!(c.pick_source(None).unwrap().1.slot_name("shop"), "coffer_shop");
    }

    #[test]
    fn the_environment_overrides_and_misspelling_is_refused() {
        let c = load(MINIMAL, &[("COFFER_SHIP__INTERVAL", "5s"), ("COFFER_SOURCE__SHOP__SLOT", "x")]).unwrap();
        assert_eq!(c.ship.interval, Duration::from_secs(5));
        assert_eq!(c.pick_source(None).unwrap().1.slot_name("shop"), "x");
        assert!(load(MINIMAL, &[("COFFER_SHIP__INTREVAL", "5s")]).is_err());
        assert!(load(&MINIMAL.replace("provider", "provder"), &[]).is_err());
        assert!(load(&MINIMAL.replace("name = \"a\"", "name = \"a\"\nlock = \"none\""), &[]).is_ok());
        assert!(load(&MINIMAL.replace("name = \"a\"", "name = \"a\"\nlock = \"compliance\""), &[]).is_err());
        assert!(load(&MINIMAL.replace("name = \"a\"", "name = \"a\"\nrequired = false"), &[]).is_err());
    }

    #[test]
    fn retention_and_schedules_are_the_designs_and_checked() {
        let c = load(MINIMAL, &[]).unwrap();
        let r = &c.retention;
        assert_eq!((r.pitr.as_secs(), r.daily, r.weekly, r.monthly, r.annual), (7 * 86_400, 30, 12, 12, 7));
        assert!(load(MINIMAL, &[("COFFER_SCHEDULE__FULL", "*/10 * * * *")]).is_ok());
        for (key, value, says) in [
            ("COFFER_SCHEDULE__FULL", "every day", "[schedule] full"),
            ("COFFER_SCHEDULE__PRUNE", "0 0 31 4 *", "never comes"),
            ("COFFER_SCHEDULE__FULLS", "0 2 * * *", "fulls"),
            ("COFFER_RETENTION__PITR", "40000d", "[retention] pitr"),
            ("COFFER_RETENTION__DAILY", "-1", "daily"),
            ("COFFER_RETENTION__HOURLY", "24", "hourly"),
        ] {
            let e = load(MINIMAL, &[(key, value)]).unwrap_err();
            assert!(e.to_string().contains(says), "{key}={value}: {e}");
        }
    }

    #[test]
    fn a_password_is_not_in_the_debug_text() {
        let c = load(&MINIMAL.replace("postgres://localhost", "postgres://u:hunter2@localhost"), &[]).unwrap();
        assert!(!format!("{c:?}").contains("hunter2"));
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert!(parse_bytes("512 MB").is_err());
    }
}
