//! Statements that triggers run, as somebody else than the session's user, past row security.
//!
//! Like the server's own foreign keys: each statement runs as the owner of the table that it reads, so that neither the
//! user's rights nor policies hide a row, and no function of a table runs with more rights than its owner has. Source:
//! `ri_PerformCheck` in `utils/adt/ri_triggers.c`.

use crate::encoding::Encoding;
use crate::tuple;
use pgrx::pg_sys;
use std::borrow::Cow;
use std::ffi::{CString, c_char};

/// A column of an answer, in the database's encoding; `None` for NULL.
pub type Value = Option<Vec<u8>>;

const LOCAL_USERID_CHANGE: i32 = 1;
const NOFORCE_RLS: i32 = 4;

/// A statement whose parameters are all texts, planned once per session.
pub struct Plan {
    plan: pg_sys::SPIPlanPtr,
    owner: pg_sys::Oid,
    parameters: usize,
}

impl Plan {
    /// Plans a statement to be run as `owner`. The statement is in the database's encoding.
    pub fn new(statement: &[u8], parameters: usize, owner: pg_sys::Oid) -> Self {
        let Ok(text) = CString::new(statement) else { pgrx::error!("a statement of pg_coffer has a NUL in it") };
        // SAFETY: the texts live through the call; the plan is kept until it is freed.
        let plan = unsafe {
            let mut types = vec![pg_sys::TEXTOID; parameters];
            as_user(owner, || {
                pg_sys::SPI_connect();
                let plan = pg_sys::SPI_prepare(text.as_ptr(), parameters as i32, types.as_mut_ptr());
                if plan.is_null() {
                    pgrx::error!("cannot plan {}", text.to_string_lossy());
                }
                pg_sys::SPI_keepplan(plan);
                pg_sys::SPI_finish();
                plan
            })
        };
        Self { plan, owner, parameters }
    }

    /// The first row of the answer, seeing what is committed now and what this transaction did, whatever its isolation.
    pub fn first(&self, parameters: &[Vec<u8>]) -> Option<Vec<Value>> {
        self.run(parameters, 1, false).pop()
    }

    /// All rows of the answer.
    pub fn all(&self, parameters: &[Vec<u8>]) -> Vec<Vec<Value>> {
        self.run(parameters, 0, false)
    }

    /// Runs it. Under REPEATABLE READ a row that the transaction's snapshot does not see is a serialization failure.
    pub fn change(&self, parameters: &[Vec<u8>]) {
        self.run(parameters, 0, true);
    }

    fn run(&self, parameters: &[Vec<u8>], limit: i64, crosscheck: bool) -> Vec<Vec<Value>> {
        assert_eq!(parameters.len(), self.parameters, "parameters of a planned statement");
        // SAFETY: the plan is alive; values live in SPI's memory until it is finished; answers are copied before.
        unsafe {
            as_user(self.owner, || {
                pg_sys::SPI_connect();
                let mut values: Vec<pg_sys::Datum> = parameters.iter().map(|p| text_datum(p)).collect();
                let nulls: Vec<c_char> = vec![b' ' as c_char; values.len()];
                let done = if pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ as i32 {
                    pg_sys::CommandCounterIncrement();
                    let latest = pg_sys::GetLatestSnapshot();
                    let own = if crosscheck { pg_sys::GetTransactionSnapshot() } else { std::ptr::null_mut() };
                    pg_sys::SPI_execute_snapshot(
                        self.plan,
                        values.as_mut_ptr(),
                        nulls.as_ptr(),
                        latest,
                        own,
                        false,
                        true,
                        limit,
                    )
                } else {
                    pg_sys::SPI_execute_plan(self.plan, values.as_mut_ptr(), nulls.as_ptr(), false, limit)
                };
                if done < 0 {
                    pgrx::error!("a statement of pg_coffer failed: {done}");
                }
                let rows = answer();
                pg_sys::SPI_finish();
                rows
            })
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the plan was kept by us; a running one is held by its own reference.
        unsafe {
            pg_sys::SPI_freeplan(self.plan);
        }
    }
}

/// # Safety
/// An error in `f` ends the (sub)transaction, which gives the user back.
unsafe fn as_user<R>(owner: pg_sys::Oid, f: impl FnOnce() -> R) -> R {
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: both are out parameters.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(owner, context | LOCAL_USERID_CHANGE | NOFORCE_RLS);
        let r = f();
        pg_sys::SetUserIdAndSecContext(user, context);
        r
    }
}

/// # Safety
/// Right after a statement was run.
unsafe fn answer() -> Vec<Vec<Value>> {
    // SAFETY: by the caller; every column is asked for as text.
    unsafe {
        let table = pg_sys::SPI_tuptable;
        if table.is_null() {
            return Vec::new();
        }
        let (desc, rows) = ((*table).tupdesc, pg_sys::SPI_processed as usize);
        (0..rows)
            .map(|r| {
                let tuple = *(*table).vals.add(r);
                (1..=(*desc).natts)
                    .map(|c| {
                        let mut null = false;
                        let datum = pg_sys::SPI_getbinval(tuple, desc, c, &mut null);
                        (!null).then(|| tuple::detoasted(datum.cast_mut_ptr()).to_vec())
                    })
                    .collect()
            })
            .collect()
    }
}

/// A text from UTF-8, in the current memory context.
///
/// # Safety
/// Inside a transaction.
unsafe fn text_datum(utf8: &[u8]) -> pg_sys::Datum {
    let text = to_database(utf8);
    // SAFETY: the server copies the bytes.
    unsafe { pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(text.as_ptr().cast(), text.len() as i32)) }
}

/// From UTF-8 to the database's encoding.
pub fn to_database(utf8: &[u8]) -> Cow<'_, [u8]> {
    match Encoding::of_database() {
        Encoding::Other(_) if !utf8.is_ascii() => {
            // SAFETY: the server reads `len` bytes and answers a string ending with NUL.
            unsafe {
                let p =
                    pg_sys::pg_any_to_server(utf8.as_ptr().cast(), utf8.len() as i32, pg_sys::pg_enc::PG_UTF8 as i32);
                if std::ptr::eq(p.cast(), utf8.as_ptr()) {
                    return Cow::Borrowed(utf8);
                }
                Cow::Owned(std::ffi::CStr::from_ptr(p).to_bytes().to_vec())
            }
        }
        _ => Cow::Borrowed(utf8),
    }
}
