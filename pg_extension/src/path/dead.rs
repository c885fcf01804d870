//! A parent that this transaction has deleted, or given another key: its last version is still in the table.
//!
//! ON DELETE CASCADE deletes the rows below when the parent is gone already; whose they were only the dead version says.
//! It is found through the index on its key, all versions of which a scan with `SnapshotAny` returns.

use super::plan::Edge;
use crate::compat;
use crate::spi;
use crate::tuple;
use pgrx::pg_sys;
use std::ffi::CString;

/// Whether this transaction, and no savepoint of it that was rolled back, has updated or deleted this version.
///
/// # Safety
/// The header is valid.
pub unsafe fn changed_by_us(header: pg_sys::HeapTupleHeader) -> bool {
    // SAFETY: by the caller.
    unsafe {
        let infomask = u32::from((*header).t_infomask);
        if infomask & (pg_sys::HEAP_XMAX_INVALID | pg_sys::HEAP_XMAX_LOCK_ONLY) != 0 {
            return false;
        }
        let by = if infomask & pg_sys::HEAP_XMAX_IS_MULTI != 0 {
            pg_sys::HeapTupleGetUpdateXid(header)
        } else {
            (*header).t_choice.t_heap.t_xmax
        };
        pg_sys::TransactionIdIsCurrentTransactionId(by)
    }
}

/// Whether this transaction has written this version, and with which command.
///
/// # Safety
/// The header is of a version that is visible.
pub unsafe fn written_by_us(header: pg_sys::HeapTupleHeader) -> Option<pg_sys::CommandId> {
    // SAFETY: by the caller.
    unsafe {
        let is_frozen = u32::from((*header).t_infomask) & pg_sys::HEAP_XMIN_FROZEN == pg_sys::HEAP_XMIN_FROZEN;
        let ours = !is_frozen && pg_sys::TransactionIdIsCurrentTransactionId((*header).t_choice.t_heap.t_xmin);
        ours.then(|| pg_sys::HeapTupleHeaderGetCmin(header))
    }
}

/// The results' texts (in the database's encoding) of the version of the parent with this key (UTF-8) that this
/// transaction removed last.
pub fn results(edge: &Edge, key: &[Vec<u8>]) -> Option<Vec<spi::Value>> {
    let mut newest: Option<(pg_sys::CommandId, Vec<spi::Value>)> = None;
    for (leaf, index) in &edge.leaves {
        // SAFETY: the relation is open while its tuples are looked at; an error in between ends the transaction, which
        // closes it.
        unsafe {
            let relation = pg_sys::table_open(*leaf, pg_sys::AccessShareLock as i32);
            in_leaf(relation, *index, edge, key, &mut newest);
            pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
        }
    }
    newest.map(|(_, values)| values)
}

/// # Safety
/// The relation is open, the index is one of its unique B-trees.
unsafe fn in_leaf(
    relation: pg_sys::Relation,
    index: pg_sys::Oid,
    edge: &Edge,
    key: &[Vec<u8>],
    newest: &mut Option<(pg_sys::CommandId, Vec<spi::Value>)>,
) {
    // SAFETY: by the caller; keys and tuples are used while the scan is open.
    unsafe {
        let desc = (*relation).rd_att;
        let mut keys = Vec::with_capacity(key.len());
        for (name, text) in edge.parent_columns.iter().zip(key) {
            let Some(attribute) = attribute_named(desc, name) else { return };
            let mut scan_key = pg_sys::ScanKeyData::default();
            let equals = (*pg_sys::lookup_type_cache(attribute.atttypid, pg_sys::TYPECACHE_EQ_OPR_FINFO as i32))
                .eq_opr_finfo
                .fn_oid;
            pg_sys::ScanKeyEntryInitialize(
                &mut scan_key,
                0,
                attribute.attnum,
                pg_sys::BTEqualStrategyNumber as u16,
                pg_sys::InvalidOid,
                attribute.attcollation,
                equals,
                value_of(attribute, &spi::to_database(text)),
            );
            keys.push(scan_key);
        }
        let any = &raw mut pg_sys::SnapshotAnyData;
        let scan = pg_sys::systable_beginscan(relation, index, true, any, keys.len() as i32, keys.as_mut_ptr());
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            if changed_by_us((*tuple).t_data) {
                let at = pg_sys::HeapTupleHeaderGetCmax((*tuple).t_data);
                if newest.as_ref().is_none_or(|(n, _)| at >= *n) {
                    *newest = Some((at, texts(tuple, desc, &edge.results)));
                }
            }
        }
        pg_sys::systable_endscan(scan);
    }
}

unsafe fn attribute_named<'a>(desc: pg_sys::TupleDesc, name: &[u8]) -> Option<&'a pg_sys::FormData_pg_attribute> {
    // SAFETY: by the caller, a valid descriptor.
    unsafe {
        (0..(*desc).natts as usize)
            .map(|i| compat::attribute(desc, i))
            .find(|a| !a.attisdropped && tuple::name_bytes(&a.attname) == name)
    }
}

/// A value from its text, in the current memory context.
unsafe fn value_of(attribute: &pg_sys::FormData_pg_attribute, text: &[u8]) -> pg_sys::Datum {
    let Ok(text) = CString::new(text) else { pgrx::error!("a key of a parent has a NUL in it") };
    let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
    // SAFETY: the type exists, since a column has it.
    unsafe {
        pg_sys::getTypeInputInfo(attribute.atttypid, &mut input, &mut parameter);
        pg_sys::OidInputFunctionCall(input, text.as_ptr().cast_mut(), parameter, attribute.atttypmod)
    }
}

unsafe fn texts(tuple: pg_sys::HeapTuple, desc: pg_sys::TupleDesc, names: &[Vec<u8>]) -> Vec<spi::Value> {
    names
        .iter()
        .map(|name| {
            // SAFETY: the tuple is of the relation with this descriptor; the answer ends with NUL.
            unsafe {
                let attribute = attribute_named(desc, name)?;
                let text = pg_sys::SPI_getvalue(tuple, desc, attribute.attnum.into());
                if text.is_null() { None } else { Some(std::ffi::CStr::from_ptr(text).to_bytes().to_vec()) }
            }
        })
        .collect()
}
