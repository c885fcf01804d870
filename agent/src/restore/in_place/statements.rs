//! The SQL of a restore in place, one table at a time. `t` is the live table, `s` its staging.
//!
//! Every statement that touches live rows also asks whether they are the tenant's, so whatever a staged key says, no
//! other tenant's row can be changed.

use crate::restore::in_place::constraints::{Deferrable, Equals, ForeignKey, Unique, key_operators};
use crate::restore::in_place::live::LiveTable;
use crate::restore::in_place::mapping::Mapping;
use crate::restore::in_place::stage;
use coffer_wire::{ColumnFlags, quote_ident};
use std::collections::BTreeSet;

/// How many offending rows a message lists.
pub const SHOWN: usize = 20;

/// What the statements of one table are made from.
pub struct TableSql<'a> {
    table: &'a LiveTable,
    mapping: &'a Mapping,
    key: Vec<Equals>,
}

impl<'a> TableSql<'a> {
    pub fn new(table: &'a LiveTable, mapping: &'a Mapping, uniques: &[Unique]) -> Self {
        let names: Vec<String> = mapping.key.iter().map(|k| mapping.columns[*k].name.clone()).collect();
        Self { table, mapping, key: key_operators(uniques, &names) }
    }

    fn whole_row(&self) -> bool {
        self.mapping.key.is_empty()
    }

    fn from(&self) -> String {
        format!("{} t", self.table.rule.from_clause())
    }

    fn stage(&self) -> String {
        format!("{} s", stage::name(self.table.rule.relid))
    }

    /// The staged column of a live one; `None`: it is newer than the target.
    fn staged(&self, column: &str) -> Option<String> {
        self.mapping.columns.iter().position(|c| c.name == column).map(|i| format!("s.c{i}"))
    }

    fn all_staged(&self, columns: &[String]) -> Option<Vec<String>> {
        columns.iter().map(|c| self.staged(c)).collect()
    }

    /// Joins a live row of the tenant to its staged one.
    fn same_row(&self) -> String {
        self.same_key(&self.table.is_tenants)
    }

    /// The same while rows change.
    fn same_changing_row(&self) -> String {
        self.same_key(&self.is_mine())
    }

    fn same_key(&self, is_tenants: &str) -> String {
        let keys =
            self.mapping.key.iter().zip(&self.key).map(|(k, op)| {
                op.apply(&format!("t.{}", quote_ident(&self.mapping.columns[*k].name)), &format!("s.c{k}"))
            });
        keys.chain([is_tenants.to_owned()]).collect::<Vec<_>>().join(" AND ")
    }

    /// Where the tenant of a row stands in other tables, those change with the restore: which rows are the tenant's is
    /// noted before the first change, when they are locked, by their places. `None` where the row itself says it.
    pub fn note_rows(&self) -> Option<String> {
        self.table.rule.tenant_expression.as_ref()?;
        let rows = if self.whole_row() {
            format!("{} WHERE {}", self.from(), self.table.is_tenants)
        } else {
            format!("{} JOIN {} ON {} WHERE s.op IN ('U', 'D')", self.from(), self.stage(), self.same_row())
        };
        Some(format!(
            "CREATE TEMP TABLE coffer_mine_{} ON COMMIT DROP AS SELECT t.tableoid AS part, t.ctid AS place FROM {rows}",
            self.table.rule.relid
        ))
    }

    /// Whether a row is the tenant's, while rows change.
    fn is_mine(&self) -> String {
        match &self.table.rule.tenant_expression {
            None => self.table.is_tenants.clone(),
            Some(_) => format!(
                "EXISTS (SELECT FROM pg_temp.coffer_mine_{} m WHERE m.part = t.tableoid AND m.place = t.ctid)",
                self.table.rule.relid
            ),
        }
    }

    /// Locks the live rows that change, in the order of their key. Rows without a key are not locked before: they are
    /// found by their content, and the fence keeps their writers out.
    pub fn lock_rows(&self) -> Option<String> {
        if self.whole_row() {
            return None;
        }
        let order: Vec<String> = self.mapping.key.iter().map(|k| format!("s.c{k}")).collect();
        Some(format!(
            "SELECT pg_catalog.count(*) FROM (SELECT 1 FROM {} JOIN {} ON {} WHERE s.op IN ('U', 'D') \
             ORDER BY {} FOR UPDATE OF t) x",
            self.from(),
            self.stage(),
            self.same_row(),
            order.join(", ")
        ))
    }

