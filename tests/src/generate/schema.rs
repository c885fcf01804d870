//! Random tables of every shape that has a way of its own to the tenant.

use super::values::{Kind, MOODS, literal};
use super::{Column, Leaf, Model, Owner, Role, Table};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};

/// What a new table may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The tenant is in the primary key.
    TenantInKey,
    TenantBesideKey,
    /// No primary key, but a unique index with the tenant.
    UniqueIndex,
    Keyless,
    ByTenant,
    ByRange,
    /// By range, and one of the partitions by tenant.
    SubPartitioned,
    /// The key of another table of its tenant is part of it, by a foreign key that carries the tenant along.
    TenantInForeignKey,
    Child,
    Heir,
    InSchema,
    Shared,
    Session,
    /// Left out of the backup, and said to be.
    Unlogged,
}

const SHAPES: [Shape; 20] = [
    Shape::TenantInKey,
    Shape::TenantInKey,
    Shape::TenantBesideKey,
    Shape::TenantBesideKey,
    Shape::UniqueIndex,
    Shape::Keyless,
    Shape::ByTenant,
    Shape::ByRange,
    Shape::SubPartitioned,
    Shape::TenantInForeignKey,
    Shape::Child,
    Shape::Child,
    Shape::Child,
    Shape::Child,
    Shape::Child,
    Shape::Heir,
    Shape::InSchema,
    Shape::Shared,
    Shape::Session,
    Shape::Unlogged,
];

/// Integers more often than the rest: what only integers can do is done often enough.
const KEYS: [Kind; 28] = [
    Kind::Int,
    Kind::Int,
    Kind::Int,
    Kind::Int,
    Kind::Int,
    Kind::Int,
    Kind::Int,
    Kind::Int,
    Kind::Big,
    Kind::Big,
    Kind::Text,
    Kind::Text,
    Kind::Uuid,
    Kind::Uuid,
    Kind::Varchar,
    Kind::Char,
    Kind::Short,
    Kind::Count,
    Kind::Numeric,
    Kind::Scaled,
    Kind::Float,
    Kind::Interval,
    Kind::Inet,
    Kind::Date,
    Kind::Timestamptz,
    Kind::Bytea,
    Kind::Bits,
    Kind::Mood,
];

/// Types of tenant columns, and four tenants each, as the type's output function writes them. Of two that are equal in a
/// type, one is in no partition of its own.
const TENANTS: [(Kind, [&str; 4]); 9] = [
    (Kind::Int, ["1", "2", "3", "40"]),
    (Kind::Text, ["acme", "o'neil & söhne", "a b\\c", "%"]),
    (
        Kind::Uuid,
        [
            "00000000-0000-4000-8000-00000000000a",
            "00000000-0000-4000-8000-00000000000b",
            "00000000-0000-4000-8000-00000000000c",
            "00000000-0000-4000-8000-00000000000d",
        ],
    ),
    (Kind::Varchar, ["acme", "o'neil", "a b\\c", "%"]),
    (Kind::Char, ["acme        ", "o'neil      ", "a b\\c       ", "%           "]),
    (Kind::Short, ["acme", "o'neil", "a b\\c", "%"]),
    (Kind::Inet, ["10.0.0.1", "10.0.0.0/8", "::1", "fe80::/64"]),
    (Kind::Numeric, ["1.5", "2", "30", "1.50"]),
    (Kind::Date, ["2024-02-29", "infinity", "0044-03-15 BC", "1999-12-31"]),
];

impl Model {
    /// Draws tenants and three to eight tables.
    pub fn generate(rng: &mut StdRng, major: u32) -> Self {
        let n = if rng.random_bool(0.4) { rng.random_range(0..3) } else { rng.random_range(0..TENANTS.len()) };
        let (tenant_kind, tenants) = TENANTS[n];
        let mut model = Self {
            major,
            tenant_kind,
            tenants: tenants.map(str::to_owned).to_vec(),
            moods: MOODS.map(str::to_owned).to_vec(),
            pair: vec![("a".to_owned(), Kind::Int), ("b".to_owned(), Kind::Text)],
            checks: vec!["is_short".to_owned()],
            tables: Default::default(),
            version: 0,
            serial: 0,
        };
        let first = *[Shape::TenantInKey, Shape::TenantBesideKey, Shape::ByRange].choose(rng).expect("three");
        model.add(rng, first);
        for _ in 0..rng.random_range(2..8) {
            let shape = *SHAPES.choose(rng).expect("not empty");
            model.add(rng, shape);
        }
        model
    }

