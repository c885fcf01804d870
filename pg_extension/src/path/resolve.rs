//! Who a row belongs to, and what follows when a parent changes.

use super::Owner;
use super::dead;
use super::plan::{self, Edge, Key, Parent};
use super::state::{self, Moving, Rows};
use crate::catalog;
use crate::encoding::Encoding;
use crate::row_trigger::Call;
use crate::settings;
use crate::spi::Value;
use coffer_wire::TenantKind;
use pgrx::pg_sys;
use std::collections::HashMap;
use std::rc::Rc;

/// Which version of a row is asked about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// As it is archived; written by this transaction.
    Old,
    /// As it is archived; written by another, which knew its parent.
    Theirs,
    /// As it will be.
    New,
}

/// How long an answer is right.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    /// Until the transaction ends: the parents are locked.
    Long,
    /// Now.
    Now,
    /// Until the parent that came in the place of a deleted one has found the rows below.
    UntilFound,
}

/// A parent that was not there when last looked, and rows that refer to it.
#[derive(Clone)]
struct Waiting {
    id: state::ParentId,
    root: u32,
    values: Vec<Vec<u8>>,
    was: Owner,
    /// One that such rows are in.
    table: u32,
}

/// How many parents are asked about at once.
const MAX_ASKED: usize = 50_000;

/// The first number of advisory locks on parents.
const PARENT_LOCKS: u32 = 6_516_586;

/// The values of a key, UTF-8; `None` when one of them is NULL.
type Values = Option<Vec<Vec<u8>>>;

fn edge_of(root: u32) -> Option<Rc<Edge>> {
    if let Some(known) = state::with(|s| s.edge(root)) {
        return known;
    }
    let edge = Edge::load(root).map(Rc::new);
    state::with(|s| s.put_edge(root, edge.clone()));
    edge
}

fn parent_of(root: u32) -> Rc<Parent> {
    if let Some(known) = state::with(|s| s.parent(root)) {
        return known;
    }
    let parent = Rc::new(Parent::load(root));
    state::with(|s| s.put_parent(root, parent.clone()));
    parent
}

/// Whose a row was and will be.
///
/// # Safety
/// The tuples are of the trigger's relation.
pub unsafe fn tenants(
    call: &Call<'_>,
    old: Option<pg_sys::HeapTuple>,
    new: Option<pg_sys::HeapTuple>,
) -> (Option<Owner>, Option<Owner>) {
    let root = call.table.root;
    if let Some((from, to)) = state::with(|s| s.moving(root)) {
        return (old.map(|_| from), new.map(|_| to));
    }
    let Some(edge) = edge_of(root) else {
        // A trigger without a rule: nobody reads its tags.
        let unknown = Owner { kind: TenantKind::Unresolved, key: Vec::new() };
        return (old.map(|_| unknown.clone()), new.map(|_| unknown.clone()));
    };
    // SAFETY: by the caller.
    let values = |tuple| unsafe { call.texts(tuple, &edge.columns) };
    let (was, is) = (old.map(values), new.map(values));
    // SAFETY: by the caller.
    let side = old.map_or(Side::Old, |t| unsafe { side_of(t) });
    let found = was.as_ref().map(|v| find(&edge, v, side));
    if let (Some((owner, Holds::UntilFound)), Some(old), None) = (&found, old, new) {
        // What lies below follows at the end of the statement, when the way up leads elsewhere.
        // SAFETY: by the caller.
        unsafe { leave_below(call, old, owner) };
    }
    let old_owner = found.map(|f| f.0);
    let new_owner = match (&was, &is) {
        // Below a parent that is awaited all that this transaction writes is nobody's, theirs included.
        (Some(a), Some(b)) if a == b && !(side == Side::Theirs && state::with(|s| s.is_awaiting())) => {
            old_owner.clone()
        }
        _ => is.as_ref().map(|v| find(&edge, v, Side::New).0),
    };
    (old_owner, new_owner)
}

