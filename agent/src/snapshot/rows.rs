//! How a table's rows are asked for, and how a line of the answer becomes tenant, key and image.
//!
//! COPY text is what the output plugin writes too, so a base row needs no conversion: its image is the line as it came,
//! its key and its tenant are fields of it. Only a key or tenant column that is generated is asked for behind the image.

use crate::error::{Error, Kind, Result};
use crate::snapshot::catalog::Rule;
use crate::tenant::Tenant;
use coffer_wire::{KeyMode, Relation, Strategy, TenantKind, copy_text, quote_ident};
use std::borrow::Cow;

/// Whose a row is.
#[derive(Clone, Debug)]
enum Owner {
    /// Every row of the table has this tenant.
    Fixed(Tenant),
    /// The field with this number.
    Field(usize),
}

/// The way to read one table, or one leaf of a partitioned one.
#[derive(Clone, Debug)]
pub struct RowShape {
    /// What is selected of a table with the alias `t`: the columns and, where no column is the tenant, an expression for it.
    pub select: Vec<String>,
    /// The columns among them, which come first.
    pub columns: Vec<String>,
    /// How many fields of a line are the image; those behind are extras.
    image_fields: usize,
    extras: bool,
    /// Numbers of the fields that are the key, in its order; empty: rows are told apart by the image.
    key: Vec<usize>,
    owner: Owner,
}

/// A line, cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut<'a> {
    pub kind: TenantKind,
    /// The tenant's key: UTF-8, but for bytes of a database without an encoding.
    pub tenant: Cow<'a, [u8]>,
    pub image: &'a [u8],
}

impl RowShape {
    /// How to read the rows of the table that `rule` covers and `relation` describes.
    pub fn new(rule: &Rule, relation: &Relation) -> Result<Self> {
        let mut names: Vec<String> = relation.image_columns().map(|c| c.name.clone()).collect();
        let image_fields = names.len();
        let mut field = |name: &str| match names.iter().position(|n| n == name) {
            Some(i) => i,
            None => {
                names.push(name.to_owned());
                names.len() - 1
            }
        };
        let key = match relation.key_mode {
            KeyMode::FullRow => Vec::new(),
            KeyMode::Key => relation.key.iter().map(|k| field(&relation.columns[usize::from(*k)].name)).collect(),
        };
        let mut expression = None;
        let owner = match (rule.strategy, &rule.tenant_column, &rule.tenant) {
            (Strategy::Shared, _, _) => Owner::Fixed(Tenant::reserved(TenantKind::Shared)),
            (Strategy::Schema, _, Some(t)) => Owner::Fixed(Tenant::normal(t.as_str())),
            (_, Some(c), _) => Owner::Field(field(c)),
            (_, None, _) if rule.tenant_expression.is_some() => {
                expression.clone_from(&rule.tenant_expression);
                Owner::Field(names.len())
            }
            (s, None, _) => {
                return Err(Error::new(
                    Kind::Other,
                    format!(
                        "{}: the strategy {} names no tenant column, so its rows cannot be read by tenant",
                        rule.qualified(),
                        s.name()
                    ),
                ));
            }
        };
        let select: Vec<String> = names.iter().map(|n| format!("t.{}", quote_ident(n))).chain(expression).collect();
        Ok(Self { extras: select.len() > image_fields, select, columns: names, image_fields, key, owner })
    }

    /// Cuts a line (without its newline). `key` is cleared and filled.
    pub fn cut<'a>(&'a self, line: &'a [u8], key: &mut Vec<u8>) -> Result<Cut<'a>> {
        key.clear();
        let wanted = self.extras || !self.key.is_empty() || matches!(self.owner, Owner::Field(_));
        let fields = Fields::of(line, wanted);
        for (i, n) in self.key.iter().enumerate() {
            if i > 0 {
                key.push(b'\t');
            }
            key.extend_from_slice(fields.get(*n)?);
        }
        let image = match (self.extras, self.image_fields) {
            (false, _) => line,
            (true, 0) => &line[..0],
            (true, n) => &line[..fields.end(n - 1)?],
        };
        let (kind, tenant) = match &self.owner {
            Owner::Fixed(t) => (t.kind, Cow::Borrowed(t.key.as_bytes())),
            Owner::Field(n) => match fields.get(*n)? {
                text if text.contains(&b'\\') => match copy_text::unescape(text) {
                    None => (TenantKind::Unassigned, Cow::Borrowed(&b""[..])),
                    Some(plain) => (TenantKind::Normal, Cow::Owned(plain)),
                },
                text => (TenantKind::Normal, Cow::Borrowed(text)),
            },
        };
        Ok(Cut { kind, tenant, image })
    }
}

/// Where the fields of a line end.
struct Fields<'a> {
    line: &'a [u8],
    ends: Vec<usize>,
}

impl<'a> Fields<'a> {
    fn of(line: &'a [u8], wanted: bool) -> Self {
        let mut ends = Vec::new();
        if wanted {
            ends.extend(memchr::memchr_iter(b'\t', line));
            ends.push(line.len());
        }
        Self { line, ends }
    }

