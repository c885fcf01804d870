//! One store: an object store behind the few operations that a repository needs, with errors in our own words.
//!
//! A put-if-absent whose outcome is unknown (a lost answer, a timeout, "already exists" on a retry of our own write) is
//! settled here by comparing what lies at the name with what we wrote.

use crate::error::{Error, Kind, Result};
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};
use std::future::Future;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Attempts of a put-if-absent whose outcome stays unknown.
const CREATE_ATTEMPTS: u32 = 5;
/// Wait between them, doubled each time.
const CREATE_BACKOFF: Duration = Duration::from_millis(100);

/// Attempts of a read, as long as each fails quickly: a passing fault is worth another try, a store that is away is not.
const READ_ATTEMPTS: u32 = 4;
const READ_BACKOFF: Duration = Duration::from_millis(100);
const QUICK: Duration = Duration::from_secs(2);

/// Outcome of a put-if-absent.
#[derive(Debug, PartialEq, Eq)]
pub enum Created {
    /// The name holds our bytes.
    Won,
    /// The name holds these bytes of somebody else.
    Lost(Bytes),
}

/// Whether a store answers.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// Since when it does not.
    pub down_since: Option<Instant>,
    pub last_error: Option<String>,
}

/// See the module.
pub struct Store {
    name: String,
    /// Without what could be secret.
    shown: String,
    required: bool,
    inner: Arc<dyn ObjectStore>,
    /// A file that must exist in a local directory before anything is done there: of an unmounted disk, the mount point
    /// would otherwise be filled, or taken for an empty store.
    anchor: OnceLock<PathBuf>,
    root: Option<PathBuf>,
    health: Mutex<Health>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("name", &self.name).field("url", &self.shown).finish_non_exhaustive()
    }
}

impl Store {
    pub(super) fn new(
        name: &str,
        shown: String,
        required: bool,
        inner: Arc<dyn ObjectStore>,
        root: Option<PathBuf>,
    ) -> Self {
        Self { name: name.to_owned(), shown, required, inner, anchor: OnceLock::new(), root, health: Mutex::default() }
    }

