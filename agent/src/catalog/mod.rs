//! A tenant's catalog: the numbered, hash-chained list of its fulls, incrementals, holds, checks and removals.
//!
//! Unlike the commit log it has many writers (the agent, workers, operators): a number is won at the sequencer by
//! put-if-absent, and whoever loses one reads what the winner wrote and tries the next. What an entry names is in every
//! required store before the entry; an entry that is in the sequencer counts, and is copied to the others by whoever
//! comes next.
//!
//! Every [`model::STATE_EVERY`]th record carries what the ones before it come to, so that a reader reads few.

pub mod floor;
pub mod manifest;
pub mod model;
#[cfg(test)]
mod tests;

pub use floor::{Floor, Floors};
pub use manifest::PartAt;
pub use model::{CatalogRecord, Entry, FullEntry, FullTable, Hold, IncrementalEntry, State};

use crate::crypto::{Codec, Expect, Header, ObjectKind, Opener, Sealer, hex, random, sha256};
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::repository::{Created, Repository, Store, paths};
use bytes::Bytes;
use coffer_wire::Lsn;
use futures::future::try_join_all;
use futures::{StreamExt, stream};
use model::{CATALOG_VERSION, STATE_EVERY};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;
use uuid::Uuid;

/// Records read at a time.
const PARALLEL: usize = 16;
/// Numbers that may be lost in a row before something must be wrong.
const MOST_LOST: usize = 200;

/// See the module.
pub struct Catalog {
    repository: Arc<Repository>,
    source: Uuid,
    tenant: Uuid,
    writer: Uuid,
    /// One store to read from, as it is.
    from: Option<String>,
    /// Of the next record.
    next: u64,
    /// Hash of the newest record's object.
    head: Option<String>,
    state: State,
}

impl Catalog {
    /// Reads and verifies a tenant's catalog. `from`: one store, as it is; else whatever the stores that answer have.
    pub async fn open(repository: &Arc<Repository>, source: Uuid, tenant: Uuid, from: Option<&str>) -> Result<Self> {
        let mut c = Self {
            repository: repository.clone(),
            source,
            tenant,
            writer: random::uuid(),
            from: from.map(str::to_owned),
            next: 0,
            head: None,
            state: State::default(),
        };
        c.refresh().await?;
        Ok(c)
    }

