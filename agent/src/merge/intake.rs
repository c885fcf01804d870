//! Frames in, sort entries out.
//!
//! Reads the plaintext of changesets, common objects and fulls (FORMAT.md, "Frames"), asks the caller which
//! transactions and tables count, and turns every row into entries of the sort: one per row, two for a change of key.
//! Rows longer than a mebibyte are read piece by piece and leave their large fields in the scratch.

use super::descriptor::{Desc, DescId, Descriptors, KeyShape};
use super::image::{self, LARGE_LINE, LineBuilder};
use super::key::{self, Position, SUB_IN, SUB_OUT};
use super::net::{NET_FRAME, STAND_FRAME};
use super::scratch::{Blobs, Scratch};
use super::sorter::Sorter;
use crate::error::{Context, Error, Kind, Result};
use coffer_wire::{Begin, Frame, FrameReader, Lsn, Op, RowReader, TenantKind, kind};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The agent's own frame: which transactions a ship holds. No row in it.
pub const TXN_INDEX_FRAME: u8 = 0x40;
/// A frame whose rows are longer than this is read as a stream.
pub(super) const STREAM_ABOVE: usize = 4 << 20;
/// No other frame may be longer; a length beyond it is damage.
const MAX_FRAME: usize = 64 << 20;
/// Nor may a key: PostgreSQL's indexes end far below.
pub(super) const MAX_KEY: usize = 1 << 20;

/// What an entry of the sort says. The value is `what u8 | descriptor u32 | rest`.
pub(super) mod what {
    /// The row is this image.
    pub const PUT: u8 = 1;
    /// The same, with holes that nothing in this input fills.
    pub const PUT_HOLES: u8 = 2;
    /// The row before it, with these fields replaced.
    pub const PATCH: u8 = 3;
    pub const DELETE: u8 = 4;
    /// The row leaves for another key, which is the rest; its image there has holes.
    pub const MOVE_OUT: u8 = 5;
    /// The row that arrives from another key, with holes.
    pub const MOVE_IN: u8 = 6;
    /// What fills the holes of the arrival beside it.
    pub const FILL: u8 = 7;
    /// A change that capture could not render, which incrementals pass on; never in a merge.
    pub const OPAQUE: u8 = 8;
}

/// Which changes count, and whose they are.
pub trait Pick {
    /// The group that rows of this tenant go to; `None`: not wanted.
    fn group(&mut self, txn: &Begin, kind: TenantKind, key: &str) -> Option<u32>;
    /// Whether this transaction's changes of this table count.
    fn table(&mut self, txn: &Begin, relid: u32) -> bool;
    /// Whether it counts that this transaction dropped a table or one of its leaves.
    fn dropped(&mut self, txn: &Begin, relid: u32) -> bool {
        self.table(txn, relid)
    }
}

/// Counts of what was read.
#[derive(Clone, Debug, Default)]
pub struct IntakeStats {
    /// Rows taken, base rows included.
    pub rows: u64,
    pub truncates: u64,
    /// Changes that capture could not render, by table.
    pub opaque: BTreeMap<u32, u64>,
}

/// Everything a range tombstone can be about.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Scope {
    /// `None`: all groups.
    group: Option<u32>,
    relid: u32,
    /// `None`: the whole table.
    leaf: Option<u32>,
}

#[derive(Default)]
struct Table {
    /// Of the rows of the base.
    base_shape: Option<Arc<KeyShape>>,
    /// Of the latest change, with its epoch.
    shape: Option<(Arc<KeyShape>, u32)>,
    /// Of the first change.
    first_shape: Option<(Arc<KeyShape>, u32)>,
    newest: Option<(Position, DescId)>,
    /// The same of each leaf.
    leaves: HashMap<u32, (Position, DescId)>,
    /// By epoch: a descriptor of its changes.
    epochs: Vec<(u32, DescId)>,
}

/// What the intake has gathered besides the sort's entries.
#[derive(Default)]
pub(super) struct Gathered {
    pub descriptors: Descriptors,
    tables: Mutex<HashMap<u32, Table>>,
    floors: HashMap<Scope, Position>,
    /// Tables (or leaves) that were dropped.
    drops: HashMap<u32, Position>,
    /// What DDL made of tables. The rows of a ship come after its common object, so these wait for all rows.
    described: Vec<(Position, DescId)>,
    /// (relid, epoch) in which rows changed their key and left values behind.
    pub moves: HashSet<(u32, u32)>,
    pub stats: IntakeStats,
    /// By table and leaf, its last row change; only for incrementals.
    pub last_rows: BTreeMap<u32, BTreeMap<u32, (Position, DescId)>>,
}

