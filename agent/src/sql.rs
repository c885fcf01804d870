//! SQL sessions of the agent: tokio-postgres over our own [`dial`], with every setting pinned that changes
//! what a value looks like or which rows a query sees.
//!
//! The pinned output settings are those of the output plugin, so that a base and the stream render a value alike.

use crate::dial::{self, Transport};
use crate::dsn::{ChannelBinding, Dsn, Host, Server, SessionTarget};
use crate::error::{Error, Kind, Result};
use secrecy::ExposeSecret;
use std::future::{Ready, ready};
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::{ChannelBinding as PgBinding, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, Notification};

/// Sent with the startup message: they hold from the first statement on, whatever the role's and the database's own settings
/// are. A timeout of those could end the very statement that takes it away.
const AT_STARTUP: &str = "-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 \
    -c idle_session_timeout=0 -c default_transaction_read_only=off -c quote_all_identifiers=off -c search_path=";

/// The session's settings. `row_security = off` turns a policy that would hide rows into an error.
const PINNED: &str = "SET search_path = ''; SET datestyle = 'ISO, MDY'; SET intervalstyle = postgres; \
    SET extra_float_digits = 3; SET bytea_output = hex; SET timezone = 'UTC'; SET xmloption = content; \
    SET lc_monetary = 'C'; SET row_security = off; SET statement_timeout = 0; SET lock_timeout = 0; \
    SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0; SET standard_conforming_strings = on; \
    SET array_nulls = on; SET transform_null_equals = off; SET quote_all_identifiers = off; \
    SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off";

/// The first version with `transaction_timeout`, which no older one takes as a setting.
const TRANSACTION_TIMEOUT_SINCE: u32 = 17;

/// The options of a session's startup: ours, and the connection string's behind them.
pub fn startup_options(dsn: &Dsn) -> String {
    dsn.options.as_ref().map_or_else(|| AT_STARTUP.to_owned(), |o| format!("{AT_STARTUP} {o}"))
}

/// What a session of a server of this version has to say first, and alone: a limit of the role's own runs already.
pub fn first_statement(server_version: Option<&str>) -> Option<&'static str> {
    let version = server_version?;
    let end = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    let major: u32 = version[..end].parse().ok()?;
    (major >= TRANSACTION_TIMEOUT_SINCE).then_some("SET transaction_timeout = 0")
}

/// NOTIFYs that wait for who listens.
const NOTIFICATIONS: usize = 16;

/// A session. Its connection's task ends with it.
pub struct SqlClient {
    client: tokio_postgres::Client,
    task: JoinHandle<()>,
    is_tls: bool,
    /// Where one was asked for.
    server: Option<Server>,
}

impl SqlClient {
    /// The server that the session is with, where a certain one was asked for.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    /// Whether the session is encrypted.
    pub fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// Waits at most `ms` milliseconds for a lock; 0 waits for ever.
    pub async fn set_lock_timeout(&self, ms: u32) -> Result<()> {
        self.client
            .batch_execute(&format!("SET lock_timeout = {ms}"))
            .await
            .map_err(|e| sql_error(e, "SET lock_timeout"))
    }

    /// Its commits are flushed here and wait for no standby, unless the role asks for less: what it writes is the agent's
    /// own and no application's, and is written again after a promotion.
    pub async fn commit_locally(&self) -> Result<()> {
        let set = "SELECT pg_catalog.set_config('synchronous_commit', 'local', false) \
            WHERE pg_catalog.current_setting('synchronous_commit') IN ('on', 'remote_write', 'remote_apply')";
        self.client.batch_execute(set).await.map_err(|e| sql_error(e, "SET synchronous_commit"))
    }
}

impl Deref for SqlClient {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &Self::Target {
        &self.client
    }
}

impl DerefMut for SqlClient {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.client
    }
}

impl Drop for SqlClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Opens a session at the first host that will do; with the server that the connection string means, where it means one.
pub async fn connect(dsn: &Dsn) -> Result<SqlClient> {
    connect_to(dsn, None).await
}

