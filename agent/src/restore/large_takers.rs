//! Where restored large objects go: into files, into a new database, into the live one.
//!
//! The live one's objects are never overwritten: those that are there are compared. They are made before the rows, a few
//! hundred in a transaction (each holds a lock until its end), and taken back when the restore of the rows fails.

use super::large_objects::{Found, LargeObjects, Taker};
use crate::crypto::{Sha256, hex};
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::large_objects::OidSet;
use crate::sql::{self, SqlClient, SqlContext};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tokio::runtime::Handle;
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

/// The folder of a restore into files, and the list in it. A table's file has a dot in its name.
pub const FOLDER: &str = "large_objects";
const LIST: &str = "list.jsonl";
/// Objects and bytes of a transaction.
const OBJECTS_AT_ONCE: u32 = 500;
const BYTES_AT_ONCE: u64 = 64 << 20;

/// Files named by OID, and a list of them.
pub struct Folder {
    dir: PathBuf,
    list: BufWriter<File>,
    file: Option<(u32, File, Sha256)>,
}

impl Folder {
    /// Makes the folder inside `dir`.
    pub fn create(dir: &Path) -> Result<Self> {
        let dir = dir.join(FOLDER);
        let what = format!("cannot create {}", dir.display());
        std::fs::DirBuilder::new().mode(0o700).create(&dir).context(Kind::Other, &what)?;
        let list = BufWriter::new(new_file(&dir.join(LIST))?);
        Ok(Self { dir, list, file: None })
    }

    /// The list is whole.
    pub fn finish(self) -> Result<()> {
        let list = self.list.into_inner().map_err(std::io::IntoInnerError::into_error);
        list.and_then(|f| f.sync_all()).context(Kind::Other, "cannot write the list of large objects")?;
        File::open(&self.dir).and_then(|d| d.sync_all()).context(Kind::Other, "cannot sync the folder")
    }
}

fn new_file(path: &Path) -> Result<File> {
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    opened.context(Kind::Other, format_args!("cannot create {}", path.display()))
}

impl Taker for Folder {
    fn begin(&mut self, oid: u32, _: &str) -> Result<()> {
        self.file = Some((oid, new_file(&self.dir.join(oid.to_string()))?, Sha256::new()));
        Ok(())
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<()> {
        let Some((oid, file, hash)) = &mut self.file else { return Ok(()) };
        hash.update(bytes);
        file.write_all(bytes).context(Kind::Other, format_args!("cannot write large object {oid}"))
    }

    fn end(&mut self, bytes: u64) -> Result<()> {
        let Some((oid, file, hash)) = self.file.take() else { return Ok(()) };
        file.sync_all().context(Kind::Other, format_args!("cannot write large object {oid}"))?;
        let line = json!({"oid": oid, "bytes": bytes, "sha256": hex(&hash.finish())});
        writeln!(self.list, "{line}").context(Kind::Other, "cannot write the list of large objects")
    }
}

/// A session that makes large objects.
struct Session {
    rt: Handle,
    client: SqlClient,
    create: Statement,
    write: Statement,
    /// Objects and bytes since the transaction began; `None`: none is open.
    open: Option<(u32, u64)>,
    oid: u32,
    at: u64,
}

impl Session {
    async fn new(dsn: &Dsn, create: &str, write: &str) -> Result<Self> {
        let client = sql::connect(&dsn.with_application_name("coffer restore")).await?;
        let what = "cannot write large objects";
        let hint = |e: Error| e.hint("run SELECT coffer.setup_agent('ROLE') again for the role of the restore");
        let create = client.prepare(create).await.sql(what).map_err(hint)?;
        let write = client.prepare(write).await.sql(what).map_err(hint)?;
        Ok(Self { rt: Handle::current(), client, create, write, open: None, oid: 0, at: 0 })
    }

