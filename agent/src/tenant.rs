//! A tenant as the agent names it.

use coffer_wire::TenantKind;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A tenant of one source: its kind and, for [`TenantKind::Normal`], its key (the tenant column's text).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant {
    pub kind: TenantKind,
    pub key: String,
}

impl Tenant {
    pub fn normal(key: impl Into<String>) -> Self {
        Self { kind: TenantKind::Normal, key: key.into() }
    }

    /// A reserved tenant.
    pub fn reserved(kind: TenantKind) -> Self {
        debug_assert_ne!(kind, TenantKind::Normal);
        Self { kind, key: String::new() }
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            TenantKind::Normal => f.write_str(&self.key),
            k => write!(f, "({})", k.name()),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    kind: u8,
    key: String,
}

impl Serialize for Tenant {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        Stored { kind: self.kind as u8, key: self.key.clone() }.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Tenant {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = Stored::deserialize(d)?;
        let kind = TenantKind::from_u8(s.kind).ok_or_else(|| serde::de::Error::custom("unknown tenant kind"))?;
        Ok(Self { kind, key: s.key })
    }
}
