//! Fences: triggers that make the tenant's writers wait while a restore applies its difference.
//!
//! Each of a fence's triggers is made and removed in a short transaction of its own. All that such a transaction waits
//! for and does, with the locks of every partition, is over within 200 ms, so nobody queues behind it for longer: what is
//! not done by then is given up and tried again. A restore holds one session lock from before its first fence
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

/// Locks above ROW EXCLUSIVE are waited for and held for 200 ms at most; the rest is for the commit, or for giving up.
const ATTEMPT_MS: u32 = 150;
/// What a fence has a trigger for. Each is made by itself: of a table with many partitions, all of them would take long.
const EVENTS: [&str; 3] = ["ins", "upd", "del"];
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
    let began = Instant::now();
    for event in EVENTS {
        let call =
            format!("SELECT coffer._agent_fence({}::oid::regclass, {column}, {key}, '{event}')", table.rule.relid);
        patiently(client, &call, &table.name(), began).await?;
    }
    Ok(())
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
            for event in EVENTS {
                let call = format!("SELECT coffer._agent_unfence({}::oid::regclass, '{event}')", table.0);
                if !attempt(client, &call, &format!("cannot remove the fence of {}", table.1)).await? {
                    busy.push(table);
                    break;
                }
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

async fn patiently(client: &SqlClient, call: &str, table: &str, began: Instant) -> Result<()> {
    let what = format!("cannot fence {table}");
    while !attempt(client, call, &what).await? {
        if began.elapsed() > PATIENCE {
            let why =
                format!("for {PATIENCE:?}, no attempt had the locks of it and of its partitions and was done in time");
            return Err(Error::new(Kind::Fenced, format!("{what}: {why}")).hint(
                "a long transaction writes there: let it end, or end it, and restore again; a table with thousands of \
                 partitions can be restored to a schema",
            ));
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// Does something that needs locks of a table and of its partitions; whether it was done in time. The commit waits for no
/// disk and no standby under these locks: a fence that a crash takes back had nobody behind it, and one that it brings
/// back is left over.
async fn attempt(client: &SqlClient, call: &str, what: &str) -> Result<bool> {
    let statement = format!(
        "BEGIN; SET LOCAL synchronous_commit = off; SET LOCAL statement_timeout = {ATTEMPT_MS}; {call}; COMMIT"
    );
    let began = Instant::now();
    let Err(e) = client.batch_execute(&statement).await else { return Ok(true) };
    let took = began.elapsed();
    client.batch_execute("ROLLBACK").await.sql(what)?;
    // Before its time is over it is no timeout that ends a statement, but somebody who wants it to end.
    if e.code() == Some(&SqlState::QUERY_CANCELED) && took < Duration::from_millis(ATTEMPT_MS.into()) {
        return Err(sql::sql_error(e, what));
    }
    const NOT_NOW: [SqlState; 3] =
        [SqlState::QUERY_CANCELED, SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED];
    match e.code() {
        Some(c) if NOT_NOW.contains(c) => Ok(false),
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
