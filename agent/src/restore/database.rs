//! Restore into a new database: definitions, the rows of shared tables and of the tenant by COPY, then indexes and
//! constraints, then sequences, which only move forward.
//!
//! The rows come and go in one transaction; a database that this restore made is dropped when it fails.

use super::large_objects::{Found, LargeObjects};
use super::large_takers;
use super::load::{self, Ready, Tables};
use super::schema::{Archive, Phase};
use super::sink::{Counts, Selection};
use crate::accounts::{Roles, Stage};
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::history::Inputs;
use crate::merge::{MergeStats, TenantAt};
use crate::repository::ObjectRef;
use crate::repository::model::SequenceState;
use crate::sql::{self, SqlClient, SqlContext};
use coffer_wire::{Column, ColumnFlags, Lsn, Relation, quote_ident};
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

/// What is wanted.
pub struct NewDatabase {
    pub dsn: Dsn,
    /// Whose rows, in this order: the shared tables' and the tenant's.
    pub rows: Vec<TenantAt>,
    pub selection: Selection,
    pub schema: ObjectRef,
    pub beside: Beside,
    /// For the schema's archive.
    pub spool: PathBuf,
    pub counts: Counts,
}

/// What is neither rows nor definitions.
pub struct Beside {
    pub sequences: Vec<SequenceState>,
    /// That the rows refer to.
    pub large_objects: Vec<LargeObjects>,
    /// Of the database itself, each as it stands behind `ALTER DATABASE … SET`.
    pub settings: Vec<String>,
    /// To be created and altered.
    pub roles: Option<Roles>,
}

/// What came of it.
pub struct Done {
    pub counts: Counts,
    pub stats: Vec<MergeStats>,
    pub warnings: Vec<String>,
    pub large_objects: Option<Found>,
}

impl NewDatabase {
    /// Does it. The target is refused unless it is absent or empty.
    pub async fn run(self) -> Result<Done> {
        let dsn = self.dsn.with_application_name("coffer restore");
        let mut warnings = Vec::new();
        let (client, archive, made) = match sql::connect(&dsn).await {
            Ok(client) => {
                require_empty(&client, &dsn).await?;
                let archive = self.archive(major(&client).await?).await?;
                (client, archive, false)
            }
            Err(e) if is_absent(&e) => {
                let admin = maintenance(&dsn).await?;
                let archive = self.archive(major(&admin).await?).await?;
                let archive = create(&admin, &dsn, archive, &mut warnings).await?;
                match sql::connect(&dsn).await {
                    Ok(client) => (client, archive, true),
                    Err(e) => {
                        let _ = drop_database(&dsn).await;
                        return Err(e);
                    }
                }
            }
            Err(e) => return Err(e),
        };
        match self.fill(client, archive, warnings).await {
            Ok(done) => Ok(done),
            Err(e) if made => match drop_database(&dsn).await {
                Ok(()) => Err(e),
                Err(d) => Err(e.hint(format!("the database {} is left half done: {d}", dsn.dbname))),
            },
            Err(e) => Err(e.hint(format!("the database {} is left half done: drop it before another try", dsn.dbname))),
        }
    }

    async fn fill(mut self, client: SqlClient, archive: Archive, mut warnings: Vec<String>) -> Result<Done> {
        if let Some(r) = &self.beside.roles {
            // Before the definitions, which may name them as owners.
            warnings.extend(r.apply(&client, &self.dsn.dbname, Stage::Role).await);
        }
        let archive = settle(archive, &client, &mut warnings).await?;
        let (archive, _) = phase(archive, &self.dsn, Phase::Before).await?;
        let large_objects =
            large_takers::into_database(&self.dsn, std::mem::take(&mut self.beside.large_objects)).await?;
        let stats = self.load(&client, &mut warnings).await?;
        let (archive, _) = phase(archive, &self.dsn, Phase::After).await?;
        let (archive, failed) = phase(archive, &self.dsn, Phase::ForeignKeys).await?;
        warnings.extend(failed.into_iter().map(|f| format!("foreign key: {f}")));
        refresh(&client, &mut warnings).await?;
        let (_archive, failed) = phase(archive, &self.dsn, Phase::Soft).await?;
        warnings.extend(failed);
        sequences(&client, &self.beside.sequences, &mut warnings).await?;
        if let Some(r) = &self.beside.roles {
            warnings.extend(r.apply(&client, &self.dsn.dbname, Stage::Grant).await);
        }
        settings(&client, &self.dsn.dbname, &self.beside.settings, &mut warnings).await;
        Ok(Done { counts: self.counts, stats, warnings, large_objects })
    }