    /// The name that the configuration gives it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its URL without parameters.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    pub fn required(&self) -> bool {
        self.required
    }

    pub fn health(&self) -> Health {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on the store answers only while this object exists. For local directories; elsewhere it means nothing.
    pub(crate) fn anchor_at(&self, path: &str) {
        if let Some(root) = &self.root {
            let _ = self.anchor.set(root.join(path));
        }
    }

    /// The whole object.
    pub async fn get(&self, path: &str) -> Result<Bytes> {
        self.check_there()?;
        let location = Path::from(path);
        let got = self.steadily(|| async { self.inner.get(&location).await?.bytes().await }).await;
        got.map_err(|e| self.error("read", path, e))
    }

    /// The whole object, `None` when there is none.
    pub async fn get_opt(&self, path: &str) -> Result<Option<Bytes>> {
        match self.get(path).await {
            Ok(b) => Ok(Some(b)),
            Err(e) if e.kind() == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// These bytes of an object, fewer where it ends earlier, and the object's length.
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<(Bytes, u64)> {
        self.check_there()?;
        let location = Path::from(path);
        let get = || async {
            let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
            match self.inner.get_opts(&location, options).await {
                Ok(got) => {
                    let size = got.meta.size;
                    Ok((got.bytes().await?, size))
                }
                // An object that ends before the range begins is cut short, which is not a store that is away.
                Err(e @ object_store::Error::Generic { .. }) => match self.inner.head(&location).await {
                    Ok(m) if m.size <= range.start => Ok((Bytes::new(), m.size)),
                    _ => Err(e),
                },
                Err(e) => Err(e),
            }
        };
        self.steadily(get).await.map_err(|e| self.error("read", path, e))
    }

    /// Length of an object, `None` when there is none.
    pub async fn size(&self, path: &str) -> Result<Option<u64>> {
        self.check_there()?;
        let location = Path::from(path);
        match self.steadily(|| self.inner.head(&location)).await {
            Ok(m) => Ok(Some(m.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.error("look for", path, e)),
        }
    }

    /// Writes an object under a name of its own (random, so nobody else writes there).
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.check_there()?;
        let done = self.inner.put(&Path::from(path), PutPayload::from_bytes(bytes)).await;
        self.note(done).map(drop).map_err(|e| self.write_error(path, e))
    }

    /// Writes an object unless the name is taken; an unknown outcome is settled by looking.
    pub async fn create(&self, path: &str, bytes: Bytes) -> Result<Created> {
        self.check_there()?;
        let location = Path::from(path);
        let mut wait = CREATE_BACKOFF;
        let mut attempt = 1;
        loop {
            let options = PutOptions::from(PutMode::Create);
            let put = self.inner.put_opts(&location, PutPayload::from_bytes(bytes.clone()), options).await;
            let e = match self.note(put) {
                Ok(_) => return Ok(Created::Won),
                Err(
                    e @ (object_store::Error::PermissionDenied { .. }
                    | object_store::Error::Unauthenticated { .. }
                    | object_store::Error::NotFound { .. }
                    | object_store::Error::NotImplemented { .. }
                    | object_store::Error::NotSupported { .. }),
                ) => return Err(self.write_error(path, e)),
                Err(e) => e,
            };
            match self.get_opt(path).await? {
                Some(there) if there == bytes => return Ok(Created::Won),
                Some(there) => return Ok(Created::Lost(there)),
                None if attempt == CREATE_ATTEMPTS => return Err(self.write_error(path, e)),
                None => {}
            }
            tokio::time::sleep(wait).await;
            wait *= 2;
            attempt += 1;
        }
    }

    /// Sends an object damaged on its way; true when the store takes it nevertheless.
    pub(super) async fn takes_damaged(&self, path: &str, sent: Bytes, arrives: Bytes) -> bool {
        let mut options = PutOptions::default();
        options.extensions.insert(super::url::Damaged(arrives));
        self.inner.put_opts(&Path::from(path), PutPayload::from_bytes(sent), options).await.is_ok()
    }

    /// Whether a network lies between: only then can something be damaged on the way.
    pub(super) fn is_remote(&self) -> bool {
        self.root.is_none()
    }

    /// Begins an object that is written in parts.
    pub async fn multipart(&self, path: &str) -> Result<Box<dyn MultipartUpload>> {
        self.check_there()?;
        let begun = self.inner.put_multipart(&Path::from(path)).await;
        self.note(begun).map_err(|e| self.write_error(path, e))
    }

    /// Names and lengths of the objects in a folder and below, sorted by name.
    pub async fn list(&self, folder: &str) -> Result<Vec<(String, u64)>> {
        self.list_from(folder, None).await
    }

    /// The same, only names after `name`.
    pub async fn list_after(&self, folder: &str, name: &str) -> Result<Vec<(String, u64)>> {
        self.list_from(folder, Some(name)).await
    }

    async fn list_from(&self, folder: &str, after: Option<&str>) -> Result<Vec<(String, u64)>> {
        self.check_there()?;
        let (prefix, after) = (Path::from(folder), after.map(Path::from));
        let list = || {
            match &after {
                Some(after) => self.inner.list_with_offset(Some(&prefix), after),
                None => self.inner.list(Some(&prefix)),
            }
            .map_ok(|m| (m.location.to_string(), m.size))
            .try_collect::<Vec<_>>()
        };
        let mut all = match self.steadily(list).await {
            Ok(all) => all,
            // A directory that nothing was written to yet.
            Err(object_store::Error::NotFound { .. }) if self.root.is_some() => Vec::new(),
            Err(e) => return Err(self.error("list", folder, e)),
        };
        all.sort_unstable();
        Ok(all)
    }

    /// Names and lengths of the objects in a folder and below, with when the store says that they were written, in
    /// microseconds since 1970-01-01 UTC.
    pub async fn list_dated(&self, folder: &str) -> Result<Vec<(String, u64, i64)>> {
        self.check_there()?;
        let prefix = Path::from(folder);
        let list = || {
            let listed = self.inner.list(Some(&prefix));
            listed
                .map_ok(|m| (m.location.to_string(), m.size, m.last_modified.timestamp_micros()))
                .try_collect::<Vec<_>>()
        };
        match self.steadily(list).await {
            Ok(all) => Ok(all),
            Err(object_store::Error::NotFound { .. }) if self.root.is_some() => Ok(Vec::new()),
            Err(e) => Err(self.error("list", folder, e)),
        }
    }

    /// The store's clock, in microseconds since 1970-01-01 UTC: what it says of an object that is written to `path` now
    /// and removed again.
    pub async fn clock_us(&self, path: &str) -> Result<i64> {
        self.put(path, Bytes::new()).await?;
        let location = Path::from(path);
        let head = self.steadily(|| self.inner.head(&location)).await;
        let us = head.map(|m| m.last_modified.timestamp_micros()).map_err(|e| self.error("look for", path, e));
        self.delete(path).await?;
        us
    }

    /// Names of the folders directly in a folder.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>> {
        self.check_there()?;
        let prefix = Path::from(folder);
        match self.steadily(|| self.inner.list_with_delimiter(Some(&prefix))).await {
            Ok(l) => Ok(l.common_prefixes.iter().filter_map(|p| p.filename().map(str::to_owned)).collect()),
            Err(object_store::Error::NotFound { .. }) if self.root.is_some() => Ok(Vec::new()),
            Err(e) => Err(self.error("list", folder, e)),
        }
    }

    /// Removes an object; one that does not exist is not an error.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.check_there()?;
        match self.note(self.inner.delete(&Path::from(path)).await) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.error("delete", path, e)),
        }
    }

    /// Repeats a read that failed quickly.
    async fn steadily<T, F: Future<Output = object_store::Result<T>>>(
        &self,
        mut op: impl FnMut() -> F,
    ) -> object_store::Result<T> {
        let mut wait = READ_BACKOFF;
        for _ in 1..READ_ATTEMPTS {
            let started = Instant::now();
            match op().await {
                Err(object_store::Error::Generic { .. }) if started.elapsed() < QUICK => {}
                r => return self.note(r),
            }
            tokio::time::sleep(wait).await;
            wait *= 2;
        }
        self.note(op().await)
    }

    /// Keeps book of whether the store answers. A "no" is an answer.
    pub(super) fn note<T>(&self, r: object_store::Result<T>) -> object_store::Result<T> {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match &r {
            Err(
                e @ (object_store::Error::Generic { .. }
                | object_store::Error::PermissionDenied { .. }
                | object_store::Error::Unauthenticated { .. }),
            ) => {
                health.down_since.get_or_insert_with(Instant::now);
                health.last_error = Some(said(e));
            }
            _ if health.down_since.is_some() => *health = Health::default(),
            _ => {}
        }
        r
    }

    /// For local directories: the directory, or what must be in it, is there.
    fn check_there(&self) -> Result<()> {
        let Some(must) = self.anchor.get().or(self.root.as_ref()) else { return Ok(()) };
        if must.exists() {
            return Ok(());
        }
        let e = Error::new(Kind::Unreachable, format!("store {}: {} is not there", self.name, must.display()))
            .code("store_gone")
            .hint("mount the directory again; a new repository is made by `coffer init`");
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.down_since.get_or_insert_with(Instant::now);
        health.last_error = Some(e.message().to_owned());
        Err(e)
    }

    pub(super) fn write_error(&self, path: &str, e: object_store::Error) -> Error {
        match &e {
            // A write finds no bucket.
            object_store::Error::NotFound { .. } => {
                Error::new(Kind::Unreachable, format!("store {} ({}): cannot write {path}", self.name, self.shown))
                    .code("store_missing")
                    .hint("create the bucket or the directory, or correct the store's url")
                    .source(said(&e))
            }
            _ => self.error("write", path, e),
        }
    }

    pub(super) fn error(&self, what: &str, path: &str, e: object_store::Error) -> Error {
        use object_store::Error as E;
        let message = format!("store {} ({}): cannot {what} {path}", self.name, self.shown);
        match &e {
            E::NotFound { .. } => {
                return Error::new(Kind::NotFound, format!("store {}: there is no {path}", self.name));
            }
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => Error::new(Kind::Unreachable, message)
                .code("store_denied")
                .hint("the store refuses these credentials: check them, and the bucket's policy"),
            E::Generic { .. } if is_full(&e) => Error::new(Kind::Unreachable, message)
                .code("store_full")
                .hint("the store has no room: free some; what is written stays valid"),
            E::Generic { .. } | E::JoinError { .. } => Error::new(Kind::Unreachable, message).code("store_unreachable"),
            _ => Error::new(Kind::Other, message),
        }
        .source(said(&e))
    }
}

/// What the store said, in one line: a server's code and message, else the innermost cause. The chain in full repeats the
/// request's URL and the server's document at every step.
fn said(e: &object_store::Error) -> String {
    let text = e.to_string();
    let tag = |name: &str| {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        let from = text.find(&open)? + open.len();
        text.get(from..from + text[from..].find(&close)?)
    };
    if let Some(code) = tag("Code") {
        return format!("{code}: {}", tag("Message").unwrap_or_default());
    }
    let mut cause: &(dyn std::error::Error + 'static) = e;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn is_full(e: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(c) = cause {
        if let Some(io) = c.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind::{QuotaExceeded, StorageFull};
            return matches!(io.kind(), StorageFull | QuotaExceeded);
        }
        cause = c.source();
    }
    false
}
