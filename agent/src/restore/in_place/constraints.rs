//! The constraints that a restore has to look after itself, from the catalogs.
//!
//! With `session_replication_role = replica` the server fires no foreign key trigger and no recheck of a deferrable
//! UNIQUE or EXCLUDE: orphans and duplicates would be accepted and stay. A trigger of the application fires where it is
//! enabled for that, and may write something else than what is restored. NOT NULL, CHECK and immediate UNIQUE are still the
//! server's.

use crate::error::{Error, Result};
use crate::sql::{SqlClient, SqlContext};
use std::collections::BTreeMap;

/// `a = b` in the type's own sense, wherever its operator lives; sessions have an empty search path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Equals(String);

impl Equals {
    pub fn apply(&self, left: &str, right: &str) -> String {
        format!("{left} {} {right}", self.0)
    }
}

/// `schema.operator` as the catalogs print it for `OPERATOR()`.
fn operator(schema: &str, name: &str) -> Equals {
    Equals(format!("OPERATOR({}.{name})", coffer_wire::quote_ident(schema)))
}

fn operators(list: Vec<String>) -> Vec<Equals> {
    list.iter().filter_map(|o| o.rsplit_once(' ')).map(|(s, n)| operator(s, n)).collect()
}

/// A foreign key.
#[derive(Clone, Debug)]
pub struct ForeignKey {
    pub name: String,
    pub child: u32,
    pub parent: u32,
    /// What stands after FROM.
    pub child_from: String,
    pub parent_from: String,
    pub child_columns: Vec<String>,
    pub parent_columns: Vec<String>,
    /// Parent column, child column.
    pub parent_child: Vec<Equals>,
    /// Parent column with itself.
    pub parent_parent: Vec<Equals>,
}

/// Foreign keys that lead from or to one of these tables. Those of partitions are their root's.
pub async fn foreign_keys(client: &SqlClient, relids: &[u32]) -> Result<Vec<ForeignKey>> {
    let rows = client
        .query(
            "SELECT c.conname::text, c.conrelid, c.confrelid, \
                CASE WHEN l.relkind = 'p' THEN '' ELSE 'ONLY ' END || c.conrelid::pg_catalog.regclass::text, \
                CASE WHEN p.relkind = 'p' THEN '' ELSE 'ONLY ' END || c.confrelid::pg_catalog.regclass::text, \
                ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(c.conkey) WITH ORDINALITY k(n, i) \
                    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.n ORDER BY k.i), \
                ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(c.confkey) WITH ORDINALITY k(n, i) \
                    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.n ORDER BY k.i), \
                ARRAY(SELECT n.nspname::text || ' ' || o.oprname::text \
                    FROM pg_catalog.unnest(c.conpfeqop) WITH ORDINALITY k(op, i) \
                    JOIN pg_catalog.pg_operator o ON o.oid = k.op \
                    JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace ORDER BY k.i), \
                ARRAY(SELECT n.nspname::text || ' ' || o.oprname::text \
                    FROM pg_catalog.unnest(c.conppeqop) WITH ORDINALITY k(op, i) \
                    JOIN pg_catalog.pg_operator o ON o.oid = k.op \
                    JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace ORDER BY k.i) \
             FROM pg_catalog.pg_constraint c \
             JOIN pg_catalog.pg_class l ON l.oid = c.conrelid JOIN pg_catalog.pg_class p ON p.oid = c.confrelid \
             WHERE c.contype = 'f' AND c.conparentid = 0 AND (c.conrelid = ANY ($1) OR c.confrelid = ANY ($1)) \
             ORDER BY c.oid",
            &[&relids],
        )
        .await
        .sql("cannot read the foreign keys")?;
    // A name cannot hold the operator's part: operators have no blank in theirs.
    Ok(rows
        .iter()
        .map(|r| ForeignKey {
            name: r.get(0),
            child: r.get(1),
            parent: r.get(2),
            child_from: r.get(3),
            parent_from: r.get(4),
            child_columns: r.get(5),
            parent_columns: r.get(6),
            parent_child: operators(r.get(7)),
            parent_parent: operators(r.get(8)),
        })
        .collect())
}

/// A unique index, primary key or exclusion constraint on plain columns, of all rows.
#[derive(Clone, Debug)]
pub struct Unique {
    pub columns: Vec<String>,
    /// Per column: what two rows must not both satisfy.
    pub operators: Vec<Equals>,
    /// Two NULLs are the same value.
    pub nulls_equal: bool,
    pub exclusion: bool,
}

