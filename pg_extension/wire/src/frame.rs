//! Frames: `kind u8 | length u32 | body`.

use crate::{Cursor, Lsn, TenantKind, WireError, put_bytes};

/// The version of these frames; a reader refuses any other.
pub const WIRE_VERSION: u16 = 1;

/// The frame kinds.
pub mod kind {
    pub const HELLO: u8 = 0x01;
    pub const BEGIN: u8 = 0x02;
    pub const COMMIT: u8 = 0x03;
    pub const RELATION: u8 = 0x04;
    pub const RUN: u8 = 0x05;
    pub const TRUNCATE: u8 = 0x06;
    pub const MARKER: u8 = 0x07;
    /// The header of a run whose rows follow in RUN_DATA frames: one row too large for one write.
    pub const RUN_OPEN: u8 = 0x08;
    pub const RUN_DATA: u8 = 0x09;
}

/// First frame of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    pub wire_version: u16,
    /// `server_version_num`.
    pub server_version: u32,
    pub extension_version: &'a str,
}

/// A committed transaction begins. Sent before the first frame that belongs to it, and not at all without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// 64-bit transaction id of the top-level transaction.
    pub xid: u64,
    pub commit_lsn: Lsn,
    /// First byte after the commit record: what orders transactions and what is acknowledged.
    pub end_lsn: Lsn,
    /// Microseconds since 1970-01-01 UTC, by the source's clock.
    pub commit_time_us: i64,
}

/// The transaction is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    pub xid: u64,
    pub end_lsn: Lsn,
    /// Rows of all runs of the transaction, as a check.
    pub rows: u64,
}

/// Rows of one tenant, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunHeader<'a> {
    /// Frame counter within the transaction: orders runs, truncates and markers.
    pub seq: u64,
    pub tenant_kind: TenantKind,
    pub tenant_key: &'a str,
    /// Descriptor ids, eight bytes each, little-endian.
    pub relations: &'a [u8],
    pub rows: u32,
    /// Length of the rows' bytes.
    pub rows_len: u64,
}

impl RunHeader<'_> {
    pub fn relation_ids(&self) -> impl Iterator<Item = u64> + '_ {
        relation_ids(self.relations)
    }

    /// The id that a row's `rel` stands for.
    pub fn relation_id(&self, rel: u16) -> Option<u64> {
        let at = usize::from(rel) * 8;
        let b = self.relations.get(at..at + 8)?;
        Some(u64::from_le_bytes(b.try_into().expect("eight bytes were taken")))
    }
}

/// A run with its rows inline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    pub header: RunHeader<'a>,
    pub data: &'a [u8],
}

/// TRUNCATE, for all tenants or (schema strategy) for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncate<'a> {
    pub seq: u64,
    pub restart_sequences: bool,
    /// `None`: every tenant.
    pub tenant: Option<(TenantKind, &'a str)>,
    /// Descriptor ids, eight bytes each.
    pub relations: &'a [u8],
}

impl Truncate<'_> {
    pub fn relation_ids(&self) -> impl Iterator<Item = u64> + '_ {
        relation_ids(self.relations)
    }
}

/// Ids of descriptors as TRUNCATE and the marker `described` list them.
pub fn relation_ids(list: &[u8]) -> impl Iterator<Item = u64> + '_ {
    list.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("chunks of eight")))
}

