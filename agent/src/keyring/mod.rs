//! The keyring: every data key, wrapped by the KEK, and which tenant each uid is (DESIGN of the words: "keyring").
//!
//! It lives outside the repository, in one or more *places* that are kept equal, so that destroying a key works while the
//! objects sealed under it stay locked.
//!
//! Invariants:
//! - one object per (uid, version), written once; the first place decides who wrote it, the others get its bytes;
//! - a key is used only after its entry was read back from every place;
//! - a tenant's uid is a keyed hash of (source, kind, key, generation): two agents that meet a new tenant at once go for
//!   the same name, and one of them learns the other's key. Without the keyring a uid says nothing about its tenant;
//! - entries that differ between places are an error that names the place, never a silent choice.

mod entry;
mod kek;
#[cfg(test)]
mod tests;

pub use kek::{DEFAULT_VARIABLE, Kek};

use crate::clock::SharedClock;
use crate::config::KeysConfig;
use crate::crypto::{DataKey, KeyId, KeySource, SecretBytes, derive};
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::repository::paths;
use crate::repository::{Created, Directory, Store, connect};
use crate::tenant::Tenant;
use bytes::Bytes;
use entry::{Entry, Facts, Purpose};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use uuid::Uuid;

/// Requests at a time when many entries are read or written.
const PARALLEL: usize = 32;
const DESCRIPTOR_VERSION: u32 = 1;
/// How many uids a tenant's key had before the one in use.
const GENERATION: u32 = 0;

/// A tenant as the keyring knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantEntry {
    pub uid: Uuid,
    pub source: Uuid,
    pub tenant: Tenant,
    /// Newest version of its key: what new objects are sealed under.
    pub version: u32,
    /// The agent's clock when it was first met, microseconds since 1970-01-01 UTC.
    pub created_us: i64,
}

impl TenantEntry {
    /// The key for new objects.
    pub fn key_id(&self) -> KeyId {
        KeyId { uid: self.uid, version: self.version }
    }
}

/// What a keyring's place says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Descriptor {
    v: u32,
    format: String,
    repository: Uuid,
    /// Id of the KEK.
    kek: String,
    created_us: i64,
}

const FORMAT: &str = "pg_coffer keyring";

impl Descriptor {
    /// One line of JSON.
    fn encode(&self) -> Result<Bytes> {
        let mut text = serde_json::to_vec(self).context(Kind::Other, "cannot encode the keyring's descriptor")?;
        text.push(b'\n');
        Ok(text.into())
    }

    fn expect_same_repository(&self, other: &Self, place: &Store) -> Result<()> {
        if self.repository == other.repository {
            return Ok(());
        }
        Err(Error::new(
            Kind::Key,
            format!(
                "keyring place {} belongs to repository {}, another place to {}",
                place.shown(),
                other.repository,
                self.repository
            ),
        )
        .code("keyring_differs")
        .hint("[keys] keyring names places of two different keyrings"))
    }
}

/// See the module.
pub struct Keyring {
    urls: Vec<String>,
    /// The places that answered, by their number in the configuration.
    places: RwLock<BTreeMap<usize, Arc<Store>>>,
    kek: Kek,
    clock: SharedClock,
    repository: Uuid,
    /// Key of the keyed hash that makes uids.
    names: SecretBytes,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    keys: HashMap<KeyId, Arc<DataKey>>,
    tenants: HashMap<Uuid, TenantEntry>,
    by_tenant: HashMap<(Uuid, Tenant), Uuid>,
    sources: BTreeMap<String, Uuid>,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring").field("repository", &self.repository).finish_non_exhaustive()
    }
}

