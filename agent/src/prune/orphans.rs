//! Objects that no record names: what an interrupted ship, base or compaction left behind.
//!
//! Only names of our own shapes are looked at, at or below the log's end, and only those that a store says are older than
//! a day, and older than the beginning of whatever is being written now. What a record names and a floor is above is one,
//! too: a store that was brought up to date while it was removed may have it again. They are removed like everything else: named by a record, after its
//! grace, and only if they are still nobody's.

use super::{Orphan, PARALLEL, Pruner, Survey};
use crate::catalog::{Catalog, State};
use crate::crypto::ObjectKind;
use crate::error::Result;
use crate::repository::{ObjectRef, Store, paths};
use coffer_wire::Lsn;
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// Younger ones may be on their way to a record, in microseconds.
const AGE_US: i64 = 86_400 * 1_000_000;
/// By how much the clock of a store may be ahead of that of a writer, in microseconds.
const CLOCKS_US: i64 = crate::retention::FUTURE_US;

/// The orphans of these tenants and, unless only one tenant is looked at, of what concerns all.
pub(super) async fn find(p: &Pruner, survey: &Survey, tenants: &[Uuid]) -> Result<Vec<Orphan>> {
    let source = p.source.1;
    let mut folders: Vec<(String, Uuid)> = tenants.iter().map(|t| (paths::tenant_dir(source, *t), *t)).collect();
    if p.tenant.is_none() {
        let shared = p.shared();
        folders.extend([(paths::commons_dir(source), shared), (paths::schemas_dir(source), shared)]);
    }
    let before_us = oldest(survey.now_us, survey.writing_since_us);
    let end = survey.log.end();
    let mut found: BTreeMap<String, Orphan> = BTreeMap::new();
    for store in p.repo.attached_stores() {
        let each: Vec<_> =
            folders.iter().map(|(folder, tenant)| list(store.clone(), folder.clone(), *tenant)).collect();
        let mut lists = stream::iter(each).buffer_unordered(PARALLEL);
        loop {
            let listed = match lists.try_next().await {
                Ok(Some(listed)) => listed,
                Ok(None) => break,
                // What it has is removed when it is back.
                Err(e) if super::is_passing(&e) && !store.required() => break,
                Err(e) => return Err(e),
            };
            for (path, bytes, written_us, tenant) in listed {
                let Some((lsn, object)) = paths::parse_leaf(&path) else { continue };
                // Beyond the log's end it may be a ship on its way, however old: that of a store that was away for days.
                if written_us >= before_us || lsn > end || survey.log.expects(&path, &survey.floors) {
                    continue;
                }
                found.insert(path.clone(), Orphan { tenant, path, bytes, written_us, lsn, object });
            }
        }
    }
    // Most tenants have none: only of the others the catalog is read.
    let whose: HashSet<Uuid> = found.values().map(|o| o.tenant).collect();
    for tenant in whose {
        let catalog = Catalog::open(&p.repo, source, tenant, None).await?;
        let named = names(catalog.state());
        found.retain(|path, o| o.tenant != tenant || !named.contains(path.as_str()));
    }
    Ok(found.into_values().collect())
}

/// What a store has in a folder: path, length, when it was written, whose it is.
async fn list(store: Arc<Store>, folder: String, tenant: Uuid) -> Result<Vec<(String, u64, i64, Uuid)>> {
    let listed = store.list_dated(&folder).await?;
    Ok(listed.into_iter().map(|(path, bytes, us)| (path, bytes, us, tenant)).collect())
}

/// Before when something must have been written to be looked at.
fn oldest(now_us: i64, writing_since_us: Option<i64>) -> i64 {
    let of_age = now_us.saturating_sub(AGE_US);
    writing_since_us.map_or(of_age, |since| of_age.min(since.saturating_sub(CLOCKS_US)))
}

/// Everything that a catalog names, what is to be removed included.
fn names(state: &State) -> HashSet<&str> {
    let removals = state.removals.iter().flat_map(|r| &r.objects);
    needed(state).chain(removals).map(|o| o.path.as_str()).collect()
}

/// What the backups that stand need.
pub(super) fn needed(state: &State) -> impl Iterator<Item = &ObjectRef> {
    let fulls = state.fulls.iter().flat_map(|f| f.needs());
    fulls.chain(state.incrementals.iter().filter_map(|i| i.object.as_ref()))
}

impl Orphan {
    /// As a removal names it. Nobody knows its hash.
    pub(super) fn object(&self) -> ObjectRef {
        let mut parts = self.path.rsplit('/').skip(1);
        let kind = match parts.next() {
            Some("c") => ObjectKind::Changeset,
            Some("r") => ObjectKind::Roles,
            Some("m" | "a") => ObjectKind::Manifest,
            Some("i") => ObjectKind::Incremental,
            Some("common") => ObjectKind::Common,
            Some("schema") => ObjectKind::Schema,
            _ => ObjectKind::Full,
        };
        ObjectRef {
            path: self.path.clone(),
            kind,
            tenant: self.tenant,
            object: self.object,
            key_version: 0,
            bytes: self.bytes,
            sha256: String::new(),
            lsn_start: Lsn::ZERO,
            lsn_end: self.lsn,
            rows: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_looked_at_after_a_day_and_never_while_it_may_be_written() {
        let now_us = 100 * AGE_US;
        let at = |writing_since_us| oldest(now_us, writing_since_us);
        assert_eq!(at(None), 99 * AGE_US);
        assert_eq!(at(Some(now_us)), 99 * AGE_US);
        assert_eq!(at(Some(90 * AGE_US)), 90 * AGE_US - CLOCKS_US);
    }
}
