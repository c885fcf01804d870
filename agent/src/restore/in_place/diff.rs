//! The difference between a table's rows at the target and its live rows: a join of two sorted streams.
//!
//! Both sides are staged lines in the order of the live key. Where rows are told apart by the whole row, the line is the
//! key and equal lines are counted off one against one, so the same join yields the difference of two multisets.

use crate::error::Result;
use crate::restore::in_place::mapping::Mapping;
use coffer_wire::{ColumnFlags, copy_text};
use std::collections::BTreeSet;

/// What has to be done with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Insert,
    Update,
    Delete,
}

impl Op {
    /// The letter in the staging table.
    pub fn letter(self) -> u8 {
        match self {
            Self::Insert => b'I',
            Self::Update => b'U',
            Self::Delete => b'D',
        }
    }
}

/// Live rows in the order of their key.
pub trait LiveRows {
    /// The next row's key and staged line.
    fn next(&mut self) -> Result<Option<(Vec<u8>, Vec<u8>)>>;
}

/// Where the difference goes.
pub trait Changes {
    /// `line`: the live row for a delete, else the row at the target. `now`: the live row of an update.
    fn change(&mut self, op: Op, line: &[u8], now: Option<&[u8]>) -> Result<()>;
}

/// What a difference is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be applied. `keep_extra`: live rows that are not at the target stay, as those of the class `audit` do.
    Apply { keep_extra: bool },
    /// To be looked at.
    Look,
}

/// What was found in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    pub unchanged: u64,
    /// Live rows that are not at the target and stay, since the table's class forbids deleting them.
    pub kept: u64,
    /// Live rows read.
    pub live: u64,
    /// Places of the staged columns in which updated rows differ.
    pub changed_columns: BTreeSet<usize>,
    pub bytes: u64,
}

impl Counts {
    pub fn is_empty(&self) -> bool {
        self.inserted + self.updated + self.deleted == 0
    }
}

/// The join of one table.
pub struct TableDiff<L> {
    mapping: Mapping,
    purpose: Purpose,
    live: L,
    head: Option<(Vec<u8>, Vec<u8>)>,
    counts: Counts,
    key: Vec<u8>,
}

impl<L: LiveRows> TableDiff<L> {
    pub fn new(mapping: Mapping, purpose: Purpose, live: L) -> Result<Self> {
        let mut d = Self { mapping, purpose, live, head: None, counts: Counts::default(), key: Vec::new() };
        d.advance()?;
        Ok(d)
    }

    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn advance(&mut self) -> Result<()> {
        self.head = self.live.next()?;
        self.counts.live += u64::from(self.head.is_some());
        Ok(())
    }

    /// The next target row, as a staged line; they come in the order of the live key.
    pub fn target(&mut self, line: &[u8], out: &mut dyn Changes) -> Result<()> {
        let mut key = std::mem::take(&mut self.key);
        self.mapping.key_of(line, &mut key)?;
        self.counts.bytes += line.len() as u64;
        while self.head.as_ref().is_some_and(|(k, _)| *k < key) {
            self.extra(out)?;
        }
        match self.head.take_if(|(k, _)| *k == key) {
            None => self.emit(Op::Insert, line, None, out)?,
            Some((_, now)) => {
                if now == line {
                    self.counts.unchanged += 1;
                } else {
                    self.update(&now, line, out)?;
                }
                self.advance()?;
            }
        }
        self.key = key;
        Ok(())
    }

    /// No more target rows. Returns what was found.
    pub fn finish(mut self, out: &mut dyn Changes) -> Result<Counts> {
        while self.head.is_some() {
            self.extra(out)?;
        }
        Ok(self.counts)
    }

    fn update(&mut self, now: &[u8], line: &[u8], out: &mut dyn Changes) -> Result<()> {
        let differ: Vec<usize> = copy_text::fields(now)
            .zip(copy_text::fields(line))
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .map(|(i, _)| i)
            .collect();
        // An identity column that is always generated takes no value in an UPDATE.
        if self.purpose != Purpose::Look
            && differ.iter().any(|i| self.mapping.columns[*i].flags.has(ColumnFlags::IDENTITY_ALWAYS))
        {
            self.emit(Op::Delete, now, None, out)?;
            return self.emit(Op::Insert, line, None, out);
        }
        self.counts.changed_columns.extend(differ);
        self.emit(Op::Update, line, Some(now), out)
    }

    fn extra(&mut self, out: &mut dyn Changes) -> Result<()> {
        let Some((_, line)) = self.head.take() else { return Ok(()) };
        if self.purpose == (Purpose::Apply { keep_extra: true }) {
            self.counts.kept += 1;
        } else {
            self.emit(Op::Delete, &line, None, out)?;
        }
        self.advance()
    }

