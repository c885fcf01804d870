//! How a row at the target becomes a row of the table as it is now.
//!
//! Columns are matched by attnum, which a rename keeps; between different tables (a table that was dropped and made
//! again, a leaf of a partitioned one) by name. What both sides have is compared and staged, in the order of the live
//! table. A column that is newer than the target keeps its value on rows that survive and gets its default on rows that
//! come back; a column that was dropped since is reported and left out.

use crate::error::{Error, Kind, Result};
use coffer_wire::{Column, ColumnFlags, KeyMode, Relation, copy_text};
use std::collections::HashMap;

/// A column that is compared, staged and written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageColumn {
    /// Its name in the live table.
    pub name: String,
    pub flags: ColumnFlags,
}

/// Where a staged field of a target row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Image(usize),
    /// A generated key column: it is in no image.
    Key(usize),
    /// In `given`: every row has the same.
    Given(usize),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// What is compared, in the live table's order.
    pub columns: Vec<StageColumn>,
    /// Places in `columns` of the live key; empty: rows are told apart by the whole row.
    pub key: Vec<usize>,
    /// Live columns that the target does not have.
    pub newer: Vec<String>,
    /// Columns of the target that the live table does not have.
    pub dropped: Vec<String>,
    sources: Vec<Source>,
    given: Vec<Vec<u8>>,
    /// Per staged column: labels that were renamed since.
    relabel: Vec<HashMap<Vec<u8>, Vec<u8>>>,
    /// The target's image is the staged line as it is.
    identity: bool,
    /// The target's rows come in the order of the live key.
    pub same_order: bool,
}

impl Mapping {
    /// `by_name`: the two are different tables.
    pub fn new(target: &Relation, live: &Relation, by_name: bool) -> Result<Self> {
        let by_name = by_name || target.leaf != live.leaf;
        let alike = |a: &Column, b: &Column| if by_name { a.name == b.name } else { a.attnum == b.attnum };
        let (mut columns, mut sources, mut relabel, mut newer) = (vec![], vec![], vec![], vec![]);
        for (i, l) in live.columns.iter().enumerate() {
            let in_key = live.key_mode == KeyMode::Key && live.key.contains(&(i as u16));
            let generated = l.flags.has(ColumnFlags::GENERATED);
            if generated && !in_key {
                continue;
            }
            let source = target.image_columns().position(|t| alike(t, l)).map(Source::Image).or_else(|| {
                let at = target.key.iter().position(|k| alike(&target.columns[usize::from(*k)], l))?;
                Some(Source::Key(at))
            });
            match source {
                Some(s) => {
                    let then = target.columns.iter().find(|t| alike(t, l)).map_or(&[][..], |t| &t.enum_labels);
                    relabel.push(renamed_labels(then, &l.enum_labels));
                    sources.push(s);
                    columns.push(StageColumn { name: l.name.clone(), flags: l.flags });
                }
                None if in_key => {
                    return Err(Error::new(
                        Kind::Refused,
                        format!(
                            "{}: its key has the column {}, which is newer than the target, so rows then and now cannot be told apart",
                            live.qualified(),
                            l.name
                        ),
                    )
                    .hint("restore to a schema or to files, and move the rows by hand"));
                }
                None => newer.push(l.name.clone()),
            }
        }
        let dropped = target
            .image_columns()
            .filter(|t| !live.columns.iter().any(|l| alike(t, l)))
            .map(|t| t.name.clone())
            .collect();
        let place = |k: &u16| {
            let name = &live.columns[usize::from(*k)].name;
            columns.iter().position(|c| c.name == *name).expect("every key column is staged")
        };
        let key: Vec<usize> = match live.key_mode {
            KeyMode::Key => live.key.iter().map(place).collect(),
            KeyMode::FullRow => Vec::new(),
        };
        let same_order = live.key_mode == KeyMode::Key
            && target.key_mode == KeyMode::Key
            && target.key.len() == live.key.len()
            && target
                .key
                .iter()
                .zip(&live.key)
                .all(|(t, l)| alike(&target.columns[usize::from(*t)], &live.columns[usize::from(*l)]))
            && key.iter().all(|k| relabel[*k].is_empty());
        let identity = sources.len() == target.image_columns().count()
            && sources.iter().enumerate().all(|(i, s)| *s == Source::Image(i))
            && relabel.iter().all(HashMap::is_empty);
        Ok(Self { columns, key, newer, dropped, sources, given: Vec::new(), relabel, identity, same_order })
    }

