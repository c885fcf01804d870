//! What a run of pruning found, decided and did.

use crate::catalog::{Floor, Hold};
use crate::clock::rfc3339;
use crate::error::Error;
use crate::retention::{Policy, Reason};
use crate::tenant::Tenant;
use coffer_wire::{Lsn, TenantKind};
use serde_json::{Value, json};
use std::fmt::Write as _;
use uuid::Uuid;

/// Of one source.
#[derive(Debug)]
pub struct Report {
    pub source: String,
    pub confirmed: bool,
    pub tenants: Vec<TenantReport>,
    pub orphans: Vec<Orphan>,
    pub warnings: Vec<String>,
}

/// An object that no record names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// In whose folder it is; the reserved tenant `shared` for what is in nobody's.
    pub tenant: Uuid,
    pub path: String,
    pub bytes: u64,
    /// By the store's clock.
    pub written_us: i64,
    pub lsn: Lsn,
    pub object: Uuid,
}

/// One tenant's.
#[derive(Debug)]
pub struct TenantReport {
    pub uid: Uuid,
    pub tenant: Option<Tenant>,
    pub policy: Option<Policy>,
    /// Holds that were to end by now; they are released when it is confirmed.
    pub over: Vec<Hold>,
    /// In the order of their points.
    pub backups: Vec<Backup>,
    /// What the log names of the tenant's changes and bases: what stays of it, and what is below the floor and goes.
    pub log_keep: Removed,
    pub log_remove: Removed,
    /// Below it only fulls are left.
    pub floor: Option<Floor>,
    /// A restore is running on what would be removed.
    pub locked: bool,
    /// Recorded in this run: to go after the grace.
    pub recorded: Removed,
    /// Deleted in this run.
    pub deleted: Removed,
    /// Removals that are recorded and not carried out.
    pub pending: Vec<Pending>,
    pub error: Option<Error>,
}

/// A backup and its verdict.
#[derive(Clone, Debug)]
pub struct Backup {
    pub id: Uuid,
    pub kind: &'static str,
    pub trigger: Option<String>,
    pub point: Lsn,
    pub time_us: i64,
    pub bytes: u64,
    pub keep: bool,
    pub reasons: Vec<Reason>,
}

/// How much went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    pub backups: u64,
    pub objects: u64,
    pub bytes: u64,
}

impl std::ops::AddAssign for Removed {
    fn add_assign(&mut self, o: Self) {
        *self =
            Self { backups: self.backups + o.backups, objects: self.objects + o.objects, bytes: self.bytes + o.bytes };
    }
}

/// A removal that is yet to be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Number of its record in the tenant's catalog.
    pub removal: u64,
    pub backups: u64,
    pub objects: u64,
    pub bytes: u64,
    pub not_before_us: i64,
    /// The next run carries it out.
    pub due: bool,
    pub waits_for: Option<String>,
}

impl Report {
    pub(super) fn new(source: &str, confirmed: bool) -> Self {
        Self { source: source.to_owned(), confirmed, tenants: Vec::new(), orphans: Vec::new(), warnings: Vec::new() }
    }

    /// Sums over the tenants.
    pub fn sum(&self, of: impl Fn(&TenantReport) -> Removed) -> Removed {
        self.tenants.iter().map(of).fold(Removed::default(), |a, b| Removed {
            backups: a.backups + b.backups,
            objects: a.objects + b.objects,
            bytes: a.bytes + b.bytes,
        })
    }

    /// The tenants that failed.
    pub fn failed(&self) -> impl Iterator<Item = (&TenantReport, &Error)> {
        self.tenants.iter().filter_map(|t| Some((t, t.error.as_ref()?)))
    }

    /// The document of this source.
    pub fn to_json(&self) -> Value {
        let tenants: Vec<Value> =
            self.tenants.iter().filter(|t| t.is_worth_saying()).map(TenantReport::to_json).collect();
        let orphans: Vec<Value> = self
            .orphans
            .iter()
            .map(|o| json!({"object": o.path, "tenant_uid": o.tenant, "bytes": o.bytes, "written_at": rfc3339(o.written_us)}))
            .collect();
        json!({"source": self.source, "tenants": tenants, "orphans": orphans, "warnings": self.warnings})
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for t in self.tenants.iter().filter(|t| t.is_worth_saying()) {
            t.write(&self.source, &mut out);
        }
        // Writing to a String cannot fail.
        for o in &self.orphans {
            let _ = writeln!(
                out,
                "orphan  {}, {} bytes, written {}: no record names it",
                o.path,
                o.bytes,
                rfc3339(o.written_us)
            );
        }
        for w in &self.warnings {
            let _ = writeln!(out, "warning: {w}");
        }
        let planned = self.sum(TenantReport::planned);
        if self.confirmed {
            let (recorded, deleted) = (self.sum(|t| t.recorded), self.sum(|t| t.deleted));
            let _ = writeln!(
                out,
                "source {}: {} backups no longer count and {} objects are to go ({} bytes); {} objects deleted ({} bytes)",
                self.source, recorded.backups, recorded.objects, recorded.bytes, deleted.objects, deleted.bytes
            );
        } else {
            let _ = writeln!(
                out,
                "source {}: {} backups would be removed, and {} orphans; nothing was changed: add --confirm to do it",
                self.source,
                planned.backups,
                self.orphans.len()
            );
        }
        out
    }
}

