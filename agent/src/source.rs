//! The life of one source: check who the server is and where the slot stands, stream, and begin again when the
//! connection ends.
//!
//! The commit log is the truth, never the slot. On every connect the system identifier, the timeline and the slot are
//! compared with it; what they cannot have in common is written down (a gap, another timeline) before anything else is
//! archived, so that no later reader takes a chain for whole that is not.

use crate::alarms;
use crate::compact;
use crate::demux::{self, Flow, Intake, Limits, ShipItem};
use crate::dsn::Server;
use crate::error::{Error, Kind, Result};
use crate::failpoints;
use crate::jobs;
use crate::primary::{self, Found};
use crate::replication::client::{Identity, ReplicationClient};
use crate::replication::sink::Durable;
use crate::replication::stream::{self, Pace, Phase};
use crate::reporter::Reporter;
use crate::repository::Body;
use crate::run::{AgentContext, System};
use crate::seal_pool::SealPool;
use crate::sequences::{self, SequenceNotes};
use crate::ship::{Anchors, CLOCK_MARGIN_US, Shipper};
use crate::snapshot::BaseTaker;
use crate::spool::Spool;
use crate::sql::{self, SqlContext};
use crate::verify::{self, rounds::Look};
use coffer_wire::Lsn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// The output plugin.
const PLUGIN: &str = "pg_coffer";
/// Creating a slot waits for running transactions; after this long it is given up, said, and tried again.
const CREATE_LOCK_TIMEOUT: &str = "SET lock_timeout = '20s'";
/// How often it is asked meanwhile whom the creation of a slot waits for.
const CREATE_LOOK: Duration = Duration::from_secs(3);
/// First and longest wait before the next connection.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// A stream that held for so long makes the next wait the first again.
const STEADY: Duration = Duration::from_secs(60);
/// How often the other hosts are asked whether one of them was promoted.
const LOOK_AROUND: Duration = Duration::from_secs(20);
/// How long a stop waits for jobs to end at their next step; the next agent finishes those that did not.
const JOBS_WAIT: Duration = Duration::from_secs(10);
/// How long a stop waits for what is complete to become durable. Nothing is lost after that: the source still has it.
const STOP_WAIT: Duration = Duration::from_secs(25);

/// Where a slot stands, by `pg_replication_slots`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Slot {
    plugin: String,
    database: String,
    wal_status: String,
    invalidated: Option<String>,
    confirmed: Lsn,
    failover: bool,
}

