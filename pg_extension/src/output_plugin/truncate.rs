//! TRUNCATE: recorded once with its place, for all tenants, or for the one that the table belongs to.

use super::options::Format;
use super::relations::{Covered, Known, Owner};
use super::rows::Tenant;
use super::state::State;
use coffer_wire::TenantKind;
use pgrx::pg_sys;
use std::rc::Rc;

impl State {
    /// Takes one TRUNCATE, which may name many tables. `false` when it concerns nobody.
    ///
    /// # Safety
    /// The arguments are those of the truncate callback.
    pub unsafe fn truncate(
        &mut self,
        ctx: *mut pg_sys::LogicalDecodingContext,
        relations: &[pg_sys::Relation],
        restart_sequences: bool,
    ) -> bool {
        // Tables with one owner together; `None`: everybody.
        let mut by_owner: Vec<(Option<Tenant>, Vec<Rc<Covered>>)> = Vec::new();
        for relation in relations {
            // SAFETY: by the caller.
            let known = unsafe { self.relations.get(*relation, &self.options, self.source.encoding) };
            let Known::Covered(covered) = known else { continue };
            let owner = match &covered.owner {
                Owner::Fixed(kind, key) => Some(Tenant { kind: *kind, key: key.clone() }),
                _ => None,
            };
            if owner.as_ref().is_some_and(|t| !self.wants(t)) {
                continue;
            }
            match by_owner.iter_mut().find(|(o, _)| *o == owner) {
                Some((_, tables)) => tables.push(covered),
                None => by_owner.push((owner, vec![covered])),
            }
        }
        for (owner, tables) in &by_owner {
            let owner: Option<(TenantKind, &str)> = owner
                .as_ref()
                .map(|t| (t.kind, std::str::from_utf8(&t.key).expect("an owner's name was read as UTF-8")));
            if self.options.format == Format::Json {
                // SAFETY: by the caller.
                unsafe { self.write_json_truncate(ctx, owner, tables) };
                continue;
            }
            let mut ids = Vec::with_capacity(tables.len() * 8);
            for table in tables {
                self.stream.announce(table);
                ids.extend_from_slice(&table.id.to_le_bytes());
            }
            self.stream.truncate(restart_sequences, owner, &ids);
        }
        !by_owner.is_empty()
    }
}
