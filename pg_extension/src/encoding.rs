//! From the database's encoding to UTF-8, which is what frames are in.

use pgrx::pg_sys;
use std::borrow::Cow;
use std::cell::Cell;
use std::ffi::c_int;

/// What has to be done to a text of this database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The server vouches for UTF-8.
    Utf8,
    /// `SQL_ASCII`: bytes of no known encoding. They stay as they are.
    Unknown,
    /// Converted by the server.
    Other(c_int),
}

impl Encoding {
    pub fn of_database() -> Self {
        // Asked for every field; a process has one database.
        thread_local! {
            static KNOWN: Cell<Option<Encoding>> = const { Cell::new(None) };
        }
        KNOWN.get().unwrap_or_else(|| {
            let encoding = Self::ask();
            KNOWN.set(Some(encoding));
            encoding
        })
    }

    fn ask() -> Self {
        // SAFETY: reads a setting of the process.
        let encoding = unsafe { pg_sys::GetDatabaseEncoding() };
        if encoding == pg_sys::pg_enc::PG_UTF8 as c_int {
            Self::Utf8
        } else if encoding == pg_sys::pg_enc::PG_SQL_ASCII as c_int {
            Self::Unknown
        } else {
            Self::Other(encoding)
        }
    }

    /// The text in UTF-8, or as it is when the encoding is unknown. Raises the server's error for a character that has
    /// no place in Unicode.
    #[inline]
    pub fn convert<'a>(self, text: &'a [u8]) -> Cow<'a, [u8]> {
        match self {
            Self::Other(from) if !text.is_ascii() => Cow::Owned(convert(from, text)),
            _ => Cow::Borrowed(text),
        }
    }

    /// The text as a UTF-8 string, `None` when it is not one.
    pub fn to_utf8_string(self, text: &[u8]) -> Option<String> {
        String::from_utf8(self.convert(text).into_owned()).ok()
    }
}

fn convert(from: c_int, text: &[u8]) -> Vec<u8> {
    // SAFETY: the server reads `len` bytes and answers a string ending with NUL in the current memory context; the
    // length is bounded by PostgreSQL's own 1 GB for a value.
    unsafe {
        let utf8 = pg_sys::pg_do_encoding_conversion(
            text.as_ptr().cast_mut(),
            text.len() as c_int,
            from,
            pg_sys::pg_enc::PG_UTF8 as c_int,
        );
        if std::ptr::eq(utf8, text.as_ptr()) {
            return text.to_vec();
        }
        let bytes = std::ffi::CStr::from_ptr(utf8.cast()).to_bytes().to_vec();
        pg_sys::pfree(utf8.cast());
        bytes
    }
}
