//! What is looked at again and again while the agent runs, so that nobody learns from a restore that a backup is none.
//!
//! [`live`] compares a tenant's rows in the repository with its live ones, [`drills`] restores it into a scratch database:
//! each tenant in its turn ([`rounds`]), or when somebody asks. [`scrub`] reads back, by and by, everything that is
//! stored; [`objects`] is what reading an object back means. What is found becomes records of the catalog, alarms and
//! figures in [`results`]: an alarm stands until the same look finds nothing.

pub mod drills;
pub mod figures;
pub mod listing;
pub mod live;
pub mod objects;
pub mod results;
pub mod rounds;
pub mod scrub;
pub mod server;
mod throttle;
pub mod turns;