/// The same; NOTIFYs that the session LISTENs to arrive at the receiver, which ends with the connection. What comes while
/// [`NOTIFICATIONS`] of them are not taken is dropped.
pub async fn connect_listening(dsn: &Dsn) -> Result<(SqlClient, mpsc::Receiver<Notification>)> {
    let (tx, rx) = mpsc::channel(NOTIFICATIONS);
    Ok((connect_to(dsn, Some(tx)).await?, rx))
}

async fn connect_to(dsn: &Dsn, notifications: Option<mpsc::Sender<Notification>>) -> Result<SqlClient> {
    let mut last = None;
    for host in &dsn.hosts {
        for security in dial::attempts(dsn.sslmode, host) {
            match connect_host(dsn, host, *security, notifications.clone()).await {
                Ok(c) => return Ok(c),
                // Only a refusal is worth the other way; a dead host is as dead without TLS.
                Err(e) if e.kind() == Kind::Unreachable => {
                    last = Some(e);
                    break;
                }
                Err(e) => last = Some(e),
            }
        }
    }
    Err(last.unwrap_or_else(|| Error::usage("the connection string names no host")))
}

async fn connect_host(
    dsn: &Dsn,
    host: &Host,
    security: dial::Security,
    notifications: Option<mpsc::Sender<Notification>>,
) -> Result<SqlClient> {
    let transport = dial::open(dsn, host, security).await?;
    let is_tls = transport.is_tls();
    let mut config = tokio_postgres::Config::new();
    config
        .user(&dsn.user)
        .dbname(&dsn.dbname)
        .application_name(&dsn.application_name)
        // `direct` means here: the stream is handed over as it is, the handshake is behind us.
        .ssl_mode(tokio_postgres::config::SslMode::Require)
        .ssl_negotiation(tokio_postgres::config::SslNegotiation::Direct)
        .channel_binding(match dsn.channel_binding {
            ChannelBinding::Disable => tokio_postgres::config::ChannelBinding::Disable,
            ChannelBinding::Prefer => tokio_postgres::config::ChannelBinding::Prefer,
            ChannelBinding::Require => tokio_postgres::config::ChannelBinding::Require,
        });
    config.options(startup_options(dsn));
    if let Some(p) = dsn.password_for(host)? {
        config.password(p.expose_secret());
    }
    let what = format!("cannot open a session at {dsn}");
    let (client, mut connection) = config.connect_raw(transport, HandedOver).await.map_err(|e| sql_error(e, &what))?;
    // Texts of no known encoding come as they are; the server would refuse to call them UTF-8.
    let is_bytes = connection.parameter("server_encoding") == Some("SQL_ASCII");
    let first = first_statement(connection.parameter("server_version"));
    let task = tokio::spawn(async move {
        loop {
            match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                None => return,
                Some(Ok(AsyncMessage::Notice(n))) => {
                    tracing::debug!(severity = n.severity(), "server: {}", n.message())
                }
                Some(Ok(AsyncMessage::Notification(n))) => {
                    if let Some(tx) = &notifications {
                        // The receiver may be gone; the session is not its alone.
                        let _ = tx.try_send(n);
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(e)) => {
                    tracing::debug!("the SQL connection ended: {e}");
                    return;
                }
            }
        }
    });
    let mut client = SqlClient { client, task, is_tls, server: None };
    for settings in first.into_iter().chain([PINNED]) {
        client.batch_execute(settings).await.map_err(|e| sql_error(e, "cannot set up the session"))?;
    }
    if is_bytes {
        let set = "SET client_encoding = 'SQL_ASCII'";
        client.batch_execute(set).await.map_err(|e| sql_error(e, "cannot set up the session"))?;
    }
    if dsn.target == SessionTarget::Primary {
        let row = client
            .query_one("SELECT pg_catalog.pg_is_in_recovery()", &[])
            .await
            .map_err(|e| sql_error(e, "cannot ask for the server's role"))?;
        if row.get::<_, bool>(0) {
            return Err(Error::new(Kind::Unreachable, format!("{host} is a standby, and a primary is asked for")));
        }
    }
    if dsn.server().is_some() {
        let met = identify(&client, host).await?;
        dsn.require(&met)?;
        client.server = Some(met);
    }
    Ok(client)
}

