//! The definitions of a base, written into a new database with `pg_restore`.
//!
//! The archive is what `pg_dump -Fc --schema-only` wrote. Its table of contents is filtered: the extension and what it
//! put on tables stay behind, as do publications and subscriptions (a copy must not replicate). Foreign keys, grants,
//! policies and comments come last and may fail one by one, because what they refer to (a role, the rows of a table
//! that is not covered) may not exist here; each failure is a warning.

use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::schema_dump;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Newest major version of PostgreSQL whose tools are looked for.
const NEWEST_MAJOR: u32 = 30;
/// Lines of complaint that a warning or an error shows.
const MOST_LINES: usize = 12;

/// Descriptions of more than one word in a table of contents; the others are one word.
const LONG_DESCRIPTIONS: &[&str] = &[
    "ACCESS METHOD",
    "BLOB COMMENTS",
    "CHECK CONSTRAINT",
    "DATABASE PROPERTIES",
    "DEFAULT ACL",
    "EVENT TRIGGER",
    "FK CONSTRAINT",
    "FOREIGN DATA WRAPPER",
    "FOREIGN SERVER",
    "FOREIGN TABLE",
    "INDEX ATTACH",
    "MATERIALIZED VIEW DATA",
    "MATERIALIZED VIEW",
    "OPERATOR CLASS",
    "OPERATOR FAMILY",
    "PROCEDURAL LANGUAGE",
    "PUBLICATION TABLES IN SCHEMA",
    "PUBLICATION TABLE",
    "ROW SECURITY",
    "SECURITY LABEL",
    "SEQUENCE OWNED BY",
    "SEQUENCE SET",
    "SHELL TYPE",
    "SUBSCRIPTION TABLE",
    "TABLE ATTACH",
    "TABLE DATA",
    "TEXT SEARCH CONFIGURATION",
    "TEXT SEARCH DICTIONARY",
    "TEXT SEARCH PARSER",
    "TEXT SEARCH TEMPLATE",
    "USER MAPPING",
];

/// When an entry is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the rows: types, functions, tables. Must succeed.
    Before,
    /// After the rows: indexes, constraints, triggers. Must succeed.
    After,
    /// Foreign keys: a failure is a warning.
    ForeignKeys,
    /// Grants, policies, comments: a failure is a warning.
    Soft,
}

/// A line of the table of contents.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    line: String,
    description: String,
    schema: String,
    /// Name and owner.
    rest: String,
}

