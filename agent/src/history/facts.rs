//! Reads what the common objects say besides the transaction index: restore points, registrations, rewrites, drops; and
//! which tables have changes that capture could not attribute.

use super::line::{Facts, Registered, Registration, Restored, ShipAt};
use crate::error::{Context, Error, Kind, Result};
use crate::keyring::Keyring;
use crate::repository::model::{SequenceState, Ship, TxnIndex};
use crate::repository::{ObjectRef, Repository};
use crate::tenant::Tenant;
use coffer_wire::{Begin, Frame, FrameReader, Lsn, Relation, TenantKind};
use futures::{StreamExt, stream};
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};
use uuid::Uuid;

/// Objects read at a time.
const PARALLEL: usize = 32;

#[derive(Deserialize)]
struct RegistryMarker {
    relid: u32,
    action: String,
    /// Absent in marks of versions that did not say.
    rebase: Option<bool>,
    /// The key of the tenant that all of its rows belong to.
    tenant: Option<String>,
    /// It was empty.
    #[serde(default)]
    fresh: bool,
    name: Option<String>,
}

#[derive(Deserialize)]
struct RewriteMarker {
    relid: u32,
}

#[derive(Deserialize)]
struct DropMarker {
    relids: Vec<u32>,
}

#[derive(Deserialize)]
struct RestoreMarker {
    id: Uuid,
    tenant: Uuid,
    relids: Vec<u32>,
    rows: bool,
}

/// What one object said, in its order.
#[derive(Default)]
struct Found {
    points: Vec<(String, Lsn, i64)>,
    restores: Vec<Restored>,
    registry: Vec<Registered>,
    rewrites: Vec<(u32, Lsn)>,
    drops: Vec<(u32, Lsn)>,
    ddl: Vec<Lsn>,
    definitions: Vec<Lsn>,
    unresolved: Vec<(u32, Lsn)>,
}

/// Reads the facts of these ships.
pub(super) async fn read(repo: &Repository, keyring: &Keyring, ships: &[ShipAt], from: Option<&str>) -> Result<Facts> {
    // The first rows that could not be attributed, and with them their key, may have come since the keyring was read.
    let unknown = |s: &ShipAt| keyring.by_uid(unresolved_uid(keyring, s)).is_none();
    if ships.iter().find(|s| unresolved_objects(keyring, s).next().is_some()).is_some_and(unknown) {
        keyring.refresh().await?;
    }
    // By their places: a closure over references would make a future that cannot be sent to another thread.
    let found: Vec<(&ShipAt, Result<Found>)> = stream::iter(0..ships.len())
        .map(|i| async move { (&ships[i], one(repo, keyring, &ships[i], from).await) })
        .buffered(PARALLEL)
        .collect()
        .await;
    let mut facts = Facts::default();
    for (ship, found) in found {
        let f = found?;
        facts.restore_points.extend(f.points.into_iter().filter(|p| p.1 <= ship.limit));
        facts.restores.extend(f.restores.into_iter().filter(|r| r.at <= ship.limit));
        facts.registry.extend(f.registry.into_iter().filter(|r| r.at <= ship.limit));
        facts.rewrites.extend(f.rewrites.into_iter().filter(|r| r.1 <= ship.limit));
        facts.ddl.extend(f.ddl.into_iter().filter(|at| *at <= ship.limit));
        facts.definitions.extend(f.definitions.into_iter().filter(|at| *at <= ship.limit));
        facts.drops.extend(f.drops.into_iter().filter(|r| r.1 <= ship.limit));
        facts.unresolved.extend(f.unresolved.into_iter().filter(|r| r.1 <= ship.limit));
    }
    Ok(facts)
}

async fn one(repo: &Repository, keyring: &Keyring, ship: &ShipAt, from: Option<&str>) -> Result<Found> {
    let mut found = Found::default();
    let s = ship.ship();
    if let Some(common) = &s.common
        && s.eventful != Some(false)
    {
        let plain = repo.open_small(common, from).await?;
        let during = |e: Error| e.during(format_args!("object {}", common.path));
        let rest = TxnIndex::decode(&plain).map_err(during)?.map_or(0, |(_, n)| n);
        let owner = |key: &str| keyring.tenant_uid(ship.record.source, &Tenant::normal(key));
        markers(&plain[rest..], &owner, &mut found).map_err(during)?;
    }
    for object in unresolved_objects(keyring, ship) {
        let plain = repo.open_small(object, from).await?;
        unresolved(&plain, &mut found).map_err(|e| e.during(format_args!("object {}", object.path)))?;
    }
    Ok(found)
}

