//! The frames of an object of the kind `large_objects` (FORMAT.md, "Large objects"): written, read, checked.

use crate::error::{Context, Error, Kind, Result};
use crate::merge::from_io;
use crate::repository::model::LargeObjectsRead;
use coffer_wire::put_frame;
use serde::{Deserialize, Serialize};
use std::io::Read;

/// Version of the content.
const VERSION: u32 = 1;
/// Longest piece of an object.
pub const PIECE_BYTES: usize = 1 << 20;

const HEAD: u8 = 0x50;
const OBJECT: u8 = 0x51;
const PIECE: u8 = 0x52;
const END: u8 = 0x53;
/// Longest description of a reading.
const HEAD_BYTES: usize = 16 << 20;

#[derive(Serialize, Deserialize)]
struct Head {
    v: u32,
    #[serde(flatten)]
    read: LargeObjectsRead,
}

/// An object begins, or goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    pub oid: u32,
    /// Index into the columns of the reading.
    pub column: u16,
    /// Where in the object the pieces that follow begin.
    pub at: u64,
}

/// Takes the objects of a reading, one after the other.
pub trait ObjectSink {
    /// Pieces of this one follow; false: they are not wanted.
    fn begin(&mut self, b: Begin) -> Result<bool>;
    fn piece(&mut self, bytes: &[u8]) -> Result<()>;
    /// It is complete, with this length.
    fn end(&mut self, bytes: u64) -> Result<()>;
}

/// The frame that a file starts with.
pub fn put_head(out: &mut Vec<u8>, read: &LargeObjectsRead) -> Result<()> {
    let text = serde_json::to_vec(&Head { v: VERSION, read: read.clone() })
        .context(Kind::Other, "cannot describe a reading of large objects")?;
    put_frame(out, HEAD, |b| b.extend_from_slice(&text));
    Ok(())
}

pub fn put_begin(out: &mut Vec<u8>, o: Begin) {
    put_frame(out, OBJECT, |b| {
        b.extend_from_slice(&o.oid.to_le_bytes());
        b.extend_from_slice(&o.column.to_le_bytes());
        b.extend_from_slice(&o.at.to_le_bytes());
    });
}

pub fn put_piece(out: &mut Vec<u8>, bytes: &[u8]) {
    put_frame(out, PIECE, |b| b.extend_from_slice(bytes));
}

pub fn put_end(out: &mut Vec<u8>, bytes: u64) {
    put_frame(out, END, |b| b.extend_from_slice(&bytes.to_le_bytes()));
}

fn bad(what: impl Into<String>) -> Error {
    Error::new(Kind::Verification, what).code("malformed")
}

/// Reads a file or a section of one to its end. Returns how many objects begin in it.
///
/// # Errors
/// `Verification`: frames that make no sense, objects out of order, an end that does not fit the pieces.
pub fn read(plain: &mut dyn Read, sink: &mut dyn ObjectSink) -> Result<u64> {
    let (mut objects, mut body) = (0, Vec::new());
    let mut open: Option<(Begin, bool)> = None;
    let mut last = None;
    loop {
        let mut head = [0u8; 5];
        let n = plain.read(&mut head[..1]).map_err(from_io)?;
        if n == 0 {
            // One that goes on in another file has no end here.
            return Ok(objects);
        }
        plain.read_exact(&mut head[1..]).map_err(from_io)?;
        let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let limit = if head[0] == HEAD { HEAD_BYTES } else { PIECE_BYTES };
        if len > limit {
            return Err(bad(format!("a frame of {len} bytes among large objects")));
        }
        body.resize(len, 0);
        plain.read_exact(&mut body).map_err(from_io)?;
        match (head[0], &mut open) {
            (HEAD, None) => {
                let head: Head = serde_json::from_slice(&body)
                    .context(Kind::Verification, "the description of large objects is not readable")
                    .map_err(|e| e.code("malformed"))?;
                if head.v != VERSION {
                    return Err(Error::new(
                        Kind::Refused,
                        format!("large objects of version {} are not known here", head.v),
                    )
                    .hint("use the version of coffer that wrote them, or a newer one"));
                }
            }
            (OBJECT, None) => {
                let b = begin_of(&body)?;
                if last.is_some_and(|l| b.oid <= l) {
                    return Err(bad(format!("large object {} is not where it belongs", b.oid)));
                }
                last = Some(b.oid);
                objects += u64::from(b.at == 0);
                open = Some((b, sink.begin(b)?));
            }
            (PIECE, Some((b, wanted))) => {
                b.at += len as u64;
                if *wanted {
                    sink.piece(&body)?;
                }
            }
            (END, Some((b, wanted))) => {
                if body[..] != b.at.to_le_bytes() {
                    return Err(bad(format!("large object {} does not have the length that it ends with", b.oid)));
                }
                if *wanted {
                    sink.end(b.at)?;
                }
                open = None;
            }
            (k, _) => return Err(bad(format!("a frame of kind {k:02x} where none of large objects can be"))),
        }
    }
}

