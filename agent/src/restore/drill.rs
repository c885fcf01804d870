//! A restore that nobody needs: into a database of its own, read back, compared with the merge that it came from, and
//! dropped.
//!
//! Each side is a digest per table of its rows as lines of COPY text, whatever their order: the sum of what SHA-256 makes
//! of each. The merge is read twice, so that what the restore was given is not what it is judged by.

use super::database;
use super::request::{Means, Place, Request};
use super::run::{Prepared, blocking, leased, run, shared};
use crate::crypto::Sha256;
use crate::dsn::Dsn;
use crate::error::{Error, Kind, Result};
use crate::history::{Target, When};
use crate::merge::{Image, RowSink};
use crate::sql::{self, SqlClient, SqlContext};
use crate::tenant::Tenant;
use coffer_wire::{Relation, quote_ident};
use futures::TryStreamExt;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_postgres::error::SqlState;

/// How long the definitions of the newest point may take to be archived.
const DEFINITIONS_WAIT: Duration = Duration::from_secs(120);

/// A table of a drill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrilledTable {
    /// `schema.name`, quoted where SQL needs it.
    pub relation: String,
    /// By the repository.
    pub rows: u64,
    /// In the database that was restored.
    pub restored: u64,
    /// The digests are equal, too.
    pub same: bool,
}

/// What a drill found.
#[derive(Clone, Debug)]
pub struct Drilled {
    pub target: Target,
    pub tables: Vec<DrilledTable>,
    /// Tables that could not be compared, and why.
    pub skipped: Vec<(String, String)>,
    pub warnings: Vec<String>,
    pub seconds: f64,
}

impl Drilled {
    /// Nothing differs of what was compared.
    pub fn is_same(&self) -> bool {
        self.tables.iter().all(|t| t.same)
    }