impl Gathered {
    fn tables(&self) -> MutexGuard<'_, HashMap<u32, Table>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epoch of a change, which begins a new one when the table's key is made of other columns than before.
    pub fn change_epoch(&self, relid: u32, desc: &Desc, d: DescId) -> u32 {
        let shape = &desc.shape;
        let mut tables = self.tables();
        let t = tables.entry(relid).or_default();
        if let Some((s, e)) = &t.shape
            && s == shape
        {
            return *e;
        }
        let epoch = match (&t.shape, &t.base_shape) {
            (Some((_, e)), _) => e + 1,
            (None, Some(b)) if b == shape => 0,
            (None, _) => 1,
        };
        t.shape = Some((shape.clone(), epoch));
        t.epochs.push((epoch, d));
        t.first_shape.get_or_insert_with(|| (shape.clone(), epoch));
        epoch
    }

    /// The epoch of a base row: that of the first changes when the key is the same, else the one before.
    pub fn base_epoch(&self, relid: u32, desc: &Desc, d: DescId) -> Result<u32> {
        let mut tables = self.tables();
        let t = tables.entry(relid).or_default();
        match &t.base_shape {
            None => t.base_shape = Some(desc.shape.clone()),
            Some(s) if *s == desc.shape => {}
            Some(_) => {
                return Err(Error::new(
                    Kind::Verification,
                    format!("the base of {} has rows under two kinds of key", desc.rel.qualified()),
                )
                .code("malformed"));
            }
        }
        if t.newest.is_none() {
            t.newest = Some((Position::BASE, d));
        }
        t.leaves.entry(desc.rel.leaf).or_insert((Position::BASE, d));
        Ok(match &t.first_shape {
            Some((s, e)) if *s == desc.shape => *e,
            _ => 0,
        })
    }

    /// The last epoch that changes have; 0 for a table that only has a base.
    pub fn last_epoch(&self, relid: u32) -> u32 {
        self.tables().get(&relid).and_then(|t| t.shape.as_ref()).map_or(0, |(_, e)| *e)
    }

    /// The descriptor of the last change of the table, or of its base.
    pub fn newest(&self, relid: u32) -> Option<(Position, DescId)> {
        self.tables().get(&relid)?.newest
    }

    /// The newest descriptor of the leaf that a row under `d` is in.
    pub fn newest_of_leaf(&self, d: DescId) -> DescId {
        let (relid, leaf) = {
            let r = self.descriptors.relation(d);
            (r.relid, r.leaf)
        };
        self.tables().get(&relid).and_then(|t| t.leaves.get(&leaf)).map_or(d, |(_, d)| *d)
    }

    /// A descriptor whose rows have the key that changes of this epoch have.
    pub fn of_epoch(&self, relid: u32, epoch: u32) -> Option<DescId> {
        self.tables().get(&relid)?.epochs.iter().find(|(e, _)| *e == epoch).map(|(_, d)| *d)
    }

    pub fn note_newest(&self, relid: u32, at: Position, d: DescId) {
        let mut tables = self.tables();
        let t = tables.entry(relid).or_default();
        if t.newest.is_none_or(|(p, _)| p <= at) {
            t.newest = Some((at, d));
        }
        let leaf = t.leaves.entry(self.descriptors.relation(d).leaf).or_insert((at, d));
        if leaf.0 <= at {
            *leaf = (at, d);
        }
    }

    /// When all changes are in: tables that no row followed after a DDL look as the DDL left them.
    pub fn settle(&mut self) {
        let mut described = std::mem::take(&mut self.described);
        described.sort_by_key(|(at, _)| *at);
        for (at, d) in described {
            let desc = self.descriptors.get(d);
            let (relid, leaf) = (desc.rel.relid, desc.rel.leaf);
            let known = self.tables().get(&relid).map(|t| (t.newest.map(|n| n.0), t.leaves.get(&leaf).map(|l| l.0)));
            let (newest, of_leaf) = known.unwrap_or_default();
            if newest.is_none_or(|p| p <= at) {
                self.note_newest(relid, at, d);
                self.change_epoch(relid, &desc, d);
            } else if of_leaf.is_none_or(|p| p <= at) {
                self.tables().entry(relid).or_default().leaves.insert(leaf, (at, d));
            }
        }
    }

    /// Whether rows of the table, or of a leaf of it, were removed by range.
    pub fn emptied(&self, group: u32, relid: u32) -> bool {
        let ours = |s: &Scope| s.relid == relid && s.group.is_none_or(|g| g == group);
        self.drops.contains_key(&relid) || self.floors.keys().any(ours)
    }

    /// Whether a table or a leaf of one was dropped.
    pub fn dropped(&self, id: u32) -> bool {
        self.drops.contains_key(&id)
    }