/// Runs one source until the agent stops. `Err` only for what trying again cannot mend.
pub async fn run(ctx: Arc<AgentContext>, pool: Arc<SealPool>) -> Result<()> {
    let anchors = Arc::new(Anchors::default());
    // Until the first record there is nowhere to stream from.
    let Some(resume) = begin(&ctx, &anchors).await? else { return Ok(()) };
    let flow = Flow::new(
        Limits {
            memory: ctx.memory.stream,
            spool: SPOOL_BYTES,
            interval: ctx.config.ship.interval,
            idle: demux::IDLE_RECORD.min(ctx.config.rpo.limit / 3),
        },
        Spool::new(ctx.config.spool.dir.clone()),
    );
    ctx.status.set_flow(flow.clone());
    let (items_tx, items_rx) = mpsc::unbounded_channel();
    let (intake, _thread) = demux::spawn(&ctx.source, flow.clone(), resume, items_tx.clone())?;
    let (durable_tx, durable) = watch::channel(Durable(resume));
    let (tenants_tx, tenants_rx) = mpsc::unbounded_channel();
    let sequences = Arc::new(SequenceNotes::default());
    let shipper = Shipper {
        ctx: ctx.clone(),
        flow: flow.clone(),
        anchors: anchors.clone(),
        pool,
        durable: durable_tx.clone(),
        new_tenants: tenants_tx,
        sequences: sequences.clone(),
    };
    let mut shipping = tokio::spawn(shipper.run(items_rx));
    let mirror = Arc::new(jobs::Mirror::new(ctx.clone()));
    let helpers = [
        tokio::spawn(Reporter::new(ctx.clone(), flow.clone(), anchors.clone(), tenants_rx, durable.clone()).run()),
        tokio::spawn({
            let ctx = ctx.clone();
            async move { ctx.repo.replicate_optional(ctx.source_uid).await }
        }),
        tokio::spawn({
            let ctx = ctx.clone();
            async move { ctx.repo.pack_log(ctx.source_uid).await }
        }),
        tokio::spawn(crate::prune::watch(ctx.clone())),
        tokio::spawn(compact::on_schedule(ctx.clone())),
        tokio::spawn(verify::rounds::watch(ctx.clone(), mirror.clone(), Look::Live)),
        tokio::spawn(verify::rounds::watch(ctx.clone(), mirror.clone(), Look::Drill)),
        tokio::spawn(verify::scrub::watch(ctx.clone(), mirror.clone())),
        tokio::spawn(sequences::watch(ctx.clone(), sequences.clone())),
    ];
    let mut served = tokio::spawn(jobs::run(ctx.clone(), flow, mirror));
    let mut bases = tokio::spawn(take_bases(ctx.clone()));
    let source = Source { ctx: ctx.clone(), anchors, intake, items: items_tx, sequences, durable: durable_tx };
    let ended = |r: Result<Result<()>, tokio::task::JoinError>| match r {
        Ok(Ok(())) => Err(Error::other("the shipping of changes has stopped")),
        Ok(Err(e)) => Err(e),
        Err(e) => Err(Error::other("the shipping of changes panicked").source(e)),
    };
    let result = tokio::select! {
        biased;
        r = &mut shipping => ended(r),
        r = &mut bases => r.unwrap_or_else(|e| Err(Error::other("the taking of bases panicked").source(e))),
        r = source.sessions(resume) => match r {
            Ok(()) => Ok(()),
            // When shipping ended, its own error says why; the session only noticed.
            Err(e) => match tokio::time::timeout(Duration::from_millis(500), &mut shipping).await {
                Ok(r) => ended(r),
                Err(_) => Err(e),
            },
        },
    };
    // A restore that has begun to write takes its fences away before it ends.
    if result.is_err() || tokio::time::timeout(JOBS_WAIT, &mut served).await.is_err() {
        served.abort();
    }
    for h in helpers {
        h.abort();
    }
    bases.abort();
    shipping.abort();
    ctx.status.set_state(if result.is_ok() { "stopped" } else { "broken" });
    result
}

/// Takes bases for as long as the source lives. Ends only when another agent writes the log.
async fn take_bases(ctx: Arc<AgentContext>) -> Result<()> {
    // Not before the server was compared with the log: a base of another cluster, or of a timeline that the log does not
    // know of yet, would be worthless.
    while !ctx.status.is_streaming() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    loop {
        let e = match BaseTaker::spawn(ctx.clone()).await {
            Ok(Ok(())) => return std::future::pending().await,
            Ok(Err(e)) if e.kind() == Kind::Fenced => return Err(e),
            Ok(Err(e)) => e,
            Err(e) => Error::other("the taking of bases panicked").source(e),
        };
        ctx.alarms.raise(alarms::BASE_FAILED, &ctx.source, format!("bases stopped, and begin again in a minute: {e}"));
        tokio::select! {
            () = tokio::time::sleep(BASES_AGAIN) => {}
            () = ctx.stopped() => return std::future::pending().await,
        }
    }
}

/// How long bases rest after an error that they do not try again by themselves.
const BASES_AGAIN: Duration = Duration::from_secs(60);

/// Bytes in the spool beyond which the stream waits for ships.
const SPOOL_BYTES: u64 = 8 << 30;

/// Sees to it that the log has a first record; the position to stream from, or `None` when told to stop first.
async fn begin(ctx: &Arc<AgentContext>, anchors: &Anchors) -> Result<Option<Lsn>> {
    let mut wait = RECONNECT.0;
    loop {
        if let Some(upto) = ctx.log.lock().await.upto_lsn() {
            return Ok(Some(upto));
        }
        let begun = tokio::select! {
            r = first_record(ctx) => r,
            // A source that does not answer holds no stop up; what is half done the next start finds, as after a kill.
            () = ctx.stopped() => return Ok(None),
        };
        let e = match begun {
            Ok(()) => {
                anchors.clear();
                continue;
            }
            Err(e) => e,
        };
        report_down(ctx, e, false)?;
        tokio::select! {
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(RECONNECT.1),
            () = ctx.stopped() => return Ok(None),
        }
    }
}

