//! The planner: what each rule keeps, ten years of days, and what must hold whatever the input.

use super::*;
use crate::crypto::ObjectKind;
use jiff::Timestamp;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

const DAY_US: i64 = 86_400 * 1_000_000;
const HOUR_US: i64 = DAY_US / 24;

fn at(s: &str) -> i64 {
    s.parse::<Timestamp>().unwrap().as_microsecond()
}

fn text(us: i64) -> String {
    Timestamp::from_microsecond(us).unwrap().to_zoned(jiff::tz::TimeZone::UTC).date().to_string()
}

fn object(n: u64) -> ObjectRef {
    ObjectRef {
        path: format!("o/{n:020}"),
        kind: ObjectKind::Full,
        tenant: Uuid::nil(),
        object: Uuid::from_u128(u128::from(n)),
        key_version: 1,
        bytes: 10,
        sha256: String::new(),
        lsn_start: Lsn(0),
        lsn_end: Lsn(0),
        rows: 0,
    }
}

/// A verified, scheduled full whose position is its time.
fn full(us: i64) -> Full {
    Full {
        id: Uuid::from_u128(us as u128),
        point: Lsn(us as u64),
        point_us: us,
        check: Check::Verified,
        trigger: Trigger::Schedule,
        released: false,
        whole: true,
        needs_log: false,
        objects: vec![object(us as u64)],
    }
}

fn changes(from: i64, to: i64) -> Changes {
    Changes {
        id: Uuid::from_u128(to as u128 | 1 << 100),
        kind: ChangesKind::Incremental,
        from: Lsn(from as u64),
        to: Lsn(to as u64),
        to_us: to,
        objects: vec![object(to as u64 | 1 << 62)],
    }
}

fn policy(pitr_days: u64, daily: u32, weekly: u32, monthly: u32, annual: u32) -> Policy {
    let pitr = Duration::from_secs(pitr_days * 86_400);
    Policy { pitr, daily, weekly, monthly, annual, ..Policy::default() }
}

fn input(now: &str, policy: Policy, fulls: Vec<Full>) -> Input {
    Input {
        now_us: at(now),
        policy,
        fulls,
        changes: Vec::new(),
        holds: Vec::new(),
        running: Vec::new(),
        bases: Vec::new(),
        floor: None,
        settled_us: i64::MAX,
        settled: Lsn::MAX,
        named_by_log: std::sync::Arc::default(),
    }
}

/// The days of the fulls that stay.
fn kept(i: &Input) -> Vec<String> {
    let p = plan(i);
    i.fulls.iter().zip(&p.fulls).filter(|(_, v)| v.keep).map(|(f, _)| text(f.point_us)).collect()
}

fn reasons(i: &Input, n: usize) -> Vec<&'static str> {
    plan(i).fulls[n].reasons.iter().map(Reason::code).collect()
}

/// Takes out what the plan removes.
fn remove(i: &mut Input) {
    let p = plan(i);
    let mut v = p.fulls.iter();
    i.fulls.retain(|_| v.next().unwrap().keep);
    let mut v = p.changes.iter();
    i.changes.retain(|_| v.next().unwrap().keep);
    let mut v = p.bases.iter();
    i.bases.retain(|_| v.next().unwrap().keep);
    i.floor = p.floor;
}

/// What a ship had of the tenant.
fn changeset(from: i64, to: i64) -> Changes {
    Changes {
        id: Uuid::from_u128(to as u128 | 1 << 101),
        kind: ChangesKind::Changeset,
        objects: vec![object(to as u64 | 1 << 61)],
        ..changes(from, to)
    }
}

/// What a base had of the tenant.
fn based(us: i64) -> Based {
    Based { cut: Lsn(us as u64), object: object(us as u64 | 1 << 60) }
}

