//! A connection in replication mode: startup, authentication, and the few commands the agent sends.

use crate::dial::{self, Security, Transport};
use crate::dsn::{ChannelBinding, Dsn, Host, SessionTarget};
use crate::error::{Context, Error, Kind, Result};
use crate::sql;
use bytes::{Buf, Bytes, BytesMut};
use coffer_wire::Lsn;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ScramSha256};
use postgres_protocol::message::backend::{ErrorFields, Message};
use postgres_protocol::message::frontend;
use secrecy::{ExposeSecret, SecretString};
use std::collections::HashMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The largest message that is accepted from the server. The plugin writes at most 256 KiB of rows at a time, and a
/// row that is larger in pieces; only a single value's piece can come near this.
pub const MAX_MESSAGE_BYTES: usize = 80 << 20;

/// One read from the socket asks for this much.
const READ_BYTES: usize = 1 << 20;

/// What IDENTIFY_SYSTEM says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub system_identifier: u64,
    pub timeline: u32,
    /// Flushed up to here.
    pub flushed: Lsn,
    pub dbname: String,
}

/// A switch in a timeline's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch {
    /// The timeline that was left.
    pub timeline: u32,
    pub at: Lsn,
}

/// A connection that accepts replication commands.
pub struct ReplicationClient {
    pub(super) io: Transport,
    pub(super) buf: BytesMut,
    parameters: HashMap<String, String>,
    server: String,
}

impl ReplicationClient {
    /// Connects in logical replication mode to the first host that will do.
    pub async fn connect(dsn: &Dsn) -> Result<Self> {
        let mut last = None;
        for host in &dsn.hosts {
            match Self::connect_at(dsn, host).await {
                Ok(c) => return Ok(c),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| Error::usage("the connection string names no host")))
    }

    /// The same to this host.
    pub async fn connect_at(dsn: &Dsn, host: &Host) -> Result<Self> {
        let mut last = None;
        for security in dial::attempts(dsn.sslmode, host) {
            let attempt = Self::connect_host(dsn, host, *security);
            let got = match dsn.connect_timeout {
                // The startup too: a server that accepts and then says nothing is as dead.
                Some(t) => tokio::time::timeout(t * 2, attempt).await.unwrap_or_else(|_| {
                    Err(Error::new(Kind::Unreachable, format!("{host} does not finish the startup in time")))
                }),
                None => attempt.await,
            };
            match got {
                Ok(c) => return Ok(c),
                Err(e) if e.kind() == Kind::Unreachable => return Err(e),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| Error::usage("there is no way to connect")))
    }

    async fn connect_host(dsn: &Dsn, host: &Host, security: Security) -> Result<Self> {
        let io = dial::open(&dsn.sending_little(), host, security).await?;
        let mut c = Self {
            io,
            buf: BytesMut::with_capacity(2 * READ_BYTES),
            parameters: HashMap::new(),
            server: format!("{}@{host}/{}", dsn.user, dsn.dbname),
        };
        let mut parameters = vec![
            ("user", dsn.user.as_str()),
            ("database", dsn.dbname.as_str()),
            ("replication", "database"),
            ("application_name", dsn.application_name.as_str()),
            ("client_encoding", "UTF8"),
        ];
        let options = sql::startup_options(dsn);
        parameters.push(("options", options.as_str()));
        let mut out = BytesMut::new();
        frontend::startup_message(parameters, &mut out).context(Kind::Usage, "the connection string")?;
        c.send(&out).await?;
        let password = dsn.password_for(host)?;
        c.authenticate(dsn, password.as_ref())
            .await
            .map_err(|e| e.during(format_args!("replication login {}", c.server)))?;
        loop {
            match c.message().await? {
                Message::ParameterStatus(p) => {
                    let get = |r: std::io::Result<&str>| r.map(str::to_owned).context(Kind::Other, "parameter status");
                    c.parameters.insert(get(p.name())?, get(p.value())?);
                }
                Message::BackendKeyData(_) => {}
                Message::ReadyForQuery(_) => break,
                Message::ErrorResponse(e) => return Err(server_error(&mut e.fields(), &c.server)),
                _ => return Err(c.unexpected("at startup")),
            }
        }
        if dsn.target == SessionTarget::Primary && c.is_standby() {
            return Err(Error::new(Kind::Unreachable, format!("{host} is a standby, and a primary is asked for")));
        }
        if let Some(first) = sql::first_statement(c.parameter("server_version")) {
            c.query(first).await?;
        }
        Ok(c)
    }