    /// Live rows of the tenant, and how many of them were written by a transaction at or after `xmin`.
    pub fn changed_since(&self, xmin: u64) -> String {
        // Ages compare modulo 2^32; a row older than that can look young, which only costs a second comparison.
        format!(
            "SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE pg_catalog.age(t.xmin) <= \
             pg_catalog.age('{}'::pg_catalog.xid)) FROM {} WHERE {}",
            xmin as u32,
            self.from(),
            self.table.is_tenants
        )
    }

    /// Rows of other tenants that a staged row would collide with in this unique index.
    pub fn taken_by_others(&self, u: &Unique) -> Option<String> {
        if u.exclusion || self.table.is_tenants == "true" {
            return None;
        }
        let staged = self.all_staged(&u.columns)?;
        let same: Vec<String> = u
            .columns
            .iter()
            .zip(&staged)
            .zip(&u.operators)
            .map(|((c, s), op)| equal(op, &format!("t.{}", quote_ident(c)), s, u.nulls_equal))
            .collect();
        // What comes back from nobody is in nobody's way.
        let comes_back = self.orphan().map_or_else(String::new, |o| format!(" AND ({o}) IS NOT TRUE"));
        Some(format!(
            "SELECT pg_catalog.concat_ws(', ', {}) FROM {} JOIN {} ON {} WHERE s.op IN ('I', 'U') \
             AND ({}) IS NOT TRUE{comes_back} LIMIT {SHOWN}",
            shown("t", &u.columns),
            self.from(),
            self.stage(),
            same.join(" AND "),
            self.table.is_tenants
        ))
    }

    /// A live row of nobody with the key of a staged one.
    fn orphan(&self) -> Option<String> {
        if self.whole_row() || self.table.is_tenants == "true" {
            return None;
        }
        Some(self.same_key(&self.table.is_nobodys()?))
    }

    /// Removes rows of nobody that come back as the tenant's.
    pub fn take_back(&self) -> Option<String> {
        Some(format!("DELETE FROM {} USING {} WHERE s.op = 'I' AND {}", self.from(), self.stage(), self.orphan()?))
    }

    pub fn delete(&self) -> String {
        if !self.whole_row() {
            return format!(
                "DELETE FROM {} USING {} WHERE s.op = 'D' AND {}",
                self.from(),
                self.stage(),
                self.same_changing_row()
            );
        }
        let (live, staged) = (self.live_row(), self.staged_row());
        format!(
            "DELETE FROM {from} USING (SELECT h.part, h.place FROM \
                (SELECT t.tableoid AS part, t.ctid AS place, {live} AS r, \
                    pg_catalog.row_number() OVER (PARTITION BY {live}) AS n FROM {from} WHERE {mine}) h \
                JOIN (SELECT {staged} AS r, pg_catalog.count(*) AS n FROM {stage} WHERE s.op = 'D' GROUP BY 1) w \
                ON w.r = h.r AND h.n <= w.n) x \
             WHERE t.tableoid = x.part AND t.ctid = x.place AND {mine}",
            from = self.from(),
            stage = self.stage(),
            mine = self.is_mine()
        )
    }

    /// The compared columns as one text: types such as json have no `=`.
    fn live_row(&self) -> String {
        let fields: Vec<String> = self.mapping.columns.iter().map(|c| format!("t.{}", quote_ident(&c.name))).collect();
        format!("ROW({})::text", fields.join(", "))
    }

    fn staged_row(&self) -> String {
        let fields: Vec<String> = (0..self.mapping.columns.len()).map(|i| format!("s.c{i}")).collect();
        format!("ROW({})::text", fields.join(", "))
    }

    /// Staged rows that were written and are not there as they were staged.
    pub fn written_otherwise(&self) -> String {
        let staged = self.staged_row();
        format!(
            "SELECT {staged} FROM {} WHERE s.op IN ('I', 'U') AND NOT EXISTS (SELECT FROM {} WHERE {} AND {} = {staged}) \
             LIMIT {SHOWN}",
            self.stage(),
            self.from(),
            self.same_row(),
            self.live_row()
        )
    }

    /// Sets the columns in which any updated row differs; `None` when there is none to set.
    pub fn update(&self, changed: &BTreeSet<usize>) -> Option<String> {
        let set: Vec<String> = changed
            .iter()
            .filter(|i| !self.mapping.columns[**i].flags.has(ColumnFlags::GENERATED))
            .map(|i| format!("{} = s.c{i}", quote_ident(&self.mapping.columns[*i].name)))
            .collect();
        (!set.is_empty()).then(|| {
            format!(
                "UPDATE {} SET {} FROM {} WHERE s.op = 'U' AND {}",
                self.from(),
                set.join(", "),
                self.stage(),
                self.same_changing_row()
            )
        })
    }

