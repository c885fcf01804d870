//! What each kind of job does.

use super::claim::{Claimed, error_text};
use super::mirror::Mirror;
use super::step::Step;
use crate::catalog::{Catalog, Entry};
use crate::clock::rfc3339;
use crate::commands::verify::{self, VerifyArgs};
use crate::demux::Flow;
use crate::dsn::Dsn;
use crate::error::{Error, Kind, Result};
use crate::keyring::TenantEntry;
use crate::opened::{Opened, scratch};
use crate::restore::{self, Means, Place, Request, undo};
use crate::retention::Policy;
use crate::run::AgentContext;
use crate::sql;
use crate::tenant::Tenant;
use crate::verify::live;
use crate::verify::results::{Results, Verdict};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use uuid::Uuid;

/// How often the durable position is looked at while it is waited for.
const LOOK: Duration = Duration::from_millis(100);

/// What came of a job.
pub struct Done {
    pub result: Value,
    /// It was carried out, and what it found is bad.
    pub error: Option<String>,
}

/// What every kind needs.
pub(super) struct Work<'a> {
    pub ctx: &'a Arc<AgentContext>,
    /// The server that the job's row is on.
    pub dsn: &'a Dsn,
    pub flow: &'a Flow,
    pub mirror: &'a Mirror,
    pub job: &'a Claimed,
    pub step: &'a Step,
}

