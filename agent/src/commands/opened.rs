//! What every verb that only reads opens first: the keyring and the repository, never the source.

use crate::clock::SystemClock;
use crate::config::Config;
use crate::dial;
use crate::error::{Error, Kind, Result};
use crate::history::History;
use crate::keyring::{Keyring, TenantEntry};
use crate::merge::Scratch;
use crate::repository::{Access, Repository};
use crate::tenant::Tenant;
use coffer_wire::TenantKind;
use std::sync::Arc;
use uuid::Uuid;

/// Rows that belong to no tenant of the application's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Reserved {
    /// Rows without a tenant
    Unassigned,
    /// Rows that capture could not attribute
    Unresolved,
    /// Reference data
    Shared,
}

impl Reserved {
    pub fn tenant(self) -> Tenant {
        Tenant::reserved(match self {
            Self::Unassigned => TenantKind::Unassigned,
            Self::Unresolved => TenantKind::Unresolved,
            Self::Shared => TenantKind::Shared,
        })
    }
}

/// An open repository.
pub struct Opened {
    pub keyring: Arc<Keyring>,
    pub repo: Arc<Repository>,
    pub from: Option<String>,
}

impl Opened {
    /// Opens what the configuration names. `from`: the one store to read from.
    pub async fn new(config: &Config, from: Option<&str>) -> Result<Self> {
        dial::install_crypto_provider();
        let clock = Arc::new(SystemClock);
        let keyring = Keyring::open(&config.keys, clock.clone()).await?;
        let repo = Repository::open(config, keyring.clone(), clock, Access::Read).await?;
        Ok(Self { keyring, repo, from: from.map(str::to_owned) })
    }

    /// The sources that a verb looks at: the named one, or all. The configuration need not have them: a restore needs
    /// the repository and the keyring alone.
    pub fn sources(&self, named: Option<&str>) -> Result<Vec<(String, Uuid)>> {
        let all = self.keyring.sources();
        let Some(name) = named else { return Ok(all) };
        match all.iter().find(|(n, _)| n == name) {
            Some(s) => Ok(vec![s.clone()]),
            None => Err(self.no_source(name)),
        }
    }

    /// The one source that a verb acts on.
    pub fn source(&self, config: &Config, named: Option<&str>) -> Result<(String, Uuid)> {
        let name = match named {
            Some(n) => n.to_owned(),
            None if config.source.is_empty() => match self.keyring.sources().as_slice() {
                [(only, _)] => only.clone(),
                _ => return Err(Error::usage("the configuration has no [source.NAME] section: add --source NAME")),
            },
            None => config.pick_source(None)?.0.to_owned(),
        };
        let uid = self.keyring.source(&name).ok_or_else(|| self.no_source(&name))?;
        Ok((name, uid))
    }

    fn no_source(&self, name: &str) -> Error {
        let known: Vec<String> = self.keyring.sources().into_iter().map(|(n, _)| n).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Error::new(Kind::NotFound, format!("the repository has nothing of a source '{name}'; it has: {known}"))
            .hint("`coffer run` begins with a source")
    }

    pub async fn history(&self, source: Uuid) -> Result<History> {
        History::load(&self.repo, &self.keyring, source, self.from.as_deref()).await
    }

    /// The tenant's entry.
    pub fn tenant(&self, source: (&str, Uuid), tenant: &Tenant) -> Result<TenantEntry> {
        self.keyring.find(source.1, tenant).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("source {} has no tenant '{tenant}' in the repository", source.0))
                .hint("`coffer list` shows them; a tenant is known once its first rows are durable")
        })
    }
}

/// The scratch of a verb: the configured spool or, where that is not ours to write to, the system's folder for
/// temporary files; either way sealed and without a name.
pub fn scratch(config: &Config) -> Result<Scratch> {
    Scratch::new(&config.spool.dir).or_else(|e| {
        tracing::debug!("{e}; using the folder for temporary files");
        Scratch::new(&std::env::temp_dir())
    })
}
