//! What one store has of a source, by its own log and catalogs: every object that they name, and what is wrong with the
//! chains themselves.

use super::objects::{Failure, continuity, is_finding, named_in};
use crate::catalog::{self, Catalog, State, manifest};
use crate::crypto::ObjectKind;
use crate::error::Result;
use crate::repository::{Log, ObjectRef, Repository, paths};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// See the module.
#[derive(Default)]
pub struct Listed {
    /// Each once.
    pub objects: Vec<ObjectRef>,
    /// Records of the log and of the catalogs, all of which were read for this.
    pub records: Vec<String>,
    pub failures: Vec<Failure>,
    /// By tenant.
    pub catalogs: BTreeMap<Uuid, State>,
}

/// Lists a store. `tenant`: only what is of this one.
///
/// # Errors
/// Those of stores that do not answer; what is wrong with a chain is among the failures.
pub async fn list(repo: &Arc<Repository>, source: Uuid, tenant: Option<Uuid>, store: &str) -> Result<Listed> {
    let mut out = Listed::default();
    let mut known = HashSet::new();
    match Log::open(repo, source, Some(store)).await {
        Ok(log) => {
            out.failures.extend(continuity(source, log.records()));
            let objects = log.records().iter().flat_map(|r| r.objects());
            let wanted = objects.filter(|o| tenant.is_none_or(|t| t == o.tenant));
            out.objects.extend(wanted.filter(|o| known.insert(o.path.clone())).cloned());
            if tenant.is_none() {
                out.records.extend(log.records().iter().map(|r| paths::log_record(source, r.n)));
            }
        }
        Err(e) if is_finding(&e) => {
            let object = paths::log_dir(source);
            out.failures.push(Failure::of(&named_in(&e, &object), None, &e.during(format_args!("store {store}"))));
        }
        Err(e) => return Err(e),
    }
    let having = catalog::tenants(repo, source, Some(store)).await?;
    for (uid, numbers) in having.into_iter().filter(|(uid, _)| tenant.is_none_or(|t| t == *uid)) {
        match Catalog::open(repo, source, uid, Some(store)).await {
            Ok(c) => {
                out.objects.extend(c.state().objects().filter(|o| known.insert(o.path.clone())).cloned());
                out.failures.extend(manifests(repo, uid, c.state(), store).await?);
                out.records.extend(numbers.into_iter().map(|n| paths::catalog_record(source, uid, n)));
                out.catalogs.insert(uid, c.state().clone());
            }
            Err(e) if is_finding(&e) => {
                let folder = paths::catalog_dir(source, uid);
                let f = Failure::of(&named_in(&e, &folder), Some(uid), &e.during(format_args!("store {store}")));
                out.failures.push(f);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(out)
}

/// That a manifest authenticates does not say that it adds up.
async fn manifests(repo: &Arc<Repository>, tenant: Uuid, state: &State, store: &str) -> Result<Vec<Failure>> {
    let mut out = Vec::new();
    for (f, m) in state.fulls.iter().filter_map(|f| Some((f, f.manifest.as_ref()?))) {
        match manifest::read(repo, m, &f.objects, Some(store)).await {
            Err(e) if e.is_code("malformed") => {
                out.push(Failure::of(&m.path, Some(tenant), &e.during(format_args!("store {store}"))));
            }
            Err(e) if !is_finding(&e) => return Err(e),
            // What cannot be opened is found again with the other objects.
            _ => {}
        }
    }
    Ok(out)
}

impl Listed {
    /// The backups that an object belongs to, by the names that checks have for them.
    pub fn backups_with(&self, object: &ObjectRef) -> Vec<Uuid> {
        let Some(state) = self.catalogs.get(&object.tenant) else { return of_base(object) };
        let fulls = state.fulls.iter().filter(|f| f.needs().any(|o| o.path == object.path)).map(|f| f.id);
        let mut all: Vec<Uuid> = fulls.collect();
        all.extend(of_base(object));
        all.dedup();
        all
    }

    /// Whether it is still named.
    pub fn names(&self, path: &str) -> bool {
        self.objects.iter().any(|o| o.path == path)
    }
}

/// A full of a base is a backup by its own uid; parts of it may be parts of later fulls as well.
fn of_base(object: &ObjectRef) -> Vec<Uuid> {
    if object.kind == ObjectKind::Full { vec![object.object] } else { Vec::new() }
}
