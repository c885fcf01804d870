//! Rows too large to be built in memory: their length is computed first, then they are written in slices, straight from
//! the values.

use super::rows::{Change, Reason};
use super::stream::WRITE_BYTES;
use crate::encoding::Encoding;
use crate::layout::{Column, Identity, Layout};
use crate::render::{self, Output, Source};
use crate::tuple::{self, Field, Varlena};
use coffer_wire::Op;
use coffer_wire::copy_text;
use coffer_wire::tag::TagOp;

/// A value above this is not copied into the row.
const LARGE_VALUE: usize = 32 << 10;
/// Output functions answer in one piece of memory, at most 1 GB: larger values are not given to them.
const LARGEST_FOR_OUTPUT: usize = 256 << 20;
const SLICE: usize = 64 << 10;

enum Piece<'a> {
    /// As it goes out.
    Done(Vec<u8>),
    /// To be escaped.
    Text(&'a [u8]),
    /// To be written as hexadecimal behind `\\x`.
    Hex(&'a [u8]),
}

impl Piece<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Done(bytes) => bytes.len() as u64,
            Self::Text(bytes) => copy_text::escaped_len(bytes) as u64,
            Self::Hex(bytes) => 3 + bytes.len() as u64 * 2,
        }
    }

    fn write(&self, put: &mut impl FnMut(&[u8])) {
        let mut buffer = Vec::new();
        match self {
            Self::Done(bytes) => put(bytes),
            Self::Text(bytes) => {
                for slice in bytes.chunks(SLICE) {
                    buffer.clear();
                    copy_text::escape_into(&mut buffer, slice);
                    put(&buffer);
                }
            }
            Self::Hex(bytes) => {
                put(b"\\\\x");
                for slice in bytes.chunks(SLICE) {
                    buffer.clear();
                    render::hex(&mut buffer, slice);
                    put(&buffer);
                }
            }
        }
    }
}

/// A length-prefixed field of a row.
#[derive(Default)]
struct Line<'a>(Vec<Piece<'a>>);

impl<'a> Line<'a> {
    fn len(&self) -> u64 {
        self.0.iter().map(Piece::len).sum()
    }

    fn tail(&mut self) -> &mut Vec<u8> {
        if !matches!(self.0.last(), Some(Piece::Done(_))) {
            self.0.push(Piece::Done(Vec::new()));
        }
        match self.0.last_mut() {
            Some(Piece::Done(bytes)) => bytes,
            _ => unreachable!("pushed above"),
        }
    }

    fn image(layout: &'a Layout, fields: &[Field], source: Source) -> Result<Self, Reason> {
        let mut line = Self::default();
        for (n, c) in layout.image.iter().enumerate() {
            if n > 0 {
                line.tail().push(b'\t');
            }
            let column = &layout.columns[usize::from(*c)];
            // SAFETY: the fields are of the change at hand and of this layout.
            unsafe { line.value(layout, column, fields, source)? };
        }
        Ok(line)
    }

    /// # Safety
    /// The fields are of the change at hand and of this layout.
    unsafe fn value(
        &mut self,
        layout: &Layout,
        column: &Column,
        fields: &[Field],
        source: Source,
    ) -> Result<(), Reason> {
        let field = fields[column.field];
        let size = value_size(layout, column, field);
        if size > LARGE_VALUE {
            // SAFETY: a value with a size is a varlena that is at hand.
            unsafe {
                match column.output {
                    Output::Bytea => self.0.push(Piece::Hex(tuple::detoasted(field.ptr()))),
                    Output::Text if !matches!(source.encoding, Encoding::Other(_)) => {
                        self.0.push(Piece::Text(tuple::detoasted(field.ptr())));
                    }
                    _ if size > LARGEST_FOR_OUTPUT => {
                        return Err(format!("a value of {size} bytes of a type that is written in one piece").into());
                    }
                    Output::Call { function, by_value, len } if source.encoding == Encoding::Utf8 => {
                        let text = pgrx::pg_sys::OutputFunctionCall(function, field.datum(by_value, len));
                        self.0.push(Piece::Text(std::ffi::CStr::from_ptr(text).to_bytes()));
                    }
                    _ => {
                        layout.put_field(self.tail(), column, fields, source);
                    }
                }
            }
            return Ok(());
        }
        // SAFETY: by the caller.
        unsafe { layout.put_field(self.tail(), column, fields, source) };
        Ok(())
    }
}

