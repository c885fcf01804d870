//! `coffer show`: one backup, or one object.

use crate::catalog::{Catalog, FullEntry, IncrementalEntry};
use crate::clock::rfc3339;
use crate::config::Config;
use crate::crypto::{Expect, Header, Opener};
use crate::error::{Context, Error, Kind, Result};
use crate::history::Target;
use crate::keyring::TenantEntry;
use crate::opened::Opened;
use crate::repository::{Body, ObjectRef};
use bytes::Bytes;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::sync::Arc;
use tokio::runtime::Handle;
use uuid::Uuid;

#[derive(clap::Args, Debug)]
pub struct ShowArgs {
    /// The id of a backup, as `coffer list` shows it
    #[arg(value_name = "BACKUP", required_unless_present = "object", conflicts_with = "object")]
    pub backup: Option<Uuid>,
    /// An object by its key in the store
    #[arg(long, value_name = "KEY")]
    pub object: Option<String>,
    /// Write the object's authenticated plaintext to standard output
    #[arg(long, requires = "object")]
    pub plaintext: bool,
    /// Read from this store alone
    #[arg(long, value_name = "STORE")]
    pub from: Option<String>,
}

/// Prints it.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &ShowArgs) -> Result<()> {
    let opened = Opened::new(config, args.from.as_deref()).await?;
    match (&args.backup, &args.object) {
        (Some(id), _) => backup(&opened, source, json, *id).await,
        (None, Some(key)) => object(opened, json, key.trim_start_matches('/').to_owned(), args.plaintext).await,
        (None, None) => Err(Error::usage("name a backup, or an object with --object")),
    }
}

async fn backup(opened: &Opened, source: Option<&str>, json: bool, id: Uuid) -> Result<()> {
    for (name, uid) in opened.sources(source).await? {
        let mut history = opened.history(uid).await?;
        history.load_catalogs().await?;
        for t in opened.keyring.tenants(uid) {
            if let Some(f) = history.catalog(t.uid).and_then(|c| c.full(id)) {
                return print(&synthetic(&name, &t, f), json);
            }
            let of_tenant = history.catalog(t.uid).into_iter().flat_map(|c| &c.incrementals);
            if let Some(i) = of_tenant.into_iter().find(|i| i.id == id) {
                return print(&incremental(&name, &t, i), json);
            }
        }
        for r in history.records() {
            let Body::Base(b) = &r.body else { continue };
            let own = b.fulls.iter().find(|f| f.object == id);
            if b.job != id && own.is_none() {
                continue;
            }
            let named = |f: &ObjectRef| {
                let tenant = opened.keyring.by_uid(f.tenant);
                json!({"tenant": tenant.as_ref().map(|t| t.tenant.key.clone()), "kind": tenant.map(|t| t.tenant.kind.name()),
                    "tenant_uid": f.tenant, "object": f.path, "bytes": f.bytes, "rows": f.rows, "sha256": f.sha256,
                    "key_version": f.key_version})
            };
            let fulls: Vec<Value> =
                b.fulls.iter().filter(|f| own.is_none_or(|o| o.object == f.object)).map(named).collect();
            let tables: Vec<Value> = b
                .tables
                .iter()
                .map(|t| json!({"relation": t.name, "relid": t.relid, "cut_lsn": t.cut_lsn.to_string()}))
                .collect();
            // Read beside the rows, in a record of their own: those before and after this backup.
            let at = Target { asked: id.to_string(), lsn: b.cut_lsn, time_us: 0 };
            let owners = b.fulls.iter().filter(|f| own.is_none_or(|o| o.object == f.object)).map(|f| f.tenant);
            let around = owners.flat_map(|t| history.large_objects(t, &at)).flat_map(|(_, o)| o);
            let objects: Vec<Value> = b.large_objects.iter().cloned().chain(around).map(|o| named(&o)).collect();
            let document = json!({"version": 1, "id": id, "kind": "full", "source": name, "record": r.n, "job": b.job,
                "point_lsn": b.cut_lsn.to_string(), "point_time": rfc3339(history.line().time_at(b.cut_lsn)),
                "taken_at": rfc3339(r.at_us), "tables": tables, "fulls": fulls,
                "large_objects": objects,
                "schema": b.schema.as_ref().map(|s| s.path.clone())});
            return print(&document, json);
        }
    }
    Err(Error::new(Kind::NotFound, format!("there is no backup {id}")).hint("see `coffer list`"))
}

/// A full that was merged from others.
fn synthetic(source: &str, t: &TenantEntry, f: &FullEntry) -> Value {
    let object = |o: &ObjectRef| {
        json!({"object": o.path, "bytes": o.bytes, "rows": o.rows, "sha256": o.sha256, "key_version": o.key_version,
            "of_this": o.lsn_end == f.point_lsn})
    };
    let tables: Vec<Value> = f
        .tables
        .iter()
        .map(|t| json!({"relation": t.name, "relid": t.relid, "class": t.class, "rows": t.rows}))
        .collect();
    json!({"version": 1, "id": f.id, "kind": f.kind(), "source": source,
        "tenant": t.tenant.key, "tenant_kind": t.tenant.kind.name(), "tenant_uid": t.uid, "trigger": f.trigger,
        "reason": f.reason, "record": f.log_n, "point_lsn": f.point_lsn.to_string(),
        "point_time": rfc3339(f.point_time_us), "verified_at": f.read_back_us.map(rfc3339), "rows": f.rows,
        "bytes": f.bytes, "tables": tables, "objects": f.objects.iter().map(object).collect::<Vec<_>>(),
        "manifest": f.manifest.as_ref().map(object), "schema": f.schema.as_ref().map(|s| s.path.clone()),
        "roles": f.roles.as_ref().map(|s| s.path.clone())})
}

