//! libpq connection strings and URLs: one parser for the SQL client and the replication client.
//!
//! Parameter names, defaults, `PG*` variables and the password file are libpq's (PostgreSQL documentation, "Database
//! Connection Control Functions"). A parameter that is unknown, or known to libpq and not to us, is refused: a setting
//! that is silently without effect is worse than an error. Neither `Display` nor `Debug` shows the password.

use crate::error::{Context, Error, Kind, Result};
use secrecy::{ExposeSecret, SecretString};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    Disable,
    /// Without TLS first, with it when the server refuses.
    Allow,
    /// With TLS when the server has it.
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Whether SCRAM is bound to the TLS channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    Disable,
    Prefer,
    Require,
}

/// Which server of several hosts will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionTarget {
    Any,
    /// `read-write` and `primary`.
    Primary,
}

/// Where certificates come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootCerts {
    /// A PEM file.
    File(PathBuf),
    /// The operating system's (`sslrootcert=system`).
    System,
    /// Nothing was said, and `~/.postgresql/root.crt` does not exist.
    None,
}

/// One server to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// A host name, a literal address, or the directory of a unix socket.
    pub name: String,
    /// Connect here instead of resolving `name`, which stays the name that a certificate is checked against.
    pub addr: Option<IpAddr>,
    pub port: u16,
}

impl Host {
    /// The socket, when this host is a unix socket's directory.
    pub fn socket(&self) -> Option<PathBuf> {
        (self.addr.is_none() && self.name.starts_with('/'))
            .then(|| Path::new(&self.name).join(format!(".s.PGSQL.{}", self.port)))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.socket() {
            Some(s) => write!(f, "{}", s.display()),
            None if self.name.contains(':') => write!(f, "[{}]:{}", self.name, self.port),
            None => write!(f, "{}:{}", self.name, self.port),
        }
    }
}

/// When a connection that nobody hears of is given up: `keepalives` and its kin. Of the times that are not given, the
/// operating system's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    pub is_on: bool,
    pub idle: Option<Duration>,
    pub interval: Option<Duration>,
    pub count: Option<u32>,
}

/// Without parameters a link that is dead is noticed within a minute. libpq leaves that to the operating system, whose two
/// hours would be two hours without a backup.
pub const DEFAULT_KEEPALIVE: Keepalive = Keepalive {
    is_on: true,
    idle: Some(Duration::from_secs(30)),
    interval: Some(Duration::from_secs(10)),
    count: Some(3),
};

/// For sessions that send little. What was sent and is not acknowledged keeps the kernel from probing; and a server that takes
/// no more for a minute while much is sent to it may only be busy.
const DEFAULT_USER_TIMEOUT: Duration = Duration::from_secs(60);

/// A server, as it was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub host: Host,
    pub system_identifier: u64,
    pub timeline: u32,
    /// When its postmaster started, in microseconds since 1970-01-01 UTC. No two servers share it, whatever leads to them.
    pub started_us: i64,
}

impl Server {
    /// Whether it is the same process, by whatever address.
    pub fn is(&self, other: &Self) -> bool {
        (self.system_identifier, self.timeline, self.started_us)
            == (other.system_identifier, other.timeline, other.started_us)
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (system {}, timeline {})", self.host, self.system_identifier, self.timeline)
    }
}

/// A parsed connection string with every default filled in.
#[derive(Clone)]
pub struct Dsn {
    pub hosts: Vec<Host>,
    pub user: String,
    pub dbname: String,
    pub sslmode: SslMode,
    pub roots: RootCerts,
    pub sslcert: Option<PathBuf>,
    pub sslkey: Option<PathBuf>,
    pub channel_binding: ChannelBinding,
    pub target: SessionTarget,
    pub application_name: String,
    /// For one attempt at one host; `None`: no limit.
    pub connect_timeout: Option<Duration>,
    pub options: Option<String>,
    pub keepalive: Keepalive,
    /// As given; zero: the operating system's.
    tcp_user_timeout: Option<Duration>,
    sends_little: bool,
    /// Sessions are with this server, or are not.
    server: Option<Server>,
    /// A restart of it does not matter.
    may_restart: bool,
    password: Option<SecretString>,
    passfile: Option<PathBuf>,
    /// Given by name, so that a missing or unreadable file is worth a warning.
    passfile_named: bool,
}