    async fn archive(&self, major: u32) -> Result<Archive> {
        let Some(first) = self.rows.first() else { return Err(Error::other("there is nothing to restore")) };
        let (repo, rt, from) = (first.repo.clone(), first.rt.clone(), first.from.clone());
        let (object, spool) = (self.schema.clone(), self.spool.clone());
        blocking(move || {
            let mut plain = repo.open_object(&rt, &object, from.as_deref())?;
            Archive::open(&mut plain, &spool, major)
        })
        .await
    }

    /// Loads all rows in one transaction.
    async fn load(&mut self, client: &SqlClient, warnings: &mut Vec<String>) -> Result<Vec<MergeStats>> {
        let (rows, counts) = (std::mem::take(&mut self.rows), std::mem::take(&mut self.counts));
        client.batch_execute("BEGIN").await.sql("cannot begin")?;
        let of_full = |i: &Inputs| {
            let point = i.full.as_ref().map(|f| f.point_lsn);
            i.tables.iter().filter(|t| Some(t.cut) == point).map(|t| (t.relid, t.cut)).collect::<Vec<_>>()
        };
        let as_of = rows.iter().flat_map(|r| of_full(&r.inputs)).collect();
        let mut tables = Fitted { schema: self.schema.lsn_end, as_of, warnings };
        match load::load(client, rows, self.selection.clone(), counts, &mut tables).await {
            Ok((stats, counts)) => {
                client.batch_execute("COMMIT").await.sql("cannot commit the rows")?;
                self.counts = counts;
                Ok(stats)
            }
            Err(e) => {
                let _ = client.batch_execute("ROLLBACK").await;
                Err(e)
            }
        }
    }
}

/// Tables that the definitions made, fitted to the rows.
struct Fitted<'a> {
    /// The position of the definitions.
    schema: Lsn,
    /// Tables that are read from a synthetic full, whose rows look as they did there; a base brings definitions of its own.
    as_of: HashMap<u32, Lsn>,
    warnings: &'a mut Vec<String>,
}

impl Tables for Fitted<'_> {
    async fn ready(&mut self, client: &SqlClient, rel: &Relation, last_change: Lsn) -> Result<Ready> {
        let as_of = self.as_of.get(&rel.relid).map_or(last_change, |cut| last_change.max(*cut));
        let (columns, gone) = fit_table(client, rel, as_of <= self.schema, self.warnings).await?;
        let name = rel.qualified();
        let after = gone.iter().map(|c| format!("ALTER TABLE {name} DROP COLUMN {c}")).collect();
        Ok(Ready { table: name, columns, after })
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f).await.context(Kind::Other, "a worker thread broke off")?
}

async fn phase(archive: Archive, dsn: &Dsn, phase: Phase) -> Result<(Archive, Vec<String>)> {
    let dsn = dsn.clone();
    blocking(move || {
        let failed = archive.restore(&dsn, phase)?;
        Ok((archive, failed))
    })
    .await
}

