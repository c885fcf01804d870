//! The small functions that SQL cannot do by itself. The extension's SQL calls them; nobody else may (see sql/).

use crate::catalog;
use crate::wal_message;
use pgrx::prelude::*;
use rand::TryRng;

/// Invalidates the relation cache entry of `relid` everywhere, the plugin's included, at this point of the log; 0 means
/// every relation. Whatever changes a rule calls it in the same transaction.
#[pg_extern(
    strict,
    volatile,
    sql = r#"
CREATE FUNCTION coffer._invalidate(relid oid) RETURNS void
    STRICT VOLATILE LANGUAGE c AS 'MODULE_PATHNAME', '_invalidate_wrapper';
"#
)]
fn _invalidate(relid: pg_sys::Oid) {
    // SAFETY: both only queue messages; a relation that does not exist raises an error.
    unsafe {
        if relid == pg_sys::InvalidOid {
            pg_sys::CacheInvalidateRelcacheAll();
        } else {
            pg_sys::CacheInvalidateRelcacheByRelid(relid);
        }
    }
}

/// Writes a marker into this transaction's log. The result is the position after the message.
#[pg_extern(
    strict,
    volatile,
    sql = r#"
CREATE FUNCTION coffer._marker(kind text, payload bytea) RETURNS pg_lsn
    STRICT VOLATILE LANGUAGE c AS 'MODULE_PATHNAME', '_marker_wrapper';
"#
)]
fn _marker(kind: &str, payload: &[u8]) -> i64 {
    wal_message::write_marker(kind, payload) as i64
}

/// Writes a flushed marker `wait` outside the transaction: an idle server's log moves past what somebody waits for. The
/// result is the position after the message.
#[pg_extern(
    volatile,
    sql = r#"
CREATE FUNCTION coffer._wake() RETURNS pg_lsn
    VOLATILE LANGUAGE c AS 'MODULE_PATHNAME', '_wake_wrapper';
"#
)]
fn _wake() -> i64 {
    wal_message::write_flushed_marker("wait") as i64
}

/// `n` random bytes from the operating system.
#[pg_extern(
    strict,
    volatile,
    sql = r#"
CREATE FUNCTION coffer._random(n int) RETURNS bytea
    STRICT VOLATILE LANGUAGE c AS 'MODULE_PATHNAME', '_random_wrapper';
"#
)]
fn _random(n: i32) -> Vec<u8> {
    let Some(n) = usize::try_from(n).ok().filter(|n| *n <= 1024) else {
        error!("coffer._random gives 0 to 1024 bytes, not {n}");
    };
    let mut bytes = vec![0; n];
    if let Err(e) = rand::rngs::SysRng.try_fill_bytes(&mut bytes) {
        error!("the operating system has no random bytes: {e}");
    }
    bytes
}

/// Which cluster this is: a number that `pg_upgrade` changes and nothing else does that keeps the data.
#[pg_extern(sql = false)]
fn _system_id() -> i64 {
    catalog::system_id()
}

// Before everything that is not plpgsql: a view calls it.
extension_sql!(
    r#"
CREATE FUNCTION coffer._system_id() RETURNS int8
    STABLE PARALLEL SAFE LANGUAGE c AS 'MODULE_PATHNAME', '_system_id_wrapper';
"#,
    name = "system_id",
    requires = ["tables"],
);