    /// What differs, in words that name no value.
    pub fn counts(&self) -> Option<String> {
        let one = |t: &DrilledTable| {
            if t.rows == t.restored {
                format!("{}: {} rows came back, not all with the values that they were to have", t.relation, t.restored)
            } else {
                format!("{}: {} rows came back of {}", t.relation, t.restored, t.rows)
            }
        };
        let all: Vec<String> = self.tables.iter().filter(|t| !t.same).map(one).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

/// Restores the tenant into the database `dsn`, which must be absent, compares, and drops it.
///
/// # Errors
/// As [`run`].
pub async fn drill(means: &Means<'_>, tenant: &Tenant, to: &When, dsn: &Dsn) -> Result<Drilled> {
    let place = || Place::Database(Box::new(dsn.clone()));
    let asked = Request { wait: Some(DEFINITIONS_WAIT), ..Request::new(tenant.clone(), to.clone(), place()) };
    leased(means, &asked, async {
        let started = Instant::now();
        let Prepared { target, at, mut history, .. } = Prepared::new(means, &asked).await?;
        // The reference data comes along, and is looked at as the tenant's rows are.
        let (shared, _) = shared(means.opened, means.source.1, &mut history, &target, &at).await?;
        // The very same point, whatever is shipped meanwhile.
        let to = match to {
            When::Latest => When::Lsn(target.lsn),
            other => other.clone(),
        };
        let restored = run(means, &Request { to, ..asked.clone() }).await?;
        let done = async {
            let watch = means.watch.clone();
            let merged = blocking(move || {
                let mut digests = Digests::default();
                for rows in std::iter::once(at).chain(shared.map(|(_, rows)| rows)) {
                    rows.read(&mut Watched(&mut digests, &watch))?;
                }
                Ok(digests.tables)
            })
            .await?;
            compare(dsn, merged).await
        }
        .await;
        let dropped = database::drop_database(dsn).await;
        let (tables, skipped) = done?;
        let mut warnings = restored.warnings;
        if let Err(e) = dropped {
            warnings.push(format!("the database {} is left behind: {e}", dsn.dbname));
        }
        Ok(Drilled { target, tables, skipped, warnings, seconds: started.elapsed().as_secs_f64() })
    })
    .await
}

/// Rows of a table, summed up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Digest {
    rows: u64,
    sum: u128,
}

impl Digest {
    fn add(&mut self, line: Sha256) {
        let mut first = [0; 16];
        first.copy_from_slice(&line.finish()[..16]);
        self.rows += 1;
        self.sum = self.sum.wrapping_add(u128::from_be_bytes(first));
    }
}

/// The merge's tables.
#[derive(Default)]
struct Digests {
    tables: Vec<(Arc<Relation>, Digest)>,
}

struct Hashing(Sha256);

impl Write for Hashing {
    fn write(&mut self, b: &[u8]) -> io::Result<usize> {
        self.0.update(b);
        Ok(b.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Watched<'a>(&'a mut Digests, &'a super::Watch);

impl RowSink for Watched<'_> {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.0.tables.push((rel.clone(), Digest::default()));
        Ok(())
    }

    fn row(&mut self, _key: &[u8], image: &Image<'_>) -> Result<()> {
        self.1.check()?;
        let mut line = Hashing(Sha256::new());
        image.write_to(&mut line)?;
        match self.0.tables.last_mut() {
            Some((_, digest)) => digest.add(line.0),
            None => return Err(Error::other("a row came before its table")),
        }
        Ok(())
    }

    fn end_table(&mut self) -> Result<()> {
        Ok(())
    }
}

/// What was compared, and what could not be.
type Outcome = (Vec<DrilledTable>, Vec<(String, String)>);

async fn compare(dsn: &Dsn, merged: Vec<(Arc<Relation>, Digest)>) -> Result<Outcome> {
    let client = sql::connect(&dsn.with_application_name("coffer drill")).await?;
    let (mut tables, mut skipped) = (Vec::new(), Vec::new());
    for (rel, want) in merged {
        let relation = rel.qualified();
        match of_table(&client, &rel).await? {
            Ok(found) => {
                tables.push(DrilledTable { same: found == want, relation, rows: want.rows, restored: found.rows })
            }
            Err(why) => skipped.push((relation, why)),
        }
    }
    Ok((tables, skipped))
}

/// The rows of a table that was restored; why they cannot be compared with the archived ones, where its columns have
/// other names by now.
async fn of_table(client: &SqlClient, rel: &Relation) -> Result<Result<Digest, String>> {
    let columns: Vec<String> = rel.image_columns().map(|c| quote_ident(&c.name)).collect();
    let name = rel.qualified();
    let what = format!("cannot read {name} back");
    let copied = client.copy_out(&format!("COPY (SELECT {} FROM {name}) TO STDOUT", columns.join(", "))).await;
    let rows = match copied {
        Err(e) if e.code() == Some(&SqlState::UNDEFINED_COLUMN) => {
            return Ok(Err("its columns have other names in the definitions".to_owned()));
        }
        r => r.sql(&what)?,
    };
    let mut rows = std::pin::pin!(rows);
    let (mut digest, mut line) = (Digest::default(), Sha256::new());
    while let Some(piece) = rows.try_next().await.sql(&what)? {
        let mut rest = &piece[..];
        while let Some(end) = memchr::memchr(b'\n', rest) {
            line.update(&rest[..end]);
            digest.add(std::mem::replace(&mut line, Sha256::new()));
            rest = &rest[end + 1..];
        }
        line.update(rest);
    }
    Ok(Ok(digest))
}

/// Whether an error of a drill says that the tenant cannot be restored; others say that it could not be tried.
pub fn is_failure(e: &Error) -> bool {
    !matches!(e.kind(), Kind::Unreachable | Kind::OutsideWindow | Kind::Fenced | Kind::Refused | Kind::Usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[&str]) -> Digest {
        let mut d = Digest::default();
        for l in lines {
            let mut h = Sha256::new();
            h.update(l.as_bytes());
            d.add(h);
        }
        d
    }

    #[test]
    fn a_digest_is_of_the_rows_and_not_of_their_order() {
        assert_eq!(of(&["a", "b", "b"]), of(&["b", "a", "b"]));
        assert_ne!(of(&["a", "b", "b"]), of(&["a", "a", "b"]));
        assert_ne!(of(&["a", "b"]), of(&["ab"]));
        assert_ne!(of(&[]), of(&[""]));
    }

    #[test]
    fn what_differs_is_said_by_table() {
        let table = |rows, restored, same| DrilledTable { relation: "s.t".into(), rows, restored, same };
        let d = |t: DrilledTable| Drilled {
            target: Target { asked: "latest".into(), lsn: coffer_wire::Lsn(1), time_us: 0 },
            tables: vec![t],
            skipped: vec![],
            warnings: vec![],
            seconds: 0.0,
        };
        assert_eq!(d(table(3, 3, true)).counts(), None);
        assert_eq!(d(table(3, 2, false)).counts().as_deref(), Some("s.t: 2 rows came back of 3"));
        assert!(d(table(3, 3, false)).counts().is_some_and(|c| c.contains("not all with the values")));
        assert!(!d(table(3, 3, false)).is_same());
    }
}
