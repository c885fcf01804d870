//! Incrementals: what a span of changes comes to, as entries of the sort with the positions that they had.
//!
//! Sorted by (table, key, position). Of one key the last entry that says all of the row stays (an image, or a delete),
//! and the patches behind it, as one where they are under one descriptor; what was before it goes. Everything else stays
//! as it was: moves between keys and whatever they need, tables without a key, tables whose key came to be made of other
//! columns, changes that capture could not render. Two rules make that exact wherever a reader begins or ends outside
//! the span:
//!
//! - an entry is dropped only for a later one of the *same leaf*: whatever empties the leaf later takes both;
//! - entries keep their positions, so that a reader whose full lies inside the span takes those behind it, and finds the
//!   same rows: an image stands for itself, and merged patches bring nothing that the full has not in it already.
//!
//! What a TRUNCATE or a drop inside the span took is left out; the tombstone itself is in the ship's common object, which
//! every reader reads.

use super::descriptor::DescId;
use super::image::{self, Image};
use super::intake::{self, Gathered, Intake, MAX_KEY, RunBody, RunState, fill, put_value, what};
use super::key::{Position, SUB_IN, SUB_OUT, SortKey};
use super::scratch::Blobs;
use super::{Pick, key};
use crate::error::{Error, Kind, Result};
use crate::tenant::Tenant;
use coffer_wire::{Begin, Lsn, Relation, TenantKind, put_frame, put_relation};
use std::collections::HashMap;
use std::io::{Read, Write};

/// The agent's own frame: net changes of one table.
pub const NET_FRAME: u8 = 0x41;
/// The agent's own frame, behind those of its table: the last row change of each leaf.
pub const STAND_FRAME: u8 = 0x42;
/// Entries of a frame, in bytes.
const FRAME_BYTES: usize = 256 << 10;
/// Bytes of one of a [`STAND_FRAME`]'s elements.
const STAND_LEN: usize = 28;

/// Where an incremental's plaintext goes.
pub trait NetSink {
    /// What follows is of this table.
    fn section(&mut self, relid: u32) -> Result<()>;
    fn bytes(&mut self, b: &[u8]) -> Result<()>;
}

/// What became of the changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Changes that were read.
    pub read: u64,
    /// Entries that were written.
    pub rows: u64,
}

/// See [`super::Merge::net`].
pub(super) fn write(intake: Intake, tenant: &Tenant, after: Lsn, out: &mut dyn NetSink) -> Result<NetStats> {
    let Intake { sorter, blobs, gathered, .. } = intake;
    let opaque: u64 = gathered.stats.opaque.values().sum();
    let read = gathered.stats.rows + opaque;
    let sorted = sorter.finish()?;
    let mut entries = sorted.cursor()?;
    let mut tables: Vec<u32> = gathered.last_rows.keys().chain(gathered.stats.opaque.keys()).copied().collect();
    tables.sort_unstable();
    tables.dedup();
    let mut w = Writer {
        g: &gathered,
        blobs: &blobs,
        tenant,
        after,
        out,
        ids: HashMap::new(),
        row: Vec::new(),
        pending: Vec::new(),
        table: TableKind { keyed: true, one_epoch: true },
        frame: Vec::new(),
        relations: Vec::new(),
        count: 0,
        rows: 0,
    };
    for relid in tables {
        w.begin_table(relid)?;
        while let Some((k, v)) = entries.entry().filter(|(k, _)| SortKey(k).relid() == relid) {
            w.entry(k, v)?;
            entries.advance()?;
        }
        w.end_table(relid)?;
    }
    if entries.entry().is_some() {
        return Err(Error::other("an incremental has changes of a table that it does not know"));
    }
    Ok(NetStats { read, rows: w.rows })
}

/// An entry that may still be superseded.
struct Kept {
    at: Position,
    value: Vec<u8>,
}

#[derive(Clone, Copy)]
struct TableKind {
    keyed: bool,
    one_epoch: bool,
}

struct Writer<'a> {
    g: &'a Gathered,
    blobs: &'a Blobs,
    tenant: &'a Tenant,
    after: Lsn,
    out: &'a mut dyn NetSink,
    /// The ids that frames name descriptors by.
    ids: HashMap<DescId, u64>,
    /// Of the row at hand, its sort key without the position.
    row: Vec<u8>,
    pending: Vec<Kept>,
    table: TableKind,
    /// The entries of the frame that is being filled, and what its header says of them.
    frame: Vec<u8>,
    relations: Vec<DescId>,
    count: u32,
    rows: u64,
}

