//! The merge: a tenant's data is a set of sorted runs of rows keyed by (table, key), as in an LSM tree, and this gives
//! the rows at a point.
//!
//! Compaction writes that stream to a file, restore writes it to COPY, verification digests it, a base is made with it.
//! There is one merge, with sinks.
//!
//! ```text
//!  changesets ─► intake ─► sorter ─┐                      moves: holes of rows whose key changed
//!  base rows  ─►                   ├─► k ways ─► fold ─►  epochs: the key is made of other columns than before
//!  fulls (sorted already) ─────────┘                 └─►  RowSink
//! ```
//!
//! ```ignore
//! let mut m = Merge::new(&scratch, memory)?;
//! m.full(0, full_plaintext, None);                       // or base_row, or sorted_rows
//! for plaintext in changesets { m.changes(&mut plaintext, &mut pick)?; }
//! m.run(&mut sink)?;
//! ```
//!
//! Memory is bounded by the caller's figure, whatever the size of the tenant, of a transaction or of a row; the rest is
//! in the scratch, sealed.
//!
//! Order: commit order by `end_lsn`, then the frame counter inside the transaction, then the row in its run.

mod check;
mod descriptor;
mod fold;
mod image;
mod intake;
mod key;
mod moves;
mod net;
mod parts;
mod parts_reader;
mod presorted;
mod scratch;
mod sorter;
mod tenant;
#[cfg(test)]
pub(crate) mod tests;

pub use check::{Checked, check};
pub use descriptor::{DescId, Descriptors};
pub use fold::Holes;
pub use image::{Field, Image};
pub(crate) use intake::from_io;
pub use intake::{IntakeStats, Pick, TXN_INDEX_FRAME, UpTo};
pub use key::Position;
pub use net::{NetSink, NetStats};
pub use parts::KnownPart;
pub use scratch::{BlobRef, Blobs, DEFAULT_SEGMENT_BYTES, Scratch};
pub use sorter::{Cursor, KWay, Sorted, Sorter};
pub use tenant::TenantAt;

use crate::error::{Error, Result};
use coffer_wire::{Lsn, Relation};
use fold::{FoldStats, Folded};
use intake::{Gathered, Intake, put_value, what};
use key::{SUB_IN, TABLE_LEN};
use presorted::{Full, FullCursor, Placer, RowsCursor};
pub use presorted::{SortedRow, SortedRows};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Takes the rows of a merge, sorted by group, table and key.
pub trait RowSink {
    /// Rows of this group follow. With one tenant there is one group, 0.
    fn begin_group(&mut self, _group: u32) -> Result<()> {
        Ok(())
    }

    /// Where the last change of the table that follows is; for one without changes, [`Lsn::ZERO`]. Its descriptor is that
    /// change's.
    fn last_change(&mut self, _at: Lsn) {}

    /// Rows of this table follow; their images hold `rel.image_columns()`. Called only for tables that have rows.
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()>;

    /// Rows of this leaf of the table follow, with images under this descriptor. Only with [`Merge::keep_leaves`].
    fn leaf(&mut self, _rel: &Arc<Relation>) -> Result<()> {
        Ok(())
    }

    /// A row. `key` is empty for a table whose rows are told apart by the whole row.
    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()>;

    fn end_table(&mut self) -> Result<()>;

    fn end_group(&mut self) -> Result<()> {
        Ok(())
    }
}

/// What a merge did.
#[derive(Clone, Debug, Default)]
pub struct MergeStats {
    /// Rows and changes read.
    pub read: u64,
    /// Rows given to the sink.
    pub rows: u64,
    pub truncates: u64,
    /// Rows with a value that is not in the input ([`Holes`]).
    pub incomplete: u64,
    /// Changes of rows that were not there.
    pub unmatched: u64,
    /// Rows of a base that shared their key with another.
    pub duplicates: u64,
    /// Changes that capture could not render, by table.
    pub opaque: BTreeMap<u32, u64>,
    /// Bytes written to the scratch.
    pub spilled: u64,
}

/// One merge. Give it descriptors, base rows, fulls and changes, then [`Merge::run`].
pub struct Merge {
    intake: Intake,
    fulls: Vec<Full>,
    rows: Vec<(u32, Box<dyn SortedRows>)>,
    scratch: Scratch,
    memory: usize,
    holes: Holes,
    keep_leaves: bool,
    /// The changes, once they are sorted.
    sorted: Option<Sorted>,
}

impl Merge {
    /// Uses about `memory` bytes of memory.
    pub fn new(scratch: &Scratch, memory: usize) -> Result<Self> {
        Ok(Self {
            intake: Intake::new(scratch, memory / 2)?,
            fulls: Vec::new(),
            rows: Vec::new(),
            scratch: scratch.clone(),
            memory,
            holes: Holes::Refuse,
            keep_leaves: false,
            sorted: None,
        })
    }

