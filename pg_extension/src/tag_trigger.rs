//! `coffer._tag()`: the trigger that says in the log whose the row is that is about to be deleted or to move.
//!
//! For tables whose replica identity does not hold the tenant column. It runs BEFORE DELETE, and BEFORE UPDATE when the
//! tenant changes, last of all triggers, so that its message stands right before the change that it is about. The key
//! in it is rendered by the code that the plugin renders the change with: the plugin compares bytes.

use crate::compat;
use crate::layout::{Identity, Layout};
use crate::row_trigger::{self, Call};
use crate::settings;
use crate::tuple::{self, Field, Varlena};
use crate::wal_message;
use coffer_wire::tag::{self, Tag, TagOp, TagTenant};
use pgrx::pg_guard;
use pgrx::pg_sys;

/// Above this a moved row keeps its TOASTed values as they are, unchanged for the log: a row is formed in one piece of
/// memory, and the application's UPDATE must not fail for our sake.
const LARGEST_FLATTENED: usize = 256 << 20;

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
    // SAFETY: the tuples are of the trigger's relation; the new one is given for an update.
    unsafe {
        let call = Call::of(fcinfo, "_tag");
        let data = call.data;
        let mut fields = Vec::new();
        if call.is_for(true, pg_sys::TRIGGER_EVENT_DELETE) {
            write(&call, TagOp::Delete, &mut fields);
            pg_sys::Datum::from(data.tg_trigtuple)
        } else if call.is_for(true, pg_sys::TRIGGER_EVENT_UPDATE) {
            write(&call, TagOp::Update, &mut fields);
            if should_flatten(data.tg_newtuple, &call.table.layout, &fields) {
                return pg_sys::Datum::from(compat::flattened(data.tg_newtuple, (*data.tg_relation).rd_att));
            }
            pg_sys::Datum::from(data.tg_newtuple)
        } else {
            pgrx::error!("coffer._tag is for BEFORE DELETE and BEFORE UPDATE of rows")
        }
    }
}

/// Writes the tag. `fields` are the new row's afterwards, if there is one.
unsafe fn write(call: &Call<'_>, op: TagOp, fields: &mut Vec<Field>) {
    let layout = &call.table.layout;
    let source = row_trigger::stored();
    let (mut key, mut old_tenant, mut new_tenant) = (Vec::new(), Vec::new(), Vec::new());
    // SAFETY: by the caller.
    unsafe {
        let pinned = if call.table.key_needs_settings { settings::pin() } else { None };
        tuple::fields_of((*call.data.tg_trigtuple).t_data, &layout.atts, fields);
        if layout.identity == Identity::Key {
            layout.put_key(&mut key, fields, source);
        }
        let old_kind = row_trigger::kind_of(layout.put_plain(&mut old_tenant, call.tenant, fields, source));
        let mut new_kind = None;
        if op == TagOp::Update {
            tuple::fields_of((*call.data.tg_newtuple).t_data, &layout.atts, fields);
            new_kind = Some(row_trigger::kind_of(layout.put_plain(&mut new_tenant, call.tenant, fields, source)));
        }
        settings::unpin(pinned);
        let tag = Tag {
            relid: (*call.data.tg_relation).rd_id.to_u32(),
            op,
            key: &key,
            old: Some(TagTenant { kind: old_kind, key: &old_tenant }),
            new: new_kind.map(|kind| TagTenant { kind, key: &new_tenant }),
        };
        wal_message::write(&tag::encode_tag(&wal_message::mac_key(), &tag));
    }
}

/// Whether the new row has TOASTed values that should go into the log once more: the tenant that the row moves to has no
/// older version that an unchanged value could be taken from.
unsafe fn should_flatten(new: pg_sys::HeapTuple, layout: &Layout, fields: &[Field]) -> bool {
    // SAFETY: the fields are the new row's; those of an attribute of length -1 are varlenas.
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

pgrx::extension_sql!(
    r#"
CREATE FUNCTION coffer._tag() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'coffer_tag';
"#,
    name = "tag_trigger",
);
