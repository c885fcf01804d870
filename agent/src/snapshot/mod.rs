//! Bases: fulls that are read from the database under a snapshot.
//!
//! [`BaseTaker`] compares the rules with the log: a table is covered when the newest base that has it was taken for the
//! rule's registration and lies after the last gap or promotion. All tables that are not are taken in one [`job`];
//! the stream is shipped meanwhile. Only this room ever sees a `pg_snapshot`: what it records is a clean cut.

pub mod catalog;
pub mod fulls;
mod job;
pub mod large;
mod marker;
pub mod plan;
pub mod progress;
pub mod read;
pub mod rows;
pub mod visibility;

use crate::accounts;
use crate::alarms;
use crate::error::{Error, Kind, Result};
use crate::large_objects::{self, Reading};
use crate::lease::Lease;
use crate::repository::model::{Base, Body, LargeObjectsRead, PendingTable};
use crate::repository::{Draft, Log, ObjectRef};
use crate::run::AgentContext;
use crate::ship::Durable;
use crate::snapshot::plan::Seen;
use crate::snapshot::progress::{BaseProgress, Phase};
use crate::sql::{self, SqlClient, SqlContext};
use crate::tenant::Tenant;
use crate::verify::objects::is_finding;
use coffer_wire::{Lsn, Relation, TenantKind};
use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// Rules are compared with the log at least this often; most changes are noticed by their markers.
const RECHECK: Duration = Duration::from_secs(10);
/// A burst of DDL is waited for this long before the definitions are dumped, …
const DEFINITIONS_REST: Duration = Duration::from_secs(1);
/// … and so many dumps are tried while more of it comes; the next round goes on.
const DUMPS: usize = 5;
/// The roles of tenants, which no marker tells of, are looked at so often.
const ROLES: Duration = Duration::from_secs(60);
/// Large objects are read again after so long, in microseconds.
const LARGE_OBJECTS_US: i64 = 24 * 3600 * 1_000_000;
/// First and longest wait after a job that failed, or that left tables out.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Takes bases while the agent runs.
pub struct BaseTaker {
    ctx: Arc<AgentContext>,
    durable: Receiver<Durable>,
    seen: Seen,
    progress: Arc<BaseProgress>,
    /// Something in the log asked for a base since the registry was last looked at.
    asked: bool,
    /// Gaps and promotions that were taken note of.
    breaks: u64,
    /// After the last of them some table may still lack a base.
    is_broken: bool,
    /// From where on bases have to lie because of what no store has any more.
    wanted: watch::Receiver<Lsn>,
    /// Definitions changed after the newest dump of them; the agent may have been away when they did.
    new_definitions: bool,
    /// Where they changed last, as far as this process knows.
    definitions_at: Option<Lsn>,
    /// After a dump that failed.
    definitions_after: Instant,
    /// When the roles of tenants are looked at again.
    roles_after: Instant,
    /// When it is looked again whether large objects are due.
    objects_after: Instant,
    /// A base was taken of a table that refers to some.
    objects_due: bool,
    /// They are being read, which may take long: bases do not wait for it.
    objects: Option<JoinHandle<Result<(Reading, Lease, u64)>>>,
}

impl BaseTaker {
    /// Starts it; it ends with the agent, or with an error that it cannot go on after.
    pub fn spawn(ctx: Arc<AgentContext>) -> JoinHandle<Result<()>> {
        // Subscribed before the log is read: no record falls in between.
        let durable = ctx.durable.subscribe();
        tokio::spawn(async move {
            let taker = Self {
                progress: ctx.status.bases.clone(),
                wanted: ctx.damage.bases_from(),
                ctx,
                durable,
                seen: Seen::default(),
                asked: false,
                breaks: 0,
                is_broken: false,
                new_definitions: true,
                definitions_at: None,
                definitions_after: Instant::now(),
                roles_after: Instant::now(),
                objects_after: Instant::now(),
                objects_due: false,
                objects: None,
            };
            taker.run().await
        })
    }

