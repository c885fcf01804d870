//! What the repository has of each tenant, told to the source's views (`coffer.backups`, `recovery_window`, `holds`,
//! `policies`, `verifications`).
//!
//! The truth is in the repository; the views say as of when they were compared with it. Only what changed is sent. The
//! end of an open window moves with every ship and is left out: the views put in what is durable. Catalogs may be
//! written by others, too, so some of them are looked at in every round, all of them by and by. Of each only what the
//! views show is kept in between, packed: there may be ten thousand.

use crate::alarms;
use crate::catalog::{self, Catalog, State};
use crate::clock::rfc3339;
use crate::compact::{ARCHIVE, SCHEDULE};
use crate::crypto::sha256;
use crate::error::{Context, Kind, Result};
use crate::history::History;
use crate::keyring::TenantEntry;
use crate::repository::Body;
use crate::run::AgentContext;
use crate::sql::{self, SqlClient, SqlContext};
use coffer_wire::{Lsn, TenantKind};
use futures::{FutureExt, StreamExt, stream};
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;
use uuid::Uuid;

/// A round at least this often, …
const ROUND: Duration = Duration::from_secs(60);
/// … and after a change not sooner than this after the last one.
const REST: Duration = Duration::from_secs(1);
/// Catalogs that are looked at in a round because it is their turn.
const IN_TURN: usize = 50;
/// Catalogs read at a time.
const AHEAD: usize = 16;
/// Tenants sent with one statement.
const AT_ONCE: usize = 200;

/// See the module. One per source.
pub struct Mirror {
    ctx: Arc<AgentContext>,
    /// Tenants whose catalogs this agent has written to since the last round.
    changed: Mutex<BTreeSet<Uuid>>,
    woken: Notify,
    /// The history that the session goes by may not know yet what was found damaged.
    is_stale: AtomicBool,
    /// Sessions that ended since the last round.
    failures: AtomicU32,
}

/// What a session knows.
#[derive(Default)]
struct Known {
    tenants: HashMap<Uuid, Kept>,
    /// Whose turn it is.
    turn: usize,
    /// When the round began in which the first catalog of the present turn was looked at.
    turn_began_us: i64,
}

/// A tenant, between the rounds.
struct Kept {
    /// Number of its catalog's next record when it was read.
    next: u64,
    /// What the views show of the catalog.
    packed: Vec<u8>,
    /// Hash of what was sent last.
    sent: Option<[u8; 32]>,
    /// When its newest scheduled full was complete.
    last_full_us: Option<i64>,
}

impl Kept {
    fn new(catalog: &Catalog, sent: Option<[u8; 32]>) -> Result<Self> {
        let scheduled = catalog.state().fulls.iter().filter(|f| matches!(f.trigger.as_str(), SCHEDULE | ARCHIVE));
        let last_full_us = scheduled.map(|f| f.read_back_us.unwrap_or(f.point_time_us)).max();
        Ok(Self { next: catalog.next(), packed: pack(catalog.state().clone())?, sent, last_full_us })
    }
}

impl Mirror {
    pub fn new(ctx: Arc<AgentContext>) -> Self {
        Self {
            ctx,
            changed: Mutex::default(),
            woken: Notify::new(),
            is_stale: AtomicBool::new(false),
            failures: AtomicU32::new(0),
        }
    }

    /// A tenant's catalog has a new entry: the views say so soon.
    pub fn tenant_changed(&self, tenant: Uuid) {
        self.lock().insert(tenant);
        self.woken.notify_one();
    }

