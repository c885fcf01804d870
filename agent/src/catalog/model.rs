//! What a tenant's catalog says (FORMAT.md, "Catalog").
//!
//! A record is JSON inside a sealed container under the repository's key: it names uids, never a tenant's key. Fields are
//! only added; an entry that a reader does not know is an error, because skipping it could mean removing what it holds.

use super::floor::Floor;
use crate::repository::ObjectRef;
use crate::repository::model::{DatabaseLocale, SequenceState, lsn_text};
use coffer_wire::Lsn;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use uuid::Uuid;

/// Version of the records' content.
pub const CATALOG_VERSION: u32 = 1;
/// Every record with a number that this divides carries the state before it, so that readers begin there.
pub const STATE_EVERY: u64 = 64;
/// `what` of a check that read back what a backup consists of.
pub const READ_BACK: &str = "read_back";
/// How many of the fulls that were removed a state remembers.
pub const MOST_GONE: usize = 256;

/// One record of a tenant's catalog.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CatalogRecord {
    pub v: u32,
    /// From 0, without gaps.
    pub n: u64,
    /// SHA-256 (hexadecimal) of the object that holds record n-1; `None` for record 0.
    pub prev: Option<String>,
    pub source: Uuid,
    /// The tenant's uid.
    pub tenant: Uuid,
    /// The process that wrote it: random at its start.
    pub writer: Uuid,
    /// The writer's clock, microseconds since 1970-01-01 UTC.
    pub at_us: i64,
    pub body: Entry,
    /// What the records before this one come to; in every [`STATE_EVERY`]th record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
}

/// What a record records.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "records are few, and read one after another")]
pub enum Entry {
    Full(FullEntry),
    Incremental(IncrementalEntry),
    /// A legal hold: nothing goes that is needed to restore to a point between the two times.
    Hold {
        id: Uuid,
        /// Of `coffer.hold`; 0: from the command line.
        number: i64,
        reason: String,
        from_us: Option<i64>,
        to_us: Option<i64>,
        by: String,
        /// When it is over by itself; `None`: when somebody releases it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until_us: Option<i64>,
    },
    Release {
        id: Uuid,
        by: String,
    },
    Verified {
        /// Or the uid of an object that is in no backup.
        backup: Uuid,
        ok: bool,
        /// `read_back`, `live`, `drill`.
        what: String,
        message: Option<String>,
    },
    /// The tenant's own retention policy from here on.
    Policy {
        policy: serde_json::Value,
        by: String,
    },
    /// These backups no longer count, and these objects go after the time: exact names, nothing else.
    Removal {
        backups: Vec<Uuid>,
        objects: Vec<ObjectRef>,
        not_before_us: i64,
        reasons: Vec<String>,
        /// The tenant's changes of the log up to there are among what goes, or went before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        floor: Option<Floor>,
        /// The same of what concerns every tenant; by the catalog of the reserved tenant `shared` only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        commons: Option<Floor>,
    },
    /// The objects of that removal are gone from every store.
    Removed {
        removal: u64,
    },
}

/// A table of a full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FullTable {
    pub relid: u32,
    /// Qualified and quoted as SQL needs it.
    pub name: String,
    /// `None` where the log does not note it.
    pub class: Option<String>,
    /// Of the tenant.
    pub rows: u64,
}

/// Every row of the tenant at one point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(Default))]
pub struct FullEntry {
    pub id: Uuid,
    /// `schedule`, `manual`, `pre-migration`, `pre-maintenance`, `incident`, `compliance`, `archive`.
    pub trigger: String,
    pub reason: Option<String>,
    /// Transactions with `end_lsn` at or below it are in.
    #[serde(with = "lsn_text")]
    pub point_lsn: Lsn,
    /// The source's clock there, microseconds since 1970-01-01 UTC.
    pub point_time_us: i64,
    /// The newest record of the commit log that it was made from.
    pub log_n: u64,
    pub system_identifier: u64,
    pub timeline: u32,
    pub tables: Vec<FullTable>,
    /// Which parts of which objects the rows are in; `None`: no rows.
    pub manifest: Option<ObjectRef>,
    /// Every object with rows that the manifest refers to, older fulls' too.
    pub objects: Vec<ObjectRef>,
    pub schema: Option<ObjectRef>,
    pub roles: Option<ObjectRef>,
    #[serde(default)]
    pub sequences: Vec<SequenceState>,
    pub database: Option<DatabaseLocale>,
    pub rows: u64,
    /// Sealed bytes that were written for it.
    pub bytes: u64,
    /// When it was read back and was what had been written.
    pub read_back_us: Option<i64>,
    /// Of an archive: its document first, then what it has beside what is named above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub archive: Vec<ObjectRef>,
}

impl FullEntry {
    /// As lists call it.
    pub fn kind(&self) -> &'static str {
        if self.trigger == "archive" { "archive" } else { "full" }
    }

    /// Everything in the stores that it needs.
    pub fn needs(&self) -> impl Iterator<Item = &ObjectRef> {
        self.objects.iter().chain(&self.manifest).chain(&self.schema).chain(&self.roles).chain(&self.archive)
    }
}

/// The net changes of a span.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncrementalEntry {
    pub id: Uuid,
    /// Exclusive.
    #[serde(with = "lsn_text")]
    pub from_lsn: Lsn,
    /// Inclusive; a commit boundary.
    #[serde(with = "lsn_text")]
    pub to_lsn: Lsn,
    pub to_time_us: i64,
    /// As of [`FullEntry::log_n`].
    pub log_n: u64,
    /// `None`: nothing changed.
    pub object: Option<ObjectRef>,
    pub rows: u64,
    pub bytes: u64,
    /// As of [`FullEntry::read_back_us`].
    #[serde(default)]
    pub read_back_us: Option<i64>,
}