#[test]
fn the_last_verified_full_of_each_period_stays_and_the_oldest_while_a_rule_is_unmet() {
    let days = ["2026-01-05", "2026-01-06", "2026-01-07"];
    let fulls: Vec<Full> =
        days.iter().flat_map(|d| [full(at(&format!("{d}T02:00:00Z"))), full(at(&format!("{d}T14:00:00Z")))]).collect();
    let mut i = input("2026-03-01T00:00:00Z", policy(0, 2, 0, 0, 0), fulls);
    assert_eq!(kept(&i), ["2026-01-06", "2026-01-07"]);
    assert_eq!(reasons(&i, 3), ["daily"]);
    // 02:00 of a day that has a later one.
    assert_eq!(reasons(&i, 4), ["expired"]);
    // Four days are asked for and three found: the oldest of all stays as well.
    i.policy.daily = 4;
    assert_eq!(kept(&i), ["2026-01-05", "2026-01-05", "2026-01-06", "2026-01-07"]);
    assert_eq!(reasons(&i, 0), ["oldest"]);
    assert_eq!(plan(&i).fulls[0].reasons[0].to_string(), "the oldest, while the daily rule has 3 of 4");
}

#[test]
fn only_verified_fulls_count_and_a_period_without_one_is_not_given_up() {
    let mut fulls: Vec<Full> = (1..=6).map(|d| full(at(&format!("2026-01-0{d}T02:00:00Z")))).collect();
    fulls[5].check = Check::Failed;
    fulls[3].check = Check::Unchecked;
    let i = input("2026-03-01T00:00:00Z", policy(0, 2, 0, 0, 0), fulls);
    // The sixth is damaged; the fourth stays without being counted; the fifth and the third are the two.
    assert_eq!(reasons(&i, 5), ["recovery_window"]);
    assert_eq!(reasons(&i, 4), ["recovery_window", "daily", "last"]);
    assert_eq!(reasons(&i, 3), ["unverified"]);
    assert_eq!(reasons(&i, 2), ["daily"]);
    assert_eq!(kept(&i).len(), 4);
}

#[test]
fn nothing_goes_while_nothing_is_verified() {
    let mut fulls: Vec<Full> = (1..=9).map(|d| full(at(&format!("2026-01-0{d}T02:00:00Z")))).collect();
    fulls.iter_mut().for_each(|f| f.check = Check::Unchecked);
    let i = input("2026-03-01T00:00:00Z", policy(1, 1, 0, 0, 0), fulls);
    assert!(plan(&i).is_empty());
}

#[test]
fn the_recovery_window_needs_a_full_at_or_before_its_start_and_everything_after_it() {
    let fulls: Vec<Full> = (1..=9).map(|d| full(at(&format!("2026-01-0{d}T02:00:00Z")))).collect();
    let mut i = input("2026-01-09T12:00:00Z", policy(3, 0, 0, 0, 0), fulls);
    let first = at("2026-01-01T02:00:00Z");
    i.changes = (0..8 * 24).map(|h| changes(first + h * HOUR_US, first + (h + 1) * HOUR_US)).collect();
    assert_eq!(kept(&i), ["2026-01-06", "2026-01-07", "2026-01-08", "2026-01-09"]);
    let p = plan(&i);
    let from = at("2026-01-06T02:00:00Z");
    for (c, v) in i.changes.iter().zip(&p.changes) {
        assert_eq!(v.keep, c.to_us > from, "{}", text(c.to_us));
    }
    assert_eq!(p.objects.len(), 5 + 5 * 24);
    assert_eq!(p.bytes(), 10 * p.objects.len() as u64);
    // It begins at the very point of a full: that one and a clock's step before it, and what clocks may differ by.
    i.now_us = at("2026-01-09T02:05:00Z");
    assert_eq!(kept(&i)[0], "2026-01-05");
    i.now_us = at("2026-01-09T02:05:01Z");
    assert_eq!(kept(&i)[0], "2026-01-06");
}

