//! Random schemas, random changes of them and of their rows, and what is true of them at a point.
//!
//! A [`Model`] knows what is in the database as far as statements need it: tables, columns, keys, and above all whose each
//! row is. That it says by an expression of its own making, along the foreign keys it made; what the extension thinks is
//! never asked. Everything is drawn from one generator, so a seed gives the same schema and the same script.

pub mod catalogs;
pub mod changes;
pub mod ddl;
pub mod extras;
pub mod observed;
pub mod schema;
pub mod sessions;
pub mod values;

use coffer_wire::quote_ident;
use extras::Extra;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::collections::BTreeMap;
use values::{Kind, Value, literal, quoted, text_of};

/// What a column is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Key,
    Tenant,
    /// Part of the foreign key that leads to the tenant.
    Link,
    Payload,
    /// Who the session said it works for, kept by a default.
    Claim,
    /// Filled by the server and part of the image.
    Identity,
    /// Computed by the server and not part of the image.
    Generated,
}

#[derive(Clone, Debug)]
pub struct Column {
    pub id: usize,
    /// Every name it had, the present one last.
    pub names: Vec<String>,
    pub kind: Kind,
    pub role: Role,
    pub not_null: bool,
    /// What rows from before it was added have, as COPY writes it: an image of theirs may lack the column.
    pub missing: Option<String>,
    /// What stands behind the type in its definition.
    pub more: String,
}

impl Column {
    /// As SQL wants it.
    pub fn name(&self) -> String {
        quote_ident(self.names.last().expect("a name"))
    }

    /// Whether a statement may write it.
    pub fn is_written(&self) -> bool {
        matches!(self.role, Role::Key | Role::Tenant | Role::Link | Role::Payload)
    }
}

/// Whose a table's rows are.
#[derive(Clone, Debug)]
pub enum Owner {
    /// The column's.
    Column(usize),
    /// The parent row's: (own column, parent's column).
    Parent {
        table: usize,
        pairs: Vec<(usize, usize)>,
    },
    /// Of whom the session spoke when the row was inserted; this column has kept it.
    Claim(usize),
    /// This tenant's, by the schema.
    Schema(String),
    Shared,
}

#[derive(Clone, Debug)]
pub struct Leaf {
    pub schema: String,
    pub name: String,
    /// As in FOR VALUES …
    pub bounds: String,
    /// The partition that it is a partition of; none: the table itself.
    pub under: Option<String>,
    /// PARTITION BY …; empty: it has rows of its own.
    pub partition_by: String,
}

impl Leaf {
    /// As SQL wants it.
    pub fn qualified(&self) -> String {
        qualified(&self.schema, &self.name)
    }
}

/// Where a table was a partition, and of which rows.
#[derive(Clone, Debug)]
pub struct Home {
    pub table: usize,
    pub under: Option<String>,
    pub bounds: String,
}

#[derive(Clone, Debug)]
pub struct Table {
    pub id: usize,
    pub schema: String,
    /// Schemas that it was in.
    pub former_schemas: Vec<String>,
    /// Every name it had, the present one last.
    pub names: Vec<String>,
    pub columns: Vec<Column>,
    /// The columns of its unique key; none: no key.
    pub key: Vec<usize>,
    pub owner: Owner,
    /// PARTITION BY …; empty: a plain table.
    pub partition_by: String,
    pub leaves: Vec<Leaf>,
    /// Inherits, or is inherited from: its columns are not its own to alter.
    pub inherits: bool,
    /// Not in the log, so not in the backup.
    pub unlogged: bool,
    pub home: Option<Home>,
    /// More lines in its definition.
    pub constraints: Vec<String>,
    /// Statements that make it what it is, after CREATE TABLE.
    pub after: Vec<String>,
    /// Beside columns and keys.
    pub extras: Vec<Extra>,
}

impl Table {
    /// As SQL wants it.
    pub fn name(&self) -> String {
        qualified(&self.schema, self.names.last().expect("a name"))
    }

    /// As FROM wants it, for its own rows only.
    pub fn from(&self) -> String {
        format!("{}{}", if self.inherits { "ONLY " } else { "" }, self.name())
    }

