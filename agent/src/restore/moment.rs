//! The moment that a restore is asked for: the history that has it, and its position there.

use super::request::{Means, Place, Request};
use crate::archive::{Alone, alone};
use crate::error::{Kind, Result};
use crate::history::{History, Target, When};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How often the log is looked at while a target is waited for.
pub(super) const POLL: Duration = Duration::from_millis(500);

/// The history that the target is in, and the target. An archive is a history of its own; one that is not whole gives way
/// to the log, as long as that has its point.
pub(super) async fn find(means: &Means<'_>, request: &Request, tenant: Uuid) -> Result<(History, Target)> {
    let alone = match request.to {
        When::Backup(id) => alone(means.opened, means.source.1, tenant, id).await,
        _ => Alone::None,
    };
    let archive = match alone {
        Alone::None => return wait_for(means, request, tenant).await,
        Alone::Unreadable(e) => return wait_for(means, request, tenant).await.map_err(|_| e),
        Alone::Doubtful(archive) => match wait_for(means, request, tenant).await {
            Ok((log, target)) if log.require(&target, tenant, &|_| true).is_ok() => return Ok((log, target)),
            _ => archive,
        },
        Alone::Sound(archive) => archive,
    };
    let target = archive.resolve(&request.to).await?;
    Ok((*archive, target))
}

/// The history in which the target is durable, and the target. For a new database, its definitions count, too: the agent
/// archives them a moment after they changed.
async fn wait_for(means: &Means<'_>, request: &Request, tenant: Uuid) -> Result<(History, Target)> {
    let deadline = request.wait.map(|w| Instant::now() + w);
    let over = || deadline.is_none_or(|d| Instant::now() + POLL > d);
    let new_database = matches!(request.place, Place::Database(_));
    loop {
        means.watch.check()?;
        let mut history = means.opened.history(means.source.1).await?;
        history.load_catalog(tenant).await?;
        match history.resolve(&request.to).await {
            Ok(target) if !new_database || over() || !history.definitions_pending(&target) => {
                return Ok((history, target));
            }
            Ok(_) => {}
            Err(e) => {
                let may_come = e.is_code("not_durable")
                    || (e.kind() == Kind::NotFound && matches!(request.to, When::Name(_) | When::Undo(_)));
                if !may_come || over() {
                    return Err(e);
                }
            }
        }
        tokio::time::sleep(POLL).await;
    }
}
