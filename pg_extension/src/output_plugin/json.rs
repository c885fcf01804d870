//! `format=json`: one object per change, for people. Made from the same rows as the frames.

use super::relations::Covered;
use super::state::State;
use super::stream;
use crate::render;
use coffer_wire::{Column, KeyMode, Lsn, Op, Row, RowReader, TenantKind, copy_text};
use pgrx::pg_sys;

impl State {
    /// Writes the rows at hand, which are all of one relation, and forgets them.
    ///
    /// # Safety
    /// `ctx` is the context of the callback that runs.
    pub unsafe fn write_json_rows(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, covered: &Covered) {
        let mut objects = Vec::new();
        for group in self.stream.runs.groups() {
            for row in RowReader::new(&group.data) {
                let row = row.expect("rows written by this process can be read by it");
                let mut out = self.json_head(op_name(row.op));
                put_tenant(&mut out, group.kind(), group.key());
                put_row(&mut out, covered, &row);
                objects.push(out);
            }
        }
        self.stream.runs.clear();
        for (n, object) in objects.iter().enumerate() {
            // SAFETY: by the caller.
            unsafe { write_object(ctx, object, n + 1 == objects.len()) };
        }
    }

    /// Writes a TRUNCATE.
    ///
    /// # Safety
    /// `ctx` is the context of the callback that runs.
    pub unsafe fn write_json_truncate(
        &mut self,
        ctx: *mut pg_sys::LogicalDecodingContext,
        tenant: Option<(TenantKind, &str)>,
        relations: &[std::rc::Rc<Covered>],
    ) {
        let mut out = self.json_head("truncate");
        if let Some((kind, key)) = tenant {
            put_tenant(&mut out, kind, key.as_bytes());
        }
        out.extend_from_slice(b",\"relations\":[");
        for (n, r) in relations.iter().enumerate() {
            if n > 0 {
                out.push(b',');
            }
            put_string(&mut out, r.descriptor.qualified().as_bytes());
        }
        out.push(b']');
        // SAFETY: by the caller.
        unsafe { write_object(ctx, &out, true) };
    }

    /// Writes a marker.
    pub fn write_json_marker(&mut self, ctx: *mut pg_sys::LogicalDecodingContext, kind: &str, payload: &[u8]) {
        if self.options.tenant.is_some() {
            return;
        }
        let mut out = self.json_head("marker");
        put_name(&mut out, "kind");
        put_string(&mut out, kind.as_bytes());
        put_name(&mut out, "payload");
        match std::str::from_utf8(payload) {
            Ok(text) => put_string(&mut out, text.as_bytes()),
            Err(_) => {
                let mut hex = b"\\x".to_vec();
                render::hex(&mut hex, payload);
                put_string(&mut out, &hex);
            }
        }
        // SAFETY: the context is the callback's.
        unsafe { write_object(ctx, &out, true) };
    }

    /// The object's beginning. The position is the commit's end: the point to restore to.
    fn json_head(&self, op: &str) -> Vec<u8> {
        let txn = &self.stream.txn;
        let mut out =
            format!("{{\"lsn\":\"{}\",\"xid\":{},\"commit_time\":\"", Lsn(txn.end_lsn), txn.full_xid()).into_bytes();
        render::timestamp(&mut out, txn.commit_time_us, b"+00");
        out.push(b'"');
        put_name(&mut out, "op");
        put_string(&mut out, op.as_bytes());
        out
    }
}

/// # Safety
/// `ctx` is the context of the callback that runs.
unsafe fn write_object(ctx: *mut pg_sys::LogicalDecodingContext, object: &[u8], last: bool) {
    // SAFETY: the server converts text that ends with NUL; what it answers is in the callback's memory context.
    unsafe {
        let mut text = object.to_vec();
        text.extend_from_slice(b"}\0");
        let converted =
            pg_sys::pg_any_to_server(text.as_ptr().cast(), text.len() as i32 - 1, pg_sys::pg_enc::PG_UTF8 as i32);
        stream::write(ctx, std::ffi::CStr::from_ptr(converted).to_bytes(), last);
    }
}

