//! The constraints that a restore has to look after itself, from the catalogs.
//!
//! With `session_replication_role = replica` the server fires no foreign key trigger and no recheck of a deferrable
//! UNIQUE: orphans and duplicates would be accepted and stay. NOT NULL, CHECK and immediate UNIQUE are still the
//! server's.

use crate::error::Result;
use crate::sql::{SqlClient, SqlContext};

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
    let operators = |list: Vec<String>| -> Vec<Equals> {
        list.iter().filter_map(|o| o.rsplit_once(' ')).map(|(s, n)| operator(s, n)).collect()
    };
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

/// A unique index, primary key or exclusion constraint on plain columns.
#[derive(Clone, Debug)]
pub struct Unique {
    pub name: String,
    pub columns: Vec<String>,
    /// Per column: what two rows must not both satisfy.
    pub operators: Vec<Equals>,
    /// Two NULLs are the same value.
    pub nulls_equal: bool,
    /// Checked by a trigger that does not fire for a restore.
    pub deferrable: bool,
    pub exclusion: bool,
}

/// The unique indexes and exclusion constraints of a table; those with expressions or a predicate are left out.
pub async fn uniques(client: &SqlClient, relid: u32) -> Result<Vec<Unique>> {
    // `indnullsnotdistinct` came with 15: read through JSON, so that 14 answers too.
    let rows = client
        .query(
            "SELECT i.indexrelid::pg_catalog.regclass::text, \
                ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY k(n, i) \
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
                COALESCE(c.condeferrable, false), i.indisexclusion, \
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
    let operators = |list: Vec<String>| -> Vec<Equals> {
        list.iter().filter_map(|o| o.rsplit_once(' ')).map(|(s, n)| operator(s, n)).collect()
    };
    Ok(rows
        .iter()
        .map(|r| {
            let exclusion: bool = r.get(5);
            Unique {
                name: r.get(0),
                columns: r.get(1),
                operators: operators(if exclusion { r.get(6) } else { r.get(2) }),
                nulls_equal: r.get(3),
                deferrable: r.get(4),
                exclusion,
            }
        })
        // An access method without a strategy for equality has no operator to ask with.
        .filter(|u| !u.columns.is_empty() && u.operators.len() == u.columns.len())
        .collect())
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
            name: "t_pkey".into(),
            columns: vec!["tenant".into(), "id".into()],
            operators: vec![operator("Public", "="), operator("pg_catalog", "=")],
            nulls_equal: false,
            deferrable: false,
            exclusion: false,
        };
        let ops = key_operators(&[u], &["id".into(), "tenant".into(), "other".into()]);
        let text: Vec<_> = ops.iter().map(|o| o.apply("a", "b")).collect();
        assert_eq!(text, ["a OPERATOR(pg_catalog.=) b", "a OPERATOR(\"Public\".=) b", "a = b"]);
    }
}
