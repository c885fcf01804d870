//! What checks found, told to everybody who ought to know: a record in the tenant's catalog (and with it a row of
//! `coffer.verifications`), an alarm, who LISTENs at the source, the figures.

use super::drills::Tried;
use super::live::Compared;
use super::objects::{Failure, is_finding, one_copy};
use super::rounds::Look;
use crate::catalog;
use crate::catalog::model::READ_BACK;
use crate::catalog::{Catalog, Entry};
use crate::crypto::ObjectKind;
use crate::error::{Kind, Result};
use crate::history::History;
use crate::jobs::Mirror;
use crate::keyring::{Keyring, TenantEntry};
use crate::repository::{ObjectRef, Repository};
use crate::run::AgentContext;
use crate::sql::{self, SqlContext};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// A NOTIFY is cut after so many bytes: the server takes 8000.
const NOTIFY_BYTES: usize = 4000;
/// How long a NOTIFY may take; the log and the health check say it, too.
const NOTIFY_WAIT: Duration = Duration::from_secs(10);

/// `what` of a catalog's record for a comparison with live rows.
pub const LIVE: &str = "live";
/// For a restore into a scratch database.
pub const DRILL: &str = "drill";

/// What a check says of a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Good,
    /// Something is wrong.
    Bad,
    /// Of what was looked at nothing is wrong, and something was left out: that says neither.
    Open,
}

/// See the module.
pub struct Results<'a> {
    pub ctx: &'a AgentContext,
    pub mirror: &'a Mirror,
}

