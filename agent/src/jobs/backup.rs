//! The job behind `coffer.backup()`: a full at the commit of the transaction that asked for it.

use super::kinds::Work;
use crate::catalog::{Entry, FullEntry};
use crate::clock::rfc3339;
use crate::compact::{ARCHIVE, Compactor, Occasion};
use crate::error::{Error, Kind, Result};
use crate::history::{History, Target};
use crate::keyring::TenantEntry;
use crate::lease::Lease;
use crate::opened::{Reserved, scratch};
use coffer_wire::Lsn;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Who is written down as having placed the hold of an incident's backup.
pub const HOLDER: &str = "coffer.backup";
/// How long an archive waits for definitions that changed just before.
const DEFINITIONS: Duration = Duration::from_secs(120);
/// How often they are looked for.
const LOOK: Duration = Duration::from_secs(1);

impl Work<'_> {
    pub(super) async fn backup(&self) -> Result<Value> {
        self.own_commit().await?;
        let tenant = self.tenant().await?;
        self.step.begin(0.1, 0.2, "reading the history")?;
        // Before the catalog is read: what it names by then is not removed until the full that refers to it is recorded.
        let _intent = Lease::intent(&self.ctx.repo, self.ctx.source_uid).await?;
        let kind = self.job.text("kind").unwrap_or("manual").to_owned();
        let (history, point) = self.history(&tenant, kind == ARCHIVE).await?;
        let occasion = Occasion::of_job(kind, self.job.text("reason").map(str::to_owned));
        // An earlier attempt may have come so far.
        let made = occasion.made(history.fulls(tenant.uid), &point);
        let full = match made.cloned() {
            Some(f) => f,
            None => {
                let rows: u64 = history.holdings(tenant.uid).iter().filter_map(|h| h.rows).sum();
                self.step.expected.store(rows, Ordering::Relaxed);
                self.step.begin(0.2, 0.9, format!("taking a full at {}", point.lsn))?;
                self.compactor()?.take_full(&history, &tenant, &point, &occasion).await?
            }
        };
        self.mirror.tenant_changed(tenant.uid);
        // From here on it is there, whatever anybody wants.
        let held = self.hold_incident(&tenant, &full).await?;
        self.mirror.tenant_changed(tenant.uid);
        Ok(json!({"id": full.id, "kind": full.kind(), "trigger": full.trigger, "reason": full.reason,
            "point_lsn": full.point_lsn.to_string(), "point_time": rfc3339(full.point_time_us), "rows": full.rows,
            "bytes": full.bytes, "tables": full.tables.len(), "verified_at": full.read_back_us.map(rfc3339),
            "holds": held.into_iter().collect::<Vec<_>>()}))
    }

    /// The history and the commit that asked. `archive`: waits for the definitions as they were there, which the agent archives
    /// a moment after they changed.
    async fn history(&self, tenant: &TenantEntry, archive: bool) -> Result<(History, Target)> {
        let until = Instant::now() + DEFINITIONS;
        loop {
            let mut history = self.opened().history(self.ctx.source_uid).await?;
            history.load_catalog(tenant.uid).await?;
            let point = self.point(&history)?;
            if !archive {
                return Ok((history, point));
            }
            if !history.definitions_pending(&point) || Instant::now() > until {
                let shared = self.ctx.keyring.tenant_uid(self.ctx.source_uid, &Reserved::Shared.tenant());
                history.load_catalog(shared).await?;
                return Ok((history, point));
            }
            self.step.begin(0.1, 0.2, "waiting for the definitions")?;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The commit that the job's marker names. Its number may have been used before, by an extension that was dropped
    /// since: the marker that counts is the first at or after the position that the job noted.
    fn point(&self, history: &History) -> Result<Target> {
        let name = self.job.text("point").unwrap_or_default();
        let marked: Lsn = self.job.text("lsn").unwrap_or_default().parse().map_err(Error::other)?;
        history.restore_point_from(name, marked).ok_or_else(|| {
            Error::new(
                Kind::OutsideWindow,
                format!("the commit that asked for the backup is not in the repository ({name}, after {marked})"),
            )
            .code("gap")
            .window(history.windows(None))
            .hint("there is a gap in the log, see `coffer list`; ask again")
        })
    }

    fn compactor(&self) -> Result<Compactor> {
        let ctx = self.ctx;
        Ok(Compactor {
            repo: ctx.repo.clone(),
            keyring: ctx.keyring.clone(),
            rt: Handle::current(),
            clock: ctx.clock.clone(),
            source: ctx.source_uid,
            scratch: scratch(&ctx.config)?,
            memory: ctx.memory.job,
            part_bytes: ctx.config.compact.part,
            share: false,
            watch: self.step.watch.clone(),
        })
    }

    /// An incident's backup is held until somebody releases it; the hold.
    async fn hold_incident(&self, tenant: &TenantEntry, full: &FullEntry) -> Result<Option<String>> {
        if self.job.text("hold").is_none() {
            return Ok(None);
        }
        let id = self.uuid("hold")?;
        let reason = match &full.reason {
            Some(r) => format!("incident: {r}"),
            None => "incident".to_owned(),
        };
        let at = Some(full.point_time_us);
        let entry = Entry::Hold {
            id,
            number: 0,
            reason,
            from_us: at,
            to_us: at,
            by: format!("{HOLDER} by {}", self.job.requested_by),
            until_us: None,
        };
        let mut catalog = self.catalog(tenant.uid).await?;
        catalog.append_if(entry, |s| s.holds.iter().all(|h| h.id != id)).await?;
        Ok(Some(id.to_string()))
    }
}
