//! The strategy `path`: a row belongs to the tenant of the row that its foreign key leads to.
//!
//! `coffer._path()` runs before every change of such a table, last of all triggers, and writes a tag with the tenant that
//! it finds in the parent. `coffer._parent()` runs for the parents: when one of them moves to another tenant, the rows
//! below it are written anew, as moved, by an UPDATE that changes nothing.
//!
//! What makes it exact:
//! - a parent is locked FOR KEY SHARE, kept until the transaction ends, and read once the lock is there; who moves a parent locks it FOR UPDATE before
//!   it looks for the rows below. So either the child's transaction is seen by the move, or the move by the child;
//! - the old tenant of a row is the one it was archived under. While a parent changes, `begin` to `end`, that is what the
//!   parent was before; after it was deleted by this transaction, what its last version said;
//! - a row that came before its parent (a constraint that is checked late) is nobody's until the parent comes, which
//!   then finds it. When another session brought the parent, it is found at the commit: the constraint holds then. Until
//!   then, whatever this transaction writes below that parent is nobody's, too;
//! - where the foreign key does not hold, the same is so across transactions: a row whose parent is not there stays nobody's,
//!   a parent that comes finds it, and one that goes makes its rows nobody's before the transaction commits;
//! - from the moment that a parent's deletion begins until its triggers are done, what is written below it is whose it was
//!   before: one statement may delete a parent, put another in its place, and rows below.

mod dead;
mod known;
mod plan;
mod resolve;
mod state;

use crate::claim;
use crate::compat;
use crate::row_trigger::{self, Call};
use crate::tuple;
use coffer_wire::tag::TagOp;
use pgrx::pg_guard;
use pgrx::pg_sys;
use std::ffi::CStr;

pub use dead::changed_by_us;

use crate::row_trigger::Owner;

#[doc(hidden)]
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_coffer_path() -> *const pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

#[doc(hidden)]
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_coffer_parent() -> *const pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// The trigger function of the table below.
///
/// # Safety
/// Called by the server.
#[pg_guard]
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn coffer_path(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: the tuples are of the trigger's relation; the new one is given for an update.
    unsafe {
        let call = Call::of(fcinfo, "_path");
        let Some(op) = call.before() else {
            pgrx::error!("coffer._path is for BEFORE INSERT, UPDATE and DELETE of rows")
        };
        let (first, second) = (call.data.tg_trigtuple, call.data.tg_newtuple);
        let (old, new) = match op {
            TagOp::Insert => (None, Some(first)),
            TagOp::Update => (Some(first), Some(second)),
            TagOp::Delete => (Some(first), None),
        };
        let key_row = old.or(new).unwrap_or(first);
        let moves = if let Some((was, is)) = known::tenants(&call, old, new) {
            claim::compare(&call, was.as_deref(), is.as_deref());
            call.write_tag(op, key_row, was.as_deref(), is.as_deref());
            was != is
        } else {
            if resolve::stays(&call, old) {
                return pg_sys::Datum::from(0usize);
            }
            let (was, is) = resolve::tenants(&call, old, new);
            if !resolve::is_ours(&call) {
                claim::compare(&call, was.as_ref(), is.as_ref());
            }
            call.write_tag(op, key_row, was.as_ref(), is.as_ref());
            if op == TagOp::Update {
                resolve::own_row_moved(&call, second);
            }
            was != is
        };
        if op == TagOp::Update && moves {
            let mut fields = Vec::new();
            tuple::fields_of((*second).t_data, &call.table.layout.atts, &mut fields);
            if row_trigger::should_flatten(second, &call.table.layout, &fields) {
                return pg_sys::Datum::from(compat::flattened(second, (*call.data.tg_relation).rd_att));
            }
        }
        pg_sys::Datum::from(if op == TagOp::Update { second } else { first })
    }
}

/// The trigger function of the table above. Its first argument says when it is called.
///
/// # Safety
/// Called by the server.
#[pg_guard]
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn coffer_parent(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: the tuples are of the trigger's relation; the new one is given for an update.
    unsafe {
        let call = Call::of(fcinfo, "_parent");
        let trigger = &*call.data.tg_trigger;
        if trigger.tgnargs < 1 {
            pgrx::error!("coffer._parent takes a word that says when it is called");
        }
        let (first, second) = (call.data.tg_trigtuple, call.data.tg_newtuple);
        match CStr::from_ptr(*trigger.tgargs).to_bytes() {
            b"begin" => {
                resolve::parent_begins(&call, first);
                return pg_sys::Datum::from(second);
            }
            b"leaves" => {
                resolve::parent_leaves(&call, first);
                return pg_sys::Datum::from(first);
            }
            b"moved" => resolve::parent_changed(&call, first, second),
            b"end" => resolve::parent_ends(&call, first),
            b"new" => resolve::parent_comes(&call, first),
            b"gone" => resolve::parent_goes(&call, first, false),
            b"replaced" => resolve::parent_goes(&call, first, true),
            other => pgrx::error!("coffer._parent does not know \"{}\"", String::from_utf8_lossy(other)),
        }
        pg_sys::Datum::from(0usize)
    }
}

pgrx::extension_sql!(
    r#"
CREATE FUNCTION coffer._path() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'coffer_path';
CREATE FUNCTION coffer._parent() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'coffer_parent';
"#,
    name = "path_triggers",
);