/// An attempt at one host is given up after this without `connect_timeout`. libpq waits for ever; an agent must not.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// The environment as the parser sees it; tests bring their own.
pub struct Surroundings<'a> {
    pub var: &'a dyn Fn(&str) -> Option<String>,
    pub user: Option<String>,
    pub home: Option<PathBuf>,
}

const PARAMETERS: &[(&str, Option<&str>)] = &[
    ("host", Some("PGHOST")),
    ("hostaddr", Some("PGHOSTADDR")),
    ("port", Some("PGPORT")),
    ("dbname", Some("PGDATABASE")),
    ("user", Some("PGUSER")),
    ("password", Some("PGPASSWORD")),
    ("passfile", Some("PGPASSFILE")),
    ("sslmode", Some("PGSSLMODE")),
    ("sslrootcert", Some("PGSSLROOTCERT")),
    ("sslcert", Some("PGSSLCERT")),
    ("sslkey", Some("PGSSLKEY")),
    ("channel_binding", Some("PGCHANNELBINDING")),
    ("target_session_attrs", Some("PGTARGETSESSIONATTRS")),
    ("application_name", Some("PGAPPNAME")),
    ("fallback_application_name", None),
    ("connect_timeout", Some("PGCONNECT_TIMEOUT")),
    ("options", Some("PGOPTIONS")),
    ("keepalives", None),
    ("keepalives_idle", None),
    ("keepalives_interval", None),
    ("keepalives_count", None),
    ("tcp_user_timeout", None),
    ("client_encoding", None),
    ("gssencmode", Some("PGGSSENCMODE")),
];

