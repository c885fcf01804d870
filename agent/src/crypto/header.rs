//! The clear header of a container, and what a reader expects of it.
//!
//! All of it is bound to the content: the part before the salt goes into the key derivation, the whole into every chunk's
//! associated data. It is clear so that an object can be told, counted and found without a key; it names uids only.

use super::derive::CONTEXT_BYTES;
use crate::error::{Error, Kind, Result};
use coffer_cipher::Codec;
use coffer_wire::Lsn;
use uuid::Uuid;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 160;
/// Most plaintext bytes of a chunk that this version writes.
pub const CHUNK_BYTES: usize = 1 << CHUNK_LOG2;
pub(super) const CHUNK_LOG2: u8 = 18;

pub(super) const MAGIC: [u8; 8] = *b"\x89COFFER\n";
const VERSION: u16 = 1;
/// HKDF-SHA256 and AES-256-GCM-SIV.
const SUITE: u8 = 1;

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum ObjectKind {
    /// One tenant's changes of one ship.
    Changeset = 1,
    /// What of one ship concerns every tenant.
    Common = 2,
    /// A record of the commit log.
    Log = 3,
    /// Every row of one tenant.
    Full = 4,
    /// The schema's definitions as `pg_dump` gives them.
    Schema = 5,
    Manifest = 6,
    Catalog = 7,
    /// Never in a store: what outgrew memory.
    Spool = 8,
    /// What a store says about the repository that it is part of.
    Descriptor = 9,
    /// The roles of one tenant, as SQL.
    Roles = 10,
    /// The large objects that one tenant's rows refer to.
    #[serde(rename = "large_objects")]
    LargeObjects = 11,
    /// Says that somebody reads or writes; it ends by itself.
    Lease = 12,
    /// What the changes of one tenant in a span come to.
    Incremental = 13,
    /// What the older records of a commit log come to.
    Checkpoint = 14,
}

impl ObjectKind {
    pub fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            1 => Self::Changeset,
            2 => Self::Common,
            3 => Self::Log,
            4 => Self::Full,
            5 => Self::Schema,
            6 => Self::Manifest,
            7 => Self::Catalog,
            8 => Self::Spool,
            9 => Self::Descriptor,
            10 => Self::Roles,
            11 => Self::LargeObjects,
            12 => Self::Lease,
            13 => Self::Incremental,
            14 => Self::Checkpoint,
            _ => return None,
        })
    }
}

/// The header's fields that the writer chooses. Salt and commitment are the container's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: ObjectKind,
    pub codec: Codec,
    /// The tenant's uid; the repository's uid for what belongs to no tenant. The data key has the same uid.
    pub tenant: Uuid,
    /// Random; the object's name carries it too.
    pub object: Uuid,
    pub source: Uuid,
    pub system_identifier: u64,
    pub timeline: u32,
    /// The object holds what committed after this …
    pub lsn_start: Lsn,
    /// … up to and including this.
    pub lsn_end: Lsn,
    pub key_version: u32,
}

/// A header as it stands in the file.
pub(super) struct RawHeader {
    pub bytes: [u8; HEADER_BYTES],
    pub chunk_log2: u8,
}

impl RawHeader {
    pub fn context(&self) -> &[u8; CONTEXT_BYTES] {
        self.bytes[..CONTEXT_BYTES].try_into().expect("a header is longer than its context")
    }

    pub fn salt(&self) -> &[u8; 32] {
        self.bytes[96..128].try_into().expect("32 bytes")
    }

    pub fn commitment(&self) -> &[u8; 32] {
        self.bytes[128..160].try_into().expect("32 bytes")
    }

    pub fn set_commitment(&mut self, c: &[u8; 32]) {
        self.bytes[128..160].copy_from_slice(c);
    }
}

