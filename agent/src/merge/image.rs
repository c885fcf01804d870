//! A row's image in the merge: a line of COPY text, or its fields with the large ones kept in the scratch.
//!
//! Encoded, so that it travels through the sort as bytes: `0 | line`, or `1 | n u16 | fields`, each field
//! `0 | len u32 | bytes` or `1 | blob reference`. A hole (`\U`) is a field like any other until it is filled.

use super::scratch::{BLOB_REF_LEN, BlobRef, BlobWriter, Blobs};
use crate::error::{Error, Kind, Result};
use coffer_wire::copy_text;
use sha2::{Digest, Sha256};
use std::io::{Read, Write};

/// A field of at least this many bytes leaves the sort's memory (when the row came as a stream or is itself large).
const LARGE_FIELD: usize = 64 << 10;
/// A line of at most this many bytes stays a line.
pub(super) const LARGE_LINE: usize = 1 << 20;

const LINE: u8 = 0;
const FIELDS: u8 = 1;

/// A row's image as a [`super::RowSink`] gets it. It may be larger than memory.
#[derive(Clone, Copy)]
pub struct Image<'a> {
    encoded: &'a [u8],
    blobs: &'a Blobs,
}

/// One field of an image, still escaped.
#[derive(Clone, Copy, Debug)]
pub enum Field<'a> {
    Bytes(&'a [u8]),
    Large(BlobRef),
}

impl Field<'_> {
    fn is_hole(&self) -> bool {
        matches!(self, Field::Bytes(b) if *b == copy_text::UNCHANGED)
    }
}

impl<'a> Image<'a> {
    pub(super) fn new(encoded: &'a [u8], blobs: &'a Blobs) -> Self {
        Self { encoded, blobs }
    }