impl Writer<'_> {
    /// Every descriptor of the table: a later reader may need the value that one of them has for a column that is younger
    /// than a row.
    fn begin_table(&mut self, relid: u32) -> Result<()> {
        self.out.section(relid)?;
        let mut frames = Vec::new();
        for (d, rel) in self.g.descriptors.of_table(relid) {
            let encoded = rel.encode();
            let id = Relation::id_of(&encoded);
            self.ids.insert(d, id);
            put_relation(&mut frames, id, &encoded);
        }
        self.table.one_epoch = self.g.one_epoch(relid);
        self.out.bytes(&frames)
    }

    fn entry(&mut self, k: &[u8], v: &[u8]) -> Result<()> {
        let key = SortKey(k);
        let (w, desc, rest) = intake::value(v);
        if key.row() != self.row {
            self.end_row()?;
            self.row.clear();
            self.row.extend_from_slice(key.row());
            self.table.keyed = !self.g.descriptors.get(desc).full_row();
        }
        let at = key.position();
        if w == what::OPAQUE || !self.table.one_epoch {
            return self.put(at, v);
        }
        if at < self.g.floor(key.group(), key.relid(), desc) {
            return Ok(());
        }
        if !self.table.keyed {
            return self.put(at, v);
        }
        match w {
            what::PUT | what::PUT_HOLES | what::DELETE => {
                self.supersede(desc)?;
                self.pending.push(Kept { at, value: v.to_vec() });
                Ok(())
            }
            what::PATCH => self.patch(at, desc, rest, v),
            _ => {
                self.end_row()?;
                self.put(at, v)
            }
        }
    }

    /// Drops what an entry that says all of the row makes needless: what is of the same leaf.
    fn supersede(&mut self, by: DescId) -> Result<()> {
        let leaf = |d: DescId| self.g.descriptors.relation(d).leaf;
        if self.pending.iter().all(|p| leaf(intake::value(&p.value).1) == leaf(by)) {
            self.pending.clear();
            return Ok(());
        }
        self.end_row()
    }

    fn patch(&mut self, at: Position, desc: DescId, over: &[u8], v: &[u8]) -> Result<()> {
        if let Some(last) = self.pending.last_mut() {
            let (w, d, under) = intake::value(&last.value);
            if d == desc && matches!(w, what::PUT | what::PUT_HOLES | what::PATCH) {
                let mut merged = Vec::with_capacity(5 + over.len().max(under.len()));
                put_value(&mut merged, w, desc);
                let holes = image::patch(over, under, &mut merged)?;
                if w != what::PATCH {
                    merged[0] = if holes { what::PUT_HOLES } else { what::PUT };
                }
                *last = Kept { at, value: merged };
                return Ok(());
            }
        }
        self.pending.push(Kept { at, value: v.to_vec() });
        Ok(())
    }

    /// Nothing supersedes what is pending.
    fn end_row(&mut self) -> Result<()> {
        for Kept { at, value } in std::mem::take(&mut self.pending) {
            self.put(at, &value)?;
        }
        Ok(())
    }

    fn put(&mut self, at: Position, v: &[u8]) -> Result<()> {
        let (w, desc, rest) = intake::value(v);
        let image = has_image(w).then(|| Image::new(rest, self.blobs));
        let line = image.as_ref().map(Image::as_line);
        if matches!(line, Some(None)) || line.flatten().is_some_and(|l| l.len() >= FRAME_BYTES) {
            self.flush()?;
        }
        let place = self.relations.iter().position(|r| *r == desc).unwrap_or_else(|| {
            self.relations.push(desc);
            self.relations.len() - 1
        });
        let place = u16::try_from(place).map_err(|_| Error::other("a table has more than 65535 descriptors"))?;
        let mut row_key = Vec::new();
        key::row_key_of(&self.row, &mut row_key);
        self.frame.push(w);
        self.frame.extend_from_slice(&place.to_le_bytes());
        put_varint(&mut self.frame, at.end_lsn.0.wrapping_sub(self.after.0));
        put_varint(&mut self.frame, at.seq);
        put_varint(&mut self.frame, u64::from(at.index));
        put_bytes(&mut self.frame, &row_key);
        self.count += 1;
        self.rows += 1;
        match (image, line.flatten()) {
            (None, _) if w == what::MOVE_OUT => put_bytes(&mut self.frame, rest),
            (None, _) => {}
            (Some(_), Some(l)) => put_bytes(&mut self.frame, l),
            (Some(image), None) => return self.large(&image),
        }
        if self.frame.len() >= FRAME_BYTES { self.flush() } else { Ok(()) }
    }

    /// Ends the frame with an image that is not in memory whole.
    fn large(&mut self, image: &Image<'_>) -> Result<()> {
        let too_long = || Error::other("a row is longer than 4 GiB as text: no frame can hold it");
        let len = u32::try_from(image.len()).map_err(|_| too_long())?;
        self.frame.extend_from_slice(&len.to_le_bytes());
        let mut head = self.head();
        let whole = head.len() as u64 - 5 + self.frame.len() as u64 + u64::from(len);
        head[1..5].copy_from_slice(&u32::try_from(whole).map_err(|_| too_long())?.to_le_bytes());
        self.out.bytes(&head)?;
        self.out.bytes(&self.frame)?;
        let mut pieces = Pieces { out: &mut *self.out, error: None };
        let written = image.write_to(&mut pieces);
        if let Some(e) = pieces.error.take() {
            return Err(e);
        }
        written?;
        self.clear();
        Ok(())
    }

    /// The frame's own header and that of its entries.
    fn head(&self) -> Vec<u8> {
        let mut head = Vec::new();
        put_frame(&mut head, NET_FRAME, |b| {
            b.push(self.tenant.kind as u8);
            put_bytes(b, self.tenant.key.as_bytes());
            b.extend_from_slice(&(self.relations.len() as u16).to_le_bytes());
            for d in &self.relations {
                b.extend_from_slice(&self.ids[d].to_le_bytes());
            }
            b.extend_from_slice(&self.after.0.to_le_bytes());
            b.extend_from_slice(&self.count.to_le_bytes());
        });
        head
    }

    fn flush(&mut self) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let mut head = self.head();
        let len = (head.len() - 5 + self.frame.len()) as u32;
        head[1..5].copy_from_slice(&len.to_le_bytes());
        self.out.bytes(&head)?;
        self.out.bytes(&self.frame)?;
        self.clear();
        Ok(())
    }

    fn clear(&mut self) {
        self.frame.clear();
        self.relations.clear();
        self.count = 0;
    }

    fn end_table(&mut self, relid: u32) -> Result<()> {
        self.end_row()?;
        self.flush()?;
        self.row.clear();
        let Some(leaves) = self.g.last_rows.get(&relid) else { return Ok(()) };
        let mut stands: Vec<(Position, DescId)> = leaves.values().copied().collect();
        stands.sort_unstable_by_key(|(at, _)| *at);
        let mut frame = Vec::new();
        put_frame(&mut frame, STAND_FRAME, |b| {
            for (at, d) in stands {
                b.extend_from_slice(&self.ids[&d].to_le_bytes());
                b.extend_from_slice(&at.end_lsn.0.to_le_bytes());
                b.extend_from_slice(&at.seq.to_le_bytes());
                b.extend_from_slice(&at.index.to_le_bytes());
            }
        });
        self.out.bytes(&frame)
    }
}