/// # Safety
/// The tuple is one of a table.
unsafe fn side_of(old: pg_sys::HeapTuple) -> Side {
    // SAFETY: by the caller.
    if unsafe { dead::written_by_us((*old).t_data) }.is_some() { Side::Old } else { Side::Theirs }
}

/// Whether it is an update of our own that reaches the row: what moved the parent was the session's doing, this is not.
pub fn is_ours(call: &Call<'_>) -> bool {
    state::with(|s| s.moving_rows(call.table.root)).is_some()
}

/// Whether a row that an update of our own reaches is to be left as it is.
///
/// # Safety
/// The tuple is of the trigger's relation.
pub unsafe fn stays(call: &Call<'_>, old: Option<pg_sys::HeapTuple>) -> bool {
    let (Some(Rows::Own(before)), Some(old)) = (state::with(|s| s.moving_rows(call.table.root)), old) else {
        return false;
    };
    // SAFETY: by the caller.
    unsafe { dead::written_by_us((*old).t_data) }.is_none_or(|by| by >= before)
}

/// Notes a row of our own that finds its parent when others' rows below wait with it.
///
/// # Safety
/// The tuple is of the trigger's relation.
pub unsafe fn own_row_moved(call: &Call<'_>, new: pg_sys::HeapTuple) {
    let root = call.table.root;
    if !matches!(state::with(|s| s.moving_rows(root)), Some(Rows::Own(_))) {
        return;
    }
    for (n, key) in parent_of(root).keys.iter().enumerate() {
        // SAFETY: by the caller.
        if let Some(values) = unsafe { call.texts(new, &key.columns) } {
            state::with(|s| s.note_moved(&key.id(&values), (root, n, values)));
        }
    }
}

/// Whose the row is that refers to this parent.
fn find(edge: &Rc<Edge>, values: &Values, side: Side) -> (Owner, Holds) {
    let Some(key) = values else { return (Owner::nobody(), Holds::Long) };
    let id = edge.id(key);
    if let Some(before) = state::with(|s| s.before(&id)) {
        return (before, Holds::Now);
    }
    // A parent may be there again, for somebody else, before its own trigger has found the rows that the other one left:
    // until then they are archived under the tenant of that one, and so is what joins them.
    // A row of another transaction waits for no parent: nobody's it is only if the parent that left was.
    if let Some(left) = state::with(|s| s.orphans(&id))
        && (side != Side::Theirs
            || left.kind == TenantKind::Normal
            || with_settings(edge, || dead::results(edge, key)).is_some())
    {
        return (left, Holds::UntilFound);
    }
    // It may even be there again before the trigger of the one that left.
    if state::with(|s| s.is_leaving(&id))
        && let Some(row) = with_settings(edge, || dead::results(edge, key))
    {
        return (follow(edge, row, Side::Old).0, Holds::UntilFound);
    }
    if let Some(known) = state::with(|s| s.cached(&id)) {
        return (Owner::clone(&known), Holds::Long);
    }
    while let Some(row) = with_settings(edge, || edge.lookup(key)) {
        let next = next_parent(edge, &row).filter(|next| state::with(|s| s.orphans(next)).is_none());
        let (owner, holds) = follow(edge, row.clone(), side);
        // The way further up may have waited for somebody who gave the next parent another key, to which this one leads
        // by now: the lock on it keeps its own key only.
        if edge.leads_on && with_settings(edge, || edge.read(key)).is_some_and(|now| now != row) {
            if let Some(next) = next {
                state::with(|s| s.set_orphans(next, None));
            }
            continue;
        }
        if holds == Holds::Long {
            state::with(|s| s.remember(id, owner.clone()));
        }
        return (owner, holds);
    }
    if side != Side::New
        && let Some(row) = with_settings(edge, || dead::results(edge, key))
    {
        let (owner, holds) = follow(edge, row, side);
        return (owner, if holds == Holds::Long { Holds::Now } else { holds });
    }
    let owner = state::with(|s| s.orphans(&id)).unwrap_or_else(|| {
        let nobody = Owner::nobody();
        if side == Side::New {
            state::with(|s| s.set_orphans(id, Some(nobody.clone())));
        }
        nobody
    });
    (owner, Holds::Now)
}

