//! Restore into files: one per table, and a manifest that is written last.
//!
//! Everything is written beside its place and moved there at the end: a restore that fails leaves nothing behind. The
//! files hold a tenant's rows in the clear, so only their owner can read them.

use super::encode::{self, Style};
use super::large_objects::{Found, LargeObjects};
use super::large_takers::{FOLDER, Folder};
use crate::accounts::Roles;
use crate::clock::rfc3339;
use crate::error::{Context, Error, Kind, Result};
use crate::history::Target;
use crate::merge::{Image, RowSink};
use coffer_wire::{ColumnFlags, Relation, quote_ident};
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// COPY text: `COPY t (columns) FROM 'file'`
    Copy,
    /// CSV with a header: `COPY t (columns) FROM 'file' CSV HEADER`
    Csv,
    /// A script of INSERTs
    Sql,
    /// One JSON object per row
    Jsonl,
    /// Parquet, where the program was built with it
    Parquet,
}

impl Format {
    fn extension(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Csv => "csv",
            Self::Sql => "sql",
            Self::Jsonl => "jsonl",
            Self::Parquet => "parquet",
        }
    }

    /// An error for what this version does not write.
    pub fn require(self) -> Result<()> {
        if self == Self::Parquet && !cfg!(feature = "parquet") {
            return Err(Error::new(Kind::Refused, "this coffer was built without Parquet").code("not_available").hint(
                "use --format copy, csv, sql or jsonl, or build with: cargo build -p coffer --features parquet",
            ));
        }
        Ok(())
    }
}

/// Name of the folder that the files are written in before they are complete.
const PARTIAL: &str = ".partial";
/// The script with the tenant's roles. A table's file has a dot in its name and a schema before it.
const ROLES: &str = "roles.sql";
const BUFFER: usize = 256 << 10;
/// A SQL script's INSERT takes rows up to these limits.
const ROWS_PER_INSERT: u32 = 100;
const BYTES_PER_INSERT: u64 = 64 << 10;

/// Refuses a target that is neither absent nor an empty folder.
pub fn require_empty(dir: &Path) -> Result<()> {
    match std::fs::read_dir(dir).map(Iterator::count) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => {
            Err(Error::new(Kind::Refused, format!("{} is no folder that can be written to", dir.display())).source(e))
        }
        Ok(0) => Ok(()),
        Ok(_) => Err(Error::new(Kind::Refused, format!("{} is not empty", dir.display()))
            .hint("name a folder that does not exist yet, or an empty one")),
    }
}

struct Table {
    rel: Arc<Relation>,
    file: String,
    out: BufWriter<File>,
    styles: Vec<Style>,
    /// `"name":` of each column, for JSON.
    names: Vec<String>,
    rows: u64,
    /// Of the INSERT at hand.
    insert_rows: u32,
    insert_bytes: u64,
    /// Writes the file instead of `out`.
    #[cfg(feature = "parquet")]
    parquet: Option<super::parquet::ParquetTable>,
}

/// What one table's file came to.
#[derive(Clone, Debug)]
pub struct Written {
    pub relation: String,
    pub file: String,
    pub columns: Vec<String>,
    pub rows: u64,
    pub bytes: u64,
}

/// The sink. Dropped before [`Files::finish`], it removes what it wrote.
pub struct Files {
    dir: PathBuf,
    made_dir: bool,
    format: Format,
    table: Option<Table>,
    written: Vec<Written>,
    objects: Option<Found>,
    finished: bool,
}

