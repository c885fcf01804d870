//! What a restore is asked for, and what it says it did.

use super::files::{self, Format};
use super::large_objects::Found;
use crate::clock::rfc3339;
use crate::dsn::Dsn;
use crate::error::Result;
use crate::history::{Target, When};
use crate::merge::Scratch;
use crate::opened::Opened;
use crate::restore::keys::RowKey;
use crate::restore::once::OfJob;
use crate::restore::rename::{As, Rename};
use crate::restore::sink::{Selection, Watch};
use crate::restore::{database, side};
use crate::tenant::Tenant;
use coffer_wire::Class;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Which of the ways back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Into the live database: only what differs is changed, in one transaction
    InPlace,
    /// Side by side, in a new schema of the source: for looking and comparing
    Schema,
    /// Into a new database: definitions, shared tables, the tenant's rows
    Database,
    /// Into a folder
    Files,
}

impl Mode {
    /// As the command line and the documents have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::InPlace => "in-place",
            Self::Schema => "schema",
            Self::Database => "database",
            Self::Files => "files",
        }
    }
}

/// Where the rows go.
#[derive(Clone, Debug)]
pub enum Place {
    /// The database with the live rows.
    InPlace(Box<Dsn>),
    /// A new schema of a database.
    Schema {
        dsn: Box<Dsn>,
        /// `None`: named after the tenant and the target's time.
        name: Option<String>,
        /// Roles that may read it besides the DSN's.
        readers: Vec<String>,
    },
    /// A database that is absent or empty.
    Database(Box<Dsn>),
    /// A folder that is absent or empty.
    Files { dir: PathBuf, format: Format },
}

impl Place {
    pub fn mode(&self) -> Mode {
        match self {
            Self::InPlace(_) => Mode::InPlace,
            Self::Schema { .. } => Mode::Schema,
            Self::Database(_) => Mode::Database,
            Self::Files { .. } => Mode::Files,
        }
    }

    /// Refuses a place that is taken, before anything is read.
    pub(super) async fn require_free(&self) -> Result<()> {
        match self {
            Self::InPlace(_) | Self::Schema { name: None, .. } => Ok(()),
            Self::Schema { dsn, name: Some(name), .. } => {
                side::require_name(name)?;
                side::require_absent(dsn, name).await
            }
            Self::Database(dsn) => {
                crate::dial::install_crypto_provider();
                database::require_absent_or_empty(dsn).await
            }
            Self::Files { dir, format } => {
                format.require()?;
                files::require_empty(dir)
            }
        }
    }
}

/// A restore as it is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    pub tenant: Tenant,
    pub to: When,
    pub place: Place,
    /// `name` or `schema.name`; empty: all.
    pub tables: Vec<String>,
    /// Empty: all.
    pub classes: Vec<Class>,
    /// Only these rows of the one table; empty: all.
    pub keys: Vec<RowKey>,
    /// The tenant's rows go out under another key.
    pub rename: Option<As>,
    /// Into a database: the tenant's roles, too.
    pub roles: bool,
    /// How long to wait for the target to become durable; `None`: not at all.
    pub wait: Option<Duration>,
    /// Values that are not in the backup become NULL, instead of an error.
    pub allow_incomplete: bool,
    /// Counts only; nothing is changed.
    pub dry_run: bool,
    /// Noted where the restore is made, so that it is not made twice; into a live database or a schema.
    pub job: Option<OfJob>,
}

impl Request {
    /// Everything of the tenant, for real.
    pub fn new(tenant: Tenant, to: When, place: Place) -> Self {
        Self {
            tenant,
            to,
            place,
            tables: Vec::new(),
            classes: Vec::new(),
            keys: Vec::new(),
            rename: None,
            roles: false,
            wait: None,
            allow_incomplete: false,
            dry_run: false,
            job: None,
        }
    }

    /// Whose the rows are when they are written.
    pub fn written_tenant(&self) -> Tenant {
        self.rename.as_ref().map_or_else(|| self.tenant.clone(), |r| Tenant::normal(r.key.as_str()))
    }

    pub(super) fn selection(&self, rename: Option<Arc<Rename>>) -> Selection {
        let (classes, keys, tenant) = (self.classes.clone(), self.keys.clone(), Some(self.tenant.clone()));
        Selection { classes, keys, tenant, rename }
    }
}

/// What a restore works with.
pub struct Means<'a> {
    pub opened: &'a Opened,
    /// Name and uid.
    pub source: (&'a str, Uuid),
    pub scratch: Scratch,
    /// Bytes of memory for the merge ([`merge_memory`]).
    pub memory: usize,
    /// Followed, and cancelled, from elsewhere.
    pub watch: Watch,
}

/// What the merge of a process that only restores may use of `limits.memory`: readers, the other end and the process
/// itself have the rest.
pub fn merge_memory(limit: u64) -> usize {
    const REST: u64 = 40 << 20;
    usize::try_from((limit.saturating_sub(REST) / 2).max(8 << 20)).unwrap_or(usize::MAX)
}

/// Rows of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableReport {
    /// `schema.name`, quoted where SQL needs it.
    pub relation: String,
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    pub unchanged: u64,
}

/// What a restore did, or would do.
#[derive(Clone, Debug)]
pub struct Report {
    pub dry_run: bool,
    pub source: String,
    pub tenant: Tenant,
    pub mode: Mode,
    /// The other key that the rows went out under.
    pub renamed: Option<String>,
    /// The schema that was made, or would be.
    pub schema: Option<String>,
    pub target: Target,
    pub tables: Vec<TableReport>,
    /// Of the target's rows, as text.
    pub bytes: u64,
    pub seconds: f64,
    pub undo: Option<String>,
    /// What the undo needs is held until then.
    pub undo_until_us: Option<i64>,
    pub warnings: Vec<String>,
    /// Rows with a value that is not in the backup.
    pub incomplete: u64,
    /// Those that the rows refer to, where they refer to some.
    pub large_objects: Option<Found>,
}

impl Report {
    /// The document of `coffer restore --json`.
    pub fn document(&self) -> Value {
        let row = |t: &TableReport| {
            json!({"relation": t.relation, "inserted": t.inserted, "updated": t.updated, "deleted": t.deleted,
                "unchanged": t.unchanged})
        };
        let mut document = json!({
            "version": 1, "dry_run": self.dry_run, "source": self.source, "tenant": self.tenant.key,
            "kind": self.tenant.kind.name(), "mode": self.mode.name(), "schema": self.schema, "as": self.renamed,
            "target": {"asked": self.target.asked, "lsn": self.target.lsn.to_string(),
                "time": rfc3339(self.target.time_us)},
            "tables": self.tables.iter().map(row).collect::<Vec<_>>(), "bytes": self.bytes, "seconds": self.seconds,
            "undo": self.undo, "undo_until": self.undo_until_us.map(rfc3339), "warnings": self.warnings,
        });
        if let Some(found) = &self.large_objects {
            document["large_objects"] = found.document();
        }
        document
    }
}
