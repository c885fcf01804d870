//! Which parts of which objects a full consists of (FORMAT.md, "Manifest"): sealed under the tenant's key, because the
//! keys that parts begin with are the tenant's data.

use crate::crypto::{Codec, DataKey, Header, ObjectKind, random};
use crate::error::{Context, Error, Kind, Result};
use crate::repository::{ObjectRef, Repository, paths};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use coffer_wire::{Lsn, Relation};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use tokio::runtime::Handle;
use uuid::Uuid;

const MANIFEST_VERSION: u32 = 1;

/// A part of a full: a section of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartAt {
    pub object: ObjectRef,
    pub section: String,
    pub relid: u32,
    /// The least key that it may hold; `None`: any.
    pub first: Option<Vec<u8>>,
    pub rows: u64,
    /// Of the rows, before compression.
    pub bytes: u64,
    /// The descriptors that its rows are under, encoded.
    pub relations: Vec<Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    v: u32,
    objects: Vec<Uuid>,
    relations: BTreeMap<String, String>,
    parts: Vec<Part>,
}

#[derive(Serialize, Deserialize)]
struct Part {
    relid: u32,
    object: usize,
    section: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first: Option<String>,
    rows: u64,
    bytes: u64,
    relations: Vec<String>,
}

/// Writes the manifest of a full at `point`, into the folder of the tenant `folder`. Blocking.
pub fn write(
    repo: &Arc<Repository>,
    rt: &Handle,
    key: &DataKey,
    (like, folder): (&Header, Uuid),
    point: Lsn,
    parts: &[PartAt],
) -> Result<ObjectRef> {
    let mut m = Manifest { v: MANIFEST_VERSION, objects: Vec::new(), relations: BTreeMap::new(), parts: Vec::new() };
    for p in parts {
        let object = match m.objects.iter().position(|o| *o == p.object.object) {
            Some(i) => i,
            None => {
                m.objects.push(p.object.object);
                m.objects.len() - 1
            }
        };
        let mut ids = Vec::new();
        for encoded in &p.relations {
            let id = format!("{:016x}", Relation::id_of(encoded));
            m.relations.entry(id.clone()).or_insert_with(|| BASE64.encode(encoded));
            ids.push(id);
        }
        m.parts.push(Part {
            relid: p.relid,
            object,
            section: p.section.clone(),
            first: p.first.as_ref().map(|f| BASE64.encode(f)),
            rows: p.rows,
            bytes: p.bytes,
            relations: ids,
        });
    }
    let header = Header { kind: ObjectKind::Manifest, codec: Codec::Zstd, object: random::uuid(), ..like.clone() };
    let path = paths::manifest(header.source, folder, point, header.object);
    let text = serde_json::to_vec(&m).context(Kind::Other, "cannot encode a manifest")?;
    repo.seal_to(rt.clone(), path, &header, key, |s| {
        s.write_all(&text).context(Kind::Other, "cannot seal a manifest")?;
        Ok(parts.iter().map(|p| p.rows).sum())
    })
}

/// Reads a manifest; `objects` are those that its catalog's entry names.
pub async fn read(
    repo: &Repository,
    manifest: &ObjectRef,
    objects: &[ObjectRef],
    from: Option<&str>,
) -> Result<Vec<PartAt>> {
    let plain = repo.open_small(manifest, from).await?;
    let bad =
        |what: String| Error::new(Kind::Verification, format!("object {}: {what}", manifest.path)).code("malformed");
    let m: Manifest = serde_json::from_slice(&plain).map_err(|e| bad(format!("it is no manifest: {e}")))?;
    if m.v != MANIFEST_VERSION {
        return Err(bad(format!("it has version {}; this coffer reads version {MANIFEST_VERSION}", m.v)));
    }
    let decoded = |s: &str| BASE64.decode(s).map_err(|e| bad(format!("what is to be base64 is not: {e}")));
    let mut relations = BTreeMap::new();
    for (id, encoded) in &m.relations {
        relations.insert(id.as_str(), decoded(encoded)?);
    }
    let parts: Vec<PartAt> = m
        .parts
        .iter()
        .map(|p| {
            let uid = m.objects.get(p.object).ok_or_else(|| bad("a part is in no object".into()))?;
            let object = objects
                .iter()
                .find(|o| o.object == *uid)
                .ok_or_else(|| bad(format!("it names object {uid}, which its catalog does not")))?;
            let of = |id: &String| {
                relations.get(id.as_str()).cloned().ok_or_else(|| bad(format!("descriptor {id} is missing")))
            };
            Ok(PartAt {
                object: object.clone(),
                section: p.section.clone(),
                relid: p.relid,
                first: p.first.as_deref().map(decoded).transpose()?,
                rows: p.rows,
                bytes: p.bytes,
                relations: p.relations.iter().map(of).collect::<Result<_>>()?,
            })
        })
        .collect::<Result<_>>()?;
    if !parts.is_sorted_by_key(|p| (p.relid, &p.first)) {
        return Err(bad("its parts are not in order".into()));
    }
    let rows: u64 = parts.iter().map(|p| p.rows).sum();
    if rows != manifest.rows {
        return Err(bad(format!("its parts have {rows} rows, it was written with {}", manifest.rows)));
    }
    Ok(parts)
}