    /// One that becomes an incremental: it takes changes, and [`Merge::net`] writes what they come to.
    pub fn for_net(scratch: &Scratch, memory: usize) -> Result<Self> {
        let mut m = Self::new(scratch, memory)?;
        m.intake.for_net = true;
        Ok(m)
    }

    /// Writes what the changes come to: the plaintext of an incremental of this tenant, of what is after `after`.
    pub fn net(self, tenant: &crate::tenant::Tenant, after: Lsn, out: &mut dyn NetSink) -> Result<NetStats> {
        net::write(self.intake, tenant, after, out)
    }

    /// What to do with values that are not in the input; default [`Holes::Refuse`].
    pub fn on_holes(&mut self, holes: Holes) {
        self.holes = holes;
    }

    /// Rows of a partitioned table keep their leaf, which a later TRUNCATE of that leaf needs: for fulls.
    pub fn keep_leaves(&mut self) {
        self.keep_leaves = true;
    }

    /// Takes a descriptor ([`Relation::encode`]) in.
    pub fn relation(&mut self, encoded: &[u8]) -> Result<DescId> {
        self.intake.gathered.descriptors.add(encoded)
    }

    /// A row of a base, in any order: older than every change. `key` does not matter for whole-row tables. Base rows of
    /// a table come under one kind of key.
    pub fn base_row(&mut self, group: u32, desc: DescId, key: &[u8], line: &[u8]) -> Result<()> {
        self.intake.base_row(group, desc, key, line)
    }

    /// The same for a row that is not to be in memory whole: `next` appends the next piece of its line, and says
    /// whether there was one.
    pub fn base_row_in_pieces(
        &mut self,
        group: u32,
        desc: DescId,
        key: &[u8],
        next: &mut dyn FnMut(&mut Vec<u8>) -> Result<bool>,
    ) -> Result<()> {
        self.intake.base_row_in_pieces(group, desc, key, next)
    }

    /// A full's plaintext; its rows are read when the merge runs. `tables`: `None` for all of them.
    pub fn full(&mut self, group: u32, input: Box<dyn Read + Send>, tables: Option<BTreeSet<u32>>) {
        self.fulls.push(Full { group, input, tables, rows: None });
    }

    /// The same of parts of fulls, which have so many rows.
    pub fn parts(&mut self, group: u32, input: Box<dyn Read + Send>, rows: u64) {
        self.fulls.push(Full { group, input, tables: None, rows: Some(rows) });
    }

    /// Rows of a base that are sorted already; they are read when the merge runs.
    pub fn sorted_rows(&mut self, group: u32, rows: Box<dyn SortedRows>) {
        self.rows.push((group, rows));
    }

    /// Reads the plaintext of a changeset or a common object to its end. Inputs come in the order of their LSNs.
    pub fn changes(&mut self, input: &mut dyn Read, pick: &mut dyn Pick) -> Result<()> {
        self.intake.changes(input, pick)
    }

    /// What has been read so far.
    pub fn intake_stats(&self) -> &IntakeStats {
        &self.intake.gathered.stats
    }

    /// Of the parts of a full, in the order of (relid, first): which have rows that a change touched, or that have to be
    /// written anew for another reason. No changes come after this.
    pub fn touched(&mut self, group: u32, parts: &[KnownPart]) -> Result<Vec<bool>> {
        self.intake.gathered.settle();
        if self.sorted.is_none() {
            let none = Sorter::new(&self.scratch, 0);
            self.sorted = Some(std::mem::replace(&mut self.intake.sorter, none).finish()?);
        }
        let sorted = self.sorted.as_ref().expect("it was just sorted");
        parts::touched(&self.intake.gathered, sorted.cursor()?, group, parts)
    }

    /// Gives all rows to the sink.
    pub fn run(self, sink: &mut dyn RowSink) -> Result<MergeStats> {
        let Self { intake, fulls, rows, scratch, memory, holes, keep_leaves, sorted } = self;
        let Intake { sorter, blobs, mut gathered, .. } = intake;
        gathered.settle();
        let sorted = match sorted {
            Some(s) => s,
            None => sorter.finish()?,
        };
        let full_rows = AtomicU64::new(0);
        let mut cursors = vec![sorted.cursor()?];
        for f in fulls {
            let at = Placer::new(f.group, &gathered, &blobs, &full_rows);
            cursors.push(Box::new(FullCursor::new(f, at)?));
        }
        for (group, r) in rows {
            cursors.push(Box::new(RowsCursor::new(r, Placer::new(group, &gathered, &blobs, &full_rows))?));
        }
        let mut run = Running {
            g: &gathered,
            blobs: &blobs,
            scratch: scratch.clone().for_memory(memory / 4),
            memory: memory / 4,
            holes,
            keep_leaves,
            stats: FoldStats::default(),
            out: Output { sink, group: None, table: None, leaf: None, key: Vec::new() },
            image: Vec::new(),
        };
        run.all(&mut KWay::new(cursors))?;
        let stats = std::mem::take(&mut run.stats);
        Ok(MergeStats {
            read: gathered.stats.rows + full_rows.load(Ordering::Relaxed),
            rows: stats.rows,
            truncates: gathered.stats.truncates,
            incomplete: stats.incomplete,
            unmatched: stats.unmatched,
            duplicates: stats.duplicates,
            opaque: gathered.stats.opaque.clone(),
            spilled: scratch.bytes_written(),
        })
    }
}

