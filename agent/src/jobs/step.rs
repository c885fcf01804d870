//! How far a job is, and whether it is still wanted: shared between what works and what reports.

use crate::commands::verify::Tally;
use crate::error::{Error, Kind, Result};
use crate::restore::Watch;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// See the module.
#[derive(Default)]
pub struct Step {
    said: Mutex<Said>,
    cancelled: AtomicBool,
    /// Of a restore, or of a full that is made.
    pub watch: Watch,
    /// Rows that it expects; 0: not known.
    pub expected: AtomicU64,
    /// A verification's bytes.
    pub tally: Arc<Tally>,
}

#[derive(Clone, Default)]
struct Said {
    from: f64,
    upto: f64,
    message: String,
}

impl Step {
    /// The next step: it takes the job from one part of the whole to another.
    ///
    /// # Errors
    /// Code `cancelled`: the job is to end here.
    pub fn begin(&self, from: f64, upto: f64, message: impl Into<String>) -> Result<()> {
        self.check()?;
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) = Said { from, upto, message: message.into() };
        Ok(())
    }

    /// Ends the job at its next step, or sooner where that can be.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.tally.cancelled.store(true, Ordering::Relaxed);
        self.watch.cancel();
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(Kind::Refused, "the job was cancelled").code("cancelled"));
        }
        Ok(())
    }

    /// How much of the job is done, 0 to 1, and in words.
    pub fn now(&self) -> (f64, String) {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (rows, bytes) = (self.watch.rows.load(Ordering::Relaxed), self.tally.done.load(Ordering::Relaxed));
        let (part, message) = if rows > 0 {
            let expected = self.expected.load(Ordering::Relaxed).max(rows);
            (rows as f64 / expected as f64, format!("{}: {rows} rows", said.message))
        } else if bytes > 0 {
            let total = self.tally.total.load(Ordering::Relaxed).max(bytes);
            (bytes as f64 / total as f64, format!("{}: {bytes} of {total} bytes", said.message))
        } else {
            (0.0, said.message)
        };
        // Never whole before it is.
        ((said.from + (said.upto - said.from) * part).min(0.99), message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_goes_from_step_to_step_and_is_never_whole() {
        let s = Step::default();
        assert_eq!(s.now(), (0.0, String::new()));
        s.begin(0.2, 1.0, "restoring").expect("wanted");
        assert_eq!(s.now(), (0.2, "restoring".into()));
        s.expected.store(100, Ordering::Relaxed);
        s.watch.rows.store(50, Ordering::Relaxed);
        let (part, message) = s.now();
        assert!((part - 0.6).abs() < 1e-9 && message == "restoring: 50 rows", "{part} {message}");
        s.watch.rows.store(500, Ordering::Relaxed);
        assert_eq!(s.now().0, 0.99);
        s.cancel();
        assert!(s.begin(0.0, 1.0, "more").is_err_and(|e| e.is_code("cancelled")));
        assert!(s.watch.check().is_err());
    }
}