    /// Whether the key was made of the same columns through all changes of the table.
    pub fn one_epoch(&self, relid: u32) -> bool {
        self.tables().get(&relid).is_none_or(|t| t.epochs.len() <= 1)
    }

    /// Whether every change of the table has a key of this shape.
    pub fn one_shape(&self, relid: u32, shape: &Arc<KeyShape>) -> bool {
        let tables = self.tables();
        let Some(t) = tables.get(&relid) else { return true };
        let same = |s: &Option<(Arc<KeyShape>, u32)>| s.as_ref().is_none_or(|(s, _)| s == shape);
        let epochs = t.first_shape.as_ref().map(|s| s.1) == t.shape.as_ref().map(|s| s.1);
        epochs && same(&t.first_shape) && same(&t.shape)
    }

    fn raise(&mut self, scope: Scope, at: Position) {
        let f = self.floors.entry(scope).or_insert(at);
        *f = (*f).max(at);
    }

    /// Rows of this table, in this group and under this descriptor, that were there before this position are gone.
    pub fn floor(&self, group: u32, relid: u32, d: DescId) -> Position {
        let mut floor = Position::BASE;
        if self.floors.is_empty() && self.drops.is_empty() {
            return floor;
        }
        let leaf = self.descriptors.relation(d).leaf;
        if !self.floors.is_empty() {
            for group in [None, Some(group)] {
                for leaf in [None, Some(leaf)] {
                    if let Some(p) = self.floors.get(&Scope { group, relid, leaf }) {
                        floor = floor.max(*p);
                    }
                }
            }
        }
        for id in [relid, leaf] {
            if let Some(p) = self.drops.get(&id) {
                floor = floor.max(*p);
            }
        }
        floor
    }
}

/// A value of a row: a line in memory, or one that was built from a stream.
pub(super) enum Part<'a> {
    Line(&'a [u8]),
    Built { encoded: Vec<u8>, key: Vec<u8> },
}

impl Part<'_> {
    pub fn put(&self, blobs: &Blobs, out: &mut Vec<u8>) -> Result<()> {
        match self {
            Part::Line(l) if l.len() <= LARGE_LINE => image::put_line(out, l),
            Part::Line(l) => {
                let mut b = LineBuilder::new(blobs);
                b.push(l)?;
                out.extend_from_slice(&b.finish()?.0);
            }
            Part::Built { encoded, .. } => out.extend_from_slice(encoded),
        }
        Ok(())
    }

    fn full_row_key(&self) -> Vec<u8> {
        match self {
            Part::Line(l) => key::full_row_key_of(l),
            Part::Built { key, .. } => key.clone(),
        }
    }

    fn has_hole(&self) -> bool {
        match self {
            Part::Line(l) => image::line_has_hole(l),
            Part::Built { encoded, .. } => image::has_hole(encoded),
        }
    }
}

struct Change<'a> {
    group: u32,
    desc: DescId,
    at: Position,
    op: Op,
    old: Option<Part<'a>>,
    key: Part<'a>,
    image: Part<'a>,
}

/// See the module.
pub(super) struct Intake {
    pub sorter: Sorter,
    pub blobs: Blobs,
    pub gathered: Gathered,
    /// For an incremental: what a merge would only count is kept as well.
    pub for_net: bool,
    sort_key: Vec<u8>,
    pub value: Vec<u8>,
}

impl Intake {
    pub fn new(scratch: &Scratch, memory: usize) -> Result<Self> {
        Ok(Self {
            sorter: Sorter::new(scratch, memory),
            blobs: scratch.clone().for_memory(memory).blobs()?,
            gathered: Gathered::default(),
            for_net: false,
            sort_key: Vec::new(),
            value: Vec::new(),
        })
    }

    /// A row of a base.
    pub fn base_row(&mut self, group: u32, desc: DescId, key: &[u8], line: &[u8]) -> Result<()> {
        self.base_part(group, desc, key, &Part::Line(line))
    }

    /// A row of a base whose line comes in pieces: `next` appends one, and says whether there was any.
    pub fn base_row_in_pieces(
        &mut self,
        group: u32,
        desc: DescId,
        key: &[u8],
        next: &mut dyn FnMut(&mut Vec<u8>) -> Result<bool>,
    ) -> Result<()> {
        let blobs = &self.blobs;
        let (mut builder, mut piece) = (LineBuilder::new(blobs), Vec::new());
        while next(&mut piece)? {
            builder.push(&piece)?;
            piece.clear();
        }
        let (encoded, whole) = builder.finish()?;
        self.base_part(group, desc, key, &Part::Built { encoded, key: whole })
    }

