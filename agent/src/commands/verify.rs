//! `coffer verify`: reads back everything that the log names, in every store, and believes nothing.
//! What is looked at is in [`crate::verify::objects`].

use super::progress::Progress;
use crate::config::Config;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::keyring::{TenantEntry, lost};
use crate::opened::{Opened, scratch};
use crate::primary;
use crate::repository::paths;
use crate::restore::Watch;
use crate::restore::request::merge_memory;
use crate::tenant::Tenant;
use crate::validation::Validation;
use crate::verify::drills;
use crate::verify::listing::{Listed, list, needed};
use crate::verify::live::{self, Compared};
use crate::verify::objects::{Failure, is_finding, named_in, one_copy};
use crate::verify::results::{self, Verdict};
use crate::verify::server::DrillServer;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
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
    /// Compare the tenant's rows (of all tenants and the reference data without --tenant) with those in the live database, too
    #[arg(long)]
    pub against_live: bool,
    /// Restore the tenant (all tenants and the reference data without --tenant) into a scratch database, compare, and drop it, too
    #[arg(long, conflicts_with = "from")]
    pub drill: bool,
    /// Only this store
    #[arg(long, value_name = "STORE")]
    pub from: Option<String>,
}

/// Verifies; the exit code: 0, 5, 7 or 9.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &VerifyArgs) -> Result<u8> {
    let opened = match args.drill {
        // What a drill found is noted in the repository.
        true => Opened::for_writing(config).await?,
        false => Opened::new(config, args.from.as_deref()).await?,
    };
    let mut stores: Vec<(String, bool)> = opened.repo.stores().map(|s| (s.name().to_owned(), s.required())).collect();
    stores.retain(|(s, _)| args.from.as_ref().is_none_or(|f| f == s));
    if stores.is_empty() {
        return Err(Error::usage(format!("there is no store '{}'", args.from.as_deref().unwrap_or_default())));
    }
    let sources = match source {
        Some(_) => Some(opened.sources(source).await?),
        None => None,
    };
    let (mut document, _) = verify(&opened, sources, &stores, args, &Tally::default(), json).await?;
    if args.against_live {
        against_live(config, source, &opened, args, &mut document).await?;
    }
    if args.drill {
        drills(config, source, &opened, args, &mut document).await?;
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
    // As a comparison by schedule is noted. A repository that may only be read can be compared with, too; and one store of
    // several is not the repository.
    let mut notes = match args.from {
        None => Some(Opened::for_writing(config).await),
        Some(_) => None,
    };
    for name in names {
        let (name, uid) = opened.source(config, Some(&name)).await?;
        let tenants = match &args.tenant {
            Some(k) => vec![opened.tenant((&name, uid), &Tenant::normal(k)).await?],
            None => opened.keyring.tenants(uid),
        };
        let dsn = primary::newest(&Dsn::parse(&config.pick_source(Some(&name))?.1.url)?).await?;
        let validation = Validation {
            opened,
            source: (&name, uid),
            dsn: &dsn,
            scratch: scratch(config)?,
            memory: merge_memory(config.limits.memory),
            watch: Watch::default(),
            patience: PATIENCE,
        };
        for t in tenants.iter().filter(|t| live::is_comparable(&t.tenant)) {
            let compared = live::compare(&validation, t).await?;
            add_live(&compared, t, uid, document);
            let Some(Ok(o)) = &notes else { continue };
            if compared.verdict() != Verdict::Open {
                let found = (results::LIVE, compared.verdict() == Verdict::Good, compared.note());
                if let Err(e) = results::record((&o.repo, &o.keyring), (uid, t.uid), found).await {
                    notes = Some(Err(e));
                }
            }
        }
    }
    if let Some(Err(e)) = notes {
        push(document, "warnings", format!("what the comparison found is not noted in the repository: {e}").into());
    }
    Ok(())
}

/// Restores tenants into a scratch database: of the source that is named, or of all that the repository has.
async fn drills(
    config: &Config,
    source: Option<&str>,
    opened: &Opened,
    args: &VerifyArgs,
    document: &mut Value,
) -> Result<()> {
    let server = DrillServer::start(config.verify.drill_url.as_deref(), &config.spool.dir).await?;
    for (name, uid) in opened.sources(source).await? {
        server.sweep(uid, opened.repo.clock().now_us()).await?;
        let tenants = match &args.tenant {
            Some(k) => vec![opened.tenant((&name, uid), &Tenant::normal(k)).await?],
            None => opened.keyring.tenants(uid),
        };
        for t in tenants.iter().filter(|t| live::is_comparable(&t.tenant)) {
            let by = (opened, (name.as_str(), uid));
            let memory = merge_memory(config.limits.memory);
            let tried = drills::try_one(by, (config, memory), &server, t, Watch::default()).await?;
            let verdict = tried.verdict();
            if verdict != Verdict::Open {
                let found = (results::DRILL, verdict == Verdict::Good, tried.note());
                results::record((&opened.repo, &opened.keyring), (uid, t.uid), found).await?;
            }
            if verdict != Verdict::Good {
                document["ok"] = false.into();
            }
            if let Some(message) = tried.note().filter(|_| verdict == Verdict::Bad) {
                let failure = json!({"object": format!("tenant {}", t.tenant), "tenant_uid": t.uid, "kind": "drill",
                    "message": message});
                push(document, "failures", failure);
            }
            push(document, "drills", tried.document(t));
        }
    }
    Ok(())
}

/// Puts a value into a list of a document.
fn push(document: &mut Value, field: &str, value: Value) {
    match document[field].as_array_mut() {
        Some(list) => list.push(value),
        None => document[field] = vec![value].into(),
    }
}

