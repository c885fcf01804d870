//! Single rows of a table, by their keys as a person writes them: `42`, `"a b"`, `{"order": 7, "line": 2}`.
//!
//! Values are compared as text, as the server writes them. The tenant's own column may be left out of a key that has it:
//! its value is known.

use crate::error::{Error, Kind, Result};
use crate::tenant::Tenant;
use coffer_wire::{Column, KeyMode, Relation, Strategy, copy_text};
use serde_json::Value;
use std::collections::HashSet;
use std::str::FromStr;

/// A key as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowKey {
    /// Of a key with one column besides the tenant's.
    Value(String),
    /// Column, value.
    Columns(Vec<(String, String)>),
}

impl FromStr for RowKey {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let begins = s.trim_start();
        if begins.starts_with('"') {
            return serde_json::from_str(s).map(Self::Value).map_err(|e| format!("'{s}' is no JSON string: {e}"));
        }
        if !begins.starts_with('{') {
            return Ok(Self::Value(s.to_owned()));
        }
        let named: serde_json::Map<String, Value> =
            serde_json::from_str(s).map_err(|e| format!("'{s}' is no JSON object: {e}"))?;
        let text = |(column, v): (String, Value)| match v {
            Value::String(t) => Ok((column, t)),
            Value::Number(n) => Ok((column, n.to_string())),
            Value::Bool(b) => Ok((column, b.to_string())),
            _ => Err(format!("the value of {column} is no text, number or boolean")),
        };
        named.into_iter().map(text).collect::<Result<_, _>>().map(Self::Columns)
    }
}

/// As the server writes the value, as far as that can be said without it.
fn as_written(c: &Column, value: &str) -> String {
    let trimmed = value.trim();
    match c.type_oid {
        // int8, int2, int4, oid
        20 | 21 | 23 | 26 => trimmed.parse::<i64>().map_or_else(|_| value.to_owned(), |n| n.to_string()),
        16 => match trimmed.to_ascii_lowercase().as_str() {
            "true" | "t" => "t".to_owned(),
            "false" | "f" => "f".to_owned(),
            _ => value.to_owned(),
        },
        2950 => trimmed.to_ascii_lowercase(),
        _ => value.to_owned(),
    }
}

impl RowKey {
    /// The values of the table's key columns, in their order: more than one list where it cannot be told which column
    /// is the tenant's. `tenant_column`: the one, where it is known.
    pub(super) fn values(
        &self,
        rel: &Relation,
        tenant_column: Option<&str>,
        tenant: &Tenant,
    ) -> Result<Vec<Vec<String>>> {
        let refused = |why: String| {
            Err(Error::usage(format!("--where-key: {}: {why}", rel.qualified()))
                .hint("a key is one value, or a JSON object that names the columns of the table's key"))
        };
        if rel.key_mode != KeyMode::Key {
            return refused("its rows have no key".into());
        }
        let columns: Vec<&Column> = rel.key.iter().map(|k| &rel.columns[usize::from(*k)]).collect();
        let names = || columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ");
        // Columns that may be left out.
        let may_be_tenants = |c: &Column| match tenant_column {
            Some(t) => c.name == t,
            None => rel.strategy == Strategy::Identity,
        };
        let list = |given: &dyn Fn(&Column) -> Option<String>| -> Vec<String> {
            columns.iter().map(|c| given(c).map_or_else(|| tenant.key.clone(), |v| as_written(c, &v))).collect()
        };
        match self {
            Self::Value(v) if columns.len() == 1 => Ok(vec![list(&|_| Some(v.clone()))]),
            Self::Value(v) => {
                let others: Vec<&&Column> = columns.iter().filter(|c| may_be_tenants(c)).collect();
                if columns.len() != 2 || others.is_empty() {
                    return refused(format!("its key has {} columns: {}", columns.len(), names()));
                }
                Ok(others.iter().map(|o| list(&|c| (c.name != o.name).then(|| v.clone()))).collect())
            }
            Self::Columns(named) => {
                if let Some((c, _)) = named.iter().find(|(n, _)| !columns.iter().any(|c| c.name == *n)) {
                    return refused(format!("{c} is no column of its key ({})", names()));
                }
                let value = |c: &Column| named.iter().find(|(n, _)| *n == c.name).map(|(_, v)| v.clone());
                let left: Vec<&&Column> = columns.iter().filter(|c| value(c).is_none()).collect();
                if left.len() > 1 || left.iter().any(|c| !may_be_tenants(c)) {
                    return refused(format!("not all columns of its key are named ({})", names()));
                }
                Ok(vec![list(&value)])
            }
        }
    }
}