    /// The updates as deletes and inserts, for values of a unique index that change places between rows, which an
    /// UPDATE cannot do. Columns newer than the target keep their values.
    pub fn update_by_replacing(&self) -> [String; 3] {
        let columns: Vec<(String, String)> = self
            .mapping
            .columns
            .iter()
            .enumerate()
            .filter(|(_, c)| !c.flags.has(ColumnFlags::GENERATED))
            .map(|(i, c)| (quote_ident(&c.name), format!("s.c{i}")))
            .chain(self.mapping.newer.iter().enumerate().map(|(i, n)| (quote_ident(n), format!("k.n{i}"))))
            .collect();
        let keys: String = self.mapping.key.iter().map(|k| format!(", s.c{k} AS c{k}")).collect();
        let newer: String =
            self.mapping.newer.iter().enumerate().map(|(i, n)| format!(", t.{} AS n{i}", quote_ident(n))).collect();
        let same: Vec<String> = self
            .mapping
            .key
            .iter()
            .zip(&self.key)
            .map(|(k, op)| op.apply(&format!("s.c{k}"), &format!("k.c{k}")))
            .collect();
        let keep = format!("coffer_keep_{}", self.table.rule.relid);
        [
            format!(
                "CREATE TEMP TABLE {keep} ON COMMIT DROP AS SELECT 1 AS one{keys}{newer} FROM {} JOIN {} ON {} WHERE s.op = 'U'",
                self.from(),
                self.stage(),
                self.same_changing_row()
            ),
            format!(
                "DELETE FROM {} USING {} WHERE s.op = 'U' AND {}",
                self.from(),
                self.stage(),
                self.same_changing_row()
            ),
            format!(
                "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} JOIN pg_temp.{keep} k ON {} WHERE s.op = 'U'",
                self.table.rule.qualified(),
                columns.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", "),
                columns.iter().map(|(_, v)| v.as_str()).collect::<Vec<_>>().join(", "),
                self.stage(),
                same.join(" AND ")
            ),
        ]
    }

    pub fn insert(&self) -> String {
        let columns: Vec<(usize, String)> = self
            .mapping
            .columns
            .iter()
            .enumerate()
            .filter(|(_, c)| !c.flags.has(ColumnFlags::GENERATED))
            .map(|(i, c)| (i, quote_ident(&c.name)))
            .collect();
        let table = self.table.rule.qualified();
        if columns.is_empty() {
            // Nothing to say but that there is a row: the server takes one at a time.
            return format!(
                "DO $do$ BEGIN FOR i IN 1..(SELECT pg_catalog.count(*) FROM {} WHERE s.op = 'I') LOOP \
                 INSERT INTO {table} DEFAULT VALUES; END LOOP; END $do$",
                self.stage()
            );
        }
        let names: Vec<&str> = columns.iter().map(|(_, n)| n.as_str()).collect();
        let values: Vec<String> = columns.iter().map(|(i, _)| format!("s.c{i}")).collect();
        format!(
            "INSERT INTO {table} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} WHERE s.op = 'I'",
            names.join(", "),
            values.join(", "),
            self.stage()
        )
    }

    /// Rows now in the live table that came from the staging: `FROM … WHERE …`, with the alias `t` where rows have a
    /// key, and the expressions that stand for these columns.
    fn written(&self, columns: &[String]) -> Option<(String, Vec<String>)> {
        if let Some(staged) = self.all_staged(columns) {
            return Some((format!("{} WHERE s.op IN ('I', 'U')", self.stage()), staged));
        }
        if self.whole_row() {
            return None;
        }
        let live = columns.iter().map(|c| format!("t.{}", quote_ident(c))).collect();
        Some((format!("{} JOIN {} ON {} WHERE s.op IN ('I', 'U')", self.from(), self.stage(), self.same_row()), live))
    }

    /// Keeps what other rows may refer to and is about to go: into a temporary table that ends with the transaction.
    pub fn keep_referenced(&self, fk: &ForeignKey, number: usize) -> Option<String> {
        let (from, columns): (String, Vec<String>) = if self.whole_row() {
            (format!("{} WHERE s.op = 'D'", self.stage()), self.all_staged(&fk.parent_columns)?)
        } else {
            // An update keeps the key; only what is referred to by other columns can change with it.
            let in_key =
                fk.parent_columns.iter().all(|c| self.mapping.key.iter().any(|k| self.mapping.columns[*k].name == *c));
            let ops = if in_key { "s.op = 'D'" } else { "s.op IN ('U', 'D')" };
            (
                format!("{} JOIN {} ON {} WHERE {ops}", self.from(), self.stage(), self.same_row()),
                fk.parent_columns.iter().map(|c| format!("t.{}", quote_ident(c))).collect(),
            )
        };
        let columns: String = columns.iter().enumerate().map(|(i, c)| format!(", {c} AS r{i}")).collect::<String>();
        Some(format!("CREATE TEMP TABLE coffer_gone_{number} ON COMMIT DROP AS SELECT 1 AS one{columns} FROM {from}"))
    }

    /// Locks the parents of the rows that were written, so that they stay until the commit.
    pub fn lock_parents(&self, fk: &ForeignKey) -> Option<String> {
        let (from, child) = self.written(&fk.child_columns)?;
        Some(format!(
            "SELECT pg_catalog.count(*) FROM (SELECT 1 FROM {} p WHERE EXISTS (SELECT FROM {from} AND {}) \
             FOR KEY SHARE OF p) x",
            fk.parent_from,
            matches_parent(fk, &child)
        ))
    }

    /// Rows that were written and have no parent.
    pub fn orphans(&self, fk: &ForeignKey) -> Option<String> {
        let (from, child) = self.written(&fk.child_columns)?;
        let not_null: String = child.iter().map(|c| format!(" AND {c} IS NOT NULL")).collect();
        Some(format!(
            "SELECT pg_catalog.concat_ws(', ', {}) FROM {from}{not_null} AND NOT EXISTS \
             (SELECT FROM {} p WHERE {}) LIMIT {SHOWN}",
            child.iter().map(|c| format!("{c}::text")).collect::<Vec<_>>().join(", "),
            fk.parent_from,
            matches_parent(fk, &child)
        ))
    }
}

