//! What stands between the merge and where the rows go: the choice of tables by class, and counts.

use crate::error::{Error, Kind, Result};
use crate::merge::{Image, RowSink};
use coffer_wire::{Class, Lsn, Relation};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Rows of one table.
#[derive(Clone, Debug)]
pub struct TableRows {
    pub rel: Arc<Relation>,
    pub rows: u64,
}

/// A restore as others see it: how many rows passed, and whether it is wanted any longer. Clones are the same restore.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Rows of the target that were read. One in place may read them twice.
    pub rows: Arc<AtomicU64>,
    cancelled: Arc<AtomicBool>,
}

impl Watch {
    /// One that counts here.
    pub fn counting(rows: Arc<AtomicU64>) -> Self {
        Self { rows, ..Self::default() }
    }

    /// Ends the restore at its next row or step, unless its changes are committed by then.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// An error (code `cancelled`) when the restore is to end.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Refused, "the restore was cancelled; nothing was changed").code("cancelled"));
        }
        Ok(())
    }

    /// A row passes.
    pub(super) fn row(&self) -> Result<()> {
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

/// Rows of tables of these classes go on to the inner sink; all are counted.
pub struct Selected<'a> {
    classes: &'a [Class],
    inner: Option<&'a mut dyn RowSink>,
    counts: &'a mut Counts,
    taken: bool,
}

impl Counts {
    /// Counts that somebody watches.
    pub fn watched(watch: Watch) -> Self {
        Self { watch, ..Self::default() }
    }
}

impl<'a> Selected<'a> {
    /// `classes`: empty for all. Without an inner sink, rows are only counted.
    pub fn new(classes: &'a [Class], inner: Option<&'a mut dyn RowSink>, counts: &'a mut Counts) -> Self {
        Self { classes, inner, counts, taken: false }
    }
}

impl RowSink for Selected<'_> {
    fn last_change(&mut self, at: Lsn) {
        if let Some(i) = &mut self.inner {
            i.last_change(at);
        }
    }

    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.taken = self.classes.is_empty() || self.classes.contains(&rel.class);
        if self.taken {
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
        if let Some(t) = self.counts.tables.last_mut() {
            t.rows += 1;
        }
        self.counts.bytes += image.len() + 1;
        self.counts.watch.row()?;
        match &mut self.inner {
            Some(i) => i.row(key, image),
            None => Ok(()),
        }
    }

    fn end_table(&mut self) -> Result<()> {
        match &mut self.inner {
            Some(i) if self.taken => i.end_table(),
            _ => Ok(()),
        }
    }
}