/// The parent that a parent's row leads to.
fn next_parent(edge: &Edge, row: &[Value]) -> Option<state::ParentId> {
    let next = edge.leads_on.then(|| edge_of(edge.parent))??;
    Some(next.id(&in_utf8(row)?))
}

fn in_utf8(row: &[Value]) -> Values {
    let encoding = Encoding::of_database();
    row.iter().map(|v| v.as_ref().map(|v| encoding.convert(v).into_owned())).collect()
}

/// From what a parent's row says to whose it is.
fn follow(edge: &Edge, row: Vec<Value>, side: Side) -> (Owner, Holds) {
    let utf8 = in_utf8(&row);
    if !edge.leads_on {
        return (Owner::of(utf8.and_then(|mut v| v.pop())), Holds::Long);
    }
    match edge_of(edge.parent) {
        Some(next) => find(&next, &utf8, side),
        None => (Owner::nobody(), Holds::Now),
    }
}

fn with_settings<R>(edge: &Edge, f: impl FnOnce() -> R) -> R {
    let pinned = if edge.needs_settings { settings::pin() } else { None };
    let r = f();
    settings::unpin(pinned);
    r
}

/// Whose a parent's own row is.
unsafe fn owner_of(call: &Call<'_>, parent: &Parent, tuple: pg_sys::HeapTuple, side: Side) -> Owner {
    // SAFETY: by the caller.
    unsafe {
        if let Some(column) = &parent.tenant_column {
            return Owner::of(call.texts(tuple, std::slice::from_ref(column)).and_then(|mut t| t.pop()));
        }
        match edge_of(call.table.root) {
            Some(edge) => find(&edge, &call.texts(tuple, &edge.columns), side).0,
            None => Owner::nobody(),
        }
    }
}

/// Before an update that may concern rows below: until it has ended, those are whose they were.
///
/// # Safety
/// The tuple is of the trigger's relation; so for the other functions here.
pub unsafe fn parent_begins(call: &Call<'_>, old: pg_sys::HeapTuple) {
    let parent = parent_of(call.table.root);
    // SAFETY: by the caller.
    unsafe {
        let owner = owner_of(call, &parent, old, side_of(old));
        for key in &parent.keys {
            if let Some(values) = call.texts(old, &key.columns) {
                meet(call.table.root, key, &values, &owner);
                state::with(|s| s.begin(key.id(&values), owner.clone()));
            }
        }
    }
}

/// After it.
///
/// # Safety
/// As for [`parent_begins`].
pub unsafe fn parent_changed(call: &Call<'_>, old: pg_sys::HeapTuple, new: pg_sys::HeapTuple) {
    let root = call.table.root;
    let parent = parent_of(root);
    state::with(|s| s.forget_cached());
    // SAFETY: by the caller.
    unsafe {
        let is = owner_of(call, &parent, new, Side::New);
        for key in &parent.keys {
            let (before, after) = (call.texts(old, &key.columns), call.texts(new, &key.columns));
            if before == after {
                let Some(values) = after else { continue };
                let id = key.id(&values);
                let was = state::with(|s| s.before(&id)).unwrap_or_else(|| owner_of(call, &parent, old, side_of(old)));
                if was != is {
                    move_rows(root, key, &values, (&was, &is), Rows::All, true);
                } else if is == Owner::nobody() {
                    // Its own parent may be found at the commit, and then all that lies below.
                    key.below(root).hold_parent.first(&values);
                    state::with(|s| s.stays_nobodys(key.id(&values)));
                }
                state::with(|s| s.end(&id));
                continue;
            }
            if let Some(values) = before {
                // The rows that refer to the key that was are the business of the foreign key's own action. Where it has none,
                // they stay if another parent takes the key, which then finds them.
                let id = key.id(&values);
                let was = state::with(|s| s.before(&id)).unwrap_or_else(|| owner_of(call, &parent, old, side_of(old)));
                leaves_rows(key, id, was);
            }
            if let Some(values) = after {
                adopt(root, key, &values, &is);
            }
        }
    }
    state::with(|s| s.forget_cached());
}