fn has_image(w: u8) -> bool {
    matches!(w, what::PUT | what::PUT_HOLES | what::PATCH | what::MOVE_IN | what::OPAQUE)
}

struct Pieces<'a> {
    out: &'a mut dyn NetSink,
    error: Option<Error>,
}

impl Write for Pieces<'_> {
    fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
        match self.out.bytes(b) {
            Ok(()) => Ok(b.len()),
            Err(e) => {
                self.error = Some(e);
                Err(std::io::Error::other("what is written to has stopped"))
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn put_bytes(out: &mut Vec<u8>, b: &[u8]) {
    out.extend_from_slice(&(b.len() as u32).to_le_bytes());
    out.extend_from_slice(b);
}

/// LEB128.
fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn bad(what: &'static str) -> Error {
    Error::new(Kind::Verification, what).code("malformed")
}

/// The header of a [`NET_FRAME`].
pub(super) struct Header {
    pub tenant_kind: TenantKind,
    pub tenant_key: String,
    pub relations: Vec<u64>,
    after: Lsn,
    count: u32,
    /// Bytes of the entries.
    len: u64,
}

impl Header {
    /// Reads it off the frame's body, of `len` bytes.
    pub fn read(input: &mut dyn Read, len: usize) -> Result<Self> {
        let mut head = [0; 5];
        fill(input, &mut head, false)?;
        let tenant_kind = TenantKind::from_u8(head[0]).ok_or_else(|| bad("net changes of an unknown tenant kind"))?;
        let key_len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if key_len > MAX_KEY {
            return Err(bad("the tenant key of net changes is too long"));
        }
        let mut key = vec![0; key_len + 2];
        fill(input, &mut key, false)?;
        let n = usize::from(u16::from_le_bytes([key[key_len], key[key_len + 1]]));
        key.truncate(key_len);
        let tenant_key = String::from_utf8(key).map_err(|_| bad("the tenant key of net changes is not UTF-8"))?;
        let mut rest = vec![0; n * 8 + 12];
        fill(input, &mut rest, false)?;
        let at8 = |i: usize| u64::from_le_bytes(rest[i..i + 8].try_into().expect("eight bytes"));
        let relations = (0..n).map(|i| at8(i * 8)).collect();
        let after = Lsn(at8(n * 8));
        let count = u32::from_le_bytes(rest[n * 8 + 8..].try_into().expect("four bytes"));
        let len = (len as u64)
            .checked_sub((5 + key_len + 2 + rest.len()) as u64)
            .ok_or_else(|| bad("a frame of net changes is too short"))?;
        Ok(Self { tenant_kind, tenant_key, relations, after, count, len })
    }
}

/// What stands before an entry's values.
struct EntryHead {
    what: u8,
    place: usize,
    at: Position,
}

impl RunBody<'_> {
    fn entry_head(&mut self, after: Lsn) -> Result<EntryHead> {
        let mut head = [0; 3];
        self.fill(&mut head)?;
        if !matches!(head[0], what::PUT..=what::MOVE_IN | what::OPAQUE) {
            return Err(bad("an unknown kind of net change"));
        }
        let end_lsn = Lsn(after.0.wrapping_add(self.varint()?));
        let seq = self.varint()?;
        let index = u32::try_from(self.varint()?).map_err(|_| bad("a net change has no such place in its run"))?;
        let place = usize::from(u16::from_le_bytes([head[1], head[2]]));
        Ok(EntryHead { what: head[0], place, at: Position { end_lsn, seq, index } })
    }

    fn varint(&mut self) -> Result<u64> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let mut b = [0];
            self.fill(&mut b)?;
            let bits = u64::from(b[0] & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            n |= bits << shift;
            if b[0] & 0x80 == 0 {
                return Ok(n);
            }
        }
        Err(bad("a number of a net change is too long"))
    }
}