/// Makes the table fit the rows: the definitions may be of another moment than they are, when the table was altered
/// between its base and the target. Nothing is taken away, since indexes and constraints still to come refer to it.
/// Returns the columns that the rows go into, and those to drop once the rows are in: the rows still have them, and
/// definitions that are not older (`settled`) do not. Both quoted.
async fn fit_table(
    client: &SqlClient,
    rel: &Relation,
    settled: bool,
    warnings: &mut Vec<String>,
) -> Result<(Vec<String>, Vec<String>)> {
    let name = rel.qualified();
    let exists = client
        .query_one("SELECT pg_catalog.to_regclass($1) IS NOT NULL", &[&name])
        .await
        .sql("cannot look for the new table")?
        .get::<_, bool>(0);
    let definition = |c: &Column| {
        let not_null = if c.flags.has(ColumnFlags::NOT_NULL) { " NOT NULL" } else { "" };
        format!("{} {}{not_null}", quote_ident(&c.name), c.type_name)
    };
    if !exists {
        let columns: Vec<_> = rel.image_columns().map(definition).collect();
        let schema = quote_ident(&rel.schema);
        let sql = format!("CREATE SCHEMA IF NOT EXISTS {schema}; CREATE TABLE {name} ({})", columns.join(", "));
        client.batch_execute(&sql).await.sql(format!("cannot create {name}"))?;
        warnings.push(format!(
            "{name} is younger than the archived definitions: made from its rows, without indexes and constraints"
        ));
        return Ok((rel.image_columns().map(|c| quote_ident(&c.name)).collect(), Vec::new()));
    }
    let have = client
        .query(
            "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' \
             FROM pg_catalog.pg_attribute a WHERE a.attrelid = pg_catalog.to_regclass($1) AND a.attnum > 0 \
             AND NOT a.attisdropped AND a.attgenerated = ''",
            &[&name],
        )
        .await
        .sql("cannot read the columns of the new table")?;
    let have: Vec<(String, String, bool)> = have.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect();
    let missing: Vec<&Column> = rel.image_columns().filter(|c| !have.iter().any(|h| h.0 == c.name)).collect();
    let extra: Vec<_> = have.iter().filter(|h| !rel.columns.iter().any(|c| c.name == h.0)).collect();
    let renamed = match (missing.as_slice(), extra.as_slice()) {
        ([m], [e]) if m.type_name == e.1 => Some((m.name.clone(), e.0.clone())),
        _ => None,
    };
    if settled && renamed.is_none() && !missing.is_empty() && !extra.is_empty() {
        // The rows are older than a DDL that both took columns away and brought some: which became which is not known.
        let names = |list: &mut dyn Iterator<Item = &str>| list.collect::<Vec<_>>().join(", ");
        return Err(Error::new(
            Kind::Refused,
            format!(
                "the columns of {name} changed after the tenant's last rows in it: they have {}, the definitions at the \
                 target have {}",
                names(&mut missing.iter().map(|c| c.name.as_str())),
                names(&mut extra.iter().map(|e| e.0.as_str()))
            ),
        )
        .code("columns_changed")
        .hint("restore to files, or to a point after the table's next base"));
    }
    let mut gone = Vec::new();
    if let Some((rows, definitions)) = &renamed {
        warnings.push(format!(
            "column {rows} of {name} is called {definitions} in the archived definitions, and so it is here"
        ));
    } else {
        for c in &missing {
            let sql = format!("ALTER TABLE {name} ADD COLUMN {}", definition(c));
            client.batch_execute(&sql).await.sql(format!("cannot add column {} to {name}", c.name))?;
            if settled {
                gone.push(quote_ident(&c.name));
            } else {
                warnings.push(format!("column {} of {name} is younger than the archived definitions: added", c.name));
            }
        }
        for (absent, _, required) in extra {
            if *required {
                let sql = format!("ALTER TABLE {name} ALTER COLUMN {} DROP NOT NULL", quote_ident(absent));
                client.batch_execute(&sql).await.sql(format!("cannot leave {absent} of {name} empty"))?;
            }
            warnings
                .push(format!("column {absent} of {name} is younger than the tenant's rows: they have its default"));
        }
    }
    let into = |c: &Column| match &renamed {
        Some((rows, definitions)) if *rows == c.name => quote_ident(definitions),
        _ => quote_ident(&c.name),
    };
    Ok((rel.image_columns().map(into).collect(), gone))
}

pub(super) async fn major(client: &SqlClient) -> Result<u32> {
    let version = client
        .query_one("SELECT pg_catalog.current_setting('server_version_num')::int4 / 10000", &[])
        .await
        .sql("cannot ask for the server's version")?;
    Ok(u32::try_from(version.get::<_, i32>(0)).unwrap_or(0))
}

/// Whether a session could not be opened because there is no such database.
fn is_absent(e: &Error) -> bool {
    e.message().contains("SQLSTATE 3D000")
}