/// Rows of the tenant that this transaction wrote and that a deferrable constraint does not let stand beside another
/// row.
pub fn duplicates(d: &Deferrable, is_tenants: &str) -> String {
    let values: Vec<String> = d.values.iter().enumerate().map(|(i, v)| format!("{v} AS v{i}")).collect();
    let rows = format!("SELECT t.tableoid AS part, t.ctid AS place, {} FROM {} t", values.join(", "), d.from);
    let counts = d.predicate.as_deref().unwrap_or("true");
    let alike: Vec<String> = (0..d.values.len())
        .map(|i| equal(&d.operators[i], &format!("a.v{i}"), &format!("b.v{i}"), d.nulls_equal))
        .collect();
    let shown: Vec<String> = (0..d.values.len()).map(|i| format!("a.v{i}::text")).collect();
    // What was written behind a savepoint has a younger transaction's number.
    let ours = "pg_catalog.age(t.xmin) <= pg_catalog.age(pg_catalog.pg_current_xact_id()::pg_catalog.xid)";
    format!(
        "SELECT pg_catalog.concat_ws(', ', {}) FROM ({rows} WHERE ({is_tenants}) AND {ours} AND ({counts})) a WHERE EXISTS \
         (SELECT FROM ({rows} WHERE ({counts})) b WHERE (b.part, b.place) <> (a.part, a.place) AND {}) LIMIT {SHOWN}",
        shown.join(", "),
        alike.join(" AND "),
    )
}

/// Rows that still refer to what [`TableSql::keep_referenced`] kept and is gone.
pub fn left_behind(fk: &ForeignKey, number: usize) -> String {
    let refers: Vec<String> = fk
        .child_columns
        .iter()
        .enumerate()
        .map(|(i, c)| fk.parent_child[i].apply(&format!("g.r{i}"), &format!("c.{}", quote_ident(c))))
        .collect();
    let still: Vec<String> = fk
        .parent_columns
        .iter()
        .enumerate()
        .map(|(i, c)| fk.parent_parent[i].apply(&format!("p.{}", quote_ident(c)), &format!("g.r{i}")))
        .collect();
    format!(
        "SELECT pg_catalog.concat_ws(', ', {}) FROM {} c JOIN pg_temp.coffer_gone_{number} g ON {} \
         WHERE NOT EXISTS (SELECT FROM {} p WHERE {}) LIMIT {SHOWN}",
        shown("c", &fk.child_columns),
        fk.child_from,
        refers.join(" AND "),
        fk.parent_from,
        still.join(" AND ")
    )
}

