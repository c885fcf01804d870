//! Numbers as jsonb keeps them: the server's `numeric`, behind a header of four bytes.
//!
//! Source: `utils/adt/numeric.c`, `make_result` and `set_var_from_str`. Digits of base 10000, most significant first,
//! none of them zero at either end; the short header where scale and weight fit into it.

const BASE: u64 = 10_000;
const SHORT: u16 = 0x8000;
const SHORT_NEGATIVE: u16 = 0x2000;
const LONG_NEGATIVE: u16 = 0x4000;
const SPECIAL: u16 = 0xc000;

/// What a stored numeric is.
#[derive(Debug, PartialEq, Eq)]
pub enum Stored {
    /// As the server would form it anew: its bytes can be taken.
    Canonical,
    /// With a long header, which may be the form of an older server.
    Long,
    /// No number of JSON's.
    Special(&'static str),
}

/// Looks at a numeric, given what stands behind its varlena header.
pub fn stored(bytes: &[u8]) -> Stored {
    let header = bytes.first_chunk().map_or(0, |b| u16::from_le_bytes(*b));
    match header & SPECIAL {
        SPECIAL => Stored::Special(match header & 0xf000 {
            0xd000 => "Infinity",
            0xf000 => "-Infinity",
            _ => "NaN",
        }),
        SHORT => Stored::Canonical,
        _ => Stored::Long,
    }
}

/// Appends a numeric given what stands behind its varlena header.
pub fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    let size = (bytes.len() + 4) as u32;
    out.extend_from_slice(&(size << 2).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Appends an integer.
pub fn put_integer(out: &mut Vec<u8>, v: i64) {
    let mut digits = [0u16; 5];
    let mut at = digits.len();
    let mut n = v.unsigned_abs();
    while n > 0 {
        at -= 1;
        digits[at] = (n % BASE) as u16;
        n /= BASE;
    }
    form(out, v < 0, 0, digits.len() as i32 - at as i32 - 1, &digits[at..]);
}

/// Appends a decimal number from what the server writes for a float: digits, perhaps a point, perhaps an exponent. False:
/// it is none, and nothing was appended.
pub fn put_decimal(out: &mut Vec<u8>, text: &[u8]) -> bool {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |t| (true, t));
    let (mantissa, exponent) = match text.iter().position(|b| matches!(b, b'e' | b'E')) {
        Some(at) => {
            let Some(e) = std::str::from_utf8(&text[at + 1..]).ok().and_then(|e| e.parse::<i32>().ok()) else {
                return false;
            };
            (&text[..at], e)
        }
        None => (text, 0),
    };
    let point = mantissa.iter().position(|b| *b == b'.');
    let decimals: Vec<u8> = mantissa.iter().filter(|b| **b != b'.').map(|b| b.wrapping_sub(b'0')).collect();
    if decimals.is_empty() || decimals.len() > 64 || exponent.abs() > 1000 || decimals.iter().any(|d| *d > 9) {
        return false;
    }
    let whole = point.unwrap_or(mantissa.len()) as i32;
    let scale = (decimals.len() as i32 - whole - exponent).max(0);
    // Decimal digits before the point, which may be negative; the first group is filled up from the left.
    let before = whole + exponent;
    let weight = (before - 1).div_euclid(4);
    let lead = ((weight + 1) * 4 - before) as usize;
    let padded: Vec<u8> = std::iter::repeat_n(0, lead).chain(decimals).collect();
    let digits: Vec<u16> = padded
        .chunks(4)
        .map(|c| (0..4).fold(0, |sum, i| sum * 10 + u16::from(c.get(i).copied().unwrap_or(0))))
        .collect();
    form(out, negative, scale as u32, weight, &digits);
    true
}

fn form(out: &mut Vec<u8>, negative: bool, scale: u32, mut weight: i32, mut digits: &[u16]) {
    while let [0, rest @ ..] = digits {
        digits = rest;
        weight -= 1;
    }
    while let [rest @ .., 0] = digits {
        digits = rest;
    }
    let (negative, weight) = if digits.is_empty() { (false, 0) } else { (negative, weight) };
    let is_short = scale <= 63 && (-64..=63).contains(&weight);
    let size = 4 + if is_short { 2 } else { 4 } + 2 * digits.len();
    out.extend_from_slice(&((size as u32) << 2).to_le_bytes());
    if is_short {
        let sign = if negative { SHORT_NEGATIVE } else { 0 };
        let header = SHORT | sign | (scale as u16) << 7 | (weight as u16 & 0x7f);
        out.extend_from_slice(&header.to_le_bytes());
    } else {
        let sign = if negative { LONG_NEGATIVE } else { 0 };
        out.extend_from_slice(&(sign | scale as u16).to_le_bytes());
        out.extend_from_slice(&(weight as i16).to_le_bytes());
    }
    for d in digits {
        out.extend_from_slice(&d.to_le_bytes());
    }
}