impl Results<'_> {
    /// A tenant was compared with its live rows.
    pub async fn live(&self, tenant: &TenantEntry, compared: &Compared) -> Result<()> {
        self.checked(Look::Live, tenant, compared.verdict(), (compared.words(), compared.note())).await
    }

    /// A tenant was restored into a scratch database.
    pub async fn drill(&self, tenant: &TenantEntry, tried: &Tried) -> Result<()> {
        let words = format!("the restore drill failed: {}", tried.note().unwrap_or_default());
        self.checked(Look::Drill, tenant, tried.verdict(), (words, tried.note())).await
    }

    /// `words`: for the alarm. What says neither leaves what was noted before, and the alarm about it, as they are.
    async fn checked(
        &self,
        look: Look,
        tenant: &TenantEntry,
        verdict: Verdict,
        (words, note): (String, Option<String>),
    ) -> Result<()> {
        if verdict == Verdict::Open {
            count(look, &self.ctx.source, "incomplete");
            return Ok(());
        }
        self.tell(look, tenant, (verdict == Verdict::Bad).then_some(words)).await;
        self.record(tenant.uid, look.what(), verdict == Verdict::Good, note).await
    }

    /// The alarm and the figures; before the record: a repository that cannot be written to must not keep them back.
    async fn tell(&self, look: Look, tenant: &TenantEntry, wrong: Option<String>) {
        let (ctx, who) = (self.ctx, tenant.tenant.to_string());
        count(look, &ctx.source, if wrong.is_none() { "same" } else { "differs" });
        ctx.status.checks.note(look, tenant.uid, ctx.clock.now_us(), wrong.is_none());
        match wrong {
            None => ctx.alarms.clear_for(look.found(), &ctx.source, &who),
            Some(words) => {
                let message = format!("tenant {who}: {words}");
                if ctx.alarms.raise_for(look.found(), &ctx.source, &who, &*message) {
                    self.notify(&message).await;
                }
            }
        }
    }

    /// Notes a check with the tenant's newest backup.
    pub async fn record(&self, tenant: Uuid, what: &str, ok: bool, message: Option<String>) -> Result<()> {
        record((&self.ctx.repo, &self.ctx.keyring), (self.ctx.source_uid, tenant), (what, ok, message)).await?;
        self.mirror.tenant_changed(tenant);
        Ok(())
    }

    /// Notes what reading back all that a tenant has found: with the backups of which no store has an object as it was
    /// written, with such an object itself where it is in none, and, if nothing was damaged anywhere, with the newest.
    /// `before`: the tenant's catalog when the reading began; what came since was not read.
    pub async fn read_back(&self, tenant: Uuid, before: &catalog::State, failures: &[Failure]) -> Result<()> {
        let lost = self.lost(failures).await?;
        let mut catalog = Catalog::open(&self.ctx.repo, self.ctx.source_uid, tenant, None).await?;
        for (backup, message) in marks(before, &lost, failures.is_empty()) {
            let entry = Entry::Verified { backup, ok: message.is_none(), what: READ_BACK.into(), message };
            catalog.append_if(entry, |s| s.full(backup).is_some() || before.full(backup).is_none()).await?;
        }
        if !lost.is_empty() {
            self.mirror.tenant_damaged(tenant);
        }
        if failures.is_empty() && before.fulls.is_empty() {
            self.record(tenant, READ_BACK, true, None).await?;
        }
        self.mirror.tenant_changed(tenant);
        Ok(())
    }

    /// What is wrong with objects, by path, that no store has as they were written. The others can be mended.
    async fn lost<'a>(&self, failures: &'a [Failure]) -> Result<BTreeMap<&'a str, &'a Failure>> {
        let mut lost = BTreeMap::new();
        for f in failures {
            let is_known = lost.contains_key(f.object.as_str());
            if !is_known && !self.is_sound_somewhere(f).await? {
                lost.insert(f.object.as_str(), f);
            }
        }
        Ok(lost)
    }

    async fn is_sound_somewhere(&self, f: &Failure) -> Result<bool> {
        let Some(object) = &f.copy else { return Ok(false) };
        for store in self.ctx.repo.stores() {
            match one_copy(&self.ctx.repo, object, store.name()).await {
                Ok(()) => return Ok(true),
                Err(e) if is_finding(&e) || !store.required() && e.kind() == Kind::Unreachable => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }

    /// Tells who LISTENs to `coffer_alarm` at the source, if it can be reached.
    pub async fn notify(&self, message: &str) {
        let cut = (0..=message.len().min(NOTIFY_BYTES)).rev().find(|n| message.is_char_boundary(*n)).unwrap_or(0);
        let said = async {
            let client = sql::connect(&self.ctx.source_dsn().await?.with_application_name("coffer alarm")).await?;
            client
                .execute("SELECT pg_catalog.pg_notify('coffer_alarm', $1)", &[&&message[..cut]])
                .await
                .sql("cannot notify")
        };
        match tokio::time::timeout(NOTIFY_WAIT, said).await {
            Ok(Ok(_)) => {}
            Ok(Err(e)) => tracing::debug!("an alarm was not told to the source: {e}"),
            Err(_) => tracing::debug!("an alarm was not told to the source in time"),
        }
    }
}

/// Counts what a look came to.
pub fn count(look: Look, source: &str, result: &'static str) {
    metrics::counter!(look.counter(), "source" => source.to_owned(), "result" => result).increment(1);
}

/// The newest check of a kind that a tenant's catalog has.
pub fn newest_check<'a>(state: &'a catalog::State, what: &str) -> Option<&'a catalog::model::Check> {
    state.checks.iter().filter(|c| c.what == what).max_by_key(|c| c.at_us)
}

/// What a reading back says something new of, and what is wrong with each: fulls, incrementals, and objects that are in
/// neither. `all_good`: nothing was damaged in any store.
fn marks(state: &catalog::State, lost: &BTreeMap<&str, &Failure>, all_good: bool) -> Vec<(Uuid, Option<String>)> {
    let newest = state.fulls.iter().max_by_key(|f| f.point_lsn).map(|f| f.id);
    let wrong = |o: &ObjectRef| Some(format!("{}: {}", o.path, lost.get(o.path.as_str())?.message));
    let mut all: Vec<(Uuid, Option<String>)> = state.fulls.iter().map(|f| (f.id, f.needs().find_map(wrong))).collect();
    all.extend(state.incrementals.iter().map(|i| (i.id, i.object.as_ref().and_then(wrong))));
    let of_backups: HashSet<&str> = state.objects().map(|o| o.path.as_str()).collect();
    // The rows of a base are a backup by the uid of their object, whatever else refers to it.
    let by_uid = |o: &&ObjectRef| o.kind == ObjectKind::Full || !of_backups.contains(o.path.as_str());
    let copies = lost.values().filter_map(|f| f.copy.as_ref());
    all.extend(copies.filter(by_uid).map(|o| (o.object, wrong(o))));
    // What was wrong before and is not by now.
    let known: HashSet<Uuid> = all.iter().map(|(id, _)| *id).collect();
    let mended = state.checks.iter().filter(|c| c.what == READ_BACK && !known.contains(&c.backup));
    all.extend(mended.map(|c| (c.backup, None)));
    all.retain(|(id, found)| match (found, state.read_back(*id)) {
        (Some(_), was_good) => was_good != Some(false),
        (None, was_good) => was_good == Some(false) || all_good && Some(*id) == newest,
    });
    all
}

