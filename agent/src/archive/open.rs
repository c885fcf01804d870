//! Finds an archive by its id and opens its document, without log and catalog; and compares the two where both are there.

use super::document::{ARCHIVE_VERSION, Document, WHAT};
use crate::catalog::{Catalog, FullEntry, manifest};
use crate::crypto::{Expect, ObjectKind, Opener};
use crate::error::{Error, Kind, Result};
use crate::history::History;
use crate::keyring::Keyring;
use crate::opened::{Opened, Reserved};
use crate::repository::{ObjectRef, Repository, Store, paths};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// An archive as a history of its own.
pub enum Alone {
    /// There is no such archive, or it was removed.
    None,
    /// All that it names is there.
    Sound(Box<History>),
    /// A check found it damaged, or an object is not there as it was written: better is what else has its point.
    Doubtful(Box<History>),
    /// It is there and says nothing.
    Unreadable(Error),
}

/// The archive of a tenant with this id.
pub async fn alone(opened: &Opened, source: Uuid, tenant: Uuid, id: Uuid) -> Alone {
    let document = match find(opened, source, tenant, id).await {
        Ok(Some(d)) => d,
        Ok(None) => return Alone::None,
        Err(e) => return Alone::Unreadable(e),
    };
    let from = opened.from.as_deref();
    // Where there is a catalog, it knows more; an archive needs none.
    let catalog = Catalog::open(&opened.repo, source, tenant, from).await.ok();
    if catalog.as_ref().is_some_and(|c| c.state().gone.contains(&id)) {
        return Alone::None;
    }
    let is_damaged = catalog.is_some_and(|c| c.state().read_back(id) == Some(false));
    let shared = opened.keyring.tenant_uid(source, &Reserved::Shared.tenant());
    let history = History::of_archive(&opened.repo, &opened.keyring, &document, shared, from);
    match absent(&opened.repo, &document, from).await {
        Ok(None) if !is_damaged => Alone::Sound(Box::new(history)),
        Ok(absent) => {
            if let Some(path) = absent {
                tracing::warn!("archive {id}: object {path} is in no store as it was written");
            }
            Alone::Doubtful(Box::new(history))
        }
        Err(e) => Alone::Unreadable(e),
    }
}

/// Looks for the document in each store; one that cannot be opened may be whole in the next.
async fn find(opened: &Opened, source: Uuid, tenant: Uuid, id: Uuid) -> Result<Option<Document>> {
    let mut failed = None;
    for store in opened.repo.readable(opened.from.as_deref())? {
        match find_in(&store, &opened.keyring, (source, tenant), id).await {
            Ok(Some(d)) => return Ok(Some(d)),
            Ok(None) => {}
            Err(e) => failed = Some(e),
        }
    }
    failed.map_or(Ok(None), Err)
}

async fn find_in(
    store: &Store,
    keyring: &Keyring,
    (source, tenant): (Uuid, Uuid),
    id: Uuid,
) -> Result<Option<Document>> {
    let folder = paths::archives_dir(source, tenant);
    let listed = store.list(&folder).await?;
    let is_it = |name: &&String| paths::parse_leaf(name).is_some_and(|(_, object)| object == id);
    let Some(name) = listed.iter().map(|(name, _)| name).find(is_it) else { return Ok(None) };
    // Names are listed as the store has them, or within the folder.
    let path = format!("{folder}/{}", name.rsplit('/').next().unwrap_or(name));
    let bytes = store.get(&path).await?;
    let during = |e: Error| e.during(format_args!("archive {path}"));
    let expect =
        Expect { tenant: Some(tenant), source: Some(source), object: Some(id), ..Expect::kind(ObjectKind::Manifest) };
    let text = Opener::new(&bytes[..], keyring, &expect).and_then(Opener::read_all).map_err(during)?;
    parse(&text).map(Some).map_err(during)
}

/// An object that no store has at its length.
async fn absent(repo: &Repository, document: &Document, from: Option<&str>) -> Result<Option<String>> {
    for o in &document.objects {
        let (mut is_there, mut away) = (false, None);
        for store in repo.readable(from)? {
            match store.size(&o.path).await {
                Ok(size) => is_there |= size == Some(o.bytes),
                Err(e) => away = Some(e),
            }
        }
        match away {
            _ if is_there => {}
            Some(e) => return Err(e),
            None => return Ok(Some(o.path.clone())),
        }
    }
    Ok(None)
}

