//! Compression of single chunks.
//!
//! Block formats only: the length of the plaintext is the container's, so no prefix inside the data decides an
//! allocation. A chunk that does not get smaller is stored as it is.

/// How the chunks of a container are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    None = 0,
    /// LZ4 block format: changesets.
    Lz4 = 1,
    /// Zstandard, level 1: incrementals, fulls, archives.
    Zstd = 2,
}

impl Codec {
    pub fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            0 => Self::None,
            1 => Self::Lz4,
            2 => Self::Zstd,
            _ => return None,
        })
    }
}

const ZSTD_LEVEL: i32 = 1;

/// A chunk that does not decompress to its length, or a compressor that cannot start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodecError;

impl std::fmt::Display for CodecError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("data does not decompress to its stated length")
    }
}

impl std::error::Error for CodecError {}

/// Compresses chunk after chunk with the state that can be kept between them.
pub struct Compressor(Compress);

enum Compress {
    None,
    Lz4(Box<lz4_flex::block::CompressTable>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    pub fn new(codec: Codec) -> Result<Self, CodecError> {
        Ok(Self(match codec {
            Codec::None => Compress::None,
            Codec::Lz4 => Compress::Lz4(Box::new(lz4_flex::block::CompressTable::large())),
            Codec::Zstd => Compress::Zstd(zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(|_| CodecError)?),
        }))
    }

    /// Compresses into the front of `out`; `None` when the result would not be smaller than the input.
    #[inline(never)]
    pub fn compress(&mut self, plain: &[u8], out: &mut [u8]) -> Option<usize> {
        let n = match &mut self.0 {
            Compress::None => None,
            Compress::Lz4(table) => lz4_flex::block::compress_into_with_table(plain, out, table).ok(),
            Compress::Zstd(z) => z.compress_to_buffer(plain, out).ok(),
        }?;
        (n < plain.len()).then_some(n)
    }

    /// Room that [`Self::compress`] may need for this input.
    #[must_use]
    pub fn bound(plain: usize) -> usize {
        lz4_flex::block::get_maximum_output_size(plain).max(zstd::zstd_safe::compress_bound(plain))
    }
}

/// Decompresses chunk after chunk.
pub struct Decompressor {
    codec: Codec,
    /// Made for the first chunk that needs it.
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    #[must_use]
    pub fn new(codec: Codec) -> Self {
        Self { codec, zstd: None }
    }

    /// Decompresses into exactly `out.len()` bytes.
    #[inline(never)]
    pub fn decompress(&mut self, stored: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
        let want = out.len();
        let got = match self.codec {
            Codec::None => None,
            Codec::Lz4 => lz4_flex::block::decompress_into(stored, out).ok(),
            Codec::Zstd => {
                let z = match &mut self.zstd {
                    Some(z) => z,
                    none => none.insert(zstd::bulk::Decompressor::new().map_err(|_| CodecError)?),
                };
                z.decompress_to_buffer(stored, out).ok()
            }
        };
        if got == Some(want) { Ok(()) } else { Err(CodecError) }
    }
}

/// Room that [`lz4_compress`] may need.
#[must_use]
pub fn lz4_bound(plain: usize) -> usize {
    lz4_flex::block::get_maximum_output_size(plain)
}

/// One LZ4 block into the front of `out`, larger than the input if need be; returns its length.
#[inline(never)]
pub fn lz4_compress(plain: &[u8], out: &mut [u8]) -> Result<usize, CodecError> {
    lz4_flex::block::compress_into(plain, out).map_err(|_| CodecError)
}

/// The content of one LZ4 block, which must fill `out` exactly.
#[inline(never)]
pub fn lz4_decompress(packed: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    match lz4_flex::block::decompress_into(packed, out) {
        Ok(n) if n == out.len() => Ok(()),
        _ => Err(CodecError),
    }
}
