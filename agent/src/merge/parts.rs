//! Which parts of a full a merge need not read: those that no change touched.
//!
//! A part holds every row of its table from its first key up to the next part's. It is taken over as it is when no change
//! has a key in it, nothing emptied the table, and its rows look as they would if they were written now.

use super::intake::Gathered;
use super::key::{SortKey, put_row_key};
use super::sorter::Cursor;
use crate::error::Result;

/// A part of a full.
#[derive(Clone, Debug)]
pub struct KnownPart {
    pub relid: u32,
    /// The least key that it may hold ([`super::sort_key_of_row`]); `None`: any.
    pub first: Option<Vec<u8>>,
    /// The descriptors that its rows are under, encoded; empty: not known.
    pub relations: Vec<Vec<u8>>,
}

/// For each part, in the order of (relid, first), whether it has to be written anew.
pub(super) fn touched(
    gathered: &Gathered,
    mut changes: Box<dyn Cursor + '_>,
    group: u32,
    parts: &[KnownPart],
) -> Result<Vec<bool>> {
    let mut out = vec![false; parts.len()];
    let mut at = 0;
    let mut escaped = Vec::new();
    for table in parts.chunk_by(|a, b| a.relid == b.relid) {
        let relid = table[0].relid;
        let mine = &mut out[at..at + table.len()];
        at += table.len();
        // Changes of tables that the full does not have.
        skip(&mut *changes, |g, r| (g, r) < (group, relid))?;
        if looks_different(gathered, group, table)? {
            mine.fill(true);
            continue;
        }
        let firsts: Vec<Option<Vec<u8>>> = table
            .iter()
            .map(|p| {
                p.first.as_ref().map(|f| {
                    escaped.clear();
                    put_row_key(&mut escaped, f);
                    escaped.clone()
                })
            })
            .collect();
        let mut part = 0;
        while let Some((k, _)) = changes.entry() {
            let key = SortKey(k);
            if (key.group(), key.relid()) != (group, relid) {
                break;
            }
            let row = key.escaped_row_key();
            // What is below the first part's first key goes to the first part.
            while firsts.get(part + 1).is_some_and(|f| f.as_deref().is_none_or(|f| f <= row)) {
                part += 1;
            }
            mine[part] = true;
            changes.advance()?;
        }
    }
    Ok(out)
}

fn skip(changes: &mut dyn Cursor, below: impl Fn(u32, u32) -> bool) -> Result<()> {
    while let Some((k, _)) = changes.entry() {
        let key = SortKey(k);
        if !below(key.group(), key.relid()) {
            break;
        }
        changes.advance()?;
    }
    Ok(())
}

/// Whether the table's rows have to be written anew whatever their keys: it was emptied or dropped in part, its key is
/// made of other columns, its columns changed, or its rows have no key and may be there several times.
fn looks_different(gathered: &Gathered, group: u32, table: &[KnownPart]) -> Result<bool> {
    let relid = table[0].relid;
    if gathered.emptied(group, relid) {
        return Ok(true);
    }
    let changed = gathered.newest(relid).is_some();
    for part in table {
        if part.relations.is_empty() {
            return Ok(changed);
        }
        for encoded in &part.relations {
            let d = gathered.descriptors.add(encoded)?;
            let desc = gathered.descriptors.get(d);
            let leaf = desc.rel.leaf;
            if gathered.dropped(leaf)
                || gathered.newest_of_leaf(d) != d
                || changed && (desc.full_row() || !gathered.one_shape(relid, &desc.shape))
            {
                return Ok(true);
            }
            // A table that changed as a whole, while this leaf of it was not described anew.
            if let Some((_, newest)) = gathered.newest(relid)
                && !gathered.descriptors.alike(newest, d)
            {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
