//! Taking a heap tuple apart without a call into the server.
//!
//! Source: `access/htup_details.h`, `access/tupmacs.h`, `varatt.h`; the layout has not changed since 8.3. A call
//! through the guard costs more than reading a field, and this runs for every field of every row.

use pgrx::pg_sys;

/// What is needed of an attribute to find the next one.
#[derive(Clone, Copy, Debug)]
pub struct Att {
    /// -1 for varlena, -2 for a C string.
    pub len: i16,
    /// 1, 2, 4 or 8.
    pub align: u8,
}

impl Att {
    pub fn new(form: &pg_sys::FormData_pg_attribute) -> Self {
        let align = match form.attalign as u8 {
            b'c' => 1,
            b's' => 2,
            b'i' => 4,
            _ => 8,
        };
        Self { len: form.attlen, align }
    }
}

/// A field of a tuple: where its value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field(*const u8);

impl Field {
    pub const NULL: Self = Self(std::ptr::null());
    /// The tuple is older than the column.
    pub const MISSING: Self = Self(std::ptr::without_provenance(1));

    #[inline]
    pub fn at(p: *const u8) -> Self {
        Self(p)
    }

    #[inline]
    pub fn is_null(self) -> bool {
        self == Self::NULL
    }

    #[inline]
    pub fn is_missing(self) -> bool {
        self == Self::MISSING
    }

    #[inline]
    pub fn ptr(self) -> *const u8 {
        self.0
    }

    /// The value as the functions of the server take it.
    ///
    /// # Safety
    /// The field is neither NULL nor missing and has the attribute's length.
    pub unsafe fn datum(self, by_value: bool, len: i16) -> pg_sys::Datum {
        if !by_value {
            return pg_sys::Datum::from(self.0.cast_mut());
        }
        // SAFETY: by the caller.
        unsafe {
            pg_sys::Datum::from(match len {
                1 => self.0.cast::<i8>().read_unaligned() as usize,
                2 => self.0.cast::<i16>().read_unaligned() as usize,
                4 => self.0.cast::<i32>().read_unaligned() as usize,
                _ => self.0.cast::<usize>().read_unaligned(),
            })
        }
    }
}

/// Finds the fields of a tuple; `fields` gets one entry per attribute.
///
/// # Safety
/// The header belongs to a whole tuple of a relation with these attributes.
pub unsafe fn fields_of(header: *const pg_sys::HeapTupleHeaderData, atts: &[Att], fields: &mut Vec<Field>) {
    fields.clear();
    // SAFETY: the bitmap has a bit for each of the tuple's own attributes, and the data behind `t_hoff` holds those
    // that are not null one after the other, each aligned.
    unsafe {
        let infomask = u32::from((*header).t_infomask);
        let natts = usize::from((*header).t_infomask2) & pg_sys::HEAP_NATTS_MASK as usize;
        let nulls = if infomask & pg_sys::HEAP_HASNULL != 0 {
            (&raw const (*header).t_bits).cast::<u8>()
        } else {
            std::ptr::null()
        };
        let data = header.cast::<u8>().add(usize::from((*header).t_hoff));
        let mut at = 0usize;
        for (i, att) in atts.iter().take(natts).enumerate() {
            if !nulls.is_null() && *nulls.add(i >> 3) & (1 << (i & 7)) == 0 {
                fields.push(Field::NULL);
                continue;
            }
            // A varlena with a short header is not aligned; padding before an aligned one is zero.
            if !(att.len == -1 && *data.add(at) != 0) {
                let align = usize::from(att.align);
                at = (at + align - 1) & !(align - 1);
            }
            let value = data.add(at);
            fields.push(Field(value));
            at += match att.len {
                -1 => varlena_size(value),
                -2 => std::ffi::CStr::from_ptr(value.cast()).count_bytes() + 1,
                n => n as usize,
            };
        }
    }
    fields.resize(atts.len(), Field::MISSING);
}

/// Whether a tuple holds TOAST pointers of any kind.
///
/// # Safety
/// The header is valid.
pub unsafe fn has_external(header: *const pg_sys::HeapTupleHeaderData) -> bool {
    // SAFETY: by the caller.
    unsafe { u32::from((*header).t_infomask) & pg_sys::HEAP_HASEXTERNAL != 0 }
}