    /// The script that makes its types, schemas and tables.
    pub fn script(&self) -> String {
        let labels: Vec<_> = self.moods.iter().map(|m| literal(m)).collect();
        let pair: Vec<_> = self.pair.iter().map(|(name, kind)| format!("{name} {}", kind.sql())).collect();
        let mut sql = format!(
            "CREATE TYPE public.mood AS ENUM ({});\nCREATE TYPE public.pair AS ({});\n\
             CREATE DOMAIN public.short AS text CONSTRAINT is_short CHECK (length(VALUE) <= 20);\n\
             CREATE DOMAIN public.count AS int DEFAULT 3 CHECK (VALUE > -1000);\n\
             CREATE FUNCTION public.pass() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN IF TG_OP = ''DELETE'' THEN RETURN OLD; END IF; RETURN NEW; END';\n",
            labels.join(", "),
            pair.join(", ")
        );
        for t in self.tables.values() {
            sql.push_str(&t.script());
        }
        sql
    }

    /// Adds a table of this shape, or a like one where the shape wants a table that is not there; its number.
    pub fn add(&mut self, rng: &mut StdRng, shape: Shape) -> usize {
        let id = self.next();
        let mut t = Table {
            id,
            schema: "public".into(),
            former_schemas: Vec::new(),
            names: vec![self.new_name("t")],
            columns: Vec::new(),
            key: Vec::new(),
            owner: Owner::Shared,
            partition_by: String::new(),
            leaves: Vec::new(),
            inherits: false,
            unlogged: shape == Shape::Unlogged,
            home: None,
            constraints: Vec::new(),
            after: Vec::new(),
            extras: Vec::new(),
        };
        match shape {
            Shape::Child => self.child(rng, &mut t),
            Shape::Heir => self.heir(rng, &mut t),
            Shape::TenantInForeignKey => self.in_foreign_key(rng, &mut t),
            Shape::InSchema => self.in_schema(rng, &mut t),
            Shape::Shared => self.key_of(rng, &mut t, 1),
            Shape::Session => {
                self.key_of(rng, &mut t, 1);
                let claim = self.column(&mut t, Kind::Text, Role::Claim, false);
                t.column_mut(claim).more = "DEFAULT nullif(current_setting('coffer.tenant', true), '')".into();
                t.owner = Owner::Claim(claim);
            }
            _ => self.with_tenant(rng, &mut t, shape),
        }
        if shape != Shape::Heir {
            self.payload(rng, &mut t);
        }
        if rng.random_bool(0.2) && !t.is_partitioned() && !t.inherits {
            t.columns.rotate_left(1);
        }
        for _ in 0..rng.random_range(0..3) {
            if let Some(statements) = self.make_extra(rng, &mut t) {
                t.after.extend(statements);
            }
        }
        self.tables.insert(id, t);
        id
    }

    /// Adds a column; its number.
    pub(super) fn column(&mut self, t: &mut Table, kind: Kind, role: Role, not_null: bool) -> usize {
        let id = self.next();
        let name = if role == Role::Tenant { "tenant".to_owned() } else { self.new_name("c") };
        t.columns.push(Column { id, names: vec![name], kind, role, not_null, missing: None, more: String::new() });
        id
    }

    fn key_of(&mut self, rng: &mut StdRng, t: &mut Table, columns: usize) {
        for _ in 0..columns {
            let id = self.column(t, *KEYS.choose(rng).expect("not empty"), Role::Key, true);
            t.key.push(id);
        }
    }