    fn end(&self, n: usize) -> Result<usize> {
        self.ends.get(n).copied().ok_or_else(|| Error::other("a row from COPY has fewer fields than were asked for"))
    }

    fn get(&self, n: usize) -> Result<&'a [u8]> {
        let from = if n == 0 { 0 } else { self.end(n - 1)? + 1 };
        Ok(&self.line[from..self.end(n)?])
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use coffer_wire::{Class, Column, ColumnFlags};

    pub(crate) fn column(attnum: i16, name: &str, flags: u8) -> Column {
        Column {
            attnum,
            name: name.into(),
            type_oid: 25,
            type_name: "text".into(),
            typmod: -1,
            flags: ColumnFlags(flags),
            missing: None,
            enum_labels: vec![],
        }
    }

    fn table(columns: Vec<Column>, key: &[u16], tenant: Option<&str>, strategy: Strategy) -> (Rule, Relation) {
        let rule = Rule {
            relid: 7,
            schema: "public".into(),
            name: "t".into(),
            strategy,
            class: Class::Data,
            tenant_column: tenant.map(str::to_owned),
            registered_xid: 3,
            key_columns: None,
            tenant: (strategy == Strategy::Schema).then(|| "acme".to_owned()),
            partitioned: false,
            tenant_expression: (strategy == Strategy::Session).then(|| "(SELECT x)".to_owned()),
            parents: vec![],
        };
        let relation = Relation {
            relid: 7,
            leaf: 7,
            schema: "public".into(),
            name: "t".into(),
            class: Class::Data,
            strategy,
            key_mode: if key.is_empty() { KeyMode::FullRow } else { KeyMode::Key },
            columns,
            key: key.to_vec(),
        };
        (rule, relation)
    }

    #[test]
    fn a_line_becomes_tenant_key_and_image() {
        let (rule, rel) = table(
            vec![column(1, "id", 0), column(2, "user", 0), column(4, "body", 0)],
            &[1, 0],
            Some("user"),
            Strategy::Identity,
        );
        let shape = RowShape::new(&rule, &rel).unwrap();
        assert_eq!(shape.select, ["t.id", "t.\"user\"", "t.body"]);
        let mut k = Vec::new();
        let line = b"5\ta\\tb\t\\N";
        let cut = shape.cut(line, &mut k).unwrap();
        assert_eq!((cut.kind, &*cut.tenant, cut.image), (TenantKind::Normal, &b"a\tb"[..], &line[..]));
        assert_eq!(k, b"a\\tb\t5");
        assert_eq!(shape.cut(b"5\t\\N\tx", &mut k).unwrap().kind, TenantKind::Unassigned);
        assert_eq!(&*shape.cut(b"5\t\\\\N\tx", &mut k).unwrap().tenant, b"\\N");
        assert!(shape.cut(b"5", &mut k).is_err());
    }

    #[test]
    fn generated_columns_are_asked_for_behind_the_image_only_as_key_or_tenant() {
        let g = ColumnFlags::GENERATED;
        let (rule, rel) = table(
            vec![column(1, "id", 0), column(2, "g", g), column(3, "t", g), column(4, "u", g)],
            &[1],
            Some("t"),
            Strategy::Tag,
        );
        let shape = RowShape::new(&rule, &rel).unwrap();
        assert_eq!(shape.select, ["t.id", "t.g", "t.t"]);
        let mut k = Vec::new();
        let cut = shape.cut(b"5\tG\tT", &mut k).unwrap();
        assert_eq!((&*cut.tenant, cut.image, &k[..]), (&b"T"[..], &b"5"[..], &b"G"[..]));
    }

    #[test]
    fn whole_rows_have_no_key_and_schemas_have_one_tenant() {
        let (rule, rel) = table(vec![column(1, "a", 0), column(2, "b", 0)], &[], None, Strategy::Schema);
        let shape = RowShape::new(&rule, &rel).unwrap();
        let mut k = Vec::new();
        let cut = shape.cut(b"1\t2", &mut k).unwrap();
        assert_eq!((&*cut.tenant, cut.image, k.len()), (&b"acme"[..], &b"1\t2"[..], 0));
    }

    #[test]
    fn an_expression_for_the_tenant_comes_last() {
        let (rule, rel) = table(vec![column(1, "a", 0), column(2, "b", 0)], &[0], None, Strategy::Session);
        let shape = RowShape::new(&rule, &rel).unwrap();
        assert_eq!(shape.select, ["t.a", "t.b", "(SELECT x)"]);
        let mut k = Vec::new();
        let cut = shape.cut(b"1\t2\tacme", &mut k).unwrap();
        assert_eq!((&*cut.tenant, cut.image, &k[..]), (&b"acme"[..], &b"1\t2"[..], &b"1"[..]));
        assert_eq!(shape.cut(b"1\t2\t\\N", &mut k).unwrap().kind, TenantKind::Unassigned);
    }

    #[test]
    fn no_tenant_column_and_no_fixed_tenant_is_refused() {
        let (rule, rel) = table(vec![column(1, "a", 0)], &[0], None, Strategy::Path);
        assert!(RowShape::new(&rule, &rel).is_err());
    }
}