/// A transactional message of the extension: `restore_point` (payload: its name), `base` (payload: 16 random bytes),
/// `ddl`, `drop`, `rewrite` (payload: JSON), `described` (behind `ddl`; payload: ids of the descriptors that the DDL left,
/// which stand before it), `heartbeat` (empty).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marker<'a> {
    pub seq: u64,
    pub kind: &'a str,
    pub payload: &'a [u8],
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    Hello(Hello<'a>),
    Begin(Begin),
    Commit(Commit),
    /// Id and encoded descriptor ([`crate::Relation::decode`]).
    Relation(u64, &'a [u8]),
    Run(Run<'a>),
    RunOpen(RunHeader<'a>),
    RunData(&'a [u8]),
    Truncate(Truncate<'a>),
    Marker(Marker<'a>),
}

/// Appends a frame with this body.
pub fn put_frame(out: &mut Vec<u8>, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
    out.push(kind);
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    body(out);
    let len = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&len.to_le_bytes());
}

pub fn put_hello(out: &mut Vec<u8>, h: &Hello<'_>) {
    put_frame(out, kind::HELLO, |b| {
        b.extend_from_slice(&h.wire_version.to_le_bytes());
        b.extend_from_slice(&h.server_version.to_le_bytes());
        put_bytes(b, h.extension_version.as_bytes());
    });
}

pub fn put_begin(out: &mut Vec<u8>, t: &Begin) {
    put_frame(out, kind::BEGIN, |b| {
        b.extend_from_slice(&t.xid.to_le_bytes());
        b.extend_from_slice(&t.commit_lsn.0.to_le_bytes());
        b.extend_from_slice(&t.end_lsn.0.to_le_bytes());
        b.extend_from_slice(&t.commit_time_us.to_le_bytes());
    });
}

pub fn put_commit(out: &mut Vec<u8>, t: &Commit) {
    put_frame(out, kind::COMMIT, |b| {
        b.extend_from_slice(&t.xid.to_le_bytes());
        b.extend_from_slice(&t.end_lsn.0.to_le_bytes());
        b.extend_from_slice(&t.rows.to_le_bytes());
    });
}

/// `encoded` is [`crate::Relation::encode`]'s output, `id` its [`crate::Relation::id_of`].
pub fn put_relation(out: &mut Vec<u8>, id: u64, encoded: &[u8]) {
    put_frame(out, kind::RELATION, |b| {
        b.extend_from_slice(&id.to_le_bytes());
        b.extend_from_slice(encoded);
    });
}

/// A run's header. With `data`, a RUN frame with the rows inline (`data.len() == rows_len`); without, a RUN_OPEN frame
/// after which RUN_DATA frames bring `rows_len` bytes.
pub fn put_run_header(out: &mut Vec<u8>, h: &RunHeader<'_>, data: Option<&[u8]>) {
    put_frame(out, if data.is_some() { kind::RUN } else { kind::RUN_OPEN }, |b| {
        b.extend_from_slice(&h.seq.to_le_bytes());
        b.push(h.tenant_kind as u8);
        put_bytes(b, h.tenant_key.as_bytes());
        b.extend_from_slice(&((h.relations.len() / 8) as u16).to_le_bytes());
        b.extend_from_slice(h.relations);
        b.extend_from_slice(&h.rows.to_le_bytes());
        b.extend_from_slice(&h.rows_len.to_le_bytes());
        if let Some(d) = data {
            debug_assert_eq!(d.len() as u64, h.rows_len);
            b.extend_from_slice(d);
        }
    });
}

pub fn put_run_data(out: &mut Vec<u8>, data: &[u8]) {
    put_frame(out, kind::RUN_DATA, |b| b.extend_from_slice(data));
}

pub fn put_truncate(out: &mut Vec<u8>, t: &Truncate<'_>) {
    put_frame(out, kind::TRUNCATE, |b| {
        b.extend_from_slice(&t.seq.to_le_bytes());
        b.push(u8::from(t.restart_sequences));
        match t.tenant {
            None => b.push(0xff),
            Some((k, key)) => {
                b.push(k as u8);
                put_bytes(b, key.as_bytes());
            }
        }
        b.extend_from_slice(&((t.relations.len() / 8) as u16).to_le_bytes());
        b.extend_from_slice(t.relations);
    });
}

pub fn put_marker(out: &mut Vec<u8>, m: &Marker<'_>) {
    put_frame(out, kind::MARKER, |b| {
        b.extend_from_slice(&m.seq.to_le_bytes());
        put_bytes(b, m.kind.as_bytes());
        put_bytes(b, m.payload);
    });
}

/// Iterates frames in a buffer that holds whole frames.
pub struct FrameReader<'a> {
    c: Cursor<'a>,
}

impl<'a> FrameReader<'a> {
    pub fn new(buf: &'a [u8]) -> Self {
        Self { c: Cursor::new(buf) }
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.c.at
    }

    /// The next frame with its raw bytes (header included), `None` at the end.
    pub fn next_raw(&mut self) -> Option<Result<(Frame<'a>, &'a [u8]), WireError>> {
        if self.c.is_empty() {
            return None;
        }
        let start = self.c.at;
        let got = frame(&mut self.c).map(|f| (f, &self.c.buf[start..self.c.at]));
        if got.is_err() {
            self.c.at = self.c.buf.len();
        }
        Some(got)
    }
}

impl<'a> Iterator for FrameReader<'a> {
    type Item = Result<Frame<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.next_raw()?.map(|(f, _)| f))
    }
}

fn run_header<'a>(b: &mut Cursor<'a>) -> Result<RunHeader<'a>, WireError> {
    let seq = b.u64("run sequence")?;
    let tenant_kind = TenantKind::from_u8(b.u8("tenant kind")?).ok_or(b.err("known tenant kind"))?;
    let tenant_key = b.str("tenant key")?;
    let n = b.u16("descriptor count")?;
    let relations = b.take(usize::from(n) * 8, "descriptor ids")?;
    let rows = b.u32("row count")?;
    let rows_len = b.u64("rows length")?;
    Ok(RunHeader { seq, tenant_kind, tenant_key, relations, rows, rows_len })
}