    /// What a tenant has was found damaged: whether something later stands for it is looked at soon.
    pub fn tenant_damaged(&self, tenant: Uuid) {
        self.is_stale.store(true, Ordering::Relaxed);
        self.tenant_changed(tenant);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<Uuid>> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never returns; drop it to end it.
    pub async fn run(&self) {
        loop {
            let why = match AssertUnwindSafe(self.session()).catch_unwind().await {
                Ok(Ok(())) => "the log's records end".to_owned(),
                Ok(Err(e)) => e.report(),
                Err(_) => "a panic, see the log for where".to_owned(),
            };
            let what = "the views of the repository are not brought up to date";
            tracing::debug!(source = self.ctx.source, "{what}: {why}");
            // Once is a restart of the server, of which the stream says more.
            if self.failures.fetch_add(1, Ordering::Relaxed) >= 3 && !self.ctx.is_stopping() {
                self.ctx.alarms.raise(alarms::VIEWS_FAILED, &self.ctx.source, format!("{what}: {why}; trying again"));
            }
            tokio::time::sleep(super::RECONNECT).await;
        }
    }

    async fn session(&self) -> Result<()> {
        let mut records = self.ctx.durable.subscribe();
        let client =
            sql::connect(&self.ctx.source_dsn().await?.with_application_name("coffer mirror").sending_little()).await?;
        client.commit_locally().await?;
        let mut known = Known::default();
        let mut history = self.history().await?;
        let (mut is_stale, mut is_new) = (false, true);
        loop {
            is_stale |= self.is_stale.swap(false, Ordering::Relaxed);
            if std::mem::take(&mut is_stale) {
                history = self.history().await?;
                is_new = true;
            }
            self.ctx.require_followed(&client)?;
            self.round(&client, &mut history, &mut known, std::mem::take(&mut is_new)).await?;
            self.failures.store(0, Ordering::Relaxed);
            self.ctx.alarms.clear(alarms::VIEWS_FAILED, &self.ctx.source);
            let next = Instant::now() + ROUND;
            tokio::time::sleep(REST).await;
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(next) => break,
                    () = self.woken.notified() => break,
                    r = records.recv() => match r {
                        Ok(d) => match &d.record.body {
                            // A ship only moves the end, unless something other than rows is in it: that can wait.
                            Body::Ship(s) => is_stale |= s.eventful != Some(false),
                            _ => {
                                is_stale = true;
                                break;
                            }
                        },
                        Err(RecvError::Lagged(_)) => is_stale = true,
                        Err(RecvError::Closed) => return Ok(()),
                    }
                }
            }
        }
    }

    async fn history(&self) -> Result<History> {
        History::load(&self.ctx.repo, &self.ctx.keyring, self.ctx.source_uid, None).await
    }

    /// Sends what changed, and as of when that is all. `is_new`: the history was read anew.
    async fn round(&self, client: &SqlClient, history: &mut History, known: &mut Known, is_new: bool) -> Result<()> {
        let began_us = self.ctx.clock.now_us();
        let tenants = self.ctx.keyring.tenants(self.ctx.source_uid);
        let (read, whole) = self.refresh(&tenants, known, began_us).await?;
        // Whichever worker made them: of each tenant the newest, and of these the oldest.
        let normal = tenants.iter().filter(|t| t.tenant.kind == TenantKind::Normal);
        let last_full = normal.filter_map(|t| known.tenants.get(&t.uid)?.last_full_us).min();
        if let Some(us) = last_full {
            self.ctx.status.full_complete(us);
        }
        let mut docs = Vec::new();
        for t in tenants.iter().filter(|t| is_new || read.contains(&t.uid)) {
            let Some(kept) = known.tenants.get(&t.uid) else { continue };
            history.set_catalog(t.uid, unpack(&kept.packed)?);
            let doc = document(history, t);
            if let Some(from) = history.wants_base_from(t.uid) {
                self.ctx.damage.want_bases(from);
            }
            history.set_catalog(t.uid, State::default());
            let hash = sha256(doc.to_string().as_bytes());
            if kept.sent != Some(hash) {
                docs.push((t.uid, hash, doc));
            }
            if docs.len() >= AT_ONCE {
                send(client, std::mem::take(&mut docs), known).await?;
            }
        }
        send(client, docs, known).await?;
        if let Some(as_of) = whole {
            let as_of = rfc3339(as_of);
            client
                .execute("SELECT coffer._agent_mirrored($1::text::timestamptz)", &[&as_of])
                .await
                .sql("cannot update the views")?;
        }
        Ok(())
    }

    /// Reads the catalogs that are new, were written to, or whose turn it is: which of them have something new, and as of
    /// when all are known, if a turn ended.
    async fn refresh(
        &self,
        tenants: &[TenantEntry],
        known: &mut Known,
        now_us: i64,
    ) -> Result<(BTreeSet<Uuid>, Option<i64>)> {
        let mut wanted = std::mem::take(&mut *self.lock());
        let r = self.refresh_all(tenants, known, now_us, &wanted).await;
        if r.is_err() {
            self.lock().append(&mut wanted);
        }
        r
    }

    async fn refresh_all(
        &self,
        tenants: &[TenantEntry],
        known: &mut Known,
        now_us: i64,
        wanted: &BTreeSet<Uuid>,
    ) -> Result<(BTreeSet<Uuid>, Option<i64>)> {
        if known.turn == 0 {
            known.turn_began_us = now_us;
        }
        let turn = known.turn..known.turn + IN_TURN;
        let mut each = Vec::new();
        for (i, t) in tenants.iter().enumerate() {
            match known.tenants.get(&t.uid) {
                Some(k) if wanted.contains(&t.uid) || turn.contains(&i) => each.push(self.read(t.uid, k.next, k.sent)),
                Some(_) => {}
                None => each.push(self.read(t.uid, u64::MAX, None)),
            }
        }
        let mut read = stream::iter(each).buffer_unordered(AHEAD);
        let mut new = BTreeSet::new();
        while let Some(r) = read.next().await {
            if let Some((uid, kept)) = r? {
                known.tenants.insert(uid, kept);
                new.insert(uid);
            }
        }
        known.turn = if turn.end >= tenants.len() { 0 } else { turn.end };
        Ok((new, (known.turn == 0).then_some(known.turn_began_us)))
    }

    /// A tenant's catalog, unless nothing was written to it since the record before `next`.
    async fn read(&self, tenant: Uuid, next: u64, sent: Option<[u8; 32]>) -> Result<Option<(Uuid, Kept)>> {
        let (repo, source) = (&self.ctx.repo, self.ctx.source_uid);
        if next != u64::MAX && catalog::next(repo, source, tenant).await? == next {
            return Ok(None);
        }
        let catalog = Catalog::open(repo, source, tenant, None).await?;
        Ok(Some((tenant, Kept::new(&catalog, sent)?)))
    }
}