impl Dsn {
    /// Parses a connection string or URL with this process's environment.
    pub fn parse(text: &str) -> Result<Self> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        Self::parse_in(text, &Surroundings { var: &var, user: os_user(), home: std::env::home_dir() })
    }

    /// The same with an environment of the caller's.
    pub fn parse_in(text: &str, around: &Surroundings<'_>) -> Result<Self> {
        let trimmed = text.trim();
        let mut given = if trimmed.starts_with("postgres://") || trimmed.starts_with("postgresql://") {
            parse_url(trimmed)?
        } else {
            parse_keywords(trimmed)?
        };
        for (name, variable) in PARAMETERS {
            let Some(value) = variable.and_then(|v| (around.var)(v)) else { continue };
            // A host in the string makes PGHOSTADDR another server's address.
            let elsewhere = *name == "hostaddr" && given.contains_key("host");
            if !elsewhere {
                given.entry((*name).to_owned()).or_insert(value);
            }
        }
        Self::build(given, around)
    }

    fn build(mut given: BTreeMap<String, String>, around: &Surroundings<'_>) -> Result<Self> {
        let mut take = |name: &str| given.remove(name).filter(|v| !v.is_empty());
        let user = take("user").or_else(|| around.user.clone()).ok_or_else(|| {
            Error::usage("the connection string names no user, and the operating system knows none: add user=")
        })?;
        let hosts = hosts(take("host"), take("hostaddr"), take("port"))?;
        let roots = take("sslrootcert");
        let in_home = |f: &str| around.home.as_ref().map(|h| h.join(".postgresql").join(f)).filter(|p| p.exists());
        let mut sslmode = match take("sslmode") {
            Some(m) => ssl_mode(&m)?,
            // libpq: the system's roots make no sense without checking the name.
            None if roots.as_deref() == Some("system") => SslMode::VerifyFull,
            None => SslMode::Prefer,
        };
        let roots = match roots.as_deref() {
            Some("system") => {
                if sslmode < SslMode::VerifyFull {
                    return Err(Error::usage("sslrootcert=system needs sslmode=verify-full"));
                }
                RootCerts::System
            }
            Some(f) => RootCerts::File(f.into()),
            None => in_home("root.crt").map_or(RootCerts::None, RootCerts::File),
        };
        if sslmode >= SslMode::VerifyCa && roots == RootCerts::None {
            return Err(Error::usage("sslmode=verify-ca and verify-full need a root certificate")
                .hint("add sslrootcert=FILE, or sslrootcert=system for the operating system's roots"));
        }
        // libpq: with a root certificate at hand, `require` checks the chain.
        if sslmode == SslMode::Require && roots != RootCerts::None {
            sslmode = SslMode::VerifyCa;
        }
        let channel_binding = match take("channel_binding").as_deref() {
            None | Some("prefer") => ChannelBinding::Prefer,
            Some("disable") => ChannelBinding::Disable,
            Some("require") => ChannelBinding::Require,
            Some(o) => return Err(bad_value("channel_binding", o, "disable, prefer, require")),
        };
        let target = match take("target_session_attrs").as_deref() {
            None | Some("any") => SessionTarget::Any,
            Some("read-write" | "primary") => SessionTarget::Primary,
            Some(o) => return Err(bad_value("target_session_attrs", o, "any, read-write, primary")),
        };
        let connect_timeout = match take("connect_timeout") {
            None => Some(DEFAULT_CONNECT_TIMEOUT),
            Some(t) => match t.parse::<i64>() {
                Ok(n) if n <= 0 => None,
                Ok(n) => Some(Duration::from_secs(n.unsigned_abs())),
                Err(_) => return Err(bad_value("connect_timeout", &t, "seconds")),
            },
        };
        let keepalive = keepalive(&mut take)?;
        let tcp_user_timeout = number("tcp_user_timeout", take("tcp_user_timeout"))?;
        if let Some(e) = take("client_encoding")
            && !matches!(e.to_ascii_uppercase().as_str(), "UTF8" | "UTF-8" | "AUTO")
        {
            return Err(bad_value("client_encoding", &e, "UTF8"));
        }
        if let Some(g) = take("gssencmode")
            && !matches!(g.as_str(), "disable" | "prefer")
        {
            return Err(bad_value("gssencmode", &g, "disable (there is no GSSAPI here)"));
        }
        let passfile = take("passfile").map(PathBuf::from);
        let fallback = take("fallback_application_name");
        Ok(Self {
            hosts,
            dbname: take("dbname").unwrap_or_else(|| user.clone()),
            user,
            sslmode,
            roots,
            sslcert: take("sslcert").map(PathBuf::from).or_else(|| in_home("postgresql.crt")),
            sslkey: take("sslkey").map(PathBuf::from).or_else(|| in_home("postgresql.key")),
            channel_binding,
            target,
            application_name: take("application_name").or(fallback).unwrap_or_else(|| "coffer".to_owned()),
            connect_timeout,
            options: take("options"),
            keepalive,
            tcp_user_timeout: tcp_user_timeout.map(|ms| Duration::from_millis(ms.into())),
            sends_little: false,
            server: None,
            may_restart: false,
            password: take("password").map(SecretString::from),
            passfile_named: passfile.is_some(),
            passfile: passfile.or_else(|| around.home.as_ref().map(|h| h.join(".pgpass"))),
        })
    }

    /// The same servers and user, another database.
    #[must_use]
    pub fn with_dbname(&self, dbname: &str) -> Self {
        Self { dbname: dbname.to_owned(), ..self.clone() }
    }

    /// The same, with a session name that tells the agent's sessions apart in `pg_stat_activity`.
    #[must_use]
    pub fn with_application_name(&self, name: &str) -> Self {
        Self { application_name: name.to_owned(), ..self.clone() }
    }

    /// One host of several.
    #[must_use]
    pub fn with_host(&self, host: &Host) -> Self {
        Self { hosts: vec![host.clone()], ..self.clone() }
    }

    /// The hosts but one; `None`: there are no others.
    #[must_use]
    pub fn without_host(&self, host: &Host) -> Option<Self> {
        let hosts: Vec<Host> = self.hosts.iter().filter(|h| *h != host).cloned().collect();
        (!hosts.is_empty()).then(|| Self { hosts, ..self.clone() })
    }

    /// Sessions with this server only.
    #[must_use]
    pub fn with_server(&self, server: &Server) -> Self {
        Self { server: Some(server.clone()), ..self.with_host(&server.host) }
    }

    /// The same server, restarted or not: for work that sees for itself what a restart took away.
    #[must_use]
    pub fn across_restarts(&self) -> Self {
        Self { may_restart: true, ..self.clone() }
    }

    /// For sessions that send no more than statements.
    #[must_use]
    pub fn sending_little(&self) -> Self {
        Self { sends_little: true, ..self.clone() }
    }

    /// How long what was sent may stay unacknowledged; `None`: as the operating system says.
    pub fn user_timeout(&self) -> Option<Duration> {
        let default = self.sends_little.then_some(DEFAULT_USER_TIMEOUT);
        self.tcp_user_timeout.or(default).filter(|t| !t.is_zero())
    }

    /// The server that sessions have to be with.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    /// Refuses another server than the one that is meant.
    pub fn require(&self, met: &Server) -> Result<()> {
        let Some(meant) = &self.server else { return Ok(()) };
        let same = match self.may_restart {
            true => (met.system_identifier, met.timeline) == (meant.system_identifier, meant.timeline),
            false => met.is(meant),
        };
        if same {
            return Ok(());
        }
        let how = if (met.system_identifier, met.timeline) == (meant.system_identifier, meant.timeline) {
            ", and has been started anew or is another one"
        } else {
            ""
        };
        Err(Error::new(Kind::Unreachable, format!("the server {met} is not the one of the stream, {meant}{how}"))
            .code("other_server")
            .hint("it is tried again; of several hosts in [source.NAME] url, the one that the log follows is taken"))
    }

    /// The password for a host: the given one, else the password file's.
    pub fn password_for(&self, host: &Host) -> Result<Option<SecretString>> {
        if let Some(p) = &self.password {
            return Ok(Some(p.clone()));
        }
        let Some(path) = &self.passfile else { return Ok(None) };
        let text = match std::fs::read_to_string(path) {
            Ok(t) => SecretString::from(t),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !self.passfile_named => return Ok(None),
            Err(e) => {
                return Err(
                    Error::new(Kind::Usage, format!("cannot read the password file {}", path.display())).source(e)
                );
            }
        };
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(path).map(|m| m.permissions().mode()).unwrap_or(0);
            if mode & 0o077 != 0 {
                return Err(Error::usage(format!("the password file {} can be read by others", path.display()))
                    .hint(format!("chmod 0600 {}", path.display())));
            }
        }
        let name = if host.socket().is_some() && DEFAULT_SOCKET_DIRS.contains(&host.name.as_str()) {
            "localhost"
        } else {
            &host.name
        };
        Ok(passfile_entry(text.expose_secret(), name, host.port, &self.dbname, &self.user).map(SecretString::from))
    }
}