    fn base_part(&mut self, group: u32, desc: DescId, key: &[u8], part: &Part<'_>) -> Result<()> {
        let d = self.gathered.descriptors.get(desc);
        let relid = d.rel.relid;
        let epoch = self.gathered.base_epoch(relid, &d, desc)?;
        self.gathered.stats.rows += 1;
        self.value.clear();
        let w = if part.has_hole() { what::PUT_HOLES } else { what::PUT };
        put_value(&mut self.value, w, desc);
        part.put(&self.blobs, &mut self.value)?;
        let full;
        let key = if d.full_row() {
            full = part.full_row_key();
            &full
        } else {
            key
        };
        self.push(group, relid, epoch, key, Position::BASE, SUB_IN)
    }

    /// Pushes `self.value` under this key.
    pub fn push(&mut self, group: u32, relid: u32, epoch: u32, key: &[u8], at: Position, sub: u8) -> Result<()> {
        self.sort_key.clear();
        key::put_table(&mut self.sort_key, group, relid, epoch);
        key::put_row_key(&mut self.sort_key, key);
        key::put_position(&mut self.sort_key, at, sub);
        self.sorter.push(&self.sort_key, &self.value)
    }

    fn change(&mut self, c: &Change<'_>) -> Result<()> {
        let desc = self.gathered.descriptors.get(c.desc);
        let relid = desc.rel.relid;
        if c.op == Op::Opaque {
            *self.gathered.stats.opaque.entry(relid).or_insert(0) += 1;
            return if self.for_net { self.keep_opaque(relid, c) } else { Ok(()) };
        }
        self.gathered.stats.rows += 1;
        if self.for_net {
            self.gathered.last_rows.entry(relid).or_default().insert(desc.rel.leaf, (c.at, c.desc));
        }
        self.gathered.note_newest(relid, c.at, c.desc);
        let epoch = self.gathered.change_epoch(relid, &desc, c.desc);
        if desc.full_row() {
            return self.full_row_change(relid, epoch, c);
        }
        let Part::Line(new_key) = c.key else {
            return Err(Error::new(Kind::Verification, "a row's key is as long as a large value").code("malformed"));
        };
        let old_key = match &c.old {
            Some(Part::Line(l)) if *l != new_key => Some(*l),
            Some(Part::Built { .. }) => {
                return Err(
                    Error::new(Kind::Verification, "a row's old key is as long as a large value").code("malformed")
                );
            }
            _ => None,
        };
        if c.op == Op::Delete {
            self.value.clear();
            put_value(&mut self.value, what::DELETE, c.desc);
            return self.push(c.group, relid, epoch, new_key, c.at, SUB_OUT);
        }
        let holes = c.image.has_hole();
        if let Some(old) = old_key {
            self.value.clear();
            if holes {
                self.gathered.moves.insert((relid, epoch));
                put_value(&mut self.value, what::MOVE_OUT, c.desc);
                self.value.extend_from_slice(new_key);
            } else {
                put_value(&mut self.value, what::DELETE, c.desc);
            }
            self.push(c.group, relid, epoch, old, c.at, SUB_OUT)?;
        }
        let w = match (holes, c.op) {
            (false, _) => what::PUT,
            (true, Op::Insert) => what::PUT_HOLES,
            (true, _) if old_key.is_some() => what::MOVE_IN,
            (true, _) => what::PATCH,
        };
        self.value.clear();
        put_value(&mut self.value, w, c.desc);
        c.image.put(&self.blobs, &mut self.value)?;
        self.push(c.group, relid, epoch, new_key, c.at, SUB_IN)
    }

    /// The reason in the place of the key, behind all rows of its table.
    fn keep_opaque(&mut self, relid: u32, c: &Change<'_>) -> Result<()> {
        let Part::Line(reason) = c.key else {
            return Err(Error::new(Kind::Verification, "the reason of an opaque row is too long").code("malformed"));
        };
        self.value.clear();
        put_value(&mut self.value, what::OPAQUE, c.desc);
        c.image.put(&self.blobs, &mut self.value)?;
        self.push(c.group, relid, u32::MAX, reason, c.at, SUB_IN)
    }