/// How many values stand behind an entry's head.
fn values(w: u8) -> usize {
    1 + usize::from(has_image(w) || w == what::MOVE_OUT)
}

/// Reads the entries of a frame for what they say of themselves; how many there are.
pub(super) fn walk(input: &mut dyn Read, h: &Header, placed: &dyn Fn(Lsn) -> Result<()>) -> Result<u64> {
    let mut state = RunState::of_bytes(h.len);
    let mut body = RunBody { input, s: &mut state };
    let mut n = 0;
    while body.s.left > 0 {
        let e = body.entry_head(h.after)?;
        if e.place >= h.relations.len() {
            return Err(intake::no_such_descriptor());
        }
        placed(e.at.end_lsn)?;
        for _ in 0..values(e.what) {
            body.skip_value()?;
        }
        n += 1;
    }
    h.require(n)?;
    Ok(u64::from(n))
}

impl Header {
    fn require(&self, found: u32) -> Result<()> {
        if found == self.count {
            return Ok(());
        }
        let what = format!("a frame says {} net changes and holds {found}", self.count);
        Err(Error::new(Kind::Verification, what).code("malformed"))
    }
}

/// The elements of a [`STAND_FRAME`]'s body: descriptor ids and positions.
pub(super) fn stands(body: &[u8]) -> Result<Vec<(u64, Position)>> {
    let elements = body.chunks_exact(STAND_LEN);
    if !elements.remainder().is_empty() {
        return Err(bad("what a table came to is malformed"));
    }
    let read = |b: &[u8]| {
        let at8 = |i: usize| u64::from_le_bytes(b[i..i + 8].try_into().expect("an element has 28 bytes"));
        let index = u32::from_le_bytes(b[24..].try_into().expect("an element has 28 bytes"));
        (at8(0), Position { end_lsn: Lsn(at8(8)), seq: at8(16), index })
    };
    Ok(elements.map(read).collect())
}

