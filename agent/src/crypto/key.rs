//! Data keys: who they belong to, and who gives them out.

use crate::error::Result;
use std::fmt;
use std::sync::Arc;
use uuid::Uuid;
use zeroize::Zeroizing;

/// A secret of 32 bytes, wiped when dropped.
pub type SecretBytes = Zeroizing<[u8; 32]>;

/// Names a data key: whose it is (a tenant's uid, or the repository's) and which version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId {
    pub uid: Uuid,
    /// From 1; rotation adds one.
    pub version: u32,
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} version {}", self.uid, self.version)
    }
}

/// A data key. Its secret is never printed and is wiped when the last holder drops it.
pub struct DataKey {
    pub id: KeyId,
    secret: SecretBytes,
}

impl DataKey {
    pub fn new(id: KeyId, secret: SecretBytes) -> Self {
        Self { id, secret }
    }

    /// A new random key.
    pub fn generate(id: KeyId) -> Self {
        let mut secret = SecretBytes::default();
        super::random::fill(&mut *secret);
        Self { id, secret }
    }

    pub fn secret(&self) -> &[u8; 32] {
        &self.secret
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Who gives out data keys. A key that it does not have is an error of [`crate::error::Kind::Key`].
pub trait KeySource: Send + Sync {
    fn key(&self, id: KeyId) -> Result<Arc<DataKey>>;
}

/// A single key is a source of itself.
impl KeySource for Arc<DataKey> {
    fn key(&self, id: KeyId) -> Result<Arc<DataKey>> {
        if self.id == id {
            return Ok(self.clone());
        }
        Err(crate::error::Error::new(
            crate::error::Kind::Key,
            format!("the object is sealed under key {id}, at hand is only {}", self.id),
        ))
    }
}