/// The size of a value that is at hand, once it is not compressed; 0 for what is no varlena, or not here.
fn value_size(layout: &Layout, column: &Column, field: Field) -> usize {
    if layout.atts[column.field].len != -1 || field.is_null() || field.is_missing() {
        return 0;
    }
    // SAFETY: an attribute of length -1 is a varlena.
    match unsafe { tuple::varlena(field.ptr()) } {
        Varlena::Plain(bytes) => bytes.len(),
        Varlena::Compressed(_, raw) => raw,
        Varlena::OnDisk(_) => 0,
    }
}

/// A row of several slices.
pub struct Row<'a> {
    op: Op,
    lines: Vec<Line<'a>>,
}

impl Row<'_> {
    /// Bytes of the row in its run.
    pub fn len(&self) -> u64 {
        3 + self.lines.iter().map(|l| 4 + l.len()).sum::<u64>()
    }

    /// Hands out the row's bytes in their order.
    pub fn write(&self, put: &mut impl FnMut(&[u8])) {
        put(&[self.op as u8, 0, 0]);
        for line in &self.lines {
            put(&(line.len() as u32).to_le_bytes());
            for piece in &line.0 {
                piece.write(put);
            }
        }
    }
}

/// The change as a row in slices, or `None` when it is small enough for the usual way.
///
/// # Safety
/// The fields are of living tuples of the layout's relation, and what this returns is used before they go.
pub unsafe fn row<'a>(layout: &'a Layout, change: &Change<'a>, source: Source) -> Result<Option<Row<'a>>, Reason> {
    let full_row = layout.identity == Identity::FullRow;
    let images = [change.old.filter(|_| full_row), change.new];
    let size: usize = images
        .into_iter()
        .flatten()
        .flat_map(|fields| layout.columns.iter().map(|c| value_size(layout, c, fields[c.field])))
        .sum();
    // Text and hexadecimal at most double what is stored.
    if size < WRITE_BYTES / 4 {
        return Ok(None);
    }
    let key = |fields: &[Field]| -> Result<Line<'a>, Reason> {
        let mut bytes = Vec::new();
        // SAFETY: by the caller.
        if !unsafe { layout.put_key(&mut bytes, fields, source) } {
            return Err("the log does not carry a part of its key".into());
        }
        Ok(Line(vec![Piece::Done(bytes)]))
    };
    let image = |fields: &[Field]| Line::image(layout, fields, source);
    let (op, lines) = match (layout.identity, change.old, change.new) {
        (_, None, Some(new)) if change.op == TagOp::Insert => (Op::Insert, vec![key(new)?, image(new)?]),
        (Identity::Key, None, Some(new)) => (Op::Update, vec![key(new)?, image(new)?]),
        (Identity::Key, Some(old), Some(new)) => {
            let (was, is) = (key(old)?, key(new)?);
            let same = matches!((&was.0[..], &is.0[..]), ([Piece::Done(a)], [Piece::Done(b)]) if a == b);
            if same { (Op::Update, vec![is, image(new)?]) } else { (Op::UpdateKey, vec![was, is, image(new)?]) }
        }
        (Identity::FullRow, Some(old), Some(new)) => (Op::UpdateKey, vec![image(old)?, Line::default(), image(new)?]),
        (Identity::FullRow, Some(old), None) => (Op::Delete, vec![image(old)?]),
        // A delete by key is small; the rest has its own reason there.
        _ => return Ok(None),
    };
    let row = Row { op, lines };
    if row.lines.iter().any(|l| l.len() > u32::MAX.into()) {
        return Err("a row of more than 4 GiB".into());
    }
    Ok((row.len() > WRITE_BYTES as u64).then_some(row))
}
