//! What the trigger functions share: the call, and the layout of the table, cached per session.

use crate::compat;
use crate::encoding::Encoding;
use crate::invalidation::Inbox;
use crate::layout::{Identity, Layout};
use crate::render::{Found, Outputs, Source};
use crate::settings;
use crate::tuple::{self, Field, Varlena};
use crate::wal_message;
use coffer_wire::TenantKind;
use coffer_wire::tag::{self, Tag, TagOp, TagTenant};
use pgrx::pg_sys;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::rc::Rc;

/// A table with a trigger of ours.
pub struct Table {
    pub layout: Layout,
    /// The table, or the root of its partition tree.
    pub root: u32,
    /// The table and those above it.
    related: Vec<u32>,
    /// Whether the key needs the pinned settings.
    pub key_needs_settings: bool,
    /// How many of a tuple's fields hold the key.
    key_width: usize,
}

struct Cache {
    inbox: Inbox,
    /// The one that was asked for last.
    last: Option<(u32, Rc<Table>)>,
    tables: HashMap<u32, Rc<Table>>,
    outputs: Outputs,
}

/// Memory that one row leaves to the next. Taken while it is used: triggers nest.
#[derive(Default)]
struct Scratch {
    fields: Vec<Field>,
    key: Vec<u8>,
    message: Vec<u8>,
}

thread_local! {
    static CACHE: RefCell<Option<Cache>> = const { RefCell::new(None) };
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A value's memory that is not kept for the next row.
pub const LARGEST_KEPT: usize = 64 << 10;

/// Whose a row is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub kind: TenantKind,
    /// UTF-8.
    pub key: Vec<u8>,
}

impl Owner {
    pub fn nobody() -> Self {
        Self { kind: TenantKind::Unassigned, key: Vec::new() }
    }

    /// By the tenant column's text.
    pub fn of(text: Option<Vec<u8>>) -> Self {
        text.map_or_else(Self::nobody, |key| Self { kind: TenantKind::Normal, key })
    }

    fn in_tag(&self) -> TagTenant<'_> {
        TagTenant { kind: self.kind, key: &self.key }
    }
}

/// The call of a trigger function for a row.
pub struct Call<'a> {
    pub data: &'a pg_sys::TriggerData,
    pub table: Rc<Table>,
}

impl Call<'_> {
    /// # Safety
    /// `fcinfo` is what the server gave to the function `name`.
    pub unsafe fn of(fcinfo: pg_sys::FunctionCallInfo, name: &str) -> Self {
        // SAFETY: a call as a trigger has its data in the context; whether it is one is checked first.
        unsafe {
            let data = (*fcinfo).context.cast::<pg_sys::TriggerData>();
            if data.is_null() || (*data).type_ != pg_sys::NodeTag::T_TriggerData {
                pgrx::error!("coffer.{name} is a trigger function");
            }
            let data = &*data;
            if data.tg_event & pg_sys::TRIGGER_EVENT_ROW == 0 {
                pgrx::error!("coffer.{name} is for rows");
            }
            Self { data, table: table(data.tg_relation) }
        }
    }

    /// The tenant column, whose name is the trigger's argument, as an index into the layout's columns.
    pub fn tenant_column(&self) -> usize {
        // SAFETY: the trigger is the server's, its arguments end with NUL.
        let column = unsafe {
            let trigger = &*self.data.tg_trigger;
            if trigger.tgnargs != 1 {
                pgrx::error!("the trigger takes the tenant column's name");
            }
            CStr::from_ptr(*trigger.tgargs).to_bytes()
        };
        let Some(tenant) = self.table.layout.column_named(column) else {
            pgrx::error!("the tenant column \"{}\" does not exist any more", String::from_utf8_lossy(column));
        };
        tenant
    }

    /// The operation that it is called before.
    pub fn before(&self) -> Option<TagOp> {
        [
            (TagOp::Insert, pg_sys::TRIGGER_EVENT_INSERT),
            (TagOp::Update, pg_sys::TRIGGER_EVENT_UPDATE),
            (TagOp::Delete, pg_sys::TRIGGER_EVENT_DELETE),
        ]
        .into_iter()
        .find(|(_, event)| self.is_for(true, *event))
        .map(|(op, _)| op)
    }

    /// The texts of columns, by their names; `None` when one of them is NULL.
    ///
    /// # Safety
    /// The tuple is of the trigger's relation.
    pub unsafe fn texts(&self, tuple: pg_sys::HeapTuple, names: &[Vec<u8>]) -> Option<Vec<Vec<u8>>> {
        let layout = &self.table.layout;
        let columns: Vec<usize> = names
            .iter()
            .map(|n| match layout.column_named(n) {
                Some(c) => c,
                None => pgrx::error!("the column \"{}\" does not exist any more", String::from_utf8_lossy(n)),
            })
            .collect();
        let pinned = if columns.iter().all(|c| layout.columns[*c].output.is_fixed()) { None } else { settings::pin() };
        let mut fields = Vec::new();
        // SAFETY: by the caller.
        let texts = unsafe {
            tuple::fields_of((*tuple).t_data, &layout.atts, &mut fields);
            columns
                .iter()
                .map(|c| {
                    let mut text = Vec::new();
                    (layout.put_plain(&mut text, *c, &fields, stored()) == Found::Value).then_some(text)
                })
                .collect()
        };
        settings::unpin(pinned);
        texts
    }

    /// Writes the tag of the change of this row, `key_row`, whose key is the one that the log will carry.
    ///
    /// # Safety
    /// The tuple is of the trigger's relation.
    pub unsafe fn write_tag(&self, op: TagOp, key_row: pg_sys::HeapTuple, old: Option<&Owner>, new: Option<&Owner>) {
        let layout = &self.table.layout;
        let Scratch { mut fields, mut key, mut message } = SCRATCH.take();
        key.clear();
        // An insert is tagged before its row has a key that could be bound.
        if op != TagOp::Insert && layout.identity == Identity::Key {
            let pinned = if self.table.key_needs_settings { settings::pin() } else { None };
            // SAFETY: by the caller.
            unsafe {
                tuple::fields_of((*key_row).t_data, &layout.atts[..self.table.key_width], &mut fields);
                layout.put_key(&mut key, &fields, stored());
            }
            settings::unpin(pinned);
        }
        // SAFETY: the relation is open.
        let relid = unsafe { (*self.data.tg_relation).rd_id }.to_u32();
        let tag = Tag { relid, op, key: &key, old: old.map(Owner::in_tag), new: new.map(Owner::in_tag) };
        tag::put_tag(&mut message, &wal_message::mac_key(), &tag);
        wal_message::write(&message);
        if key.capacity() + message.capacity() <= LARGEST_KEPT {
            SCRATCH.set(Scratch { fields, key, message });
        }
    }

    /// Whether it is called before or after which operation.
    pub fn is_for(&self, before: bool, operation: u32) -> bool {
        (self.data.tg_event & pg_sys::TRIGGER_EVENT_BEFORE != 0) == before
            && self.data.tg_event & pg_sys::TRIGGER_EVENT_OPMASK == operation
    }
}