/// The asked keys of a table, as the merge has them.
pub(super) fn bytes_of(keys: &[RowKey], rel: &Relation, tenant: &Tenant) -> Result<HashSet<Vec<u8>>> {
    let mut out = HashSet::new();
    for values in keys.iter().map(|k| k.values(rel, None, tenant)).collect::<Result<Vec<_>>>()?.into_iter().flatten() {
        let mut bytes = Vec::new();
        for (i, v) in values.iter().enumerate() {
            if i > 0 {
                bytes.push(b'\t');
            }
            copy_text::escape_into(&mut bytes, v.as_bytes());
        }
        out.insert(bytes);
    }
    Ok(out)
}

/// Keys are of one table.
pub fn require_one_table(keys: &[RowKey], tables: usize) -> Result<()> {
    if !keys.is_empty() && tables != 1 {
        return Err(Error::new(Kind::Usage, "--where-key goes with one --table"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tests::column;
    use coffer_wire::Class;

    fn rel(strategy: Strategy, names: &[&str], key: &[u16]) -> Relation {
        Relation {
            relid: 1,
            leaf: 1,
            schema: "s".into(),
            name: "t".into(),
            class: Class::Data,
            strategy,
            key_mode: if key.is_empty() { KeyMode::FullRow } else { KeyMode::Key },
            columns: names.iter().enumerate().map(|(i, n)| column(i as i16 + 1, n)).collect(),
            key: key.to_vec(),
        }
    }

    fn values(text: &str, rel: &Relation, tenant_column: Option<&str>) -> Option<Vec<Vec<String>>> {
        text.parse::<RowKey>().unwrap().values(rel, tenant_column, &Tenant::normal("3")).ok()
    }

    #[test]
    fn a_key_is_a_value_or_names_its_columns() {
        let one = rel(Strategy::Tag, &["id", "tenant"], &[0]);
        assert_eq!(values("7", &one, None), Some(vec![vec!["7".into()]]));
        assert_eq!(values("\"a b\"", &one, None), Some(vec![vec!["a b".into()]]));
        assert_eq!(values("{\"id\": 7}", &one, None), Some(vec![vec!["7".into()]]));
        assert_eq!(values("{\"tenant\": 3}", &one, None), None);
        let two = rel(Strategy::Identity, &["tenant", "id"], &[0, 1]);
        assert_eq!(values("7", &two, Some("tenant")), Some(vec![vec!["3".into(), "7".into()]]));
        assert_eq!(values("7", &two, None).unwrap().len(), 2);
        assert_eq!(values("{\"id\": \"7\"}", &two, None), Some(vec![vec!["3".into(), "7".into()]]));
        assert_eq!(values("{\"tenant\": 4, \"id\": 7}", &two, None), Some(vec![vec!["4".into(), "7".into()]]));
        assert_eq!(values("7", &rel(Strategy::Tag, &["a", "b"], &[0, 1]), None), None);
        assert_eq!(values("{\"a\": 1}", &rel(Strategy::Tag, &["a", "b"], &[0, 1]), None), None);
        assert_eq!(values("7", &rel(Strategy::FullRow, &["a"], &[]), None), None);
        assert!("{\"a\": null}".parse::<RowKey>().is_err() && "{\"a\"".parse::<RowKey>().is_err());
    }
}
