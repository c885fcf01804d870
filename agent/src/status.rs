//! How the agent is: the status document, the metrics, the health check and the page that people look at.
//!
//! One document serves them all (INTERFACES: `status`). It is put together from what the parts of the agent noted, with
//! no request to the source or the stores, so it answers when they do not.

use crate::alarms::{self, Alarm};
use crate::clock::rfc3339;
use crate::demux::Flow;
use crate::error::{Context, Kind, Result};
use crate::run::AgentContext;
use crate::snapshot::progress::{BaseProgress, BaseStatus};
use crate::verify::figures::{ChecksView, Figures};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use coffer_wire::{Lsn, TenantKind};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The status document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Document {
    pub version: u32,
    pub healthy: bool,
    pub alarms: Vec<AlarmView>,
    pub sources: Vec<SourceView>,
    pub stores: Vec<StoreView>,
}

/// See [`Alarm`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AlarmView {
    pub code: String,
    pub message: String,
    pub tenant: Option<String>,
    /// The source or store that it is about; empty for the whole agent.
    #[serde(default)]
    pub scope: String,
}

/// One source.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SourceView {
    pub source: String,
    /// `streaming`, `snapshotting`, `stopped` or `broken`.
    pub state: String,
    pub slot: String,
    pub durable_lsn: Option<String>,
    pub durable_time: Option<String>,
    pub rpo_s: Option<f64>,
    pub slot_lag_bytes: Option<i64>,
    pub tenants: usize,
    pub unresolved_rows: u64,
    pub uncovered_tables: Vec<String>,
    /// Everything up to here has arrived.
    #[serde(default)]
    pub received_lsn: Option<String>,
    #[serde(default)]
    pub buffer_bytes: u64,
    #[serde(default)]
    pub spool_bytes: u64,
    #[serde(default)]
    pub bases: BaseStatus,
    #[serde(default)]
    pub checks: ChecksView,
}

/// One store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreView {
    pub name: String,
    pub required: bool,
    pub up: bool,
    pub durable_lsn: Option<String>,
    #[serde(default)]
    pub last_error: Option<String>,
}

impl From<Alarm> for AlarmView {
    fn from(a: Alarm) -> Self {
        Self { code: a.code.to_owned(), message: a.message, tenant: a.tenant, scope: a.scope }
    }
}

/// What the parts of a source's stream note about it.
pub struct SourceStatus {
    source: String,
    slot: String,
    flow: OnceLock<Arc<Flow>>,
    noted: Mutex<Noted>,
    /// How far bases are.
    pub bases: Arc<BaseProgress>,
    /// What checks found.
    pub checks: Figures,
}

#[derive(Debug, Default)]
struct Noted {
    state: &'static str,
    snapshotting: bool,
    durable: Option<(Lsn, i64)>,
    /// The source's clock minus ours.
    clock_offset_us: i64,
    slot_lag_bytes: Option<i64>,
    /// When fulls were last complete.
    last_full_us: Option<i64>,
    uncovered: Vec<String>,
}

impl SourceStatus {
    pub fn new(source: &str, slot: &str) -> Arc<Self> {
        Arc::new(Self {
            source: source.to_owned(),
            slot: slot.to_owned(),
            flow: OnceLock::new(),
            noted: Mutex::new(Noted { state: "stopped", ..Noted::default() }),
            bases: Arc::default(),
            checks: Figures::default(),
        })
    }

    pub(crate) fn set_flow(&self, flow: Arc<Flow>) {
        // Set once, when the source's stream is built.
        let _ = self.flow.set(flow);
    }

    /// `streaming`, `stopped` or `broken`.
    pub fn set_state(&self, state: &'static str) {
        self.lock().state = state;
    }

    pub fn is_streaming(&self) -> bool {
        self.lock().state == "streaming"
    }

    /// A base is being taken.
    pub fn set_snapshotting(&self, yes: bool) {
        self.lock().snapshotting = yes;
    }

    /// What is durable, and up to which time of the source's clock.
    pub fn set_durable(&self, lsn: Lsn, time_us: i64) {
        self.lock().durable = Some((lsn, time_us));
    }

