//! Restores.

pub mod in_place;
