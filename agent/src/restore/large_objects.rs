//! Large objects of a restore: those that the tenant's rows at the target refer to, from the readings around it.
//!
//! First the rows say which OIDs they name ([`LargeObjects::of`]), then the archive is gone through once and gives each
//! object that is wanted to whoever takes it, in pieces. The newest reading at or below the target comes first; what it
//! does not have may be in the next one. Content is as of the reading, and the warnings say so.

use crate::clock::rfc3339;
use crate::crypto::SectionReader;
use crate::error::{Context, Error, Kind, Result};
use crate::history::{History, Target};
use crate::large_objects::OidSet;
use crate::large_objects::frames::{self, Begin, ObjectSink};
use crate::merge::{Field, Image, RowSink, TenantAt};
use crate::repository::ObjectRef;
use crate::repository::model::LargeObjectsRead;
use crate::restore::sink::{Filter, Selection, Watch};
use coffer_wire::{Relation, copy_text};
use serde_json::{Value, json};
use std::sync::Arc;

/// OIDs that a message or a document lists.
const LISTED: usize = 100;

/// The large objects that a tenant's rows refer to, and where they are.
pub struct LargeObjects {
    at: TenantAt,
    /// In order of preference.
    readings: Vec<(LargeObjectsRead, Vec<ObjectRef>)>,
    wanted: OidSet,
    target_us: i64,
    watch: Watch,
}

/// Takes objects, one after the other. Blocking.
pub trait Taker {
    /// `relation`: a table whose rows refer to it, quoted as SQL needs it.
    fn begin(&mut self, oid: u32, relation: &str) -> Result<()>;
    fn piece(&mut self, bytes: &[u8]) -> Result<()>;
    fn end(&mut self, bytes: u64) -> Result<()>;
}

/// Takes nothing: for counting.
pub struct Count;

impl Taker for Count {
    fn begin(&mut self, _: u32, _: &str) -> Result<()> {
        Ok(())
    }

    fn piece(&mut self, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn end(&mut self, _: u64) -> Result<()> {
        Ok(())
    }
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pub objects: u64,
    pub bytes: u64,
    /// Live ones that were left as they are, and those of them with other content; in place only.
    pub existing: u64,
    pub differing: Vec<u32>,
    /// By reading, when it was and how many objects are from it.
    pub as_of: Vec<(i64, u64)>,
    /// What no reading has.
    pub missing: OidSet,
    target_us: i64,
}

impl LargeObjects {
    /// `None`: the rows at the target that are wanted refer to none.
    pub async fn of(
        history: &History,
        tenant: uuid::Uuid,
        target: &Target,
        at: &TenantAt,
        selection: &Selection,
        watch: &Watch,
    ) -> Result<Option<Self>> {
        let readings = history.large_objects(tenant, target);
        let columns: Vec<(u32, i16)> =
            readings.iter().flat_map(|(r, _)| &r.columns).map(|c| (c.relid, c.attnum)).collect();
        // From where the rows themselves are read: the same full, bases and changes.
        let inputs = Arc::new(at.inputs.only(&|relid| columns.iter().any(|c| c.0 == relid)));
        if inputs.tables.is_empty() {
            return Ok(None);
        }
        let only = TenantAt { inputs, ..at.clone() };
        // Under whatever key the rows go out.
        let selection = Selection { rename: None, ..selection.clone() };
        let mut sink =
            Named { columns, selection, filter: Filter::default(), place: Vec::new(), oids: OidSet::default() };
        let oids = tokio::task::spawn_blocking(move || only.read(&mut sink).map(|_| sink.oids))
            .await
            .context(Kind::Other, "a worker thread broke off")??;
        if oids.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self { at: at.clone(), readings, wanted: oids, target_us: target.time_us, watch: watch.clone() }))
    }

    /// Those that are there already are not wanted.
    pub fn leave_out(&mut self, there: &OidSet) {
        for oid in there.iter() {
            self.wanted.remove(oid);
        }
    }

    /// Gives every object that is wanted and archived to the taker. Blocking.
    pub fn give(&self, taker: &mut dyn Taker) -> Result<Found> {
        let mut giving = Giving {
            watch: &self.watch,
            taker,
            left: self.wanted.clone(),
            current: None,
            columns: &[],
            objects: 0,
            bytes: 0,
        };
        let mut found = Found { target_us: self.target_us, ..Found::default() };
        for (read, objects) in &self.readings {
            let before = giving.objects;
            giving.columns = &read.columns;
            for o in objects {
                self.sections(o, &mut giving).map_err(|e| e.during(format_args!("object {}", o.path)))?;
            }
            if giving.objects > before {
                found.as_of.push((read.time_us, giving.objects - before));
            }
            if let Some(oid) = giving.current {
                return Err(Error::new(Kind::Verification, format!("large object {oid} is not archived to its end"))
                    .code("malformed"));
            }
        }
        (found.objects, found.bytes, found.missing) = (giving.objects, giving.bytes, giving.left);
        Ok(found)
    }

    /// Reads those sections of an object that can hold something that is wanted.
    fn sections(&self, object: &ObjectRef, giving: &mut Giving<'_>) -> Result<()> {
        let at = &self.at;
        let ranges = at.repo.ranges(at.rt.clone(), object, at.from.as_deref())?;
        let mut reader = SectionReader::new(ranges, &**at.repo.keyring(), &object.expect())?;
        let first = |label: &str| {
            label
                .parse::<u32>()
                .map_err(|_| Error::new(Kind::Verification, "a section is not named by an OID").code("malformed"))
        };
        let firsts = reader.sections().iter().map(|s| first(&s.label)).collect::<Result<Vec<u32>>>()?;
        for (n, first) in firsts.iter().enumerate() {
            let next = firsts.get(n + 1).copied().unwrap_or(u32::MAX);
            let wanted = giving.left.from(*first).next().is_some_and(|o| o < next || n + 1 == firsts.len());
            if wanted || giving.current.is_some() {
                frames::read(&mut reader.open(n)?, giving)?;
            }
        }
        Ok(())
    }
}

