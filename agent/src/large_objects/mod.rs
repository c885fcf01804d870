//! Large objects (`pg_largeobject`): what rows of tenants refer to by OID in columns that the registry names.
//!
//! They are not in the replication stream, so they are read over SQL, under one snapshot, with bases and once a day
//! ([`read`]), into objects of their own under each tenant's key ([`frames`]). A restore takes those that the rows at
//! its target refer to ([`crate::restore::large_objects`]); their content is as of the reading, and is said to be.
//!
//! No object is ever whole in memory: it is read, sealed, opened and written in pieces.

pub mod frames;
mod oids;
mod read;

pub use oids::OidSet;
pub use read::{Reading, columns, read_large_objects};
