//! What the plugin knows about each relation that changes come from, cached until something about it changes.

use super::hash::ByNumber;
use super::options::Options;
use super::rows::data_error;
use crate::catalog::{self, Rule};
use crate::compat;
use crate::encoding::Encoding;
use crate::invalidation::{Inbox, News};
use crate::layout::{Identity, Layout};
use crate::render::Outputs;
use crate::tuple;
use coffer_wire::{Class, Column, ColumnFlags, KeyMode, Relation, Strategy, TenantKind};
use pgrx::pg_sys;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

/// How the tenant of a row is found.
pub enum Owner {
    /// The column of the layout.
    Column(usize),
    /// All rows are of one tenant.
    Fixed(TenantKind, Vec<u8>),
    /// Each change has a tag.
    Tagged,
    /// A rule that cannot be followed, and why.
    Unknown(String),
}

/// A relation that a rule covers.
pub struct Covered {
    pub descriptor: Relation,
    pub encoded: Vec<u8>,
    pub id: u64,
    pub layout: Layout,
    pub owner: Owner,
}

/// What to do with the changes of a relation.
#[derive(Clone)]
pub enum Known {
    Covered(Rc<Covered>),
    /// The new contents of a covered table that ALTER TABLE rewrites: the root's OID.
    Rewrite(u32),
    Skipped,
}

struct Entry {
    known: Known,
    /// The relation and the tables above it.
    related: Vec<u32>,
    /// Hashes of the types of its columns.
    types: Vec<u32>,
}

/// The cache.
pub struct Relations {
    inbox: Inbox,
    entries: ByNumber<u32, Entry>,
    outputs: Outputs,
    last: Option<(u32, Known)>,
}

impl Relations {
    /// What output functions remember lives in `context`.
    pub fn new(context: pg_sys::MemoryContext) -> Self {
        Self { inbox: Inbox::subscribe(), entries: ByNumber::default(), outputs: Outputs::new(context), last: None }
    }

    /// What is known about a relation at the point that is being decoded.
    ///
    /// # Safety
    /// The relation is open and a historic snapshot is in force.
    #[inline]
    pub unsafe fn get(&mut self, relation: pg_sys::Relation, options: &Options, encoding: Encoding) -> Known {
        if let Some(news) = self.inbox.take() {
            self.forget(&news);
        }
        // SAFETY: by the caller.
        let relid = unsafe { (*relation).rd_id }.to_u32();
        match &self.last {
            Some((last, known)) if *last == relid => known.clone(),
            // SAFETY: by the caller.
            _ => unsafe { self.get_other(relation, relid, options, encoding) },
        }
    }

    unsafe fn get_other(
        &mut self,
        relation: pg_sys::Relation,
        relid: u32,
        options: &Options,
        encoding: Encoding,
    ) -> Known {
        if !self.entries.contains_key(&relid) {
            // SAFETY: by the caller.
            let looked = catch_unwind(AssertUnwindSafe(|| unsafe { self.look_up(relation, options, encoding) }));
            let entry = looked.unwrap_or_else(|panic| {
                // What a failed look-up leaves open goes with the transaction that decoding runs in.
                let reason = data_error(panic).into_owned();
                let known = Known::Covered(Rc::new(undescribed(relid, reason)));
                Entry { known, related: vec![relid], types: Vec::new() }
            });
            self.entries.insert(relid, entry);
        }
        let known = self.entries[&relid].known.clone();
        self.last = Some((relid, known.clone()));
        known
    }

    #[cold]
    fn forget(&mut self, news: &News) {
        self.last = None;
        self.entries.retain(|_, e| {
            !e.related.iter().any(|r| news.concerns(*r)) && !e.types.iter().any(|t| news.concerns_type(*t))
        });
    }

