//! Why a full is made, and whether it is to be an archive.

use crate::catalog::FullEntry;
use crate::error::{Error, Kind, Result};
use crate::history::{History, Inputs, Target};
use crate::keyring::TenantEntry;
use crate::opened::Reserved;
use crate::retention::is_same_month;
use uuid::Uuid;

/// As [`FullEntry::trigger`] of what a schedule makes.
pub const SCHEDULE: &str = "schedule";
/// The same of an archive.
pub const ARCHIVE: &str = "archive";

/// See the module.
#[derive(Clone, Debug)]
pub struct Occasion {
    /// As [`FullEntry::trigger`].
    pub trigger: String,
    pub reason: Option<String>,
    pub by: By,
}

/// Who wants a full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The first full of a tenant in a calendar month is an archive.
    Schedule,
    /// Each call makes one.
    Command,
    /// It is made once, however often the job begins anew.
    Job,
}

impl Occasion {
    pub fn of_schedule() -> Self {
        Self { trigger: SCHEDULE.to_owned(), reason: None, by: By::Schedule }
    }

    pub fn of_command(archive: bool) -> Self {
        let trigger = if archive { ARCHIVE } else { SCHEDULE };
        Self { trigger: trigger.to_owned(), reason: None, by: By::Command }
    }

    pub fn of_job(trigger: String, reason: Option<String>) -> Self {
        Self { trigger, reason, by: By::Job }
    }

    /// The full that a job asks for here, if it is there.
    pub fn made<'a>(&self, fulls: impl IntoIterator<Item = &'a FullEntry>, point: &Target) -> Option<&'a FullEntry> {
        let same = |f: &&FullEntry| f.point_lsn == point.lsn && f.trigger == self.trigger && f.reason == self.reason;
        fulls.into_iter().find(same).filter(|_| self.by == By::Job)
    }

    /// Whether a full with this trigger may have come of it.
    pub(super) fn is_of(&self, f: &FullEntry) -> bool {
        f.trigger == self.trigger || (self.by == By::Schedule && f.trigger == ARCHIVE)
    }

    /// Whether the full is to be an archive: when somebody asks for one, and once in a month.
    ///
    /// # Errors
    /// `OutsideWindow`, code `incomplete`: one was asked for, and not all that it needs is archived.
    pub(super) fn is_archive(
        &self,
        history: &History,
        tenant: &TenantEntry,
        (point, at_us): (&Target, i64),
        inputs: &Inputs,
    ) -> Result<bool> {
        let of_month = |f: &&FullEntry| {
            f.trigger == ARCHIVE && is_same_month(f.point_time_us, at_us) && history.is_sound(tenant.uid, f.id)
        };
        let is_asked = self.trigger == ARCHIVE;
        let is_due = || self.by == By::Schedule && !history.fulls(tenant.uid).iter().any(of_month);
        if !is_asked && !is_due() {
            return Ok(false);
        }
        let shared = history.keyring().tenant_uid(history.source(), &Reserved::Shared.tenant());
        let Some(why) = missing(history, shared, point, inputs) else { return Ok(true) };
        if is_asked {
            let e = Error::new(Kind::OutsideWindow, format!("an archive would not be complete: {why}"));
            return Err(e.code("incomplete").hint("definitions are archived within a minute after they changed"));
        }
        tracing::warn!(tenant_uid = %tenant.uid, "the month's archive waits for the next full: {why}");
        Ok(false)
    }
}

/// What is not archived and an archive cannot do without.
fn missing(history: &History, shared: Uuid, point: &Target, inputs: &Inputs) -> Option<String> {
    match (&inputs.schema, &inputs.schema_warning) {
        (Some(_), None) => {}
        (_, Some(w)) => return Some(w.clone()),
        (None, None) => {
            return Some("no definitions are archived: `coffer run` needs pg_dump for that, see its log".to_owned());
        }
    }
    let (table, why) = history.unknown(point, shared).into_iter().next()?;
    Some(format!("{table} may be reference data: {why}"))
}