/// Creates the target with the source's encoding and locale. A locale that this machine does not have is replaced.
async fn create(admin: &SqlClient, dsn: &Dsn, archive: Archive, warnings: &mut Vec<String>) -> Result<Archive> {
    let (archive, options) = blocking(move || {
        let options = archive.database_options()?;
        Ok((archive, options))
    })
    .await?;
    let name = quote_ident(&dsn.dbname);
    let options = options.unwrap_or_else(|| "TEMPLATE = template0".to_owned());
    let Err(refused) = admin.batch_execute(&format!("CREATE DATABASE {name} WITH {options}")).await else {
        return Ok(archive);
    };
    let refused = sql::sql_error(refused, format!("cannot create the database {}", dsn.dbname));
    let encoding = options.split_once("ENCODING = '").and_then(|(_, o)| o.split('\'').next()).unwrap_or("UTF8");
    let plain = format!(
        "CREATE DATABASE {name} WITH TEMPLATE = template0 ENCODING = '{encoding}' LC_COLLATE = 'C' LC_CTYPE = 'C'"
    );
    // When this fails too it was not the locale: the first answer says it best.
    if admin.batch_execute(&plain).await.is_err() {
        return Err(refused);
    }
    warnings.push(format!("the source's locale is not to be had here, the new database's is C: {}", refused.message()));
    Ok(archive)
}

/// A session at the same server, in a database that is always there.
async fn maintenance(dsn: &Dsn) -> Result<SqlClient> {
    match sql::connect(&dsn.with_dbname("postgres")).await {
        Err(e) if is_absent(&e) => sql::connect(&dsn.with_dbname("template1")).await,
        other => other,
    }
}

/// Drops a database, with the sessions in it.
pub(super) async fn drop_database(dsn: &Dsn) -> Result<()> {
    let admin = maintenance(dsn).await?;
    let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quote_ident(&dsn.dbname));
    admin.batch_execute(&sql).await.sql(format!("cannot drop the database {}", dsn.dbname))
}

/// Refuses a database that holds anything of a user's.
pub async fn require_empty(client: &SqlClient, dsn: &Dsn) -> Result<()> {
    let rows = client
        .query(
            "SELECT n.nspname || '.' || o.name FROM ( \
               SELECT relnamespace AS ns, relname::text AS name, oid, 'pg_class'::pg_catalog.regclass AS class FROM pg_catalog.pg_class \
               UNION ALL SELECT pronamespace, proname::text, oid, 'pg_proc'::pg_catalog.regclass FROM pg_catalog.pg_proc \
               UNION ALL SELECT typnamespace, typname::text, oid, 'pg_type'::pg_catalog.regclass FROM pg_catalog.pg_type \
             ) o JOIN pg_catalog.pg_namespace n ON n.oid = o.ns \
             WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\\_toast%' \
               AND n.nspname NOT LIKE 'pg\\_temp%' \
               AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = o.class AND d.objid = o.oid AND d.deptype = 'e') \
             UNION ALL SELECT 'large object ' || m.oid FROM pg_catalog.pg_largeobject_metadata m \
             ORDER BY 1 LIMIT 3",
            &[],
        )
        .await
        .sql("cannot look whether the database is empty")?;
    if rows.is_empty() {
        return Ok(());
    }
    let found: Vec<String> = rows.iter().map(|r| r.get(0)).collect();
    Err(Error::new(Kind::Refused, format!("the database {} is not empty: it has {}", dsn.dbname, found.join(", ")))
        .hint("name a database that does not exist yet, or an empty one"))
}

