//! What every tenant has at a point, as COPY writes it, and how a restore differs from it.

use super::values::copy_escaped;
use super::{Model, Owner, Role, catalogs};
use crate::restored::Out;
use coffer_wire::{Lsn, quote_ident};
use futures::TryStreamExt;
use std::collections::BTreeMap;
use std::time::Instant;
use tokio_postgres::Client;

/// What the agent pins for its own sessions.
pub const PINNED: &str = "SET timezone = 'UTC'; SET datestyle = 'ISO, MDY'; SET intervalstyle = postgres; \
    SET extra_float_digits = 3; SET bytea_output = hex; SET search_path = ''";

/// Whose rows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whose {
    Tenant(String),
    Nobody,
    Everybody,
}

impl Whose {
    /// How `coffer restore` is told.
    pub fn args(&self) -> [&str; 2] {
        match self {
            Self::Tenant(t) => ["--tenant", t],
            Self::Nobody => ["--reserved", "unassigned"],
            Self::Everybody => ["--reserved", "shared"],
        }
    }
}

/// A row's fields in the order of the columns.
type Row = Vec<String>;

#[derive(Clone, Debug)]
struct ObservedColumn {
    names: Vec<String>,
    missing: Option<String>,
    /// Not part of an image.
    computed: bool,
}

#[derive(Clone, Debug)]
struct Observed {
    schemas: Vec<String>,
    names: Vec<String>,
    from: String,
    columns: Vec<ObservedColumn>,
    rows: BTreeMap<Whose, Vec<Row>>,
}

/// Every row of a database, and whose it is.
#[derive(Clone, Debug)]
pub struct Truth {
    pub name: String,
    /// The model's, then.
    pub version: usize,
    /// A restore to it may not be refused, unless retention keeps it no more.
    pub promised: bool,
    /// Its commit ends after the first of these positions, at or before the second.
    pub between: (Lsn, Lsn),
    pub taken: Instant,
    tables: BTreeMap<usize, Observed>,
    /// The tables whose definitions count, and what they are.
    defined: Vec<String>,
    definitions: Vec<String>,
}

/// A table that a restore made somewhere else than where it was.
struct Copied {
    /// As SQL wants it.
    relation: String,
    columns: Vec<String>,
    rows: Vec<Row>,
}

/// COPY … TO STDOUT; its lines.
async fn copy_out(db: &Client, query: &str) -> Result<Vec<Row>, tokio_postgres::Error> {
    let stream = db.copy_out(&format!("COPY ({query}) TO STDOUT")).await?;
    let bytes = stream.try_fold(Vec::new(), |mut all, b| async move {
        all.extend_from_slice(&b);
        Ok(all)
    });
    let text = String::from_utf8(bytes.await?).expect("the client's encoding is UTF-8");
    Ok(rows(&text))
}

fn rows(copy: &str) -> Vec<Row> {
    copy.lines().map(|l| l.split('\t').map(str::to_owned).collect()).collect()
}

/// Reads everything in the snapshot of the transaction that is open.
pub async fn observe(db: &Client, model: &Model, name: &str) -> Result<Truth, tokio_postgres::Error> {
    let mut tables = BTreeMap::new();
    for t in model.tables.values().filter(|t| !t.unlogged) {
        let mut columns = vec![model.owner_expression(t.id, "t")];
        columns.extend(t.columns.iter().map(|c| format!("t.{}", c.name())));
        let lines = copy_out(db, &format!("SELECT {} FROM {} t", columns.join(", "), t.from())).await?;
        let mut rows: BTreeMap<Whose, Vec<Row>> = BTreeMap::new();
        for mut row in lines {
            let whose = match row.remove(0) {
                _ if matches!(t.owner, Owner::Shared) => Whose::Everybody,
                n if n == "\\N" => Whose::Nobody,
                key => {
                    let known = model.tenants.iter().find(|k| copy_escaped(k) == key);
                    Whose::Tenant(known.unwrap_or_else(|| panic!("a tenant that nobody made: {key}")).clone())
                }
            };
            rows.entry(whose).or_default().push(row);
        }
        rows.values_mut().for_each(|r| r.sort_unstable());
        let columns = t.columns.iter().map(|c| ObservedColumn {
            names: c.names.clone(),
            missing: c.missing.clone(),
            computed: c.role == Role::Generated,
        });
        let observed = Observed {
            schemas: t.former_schemas.iter().chain([&t.schema]).cloned().collect(),
            names: t.names.clone(),
            from: t.from(),
            columns: columns.collect(),
            rows,
        };
        tables.insert(t.id, observed);
    }
    let defined = model.defined();
    Ok(Truth {
        name: name.to_owned(),
        version: model.version,
        promised: false,
        between: (Lsn::ZERO, Lsn::ZERO),
        taken: Instant::now(),
        tables,
        definitions: catalogs::definitions(db, &defined).await?,
        defined,
    })
}