/// The sink, and what it has been told.
struct Output<'a> {
    sink: &'a mut dyn RowSink,
    group: Option<u32>,
    table: Option<u32>,
    /// The descriptor of the leaf, where the sink wants to know.
    leaf: Option<DescId>,
    key: Vec<u8>,
}

impl Output<'_> {
    fn end_table(&mut self) -> Result<()> {
        if self.table.take().is_some() {
            self.sink.end_table()?;
        }
        Ok(())
    }

    fn end_group(&mut self) -> Result<()> {
        self.end_table()?;
        if self.group.take().is_some() {
            self.sink.end_group()?;
        }
        Ok(())
    }

    fn row(
        &mut self,
        row: &[u8],
        rel: &Arc<Relation>,
        leaf: Option<(DescId, &Arc<Relation>)>,
        last_change: Lsn,
        image: &Image<'_>,
    ) -> Result<()> {
        let group = u32::from_be_bytes(row[..4].try_into().expect("sort keys start with twelve bytes"));
        if self.group != Some(group) {
            self.end_group()?;
            self.group = Some(group);
            self.sink.begin_group(group)?;
        }
        if self.table != Some(rel.relid) {
            self.end_table()?;
            self.table = Some(rel.relid);
            self.leaf = None;
            self.sink.last_change(last_change);
            self.sink.begin_table(rel)?;
        }
        if let Some((d, rel)) = leaf
            && self.leaf != Some(d)
        {
            self.leaf = Some(d);
            self.sink.leaf(rel)?;
        }
        self.key.clear();
        if rel.key_mode == coffer_wire::KeyMode::Key {
            key::row_key_of(row, &mut self.key);
        }
        self.sink.row(&self.key, image)
    }
}

/// A merge under way.
struct Running<'a> {
    g: &'a Gathered,
    blobs: &'a Blobs,
    scratch: Scratch,
    /// For each of the moves and the carry.
    memory: usize,
    holes: Holes,
    keep_leaves: bool,
    stats: FoldStats,
    out: Output<'a>,
    image: Vec<u8>,
}