/// Raises the alarm for what trying again may mend; gives back what it cannot. `streamed`: there was a stream before.
fn report_down(ctx: &AgentContext, e: Error, streamed: bool) -> Result<()> {
    // The address may lead to the server that is about to be promoted.
    let again = primary::may_pass(&e) || (streamed && e.is_code("standby"));
    if !again {
        return Err(e);
    }
    ctx.status.set_state("broken");
    ctx.alarms.raise(alarms::SOURCE_DOWN, &ctx.source, format!("{e}; trying again"));
    Ok(())
}

/// Takes over or creates the slot and writes the log's first record.
async fn first_record(ctx: &AgentContext) -> Result<()> {
    let found = primary::find(&ctx.dsn, None).await?;
    ctx.set_system(System::of(&found));
    let Found { mut client, identity, .. } = found;
    // Read before the slot exists: every commit after its consistent point is later.
    let before = source_now(&mut client).await?;
    let found = slot(&mut client, &ctx.slot, &identity).await?;
    note_failover(ctx, found.as_ref());
    let from = match found {
        Some(s) if s.is_lost() => recreate(ctx, &mut client).await?,
        // A server notices only when its wait is over that who asked for the slot is gone.
        Some(s) if s.confirmed == Lsn::ZERO => {
            let what =
                format!("slot {} is still being made for another session, which waits for transactions", ctx.slot);
            return Err(Error::new(Kind::Unreachable, what));
        }
        // Made by hand, or by an agent that was killed before it wrote the record.
        Some(s) => s.confirmed,
        None => create(ctx, &mut client).await?,
    };
    failpoints::hit(failpoints::SLOT_AFTER_CREATE)?;
    let record = ctx.append(from, from, before - CLOCK_MARGIN_US, Body::Init).await?;
    tracing::info!(source = ctx.source, slot = ctx.slot, "the log begins at {from}");
    ctx.status.set_durable(record.upto_lsn, record.upto_time_us);
    ctx.publish(record);
    Ok(())
}

/// What the sessions of a source share.
struct Source {
    ctx: Arc<AgentContext>,
    anchors: Arc<Anchors>,
    intake: Intake,
    items: mpsc::UnboundedSender<ShipItem>,
    sequences: Arc<SequenceNotes>,
    /// What the server is told; the shipper's as well.
    durable: watch::Sender<Durable>,
}

impl Source {
    /// One connection after the other, until the agent stops.
    async fn sessions(&self, mut resume: Lsn) -> Result<()> {
        let (mut wait, mut streamed) = (RECONNECT.0, false);
        loop {
            let started = tokio::time::Instant::now();
            let e = tokio::select! {
                r = self.session(resume) => match r {
                    Ok(()) => return Ok(()),
                    Err(e) => e,
                },
                // Before streaming has begun there is nothing of this session to ship.
                () = self.stopped_before_streaming() => return self.finish().await,
            };
            resume = self.intake.end_session().await?;
            streamed |= self.ctx.status.is_streaming();
            report_down(&self.ctx, e, streamed)?;
            if started.elapsed() > STEADY {
                wait = RECONNECT.0;
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => wait = (wait * 2).min(RECONNECT.1),
                () = self.ctx.stopped() => return self.finish().await,
            }
        }
    }