/// Notes a check of a tenant of a source with its newest backup, if it has one: what was checked, whether it was good,
/// and what was wrong.
pub async fn record(
    (repo, keyring): (&Arc<Repository>, &Arc<Keyring>),
    (source, tenant): (Uuid, Uuid),
    (what, ok, message): (&str, bool, Option<String>),
) -> Result<()> {
    let mut catalog = Catalog::open(repo, source, tenant, None).await?;
    let newest = catalog.state().fulls.iter().max_by_key(|f| f.point_lsn).map(|f| f.id);
    let backup = match newest {
        Some(id) => Some(id),
        None => History::load(repo, keyring, source, None).await?.bases(tenant).last().map(|b| b.id),
    };
    if let Some(backup) = backup {
        catalog.append(Entry::Verified { backup, ok, what: what.to_owned(), message }).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::model::Check;
    use crate::catalog::{FullEntry, IncrementalEntry};
    use crate::error::Error;
    use coffer_wire::Lsn;

    #[test]
    fn damage_is_noted_where_it_is() {
        let object = |path: &str| ObjectRef {
            path: path.to_owned(),
            kind: if path == "i" { ObjectKind::Incremental } else { ObjectKind::Full },
            tenant: Uuid::nil(),
            object: Uuid::nil(),
            key_version: 1,
            bytes: 1,
            sha256: String::new(),
            lsn_start: Lsn::ZERO,
            lsn_end: Lsn::ZERO,
            rows: 0,
        };
        let full = |n: u64, objects: &[&str]| FullEntry {
            id: Uuid::from_u128(u128::from(n)),
            point_lsn: Lsn(n),
            objects: objects.iter().map(|o| object(o)).collect(),
            ..FullEntry::default()
        };
        let incremental = IncrementalEntry {
            id: Uuid::from_u128(4),
            from_lsn: Lsn(1),
            to_lsn: Lsn(2),
            to_time_us: 0,
            log_n: 0,
            object: Some(object("i")),
            rows: 1,
            bytes: 1,
            read_back_us: None,
        };
        let mut state = catalog::State {
            fulls: vec![full(1, &["a"]), full(2, &["a", "b"]), full(3, &["c"])],
            incrementals: vec![incremental],
            ..catalog::State::default()
        };
        let ids = |found: Vec<(Uuid, Option<String>)>| -> Vec<(u128, bool)> {
            found.into_iter().map(|(id, what)| (id.as_u128(), what.is_none())).collect()
        };
        let failure = |path: &str| {
            let copy = match path {
                "a changeset" => ObjectRef { object: Uuid::from_u128(77), kind: ObjectKind::Changeset, ..object(path) },
                _ => ObjectRef { object: Uuid::from_u128(78), ..object(path) },
            };
            Failure::of_copy(&copy, "eu", Error::other("is missing"))
        };
        let found = |state: &catalog::State, path: &str| ids(marks(state, &[(path, &failure(path))].into(), false));
        assert_eq!(ids(marks(&state, &BTreeMap::new(), true)), [(3, true)]);
        assert_eq!(ids(marks(&state, &BTreeMap::new(), false)), [], "not all is well, and every full is");
        assert_eq!(found(&state, "b"), [(2, false), (78, false)], "the newest is sound; the rows may be a base's");
        assert_eq!(found(&state, "a"), [(1, false), (2, false), (78, false)]);
        assert_eq!(found(&state, "i"), [(4, false)], "an incremental");
        assert_eq!(found(&state, "a changeset"), [(77, false)], "no backup is the worse for it");
        let check =
            |n| Check { backup: Uuid::from_u128(n), what: READ_BACK.into(), ok: false, message: None, at_us: 0 };
        state.checks = vec![check(2), check(77)];
        assert_eq!(found(&state, "b"), [(78, false), (77, true)], "the one is known, the other is mended");
        assert_eq!(found(&state, "a changeset"), [(2, true)]);
        assert_eq!(ids(marks(&state, &BTreeMap::new(), true)), [(2, true), (3, true), (77, true)], "all is mended");
    }
}
