//! Bringing a store that lags up to date: record by record, data before record.

use super::descriptor::Descriptor;
use super::io::PART_BYTES;
use super::log::open_record;
use super::packs::{Elsewhere, Shelf};
use super::store::{Created, Store};
use super::{LogRecord, Member, ObjectRef, Repository, paths};
use crate::catalog::{self, Floors};
use crate::crypto::{ObjectKind, Sha256, hex};
use crate::error::{Error, Kind, Result};
use crate::tenant::Tenant;
use bytes::Bytes;
use coffer_wire::{Lsn, TenantKind};
use futures::{StreamExt, stream};
use object_store::PutPayload;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// Objects copied at a time.
const PARALLEL: usize = 8;
/// The copier looks at least this often; it is woken when the log grows.
const IDLE: Duration = Duration::from_secs(30);
/// Wait after a store failed.
const AFTER_FAILURE: Duration = Duration::from_secs(15);

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    pub records: u64,
    pub objects: u64,
    pub bytes: u64,
}

impl Repository {
    /// Keeps the optional stores up to date for as long as it is polled; never returns.
    pub async fn replicate_optional(self: &Arc<Self>, source: Uuid) {
        let optional: Vec<&Member> = self.members.iter().filter(|m| !m.store.required()).collect();
        futures::future::join_all(optional.into_iter().map(|m| async move {
            loop {
                let grown = self.grown.notified();
                match self.bring_up(m, source).await {
                    Ok(c) if c.records > 0 => {
                        tracing::debug!(
                            "store {}: {} records, {} objects copied",
                            m.store.name(),
                            c.records,
                            c.objects
                        );
                    }
                    Ok(_) => {}
                    Err(e) => {
                        tracing::warn!("store {} lags: {e}", m.store.name());
                        tokio::time::sleep(AFTER_FAILURE).await;
                        continue;
                    }
                }
                let _ = tokio::time::timeout(IDLE, grown).await;
            }
        }))
        .await;
    }

    /// Brings one store to the highest head among all, once. A store that holds nothing yet is taken into the repository.
    pub async fn replicate_to(self: &Arc<Self>, name: &str, source: Uuid) -> Result<Copied> {
        let m = self
            .members
            .iter()
            .find(|m| m.store.name() == name)
            .ok_or_else(|| Error::usage(format!("there is no store '{name}'")))?;
        self.bring_up(m, source).await
    }

    async fn bring_up(self: &Arc<Self>, m: &Member, source: Uuid) -> Result<Copied> {
        if !m.attached() {
            match self.attach(m).await {
                Ok(()) => {}
                Err(e) if e.kind() == Kind::NotFound => self.adopt(m).await?,
                Err(e) => return Err(e),
            }
        }
        let end = self.end_of_log(source).await?;
        let copied = self.catch_up(m, source, end).await?;
        self.catch_up_catalogs(m, source).await?;
        Ok(copied)
    }