    async fn run(mut self) -> Result<()> {
        self.read_log().await?;
        let mut pause = RETRY.0;
        loop {
            if self.ctx.is_stopping() {
                return Ok(());
            }
            let breaks = self.breaks;
            let taken = match self.take_missing().await {
                Ok(true) if self.new_definitions => self.record_definitions().await.map(|()| true),
                r => r,
            };
            let taken = match taken {
                Ok(done) => self.record_roles().await.map(|()| done),
                e => e,
            };
            let taken = match taken {
                Ok(done) => self.record_large_objects().await.map(|()| done),
                e => e,
            };
            let wait = match taken {
                Ok(true) => {
                    self.ctx.alarms.clear(alarms::BASE_FAILED, &self.ctx.source);
                    if self.is_broken && self.breaks == breaks {
                        self.is_broken = false;
                        self.ctx.alarms.clear(alarms::GAP, &self.ctx.source);
                    }
                    pause = RETRY.0;
                    RECHECK
                }
                Ok(false) => {
                    pause = (pause * 2).min(RETRY.1);
                    pause
                }
                Err(e) if e.kind() == Kind::Fenced && !e.is_code("base_again") => return Err(e),
                Err(_) if self.ctx.is_stopping() => return Ok(()),
                Err(e) => {
                    self.progress.finish(Some(e.to_string()));
                    self.ctx.status.set_snapshotting(false);
                    let message = format!("bases fail and are tried again: {e}");
                    tracing::warn!("{message}");
                    self.ctx.alarms.raise(alarms::BASE_FAILED, &self.ctx.source, message);
                    pause = (pause * 2).min(RETRY.1);
                    pause
                }
            };
            self.idle(wait).await?;
        }
    }

    /// Takes in the whole log.
    async fn read_log(&mut self) -> Result<()> {
        self.seen = Seen::default();
        let log = Log::open(&self.ctx.repo, self.ctx.source_uid, None).await?;
        let unresolved = self.unresolved();
        for r in log.records() {
            self.seen.read(r, unresolved);
            self.note_full(r);
        }
        self.note_break();
        Ok(())
    }

    /// The uid of the reserved tenant that holds what could not be attributed, once there was something.
    fn unresolved(&self) -> Option<Uuid> {
        let tenant = Tenant::reserved(TenantKind::Unresolved);
        self.ctx.keyring.find(self.ctx.source_uid, &tenant).map(|e| e.uid)
    }

