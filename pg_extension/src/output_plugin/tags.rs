//! Tags that wait for their change.
//!
//! A tag is written right before the change that it is about. It is good for the next change of its relation only: that
//! change takes it, and uses it when operation and key agree.

use super::rows::Tenant;
use coffer_wire::tag::{self, TagOp};

/// A tag whose MAC was right.
pub struct Tag {
    relid: u32,
    pub op: TagOp,
    pub key: Vec<u8>,
    pub old: Option<Tenant>,
    pub new: Option<Tenant>,
}

/// At most one tag for each relation.
#[derive(Default)]
pub struct Tags(Vec<Tag>);

impl Tags {
    pub fn put(&mut self, tag: &tag::Tag<'_>) {
        let tenant = |t: &tag::TagTenant<'_>| Tenant { kind: t.kind, key: t.key.to_vec() };
        self.take(tag.relid);
        self.0.push(Tag {
            relid: tag.relid,
            op: tag.op,
            key: tag.key.to_vec(),
            old: tag.old.as_ref().map(tenant),
            new: tag.new.as_ref().map(tenant),
        });
    }

    /// The tag of a relation, which is then used up.
    #[inline]
    pub fn take(&mut self, relid: u32) -> Option<Tag> {
        if self.0.is_empty() {
            return None;
        }
        let at = self.0.iter().position(|t| t.relid == relid)?;
        Some(self.0.swap_remove(at))
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}
