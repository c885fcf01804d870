//! From a change to rows in the runs of their tenants.

use super::large;
use super::options::Format;
use super::relations::{Covered, Known, Owner};
use super::state::State;
use super::tags::Tag;
use crate::compat;
use crate::layout::{Identity, Layout};
use crate::render::{Found, Source};
use crate::tuple::{self, Field, Varlena};
use coffer_wire::tag::TagOp;
use coffer_wire::{Op, TenantKind, put_opaque};
use pgrx::PgTryBuilder;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::CaughtError;
use std::any::Any;
use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Why a change could not be attributed or rendered.
pub type Reason = Cow<'static, str>;

const LOST_IDENTITY: &str = "the log has no old row: the table has lost its replica identity";

/// Whose a row is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    pub kind: TenantKind,
    pub key: Vec<u8>,
}

impl Tenant {
    fn empty() -> Self {
        Self { kind: TenantKind::Unresolved, key: Vec::new() }
    }
}

/// A change with its tuples taken apart.
#[derive(Clone, Copy)]
pub struct Change<'a> {
    pub op: TagOp,
    /// The old row, as far as the log has it.
    pub old: Option<&'a [Field]>,
    pub new: Option<&'a [Field]>,
    /// Whether there are values that were TOASTed.
    pub external: bool,
}

/// Buffers that live across changes.
pub struct Scratch {
    old_fields: Vec<Field>,
    new_fields: Vec<Field>,
    /// The tenant of the change, or the new one of a row that moves.
    tenant: Tenant,
    old_tenant: Tenant,
    key: Vec<u8>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            old_fields: Vec::new(),
            new_fields: Vec::new(),
            tenant: Tenant::empty(),
            old_tenant: Tenant::empty(),
            key: Vec::new(),
        }
    }
}

/// How many tenants a change concerns.
enum Whose {
    /// One, in `Scratch::tenant`.
    One,
    /// The row leaves `Scratch::old_tenant` for `Scratch::tenant`.
    Moved,
}

