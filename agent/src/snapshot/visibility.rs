//! Which transactions a `pg_snapshot` sees.
//!
//! The rule is `pg_visible_in_snapshot` on 64-bit top-level transaction ids, and it is exact: a transaction that the
//! snapshot sees has all of its rows in what was read, one that it does not see has none. Log positions cannot say
//! this: a commit record can lie before the snapshot's insert position while its transaction is still invisible (it
//! waits for fsync or for a standby). Source: `src/backend/utils/adt/xid8funcs.c`.

use crate::error::{Error, Kind, Result};
use std::str::FromStr;

/// A `pg_snapshot`: `xmin:xmax:xip,xip,…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PgSnapshot {
    /// Every transaction below it had ended.
    pub xmin: u64,
    /// Every transaction at or above it had not begun.
    pub xmax: u64,
    /// Those between that were running, ascending.
    running: Vec<u64>,
}

impl PgSnapshot {
    /// Whether the snapshot sees the effects of `xid`, which is known to have committed.
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.running.binary_search(&xid).is_err())
    }
}

impl FromStr for PgSnapshot {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad = || Error::new(Kind::Other, format!("'{s}' is not a snapshot as the server writes it"));
        let mut parts = s.split(':');
        let mut number = || parts.next().and_then(|p| p.parse::<u64>().ok());
        let (xmin, xmax) = (number().ok_or_else(bad)?, number().ok_or_else(bad)?);
        let list = parts.next().ok_or_else(bad)?;
        let mut running = list
            .split(',')
            .filter(|x| !x.is_empty())
            .map(|x| x.parse::<u64>().map_err(|_| bad()))
            .collect::<Result<Vec<_>>>()?;
        running.sort_unstable();
        if parts.next().is_some() || xmin == 0 || xmax < xmin {
            return Err(bad());
        }
        Ok(Self { xmin, xmax, running })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_is_the_servers() {
        let s: PgSnapshot = "10:20:10,14,15".parse().unwrap();
        // Measured with pg_visible_in_snapshot(n::text::xid8, '10:20:10,14,15').
        for (xid, seen) in [(9, true), (10, false), (11, true), (14, false), (15, false), (19, true), (20, false)] {
            assert_eq!(s.sees(xid), seen, "{xid}");
        }
        let quiet: PgSnapshot = "735:735:".parse().unwrap();
        assert!(quiet.sees(734) && !quiet.sees(735));
        let wide: PgSnapshot = "4294967300:4294967302:4294967301".parse().unwrap();
        assert!(wide.sees(5) && wide.sees(4_294_967_300) && !wide.sees(4_294_967_301));
    }

    #[test]
    fn other_text_is_refused() {
        for bad in ["", "1", "1:2", "2:1:", "a:2:", "1:2:x", "1:2::", "0:1:"] {
            assert!(bad.parse::<PgSnapshot>().is_err(), "{bad}");
        }
    }
}
