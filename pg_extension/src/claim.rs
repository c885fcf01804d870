//! What the session says of itself: the setting `coffer.tenant`, and the alarm when a row is another tenant's.
//!
//! The setting is defined here, so that the server keeps its value in a variable of ours through SET LOCAL, savepoints and
//! whatever else changes it: reading it costs nothing. It has to be asked for at every row.

use crate::encoding::Encoding;
use crate::row_trigger::{Call, Owner};
use crate::wal_message;
use coffer_wire::TenantKind;
use pgrx::pg_sys;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::ptr::null;
use std::sync::atomic::{AtomicPtr, Ordering};

static SETTING: AtomicPtr<c_char> = AtomicPtr::new(std::ptr::null_mut());

thread_local! {
    /// By table: under which (sub)transaction it was told last.
    static TOLD: RefCell<HashMap<u32, pg_sys::TransactionId>> = RefCell::default();
}

/// Takes the setting over, with the value that it may have already.
pub fn define() {
    // SAFETY: the texts are constants that end with NUL; the variable lives as long as the process, which has one thread.
    unsafe {
        pg_sys::DefineCustomStringVariable(
            c"coffer.tenant".as_ptr(),
            c"The tenant that this session works for.".as_ptr(),
            null(),
            SETTING.as_ptr(),
            null(),
            pg_sys::GucContext::PGC_USERSET,
            0,
            None,
            None,
            None,
        );
    }
}

/// What the session says, in UTF-8.
pub fn tenant<'a>() -> Option<Cow<'a, [u8]>> {
    let value = SETTING.load(Ordering::Relaxed);
    if value.is_null() {
        return None;
    }
    // SAFETY: ends with NUL, and is not set while a trigger function of ours reads it.
    let text = unsafe { CStr::from_ptr(value) }.to_bytes();
    (!text.is_empty()).then(|| Encoding::of_database().convert(text))
}

/// Tells the agent when the session says another tenant than the one that a row was, or will be: once per transaction and
/// table, however many rows there are.
pub fn compare(call: &Call<'_>, old: Option<&Owner>, new: Option<&Owner>) {
    let Some(said) = tenant() else { return };
    let other = |o: &Owner| o.kind == TenantKind::Normal && o.key != *said;
    if old.is_some_and(other) || new.is_some_and(other) {
        tell(call.table.root);
    }
}

fn tell(table: u32) {
    // What was told under a savepoint that was rolled back is not in the log: that is no transaction of ours any more.
    // SAFETY: inside a transaction.
    let told = |by| unsafe { pg_sys::TransactionIdIsCurrentTransactionId(by) };
    if TOLD.with_borrow(|t| t.get(&table).is_some_and(|by| told(*by))) {
        return;
    }
    wal_message::write_marker("claim", format!("{{\"relid\":{table}}}").as_bytes());
    // SAFETY: inside a transaction, which has had an id since the marker.
    let by = unsafe { pg_sys::GetCurrentTransactionId() };
    TOLD.with_borrow_mut(|t| t.insert(table, by));
}