    /// Number after the newest record: what this process appended, else what the stores have.
    async fn end_of_log(&self, source: Uuid) -> Result<u64> {
        let known = self.ends.lock().unwrap_or_else(PoisonError::into_inner).get(&source).copied();
        if let Some(end) = known {
            return Ok(end);
        }
        let mut end = 0;
        for other in self.members.iter().filter(|o| o.attached()) {
            match Shelf::list(&other.store, source).await {
                Ok(s) => end = end.max(s.last().map_or(0, |n| n + 1)),
                Err(e) if e.kind() == Kind::Unreachable && !other.store.required() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(end)
    }

    /// Makes an empty store part of the repository.
    async fn adopt(&self, m: &Member) -> Result<()> {
        super::probe(&m.store).await?;
        let sequencer = self.members[self.sequencer].store.name();
        let key = self.keyring.repository_key();
        Descriptor::new(self.uid, m.store.name(), sequencer, self.clock.now_us()).write(&m.store, &key).await?;
        tracing::info!("store {} ({}) is now part of the repository", m.store.name(), m.store.shown());
        self.attach(m).await
    }

    /// Copies what a store lacks of the records below `end` and of what they name.
    pub(super) async fn catch_up(self: &Arc<Self>, m: &Member, source: Uuid, end: u64) -> Result<Copied> {
        // A long log is listed once; from then on the store is known to have all before a number.
        let from = m.complete(source).unwrap_or(0);
        let has = if from == 0 { Shelf::list(&m.store, source).await? } else { Shelf::default() };
        let mut elsewhere = self.elsewhere(m, source, from == 0).await?;
        let mut copied = Copied::default();
        let mut removed = OnPurpose { repository: self, source, floors: Floors::default(), asked: HashSet::new() };
        let mut n = from;
        while n < end {
            if has.contains(n) {
                n += 1;
                continue;
            }
            let lacking = self.lacking(m, source, n, (from == 0).then_some(&has), &mut elsewhere).await?;
            let mut upto = Lsn::ZERO;
            for record in &lacking.records {
                let each: Vec<_> = record
                    .objects()
                    .filter(|o| !removed.floors.is_gone(record, o))
                    .map(|object| async move { (object, self.copy_object(m, object).await) })
                    .collect();
                let each: Vec<_> = stream::iter(each).buffer_unordered(PARALLEL).collect().await;
                for (object, done) in each {
                    let bytes = match done {
                        Err(e)
                            if matches!(e.kind(), Kind::NotFound | Kind::Unreachable)
                                && removed.is_gone(record, object).await? =>
                        {
                            0
                        }
                        done => done?,
                    };
                    copied.objects += u64::from(bytes > 0);
                    copied.bytes += bytes;
                }
                upto = record.upto_lsn;
            }
            match lacking.bytes {
                Sealed::Record(one) => {
                    let path = paths::log_record(source, n);
                    if let Created::Lost(_) = m.store.create(&path, one).await? {
                        return Err(Error::new(
                            Kind::Verification,
                            format!("store {} holds another record {path} than the sequencer", m.store.name()),
                        )
                        .code("chain_gap"));
                    }
                }
                Sealed::Pack(many) => self.put_pack(m, source, &lacking.range, &many).await?,
                Sealed::Checkpoint(one) => self.put_checkpoint(m, source, lacking.range.end, one).await?,
            }
            copied.records += lacking.range.end - n;
            m.set_durable(source, upto);
            n = lacking.range.end;
        }
        m.set_complete(source, end.max(from));
        if copied.records == 0
            && let Some(last) = has.last().filter(|n| has.contains_itself(*n))
            && m.durable(source).is_none()
        {
            let bytes = super::packs::record(&m.store, source, last).await?;
            m.set_durable(source, open_record(self, source, last, &bytes)?.upto_lsn);
        }
        Ok(copied)
    }

    /// What a store lacks from record `n` on: of what is in a pack elsewhere the whole pack, and the checkpoint where the record
    /// went into one while the store was away. `has`: what it has, when that was listed.
    async fn lacking(
        &self,
        m: &Member,
        source: Uuid,
        n: u64,
        has: Option<&Shelf>,
        elsewhere: &mut Elsewhere,
    ) -> Result<Lacking> {
        let packed = match has {
            Some(has) => self.pack_from_others(m, source, n, has).await?,
            None => None,
        };
        if let Some((range, many)) = packed {
            let opened = range.clone().zip(&many).map(|(n, b)| open_record(self, source, n, b).map(Arc::new));
            return Ok(Lacking { records: opened.collect::<Result<_>>()?, range, bytes: Sealed::Pack(many) });
        }
        match elsewhere.object(n).await {
            Ok(one) => {
                let record = Arc::new(open_record(self, source, n, &one)?);
                Ok(Lacking { range: n..n + 1, records: vec![record], bytes: Sealed::Record(one) })
            }
            Err(e) if e.kind() == Kind::NotFound => match self.checkpoint_from_others(m, source, n).await? {
                Some((c, one)) => Ok(Lacking { range: 0..c.end, records: c.records, bytes: Sealed::Checkpoint(one) }),
                None => Err(e),
            },
            Err(e) => Err(e),
        }
    }

    /// Stores to copy from, the target left out, required ones first.
    pub(super) fn others<'a>(&'a self, target: &'a Member) -> impl Iterator<Item = &'a Arc<Store>> {
        let mut others: Vec<_> = self.members.iter().filter(|m| m.attached() && !std::ptr::eq(*m, target)).collect();
        others.sort_by_key(|m| !m.store.required());
        others.into_iter().map(|m| &m.store)
    }

    pub(super) async fn record_from_others(&self, target: &Member, path: &str) -> Result<Bytes> {
        let mut last = None;
        for store in self.others(target) {
            match store.get(path).await {
                Ok(b) => return Ok(b),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| nowhere(path)))
    }

    /// Bytes copied; 0 when the store has the object.
    pub(super) async fn copy_object(&self, target: &Member, object: &ObjectRef) -> Result<u64> {
        if target.store.size(&object.path).await? == Some(object.bytes) {
            return Ok(0);
        }
        let mut last = None;
        for from in self.others(target) {
            match copy(from, &target.store, object).await {
                Ok(()) => return Ok(object.bytes),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| nowhere(&object.path)))
    }
}

/// A part of a log that a store lacks.
struct Lacking {
    range: Range<u64>,
    records: Vec<Arc<LogRecord>>,
    bytes: Sealed,
}

/// As it lies in another store.
enum Sealed {
    Record(Bytes),
    Pack(Vec<Bytes>),
    Checkpoint(Bytes),
}

/// What was removed below the floors: asked for only when something is missing, as most copies miss nothing.
struct OnPurpose<'a> {
    repository: &'a Arc<Repository>,
    source: Uuid,
    floors: Floors,
    asked: HashSet<Uuid>,
}

impl OnPurpose<'_> {
    /// Whether the floor of an object's tenant is above it.
    async fn is_gone(&mut self, r: &LogRecord, o: &ObjectRef) -> Result<bool> {
        let shared = self.repository.keyring.tenant_uid(self.source, &Tenant::reserved(TenantKind::Shared));
        let whose = if o.kind == ObjectKind::Common { shared } else { o.tenant };
        if self.asked.insert(whose) {
            let found = catalog::floors(self.repository, self.source, [whose], shared, None).await?;
            self.floors.tenants.extend(found.tenants);
            self.floors.commons = found.commons.or(self.floors.commons);
        }
        Ok(self.floors.is_gone(r, o))
    }
}

