//! `coffer verify`: reads back everything that the log names, in every store, and believes nothing.
//!
//! The log's numbering and hash chain; that each record goes on where the one before ended; then every object: length
//! and SHA-256 as recorded, every chunk's authentication tag, kind, tenant and positions of the header, frames that
//! parse, rows of one tenant, as many as recorded.

use super::progress::Progress;
use crate::catalog::{self, Catalog, manifest};
use crate::config::Config;
use crate::crypto::ObjectKind;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::keyring::{TenantEntry, lost};
use crate::large_objects::frames;
use crate::merge::{check, from_io};
use crate::opened::{Opened, scratch};
use crate::repository::{Body, Log, LogRecord, ObjectRef, paths};
use crate::restore::Watch;
use crate::restore::request::merge_memory;
use crate::tenant::Tenant;
use crate::validation::Validation;
use coffer_wire::TenantKind;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;
use uuid::Uuid;

/// How long a comparison with live rows waits for the repository to catch up.
const PATIENCE: Duration = Duration::from_secs(300);
/// Objects read at a time.
const PARALLEL: usize = 4;

#[derive(clap::Args, Debug)]
pub struct VerifyArgs {
    /// Only this tenant's objects
    #[arg(long, value_name = "KEY")]
    pub tenant: Option<String>,
    /// Compare the tenant's rows (of all tenants without --tenant) with those in the live database, too
    #[arg(long)]
    pub against_live: bool,
    /// Only this store
    #[arg(long, value_name = "STORE")]
    pub from: Option<String>,
}

/// Something that is not as it was written.
#[derive(Clone, Debug)]
struct Failure {
    object: String,
    tenant_uid: Option<Uuid>,
    kind: &'static str,
    message: String,
}

impl Failure {
    fn of(object: &str, tenant: Option<Uuid>, e: &Error) -> Self {
        let kind = if e.kind() == Kind::Key {
            "wrong_key"
        } else {
            ["missing", "replayed", "chain_gap"].into_iter().find(|k| e.is_code(k)).unwrap_or("corrupt")
        };
        Self { object: object.to_owned(), tenant_uid: tenant, kind, message: e.to_string() }
    }

    fn chain(object: String, message: String) -> Self {
        Self { object, tenant_uid: None, kind: "chain_gap", message }
    }
}

/// A store that does not answer is no failure of what is in it.
fn is_finding(e: &Error) -> bool {
    matches!(e.kind(), Kind::Verification | Kind::Key | Kind::NotFound)
}

/// Verifies; the exit code: 0, 5 or 7.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &VerifyArgs) -> Result<u8> {
    let opened = Opened::new(config, args.from.as_deref()).await?;
    let mut stores: Vec<(String, bool)> = opened.repo.stores().map(|s| (s.name().to_owned(), s.required())).collect();
    stores.retain(|(s, _)| args.from.as_ref().is_none_or(|f| f == s));
    if stores.is_empty() {
        return Err(Error::usage(format!("there is no store '{}'", args.from.as_deref().unwrap_or_default())));
    }
    let sources = match source {
        Some(_) => Some(opened.sources(source).await?),
        None => None,
    };
    let mut document = verify(&opened, sources, &stores, args, &Tally::default(), json).await?;
    if args.against_live {
        against_live(config, source, &opened, args, &mut document).await?;
    }
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let written = if json { writeln!(out, "{document}") } else { out.write_all(text(&document).as_bytes()) };
    written.context(Kind::Other, "cannot write to standard output")?;
    Ok(exit_code(&document))
}

/// Compares with the live databases: of the source that is named, or of all that are configured.
async fn against_live(
    config: &Config,
    source: Option<&str>,
    opened: &Opened,
    args: &VerifyArgs,
    document: &mut Value,
) -> Result<()> {
    let names: Vec<String> = match source {
        Some(name) => vec![config.pick_source(Some(name))?.0.to_owned()],
        None => config.source.keys().cloned().collect(),
    };
    if names.is_empty() {
        return Err(Error::usage("--against-live needs a [source.NAME] section with the database's url"));
    }
    for name in names {
        let (name, uid) = opened.source(config, Some(&name)).await?;
        let tenants = match &args.tenant {
            Some(k) => vec![opened.tenant((&name, uid), &Tenant::normal(k)).await?],
            None => opened.keyring.tenants(uid),
        };
        let dsn = Dsn::parse(&config.pick_source(Some(&name))?.1.url)?;
        let validation = Validation {
            opened,
            source: (&name, uid),
            dsn: &dsn,
            scratch: scratch(config)?,
            memory: merge_memory(config.limits.memory),
            watch: Watch::default(),
            patience: PATIENCE,
        };
        // Rows of reference data and those that nobody could attribute have no place that is theirs alone.
        let comparable = |t: &&TenantEntry| matches!(t.tenant.kind, TenantKind::Normal | TenantKind::Unassigned);
        for t in tenants.iter().filter(comparable) {
            add_live(&validation, t, document).await?;
        }
    }
    Ok(())
}

