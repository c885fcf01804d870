//! Rows that COPY does not take: the server holds a line of it in one piece, of at most a gigabyte, while a row's values
//! may be that large each.
//!
//! Such a row goes to a temporary table in pieces, and one INSERT puts its values together from there, each by the input
//! of its column's type. The line is nowhere in memory as a whole: here there is a piece of it, on the server a value.

use super::encode::Unescape;
use super::load::Ready;
use crate::crypto::put_hex;
use crate::error::{Error, Result};
use crate::sql::{SqlClient, SqlContext};
use bytes::Bytes;
use coffer_wire::copy_text;
use futures::SinkExt;
use std::fmt::Write;
use std::pin::Pin;
use tokio_postgres::CopyInSink;

/// Bytes of a line of COPY text above which it is a wide row: well below the server's limit, which counts the line with
/// its escapes and as it is in the database's own encoding.
pub(super) const WIDE: u64 = 512 << 20;
/// Bytes of a value that are sent as one piece.
const PIECE: usize = 1 << 20;

const PIECES: &str = "pg_temp.coffer_pieces";

/// A row on its way.
pub(super) struct WideRow<'c> {
    client: &'c SqlClient,
    into: &'c Ready,
    types: Vec<ColumnType>,
    cutter: Cutter,
    out: Vec<u8>,
    sink: Pin<Box<CopyInSink<Bytes>>>,
}

struct ColumnType {
    /// As SQL writes it, qualified.
    name: String,
    /// `bytea`, or a domain over it: its text is twice as long as the value, so it may be beyond what a text holds.
    is_bytea: bool,
}

impl<'c> WideRow<'c> {
    /// Inside a transaction.
    pub(super) async fn begin(client: &'c SqlClient, into: &'c Ready) -> Result<Self> {
        let types = column_types(client, into).await?;
        client
            .batch_execute(&format!(
                "CREATE TEMP TABLE {} (field int4, seq int8, piece bytea) ON COMMIT DROP; \
                 ALTER TABLE {PIECES} ALTER piece SET STORAGE EXTERNAL",
                PIECES.trim_start_matches("pg_temp.")
            ))
            .await
            .sql("cannot make room for a wide row")?;
        let sink = client.copy_in(&format!("COPY {PIECES} FROM STDIN")).await.sql("a wide row")?;
        let cutter = Cutter::new(types.iter().map(|t| t.is_bytea).collect());
        Ok(Self { client, into, types, cutter, out: Vec::new(), sink: Box::pin(sink) })
    }

    /// Takes the next bytes of the line.
    pub(super) async fn feed(&mut self, line: &[u8]) -> Result<()> {
        self.cutter.feed(line, &mut self.out)?;
        self.send().await
    }

    /// The line is complete: the row goes to its table.
    pub(super) async fn finish(mut self) -> Result<()> {
        let nulls = self.cutter.finish(&mut self.out)?;
        self.send().await?;
        self.sink.as_mut().finish().await.sql("a wide row")?;
        let mut values = String::new();
        for (i, (t, is_null)) in self.types.iter().zip(nulls).enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            let bytes = format!(
                "COALESCE((SELECT pg_catalog.string_agg(piece, ''::bytea ORDER BY seq) FROM {PIECES} \
                 WHERE field = {i}), ''::bytea)"
            );
            let value = match (is_null, t.is_bytea) {
                (true, _) => "NULL".to_owned(),
                (false, true) => bytes,
                // As COPY reads it: from the session's encoding to the database's.
                (false, false) => {
                    format!("pg_catalog.convert_from({bytes}, pg_catalog.current_setting('client_encoding'))")
                }
            };
            let _ = write!(values, "{comma}{value}::{}", t.name);
        }
        let (table, columns) = (&self.into.table, self.into.columns.join(", "));
        self.client
            .batch_execute(&format!(
                // COPY writes identity columns whatever they are generated for.
                "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {values}; DROP TABLE {PIECES}"
            ))
            .await
            .sql(format_args!("cannot load a row of more than {} MiB into {table}", WIDE >> 20))
    }

    async fn send(&mut self) -> Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        let out = std::mem::take(&mut self.out);
        self.sink.send(Bytes::from(out)).await.sql("a wide row")
    }
}

