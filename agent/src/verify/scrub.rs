//! The scrub: reads back and authenticates, by and by, everything that log and catalogs name, in every store, and never
//! faster than it may.
//!
//! Every object has a place on a ring, by the hash of its name. A round goes once around; what is due by now is read in
//! the order of the places, so what was read longest ago comes first, and all that is to be remembered is how far the
//! round is. That, and what was found, stands in a small file beside the spool; without it the round begins anew. An
//! object that is made behind the place where the round is was read back when it was written, and waits for the next.
//!
//! Before each piece of a round the chains of every store are read, which is their check, and what was found before is
//! looked at again: an alarm stands until its object is what it was, or is named no more. An object that other work
//! complained of is read out of its turn.

use super::listing::{Listed, adds_up, list, needed};
use super::objects::{Failure, is_finding, one_object};
use super::results::Results;
use super::throttle::{Throttle, Throttled};
use crate::alarms;
use crate::catalog::model::READ_BACK;
use crate::catalog::{Catalog, Entry};
use crate::config::VerifyConfig;
use crate::crypto::{Opener, sha256};
use crate::error::{Context, Error, Kind, Result};
use crate::jobs::Mirror;
use crate::repository::ObjectRef;
use crate::run::AgentContext;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

/// The ring's length.
const ROUND: u64 = 1 << 62;
/// A round is to be over somewhat before its period is.
const OF_PERIOD: f64 = 0.9;
/// A period has so many pieces; what falls into one is read in one go.
const PIECES: u32 = 120;
/// The shortest piece.
const LEAST_PIECE: Duration = Duration::from_secs(1);
/// How often it is looked whether something is due.
const TICK: Duration = Duration::from_secs(1);
/// Wait after a store did not answer.
const AGAIN: Duration = Duration::from_secs(60);
/// How often the state is written in a long piece.
const SAVE: Duration = Duration::from_secs(30);
/// Damaged objects that are remembered; beyond, they are found again in the next round.
const MOST_FOUND: usize = 1000;
/// Damaged objects that an alarm names.
const NAMED: usize = 5;

/// What is remembered of a round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    v: u32,
    /// When the round began, microseconds since 1970-01-01 UTC.
    began_us: i64,
    /// The place of the round: what is before it was read.
    place: u64,
    objects: u64,
    bytes: u64,
    /// When the round before was over.
    #[serde(default)]
    last_us: Option<i64>,
    #[serde(default)]
    found: Vec<Found>,
}

/// An object that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Found {
    store: String,
    object: String,
    kind: String,
    message: String,
    /// Of a chain: it is looked at with every piece.
    chain: bool,
    at_us: i64,
}

/// Scrubs a source for as long as it is polled.
pub async fn watch(ctx: Arc<AgentContext>, mirror: Arc<Mirror>) {
    let config = ctx.config.verify.clone();
    if config.scrub_rate == 0 {
        tracing::info!(source = ctx.source, "[verify] scrub_rate is 0: nothing is scrubbed");
        return;
    }
    let file = ctx.config.spool.dir.join(format!("scrub-{}.json", ctx.source));
    let state = read(&file);
    let over = Arc::new(AtomicBool::new(false));
    let _end = Ended(over.clone());
    let throttle = Throttle::new(config.scrub_rate, over);
    let mut s = Scrub { ctx, mirror, config, file, state, throttle: Arc::new(throttle), saved: Instant::now() };
    s.tell();
    loop {
        tokio::time::sleep(TICK).await;
        if s.ctx.is_stopping() {
            return;
        }
        let done = match s.complaints().await {
            Ok(()) => s.piece().await,
            e => e,
        };
        if let Err(e) = done {
            tracing::debug!(source = s.ctx.source, "the scrub waits: {e}");
            tokio::time::sleep(AGAIN.min(s.config.scrub_period / 4)).await;
        }
    }
}

/// Ends what reads on a thread of its own.
struct Ended(Arc<AtomicBool>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Scrub {
    ctx: Arc<AgentContext>,
    mirror: Arc<Mirror>,
    config: VerifyConfig,
    file: PathBuf,
    state: State,
    throttle: Arc<Throttle>,
    saved: Instant,
}

/// An object's place on the ring.
fn place(path: &str) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&sha256(path.as_bytes())[..8]);
    u64::from_be_bytes(first) >> 2
}

/// How far a round that began at `began_us` is to be.
fn due(began_us: i64, now_us: i64, period: Duration) -> u64 {
    let of = now_us.saturating_sub(began_us).max(0) as f64 / (period.as_micros() as f64 * OF_PERIOD);
    ((of * ROUND as f64) as u64).min(ROUND)
}

