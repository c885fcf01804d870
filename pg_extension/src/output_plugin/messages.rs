//! Our own messages in the log: tags for the change that follows, markers for the agent.

use super::options::Format;
use super::relations::Known;
use super::rows::Tenant;
use super::state::State;
use super::stream::WRITE_BYTES;
use coffer_wire::tag::{self, Fill, Message};
use coffer_wire::{copy_text, put_update};
use pgrx::pg_sys;

impl State {
    /// Takes a transactional message with our prefix. Anybody can write such messages; those without our MAC are passed
    /// over. `false` when there is nothing in it for the reader.
    pub fn message(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, message: &[u8]) -> bool {
        let Some(key) = self.secret.key() else { return false };
        match tag::decode(&key, message) {
            Ok(Message::Tag(tag)) => {
                self.tags.put(&tag);
                false
            }
            Ok(Message::Fill(fill)) => self.fill(ctx, &fill),
            Ok(Message::Marker { kind, payload }) => self.marker(ctx, kind, payload),
            Err(_) => false,
        }
    }

    /// A value that a moved row took along: an update of its new tenant's row that changes nothing else.
    fn fill(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, fill: &Fill<'_>) -> bool {
        // SAFETY: the relation is closed below; a message in a transaction is read under its historic snapshot.
        let known = unsafe {
            let relation = pg_sys::RelationIdGetRelation(fill.relid.into());
            if relation.is_null() {
                return false;
            }
            let known = self.relations.get(relation, &self.options, self.source.encoding);
            pg_sys::RelationClose(relation);
            known
        };
        let (Known::Covered(covered), Ok(key)) = (known, std::str::from_utf8(fill.tenant.key)) else { return false };
        let tenant = Tenant { kind: fill.tenant.kind, key: fill.tenant.key.to_vec() };
        let layout = &covered.layout;
        let at = layout.image.iter().position(|c| layout.columns[usize::from(*c)].attnum == fill.attnum);
        let Some(at) = at.filter(|_| self.wants(&tenant)) else { return false };
        let fields = (0..layout.image.len()).map(|i| if i == at { fill.field } else { copy_text::UNCHANGED });
        let image = fields.collect::<Vec<_>>().join(&b'\t');
        let mut row = Vec::with_capacity(image.len() + fill.key.len() + 16);
        put_update(&mut row, 0, None, fill.key, &image);
        // SAFETY: the context is the callback's.
        unsafe {
            match self.options.format {
                Format::Frames if row.len() > WRITE_BYTES => {
                    let mut out = self.stream.large_row(ctx, &covered, (tenant.kind, key), row.len() as u64);
                    out.put(&row);
                    out.finish();
                }
                format => {
                    if format == Format::Frames {
                        self.stream.announce(&covered);
                    }
                    let group = self.stream.runs.group(tenant.kind, &tenant.key);
                    let into = self.stream.runs.at(group);
                    let rel = into.relation_index(covered.id);
                    row[1..3].copy_from_slice(&rel.to_le_bytes());
                    into.data.extend_from_slice(&row);
                    self.stream.runs.added(group, row.len());
                    if format == Format::Json {
                        self.write_json_rows(ctx, &covered);
                    }
                }
            }
        }
        true
    }

    fn marker(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, kind: &str, payload: &[u8]) -> bool {
        match self.options.format {
            Format::Frames => {
                self.stream.marker(kind, payload);
                if kind == "ddl" {
                    self.describe(payload);
                }
            }
            Format::Json => self.write_json_marker(ctx, kind, payload),
        }
        true
    }

    /// Says what the tables that a DDL touched look like from here on: a tenant may write no row that would say it.
    fn describe(&mut self, payload: &[u8]) {
        // The list of numbers that the payload ends with.
        let list = payload.rsplit(|b| *b == b'[').next().unwrap_or_default();
        let relids =
            list.split(|b| !b.is_ascii_digit()).filter_map(|n| std::str::from_utf8(n).ok()?.parse::<u32>().ok());
        let mut ids = Vec::new();
        for relid in relids {
            // SAFETY: the relation is closed below; a message in a transaction is read under its historic snapshot.
            let known = unsafe {
                let relation = pg_sys::RelationIdGetRelation(relid.into());
                if relation.is_null() {
                    continue;
                }
                let known = self.relations.get(relation, &self.options, self.source.encoding);
                pg_sys::RelationClose(relation);
                known
            };
            if let Known::Covered(covered) = known
                && !covered.descriptor.columns.is_empty()
            {
                self.stream.announce(&covered);
                ids.extend_from_slice(&covered.id.to_le_bytes());
            }
        }
        if !ids.is_empty() {
            self.stream.marker("described", &ids);
        }
    }

    /// The rows of a covered table are being written anew by ALTER TABLE: what the log has of them are the new rows,
    /// without the old ones. Said once per transaction; a base of the table has to follow.
    pub fn rewrite(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, relid: u32) -> bool {
        if self.rewritten.contains(&relid) {
            return false;
        }
        self.rewritten.push(relid);
        self.marker(ctx, "rewrite", format!("{{\"relid\":{relid}}}").as_bytes())
    }
}
