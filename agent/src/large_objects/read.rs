//! Reads the large objects that tenants' rows refer to, and writes them into objects of the repository.
//!
//! Two sessions under one snapshot. The first locks the tables, before the snapshot is taken, and lists which rows of
//! whom name which OIDs; the list is sorted by tenant in bounded memory, and the locks are gone before the first object
//! is read, so that no migration waits for the objects. The second reads them in pieces.

use super::frames::{self, Begin, PIECE_BYTES};
use crate::crypto::{Codec, Header, KeySource, ObjectKind, Sealer, random};
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::merge::{Cursor, Scratch, Sorted, Sorter};
use crate::repository::model::{LargeObjectColumn, LargeObjectsRead};
use crate::repository::{ObjectRef, ObjectWriter, paths};
use crate::restore::in_place::literal;
use crate::run::AgentContext;
use crate::snapshot::catalog::{self, Rule};
use crate::snapshot::read::{Lines, migration_waits};
use crate::sql::{self, SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::{Lsn, Strategy, TenantKind, copy_text, quote_ident};
use futures::StreamExt;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::Statement;
use tokio_postgres::error::SqlState;

/// How long the tables' locks are waited for.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// A section ends with the first object that it has grown beyond this with.
const SECTION_BYTES: u64 = 64 << 20;
/// What stores take as one object has an end.
const FILE_BYTES: u64 = 200 << 30;

/// What was read.
pub struct Reading {
    pub read: LargeObjectsRead,
    /// In every required store.
    pub objects: Vec<ObjectRef>,
}

/// The columns that name large objects now, with the rules of their tables; empty with an extension that knows none.
pub async fn columns(client: &SqlClient) -> Result<Vec<(LargeObjectColumn, Rule)>> {
    let asked = client
        .query(
            "SELECT l.relid, a.attnum, l.column_name FROM coffer._agent_large_objects() l \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = l.relid AND a.attname = l.column_name",
            &[],
        )
        .await;
    let rows = match asked {
        Err(e) if e.code() == Some(&SqlState::UNDEFINED_FUNCTION) => return Ok(Vec::new()),
        r => r
            .sql("cannot read which columns name large objects")
            .map_err(|e| e.hint("run SELECT coffer.setup_agent('ROLE') for the agent's role"))?,
    };
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let rules = catalog::rules(client).await?;
    let known = |r: &tokio_postgres::Row| {
        let rule = rules.iter().find(|rule| rule.relid == r.get::<_, u32>(0))?.clone();
        let relation = rule.qualified();
        Some((LargeObjectColumn { relid: rule.relid, attnum: r.get(1), relation, column: r.get(2) }, rule))
    };
    let mut out: Vec<_> = rows.iter().filter_map(known).collect();
    out.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(out)
}

/// Reads the large objects of all tenants and writes them, one object of the repository (or several) for each tenant
/// that has some. Nothing counts before a record names what is returned.
///
/// # Errors
/// `Fenced` with the code `yielded`: a table's lock was not to be had, or a migration waited for it. Try again.
pub async fn read_large_objects(ctx: &Arc<AgentContext>) -> Result<Reading> {
    let dsn = ctx.source_dsn().await?.with_application_name("coffer large objects").sending_little();
    let client = sql::connect(&dsn).await?;
    let columns = columns(&client).await?;
    let mut tables: Vec<&Rule> = columns.iter().map(|(_, r)| r).collect();
    tables.dedup_by_key(|r| r.relid);
    begin(&client, &tables).await?;
    let row = client
        .query_one(
            "SELECT pg_catalog.pg_current_wal_insert_lsn()::text, pg_catalog.pg_export_snapshot(), \
             (EXTRACT(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::int8",
            &[],
        )
        .await
        .sql("cannot take a snapshot")?;
    let lsn: Lsn = row.get::<_, &str>(0).parse().map_err(Error::other)?;
    let read = LargeObjectsRead { lsn, time_us: row.get(2), columns: columns.iter().map(|(c, _)| c.clone()).collect() };
    if columns.is_empty() {
        return Ok(Reading { read, objects: Vec::new() });
    }
    let objects = sql::connect(&dsn).await?;
    let share = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
        literal(row.get::<_, &str>(1))
    );
    objects.batch_execute(&share).await.sql("cannot share the snapshot")?;
    let scratch = Scratch::new(&ctx.config.spool.dir)?;
    let memory = usize::try_from(ctx.memory.base / 4).unwrap_or(usize::MAX);
    let listing = list(&client, &columns, Sorter::new(&scratch, memory));
    let relids: Vec<u32> = tables.iter().map(|r| r.relid).collect();
    let sorted = tokio::select! {
        s = listing => s?,
        w = migration_waits(&dsn, &relids) => { w?; return Err(yielded("a migration waits for a table whose large objects are listed")) }
    };
    client.batch_execute("COMMIT").await.sql("cannot end the reading transaction")?;
    let job = Job::new(ctx, read, objects).await?;
    let done = tokio::task::spawn_blocking(move || job.write(sorted))
        .await
        .map_err(|e| Error::other(format!("reading large objects broke off: {e}")))??;
    failpoints::hit(failpoints::LARGE_OBJECTS_AFTER_WRITE)?;
    Ok(done)
}