impl Scrub {
    /// Reads what other work complained of.
    async fn complaints(&mut self) -> Result<()> {
        let said = self.ctx.damage.take_complaints();
        if said.is_empty() {
            return Ok(());
        }
        let stores = self.list().await?;
        let is_meant = |o: &ObjectRef| said.iter().any(|text| text.contains(&o.path));
        for (store, listed) in &stores {
            for object in listed.objects.iter().filter(|o| is_meant(o)) {
                self.check(store, object, &stores).await?;
            }
        }
        self.tell();
        self.save();
        Ok(())
    }

    /// Reads what is due; nothing, most of the time.
    async fn piece(&mut self) -> Result<()> {
        let now_us = self.ctx.clock.now_us();
        let period_us = i64::try_from(self.config.scrub_period.as_micros()).unwrap_or(i64::MAX);
        let s = &mut self.state;
        // The first round, one that a wrong clock dated, or the next one.
        if s.began_us == 0 || s.began_us > now_us {
            (s.began_us, s.place) = (now_us, 0);
        } else if s.place >= ROUND {
            if now_us.saturating_sub(s.began_us) < period_us {
                return Ok(());
            }
            (s.began_us, s.place, s.objects, s.bytes) = (now_us, 0, 0, 0);
        }
        if due(s.began_us, now_us, self.config.scrub_period) < s.place && s.place > 0 {
            return Ok(());
        }
        let piece = (self.config.scrub_period / PIECES).max(LEAST_PIECE).as_micros();
        let upto_us = now_us.saturating_add(i64::try_from(piece).unwrap_or(i64::MAX));
        let upto = due(s.began_us, upto_us, self.config.scrub_period);
        let stores = self.list().await?;
        self.look_again(&stores).await?;
        self.read_up_to(upto, &stores).await?;
        if self.state.place >= ROUND {
            self.round_over();
        }
        self.tell();
        self.save();
        Ok(())
    }

    /// What each store has; one that is optional may be away.
    async fn list(&mut self) -> Result<BTreeMap<String, Listed>> {
        let mut out = BTreeMap::new();
        let stores: Vec<(String, bool)> = self.ctx.repo.stores().map(|s| (s.name().to_owned(), s.required())).collect();
        for (store, required) in stores {
            match list(&self.ctx.repo, (self.ctx.source_uid, None), &store, false).await {
                Ok(l) => {
                    self.state.found.retain(|f| !(f.chain && f.store == store));
                    for f in &l.failures {
                        self.found(&store, f, true);
                    }
                    out.insert(store, l);
                }
                Err(e) if !required && e.kind() == Kind::Unreachable => {}
                Err(e) => return Err(e),
            }
        }
        Ok(out)
    }

    /// Looks again at what was found to be damaged.
    async fn look_again(&mut self, stores: &BTreeMap<String, Listed>) -> Result<()> {
        for f in self.state.found.clone().into_iter().filter(|f| !f.chain) {
            let Some(listed) = stores.get(&f.store) else { continue };
            let object = listed.objects.iter().find(|o| o.path == f.object).cloned();
            let is_sound = match &object {
                None => true,
                Some(o) => self.read(&f.store, o).await?.is_none(),
            };
            if is_sound {
                self.state.found.retain(|x| *x != f);
                if let Some(o) = &object {
                    tracing::info!(store = f.store, object = f.object, "is what it was again");
                    self.record(o, stores, None).await?;
                }
            }
        }
        Ok(())
    }

    async fn read_up_to(&mut self, upto: u64, stores: &BTreeMap<String, Listed>) -> Result<()> {
        let from = self.state.place;
        let mut all: Vec<(u64, &str, &ObjectRef)> = Vec::new();
        for (store, listed) in stores {
            let places = listed.objects.iter().map(|o| (place(&o.path), store.as_str(), o));
            all.extend(places.filter(|(p, ..)| *p >= from && *p < upto));
        }
        all.sort_by_key(|(p, store, o)| (*p, o.object, *store));
        for (p, store, object) in all {
            // What is before this place was read.
            self.state.place = p;
            if !self.check(store, object, stores).await? {
                continue;
            }
            self.state.objects += 1;
            self.state.bytes += object.bytes;
            metrics::counter!("coffer_scrub_objects_total", "store" => store.to_owned()).increment(1);
            metrics::counter!("coffer_scrub_bytes_total", "store" => store.to_owned()).increment(object.bytes);
            if self.saved.elapsed() > SAVE {
                self.tell();
                self.save();
            }
        }
        self.state.place = upto;
        Ok(())
    }

