//! How far a job of bases is, for the status page and the log.

use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the job is at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// No table needs a base.
    #[default]
    Idle,
    /// Transactions that began before a table was covered have to end first.
    WaitingForTransactions,
    /// Rows are read.
    Reading,
    /// The stream has to deliver the job's marker.
    WaitingForStream,
    /// Fulls are written.
    Writing,
}

impl Phase {
    /// The word for logs and JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::WaitingForTransactions => "waiting for transactions",
            Self::Reading => "reading",
            Self::WaitingForStream => "waiting for the stream",
            Self::Writing => "writing",
        }
    }
}

/// Shared between the job and who watches it.
#[derive(Debug, Default)]
pub struct BaseProgress {
    now: Mutex<Now>,
    rows: AtomicU64,
    bytes: AtomicU64,
    fulls: AtomicU64,
}

#[derive(Clone, Debug, Default)]
struct Now {
    phase: Phase,
    tables: Vec<String>,
    tables_read: u64,
    waits_for: Option<String>,
    error: Option<String>,
}

/// [`BaseProgress`] at one moment, as the status document has it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct BaseStatus {
    /// [`Phase::name`].
    #[serde(default)]
    pub phase: String,
    /// The tables of the job, or those that wait for one after an error.
    #[serde(default)]
    pub tables: Vec<String>,
    #[serde(default)]
    pub tables_read: u64,
    #[serde(default)]
    pub rows: u64,
    #[serde(default)]
    pub bytes: u64,
    #[serde(default)]
    pub fulls: u64,
    /// The transaction that has to end first.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// Why the last job failed; empty once one succeeds.
    #[serde(default)]
    pub error: Option<String>,
}

impl BaseStatus {
    /// The same for people; nothing while nothing is done.
    pub fn line(&self) -> Option<String> {
        let mut line = match (self.tables.is_empty(), self.waits_for.as_ref(), self.error.as_ref()) {
            (true, None, None) => return None,
            (_, Some(w), _) => format!("bases wait for {w}"),
            (_, None, Some(e)) => format!("bases are tried again: {e}"),
            (_, None, None) => {
                format!(
                    "bases: {}, {} of {} tables, {} rows",
                    self.phase,
                    self.tables_read,
                    self.tables.len(),
                    self.rows
                )
            }
        };
        if !self.tables.is_empty() {
            line.push_str(&format!(" (of {})", self.tables.join(", ")));
        }
        Some(line)
    }
}

impl BaseProgress {
    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A copy of all of it.
    pub fn status(&self) -> BaseStatus {
        let now = self.now().clone();
        BaseStatus {
            phase: now.phase.name().to_owned(),
            tables: now.tables,
            tables_read: now.tables_read,
            waits_for: now.waits_for,
            rows: self.rows.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            fulls: self.fulls.load(Ordering::Relaxed),
            error: now.error,
        }
    }

    pub(super) fn begin(&self, tables: Vec<String>) {
        for n in [&self.rows, &self.bytes, &self.fulls] {
            n.store(0, Ordering::Relaxed);
        }
        let mut now = self.now();
        (now.tables, now.tables_read) = (tables, 0);
    }

    pub(super) fn phase(&self, phase: Phase) {
        tracing::debug!("bases: {}", phase.name());
        let mut now = self.now();
        (now.phase, now.waits_for) = (phase, None);
    }

    pub(super) fn wait_for(&self, transaction: String) {
        self.now().waits_for = Some(transaction);
    }

    pub(super) fn table_read(&self) {
        self.now().tables_read += 1;
    }

    pub(super) fn add_rows(&self, n: u64) {
        self.rows.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn add_bytes(&self, n: u64) {
        self.bytes.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn full_written(&self) {
        self.fulls.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn finish(&self, error: Option<String>) {
        let mut now = self.now();
        (now.phase, now.waits_for) = (Phase::Idle, None);
        if error.is_none() {
            now.tables.clear();
        }
        now.error = error;
    }
}