/// Rows as they are stored.
pub fn stored() -> Source {
    Source { encoding: Encoding::of_database(), stored: true }
}

/// Above this a moved row keeps its TOASTed values as they are, unchanged for the log: a row is formed in one piece of
/// memory, and the application's UPDATE must not fail for our sake.
const LARGEST_FLATTENED: usize = 256 << 20;

/// Whether the new row has TOASTed values that should go into the log once more: the tenant that the row moves to has no
/// older version that an unchanged value could be taken from.
///
/// # Safety
/// The fields are the new row's.
pub unsafe fn should_flatten(new: pg_sys::HeapTuple, layout: &Layout, fields: &[Field]) -> bool {
    // SAFETY: by the caller; fields of an attribute of length -1 are varlenas.
    unsafe {
        if !tuple::has_external((*new).t_data) {
            return false;
        }
        let varlenas = fields.iter().zip(&layout.atts).filter(|(_, att)| att.len == -1);
        let size: usize = varlenas
            .filter(|(f, _)| !f.is_null() && !f.is_missing())
            .map(|(f, _)| match tuple::varlena(f.ptr()) {
                Varlena::OnDisk(p) => tuple::size_on_disk(p),
                _ => 0,
            })
            .sum();
        (1..=LARGEST_FLATTENED).contains(&size)
    }
}

/// The kind of a tenant column's value.
pub fn kind_of(found: Found) -> TenantKind {
    if found == Found::Null { TenantKind::Unassigned } else { TenantKind::Normal }
}

/// # Safety
/// The relation is open.
unsafe fn table(relation: pg_sys::Relation) -> Rc<Table> {
    CACHE.with_borrow_mut(|cache| {
        let cache = cache.get_or_insert_with(|| Cache {
            inbox: Inbox::subscribe(),
            last: None,
            tables: HashMap::new(),
            // SAFETY: lives as long as the session.
            outputs: Outputs::new(unsafe { pg_sys::CacheMemoryContext }),
        });
        if let Some(news) = cache.inbox.take() {
            cache.last = None;
            cache.tables.retain(|_, t| !t.related.iter().any(|r| news.concerns(*r)));
        }
        // SAFETY: the relation is open; the root is closed below.
        unsafe {
            let relid = (*relation).rd_id;
            if let Some((last, known)) = &cache.last
                && *last == relid.to_u32()
            {
                return known.clone();
            }
            if let Some(known) = cache.tables.get(&relid.to_u32()) {
                cache.last = Some((relid.to_u32(), known.clone()));
                return known.clone();
            }
            let ancestors = compat::partition_ancestors(relation);
            let root_oid = ancestors.last().copied().unwrap_or(relid);
            let root = pg_sys::RelationIdGetRelation(root_oid);
            if root.is_null() {
                pgrx::error!("the partitioned table of this partition does not exist any more");
            }
            let layout = Layout::of(relation, root, &mut cache.outputs, Encoding::of_database());
            pg_sys::RelationClose(root);
            let key_needs_settings = layout.key.iter().any(|k| !layout.columns[usize::from(*k)].output.is_fixed());
            let key_width = layout.key.iter().map(|k| layout.columns[usize::from(*k)].field + 1).max().unwrap_or(0);
            let related = std::iter::once(relid).chain(ancestors).map(|r| r.to_u32()).collect();
            let table = Rc::new(Table { layout, root: root_oid.to_u32(), related, key_needs_settings, key_width });
            cache.tables.insert(relid.to_u32(), table.clone());
            table
        }
    })
}
