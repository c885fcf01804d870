//! The merge against an oracle that keeps everything in memory and does one thing at a time.

mod net;

use super::*;
use crate::error::Kind;
use coffer_wire::{
    Begin, Class, Column, ColumnFlags, KeyMode, Lsn, RunHeader, Strategy as Capture, TenantKind, Truncate, put_begin,
    put_delete, put_insert, put_relation, put_run_data, put_run_header, put_truncate, put_update,
};
use proptest::prelude::*;

pub(crate) fn column(attnum: i16, name: &str) -> Column {
    Column {
        attnum,
        name: name.into(),
        type_oid: 25,
        type_name: "text".into(),
        typmod: -1,
        flags: ColumnFlags(0),
        missing: None,
        enum_labels: vec![],
    }
}

/// Gives each line as an image.
#[cfg(feature = "parquet")]
pub(crate) fn with_lines(lines: &[&[u8]], mut f: impl FnMut(Image<'_>)) {
    let scratch = Scratch::new(&std::env::temp_dir()).unwrap();
    let blobs = scratch.blobs().unwrap();
    for line in lines {
        let mut encoded = Vec::new();
        super::image::put_line(&mut encoded, line);
        f(Image::new(&encoded, &blobs));
    }
}

/// Columns 1 and 2 are candidates for the key, 3 and 4 are values.
fn keyed(relid: u32, key: &[u16]) -> Relation {
    Relation {
        relid,
        leaf: relid,
        schema: "public".into(),
        name: format!("t{relid}"),
        class: Class::Data,
        strategy: Capture::Identity,
        key_mode: KeyMode::Key,
        columns: vec![column(1, "id"), column(2, "id2"), column(3, "a"), column(4, "b")],
        key: key.to_vec(),
    }
}

fn full_row(relid: u32) -> Relation {
    Relation { key_mode: KeyMode::FullRow, key: vec![], ..keyed(relid, &[]) }
}

/// Builds the plaintext of a changeset.
#[derive(Default)]
pub(crate) struct Plain {
    pub bytes: Vec<u8>,
    known: BTreeSet<u64>,
    lsn: u64,
    seq: u64,
}

impl Plain {
    pub fn begin(&mut self, lsn: u64) {
        self.lsn = lsn;
        self.seq = 0;
        put_begin(
            &mut self.bytes,
            &Begin { xid: lsn, commit_lsn: Lsn(lsn), end_lsn: Lsn(lsn), commit_time_us: lsn as i64 },
        );
    }

    fn rel(&mut self, rel: &Relation) -> [u8; 8] {
        let e = rel.encode();
        let id = Relation::id_of(&e);
        if self.known.insert(id) {
            put_relation(&mut self.bytes, id, &e);
        }
        id.to_le_bytes()
    }

    pub fn run(&mut self, rel: &Relation, rows: u32, data: &[u8], pieces: Option<usize>) {
        let id = self.rel(rel);
        let h = RunHeader {
            seq: self.seq,
            tenant_kind: TenantKind::Normal,
            tenant_key: "1",
            relations: &id,
            rows,
            rows_len: data.len() as u64,
        };
        self.seq += 1;
        match pieces {
            None => put_run_header(&mut self.bytes, &h, Some(data)),
            Some(n) => {
                put_run_header(&mut self.bytes, &h, None);
                for p in data.chunks(n) {
                    put_run_data(&mut self.bytes, p);
                }
            }
        }
    }

    pub fn truncate(&mut self, rel: &Relation) {
        let id = self.rel(rel);
        put_truncate(
            &mut self.bytes,
            &Truncate { seq: self.seq, restart_sequences: false, tenant: None, relations: &id },
        );
        self.seq += 1;
    }
}

type KeyAndLine = (Vec<u8>, Vec<u8>);

/// What the merge gave: per (group, relid) the lines in order.
#[derive(Default)]
pub(crate) struct Collected {
    pub tables: BTreeMap<(u32, u32), Vec<KeyAndLine>>,
    pub rels: BTreeMap<u32, Arc<Relation>>,
    at: (u32, u32),
}

impl RowSink for Collected {
    fn begin_group(&mut self, group: u32) -> Result<()> {
        self.at.0 = group;
        Ok(())
    }
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.at.1 = rel.relid;
        assert!(self.tables.insert(self.at, Vec::new()).is_none(), "a table comes once");
        self.rels.insert(rel.relid, rel.clone());
        Ok(())
    }
    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        let t = self.tables.get_mut(&self.at).unwrap();
        t.push((key.to_vec(), image.to_line()?));
        Ok(())
    }
    fn end_table(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Collected {
    fn lines(&self, relid: u32) -> Vec<String> {
        let mut v: Vec<_> = self
            .tables
            .get(&(0, relid))
            .into_iter()
            .flatten()
            .map(|(_, l)| String::from_utf8(l.clone()).unwrap())
            .collect();
        v.sort();
        v
    }
}

/// A step of a random history. Values are small numbers, so that everything collides.
#[derive(Clone, Debug)]
enum Step {
    Insert {
        table: usize,
        id: u8,
        id2: u8,
        a: u8,
        b: u8,
    },
    /// `a` or `b` `None`: not touched, a hole.
    Update {
        table: usize,
        pick: usize,
        id: Option<u8>,
        a: Option<u8>,
        b: Option<u8>,
    },
    Delete {
        table: usize,
        pick: usize,
    },
    Truncate {
        table: usize,
    },
    /// The table's key is made of other columns from here on.
    Rekey {
        table: usize,
    },
    Commit,
}

fn step() -> impl Strategy<Value = Step> {
    let table = 0usize..3;
    prop_oneof![
        6 => (table.clone(), 0u8..12, 0u8..2, 0u8..4, 0u8..4).prop_map(|(table, id, id2, a, b)| Step::Insert { table, id, id2, a, b }),
        6 => (table.clone(), any::<usize>(), proptest::option::of(0u8..12), proptest::option::of(0u8..9), proptest::option::of(0u8..9))
            .prop_map(|(table, pick, id, a, b)| Step::Update { table, pick, id, a, b }),
        3 => (table.clone(), any::<usize>()).prop_map(|(table, pick)| Step::Delete { table, pick }),
        1 => table.clone().prop_map(|table| Step::Truncate { table }),
        1 => table.prop_map(|table| Step::Rekey { table }),
        3 => Just(Step::Commit),
    ]
}

/// Rows as the oracle has them: the four values.
type OracleRow = [u8; 4];

/// A value as text: `b` is long, so that lines differ in length and small memories spill.
fn text(column: usize, v: u8) -> String {
    if column == 3 { format!("{v}").repeat(40) } else { v.to_string() }
}

fn line(r: &OracleRow, holes: [bool; 2]) -> Vec<u8> {
    let f = |i: usize| if i >= 2 && holes[i - 2] { "\\U".to_owned() } else { text(i, r[i]) };
    (0..4).map(f).collect::<Vec<_>>().join("\t").into_bytes()
}

struct World {
    /// 0 and 1 are keyed, 2 is whole-row.
    rows: [Vec<OracleRow>; 3],
    rels: [Relation; 3],
    plain: Vec<Plain>,
    dirty: bool,
    lsn: u64,
    /// What was there after each commit.
    versions: Vec<(u64, [Vec<OracleRow>; 3])>,
    pieces: Option<usize>,
}

impl World {
    fn new(pieces: Option<usize>) -> Self {
        Self {
            rows: Default::default(),
            rels: [keyed(10, &[0]), keyed(11, &[0, 1]), full_row(12)],
            plain: vec![Plain::default()],
            dirty: false,
            lsn: 0,
            versions: Vec::new(),
            pieces,
        }
    }

    fn key(&self, t: usize, r: &OracleRow) -> Vec<u8> {
        let k: Vec<String> = self.rels[t].key.iter().map(|i| text(usize::from(*i), r[usize::from(*i)])).collect();
        k.join("\t").into_bytes()
    }

    fn begin(&mut self) -> &mut Plain {
        if !self.dirty {
            self.dirty = true;
            self.lsn += 10;
            let lsn = self.lsn;
            self.plain.last_mut().unwrap().begin(lsn);
        }
        self.plain.last_mut().unwrap()
    }

    fn unique(&self, t: usize, r: &OracleRow, except: Option<usize>) -> bool {
        t == 2 || self.rows[t].iter().enumerate().all(|(i, o)| Some(i) == except || self.key(t, o) != self.key(t, r))
    }

    fn put(&mut self, t: usize, data: &[u8]) {
        let rel = self.rels[t].clone();
        let pieces = self.pieces;
        self.begin().run(&rel, 1, data, pieces);
    }

    fn step(&mut self, s: &Step) {
        let mut data = Vec::new();
        match *s {
            Step::Insert { table: t, id, id2, a, b } => {
                let r = [id, id2, a, b];
                if !self.unique(t, &r, None) {
                    return;
                }
                let key = if t == 2 { Vec::new() } else { self.key(t, &r) };
                put_insert(&mut data, 0, &key, &line(&r, [false; 2]));
                self.put(t, &data);
                self.rows[t].push(r);
            }
            Step::Update { table: t, pick, id, a, b } => {
                if self.rows[t].is_empty() {
                    return;
                }
                let i = pick % self.rows[t].len();
                let old = self.rows[t][i];
                let mut new = old;
                new[0] = id.unwrap_or(old[0]);
                new[2] = a.unwrap_or(old[2]);
                new[3] = b.unwrap_or(old[3]);
                if !self.unique(t, &new, Some(i)) {
                    return;
                }
                let image = line(&new, [a.is_none(), b.is_none()]);
                if t == 2 {
                    let was = line(&old, [false; 2]);
                    put_update(&mut data, 0, (old != new).then_some(was.as_slice()), b"", &image);
                } else {
                    let (was, is) = (self.key(t, &old), self.key(t, &new));
                    put_update(&mut data, 0, (was != is).then_some(was.as_slice()), &is, &image);
                }
                self.put(t, &data);
                self.rows[t][i] = new;
            }
            Step::Delete { table: t, pick } => {
                if self.rows[t].is_empty() {
                    return;
                }
                let i = pick % self.rows[t].len();
                let old = self.rows[t].swap_remove(i);
                let key = if t == 2 { line(&old, [false; 2]) } else { self.key(t, &old) };
                put_delete(&mut data, 0, &key);
                self.put(t, &data);
            }
            Step::Truncate { table: t } => {
                let rel = self.rels[t].clone();
                self.begin().truncate(&rel);
                self.rows[t].clear();
            }
            Step::Rekey { table: t } => {
                // The wider key always holds; the narrower one only while it is unique.
                let other = match t {
                    2 => return,
                    _ if self.rels[t].key == [0] => keyed(10 + t as u32, &[1, 0]),
                    _ => keyed(10 + t as u32, &[0]),
                };
                let was = std::mem::replace(&mut self.rels[t], other);
                let rows = &self.rows[t];
                let fits = (0..rows.len()).all(|i| self.unique(t, &rows[i], Some(i)));
                if !fits {
                    self.rels[t] = was;
                }
            }
            Step::Commit => self.commit(),
        }
    }

    fn commit(&mut self) {
        if self.dirty {
            self.dirty = false;
            self.versions.push((self.lsn, self.rows.clone()));
            if self.versions.len().is_multiple_of(3) {
                self.plain.push(Plain::default());
            }
        }
    }
}

fn expect(rows: &[OracleRow]) -> Vec<String> {
    let mut v: Vec<_> = rows.iter().map(|r| String::from_utf8(line(r, [false; 2])).unwrap()).collect();
    v.sort();
    v
}

/// Only changes after the base's cut count.
struct After(u64, u64);

impl Pick for After {
    fn group(&mut self, _: &Begin, _: TenantKind, _: &str) -> Option<u32> {
        Some(0)
    }
    fn table(&mut self, txn: &Begin, _: u32) -> bool {
        txn.end_lsn.0 > self.0 && txn.end_lsn.0 <= self.1
    }
}

/// Writes a full of what the merge gives.
#[derive(Default)]
struct FullWriter {
    plain: Plain,
    rel: Option<Arc<Relation>>,
}

impl RowSink for FullWriter {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.rel = Some(rel.clone());
        Ok(())
    }
    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        let mut data = Vec::new();
        put_insert(&mut data, 0, key, &image.to_line()?);
        let rel = self.rel.clone().unwrap();
        self.plain.run(&rel, 1, &data, None);
        Ok(())
    }
    fn end_table(&mut self) -> Result<()> {
        Ok(())
    }
}