async fn column_types(client: &SqlClient, into: &Ready) -> Result<Vec<ColumnType>> {
    let rows = client
        .query(
            "SELECT pg_catalog.format_type(a.atttypid, a.atttypmod), \
               (WITH RECURSIVE b(oid, base) AS (SELECT t.oid, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid \
                 UNION ALL SELECT t.oid, t.typbasetype FROM pg_catalog.pg_type t JOIN b ON t.oid = b.base) \
                SELECT pg_catalog.bool_or(b.oid = 'pg_catalog.bytea'::pg_catalog.regtype) FROM b) \
             FROM ROWS FROM (pg_catalog.unnest($2::text[])) WITH ORDINALITY c(name, n) \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = $1::text::pg_catalog.regclass AND NOT a.attisdropped \
               AND a.attname = (pg_catalog.parse_ident(c.name))[1] \
             ORDER BY c.n",
            &[&into.table, &into.columns],
        )
        .await
        .sql(format_args!("cannot read the columns of {}", into.table))?;
    if rows.len() != into.columns.len() {
        return Err(Error::other(format!("{} does not have all of the columns of its rows", into.table)));
    }
    Ok(rows.iter().map(|r| ColumnType { name: r.get(0), is_bytea: r.get(1) }).collect())
}

/// Makes lines of COPY text for the table of pieces out of one long line.
struct Cutter {
    is_bytea: Vec<bool>,
    field: usize,
    seq: u64,
    /// Bytes of the field so far, as they came, and the first of them.
    came: u64,
    head: Vec<u8>,
    unescape: Unescape,
    /// Of the value, without escapes, not sent yet.
    value: Vec<u8>,
    nulls: Vec<bool>,
}

impl Cutter {
    fn new(is_bytea: Vec<bool>) -> Self {
        Self {
            is_bytea,
            field: 0,
            seq: 0,
            came: 0,
            head: Vec::new(),
            unescape: Unescape::default(),
            value: Vec::new(),
            nulls: Vec::new(),
        }
    }

    fn feed(&mut self, mut line: &[u8], out: &mut Vec<u8>) -> Result<()> {
        while let Some(at) = memchr::memchr(b'\t', line) {
            self.take(&line[..at], out)?;
            self.end_field(out)?;
            line = &line[at + 1..];
        }
        self.take(line, out)
    }