impl Observed {
    fn of(&self, whose: &Whose) -> &[Row] {
        self.rows.get(whose).map_or(&[], Vec::as_slice)
    }
}

impl Truth {
    /// Whether somebody has a row.
    pub fn has(&self, whose: &Whose) -> bool {
        self.tables.values().any(|t| !t.of(whose).is_empty())
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.tables.values().flat_map(|t| t.rows.values()).map(Vec::len).sum()
    }

    /// What differs in the files of a restore.
    pub fn against_files(&self, whose: &Whose, out: &Out) -> Vec<String> {
        let manifest = out.manifest();
        let files = manifest["tables"].as_array().expect("tables").iter().map(|file| {
            let names = file["columns"].as_array().expect("columns").iter();
            let path = out.dir.join(file["file"].as_str().expect("file"));
            Copied {
                relation: file["relation"].as_str().expect("relation").to_owned(),
                columns: names.map(|c| c.as_str().expect("a name").to_owned()).collect(),
                rows: rows(&std::fs::read_to_string(&path).expect("a file of COPY text")),
            }
        });
        self.against_copied(whose, files.collect())
    }

    /// What differs in a schema that a restore made beside the live rows.
    pub async fn against_schema(&self, whose: &Whose, db: &Client, schema: &str) -> Vec<String> {
        // The comment of each table says which one it is a copy of.
        let sql = "SELECT c.relname::text, obj_description(c.oid), array_agg(a.attname::text ORDER BY a.attnum) \
                   FILTER (WHERE a.attnum > 0 AND NOT a.attisdropped) FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid \
                   WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = $1) AND c.relkind = 'r' GROUP BY c.oid, c.relname";
        let mut copied = Vec::new();
        for r in db.query(sql, &[&schema]).await.expect("the tables of the copy") {
            let (table, comment) = (r.get::<_, String>(0), r.get::<_, String>(1));
            let of = comment.strip_prefix("pg_coffer: ").and_then(|c| Some(c.rsplit_once(" of tenant ")?.0));
            let columns: Vec<String> = r.get::<_, Option<Vec<String>>>(2).unwrap_or_default();
            let list = columns.iter().map(|c| quote_ident(c)).collect::<Vec<_>>().join(", ");
            let query = format!("SELECT {list} FROM {}.{}", quote_ident(schema), quote_ident(&table));
            copied.push(Copied {
                relation: of.unwrap_or_else(|| panic!("{comment:?} names no table")).to_owned(),
                columns,
                rows: copy_out(db, &query).await.expect("the rows of the copy"),
            });
        }
        self.against_copied(whose, copied)
    }

