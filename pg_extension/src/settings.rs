//! The settings that decide how values look as text. The plugin pins them, so that a walsender, a session that peeks and
//! the agent's own sessions render the same bytes.

use pgrx::pg_sys;
use std::ffi::CStr;

const PINNED: &[(&CStr, &CStr)] = &[
    (c"datestyle", c"ISO, MDY"),
    (c"intervalstyle", c"postgres"),
    (c"extra_float_digits", c"3"),
    (c"bytea_output", c"hex"),
    (c"timezone", c"UTC"),
    (c"search_path", c""),
    (c"xmloption", c"content"),
    (c"lc_monetary", c"C"),
];

/// Pins the settings. Inside a transaction what was there before comes back with [`unpin`], or when the transaction
/// fails; a walsender has none at this point and keeps them for its session.
pub fn pin() -> Option<i32> {
    // SAFETY: names and values are constants that end with NUL; an error in between ends the transaction, which undoes
    // the nest level.
    unsafe {
        let level = pg_sys::IsTransactionState().then(|| pg_sys::NewGUCNestLevel());
        let action = match level {
            Some(_) => pg_sys::GucAction::GUC_ACTION_SAVE,
            None => pg_sys::GucAction::GUC_ACTION_SET,
        };
        for (name, value) in PINNED {
            pg_sys::set_config_option(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                action,
                true,
                0,
                false,
            );
        }
        level
    }
}

/// Makes names mean what they mean in `pg_catalog`, inside a transaction; the same comes back.
pub fn pin_search_path() -> i32 {
    // SAFETY: as in `pin`.
    unsafe {
        let level = pg_sys::NewGUCNestLevel();
        pg_sys::set_config_option(
            c"search_path".as_ptr(),
            c"pg_catalog, pg_temp".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
        level
    }
}

/// Gives back what [`pin`] saved.
pub fn unpin(level: Option<i32>) {
    if let Some(level) = level {
        // SAFETY: the level was opened by `pin` in the same call of a SQL function.
        unsafe { pg_sys::AtEOXact_GUC(false, level) };
    }
}
