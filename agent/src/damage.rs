//! What the parts of the agent tell each other of objects that no store has as they were written.
//!
//! Who merges meets such an object first, and names it. The scrub reads it out of turn, in every store, and notes in its
//! tenant's catalog what is lost. Where nothing later stands for it, no full and no restore could ever pass it: then every
//! table gets a new base, and what lies between stays a gap.

use crate::error::Error;
use crate::verify::objects::is_finding;
use coffer_wire::Lsn;
use std::sync::{Mutex, PoisonError};
use tokio::sync::watch;

/// Complaints that are kept until the scrub comes to them.
const MOST: usize = 100;

/// See the module. One per source.
#[derive(Debug)]
pub struct Damage {
    complaints: Mutex<Vec<String>>,
    bases_from: watch::Sender<Lsn>,
}

impl Default for Damage {
    fn default() -> Self {
        Self { complaints: Mutex::default(), bases_from: watch::Sender::new(Lsn::ZERO) }
    }
}

impl Damage {
    /// Work ended with an error: if it is one about what is stored, the object that it names is to be read in every store.
    pub fn complain(&self, e: &Error) {
        let mut all = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        let text = e.to_string();
        if is_finding(e) && all.len() < MOST && !all.contains(&text) {
            all.push(text);
        }
    }

    /// What was said since the last time.
    pub fn take_complaints(&self) -> Vec<String> {
        std::mem::take(&mut *self.complaints.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Every table needs a base that lies at this position or beyond it.
    pub fn want_bases(&self, from: Lsn) {
        self.bases_from.send_if_modified(|at| {
            let is_later = from > *at;
            if is_later {
                tracing::warn!("no store has what leads up to {from}: every table gets a new base");
                *at = from;
            }
            is_later
        });
    }

    /// The last position that was asked for; zero when none was.
    pub fn bases_from(&self) -> watch::Receiver<Lsn> {
        self.bases_from.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn only_what_is_stored_is_complained_of_and_only_once() {
        let d = Damage::default();
        d.complain(&Error::new(Kind::Unreachable, "store one does not answer"));
        assert_eq!(d.take_complaints(), Vec::<String>::new());
        for _ in 0..2 {
            d.complain(&Error::new(Kind::Verification, "t/1/c/2 does not authenticate"));
        }
        assert_eq!(d.take_complaints(), ["t/1/c/2 does not authenticate"]);
        assert_eq!(d.take_complaints(), Vec::<String>::new());
    }

    #[test]
    fn bases_are_wanted_from_the_last_position() {
        let d = Damage::default();
        let mut from = d.bases_from();
        d.want_bases(Lsn(7));
        assert!(from.has_changed().unwrap());
        assert_eq!(*from.borrow_and_update(), Lsn(7));
        d.want_bases(Lsn(5));
        assert!(!from.has_changed().unwrap());
    }
}
