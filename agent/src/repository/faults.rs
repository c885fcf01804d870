//! Stores that fail on purpose, for tests of whole agents; only in builds with the feature `failpoints`.
//!
//! `COFFER_STORE_FAULTS` holds rules and settings, separated by `;`:
//!
//! ```text
//! [STORE/]OPERATION:FAULT:WHEN      seed=NUMBER      while=PATH
//! ```
//!
//! - `STORE`: the store's name in the configuration, or `keyring-1`, `keyring-2`, … for the keyring's places. Without
//!   it the rule is for all of them.
//! - `OPERATION`: `put` (any write of an object, put-if-absent and parts among them), `create` (put-if-absent only), `get`
//!   (reads and looks), `list`, `delete`, `any`.
//! - `FAULT`: `lost-answer` (the deed is done, the answer is an error), `503`, `timeout` (nothing is done; the error comes
//!   after 200 ms), `enospc` (the store is full), `denied` (the credentials are refused), `slow` (a second, then the deed).
//! - `WHEN`: a share of the calls (`0.1`, or `1` for all), the n-th call (`@3`), or from the n-th to the m-th (`@3-7`);
//!   calls are counted per rule and store from 1.
//! - `seed`: makes shares repeatable. `while`: the rules hold only while this file exists.
//!
//! For example `eu/put:lost-answer:0.1;get:timeout:@4;seed=42`.

use crate::error::{Error, Result};
use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, UploadPart,
};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The variable with the rules.
pub const VARIABLE: &str = "COFFER_STORE_FAULTS";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Put,
    Create,
    Get,
    List,
    Delete,
    Any,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    LostAnswer,
    Unavailable,
    Timeout,
    Full,
    Denied,
    Slow,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    Share(f64),
    Calls(u64, u64),
}

#[derive(Debug)]
struct Rule {
    operation: Operation,
    fault: Fault,
    when: When,
    calls: AtomicU64,
    /// Makes the shares of different rules and stores independent.
    seed: u64,
}

/// The rules for one store.
#[derive(Debug)]
struct Faults {
    rules: Vec<Rule>,
    only_while: Option<PathBuf>,
}

/// The store, behind the faults that the environment asks for it.
pub fn wrap(name: &str, inner: Arc<dyn ObjectStore>) -> Result<Arc<dyn ObjectStore>> {
    match std::env::var(VARIABLE) {
        Ok(spec) => Ok(Arc::new(Faulty { faults: Arc::new(Faults::parse(&spec, name)?), inner })),
        Err(_) => Ok(inner),
    }
}

impl Faults {
    fn parse(spec: &str, store: &str) -> Result<Self> {
        let bad = |part: &str| Error::usage(format!("{VARIABLE}: '{part}' is not understood"));
        let mut faults = Self { rules: Vec::new(), only_while: None };
        let mut seed = 0u64;
        for part in spec.split(';').map(str::trim).filter(|p| !p.is_empty()) {
            if let Some(n) = part.strip_prefix("seed=") {
                seed = n.parse().map_err(|_| bad(part))?;
                continue;
            }
            if let Some(path) = part.strip_prefix("while=") {
                faults.only_while = Some(path.into());
                continue;
            }
            let (target, rule) = match part.split_once('/') {
                Some((target, rule)) => (Some(target), rule),
                None => (None, part),
            };
            let rule = Rule::parse(rule).ok_or_else(|| bad(part))?;
            if target.is_none_or(|t| t == store) {
                faults.rules.push(rule);
            }
        }
        for (i, rule) in faults.rules.iter_mut().enumerate() {
            let name = store.bytes().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
            rule.seed = seed ^ name.rotate_left(32) ^ ((i as u64) << 48);
        }
        Ok(faults)
    }

    /// The fault of this call, if it gets one; every rule that matches counts it.
    fn draw(&self, is: impl Fn(Operation) -> bool) -> Option<Fault> {
        if self.only_while.as_ref().is_some_and(|p| !p.exists()) {
            return None;
        }
        let hits: Vec<_> = self.rules.iter().filter(|r| is(r.operation)).filter(|r| r.hit()).map(|r| r.fault).collect();
        hits.first().copied()
    }

