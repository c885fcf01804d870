//! Versions of one row, in their order, become the row: the rules of the merge.
//!
//! | version | effect |
//! |---|---|
//! | put | the row is this image |
//! | patch | fields that are not holes replace those of the row before |
//! | delete, move out | the row is gone |
//! | fill, move in | the row that arrives from another key; the fill beside it has what its holes stand for |
//! | anything before the last truncate or drop of its table | never happened |
//!
//! For tables whose rows are told apart by the whole row, puts and deletes of one image are counted.

use super::descriptor::DescId;
use super::image::{self, Image};
use super::intake::{self, Gathered, what};
use super::key::{Position, SortKey};
use super::scratch::Blobs;
use super::sorter::Cursor;
use crate::error::{Error, Kind, Result};

/// What to do with a row that has a hole nothing fills: its value came with the row from another tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// Refuse; the error names the row.
    Refuse,
    /// Leave the value NULL and count the row.
    Null,
    /// Pass the hole on: for fulls, where a later change may fill it.
    Keep,
}

/// Counts of one merge.
#[derive(Clone, Debug, Default)]
pub struct FoldStats {
    /// Rows given to the sink.
    pub rows: u64,
    /// Rows with a hole that nothing filled.
    pub incomplete: u64,
    /// Changes of a row that was not there. Not an error: capture may have started between.
    pub unmatched: u64,
    /// Rows of a base with a key that another row of it has: the source's index is damaged.
    pub duplicates: u64,
}

/// A row as the fold leaves it.
pub(super) struct Folded<'a> {
    /// The sort key without its position.
    pub row: &'a [u8],
    pub at: Position,
    pub desc: DescId,
    pub image: &'a [u8],
    pub holes: bool,
}

/// The state of one row while its versions pass.
#[derive(Default)]
pub(super) struct State {
    pub live: bool,
    pub desc: DescId,
    pub at: Position,
    pub image: Vec<u8>,
    pub holes: bool,
    /// The move whose values the holes stand for.
    pub pred: Option<Position>,
    fill: Option<(DescId, Vec<u8>)>,
    /// For whole-row tables.
    count: i64,
    scratch: (Vec<u8>, Vec<u8>),
}

impl State {
    pub fn reset(&mut self) {
        self.live = false;
        self.fill = None;
        self.count = 0;
        self.holes = false;
        self.pred = None;
        self.image.clear();
    }

    fn set(&mut self, desc: DescId, at: Position, image: &[u8], holes: bool) {
        self.live = true;
        self.desc = desc;
        self.at = at;
        self.image.clear();
        self.image.extend_from_slice(image);
        self.holes = holes;
        self.pred = None;
    }

    /// `over` with its holes filled from `under`, as the new state.
    fn patch(&mut self, g: &Gathered, over: (DescId, &[u8]), under: (DescId, &[u8]), at: Position) -> Result<()> {
        let (projected, out) = (&mut self.scratch.0, &mut self.scratch.1);
        projected.clear();
        out.clear();
        g.descriptors.project(under.0, over.0, under.1, projected)?;
        self.holes = image::patch(over.1, projected, out)?;
        std::mem::swap(&mut self.image, out);
        self.desc = over.0;
        self.at = at;
        self.live = true;
        Ok(())
    }

    /// Takes one version. The caller has dropped those below the table's floor.
    pub fn apply(&mut self, g: &Gathered, at: Position, value: &[u8], stats: &mut FoldStats) -> Result<()> {
        let (w, desc, rest) = intake::value(value);
        match w {
            what::PUT | what::PUT_HOLES => {
                if self.live && at == Position::BASE {
                    stats.duplicates += 1;
                }
                self.set(desc, at, rest, w == what::PUT_HOLES);
            }
            what::PATCH => {
                if self.live {
                    let under = std::mem::take(&mut self.image);
                    self.patch(g, (desc, rest), (self.desc, &under), at)?;
                } else {
                    stats.unmatched += 1;
                    self.set(desc, at, rest, true);
                }
            }
            what::DELETE | what::MOVE_OUT => {
                stats.unmatched += u64::from(!self.live);
                self.live = false;
            }
            what::FILL => self.fill = Some((desc, rest.to_vec())),
            what::MOVE_IN => match self.fill.take() {
                Some((d, under)) => {
                    self.patch(g, (desc, rest), (d, &under), at)?;
                    self.pred = None;
                }
                None => {
                    self.set(desc, at, rest, true);
                    self.pred = Some(at);
                }
            },
            other => {
                return Err(Error::other(format!("the merge made an entry of kind {other}, which it cannot read")));
            }
        }
        Ok(())
    }

