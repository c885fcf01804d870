//! `coffer run`: the sidecar. See [`crate::run`].

use crate::config::Config;
use crate::error::Result;

/// Runs until SIGTERM or SIGINT, or until a source cannot go on.
pub async fn run(config: Config) -> Result<()> {
    crate::run::run(config).await
}
