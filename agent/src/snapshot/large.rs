//! Rows with large values, read value by value in slices.
//!
//! COPY sends a row whole, and cannot send one at all whose text is beyond a gigabyte; a base must hold neither in
//! memory. So where a table stores large values out of line, rows above [`ROW_BYTES`] are left out of its COPY and read
//! one by one: their small columns by COPY, each large one in slices, into the pieces of the same line that COPY would
//! have written.
//!
//! The size of `text` and `bytea` is read from the value's header; of other types only the stored, compressed size is
//! known without reading the value, so for them a generous factor decides.

use crate::crypto::put_hex;
use crate::error::{Error, Result};
use crate::snapshot::read::{Leaf, Lines, Rows};
use crate::snapshot::rows::RowShape;
use crate::sql::{SqlClient, SqlContext};
use coffer_wire::{TenantKind, copy_text, quote_ident};
use futures::StreamExt;
use std::sync::Arc;
use tokio::sync::mpsc;

/// A table with less than this stored out of line has no large row.
pub const TOAST_BYTES: i64 = 256 << 10;
/// A row whose columns add up to more text than this is large.
const ROW_BYTES: i64 = 8 << 20;
/// Columns of a large row above this are read in slices.
const VALUE_BYTES: i64 = 1 << 20;
/// Bytes of a slice. The server reads a `bytea` from where the slice begins, but other types whole for each slice.
const BYTEA_SLICE: i64 = 4 << 20;
const TEXT_SLICE: i64 = 16 << 20;
/// How much larger than its stored form a value's text may be, for types that do not tell.
const STORED_FACTOR: i64 = 16;
/// Slices on their way to the merge.
const PIECES_AHEAD: usize = 2;

/// How a type tells its size, and is read in slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nature {
    Bytea,
    Text,
    /// By its text, which the server makes anew for every slice.
    Other,
}

#[derive(Clone, Debug)]
struct Column {
    /// Its place in the select list.
    place: usize,
    name: String,
    nature: Nature,
}

impl Column {
    /// Bytes of its text, about.
    fn size(&self) -> String {
        let c = &self.name;
        match self.nature {
            Nature::Bytea => format!("COALESCE(2 * pg_catalog.octet_length({c})::int8, 0)"),
            Nature::Text => format!("COALESCE(pg_catalog.octet_length({c})::int8, 0)"),
            Nature::Other => format!("COALESCE({STORED_FACTOR} * pg_catalog.pg_column_size({c})::int8, 0)"),
        }
    }

    fn slice(&self) -> i64 {
        if self.nature == Nature::Bytea { BYTEA_SLICE } else { TEXT_SLICE }
    }

    /// Bytes of which slices are taken.
    fn bytes(&self) -> String {
        match self.nature {
            Nature::Bytea => self.name.clone(),
            Nature::Text | Nature::Other => format!("pg_catalog.textsend({}::text)", self.name),
        }
    }
}

/// The columns of a table that may be large.
#[derive(Clone, Debug)]
pub struct LargeColumns {
    columns: Vec<Column>,
    /// A condition for rows that COPY may take.
    pub row_is_small: String,
}

impl LargeColumns {
    /// `None`: no column can be large.
    pub async fn of(client: &SqlClient, leaf: u32, shape: &RowShape) -> Result<Option<Self>> {
        let rows = client
            .query(
                "SELECT a.attname::text, CASE WHEN t.typbasetype <> 0 THEN t.typbasetype ELSE t.oid END \
                 FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
                 WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attlen = -1 \
                    AND a.attstorage <> 'p' AND t.oid <> 'pg_catalog.numeric'::pg_catalog.regtype",
                &[&leaf],
            )
            .await
            .sql("cannot look for large columns")?;
        let mut columns = Vec::new();
        for r in &rows {
            let (name, oid): (&str, u32) = (r.get(0), r.get(1));
            let Some(place) = shape.columns.iter().position(|c| c == name) else { continue };
            let nature = match oid {
                17 => Nature::Bytea,
                25 | 1042 | 1043 => Nature::Text,
                _ => Nature::Other,
            };
            columns.push(Column { place, name: quote_ident(name), nature });
        }
        Ok(Self::new(columns))
    }

    fn new(mut columns: Vec<Column>) -> Option<Self> {
        if columns.is_empty() {
            return None;
        }
        columns.sort_by_key(|c| c.place);
        let sizes: Vec<String> = columns.iter().map(Column::size).collect();
        let row_is_small = format!("({} <= {ROW_BYTES})", sizes.join(" + "));
        Some(Self { columns, row_is_small })
    }

    pub fn row_is_large(&self) -> String {
        format!("NOT {}", self.row_is_small)
    }
}

/// A large row on its way to the merge.
pub struct LargeRow {
    pub relation: Arc<Vec<u8>>,
    pub kind: TenantKind,
    pub tenant: Vec<u8>,
    pub key: Vec<u8>,
    pieces: mpsc::Receiver<Piece>,
}

enum Piece {
    Bytes(Vec<u8>),
    /// The line is complete.
    End,
}

