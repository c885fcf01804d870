//! Every named point where a test can stop, delay or fail the agent, in one file.
//!
//! `COFFER_FAILPOINTS="name=abort;other=sleep(500);third=error;fourth=panic;fifth=hold(FILE)"`: held until there is such a file. A
//! name may be followed by `@n` (the n-th hit only, counted from 1). Only in builds with the feature `failpoints`; otherwise [`hit`] is nothing.

/// A changeset's object is in the stores, its record is not.
pub const SHIP_AFTER_OBJECTS: &str = "ship-after-objects";
/// Before the first object of a ship is put.
pub const SHIP_BEFORE_OBJECTS: &str = "ship-before-objects";
/// The commit record is in the sequencer, not in the other stores.
pub const LOG_AFTER_SEQUENCER: &str = "log-after-sequencer";
/// The commit record is everywhere, the slot has not been told.
pub const SHIP_AFTER_RECORD: &str = "ship-after-record";
/// A new tenant's key is in the keyring, nothing uses it yet.
pub const KEYRING_AFTER_PUT: &str = "keyring-after-put";
/// The slot exists, the log has no record of it.
pub const SLOT_AFTER_CREATE: &str = "slot-after-create";
/// A base has waited for the transactions before it, no table is locked.
pub const BASE_AFTER_HORIZON: &str = "base-after-horizon";
/// A base's rows are read, its marker is not written.
pub const BASE_AFTER_COPY: &str = "base-after-copy";
/// A base's marker is durable, its fulls are not written.
pub const BASE_AFTER_MARKER: &str = "base-after-marker";
/// A base's fulls are written, its record is not.
pub const BASE_AFTER_FULLS: &str = "base-after-fulls";
/// The large objects of tenants are written, the record that names them is not.
pub const LARGE_OBJECTS_AFTER_WRITE: &str = "large-objects-after-write";
/// A buffer went to the spool.
pub const SPOOL_AFTER_WRITE: &str = "spool-after-write";
/// A restore knows which objects it reads, and has read no row of them.
pub const RESTORE_AFTER_INPUTS: &str = "restore-after-inputs";
/// An in-place restore has fenced the tenant.
pub const RESTORE_AFTER_FENCE: &str = "restore-after-fence";
/// An in-place restore is about to commit.
pub const RESTORE_BEFORE_COMMIT: &str = "restore-before-commit";
/// An in-place restore is committed, its fences stand.
pub const RESTORE_AFTER_COMMIT: &str = "restore-after-commit";
/// A catalog's record is in the sequencer, not in the other stores.
pub const CATALOG_AFTER_SEQUENCER: &str = "catalog-after-sequencer";
/// A table's rows are about to go into a full.
pub const FULL_AT_TABLE: &str = "full-at-table";
/// A full's objects are in the stores, no record names them.
pub const FULL_AFTER_OBJECTS: &str = "full-after-objects";
/// All that an archive consists of is in the stores, no record names it.
pub const ARCHIVE_AFTER_OBJECTS: &str = "archive-after-objects";
/// An incremental's object is in the stores, no record names it.
pub const INCREMENTAL_AFTER_OBJECT: &str = "incremental-after-object";
/// A removal is recorded, nothing is deleted.
pub const PRUNE_AFTER_RECORD: &str = "prune-after-record";
/// One object of a removal is deleted in every store.
pub const PRUNE_AFTER_DELETE: &str = "prune-after-delete";
/// Every object of a removal is deleted, no record says so.
pub const PRUNE_BEFORE_REMOVED: &str = "prune-before-removed";
/// What a store is to have is listed, nothing of it is read back.
pub const VERIFY_AFTER_LIST: &str = "verify-after-list";

/// A pack of the log is written, its records are still there by themselves.
pub const PACK_AFTER_WRITE: &str = "pack-after-write";
/// A record that is in a pack is about to be removed.
pub const PACK_BEFORE_REMOVE: &str = "pack-before-remove";
/// A checkpoint of the log is in a store, what it stands for is still there.
pub const CHECKPOINT_AFTER_WRITE: &str = "checkpoint-after-write";
/// A pack or record that a checkpoint stands for is about to be removed.
pub const CHECKPOINT_BEFORE_REMOVE: &str = "checkpoint-before-remove";

/// A job from SQL is claimed, nothing is done.
pub const JOB_AFTER_CLAIM: &str = "job-after-claim";
/// A job is done, its row does not say so.
pub const JOB_BEFORE_FINISH: &str = "job-before-finish";

/// Does what the environment asks for at this point. Blocking: a sleep holds the thread, as a stalled machine would.
#[cfg(feature = "failpoints")]
pub fn hit(name: &str) -> crate::error::Result<()> {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex};
    static HITS: LazyLock<Mutex<HashMap<String, u64>>> = LazyLock::new(Mutex::default);
    let Ok(spec) = std::env::var("COFFER_FAILPOINTS") else { return Ok(()) };
    let n = {
        let mut hits = HITS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let n = hits.entry(name.to_owned()).or_insert(0);
        *n += 1;
        *n
    };
    for part in spec.split(';') {
        let Some((point, action)) = part.split_once('=') else { continue };
        let (point, nth) = match point.split_once('@') {
            Some((p, k)) => (p, k.parse::<u64>().ok()),
            None => (point, None),
        };
        if point.trim() != name || nth.is_some_and(|k| k != n) {
            continue;
        }
        match action.trim() {
            "abort" => {
                eprintln!("failpoint {name}: abort");
                std::process::abort();
            }
            "panic" => panic!("failpoint {name}"),
            "error" => return Err(crate::error::Error::other(format!("failpoint {name}")).code("failpoint")),
            a => {
                if let Some(ms) =
                    a.strip_prefix("sleep(").and_then(|s| s.strip_suffix(')')).and_then(|s| s.parse().ok())
                {
                    eprintln!("failpoint {name}: sleep {ms} ms");
                    std::thread::sleep(std::time::Duration::from_millis(ms));
                }
                if let Some(file) = a.strip_prefix("hold(").and_then(|s| s.strip_suffix(')')) {
                    eprintln!("failpoint {name}: hold");
                    while !std::path::Path::new(file).exists() {
                        std::thread::sleep(std::time::Duration::from_millis(20));
                    }
                }
            }
        }
    }
    Ok(())
}

/// Does what the environment asks for at this point: nothing in this build.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn hit(_name: &str) -> crate::error::Result<()> {
    Ok(())
}
