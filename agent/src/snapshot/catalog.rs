//! A covered table as the source's catalogs describe it: its rule, and the same descriptor that the output plugin
//! would send for a row of it now.
//!
//! Base rows and archived changes meet in one merge, which matches columns by `attnum`; so attnums, flags, missing
//! values and the key's order are the plugin's. Partitions: the columns are the root's, for every leaf.

use crate::error::{Error, Kind, Result};
use crate::run::AgentContext;
use crate::sql::SqlContext;
use crate::tenant::Tenant;
use coffer_wire::{Class, Column, ColumnFlags, KeyMode, Relation, Strategy};
use tokio_postgres::Client;
use uuid::Uuid;

/// One row of `coffer._agent_rules()`: a table that is to be backed up. For a partitioned table, the root.
#[derive(Clone, Debug)]
pub struct Rule {
    pub relid: u32,
    pub schema: String,
    pub name: String,
    pub strategy: Strategy,
    pub class: Class,
    pub tenant_column: Option<String>,
    /// The transaction that registered the table: a new one asks for a new base.
    pub registered_xid: u64,
    /// In the order of the key bytes; `None`: rows are told apart by the whole row.
    pub key_columns: Option<Vec<String>>,
    /// Schema strategy: whose schema it is.
    pub tenant: Option<String>,
    pub partitioned: bool,
    /// Whose a row `t` is, as text, where no column of it says so.
    pub tenant_expression: Option<String>,
    /// What that expression reads, each as it stands after FROM, the topmost first.
    pub parents: Vec<String>,
}

impl Rule {
    /// `schema.name` as SQL.
    pub fn qualified(&self) -> String {
        format!("{}.{}", coffer_wire::quote_ident(&self.schema), coffer_wire::quote_ident(&self.name))
    }

    /// What stands after FROM: only this table for a plain one (an inheritance child has a rule of its own), the whole
    /// tree for a partitioned one.
    pub fn from_clause(&self) -> String {
        if self.partitioned { self.qualified() } else { format!("ONLY {}", self.qualified()) }
    }

    /// The uid of the tenant that all of its rows belong to.
    pub fn owner(&self, ctx: &AgentContext) -> Option<Uuid> {
        let tenant = self.tenant.as_ref().filter(|_| self.strategy == Strategy::Schema)?;
        Some(ctx.keyring.tenant_uid(ctx.source_uid, &Tenant::normal(tenant.as_str())))
    }

    /// What a reader of its rows locks, all at once: a snapshot comes after.
    pub fn lock_list(&self) -> String {
        self.parents.iter().cloned().chain([self.from_clause()]).collect::<Vec<_>>().join(", ")
    }
}

const RULES: &str = "SELECT r.relid, r.schema::text, r.name::text, r.strategy, r.class, r.tenant_column::text, \
    r.registered_xid::text, r.key_columns::text[], r.tenant::text, r.is_partitioned, r.tenant_expression, r.parents \
    FROM coffer._agent_rules() r ORDER BY r.relid";

/// Every covered table of the source.
pub async fn rules(client: &Client) -> Result<Vec<Rule>> {
    let rows = client
        .query(RULES, &[])
        .await
        .sql("cannot read which tables are covered (coffer._agent_rules)")
        .map_err(|e| e.hint("run SELECT coffer.setup_agent('ROLE') for the agent's role"))?;
    rows.iter()
        .map(|r| {
            let number = |n: i16| u8::try_from(n).unwrap_or(u8::MAX);
            let strategy: i16 = r.get(3);
            let class: i16 = r.get(4);
            let newer = |what: &str, n: i16| {
                Error::other(format!("coffer._agent_rules knows {what} {n}, this agent does not: upgrade the agent"))
            };
            let xid: String = r.get(6);
            Ok(Rule {
                relid: r.get(0),
                schema: r.get(1),
                name: r.get(2),
                strategy: Strategy::from_u8(number(strategy)).ok_or_else(|| newer("strategy", strategy))?,
                class: Class::from_u8(number(class)).ok_or_else(|| newer("class", class))?,
                tenant_column: r.get(5),
                registered_xid: xid
                    .parse()
                    .map_err(|_| Error::other(format!("'{xid}' is not a transaction id (coffer._agent_rules)")))?,
                key_columns: r.get(7),
                tenant: r.get(8),
                partitioned: r.get(9),
                tenant_expression: r.get(10),
                parents: r.get(11),
            })
        })
        .collect()
}