impl TenantReport {
    pub(super) fn new(uid: Uuid, tenant: Option<Tenant>) -> Self {
        Self {
            uid,
            tenant,
            policy: None,
            over: Vec::new(),
            backups: Vec::new(),
            log_keep: Removed::default(),
            log_remove: Removed::default(),
            floor: None,
            locked: false,
            recorded: Removed::default(),
            deleted: Removed::default(),
            pending: Vec::new(),
            error: None,
        }
    }

    fn planned(&self) -> Removed {
        let gone = self.backups.iter().filter(|b| !b.keep);
        Removed { backups: gone.count() as u64, ..Removed::default() }
    }

    /// Reserved tenants without anything of their own are left out.
    fn is_worth_saying(&self) -> bool {
        let normal = self.tenant.as_ref().is_some_and(|t| t.kind == TenantKind::Normal);
        normal
            || !self.backups.is_empty()
            || self.log_remove.objects > 0
            || !self.pending.is_empty()
            || self.error.is_some()
    }

    fn name(&self) -> String {
        self.tenant.as_ref().map_or_else(|| self.uid.to_string(), ToString::to_string)
    }

    fn to_json(&self) -> Value {
        let backups: Vec<Value> = self
            .backups
            .iter()
            .map(|b| {
                let reasons: Vec<Value> =
                    b.reasons.iter().map(|r| json!({"code": r.code(), "text": r.to_string()})).collect();
                json!({"id": b.id, "kind": b.kind, "trigger": b.trigger, "point_lsn": b.point.to_string(),
                    "point_time": rfc3339(b.time_us), "bytes": b.bytes, "keep": b.keep, "reasons": reasons})
            })
            .collect();
        let pending: Vec<Value> = self
            .pending
            .iter()
            .map(|p| {
                json!({"removal": p.removal, "backups": p.backups, "objects": p.objects, "bytes": p.bytes,
                    "not_before": rfc3339(p.not_before_us), "due": p.due, "waits_for": p.waits_for})
            })
            .collect();
        let over: Vec<Value> = self
            .over
            .iter()
            .map(|h| json!({"hold": h.id, "reason": h.reason, "until": h.until_us.map(rfc3339)}))
            .collect();
        let removed = |r: Removed| json!({"backups": r.backups, "objects": r.objects, "bytes": r.bytes});
        json!({"tenant": self.tenant.as_ref().map(|t| t.key.clone()), "kind": self.tenant.as_ref().map(|t| t.kind.name()),
            "uid": self.uid, "policy": self.policy.as_ref().map(Policy::to_json), "holds_over": over, "backups": backups,
            "log": {"objects": self.log_keep.objects, "bytes": self.log_keep.bytes, "keep": true,
                "reasons": [{"code": Reason::Log.code(), "text": Reason::Log.to_string()}],
                "remove": {"objects": self.log_remove.objects, "bytes": self.log_remove.bytes,
                    "reasons": [{"code": Reason::BelowFloor.code(), "text": Reason::BelowFloor.to_string()}]}, "floor": self.floor.map(|f| f.lsn.to_string())},
            "recorded": removed(self.recorded), "deleted": removed(self.deleted), "pending": pending,
            "locked": self.locked, "error": self.error.as_ref().map(|e| e.to_json()["error"].clone())})
    }

    fn write(&self, source: &str, out: &mut String) {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{source} {}", self.name());
        if let Some(e) = &self.error {
            let _ = writeln!(out, "  failed  {e}");
        }
        for h in &self.over {
            let until = h.until_us.map(rfc3339).unwrap_or_default();
            let _ = writeln!(out, "  over    hold {} was until {until}: {}", h.id, h.reason);
        }
        for b in &self.backups {
            let reasons: Vec<String> = b.reasons.iter().map(ToString::to_string).collect();
            let _ = writeln!(
                out,
                "  {}  {} {} at {} ({}): {}",
                if b.keep { "keep  " } else { "remove" },
                b.kind,
                b.id,
                rfc3339(b.time_us),
                b.point,
                reasons.join("; ")
            );
        }
        let Removed { objects, bytes, .. } = self.log_keep;
        if objects > 0 {
            let _ = writeln!(out, "  keep    {objects} objects of the log, {bytes} bytes: {}", Reason::Log);
        }
        let Removed { objects, bytes, .. } = self.log_remove;
        if objects > 0 {
            let _ = writeln!(out, "  remove  {objects} objects of the log, {bytes} bytes: {}", Reason::BelowFloor);
        }
        if let Some(f) = self.floor {
            let _ = writeln!(out, "  floor   {}: below it only fulls are left", f.lsn);
        }
        for p in &self.pending {
            let when = match (&p.waits_for, p.due) {
                (Some(why), _) => why.clone(),
                (None, true) => "due".to_owned(),
                (None, false) => format!("not before {}", rfc3339(p.not_before_us)),
            };
            let _ =
                writeln!(out, "  pending removal {} of {} objects, {} bytes: {when}", p.removal, p.objects, p.bytes);
        }
    }
}
