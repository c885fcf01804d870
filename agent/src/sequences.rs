//! Where the source's sequences stand, between bases: the stream says nothing of `nextval()`.
//!
//! A session of its own reads all sequences every second, and when a ship is about to be recorded; what changed since
//! the reading before waits in [`SequenceNotes`] until a record of the log takes it along. A session of its own, because
//! a migration may hold a sequence locked, and nothing that ships waits for that: a ship without a reading is complete.
//!
//! Each reading carries a position that was read behind the values: whatever they count happened at or before it. So a
//! target that is not before the position may use them.

use crate::error::{Error, Result};
use crate::repository::model::{SequenceState, SequencesAt};
use crate::run::AgentContext;
use crate::sql::{self, SqlClient, SqlContext};
use coffer_wire::Lsn;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How often the sequences are read.
const TICK: Duration = Duration::from_secs(1);
/// A reading rests for so many times as long as it took: thousands of sequences cost the server something.
const REST: u32 = 20;
/// How long a record waits for a reading at most.
const FRESH: Duration = Duration::from_millis(50);
/// Wait before the next session.
const RECONNECT: Duration = Duration::from_secs(2);
/// Readings kept while nothing can be recorded; beyond, neighbours become one.
const MOST: usize = 256;

const READ: &str = "SELECT names, last_values, called, lsn::text FROM coffer._agent_sequences()";

/// Readings that no record has taken along yet. One per source.
#[derive(Debug, Default)]
pub struct SequenceNotes {
    waiting: Mutex<Vec<SequencesAt>>,
    /// A reading that is asked for would be made at once.
    ready: AtomicBool,
    asked: Notify,
    /// Counts readings.
    read: watch::Sender<u64>,
}

impl SequenceNotes {
    /// Has a reading made now, if that is a matter of moments.
    pub async fn freshen(&self) {
        if !self.ready.load(Ordering::Acquire) {
            return;
        }
        let mut read = self.read.subscribe();
        self.asked.notify_one();
        // Late or never: the record goes without.
        let _ = tokio::time::timeout(FRESH, read.changed()).await;
    }

    /// What the next record takes along.
    pub fn take(&self) -> Vec<SequencesAt> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// `holds`: whether it still counts, asked when no [`Self::forget`] can come in between.
    fn add(&self, reading: SequencesAt, holds: impl FnOnce() -> bool) {
        let mut w = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !holds() {
            return;
        }
        w.push(reading);
        if w.len() > MOST {
            let all = std::mem::take(&mut *w);
            *w = thinned(all);
        }
    }

    /// What waits is of a server that may be another one now.
    pub fn forget(&self) {
        self.ready.store(false, Ordering::Release);
        self.take();
    }
}

/// Every second reading joins the one after it, at the later position.
fn thinned(all: Vec<SequencesAt>) -> Vec<SequencesAt> {
    let mut out = Vec::with_capacity(all.len().div_ceil(2));
    let mut rest = all.into_iter();
    while let Some(first) = rest.next() {
        let Some(mut second) = rest.next() else {
            out.push(first);
            break;
        };
        let newer: std::collections::HashSet<&str> = second.states.iter().map(|s| s.name.as_str()).collect();
        let mut states: Vec<_> = first.states.into_iter().filter(|s| !newer.contains(s.name.as_str())).collect();
        states.append(&mut second.states);
        out.push(SequencesAt { lsn: second.lsn, states });
    }
    out
}

