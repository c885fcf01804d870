//! The roles of tenants, as SQL that brings them back: what `coffer.add_role()` ties to a tenant is archived under that
//! tenant's key.
//!
//! Roles belong to the cluster and are not in the stream, so they are read over SQL: with every base, when the registry
//! says that one came or went, and once a minute; what differs from what is archived is archived anew. Nothing is lost
//! by reading late but what changed and changed back in between.
//!
//! The database has made sentences of it (`coffer._agent_roles()`): a role that exists is altered, none is dropped.
//! Passwords are added only where the configuration asks for it.

use crate::crypto::{Codec, Header, KeyId, KeySource, ObjectKind, random, sha256};
use crate::error::{Context, Error, Kind, Result};
use crate::repository::{ObjectRef, paths};
use crate::run::AgentContext;
use crate::sql::{SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::{Lsn, quote_ident};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

/// Version of the document.
const VERSION: u32 = 1;

const READ: &str = "SELECT tenant, role::text, stage, statement, tail FROM coffer._agent_roles()";

/// What an object of the kind `roles` holds (FORMAT.md).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roles {
    pub v: u32,
    pub roles: BTreeSet<String>,
    /// Whether they are with their password verifiers.
    pub passwords: bool,
    pub statements: Vec<Statement>,
}

/// One statement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    pub stage: Stage,
    pub sql: String,
    /// With it, the name of the database stands between `sql` and this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<String>,
}

/// What a statement needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// No object: roles, memberships, settings.
    Role,
    /// The objects that it grants.
    Grant,
}

impl Statement {
    /// The statement for the database of this name, quoted as the reader wants it.
    fn text(&self, database: &str) -> String {
        match &self.tail {
            Some(t) => format!("{}{database}{t}", self.sql),
            None => self.sql.clone(),
        }
    }
}

impl Roles {
    fn new(passwords: bool) -> Self {
        Self { v: VERSION, roles: BTreeSet::new(), passwords, statements: Vec::new() }
    }

    /// Reads what an object holds.
    pub fn decode(plain: &[u8]) -> Result<Self> {
        let roles: Self = serde_json::from_slice(plain)
            .context(Kind::Verification, "the roles of a tenant are not readable")
            .map_err(|e| e.code("malformed"))?;
        if roles.v != VERSION {
            return Err(Error::new(Kind::Refused, format!("roles of version {} are not known here", roles.v))
                .hint("use the version of coffer that wrote them, or a newer one"));
        }
        Ok(roles)
    }

    fn encode(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).context(Kind::Other, "cannot encode the roles of a tenant")
    }

    /// A script for psql, for the database that it is connected to.
    pub fn script(&self) -> String {
        let mut out = String::from(
            "-- Roles of the tenant, their memberships, settings and grants. For psql, in the database that they are for.\n\
             -- A role that exists is altered; none is dropped.\n",
        );
        if !self.passwords {
            out.push_str("-- Passwords are not in the archive: give new ones with ALTER ROLE … PASSWORD.\n");
        }
        for s in &self.statements {
            out.push_str(&s.text(":\"DBNAME\""));
            out.push_str(";\n");
        }
        out
    }

    /// Does what one stage says, in the database that the session is in. Returns what failed: a grant may name a role or
    /// an object that is not here.
    pub async fn apply(&self, client: &SqlClient, database: &str, stage: Stage) -> Vec<String> {
        let mut failed = Vec::new();
        for s in self.statements.iter().filter(|s| s.stage == stage) {
            let text = s.text(&quote_ident(database));
            if let Err(e) = client.batch_execute(&text).await {
                // Not the statement: it may hold a password verifier.
                let what = s.sql.split(" PASSWORD ").next().unwrap_or_default();
                failed.push(crate::sql::sql_error(e, format!("roles: {what}")).to_string());
            }
        }
        failed
    }
}

