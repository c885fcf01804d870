//! `coffer._tag()`: the trigger that says in the log whose the row is that is about to be deleted or to move.
//!
//! For tables whose replica identity does not hold the tenant column. It runs BEFORE DELETE, and BEFORE UPDATE when the
//! tenant changes, last of all triggers, so that its message stands right before the change that it is about. The key
//! in it is rendered by the code that the plugin renders the change with: the plugin compares bytes.

use crate::compat;
use crate::encoding::Encoding;
use crate::invalidation::Inbox;
use crate::layout::{Identity, Layout};
use crate::render::{Found, Outputs, Source};
use crate::settings;
use crate::tuple::{self, Att, Field, Varlena};
use crate::wal_message;
use coffer_wire::TenantKind;
use coffer_wire::tag::{self, Tag, TagOp, TagTenant};
use pgrx::pg_guard;
use pgrx::pg_sys;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::rc::Rc;

/// Above this a moved row keeps its TOASTed values as they are, unchanged for the log: a row is formed in one piece of
/// memory, and the application's UPDATE must not fail for our sake.
const LARGEST_FLATTENED: usize = 256 << 20;

/// What is known of a table with the trigger.
struct Tagged {
    layout: Layout,
    /// The table and those above it.
    related: Vec<u32>,
    /// Whether the key needs the pinned settings.
    needs_settings: bool,
}

struct Cache {
    inbox: Inbox,
    tables: HashMap<u32, Rc<Tagged>>,
    outputs: Outputs,
    fields: Vec<Field>,
    /// What `fields` are of.
    atts: Vec<Att>,
    key: Vec<u8>,
}

thread_local! {
    static CACHE: RefCell<Option<Cache>> = const { RefCell::new(None) };
}

#[doc(hidden)]
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_coffer_tag() -> *const pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// The trigger function. Its argument is the tenant column's name.
///
/// # Safety
/// Called by the server.
#[pg_guard]
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn coffer_tag(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: a call as a trigger has its data in the context; whether it is one is checked first.
    unsafe {
        let data = (*fcinfo).context.cast::<pg_sys::TriggerData>();
        if data.is_null() || (*data).type_ != pg_sys::NodeTag::T_TriggerData {
            pgrx::error!("coffer._tag is a trigger function, for BEFORE DELETE and BEFORE UPDATE of rows");
        }
        let data = &*data;
        let event = data.tg_event;
        let of_row = event & pg_sys::TRIGGER_EVENT_ROW != 0 && event & pg_sys::TRIGGER_EVENT_BEFORE != 0;
        let (op, mut result) = match event & pg_sys::TRIGGER_EVENT_OPMASK {
            pg_sys::TRIGGER_EVENT_DELETE if of_row => (TagOp::Delete, data.tg_trigtuple),
            pg_sys::TRIGGER_EVENT_UPDATE if of_row => (TagOp::Update, data.tg_newtuple),
            _ => pgrx::error!("coffer._tag is for BEFORE DELETE and BEFORE UPDATE of rows"),
        };
        if (*data.tg_trigger).tgnargs != 1 {
            pgrx::error!("coffer._tag takes the tenant column's name");
        }
        let column = CStr::from_ptr(*(*data.tg_trigger).tgargs).to_bytes();
        CACHE.with_borrow_mut(|cache| {
            let cache = cache.get_or_insert_with(|| Cache {
                inbox: Inbox::subscribe(),
                tables: HashMap::new(),
                outputs: Outputs::new(pg_sys::CacheMemoryContext),
                fields: Vec::new(),
                atts: Vec::new(),
                key: Vec::new(),
            });
            cache.write(data.tg_relation, column, op, data.tg_trigtuple, data.tg_newtuple);
            if op == TagOp::Update && cache.should_flatten(data.tg_newtuple) {
                result = compat::flattened(result, (*data.tg_relation).rd_att);
            }
        });
        pg_sys::Datum::from(result)
    }
}

