//! Writing our messages into the log, and the key that authenticates them.
//!
//! The key lives in `coffer.secret`, a user catalog table, so that the plugin reads the key that was in force at the
//! point it decodes. It is kept until the relation cache entry of that table is invalidated.

use crate::catalog;
use crate::compat;
use crate::invalidation::Inbox;
use coffer_wire::tag::{self, MacKey};
use pgrx::pg_sys;
use std::cell::RefCell;

/// The prefix of our messages, as the server takes it.
pub const PREFIX: &std::ffi::CStr = c"pg_coffer";

/// The key of our messages, as far as it is known.
pub struct Secret {
    inbox: Inbox,
    known: Option<(u32, MacKey)>,
}

impl Secret {
    pub fn new() -> Self {
        Self { inbox: Inbox::subscribe(), known: None }
    }

    /// The key in force; `None` when the extension is not here.
    pub fn key(&mut self) -> Option<MacKey> {
        if let Some(news) = self.inbox.take()
            && self.known.is_some_and(|(table, _)| news.concerns(table))
        {
            self.known = None;
        }
        if self.known.is_none() {
            self.known = catalog::secret().map(|(table, key)| (table.to_u32(), key));
        }
        self.known.map(|(_, key)| key)
    }
}

thread_local! {
    static SECRET: RefCell<Option<Secret>> = const { RefCell::new(None) };
}

/// The key that messages of this session are authenticated with.
pub fn mac_key() -> MacKey {
    let key = SECRET.with_borrow_mut(|s| s.get_or_insert_with(Secret::new).key());
    match key {
        Some(key) => key,
        None => pgrx::error!("coffer.secret has no key: the extension pg_coffer is not fully installed here"),
    }
}

/// Writes a transactional message with these bytes, which already carry their MAC.
pub fn write(message: &[u8]) -> pg_sys::XLogRecPtr {
    compat::log_message(PREFIX, message, true)
}

/// Writes a marker. The result is the position after the message.
pub fn write_marker(kind: &str, payload: &[u8]) -> pg_sys::XLogRecPtr {
    write(&tag::encode_marker(&mac_key(), kind, payload))
}

/// Writes a marker that belongs to no transaction, and makes sure that it is on disk. The result is the position after
/// the message.
pub fn write_flushed_marker(kind: &str) -> pg_sys::XLogRecPtr {
    let at = compat::log_message(PREFIX, &tag::encode_marker(&mac_key(), kind, b""), false);
    // SAFETY: the position is one that the server has just given.
    unsafe { pg_sys::XLogFlush(at) };
    at
}
