//! Values of COPY text as CSV, SQL and JSON, piece by piece: a value may be larger than memory.

use crate::error::{Error, Kind, Result};
use crate::merge::{Field, Image};
use coffer_wire::{Column, copy_text};
use std::io::{Read, Write};

/// Bytes of a large value that are held at a time.
const PIECE: usize = 64 << 10;

/// How a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Quoted when it has to be; NULL is nothing at all.
    Csv,
    /// A string literal, or NULL.
    Sql,
    /// A JSON string, or null.
    JsonString,
    /// The text itself, or null: numbers.
    JsonNumber,
    JsonBool,
    /// A JSON value, on one line.
    JsonValue,
}

impl Style {
    /// What JSON makes of a column. As `to_jsonb` does, with the text for what JSON cannot say.
    pub fn json_of(c: &Column) -> Self {
        match c.type_oid {
            16 => Self::JsonBool,
            // int8, int2, int4, oid, float4, float8, numeric
            20 | 21 | 23 | 26 | 700 | 701 | 1700 => Self::JsonNumber,
            // json, jsonb
            114 | 3802 => Self::JsonValue,
            _ => Self::JsonString,
        }
    }
}

fn io(e: std::io::Error) -> Error {
    Error::new(Kind::Other, "cannot write").source(e)
}

/// Undoes COPY's escapes across pieces.
#[derive(Default)]
pub(super) struct Unescape {
    pending: bool,
}

impl Unescape {
    pub(super) fn feed(&mut self, mut b: &[u8], out: &mut Vec<u8>) {
        if self.pending && !b.is_empty() {
            out.push(plain(b[0]));
            b = &b[1..];
            self.pending = false;
        }
        while let Some(at) = memchr::memchr(b'\\', b) {
            out.extend_from_slice(&b[..at]);
            match b.get(at + 1) {
                Some(c) => {
                    out.push(plain(*c));
                    b = &b[at + 2..];
                }
                None => {
                    self.pending = true;
                    return;
                }
            }
        }
        out.extend_from_slice(b);
    }
}

/// A whole field without COPY's escapes.
#[cfg(feature = "parquet")]
pub(super) fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    Unescape::default().feed(field, &mut out);
    out
}

fn plain(letter: u8) -> u8 {
    match letter {
        b'b' => 8,
        b'f' => 12,
        b'n' => 10,
        b'r' => 13,
        b't' => 9,
        b'v' => 11,
        other => other,
    }
}

/// Writes one field of a row.
pub fn field(image: &Image<'_>, f: Field<'_>, style: Style, out: &mut dyn Write) -> Result<()> {
    let mut unescape = Unescape::default();
    let mut text = Vec::new();
    match f {
        Field::Bytes(b) if b == copy_text::NULL => {
            let null: &[u8] = match style {
                Style::Csv => b"",
                Style::Sql => b"NULL",
                _ => b"null",
            };
            out.write_all(null).map_err(io)
        }
        Field::Bytes(b) => {
            unescape.feed(b, &mut text);
            small(&text, style, out).map_err(io)
        }
        Field::Large(r) => {
            let mut from = image.open(r);
            let mut piece = vec![0; PIECE];
            let (before, after) = quotes(style);
            out.write_all(before).map_err(io)?;
            loop {
                let n = from.read(&mut piece).map_err(crate::merge::from_io)?;
                if n == 0 {
                    break;
                }
                text.clear();
                unescape.feed(&piece[..n], &mut text);
                inside(&text, style, out).map_err(io)?;
            }
            out.write_all(after).map_err(io)
        }
    }
}

fn quotes(style: Style) -> (&'static [u8], &'static [u8]) {
    match style {
        Style::Csv | Style::JsonString => (b"\"", b"\""),
        Style::Sql => (b"'", b"'"),
        _ => (b"", b""),
    }
}

