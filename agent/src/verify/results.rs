//! What checks found, told to everybody who ought to know: a record in the tenant's catalog (and with it a row of
//! `coffer.verifications`), an alarm, who LISTENs at the source, the figures.

use super::drills::Tried;
use super::live::Compared;
use super::rounds::Look;
use crate::catalog;
use crate::catalog::{Catalog, Entry};
use crate::error::Result;
use crate::history::History;
use crate::jobs::Mirror;
use crate::keyring::{Keyring, TenantEntry};
use crate::repository::Repository;
use crate::run::AgentContext;
use crate::sql::{self, SqlContext};
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
/// For a reading back of what is stored.
pub const READ_BACK: &str = "read_back";

/// See the module.
pub struct Results<'a> {
    pub ctx: &'a AgentContext,
    pub mirror: &'a Mirror,
}

impl Results<'_> {
    /// A tenant was compared with its live rows.
    pub async fn live(&self, tenant: &TenantEntry, compared: &Compared) -> Result<()> {
        let wrong = (!compared.is_same()).then(|| compared.words());
        self.tell(Look::Live, tenant, wrong).await;
        self.record(tenant.uid, LIVE, compared.is_same(), compared.note()).await
    }

    /// A tenant was restored into a scratch database.
    pub async fn drill(&self, tenant: &TenantEntry, tried: &Tried) -> Result<()> {
        let wrong = (!tried.is_good()).then(|| tried.note().unwrap_or_default());
        self.tell(Look::Drill, tenant, wrong.map(|w| format!("the restore drill failed: {w}"))).await;
        self.record(tenant.uid, DRILL, tried.is_good(), tried.note()).await
    }

    /// The alarm and the figures; before the record: a repository that cannot be written to must not keep them back.
    async fn tell(&self, look: Look, tenant: &TenantEntry, wrong: Option<String>) {
        let (ctx, who) = (self.ctx, tenant.tenant.to_string());
        let result = if wrong.is_none() { "same" } else { "differs" };
        metrics::counter!(look.counter(), "source" => ctx.source.clone(), "result" => result).increment(1);
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

    /// Tells who LISTENs to `coffer_alarm` at the source, if it can be reached.
    pub async fn notify(&self, message: &str) {
        let cut = (0..=message.len().min(NOTIFY_BYTES)).rev().find(|n| message.is_char_boundary(*n)).unwrap_or(0);
        let said = async {
            let client = sql::connect(&self.ctx.dsn.with_application_name("coffer alarm")).await?;
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

/// The newest check of a kind that a tenant's catalog has.
pub fn newest_check<'a>(state: &'a catalog::State, what: &str) -> Option<&'a catalog::model::Check> {
    state.checks.iter().filter(|c| c.what == what).max_by_key(|c| c.at_us)
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
