//! One object, or one chain, read back and believed nothing.
//!
//! Of an object: length and SHA-256 as recorded, every chunk's authentication tag, kind, tenant and positions of the
//! header, frames that parse, rows of one tenant, as many as recorded. Of a log: each record goes on where the one
//! before ended; its numbering and hash chain are checked wherever it is opened.

use crate::crypto::ObjectKind;
use crate::error::{Context, Error, Kind, Result};
use crate::large_objects::frames;
use crate::merge::{check, from_io};
use crate::repository::{Body, LogRecord, ObjectRef, Repository, paths};
use crate::tenant::Tenant;
use serde_json::{Value, json};
use std::io::Read;
use std::sync::Arc;
use tokio::runtime::Handle;
use uuid::Uuid;

/// Something that is not as it was written.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Its path.
    pub object: String,
    pub tenant_uid: Option<Uuid>,
    /// As the document of `coffer verify` names it.
    pub kind: &'static str,
    pub message: String,
    /// The object, where it is one copy of it that is wrong: another store may have it as it was written.
    pub copy: Option<ObjectRef>,
}

impl Failure {
    /// What an error says of an object.
    pub fn of(object: &str, tenant: Option<Uuid>, e: &Error) -> Self {
        let kind = if e.kind() == Kind::Key {
            "wrong_key"
        } else {
            ["missing", "replayed", "chain_gap"].into_iter().find(|k| e.is_code(k)).unwrap_or("corrupt")
        };
        Self { object: object.to_owned(), tenant_uid: tenant, kind, message: e.to_string(), copy: None }
    }

    /// What an error says of the copy of an object that a store has.
    pub fn of_copy(o: &ObjectRef, store: &str, e: Error) -> Self {
        let e = e.during(format_args!("store {store}"));
        Self { copy: Some(o.clone()), ..Self::of(&o.path, Some(o.tenant), &e) }
    }

    pub fn chain(object: String, message: String) -> Self {
        Self { object, tenant_uid: None, kind: "chain_gap", message, copy: None }
    }

    /// For the document of `coffer verify`.
    pub fn document(&self) -> Value {
        json!({"object": self.object, "tenant_uid": self.tenant_uid, "kind": self.kind, "message": self.message})
    }
}

/// A store that does not answer is no failure of what is in it.
pub fn is_finding(e: &Error) -> bool {
    matches!(e.kind(), Kind::Verification | Kind::Key | Kind::NotFound)
}

/// The record that an error of the log names, else the log's folder.
pub fn named_in(e: &Error, folder: &str) -> String {
    let text = e.to_string();
    text.split([' ', ':', ',']).find(|w| w.starts_with(folder)).unwrap_or(folder).to_owned()
}

/// Each record begins where the one before ended.
pub fn continuity(source: Uuid, records: &[Arc<LogRecord>]) -> Vec<Failure> {
    let mut out = Vec::new();
    for pair in records.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        let path = || paths::log_record(source, b.n);
        // A new timeline goes back to where the old one was left; a gap says what it skips.
        let follows = match &b.body {
            Body::Timeline { at, .. } => b.from_lsn <= a.upto_lsn && b.upto_lsn <= *at.max(&b.from_lsn),
            _ => b.from_lsn == a.upto_lsn,
        };
        if !follows {
            out.push(Failure::chain(
                path(),
                format!("record {} begins at {}, the record before it ends at {}", b.n, b.from_lsn, a.upto_lsn),
            ));
        }
        if b.upto_lsn < b.from_lsn {
            out.push(Failure::chain(path(), format!("record {} ends before it begins", b.n)));
        }
        if !matches!(b.body, Body::Timeline { .. })
            && (a.timeline, a.system_identifier) != (b.timeline, b.system_identifier)
        {
            out.push(Failure::chain(path(), format!("record {} is of another server or timeline", b.n)));
        }
    }
    out
}

/// Reads an object in a store to its end, as [`one_object`].
///
/// # Errors
/// What is wrong with it ([`is_finding`]); others: it could not be read.
pub async fn one_copy(repo: &Arc<Repository>, o: &ObjectRef, store: &str) -> Result<()> {
    let (repo, o, store, rt) = (repo.clone(), o.clone(), store.to_owned(), Handle::current());
    let work = move || {
        let owner = repo.keyring().by_uid(o.tenant).map(|t| t.tenant);
        let mut plain = repo.open_object(&rt, &o, Some(&store))?;
        one_object(&mut plain, &o, owner.as_ref())
    };
    tokio::task::spawn_blocking(work).await.context(Kind::Other, "a worker thread broke off")?
}

/// Reads an object to its end. `owner`: whose rows may be in it.
pub fn one_object(plain: &mut dyn Read, o: &ObjectRef, owner: Option<&Tenant>) -> Result<()> {
    match o.kind {
        ObjectKind::Changeset | ObjectKind::Incremental | ObjectKind::Full | ObjectKind::Common => {
            let within = (o.kind != ObjectKind::Full).then_some((o.lsn_start, o.lsn_end));
            let found = check(plain, owner, within)?;
            if o.kind != ObjectKind::Common && found.rows != o.rows {
                return Err(Error::new(
                    Kind::Verification,
                    format!("object {} holds {} rows, its record says {}", o.path, found.rows, o.rows),
                )
                .code("corrupt"));
            }
            Ok(())
        }
        ObjectKind::LargeObjects => {
            let found = frames::read(plain, &mut frames::Nothing)?;
            if found != o.rows {
                return Err(Error::new(
                    Kind::Verification,
                    format!("object {} holds {found} large objects, its record says {}", o.path, o.rows),
                )
                .code("corrupt"));
            }
            Ok(())
        }
        _ => std::io::copy(plain, &mut std::io::sink()).map(drop).map_err(from_io),
    }
}
