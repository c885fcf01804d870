//! `coffer._fill()`: the trigger that puts what a moved row took along into the log.
//!
//! An UPDATE does not log a TOASTed value that it leaves as it was; a reader takes it from the version before. When a
//! row of a table with the strategy `identity` moves to another tenant, that version is another tenant's. So AFTER
//! UPDATE, when the tenant changed, each such value follows in a message of its own. A BEFORE trigger could write it
//! with the row, but would lock every row that is updated; one AFTER costs nothing in the log when nothing moves.
//!
//! It is named to come first of the AFTER triggers. A row may have been changed again before it comes: then the newest
//! version counts, and only values that are still the same.

use crate::layout::Identity;
use crate::path::changed_by_us;
use crate::render::Found;
use crate::row_trigger::{self, Call};
use crate::settings;
use crate::tuple::{self, Field, Varlena};
use crate::wal_message;
use coffer_wire::tag::{self, Fill, TagTenant};
use pgrx::pg_guard;
use pgrx::pg_sys;

/// A larger value is left out: a message is one record of the log.
const LARGEST_FILLED: usize = 256 << 20;

#[doc(hidden)]
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_coffer_fill() -> *const pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// The trigger function. Its argument is the tenant column's name.
///
/// # Safety
/// Called by the server.
#[pg_guard]
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn coffer_fill(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: both tuples are of the trigger's relation.
    unsafe {
        let call = Call::of(fcinfo, "_fill");
        if !call.is_for(false, pg_sys::TRIGGER_EVENT_UPDATE) {
            pgrx::error!("coffer._fill is for AFTER UPDATE of rows");
        }
        let layout = &call.table.layout;
        if layout.identity == Identity::Key
            && let Some(newest) = newest_version(call.data.tg_relation, call.data.tg_newtuple)
            && tuple::has_external((*newest).t_data)
        {
            let (mut old_fields, mut new_fields) = (Vec::new(), Vec::new());
            tuple::fields_of((*call.data.tg_trigtuple).t_data, &layout.atts, &mut old_fields);
            tuple::fields_of((*newest).t_data, &layout.atts, &mut new_fields);
            write(&call, &old_fields, &new_fields);
        }
        pg_sys::Datum::from(0usize)
    }
}

/// The newest version of a row that this transaction has changed, `None` when it deleted it or moved it to another
/// partition (whose insertion is logged whole).
///
/// # Safety
/// The tuple is of the relation and was read from it.
unsafe fn newest_version(relation: pg_sys::Relation, tuple: pg_sys::HeapTuple) -> Option<pg_sys::HeapTuple> {
    let mut tuple = tuple;
    // SAFETY: by the caller; each version is copied before its page is let go. The chain ends: each link is younger.
    unsafe {
        while changed_by_us((*tuple).t_data) {
            let mut next = (*(*tuple).t_data).t_ctid;
            if u32::from(next.ip_posid) == pg_sys::MovedPartitionsOffsetNumber
                || pg_sys::ItemPointerEquals(&mut next, &mut (*tuple).t_self)
            {
                return None;
            }
            let mut version = pg_sys::HeapTupleData { t_self: next, ..Default::default() };
            let mut buffer = pg_sys::InvalidBuffer as pg_sys::Buffer;
            let any = &raw mut pg_sys::SnapshotAnyData;
            if !pg_sys::heap_fetch(relation, any, &mut version, &mut buffer, false) {
                return None;
            }
            tuple = pg_sys::heap_copytuple(&mut version);
            pg_sys::ReleaseBuffer(buffer);
        }
    }
    Some(tuple)
}

unsafe fn write(call: &Call<'_>, old: &[Field], new: &[Field]) {
    let layout = &call.table.layout;
    let source = row_trigger::stored();
    let pinned = settings::pin();
    let (mut key, mut tenant, mut field) = (Vec::new(), Vec::new(), Vec::new());
    // SAFETY: the fields are of the trigger's rows; those of an attribute of length -1 are varlenas.
    unsafe {
        layout.put_key(&mut key, new, source);
        let kind = row_trigger::kind_of(layout.put_plain(&mut tenant, call.tenant_column(), new, source));
        for column in layout.image.iter().map(|c| &layout.columns[usize::from(*c)]) {
            let (was, is) = (old[column.field], new[column.field]);
            let unchanged = layout.atts[column.field].len == -1
                && ![was, is].iter().any(|f| f.is_null() || f.is_missing())
                && tuple::same_on_disk(was.ptr(), is.ptr());
            let Varlena::OnDisk(value) = (if unchanged { tuple::varlena(is.ptr()) } else { continue }) else {
                continue;
            };
            if tuple::size_on_disk(value) > LARGEST_FILLED {
                continue;
            }
            field.clear();
            if layout.put_field(&mut field, column, new, source) != Found::Value || field.len() > LARGEST_FILLED {
                continue;
            }
            let fill = Fill {
                relid: (*call.data.tg_relation).rd_id.to_u32(),
                key: &key,
                tenant: TagTenant { kind, key: &tenant },
                attnum: column.attnum,
                field: &field,
            };
            wal_message::write(&tag::encode_fill(&wal_message::mac_key(), &fill));
        }
    }
    settings::unpin(pinned);
}

pgrx::extension_sql!(
    r#"
CREATE FUNCTION coffer._fill() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'coffer_fill';
"#,
    name = "fill_trigger",
);