impl fmt::Display for Dsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = self.hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        write!(f, "{}@{hosts}/{}", self.user, self.dbname)
    }
}

impl fmt::Debug for Dsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dsn({self})")
    }
}

fn bad_value(name: &str, value: &str, allowed: &str) -> Error {
    Error::usage(format!("{name}={value} in the connection string: use {allowed}"))
}

fn ssl_mode(s: &str) -> Result<SslMode> {
    Ok(match s {
        "disable" => SslMode::Disable,
        "allow" => SslMode::Allow,
        "prefer" => SslMode::Prefer,
        "require" => SslMode::Require,
        "verify-ca" => SslMode::VerifyCa,
        "verify-full" => SslMode::VerifyFull,
        o => return Err(bad_value("sslmode", o, "disable, allow, prefer, require, verify-ca, verify-full")),
    })
}

/// A parameter that is a number; what is negative counts as zero, as libpq has it.
fn number(name: &str, value: Option<String>) -> Result<Option<u32>> {
    let Some(text) = value else { return Ok(None) };
    let n = text.trim().parse::<i32>().map_err(|_| bad_value(name, &text, "a number"))?;
    Ok(Some(u32::try_from(n).unwrap_or(0)))
}

fn keepalive(take: &mut impl FnMut(&str) -> Option<String>) -> Result<Keepalive> {
    let mut of = |name: &str| number(name, take(name));
    let default = DEFAULT_KEEPALIVE;
    // Zero is the operating system's.
    let seconds = |given: Option<u32>, default| match given {
        None => default,
        Some(n) => (n > 0).then(|| Duration::from_secs(n.into())),
    };
    Ok(Keepalive {
        is_on: of("keepalives")? != Some(0),
        idle: seconds(of("keepalives_idle")?, default.idle),
        interval: seconds(of("keepalives_interval")?, default.interval),
        count: match of("keepalives_count")? {
            None => default.count,
            n => n.filter(|n| *n > 0),
        },
    })
}

