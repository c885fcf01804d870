//! Incrementals: what a tenant's changesets since the last one come to, in one object.
//!
//! They begin where the one before ended, or at the tenant's newest full (without one: at its first base), never below its
//! floor, and end at the end of the log. A tenant without changes gets none, and the next one spans more: the log says what was there. An
//! incremental is recorded when it was read back from every required store and was what had been written; the changesets
//! stay, for points inside its span.

use super::{Compactor, Outcome};
use crate::catalog::{Catalog, Entry, IncrementalEntry, State};
use crate::clock::skew_us;
use crate::crypto::{Codec, Header, KeySource, ObjectKind, Sealer, random};
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::history::{History, Inputs, ShipInput, Target, When};
use crate::keyring::TenantEntry;
use crate::merge::{Holes, NetSink, TenantAt, check};
use crate::repository::{ObjectRef, ObjectWriter, paths};
use coffer_wire::Lsn;
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::sync::Arc;
use uuid::Uuid;

/// The changes of every tenant since its last incremental, as the log has them: made once for all of them.
pub struct Spans {
    /// Where they end.
    to: Target,
    /// The numbers of the ships with a changeset that is in no incremental and no full yet, by tenant.
    changed: HashMap<Uuid, Vec<usize>>,
    /// Of the ships with more in their common objects than an index.
    eventful: Vec<usize>,
    /// Where tenants without a full begin; `None`: there is no base yet.
    first: Option<Lsn>,
}

/// What an incremental is made from.
struct Span {
    from: Lsn,
    inputs: Inputs,
    /// Incrementals that were there when it was planned.
    known: HashSet<Uuid>,
}

impl Spans {
    /// Up to the end of the log. `history` has the tenants' catalogs.
    pub fn of(history: &History) -> Self {
        let (lsn, time_us) = history.end();
        let to = Target { asked: When::Latest.to_string(), lsn, time_us };
        let first = history.known(&to).iter().map(|t| t.cut).min();
        let (mut changed, mut eventful): (HashMap<Uuid, Vec<usize>>, _) = (HashMap::new(), Vec::new());
        let mut begins: HashMap<Uuid, Lsn> = HashMap::new();
        for (n, s) in history.line().ships.iter().enumerate() {
            let ship = s.ship();
            for o in &ship.objects {
                // Most of a long log is in incrementals and fulls already.
                let begin = *begins.entry(o.tenant).or_insert_with(|| covered(history, o.tenant));
                if s.record.upto_lsn > begin {
                    changed.entry(o.tenant).or_default().push(n);
                }
            }
            if ship.common.is_some() && ship.eventful != Some(false) {
                eventful.push(n);
            }
        }
        Self { to, changed, eventful, first }
    }

    /// `None`: nothing changed.
    fn of_tenant(&self, history: &History, tenant: Uuid) -> Option<Span> {
        let ships = &history.line().ships;
        let ends = |n: usize| (ships[n].record.from_lsn, ships[n].record.upto_lsn.min(ships[n].limit));
        let before = history.incrementals(tenant);
        let changed = self.changed.get(&tenant)?;
        // A full may be at a commit in the middle of a ship, which then is read whole: what is in the full does no harm.
        let base = history.fulls(tenant).last().map(|f| f.point_lsn).or(self.first)?;
        // What is below the floor is gone.
        let base = base.max(history.floor(tenant).unwrap_or_default());
        let base = changed.iter().map(|n| ends(*n)).find(|(f, t)| *f < base && base < *t).map_or(base, |(f, _)| f);
        let from = before.iter().map(|i| i.to_lsn).max().unwrap_or_default().max(base);
        let within = |n: &&usize| ends(**n).1 > from && ends(**n).0 < self.to.lsn;
        let mut numbers: Vec<usize> = changed.iter().filter(within).copied().collect();
        if numbers.is_empty() {
            return None;
        }
        let mine: HashSet<usize> = numbers.iter().copied().collect();
        numbers.extend(self.eventful.iter().filter(within));
        numbers.sort_unstable();
        numbers.dedup();
        let inputs = numbers
            .into_iter()
            .map(|n| {
                let ship = ships[n].ship();
                let changeset = ship.objects.iter().find(|o| mine.contains(&n) && o.tenant == tenant).cloned();
                let common = ship.common.clone().filter(|_| ship.eventful != Some(false));
                ShipInput { common, changeset, limit: ships[n].limit.min(self.to.lsn) }
            })
            .collect();
        let known = history.catalog(tenant).into_iter().flat_map(|c| &c.incrementals).map(|i| i.id).collect();
        Some(Span { from, inputs: Inputs::of_ships(self.to.lsn, inputs), known })
    }
}

#[cfg(test)]
impl Spans {
    /// Where a tenant's next incremental begins and ends, and what it reads.
    pub(crate) fn reads(&self, history: &History, tenant: Uuid) -> Option<(Lsn, Target, Vec<ObjectRef>)> {
        let span = self.of_tenant(history, tenant)?;
        let read = span.inputs.ships.into_iter().flat_map(|s| s.common.into_iter().chain(s.changeset)).collect();
        Some((span.from, self.to.clone(), read))
    }
}

