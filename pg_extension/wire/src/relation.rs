//! The relation descriptor: what a row's fields are.

use crate::{Cursor, WireError, put_bytes};
use siphasher::sip::SipHasher24;
use std::hash::Hasher;

/// What kind of data a table holds; restores can be restricted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    Data = 0,
    Config = 1,
    Accounts = 2,
    Customization = 3,
    Audit = 4,
}

impl Class {
    pub const ALL: [Self; 5] = [Self::Data, Self::Config, Self::Accounts, Self::Customization, Self::Audit];

    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Config => "config",
            Self::Accounts => "accounts",
            Self::Customization => "customization",
            Self::Audit => "audit",
        }
    }

    pub fn from_name(s: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.name() == s)
    }

    pub fn from_u8(n: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|c| *c as u8 == n)
    }
}

/// How a row's tenant is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Strategy {
    /// The tenant column is in the replica identity.
    Identity = 0,
    /// A BEFORE trigger writes a tag for DELETEs and moves.
    Tag = 1,
    /// A BEFORE trigger looks the tenant up behind a foreign key.
    Path = 2,
    /// The session's setting `coffer.tenant`.
    Session = 3,
    /// REPLICA IDENTITY FULL, for tables without a key.
    FullRow = 4,
    /// The table's schema is the tenant's.
    Schema = 5,
    /// Reference data, kept once.
    Shared = 6,
}

impl Strategy {
    pub const ALL: [Self; 7] =
        [Self::Identity, Self::Tag, Self::Path, Self::Session, Self::FullRow, Self::Schema, Self::Shared];

    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Tag => "tag",
            Self::Path => "path",
            Self::Session => "session",
            Self::FullRow => "full_row",
            Self::Schema => "schema",
            Self::Shared => "shared",
        }
    }

    pub fn from_name(s: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.name() == s)
    }

    pub fn from_u8(n: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|c| *c as u8 == n)
    }
}

/// How the rows of a table are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum KeyMode {
    /// By the key columns; at most one row per key.
    Key = 1,
    /// By the whole row; rows are a multiset.
    FullRow = 2,
}

/// Facts about a column, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ColumnFlags(pub u8);

impl ColumnFlags {
    pub const NOT_NULL: u8 = 1;
    /// Stored generated: not in the image, recomputed on restore.
    pub const GENERATED: u8 = 2;
    pub const IDENTITY_ALWAYS: u8 = 4;
    pub const IDENTITY_BY_DEFAULT: u8 = 8;

    pub fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }
}

/// One column. Dropped columns and virtual generated columns are not listed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Column {
    /// `pg_attribute.attnum`: stays when the column is renamed.
    pub attnum: i16,
    pub name: String,
    pub type_oid: u32,
    /// As `format_type` writes it, with its schema when it is not in `pg_catalog`.
    pub type_name: String,
    pub typmod: i32,
    pub flags: ColumnFlags,
    /// For a column that was added without a rewrite: the value, as text, of rows older than the column.
    pub missing: Option<String>,
    /// The labels, in order, when the type is an enum (or a domain over one).
    pub enum_labels: Vec<String>,
}

/// A relation's description at one moment. Its id is a hash of its content, so equal ids mean equal descriptors in
/// every session and every file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Relation {
    /// The table's OID. For a leaf partition this is the root's: rows are restored through the root.
    pub relid: u32,
    /// The OID of the leaf that the row was in; equal to `relid` for a table that is no partition.
    pub leaf: u32,
    pub schema: String,
    pub name: String,
    pub class: Class,
    pub strategy: Strategy,
    pub key_mode: KeyMode,
    /// In attnum order. The image holds those without [`ColumnFlags::GENERATED`], in this order.
    pub columns: Vec<Column>,
    /// Indexes into `columns`: the key, in the order of the key bytes. Empty for [`KeyMode::FullRow`].
    pub key: Vec<u16>,
}

impl Relation {
    /// The columns that the image holds, in its order.
    pub fn image_columns(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().filter(|c| !c.flags.has(ColumnFlags::GENERATED))
    }

