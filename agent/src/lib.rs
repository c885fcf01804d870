//! The agent of pg_coffer. ARCHITECTURE.md shows the rooms and who calls whom.

pub mod alarms;
pub mod batch;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod crypto;
pub mod demux;
pub mod dial;
pub mod dsn;
pub mod error;
pub mod failpoints;
pub mod keyring;
pub mod merge;
pub mod replication;
pub mod reporter;
pub mod repository;
pub mod run;
pub mod seal_pool;
pub mod ship;
pub mod source;
pub mod spool;
pub mod sql;
pub mod status;
pub mod tenant;