fn merge(world: &World, memory: usize, after: u64, upto: u64, base: Base<'_>) -> (Collected, MergeStats) {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let mut m = Merge::new(&scratch, memory).unwrap();
    match base {
        Base::None => {}
        Base::Full(bytes) => m.full(0, Box::new(std::io::Cursor::new(bytes.to_vec())), None),
        Base::Rows(rows) | Base::Sorted(rows) => {
            let mut all = Vec::new();
            for (t, rows) in rows.iter().enumerate() {
                // As the base was read: under the first kind of key.
                let rel = [keyed(10, &[0]), keyed(11, &[0, 1]), full_row(12)][t].clone();
                let d = m.relation(&rel.encode()).unwrap();
                for r in rows {
                    let k: Vec<String> = rel.key.iter().map(|i| text(usize::from(*i), r[usize::from(*i)])).collect();
                    all.push((rel.clone(), d, k.join("\t").into_bytes(), line(r, [false; 2])));
                }
            }
            if matches!(base, Base::Sorted(_)) {
                all.sort_by_key(|(r, _, k, l)| (r.relid, sort_key_of_row(r.key_mode, k, l).into_owned()));
                m.sorted_rows(0, Box::new(InMemory(all, 0)));
            } else {
                for (_, d, k, l) in &all {
                    m.base_row(0, *d, k, l).unwrap();
                }
            }
        }
    }
    for p in &world.plain {
        m.changes(&mut p.bytes.as_slice(), &mut After(after, upto)).unwrap();
    }
    let mut out = Collected::default();
    let stats = m.run(&mut out).unwrap();
    (out, stats)
}

