//! Leases: small objects that say that somebody is reading a tenant's backups, or writing objects that no record names
//! yet. Removals wait for them.
//!
//! A lease ends by itself, so one of a process that died holds nothing up for long; one that is held is renewed under a
//! new name, since nothing is ever overwritten. Leases only save what is in use from being removed early: where none
//! can be put (a store that may only be read), the grace of removals protects as it always does.

use crate::clock::rfc3339;
use crate::crypto::{Codec, Expect, Header, ObjectKind, Opener, Sealer, random};
use crate::error::{Context, Error, Kind, Result};
use crate::repository::{Repository, Store, paths};
use bytes::Bytes;
use coffer_wire::Lsn;
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// How long a lease holds without a renewal.
pub const LEASE: Duration = Duration::from_secs(15 * 60);
/// The same of a claim: what a worker that died leaves is soon anybody's.
const CLAIM: Duration = Duration::from_secs(60);
/// A lease is renewed when this part of it is over.
const RENEW: u32 = 4;
/// By how much the clock of the machine that put it may be behind, in microseconds.
const CLOCKS_US: i64 = 5 * 60 * 1_000_000;
/// One that the store has had for so long, in microseconds, is over, whatever it says: one that is held is put under a
/// new name long before. The clocks of its holder and of the store count.
const OVER_US: i64 = LEASE.as_micros() as i64 + 2 * CLOCKS_US;
/// One that is over for so long is removed by whoever prunes, in microseconds.
const LITTER_US: i64 = 3600 * 1_000_000;
/// How often, and how far apart, who claims a tenant looks whether others have given way.
const GIVE_WAY: usize = 100;
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How often a folder is listed anew because a lease in it was renewed meanwhile.
const LISTINGS: usize = 5;

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Somebody reads the tenant's backups.
    Restore,
    /// Somebody writes objects that are to be recorded.
    Write,
}

/// The content of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    v: u32,
    /// The same through all renewals.
    pub id: Uuid,
    /// Whose; `None`: every tenant's.
    pub tenant: Option<Uuid>,
    pub purpose: Purpose,
    /// Microseconds since 1970-01-01 UTC, by the clock of who holds it.
    pub since_us: i64,
    pub until_us: i64,
}