    /// Reads an object in a store, and notes what is wrong with it. False: that is known already.
    async fn check(&mut self, store: &str, object: &ObjectRef, stores: &BTreeMap<String, Listed>) -> Result<bool> {
        if self.state.found.iter().any(|f| f.store == store && f.object == object.path) {
            return Ok(false);
        }
        let mut failure = self.read(store, object).await?;
        if failure.is_none()
            && let Some(full) = stores[store].full_of(object)
        {
            failure = adds_up(&self.ctx.repo, full, object, store).await?;
        }
        if let Some(e) = failure {
            self.damaged(store, object, &e, stores).await?;
        }
        Ok(true)
    }

    /// Reads an object in a store to its end; what is wrong with it.
    async fn read(&self, store: &str, object: &ObjectRef) -> Result<Option<Error>> {
        let (repo, keyring, throttle) = (self.ctx.repo.clone(), self.ctx.keyring.clone(), self.throttle.clone());
        let (object, store, rt) = (object.clone(), store.to_owned(), self.ctx.rt.clone());
        let work = move || {
            let during = |e: Error| e.during(format_args!("object {}", object.path));
            let reader = Throttled::new(repo.reader(&rt, &object, Some(&store))?, throttle);
            let mut plain = Opener::new(reader, &*keyring, &object.expect()).map_err(during)?.named(&object.path);
            let owner = keyring.by_uid(object.tenant).map(|t| t.tenant);
            one_object(&mut plain, &object, owner.as_ref())
        };
        match tokio::task::spawn_blocking(work).await.context(Kind::Other, "a worker thread broke off")? {
            Ok(()) => Ok(None),
            Err(e) if is_finding(&e) => Ok(Some(e)),
            Err(e) => Err(e),
        }
    }

    /// An object is not what it was: unless it is named no more by now, that is an alarm, and what it belongs to counts
    /// no more, if no store has it sound.
    async fn damaged(
        &mut self,
        store: &str,
        object: &ObjectRef,
        e: &Error,
        stores: &BTreeMap<String, Listed>,
    ) -> Result<()> {
        // Pruning may have come before us.
        if !list(&self.ctx.repo, (self.ctx.source_uid, None), store, false).await?.names(&object.path) {
            return Ok(());
        }
        let mut failure = Failure::of(&object.path, Some(object.tenant), e);
        if needed(&self.ctx.repo, self.ctx.source_uid, vec![failure.clone()]).await?.is_empty() {
            return Ok(());
        }
        let mut sound = Vec::new();
        for other in stores.keys().filter(|s| *s != store) {
            if matches!(self.read(other, object).await, Ok(None)) {
                sound.push(other.as_str());
            }
        }
        let elsewhere = match sound.first() {
            Some(s) => format!("; store {s} has it as it was: copy it from there"),
            None => "; no other store has it".to_owned(),
        };
        failure.message.push_str(&elsewhere);
        self.found(store, &failure, false);
        self.tell();
        if sound.is_empty() {
            self.record(object, stores, Some(&failure.message)).await?;
        }
        Ok(())
    }

    /// Notes with every backup that an object belongs to that it is damaged, or is no more.
    async fn record(&self, object: &ObjectRef, stores: &BTreeMap<String, Listed>, message: Option<&str>) -> Result<()> {
        let mut backups: BTreeSet<(Uuid, Uuid)> = stores.values().flat_map(|l| l.backups_with(object)).collect();
        // A change of the log, or what a base read beside the rows, stands for itself.
        if backups.is_empty() && self.ctx.keyring.by_uid(object.tenant).is_some() {
            backups.insert((object.tenant, object.object));
        }
        for (tenant, backup) in backups {
            let mut catalog = Catalog::open(&self.ctx.repo, self.ctx.source_uid, tenant, None).await?;
            let (ok, what) = (message.is_none(), READ_BACK);
            let known = catalog.state().read_back(backup);
            // Of a backup with several damaged objects, one that is sound again says nothing.
            let others = || self.state.found.iter().any(|f| stores.get(&f.store).is_some_and(|l| is_of(l, f, backup)));
            if ok && (known != Some(false) || others()) || !ok && known == Some(false) {
                continue;
            }
            let entry = Entry::Verified { backup, ok, what: what.into(), message: message.map(str::to_owned) };
            catalog.append(entry).await?;
            if ok {
                self.mirror.tenant_changed(tenant);
            } else {
                self.mirror.tenant_damaged(tenant);
            }
        }
        Ok(())
    }

    fn found(&mut self, store: &str, f: &Failure, chain: bool) {
        let at_us = self.ctx.clock.now_us();
        let (object, kind, message) = (f.object.clone(), f.kind.to_owned(), f.message.clone());
        if !self.state.found.iter().any(|x| x.store == store && x.object == object)
            && self.state.found.len() < MOST_FOUND
        {
            self.state.found.push(Found { store: store.to_owned(), object, kind, message, chain, at_us });
        }
    }

