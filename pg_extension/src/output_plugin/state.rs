//! What one decoding session holds. It is freed with the decoding context, after an error too.

use super::options::Options;
use super::relations::Relations;
use super::rows::Scratch;
use super::stream::Stream;
use super::tags::Tags;
use crate::encoding::Encoding;
use crate::render::Source;
use crate::wal_message::Secret;
use pgrx::pg_sys;

/// See the head of this file.
pub struct State {
    pub options: Options,
    pub source: Source,
    pub relations: Relations,
    pub stream: Stream,
    pub tags: Tags,
    pub secret: Secret,
    pub scratch: Box<Scratch>,
    /// Where a row that is being rendered began: its group and the bytes there before it.
    pub mark: Option<(usize, usize)>,
    /// Tables for which this transaction has said that they are rewritten.
    pub rewritten: Vec<u32>,
    /// Changes since the last sign of life.
    pub skipped: u32,
    /// Emptied after each callback.
    pub per_change: pg_sys::MemoryContext,
    /// The option `tenant` is in the database's encoding until the first transaction, since converting it needs one.
    pub filter_converted: bool,
    /// What `settings::pin` answered.
    pub settings: Option<i32>,
}

impl State {
    /// # Safety
    /// Both contexts live as long as the state.
    pub unsafe fn new(options: Options, kept: pg_sys::MemoryContext, per_change: pg_sys::MemoryContext) -> Self {
        Self {
            options,
            source: Source { encoding: Encoding::of_database(), stored: false },
            relations: Relations::new(kept),
            stream: Stream::default(),
            tags: Tags::default(),
            secret: Secret::new(),
            scratch: Box::default(),
            mark: None,
            rewritten: Vec::new(),
            skipped: 0,
            per_change,
            filter_converted: false,
            settings: None,
        }
    }

    /// A transaction begins.
    pub fn begin(&mut self, txn: super::stream::Transaction) {
        self.tags.clear();
        self.rewritten.clear();
        self.mark = None;
        self.stream.begin(txn);
        if !self.filter_converted {
            self.filter_converted = true;
            if let Some(tenant) = &mut self.options.tenant {
                *tenant = self.source.encoding.convert(tenant).into_owned();
            }
        }
    }
}