/// Between the archive and the taker: what is wanted still.
struct Giving<'a> {
    watch: &'a Watch,
    taker: &'a mut dyn Taker,
    left: OidSet,
    /// The object whose end has not come.
    current: Option<u32>,
    columns: &'a [crate::repository::model::LargeObjectColumn],
    objects: u64,
    bytes: u64,
}

impl ObjectSink for Giving<'_> {
    fn begin(&mut self, b: Begin) -> Result<bool> {
        if b.at > 0 {
            return Ok(self.current == Some(b.oid));
        }
        let wanted = self.left.contains(b.oid);
        if wanted {
            let relation = self.columns.get(usize::from(b.column)).map_or("", |c| &c.relation);
            self.taker.begin(b.oid, relation)?;
            self.current = Some(b.oid);
        }
        Ok(wanted)
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<()> {
        self.watch.check()?;
        self.taker.piece(bytes)
    }

    fn end(&mut self, bytes: u64) -> Result<()> {
        if let Some(oid) = self.current.take() {
            self.left.remove(oid);
            self.objects += 1;
            self.bytes += bytes;
        }
        self.taker.end(bytes)
    }
}

/// Notes the OIDs that rows name.
struct Named {
    columns: Vec<(u32, i16)>,
    selection: Selection,
    /// Of the table at hand.
    filter: Filter,
    /// Fields of the table at hand.
    place: Vec<usize>,
    oids: OidSet,
}

