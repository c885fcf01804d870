//! Incrementals: whoever reads them instead of changesets gets the same rows, wherever it begins and ends.

use super::*;
use crate::tenant::Tenant;
use coffer_wire::{Frame, FrameReader, put_marker, put_opaque};

/// An incremental's plaintext in memory.
#[derive(Default)]
struct Mem {
    bytes: Vec<u8>,
    sections: Vec<u32>,
}

impl NetSink for Mem {
    fn section(&mut self, relid: u32) -> Result<()> {
        self.sections.push(relid);
        Ok(())
    }
    fn bytes(&mut self, b: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(b);
        Ok(())
    }
}

/// A ship as it lies in the stores.
struct Ship {
    common: Vec<u8>,
    changeset: Vec<u8>,
    /// Where its last transaction ends.
    to: u64,
}

/// Cuts what a [`Plain`] holds into a common object and a changeset.
fn ship(plain: &Plain) -> Ship {
    let mut s = Ship { common: Vec::new(), changeset: Vec::new(), to: 0 };
    let mut frames = FrameReader::new(&plain.bytes);
    while let Some(f) = frames.next_raw() {
        let (frame, raw) = f.unwrap();
        match frame {
            Frame::Begin(b) => {
                s.to = b.end_lsn.0;
                s.common.extend_from_slice(raw);
                s.changeset.extend_from_slice(raw);
            }
            Frame::Relation(..) => {
                s.common.extend_from_slice(raw);
                s.changeset.extend_from_slice(raw);
            }
            Frame::Truncate(_) | Frame::Marker(_) => s.common.extend_from_slice(raw),
            _ => s.changeset.extend_from_slice(raw),
        }
    }
    s
}

fn tenant() -> Tenant {
    Tenant::normal("1")
}

/// The incremental of these ships.
fn net(ships: &[Ship], after: u64, memory: usize) -> (Mem, NetStats) {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let mut m = Merge::for_net(&scratch, memory).unwrap();
    for s in ships {
        m.changes(&mut s.common.as_slice(), &mut After(after, u64::MAX)).unwrap();
        m.changes(&mut s.changeset.as_slice(), &mut After(after, u64::MAX)).unwrap();
    }
    let mut out = Mem::default();
    let stats = m.net(&tenant(), Lsn(after), &mut out).unwrap();
    let to = ships.last().map_or(u64::MAX, |s| s.to);
    let found = check(&mut out.bytes.as_slice(), Some(&tenant()), Some((Lsn(after), Lsn(to)))).unwrap();
    assert_eq!(found.rows, stats.rows);
    assert!(out.sections.is_sorted_by(|a, b| a < b));
    (out, stats)
}

/// Incrementals of runs of ships, as `cuts` divides them: begin, end (numbers of ships), plaintext.
fn incrementals(ships: &[Ship], cuts: &[bool], memory: usize) -> Vec<(usize, usize, Mem)> {
    let mut out = Vec::new();
    let mut from = 0usize;
    for to in 1..=ships.len() {
        if to == ships.len() || cuts.get(to).copied().unwrap_or(false) {
            let after = from.checked_sub(1).map_or(0, |i| ships[i].to);
            out.push((from, to, net(&ships[from..to], after, memory).0));
            from = to;
        }
    }
    out
}