/// Compares a tenant with its live rows and puts what was found into a document of [`verify`]: `live` has an entry for
/// each tenant, and what differs is among the failures.
pub(crate) async fn add_live(validation: &Validation<'_>, tenant: &TenantEntry, document: &mut Value) -> Result<()> {
    let mut failures = Vec::new();
    let live = match validation.run(&tenant.tenant).await {
        Ok(v) => {
            failures.extend(v.failures().into_iter().map(|f| {
                json!({"object": f.relation, "tenant_uid": tenant.uid, "kind": f.kind.name(), "message": f.message,
                    "relation": f.relation, "key": f.key})
            }));
            v.document()
        }
        // An object that the comparison needs is not what it was.
        Err(e) if is_finding(&e) => {
            let f = Failure::of(&named_in(&e, &paths::source_dir(validation.source.1)), Some(tenant.uid), &e);
            failures
                .push(json!({"object": f.object, "tenant_uid": f.tenant_uid, "kind": f.kind, "message": f.message}));
            json!({"tenant": tenant.tenant.key, "kind": tenant.tenant.kind.name(), "ok": false, "lsn": null,
                "tables": [], "skipped": [], "warnings": [e.to_string()]})
        }
        Err(e) => return Err(e),
    };
    if !failures.is_empty() {
        document["ok"] = false.into();
    }
    let mut add = |field: &str, more: Vec<Value>| match document[field].as_array_mut() {
        Some(list) => list.extend(more),
        None => document[field] = more.into(),
    };
    add("failures", failures);
    add("live", vec![live]);
    Ok(())
}

/// How far a verification is, for whoever watches it, and whether it is to end.
#[derive(Default)]
pub(crate) struct Tally {
    /// Bytes to read, as far as is known.
    pub total: AtomicU64,
    /// Bytes read.
    pub done: AtomicU64,
    pub cancelled: AtomicBool,
}

/// 0, or what the failures of a document make.
fn exit_code(document: &Value) -> u8 {
    match document["failures"].as_array().map_or(&[][..], Vec::as_slice) {
        [] => 0,
        all if all.iter().all(|f| f["kind"] == "wrong_key") => Kind::Key.exit_code(),
        _ => Kind::Verification.exit_code(),
    }
}

/// Verifies these stores (name, required); the document. `sources`: `None` for all that the stores have.
pub(crate) async fn verify(
    opened: &Opened,
    sources: Option<Vec<(String, Uuid)>>,
    stores: &[(String, bool)],
    args: &VerifyArgs,
    tally: &Tally,
    json: bool,
) -> Result<Value> {
    let (mut objects, mut failures, mut warnings) = (HashSet::new(), Vec::new(), Vec::new());
    let sources = match sources {
        Some(named) => named,
        None => {
            // Listed with the others, so that one lost entry does not hide what else is wrong.
            let nameless = opened.nameless_sources().await?;
            failures.extend(nameless.into_iter().map(|uid| {
                let folder = paths::source_dir(uid);
                let e = lost(&format!("the source of folder {folder}"));
                Failure::of(&folder, None, &e)
            }));
            opened.keyring.sources()
        }
    };
    for (name, uid) in sources {
        let tenant = match &args.tenant {
            Some(k) => Some(opened.tenant((&name, uid), &Tenant::normal(k)).await?.uid),
            None => None,
        };
        for (store, required) in stores {
            match one_store(opened, (uid, tenant), store, tally, json, &mut objects).await {
                Ok(found) => failures.extend(found),
                // An optional store may be away; it holds copies.
                Err(e) if !required && e.kind() == Kind::Unreachable && args.from.is_none() => {
                    warnings.push(format!("store {store} was left out: {e}"));
                }
                Err(e) => return Err(e),
            }
        }
    }
    let listed: Vec<Value> = failures
        .iter()
        .map(|f| json!({"object": f.object, "tenant_uid": f.tenant_uid, "kind": f.kind, "message": f.message}))
        .collect();
    Ok(json!({"version": 1, "ok": failures.is_empty(), "objects": objects.len(), "failures": listed,
        "stores": stores.iter().map(|s| s.0.clone()).collect::<Vec<_>>(), "warnings": warnings}))
}

