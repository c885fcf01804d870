//! Waiting for the marker that makes a base valid.
//!
//! A marker comes with the stream or never: a gap or a promotion swallows it, and a server that went down may have forgotten
//! a commit that was asynchronous. Whoever waits has to find out, or would wait for ever.

use super::{BaseTaker, again, job};
use crate::error::{Error, Result};
use crate::run::AgentContext;
use crate::sql::{self, SqlClient};
use coffer_wire::Lsn;
use std::time::Duration;

/// How often it is looked whether the session of a marker that does not come is still there.
const SESSION_CHECK: Duration = Duration::from_secs(1);

impl BaseTaker {
    /// Writes a marker and waits until the stream has delivered it. Returns where its transaction ends.
    pub(super) async fn wait_for_marker(&mut self, session: &SqlClient) -> Result<Lsn> {
        let breaks = self.seen.breaks();
        let mut id = job::mark(session).await?;
        // A server that went down may have forgotten the marker: then it is not before the end that its log has now.
        let mut last = None;
        let ctx = self.ctx.clone();
        let ended = end_after(&ctx, session);
        let mut look = tokio::time::interval(SESSION_CHECK);
        tokio::pin!(ended);
        loop {
            let d = tokio::select! {
                d = self.durable.recv() => d,
                at = &mut ended, if last.is_none() => {
                    last = Some(at);
                    continue;
                }
                _ = look.tick() => {
                    // A server that was left goes on, and its log is nobody's.
                    if !session.is_closed() && !ctx.follows(session) {
                        return Err(again("the stream comes from another server than the one that has the marker of a base"));
                    }
                    continue;
                }
                () = ctx.stopped() => return Err(Error::other("the agent is stopping").code("stopping")),
            };
            let d = self.take_in(d).await?;
            if self.seen.breaks() != breaks {
                return Err(again("the log broke off while the marker of a base was waited for"));
            }
            let Some(d) = d else {
                // The marker may have been among what was not heard.
                id = job::mark(session).await?;
                continue;
            };
            if let Some(m) = d.markers.iter().find(|m| m.kind == "base" && m.payload == id) {
                return Ok(m.end_lsn);
            }
            if last.is_some_and(|l| d.record.upto_lsn >= l) {
                return Err(again("the server went down and has forgotten the marker of a base"));
            }
        }
    }
}

/// Ready when the session has ended and the server is there again: where its log ends.
async fn end_after(ctx: &AgentContext, session: &SqlClient) -> Lsn {
    loop {
        tokio::time::sleep(SESSION_CHECK).await;
        if !session.is_closed() {
            continue;
        }
        let Ok(dsn) = ctx.source_dsn().await else { continue };
        let Ok(client) = sql::connect(&dsn).await else { continue };
        let row = client.query_one("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[]).await;
        if let Some(at) = row.ok().and_then(|r| r.get::<_, &str>(0).parse().ok()) {
            return at;
        }
    }
}
