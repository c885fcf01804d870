//! The strategy `session`: a row belongs to the tenant that the setting `coffer.tenant` named when it was inserted.
//!
//! `coffer._session()` runs before every change, last of all triggers, and writes the tag; and after it, to keep in
//! `coffer.session_rows` whose each row is. What is kept there wins over what a later session says, which is then told to
//! the agent as a contradiction.

use crate::catalog;
use crate::claim;
use crate::row_trigger::{Call, Owner};
use crate::spi::Plan;
use coffer_wire::tag::TagOp;
use pgrx::pg_guard;
use pgrx::pg_sys;
use std::cell::RefCell;
use std::fmt::Write;
use std::rc::Rc;

struct Plans {
    whose: Plan,
    put: Plan,
    remove: Plan,
}

thread_local! {
    static PLANS: RefCell<Option<Rc<Plans>>> = const { RefCell::new(None) };
}

fn plans() -> Rc<Plans> {
    if let Some(p) = PLANS.with_borrow(Clone::clone) {
        return p;
    }
    let Some(owner) = catalog::owner() else { pgrx::error!("the extension pg_coffer is not fully installed here") };
    // Run under the session's search_path: no name in them may mean anything else.
    let plan = |statement: &str, n| Plan::new(statement.as_bytes(), n, owner);
    let plans = Rc::new(Plans {
        whose: plan(
            "SELECT s.tenant FROM coffer.session_rows s WHERE s.relid OPERATOR(pg_catalog.=) $1::pg_catalog.oid \
             AND s.key OPERATOR(pg_catalog.=) $2",
            2,
        ),
        put: plan(
            "INSERT INTO coffer.session_rows AS s (relid, key, tenant) VALUES ($1::pg_catalog.oid, $2, $3) \
             ON CONFLICT (relid, key) DO UPDATE SET tenant = excluded.tenant",
            3,
        ),
        remove: plan(
            "DELETE FROM coffer.session_rows s WHERE s.relid OPERATOR(pg_catalog.=) $1::pg_catalog.oid \
             AND s.key OPERATOR(pg_catalog.=) $2",
            2,
        ),
    });
    PLANS.set(Some(plans.clone()));
    plans
}

#[doc(hidden)]
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_coffer_session() -> *const pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// The trigger function.
///
/// # Safety
/// Called by the server.
#[pg_guard]
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn coffer_session(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: the tuples are of the trigger's relation; the new one is given for an update.
    unsafe {
        let call = Call::of(fcinfo, "_session");
        let (first, second) = (call.data.tg_trigtuple, call.data.tg_newtuple);
        let Some(op) = call.before() else {
            keep(&call, first, second);
            return pg_sys::Datum::from(0usize);
        };
        let owner = if op == TagOp::Insert { Owner::of(claim::tenant()) } else { archived(&call, first) };
        let (old, new) = match op {
            TagOp::Insert => (None, Some(&owner)),
            TagOp::Update => (Some(&owner), Some(&owner)),
            TagOp::Delete => (Some(&owner), None),
        };
        call.write_tag(op, first, old, new);
        pg_sys::Datum::from(if op == TagOp::Update { second } else { first })
    }
}

/// Whose an old row is. A session that says something else is told on.
unsafe fn archived(call: &Call<'_>, tuple: pg_sys::HeapTuple) -> Owner {
    // SAFETY: by the caller.
    let row = plans().whose.first(&[relid(call), unsafe { key(call, tuple) }]);
    let kept = row.and_then(|mut r| r.pop().flatten());
    let owner = Owner::of(kept.map(|t| crate::encoding::Encoding::of_database().convert(&t).into_owned()));
    claim::compare(call, Some(&owner), None);
    owner
}

/// After a change: keeps what it means for later ones.
unsafe fn keep(call: &Call<'_>, first: pg_sys::HeapTuple, second: pg_sys::HeapTuple) {
    let plans = plans();
    let relid = relid(call);
    // SAFETY: by the caller.
    unsafe {
        if call.is_for(false, pg_sys::TRIGGER_EVENT_INSERT) {
            match claim::tenant() {
                Some(tenant) => plans.put.change(&[relid, key(call, first), tenant]),
                // An older row with this key may have gone without a trigger, with its partition.
                None => plans.remove.change(&[relid, key(call, first)]),
            }
        } else if call.is_for(false, pg_sys::TRIGGER_EVENT_DELETE) {
            plans.remove.change(&[relid, key(call, first)]);
        } else {
            let (before, after) = (key(call, first), key(call, second));
            if before != after
                && let Some(tenant) =
                    plans.whose.first(&[relid.clone(), before.clone()]).and_then(|mut r| r.pop().flatten())
            {
                plans.remove.change(&[relid.clone(), before]);
                plans.put.change(&[
                    relid,
                    after,
                    crate::encoding::Encoding::of_database().convert(&tenant).into_owned(),
                ]);
            }
        }
    }
}

fn relid(call: &Call<'_>) -> Vec<u8> {
    call.table.root.to_string().into_bytes()
}

/// As `coffer._session_key` has it.
unsafe fn key(call: &Call<'_>, tuple: pg_sys::HeapTuple) -> Vec<u8> {
    let layout = &call.table.layout;
    let names: Vec<Vec<u8>> = layout.key.iter().map(|k| layout.columns[usize::from(*k)].name.clone()).collect();
    let mut out = String::new();
    // SAFETY: by the caller. A key column is never NULL.
    for text in unsafe { call.texts(tuple, &names) }.unwrap_or_default() {
        let text = String::from_utf8_lossy(&text);
        let _ = write!(out, "{}:{text}", text.chars().count());
    }
    out.into_bytes()
}

pgrx::extension_sql!(
    r#"
CREATE FUNCTION coffer._session() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'coffer_session';
"#,
    name = "session_trigger",
);