    fn begin(&mut self, oid: u32) -> Result<()> {
        if self.open.is_none() {
            self.rt.block_on(self.client.batch_execute("BEGIN")).sql("cannot begin")?;
            self.open = Some((0, 0));
        }
        (self.oid, self.at) = (oid, 0);
        Ok(())
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<()> {
        let (oid, at) = (self.oid, self.at as i64);
        let done = self.rt.block_on(self.client.execute(&self.write, &[&oid, &at, &bytes]));
        done.sql(format_args!("cannot write large object {oid}"))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        if let Some((n, bytes)) = &mut self.open {
            (*n, *bytes) = (*n + 1, *bytes + self.at);
            if *n >= OBJECTS_AT_ONCE || *bytes >= BYTES_AT_ONCE {
                return self.commit();
            }
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        if self.open.take().is_some() {
            self.rt.block_on(self.client.batch_execute("COMMIT")).sql("cannot commit large objects")?;
        }
        Ok(())
    }
}

/// A new database: objects belong to the owner of the table whose rows refer to them.
struct NewObjects {
    session: Session,
    owners: BTreeMap<String, Option<String>>,
    role: Option<String>,
    made: OidSet,
}

impl NewObjects {
    fn owner(&mut self, relation: &str) -> Result<Option<String>> {
        if let Some(known) = self.owners.get(relation) {
            return Ok(known.clone());
        }
        let of: [&(dyn ToSql + Sync); 1] = [&relation];
        let asked = self.session.client.query_opt(
            "SELECT pg_catalog.quote_ident(r.rolname) FROM pg_catalog.pg_class c \
             JOIN pg_catalog.pg_roles r ON r.oid = c.relowner WHERE c.oid = pg_catalog.to_regclass($1)",
            &of,
        );
        let owner = self.session.rt.block_on(asked).sql("cannot ask for a table's owner")?.map(|r| r.get(0));
        self.owners.insert(relation.to_owned(), owner.clone());
        Ok(owner)
    }
}

impl Taker for NewObjects {
    fn begin(&mut self, oid: u32, relation: &str) -> Result<()> {
        let owner = self.owner(relation)?;
        let s = &mut self.session;
        if owner.is_some() && owner != self.role {
            s.commit()?;
            let set = format!("SET ROLE {}", owner.as_deref().unwrap_or("NONE"));
            s.rt.block_on(s.client.batch_execute(&set))
                .sql("cannot write large objects as the owner of their table")?;
            self.role = owner;
        }
        s.begin(oid)?;
        let made = s.rt.block_on(s.client.execute(&s.create, &[&oid]));
        made.sql(format_args!("cannot make large object {oid}"))?;
        self.made.insert(oid);
        Ok(())
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<()> {
        self.session.piece(bytes)
    }

    fn end(&mut self, _: u64) -> Result<()> {
        self.session.end()
    }
}

/// Makes them in a new database, before its rows. One that several refer to, reference data and the tenant, is made once.
pub async fn into_database(dsn: &Dsn, objects: Vec<LargeObjects>) -> Result<Option<Found>> {
    if objects.is_empty() {
        return Ok(None);
    }
    let session = Session::new(dsn, "SELECT pg_catalog.lo_create($1)", "SELECT pg_catalog.lo_put($1, $2, $3)").await?;
    let mut made = NewObjects { session, owners: BTreeMap::new(), role: None, made: OidSet::default() };
    let work = move || {
        let mut found = Found::default();
        for mut o in objects {
            o.leave_out(&made.made);
            found.add(o.give(&mut made)?);
        }
        made.session.commit()?;
        for oid in made.made.iter() {
            found.missing.remove(oid);
        }
        Ok(Some(found))
    };
    tokio::task::spawn_blocking(work).await.context(Kind::Other, "a worker thread broke off")?
}

/// What a restore in place made; to be taken back when the rows do not follow.
pub struct Made {
    pub found: Found,
    created: OidSet,
}

/// The live database.
struct LiveObjects {
    session: Session,
    read: Statement,
    dry_run: bool,
    /// The object at hand is there already, and has been the same so far.
    there: Option<bool>,
    existing: u64,
    differing: Vec<u32>,
    /// Made in the transaction that is open, and before.
    pending: Vec<u32>,
    created: OidSet,
}

impl LiveObjects {
    /// What the transaction made is there to stay, once it has ended.
    fn committed(&mut self) {
        if self.session.open.is_none() {
            for oid in self.pending.drain(..) {
                self.created.insert(oid);
            }
        }
    }

    fn live(&self, at: u64, length: usize) -> Result<Option<Vec<u8>>> {
        let s = &self.session;
        let (at, length) = (at as i64, i32::try_from(length).unwrap_or(i32::MAX));
        let row = s.rt.block_on(s.client.query_one(&self.read, &[&s.oid, &at, &length]));
        Ok(row.sql(format_args!("cannot read large object {}", s.oid))?.get(0))
    }
}

impl Taker for LiveObjects {
    fn begin(&mut self, oid: u32, relation: &str) -> Result<()> {
        (self.session.oid, self.session.at) = (oid, 0);
        self.there = self.live(0, 0)?.map(|_| true);
        if self.there.is_some() || self.dry_run {
            return Ok(());
        }
        self.session.begin(oid)?;
        let s = &self.session;
        let made = s.rt.block_on(s.client.execute(&s.create, &[&oid, &relation]));
        made.sql(format_args!("cannot make large object {oid}"))?;
        self.pending.push(oid);
        Ok(())
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<()> {
        let same = match self.there {
            None if self.dry_run => return Ok(()),
            None => return self.session.piece(bytes),
            Some(false) => return Ok(()),
            Some(true) => self.live(self.session.at, bytes.len())?.is_some_and(|b| b == bytes),
        };
        self.there = Some(same);
        self.session.at += bytes.len() as u64;
        Ok(())
    }

    fn end(&mut self, bytes: u64) -> Result<()> {
        match self.there {
            None if self.dry_run => Ok(()),
            None => {
                self.session.end()?;
                self.committed();
                Ok(())
            }
            Some(same) => {
                self.existing += 1;
                if !same || self.live(bytes, 1)?.is_none_or(|b| !b.is_empty()) {
                    self.differing.push(self.session.oid);
                }
                Ok(())
            }
        }
    }
}

/// Makes those that the live database lacks and compares the others. Those that rows refer to, that are not archived and
/// that exist are nothing to speak of. `alone`: the session that keeps other restores in place out, which would count on
/// what this one made and may take back.
pub async fn into_live(dsn: &Dsn, alone: &SqlClient, objects: LargeObjects, dry_run: bool) -> Result<Made> {
    let create = "SELECT coffer._agent_large_object_create($1, pg_catalog.to_regclass($2))";
    let session = Session::new(dsn, create, "SELECT coffer._agent_large_object_write($1, $2, $3)").await?;
    let read = session
        .client
        .prepare("SELECT coffer._agent_large_object($1, $2, $3)")
        .await
        .sql("cannot read large objects")?;
    let mut live = LiveObjects {
        session,
        read,
        dry_run,
        there: None,
        existing: 0,
        differing: Vec::new(),
        pending: Vec::new(),
        created: OidSet::default(),
    };
    let work = move || {
        let given = objects.give(&mut live).and_then(|found| live.session.commit().map(|()| found));
        live.committed();
        let mut found = match given {
            Ok(found) => found,
            Err(e) => return Err((e, live.created)),
        };
        let missing: Vec<u32> = found.missing.iter().collect();
        for oid in missing {
            live.session.oid = oid;
            match live.live(0, 0) {
                Ok(Some(_)) => {
                    found.missing.remove(oid);
                }
                Ok(None) => {}
                Err(e) => return Err((e, live.created)),
            }
        }
        (found.existing, found.differing) = (live.existing, live.differing);
        Ok(Made { found, created: live.created })
    };
    match tokio::task::spawn_blocking(work).await.context(Kind::Other, "a worker thread broke off")? {
        Ok(made) => Ok(made),
        // Some may be committed.
        Err((e, created)) => {
            let hint = Made { found: Found::default(), created }.take_back(alone).await;
            Err(match hint {
                Ok(()) => e,
                Err(left) => e.hint(format!("large objects that it made are left behind: {left}")),
            })
        }
    }
}

impl Made {
    /// Removes what was made, over the session that has kept other restores out since: where it is gone, rows of another
    /// one may refer to it by now.
    pub async fn take_back(self, alone: &SqlClient) -> Result<()> {
        if self.created.is_empty() {
            return Ok(());
        }
        let remove = alone.prepare("SELECT coffer._agent_large_object_remove($1)").await.sql("cannot take back")?;
        for oid in self.created.iter() {
            alone.execute(&remove, &[&oid]).await.sql(format_args!("cannot remove large object {oid}"))?;
        }
        Ok(())
    }
}