/// The roles of every tenant that has some, as they are now, and a position that they are not younger than.
pub async fn read(client: &SqlClient, passwords: bool) -> Result<(Lsn, BTreeMap<String, Roles>)> {
    let mut tenants: BTreeMap<String, Roles> = BTreeMap::new();
    for row in client.query(READ, &[]).await.sql("cannot read the roles of tenants")? {
        let roles = tenants.entry(row.get(0)).or_insert_with(|| Roles::new(passwords));
        roles.roles.extend(row.get::<_, Option<String>>(1));
        let stage = if row.get::<_, &str>(2) == "grant" { Stage::Grant } else { Stage::Role };
        roles.statements.push(Statement { stage, sql: row.get(3), tail: row.get(4) });
    }
    if passwords {
        for roles in tenants.values_mut() {
            add_passwords(client, roles).await?;
        }
    }
    let row = client
        .query_one("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[])
        .await
        .sql("cannot read the position of the log")?;
    Ok((row.get::<_, &str>(0).parse().map_err(Error::other)?, tenants))
}

/// Adds the verifiers behind the statement that makes the role.
async fn add_passwords(client: &SqlClient, roles: &mut Roles) -> Result<()> {
    let names: Vec<&String> = roles.roles.iter().collect();
    let rows = client
        .query(
            "SELECT pg_catalog.format('ALTER ROLE %I PASSWORD %L', rolname, rolpassword) FROM pg_catalog.pg_authid \
             WHERE rolname = ANY ($1) AND rolpassword IS NOT NULL ORDER BY rolname",
            &[&names],
        )
        .await
        .sql("cannot read the passwords of roles, which [accounts] passwords = true asks for")
        .map_err(|e| e.hint("the role of the source's url needs pg_read_all_data; or set passwords = false"))?;
    let statement = |r: &tokio_postgres::Row| Statement { stage: Stage::Role, sql: r.get(0), tail: None };
    let first_grant = roles.statements.iter().position(|s| s.stage == Stage::Grant).unwrap_or(roles.statements.len());
    roles.statements.splice(first_grant..first_grant, rows.iter().map(statement));
    Ok(())
}

/// What of them is not archived yet, as objects that are in every required store. `archived`: by tenant, the newest
/// object; `all`: whether those that did not change are written, too.
pub async fn archive(
    ctx: &AgentContext,
    (at, mut now): (Lsn, BTreeMap<String, Roles>),
    archived: &BTreeMap<uuid::Uuid, ObjectRef>,
    all: bool,
) -> Result<Vec<ObjectRef>> {
    // A tenant whose last role went has none from here on.
    for e in archived.keys().filter_map(|uid| ctx.keyring.by_uid(*uid)) {
        now.entry(e.tenant.key).or_insert_with(|| Roles::new(ctx.config.accounts.passwords));
    }
    let mut objects = Vec::new();
    for (tenant, roles) in now {
        let plain = roles.encode()?;
        let entry = ctx.keyring.ensure(ctx.source_uid, &Tenant::normal(&tenant)).await?;
        let same = match archived.get(&entry.uid) {
            Some(o) => sha256(&ctx.repo.open_small(o, None).await?) == sha256(&plain),
            None => false,
        };
        if !same || all {
            objects.push(put(ctx, entry.key_id(), at, plain).await?);
        }
    }
    Ok(objects)
}

async fn put(ctx: &AgentContext, key: KeyId, at: Lsn, plain: Vec<u8>) -> Result<ObjectRef> {
    let (system_identifier, timeline) = ctx.system();
    let header = Header {
        kind: ObjectKind::Roles,
        codec: Codec::Lz4,
        tenant: key.uid,
        object: random::uuid(),
        source: ctx.source_uid,
        system_identifier,
        timeline,
        lsn_start: Lsn::ZERO,
        lsn_end: at,
        key_version: key.version,
    };
    let path = paths::roles(ctx.source_uid, key.uid, at, header.object);
    let (repo, rt, key) = (ctx.repo.clone(), ctx.rt.clone(), ctx.keyring.key(key)?);
    tokio::task::spawn_blocking(move || {
        repo.seal_to(rt, path, &header, &key, |sealer| {
            sealer.write_all(&plain).context(Kind::Other, "cannot seal the roles of a tenant")?;
            Ok(0)
        })
    })
    .await
    .map_err(|e| Error::other(format!("sealing the roles of a tenant broke off: {e}")))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_databases_name_stands_where_the_statement_leaves_room() {
        let mut roles = Roles::new(false);
        roles.roles.insert("a".into());
        roles.statements = vec![
            Statement {
                stage: Stage::Role,
                sql: "ALTER ROLE a IN DATABASE ".into(),
                tail: Some(" SET x TO '1'".into()),
            },
            Statement { stage: Stage::Grant, sql: "GRANT SELECT ON TABLE public.t TO a".into(), tail: None },
        ];
        let read = Roles::decode(&roles.encode().unwrap()).unwrap();
        assert_eq!(read, roles);
        let script = read.script();
        assert!(script.contains("ALTER ROLE a IN DATABASE :\"DBNAME\" SET x TO '1';\nGRANT"), "{script}");
        assert_eq!(roles.statements[0].text("\"My db\""), "ALTER ROLE a IN DATABASE \"My db\" SET x TO '1'");
        assert!(Roles::decode(br#"{"v":2,"roles":[],"passwords":false,"statements":[]}"#).is_err());
    }
}