const DEFAULT_SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

fn hosts(host: Option<String>, hostaddr: Option<String>, port: Option<String>) -> Result<Vec<Host>> {
    let split = |s: Option<String>| s.map(|s| s.split(',').map(|p| p.trim().to_owned()).collect::<Vec<_>>());
    let (names, addrs, ports) = (split(host), split(hostaddr), split(port));
    let n = names.as_ref().or(addrs.as_ref()).map_or(1, Vec::len);
    if let (Some(a), Some(b)) = (&names, &addrs)
        && a.len() != b.len()
    {
        return Err(Error::usage(format!("{} hosts but {} hostaddr in the connection string", a.len(), b.len())));
    }
    let ports = ports.unwrap_or_else(|| vec![String::new()]);
    if ports.len() != 1 && ports.len() != n {
        return Err(Error::usage(format!("{n} hosts but {} ports in the connection string", ports.len())));
    }
    (0..n)
        .map(|i| {
            let port = match ports[if ports.len() == 1 { 0 } else { i }].as_str() {
                "" => 5432,
                p => p.parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(|| bad_value("port", p, "1 to 65535"))?,
            };
            let addr = match addrs.as_ref().map(|a| a[i].as_str()) {
                None | Some("") => None,
                Some(a) => Some(a.parse::<IpAddr>().map_err(|_| bad_value("hostaddr", a, "an IP address"))?),
            };
            let name = match names.as_ref().map(|n| n[i].as_str()) {
                None | Some("") => match addr {
                    Some(a) => a.to_string(),
                    None => default_host(port),
                },
                Some(s) => s.to_owned(),
            };
            Ok(Host { name, addr, port })
        })
        .collect()
}

/// Where a server without a host is looked for: its socket in the usual directories, else localhost.
fn default_host(port: u16) -> String {
    let found = DEFAULT_SOCKET_DIRS.iter().find(|d| Path::new(d).join(format!(".s.PGSQL.{port}")).exists());
    found.map_or_else(|| "localhost".to_owned(), |d| (*d).to_owned())
}

fn check_name(name: &str) -> Result<()> {
    if PARAMETERS.iter().any(|(n, _)| *n == name) {
        return Ok(());
    }
    Err(Error::usage(format!("the connection string has a parameter '{name}' that is not known here"))
        .hint(format!("known: {}", PARAMETERS.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", "))))
}