enum Base<'a> {
    None,
    Full(&'a [u8]),
    Rows(&'a [Vec<OracleRow>; 3]),
    Sorted(&'a [Vec<OracleRow>; 3]),
}

struct InMemory(Vec<(Relation, DescId, Vec<u8>, Vec<u8>)>, usize);

impl SortedRows for InMemory {
    fn next(&mut self) -> Result<Option<SortedRow<'_>>> {
        self.1 += 1;
        Ok(self.0.get(self.1 - 1).map(|(_, desc, key, line)| SortedRow { desc: *desc, key, line }))
    }
}

fn full_at(world: &World, upto: u64) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let mut m = Merge::new(&scratch, 1 << 20).unwrap();
    for p in &world.plain {
        m.changes(&mut p.bytes.as_slice(), &mut After(0, upto)).unwrap();
    }
    let mut w = FullWriter::default();
    m.run(&mut w).unwrap();
    w.plain.bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn the_merge_is_the_oracle_at_every_commit(
        steps in proptest::collection::vec(step(), 1..160),
        memory in prop_oneof![Just(2_000usize), Just(12_000), Just(1 << 20)],
        pieces in prop_oneof![3 => Just(None), 1 => Just(Some(7usize))],
        cut in any::<proptest::sample::Index>(),
        target in any::<proptest::sample::Index>(),
    ) {
        let mut w = World::new(pieces);
        for s in &steps {
            w.step(s);
        }
        w.commit();
        prop_assume!(!w.versions.is_empty());
        // From nothing, at a random commit and at the last.
        let some = target.index(w.versions.len());
        for v in [some, w.versions.len() - 1] {
            let (lsn, rows) = &w.versions[v];
            let (got, stats) = merge(&w, memory, 0, *lsn, Base::None);
            for (t, rows) in rows.iter().enumerate() {
                prop_assert_eq!(got.lines(10 + t as u32), expect(rows), "table {} at {}", t, lsn);
            }
            prop_assert_eq!((stats.unmatched, stats.incomplete, stats.duplicates), (0, 0, 0));
            for lines in got.tables.values() {
                prop_assert!(lines.is_sorted_by(|a, b| a.0 <= b.0));
            }
        }
        // From a full at an earlier commit.
        let (cut, _) = w.versions[cut.index(some + 1)];
        let full = full_at(&w, cut);
        let (lsn, rows) = &w.versions[some];
        let (got, stats) = merge(&w, memory, cut, *lsn, Base::Full(&full));
        for (t, rows) in rows.iter().enumerate() {
            prop_assert_eq!(got.lines(10 + t as u32), expect(rows), "table {} from {} to {}", t, cut, lsn);
        }
        prop_assert_eq!((stats.unmatched, stats.incomplete), (0, 0));
    }

    #[test]
    fn base_rows_in_any_order_are_a_base(
        steps in proptest::collection::vec(step(), 1..120),
        memory in prop_oneof![Just(2_000usize), Just(1 << 20)],
        sorted in any::<bool>(),
    ) {
        // Tables keep their first kind of key up to the cut, as a base is read under one.
        let mut w = World::new(None);
        for s in &steps {
            if !(w.versions.is_empty() && matches!(s, Step::Rekey { .. })) {
                w.step(s);
            }
        }
        w.commit();
        prop_assume!(w.versions.len() > 1);
        let (from, base) = w.versions[0].clone();
        let (lsn, rows) = w.versions.last().unwrap();
        let (got, stats) = merge(&w, memory, from, *lsn, if sorted { Base::Sorted(&base) } else { Base::Rows(&base) });
        for (t, rows) in rows.iter().enumerate() {
            prop_assert_eq!(got.lines(10 + t as u32), expect(rows), "table {} from {} to {}", t, from, lsn);
        }
        prop_assert_eq!((stats.unmatched, stats.incomplete), (0, 0));
    }
}

