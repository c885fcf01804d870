//! One file per verb.

pub mod demo;
pub mod doctor;
pub mod init;
pub mod run;
pub mod status;