impl Running<'_> {
    /// Table by table, epoch by epoch. What an epoch leaves is carried into the next one under its key.
    fn all(&mut self, main: &mut dyn Cursor) -> Result<()> {
        let mut carry: Option<([u8; TABLE_LEN], Sorted)> = None;
        loop {
            let carried = carry.take();
            let table: [u8; TABLE_LEN] = match (&carried, main.entry()) {
                (Some((t, _)), _) => *t,
                (None, Some((k, _))) => k[..TABLE_LEN].try_into().expect("sort keys start with twelve bytes"),
                (None, None) => break,
            };
            let mut cursors: Vec<Box<dyn Cursor + '_>> = vec![Box::new(Within { inner: main, table })];
            if let Some((_, sorted)) = &carried {
                cursors.push(sorted.cursor()?);
            }
            carry = self.table(table, &mut KWay::new(cursors))?;
        }
        self.out.end_group()
    }

    fn table(&mut self, table: [u8; TABLE_LEN], input: &mut dyn Cursor) -> Result<Option<([u8; TABLE_LEN], Sorted)>> {
        let (relid, epoch) = {
            let read = |i: usize| u32::from_be_bytes(table[i..i + 4].try_into().expect("four of twelve bytes"));
            (read(4), read(8))
        };
        if self.g.moves.contains(&(relid, epoch)) {
            let resolved = moves::resolve(self.g, input, &self.scratch, self.memory)?;
            return self.fold(table, relid, epoch, &mut resolved.cursor()?);
        }
        self.fold(table, relid, epoch, input)
    }

    fn fold(
        &mut self,
        table: [u8; TABLE_LEN],
        relid: u32,
        epoch: u32,
        input: &mut dyn Cursor,
    ) -> Result<Option<([u8; TABLE_LEN], Sorted)>> {
        let (g, blobs, holes, keep_leaves) = (self.g, self.blobs, self.holes, self.keep_leaves);
        let mut stats = std::mem::take(&mut self.stats);
        let mut carry = None;
        let result = if epoch < g.last_epoch(relid) {
            let next = epoch + 1;
            let to = g.of_epoch(relid, next).ok_or_else(|| Error::other("the merge lost count of a table's keys"))?;
            let mut sorter = Sorter::new(&self.scratch, self.memory);
            let (mut sort_key, mut value) = (Vec::new(), Vec::new());
            let mut by_leaf = HashMap::new();
            let r = fold::fold_table(g, input, &mut stats, &mut |row| {
                // A row stays in its leaf.
                let to = match by_leaf.get(&row.desc) {
                    Some(d) => *d,
                    None => {
                        let d = g.descriptors.in_leaf_of(to, row.desc)?;
                        by_leaf.insert(row.desc, d);
                        d
                    }
                };
                rekey(g, blobs, row, to, next, &mut sort_key, &mut value)?;
                sorter.push(&sort_key, &value)
            });
            let mut key = table;
            key[8..].copy_from_slice(&next.to_be_bytes());
            carry = Some((key, sorter));
            r
        } else {
            let newest = g.newest(relid);
            let last_change = newest.map_or(Lsn::ZERO, |(p, _)| p.end_lsn);
            let (out, image) = (&mut self.out, &mut self.image);
            let mut extra = FoldStats::default();
            let mut leaves = HashMap::new();
            let r = fold::fold_table(g, input, &mut stats, &mut |row: &Folded<'_>| {
                let table = newest.map_or(row.desc, |(_, d)| d);
                let to = if keep_leaves { leaf_under(g, &mut leaves, table, row.desc)? } else { table };
                fold::finish_image(g, blobs, row, to, holes, &mut extra, image)?;
                extra.rows += 1;
                let (rel, leaf_rel) = (g.descriptors.relation(table), g.descriptors.relation(to));
                let leaf = keep_leaves.then_some((to, &leaf_rel));
                out.row(row.row, &rel, leaf, last_change, &Image::new(image, blobs))
            });
            stats.rows += extra.rows;
            stats.incomplete += extra.incomplete;
            r
        };
        self.stats = stats;
        result?;
        carry.map(|(k, s)| Ok((k, s.finish()?))).transpose()
    }
}

/// The descriptor that a row of a full is written under: its leaf's newest, or the table's with that leaf where the two
/// are not alike. A change that nobody marked describes only the leaves that rows came for, and a reader takes the first
/// row's descriptor for the whole table's.
fn leaf_under(g: &Gathered, known: &mut HashMap<DescId, DescId>, table: DescId, row: DescId) -> Result<DescId> {
    if let Some(d) = known.get(&row) {
        return Ok(*d);
    }
    let newest = g.newest_of_leaf(row);
    let d = if g.descriptors.alike(table, newest) {
        newest
    } else {
        let leaf = g.descriptors.relation(newest).leaf;
        g.descriptors.add(&Relation { leaf, ..(*g.descriptors.relation(table)).clone() }.encode())?
    };
    known.insert(row, d);
    Ok(d)
}

/// A row of one epoch as an entry of the next: its image under the next epoch's descriptor, its key from that image.
fn rekey(
    g: &Gathered,
    blobs: &Blobs,
    row: &Folded<'_>,
    to: DescId,
    epoch: u32,
    sort_key: &mut Vec<u8>,
    value: &mut Vec<u8>,
) -> Result<()> {
    value.clear();
    put_value(value, if row.holes { what::PUT_HOLES } else { what::PUT }, to);
    g.descriptors.project(row.desc, to, row.image, value)?;
    let key = g.descriptors.key_of(to, Image::new(&value[5..], blobs))?;
    sort_key.clear();
    sort_key.extend_from_slice(&row.row[..8]);
    sort_key.extend_from_slice(&epoch.to_be_bytes());
    key::put_row_key(sort_key, &key);
    key::put_position(sort_key, row.at, SUB_IN);
    Ok(())
}

/// The entries of one table of a longer cursor.
struct Within<'a> {
    inner: &'a mut dyn Cursor,
    table: [u8; TABLE_LEN],
}

impl Cursor for Within<'_> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.inner.entry().filter(|(k, _)| k[..TABLE_LEN] == self.table)
    }

    fn advance(&mut self) -> Result<()> {
        self.inner.advance()
    }
}

/// What orders the rows of a table in a full: the key or, for a table whose rows are told apart by the whole row, the
/// image (cut and hashed when it is long).
pub fn sort_key_of_row<'a>(mode: coffer_wire::KeyMode, key: &'a [u8], line: &'a [u8]) -> std::borrow::Cow<'a, [u8]> {
    match mode {
        coffer_wire::KeyMode::Key => key.into(),
        coffer_wire::KeyMode::FullRow => key::full_row_key_of(line).into(),
    }
}