fn frame<'a>(c: &mut Cursor<'a>) -> Result<Frame<'a>, WireError> {
    let start = c.at;
    let k = c.u8("frame kind")?;
    let body = c.bytes("frame body")?;
    let base = c.at - body.len();
    let mut b = Cursor::new(body);
    let f = frame_body(k, body, &mut b);
    // Offsets inside a body count from the buffer's start, so that an error can be found in the file.
    let f = f.map_err(|e| WireError { at: base + e.at, what: e.what })?;
    if !b.is_empty() {
        return Err(WireError { at: start, what: "no bytes after the frame's fields" });
    }
    Ok(f)
}

fn frame_body<'a>(k: u8, body: &'a [u8], b: &mut Cursor<'a>) -> Result<Frame<'a>, WireError> {
    Ok(match k {
        kind::HELLO => {
            let wire_version = b.u16("wire version")?;
            if wire_version != WIRE_VERSION {
                return Err(b.err("wire version 1: extension and agent differ in version, upgrade the older"));
            }
            Frame::Hello(Hello {
                wire_version,
                server_version: b.u32("server version")?,
                extension_version: b.str("extension version")?,
            })
        }
        kind::BEGIN => Frame::Begin(Begin {
            xid: b.u64("xid")?,
            commit_lsn: Lsn(b.u64("commit lsn")?),
            end_lsn: Lsn(b.u64("end lsn")?),
            commit_time_us: b.i64("commit time")?,
        }),
        kind::COMMIT => {
            Frame::Commit(Commit { xid: b.u64("xid")?, end_lsn: Lsn(b.u64("end lsn")?), rows: b.u64("row count")? })
        }
        kind::RELATION => {
            let id = b.u64("descriptor id")?;
            let rest = b.take(body.len() - b.at, "descriptor")?;
            Frame::Relation(id, rest)
        }
        kind::RUN => {
            let header = run_header(b)?;
            let len = usize::try_from(header.rows_len).map_err(|_| b.err("rows length"))?;
            let data = b.take(len, "rows")?;
            Frame::Run(Run { header, data })
        }
        kind::RUN_OPEN => Frame::RunOpen(run_header(b)?),
        kind::RUN_DATA => Frame::RunData(b.take(body.len(), "run data")?),
        kind::TRUNCATE => {
            let seq = b.u64("truncate sequence")?;
            let restart_sequences = b.u8("truncate flags")? != 0;
            let tenant = match b.u8("truncate scope")? {
                0xff => None,
                n => {
                    let k = TenantKind::from_u8(n).ok_or(b.err("known tenant kind"))?;
                    Some((k, b.str("tenant key")?))
                }
            };
            let n = b.u16("descriptor count")?;
            let relations = b.take(usize::from(n) * 8, "descriptor ids")?;
            Frame::Truncate(Truncate { seq, restart_sequences, tenant, relations })
        }
        kind::MARKER => Frame::Marker(Marker {
            seq: b.u64("marker sequence")?,
            kind: b.str("marker kind")?,
            payload: b.bytes("marker payload")?,
        }),
        _ => return Err(WireError { at: 0, what: "known frame kind" }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Op, RowReader, put_delete, put_insert, put_opaque, put_update};
    use proptest::prelude::*;

    fn everything() -> Vec<u8> {
        let mut rows = Vec::new();
        put_insert(&mut rows, 0, b"1", b"1\tx");
        put_update(&mut rows, 1, None, b"1", b"1\t\\U");
        put_update(&mut rows, 1, Some(b"1"), b"2", b"2\t\\U");
        put_delete(&mut rows, 0, b"2");
        put_opaque(&mut rows, 0, "no tuple", b"\0\xff");
        let ids: Vec<u8> = [7u64, 9].iter().flat_map(|n| n.to_le_bytes()).collect();
        let header = RunHeader {
            seq: 3,
            tenant_kind: TenantKind::Normal,
            tenant_key: "acme/ü",
            relations: &ids,
            rows: 5,
            rows_len: rows.len() as u64,
        };
        let mut out = Vec::new();
        put_hello(&mut out, &Hello { wire_version: 1, server_version: 150020, extension_version: "0.1.0" });
        put_begin(&mut out, &Begin { xid: 1 << 33, commit_lsn: Lsn(5), end_lsn: Lsn(9), commit_time_us: -1 });
        put_relation(&mut out, 7, b"abc");
        put_run_header(&mut out, &header, Some(&rows));
        put_run_header(&mut out, &header, None);
        put_run_data(&mut out, &rows);
        put_truncate(&mut out, &Truncate { seq: 4, restart_sequences: true, tenant: None, relations: &ids });
        put_truncate(
            &mut out,
            &Truncate { seq: 5, restart_sequences: false, tenant: Some((TenantKind::Normal, "k")), relations: &ids },
        );
        put_marker(&mut out, &Marker { seq: 6, kind: "restore_point", payload: b"before" });
        put_commit(&mut out, &Commit { xid: 1 << 33, end_lsn: Lsn(9), rows: 10 });
        out
    }

    #[test]
    fn frames_survive_and_rows_too() {
        let bytes = everything();
        let frames: Vec<_> = FrameReader::new(&bytes).collect::<Result<_, _>>().unwrap();
        assert_eq!(frames.len(), 10);
        let Frame::Run(run) = frames[3] else { panic!("a run") };
        assert_eq!(run.header.relation_id(1), Some(9));
        assert_eq!(run.header.relation_id(2), None);
        let rows: Vec<_> = RowReader::new(run.data).collect::<Result<_, _>>().unwrap();
        assert_eq!(
            rows.iter().map(|r| r.op).collect::<Vec<_>>(),
            [Op::Insert, Op::Update, Op::UpdateKey, Op::Delete, Op::Opaque]
        );
        assert_eq!(rows[2].old_key, Some(&b"1"[..]));
    }

    #[test]
    fn a_cut_anywhere_is_an_error_or_a_frame_boundary() {
        let bytes = everything();
        let mut ends = vec![0];
        let mut r = FrameReader::new(&bytes);
        while let Some(f) = r.next_raw() {
            f.unwrap();
            ends.push(r.position());
        }
        for n in 0..bytes.len() {
            let ok = FrameReader::new(&bytes[..n]).all(|f| f.is_ok());
            assert_eq!(ok, ends.contains(&n), "cut at {n}");
        }
    }

    proptest! {
        #[test]
        fn no_input_panics(b in proptest::collection::vec(any::<u8>(), 0..200)) {
            for f in FrameReader::new(&b).flatten() {
                if let Frame::Run(run) = f { RowReader::new(run.data).for_each(drop); }
                if let Frame::Relation(_, d) = f { let _ = crate::Relation::decode(d); }
            }
        }

        #[test]
        fn a_flipped_byte_never_panics(at in 0usize..400, x in 1u8..) {
            let mut bytes = everything();
            let n = bytes.len();
            bytes[at % n] ^= x;
            for f in FrameReader::new(&bytes).flatten() {
                if let Frame::Run(run) = f { RowReader::new(run.data).for_each(drop); }
            }
        }
    }
}
