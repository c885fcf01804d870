//! Restore side by side: the tenant's rows at the target in a new schema of a database, for looking and comparing.
//!
//! Tables have the columns and types of the target, primary keys and indexes, and nothing that acts: no triggers, no
//! defaults, no foreign keys. They are unlogged, so that they are in nobody's backup, cost the log nothing, and are not
//! captured as new tables of the application; a crash of the server empties them. All of it comes in one transaction, or
//! nothing; the live tables are not locked, and only the caller's role can read the copy.

use super::in_place::live::{self, LiveTable, literal};
use super::load::{self, Ready, Tables};
use super::once::{Note, OfJob};
use super::schema::{Archive, IndexDefinition};
use super::sink::{Counts, Selection};
use crate::clock::rfc3339;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::history::Target;
use crate::merge::{MergeStats, TenantAt};
use crate::repository::ObjectRef;
use crate::sql::{self, SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::{Column, ColumnFlags, KeyMode, Lsn, Relation, quote_ident};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Bytes of an identifier in PostgreSQL.
const LONGEST_NAME: usize = 63;
/// How the name of a schema begins that nobody named.
const PREFIX: &str = "coffer_";
/// Of a type by its name: what is under it when it is a domain, and of each composite type in it the statement that makes it,
/// as pg_dump writes it.
const TYPE_HERE: &str = r"
WITH RECURSIVE under (oid, typmod, depth) AS (
    SELECT pg_catalog.to_regtype($1)::oid, -1, 0
    UNION ALL
    SELECT y.typbasetype, y.typtypmod, u.depth + 1 FROM under u JOIN pg_catalog.pg_type y ON y.oid = u.oid WHERE y.typtype = 'd'
),
parts (oid) AS (
    SELECT pg_catalog.to_regtype($1)::oid
    UNION
    SELECT x.oid FROM parts p JOIN pg_catalog.pg_type y ON y.oid = p.oid CROSS JOIN LATERAL (
        SELECT y.typelem UNION ALL SELECT y.typbasetype
        UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range r WHERE r.rngtypid = y.oid OR r.rngmultitypid = y.oid
        UNION ALL SELECT a.atttypid FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = y.typrelid AND y.typrelid <> 0 AND a.attnum > 0 AND NOT a.attisdropped
    ) x (oid) WHERE x.oid >= 16384
)
SELECT (SELECT pg_catalog.format_type(u.oid, u.typmod) FROM under u WHERE u.depth > 0 ORDER BY u.depth DESC LIMIT 1),
       ARRAY(SELECT pg_catalog.format(E'CREATE TYPE %I.%I AS (\n%s\n);', n.nspname, y.typname, (
                 SELECT pg_catalog.string_agg(pg_catalog.format(E'\t%I %s', a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)),
                                              E',\n' ORDER BY a.attnum)
                 FROM pg_catalog.pg_attribute a WHERE a.attrelid = y.typrelid AND a.attnum > 0 AND NOT a.attisdropped))
             FROM parts p JOIN pg_catalog.pg_type y ON y.oid = p.oid JOIN pg_catalog.pg_namespace n ON n.oid = y.typnamespace
             WHERE y.typtype = 'c')";
/// Bytes of the tenant's key in a schema's name.
const LONGEST_KEY: usize = 32;

/// What is wanted.
pub(super) struct SideBySide<'a> {
    pub dsn: &'a Dsn,
    pub name: &'a str,
    /// Roles that may read the copy, besides the session's.
    pub readers: &'a [String],
    pub rows: TenantAt,
    /// `name` or `schema.name`; empty: all.
    pub tables: &'a [String],
    pub selection: Selection,
    pub counts: Counts,
    /// The definitions at the target, for the indexes.
    pub definitions: Option<ObjectRef>,
    pub target: &'a Target,
    pub source: &'a str,
    /// The job that it is for.
    pub note: Option<&'a Note>,
    /// For the definitions' archive.
    pub spool: PathBuf,
}

/// What came of it.
pub(super) struct Done {
    pub counts: Counts,
    pub stats: Vec<MergeStats>,
    pub warnings: Vec<String>,
}

