//! The output plugin: PostgreSQL hands it committed transactions change by change, it writes frames grouped by tenant.
//!
//! Every callback is guarded: a panic becomes an ordinary error. An error about one record would come again at every
//! attempt and hold the log back for ever, so data never raises one (see `rows`); errors are for options.

mod hash;
mod json;
mod large;
mod messages;
mod options;
mod relations;
mod rows;
mod runs;
mod state;
mod stream;
mod tags;
mod truncate;

use crate::compat;
use crate::settings;
use crate::wal_message::PREFIX;
use options::{Format, Options};
use pgrx::pg_guard;
use pgrx::pg_sys;
use state::State;
use std::ffi::{CStr, c_char};
use stream::Transaction;

/// Skipped changes between two signs of life.
const SKIPPED_BETWEEN_SIGNS: u32 = 100;

/// How long a walsender that has decoded all there is leaves the log to grow. Each flush of the log wakes a walsender that
/// waits for it, which under load costs the committing backend a signal and the machine two switches per transaction.
const GATHER_US: std::ffi::c_long = 50_000;

/// PostgreSQL looks for this name in the library that the slot's plugin is named after.
///
/// # Safety
/// Called by the server with a struct to fill.
#[pg_guard]
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn _PG_output_plugin_init(callbacks: *mut pg_sys::OutputPluginCallbacks) {
    // SAFETY: the server passes a zeroed struct. Streaming and two-phase callbacks stay unset: only whole, committed
    // transactions come.
    let callbacks = unsafe { &mut *callbacks };
    callbacks.startup_cb = Some(startup);
    callbacks.begin_cb = Some(begin);
    callbacks.change_cb = Some(change);
    callbacks.truncate_cb = Some(truncate_tables);
    callbacks.commit_cb = Some(commit);
    callbacks.message_cb = Some(message);
    callbacks.shutdown_cb = Some(shutdown);
}

/// The state of the session and the memory context of this callback, which is emptied at the end.
struct Callback<'a> {
    state: &'a mut State,
    outer: pg_sys::MemoryContext,
}

impl Callback<'_> {
    /// # Safety
    /// `ctx` was started by `startup`.
    #[inline]
    unsafe fn enter(ctx: *mut pg_sys::LogicalDecodingContext) -> Self {
        // SAFETY: the state lives in the context; there is one callback at a time.
        unsafe {
            let state = &mut *(*ctx).output_plugin_private.cast::<State>();
            let outer = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = state.per_change;
            Self { state, outer }
        }
    }
}

