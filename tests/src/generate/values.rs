//! Column types and values for them: mostly the awkward ones.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Int,
    Big,
    Numeric,
    Text,
    /// Text that is stored outside of its row.
    Outside,
    Timestamptz,
    Date,
    Float,
    Jsonb,
    Ints,
    Texts,
    /// The enum of every generated schema.
    Mood,
    Bytea,
    Bool,
    Uuid,
    Range,
}

/// What the enum's labels are at first.
pub const MOODS: [&str; 3] = ["sad", "so so", "it's \"fine\""];

/// What columns that are neither keys nor tenants hold; out-of-line text more often than the rest.
const PAYLOADS: [Kind; 18] = [
    Kind::Int,
    Kind::Big,
    Kind::Numeric,
    Kind::Text,
    Kind::Text,
    Kind::Outside,
    Kind::Outside,
    Kind::Outside,
    Kind::Timestamptz,
    Kind::Date,
    Kind::Float,
    Kind::Jsonb,
    Kind::Ints,
    Kind::Texts,
    Kind::Mood,
    Kind::Bytea,
    Kind::Bool,
    Kind::Range,
];

const TEXTS: [&str; 14] = [
    "",
    " ",
    "plain",
    "\\N",
    "tab\there",
    "two\nlines",
    "cr\rhere",
    "back\\slash",
    "\\.",
    "quo'te",
    "\"double\"",
    "ümläut €",
    "🙂",
    "NULL",
];

impl Kind {
    pub fn payload(rng: &mut StdRng) -> Self {
        *PAYLOADS.choose(rng).expect("not empty")
    }

    /// Its name in SQL.
    pub fn sql(self) -> &'static str {
        match self {
            Self::Int => "int",
            Self::Big => "bigint",
            Self::Numeric => "numeric",
            Self::Text | Self::Outside => "text",
            Self::Timestamptz => "timestamptz",
            Self::Date => "date",
            Self::Float => "float8",
            Self::Jsonb => "jsonb",
            Self::Ints => "int[]",
            Self::Texts => "text[]",
            Self::Mood => "public.mood",
            Self::Bytea => "bytea",
            Self::Bool => "bool",
            Self::Uuid => "uuid",
            Self::Range => "int4range",
        }
    }

    /// The `n`-th of the keys of this kind.
    pub fn key(self, n: u32) -> Value {
        Value::Text(match self {
            Self::Text => format!("key {n}"),
            Self::Uuid => format!("00000000-0000-4000-8000-{n:012}"),
            _ => n.to_string(),
        })
    }

    /// A value, now and then NULL.
    pub fn value(self, rng: &mut StdRng) -> Value {
        if rng.random_bool(0.12) {
            return Value::Null;
        }
        let n: i32 = rng.random_range(-999..1000);
        if self == Self::Outside && rng.random_bool(0.8) {
            return Value::Repeated(format!("{n} ä\t"), rng.random_range(400..900));
        }
        let text = *TEXTS.choose(rng).expect("not empty");
        Value::Text(match self {
            Self::Int | Self::Big => n.to_string(),
            Self::Numeric => ["0", "1.0", "1.00", "-12345678901234567890.5", "NaN", "1e-20", "Infinity"]
                .choose(rng)
                .expect("not empty")
                .to_string(),
            Self::Text | Self::Outside => format!("{text}{}", rng.random_range(0..50)),
            Self::Timestamptz => format!("2024-02-29 12:00:{:02}.{:06}+00", n.unsigned_abs() % 60, n.unsigned_abs()),
            Self::Date => {
                ["2024-02-29", "0044-03-15 BC", "infinity", "1999-12-31"].choose(rng).expect("some").to_string()
            }
            Self::Float => {
                ["0", "-0", "0.1", "1e300", "-Infinity", "NaN", "1e-310"].choose(rng).expect("some").to_string()
            }
            Self::Jsonb => format!("{{\"n\": {n}, \"t\": {}}}", serde_json::Value::from(text)),
            Self::Ints => format!("{{{n},NULL,{}}}", n / 2),
            Self::Texts => format!("{{\"{}\",NULL,\"\"}}", text.replace('\\', "\\\\").replace('"', "\\\"")),
            // Its labels change: the model knows them.
            Self::Mood => return Value::Null,
            Self::Bytea => format!("\\x00ff{:08x}", rng.next_u32()),
            Self::Bool => (n % 2 == 0).to_string(),
            Self::Uuid => return self.key(n.unsigned_abs()),
            Self::Range => format!("[{},{})", n.min(0), n.max(0) + 1),
        })
    }
}

/// A value, before it is written as SQL or as a field of COPY.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Null,
    /// As the type's input function takes it.
    Text(String),
    /// The text so many times.
    Repeated(String, usize),
}

impl Value {
    /// An expression of the type.
    pub fn sql(&self, kind: Kind) -> String {
        match self {
            Self::Null => format!("NULL::{}", kind.sql()),
            Self::Text(t) => format!("{}::{}", literal(t), kind.sql()),
            Self::Repeated(t, n) => format!("repeat({}, {n})", literal(t)),
        }
    }

    /// A field of COPY text.
    pub fn copy(&self) -> String {
        match self {
            Self::Null => "\\N".into(),
            Self::Text(t) => copy_escaped(t),
            Self::Repeated(t, n) => copy_escaped(&t.repeat(*n)),
        }
    }
}

/// A string literal, on one line.
pub fn literal(text: &str) -> String {
    let text = text.replace('\'', "''");
    if text.contains(['\\', '\t', '\n', '\r']) { format!("E'{}'", copy_escaped(&text)) } else { format!("'{text}'") }
}

/// Text as COPY writes it.
pub fn copy_escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\t', "\\t").replace('\n', "\\n").replace('\r', "\\r")
}