impl Keyring {
    /// Makes a keyring, with the repository's key, in places that hold none. Refused when one of them does.
    pub async fn create(config: &KeysConfig, clock: SharedClock) -> Result<Arc<Self>> {
        let kek = Kek::load(config).await?;
        let mut places = BTreeMap::new();
        for i in 0..config.keyring.len() {
            let place = connect_place(&config.keyring, i, Directory::Make)?;
            refuse_existing(&place).await?;
            crate::repository::probe(&place).await?;
            places.insert(i, Arc::new(place));
        }
        let repository = crate::crypto::random::uuid();
        let now = clock.now_us();
        let entry = Entry {
            key: DataKey::generate(KeyId { uid: repository, version: 1 }),
            purpose: Purpose::Repository,
            facts: Facts { repository, created_us: now, source: None, name: None, tenant: None, generation: 0 },
        };
        let keyring = Self {
            urls: config.keyring.clone(),
            names: names_key(&entry.key),
            places: RwLock::new(places),
            clock,
            repository,
            state: RwLock::default(),
            kek,
        };
        keyring.store_entry(&entry).await?;
        let descriptor = Descriptor {
            v: DESCRIPTOR_VERSION,
            format: FORMAT.into(),
            repository,
            kek: keyring.kek.id().to_owned(),
            created_us: now,
        };
        let bytes = descriptor.encode()?;
        for p in keyring.places() {
            if let Created::Lost(_) = p.create(paths::KEYRING_DESCRIPTOR, bytes.clone()).await? {
                return Err(exists(&p));
            }
            p.anchor_at(paths::KEYRING_DESCRIPTOR);
        }
        keyring.learn(entry)?;
        Ok(Arc::new(keyring))
    }

    /// Opens the keyring: reads every entry from every place that answers, compares, and copies what a place lacks. A
    /// place that does not answer is a warning here; a new key is made only when all of them do.
    pub async fn open(config: &KeysConfig, clock: SharedClock) -> Result<Arc<Self>> {
        let kek = Kek::load(config).await?;
        let mut places = BTreeMap::new();
        let mut silent = None;
        let mut descriptor: Option<Descriptor> = None;
        for i in 0..config.keyring.len() {
            let (place, found) = match reach(&config.keyring, i).await {
                Ok(p) => p,
                Err(e) if e.kind() == Kind::Unreachable => {
                    tracing::warn!("a place of the keyring does not answer: {e}");
                    silent = Some(e);
                    continue;
                }
                Err(e) => return Err(e),
            };
            if let Some(d) = found {
                match &descriptor {
                    Some(first) => first.expect_same_repository(&d, &place)?,
                    None => descriptor = Some(d),
                }
            }
            places.insert(i, Arc::new(place));
        }
        let Some(descriptor) = descriptor else {
            return Err(silent.unwrap_or_else(|| {
                let at = config.keyring.join(", ");
                Error::new(
                    Kind::Key,
                    format!("there is no keyring at {at}: object {} is missing", paths::KEYRING_DESCRIPTOR),
                )
                .code("keyring_missing")
                .hint("run `coffer init` for a new repository, or correct [keys] keyring")
            }));
        };
        if descriptor.kek != kek.id() {
            return Err(entry::wrong_kek(&descriptor.kek, &kek));
        }
        let id = KeyId { uid: descriptor.repository, version: 1 };
        let bytes = first_copy(places.values(), &paths::key_entry(id.uid, id.version)).await?;
        let keyring = Self {
            urls: config.keyring.clone(),
            names: names_key(&Entry::open(&bytes, id, &kek)?.key),
            places: RwLock::new(places),
            kek,
            clock,
            repository: descriptor.repository,
            state: RwLock::default(),
        };
        keyring.load().await?;
        keyring.adopt_places(&descriptor).await?;
        Ok(Arc::new(keyring))
    }

    /// An error of kind Refused when one of the configured places holds a keyring.
    pub async fn refuse_existing(config: &KeysConfig) -> Result<()> {
        for i in 0..config.keyring.len() {
            match refuse_existing(&connect_place(&config.keyring, i, Directory::MustExist)?).await {
                // A directory that is yet to be made.
                Err(e) if e.is_code("store_gone") => {}
                r => r?,
            }
        }
        Ok(())
    }

    /// Removes a keyring that was just made, when the repository that it was for could not be.
    pub async fn take_back(&self) {
        for place in self.places() {
            let _ = place.delete(&paths::key_entry(self.repository, 1)).await;
            let _ = place.delete(paths::KEYRING_DESCRIPTOR).await;
        }
    }