impl Drop for Callback<'_> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the context is ours; most callbacks leave it untouched.
        unsafe {
            pg_sys::CurrentMemoryContext = self.outer;
            if !std::thread::panicking() && !(*self.state.per_change).isReset {
                pg_sys::MemoryContextReset(self.state.per_change);
            }
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn startup(
    ctx: *mut pg_sys::LogicalDecodingContext,
    output: *mut pg_sys::OutputPluginOptions,
    is_init: bool,
) {
    // SAFETY: the server passes valid pointers. The state is freed by the context's callback, which runs after an error
    // too; the contexts that it uses are children of the same context.
    unsafe {
        let options = match Options::read((*ctx).output_plugin_options) {
            Ok(options) => options,
            Err(what) => pgrx::error!("pg_coffer: {what}"),
        };
        (*output).output_type = match options.format {
            Format::Frames => pg_sys::OutputPluginOutputType::OUTPUT_PLUGIN_BINARY_OUTPUT,
            Format::Json => pg_sys::OutputPluginOutputType::OUTPUT_PLUGIN_TEXTUAL_OUTPUT,
        };
        (*output).receive_rewrites = true;
        let kept = new_context((*ctx).context, c"pg_coffer types");
        let per_change = new_context((*ctx).context, c"pg_coffer change");
        let state = Box::new(State::new(options, kept, per_change));
        let callback = pg_sys::MemoryContextAllocZero((*ctx).context, size_of::<pg_sys::MemoryContextCallback>())
            .cast::<pg_sys::MemoryContextCallback>();
        let state = Box::into_raw(state);
        (*callback).func = Some(free_state);
        (*callback).arg = state.cast();
        pg_sys::MemoryContextRegisterResetCallback((*ctx).context, callback);
        (*ctx).output_plugin_private = state.cast();
        if !is_init {
            (*state).settings = settings::pin();
        }
    }
}

unsafe fn new_context(parent: pg_sys::MemoryContext, name: &'static CStr) -> pg_sys::MemoryContext {
    // SAFETY: the name is a constant; the parent lives.
    unsafe {
        pg_sys::AllocSetContextCreateInternal(
            parent,
            name.as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        )
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn free_state(state: *mut std::ffi::c_void) {
    // SAFETY: made by `startup` from a box, freed once.
    drop(unsafe { Box::from_raw(state.cast::<State>()) });
}

#[pg_guard]
unsafe extern "C-unwind" fn shutdown(ctx: *mut pg_sys::LogicalDecodingContext) {
    // SAFETY: started by `startup`.
    let state = unsafe { &mut *(*ctx).output_plugin_private.cast::<State>() };
    settings::unpin(state.settings.take());
}

#[pg_guard]
unsafe extern "C-unwind" fn begin(ctx: *mut pg_sys::LogicalDecodingContext, txn: *mut pg_sys::ReorderBufferTXN) {
    // SAFETY: the server passes valid pointers; a committed transaction has its commit time set.
    unsafe {
        let callback = Callback::enter(ctx);
        callback.state.begin(Transaction::new(
            (*txn).xid.into_inner(),
            (*txn).final_lsn,
            (*txn).end_lsn,
            (*txn).xact_time.commit_time,
        ));
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn change(
    ctx: *mut pg_sys::LogicalDecodingContext,
    _txn: *mut pg_sys::ReorderBufferTXN,
    relation: pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    // SAFETY: the server passes valid pointers.
    unsafe {
        let callback = Callback::enter(ctx);
        let taken = callback.state.change(ctx, relation, change);
        after(ctx, callback.state, taken);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn truncate_tables(
    ctx: *mut pg_sys::LogicalDecodingContext,
    _txn: *mut pg_sys::ReorderBufferTXN,
    count: i32,
    relations: *mut pg_sys::Relation,
    change: *mut pg_sys::ReorderBufferChange,
) {
    // SAFETY: the server passes valid pointers and `count` relations.
    unsafe {
        let callback = Callback::enter(ctx);
        let relations = std::slice::from_raw_parts(relations, usize::try_from(count).unwrap_or(0));
        let taken = callback.state.truncate(ctx, relations, (*change).data.truncate.restart_seqs);
        after(ctx, callback.state, taken);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn message(
    ctx: *mut pg_sys::LogicalDecodingContext,
    _txn: *mut pg_sys::ReorderBufferTXN,
    _lsn: pg_sys::XLogRecPtr,
    transactional: bool,
    prefix: *const c_char,
    size: pg_sys::Size,
    message: *const c_char,
) {
    // SAFETY: the server passes a string and `size` bytes.
    unsafe {
        if !transactional || CStr::from_ptr(prefix) != PREFIX {
            return;
        }
        let callback = Callback::enter(ctx);
        let taken = callback.state.message(ctx, std::slice::from_raw_parts(message.cast(), size));
        after(ctx, callback.state, taken);
    }
}

/// What follows each change: a write when enough has been gathered, or a sign of life when nothing is.
///
/// # Safety
/// `ctx` is the context of the callback that runs.
#[inline]
unsafe fn after(ctx: *mut pg_sys::LogicalDecodingContext, state: &mut State, taken: bool) {
    if taken {
        // SAFETY: by the caller.
        unsafe { state.stream.write_if_full(ctx) };
        return;
    }
    state.skipped += 1;
    if state.skipped >= SKIPPED_BETWEEN_SIGNS {
        state.skipped = 0;
        // SAFETY: by the caller.
        unsafe { compat::progress_while_skipping(ctx) };
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn commit(
    ctx: *mut pg_sys::LogicalDecodingContext,
    txn: *mut pg_sys::ReorderBufferTXN,
    _commit_lsn: pg_sys::XLogRecPtr,
) {
    // SAFETY: the server passes valid pointers.
    unsafe {
        let callback = Callback::enter(ctx);
        let written = callback.state.stream.commit(ctx);
        pg_sys::OutputPluginUpdateProgress(ctx, !written);
        drop(callback);
        gather((*txn).end_lsn);
    }
}

/// Lets the log grow for a moment when nothing in it is left to decode. What was written is on its way already; a
/// transaction that commits meanwhile is sent at most this much later.
///
/// # Safety
/// Called at the end of a callback.
unsafe fn gather(decoded: pg_sys::XLogRecPtr) {
    // SAFETY: functions of the server that any backend may call.
    unsafe {
        if pg_sys::am_walsender
            && !pg_sys::RecoveryInProgress()
            && pg_sys::GetFlushRecPtr(std::ptr::null_mut()) <= decoded
        {
            pg_sys::pg_usleep(GATHER_US);
        }
    }
}