    /// `schema.name`, quoted where SQL needs it.
    pub fn qualified(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }

    /// The descriptor's bytes, as in the RELATION frame after its id.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.columns.len() * 48);
        out.extend_from_slice(&self.relid.to_le_bytes());
        out.extend_from_slice(&self.leaf.to_le_bytes());
        put_bytes(&mut out, self.schema.as_bytes());
        put_bytes(&mut out, self.name.as_bytes());
        out.extend_from_slice(&[self.class as u8, self.strategy as u8, self.key_mode as u8]);
        out.extend_from_slice(&(self.columns.len() as u16).to_le_bytes());
        for c in &self.columns {
            out.extend_from_slice(&c.attnum.to_le_bytes());
            put_bytes(&mut out, c.name.as_bytes());
            out.extend_from_slice(&c.type_oid.to_le_bytes());
            put_bytes(&mut out, c.type_name.as_bytes());
            out.extend_from_slice(&c.typmod.to_le_bytes());
            out.push(c.flags.0);
            match &c.missing {
                None => out.push(0),
                Some(v) => {
                    out.push(1);
                    put_bytes(&mut out, v.as_bytes());
                }
            }
            out.extend_from_slice(&(c.enum_labels.len() as u32).to_le_bytes());
            for l in &c.enum_labels {
                put_bytes(&mut out, l.as_bytes());
            }
        }
        out.extend_from_slice(&(self.key.len() as u16).to_le_bytes());
        for k in &self.key {
            out.extend_from_slice(&k.to_le_bytes());
        }
        out
    }

    /// Reads what [`Relation::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut c = Cursor::new(bytes);
        let relid = c.u32("relation oid")?;
        let leaf = c.u32("leaf oid")?;
        let schema = c.str("schema name")?.to_owned();
        let name = c.str("relation name")?.to_owned();
        let class = Class::from_u8(c.u8("class")?).ok_or(c.err("known class"))?;
        let strategy = Strategy::from_u8(c.u8("strategy")?).ok_or(c.err("known strategy"))?;
        let key_mode = match c.u8("key mode")? {
            1 => KeyMode::Key,
            2 => KeyMode::FullRow,
            _ => return Err(c.err("known key mode")),
        };
        let n = c.u16("column count")?;
        let mut columns = Vec::with_capacity(usize::from(n).min(1700));
        for _ in 0..n {
            let attnum = c.u16("attnum")? as i16;
            let name = c.str("column name")?.to_owned();
            let type_oid = c.u32("type oid")?;
            let type_name = c.str("type name")?.to_owned();
            let typmod = c.u32("typmod")? as i32;
            let flags = ColumnFlags(c.u8("column flags")?);
            let missing = match c.u8("missing flag")? {
                0 => None,
                1 => Some(c.str("missing value")?.to_owned()),
                _ => return Err(c.err("missing flag")),
            };
            let labels = c.u32("label count")?;
            let mut enum_labels = Vec::new();
            for _ in 0..labels {
                enum_labels.push(c.str("enum label")?.to_owned());
            }
            columns.push(Column { attnum, name, type_oid, type_name, typmod, flags, missing, enum_labels });
        }
        let nkey = c.u16("key count")?;
        let mut key = Vec::with_capacity(usize::from(nkey).min(1700));
        for _ in 0..nkey {
            let k = c.u16("key column")?;
            if usize::from(k) >= columns.len() {
                return Err(c.err("key column within the columns"));
            }
            key.push(k);
        }
        if !c.is_empty() {
            return Err(c.err("end of the descriptor"));
        }
        Ok(Self { relid, leaf, schema, name, class, strategy, key_mode, columns, key })
    }

    /// The id of a descriptor with these bytes: SipHash-2-4 under a fixed key. It names, it does not authenticate.
    pub fn id_of(encoded: &[u8]) -> u64 {
        let mut h = SipHasher24::new_with_keys(0x636f_6666_6572_2e77, 0x6972_652e_7265_6c31);
        h.write(encoded);
        h.finish()
    }
}