fn small(text: &[u8], style: Style, out: &mut dyn Write) -> std::io::Result<()> {
    match style {
        Style::Csv if !csv_needs_quotes(text) => return out.write_all(text),
        Style::JsonBool => return out.write_all(if text == b"t" { b"true" } else { b"false" }),
        // NaN and the infinities are no JSON numbers.
        Style::JsonNumber if text.last().is_none_or(|b| !b.is_ascii_digit()) => {
            return small(text, Style::JsonString, out);
        }
        _ => {}
    }
    let (before, after) = quotes(style);
    out.write_all(before)?;
    inside(text, style, out)?;
    out.write_all(after)
}

/// An empty value must not be read as NULL, and `\.` alone on a line not as the end of the data.
fn csv_needs_quotes(text: &[u8]) -> bool {
    text.is_empty() || text == b"\\." || memchr::memchr3(b'"', b',', b'\n', text).is_some() || text.contains(&b'\r')
}

/// What stands between the quotes.
fn inside(text: &[u8], style: Style, out: &mut dyn Write) -> std::io::Result<()> {
    match style {
        Style::Csv => doubled(text, b'"', out),
        Style::Sql => doubled(text, b'\'', out),
        // A line break between the tokens of a json value is a blank like any other; inside its strings there is none.
        Style::JsonValue => {
            for part in text.split_inclusive(|b| matches!(b, b'\n' | b'\r')) {
                match part.split_last() {
                    Some((b'\n' | b'\r', rest)) => {
                        out.write_all(rest)?;
                        out.write_all(b" ")?;
                    }
                    _ => out.write_all(part)?,
                }
            }
            Ok(())
        }
        Style::JsonString => json_escaped(text, out),
        Style::JsonNumber | Style::JsonBool => out.write_all(text),
    }
}

fn doubled(text: &[u8], quote: u8, out: &mut dyn Write) -> std::io::Result<()> {
    let mut from = 0;
    for at in memchr::memchr_iter(quote, text) {
        out.write_all(&text[from..=at])?;
        out.write_all(&[quote])?;
        from = at + 1;
    }
    out.write_all(&text[from..])
}

fn json_escaped(text: &[u8], out: &mut dyn Write) -> std::io::Result<()> {
    let mut from = 0;
    for (at, b) in text.iter().enumerate() {
        let short: &[u8] = match b {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            0..=0x1f => b"",
            _ => continue,
        };
        out.write_all(&text[from..at])?;
        if short.is_empty() {
            write!(out, "\\u{b:04x}")?;
        } else {
            out.write_all(short)?;
        }
        from = at + 1;
    }
    out.write_all(&text[from..])
}

/// A JSON string of a name.
pub fn json_name(name: &str) -> String {
    serde_json::Value::String(name.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(text: &str, style: Style) -> String {
        let mut out = Vec::new();
        small(text.as_bytes(), style, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn values_are_written_as_each_format_wants_them() {
        assert_eq!(written("a,\"b\"", Style::Csv), "\"a,\"\"b\"\"\"");
        assert_eq!(written("", Style::Csv), "\"\"");
        assert_eq!(written("plain", Style::Csv), "plain");
        assert_eq!(written("it's \\", Style::Sql), "'it''s \\'");
        assert_eq!(written("1.50", Style::JsonNumber), "1.50");
        assert_eq!(written("NaN", Style::JsonNumber), "\"NaN\"");
        assert_eq!(written("-Infinity", Style::JsonNumber), "\"-Infinity\"");
        assert_eq!(written("t", Style::JsonBool), "true");
        assert_eq!(written("{\n \"a\":1}\n", Style::JsonValue), "{  \"a\":1} ");
    }

    proptest! {
        #[test]
        fn a_string_survives_json_and_an_escape_may_fall_between_two_pieces(s in "\\PC*[\\n\\t\\\\\"\u{1}]?\\PC*", cut in any::<proptest::sample::Index>()) {
            let back: String = serde_json::from_str(&written(&s, Style::JsonString)).unwrap();
            prop_assert_eq!(&back, &s);
            let mut e = Vec::new();
            copy_text::escape_into(&mut e, s.as_bytes());
            let cut = cut.index(e.len() + 1);
            let (mut u, mut out) = (Unescape::default(), Vec::new());
            u.feed(&e[..cut], &mut out);
            u.feed(&e[cut..], &mut out);
            prop_assert_eq!(out, s.as_bytes());
        }
    }
}
