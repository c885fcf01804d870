//! Random changes of the schema: each gives its statements, and the model as it is once they stand.

use super::changes::Step;
use super::schema::Shape;
use super::values::{Kind, literal};
use super::{Home, Leaf, Model, Owner, Role, Table};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// Every kind of change.
pub const KINDS: [&str; 34] = [
    "add a column",
    "drop a column",
    "rename a column",
    "rename a table",
    "make a table",
    "drop a table",
    "detach a partition",
    "attach a partition",
    "drop a partition",
    "change a type",
    "drop a key",
    "cover anew",
    "relabel",
    "leave or enter the log",
    "set the identity",
    "set the schema",
    "rename the tenant column",
    "vacuum",
    "reindex",
    "make an index",
    "drop an index",
    "make a check",
    "drop a check",
    "make a unique constraint",
    "drop a unique constraint",
    "make a trigger",
    "drop a trigger",
    "make a policy",
    "drop a policy",
    "rename a definition",
    "set a default",
    "comment",
    "change a composite",
    "change a domain",
];

/// A change of the schema.
pub struct Alteration {
    /// One of [`KINDS`].
    pub kind: &'static str,
    pub steps: Vec<Step>,
    /// A single statement that no transaction may enclose.
    pub bare: bool,
    pub after: Model,
}

impl Model {
    /// Draws one; `None`: what was drawn does not fit the table that was drawn.
    pub fn alteration(&self, rng: &mut StdRng) -> Option<Alteration> {
        let ids: Vec<_> = self.tables.keys().copied().collect();
        let id = *ids.choose(rng)?;
        let mut after = self.clone();
        after.version += 1;
        let (kind, sql) = match rng.random_range(0..36) {
            0..3 => ("add a column", after.add_column(rng, id)?),
            3 => ("drop a column", after.drop_column(rng, id)?),
            4 => ("rename a column", after.rename_column(rng, id)?),
            5 => ("rename a table", after.rename_table(id)?),
            6 => return self.new_table(rng),
            7 => ("drop a table", after.drop_table(id)?),
            8..10 => ("detach a partition", after.detach(rng, id)?),
            10 => ("attach a partition", after.attach()?),
            11 => ("change a type", after.retype(rng, id)?),
            12 => ("drop a key", after.drop_key(rng, id)?),
            13 => ("cover anew", after.cover_anew(id)?),
            14 => ("relabel", after.relabel(rng)),
            15 => ("leave or enter the log", after.persist_otherwise(id)?),
            16..18 => {
                // Nothing that the model knows of changes.
                after.version -= 1;
                ("set the identity", after.identity(rng, id))
            }
            18 => ("set the schema", after.set_schema(rng, id)?),
            19 => ("rename the tenant column", after.rename_tenant(id)?),
            20 => ("drop a partition", after.drop_partition(rng, id)?),
            21..25 => after.make_definition(rng, id)?,
            25..28 => after.drop_definition(rng, id)?,
            28 => ("rename a definition", after.rename_definition(rng, id)?),
            29 => ("set a default", after.set_default(rng, id)?),
            30 => ("comment", after.comment(rng, id)?),
            31 => ("change a composite", after.change_composite(rng)?),
            32..34 => ("change a domain", after.change_domain(rng)?),
            _ => {
                let (kind, how) = *[("vacuum", "VACUUM FULL"), ("reindex", "REINDEX TABLE")].choose(rng)?;
                (kind, vec![format!("{how} {}", self.tables[&id].name())])
            }
        };
        let bare = matches!(kind, "vacuum" | "reindex");
        Some(Alteration { kind, steps: sql.into_iter().map(Step::Sql).collect(), bare, after })
    }

    fn altered(&mut self, id: usize) -> Option<&mut Table> {
        self.tables.get_mut(&id).filter(|t| !t.inherits)
    }

