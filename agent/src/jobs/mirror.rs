//! What the repository has of each tenant, told to the source's views (`coffer.backups`, `recovery_window`, `holds`,
//! `policies`, `verifications`).
//!
//! The truth is in the repository; the views say as of when they were compared with it. Only what changed is sent. The
//! end of an open window moves with every ship and is left out: the views put in what is durable. Catalogs may be
//! written by others, too, so some of them are looked at in every round, all of them by and by.

use crate::alarms;
use crate::catalog::{Catalog, State};
use crate::clock::rfc3339;
use crate::crypto::sha256;
use crate::error::Result;
use crate::history::History;
use crate::keyring::TenantEntry;
use crate::reporter;
use crate::repository::Body;
use crate::run::AgentContext;
use crate::sql::{self, SqlClient, SqlContext};
use coffer_wire::{Lsn, TenantKind};
use futures::FutureExt;
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
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
/// Tenants sent with one statement.
const AT_ONCE: usize = 200;

/// See the module. One per source.
pub struct Mirror {
    ctx: Arc<AgentContext>,
    /// Tenants whose catalogs this agent has written to since the last round.
    changed: Mutex<BTreeSet<Uuid>>,
    woken: Notify,
    /// Sessions that ended since the last round.
    failures: AtomicU32,
}

/// What a session knows.
#[derive(Default)]
struct Known {
    catalogs: HashMap<Uuid, Catalog>,
    /// Hash of what was sent last.
    sent: HashMap<Uuid, [u8; 32]>,
    /// Whose turn it is.
    turn: usize,
    /// When the round began in which the first catalog of the present turn was looked at.
    turn_began_us: i64,
}

impl Mirror {
    pub fn new(ctx: Arc<AgentContext>) -> Self {
        Self { ctx, changed: Mutex::default(), woken: Notify::new(), failures: AtomicU32::new(0) }
    }

    /// A tenant's catalog has a new entry: the views say so soon.
    pub fn tenant_changed(&self, tenant: Uuid) {
        self.lock().insert(tenant);
        self.woken.notify_one();
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
        let client = sql::connect(&self.ctx.dsn.with_application_name("coffer mirror")).await?;
        reporter::require_same_system(&self.ctx, &client).await?;
        let mut known = Known::default();
        let mut history = None;
        let mut is_stale = true;
        loop {
            if is_stale {
                history = Some(self.history().await?);
                is_stale = false;
            }
            if let Some(h) = &mut history {
                self.round(&client, h, &mut known).await?;
                self.failures.store(0, Ordering::Relaxed);
                self.ctx.alarms.clear(alarms::VIEWS_FAILED, &self.ctx.source);
            }
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

    /// Sends what changed, and as of when that is all.
    async fn round(&self, client: &SqlClient, history: &mut History, known: &mut Known) -> Result<()> {
        let began_us = self.ctx.clock.now_us();
        let mut tenants = self.ctx.keyring.tenants(self.ctx.source_uid);
        tenants.retain(|t| t.tenant.kind == TenantKind::Normal);
        let whole = self.refresh(&tenants, known, began_us).await?;
        let mut docs = Vec::new();
        for t in &tenants {
            let Some(catalog) = known.catalogs.get(&t.uid) else { continue };
            if history.catalog(t.uid) != Some(catalog.state()) {
                history.set_catalog(t.uid, catalog.state().clone());
            }
            let doc = document(history, catalog.state(), t);
            let hash = sha256(doc.to_string().as_bytes());
            if known.sent.get(&t.uid) != Some(&hash) {
                docs.push((t.uid, hash, doc));
            }
        }
        for part in docs.chunks(AT_ONCE) {
            let all = Value::Array(part.iter().map(|d| d.2.clone()).collect());
            client.execute("SELECT coffer._agent_mirror($1)", &[&all]).await.sql("cannot update the views")?;
            known.sent.extend(part.iter().map(|d| (d.0, d.1)));
        }
        if let Some(as_of) = whole {
            let as_of = rfc3339(as_of);
            client
                .execute("SELECT coffer._agent_mirrored($1::text::timestamptz)", &[&as_of])
                .await
                .sql("cannot update the views")?;
        }
        Ok(())
    }

    /// Reads the catalogs that are new, were written to, or whose turn it is. As of when all are known, if a turn ended.
    async fn refresh(&self, tenants: &[TenantEntry], known: &mut Known, now_us: i64) -> Result<Option<i64>> {
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
    ) -> Result<Option<i64>> {
        if known.turn == 0 {
            known.turn_began_us = now_us;
        }
        let turn = known.turn..known.turn + IN_TURN;
        for (i, t) in tenants.iter().enumerate() {
            match known.catalogs.get_mut(&t.uid) {
                Some(c) if wanted.contains(&t.uid) || turn.contains(&i) => c.refresh().await?,
                Some(_) => {}
                None => {
                    let c = Catalog::open(&self.ctx.repo, self.ctx.source_uid, t.uid, None).await?;
                    known.catalogs.insert(t.uid, c);
                }
            }
        }
        known.turn = if turn.end >= tenants.len() { 0 } else { turn.end };
        Ok((known.turn == 0).then_some(known.turn_began_us))
    }
}

/// The first and the last time that RFC 3339, the source and this process can all say, in microseconds: the beginning of
/// year 1 and of the last day but one of year 9999.
const FIRST_US: i64 = -62_135_596_800_000_000;
const LAST_US: i64 = 253_402_128_000_000_000;

/// A time as the source reads it: the nearest that can be said.
fn time(us: i64) -> String {
    rfc3339(us.clamp(FIRST_US, LAST_US))
}

/// Everything that the views show of a tenant, as `coffer._agent_mirror()` takes it.
fn document(history: &History, catalog: &State, t: &TenantEntry) -> Value {
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
    let checks: Vec<Value> = catalog
        .checks
        .iter()
        .map(|c| json!({"backup": c.backup, "ok": c.ok, "what": c.what, "message": c.message, "verified_at": time(c.at_us)}))
        .collect();
    let holds: Vec<Value> = catalog
        .holds
        .iter()
        .map(|h| {
            // Beyond what can be said is without an end.
            let from = h.from_us.filter(|us| *us >= FIRST_US).map(time);
            let to = h.to_us.filter(|us| *us <= LAST_US).map(time);
            json!({"id": h.id, "reason": h.reason, "from_time": from, "to_time": to, "held_by": h.by, "held_at": time(h.at_us)})
        })
        .collect();
    json!({"uid": t.uid, "tenant": t.tenant.key, "backups": backups, "windows": windows, "verifications": checks,
        "holds": holds, "policy": catalog.policy})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_can_be_said_to_the_source() {
        assert_eq!(time(FIRST_US), "0001-01-01T00:00:00.000000Z");
        assert_eq!(time(LAST_US), "9999-12-30T00:00:00.000000Z");
        assert_eq!(time(i64::MIN), time(FIRST_US));
        assert_eq!(time(i64::MAX), time(LAST_US));
        assert_eq!(time(0), "1970-01-01T00:00:00.000000Z");
    }
}