/// Everything that one store has of a source.
async fn one_store(
    opened: &Opened,
    (source, tenant): (Uuid, Option<Uuid>),
    store: &str,
    tally: &Tally,
    json: bool,
    seen: &mut HashSet<String>,
) -> Result<Vec<Failure>> {
    let log = match Log::open(&opened.repo, source, Some(store)).await {
        Ok(log) => log,
        Err(e) if is_finding(&e) => {
            let object = paths::log_dir(source);
            return Ok(vec![Failure::of(&named_in(&e, &object), None, &e)]);
        }
        Err(e) => return Err(e),
    };
    let mut failures = continuity(source, log.records());
    let mut wanted: Vec<ObjectRef> = log
        .records()
        .iter()
        .flat_map(|r| r.objects())
        .filter(|o| tenant.is_none_or(|t| t == o.tenant))
        .cloned()
        .collect();
    let (of_catalogs, more) = catalogs(opened, (source, tenant), store, seen).await?;
    failures.extend(more);
    let known: HashSet<&str> = wanted.iter().map(|o| o.path.as_str()).collect();
    let fresh: BTreeMap<&str, &ObjectRef> =
        of_catalogs.iter().map(|o| (o.path.as_str(), o)).filter(|(p, _)| !known.contains(p)).collect();
    let fresh: Vec<ObjectRef> = fresh.into_values().cloned().collect();
    wanted.extend(fresh);
    seen.extend(wanted.iter().map(|o| o.path.clone()));
    if tenant.is_none() {
        seen.extend((0..log.records().len() as u64).map(|n| paths::log_record(source, n)));
    }
    let total = wanted.iter().map(|o| o.bytes).sum();
    tally.total.fetch_add(total, Ordering::Relaxed);
    let progress = Progress::new(&format!("verifying {store}"), "bytes", total, json);
    let rt = Handle::current();
    let mut checked = stream::iter(wanted)
        .map(|o| {
            let (repo, keyring, rt, store) =
                (opened.repo.clone(), opened.keyring.clone(), rt.clone(), store.to_owned());
            async move {
                let owner = keyring.by_uid(o.tenant).map(|t| t.tenant);
                let object = o.clone();
                let work = move || {
                    let mut plain = repo.open_object(&rt, &object, Some(&store))?;
                    one_object(&mut plain, &object, owner.as_ref())
                };
                let r = tokio::task::spawn_blocking(work).await.context(Kind::Other, "a worker thread broke off");
                (o, r.and_then(|r| r))
            }
        })
        .buffer_unordered(PARALLEL);
    while let Some((o, r)) = checked.next().await {
        progress.add(o.bytes);
        tally.done.fetch_add(o.bytes, Ordering::Relaxed);
        if tally.cancelled.load(Ordering::Relaxed) {
            return Err(Error::other("the verification was cancelled").code("cancelled"));
        }
        match r {
            Ok(()) => {}
            Err(e) if is_finding(&e) => {
                failures.push(Failure::of(&o.path, Some(o.tenant), &e.during(format_args!("store {store}"))));
            }
            Err(e) => return Err(e),
        }
    }
    failures.sort_by(|a, b| a.object.cmp(&b.object));
    Ok(failures)
}

/// What the catalogs in one store name, and what is wrong with them.
async fn catalogs(
    opened: &Opened,
    (source, tenant): (Uuid, Option<Uuid>),
    store: &str,
    seen: &mut HashSet<String>,
) -> Result<(Vec<ObjectRef>, Vec<Failure>)> {
    let (mut objects, mut failures) = (Vec::new(), Vec::new());
    let having = catalog::tenants(&opened.repo, source, Some(store)).await?;
    for (uid, numbers) in having.into_iter().filter(|(uid, _)| tenant.is_none_or(|t| t == *uid)) {
        match Catalog::open(&opened.repo, source, uid, Some(store)).await {
            Ok(c) => {
                objects.extend(c.state().objects().cloned());
                // That a manifest authenticates does not say that it adds up.
                for (f, m) in c.state().fulls.iter().filter_map(|f| Some((f, f.manifest.as_ref()?))) {
                    match manifest::read(&opened.repo, m, &f.objects, Some(store)).await {
                        // What cannot be opened is found again with the other objects.
                        Err(e) if e.is_code("malformed") => {
                            failures.push(Failure::of(&m.path, Some(uid), &e.during(format_args!("store {store}"))));
                        }
                        Err(e) if !is_finding(&e) => return Err(e),
                        _ => {}
                    }
                }
                seen.extend(numbers.into_iter().map(|n| paths::catalog_record(source, uid, n)));
            }
            Err(e) if is_finding(&e) => {
                let folder = paths::catalog_dir(source, uid);
                failures.push(Failure::of(&named_in(&e, &folder), Some(uid), &e.during(format_args!("store {store}"))));
            }
            Err(e) => return Err(e),
        }
    }
    Ok((objects, failures))
}