/// Up to where a tenant has incrementals or fulls.
fn covered(history: &History, tenant: Uuid) -> Lsn {
    let incrementals = history.incrementals(tenant).into_iter().map(|i| i.to_lsn);
    let fulls = history.fulls(tenant).into_iter().map(|f| f.point_lsn);
    incrementals.chain(fulls).max().unwrap_or_default()
}

impl Compactor {
    /// Makes and records an incremental of what changed of the tenant since the last one.
    pub async fn take_incremental(
        &self,
        history: &History,
        spans: &Spans,
        tenant: &TenantEntry,
    ) -> Result<Outcome<IncrementalEntry>> {
        let Some(span) = spans.of_tenant(history, tenant.uid) else { return Ok(Outcome::Unchanged) };
        let (from, known) = (span.from, span.known.clone());
        let made = move |now: &State, _: &State| span_taken(now, from, &known);
        self.alone(history, tenant, made, self.write_incremental(history, spans, tenant, span)).await
    }

    async fn write_incremental(
        &self,
        history: &History,
        spans: &Spans,
        tenant: &TenantEntry,
        span: Span,
    ) -> Result<Outcome<IncrementalEntry>> {
        let Span { from, inputs, known } = span;
        let newest = history.records().last().ok_or_else(|| Error::other("the log is empty"))?;
        let at = TenantAt {
            repo: self.repo.clone(),
            rt: self.rt.clone(),
            tenant: tenant.tenant.clone(),
            inputs: Arc::new(inputs),
            from: history.from_store().map(str::to_owned),
            scratch: self.scratch.clone(),
            memory: self.memory,
            holes: Holes::Keep,
            seen: None,
        };
        let header = Header {
            kind: ObjectKind::Incremental,
            codec: Codec::Zstd,
            tenant: tenant.uid,
            object: random::uuid(),
            source: self.source,
            system_identifier: newest.system_identifier,
            timeline: newest.timeline,
            lsn_start: from,
            lsn_end: spans.to.lsn,
            key_version: tenant.version,
        };
        let (this, entry) = (self.clone(), tenant.clone());
        let object = tokio::task::spawn_blocking(move || write(&this, &entry, &at, &header))
            .await
            .context(Kind::Other, "a worker thread broke off")??;
        failpoints::hit(failpoints::INCREMENTAL_AFTER_OBJECT)?;
        let made = IncrementalEntry {
            id: object.object,
            from_lsn: from,
            to_lsn: spans.to.lsn,
            to_time_us: spans.to.time_us.saturating_add(skew_us()),
            log_n: newest.n,
            rows: object.rows,
            bytes: object.bytes,
            object: Some(object),
            read_back_us: Some(self.clock.now_us()),
        };
        let mut catalog = Catalog::open(&self.repo, self.source, tenant.uid, None).await?;
        let still = |s: &State| !span_taken(s, from, &known);
        if catalog.append_if(Entry::Incremental(made.clone()), still).await?.is_none() {
            tracing::info!(tenant_uid = %tenant.uid, "somebody else made an incremental of the same changes");
            return Ok(Outcome::Elsewhere);
        }
        tracing::debug!(
            tenant_uid = %tenant.uid,
            from = %made.from_lsn,
            to = %made.to_lsn,
            rows = made.rows,
            bytes = made.bytes,
            "incremental taken"
        );
        Ok(Outcome::Made(made))
    }
}

/// Whether somebody recorded an incremental of the same changes since these were known.
fn span_taken(catalog: &State, from: Lsn, known: &HashSet<Uuid>) -> bool {
    catalog.incrementals.iter().any(|i| i.to_lsn > from && !known.contains(&i.id))
}

/// Writes the object to every required store and reads it back. Blocking.
fn write(c: &Compactor, tenant: &TenantEntry, at: &TenantAt, header: &Header) -> Result<ObjectRef> {
    let key = c.keyring.key(tenant.key_id())?;
    let path = paths::incremental(c.source, tenant.uid, header.lsn_end, header.object);
    let mut read = 0;
    let fill = |sealer: &mut Sealer<ObjectWriter>| {
        let stats = at.net(header.lsn_start, &mut Out(sealer))?;
        read = stats.read;
        Ok(stats.rows)
    };
    let object = c.repo.seal_to(c.rt.clone(), path, header, &key, fill)?;
    tracing::debug!(tenant_uid = %tenant.uid, read, kept = object.rows, bytes = object.bytes, "incremental written");
    for store in c.repo.required_stores() {
        let mut plain = c.repo.open_object(&c.rt, &object, Some(store.name()))?;
        let found = check(&mut plain, Some(&tenant.tenant), Some((object.lsn_start, object.lsn_end)))?;
        if found.rows != object.rows {
            let what = format!("object {} holds {} changes, {} were written", object.path, found.rows, object.rows);
            return Err(Error::new(Kind::Verification, what).code("corrupt"));
        }
    }
    Ok(object)
}

/// One section per table.
struct Out<'a>(&'a mut Sealer<ObjectWriter>);

impl NetSink for Out<'_> {
    fn section(&mut self, relid: u32) -> Result<()> {
        self.0.section(&relid.to_string())
    }

    fn bytes(&mut self, b: &[u8]) -> Result<()> {
        self.0.write_all(b).map_err(|e| Error::other("cannot seal an incremental").source(e))
    }
}
