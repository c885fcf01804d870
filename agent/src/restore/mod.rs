//! Restores: into the live database, into a new one, into files.

pub mod database;
pub mod encode;
pub mod files;
pub mod in_place;
mod schema;
mod sink;

pub use sink::{Counts, Selected, TableRows};