    /// A change of a row that is told apart by its whole image: one of that image fewer, one more.
    fn full_row_change(&mut self, relid: u32, epoch: u32, c: &Change<'_>) -> Result<()> {
        let gone = match c.op {
            Op::Delete => Some(&c.key),
            Op::UpdateKey => c.old.as_ref(),
            // An update that left the row as it was.
            Op::Update => return Ok(()),
            _ => None,
        };
        if let Some(old) = gone {
            self.value.clear();
            put_value(&mut self.value, what::DELETE, c.desc);
            self.push(c.group, relid, epoch, &old.full_row_key(), c.at, SUB_OUT)?;
        }
        if c.op == Op::Delete {
            return Ok(());
        }
        self.value.clear();
        let key = match (&c.old, c.image.has_hole()) {
            (Some(old), true) => {
                // The old image is whole: what the log left out is in it.
                let (mut over, mut under, mut filled) = (Vec::new(), Vec::new(), Vec::new());
                c.image.put(&self.blobs, &mut over)?;
                old.put(&self.blobs, &mut under)?;
                let left = image::patch(&over, &under, &mut filled)?;
                put_value(&mut self.value, if left { what::PUT_HOLES } else { what::PUT }, c.desc);
                self.value.extend_from_slice(&filled);
                self.gathered.descriptors.key_of(c.desc, image::Image::new(&filled, &self.blobs))?
            }
            (_, holes) => {
                put_value(&mut self.value, if holes { what::PUT_HOLES } else { what::PUT }, c.desc);
                c.image.put(&self.blobs, &mut self.value)?;
                c.image.full_row_key()
            }
        };
        self.push(c.group, relid, epoch, &key, c.at, SUB_IN)
    }

    /// Reads frames to the end of `input`.
    pub fn changes(&mut self, input: &mut dyn Read, pick: &mut dyn Pick) -> Result<()> {
        let mut frames = Frames { input, buf: Vec::new() };
        let mut txn: Option<Begin> = None;
        while let Some((k, len)) = frames.head()? {
            if k == kind::RUN && len > STREAM_ABOVE {
                let header = frames.run_header(len)?;
                self.stream_run(&header, &begun(txn)?, frames.input, false, pick)?;
                continue;
            }
            if k == NET_FRAME && len > STREAM_ABOVE {
                self.net(frames.input, len, pick)?;
                continue;
            }
            let bytes = frames.body(len)?;
            match k {
                TXN_INDEX_FRAME => continue,
                NET_FRAME => {
                    self.net(&mut &bytes[5..], len, pick)?;
                    continue;
                }
                STAND_FRAME => {
                    self.stand(&bytes[5..], pick)?;
                    continue;
                }
                _ => {}
            }
            let frame = FrameReader::new(bytes)
                .next()
                .ok_or_else(|| Error::new(Kind::Verification, "an empty frame").code("malformed"))??;
            match frame {
                Frame::Begin(b) => txn = Some(b),
                Frame::Hello(_) | Frame::Commit(_) => {}
                Frame::Relation(_, encoded) => {
                    self.gathered.descriptors.add(encoded)?;
                }
                Frame::Run(run) => self.run(&run, &begun(txn)?, pick)?,
                Frame::RunOpen(h) => {
                    let header = Header::of(&h);
                    self.stream_run(&header, &begun(txn)?, frames.input, true, pick)?;
                }
                Frame::RunData(_) => {
                    return Err(Error::new(Kind::Verification, "rows without the head of their run").code("malformed"));
                }
                Frame::Truncate(t) => self.truncate(&t, &begun(txn)?, pick)?,
                Frame::Marker(m) if m.kind == "drop" => self.drop_marker(&m, &begun(txn)?, pick)?,
                Frame::Marker(m) if m.kind == "described" => self.described(&m, &begun(txn)?, pick)?,
                Frame::Marker(_) => {}
            }
        }
        Ok(())
    }

    /// A DDL changed what tables look like, whether rows follow or not.
    fn described(&mut self, m: &coffer_wire::Marker<'_>, txn: &Begin, pick: &mut dyn Pick) -> Result<()> {
        let at = Position { end_lsn: txn.end_lsn, seq: m.seq, index: 0 };
        for id in coffer_wire::relation_ids(m.payload) {
            let d = self.gathered.descriptors.find(id)?;
            if pick.table(txn, self.gathered.descriptors.relation(d).relid) {
                self.gathered.described.push((at, d));
            }
        }
        Ok(())
    }

    /// For each descriptor of a run's header: its number here, or `None` when its table's changes do not count.
    fn resolve(&self, ids: impl Iterator<Item = u64>, txn: &Begin, pick: &mut dyn Pick) -> Result<Vec<Option<DescId>>> {
        ids.map(|id| {
            let d = self.gathered.descriptors.find(id)?;
            let relid = self.gathered.descriptors.relation(d).relid;
            Ok(pick.table(txn, relid).then_some(d))
        })
        .collect()
    }