/// Quotes an identifier for SQL where it needs it.
pub fn quote_ident(s: &str) -> String {
    let plain =
        s.bytes().enumerate().all(|(i, b)| b.is_ascii_lowercase() || b == b'_' || (i > 0 && b.is_ascii_digit()));
    if plain && !s.is_empty() && !RESERVED.contains(&s) {
        return s.to_owned();
    }
    format!("\"{}\"", s.replace('"', "\"\""))
}

/// Words that PostgreSQL 15 to 18 do not take as a bare column or table name (`pg_get_keywords`, catcode R and T).
const RESERVED: &[&str] = &[
    "all",
    "analyse",
    "analyze",
    "and",
    "any",
    "array",
    "as",
    "asc",
    "asymmetric",
    "authorization",
    "binary",
    "both",
    "case",
    "cast",
    "check",
    "collate",
    "collation",
    "column",
    "concurrently",
    "constraint",
    "create",
    "cross",
    "current_catalog",
    "current_date",
    "current_role",
    "current_schema",
    "current_time",
    "current_timestamp",
    "current_user",
    "default",
    "deferrable",
    "desc",
    "distinct",
    "do",
    "else",
    "end",
    "except",
    "false",
    "fetch",
    "for",
    "foreign",
    "freeze",
    "from",
    "full",
    "grant",
    "group",
    "having",
    "ilike",
    "in",
    "initially",
    "inner",
    "intersect",
    "into",
    "is",
    "isnull",
    "join",
    "lateral",
    "leading",
    "left",
    "like",
    "limit",
    "localtime",
    "localtimestamp",
    "natural",
    "not",
    "notnull",
    "null",
    "offset",
    "on",
    "only",
    "or",
    "order",
    "outer",
    "overlaps",
    "placing",
    "primary",
    "references",
    "returning",
    "right",
    "select",
    "session_user",
    "similar",
    "some",
    "symmetric",
    "system_user",
    "table",
    "tablesample",
    "then",
    "to",
    "trailing",
    "true",
    "union",
    "unique",
    "user",
    "using",
    "variadic",
    "verbose",
    "when",
    "where",
    "window",
    "with",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Relation {
        Relation {
            relid: 16384,
            leaf: 16390,
            schema: "Ünïcode \"s\"".into(),
            name: "t".into(),
            class: Class::Audit,
            strategy: Strategy::Tag,
            key_mode: KeyMode::Key,
            columns: vec![
                Column {
                    attnum: 1,
                    name: "id".into(),
                    type_oid: 20,
                    type_name: "bigint".into(),
                    typmod: -1,
                    flags: ColumnFlags(ColumnFlags::NOT_NULL),
                    missing: None,
                    enum_labels: vec![],
                },
                Column {
                    attnum: 3,
                    name: "mood".into(),
                    type_oid: 16500,
                    type_name: "public.mood".into(),
                    typmod: -1,
                    flags: ColumnFlags(0),
                    missing: Some("ok".into()),
                    enum_labels: vec!["sad".into(), "ok".into()],
                },
            ],
            key: vec![0],
        }
    }

    #[test]
    fn a_descriptor_survives_and_no_prefix_of_it_parses() {
        let r = sample();
        let bytes = r.encode();
        assert_eq!(Relation::decode(&bytes).unwrap(), r);
        for n in 0..bytes.len() {
            assert!(Relation::decode(&bytes[..n]).is_err(), "prefix of {n}");
        }
    }

    #[test]
    fn the_id_follows_the_content() {
        let a = sample();
        let mut b = sample();
        assert_eq!(Relation::id_of(&a.encode()), Relation::id_of(&b.encode()));
        b.columns[1].enum_labels.push("happy".into());
        assert_ne!(Relation::id_of(&a.encode()), Relation::id_of(&b.encode()));
    }

    #[test]
    fn identifiers_are_quoted_where_needed() {
        assert_eq!(quote_ident("abc_1"), "abc_1");
        assert_eq!(quote_ident("1a"), "\"1a\"");
        assert_eq!(quote_ident("user"), "\"user\"");
        assert_eq!(quote_ident("a\"b"), "\"a\"\"b\"");
    }
}