#[test]
fn kinds_have_their_own_retention() {
    let mut fulls = Vec::new();
    let triggers = ["manual", "pre-migration", "pre-maintenance", "incident", "compliance", "schedule"];
    for t in triggers {
        fulls.push(Full { trigger: Trigger::parse(t), ..full(at("2026-01-05T02:00:00Z") + fulls.len() as i64) });
        assert_eq!(Trigger::parse(t).name(), t);
    }
    fulls.push(full(at("2026-01-06T02:00:00Z")));
    let gone = |i: &Input| -> BTreeSet<&str> {
        let p = plan(i);
        i.fulls.iter().zip(&p.fulls).filter(|(_, v)| !v.keep).map(|(f, _)| f.trigger.name()).collect()
    };
    let mut i = input("2026-02-04T01:00:00Z", policy(0, 1, 0, 0, 0), fulls);
    assert_eq!(gone(&i), ["schedule"].into());
    i.now_us = at("2026-02-05T02:00:00Z");
    assert_eq!(gone(&i), ["manual", "pre-maintenance", "pre-migration", "schedule"].into());
    i.now_us = at("2033-01-05T03:00:00Z");
    assert_eq!(gone(&i), ["compliance", "manual", "pre-maintenance", "pre-migration", "schedule"].into());
    assert_eq!(reasons(&i, 3), ["incident"]);
    i.fulls[3].released = true;
    assert!(gone(&i).contains("incident"));
}

#[test]
fn a_scheduled_full_stands_for_its_day_and_an_archive_for_its_month() {
    let mut fulls = vec![
        full(at("2026-01-01T02:00:00Z")),
        full(at("2026-01-20T02:00:00Z")),
        full(at("2026-01-20T09:00:00Z")),
        full(at("2026-02-01T02:00:00Z")),
    ];
    fulls[0].trigger = Trigger::Archive;
    fulls[2].trigger = Trigger::Manual;
    let mut i = input("2026-06-01T00:00:00Z", policy(0, 2, 0, 2, 0), fulls);
    assert_eq!((reasons(&i, 0), reasons(&i, 1)), (vec!["monthly"], vec!["daily"]));
    assert_eq!(reasons(&i, 2), ["expired"]);
    // Without the scheduled one, the other stands for the day.
    i.fulls.remove(1);
    assert_eq!(reasons(&i, 1), ["daily"]);
}

#[test]
fn what_is_dated_in_the_future_is_left_alone_and_stands_for_nothing() {
    let fulls =
        vec![full(at("2026-01-01T02:00:00Z")), full(at("2026-01-02T02:00:00Z")), full(at("2036-01-01T00:00:00Z"))];
    let i = input("2026-03-01T00:00:00Z", policy(0, 1, 0, 0, 0), fulls);
    assert_eq!(reasons(&i, 0), ["expired"]);
    assert_eq!(reasons(&i, 1), ["recovery_window", "daily", "last"]);
    assert!(reasons(&i, 2).contains(&"future"));
    // A clock that fell back to 1970: everything is in the future.
    let i = Input { now_us: 0, ..i };
    assert!(plan(&i).is_empty());
}

#[test]
fn a_hold_keeps_every_point_between_its_ends() {
    let fulls: Vec<Full> = (1..=9).map(|d| full(at(&format!("2026-01-0{d}T02:00:00Z")))).collect();
    let mut i = input("2026-03-01T00:00:00Z", policy(0, 0, 0, 0, 0), fulls);
    let first = at("2026-01-01T02:00:00Z");
    i.changes = (0..8).map(|d| changes(first + d * DAY_US, first + (d + 1) * DAY_US)).collect();
    assert_eq!(kept(&i), ["2026-01-09"]);
    let hold = |from: Option<&str>, to: Option<&str>| Hold {
        id: Uuid::from_u128(1),
        reason: "case 7".into(),
        from_us: from.map(at),
        to_us: to.map(at),
    };
    i.holds = vec![hold(Some("2026-01-03T12:00:00Z"), Some("2026-01-05T12:00:00Z"))];
    assert_eq!(kept(&i), ["2026-01-03", "2026-01-04", "2026-01-05", "2026-01-09"]);
    let held: Vec<bool> = plan(&i).changes.iter().map(|v| v.keep).collect();
    // From the full of the 3rd to the full of the 6th: the points of the 5th at noon are in the last of them.
    assert_eq!(held, [false, false, true, true, true, false, false, false]);
    i.holds = vec![hold(None, Some("2026-01-02T00:00:00Z"))];
    assert_eq!(kept(&i), ["2026-01-01", "2026-01-09"]);
    i.holds = vec![hold(Some("2026-01-07T12:00:00Z"), None)];
    assert_eq!(kept(&i), ["2026-01-07", "2026-01-08", "2026-01-09"]);
    i.holds = vec![hold(None, None)];
    assert!(plan(&i).is_empty());
    assert_eq!(plan(&i).fulls[0].reasons[0].to_string(), format!("held by {}: case 7", Uuid::from_u128(1)));
}

