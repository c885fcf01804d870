//! The messages that the extension writes into the log for its own plugin: tags and markers.
//!
//! `pg_logical_emit_message` is open to every role, so each message ends with a MAC (SipHash-2-4 under the key in
//! `coffer.secret`); the plugin ignores a message whose MAC is wrong. A tag binds relation, operation, key, old and new
//! tenant; the next change of that relation consumes it, and a mismatch discards it.

use crate::{Cursor, TenantKind, WireError, put_bytes};
use siphasher::sip128::{Hasher128, SipHasher24};
use std::hash::Hasher;

/// The prefix of every logical message of the extension.
pub const PREFIX: &str = "pg_coffer";

const TAG: u8 = 1;
const MARKER: u8 = 2;
const FILL: u8 = 3;
const MAC_LEN: usize = 16;

/// The operation that a tag announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TagOp {
    Insert = 1,
    Update = 2,
    Delete = 3,
}

/// A tenant in a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TagTenant<'a> {
    pub kind: TenantKind,
    pub key: &'a [u8],
}

/// Who the next change of `relid` belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag<'a> {
    /// The leaf that the row is in.
    pub relid: u32,
    pub op: TagOp,
    /// The replica identity columns of the old row as a COPY line; empty when the relation has none.
    pub key: &'a [u8],
    pub old: Option<TagTenant<'a>>,
    pub new: Option<TagTenant<'a>>,
}

/// A value that a row took along when it moved to another tenant, and that its UPDATE left out of the log since it was
/// TOASTed and did not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill<'a> {
    /// The leaf that the row is in.
    pub relid: u32,
    /// The key of the new row, as a COPY line.
    pub key: &'a [u8],
    /// Where the row is now.
    pub tenant: TagTenant<'a>,
    /// The column, in the partition root.
    pub attnum: i16,
    /// The value, as a field of a COPY line.
    pub field: &'a [u8],
}

/// A message of ours, MAC checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    Tag(Tag<'a>),
    Fill(Fill<'a>),
    Marker { kind: &'a str, payload: &'a [u8] },
}

/// The MAC key: 16 random bytes made when the extension is created.
pub type MacKey = [u8; 16];

fn mac(key: &MacKey, body: &[u8]) -> [u8; MAC_LEN] {
    let mut h = SipHasher24::new_with_key(key);
    h.write(body);
    h.finish128().as_bytes()
}

fn put_tenant(out: &mut Vec<u8>, t: Option<TagTenant<'_>>) {
    match t {
        None => out.push(0xff),
        Some(t) => {
            out.push(t.kind as u8);
            put_bytes(out, t.key);
        }
    }
}

pub fn encode_tag(key: &MacKey, t: &Tag<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    put_tag(&mut out, key, t);
    out
}

/// Writes the message into `out`, whose memory serves for the next one again.
pub fn put_tag(out: &mut Vec<u8>, key: &MacKey, t: &Tag<'_>) {
    out.clear();
    out.push(TAG);
    out.extend_from_slice(&t.relid.to_le_bytes());
    out.push(t.op as u8);
    put_bytes(out, t.key);
    put_tenant(out, t.old);
    put_tenant(out, t.new);
    let m = mac(key, out);
    out.extend_from_slice(&m);
}

pub fn encode_marker(key: &MacKey, kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![MARKER];
    put_bytes(&mut out, kind.as_bytes());
    put_bytes(&mut out, payload);
    let m = mac(key, &out);
    out.extend_from_slice(&m);
    out
}

pub fn encode_fill(key: &MacKey, f: &Fill<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(f.field.len() + f.key.len() + f.tenant.key.len() + 64);
    out.push(FILL);
    out.extend_from_slice(&f.relid.to_le_bytes());
    put_bytes(&mut out, f.key);
    put_tenant(&mut out, Some(f.tenant));
    out.extend_from_slice(&f.attnum.to_le_bytes());
    put_bytes(&mut out, f.field);
    let m = mac(key, &out);
    out.extend_from_slice(&m);
    out
}

/// Reads a message; `Err` for a wrong MAC or bytes that are not ours.
pub fn decode<'a>(key: &MacKey, message: &'a [u8]) -> Result<Message<'a>, WireError> {
    let Some(cut) = message.len().checked_sub(MAC_LEN) else {
        return Err(WireError { at: 0, what: "a MAC" });
    };
    let (body, theirs) = message.split_at(cut);
    let ours = mac(key, body);
    // Constant time: the difference is folded before it is looked at.
    if ours.iter().zip(theirs).fold(0, |d, (a, b)| d | (a ^ b)) != 0 {
        return Err(WireError { at: cut, what: "the right MAC" });
    }
    let mut c = Cursor::new(body);
    let m = match c.u8("message kind")? {
        TAG => {
            let relid = c.u32("relation")?;
            let op = match c.u8("operation")? {
                1 => TagOp::Insert,
                2 => TagOp::Update,
                3 => TagOp::Delete,
                _ => return Err(c.err("known operation")),
            };
            let key = c.bytes("key")?;
            let old = tenant(&mut c)?;
            let new = tenant(&mut c)?;
            Message::Tag(Tag { relid, op, key, old, new })
        }
        FILL => Message::Fill(Fill {
            relid: c.u32("relation")?,
            key: c.bytes("key")?,
            tenant: tenant(&mut c)?.ok_or(c.err("a tenant"))?,
            attnum: c.u16("column")? as i16,
            field: c.bytes("value")?,
        }),
        MARKER => Message::Marker { kind: c.str("marker kind")?, payload: c.bytes("marker payload")? },
        _ => return Err(c.err("known message kind")),
    };
    if !c.is_empty() {
        return Err(c.err("end of the message"));
    }
    Ok(m)
}

fn tenant<'a>(c: &mut Cursor<'a>) -> Result<Option<TagTenant<'a>>, WireError> {
    match c.u8("tenant kind")? {
        0xff => Ok(None),
        n => {
            let kind = TenantKind::from_u8(n).ok_or(c.err("known tenant kind"))?;
            Ok(Some(TagTenant { kind, key: c.bytes("tenant key")? }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_and_every_flipped_bit_is_refused() {
        let key = [7; 16];
        let t = Tag {
            relid: 16384,
            op: TagOp::Update,
            key: b"1\t2",
            old: Some(TagTenant { kind: TenantKind::Normal, key: b"a" }),
            new: Some(TagTenant { kind: TenantKind::Unassigned, key: b"" }),
        };
        let m = encode_tag(&key, &t);
        assert_eq!(decode(&key, &m), Ok(Message::Tag(t)));
        for bit in 0..m.len() * 8 {
            let mut bad = m.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&key, &bad).is_err(), "bit {bit}");
        }
        assert!(decode(&[8; 16], &m).is_err());
        let f = Fill { relid: 1, key: b"k", tenant: t.old.unwrap(), attnum: 3, field: b"a\\tb" };
        assert_eq!(decode(&key, &encode_fill(&key, &f)), Ok(Message::Fill(f)));
        let m = encode_marker(&key, "base", &[1, 2]);
        assert_eq!(decode(&key, &m), Ok(Message::Marker { kind: "base", payload: &[1, 2] }));
    }
}