    /// Whether the server was in recovery when the connection was made.
    pub fn is_standby(&self) -> bool {
        self.parameter("in_hot_standby") == Some("on")
    }

    /// Whether what is sent is encrypted.
    pub fn is_tls(&self) -> bool {
        self.io.is_tls()
    }

    /// A setting that the server reported at startup, such as `server_version`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    async fn authenticate(&mut self, dsn: &Dsn, password: Option<&SecretString>) -> Result<()> {
        let need = || {
            password.map(|p| p.expose_secret().as_bytes()).ok_or_else(|| {
                Error::new(Kind::Refused, "the server asks for a password and none is configured")
                    .hint("add passfile= or PGPASSFILE, or password= in the connection string")
            })
        };
        let mut out = BytesMut::new();
        // Set while SCRAM runs: an "authentication ok" before the server's own proof is an impostor's.
        let mut scram: Option<ScramSha256> = None;
        let mut proven = false;
        loop {
            out.clear();
            match self.message().await? {
                Message::AuthenticationOk => {
                    if scram.is_some() && !proven {
                        return Err(Error::new(Kind::Refused, "the server ended SCRAM without proving itself"));
                    }
                    if dsn.channel_binding == ChannelBinding::Require && !proven {
                        return Err(Error::new(
                            Kind::Refused,
                            "channel_binding=require, and the server did not ask for SCRAM",
                        ));
                    }
                    return Ok(());
                }
                Message::AuthenticationCleartextPassword => {
                    frontend::password_message(need()?, &mut out).context(Kind::Usage, "the password")?;
                }
                Message::AuthenticationMd5Password(m) => {
                    let hash = md5_hash(dsn.user.as_bytes(), need()?, m.salt());
                    frontend::password_message(hash.as_bytes(), &mut out).context(Kind::Usage, "the password")?;
                }
                Message::AuthenticationSasl(m) => {
                    let offered = m
                        .mechanisms()
                        .map(|m| Ok(m.to_owned()))
                        .collect::<Vec<_>>()
                        .context(Kind::Other, "SASL mechanisms")?;
                    let (mechanism, binding) = self.mechanism(dsn, &offered)?;
                    let s = ScramSha256::new(need()?, binding);
                    frontend::sasl_initial_response(mechanism, s.message(), &mut out).context(Kind::Other, "SASL")?;
                    scram = Some(s);
                }
                Message::AuthenticationSaslContinue(m) => {
                    let s = scram.as_mut().ok_or_else(|| Error::other("SASL continues before it began"))?;
                    s.update(m.data()).context(Kind::Refused, "SCRAM")?;
                    frontend::sasl_response(s.message(), &mut out).context(Kind::Other, "SASL")?;
                }
                Message::AuthenticationSaslFinal(m) => {
                    let s = scram.as_mut().ok_or_else(|| Error::other("SASL ends before it began"))?;
                    s.finish(m.data()).context(Kind::Refused, "SCRAM: the server does not know the password")?;
                    proven = true;
                    continue;
                }
                Message::ErrorResponse(e) => return Err(server_error(&mut e.fields(), &self.server)),
                _ => {
                    return Err(Error::new(
                        Kind::Refused,
                        "the server asks for a way to log in that is not known here",
                    )
                    .hint("known: trust, password, md5, scram-sha-256 and certificates"));
                }
            }
            self.send(&out).await?;
        }
    }

    fn mechanism(&self, dsn: &Dsn, offered: &[String]) -> Result<(&'static str, sasl::ChannelBinding)> {
        let has = |m: &str| offered.iter().any(|o| o == m);
        match &self.io.channel_binding {
            Some(b) if has(sasl::SCRAM_SHA_256_PLUS) => {
                Ok((sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(b.clone())))
            }
            _ if dsn.channel_binding == ChannelBinding::Require => {
                Err(Error::new(Kind::Refused, "channel_binding=require, and the connection cannot be bound"))
            }
            // "Could have, the server did not offer": an attacker that hid the offer is found out by the server.
            Some(_) if has(sasl::SCRAM_SHA_256) => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested())),
            None if has(sasl::SCRAM_SHA_256) => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported())),
            _ => Err(Error::new(Kind::Refused, format!("the server offers only {}", offered.join(", ")))),
        }
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let lost = "the replication connection was lost";
        self.io.write_all(bytes).await.context(Kind::Unreachable, lost)?;
        self.io.flush().await.context(Kind::Unreachable, lost)
    }

    /// Reads more of the connection. Cancelling it loses nothing: bytes are in `self.buf` or still in the socket.
    pub(super) async fn fill(&mut self) -> Result<usize> {
        if self.buf.capacity() - self.buf.len() < READ_BYTES / 4 {
            self.buf.reserve(READ_BYTES);
        }
        let n =
            self.io.read_buf(&mut self.buf).await.context(Kind::Unreachable, "the replication connection was lost")?;
        if n == 0 {
            return Err(Error::new(Kind::Unreachable, format!("{} closed the replication connection", self.server)));
        }
        Ok(n)
    }

    /// The next whole raw message in the buffer: its tag and body. Notices are logged on the way.
    pub(super) fn next_raw(&mut self) -> Result<Option<(u8, Bytes)>> {
        loop {
            let Some(head) = self.buf.get(..5) else { return Ok(None) };
            let tag = head[0];
            let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            if !(4..=MAX_MESSAGE_BYTES).contains(&len) {
                return Err(Error::other(format!(
                    "{} sent a message of {len} bytes; at most {MAX_MESSAGE_BYTES} are accepted",
                    self.server
                )));
            }
            if self.buf.len() <= len {
                // Room for the rest at once, so that a large message is not moved again and again.
                let missing = len + 1 - self.buf.len();
                self.buf.reserve(missing.min(READ_BYTES * 4));
                return Ok(None);
            }
            if tag == b'N' {
                let mut whole = self.buf.split_to(len + 1);
                if let Ok(Some(Message::NoticeResponse(n))) = Message::parse(&mut whole) {
                    let text = server_error(&mut n.fields(), &self.server);
                    tracing::info!("notice: {}", text.message());
                }
                continue;
            }
            let mut whole = self.buf.split_to(len + 1).freeze();
            whole.advance(5);
            return Ok(Some((tag, whole)));
        }
    }

    /// The next message outside of streaming.
    async fn message(&mut self) -> Result<Message> {
        loop {
            if let Some((tag, body)) = self.next_raw()? {
                return reparse(tag, &body);
            }
            self.fill().await?;
        }
    }

    fn unexpected(&self, when: &str) -> Error {
        Error::other(format!("{} sent an unexpected message {when}", self.server))
    }

    /// Runs one command or statement; the rows as text.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out).context(Kind::Other, "the command")?;
        self.send(&out).await?;
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            match self.message().await? {
                Message::DataRow(r) => {
                    let ranges = r.ranges().collect::<Vec<_>>().context(Kind::Other, "a row")?;
                    let text = |r0: std::ops::Range<usize>| String::from_utf8_lossy(&r.buffer()[r0]).into_owned();
                    rows.push(ranges.into_iter().map(|x| x.map(text)).collect());
                }
                Message::ErrorResponse(e) => failed = Some(server_error(&mut e.fields(), &self.server)),
                Message::ReadyForQuery(_) => return failed.map_or(Ok(rows), Err),
                Message::RowDescription(_)
                | Message::CommandComplete(_)
                | Message::EmptyQueryResponse
                | Message::ParameterStatus(_) => {}
                _ => return Err(self.unexpected("in answer to a command")),
            }
        }
    }

    /// IDENTIFY_SYSTEM.
    pub async fn identify(&mut self) -> Result<Identity> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let field = |i: usize| rows.first().and_then(|r| r.get(i)).and_then(Option::as_deref);
        let parsed = (|| {
            Some(Identity {
                system_identifier: field(0)?.parse().ok()?,
                timeline: field(1)?.parse().ok()?,
                flushed: field(2)?.parse().ok()?,
                dbname: field(3)?.to_owned(),
            })
        })();
        parsed.ok_or_else(|| self.unexpected("in answer to IDENTIFY_SYSTEM"))
    }

    /// The switches that led to `timeline`, oldest first.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<Vec<Switch>> {
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let text = rows.first().and_then(|r| r.get(1)).and_then(Option::as_deref).unwrap_or_default();
        Ok(parse_history(text))
    }

    /// CREATE_REPLICATION_SLOT; the consistent point. Waits for the transactions that are running.
    /// `failover`: one that standbys keep up (PostgreSQL 17).
    pub async fn create_slot(&mut self, slot: &str, plugin: &str, failover: bool) -> Result<Lsn> {
        let options = if failover { "(SNAPSHOT 'nothing', FAILOVER)" } else { "NOEXPORT_SNAPSHOT" };
        let sql = format!("CREATE_REPLICATION_SLOT {} LOGICAL {} {options}", ident(slot), ident(plugin));
        let rows = self.query(&sql).await?;
        let point = rows.first().and_then(|r| r.get(1)).and_then(Option::as_deref).and_then(|s| s.parse().ok());
        point.ok_or_else(|| self.unexpected("in answer to CREATE_REPLICATION_SLOT"))
    }

    /// START_REPLICATION; afterwards the connection only streams.
    pub async fn start(&mut self, slot: &str, from: Lsn, options: &[(&str, &str)]) -> Result<()> {
        let mut sql = format!("START_REPLICATION SLOT {} LOGICAL {from}", ident(slot));
        if !options.is_empty() {
            let list = options.iter().map(|(k, v)| format!("{} {}", ident(k), literal(v))).collect::<Vec<_>>();
            sql.push_str(&format!(" ({})", list.join(", ")));
        }
        let mut out = BytesMut::new();
        frontend::query(&sql, &mut out).context(Kind::Other, "the command")?;
        self.send(&out).await?;
        loop {
            match self.next_raw()? {
                Some((b'W', _)) => return Ok(()),
                Some((tag, body)) => match reparse(tag, &body)? {
                    Message::ErrorResponse(e) => return Err(server_error(&mut e.fields(), &self.server)),
                    Message::ParameterStatus(_) => {}
                    _ => return Err(self.unexpected("in answer to START_REPLICATION")),
                },
                None => {
                    self.fill().await?;
                }
            }
        }
    }

    /// The server's error for a message that arrived while streaming.
    pub(super) fn streaming_error(&self, tag: u8, body: &Bytes) -> Error {
        match reparse(tag, body) {
            Ok(Message::ErrorResponse(e)) => server_error(&mut e.fields(), &self.server),
            Ok(_) => self.unexpected("while streaming"),
            Err(e) => e,
        }
    }
}

