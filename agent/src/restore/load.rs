//! Rows of the merge into tables by COPY, wide ones by INSERT: the merge runs on its own thread, the session takes what it
//! sends.

use super::sink::{Counts, Selected, Selection};
use super::wide::{WIDE, WideRow};
use crate::error::{Context, Error, Kind, Result};
use crate::merge::{Image, MergeStats, RowSink, TenantAt};
use crate::sql::{SqlClient, SqlContext};
use bytes::{Bytes, BytesMut};
use coffer_wire::{Lsn, Relation};
use futures::SinkExt;
use std::io::Write;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Bytes that go to COPY at once.
const PIECE: usize = 256 << 10;
/// Pieces between the merge and the server.
const PIECES_AHEAD: usize = 4;

/// Makes tables ready for rows.
pub(super) trait Tables {
    /// Called before the first row. `last_change`: the position of the table's last change ([`Lsn::ZERO`]: none).
    async fn ready(&mut self, client: &SqlClient, rel: &Relation, last_change: Lsn) -> Result<Ready>;
}

/// Where the rows of a table go.
pub(super) struct Ready {
    /// Qualified and quoted.
    pub table: String,
    /// Quoted, in the order of the image's fields.
    pub columns: Vec<String>,
    /// Run when the rows are in.
    pub after: Vec<String>,
}

/// From the merge's thread to the session.
enum Piece {
    /// With the position of the table's last change.
    Begin(Arc<Relation>, Lsn),
    Data(Bytes),
    /// What follows, up to [`Piece::WideEnd`], is one line that COPY does not take.
    Wide,
    WideEnd,
    End,
}

/// Loads all rows, inside the caller's transaction.
pub(super) async fn load(
    client: &SqlClient,
    rows: Vec<TenantAt>,
    selection: Selection,
    mut counts: Counts,
    tables: &mut impl Tables,
) -> Result<(Vec<MergeStats>, Counts)> {
    let (tx, mut rx) = mpsc::channel(PIECES_AHEAD);
    let merging = tokio::task::spawn_blocking(move || {
        let mut stats = Vec::new();
        let mut sink = CopySink { tx, buf: BytesMut::with_capacity(PIECE), last_change: Lsn::ZERO };
        for r in &rows {
            // Keys and names are the tenant's; shared tables come as they are.
            let whole = Selection { keys: Vec::new(), rename: None, ..selection.clone() };
            let selection = if selection.tenant.as_ref() == Some(&r.tenant) { &selection } else { &whole };
            stats.push(r.read(&mut Selected::new(selection, Some(&mut sink), &mut counts))?);
        }
        Ok::<_, Error>((stats, counts))
    });
    let copied = copy_all(client, &mut rx, tables).await;
    // The merge stops when nobody listens any more.
    drop(rx);
    let merged = merging.await.context(Kind::Other, "the merge broke off")?;
    // What the server said comes first: the merge then only noticed that nobody listens.
    copied.and(merged)
}

/// Fills one table after the other until the merge ends.
async fn copy_all(client: &SqlClient, rx: &mut mpsc::Receiver<Piece>, tables: &mut impl Tables) -> Result<()> {
    while let Some(piece) = rx.recv().await {
        let Piece::Begin(rel, last_change) = piece else { return Err(Error::other("rows came before their table")) };
        let into = tables.ready(client, &rel, last_change).await?;
        let what = format!("cannot load {}", rel.qualified());
        if !copy_table(client, rx, &into, &what).await? {
            return Ok(());
        }
        for statement in into.after {
            client.batch_execute(&statement).await.sql(&what)?;
        }
    }
    Ok(())
}

/// Runs a COPY, and another one behind each wide row. False: the merge failed; its own error says why.
async fn copy_table(client: &SqlClient, rx: &mut mpsc::Receiver<Piece>, into: &Ready, what: &str) -> Result<bool> {
    let statement = format!("COPY {} ({}) FROM STDIN", into.table, into.columns.join(", "));
    loop {
        // Dropping the sink ends the COPY.
        let sink = client.copy_in::<_, Bytes>(&statement).await.sql(what)?;
        let mut sink = std::pin::pin!(sink);
        let next = loop {
            match rx.recv().await {
                Some(Piece::Data(b)) => sink.send(b).await.sql(what)?,
                other => break other,
            }
        };
        match next {
            Some(Piece::End) => {
                sink.finish().await.sql(what)?;
                return Ok(true);
            }
            Some(Piece::Wide) => {
                sink.finish().await.sql(what)?;
                if !wide_row(client, rx, into).await.map_err(|e| e.during(what))? {
                    return Ok(false);
                }
            }
            _ => return Ok(false),
        }
    }
}

async fn wide_row(client: &SqlClient, rx: &mut mpsc::Receiver<Piece>, into: &Ready) -> Result<bool> {
    let mut row = WideRow::begin(client, into).await?;
    loop {
        match rx.recv().await {
            Some(Piece::Data(b)) => row.feed(&b).await?,
            Some(Piece::WideEnd) => {
                row.finish().await?;
                return Ok(true);
            }
            _ => return Ok(false),
        }
    }
}

/// Sends rows to the session, in pieces.
struct CopySink {
    tx: mpsc::Sender<Piece>,
    buf: BytesMut,
    last_change: Lsn,
}

impl CopySink {
    fn send(&self, p: Piece) -> Result<()> {
        self.tx.blocking_send(p).map_err(|_| Error::other("the session that takes the rows is gone"))
    }

    fn flush_piece(&mut self) -> Result<()> {
        if self.buf.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.buf, BytesMut::with_capacity(PIECE)).freeze();
        self.send(Piece::Data(piece))
    }
}

impl Write for CopySink {
    fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
        let n = b.len().min(PIECE);
        self.buf.extend_from_slice(&b[..n]);
        if self.buf.len() >= PIECE {
            self.flush_piece().map_err(std::io::Error::other)?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl RowSink for CopySink {
    fn last_change(&mut self, at: Lsn) {
        self.last_change = at;
    }

    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.send(Piece::Begin(rel.clone(), self.last_change))
    }

    fn row(&mut self, _: &[u8], image: &Image<'_>) -> Result<()> {
        if image.as_line().is_none() && image.len() > WIDE {
            self.flush_piece()?;
            self.send(Piece::Wide)?;
            image.write_to(self)?;
            self.flush_piece()?;
            return self.send(Piece::WideEnd);
        }
        image.write_to(self)?;
        self.write_all(b"\n").map_err(crate::merge::from_io)
    }

    fn end_table(&mut self) -> Result<()> {
        self.flush_piece()?;
        self.send(Piece::End)
    }
}