fn incremental(source: &str, t: &TenantEntry, i: &IncrementalEntry) -> Value {
    let object = i.object.as_ref().map(|o| {
        json!({"object": o.path, "bytes": o.bytes, "rows": o.rows, "sha256": o.sha256, "key_version": o.key_version})
    });
    json!({"version": 1, "id": i.id, "kind": "incremental", "source": source, "tenant": t.tenant.key,
        "tenant_kind": t.tenant.kind.name(), "tenant_uid": t.uid, "trigger": "incremental", "record": i.log_n,
        "from_lsn": i.from_lsn.to_string(), "point_lsn": i.to_lsn.to_string(), "point_time": rfc3339(i.to_time_us),
        "verified_at": i.read_back_us.map(rfc3339), "rows": i.rows, "bytes": i.bytes,
        "objects": object.into_iter().collect::<Vec<_>>()})
}

/// Prints a document; for people, indented.
fn print(document: &Value, json: bool) -> Result<()> {
    let text = if json {
        document.to_string()
    } else {
        serde_json::to_string_pretty(document).context(Kind::Other, "cannot encode the document")?
    };
    writeln!(std::io::stdout().lock(), "{text}").context(Kind::Other, "cannot write to standard output")
}

async fn object(opened: Opened, json: bool, key: String, plaintext: bool) -> Result<()> {
    // An object that a record names is read as a stream and checked against the record.
    let mut found = None;
    for (_, uid) in opened.sources(None).await? {
        let log = crate::repository::Log::open(&opened.repo, uid, opened.from.as_deref()).await?;
        found = log.records().iter().flat_map(|r| r.objects()).find(|o| o.path == key).cloned();
        for tenant in opened.keyring.tenants(uid) {
            if found.is_some() {
                break;
            }
            let catalog = Catalog::open(&opened.repo, uid, tenant.uid, opened.from.as_deref()).await?;
            found = catalog.state().objects().find(|o| o.path == key).cloned();
        }
        if found.is_some() {
            break;
        }
    }
    let rt = Handle::current();
    let raw = if found.is_some() { Bytes::new() } else { unnamed(&opened, &key).await? };
    let work = move || match found {
        Some(o) => {
            let opener = opened.repo.open_object(&rt, &o, opened.from.as_deref())?;
            let header = opener.header().clone();
            present(opener, &header, &key, Some(&o), json, plaintext)
        }
        None => {
            let opener = Opener::new(std::io::Cursor::new(raw), &*opened.keyring, &Expect::anything())
                .map_err(|e| e.during(format_args!("object {key}")))?;
            let header = opener.header().clone();
            present(opener.named(&key), &header, &key, None, json, plaintext)
        }
    };
    tokio::task::spawn_blocking(work).await.context(Kind::Other, "a worker thread broke off")?
}

/// A record of the log, or an orphan.
async fn unnamed(opened: &Opened, key: &str) -> Result<Bytes> {
    let stores: Vec<_> = opened.repo.stores().map(Arc::clone).collect();
    let mut last = None;
    for s in stores.iter().filter(|s| opened.from.as_deref().is_none_or(|f| f == s.name())) {
        match s.get(key).await {
            Ok(b) => return Ok(b),
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| Error::new(Kind::NotFound, format!("there is no object {key}"))))
}

fn present(
    mut plain: impl Read,
    header: &Header,
    key: &str,
    named: Option<&ObjectRef>,
    json: bool,
    plaintext: bool,
) -> Result<()> {
    let failed = |e| crate::merge::from_io(e).during(format_args!("object {key}"));
    if plaintext {
        let mut out = std::io::stdout().lock();
        let mut piece = vec![0; 256 << 10];
        loop {
            let n = plain.read(&mut piece).map_err(failed)?;
            if n == 0 {
                return out.flush().context(Kind::Other, "cannot write to standard output");
            }
            match out.write_all(&piece[..n]) {
                // Whoever reads has seen enough.
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                written => written.context(Kind::Other, "cannot write to standard output")?,
            }
        }
    }
    let plain_bytes = std::io::copy(&mut plain, &mut std::io::sink()).map_err(failed)?;
    let document = json!({"version": 1, "object": key, "id": header.object, "kind": header.kind,
        "codec": format!("{:?}", header.codec).to_lowercase(), "tenant_uid": header.tenant, "source_uid": header.source,
        "system_identifier": header.system_identifier.to_string(), "timeline": header.timeline,
        "lsn_start": header.lsn_start.to_string(), "lsn_end": header.lsn_end.to_string(),
        "key_version": header.key_version, "plain_bytes": plain_bytes, "authenticated": true,
        "bytes": named.map(|o| o.bytes), "rows": named.map(|o| o.rows), "sha256": named.map(|o| o.sha256.clone())});
    print(&document, json)
}