    pub fn durable(&self) -> (Lsn, i64) {
        self.lock().durable.unwrap_or((Lsn::ZERO, 0))
    }

    /// Fulls were complete at this time, by whichever worker. The latest time that is said counts.
    pub fn full_complete(&self, at_us: i64) {
        let mut n = self.lock();
        if n.last_full_us.is_none_or(|us| us < at_us) {
            n.last_full_us = Some(at_us);
            metrics::gauge!("coffer_last_full_timestamp_seconds", "source" => self.source.clone())
                .set(at_us as f64 / 1e6);
        }
    }

    /// The source's clock minus the agent's.
    pub fn set_source_clock(&self, offset_us: i64) {
        self.lock().clock_offset_us = offset_us;
    }

    pub fn set_slot_lag(&self, bytes: Option<i64>) {
        self.lock().slot_lag_bytes = bytes;
    }

    pub fn set_uncovered(&self, tables: Vec<String>) {
        self.lock().uncovered = tables;
    }

    /// How far what is durable is behind the source's clock; `None` before the first record.
    pub fn rpo(&self, now_us: i64) -> Option<Duration> {
        let n = self.lock();
        let (_, time) = n.durable?;
        Some(Duration::from_micros((now_us + n.clock_offset_us - time).max(0).unsigned_abs()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn view(&self, now_us: i64, tenants: usize) -> SourceView {
        let rpo_s = self.rpo(now_us).map(|d| (d.as_secs_f64() * 1000.0).round() / 1000.0);
        let n = self.lock();
        let flow = self.flow.get();
        SourceView {
            source: self.source.clone(),
            state: if n.snapshotting && n.state == "streaming" { "snapshotting" } else { n.state }.to_owned(),
            slot: self.slot.clone(),
            durable_lsn: n.durable.map(|(l, _)| l.to_string()),
            durable_time: n.durable.map(|(_, t)| rfc3339(t)),
            rpo_s,
            slot_lag_bytes: n.slot_lag_bytes,
            tenants,
            unresolved_rows: flow.map_or(0, |f| f.unresolved_rows()),
            uncovered_tables: n.uncovered.clone(),
            received_lsn: flow.map(|f| f.received().to_string()),
            buffer_bytes: flow.map_or(0, |f| f.held_bytes()),
            spool_bytes: flow.map_or(0, |f| f.spool_bytes()),
            bases: self.bases.status(),
            checks: self.checks.view(),
        }
    }
}

/// The whole agent, as the server shows it.
pub struct AgentStatus {
    contexts: Vec<Arc<AgentContext>>,
    metrics: PrometheusHandle,
}

impl AgentStatus {
    pub fn new(contexts: Vec<Arc<AgentContext>>, metrics: PrometheusHandle) -> Self {
        Self { contexts, metrics }
    }

    /// The document of now.
    pub fn document(&self) -> Document {
        let Some(first) = self.contexts.first() else {
            return Document { version: 1, healthy: false, alarms: vec![], sources: vec![], stores: vec![] };
        };
        let sources: Vec<_> = self
            .contexts
            .iter()
            .map(|c| {
                let tenants = c.keyring.tenants(c.source_uid);
                let normal = tenants.iter().filter(|t| t.tenant.kind == TenantKind::Normal).count();
                c.status.view(c.clock.now_us(), normal)
            })
            .collect();
        let stores = first.repo.status(first.source_uid).into_iter().map(StoreView::from).collect();
        let alarms: Vec<AlarmView> = first.alarms.standing().into_iter().map(Into::into).collect();
        let healthy = alarms.is_empty() && sources.iter().all(|s| s.state == "streaming" || s.state == "snapshotting");
        Document { version: 1, healthy, alarms, sources, stores }
    }

    /// Notes what is only known by looking, once a second.
    fn look(&self) {
        for c in &self.contexts {
            let now = c.clock.now_us();
            let view = c.status.view(now, 0);
            let source = c.source.clone();
            if let Some(rpo) = view.rpo_s {
                metrics::gauge!("coffer_rpo_seconds", "source" => source.clone()).set(rpo);
            }
            if let Some(lag) = view.slot_lag_bytes {
                metrics::gauge!("coffer_slot_lag_bytes", "source" => source.clone()).set(lag as f64);
            }
            metrics::gauge!("coffer_source_up", "source" => source.clone()).set(if c.status.is_streaming() {
                1.0
            } else {
                0.0
            });
            metrics::gauge!("coffer_tenants", "source" => source.clone())
                .set(c.keyring.tenants(c.source_uid).len() as f64);
            metrics::counter!("coffer_unresolved_rows_total", "source" => source.clone())
                .absolute(view.unresolved_rows);
            metrics::gauge!("coffer_uncovered_tables", "source" => source.clone())
                .set(view.uncovered_tables.len() as f64);
            metrics::gauge!("coffer_buffer_bytes", "source" => source.clone()).set(view.buffer_bytes as f64);
            metrics::gauge!("coffer_spool_bytes", "source" => source.clone()).set(view.spool_bytes as f64);
            c.status.checks.gauges(&source);
            if view.unresolved_rows > 0 {
                c.alarms.raise(
                    alarms::UNRESOLVED_ROWS,
                    &c.source,
                    format!(
                        "{} rows could not be attributed to a tenant since the agent started; their tables are closed \
                         for every tenant until new bases are taken",
                        view.unresolved_rows
                    ),
                );
            }
            if let Some(n) = c.status.flow.get().map(|f| f.contradictions()).filter(|n| *n > 0) {
                c.alarms.raise(
                    alarms::CLAIM_CONTRADICTED,
                    &c.source,
                    format!(
                        "{n} times since the agent started a transaction changed rows of a table whose tenant is another than its \
                         session's coffer.tenant; the rows are whose the data says"
                    ),
                );
            }
            if c.status.flow.get().is_some_and(|f| f.is_paused()) {
                c.alarms.raise(
                    alarms::SPOOL_FULL,
                    &c.source,
                    "the spool is full; the source is not read until a ship makes room",
                );
            } else {
                c.alarms.clear(alarms::SPOOL_FULL, &c.source);
            }
        }
        let Some(first) = self.contexts.first() else { return };
        for s in first.repo.status(first.source_uid) {
            metrics::gauge!("coffer_store_up", "store" => s.name.clone()).set(if s.up { 1.0 } else { 0.0 });
            if s.up {
                first.alarms.clear(alarms::STORE_DOWN, &s.name);
            } else {
                let why = s.last_error.unwrap_or_else(|| "it has not answered yet".to_owned());
                first.alarms.raise(alarms::STORE_DOWN, &s.name, format!("store {} is down: {why}", s.name));
            }
        }
        let standing = first.alarms.standing().len();
        metrics::gauge!("coffer_alarms").set(standing as f64);
        if let Some(rss) = resident_bytes() {
            metrics::gauge!("process_resident_memory_bytes").set(rss as f64);
        }
        self.metrics.run_upkeep();
    }
}

impl From<crate::repository::StoreStatus> for StoreView {
    fn from(s: crate::repository::StoreStatus) -> Self {
        Self {
            name: s.name,
            required: s.required,
            up: s.up,
            durable_lsn: s.durable_lsn.map(|l| l.to_string()),
            last_error: s.last_error,
        }
    }
}

/// Resident memory of this process.
fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib =
        text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
    Some(kib << 10)
}

/// The process's metrics. Only the first call has an effect.
pub fn install_metrics() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let recorder = PrometheusBuilder::new().build_recorder();
            let handle = recorder.handle();
            // Fails only when another recorder is installed; then ours shows nothing.
            let _ = metrics::set_global_recorder(recorder);
            describe();
            handle
        })
        .clone()
}

