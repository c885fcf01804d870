//! What a transaction knows about parents, and how it forgets.

use super::Owner;
use super::plan::{Edge, Parent};
use crate::invalidation::Inbox;
use pgrx::pg_guard;
use pgrx::pg_sys;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

/// Parents remembered in a transaction; beyond it all are asked for again.
const MAX_CACHED: usize = 65_536;

/// How many parents that come look for rows one by one where no index finds those, in a transaction.
const MAX_LOOKS: u32 = 100;

/// A parent's row: table, columns and values of a key, in one string of bytes.
pub type ParentId = Box<[u8]>;

/// See the module.
pub struct State {
    inbox: Inbox,
    /// By the child's root.
    edges: HashMap<u32, Option<Rc<Edge>>>,
    /// The one that was asked for last.
    last_edge: Option<(u32, Rc<Edge>)>,
    /// By the parent's root.
    parents: HashMap<u32, Rc<Parent>>,
    /// Parents that this transaction has locked.
    cache: HashMap<ParentId, Rc<Owner>>,
    /// Parents that are changing: what each was before, and at which depth of savepoints that was noted.
    changing: Vec<(i32, ParentId, Owner)>,
    /// Parents whose deletion has begun and not ended, by hash, and at which depth of savepoints.
    leaving: HashMap<u64, i32>,
    /// Parents that are not there, and whose the rows are that refer to them.
    missing: HashMap<ParentId, Owner>,
    /// What to put back into `missing` when a savepoint is rolled back.
    undo: Vec<(i32, ParentId, Option<Owner>)>,
    /// Those of `missing` that no foreign key has looked below when they went; more of them do no harm.
    unchecked: HashSet<ParentId>,
    moving: Option<Moving>,
    /// Rows of our own that were nobody's before and are, so that whatever lies below is, too; at which depth of savepoints.
    nobodys: HashMap<ParentId, i32>,
    /// Those of them that were moved just now: their root, which of its keys, the values.
    moved: Vec<Moved>,
    /// Tables whose parents find nobody when they come.
    settled: Vec<u32>,
    /// How often a table without an index was read for a parent that came.
    looks: u32,
    /// By the parents' root: below what new bases were asked for instead, and at which depth of savepoints.
    given_up: HashMap<u32, i32>,
}

/// Rows of a table that are being written anew.
#[derive(Clone)]
pub struct Moving {
    level: i32,
    table: u32,
    from: Owner,
    to: Owner,
    rows: Rows,
}

/// A row: its root, which of its keys, the values.
pub type Moved = (u32, usize, Vec<Vec<u8>>);

/// Which of the rows below a parent move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    All,
    /// Those that this transaction wrote before this command.
    Own(pg_sys::CommandId),
}

impl Moving {
    pub fn new(table: u32, (from, to): (&Owner, &Owner), rows: Rows) -> Self {
        Self { level: level(), table, from: from.clone(), to: to.clone(), rows }
    }
}

pub fn hash(id: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
}

