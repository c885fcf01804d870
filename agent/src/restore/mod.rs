//! Restores: into the live database, into a new one, into files.

pub mod database;
pub mod difference;
pub mod drill;
pub mod encode;
pub mod files;
pub mod in_place;
pub mod keys;
pub mod large_objects;
pub mod large_takers;
mod load;
mod moment;
pub mod once;
#[cfg(feature = "parquet")]
mod parquet;
pub mod rename;
pub mod request;
mod run;
mod schema;
mod side;
mod sink;
pub mod undo;
mod wide;

pub use request::{Means, Mode, Place, Report, Request, TableReport};
pub use run::run;
pub use sink::{Counts, Selected, Selection, TableRows, Watch};
pub(crate) use wide::line_to_compare;