    /// Does what the fault does before the deed; true when the answer is to be lost after it.
    async fn before(&self, is: impl Fn(Operation) -> bool) -> object_store::Result<bool> {
        let Some(fault) = self.draw(is) else { return Ok(false) };
        match fault {
            Fault::LostAnswer => return Ok(true),
            Fault::Slow => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Ok(false);
            }
            Fault::Timeout => tokio::time::sleep(Duration::from_millis(200)).await,
            Fault::Unavailable | Fault::Full | Fault::Denied => {}
        }
        Err(fault.error())
    }
}

impl Rule {
    fn parse(rule: &str) -> Option<Self> {
        let mut parts = rule.splitn(3, ':');
        let operation = match parts.next()? {
            "put" => Operation::Put,
            "create" => Operation::Create,
            "get" => Operation::Get,
            "list" => Operation::List,
            "delete" => Operation::Delete,
            "any" => Operation::Any,
            _ => return None,
        };
        let fault = match parts.next()? {
            "lost-answer" => Fault::LostAnswer,
            "503" => Fault::Unavailable,
            "timeout" => Fault::Timeout,
            "enospc" => Fault::Full,
            "denied" => Fault::Denied,
            "slow" => Fault::Slow,
            _ => return None,
        };
        let when = parts.next()?;
        let when = match when.strip_prefix('@') {
            Some(calls) => match calls.split_once('-') {
                Some((from, to)) => When::Calls(from.parse().ok()?, to.parse().ok()?),
                None => When::Calls(calls.parse().ok()?, calls.parse().ok()?),
            },
            None => When::Share(when.parse().ok().filter(|s| (0.0..=1.0).contains(s))?),
        };
        Some(Self { operation, fault, when, calls: AtomicU64::new(0), seed: 0 })
    }

    fn hit(&self) -> bool {
        let n = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        match self.when {
            When::Calls(from, to) => (from..=to).contains(&n),
            // SplitMix64 of seed and call number.
            When::Share(share) => {
                let mut z = self.seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 <= share && share > 0.0
            }
        }
    }
}

impl Fault {
    fn error(self) -> object_store::Error {
        let generic = |e: std::io::Error| object_store::Error::Generic { store: "fault", source: Box::new(e) };
        match self {
            Self::LostAnswer => generic(std::io::Error::other("injected: the answer was lost")),
            Self::Unavailable => generic(std::io::Error::other("injected: 503 Service Unavailable")),
            Self::Timeout => generic(std::io::ErrorKind::TimedOut.into()),
            Self::Full => generic(std::io::ErrorKind::StorageFull.into()),
            Self::Denied => object_store::Error::PermissionDenied { path: String::new(), source: "injected".into() },
            Self::Slow => generic(std::io::Error::other("injected: slow")),
        }
    }
}

#[derive(Debug)]
struct Faulty {
    faults: Arc<Faults>,
    inner: Arc<dyn ObjectStore>,
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "faulty {}", self.inner)
    }
}

fn write(op: Operation) -> bool {
    matches!(op, Operation::Put | Operation::Any)
}

fn create(op: Operation) -> bool {
    matches!(op, Operation::Put | Operation::Create | Operation::Any)
}

