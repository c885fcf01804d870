//! Every difference between the PostgreSQL versions that this library meets, and what pgrx does not declare.

use pgrx::pg_sys;
use pgrx::pg_sys::ffi::pg_guard_ffi_boundary;
use std::ffi::c_char;

#[cfg(target_endian = "big")]
compile_error!("tuples are read as little-endian machines store them");

// Not among the headers that pgrx reads. Each call goes through the guard, as pgrx does it for its own.
unsafe extern "C-unwind" {
    fn get_partition_ancestors(relid: pg_sys::Oid) -> *mut pg_sys::List;
    fn toast_flatten_tuple(tuple: pg_sys::HeapTuple, desc: pg_sys::TupleDesc) -> pg_sys::HeapTuple;
    #[cfg(any(feature = "pg15", feature = "pg16"))]
    fn LogLogicalMessage(
        prefix: *const c_char,
        message: *const c_char,
        size: usize,
        transactional: bool,
    ) -> pg_sys::XLogRecPtr;
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    fn LogLogicalMessage(
        prefix: *const c_char,
        message: *const c_char,
        size: usize,
        transactional: bool,
        flush: bool,
    ) -> pg_sys::XLogRecPtr;
}

/// Writes a logical message. A transactional one assigns a transaction id when there is none yet.
pub fn log_message(prefix: &std::ffi::CStr, message: &[u8], transactional: bool) -> pg_sys::XLogRecPtr {
    let (text, size) = (message.as_ptr().cast(), message.len());
    // SAFETY: the prefix ends with a NUL, the message has `size` bytes; the server copies both.
    unsafe {
        pg_guard_ffi_boundary(|| {
            #[cfg(any(feature = "pg15", feature = "pg16"))]
            let at = LogLogicalMessage(prefix.as_ptr(), text, size, transactional);
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            let at = LogLogicalMessage(prefix.as_ptr(), text, size, transactional, false);
            at
        })
    }
}

/// The tables above a partition, nearest first; empty for a table that is no partition.
///
/// # Safety
/// The relation is open.
pub unsafe fn partition_ancestors(relation: pg_sys::Relation) -> Vec<pg_sys::Oid> {
    // SAFETY: the relation is open; the list is a list of OIDs in the current memory context.
    unsafe {
        // The server's function takes what a table inherits from for its partitioned table.
        if !(*(*relation).rd_rel).relispartition {
            return Vec::new();
        }
        let relid = (*relation).rd_id;
        let list = pg_guard_ffi_boundary(|| get_partition_ancestors(relid));
        if list.is_null() {
            return Vec::new();
        }
        (0..(*list).length).map(|i| (*(*list).elements.add(i as usize)).oid_value).collect()
    }
}

/// A copy of the tuple with the TOASTed values in it.
///
/// # Safety
/// The tuple is of a relation with this descriptor.
pub unsafe fn flattened(tuple: pg_sys::HeapTuple, desc: pg_sys::TupleDesc) -> pg_sys::HeapTuple {
    // SAFETY: by the caller.
    unsafe { pg_guard_ffi_boundary(|| toast_flatten_tuple(tuple, desc)) }
}

/// One attribute of a tuple descriptor.
///
/// # Safety
/// `desc` is a valid descriptor and `i` below its `natts`.
pub unsafe fn attribute<'a>(desc: pg_sys::TupleDesc, i: usize) -> &'a pg_sys::FormData_pg_attribute {
    // SAFETY: by the caller; from 18 on the attributes stand behind the compact ones.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16", feature = "pg17"))]
        let attrs = (*desc).attrs.as_ptr();
        #[cfg(feature = "pg18")]
        let attrs = (*desc).compact_attrs.as_ptr().add((*desc).natts as usize).cast::<pg_sys::FormData_pg_attribute>();
        &*attrs.add(i)
    }
}

/// A changed row's tuple header, as logical decoding hands it over.
#[cfg(any(feature = "pg15", feature = "pg16"))]
pub type ChangeTuple = *mut pg_sys::ReorderBufferTupleBuf;
/// A changed row's tuple header, as logical decoding hands it over.
#[cfg(any(feature = "pg17", feature = "pg18"))]
pub type ChangeTuple = pg_sys::HeapTuple;

/// # Safety
/// `t` comes from a change, or is null.
pub unsafe fn tuple_header(t: ChangeTuple) -> Option<*const pg_sys::HeapTupleHeaderData> {
    if t.is_null() {
        return None;
    }
    // SAFETY: not null, by the caller valid.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        let header = (*t).tuple.t_data;
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        let header = (*t).t_data;
        Some(header.cast_const())
    }
}

/// Tells the server that changes are being read without any being written, so that the client is kept alive. From 16
/// on the server does it by itself.
///
/// # Safety
/// `ctx` is the decoding context of the callback that runs.
pub unsafe fn progress_while_skipping(_ctx: *mut pg_sys::LogicalDecodingContext) {
    #[cfg(feature = "pg15")]
    // SAFETY: by the caller.
    unsafe {
        pg_sys::OutputPluginUpdateProgress(_ctx, false)
    }
}
