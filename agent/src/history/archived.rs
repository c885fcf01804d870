//! An archive as a history of its own: one base that covers its tables, and the full that it is.
//!
//! Whoever restores asks a [`History`]; this one answers from the archive's document alone, so that every mode works
//! with an archive as it does with the log.

use super::{Facts, History, Line};
use crate::archive::Document;
use crate::catalog::{FullEntry, State};
use crate::keyring::Keyring;
use crate::repository::model::{Base, BaseTable};
use crate::repository::{Body, LogRecord, Repository};
use coffer_wire::Lsn;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

impl History {
    /// The history of an archive. `shared`: the uid of the tenant that its reference data belongs to.
    pub fn of_archive(
        repo: &Arc<Repository>,
        keyring: &Arc<Keyring>,
        document: &Document,
        shared: Uuid,
        from: Option<&str>,
    ) -> Self {
        let (full, source) = (&document.full, document.source.uid);
        let records = records(document, source);
        let line = Line::new(&records);
        let of = |f: &FullEntry| State { fulls: vec![f.clone()], ..State::default() };
        let mut catalogs = BTreeMap::from([(document.tenant.uid, of(full))]);
        if let Some(r) = &document.reference {
            catalogs.insert(shared, of(r));
        }
        Self {
            repo: repo.clone(),
            keyring: keyring.clone(),
            source,
            from: from.map(str::to_owned),
            records,
            line,
            facts: Facts::default(),
            catalogs,
            begins: 0,
            is_archive: true,
            commons: None,
            shared: None,
        }
    }
}

/// What a log would say that had come to the archive's point.
fn records(document: &Document, source: Uuid) -> Vec<Arc<LogRecord>> {
    let full = &document.full;
    // The tables are covered from just before the point, where the full stands for them.
    let cut = Lsn(full.point_lsn.0.saturating_sub(1));
    let record = |upto_lsn: Lsn, body: Body| {
        Arc::new(LogRecord {
            v: 1,
            n: full.log_n,
            prev: None,
            source,
            writer: Uuid::nil(),
            at_us: full.point_time_us,
            system_identifier: full.system_identifier,
            timeline: full.timeline,
            slot: String::new(),
            from_lsn: cut,
            upto_lsn,
            upto_time_us: full.point_time_us,
            body,
        })
    };
    let mut tables: Vec<BaseTable> = Vec::new();
    let mut classes = BTreeMap::new();
    for t in full.tables.iter().chain(document.reference.iter().flat_map(|r| &r.tables)) {
        if tables.iter().any(|x| x.relid == t.relid) {
            continue;
        }
        classes.extend(t.class.clone().map(|c| (t.relid.to_string(), c)));
        let (relid, name) = (t.relid, t.name.clone());
        tables.push(BaseTable { relid, name, cut_lsn: cut, registered_xid: 0, rows: t.rows, owner: None });
    }
    let base = Base {
        job: full.id,
        tables,
        cut_lsn: cut,
        schema: full.schema.clone(),
        sequences: full.sequences.clone(),
        roles: full.roles.iter().cloned().collect(),
        classes,
        database: full.database.clone(),
        ..Base::default()
    };
    let readings = document.large_objects.iter().map(|r| Base {
        job: full.id,
        cut_lsn: cut,
        large_objects: r.objects.clone(),
        large_objects_read: Some(Box::new(r.read.clone())),
        ..Base::default()
    });
    let bases = std::iter::once(base).chain(readings).map(|b| record(cut, Body::Base(b)));
    let begin = std::iter::once(record(cut, Body::Init));
    begin.chain(bases).chain([record(full.point_lsn, Body::Idle)]).collect()
}
