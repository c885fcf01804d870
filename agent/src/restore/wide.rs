//! Rows that COPY does not take: the server holds a line of it in one piece, of at most a gigabyte, while a row's values
//! may be that large each.
//!
//! The row is put together in a temporary table of one row. Its small values come by COPY; each large one goes to another
//! temporary table in pieces, and an UPDATE makes one value of them, so that it is stored out of line before the next
//! one comes: a tuple that holds several in itself may be beyond a gigabyte, too. One INSERT then passes the row on. Here
//! there is never more than a few pieces in memory; on the server a value, a few times over.

use super::encode::Unescape;
use super::load::Ready;
use crate::crypto::put_hex;
use crate::error::{Error, Kind, Result};
use crate::merge::Image;
use crate::sql::{SqlClient, SqlContext};
use bytes::Bytes;
use coffer_wire::copy_text;
use futures::SinkExt;
use std::pin::Pin;
use tokio_postgres::CopyInSink;

/// Bytes of a line of COPY text above which it is a wide row: well below the server's limit, which counts the line with
/// its escapes and as it is in the database's own encoding.
pub(super) const WIDE: u64 = 512 << 20;
/// Bytes of a value that are sent as one piece; a field with more than this is large.
const PIECE: usize = 1 << 20;
/// Bytes of small fields beyond which every further one counts as large.
const SMALL_BYTES: usize = 32 << 20;

const PIECES: &str = "pg_temp.coffer_pieces";
const ROW: &str = "pg_temp.coffer_row";

/// The line of a row that is to be compared as a whole.
///
/// # Errors
/// `Refused`: it is wider than that is done for.
pub(crate) fn line_to_compare(image: &Image<'_>) -> Result<Vec<u8>> {
    if image.len() > WIDE {
        return Err(Error::new(
            Kind::Refused,
            format!("a row of {} MiB as text is not compared, only rows up to {} MiB", image.len() >> 20, WIDE >> 20),
        )
        .code("row_too_wide")
        .hint("restore with --mode schema or --mode database, or leave the table out with --table"));
    }
    image.to_line()
}

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
    /// What it is at the bottom of its domains, as SQL writes it, without a length: the table that the row goes to is what
    /// checks it.
    base: String,
    /// Its text is twice as long as the value, so it may be beyond what a text holds.
    is_bytea: bool,
}