/// A whole message again, for the parser that wants header and body together.
fn reparse(tag: u8, body: &Bytes) -> Result<Message> {
    let mut whole = BytesMut::with_capacity(body.len() + 5);
    whole.extend_from_slice(&[tag]);
    whole.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    whole.extend_from_slice(body);
    Message::parse(&mut whole)
        .context(Kind::Other, "the server's message")?
        .ok_or_else(|| Error::other("the server's message is cut"))
}

/// The server's words as an error. The SQLSTATE decides whether trying again can help.
fn server_error(fields: &mut ErrorFields<'_>, server: &str) -> Error {
    let (mut message, mut code, mut hint) = (String::new(), String::new(), None);
    while let Ok(Some(f)) = fields.next() {
        let value = String::from_utf8_lossy(f.value_bytes());
        match f.type_() {
            b'M' => message.insert_str(0, &value),
            b'D' => message.push_str(&format!("; {value}")),
            b'C' => code = value.into_owned(),
            b'H' => hint = Some(value.into_owned()),
            _ => {}
        }
    }
    // Class 57: the server is going or coming; 53: too many connections; 55006: the slot is still in use.
    let kind = match code.as_str() {
        "55006" => Kind::Fenced,
        c if c.starts_with("57") || c.starts_with("53") || c.starts_with("08") => Kind::Unreachable,
        _ => Kind::Other,
    };
    let stable = match code.as_str() {
        "55006" => "slot_in_use",
        "55000" => "slot_state",
        "55P03" => "lock_timeout",
        "42704" => "slot_missing",
        _ => "server",
    };
    let e = Error::new(kind, format!("{server}: {message} (SQLSTATE {code})")).code(stable);
    match hint {
        Some(h) => e.hint(h),
        None => e,
    }
}

fn ident(s: &str) -> String {
    format!("\"{}\"", s.replace('"', "\"\""))
}

fn literal(s: &str) -> String {
    format!("'{}'", s.replace('\'', "''"))
}

fn parse_history(text: &str) -> Vec<Switch> {
    text.lines()
        .filter_map(|l| {
            let mut f = l.split_whitespace();
            Some(Switch { timeline: f.next()?.parse().ok()?, at: f.next()?.parse().ok()? })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_history_is_read() {
        let text = "1\t0/5000000\tno recovery target specified\n\n2\t1/A0\tbefore 2000\n";
        assert_eq!(
            parse_history(text),
            [Switch { timeline: 1, at: Lsn(0x500_0000) }, Switch { timeline: 2, at: Lsn(0x1_0000_00A0) }]
        );
    }

    #[test]
    fn names_and_values_are_quoted() {
        assert_eq!(ident("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("a'b"), "'a''b'");
    }
}
