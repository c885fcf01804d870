//! What of a tenant's backups is kept, and why: a planner without I/O, with the time injected.
//!
//! [`Input`] is what the catalog and the log say of one tenant, [`plan`] the verdict on each item. Acting on it is
//! [`crate::prune`]'s.
//!
//! Invariants (each is a property in the tests):
//! - every item has a verdict, every verdict a reason;
//! - every point of the recovery window, and of every hold, that could be restored before can be restored after;
//! - changes of the log go only below the floor: the point of a full that stays, from which everything that has to be
//!   restorable point by point is;
//! - the last good full is never removed; an object goes only when no item that is kept, and no record of the log,
//!   names it;
//! - the same input gives the same plan; planning what a plan left removes nothing more; a policy that asks for more
//!   removes no more;
//! - what is dated in the future is left alone: a clock was wrong, and which one nobody knows.
//!
//! The rules of calendar periods are those that users of restic know (`restic forget`): periods of UTC, the newest
//! verified full of each, counted over the periods that have one, and the oldest full while a rule has found fewer
//! than it asks for.

mod calendar;
mod plan;
mod policy;
mod reason;
#[cfg(test)]
mod tests;

pub use calendar::is_same_month;
pub use plan::{Plan, Verdict, plan};
pub use policy::Policy;
pub use reason::{Reason, Rule};

use crate::repository::ObjectRef;
use coffer_wire::Lsn;
use uuid::Uuid;

/// A point further in the future than this is not believed, in microseconds.
pub const FUTURE_US: i64 = 5 * 60 * 1_000_000;

/// Why a full was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// By schedule, or because a base was needed.
    Schedule,
    /// Complete by itself: it stands for its month and year before others.
    Archive,
    Manual,
    PreMigration,
    PreMaintenance,
    /// Held until it is released.
    Incident,
    /// Kept for the years of the policy.
    Compliance,
}

impl Trigger {
    /// As the catalog writes it. What is not known is treated like a scheduled one: the rules keep it.
    pub fn parse(s: &str) -> Self {
        match s {
            "archive" => Self::Archive,
            "manual" => Self::Manual,
            "pre-migration" => Self::PreMigration,
            "pre-maintenance" => Self::PreMaintenance,
            "incident" => Self::Incident,
            "compliance" => Self::Compliance,
            _ => Self::Schedule,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Schedule => "schedule",
            Self::Archive => "archive",
            Self::Manual => "manual",
            Self::PreMigration => "pre-migration",
            Self::PreMaintenance => "pre-maintenance",
            Self::Incident => "incident",
            Self::Compliance => "compliance",
        }
    }

    /// Asked for by somebody, with a retention of its own.
    fn on_demand(self) -> bool {
        !matches!(self, Self::Schedule | Self::Archive)
    }
}

/// What is known of a full's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Read back, authenticated, equal.
    Verified,
    /// Not read back yet.
    Unchecked,
    /// Found damaged: it stands for nothing.
    Failed,
    /// Its point is on a timeline that the log has left: it stands for nothing.
    Abandoned,
}

impl Check {
    /// Whether it can stand for its period.
    fn is_usable(self) -> bool {
        matches!(self, Self::Verified | Self::Unchecked)
    }
}

/// A full of the catalog.
#[derive(Clone, Debug)]
pub struct Full {
    pub id: Uuid,
    pub point: Lsn,
    /// By the source's clock, microseconds since 1970-01-01 UTC.
    pub point_us: i64,
    pub check: Check,
    pub trigger: Trigger,
    /// Somebody released it: a trigger that holds does so no more.
    pub released: bool,
    /// Every table whose rows are known at its point is in it: from there on nothing older is needed.
    pub whole: bool,
    /// Rows of a table that are known at its point are not in it, but in the log: to restore it takes older changes.
    pub needs_log: bool,
    /// All that it refers to, objects of older fulls among them.
    pub objects: Vec<ObjectRef>,
}

impl Full {
    /// Whether its point is, or may have to be, restored from an older full and changes of the log.
    fn leans_on_log(&self) -> bool {
        match self.check {
            Check::Verified => self.needs_log,
            Check::Unchecked | Check::Failed => true,
            Check::Abandoned => false,
        }
    }
}

/// What kind of changes a [`Changes`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangesKind {
    /// Of the catalog.
    Incremental,
    /// Of a record of the log.
    Changeset,
}

/// The tenant's changes after one position, up to and including another.
#[derive(Clone, Debug)]
pub struct Changes {
    pub id: Uuid,
    pub kind: ChangesKind,
    pub from: Lsn,
    pub to: Lsn,
    /// The source's clock at `to`.
    pub to_us: i64,
    pub objects: Vec<ObjectRef>,
}

/// The tenant's part of a base.
#[derive(Clone, Debug)]
pub struct Based {
    /// The highest of its tables' cuts.
    pub cut: Lsn,
    pub object: ObjectRef,
}

/// A legal hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    pub id: Uuid,
    pub reason: String,
    /// Every point between the two stays; without one, there is no end on that side.
    pub from_us: Option<i64>,
    pub to_us: Option<i64>,
}

/// A restore that may be reading anything of the tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    pub id: Uuid,
    pub until_us: i64,
}

/// What a plan is made from.
#[derive(Clone, Debug)]
pub struct Input {
    pub now_us: i64,
    pub policy: Policy,
    pub fulls: Vec<Full>,
    pub changes: Vec<Changes>,
    pub holds: Vec<Hold>,
    pub running: Vec<Running>,
    /// What the tenant's bases hold that is not gone.
    pub bases: Vec<Based>,
    /// Up to where changes of the log are gone already.
    pub floor: Option<Lsn>,
    /// The recovery window begins here or earlier: who began to read or to write since may count on what was there.
    pub settled_us: i64,
    /// The same by position, where a clock that stepped back would mislead; [`Lsn::MAX`]: anywhere.
    pub settled: Lsn,
    /// Paths of other objects that records of the log name, and readers of it expect.
    pub named_by_log: std::sync::Arc<std::collections::HashSet<String>>,
}