/// `keyword = value`, values quoted with `'` where needed, `\` escapes.
fn parse_keywords(s: &str) -> Result<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    let mut it = s.chars().peekable();
    loop {
        while it.next_if(|c| c.is_whitespace()).is_some() {}
        if it.peek().is_none() {
            return Ok(out);
        }
        let mut name = String::new();
        while let Some(c) = it.next_if(|c| *c != '=' && !c.is_whitespace()) {
            name.push(c);
        }
        while it.next_if(|c| c.is_whitespace()).is_some() {}
        if it.next() != Some('=') {
            // The word may be a password that lost its quotes: it is not repeated.
            return Err(Error::usage("the connection string has a word without '='")
                .hint("write host=… port=… dbname=… user=…, or a URL postgres://user@host:port/dbname"));
        }
        while it.next_if(|c| c.is_whitespace()).is_some() {}
        let mut value = String::new();
        if it.next_if_eq(&'\'').is_some() {
            loop {
                match it.next() {
                    Some('\'') => break,
                    Some('\\') => value.extend(it.next()),
                    Some(c) => value.push(c),
                    None => return Err(Error::usage(format!("the value of {name} has no closing quote"))),
                }
            }
        } else {
            while let Some(c) = it.next_if(|c| !c.is_whitespace()) {
                if c == '\\' {
                    value.extend(it.next());
                } else {
                    value.push(c);
                }
            }
        }
        check_name(&name)?;
        out.insert(name, value);
    }
}

/// `postgres://user:password@host:port,host:port/dbname?name=value&…`, each part percent-encoded.
fn parse_url(s: &str) -> Result<BTreeMap<String, String>> {
    let rest = s.split_once("://").map_or("", |(_, r)| r);
    let (rest, query) = rest.split_once('?').map_or((rest, ""), |(a, b)| (a, b));
    let (authority, dbname) = rest.split_once('/').map_or((rest, ""), |(a, b)| (a, b));
    let mut out = BTreeMap::new();
    let mut set = |name: &str, value: String| {
        if !value.is_empty() {
            out.insert(name.to_owned(), value);
        }
    };
    let hostspec = match authority.rsplit_once('@') {
        None => authority,
        Some((login, h)) => {
            let (user, password) = login.split_once(':').unwrap_or((login, ""));
            set("user", decode(user)?);
            set("password", decode(password)?);
            h
        }
    };
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for part in hostspec.split(',') {
        let (name, port) = if let Some(v6) = part.strip_prefix('[') {
            let (addr, tail) =
                v6.split_once(']').ok_or_else(|| Error::usage("an IPv6 address in the URL has no closing ']'"))?;
            (addr, tail.strip_prefix(':').unwrap_or(tail))
        } else {
            part.rsplit_once(':').unwrap_or((part, ""))
        };
        names.push(decode(name)?);
        ports.push(decode(port)?);
    }
    if names.iter().any(|n| !n.is_empty()) {
        set("host", names.join(","));
    }
    if ports.iter().any(|p| !p.is_empty()) {
        set("port", ports.join(","));
    }
    set("dbname", decode(dbname)?);
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (name, value) =
            pair.split_once('=').ok_or_else(|| Error::usage(format!("'{pair}' in the URL's query has no '='")))?;
        let (name, value) = (decode(name)?, decode(value)?);
        if name == "ssl" && value == "true" {
            set("sslmode", "require".to_owned());
            continue;
        }
        check_name(&name)?;
        set(&name, value);
    }
    Ok(out)
}

fn decode(s: &str) -> Result<String> {
    let mut out = Vec::with_capacity(s.len());
    let b = s.as_bytes();
    let mut i = 0;
    while i < b.len() {
        if b[i] == b'%' {
            let hex = s.get(i + 1..i + 3).and_then(|h| u8::from_str_radix(h, 16).ok());
            out.push(
                hex.filter(|h| *h != 0)
                    .ok_or_else(|| Error::usage("a '%' in the URL is not followed by two hexadecimal digits"))?,
            );
            i += 3;
        } else {
            out.push(b[i]);
            i += 1;
        }
    }
    String::from_utf8(out).context(Kind::Usage, "the URL is not UTF-8 after decoding")
}

