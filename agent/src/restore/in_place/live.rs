//! The tables as they are now: which of their rows are the tenant's, and those rows in the order of their key.

use crate::error::{Error, Kind, Result};
use crate::merge::{Cursor, Scratch, Sorted, Sorter};
use crate::restore::in_place::diff::LiveRows;
use crate::restore::in_place::mapping::Mapping;
use crate::restore::keys::RowKey;
use crate::snapshot::catalog::{self, Rule};
use crate::snapshot::read::Lines;
use crate::sql::{SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::{Column, Relation, Strategy, TenantKind, quote_ident};
use futures::StreamExt;
use tokio_postgres::SimpleQueryMessage;

/// `int2 int4 int8 oid uuid bool date`: types whose `=` holds exactly when the texts are equal.
const EXACT_TYPES: [u32; 7] = [21, 23, 20, 26, 2950, 16, 1082];

/// A covered table that can hold rows of the tenant.
#[derive(Clone, Debug)]
pub struct LiveTable {
    pub rule: Rule,
    pub relation: Relation,
    /// True for the tenant's rows of a table with the alias `t`.
    pub is_tenants: String,
}

impl LiveTable {
    /// True for rows of nobody: those of a deleted parent, say, whose foreign key was set to NULL. `None`: every row is
    /// somebody's.
    pub fn is_nobodys(&self) -> Option<String> {
        let whose = match (&self.rule.tenant_expression, &self.rule.tenant_column) {
            (Some(e), _) => e.clone(),
            (None, Some(c)) => format!("t.{}", quote_ident(c)),
            (None, None) => return None,
        };
        Some(format!("{whose} IS NULL"))
    }
}

impl LiveTable {
    /// For messages: `schema.name`.
    pub fn name(&self) -> String {
        self.rule.qualified()
    }

    /// Counts the tenant's rows.
    pub fn count(&self) -> String {
        format!("SELECT pg_catalog.count(*) FROM {} t WHERE {}", self.rule.from_clause(), self.is_tenants)
    }
}

/// A value as a literal; sessions have `standard_conforming_strings` on.
pub fn literal(s: &str) -> String {
    format!("'{}'", s.replace('\'', "''"))
}

/// Every covered table that can hold rows of the tenant and that `wanted` takes. Not inside a transaction: a tenant key
/// that a column's type does not take is found out by an error.
pub async fn tables(
    client: &SqlClient,
    tenant: &Tenant,
    wanted: &(dyn Fn(&Rule) -> bool + Sync),
) -> Result<Vec<LiveTable>> {
    let mut out = Vec::new();
    for rule in catalog::rules(client).await?.into_iter().filter(|r| wanted(r)) {
        let relation = catalog::describe(client, &rule, rule.relid).await?;
        if let Some(is_tenants) = condition(client, &rule, &relation, tenant).await? {
            out.push(LiveTable { rule, relation, is_tenants });
        }
    }
    Ok(out)
}

/// The first of the tables in which the tenant has a row.
pub async fn any_with_rows<'t>(
    client: &SqlClient,
    tables: &'t [LiveTable],
) -> Result<Option<&'t LiveTable>, tokio_postgres::Error> {
    for t in tables {
        let asked = format!("SELECT EXISTS (SELECT FROM {} t WHERE {})", t.rule.from_clause(), t.is_tenants);
        if client.query_one(&asked, &[]).await?.get(0) {
            return Ok(Some(t));
        }
    }
    Ok(None)
}

/// Restricts a table to the tenant's rows with these keys: no other row is read, compared, or changed. Not inside a
/// transaction.
pub async fn only(client: &SqlClient, table: &mut LiveTable, keys: &[RowKey], tenant: &Tenant) -> Result<()> {
    let rel = &table.relation;
    let mut any = Vec::new();
    for values in keys.iter().map(|k| k.values(rel, table.rule.tenant_column.as_deref(), tenant)) {
        let mut all = Vec::new();
        // The tenant's column is known here, so there is one way to read a key.
        for (k, value) in rel.key.iter().zip(values?.into_iter().next().unwrap_or_default()) {
            let column = &rel.columns[usize::from(*k)];
            as_the_server_writes_it(client, column, &value).await?;
            all.push(equals(column, &literal(&value)));
        }
        any.push(format!("({})", all.join(" AND ")));
    }
    table.is_tenants = format!("({} AND ({}))", table.is_tenants, any.join(" OR "));
    Ok(())
}

/// Rows at the target are found by the text of their key. In another spelling they would not be, while `=` finds the
/// live row: it would be taken for one too many.
async fn as_the_server_writes_it(client: &SqlClient, column: &Column, value: &str) -> Result<()> {
    let (name, type_name) = (&column.name, &column.type_name);
    let w = written(client, column, value).await.map_err(|e| {
        let what = format!("--where-key: {} is no value of {name} ({type_name})", literal(value));
        match e.code() {
            Some(c) if c.code().starts_with("22") => Error::usage(what),
            _ => crate::sql::sql_error(e, what),
        }
    })?;
    if w == value {
        return Ok(());
    }
    Err(Error::usage(format!("--where-key: {} is not how {name} ({type_name}) is written", literal(value)))
        .hint(format!("as the server writes it: {w}")))
}