/// The transaction of an entry. Which one it was, an incremental does not say.
fn txn(at: Position) -> Begin {
    Begin { xid: 0, commit_lsn: at.end_lsn, end_lsn: at.end_lsn, commit_time_us: 0 }
}

impl Intake {
    /// Takes the entries of a [`NET_FRAME`].
    pub(super) fn net(&mut self, input: &mut dyn Read, len: usize, pick: &mut dyn Pick) -> Result<()> {
        let h = Header::read(input, len)?;
        let group = pick.group(&txn(Position { end_lsn: h.after, ..Position::BASE }), h.tenant_kind, &h.tenant_key);
        let mut descs = Vec::with_capacity(h.relations.len());
        for id in &h.relations {
            let d = self.gathered.descriptors.find(*id)?;
            descs.push((d, self.gathered.descriptors.relation(d).relid));
        }
        let mut state = RunState::of_bytes(h.len);
        let mut body = RunBody { input, s: &mut state };
        let (mut n, mut last) = (0, None);
        while body.s.left > 0 {
            let e = body.entry_head(h.after)?;
            n += 1;
            let (desc, relid) = *descs.get(e.place).ok_or_else(intake::no_such_descriptor)?;
            let Some(group) = group.filter(|_| pick.table(&txn(e.at), relid)) else {
                for _ in 0..values(e.what) {
                    body.skip_value()?;
                }
                continue;
            };
            let known = self.gathered.descriptors.get(desc);
            if known.full_row() && matches!(e.what, what::PATCH | what::MOVE_OUT | what::MOVE_IN) {
                return Err(bad("a net change of a key in a table without one"));
            }
            if e.what == what::OPAQUE {
                *self.gathered.stats.opaque.entry(relid).or_insert(0) += 1;
                body.skip_value()?;
                body.skip_value()?;
                continue;
            }
            self.gathered.stats.rows += 1;
            let epoch = match last {
                Some((d, epoch)) if d == desc => epoch,
                _ => self.gathered.change_epoch(relid, &known, desc),
            };
            last = Some((desc, epoch));
            let key = body.value(&self.blobs, false)?;
            let intake::Value::Bytes(key) = key else { return Err(bad("the key of a net change is too long")) };
            self.value.clear();
            put_value(&mut self.value, e.what, desc);
            if has_image(e.what) {
                body.value(&self.blobs, true)?.part().put(&self.blobs, &mut self.value)?;
            } else if e.what == what::MOVE_OUT {
                let intake::Value::Bytes(to) = body.value(&self.blobs, false)? else {
                    return Err(bad("the new key of a row is too long"));
                };
                self.value.extend_from_slice(&to);
            }
            let goes = matches!(e.what, what::DELETE | what::MOVE_OUT);
            if matches!(e.what, what::MOVE_OUT | what::MOVE_IN) {
                self.gathered.moves.insert((relid, epoch));
            }
            self.push(group, relid, epoch, &key, e.at, if goes { SUB_OUT } else { SUB_IN })?;
        }
        h.require(n)
    }

    /// Takes a [`STAND_FRAME`]: what the table and its leaves look like, whichever entries were left out.
    pub(super) fn stand(&mut self, body: &[u8], pick: &mut dyn Pick) -> Result<()> {
        let mut last = None;
        for (id, at) in stands(body)? {
            let d = self.gathered.descriptors.find(id)?;
            let relid = self.gathered.descriptors.relation(d).relid;
            if pick.table(&txn(at), relid) {
                self.gathered.note_newest(relid, at, d);
                last = Some((relid, d));
            }
        }
        if let Some((relid, d)) = last {
            self.gathered.change_epoch(relid, &self.gathered.descriptors.get(d), d);
        }
        Ok(())
    }
}