/// Sends documents of some tenants.
async fn send(client: &SqlClient, docs: Vec<(Uuid, [u8; 32], Value)>, known: &mut Known) -> Result<()> {
    if docs.is_empty() {
        return Ok(());
    }
    let (sent, docs): (Vec<_>, Vec<_>) = docs.into_iter().map(|(uid, hash, doc)| ((uid, hash), doc)).unzip();
    client.execute("SELECT coffer._agent_mirror($1)", &[&Value::Array(docs)]).await.sql("cannot update the views")?;
    for (uid, hash) in sent {
        if let Some(k) = known.tenants.get_mut(&uid) {
            k.sent = Some(hash);
        }
    }
    Ok(())
}

/// A catalog without what no view shows: which objects its backups are in, most of all.
fn pack(mut state: State) -> Result<Vec<u8>> {
    for f in &mut state.fulls {
        (f.objects, f.archive) = (Vec::new(), Vec::new());
        f.sequences = Vec::new();
        (f.manifest, f.schema, f.roles, f.database) = (None, None, None, None);
    }
    for i in &mut state.incrementals {
        i.object = None;
    }
    state.removals = Vec::new();
    state.gone = Vec::new();
    let text = serde_json::to_vec(&state).context(Kind::Other, "cannot encode a catalog")?;
    let mut packed = lz4_flex::block::compress_prepend_size(&text);
    packed.shrink_to_fit();
    Ok(packed)
}

fn unpack(packed: &[u8]) -> Result<State> {
    let text = lz4_flex::block::decompress_size_prepended(packed).context(Kind::Other, "cannot unpack a catalog")?;
    serde_json::from_slice(&text).context(Kind::Other, "cannot decode a catalog")
}

/// The first and the last time that RFC 3339, the source and this process can all say, in microseconds: the beginning of
/// year 1 and of the last day but one of year 9999.
const FIRST_US: i64 = -62_135_596_800_000_000;
const LAST_US: i64 = 253_402_128_000_000_000;

/// A time as the source reads it: the nearest that can be said.
fn time(us: i64) -> String {
    rfc3339(us.clamp(FIRST_US, LAST_US))
}