/// The unique indexes and exclusion constraints of a table; those with expressions or a predicate are left out.
async fn uniques(client: &SqlClient, relid: u32) -> Result<Vec<Unique>> {
    // `indnullsnotdistinct` came with 15: read through JSON, so that 14 answers too.
    let rows = client
        .query(
            "SELECT ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY k(n, i) \
                    JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.n \
                    WHERE k.i <= x.indnkeyatts ORDER BY k.i), \
                ARRAY(SELECT n.nspname::text || ' ' || o.oprname::text \
                    FROM pg_catalog.unnest(i.indclass::oid[]) WITH ORDINALITY k(cls, i) \
                    JOIN pg_catalog.pg_opclass oc ON oc.oid = k.cls \
                    JOIN pg_catalog.pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3 \
                        AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype \
                    JOIN pg_catalog.pg_operator o ON o.oid = ao.amopopr \
                    JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace \
                    WHERE k.i <= x.indnkeyatts AND NOT i.indisexclusion ORDER BY k.i), \
                COALESCE((pg_catalog.to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false), \
                i.indisexclusion, \
                ARRAY(SELECT n.nspname::text || ' ' || o.oprname::text \
                    FROM pg_catalog.unnest(c.conexclop) WITH ORDINALITY k(op, i) \
                    JOIN pg_catalog.pg_operator o ON o.oid = k.op \
                    JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace ORDER BY k.i) \
             FROM pg_catalog.pg_index i CROSS JOIN LATERAL (SELECT i.indnkeyatts::int8) x \
             LEFT JOIN pg_catalog.pg_constraint c ON c.conindid = i.indexrelid AND c.contype IN ('p', 'u', 'x') \
             WHERE i.indrelid = $1 AND (i.indisunique OR i.indisexclusion) AND i.indpred IS NULL AND i.indexprs IS NULL \
             ORDER BY i.indexrelid",
            &[&relid],
        )
        .await
        .sql("cannot read the unique constraints")?;
    Ok(rows
        .iter()
        .map(|r| {
            let exclusion: bool = r.get(3);
            Unique {
                columns: r.get(0),
                operators: operators(if exclusion { r.get(4) } else { r.get(1) }),
                nulls_equal: r.get(2),
                exclusion,
            }
        })
        // An access method without a strategy for equality has no operator to ask with.
        .filter(|u| !u.columns.is_empty() && u.operators.len() == u.columns.len())
        .collect())
}

/// What a restore has to look after in its tables, by their OIDs.
#[derive(Clone, Debug, Default)]
pub struct Guards {
    pub uniques: BTreeMap<u32, Vec<Unique>>,
    pub deferrables: BTreeMap<u32, Vec<Deferrable>>,
    /// Triggers of the application that fire for a restore.
    pub triggers: BTreeMap<u32, Vec<String>>,
}

impl Guards {
    pub async fn of(client: &SqlClient, relids: &[u32]) -> Result<Self> {
        let mut guards = Self::default();
        for relid in relids {
            guards.uniques.insert(*relid, uniques(client, *relid).await?);
            guards.deferrables.insert(*relid, deferrables(client, *relid).await?);
            guards.triggers.insert(*relid, firing_triggers(client, *relid).await?);
        }
        Ok(guards)
    }
}

/// Triggers of the application, for rows that are inserted or updated, that replicas fire: `ENABLE ALWAYS`, `REPLICA`.
async fn firing_triggers(client: &SqlClient, relid: u32) -> Result<Vec<String>> {
    let rows = client
        .query(
            "SELECT DISTINCT g.tgname::text \
             FROM (SELECT $1::oid UNION SELECT relid::oid FROM pg_catalog.pg_partition_tree($1::oid::pg_catalog.regclass)) \
                r (oid) \
             JOIN pg_catalog.pg_trigger g ON g.tgrelid = r.oid \
             JOIN pg_catalog.pg_proc f ON f.oid = g.tgfoid JOIN pg_catalog.pg_namespace n ON n.oid = f.pronamespace \
             WHERE NOT g.tgisinternal AND g.tgenabled IN ('A', 'R') AND g.tgtype & 20 <> 0 AND n.nspname <> 'coffer' \
             ORDER BY 1",
            &[&relid],
        )
        .await
        .sql("cannot read the triggers")?;
    Ok(rows.iter().map(|r| r.get(0)).collect())
}