    unsafe fn look_up(&mut self, relation: pg_sys::Relation, options: &Options, encoding: Encoding) -> Entry {
        // SAFETY: the relation is open.
        let (relid, rewrites) = unsafe { ((*relation).rd_id, (*(*relation).rd_rel).relrewrite) };
        let mut entry = Entry { known: Known::Skipped, related: vec![relid.to_u32()], types: Vec::new() };
        if rewrites != pg_sys::InvalidOid {
            entry.related.push(rewrites.to_u32());
            // SAFETY: closed below.
            unsafe {
                let old = pg_sys::RelationIdGetRelation(rewrites);
                if !old.is_null() {
                    let of_old = self.look_up(old, options, encoding);
                    pg_sys::RelationClose(old);
                    if let Known::Covered(c) = of_old.known {
                        entry.known = Known::Rewrite(c.descriptor.relid);
                    }
                }
            }
            return entry;
        }
        // SAFETY: the relation is open.
        let ancestors = unsafe { compat::partition_ancestors(relation) };
        entry.related.extend(ancestors.iter().map(|a| a.to_u32()));
        let root_oid = ancestors.last().copied().unwrap_or(relid);
        // SAFETY: closed below; the relation itself stays open.
        unsafe {
            let root = pg_sys::RelationIdGetRelation(root_oid);
            if root.is_null() {
                return entry;
            }
            if let Some((strategy, class, rule)) = rule_of(root)
                && options.wants_class(class)
            {
                let layout = Layout::of(relation, root, &mut self.outputs, encoding);
                entry.types = type_hashes((*relation).rd_att);
                let owner = owner(strategy, rule, &layout);
                entry.known = Known::Covered(Rc::new(cover(relation, root, strategy, class, layout, owner)));
            }
            pg_sys::RelationClose(root);
        }
        entry
    }
}

enum Found {
    Rule(Rule),
    Schema(Option<String>),
    Broken(String),
}

/// The strategy and class that cover a table or a partition root, and what says so.
unsafe fn rule_of(root: pg_sys::Relation) -> Option<(Strategy, Class, Found)> {
    // SAFETY: the relation is open.
    let (relid, form) = unsafe { ((*root).rd_id, &*(*root).rd_rel) };
    if !matches!(form.relkind as u8, b'r' | b'p') {
        return None;
    }
    let namespace = form.relnamespace;
    // The catalogs, information_schema among them, have OIDs below the first normal one.
    if namespace.to_u32() == pg_sys::PG_CATALOG_NAMESPACE
        || namespace.to_u32() == pg_sys::PG_TOAST_NAMESPACE
        || relid.to_u32() < pg_sys::FirstNormalObjectId
        || catalog::namespace().is_none_or(|ours| ours == namespace)
    {
        return None;
    }
    match catalog::rule(relid) {
        Some(Ok(rule)) => Some((rule.strategy, rule.class, Found::Rule(rule))),
        Some(Err(what)) => Some((Strategy::Shared, Class::Data, Found::Broken(what))),
        None => Some(match catalog::schema_rule(namespace)? {
            Ok(rule) => (Strategy::Schema, rule.class, Found::Schema(rule.tenant)),
            Err(what) => (Strategy::Schema, Class::Data, Found::Broken(what)),
        }),
    }
}

fn owner(strategy: Strategy, rule: Found, layout: &Layout) -> Owner {
    match (strategy, rule) {
        (_, Found::Broken(what)) => Owner::Unknown(what),
        (_, Found::Schema(Some(tenant))) => Owner::Fixed(TenantKind::Normal, tenant.into_bytes()),
        (_, Found::Schema(None)) => Owner::Unknown("its tenant's name cannot be written in UTF-8".into()),
        (Strategy::Shared, _) => Owner::Fixed(TenantKind::Shared, Vec::new()),
        (Strategy::Path | Strategy::Session, _) => Owner::Tagged,
        (Strategy::Schema, _) => Owner::Unknown("its rule says schema, but its schema has no rule".into()),
        (Strategy::Identity | Strategy::Tag | Strategy::FullRow, Found::Rule(rule)) => {
            match layout.column(rule.tenant_attnum) {
                Some(column) => Owner::Column(column),
                None => Owner::Unknown("its tenant column does not exist any more".into()),
            }
        }
    }
}

unsafe fn type_hashes(desc: pg_sys::TupleDesc) -> Vec<u32> {
    let zero = pg_sys::Datum::from(0usize);
    // SAFETY: the descriptor is valid.
    unsafe {
        (0..(*desc).natts as usize)
            .map(|i| compat::attribute(desc, i).atttypid)
            .filter(|t| *t != pg_sys::InvalidOid)
            .map(|t| {
                let cache = pg_sys::SysCacheIdentifier::TYPEOID as i32;
                pg_sys::GetSysCacheHashValue(cache, pg_sys::Datum::from(t), zero, zero, zero)
            })
            .collect()
    }
}