/// Puts what a comparison with live rows found into a document of [`verify`]: `live` has an entry for each tenant, and
/// what differs is among the failures.
pub(crate) fn add_live(compared: &Compared, tenant: &TenantEntry, source: Uuid, document: &mut Value) {
    let mut failures = Vec::new();
    let live = match compared {
        Compared::Done(v) => {
            failures.extend(v.failures().into_iter().map(|f| {
                json!({"object": f.relation, "tenant_uid": tenant.uid, "kind": f.kind.name(), "message": f.message,
                    "relation": f.relation, "key": f.key})
            }));
            v.document()
        }
        Compared::Damaged(e) => {
            failures.push(Failure::of(&named_in(e, &paths::source_dir(source)), Some(tenant.uid), e).document());
            json!({"tenant": tenant.tenant.key, "kind": tenant.tenant.kind.name(), "ok": false, "lsn": null,
                "tables": [], "skipped": [], "warnings": [e.to_string()]})
        }
    };
    if compared.verdict() != Verdict::Good {
        document["ok"] = false.into();
    }
    failures.into_iter().for_each(|f| push(document, "failures", f));
    push(document, "live", live);
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

/// 0, or what the failures of a document make, or that not everything was looked at.
fn exit_code(document: &Value) -> u8 {
    match document["failures"].as_array().map_or(&[][..], Vec::as_slice) {
        [] if document["ok"] == true => 0,
        [] => Kind::Partial.exit_code(),
        all if all.iter().all(|f| f["kind"] == "wrong_key") => Kind::Key.exit_code(),
        _ => Kind::Verification.exit_code(),
    }
}

/// Verifies these stores (name, required); the document, and what it lists as failures. `sources`: `None` for all that the
/// stores have.
pub(crate) async fn verify(
    opened: &Opened,
    sources: Option<Vec<(String, Uuid)>>,
    stores: &[(String, bool)],
    args: &VerifyArgs,
    tally: &Tally,
    json: bool,
) -> Result<(Value, Vec<Failure>)> {
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
    let listed: Vec<Value> = failures.iter().map(Failure::document).collect();
    let document = json!({"version": 1, "ok": failures.is_empty(), "objects": objects.len(), "failures": listed,
        "stores": stores.iter().map(|s| s.0.clone()).collect::<Vec<_>>(), "warnings": warnings});
    Ok((document, failures))
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
    let Listed { objects: wanted, records, mut failures, .. } =
        list(&opened.repo, (source, tenant), store, true).await?;
    seen.extend(records);
    seen.extend(wanted.iter().map(|o| o.path.clone()));
    failpoints::hit(failpoints::VERIFY_AFTER_LIST)?;
    let total = wanted.iter().map(|o| o.bytes).sum();
    tally.total.fetch_add(total, Ordering::Relaxed);
    let progress = Progress::new(&format!("verifying {store}"), "bytes", total, json);
    let mut checked = stream::iter(wanted)
        .map(|o| {
            let (repo, store) = (opened.repo.clone(), store.to_owned());
            async move {
                let r = one_copy(&repo, &o, &store).await;
                (o, r)
            }
        })
        .buffer_unordered(PARALLEL);
    let mut found = Vec::new();
    while let Some((o, r)) = checked.next().await {
        progress.add(o.bytes);
        tally.done.fetch_add(o.bytes, Ordering::Relaxed);
        if tally.cancelled.load(Ordering::Relaxed) {
            return Err(Error::other("the verification was cancelled").code("cancelled"));
        }
        match r {
            Ok(()) => {}
            Err(e) if is_finding(&e) => found.push(Failure::of_copy(&o, store, e)),
            Err(e) => return Err(e),
        }
    }
    drop(checked);
    if !found.is_empty() {
        // What nothing names any more, pruning has removed meanwhile.
        let now = list(&opened.repo, (source, tenant), store, false).await?;
        failures.extend(found.into_iter().filter(|f| now.names(&f.object)));
    }
    let mut lost = needed(&opened.repo, source, failures).await?;
    lost.sort_by(|a, b| a.object.cmp(&b.object));
    Ok(lost)
}

/// Whom a comparison or a drill was of.
fn whom(of: &Value) -> String {
    let said = |field: &str| of[field].as_str().unwrap_or_default().to_owned();
    if of["kind"] == "normal" { said("tenant") } else { format!("({})", said("kind")) }
}

/// What a comparison or a drill left out.
fn left_out(of: &Value) -> String {
    let s = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let line = |t: &Value| format!("not compared: {}: {}\n", s(&t["relation"]), s(&t["reason"]));
    of["skipped"].as_array().into_iter().flatten().map(line).collect()
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
        out.push_str(&format!("tenant {}: {same} live rows are as archived, at {}\n", whom(l), s(&l["lsn"])));
        out.push_str(&left_out(l));
    }
    for l in d["drills"].as_array().into_iter().flatten() {
        let rows: u64 = l["tables"].as_array().into_iter().flatten().filter_map(|t| t["restored"].as_u64()).sum();
        let tables = l["tables"].as_array().map_or(&[][..], Vec::as_slice);
        let same = !l["lsn"].is_null() && tables.iter().all(|t| t["ok"] == true);
        let verdict = if same { "as the repository has them" } else { "NOT as the repository has them" };
        out.push_str(&format!("tenant {}: {rows} rows restored as of {}, {verdict}\n", whom(l), s(&l["lsn"])));
        out.push_str(&left_out(l));
    }
    let verdict = match exit_code(d) {
        0 => "all good",
        code if code == Kind::Partial.exit_code() => "good, but not everything was compared",
        _ => "NOT GOOD",
    };
    out.push_str(&format!("{} objects read back and authenticated: {verdict}\n", d["objects"]));
    out
}
