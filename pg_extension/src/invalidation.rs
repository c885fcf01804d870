//! What the server tells this process about changed catalogs, kept until somebody asks.
//!
//! PostgreSQL allows 64 callbacks a process and none can be taken back, so each is registered once and delivers to the
//! inboxes that are alive. A callback may run while one of our own catalog reads is under way: it only notes.

use pgrx::pg_guard;
use pgrx::pg_sys;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// Beyond this many notes an inbox says "everything".
const MAX_NOTES: usize = 256;

/// What changed since the last look.
#[derive(Default)]
pub struct News {
    everything: bool,
    relations: Vec<u32>,
    /// Hashes, as the syscache of types computes them.
    types: Vec<u32>,
}

impl News {
    /// Whether the relation's definition, or a rule about it, may have changed.
    pub fn concerns(&self, relid: u32) -> bool {
        self.everything || self.relations.contains(&relid)
    }

    /// Whether the type with this hash may have changed.
    pub fn concerns_type(&self, hash: u32) -> bool {
        self.everything || self.types.contains(&hash)
    }
}

#[derive(Default)]
struct Shared {
    dirty: Cell<bool>,
    news: RefCell<News>,
}

/// Collects news from its creation on.
pub struct Inbox(Rc<Shared>);

thread_local! {
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
    static INBOXES: RefCell<Vec<Weak<Shared>>> = const { RefCell::new(Vec::new()) };
}

impl Inbox {
    pub fn subscribe() -> Self {
        if !REGISTERED.replace(true) {
            register();
        }
        let shared = Rc::new(Shared::default());
        INBOXES.with_borrow_mut(|all| {
            all.retain(|w| w.strong_count() > 0);
            all.push(Rc::downgrade(&shared));
        });
        Self(shared)
    }

    /// The news, if there is any.
    #[inline]
    pub fn take(&self) -> Option<News> {
        if !self.0.dirty.get() {
            return None;
        }
        self.0.dirty.set(false);
        Some(self.0.news.take())
    }
}

fn deliver(note: impl Fn(&mut News)) {
    INBOXES.with_borrow(|all| {
        for shared in all.iter().filter_map(Weak::upgrade) {
            shared.dirty.set(true);
            let mut news = shared.news.borrow_mut();
            if news.relations.len() + news.types.len() >= MAX_NOTES {
                *news = News { everything: true, ..News::default() };
            }
            if !news.everything {
                note(&mut news);
            }
        }
    });
}

fn register() {
    let nothing = pg_sys::Datum::from(0usize);
    // SAFETY: the callbacks are guarded functions of a library that is never unloaded.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), nothing);
        pg_sys::CacheRegisterSyscacheCallback(pg_sys::SysCacheIdentifier::TYPEOID as i32, Some(type_changed), nothing);
        // Renamed schemas and enum labels reach no relation cache entry.
        for cache in [pg_sys::SysCacheIdentifier::NAMESPACEOID, pg_sys::SysCacheIdentifier::ENUMOID] {
            pg_sys::CacheRegisterSyscacheCallback(cache as i32, Some(anything_changed), nothing);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn relation_changed(_arg: pg_sys::Datum, relid: pg_sys::Oid) {
    deliver(|n| {
        if relid == pg_sys::InvalidOid {
            n.everything = true;
        } else {
            n.relations.push(relid.to_u32());
        }
    });
}

#[pg_guard]
unsafe extern "C-unwind" fn type_changed(_arg: pg_sys::Datum, _cache: i32, hash: u32) {
    // A hash of zero is the server's word for the whole cache.
    deliver(|n| {
        if hash == 0 {
            n.everything = true;
        } else {
            n.types.push(hash);
        }
    });
}

#[pg_guard]
unsafe extern "C-unwind" fn anything_changed(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    deliver(|n| n.everything = true);
}