/// A lease that is held. It ends with [`Lease::release`], soon after it is dropped, or, when the process dies, by itself.
pub struct Lease {
    id: Uuid,
    end: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Lease {
    /// Says that somebody reads a tenant's backups, for as long as this is held.
    pub async fn take(repo: &Arc<Repository>, source: Uuid, tenant: Uuid) -> Result<Self> {
        Self::hold(repo, source, Some(tenant), Purpose::Restore, LEASE).await
    }

    /// Says that somebody writes objects that no record names yet, for as long as this is held.
    pub async fn intent(repo: &Arc<Repository>, source: Uuid) -> Result<Self> {
        Self::hold(repo, source, None, Purpose::Write, LEASE).await
    }

    /// Takes a tenant to write something for it; `None`: another worker has it.
    ///
    /// Who sees another's lease behind its own has not got it; of several that come at once, the first waits until the
    /// others have given way.
    pub async fn claim(repo: &Arc<Repository>, source: Uuid, tenant: Uuid) -> Result<Option<Self>> {
        if !writers(repo, source, tenant).await.is_empty() {
            return Ok(None);
        }
        let lease = Self::hold(repo, source, Some(tenant), Purpose::Write, CLAIM).await?;
        for _ in 0..GIVE_WAY {
            let mut others = writers(repo, source, tenant).await;
            others.retain(|h| h.id != lease.id);
            if others.is_empty() {
                return Ok(Some(lease));
            }
            if others.iter().any(|h| h.id < lease.id) {
                break;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        lease.release().await;
        Ok(None)
    }

    async fn hold(
        repo: &Arc<Repository>,
        source: Uuid,
        tenant: Option<Uuid>,
        purpose: Purpose,
        span: Duration,
    ) -> Result<Self> {
        let since_us = repo.clock().now_us();
        let held = Held { v: 1, id: random::uuid(), tenant, purpose, since_us, until_us: 0 };
        let id = held.id;
        let mut holder = Holder { repo: repo.clone(), source, held, span, path: None };
        holder.renew().await?;
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(holder.keep(ended));
        Ok(Self { id, end: Some(end), task: Some(task) })
    }

    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Ends it, and waits until it is gone.
    pub async fn release(mut self) {
        drop(self.end.take());
        if let Some(task) = self.task.take() {
            // What a task that broke off leaves behind ends by itself.
            let _ = task.await;
        }
    }
}

/// Keeps one lease alive.
struct Holder {
    repo: Arc<Repository>,
    source: Uuid,
    held: Held,
    /// How long it holds without a renewal.
    span: Duration,
    /// Where it is now.
    path: Option<String>,
}

impl Holder {
    async fn keep(mut self, mut ended: oneshot::Receiver<()>) {
        while tokio::time::timeout(self.span / RENEW, &mut ended).await.is_err() {
            if let Err(e) = self.renew().await {
                tracing::warn!("a lease could not be renewed, and ends {}: {e}", rfc3339(self.held.until_us));
            }
        }
        if let Some(path) = self.path.take() {
            self.discard(&path).await;
        }
    }

    /// Puts it under a new name, then removes the old one.
    async fn renew(&mut self) -> Result<()> {
        let now_us = self.repo.clock().now_us();
        let held = Held { until_us: now_us.saturating_add(self.span.as_micros() as i64), ..self.held.clone() };
        let object = random::uuid();
        let (path, bytes) = (paths::lease(self.source, object), seal(&self.repo, self.source, object, &held)?);
        let put = join_all(self.repo.attached_stores().map(|s| s.put(&path, bytes.clone()))).await;
        let failed: Vec<Error> =
            put.iter().filter_map(|r| r.as_ref().err()).map(|e| Error::other(e.to_string())).collect();
        if failed.len() == put.len() {
            // A store that may only be read is a way to restore, too.
            let why = failed.first().map_or_else(|| "no store answers".to_owned(), ToString::to_string);
            tracing::warn!("no store takes a lease: a removal that is due now would not wait ({why})");
            return Ok(());
        }
        self.held = held;
        if let Some(old) = self.path.replace(path) {
            self.discard(&old).await;
        }
        Ok(())
    }

    async fn discard(&self, path: &str) {
        for e in join_all(self.repo.attached_stores().map(|s| s.delete(path))).await.into_iter().filter_map(Result::err)
        {
            tracing::debug!("a lease stays until it ends by itself: {e}");
        }
    }
}

fn seal(repo: &Repository, source: Uuid, object: Uuid, held: &Held) -> Result<Bytes> {
    let key = repo.keyring().repository_key();
    let header = Header {
        kind: ObjectKind::Lease,
        codec: Codec::None,
        tenant: repo.uid(),
        object,
        source,
        system_identifier: 0,
        timeline: 0,
        lsn_start: Lsn::ZERO,
        lsn_end: Lsn::ZERO,
        key_version: key.id.version,
    };
    let mut sealer = Sealer::new(Vec::new(), &header, &key)?;
    let text = serde_json::to_vec(held).context(Kind::Other, "cannot encode a lease")?;
    sealer.write_all(&text).context(Kind::Other, "cannot seal a lease")?;
    Ok(sealer.finish()?.0.into())
}

/// The leases of a source that are held, of all stores that answer.
///
/// # Errors
/// `Unreachable`: a required store does not answer, and could have others. `Verification`: one cannot be read and is not
/// over for sure, so nobody knows whose it is.
pub async fn live(repo: &Repository, source: Uuid) -> Result<Vec<Held>> {
    let now_us = repo.clock().now_us();
    let mut found: BTreeMap<Uuid, Held> = BTreeMap::new();
    for store in repo.attached_stores() {
        match of_store(repo, store, source, now_us).await {
            Ok(all) => found.extend(all.into_iter().map(|h| (h.id, h))),
            Err(e) if e.kind() == Kind::Unreachable && !store.required() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found.into_values().collect())
}

async fn of_store(repo: &Repository, store: &Store, source: Uuid, now_us: i64) -> Result<Vec<Held>> {
    'listing: for _ in 0..LISTINGS {
        let mut held = Vec::new();
        for (path, _, written_us) in store.list_dated(&paths::leases_dir(source)).await? {
            // Gone since it was listed: it ended, or it was renewed under another name.
            let Some(bytes) = store.get_opt(&path).await? else { continue 'listing };
            let over_us = written_us.saturating_add(OVER_US);
            match open(repo, source, &path, &bytes) {
                Ok(h) => held.push(h),
                Err(e) if over_us < now_us => {
                    tracing::warn!(
                        "left out, since it is over by its age, but it cannot be read: store {}: {e}",
                        store.name()
                    );
                }
                Err(e) => {
                    return Err(e
                        .during(format_args!("store {}: who reads or writes what is not known", store.name()))
                        .hint(format!(
                            "it is over, whoever held it, at {}: what is to be removed waits until then; delete it by hand \
                             only when no restore and no other agent runs",
                            rfc3339(over_us)
                        )));
                }
            }
        }
        held.retain(|h| h.until_us.saturating_add(CLOCKS_US) > now_us);
        return Ok(held);
    }
    Err(Error::other(format!("the leases of store {} change faster than they can be read", store.name())))
}

/// Who writes for a tenant, as far as the stores say now: what cannot be reached or read is not among them, and holds
/// nobody up.
async fn writers(repo: &Repository, source: Uuid, tenant: Uuid) -> Vec<Held> {
    let now_us = repo.clock().now_us();
    // One that is renewed is there twice for a moment.
    let mut found: Vec<Held> = Vec::new();
    for store in repo.attached_stores() {
        let listed = store.list(&paths::leases_dir(source)).await.unwrap_or_default();
        let each = listed.iter().map(|(path, _)| async move {
            let bytes = store.get_opt(path).await.ok()??;
            open(repo, source, path, &bytes).ok()
        });
        found.extend(join_all(each).await.into_iter().flatten());
    }
    let counts = |h: &Held| h.purpose == Purpose::Write && h.tenant == Some(tenant) && h.until_us > now_us;
    found.into_iter().filter(counts).collect()
}

fn open(repo: &Repository, source: Uuid, path: &str, bytes: &[u8]) -> Result<Held> {
    let expect = Expect { tenant: Some(repo.uid()), source: Some(source), ..Expect::kind(ObjectKind::Lease) };
    let during = |e: Error| e.during(format_args!("lease {path}"));
    let text = Opener::new(bytes, &**repo.keyring(), &expect).and_then(Opener::read_all).map_err(during)?;
    serde_json::from_slice(&text).context(Kind::Verification, format_args!("lease {path} is not readable"))
}

/// Removes leases that ended long ago. What cannot be reached or read stays; it holds nothing up.
pub async fn sweep(repo: &Repository, source: Uuid) {
    let now_us = repo.clock().now_us();
    for store in repo.attached_stores() {
        if let Err(e) = sweep_store(repo, store, source, now_us).await {
            tracing::debug!("leases that are over stay for now: {e}");
        }
    }
}

async fn sweep_store(repo: &Repository, store: &Store, source: Uuid, now_us: i64) -> Result<()> {
    for (path, _, written_us) in store.list_dated(&paths::leases_dir(source)).await? {
        let Some(bytes) = store.get_opt(&path).await? else { continue };
        let over_us = open(repo, source, &path, &bytes).map_or(written_us.saturating_add(OVER_US), |h| h.until_us);
        if over_us.saturating_add(LITTER_US) < now_us {
            store.delete(&path).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::Access;
    use crate::repository::tests::World;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_lease_is_seen_by_others_until_it_is_released() {
        let w = World::new(&[("a", true), ("b", false)]);
        let repo = w.init().await;
        let source = repo.keyring().ensure_source("shop").await.unwrap();
        let tenant = Uuid::from_u128(7);
        let other = w.open(Access::Read).await;
        assert_eq!(live(&other, source).await.unwrap(), []);
        let lease = Lease::take(&repo, source, tenant).await.unwrap();
        let intent = Lease::intent(&repo, source).await.unwrap();
        let mut seen = live(&other, source).await.unwrap();
        seen.sort_by_key(|h| h.tenant.is_none());
        assert_eq!((seen[0].id, seen[0].tenant, seen[0].purpose), (lease.id(), Some(tenant), Purpose::Restore));
        assert_eq!((seen[1].id, seen[1].tenant, seen[1].purpose), (intent.id(), None, Purpose::Write));
        lease.release().await;
        assert_eq!(live(&other, source).await.unwrap().len(), 1);
        // Dropped: gone soon.
        drop(intent);
        while !live(&other, source).await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_renewed_lease_is_one_and_one_that_is_over_holds_nothing() {
        let w = World::new(&[("a", true)]);
        let repo = w.init().await;
        let source = repo.keyring().ensure_source("shop").await.unwrap();
        let held =
            Held { v: 1, id: Uuid::from_u128(1), tenant: None, purpose: Purpose::Write, since_us: 5, until_us: 0 };
        let mut holder = Holder { repo: repo.clone(), source, held: held.clone(), span: LEASE, path: None };
        for _ in 0..3 {
            holder.renew().await.unwrap();
            let seen = live(&repo, source).await.unwrap();
            assert_eq!((seen.len(), seen[0].id, seen[0].since_us), (1, held.id, 5));
        }
        let object = random::uuid();
        let path = paths::lease(source, object);
        let bytes = seal(&repo, source, object, &held).unwrap();
        let store = repo.attached_stores().next().unwrap();
        store.put(&path, bytes).await.unwrap();
        assert_eq!(live(&repo, source).await.unwrap().len(), 1);
        sweep(&repo, source).await;
        assert_eq!(store.size(&path).await.unwrap(), None);
        // One that cannot be read could be anybody's, until it is over by its age; it hides no other.
        store.put(&path, Bytes::from_static(b"no lease")).await.unwrap();
        let other = Lease::take(&repo, source, Uuid::from_u128(7)).await.unwrap();
        let e = live(&repo, source).await.unwrap_err();
        assert!(e.to_string().contains(&path) && e.report().contains("it is over"), "{}", e.report());
        let written = |minutes: u64| {
            let file = std::fs::File::options().write(true).open(w.path("a").join(&path)).unwrap();
            let back = Duration::from_secs(60 * minutes);
            file.set_modified(std::time::SystemTime::now().checked_sub(back).unwrap()).unwrap();
        };
        written(24);
        assert!(live(&repo, source).await.is_err());
        written(26);
        let seen = live(&repo, source).await.unwrap();
        assert!(seen.len() == 2 && seen.iter().any(|h| h.id == other.id()), "{seen:?}");
        sweep(&repo, source).await;
        assert!(store.size(&path).await.unwrap().is_some());
        written(86);
        sweep(&repo, source).await;
        assert_eq!(store.size(&path).await.unwrap(), None);
        assert_eq!(live(&repo, source).await.unwrap().len(), 2);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_several_workers_one_has_a_tenant_and_a_dead_one_has_it_not_for_ever() {
        let w = World::new(&[("a", true), ("b", false)]);
        let repo = w.init().await;
        let source = repo.keyring().ensure_source("shop").await.unwrap();
        let other = w.open(Access::Write).await;
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let intent = Lease::intent(&repo, source).await.unwrap();
        let lease = Lease::claim(&repo, source, one).await.unwrap().unwrap();
        assert!(Lease::claim(&other, source, one).await.unwrap().is_none());
        Lease::claim(&other, source, two).await.unwrap().unwrap().release().await;
        lease.release().await;
        Lease::claim(&other, source, one).await.unwrap().unwrap().release().await;
        intent.release().await;
        for _ in 0..5 {
            let each: Vec<_> = (0..4).map(|_| Lease::claim(&repo, source, one)).collect();
            let got: Vec<Lease> = join_all(each).await.into_iter().filter_map(|l| l.unwrap()).collect();
            assert_eq!(got.len(), 1, "all at once");
            for l in got {
                l.release().await;
            }
        }
        // Of a process that died: its time is over.
        let held =
            Held { v: 1, id: Uuid::from_u128(9), tenant: Some(one), purpose: Purpose::Write, since_us: 5, until_us: 0 };
        let object = random::uuid();
        let store = repo.attached_stores().next().unwrap();
        let put = |held: &Held| seal(&repo, source, object, held).unwrap();
        store.put(&paths::lease(source, object), put(&held)).await.unwrap();
        Lease::claim(&repo, source, one).await.unwrap().unwrap().release().await;
        // Of one that lives.
        let live = Held { until_us: repo.clock().now_us() + 1_000_000, ..held };
        let object = random::uuid();
        store.put(&paths::lease(source, object), seal(&repo, source, object, &live).unwrap()).await.unwrap();
        assert!(Lease::claim(&repo, source, one).await.unwrap().is_none());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn where_none_can_be_put_there_is_a_warning_only() {
        let w = World::new(&[("a", true)]);
        let repo = w.init().await;
        let source = repo.keyring().ensure_source("shop").await.unwrap();
        std::fs::rename(w.path("a"), w.path("away")).unwrap();
        Lease::take(&repo, source, Uuid::from_u128(7)).await.unwrap().release().await;
    }
}
