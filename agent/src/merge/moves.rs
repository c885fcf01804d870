//! Rows that changed their key and left values behind.
//!
//! An UPDATE of the key logs no out-of-line value that it did not touch, so the row at the new key has holes that only
//! the row at the old key can fill; and that row may itself have come from a third key. The sort is by key, so the two
//! are far apart. Moves form chains in time (a row that arrived leaves at most once), so they are resolved in the order
//! of their positions, each handing what it knows to the next move of its chain through a queue of messages into the
//! future: time-forward processing. Everything is sorted and queued in the scratch, whatever the length of the chains.

use super::fold::{FoldStats, State};
use super::image;
use super::intake::{self, Gathered, put_value, what};
use super::key::{self, Position, SUB_FILL, SUB_OUT, SortKey};
use super::scratch::{Scratch, ScratchFile};
use super::sorter::{Cursor, KWay, RunCursor, RunWriter, Sorted, Sorter};
use crate::error::Result;
use std::collections::BTreeMap;

/// Where the message of a move comes in the sorted steps: before the move itself.
const NEXT: u8 = 0;
const MOVE: u8 = 1;
/// Position bytes without the sub-position.
const AT: usize = key::POSITION_LEN - 1;

/// The entries of a table once its moves are resolved: what came in, and the fills.
pub(super) struct Resolved {
    entries: Sorted,
    fills: Sorted,
}

impl Resolved {
    pub fn cursor(&self) -> Result<KWay<Box<dyn Cursor + '_>>> {
        Ok(KWay::new(vec![self.entries.cursor()?, self.fills.cursor()?]))
    }
}

/// Reads the entries of one table of one group in one epoch and finds what fills its holes.
pub(super) fn resolve(g: &Gathered, input: &mut dyn Cursor, scratch: &Scratch, memory: usize) -> Result<Resolved> {
    let mut table = [0; key::TABLE_LEN];
    if let Some((k, _)) = input.entry() {
        table.copy_from_slice(&k[..key::TABLE_LEN]);
    }
    let scratch = scratch.clone().for_memory(memory / 4);
    let (entries, steps) = trace(g, input, &scratch, memory / 4)?;
    let fills = forward(g, &table, &steps, &scratch, memory / 4)?;
    Ok(Resolved { entries, fills })
}

/// Folds each row far enough to know what leaves with it, and keeps a copy of the entries.
fn trace(g: &Gathered, input: &mut dyn Cursor, scratch: &Scratch, memory: usize) -> Result<(Sorted, Sorted)> {
    let mut copy = RunWriter::new(scratch)?;
    let mut steps = Sorter::new(scratch, memory);
    let mut row = Vec::new();
    let mut state = State::default();
    // What is wrong with the rows is counted when they are folded for good.
    let mut uncounted = FoldStats::default();
    let (mut k2, mut v2) = (Vec::new(), Vec::new());
    while let Some((k, v)) = input.entry() {
        copy.push(k, v)?;
        let key = SortKey(k);
        if key.row() != row {
            row.clear();
            row.extend_from_slice(key.row());
            state.reset();
        }
        let (w, desc, rest) = intake::value(v);
        let at = key.position();
        if at >= g.floor(key.group(), key.relid(), desc) {
            if w == what::MOVE_OUT && state.live {
                let pred = state.pred.filter(|_| state.holes);
                step_key(&mut k2, at, MOVE);
                v2.clear();
                v2.push(u8::from(pred.is_some()));
                v2.extend_from_slice(&state.desc.to_le_bytes());
                v2.extend_from_slice(&(rest.len() as u32).to_le_bytes());
                v2.extend_from_slice(rest);
                v2.extend_from_slice(&state.image);
                steps.push(&k2, &v2)?;
                if let Some(pred) = pred {
                    step_key(&mut k2, pred, NEXT);
                    v2.clear();
                    key::put_position(&mut v2, at, 0);
                    steps.push(&k2, &v2)?;
                }
            }
            // A patch leaves the holes that it does not fill to the same move.
            state.apply(g, at, v, &mut uncounted)?;
        }
        input.advance()?;
    }
    Ok((Sorted::of_run(copy.finish()?), steps.finish()?))
}