    fn add_column(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let mut t = self.altered(id)?.clone();
        let (kind, role, more, missing) = match rng.random_range(0..8) {
            0..2 => (Kind::payload(rng), Role::Payload, "", Some("\\N")),
            6 => *[
                (Kind::Char, Role::Payload, "DEFAULT 'x'", Some("x           ")),
                (Kind::Interval, Role::Payload, "DEFAULT '1 mon -1 day'", Some("1 mon -1 days")),
                (Kind::Scaled, Role::Payload, "DEFAULT 1.5 NOT NULL", Some("1.50")),
                (Kind::Inet, Role::Payload, "DEFAULT '10.0.0.1'", Some("10.0.0.1")),
                (Kind::Float, Role::Payload, "DEFAULT '-0'", Some("-0")),
                (Kind::Numerics, Role::Payload, "DEFAULT '[0:1]={1.0,NULL}'", Some("[0:1]={1.0,NULL}")),
                (Kind::Short, Role::Payload, "DEFAULT 'd'", Some("d")),
            ]
            .choose(rng)?,
            2 => (Kind::Int, Role::Payload, "DEFAULT 7", Some("7")),
            3 => (Kind::Text, Role::Payload, "DEFAULT E'a\\tb' NOT NULL", Some("a\\tb")),
            // These rewrite the table.
            4 => (Kind::Uuid, Role::Payload, "DEFAULT gen_random_uuid()", None),
            _ => {
                let of = t.columns.iter().find(|c| matches!(c.kind, Kind::Int | Kind::Big))?.name();
                let more = format!("GENERATED ALWAYS AS ({of}::bigint + 1) STORED");
                let c = self.column(&mut t, Kind::Big, Role::Generated, false);
                return Some(self.added(t, c, &more, None));
            }
        };
        let c = self.column(&mut t, kind, role, false);
        Some(self.added(t, c, more, missing))
    }

    fn added(&mut self, mut t: Table, column: usize, more: &str, missing: Option<&str>) -> Vec<String> {
        let c = t.column_mut(column);
        c.missing = missing.map(str::to_owned);
        c.more = more.to_owned();
        let sql = format!("ALTER TABLE {} ADD COLUMN {}", t.name(), t.column(column).definition());
        self.tables.insert(t.id, t);
        vec![sql]
    }

    fn drop_column(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let t = self.altered(id)?;
        let able = |r: Role| matches!(r, Role::Payload | Role::Identity | Role::Generated);
        let ids: Vec<_> = t.columns.iter().filter(|c| able(c.role)).map(|c| c.id).collect();
        let c = *ids.choose(rng)?;
        let sql = format!("ALTER TABLE {} DROP COLUMN {}", t.name(), t.column(c).name());
        t.columns.retain(|x| x.id != c);
        Some(vec![sql])
    }

    fn rename_column(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let new = self.new_name("r");
        let t = self.altered(id)?;
        let c = t.columns.choose(rng)?.id;
        let sql = format!("ALTER TABLE {} RENAME COLUMN {} TO", t.name(), t.column(c).name());
        t.column_mut(c).names.push(new);
        Some(vec![format!("{sql} {}", t.column(c).name())])
    }

    fn rename_table(&mut self, id: usize) -> Option<Vec<String>> {
        let new = self.new_name("u");
        let t = self.altered(id)?;
        let sql = format!("ALTER TABLE {} RENAME TO {}", t.name(), coffer_wire::quote_ident(&new));
        t.names.push(new);
        Some(vec![sql])
    }

    fn new_table(&self, rng: &mut StdRng) -> Option<Alteration> {
        const NEW: [Shape; 10] = [
            Shape::TenantInKey,
            Shape::TenantBesideKey,
            Shape::Keyless,
            Shape::ByTenant,
            Shape::SubPartitioned,
            Shape::TenantInForeignKey,
            Shape::Child,
            Shape::Shared,
            Shape::Session,
            Shape::Unlogged,
        ];
        let mut after = self.clone();
        after.version += 1;
        let shape = *NEW.choose(rng)?;
        let id = after.add(rng, shape);
        let t = &after.tables[&id];
        let mut steps: Vec<_> = t.script().lines().map(|l| Step::Sql(l.trim_end_matches(';').to_owned())).collect();
        match t.owner {
            Owner::Shared => {
                steps.push(Step::Sql(format!("SELECT coffer.add_shared({}::regclass)", literal(&t.name()))))
            }
            Owner::Claim(_) => {
                steps.push(Step::Sql(format!("SELECT coffer.add_table({}::regclass)", literal(&t.name()))))
            }
            _ => {}
        }
        if rng.random_bool(0.7) {
            steps.push(after.first_rows(rng, id));
        }
        Some(Alteration { kind: "make a table", steps, bare: false, after })
    }

    fn drop_table(&mut self, id: usize) -> Option<Vec<String>> {
        let t = self.altered(id)?;
        let sql = format!("DROP TABLE {}", t.name());
        if self.has_children(id) || self.tables.len() < 3 {
            return None;
        }
        self.tables.remove(&id);
        Some(vec![sql])
    }

