//! The repository: one or more stores that hold the same objects, and the commit log that says which of them count.
//!
//! Invariants:
//! - an object is in every required store before a record names it; an object that no record names does not exist;
//! - numbered names are won at the *sequencer*, the first required store, fixed at `init`; every other name carries 128
//!   random bits; nothing is overwritten;
//! - a store that does not answer makes writers wait, never skip; readers may name another one.

mod aws_profile;
mod checkpoint;
#[cfg(test)]
mod checkpoint_tests;
mod descriptor;
#[cfg(feature = "failpoints")]
pub mod faults;
mod io;
mod log;
pub mod model;
mod numbered;
mod packs;
pub mod paths;
mod probe;
mod remove;
mod replicate;
mod store;
#[cfg(test)]
pub(crate) mod tests;
mod url;

pub use checkpoint::Checkpoint;
pub use io::{ObjectRanges, ObjectReader, ObjectWriter};
pub use log::{Draft, Log};
pub use model::{Body, LogRecord, ObjectRef};
pub use packs::records_of_a_pack;
pub use probe::probe;
pub use store::{Created, Health, Store};
pub use url::{Directory, connect};

use crate::clock::SharedClock;
use crate::config::{Config, LockMode};
use crate::crypto::{Header, Sealed, hex};
use crate::error::{Error, Kind, Result};
use crate::keyring::Keyring;
use bytes::Bytes;
use coffer_wire::Lsn;
use descriptor::Descriptor;
use futures::future::try_join_all;
use packs::Shelf;
use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// First and longest wait between attempts at a store that does not answer.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// What a repository is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Stores that do not answer are a warning until something is read from them.
    Read,
    /// Every required store must answer and pass its trial.
    Write,
}

/// A store of the repository.
struct Member {
    store: Arc<Store>,
    /// It answered and proved to be of this repository.
    attached: AtomicBool,
    /// What is durable there, by source.
    durable: Mutex<HashMap<Uuid, Lsn>>,
    /// The record before which it is known to have all, by source.
    complete: Mutex<HashMap<Uuid, u64>>,
    /// Catalogs that grew since it was brought up to date, by source and tenant; `None`: any may have.
    catalogs: Mutex<HashMap<Uuid, Option<BTreeSet<Uuid>>>>,
}

/// How a store is, for status and metrics.
#[derive(Clone, Debug)]
pub struct StoreStatus {
    pub name: String,
    pub url: String,
    pub required: bool,
    pub up: bool,
    /// Of the source that was asked for; `None` until something is known.
    pub durable_lsn: Option<Lsn>,
    pub last_error: Option<String>,
    pub down_for: Option<Duration>,
}

/// See the module.
pub struct Repository {
    uid: Uuid,
    members: Vec<Member>,
    /// Index of the sequencer.
    sequencer: usize,
    access: Access,
    keyring: Arc<Keyring>,
    clock: SharedClock,
    /// Told when a log grows, for the copier.
    grown: tokio::sync::Notify,
    /// Number after the newest record that this process appended, by source.
    ends: Mutex<HashMap<Uuid, u64>>,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let stores: Vec<_> = self.members.iter().map(|m| &m.store).collect();
        f.debug_struct("Repository").field("uid", &self.uid).field("stores", &stores).finish_non_exhaustive()
    }
}

impl Repository {
    /// Makes the repository of a keyring in stores that hold none; refused when one of them does.
    pub async fn create(config: &Config, keyring: Arc<Keyring>, clock: SharedClock) -> Result<Arc<Self>> {
        refuse_existing(config).await?;
        let stores = connect_all(config, Directory::Make)?;
        try_join_all(stores.iter().map(|s| probe(s))).await?;
        let sequencer = sequencer_of(config)?;
        let (uid, key, now) = (keyring.repository_uid(), keyring.repository_key(), clock.now_us());
        let sequencer_name = stores[sequencer].name().to_owned();
        // The sequencer last: only with it the repository exists.
        let others = (0..stores.len()).filter(|i| *i != sequencer);
        let mut written: Vec<&Store> = Vec::new();
        for i in others.chain([sequencer]) {
            let store = &stores[i];
            if let Err(e) = Descriptor::new(uid, store.name(), &sequencer_name, now).write(store, &key).await {
                for s in written {
                    let _ = s.delete(paths::DESCRIPTOR).await;
                }
                return Err(e);
            }
            written.push(store);
        }
        Self::open(config, keyring, clock, Access::Write).await
    }