impl RowSink for Named {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        let classes = &self.selection.classes;
        let taken = classes.is_empty() || classes.contains(&rel.class);
        self.filter = if taken { self.selection.of_table(rel)? } else { Filter::default() };
        let named = |attnum: i16| taken && self.columns.contains(&(rel.relid, attnum));
        self.place = rel.image_columns().enumerate().filter(|(_, c)| named(c.attnum)).map(|(i, _)| i).collect();
        Ok(())
    }

    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        let (place, oids) = (&self.place, &mut self.oids);
        self.filter
            .row(key, image, &mut |_, image| {
                note_fields(image, place, oids);
                Ok(())
            })
            .map(drop)
    }

    fn end_table(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Notes the OIDs in these fields.
fn note_fields(image: &Image<'_>, place: &[usize], oids: &mut OidSet) {
    let mut note = |field: &[u8]| {
        if let Some(oid) = std::str::from_utf8(field).ok().and_then(|t| t.parse().ok()).filter(|o| *o != 0) {
            oids.insert(oid);
        }
    };
    match image.as_line() {
        Some(line) => {
            let fields = copy_text::fields(line).enumerate();
            fields.filter(|(i, _)| place.contains(i)).for_each(|(_, f)| note(f));
        }
        None => {
            let fields = image.fields();
            for f in place.iter().filter_map(|i| fields.get(*i)) {
                if let Field::Bytes(b) = f {
                    note(b);
                }
            }
        }
    }
}

impl Found {
    /// For the document. `created`: those that were, or would be, made.
    pub fn document(&self) -> Value {
        let missing: Vec<u32> = self.missing.iter().take(LISTED).collect();
        let as_of: Vec<_> = self.as_of.iter().map(|(t, n)| json!({"time": rfc3339(*t), "objects": n})).collect();
        json!({"created": self.objects - self.existing, "existing": self.existing, "differing": self.differing,
            "missing": missing, "missing_count": self.missing.len(), "bytes": self.bytes, "as_of": as_of})
    }

    /// Adds what concerns another tenant of the same restore (reference data).
    pub fn add(&mut self, other: Self) {
        self.objects += other.objects;
        self.bytes += other.bytes;
        self.existing += other.existing;
        self.differing.extend(other.differing);
        for oid in other.missing.iter() {
            self.missing.insert(oid);
        }
        for (t, n) in other.as_of {
            match self.as_of.iter_mut().find(|a| a.0 == t) {
                Some(a) => a.1 += n,
                None => self.as_of.push((t, n)),
            }
        }
        self.target_us = other.target_us;
    }

    /// What whoever restores has to know.
    pub fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        for (t, n) in &self.as_of {
            let after = if *t > self.target_us { ", which is after the target" } else { "" };
            out.push(format!("{n} large objects are as they were at {}{after}", rfc3339(*t)));
        }
        if !self.differing.is_empty() {
            let list = listed(self.differing.iter().copied(), self.differing.len() as u64);
            out.push(format!(
                "large objects that exist and differ from the archived ones were left as they are: {list}"
            ));
        }
        if !self.missing.is_empty() {
            let list = listed(self.missing.iter(), self.missing.len());
            out.push(format!("rows refer to large objects that are not kept: {list}"));
        }
        out
    }
}

fn listed(oids: impl Iterator<Item = u32>, count: u64) -> String {
    let mut list = oids.take(LISTED).map(|o| o.to_string()).collect::<Vec<_>>().join(", ");
    if count > LISTED as u64 {
        list.push_str(&format!(" and {} more", count - LISTED as u64));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_says_of_when_its_large_objects_are() {
        let mut found = Found { objects: 3, existing: 1, differing: vec![7], target_us: 5_000_000, ..Found::default() };
        found.as_of = vec![(4_000_000, 2), (6_000_000, 1)];
        for oid in 0..102 {
            found.missing.insert(oid);
        }
        let w = found.warnings();
        assert_eq!(w[0], "2 large objects are as they were at 1970-01-01T00:00:04.000000Z");
        assert!(w[1].ends_with(", which is after the target") && w[2].ends_with(": 7"), "{w:?}");
        assert!(w[3].ends_with("98, 99 and 2 more"), "{w:?}");
        let d = found.document();
        assert_eq!((d["created"].as_u64(), d["missing_count"].as_u64()), (Some(2), Some(102)));
        found.add(Found { objects: 1, as_of: vec![(4_000_000, 1)], ..Found::default() });
        assert_eq!((found.objects, found.as_of[0]), (4, (4_000_000, 3)));
    }
}
