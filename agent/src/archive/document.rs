//! What an archive says of itself (FORMAT.md, "Archive"): JSON that a human can read once it is opened.

use crate::catalog::FullEntry;
use crate::clock::rfc3339;
use crate::repository::ObjectRef;
use crate::repository::model::LargeObjectsRead;
use crate::tenant::Tenant;
use coffer_wire::{Relation, TenantKind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Version of the document.
pub const ARCHIVE_VERSION: u32 = 1;
/// What it calls itself.
pub const WHAT: &str = "pg_coffer archive";

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    pub v: u32,
    pub what: String,
    /// For whoever finds it years later.
    pub how_to_restore: Vec<String>,
    /// The archive's own id: `backup:ID`.
    pub id: Uuid,
    pub source: Named,
    pub tenant: Whose,
    pub point: Point,
    pub made_at: String,
    /// The tenant's.
    pub tables: Vec<Table>,
    /// Those that belong to no tenant, and that its rows may refer to.
    pub reference_tables: Vec<Table>,
    pub configuration: Configuration,
    /// Every object of the archive but this one.
    pub objects: Vec<Object>,
    /// For the program: what its catalog says of it.
    pub full: FullEntry,
    /// The same of the reference data; `None`: there is none.
    pub reference: Option<FullEntry>,
    /// Its large objects, and those of the reference data.
    pub large_objects: Vec<Reading>,
}

/// Large objects as they were read at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    pub read: LargeObjectsRead,
    pub objects: Vec<ObjectRef>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    pub name: String,
    pub uid: Uuid,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whose {
    pub key: String,
    pub kind: String,
    pub uid: Uuid,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    pub lsn: String,
    /// The source's clock.
    pub time: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub relation: String,
    pub class: Option<String>,
    pub rows: u64,
    /// Empty where there are no rows.
    pub columns: Vec<Column>,
    /// Names of the key's columns; empty: the row as a whole.
    pub key: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    #[serde(rename = "type")]
    pub type_name: String,
}

/// What of the archive is configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// Tables of the class `config`: their rows are among the others.
    pub tables: Vec<String>,
    /// Of the database, each as it stands behind `ALTER DATABASE … SET`.
    pub database_settings: Vec<String>,
    /// How many sequences are noted.
    pub sequences: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    pub path: String,
    /// `rows`, `reference rows`, `manifest`, `definitions`, `roles`, `large objects`.
    pub holds: String,
    pub bytes: u64,
    pub rows: u64,
    pub sha256: String,
}

impl Object {
    pub fn of(o: &ObjectRef, holds: &str) -> Self {
        let (path, sha256) = (o.path.clone(), o.sha256.clone());
        Self { path, holds: holds.to_owned(), bytes: o.bytes, rows: o.rows, sha256 }
    }
}

impl Point {
    pub fn of(full: &FullEntry) -> Self {
        Self { lsn: full.point_lsn.to_string(), time: rfc3339(full.point_time_us) }
    }
}

/// The tables of a full as people want to read of them; `relations`: the newest descriptor of each that has rows.
pub fn tables(full: &FullEntry, relations: &BTreeMap<u32, Relation>) -> Vec<Table> {
    let table = |t: &crate::catalog::FullTable| {
        let rel = relations.get(&t.relid);
        let columns = rel.into_iter().flat_map(Relation::image_columns);
        let name = |i: &u16| rel.and_then(|r| r.columns.get(usize::from(*i))).map(|c| c.name.clone());
        Table {
            relation: t.name.clone(),
            class: t.class.clone(),
            rows: t.rows,
            columns: columns.map(|c| Column { name: c.name.clone(), type_name: c.type_name.clone() }).collect(),
            key: rel.into_iter().flat_map(|r| &r.key).filter_map(name).collect(),
        }
    };
    full.tables.iter().map(table).collect()
}

/// What to do with an archive.
pub fn how_to_restore(id: Uuid, source: &str, tenant: &Tenant) -> Vec<String> {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let whose = match tenant.kind {
        TenantKind::Normal => format!("--tenant {}", quoted(&tenant.key)),
        reserved => format!("--reserved {}", reserved.name()),
    };
    let verb = |mode: &str| {
        format!("coffer --source {} restore {whose} --to backup:{id} --mode {mode} --confirm", quoted(source))
    };
    vec![
        "This is everything of one tenant at one point. It needs this document, the objects that it names, the keyring and \
         the key-encryption key: no other backup, no log, no database."
            .to_owned(),
        "Put the objects into a store under the names that stand here, beside the repository's coffer-repository, and \
         name store and keyring in coffer.toml."
            .to_owned(),
        format!("As files: {} --target DIR", verb("files")),
        format!("As a new database: {} --target postgres://…/NEW", verb("database")),
        "Rows are lines of PostgreSQL's COPY text inside sealed containers; FORMAT.md of pg_coffer describes every byte."
            .to_owned(),
    ]
}
