//! What the session says of itself: the setting `coffer.tenant`, and the alarm when a row is another tenant's.
//!
//! The setting is not defined here, and is asked for by its name at every row: to define it would turn what
//! `current_setting('coffer.tenant', true)` says from NULL to an empty text in the middle of the statement that happens to
//! load the library, under the application's own policies and defaults.

use crate::encoding::Encoding;
use crate::row_trigger::{Call, Owner};
use crate::wal_message;
use coffer_wire::TenantKind;
use pgrx::pg_sys;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;

thread_local! {
    /// By table: under which (sub)transaction it was told last.
    static TOLD: RefCell<HashMap<u32, pg_sys::TransactionId>> = RefCell::default();
}

/// What the session says, in UTF-8.
pub fn tenant() -> Option<Vec<u8>> {
    said().map(|text| Encoding::of_database().convert(text).into_owned())
}

/// The same in the database's encoding. Right until the setting changes.
fn said<'a>() -> Option<&'a [u8]> {
    // SAFETY: the name ends with NUL, and so does the answer, which lives as long as the setting has this value.
    unsafe {
        let value = pg_sys::GetConfigOption(c"coffer.tenant".as_ptr(), true, false);
        if value.is_null() {
            return None;
        }
        let text = CStr::from_ptr(value).to_bytes();
        (!text.is_empty()).then_some(text)
    }
}

/// Tells the agent when the session says another tenant than the one that a row was, or will be: once per transaction and
/// table, however many rows there are.
pub fn compare(call: &Call<'_>, old: Option<&Owner>, new: Option<&Owner>) {
    let Some(said) = said() else { return };
    // To convert it might raise an error, in a statement that never asked for the setting.
    if matches!(Encoding::of_database(), Encoding::Other(_)) && !said.is_ascii() {
        return;
    }
    let other = |o: &Owner| o.kind == TenantKind::Normal && o.key != said;
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
