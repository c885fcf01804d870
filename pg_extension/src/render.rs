//! Values as text, byte for byte as the server's output functions write them under the pinned settings.
//!
//! The common types are written here, straight from the tuple; the rest goes through the type's output function. Which
//! it is follows the output function, so domains are written as their base type.

use crate::encoding::Encoding;
use crate::tuple::{self, Field, Varlena};
use coffer_wire::copy_text;
use pgrx::pg_sys;
use std::collections::HashMap;

/// How a type's values become text.
#[derive(Clone, Copy, Debug)]
pub enum Output {
    Bool,
    Int2,
    Int4,
    Int8,
    Oid,
    /// The bytes are the text.
    Text,
    Name,
    Uuid,
    Bytea,
    Date,
    Timestamp,
    TimestampTz,
    Numeric,
    /// By the output function.
    Call {
        function: *mut pg_sys::FmgrInfo,
        by_value: bool,
        len: i16,
    },
}

impl Output {
    /// Whether what is written depends on no setting of the session.
    pub fn is_fixed(self) -> bool {
        let Self::Call { function, .. } = self else { return true };
        // SAFETY: filled by `Outputs::of`, alive as long as its memory context.
        let function = unsafe { (*function).fn_oid }.to_u32();
        matches!(function, pg_sys::F_ENUM_OUT | pg_sys::F_INET_OUT | pg_sys::F_CIDR_OUT | pg_sys::F_CHAROUT)
    }
}

/// The output functions looked up so far. They stay valid when a type changes: a function that remembers something
/// about a type checks it at every call.
pub struct Outputs {
    context: pg_sys::MemoryContext,
    by_type: HashMap<u32, Output>,
}

impl Outputs {
    /// What the functions remember lives in `context`, which must outlive every use.
    pub fn new(context: pg_sys::MemoryContext) -> Self {
        Self { context, by_type: HashMap::new() }
    }

    pub fn of(&mut self, form: &pg_sys::FormData_pg_attribute) -> Output {
        if let Some(known) = self.by_type.get(&form.atttypid.to_u32()) {
            return *known;
        }
        let mut function = pg_sys::InvalidOid;
        let mut is_varlena = false;
        // SAFETY: a system cache look-up.
        unsafe { pg_sys::getTypeOutputInfo(form.atttypid, &mut function, &mut is_varlena) };
        let output = match function.to_u32() {
            pg_sys::F_BOOLOUT => Output::Bool,
            pg_sys::F_INT2OUT => Output::Int2,
            pg_sys::F_INT4OUT => Output::Int4,
            pg_sys::F_INT8OUT => Output::Int8,
            pg_sys::F_OIDOUT => Output::Oid,
            pg_sys::F_TEXTOUT | pg_sys::F_VARCHAROUT | pg_sys::F_BPCHAROUT | pg_sys::F_JSON_OUT => Output::Text,
            pg_sys::F_NAMEOUT => Output::Name,
            pg_sys::F_UUID_OUT => Output::Uuid,
            pg_sys::F_BYTEAOUT => Output::Bytea,
            pg_sys::F_DATE_OUT => Output::Date,
            pg_sys::F_TIMESTAMP_OUT => Output::Timestamp,
            pg_sys::F_TIMESTAMPTZ_OUT => Output::TimestampTz,
            pg_sys::F_NUMERIC_OUT => Output::Numeric,
            _ => {
                // SAFETY: the memory is of the right size and lives in a context that outlives the use.
                unsafe {
                    let info = pg_sys::MemoryContextAllocZero(self.context, size_of::<pg_sys::FmgrInfo>())
                        .cast::<pg_sys::FmgrInfo>();
                    pg_sys::fmgr_info_cxt(function, info, self.context);
                    Output::Call { function: info, by_value: form.attbyval, len: form.attlen }
                }
            }
        };
        self.by_type.insert(form.atttypid.to_u32(), output);
        output
    }
}

/// What a field turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Value,
    Null,
    /// A TOAST pointer in a decoded row.
    Unchanged,
}

/// Where values come from, and so what their bytes mean.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub encoding: Encoding,
    /// A stored row, whose TOAST pointers can be followed; in a decoded row they mean "unchanged".
    pub stored: bool,
}

/// Appends a value's text as it is.
///
/// # Safety
/// The field is of a type with this output and of a living tuple.
pub unsafe fn plain(out: &mut Vec<u8>, output: Output, field: Field, source: Source) -> Found {
    // SAFETY: by the caller.
    unsafe { value::<false>(out, output, field, source) }
}

/// Appends a value as a field of a COPY line, NULL and unchanged values included.
///
/// # Safety
/// As for [`plain`].
#[inline]
pub unsafe fn escaped(out: &mut Vec<u8>, output: Output, field: Field, source: Source) -> Found {
    // SAFETY: by the caller.
    let found = unsafe { value::<true>(out, output, field, source) };
    match found {
        Found::Value => {}
        Found::Null => out.extend_from_slice(copy_text::NULL),
        Found::Unchanged => out.extend_from_slice(copy_text::UNCHANGED),
    }
    found
}

