//! What a container must refuse, its vectors, and its speed.

use super::open::corrupt;
use super::*;
use crate::error::{Error, Kind, Result};
use coffer_wire::Lsn;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::sync::Arc;
use uuid::Uuid;

fn key(uid: u128, version: u32, byte: u8) -> Arc<DataKey> {
    Arc::new(DataKey::new(KeyId { uid: Uuid::from_u128(uid), version }, SecretBytes::new([byte; 32])))
}

fn header(codec: Codec) -> Header {
    Header {
        kind: ObjectKind::Changeset,
        codec,
        tenant: Uuid::from_u128(0x7e),
        object: Uuid::from_u128(0x0b),
        source: Uuid::from_u128(0x50),
        system_identifier: 7_000_000_000_000_000_001,
        timeline: 1,
        lsn_start: Lsn(0x16_B374_D848),
        lsn_end: Lsn(0x16_B374_E000),
        key_version: 1,
    }
}

fn our_key() -> Arc<DataKey> {
    key(0x7e, 1, 0x42)
}

fn seal(codec: Codec, sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut s = Sealer::with_salt(Vec::new(), &header(codec), &our_key(), [0x5a; 32]).unwrap();
    for (label, plain) in sections {
        if !label.is_empty() {
            s.section(label).unwrap();
        }
        s.write_all(plain).unwrap();
    }
    let (bytes, sealed) = s.finish().unwrap();
    assert_eq!(sealed.bytes, bytes.len() as u64);
    assert_eq!(sealed.sha256, sha256(&bytes));
    assert_eq!(sealed.plain_bytes, sections.iter().map(|(_, p)| p.len() as u64).sum::<u64>());
    bytes
}

fn open(bytes: &[u8]) -> Result<Vec<u8>> {
    open_with(bytes, &our_key(), &Expect::anything())
}

fn open_with(bytes: &[u8], key: &Arc<DataKey>, expect: &Expect) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    Opener::new(bytes, key, expect)?.read_to_end(&mut all).map_err(|e| e.downcast::<Error>().unwrap())?;
    Ok(all)
}

fn by_section(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut r = SectionReader::new(bytes, &our_key(), &Expect::anything())?;
    let labels: Vec<_> = r.sections().iter().map(|s| s.label.clone()).collect();
    let mut out = Vec::new();
    for (n, label) in labels.into_iter().enumerate() {
        let mut plain = Vec::new();
        r.open(n)?.read_to_end(&mut plain).map_err(|e| e.downcast::<Error>().unwrap())?;
        out.push((label, plain));
    }
    Ok(out)
}

/// Compressible text with noise in it, as rows are.
fn rows(n: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = Vec::with_capacity(n + 80);
    let mut id = 0u64;
    while out.len() < n {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        id += 1;
        let _ = writeln!(
            out,
            "{id}\t{:x}\t2026-03-01 12:{:02}:{:02}+00\tpending order of customer {}\t{}",
            x,
            x % 60,
            (x >> 8) % 60,
            x % 5000,
            x % 100_000
        );
    }
    out.truncate(n);
    out
}

const CODECS: [Codec; 3] = [Codec::None, Codec::Lz4, Codec::Zstd];

#[test]
fn every_size_around_a_chunk_reads_back() {
    for codec in CODECS {
        for n in [0, 1, 100, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7] {
            let plain = rows(n);
            let bytes = seal(codec, &[("", &plain)]);
            assert!(open(&bytes).unwrap() == plain, "{codec:?} {n}");
            assert!(by_section(&bytes).unwrap().is_empty());
        }
        let noise = random::bytes::<5000>();
        let bytes = seal(codec, &[("", &noise)]);
        assert_eq!(open(&bytes).unwrap(), noise);
        assert!(bytes.len() < noise.len() + 400, "noise grows by no more than the frame");
    }
}

#[test]
fn sections_read_alone_and_in_line() {
    let (a, b) = (rows(700_000), rows(10));
    let parts: [(&str, &[u8]); 5] = [("16401", &a), ("16402", b""), ("16403", &b), ("16404", &a), ("16405", b"")];
    for codec in CODECS {
        let bytes = seal(codec, &parts);
        let back = by_section(&bytes).unwrap();
        assert_eq!(back.len(), 5);
        for ((label, plain), (l, p)) in parts.iter().zip(&back) {
            assert!(label == l && plain == p);
        }
        let all: Vec<u8> = parts.iter().flat_map(|(_, p)| p.iter().copied()).collect();
        assert!(open(&bytes).unwrap() == all);
    }
}

