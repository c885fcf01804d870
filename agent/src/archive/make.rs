//! Makes a full complete by itself: what it needs beside its rows is written, or copied, into the tenant's own folder.

use super::document::{
    ARCHIVE_VERSION, Configuration, Document, Named, Object, Point, Reading, WHAT, Whose, how_to_restore, tables,
};
use crate::catalog::{FullEntry, FullTable, manifest};
use crate::clock::rfc3339;
use crate::compact::{self, Compactor};
use crate::crypto::{Codec, Header, KeySource, ObjectKind, random};
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::history::{History, Target};
use crate::keyring::TenantEntry;
use crate::merge::{Holes, TenantAt, from_io};
use crate::opened::Reserved;
use crate::repository::{ObjectRef, paths};
use coffer_wire::{Lsn, Relation};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

impl Compactor {
    /// Gives a full whose rows are all its own what else it needs to be restored without anything else, and the document
    /// that names it. The caller records it.
    ///
    /// # Errors
    /// As of stores; nothing names what was written then.
    pub(crate) async fn complete(
        &self,
        history: &History,
        tenant: &TenantEntry,
        point: &Target,
        mut full: FullEntry,
    ) -> Result<FullEntry> {
        for o in [&mut full.schema, &mut full.roles].into_iter().flatten() {
            *o = self.copy(tenant, point.lsn, o).await?;
        }
        let reference = self.reference(history, tenant, point, &full).await?;
        let large_objects = self.large_objects(history, tenant, point).await?;
        let mut objects = named(&full);
        if let Some(r) = &reference {
            objects.extend(r.objects.iter().map(|o| (o.clone(), "reference rows")));
            objects.extend(r.manifest.iter().map(|o| (o.clone(), "manifest")));
        }
        objects.extend(large_objects.iter().flat_map(|r| &r.objects).map(|o| (o.clone(), "large objects")));
        full.bytes = objects.iter().map(|(o, _)| o.bytes).sum();
        let own: Vec<&ObjectRef> = full.needs().collect();
        // Beyond what the entry names anyway.
        let beside = objects.iter().filter(|(o, _)| own.iter().all(|n| n.path != o.path)).map(|(o, _)| o.clone());
        let beside: Vec<ObjectRef> = beside.collect();
        let document = self.document(history, tenant, (&full, reference), large_objects, &objects).await?;
        let document = self.write(tenant, &full, document).await?;
        full.bytes += document.bytes;
        full.archive = std::iter::once(document).chain(beside).collect();
        failpoints::hit(failpoints::ARCHIVE_AFTER_OBJECTS)?;
        Ok(full)
    }

    /// The shared tables at the same point, in objects of this archive's own.
    async fn reference(
        &self,
        history: &History,
        tenant: &TenantEntry,
        point: &Target,
        full: &FullEntry,
    ) -> Result<Option<FullEntry>> {
        let shared = Reserved::Shared.tenant();
        let Some(entry) = self.keyring.find(self.source, &shared).filter(|e| e.uid != tenant.uid) else {
            return Ok(None);
        };
        let known = history.known(point);
        let inputs = history.inputs(entry.uid, point.lsn, known.clone()).await?;
        let at = TenantAt {
            repo: self.repo.clone(),
            rt: self.rt.clone(),
            tenant: shared,
            inputs: Arc::new(inputs),
            from: history.from_store().map(str::to_owned),
            scratch: self.scratch.clone(),
            memory: self.memory,
            holes: Holes::Keep,
            seen: None,
        };
        let written = self.write_rows(&entry, at, full, tenant.uid).await?;
        if written.manifest.is_none() {
            return Ok(None);
        }
        let mut tables = compact::tables(history, known, &written.rows);
        // Which tables are shared is known from the rows alone.
        tables.retain(|t| t.rows > 0);
        Ok(Some(FullEntry {
            id: random::uuid(),
            rows: tables.iter().map(|t| t.rows).sum(),
            tables,
            manifest: written.manifest,
            objects: written.objects,
            schema: None,
            roles: None,
            sequences: Vec::new(),
            database: None,
            archive: Vec::new(),
            bytes: written.bytes,
            ..full.clone()
        }))
    }

    /// The large objects of the tenant and of the shared tables, from the readings around the point.
    async fn large_objects(&self, history: &History, tenant: &TenantEntry, point: &Target) -> Result<Vec<Reading>> {
        let shared = self.keyring.tenant_uid(self.source, &Reserved::Shared.tenant());
        let mut readings = Vec::new();
        let both = history.large_objects(tenant.uid, point).into_iter().zip(history.large_objects(shared, point));
        for ((read, own), (_, shared)) in both {
            let mut all: BTreeMap<String, ObjectRef> = BTreeMap::new();
            for o in own.into_iter().chain(shared) {
                all.insert(o.path.clone(), o);
            }
            let mut objects = Vec::new();
            for o in all.values() {
                objects.push(self.copy(tenant, point.lsn, o).await?);
            }
            readings.push(Reading { read, objects });
        }
        Ok(readings)
    }