/// Everything that the views show of a tenant, as `coffer._agent_mirror()` takes it; of a reserved one that is its checks.
fn document(history: &History, t: &TenantEntry) -> Value {
    let none = State::default();
    let catalog = history.catalog(t.uid).unwrap_or(&none);
    let checks: Vec<Value> = catalog
        .checks
        .iter()
        .map(|c| json!({"backup": c.backup, "ok": c.ok, "what": c.what, "message": c.message, "verified_at": time(c.at_us)}))
        .collect();
    if t.tenant.kind != TenantKind::Normal {
        return json!({"uid": t.uid, "tenant": t.tenant.to_string(), "verifications": checks});
    }
    let (end, _) = history.end();
    let lsn = |l: Lsn| l.to_string();
    let mut windows: Vec<Value> = Vec::new();
    for w in history.windows(Some(t.uid)) {
        // Open: it goes on with what is durable.
        let is_open = w.to_lsn >= end;
        windows.push(
            json!({"from_lsn": lsn(w.from_lsn), "to_lsn": (!is_open).then(|| lsn(w.to_lsn)), "from_time": w.from_time,
            "to_time": (!is_open).then_some(w.to_time), "gap": ""}),
        );
    }
    for g in history.gaps(Some(t.uid)) {
        windows.push(json!({"from_lsn": lsn(g.from), "to_lsn": lsn(g.to), "gap": g.reason}));
    }
    let verified = |id: Uuid| {
        let checks = catalog.checks.iter().filter(|c| c.backup == id && c.ok);
        checks.map(|c| c.at_us).max()
    };
    let mut backups: Vec<Value> = Vec::new();
    for b in history.backups(t.uid) {
        backups.push(json!({"backup": b.id, "kind": b.kind, "trigger": b.trigger, "reason": b.reason,
            "point_lsn": lsn(b.point), "point_time": time(b.time_us), "rows": b.rows, "bytes": b.bytes,
            "verified_at": verified(b.id).max(b.verified_us).map(time)}));
    }
    let holds: Vec<Value> = catalog
        .holds
        .iter()
        .map(|h| {
            // Beyond what can be said is without an end.
            let from = h.from_us.filter(|us| *us >= FIRST_US).map(time);
            let to = h.to_us.filter(|us| *us <= LAST_US).map(time);
            json!({"id": h.id, "reason": h.reason, "from_time": from, "to_time": to, "held_by": h.by, "held_at": time(h.at_us),
                "ends_at": h.until_us.map(time)})
        })
        .collect();
    json!({"uid": t.uid, "tenant": t.tenant.key, "backups": backups, "windows": windows, "verifications": checks,
        "holds": holds, "policy": catalog.policy})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{FullEntry, FullTable};
    use crate::crypto::ObjectKind;
    use crate::repository::ObjectRef;

    #[test]
    fn every_time_can_be_said_to_the_source() {
        assert_eq!(time(FIRST_US), "0001-01-01T00:00:00.000000Z");
        assert_eq!(time(LAST_US), "9999-12-30T00:00:00.000000Z");
        assert_eq!(time(i64::MIN), time(FIRST_US));
        assert_eq!(time(i64::MAX), time(LAST_US));
        assert_eq!(time(0), "1970-01-01T00:00:00.000000Z");
    }

    #[test]
    fn of_a_catalog_only_what_the_views_show_is_kept() {
        let object = |n: u64| ObjectRef {
            path: format!("t/{n}/{}", Uuid::from_u128(u128::from(n) << 60)),
            kind: ObjectKind::Full,
            tenant: Uuid::nil(),
            object: Uuid::from_u128(n.into()),
            key_version: 1,
            bytes: n,
            sha256: crate::crypto::hex(&sha256(&n.to_le_bytes())),
            lsn_start: Lsn::ZERO,
            lsn_end: Lsn::ZERO,
            rows: n,
        };
        let table = |n: u32| FullTable { relid: n, name: format!("public.table_{n}"), class: None, rows: 5 };
        let full = |n: u128| FullEntry {
            id: Uuid::from_u128(n),
            trigger: "schedule".into(),
            reason: Some("by night".into()),
            point_lsn: Lsn(n as u64),
            point_time_us: 5,
            log_n: 7,
            system_identifier: 1,
            timeline: 1,
            tables: (0..100).map(table).collect(),
            manifest: Some(object(1)),
            objects: (0..1000).map(object).collect(),
            schema: Some(object(2)),
            roles: None,
            sequences: Vec::new(),
            database: None,
            rows: 500,
            bytes: 9,
            read_back_us: Some(6),
            archive: (0..10).map(object).collect(),
        };
        let state = State { fulls: (1..=60).map(full).collect(), ..State::default() };
        let packed = pack(state.clone()).expect("packed");
        assert!(packed.len() < 60_000, "{} bytes of 60 fulls", packed.len());
        let back = unpack(&packed).expect("unpacked");
        assert_eq!(back.fulls.len(), 60);
        let shown = |f: &FullEntry| (f.id, f.trigger.clone(), f.reason.clone(), f.point_lsn, f.log_n, f.rows, f.bytes);
        assert!(back.fulls.iter().zip(&state.fulls).all(|(a, b)| shown(a) == shown(b) && a.tables == b.tables));
        assert!(back.fulls.iter().all(|f| f.objects.is_empty() && f.archive.is_empty() && f.read_back_us == Some(6)));
    }
}
