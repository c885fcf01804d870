//! Trying a store where it will be used: servers silently ignore conditional puts, so each is asked before it is trusted.

use super::paths;
use super::store::{Created, Store};
use crate::error::{Error, Kind, Result};
use bytes::Bytes;

/// Sends damaged bytes, creates an object twice, reads it back whole and in part, lists it, removes it. A store that takes
/// the damaged bytes, lets the second create through or gives back something else is refused: nothing there could be
/// relied on.
pub async fn probe(store: &Store) -> Result<()> {
    let path = format!("{}/{}", paths::PROBES, crate::crypto::random::uuid().simple());
    let result = probe_at(store, &path).await;
    // Best effort: what is left over is named for what it is.
    let _ = store.delete(&path).await;
    result.map_err(|e| e.during(format_args!("trying store {}", store.name())))
}

async fn probe_at(store: &Store, path: &str) -> Result<()> {
    let unfit = |what: &str| {
        Err(Error::new(Kind::Refused, format!("{} {what}", store.shown()))
            .code("store_unfit")
            .hint("choose a store that implements conditional puts (S3 If-None-Match) and upload checksums"))
    };
    let mut first = vec![0; 4096];
    crate::crypto::random::fill(&mut first);
    let mut second = first.clone();
    second[0] ^= 1;
    let (first, second) = (Bytes::from(first), Bytes::from(second));
    if store.is_remote() && store.takes_damaged(path, first.clone(), second.clone()).await {
        return unfit("takes an upload whose bytes do not match their checksum");
    }
    match store.create(path, first.clone()).await? {
        Created::Won => {}
        Created::Lost(_) => return unfit("says that a new random name is taken"),
    }
    match store.create(path, second).await? {
        Created::Lost(there) if there == first => {}
        Created::Lost(_) => return unfit("gives back other bytes than were written"),
        Created::Won => return unfit("lets an existing object be created again"),
    }
    if store.get(path).await? != first {
        return unfit("gives back other bytes than were written");
    }
    let (part, size) = store.get_range(path, 1000..1016).await?;
    if part != first[1000..1016] || size != first.len() as u64 {
        return unfit("does not give back the part of an object that was asked for");
    }
    if !store.list(paths::PROBES).await?.iter().any(|(name, size)| name == path && *size == first.len() as u64) {
        return unfit("does not list what was just written");
    }
    Ok(())
}