/// A hold that was not released.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub id: Uuid,
    pub number: i64,
    pub reason: String,
    pub from_us: Option<i64>,
    pub to_us: Option<i64>,
    pub by: String,
    pub at_us: i64,
    /// Number of its record; 0 where a state is from before it was kept.
    #[serde(default)]
    pub n: u64,
    /// As in its record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_us: Option<i64>,
}

impl Hold {
    /// Whether it is over by itself.
    pub fn is_over(&self, now_us: i64) -> bool {
        self.until_us.is_some_and(|until| until <= now_us)
    }
}

/// The newest of each kind of check of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub backup: Uuid,
    pub what: String,
    pub ok: bool,
    pub message: Option<String>,
    pub at_us: i64,
}

/// A removal whose objects may still be there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// Number of its record.
    pub n: u64,
    pub backups: Vec<Uuid>,
    pub objects: Vec<ObjectRef>,
    pub not_before_us: i64,
    /// When it was recorded.
    #[serde(default)]
    pub at_us: i64,
}

/// What the records come to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// In the order in which they were recorded.
    pub fulls: Vec<FullEntry>,
    pub incrementals: Vec<IncrementalEntry>,
    pub holds: Vec<Hold>,
    pub checks: Vec<Check>,
    pub policy: Option<serde_json::Value>,
    pub removals: Vec<Removal>,
    /// Fulls that somebody released: what their trigger alone would hold goes like any other.
    #[serde(default)]
    pub released: Vec<Uuid>,
    /// Fulls that were removed, the newest [`MOST_GONE`]: who asks for one learns that it was there.
    #[serde(default)]
    pub gone: Vec<Uuid>,
    /// The tenant's changes of the log up to there are gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<Floor>,
    /// What concerned every tenant up to there is gone; in the catalog of the reserved tenant `shared`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commons: Option<Floor>,
}

impl State {
    /// Takes the next record in.
    pub fn apply(&mut self, r: &CatalogRecord) {
        match r.body.clone() {
            Entry::Full(f) => self.fulls.push(f),
            Entry::Incremental(i) => self.incrementals.push(i),
            Entry::Hold { id, number, reason, from_us, to_us, by, until_us } => {
                self.holds.retain(|h| h.id != id);
                self.holds.push(Hold { id, number, reason, from_us, to_us, by, at_us: r.at_us, n: r.n, until_us });
            }
            Entry::Release { id, .. } => self.release(id),
            Entry::Verified { backup, ok, what, message } => {
                self.checks.retain(|c| c.backup != backup || c.what != what);
                self.checks.push(Check { backup, what, ok, message, at_us: r.at_us });
            }
            Entry::Policy { policy, .. } => self.policy = Some(policy),
            Entry::Removal { backups, objects, not_before_us, floor, commons, .. } => {
                self.floor = floor.or(self.floor);
                // Who knew less of the log lowers nothing.
                if let Some(new) = commons
                    && self.commons.is_none_or(|old| old.log_n <= new.log_n)
                {
                    self.commons = Some(new);
                }
                self.gone.extend(self.fulls.iter().map(|f| f.id).filter(|id| backups.contains(id)));
                self.gone.drain(..self.gone.len().saturating_sub(MOST_GONE));
                self.fulls.retain(|f| !backups.contains(&f.id));
                self.incrementals.retain(|i| !backups.contains(&i.id));
                let going: HashSet<Uuid> = objects.iter().map(|o| o.object).chain(backups.iter().copied()).collect();
                self.checks.retain(|c| !going.contains(&c.backup));
                self.released.retain(|id| !backups.contains(id));
                self.removals.push(Removal { n: r.n, backups, objects, not_before_us, at_us: r.at_us });
            }
            Entry::Removed { removal } => self.removals.retain(|x| x.n != removal),
        }
    }

    /// Ends a hold; with one of a bounded span, what incidents documented in it, unless it was to end by itself. The id may
    /// be an incident's full itself.
    fn release(&mut self, id: Uuid) {
        let hold = self.holds.iter().find(|h| h.id == id && h.until_us.is_none());
        let span = hold.and_then(|h| Some(h.from_us?..=h.to_us?));
        self.holds.retain(|h| h.id != id);
        let inside = |f: &&FullEntry| f.id == id || span.as_ref().is_some_and(|s| s.contains(&f.point_time_us));
        let incidents = self.fulls.iter().filter(|f| f.trigger == "incident").filter(inside).map(|f| f.id);
        self.released.extend(incidents);
        self.released.sort_unstable();
        self.released.dedup();
    }

    /// Every object that something needs which counts; some more than once.
    pub fn objects(&self) -> impl Iterator<Item = &ObjectRef> {
        let of_incrementals = self.incrementals.iter().filter_map(|i| i.object.as_ref());
        self.fulls.iter().flat_map(FullEntry::needs).chain(of_incrementals)
    }

    /// Whether a backup was as it was written when it was last read back; `None`: no check says. Other checks are of the
    /// tenant as a whole, and noted with a full that is no worse for what they found.
    pub fn read_back(&self, backup: Uuid) -> Option<bool> {
        self.checks.iter().find(|c| c.backup == backup && c.what == READ_BACK).map(|c| c.ok)
    }

    /// The full of this id.
    pub fn full(&self, id: Uuid) -> Option<&FullEntry> {
        self.fulls.iter().find(|f| f.id == id)
    }
}
