//! Taking a restore in place back: a restore of the same tables to just before its commit.
//!
//! A restore in place leaves a marker in its own transaction, so the log says where it is, whose it was and what it
//! changed. What the undo needs is held from then on, for a month: a restore that went wrong may be noticed late, and what is
//! held for ever keeps the tenant's log for ever.

use super::moment::POLL;
use crate::catalog::{Catalog, Entry};
use crate::error::{Error, Kind, Result};
use crate::history::{Target, When};
use crate::opened::Opened;
use crate::repository::Repository;
use crate::tenant::Tenant;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The hold begins this long before the restore was recorded, so that its commit is inside, in microseconds.
const HOLD_BEFORE_US: i64 = 10 * 60 * 1_000_000;

/// How long it holds, in microseconds.
const HOLD_FOR_US: i64 = 30 * 86_400 * 1_000_000;

/// What an undo is of.
#[derive(Clone, Debug)]
pub struct Undo {
    pub tenant: Tenant,
    /// The tables that the restore changed, for [`super::Request::tables`].
    pub tables: Vec<String>,
    /// The restore was of single rows.
    pub rows: bool,
}

/// Looks for the restore with this id, for as long as `wait` says. `chosen`: the tables that the caller wants of it; none:
/// all that it changed.
///
/// # Errors
/// `NotFound`: no such restore is durable. `OutsideWindow`: not all of what is wanted can be restored to before it.
pub async fn find(opened: &Opened, source: Uuid, id: Uuid, chosen: &[String], wait: Option<Duration>) -> Result<Undo> {
    let deadline = wait.map(|w| Instant::now() + w);
    loop {
        let mut history = opened.history(source).await?;
        let found = match history.restored(id) {
            Ok(r) => r.clone(),
            Err(_) if deadline.is_some_and(|d| Instant::now() + POLL <= d) => {
                tokio::time::sleep(POLL).await;
                continue;
            }
            Err(e) => return Err(e),
        };
        let entry = opened.keyring.by_uid(found.tenant).ok_or_else(|| {
            Error::new(Kind::Key, format!("the keyring has no tenant {} (undo {id})", found.tenant.simple()))
        })?;
        history.load_catalog(found.tenant).await?;
        let target: Target = history.resolve(&When::Undo(id)).await?;
        let known = history.known(&target);
        let is_lost = |relid: &&u32| !known.iter().any(|t| t.relid == **relid);
        let name = |relid: &u32| history.table_name(*relid).map_or_else(|| format!("OID {relid}"), str::to_owned);
        let lost: Vec<String> = found.relids.iter().filter(is_lost).map(name).collect();
        let tables: Vec<String> =
            known.into_iter().filter(|t| found.relids.contains(&t.relid)).map(|t| t.name).collect();
        if tables.is_empty() || (chosen.is_empty() && !lost.is_empty()) {
            let e = Error::new(
                Kind::OutsideWindow,
                format!(
                    "of the tables that restore {id} changed, these cannot be restored to before it: {}",
                    lost.join(", ")
                ),
            )
            .window(history.windows(Some(found.tenant)));
            return Err(match tables.is_empty() {
                true => e,
                false => e.hint(format!("--table takes others back: {}", tables.join(", "))),
            });
        }
        return Ok(Undo { tenant: entry.tenant.clone(), tables, rows: found.rows });
    }
}

/// Holds what the undo of a restore that was just committed needs; until when. The repository is open for writing.
pub async fn hold(repo: &Arc<Repository>, source: Uuid, tenant: Uuid, undo: &str, by: &str) -> Result<Option<i64>> {
    hold_since(repo, source, tenant, undo, by, repo.clock().now_us()).await
}

/// The same for one that was committed at a time, in microseconds; nothing when it is held already.
pub async fn hold_since(
    repo: &Arc<Repository>,
    source: Uuid,
    tenant: Uuid,
    undo: &str,
    by: &str,
    committed_us: i64,
) -> Result<Option<i64>> {
    let now_us = repo.clock().now_us();
    let committed_us = committed_us.min(now_us);
    let id = Uuid::try_parse(undo).unwrap_or_else(|_| Uuid::new_v4());
    let mut catalog = Catalog::open(repo, source, tenant, None).await?;
    let entry = Entry::Hold {
        id,
        number: 0,
        reason: format!("undo of the restore in place {undo}"),
        from_us: Some(committed_us - HOLD_BEFORE_US),
        to_us: Some(now_us),
        by: by.to_owned(),
        until_us: Some(committed_us + HOLD_FOR_US),
    };
    catalog.append_if(entry, |s| s.holds.iter().all(|h| h.id != id)).await?;
    Ok(catalog.state().holds.iter().find(|h| h.id == id).and_then(|h| h.until_us))
}