    /// The same for an archive that has everything up to now: a column that it has not heard of came without a change of
    /// a row, and each row has what the table's catalog says for rows that are older than the column.
    pub fn up_to_now(target: &Relation, live: &Relation, by_name: bool) -> Result<Self> {
        let mut m = Self::new(target, live, by_name)?;
        for name in std::mem::take(&mut m.newer) {
            let Some(column) = live.columns.iter().find(|c| c.name == name) else { continue };
            let mut value = Vec::new();
            match &column.missing {
                Some(text) => copy_text::escape_into(&mut value, text.as_bytes()),
                None => value.extend_from_slice(b"\\N"),
            }
            m.sources.push(Source::Given(m.given.len()));
            m.given.push(value);
            m.relabel.push(HashMap::new());
            m.columns.push(StageColumn { name, flags: column.flags });
            m.identity = false;
        }
        Ok(m)
    }

    /// For a table without rows at the target: everything the live table has.
    pub fn live_only(live: &Relation) -> Result<Self> {
        Self::new(live, live, false)
    }

    /// Fills `line` with the staged fields of a target row.
    pub fn stage(&self, key: &[u8], image: &[u8], line: &mut Vec<u8>) -> Result<()> {
        line.clear();
        if self.identity {
            line.extend_from_slice(image);
            return Ok(());
        }
        let image: Vec<&[u8]> = copy_text::fields(image).collect();
        let key: Vec<&[u8]> = copy_text::fields(key).collect();
        for (i, s) in self.sources.iter().enumerate() {
            if i > 0 {
                line.push(b'\t');
            }
            let field = match s {
                Source::Image(n) => image.get(*n),
                Source::Key(n) => key.get(*n),
                Source::Given(n) => {
                    line.extend_from_slice(&self.given[*n]);
                    continue;
                }
            };
            let field = *field.ok_or_else(|| {
                Error::new(Kind::Verification, format!("a row at the target has {} fields, too few", image.len()))
                    .code("malformed")
            })?;
            line.extend_from_slice(self.relabel[i].get(field).map_or(field, Vec::as_slice));
        }
        Ok(())
    }

    /// Fills `key` with the live key of a staged line: what rows are joined by.
    pub fn key_of(&self, line: &[u8], key: &mut Vec<u8>) -> Result<()> {
        key.clear();
        if self.key.is_empty() {
            key.extend_from_slice(line);
            return Ok(());
        }
        let fields: Vec<&[u8]> = copy_text::fields(line).collect();
        for (i, k) in self.key.iter().enumerate() {
            if i > 0 {
                key.push(b'\t');
            }
            let field =
                fields.get(*k).ok_or_else(|| Error::other("a row from COPY has fewer fields than were asked for"))?;
            key.extend_from_slice(field);
        }
        Ok(())
    }
}

