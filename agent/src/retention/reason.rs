//! Why something is kept or removed: a word for programs, a sentence for people.

use super::Trigger;
use super::policy::span_text;
use crate::clock::rfc3339;
use std::fmt;
use std::time::Duration;
use uuid::Uuid;

/// A rule of calendar periods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    Daily,
    Weekly,
    Monthly,
    Annual,
}

impl Rule {
    pub const ALL: [Self; 4] = [Self::Daily, Self::Weekly, Self::Monthly, Self::Annual];

    pub fn name(self) -> &'static str {
        match self {
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Annual => "annual",
        }
    }
}

/// One reason of a verdict. The last ones are of what goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Points of the recovery window are restored from it.
    Window { pitr: Duration },
    /// The last verified full of a period.
    Period { rule: Rule, period: String },
    /// The period has no verified full, and this is its last one.
    Unverified { rule: Rule, period: String },
    /// The oldest full, while the rule has found fewer periods than it asks for.
    Oldest { rule: Rule, found: u32, asked: u32 },
    /// The last good full, or the last full if none is good.
    Last,
    /// Somebody asked for it.
    OnDemand { trigger: Trigger, until_us: i64 },
    /// It documents an incident and was not released.
    Incident,
    /// A legal hold needs it.
    Held { hold: Uuid, reason: String },
    /// A restore is running that may be reading it.
    Running { restore: Uuid, until_us: i64 },
    /// It is dated in the future.
    Future,
    /// Readers of the log expect it.
    Log,
    /// What is kept of the log is restored from it.
    Floor,
    /// Of the log: the full that everything is restored from is above it.
    BelowFloor,
    /// No rule keeps it.
    Expired { pitr: Duration },
    /// It was found damaged, and no rule keeps it.
    Damaged,
    /// It cannot be restored from, and no rule keeps it.
    Abandoned,
}

impl Reason {
    /// A stable word.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Window { .. } => "recovery_window",
            Self::Period { rule, .. } => rule.name(),
            Self::Unverified { .. } => "unverified",
            Self::Oldest { .. } => "oldest",
            Self::Last => "last",
            Self::OnDemand { .. } => "on_demand",
            Self::Incident => "incident",
            Self::Held { .. } => "held",
            Self::Running { .. } => "restore_running",
            Self::Future => "future",
            Self::Log => "log",
            Self::Floor => "floor",
            Self::BelowFloor => "below_floor",
            Self::Expired { .. } => "expired",
            Self::Damaged => "damaged",
            Self::Abandoned => "abandoned",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Window { pitr } => write!(f, "needed by the recovery window of {}", span_text(*pitr)),
            Self::Period { rule, period } => write!(f, "{}: the last verified full of {period}", rule.name()),
            Self::Unverified { rule, period } => {
                write!(f, "{}: the last full of {period}, which has none that is verified", rule.name())
            }
            Self::Oldest { rule, found, asked } => {
                write!(f, "the oldest, while the {} rule has {found} of {asked}", rule.name())
            }
            Self::Last => f.write_str("the last good full"),
            Self::OnDemand { trigger, until_us } => write!(f, "{}: kept until {}", trigger.name(), rfc3339(*until_us)),
            Self::Incident => f.write_str("incident: kept until it is released"),
            Self::Held { hold, reason } => write!(f, "held by {hold}: {reason}"),
            Self::Running { restore, until_us } => {
                write!(f, "restore {restore} is running")?;
                if *until_us < i64::MAX { write!(f, " (its lease ends {})", rfc3339(*until_us)) } else { Ok(()) }
            }
            Self::Future => f.write_str("dated in the future: one of the clocks is or was wrong, look at it"),
            Self::Log => f.write_str("needed by the log"),
            Self::Floor => f.write_str("the log's changes that are kept are restored from it"),
            Self::BelowFloor => f.write_str("below the full that all points which are needed are restored from"),
            Self::Expired { pitr } => {
                write!(f, "older than the recovery window of {}, and no rule keeps it", span_text(*pitr))
            }
            Self::Damaged => f.write_str("found damaged, and no rule keeps it"),
            Self::Abandoned => f.write_str("on a timeline that was left, and no rule keeps it"),
        }
    }
}