    fn run(&mut self, run: &coffer_wire::Run<'_>, txn: &Begin, pick: &mut dyn Pick) -> Result<()> {
        let h = &run.header;
        let Some(group) = pick.group(txn, h.tenant_kind, h.tenant_key) else { return Ok(()) };
        let descs = self.resolve(h.relation_ids(), txn, pick)?;
        let mut n = 0;
        for row in RowReader::new(run.data) {
            let row = row?;
            let at = Position { end_lsn: txn.end_lsn, seq: h.seq, index: n };
            n += 1;
            if let Some(desc) = *descs.get(usize::from(row.rel)).ok_or_else(no_such_descriptor)? {
                self.change(&Change {
                    group,
                    desc,
                    at,
                    op: row.op,
                    old: row.old_key.map(Part::Line),
                    key: Part::Line(row.key),
                    image: Part::Line(row.image),
                })?;
            }
        }
        if n != h.rows {
            return Err(wrong_count(h.rows, n));
        }
        Ok(())
    }

    /// The same for a run that is read piece by piece.
    fn stream_run(
        &mut self,
        h: &Header,
        txn: &Begin,
        input: &mut dyn Read,
        framed: bool,
        pick: &mut dyn Pick,
    ) -> Result<()> {
        let group = pick.group(txn, h.tenant_kind, &h.tenant_key);
        let descs = self.resolve(h.relations.iter().copied(), txn, pick)?;
        let mut state = RunState::new(h, framed);
        let mut body = RunBody { input, s: &mut state };
        let mut n = 0;
        while body.s.left > 0 {
            let (op, rel) = body.row_head()?;
            let desc = *descs.get(rel).ok_or_else(no_such_descriptor)?;
            let at = Position { end_lsn: txn.end_lsn, seq: h.seq, index: n };
            n += 1;
            let (Some(group), Some(desc)) = (group, desc) else {
                for _ in 0..values(op) {
                    body.skip_value()?;
                }
                continue;
            };
            let full_row = self.gathered.descriptors.get(desc).full_row();
            let old = if op == Op::UpdateKey { Some(body.value(&self.blobs, full_row)?) } else { None };
            let key = body.value(&self.blobs, full_row && op == Op::Delete)?;
            let image = if op == Op::Delete { Value::Bytes(Vec::new()) } else { body.value(&self.blobs, true)? };
            self.change(&Change {
                group,
                desc,
                at,
                op,
                old: old.as_ref().map(Value::part),
                key: key.part(),
                image: image.part(),
            })?;
        }
        if n != h.rows {
            return Err(wrong_count(h.rows, n));
        }
        Ok(())
    }

    fn truncate(&mut self, t: &coffer_wire::Truncate<'_>, txn: &Begin, pick: &mut dyn Pick) -> Result<()> {
        let group = match t.tenant {
            None => None,
            Some((k, key)) => match pick.group(txn, k, key) {
                None => return Ok(()),
                g => g,
            },
        };
        let at = Position { end_lsn: txn.end_lsn, seq: t.seq, index: 0 };
        for id in t.relation_ids() {
            let d = self.gathered.descriptors.find(id)?;
            let (relid, leaf) = {
                let r = self.gathered.descriptors.relation(d);
                (r.relid, r.leaf)
            };
            if pick.table(txn, relid) {
                self.gathered.stats.truncates += 1;
                self.gathered.note_newest(relid, at, d);
                self.gathered.raise(Scope { group, relid, leaf: (leaf != relid).then_some(leaf) }, at);
            }
        }
        Ok(())
    }

    fn drop_marker(&mut self, m: &coffer_wire::Marker<'_>, txn: &Begin, pick: &mut dyn Pick) -> Result<()> {
        #[derive(serde::Deserialize)]
        struct Drop {
            relids: Vec<u32>,
        }
        let d: Drop = serde_json::from_slice(m.payload)
            .context(Kind::Verification, "the marker of a dropped table is not readable")?;
        let at = Position { end_lsn: txn.end_lsn, seq: m.seq, index: 0 };
        for relid in d.relids {
            if pick.dropped(txn, relid) {
                self.gathered.drops.insert(relid, at);
            }
        }
        Ok(())
    }
}

/// How many values a row of this operation has: old key, key, image.
pub(super) fn values(op: Op) -> usize {
    1 + usize::from(op == Op::UpdateKey) + usize::from(op != Op::Delete)
}

pub(super) fn put_value(out: &mut Vec<u8>, what: u8, desc: DescId) {
    out.push(what);
    out.extend_from_slice(&desc.to_le_bytes());
}

/// An entry's value taken apart: what, descriptor, rest.
pub(super) fn value(v: &[u8]) -> (u8, DescId, &[u8]) {
    let d = DescId::from_le_bytes(v[1..5].try_into().expect("an entry's value has five bytes"));
    (v[0], d, &v[5..])
}

fn begun(txn: Option<Begin>) -> Result<Begin> {
    txn.ok_or_else(|| Error::new(Kind::Verification, "a change stands before its transaction").code("malformed"))
}

pub(super) fn no_such_descriptor() -> Error {
    Error::new(Kind::Verification, "a row names a descriptor that its run does not list").code("malformed")
}