fn describe() {
    use metrics::{describe_counter, describe_gauge};
    describe_gauge!("coffer_rpo_seconds", "How far what is durable is behind the source's clock");
    describe_gauge!("coffer_slot_lag_bytes", "Log that the slot holds");
    describe_gauge!("coffer_store_up", "Whether a store answers");
    describe_gauge!("coffer_source_up", "Whether a source is streamed from");
    describe_gauge!("coffer_tenants", "Tenants with a key");
    describe_gauge!("coffer_uncovered_tables", "Tables without a rule");
    describe_gauge!("coffer_buffer_bytes", "Memory of the stream's buffers");
    describe_gauge!("coffer_spool_bytes", "Bytes in the spool");
    describe_gauge!("coffer_last_prune_timestamp_seconds", "When what retention keeps no more was last removed");
    describe_counter!("coffer_pruned_backups_total", "Backups that retention keeps no more");
    describe_counter!("coffer_pruned_objects_total", "Objects deleted");
    describe_counter!("coffer_pruned_bytes_total", "Bytes of objects deleted, in each store");
    describe_counter!("coffer_prune_runs_total", "Runs of pruning by schedule");
    describe_gauge!("coffer_alarms", "Alarms that stand");
    describe_gauge!("coffer_last_full_timestamp_seconds", "When the last full was complete");
    describe_gauge!("coffer_last_incremental_timestamp_seconds", "When the last incrementals were complete");
    describe_gauge!("coffer_last_validation_timestamp_seconds", "When the last validation passed");
    describe_gauge!(
        "coffer_oldest_validation_timestamp_seconds",
        "When the tenant was validated that waits for longest"
    );
    describe_gauge!("coffer_validation_differing_tenants", "Tenants whose last validation found differences");
    describe_counter!("coffer_validations_total", "Validations, by result: same, differs, not_made");
    describe_gauge!(
        "coffer_last_drill_timestamp_seconds",
        "When a tenant was last restored into a scratch database, rightly"
    );
    describe_gauge!("coffer_drill_failing_tenants", "Tenants whose last restore drill failed");
    describe_counter!("coffer_drills_total", "Restore drills, by result: same, differs, not_made");
    describe_counter!("coffer_scrub_objects_total", "Objects read back by the scrub");
    describe_counter!("coffer_scrub_bytes_total", "Bytes of objects read back by the scrub");
    describe_gauge!("coffer_scrub_damaged_objects", "Objects and chains that are not as they were written");
    describe_gauge!("coffer_scrub_round_ratio", "How much of the scrub's round is done, 0 to 1");
    describe_gauge!("coffer_scrub_round_timestamp_seconds", "When the scrub had last read everything");
    describe_counter!("coffer_unresolved_rows_total", "Rows that capture could not attribute");
    describe_counter!("coffer_records_total", "Records appended to the commit log");
    describe_counter!("coffer_shipped_bytes_total", "Sealed bytes put into each required store");
    describe_counter!("coffer_shipped_rows_total", "Rows shipped");
    describe_counter!("coffer_shipped_transactions_total", "Transactions shipped");
    describe_counter!("coffer_shipped_objects_total", "Objects put into each required store");
}