    /// A partition becomes a table of its own.
    fn detach(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let new = self.next();
        let t = self.altered(id)?;
        if t.leaves.is_empty() {
            return None;
        }
        let leaf = t.leaves.remove(rng.random_range(0..t.leaves.len()));
        let name = leaf.qualified();
        let sql = format!("ALTER TABLE {} DETACH PARTITION {name}", leaf.under.clone().unwrap_or_else(|| t.name()));
        let is_below = |l: &Leaf| l.under.as_ref() == Some(&name);
        let below = t.leaves.iter().filter(|l| is_below(l)).map(|l| Leaf { under: None, ..l.clone() }).collect();
        t.leaves.retain(|l| !is_below(l));
        let own = Table {
            id: new,
            schema: leaf.schema,
            former_schemas: Vec::new(),
            names: vec![leaf.name],
            partition_by: leaf.partition_by,
            leaves: below,
            extras: Vec::new(),
            home: Some(Home { table: id, under: leaf.under, bounds: leaf.bounds }),
            ..t.clone()
        };
        self.tables.insert(new, own);
        Some(vec![sql])
    }

    /// A partition goes, with its rows and what is below it.
    fn drop_partition(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let t = self.altered(id)?;
        if t.leaves.len() < 2 {
            return None;
        }
        let leaf = t.leaves.remove(rng.random_range(0..t.leaves.len()));
        let name = leaf.qualified();
        t.leaves.retain(|l| l.under.as_ref() != Some(&name));
        Some(vec![format!("DROP TABLE {name}")])
    }

    /// And comes back.
    fn attach(&mut self) -> Option<Vec<String>> {
        let (id, home) = self.tables.values().find_map(|t| Some((t.id, t.home.clone()?)))?;
        if self.has_children(id) || !self.tables.contains_key(&home.table) {
            return None;
        }
        let own = self.tables.remove(&id)?;
        let t = self.altered(home.table)?;
        let under = match home.under {
            // What it was under may be a table of its own by now, or have another name.
            Some(u) => Some(t.leaves.iter().find(|l| l.qualified() == u)?.qualified()),
            None => None,
        };
        let name = own.name();
        let sql = format!(
            "ALTER TABLE {} ATTACH PARTITION {name} {}",
            under.clone().unwrap_or_else(|| t.name()),
            home.bounds
        );
        t.leaves.push(Leaf {
            schema: own.schema.clone(),
            name: own.names.last()?.clone(),
            bounds: home.bounds,
            under,
            partition_by: own.partition_by,
        });
        t.leaves.extend(own.leaves.into_iter().map(|l| Leaf { under: Some(name.clone()), ..l }));
        Some(vec![sql])
    }

    fn retype(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let t = self.altered(id)?;
        let able = |c: &super::Column| match (c.kind, c.role) {
            (Kind::Int, Role::Payload | Role::Key) => Some(Kind::Big),
            (Kind::Big, Role::Payload) => Some(Kind::Numeric),
            (Kind::Date | Kind::Mood | Kind::Ints | Kind::Jsonb | Kind::Char | Kind::Pair, Role::Payload) => {
                Some(Kind::Text)
            }
            // No row is written anew.
            (Kind::Varchar | Kind::Short, Role::Payload | Role::Key) => Some(Kind::Text),
            (Kind::Scaled, Role::Payload) => Some(Kind::Numeric),
            (Kind::Cidr, Role::Payload) => Some(Kind::Inet),
            _ => None,
        };
        let able: Vec<_> = t.columns.iter().filter_map(|c| Some((c.id, able(c)?))).collect();
        let (c, kind) = *able.choose(rng)?;
        let was = std::mem::replace(&mut t.column_mut(c).kind, kind);
        if !matches!(was, Kind::Varchar | Kind::Short | Kind::Scaled | Kind::Cidr) {
            // All rows are written anew.
            t.columns.iter_mut().for_each(|c| c.missing = None);
        }
        let name = t.column(c).name();
        Some(vec![format!("ALTER TABLE {} ALTER {name} TYPE {} USING {name}::{}", t.name(), kind.sql(), kind.sql())])
    }