pub(super) fn nowhere(path: &str) -> Error {
    Error::new(Kind::Unreachable, format!("no other store answers to copy {path} from"))
}

/// Copies one object, part by part when it is large; what does not match its record is not written.
async fn copy(from: &Store, to: &Store, object: &ObjectRef) -> Result<()> {
    let part = PART_BYTES as u64;
    if object.bytes <= part {
        let bytes = from.get(&object.path).await?;
        object.check_hash(&hex(&crate::crypto::sha256(&bytes)))?;
        return to.put(&object.path, bytes).await;
    }
    let mut upload = to.multipart(&object.path).await?;
    let copied = async {
        let mut hash = Sha256::new();
        let mut at = 0;
        while at < object.bytes {
            let end = object.bytes.min(at + part.max(object.bytes.div_ceil(9000)));
            let (bytes, _) = from.get_range(&object.path, at..end).await?;
            if bytes.is_empty() {
                return Err(
                    Error::new(Kind::Verification, format!("object {} is cut short", object.path)).code("corrupt")
                );
            }
            hash.update(&bytes);
            at += bytes.len() as u64;
            to.note(upload.put_part(PutPayload::from_bytes(bytes)).await)
                .map_err(|e| to.write_error(&object.path, e))?;
        }
        object.check_hash(&hex(&hash.finish()))?;
        to.note(upload.complete().await).map(drop).map_err(|e| to.write_error(&object.path, e))
    };
    let done = copied.await;
    if done.is_err() {
        let _ = upload.abort().await;
    }
    done
}
