//! Random statements that change rows.

use super::values::{Kind, Value, literal, text_of};
use super::{Column, Model, Owner, Role, Table};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, IteratorRandom};
use rand::{Rng, RngExt};

/// What one connection is asked to do.
#[derive(Clone, Debug)]
pub enum Step {
    Sql(String),
    /// COPY … FROM STDIN, and what goes in.
    Copy(String, String),
}

/// Keys are drawn from so many.
const KEYS: u32 = 36;

impl Model {
    /// A statement on some table; not TRUNCATE, which keeps everybody out.
    pub fn change(&self, rng: &mut StdRng) -> Step {
        let t = self.tables.values().choose(rng).expect("a table");
        match rng.random_range(0..20) {
            0..7 => self.insert(rng, t),
            7..10 => Step::Sql(self.update(rng, t)),
            10..12 => Step::Sql(self.update_key(rng, t)),
            12..15 => Step::Sql(self.move_rows(rng, t)),
            15..17 => Step::Sql(format!("DELETE FROM {} t WHERE {}", t.name(), self.some(rng, t))),
            17 => self.merge(rng, t),
            18 => self.copy(rng, t),
            _ => Step::Sql(self.replace(rng, t)),
        }
    }

    /// TRUNCATE of a table or of a partition.
    pub fn truncate(&self, rng: &mut StdRng) -> Step {
        let t = self.tables.values().choose(rng).expect("a table");
        Step::Sql(truncate(rng, t))
    }

    /// Rows to begin with.
    pub fn first_rows(&self, rng: &mut StdRng, table: usize) -> Step {
        let t = &self.tables[&table];
        let columns: Vec<_> = t.columns.iter().filter(|c| c.is_written()).collect();
        let rows: Vec<_> = (0..rng.random_range(4..16)).map(|_| self.row(rng, t, &columns)).collect();
        let conflict = if t.key.is_empty() { "" } else { " ON CONFLICT DO NOTHING" };
        Step::Sql(format!("INSERT INTO {} ({}) VALUES {}{conflict}", t.name(), list(&columns), rows.join(", ")))
    }

    pub fn tenant(&self, rng: &mut StdRng) -> String {
        self.tenants.choose(rng).expect("tenants").clone()
    }

    fn tenant_value(&self, rng: &mut StdRng, c: &Column) -> String {
        if !c.not_null && rng.random_bool(0.15) {
            return format!("NULL::{}", c.kind.sql());
        }
        format!("{}::{}", literal(&self.tenant(rng)), c.kind.sql())
    }

    /// `(…)` for the written columns.
    fn row(&self, rng: &mut StdRng, t: &Table, columns: &[&Column]) -> String {
        let link = rng.next_u32() % 12;
        let values: Vec<_> = columns.iter().map(|c| self.value(rng, t, c, link)).collect();
        format!("({})", values.join(", "))
    }

    fn value(&self, rng: &mut StdRng, t: &Table, c: &Column, link: u32) -> String {
        match c.role {
            Role::Key => self.key(c.kind, rng.random_range(0..KEYS)).sql(c.kind),
            Role::Tenant => self.tenant_value(rng, c),
            Role::Link => match self.parent_column(t, c.id) {
                Some(column) => column.replace("{n}", &link.to_string()),
                None => self.key(c.kind, rng.random_range(0..KEYS)).sql(c.kind),
            },
            _ => self.value_of(rng, c.kind).sql(c.kind),
        }
    }

    /// An expression for the parent's column of its `{n}`-th row, the same row for every column of the link.
    fn parent_column(&self, t: &Table, link: usize) -> Option<String> {
        let Owner::Parent { table, pairs } = &t.owner else { return None };
        let (p, (_, theirs)) = (&self.tables[table], pairs.iter().find(|(own, _)| *own == link)?);
        Some(format!(
            "(SELECT {} FROM {} ORDER BY {} OFFSET {{n}} LIMIT 1)",
            p.column(*theirs).name(),
            p.from(),
            p.list(&p.key)
        ))
    }

