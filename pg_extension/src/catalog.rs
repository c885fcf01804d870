//! Reading our own tables the way catalogs are read: by systable scans, so that the plugin sees them as they were at the
//! point it decodes and a session sees what is committed. Columns are read by position (see sql/10_tables.sql).

use crate::encoding::Encoding;
use crate::tuple;
use coffer_wire::tag::MacKey;
use coffer_wire::{Class, Strategy};
use pgrx::pg_sys;
use std::ffi::CStr;

/// A row of `coffer.rules`.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub strategy: Strategy,
    pub class: Class,
    /// In the partition root; 0 for none.
    pub tenant_attnum: i16,
}

/// A row of `coffer.schema_rules`.
#[derive(Clone, Debug)]
pub struct SchemaRule {
    pub class: Class,
    /// `None` when the name cannot be written in UTF-8.
    pub tenant: Option<String>,
}

/// The namespace of the extension, if it exists at this point.
pub fn namespace() -> Option<pg_sys::Oid> {
    // SAFETY: the name is a constant; missing is allowed.
    let oid = unsafe { pg_sys::get_namespace_oid(c"coffer".as_ptr(), true) };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

fn relation_named(namespace: pg_sys::Oid, name: &CStr) -> Option<pg_sys::Oid> {
    // SAFETY: a look-up in a system cache.
    let oid = unsafe { pg_sys::get_relname_relid(name.as_ptr(), namespace) };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// One column of a row.
struct Column {
    tuple: pg_sys::HeapTuple,
    desc: pg_sys::TupleDesc,
}

impl Column {
    fn get(&self, attnum: i16) -> Option<pg_sys::Datum> {
        let mut null = false;
        // SAFETY: the tuple is of the relation that the descriptor is of.
        let datum = unsafe { pg_sys::heap_getattr(self.tuple, attnum.into(), self.desc, &mut null) };
        if null { None } else { Some(datum) }
    }

    fn bytes(&self, attnum: i16) -> Option<Vec<u8>> {
        let datum = self.get(attnum)?;
        // SAFETY: the columns asked for this way are text and bytea.
        Some(unsafe { tuple::detoasted(datum.cast_mut_ptr()) }.to_vec())
    }
}

/// The value of an index's only column.
struct Key<'a> {
    index: &'a CStr,
    /// The column's number in the table.
    attnum: i16,
    equals: u32,
    value: pg_sys::Datum,
}

impl<'a> Key<'a> {
    /// An OID, the table's first column.
    fn oid(index: &'a CStr, oid: pg_sys::Oid) -> Self {
        Self { index, attnum: 1, equals: pg_sys::F_OIDEQ, value: pg_sys::Datum::from(oid) }
    }
}

/// The first row of `table`, by its key if one is given.
fn first_row<R>(table: &CStr, key: Option<&Key<'_>>, read: impl FnOnce(&Column) -> R) -> Option<(pg_sys::Oid, R)> {
    let mut read = Some(read);
    let mut first = None;
    let relid = each_row(table, key, |row| {
        first = read.take().map(|r| r(row));
        false
    })?;
    first.map(|r| (relid, r))
}

/// Reads the rows of `table`, those with the key if one is given, as long as `read` wants more. The answer is the table.
fn each_row(table: &CStr, key: Option<&Key<'_>>, mut read: impl FnMut(&Column) -> bool) -> Option<pg_sys::Oid> {
    let namespace = namespace()?;
    let relid = relation_named(namespace, table)?;
    let index = key.and_then(|k| relation_named(namespace, k.index));
    // SAFETY: the scan and the relation are closed in order; an error in between ends the transaction, which closes
    // them as well. The scan key lives until the scan ends.
    unsafe {
        let relation = pg_sys::table_open(relid, pg_sys::AccessShareLock as i32);
        let mut scan_key = pg_sys::ScanKeyData::default();
        if let Some(key) = key {
            pg_sys::ScanKeyInit(
                &mut scan_key,
                key.attnum,
                pg_sys::BTEqualStrategyNumber as u16,
                key.equals.into(),
                key.value,
            );
        }
        let scan = pg_sys::systable_beginscan(
            relation,
            index.unwrap_or(pg_sys::InvalidOid),
            index.is_some(),
            std::ptr::null_mut(),
            i32::from(key.is_some()),
            &mut scan_key,
        );
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() || !read(&Column { tuple, desc: (*relation).rd_att }) {
                break;
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
        Some(relid)
    }
}

/// The rule of a table; `Err` when it says something that this version does not know.
pub fn rule(relid: pg_sys::Oid) -> Option<Result<Rule, String>> {
    let (_, rule) = first_row(c"rules", Some(&Key::oid(c"rules_pkey", relid)), |row| {
        let number = |attnum| row.get(attnum).map_or(-1, |d| d.value() as i16);
        let strategy = u8::try_from(number(2)).ok().and_then(Strategy::from_u8);
        let class = u8::try_from(number(3)).ok().and_then(Class::from_u8);
        match (strategy, class) {
            (Some(strategy), Some(class)) => Ok(Rule { strategy, class, tenant_attnum: number(4) }),
            _ => Err(format!("its rule has strategy {} and class {}", number(2), number(3))),
        }
    })?;
    Some(rule)
}

/// Whether rows below a table may be there without a parent, which one that comes has to look for.
pub fn has_loose_ways(root: u32) -> bool {
    let mut found = false;
    each_row(c"rules", None, |row| {
        let parent = row.get(5).map_or(0, |d| d.value() as u32);
        found = parent == root && row.get(8).is_some_and(|d| d.value() != 0);
        !found
    });
    found
}

/// A row of `coffer.schema_rules` and what it was noted of.
struct Noted {
    rule: SchemaRule,
    oid: pg_sys::Oid,
    name: Vec<u8>,
    /// In this cluster: its OID counts.
    here: bool,
}

impl Noted {
    fn of(row: &Column) -> Self {
        let rule = SchemaRule {
            class: row
                .get(2)
                .and_then(|d| u8::try_from(d.value() as i16).ok())
                .and_then(Class::from_u8)
                .unwrap_or(Class::Data),
            tenant: row.bytes(3).and_then(|b| Encoding::of_database().to_utf8_string(&b)),
        };
        // SAFETY: the column is of type name.
        let name = row.get(6).map(|d| unsafe { tuple::name_bytes(&*d.cast_mut_ptr::<pg_sys::NameData>()) }.to_vec());
        Self {
            rule,
            oid: row.get(1).map_or(pg_sys::InvalidOid, |d| pg_sys::Oid::from(d.value() as u32)),
            name: name.unwrap_or_default(),
            here: row.get(7).is_some_and(|d| d.value() as i64 == system_id()),
        }
    }
}

/// The rule of a schema, as `coffer._schema_rules` has it; `Err` when one may be of this schema and may not: that one of its rows
/// belongs to the tenant nobody can say then.
pub fn schema_rule(namespace: pg_sys::Oid) -> Option<Result<SchemaRule, String>> {
    // SAFETY: a system cache look-up; the answer is a copy that ends with NUL.
    let name = unsafe {
        let name = pg_sys::get_namespace_name(namespace);
        if name.is_null() {
            return None;
        }
        CStr::from_ptr(name).to_owned()
    };
    let by_oid = first_row(c"schema_rules", Some(&Key::oid(c"schema_rules_pkey", namespace)), Noted::of);
    if let Some((_, noted)) = by_oid
        && noted.here
    {
        return Some(if noted.name == name.to_bytes() {
            Ok(noted.rule)
        } else {
            let was = String::from_utf8_lossy(&noted.name).into_owned();
            Err(format!("the rule of its schema is of a schema \"{was}\""))
        });
    }
    let mut padded = pg_sys::NameData::default();
    for (to, from) in padded.data.iter_mut().zip(name.to_bytes()) {
        *to = *from as std::ffi::c_char;
    }
    let key = Key {
        index: c"schema_rules_schema",
        attnum: 6,
        equals: pg_sys::F_NAMEEQ,
        value: pg_sys::Datum::from(&raw const padded),
    };
    let mut found: Option<Result<SchemaRule, String>> = None;
    each_row(c"schema_rules", Some(&key), |row| {
        let noted = Noted::of(row);
        if noted.here && noted.oid != namespace {
            found = Some(Err("the rule of its schema is of another schema that had the same name".into()));
            return false;
        }
        found = Some(Ok(noted.rule));
        true
    })?;
    found
}

/// Which cluster this is.
pub fn system_id() -> i64 {
    // SAFETY: reads a variable of the process.
    unsafe { pg_sys::GetSystemIdentifier() as i64 }
}

/// Who owns the extension's tables.
pub fn owner() -> Option<pg_sys::Oid> {
    let relid = relation_named(namespace()?, c"rules")?;
    // SAFETY: opened by reference count and closed at once.
    unsafe {
        let relation = pg_sys::RelationIdGetRelation(relid);
        if relation.is_null() {
            return None;
        }
        let owner = (*(*relation).rd_rel).relowner;
        pg_sys::RelationClose(relation);
        Some(owner)
    }
}

/// The key of our messages, and the table it is in.
pub fn secret() -> Option<(pg_sys::Oid, MacKey)> {
    let (relid, key) = first_row(c"secret", None, |row| row.bytes(2))?;
    Some((relid, key?.try_into().ok()?))
}

/// The labels of an enum, in their order.
pub fn enum_labels(enum_type: pg_sys::Oid) -> Vec<Vec<u8>> {
    let mut labels = Vec::new();
    // SAFETY: as in `first_row`; the index orders by sort order within the type.
    unsafe {
        let relation = pg_sys::table_open(pg_sys::EnumRelationId, pg_sys::AccessShareLock as i32);
        let index = pg_sys::index_open(pg_sys::EnumTypIdSortOrderIndexId.into(), pg_sys::AccessShareLock as i32);
        let mut key = pg_sys::ScanKeyData::default();
        pg_sys::ScanKeyInit(
            &mut key,
            pg_sys::Anum_pg_enum_enumtypid as i16,
            pg_sys::BTEqualStrategyNumber as u16,
            pg_sys::F_OIDEQ.into(),
            pg_sys::Datum::from(enum_type),
        );
        let scan = pg_sys::systable_beginscan_ordered(relation, index, std::ptr::null_mut(), 1, &mut key);
        loop {
            let tuple = pg_sys::systable_getnext_ordered(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            let row = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_enum>();
            labels.push(tuple::name_bytes(&row.enumlabel).to_vec());
        }
        pg_sys::systable_endscan_ordered(scan);
        pg_sys::index_close(index, pg_sys::AccessShareLock as i32);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
    }
    labels
}
