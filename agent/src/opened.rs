//! What every verb that only reads opens first: the keyring and the repository, never the source.

use crate::clock::SystemClock;
use crate::config::Config;
use crate::dial;
use crate::error::{Error, Kind, Result};
use crate::history::History;
use crate::keyring::{Keyring, TenantEntry, lost};
use crate::merge::Scratch;
use crate::repository::{Access, Log, Repository, paths};
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
        Self::with(config, from, Access::Read).await
    }

    /// The same for a verb that writes: every required store has to answer.
    pub async fn for_writing(config: &Config) -> Result<Self> {
        Self::with(config, None, Access::Write).await
    }

    async fn with(config: &Config, from: Option<&str>, access: Access) -> Result<Self> {
        dial::install_crypto_provider();
        let clock = Arc::new(SystemClock);
        let keyring = Keyring::open(&config.keys, clock.clone()).await?;
        let repo = Repository::open(config, keyring.clone(), clock, access).await?;
        Ok(Self { keyring, repo, from: from.map(str::to_owned) })
    }

    /// The sources that a verb looks at: the named one, or all. The configuration need not have them: a restore needs
    /// the repository and the keyring alone.
    pub async fn sources(&self, named: Option<&str>) -> Result<Vec<(String, Uuid)>> {
        if let Some(name) = named {
            return Ok(vec![(name.to_owned(), self.source_uid(name).await?)]);
        }
        match self.nameless_sources().await?.first() {
            Some(uid) => Err(lost(&format!("the source of folder {}", paths::source_dir(*uid)))),
            None => Ok(self.keyring.sources()),
        }
    }

    /// Sources that the stores have folders of and the keyring has no entry of.
    pub async fn nameless_sources(&self) -> Result<Vec<Uuid>> {
        let known: Vec<Uuid> = self.keyring.sources().into_iter().map(|(_, uid)| uid).collect();
        let stored = self.repo.source_uids(self.from.as_deref()).await?;
        Ok(stored.into_iter().filter(|uid| !known.contains(uid)).collect())
    }

    /// The one source that a verb acts on.
    pub async fn source(&self, config: &Config, named: Option<&str>) -> Result<(String, Uuid)> {
        let name = match named {
            Some(n) => n.to_owned(),
            None if config.source.is_empty() => match self.sources(None).await?.as_slice() {
                [(only, _)] => only.clone(),
                _ => return Err(Error::usage("the configuration has no [source.NAME] section: add --source NAME")),
            },
            None => config.pick_source(None)?.0.to_owned(),
        };
        let uid = self.source_uid(&name).await?;
        Ok((name, uid))
    }

    async fn source_uid(&self, name: &str) -> Result<Uuid> {
        if let Some(uid) = self.keyring.source(name) {
            return Ok(uid);
        }
        let uid = self.keyring.source_uid(name);
        if self.repo.source_uids(self.from.as_deref()).await?.contains(&uid) {
            return Err(lost(&format!("source '{name}' ({})", uid.simple())));
        }
        Err(self.no_source(name))
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
    pub async fn tenant(&self, source: (&str, Uuid), tenant: &Tenant) -> Result<TenantEntry> {
        if let Some(entry) = self.keyring.find(source.1, tenant) {
            return Ok(entry);
        }
        let uid = self.keyring.tenant_uid(source.1, tenant);
        let log = Log::open(&self.repo, source.1, self.from.as_deref()).await?;
        if log.records().iter().flat_map(|r| r.objects()).any(|o| o.tenant == uid) {
            return Err(lost(&format!("tenant '{tenant}' ({})", uid.simple())));
        }
        Err(Error::new(Kind::NotFound, format!("source {} has no tenant '{tenant}' in the repository", source.0))
            .hint("`coffer list` shows them; a tenant is known once its first rows are durable"))
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