impl LargeRow {
    /// Appends the next piece of the line; false at its end. Blocking.
    pub fn next(&mut self, out: &mut Vec<u8>) -> Result<bool> {
        match self.pieces.blocking_recv() {
            Some(Piece::Bytes(b)) => {
                out.extend_from_slice(&b);
                Ok(true)
            }
            Some(Piece::End) => Ok(false),
            None => Err(Error::other("the read of a large row broke off")),
        }
    }
}

/// Reads the rows of a leaf that `filter` names, large ones all. Returns how many they are.
pub(super) async fn rows(
    client: &SqlClient,
    leaf: &Leaf,
    large: &LargeColumns,
    filter: &str,
    out: &mpsc::Sender<Rows>,
) -> Result<u64> {
    let what = || format!("cannot read the large rows of {}", leaf.from);
    let sizes: Vec<String> = large.columns.iter().map(Column::size).collect();
    let found = client
        .query(&format!("SELECT ctid::text, ARRAY[{}] FROM {}{filter}", sizes.join(", "), leaf.from), &[])
        .await
        .sql(what())?;
    for r in &found {
        let (ctid, sizes): (String, Vec<i64>) = (r.get(0), r.get(1));
        let sliced: Vec<&Column> =
            large.columns.iter().zip(&sizes).filter(|(_, s)| **s > VALUE_BYTES).map(|(c, _)| c).collect();
        row(client, leaf, &sliced, &ctid, out).await.map_err(|e| e.during(what()))?;
    }
    Ok(found.len() as u64)
}

async fn row(client: &SqlClient, leaf: &Leaf, sliced: &[&Column], ctid: &str, out: &mpsc::Sender<Rows>) -> Result<()> {
    let select: Vec<String> = leaf
        .shape
        .select
        .iter()
        .enumerate()
        .map(|(i, c)| if sliced.iter().any(|s| s.place == i) { "NULL".to_owned() } else { c.clone() })
        .collect();
    let from = format!("FROM {} WHERE ctid = '{ctid}'", leaf.from);
    let stream = client.copy_out(&format!("COPY (SELECT {} {from}) TO STDOUT", select.join(", "))).await.sql("COPY")?;
    let mut stream = std::pin::pin!(stream);
    let (mut lines, mut line) = (Lines::default(), None);
    while let Some(chunk) = stream.next().await {
        lines.feed(&chunk.sql("COPY")?, |l| line = Some(l.to_vec()));
    }
    let line = line.ok_or_else(|| Error::other(format!("the row at {ctid} is not there any more")))?;
    let mut key = Vec::new();
    let cut = leaf.shape.cut(&line, &mut key)?;
    let (tx, pieces) = mpsc::channel(PIECES_AHEAD);
    let row = LargeRow { relation: leaf.relation.clone(), kind: cut.kind, tenant: cut.tenant.to_vec(), key, pieces };
    let gone = || Error::other("the merge of base rows has stopped");
    out.send(Rows::Large(row)).await.map_err(|_| gone())?;
    for (i, field) in copy_text::fields(cut.image).enumerate() {
        if i > 0 {
            tx.send(Piece::Bytes(b"\t".to_vec())).await.map_err(|_| gone())?;
        }
        match sliced.iter().find(|s| s.place == i) {
            None => tx.send(Piece::Bytes(field.to_vec())).await.map_err(|_| gone())?,
            Some(c) => value(client, c, &from, &tx).await?,
        }
    }
    tx.send(Piece::End).await.map_err(|_| gone())
}

/// Sends a field: what COPY would write for the value.
async fn value(client: &SqlClient, column: &Column, from: &str, tx: &mpsc::Sender<Piece>) -> Result<()> {
    let (bytes, length) = (column.bytes(), column.slice());
    let slice = client
        .prepare(&format!("SELECT pg_catalog.substring({bytes}, $1::int4, {length}::int4) {from}"))
        .await
        .sql("a slice of a value")?;
    let mut at: i64 = 1;
    loop {
        let place = i32::try_from(at).map_err(|_| Error::other("a value is longer than PostgreSQL allows"))?;
        let r = client.query_one(&slice, &[&place]).await.sql("a slice of a value")?;
        let part: &[u8] = r.get(0);
        let mut out = Vec::with_capacity(part.len() * 2 + 4);
        match column.nature {
            Nature::Bytea => {
                if at == 1 {
                    out.extend_from_slice(b"\\\\x");
                }
                put_hex(&mut out, part);
            }
            Nature::Text | Nature::Other => copy_text::escape_into(&mut out, part),
        }
        let ended = (part.len() as i64) < length;
        tx.send(Piece::Bytes(out)).await.map_err(|_| Error::other("the merge of base rows has stopped"))?;
        if ended {
            return Ok(());
        }
        at += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_asked_for_without_reading_values() {
        let column = |place, name: &str, nature| Column { place, name: name.into(), nature };
        let l = LargeColumns::new(vec![column(2, "j", Nature::Other), column(0, "a", Nature::Bytea)]).unwrap();
        assert_eq!(
            l.row_is_small,
            "(COALESCE(2 * pg_catalog.octet_length(a)::int8, 0) + \
             COALESCE(16 * pg_catalog.pg_column_size(j)::int8, 0) <= 8388608)"
        );
        assert!(LargeColumns::new(vec![]).is_none());
    }
}