#[test]
fn a_long_chain_of_moves_with_holes_is_followed_in_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let rel = keyed(10, &[0]);
    let mut p = Plain::default();
    p.begin(1);
    let rows = 50u32;
    let mut data = Vec::new();
    for i in 0..rows {
        let b = format!("b{i}-").repeat(20);
        put_insert(&mut data, 0, format!("{i}").as_bytes(), format!("{i}\t0\ta{i}\t{b}").as_bytes());
    }
    p.run(&rel, rows, &data, None);
    for round in 1..=200u32 {
        p.begin(u64::from(round) * 10);
        let mut data = Vec::new();
        for i in 0..rows {
            let (old, new) = (i + (round - 1) * rows, i + round * rows);
            put_update(
                &mut data,
                0,
                Some(format!("{old}").as_bytes()),
                format!("{new}").as_bytes(),
                format!("{new}\t0\t{}\t\\U", if round % 2 == 0 { "\\U".to_owned() } else { format!("a{round}") })
                    .as_bytes(),
            );
        }
        p.run(&rel, rows, &data, None);
    }
    let mut m = Merge::new(&scratch, 64 << 10).unwrap();
    m.changes(&mut p.bytes.as_slice(), &mut UpTo(Lsn::MAX)).unwrap();
    let mut out = Collected::default();
    let stats = m.run(&mut out).unwrap();
    assert_eq!((stats.rows, stats.incomplete, stats.unmatched), (u64::from(rows), 0, 0));
    for l in out.lines(10) {
        let f: Vec<&str> = l.split('\t').collect();
        let i: u32 = f[0].parse::<u32>().unwrap() - 200 * rows;
        assert_eq!(f[2], "a199");
        assert_eq!(f[3], format!("b{i}-").repeat(20));
    }
    assert!(stats.spilled > 0);
}

