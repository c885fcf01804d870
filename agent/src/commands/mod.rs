//! One file per verb.

pub mod backup;
pub mod compact;
pub mod demo;
pub mod diff;
pub mod doctor;
pub mod export;
pub mod hold;
pub mod init;
pub mod list;
pub mod progress;
pub mod prune;
pub mod restore;
pub mod run;
pub mod show;
pub mod status;
pub mod verify;