/// The first line `host:port:database:user:password` that fits; `*` fits all, `\` escapes.
fn passfile_entry(text: &str, host: &str, port: u16, dbname: &str, user: &str) -> Option<String> {
    let port = port.to_string();
    let wanted = [host, &port, dbname, user];
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let mut fields: Vec<String> = vec![String::new()];
        let mut chars = line.chars();
        let mut literal_star = [false; 5];
        while let Some(c) = chars.next() {
            let at = fields.len() - 1;
            match c {
                '\\' => {
                    literal_star[at] = true;
                    fields[at].extend(chars.next());
                }
                ':' if fields.len() < 5 => fields.push(String::new()),
                c => fields[at].push(c),
            }
        }
        if fields.len() == 5
            && wanted.iter().enumerate().all(|(i, w)| fields[i] == *w || (fields[i] == "*" && !literal_star[i]))
        {
            return fields.pop();
        }
    }
    None
}

/// The name of the process's effective user, as libpq's default user is.
fn os_user() -> Option<String> {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::MetadataExt;
        let uid = std::fs::metadata("/proc/self").ok()?.uid().to_string();
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        for line in passwd.lines() {
            let mut f = line.split(':');
            if let (Some(name), Some(_), Some(id)) = (f.next(), f.next(), f.next())
                && id == uid
            {
                return Some(name.to_owned());
            }
        }
    }
    std::env::var("USER").ok().filter(|u| !u.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(s: &str) -> Result<Dsn> {
        with_env(s, &[])
    }

    fn with_env(s: &str, env: &[(&str, &str)]) -> Result<Dsn> {
        let var = |n: &str| env.iter().find(|(k, _)| *k == n).map(|(_, v)| (*v).to_owned());
        Dsn::parse_in(s, &Surroundings { var: &var, user: Some("os".into()), home: None })
    }

    #[test]
    fn a_url_and_a_keyword_string_say_the_same() {
        let url = parse("postgres://bob:p%40ss@db.example:6000/shop?sslmode=require&application_name=a%20b").unwrap();
        let kw = parse(
            "host=db.example port=6000 user=bob password='p@ss' dbname = shop sslmode=require application_name='a b'",
        )
        .unwrap();
        for d in [url, kw] {
            assert_eq!(d.hosts, [Host { name: "db.example".into(), addr: None, port: 6000 }]);
            assert_eq!((d.user.as_str(), d.dbname.as_str(), d.application_name.as_str()), ("bob", "shop", "a b"));
            assert_eq!(d.sslmode, SslMode::Require);
            assert_eq!(d.password_for(&d.hosts[0]).unwrap().unwrap().expose_secret(), "p@ss");
            assert!(!format!("{d} {d:?}").contains("p@ss"));
        }
    }

    #[test]
    fn sockets_addresses_and_several_hosts() {
        let d = parse("host=/run/pg port=5433").unwrap();
        assert_eq!(d.hosts[0].socket().unwrap(), Path::new("/run/pg/.s.PGSQL.5433"));
        assert_eq!((d.user.as_str(), d.dbname.as_str()), ("os", "os"));
        let d = parse("postgresql://%2Frun%2Fpg/x").unwrap();
        assert_eq!(d.hosts[0].socket().unwrap(), Path::new("/run/pg/.s.PGSQL.5432"));
        let d = parse("postgres://[::1]:7,b:8/x").unwrap();
        assert_eq!(d.hosts[0], Host { name: "::1".into(), addr: None, port: 7 });
        assert_eq!(d.hosts[1], Host { name: "b".into(), addr: None, port: 8 });
        let d = parse("host=a,b hostaddr=10.0.0.1,10.0.0.2 port=9").unwrap();
        assert_eq!(d.hosts[1], Host { name: "b".into(), addr: Some("10.0.0.2".parse().unwrap()), port: 9 });
        assert!(parse("host=a,b port=1,2,3").is_err());
    }

    #[test]
    fn the_environment_fills_what_the_string_leaves_open() {
        let env = [("PGHOST", "envhost"), ("PGUSER", "envuser"), ("PGSSLMODE", "disable"), ("PGPORT", "99")];
        let d = with_env("user=me", &env).unwrap();
        assert_eq!((d.hosts[0].to_string().as_str(), d.user.as_str()), ("envhost:99", "me"));
        assert_eq!(d.sslmode, SslMode::Disable);
        let d = with_env("host=x", &[("PGHOSTADDR", "10.0.0.9")]).unwrap();
        assert_eq!(d.hosts[0].addr, None);
    }

    #[test]
    fn dead_links_are_noticed_unless_the_string_says_otherwise() {
        let d = parse("host=a").unwrap();
        assert_eq!((d.keepalive, d.user_timeout()), (DEFAULT_KEEPALIVE, None));
        assert_eq!(d.sending_little().user_timeout(), Some(Duration::from_secs(60)));
        let d =
            parse("host=a keepalives_idle=5 keepalives_interval=0 keepalives_count=7 tcp_user_timeout=1500").unwrap();
        let wanted = Keepalive { is_on: true, idle: Some(Duration::from_secs(5)), interval: None, count: Some(7) };
        assert_eq!((d.keepalive, d.user_timeout()), (wanted, Some(Duration::from_millis(1500))));
        let d = parse("postgres://a/b?keepalives=0&tcp_user_timeout=0").unwrap();
        assert!(!d.keepalive.is_on);
        assert_eq!(d.sending_little().user_timeout(), None);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in [
            "host=a sslmode=maybe",
            "host=a colour=red",
            "postgres://a/b?colour=red",
            "host=a krbsrvname=x",
            "host",
            "host='a",
            "host=a port=0",
            "host=a port=x",
            "postgres://[::1/x",
            "postgres://a/%zz",
            "host=a connect_timeout=soon",
            "host=a keepalives_idle=soon",
            "host=a tcp_user_timeout=1s",
            "host=a sslmode=verify-full",
            "host=a sslrootcert=system sslmode=require",
            "host=a client_encoding=LATIN1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(parse("host=a sslrootcert=system").unwrap().sslmode, SslMode::VerifyFull);
        assert_eq!(parse("host=a sslmode=require sslrootcert=/x").unwrap().sslmode, SslMode::VerifyCa);
    }

    #[test]
    fn the_password_file_is_read_as_libpq_reads_it() {
        let text = "# comment\nother:*:*:*:no\nlocalhost:5432:shop:bob:a\\:b\\\\c:d\n*:*:*:\\*:star\n*:*:*:*:any\n";
        assert_eq!(passfile_entry(text, "localhost", 5432, "shop", "bob").as_deref(), Some("a:b\\c:d"));
        assert_eq!(passfile_entry(text, "localhost", 5433, "shop", "bob").as_deref(), Some("any"));
        assert_eq!(passfile_entry(text, "h", 1, "d", "*").as_deref(), Some("star"));
        assert_eq!(passfile_entry("a:b:c", "a", 1, "c", "d"), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_password_file_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let f = dir.path().join("pass");
        std::fs::write(&f, "*:*:*:*:secret\n").unwrap();
        let d = parse(&format!("host=a passfile={}", f.display())).unwrap();
        std::fs::set_permissions(&f, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(d.password_for(&d.hosts[0]).is_err());
        std::fs::set_permissions(&f, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(d.password_for(&d.hosts[0]).unwrap().unwrap().expose_secret(), "secret");
        let d = parse("host=a passfile=/nonexistent").unwrap();
        assert!(d.password_for(&d.hosts[0]).is_err());
    }
}
