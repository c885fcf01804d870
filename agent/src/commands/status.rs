//! `coffer status`: the running agent's own account, or, without one, what the repository and the source say.

use crate::clock::{SystemClock, rfc3339};
use crate::config::Config;
use crate::dial;
use crate::dsn::Dsn;
use crate::error::{Context, Kind, Result};
use crate::keyring::Keyring;
use crate::repository::{Access, Log, Repository};
use crate::sql::{self, SqlContext};
use crate::status::{AlarmView, Document, SourceView, StoreView};
use coffer_wire::TenantKind;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// An agent that does not answer within this is as good as none.
const AGENT_WAIT: Duration = Duration::from_secs(3);

/// Prints the status; whether all is well.
pub async fn run(config: &Config, source: Option<&str>, json: bool) -> Result<bool> {
    if let Some(name) = source {
        config.pick_source(Some(name))?;
    }
    let mut document = match ask_agent(&config.status.listen).await {
        Some(d) => d,
        None => without_agent(config).await?,
    };
    if let Some(name) = source {
        document.sources.retain(|s| s.source == name);
    }
    if json {
        println!("{}", serde_json::to_string(&document).context(Kind::Other, "cannot encode the status")?);
    } else {
        print!("{}", text(&document));
    }
    Ok(document.healthy)
}

/// The document of a running agent; `None` when nobody answers as one.
async fn ask_agent(listen: &str) -> Option<Document> {
    if listen.is_empty() {
        return None;
    }
    // An agent that listens everywhere is asked here.
    let address = listen.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:");
    let asked = async {
        let mut s = tokio::net::TcpStream::connect(&address).await.ok()?;
        let request = format!("GET /healthz HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        s.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        s.take(16 << 20).read_to_end(&mut answer).await.ok()?;
        let at = memchr::memmem::find(&answer, b"\r\n\r\n")?;
        serde_json::from_slice(&answer[at + 4..]).ok()
    };
    tokio::time::timeout(AGENT_WAIT, asked).await.ok().flatten()
}

/// What can be known without an agent.
async fn without_agent(config: &Config) -> Result<Document> {
    dial::install_crypto_provider();
    let clock = Arc::new(SystemClock);
    let mut alarms = vec![AlarmView {
        code: "agent_not_running".to_owned(),
        message: format!("no agent answers at {}: nothing is backed up now", config.status.listen),
        tenant: None,
        scope: String::new(),
    }];
    let keyring = Keyring::open(&config.keys, clock.clone()).await?;
    let repo = Repository::open(config, keyring.clone(), clock, Access::Read).await?;
    let (mut sources, mut stores) = (Vec::new(), Vec::new());
    for (name, c) in &config.source {
        let mut view = SourceView {
            source: name.clone(),
            state: "stopped".to_owned(),
            slot: c.slot_name(name),
            durable_lsn: None,
            durable_time: None,
            rpo_s: None,
            slot_lag_bytes: None,
            tenants: 0,
            unresolved_rows: 0,
            uncovered_tables: Vec::new(),
            received_lsn: None,
            buffer_bytes: 0,
            spool_bytes: 0,
            bases: Default::default(),
            checks: Default::default(),
        };
        if let Some(uid) = keyring.source(name) {
            view.tenants = keyring.tenants(uid).iter().filter(|t| t.tenant.kind == TenantKind::Normal).count();
            let log = Log::open(&repo, uid, None).await?;
            if let Some(last) = log.last() {
                view.durable_lsn = Some(last.upto_lsn.to_string());
                view.durable_time = Some(rfc3339(last.upto_time_us));
                let behind = jiff::Timestamp::now().as_microsecond() - last.upto_time_us;
                view.rpo_s = Some(behind.max(0) as f64 / 1e6);
            }
            stores = repo.status(uid).into_iter().map(StoreView::from).collect();
        }
        if let Err(e) = from_source(&c.url, &mut view).await {
            alarms.push(AlarmView {
                code: crate::alarms::SOURCE_DOWN.to_owned(),
                message: e.to_string(),
                tenant: None,
                scope: name.clone(),
            });
        }
        sources.push(view);
    }
    Ok(Document { version: 1, healthy: false, alarms, sources, stores })
}

async fn from_source(url: &str, view: &mut SourceView) -> Result<()> {
    let client = sql::connect(&Dsn::parse(url)?).await?;
    let row = client
        .query_opt(
            "SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_insert_lsn(), confirmed_flush_lsn)::bigint \
             FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
            &[&view.slot],
        )
        .await
        .sql("cannot read the slot")?;
    view.slot_lag_bytes = row.and_then(|r| r.get(0));
    let rows = client
        .query(
            "SELECT relation::text FROM coffer.coverage WHERE NOT covered AND strategy IS DISTINCT FROM 'excluded' \
             ORDER BY 1",
            &[],
        )
        .await
        .sql("cannot read the coverage")?;
    view.uncovered_tables = rows.iter().map(|r| r.get(0)).collect();
    Ok(())
}

fn text(d: &Document) -> String {
    let mut s = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(s, "{}", if d.healthy { "healthy" } else { "needs attention" });
    for a in &d.alarms {
        let scope = if a.scope.is_empty() { String::new() } else { format!(" ({})", a.scope) };
        let _ = writeln!(s, "  ! {}{scope}: {}", a.code, a.message);
    }
    let dash = || "-".to_owned();
    for v in &d.sources {
        let _ = writeln!(s, "source {}: {}", v.source, v.state);
        let _ = writeln!(
            s,
            "  durable up to {} ({}), {} behind",
            v.durable_lsn.clone().unwrap_or_else(dash),
            v.durable_time.clone().unwrap_or_else(dash),
            v.rpo_s.map_or_else(dash, |r| format!("{r:.1} s")),
        );
        let lag = v.slot_lag_bytes.map_or_else(dash, |b| format!("{b} bytes"));
        let _ = writeln!(s, "  slot {}: {lag} of log held; {} tenants", v.slot, v.tenants);
        if v.unresolved_rows > 0 {
            let _ = writeln!(s, "  {} rows without a known tenant", v.unresolved_rows);
        }
        for line in v.bases.line().into_iter().chain(v.checks.lines()) {
            let _ = writeln!(s, "  {line}");
        }
        if !v.uncovered_tables.is_empty() {
            let _ = writeln!(s, "  not covered: {}", v.uncovered_tables.join(", "));
        }
    }
    for v in &d.stores {
        let _ = writeln!(
            s,
            "store {}: {}{}, durable up to {}{}",
            v.name,
            if v.up { "up" } else { "down" },
            if v.required { "" } else { " (optional)" },
            v.durable_lsn.clone().unwrap_or_else(dash),
            v.last_error.as_ref().map_or_else(String::new, |e| format!("; last error: {e}")),
        );
    }
    s
}
