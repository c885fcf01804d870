//! PostgreSQL's COPY text, one line per row without the newline.
//! Source: <https://www.postgresql.org/docs/current/sql-copy.html>, "Text Format".
//!
//! One addition: the field `\U` says "unchanged since the version before" (a TOASTed value that an UPDATE did not
//! touch, which the log does not carry). COPY never writes it, since it escapes every backslash of the data.

/// A field that stands for NULL.
pub const NULL: &[u8] = b"\\N";
/// A field that stands for "the value of the version before".
pub const UNCHANGED: &[u8] = b"\\U";

/// What a byte of the value becomes: 0 for itself, else the letter after the backslash.
const ESCAPE: [u8; 256] = {
    let mut t = [0u8; 256];
    t[8] = b'b';
    t[12] = b'f';
    t[10] = b'n';
    t[13] = b'r';
    t[9] = b't';
    t[11] = b'v';
    t[b'\\' as usize] = b'\\';
    t
};

/// Appends `value`, escaped.
pub fn escape_into(out: &mut Vec<u8>, value: &[u8]) {
    let mut from = 0;
    for (i, b) in value.iter().enumerate() {
        let letter = ESCAPE[*b as usize];
        if letter != 0 {
            out.extend_from_slice(&value[from..i]);
            out.extend_from_slice(&[b'\\', letter]);
            from = i + 1;
        }
    }
    out.extend_from_slice(&value[from..]);
}

/// How many bytes `value` takes once escaped.
pub fn escaped_len(value: &[u8]) -> usize {
    value.len() + value.iter().filter(|b| ESCAPE[**b as usize] != 0).count()
}

/// The fields of a line, still escaped. A line of a table without columns is empty and yields one empty field.
pub fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|b| *b == b'\t')
}

/// The value of a field: `None` for NULL. The caller has dealt with [`UNCHANGED`] before.
pub fn unescape(field: &[u8]) -> Option<Vec<u8>> {
    if field == NULL {
        return None;
    }
    let mut out = Vec::with_capacity(field.len());
    let mut bytes = field.iter();
    while let Some(b) = bytes.next() {
        if *b != b'\\' {
            out.push(*b);
            continue;
        }
        match bytes.next() {
            Some(b'b') => out.push(8),
            Some(b'f') => out.push(12),
            Some(b'n') => out.push(10),
            Some(b'r') => out.push(13),
            Some(b't') => out.push(9),
            Some(b'v') => out.push(11),
            Some(other) => out.push(*other),
            None => out.push(b'\\'),
        }
    }
    Some(out)
}

/// Whether any field of the line is [`UNCHANGED`].
pub fn has_unchanged(line: &[u8]) -> bool {
    fields(line).any(|f| f == UNCHANGED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_survives_and_holds_no_separator(v in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut e = Vec::new();
            escape_into(&mut e, &v);
            prop_assert_eq!(e.len(), escaped_len(&v));
            prop_assert!(!e.contains(&b'\t') && !e.contains(&b'\n'));
            prop_assert!(e != NULL && e != UNCHANGED);
            prop_assert_eq!(unescape(&e), Some(v));
        }
    }

    #[test]
    fn null_is_not_the_text_backslash_n() {
        assert_eq!(unescape(NULL), None);
        let mut e = Vec::new();
        escape_into(&mut e, b"\\N");
        assert_eq!(e, b"\\\\N");
        assert!(has_unchanged(b"a\t\\U\tb"));
        assert!(!has_unchanged(b"a\t\\\\U"));
    }
}