    fn with_tenant(&mut self, rng: &mut StdRng, t: &mut Table, shape: Shape) {
        let in_key = !matches!(shape, Shape::TenantBesideKey | Shape::Keyless)
            && (shape != Shape::ByRange || rng.random_bool(0.5));
        let tenant = self.column(t, self.tenant_kind, Role::Tenant, in_key || rng.random_bool(0.6));
        t.owner = Owner::Column(tenant);
        match shape {
            Shape::Keyless => return,
            Shape::ByRange | Shape::SubPartitioned => {
                let id = self.column(t, Kind::Int, Role::Key, true);
                t.key.push(id);
                t.partition_by = format!("RANGE ({})", t.column(id).name());
            }
            _ => {
                let columns = rng.random_range(1..3);
                self.key_of(rng, t, columns);
            }
        }
        if shape == Shape::ByTenant {
            t.partition_by = "LIST (tenant)".into();
        }
        if in_key {
            t.key.insert(if rng.random_bool(0.5) { 0 } else { t.key.len() }, tenant);
        }
        if shape == Shape::UniqueIndex {
            t.after.push(format!("CREATE UNIQUE INDEX ON {} ({})", t.name(), t.list(&t.key)));
        } else {
            t.constraints.push(format!("PRIMARY KEY ({})", t.list(&t.key)));
        }
    }

    /// Tables that others may find their tenant in.
    fn parents(&self, wanted: impl Fn(&Table) -> bool) -> Vec<usize> {
        let fits = |t: &&Table| {
            !t.key.is_empty()
                && !t.inherits
                && !t.unlogged
                && matches!(t.owner, Owner::Column(_) | Owner::Parent { .. })
                && wanted(t)
        };
        self.tables.values().filter(fits).map(|t| t.id).filter(|t| self.depth(*t) < 3).collect()
    }

    /// References to every column of the parent's key.
    fn references(&mut self, rng: &mut StdRng, t: &mut Table, parent: usize, not_null: bool) -> Vec<(usize, usize)> {
        let p = self.tables[&parent].clone();
        let pairs: Vec<_> =
            p.key.iter().map(|k| (self.column(t, p.column(*k).kind, Role::Link, not_null), *k)).collect();
        let own: Vec<_> = pairs.iter().map(|(o, _)| *o).collect();
        t.constraints.push(foreign_key(rng, t, &own, &p, &p.key, !not_null));
        pairs
    }

    fn child(&mut self, rng: &mut StdRng, t: &mut Table) {
        let parents = self.parents(|t| t.key.iter().all(|k| t.column(*k).kind.is_exact()));
        let Some(parent) = parents.choose(rng).copied() else { return self.with_tenant(rng, t, Shape::Keyless) };
        let by_parent = rng.random_bool(0.3);
        let ranged = !by_parent && rng.random_bool(0.2);
        let keyed = by_parent || ranged || rng.random_bool(0.8);
        if ranged {
            let id = self.column(t, Kind::Int, Role::Key, true);
            t.key.push(id);
            t.partition_by = format!("RANGE ({})", t.column(id).name());
        } else if keyed {
            self.key_of(rng, t, 1);
        }
        let not_null = by_parent || rng.random_bool(0.5);
        let pairs = self.references(rng, t, parent, not_null);
        if by_parent {
            t.key = pairs.iter().map(|(own, _)| *own).chain(t.key.clone()).collect();
        }
        if keyed {
            t.constraints.push(format!("PRIMARY KEY ({})", t.list(&t.key)));
        }
        t.owner = Owner::Parent { table: parent, pairs };
    }

    fn in_foreign_key(&mut self, rng: &mut StdRng, t: &mut Table) {
        let parents = self.parents(|t| t.tenant().is_some_and(|c| t.key.contains(&c.id)));
        let Some(parent) = parents.choose(rng).copied() else { return self.with_tenant(rng, t, Shape::TenantInKey) };
        let p = self.tables[&parent].clone();
        let tenant = self.column(t, self.tenant_kind, Role::Tenant, rng.random_bool(0.5));
        let own: Vec<_> = p
            .key
            .iter()
            .map(|k| {
                if p.column(*k).role == Role::Tenant {
                    tenant
                } else {
                    self.column(t, p.column(*k).kind, Role::Link, false)
                }
            })
            .collect();
        let nullable = !t.column(tenant).not_null;
        t.constraints.push(foreign_key(rng, t, &own, &p, &p.key, nullable));
        t.owner = Owner::Column(tenant);
        if rng.random_bool(0.7) {
            self.key_of(rng, t, 1);
            t.constraints.push(format!("PRIMARY KEY ({})", t.list(&t.key)));
        }
    }

    fn in_schema(&mut self, rng: &mut StdRng, t: &mut Table) {
        let n = rng.random_range(0..self.tenants.len());
        t.schema = format!("of tenant {n}");
        t.owner = Owner::Schema(self.tenants[n].clone());
        t.after.clear();
        if rng.random_bool(0.7) {
            self.key_of(rng, t, 1);
            t.constraints.push(format!("PRIMARY KEY ({})", t.list(&t.key)));
        }
    }