#[test]
fn a_row_larger_than_the_memory_passes_through() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let rel = keyed(10, &[0]);
    let whole = full_row(12);
    let big = "x".repeat(30 << 20);
    let mut p = Plain::default();
    p.begin(1);
    let mut data = Vec::new();
    put_insert(&mut data, 0, b"1", format!("1\t0\t{big}\tb").as_bytes());
    p.run(&rel, 1, &data, Some(256 << 10));
    let mut data = Vec::new();
    let image = format!("7\t0\t{big}\tb");
    put_insert(&mut data, 0, b"", image.as_bytes());
    put_insert(&mut data, 0, b"", image.as_bytes());
    p.run(&whole, 2, &data, None);
    p.begin(2);
    // The key changes, the large value is not touched; one of the two equal rows goes.
    let mut data = Vec::new();
    put_update(&mut data, 0, Some(b"1"), b"2", b"2\t0\t\\U\tc");
    p.run(&rel, 1, &data, None);
    let mut data = Vec::new();
    put_update(&mut data, 0, Some(image.as_bytes()), b"", b"8\t0\t\\U\tb");
    p.run(&whole, 1, &data, Some(100_000));
    let mut m = Merge::new(&scratch, 4 << 20).unwrap();
    m.changes(&mut p.bytes.as_slice(), &mut UpTo(Lsn::MAX)).unwrap();
    let mut w = FullLike::default();
    let stats = m.run(&mut w).unwrap();
    assert_eq!(stats.rows, 3);
    assert_eq!(w.0[&10], [format!("2\t0\t{big}\tc")]);
    let mut both = w.0[&12].clone();
    both.sort();
    assert!(both == [format!("7\t0\t{big}\tb"), format!("8\t0\t{big}\tb")]);
}