/// One row per column that a descriptor lists. `array_to_string` renders the one element of `attmissingval` with its
/// type's output function, whatever the type.
const COLUMNS: &str = "
WITH RECURSIVE base(attnum, oid) AS (
    SELECT a.attnum, a.atttypid FROM pg_catalog.pg_attribute a WHERE a.attrelid = $1 AND a.attnum > 0
    UNION ALL
    SELECT b.attnum, t.typbasetype FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.oid WHERE t.typtype = 'd')
SELECT a.attnum, a.attname::text, a.atttypid, pg_catalog.format_type(a.atttypid, a.atttypmod), a.atttypmod,
       a.attnotnull, a.attgenerated::text, a.attidentity::text,
       CASE WHEN a.atthasmissing THEN pg_catalog.array_to_string(a.attmissingval, '') END,
       ARRAY(SELECT e.enumlabel::text FROM base b JOIN pg_catalog.pg_enum e ON e.enumtypid = b.oid
             WHERE b.attnum = a.attnum ORDER BY e.enumsortorder)
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> 'v'
ORDER BY a.attnum";

/// The descriptor of the table as it is now, in the snapshot of the caller's transaction. `leaf` is the table itself, or
/// one leaf of the tree: its rows are described by the root's columns, in their order and with their numbers.
pub async fn describe(client: &Client, rule: &Rule, leaf: u32) -> Result<Relation> {
    let what = || format!("cannot describe {}", rule.qualified());
    let rows = client.query(COLUMNS, &[&rule.relid]).await.sql(what())?;
    let columns: Vec<Column> = rows
        .iter()
        .map(|r| {
            let (not_null, generated, identity): (bool, String, String) = (r.get(5), r.get(6), r.get(7));
            let mut flags = 0;
            if not_null {
                flags |= ColumnFlags::NOT_NULL;
            }
            if generated == "s" {
                flags |= ColumnFlags::GENERATED;
            }
            match identity.as_str() {
                "a" => flags |= ColumnFlags::IDENTITY_ALWAYS,
                "d" => flags |= ColumnFlags::IDENTITY_BY_DEFAULT,
                _ => {}
            }
            Column {
                attnum: r.get(0),
                name: r.get(1),
                type_oid: r.get(2),
                type_name: r.get(3),
                typmod: r.get(4),
                flags: ColumnFlags(flags),
                missing: r.get(8),
                enum_labels: r.get(9),
            }
        })
        .collect();
    if columns.is_empty() {
        let still: bool = client
            .query_one("SELECT EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid = $1)", &[&rule.relid])
            .await
            .sql(what())?
            .get(0);
        if !still {
            return Err(Error::new(Kind::NotFound, format!("{} no longer exists", rule.qualified())));
        }
    }
    let (key_mode, key) = match &rule.key_columns {
        None => (KeyMode::FullRow, Vec::new()),
        Some(names) => {
            let key = names
                .iter()
                .map(|n| {
                    columns.iter().position(|c| c.name == *n).map(|i| i as u16).ok_or_else(|| {
                        Error::other(format!("{}: the key column {n} is not among its columns", rule.qualified()))
                    })
                })
                .collect::<Result<Vec<u16>>>()?;
            (KeyMode::Key, key)
        }
    };
    Ok(Relation {
        relid: rule.relid,
        leaf,
        schema: rule.schema.clone(),
        name: rule.name.clone(),
        class: rule.class,
        strategy: rule.strategy,
        key_mode,
        columns,
        key,
    })
}
