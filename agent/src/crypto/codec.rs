//! Compression of single chunks.
//!
//! Block formats only: the length of the plaintext is the container's, so no prefix inside the data decides an
//! allocation. A chunk that does not get smaller is stored as it is.

use crate::error::{Context, Error, Kind, Result};

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

/// Compresses chunk after chunk with the state that can be kept between them.
pub(super) enum Compressor {
    None,
    Lz4(Box<lz4_flex::block::CompressTable>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    pub fn new(codec: Codec) -> Result<Self> {
        Ok(match codec {
            Codec::None => Self::None,
            Codec::Lz4 => Self::Lz4(Box::new(lz4_flex::block::CompressTable::large())),
            Codec::Zstd => Self::Zstd(
                zstd::bulk::Compressor::new(ZSTD_LEVEL).context(Kind::Other, "cannot start the zstd compressor")?,
            ),
        })
    }

    /// Compresses into the front of `out`; `None` when the result would not be smaller than the input.
    pub fn compress(&mut self, plain: &[u8], out: &mut [u8]) -> Option<usize> {
        let n = match self {
            Self::None => None,
            Self::Lz4(table) => lz4_flex::block::compress_into_with_table(plain, out, table).ok(),
            Self::Zstd(z) => z.compress_to_buffer(plain, out).ok(),
        }?;
        (n < plain.len()).then_some(n)
    }

    /// Room that [`Self::compress`] may need for this input.
    pub fn bound(plain: usize) -> usize {
        lz4_flex::block::get_maximum_output_size(plain).max(zstd::zstd_safe::compress_bound(plain))
    }
}

/// Decompresses chunk after chunk.
pub(super) enum Decompressor {
    None,
    Lz4,
    Zstd(zstd::bulk::Decompressor<'static>),
}

impl Decompressor {
    pub fn new(codec: Codec) -> Result<Self> {
        Ok(match codec {
            Codec::None => Self::None,
            Codec::Lz4 => Self::Lz4,
            Codec::Zstd => {
                Self::Zstd(zstd::bulk::Decompressor::new().context(Kind::Other, "cannot start the zstd decompressor")?)
            }
        })
    }

    /// Decompresses into exactly `out.len()` bytes.
    pub fn decompress(&mut self, stored: &[u8], out: &mut [u8]) -> Result<()> {
        let want = out.len();
        let got = match self {
            Self::None => None,
            Self::Lz4 => lz4_flex::block::decompress_into(stored, out).ok(),
            Self::Zstd(z) => z.decompress_to_buffer(stored, out).ok(),
        };
        if got == Some(want) {
            return Ok(());
        }
        Err(Error::new(Kind::Verification, "a chunk does not decompress to its stated length").code("corrupt"))
    }
}