impl Files {
    pub fn create(dir: &Path, format: Format) -> Result<Self> {
        format.require()?;
        require_empty(dir)?;
        let made_dir = !dir.exists();
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700).recursive(true);
        let partial = dir.join(PARTIAL);
        builder.create(&partial).context(Kind::Other, format_args!("cannot create {}", partial.display()))?;
        Ok(Self {
            dir: dir.to_owned(),
            made_dir,
            format,
            table: None,
            written: Vec::new(),
            objects: None,
            finished: false,
        })
    }

    fn open(&self, name: &str) -> Result<File> {
        let path = self.dir.join(PARTIAL).join(name);
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .context(Kind::Other, format_args!("cannot create {}", path.display()))
    }

    /// Writes the large objects that the rows refer to.
    pub fn large_objects(&mut self, objects: Option<&LargeObjects>) -> Result<Option<Found>> {
        let Some(objects) = objects else { return Ok(None) };
        let mut folder = Folder::create(&self.dir.join(PARTIAL))?;
        let found = objects.give(&mut folder)?;
        folder.finish()?;
        self.objects = Some(found.clone());
        Ok(Some(found))
    }

    /// Puts everything in its place, the manifest last.
    pub fn finish(mut self, tenant: &str, target: &Target, roles: Option<&Roles>) -> Result<Vec<Written>> {
        let tables: Vec<_> = self
            .written
            .iter()
            .map(|w| json!({"relation": w.relation, "file": w.file, "columns": w.columns, "rows": w.rows}))
            .collect();
        let mut manifest = json!({"version": 1, "tenant": tenant, "format": self.format.extension(),
            "target": {"asked": target.asked, "lsn": target.lsn.to_string(), "time": rfc3339(target.time_us)},
            "tables": tables, "roles": roles.map(|_| ROLES)});
        if let Some(found) = &self.objects {
            manifest["large_objects"] = found.document();
            manifest["large_objects"]["folder"] = FOLDER.into();
        }
        if let Some(r) = roles {
            let mut f = self.open(ROLES)?;
            let written = f.write_all(r.script().as_bytes()).and_then(|()| f.sync_all());
            written.context(Kind::Other, format_args!("cannot write {ROLES}"))?;
        }
        let what = "cannot write manifest.json";
        let mut f = self.open("manifest.json")?;
        let text = serde_json::to_string_pretty(&manifest).context(Kind::Other, what)?;
        f.write_all(text.as_bytes()).and_then(|()| f.write_all(b"\n")).context(Kind::Other, what)?;
        f.sync_all().context(Kind::Other, what)?;
        let partial = self.dir.join(PARTIAL);
        let objects = self.objects.iter().map(|_| FOLDER);
        let beside = roles.map(|_| ROLES).into_iter().chain(objects).chain(["manifest.json"]);
        for name in self.written.iter().map(|w| w.file.as_str()).chain(beside) {
            std::fs::rename(partial.join(name), self.dir.join(name))
                .context(Kind::Other, format_args!("cannot put {name} into {}", self.dir.display()))?;
        }
        std::fs::remove_dir(&partial).context(Kind::Other, "cannot remove the folder of partial files")?;
        File::open(&self.dir).and_then(|d| d.sync_all()).context(Kind::Other, "cannot sync the folder")?;
        self.finished = true;
        Ok(std::mem::take(&mut self.written))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for w in &self.written {
            let _ = std::fs::remove_file(self.dir.join(&w.file));
        }
        let _ = std::fs::remove_file(self.dir.join(ROLES));
        let _ = std::fs::remove_dir_all(self.dir.join(FOLDER));
        let _ = std::fs::remove_dir_all(self.dir.join(PARTIAL));
        if self.made_dir {
            let _ = std::fs::remove_dir(&self.dir);
        }
    }
}

/// A file's name for a table: every byte but letters, digits, `-` and `_` is written as `%xx`.
fn file_name(rel: &Relation, extension: &str) -> String {
    let escaped = |s: &str| {
        s.bytes()
            .map(|b| {
                if b.is_ascii_alphanumeric() || b == b'-' || b == b'_' {
                    char::from(b).to_string()
                } else {
                    format!("%{b:02x}")
                }
            })
            .collect::<String>()
    };
    let name = format!("{}.{}", escaped(&rel.schema), escaped(&rel.name));
    // Most file systems end at 255 bytes.
    if name.len() > 240 { format!("relation-{}.{extension}", rel.relid) } else { format!("{name}.{extension}") }
}