    pub fn tenant(&self) -> Uuid {
        self.tenant
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Number of the record to come.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Reads what was written since.
    pub async fn refresh(&mut self) -> Result<()> {
        let copies = self.copies().await?;
        let numbers: BTreeSet<u64> = copies.iter().flat_map(|(_, n)| n.iter().copied()).collect();
        let Some(last) = numbers.last().copied().filter(|n| *n >= self.next) else { return Ok(()) };
        // From the newest record that says what those before it come to, unless only few are new.
        let anchor = last - last % STATE_EVERY;
        let first = if self.next > anchor { self.next } else { anchor };
        let anchored = first != self.next || first == 0;
        let (this, copies) = (&*self, &copies);
        let each: Vec<_> = (first..=last).map(|n| this.read(copies, n)).collect();
        let mut read = stream::iter(each).buffered(PARALLEL);
        let (mut state, mut head, mut next) = (self.state.clone(), self.head.clone(), self.next);
        while let Some(record) = read.next().await {
            let (r, hash) = record?;
            if r.n == first && anchored {
                state = r.state.clone().unwrap_or_default();
                if r.n > 0 && r.state.is_none() {
                    return Err(self.malformed(r.n, "it does not say what the records before it come to"));
                }
            } else if r.prev != head {
                return Err(self.malformed(r.n, "it does not follow the record before it").code("chain_gap"));
            }
            state.apply(&r);
            (head, next) = (Some(hash), r.n + 1);
        }
        drop(read);
        (self.state, self.head, self.next) = (state, head, next);
        Ok(())
    }

    /// Appends an entry: in every required store when this returns. Every object that it names must be there already. An
    /// entry of another writer that came first is taken in; `still` says whether ours is still wanted then.
    pub async fn append_if(
        &mut self,
        body: Entry,
        mut still: impl FnMut(&State) -> bool,
    ) -> Result<Option<CatalogRecord>> {
        for _ in 0..MOST_LOST {
            if !still(&self.state) {
                return Ok(None);
            }
            let record = CatalogRecord {
                v: CATALOG_VERSION,
                n: self.next,
                prev: self.head.clone(),
                source: self.source,
                tenant: self.tenant,
                writer: self.writer,
                at_us: self.repository.clock().now_us(),
                state: (self.next > 0 && self.next.is_multiple_of(STATE_EVERY)).then(|| self.state.clone()),
                body: body.clone(),
            };
            let bytes = self.seal(&record)?;
            let path = paths::catalog_record(self.source, self.tenant, record.n);
            self.level().await?;
            if let Created::Lost(_) = self.repository.create_at_sequencer(&path, bytes.clone()).await? {
                self.refresh().await?;
                if self.next <= record.n {
                    return Err(self.malformed(record.n, "the sequencer has it and does not list it"));
                }
                continue;
            }
            failpoints::hit(failpoints::CATALOG_AFTER_SEQUENCER)?;
            self.repository.create_at_others(&path, bytes.clone()).await?;
            self.repository.note_catalog(self.source, self.tenant);
            self.state.apply(&record);
            (self.head, self.next) = (Some(hex(&sha256(&bytes))), record.n + 1);
            return Ok(Some(record));
        }
        Err(Error::other(format!("lost {MOST_LOST} numbers of a tenant's catalog in a row to other writers")))
    }

    /// The same, whatever others wrote.
    pub async fn append(&mut self, body: Entry) -> Result<CatalogRecord> {
        let done = self.append_if(body, |_| true).await?;
        Ok(done.expect("an append without a condition is made"))
    }

    /// Copies to required stores what an append that was cut off left in the sequencer alone.
    async fn level(&self) -> Result<()> {
        let Some(last) = self.next.checked_sub(1) else { return Ok(()) };
        let path = paths::catalog_record(self.source, self.tenant, last);
        let copies = try_join_all(self.repository.required_stores().map(|s| {
            let (s, path) = (s.clone(), path.clone());
            async move { Ok::<_, Error>(s.size(&path).await?.is_some()) }
        }))
        .await?;
        if copies.iter().all(|c| *c) {
            return Ok(());
        }
        self.repository.level_catalog(self.source, self.tenant).await
    }

    /// Which records each store has.
    async fn copies(&self) -> Result<Vec<(Arc<Store>, BTreeSet<u64>)>> {
        let folder = paths::catalog_dir(self.source, self.tenant);
        let mut out = Vec::new();
        for store in self.repository.readable(self.from.as_deref())? {
            match store.list(&folder).await {
                Ok(l) => out.push((store, l.iter().filter_map(|(name, _)| paths::log_number(name)).collect())),
                Err(e) if e.kind() == Kind::Unreachable && !store.required() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(out)
    }

    async fn read(&self, copies: &[(Arc<Store>, BTreeSet<u64>)], n: u64) -> Result<(CatalogRecord, String)> {
        let path = paths::catalog_record(self.source, self.tenant, n);
        let Some((store, _)) = copies.iter().find(|(_, numbers)| numbers.contains(&n)) else {
            return Err(Error::new(Kind::Verification, format!("record {path} is missing: the catalog has a gap"))
                .code("chain_gap"));
        };
        let bytes = store.get(&path).await?;
        let record = open_record(&self.repository, self.source, self.tenant, n, &bytes)?;
        Ok((record, hex(&sha256(&bytes))))
    }

    fn seal(&self, r: &CatalogRecord) -> Result<Bytes> {
        let key = self.repository.keyring().repository_key();
        let header = Header {
            kind: ObjectKind::Catalog,
            codec: Codec::Zstd,
            tenant: self.repository.uid(),
            object: random::uuid(),
            source: r.source,
            system_identifier: 0,
            timeline: 0,
            lsn_start: Lsn::ZERO,
            lsn_end: Lsn::ZERO,
            key_version: key.id.version,
        };
        let mut sealer = Sealer::new(Vec::new(), &header, &key)?;
        let text = serde_json::to_vec(r).context(Kind::Other, "cannot encode a record")?;
        sealer.write_all(&text).context(Kind::Other, "cannot seal a record")?;
        Ok(sealer.finish()?.0.into())
    }

    fn malformed(&self, n: u64, why: &str) -> Error {
        let path = paths::catalog_record(self.source, self.tenant, n);
        Error::new(Kind::Verification, format!("record {path}: {why}")).code("malformed")
    }
}

/// Opens the object at the name of record `n` and checks that it is that record of that tenant.
pub fn open_record(repository: &Repository, source: Uuid, tenant: Uuid, n: u64, bytes: &[u8]) -> Result<CatalogRecord> {
    let path = || paths::catalog_record(source, tenant, n);
    let expect = Expect { tenant: Some(repository.uid()), source: Some(source), ..Expect::kind(ObjectKind::Catalog) };
    let text = Opener::new(bytes, &**repository.keyring(), &expect)
        .and_then(Opener::read_all)
        .map_err(|e| e.during(format_args!("record {}", path())))?;
    let r: CatalogRecord = serde_json::from_slice(&text).map_err(|e| {
        Error::new(Kind::Verification, format!("record {} says something this coffer does not understand", path()))
            .code("malformed")
            .hint("a newer coffer wrote it: upgrade this one")
            .source(e)
    })?;
    if r.v != CATALOG_VERSION {
        return Err(Error::new(
            Kind::Verification,
            format!("record {} has version {}; this coffer reads version {CATALOG_VERSION}", path(), r.v),
        ));
    }
    if (r.n, r.source, r.tenant) != (n, source, tenant) {
        return Err(Error::new(
            Kind::Verification,
            format!("record {} is record {} of tenant {}: it was moved here", path(), r.n, r.tenant),
        )
        .code("replayed"));
    }
    Ok(r)
}

/// The tenants of a source that have a catalog in some store, with the numbers that stand there.
pub async fn tenants(
    repository: &Arc<Repository>,
    source: Uuid,
    from: Option<&str>,
) -> Result<BTreeMap<Uuid, BTreeSet<u64>>> {
    let mut out: BTreeMap<Uuid, BTreeSet<u64>> = BTreeMap::new();
    for store in repository.readable(from)? {
        let folders = match store.folders(&paths::tenants_dir(source)).await {
            Err(e) if e.kind() == Kind::Unreachable && !store.required() => continue,
            r => r?,
        };
        let uids: Vec<Uuid> = folders.iter().filter_map(|f| Uuid::try_parse(f).ok()).collect();
        let each: Vec<_> = uids.into_iter().map(|uid| numbers(&store, source, uid)).collect();
        let listed: Vec<(Uuid, Result<BTreeSet<u64>>)> = stream::iter(each).buffer_unordered(PARALLEL).collect().await;
        for (uid, l) in listed {
            let numbers = l?;
            if !numbers.is_empty() {
                out.entry(uid).or_default().extend(numbers);
            }
        }
    }
    Ok(out)
}

/// Number of the record to come in a tenant's catalog, by its names alone: whoever has read up to there has read it all.
pub async fn next(repository: &Arc<Repository>, source: Uuid, tenant: Uuid) -> Result<u64> {
    let mut next = 0;
    for store in repository.readable(None)? {
        match numbers(&store, source, tenant).await.1 {
            Ok(n) => next = n.last().map_or(next, |last| next.max(last + 1)),
            Err(e) if e.kind() == Kind::Unreachable && !store.required() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(next)
}

/// The floors of these tenants; `commons`: of whom to ask for that of what concerns all.
pub async fn floors(
    repository: &Arc<Repository>,
    source: Uuid,
    tenants: impl IntoIterator<Item = Uuid>,
    commons: Uuid,
    from: Option<&str>,
) -> Result<Floors> {
    let each: Vec<_> = tenants.into_iter().map(|t| Catalog::open(repository, source, t, from)).collect();
    let mut read = stream::iter(each).buffer_unordered(PARALLEL);
    let mut out = Floors::default();
    while let Some(c) = read.next().await {
        let c = c?;
        if let Some(f) = c.state.floor {
            out.tenants.insert(c.tenant, f);
        }
        if c.tenant == commons {
            out.commons = c.state.commons;
        }
    }
    Ok(out)
}

async fn numbers(store: &Store, source: Uuid, tenant: Uuid) -> (Uuid, Result<BTreeSet<u64>>) {
    let listed = store.list(&paths::catalog_dir(source, tenant)).await;
    (tenant, listed.map(|l| l.iter().filter_map(|(name, _)| paths::log_number(name)).collect()))
}