fn unresolved_uid(keyring: &Keyring, ship: &ShipAt) -> Uuid {
    keyring.tenant_uid(ship.record.source, &Tenant::reserved(TenantKind::Unresolved))
}

fn unresolved_objects<'a>(keyring: &'a Keyring, ship: &'a ShipAt) -> impl Iterator<Item = &'a ObjectRef> {
    let uid = unresolved_uid(keyring, ship);
    ship.ship().objects.iter().filter(move |o| o.tenant == uid)
}

/// What restore points of a ship say of sequences, in order.
pub(super) async fn sequences(
    repo: &Repository,
    ship: &Ship,
    from: Option<&str>,
) -> Result<Vec<(Lsn, Vec<SequenceState>)>> {
    let Some(common) = ship.common.as_ref().filter(|_| ship.eventful != Some(false)) else { return Ok(Vec::new()) };
    let plain = repo.open_small(common, from).await?;
    let during = |e: Error| e.during(format_args!("object {}", common.path));
    let rest = TxnIndex::decode(&plain).map_err(during)?.map_or(0, |(_, n)| n);
    sequence_markers(&plain[rest..]).map_err(during)
}

fn sequence_markers(plain: &[u8]) -> Result<Vec<(Lsn, Vec<SequenceState>)>> {
    let (mut at, mut out) = (None, Vec::new());
    for frame in FrameReader::new(plain) {
        match frame? {
            Frame::Begin(b) => at = Some(b.end_lsn),
            Frame::Marker(m) if m.kind == "sequences" => {
                let read: Vec<(String, i64, bool)> = json(m.kind, m.payload)?;
                let state = |(name, last_value, is_called)| SequenceState { name, last_value, is_called };
                let at = at.ok_or_else(|| {
                    Error::new(Kind::Verification, "a marker stands before its transaction").code("malformed")
                })?;
                out.push((at, read.into_iter().map(state).collect()));
            }
            _ => {}
        }
    }
    Ok(out)
}

/// The transaction index of a ship.
pub(super) async fn index(repo: &Repository, common: &ObjectRef, from: Option<&str>) -> Result<TxnIndex> {
    let plain = repo.open_small(common, from).await?;
    let during = |e: Error| e.during(format_args!("object {}", common.path));
    let decoded = TxnIndex::decode(&plain).map_err(during)?;
    Ok(decoded.map(|(i, _)| i).unwrap_or_default())
}

fn json<'a, T: Deserialize<'a>>(kind: &str, payload: &'a [u8]) -> Result<T> {
    serde_json::from_slice(payload)
        .context(Kind::Verification, format_args!("a marker of kind {kind} is not readable"))
        .map_err(|e| e.code("malformed"))
}

fn markers(plain: &[u8], owner: &dyn Fn(&str) -> Uuid, out: &mut Found) -> Result<()> {
    let mut txn: Option<Begin> = None;
    let mut relations: HashMap<u64, u32> = HashMap::new();
    // Of the transaction at hand: rewrites wait for a TRUNCATE behind them, which says that the rows come anew.
    let mut rewrites: Vec<u32> = Vec::new();
    for frame in FrameReader::new(plain) {
        match frame? {
            Frame::Begin(b) => {
                flush(&mut rewrites, txn, out);
                txn = Some(b);
            }
            Frame::Relation(id, encoded) => {
                relations.insert(id, Relation::decode(encoded)?.relid);
            }
            Frame::Truncate(t) => {
                let gone: BTreeSet<u32> = t.relation_ids().filter_map(|id| relations.get(&id).copied()).collect();
                rewrites.retain(|r| !gone.contains(r));
            }
            Frame::Marker(m) => {
                let b = txn.ok_or_else(|| {
                    Error::new(Kind::Verification, "a marker stands before its transaction").code("malformed")
                })?;
                let at = b.end_lsn;
                match m.kind {
                    "restore_point" => {
                        let name = String::from_utf8_lossy(m.payload).into_owned();
                        out.points.push((name, at, b.commit_time_us));
                    }
                    "registry" => {
                        let r: RegistryMarker = json(m.kind, m.payload)?;
                        let what = match r.action.as_str() {
                            "add" => Registration::Add {
                                rebase: r.rebase.unwrap_or(true),
                                fresh: r.fresh && r.name.is_some(),
                            },
                            _ => Registration::Remove,
                        };
                        let owner = r.tenant.map(|t| owner(&t));
                        out.registry.push(Registered { relid: r.relid, at, xid: b.xid, what, owner, name: r.name });
                    }
                    "restore" => {
                        let RestoreMarker { id, tenant, relids, rows } = json(m.kind, m.payload)?;
                        out.restores.push(Restored { id, tenant, relids, rows, at });
                    }
                    "rewrite" => rewrites.push(json::<RewriteMarker>(m.kind, m.payload)?.relid),
                    "drop" => {
                        out.ddl.push(at);
                        out.drops.extend(json::<DropMarker>(m.kind, m.payload)?.relids.into_iter().map(|r| (r, at)));
                    }
                    "ddl" => out.ddl.push(at),
                    "definitions" => out.definitions.push(at),
                    _ => {}
                }
            }
            _ => {}
        }
    }
    flush(&mut rewrites, txn, out);
    Ok(())
}