fn step_key(out: &mut Vec<u8>, at: Position, kind: u8) {
    out.clear();
    key::put_position(out, at, kind);
}

/// Goes through the moves in the order of time.
fn forward(
    g: &Gathered,
    table: &[u8; key::TABLE_LEN],
    steps: &Sorted,
    scratch: &Scratch,
    memory: usize,
) -> Result<Sorted> {
    let mut fills = Sorter::new(scratch, memory);
    let mut queue = Messages::new(scratch, memory);
    let mut steps = steps.cursor()?;
    let (mut next, mut fill_key, mut fill, mut projected) = (None, Vec::new(), Vec::new(), Vec::new());
    while let Some((k, v)) = steps.entry() {
        let at = key::read_position(k);
        if k[AT] == NEXT {
            next = Some((at, key::read_position(v)));
            steps.advance()?;
            continue;
        }
        let waits = v[0] == 1;
        let desc = u32::from_le_bytes(v[1..5].try_into().expect("a step has nine bytes"));
        let key_len = u32::from_le_bytes(v[5..9].try_into().expect("a step has nine bytes")) as usize;
        let (new_key, image) = v[9..].split_at(key_len);
        fill.clear();
        put_value(&mut fill, what::FILL, desc);
        match if waits { queue.take(at)? } else { None } {
            Some(message) => {
                let (_, d, under) = intake::value(&message);
                projected.clear();
                g.descriptors.project(d, desc, under, &mut projected)?;
                image::patch(image, &projected, &mut fill)?;
            }
            None => fill.extend_from_slice(image),
        }
        fill_key.clear();
        fill_key.extend_from_slice(table);
        key::put_row_key(&mut fill_key, new_key);
        key::put_position(&mut fill_key, at, SUB_FILL);
        fills.push(&fill_key, &fill)?;
        if let Some((of, to)) = next.take()
            && of == at
        {
            queue.send(to, &fill)?;
        }
        steps.advance()?;
    }
    fills.finish()
}

/// Messages to later positions, in bounded memory.
struct Messages {
    scratch: Scratch,
    memory: usize,
    held: BTreeMap<Position, Vec<u8>>,
    bytes: usize,
    runs: Vec<RunCursor>,
}

/// More runs than this become one.
const MAX_RUNS: usize = 16;

impl Messages {
    fn new(scratch: &Scratch, memory: usize) -> Self {
        Self { scratch: scratch.clone(), memory, held: BTreeMap::new(), bytes: 0, runs: Vec::new() }
    }

    fn send(&mut self, to: Position, message: &[u8]) -> Result<()> {
        self.bytes += message.len() + 100;
        self.held.insert(to, message.to_vec());
        if self.bytes <= self.memory {
            return Ok(());
        }
        let mut w = RunWriter::new(&self.scratch)?;
        let mut k = Vec::new();
        for (to, m) in std::mem::take(&mut self.held) {
            step_key(&mut k, to, 0);
            w.push(&k, &m)?;
        }
        self.bytes = 0;
        self.add_run(&w.finish()?)
    }

    fn add_run(&mut self, run: &ScratchFile) -> Result<()> {
        self.runs.push(RunCursor::new(run)?);
        if self.runs.len() <= MAX_RUNS {
            return Ok(());
        }
        let mut w = RunWriter::new(&self.scratch)?;
        let mut all = KWay::new(std::mem::take(&mut self.runs));
        while let Some((k, m)) = all.entry() {
            w.push(k, m)?;
            all.advance()?;
        }
        self.runs.push(RunCursor::new(&w.finish()?)?);
        Ok(())
    }

    /// The message to this position. Positions are asked for in ascending order.
    fn take(&mut self, at: Position) -> Result<Option<Vec<u8>>> {
        if let Some(m) = self.held.remove(&at) {
            self.bytes -= m.len() + 100;
            return Ok(Some(m));
        }
        for r in &mut self.runs {
            while let Some((k, m)) = r.entry() {
                let to = key::read_position(k);
                if to > at {
                    break;
                }
                let found = (to == at).then(|| m.to_vec());
                r.advance()?;
                if found.is_some() {
                    return Ok(found);
                }
            }
        }
        self.runs.retain(|r| r.entry().is_some());
        Ok(None)
    }
}

const _: () = assert!(SUB_OUT < SUB_FILL);
