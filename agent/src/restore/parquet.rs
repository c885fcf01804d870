//! Parquet: one file per table, in row groups that are held in memory one at a time.
//!
//! Integers, floats, booleans, dates and times with a zone are typed; every other type is its text, which loses nothing.
//! What a typed column cannot say (an infinite date) is an error that names the column: nothing is rounded.

use super::encode::unescaped;
use crate::error::{Context, Error, Kind, Result};
use crate::merge::{Field, Image};
use coffer_wire::{Column, Relation, copy_text};
use parquet::basic::{Compression, LogicalType, Repetition, TimeUnit, Type as Physical};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DataType, DoubleType, FloatType, Int32Type, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use parquet::schema::types::Type;
use std::fs::File;
use std::io::Read;
use std::sync::Arc;

/// A row group ends at this many bytes of values, or rows.
const GROUP_BYTES: usize = 64 << 20;
const GROUP_ROWS: usize = 1 << 20;

/// Values of one column, without those that are NULL.
enum Values {
    Bool(Vec<bool>),
    Int(Vec<i32>),
    Long(Vec<i64>),
    Float(Vec<f32>),
    Double(Vec<f64>),
    /// Days since 1970-01-01.
    Date(Vec<i32>),
    /// Microseconds since 1970-01-01 UTC.
    Time(Vec<i64>),
    Text(Vec<ByteArray>),
}

impl Values {
    fn of(c: &Column) -> Self {
        match c.type_oid {
            16 => Self::Bool(Vec::new()),
            21 | 23 => Self::Int(Vec::new()),
            20 | 26 => Self::Long(Vec::new()),
            700 => Self::Float(Vec::new()),
            701 => Self::Double(Vec::new()),
            1082 => Self::Date(Vec::new()),
            1184 => Self::Time(Vec::new()),
            _ => Self::Text(Vec::new()),
        }
    }

    fn schema(&self, name: &str) -> parquet::errors::Result<Type> {
        let (physical, logical) = match self {
            Self::Bool(_) => (Physical::BOOLEAN, None),
            Self::Int(_) => (Physical::INT32, None),
            Self::Long(_) => (Physical::INT64, None),
            Self::Float(_) => (Physical::FLOAT, None),
            Self::Double(_) => (Physical::DOUBLE, None),
            Self::Date(_) => (Physical::INT32, Some(LogicalType::Date)),
            Self::Time(_) => (Physical::INT64, Some(LogicalType::timestamp(true, TimeUnit::MICROS))),
            Self::Text(_) => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
        };
        Type::primitive_type_builder(name, physical)
            .with_repetition(Repetition::OPTIONAL)
            .with_logical_type(logical)
            .build()
    }

    /// Takes a value; `None`: it is none of the type's.
    fn push(&mut self, value: Vec<u8>) -> Option<()> {
        if let Self::Text(v) = self {
            v.push(ByteArray::from(value));
            return Some(());
        }
        let text = std::str::from_utf8(&value).ok()?;
        match self {
            Self::Bool(v) => v.push(text == "t"),
            Self::Int(v) => v.push(text.parse().ok()?),
            Self::Long(v) => v.push(text.parse().ok()?),
            Self::Float(v) => v.push(text.parse().ok()?),
            Self::Double(v) => v.push(text.parse().ok()?),
            Self::Date(v) => {
                let days = text.parse::<jiff::civil::Date>().ok()? - jiff::civil::date(1970, 1, 1);
                v.push(days.get_days());
            }
            Self::Time(v) => v.push(time(text)?),
            Self::Text(_) => {}
        }
        Some(())
    }

    fn write(&mut self, column: &mut SerializedColumnWriter<'_>, levels: &[i16]) -> parquet::errors::Result<()> {
        fn all<T: DataType>(
            column: &mut SerializedColumnWriter<'_>,
            values: &mut Vec<T::T>,
            levels: &[i16],
        ) -> parquet::errors::Result<()> {
            column.typed::<T>().write_batch(values, Some(levels), None)?;
            values.clear();
            Ok(())
        }
        match self {
            Self::Bool(v) => all::<BoolType>(column, v, levels),
            Self::Int(v) | Self::Date(v) => all::<Int32Type>(column, v, levels),
            Self::Long(v) | Self::Time(v) => all::<Int64Type>(column, v, levels),
            Self::Float(v) => all::<FloatType>(column, v, levels),
            Self::Double(v) => all::<DoubleType>(column, v, levels),
            Self::Text(v) => all::<ByteArrayType>(column, v, levels),
        }
    }
}

/// `2026-11-22 20:41:59.353131+00`, as sessions under UTC write it.
fn time(text: &str) -> Option<i64> {
    let (date, rest) = text.split_once(' ')?;
    let timestamp: jiff::Timestamp = format!("{date}T{}Z", rest.strip_suffix("+00")?).parse().ok()?;
    Some(timestamp.as_microsecond())
}

/// The file of one table.
pub struct ParquetTable {
    writer: SerializedFileWriter<File>,
    names: Vec<String>,
    columns: Vec<Values>,
    /// Per column and row: 1 a value, 0 NULL.
    levels: Vec<Vec<i16>>,
    bytes: usize,
}