/// A name, as text that is always valid: names of a database without a known encoding may be any bytes.
fn readable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&Encoding::of_database().convert(bytes)).into_owned()
}

/// # Safety
/// Both relations are open.
unsafe fn cover(
    relation: pg_sys::Relation,
    root: pg_sys::Relation,
    strategy: Strategy,
    class: Class,
    layout: Layout,
    owner: Owner,
) -> Covered {
    // SAFETY: by the caller; what comes from the server as a C string is copied at once.
    unsafe {
        let schema = pg_sys::get_namespace_name((*(*root).rd_rel).relnamespace);
        let schema = if schema.is_null() { Vec::new() } else { std::ffi::CStr::from_ptr(schema).to_bytes().to_vec() };
        let name = tuple::name_bytes(&(*(*root).rd_rel).relname).to_vec();
        let mut columns = Vec::with_capacity(layout.columns.len());
        for c in &layout.columns {
            columns.push(describe(compat::attribute((*root).rd_att, c.attnum as usize - 1), c));
        }
        let descriptor = Relation {
            relid: (*root).rd_id.to_u32(),
            leaf: (*relation).rd_id.to_u32(),
            schema: readable(&schema),
            name: readable(&name),
            class,
            strategy,
            key_mode: if layout.identity == Identity::Key { KeyMode::Key } else { KeyMode::FullRow },
            columns,
            key: layout.key.clone(),
        };
        let encoded = descriptor.encode();
        Covered { id: Relation::id_of(&encoded), descriptor, encoded, layout, owner }
    }
}

/// Stands for a relation that could not be described: its changes are kept as unresolved, with the reason.
fn undescribed(relid: u32, reason: String) -> Covered {
    let descriptor = Relation {
        relid,
        leaf: relid,
        schema: String::new(),
        name: format!("oid {relid}"),
        class: Class::Data,
        strategy: Strategy::Shared,
        key_mode: KeyMode::FullRow,
        columns: Vec::new(),
        key: Vec::new(),
    };
    let encoded = descriptor.encode();
    Covered {
        id: Relation::id_of(&encoded),
        descriptor,
        encoded,
        layout: Layout::empty(),
        owner: Owner::Unknown(format!("it cannot be described: {reason}")),
    }
}

fn describe(form: &pg_sys::FormData_pg_attribute, c: &crate::layout::Column) -> Column {
    let mut flags = 0;
    if form.attnotnull {
        flags |= ColumnFlags::NOT_NULL;
    }
    if c.generated {
        flags |= ColumnFlags::GENERATED;
    }
    match form.attidentity as u8 {
        b'a' => flags |= ColumnFlags::IDENTITY_ALWAYS,
        b'd' => flags |= ColumnFlags::IDENTITY_BY_DEFAULT,
        _ => {}
    }
    // SAFETY: the type exists, since a column has it; the answer is a C string in the current memory context.
    let (type_name, base) = unsafe {
        let text =
            pg_sys::format_type_extended(form.atttypid, form.atttypmod, pg_sys::FORMAT_TYPE_TYPEMOD_GIVEN as u16);
        (readable(std::ffi::CStr::from_ptr(text).to_bytes()), pg_sys::getBaseType(form.atttypid))
    };
    // SAFETY: a system cache look-up.
    let is_enum = unsafe { pg_sys::get_typtype(base) } as u8 == pg_sys::TYPTYPE_ENUM;
    let enum_labels = if is_enum { catalog::enum_labels(base) } else { Vec::new() };
    Column {
        attnum: c.attnum,
        name: readable(&c.name),
        type_oid: form.atttypid.to_u32(),
        type_name,
        typmod: form.atttypmod,
        flags: ColumnFlags(flags),
        missing: c.missing.as_ref().map(|m| String::from_utf8_lossy(m).into_owned()),
        enum_labels: enum_labels.iter().map(|l| readable(l)).collect(),
    }
}