#[derive(Default)]
struct FullLike(BTreeMap<u32, Vec<String>>, u32);

impl RowSink for FullLike {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.1 = rel.relid;
        Ok(())
    }
    fn row(&mut self, _: &[u8], image: &Image<'_>) -> Result<()> {
        assert!(image.as_line().is_none());
        self.0.entry(self.1).or_default().push(String::from_utf8(image.to_line()?).unwrap());
        Ok(())
    }
    fn end_table(&mut self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_row_from_another_tenant_with_a_hole_is_refused_or_left_null() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let mut p = Plain::default();
    p.begin(1);
    let mut data = Vec::new();
    put_insert(&mut data, 0, b"5", b"5\t0\t\\U\tb");
    p.run(&keyed(10, &[0]), 1, &data, None);
    let run = |holes| {
        let mut m = Merge::new(&scratch, 1 << 20).unwrap();
        m.on_holes(holes);
        m.changes(&mut p.bytes.as_slice(), &mut UpTo(Lsn::MAX)).unwrap();
        let mut out = Collected::default();
        m.run(&mut out).map(|s| (s, out))
    };
    let e = run(Holes::Refuse).err().unwrap();
    assert!(e.message().contains("public.t10.a") && e.message().contains("key (5)"), "{e}");
    let (stats, out) = run(Holes::Null).unwrap();
    assert_eq!((stats.incomplete, out.lines(10)), (1, vec!["5\t0\t\\N\tb".to_owned()]));
    assert_eq!(run(Holes::Keep).unwrap().1.lines(10), ["5\t0\t\\U\tb"]);
}

#[test]
fn a_truncate_of_a_leaf_takes_only_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let leaf = |leaf| Relation { leaf, ..keyed(10, &[0]) };
    let mut p = Plain::default();
    p.begin(1);
    for (l, id) in [(21, 1), (22, 2)] {
        let mut data = Vec::new();
        put_insert(&mut data, 0, format!("{id}").as_bytes(), format!("{id}\t0\ta\tb").as_bytes());
        p.run(&leaf(l), 1, &data, None);
    }
    p.begin(2);
    p.truncate(&leaf(21));
    let mut data = Vec::new();
    put_insert(&mut data, 0, b"3", b"3\t0\ta\tb");
    p.run(&leaf(21), 1, &data, None);
    let mut m = Merge::new(&scratch, 1 << 20).unwrap();
    m.changes(&mut p.bytes.as_slice(), &mut UpTo(Lsn::MAX)).unwrap();
    let mut out = Collected::default();
    m.run(&mut out).unwrap();
    assert_eq!(out.lines(10), ["2\t0\ta\tb", "3\t0\ta\tb"]);
}

#[test]
fn damaged_plaintext_is_an_error_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let mut p = Plain::default();
    p.begin(1);
    let mut data = Vec::new();
    put_insert(&mut data, 0, b"1", b"1\t0\ta\tb");
    p.run(&keyed(10, &[0]), 1, &data, None);
    p.run(&keyed(10, &[0]), 1, &data, Some(3));
    for n in 1..p.bytes.len() {
        let mut m = Merge::new(&scratch, 1 << 20).unwrap();
        let mut cut = &p.bytes[..n];
        if let Err(e) = m.changes(&mut cut, &mut UpTo(Lsn::MAX)) {
            assert_eq!(e.kind(), Kind::Verification, "{e}");
        }
    }
    for i in 0..p.bytes.len() {
        for bit in [0x01, 0x80] {
            let mut b = p.bytes.clone();
            b[i] ^= bit;
            let mut m = Merge::new(&scratch, 1 << 20).unwrap();
            let _ = m.changes(&mut b.as_slice(), &mut UpTo(Lsn::MAX)).and_then(|()| m.run(&mut Collected::default()));
        }
    }
}