    /// Ready when the agent stops while no stream runs; a running stream stops in its own way.
    async fn stopped_before_streaming(&self) {
        loop {
            self.ctx.stopped().await;
            if !self.ctx.status.is_streaming() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Ships what is complete without a connection.
    async fn finish(&self) -> Result<()> {
        self.intake.flush().await?;
        self.settled().await;
        Ok(())
    }

    /// Waits until everything handed to the shipper is durable, for a while.
    async fn settled(&self) {
        if tokio::time::timeout(STOP_WAIT, self.barrier()).await.is_err() {
            tracing::warn!("stopping with changes that are not durable yet: the source keeps them for the next start");
        }
    }

    async fn barrier(&self) -> Result<()> {
        let (tx, rx) = oneshot::channel();
        let gone = || Error::other("the shipping of changes has stopped");
        self.items.send(ShipItem::Barrier(tx)).map_err(|_| gone())?;
        rx.await.map_err(|_| gone())
    }

    /// Connects, checks, streams. `Ok` when the agent was told to stop and everything complete was shipped.
    async fn session(&self, resume: Lsn) -> Result<()> {
        let ctx = &self.ctx;
        let mut found = primary::find(&ctx.dsn, Some(&ctx.followed().await?)).await?;
        let resume = self.check(&mut found, resume).await?;
        let Found { mut client, server, .. } = found;
        let timeout = setting_ms(&mut client, "wal_sender_timeout").await?;
        client.start(&ctx.slot, resume, &[("format", "frames")]).await?;
        tracing::info!(source = ctx.source, server = %server.host, tls = client.is_tls(), "streaming from {resume}");
        ctx.alarms.clear(alarms::SOURCE_DOWN, &ctx.source);
        ctx.status.set_state("streaming");
        let (phase_tx, phase) = watch::channel(Phase::Stream);
        let mut sink = self.intake.clone();
        let streaming = stream::run(client, &mut sink, self.durable.subscribe(), phase, Pace::for_timeout(timeout));
        tokio::pin!(streaming);
        tokio::select! {
            r = &mut streaming => return r.and_then(|()| Err(Error::new(Kind::Unreachable, "the stream ended"))),
            e = left_behind(ctx, &server) => return Err(e),
            () = ctx.stopped() => {}
        }
        phase_tx.send_replace(Phase::Drain);
        let shipped = async {
            self.intake.flush().await?;
            self.settled().await;
            phase_tx.send_replace(Phase::Close);
            Ok::<_, Error>(())
        };
        // The connection may break while the last ship is under way; the ship matters, not the connection.
        tokio::pin!(shipped);
        tokio::select! {
            r = &mut shipped => {
                r?;
                if let Err(e) = streaming.await {
                    tracing::warn!("the server did not hear the last position: {e}");
                }
                Ok(())
            }
            r = &mut streaming => {
                if let Err(e) = r {
                    tracing::warn!("the connection ended while stopping: {e}");
                }
                shipped.await
            }
        }
    }

    /// Writes down what the server has other than the log, and compares what that leaves. Where to stream from.
    async fn check(&self, found: &mut Found, resume: Lsn) -> Result<Lsn> {
        let ctx = &self.ctx;
        let (_, timeline) = ctx.system();
        let mut resume = resume;
        if found.identity.timeline > timeline {
            resume = self.switch(timeline, found).await?;
        }
        let durable = ctx.log.lock().await.upto_lsn().unwrap_or(resume);
        // What was read of it and is not durable yet came from a server that had flushed it.
        let read = durable.max(resume);
        if found.identity.flushed < read {
            return Err(primary::went_back(&found.server.host, &found.identity, read));
        }
        ctx.set_system(System::of(found));
        let Found { client, identity, .. } = found;
        let found = slot(client, &ctx.slot, identity).await?;
        note_failover(ctx, found.as_ref());
        match found {
            Some(s) if s.is_lost() => {
                let why = s.invalidated.unwrap_or_else(|| "wal_removed".to_owned());
                tracing::warn!(source = ctx.source, slot = ctx.slot, why, "the slot is lost");
                self.gap(client, "slot_lost".to_owned(), None).await
            }
            None => self.gap(client, "slot_lost".to_owned(), None).await,
            Some(s) if s.confirmed > durable => self.gap(client, "slot_ahead".to_owned(), Some(s.confirmed)).await,
            Some(s) => {
                if s.wal_status == "unreserved" {
                    slot_at_risk(ctx);
                }
                Ok(resume)
            }
        }
    }

    /// Another timeline: everything read so far becomes durable, then the log says where it was left.
    async fn switch(&self, from: u32, to: &Found) -> Result<Lsn> {
        let ctx = &self.ctx;
        self.intake.flush().await?;
        self.barrier().await?;
        let left = to.history.iter().find(|s| s.timeline == from);
        let left = left.ok_or_else(|| Error::other(format!("nobody knows where timeline {from} was left")))?;
        let (upto, time) = {
            let log = ctx.log.lock().await;
            let r = log.last().ok_or_else(|| Error::other("the log is empty"))?;
            (r.upto_lsn, r.upto_time_us)
        };
        let at = left.at.min(upto);
        // The new server's commits beyond it have positions that the old one's had: none of them is durable. Said first, so
        // that nobody tells the new server otherwise.
        self.durable.send_replace(Durable(at));
        ctx.status.set_durable(at, time);
        if left.at < upto {
            ctx.alarms.raise(
                alarms::GAP,
                &ctx.source,
                format!(
                    "the source was promoted to timeline {} at {}, and {} bytes that were archived beyond it are an \
                     abandoned branch; new bases follow",
                    to.server.timeline,
                    left.at,
                    upto.0 - left.at.0
                ),
            );
        }
        let body = Body::Timeline { from, to: to.server.timeline, at: left.at };
        let record = ctx.append_on(Some(System::of(to)), at, at, time, body).await?;
        // What was read beside the stream until here is the old server's.
        self.anchors.clear();
        self.sequences.forget();
        tracing::warn!(source = ctx.source, "timeline {} follows {from} at {}", to.server.timeline, left.at);
        ctx.publish(record);
        self.intake.jump(at)?;
        Ok(at)
    }

    /// What lies between the log and the slot is lost: the log says so, and goes on where the slot does.
    async fn gap(&self, client: &mut ReplicationClient, reason: String, slot_at: Option<Lsn>) -> Result<Lsn> {
        let ctx = &self.ctx;
        // What is whole and was read before the loss is still good.
        self.intake.flush().await?;
        self.barrier().await?;
        let before = source_now(client).await?;
        let upto = match slot_at {
            Some(l) => l,
            None => recreate(ctx, client).await?,
        };
        let from = ctx.log.lock().await.upto_lsn().unwrap_or(upto);
        if from >= upto {
            // What was still on its way has reached the slot: nothing is missing.
            return Ok(from);
        }
        ctx.alarms.raise(
            alarms::GAP,
            &ctx.source,
            format!("{reason}: changes between {from} and {upto} are not in the repository; new bases follow"),
        );
        let record = ctx.append(from, upto, before - CLOCK_MARGIN_US, Body::Gap { reason }).await?;
        ctx.status.set_durable(record.upto_lsn, record.upto_time_us);
        ctx.publish(record);
        self.intake.jump(upto)?;
        Ok(upto)
    }
}

/// Ready when another host was promoted beside the server of the stream, which goes on and knows nothing of it.
async fn left_behind(ctx: &AgentContext, server: &Server) -> Error {
    let Some(others) = ctx.dsn.without_host(&server.host) else { return std::future::pending().await };
    loop {
        tokio::time::sleep(LOOK_AROUND).await;
        let Ok(followed) = ctx.followed().await else { continue };
        let Ok(found) = primary::find(&others, Some(&followed)).await else { continue };
        if found.server.timeline > server.timeline {
            let what = format!("{} was promoted, and leaves {server} behind", found.server);
            return Error::new(Kind::Unreachable, what);
        }
    }
}

fn slot_at_risk(ctx: &AgentContext) {
    ctx.alarms.raise(
        alarms::SLOT_AT_RISK,
        &ctx.source,
        format!(
            "slot {} is further behind than max_slot_wal_keep_size: its log is removed at the next checkpoint",
            ctx.slot
        ),
    );
}

impl Slot {
    fn is_lost(&self) -> bool {
        self.wal_status == "lost" || self.invalidated.is_some()
    }
}

/// The slot by its name; an error when it is somebody else's.
async fn slot(client: &mut ReplicationClient, name: &str, identity: &Identity) -> Result<Option<Slot>> {
    let sql = format!(
        "SELECT coalesce(plugin, ''), coalesce(database, ''), coalesce(wal_status, ''), \
         coalesce(pg_catalog.to_jsonb(s) ->> 'invalidation_reason', \
                  CASE WHEN (pg_catalog.to_jsonb(s) ->> 'conflicting')::bool THEN 'conflict' END), \
         coalesce(confirmed_flush_lsn, '0/0'), (pg_catalog.to_jsonb(s) ->> 'failover')::bool \
         FROM pg_catalog.pg_replication_slots s WHERE slot_name = '{}'",
        name.replace('\'', "''")
    );
    let rows = client.query(&sql).await?;
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let text = |i: usize| row.get(i).cloned().flatten().unwrap_or_default();
    let s = Slot {
        plugin: text(0),
        database: text(1),
        wal_status: text(2),
        invalidated: row.get(3).cloned().flatten(),
        confirmed: text(4).parse().map_err(Error::other)?,
        failover: text(5) == "t",
    };
    if s.plugin != PLUGIN || s.database != identity.dbname {
        return Err(Error::new(
            Kind::Refused,
            format!(
                "replication slot {name} is not ours: plugin '{}' in database '{}', expected '{PLUGIN}' in '{}'",
                s.plugin, s.database, identity.dbname
            ),
        )
        .hint("choose another name: [source.NAME] slot"));
    }
    Ok(Some(s))
}

/// One that has to be made anew is made like it.
fn note_failover(ctx: &AgentContext, slot: Option<&Slot>) {
    if let Some(s) = slot {
        ctx.is_failover_slot.store(s.failover, Ordering::Relaxed);
    }
}

async fn create(ctx: &AgentContext, client: &mut ReplicationClient) -> Result<Lsn> {
    client.query(CREATE_LOCK_TIMEOUT).await?;
    let pid = client.query("SELECT pg_catalog.pg_backend_pid()").await?;
    let pid = pid.into_iter().flatten().next().flatten().unwrap_or_default();
    let mut waits = format!("slot {} waits for transactions that were running when its creation began", ctx.slot);
    let r = {
        let made = client.create_slot(&ctx.slot, PLUGIN, ctx.is_failover_slot.load(Ordering::Relaxed));
        tokio::pin!(made);
        loop {
            tokio::select! {
                r = &mut made => break r,
                () = tokio::time::sleep(CREATE_LOOK) => match held_up_by(ctx, &pid).await {
                    Ok(Some(who)) => {
                        waits = format!("slot {} can be made once a transaction has ended: {who}", ctx.slot);
                        ctx.alarms.raise(alarms::SOURCE_DOWN, &ctx.source, waits.clone());
                    }
                    Ok(None) => {}
                    Err(e) => tracing::debug!("whom the slot waits for is not known: {e}"),
                },
            }
        }
    };
    match r {
        Ok(at) => {
            tracing::info!(source = ctx.source, slot = ctx.slot, "slot created at {at}");
            client.query("SET lock_timeout = 0").await?;
            Ok(at)
        }
        Err(e) if e.is_code("lock_timeout") => Err(Error::new(Kind::Unreachable, waits).hint(
            "SELECT pid, xact_start, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start",
        )),
        Err(e) => Err(e.during(format_args!("cannot create slot {}", ctx.slot)).hint(
            "needs wal_level = logical, CREATE EXTENSION pg_coffer, and coffer.setup_agent(role) for the agent's role",
        )),
    }
}

/// The transaction that the session `pid` waits for, as far as the agent's role may know it.
async fn held_up_by(ctx: &AgentContext, pid: &str) -> Result<Option<String>> {
    let client = sql::connect(&ctx.source_dsn().await?).await?;
    let row = client
        .query_one(
            "SELECT pg_catalog.string_agg(CASE b WHEN 0 THEN 'a prepared one, see pg_prepared_xacts' ELSE \
                pg_catalog.concat_ws(' ', 'pid', b, 'in database', a.datname, '(' || a.state || ')', \
                    'for ' || pg_catalog.date_trunc('second', pg_catalog.now() - a.xact_start)) END, ', ') \
             FROM pg_catalog.unnest(pg_catalog.pg_blocking_pids($1::text::int4)) b \
             LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b",
            &[&pid],
        )
        .await
        .sql("cannot look for the transaction")?;
    Ok(row.get(0))
}

async fn recreate(ctx: &AgentContext, client: &mut ReplicationClient) -> Result<Lsn> {
    let name = ctx.slot.replace('\'', "''");
    client
        .query(&format!(
            "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots \
             WHERE slot_name = '{name}'"
        ))
        .await?;
    create(ctx, client).await
}

/// The source's clock, microseconds since 1970-01-01 UTC.
async fn source_now(client: &mut ReplicationClient) -> Result<i64> {
    let rows = client.query("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").await?;
    let text = rows.first().and_then(|r| r.first()).cloned().flatten();
    text.and_then(|t| t.parse().ok()).ok_or_else(|| Error::other("the server does not say what time it is"))
}

/// A setting that `pg_settings` keeps in milliseconds.
async fn setting_ms(client: &mut ReplicationClient, name: &str) -> Result<Duration> {
    let rows = client.query(&format!("SELECT setting FROM pg_catalog.pg_settings WHERE name = '{name}'")).await?;
    let text = rows.first().and_then(|r| r.first()).cloned().flatten();
    Ok(Duration::from_millis(text.and_then(|t| t.parse().ok()).unwrap_or(60_000)))
}