fn matches_parent(fk: &ForeignKey, child: &[String]) -> String {
    fk.parent_columns
        .iter()
        .zip(child)
        .zip(&fk.parent_child)
        .map(|((p, c), op)| op.apply(&format!("p.{}", quote_ident(p)), c))
        .collect::<Vec<_>>()
        .join(" AND ")
}

fn equal(op: &Equals, left: &str, right: &str, nulls_equal: bool) -> String {
    let eq = op.apply(left, right);
    if nulls_equal { format!("({eq} OR ({left} IS NULL AND {right} IS NULL))") } else { eq }
}

fn shown(alias: &str, columns: &[String]) -> String {
    columns.iter().map(|c| format!("{alias}.{}::text", quote_ident(c))).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::catalog::Rule;
    use crate::snapshot::rows::tests::column;
    use coffer_wire::{Class, KeyMode, Relation, Strategy};

    fn table(key: &[u16]) -> (LiveTable, Mapping) {
        let relation = Relation {
            relid: 9,
            leaf: 9,
            schema: "s".into(),
            name: "user".into(),
            class: Class::Data,
            strategy: Strategy::Identity,
            key_mode: if key.is_empty() { KeyMode::FullRow } else { KeyMode::Key },
            columns: vec![
                column(1, "tenant", 0),
                column(2, "id", 0),
                column(3, "g", ColumnFlags::GENERATED),
                column(4, "v", 0),
            ],
            key: key.to_vec(),
        };
        let rule = Rule {
            relid: 9,
            schema: "s".into(),
            name: "user".into(),
            strategy: Strategy::Identity,
            class: Class::Data,
            tenant_column: Some("tenant".into()),
            registered_xid: 3,
            key_columns: None,
            tenant: None,
            partitioned: false,
            tenant_expression: None,
            parents: vec![],
        };
        let mapping = Mapping::new(&relation, &relation, false).unwrap();
        (LiveTable { rule, relation, is_tenants: "t.tenant = '3'".into() }, mapping)
    }

    #[test]
    fn every_change_asks_whose_the_row_is() {
        for key in [&[0u16, 1][..], &[]] {
            let (t, m) = table(key);
            let sql = TableSql::new(&t, &m, &[]);
            assert!(sql.delete().ends_with("AND t.tenant = '3'"), "{}", sql.delete());
            if !key.is_empty() {
                let update = sql.update(&BTreeSet::from([2])).unwrap();
                assert_eq!(
                    update,
                    "UPDATE ONLY s.\"user\" t SET v = s.c2 FROM pg_temp.coffer_stage_9 s WHERE s.op = 'U' \
                     AND t.tenant = s.c0 AND t.id = s.c1 AND t.tenant = '3'"
                );
                assert!(sql.lock_rows().unwrap().contains("t.tenant = '3'"));
            }
        }
    }

    #[test]
    fn what_conflicts_with_what_was_written() {
        let equals = |column: &str| key_operators(&[], &[column.to_owned()]).remove(0);
        let d = Deferrable {
            name: "no_overlap".into(),
            from: "ONLY s.stays".into(),
            values: vec!["room".into(), "int4range(a, b)".into()],
            operators: vec![equals("room"), equals("during")],
            nulls_equal: false,
            predicate: Some("NOT cancelled".into()),
        };
        let sql = duplicates(&d, "t.tenant = '3'");
        for part in ["int4range(a, b) AS v1 FROM ONLY s.stays t", "(t.tenant = '3') AND", "a.v0 = b.v0 AND a.v1 = b.v1"]
        {
            assert!(sql.contains(part), "{part}: {sql}");
        }
        // On both sides only the rows that the constraint is about.
        assert_eq!(sql.matches("(NOT cancelled)").count(), 2, "{sql}");
    }

    #[test]
    fn generated_columns_are_not_written() {
        let (t, m) = table(&[0, 1]);
        assert_eq!(
            TableSql::new(&t, &m, &[]).insert(),
            "INSERT INTO s.\"user\" (tenant, id, v) OVERRIDING SYSTEM VALUE SELECT s.c0, s.c1, s.c2 \
             FROM pg_temp.coffer_stage_9 s WHERE s.op = 'I'"
        );
    }
}