    fn insert(&self, rng: &mut StdRng, t: &Table) -> Step {
        let columns: Vec<_> = t.columns.iter().filter(|c| c.is_written()).collect();
        if t.key.is_empty() && rng.random_bool(0.3) {
            // Rows once more.
            let some = self.some(rng, t);
            let list = list(&columns);
            return Step::Sql(format!(
                "INSERT INTO {} ({list}) SELECT {list} FROM {} t WHERE {some}",
                t.name(),
                t.from()
            ));
        }
        let rows: Vec<_> = (0..rng.random_range(1..5)).map(|_| self.row(rng, t, &columns)).collect();
        let conflict = match rng.random_range(0..8) {
            0 => String::new(),
            1..3 => " ON CONFLICT DO NOTHING".into(),
            _ => self.on_conflict(rng, t),
        };
        Step::Sql(format!("INSERT INTO {} ({}) VALUES {}{conflict}", t.name(), list(&columns), rows.join(", ")))
    }

    fn on_conflict(&self, rng: &mut StdRng, t: &Table) -> String {
        let moves = rng.random_bool(0.3);
        let sets: Vec<_> = t
            .columns
            .iter()
            .filter(|c| c.role == Role::Payload || moves && c.role == Role::Tenant)
            .filter(|c| !t.key.contains(&c.id))
            .map(|c| format!("{0} = excluded.{0}", c.name()))
            .collect();
        if t.key.is_empty() || sets.is_empty() {
            return String::new();
        }
        format!(" ON CONFLICT ({}) DO UPDATE SET {}", t.list(&t.key), sets.join(", "))
    }

    /// A condition that some rows of `t` fulfil. Where nothing names a row, now and then one by its place: of several that
    /// are alike, one.
    fn some(&self, rng: &mut StdRng, t: &Table) -> String {
        if t.key.is_empty() && rng.random_bool(0.4) {
            return format!(
                "(t.tableoid, t.ctid) = (SELECT x.tableoid, x.ctid FROM {} x ORDER BY x::text OFFSET {} LIMIT 1)",
                t.from(),
                rng.random_range(0..8)
            );
        }
        let modulus = rng.random_range(2..7);
        let part = format!("(hashtext(t::text) & 1023) % {modulus} = {}", rng.random_range(0..modulus));
        match (t.tenant(), rng.random_range(0..3)) {
            (Some(c), 0) => {
                format!("{} = {} AND {part}", text_of(&format!("t.{}", c.name())), literal(&self.tenant(rng)))
            }
            _ => part,
        }
    }

    fn update(&self, rng: &mut StdRng, t: &Table) -> String {
        let mut payload: Vec<&Column> = t.columns.iter().filter(|c| c.role == Role::Payload).collect();
        while payload.len() > 1 && rng.random_bool(0.6) {
            payload.remove(rng.random_range(0..payload.len()));
        }
        let sets: Vec<_> =
            payload.iter().map(|c| format!("{} = {}", c.name(), self.value_of(rng, c.kind).sql(c.kind))).collect();
        if sets.is_empty() {
            return format!("DELETE FROM {} t WHERE {}", t.name(), self.some(rng, t));
        }
        format!("UPDATE {} t SET {} WHERE {}", t.name(), sets.join(", "), self.some(rng, t))
    }

    /// New keys: of many rows at once where they are numbers, else of one.
    fn update_key(&self, rng: &mut StdRng, t: &Table) -> String {
        let keys: Vec<_> = t.key.iter().map(|k| t.column(*k)).filter(|c| c.role == Role::Key).collect();
        let Some(c) = keys.choose(rng) else { return self.move_rows(rng, t) };
        let (name, to) = (c.name(), self.key(c.kind, rng.random_range(0..KEYS)).sql(c.kind));
        if matches!(c.kind, Kind::Int | Kind::Big) && rng.random_bool(0.6) {
            let by = rng.random_range(-20..20);
            return format!("UPDATE {} t SET {name} = {name} + {by} WHERE {}", t.name(), self.some(rng, t));
        }
        let from = self.key(c.kind, rng.random_range(0..KEYS)).sql(c.kind);
        format!("UPDATE {} t SET {name} = {to} WHERE {name} = {from}", t.name())
    }