    /// Gives a place that was empty its descriptor, now that it has the entries.
    async fn adopt_places(&self, descriptor: &Descriptor) -> Result<()> {
        let bytes = descriptor.encode()?;
        for place in self.places() {
            if let Created::Lost(there) = place.create(paths::KEYRING_DESCRIPTOR, bytes.clone()).await? {
                descriptor.expect_same_repository(&read_descriptor(&place, &there)?, &place)?;
            }
            place.anchor_at(paths::KEYRING_DESCRIPTOR);
        }
        Ok(())
    }

    /// Takes back the places that did not answer at the start; an error while one still does not.
    async fn rejoin_places(&self) -> Result<()> {
        let missing: Vec<usize> = {
            let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
            (0..self.urls.len()).filter(|i| !places.contains_key(i)).collect()
        };
        if missing.is_empty() {
            return Ok(());
        }
        for i in missing {
            let (place, _) = reach(&self.urls, i).await?;
            self.places.write().unwrap_or_else(PoisonError::into_inner).insert(i, Arc::new(place));
        }
        self.load().await?;
        let descriptor = Descriptor {
            v: DESCRIPTOR_VERSION,
            format: FORMAT.into(),
            repository: self.repository,
            kek: self.kek.id().to_owned(),
            created_us: self.clock.now_us(),
        };
        self.adopt_places(&descriptor).await
    }

    /// The repository that the keyring belongs to.
    pub fn repository_uid(&self) -> Uuid {
        self.repository
    }

    /// The key of what belongs to no tenant: newest version.
    pub fn repository_key(&self) -> Arc<DataKey> {
        let state = self.read();
        (1..)
            .map_while(|version| state.keys.get(&KeyId { uid: self.repository, version }))
            .last()
            .cloned()
            .expect("a keyring opens only with its repository's key")
    }

