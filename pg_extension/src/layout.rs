//! Which field of a stored row is which column of the image and of the key.
//!
//! The image has the columns of the partition root, in the order of the root's attribute numbers; a leaf whose columns
//! are in another order is mapped by name. The key has the columns of the replica identity in that same order, so that
//! it does not depend on the leaf or on the order within an index.

use crate::compat;
use crate::encoding::Encoding;
use crate::render::{self, Found, Output, Outputs, Source};
use crate::tuple::{self, Att, Field};
use coffer_wire::copy_text;
use pgrx::pg_sys;
use std::collections::HashMap;

/// A column of the root that the leaf stores.
pub struct Column {
    /// In the root.
    pub attnum: i16,
    pub name: Vec<u8>,
    /// Index into a tuple's fields.
    pub field: usize,
    pub output: Output,
    pub generated: bool,
    /// The text of a column that is missing in older rows.
    pub missing: Option<Vec<u8>>,
}

/// What tells the rows apart when they change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    Key,
    /// REPLICA IDENTITY FULL.
    FullRow,
    /// Nothing: the log has no old rows.
    None,
}

/// See the head of this file.
pub struct Layout {
    pub atts: Vec<Att>,
    pub columns: Vec<Column>,
    /// Indexes into `columns`.
    pub image: Vec<u16>,
    pub key: Vec<u16>,
    pub identity: Identity,
}

impl Layout {
    /// The layout of `relation`'s rows under `root`'s columns; the same relation when it is no partition.
    ///
    /// # Safety
    /// Both relations are open.
    pub unsafe fn of(
        relation: pg_sys::Relation,
        root: pg_sys::Relation,
        outputs: &mut Outputs,
        encoding: Encoding,
    ) -> Self {
        // SAFETY: by the caller. The cache keeps a replaced descriptor until the transaction ends.
        unsafe {
            let desc = (*relation).rd_att;
            let natts = (*desc).natts as usize;
            let atts: Vec<Att> = (0..natts).map(|i| Att::new(compat::attribute(desc, i))).collect();
            let by_name: HashMap<Vec<u8>, usize> = (0..natts)
                .map(|i| (i, compat::attribute(desc, i)))
                .filter(|(_, a)| !a.attisdropped && a.attgenerated as u8 != b'v')
                .map(|(i, a)| (tuple::name_bytes(&a.attname).to_vec(), i))
                .collect();
            let mut columns = Vec::with_capacity(natts);
            let root_desc = (*root).rd_att;
            for i in 0..(*root_desc).natts as usize {
                let of_root = compat::attribute(root_desc, i);
                let name = tuple::name_bytes(&of_root.attname).to_vec();
                let Some(field) = by_name.get(&name).copied().filter(|_| !of_root.attisdropped) else { continue };
                let form = compat::attribute(desc, field);
                let output = outputs.of(form);
                columns.push(Column {
                    attnum: of_root.attnum,
                    name,
                    field,
                    output,
                    generated: form.attgenerated as u8 == b's',
                    missing: missing_value(desc, form, output, encoding),
                });
            }
            let image = (0..).zip(&columns).filter(|(_, c)| !c.generated).map(|(i, _)| i).collect();
            let (identity, key_fields) = replica_identity(relation);
            let key = (0..).zip(&columns).filter(|(_, c)| key_fields.contains(&c.field)).map(|(i, _)| i).collect();
            Self { atts, columns, image, key, identity }
        }
    }

    /// Of a relation of which nothing is known.
    pub fn empty() -> Self {
        let (atts, columns, image, key) = Default::default();
        Self { atts, columns, image, key, identity: Identity::None }
    }

    /// The index of a column of the root.
    pub fn column(&self, attnum: i16) -> Option<usize> {
        self.columns.iter().position(|c| c.attnum == attnum)
    }

    pub fn column_named(&self, name: &[u8]) -> Option<usize> {
        self.columns.iter().position(|c| c.name == name)
    }

    /// Whether the old row that the log carries has this column.
    pub fn in_old_row(&self, column: usize) -> bool {
        match self.identity {
            Identity::Key => self.key.iter().any(|k| usize::from(*k) == column),
            Identity::FullRow => true,
            Identity::None => false,
        }
    }