/// After everything that follows from the update.
///
/// # Safety
/// As for [`parent_begins`].
pub unsafe fn parent_ends(call: &Call<'_>, old: pg_sys::HeapTuple) {
    for key in &parent_of(call.table.root).keys {
        // SAFETY: by the caller.
        if let Some(values) = unsafe { call.texts(old, &key.columns) } {
            state::with(|s| s.end(&key.id(&values)));
        }
    }
}

/// Before a parent is deleted.
///
/// # Safety
/// As for [`parent_begins`].
pub unsafe fn parent_leaves(call: &Call<'_>, old: pg_sys::HeapTuple) {
    let parent = parent_of(call.table.root);
    for key in &parent.keys {
        // SAFETY: by the caller.
        unsafe {
            let Some(values) = call.texts(old, &key.columns) else { continue };
            if state::with(|s| s.orphans(&key.id(&values))).is_some() {
                meet(call.table.root, key, &values, &owner_of(call, &parent, old, side_of(old)));
            }
            state::with(|s| s.leaves(&key.id(&values)));
        }
    }
}

/// A parent that another session brought is about to change: rows of our own that waited for it are no longer nobody's first.
fn meet(root: u32, key: &Key, values: &[Vec<u8>], owner: &Owner) {
    let (id, nobody) = (key.id(values), Owner::nobody());
    if *owner == nobody || state::with(|s| s.orphans(&id)) != Some(nobody.clone()) {
        return;
    }
    // SAFETY: inside a transaction.
    let now = unsafe {
        pg_sys::CommandCounterIncrement();
        pg_sys::GetCurrentCommandId(false)
    };
    move_rows(root, key, values, (&nobody, owner), Rows::Own(now), false);
    state::with(|s| s.set_orphans(id, None));
}

/// Before the transaction commits, when no constraint is left to be checked: parents that others brought find the rows
/// that waited for them.
///
/// Where no foreign key sees to it, rows stay without a parent, and are nobody's.
pub fn before_commit() {
    let unsettled = state::with(|s| s.unsettled());
    if unsettled.is_empty() {
        return;
    }
    // SAFETY: inside a transaction; the snapshot is given back, or goes with the transaction.
    let now = unsafe {
        pg_sys::CommandCounterIncrement();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        pg_sys::GetCurrentCommandId(false)
    };
    let mut waiting = with_rows(unsettled);
    // The locks that are taken are taken in one order by all.
    waiting.sort_by_key(|w| lock_of(w.root, &w.id));
    for w in waiting {
        find_parent(w, now);
    }
    // SAFETY: pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
}

/// Those parents that rows refer to.
fn with_rows(parents: Vec<(state::ParentId, Owner)>) -> Vec<Waiting> {
    let mut by_root: HashMap<u32, Vec<Waiting>> = HashMap::new();
    for (id, was) in parents {
        let Some((root, values)) = plan::parts(&id) else { continue };
        by_root.entry(root).or_default().push(Waiting { id, root, values, was, table: 0 });
    }
    let mut waiting = Vec::new();
    for (root, mut parents) in by_root {
        for key in &parent_of(root).keys {
            let (those, others): (Vec<_>, Vec<_>) = parents.into_iter().partition(|w| key.id(&w.values) == w.id);
            parents = others;
            for asked in those.chunks(MAX_ASKED) {
                let keys: Vec<&[Vec<u8>]> = asked.iter().map(|w| &w.values[..]).collect();
                let referred = key.below(root).referred(&keys);
                waiting.extend(referred.into_iter().map(|(n, table)| Waiting { table, ..asked[n].clone() }));
            }
        }
    }
    waiting
}

