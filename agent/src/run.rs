//! `coffer run`: one process, one stream per source, the status page.
//!
//! [`AgentContext`] is what everything that works for one source shares; the source's own life is in [`crate::source`].

use crate::alarms::Alarms;
use crate::clock::{SharedClock, SystemClock};
use crate::config::Config;
use crate::damage::Damage;
use crate::dial;
use crate::dsn::{Dsn, Server};
use crate::error::{Context, Error, Kind, Result};
use crate::keyring::Keyring;
use crate::primary::{Followed, Found};
use crate::replication::client::Switch;
use crate::repository::{Access, Body, Log, LogRecord, Repository};
use crate::seal_pool::SealPool;
use crate::ship::Durable;
use crate::source;
use crate::sql::SqlClient;
use crate::status::{self, AgentStatus, SourceStatus};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::{Mutex, broadcast, watch};
use tokio::task::JoinSet;
use uuid::Uuid;

/// How `limits.memory` is divided, in bytes. The rest is for what is sealed and on its way, and for the process itself.
#[derive(Clone, Copy, Debug)]
pub struct MemoryShares {
    /// Buffers of the stream.
    pub stream: u64,
    /// Sorting and merging of bases.
    pub base: u64,
    /// Merging of one job from SQL; two may run at a time.
    pub job: usize,
    /// The same of fulls.
    pub compact: u64,
    /// One comparison with live rows.
    pub check: usize,
}

/// A comparison with less would go to the disk with every few rows.
const LEAST_CHECK: usize = 8 << 20;

/// How long a session waits for the stream to meet its server.
const SERVER_WAIT: Duration = Duration::from_secs(10);

impl MemoryShares {
    /// The shares of one of `sources` sources.
    pub fn of(memory: u64, sources: usize) -> Self {
        let each = memory / sources.max(1) as u64;
        let job = usize::try_from(each / 10).unwrap_or(usize::MAX);
        Self { stream: each / 5, base: each / 4, job, compact: each / 8, check: (job / 2).max(LEAST_CHECK) }
    }
}

/// The server that a source's stream comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct System {
    pub system_identifier: u64,
    pub timeline: u32,
    /// Where timelines before were left: what the log says of that, or all that the server knows.
    pub history: Vec<Switch>,
    /// The server itself, once the stream has met it.
    pub server: Option<Server>,
}

impl System {
    pub(crate) fn of(found: &Found) -> Self {
        Self {
            system_identifier: found.server.system_identifier,
            timeline: found.server.timeline,
            history: found.history.clone(),
            server: Some(found.server.clone()),
        }
    }

    fn of_log(log: &Log) -> Self {
        let Some(last) = log.last() else { return Self::default() };
        let left = |r: &Arc<LogRecord>| match r.body {
            Body::Timeline { from, at, .. } => Some(Switch { timeline: from, at }),
            _ => None,
        };
        Self {
            system_identifier: last.system_identifier,
            timeline: last.timeline,
            history: log.records().iter().filter_map(left).collect(),
            server: None,
        }
    }
}

/// What everything that works for one source shares.
pub struct AgentContext {
    pub config: Arc<Config>,
    /// The source's name in the configuration.
    pub source: String,
    pub source_uid: Uuid,
    pub slot: String,
    pub repo: Arc<Repository>,
    pub keyring: Arc<Keyring>,
    pub log: Arc<Mutex<Log>>,
    /// Every record as it becomes durable, in the log's order.
    pub durable: broadcast::Sender<Durable>,
    pub dsn: Dsn,
    pub clock: SharedClock,
    pub rt: tokio::runtime::Handle,
    pub memory: MemoryShares,
    pub alarms: Arc<Alarms>,
    pub status: Arc<SourceStatus>,
    /// True when the agent is stopping.
    pub stop: watch::Receiver<bool>,
    pub(crate) system: watch::Sender<System>,
    pub(crate) damage: Damage,
    /// The slot was last seen as one that standbys keep up.
    pub(crate) is_failover_slot: AtomicBool,
}

impl AgentContext {
    /// System identifier and timeline of the server, as last checked.
    pub fn system(&self) -> (u64, u32) {
        let s = self.system.borrow();
        (s.system_identifier, s.timeline)
    }

    fn server(&self) -> Option<Server> {
        self.system.borrow().server.clone()
    }

    /// Where sessions beside the stream go: to the very server that it comes from, and to no other one that the connection
    /// string names. A stream that has not met its server yet is waited for, for a while.
    pub async fn source_dsn(&self) -> Result<Dsn> {
        let mut system = self.system.subscribe();
        tokio::select! {
            biased;
            met = system.wait_for(|s| s.server.is_some()) => {
                if let Some(server) = met.ok().and_then(|s| s.server.clone()) {
                    return Ok(self.dsn.with_server(&server));
                }
            }
            () = tokio::time::sleep(SERVER_WAIT) => {}
            () = self.stopped() => {}
        }
        Err(Error::new(Kind::Unreachable, "the stream has not found the server that the log follows yet"))
    }

    /// Whether a session is with the server that the log follows now.
    pub fn follows(&self, session: &SqlClient) -> bool {
        matches!((session.server(), self.server()), (Some(a), Some(b)) if a.is(&b))
    }

    /// An error when a session is with a server that the log has left.
    pub fn require_followed(&self, session: &SqlClient) -> Result<()> {
        if self.follows(session) {
            return Ok(());
        }
        let name = |s: Option<&Server>| s.map_or_else(|| "nobody".to_owned(), ToString::to_string);
        let what = format!(
            "the session is with {}, and the log follows {}",
            name(session.server()),
            name(self.server().as_ref())
        );
        Err(Error::new(Kind::Unreachable, what).code("other_server"))
    }

