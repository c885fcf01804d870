//! What tables have beside columns and keys: indexes, constraints, triggers and policies of the application's own. No row is
//! different for them, but for those that a constraint keeps out.

use super::values::Kind;
use super::{Model, Role, Table};
use coffer_wire::quote_ident;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    Index,
    Check,
    Unique,
    Trigger,
    Policy,
}

const SORTS: [Sort; 7] =
    [Sort::Index, Sort::Index, Sort::Check, Sort::Unique, Sort::Trigger, Sort::Trigger, Sort::Policy];

impl Sort {
    /// What making one is called, and dropping one.
    pub fn changes(self) -> [&'static str; 2] {
        match self {
            Self::Index => ["make an index", "drop an index"],
            Self::Check => ["make a check", "drop a check"],
            Self::Unique => ["make a unique constraint", "drop a unique constraint"],
            Self::Trigger => ["make a trigger", "drop a trigger"],
            Self::Policy => ["make a policy", "drop a policy"],
        }
    }
}

#[derive(Clone, Debug)]
pub struct Extra {
    pub sort: Sort,
    pub name: String,
}

impl Extra {
    /// ALTER, DROP or COMMENT ON, and what it is about.
    pub fn statement(&self, verb: &str, t: &Table, rest: &str) -> String {
        let name = quote_ident(&self.name);
        match (self.sort, verb) {
            (Sort::Index, _) => format!("{verb} INDEX {}.{name} {rest}", quote_ident(&t.schema)),
            (Sort::Check | Sort::Unique, "ALTER") => {
                let to = rest.strip_prefix("RENAME TO ").unwrap_or(rest);
                format!("ALTER TABLE {} RENAME CONSTRAINT {name} TO {to}", t.name())
            }
            (Sort::Check | Sort::Unique, "DROP") => format!("ALTER TABLE {} DROP CONSTRAINT {name}", t.name()),
            (Sort::Check | Sort::Unique, _) => format!("{verb} CONSTRAINT {name} ON {} {rest}", t.name()),
            (Sort::Trigger, _) => format!("{verb} TRIGGER {name} ON {} {rest}", t.name()),
            (Sort::Policy, _) => format!("{verb} POLICY {name} ON {} {rest}", t.name()),
        }
    }
}

impl Model {
    /// The statements that give a table one more; `None`: what was drawn does not fit it.
    pub(super) fn make_extra(&mut self, rng: &mut StdRng, t: &mut Table) -> Option<Vec<String>> {
        let sort = *SORTS.choose(rng)?;
        let payload: Vec<_> = t.columns.iter().filter(|c| c.role == Role::Payload).collect();
        let (column, kind) = payload.choose(rng).map(|c| (c.name(), c.kind))?;
        let (name, table) = (self.new_name("x"), t.name());
        let extra = Extra { sort, name };
        let quoted = quote_ident(&extra.name);
        let statements = match sort {
            Sort::Index => vec![index(rng, &quoted, &table, &column, kind)?],
            Sort::Check => {
                // A partitioned table has no CHECK of its own alone, and one that inherits would want the same.
                let alone = if t.is_partitioned() { "" } else { " NO INHERIT" };
                let trusted = if rng.random_bool(0.3) { " NOT VALID" } else { "" };
                let check = format!("CHECK ({column} IS NULL OR {column}::text <> 'never'){alone}{trusted}");
                vec![format!("ALTER TABLE {table} ADD CONSTRAINT {quoted} {check}")]
            }
            Sort::Unique => {
                let fits = matches!(kind, Kind::Int | Kind::Big | Kind::Bytea | Kind::Range | Kind::Timestamptz);
                if !fits || t.is_partitioned() || t.key.is_empty() || t.inherits {
                    return None;
                }
                let how = *["", "", "DEFERRABLE INITIALLY DEFERRED"].choose(rng)?;
                let nulls = if rng.random_bool(0.1) { "NULLS NOT DISTINCT " } else { "" };
                vec![format!("ALTER TABLE {table} ADD CONSTRAINT {quoted} UNIQUE {nulls}({column}) {how}")]
            }
            Sort::Trigger => {
                let when = *["BEFORE INSERT OR UPDATE", "BEFORE DELETE", "AFTER UPDATE", "AFTER INSERT"].choose(rng)?;
                let each = if when.starts_with("BEFORE") || rng.random_bool(0.5) { "ROW" } else { "STATEMENT" };
                let make =
                    format!("CREATE TRIGGER {quoted} {when} ON {table} FOR EACH {each} EXECUTE FUNCTION public.pass()");
                let fires = *["", "", "ENABLE ALWAYS", "ENABLE REPLICA", "DISABLE"].choose(rng)?;
                let set = (!fires.is_empty()).then(|| format!("ALTER TABLE {table} {fires} TRIGGER {quoted}"));
                [make].into_iter().chain(set).collect()
            }
            Sort::Policy => {
                let command = *["ALL", "SELECT", "UPDATE"].choose(rng)?;
                let make = format!("CREATE POLICY {quoted} ON {table} FOR {command} USING ({column} IS NOT NULL)");
                let on = *["ENABLE", "FORCE", "DISABLE"].choose(rng)?;
                vec![make, format!("ALTER TABLE {table} {on} ROW LEVEL SECURITY")]
            }
        };
        t.extras.push(extra);
        Some(statements)
    }
}

fn index(rng: &mut StdRng, name: &str, table: &str, column: &str, kind: Kind) -> Option<String> {
    let head = format!("CREATE INDEX {name} ON {table}");
    if kind == Kind::Outside {
        return Some(format!("{head} (md5({column}))"));
    }
    if !kind.is_indexable() {
        return None;
    }
    Some(match rng.random_range(0..3) {
        0 if !matches!(kind, Kind::Bits | Kind::Varbits) => format!("{head} USING hash ({column})"),
        1 => format!("{head} ({column} DESC NULLS LAST) WHERE {column} IS NOT NULL"),
        _ => format!("{head} ({column})"),
    })
}