impl Work<'_> {
    /// Carries the job out.
    pub(super) async fn carry_out(&self) -> Result<Done> {
        let result = match self.job.kind.as_str() {
            "backup" => self.backup().await?,
            "restore" => self.restore().await?,
            "verify" => return self.verify().await,
            "hold" => self.hold().await?,
            "release" => self.release().await?,
            "policy" => self.policy().await?,
            other => return Err(Error::new(Kind::Refused, format!("this agent knows no job of kind '{other}'"))),
        };
        Ok(Done { result, error: None })
    }

    pub(super) fn opened(&self) -> Opened {
        Opened { keyring: self.ctx.keyring.clone(), repo: self.ctx.repo.clone(), from: None }
    }

    pub(super) async fn tenant(&self) -> Result<TenantEntry> {
        let source = (self.ctx.source.as_str(), self.ctx.source_uid);
        self.opened().tenant(source, &Tenant::normal(&self.job.tenant)).await
    }

    pub(super) async fn catalog(&self, tenant: Uuid) -> Result<Catalog> {
        Catalog::open(&self.ctx.repo, self.ctx.source_uid, tenant, None).await
    }

    /// Waits until the job's own commit is durable, and everything before it.
    pub(super) async fn own_commit(&self) -> Result<()> {
        loop {
            self.flow.want(self.job.goal);
            let (durable, _) = self.ctx.status.durable();
            if durable >= self.job.goal {
                return Ok(());
            }
            let goal = self.job.goal;
            self.step.begin(0.0, 0.1, format!("waiting until {goal} is durable; so far it is {durable}"))?;
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn restore(&self) -> Result<Value> {
        let to = self.job.text("target").unwrap_or_default().parse();
        let to = to.map_err(|e: String| Error::usage(format!("the target: {e}")))?;
        let place = match self.job.text("mode") {
            Some("in-place") => Place::InPlace(Box::new(self.dsn.across_restarts())),
            // Who asked can read it.
            Some("schema") => Place::Schema {
                dsn: Box::new(self.dsn.across_restarts()),
                name: None,
                readers: vec![self.job.requested_by.clone()],
            },
            mode => return Err(Error::new(Kind::Refused, format!("this agent cannot restore in mode {mode:?}"))),
        };
        let dry_run = self.job.args["dry_run"] != false;
        if !dry_run && let Some(done) = self.restored().await? {
            return Ok(done);
        }
        self.own_commit().await?;
        let tenant = self.tenant().await?;
        self.step.begin(0.1, 1.0, "reading the history")?;
        let opened = self.opened();
        let rows = self.expected_rows(&opened, tenant.uid).await?;
        self.step.expected.store(rows, Ordering::Relaxed);
        let request = Request { dry_run, job: Some(self.job.of_job()), ..Request::new(tenant.tenant, to, place) };
        let means = Means {
            opened: &opened,
            source: (&self.ctx.source, self.ctx.source_uid),
            scratch: scratch(&self.ctx.config)?,
            memory: self.ctx.memory.job,
            watch: self.step.watch.clone(),
        };
        self.step.begin(0.1, 1.0, if dry_run { "comparing" } else { "restoring" })?;
        let mut report = match restore::run(&means, &request).await {
            Ok(report) => report,
            // A commit whose answer was lost, or one of an earlier attempt that was still under way.
            Err(e) if !dry_run => return self.restored().await.ok().flatten().ok_or(e),
            Err(e) => return Err(e),
        };
        if let Some(id) = report.undo.clone() {
            match undo::hold(&self.ctx.repo, self.ctx.source_uid, tenant.uid, &id, &self.job.requested_by).await {
                Ok(until_us) => report.undo_until_us = until_us,
                Err(e) => report.warnings.push(format!("what an undo needs is not held: {e}")),
            }
        }
        Ok(report.document())
    }

    /// What an earlier attempt at this restore committed. What remained to be done after the commit is done.
    async fn restored(&self) -> Result<Option<Value>> {
        let client = sql::connect(&self.dsn.across_restarts()).await?;
        let Some(mut done) = self.job.of_job().committed(&client).await? else { return Ok(None) };
        tracing::info!(source = self.ctx.source, job = self.job.job, "was done before");
        if let Some(undo) = done.result["undo"].as_str() {
            let (repo, source, tenant) = (&self.ctx.repo, self.ctx.source_uid, self.tenant().await?.uid);
            let held = undo::hold_since(repo, source, tenant, undo, &self.job.requested_by, done.at_us).await;
            match held {
                Ok(until_us) => done.result["undo_until"] = json!(until_us.map(rfc3339)),
                Err(e) => {
                    if let Some(warnings) = done.result["warnings"].as_array_mut() {
                        warnings.push(json!(format!("what an undo needs is not held: {e}")));
                    }
                }
            }
            self.mirror.tenant_changed(tenant);
        }
        Ok(Some(done.result.take()))
    }

    /// About as many rows as the tenant has.
    async fn expected_rows(&self, opened: &Opened, tenant: Uuid) -> Result<u64> {
        let history = opened.history(self.ctx.source_uid).await?;
        Ok(history.holdings(tenant).iter().filter_map(|h| h.rows).sum())
    }

    async fn verify(&self) -> Result<Done> {
        let tenant = self.tenant().await?;
        self.step.begin(0.0, 1.0, "reading the log")?;
        let opened = self.opened();
        let stores: Vec<(String, bool)> = opened.repo.stores().map(|s| (s.name().to_owned(), s.required())).collect();
        let args = VerifyArgs { tenant: Some(self.job.tenant.clone()), against_live: false, drill: false, from: None };
        let sources = Some(vec![(self.ctx.source.clone(), self.ctx.source_uid)]);
        let before = self.catalog(tenant.uid).await?.state().clone();
        self.step.begin(0.0, 0.5, "reading back")?;
        let (mut result, failures) = verify::verify(&opened, sources, &stores, &args, &self.step.tally, true).await?;
        let results = Results { ctx: self.ctx, mirror: self.mirror };
        results.read_back(tenant.uid, &before, &failures).await?;
        self.step.begin(0.5, 1.0, "comparing with the live rows")?;
        let compared = live::check(self.ctx, self.mirror, &tenant, self.step.watch.clone()).await?;
        verify::add_live(&compared, &tenant, self.ctx.source_uid, &mut result);
        let error = if let Some(m) = first_failure(&result) {
            let e = Error::new(Kind::Verification, format!("not everything is as it was written: {m}"));
            Some(error_text(&e.hint("the job's result names every object and every row; see also coffer verify")))
        } else if compared.verdict() == Verdict::Open {
            let left_out = compared.note().unwrap_or_default();
            let e = Error::new(
                Kind::Partial,
                format!("nothing is known to be wrong, and not everything was compared: {left_out}"),
            );
            Some(error_text(&e.hint("what was not compared waits for its base: ask again in a while")))
        } else {
            None
        };
        Ok(Done { result, error })
    }

    async fn hold(&self) -> Result<Value> {
        let tenant = self.tenant().await?;
        let id = self.uuid("id")?;
        let entry = Entry::Hold {
            id,
            number: self.job.args["hold"].as_i64().unwrap_or(0),
            reason: self.job.text("reason").unwrap_or_default().to_owned(),
            from_us: self.job.args["from_us"].as_i64(),
            to_us: self.job.args["to_us"].as_i64(),
            by: self.job.requested_by.clone(),
            until_us: None,
        };
        let mut catalog = self.catalog(tenant.uid).await?;
        catalog.append_if(entry, |s| s.holds.iter().all(|h| h.id != id)).await?;
        self.mirror.tenant_changed(tenant.uid);
        Ok(json!({"hold": self.job.args["hold"], "id": id}))
    }

    async fn release(&self) -> Result<Value> {
        let tenant = self.tenant().await?;
        let id = self.uuid("id")?;
        let mut catalog = self.catalog(tenant.uid).await?;
        let entry = Entry::Release { id, by: self.job.requested_by.clone() };
        catalog.append_if(entry, |s| s.holds.iter().any(|h| h.id == id)).await?;
        self.mirror.tenant_changed(tenant.uid);
        Ok(json!({"hold": self.job.args["hold"], "id": id}))
    }

    async fn policy(&self) -> Result<Value> {
        let policy = self.job.args["policy"].clone();
        let whole = Policy::parse(&policy, &Policy::from(&self.ctx.config.retention))?;
        let tenant = self.tenant().await?;
        let mut catalog = self.catalog(tenant.uid).await?;
        let entry = Entry::Policy { policy: policy.clone(), by: self.job.requested_by.clone() };
        catalog.append_if(entry, |s| s.policy.as_ref() != Some(&policy)).await?;
        self.mirror.tenant_changed(tenant.uid);
        Ok(json!({"policy": whole.to_json()}))
    }

    pub(super) fn uuid(&self, name: &str) -> Result<Uuid> {
        let text = self.job.text(name).unwrap_or_default();
        Uuid::try_parse(text).map_err(|e| Error::other(format!("job {}: {name} '{text}': {e}", self.job.job)))
    }
}

/// What a document of a verification says first, and how much more there is.
fn first_failure(document: &Value) -> Option<String> {
    let failures = document["failures"].as_array()?;
    let f = failures.first()?;
    let more = if failures.len() > 1 { format!(" and {} more", failures.len() - 1) } else { String::new() };
    let said = |field: &str| f[field].as_str().unwrap_or_default();
    Some(format!("{}: {}{more}", said("kind"), said("message")))
}