#[test]
fn a_running_restore_and_the_log_keep_what_they_read() {
    let fulls: Vec<Full> = (1..=3).map(|d| full(at(&format!("2026-01-0{d}T02:00:00Z")))).collect();
    let mut i = input("2026-03-01T00:00:00Z", policy(0, 0, 0, 0, 0), fulls);
    i.changes = vec![changes(0, at("2026-01-01T02:00:00Z")), changes(1, at("2026-01-01T03:00:00Z"))];
    i.changes[1].kind = ChangesKind::Changeset;
    i.running = vec![Running { id: Uuid::from_u128(1), until_us: i.now_us + 1 }];
    assert!(plan(&i).is_empty());
    i.running[0].until_us = i.now_us;
    assert_eq!(kept(&i), ["2026-01-03"]);
    // Objects of fulls that records name stay, though the fulls go.
    i.named_by_log = std::sync::Arc::new([i.fulls[0].objects[0].path.clone()].into());
    let p = plan(&i);
    assert_eq!(
        p.objects.iter().map(|o| &o.path).collect::<Vec<_>>(),
        [&i.fulls[1].objects[0].path, &i.changes[0].objects[0].path, &i.changes[1].objects[0].path]
    );
    // Changes of the log go below the full that everything is restored from, and never above it.
    assert_eq!((p.changes[1].keep, p.floor), (false, Some(i.fulls[2].point)));
    i.changes[1].to = Lsn(i.fulls[2].point.0 + 1);
    assert!(plan(&i).changes[1].keep);
    i.changes[1].to = i.fulls[2].point;
    i.fulls[2].whole = false;
    i.fulls[1].whole = false;
    i.fulls[0].whole = false;
    assert_eq!((plan(&i).changes[1].keep, plan(&i).floor), (true, None));
}

#[test]
fn a_full_that_leans_on_a_base_at_the_floor_keeps_it_there() {
    let fulls: Vec<Full> = (1..=3).map(|d| full(at(&format!("2026-01-0{d}T02:00:00Z")))).collect();
    let mut i = input("2026-03-01T00:00:00Z", policy(0, 0, 0, 0, 0), fulls);
    i.floor = Some(i.fulls[0].point);
    assert_eq!(plan(&i).floor, Some(i.fulls[2].point));
    i.fulls[0].trigger = Trigger::Incident;
    i.fulls[0].needs_log = true;
    assert_eq!(plan(&i).floor, Some(i.fulls[0].point));
    // Damaged, it is of no use to anybody.
    i.fulls[0].check = Check::Failed;
    assert_eq!(plan(&i).floor, Some(i.fulls[2].point));
}

#[test]
fn an_object_that_a_kept_full_refers_to_stays_with_it() {
    let mut fulls: Vec<Full> = (1..=3).map(|d| full(at(&format!("2026-01-0{d}T02:00:00Z")))).collect();
    let (a, b) = (fulls[0].objects[0].clone(), fulls[1].objects[0].clone());
    fulls[2].objects.push(a.clone());
    let p = plan(&input("2026-03-01T00:00:00Z", policy(0, 0, 0, 0, 0), fulls));
    assert_eq!(p.fulls.iter().map(|v| v.keep).collect::<Vec<_>>(), [false, false, true]);
    assert_eq!(p.objects, [b]);
}