#[test]
fn the_index_may_be_larger_than_a_chunk() {
    let labels: Vec<String> = (0..20_000).map(|n| format!("a table with a rather long label number {n}")).collect();
    let mut s = Sealer::new(Vec::new(), &header(Codec::Lz4), &our_key()).unwrap();
    for l in &labels {
        s.section(l).unwrap();
    }
    let bytes = s.finish().unwrap().0;
    assert_eq!(open(&bytes).unwrap(), b"");
    let r = SectionReader::new(&bytes[..], &our_key(), &Expect::anything()).unwrap();
    assert_eq!(r.sections().len(), labels.len());
}

#[test]
fn every_flipped_bit_is_refused() {
    for codec in CODECS {
        let bytes = seal(codec, &[("t", &rows(300)), ("u", b"x")]);
        assert!(open(&bytes).is_ok() && by_section(&bytes).is_ok());
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut b = bytes.clone();
                b[i] ^= 1 << bit;
                let e = open(&b).expect_err("a flipped bit");
                assert!(matches!(e.kind(), Kind::Verification | Kind::Key), "{codec:?} byte {i} bit {bit}: {e}");
                if let Ok(back) = by_section(&b) {
                    panic!("{codec:?} byte {i} bit {bit} goes unnoticed by section: {}", back.len());
                }
            }
        }
    }
}

#[test]
fn every_truncation_and_every_addition_is_refused() {
    let plain = rows(2 * CHUNK_BYTES + 100);
    let bytes = seal(Codec::Lz4, &[("t", &plain)]);
    let small = seal(Codec::None, &[("t", b"abc")]);
    for n in 0..small.len() {
        assert_eq!(open(&small[..n]).unwrap_err().kind(), Kind::Verification, "cut at {n}");
        assert_eq!(by_section(&small[..n]).unwrap_err().kind(), Kind::Verification, "cut at {n}");
    }
    for n in (0..bytes.len()).step_by(997) {
        let e = open(&bytes[..n]).unwrap_err();
        assert_eq!(e.kind(), Kind::Verification, "cut at {n}");
    }
    let mut longer = small.clone();
    longer.push(0);
    assert!(open(&longer).is_err() && by_section(&longer).is_err());
    let twice = [&small[..], &small[..]].concat();
    assert!(open(&twice).is_err());
}

/// Where the chunks of an object begin, and where the index does.
fn chunk_offsets(bytes: &[u8]) -> Vec<usize> {
    let mut at = HEADER_BYTES;
    let mut found = Vec::new();
    while at + 16 < bytes.len() {
        found.push(at);
        at += 8 + u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
    }
    found
}

#[test]
fn chunks_cannot_be_dropped_doubled_or_swapped() {
    let bytes = seal(Codec::None, &[("a", &[1; 1000]), ("b", &[2; 1000]), ("c", &[3; 1000])]);
    let at = chunk_offsets(&bytes);
    assert_eq!(at.len(), 4);
    let piece = |i: usize| &bytes[at[i]..at.get(i + 1).copied().unwrap_or(bytes.len())];
    let make = |order: &[usize]| {
        let mut b = bytes[..HEADER_BYTES].to_vec();
        order.iter().for_each(|i| b.extend_from_slice(piece(*i)));
        b
    };
    assert!(open(&make(&[0, 1, 2, 3])).is_ok());
    for order in [&[0, 2, 3][..], &[1, 0, 2, 3], &[0, 0, 1, 2, 3], &[0, 1, 3], &[3], &[0, 1, 2, 3, 3]] {
        assert_eq!(open(&make(order)).unwrap_err().kind(), Kind::Verification, "{order:?}");
    }
}