    /// Finds out which tables the rows are from that could not be attributed.
    async fn read_unresolved(&mut self, rules: &[catalog::Rule]) -> Result<()> {
        for (at, object) in self.seen.take_unread() {
            let path = object.path.clone();
            let (repo, rt) = (self.ctx.repo.clone(), self.ctx.rt.clone());
            let relids = tokio::task::spawn_blocking(move || {
                let mut plain = repo.open_object(&rt, &object, None)?;
                relations_of(&mut plain).map_err(|e| e.during(format_args!("object {}", object.path)))
            })
            .await
            .map_err(|e| Error::other(format!("reading what could not be attributed broke off: {e}")))?;
            match relids {
                Ok(relids) => self.seen.doubt(at, &relids),
                // Nobody will ever know: they may be of any table.
                Err(e) if is_finding(&e) => {
                    tracing::warn!("what could not be attributed is lost ({path}), every table gets a new base: {e}");
                    self.ctx.damage.complain(&e);
                    self.seen.doubt(at, &rules.iter().map(|r| r.relid).collect());
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The metric of the last full follows the log, so that it survives a restart of the agent.
    fn note_full(&self, r: &crate::repository::LogRecord) {
        if matches!(&r.body, Body::Base(b) if !b.tables.is_empty()) {
            self.ctx.status.full_complete(r.at_us);
        }
    }

    /// Waits for something that may ask for a base, or for `wait`.
    async fn idle(&mut self, wait: Duration) -> Result<()> {
        let until = tokio::time::Instant::now() + wait;
        // What was heard while something else was waited for counts, too.
        while !self.asked {
            let ctx = self.ctx.clone();
            tokio::select! {
                Ok(()) = self.wanted.changed() => self.asked = true,
                () = tokio::time::sleep_until(until) => break,
                () = ctx.stopped() => break,
                () = finished(&mut self.objects) => break,
                d = self.durable.recv() => drop(self.take_in(d).await?),
            }
        }
        Ok(())
    }

    /// Takes a record in; `None`: some were missed.
    async fn take_in(&mut self, d: std::result::Result<Durable, RecvError>) -> Result<Option<Durable>> {
        let d = match d {
            Ok(d) => d,
            Err(RecvError::Lagged(n)) => {
                tracing::debug!("{n} records were not heard of: the log is read again");
                self.read_log().await?;
                self.asked = true;
                return Ok(None);
            }
            Err(RecvError::Closed) => return Err(Error::other("the stream has ended").code("stopping")),
        };
        self.note_full(&d.record);
        if !self.seen.record(&d.record, self.unresolved()) {
            self.read_log().await?;
        }
        self.note_break();
        self.markers(&d);
        Ok(Some(d))
    }

    /// After a gap or a promotion everything is due, and the positions of before say nothing.
    fn note_break(&mut self) {
        if self.breaks != self.seen.breaks() {
            self.breaks = self.seen.breaks();
            self.is_broken = true;
            (self.asked, self.new_definitions, self.definitions_at) = (true, true, None);
        }
    }

    /// Takes in the markers of a record. (That a rewrite changes the table's registration is what survives a restart; the
    /// marker only brings the base sooner.)
    fn markers(&mut self, d: &Durable) {
        for m in d.markers.iter() {
            match m.kind.as_str() {
                "registry" => self.asked = true,
                "roles" => (self.asked, self.roles_after) = (true, Instant::now()),
                "large_objects" => (self.asked, self.objects_after) = (true, Instant::now()),
                "ddl" | "drop" | "rewrite" | "definitions" => {
                    (self.asked, self.new_definitions) = (true, true);
                    self.definitions_at = self.definitions_at.max(Some(m.end_lsn));
                }
                _ => {}
            }
        }
    }

    /// The alarm of a gap stands until every table has its base, also when the agent that raised it is gone.
    fn alarm_of_lost(&self, missing: &[catalog::Rule]) {
        let n = self.seen.lost(missing);
        if n > 0 && !self.ctx.alarms.stands(alarms::GAP, &self.ctx.source) {
            let message = format!("{n} tables have no base since a gap or a promotion; new bases follow");
            self.ctx.alarms.raise(alarms::GAP, &self.ctx.source, message);
        }
    }

    /// One job for every table that lacks a base. False: some table has to be tried again soon.
    async fn take_missing(&mut self) -> Result<bool> {
        self.asked = false;
        // Before the first session is opened: what is read of a server that was left meanwhile is not recorded.
        let breaks = self.seen.breaks();
        let rules = {
            let client = self.session().await?;
            let row = client
                .query_one("SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text", &[])
                .await
                .sql("cannot take a snapshot")?;
            if let Ok(xmin) = row.get::<_, &str>(0).parse() {
                self.seen.prune(xmin);
            }
            catalog::rules(&client).await?
        };
        self.read_unresolved(&rules).await?;
        let lost = *self.wanted.borrow_and_update();
        // As long as a snapshot may not see the end of what was lost, a base would have to be merged with it.
        if !self.seen.may_miss(lost) {
            self.seen.doubt(lost, &rules.iter().map(|r| r.relid).collect());
        }
        let missing = self.seen.missing(rules.clone());
        if missing.is_empty() {
            return Ok(true);
        }
        self.alarm_of_lost(&missing);
        let names: Vec<String> = missing.iter().map(catalog::Rule::qualified).collect();
        tracing::info!(tables = missing.len(), "taking bases of {}", names.join(", "));
        self.ctx.status.set_snapshotting(true);
        self.progress.begin(names);
        let job = Uuid::new_v4();
        let wanted: Vec<PendingTable> = missing
            .iter()
            .map(|r| PendingTable { relid: r.relid, name: r.qualified(), owner: r.owner(&self.ctx) })
            .collect();
        // Until they are recorded, the fulls are nobody's: they are not to be taken for left over. And what is archived from
        // here on has to stay until they are merged with it.
        let intent = Lease::intent(&self.ctx.repo, self.ctx.source_uid).await?;
        let mut read = job::read_tables(&self.ctx, missing, &self.progress).await?;
        let mut cut = Lsn::ZERO;
        if !read.is_empty() {
            self.progress.phase(Phase::WaitingForStream);
            cut = self.wait_for_marker(read.session()).await?;
            crate::failpoints::hit(crate::failpoints::BASE_AFTER_MARKER)?;
            let ships = self.seen.ships(read.xmin(), cut);
            self.read_unresolved(&rules).await?;
            read.leave_out(|t| {
                let at = self.seen.doubtful(t.rule.relid)?;
                let meanwhile = ships.iter().any(|r| r.from_lsn < at && at <= r.upto_lsn);
                meanwhile.then(|| "rows of it that could not be attributed came while it was read".to_owned())
            });
        }
        let left_out = read.left_out.clone();
        if !read.is_empty() {
            let ships = self.seen.ships(read.xmin(), cut);
            // Definitions that are known to have changed get a record at the place where they did.
            self.new_definitions &= self.definitions_at.is_some();
            let mut done = read.finish(&self.ctx, job, cut, ships, &self.progress).await?;
            let has = |p: &PendingTable| done.base.tables.iter().any(|t| t.relid == p.relid);
            done.base.pending = wanted.into_iter().filter(|p| !has(p)).collect();
            done.base.roles = match self.roles(true).await {
                Ok((_, objects)) => objects,
                Err(e) => self.without_roles(e),
            };
            if done.base.schema.is_some() {
                // The definitions were read behind the cut: a change between the two is in them, and was not at the cut.
                let client = self.session().await?;
                self.wait_for_marker(&client).await?;
                done.base.schema.take_if(|_| self.definitions_at.is_some_and(|at| at > cut));
            }
            self.new_definitions |= done.base.schema.is_none();
            let relids: BTreeSet<u32> = done.base.tables.iter().map(|t| t.relid).collect();
            self.record(done.base, breaks).await?;
            let refers = |r: &LargeObjectsRead| r.columns.iter().any(|c| relids.contains(&c.relid));
            if self.seen.large_objects().is_some_and(refers) {
                (self.objects_due, self.objects_after) = (true, Instant::now());
            }
            tracing::info!(rows = done.rows, "bases are recorded");
        }
        intent.release().await;
        self.ctx.status.set_snapshotting(false);
        let failed = left_out.iter().map(|(t, why)| format!("{t}: {why}")).collect::<Vec<_>>().join("; ");
        self.progress.finish((!failed.is_empty()).then_some(failed.clone()));
        if !failed.is_empty() {
            let message = format!("tables without a base: {failed}");
            self.ctx.alarms.raise(alarms::BASE_FAILED, &self.ctx.source, message);
        }
        Ok(failed.is_empty())
    }

    /// A record of the definitions alone: they changed, and no base was due. Its position is the end of the DDL's
    /// transaction; that no other came before the dump was complete, a marker written after it tells.
    async fn record_definitions(&mut self) -> Result<()> {
        // Before the first connection of this process it is not known which server this is.
        if self.ctx.system().0 == 0 || self.definitions_after > Instant::now() {
            return Ok(());
        }
        let breaks = self.seen.breaks();
        let client = self.session().await?;
        let intent = Lease::intent(&self.ctx.repo, self.ctx.source_uid).await?;
        for _ in 0..DUMPS {
            tokio::time::sleep(DEFINITIONS_REST).await;
            self.hear_all()?;
            self.new_definitions = false;
            // Nobody knows what happened while the agent was away: then the marker is the position.
            let known = self.definitions_at;
            let dump = job::dump(&self.ctx, &client, known.unwrap_or_default()).await;
            let marker = self.wait_for_marker(&client).await?;
            if self.new_definitions {
                continue;
            }
            let schema = match dump {
                Ok(s) => s,
                Err(e) => {
                    tracing::warn!("the schema's definitions are not backed up: {e}");
                    self.new_definitions = true;
                    self.definitions_after = Instant::now() + RETRY.1;
                    return Ok(());
                }
            };
            let base = Base {
                job: Uuid::new_v4(),
                cut_lsn: known.unwrap_or(marker),
                schema: Some(schema),
                database: Some(job::locale(&client).await?),
                // Ships bring the sequences, at positions of their own.
                ..Base::default()
            };
            self.record(base, breaks).await?;
            break;
        }
        intent.release().await;
        Ok(())
    }

    /// The roles of tenants as objects; `all` or only those that differ from what is archived. And where they were read.
    async fn roles(&mut self, all: bool) -> Result<(Lsn, Vec<ObjectRef>)> {
        self.roles_after = Instant::now() + ROLES;
        let client = self.session().await?;
        let read = accounts::read(&client, self.ctx.config.accounts.passwords).await?;
        let at = read.0;
        Ok((at, accounts::archive(&self.ctx, read, self.seen.roles(), all).await?))
    }

    /// Rows are worth more than roles, which the next reading brings.
    fn without_roles(&self, e: Error) -> Vec<ObjectRef> {
        let message = format!("the roles of tenants are not backed up: {}", e.report());
        tracing::warn!("{message}");
        self.ctx.alarms.raise(alarms::ROLES_FAILED, &self.ctx.source, message);
        Vec::new()
    }

    /// A record of the roles alone, when some changed.
    async fn record_roles(&mut self) -> Result<()> {
        if self.ctx.system().0 == 0 || self.roles_after > Instant::now() {
            return Ok(());
        }
        let breaks = self.seen.breaks();
        let (cut_lsn, roles) = match self.roles(false).await {
            Ok(r) => r,
            Err(e) => {
                self.without_roles(e);
                return Ok(());
            }
        };
        self.ctx.alarms.clear(alarms::ROLES_FAILED, &self.ctx.source);
        if roles.is_empty() {
            return Ok(());
        }
        tracing::info!(tenants = roles.len(), "roles of tenants changed");
        self.record(Base { job: Uuid::new_v4(), cut_lsn, roles, ..Base::default() }, breaks).await
    }

    /// Large objects are read when the registry names other columns than those that were read last, when a table that
    /// refers to some got a new base, and once a day.
    async fn record_large_objects(&mut self) -> Result<()> {
        if let Some(task) = self.objects.take_if(|t| t.is_finished()) {
            let read = task.await.unwrap_or_else(|e| Err(Error::other(format!("their reading broke off: {e}"))));
            self.objects_after = Instant::now() + ROLES;
            match read {
                Ok((r, intent, breaks)) => {
                    self.ctx.alarms.clear(alarms::LARGE_OBJECTS_FAILED, &self.ctx.source);
                    tracing::info!(objects = r.objects.len(), at = %r.read.lsn, "large objects are read");
                    let (cut_lsn, large_objects) = (r.read.lsn, r.objects);
                    let large_objects_read = Some(Box::new(r.read));
                    let job = Uuid::new_v4();
                    let base = Base { job, cut_lsn, large_objects, large_objects_read, ..Base::default() };
                    // Of a server that was left meanwhile they are read anew.
                    self.objects_due = true;
                    self.record(base, breaks).await?;
                    self.objects_due = false;
                    intent.release().await;
                    return Ok(());
                }
                Err(e) if e.is_code("yielded") => {
                    tracing::info!("{e}");
                    self.objects_due = true;
                    self.objects_after = Instant::now() + RETRY.0;
                }
                Err(e) => {
                    let message = format!("large objects are not backed up and are tried again: {}", e.report());
                    tracing::warn!("{message}");
                    self.objects_due = true;
                    self.ctx.alarms.raise(alarms::LARGE_OBJECTS_FAILED, &self.ctx.source, message);
                }
            }
        }
        if self.ctx.system().0 == 0 || self.objects.is_some() || self.objects_after > Instant::now() {
            return Ok(());
        }
        let breaks = self.seen.breaks();
        let client = self.session().await?;
        let now: Vec<_> = large_objects::columns(&client).await?.into_iter().map(|(c, _)| c).collect();
        let due = match self.seen.large_objects() {
            None => !now.is_empty(),
            Some(last) => {
                let same = last.columns.iter().map(|c| (c.relid, c.attnum)).eq(now.iter().map(|c| (c.relid, c.attnum)));
                let old = self.ctx.clock.now_us() - last.time_us >= LARGE_OBJECTS_US;
                !same || !now.is_empty() && (old || self.objects_due)
            }
        };
        self.objects_due = false;
        if due {
            let ctx = self.ctx.clone();
            self.objects = Some(tokio::spawn(async move {
                // Reading takes as long as it takes; what is uploaded meanwhile is named by the record at its end.
                let intent = Lease::intent(&ctx.repo, ctx.source_uid).await?;
                Ok((large_objects::read_large_objects(&ctx).await?, intent, breaks))
            }));
        } else {
            self.objects_after = Instant::now() + ROLES;
        }
        Ok(())
    }

    /// A session with the server that the stream comes from.
    async fn session(&self) -> Result<SqlClient> {
        sql::connect(&self.ctx.source_dsn().await?.sending_little()).await
    }

    /// Appends the record, unless the log broke off since `breaks` of it were counted, before anything was read.
    async fn record(&mut self, base: Base, breaks: u64) -> Result<()> {
        let (tables, fulls, cut, job) = (base.tables.len(), base.fulls.len(), base.cut_lsn, base.job);
        let log = self.ctx.log.clone();
        loop {
            let mut log = log.lock().await;
            self.hear_all()?;
            let Some(last) = log.last().cloned() else {
                return Err(Error::other("the log has no record yet"));
            };
            if self.seen.next() <= last.n {
                // Appended and not announced yet.
                drop(log);
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            if self.seen.breaks() != breaks {
                return Err(Error::new(Kind::Fenced, "the log broke off while the base was taken: it is taken again")
                    .code("base_again"));
            }
            let (system_identifier, timeline) = self.ctx.system();
            let draft = Draft {
                system_identifier,
                timeline,
                slot: self.ctx.slot.clone(),
                from_lsn: last.upto_lsn,
                upto_lsn: last.upto_lsn,
                upto_time_us: last.upto_time_us,
                body: Body::Base(base),
            };
            let record = match log.append(draft).await {
                Ok(r) => r,
                Err(e) if e.kind() == Kind::Fenced => return Err(e),
                Err(e) => {
                    // It may be there all the same; the log tells.
                    let writer = log.writer();
                    let mut again = Log::open(&self.ctx.repo, self.ctx.source_uid, None).await?;
                    again.forget_records();
                    let head = again.last().cloned();
                    *log = again;
                    match head {
                        Some(r) if r.writer == writer && matches!(&r.body, Body::Base(b) if b.job == job) => r,
                        _ => return Err(e),
                    }
                }
            };
            // Announced under the lock, so that the order of announcements is the log's.
            self.ctx.publish(record);
            drop(log);
            self.hear_all()?;
            tracing::info!(tables, fulls, %cut, "base record written");
            return Ok(());
        }
    }

    /// Takes in what was announced already.
    fn hear_all(&mut self) -> Result<()> {
        loop {
            match self.durable.try_recv() {
                Ok(d) => {
                    self.note_full(&d.record);
                    if !self.seen.record(&d.record, self.unresolved()) {
                        return Err(again("records of the log were not heard of"));
                    }
                    self.note_break();
                    self.markers(&d);
                }
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Lagged(_)) => return Err(again("records of the log were not heard of")),
                Err(TryRecvError::Closed) => return Err(Error::other("the stream has ended").code("stopping")),
            }
        }
    }
}

/// Ready when there is a task and it has ended.
async fn finished<T>(task: &mut Option<JoinHandle<T>>) {
    loop {
        match task {
            Some(t) if t.is_finished() => return,
            Some(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            None => std::future::pending().await,
        }
    }
}

fn again(why: &str) -> Error {
    Error::new(Kind::Fenced, format!("{why}: the base is taken again")).code("base_again")
}

/// The tables that an object's rows are from: those of its descriptors.
fn relations_of(plain: &mut dyn Read) -> Result<BTreeSet<u32>> {
    let mut out = BTreeSet::new();
    let bad = |e: std::io::Error| Error::new(Kind::Verification, "cannot read an object's frames").source(e);
    loop {
        let mut head = [0u8; 5];
        let n = plain.take(5).read(&mut head).map_err(bad)?;
        if n == 0 {
            return Ok(out);
        }
        plain.read_exact(&mut head[n..]).map_err(bad)?;
        let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
        let mut body = plain.take(u64::from(len));
        if head[0] == coffer_wire::kind::RELATION {
            let mut bytes = Vec::new();
            body.read_to_end(&mut bytes).map_err(bad)?;
            let descriptor = bytes.get(8..).unwrap_or_default();
            out.insert(Relation::decode(descriptor)?.relid);
        } else {
            std::io::copy(&mut body, &mut std::io::sink()).map_err(bad)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::rows::tests::column;
    use coffer_wire::{Class, KeyMode, Strategy, put_relation, put_run_data};

    #[test]
    fn the_tables_of_an_object_are_those_of_its_descriptors() {
        let mut bytes = Vec::new();
        for relid in [9, 7, 9] {
            let r = Relation {
                relid,
                leaf: relid,
                schema: "s".into(),
                name: "t".into(),
                class: Class::Data,
                strategy: Strategy::Tag,
                key_mode: KeyMode::Key,
                columns: vec![column(1, "id", 0)],
                key: vec![0],
            };
            put_relation(&mut bytes, 1, &r.encode());
            put_run_data(&mut bytes, b"rows that do not matter");
        }
        assert_eq!(relations_of(&mut &bytes[..]).unwrap(), BTreeSet::from([7, 9]));
        assert!(relations_of(&mut &bytes[..3]).is_err());
    }
}