fn wrong_count(said: u32, found: u32) -> Error {
    Error::new(Kind::Verification, format!("a run says {said} rows and holds {found}")).code("malformed")
}

/// A run's header, owned.
pub(super) struct Header {
    seq: u64,
    pub tenant_kind: TenantKind,
    pub tenant_key: String,
    pub relations: Vec<u64>,
    pub rows: u32,
    rows_len: u64,
}

impl Header {
    pub fn of(h: &coffer_wire::RunHeader<'_>) -> Self {
        Self {
            seq: h.seq,
            tenant_kind: h.tenant_kind,
            tenant_key: h.tenant_key.to_owned(),
            relations: h.relation_ids().collect(),
            rows: h.rows,
            rows_len: h.rows_len,
        }
    }
}

/// Reads frames one after the other.
pub(super) struct Frames<'a> {
    pub input: &'a mut dyn Read,
    pub buf: Vec<u8>,
}

impl Frames<'_> {
    /// Kind and length of the next frame; `None` at the end.
    pub fn head(&mut self) -> Result<Option<(u8, usize)>> {
        self.buf.clear();
        self.buf.resize(5, 0);
        if !fill(self.input, &mut self.buf[..1], true)? {
            return Ok(None);
        }
        fill(self.input, &mut self.buf[1..], false)?;
        let len = u32::from_le_bytes([self.buf[1], self.buf[2], self.buf[3], self.buf[4]]) as usize;
        if len > MAX_FRAME && !matches!(self.buf[0], kind::RUN | NET_FRAME) {
            return Err(
                Error::new(Kind::Verification, format!("a frame says it is {len} bytes long")).code("malformed")
            );
        }
        Ok(Some((self.buf[0], len)))
    }

    /// The frame, header included.
    pub fn body(&mut self, len: usize) -> Result<&[u8]> {
        self.buf.resize(5 + len, 0);
        fill(self.input, &mut self.buf[5..], false)?;
        Ok(&self.buf)
    }

    /// The header of a RUN frame whose rows are not read yet.
    pub fn run_header(&mut self, len: usize) -> Result<Header> {
        let mut fixed = [0; 13];
        fill(self.input, &mut fixed, false)?;
        let seq = u64::from_le_bytes(fixed[..8].try_into().expect("eight bytes"));
        let malformed = |what: &str| Error::new(Kind::Verification, what.to_owned()).code("malformed");
        let tenant_kind = TenantKind::from_u8(fixed[8]).ok_or_else(|| malformed("a run of an unknown tenant kind"))?;
        let key_len = u32::from_le_bytes(fixed[9..].try_into().expect("four bytes")) as usize;
        if key_len > MAX_KEY {
            return Err(malformed("a run's tenant key is too long"));
        }
        let mut key = vec![0; key_len + 2];
        fill(self.input, &mut key, false)?;
        let n = usize::from(u16::from_le_bytes([key[key_len], key[key_len + 1]]));
        key.truncate(key_len);
        let tenant_key = String::from_utf8(key).map_err(|_| malformed("a run's tenant key is not UTF-8"))?;
        let mut rest = vec![0; n * 8 + 12];
        fill(self.input, &mut rest, false)?;
        let relations =
            rest[..n * 8].chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))).collect();
        let rows = u32::from_le_bytes(rest[n * 8..n * 8 + 4].try_into().expect("four bytes"));
        let rows_len = u64::from_le_bytes(rest[n * 8 + 4..].try_into().expect("eight bytes"));
        if (13 + key_len + 2 + rest.len()) as u64 + rows_len != len as u64 {
            return Err(malformed("a run's length is not that of its rows"));
        }
        Ok(Header { seq, tenant_kind, tenant_key, relations, rows, rows_len })
    }
}

/// Fills `out`; false when `may_end` and the input ended before the first byte.
pub(super) fn fill(input: &mut dyn Read, out: &mut [u8], may_end: bool) -> Result<bool> {
    let mut done = 0;
    while done < out.len() {
        match input.read(&mut out[done..]) {
            Ok(0) if done == 0 && may_end => return Ok(false),
            Ok(0) => {
                return Err(Error::new(Kind::Verification, "the input ends inside a frame").code("malformed"));
            }
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(from_io(e)),
        }
    }
    Ok(true)
}

/// Readers of sealed objects wrap our own error; give it back whole.
pub(crate) fn from_io(e: std::io::Error) -> Error {
    match e.downcast::<Error>() {
        Ok(ours) => ours,
        Err(e) => Error::new(Kind::Unreachable, "cannot read on").source(e),
    }
}