    /// An inheritance child of a plain table with the tenant.
    fn heir(&mut self, rng: &mut StdRng, t: &mut Table) {
        let fits = |t: &&Table| {
            !t.is_partitioned() && !t.unlogged && matches!(t.owner, Owner::Column(_)) && t.constraints.len() < 2
        };
        let able: Vec<_> = self.tables.values().filter(fits).map(|t| t.id).filter(|t| !self.has_children(*t)).collect();
        let Some(parent) = able.choose(rng).copied() else {
            self.with_tenant(rng, t, Shape::TenantBesideKey);
            return self.payload(rng, t);
        };
        let p = self.tables.get_mut(&parent).expect("just found");
        p.inherits = true;
        t.inherits = true;
        t.columns = p.columns.clone();
        t.columns.retain(|c| !matches!(c.role, Role::Identity));
        t.columns.iter_mut().for_each(|c| c.names = vec![c.names.last().expect("a name").clone()]);
        t.owner = p.owner.clone();
        t.after.push(format!("ALTER TABLE {} INHERIT {}", t.name(), p.name()));
        if !p.key.is_empty() && rng.random_bool(0.7) {
            t.key = p.key.clone();
            t.constraints.push(format!("PRIMARY KEY ({})", t.list(&t.key)));
        }
        if p.columns.iter().any(|c| c.role == Role::Identity) {
            // Without the column that it lacks it could not inherit.
            p.columns.retain(|c| c.role != Role::Identity);
        }
    }

    fn payload(&mut self, rng: &mut StdRng, t: &mut Table) {
        for _ in 0..rng.random_range(1..4) {
            let kind = Kind::payload(rng);
            let id = self.column(t, kind, Role::Payload, false);
            if rng.random_bool(0.15) {
                t.column_mut(id).more = format!("DEFAULT {}", self.value_of(rng, kind).sql(kind));
            }
            if kind == Kind::Outside {
                t.after.push(format!("ALTER TABLE {} ALTER {} SET STORAGE EXTERNAL", t.name(), t.column(id).name()));
            }
        }
        if rng.random_bool(0.15) && t.partition_by.is_empty() {
            let id = self.column(t, Kind::Int, Role::Identity, true);
            t.column_mut(id).more = "GENERATED BY DEFAULT AS IDENTITY".into();
        }
        if rng.random_bool(0.2) {
            self.generated(rng, t);
        }
        if !t.constraints.iter().any(|c| c.starts_with("PRIMARY"))
            && !t.key.is_empty()
            && t.after.iter().all(|a| !a.contains("UNIQUE"))
        {
            t.constraints.push(format!("PRIMARY KEY ({})", t.list(&t.key)));
        }
        if t.is_partitioned() {
            self.partitions(rng, t);
        }
    }

    fn generated(&mut self, rng: &mut StdRng, t: &mut Table) {
        // An identity column goes when a child inherits from the table.
        let is_number = |c: &&Column| matches!(c.kind, Kind::Int | Kind::Big) && c.role != Role::Identity;
        let Some(of) = t.columns.iter().find(is_number).map(Column::name) else {
            return;
        };
        let id = self.column(t, Kind::Big, Role::Generated, false);
        let how = if self.major >= 18 && rng.random_bool(0.5) { "VIRTUAL" } else { "STORED" };
        t.column_mut(id).more = format!("GENERATED ALWAYS AS ({of}::bigint * 2) {how}");
    }

