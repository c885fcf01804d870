//! Every name in a store and in a keyring, in one file. Names carry uids and positions only, never a tenant's key.

use coffer_wire::Lsn;
use std::ops::Range;
use uuid::Uuid;

/// What a store says about its repository; at most one per store.
pub const DESCRIPTOR: &str = "coffer-repository";
/// Where stores are probed.
pub const PROBES: &str = "probe";

/// Digits of a record's number: names sort as the numbers do.
const NUMBER_DIGITS: usize = 20;

/// The folder of the sources' folders.
pub const SOURCES: &str = "s";

fn source(source: Uuid) -> String {
    format!("{SOURCES}/{}", source.simple())
}

/// The folder of a source's commit log.
pub fn log_dir(source_uid: Uuid) -> String {
    format!("{}/log", source(source_uid))
}

/// Record `n` of a source's commit log.
pub fn log_record(source_uid: Uuid, n: u64) -> String {
    format!("{}/{n:0NUMBER_DIGITS$}", log_dir(source_uid))
}

/// The number of a record by its name; `None` for a name that is no record's.
pub fn log_number(name: &str) -> Option<u64> {
    let last = name.rsplit('/').next()?;
    (last.len() == NUMBER_DIGITS && last.bytes().all(|b| b.is_ascii_digit())).then(|| last.parse().ok())?
}

/// The folder of the log's packs.
pub fn packs_dir(source_uid: Uuid) -> String {
    format!("{}/packs", source(source_uid))
}

/// The pack of these records of a source's commit log.
pub fn pack(source_uid: Uuid, records: &Range<u64>) -> String {
    format!("{}/{:0NUMBER_DIGITS$}-{}", packs_dir(source_uid), records.start, records.end - records.start)
}

/// The records of a pack by its name; `None` for a name that is no pack's.
pub fn pack_range(name: &str) -> Option<Range<u64>> {
    let (first, count) = name.rsplit('/').next()?.split_once('-')?;
    let first = log_number(first)?;
    let count: u64 = count.parse().ok().filter(|c| *c > 0)?;
    Some(first..first.checked_add(count)?)
}

/// The folder of the log's checkpoints.
pub fn checkpoints_dir(source_uid: Uuid) -> String {
    format!("{}/checkpoints", source(source_uid))
}

/// The checkpoint that stands for the records below `end` of a source's commit log.
pub fn checkpoint(source_uid: Uuid, end: u64) -> String {
    format!("{}/{end:0NUMBER_DIGITS$}", checkpoints_dir(source_uid))
}

/// What of a ship concerns every tenant.
pub fn common(source_uid: Uuid, lsn_end: Lsn, object: Uuid) -> String {
    format!("{}/common/{}", source(source_uid), leaf(lsn_end, object))
}

/// A tenant's changeset.
pub fn changeset(source_uid: Uuid, tenant: Uuid, lsn_end: Lsn, object: Uuid) -> String {
    format!("{}/t/{}/c/{}", source(source_uid), tenant.simple(), leaf(lsn_end, object))
}

/// A tenant's full.
pub fn full(source_uid: Uuid, tenant: Uuid, lsn_end: Lsn, object: Uuid) -> String {
    format!("{}/t/{}/f/{}", source(source_uid), tenant.simple(), leaf(lsn_end, object))
}

/// A tenant's roles.
pub fn roles(source_uid: Uuid, tenant: Uuid, lsn_end: Lsn, object: Uuid) -> String {
    format!("{}/t/{}/r/{}", source(source_uid), tenant.simple(), leaf(lsn_end, object))
}

/// The folder of the tenants' folders.
pub fn tenants_dir(source_uid: Uuid) -> String {
    format!("{}/t", source(source_uid))
}

/// The folder of a tenant's catalog.
pub fn catalog_dir(source_uid: Uuid, tenant: Uuid) -> String {
    format!("{}/{}/k", tenants_dir(source_uid), tenant.simple())
}

/// Record `n` of a tenant's catalog.
pub fn catalog_record(source_uid: Uuid, tenant: Uuid, n: u64) -> String {
    format!("{}/{n:0NUMBER_DIGITS$}", catalog_dir(source_uid, tenant))
}

/// Which parts of which objects a full consists of.
pub fn manifest(source_uid: Uuid, tenant: Uuid, lsn_end: Lsn, object: Uuid) -> String {
    format!("{}/{}/m/{}", tenants_dir(source_uid), tenant.simple(), leaf(lsn_end, object))
}

/// The folder of what a tenant's archives have beside rows: their documents, and copies of what others have.
pub fn archives_dir(source_uid: Uuid, tenant: Uuid) -> String {
    format!("{}/{}/a", tenants_dir(source_uid), tenant.simple())
}

/// Something in that folder; of a document, the object is the archive's id.
pub fn archive(source_uid: Uuid, tenant: Uuid, lsn_end: Lsn, object: Uuid) -> String {
    format!("{}/{}", archives_dir(source_uid, tenant), leaf(lsn_end, object))
}

/// A tenant's incremental.
pub fn incremental(source_uid: Uuid, tenant: Uuid, lsn_end: Lsn, object: Uuid) -> String {
    format!("{}/{}/i/{}", tenants_dir(source_uid), tenant.simple(), leaf(lsn_end, object))
}

/// Large objects that a tenant's rows refer to.
pub fn large_objects(source_uid: Uuid, tenant: Uuid, lsn: Lsn, object: Uuid) -> String {
    format!("{}/t/{}/o/{}", source(source_uid), tenant.simple(), leaf(lsn, object))
}