    /// The places that answered, in the configuration's order.
    pub fn places(&self) -> Vec<Arc<Store>> {
        self.places.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Whether some configured place has not answered yet: no new key can be made.
    pub fn incomplete(&self) -> bool {
        self.places.read().unwrap_or_else(PoisonError::into_inner).len() < self.urls.len()
    }

    /// Reads the entries that other agents made since.
    pub async fn refresh(&self) -> Result<()> {
        let places = self.places();
        let first = &places[0];
        let unknown: Vec<KeyId> = {
            let listed = list_entries(first).await?;
            let state = self.read();
            listed.into_iter().filter(|id| !state.keys.contains_key(id)).collect()
        };
        stream::iter(unknown)
            .map(|id| async move {
                let bytes = first.get(&paths::key_entry(id.uid, id.version)).await?;
                self.confirm(id, &bytes).await
            })
            .buffer_unordered(PARALLEL)
            .try_collect::<()>()
            .await
    }

    /// The source's uid by its name, made on first use.
    pub async fn ensure_source(&self, name: &str) -> Result<Uuid> {
        if let Some(uid) = self.source(name) {
            return Ok(uid);
        }
        let uid = self.source_uid(name);
        let facts = Facts {
            repository: self.repository,
            created_us: self.clock.now_us(),
            source: Some(uid),
            name: Some(name.to_owned()),
            tenant: None,
            generation: 0,
        };
        self.make(KeyId { uid, version: 1 }, Purpose::Source, facts).await?;
        self.source(name).ok_or_else(|| Error::new(Kind::Key, "the keyring holds another source under this uid"))
    }

    /// The source's uid by its name.
    pub fn source(&self, name: &str) -> Option<Uuid> {
        self.read().sources.get(name).copied()
    }

    /// Names and uids of all sources.
    pub fn sources(&self) -> Vec<(String, Uuid)> {
        self.read().sources.iter().map(|(n, u)| (n.clone(), *u)).collect()
    }

    /// The tenant's entry, made on first use: its key is in every place, read back, before this returns.
    pub async fn ensure(&self, source: Uuid, tenant: &Tenant) -> Result<TenantEntry> {
        if let Some(e) = self.find(source, tenant) {
            return Ok(e);
        }
        let uid = self.tenant_uid(source, tenant);
        let facts = Facts {
            repository: self.repository,
            created_us: self.clock.now_us(),
            source: Some(source),
            name: None,
            tenant: Some(tenant.clone()),
            generation: GENERATION,
        };
        self.make(KeyId { uid, version: 1 }, Purpose::Tenant, facts).await?;
        self.find(source, tenant)
            .ok_or_else(|| Error::new(Kind::Key, format!("the keyring holds another tenant under the uid {uid}")))
    }

    /// [`Self::ensure`] for many tenants, in parallel; the entries come in the tenants' order.
    pub async fn ensure_all(&self, source: Uuid, tenants: &[Tenant]) -> Result<Vec<TenantEntry>> {
        // Collected first: a closure over borrowed tenants inside the stream would make this future unfit to be spawned.
        let each: Vec<_> = tenants.iter().map(|t| self.ensure(source, t)).collect();
        stream::iter(each).buffered(PARALLEL).try_collect().await
    }

    /// The tenant's entry if it was ever met.
    pub fn find(&self, source: Uuid, tenant: &Tenant) -> Option<TenantEntry> {
        let state = self.read();
        let uid = state.by_tenant.get(&(source, tenant.clone()))?;
        state.tenants.get(uid).cloned()
    }

    pub fn by_uid(&self, uid: Uuid) -> Option<TenantEntry> {
        self.read().tenants.get(&uid).cloned()
    }

    /// All tenants of a source, by kind and key.
    pub fn tenants(&self, source: Uuid) -> Vec<TenantEntry> {
        let mut all: Vec<_> = self.read().tenants.values().filter(|t| t.source == source).cloned().collect();
        all.sort_by(|a, b| a.tenant.cmp(&b.tenant));
        all
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The uid that a source of this name has, whether its entry is there or not.
    pub fn source_uid(&self, name: &str) -> Uuid {
        self.uid_of(&[b"source", name.as_bytes()])
    }

    /// The uid that a tenant has, whether its entry is there or not.
    pub fn tenant_uid(&self, source: Uuid, tenant: &Tenant) -> Uuid {
        self.uid_of(&[
            b"tenant",
            source.as_bytes(),
            &GENERATION.to_le_bytes(),
            &[tenant.kind as u8],
            tenant.key.as_bytes(),
        ])
    }

    /// An error of kind Key that names the first of these keys that is not here.
    ///
    /// An agent must not go on without: it would make a second key under the same name, and what the first one sealed
    /// would be lost even when the entry comes back.
    pub fn require(&self, keys: impl Iterator<Item = KeyId>) -> Result<()> {
        let state = self.read();
        match keys.into_iter().find(|id| !state.keys.contains_key(id)) {
            Some(id) => Err(lost(&format!("key {id}"))),
            None => Ok(()),
        }
    }

    /// A uid (version 8: vendor-specific) that is a keyed hash of the parts.
    fn uid_of(&self, parts: &[&[u8]]) -> Uuid {
        // Lengths make the parts unambiguous.
        let mut info = Vec::with_capacity(64);
        for p in parts {
            info.extend_from_slice(&(p.len() as u64).to_le_bytes());
            info.extend_from_slice(p);
        }
        let mut b = [0; 16];
        derive(&*self.names, b"", &[b"pg_coffer uid", &crate::crypto::sha256(&info)], &mut b);
        uuid::Builder::from_custom_bytes(b).into_uuid()
    }

    /// Makes a key, or learns the one that somebody else made meanwhile.
    async fn make(&self, id: KeyId, purpose: Purpose, facts: Facts) -> Result<()> {
        let bytes = self.store_entry(&Entry { key: DataKey::generate(id), purpose, facts }).await?;
        failpoints::hit(failpoints::KEYRING_AFTER_PUT)?;
        self.learn(Entry::open(&bytes, id, &self.kek)?)
    }

    /// Writes an entry into every place and reads it back from each; returns the bytes that stand there, which are
    /// another agent's when it was first.
    async fn store_entry(&self, entry: &Entry) -> Result<Bytes> {
        self.rejoin_places().await?;
        let id = entry.key.id;
        let path = paths::key_entry(id.uid, id.version);
        let ours = Bytes::from(entry.seal(&self.kek)?);
        let bytes = match self.places()[0].create(&path, ours.clone()).await? {
            Created::Won => ours,
            Created::Lost(theirs) => theirs,
        };
        self.confirm_bytes(id, &bytes).await?;
        Ok(bytes)
    }

    /// Sees to it that an entry stands in every place, then uses it.
    async fn confirm(&self, id: KeyId, bytes: &Bytes) -> Result<()> {
        self.confirm_bytes(id, bytes).await?;
        self.learn(Entry::open(bytes, id, &self.kek)?)
    }

    async fn confirm_bytes(&self, id: KeyId, bytes: &Bytes) -> Result<()> {
        let path = paths::key_entry(id.uid, id.version);
        let places = self.places();
        for place in &places[1..] {
            if let Created::Lost(other) = place.create(&path, bytes.clone()).await? {
                self.compare(id, bytes, &other, place)?;
            }
        }
        for place in &places {
            let back = place.get(&path).await?;
            if back != *bytes {
                self.compare(id, bytes, &back, place)?;
            }
        }
        Ok(())
    }

    /// Two copies with different bytes may still say the same.
    fn compare(&self, id: KeyId, a: &[u8], b: &[u8], place: &Store) -> Result<()> {
        let differs = || {
            Error::new(
                Kind::Key,
                format!(
                    "keyring place {} ({}) holds another key {id} than the first place",
                    place.name(),
                    place.shown()
                ),
            )
            .code("keyring_differs")
            .hint("one of the places was restored from elsewhere or altered; take it out of [keys] keyring until it is")
        };
        let a = Entry::open(a, id, &self.kek)?;
        let b = Entry::open(b, id, &self.kek).map_err(|e| differs().source(e))?;
        if a.same(&b) { Ok(()) } else { Err(differs()) }
    }

    fn learn(&self, e: Entry) -> Result<()> {
        if e.facts.repository != self.repository {
            return Err(Error::new(
                Kind::Key,
                format!("the entry of key {} belongs to repository {}", e.key.id, e.facts.repository),
            )
            .code("keyring_differs"));
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let id = e.key.id;
        let unreadable =
            || Error::new(Kind::Key, format!("the entry of key {id} lacks what it is for")).code("corrupt");
        match e.purpose {
            Purpose::Repository => {}
            Purpose::Source => {
                state.sources.insert(e.facts.name.ok_or_else(unreadable)?, id.uid);
            }
            Purpose::Tenant => {
                let source = e.facts.source.ok_or_else(unreadable)?;
                let tenant = e.facts.tenant.ok_or_else(unreadable)?;
                let created_us = e.facts.created_us;
                state.by_tenant.insert((source, tenant.clone()), id.uid);
                let t = state.tenants.entry(id.uid).or_insert(TenantEntry {
                    uid: id.uid,
                    source,
                    tenant,
                    version: id.version,
                    created_us,
                });
                t.version = t.version.max(id.version);
            }
        }
        state.keys.insert(id, Arc::new(e.key));
        Ok(())
    }

    /// Reads every entry of every place; copies what one lacks.
    async fn load(&self) -> Result<()> {
        let mut everywhere: BTreeMap<KeyId, Vec<bool>> = BTreeMap::new();
        let places = &self.places();
        for (i, place) in places.iter().enumerate() {
            for id in list_entries(place).await? {
                everywhere.entry(id).or_insert_with(|| vec![false; places.len()])[i] = true;
            }
        }
        stream::iter(everywhere)
            .map(|(id, has)| async move {
                let path = paths::key_entry(id.uid, id.version);
                let mut first: Option<Bytes> = None;
                for (place, has) in places.iter().zip(&has) {
                    if !has {
                        continue;
                    }
                    let bytes = place.get(&path).await?;
                    match &first {
                        None => first = Some(bytes),
                        Some(f) if *f == bytes => {}
                        Some(f) => self.compare(id, f, &bytes, place)?,
                    }
                }
                let bytes = first.expect("the entry was listed somewhere");
                for (place, has) in places.iter().zip(&has) {
                    if !has {
                        tracing::warn!("keyring place {} lacks key {id}: copied from another place", place.name());
                        if let Created::Lost(other) = place.create(&path, bytes.clone()).await? {
                            self.compare(id, &bytes, &other, place)?;
                        }
                    }
                }
                self.learn(Entry::open(&bytes, id, &self.kek)?)
            })
            .buffer_unordered(PARALLEL)
            .try_collect::<()>()
            .await
    }
}

impl KeySource for Keyring {
    fn key(&self, id: KeyId) -> Result<Arc<DataKey>> {
        self.read().keys.get(&id).cloned().ok_or_else(|| {
            Error::new(Kind::Key, format!("the keyring has no key {id}"))
                .code("key_missing")
                .hint("the key was destroyed (a shredded tenant), or this is not the keyring of this repository")
        })
    }
}

/// The error for an entry that objects of the repository say must exist.
pub fn lost(what: &str) -> Error {
    Error::new(Kind::Key, format!("the keyring lost {what}: the repository has objects of it"))
        .code("key_missing")
        .hint("bring the entry back from a copy of the keyring into any of its places; `coffer verify` lists all that lack")
}

fn names_key(repository_key: &DataKey) -> SecretBytes {
    let mut names = SecretBytes::default();
    derive(repository_key.secret(), b"", &[b"pg_coffer names 1"], &mut *names);
    names
}

fn connect_place(urls: &[String], i: usize, directory: Directory) -> Result<Store> {
    connect(&format!("keyring-{}", i + 1), &urls[i], true, directory)
}

/// A place that answers, with its descriptor if it has one.
async fn reach(urls: &[String], i: usize) -> Result<(Store, Option<Descriptor>)> {
    let place = connect_place(urls, i, Directory::MustExist)?;
    let found = place.get_opt(paths::KEYRING_DESCRIPTOR).await?;
    let found = found.map(|b| read_descriptor(&place, &b)).transpose()?;
    Ok((place, found))
}

async fn refuse_existing(place: &Store) -> Result<()> {
    match place.get_opt(paths::KEYRING_DESCRIPTOR).await? {
        Some(_) => Err(exists(place)),
        None => Ok(()),
    }
}

fn exists(place: &Store) -> Error {
    Error::new(Kind::Refused, format!("there is a keyring at {} already; nothing was changed", place.shown()))
        .code("keyring_exists")
        .hint("an existing keyring is never replaced: name an empty place in [keys] keyring, or use `coffer run`")
}

fn read_descriptor(place: &Store, bytes: &[u8]) -> Result<Descriptor> {
    let d: Descriptor = serde_json::from_slice(bytes).map_err(|e| {
        Error::new(
            Kind::Verification,
            format!("{}: object {} does not describe a keyring", place.shown(), paths::KEYRING_DESCRIPTOR),
        )
        .source(e)
    })?;
    if d.format != FORMAT || d.v != DESCRIPTOR_VERSION {
        return Err(Error::new(
            Kind::Verification,
            format!(
                "{}: object {} is a '{}' of version {}; this coffer reads version 1",
                place.shown(),
                paths::KEYRING_DESCRIPTOR,
                d.format,
                d.v
            ),
        ));
    }
    Ok(d)
}

async fn first_copy(places: impl Iterator<Item = &Arc<Store>>, path: &str) -> Result<Bytes> {
    for place in places {
        if let Some(b) = place.get_opt(path).await? {
            return Ok(b);
        }
    }
    let message = format!(
        "the keyring has no {path}, the repository's key: it is lost, or {} was altered",
        paths::KEYRING_DESCRIPTOR
    );
    Err(Error::new(Kind::Key, message).code("key_missing"))
}

async fn list_entries(place: &Store) -> Result<Vec<KeyId>> {
    place
        .list(paths::KEYS_DIR)
        .await?
        .into_iter()
        .map(|(name, _)| {
            paths::parse_key_entry(&name).map(|(uid, version)| KeyId { uid, version }).ok_or_else(|| {
                Error::new(Kind::Key, format!("keyring place {} holds {name}, which is no key", place.shown()))
                    .hint("a newer coffer wrote it, or it was put there by hand")
            })
        })
        .collect()
}