/// Finds the parent of rows that wait for it, or that it left.
fn find_parent(w: Waiting, now: pg_sys::CommandId) {
    let parent = parent_of(w.root);
    let Some(key) = parent.keys.iter().find(|k| k.id(&w.values) == w.id) else { return };
    let children = key.below(w.root).moves.iter();
    let Some(edge) = children.filter_map(|m| edge_of(m.table)).find(|e| e.id(&w.values) == w.id) else { return };
    let look = || with_settings(&edge, || edge.lookup(&w.values));
    let mut row = if key.is_loose { None } else { look() };
    if row.is_none() {
        // Who is bringing it may not have seen these rows, and is waited for. Who comes later waits for this transaction.
        lock(w.root, &w.id, pg_sys::ExclusiveLock);
        row = look();
    }
    if row.is_none() && !key.is_loose {
        plan::loosen(w.table);
    }
    let nobody = Owner::nobody();
    let is = row.map_or_else(Owner::nobody, |row| follow(&edge, row, Side::New).0);
    if is != w.was {
        // Rows of others wait for no parent that these do not see.
        let rows = if w.was == nobody { Rows::Own(now) } else { Rows::All };
        move_rows(w.root, key, &w.values, (&w.was, &is), rows, false);
        state::with(|s| s.set_orphans(w.id, (is == nobody).then_some(nobody)));
    }
}

/// After a parent was inserted: new, or come from another partition.
///
/// # Safety
/// As for [`parent_begins`].
pub unsafe fn parent_comes(call: &Call<'_>, new: pg_sys::HeapTuple) {
    let root = call.table.root;
    if state::with(|s| s.is_settled(root)) {
        return;
    }
    if state::with(|s| s.is_quiet()) && !catalog::has_loose_ways(root) {
        state::with(|s| s.settle(root));
        return;
    }
    let parent = parent_of(root);
    for key in &parent.keys {
        // SAFETY: by the caller.
        unsafe {
            let Some(values) = call.texts(new, &key.columns) else { continue };
            let id = key.id(&values);
            if let Some(was) = state::with(|s| s.before(&id)) {
                let is = owner_of(call, &parent, new, Side::New);
                if was != is {
                    move_rows(root, key, &values, (&was, &is), Rows::All, true);
                }
                state::with(|s| {
                    s.end(&id);
                    s.set_orphans(id, None);
                });
            } else if key.is_loose || state::with(|s| s.orphans(&id)).is_some() {
                let is = owner_of(call, &parent, new, Side::New);
                adopt(root, key, &values, &is);
            }
        }
    }
}

/// After a parent was deleted whose rows below may stay a while, or (`at_once`) until the statement ends: the foreign key
/// has its way then, unless the same statement put another parent in its place.
///
/// # Safety
/// As for [`parent_begins`].
pub unsafe fn parent_goes(call: &Call<'_>, old: pg_sys::HeapTuple, at_once: bool) {
    let root = call.table.root;
    let parent = parent_of(root);
    state::with(|s| s.forget_cached());
    for key in &parent.keys {
        // SAFETY: by the caller.
        unsafe {
            let Some(values) = call.texts(old, &key.columns) else { continue };
            state::with(|s| s.has_left(&key.id(&values)));
            if at_once && !may_leave_rows(key) && key.below(root).hold_parent.first(&values).is_none() {
                continue;
            }
            let id = key.id(&values);
            // What was noted when the row went: by now its own parent may be another.
            let noted = state::with(|s| s.before(&id).or_else(|| s.orphans(&id)));
            let owner = noted.unwrap_or_else(|| owner_of(call, &parent, old, side_of(old)));
            leaves_rows(key, id, owner);
        }
    }
}

/// Whether rows may refer to a key that nobody has any more, without a word of a foreign key.
fn may_leave_rows(key: &Key) -> bool {
    // SAFETY: reads a variable of the process.
    key.is_loose || unsafe { pg_sys::SessionReplicationRole } == pg_sys::SESSION_REPLICATION_ROLE_REPLICA as i32
}

