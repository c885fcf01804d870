//! What is kept, for how long: `[retention]` of the configuration, and a tenant's own policy over it.

use crate::clock::parse_duration;
use crate::config::RetentionConfig;
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;

/// Longest recovery window and longest keeping of a backup on demand: further back no clock was right.
const MAX_SPAN: Duration = Duration::from_secs(100 * 366 * 86_400);
/// Most periods of a rule.
const MAX_PERIODS: u32 = 100_000;
const MAX_YEARS: u32 = 100;

/// How long a tenant's backups are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Every point of this span up to now can be restored.
    pub pitr: Duration,
    /// Of how many days, ISO weeks, months and years the last verified full is kept.
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
    pub annual: u32,
    /// How long fulls of the kinds manual, pre-migration and pre-maintenance are kept.
    pub on_demand: Duration,
    /// How many years fulls of the kind compliance are kept.
    pub compliance_years: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self::from(&RetentionConfig::default())
    }
}

impl From<&RetentionConfig> for Policy {
    fn from(c: &RetentionConfig) -> Self {
        Self {
            pitr: c.pitr,
            daily: c.daily,
            weekly: c.weekly,
            monthly: c.monthly,
            annual: c.annual,
            on_demand: c.on_demand,
            compliance_years: c.compliance_years,
        }
    }
}

/// A policy as `coffer.set_policy` takes it: what it does not say is the default's.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    pitr: Option<String>,
    daily: Option<u32>,
    weekly: Option<u32>,
    monthly: Option<u32>,
    annual: Option<u32>,
    on_demand: Option<String>,
    compliance_years: Option<u32>,
}

impl Policy {
    /// A tenant's policy, written as JSON (`{"pitr": "14d", "daily": 60}`), over the default one.
    ///
    /// # Errors
    /// `Usage`: a key is unknown, or a value is none that the key takes.
    pub fn parse(written: &Value, default: &Self) -> Result<Self> {
        let refused = |why: String| {
            Error::usage(format!("the policy {written} is refused: {why}")).hint(
                "keys: pitr and on_demand (\"14d\"), daily, weekly, monthly, annual and compliance_years (numbers)",
            )
        };
        let w: Written = serde_json::from_value(written.clone()).map_err(|e| refused(e.to_string()))?;
        let span = |text: Option<String>, default| text.map_or(Ok(default), |t| parse_duration(&t));
        let policy = Self {
            pitr: span(w.pitr, default.pitr).map_err(&refused)?,
            daily: w.daily.unwrap_or(default.daily),
            weekly: w.weekly.unwrap_or(default.weekly),
            monthly: w.monthly.unwrap_or(default.monthly),
            annual: w.annual.unwrap_or(default.annual),
            on_demand: span(w.on_demand, default.on_demand).map_err(&refused)?,
            compliance_years: w.compliance_years.unwrap_or(default.compliance_years),
        };
        policy.validate().map_err(refused)?;
        Ok(policy)
    }

    /// Why it cannot be, if it cannot.
    pub fn validate(&self) -> std::result::Result<(), String> {
        for (key, span) in [("pitr", self.pitr), ("on_demand", self.on_demand)] {
            if span > MAX_SPAN {
                return Err(format!("{key} is longer than a hundred years"));
            }
        }
        let rules =
            [("daily", self.daily), ("weekly", self.weekly), ("monthly", self.monthly), ("annual", self.annual)];
        if let Some((key, n)) = rules.iter().find(|(_, n)| *n > MAX_PERIODS) {
            return Err(format!("{key} = {n} is above {MAX_PERIODS}"));
        }
        if self.compliance_years > MAX_YEARS {
            return Err(format!("compliance_years = {} is above {MAX_YEARS}", self.compliance_years));
        }
        Ok(())
    }

    /// All of it, as [`Self::parse`] reads it.
    pub fn to_json(&self) -> Value {
        json!({"pitr": span_text(self.pitr), "daily": self.daily, "weekly": self.weekly, "monthly": self.monthly,
            "annual": self.annual, "on_demand": span_text(self.on_demand), "compliance_years": self.compliance_years})
    }
}

/// A span as [`parse_duration`] reads it.
pub(super) fn span_text(d: Duration) -> String {
    let ms = d.as_millis();
    let units = [("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)];
    match units.iter().find(|(_, n)| ms != 0 && ms.is_multiple_of(*n)) {
        Some((unit, n)) => format!("{}{unit}", ms / n),
        None => format!("{ms}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenants_policy_says_what_differs() {
        let default = Policy::default();
        assert_eq!(Policy::parse(&json!({}), &default).unwrap(), default);
        let p = Policy::parse(&json!({"pitr": "14d", "daily": 60}), &default).unwrap();
        assert_eq!((p.pitr, p.daily, p.weekly), (Duration::from_secs(14 * 86_400), 60, 12));
        assert_eq!(Policy::parse(&p.to_json(), &default).unwrap(), p);
        let odd = Policy { pitr: Duration::from_millis(90_500), on_demand: Duration::ZERO, ..p };
        assert_eq!(Policy::parse(&odd.to_json(), &default).unwrap(), odd);
    }

    #[test]
    fn what_is_not_understood_is_refused_and_named() {
        let default = Policy::default();
        for (bad, says) in [
            (json!({"dayly": 60}), "dayly"),
            (json!({"daily": -1}), "-1"),
            (json!({"daily": 1.5}), "1.5"),
            (json!({"pitr": "2 weeks ago"}), "2 weeks ago"),
            (json!({"pitr": 14}), "14"),
            (json!({"pitr": "99999d"}), "hundred years"),
            (json!({"weekly": 1_000_000}), "above"),
            (json!({"compliance_years": 101}), "above"),
            (json!([]), "[]"),
            (json!("30d"), "30d"),
        ] {
            let e = Policy::parse(&bad, &default).unwrap_err();
            assert!(e.to_string().contains(says), "{bad}: {e}");
        }
    }
}