    /// The line of COPY text without newline, when it is in memory; `None` for a large row: use [`Self::write_to`].
    pub fn as_line(&self) -> Option<&'a [u8]> {
        match self.encoded.split_first() {
            Some((&LINE, line)) => Some(line),
            _ => None,
        }
    }

    /// Bytes of the line.
    pub fn len(&self) -> u64 {
        match self.as_line() {
            Some(l) => l.len() as u64,
            None => {
                let fields = fields(self.encoded);
                let tabs = fields.len().saturating_sub(1) as u64;
                let bytes: u64 = fields
                    .iter()
                    .map(|f| match f {
                        Field::Bytes(b) => b.len() as u64,
                        Field::Large(r) => r.len,
                    })
                    .sum();
                tabs + bytes
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The fields, escaped as in COPY text.
    pub fn fields(&self) -> Vec<Field<'a>> {
        fields(self.encoded)
    }

    /// Whether a field is this, escaped.
    pub fn is_field(&self, at: usize, value: &[u8]) -> bool {
        matches!(self.fields().get(at), Some(Field::Bytes(b)) if *b == value)
    }

    /// The same with another value, escaped, in one field. `out` holds it.
    pub fn with_field<'b>(&self, at: usize, value: &[u8], out: &'b mut Vec<u8>) -> Image<'b>
    where
        'a: 'b,
    {
        let mut fields = self.fields();
        if let Some(f) = fields.get_mut(at) {
            *f = Field::Bytes(value);
        }
        out.clear();
        put_fields(out, &fields);
        Image { encoded: out, blobs: self.blobs }
    }

    /// Reads a large field.
    pub fn open(&self, large: BlobRef) -> impl Read + 'a {
        self.blobs.reader(large)
    }

    /// Writes the line.
    pub fn write_to(&self, w: &mut dyn Write) -> Result<()> {
        let io = |e: std::io::Error| crate::error::Error::new(Kind::Other, "cannot pass a row on").source(e);
        if let Some(line) = self.as_line() {
            return w.write_all(line).map_err(io);
        }
        for (i, f) in self.fields().into_iter().enumerate() {
            if i > 0 {
                w.write_all(b"\t").map_err(io)?;
            }
            match f {
                Field::Bytes(b) => w.write_all(b).map_err(io)?,
                Field::Large(r) => {
                    std::io::copy(&mut self.open(r), w).map_err(io)?;
                }
            }
        }
        Ok(())
    }

    /// The whole line in memory: for tests and for rows known to be small.
    pub fn to_line(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.write_to(&mut out)?;
        Ok(out)
    }

    /// SHA-256 of the line.
    pub(super) fn hash(&self) -> Result<[u8; 32]> {
        struct Hash(Sha256);
        impl Write for Hash {
            fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
                self.0.update(b);
                Ok(b.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut h = Hash(Sha256::new());
        self.write_to(&mut h)?;
        Ok(h.0.finalize().into())
    }

    /// The first `n` bytes of the line.
    pub(super) fn prefix(&self, n: usize) -> Result<Vec<u8>> {
        struct Prefix(Vec<u8>, usize);
        impl Write for Prefix {
            fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
                let room = self.1 - self.0.len();
                self.0.extend_from_slice(&b[..b.len().min(room)]);
                Ok(b.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        if let Some(line) = self.as_line() {
            return Ok(line[..line.len().min(n)].to_vec());
        }
        let mut p = Prefix(Vec::new(), n);
        for (i, f) in self.fields().into_iter().enumerate() {
            if i > 0 {
                let _ = p.write(b"\t");
            }
            match f {
                Field::Bytes(b) => {
                    let _ = p.write(b);
                }
                Field::Large(r) => {
                    let room = n - p.0.len();
                    std::io::copy(&mut self.open(r).take(room as u64), &mut p)
                        .map_err(|e| Error::new(Kind::Other, "cannot read back a large value").source(e))?;
                }
            }
            if p.0.len() >= n {
                break;
            }
        }
        Ok(p.0)
    }
}

/// The fields of an encoded image.
pub(super) fn fields(encoded: &[u8]) -> Vec<Field<'_>> {
    match encoded.split_first() {
        Some((&LINE, line)) => copy_text::fields(line).map(Field::Bytes).collect(),
        Some((&FIELDS, mut b)) => {
            let n = u16::from_le_bytes([b[0], b[1]]);
            b = &b[2..];
            let mut out = Vec::with_capacity(usize::from(n));
            for _ in 0..n {
                if b[0] == 0 {
                    let len = u32::from_le_bytes([b[1], b[2], b[3], b[4]]) as usize;
                    out.push(Field::Bytes(&b[5..5 + len]));
                    b = &b[5 + len..];
                } else {
                    out.push(Field::Large(BlobRef::decode(&b[1..1 + BLOB_REF_LEN])));
                    b = &b[1 + BLOB_REF_LEN..];
                }
            }
            out
        }
        _ => Vec::new(),
    }
}

/// Appends an encoded image that is this line.
pub(super) fn put_line(out: &mut Vec<u8>, line: &[u8]) {
    out.push(LINE);
    out.extend_from_slice(line);
}

/// Appends an encoded image of these fields: a line when none of them is large.
pub(super) fn put_fields(out: &mut Vec<u8>, fields: &[Field<'_>]) {
    if fields.iter().all(|f| matches!(f, Field::Bytes(_))) {
        out.push(LINE);
        for (i, f) in fields.iter().enumerate() {
            if i > 0 {
                out.push(b'\t');
            }
            if let Field::Bytes(b) = f {
                out.extend_from_slice(b);
            }
        }
        return;
    }
    out.push(FIELDS);
    out.extend_from_slice(&(fields.len() as u16).to_le_bytes());
    for f in fields {
        match f {
            Field::Bytes(b) => {
                out.push(0);
                out.extend_from_slice(&(b.len() as u32).to_le_bytes());
                out.extend_from_slice(b);
            }
            Field::Large(r) => {
                out.push(1);
                r.encode(out);
            }
        }
    }
}

/// Whether an encoded image has a hole.
pub(super) fn has_hole(encoded: &[u8]) -> bool {
    match encoded.split_first() {
        Some((&LINE, line)) => line_has_hole(line),
        _ => fields(encoded).iter().any(Field::is_hole),
    }
}

/// Whether a line has a hole; quick when it holds no `\U` at all.
pub(super) fn line_has_hole(line: &[u8]) -> bool {
    memchr::memmem::find(line, copy_text::UNCHANGED).is_some() && copy_text::has_unchanged(line)
}

/// `over` with its holes filled from `under`, both in the same columns; returns whether a hole is left.
pub(super) fn patch(over: &[u8], under: &[u8], out: &mut Vec<u8>) -> Result<bool> {
    let (mut top, bottom) = (fields(over), fields(under));
    if top.len() != bottom.len() {
        return Err(Error::new(
            Kind::Verification,
            format!("an update has {} fields, the row before it {}", top.len(), bottom.len()),
        )
        .code("malformed"));
    }
    let mut left = false;
    for (t, b) in top.iter_mut().zip(bottom) {
        if t.is_hole() {
            left |= b.is_hole();
            *t = b;
        }
    }
    put_fields(out, &top);
    Ok(left)
}

/// `image` with every hole NULL.
pub(super) fn holes_to_null(encoded: &[u8], out: &mut Vec<u8>) {
    let mut f = fields(encoded);
    for f in &mut f {
        if f.is_hole() {
            *f = Field::Bytes(copy_text::NULL);
        }
    }
    put_fields(out, &f);
}

/// Builds an encoded image from a line that comes in pieces and may not fit in memory.
pub(super) struct LineBuilder<'a> {
    blobs: &'a Blobs,
    /// Finished fields.
    fields: Vec<Owned>,
    field: Vec<u8>,
    large: Option<BlobWriter<'a>>,
    hash: Sha256,
    prefix: Vec<u8>,
    len: u64,
}

enum Owned {
    Bytes(Vec<u8>),
    Large(BlobRef),
}

impl<'a> LineBuilder<'a> {
    pub fn new(blobs: &'a Blobs) -> Self {
        Self {
            blobs,
            fields: Vec::new(),
            field: Vec::new(),
            large: None,
            hash: Sha256::new(),
            prefix: Vec::new(),
            len: 0,
        }
    }

    pub fn push(&mut self, mut piece: &[u8]) -> Result<()> {
        self.hash.update(piece);
        let room = super::key::full_row_prefix() - self.prefix.len();
        self.prefix.extend_from_slice(&piece[..piece.len().min(room)]);
        self.len += piece.len() as u64;
        while let Some(tab) = memchr::memchr(b'\t', piece) {
            self.extend(&piece[..tab])?;
            self.end_field()?;
            piece = &piece[tab + 1..];
        }
        self.extend(piece)
    }

    fn extend(&mut self, b: &[u8]) -> Result<()> {
        if let Some(w) = &mut self.large {
            return w.write(b);
        }
        self.field.extend_from_slice(b);
        if self.field.len() >= LARGE_FIELD {
            let mut w = self.blobs.writer();
            w.write(&self.field)?;
            self.field.clear();
            self.large = Some(w);
        }
        Ok(())
    }

    fn end_field(&mut self) -> Result<()> {
        self.fields.push(match self.large.take() {
            Some(w) => Owned::Large(w.finish()?),
            None => Owned::Bytes(std::mem::take(&mut self.field)),
        });
        Ok(())
    }

    /// The encoded image, and the row key it has when rows are told apart by the whole row.
    pub fn finish(mut self) -> Result<(Vec<u8>, Vec<u8>)> {
        self.end_field()?;
        let fields: Vec<_> = self
            .fields
            .iter()
            .map(|f| match f {
                Owned::Bytes(b) => Field::Bytes(b),
                Owned::Large(r) => Field::Large(*r),
            })
            .collect();
        let mut out = Vec::new();
        put_fields(&mut out, &fields);
        let hash = self.hash;
        let key = super::key::full_row_key(&self.prefix, self.len, || hash.finalize().into());
        Ok((out, key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::scratch::Scratch;

    #[test]
    fn a_line_in_pieces_is_the_line_with_its_large_fields_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap();
        let blobs = scratch.blobs().unwrap();
        let big = vec![b'x'; 700_000];
        let line = [b"1\t".as_slice(), &big, b"\t\\N\t", &big, b"y"].concat();
        for piece in [1000, 65_536, 10_000_000] {
            let mut b = LineBuilder::new(&blobs);
            for p in line.chunks(piece) {
                b.push(p).unwrap();
            }
            let (encoded, key) = b.finish().unwrap();
            assert!(encoded.len() < 1000);
            assert_eq!(key, super::super::key::full_row_key_of(&line));
            let image = Image::new(&encoded, &blobs);
            assert_eq!(image.len(), line.len() as u64);
            assert_eq!(image.to_line().unwrap(), line);
            assert_eq!(image.prefix(512).unwrap(), &line[..512]);
        }
    }

    #[test]
    fn holes_are_filled_field_by_field() {
        let mut over = Vec::new();
        put_line(&mut over, b"1\t\\U\t\\\\U");
        let mut under = Vec::new();
        put_line(&mut under, b"0\t\\N\tz");
        assert!(has_hole(&over));
        let mut out = Vec::new();
        assert!(!patch(&over, &under, &mut out).unwrap());
        assert_eq!(&out[1..], b"1\t\\N\t\\\\U");
        assert!(!has_hole(&out));
        assert!(patch(&over, &under[..2], &mut out).is_err());
    }
}
