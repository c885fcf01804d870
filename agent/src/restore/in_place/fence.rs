//! Fences: triggers that make the tenant's writers wait while a restore applies its difference.
//!
//! A fence is made and removed in a short transaction of its own, table by table, waiting at most 200 ms for the
//! table's lock, so nobody queues behind it for longer. A restore holds one session lock from before its first fence
//! until after the last is gone; whoever has that lock finds only fences of restores that died, and removes them.

use crate::error::{Error, Kind, Result};
use crate::restore::in_place::live::{LiveTable, literal};
use crate::sql::{self, SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::TenantKind;
use std::time::{Duration, Instant};
use tokio_postgres::error::SqlState;

/// The first number of the advisory locks that writers take in a fence; the second is the hash of the tenant's key.
const FENCE_LOCKS: i32 = 6_516_582;
/// Held by a restore in place, whatever its tenant.
const RESTORE_LOCK: i32 = 6_516_584;

const LOCK_TIMEOUT_MS: u32 = 200;
/// How long one table's fence is tried for before the restore gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes the lock that only one restore in place of a database has at a time. It goes with the session.
pub async fn only_one(client: &SqlClient) -> Result<()> {
    let got: bool = client
        .query_one("SELECT pg_catalog.pg_try_advisory_lock($1, 0)", &[&RESTORE_LOCK])
        .await
        .sql("cannot take the restore's lock")?
        .get(0);
    if got {
        return Ok(());
    }
    Err(Error::new(Kind::Fenced, "another restore in place is running in this database")
        .code("busy")
        .hint("wait until it has ended; nothing was changed"))
}

/// Removes the fences that restores left that died. Only with the lock of [`only_one`].
pub async fn remove_leftovers(client: &SqlClient) -> Result<usize> {
    let rows = client
        .query(
            "SELECT DISTINCT t.tgrelid, t.tgrelid::pg_catalog.regclass::text FROM pg_catalog.pg_trigger t \
             WHERE t.tgname LIKE 'aaa\\_coffer\\_fence%' AND t.tgparentid = 0 AND NOT t.tgisinternal",
            &[],
        )
        .await
        .sql("cannot look for fences of restores before")?;
    for r in &rows {
        let (relid, name): (u32, String) = (r.get(0), r.get(1));
        tracing::warn!(table = %name, "removing the fence of a restore that did not end");
        remove(client, relid, &name).await?;
    }
    Ok(rows.len())
}

/// Fences the table against writers of the tenant's rows.
pub async fn make(client: &SqlClient, table: &LiveTable, tenant: &Tenant) -> Result<()> {
    let column = table.rule.tenant_column.as_deref().map_or_else(|| "NULL".to_owned(), literal);
    let key = match tenant.kind {
        TenantKind::Normal => literal(&tenant.key),
        _ => "NULL".to_owned(),
    };
    let call = format!("SELECT coffer._agent_fence({}::oid::regclass, {column}, {key})", table.rule.relid);
    patiently(client, &call, &format!("cannot fence {}", table.name())).await
}

/// Removes the table's fence, if it has one.
pub async fn remove(client: &SqlClient, relid: u32, name: &str) -> Result<()> {
    let call = format!("SELECT coffer._agent_unfence({relid}::oid::regclass)");
    patiently(client, &call, &format!("cannot remove the fence of {name}")).await
}

async fn patiently(client: &SqlClient, call: &str, what: &str) -> Result<()> {
    let statement = format!("BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; {call}; COMMIT");
    let began = Instant::now();
    loop {
        let Err(e) = client.batch_execute(&statement).await else { return Ok(()) };
        client.batch_execute("ROLLBACK").await.sql(what)?;
        let busy =
            matches!(e.code(), Some(c) if *c == SqlState::LOCK_NOT_AVAILABLE || *c == SqlState::T_R_DEADLOCK_DETECTED);
        if !busy {
            return Err(sql::sql_error(e, what));
        }
        if began.elapsed() > PATIENCE {
            return Err(Error::new(Kind::Fenced, format!("{what}: its lock was not free for {PATIENCE:?}"))
                .hint("a long transaction writes to the table: let it end, or end it, and restore again"));
        }
        // Whoever waited behind the attempt goes first.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until no writer of the tenant is inside a transaction, and keeps them out until the caller's ends.
pub async fn close(client: &SqlClient, tenant: &Tenant) -> std::result::Result<(), tokio_postgres::Error> {
    let key = literal(&tenant.key);
    client
        .batch_execute(&format!("SELECT pg_catalog.pg_advisory_xact_lock({FENCE_LOCKS}, pg_catalog.hashtext({key}))"))
        .await
}
