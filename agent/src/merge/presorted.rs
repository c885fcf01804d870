//! Rows that are sorted already, of a full or of a base just read: they go past the sort and straight into the merge.

use super::descriptor::DescId;
use super::image::{self, LARGE_LINE, LineBuilder};
use super::intake::{self, Frames, Gathered, Header, RunBody, RunState, STREAM_ABOVE, Value, put_value, what};
use super::key::{self, Position, SUB_IN, SortKey};
use super::scratch::Blobs;
use super::sorter::Cursor;
use crate::error::{Error, Kind, Result};
use coffer_wire::{Frame, FrameReader, Op, RowReader, kind};
use std::collections::BTreeSet;
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};

/// A full's plaintext, whose it is and which of its tables count.
pub(super) struct Full {
    pub group: u32,
    pub input: Box<dyn Read + Send>,
    /// `None`: all.
    pub tables: Option<BTreeSet<u32>>,
    /// How many there must be of those that count, where that is known.
    pub rows: Option<u64>,
}

/// Rows of a base in the order of a full: by table, then by [`super::sort_key_of_row`].
pub trait SortedRows: Send {
    /// The next row; `None` at the end.
    fn next(&mut self) -> Result<Option<SortedRow<'_>>>;
}

/// A row of [`SortedRows`].
#[derive(Clone, Copy, Debug)]
pub struct SortedRow<'a> {
    pub desc: DescId,
    /// Empty for a table whose rows are told apart by the whole row.
    pub key: &'a [u8],
    pub line: &'a [u8],
}

/// Makes entries of rows and sees that they are in order.
pub(super) struct Placer<'a> {
    group: u32,
    gathered: &'a Gathered,
    blobs: &'a Blobs,
    rows: &'a AtomicU64,
    sort_key: Vec<u8>,
    last_key: Vec<u8>,
    value: Vec<u8>,
    ended: bool,
}

impl<'a> Placer<'a> {
    pub fn new(group: u32, gathered: &'a Gathered, blobs: &'a Blobs, rows: &'a AtomicU64) -> Self {
        Self {
            group,
            gathered,
            blobs,
            rows,
            sort_key: Vec::new(),
            last_key: Vec::new(),
            value: Vec::new(),
            ended: false,
        }
    }

    fn entry(&self) -> Option<(&[u8], &[u8])> {
        (!self.ended).then_some((self.sort_key.as_slice(), self.value.as_slice()))
    }

    fn set(&mut self, d: DescId, key: &[u8], line: &[u8]) -> Result<()> {
        if line.len() > LARGE_LINE {
            let mut b = LineBuilder::new(self.blobs);
            b.push(line)?;
            let (encoded, full_row) = b.finish()?;
            return self.set_built(d, key, &encoded, &full_row);
        }
        self.value.clear();
        put_value(&mut self.value, if image::line_has_hole(line) { what::PUT_HOLES } else { what::PUT }, d);
        image::put_line(&mut self.value, line);
        if self.gathered.descriptors.get(d).full_row() {
            self.set_key(d, &key::full_row_key_of(line))
        } else {
            self.set_key(d, key)
        }
    }

    fn set_built(&mut self, d: DescId, key: &[u8], encoded: &[u8], full_row: &[u8]) -> Result<()> {
        self.value.clear();
        put_value(&mut self.value, if image::has_hole(encoded) { what::PUT_HOLES } else { what::PUT }, d);
        self.value.extend_from_slice(encoded);
        let key = if self.gathered.descriptors.get(d).full_row() { full_row } else { key };
        self.set_key(d, key)
    }

    fn set_key(&mut self, d: DescId, key: &[u8]) -> Result<()> {
        let desc = self.gathered.descriptors.get(d);
        let relid = desc.rel.relid;
        let epoch = self.gathered.base_epoch(relid, &desc, d)?;
        std::mem::swap(&mut self.last_key, &mut self.sort_key);
        self.sort_key.clear();
        key::put_table(&mut self.sort_key, self.group, relid, epoch);
        key::put_row_key(&mut self.sort_key, key);
        key::put_position(&mut self.sort_key, Position::BASE, SUB_IN);
        self.rows.fetch_add(1, Ordering::Relaxed);
        let out_of_order = !self.last_key.is_empty()
            && match self.sort_key.cmp(&self.last_key) {
                std::cmp::Ordering::Less => true,
                std::cmp::Ordering::Equal => !desc.full_row(),
                std::cmp::Ordering::Greater => false,
            };
        if out_of_order {
            let mut key = Vec::new();
            SortKey(&self.sort_key).row_key(&mut key);
            return Err(Error::new(
                Kind::Verification,
                format!(
                    "the rows of {} are not in order at key {}",
                    desc.rel.qualified(),
                    String::from_utf8_lossy(&key)
                ),
            )
            .code("malformed"));
        }
        Ok(())
    }
}

/// [`SortedRows`] as a cursor.
pub(super) struct RowsCursor<'a> {
    rows: Box<dyn SortedRows>,
    at: Placer<'a>,
}

impl<'a> RowsCursor<'a> {
    pub fn new(rows: Box<dyn SortedRows>, at: Placer<'a>) -> Result<Self> {
        let mut c = Self { rows, at };
        c.advance()?;
        Ok(c)
    }
}

