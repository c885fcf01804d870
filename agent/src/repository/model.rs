//! What the records of the commit log say (FORMAT.md, "Commit log").
//!
//! A record is JSON inside a sealed container. Fields are only added; a body that a reader does not know is an error,
//! because skipping it could mean restoring what a later version took back.

use crate::crypto::{KeyId, ObjectKind};
use coffer_wire::Lsn;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Version of the records' content.
pub const RECORD_VERSION: u32 = 1;

/// Serde for an [`Lsn`] as PostgreSQL writes it: `16/B374D848`.
pub mod lsn_text {
    use coffer_wire::Lsn;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(l: &Lsn, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(l)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Lsn, D::Error> {
        std::borrow::Cow::<'de, str>::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Names an object, and says everything needed to know that what lies there is it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRef {
    pub path: String,
    pub kind: ObjectKind,
    /// The tenant's uid, or the repository's.
    pub tenant: Uuid,
    pub object: Uuid,
    pub key_version: u32,
    /// Length of the sealed object.
    pub bytes: u64,
    /// Of the sealed object, hexadecimal.
    pub sha256: String,
    #[serde(with = "lsn_text")]
    pub lsn_start: Lsn,
    #[serde(with = "lsn_text")]
    pub lsn_end: Lsn,
    /// Rows inside, where that means something.
    pub rows: u64,
}

impl ObjectRef {
    /// The key that it is sealed under.
    pub fn key(&self) -> KeyId {
        KeyId { uid: self.tenant, version: self.key_version }
    }
}

/// One record of a source's commit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRecord {
    pub v: u32,
    /// From 0, without gaps.
    pub n: u64,
    /// SHA-256 (hexadecimal) of the object that holds record n-1; `None` for record 0.
    pub prev: Option<String>,
    pub source: Uuid,
    /// The agent process that wrote it: random at its start.
    pub writer: Uuid,
    /// The agent's clock, microseconds since 1970-01-01 UTC.
    pub at_us: i64,
    pub system_identifier: u64,
    pub timeline: u32,
    pub slot: String,
    /// Everything that committed after this …
    #[serde(with = "lsn_text")]
    pub from_lsn: Lsn,
    /// … up to and including this is durable with this record.
    #[serde(with = "lsn_text")]
    pub upto_lsn: Lsn,
    /// The source's clock at `upto_lsn`, microseconds since 1970-01-01 UTC.
    pub upto_time_us: i64,
    pub body: Body,
}

/// What a record records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Body {
    /// The log begins: a slot was made, everything after `upto_lsn` will be in the log.
    Init,
    /// Changes were shipped.
    Ship(Ship),
    /// Nothing changed up to `upto_lsn`.
    Idle,
    /// A base is complete.
    Base(Base),
    /// What lies between the record before and this one is lost; new bases follow.
    Gap { reason: String },
    /// The source was promoted.
    Timeline {
        from: u32,
        to: u32,
        #[serde(with = "lsn_text")]
        at: Lsn,
    },
}

/// See [`Body::Ship`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ship {
    /// Transactions that touched something covered.
    pub txns: u64,
    pub min_xid: u64,
    pub max_xid: u64,
    /// Commit times by the source's clock: of the first and the last transaction in commit order, and the highest of
    /// all (they need not rise with the order).
    pub first_commit_us: i64,
    pub last_commit_us: i64,
    pub max_commit_us: i64,
    /// The lowest commit time; `None` in records of versions that did not note it.
    #[serde(default)]
    pub min_commit_us: Option<i64>,
    /// Whether `common` holds more than the transaction index: readers of a long history skip those that do not. `None`:
    /// not noted.
    #[serde(default)]
    pub eventful: Option<bool>,
    /// Transaction index, truncates, markers.
    pub common: Option<ObjectRef>,
    /// Changesets, at most one per tenant.
    pub objects: Vec<ObjectRef>,
    /// Where sequences stood, by readings since the record before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sequences: Vec<SequencesAt>,
    /// It stands for several in a checkpoint: the objects that it names, and others, were removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub joined: bool,
}

/// One reading of the sequences: those that changed since the reading before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequencesAt {
    /// Read behind the values: what they count happened at or before it. It may lie beyond the record's `upto_lsn`.
    #[serde(with = "lsn_text")]
    pub lsn: Lsn,
    pub states: Vec<SequenceState>,
}