fn yielded(why: &str) -> Error {
    Error::new(Kind::Fenced, format!("{why}: they are read later")).code("yielded")
}

/// Locks, then nothing: the caller's next statement takes the snapshot.
async fn begin(client: &SqlClient, tables: &[&Rule]) -> Result<()> {
    let mut text = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = {}",
        LOCK_TIMEOUT.as_millis()
    );
    for t in tables {
        text.push_str(&format!("; LOCK TABLE {} IN ACCESS SHARE MODE", t.lock_list()));
    }
    match client.batch_execute(&text).await {
        Err(e) if e.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Err(yielded("a table's lock is not free")),
        Err(e) if e.code() == Some(&SqlState::UNDEFINED_TABLE) => Err(yielded("a table was dropped or renamed")),
        r => r.sql("cannot lock the tables whose large objects are read"),
    }
}

/// Kind and key of the tenant of a row, as two expressions. What the type's own output says, as in the stream.
fn whose(rule: &Rule) -> (u8, String) {
    match (rule.strategy, &rule.tenant, &rule.tenant_expression, &rule.tenant_column) {
        (Strategy::Shared, ..) => (TenantKind::Shared as u8, "''".to_owned()),
        (_, Some(t), ..) => (TenantKind::Normal as u8, literal(t)),
        (_, None, Some(e), _) => (TenantKind::Normal as u8, e.clone()),
        (_, None, None, c) => {
            let c = format!("t.{}", quote_ident(c.as_deref().unwrap_or_default()));
            (TenantKind::Normal as u8, format!("CASE WHEN {c} IS NOT NULL THEN pg_catalog.concat({c}) END"))
        }
    }
}

/// Which tenant's rows name which objects: sorted by kind, key, OID.
async fn list(client: &SqlClient, columns: &[(LargeObjectColumn, Rule)], mut sorter: Sorter) -> Result<Sorted> {
    for (n, (column, rule)) in columns.iter().enumerate() {
        let name = format!("t.{}", quote_ident(&column.column));
        let (kind, key) = whose(rule);
        let statement = format!(
            "COPY (SELECT {key}, {name}::pg_catalog.oid FROM {} t WHERE {name} <> 0) TO STDOUT",
            rule.from_clause()
        );
        let what = || format!("cannot read which large objects {} names", column.relation);
        let place = u16::try_from(n).map_err(|_| Error::other("more than 65536 columns name large objects"))?;
        let stream = client.copy_out(&statement).await.sql(what())?;
        let mut stream = std::pin::pin!(stream);
        let (mut lines, mut entry) = (Lines::default(), Vec::new());
        while let Some(chunk) = stream.next().await {
            let mut taken = Ok(());
            lines.feed(&chunk.sql(what())?, |line| {
                if taken.is_ok() {
                    taken = put_entry(&mut entry, kind, line).and_then(|()| sorter.push(&entry, &place.to_le_bytes()));
                }
            });
            taken?;
        }
    }
    sorter.finish()
}

