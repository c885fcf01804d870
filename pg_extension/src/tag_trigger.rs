//! `coffer._tag()`: the trigger that says in the log whose the row is that is about to be deleted or to move.
//!
//! For tables whose replica identity does not hold the tenant column. It runs BEFORE DELETE, and BEFORE UPDATE when the
//! tenant changes, last of all triggers, so that its message stands right before the change that it is about. The key
//! in it is rendered by the code that the plugin renders the change with: the plugin compares bytes.

use crate::claim;
use crate::compat;
use crate::row_trigger::{self, Call, Owner};
use crate::tuple;
use coffer_wire::tag::TagOp;
use pgrx::pg_guard;
use pgrx::pg_sys;

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
        let (first, second) = (call.data.tg_trigtuple, call.data.tg_newtuple);
        let column = call.tenant_column();
        let name = [call.table.layout.columns[column].name.clone()];
        let owner = |tuple| Owner::of(call.texts(tuple, &name).and_then(|mut t| t.pop()));
        match call.before() {
            Some(TagOp::Delete) => {
                let was = owner(first);
                claim::compare(&call, Some(&was), None);
                call.write_tag(TagOp::Delete, first, Some(&was), None);
                pg_sys::Datum::from(first)
            }
            Some(TagOp::Update) => {
                let (was, is) = (owner(first), owner(second));
                claim::compare(&call, Some(&was), Some(&is));
                call.write_tag(TagOp::Update, first, Some(&was), Some(&is));
                let mut fields = Vec::new();
                tuple::fields_of((*second).t_data, &call.table.layout.atts, &mut fields);
                if row_trigger::should_flatten(second, &call.table.layout, &fields) {
                    return pg_sys::Datum::from(compat::flattened(second, (*call.data.tg_relation).rd_att));
                }
                pg_sys::Datum::from(second)
            }
            _ => pgrx::error!("coffer._tag is for BEFORE DELETE and BEFORE UPDATE of rows"),
        }
    }
}

pgrx::extension_sql!(
    r#"
CREATE FUNCTION coffer._tag() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'coffer_tag';
"#,
    name = "tag_trigger",
);
