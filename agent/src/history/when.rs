//! What `--to` takes: a time, an LSN, a restore point, a backup, or `latest`.

use crate::clock::rfc3339;
use coffer_wire::Lsn;
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// A point in a source's history as people name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// What is durable when the command starts.
    Latest,
    /// Microseconds since 1970-01-01 UTC, by the source's clock: the prefix before the first commit later than it.
    Time(i64),
    /// Commits with `end_lsn` at or below it.
    Lsn(Lsn),
    /// The commit of a restore point.
    Name(String),
    /// The point of a backup.
    Backup(Uuid),
    /// Just before the commit of a restore in place.
    Undo(Uuid),
}

impl FromStr for When {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        if s == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(name) = s.strip_prefix("name:") {
            if name.is_empty() {
                return Err("name: is followed by a restore point's name".into());
            }
            return Ok(Self::Name(name.to_owned()));
        }
        if let Some(id) = s.strip_prefix("backup:") {
            let id =
                Uuid::try_parse(id).map_err(|_| format!("'{id}' is not a backup's id; `coffer list` shows them"))?;
            return Ok(Self::Backup(id));
        }
        if let Some(id) = s.strip_prefix("undo:") {
            let id = Uuid::try_parse(id).map_err(|_| format!("'{id}' is not the id of a restore's undo"))?;
            return Ok(Self::Undo(id));
        }
        if s.contains('/') {
            return s.parse().map(Self::Lsn);
        }
        s.parse::<jiff::Timestamp>().map(|t| Self::Time(t.as_microsecond())).map_err(|e| {
            format!(
                "'{s}' is no point in time: write an RFC 3339 time with its offset (2026-11-22T13:00:00Z), an LSN \
                 (16/B374D848), name:RESTORE_POINT, backup:ID or latest ({e})"
            )
        })
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Time(us) => f.write_str(&rfc3339(*us)),
            Self::Lsn(l) => l.fmt(f),
            Self::Name(n) => write!(f, "name:{n}"),
            Self::Backup(b) => write!(f, "backup:{b}"),
            Self::Undo(id) => write!(f, "undo:{id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_name_a_point_is_read_and_nothing_is_guessed() {
        assert_eq!("latest".parse(), Ok(When::Latest));
        assert_eq!("16/B374D848".parse(), Ok(When::Lsn(Lsn(0x16_B374_D848))));
        assert_eq!("name:before x".parse(), Ok(When::Name("before x".into())));
        assert_eq!("1970-01-01T01:00:00.5+01:00".parse(), Ok(When::Time(500_000)));
        let id = Uuid::from_u128(7);
        assert_eq!(format!("backup:{id}").parse(), Ok(When::Backup(id)));
        assert_eq!(format!("undo:{id}").parse(), Ok(When::Undo(id)));
        // A time without an offset could be any hour: it is refused.
        for bad in ["", "Latest", "name:", "backup:7", "2026-11-22T13:00:00", "2026-11-22", "yesterday", "16/"] {
            assert!(bad.parse::<When>().is_err(), "{bad}");
        }
    }
}