    /// Opens the repository of a keyring.
    pub async fn open(config: &Config, keyring: Arc<Keyring>, clock: SharedClock, access: Access) -> Result<Arc<Self>> {
        let stores = connect_all(config, Directory::MustExist)?;
        let repository = Self {
            uid: keyring.repository_uid(),
            sequencer: sequencer_of(config)?,
            members: stores
                .into_iter()
                .map(|store| Member {
                    store,
                    attached: AtomicBool::new(false),
                    durable: Mutex::default(),
                    complete: Mutex::default(),
                    catalogs: Mutex::default(),
                })
                .collect(),
            access,
            keyring,
            clock,
            grown: tokio::sync::Notify::new(),
            ends: Mutex::default(),
        };
        let mut first_error = None;
        for m in &repository.members {
            match repository.attach(m).await {
                Ok(()) => {}
                Err(e) if e.kind() == Kind::Unreachable && !(access == Access::Write && m.store.required()) => {
                    tracing::warn!("{e}");
                    first_error.get_or_insert(e);
                }
                Err(e) if e.kind() == Kind::NotFound && !m.store.required() => {
                    tracing::warn!("{e}; it is filled while `coffer run` runs");
                }
                Err(e) => return Err(e),
            }
        }
        match first_error {
            Some(e) if !repository.members.iter().any(Member::attached) => Err(e),
            _ => Ok(Arc::new(repository)),
        }
    }

    /// Checks that a store is of this repository and, for writers, that it can be trusted.
    async fn attach(&self, m: &Member) -> Result<()> {
        let store = &m.store;
        let Some(d) = Descriptor::read(store, self.uid, &*self.keyring).await? else {
            // Records without a descriptor: it was there once.
            for (_, source) in self.keyring.sources() {
                if !Shelf::list(store, source).await?.is_empty() {
                    return Err(Error::new(
                        Kind::Verification,
                        format!("store {} ({}): object {} is missing", store.name(), store.shown(), paths::DESCRIPTOR),
                    )
                    .code("missing")
                    .hint("put it back from a copy of this store: it never changes"));
                }
            }
            return Err(Error::new(
                Kind::NotFound,
                format!("store {} ({}) holds no repository", store.name(), store.shown()),
            )
            .code("repository_missing")
            .hint("run `coffer init` for a new repository, or correct the store's url"));
        };
        let sequencer = self.members[self.sequencer].store.name();
        if d.store != store.name() {
            return Err(Error::usage(format!(
                "store {} ({}) was made as '{}': two stores are swapped, or one was renamed",
                store.name(),
                store.shown(),
                d.store
            )));
        }
        // Readers win no numbers: they may know only some of the stores.
        if d.sequencer != sequencer && self.access == Access::Write {
            return Err(Error::usage(format!(
                "numbers of this repository are won in store '{}', but the first required store is '{sequencer}'",
                d.sequencer
            ))
            .hint(format!("list [[store]] name = \"{}\" first, with required = true", d.sequencer)));
        }
        store.anchor_at(paths::DESCRIPTOR);
        if self.access == Access::Write {
            probe(store).await?;
        }
        m.attached.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub fn uid(&self) -> Uuid {
        self.uid
    }

    pub fn clock(&self) -> &SharedClock {
        &self.clock
    }

    pub fn keyring(&self) -> &Arc<Keyring> {
        &self.keyring
    }

    /// The stores as configured.
    pub fn stores(&self) -> impl Iterator<Item = &Arc<Store>> {
        self.members.iter().map(|m| &m.store)
    }

    /// The sources that some store has a folder of, by uid. `from`: one store. An optional store may be away.
    pub async fn source_uids(&self, from: Option<&str>) -> Result<BTreeSet<Uuid>> {
        let mut found = BTreeSet::new();
        for store in self.readable(from)? {
            let folders = match store.folders(paths::SOURCES).await {
                Err(e) if e.kind() == Kind::Unreachable && !store.required() => continue,
                r => r?,
            };
            found.extend(folders.iter().filter_map(|f| Uuid::try_parse(f).ok()));
        }
        Ok(found)
    }

    /// How each store is; `durable_lsn` for this source.
    pub fn status(&self, source: Uuid) -> Vec<StoreStatus> {
        self.members
            .iter()
            .map(|m| {
                let h = m.store.health();
                StoreStatus {
                    name: m.store.name().to_owned(),
                    url: m.store.shown().to_owned(),
                    required: m.store.required(),
                    up: m.attached() && h.down_since.is_none(),
                    durable_lsn: m.durable(source),
                    last_error: h.last_error,
                    down_for: h.down_since.map(|t| t.elapsed()),
                }
            })
            .collect()
    }

    /// Writes an object into every required store. Waits for stores that do not answer; drop the future to give up.
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        try_join_all(self.required().map(|m| {
            let bytes = bytes.clone();
            patiently(&m.store, move || {
                let (store, bytes) = (m.store.clone(), bytes.clone());
                async move { store.put(path, bytes).await }
            })
        }))
        .await
        .map(drop)
    }