/// `(a, b)`, quoted.
fn column_list(rel: &Relation) -> String {
    let names: Vec<_> = rel.image_columns().map(|c| quote_ident(&c.name)).collect();
    format!("({})", names.join(", "))
}

impl RowSink for Files {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        let mut file = file_name(rel, self.format.extension());
        if self.written.iter().any(|w| w.file == file) {
            // Two tables of one name: one was dropped and made anew, or moved, while the other's rows were still there.
            file = format!("{}-{file}", rel.relid);
        }
        let opened = self.open(&file)?;
        #[cfg(feature = "parquet")]
        let parquet = match self.format {
            Format::Parquet => Some(super::parquet::ParquetTable::new(&opened, rel)?),
            _ => None,
        };
        let mut out = BufWriter::with_capacity(BUFFER, opened);
        let names = rel.image_columns().map(|c| format!("{}:", encode::json_name(&c.name))).collect();
        let styles = rel
            .image_columns()
            .map(|c| match self.format {
                Format::Csv => Style::Csv,
                Format::Sql => Style::Sql,
                _ => Style::json_of(c),
            })
            .collect();
        let head = match self.format {
            Format::Csv => {
                let quoted: Vec<_> =
                    rel.image_columns().map(|c| format!("\"{}\"", c.name.replace('"', "\"\""))).collect();
                format!("{}\n", quoted.join(","))
            }
            Format::Sql => "SET client_encoding = 'UTF8';\nSET standard_conforming_strings = on;\n\
                 SET datestyle = 'ISO, MDY';\nSET intervalstyle = postgres;\nBEGIN;\n"
                .to_owned(),
            _ => String::new(),
        };
        out.write_all(head.as_bytes()).context(Kind::Other, format_args!("cannot write {file}"))?;
        self.table = Some(Table {
            rel: rel.clone(),
            file,
            out,
            styles,
            names,
            rows: 0,
            insert_rows: 0,
            insert_bytes: 0,
            #[cfg(feature = "parquet")]
            parquet,
        });
        Ok(())
    }

    fn row(&mut self, _: &[u8], image: &Image<'_>) -> Result<()> {
        let Some(t) = &mut self.table else { return Err(Error::other("a row came before its table")) };
        t.rows += 1;
        t.row(self.format, image).map_err(|e| e.during(format_args!("file {}", t.file)))
    }

    fn end_table(&mut self) -> Result<()> {
        let Some(mut t) = self.table.take() else { return Ok(()) };
        let what = format!("cannot write {}", t.file);
        if self.format == Format::Sql {
            let end: &[u8] = if t.insert_rows > 0 { b";\nCOMMIT;\n" } else { b"COMMIT;\n" };
            t.out.write_all(end).context(Kind::Other, &what)?;
        }
        #[cfg(feature = "parquet")]
        if let Some(p) = t.parquet.take() {
            p.finish().map_err(|e| e.during(&what))?;
        }
        let file = t.out.into_inner().map_err(std::io::IntoInnerError::into_error).context(Kind::Other, &what)?;
        file.sync_all().context(Kind::Other, &what)?;
        let bytes = file.metadata().map(|m| m.len()).unwrap_or(0);
        self.written.push(Written {
            relation: t.rel.qualified(),
            file: t.file,
            columns: t.rel.image_columns().map(|c| c.name.clone()).collect(),
            rows: t.rows,
            bytes,
        });
        Ok(())
    }
}

impl Table {
    fn row(&mut self, format: Format, image: &Image<'_>) -> Result<()> {
        let io = |e| Error::new(Kind::Other, "cannot write").source(e);
        match format {
            Format::Copy => {
                image.write_to(&mut self.out)?;
                self.out.write_all(b"\n").map_err(io)
            }
            Format::Csv => {
                self.fields(image, b",", false)?;
                self.out.write_all(b"\n").map_err(io)
            }
            Format::Jsonl => {
                self.out.write_all(b"{").map_err(io)?;
                self.fields(image, b",", true)?;
                self.out.write_all(b"}\n").map_err(io)
            }
            Format::Sql => self.insert(image),
            #[cfg(feature = "parquet")]
            Format::Parquet => match &mut self.parquet {
                Some(p) => p.row(image),
                None => Err(Error::other("a row came before its file")),
            },
            #[cfg(not(feature = "parquet"))]
            Format::Parquet => format.require(),
        }
    }