impl Header {
    pub(super) fn encode(&self, salt: &[u8; 32]) -> RawHeader {
        let mut b = [0u8; HEADER_BYTES];
        b[..8].copy_from_slice(&MAGIC);
        b[8..10].copy_from_slice(&VERSION.to_le_bytes());
        b[10] = SUITE;
        b[11] = self.codec as u8;
        b[12] = CHUNK_LOG2;
        b[13] = self.kind as u8;
        // 14 and 15 are reserved: zero.
        b[16..32].copy_from_slice(self.tenant.as_bytes());
        b[32..48].copy_from_slice(self.object.as_bytes());
        b[48..64].copy_from_slice(self.source.as_bytes());
        b[64..72].copy_from_slice(&self.system_identifier.to_le_bytes());
        b[72..76].copy_from_slice(&self.timeline.to_le_bytes());
        b[76..80].copy_from_slice(&self.key_version.to_le_bytes());
        b[80..88].copy_from_slice(&self.lsn_start.0.to_le_bytes());
        b[88..96].copy_from_slice(&self.lsn_end.0.to_le_bytes());
        b[96..128].copy_from_slice(salt);
        RawHeader { bytes: b, chunk_log2: CHUNK_LOG2 }
    }

    pub(super) fn decode(b: [u8; HEADER_BYTES]) -> Result<(Self, RawHeader)> {
        let corrupt = |what: &str| Error::new(Kind::Verification, what).code("corrupt");
        if b[..8] != MAGIC {
            return Err(corrupt("this is not a sealed object: its first bytes are not ours"));
        }
        let u16_at = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        let u32_at = |i: usize| u32::from_le_bytes(b[i..i + 4].try_into().expect("four bytes"));
        let u64_at = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().expect("eight bytes"));
        let uuid_at = |i: usize| Uuid::from_bytes(b[i..i + 16].try_into().expect("sixteen bytes"));
        let version = u16_at(8);
        if version != VERSION {
            return Err(corrupt(&format!("container version {version}: this coffer reads version {VERSION}")));
        }
        if b[10] != SUITE {
            return Err(corrupt(&format!("cipher suite {}: this coffer knows suite {SUITE}", b[10])));
        }
        let codec = Codec::from_u8(b[11]).ok_or_else(|| corrupt("unknown codec in the header"))?;
        let chunk_log2 = b[12];
        if !(12..=20).contains(&chunk_log2) {
            return Err(corrupt("chunk size in the header is out of range"));
        }
        let kind = ObjectKind::from_u8(b[13]).ok_or_else(|| corrupt("unknown object kind in the header"))?;
        if u16_at(14) != 0 {
            return Err(corrupt("reserved bytes of the header are not zero"));
        }
        let header = Self {
            kind,
            codec,
            tenant: uuid_at(16),
            object: uuid_at(32),
            source: uuid_at(48),
            system_identifier: u64_at(64),
            timeline: u32_at(72),
            key_version: u32_at(76),
            lsn_start: Lsn(u64_at(80)),
            lsn_end: Lsn(u64_at(88)),
        };
        Ok((header, RawHeader { bytes: b, chunk_log2 }))
    }
}

/// What the reader knows about the object that it asked for; whatever is set must match the header.
#[derive(Clone, Debug, Default)]
pub struct Expect {
    pub kind: Option<ObjectKind>,
    pub tenant: Option<Uuid>,
    pub object: Option<Uuid>,
    pub source: Option<Uuid>,
    pub lsn_start: Option<Lsn>,
    pub lsn_end: Option<Lsn>,
}

impl Expect {
    /// Any object that opens; for tools that are shown a file.
    pub fn anything() -> Self {
        Self::default()
    }

    pub fn kind(kind: ObjectKind) -> Self {
        Self { kind: Some(kind), ..Self::default() }
    }

    pub(super) fn check(&self, h: &Header) -> Result<()> {
        fn same<T: PartialEq + std::fmt::Debug>(what: &str, want: Option<T>, got: T) -> Result<()> {
            match want {
                Some(w) if w != got => Err(Error::new(
                    Kind::Verification,
                    format!("another object lies at this name: {what} is {got:?}, expected {w:?}"),
                )
                .code("replayed")),
                _ => Ok(()),
            }
        }
        same("its kind", self.kind, h.kind)?;
        same("its tenant", self.tenant, h.tenant)?;
        same("its id", self.object, h.object)?;
        same("its source", self.source, h.source)?;
        same("its first position", self.lsn_start, h.lsn_start)?;
        same("its last position", self.lsn_end, h.lsn_end)
    }
}