/// See [`Body::Base`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    pub job: Uuid,
    pub tables: Vec<BaseTable>,
    /// The highest of the tables' cuts.
    #[serde(with = "lsn_text")]
    pub cut_lsn: Lsn,
    /// One per tenant that had rows; a tenant without one had none in these tables.
    pub fulls: Vec<ObjectRef>,
    pub schema: Option<ObjectRef>,
    #[serde(default)]
    pub sequences: Vec<SequenceState>,
    /// Tables that are covered and that this base was to hold and does not: until a base of theirs, no point is whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<PendingTable>,
    /// Roles of tenants, one object per tenant, where they were read for this record.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<ObjectRef>,
    /// Large objects that rows of tenants refer to; of a tenant there may be several, which are then read in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub large_objects: Vec<ObjectRef>,
    /// When and for which columns they were read; `None`: not with this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub large_objects_read: Option<Box<LargeObjectsRead>>,
    /// The classes of the tables, by OID as text (a JSON key).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub classes: BTreeMap<String, String>,
    /// By tenant, the rows of its full in each table that has some. Empty: not noted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub holds: BTreeMap<Uuid, BTreeMap<String, u64>>,
    /// What a new database for the tenant has to be created with.
    #[serde(default)]
    pub database: Option<DatabaseLocale>,
}

/// What the source's database was created with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseLocale {
    /// As PostgreSQL names it: `UTF8`, `LATIN1`.
    pub encoding: String,
    pub collate: String,
    pub ctype: String,
    /// Its own settings, each as it stands behind `ALTER DATABASE … SET`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub settings: Vec<String>,
}

/// A covered table without a base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingTable {
    pub relid: u32,
    /// Qualified and quoted as SQL needs it.
    pub name: String,
    /// As of [`BaseTable`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Uuid>,
}

/// One table of a base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseTable {
    pub relid: u32,
    /// Qualified and quoted as SQL needs it.
    pub name: String,
    /// The fulls hold this table as it was at this commit boundary.
    #[serde(with = "lsn_text")]
    pub cut_lsn: Lsn,
    /// The transaction that registered the table.
    pub registered_xid: u64,
    #[serde(default)]
    pub rows: u64,
    /// The tenant whose every row of it is (a tenant's schema); nobody else is concerned by what happens to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Uuid>,
}

/// A reading of large objects: a tenant without an object in its record had none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LargeObjectsRead {
    /// They are as a snapshot at this position found them.
    #[serde(with = "lsn_text")]
    pub lsn: Lsn,
    /// The source's clock there, microseconds since 1970-01-01 UTC.
    pub time_us: i64,
    /// Rows of these refer to them.
    pub columns: Vec<LargeObjectColumn>,
}

/// A column that names large objects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LargeObjectColumn {
    pub relid: u32,
    pub attnum: i16,
    /// Qualified and quoted as SQL needs it.
    pub relation: String,
    /// As it is, unquoted.
    pub column: String,
}

/// A sequence as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceState {
    /// Qualified and quoted as SQL needs it.
    pub name: String,
    pub last_value: i64,
    pub is_called: bool,
}

impl LogRecord {
    /// Whether it stands for ships in a checkpoint: whatever they named is gone, known by a floor or not.
    pub fn is_joined(&self) -> bool {
        matches!(&self.body, Body::Ship(s) if s.joined)
    }

    /// Every object that the record names.
    pub fn objects(&self) -> impl Iterator<Item = &ObjectRef> {
        let (one, lists): (Option<&ObjectRef>, [&[ObjectRef]; 3]) = match &self.body {
            Body::Ship(s) => (s.common.as_ref(), [&s.objects, &[], &[]]),
            Body::Base(b) => (b.schema.as_ref(), [&b.fulls, &b.roles, &b.large_objects]),
            Body::Init | Body::Idle | Body::Gap { .. } | Body::Timeline { .. } => (None, [&[], &[], &[]]),
        };
        one.into_iter().chain(lists.into_iter().flatten())
    }
}

/// Frame kind of a [`TxnIndex`] among the frames of a common object.
pub const TXN_INDEX_FRAME: u8 = 0x40;

/// The transactions of a ship in commit order, for time targets and for telling what a snapshot saw.
///
/// As a frame (`kind 0x40 | length u32 | body`); the body is a count and, per transaction, three varints: the
/// difference of `end_lsn` to the one before, the difference of the commit time (zigzag), the difference of the xid
/// (zigzag).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TxnIndex {
    pub entries: Vec<TxnEntry>,
}

/// One transaction of a [`TxnIndex`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxnEntry {
    pub end_lsn: Lsn,
    /// The source's clock, microseconds since 1970-01-01 UTC.
    pub commit_us: i64,
    pub xid: u64,
}

