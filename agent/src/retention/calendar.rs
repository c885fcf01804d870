//! Periods of the UTC calendar: days, ISO weeks, months, years.

use super::Rule;
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

/// A period: those of one rule are ordered as time is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Period {
    year: i16,
    /// Week, month or day of the year; 0 for a year.
    part: i16,
}

/// The day of a time.
pub(super) fn day(us: i64) -> Date {
    let t = Timestamp::from_microsecond(us).unwrap_or(if us < 0 { Timestamp::MIN } else { Timestamp::MAX });
    t.to_zoned(TimeZone::UTC).date()
}

/// Whether two times are in one calendar month.
pub fn is_same_month(a_us: i64, b_us: i64) -> bool {
    Period::of(Rule::Monthly, a_us) == Period::of(Rule::Monthly, b_us)
}

impl Period {
    /// The period of a rule that a time falls into.
    pub(super) fn of(rule: Rule, us: i64) -> Self {
        let d = day(us);
        let (year, part) = match rule {
            Rule::Daily => (d.year(), d.day_of_year()),
            // The first days of January may belong to the last week of the year before, and the other way round.
            Rule::Weekly => {
                let w = d.iso_week_date();
                (w.year(), i16::from(w.week()))
            }
            Rule::Monthly => (d.year(), i16::from(d.month())),
            Rule::Annual => (d.year(), 0),
        };
        Self { year, part }
    }

    /// As people write it.
    pub(super) fn text(self, rule: Rule) -> String {
        match rule {
            Rule::Daily => Date::new(self.year, 1, 1)
                .and_then(|d| d.checked_add(jiff::Span::new().days(i64::from(self.part) - 1)))
                .map_or_else(|_| format!("{} day {}", self.year, self.part), |d| d.to_string()),
            Rule::Weekly => format!("{:04}-W{:02}", self.year, self.part),
            Rule::Monthly => format!("{:04}-{:02}", self.year, self.part),
            Rule::Annual => format!("{:04}", self.year),
        }
    }
}

/// The same time of the day, `years` later; the 29th of February becomes the 28th where there is none.
pub(super) fn years_later(us: i64, years: u32) -> i64 {
    let later = || {
        let t = Timestamp::from_microsecond(us).ok()?.to_zoned(TimeZone::UTC);
        Some(t.checked_add(jiff::Span::new().try_years(i64::from(years)).ok()?).ok()?.timestamp().as_microsecond())
    };
    later().unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: &str) -> i64 {
        s.parse::<Timestamp>().unwrap().as_microsecond()
    }

    #[test]
    fn periods_are_of_utc_and_weeks_of_iso_8601() {
        let text = |rule, s| Period::of(rule, at(s)).text(rule);
        assert_eq!(text(Rule::Daily, "2026-03-01T00:00:00Z"), "2026-03-01");
        assert_eq!(text(Rule::Daily, "2026-03-01T00:30:00+01:00"), "2026-02-28");
        assert_eq!(text(Rule::Daily, "2028-12-31T23:59:59.999999Z"), "2028-12-31");
        assert_eq!(text(Rule::Weekly, "2027-01-03T12:00:00Z"), "2026-W53");
        assert_eq!(text(Rule::Weekly, "2027-01-04T00:00:00Z"), "2027-W01");
        assert_eq!(text(Rule::Weekly, "2024-12-30T00:00:00Z"), "2025-W01");
        assert_eq!(text(Rule::Monthly, "2026-12-31T23:59:59Z"), "2026-12");
        assert_eq!(text(Rule::Annual, "2026-12-31T23:59:59Z"), "2026");
        for rule in Rule::ALL {
            assert!(Period::of(rule, at("2026-12-27T23:59:59Z")) < Period::of(rule, at("2027-01-04T00:00:00Z")));
        }
    }

    #[test]
    fn years_are_of_the_calendar() {
        assert_eq!(years_later(at("2024-02-29T12:00:00Z"), 7), at("2031-02-28T12:00:00Z"));
        assert_eq!(years_later(at("2024-02-29T12:00:00Z"), 4), at("2028-02-29T12:00:00Z"));
        assert_eq!(years_later(i64::MAX, 1), i64::MAX);
        assert_eq!(years_later(at("2024-02-29T12:00:00Z"), u32::MAX), i64::MAX);
    }
}