/// Gives a merge what is after `cut` up to `target`, with incrementals where they end in time.
fn feed(m: &mut Merge, ships: &[Ship], incrementals: &[(usize, usize, Mem)], cut: u64, target: u64) {
    let mut pick = After(cut, target);
    let mut n = 0;
    for (from, to, mem) in incrementals {
        assert_eq!(*from, n);
        n = *to;
        let usable = ships[to - 1].to <= target;
        if usable {
            m.changes(&mut mem.bytes.as_slice(), &mut pick).unwrap();
        }
        for s in &ships[*from..*to] {
            m.changes(&mut s.common.as_slice(), &mut pick).unwrap();
            if !usable {
                m.changes(&mut s.changeset.as_slice(), &mut pick).unwrap();
            }
        }
    }
    for s in &ships[n..] {
        m.changes(&mut s.common.as_slice(), &mut pick).unwrap();
        m.changes(&mut s.changeset.as_slice(), &mut pick).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn with_incrementals_the_merge_is_the_oracle_at_every_target(
        steps in proptest::collection::vec(step(), 1..240),
        memory in prop_oneof![Just(2_000usize), Just(12_000), Just(1 << 20)],
        pieces in prop_oneof![3 => Just(None), 1 => Just(Some(7usize))],
        cuts in proptest::collection::vec(any::<bool>(), 30),
        full in any::<proptest::sample::Index>(),
    ) {
        let mut w = World::new(pieces);
        for s in &steps {
            w.step(s);
        }
        w.commit();
        prop_assume!(!w.versions.is_empty());
        let ships: Vec<Ship> = w.plain.iter().map(ship).filter(|s| s.to > 0).collect();
        let incrementals = incrementals(&ships, &cuts, memory);
        let cut = w.versions[full.index(w.versions.len())].0;
        let bytes = full_at(&w, cut);
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap();
        for (lsn, rows) in &w.versions {
            // From nothing, and from a full at any commit.
            for cut in [0, cut].into_iter().filter(|c| c <= lsn) {
                let mut m = Merge::new(&scratch, memory).unwrap();
                feed(&mut m, &ships, &incrementals, cut, *lsn);
                if cut > 0 {
                    m.full(0, Box::new(std::io::Cursor::new(bytes.clone())), None);
                }
                let mut got = Collected::default();
                let stats = m.run(&mut got).unwrap();
                for (t, rows) in rows.iter().enumerate() {
                    prop_assert_eq!(got.lines(10 + t as u32), expect(rows), "table {} from {} to {}", t, cut, lsn);
                }
                prop_assert_eq!((stats.incomplete, stats.duplicates), (0, 0));
            }
        }
    }
}

/// A step of a stream that need not make sense: rows that are not there change, keys come twice.
#[derive(Clone, Debug)]
enum Wild {
    /// `to`: the row's key becomes another. `holes`: of the values.
    Row {
        table: usize,
        op: u8,
        key: u8,
        to: u8,
        values: [Option<u8>; 2],
    },
    /// 0: the table, 1 and 2 its leaves.
    Truncate(usize),
    Drop(usize),
    /// A column more.
    Alter,
    /// The key is made of other columns.
    Rekey,
    Commit,
    Ship,
}

fn wild() -> impl Strategy<Value = Wild> {
    let values = proptest::array::uniform2(proptest::option::of(0u8..5));
    prop_oneof![
        24 => (0usize..4, 0u8..12, 0u8..5, 0u8..5, values)
            .prop_map(|(table, op, key, to, values)| Wild::Row { table, op, key, to, values }),
        2 => (0usize..3).prop_map(Wild::Truncate),
        1 => (1usize..3).prop_map(Wild::Drop),
        1 => Just(Wild::Alter),
        1 => Just(Wild::Rekey),
        6 => Just(Wild::Commit),
        3 => Just(Wild::Ship),
    ]
}

/// Everything that a sink is told, and a full of it.
#[derive(Default)]
struct Told {
    said: Vec<String>,
    plain: Plain,
    rel: Option<Arc<Relation>>,
}

impl PartialEq for Told {
    fn eq(&self, other: &Self) -> bool {
        self.said == other.said
    }
}

impl std::fmt::Debug for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.said.fmt(f)
    }
}