/// The definitions that go with a base.
pub fn schema(source_uid: Uuid, lsn_end: Lsn, object: Uuid) -> String {
    format!("{}/schema/{}", source(source_uid), leaf(lsn_end, object))
}

/// The folder of a source's leases.
pub fn leases_dir(source_uid: Uuid) -> String {
    format!("{}/lease", source(source_uid))
}

/// A lease: never a record's, and gone when it is over.
pub fn lease(source_uid: Uuid, object: Uuid) -> String {
    format!("{}/{}", leases_dir(source_uid), object.simple())
}

/// The folder of what concerns every tenant.
pub fn commons_dir(source_uid: Uuid) -> String {
    format!("{}/common", source(source_uid))
}

/// The folder of definitions.
pub fn schemas_dir(source_uid: Uuid) -> String {
    format!("{}/schema", source(source_uid))
}

/// The folder of a tenant.
pub fn tenant_dir(source_uid: Uuid, tenant: Uuid) -> String {
    format!("{}/{}", tenants_dir(source_uid), tenant.simple())
}

/// Whether a name is a changeset's, or that of what concerns every tenant.
pub fn is_of_a_ship(source_uid: Uuid, name: &str) -> bool {
    let Some(rest) = name.strip_prefix(&format!("{}/", source(source_uid))) else { return false };
    let folders: Vec<&str> = rest.split('/').collect();
    parse_leaf(name).is_some() && matches!(folders[..], ["common", _] | ["t", _, "c", _])
}

/// End of the range and uid of an object by its name; `None` for a name of another shape.
pub fn parse_leaf(name: &str) -> Option<(Lsn, Uuid)> {
    let (lsn, object) = name.rsplit('/').next()?.split_once('-')?;
    let lsn = (lsn.len() == 16).then(|| u64::from_str_radix(lsn, 16).ok())??;
    let (lsn, object) = (Lsn(lsn), Uuid::try_parse(object).ok()?);
    name.ends_with(&leaf(lsn, object)).then_some((lsn, object))
}

/// The folder of everything that a source has in a store.
pub fn source_dir(source_uid: Uuid) -> String {
    source(source_uid)
}

fn leaf(lsn: Lsn, object: Uuid) -> String {
    format!("{:016x}-{}", lsn.0, object.simple())
}

/// What a keyring says about itself; one in each of its places.
pub const KEYRING_DESCRIPTOR: &str = "coffer-keyring";
/// The folder of a keyring's entries.
pub const KEYS_DIR: &str = "k";

/// The keyring's entry of one version of a key.
pub fn key_entry(uid: Uuid, version: u32) -> String {
    format!("{KEYS_DIR}/{}/{version:010}", uid.simple())
}

/// Uid and version of an entry by its name.
pub fn parse_key_entry(name: &str) -> Option<(Uuid, u32)> {
    let (uid, version) = name.strip_prefix(KEYS_DIR)?.strip_prefix('/')?.split_once('/')?;
    let uid = Uuid::try_parse(uid).ok()?;
    let version = version.parse().ok()?;
    (key_entry(uid, version) == name).then_some((uid, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_names_sort_by_number_and_read_back() {
        let s = Uuid::from_u128(7);
        assert!(log_record(s, 9) < log_record(s, 10));
        for n in [0, 1, 99, u64::MAX] {
            assert_eq!(log_number(&log_record(s, n)), Some(n));
        }
        for bad in ["", "s/x/log/1", "s/x/log/0000000000000000000x", "s/x/log/00000000000000000001#1"] {
            assert_eq!(log_number(bad), None, "{bad}");
        }
    }

    #[test]
    fn names_are_as_documented() {
        let (s, t, o) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let (s_, t_, o_) = (
            "00000000000000000000000000000001",
            "00000000000000000000000000000002",
            "00000000000000000000000000000003",
        );
        let lsn = Lsn(0x16_B374_D848);
        assert_eq!(log_record(s, 12), format!("s/{s_}/log/00000000000000000012"));
        assert_eq!(changeset(s, t, lsn, o), format!("s/{s_}/t/{t_}/c/00000016b374d848-{o_}"));
        assert_eq!(full(s, t, lsn, o), format!("s/{s_}/t/{t_}/f/00000016b374d848-{o_}"));
        assert_eq!(roles(s, t, lsn, o), format!("s/{s_}/t/{t_}/r/00000016b374d848-{o_}"));
        assert_eq!(large_objects(s, t, lsn, o), format!("s/{s_}/t/{t_}/o/00000016b374d848-{o_}"));
        assert_eq!(common(s, lsn, o), format!("s/{s_}/common/00000016b374d848-{o_}"));
        assert_eq!(schema(s, lsn, o), format!("s/{s_}/schema/00000016b374d848-{o_}"));
        assert_eq!(lease(s, o), format!("s/{s_}/lease/{o_}"));
        assert_eq!(parse_leaf(&full(s, t, lsn, o)), Some((lsn, o)));
        for bad in [log_record(s, 12), lease(s, o), full(s, t, lsn, o).to_uppercase(), full(s, t, lsn, o) + "#1"] {
            assert_eq!(parse_leaf(&bad), None, "{bad}");
        }
        assert!(is_of_a_ship(s, &changeset(s, t, lsn, o)) && is_of_a_ship(s, &common(s, lsn, o)));
        assert!(!is_of_a_ship(s, &full(s, t, lsn, o)) && !is_of_a_ship(t, &common(s, lsn, o)));
        assert_eq!(parse_key_entry(&key_entry(t, 12)), Some((t, 12)));
        assert_eq!(parse_key_entry("k/00000000000000000000000000000002/1"), None);
        assert_eq!(key_entry(t, 1), format!("k/{t_}/0000000001"));
    }
}