    fn drop_key(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let t = self.altered(id)?;
        let has_key = t.constraints.iter().any(|c| c.starts_with("PRIMARY"));
        if !has_key
            || t.key.is_empty()
            || matches!(t.owner, Owner::Claim(_))
            || t.home.is_some()
            || rng.random_bool(0.5)
        {
            return None;
        }
        t.key.clear();
        t.columns.iter_mut().for_each(|c| c.role = if c.role == Role::Key { Role::Payload } else { c.role });
        let name = literal(&t.name());
        Some(vec![format!(
            "DO $$BEGIN EXECUTE (SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) \
             FROM pg_constraint WHERE conrelid = {name}::regclass AND contype = 'p'); END$$"
        )])
    }

    /// A label of the type `mood` gets another name, which every row shows at once, or comes anew.
    fn relabel(&mut self, rng: &mut StdRng) -> Vec<String> {
        let new = self.new_name("mood ");
        let place = rng.random_range(0..self.moods.len());
        let old = literal(&self.moods[place]);
        if rng.random_bool(0.6) {
            let sql = format!("ALTER TYPE public.mood RENAME VALUE {old} TO {}", literal(&new));
            self.moods[place] = new;
            return vec![sql];
        }
        let sql = format!("ALTER TYPE public.mood ADD VALUE {} BEFORE {old}", literal(&new));
        self.moods.insert(place, new);
        vec![sql]
    }

    /// A table leaves the log, or comes into it.
    fn persist_otherwise(&mut self, id: usize) -> Option<Vec<String>> {
        let t = self.altered(id).filter(|t| !t.is_partitioned() && t.home.is_none())?;
        t.unlogged = !t.unlogged;
        // All rows are written anew.
        t.columns.iter_mut().for_each(|c| c.missing = None);
        Some(vec![format!("ALTER TABLE {} SET {}", t.name(), if t.unlogged { "UNLOGGED" } else { "LOGGED" })])
    }

    /// A hand at what the log says of old rows.
    fn identity(&self, rng: &mut StdRng, id: usize) -> Vec<String> {
        let t = &self.tables[&id];
        let name = match t.leaves.choose(rng) {
            Some(leaf) if rng.random_bool(0.6) => leaf.qualified(),
            _ => t.name(),
        };
        match rng.random_range(0..4) {
            0 => vec![format!("ALTER TABLE {name} REPLICA IDENTITY FULL")],
            1 => vec![format!("ALTER TABLE {name} REPLICA IDENTITY NOTHING")],
            2 => vec![format!("ALTER TABLE {name} REPLICA IDENTITY DEFAULT")],
            _ => vec![format!(
                "DO $$BEGIN EXECUTE (SELECT format('ALTER TABLE %s REPLICA IDENTITY USING INDEX %I', indrelid::regclass, \
                 relname) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE indrelid = {}::regclass \
                 AND indisunique ORDER BY indexrelid LIMIT 1); END$$",
                literal(&name)
            )],
        }
    }

    fn set_schema(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        const PLACES: [&str; 2] = ["public", "another \"place\""];
        let t = self.altered(id).filter(|t| PLACES.contains(&t.schema.as_str()) && t.home.is_none())?;
        let to = *PLACES.iter().find(|p| **p != t.schema)?;
        let quoted = coffer_wire::quote_ident(to);
        let sql = format!("ALTER TABLE {} SET SCHEMA {quoted}", t.name());
        let from = std::mem::replace(&mut t.schema, to.to_owned());
        t.former_schemas.push(from);
        let make = format!("CREATE SCHEMA IF NOT EXISTS {quoted}");
        Some(if rng.random_bool(0.9) { vec![make, sql] } else { vec![sql] })
    }

    /// The tenant column gets another name.
    fn rename_tenant(&mut self, id: usize) -> Option<Vec<String>> {
        let new = self.new_name("owner");
        let t = self.altered(id)?;
        let c = t.tenant()?.id;
        let sql = format!("ALTER TABLE {} RENAME COLUMN {} TO", t.name(), t.column(c).name());
        t.column_mut(c).names.push(new);
        Some(vec![format!("{sql} {}", t.column(c).name())])
    }

    /// Coverage ends and begins again.
    fn cover_anew(&mut self, id: usize) -> Option<Vec<String>> {
        let t = &self.tables[&id];
        let name = literal(&t.name());
        if t.unlogged {
            return None;
        }
        let again = match &t.owner {
            Owner::Column(c) => format!(", {}", literal(t.column(*c).names.last()?)),
            Owner::Parent { table, .. } => format!(", parent => {}::regclass", literal(&self.tables[table].name())),
            _ => return None,
        };
        Some(vec![
            format!("SELECT coffer.remove_table({name}::regclass)"),
            format!("SELECT coffer.add_table({name}::regclass{again})"),
        ])
    }