impl RowSink for Told {
    fn last_change(&mut self, at: Lsn) {
        self.said.push(format!("last change {at}"));
    }
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.said.push(format!("table {rel:?}"));
        Ok(())
    }
    fn leaf(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.said.push(format!("leaf {rel:?}"));
        self.rel = Some(rel.clone());
        Ok(())
    }
    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        let line = image.to_line()?;
        self.said.push(format!("{} = {}", String::from_utf8_lossy(key), String::from_utf8_lossy(&line)));
        if let Some(rel) = self.rel.clone() {
            let mut data = Vec::new();
            put_insert(&mut data, 0, key, &line);
            self.plain.run(&rel, 1, &data, None);
        }
        Ok(())
    }
    fn end_table(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A table with two leaves (0, 1), one of its own (2), and one without a key (3).
struct Stream {
    added: usize,
    wide: bool,
    plain: Vec<Plain>,
    lsn: u64,
    open: bool,
}

impl Stream {
    fn rel(&self, table: usize) -> Relation {
        let key: &[u16] = if self.wide && table < 3 { &[0, 1] } else { &[0] };
        let mut rel = match table {
            0 | 1 => Relation { leaf: 21 + table as u32, ..keyed(20, key) },
            2 => keyed(23, key),
            _ => full_row(24),
        };
        for n in 0..self.added {
            let mut c = column(5 + n as i16, &format!("more{n}"));
            c.missing = (table != 1).then(|| format!("missing{n}"));
            rel.columns.push(c);
        }
        rel
    }

    fn line(&self, key: u8, values: [Option<u8>; 2]) -> Vec<u8> {
        let value = |v: Option<u8>| v.map_or_else(|| "\\U".to_owned(), |v| v.to_string());
        let mut fields = vec![key.to_string(), (key % 2).to_string(), value(values[0]), value(values[1])];
        fields.extend((0..self.added).map(|n| value(values[n % 2])));
        fields.join("\t").into_bytes()
    }

    fn key(&self, key: u8) -> Vec<u8> {
        if self.wide { format!("{key}\t{}", key % 2) } else { key.to_string() }.into_bytes()
    }

    fn now(&mut self) -> &mut Plain {
        if !self.open {
            self.open = true;
            self.lsn += 10;
            let lsn = self.lsn;
            self.plain.last_mut().unwrap().begin(lsn);
        }
        self.plain.last_mut().unwrap()
    }

    fn step(&mut self, s: &Wild) {
        match *s {
            Wild::Row { table, op, key, to, values } => self.row(table, op, key, to, values),
            Wild::Truncate(which) => {
                let rel = match which {
                    0 => Relation { leaf: 20, ..self.rel(0) },
                    n => self.rel(n - 1),
                };
                self.now().truncate(&rel);
            }
            Wild::Drop(leaf) => {
                let payload = format!("{{\"relids\":[{}]}}", 20 + leaf);
                let p = self.now();
                let m = coffer_wire::Marker { seq: p.seq, kind: "drop", payload: payload.as_bytes() };
                put_marker(&mut p.bytes, &m);
                p.seq += 1;
            }
            Wild::Alter => self.added += 1,
            Wild::Rekey => self.wide = !self.wide,
            Wild::Commit => self.open = false,
            Wild::Ship => {
                self.open = false;
                if !self.plain.last().unwrap().bytes.is_empty() {
                    self.plain.push(Plain::default());
                }
            }
        }
    }

    fn row(&mut self, table: usize, op: u8, key: u8, to: u8, values: [Option<u8>; 2]) {
        let rel = self.rel(table);
        let whole = [Some(values[0].unwrap_or(7)), Some(values[1].unwrap_or(8))];
        let mut data = Vec::new();
        let keyed = table < 3;
        let k = |n| if keyed { self.key(n) } else { Vec::new() };
        match op {
            0..=2 => put_insert(&mut data, 0, &k(key), &self.line(key, whole)),
            3..=4 => put_update(&mut data, 0, None, &k(key), &self.line(key, whole)),
            5..=6 => put_update(&mut data, 0, None, &k(key), &self.line(key, values)),
            7 => put_insert(&mut data, 0, &k(key), &self.line(key, values)),
            8 if keyed => put_update(&mut data, 0, Some(&k(key)), &k(to), &self.line(to, values)),
            8 => put_update(&mut data, 0, Some(&self.line(key, whole)), b"", &self.line(to, values)),
            9..=10 if keyed => put_delete(&mut data, 0, &k(key)),
            9..=10 => put_delete(&mut data, 0, &self.line(key, whole)),
            _ => put_opaque(&mut data, 0, "because", b"raw"),
        }
        self.now().run(&rel, 1, &data, None);
    }
}

/// Which parts of a full a merge touches: with incrementals (the left one) no more than with changesets. A change of a
/// row whose leaf was dropped in the span is not in an incremental, and touches nothing that stays.
#[derive(Debug)]
struct Touched(Vec<bool>);

impl PartialEq for Touched {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(with, without)| *without || !with)
    }
}