impl<'c> WideRow<'c> {
    /// Inside a transaction.
    pub(super) async fn begin(client: &'c SqlClient, into: &'c Ready) -> Result<Self> {
        let types = column_types(client, into).await?;
        let columns: Vec<String> = types.iter().enumerate().map(|(i, t)| format!("c{i} {}", t.base)).collect();
        let plain = |name: &str| name.trim_start_matches("pg_temp.").to_owned();
        client
            .batch_execute(&format!(
                "CREATE TEMP TABLE {} (field int4, seq int8, piece bytea) ON COMMIT DROP; \
                 ALTER TABLE {PIECES} ALTER piece SET STORAGE EXTERNAL; \
                 CREATE TEMP TABLE {} ({}) ON COMMIT DROP",
                plain(PIECES),
                plain(ROW),
                columns.join(", ")
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
        let Small { line, large } = self.cutter.finish(&mut self.out)?;
        self.send().await?;
        self.sink.as_mut().finish().await.sql("a wide row")?;
        let sink = self.client.copy_in::<_, Bytes>(&format!("COPY {ROW} FROM STDIN")).await.sql("a wide row")?;
        let mut sink = std::pin::pin!(sink);
        sink.send(Bytes::from(line)).await.sql("a wide row")?;
        sink.finish().await.sql("a wide row")?;
        for i in large {
            let t = &self.types[i];
            let bytes = format!(
                "COALESCE((SELECT pg_catalog.string_agg(piece, ''::bytea ORDER BY seq) FROM {PIECES} \
                 WHERE field = {i}), ''::bytea)"
            );
            let value = match t.is_bytea {
                true => bytes,
                // As COPY reads it: from the session's encoding to the database's.
                false => format!("pg_catalog.convert_from({bytes}, pg_catalog.current_setting('client_encoding'))"),
            };
            self.client
                .batch_execute(&format!("UPDATE {ROW} SET c{i} = {value}::{}", t.base))
                .await
                .sql(format_args!("cannot make a value of column {} of {}", self.into.columns[i], self.into.table))?;
        }
        let (table, columns) = (&self.into.table, self.into.columns.join(", "));
        self.client
            .batch_execute(&format!(
                // COPY writes identity columns whatever they are generated for. What is truncated leaves the disk at once,
                // what is dropped with the transaction.
                "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT * FROM {ROW}; \
                 TRUNCATE {PIECES}, {ROW}; DROP TABLE {PIECES}, {ROW}"
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
            "SELECT pg_catalog.format_type(b.oid, -1), b.oid = 'pg_catalog.bytea'::pg_catalog.regtype \
             FROM ROWS FROM (pg_catalog.unnest($2::text[])) WITH ORDINALITY c(name, n) \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = $1::text::pg_catalog.regclass AND NOT a.attisdropped \
               AND a.attname = (pg_catalog.parse_ident(c.name))[1] \
             CROSS JOIN LATERAL (WITH RECURSIVE d(oid, base) AS ( \
                 SELECT t.oid, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid \
                 UNION ALL SELECT t.oid, t.typbasetype FROM pg_catalog.pg_type t JOIN d ON t.oid = d.base) \
               SELECT d.oid FROM d WHERE d.base = 0) b \
             ORDER BY c.n",
            &[&into.table, &into.columns],
        )
        .await
        .sql(format_args!("cannot read the columns of {}", into.table))?;
    if rows.len() != into.columns.len() {
        return Err(Error::other(format!("{} does not have all of the columns of its rows", into.table)));
    }
    Ok(rows.iter().map(|r| ColumnType { base: r.get(0), is_bytea: r.get(1) }).collect())
}

/// What of a row is not in pieces.
#[derive(Debug, PartialEq, Eq)]
struct Small {
    /// A line of COPY text, with its newline; large fields are NULL.
    line: Vec<u8>,
    /// Those fields.
    large: Vec<usize>,
}

/// Makes lines of COPY text for the table of pieces out of one long line.
struct Cutter {
    is_bytea: Vec<bool>,
    /// The field at hand.
    field: usize,
    /// Its bytes as they came, while it is small.
    raw: Vec<u8>,
    /// It is large: how many of its pieces are out, and what is not out of its value, without escapes.
    pieces: Option<u64>,
    unescape: Unescape,
    value: Vec<u8>,
    small: Small,
}

impl Cutter {
    fn new(is_bytea: Vec<bool>) -> Self {
        Self {
            is_bytea,
            field: 0,
            raw: Vec::new(),
            pieces: None,
            unescape: Unescape::default(),
            value: Vec::new(),
            small: Small { line: Vec::new(), large: Vec::new() },
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

    /// Ends the line.
    fn finish(&mut self, out: &mut Vec<u8>) -> Result<Small> {
        self.end_field(out)?;
        if self.field != self.is_bytea.len() {
            let (n, columns) = (self.field, self.is_bytea.len());
            return Err(Error::other(format!("a wide row of {n} fields for {columns} columns")));
        }
        let mut small = std::mem::replace(&mut self.small, Small { line: Vec::new(), large: Vec::new() });
        small.line.push(b'\n');
        Ok(small)
    }

    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        if self.pieces.is_none() {
            self.raw.extend_from_slice(bytes);
            let room = PIECE.min(SMALL_BYTES.saturating_sub(self.small.line.len()));
            if self.raw.len() <= room.max(copy_text::NULL.len()) {
                return Ok(());
            }
            self.pieces = Some(0);
            let raw = std::mem::take(&mut self.raw);
            self.unescape.feed(&raw, &mut self.value);
        } else {
            self.unescape.feed(bytes, &mut self.value);
        }
        if self.value.len() >= PIECE { self.put(out) } else { Ok(()) }
    }

    fn end_field(&mut self, out: &mut Vec<u8>) -> Result<()> {
        if self.field > 0 {
            self.small.line.push(b'\t');
        }
        if self.pieces.is_some() {
            self.put(out)?;
            if !self.value.is_empty() {
                return Err(Error::other("a bytea of a wide row has an odd number of digits"));
            }
            self.small.line.extend_from_slice(copy_text::NULL);
            self.small.large.push(self.field);
        } else {
            self.small.line.extend_from_slice(&self.raw);
        }
        self.raw.clear();
        (self.pieces, self.unescape) = (None, Unescape::default());
        self.field += 1;
        Ok(())
    }

    /// Puts what there is of a large value. A digit without its other half waits.
    fn put(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let seq = self.pieces.unwrap_or_default();
        let digits = self.is_bytea.get(self.field).copied().unwrap_or_default();
        let mut from = 0;
        if digits && seq == 0 {
            if !self.value.starts_with(b"\\x") {
                return Err(Error::other("a bytea of a wide row is not in hexadecimal digits"));
            }
            from = 2;
        }
        let until = if digits { from + (self.value.len() - from) / 2 * 2 } else { self.value.len() };
        out.extend_from_slice(format!("{}\t{seq}\t\\\\x", self.field).as_bytes());
        if digits {
            out.extend_from_slice(&self.value[from..until]);
        } else {
            put_hex(out, &self.value[from..until]);
        }
        out.push(b'\n');
        self.value.drain(..until);
        self.pieces = Some(seq + 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the server would put together.
    fn together(pieces: &[u8], small: &Small) -> Vec<Option<Vec<u8>>> {
        let line = small.line.strip_suffix(b"\n").unwrap();
        let mut out: Vec<_> = copy_text::fields(line).map(copy_text::unescape).collect();
        let mut next = vec![0; out.len()];
        for i in &small.large {
            assert_eq!(out[*i], None, "a large field is NULL meanwhile");
            out[*i] = Some(Vec::new());
        }
        for piece in pieces.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let parts: Vec<&str> = std::str::from_utf8(piece).unwrap().split('\t').collect();
            let field: usize = parts[0].parse().unwrap();
            assert_eq!(parts[1].parse::<usize>().unwrap(), next[field], "pieces come in their order");
            next[field] += 1;
            let digits = parts[2].strip_prefix("\\\\x").unwrap();
            let bytes = (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap());
            out[field].as_mut().expect("a large field").extend(bytes);
        }
        out
    }

    /// The text of a value.
    fn text((is_bytea, v): &(bool, Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        if *is_bytea {
            out.extend_from_slice(b"\\x");
            put_hex(&mut out, v);
            return out;
        }
        v.clone()
    }

    fn check(values: &[(bool, Option<Vec<u8>>)], cuts: &[usize]) -> Vec<usize> {
        let mut line = Vec::new();
        for (i, (is_bytea, v)) in values.iter().enumerate() {
            if i > 0 {
                line.push(b'\t');
            }
            match v {
                None => line.extend_from_slice(copy_text::NULL),
                Some(v) => copy_text::escape_into(&mut line, &text(&(*is_bytea, v.clone()))),
            }
        }
        let mut cutter = Cutter::new(values.iter().map(|v| v.0).collect());
        let (mut out, mut from) = (Vec::new(), 0);
        for cut in cuts.iter().map(|c| c % (line.len() + 1)) {
            if cut > from {
                cutter.feed(&line[from..cut], &mut out).unwrap();
                from = cut;
            }
        }
        cutter.feed(&line[from..], &mut out).unwrap();
        let small = cutter.finish(&mut out).unwrap();
        let got = together(&out, &small);
        for (i, ((is_bytea, want), got)) in values.iter().zip(got).enumerate() {
            // Pieces hold a bytea's bytes, a small field its text.
            let want = want.clone().map(|v| if small.large.contains(&i) { v } else { text(&(*is_bytea, v)) });
            assert!(got == want, "field {i}");
        }
        small.large
    }

    #[test]
    fn pieces_of_large_values_are_whole() {
        let large: Vec<u8> = (0..3 * PIECE + 5).map(|i| (i % 251) as u8).collect();
        let odd = vec![1_000_003, 2_000_006, 2_000_007, 5_000_001];
        let values = [(true, Some(large.clone())), (false, Some(large)), (false, None), (true, Some(Vec::new()))];
        assert_eq!(check(&values, &odd), [0, 1]);
        check(&[(false, Some(b"\\N".to_vec())), (false, Some(b"N".to_vec())), (false, None)], &[1, 2, 3, 4]);
    }

    #[test]
    fn many_small_fields_are_bounded_too() {
        let values = vec![(false, Some(vec![b'a'; PIECE - 1])); 40];
        let large = check(&values, &[7]);
        assert_eq!(large.first(), Some(&32));
    }

    #[test]
    fn a_line_that_does_not_fit_its_columns_is_refused() {
        let mut out = Vec::new();
        let mut cutter = Cutter::new(vec![false, false]);
        cutter.feed(b"one", &mut out).unwrap();
        assert!(cutter.finish(&mut out).is_err());
        let digits = |n: usize| [b"\\\\x".to_vec(), vec![b'0'; n]].concat();
        for (bad, n) in [(digits(PIECE + 1), 1), (vec![b'0'; 2 * PIECE], 0)] {
            let mut cutter = Cutter::new(vec![true]);
            let fed = cutter.feed(&bad, &mut out);
            assert!(fed.and_then(|()| cutter.finish(&mut out).map(drop)).is_err(), "{n}");
        }
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
