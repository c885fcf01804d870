//! Rows regrouped by tenant, until they are written.

use super::hash::{self, ByNumber};
use coffer_wire::{RunHeader, TenantKind, put_run_header};

/// Groups beyond the first few give memory above this back when they are emptied, so that many tenants that were once
/// large do not add up.
const KEPT_CAPACITY: usize = 4 << 10;
const LARGE_KEPT: usize = 8;

/// The rows of one tenant.
#[derive(Default)]
pub struct Group {
    kind: u8,
    key: Vec<u8>,
    pub rows: u32,
    /// Descriptor ids, eight bytes each.
    relations: Vec<u8>,
    last: (u64, u16),
    pub data: Vec<u8>,
}

impl Group {
    /// The number by which rows of this run refer to a descriptor.
    #[inline]
    pub fn relation_index(&mut self, id: u64) -> u16 {
        if self.last.0 == id && !self.relations.is_empty() {
            return self.last.1;
        }
        let bytes = id.to_le_bytes();
        let index = self.relations.chunks_exact(8).position(|b| b == bytes).unwrap_or_else(|| {
            self.relations.extend_from_slice(&bytes);
            self.relations.len() / 8 - 1
        });
        // A row takes eleven bytes at least and runs are closed at 256 KiB, so the number fits.
        self.last = (id, index as u16);
        self.last.1
    }

    pub fn kind(&self) -> TenantKind {
        TenantKind::from_u8(self.kind).expect("set from a kind")
    }

    pub fn key(&self) -> &[u8] {
        &self.key
    }

    fn open(&mut self, kind: u8, key: &[u8]) {
        self.kind = kind;
        self.key.clear();
        self.key.extend_from_slice(key);
        self.rows = 0;
        self.relations.clear();
        self.data.clear();
    }
}

/// The open groups of the transaction at hand.
#[derive(Default)]
pub struct Runs {
    groups: Vec<Group>,
    used: usize,
    last: usize,
    by_tenant: ByNumber<u64, usize>,
    /// Of rows and of what surrounds them.
    bytes: usize,
}

impl Runs {
    /// The group of a tenant, made if there is none.
    #[inline]
    pub fn group(&mut self, kind: TenantKind, key: &[u8]) -> usize {
        let kind = kind as u8;
        if let Some(g) = self.groups[..self.used].get(self.last)
            && g.kind == kind
            && g.key == key
        {
            return self.last;
        }
        self.last = self.find(kind, key);
        self.last
    }

    fn find(&mut self, kind: u8, key: &[u8]) -> usize {
        let mut name = hash::of_bytes(key) ^ u64::from(kind);
        loop {
            match self.by_tenant.get(&name) {
                Some(i) if self.groups[*i].kind == kind && self.groups[*i].key == key => return *i,
                // Two tenants with one hash: the next number.
                Some(_) => name = name.wrapping_add(1),
                None => break,
            }
        }
        let i = self.used;
        if i == self.groups.len() {
            self.groups.push(Group::default());
        }
        self.groups[i].open(kind, key);
        self.by_tenant.insert(name, i);
        self.used += 1;
        self.bytes += 64 + key.len();
        i
    }

    #[inline]
    pub fn at(&mut self, group: usize) -> &mut Group {
        &mut self.groups[group]
    }

    /// Counts a row that now ends the group's data.
    #[inline]
    pub fn added(&mut self, group: usize, bytes: usize) {
        self.groups[group].rows += 1;
        self.bytes += bytes;
    }

    /// Roughly the bytes that the groups will take.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups[..self.used].iter().filter(|g| g.rows > 0)
    }

    /// Appends a RUN frame for each group and empties them. Says how many rows they held.
    pub fn close_into(&mut self, out: &mut Vec<u8>, seq: &mut u64) -> u64 {
        let mut rows = 0;
        for g in self.groups[..self.used].iter().filter(|g| g.rows > 0) {
            let tenant_key = std::str::from_utf8(&g.key).expect("a group of frames is opened by a string");
            let header = RunHeader {
                seq: *seq,
                tenant_kind: g.kind(),
                tenant_key,
                relations: &g.relations,
                rows: g.rows,
                rows_len: g.data.len() as u64,
            };
            put_run_header(out, &header, Some(&g.data));
            *seq += 1;
            rows += u64::from(g.rows);
        }
        self.clear();
        rows
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        if self.used == 0 {
            return;
        }
        for (i, g) in self.groups[..self.used].iter_mut().enumerate() {
            if i >= LARGE_KEPT && g.data.capacity() > KEPT_CAPACITY {
                g.data = Vec::new();
            }
        }
        self.used = 0;
        self.last = 0;
        self.bytes = 0;
        self.by_tenant.clear();
    }
}