impl State {
    /// Takes one change. `false` when it concerns nobody.
    ///
    /// # Safety
    /// The arguments are those of the change callback.
    pub unsafe fn change(
        &mut self,
        ctx: *mut pg_sys::LogicalDecodingContext,
        relation: pg_sys::Relation,
        change: *mut pg_sys::ReorderBufferChange,
    ) -> bool {
        // SAFETY: by the caller.
        let covered = match unsafe { self.relations.get(relation, &self.options, self.source.encoding) } {
            Known::Covered(covered) => covered,
            Known::Rewrite(relid) => return self.rewrite(ctx, relid),
            Known::Skipped => return false,
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        let Scratch { old_fields, new_fields, tenant, old_tenant, key } = &mut *scratch;
        // SAFETY: the tuples are whole, of this relation, and live as long as the change.
        let change = unsafe {
            use pg_sys::ReorderBufferChangeType as Type;
            let tp = (*change).data.tp;
            let op = match (*change).action {
                Type::REORDER_BUFFER_CHANGE_INSERT => TagOp::Insert,
                Type::REORDER_BUFFER_CHANGE_UPDATE => TagOp::Update,
                _ => TagOp::Delete,
            };
            let old = if op == TagOp::Insert { None } else { compat::tuple_header(tp.oldtuple) };
            let new = if op == TagOp::Delete { None } else { compat::tuple_header(tp.newtuple) };
            let mut external = false;
            for (header, fields) in [(old, &mut *old_fields), (new, &mut *new_fields)] {
                if let Some(header) = header {
                    tuple::fields_of(header, &covered.layout.atts, fields);
                    external |= tuple::has_external(header);
                }
            }
            if external && old.is_some() && new.is_some() {
                fill_unchanged(&covered.layout, old_fields, new_fields);
            }
            Change { op, old: old.map(|_| &old_fields[..]), new: new.map(|_| &new_fields[..]), external }
        };
        let tag = self.tags.take(covered.descriptor.leaf);
        let outcome =
            catch_unwind(AssertUnwindSafe(|| match self.whose(&covered, &change, tag, tenant, old_tenant, key)? {
                Whose::One => self.put(ctx, &covered, &change, tenant),
                Whose::Moved => {
                    let fields = change.old.or(change.new);
                    let leaves = Change { op: TagOp::Delete, old: fields, new: None, ..change };
                    let arrives = Change { op: TagOp::Insert, old: None, ..change };
                    let left = self.put(ctx, &covered, &leaves, old_tenant)?;
                    Ok(self.put(ctx, &covered, &arrives, tenant)? || left)
                }
            }));
        let taken = match outcome {
            Ok(Ok(taken)) => taken,
            Ok(Err(reason)) => self.unresolved(&covered, &change, &reason, key),
            Err(panic) => self.unresolved(&covered, &change, &data_error(panic), key),
        };
        if self.options.format == Format::Json {
            // SAFETY: by the caller.
            unsafe { self.write_json_rows(ctx, &covered) };
        }
        self.scratch = scratch;
        taken
    }

    /// Finds whose the change is; the answer is in `tenant` and, for a row that moves, `old_tenant`.
    #[inline]
    fn whose(
        &self,
        covered: &Covered,
        change: &Change<'_>,
        tag: Option<Tag>,
        tenant: &mut Tenant,
        old_tenant: &mut Tenant,
        key: &mut Vec<u8>,
    ) -> Result<Whose, Reason> {
        match &covered.owner {
            Owner::Column(column) => {
                if let Some(new) = change.new {
                    self.tenant_in(covered, *column, new, tenant)?;
                    if change.op == TagOp::Insert {
                        return Ok(Whose::One);
                    }
                }
                let old_row = change.old.filter(|_| covered.layout.in_old_row(*column));
                if let Some(old) = old_row {
                    let into = if change.new.is_some() { &mut *old_tenant } else { &mut *tenant };
                    self.tenant_in(covered, *column, old, into)?;
                } else if let Some(tag) = self.agreeing(covered, change, tag, key)
                    && let Some(was) = tag.old
                {
                    *(if change.new.is_some() { &mut *old_tenant } else { &mut *tenant }) = was;
                } else if change.op == TagOp::Update {
                    // No tag and no old value: the tenant did not change.
                    return Ok(Whose::One);
                } else {
                    return Err(
                        if change.old.is_none() { LOST_IDENTITY } else { "a delete without a valid tag" }.into()
                    );
                }
                Ok(if change.new.is_none() || tenant == old_tenant { Whose::One } else { Whose::Moved })
            }
            Owner::Fixed(kind, name) => {
                tenant.kind = *kind;
                tenant.key.clone_from(name);
                Ok(Whose::One)
            }
            Owner::Tagged => {
                let tag = self.agreeing(covered, change, tag, key).ok_or("a change without a valid tag")?;
                match (change.op, tag.old, tag.new) {
                    (TagOp::Update, Some(old), Some(new)) if old != new => {
                        (*old_tenant, *tenant) = (old, new);
                        Ok(Whose::Moved)
                    }
                    (TagOp::Delete, Some(only), _) | (_, _, Some(only)) => {
                        *tenant = only;
                        Ok(Whose::One)
                    }
                    _ => Err("a tag that names no tenant".into()),
                }
            }
            Owner::Unknown(why) => Err(why.clone().into()),
        }
    }

    /// The tag, if it is about this change.
    fn agreeing(&self, covered: &Covered, change: &Change<'_>, tag: Option<Tag>, key: &mut Vec<u8>) -> Option<Tag> {
        let tag = tag.filter(|t| t.op == change.op)?;
        let fields = change.old.or(change.new)?;
        key.clear();
        // An insert is tagged before its row has a key that could be bound.
        if change.op != TagOp::Insert && covered.layout.identity == Identity::Key {
            // SAFETY: the fields are of the change at hand.
            unsafe { covered.layout.put_key(key, fields, self.source) };
        }
        (tag.key == *key).then_some(tag)
    }

    #[inline]
    fn tenant_in(&self, covered: &Covered, column: usize, fields: &[Field], tenant: &mut Tenant) -> Result<(), Reason> {
        tenant.key.clear();
        // SAFETY: the fields are of the change at hand.
        match unsafe { covered.layout.put_plain(&mut tenant.key, column, fields, self.source) } {
            Found::Value => {
                tenant.kind = TenantKind::Normal;
                Ok(())
            }
            Found::Null => {
                tenant.kind = TenantKind::Unassigned;
                Ok(())
            }
            Found::Unchanged => Err("the log does not carry the tenant column's value".into()),
        }
    }

    /// Puts a row into the run of its tenant.
    #[inline]
    fn put(
        &mut self,
        ctx: *mut pg_sys::LogicalDecodingContext,
        covered: &Covered,
        change: &Change<'_>,
        tenant: &Tenant,
    ) -> Result<bool, Reason> {
        if !self.wants(tenant) {
            return Ok(false);
        }
        let Ok(name) = std::str::from_utf8(&tenant.key) else {
            return Err("its tenant's name is not valid UTF-8".into());
        };
        if change.external {
            // SAFETY: the context is the callback's, the fields are of the change at hand.
            if unsafe { self.put_if_large(ctx, covered, change, (tenant.kind, name))? } {
                return Ok(true);
            }
        }
        if self.options.format == Format::Frames {
            self.stream.announce(covered);
        }
        let group = self.stream.runs.group(tenant.kind, &tenant.key);
        let into = self.stream.runs.at(group);
        let rel = into.relation_index(covered.id);
        let mark = into.data.len();
        self.mark = Some((group, mark));
        // SAFETY: the fields are of the change at hand.
        unsafe { put_row(&mut into.data, rel, &covered.layout, change, self.source)? };
        self.mark = None;
        let bytes = into.data.len() - mark;
        self.stream.runs.added(group, bytes);
        Ok(true)
    }

    /// # Safety
    /// The context is the callback's, the fields are of the change at hand.
    unsafe fn put_if_large(
        &mut self,
        ctx: *mut pg_sys::LogicalDecodingContext,
        covered: &Covered,
        change: &Change<'_>,
        tenant: (TenantKind, &str),
    ) -> Result<bool, Reason> {
        // SAFETY: by the caller.
        let Some(row) = (unsafe { large::row(&covered.layout, change, self.source)? }) else { return Ok(false) };
        if self.options.format == Format::Json {
            return Err("a row too large for JSON".into());
        }
        // SAFETY: by the caller.
        let mut out = unsafe { self.stream.large_row(ctx, covered, tenant, row.len()) };
        row.write(&mut |bytes| out.put(bytes));
        out.finish();
        Ok(true)
    }

    /// Keeps what could not be attributed or rendered, with the reason.
    #[cold]
    fn unresolved(&mut self, covered: &Covered, change: &Change<'_>, reason: &str, key: &mut Vec<u8>) -> bool {
        if let Some((group, mark)) = self.mark.take() {
            self.stream.runs.at(group).data.truncate(mark);
        }
        let nobody = Tenant { kind: TenantKind::Unresolved, key: Vec::new() };
        if !self.wants(&nobody) {
            return false;
        }
        key.clear();
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            if let Some(fields) = change.old.or(change.new).filter(|_| covered.layout.identity == Identity::Key) {
                // SAFETY: the fields are of the change at hand.
                unsafe { covered.layout.put_key(key, fields, self.source) };
            }
        }));
        if let Err(panic) = rendered {
            data_error(panic);
            key.clear();
        }
        if self.options.format == Format::Frames {
            self.stream.announce(covered);
        }
        let group = self.stream.runs.group(nobody.kind, b"");
        let into = self.stream.runs.at(group);
        let rel = into.relation_index(covered.id);
        let before = into.data.len();
        put_opaque(&mut into.data, rel, reason, key);
        let bytes = into.data.len() - before;
        self.stream.runs.added(group, bytes);
        true
    }

    /// Whether the filter lets this tenant through.
    #[inline]
    pub fn wants(&self, tenant: &Tenant) -> bool {
        match &self.options.tenant {
            None => true,
            Some(only) => tenant.kind == TenantKind::Normal && tenant.key == *only,
        }
    }
}

