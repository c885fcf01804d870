//! `coffer._row_jsonb(row)`: a row as `to_jsonb` gives it, byte for byte, for a fraction of its time.
//!
//! `to_jsonb` finds out anew for each row what its columns are, looks up their types, and sorts the keys. Here that is done
//! once per statement: the keys and their order are the same in every row, so what stands before the first value is
//! copied, and the values of common types are written straight from the tuple. Every other value is `to_jsonb`'s own,
//! embedded.
//!
//! Source of the format: `utils/jsonb.h`, `utils/adt/jsonb_util.c` (`convertJsonbObject`, `convertJsonbScalar`); it is
//! what stored values have, the same since 9.4. Of which kind a value is: `utils/adt/jsonb.c`, `jsonb_categorize_type`.

mod number;

use crate::compat;
use crate::encoding::Encoding;
use crate::render::{self, Output, Outputs, Source};
use crate::tuple::{self, Att, Field};
use number::Stored;
use pgrx::pg_guard;
use pgrx::pg_sys;
use std::ffi::CStr;

/// Every so many entries one holds an offset instead of a length.
const STRIDE: usize = 32;

/// How the values of a column are written.
#[derive(Clone, Copy)]
enum How {
    Bool,
    Int2,
    Int4,
    Int8,
    Numeric,
    /// By the type's output function, as a number where it is one.
    Float(Output),
    /// A timestamp without time zone.
    Timestamp,
    /// By the server's function for times in JSON.
    Time {
        type_oid: pg_sys::Oid,
        by_value: bool,
        len: i16,
    },
    /// The type's text, as a string.
    Text(Output),
    Jsonb,
    /// By `to_jsonb`.
    Server {
        function: *mut pg_sys::FmgrInfo,
        by_value: bool,
        len: i16,
    },
}

struct Column {
    index: usize,
    how: How,
}

/// What rows of one type have in common.
struct Shape {
    row_type: (pg_sys::Oid, i32),
    atts: Vec<Att>,
    /// In the order of the keys.
    columns: Vec<Column>,
    /// The varlena header, the container's, and an entry for each key and value.
    head: Vec<u8>,
    keys: Vec<u8>,
    /// `to_jsonb` for a whole row.
    whole: *mut pg_sys::FmgrInfo,
    fields: Vec<Field>,
    out: Vec<u8>,
    text: Vec<u8>,
}

/// Not written here: `to_jsonb` has the value, or the words for the error.
struct LeftToServer;

#[doc(hidden)]
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_coffer_row_jsonb() -> *const pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// The function.
///
/// # Safety
/// Called by the server.
#[pg_guard]
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn coffer_row_jsonb(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: the function is strict and takes one record; what the call remembers lives as long as the statement.
    unsafe {
        let given = (*(*fcinfo).args.as_ptr()).value;
        let mut row = given.cast_mut_ptr::<pg_sys::varlena>();
        // A tuple is read where it is when its own header is there: not compressed, not shortened, not elsewhere.
        if *row.cast::<u8>() & 3 != 0 {
            row = pg_sys::pg_detoast_datum(row);
        }
        let header = row.cast::<pg_sys::HeapTupleHeaderData>();
        let of = (*header).t_choice.t_datum;
        let shape = shape_of((*fcinfo).flinfo, (of.datum_typeid, of.datum_typmod));
        tuple::fields_of(header, &shape.atts, &mut shape.fields);
        if shape.fields.iter().any(|f| f.is_missing()) || shape.write().is_err() {
            // A row older than a column is left to it, too.
            return pg_sys::FunctionCall1Coll(shape.whole, pg_sys::InvalidOid, pg_sys::Datum::from(row));
        }
        let size = shape.out.len();
        let answer = pg_sys::palloc(size).cast::<u8>();
        std::ptr::copy_nonoverlapping(shape.out.as_ptr(), answer, size);
        pg_sys::Datum::from(answer)
    }
}