/// Who the primary at a host is.
pub async fn meet(dsn: &Dsn, host: &Host) -> Result<Server> {
    let client = connect(&dsn.with_host(host)).await?;
    identify(&client, host).await
}

/// Who the server is. A session stays with it, and it stays what it is, for as long as the session lives.
async fn identify(client: &SqlClient, host: &Host) -> Result<Server> {
    let row = client
        .query_one(
            "SELECT s.system_identifier, \
                (EXTRACT(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::int8, \
                CASE WHEN NOT pg_catalog.pg_is_in_recovery() \
                    THEN pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) END \
             FROM pg_catalog.pg_control_system() s",
            &[],
        )
        .await
        .sql("cannot ask which server this is")?;
    // The name of the newest file of the log begins with the timeline; a standby has none of its own.
    let file: Option<&str> = row.get(2);
    let timeline = file.and_then(|f| u32::from_str_radix(f.get(..8)?, 16).ok());
    let timeline = timeline
        .ok_or_else(|| Error::new(Kind::Unreachable, format!("{host} is a standby, and a primary is asked for")))?;
    Ok(Server {
        host: host.clone(),
        system_identifier: row.get::<_, i64>(0).cast_unsigned(),
        timeline,
        started_us: row.get(1),
    })
}

/// Our error for one of tokio-postgres: the server's own words, its detail and hint, and a kind that tells a server
/// that went away from one that said no.
pub fn sql_error(e: tokio_postgres::Error, what: impl std::fmt::Display) -> Error {
    let Some(db) = e.as_db_error() else {
        let io = std::error::Error::source(&e).is_some_and(|s| s.is::<std::io::Error>());
        let kind = if e.is_closed() || io { Kind::Unreachable } else { Kind::Other };
        return Error::new(kind, what.to_string()).source(e);
    };
    let kind = match *db.code() {
        SqlState::ADMIN_SHUTDOWN
        | SqlState::CRASH_SHUTDOWN
        | SqlState::CANNOT_CONNECT_NOW
        | SqlState::TOO_MANY_CONNECTIONS => Kind::Unreachable,
        _ => Kind::Other,
    };
    let mut message = format!("{what}: {} (SQLSTATE {})", db.message(), db.code().code());
    if let Some(d) = db.detail() {
        message.push_str(&format!("; {d}"));
    }
    let error = Error::new(kind, message);
    match db.hint() {
        Some(h) => error.hint(h),
        None => error,
    }
}

/// [`sql_error`] as a method on results.
pub trait SqlContext<T> {
    fn sql(self, what: impl std::fmt::Display) -> Result<T>;
}

impl<T> SqlContext<T> for std::result::Result<T, tokio_postgres::Error> {
    fn sql(self, what: impl std::fmt::Display) -> Result<T> {
        self.map_err(|e| sql_error(e, what))
    }
}

/// Tells tokio-postgres that the stream it gets is past its TLS handshake.
struct HandedOver;

impl TlsConnect<Transport> for HandedOver {
    type Stream = Bound;
    type Error = std::io::Error;
    type Future = Ready<std::io::Result<Bound>>;

    fn connect(self, stream: Transport) -> Self::Future {
        ready(Ok(Bound(stream)))
    }
}

/// A [`Transport`] that knows its channel binding.
struct Bound(Transport);

impl TlsStream for Bound {
    fn channel_binding(&self) -> PgBinding {
        match &self.0.channel_binding {
            Some(b) => PgBinding::tls_server_end_point(b.clone()),
            None => PgBinding::none(),
        }
    }
}

impl AsyncRead for Bound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Bound {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, b: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, b)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_that_know_the_setting_get_it() {
        for (version, has) in
            [("15.20 (Debian 15.20-0+deb12u1)", false), ("16.15", false), ("17beta1", true), ("18.6", true)]
        {
            assert_eq!(first_statement(Some(version)).is_some(), has, "{version}");
        }
        assert_eq!(first_statement(None), None);
    }

    #[test]
    fn options_of_the_connection_string_come_last() {
        let dsn = Dsn::parse("postgres://u@h/db?options=-c%20work_mem%3D1MB").unwrap();
        assert!(startup_options(&dsn).ends_with(" -c search_path= -c work_mem=1MB"));
    }
}