/// Labels of an enum that were renamed: the lists are equally long and differ at a place where the old label is gone and
/// the new one is new.
fn renamed_labels(then: &[String], now: &[String]) -> HashMap<Vec<u8>, Vec<u8>> {
    if then.len() > now.len() {
        return HashMap::new();
    }
    let escaped = |s: &str| {
        let mut out = Vec::new();
        copy_text::escape_into(&mut out, s.as_bytes());
        out
    };
    // Labels that both lists have anchor the places; a single stretch between anchors is compared label by label.
    let mut out = HashMap::new();
    let (mut i, mut j) = (0, 0);
    while i < then.len() && j < now.len() {
        if then[i] == now[j] {
            (i, j) = (i + 1, j + 1);
        } else if now.contains(&then[i]) {
            // A label was added before it.
            j += 1;
        } else if then.contains(&now[j]) {
            return HashMap::new();
        } else {
            out.insert(escaped(&then[i]), escaped(&now[j]));
            (i, j) = (i + 1, j + 1);
        }
    }
    // With labels added as well as renamed there is more than one reading: none is guessed.
    if then.len() != now.len() && !out.is_empty() { HashMap::new() } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::rows::tests::column;
    use coffer_wire::{Class, Strategy};

    fn rel(columns: Vec<Column>, key: &[u16]) -> Relation {
        Relation {
            relid: 1,
            leaf: 1,
            schema: "s".into(),
            name: "t".into(),
            class: Class::Data,
            strategy: Strategy::Identity,
            key_mode: if key.is_empty() { KeyMode::FullRow } else { KeyMode::Key },
            columns,
            key: key.to_vec(),
        }
    }

    fn stage(m: &Mapping, key: &str, image: &str) -> (String, String) {
        let (mut line, mut k) = (Vec::new(), Vec::new());
        m.stage(key.as_bytes(), image.as_bytes(), &mut line).unwrap();
        m.key_of(&line, &mut k).unwrap();
        (String::from_utf8(line).unwrap(), String::from_utf8(k).unwrap())
    }

    #[test]
    fn renamed_dropped_and_newer_columns() {
        let then = rel(vec![column(1, "id", 0), column(2, "old", 0), column(3, "gone", 0)], &[0]);
        let now = rel(vec![column(1, "id", 0), column(2, "new", 0), column(4, "added", 0)], &[0]);
        let m = Mapping::new(&then, &now, false).unwrap();
        assert_eq!(m.columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["id", "new"]);
        assert_eq!((m.newer.as_slice(), m.dropped.as_slice()), (&["added".to_owned()][..], &["gone".to_owned()][..]));
        assert!(m.same_order);
        assert_eq!(stage(&m, "7", "7\ta\tb"), ("7\ta".into(), "7".into()));
    }

    #[test]
    fn what_an_archive_up_to_now_has_not_heard_of_is_as_for_older_rows() {
        let then = rel(vec![column(1, "id", 0), column(3, "gone", 0)], &[0]);
        let filled = Column { missing: Some("a\tb".into()), ..column(4, "filled", 0) };
        let now = rel(vec![column(1, "id", 0), filled, column(5, "empty", 0)], &[0]);
        let m = Mapping::up_to_now(&then, &now, false).unwrap();
        assert_eq!(m.columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["id", "filled", "empty"]);
        assert!(m.newer.is_empty() && m.same_order);
        assert_eq!(stage(&m, "7", "7\tb"), ("7\ta\\tb\t\\N".into(), "7".into()));
    }

    #[test]
    fn the_same_table_needs_no_work() {
        let r = rel(vec![column(1, "id", 0), column(2, "g", ColumnFlags::GENERATED), column(3, "a", 0)], &[0]);
        let m = Mapping::new(&r, &r, false).unwrap();
        assert!(m.identity && m.same_order);
        assert_eq!(stage(&m, "7", "7\tx"), ("7\tx".into(), "7".into()));
    }

    #[test]
    fn a_generated_key_column_comes_from_the_key() {
        let r = rel(vec![column(1, "a", 0), column(2, "g", ColumnFlags::GENERATED)], &[1]);
        let m = Mapping::new(&r, &r, false).unwrap();
        assert_eq!(stage(&m, "G", "A"), ("A\tG".into(), "G".into()));
    }

    #[test]
    fn another_key_changes_the_order_and_a_newer_key_column_is_refused() {
        let then = rel(vec![column(1, "a", 0), column(2, "b", 0)], &[0]);
        let now = rel(vec![column(1, "a", 0), column(2, "b", 0)], &[1]);
        let m = Mapping::new(&then, &now, false).unwrap();
        assert!(!m.same_order);
        assert_eq!(stage(&m, "1", "1\t2"), ("1\t2".into(), "2".into()));
        let newer = rel(vec![column(1, "a", 0), column(3, "c", 0)], &[1]);
        assert_eq!(Mapping::new(&then, &newer, false).unwrap_err().kind(), Kind::Refused);
        let whole = rel(vec![column(1, "a", 0), column(2, "b", 0)], &[]);
        assert!(!Mapping::new(&whole, &whole, false).unwrap().same_order);
    }

    #[test]
    fn a_renamed_label_is_followed_and_a_doubtful_one_is_not() {
        let l = |s: &str| s.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(renamed_labels(&l("a b c"), &l("a x c")).get(&b"b"[..]), Some(&b"x".to_vec()));
        assert!(renamed_labels(&l("a b"), &l("a z b")).is_empty());
        assert!(renamed_labels(&l("a b"), &l("a x y")).is_empty());
        assert!(renamed_labels(&l("a b"), &l("b a")).is_empty());
    }
}