    fn against_copied(&self, whose: &Whose, copied: Vec<Copied>) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut seen = Vec::new();
        for c in copied {
            let called = |t: &Observed| {
                let is = |s: &String, n: &String| format!("{}.{}", quote_ident(s), quote_ident(n)) == c.relation;
                t.schemas.iter().any(|s| t.names.iter().any(|n| is(s, n)))
            };
            match self.tables.iter().find(|(_, t)| called(t)) {
                Some((id, t)) => {
                    seen.push(*id);
                    wrong.extend(self.compare(t, whose, &c.columns, c.rows));
                }
                None if c.rows.is_empty() => {}
                None => wrong.push(format!("{}: {} rows of a table that is not there", c.relation, c.rows.len())),
            }
        }
        for (id, t) in &self.tables {
            if !seen.contains(id) && !t.of(whose).is_empty() {
                wrong.push(format!("{}: no copy, should have {} rows of {whose:?}", t.from, t.of(whose).len()));
            }
        }
        wrong
    }

    /// What differs in a database that a restore made for a tenant. `complete`: and said nothing of foreign keys that it
    /// could not have.
    pub async fn against_database(&self, whose: &Whose, db: &Client, complete: bool) -> Vec<String> {
        db.batch_execute(PINNED).await.expect("settings");
        let lines = |all: &[String]| -> Vec<String> {
            all.iter().filter(|l| complete || !l.contains(" FOREIGN KEY ")).cloned().collect()
        };
        let have = catalogs::definitions(db, &self.defined).await.expect("the catalogs");
        let mut wrong: Vec<_> =
            catalogs::differ(&format!("{} for {whose:?}", self.name), &lines(&have), &lines(&self.definitions))
                .into_iter()
                .collect();
        for t in self.tables.values() {
            let names: Vec<_> = t.columns.iter().map(|c| quote_ident(c.names.last().expect("a name"))).collect();
            match copy_out(db, &format!("SELECT {} FROM {}", names.join(", "), t.from)).await {
                Ok(mut have) => {
                    if names.is_empty() {
                        have.iter_mut().for_each(Vec::clear);
                    }
                    have.sort_unstable();
                    let everybodys = t.rows.contains_key(&Whose::Everybody);
                    let want = t.of(if everybodys { &Whose::Everybody } else { whose });
                    wrong.extend(differ(&t.from, whose, &have, want));
                }
                Err(e) => wrong.push(format!("{}: {}", t.from, e.as_db_error().map_or("lost", |e| e.message()))),
            }
        }
        wrong
    }

    /// What differs between two moments of one shape, for these.
    pub fn against(&self, whose: &Whose, now: &Truth) -> Vec<String> {
        let each = self.tables.iter().map(|(id, t)| differ(&t.from, whose, now.tables[id].of(whose), t.of(whose)));
        each.flatten().collect()
    }

    /// Images of the file's columns against the rows: columns are found by every name they had, what an image lacks is
    /// what the column gave to the rows that were there before it.
    fn compare(&self, t: &Observed, whose: &Whose, names: &[String], have: Vec<Row>) -> Option<String> {
        let places = t.columns.iter().filter(|c| !c.computed).map(|c| {
            let place = names.iter().position(|n| c.names.contains(n));
            (place, c.missing.clone(), c.names.last().expect("a name").clone())
        });
        let places: Vec<_> = places.collect();
        if let Some((_, _, name)) = places.iter().find(|(p, m, _)| p.is_none() && m.is_none())
            && !have.is_empty()
        {
            return Some(format!("{} of {whose:?} at {}: no column {name} in {names:?}", t.from, self.name));
        }
        let project = |row: &Row| -> Row {
            let field = |(place, missing, _): &(Option<usize>, Option<String>, String)| match place {
                Some(p) => row[*p].clone(),
                None => missing.clone().expect("looked at before"),
            };
            places.iter().map(field).collect()
        };
        let mut have: Vec<Row> = have.iter().map(project).collect();
        have.sort_unstable();
        let image = |row: &Row| -> Row {
            row.iter().zip(&t.columns).filter(|(_, c)| !c.computed).map(|(f, _)| f.clone()).collect()
        };
        let mut want: Vec<Row> = t.of(whose).iter().map(image).collect();
        want.sort_unstable();
        differ(&format!("{} at {}", t.from, self.name), whose, &have, &want)
    }
}

/// Two sorted multisets.
fn differ(what: &str, whose: &Whose, have: &[Row], want: &[Row]) -> Option<String> {
    if have == want {
        return None;
    }
    let beyond = |a: &[Row], b: &[Row]| {
        let mut rest = b.to_vec();
        let mut out = Vec::new();
        for r in a {
            match rest.iter().position(|x| x == r) {
                Some(p) => drop(rest.swap_remove(p)),
                None => out.push(short(r)),
            }
        }
        out.truncate(3);
        out.join(" | ")
    };
    Some(format!(
        "{what} of {whose:?}: {} rows, should be {}; missing: {}; extra: {}",
        have.len(),
        want.len(),
        beyond(want, have),
        beyond(have, want)
    ))
}

fn short(row: &Row) -> String {
    let cut = |f: &String| {
        if f.chars().count() > 60 { format!("{}…", f.chars().take(50).collect::<String>()) } else { f.clone() }
    };
    row.iter().map(cut).collect::<Vec<_>>().join(", ")
}