#[test]
fn nothing_opens_under_another_header_key_or_tenant() {
    let bytes = seal(Codec::Lz4, &[("", b"acme's rows")]);
    // The same object for another key, position, kind …: each header is spliced onto the other's body.
    let others = [
        Header { object: Uuid::from_u128(0x0c), ..header(Codec::Lz4) },
        Header { lsn_end: Lsn(0x17_0000_0000), ..header(Codec::Lz4) },
        Header { kind: ObjectKind::Full, ..header(Codec::Lz4) },
        Header { source: Uuid::from_u128(1), ..header(Codec::Lz4) },
        header(Codec::Zstd),
    ];
    for h in others {
        let mut s = Sealer::with_salt(Vec::new(), &h, &our_key(), [0x5a; 32]).unwrap();
        s.write_all(b"acme's rows").unwrap();
        let other = s.finish().unwrap().0;
        let spliced = [&other[..HEADER_BYTES], &bytes[HEADER_BYTES..]].concat();
        assert_eq!(open(&spliced).unwrap_err().kind(), Kind::Verification);
    }
    // The tenant's uid with another secret; another tenant's key; another version of the key.
    let e = open_with(&bytes, &key(0x7e, 1, 0x43), &Expect::anything()).unwrap_err();
    assert_eq!(e.kind(), Kind::Verification);
    assert_eq!(open_with(&bytes, &key(0x7f, 1, 0x42), &Expect::anything()).unwrap_err().kind(), Kind::Key);
    assert_eq!(open_with(&bytes, &key(0x7e, 2, 0x42), &Expect::anything()).unwrap_err().kind(), Kind::Key);
    // A sealer with somebody else's key.
    assert!(Sealer::new(Vec::new(), &header(Codec::Lz4), &key(0x7f, 1, 0x42)).is_err());
    assert!(Sealer::new(Vec::new(), &header(Codec::Lz4), &key(0x7e, 2, 0x42)).is_err());
}

#[test]
fn an_object_at_another_name_is_refused_by_what_is_expected() {
    let bytes = seal(Codec::Lz4, &[("", b"x")]);
    let right = Expect {
        kind: Some(ObjectKind::Changeset),
        tenant: Some(Uuid::from_u128(0x7e)),
        object: Some(Uuid::from_u128(0x0b)),
        source: Some(Uuid::from_u128(0x50)),
        lsn_start: Some(Lsn(0x16_B374_D848)),
        lsn_end: Some(Lsn(0x16_B374_E000)),
    };
    assert!(open_with(&bytes, &our_key(), &right).is_ok());
    let wrong = [
        Expect { kind: Some(ObjectKind::Full), ..right.clone() },
        Expect { tenant: Some(Uuid::nil()), ..right.clone() },
        Expect { object: Some(Uuid::nil()), ..right.clone() },
        Expect { source: Some(Uuid::nil()), ..right.clone() },
        Expect { lsn_start: Some(Lsn(1)), ..right.clone() },
        Expect { lsn_end: Some(Lsn(1)), ..right },
    ];
    for e in wrong {
        assert_eq!(open_with(&bytes, &our_key(), &e).unwrap_err().kind(), Kind::Verification, "{e:?}");
    }
}

#[test]
fn no_plaintext_of_a_bad_chunk_comes_out_and_reading_does_not_go_on() {
    let plain = rows(3 * CHUNK_BYTES);
    let mut bytes = seal(Codec::None, &[("", &plain)]);
    let second = chunk_offsets(&bytes)[1];
    bytes[second + 100] ^= 1;
    let mut o = Opener::new(&bytes[..], &our_key(), &Expect::anything()).unwrap().named("s/x");
    assert!(o.next_chunk().unwrap().unwrap() == &plain[..CHUNK_BYTES]);
    let e = o.next_chunk().unwrap_err();
    assert!(e.to_string().contains("s/x") && e.to_string().contains("chunk 1"), "{e}");
    assert!(o.next_chunk().is_err());
    assert!(o.read(&mut [0; 10]).is_err());
}

#[test]
fn two_objects_of_the_same_rows_share_nothing() {
    let seal = || {
        let mut s = Sealer::new(Vec::new(), &header(Codec::None), &our_key()).unwrap();
        s.write_all(&[7; 4096]).unwrap();
        s.finish().unwrap().0
    };
    let (a, b) = (seal(), seal());
    let equal = a[HEADER_BYTES..].iter().zip(&b[HEADER_BYTES..]).filter(|(x, y)| x == y).count();
    assert!(equal < a.len() / 20, "{equal} bytes agree");
}