#[test]
fn ten_years_of_days_leave_what_the_policy_says() {
    let started = std::time::Instant::now();
    let mut i = input("2016-01-01T03:00:00Z", Policy::default(), Vec::new());
    let mut taken = 0;
    while i.now_us < at("2026-01-01T00:00:00Z") {
        let point = i.now_us - HOUR_US;
        i.fulls.push(full(point));
        i.changes.extend((0..24).map(|h| changes(point - (24 - h) * HOUR_US, point - (23 - h) * HOUR_US)));
        i.changes.extend((0..24).map(|h| changeset(point - (24 - h) * HOUR_US, point - (23 - h) * HOUR_US)));
        if taken % 50 == 0 {
            i.bases.push(based(point - HOUR_US / 2));
        }
        taken += 1;
        remove(&mut i);
        // Every point of the window is there by ships alone: as fine as they came.
        let window = i.now_us - micros(i.policy.pitr);
        if taken > 8 {
            assert!(i.floor.is_some_and(|f| (f.0 as i64) < window && window - (f.0 as i64) <= DAY_US + HOUR_US));
            for us in [window, window + HOUR_US / 3, point] {
                assert!(by_ships(&i, us), "{}", text(us));
            }
        }
        i.now_us += DAY_US;
    }
    i.now_us -= DAY_US;
    assert_eq!(taken, 3653);
    let p = plan(&i);
    assert!(p.is_empty());
    let mut by_rule: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (f, v) in i.fulls.iter().zip(&p.fulls) {
        for r in &v.reasons {
            by_rule.entry(r.code()).or_default().push(text(f.point_us));
        }
    }
    let days = |n: i64| (0..n).rev().map(|d| text(i.now_us - d * DAY_US)).collect::<Vec<_>>();
    assert_eq!(by_rule["daily"], days(30));
    // The eighth day back is the full at or before the window's start: it begins at 03:00, the full is of 02:00.
    assert_eq!(by_rule["recovery_window"], days(8));
    assert_eq!(
        by_rule["weekly"],
        [
            "2025-10-19",
            "2025-10-26",
            "2025-11-02",
            "2025-11-09",
            "2025-11-16",
            "2025-11-23",
            "2025-11-30",
            "2025-12-07",
            "2025-12-14",
            "2025-12-21",
            "2025-12-28",
            "2025-12-31"
        ]
    );
    assert_eq!(
        by_rule["monthly"],
        [
            "2025-01-31",
            "2025-02-28",
            "2025-03-31",
            "2025-04-30",
            "2025-05-31",
            "2025-06-30",
            "2025-07-31",
            "2025-08-31",
            "2025-09-30",
            "2025-10-31",
            "2025-11-30",
            "2025-12-31"
        ]
    );
    assert_eq!(
        by_rule["annual"],
        ["2019-12-31", "2020-12-31", "2021-12-31", "2022-12-31", "2023-12-31", "2024-12-31", "2025-12-31"]
    );
    assert_eq!(by_rule["last"], ["2025-12-31"]);
    assert!(!by_rule.contains_key("oldest"));
    let all: BTreeSet<&String> = by_rule.values().flatten().collect();
    assert_eq!(all.len(), i.fulls.len());
    assert_eq!(i.fulls.len(), 30 + 7 + 10 + 6);
    assert_eq!(i.changes.len(), 2 * 7 * 24);
    assert!(i.bases.len() <= 1);
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}