#[inline]
unsafe fn value<const ESCAPE: bool>(out: &mut Vec<u8>, output: Output, field: Field, source: Source) -> Found {
    debug_assert!(!field.is_missing());
    if field.is_null() {
        return Found::Null;
    }
    let p = field.ptr();
    // SAFETY: by the caller, `p` points to a value of the type.
    unsafe {
        match output {
            Output::Bool => out.push(if *p == 0 { b'f' } else { b't' }),
            Output::Int2 => integer(out, p.cast::<i16>().read_unaligned().into()),
            Output::Int4 => integer(out, p.cast::<i32>().read_unaligned().into()),
            Output::Int8 => integer(out, p.cast::<i64>().read_unaligned()),
            Output::Oid => integer(out, p.cast::<u32>().read_unaligned().into()),
            Output::Text => {
                let Some(bytes) = bytes_of(p, source) else { return Found::Unchanged };
                text::<ESCAPE>(out, bytes, source.encoding);
            }
            Output::Name => {
                text::<ESCAPE>(out, tuple::name_bytes(&*p.cast::<pg_sys::NameData>()), source.encoding);
            }
            Output::Uuid => uuid(out, &*p.cast::<[u8; 16]>()),
            Output::Bytea => {
                let Some(bytes) = bytes_of(p, source) else { return Found::Unchanged };
                out.extend_from_slice(if ESCAPE { b"\\\\x" } else { b"\\x" });
                hex(out, bytes);
            }
            Output::Date => date(out, p.cast::<i32>().read_unaligned()),
            Output::Timestamp => timestamp(out, p.cast::<i64>().read_unaligned(), b""),
            Output::TimestampTz => timestamp(out, p.cast::<i64>().read_unaligned(), b"+00"),
            Output::Numeric => {
                let Some(bytes) = bytes_of(p, source) else { return Found::Unchanged };
                numeric(out, bytes);
            }
            Output::Call { function, by_value, len } => {
                if len == -1 && !source.stored && matches!(tuple::varlena(p), Varlena::OnDisk(_)) {
                    return Found::Unchanged;
                }
                let cstring = pg_sys::OutputFunctionCall(function, field.datum(by_value, len));
                text::<ESCAPE>(out, std::ffi::CStr::from_ptr(cstring).to_bytes(), source.encoding);
            }
        }
    }
    Found::Value
}

/// # Safety
/// `p` points to a varlena.
#[inline]
unsafe fn bytes_of<'a>(p: *const u8, source: Source) -> Option<&'a [u8]> {
    // SAFETY: by the caller.
    unsafe {
        match tuple::varlena(p) {
            Varlena::Plain(bytes) => Some(bytes),
            Varlena::OnDisk(_) if !source.stored => None,
            _ => Some(tuple::detoasted(p)),
        }
    }
}

#[inline]
fn text<const ESCAPE: bool>(out: &mut Vec<u8>, bytes: &[u8], encoding: Encoding) {
    let bytes = encoding.convert(bytes);
    if ESCAPE { copy_text::escape_into(out, &bytes) } else { out.extend_from_slice(&bytes) }
}

const PAIRS: [[u8; 2]; 100] = {
    let mut t = [[0; 2]; 100];
    let mut i = 0;
    while i < 100 {
        t[i] = [b'0' + (i / 10) as u8, b'0' + (i % 10) as u8];
        i += 1;
    }
    t
};

#[inline]
pub fn integer(out: &mut Vec<u8>, v: i64) {
    let mut buf = [0u8; 20];
    let mut at = buf.len();
    let mut n = v.unsigned_abs();
    while n >= 100 {
        at -= 2;
        buf[at..at + 2].copy_from_slice(&PAIRS[(n % 100) as usize]);
        n /= 100;
    }
    if n >= 10 {
        at -= 2;
        buf[at..at + 2].copy_from_slice(&PAIRS[n as usize]);
    } else {
        at -= 1;
        buf[at] = b'0' + n as u8;
    }
    if v < 0 {
        at -= 1;
        buf[at] = b'-';
    }
    out.extend_from_slice(&buf[at..]);
}

#[inline]
fn two(out: &mut Vec<u8>, n: u32) {
    out.extend_from_slice(&PAIRS[n as usize]);
}

