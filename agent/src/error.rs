//! The one error of the agent: what went wrong, and what the user can do.
//!
//! [`Kind`] is coarse and decides the exit code (INTERFACES: exit codes); `code` is the stable word in JSON;
//! `message` names the object, the value and the limit; `hint` says the fix. Errors are returned up and reported once,
//! in `main`.

use coffer_wire::Lsn;
use serde::Serialize;
use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller should do about an error; each kind is one exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Anything else; the message says it.
    Other = 1,
    /// The command line or the configuration is wrong: correct it.
    Usage = 2,
    /// A tenant, a backup, a restore point or an object does not exist.
    NotFound = 3,
    /// The target cannot be restored to: choose one inside the window.
    OutsideWindow = 4,
    /// What was read back is not what was written.
    Verification = 5,
    /// Another agent owns the repository, or a lock forbids it.
    Fenced = 6,
    /// A key is wrong or missing.
    Key = 7,
    /// A store or a server does not answer: try again.
    Unreachable = 8,
    /// Some of it was done; the message says which.
    Partial = 9,
    /// Refused; nothing was changed.
    Refused = 10,
    /// `status` and `doctor`: something needs attention.
    Unhealthy = 11,
}

impl Kind {
    /// Every kind, by exit code.
    pub const ALL: [Self; 11] = [
        Self::Other,
        Self::Usage,
        Self::NotFound,
        Self::OutsideWindow,
        Self::Verification,
        Self::Fenced,
        Self::Key,
        Self::Unreachable,
        Self::Partial,
        Self::Refused,
        Self::Unhealthy,
    ];

    pub fn exit_code(self) -> u8 {
        self as u8
    }

    fn default_code(self) -> &'static str {
        match self {
            Self::Other => "other",
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::OutsideWindow => "outside_window",
            Self::Verification => "verification_failed",
            Self::Fenced => "fenced",
            Self::Key => "key",
            Self::Unreachable => "unreachable",
            Self::Partial => "partly_done",
            Self::Refused => "refused",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// A span of points that a tenant can be restored to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WindowSpan {
    #[serde(serialize_with = "as_text")]
    pub from_lsn: Lsn,
    #[serde(serialize_with = "as_text")]
    pub to_lsn: Lsn,
    pub from_time: String,
    pub to_time: String,
}

fn as_text<S: serde::Serializer>(l: &Lsn, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.collect_str(l)
}

/// See the module.
#[derive(Debug)]
pub struct Error(Box<Repr>);

#[derive(Debug)]
struct Repr {
    kind: Kind,
    code: &'static str,
    message: String,
    hint: Option<String>,
    window: Vec<WindowSpan>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Repr {
            kind,
            code: kind.default_code(),
            message: message.into(),
            hint: None,
            window: Vec::new(),
            source: None,
        }))
    }

    pub fn other(message: impl Into<String>) -> Self {
        Self::new(Kind::Other, message)
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// A more exact word for JSON than the kind's.
    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.0.code = code;
        self
    }

    /// What the user can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn window(mut self, window: Vec<WindowSpan>) -> Self {
        self.0.window = window;
        self
    }

    #[must_use]
    pub fn source(mut self, e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(e.into());
        self
    }

    /// The same error with `what` was being done in front of the message.
    #[must_use]
    pub fn during(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// The same kind, code and hint with other words.
    #[must_use]
    pub fn saying(mut self, message: impl Into<String>) -> Self {
        (self.0.message, self.0.source) = (message.into(), None);
        self
    }

    /// Whether it carries this code.
    pub fn is_code(&self, code: &str) -> bool {
        self.0.code == code
    }

    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The document that `--json` prints.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({"version": 1, "error": {
            "code": self.0.code,
            "exit": self.0.kind.exit_code(),
            "message": self.to_string(),
            "hint": self.0.hint,
            "window": self.0.window,
        }})
    }

    /// The text for a person, several lines.
    pub fn report(&self) -> String {
        let mut s = format!("error: {self}");
        for w in &self.0.window {
            s.push_str(&format!("\nrecovery window: {} ({}) to {} ({})", w.from_time, w.from_lsn, w.to_time, w.to_lsn));
        }
        if let Some(h) = &self.0.hint {
            s.push_str(&format!("\nhint: {h}"));
        }
        s
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        let mut cause: Option<&(dyn std::error::Error + 'static)> = self.0.source.as_deref().map(|e| e as _);
        while let Some(c) = cause {
            write!(f, ": {c}")?;
            cause = c.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<coffer_wire::WireError> for Error {
    fn from(e: coffer_wire::WireError) -> Self {
        Self::new(Kind::Verification, e.to_string()).code("malformed")
    }
}

/// Turns a foreign error into ours, with what was being done.
pub trait Context<T> {
    fn context(self, kind: Kind, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context(self, kind: Kind, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Error::new(kind, what.to_string()).source(e))
    }
}
