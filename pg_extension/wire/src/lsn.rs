use std::fmt;
use std::str::FromStr;

/// A position in the write-ahead log, in bytes; written `16/B374D848` as PostgreSQL does.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    pub const ZERO: Self = Self(0);
    pub const MAX: Self = Self(u64::MAX);
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 as u32)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = String;

    /// Accepts what `pg_lsn` accepts: one to eight hexadecimal digits on each side of a slash.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let part = |p: &str| {
            if p.is_empty() || p.len() > 8 || !p.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(format!("'{s}' is not an LSN; an LSN looks like 16/B374D848"));
            }
            u32::from_str_radix(p, 16).map_err(|e| format!("'{s}' is not an LSN: {e}"))
        };
        let (hi, lo) =
            s.split_once('/').ok_or_else(|| format!("'{s}' is not an LSN; an LSN looks like 16/B374D848"))?;
        Ok(Self(u64::from(part(hi)?) << 32 | u64::from(part(lo)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::Lsn;

    #[test]
    fn text_round_trips_and_bad_text_is_refused() {
        for s in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(s.parse::<Lsn>().unwrap().to_string(), s);
        }
        for s in ["", "/", "1", "g/1", "1/", "123456789/0", "0/1 ", "+1/1"] {
            assert!(s.parse::<Lsn>().is_err(), "{s}");
        }
    }
}