    /// What a record says about an object that was sealed with this header.
    pub fn object_ref(path: String, header: &Header, sealed: &Sealed, rows: u64) -> ObjectRef {
        ObjectRef {
            path,
            kind: header.kind,
            tenant: header.tenant,
            object: header.object,
            key_version: header.key_version,
            bytes: sealed.bytes,
            sha256: hex(&sealed.sha256),
            lsn_start: header.lsn_start,
            lsn_end: header.lsn_end,
            rows,
        }
    }

    fn required(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|m| m.store.required())
    }

    /// The stores to read from, best first: the named one alone, else required before optional.
    pub(crate) fn readable(&self, from: Option<&str>) -> Result<Vec<Arc<Store>>> {
        let Some(name) = from else {
            let mut stores: Vec<_> = self.members.iter().filter(|m| m.attached()).collect();
            stores.sort_by_key(|m| !m.store.required());
            return Ok(stores.into_iter().map(|m| m.store.clone()).collect());
        };
        let known = || self.stores().map(|s| s.name()).collect::<Vec<_>>().join(", ");
        let m = self
            .members
            .iter()
            .find(|m| m.store.name() == name)
            .ok_or_else(|| Error::usage(format!("there is no store '{name}'; there is: {}", known())))?;
        if !m.attached() {
            return Err(Error::new(
                Kind::Unreachable,
                format!(
                    "store {name} ({}) did not answer: {}",
                    m.store.shown(),
                    m.store.health().last_error.unwrap_or_default()
                ),
            ));
        }
        Ok(vec![m.store.clone()])
    }
}

impl Member {
    fn attached(&self) -> bool {
        self.attached.load(Ordering::Relaxed)
    }

    fn durable(&self, source: Uuid) -> Option<Lsn> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner).get(&source).copied()
    }

    fn complete(&self, source: Uuid) -> Option<u64> {
        self.complete.lock().unwrap_or_else(PoisonError::into_inner).get(&source).copied()
    }

    fn set_complete(&self, source: Uuid, end: u64) {
        self.complete.lock().unwrap_or_else(PoisonError::into_inner).insert(source, end);
    }

    fn set_durable(&self, source: Uuid, lsn: Lsn) {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner).insert(source, lsn);
    }
}

/// Repeats an operation while the store does not answer. Says so at once and then every minute.
async fn patiently<T, F: Future<Output = Result<T>>>(store: &Store, mut op: impl FnMut() -> F) -> Result<T> {
    let mut wait = PATIENCE.0;
    let mut said: Option<Instant> = None;
    loop {
        match op().await {
            Err(e) if e.kind() == Kind::Unreachable => {
                if said.is_none_or(|t| t.elapsed() > Duration::from_secs(60)) {
                    tracing::error!("waiting for a required store: {e}");
                    said = Some(Instant::now());
                }
            }
            r => {
                if said.is_some() && r.is_ok() {
                    tracing::info!("store {} answers again", store.name());
                }
                return r;
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(PATIENCE.1);
    }
}

/// An error of kind Refused when one of the configured stores holds a repository.
pub async fn refuse_existing(config: &Config) -> Result<()> {
    for c in &config.store {
        let store = connect(&c.name, &c.url, c.required, Directory::MustExist)?;
        match store.get_opt(paths::DESCRIPTOR).await {
            Ok(Some(_)) => return Err(descriptor::exists(&store)),
            Ok(None) => {}
            // A directory that is yet to be made.
            Err(e) if e.is_code("store_gone") => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn connect_all(config: &Config, directory: Directory) -> Result<Vec<Arc<Store>>> {
    if let Some(c) = config.store.iter().find(|c| c.lock != LockMode::None) {
        return Err(Error::usage(format!(
            "store {}: this version sets no Object Lock dates; lock = \"none\" is all it knows",
            c.name
        ))
        .hint("give the bucket a default retention: every object that is written then gets it"));
    }
    config.store.iter().map(|c| connect(&c.name, &c.url, c.required, directory).map(Arc::new)).collect()
}

fn sequencer_of(config: &Config) -> Result<usize> {
    config.store.iter().position(|s| s.required).ok_or_else(|| {
        Error::usage("the configuration has no [[store]] section")
            .hint("add one: name, url = \"file:///…\" or \"s3://…\"")
    })
}
