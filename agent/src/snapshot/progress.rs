//! How far a job of bases is, for the status page and the log.

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
    error: Option<String>,
}

/// [`BaseProgress`] at one moment.
#[derive(Clone, Debug, Default)]
pub struct BaseStatus {
    pub phase: Phase,
    /// The tables of the job, or those that wait for one after an error.
    pub tables: Vec<String>,
    pub tables_read: u64,
    pub rows: u64,
    pub bytes: u64,
    pub fulls: u64,
    /// Why the last job failed; empty once one succeeds.
    pub error: Option<String>,
}

impl BaseProgress {
    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A copy of all of it.
    pub fn status(&self) -> BaseStatus {
        let now = self.now().clone();
        BaseStatus {
            phase: now.phase,
            tables: now.tables,
            tables_read: now.tables_read,
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
        self.now().phase = phase;
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
        now.phase = Phase::Idle;
        if error.is_none() {
            now.tables.clear();
        }
        now.error = error;
    }
}
