//! Time and randomness, injected so that tests can hold them still.

use std::sync::Arc;
use std::time::Duration;

/// Where the agent's own time comes from. The source's time comes with its commits.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Microseconds since 1970-01-01 UTC.
    fn now_us(&self) -> i64;

    /// By how much it is ahead of the machine's, in microseconds: not at all, but where time is simulated.
    fn skew_us(&self) -> i64 {
        0
    }
}

/// The machine's clock.
#[derive(Debug)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_us(&self) -> i64 {
        jiff::Timestamp::now().as_microsecond().saturating_add(skew_us())
    }

    fn skew_us(&self) -> i64 {
        skew_us()
    }
}

/// By how much `COFFER_TEST_CLOCK` (a duration, `30d`; `-30d` for the past) sets this process's clock ahead of the
/// machine's, in microseconds. Only in builds with the feature `failpoints`.
#[cfg(feature = "failpoints")]
pub fn skew_us() -> i64 {
    static SKEW: std::sync::LazyLock<i64> = std::sync::LazyLock::new(|| {
        let Ok(text) = std::env::var("COFFER_TEST_CLOCK") else { return 0 };
        let (sign, span) = text.strip_prefix('-').map_or((1, text.as_str()), |rest| (-1, rest));
        let us = parse_duration(span).ok().and_then(|d| i64::try_from(d.as_micros()).ok());
        sign * us.unwrap_or_else(|| panic!("COFFER_TEST_CLOCK: '{text}' is not a duration"))
    });
    *SKEW
}

/// By how much this process's clock is ahead of the machine's: not at all in this build.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn skew_us() -> i64 {
    0
}

pub type SharedClock = Arc<dyn Clock>;

/// RFC 3339 UTC with microseconds, as every JSON time of the agent.
pub fn rfc3339(us: i64) -> String {
    match jiff::Timestamp::from_microsecond(us) {
        Ok(t) => format!("{t:.6}"),
        Err(_) => us.to_string(),
    }
}

/// A duration as people write it: `250ms`, `10s`, `5min`, `2h`, `7d`, or several of them.
pub fn parse_duration(s: &str) -> Result<Duration, String> {
    let bad = || format!("'{s}' is not a duration; write for example 250ms, 10s, 5min, 2h or 7d");
    let mut rest = s.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let n: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = rest[digits..].trim_start();
        let unit_len = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let unit_ms = match &rest[..unit_len] {
            "ms" => 1,
            "s" | "sec" => 1000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "w" => 604_800_000,
            _ => return Err(bad()),
        };
        total += Duration::from_millis(n.checked_mul(unit_ms).ok_or_else(bad)?);
        rest = rest[unit_len..].trim_start();
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        assert_eq!(parse_duration("5min"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("1h 30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "5", "s", "5 parsecs", "-1s", "1.5h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_rfc_3339_with_microseconds() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000Z");
    }
}
