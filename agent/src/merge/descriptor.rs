//! Descriptors seen by a merge, and how an image under one becomes an image under another.
//!
//! Columns are matched by `attnum`, which a rename keeps and a drop never gives away again. Those of a partitioned table
//! are the root's, whatever the leaf: leaves number their columns on their own, and their names are not enough, since a
//! row of one leaf may be from before a rename and a row of another from after it.

use super::image::{self, Field};
use crate::error::{Error, Kind, Result};
use coffer_wire::{Column, ColumnFlags, KeyMode, Relation, copy_text};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// A descriptor's number in one merge.
pub type DescId = u32;

/// What two rows of a table must share for their keys to be comparable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct KeyShape {
    full_row: bool,
    /// By their numbers.
    columns: Vec<i16>,
}

impl KeyShape {
    fn of(rel: &Relation) -> Self {
        let columns = match rel.key_mode {
            KeyMode::Key => rel.key.iter().map(|k| rel.columns[usize::from(*k)].attnum).collect(),
            KeyMode::FullRow => rel.image_columns().map(|c| c.attnum).collect(),
        };
        Self { full_row: rel.key_mode == KeyMode::FullRow, columns }
    }
}

pub(super) struct Desc {
    pub rel: Arc<Relation>,
    pub shape: Arc<KeyShape>,
    /// For each key column, its field in the image; `None` for a generated column, which images lack.
    key_fields: Vec<Option<usize>>,
}

impl Desc {
    pub fn full_row(&self) -> bool {
        self.rel.key_mode == KeyMode::FullRow
    }
}

/// All descriptors of a merge. They are taken in while rows are already read, so behind a lock of their own.
#[derive(Default)]
pub struct Descriptors(RwLock<Inner>);

#[derive(Default)]
struct Inner {
    by_id: HashMap<u64, DescId>,
    list: Vec<Arc<Desc>>,
    projections: HashMap<(DescId, DescId), Arc<Projection>>,
}

/// Where each field of the wanted image comes from; `None`: the images are alike.
type Projection = Option<Vec<Origin>>;

enum Origin {
    Field(usize),
    /// Escaped.
    Value(Vec<u8>),
    /// The column was generated then, and is not now: its old values are in no image.
    Unknown,
}

impl Descriptors {
    /// Takes a descriptor in; the same one again is the same number.
    pub fn add(&self, encoded: &[u8]) -> Result<DescId> {
        let id = Relation::id_of(encoded);
        if let Some(d) = self.inner().by_id.get(&id) {
            return Ok(*d);
        }
        let rel = Arc::new(Relation::decode(encoded)?);
        let mut fields = Vec::with_capacity(rel.columns.len());
        let mut n = 0;
        for c in &rel.columns {
            if c.flags.has(ColumnFlags::GENERATED) {
                fields.push(None);
            } else {
                fields.push(Some(n));
                n += 1;
            }
        }
        let key_fields = rel.key.iter().map(|k| fields[usize::from(*k)]).collect();
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let d = inner.list.len() as DescId;
        inner.list.push(Arc::new(Desc { shape: Arc::new(KeyShape::of(&rel)), rel, key_fields }));
        inner.by_id.insert(id, d);
        Ok(d)
    }

