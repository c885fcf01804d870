//! What a full of one tenant is made of, each part measured alone and in memory: decrypting and decompressing what is
//! read, merging, compressing and encrypting what is written. `make bench` compares their sum with `coffer compact`.
//!
//! Its arguments are a configuration and a tenant whose newest full was made from a base and changesets; it prints one
//! line of JSON with the seconds of each part. Without arguments it does nothing.

use bytes::Bytes;
use coffer::catalog::Catalog;
use coffer::config::Config;
use coffer::crypto::{Codec, Opener};
use coffer::error::{Error, Result};
use coffer::history::{Inputs, When};
use coffer::merge::{Image, Merge, RowSink, UpTo};
use coffer::opened::{Opened, scratch};
use coffer::repository::ObjectRef;
use coffer::tenant::Tenant;
use coffer_cipher::{Cipher, Compressor, Decompressor};
use coffer_wire::{Lsn, Relation};
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let [config, tenant] = words.as_slice() else { return Ok(()) };
    let config = Config::load(Path::new(config))?;
    let rt = tokio::runtime::Runtime::new().map_err(|e| Error::other(format!("cannot start: {e}")))?;
    let (read, written, target) = rt.block_on(objects(&config, tenant))?;
    let (plain_in, packed_in) = of_all(&read)?;
    let (_, packed_out) = of_all(&written)?;

    let cipher = Cipher::new(&[7; 32]);
    let decrypt = seconds_of(sealed(&cipher, &packed_in), |chunks| {
        for (n, (text, tag)) in chunks.iter_mut().enumerate() {
            cipher.open(nonce(n), b"", text, tag).map_err(|_| Error::other("a chunk does not open"))?;
        }
        Ok(())
    })?;
    let decompress = seconds_of((), |()| {
        let (mut out, mut all) = (Vec::new(), Kept::default());
        for c in packed_in.iter().filter(|c| !c.raw) {
            out.resize(c.plain.len(), 0);
            let done = all.of(c.codec, || Ok(Decompressor::new(c.codec)))?.decompress(&c.packed, &mut out);
            done.map_err(|_| Error::other("a chunk does not decompress"))?;
        }
        Ok(())
    })?;
    let folder = scratch(&config)?;
    let memory = usize::try_from(config.limits.memory / 4).unwrap_or(usize::MAX);
    let mut rows = Count(0);
    let merge = seconds_of(plain_in, |plain| {
        let mut m = Merge::new(&folder, memory)?;
        for (o, bytes) in plain.drain(..) {
            match o.kind {
                coffer::crypto::ObjectKind::Full => m.full(0, Box::new(Cursor::new(bytes)), None),
                _ => m.changes(&mut Cursor::new(bytes), &mut UpTo(target))?,
            }
        }
        m.run(&mut rows).map(|_| ())
    })?;
    let compress = seconds_of((), |()| {
        let (mut out, mut all) = (Vec::new(), Kept::default());
        for c in &packed_out {
            out.resize(Compressor::bound(c.plain.len()).max(c.plain.len()), 0);
            all.of(c.codec, || compressor(c.codec))?.compress(&c.plain, &mut out);
        }
        Ok(())
    })?;
    let mut to_seal: Vec<Vec<u8>> = packed_out.iter().map(|c| c.packed.clone()).collect();
    let seal = seconds_of((), |()| {
        for (n, text) in to_seal.iter_mut().enumerate() {
            cipher.seal(nonce(n), b"", text).map_err(|_| Error::other("a chunk does not seal"))?;
        }
        Ok(())
    })?;
    let sum = |chunks: &[Chunk]| chunks.iter().map(|c| c.plain.len()).sum::<usize>();
    println!(
        "{}",
        serde_json::json!({"decrypt": decrypt, "decompress": decompress, "merge": merge, "compress": compress, "seal": seal,
            "read_bytes": sum(&packed_in), "written_bytes": sum(&packed_out), "rows": rows.0})
    );
    Ok(())
}