#[inline]
fn four(out: &mut Vec<u8>, n: u32) {
    two(out, n / 100);
    two(out, n % 100);
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Appends the bytes as lowercase hexadecimal.
pub fn hex(out: &mut Vec<u8>, bytes: &[u8]) {
    out.reserve(bytes.len() * 2);
    for b in bytes {
        out.extend_from_slice(&[HEX[usize::from(b >> 4)], HEX[usize::from(b & 15)]]);
    }
}

fn uuid(out: &mut Vec<u8>, bytes: &[u8; 16]) {
    let mut text = [b'-'; 36];
    let mut at = 0;
    for (i, b) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = HEX[usize::from(b >> 4)];
        text[at + 1] = HEX[usize::from(b & 15)];
        at += 2;
    }
    out.extend_from_slice(&text);
}

/// Days from 1970-01-01 to 2000-01-01, where PostgreSQL counts from.
const EPOCH_DAYS: i64 = 10_957;
const DAY_US: i64 = 86_400_000_000;

/// Year, month, day in the proleptic Gregorian calendar; year 0 is 1 BC.
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
fn civil(days_since_2000: i64) -> (i64, u32, u32) {
    let z = days_since_2000 + EPOCH_DAYS + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = (doy - (153 * mp + 2) / 5 + 1) as u32;
    let month = if mp < 10 { mp + 3 } else { mp - 9 } as u32;
    (yoe + era * 400 + i64::from(month <= 2), month, day)
}

/// Writes `YYYY-MM-DD` and says whether " BC" has to follow at the end.
fn calendar_date(out: &mut Vec<u8>, days_since_2000: i64) -> bool {
    let (year, month, day) = civil(days_since_2000);
    let shown = if year > 0 { year } else { 1 - year };
    if shown < 10_000 {
        four(out, shown as u32);
    } else {
        integer(out, shown);
    }
    out.push(b'-');
    two(out, month);
    out.push(b'-');
    two(out, day);
    year <= 0
}

fn date(out: &mut Vec<u8>, days: i32) {
    match days {
        i32::MIN => out.extend_from_slice(b"-infinity"),
        i32::MAX => out.extend_from_slice(b"infinity"),
        _ => {
            if calendar_date(out, days.into()) {
                out.extend_from_slice(b" BC");
            }
        }
    }
}

/// A timestamp in microseconds since 2000-01-01, with the zone's text.
pub fn timestamp(out: &mut Vec<u8>, us: i64, zone: &[u8]) {
    match us {
        i64::MIN => return out.extend_from_slice(b"-infinity"),
        i64::MAX => return out.extend_from_slice(b"infinity"),
        _ => {}
    }
    let before_christ = calendar_date(out, us.div_euclid(DAY_US));
    let in_day = us.rem_euclid(DAY_US);
    let seconds = (in_day / 1_000_000) as u32;
    out.push(b' ');
    two(out, seconds / 3600);
    out.push(b':');
    two(out, seconds / 60 % 60);
    out.push(b':');
    two(out, seconds % 60);
    let mut fraction = (in_day % 1_000_000) as u32;
    if fraction != 0 {
        let mut digits = 6;
        while fraction.is_multiple_of(10) {
            fraction /= 10;
            digits -= 1;
        }
        out.push(b'.');
        let at = out.len();
        out.resize(at + digits, b'0');
        for d in out[at..].iter_mut().rev() {
            *d = b'0' + (fraction % 10) as u8;
            fraction /= 10;
        }
    }
    out.extend_from_slice(zone);
    if before_christ {
        out.extend_from_slice(b" BC");
    }
}

/// A numeric from its bytes behind the varlena header. Source: `utils/adt/numeric.c`, `NumericChoice` and
/// `get_str_from_var`: groups of four decimal digits, base 10000, most significant first.
fn numeric(out: &mut Vec<u8>, bytes: &[u8]) {
    let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let header = short(0);
    let (negative, scale, weight, digits_at) = match header & 0xc000 {
        0xc000 => {
            return out.extend_from_slice(match header & 0xf000 {
                0xd000 => b"Infinity",
                0xf000 => b"-Infinity",
                _ => b"NaN",
            });
        }
        0x8000 => {
            let low = i32::from(header & 0x3f);
            let weight = if header & 0x40 != 0 { low - 0x40 } else { low };
            (header & 0x2000 != 0, usize::from((header & 0x1f80) >> 7), weight, 2)
        }
        sign => (sign == 0x4000, usize::from(header & 0x3fff), i32::from(short(2) as i16), 4),
    };
    let count = (bytes.len() - digits_at) / 2;
    let digit = |d: i32| match usize::try_from(d) {
        Ok(d) if d < count => u32::from(short(digits_at + d * 2)),
        _ => 0,
    };
    if negative {
        out.push(b'-');
    }
    if weight < 0 {
        out.push(b'0');
    } else {
        integer(out, digit(0).into());
        for d in 1..=weight {
            four(out, digit(d));
        }
    }
    if scale > 0 {
        out.push(b'.');
        let end = out.len() + scale;
        let mut d = weight + 1;
        while out.len() < end {
            four(out, digit(d));
            d += 1;
        }
        out.truncate(end);
    }
}