    pub fn column(&self, id: usize) -> &Column {
        self.columns.iter().find(|c| c.id == id).expect("a column of the table")
    }

    pub fn column_mut(&mut self, id: usize) -> &mut Column {
        self.columns.iter_mut().find(|c| c.id == id).expect("a column of the table")
    }

    pub fn is_partitioned(&self) -> bool {
        !self.partition_by.is_empty()
    }

    pub fn tenant(&self) -> Option<&Column> {
        self.columns.iter().find(|c| c.role == Role::Tenant)
    }

    /// The names of these columns, separated by commas.
    pub fn list(&self, ids: &[usize]) -> String {
        ids.iter().map(|id| self.column(*id).name()).collect::<Vec<_>>().join(", ")
    }
}

pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", quote_ident(schema), quote_ident(name))
}

#[derive(Clone, Debug)]
pub struct Model {
    pub major: u32,
    pub tenant_kind: Kind,
    pub tenants: Vec<String>,
    /// The labels of the type `mood`.
    pub moods: Vec<String>,
    /// The attributes of the type `pair`: numbers, or texts.
    pub pair: Vec<(String, Kind)>,
    /// The constraints of the domain `short`.
    pub checks: Vec<String>,
    pub tables: BTreeMap<usize, Table>,
    /// How often the schema was changed.
    pub version: usize,
    serial: usize,
}

impl Model {
    fn next(&mut self) -> usize {
        self.serial += 1;
        self.serial
    }

    /// A name that nothing else has or will have; now and then one that wants quotes.
    fn new_name(&mut self, prefix: &str) -> String {
        let n = self.next();
        if n.is_multiple_of(7) { format!("{prefix} \"Odd\" {n}") } else { format!("{prefix}{n}") }
    }

    /// How many foreign keys lie between a table and its tenant column.
    pub fn depth(&self, table: usize) -> usize {
        match &self.tables[&table].owner {
            Owner::Parent { table, .. } => 1 + self.depth(*table),
            _ => 0,
        }
    }

    /// An expression for whose a row is, as text, NULL for nobody; `row` is what the statement calls it.
    pub fn owner_expression(&self, table: usize, row: &str) -> String {
        let t = &self.tables[&table];
        match &t.owner {
            Owner::Column(c) | Owner::Claim(c) => text_of(&format!("{row}.{}", t.column(*c).name())),
            Owner::Schema(tenant) => format!("{}::text", literal(tenant)),
            Owner::Shared => "NULL::text".into(),
            Owner::Parent { table, pairs } => {
                let (parent, up) = (&self.tables[table], format!("up_{table}"));
                let on: Vec<_> = pairs
                    .iter()
                    .map(|(own, theirs)| {
                        format!("{up}.{} = {row}.{}", parent.column(*theirs).name(), t.column(*own).name())
                    })
                    .collect();
                let whose = self.owner_expression(*table, &up);
                format!("(SELECT {whose} FROM {} {up} WHERE {})", parent.from(), on.join(" AND "))
            }
        }
    }

    /// The `n`-th of the keys of a kind.
    pub fn key(&self, kind: Kind, n: u32) -> Value {
        match kind {
            Kind::Mood => Value::Text(self.moods[n as usize % self.moods.len()].clone()),
            _ => kind.key(n),
        }
    }

    /// A value, now and then NULL.
    pub fn value_of(&self, rng: &mut StdRng, kind: Kind) -> Value {
        match kind {
            Kind::Mood | Kind::Pair if rng.random_bool(0.1) => Value::Null,
            Kind::Mood => Value::Text(self.moods.choose(rng).expect("labels").clone()),
            Kind::Pair => {
                let parts: Vec<String> = self
                    .pair
                    .iter()
                    .map(|(_, kind)| match kind.value(rng) {
                        Value::Text(t) if *kind == Kind::Text => quoted(&t),
                        Value::Text(t) => t,
                        _ => String::new(),
                    })
                    .collect();
                Value::Text(format!("({})", parts.join(",")))
            }
            _ => kind.value(rng),
        }
    }

    /// Whether a foreign key of the model leads to the table.
    pub fn has_children(&self, table: usize) -> bool {
        self.tables.values().any(|t| matches!(&t.owner, Owner::Parent { table: p, .. } if *p == table))
    }
}