fn op_name(op: Op) -> &'static str {
    match op {
        Op::Insert => "insert",
        Op::Update | Op::UpdateKey => "update",
        Op::Delete => "delete",
        Op::Opaque => "opaque",
    }
}

fn put_tenant(out: &mut Vec<u8>, kind: TenantKind, key: &[u8]) {
    put_name(out, "tenant");
    if kind == TenantKind::Normal {
        put_string(out, key)
    } else {
        out.extend_from_slice(b"null")
    }
    put_name(out, "tenant_kind");
    put_string(out, kind.name().as_bytes());
}

fn put_row(out: &mut Vec<u8>, covered: &Covered, row: &Row<'_>) {
    let relation = &covered.descriptor;
    put_name(out, "relation");
    put_string(out, relation.qualified().as_bytes());
    if relation.leaf != relation.relid {
        put_name(out, "partition");
        render::integer(out, relation.leaf.into());
    }
    let key_columns = || relation.key.iter().map(|k| &relation.columns[usize::from(*k)]);
    let full_row = relation.key_mode == KeyMode::FullRow;
    if row.op == Op::Opaque {
        put_name(out, "reason");
        put_string(out, row.key);
        // What is kept of an unresolved row is its key, when it has one and it could be read.
        if !full_row && !row.image.is_empty() {
            put_name(out, "key");
            put_line(out, key_columns(), row.image);
        }
        return;
    }
    if !full_row {
        put_name(out, "key");
        put_line(out, key_columns(), row.key);
    }
    match (row.op, row.old_key) {
        (Op::Delete, _) if full_row => {
            put_name(out, "old");
            put_line(out, relation.image_columns(), row.key);
        }
        (Op::UpdateKey, Some(old)) => {
            put_name(out, "old");
            if full_row { put_line(out, relation.image_columns(), old) } else { put_line(out, key_columns(), old) }
        }
        _ => {}
    }
    if row.op != Op::Delete {
        put_name(out, "new");
        put_line(out, relation.image_columns(), row.image);
        if copy_text::has_unchanged(row.image) {
            put_name(out, "unchanged");
            out.push(b'[');
            let unchanged = relation
                .image_columns()
                .zip(copy_text::fields(row.image))
                .filter(|(_, field)| *field == copy_text::UNCHANGED);
            for (n, (column, _)) in unchanged.enumerate() {
                if n > 0 {
                    out.push(b',');
                }
                put_string(out, column.name.as_bytes());
            }
            out.push(b']');
        }
    }
}

fn put_line<'a>(out: &mut Vec<u8>, columns: impl Iterator<Item = &'a Column>, line: &[u8]) {
    out.push(b'{');
    let mut first = true;
    for (column, field) in columns.zip(copy_text::fields(line)) {
        if field == copy_text::UNCHANGED {
            continue;
        }
        if !first {
            out.push(b',');
        }
        first = false;
        put_string(out, column.name.as_bytes());
        out.push(b':');
        match copy_text::unescape(field) {
            None => out.extend_from_slice(b"null"),
            Some(text) => put_value(out, column, &text),
        }
    }
    out.push(b'}');
}

fn put_value(out: &mut Vec<u8>, column: &Column, text: &[u8]) {
    let base = column.type_name.split('(').next().unwrap_or_default();
    let number_like = || text.iter().all(|b| matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e'));
    match base {
        "boolean" => out.extend_from_slice(if text == b"t" { b"true" } else { b"false" }),
        "smallint" | "integer" | "bigint" | "oid" | "numeric" | "real" | "double precision" if number_like() => {
            out.extend_from_slice(text);
        }
        "json" | "jsonb" => out.extend_from_slice(text),
        _ => put_string(out, text),
    }
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    for b in text {
        match b {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0..0x20 => {
                out.extend_from_slice(b"\\u00");
                render::hex(out, &[*b]);
            }
            _ => out.push(*b),
        }
    }
    out.push(b'"');
}
