//! The common case, which pays for nothing else: the parents that a row refers to are known to this transaction, locked, and
//! no parent at all is moving, changing, leaving or missing. Then the answer of [`resolve::tenants`](super::resolve::tenants)
//! is what it has remembered, whoever wrote the row's version.

use super::Owner;
use super::state;
use crate::row_trigger::{Call, LARGEST_KEPT};
use crate::tuple::Field;
use pgrx::pg_sys;
use std::cell::RefCell;
use std::rc::Rc;

/// Whose a row was and will be.
pub type Owners = (Option<Rc<Owner>>, Option<Rc<Owner>>);

/// Memory that one row leaves to the next. Taken while it is used.
#[derive(Default)]
struct Scratch {
    fields: Vec<Field>,
    old: Vec<u8>,
    new: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `None`: look closer.
///
/// # Safety
/// The tuples are of the trigger's relation.
pub unsafe fn tenants(
    call: &Call<'_>,
    old: Option<pg_sys::HeapTuple>,
    new: Option<pg_sys::HeapTuple>,
) -> Option<Owners> {
    let edge = state::with(|s| s.quiet_edge(call.table.root))?;
    let mut scratch = SCRATCH.take();
    let Scratch { fields, old: was, new: is } = &mut scratch;
    let mut put = |id: &mut Vec<u8>, tuple: Option<pg_sys::HeapTuple>| {
        // SAFETY: by the caller.
        tuple.is_none_or(|t| unsafe { edge.put_id(id, fields, &call.table, t) })
    };
    let are_there = put(was, old) && put(is, new);
    let owners = state::with(|s| {
        if !are_there {
            return None;
        }
        let old_owner = match old {
            Some(_) => Some(s.cached(was)?),
            None => None,
        };
        let new_owner = match new {
            Some(_) if old.is_some() && was == is => old_owner.clone(),
            Some(_) => Some(s.cached(is)?),
            None => None,
        };
        Some((old_owner, new_owner))
    });
    if scratch.old.capacity() + scratch.new.capacity() <= LARGEST_KEPT {
        SCRATCH.set(scratch);
    }
    owners
}