    fn inner(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the descriptor that frames name by this id.
    pub fn find(&self, id: u64) -> Result<DescId> {
        self.inner().by_id.get(&id).copied().ok_or_else(|| {
            Error::new(Kind::Verification, format!("a row names descriptor {id:016x}, which was not given before it"))
                .code("malformed")
        })
    }

    pub fn relation(&self, d: DescId) -> Arc<Relation> {
        self.inner().list[d as usize].rel.clone()
    }

    pub(super) fn get(&self, d: DescId) -> Arc<Desc> {
        self.inner().list[d as usize].clone()
    }

    /// The descriptors of a table, in the order in which they came.
    pub(super) fn of_table(&self, relid: u32) -> Vec<(DescId, Arc<Relation>)> {
        let inner = self.inner();
        let numbered = inner.list.iter().enumerate().map(|(n, d)| (n as DescId, d.rel.clone()));
        numbered.filter(|(_, rel)| rel.relid == relid).collect()
    }

    /// What rows under `like` look like in the leaf that rows under `of` are in.
    pub(super) fn in_leaf_of(&self, like: DescId, of: DescId) -> Result<DescId> {
        let (like_rel, of_rel) = (self.relation(like), self.relation(of));
        if like_rel.leaf == of_rel.leaf {
            return Ok(like);
        }
        self.add(&Relation { leaf: of_rel.leaf, ..(*like_rel).clone() }.encode())
    }

    /// Whether rows under the two look the same, whatever leaf of the table they are in.
    pub(super) fn alike(&self, a: DescId, b: DescId) -> bool {
        if a == b {
            return true;
        }
        let plain = |d| {
            let mut r = (*self.relation(d)).clone();
            r.leaf = r.relid;
            r.columns.iter_mut().for_each(|c| c.missing = None);
            r
        };
        plain(a) == plain(b)
    }

    /// The row key under `to` of an image under `from`. For whole-row relations the image must be under `to` already.
    pub(super) fn key_of(&self, d: DescId, image: image::Image<'_>) -> Result<Vec<u8>> {
        let desc = self.get(d);
        if desc.full_row() {
            let prefix = image.prefix(super::key::full_row_prefix())?;
            let len = image.len();
            let hash = if len > super::key::full_row_prefix() as u64 { image.hash()? } else { [0; 32] };
            return Ok(super::key::full_row_key(&prefix, len, || hash));
        }
        let fields = image.fields();
        let mut key = Vec::new();
        for (i, f) in desc.key_fields.iter().enumerate() {
            if i > 0 {
                key.push(b'\t');
            }
            match f.and_then(|f| fields.get(f)) {
                Some(Field::Bytes(b)) => key.extend_from_slice(b),
                _ => {
                    return Err(Error::new(
                        Kind::Verification,
                        format!("the key of {} changed to columns that older rows do not carry", desc.rel.qualified()),
                    )
                    .code("needs_base")
                    .hint("choose a target after the table's next base"));
                }
            }
        }
        Ok(key)
    }

    /// Appends `encoded`, an image under `from`, as an image under `to`.
    pub(super) fn project(&self, from: DescId, to: DescId, encoded: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let projection = self.projection(from, to);
        let Some(sources) = &*projection else {
            out.extend_from_slice(encoded);
            return Ok(());
        };
        let have = image::fields(encoded);
        let mut want = Vec::with_capacity(sources.len());
        for (i, s) in sources.iter().enumerate() {
            want.push(match s {
                Origin::Field(n) => *have.get(*n).ok_or_else(|| {
                    Error::new(
                        Kind::Verification,
                        format!("a row of {} has {} fields, too few", self.relation(from).qualified(), have.len()),
                    )
                    .code("malformed")
                })?,
                Origin::Value(v) => Field::Bytes(v),
                Origin::Unknown => {
                    let rel = self.relation(to);
                    let column = rel.image_columns().nth(i).map_or("?", |c| c.name.as_str());
                    return Err(Error::new(
                        Kind::Verification,
                        format!(
                            "column {column} of {} was generated when this row was written and is not any more",
                            rel.qualified()
                        ),
                    )
                    .code("needs_base")
                    .hint("choose a target after the table's next base"));
                }
            });
        }
        image::put_fields(out, &want);
        Ok(())
    }

    fn projection(&self, from: DescId, to: DescId) -> Arc<Projection> {
        if let Some(p) = self.inner().projections.get(&(from, to)) {
            return p.clone();
        }
        let p = Arc::new(self.make_projection(from, to));
        self.0.write().unwrap_or_else(PoisonError::into_inner).projections.insert((from, to), p.clone());
        p
    }

    fn make_projection(&self, from: DescId, to: DescId) -> Projection {
        let (a, b) = (self.relation(from), self.relation(to));
        let alike = |x: &Column, y: &Column| x.attnum == y.attnum;
        let mut out = Vec::new();
        for want in b.image_columns() {
            out.push(if let Some(i) = a.image_columns().position(|have| alike(have, want)) {
                Origin::Field(i)
            } else if a.columns.iter().any(|have| alike(have, want)) {
                Origin::Unknown
            } else {
                Origin::Value(self.missing(&a, want))
            });
        }
        let identity = out.len() == a.image_columns().count()
            && out.iter().enumerate().all(|(i, f)| matches!(f, Origin::Field(n) if *n == i));
        (!identity).then_some(out)
    }

    /// The value that rows under `from` have in a column that is younger. The catalog forgets it when the table is
    /// rewritten, and a leaf that is younger never had it, so any descriptor that still knew it counts; one of the same
    /// leaf first.
    fn missing(&self, from: &Relation, column: &Column) -> Vec<u8> {
        let inner = self.inner();
        let known = |of: &dyn Fn(&Relation) -> bool| {
            let of_table = inner.list.iter().map(|d| &d.rel).filter(|r| r.relid == from.relid && of(r.as_ref()));
            of_table
                .flat_map(|r| &r.columns)
                .find(|c| c.attnum == column.attnum && c.missing.is_some())
                .and_then(|c| c.missing.as_ref())
        };
        let value = known(&|r| r.leaf == from.leaf).or_else(|| known(&|_| true));
        match value {
            None => copy_text::NULL.to_vec(),
            Some(v) => {
                let mut out = Vec::new();
                copy_text::escape_into(&mut out, v.as_bytes());
                out
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tests::column;
    use coffer_wire::{Class, Strategy};

    fn rel(leaf: u32, columns: Vec<Column>) -> Relation {
        Relation {
            relid: 1,
            leaf,
            schema: "s".into(),
            name: "t".into(),
            class: Class::Data,
            strategy: Strategy::Identity,
            key_mode: KeyMode::Key,
            columns,
            key: vec![0],
        }
    }

    fn project(d: &Descriptors, from: DescId, to: DescId, line: &str) -> String {
        let mut encoded = Vec::new();
        image::put_line(&mut encoded, line.as_bytes());
        let mut out = Vec::new();
        d.project(from, to, &encoded, &mut out).unwrap();
        String::from_utf8(out[1..].to_vec()).unwrap()
    }

    #[test]
    fn columns_follow_their_number_whatever_the_leaf() {
        let d = Descriptors::default();
        let old = d.add(&rel(1, vec![column(1, "id"), column(2, "a"), column(3, "gone")]).encode()).unwrap();
        let mut added = column(4, "new");
        added.missing = Some("x\ty".into());
        let new = d.add(&rel(1, vec![column(1, "id"), column(2, "renamed"), added.clone()]).encode()).unwrap();
        assert_eq!(project(&d, old, new, "1\tA\tB"), "1\tA\tx\\ty");
        added.missing = None;
        let rewritten = d.add(&rel(1, vec![column(1, "id"), column(2, "renamed"), added]).encode()).unwrap();
        assert_eq!(project(&d, old, rewritten, "1\tA\tB"), "1\tA\tx\\ty");
        assert_eq!(project(&d, new, rewritten, "1\tA\tB"), "1\tA\tB");
        // Of another leaf, from before the rename.
        let leaf = d.add(&rel(2, vec![column(1, "id"), column(2, "a"), column(3, "gone")]).encode()).unwrap();
        assert_eq!(project(&d, leaf, rewritten, "1\tA\tB"), "1\tA\tx\\ty");
    }

    #[test]
    fn a_column_that_was_generated_is_refused_not_guessed() {
        let d = Descriptors::default();
        let mut g = column(2, "g");
        g.flags = ColumnFlags(ColumnFlags::GENERATED);
        let old = d.add(&rel(1, vec![column(1, "id"), g]).encode()).unwrap();
        let new = d.add(&rel(1, vec![column(1, "id"), column(2, "g")]).encode()).unwrap();
        let mut encoded = Vec::new();
        image::put_line(&mut encoded, b"1");
        assert!(d.project(old, new, &encoded, &mut Vec::new()).is_err());
        let back = d.projection(new, old);
        assert!(back.is_some());
    }
}
