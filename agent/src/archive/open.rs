//! Finds an archive by its id and opens its document, without log and catalog.

use super::document::{ARCHIVE_VERSION, Document, WHAT};
use crate::crypto::{Expect, ObjectKind, Opener};
use crate::error::{Error, Kind, Result};
use crate::opened::Opened;
use crate::repository::paths;
use uuid::Uuid;

/// The archive of a tenant with this id; `None`: there is none.
///
/// # Errors
/// `Verification`, `Key`: it is there, and cannot be opened. `Unreachable`: no store answers.
pub async fn find(opened: &Opened, source: Uuid, tenant: Uuid, id: Uuid) -> Result<Option<Document>> {
    let folder = paths::archives_dir(source, tenant);
    let mut away = None;
    for store in opened.repo.readable(opened.from.as_deref())? {
        let listed = match store.list(&folder).await {
            Err(e) if e.kind() == Kind::Unreachable => {
                away = Some(e);
                continue;
            }
            r => r?,
        };
        let is_it = |name: &&String| paths::parse_leaf(name).is_some_and(|(_, object)| object == id);
        let Some(path) = listed.iter().map(|(name, _)| name).find(is_it) else { continue };
        // Names are listed as the store has them, or within the folder.
        let path = format!("{folder}/{}", path.rsplit('/').next().unwrap_or(path));
        let bytes = store.get(&path).await?;
        let during = |e: Error| e.during(format_args!("archive {path}"));
        let expect = Expect {
            tenant: Some(tenant),
            source: Some(source),
            object: Some(id),
            ..Expect::kind(ObjectKind::Manifest)
        };
        let text = Opener::new(&bytes[..], &*opened.keyring, &expect).and_then(Opener::read_all).map_err(during)?;
        return parse(&text).map(Some).map_err(during);
    }
    match away {
        Some(e) => Err(e),
        None => Ok(None),
    }
}

fn parse(text: &[u8]) -> Result<Document> {
    let bad = |why: String| Error::new(Kind::Verification, why).code("malformed");
    let d: Document = serde_json::from_slice(text).map_err(|e| bad(format!("it is no archive's document: {e}")))?;
    if d.v != ARCHIVE_VERSION || d.what != WHAT {
        return Err(bad(format!("it is a {} of version {}; this coffer reads version {ARCHIVE_VERSION}", d.what, d.v)));
    }
    Ok(d)
}