#[test]
fn a_claimed_length_allocates_nothing() {
    // An index chunk that claims the most an index may have, with nothing behind it.
    let mut bytes = seal(Codec::None, &[])[..HEADER_BYTES].to_vec();
    bytes.extend_from_slice(&(seal::RAW | seal::LAST | (16 << 20)).to_le_bytes());
    bytes.extend_from_slice(&((16u32 << 20) + 16).to_le_bytes());
    assert_eq!(open(&bytes).unwrap_err().kind(), Kind::Verification);
    let mut more = bytes[..HEADER_BYTES].to_vec();
    more.extend_from_slice(&(seal::RAW | (1 << 20)).to_le_bytes());
    more.extend_from_slice(&((1u32 << 20) + 16).to_le_bytes());
    assert!(open(&more).unwrap_err().to_string().contains("impossible"));
    assert_eq!(corrupt("x").kind(), Kind::Verification);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_writes_read_back(pieces in proptest::collection::vec((any::<bool>(), 0usize..400_000), 0..6), codec in 0u8..3) {
        let codec = Codec::from_u8(codec).unwrap();
        let plain = rows(pieces.iter().map(|p| p.1).sum());
        let mut s = Sealer::new(Vec::new(), &header(codec), &our_key()).unwrap();
        let mut at = 0;
        for (section, n) in &pieces {
            if *section { s.section("x").unwrap(); }
            s.write_all(&plain[at..at + n]).unwrap();
            at += n;
        }
        let bytes = s.finish().unwrap().0;
        prop_assert!(open(&bytes).unwrap() == plain);
        prop_assert_eq!(by_section(&bytes).unwrap().len(), pieces.iter().filter(|p| p.0).count());
    }

    #[test]
    fn no_bytes_panic(mut tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut b = seal(Codec::Zstd, &[("t", b"abc")])[..HEADER_BYTES].to_vec();
        b.append(&mut tail);
        prop_assert!(open(&b).is_err());
        prop_assert!(by_section(&b).is_err());
        prop_assert!(open(&b[HEADER_BYTES..]).is_err());
    }
}

/// Vectors of format version 1: they never change. `COFFER_WRITE_VECTORS=1` writes those that are missing.
#[test]
fn the_vectors_of_version_1_still_open_and_are_still_made() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/crypto/testdata");
    let text = rows(2000);
    type Sections<'a> = Vec<(&'a str, &'a [u8])>;
    let cases: [(&str, Codec, Sections<'_>); 4] = [
        ("v1-empty", Codec::None, vec![]),
        ("v1-none", Codec::None, vec![("16401", b"1\tfirst\n2\tsecond\n"), ("16402", b"")]),
        ("v1-lz4", Codec::Lz4, vec![("", &text)]),
        ("v1-zstd", Codec::Zstd, vec![("16401", &text), ("16402", b"x")]),
    ];
    for (name, codec, sections) in cases {
        let path = dir.join(format!("{name}.coffer"));
        let bytes = seal(codec, &sections);
        if !path.exists() && std::env::var_os("COFFER_WRITE_VECTORS").is_some() {
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let plain: Vec<u8> = sections.iter().flat_map(|(_, p)| p.iter().copied()).collect();
        assert_eq!(open(&kept).unwrap(), plain, "{name}");
        // A compressor may find shorter forms in a later version; what is not compressed is fixed to the byte.
        if codec == Codec::None {
            assert_eq!(bytes, kept, "{name}");
        }
    }
}

/// CPU seconds of this thread so far: other work on the machine does not count.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    stat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// `cargo test --release -p coffer --lib crypto::tests::speed -- --ignored --nocapture`
#[test]
#[ignore = "prints figures"]
fn speed() {
    let plain = rows(64 << 20);
    for codec in CODECS {
        let mut best = (f64::MAX, f64::MAX);
        let mut size = 0;
        for _ in 0..3 {
            let at = cpu_s();
            let mut s = Sealer::new(Vec::with_capacity(80 << 20), &header(codec), &our_key()).unwrap();
            s.write_all(&plain).unwrap();
            let bytes = s.finish().unwrap().0;
            let sealed = cpu_s() - at;
            size = bytes.len();
            let at = cpu_s();
            let mut o = Opener::new(&bytes[..], &our_key(), &Expect::anything()).unwrap();
            let mut n = 0;
            while let Some(c) = o.next_chunk().unwrap() {
                n += c.len();
            }
            assert_eq!(n, plain.len());
            best = (best.0.min(sealed), best.1.min(cpu_s() - at));
        }
        let mb = plain.len() as f64 / 1e6;
        println!(
            "{codec:?}: seal {:.0} MB/s, open {:.0} MB/s, ratio {:.2}",
            mb / best.0,
            mb / best.1,
            plain.len() as f64 / size as f64
        );
    }
}
