//! Retention is arithmetic with times of three clocks: the agent's, the stores', the source's. Where they differ by
//! more than [`FUTURE_US`], nobody knows which one is right, and nothing is removed.

use crate::clock::{rfc3339, skew_us};
use crate::crypto::random;
use crate::dsn::Dsn;
use crate::error::{Error, Kind, Result};
use crate::repository::{Repository, paths};
use crate::retention::FUTURE_US;
use crate::sql::{self, SqlContext};

/// An error of kind Refused when a clock differs too much from the agent's.
pub(super) async fn require_equal(repo: &Repository, source: Option<&Dsn>) -> Result<()> {
    for store in repo.attached_stores() {
        let path = format!("{}/{}", paths::PROBES, random::uuid().simple());
        let read = store.clock_us(&path).await;
        let theirs = match read {
            Err(e) if super::is_passing(&e) && !store.required() => continue,
            r => r?,
        };
        compare(&format!("store {}", store.name()), theirs, repo.clock().now_us())?;
    }
    if let Some(dsn) = source {
        let client = sql::connect(dsn).await.map_err(|e| {
            e.hint("its clock is compared before anything is removed; a source that is no more: take its section out of the configuration")
        })?;
        let row = client
            .query_one("SELECT (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::bigint", &[])
            .await
            .sql("cannot read the source's clock")?;
        compare("the source", row.get(0), repo.clock().now_us())?;
    }
    Ok(())
}

fn compare(whose: &str, theirs_us: i64, ours_us: i64) -> Result<()> {
    // A clock that a test sets ahead goes with all the others.
    let theirs_us = theirs_us.saturating_add(skew_us());
    if theirs_us.abs_diff(ours_us) <= FUTURE_US.unsigned_abs() {
        return Ok(());
    }
    Err(Error::new(
        Kind::Refused,
        format!(
            "the clock of {whose} says {}, this machine's {}: nothing is removed",
            rfc3339(theirs_us),
            rfc3339(ours_us)
        ),
    )
    .code("clocks_differ")
    .hint("set the clock that is wrong (NTP); they may differ by five minutes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_minutes_are_the_limit_in_both_directions() {
        let now = 1_800_000_000_000_000;
        for ok in [now, now + FUTURE_US, now - FUTURE_US] {
            compare("store a", ok, now).unwrap();
        }
        for wrong in [now + FUTURE_US + 1, now - FUTURE_US - 1, 0] {
            let e = compare("store a", wrong, now).unwrap_err();
            assert!(
                e.kind() == Kind::Refused && e.is_code("clocks_differ") && e.to_string().contains("store a"),
                "{e}"
            );
        }
    }
}