/// The record that an error of the log names, else the log's folder.
fn named_in(e: &Error, folder: &str) -> String {
    let text = e.to_string();
    text.split([' ', ':', ',']).find(|w| w.starts_with(folder)).unwrap_or(folder).to_owned()
}

/// Each record begins where the one before ended.
fn continuity(source: Uuid, records: &[Arc<LogRecord>]) -> Vec<Failure> {
    let mut out = Vec::new();
    for pair in records.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        let path = || paths::log_record(source, b.n);
        // A new timeline goes back to where the old one was left; a gap says what it skips.
        let follows = match &b.body {
            Body::Timeline { at, .. } => b.from_lsn <= a.upto_lsn && b.upto_lsn <= *at.max(&b.from_lsn),
            _ => b.from_lsn == a.upto_lsn,
        };
        if !follows {
            out.push(Failure::chain(
                path(),
                format!("record {} begins at {}, the record before it ends at {}", b.n, b.from_lsn, a.upto_lsn),
            ));
        }
        if b.upto_lsn < b.from_lsn {
            out.push(Failure::chain(path(), format!("record {} ends before it begins", b.n)));
        }
        if !matches!(b.body, Body::Timeline { .. })
            && (a.timeline, a.system_identifier) != (b.timeline, b.system_identifier)
        {
            out.push(Failure::chain(path(), format!("record {} is of another server or timeline", b.n)));
        }
    }
    out
}

fn one_object(plain: &mut dyn Read, o: &ObjectRef, owner: Option<&Tenant>) -> Result<()> {
    match o.kind {
        ObjectKind::Changeset | ObjectKind::Full | ObjectKind::Common => {
            let within = (o.kind != ObjectKind::Full).then_some((o.lsn_start, o.lsn_end));
            let found = check(plain, owner, within)?;
            if o.kind != ObjectKind::Common && found.rows != o.rows {
                return Err(Error::new(
                    Kind::Verification,
                    format!("object {} holds {} rows, its record says {}", o.path, found.rows, o.rows),
                )
                .code("corrupt"));
            }
            Ok(())
        }
        ObjectKind::LargeObjects => {
            let found = frames::read(plain, &mut frames::Nothing)?;
            if found != o.rows {
                return Err(Error::new(
                    Kind::Verification,
                    format!("object {} holds {found} large objects, its record says {}", o.path, o.rows),
                )
                .code("corrupt"));
            }
            Ok(())
        }
        _ => std::io::copy(plain, &mut std::io::sink()).map(drop).map_err(from_io),
    }
}

fn text(d: &Value) -> String {
    let s = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let mut out = String::new();
    for f in d["failures"].as_array().into_iter().flatten() {
        out.push_str(&format!("{}: {}: {}\n", s(&f["kind"]), s(&f["object"]), s(&f["message"])));
    }
    for w in d["warnings"].as_array().into_iter().flatten() {
        out.push_str(&format!("warning: {}\n", s(w)));
    }
    for l in d["live"].as_array().into_iter().flatten() {
        let same: u64 = l["tables"].as_array().into_iter().flatten().filter_map(|t| t["same"].as_u64()).sum();
        out.push_str(&format!("tenant {}: {same} live rows are as archived, at {}\n", s(&l["tenant"]), s(&l["lsn"])));
        for t in l["skipped"].as_array().into_iter().flatten() {
            out.push_str(&format!("not compared: {}: {}\n", s(&t["relation"]), s(&t["reason"])));
        }
    }
    let verdict = if d["ok"] == true { "all good" } else { "NOT GOOD" };
    out.push_str(&format!("{} objects read back and authenticated: {verdict}\n", d["objects"]));
    out
}
