//! The out-of-process tests, in one binary: real servers, the command line and SQL only.

/// One test per PostgreSQL major for each function that takes the major.
macro_rules! on_majors {
    ($($name:ident: $f:ident;)*) => {$(
        mod $name {
            #[test]
            fn pg15() {
                crate::on_major(15, super::$f);
            }
            #[test]
            fn pg18() {
                crate::on_major(18, super::$f);
            }
        }
    )*};
}

/// Runs a test unless `COFFER_TEST_MAJORS` leaves the major out.
fn on_major(major: u32, test: impl Fn(u32)) {
    if coffer_tests::majors().contains(&major) {
        test(major);
    } else {
        println!("left out: COFFER_TEST_MAJORS has no {major}");
    }
}

mod alarms;
mod archive;
mod awkward;
mod big;
mod busy;
mod bytes;
mod compaction;
mod constraints;
mod crash;
mod ddl;
mod drill;
mod exactness;
mod failover;
mod faults;
mod fence;
mod forged;
mod harness;
mod independence;
mod isolation;
mod jobs;
mod large_objects;
mod layouts;
mod names;
mod oracle;
mod paths;
mod readers;
mod reading;
mod refusals;
mod restores;
mod retention;
mod rules;
mod scrub;
mod side;
mod source;
mod spelling;
mod thread;
mod types;
mod upgrade;
mod validation;