/// Rows that were there before the stream.
fn first_rows(table: usize) -> (Relation, Vec<KeyAndLine>) {
    let rel = Stream { added: 0, wide: false, plain: Vec::new(), lsn: 0, open: false }.rel(table);
    let rows = (0u8..4)
        .filter(|k| usize::from(*k % 2) == table || table > 1)
        .map(|k| (k.to_string().into_bytes(), format!("{k}\t{}\tx\ty", k % 2).into_bytes()));
    (rel, rows.collect())
}

fn add_base(m: &mut Merge) {
    let mut rows = Vec::new();
    for t in 0..4 {
        let (rel, of_table) = first_rows(t);
        let d = m.relation(&rel.encode()).unwrap();
        rows.extend(of_table.into_iter().map(|(k, l)| (rel.clone(), d, k, l)));
    }
    rows.sort_by_key(|(r, _, k, l)| (r.relid, sort_key_of_row(r.key_mode, k, l).into_owned()));
    m.sorted_rows(0, Box::new(InMemory(rows, 0)));
}

fn known_parts() -> Vec<KnownPart> {
    let of_table = |t| {
        let rel = first_rows(t).0;
        [None, Some(b"2".to_vec())].map(|first| KnownPart { relid: rel.relid, first, relations: vec![rel.encode()] })
    };
    [0, 2, 3].into_iter().flat_map(of_table).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn incrementals_tell_a_sink_the_same_whatever_the_stream(
        steps in proptest::collection::vec(wild(), 1..160),
        cuts in proptest::collection::vec(any::<bool>(), 30),
        memory in prop_oneof![Just(2_000usize), Just(1 << 20)],
    ) {
        let mut s = Stream { added: 0, wide: false, plain: vec![Plain::default()], lsn: 0, open: false };
        for step in &steps {
            s.step(step);
        }
        let ships: Vec<Ship> = s.plain.iter().map(ship).filter(|s| s.to > 0).collect();
        prop_assume!(!ships.is_empty());
        let incrementals = incrementals(&ships, &cuts, memory);
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap();
        let run = |with: &[(usize, usize, Mem)], full: Option<&[u8]>, cut, target| {
            let mut m = Merge::new(&scratch, memory).unwrap();
            m.on_holes(Holes::Keep);
            m.keep_leaves();
            feed(&mut m, &ships, with, cut, target);
            let touched = m.touched(0, &known_parts()).unwrap();
            match full {
                Some(bytes) => m.full(0, Box::new(std::io::Cursor::new(bytes.to_vec())), None),
                None => add_base(&mut m),
            }
            let mut told = Told::default();
            match m.run(&mut told) {
                Ok(stats) => Ok((told, Touched(touched), stats.opaque, stats.incomplete, stats.truncates)),
                Err(e) => Err(e.to_string()),
            }
        };
        // Values that are missing on one side only: a change of a row that was removed before, which no server sends.
        let impossible = |a: &Result<(Told, Touched, _, u64, u64), String>, b: &Result<(Told, Touched, _, u64, u64), String>| {
            matches!((a, b), (Ok(a), Ok(b)) if a.3 != b.3)
        };
        let ends: Vec<u64> = (1..=s.lsn / 10).map(|n| n * 10).collect();
        for target in ends.iter().copied().rev().step_by(3) {
            let (with, without) = (run(&incrementals, None, 0, target), run(&[], None, 0, target));
            if impossible(&with, &without) {
                continue;
            }
            prop_assert_eq!(with, without, "to {}", target);
            // From what there was at a point, wherever it lies.
            for cut in [target / 20 * 10, target.saturating_sub(10)] {
                let Ok((Told { plain, .. }, ..)) = run(&[], None, 0, cut) else { continue };
                let (with, without) =
                    (run(&incrementals, Some(&plain.bytes), cut, target), run(&[], Some(&plain.bytes), cut, target));
                if impossible(&with, &without) {
                    continue;
                }
                prop_assert_eq!(with, without, "from {} to {}", cut, target);
            }
        }
    }
}