/// What the server, or a function of a type, could not do with the data at hand. What is no fault of the data goes on
/// its way: resources, cancellation and shutdown, the system.
pub fn data_error(panic: Box<dyn Any + Send>) -> Reason {
    PgTryBuilder::new(AssertUnwindSafe(move || -> Reason { resume_unwind(panic) }))
        .catch_others(|error| match &error {
            CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => {
                // Classes 53, 57 and 58: the digits stand in six bits each, the first lowest.
                let code = report.sql_error_code() as u32;
                let class = (code & 63, code >> 6 & 63);
                if matches!(class, (5, 3 | 7 | 8)) {
                    error.rethrow();
                }
                report.message().to_owned().into()
            }
            CaughtError::RustPanic { ereport, .. } => ereport.message().to_owned().into(),
        })
        .execute()
}

/// Gives unchanged TOASTed values of the new row the value that the old row has.
///
/// # Safety
/// Both are fields of living tuples of the layout's relation.
unsafe fn fill_unchanged(layout: &Layout, old: &[Field], new: &mut [Field]) {
    for (i, c) in layout.columns.iter().enumerate() {
        let (was, is) = (old[c.field], new[c.field]);
        // SAFETY: an attribute of length -1 is a varlena.
        let unchanged = layout.atts[c.field].len == -1
            && !is.is_null()
            && !is.is_missing()
            && unsafe { matches!(tuple::varlena(is.ptr()), Varlena::OnDisk(_)) };
        if unchanged && layout.in_old_row(i) && !was.is_null() {
            new[c.field] = was;
        }
    }
}