impl Entry {
    /// `215; 1259 16385 TABLE public accounts postgres`
    fn parse(line: &str) -> Option<Self> {
        let (_, after) = line.split_once("; ")?;
        let mut parts = after.splitn(3, ' ');
        let (_, _, text) = (parts.next()?, parts.next()?, parts.next()?);
        let description = LONG_DESCRIPTIONS
            .iter()
            .find(|d| text.strip_prefix(**d).is_some_and(|r| r.starts_with(' ')))
            .map_or_else(|| text.split(' ').next().unwrap_or_default(), |d| *d);
        let rest = text[description.len()..].trim_start();
        let (schema, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        Some(Self {
            line: line.to_owned(),
            description: description.to_owned(),
            schema: schema.to_owned(),
            rest: rest.to_owned(),
        })
    }

    fn is_ours(&self) -> bool {
        self.schema == "coffer"
            || self
                .rest
                .split(' ')
                .any(|w| ["zzz_coffer_", "aaa_coffer_", "AAA_coffer_"].iter().any(|p| w.starts_with(p)))
            || (self.description == "SCHEMA" && self.rest.starts_with("coffer "))
            || (self.description == "EXTENSION" && self.rest.starts_with("pg_coffer"))
            || (self.description == "COMMENT"
                && (self.rest.starts_with("EXTENSION pg_coffer") || self.rest.starts_with("SCHEMA coffer ")))
            || (self.description == "ACL" && self.rest.starts_with("SCHEMA coffer "))
    }

    /// `None`: left out.
    fn phase(&self) -> Option<Option<Phase>> {
        match self.description.as_str() {
            _ if self.is_ours() => None,
            "PUBLICATION"
            | "PUBLICATION TABLE"
            | "PUBLICATION TABLES IN SCHEMA"
            | "SUBSCRIPTION"
            | "SUBSCRIPTION TABLE" => None,
            "FK CONSTRAINT" => Some(Some(Phase::ForeignKeys)),
            "ACL" | "DEFAULT ACL" | "POLICY" | "COMMENT" | "SECURITY LABEL" | "EVENT TRIGGER" | "USER MAPPING" => {
                Some(Some(Phase::Soft))
            }
            // pg_restore knows which section it is in.
            _ => Some(None),
        }
    }

    fn owner(&self) -> Option<&str> {
        self.rest.rsplit(' ').next().filter(|o| !o.is_empty())
    }
}

/// A schema archive in a private folder that goes with it.
pub struct Archive {
    dir: PathBuf,
    program: PathBuf,
    entries: Vec<Entry>,
    /// Whether owners are set; only when all of them exist.
    pub owners: bool,
}

impl Drop for Archive {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Archive {
    /// Takes the archive out of `dump`. `server_major`: of the server it goes to. Blocking.
    pub fn open(dump: &mut dyn Read, below: &Path, server_major: u32) -> Result<Self> {
        let dir = below.join(format!("schema-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir_all(below).context(Kind::Other, format_args!("cannot create {}", below.display()))?;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .context(Kind::Other, format_args!("cannot create {}", dir.display()))?;
        let mut archive = Self { dir, program: PathBuf::new(), entries: Vec::new(), owners: false };
        let path = archive.path();
        let mut file = private(&path)?;
        std::io::copy(dump, &mut file).map_err(crate::merge::from_io)?;
        drop(file);
        let (program, listed) = list(&path, server_major)?;
        archive.program = program;
        archive.entries =
            listed.lines().filter(|l| !l.starts_with(';') && !l.is_empty()).filter_map(Entry::parse).collect();
        Ok(archive)
    }

    /// What follows `CREATE DATABASE name WITH` for a database like the one that was dumped: encoding and locale. Blocking.
    pub fn database_options(&self) -> Result<Option<String>> {
        let out = Command::new(&self.program)
            .args(["--create", "--no-owner", "--no-privileges", "--file=-"])
            .arg(self.path())
            .stdin(Stdio::null())
            .output()
            .context(Kind::Other, format_args!("cannot start {}", self.program.display()))?;
        let script = String::from_utf8_lossy(&out.stdout);
        let line = script.lines().find(|l| l.starts_with("CREATE DATABASE "));
        Ok(line.and_then(|l| l.rsplit_once(" WITH ")).map(|(_, o)| o.trim_end_matches(';').to_owned()))
    }

    fn path(&self) -> PathBuf {
        self.dir.join("schema.dump")
    }

    /// Roles that own something in the archive.
    pub fn roles(&self) -> BTreeSet<String> {
        self.entries.iter().filter(|e| e.phase().is_some()).filter_map(Entry::owner).map(str::to_owned).collect()
    }

    /// Extensions that the archive creates.
    pub fn extensions(&self) -> BTreeSet<String> {
        let of = |e: &&Entry| e.description == "EXTENSION" && e.phase().is_some();
        self.entries.iter().filter(of).filter_map(|e| e.rest.split(' ').next()).map(str::to_owned).collect()
    }

    /// Leaves out extensions that the server does not offer.
    pub fn without_extensions(&mut self, missing: &BTreeSet<String>) {
        self.entries.retain(|e| {
            let named = match e.description.as_str() {
                "EXTENSION" => e.rest.split(' ').next(),
                "COMMENT" => e.rest.strip_prefix("EXTENSION ").and_then(|r| r.split(' ').next()),
                _ => None,
            };
            named.is_none_or(|n| !missing.contains(n))
        });
    }

    /// The indexes and keys of tables. Blocking.
    pub fn indexes(&self) -> Result<Vec<IndexDefinition>> {
        Ok(index_definitions(&self.script("indexes", &["INDEX", "CONSTRAINT"])?))
    }

    /// The statements that make the types. Blocking.
    pub fn types(&self) -> Result<String> {
        self.script("types", &["TYPE"])
    }

    /// The statements of the entries of these kinds.
    fn script(&self, name: &str, descriptions: &[&str]) -> Result<String> {
        let wanted = |e: &&Entry| descriptions.contains(&e.description.as_str()) && e.phase().is_some();
        let lines: String = self.entries.iter().filter(wanted).map(|e| format!("{}\n", e.line)).collect();
        if lines.is_empty() {
            return Ok(String::new());
        }
        let list = self.dir.join(format!("{name}.list"));
        private(&list)?.write_all(lines.as_bytes()).context(Kind::Other, "cannot write a list for pg_restore")?;
        let out = Command::new(&self.program)
            .args(["--no-owner", "--no-privileges", "--file=-", "--use-list"])
            .arg(&list)
            .arg(self.path())
            .stdin(Stdio::null())
            .output()
            .context(Kind::Other, format_args!("cannot start {}", self.program.display()))?;
        if !out.status.success() {
            let said = complaints(&String::from_utf8_lossy(&out.stderr)).join("; ");
            return Err(Error::other(format!("the archived {name} cannot be read: {said}")));
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Writes one phase into the database. Returns what failed where that is allowed. Blocking.
    pub fn restore(&self, dsn: &Dsn, phase: Phase) -> Result<Vec<String>> {
        let list = self.dir.join(format!("{phase:?}.list"));
        let mut lines = String::new();
        for e in &self.entries {
            let wanted = match e.phase() {
                None => false,
                Some(None) => matches!(phase, Phase::Before | Phase::After),
                Some(Some(p)) => p == phase,
            };
            if wanted {
                lines.push_str(&e.line);
                lines.push('\n');
            }
        }
        if lines.is_empty() {
            return Ok(Vec::new());
        }
        private(&list)?.write_all(lines.as_bytes()).context(Kind::Other, "cannot write a list for pg_restore")?;
        let mut command = Command::new(&self.program);
        schema_dump::connection_environment(&mut command, dsn)?;
        command.arg("--no-password").arg("--use-list").arg(&list);
        command.arg(format!("--dbname=dbname='{}'", dsn.dbname.replace('\\', "\\\\").replace('\'', "\\'")));
        if !self.owners {
            command.arg("--no-owner");
        }
        match phase {
            Phase::Before => command.args(["--section=pre-data", "--exit-on-error"]),
            Phase::After => command.args(["--section=post-data", "--exit-on-error"]),
            Phase::ForeignKeys | Phase::Soft => &mut command,
        };
        let out = command
            .arg(self.path())
            .stdin(Stdio::null())
            .output()
            .context(Kind::Other, format_args!("cannot start {}", self.program.display()))?;
        let complaints = complaints(&String::from_utf8_lossy(&out.stderr));
        if matches!(phase, Phase::Before | Phase::After) && !out.status.success() {
            return Err(Error::other(format!("the schema cannot be restored: {}", complaints.join("; ")))
                .code("schema_failed")
                .hint("is everything that the definitions need (extensions, collations, tablespaces) there?"));
        }
        Ok(complaints)
    }
}

/// An index, or a constraint that has one, as the archive has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexDefinition {
    /// Of the table; not quoted.
    pub schema: String,
    pub table: String,
    /// The statement before the table's name, and behind it.
    before: String,
    after: String,
}

impl IndexDefinition {
    /// The same on another table, qualified and quoted.
    pub fn on(&self, table: &str) -> String {
        format!("{}{table}{}", self.before, self.after)
    }

    fn parse(statement: &str) -> Option<Self> {
        let (before, rest) = if let Some(rest) = statement.strip_prefix("ALTER TABLE ONLY ") {
            ("ALTER TABLE ".to_owned(), rest)
        } else {
            let (head, rest) = ["CREATE UNIQUE INDEX ", "CREATE INDEX "]
                .iter()
                .find_map(|h| Some((*h, statement.strip_prefix(h)?)))?;
            let (_, behind) = identifier(rest)?;
            let name = &rest[..rest.len() - behind.len()];
            let behind = behind.strip_prefix(" ON ")?;
            (format!("{head}{name} ON "), behind.strip_prefix("ONLY ").unwrap_or(behind))
        };
        let (schema, rest) = identifier(rest)?;
        let (table, after) = identifier(rest.strip_prefix('.')?)?;
        let is_index = before.starts_with("CREATE") || after.trim_start().starts_with("ADD CONSTRAINT ");
        is_index.then(|| Self { schema, table, before, after: after.to_owned() })
    }
}

/// The identifier at the beginning, unquoted, and what follows.
fn identifier(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| c.is_ascii() && !c.is_ascii_alphanumeric() && c != '_' && c != '$')?;
        return (end > 0).then(|| (text[..end].to_owned(), &text[end..]));
    };
    let (mut name, mut rest) = (String::new(), quoted);
    loop {
        let (piece, behind) = rest.split_once('"')?;
        name.push_str(piece);
        match behind.strip_prefix('"') {
            Some(more) => {
                name.push('"');
                rest = more;
            }
            None => return Some((name, behind)),
        }
    }
}

/// The statements of a script that make indexes. pg_restore begins each on a line of its own and ends it at one.
fn index_definitions(script: &str) -> Vec<IndexDefinition> {
    let (mut out, mut statement) = (Vec::new(), String::new());
    for line in script.lines() {
        let begins = ["ALTER TABLE ", "CREATE INDEX ", "CREATE UNIQUE INDEX "].iter().any(|h| line.starts_with(h));
        if statement.is_empty() && !begins {
            continue;
        }
        statement.push_str(line);
        if let Some(whole) = statement.strip_suffix(';') {
            out.extend(IndexDefinition::parse(whole));
            statement.clear();
        } else {
            statement.push('\n');
        }
    }
    out
}

/// What pg_restore complained of, without its repetitions of statements.
fn complaints(stderr: &str) -> Vec<String> {
    let wanted = |l: &&str| l.contains("error:") || l.starts_with("DETAIL") || l.starts_with("HINT");
    let mut out: Vec<String> = stderr
        .lines()
        .filter(wanted)
        .filter(|l| !l.contains("errors ignored on restore"))
        .map(|l| l.trim_start_matches("pg_restore: ").to_owned())
        .collect();
    if out.is_empty() && !stderr.trim().is_empty() {
        out = stderr.lines().map(str::to_owned).collect();
    }
    if out.len() > MOST_LINES {
        let more = out.len() - MOST_LINES;
        out.truncate(MOST_LINES);
        out.push(format!("and {more} more lines"));
    }
    out
}

fn private(path: &Path) -> Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .context(Kind::Other, format_args!("cannot create {}", path.display()))
}

/// The oldest pg_restore, from the server's version on, that reads the archive; and the table of contents. A newer one
/// than needed may set parameters that the server does not know.
fn list(archive: &Path, server_major: u32) -> Result<(PathBuf, String)> {
    let mut tried: BTreeSet<PathBuf> = BTreeSet::new();
    let mut last = Error::other("no pg_restore was found").code("pg_restore_missing");
    for major in server_major..=NEWEST_MAJOR {
        let program = match schema_dump::find_pg_dump(major) {
            Ok(dump) => dump.with_file_name("pg_restore"),
            Err(e) => {
                if tried.is_empty() {
                    last = e;
                }
                break;
            }
        };
        if !tried.insert(program.clone()) {
            continue;
        }
        let out = Command::new(&program).arg("--list").arg(archive).stdin(Stdio::null()).output();
        match out {
            Ok(o) if o.status.success() => return Ok((program, String::from_utf8_lossy(&o.stdout).into_owned())),
            Ok(o) => {
                last = Error::other(format!(
                    "{} does not read the schema archive: {}",
                    program.display(),
                    String::from_utf8_lossy(&o.stderr).trim()
                ));
            }
            Err(e) => last = Error::other(format!("cannot start {}", program.display())).source(e),
        }
    }
    Err(last.hint("install the client programs of the source's version of PostgreSQL, or a newer one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(text: &str) -> Option<Option<Phase>> {
        Entry::parse(&format!("215; 1259 16385 {text}")).unwrap().phase()
    }

    #[test]
    fn what_is_ours_stays_behind_and_what_may_fail_comes_last() {
        for ours in [
            "EXTENSION - pg_coffer ",
            "COMMENT - EXTENSION pg_coffer ",
            "SCHEMA - coffer postgres",
            "ACL - SCHEMA coffer postgres",
            "TABLE coffer x postgres",
            "TRIGGER public orders zzz_coffer_tag_delete postgres",
            "TRIGGER public orders aaa_coffer_fence_ins postgres",
            "TRIGGER public orders aaa_coffer_fill postgres",
            "TRIGGER public orders AAA_coffer_parent postgres",
            "PUBLICATION - p postgres",
            "PUBLICATION TABLE public p orders postgres",
            "SUBSCRIPTION - s postgres",
        ] {
            assert_eq!(phase(ours), None, "{ours}");
        }
        for hard in [
            "TABLE public orders postgres",
            "TABLE public coffer postgres",
            "CONSTRAINT public orders orders_pkey postgres",
            "TRIGGER public orders mine postgres",
            "MATERIALIZED VIEW public v postgres",
        ] {
            assert_eq!(phase(hard), Some(None), "{hard}");
        }
        assert_eq!(phase("FK CONSTRAINT public a a_b_fkey postgres"), Some(Some(Phase::ForeignKeys)));
        assert_eq!(phase("POLICY public a p postgres"), Some(Some(Phase::Soft)));
        assert_eq!(phase("DEFAULT ACL public DEFAULT PRIVILEGES FOR TABLES x"), Some(Some(Phase::Soft)));
    }

    #[test]
    fn complaints_are_errors_without_the_statements() {
        let text = "pg_restore: while PROCESSING TOC:\npg_restore: from TOC entry 3\npg_restore: error: could not execute \
                    query: ERROR:  role \"x\" does not exist\nCommand was: GRANT\n\npg_restore: warning: errors ignored on restore: 1\n";
        assert_eq!(complaints(text), ["error: could not execute query: ERROR:  role \"x\" does not exist"]);
        assert!(complaints("").is_empty());
    }

    #[test]
    fn an_index_goes_to_another_table() {
        let script = "SET x = 1;\n\nALTER TABLE ONLY public.\"My \"\"t\"\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id);\n\n\
                      CREATE UNIQUE INDEX \"on\" ON ONLY s.t USING btree (lower(v)) WHERE (v <> '; ON x'::text);\n\
                      CREATE INDEX i ON s.ü USING gin (v);\nALTER TABLE ONLY s.t REPLICA IDENTITY USING INDEX i;\n";
        let found = index_definitions(script);
        let names: Vec<_> = found.iter().map(|i| (i.schema.as_str(), i.table.as_str())).collect();
        assert_eq!(names, [("public", "My \"t"), ("s", "t"), ("s", "ü")]);
        assert_eq!(found[0].on("c.x"), "ALTER TABLE c.x\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id)");
        assert_eq!(
            found[1].on("c.x"),
            "CREATE UNIQUE INDEX \"on\" ON c.x USING btree (lower(v)) WHERE (v <> '; ON x'::text)"
        );
        assert_eq!(found[2].on("c.x"), "CREATE INDEX i ON c.x USING gin (v)");
    }
}