impl Cursor for RowsCursor<'_> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.at.entry()
    }

    fn advance(&mut self) -> Result<()> {
        match self.rows.next()? {
            Some(r) => self.at.set(r.desc, r.key, r.line),
            None => {
                self.at.ended = true;
                Ok(())
            }
        }
    }
}

pub(super) struct FullCursor<'a> {
    full: Full,
    at: Placer<'a>,
    /// The frame whose rows are being read, and how far.
    frame: Vec<u8>,
    next_row: std::ops::Range<usize>,
    stream: Option<RunState>,
    taken: u64,
    /// The descriptors that the run's rows may name; `None`: of a table that does not count.
    descs: Vec<Option<DescId>>,
}

impl<'a> FullCursor<'a> {
    pub fn new(full: Full, at: Placer<'a>) -> Result<Self> {
        let mut c = Self { full, at, frame: Vec::new(), next_row: 0..0, stream: None, taken: 0, descs: Vec::new() };
        c.advance()?;
        Ok(c)
    }

    fn resolve(&self, ids: impl Iterator<Item = u64>) -> Result<Vec<Option<DescId>>> {
        ids.map(|id| {
            let d = self.at.gathered.descriptors.find(id)?;
            let relid = self.at.gathered.descriptors.relation(d).relid;
            Ok(self.full.tables.as_ref().is_none_or(|t| t.contains(&relid)).then_some(d))
        })
        .collect()
    }

    /// Reads the next frame; false at the end.
    fn next_frame(&mut self) -> Result<bool> {
        let mut frames = Frames { input: &mut *self.full.input, buf: std::mem::take(&mut self.frame) };
        let Some((k, len)) = frames.head()? else { return Ok(false) };
        if k == kind::RUN && len > STREAM_ABOVE {
            let header = frames.run_header(len)?;
            self.frame = frames.buf;
            self.descs = self.resolve(header.relations.iter().copied())?;
            self.stream = Some(RunState::new(&header, false));
            return Ok(true);
        }
        frames.body(len)?;
        self.frame = frames.buf;
        let frame = std::mem::take(&mut self.frame);
        let read = FrameReader::new(&frame).next().transpose()?;
        match read {
            Some(Frame::Relation(_, encoded)) => {
                self.at.gathered.descriptors.add(encoded)?;
            }
            Some(Frame::Run(run)) => {
                self.descs = self.resolve(run.header.relation_ids())?;
                self.next_row = frame.len() - run.data.len()..frame.len();
            }
            Some(Frame::RunOpen(h)) => {
                self.descs = self.resolve(h.relation_ids())?;
                self.stream = Some(RunState::new(&Header::of(&h), true));
            }
            Some(Frame::Begin(_) | Frame::Commit(_) | Frame::Hello(_)) => {}
            Some(_) | None => {
                return Err(
                    Error::new(Kind::Verification, "a full holds a frame that does not belong in it").code("malformed")
                );
            }
        }
        self.frame = frame;
        Ok(true)
    }

    /// Takes the next row, if the run at hand has one that counts.
    fn next_in_run(&mut self) -> Result<bool> {
        if let Some(mut state) = self.stream.take() {
            let mut body = RunBody { input: &mut *self.full.input, s: &mut state };
            while body.s.left > 0 {
                let (op, rel) = body.row_head()?;
                insert_only(op)?;
                let desc = *self.descs.get(rel).ok_or_else(intake::no_such_descriptor)?;
                let Some(desc) = desc else {
                    body.skip_value()?;
                    body.skip_value()?;
                    continue;
                };
                let key = body.value(self.at.blobs, false)?;
                let image = body.value(self.at.blobs, true)?;
                let Value::Bytes(key) = key else { return Err(intake::no_such_descriptor()) };
                match image {
                    Value::Bytes(line) => self.at.set(desc, &key, &line)?,
                    Value::Built { encoded, key: full_row } => self.at.set_built(desc, &key, &encoded, &full_row)?,
                }
                if state.left > 0 {
                    self.stream = Some(state);
                }
                return Ok(true);
            }
            return Ok(false);
        }
        while !self.next_row.is_empty() {
            let frame = std::mem::take(&mut self.frame);
            let mut reader = RowReader::new(&frame[self.next_row.clone()]);
            let row = reader.next().transpose()?;
            self.next_row.start += reader.position();
            let taken = match row {
                None => false,
                Some(row) => {
                    insert_only(row.op)?;
                    match *self.descs.get(usize::from(row.rel)).ok_or_else(intake::no_such_descriptor)? {
                        None => false,
                        Some(d) => {
                            self.at.set(d, row.key, row.image)?;
                            true
                        }
                    }
                }
            };
            self.frame = frame;
            if taken {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn insert_only(op: Op) -> Result<()> {
    if op == Op::Insert {
        return Ok(());
    }
    Err(Error::new(Kind::Verification, "a full holds a row that is not an insert").code("malformed"))
}

impl Cursor for FullCursor<'_> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.at.entry()
    }

    fn advance(&mut self) -> Result<()> {
        loop {
            if self.next_in_run()? {
                self.taken += 1;
                return Ok(());
            }
            if !self.next_frame()? {
                self.at.ended = true;
                return match self.full.rows {
                    Some(rows) if rows != self.taken => {
                        let what = format!("the parts of a full hold {} rows, its manifest says {rows}", self.taken);
                        Err(Error::new(Kind::Verification, what).code("malformed"))
                    }
                    _ => Ok(()),
                };
            }
        }
    }
}
