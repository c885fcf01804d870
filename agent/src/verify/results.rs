//! What checks found, told to everybody who ought to know: a record in the tenant's catalog (and with it a row of
//! `coffer.verifications`), an alarm, who LISTENs at the source, the figures.

use crate::catalog::{Catalog, Entry};
use crate::error::Result;
use crate::history::History;
use crate::jobs::Mirror;
use crate::keyring::TenantEntry;
use crate::run::AgentContext;
use crate::sql::{self, SqlContext};
use crate::verify::live::Compared;
use crate::{alarms, catalog};
use std::time::Duration;
use uuid::Uuid;

/// A NOTIFY is cut after so many bytes: the server takes 8000.
const NOTIFY_BYTES: usize = 4000;
/// How long a NOTIFY may take; the log and the health check say it, too.
const NOTIFY_WAIT: Duration = Duration::from_secs(10);

/// `what` of a catalog's record for a comparison with live rows.
pub const LIVE: &str = "live";
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
        let ok = compared.is_same();
        let who = tenant.tenant.to_string();
        metrics::counter!("coffer_validations_total", "source" => self.ctx.source.clone(),
            "result" => if ok { "same" } else { "differs" })
        .increment(1);
        // The alarm first: a repository that cannot be written to must not keep it back.
        if ok {
            self.ctx.alarms.clear_for(alarms::VALIDATION_DIFFERS, &self.ctx.source, &who);
        } else {
            let message = format!("tenant {who}: {}", compared.words());
            if self.ctx.alarms.raise_for(alarms::VALIDATION_DIFFERS, &self.ctx.source, &who, &*message) {
                self.notify(&message).await;
            }
        }
        self.ctx.status.checks.live(tenant.uid, self.ctx.clock.now_us(), ok);
        self.record(tenant.uid, LIVE, ok, compared.note()).await
    }

    /// Notes a check of everything that a tenant has with its newest backup.
    pub async fn record(&self, tenant: Uuid, what: &str, ok: bool, message: Option<String>) -> Result<()> {
        let (repo, source) = (&self.ctx.repo, self.ctx.source_uid);
        let mut catalog = Catalog::open(repo, source, tenant, None).await?;
        let newest = catalog.state().fulls.iter().max_by_key(|f| f.point_lsn).map(|f| f.id);
        let backup = match newest {
            Some(id) => Some(id),
            None => {
                let history = History::load(repo, &self.ctx.keyring, source, None).await?;
                history.backups(tenant).last().map(|b| b.id)
            }
        };
        if let Some(backup) = backup {
            catalog.append(Entry::Verified { backup, ok, what: what.to_owned(), message }).await?;
            self.mirror.tenant_changed(tenant);
        }
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