/// A UNIQUE or EXCLUDE that is deferrable: a trigger checks it, which does not fire for a restore. It may be of
/// expressions, of some rows only, and of a single partition.
#[derive(Clone, Debug)]
pub struct Deferrable {
    pub name: String,
    /// What stands after FROM.
    pub from: String,
    /// What two rows must not have alike: expressions over the table's columns.
    pub values: Vec<String>,
    pub operators: Vec<Equals>,
    /// Two NULLs are the same value.
    pub nulls_equal: bool,
    /// Which rows it is about; `None`: all.
    pub predicate: Option<String>,
}

/// The deferrable UNIQUEs and EXCLUDEs of a table and its partitions.
async fn deferrables(client: &SqlClient, relid: u32) -> Result<Vec<Deferrable>> {
    let rows = client
        .query(
            "SELECT c.conname::text, \
                CASE WHEN t.relkind = 'p' THEN '' ELSE 'ONLY ' END || t.oid::pg_catalog.regclass::text, \
                ARRAY(SELECT pg_catalog.pg_get_indexdef(i.indexrelid, k, false) \
                    FROM pg_catalog.generate_series(1, i.indnkeyatts::int4) k ORDER BY k), \
                ARRAY(SELECT n.nspname::text || ' ' || o.oprname::text \
                    FROM pg_catalog.generate_series(1, i.indnkeyatts::int4) k \
                    JOIN pg_catalog.pg_opclass oc ON oc.oid = i.indclass[k - 1] \
                    JOIN pg_catalog.pg_operator o ON o.oid = COALESCE(c.conexclop[k], (SELECT ao.amopopr \
                        FROM pg_catalog.pg_amop ao WHERE ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3 \
                        AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype)) \
                    JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace ORDER BY k), \
                COALESCE((pg_catalog.to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false), \
                pg_catalog.pg_get_expr(i.indpred, i.indrelid) \
             FROM (SELECT $1::oid UNION SELECT relid::oid FROM pg_catalog.pg_partition_tree($1::oid::pg_catalog.regclass)) \
                r (oid) \
             JOIN pg_catalog.pg_class t ON t.oid = r.oid \
             JOIN pg_catalog.pg_constraint c ON c.conrelid = t.oid \
             JOIN pg_catalog.pg_index i ON i.indexrelid = c.conindid \
             WHERE c.contype IN ('p', 'u', 'x') AND c.condeferrable AND c.conparentid = 0 ORDER BY c.oid",
            &[&relid],
        )
        .await
        .sql("cannot read the deferrable constraints")?;
    let all: Vec<Deferrable> = rows
        .iter()
        .map(|r| Deferrable {
            name: r.get(0),
            from: r.get(1),
            values: r.get(2),
            operators: operators(r.get(3)),
            nulls_equal: r.get(4),
            predicate: r.get(5),
        })
        .collect();
    match all.iter().find(|d| d.operators.len() != d.values.len()) {
        Some(d) => Err(Error::other(format!("constraint {} of {} has no operators to ask with", d.name, d.from))),
        None => Ok(all),
    }
}

/// How the key columns of a table are compared: by the operators of an index on them.
pub fn key_operators(uniques: &[Unique], key: &[String]) -> Vec<Equals> {
    let of = |column: &String| {
        uniques.iter().filter(|u| !u.exclusion).find_map(|u| {
            let i = u.columns.iter().position(|c| c == column)?;
            Some(u.operators[i].clone())
        })
    };
    key.iter().map(|c| of(c).unwrap_or_else(|| Equals("=".to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_compared_as_its_index_does() {
        let u = Unique {
            columns: vec!["tenant".into(), "id".into()],
            operators: vec![operator("Public", "="), operator("pg_catalog", "=")],
            nulls_equal: false,
            exclusion: false,
        };
        let ops = key_operators(&[u], &["id".into(), "tenant".into(), "other".into()]);
        let text: Vec<_> = ops.iter().map(|o| o.apply("a", "b")).collect();
        assert_eq!(text, ["a OPERATOR(pg_catalog.=) b", "a OPERATOR(\"Public\".=) b", "a = b"]);
    }
}