thread_local! {
    static STATE: RefCell<Option<State>> = const { RefCell::new(None) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Uses the state. Never while the server runs anything: triggers nest.
pub fn with<R>(f: impl FnOnce(&mut State) -> R) -> R {
    if !REGISTERED.replace(true) {
        // SAFETY: guarded functions of a library that is never unloaded.
        unsafe {
            pg_sys::RegisterXactCallback(Some(transaction_ends), std::ptr::null_mut());
            pg_sys::RegisterSubXactCallback(Some(savepoint_ends), std::ptr::null_mut());
        }
    }
    STATE.with_borrow_mut(|s| f(s.get_or_insert_with(State::new)))
}

fn level() -> i32 {
    // SAFETY: reads a variable of the process.
    unsafe { pg_sys::GetCurrentTransactionNestLevel() }
}

impl State {
    fn new() -> Self {
        Self {
            inbox: Inbox::subscribe(),
            edges: HashMap::new(),
            last_edge: None,
            parents: HashMap::new(),
            cache: HashMap::new(),
            changing: Vec::new(),
            leaving: HashMap::new(),
            missing: HashMap::new(),
            undo: Vec::new(),
            unchecked: HashSet::new(),
            moving: None,
            nobodys: HashMap::new(),
            moved: Vec::new(),
            settled: Vec::new(),
            looks: 0,
            given_up: HashMap::new(),
        }
    }

    /// Forgets plans that a DDL or a change of a rule has outdated. Which tables an edge depends on is a whole chain, and
    /// plans are cheap: all go. Parents that are gone without a row trigger (by TRUNCATE, or with a partition that is
    /// detached) are not looked for: whoever was found is asked for again.
    fn hear(&mut self) {
        let Some(news) = self.inbox.take() else { return };
        self.cache.clear();
        self.settled.clear();
        if self.edges.iter().any(|(child, e)| news.concerns(*child) || e.as_ref().is_some_and(|e| e.concerns(&news)))
            || self.parents.iter().any(|(root, p)| news.concerns(*root) || p.concerns(&news))
        {
            self.edges.clear();
            self.last_edge = None;
            self.parents.clear();
        }
    }

    /// The way from a table to its parent, when it is known.
    pub fn edge(&mut self, child: u32) -> Option<Option<Rc<Edge>>> {
        self.hear();
        self.edges.get(&child).cloned()
    }

    pub fn put_edge(&mut self, child: u32, edge: Option<Rc<Edge>>) {
        self.last_edge = None;
        self.edges.insert(child, edge);
    }

    pub fn parent(&mut self, root: u32) -> Option<Rc<Parent>> {
        self.hear();
        self.parents.get(&root).cloned()
    }

    pub fn put_parent(&mut self, root: u32, parent: Rc<Parent>) {
        self.parents.insert(root, parent);
    }

    /// The way from a table to its parent, when it is known and no parent is moving, changing, leaving or missing: then
    /// whatever is [cached](Self::cached) is the answer.
    pub fn quiet_edge(&mut self, child: u32) -> Option<Rc<Edge>> {
        self.hear();
        if self.moving.is_some() || !self.is_quiet() || !self.leaving.is_empty() {
            return None;
        }
        if let Some((last, edge)) = &self.last_edge
            && *last == child
        {
            return Some(edge.clone());
        }
        let edge = self.edges.get(&child)?.clone()?;
        self.last_edge = Some((child, edge.clone()));
        Some(edge)
    }

    pub fn cached(&self, id: &[u8]) -> Option<Rc<Owner>> {
        self.cache.get(id).cloned()
    }

    pub fn remember(&mut self, id: ParentId, owner: Owner) {
        if self.cache.len() >= MAX_CACHED {
            self.cache.clear();
        }
        self.cache.insert(id, Rc::new(owner));
    }

    pub fn forget_cached(&mut self) {
        self.cache.clear();
    }

    /// What a parent that is changing was before.
    pub fn before(&self, id: &[u8]) -> Option<Owner> {
        self.changing.iter().rev().find(|(_, i, _)| **i == *id).map(|(_, _, o)| o.clone())
    }

    pub fn begin(&mut self, id: ParentId, owner: Owner) {
        self.changing.push((level(), id, owner));
    }

    pub fn end(&mut self, id: &[u8]) {
        if let Some(at) = self.changing.iter().rposition(|(_, i, _)| **i == *id) {
            self.changing.remove(at);
        }
    }

    /// A parent is about to be deleted.
    pub fn leaves(&mut self, id: &[u8]) {
        self.leaving.insert(hash(id), level());
    }

    /// It was, and its triggers have come to it.
    pub fn has_left(&mut self, id: &[u8]) {
        self.leaving.remove(&hash(id));
    }

    /// Whether a parent may have been deleted by a statement that has not ended.
    pub fn is_leaving(&self, id: &[u8]) -> bool {
        !self.leaving.is_empty() && self.leaving.contains_key(&hash(id))
    }

    /// The parents that nobody's rows of this transaction refer to, and those that left rows where no foreign key looked;
    /// with whose the rows are.
    pub fn unsettled(&self) -> Vec<(ParentId, Owner)> {
        let nobody = Owner::nobody();
        let missing = self.missing.iter().filter(|(id, o)| **o == nobody || self.unchecked.contains(*id));
        missing.map(|(id, o)| (id.clone(), o.clone())).collect()
    }

    /// Whether a parent that comes concerns nobody, as far as is known.
    pub fn is_settled(&mut self, root: u32) -> bool {
        self.hear();
        self.is_quiet() && self.settled.contains(&root)
    }

    pub fn settle(&mut self, root: u32) {
        self.settled.push(root);
    }

    /// A parent that is not there any more may have left rows.
    pub fn uncheck(&mut self, id: ParentId) {
        self.unchecked.insert(id);
    }

    /// Whether a table may be read once more for a parent that came.
    pub fn may_look(&mut self) -> bool {
        self.looks += 1;
        self.looks <= MAX_LOOKS
    }

    /// Whether this is the first time that new bases are asked for below a table.
    pub fn gives_up(&mut self, root: u32) -> bool {
        self.given_up.insert(root, level()).is_none()
    }

    /// Whether rows wait for parents.
    pub fn is_awaiting(&self) -> bool {
        !self.missing.is_empty()
    }

    pub fn orphans(&self, id: &[u8]) -> Option<Owner> {
        self.missing.get(id).cloned()
    }

    /// Notes whose the rows are that refer to a parent that is not there; `None`: it is there now.
    pub fn set_orphans(&mut self, id: ParentId, owner: Option<Owner>) {
        let was = match owner {
            Some(o) => self.missing.insert(id.clone(), o),
            None => self.missing.remove(&id),
        };
        let level = level();
        if level > 1 {
            self.undo.push((level, id, was));
        }
    }

    pub fn moving(&self, table: u32) -> Option<(Owner, Owner)> {
        self.moving.as_ref().filter(|m| m.table == table).map(|m| (m.from.clone(), m.to.clone()))
    }

    /// Which rows of a table move, when some do.
    pub fn moving_rows(&self, table: u32) -> Option<Rows> {
        self.moving.as_ref().filter(|m| m.table == table).map(|m| m.rows)
    }

    /// A row of our own was nobody's, or was not there, and is nobody's.
    pub fn stays_nobodys(&mut self, id: ParentId) {
        self.nobodys.entry(id).or_insert(level());
    }

    pub fn note_moved(&mut self, id: &[u8], row: Moved) {
        if self.nobodys.contains_key(id) {
            self.moved.push(row);
        }
    }

    pub fn take_moved(&mut self) -> Vec<Moved> {
        std::mem::take(&mut self.moved)
    }

    pub fn set_moving(&mut self, moving: Option<Moving>) -> Option<Moving> {
        std::mem::replace(&mut self.moving, moving)
    }

    fn end_transaction(&mut self) {
        self.cache.clear();
        self.cache.shrink_to(1024);
        self.changing.clear();
        self.leaving.clear();
        self.leaving.shrink_to(1024);
        self.missing.clear();
        self.missing.shrink_to(1024);
        self.undo.clear();
        self.unchecked.clear();
        self.unchecked.shrink_to(1024);
        self.looks = 0;
        self.given_up.clear();
        self.moving = None;
        self.nobodys.clear();
        self.moved.clear();
    }

    fn roll_back_to(&mut self, level: i32) {
        // Locks that were taken since are gone.
        self.cache.clear();
        self.changing.retain(|c| c.0 < level);
        self.leaving.retain(|_, l| *l < level);
        self.given_up.retain(|_, l| *l < level);
        self.nobodys.retain(|_, l| *l < level);
        while let Some((_, id, was)) = self.undo.pop_if(|u| u.0 >= level) {
            match was {
                Some(o) => self.missing.insert(id, o),
                None => self.missing.remove(&id),
            };
        }
        self.moving.take_if(|m| m.level >= level);
    }

    /// Whether no parent is changing or missing.
    pub fn is_quiet(&self) -> bool {
        self.changing.is_empty() && self.missing.is_empty()
    }

    fn keep_to(&mut self, level: i32) {
        for u in self.undo.iter_mut().filter(|u| u.0 >= level) {
            u.0 = level - 1;
        }
        for c in self.changing.iter_mut().filter(|c| c.0 >= level) {
            c.0 = level - 1;
        }
        let levels = self.leaving.values_mut().chain(self.given_up.values_mut()).chain(self.nobodys.values_mut());
        for l in levels.filter(|l| **l >= level) {
            *l = level - 1;
        }
    }
}

fn if_any(f: impl FnOnce(&mut State)) {
    STATE.with(|s| {
        if let Ok(mut s) = s.try_borrow_mut()
            && let Some(s) = s.as_mut()
        {
            f(s);
        }
    });
}

#[pg_guard]
unsafe extern "C-unwind" fn transaction_ends(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent as E;
    if matches!(event, E::XACT_EVENT_PRE_COMMIT | E::XACT_EVENT_PRE_PREPARE) {
        super::resolve::before_commit();
    }
    if matches!(event, E::XACT_EVENT_COMMIT | E::XACT_EVENT_ABORT | E::XACT_EVENT_PREPARE) {
        if_any(State::end_transaction);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn savepoint_ends(
    event: pg_sys::SubXactEvent::Type,
    _mine: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    use pg_sys::SubXactEvent as E;
    match event {
        E::SUBXACT_EVENT_ABORT_SUB => if_any(|s| s.roll_back_to(level())),
        E::SUBXACT_EVENT_COMMIT_SUB => if_any(|s| s.keep_to(level())),
        _ => {}
    }
}