/// # Safety
/// `flinfo` is the call's; the result is used before the statement ends.
unsafe fn shape_of<'a>(flinfo: *mut pg_sys::FmgrInfo, row_type: (pg_sys::Oid, i32)) -> &'a mut Shape {
    // SAFETY: `fn_extra` is this function's own, and freed with the memory it was remembered for.
    unsafe {
        let known = (*flinfo).fn_extra.cast::<Shape>();
        if !known.is_null() && (*known).row_type == row_type {
            return &mut *known;
        }
        let context = (*flinfo).fn_mcxt;
        let shape = Box::into_raw(Box::new(Shape::of(row_type, context)));
        let callback = pg_sys::MemoryContextAllocZero(context, size_of::<pg_sys::MemoryContextCallback>())
            .cast::<pg_sys::MemoryContextCallback>();
        (*callback).func = Some(free_shape);
        (*callback).arg = shape.cast();
        pg_sys::MemoryContextRegisterResetCallback(context, callback);
        (*flinfo).fn_extra = shape.cast();
        &mut *shape
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn free_shape(shape: *mut std::ffi::c_void) {
    // SAFETY: it was made by `Box::into_raw`, and this is called once.
    drop(unsafe { Box::from_raw(shape.cast::<Shape>()) });
}

impl Shape {
    /// # Safety
    /// The type exists; the memory context outlives the shape.
    unsafe fn of(row_type: (pg_sys::Oid, i32), context: pg_sys::MemoryContext) -> Self {
        // SAFETY: by the caller; the descriptor is our own copy.
        unsafe {
            let desc = pg_sys::lookup_rowtype_tupdesc_copy(row_type.0, row_type.1);
            let atts = (0..(*desc).natts as usize).map(|i| compat::attribute(desc, i));
            let mut outputs = Outputs::new(context);
            let mut columns: Vec<(&[u8], Column)> = atts
                .clone()
                .enumerate()
                .filter(|(_, a)| !a.attisdropped)
                .map(|(index, a)| {
                    (tuple::name_bytes(&a.attname), Column { index, how: How::of(a, &mut outputs, context) })
                })
                .collect();
            columns.sort_by_key(|(name, _)| (name.len(), *name));
            let n = columns.len();
            let mut head = vec![0; 4];
            head.extend_from_slice(&(n as u32 | pg_sys::JB_FOBJECT).to_le_bytes());
            let mut keys = Vec::new();
            for (i, (name, _)) in columns.iter().enumerate() {
                keys.extend_from_slice(name);
                head.extend_from_slice(&entry(i, pg_sys::JENTRY_ISSTRING, name.len(), keys.len()).to_le_bytes());
            }
            head.resize(8 + 8 * n, 0);
            let shape = Self {
                row_type,
                atts: atts.map(Att::new).collect(),
                columns: columns.into_iter().map(|(_, c)| c).collect(),
                head,
                keys,
                whole: to_jsonb(row_type.0, context),
                fields: Vec::new(),
                out: Vec::new(),
                text: Vec::new(),
            };
            pg_sys::FreeTupleDesc(desc);
            shape
        }
    }

    /// Writes the fields into `out`.
    ///
    /// # Safety
    /// They are of a row of this type.
    unsafe fn write(&mut self) -> Result<(), LeftToServer> {
        let Self { out, text, columns, fields, .. } = self;
        out.clear();
        out.extend_from_slice(&self.head);
        out.extend_from_slice(&self.keys);
        let n = columns.len();
        let data = 8 + 8 * n;
        for (i, column) in columns.iter().enumerate() {
            let start = out.len();
            // SAFETY: by the caller.
            let kind = unsafe { column.how.write(out, text, fields[column.index])? };
            if out.len() - data > pg_sys::JENTRY_OFFLENMASK as usize {
                return Err(LeftToServer);
            }
            let e = entry(n + i, kind, out.len() - start, out.len() - data);
            let at = 8 + 4 * (n + i);
            out[at..at + 4].copy_from_slice(&e.to_le_bytes());
        }
        let size = (out.len() as u32) << 2;
        out[..4].copy_from_slice(&size.to_le_bytes());
        Ok(())
    }
}

fn entry(place: usize, kind: u32, len: usize, end: usize) -> u32 {
    if place.is_multiple_of(STRIDE) { kind | end as u32 | pg_sys::JENTRY_HAS_OFF } else { kind | len as u32 }
}

fn align(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// `to_jsonb` as it is called with an argument of this type.
///
/// # Safety
/// The type exists; the memory context outlives every call.
unsafe fn to_jsonb(type_oid: pg_sys::Oid, context: pg_sys::MemoryContext) -> *mut pg_sys::FmgrInfo {
    // SAFETY: by the caller; the expression is in the same memory.
    unsafe {
        let outer = pg_sys::MemoryContextSwitchTo(context);
        let info = pg_sys::palloc0(size_of::<pg_sys::FmgrInfo>()).cast::<pg_sys::FmgrInfo>();
        let function = pg_sys::Oid::from(pg_sys::F_TO_JSONB);
        pg_sys::fmgr_info_cxt(function, info, context);
        let argument = pg_sys::makeNullConst(type_oid, -1, pg_sys::InvalidOid);
        let arguments = pg_sys::lappend(std::ptr::null_mut(), argument.cast());
        (*info).fn_expr = pg_sys::makeFuncExpr(
            function,
            pg_sys::JSONBOID,
            arguments,
            pg_sys::InvalidOid,
            pg_sys::InvalidOid,
            pg_sys::CoercionForm::COERCE_EXPLICIT_CALL,
        )
        .cast();
        pg_sys::MemoryContextSwitchTo(outer);
        info
    }
}

impl How {
    /// # Safety
    /// The attribute is of a living descriptor; the memory context outlives every use.
    unsafe fn of(att: &pg_sys::FormData_pg_attribute, outputs: &mut Outputs, context: pg_sys::MemoryContext) -> Self {
        let (by_value, len) = (att.attbyval, att.attlen);
        // SAFETY: look-ups in the system caches.
        unsafe {
            let base = pg_sys::getBaseType(att.atttypid);
            match base {
                pg_sys::BOOLOID => Self::Bool,
                pg_sys::INT2OID => Self::Int2,
                pg_sys::INT4OID => Self::Int4,
                pg_sys::INT8OID => Self::Int8,
                pg_sys::NUMERICOID => Self::Numeric,
                pg_sys::FLOAT4OID | pg_sys::FLOAT8OID => Self::Float(outputs.of(att)),
                pg_sys::TIMESTAMPOID => Self::Timestamp,
                pg_sys::TIMESTAMPTZOID => Self::Time { type_oid: base, by_value, len },
                pg_sys::JSONBOID => Self::Jsonb,
                _ if is_text(base) => match outputs.of(att) {
                    // How bytes are written is a setting.
                    Output::Bytea => Self::Server { function: to_jsonb(att.atttypid, context), by_value, len },
                    output => Self::Text(output),
                },
                _ => Self::Server { function: to_jsonb(att.atttypid, context), by_value, len },
            }
        }
    }

    /// Appends a value and says what its entry is.
    ///
    /// # Safety
    /// The field is of a column with these values, in a living tuple.
    unsafe fn write(self, out: &mut Vec<u8>, text: &mut Vec<u8>, field: Field) -> Result<u32, LeftToServer> {
        if field.is_null() {
            return Ok(pg_sys::JENTRY_ISNULL);
        }
        let p = field.ptr();
        // SAFETY: by the caller.
        unsafe {
            Ok(match self {
                Self::Bool => {
                    if *p == 0 {
                        pg_sys::JENTRY_ISBOOL_FALSE
                    } else {
                        pg_sys::JENTRY_ISBOOL_TRUE
                    }
                }
                Self::Int2 => integer(out, p.cast::<i16>().read_unaligned().into()),
                Self::Int4 => integer(out, p.cast::<i32>().read_unaligned().into()),
                Self::Int8 => integer(out, p.cast::<i64>().read_unaligned()),
                Self::Numeric => {
                    let bytes = tuple::detoasted(p);
                    match number::stored(bytes) {
                        Stored::Canonical => {
                            align(out);
                            number::put(out, bytes);
                            pg_sys::JENTRY_ISNUMERIC
                        }
                        Stored::Special(name) => {
                            out.extend_from_slice(name.as_bytes());
                            pg_sys::JENTRY_ISSTRING
                        }
                        // Rare: such a row is left to to_jsonb as a whole.
                        Stored::Long => return Err(LeftToServer),
                    }
                }
                Self::Float(output) => {
                    text.clear();
                    render::plain(text, output, field, raw());
                    let start = out.len();
                    align(out);
                    if number::put_decimal(out, text) {
                        pg_sys::JENTRY_ISNUMERIC
                    } else if text.iter().any(|b| matches!(b, b'n' | b'N')) {
                        // Infinity, or no number.
                        out.truncate(start);
                        out.extend_from_slice(text);
                        pg_sys::JENTRY_ISSTRING
                    } else {
                        return Err(LeftToServer);
                    }
                }
                Self::Timestamp => {
                    let start = out.len();
                    render::timestamp(out, p.cast::<i64>().read_unaligned(), b"");
                    if let Some(space) = out[start..].iter().position(|b| *b == b' ') {
                        out[start + space] = b'T';
                    }
                    pg_sys::JENTRY_ISSTRING
                }
                Self::Time { type_oid, by_value, len } => {
                    // MAXDATELEN
                    let mut buffer = [0; 129];
                    let start = buffer.as_mut_ptr();
                    pg_sys::JsonEncodeDateTime(start, field.datum(by_value, len), type_oid, std::ptr::null());
                    out.extend_from_slice(CStr::from_ptr(start).to_bytes());
                    pg_sys::JENTRY_ISSTRING
                }
                Self::Text(output) => {
                    render::plain(out, output, field, raw());
                    pg_sys::JENTRY_ISSTRING
                }
                Self::Jsonb => embed(out, tuple::detoasted(p)),
                Self::Server { function, by_value, len } => {
                    let value = pg_sys::FunctionCall1Coll(function, pg_sys::InvalidOid, field.datum(by_value, len));
                    embed(out, tuple::detoasted(value.cast_mut_ptr()))
                }
            })
        }
    }
}

/// Values as they are stored, in the database's encoding.
fn raw() -> Source {
    Source { encoding: Encoding::Unknown, stored: true }
}

fn integer(out: &mut Vec<u8>, v: i64) -> u32 {
    align(out);
    number::put_integer(out, v);
    pg_sys::JENTRY_ISNUMERIC
}

/// Appends what stands behind the varlena header of a jsonb, as a value in another, and says what its entry is.
fn embed(out: &mut Vec<u8>, jsonb: &[u8]) -> u32 {
    let word = |at: usize| u32::from_le_bytes([jsonb[at], jsonb[at + 1], jsonb[at + 2], jsonb[at + 3]]);
    let bytes = if word(0) & pg_sys::JB_FSCALAR == 0 {
        align(out);
        out.extend_from_slice(jsonb);
        return pg_sys::JENTRY_ISCONTAINER;
    } else {
        &jsonb[8..]
    };
    // A scalar stands in an array of one, whose entry holds the end of its bytes.
    let kind = word(4) & pg_sys::JENTRY_TYPEMASK;
    if kind == pg_sys::JENTRY_ISNUMERIC {
        align(out);
    }
    out.extend_from_slice(bytes);
    kind
}

/// Whether `to_jsonb` takes the output function's text of such values for a string.
///
/// # Safety
/// Inside a transaction.
unsafe fn is_text(base: pg_sys::Oid) -> bool {
    // SAFETY: look-ups in the system caches.
    unsafe {
        if base == pg_sys::JSONOID
            || pg_sys::get_element_type(base) != pg_sys::InvalidOid
            || matches!(base, pg_sys::ANYARRAYOID | pg_sys::RECORDARRAYOID)
            || pg_sys::type_is_rowtype(base)
        {
            return false;
        }
        // A type of the application's may have a cast to json.
        let mut cast = pg_sys::InvalidOid;
        base.to_u32() < pg_sys::FirstNormalObjectId
            || pg_sys::find_coercion_pathway(
                pg_sys::JSONOID,
                base,
                pg_sys::CoercionContext::COERCION_EXPLICIT,
                &mut cast,
            ) != pg_sys::CoercionPathType::COERCION_PATH_FUNC
    }
}

pgrx::extension_sql!(
    r#"
CREATE FUNCTION coffer._row_jsonb("the row" record) RETURNS jsonb
    STRICT STABLE PARALLEL SAFE LANGUAGE c AS 'MODULE_PATHNAME', 'coffer_row_jsonb';
"#,
    name = "row_jsonb",
);