/// Notes whose the rows are that refer to a key that nobody has any more.
fn leaves_rows(key: &Key, id: state::ParentId, owner: Owner) {
    state::with(|s| {
        if may_leave_rows(key) {
            s.uncheck(id.clone());
        }
        s.set_orphans(id, Some(owner));
    });
}

/// Notes whose the rows below a row are that is being deleted.
///
/// # Safety
/// The tuple is of the trigger's relation.
unsafe fn leave_below(call: &Call<'_>, old: pg_sys::HeapTuple, owner: &Owner) {
    for key in &parent_of(call.table.root).keys {
        // SAFETY: by the caller.
        if let Some(values) = unsafe { call.texts(old, &key.columns) } {
            state::with(|s| s.set_orphans(key.id(&values), Some(owner.clone())));
        }
    }
}

/// Rows that waited for this parent find it.
fn adopt(root: u32, key: &Key, values: &[Vec<u8>], is: &Owner) {
    let id = key.id(values);
    let noted = state::with(|s| s.orphans(&id));
    if key.is_loose {
        // Rows that others are about to leave without a parent are waited for.
        lock(root, &id, pg_sys::ShareLock);
    } else if noted.is_none() {
        return;
    }
    let was = noted.unwrap_or_else(Owner::nobody);
    if was != *is {
        if key.is_loose && !key.below(root).is_indexed() && !state::with(|s| s.may_look()) {
            if state::with(|s| s.gives_up(root)) {
                plan::rebase_below(root);
            }
            return;
        }
        move_rows(root, key, values, (&was, is), Rows::All, false);
    } else if key.is_loose && was == Owner::nobody() {
        state::with(|s| s.stays_nobodys(id.clone()));
    }
    state::with(|s| s.set_orphans(id, None));
}

/// What stands for a parent in a lock. Few for all of a table, since a transaction may bring many.
fn lock_of(root: u32, id: &[u8]) -> u32 {
    root << 8 | (state::hash(id) & 0xff) as u32
}

/// Keeps, until the transaction ends, those who bring a parent (`ShareLock`) from those who leave rows without it
/// (`ExclusiveLock`): the lock of `pg_advisory_xact_lock(6516586, …)`.
fn lock(root: u32, id: &[u8], mode: u32) {
    // SAFETY: inside a transaction, which gives the lock back.
    unsafe {
        let tag = pg_sys::LOCKTAG {
            locktag_field1: pg_sys::MyDatabaseId.to_u32(),
            locktag_field2: PARENT_LOCKS,
            locktag_field3: lock_of(root, id),
            // A key of two numbers.
            locktag_field4: 2,
            locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
            locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
        };
        pg_sys::LockAcquire(&tag, mode as i32, false, false);
    }
}

/// Writes the rows below a parent into the log anew, as moved.
fn move_rows(root: u32, key: &Key, values: &[Vec<u8>], owners: (&Owner, &Owner), rows: Rows, hold: bool) {
    state::with(|s| s.forget_cached());
    let below = key.below(root);
    if hold {
        below.hold_parent.first(values);
    }
    // SAFETY: the name and the value end with NUL; the nest level ends below, or with the transaction.
    let level = unsafe {
        let level = pg_sys::NewGUCNestLevel();
        // The application's triggers have nothing to do with it.
        pg_sys::set_config_option(
            c"session_replication_role".as_ptr(),
            c"replica".as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
        level
    };
    for m in &below.moves {
        let outer = state::with(|s| s.set_moving(Some(Moving::new(m.table, owners, rows))));
        m.rewrite.change(values);
        state::with(|s| s.set_moving(outer));
        // Of what lies below, what we did not write ourselves comes along here.
        for (root, n, values) in state::with(|s| s.take_moved()) {
            if let Some(key) = parent_of(root).keys.get(n) {
                move_rows(root, key, &values, owners, Rows::All, false);
            }
        }
        if let Some(hold) = &m.hold
            && rows == Rows::All
        {
            hold.first(values);
        }
    }
    // SAFETY: the level was opened above.
    unsafe { pg_sys::AtEOXact_GUC(false, level) };
}
