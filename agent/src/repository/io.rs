//! Objects written through to the stores and read from them, as blocking `Write` and `Read` for worker threads.
//!
//! Never to be used on a thread of the async runtime.

use super::store::Store;
use super::{Member, Repository, patiently};
use crate::crypto::{DataKey, Expect, Header, Opener, RangeRead, Sealer, Sha256, hex};
use crate::error::{Error, Kind, Result};
use crate::repository::ObjectRef;
use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use object_store::{MultipartUpload, PutPayload};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// An object up to this size goes in one request; a larger one in parts of it.
pub(super) const PART_BYTES: usize = 8 << 20;
/// Parts after the thousandth are larger, so that ten thousand of them hold some 300 GB.
const LARGE_PART_BYTES: usize = 32 << 20;
const SMALL_PARTS: usize = 1000;
/// Parts under way at a time.
const PARTS_AHEAD: usize = 2;
/// Bytes that one read request asks for, and how many of them wait to be consumed.
const READ_BYTES: u64 = 4 << 20;
const READS_AHEAD: usize = 2;

impl Repository {
    /// An object to be written through to every required store.
    pub fn writer(self: &Arc<Self>, rt: Handle, path: &str) -> ObjectWriter {
        ObjectWriter { repository: self.clone(), rt, path: path.to_owned(), buf: BytesMut::new(), parts: None }
    }

    /// Seals what `fill` writes into an object at `path`, in every required store when this returns. `fill` returns the
    /// number of rows.
    pub fn seal_to(
        self: &Arc<Self>,
        rt: Handle,
        path: String,
        header: &Header,
        key: &DataKey,
        fill: impl FnOnce(&mut Sealer<ObjectWriter>) -> Result<u64>,
    ) -> Result<ObjectRef> {
        let mut sealer = Sealer::new(self.writer(rt, &path), header, key)?;
        let rows = fill(&mut sealer)?;
        let (writer, sealed) = sealer.finish()?;
        writer.finish()?;
        Ok(Self::object_ref(path, header, &sealed, rows))
    }

    /// The object's bytes as they stand in a store, checked against what the record says of them.
    pub fn reader(self: &Arc<Self>, rt: &Handle, object: &ObjectRef, from: Option<&str>) -> Result<ObjectReader> {
        let stores = self.readable(from)?;
        let (tx, rx) = mpsc::channel(READS_AHEAD);
        rt.spawn(read_ahead(stores, object.clone(), tx));
        Ok(ObjectReader {
            rx,
            path: object.path.clone(),
            sha256: object.sha256.clone(),
            hash: Some(Sha256::new()),
            chunk: Bytes::new(),
        })
    }

    /// The object's plaintext.
    pub fn open_object(
        self: &Arc<Self>,
        rt: &Handle,
        object: &ObjectRef,
        from: Option<&str>,
    ) -> Result<Opener<ObjectReader>> {
        let reader = self.reader(rt, object, from)?;
        Opener::new(reader, &**self.keyring(), &object.expect())
            .map(|o| o.named(&object.path))
            .map_err(|e| e.during(format_args!("object {}", object.path)))
    }

    /// For [`crate::crypto::SectionReader`]: the object by ranges.
    pub fn ranges(self: &Arc<Self>, rt: Handle, object: &ObjectRef, from: Option<&str>) -> Result<ObjectRanges> {
        Ok(ObjectRanges { stores: self.readable(from)?, rt, object: object.clone() })
    }

    /// A small object's plaintext, for async callers.
    pub async fn open_small(&self, object: &ObjectRef, from: Option<&str>) -> Result<Vec<u8>> {
        let during = |e: Error| e.during(format_args!("object {}", object.path));
        let bytes = self.fetch(object, from).await?;
        Opener::new(&bytes[..], &**self.keyring(), &object.expect()).and_then(Opener::read_all).map_err(during)
    }

    /// A small object's sealed bytes, checked against the record.
    pub async fn fetch(&self, object: &ObjectRef, from: Option<&str>) -> Result<Bytes> {
        let stores = self.readable(from)?;
        let (bytes, size) = read_somewhere(&stores, object, 0..object.bytes).await?;
        object.check_size(size)?;
        object.check_hash(&hex(&crate::crypto::sha256(&bytes)))?;
        Ok(bytes)
    }
}