    fn partitions(&mut self, rng: &mut StdRng, t: &mut Table) {
        let mut bounds = vec!["DEFAULT".to_owned()];
        if t.partition_by == "LIST (tenant)" {
            bounds.push(format!("FOR VALUES IN ({})", literal(&self.tenants[0])));
            bounds.push(format!("FOR VALUES IN ({}, {})", literal(&self.tenants[1]), literal(&self.tenants[2])));
        } else {
            bounds.push("FOR VALUES FROM (0) TO (12)".into());
            bounds.push("FOR VALUES FROM (12) TO (25)".into());
        }
        let tenant_in_key = t.tenant().is_some_and(|c| t.key.contains(&c.id));
        for (n, bounds) in bounds.into_iter().enumerate() {
            let name = self.new_name("p");
            let mut leaf = Leaf { schema: "public".into(), name, bounds, under: None, partition_by: String::new() };
            let name = leaf.qualified();
            if n == 1 && tenant_in_key && t.partition_by.starts_with("RANGE") {
                leaf.partition_by = "LIST (tenant)".into();
                t.after.push(format!(
                    "CREATE TABLE {name} PARTITION OF {} {} PARTITION BY {}",
                    t.name(),
                    leaf.bounds,
                    leaf.partition_by
                ));
                t.leaves.push(leaf);
                for bounds in [format!("FOR VALUES IN ({})", literal(&self.tenants[0])), "DEFAULT".into()] {
                    let below = Leaf {
                        schema: "public".into(),
                        name: self.new_name("p"),
                        bounds,
                        under: Some(name.clone()),
                        partition_by: String::new(),
                    };
                    t.after.push(format!("CREATE TABLE {} PARTITION OF {name} {}", below.qualified(), below.bounds));
                    t.leaves.push(below);
                }
                continue;
            }
            if rng.random_bool(0.3) {
                // With its columns in another order.
                t.after.push(t.loose_leaf(&name));
                t.after.push(format!("ALTER TABLE {} ATTACH PARTITION {name} {}", t.name(), leaf.bounds));
            } else {
                t.after.push(format!("CREATE TABLE {name} PARTITION OF {} {}", t.name(), leaf.bounds));
            }
            t.leaves.push(leaf);
        }
    }
}

impl Table {
    /// CREATE TABLE and what belongs to it.
    pub fn script(&self) -> String {
        let mut sql = String::new();
        if self.schema != "public" {
            sql.push_str(&format!("CREATE SCHEMA IF NOT EXISTS {};\n", coffer_wire::quote_ident(&self.schema)));
        }
        let by = if self.is_partitioned() { format!(" PARTITION BY {}", self.partition_by) } else { String::new() };
        let lines: Vec<_> = self.columns.iter().map(Column::definition).chain(self.constraints.clone()).collect();
        let unlogged = if self.unlogged { "UNLOGGED " } else { "" };
        sql.push_str(&format!("CREATE {unlogged}TABLE {} ({}){by};\n", self.name(), lines.join(", ")));
        for a in &self.after {
            sql.push_str(a);
            sql.push_str(";\n");
        }
        sql
    }

    /// A table that could become a partition of this one; its columns stand the other way round.
    pub fn loose_leaf(&self, name: &str) -> String {
        let columns: Vec<_> = self.columns.iter().rev().map(Column::definition).collect();
        format!("CREATE TABLE {name} ({})", columns.join(", "))
    }
}

impl Column {
    pub fn definition(&self) -> String {
        let not_null = if self.not_null { " NOT NULL" } else { "" };
        format!("{} {}{not_null} {}", self.name(), self.kind.sql(), self.more).trim_end().to_owned()
    }
}

fn foreign_key(rng: &mut StdRng, t: &Table, own: &[usize], parent: &Table, theirs: &[usize], nullable: bool) -> String {
    let deletes: &[&str] = if nullable {
        &["ON DELETE CASCADE", "ON DELETE SET NULL", "ON DELETE CASCADE", "ON DELETE SET DEFAULT", ""]
    } else {
        &["ON DELETE CASCADE", "ON DELETE CASCADE", ""]
    };
    // The columns have no default: they become NULL either way.
    let updates: &[&str] = if nullable {
        &["ON UPDATE CASCADE", "ON UPDATE CASCADE", "ON UPDATE SET NULL", "ON UPDATE SET DEFAULT", ""]
    } else {
        &["ON UPDATE CASCADE", "ON UPDATE CASCADE", ""]
    };
    let deferred = ["", "", "DEFERRABLE INITIALLY DEFERRED", "DEFERRABLE"];
    let parts = [
        format!("FOREIGN KEY ({}) REFERENCES {} ({})", t.list(own), parent.name(), parent.list(theirs)),
        (*deletes.choose(rng).expect("some")).to_owned(),
        (*updates.choose(rng).expect("some")).to_owned(),
        (*deferred.choose(rng).expect("some")).to_owned(),
    ];
    let _ = rng.next_u32();
    parts.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join(" ")
}
