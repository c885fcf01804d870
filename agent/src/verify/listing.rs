//! What one store has of a source, by its own log and catalogs: every object that they name, and what is wrong with the
//! chains themselves.

use super::objects::{Failure, continuity, is_finding, named_in};
use crate::archive;
use crate::catalog::{self, Catalog, Floors, FullEntry, State, manifest};
use crate::crypto::ObjectKind;
use crate::error::{Error, Kind, Result};
use crate::repository::{Log, LogRecord, ObjectRef, Repository, paths};
use crate::tenant::Tenant;
use coffer_wire::TenantKind;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// See the module.
#[derive(Default)]
pub struct Listed {
    /// Each once.
    pub objects: Vec<ObjectRef>,
    /// Records (and packs) of the log and records of the catalogs, all of which were read for this.
    pub records: Vec<String>,
    pub failures: Vec<Failure>,
    /// By tenant.
    pub catalogs: BTreeMap<Uuid, State>,
}

/// Lists a store. `tenant`: only what is of this one. `closely`: reads the manifests, too.
///
/// # Errors
/// Those of stores that do not answer; what is wrong with a chain is among the failures.
pub async fn list(
    repo: &Arc<Repository>,
    (source, tenant): (Uuid, Option<Uuid>),
    store: &str,
    closely: bool,
) -> Result<Listed> {
    let mut out = Listed::default();
    let mut known = HashSet::new();
    let mut of_log = Vec::new();
    match Log::open(repo, source, Some(store)).await {
        Ok(log) => {
            out.failures.extend(continuity(source, log.records()));
            of_log = log.records().to_vec();
            if tenant.is_none() {
                out.records.extend_from_slice(log.names());
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
                if closely {
                    for (f, m) in c.state().fulls.iter().filter_map(|f| Some((f, f.manifest.as_ref()?))) {
                        let wrong = adds_up(repo, f, m, store).await?;
                        out.failures.extend(wrong.map(|e| Failure::of(&m.path, Some(uid), &e)));
                    }
                    for (f, d) in c.state().fulls.iter().filter_map(|f| Some((f, f.archive.first()?))) {
                        let wrong = finding(archive::differs(repo, f, store).await, store)?;
                        out.failures.extend(wrong.map(|e| Failure::of(&d.path, Some(uid), &e)));
                    }
                }
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
    let floors = floors(repo, source, &out.catalogs);
    let objects = of_log.iter().flat_map(|r| r.objects().filter(|o| !floors.is_gone(r, o)));
    let wanted = objects.filter(|o| tenant.is_none_or(|t| t == o.tenant));
    out.objects.extend(wanted.filter(|o| known.insert(o.path.clone())).cloned());
    Ok(out)
}

/// What of the log was removed on purpose, as these catalogs say.
fn floors(repo: &Repository, source: Uuid, catalogs: &BTreeMap<Uuid, State>) -> Floors {
    let shared = repo.keyring().tenant_uid(source, &Tenant::reserved(TenantKind::Shared));
    Floors {
        tenants: catalogs.iter().filter_map(|(uid, s)| Some((*uid, s.floor?))).collect(),
        commons: catalogs.get(&shared).and_then(|s| s.commons),
    }
}

/// Those of the failures that are some: what is missing may be below a floor that the store has not heard of yet.
pub async fn needed(repo: &Arc<Repository>, source: Uuid, failures: Vec<Failure>) -> Result<Vec<Failure>> {
    if failures.iter().all(|f| f.kind != "missing") {
        return Ok(failures);
    }
    let log = match Log::open(repo, source, None).await {
        Ok(log) => log,
        // Nobody else says that it is not needed.
        Err(e) if is_finding(&e) || e.kind() == Kind::Unreachable => return Ok(failures),
        Err(e) => return Err(e),
    };
    let named: HashMap<&str, (&LogRecord, &ObjectRef)> =
        log.records().iter().flat_map(|r| r.objects().map(|o| (o.path.as_str(), (&**r, o)))).collect();
    let shared = repo.keyring().tenant_uid(source, &Tenant::reserved(TenantKind::Shared));
    let mut whose: BTreeSet<Uuid> =
        failures.iter().filter(|f| f.kind == "missing").filter_map(|f| f.tenant_uid).collect();
    whose.insert(shared);
    let mut catalogs = BTreeMap::new();
    for tenant in whose {
        match Catalog::open(repo, source, tenant, None).await {
            Ok(c) => drop(catalogs.insert(tenant, c.state().clone())),
            Err(e) if is_finding(&e) || e.kind() == Kind::Unreachable => {}
            Err(e) => return Err(e),
        }
    }
    let floors = floors(repo, source, &catalogs);
    let is_needed = |f: &Failure| {
        // Only what a floor is known to cover is given up, and of that nothing that a backup refers to.
        let is_gone = match named.get(f.object.as_str()) {
            Some((r, o)) => floors.is_gone(r, o),
            // A checkpoint was made of the record that named it: it went with all below the floors.
            None => log.begins() > 0 && paths::is_of_a_ship(source, &f.object),
        };
        let state = f.tenant_uid.and_then(|t| catalogs.get(&t));
        !is_gone || state.is_some_and(|s| s.objects().any(|o| o.path == f.object))
    };
    Ok(failures.into_iter().filter(|f| f.kind != "missing" || is_needed(f)).collect())
}

/// That a manifest authenticates does not say that it adds up; what is wrong with it. What cannot be opened is found with
/// the other objects.
pub async fn adds_up(repo: &Repository, full: &FullEntry, manifest: &ObjectRef, store: &str) -> Result<Option<Error>> {
    finding(manifest::read(repo, manifest, &full.objects, Some(store)).await, store)
}

/// What a look found wrong with what an object says.
fn finding<T>(looked: Result<T>, store: &str) -> Result<Option<Error>> {
    match looked {
        Err(e) if e.is_code("malformed") => Ok(Some(e.during(format_args!("store {store}")))),
        Err(e) if !is_finding(&e) => Err(e),
        _ => Ok(None),
    }
}

impl Listed {
    /// The backups that an object belongs to, each with its tenant, by the names that checks have for them. An archive has
    /// objects of others', too.
    pub fn backups_with(&self, object: &ObjectRef) -> BTreeSet<(Uuid, Uuid)> {
        let mut all: BTreeSet<(Uuid, Uuid)> = BTreeSet::new();
        for (tenant, state) in &self.catalogs {
            let fulls = state.fulls.iter().filter(|f| f.needs().any(|o| o.path == object.path));
            all.extend(fulls.map(|f| (*tenant, f.id)));
            let is_of = |o: &ObjectRef| o.path == object.path;
            let incrementals = state.incrementals.iter().filter(|i| i.object.as_ref().is_some_and(is_of));
            all.extend(incrementals.map(|i| (*tenant, i.id)));
        }
        // A full of a base is a backup by its own uid; parts of it may be parts of later fulls as well.
        if object.kind == ObjectKind::Full {
            all.insert((object.tenant, object.object));
        }
        all
    }

    /// The full that an object is the manifest of.
    pub fn full_of(&self, object: &ObjectRef) -> Option<&FullEntry> {
        let state = self.catalogs.get(&object.tenant)?;
        state.fulls.iter().find(|f| f.manifest.as_ref().is_some_and(|m| m.path == object.path))
    }

    /// Whether it is still named.
    pub fn names(&self, path: &str) -> bool {
        self.objects.iter().any(|o| o.path == path)
    }
}
