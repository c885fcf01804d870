//! When something is due: cron expressions, in UTC.
//!
//! An expression has five fields (minute, hour, day of month, month, day of week) or is a nickname (`@daily`). A
//! [`Timer`] remembers what it was last asked for: a run that was missed, however often, is due once.

use crate::clock::rfc3339;
use crate::error::{Error, Result};
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use std::time::Duration;

/// Tests need not wait for minutes: a sixth field before the others, of seconds.
const SECONDS: Seconds = if cfg!(feature = "failpoints") { Seconds::Optional } else { Seconds::Disallowed };

/// A cron expression in UTC.
#[derive(Clone, Debug)]
pub struct Schedule {
    cron: Cron,
    text: String,
}

impl Schedule {
    /// Reads an expression.
    ///
    /// # Errors
    /// `Usage`: it is none, or it never comes.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |why: String| {
            Error::usage(format!("'{text}' is not a cron expression: {why}")).hint(
                "five fields in UTC: minute, hour, day of month, month, day of week; \"0 2 * * *\" is every day at 02:00",
            )
        };
        let parser = CronParser::builder().seconds(SECONDS).year(Year::Disallowed).build();
        let cron = parser.parse(text.trim()).map_err(|e| bad(e.to_string()))?;
        let schedule = Self { cron, text: text.trim().to_owned() };
        // 30 February: it would wait for ever.
        if schedule.next_after(0).is_none() {
            return Err(bad("it never comes".into()));
        }
        Ok(schedule)
    }

    /// The first time after `us` (both microseconds since 1970-01-01 UTC); `None` when none is left in the calendar.
    pub fn next_after(&self, us: i64) -> Option<i64> {
        let now = Timestamp::from_microsecond(us).ok()?.to_zoned(TimeZone::UTC).datetime();
        let next: DateTime = self.cron.find_next_occurrence(&now, false).ok()?;
        Some(TimeZone::UTC.to_timestamp(next).ok()?.as_microsecond())
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// A schedule that runs: says when it is due, once for however many times were missed.
#[derive(Clone, Debug)]
pub struct Timer {
    schedule: Schedule,
    next_us: Option<i64>,
}

impl Timer {
    /// `last_us`: when it last ran; a time missed since then is due at once. `None`: it never ran, and the first time
    /// is the next one after `now_us`.
    pub fn new(schedule: Schedule, last_us: Option<i64>, now_us: i64) -> Self {
        // A last run in the future is of a clock that was wrong: it must not hold the schedule up.
        let since = last_us.map_or(now_us, |t| t.min(now_us));
        let next_us = schedule.next_after(since);
        Self { schedule, next_us }
    }

    /// Whether it is due; if so, it is due again at the next time after now.
    pub fn due(&mut self, now_us: i64) -> bool {
        let due = self.next_us.is_some_and(|t| t <= now_us);
        if due {
            self.next_us = self.schedule.next_after(now_us);
        } else if let Some(soonest) = self.schedule.next_after(now_us)
            && self.next_us.is_none_or(|t| t > soonest)
        {
            // The clock was set back.
            self.next_us = Some(soonest);
        }
        due
    }

    /// How long until it is due.
    pub fn wait(&self, now_us: i64) -> Duration {
        let us = self.next_us.map_or(i64::MAX, |t| t.saturating_sub(now_us)).max(0);
        Duration::from_micros(us.unsigned_abs())
    }

    /// When it is due.
    pub fn next(&self) -> Option<String> {
        self.next_us.map(rfc3339)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: &str) -> i64 {
        s.parse::<Timestamp>().unwrap().as_microsecond()
    }

    fn next(expression: &str, after: &str) -> String {
        let us = Schedule::parse(expression).unwrap().next_after(at(after)).unwrap();
        Timestamp::from_microsecond(us).unwrap().to_string()
    }

    #[test]
    fn the_next_time_is_after_the_given_one_and_in_utc() {
        assert_eq!(next("0 2 * * *", "2026-11-22T01:59:59Z"), "2026-11-22T02:00:00Z");
        assert_eq!(next("0 2 * * *", "2026-11-22T02:00:00Z"), "2026-11-23T02:00:00Z");
        assert_eq!(next("0 * * * *", "2026-12-31T23:00:00.000001Z"), "2027-01-01T00:00:00Z");
        assert_eq!(next("0 4 * * 0", "2026-11-22T05:00:00Z"), "2026-11-29T04:00:00Z");
        assert_eq!(next("*/15 9-17 * * MON-FRI", "2026-11-21T12:00:00Z"), "2026-11-23T09:00:00Z");
        assert_eq!(next("0 0 29 2 *", "2026-11-21T12:00:00Z"), "2028-02-29T00:00:00Z");
        assert_eq!(next("@daily", "2026-11-21T12:00:00Z"), "2026-11-22T00:00:00Z");
        // In zones with summer time this hour is missing or comes twice; not here.
        assert_eq!(next("30 2 * * *", "2026-03-29T00:00:00Z"), "2026-03-29T02:30:00Z");
    }

    #[test]
    fn nonsense_is_refused_with_what_is_expected() {
        for bad in ["", "0 2 * *", "0 0 2 * * * *", "60 * * * *", "0 24 * * *", "every day", "0 0 30 2 *", "0 0 * * 8"]
        {
            let e = Schedule::parse(bad).unwrap_err();
            assert!(e.report().contains("five fields"), "{bad}: {e}");
        }
    }

    #[test]
    fn missed_runs_run_once() {
        let daily = Schedule::parse("0 2 * * *").unwrap();
        let mut t = Timer::new(daily.clone(), Some(at("2026-11-01T02:00:03Z")), at("2026-11-20T12:00:00Z"));
        assert!(t.due(at("2026-11-20T12:00:00Z")));
        assert!(!t.due(at("2026-11-20T12:00:01Z")));
        assert_eq!(t.wait(at("2026-11-21T01:59:00Z")), Duration::from_secs(60));
        assert!(t.due(at("2026-11-21T02:00:00Z")));
        assert!(!t.due(at("2026-11-21T02:00:00Z")));
        // Never run before: the first time is the next one.
        let mut t = Timer::new(daily, None, at("2026-11-20T12:00:00Z"));
        assert!(!t.due(at("2026-11-20T12:00:00Z")));
        assert_eq!(t.next().unwrap(), "2026-11-21T02:00:00.000000Z");
    }

    #[test]
    fn a_clock_that_was_wrong_does_not_hold_it_up() {
        let hourly = Schedule::parse("0 * * * *").unwrap();
        let mut t = Timer::new(hourly.clone(), Some(at("2036-01-01T00:00:00Z")), at("2026-11-20T12:30:00Z"));
        assert!(!t.due(at("2026-11-20T12:59:59Z")));
        assert!(t.due(at("2026-11-20T13:00:00Z")));
        let mut t = Timer::new(hourly, None, at("2036-01-01T00:30:00Z"));
        assert!(!t.due(at("2026-11-20T12:30:00Z")));
        assert!(t.due(at("2026-11-20T13:00:00Z")));
    }
}