impl Cache {
    /// # Safety
    /// The relation is open, the tuples are of it; the new one is given for an update.
    unsafe fn write(
        &mut self,
        relation: pg_sys::Relation,
        column: &[u8],
        op: TagOp,
        old: pg_sys::HeapTuple,
        new: pg_sys::HeapTuple,
    ) {
        // SAFETY: by the caller.
        unsafe {
            let table = self.table(relation);
            let layout = &table.layout;
            self.atts.clone_from(&layout.atts);
            let Some(column) = layout.column_named(column) else {
                pgrx::error!("the tenant column \"{}\" does not exist any more", String::from_utf8_lossy(column));
            };
            let source = Source { encoding: Encoding::of_database(), stored: true };
            let pinned = if table.needs_settings { settings::pin() } else { None };
            tuple::fields_of((*old).t_data, &layout.atts, &mut self.fields);
            self.key.clear();
            if layout.identity == Identity::Key {
                layout.put_key(&mut self.key, &self.fields, source);
            }
            let mut old_tenant = Vec::new();
            let mut new_tenant = Vec::new();
            let old_kind = tenant(layout.put_plain(&mut old_tenant, column, &self.fields, source));
            let mut new_kind = None;
            if op == TagOp::Update {
                tuple::fields_of((*new).t_data, &layout.atts, &mut self.fields);
                new_kind = Some(tenant(layout.put_plain(&mut new_tenant, column, &self.fields, source)));
            }
            settings::unpin(pinned);
            let tag = Tag {
                relid: (*relation).rd_id.to_u32(),
                op,
                key: &self.key,
                old: Some(TagTenant { kind: old_kind, key: &old_tenant }),
                new: new_kind.map(|kind| TagTenant { kind, key: &new_tenant }),
            };
            wal_message::write(&tag::encode_tag(&wal_message::mac_key(), &tag));
        }
    }

    /// Whether the new row, whose fields were found last, has TOASTed values that should go into the log once more: the
    /// tenant that the row moves to has no older version that an unchanged value could be taken from.
    ///
    /// # Safety
    /// The tuple is the new row.
    unsafe fn should_flatten(&self, new: pg_sys::HeapTuple) -> bool {
        // SAFETY: by the caller; fields of an attribute of length -1 are varlenas.
        unsafe {
            if !tuple::has_external((*new).t_data) {
                return false;
            }
            let varlenas = self.fields.iter().zip(&self.atts).filter(|(_, att)| att.len == -1);
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

    unsafe fn table(&mut self, relation: pg_sys::Relation) -> Rc<Tagged> {
        if let Some(news) = self.inbox.take() {
            self.tables.retain(|_, t| !t.related.iter().any(|r| news.concerns(*r)));
        }
        // SAFETY: the relation is open; the root is closed below.
        unsafe {
            let relid = (*relation).rd_id;
            if let Some(known) = self.tables.get(&relid.to_u32()) {
                return known.clone();
            }
            let ancestors = compat::partition_ancestors(relid);
            let root_oid = ancestors.last().copied().unwrap_or(relid);
            let root = pg_sys::RelationIdGetRelation(root_oid);
            if root.is_null() {
                pgrx::error!("the partitioned table of this partition does not exist any more");
            }
            let layout = Layout::of(relation, root, &mut self.outputs, Encoding::of_database());
            pg_sys::RelationClose(root);
            let needs_settings = layout.key.iter().any(|k| !layout.columns[usize::from(*k)].output.is_fixed());
            let related = std::iter::once(relid).chain(ancestors).map(|r| r.to_u32()).collect();
            let table = Rc::new(Tagged { layout, related, needs_settings });
            self.tables.insert(relid.to_u32(), table.clone());
            table
        }
    }
}

fn tenant(found: Found) -> TenantKind {
    if found == Found::Null { TenantKind::Unassigned } else { TenantKind::Normal }
}

pgrx::extension_sql!(
    r#"
CREATE FUNCTION coffer._tag() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'coffer_tag';
"#,
    name = "tag_trigger",
);