/// What is wrong with an archive's document beside its bytes: it names what the catalog's entry names, and its reference
/// data adds up.
///
/// # Errors
/// Code `malformed`: that is what is wrong. Others: it could not be read.
pub async fn differs(repo: &Arc<Repository>, full: &FullEntry, store: &str) -> Result<()> {
    let Some(object) = full.archive.first() else { return Ok(()) };
    let during = |e: Error| e.during(format_args!("object {}", object.path));
    let document = repo.open_small(object, Some(store)).await?;
    let document = parse(&document).map_err(during)?;
    let named: BTreeMap<&str, (u64, &str)> =
        document.objects.iter().map(|o| (o.path.as_str(), (o.bytes, o.sha256.as_str()))).collect();
    let others = full.needs().filter(|o| o.path != object.path);
    let needed: BTreeMap<&str, (u64, &str)> = others.map(|o| (o.path.as_str(), (o.bytes, o.sha256.as_str()))).collect();
    if document.id != full.id || named != needed {
        return Err(during(bad("it names other objects than the catalog's entry of the archive".to_owned())));
    }
    if let Some(r) = &document.reference
        && let Some(m) = &r.manifest
    {
        manifest::read(repo, m, &r.objects, Some(store)).await?;
    }
    Ok(())
}

fn parse(text: &[u8]) -> Result<Document> {
    let d: Document = serde_json::from_slice(text).map_err(|e| bad(format!("it is no archive's document: {e}")))?;
    if d.v != ARCHIVE_VERSION || d.what != WHAT {
        return Err(bad(format!("it is a {} of version {}; this coffer reads version {ARCHIVE_VERSION}", d.what, d.v)));
    }
    // All that a program reads of it is among what a human sees.
    let seen: BTreeMap<&str, &str> = d.objects.iter().map(|o| (o.path.as_str(), o.sha256.as_str())).collect();
    let large = d.large_objects.iter().flat_map(|r| &r.objects);
    let read: Vec<&ObjectRef> =
        d.full.needs().chain(d.reference.iter().flat_map(FullEntry::needs)).chain(large).collect();
    match read.into_iter().find(|o| seen.get(o.path.as_str()) != Some(&o.sha256.as_str())) {
        Some(o) => Err(bad(format!("it does not list object {}", o.path))),
        None => Ok(d),
    }
}

fn bad(why: String) -> Error {
    Error::new(Kind::Verification, why).code("malformed")
}

#[cfg(test)]
mod tests {
    use super::super::document::{Configuration, Named, Object, Point, Whose};
    use super::*;
    use coffer_wire::Lsn;

    #[test]
    fn what_a_program_reads_is_what_a_human_sees() {
        let id = Uuid::from_u128(1);
        let object = ObjectRef {
            path: "s/1/t/2/f/3".into(),
            kind: ObjectKind::Full,
            tenant: id,
            object: id,
            key_version: 1,
            bytes: 5,
            sha256: "ab".into(),
            lsn_start: Lsn::ZERO,
            lsn_end: Lsn(7),
            rows: 1,
        };
        let full = FullEntry {
            id,
            trigger: "archive".into(),
            reason: None,
            point_lsn: Lsn(7),
            point_time_us: 0,
            log_n: 0,
            system_identifier: 1,
            timeline: 1,
            tables: Vec::new(),
            manifest: None,
            objects: vec![object.clone()],
            schema: None,
            roles: None,
            sequences: Vec::new(),
            database: None,
            rows: 1,
            bytes: 5,
            read_back_us: None,
            archive: Vec::new(),
        };
        let good = Document {
            v: ARCHIVE_VERSION,
            what: WHAT.into(),
            how_to_restore: Vec::new(),
            id,
            source: Named { name: "shop".into(), uid: id },
            tenant: Whose { key: "acme".into(), kind: "normal".into(), uid: id },
            point: Point::of(&full),
            made_at: String::new(),
            tables: Vec::new(),
            reference_tables: Vec::new(),
            configuration: Configuration::default(),
            objects: vec![Object::of(&object, "rows")],
            full,
            reference: None,
            large_objects: Vec::new(),
        };
        let read = |d: &Document| parse(&serde_json::to_vec_pretty(d).unwrap());
        assert_eq!(read(&good).unwrap(), good);
        let mut other = good.clone();
        other.objects[0].sha256 = "cd".into();
        for bad in [
            Document { objects: Vec::new(), ..good.clone() },
            other,
            Document { v: ARCHIVE_VERSION + 1, ..good.clone() },
            Document { what: "a shopping list".into(), ..good },
        ] {
            assert!(read(&bad).unwrap_err().is_code("malformed"), "{bad:?}");
        }
        assert!(parse(b"{}").unwrap_err().is_code("malformed"));
    }
}