/// Keeps metrics and alarms up to date.
pub async fn watch(agent: Arc<AgentStatus>, stop: watch::Receiver<bool>) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    while !*stop.borrow() {
        tick.tick().await;
        agent.look();
    }
}

/// Serves `/metrics`, `/healthz` and the page until the agent stops; nothing when `listen` is empty.
pub async fn serve(
    listen: &str,
    agent: Arc<AgentStatus>,
    mut stop: watch::Receiver<bool>,
) -> Result<Option<JoinHandle<()>>> {
    if listen.is_empty() {
        return Ok(None);
    }
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .context(Kind::Usage, format_args!("cannot listen at {listen}"))
        .map_err(|e| e.hint("[status] listen = \"address:port\", or \"\" for none"))?;
    tracing::info!("status page at http://{}/", listener.local_addr().context(Kind::Other, "the status page")?);
    let app = Router::new()
        .route("/", get(page))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics_text))
        .with_state(agent);
    Ok(Some(tokio::spawn(async move {
        let stopped = async move {
            // The sender lives as long as the process.
            let _ = stop.wait_for(|s| *s).await;
        };
        if let Err(e) = axum::serve(listener, app).with_graceful_shutdown(stopped).await {
            tracing::error!("the status page has stopped: {e}");
        }
    })))
}

async fn healthz(State(agent): State<Arc<AgentStatus>>) -> Response {
    let d = agent.document();
    let code = if d.healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::to_string(&d).unwrap_or_default();
    (code, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

async fn metrics_text(State(agent): State<Arc<AgentStatus>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], agent.metrics.render()).into_response()
}