fn read(op: Operation) -> bool {
    matches!(op, Operation::Get | Operation::Any)
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, to: &Path, payload: PutPayload, opts: PutOptions) -> object_store::Result<PutResult> {
        let lost = self.faults.before(if opts.mode == PutMode::Create { create } else { write }).await?;
        let done = self.inner.put_opts(to, payload, opts).await?;
        if lost { Err(Fault::LostAnswer.error()) } else { Ok(done) }
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        opts: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.faults.before(write).await?;
        let inner = self.inner.put_multipart_opts(to, opts).await?;
        Ok(Box::new(FaultyUpload { faults: self.faults.clone(), inner }))
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        let lost = self.faults.before(read).await?;
        let got = self.inner.get_opts(from, options).await?;
        if lost { Err(Fault::LostAnswer.error()) } else { Ok(got) }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        match self.faults.draw(|op| matches!(op, Operation::Delete | Operation::Any)) {
            Some(fault) => stream::once(async move { Err(fault.error()) }).boxed(),
            None => self.inner.delete_stream(locations),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let (faults, listed) = (self.faults.clone(), self.inner.list(prefix));
        stream::once(async move {
            match faults.before(|op| matches!(op, Operation::List | Operation::Any)).await {
                Ok(true) => Err(Fault::LostAnswer.error()),
                Ok(false) => Ok(listed),
                Err(e) => Err(e),
            }
        })
        .try_flatten()
        .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.faults.before(|op| matches!(op, Operation::List | Operation::Any)).await?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.faults.before(write).await?;
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    faults: Arc<Faults>,
    inner: Box<dyn MultipartUpload>,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (faults, part) = (self.faults.clone(), self.inner.put_part(data));
        async move {
            let lost = faults.before(write).await?;
            part.await?;
            if lost { Err(Fault::LostAnswer.error()) } else { Ok(()) }
        }
        .boxed()
    }

    async fn complete(&mut self) -> object_store::Result<PutResult> {
        let lost = self.faults.before(write).await?;
        let done = self.inner.complete().await?;
        if lost { Err(Fault::LostAnswer.error()) } else { Ok(done) }
    }

    async fn abort(&mut self) -> object_store::Result<()> {
        self.inner.abort().await
    }
}

#[cfg(test)]
impl Faults {
    pub(super) fn over(spec: &str, store: &str, inner: Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
        Arc::new(Faulty { faults: Arc::new(Self::parse(spec, store).expect("a valid specification")), inner })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::store::{Created, Store};
    use object_store::memory::InMemory;

    fn store(spec: &str) -> Store {
        let inner = Arc::new(InMemory::new());
        Store::new("eu", "memory".into(), true, Faults::over(spec, "eu", inner), None)
    }

    #[test]
    fn rules_are_read_as_written_and_nonsense_is_refused() {
        let f = Faults::parse("eu/put:lost-answer:0.1; get:timeout:@4;us/any:503:1;seed=42;while=/x", "eu").unwrap();
        assert_eq!(f.rules.len(), 2);
        assert_eq!(f.rules[1].when, When::Calls(4, 4));
        assert_eq!(f.only_while, Some("/x".into()));
        for bad in ["put", "put:503", "put:503:2", "pot:503:1", "put:504:1", "put:503:@x", "seed=x"] {
            assert!(Faults::parse(bad, "eu").is_err(), "{bad}");
        }
    }

    #[test]
    fn a_share_is_about_that_share_and_repeats() {
        let hits = |seed: u64| {
            let f = Faults::parse(&format!("put:503:0.1;seed={seed}"), "eu").unwrap();
            (0..10_000).map(|_| f.rules[0].hit()).collect::<Vec<_>>()
        };
        let n = hits(1).iter().filter(|h| **h).count();
        assert!((800..1200).contains(&n), "{n}");
        assert_eq!(hits(1), hits(1));
        assert_ne!(hits(1), hits(2));
    }

    #[tokio::test]
    async fn a_lost_answer_of_our_own_create_is_a_win() {
        let s = store("create:lost-answer:@1");
        assert_eq!(s.create("n", "ours".into()).await.unwrap(), Created::Won);
        assert_eq!(s.create("n", "theirs".into()).await.unwrap(), Created::Lost("ours".into()));
        // The deed is not done, then done and unanswered.
        let s = store("create:503:@1;create:lost-answer:@2");
        assert_eq!(s.create("n", "ours".into()).await.unwrap(), Created::Won);
    }

    #[tokio::test]
    async fn a_full_or_refusing_store_says_so() {
        let e = store("put:enospc:1").put("n", "x".into()).await.unwrap_err();
        assert!(e.is_code("store_full"), "{e}");
        let s = store("put:denied:@1");
        let e = s.create("n", "x".into()).await.unwrap_err();
        assert!(e.is_code("store_denied"), "{e}");
        assert!(s.health().down_since.is_some());
        s.put("n", "x".into()).await.unwrap();
        assert!(s.health().down_since.is_none());
    }
}
