//! What a store says about the repository that it is part of: a sealed object, written once at `init`.

use super::paths;
use super::store::{Created, Store};
use crate::crypto::{Codec, DataKey, Expect, Header, KeySource, ObjectKind, Opener, Sealer, random};
use crate::error::{Context, Error, Kind, Result};
use bytes::Bytes;
use coffer_wire::Lsn;
use serde::{Deserialize, Serialize};
use std::io::Write;
use uuid::Uuid;

const VERSION: u32 = 1;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    pub v: u32,
    pub repository: Uuid,
    /// The name of the store that this copy is in.
    pub store: String,
    /// The name of the store where numbers are won; fixed for good.
    pub sequencer: String,
    /// The agent's clock, microseconds since 1970-01-01 UTC.
    pub created_us: i64,
}

impl Descriptor {
    pub fn new(repository: Uuid, store: &str, sequencer: &str, created_us: i64) -> Self {
        Self { v: VERSION, repository, store: store.into(), sequencer: sequencer.into(), created_us }
    }

    fn seal(&self, key: &DataKey) -> Result<Bytes> {
        let header = Header {
            kind: ObjectKind::Descriptor,
            codec: Codec::None,
            tenant: self.repository,
            object: random::uuid(),
            source: Uuid::nil(),
            system_identifier: 0,
            timeline: 0,
            lsn_start: Lsn::ZERO,
            lsn_end: Lsn::ZERO,
            key_version: key.id.version,
        };
        let mut sealer = Sealer::new(Vec::new(), &header, key)?;
        let text = serde_json::to_vec(self).context(Kind::Other, "cannot encode the repository's descriptor")?;
        sealer.write_all(&text).context(Kind::Other, "cannot seal the repository's descriptor")?;
        Ok(sealer.finish()?.0.into())
    }

    /// Writes it unless the store has one.
    pub async fn write(&self, store: &Store, key: &DataKey) -> Result<()> {
        match store.create(paths::DESCRIPTOR, self.seal(key)?).await? {
            Created::Won => Ok(()),
            Created::Lost(_) => Err(exists(store)),
        }
    }

    /// Reads the store's; `None` when it has none. One that belongs to another repository does not open: error.
    pub async fn read(store: &Store, repository: Uuid, keys: &dyn KeySource) -> Result<Option<Self>> {
        let Some(bytes) = store.get_opt(paths::DESCRIPTOR).await? else { return Ok(None) };
        let during = |e: Error| {
            e.during(format_args!("store {} ({}): object {}", store.name(), store.shown(), paths::DESCRIPTOR))
        };
        let expect = Expect { tenant: Some(repository), ..Expect::kind(ObjectKind::Descriptor) };
        let text = Opener::new(&bytes[..], keys, &expect).and_then(Opener::read_all).map_err(|e| {
            let e = during(e);
            match e.kind() {
                Kind::Verification => {
                    e.hint("this store belongs to another repository than the keyring, or was altered")
                }
                _ => e,
            }
        })?;
        let d: Self = serde_json::from_slice(&text).context(Kind::Verification, "descriptor").map_err(during)?;
        if d.v != VERSION {
            return Err(during(Error::new(
                Kind::Verification,
                format!("the repository has version {}; this coffer reads version {VERSION}", d.v),
            )));
        }
        Ok(Some(d))
    }
}

/// The refusal to touch a repository that exists.
pub fn exists(store: &Store) -> Error {
    Error::new(
        Kind::Refused,
        format!("store {} ({}) holds a repository already; nothing was changed", store.name(), store.shown()),
    )
    .code("repository_exists")
    .hint("an existing repository is never replaced: name an empty store, or use `coffer run`")
}