    /// What a server has to be like to be followed.
    pub(crate) async fn followed(&self) -> Result<Followed> {
        let log = self.log.lock().await;
        let last = log.last().ok_or_else(|| Error::other("the log is empty"))?;
        let switches = self.system.borrow().history.clone();
        Ok(Followed {
            source: self.source.clone(),
            system_identifier: last.system_identifier,
            timeline: last.timeline,
            switches,
            durable: last.upto_lsn,
        })
    }

    pub(crate) fn set_system(&self, s: System) {
        self.system.send_replace(s);
    }

    /// Tells the listeners of a record without transactions.
    pub fn publish(&self, record: Arc<LogRecord>) {
        // Nobody listening is no error.
        let _ = self.durable.send(Durable { record, markers: Arc::default() });
    }

    /// Whether the agent is stopping.
    pub fn is_stopping(&self) -> bool {
        *self.stop.borrow()
    }

    /// Ready when the agent is stopping.
    pub async fn stopped(&self) {
        let mut stop = self.stop.clone();
        // The sender lives as long as the process; its end is a stop too.
        let _ = stop.wait_for(|s| *s).await;
    }
}

/// Runs the agent until it is told to stop (SIGTERM, SIGINT) or a source cannot go on.
pub async fn run(config: Config) -> Result<()> {
    if config.source.is_empty() {
        return Err(Error::usage("the configuration has no [source.NAME] section"));
    }
    // First: whoever stops an agent that has just been started gets an orderly end as well.
    let mut signals = Signals::new()?;
    dial::install_crypto_provider();
    let clock: SharedClock = Arc::new(SystemClock);
    let config = Arc::new(config);
    let recorder = status::install_metrics();
    let Some(keyring) = signals.before(Keyring::open(&config.keys, clock.clone())).await? else { return Ok(()) };
    let opening = Repository::open(&config, keyring.clone(), clock.clone(), Access::Write);
    let Some(repo) = signals.before(opening).await? else { return Ok(()) };
    let alarms = Arc::new(Alarms::default());
    let pool = Arc::new(SealPool::new()?);
    let (stop_tx, stop) = watch::channel(false);

    let mut contexts = Vec::new();
    for (name, source) in &config.source {
        let dsn = Dsn::parse(&source.url).map_err(|e| e.during(format_args!("[source.{name}] url")))?;
        let Some(source_uid) = signals.before(keyring.ensure_source(name)).await? else { return Ok(()) };
        let Some(mut log) = signals.before(Log::open(&repo, source_uid, None)).await? else { return Ok(()) };
        keyring.require(log.records().iter().flat_map(|r| r.objects()).map(|o| o.key()))?;
        let status = SourceStatus::new(name, &source.slot_name(name));
        let system = System::of_log(&log);
        if let Some(last) = log.last() {
            status.set_durable(last.upto_lsn, last.upto_time_us);
        }
        // The newest record is all that a writer needs; bases read the log on their own.
        log.forget_records();
        contexts.push(Arc::new(AgentContext {
            config: config.clone(),
            source: name.clone(),
            source_uid,
            slot: source.slot_name(name),
            repo: repo.clone(),
            keyring: keyring.clone(),
            log: Arc::new(Mutex::new(log)),
            durable: broadcast::channel(1024).0,
            dsn,
            clock: clock.clone(),
            rt: tokio::runtime::Handle::current(),
            memory: MemoryShares::of(config.limits.memory, config.source.len()),
            alarms: alarms.clone(),
            status,
            stop: stop.clone(),
            system: watch::Sender::new(system),
            damage: Damage::default(),
            is_failover_slot: AtomicBool::new(false),
        }));
    }

    let agent = Arc::new(AgentStatus::new(contexts.clone(), recorder));
    let server = status::serve(&config.status.listen, agent.clone(), stop.clone()).await?;
    let watcher = tokio::spawn(status::watch(agent, stop.clone()));

    let mut sources = JoinSet::new();
    for ctx in contexts {
        sources.spawn(source::run(ctx, pool.clone()));
    }
    let mut first_error = None;
    loop {
        tokio::select! {
            name = signals.next(), if !*stop_tx.borrow() => {
                tracing::info!("{name}: shipping what is complete, then stopping");
                stop_tx.send_replace(true);
            }
            ended = sources.join_next() => match ended {
                None => break,
                Some(r) => {
                    let r = r.unwrap_or_else(|e| Err(Error::other("a source's task panicked").source(e)));
                    if let Err(e) = r {
                        tracing::error!("{e}");
                        first_error.get_or_insert(e);
                    }
                    // One agent, one fate: a supervisor restarts it, and the others resume from their logs.
                    stop_tx.send_replace(true);
                }
            },
        }
    }
    watcher.abort();
    if let Some(s) = server {
        // Clients that hold their connection open do not hold the agent.
        let _ = tokio::time::timeout(Duration::from_secs(2), s).await;
    }
    first_error.map_or(Ok(()), Err)
}

/// SIGTERM and SIGINT.
struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let what = "cannot listen for signals";
        Ok(Self {
            term: signal(SignalKind::terminate()).context(Kind::Other, what)?,
            int: signal(SignalKind::interrupt()).context(Kind::Other, what)?,
        })
    }

    /// What `f` gives, or nothing when a signal comes before that.
    async fn before<T>(&mut self, f: impl Future<Output = Result<T>>) -> Result<Option<T>> {
        tokio::select! {
            biased;
            name = self.next() => {
                tracing::info!("{name}: nothing was begun yet");
                Ok(None)
            }
            done = f => done.map(Some),
        }
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}