/// Reads the sequences for as long as it is polled; drop it to end it.
pub async fn watch(ctx: Arc<AgentContext>, notes: Arc<SequenceNotes>) {
    let mut told = false;
    let connect = async || {
        sql::connect(&ctx.source_dsn().await?.with_application_name("coffer sequences").sending_little()).await
    };
    loop {
        let failed = match connect().await {
            Ok(client) => session(&ctx, &client, &notes, &mut told).await,
            Err(e) => e,
        };
        notes.forget();
        if !std::mem::replace(&mut told, true) {
            tracing::warn!("the sequences are not read, and backed up with the bases only: {failed}; trying again");
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

/// Reads until that fails, and returns why.
async fn session(ctx: &AgentContext, client: &SqlClient, notes: &SequenceNotes, told: &mut bool) -> Error {
    let mut known = HashMap::new();
    loop {
        let began = Instant::now();
        // Asked before it begins, a reading counts; asked from here on, it takes another.
        // What another server counts is not the source's.
        if let Err(e) = ctx.require_followed(client) {
            return e;
        }
        match reading(client, &mut known).await {
            Ok(Some(r)) => {
                *told = false;
                notes.add(r, || ctx.follows(client));
            }
            Ok(None) => *told = false,
            Err(e) if client.is_closed() => return e,
            // A sequence was locked or dropped meanwhile.
            Err(e) => tracing::debug!("the sequences could not be read this time: {e}"),
        }
        notes.read.send_modify(|n| *n += 1);
        let rest = began.elapsed() * REST;
        tokio::time::sleep(rest).await;
        notes.ready.store(true, Ordering::Release);
        tokio::select! {
            () = tokio::time::sleep(TICK.saturating_sub(rest)) => {}
            () = notes.asked.notified() => {}
        }
        notes.ready.store(false, Ordering::Release);
    }
}

/// The sequences that changed since `known`; `None` when none did.
async fn reading(client: &SqlClient, known: &mut HashMap<String, (i64, bool)>) -> Result<Option<SequencesAt>> {
    let mut now = all(client).await?;
    let before = std::mem::take(known);
    known.extend(now.states.iter().map(|s| (s.name.clone(), (s.last_value, s.is_called))));
    now.states.retain(|s| before.get(&s.name) != Some(&(s.last_value, s.is_called)));
    Ok((!now.states.is_empty()).then_some(now))
}

/// Where all sequences stand, but those that somebody else holds locked.
pub async fn all(client: &SqlClient) -> Result<SequencesAt> {
    let row = client.query_one(READ, &[]).await.sql("cannot read the sequences")?;
    let lsn: Lsn = row.get::<_, &str>(3).parse().map_err(Error::other)?;
    let (names, values, called): (Vec<String>, Vec<i64>, Vec<bool>) = (row.get(0), row.get(1), row.get(2));
    let state = |((name, last_value), is_called)| SequenceState { name, last_value, is_called };
    Ok(SequencesAt { lsn, states: names.into_iter().zip(values).zip(called).map(state).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lsn: u64, states: &[(&str, i64)]) -> SequencesAt {
        let state = |(n, v): &(&str, i64)| SequenceState { name: (*n).to_owned(), last_value: *v, is_called: true };
        SequencesAt { lsn: Lsn(lsn), states: states.iter().map(state).collect() }
    }

    #[test]
    fn readings_that_become_one_keep_the_newest_of_each_sequence_at_the_later_position() {
        let all = vec![at(1, &[("a", 1), ("b", 1)]), at(2, &[("a", 2)]), at(3, &[("c", 3)])];
        assert_eq!(thinned(all), [at(2, &[("b", 1), ("a", 2)]), at(3, &[("c", 3)])]);
    }

    #[tokio::test]
    async fn what_waits_is_bounded_and_a_record_does_not_wait_for_a_session_that_is_away() {
        let notes = SequenceNotes::default();
        for n in 0..5000 {
            notes.add(at(n, &[("a", n as i64)]), || true);
        }
        notes.freshen().await;
        let taken = notes.take();
        assert!(taken.len() <= MOST, "{}", taken.len());
        assert_eq!(taken.last(), Some(&at(4999, &[("a", 4999)])));
        assert!(notes.take().is_empty());
        notes.add(at(1, &[("a", 1)]), || false);
        assert!(notes.take().is_empty());
    }
}