impl ObjectRef {
    /// What the header of the object must say.
    pub fn expect(&self) -> Expect {
        Expect {
            kind: Some(self.kind),
            tenant: Some(self.tenant),
            object: Some(self.object),
            source: None,
            lsn_start: Some(self.lsn_start),
            lsn_end: Some(self.lsn_end),
        }
    }

    fn check_size(&self, size: u64) -> Result<()> {
        if size == self.bytes {
            return Ok(());
        }
        Err(Error::new(
            Kind::Verification,
            format!("object {} has {size} bytes, its record says {}", self.path, self.bytes),
        )
        .code("corrupt"))
    }

    pub(super) fn check_hash(&self, sha256: &str) -> Result<()> {
        if sha256 == self.sha256 {
            return Ok(());
        }
        Err(Error::new(
            Kind::Verification,
            format!("object {} is not what its record names: its SHA-256 differs", self.path),
        )
        .code("corrupt"))
    }
}

/// These bytes of an object from the first store that answers. A store that answers that it has no such object is an
/// error, not a reason to look elsewhere: the loss must come out.
async fn read_somewhere(stores: &[Arc<Store>], object: &ObjectRef, range: Range<u64>) -> Result<(Bytes, u64)> {
    let mut last = None;
    for store in stores {
        match store.get_range(&object.path, range.clone()).await {
            Ok(got) => return Ok(got),
            Err(e) if e.kind() == Kind::NotFound => {
                return Err(Error::new(
                    Kind::Verification,
                    format!("object {} is missing in store {}", object.path, store.name()),
                )
                .code("missing")
                .hint("name another store with --from if it has the object"));
            }
            Err(e) if e.kind() == Kind::Unreachable => {
                tracing::warn!("reading from another store: {e}");
                last = Some(e);
            }
            Err(e) => return Err(e),
        }
    }
    Err(last.unwrap_or_else(|| Error::new(Kind::Unreachable, "no store of the repository answers")))
}

/// Reads an object range by range into a channel that holds a few of them.
async fn read_ahead(stores: Vec<Arc<Store>>, object: ObjectRef, tx: mpsc::Sender<Result<Bytes>>) {
    let mut at = 0;
    while at < object.bytes {
        let to = object.bytes.min(at + READ_BYTES);
        let got = read_somewhere(&stores, &object, at..to).await.and_then(|(bytes, size)| {
            object.check_size(size)?;
            if bytes.len() as u64 != to - at {
                return Err(Error::new(Kind::Unreachable, format!("a store cut object {} short", object.path)));
            }
            Ok(bytes)
        });
        let stop = got.is_err();
        if tx.send(got).await.is_err() || stop {
            return;
        }
        at = to;
    }
}

/// See [`Repository::reader`].
pub struct ObjectReader {
    rx: mpsc::Receiver<Result<Bytes>>,
    path: String,
    sha256: String,
    /// `None` once the end was reached and found right.
    hash: Option<Sha256>,
    chunk: Bytes,
}

impl Read for ObjectReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.chunk.is_empty() {
            let Some(hash) = &mut self.hash else { return Ok(0) };
            match self.rx.blocking_recv() {
                Some(Ok(b)) => {
                    hash.update(&b);
                    self.chunk = b;
                }
                Some(Err(e)) => return Err(io::Error::other(e)),
                None => {
                    let found = hex(&self.hash.take().expect("it was there").finish());
                    if found != self.sha256 {
                        return Err(io::Error::other(
                            Error::new(
                                Kind::Verification,
                                format!("object {} is not what its record names: its SHA-256 differs", self.path),
                            )
                            .code("corrupt"),
                        ));
                    }
                    return Ok(0);
                }
            }
        }
        let n = out.len().min(self.chunk.len());
        out[..n].copy_from_slice(&self.chunk[..n]);
        let _ = self.chunk.split_to(n);
        Ok(n)
    }
}

/// See [`Repository::ranges`].
pub struct ObjectRanges {
    stores: Vec<Arc<Store>>,
    rt: Handle,
    object: ObjectRef,
}

impl RangeRead for ObjectRanges {
    fn size(&self) -> u64 {
        self.object.bytes
    }

    fn read_range(&mut self, range: Range<u64>) -> Result<Vec<u8>> {
        let want = range.end - range.start;
        let (bytes, size) = self.rt.block_on(read_somewhere(&self.stores, &self.object, range))?;
        self.object.check_size(size)?;
        if bytes.len() as u64 != want {
            return Err(Error::new(Kind::Unreachable, format!("a store cut object {} short", self.object.path)));
        }
        Ok(bytes.into())
    }
}