/// One tenant's life: fulls and hourly changes at odd times, in small numbers of days so that periods collide.
fn any_input() -> impl Strategy<Value = Input> {
    let any_full = (0i64..900, 0u8..10, 0u8..12, any::<(bool, u8)>(), proptest::collection::vec(0u64..40, 0..4));
    let hold = (proptest::option::of(0i64..900), proptest::option::of(0i64..900));
    let counts = (0u64..40, 0u32..6, 0u32..4, 0u32..4, 0u32..3, 0u64..60, 0u32..3);
    (
        0i64..900,
        counts,
        proptest::collection::vec(any_full, 0..40),
        proptest::collection::vec(hold, 0..3),
        proptest::collection::vec(0u64..40, 0..4),
        (1i64..30, any::<bool>(), proptest::option::of(0i64..60), proptest::collection::btree_set(0i64..900, 0..6)),
    )
        .prop_map(|(now, c, fulls, holds, named, (step, running, settled, bases))| {
            let start = at("2024-11-20T02:00:00Z");
            let point = |d: i64| start + d * DAY_US;
            let fulls: BTreeMap<i64, Full> = fulls
                .into_iter()
                .map(|(d, check, trigger, (released, whole), objects)| {
                    let triggers = ["archive", "manual", "pre-migration", "incident", "compliance"];
                    let f = Full {
                        check: [Check::Failed, Check::Unchecked, Check::Abandoned]
                            .into_iter()
                            .nth(usize::from(check))
                            .unwrap_or(Check::Verified),
                        trigger: Trigger::parse(triggers.get(usize::from(trigger)).unwrap_or(&"schedule")),
                        released,
                        whole: whole % 8 > 1,
                        needs_log: whole % 4 == 1,
                        objects: objects.into_iter().map(object).collect(),
                        ..full(point(d))
                    };
                    (d, f)
                })
                .collect();
            let mut all: Vec<Changes> =
                (0..900 / step).map(|n| changes(point(n * step), point((n + 1) * step))).collect();
            all.extend((0..900).map(|n| changeset(point(n), point(n + 1))));
            let now_us = point(now) + HOUR_US;
            let holds = holds
                .into_iter()
                .enumerate()
                .map(|(n, (a, b))| Hold {
                    id: Uuid::from_u128(n as u128),
                    reason: String::new(),
                    from_us: a.map(point),
                    to_us: b.map(point),
                })
                .collect();
            Input {
                now_us,
                policy: Policy {
                    pitr: Duration::from_secs(c.0 * 86_400),
                    daily: c.1,
                    weekly: c.2,
                    monthly: c.3,
                    annual: c.4,
                    on_demand: Duration::from_secs(c.5 * 86_400),
                    compliance_years: c.6,
                },
                fulls: fulls.into_values().collect(),
                changes: all,
                holds,
                running: (running && step == 1)
                    .then(|| Running { id: Uuid::nil(), until_us: i64::MAX })
                    .into_iter()
                    .collect(),
                bases: bases.into_iter().map(|d| based(point(d) - HOUR_US)).collect(),
                floor: None,
                settled_us: settled.map_or(i64::MAX, |d| now_us - d * DAY_US),
                settled: Lsn::MAX,
                named_by_log: std::sync::Arc::new(named.into_iter().map(|n| object(n).path).collect()),
            }
        })
}

/// Whether a point can be restored: a verified full at or before it, and every change from there to it.
fn restorable(i: &Input, us: i64) -> bool {
    let bases = i.fulls.iter().filter(|f| f.check == Check::Verified && f.point_us <= us);
    bases.into_iter().any(|f| {
        let mut reached = f.point;
        let mut next: Vec<&Changes> =
            i.changes.iter().filter(|c| c.to > reached && c.kind == ChangesKind::Incremental).collect();
        next.sort_by_key(|c| c.to);
        for c in next {
            if reached.0 as i64 >= us || c.from > reached {
                break;
            }
            reached = c.to;
        }
        reached.0 as i64 >= us
    })
}

/// Whether a point can be restored as finely as ships came: from a full that holds every table, or from a base, with
/// every changeset from there on.
fn by_ships(i: &Input, us: i64) -> bool {
    let fulls = i.fulls.iter().filter(|f| f.check == Check::Verified && f.whole && f.point_us <= us).map(|f| f.point);
    let begin = fulls.chain(i.bases.iter().map(|b| b.cut).filter(|cut| cut.0 as i64 <= us)).max();
    let Some(mut reached) = begin else { return false };
    let ships = i.changes.iter().filter(|c| c.kind == ChangesKind::Changeset && c.to > reached);
    let mut next: Vec<(Lsn, Lsn)> = ships.map(|c| (c.from, c.to)).collect();
    next.sort();
    for (from, to) in next {
        if reached.0 as i64 >= us || from > reached {
            break;
        }
        reached = to;
    }
    reached.0 as i64 >= us
}

fn pruned(i: &Input) -> Input {
    let mut after = i.clone();
    remove(&mut after);
    after
}

