//! What cases came to, counted.

use coffer_tests::generate::ddl::KINDS;
use std::collections::BTreeMap;
use std::fmt;

#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub points: usize,
    pub rows: usize,
    pub committed: usize,
    pub failed: usize,
    pub altered: usize,
    /// By kind: changes of the schema that stood, and that failed.
    pub changes: BTreeMap<&'static str, (usize, usize)>,
    pub restores: usize,
    /// Comparisons by mode; in place: restores, each of which is compared for everybody.
    pub files: usize,
    pub database: usize,
    /// Of these, those with every foreign key.
    pub with_keys: usize,
    pub schema: usize,
    pub in_place: usize,
    pub refused: usize,
    /// Refused because retention keeps the point no more.
    pub expired: usize,
    pub in_place_refused: usize,
    pub without_definitions: usize,
    pub lively: usize,
    pub fulls: u64,
    pub incrementals: u64,
    /// Runs of pruning that removed something, what they took out of the catalogs, and what they deleted.
    pub prunes: usize,
    pub removed: u64,
    pub deleted: u64,
    /// Comparisons of a tenant's archived rows with its live ones.
    pub validations: usize,
    /// Rounds of the scrub.
    pub scrubs: usize,
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        self.points += other.points;
        self.rows += other.rows;
        self.committed += other.committed;
        self.failed += other.failed;
        self.altered += other.altered;
        for (kind, (succeeded, failed)) in &other.changes {
            let sum = self.changes.entry(kind).or_default();
            *sum = (sum.0 + succeeded, sum.1 + failed);
        }
        self.restores += other.restores;
        self.files += other.files;
        self.database += other.database;
        self.with_keys += other.with_keys;
        self.schema += other.schema;
        self.in_place += other.in_place;
        self.refused += other.refused;
        self.expired += other.expired;
        self.in_place_refused += other.in_place_refused;
        self.without_definitions += other.without_definitions;
        self.lively += other.lively;
        self.fulls += other.fulls;
        self.incrementals += other.incrementals;
        self.prunes += other.prunes;
        self.removed += other.removed;
        self.deleted += other.deleted;
        self.validations += other.validations;
        self.scrubs += other.scrubs;
    }

    /// Kinds of changes of the schema of which none stood.
    pub fn missing_changes(&self) -> Vec<&'static str> {
        KINDS.into_iter().filter(|k| self.changes.get(k).is_none_or(|(succeeded, _)| *succeeded == 0)).collect()
    }

    /// What no number of cases may be without.
    pub fn require_every_kind(&self) {
        let done = [
            ("compared in files", self.files),
            ("compared in a database", self.database),
            ("compared with all foreign keys", self.with_keys),
            ("compared in a schema", self.schema),
            ("restored in place", self.in_place),
            ("was lively", self.lively),
            ("was pruned", self.prunes),
            ("was validated", self.validations),
            ("was scrubbed", self.scrubs),
        ];
        for (what, n) in done {
            assert!(n > 0, "nothing {what}: {self}");
        }
        // Refusing is an honest answer to a conflict, which most restores among so few rows do not meet.
        assert!(self.in_place_refused <= self.in_place, "restores in place are refused too often: {self}");
        assert!(self.removed > 0 && self.deleted > 0, "pruning removed nothing: {self}");
        assert!(self.fulls > 0 && self.incrementals > 0, "the agent's schedules made nothing: {self}");
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} points, {} rows, {} commits, {} statements failed, {} schema changes; {} restores: compared {} in files, \
             {} in databases ({} with all foreign keys), {} in schemas, {} in place; refused {}, {} expired, {} in place, {} without definitions",
            self.points,
            self.rows,
            self.committed,
            self.failed,
            self.altered,
            self.restores,
            self.files,
            self.database,
            self.with_keys,
            self.schema,
            self.in_place,
            self.refused,
            self.expired,
            self.in_place_refused,
            self.without_definitions,
        )?;
        if self.lively > 0 {
            write!(
                f,
                "; lively: {} fulls, {} incrementals, {} prunes removed {} backups and {} objects, {} validations, {} scrubs",
                self.fulls, self.incrementals, self.prunes, self.removed, self.deleted, self.validations, self.scrubs,
            )?;
        }
        Ok(())
    }
}