/// The key of a list entry: kind, tenant, a zero (no text holds one), OID.
fn put_entry(out: &mut Vec<u8>, kind: u8, line: &[u8]) -> Result<()> {
    let bad = || Error::other("a row of the list of large objects is not as it was asked for");
    let tab = memchr::memrchr(b'\t', line).ok_or_else(bad)?;
    let oid: u32 = std::str::from_utf8(&line[tab + 1..]).ok().and_then(|t| t.parse().ok()).ok_or_else(bad)?;
    out.clear();
    match copy_text::unescape(&line[..tab]) {
        Some(tenant) => {
            out.push(kind);
            out.extend_from_slice(&tenant);
        }
        None => out.push(TenantKind::Unassigned as u8),
    }
    out.push(0);
    out.extend_from_slice(&oid.to_be_bytes());
    Ok(())
}

fn entry_of(key: &[u8]) -> Option<(Tenant, u32)> {
    let (rest, oid) = key.split_last_chunk::<4>()?;
    let (kind, rest) = rest.split_first()?;
    let (_, tenant) = rest.split_last()?;
    let tenant = Tenant { kind: TenantKind::from_u8(*kind)?, key: String::from_utf8(tenant.to_vec()).ok()? };
    Some((tenant, u32::from_be_bytes(*oid)))
}

/// Where the reading stands: an object, and its piece that comes next.
struct Place {
    tenant: Tenant,
    object: Begin,
    piece: Vec<u8>,
}

struct Job {
    read: LargeObjectsRead,
    client: SqlClient,
    piece: Statement,
    ctx: Arc<AgentContext>,
    last: Option<(Tenant, u32)>,
}

impl Job {
    async fn new(ctx: &Arc<AgentContext>, read: LargeObjectsRead, client: SqlClient) -> Result<Self> {
        let piece = client
            .prepare("SELECT coffer._agent_large_object($1, $2, $3)")
            .await
            .sql("cannot read large objects (coffer._agent_large_object)")?;
        Ok(Self { read, client, piece, ctx: ctx.clone(), last: None })
    }

    /// All of them. Blocking.
    fn write(mut self, sorted: Sorted) -> Result<Reading> {
        let mut cursor = sorted.into_cursor()?;
        let mut objects = Vec::new();
        let mut place = self.next(&mut *cursor)?;
        while place.is_some() {
            objects.push(self.file(&mut *cursor, &mut place)?);
        }
        Ok(Reading { read: self.read, objects })
    }

    /// The next object of the list that exists, with its first piece.
    fn next(&mut self, cursor: &mut dyn Cursor) -> Result<Option<Place>> {
        while let Some((key, value)) = cursor.entry() {
            let entry = entry_of(key).ok_or_else(|| Error::other("the list of large objects is damaged"))?;
            let column = value.try_into().map(u16::from_le_bytes).unwrap_or_default();
            cursor.advance()?;
            // Several rows name it.
            if self.last.as_ref() == Some(&entry) {
                continue;
            }
            self.last = Some(entry.clone());
            let (tenant, oid) = entry;
            if let Some(piece) = self.piece(oid, 0)? {
                return Ok(Some(Place { tenant, object: Begin { oid, column, at: 0 }, piece }));
            }
        }
        Ok(None)
    }

    /// A piece of an object; `None`: there is no such object.
    fn piece(&self, oid: u32, at: u64) -> Result<Option<Vec<u8>>> {
        if self.ctx.is_stopping() {
            return Err(Error::other("the agent is stopping").code("stopping"));
        }
        let (place, length) = (at as i64, PIECE_BYTES as i32);
        let row = self.ctx.rt.block_on(self.client.query_one(&self.piece, &[&oid, &place, &length]));
        Ok(row.sql(format_args!("cannot read large object {oid}"))?.get(0))
    }

