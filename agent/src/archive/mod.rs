//! Archives: fulls that are complete by themselves.
//!
//! An archive is a full whose every row lies in objects written for it alone. Beside them, in the tenant's own folder: the
//! reference data that its rows may refer to, copies of the definitions, of the tenant's roles and of its large objects,
//! and a document ([`document`]) that says what there is, for people and for [`open`]. The document's name carries the
//! archive's id, so an archive is found, and restored from, without log and catalog: its objects, the keyring and the
//! KEK are all that it takes.

pub mod document;
mod make;
mod open;

pub use document::Document;
pub use open::{Alone, alone, differs};