/// The name of a schema that nobody named: `coffer_3_20261122t131500z`; a job's ends with its number, `_j17`.
pub(super) fn default_name(tenant: &Tenant, target: &Target, job: Option<OfJob>) -> String {
    let key = if tenant.key.is_empty() { tenant.kind.name() } else { &tenant.key };
    let mut plain: String =
        key.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect();
    let time: String =
        rfc3339(target.time_us).chars().take_while(|c| *c != '.').filter(char::is_ascii_alphanumeric).collect();
    let job = job.map_or_else(String::new, |j| format!("_j{}", j.job));
    let end = format!("_{}z{job}", time.trim_end_matches('Z').to_ascii_lowercase());
    plain.truncate(LONGEST_KEY.min(LONGEST_NAME - PREFIX.len() - end.len()));
    format!("{PREFIX}{plain}{end}")
}

/// Refuses a name that no schema can have.
pub(super) fn require_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.starts_with("pg_") {
        return Err(Error::usage(format!(
            "--target: '{name}' cannot be a schema's name: 1 to {LONGEST_NAME} bytes, not beginning with pg_"
        )));
    }
    Ok(())
}

/// Refuses a schema that exists.
pub(super) async fn require_absent(dsn: &Dsn, name: &str) -> Result<()> {
    require_no_schema(&sql::connect(dsn).await?, name).await
}

async fn require_no_schema(client: &SqlClient, name: &str) -> Result<()> {
    let exists: bool = client
        .query_one("SELECT pg_catalog.to_regnamespace(pg_catalog.quote_ident($1)) IS NOT NULL", &[&name])
        .await
        .sql("cannot look for the schema")?
        .get(0);
    if exists {
        return Err(Error::new(Kind::Refused, format!("schema {} exists", quote_ident(name)))
            .code("exists")
            .hint("name another with --target, or drop it"));
    }
    Ok(())
}

