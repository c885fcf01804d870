//! Differences on the server: one temporary table per table that has any.
//!
//! Temporary tables are not in the log, are seen by no other session, and go with it, so a restore that dies leaves
//! nothing to clean up. Their columns are `op` and `c0`, `c1`, … with the live columns' types; a row marked `D` holds
//! the live row, one marked `I` or `U` the row at the target.

use crate::error::{Error, Result};
use crate::restore::in_place::compare::Staged;
use crate::restore::in_place::live::LiveTable;
use crate::restore::in_place::mapping::Mapping;
use crate::sql::{SqlClient, SqlContext};
use bytes::Bytes;
use coffer_wire::quote_ident;
use futures::SinkExt;
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::mpsc;

/// The staging table of a live table.
pub fn name(relid: u32) -> String {
    format!("pg_temp.coffer_stage_{relid}")
}

/// Writes what a comparison sends. Tables staged before are emptied first; `made` says which exist.
pub async fn write(
    client: &SqlClient,
    tables: &BTreeMap<u32, LiveTable>,
    made: &mut BTreeSet<u32>,
    mut staged: mpsc::Receiver<Staged>,
) -> Result<()> {
    for relid in made.iter() {
        client
            .batch_execute(&format!("DROP TABLE {}", name(*relid)))
            .await
            .sql("cannot drop the staging of an earlier comparison")?;
    }
    made.clear();
    while let Some(s) = staged.recv().await {
        match s {
            Staged::Begin(relid, mapping) => {
                if let Some(first) = first_lines(&mut staged).await {
                    create(client, &tables[&relid], &mapping).await?;
                    made.insert(relid);
                    fill(client, relid, first, &mut staged).await?;
                }
            }
            Staged::Lines(_) | Staged::End => return Err(Error::other("differences came outside of a table")),
        }
    }
    Ok(())
}

/// Most tables have no difference, and get no table.
async fn first_lines(staged: &mut mpsc::Receiver<Staged>) -> Option<Vec<u8>> {
    match staged.recv().await {
        Some(Staged::Lines(l)) => Some(l),
        _ => None,
    }
}

async fn create(client: &SqlClient, table: &LiveTable, mapping: &Mapping) -> Result<()> {
    let columns: String =
        mapping.columns.iter().enumerate().map(|(i, c)| format!(", t.{} AS c{i}", quote_ident(&c.name))).collect();
    let statement = format!(
        "CREATE TEMP TABLE {} AS SELECT ' '::\"char\" AS op{columns} FROM {} t WITH NO DATA",
        name(table.rule.relid).trim_start_matches("pg_temp."),
        table.rule.from_clause()
    );
    client.batch_execute(&statement).await.sql(format_args!("cannot stage the difference of {}", table.name()))
}

async fn fill(client: &SqlClient, relid: u32, first: Vec<u8>, staged: &mut mpsc::Receiver<Staged>) -> Result<()> {
    let table = name(relid);
    let what = || format!("cannot write to {table}");
    let sink = client.copy_in(&format!("COPY {table} FROM STDIN")).await.sql(what())?;
    let mut sink = std::pin::pin!(sink);
    sink.send(Bytes::from(first)).await.sql(what())?;
    while let Some(Staged::Lines(l)) = staged.recv().await {
        sink.send(Bytes::from(l)).await.sql(what())?;
    }
    sink.finish().await.sql(what())?;
    // The joins with the live table are planned by what is in here: a handful of rows, or the whole tenant.
    client.batch_execute(&format!("ANALYZE {table}")).await.sql(what())
}
