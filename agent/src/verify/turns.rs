//! Whose turn it is: a schedule names a time, and the tenants come one after the other in a span after it, each at a
//! place of its own, so that not all of them want the database at once.
//!
//! What a tenant's catalog says of its last check is all that is remembered: a turn that was missed, because the agent
//! was away or the database was, is due once.

use crate::schedule::Schedule;
use std::time::Duration;
use uuid::Uuid;

/// The turns of one time are over a quarter of the way to the next time, and not later than this.
const LONGEST_SPREAD: Duration = Duration::from_secs(6 * 3600);

/// See the module.
#[derive(Clone, Debug)]
pub struct Turns {
    schedule: Schedule,
}

impl Turns {
    pub fn new(schedule: Schedule) -> Self {
        Self { schedule }
    }

    /// When a tenant is due that was checked last at `last_us` (all times in microseconds since 1970-01-01 UTC).
    pub fn due(&self, tenant: Uuid, last_us: i64) -> Option<i64> {
        let time = self.schedule.next_after(last_us)?;
        let next = self.schedule.next_after(time)?;
        let longest = i64::try_from(LONGEST_SPREAD.as_micros()).unwrap_or(i64::MAX);
        let spread = ((next - time) / 4).min(longest);
        Some(time + (place(tenant) * spread as f64) as i64)
    }

    /// How long a check that could not be made waits for another try.
    pub fn again(&self, now_us: i64) -> i64 {
        let between = self.schedule.next_after(now_us).and_then(|a| Some(self.schedule.next_after(a)? - a));
        // Not sooner than in a few seconds, not later than in an hour.
        between.unwrap_or(i64::MAX).checked_div(8).unwrap_or(0).clamp(5_000_000, 3_600_000_000)
    }
}

/// A tenant's place in the span, 0 to 1: by its uid, which is as good as random.
fn place(tenant: Uuid) -> f64 {
    let low = tenant.as_u128() as u32;
    f64::from(low) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;

    fn at(s: &str) -> i64 {
        s.parse::<Timestamp>().unwrap().as_microsecond()
    }

    fn weekly() -> Turns {
        Turns::new(Schedule::parse("0 4 * * 0").unwrap())
    }

    #[test]
    fn each_tenant_has_its_place_after_the_time_and_a_missed_turn_is_due_once() {
        let (first, last) = (Uuid::from_u128(0), Uuid::from_u128(u128::from(u32::MAX)));
        let t = weekly();
        let checked = at("2026-11-18T12:00:00Z");
        assert_eq!(t.due(first, checked), Some(at("2026-11-22T04:00:00Z")));
        let latest = t.due(last, checked).unwrap();
        assert!(latest > at("2026-11-22T09:59:00Z") && latest < at("2026-11-22T10:00:00Z"));
        // Three weeks away: due since the first of the times, and after that check at the next one.
        assert!(t.due(first, at("2026-11-01T05:00:00Z")).unwrap() < at("2026-11-20T00:00:00Z"));
        assert_eq!(t.due(first, at("2026-11-20T00:00:00Z")), Some(at("2026-11-22T04:00:00Z")));
        // In its turn, after the time: the next time is another.
        assert_eq!(t.due(first, latest), Some(at("2026-11-29T04:00:00Z")));
    }

    #[test]
    fn the_span_is_a_quarter_of_the_time_between() {
        let t = Turns::new(Schedule::parse("* * * * *").unwrap());
        let last = t.due(Uuid::from_u128(u128::from(u32::MAX)), at("2026-11-22T04:00:00Z")).unwrap();
        assert!(last > at("2026-11-22T04:01:14Z") && last < at("2026-11-22T04:01:15Z"));
        assert_eq!(t.again(at("2026-11-22T04:00:00Z")), 7_500_000);
        assert_eq!(weekly().again(at("2026-11-22T04:00:00Z")), 3_600_000_000);
    }
}
