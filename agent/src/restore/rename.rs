//! A tenant under another key: the value of the tenant's column is another one in every row that goes out.
//!
//! Which column that is, the registry of the source says, or the caller. Where the tenant is behind a foreign key, or is
//! the schema or the session, no column says it and the rows go as they are.

use crate::dsn::Dsn;
use crate::error::{Error, Kind, Result};
use crate::merge::Image;
use crate::snapshot::catalog;
use crate::sql;
use coffer_wire::{Relation, Strategy, copy_text};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a caller asks for.
#[derive(Clone, Debug)]
pub struct As {
    pub key: String,
    /// The tenant's column of every table that says whose its rows are; `None`: the source is asked.
    pub column: Option<String>,
    /// The source.
    pub source: Option<Box<Dsn>>,
}

/// From one key to another.
#[derive(Clone, Debug)]
pub struct Rename {
    /// Escaped, as the rows have them.
    from: Vec<u8>,
    to: Vec<u8>,
    key: String,
    column: Option<String>,
    /// By relid.
    columns: BTreeMap<u32, String>,
}

impl Rename {
    pub(super) async fn new(from: &str, asked: &As) -> Result<Arc<Self>> {
        let mut columns = BTreeMap::new();
        if let (None, Some(dsn)) = (&asked.column, &asked.source) {
            let client = sql::connect(dsn)
                .await
                .map_err(|e| e.hint("where the source is not at hand, --tenant-column NAME says what to rewrite"))?;
            for rule in catalog::rules(&client).await? {
                columns.extend(rule.tenant_column.map(|c| (rule.relid, c)));
            }
        }
        let escaped = |s: &str| {
            let mut out = Vec::new();
            copy_text::escape_into(&mut out, s.as_bytes());
            out
        };
        Ok(Arc::new(Self {
            from: escaped(from),
            to: escaped(&asked.key),
            key: asked.key.clone(),
            column: asked.column.clone(),
            columns,
        }))
    }

    /// The other key.
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// How the rows of a table are rewritten; `None`: not at all.
    pub(super) fn of_table(&self, rel: &Relation) -> Result<Option<RenameRow>> {
        if !matches!(rel.strategy, Strategy::Identity | Strategy::Tag | Strategy::FullRow) {
            return Ok(None);
        }
        let refused = |why: &str| {
            Error::new(Kind::Refused, format!("{}: {why}", rel.qualified()))
                .code("no_tenant_column")
                .hint("say it with --tenant-column NAME")
        };
        let name = self.column.as_ref().or_else(|| self.columns.get(&rel.relid));
        let name = name.ok_or_else(|| refused("the source does not say which column is the tenant's"))?;
        let at = rel.image_columns().position(|c| c.name == *name);
        let at = at.ok_or_else(|| refused(&format!("it had no column {name} at the target, or a generated one")))?;
        let in_key = rel.key.iter().position(|k| rel.columns[usize::from(*k)].name == *name);
        Ok(Some(RenameRow { at, in_key, name: rel.qualified() }))
    }
}

/// How the rows of one table are rewritten.
pub(super) struct RenameRow {
    /// The field of the image.
    at: usize,
    in_key: Option<usize>,
    name: String,
}

impl RenameRow {
    /// The row under the new key; `out` holds it.
    pub fn row<'b>(
        &self,
        rename: &'b Rename,
        key: &[u8],
        image: &'b Image<'b>,
        out: &'b mut (Vec<u8>, Vec<u8>),
    ) -> Result<(&'b [u8], Image<'b>)> {
        if !image.is_field(self.at, &rename.from) {
            return Err(Error::new(Kind::Refused, format!("{}: a row says another tenant", self.name))
                .code("no_tenant_column")
                .hint("--tenant-column names the column that says whose the rows are"));
        }
        let (new_key, encoded) = out;
        new_key.clear();
        match self.in_key {
            None => new_key.extend_from_slice(key),
            Some(at) => {
                for (i, f) in copy_text::fields(key).enumerate() {
                    if i > 0 {
                        new_key.push(b'\t');
                    }
                    new_key.extend_from_slice(if i == at { &rename.to } else { f });
                }
            }
        }
        Ok((new_key, image.with_field(self.at, &rename.to, encoded)))
    }
}