    fn make_definition(&mut self, rng: &mut StdRng, id: usize) -> Option<(&'static str, Vec<String>)> {
        let mut t = self.altered(id)?.clone();
        let sql = self.make_extra(rng, &mut t)?;
        let [made, _] = t.extras.last()?.sort.changes();
        self.tables.insert(id, t);
        Some((made, sql))
    }

    fn drop_definition(&mut self, rng: &mut StdRng, id: usize) -> Option<(&'static str, Vec<String>)> {
        let t = self.altered(id).filter(|t| !t.extras.is_empty())?;
        let extra = t.extras.remove(rng.random_range(0..t.extras.len()));
        let [_, dropped] = extra.sort.changes();
        Some((dropped, vec![extra.statement("DROP", t, "")]))
    }

    fn rename_definition(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let new = self.new_name("y");
        let t = self.altered(id).filter(|t| !t.extras.is_empty())?;
        let n = rng.random_range(0..t.extras.len());
        let sql = t.extras[n].statement("ALTER", t, &format!("RENAME TO {}", coffer_wire::quote_ident(&new)));
        t.extras[n].name = new;
        Some(vec![sql])
    }

    /// What a column has when nothing is said, or whether it may be empty.
    fn set_default(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let t = self.altered(id)?.clone();
        let payload: Vec<_> = t.columns.iter().filter(|c| c.role == Role::Payload).collect();
        let c = payload.choose(rng)?;
        let what = match rng.random_range(0..5) {
            0 => "DROP DEFAULT".to_owned(),
            1 => "SET NOT NULL".to_owned(),
            2 => "DROP NOT NULL".to_owned(),
            _ => format!("SET DEFAULT {}", self.value_of(rng, c.kind).sql(c.kind)),
        };
        Some(vec![format!("ALTER TABLE {} ALTER {} {what}", t.name(), c.name())])
    }

    fn comment(&mut self, rng: &mut StdRng, id: usize) -> Option<Vec<String>> {
        let t = self.altered(id)?;
        let what = match (t.columns.choose(rng), t.extras.choose(rng)) {
            (_, Some(e)) if rng.random_bool(0.3) => e.statement("COMMENT ON", t, ""),
            (Some(c), _) if rng.random_bool(0.5) => format!("COMMENT ON COLUMN {}.{}", t.name(), c.name()),
            _ => format!("COMMENT ON TABLE {}", t.name()),
        };
        let text = *["'a word'", "'it''s \u{fc}ber'", "NULL"].choose(rng)?;
        Some(vec![format!("{what} IS {text}")])
    }

    /// Every row that has one shows it at once.
    fn change_composite(&mut self, rng: &mut StdRng) -> Option<Vec<String>> {
        let new = self.new_name("a");
        let quoted = coffer_wire::quote_ident(&new);
        let place = rng.random_range(0..self.pair.len());
        let old = coffer_wire::quote_ident(&self.pair[place].0);
        let what = match rng.random_range(0..3) {
            0 if self.pair.len() > 1 => {
                self.pair.remove(place);
                format!("DROP ATTRIBUTE {old}")
            }
            1 => {
                self.pair[place].0 = new;
                format!("RENAME ATTRIBUTE {old} TO {quoted}")
            }
            _ => {
                let kind = *[Kind::Int, Kind::Text].choose(rng)?;
                self.pair.push((new, kind));
                format!("ADD ATTRIBUTE {quoted} {}", kind.sql())
            }
        };
        Some(vec![format!("ALTER TYPE public.pair {what}")])
    }

    /// What its values may be: rows that come after it may be none that were allowed before, and the other way round.
    fn change_domain(&mut self, rng: &mut StdRng) -> Option<Vec<String>> {
        let new = self.new_name("v");
        if self.checks.is_empty() || self.checks.len() < 3 && rng.random_bool(0.5) {
            let not = *["^plain", "^NULL", "^quo", "0$", "7$"].choose(rng)?;
            let sql = format!("ADD CONSTRAINT {} CHECK (VALUE !~ {})", coffer_wire::quote_ident(&new), literal(not));
            self.checks.push(new);
            return Some(vec![format!("ALTER DOMAIN public.short {sql}")]);
        }
        let gone = self.checks.remove(rng.random_range(0..self.checks.len()));
        Some(vec![format!("ALTER DOMAIN public.short DROP CONSTRAINT {}", coffer_wire::quote_ident(&gone))])
    }
}