    fn emit(&mut self, op: Op, line: &[u8], now: Option<&[u8]>, out: &mut dyn Changes) -> Result<()> {
        match op {
            Op::Insert => self.counts.inserted += 1,
            Op::Update => self.counts.updated += 1,
            Op::Delete => self.counts.deleted += 1,
        }
        out.change(op, line, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::rows::tests::column;
    use coffer_wire::{Class, KeyMode, Relation, Strategy};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    struct Rows(std::vec::IntoIter<(Vec<u8>, Vec<u8>)>);

    impl LiveRows for Rows {
        fn next(&mut self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
            Ok(self.0.next())
        }
    }

    struct Log(Vec<(Op, Vec<u8>)>);

    impl Changes for Log {
        fn change(&mut self, op: Op, line: &[u8], _: Option<&[u8]>) -> Result<()> {
            self.0.push((op, line.to_vec()));
            Ok(())
        }
    }

    fn mapping(key: &[u16], id_flags: u8) -> Mapping {
        let r = Relation {
            relid: 1,
            leaf: 1,
            schema: "s".into(),
            name: "t".into(),
            class: Class::Data,
            strategy: Strategy::Identity,
            key_mode: if key.is_empty() { KeyMode::FullRow } else { KeyMode::Key },
            columns: vec![column(1, "id", 0), column(2, "v", id_flags)],
            key: key.to_vec(),
        };
        Mapping::new(&r, &r, false).unwrap()
    }

    fn run(m: Mapping, keep: bool, target: &[String], live: &[String]) -> (Counts, Vec<(Op, Vec<u8>)>) {
        let rows = |lines: &[String]| {
            let mut v: Vec<_> = lines
                .iter()
                .map(|l| {
                    let mut k = Vec::new();
                    m.key_of(l.as_bytes(), &mut k).unwrap();
                    (k, l.clone().into_bytes())
                })
                .collect();
            v.sort();
            v
        };
        let mut log = Log(vec![]);
        let mut d =
            TableDiff::new(m.clone(), Purpose::Apply { keep_extra: keep }, Rows(rows(live).into_iter())).unwrap();
        for (_, line) in rows(target) {
            d.target(&line, &mut log).unwrap();
        }
        (d.finish(&mut log).unwrap(), log.0)
    }

    proptest! {
        #[test]
        fn applying_the_difference_gives_the_target(
            target in proptest::collection::btree_map(0u8..20, 0u8..3, 0..20),
            live in proptest::collection::btree_map(0u8..20, 0u8..3, 0..20),
        ) {
            let lines = |m: &BTreeMap<u8, u8>| m.iter().map(|(k, v)| format!("{k}\t{v}")).collect::<Vec<_>>();
            let (counts, log) = run(mapping(&[0], 0), false, &lines(&target), &lines(&live));
            let mut now: BTreeMap<u8, u8> = live.clone();
            for (op, line) in &log {
                let text = std::str::from_utf8(line).unwrap();
                let (k, v) = text.split_once('\t').unwrap();
                let (k, v) = (k.parse().unwrap(), v.parse().unwrap());
                match op {
                    Op::Insert => prop_assert!(now.insert(k, v).is_none()),
                    Op::Update => prop_assert!(now.insert(k, v).is_some()),
                    Op::Delete => prop_assert!(now.remove(&k).is_some()),
                }
            }
            prop_assert_eq!(&now, &target);
            prop_assert_eq!(counts.live, live.len() as u64);
            prop_assert_eq!(counts.unchanged + counts.updated + counts.inserted, target.len() as u64);
        }

        #[test]
        fn multisets_too(target in proptest::collection::vec(0u8..4, 0..20), live in proptest::collection::vec(0u8..4, 0..20)) {
            let lines = |v: &[u8]| v.iter().map(|k| format!("{k}\tx")).collect::<Vec<_>>();
            let (_, log) = run(mapping(&[], 0), false, &lines(&target), &lines(&live));
            let mut now = lines(&live);
            for (op, line) in &log {
                let text = String::from_utf8(line.clone()).unwrap();
                match op {
                    Op::Insert => now.push(text),
                    Op::Delete => { let at = now.iter().position(|l| *l == text).unwrap(); now.remove(at); }
                    Op::Update => prop_assert!(false, "a multiset has no updates"),
                }
            }
            let mut want = lines(&target);
            want.sort();
            now.sort();
            prop_assert_eq!(now, want);
        }
    }

    #[test]
    fn audit_rows_stay() {
        let (c, log) = run(mapping(&[0], 0), true, &["1\ta".into()], &["1\tb".into(), "2\tc".into()]);
        assert_eq!((c.updated, c.deleted, c.kept), (1, 0, 1));
        assert_eq!(log, [(Op::Update, b"1\ta".to_vec())]);
        assert_eq!(c.changed_columns, BTreeSet::from([1]));
    }

    #[test]
    fn an_identity_that_is_always_generated_is_deleted_and_inserted() {
        let (c, log) = run(mapping(&[0], ColumnFlags::IDENTITY_ALWAYS), false, &["1\t5".into()], &["1\t6".into()]);
        assert_eq!((c.updated, c.deleted, c.inserted), (0, 1, 1));
        assert_eq!(log, [(Op::Delete, b"1\t6".to_vec()), (Op::Insert, b"1\t5".to_vec())]);
    }
}