    fn round_over(&mut self) {
        let now_us = self.ctx.clock.now_us();
        self.state.last_us = Some(now_us);
        let (objects, bytes, damaged) = (self.state.objects, self.state.bytes, self.state.found.len());
        tracing::info!(source = self.ctx.source, objects, bytes, damaged, "a round of the scrub is over");
    }

    /// Alarms and figures as they follow from the state.
    fn tell(&self) {
        let (s, ctx) = (&self.state, &self.ctx);
        for store in ctx.repo.stores() {
            let of_store: Vec<&Found> = s.found.iter().filter(|f| f.store == store.name()).collect();
            let name = store.name().to_owned();
            metrics::gauge!("coffer_scrub_damaged_objects", "source" => ctx.source.clone(), "store" => name)
                .set(of_store.len() as f64);
            let scope = format!("{}/{}", ctx.source, store.name());
            if of_store.is_empty() {
                ctx.alarms.clear(alarms::DAMAGED_OBJECT, &scope);
                continue;
            }
            let named = of_store.iter().take(NAMED).map(|f| format!("{} ({}): {}", f.object, f.kind, f.message));
            let message = format!(
                "{} objects in store {} are not as they were written: {}",
                of_store.len(),
                store.name(),
                named.collect::<Vec<_>>().join("; ")
            );
            if ctx.alarms.raise(alarms::DAMAGED_OBJECT, &scope, &*message) {
                let (ctx, mirror) = (ctx.clone(), self.mirror.clone());
                tokio::spawn(async move { Results { ctx: &ctx, mirror: &mirror }.notify(&message).await });
            }
        }
        let late_us = due(s.began_us, ctx.clock.now_us(), self.config.scrub_period).saturating_sub(s.place);
        // A tenth of a round behind, at the end of a period: the next one would be late as well.
        if s.began_us > 0
            && s.place < ROUND
            && late_us > ROUND / 10
            && due(s.began_us, ctx.clock.now_us(), self.config.scrub_period) == ROUND
        {
            let message = "not everything was read back within [verify] scrub_period: raise scrub_rate, or the period";
            ctx.alarms.raise(alarms::SCRUB_LATE, &ctx.source, message);
        } else {
            ctx.alarms.clear(alarms::SCRUB_LATE, &ctx.source);
        }
        ctx.status.checks.scrub(s.began_us, s.place as f64 / ROUND as f64, (s.objects, s.found.len()), s.last_us);
    }

    fn save(&mut self) {
        self.saved = Instant::now();
        if let Err(e) = write(&self.file, &self.state) {
            tracing::debug!("how far the scrub is could not be noted in {}: {e}", self.file.display());
        }
    }
}

/// Whether what was found belongs to a backup.
fn is_of(listed: &Listed, f: &Found, backup: Uuid) -> bool {
    let object = listed.objects.iter().find(|o| o.path == f.object);
    object.is_some_and(|o| listed.backups_with(o).iter().any(|(_, b)| *b == backup))
}

/// What was noted; a new round where nothing can be made of it.
fn read(file: &std::path::Path) -> State {
    let noted = std::fs::read(file).ok().and_then(|b| serde_json::from_slice::<State>(&b).ok());
    noted.filter(|s| s.v == 1 && s.place <= ROUND).unwrap_or(State { v: 1, ..State::default() })
}

fn write(file: &std::path::Path, state: &State) -> std::io::Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let fresh = file.with_extension("json.new");
    std::fs::write(&fresh, serde_json::to_vec(state)?)?;
    std::fs::rename(fresh, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_over_before_its_period_is() {
        let period = Duration::from_secs(1000);
        let at = |s: i64| due(5_000_000, 5_000_000 + s * 1_000_000, period);
        assert_eq!((at(-5), at(0), at(900), at(5000)), (0, 0, ROUND, ROUND));
        assert!(at(450) > ROUND / 2 - 1000 && at(450) < ROUND / 2 + 1000);
        assert!(place("s/a") < ROUND && place("s/a") != place("s/b"));
    }

    #[test]
    fn the_state_survives_and_what_is_no_state_begins_a_round() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("deep").join("scrub-shop.json");
        assert_eq!(read(&file), State { v: 1, ..State::default() });
        let found = Found {
            store: "eu".into(),
            object: "s/x".into(),
            kind: "missing".into(),
            message: "gone".into(),
            chain: false,
            at_us: 7,
        };
        let state =
            State { v: 1, began_us: 5, place: ROUND, objects: 3, bytes: 4, last_us: Some(6), found: vec![found] };
        write(&file, &state).unwrap();
        assert_eq!(read(&file), state);
        std::fs::write(&file, "{").unwrap();
        assert_eq!(read(&file).began_us, 0);
    }
}