/// See [`Repository::writer`]. Without [`ObjectWriter::finish`] the object does not exist.
///
/// A small object waits for stores that do not answer. One in parts does not: its parts are gone, so the error is the
/// caller's, who writes the object anew.
pub struct ObjectWriter {
    repository: Arc<Repository>,
    rt: Handle,
    path: String,
    buf: BytesMut,
    parts: Option<Parts>,
}

/// The parts of a large object on their way.
struct Parts {
    uploads: Vec<(Arc<Store>, Box<dyn MultipartUpload>)>,
    under_way: JoinSet<Result<()>>,
    sent: usize,
    bytes: u64,
}

impl ObjectWriter {
    /// The object is in every required store when this returns.
    pub fn finish(mut self) -> Result<()> {
        let rt = self.rt.clone();
        let Some(mut parts) = self.parts.take() else {
            let bytes = std::mem::take(&mut self.buf).freeze();
            return rt.block_on(self.repository.put(&self.path, bytes));
        };
        if !self.buf.is_empty() {
            parts.send(std::mem::take(&mut self.buf).freeze(), &rt)?;
        }
        rt.block_on(parts.complete(&self.path))
    }

    fn part_bytes(&self) -> usize {
        if self.parts.as_ref().is_some_and(|p| p.sent >= SMALL_PARTS) { LARGE_PART_BYTES } else { PART_BYTES }
    }

    fn send_part(&mut self) -> Result<()> {
        let part = std::mem::take(&mut self.buf).freeze();
        if self.parts.is_none() {
            let stores: Vec<&Member> = self.repository.required().collect();
            let begun = self.rt.block_on(try_join_all(stores.iter().map(|m| {
                patiently(&m.store, || async { Ok((m.store.clone(), m.store.multipart(&self.path).await?)) })
            })))?;
            self.parts = Some(Parts { uploads: begun, under_way: JoinSet::new(), sent: 0, bytes: 0 });
        }
        let parts = self.parts.as_mut().expect("it was just made");
        parts.send(part, &self.rt)
    }
}

impl Parts {
    /// Starts a part in every store; waits when too many are under way.
    fn send(&mut self, part: Bytes, rt: &Handle) -> Result<()> {
        self.sent += 1;
        self.bytes += part.len() as u64;
        while self.under_way.len() > PARTS_AHEAD * self.uploads.len() {
            rt.block_on(self.one_done())?;
        }
        for (store, upload) in &mut self.uploads {
            let sending = upload.put_part(PutPayload::from_bytes(part.clone()));
            let store = store.clone();
            let note =
                async move { store.note(sending.await).map_err(|e| store.write_error("a part of an object", e)) };
            self.under_way.spawn_on(note, rt);
        }
        Ok(())
    }

    async fn one_done(&mut self) -> Result<()> {
        match self.under_way.join_next().await {
            None => Ok(()),
            Some(Ok(r)) => r,
            Some(Err(e)) => Err(Error::other("the upload of a part was cut off").source(e)),
        }
    }

    async fn complete(mut self, path: &str) -> Result<()> {
        while !self.under_way.is_empty() {
            if let Err(e) = self.one_done().await {
                self.abort().await;
                return Err(e);
            }
        }
        let bytes = self.bytes;
        try_join_all(self.uploads.into_iter().map(|(store, mut upload)| async move {
            let Err(e) = store.note(upload.complete().await) else { return Ok(()) };
            // The answer may be lost after the deed.
            match store.size(path).await {
                Ok(Some(n)) if n == bytes => Ok(()),
                _ => Err(store.write_error(path, e)),
            }
        }))
        .await
        .map(drop)
    }

    async fn abort(&mut self) {
        self.under_way.abort_all();
        for (_, upload) in &mut self.uploads {
            let _ = upload.abort().await;
        }
    }
}

impl Write for ObjectWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = data.len().min(self.part_bytes() - self.buf.len());
        self.buf.extend_from_slice(&data[..n]);
        // A full buffer leaves when more comes: an object of exactly one part goes in one request.
        if n == 0 {
            self.send_part().map_err(io::Error::other)?;
            return self.write(data);
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        if let Some(mut parts) = self.parts.take() {
            // Best effort, in the background: what stays is an object that nobody names.
            self.rt.spawn(async move { parts.abort().await });
        }
    }
}