impl SideBySide<'_> {
    pub async fn run(mut self) -> Result<Done> {
        let client = sql::connect(&self.dsn.with_application_name("coffer restore")).await?;
        super::in_place::standby_is_refused(&client).await?;
        require_no_schema(&client, self.name).await?;
        let mut warnings = Vec::new();
        let live = self.live_tables(&client).await;
        let (indexes, types) = self.indexes(&client, &mut warnings).await?.unzip();
        client.batch_execute("BEGIN").await.sql("cannot begin")?;
        match self.fill(&client, live, (indexes, types), warnings).await {
            Ok(done) => {
                self.note(&client, &done).await?;
                client.batch_execute("COMMIT").await.sql("cannot commit the copy")?;
                Ok(done)
            }
            Err(e) => {
                let _ = client.batch_execute("ROLLBACK").await;
                Err(e)
            }
        }
    }

    /// In the transaction: the job is done with it.
    async fn note(&self, client: &SqlClient, done: &Done) -> Result<()> {
        let Some(note) = self.note else { return Ok(()) };
        let tables = super::run::counted(&done.counts);
        let written = note.write(client, tables, done.counts.bytes, None, done.warnings.clone()).await;
        written.sql("cannot note that the job is done")?.require()
    }

    /// Tables that can hold rows of the tenant now: for those without rows at the target. None where the extension is not.
    async fn live_tables(&self, client: &SqlClient) -> Vec<LiveTable> {
        let wanted = |rule: &crate::snapshot::catalog::Rule| {
            super::run::wanted(self.tables, &rule.qualified())
                && (self.selection.classes.is_empty() || self.selection.classes.contains(&rule.class))
        };
        live::tables(client, &self.rows.tenant, &wanted).await.unwrap_or_else(|e| {
            tracing::debug!("tables without rows are left out: {e}");
            Vec::new()
        })
    }

    /// Indexes, and the statements that make types. `None`: the definitions are not archived or not readable.
    async fn indexes(
        &self,
        client: &SqlClient,
        warnings: &mut Vec<String>,
    ) -> Result<Option<(Vec<IndexDefinition>, String)>> {
        let Some(object) = self.definitions.clone() else { return Ok(None) };
        let (repo, rt, from, spool) =
            (self.rows.repo.clone(), self.rows.rt.clone(), self.rows.from.clone(), self.spool.clone());
        let major = super::database::major(client).await?;
        let read = move || {
            let mut plain = repo.open_object(&rt, &object, from.as_deref())?;
            let archive = Archive::open(&mut plain, &spool, major)?;
            Ok::<_, Error>((archive.indexes()?, archive.types()?))
        };
        match tokio::task::spawn_blocking(read).await.context(Kind::Other, "a worker thread broke off")? {
            Ok(i) => Ok(Some(i)),
            Err(e) if e.is_code("pg_restore_missing") || e.kind() == Kind::Other => {
                warnings.push(format!("the archived indexes cannot be read: {e}"));
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    async fn fill(
        &mut self,
        client: &SqlClient,
        live: Vec<LiveTable>,
        (indexes, types): (Option<Vec<IndexDefinition>>, Option<String>),
        warnings: Vec<String>,
    ) -> Result<Done> {
        let schema = quote_ident(self.name);
        client.batch_execute(&format!("CREATE SCHEMA {schema}")).await.sql(format_args!("cannot create {schema}"))?;
        let mut made = Made { schema: schema.clone(), types, tables: BTreeMap::new(), warnings };
        let covered = self.rows.inputs.tables.clone();
        let (selection, counts) = (self.selection.clone(), std::mem::take(&mut self.counts));
        let (stats, counts) =
            load::load(client, vec![self.rows.clone()], selection, counts, &mut made).await.map_err(does_not_fit)?;
        for t in &covered {
            let (relid, name) = (t.relid, &t.name);
            if made.tables.values().any(|m| m.relation.relid == relid) {
                continue;
            }
            if let Some(l) = live.iter().find(|l| l.rule.relid == relid || l.name() == *name) {
                made.create(client, &l.relation).await?;
            }
        }
        made.index(client, indexes).await?;
        self.describe(client, &made).await?;
        Ok(Done { counts, stats, warnings: made.warnings })
    }

    /// Says what it is, and lets nobody else in, whatever default privileges say.
    async fn describe(&self, client: &SqlClient, made: &Made) -> Result<()> {
        let t = self.target;
        let point = format!("{} ({}, {})", t.asked, t.lsn, rfc3339(t.time_us));
        let schema = &made.schema;
        let whose = format!("tenant {} of {}", self.rows.tenant, self.source);
        let mut sql = format!(
            "COMMENT ON SCHEMA {schema} IS {};",
            literal(&format!(
                "pg_coffer: {whose} as at {point}. A copy for looking: unlogged (a crash empties it), not backed up, no \
                 triggers, no foreign keys. Drop it when done."
            ))
        );
        for m in made.tables.values() {
            let text = format!("pg_coffer: {} of {whose} as at {point}", m.relation.qualified());
            sql.push_str(&format!("COMMENT ON TABLE {schema}.{} IS {};", quote_ident(&m.name), literal(&text)));
        }
        sql.push_str(&format!(
            "DO $do$ DECLARE g record; BEGIN FOR g IN \
             SELECT pg_catalog.format('SCHEMA %I', n.nspname) AS what, a.grantee FROM pg_catalog.pg_namespace n, \
               pg_catalog.aclexplode(n.nspacl) a WHERE n.nspname = {name} AND a.grantee <> n.nspowner \
             UNION SELECT pg_catalog.format('TABLE %s', c.oid::pg_catalog.regclass), a.grantee FROM pg_catalog.pg_class c \
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, pg_catalog.aclexplode(c.relacl) a \
               WHERE n.nspname = {name} AND a.grantee <> c.relowner \
             LOOP EXECUTE pg_catalog.format('REVOKE ALL ON %s FROM %s', g.what, CASE WHEN g.grantee = 0 THEN 'PUBLIC' \
               ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(g.grantee)) END); END LOOP; END $do$;",
            name = literal(self.name),
        ));
        let readers = client
            .query("SELECT rolname::text FROM pg_catalog.pg_roles WHERE rolname::text = ANY ($1)", &[&self.readers])
            .await
            .sql("cannot look for the roles that read the copy")?;
        for r in readers.iter().map(|r| quote_ident(r.get(0))) {
            sql.push_str(&format!(
                "GRANT USAGE ON SCHEMA {schema} TO {r}; GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {r};"
            ));
        }
        client.batch_execute(&sql).await.sql("cannot describe the copy")
    }
}

/// What types or values of the target the database no longer takes.
fn does_not_fit(e: Error) -> Error {
    if e.kind() == Kind::Other {
        return e.hint("nothing was made; --mode files and --mode database need nothing of this database");
    }
    e
}

/// A table of the copy.
struct MadeTable {
    name: String,
    relation: Relation,
}

/// What has been made so far.
struct Made {
    /// Quoted.
    schema: String,
    /// The statements that made the types as they were at the target.
    types: Option<String>,
    /// By the table's relid.
    tables: BTreeMap<u32, MadeTable>,
    warnings: Vec<String>,
}

impl Tables for Made {
    async fn ready(&mut self, client: &SqlClient, rel: &Relation, _: Lsn) -> Result<Ready> {
        let name = self.create(client, rel).await?;
        let columns = rel.image_columns().map(|c| quote_ident(&c.name)).collect();
        Ok(Ready { table: format!("{}.{}", self.schema, quote_ident(&name)), columns, after: Vec::new() })
    }
}

impl Made {
    /// Creates the table; its name.
    async fn create(&mut self, client: &SqlClient, rel: &Relation) -> Result<String> {
        let mut name = rel.name.clone();
        if self.tables.values().any(|m| m.name == name) {
            // Two schemas have a table of this name.
            name = format!("{}_{}", rel.schema, rel.name);
            while name.len() > LONGEST_NAME || self.tables.values().any(|m| m.name == name) {
                name = format!("table_{}", rel.relid);
            }
            self.warnings.push(format!(
                "{} is called {} here: its name was taken",
                rel.qualified(),
                quote_ident(&name)
            ));
        }
        let expressions = generated(client, rel).await?;
        let (mut columns, mut without) = (Vec::new(), Vec::new());
        for c in &rel.columns {
            let type_name = self.type_here(client, rel, c).await?;
            let not_null = if c.flags.has(ColumnFlags::NOT_NULL) { " NOT NULL" } else { "" };
            if !c.flags.has(ColumnFlags::GENERATED) {
                columns.push(format!("{} {type_name}{not_null}", quote_ident(&c.name)));
                without.extend(columns.last().cloned());
            } else if let Some(e) = expressions.get(&c.name) {
                columns.push(format!("{} {type_name} GENERATED ALWAYS AS ({e}) STORED", quote_ident(&c.name)));
            } else {
                self.warnings.push(format!(
                    "the generated column {} of {} is left out: it is not generated any more",
                    c.name,
                    rel.qualified()
                ));
            }
        }
        let table = format!("{}.{}", self.schema, quote_ident(&name));
        let create = |columns: &[String]| format!("CREATE UNLOGGED TABLE {table} ({})", columns.join(", "));
        let during = || format!("cannot make a copy of {}", rel.qualified());
        client.batch_execute("SAVEPOINT coffer_table").await.sql("cannot set a savepoint")?;
        match client.batch_execute(&create(&columns)).await {
            // The expressions are those of today; columns that they name were others then.
            Err(e) if e.as_db_error().is_some() && without.len() < columns.len() => {
                client.batch_execute("ROLLBACK TO SAVEPOINT coffer_table").await.sql("cannot roll back")?;
                self.warnings.push(format!(
                    "the generated columns of {} are left out: what they are generated from was not the same then: {}",
                    rel.qualified(),
                    e.as_db_error().map_or_else(String::new, |e| e.message().to_owned())
                ));
                client.batch_execute(&create(&without)).await.sql(during())?;
            }
            done => done.sql(during())?,
        }
        client.batch_execute("RELEASE SAVEPOINT coffer_table").await.sql("cannot release a savepoint")?;
        self.tables.insert(rel.relid, MadeTable { name: name.clone(), relation: rel.clone() });
        Ok(name)
    }

    /// The column's type, or text where the database does not have it as it was. Of a domain, what is under it: rows that
    /// were allowed then need not be now.
    async fn type_here(&mut self, client: &SqlClient, rel: &Relation, c: &Column) -> Result<String> {
        client.batch_execute("SAVEPOINT coffer_type").await.sql("cannot set a savepoint")?;
        let mut probe = format!("SELECT NULL::{}", c.type_name);
        for label in &c.enum_labels {
            probe.push_str(&format!(", {}::{}", literal(label), c.type_name));
        }
        match client.simple_query(&probe).await {
            Ok(_) => {
                client.batch_execute("RELEASE SAVEPOINT coffer_type").await.sql("cannot release a savepoint")?;
                let said = client.query_one(TYPE_HERE, &[&c.type_name]).await.sql("cannot look at a type")?;
                let (base, composites): (Option<String>, Vec<String>) = (said.get(0), said.get(1));
                // An image of another shape may read as one of this shape, with another meaning.
                let same = |made: &String| self.types.as_ref().is_some_and(|t| t.contains(made.as_str()));
                if composites.iter().all(same) {
                    return Ok(base.unwrap_or_else(|| c.type_name.clone()));
                }
                self.is_text(rel, c);
                Ok("text".to_owned())
            }
            Err(e) if e.as_db_error().is_some() => {
                client.batch_execute("ROLLBACK TO SAVEPOINT coffer_type").await.sql("cannot roll back")?;
                self.is_text(rel, c);
                Ok("text".to_owned())
            }
            Err(e) => Err(sql::sql_error(e, "cannot look for a type")),
        }
    }

    fn is_text(&mut self, rel: &Relation, c: &Column) {
        self.warnings.push(format!(
            "column {} of {} is text here: its type {} is gone or has changed",
            c.name,
            rel.qualified(),
            c.type_name
        ));
    }

    async fn index(&mut self, client: &SqlClient, indexes: Option<Vec<IndexDefinition>>) -> Result<()> {
        let mut statements = Vec::new();
        let Some(indexes) = indexes else {
            self.warnings
                .push("the definitions at the target are not archived: the copy has keys and no other indexes".into());
            for m in self.tables.values().filter(|m| m.relation.key_mode == KeyMode::Key) {
                let column = |k: &u16| quote_ident(&m.relation.columns[usize::from(*k)].name);
                let columns: Vec<String> = m.relation.key.iter().map(column).collect();
                let table = format!("{}.{}", self.schema, quote_ident(&m.name));
                statements.push(format!("ALTER TABLE {table} ADD PRIMARY KEY ({})", columns.join(", ")));
            }
            return self.each(client, statements).await;
        };
        for i in &indexes {
            let of = |m: &&MadeTable| m.relation.schema == i.schema && m.relation.name == i.table;
            if let Some(m) = self.tables.values().find(of) {
                statements.push(i.on(&format!("{}.{}", self.schema, quote_ident(&m.name))));
            }
        }
        self.each(client, statements).await
    }

    /// Runs statements that may fail one by one.
    async fn each(&mut self, client: &SqlClient, statements: Vec<String>) -> Result<()> {
        for s in statements {
            client.batch_execute("SAVEPOINT coffer_index").await.sql("cannot set a savepoint")?;
            match client.batch_execute(&s).await {
                Ok(()) => client.batch_execute("RELEASE SAVEPOINT coffer_index").await,
                Err(e) if e.as_db_error().is_some() => {
                    self.warnings.push(sql::sql_error(e, s).to_string());
                    client.batch_execute("ROLLBACK TO SAVEPOINT coffer_index").await
                }
                Err(e) => Err(e),
            }
            .sql("cannot make the copy's indexes")?;
        }
        Ok(())
    }
}

/// Expressions of the generated columns of the table as it is now, where it still is.
async fn generated(client: &SqlClient, rel: &Relation) -> Result<BTreeMap<String, String>> {
    if !rel.columns.iter().any(|c| c.flags.has(ColumnFlags::GENERATED)) {
        return Ok(BTreeMap::new());
    }
    let rows = client
        .query(
            "SELECT a.attname::text, pg_catalog.pg_get_expr(d.adbin, d.adrelid) FROM pg_catalog.pg_attribute a \
             JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
             WHERE a.attrelid = pg_catalog.to_regclass($1) AND a.attgenerated = 's'",
            &[&rel.qualified()],
        )
        .await
        .sql("cannot read the expressions of generated columns")?;
    Ok(rows.iter().map(|r| (r.get(0), r.get(1))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_that_nobody_names_is_named_after_tenant_and_time() {
        let target = Target { asked: "latest".into(), lsn: Lsn(1), time_us: 1_795_353_300_000_000 };
        let name = default_name(&Tenant::normal("Acme & Söhne"), &target, None);
        assert!(name.starts_with("coffer_acme___s_hne_2026") && name.ends_with('z'), "{name}");
        assert!(default_name(&Tenant::normal("x".repeat(500)), &target, None).len() <= LONGEST_NAME);
        for job in [17, i64::MAX] {
            let job = Some(OfJob { job, claim: uuid::Uuid::nil() });
            let name = default_name(&Tenant::normal("x".repeat(500)), &target, job);
            assert!(
                name.len() <= LONGEST_NAME && name.ends_with(&format!("z_j{}", job.map_or(0, |j| j.job))),
                "{name}"
            );
        }
        assert!(require_name(&name).is_ok());
        for bad in ["", "pg_x", &"x".repeat(64)] {
            assert!(require_name(bad).is_err(), "{bad}");
        }
    }
}