/// A value read from a streamed run.
pub(super) enum Value {
    Bytes(Vec<u8>),
    Built { encoded: Vec<u8>, key: Vec<u8> },
}

impl Value {
    pub fn part(&self) -> Part<'_> {
        match self {
            Self::Bytes(b) => Part::Line(b),
            Self::Built { encoded, key } => Part::Built { encoded: encoded.clone(), key: key.clone() },
        }
    }
}

/// How far a streamed run has been read.
pub(super) struct RunState {
    /// The rows are in RUN_DATA frames.
    framed: bool,
    in_frame: u64,
    pub left: u64,
}

impl RunState {
    pub fn new(h: &Header, framed: bool) -> Self {
        Self { framed, in_frame: if framed { 0 } else { h.rows_len }, left: h.rows_len }
    }

    /// For what is not in frames of its own.
    pub fn of_bytes(len: u64) -> Self {
        Self { framed: false, in_frame: len, left: len }
    }
}

/// The rows' bytes of a streamed run: the rest of a RUN frame, or the RUN_DATA frames that follow.
pub(super) struct RunBody<'a> {
    pub input: &'a mut dyn Read,
    pub s: &'a mut RunState,
}

impl RunBody<'_> {
    /// Operation and relation index of the next row.
    pub fn row_head(&mut self) -> Result<(Op, usize)> {
        let mut head = [0; 3];
        self.fill(&mut head)?;
        let op = match head[0] {
            1 => Op::Insert,
            2 => Op::Update,
            3 => Op::Delete,
            4 => Op::UpdateKey,
            5 => Op::Opaque,
            other => {
                return Err(Error::new(Kind::Verification, format!("unknown row operation {other}")).code("malformed"));
            }
        };
        Ok((op, usize::from(u16::from_le_bytes([head[1], head[2]]))))
    }

    /// Fills `out`.
    pub fn fill(&mut self, mut out: &mut [u8]) -> Result<()> {
        while !out.is_empty() {
            if self.s.in_frame == 0 {
                if !self.s.framed {
                    return Err(Error::new(Kind::Verification, "a row reaches beyond its run").code("malformed"));
                }
                let mut head = [0; 5];
                fill(self.input, &mut head, false)?;
                self.s.in_frame = u64::from(u32::from_le_bytes([head[1], head[2], head[3], head[4]]));
                if head[0] != kind::RUN_DATA || self.s.in_frame > self.s.left || self.s.in_frame == 0 {
                    return Err(Error::new(Kind::Verification, "a run's rows are not followed by the rest of them")
                        .code("malformed"));
                }
            }
            let n = out.len().min(usize::try_from(self.s.in_frame).unwrap_or(usize::MAX));
            let (now, later) = out.split_at_mut(n);
            fill(self.input, now, false)?;
            self.s.in_frame -= n as u64;
            self.s.left -= n as u64;
            out = later;
        }
        Ok(())
    }

    fn len(&mut self) -> Result<usize> {
        let mut len = [0; 4];
        self.fill(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len as u64 > self.s.left {
            return Err(Error::new(Kind::Verification, "a row reaches beyond its run").code("malformed"));
        }
        Ok(len)
    }

    /// A value of the row; `line` when it is an image, which may be large.
    pub fn value(&mut self, blobs: &Blobs, line: bool) -> Result<Value> {
        let mut len = self.len()?;
        if len <= if line { LARGE_LINE } else { MAX_KEY } {
            let mut b = vec![0; len];
            self.fill(&mut b)?;
            return Ok(Value::Bytes(b));
        }
        if !line {
            return Err(Error::new(Kind::Verification, format!("a row's key of {len} bytes")).code("malformed"));
        }
        let mut b = LineBuilder::new(blobs);
        let mut piece = vec![0; 64 << 10];
        while len > 0 {
            let n = len.min(piece.len());
            self.fill(&mut piece[..n])?;
            b.push(&piece[..n])?;
            len -= n;
        }
        let (encoded, key) = b.finish()?;
        Ok(Value::Built { encoded, key })
    }

    pub fn skip_value(&mut self) -> Result<()> {
        let mut len = self.len()?;
        let mut piece = vec![0; len.min(64 << 10)];
        while len > 0 {
            let n = len.min(piece.len());
            self.fill(&mut piece[..n])?;
            len -= n;
        }
        Ok(())
    }
}

/// Transactions up to an LSN, one tenant, every table: what most tests want.
#[derive(Clone, Copy, Debug)]
pub struct UpTo(pub Lsn);

impl Pick for UpTo {
    fn group(&mut self, _: &Begin, _: TenantKind, _: &str) -> Option<u32> {
        Some(0)
    }

    fn table(&mut self, txn: &Begin, _: u32) -> bool {
        txn.end_lsn <= self.0
    }
}