fn removed(i: &Input) -> BTreeSet<Uuid> {
    let p = plan(i);
    let fulls = i.fulls.iter().map(|f| f.id).zip(&p.fulls);
    let changes = i.changes.iter().map(|c| c.id).zip(&p.changes);
    fulls.chain(changes).filter(|(_, v)| !v.keep).map(|(id, _)| id).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_item_has_a_verdict_with_reasons_and_the_plan_is_the_same_again(i in any_input()) {
        let p = plan(&i);
        prop_assert_eq!(&p, &plan(&i));
        prop_assert_eq!((p.fulls.len(), p.changes.len()), (i.fulls.len(), i.changes.len()));
        prop_assert!(p.fulls.iter().chain(&p.changes).all(|v| !v.reasons.is_empty()));
        // The order in which the catalog gives them says nothing.
        let mut turned = i.clone();
        turned.fulls.reverse();
        turned.changes.reverse();
        prop_assert_eq!(removed(&turned), removed(&i));
    }

    #[test]
    fn no_object_goes_that_something_kept_needs(i in any_input()) {
        let p = plan(&i);
        let after = pruned(&i);
        let needed: HashSet<&String> = after.fulls.iter().flat_map(|f| &f.objects)
            .chain(after.changes.iter().flat_map(|c| &c.objects)).chain(after.bases.iter().map(|b| &b.object))
            .map(|o| &o.path).collect();
        for o in &p.objects {
            prop_assert!(!needed.contains(&o.path) && !i.named_by_log.contains(&o.path));
        }
        // And what nobody needs does go.
        let gone: HashSet<&String> = p.objects.iter().map(|o| &o.path).collect();
        for o in i.fulls.iter().flat_map(|f| &f.objects).chain(i.changes.iter().flat_map(|c| &c.objects))
            .chain(i.bases.iter().map(|b| &b.object)) {
            prop_assert!(needed.contains(&o.path) || i.named_by_log.contains(&o.path) || gone.contains(&o.path));
        }
    }

    #[test]
    fn the_last_good_full_stays(i in any_input()) {
        let newest = |i: &Input| i.fulls.iter()
            .filter(|f| f.check == Check::Verified && f.point_us <= i.now_us).map(|f| f.point_us).max();
        prop_assert_eq!(newest(&pruned(&i)), newest(&i));
        prop_assert!(i.fulls.is_empty() || !pruned(&i).fulls.is_empty());
    }

    #[test]
    fn every_point_of_the_window_and_of_holds_that_could_be_restored_still_can(i in any_input()) {
        let after = pruned(&i);
        let from = i.now_us - micros(i.policy.pitr);
        for day in 0..900 {
            let us = at("2024-11-20T12:00:00Z") + day * DAY_US;
            let promised = us >= from || i.holds.iter().any(|h| {
                h.from_us.is_none_or(|f| f <= us) && h.to_us.is_none_or(|t| us <= t)
            });
            if promised && restorable(&i, us) {
                prop_assert!(restorable(&after, us), "{}", text(us));
            }
        }
    }

    #[test]
    fn of_the_log_only_goes_what_is_below_a_full_that_stays(i in any_input()) {
        let p = plan(&i);
        let after = pruned(&i);
        let of_log = i.changes.iter().zip(&p.changes).filter(|(c, v)| c.kind == ChangesKind::Changeset && !v.keep);
        let gone: Vec<&Changes> = of_log.map(|(c, _)| c).collect();
        let bases: Vec<&Based> = i.bases.iter().zip(&p.bases).filter(|(_, v)| !v.keep).map(|(b, _)| b).collect();
        let Some(floor) = p.floor else {
            prop_assert!(gone.is_empty() && bases.is_empty());
            return Ok(());
        };
        prop_assert!(gone.iter().all(|c| c.to <= floor) && bases.iter().all(|b| b.cut < floor));
        prop_assert!(after.fulls.iter().any(|f| f.point == floor && f.whole && f.check == Check::Verified));
        let from = (i.now_us - micros(i.policy.pitr)).min(i.settled_us);
        prop_assert!((floor.0 as i64) < from && i.running.is_empty());
        // What is promised point by point is as fine as it was, by ships alone; and so is all that is above the floor.
        for day in 0..900 {
            let us = at("2024-11-20T12:00:00Z") + day * DAY_US;
            let held = i.holds.iter().any(|h| h.from_us.is_none_or(|f| f <= us) && h.to_us.is_none_or(|t| us <= t));
            if (us >= from || held || us > floor.0 as i64) && by_ships(&i, us) {
                prop_assert!(by_ships(&after, us), "{}", text(us));
            }
        }
    }

    #[test]
    fn the_point_of_a_full_that_is_kept_and_does_not_stand_alone_is_in_the_log(i in any_input()) {
        let after = pruned(&i);
        for f in after.fulls.iter().filter(|f| f.leans_on_log()) {
            if by_ships(&i, f.point_us) {
                prop_assert!(by_ships(&after, f.point_us), "{}", text(f.point_us));
            }
        }
    }

    #[test]
    fn a_floor_never_goes_back(i in any_input(), days in 0i64..400, hold in proptest::option::of(0i64..900)) {
        let mut after = pruned(&i);
        after.now_us += days * DAY_US;
        after.settled_us = i64::MAX;
        let from_us = hold.map(|d| at("2024-11-20T02:00:00Z") + d * DAY_US);
        after.holds.push(Hold { id: Uuid::from_u128(9), reason: String::new(), from_us, to_us: from_us });
        let p = plan(&after);
        prop_assert!(p.floor >= after.floor);
        // Where it stands, a full stands, too: the window that begins there can be restored.
        if let Some(floor) = p.floor {
            prop_assert!(pruned(&after).fulls.iter().any(|f| f.point == floor));
        }
    }

    #[test]
    fn planning_what_was_left_removes_nothing_more(i in any_input()) {
        let after = pruned(&i);
        prop_assert!(removed(&after).is_empty(), "{:?}", removed(&after));
    }

    #[test]
    fn asking_for_more_removes_no_more(i in any_input(), more in (0u64..9, 0u32..3, 0u32..3, 0u32..3, 0u32..3, 0u64..9, 0u32..2)) {
        let day = |n: u64| Duration::from_secs(n * 86_400);
        let mut generous = i.clone();
        let p = &mut generous.policy;
        p.pitr += day(more.0);
        p.daily += more.1;
        p.weekly += more.2;
        p.monthly += more.3;
        p.annual += more.4;
        p.on_demand += day(more.5);
        p.compliance_years += more.6;
        prop_assert!(removed(&generous).is_subset(&removed(&i)));
        let mut held = i.clone();
        held.holds.push(Hold { id: Uuid::from_u128(9), reason: String::new(), from_us: Some(i.now_us - 100 * DAY_US), to_us: None });
        prop_assert!(removed(&held).is_subset(&removed(&i)));
    }

    #[test]
    fn a_rule_finds_as_many_periods_as_it_asks_for_or_keeps_the_oldest(i in any_input()) {
        let p = plan(&i);
        let past: Vec<&Full> = i.fulls.iter()
            .filter(|f| f.check == Check::Verified && f.point_us <= i.now_us + FUTURE_US).collect();
        let asked = [i.policy.daily, i.policy.weekly, i.policy.monthly, i.policy.annual];
        for (rule, asked) in Rule::ALL.into_iter().zip(asked) {
            let there: BTreeSet<_> = past.iter().map(|f| calendar::Period::of(rule, f.point_us)).collect();
            let kept: BTreeSet<_> = i.fulls.iter().zip(&p.fulls)
                .filter(|(_, v)| v.reasons.iter().any(|r| matches!(r, Reason::Period { rule: k, .. } if *k == rule)))
                .map(|(f, _)| calendar::Period::of(rule, f.point_us)).collect();
            let expected: BTreeSet<_> = there.iter().rev().take(asked as usize).copied().collect();
            prop_assert_eq!(&kept, &expected);
            if asked as usize > there.len() && let Some(oldest) = past.iter().min_by_key(|f| f.point_us) {
                prop_assert!(!removed(&i).contains(&oldest.id));
            }
        }
    }
}

fn micros(d: Duration) -> i64 {
    d.as_micros() as i64
}
