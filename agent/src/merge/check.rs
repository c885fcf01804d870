//! Reads an object's plaintext for what it says of itself: frames that parse, rows that count, one tenant only.

use super::intake::{Frames, Header, RunBody, RunState, STREAM_ABOVE, TXN_INDEX_FRAME, values};
use super::net::{self, NET_FRAME, STAND_FRAME};
use crate::error::{Error, Kind, Result};
use crate::repository::model::TxnIndex;
use crate::tenant::Tenant;
use coffer_wire::{Frame, FrameReader, Lsn, Relation, RowReader, TenantKind, kind};
use std::collections::HashSet;
use std::io::Read;

/// What an object says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    pub rows: u64,
    pub transactions: u64,
}

fn bad(what: impl Into<String>) -> Error {
    Error::new(Kind::Verification, what).code("malformed")
}

fn described(known: &HashSet<u64>, mut ids: impl Iterator<Item = u64>) -> Result<()> {
    match ids.find(|id| !known.contains(id)) {
        None => Ok(()),
        Some(id) => Err(bad(format!("descriptor {id:016x} is named and was not given before"))),
    }
}

/// Reads to the end. `tenant`: whose rows alone it may hold. `within`: transactions are after the first and up to the
/// second.
pub fn check(input: &mut dyn Read, tenant: Option<&Tenant>, within: Option<(Lsn, Lsn)>) -> Result<Checked> {
    let mut frames = Frames { input, buf: Vec::new() };
    let mut known: HashSet<u64> = HashSet::new();
    let mut done = Checked::default();
    let mut before = Lsn::ZERO;
    let owner = |k: TenantKind, key: &str| match tenant {
        Some(t) if t.kind != k || t.key != key => Err(bad("it holds rows of another tenant")),
        _ => Ok(()),
    };
    while let Some((k, len)) = frames.head()? {
        if k == kind::RUN && len > STREAM_ABOVE {
            let h = frames.run_header(len)?;
            owner(h.tenant_kind, &h.tenant_key)?;
            described(&known, h.relations.iter().copied())?;
            done.rows += stream(&mut *frames.input, &h, false)?;
            continue;
        }
        let placed = |at: Lsn| match within {
            Some((from, upto)) if at <= from || at > upto => {
                Err(bad(format!("a change at {at} is not where it belongs")))
            }
            _ => Ok(()),
        };
        if k == NET_FRAME && len > STREAM_ABOVE {
            let h = net::Header::read(frames.input, len)?;
            owner(h.tenant_kind, &h.tenant_key)?;
            described(&known, h.relations.iter().copied())?;
            done.rows += net::walk(frames.input, &h, &placed)?;
            continue;
        }
        let bytes = frames.body(len)?;
        match k {
            TXN_INDEX_FRAME => {
                TxnIndex::decode(bytes)?;
                continue;
            }
            NET_FRAME => {
                let mut body = &bytes[5..];
                let h = net::Header::read(&mut body, len)?;
                owner(h.tenant_kind, &h.tenant_key)?;
                described(&known, h.relations.iter().copied())?;
                done.rows += net::walk(&mut body, &h, &placed)?;
                continue;
            }
            STAND_FRAME => {
                for (id, at) in net::stands(&bytes[5..])? {
                    described(&known, std::iter::once(id))?;
                    placed(at.end_lsn)?;
                }
                continue;
            }
            _ => {}
        }
        match FrameReader::new(bytes).next().ok_or_else(|| bad("an empty frame"))?? {
            Frame::Begin(b) => {
                if b.end_lsn < before || within.is_some_and(|(from, upto)| b.end_lsn <= from || b.end_lsn > upto) {
                    return Err(bad(format!("transaction {} is not where it belongs", b.end_lsn)));
                }
                before = b.end_lsn;
                done.transactions += 1;
            }
            Frame::Relation(id, encoded) => {
                if Relation::id_of(encoded) != id {
                    return Err(bad("a descriptor's id is not its own"));
                }
                Relation::decode(encoded)?;
                known.insert(id);
            }
            Frame::Run(r) => {
                owner(r.header.tenant_kind, r.header.tenant_key)?;
                described(&known, r.header.relation_ids())?;
                let mut n = 0;
                for row in RowReader::new(r.data) {
                    if r.header.relation_id(row?.rel).is_none() {
                        return Err(bad("a row names a descriptor that its run does not list"));
                    }
                    n += 1;
                }
                if n != r.header.rows {
                    return Err(bad(format!("a run says {} rows and holds {n}", r.header.rows)));
                }
                done.rows += u64::from(n);
            }
            Frame::RunOpen(h) => {
                owner(h.tenant_kind, h.tenant_key)?;
                described(&known, h.relation_ids())?;
                let h = Header::of(&h);
                done.rows += stream(&mut *frames.input, &h, true)?;
            }
            Frame::RunData(_) => return Err(bad("rows without the head of their run")),
            Frame::Truncate(t) => described(&known, t.relation_ids())?,
            Frame::Hello(_) | Frame::Commit(_) | Frame::Marker(_) => {}
        }
    }
    Ok(done)
}

fn stream(input: &mut dyn Read, h: &Header, framed: bool) -> Result<u64> {
    let mut state = RunState::new(h, framed);
    let mut body = RunBody { input, s: &mut state };
    let mut n = 0;
    while body.s.left > 0 {
        let (op, rel) = body.row_head()?;
        if rel >= h.relations.len() {
            return Err(bad("a row names a descriptor that its run does not list"));
        }
        for _ in 0..values(op) {
            body.skip_value()?;
        }
        n += 1;
    }
    if n != u64::from(h.rows) {
        return Err(bad(format!("a run says {} rows and holds {n}", h.rows)));
    }
    Ok(n)
}
