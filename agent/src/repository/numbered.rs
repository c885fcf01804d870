//! Numbered records that many writers append: the tenants' catalogs ([`crate::catalog`]).
//!
//! A number is won at the sequencer. The other required stores get the record next; optional ones when they are brought
//! up to date, objects before records.

use super::store::{Created, Store};
use super::{Member, Repository, paths, patiently};
use crate::catalog::{self, Catalog};
use crate::error::{Error, Kind, Result};
use bytes::Bytes;
use futures::future::try_join_all;
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use uuid::Uuid;

impl Repository {
    /// Puts a numbered record at the sequencer. Waits while it does not answer.
    pub async fn create_at_sequencer(&self, path: &str, bytes: Bytes) -> Result<Created> {
        let store = &self.members[self.sequencer].store;
        patiently(store, || store.create(path, bytes.clone())).await
    }

    /// Puts a record that was won at the sequencer into the other required stores.
    pub async fn create_at_others(&self, path: &str, bytes: Bytes) -> Result<()> {
        let sequencer = &self.members[self.sequencer].store;
        let others = self.required().filter(|m| !Arc::ptr_eq(&m.store, sequencer));
        try_join_all(others.map(|m| async {
            match patiently(&m.store, || m.store.create(path, bytes.clone())).await? {
                Created::Lost(_) => Err(another(&m.store, path)),
                _ => Ok(()),
            }
        }))
        .await
        .map(drop)
    }

    /// The stores that an append has to reach.
    pub fn required_stores(&self) -> impl Iterator<Item = &Arc<Store>> {
        self.required().map(|m| &m.store)
    }

    /// Brings a catalog to every required store: what its records name, then the records. One that was optional before
    /// may lack both.
    pub async fn level_catalog(self: &Arc<Self>, source: Uuid, tenant: Uuid) -> Result<()> {
        for m in self.required() {
            patiently(&m.store, || self.catch_up_catalog(m, source, tenant)).await?;
        }
        Ok(())
    }

    /// Tells the optional stores' copier that a catalog grew.
    pub fn note_catalog(&self, source: Uuid, tenant: Uuid) {
        for m in self.members.iter().filter(|m| !m.store.required()) {
            let mut all = m.catalogs.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(Some(some)) = all.get_mut(&source) {
                some.insert(tenant);
            }
        }
        self.grown.notify_waiters();
    }

    /// Copies what a store lacks of the catalogs that grew: what the fulls and incrementals that count consist of, then
    /// the records.
    pub(super) async fn catch_up_catalogs(self: &Arc<Self>, m: &Member, source: Uuid) -> Result<()> {
        let taken = {
            let mut all = m.catalogs.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(source, Some(BTreeSet::new())).flatten()
        };
        let grown: BTreeSet<Uuid> = match taken {
            Some(some) => some,
            None => catalog::tenants(self, source, None).await?.into_keys().collect(),
        };
        // What is wrong with one tenant keeps no other from being copied.
        let mut failed = None;
        for tenant in grown {
            if let Err(e) = self.catch_up_catalog(m, source, tenant).await {
                let mut all = m.catalogs.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(Some(again)) = all.get_mut(&source) {
                    again.insert(tenant);
                }
                failed.get_or_insert(e);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn catch_up_catalog(self: &Arc<Self>, m: &Member, source: Uuid, tenant: Uuid) -> Result<()> {
        let catalog = Catalog::open(self, source, tenant, None).await?;
        for object in catalog.state().objects() {
            self.copy_object(m, object).await?;
        }
        self.copy_records(m, source, tenant).await
    }

    async fn copy_records(&self, m: &Member, source: Uuid, tenant: Uuid) -> Result<()> {
        let folder = paths::catalog_dir(source, tenant);
        let has: BTreeSet<String> = m.store.list(&folder).await?.into_iter().map(|(name, _)| name).collect();
        let mut wanted = BTreeSet::new();
        for other in self.members.iter().filter(|o| o.attached() && !std::ptr::eq(*o, m)) {
            match other.store.list(&folder).await {
                Ok(l) => wanted.extend(l.into_iter().map(|(name, _)| name)),
                Err(e) if e.kind() == Kind::Unreachable && !other.store.required() => {}
                Err(e) => return Err(e),
            }
        }
        for path in wanted.difference(&has) {
            let bytes = self.record_from_others(m, path).await?;
            if let Created::Lost(_) = m.store.create(path, bytes).await? {
                return Err(another(&m.store, path));
            }
        }
        Ok(())
    }
}

fn another(store: &Store, path: &str) -> Error {
    Error::new(Kind::Verification, format!("store {} holds another record {path} than the sequencer", store.name()))
        .code("chain_gap")
}
