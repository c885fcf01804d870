//! Fences: triggers that make the tenant's writers wait while a restore applies its difference.
//!
//! A fence is made and removed in a short transaction of its own, table by table, waiting at most 200 ms for the
//! table's lock, so nobody queues behind it for longer. A restore holds one session lock from before its first fence
//! until after the last is gone; whoever has that lock finds only fences of restores that died or gave up, and removes them.
//! A fence that stands alone makes a writer of its tenant take a lock that nobody has, and no more.

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
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts: whoever waited behind the first one goes on.
const PAUSE: Duration = Duration::from_millis(100);
/// How long whoever removes what was left behind is waited for.
const TURN: Duration = Duration::from_secs(3);
/// Of a row `t` of `pg_trigger`.
const IS_FENCE: &str = "t.tgname LIKE 'aaa\\_coffer\\_fence%' AND t.tgparentid = 0 AND NOT t.tgisinternal";

/// Takes the lock that only one restore in place of a database has at a time. It goes with the session.
pub async fn only_one(client: &SqlClient) -> Result<()> {
    let began = Instant::now();
    while !first(client).await? {
        if began.elapsed() > TURN {
            return Err(busy());
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// Takes the lock of [`only_one`] if nobody has it.
pub async fn first(client: &SqlClient) -> Result<bool> {
    let row = client
        .query_one("SELECT pg_catalog.pg_try_advisory_lock($1, 0)", &[&RESTORE_LOCK])
        .await
        .sql("cannot take the restore's lock")?;
    Ok(row.get(0))
}

fn busy() -> Error {
    Error::new(Kind::Fenced, "another restore in place is running in this database")
        .code("busy")
        .hint("wait until it has ended; nothing was changed")
}

/// Whether any table has a fence, of a restore that runs or of one that left it behind.
pub async fn any(client: &SqlClient) -> Result<bool> {
    let row = client
        .query_one(&format!("SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE {IS_FENCE})"), &[])
        .await
        .sql("cannot look for fences")?;
    Ok(row.get(0))
}

/// Removes the fences that restores left that died or gave up removing them. Only with the lock of [`only_one`].
pub async fn remove_leftovers(client: &SqlClient, patience: Duration) -> Result<usize> {
    let rows = client
        .query(
            &format!(
                "SELECT DISTINCT t.tgrelid, t.tgrelid::pg_catalog.regclass::text FROM pg_catalog.pg_trigger t WHERE {IS_FENCE}"
            ),
            &[],
        )
        .await
        .sql("cannot look for fences of restores before")?;
    let tables: Vec<(u32, String)> = rows.iter().map(|r| (r.get(0), r.get(1))).collect();
    remove(client, &tables, patience).await?;
    for (_, table) in &tables {
        tracing::warn!(%table, "removed the fence of a restore that did not end, or could not remove it");
    }
    Ok(tables.len())
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

/// Removes the fences of these tables, those first whose locks are free: a reader that stays in its transaction holds one
/// up, and not the others.
///
/// # Errors
/// `Fenced`: after `patience` some are left. They hold nobody up.
pub async fn remove(client: &SqlClient, tables: &[(u32, String)], patience: Duration) -> Result<()> {
    let began = Instant::now();
    let mut left: Vec<&(u32, String)> = tables.iter().collect();
    loop {
        let mut busy = Vec::new();
        for table in left {
            let call = format!("SELECT coffer._agent_unfence({}::oid::regclass)", table.0);
            if !attempt(client, &call, &format!("cannot remove the fence of {}", table.1)).await? {
                busy.push(table);
            }
        }
        if busy.is_empty() {
            return Ok(());
        }
        if began.elapsed() >= patience {
            let names: Vec<&str> = busy.iter().map(|t| t.1.as_str()).collect();
            let what = format!("somebody uses {}, whose fence cannot be removed meanwhile", names.join(", "));
            return Err(Error::new(Kind::Fenced, what)
                .hint("a long transaction reads or writes there: let it end, or end it, and try again"));
        }
        left = busy;
        tokio::time::sleep(PAUSE).await;
    }
}

async fn patiently(client: &SqlClient, call: &str, what: &str) -> Result<()> {
    let began = Instant::now();
    while !attempt(client, call, what).await? {
        if began.elapsed() > PATIENCE {
            return Err(Error::new(Kind::Fenced, format!("{what}: its lock was not free for {PATIENCE:?}"))
                .hint("a long transaction writes to the table: let it end, or end it, and restore again"));
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// Does something that needs a table's lock; whether it was to be had.
async fn attempt(client: &SqlClient, call: &str, what: &str) -> Result<bool> {
    let statement = format!("BEGIN; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; {call}; COMMIT");
    let Err(e) = client.batch_execute(&statement).await else { return Ok(true) };
    client.batch_execute("ROLLBACK").await.sql(what)?;
    match e.code() {
        Some(c) if *c == SqlState::LOCK_NOT_AVAILABLE || *c == SqlState::T_R_DEADLOCK_DETECTED => Ok(false),
        _ => Err(sql::sql_error(e, what)),
    }
}

/// Waits until no writer of the tenant is inside a transaction, and keeps them out until the caller's ends.
pub async fn close(client: &SqlClient, tenant: &Tenant) -> std::result::Result<(), tokio_postgres::Error> {
    let key = literal(&tenant.key);
    client
        .batch_execute(&format!("SELECT pg_catalog.pg_advisory_xact_lock({FENCE_LOCKS}, pg_catalog.hashtext({key}))"))
        .await
}