/// The same for a target that may not exist.
pub async fn require_absent_or_empty(dsn: &Dsn) -> Result<()> {
    match sql::connect(dsn).await {
        Ok(client) => require_empty(&client, dsn).await,
        Err(e) if is_absent(&e) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Decides about owners and extensions by what the target's server has.
async fn settle(mut archive: Archive, client: &SqlClient, warnings: &mut Vec<String>) -> Result<Archive> {
    let names = |sql: &'static str| async move {
        let rows = client.query(sql, &[]).await.sql("cannot look at the target's server")?;
        Ok::<BTreeSet<String>, Error>(rows.iter().map(|r| r.get(0)).collect())
    };
    let roles = names("SELECT rolname::text FROM pg_catalog.pg_roles").await?;
    let superuser = client
        .query_one("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user", &[])
        .await
        .sql("cannot look at the role")?
        .get::<_, bool>(0);
    let missing: Vec<String> = archive.roles().difference(&roles).cloned().collect();
    archive.owners = missing.is_empty() && superuser;
    if !missing.is_empty() {
        warnings.push(format!(
            "roles that own something do not exist here ({}): everything belongs to the role of the restore",
            missing.join(", ")
        ));
    } else if !superuser {
        warnings.push("the role of the restore is no superuser: everything belongs to it".into());
    }
    let available = names("SELECT name::text FROM pg_catalog.pg_available_extensions").await?;
    let missing: BTreeSet<String> = archive.extensions().difference(&available).cloned().collect();
    if !missing.is_empty() {
        let list = missing.iter().cloned().collect::<Vec<_>>().join(", ");
        warnings.push(format!("extensions that this server does not offer are left out: {list}"));
        archive.without_extensions(&missing);
    }
    Ok(archive)
}

/// Fills the materialized views from the rows that came, as they were made: what one reads is made before it. The archive
/// does not say which were filled at the source.
async fn refresh(client: &SqlClient, warnings: &mut Vec<String>) -> Result<()> {
    let views = client
        .query(
            "SELECT c.oid::pg_catalog.regclass::text FROM pg_catalog.pg_class c \
             WHERE c.relkind = 'm' AND NOT c.relispopulated ORDER BY c.oid",
            &[],
        )
        .await
        .sql("cannot list the materialized views")?;
    for view in views.iter().map(|r| r.get::<_, &str>(0)) {
        if let Err(e) = client.batch_execute(&format!("REFRESH MATERIALIZED VIEW {view}")).await {
            let e = sql::sql_error(e, format!("materialized view {view} is left empty"));
            warnings.push(e.to_string());
        }
    }
    Ok(())
}

/// Gives the database the settings that the source's had. Sessions begun from here on have them.
async fn settings(client: &SqlClient, database: &str, settings: &[String], warnings: &mut Vec<String>) {
    for s in settings {
        if let Err(e) = client.batch_execute(&format!("ALTER DATABASE {} SET {s}", quote_ident(database))).await {
            warnings.push(sql::sql_error(e, format!("the database's setting {s}")).to_string());
        }
    }
}

/// Moves sequences forward: to where the archive has them, and beyond what the loaded columns hold.
async fn sequences(client: &SqlClient, noted: &[SequenceState], warnings: &mut Vec<String>) -> Result<()> {
    for s in noted {
        let moved = client
            .execute(
                "SELECT pg_catalog.setval(c.oid, $2, $3) FROM pg_catalog.pg_class c \
                 WHERE c.oid = pg_catalog.to_regclass($1) AND c.relkind = 'S'",
                &[&s.name, &s.last_value, &s.is_called],
            )
            .await;
        if let Err(e) = moved {
            warnings.push(sql::sql_error(e, format!("sequence {}", s.name)).to_string());
        }
    }
    let owned = client
        .query(
            "SELECT d.objid::pg_catalog.regclass::text, d.refobjid::pg_catalog.regclass::text, pg_catalog.quote_ident(a.attname), \
                    q.seqincrement > 0 \
             FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_sequence q ON q.seqrelid = d.objid \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid \
             WHERE d.classid = 'pg_class'::pg_catalog.regclass AND d.refclassid = 'pg_class'::pg_catalog.regclass \
               AND d.deptype IN ('a', 'i')",
            &[],
        )
        .await
        .sql("cannot list the sequences")?;
    for r in owned {
        let (sequence, table, column, up): (String, String, String, bool) = (r.get(0), r.get(1), r.get(2), r.get(3));
        let (aggregate, beyond) = if up { ("max", ">") } else { ("min", "<") };
        let literal = sequence.replace('\'', "''");
        let sql = format!(
            "SELECT pg_catalog.setval('{literal}'::pg_catalog.regclass, m.v) FROM (SELECT pg_catalog.{aggregate}({column})::int8 AS v FROM {table}) m, \
             {sequence} s WHERE m.v IS NOT NULL AND (m.v {beyond} s.last_value OR NOT s.is_called AND m.v = s.last_value)"
        );
        if let Err(e) = client.batch_execute(&sql).await {
            warnings.push(sql::sql_error(e, format!("sequence {sequence}")).to_string());
        }
    }
    Ok(())
}