    /// One object of the repository: what there is of the tenant at hand, up to [`FILE_BYTES`].
    fn file(&mut self, cursor: &mut dyn Cursor, place: &mut Option<Place>) -> Result<ObjectRef> {
        let Some(tenant) = place.as_ref().map(|p| p.tenant.clone()) else {
            return Err(Error::other("there is no large object to be written"));
        };
        let entry = self.ctx.rt.block_on(self.ctx.keyring.ensure(self.ctx.source_uid, &tenant))?;
        let key = self.ctx.keyring.key(entry.key_id())?;
        let (system_identifier, timeline) = self.ctx.system();
        let header = Header {
            kind: ObjectKind::LargeObjects,
            codec: Codec::Zstd,
            tenant: entry.uid,
            object: random::uuid(),
            source: self.ctx.source_uid,
            system_identifier,
            timeline,
            lsn_start: Lsn::ZERO,
            lsn_end: self.read.lsn,
            key_version: entry.version,
        };
        let path = paths::large_objects(self.ctx.source_uid, entry.uid, self.read.lsn, header.object);
        let (repository, rt) = (self.ctx.repo.clone(), self.ctx.rt.clone());
        repository.seal_to(rt, path, &header, &key, |sealer| self.fill(sealer, cursor, &tenant, place))
    }

    /// Writes objects of the tenant until there are no more or the file is full. Returns how many began in it.
    fn fill(
        &mut self,
        sealer: &mut Sealer<ObjectWriter>,
        cursor: &mut dyn Cursor,
        tenant: &Tenant,
        place: &mut Option<Place>,
    ) -> Result<u64> {
        let put = |sealer: &mut Sealer<ObjectWriter>, frame: &mut Vec<u8>| {
            let written = sealer.write_all(frame).map_err(|e| Error::other("cannot seal large objects").source(e));
            frame.clear();
            written
        };
        let (mut frame, mut begun, mut section) = (Vec::new(), 0, None);
        frames::put_head(&mut frame, &self.read)?;
        put(sealer, &mut frame)?;
        while let Some(p) = place.as_mut().filter(|p| p.tenant == *tenant) {
            if section.is_none_or(|at| sealer.plain_bytes() - at > SECTION_BYTES) {
                sealer.section(&p.object.oid.to_string())?;
                section = Some(sealer.plain_bytes());
            }
            begun += u64::from(p.object.at == 0);
            frames::put_begin(&mut frame, p.object);
            loop {
                let full = p.piece.len() == PIECE_BYTES;
                p.object.at += p.piece.len() as u64;
                if !p.piece.is_empty() {
                    frames::put_piece(&mut frame, &p.piece);
                }
                put(sealer, &mut frame)?;
                p.piece = if full { self.piece(p.object.oid, p.object.at)?.unwrap_or_default() } else { Vec::new() };
                if p.piece.is_empty() {
                    break;
                }
                if sealer.plain_bytes() > FILE_BYTES {
                    return Ok(begun);
                }
            }
            frames::put_end(&mut frame, p.object.at);
            put(sealer, &mut frame)?;
            *place = self.next(cursor)?;
            if sealer.plain_bytes() > FILE_BYTES {
                return Ok(begun);
            }
        }
        Ok(begun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_list_becomes_tenant_and_oid() {
        let mut key = Vec::new();
        let mut of = |kind, line: &[u8]| put_entry(&mut key, kind, line).map(|()| entry_of(&key).unwrap());
        assert_eq!(of(0, b"a\\tb\t4000000000").unwrap(), (Tenant::normal("a\tb"), 4_000_000_000));
        assert_eq!(of(0, b"\t7").unwrap(), (Tenant::normal(""), 7));
        assert_eq!(of(0, b"\\N\t7").unwrap(), (Tenant::reserved(TenantKind::Unassigned), 7));
        assert_eq!(of(3, b"\t7").unwrap(), (Tenant::reserved(TenantKind::Shared), 7));
        assert!(of(0, b"7").is_err() && of(0, b"a\tx").is_err());
    }
}