/// A value of a column's type as the server writes it.
async fn written(client: &SqlClient, column: &Column, value: &str) -> Result<String, tokio_postgres::Error> {
    let rows = client.simple_query(&format!("SELECT {}::{}", literal(value), column.type_name)).await?;
    let text = rows.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(r) => Some(r.get(0).unwrap_or_default().to_owned()),
        _ => None,
    });
    Ok(text.unwrap_or_default())
}

/// True where the column's text is the literal's.
fn equals(column: &Column, value: &str) -> String {
    let at = format!("t.{}", quote_ident(&column.name));
    if EXACT_TYPES.contains(&column.type_oid) {
        return format!("{at} = {value}");
    }
    // `=` can be wider than the text (1.0 = 1.00), but it is what an index answers.
    format!("({at} = {value} AND pg_catalog.concat({at}) COLLATE \"C\" = {value})")
}

/// `None`: no row of the table can be the tenant's.
async fn condition(client: &SqlClient, rule: &Rule, relation: &Relation, tenant: &Tenant) -> Result<Option<String>> {
    // Reference data is everybody's, and nothing else is.
    match (rule.strategy == Strategy::Shared, tenant.kind == TenantKind::Shared) {
        (true, true) => return Ok(Some("true".to_owned())),
        (false, false) => {}
        _ => return Ok(None),
    }
    if let Some(owner) = &rule.tenant {
        return Ok((tenant.kind == TenantKind::Normal && *owner == tenant.key).then(|| "true".to_owned()));
    }
    if let Some(whose) = &rule.tenant_expression {
        return match tenant.kind {
            TenantKind::Unassigned => Ok(Some(format!("{whose} IS NULL"))),
            TenantKind::Normal => Ok(client
                .query_one("SELECT coffer._agent_condition($1::oid::regclass, $2)", &[&rule.relid, &tenant.key])
                .await
                .sql(format!("cannot ask which rows of {} are the tenant's", rule.qualified()))?
                .get(0)),
            k => Err(Error::new(
                Kind::Refused,
                format!("rows of the tenant ({}) have no place in a live table", k.name()),
            )),
        };
    }
    let Some(name) = &rule.tenant_column else {
        return Err(Error::new(
            Kind::Refused,
            format!(
                "{}: its rows have no tenant column, so a restore in place cannot tell them apart",
                rule.qualified()
            ),
        )
        .hint("restore to a schema or to files, or leave the table out with --table"));
    };
    let Some(column) = relation.columns.iter().find(|c| c.name == *name) else {
        return Err(Error::other(format!("{}: its tenant column {name} does not exist", rule.qualified())));
    };
    let at = format!("t.{}", quote_ident(name));
    match tenant.kind {
        TenantKind::Unassigned => return Ok(Some(format!("{at} IS NULL"))),
        TenantKind::Normal => {}
        k => {
            return Err(Error::new(
                Kind::Refused,
                format!("rows of the tenant ({}) have no place in a live table", k.name()),
            ));
        }
    }
    let value = literal(&tenant.key);
    // A key that the column's type does not take is no row's tenant.
    match written(client, column, &tenant.key).await {
        // The tenant is the text: '007' is not the tenant of a row with the number 7.
        Ok(w) if EXACT_TYPES.contains(&column.type_oid) && w != tenant.key => Ok(None),
        Ok(_) => Ok(Some(equals(column, &value))),
        Err(e) => match e.code() {
            Some(c) if c.code().starts_with("22") => Ok(None),
            _ => Err(crate::sql::sql_error(e, format!("cannot compare the tenant column of {}", rule.qualified()))),
        },
    }
}

/// The tenant's live rows of one table, sorted. `memory`: bytes for the sort.
pub async fn read(
    client: &SqlClient,
    table: &LiveTable,
    mapping: &Mapping,
    scratch: &Scratch,
    memory: usize,
) -> Result<Sorted> {
    let columns = mapping.columns.iter().map(|c| format!("t.{}", quote_ident(&c.name))).collect::<Vec<_>>().join(", ");
    let statement =
        format!("COPY (SELECT {columns} FROM {} t WHERE {}) TO STDOUT", table.rule.from_clause(), table.is_tenants);
    let what = || format!("cannot read {}", table.name());
    let stream = client.copy_out(&statement).await.sql(what())?;
    let mut stream = std::pin::pin!(stream);
    let (mut sorter, mut lines, mut key) = (Sorter::new(scratch, memory), Lines::default(), Vec::new());
    while let Some(chunk) = stream.next().await {
        let mut broken = Ok(());
        lines.feed(&chunk.sql(what())?, |line| {
            if broken.is_ok() {
                broken = mapping.key_of(line, &mut key).and_then(|()| sorter.push(&key, line));
            }
        });
        broken?;
    }
    sorter.finish()
}

/// Sorted rows to join with.
pub struct SortedRows(Box<dyn Cursor + Send>);

impl SortedRows {
    pub fn new(sorted: Sorted) -> Result<Self> {
        Ok(Self(sorted.into_cursor()?))
    }
}

impl LiveRows for SortedRows {
    fn next(&mut self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        let Some((k, v)) = self.0.entry() else { return Ok(None) };
        let row = (k.to_vec(), v.to_vec());
        self.0.advance()?;
        Ok(Some(row))
    }
}