fn failed(e: parquet::errors::ParquetError) -> Error {
    Error::new(Kind::Other, "cannot write").source(e)
}

impl ParquetTable {
    pub fn new(file: &File, rel: &Relation) -> Result<Self> {
        let file = file.try_clone().context(Kind::Other, "cannot write")?;
        let names: Vec<String> = rel.image_columns().map(|c| c.name.clone()).collect();
        let columns: Vec<Values> = rel.image_columns().map(Values::of).collect();
        let fields: parquet::errors::Result<Vec<_>> =
            columns.iter().zip(&names).map(|(c, n)| c.schema(n).map(Arc::new)).collect();
        let schema =
            Type::group_type_builder(&rel.name).with_fields(fields.map_err(failed)?).build().map_err(failed)?;
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties)).map_err(failed)?;
        Ok(Self { writer, levels: vec![Vec::new(); names.len()], names, columns, bytes: 0 })
    }

    pub fn row(&mut self, image: &Image<'_>) -> Result<()> {
        for (i, f) in image.fields().into_iter().enumerate().take(self.columns.len()) {
            let escaped = match f {
                Field::Bytes(b) if b == copy_text::NULL => {
                    self.levels[i].push(0);
                    continue;
                }
                Field::Bytes(b) => unescaped(b),
                Field::Large(r) => {
                    let mut all = Vec::new();
                    image.open(r).read_to_end(&mut all).map_err(crate::merge::from_io)?;
                    unescaped(&all)
                }
            };
            self.bytes += escaped.len() + 8;
            self.levels[i].push(1);
            let shown = String::from_utf8_lossy(&escaped[..escaped.len().min(40)]).into_owned();
            self.columns[i].push(escaped).ok_or_else(|| {
                Error::new(
                    Kind::Refused,
                    format!("column {}: '{shown}' has no value of its type in Parquet", self.names[i]),
                )
                .code("no_parquet_value")
                .hint("use --format csv, jsonl, sql or copy")
            })?;
        }
        let rows = self.levels.first().map_or(0, Vec::len);
        if self.bytes >= GROUP_BYTES || rows >= GROUP_ROWS { self.group() } else { Ok(()) }
    }

    fn group(&mut self) -> Result<()> {
        if self.levels.first().is_none_or(Vec::is_empty) {
            return Ok(());
        }
        let mut group = self.writer.next_row_group().map_err(failed)?;
        for (values, levels) in self.columns.iter_mut().zip(&mut self.levels) {
            let column = group.next_column().map_err(failed)?;
            let mut column = column.ok_or_else(|| Error::other("a Parquet column is missing"))?;
            values.write(&mut column, levels).map_err(failed)?;
            column.close().map_err(failed)?;
            levels.clear();
        }
        group.close().map_err(failed)?;
        self.bytes = 0;
        Ok(())
    }

    /// Writes what is left and the footer.
    pub fn finish(mut self) -> Result<()> {
        self.group()?;
        self.writer.close().map(drop).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tests::column;
    use coffer_wire::{Class, KeyMode, Strategy};
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::RowAccessor;

    #[test]
    fn times_are_exact_and_what_has_no_value_is_not_rounded() {
        assert_eq!(time("1970-01-01 00:00:01.5+00"), Some(1_500_000));
        assert_eq!(time("1969-12-31 23:59:59+00"), Some(-1_000_000));
        assert_eq!((time("infinity"), time("0044-03-15 00:00:00+00 BC")), (None, None));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let typed = |n: i16, name: &str, oid: u32| Column { type_oid: oid, ..column(n, name) };
        let rel = Relation {
            relid: 7,
            leaf: 7,
            schema: "s".into(),
            name: "t".into(),
            class: Class::Data,
            strategy: Strategy::Identity,
            key_mode: KeyMode::Key,
            columns: vec![
                typed(1, "id", 20),
                typed(2, "ok", 16),
                typed(3, "day", 1082),
                typed(4, "at", 1184),
                typed(5, "n", 1700),
                typed(6, "f", 701),
            ],
            key: vec![0],
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.parquet");
        let file = File::create(&path).unwrap();
        let mut t = ParquetTable::new(&file, &rel).unwrap();
        crate::merge::tests::with_lines(
            &[
                b"9223372036854775807\tt\t2024-02-29\t2024-02-29 12:00:00.000001+00\t1.50\tNaN",
                b"2\t\\N\t\\N\t\\N\ta\\tb\t\\N",
            ],
            |image| t.row(&image).unwrap(),
        );
        t.finish().unwrap();
        let reader = SerializedFileReader::new(File::open(&path).unwrap()).unwrap();
        let rows: Vec<_> = reader.get_row_iter(None).unwrap().map(Result::unwrap).collect();
        assert_eq!((rows.len(), rows[0].get_long(0).unwrap(), rows[0].get_bool(1).unwrap()), (2, i64::MAX, true));
        assert_eq!(rows[0].get_string(4).unwrap(), "1.50");
        assert!(rows[0].get_double(5).unwrap().is_nan());
        assert_eq!(rows[0].get_timestamp_micros(3).unwrap(), 1_709_208_000_000_001);
        assert_eq!(rows[1].get_string(4).unwrap(), "a\tb");
        assert!(rows[1].get_bool(1).is_err(), "NULL");
    }
}
