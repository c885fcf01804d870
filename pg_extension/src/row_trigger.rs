//! What the trigger functions share: the call, and the layout of the table, cached per session.

use crate::compat;
use crate::encoding::Encoding;
use crate::invalidation::Inbox;
use crate::layout::Layout;
use crate::render::{Found, Outputs, Source};
use coffer_wire::TenantKind;
use pgrx::pg_sys;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::rc::Rc;

/// A table with a trigger of ours.
pub struct Table {
    pub layout: Layout,
    /// The table and those above it.
    related: Vec<u32>,
    /// Whether the key needs the pinned settings.
    pub key_needs_settings: bool,
}

struct Cache {
    inbox: Inbox,
    tables: HashMap<u32, Rc<Table>>,
    outputs: Outputs,
}

thread_local! {
    static CACHE: RefCell<Option<Cache>> = const { RefCell::new(None) };
}

/// The call of a trigger function for a row, with the tenant column's name as its argument.
pub struct Call<'a> {
    pub data: &'a pg_sys::TriggerData,
    pub table: Rc<Table>,
    /// The tenant column, as an index into the layout's columns.
    pub tenant: usize,
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
            if data.tg_event & pg_sys::TRIGGER_EVENT_ROW == 0 || (*data.tg_trigger).tgnargs != 1 {
                pgrx::error!("coffer.{name} is for rows and takes the tenant column's name");
            }
            let column = CStr::from_ptr(*(*data.tg_trigger).tgargs).to_bytes();
            let table = table(data.tg_relation);
            let Some(tenant) = table.layout.column_named(column) else {
                pgrx::error!("the tenant column \"{}\" does not exist any more", String::from_utf8_lossy(column));
            };
            Self { data, table, tenant }
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
            tables: HashMap::new(),
            // SAFETY: lives as long as the session.
            outputs: Outputs::new(unsafe { pg_sys::CacheMemoryContext }),
        });
        if let Some(news) = cache.inbox.take() {
            cache.tables.retain(|_, t| !t.related.iter().any(|r| news.concerns(*r)));
        }
        // SAFETY: the relation is open; the root is closed below.
        unsafe {
            let relid = (*relation).rd_id;
            if let Some(known) = cache.tables.get(&relid.to_u32()) {
                return known.clone();
            }
            let ancestors = compat::partition_ancestors(relid);
            let root_oid = ancestors.last().copied().unwrap_or(relid);
            let root = pg_sys::RelationIdGetRelation(root_oid);
            if root.is_null() {
                pgrx::error!("the partitioned table of this partition does not exist any more");
            }
            let layout = Layout::of(relation, root, &mut cache.outputs, Encoding::of_database());
            pg_sys::RelationClose(root);
            let key_needs_settings = layout.key.iter().any(|k| !layout.columns[usize::from(*k)].output.is_fixed());
            let related = std::iter::once(relid).chain(ancestors).map(|r| r.to_u32()).collect();
            let table = Rc::new(Table { layout, related, key_needs_settings });
            cache.tables.insert(relid.to_u32(), table.clone());
            table
        }
    })
}