    /// Rows that change their tenant, by their column or by another parent.
    fn move_rows(&self, rng: &mut StdRng, t: &Table) -> String {
        let condition = self.some(rng, t);
        if let Owner::Parent { pairs, .. } = &t.owner {
            let n = (rng.next_u32() % 12).to_string();
            let sets: Vec<_> = pairs
                .iter()
                .filter_map(|(own, _)| {
                    let column = self.parent_column(t, *own)?;
                    Some(format!("{} = {}", t.column(*own).name(), column.replace("{n}", &n)))
                })
                .collect();
            return format!("UPDATE {} t SET {} WHERE {condition}", t.name(), sets.join(", "));
        }
        let Some(c) = t.tenant() else { return self.update(rng, t) };
        let to = self.tenant_value(rng, c);
        let more = match t.columns.iter().filter(|c| c.role == Role::Payload).choose(rng) {
            Some(p) if rng.random_bool(0.3) => format!(", {} = {}", p.name(), self.value_of(rng, p.kind).sql(p.kind)),
            _ => String::new(),
        };
        format!("UPDATE {} t SET {} = {to}{more} WHERE {condition}", t.name(), c.name())
    }

    fn merge(&self, rng: &mut StdRng, t: &Table) -> Step {
        let columns: Vec<_> = t.columns.iter().filter(|c| c.is_written()).collect();
        let payload: Vec<_> = columns.iter().filter(|c| c.role == Role::Payload).collect();
        let Some(p) = payload.choose(rng).filter(|_| !t.key.is_empty()) else { return self.insert(rng, t) };
        let rows: Vec<_> = (0..rng.random_range(1..4)).map(|_| self.row(rng, t, &columns)).collect();
        let on: Vec<_> = t.key.iter().map(|k| t.column(*k).name()).map(|k| format!("t.{k} = v.{k}")).collect();
        let values: Vec<_> = columns.iter().map(|c| format!("v.{}", c.name())).collect();
        Step::Sql(format!(
            "MERGE INTO {} t USING (VALUES {}) v ({}) ON {} WHEN MATCHED AND (hashtext(t::text) & 3) = 0 THEN DELETE \
             WHEN MATCHED THEN UPDATE SET {} = v.{} WHEN NOT MATCHED THEN INSERT ({}) VALUES ({})",
            t.name(),
            rows.join(", "),
            list(&columns),
            on.join(" AND "),
            p.name(),
            p.name(),
            list(&columns),
            values.join(", ")
        ))
    }

    /// COPY takes no expressions, so what has a parent is without one.
    fn copy(&self, rng: &mut StdRng, t: &Table) -> Step {
        let columns: Vec<_> = t.columns.iter().filter(|c| c.is_written()).collect();
        let mut data = String::new();
        for _ in 0..rng.random_range(1..5) {
            let fields: Vec<_> = columns
                .iter()
                .map(|c| match c.role {
                    Role::Key => self.key(c.kind, rng.random_range(0..KEYS)).copy(),
                    Role::Tenant => Value::Text(self.tenant(rng)).copy(),
                    Role::Link => self.key(c.kind, rng.random_range(0..KEYS)).copy(),
                    _ => self.value_of(rng, c.kind).copy(),
                })
                .collect();
            data.push_str(&format!("{}\n", fields.join("\t")));
        }
        Step::Copy(format!("COPY {} ({}) FROM STDIN", t.name(), list(&columns)), data)
    }

    /// Rows that are deleted and come back in the same statement, with the same key and for somebody else.
    fn replace(&self, rng: &mut StdRng, t: &Table) -> String {
        let columns: Vec<_> = t.columns.iter().filter(|c| c.is_written()).collect();
        let values: Vec<_> =
            columns.iter().map(|c| if c.role == Role::Tenant { self.tenant_value(rng, c) } else { c.name() }).collect();
        format!(
            "WITH d AS (DELETE FROM {} t WHERE {} RETURNING *) INSERT INTO {} ({}) SELECT {} FROM d",
            t.from(),
            self.some(rng, t),
            t.name(),
            list(&columns),
            values.join(", ")
        )
    }
}

fn truncate(rng: &mut StdRng, t: &Table) -> String {
    let name = match t.leaves.choose(rng) {
        Some(leaf) if rng.random_bool(0.6) => leaf.qualified(),
        _ => t.name(),
    };
    let identity = if rng.random_bool(0.3) { " RESTART IDENTITY" } else { "" };
    let cascade = if rng.random_bool(0.5) { " CASCADE" } else { "" };
    format!("TRUNCATE {name}{identity}{cascade}")
}

fn list(columns: &[&Column]) -> String {
    columns.iter().map(|c| c.name()).collect::<Vec<_>>().join(", ")
}