fn begin_of(body: &[u8]) -> Result<Begin> {
    let body: &[u8; 14] = body.try_into().map_err(|_| bad("the frame of a large object has another length"))?;
    let part = |from: usize, n: usize| body[from..from + n].iter().rev().fold(0u64, |a, b| a << 8 | u64::from(*b));
    Ok(Begin { oid: part(0, 4) as u32, column: part(4, 2) as u16, at: part(6, 8) })
}

/// Reads everything and wants nothing: for checks.
pub struct Nothing;

impl ObjectSink for Nothing {
    fn begin(&mut self, _: Begin) -> Result<bool> {
        Ok(false)
    }

    fn piece(&mut self, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn end(&mut self, _: u64) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::model::LargeObjectColumn;
    use coffer_wire::Lsn;

    #[derive(Default)]
    struct Seen(Vec<String>);

    impl ObjectSink for Seen {
        fn begin(&mut self, b: Begin) -> Result<bool> {
            self.0.push(format!("{} {} {}", b.oid, b.column, b.at));
            Ok(b.oid != 9)
        }
        fn piece(&mut self, bytes: &[u8]) -> Result<()> {
            self.0.push(String::from_utf8_lossy(bytes).into_owned());
            Ok(())
        }
        fn end(&mut self, bytes: u64) -> Result<()> {
            self.0.push(format!("= {bytes}"));
            Ok(())
        }
    }

    fn file() -> Vec<u8> {
        let column = LargeObjectColumn { relid: 5, attnum: 2, relation: "public.t".into(), column: "a b".into() };
        let mut out = Vec::new();
        put_head(&mut out, &LargeObjectsRead { lsn: Lsn(7), time_us: 8, columns: vec![column] }).unwrap();
        for (oid, at, text) in [(7, 3, "abc"), (9, 0, "no"), (0x0102_0304, 0, "")] {
            put_begin(&mut out, Begin { oid, column: 0, at });
            if !text.is_empty() {
                put_piece(&mut out, text.as_bytes());
            }
            put_end(&mut out, at + text.len() as u64);
        }
        out
    }

    #[test]
    fn what_was_written_is_read() {
        let (out, mut seen) = (file(), Seen::default());
        assert!(
            String::from_utf8_lossy(&out[5..]).starts_with(r#"{"v":1,"lsn":"0/7","time_us":8,"columns":[{"relid":5"#)
        );
        assert_eq!(read(&mut &out[..], &mut seen).unwrap(), 2);
        assert_eq!(seen.0, ["7 0 3", "abc", "= 6", "9 0 0", "16909060 0 0", "= 0"]);
        assert_eq!(read(&mut &out[..], &mut Nothing).unwrap(), 2);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused = |f: fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            f(&mut out);
            read(&mut &out[..], &mut Nothing).unwrap_err().kind()
        };
        assert_eq!(refused(|o| put_piece(o, b"x")), Kind::Verification);
        assert_eq!(refused(|o| put_end(o, 0)), Kind::Verification);
        assert_eq!(
            refused(|o| {
                put_begin(o, Begin { oid: 1, column: 0, at: 0 });
                put_end(o, 1);
            }),
            Kind::Verification
        );
        assert_eq!(
            refused(|o| {
                for _ in 0..2 {
                    put_begin(o, Begin { oid: 1, column: 0, at: 0 });
                    put_end(o, 0);
                }
            }),
            Kind::Verification
        );
        assert_eq!(refused(|o| put_frame(o, 1, |_| {})), Kind::Verification);
        assert_eq!(refused(|o| put_frame(o, PIECE, |b| b.resize(PIECE_BYTES + 1, 0))), Kind::Verification);
        let cut = &file()[..file().len() - 3];
        assert!(read(&mut &*cut, &mut Nothing).is_err());
    }
}