/// What the tenant's newest full was made from, and what was written for it.
async fn objects(config: &Config, tenant: &str) -> Result<(Sealed, Sealed, Lsn)> {
    let opened = Opened::new(config, None).await?;
    let (name, source) = opened.source(config, None).await?;
    let entry = opened.tenant((&name, source), &Tenant::normal(tenant)).await?;
    let catalog = Catalog::open(&opened.repo, source, entry.uid, None).await?;
    let full = catalog.state().fulls.last().ok_or_else(|| Error::other("the tenant has no full"))?;
    // Without the catalog nothing is known of the full.
    let history = opened.history(source).await?;
    let target = history.resolve(&When::Lsn(full.point_lsn)).await?;
    let tables = history.require(&target, entry.uid, &|_| true)?;
    let Inputs { fulls, ships, .. } = history.inputs(entry.uid, target.lsn, tables).await?;
    let changes = ships.into_iter().flat_map(|s| s.common.into_iter().chain(s.changeset));
    let read: Vec<ObjectRef> = fulls.into_iter().map(|(o, _)| o).chain(changes).collect();
    let mut found = [Vec::new(), Vec::new()];
    for (which, objects) in [read, full.objects.clone()].into_iter().enumerate() {
        for o in objects {
            found[which].push((opened.repo.fetch(&o, None).await?, o));
        }
    }
    let keys = opened.keyring.clone();
    let [read, written] = found;
    Ok((Sealed { keys: keys.clone(), objects: read }, Sealed { keys, objects: written }, target.lsn))
}

/// Objects as a store has them.
struct Sealed {
    keys: Arc<coffer::keyring::Keyring>,
    objects: Vec<(Bytes, ObjectRef)>,
}

/// One chunk, before and after it is compressed.
struct Chunk {
    codec: Codec,
    plain: Vec<u8>,
    packed: Vec<u8>,
    /// It does not get smaller.
    raw: bool,
}

type Plain = Vec<(ObjectRef, Vec<u8>)>;

fn of_all(sealed: &Sealed) -> Result<(Plain, Vec<Chunk>)> {
    let (mut plain, mut chunks) = (Vec::new(), Vec::new());
    for (bytes, o) in &sealed.objects {
        let mut opener = Opener::new(Cursor::new(bytes.clone()), &*sealed.keys, &o.expect())?;
        let codec = opener.header().codec;
        let mut whole = Vec::new();
        while let Some(c) = opener.next_chunk()? {
            whole.extend_from_slice(c);
            let mut packed = vec![0; Compressor::bound(c.len()).max(c.len())];
            let fits = compressor(codec)?.compress(c, &mut packed);
            match fits {
                Some(n) => packed.truncate(n),
                None => packed = c.to_vec(),
            }
            chunks.push(Chunk { codec, plain: c.to_vec(), packed, raw: fits.is_none() });
        }
        plain.push((o.clone(), whole));
    }
    Ok((plain, chunks))
}

fn compressor(codec: Codec) -> Result<Compressor> {
    Compressor::new(codec).map_err(|_| Error::other("cannot start the compressor"))
}

/// One for each codec, kept between chunks.
struct Kept<T>(Vec<(Codec, T)>);

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Kept<T> {
    fn of(&mut self, codec: Codec, make: impl FnOnce() -> Result<T>) -> Result<&mut T> {
        let n = match self.0.iter().position(|(c, _)| *c == codec) {
            Some(n) => n,
            None => {
                self.0.push((codec, make()?));
                self.0.len() - 1
            }
        };
        Ok(&mut self.0[n].1)
    }
}

fn nonce(n: usize) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&(n as u64).to_le_bytes());
    nonce
}

type SealedChunk = (Vec<u8>, [u8; 16]);

fn sealed(cipher: &Cipher, chunks: &[Chunk]) -> Vec<SealedChunk> {
    let seal = |(n, c): (usize, &Chunk)| {
        let mut text = c.packed.clone();
        let tag = cipher.seal(nonce(n), b"", &mut text).unwrap_or_else(|_| unreachable!("a chunk is short"));
        (text, tag)
    };
    chunks.iter().enumerate().map(seal).collect()
}

fn seconds_of<T>(mut over: T, part: impl FnOnce(&mut T) -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    part(&mut over)?;
    Ok(begun.elapsed().as_secs_f64())
}

/// Counts rows and forgets them.
struct Count(u64);

impl RowSink for Count {
    fn begin_table(&mut self, _: &Arc<Relation>) -> Result<()> {
        Ok(())
    }

    fn row(&mut self, _: &[u8], image: &Image<'_>) -> Result<()> {
        self.0 += 1;
        std::hint::black_box(image.len());
        Ok(())
    }

    fn end_table(&mut self) -> Result<()> {
        Ok(())
    }
}
