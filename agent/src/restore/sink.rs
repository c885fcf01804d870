//! What stands between the merge and where the rows go: the choice of tables by class, and counts.

use crate::error::{Error, Kind, Result};
use crate::merge::{Image, RowSink};
use crate::restore::keys::{self, RowKey};
use crate::restore::rename::{Rename, RenameRow};
use crate::tenant::Tenant;
use coffer_wire::{Class, Lsn, Relation};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Rows of one table.
#[derive(Clone, Debug)]
pub struct TableRows {
    pub rel: Arc<Relation>,
    pub rows: u64,
}

/// A restore, or a full that is being made, as others see it: how many rows passed, and whether it is wanted any longer.
/// Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Rows of the target that were read. A restore in place may read them twice.
    pub rows: Arc<AtomicU64>,
    cancelled: Arc<AtomicBool>,
}

impl Watch {
    /// One that counts here.
    pub fn counting(rows: Arc<AtomicU64>) -> Self {
        Self { rows, ..Self::default() }
    }

    /// Ends it at its next row or step, unless what it makes is committed by then.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// An error (code `cancelled`) when it is to end.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Refused, "it was cancelled; nothing was changed").code("cancelled"));
        }
        Ok(())
    }

    /// A row passes.
    pub(crate) fn row(&self) -> Result<()> {
        self.rows.fetch_add(1, Ordering::Relaxed);
        self.check()
    }
}

/// Counts what passes.
#[derive(Default)]
pub struct Counts {
    pub tables: Vec<TableRows>,
    pub bytes: u64,
    watch: Watch,
}

/// Which of the tenant's rows are wanted.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Empty: all.
    pub classes: Vec<Class>,
    /// Of the one table that is restored; empty: all of its rows.
    pub keys: Vec<RowKey>,
    /// Whose keys they are.
    pub tenant: Option<Tenant>,
    /// The rows go out under another tenant's key.
    pub rename: Option<Arc<Rename>>,
}

impl Selection {
    /// What becomes of a table's rows.
    pub(super) fn of_table(&self, rel: &Relation) -> Result<Filter> {
        let keys = match &self.tenant {
            Some(t) if !self.keys.is_empty() => Some(keys::bytes_of(&self.keys, rel, t)?),
            _ => None,
        };
        let rename = match &self.rename {
            Some(r) => r.of_table(rel)?.map(|row| (r.clone(), row)),
            None => None,
        };
        Ok(Filter { keys, rename, out: Default::default() })
    }
}

/// What becomes of the rows of one table.
#[derive(Default)]
pub(super) struct Filter {
    /// `None`: all are wanted.
    keys: Option<HashSet<Vec<u8>>>,
    rename: Option<(Arc<Rename>, RenameRow)>,
    /// Key and image of a row that is written anew.
    out: (Vec<u8>, Vec<u8>),
}

impl Filter {
    /// Gives the row to `to` if it is wanted, as it is wanted; whether it was.
    pub fn row(
        &mut self,
        key: &[u8],
        image: &Image<'_>,
        to: &mut dyn FnMut(&[u8], &Image<'_>) -> Result<()>,
    ) -> Result<bool> {
        if self.keys.as_ref().is_some_and(|k| !k.contains(key)) {
            return Ok(false);
        }
        match &self.rename {
            None => to(key, image)?,
            Some((rename, row)) => {
                let (key, image) = row.row(rename, key, image, &mut self.out)?;
                to(key, &image)?;
            }
        }
        Ok(true)
    }
}

/// The selected rows go on to the inner sink, and are counted.
pub struct Selected<'a> {
    selection: &'a Selection,
    inner: Option<&'a mut dyn RowSink>,
    counts: &'a mut Counts,
    taken: bool,
    /// Of the table at hand.
    filter: Filter,
}

impl Counts {
    /// Counts that somebody watches.
    pub fn watched(watch: Watch) -> Self {
        Self { watch, ..Self::default() }
    }
}

impl<'a> Selected<'a> {
    /// Without an inner sink, rows are only counted.
    pub fn new(selection: &'a Selection, inner: Option<&'a mut dyn RowSink>, counts: &'a mut Counts) -> Self {
        Self { selection, inner, counts, taken: false, filter: Filter::default() }
    }
}

impl RowSink for Selected<'_> {
    fn last_change(&mut self, at: Lsn) {
        if let Some(i) = &mut self.inner {
            i.last_change(at);
        }
    }

    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        let classes = &self.selection.classes;
        self.taken = classes.is_empty() || classes.contains(&rel.class);
        if self.taken {
            self.filter = self.selection.of_table(rel)?;
            self.counts.tables.push(TableRows { rel: rel.clone(), rows: 0 });
            if let Some(i) = &mut self.inner {
                i.begin_table(rel)?;
            }
        }
        Ok(())
    }

    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        if !self.taken {
            return Ok(());
        }
        let (inner, counts) = (&mut self.inner, &mut *self.counts);
        self.filter.row(key, image, &mut |key, image| {
            if let Some(t) = counts.tables.last_mut() {
                t.rows += 1;
            }
            counts.bytes += image.len() + 1;
            counts.watch.row()?;
            match inner {
                Some(i) => i.row(key, image),
                None => Ok(()),
            }
        })?;
        Ok(())
    }

    fn end_table(&mut self) -> Result<()> {
        match &mut self.inner {
            Some(i) if self.taken => i.end_table(),
            _ => Ok(()),
        }
    }
}