async fn page(State(agent): State<Arc<AgentStatus>>) -> Html<String> {
    Html(html(&agent.document()))
}

fn escape(s: &str) -> String {
    s.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The page: readable without styles, no scripts, reloads itself.
fn html(d: &Document) -> String {
    let mut s = String::from(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"5\">\
         <title>coffer</title><style>body{font:15px/1.5 system-ui,sans-serif;margin:2em;max-width:70em}\
         table{border-collapse:collapse;margin:0 0 2em}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:left}\
         .ok{color:#161}.bad{color:#a11}</style></head><body>",
    );
    // Writing to a String cannot fail.
    let _ = match d.healthy {
        true => write!(s, "<h1 class=\"ok\">healthy</h1>"),
        false => write!(s, "<h1 class=\"bad\">needs attention</h1>"),
    };
    for a in &d.alarms {
        let _ =
            write!(s, "<p class=\"bad\"><b>{}</b> {}: {}</p>", escape(&a.code), escape(&a.scope), escape(&a.message));
    }
    s.push_str(
        "<h2>Sources</h2><table><tr><th>source<th>state<th>durable up to<th>time<th>behind (s)<th>slot<th>slot lag<th>\
         tenants<th>unresolved rows<th>tables not covered</tr>",
    );
    let dash = || "–".to_owned();
    for v in &d.sources {
        let _ = write!(
            s,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
            escape(&v.source),
            escape(&v.state),
            v.durable_lsn.clone().unwrap_or_else(dash),
            v.durable_time.clone().unwrap_or_else(dash),
            v.rpo_s.map_or_else(dash, |r| format!("{r:.1}")),
            escape(&v.slot),
            v.slot_lag_bytes.map_or_else(dash, |b| b.to_string()),
            v.tenants,
            v.unresolved_rows,
            escape(&v.uncovered_tables.join(", ")),
        );
    }
    s.push_str("</table><h2>Checks</h2><ul>");
    for v in &d.sources {
        for line in v.bases.line().into_iter().chain(v.checks.lines()) {
            let _ = write!(s, "<li>{}: {}</li>", escape(&v.source), escape(&line));
        }
    }
    s.push_str("</ul><h2>Stores</h2><table><tr><th>store<th>required<th>state<th>durable up to<th>last error</tr>");
    for v in &d.stores {
        let _ = write!(
            s,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
            escape(&v.name),
            if v.required { "yes" } else { "no" },
            if v.up { "<span class=\"ok\">up</span>" } else { "<span class=\"bad\">down</span>" },
            v.durable_lsn.clone().unwrap_or_else(dash),
            escape(v.last_error.as_deref().unwrap_or("")),
        );
    }
    s.push_str("</table><p><a href=\"/healthz\">healthz</a> · <a href=\"/metrics\">metrics</a></p></body></html>");
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recovery_point_is_by_the_sources_clock() {
        let s = SourceStatus::new("shop", "coffer_shop");
        assert_eq!(s.rpo(10_000_000), None);
        s.set_durable(Lsn(5), 4_000_000);
        assert_eq!(s.rpo(10_000_000), Some(Duration::from_secs(6)));
        s.set_source_clock(-2_000_000);
        assert_eq!(s.rpo(10_000_000), Some(Duration::from_secs(4)));
        assert_eq!(s.rpo(1_000_000), Some(Duration::ZERO));
    }

    #[test]
    fn the_page_escapes_what_it_shows() {
        let d = Document {
            version: 1,
            healthy: false,
            alarms: vec![AlarmView { code: "x".into(), message: "<b>".into(), tenant: None, scope: String::new() }],
            sources: vec![],
            stores: vec![],
        };
        let h = html(&d);
        assert!(h.contains("&lt;b&gt;") && !h.contains(": <b>"));
        let json = serde_json::to_value(&d).unwrap();
        assert_eq!(json["alarms"][0]["tenant"], serde_json::Value::Null);
        assert_eq!(json["sources"], serde_json::json!([]));
    }
}
