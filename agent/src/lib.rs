//! The agent of pg_coffer. ARCHITECTURE.md shows the rooms and who calls whom.

pub mod clock;
pub mod config;
pub mod error;
pub mod failpoints;
pub mod tenant;
pub mod dial;
pub mod dsn;
pub mod sql;