/// A part of a full, in memory.
#[derive(Clone)]
struct InPart {
    known: KnownPart,
    bytes: Vec<u8>,
}

/// Cuts what a merge gives into parts of a few rows, and where there are rows of a part that was taken over.
struct Cutter {
    most: usize,
    borders: Vec<(u32, Vec<u8>)>,
    parts: Vec<InPart>,
    plain: Plain,
    rows: usize,
    relid: u32,
    rel: Option<Arc<Relation>>,
    last: Vec<u8>,
}

impl RowSink for Cutter {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        (self.relid, self.rows) = (rel.relid, usize::MAX);
        self.leaf(rel)
    }
    fn leaf(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.rel = Some(rel.clone());
        Ok(())
    }
    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        let (rel, line) = (self.rel.clone().unwrap(), image.to_line()?);
        let sort_key = sort_key_of_row(rel.key_mode, key, &line).into_owned();
        let before = self.borders.len();
        self.borders.retain(|b| *b > (self.relid, sort_key.clone()));
        let crossed = before > self.borders.len();
        if self.rows == usize::MAX || (crossed || self.rows >= self.most) && self.last != sort_key {
            self.plain = Plain::default();
            let known = KnownPart { relid: self.relid, first: Some(sort_key.clone()), relations: Vec::new() };
            self.parts.push(InPart { known, bytes: Vec::new() });
            self.rows = 0;
        }
        let mut data = Vec::new();
        put_insert(&mut data, 0, key, &line);
        self.plain.run(&rel, 1, &data, None);
        let part = self.parts.last_mut().unwrap();
        part.bytes = self.plain.bytes.clone();
        let encoded = rel.encode();
        if !part.known.relations.contains(&encoded) {
            part.known.relations.push(encoded);
        }
        (self.rows, self.last) = (self.rows + 1, sort_key);
        Ok(())
    }
    fn end_table(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The full at `upto` from the one at `from`: its parts, and how many were taken over.
fn next_full(world: &World, before: &[InPart], from: u64, upto: u64, most: usize) -> (Vec<InPart>, usize) {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let mut m = Merge::new(&scratch, 1 << 20).unwrap();
    m.keep_leaves();
    for p in &world.plain {
        m.changes(&mut p.bytes.as_slice(), &mut After(from, upto)).unwrap();
    }
    let known: Vec<KnownPart> = before.iter().map(|p| p.known.clone()).collect();
    let touched = m.touched(0, &known).unwrap();
    let (read, kept): (Vec<_>, Vec<_>) = before.iter().cloned().zip(&touched).partition(|(_, t)| **t);
    m.full(
        0,
        Box::new(std::io::Cursor::new(read.iter().flat_map(|(p, _)| p.bytes.clone()).collect::<Vec<u8>>())),
        None,
    );
    let kept: Vec<InPart> = kept.into_iter().map(|(p, _)| p).collect();
    let borders = kept.iter().map(|p| (p.known.relid, p.known.first.clone().unwrap_or_default())).collect();
    let mut sink = Cutter {
        most,
        borders,
        parts: Vec::new(),
        plain: Plain::default(),
        rows: 0,
        relid: 0,
        rel: None,
        last: Vec::new(),
    };
    m.run(&mut sink).unwrap();
    let n = kept.len();
    let mut all = [kept, sink.parts].concat();
    all.sort_by(|a, b| (a.known.relid, &a.known.first).cmp(&(b.known.relid, &b.known.first)));
    (all, n)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_chain_of_fulls_that_take_parts_over_is_the_oracle_at_each(
        steps in proptest::collection::vec(step(), 1..200),
        most in 1usize..6,
        every in 1usize..5,
    ) {
        let mut w = World::new(None);
        for s in &steps {
            w.step(s);
        }
        w.commit();
        let (mut parts, mut from) = (Vec::new(), 0);
        for (lsn, rows) in w.versions.iter().step_by(every) {
            (parts, _) = next_full(&w, &parts, from, *lsn, most);
            from = *lsn;
            let bytes: Vec<u8> = parts.iter().flat_map(|p: &InPart| p.bytes.clone()).collect();
            let (got, _) = merge(&w, 1 << 20, *lsn, *lsn, Base::Full(&bytes));
            for (t, rows) in rows.iter().enumerate() {
                prop_assert_eq!(got.lines(10 + t as u32), expect(rows), "table {} at {}", t, lsn);
            }
        }
    }
}

#[test]
fn a_part_that_no_change_touches_is_taken_over() {
    let rel = keyed(10, &[0]);
    let insert = |id: u32| {
        let mut data = Vec::new();
        put_insert(&mut data, 0, format!("{id:03}").as_bytes(), format!("{id:03}\t0\ta\tb").as_bytes());
        data
    };
    let mut first = Plain::default();
    first.begin(1);
    for id in 0..100 {
        first.run(&rel, 1, &insert(2 * id), None);
    }
    let mut second = Plain::default();
    second.begin(2);
    second.run(&rel, 1, &insert(51), None);
    let w = World { plain: vec![first, second], ..World::new(None) };
    let (parts, _) = next_full(&w, &[], 0, 1, 10);
    assert_eq!(parts.len(), 10);
    let (parts, kept) = next_full(&w, &parts, 1, 2, 10);
    assert_eq!((parts.len(), kept), (11, 9));
    assert_eq!(next_full(&w, &parts, 2, 2, 10).1, 11);
}

/// A change that nobody marked describes one leaf of two: a full has both under what is true of the table.
#[test]
fn leaves_are_alike_in_a_full() {
    let leaf = |leaf: u32, class: Class| Relation { leaf, class, ..keyed(10, &[0]) };
    let insert = |id: u32| {
        let mut data = Vec::new();
        put_insert(&mut data, 0, format!("{id:03}").as_bytes(), format!("{id:03}\t0\ta\tb").as_bytes());
        data
    };
    let mut first = Plain::default();
    first.begin(1);
    first.run(&leaf(11, Class::Data), 1, &insert(1), None);
    first.run(&leaf(12, Class::Data), 1, &insert(2), None);
    let mut second = Plain::default();
    second.begin(2);
    second.run(&leaf(12, Class::Config), 1, &insert(3), None);
    let w = World { plain: vec![first, second], ..World::new(None) };
    let (parts, _) = next_full(&w, &[], 0, 1, 10);
    let (parts, _) = next_full(&w, &parts, 1, 2, 10);
    let described: Vec<Relation> =
        parts.iter().flat_map(|p| &p.known.relations).map(|r| Relation::decode(r).unwrap()).collect();
    assert_eq!(
        described.iter().map(|r| (r.leaf, r.class)).collect::<Vec<_>>(),
        [(11, Class::Config), (12, Class::Config)]
    );
    // Nothing changed since: nothing is written again.
    assert_eq!(next_full(&w, &parts, 2, 2, 10).1, parts.len());
}

/// Parts that hold other rows than the manifest says are refused.
#[test]
fn parts_have_the_rows_that_their_manifest_says() {
    let rel = keyed(10, &[0]);
    let mut data = Vec::new();
    put_insert(&mut data, 0, b"1", b"1\t0\ta\tb");
    let mut plain = Plain::default();
    plain.run(&rel, 1, &data, None);
    for (said, right) in [(1, true), (2, false), (0, false)] {
        let dir = tempfile::tempdir().unwrap();
        let mut m = Merge::new(&Scratch::new(dir.path()).unwrap(), 1 << 20).unwrap();
        m.parts(0, Box::new(std::io::Cursor::new(plain.bytes.clone())), said);
        let mut sink = Cutter {
            most: 9,
            borders: Vec::new(),
            parts: Vec::new(),
            plain: Plain::default(),
            rows: 0,
            relid: 0,
            rel: None,
            last: Vec::new(),
        };
        assert_eq!(m.run(&mut sink).is_ok(), right, "{said} rows");
    }
}