#[test]
fn of_one_key_what_counts_is_kept() {
    let rel = keyed(10, &[0]);
    let mut p = Plain::default();
    for n in 1..=100u64 {
        p.begin(n);
        let mut data = Vec::new();
        put_update(&mut data, 0, None, b"1", format!("1\t0\t{n}\t\\U").as_bytes());
        put_update(&mut data, 0, None, b"2", format!("2\t0\t{n}\tb").as_bytes());
        put_insert(&mut data, 0, b"3", b"3\t0\ta\tb");
        put_delete(&mut data, 0, b"3");
        p.run(&rel, 4, &data, None);
    }
    let (mem, stats) = net(&[ship(&p)], 0, 1 << 20);
    assert_eq!(stats, NetStats { read: 400, rows: 3 });
    assert!(mem.bytes.len() * 4 < p.bytes.len(), "{} of {}", mem.bytes.len(), p.bytes.len());
}

#[test]
fn an_incremental_larger_than_the_memory_is_written_and_read_within_it() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let rel = keyed(10, &[0]);
    let mut p = Plain::default();
    for n in 0..20_000u32 {
        if n.is_multiple_of(100) {
            p.begin(u64::from(n) + 1);
        }
        let (key, mut data) = (n.wrapping_mul(2_654_435_761) % 12_000, Vec::new());
        put_insert(&mut data, 0, key.to_string().as_bytes(), format!("{key}\t0\t{n}\t{}", "b".repeat(80)).as_bytes());
        p.run(&rel, 1, &data, None);
    }
    let big = "x".repeat(30 << 20);
    p.begin(30_000);
    let mut data = Vec::new();
    put_insert(&mut data, 0, b"big", format!("big\t0\t{big}\tb").as_bytes());
    p.run(&rel, 1, &data, Some(256 << 10));
    let memory = 256 << 10;
    let one = [ship(&p)];
    let mut m = Merge::for_net(&scratch, memory).unwrap();
    m.changes(&mut one[0].changeset.as_slice(), &mut UpTo(Lsn::MAX)).unwrap();
    let mut mem = Mem::default();
    let stats = m.net(&tenant(), Lsn(0), &mut mem).unwrap();
    assert!(scratch.bytes_written() > 1 << 20, "it did not outgrow its memory");
    assert!(stats.rows <= 12_001 && stats.read == 20_001, "{stats:?}");
    let read = |bytes: &[u8]| {
        let mut m = Merge::new(&scratch, memory).unwrap();
        m.changes(&mut &*bytes, &mut UpTo(Lsn::MAX)).unwrap();
        let mut out = Collected::default();
        m.run(&mut out).unwrap();
        out.lines(10)
    };
    assert!(read(&mem.bytes) == read(&one[0].changeset));
    assert!(check(&mut mem.bytes.as_slice(), Some(&Tenant::normal("2")), None).is_err(), "another tenant's");
    assert!(check(&mut mem.bytes.as_slice(), None, Some((Lsn(25_000), Lsn::MAX))).is_err(), "not of this span");
}

#[test]
fn a_damaged_incremental_is_an_error_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(dir.path()).unwrap();
    let mut s = Stream { added: 0, wide: false, plain: vec![Plain::default()], lsn: 0, open: false };
    for op in 0..12 {
        for table in [0, 3] {
            s.step(&Wild::Row { table, op, key: op % 5, to: 4, values: [Some(1), None] });
        }
    }
    let (mem, _) = net(&[ship(&s.plain[0])], 0, 1 << 20);
    let run = |bytes: &[u8]| {
        let mut m = Merge::new(&scratch, 1 << 20).unwrap();
        m.on_holes(Holes::Keep);
        m.changes(&mut &*bytes, &mut UpTo(Lsn::MAX)).and_then(|()| m.run(&mut Told::default()))
    };
    run(&mem.bytes).unwrap();
    for n in 1..mem.bytes.len() {
        if let Err(e) = run(&mem.bytes[..n]) {
            assert_eq!(e.kind(), Kind::Verification, "{e}");
        }
    }
    for i in 0..mem.bytes.len() {
        for bit in [0x01, 0x80] {
            let mut b = mem.bytes.clone();
            b[i] ^= bit;
            let _ = run(&b);
            let _ = check(&mut b.as_slice(), Some(&tenant()), None);
        }
    }
}