    /// Appends one field of a line.
    ///
    /// # Safety
    /// The fields are those of a living tuple of the relation.
    #[inline]
    pub unsafe fn put_field(&self, out: &mut Vec<u8>, column: &Column, fields: &[Field], source: Source) -> Found {
        let field = fields[column.field];
        if field.is_missing() {
            match &column.missing {
                Some(text) => copy_text::escape_into(out, text),
                None => out.extend_from_slice(copy_text::NULL),
            }
            return Found::Value;
        }
        // SAFETY: by the caller.
        unsafe { render::escaped(out, column.output, field, source) }
    }

    /// Appends the key as a line. `false` when a part of it is not in the row.
    ///
    /// # Safety
    /// As for [`Layout::put_field`].
    pub unsafe fn put_key(&self, out: &mut Vec<u8>, fields: &[Field], source: Source) -> bool {
        let mut whole = true;
        for (n, c) in self.key.iter().enumerate() {
            if n > 0 {
                out.push(b'\t');
            }
            // SAFETY: by the caller.
            whole &= unsafe { self.put_field(out, &self.columns[usize::from(*c)], fields, source) } != Found::Unchanged;
        }
        whole
    }

    /// Appends the image as a line.
    ///
    /// # Safety
    /// As for [`Layout::put_field`].
    pub unsafe fn put_image(&self, out: &mut Vec<u8>, fields: &[Field], source: Source) {
        for (n, c) in self.image.iter().enumerate() {
            if n > 0 {
                out.push(b'\t');
            }
            // SAFETY: by the caller.
            unsafe { self.put_field(out, &self.columns[usize::from(*c)], fields, source) };
        }
    }

    /// Appends a column's text, unescaped.
    ///
    /// # Safety
    /// As for [`Layout::put_field`].
    #[inline]
    pub unsafe fn put_plain(&self, out: &mut Vec<u8>, column: usize, fields: &[Field], source: Source) -> Found {
        let c = &self.columns[column];
        let field = fields[c.field];
        if field.is_missing() {
            return match &c.missing {
                Some(text) => {
                    out.extend_from_slice(text);
                    Found::Value
                }
                None => Found::Null,
            };
        }
        // SAFETY: by the caller.
        unsafe { render::plain(out, c.output, field, source) }
    }
}

/// The text that rows older than the column have, `None` for NULL.
unsafe fn missing_value(
    desc: pg_sys::TupleDesc,
    form: &pg_sys::FormData_pg_attribute,
    output: Output,
    encoding: Encoding,
) -> Option<Vec<u8>> {
    if !form.atthasmissing {
        return None;
    }
    let mut null = true;
    // SAFETY: the descriptor is valid and the attribute says that it has such a value. A value that is no pointer is
    // read from the word it came in, which is where a machine that stores the low byte first has it.
    unsafe {
        let datum = pg_sys::getmissingattr(desc, form.attnum.into(), &mut null);
        if null {
            return None;
        }
        let word = datum.value();
        let field = Field::at(if form.attbyval { (&raw const word).cast() } else { datum.cast_mut_ptr() });
        let mut text = Vec::new();
        render::plain(&mut text, output, field, Source { encoding, stored: true });
        Some(text)
    }
}

/// What the log carries of old rows, and which fields of the tuple the key is.
unsafe fn replica_identity(relation: pg_sys::Relation) -> (Identity, Vec<usize>) {
    // SAFETY: the relation is open; the index is opened by reference count alone, as the server does it while decoding.
    unsafe {
        if (*(*relation).rd_rel).relreplident as u8 == b'f' {
            return (Identity::FullRow, Vec::new());
        }
        let index = pg_sys::RelationGetReplicaIndex(relation);
        if index == pg_sys::InvalidOid {
            return (Identity::None, Vec::new());
        }
        let index = pg_sys::RelationIdGetRelation(index);
        if index.is_null() {
            return (Identity::None, Vec::new());
        }
        let form = (*index).rd_index;
        let keys = (*form).indkey.values.as_slice((*form).indnkeyatts as usize);
        let fields = keys.iter().filter_map(|attnum| usize::try_from(attnum - 1).ok()).collect();
        pg_sys::RelationClose(index);
        (Identity::Key, fields)
    }
}