    fn fields(&mut self, image: &Image<'_>, separator: &[u8], named: bool) -> Result<()> {
        let io = |e| Error::new(Kind::Other, "cannot write").source(e);
        // A table without columns has a line with one empty field.
        for (i, (f, style)) in image.fields().into_iter().zip(&self.styles).enumerate() {
            if i > 0 {
                self.out.write_all(separator).map_err(io)?;
            }
            if named {
                self.out.write_all(self.names[i].as_bytes()).map_err(io)?;
            }
            encode::field(image, f, *style, &mut self.out)?;
        }
        Ok(())
    }

    fn insert(&mut self, image: &Image<'_>) -> Result<()> {
        let io = |e| Error::new(Kind::Other, "cannot write").source(e);
        if self.styles.is_empty() {
            return writeln!(self.out, "INSERT INTO {} DEFAULT VALUES;", self.rel.qualified()).map_err(io);
        }
        if self.insert_rows > 0
            && (self.insert_rows >= ROWS_PER_INSERT || self.insert_bytes + image.len() > BYTES_PER_INSERT)
        {
            self.out.write_all(b";\n").map_err(io)?;
            (self.insert_rows, self.insert_bytes) = (0, 0);
        }
        if self.insert_rows == 0 {
            let always = self.rel.columns.iter().any(|c| c.flags.has(ColumnFlags::IDENTITY_ALWAYS));
            let overriding = if always { " OVERRIDING SYSTEM VALUE" } else { "" };
            let (table, columns) = (self.rel.qualified(), column_list(&self.rel));
            write!(self.out, "INSERT INTO {table} {columns}{overriding} VALUES\n  (").map_err(io)?;
        } else {
            self.out.write_all(b",\n  (").map_err(io)?;
        }
        self.insert_rows += 1;
        self.insert_bytes += image.len();
        self.fields(image, b", ", false)?;
        self.out.write_all(b")").map_err(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tests::column;
    use coffer_wire::{Class, KeyMode, Strategy};

    fn rel(name: &str) -> Relation {
        Relation {
            relid: 7,
            leaf: 7,
            schema: "public".into(),
            name: name.into(),
            class: Class::Data,
            strategy: Strategy::Identity,
            key_mode: KeyMode::Key,
            columns: vec![column(1, "id")],
            key: vec![0],
        }
    }

    #[test]
    fn names_are_safe_whatever_the_table_is_called() {
        assert_eq!(file_name(&rel("a"), "csv"), "public.a.csv");
        assert_eq!(file_name(&rel("a/b.c"), "copy"), "public.a%2fb%2ec.copy");
        assert_eq!(file_name(&rel(".."), "copy"), "public.%2e%2e.copy");
        assert_eq!(file_name(&rel(&"ü".repeat(60)), "copy"), "relation-7.copy");
    }

    #[test]
    fn what_is_not_finished_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut f = Files::create(&out, Format::Copy).unwrap();
        f.begin_table(&Arc::new(rel("a"))).unwrap();
        f.end_table().unwrap();
        drop(f);
        assert!(!out.exists());
        let f = Files::create(&out, Format::Copy).unwrap();
        let target = Target { asked: "latest".into(), lsn: coffer_wire::Lsn(1), time_us: 0 };
        f.finish("3", &target, None).unwrap();
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
        assert_eq!(Files::create(&out, Format::Copy).err().unwrap().kind(), Kind::Refused);
        if !cfg!(feature = "parquet") {
            assert_eq!(Files::create(&dir.path().join("x"), Format::Parquet).err().unwrap().kind(), Kind::Refused);
        }
    }
}