/// Reserves a length, writes, and fills the length in.
#[inline]
fn sized<R>(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>) -> R) -> R {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    let r = write(out);
    let len = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&len.to_le_bytes());
    r
}

/// Appends a row in the form that `coffer_wire` documents.
///
/// # Safety
/// The fields are of living tuples of the layout's relation.
#[inline]
unsafe fn put_row(
    out: &mut Vec<u8>,
    rel: u16,
    layout: &Layout,
    change: &Change<'_>,
    source: Source,
) -> Result<(), Reason> {
    let start = out.len();
    let head = |out: &mut Vec<u8>, op: Op| {
        let rel = rel.to_le_bytes();
        out.extend_from_slice(&[op as u8, rel[0], rel[1]]);
    };
    // SAFETY: by the caller.
    let key = |out: &mut Vec<u8>, fields: &[Field]| unsafe { sized(out, |out| layout.put_key(out, fields, source)) };
    // SAFETY: by the caller.
    let image =
        |out: &mut Vec<u8>, fields: &[Field]| unsafe { sized(out, |out| layout.put_image(out, fields, source)) };
    let mut whole = true;
    match (layout.identity, change.old, change.new) {
        (_, None, Some(new)) if change.op == TagOp::Insert => {
            head(out, Op::Insert);
            whole = key(out, new);
            image(out, new);
        }
        (Identity::Key, None, Some(new)) => {
            head(out, Op::Update);
            whole = key(out, new);
            image(out, new);
        }
        (Identity::Key, Some(old), Some(new)) => {
            head(out, Op::UpdateKey);
            let old_at = out.len();
            key(out, old);
            let new_at = out.len();
            whole = key(out, new);
            if out[old_at..new_at] == out[new_at..] {
                out.truncate(new_at);
                out[start] = Op::Update as u8;
            }
            image(out, new);
        }
        (Identity::Key, Some(old), None) => {
            head(out, Op::Delete);
            whole = key(out, old);
        }
        (Identity::FullRow, Some(old), Some(new)) => {
            head(out, Op::UpdateKey);
            image(out, old);
            out.extend_from_slice(&[0; 4]);
            image(out, new);
        }
        (Identity::FullRow, Some(old), None) => {
            head(out, Op::Delete);
            image(out, old);
        }
        _ => return Err(LOST_IDENTITY.into()),
    }
    if whole { Ok(()) } else { Err("the log does not carry a part of its key".into()) }
}
