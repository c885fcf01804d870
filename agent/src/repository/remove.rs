//! Removing objects, by exact name, from every store. Only what a removal record names goes this way, and leases.

use super::store::Store;
use super::{Member, Repository};
use crate::error::{Error, Kind, Result};
use futures::future::join_all;
use std::sync::Arc;

impl Repository {
    /// Removes an object from every store; one that is not there is none the worse.
    ///
    /// Returns the names of optional stores that did not answer: there it may still be.
    pub async fn remove(&self, path: &str) -> Result<Vec<String>> {
        let each = self.members.iter().map(|m| async move { (m, self.remove_from(m, path).await) });
        let mut away = Vec::new();
        for (m, removed) in join_all(each).await {
            match removed {
                Ok(()) => {}
                Err(e) if e.kind() == Kind::Unreachable && !m.store.required() => {
                    tracing::debug!("an object stays for now: {e}");
                    away.push(m.store.name().to_owned());
                }
                Err(e) => return Err(e),
            }
        }
        Ok(away)
    }

    async fn remove_from(&self, m: &Member, path: &str) -> Result<()> {
        // A store that did not prove to be of this repository may be another's.
        if !m.attached() {
            return Err(Error::new(
                Kind::Unreachable,
                format!("store {} ({}) did not answer", m.store.name(), m.store.shown()),
            ));
        }
        m.store.delete(path).await
    }

    /// The stores that answered and proved to be of this repository.
    pub(crate) fn attached_stores(&self) -> impl Iterator<Item = &Arc<Store>> {
        self.members.iter().filter(|m| m.attached()).map(|m| &m.store)
    }

    /// The names of stores that did not.
    pub(crate) fn stores_away(&self) -> Vec<String> {
        self.members.iter().filter(|m| !m.attached()).map(|m| m.store.name().to_owned()).collect()
    }
}