    /// Ends the line. Which of its fields are NULL.
    fn finish(&mut self, out: &mut Vec<u8>) -> Result<Vec<bool>> {
        self.end_field(out)?;
        if self.nulls.len() != self.is_bytea.len() {
            let (n, columns) = (self.nulls.len(), self.is_bytea.len());
            return Err(Error::other(format!("a wide row of {n} fields for {columns} columns")));
        }
        Ok(std::mem::take(&mut self.nulls))
    }

    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let room = copy_text::NULL.len() - self.head.len();
        self.head.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.came += bytes.len() as u64;
        self.unescape.feed(bytes, &mut self.value);
        if self.value.len() >= PIECE { self.put(out) } else { Ok(()) }
    }

    fn end_field(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let is_null = self.head == copy_text::NULL && self.came == copy_text::NULL.len() as u64;
        if !is_null {
            self.put(out)?;
        }
        self.nulls.push(is_null);
        self.value.clear();
        self.head.clear();
        (self.came, self.seq, self.unescape) = (0, 0, Unescape::default());
        self.field += 1;
        Ok(())
    }

    /// Puts what there is of the value. A digit without its other half waits.
    fn put(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let digits = self.is_bytea.get(self.field).copied().unwrap_or_default();
        let mut from = 0;
        if digits && self.seq == 0 {
            if !self.value.starts_with(b"\\x") {
                return Err(Error::other("a bytea of a wide row is not in hexadecimal digits"));
            }
            from = 2;
        }
        let until = if digits { from + (self.value.len() - from) / 2 * 2 } else { self.value.len() };
        out.extend_from_slice(format!("{}\t{}\t\\\\x", self.field, self.seq).as_bytes());
        if digits {
            out.extend_from_slice(&self.value[from..until]);
        } else {
            put_hex(out, &self.value[from..until]);
        }
        out.push(b'\n');
        self.value.drain(..until);
        self.seq += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the server would put together.
    fn together(lines: &[u8], fields: usize) -> Vec<Vec<u8>> {
        let mut out = vec![Vec::new(); fields];
        let mut next = vec![0; fields];
        for line in lines.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let parts: Vec<&str> = std::str::from_utf8(line).unwrap().split('\t').collect();
            let field: usize = parts[0].parse().unwrap();
            assert_eq!(parts[1].parse::<usize>().unwrap(), next[field], "pieces come in their order");
            next[field] += 1;
            let digits = parts[2].strip_prefix("\\\\x").unwrap();
            out[field].extend((0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()));
        }
        out
    }

    fn line_of(values: &[(bool, Option<Vec<u8>>)]) -> Vec<u8> {
        let mut line = Vec::new();
        for (i, (is_bytea, v)) in values.iter().enumerate() {
            if i > 0 {
                line.push(b'\t');
            }
            match v {
                None => line.extend_from_slice(copy_text::NULL),
                Some(v) if *is_bytea => {
                    line.extend_from_slice(b"\\\\x");
                    put_hex(&mut line, v);
                }
                Some(v) => copy_text::escape_into(&mut line, v),
            }
        }
        line
    }

    fn check(values: &[(bool, Option<Vec<u8>>)], cuts: &[usize]) {
        let line = line_of(values);
        let mut cutter = Cutter::new(values.iter().map(|v| v.0).collect());
        let (mut out, mut from) = (Vec::new(), 0);
        for cut in cuts.iter().map(|c| c % (line.len() + 1)) {
            if cut > from {
                cutter.feed(&line[from..cut], &mut out).unwrap();
                from = cut;
            }
        }
        cutter.feed(&line[from..], &mut out).unwrap();
        let nulls = cutter.finish(&mut out).unwrap();
        assert_eq!(nulls, values.iter().map(|v| v.1.is_none()).collect::<Vec<_>>());
        let want: Vec<Vec<u8>> = values.iter().map(|v| v.1.clone().unwrap_or_default()).collect();
        assert_eq!(together(&out, values.len()), want);
    }

    #[test]
    fn pieces_of_large_values_are_whole() {
        let large: Vec<u8> = (0..3 * PIECE + 5).map(|i| (i % 251) as u8).collect();
        let odd = vec![1_000_003, 2_000_006, 2_000_007, 5_000_001];
        check(&[(true, Some(large.clone())), (false, Some(large)), (false, None), (true, Some(Vec::new()))], &odd);
        check(&[(false, Some(b"\\N".to_vec())), (false, Some(b"N".to_vec())), (false, None)], &[1, 2, 3, 4]);
    }

    #[test]
    fn a_line_that_does_not_fit_its_columns_is_refused() {
        let mut out = Vec::new();
        let mut cutter = Cutter::new(vec![false, false]);
        cutter.feed(b"one", &mut out).unwrap();
        assert!(cutter.finish(&mut out).is_err());
        assert!(Cutter::new(vec![true]).feed(b"text\t", &mut out).is_err());
    }

    proptest! {
        #[test]
        fn any_values_come_out_as_they_went_in(
            values in prop::collection::vec((any::<bool>(), prop::option::of(prop::collection::vec(any::<u8>(), 0..40))), 1..6),
            mut cuts in prop::collection::vec(any::<usize>(), 0..6),
        ) {
            cuts.sort_unstable();
            check(&values, &cuts);
        }
    }
}
