//! Restores: into the live database, into a new one, into files.

pub mod database;
pub mod encode;
pub mod files;
pub mod in_place;
pub mod large_objects;
pub mod large_takers;
pub mod request;
mod run;
mod schema;
mod sink;

pub use request::{Means, Mode, Place, Report, Request, TableReport};
pub use run::run;
pub use sink::{Counts, Selected, TableRows, Watch};