fn flush(rewrites: &mut Vec<u32>, txn: Option<Begin>, out: &mut Found) {
    if let Some(b) = txn {
        out.rewrites.extend(rewrites.drain(..).map(|r| (r, b.end_lsn)));
    }
}

fn unresolved(plain: &[u8], out: &mut Found) -> Result<()> {
    let mut txn: Option<Begin> = None;
    let mut relations: HashMap<u64, u32> = HashMap::new();
    for frame in FrameReader::new(plain) {
        let header = match frame? {
            Frame::Begin(b) => {
                txn = Some(b);
                continue;
            }
            Frame::Relation(id, encoded) => {
                relations.insert(id, Relation::decode(encoded)?.relid);
                continue;
            }
            Frame::Run(r) => r.header,
            Frame::RunOpen(h) => h,
            _ => continue,
        };
        let Some(b) = txn else { continue };
        for id in header.relation_ids() {
            if let Some(relid) = relations.get(&id)
                && out.unresolved.last() != Some(&(*relid, b.end_lsn))
            {
                out.unresolved.push((*relid, b.end_lsn));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tests::column;
    use coffer_wire::{Class, KeyMode, Marker, Strategy, Truncate, put_begin, put_marker, put_relation, put_truncate};

    #[test]
    fn markers_are_found_with_their_transaction_and_a_rewrite_with_its_rows_closes_nothing() {
        let rel = Relation {
            relid: 7,
            leaf: 7,
            schema: "s".into(),
            name: "t".into(),
            class: Class::Data,
            strategy: Strategy::Identity,
            key_mode: KeyMode::Key,
            columns: vec![column(1, "id")],
            key: vec![0],
        };
        let (encoded, mut b) = (rel.encode(), Vec::new());
        let id = Relation::id_of(&encoded);
        put_relation(&mut b, id, &encoded);
        let begin = |b: &mut Vec<u8>, n: u64| {
            put_begin(b, &Begin { xid: n, commit_lsn: Lsn(n), end_lsn: Lsn(n), commit_time_us: 5 });
        };
        let mark =
            |b: &mut Vec<u8>, kind, payload: &str| put_marker(b, &Marker { seq: 0, kind, payload: payload.as_bytes() });
        begin(&mut b, 10);
        mark(&mut b, "restore_point", "before");
        mark(&mut b, "registry", r#"{"relid":7,"action":"add","rebase":false}"#);
        mark(
            &mut b,
            "restore",
            r#"{"id":"00000000-0000-0000-0000-000000000001","tenant":"00000000-0000-0000-0000-000000000002","relids":[7],"rows":false}"#,
        );
        mark(&mut b, "rewrite", r#"{"relid":7}"#);
        put_truncate(
            &mut b,
            &Truncate { seq: 1, restart_sequences: false, tenant: None, relations: &id.to_le_bytes() },
        );
        begin(&mut b, 20);
        mark(&mut b, "rewrite", r#"{"relid":7}"#);
        mark(&mut b, "drop", r#"{"relids":[8,9]}"#);
        mark(&mut b, "registry", r#"{"relid":7,"action":"exclude"}"#);
        let mut f = Found::default();
        markers(&b, &|_| Uuid::nil(), &mut f).unwrap();
        assert_eq!(f.points, [("before".to_owned(), Lsn(10), 5)]);
        let restored =
            Restored { id: Uuid::from_u128(1), tenant: Uuid::from_u128(2), relids: vec![7], rows: false, at: Lsn(10) };
        assert_eq!(f.restores, [restored]);
        assert_eq!(f.rewrites, [(7, Lsn(20))]);
        assert_eq!(f.drops, [(8, Lsn(20)), (9, Lsn(20))]);
        assert_eq!(
            f.registry.iter().map(|r| (r.xid, r.what)).collect::<Vec<_>>(),
            [(10, Registration::Add { rebase: false, fresh: false }), (20, Registration::Remove)]
        );
    }
}
