//! The agent of pg_coffer. ARCHITECTURE.md shows the rooms and who calls whom.

pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod crypto;
pub mod dial;
pub mod dsn;
pub mod error;
pub mod failpoints;
pub mod keyring;
pub mod merge;
pub mod repository;
pub mod sql;
pub mod tenant;