    /// The same sealed bytes in the tenant's folder, in every required store; under a name of its own, so that what becomes
    /// of another archive is nothing to this one.
    async fn copy(&self, tenant: &TenantEntry, point: Lsn, o: &ObjectRef) -> Result<ObjectRef> {
        let copy = ObjectRef { path: paths::archive(self.source, tenant.uid, point, random::uuid()), ..o.clone() };
        let (repo, rt, object, to) = (self.repo.clone(), self.rt.clone(), o.clone(), copy.clone());
        let copied = tokio::task::spawn_blocking(move || {
            let mut writer = repo.writer(rt.clone(), &to.path);
            std::io::copy(&mut repo.reader(&rt, &object, None)?, &mut writer).map_err(from_io)?;
            writer.finish()?;
            // As it is to be in each of them: the reader compares length and hash.
            for store in repo.required_stores() {
                let mut back = repo.reader(&rt, &to, Some(store.name()))?;
                std::io::copy(&mut back, &mut std::io::sink()).map_err(from_io)?;
            }
            Ok::<_, Error>(())
        });
        copied.await.context(Kind::Other, "a worker thread broke off")??;
        Ok(copy)
    }

    async fn document(
        &self,
        history: &History,
        tenant: &TenantEntry,
        (full, reference): (&FullEntry, Option<FullEntry>),
        large_objects: Vec<Reading>,
        objects: &[(ObjectRef, &str)],
    ) -> Result<Document> {
        let sources = self.keyring.sources();
        let source = sources.into_iter().find(|(_, uid)| *uid == self.source).map(|(n, _)| n).unwrap_or_default();
        let from = history.from_store();
        let is_config = |t: &&FullTable| t.class.as_deref() == Some("config");
        let configuration = Configuration {
            tables: full.tables.iter().filter(is_config).map(|t| t.name.clone()).collect(),
            database_settings: full.database.iter().flat_map(|d| d.settings.clone()).collect(),
            sequences: full.sequences.len(),
        };
        let reference_tables = match &reference {
            Some(r) => tables(r, &self.relations(r, from).await?),
            None => Vec::new(),
        };
        Ok(Document {
            v: ARCHIVE_VERSION,
            what: WHAT.to_owned(),
            how_to_restore: how_to_restore(full.id, &source, &tenant.tenant),
            id: full.id,
            source: Named { name: source, uid: self.source },
            tenant: Whose {
                key: tenant.tenant.key.clone(),
                kind: tenant.tenant.kind.name().to_owned(),
                uid: tenant.uid,
            },
            point: Point::of(full),
            made_at: rfc3339(self.clock.now_us()),
            tables: tables(full, &self.relations(full, from).await?),
            reference_tables,
            configuration,
            objects: objects.iter().map(|(o, holds)| Object::of(o, holds)).collect(),
            full: full.clone(),
            reference,
            large_objects,
        })
    }

    /// The newest descriptor of each table that a full has rows of.
    async fn relations(&self, full: &FullEntry, from: Option<&str>) -> Result<BTreeMap<u32, Relation>> {
        let mut out = BTreeMap::new();
        let Some(m) = &full.manifest else { return Ok(out) };
        for p in manifest::read(&self.repo, m, &full.objects, from).await? {
            for encoded in &p.relations {
                out.insert(p.relid, Relation::decode(encoded).map_err(Error::from)?);
            }
        }
        Ok(out)
    }

    /// Seals the document under the tenant's key, by the name that the archive's id makes, and reads it back.
    async fn write(&self, tenant: &TenantEntry, full: &FullEntry, document: Document) -> Result<ObjectRef> {
        let header = Header {
            kind: ObjectKind::Manifest,
            codec: Codec::Zstd,
            tenant: tenant.uid,
            object: full.id,
            source: self.source,
            system_identifier: full.system_identifier,
            timeline: full.timeline,
            lsn_start: Lsn::ZERO,
            lsn_end: full.point_lsn,
            key_version: tenant.version,
        };
        let path = paths::archive(self.source, tenant.uid, full.point_lsn, full.id);
        let text = serde_json::to_vec_pretty(&document).context(Kind::Other, "cannot encode an archive's document")?;
        let key = self.keyring.key(tenant.key_id())?;
        let (repo, rt, rows) = (self.repo.clone(), self.rt.clone(), full.rows);
        let sealed = tokio::task::spawn_blocking(move || {
            repo.seal_to(rt, path, &header, &key, |s| {
                s.write_all(&text).context(Kind::Other, "cannot seal an archive's document")?;
                Ok(rows)
            })
        });
        let object = sealed.await.context(Kind::Other, "a worker thread broke off")??;
        for store in self.repo.required_stores() {
            self.repo.open_small(&object, Some(store.name())).await?;
        }
        Ok(object)
    }
}

/// The objects of a full, and what each holds.
fn named(full: &FullEntry) -> Vec<(ObjectRef, &'static str)> {
    let rows = full.objects.iter().map(|o| (o.clone(), "rows"));
    let rest = [(&full.manifest, "manifest"), (&full.schema, "definitions"), (&full.roles, "roles")];
    rows.chain(rest.into_iter().filter_map(|(o, holds)| Some((o.clone()?, holds)))).collect()
}