    /// The same for a table whose rows are counted.
    fn count(&mut self, at: Position, value: &[u8]) {
        let (w, desc, rest) = intake::value(value);
        if w == what::DELETE {
            self.count -= 1;
            return;
        }
        self.count += 1;
        if self.image.is_empty() {
            self.set(desc, at, rest, w == what::PUT_HOLES);
        }
        self.at = self.at.max(at);
    }
}

/// Folds the rows of one table, of one group, in one epoch.
pub(super) fn fold_table(
    g: &Gathered,
    input: &mut dyn Cursor,
    stats: &mut FoldStats,
    out: &mut dyn FnMut(&Folded<'_>) -> Result<()>,
) -> Result<()> {
    let mut row = Vec::new();
    let mut state = State::default();
    let mut full_row = false;
    loop {
        let next = input.entry();
        let same = next.is_some_and(|(k, _)| SortKey(k).row() == row);
        if !same {
            if !row.is_empty() {
                finish_row(&row, &mut state, full_row, stats, out)?;
            }
            let Some((k, v)) = next else { return Ok(()) };
            row.clear();
            row.extend_from_slice(SortKey(k).row());
            state.reset();
            full_row = g.descriptors.get(intake::value(v).1).full_row();
        }
        if let Some((k, v)) = input.entry() {
            let key = SortKey(k);
            let at = key.position();
            if at >= g.floor(key.group(), key.relid(), intake::value(v).1) {
                if full_row {
                    state.count(at, v);
                } else {
                    state.apply(g, at, v, stats)?;
                }
            }
        }
        input.advance()?;
    }
}

fn finish_row(
    row: &[u8],
    state: &mut State,
    full_row: bool,
    stats: &mut FoldStats,
    out: &mut dyn FnMut(&Folded<'_>) -> Result<()>,
) -> Result<()> {
    let times = if full_row {
        stats.unmatched += u64::try_from(-state.count).unwrap_or(0);
        state.count.max(0)
    } else {
        i64::from(state.live)
    };
    for _ in 0..times {
        out(&Folded { row, at: state.at, desc: state.desc, image: &state.image, holes: state.holes })?;
    }
    Ok(())
}

/// Brings a folded row under `to` and deals with its holes; the encoded image is in `out`.
pub(super) fn finish_image(
    g: &Gathered,
    blobs: &Blobs,
    folded: &Folded<'_>,
    to: DescId,
    holes: Holes,
    stats: &mut FoldStats,
    out: &mut Vec<u8>,
) -> Result<()> {
    out.clear();
    g.descriptors.project(folded.desc, to, folded.image, out)?;
    if !folded.holes || !image::has_hole(out) {
        return Ok(());
    }
    stats.incomplete += 1;
    match holes {
        Holes::Keep => Ok(()),
        Holes::Null => {
            let mut whole = Vec::new();
            image::holes_to_null(out, &mut whole);
            *out = whole;
            Ok(())
        }
        Holes::Refuse => {
            let rel = g.descriptors.relation(to);
            let column = Image::new(out, blobs)
                .fields()
                .iter()
                .position(|f| matches!(f, image::Field::Bytes(b) if *b == coffer_wire::copy_text::UNCHANGED))
                .and_then(|i| rel.image_columns().nth(i).map(|c| c.name.clone()))
                .unwrap_or_default();
            let mut key = Vec::new();
            super::key::row_key_of(folded.row, &mut key);
            Err(Error::new(
                Kind::Verification,
                format!(
                    "the value of {}.{column} in the row with key ({}) is not in this tenant's backup: the row came \
                     from another tenant and the value was stored out of line",
                    rel.qualified(),
                    String::from_utf8_lossy(&key).replace('\t', ", ")
                ),
            )
            .code("incomplete_row")
            .hint("choose a target after the table's next base, or add --allow-incomplete to leave such values NULL"))
        }
    }
}