const TAG_INDIRECT: u8 = 1;
const TAG_ONDISK: u8 = 18;

/// Bytes that a varlena takes inside its tuple.
///
/// # Safety
/// `p` points to a varlena.
unsafe fn varlena_size(p: *const u8) -> usize {
    // SAFETY: by the caller.
    unsafe {
        let b = *p;
        if b == 1 {
            2 + match *p.add(1) {
                TAG_INDIRECT => size_of::<*const u8>(),
                TAG_ONDISK => 16,
                _ => size_of::<*const u8>(),
            }
        } else if b & 1 == 1 {
            usize::from(b >> 1)
        } else {
            (p.cast::<u32>().read_unaligned() >> 2) as usize
        }
    }
}

/// Bytes that a TOASTed value takes where it is kept.
///
/// # Safety
/// `p` points to a varlena that is [`Varlena::OnDisk`].
pub unsafe fn size_on_disk(p: *const u8) -> usize {
    // SAFETY: by the caller: behind tag and raw size stands the external size, the compression in its upper bits.
    unsafe { (p.add(6).cast::<u32>().read_unaligned() & 0x3fff_ffff) as usize }
}

/// Whether two varlenas are one value in a TOAST table.
///
/// # Safety
/// Both point to varlenas.
pub unsafe fn same_on_disk(a: *const u8, b: *const u8) -> bool {
    // SAFETY: a pointer into a TOAST table has 18 bytes.
    unsafe {
        matches!((varlena(a), varlena(b)), (Varlena::OnDisk(_), Varlena::OnDisk(_)))
            && std::slice::from_raw_parts(a, 18) == std::slice::from_raw_parts(b, 18)
    }
}

/// What a varlena is.
#[derive(Clone, Copy, Debug)]
pub enum Varlena<'a> {
    Plain(&'a [u8]),
    /// The compressed datum and its size once it is not.
    Compressed(*const u8, usize),
    /// In a TOAST table, not here. In a decoded row: unchanged since the version before.
    OnDisk(*const u8),
}

/// Looks at a varlena.
///
/// # Safety
/// `p` points to a varlena that lives for `'a`.
#[inline]
pub unsafe fn varlena<'a>(p: *const u8) -> Varlena<'a> {
    // SAFETY: by the caller; an indirect pointer leads to a varlena that is not indirect.
    unsafe {
        let b = *p;
        if b == 1 {
            return match *p.add(1) {
                TAG_INDIRECT => varlena(p.add(2).cast::<*const u8>().read_unaligned()),
                _ => Varlena::OnDisk(p),
            };
        }
        if b & 1 == 1 {
            return Varlena::Plain(std::slice::from_raw_parts(p.add(1), usize::from(b >> 1) - 1));
        }
        let header = p.cast::<u32>().read_unaligned();
        if header & 3 == 0 {
            return Varlena::Plain(std::slice::from_raw_parts(p.add(4), (header >> 2) as usize - 4));
        }
        let raw = p.add(4).cast::<u32>().read_unaligned() & 0x3fff_ffff;
        Varlena::Compressed(p, raw as usize)
    }
}

/// The bytes of a varlena, fetched and decompressed where needed into the current memory context.
///
/// # Safety
/// `p` points to a varlena; the result lives as long as it and the memory context do.
pub unsafe fn detoasted<'a>(p: *const u8) -> &'a [u8] {
    // SAFETY: by the caller.
    unsafe {
        match varlena(p) {
            Varlena::Plain(bytes) => bytes,
            Varlena::Compressed(p, _) | Varlena::OnDisk(p) => {
                match varlena(pg_sys::pg_detoast_datum(p.cast_mut().cast()).cast()) {
                    Varlena::Plain(bytes) => bytes,
                    _ => unreachable!("pg_detoast_datum answers a plain varlena"),
                }
            }
        }
    }
}

/// A `name` without its padding.
pub fn name_bytes(name: &pg_sys::NameData) -> &[u8] {
    // SAFETY: a name is 64 bytes of which one at least is zero.
    unsafe { std::ffi::CStr::from_ptr(name.data.as_ptr()).to_bytes() }
}