impl TxnIndex {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        coffer_wire::put_frame(out, TXN_INDEX_FRAME, |b| {
            put_varint(b, self.entries.len() as u64);
            let mut before = TxnEntry { end_lsn: Lsn::ZERO, commit_us: 0, xid: 0 };
            for e in &self.entries {
                put_varint(b, e.end_lsn.0.wrapping_sub(before.end_lsn.0));
                put_varint(b, zigzag(e.commit_us.wrapping_sub(before.commit_us)));
                put_varint(b, zigzag(e.xid.wrapping_sub(before.xid) as i64));
                before = *e;
            }
        });
    }

    /// Reads the frame at the start of `bytes` and returns it with the number of bytes that it takes; `None` when the
    /// first frame is another.
    pub fn decode(bytes: &[u8]) -> crate::error::Result<Option<(Self, usize)>> {
        if bytes.first() != Some(&TXN_INDEX_FRAME) {
            return Ok(None);
        }
        let bad = || {
            crate::error::Error::new(crate::error::Kind::Verification, "the transaction index is malformed")
                .code("malformed")
        };
        let len = bytes.get(1..5).ok_or_else(bad)?;
        let len = u32::from_le_bytes(len.try_into().expect("four bytes")) as usize;
        let mut body = bytes.get(5..).and_then(|b| b.get(..len)).ok_or_else(bad)?;
        let n = take_varint(&mut body).ok_or_else(bad)?;
        let mut entries = Vec::new();
        let mut before = TxnEntry { end_lsn: Lsn::ZERO, commit_us: 0, xid: 0 };
        for _ in 0..n {
            let lsn = take_varint(&mut body).ok_or_else(bad)?;
            let time = take_varint(&mut body).ok_or_else(bad)?;
            let xid = take_varint(&mut body).ok_or_else(bad)?;
            before = TxnEntry {
                end_lsn: Lsn(before.end_lsn.0.wrapping_add(lsn)),
                commit_us: before.commit_us.wrapping_add(unzigzag(time)),
                xid: before.xid.wrapping_add(unzigzag(xid) as u64),
            };
            entries.push(before);
        }
        if !body.is_empty() {
            return Err(bad());
        }
        Ok(Some((Self { entries }, 5 + len)))
    }
}

fn zigzag(n: i64) -> u64 {
    ((n << 1) ^ (n >> 63)) as u64
}

fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

/// LEB128.
fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn take_varint(b: &mut &[u8]) -> Option<u64> {
    let mut n = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = b.split_first()?;
        *b = rest;
        let bits = u64::from(first & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        n |= bits << shift;
        if first & 0x80 == 0 {
            return Some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_reads_back_and_an_unknown_body_is_refused() {
        let r = LogRecord {
            v: RECORD_VERSION,
            n: 3,
            prev: Some("ab".into()),
            source: Uuid::from_u128(1),
            writer: Uuid::from_u128(2),
            at_us: 5,
            system_identifier: u64::MAX,
            timeline: 1,
            slot: "coffer_shop".into(),
            from_lsn: Lsn(1),
            upto_lsn: Lsn(0x16_B374_D848),
            upto_time_us: 7,
            body: Body::Ship(Ship { txns: 2, ..Ship::default() }),
        };
        let text = serde_json::to_string(&r).unwrap();
        assert!(text.contains(r#""upto_lsn":"16/B374D848""#) && text.contains(r#""type":"ship""#), "{text}");
        assert_eq!(serde_json::from_str::<LogRecord>(&text).unwrap(), r);
        assert_eq!(serde_json::from_slice::<LogRecord>(text.as_bytes()).unwrap(), r);
        assert!(serde_json::from_str::<LogRecord>(&text.replace("\"ship\"", "\"removal\"")).is_err());
        let uid = Uuid::from_u128(4);
        let base = Base {
            classes: [("16401".to_owned(), "data".to_owned())].into(),
            holds: [(uid, [("16401".to_owned(), 3)].into())].into(),
            ..Base::default()
        };
        for body in [Body::Base(base), Body::Init, Body::Idle, Body::Gap { reason: "x".into() }] {
            let text = serde_json::to_string(&LogRecord { body: body.clone(), ..r.clone() }).unwrap();
            assert_eq!(serde_json::from_str::<LogRecord>(&text).unwrap().body, body);
        }
    }

    proptest! {
        #[test]
        fn a_transaction_index_reads_back(e in proptest::collection::vec((any::<u64>(), any::<i64>(), any::<u64>()), 0..50)) {
            let entries = e.into_iter().map(|(l, t, x)| TxnEntry { end_lsn: Lsn(l), commit_us: t, xid: x }).collect();
            let index = TxnIndex { entries };
            let mut b = Vec::new();
            index.encode(&mut b);
            let len = b.len();
            b.extend_from_slice(b"next");
            prop_assert_eq!(TxnIndex::decode(&b).unwrap(), Some((index, len)));
            for cut in 1..len { prop_assert!(TxnIndex::decode(&b[..cut]).is_err()); }
        }

        #[test]
        fn no_bytes_panic(b in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut f = vec![TXN_INDEX_FRAME];
            f.extend_from_slice(&(b.len() as u32).to_le_bytes());
            f.extend_from_slice(&b);
            let _ = TxnIndex::decode(&f);
        }
    }
}
