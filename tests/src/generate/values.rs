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
    /// With a scale.
    Scaled,
    Text,
    /// Text that is stored outside of its row.
    Outside,
    Varchar,
    /// Padded with blanks.
    Char,
    /// A domain over text, of every generated schema. Its CHECKs change.
    Short,
    /// A domain over int, of every generated schema.
    Count,
    Timestamptz,
    Timestamp,
    Date,
    Time,
    Timetz,
    Interval,
    Float,
    Real,
    Json,
    Jsonb,
    Ints,
    Texts,
    Numerics,
    /// The enum of every generated schema.
    Mood,
    /// The composite type of every generated schema.
    Pair,
    Bytea,
    Bool,
    Uuid,
    Range,
    Span,
    Multirange,
    Inet,
    Cidr,
    Macaddr,
    Bits,
    Varbits,
}

/// What the enum's labels are at first.
pub const MOODS: [&str; 3] = ["sad", "so so", "it's \"fine\""];

/// What columns that are neither keys nor tenants hold; out-of-line text more often than the rest.
const PAYLOADS: [Kind; 40] = [
    Kind::Int,
    Kind::Int,
    Kind::Big,
    Kind::Numeric,
    Kind::Scaled,
    Kind::Text,
    Kind::Text,
    Kind::Outside,
    Kind::Outside,
    Kind::Outside,
    Kind::Outside,
    Kind::Outside,
    Kind::Varchar,
    Kind::Char,
    Kind::Short,
    Kind::Short,
    Kind::Count,
    Kind::Timestamptz,
    Kind::Timestamp,
    Kind::Date,
    Kind::Time,
    Kind::Timetz,
    Kind::Interval,
    Kind::Float,
    Kind::Real,
    Kind::Json,
    Kind::Jsonb,
    Kind::Ints,
    Kind::Texts,
    Kind::Numerics,
    Kind::Mood,
    Kind::Pair,
    Kind::Pair,
    Kind::Bytea,
    Kind::Bool,
    Kind::Range,
    Kind::Span,
    Kind::Multirange,
    Kind::Inet,
    Kind::Varbits,
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
        match *PAYLOADS.choose(rng).expect("not empty") {
            Self::Inet => *[Self::Inet, Self::Cidr, Self::Macaddr].choose(rng).expect("some"),
            Self::Varbits => *[Self::Bits, Self::Varbits].choose(rng).expect("some"),
            other => other,
        }
    }

    /// Its name in SQL.
    pub fn sql(self) -> &'static str {
        match self {
            Self::Int => "int",
            Self::Big => "bigint",
            Self::Numeric => "numeric",
            Self::Scaled => "numeric(9,2)",
            Self::Text | Self::Outside => "text",
            Self::Varchar => "varchar(12)",
            Self::Char => "char(12)",
            Self::Short => "public.short",
            Self::Count => "public.count",
            Self::Timestamptz => "timestamptz",
            Self::Timestamp => "timestamp",
            Self::Date => "date",
            Self::Time => "time",
            Self::Timetz => "timetz",
            Self::Interval => "interval",
            Self::Float => "float8",
            Self::Real => "real",
            Self::Json => "json",
            Self::Jsonb => "jsonb",
            Self::Ints => "int[]",
            Self::Texts => "text[]",
            Self::Numerics => "numeric[]",
            Self::Mood => "public.mood",
            Self::Pair => "public.pair",
            Self::Bytea => "bytea",
            Self::Bool => "bool",
            Self::Uuid => "uuid",
            Self::Range => "int4range",
            Self::Span => "tstzrange",
            Self::Multirange => "nummultirange",
            Self::Inet => "inet",
            Self::Cidr => "cidr",
            Self::Macaddr => "macaddr",
            Self::Bits => "bit(5)",
            Self::Varbits => "varbit",
        }
    }

    /// Whether equal values have equal texts: by others a tenant cannot be found behind a foreign key.
    pub fn is_exact(self) -> bool {
        !matches!(
            self,
            Self::Numeric | Self::Scaled | Self::Float | Self::Char | Self::Interval | Self::Inet | Self::Bits
        )
    }

    /// Whether a B-tree takes it as it is, and its values are short.
    pub fn is_indexable(self) -> bool {
        !matches!(self, Self::Outside | Self::Json | Self::Pair)
    }

    /// The `n`-th of the keys of this kind. Where equal values have several texts, some keys are equal.
    pub fn key(self, n: u32) -> Value {
        let (twelfth, spelling) = (n % 12, n / 12 % 3);
        Value::Text(match self {
            Self::Text | Self::Varchar | Self::Char | Self::Short => format!("key {n}"),
            Self::Uuid => format!("00000000-0000-4000-8000-{n:012}"),
            Self::Numeric => format!("{twelfth}{}", ["", ".0", ".00"][spelling as usize]),
            Self::Scaled => format!("{}.{}", n / 4, n % 4 * 25),
            Self::Float if twelfth == 0 => ["0", "-0", "NaN"][spelling as usize].into(),
            Self::Float => (f64::from(n) / 8.0).to_string(),
            Self::Interval => match spelling {
                0 => format!("{twelfth} days"),
                1 => format!("{}:00:00", 24 * twelfth),
                _ => format!("{twelfth} mons"),
            },
            Self::Inet if n.is_multiple_of(2) => format!("10.0.0.{n}"),
            Self::Inet => format!("10.0.{n}.0/24"),
            Self::Date => format!("2024-{:02}-{:02}", 1 + n / 28, 1 + n % 28),
            Self::Timestamptz => format!("2024-02-29 12:00:{n:02}.5+00"),
            Self::Bytea => format!("\\x00{n:02x}"),
            Self::Bits => format!("{:05b}", n % 32),
            Self::Bool => n.is_multiple_of(2).to_string(),
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
            Self::Int | Self::Big | Self::Count => n.to_string(),
            Self::Text | Self::Outside | Self::Short => format!("{text}{}", rng.random_range(0..50)),
            // Too long, now and then, where no cast cuts it.
            Self::Varchar | Self::Char => format!("{text}{}", " ".repeat(rng.random_range(0..3))),
            Self::Timestamptz => format!("2024-02-29 12:00:{:02}.{:06}+00", n.unsigned_abs() % 60, n.unsigned_abs()),
            Self::Jsonb => format!("{{\"n\": {n}, \"t\": {}}}", serde_json::Value::from(text)),
            // As it is written, repeated keys and all.
            Self::Json => format!("{{\"n\" :  {n}, \"t\": {}, \"n\":1.50 }}", serde_json::Value::from(text)),
            Self::Ints => format!("{{{n},NULL,{}}}", n / 2),
            Self::Texts => format!("{{{},NULL,\"\"}}", quoted(text)),
            // Their parts change: the model knows them.
            Self::Mood | Self::Pair => return Value::Null,
            Self::Bytea => format!("\\x00ff{:08x}", rng.next_u32()),
            Self::Bool => (n % 2 == 0).to_string(),
            Self::Uuid => return self.key(n.unsigned_abs()),
            Self::Range => format!("[{},{})", n.min(0), n.max(0) + 1),
            Self::Varbits => format!("{:b}", n.unsigned_abs()),
            Self::Bits => return self.key(n.unsigned_abs()),
            _ => (*self.edges().choose(rng).expect("some")).to_owned(),
        })
    }

    /// Values at the edges of a type.
    fn edges(self) -> &'static [&'static str] {
        match self {
            Self::Numeric => &["0", "1.0", "1.00", "-12345678901234567890.5", "NaN", "1e-20", "Infinity"],
            Self::Scaled => &["0", "-0.01", "1234567.89", "NaN", "1.005"],
            Self::Date => &["2024-02-29", "0044-03-15 BC", "infinity", "-infinity", "1999-12-31"],
            Self::Timestamp => &["2024-02-29 23:59:59.999999", "0044-03-15 12:00:00 BC", "infinity", "-infinity"],
            Self::Time => &["00:00:00", "24:00:00", "12:34:56.789012"],
            Self::Timetz => &["24:00:00-15:59", "00:00:00.000001+15:59:59", "12:00:00+00", "13:00:00+01"],
            Self::Interval => {
                &["0", "1 mon -1 day 00:00:00.000001", "30 days", "1 mon", "-1 year -2 mons +3 days -04:05:06.07"]
            }
            Self::Float => &["0", "-0", "0.1", "1e300", "-Infinity", "NaN", "1e-310"],
            Self::Real => &["0", "-0", "0.1", "3.4028235e38", "Infinity", "NaN", "1e-45"],
            Self::Numerics => &["{}", "[-1:0]={1.0,NaN}", "{{1.00,NULL},{-0.5,Infinity}}", "[2:2][3:4]={{1,2}}"],
            Self::Span => {
                &["empty", "(,)", "[\"2024-02-29 12:00:00+00\",infinity]", "[\"0044-03-15 12:00:00+00 BC\",)"]
            }
            Self::Multirange => &["{}", "{(,1.0],[3.50,)}", "{[1,2),[5.00,6]}"],
            Self::Inet => &["10.0.0.1", "10.0.0.1/8", "::1", "::ffff:1.2.3.4/96", "0.0.0.0/0"],
            Self::Cidr => &["10.0.0.0/8", "1.2.3.4", "2001:db8::/32"],
            _ => &["08:00:2b:01:02:03", "ff:ff:ff:ff:ff:ff"],
        }
    }
}

/// An element of an array or of a row.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A column's text as its output function writes it, or NULL: that is what a tenant is called. The cast is something else
/// for some types.
pub fn text_of(expression: &str) -> String {
    format!("CASE WHEN {expression} IS NOT NULL THEN format('%s', {expression}) END")
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
