//! A restore from beginning to end: the target is resolved, the tenant's inputs are gathered, and the rows go where they
//! were asked for. The command line and the agent's jobs both come through here.

use super::database::{Beside, NewDatabase};
use super::files::{Files, Format};
use super::in_place::compare::{self, CoveredTable, TargetSink};
use super::in_place::{InPlace, Options};
use super::keys;
use super::large_objects::{self, Found, LargeObjects};
use super::large_takers;
use super::moment;
use super::once::Note;
use super::rename::Rename;
use super::request::{Means, Mode, Place, Report, Request, TableReport};
use super::side::{self, SideBySide};
use super::sink::{Counts, Filter, Selected, Selection, Watch};
use super::wide::line_to_compare;
use crate::accounts::Roles;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::failpoints;
use crate::history::{History, Target};
use crate::lease::Lease;
use crate::merge::{Holes, Image, MergeStats, RowSink, TenantAt};
use crate::opened::{Opened, Reserved};
use crate::tenant::Tenant;
use coffer_wire::{Class, Relation, TenantKind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::runtime::Handle;
use uuid::Uuid;

/// What came of the rows.
#[derive(Default)]
struct Outcome {
    tables: Vec<TableReport>,
    bytes: u64,
    undo: Option<String>,
    warnings: Vec<String>,
    incomplete: u64,
    large_objects: Option<Found>,
}

impl Outcome {
    fn with(mut self, large_objects: Option<Found>) -> Self {
        self.warnings.extend(large_objects.iter().flat_map(Found::warnings));
        Self { large_objects, ..self }
    }
}

/// Restores.
///
/// # Errors
/// `OutsideWindow`: the target cannot be restored to. `Refused`: the place is taken, or the rows do not fit; nothing was
/// changed. Code `cancelled`: [`Watch::cancel`] was called in time; nothing was changed.
pub async fn run(means: &Means<'_>, request: &Request) -> Result<Report> {
    leased(means, request, restore(means, request)).await
}

/// Does the work with leases on what the request reads: it is not removed meanwhile.
pub(super) async fn leased<T>(
    means: &Means<'_>,
    request: &Request,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let (repo, source) = (&means.opened.repo, means.source.1);
    let mut tenants = vec![means.opened.tenant(means.source, &request.tenant).await?.uid];
    if matches!(request.place, Place::Database(_)) {
        tenants.push(means.opened.keyring.tenant_uid(source, &Reserved::Shared.tenant()));
    }
    let mut leases = Vec::new();
    for tenant in tenants {
        leases.push(Lease::take(repo, source, tenant).await?);
    }
    let done = work.await;
    for lease in leases {
        lease.release().await;
    }
    done
}

async fn restore(means: &Means<'_>, request: &Request) -> Result<Report> {
    let started = Instant::now();
    request.place.require_free().await?;
    let (opened, source) = (means.opened, means.source.1);
    let Prepared { uid, mut history, target, at, selection } = Prepared::new(means, request).await?;
    let counts = Counts::watched(means.watch.clone());
    let schema = match &request.place {
        Place::Schema { name, .. } => {
            Some(name.clone().unwrap_or_else(|| side::default_name(&request.tenant, &target, request.job)))
        }
        _ => None,
    };
    let report = Report {
        dry_run: request.dry_run,
        source: means.source.0.to_owned(),
        tenant: request.tenant.clone(),
        mode: request.place.mode(),
        renamed: request.rename.as_ref().map(|r| r.key.clone()),
        schema: schema.clone(),
        target: target.clone(),
        tables: Vec::new(),
        bytes: 0,
        seconds: 0.0,
        undo: None,
        undo_until_us: None,
        warnings: Vec::new(),
        incomplete: 0,
        large_objects: None,
    };
    let note = request.job.filter(|_| !request.dry_run).map(|job| Note::new(job, report.clone(), started));
    let no_tables = at.inputs.tables.is_empty();
    // A copy beside the live rows refers to the objects that are there.
    let objects = match &request.place {
        Place::Schema { .. } => None,
        _ => LargeObjects::of(&history, uid, &target, &at, &selection, &means.watch).await?,
    };
    let mut rows = Rows { at, selection, objects };
    let done = match &request.place {
        Place::InPlace(dsn) => {
            let whose = request.written_tenant();
            let uid = if request.rename.is_some() { opened.keyring.tenant_uid(source, &whose) } else { uid };
            in_place(dsn, rows, (&whose, uid), request, note.as_ref(), &means.watch).await?
        }
        Place::Schema { dsn, name: None, .. } if request.dry_run => {
            side::require_absent(dsn, schema.as_deref().unwrap_or_default()).await?;
            count(rows, counts).await?
        }
        Place::Schema { .. } | Place::Files { .. } | Place::Database(_) if request.dry_run => {
            count(rows, counts).await?
        }
        Place::Files { dir, format } => {
            let roles = roles(opened, &history, uid, &target, request).await?;
            to_files((dir.clone(), *format), rows, counts, (&target, roles)).await?
        }
        Place::Schema { dsn, readers, .. } => {
            let (name, source) = (schema.as_deref().unwrap_or_default(), means.source.0);
            to_schema((dsn, name, readers), rows, request, note.as_ref(), counts, (&target, source)).await?
        }
        Place::Database(dsn) => {
            let (shared, left_out) = shared(opened, source, &mut history, &target, &rows.at).await?;
            let of_shared = match &shared {
                Some((uid, s)) => {
                    // A choice of rows is of the tenant's.
                    let all = Selection { classes: request.classes.clone(), ..Selection::default() };
                    LargeObjects::of(&history, *uid, &target, s, &all, &means.watch).await?
                }
                None => None,
            };
            let beside = Beside {
                large_objects: of_shared.into_iter().chain(rows.objects.take()).collect(),
                sequences: history.sequences(&target).await?,
                settings: history.database_settings(&target).to_vec(),
                roles: roles(opened, &history, uid, &target, request).await?,
            };
            let mut done = to_database(dsn.clone(), (shared.map(|s| s.1), rows), beside, request, counts).await?;
            done.warnings.extend(left_out);
            done
        }
    };
    let mut warnings = done.warnings;
    if no_tables {
        warnings.push(format!(
            "no table of tenant {} is covered at {}: nothing of it is there",
            request.tenant, target.asked
        ));
    }
    let found: u64 = done.tables.iter().map(|t| t.inserted).sum();
    if request.place.mode() != Mode::InPlace && found < request.keys.len() as u64 {
        warnings.push(format!(
            "{} of {} keys have no row at the target",
            request.keys.len() as u64 - found,
            request.keys.len()
        ));
    }
    Ok(Report {
        tables: done.tables,
        bytes: done.bytes,
        seconds: started.elapsed().as_secs_f64(),
        undo: done.undo,
        undo_until_us: None,
        warnings,
        incomplete: done.incomplete,
        large_objects: done.large_objects,
        ..report
    })
}

/// What a restore is of.
struct Rows {
    at: TenantAt,
    selection: Selection,
    /// That the rows refer to.
    objects: Option<LargeObjects>,
}

/// A target that can be restored to, and the tenant there.
pub(super) struct Prepared {
    /// The tenant's.
    pub uid: Uuid,
    pub history: History,
    pub target: Target,
    pub at: TenantAt,
    pub selection: Selection,
}

impl Prepared {
    pub async fn new(means: &Means<'_>, request: &Request) -> Result<Self> {
        keys::require_one_table(&request.keys, request.tables.len())?;
        let opened = means.opened;
        let uid = opened.tenant(means.source, &request.tenant).await?.uid;
        let (history, target) = moment::find(means, request, uid).await?;
        if request.wait.is_some() {
            // The first row of a shared table may have come meanwhile, and with it the key of such rows.
            opened.keyring.refresh().await?;
        }
        let tables = history.require(&target, uid, &|qualified| wanted(&request.tables, qualified))?;
        if tables.is_empty() && !request.tables.is_empty() {
            let what = format!("tenant {} has no covered table at {}", request.tenant, target.asked);
            return Err(Error::new(Kind::NotFound, what).hint("`coffer list` shows the tables of a tenant"));
        }
        if !request.keys.is_empty() && tables.len() != 1 {
            let names: Vec<_> = tables.iter().map(|t| t.name.as_str()).collect();
            return Err(Error::usage(format!(
                "--where-key goes with one table, and --table means {}",
                names.join(", ")
            )));
        }
        let inputs = Arc::new(history.inputs(uid, target.lsn, tables).await?);
        let at = TenantAt {
            repo: opened.repo.clone(),
            rt: Handle::current(),
            tenant: request.tenant.clone(),
            inputs,
            from: opened.from.clone(),
            scratch: means.scratch.clone(),
            memory: means.memory,
            holes: if request.allow_incomplete { Holes::Null } else { Holes::Refuse },
            seen: None,
        };
        failpoints::hit(failpoints::RESTORE_AFTER_INPUTS)?;
        let rename = match &request.rename {
            Some(r) if request.tenant.kind != TenantKind::Normal || r.key == request.tenant.key => {
                return Err(Error::usage(format!("--as: '{}' is no other tenant's key", r.key)));
            }
            Some(r) => Some(Rename::new(&request.tenant.key, r).await?),
            None => None,
        };
        Ok(Self { uid, history, target, at, selection: request.selection(rename) })
    }
}

/// Whether a table is asked for: `name`, `schema.name`, or as SQL quotes it.
pub(super) fn wanted(asked: &[String], qualified: &str) -> bool {
    let plain = unquoted(qualified);
    asked.is_empty()
        || asked
            .iter()
            .any(|a| a == qualified || *a == plain || plain.rsplit_once('.').is_some_and(|(_, name)| a == name))
}

/// `"S"."t"` as `S.t`.
fn unquoted(qualified: &str) -> String {
    let mut out = String::with_capacity(qualified.len());
    let mut chars = qualified.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '"' {
            out.push(c);
        } else if chars.peek() == Some(&'"') {
            out.push('"');
            chars.next();
        }
    }
    out
}

pub(super) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f).await.context(Kind::Other, "a worker thread broke off")?
}

pub(super) fn counted(counts: &Counts) -> Vec<TableReport> {
    let row = |t: &super::TableRows| TableReport {
        relation: t.rel.qualified(),
        inserted: t.rows,
        updated: 0,
        deleted: 0,
        unchanged: 0,
    };
    counts.tables.iter().map(row).collect()
}

fn warnings_of(stats: &[MergeStats], warnings: &mut Vec<String>) -> u64 {
    let sum = |f: fn(&MergeStats) -> u64| stats.iter().map(f).sum::<u64>();
    let (incomplete, duplicates) = (sum(|s| s.incomplete), sum(|s| s.duplicates));
    if incomplete > 0 {
        warnings
            .push(format!("{incomplete} rows came from another tenant with values that are not in this backup: NULL"));
    }
    if duplicates > 0 {
        warnings.push(format!("{duplicates} rows of a base had the key of another row: the source's index is damaged"));
    }
    incomplete
}

/// Without --confirm: reads everything and counts.
async fn count(rows: Rows, mut counts: Counts) -> Result<Outcome> {
    let Rows { at, selection, objects } = rows;
    let (stats, counts, found) = blocking(move || {
        let stats = at.read(&mut Selected::new(&selection, None, &mut counts))?;
        let found = objects.map(|o| o.give(&mut large_objects::Count)).transpose()?;
        Ok((stats, counts, found))
    })
    .await?;
    let mut report = Outcome { tables: counted(&counts), bytes: counts.bytes, ..Outcome::default() };
    report.incomplete = warnings_of(&[stats], &mut report.warnings);
    Ok(report.with(found))
}

/// The tenant's roles at the target, unless the restore is of other classes.
async fn roles(
    opened: &Opened,
    history: &History,
    tenant: Uuid,
    target: &Target,
    request: &Request,
) -> Result<Option<Roles>> {
    if !request.classes.is_empty() && !request.classes.contains(&Class::Accounts) {
        return Ok(None);
    }
    let Some(object) = history.roles(tenant, target) else { return Ok(None) };
    let plain = opened.repo.open_small(object, opened.from.as_deref()).await?;
    let roles = Roles::decode(&plain).map_err(|e| e.during(format_args!("object {}", object.path)))?;
    Ok((!roles.roles.is_empty()).then_some(roles))
}

async fn to_files(
    (dir, format): (PathBuf, Format),
    Rows { at, selection, objects }: Rows,
    mut counts: Counts,
    (target, roles): (&Target, Option<Roles>),
) -> Result<Outcome> {
    let target = target.clone();
    let key = match &selection.rename {
        Some(r) => r.key().to_owned(),
        None => at.tenant.key.clone(),
    };
    let (stats, counts, found) = blocking(move || {
        let mut files = Files::create(&dir, format)?;
        let stats = at.read(&mut Selected::new(&selection, Some(&mut files), &mut counts))?;
        let found = files.large_objects(objects.as_ref())?;
        files.finish(&key, &target, roles.as_ref())?;
        Ok((stats, counts, found))
    })
    .await?;
    let mut report = Outcome { tables: counted(&counts), bytes: counts.bytes, ..Outcome::default() };
    report.incomplete = warnings_of(&[stats], &mut report.warnings);
    Ok(report.with(found))
}

async fn to_schema(
    (dsn, name, readers): (&Dsn, &str, &[String]),
    rows: Rows,
    request: &Request,
    note: Option<&Note>,
    counts: Counts,
    (target, source): (&Target, &str),
) -> Result<Outcome> {
    let (Rows { at, selection, .. }, mut warnings) = (rows, Vec::new());
    warnings.extend(at.inputs.schema_warning.as_ref().map(|w| format!("{w}: indexes may differ")));
    let done = SideBySide {
        dsn,
        name,
        readers,
        definitions: at.inputs.schema.clone(),
        rows: at,
        tables: &request.tables,
        selection,
        counts,
        target,
        source,
        note,
        spool: std::env::temp_dir(),
    }
    .run()
    .await?;
    let mut report = Outcome {
        tables: counted(&done.counts),
        bytes: done.counts.bytes,
        warnings: warnings.into_iter().chain(done.warnings).collect(),
        ..Outcome::default()
    };
    report.incomplete = warnings_of(&done.stats, &mut report.warnings);
    Ok(report)
}

/// The shared tables at the same point, when there are any; and a warning for each that there may be and that is not known.
pub(super) async fn shared(
    opened: &Opened,
    source: Uuid,
    history: &mut History,
    target: &Target,
    at: &TenantAt,
) -> Result<(Option<(Uuid, TenantAt)>, Vec<String>)> {
    let tenant = Reserved::Shared.tenant();
    if at.tenant == tenant {
        return Ok((None, Vec::new()));
    }
    let left_out = |(name, why): (String, String)| format!("{name}: if it is shared, its rows are left out: {why}");
    let warnings =
        history.unknown(target, opened.keyring.tenant_uid(source, &tenant)).into_iter().map(left_out).collect();
    let Some(entry) = opened.keyring.find(source, &tenant) else { return Ok((None, warnings)) };
    // Which tables are shared is known from the rows alone; what is not known at the target is the tenant's, or was asked
    // for and refused before.
    history.load_catalog(entry.uid).await?;
    let inputs = Arc::new(history.inputs(entry.uid, target.lsn, history.known(target)).await?);
    Ok((Some((entry.uid, TenantAt { tenant, inputs, ..at.clone() })), warnings))
}

async fn to_database(
    dsn: Box<Dsn>,
    (shared, Rows { at, selection, .. }): (Option<TenantAt>, Rows),
    mut beside: Beside,
    request: &Request,
    counts: Counts,
) -> Result<Outcome> {
    let inputs = at.inputs.clone();
    if let Some(w) = &inputs.schema_warning
        && inputs.schema.is_some()
    {
        // Never a table of another moment's shape.
        return Err(Error::new(Kind::Refused, format!("{w}: a new database would have the wrong ones"))
            .code("definitions_unknown")
            .hint("wait for them with --wait 60s, choose a point after the change was archived, or use --mode files"));
    }
    let schema = inputs.schema.clone().ok_or_else(|| {
        Error::new(Kind::Refused, "the bases up to the target hold no definitions: a new database cannot be made")
            .code("no_schema")
            .hint("choose a later point or use --mode files; `coffer run` archives definitions with pg_dump, its log says why it could not")
    })?;
    let mut warnings = Vec::new();
    if let Some(r) = beside.roles.take_if(|_| !request.roles) {
        let names = r.roles.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        warnings.push(format!(
            "the tenant's roles are archived and were left alone ({names}): add --roles, or see roles.sql of --mode files"
        ));
    } else if request.roles && beside.roles.is_none() {
        warnings.push("no roles are archived for this tenant at the target: coffer.add_role() ties some to it".into());
    }
    let done = NewDatabase {
        dsn: *dsn,
        // A choice of tables is of the tenant's; the shared ones come whole, as its rows refer to them.
        rows: shared.into_iter().chain([at]).collect(),
        selection,
        schema,
        beside,
        spool: std::env::temp_dir(),
        counts,
    }
    .run()
    .await?;
    let mut report = Outcome {
        tables: counted(&done.counts),
        bytes: done.counts.bytes,
        warnings: warnings.into_iter().chain(done.warnings).collect(),
        ..Outcome::default()
    };
    report.incomplete = warnings_of(&done.stats, &mut report.warnings);
    Ok(report.with(done.large_objects))
}

/// The merge as the restore in place wants it.
pub(super) struct Merged {
    at: TenantAt,
    covered: Vec<CoveredTable>,
    watch: Watch,
    selection: Selection,
    /// Of the last reading.
    stats: Mutex<MergeStats>,
}

struct Adapter<'a> {
    to: &'a mut dyn TargetSink,
    watch: &'a Watch,
    selection: &'a Selection,
    /// Of the table at hand.
    filter: Filter,
}

impl RowSink for Adapter<'_> {
    fn begin_table(&mut self, rel: &Arc<Relation>) -> Result<()> {
        self.filter = self.selection.of_table(rel)?;
        self.to.begin_table(rel)
    }

    fn row(&mut self, key: &[u8], image: &Image<'_>) -> Result<()> {
        self.watch.row()?;
        let to = &mut *self.to;
        self.filter.row(key, image, &mut |key, image| match image.as_line() {
            Some(line) => to.row(key, line),
            None => to.row(key, &line_to_compare(image)?),
        })?;
        Ok(())
    }

    fn end_table(&mut self) -> Result<()> {
        self.to.end_table()
    }
}

impl compare::Target for Merged {
    fn rows(&self, sink: &mut dyn TargetSink) -> Result<()> {
        let (watch, selection) = (&self.watch, &self.selection);
        let stats = self.at.read(&mut Adapter { to: sink, watch, selection, filter: Filter::default() })?;
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        Ok(())
    }

    fn covered(&self) -> &[CoveredTable] {
        &self.covered
    }
}

/// What of the live tables a request is about.
pub(super) fn options(request: &Request) -> Options {
    Options {
        dry_run: request.dry_run,
        tables: request.tables.clone(),
        classes: request.classes.clone(),
        keys: request.keys.clone(),
        new_tenant: request.rename.is_some(),
    }
}

/// The tenant at the target, to be compared with live rows. `memory`: bytes for the merge.
pub(super) fn merged(at: TenantAt, memory: usize, selection: Selection, watch: &Watch) -> Arc<Merged> {
    let covered = at.inputs.tables.iter().map(|t| CoveredTable { relid: t.relid, name: t.name.clone() }).collect();
    Arc::new(Merged {
        at: TenantAt { memory, ..at },
        covered,
        watch: watch.clone(),
        selection,
        stats: Mutex::default(),
    })
}

async fn in_place(
    dsn: &Dsn,
    Rows { at, selection, objects }: Rows,
    (tenant, uid): (&Tenant, Uuid),
    request: &Request,
    note: Option<&Note>,
    watch: &Watch,
) -> Result<Outcome> {
    let (scratch, memory, options) = (at.scratch.clone(), at.memory / 2, options(request));
    let rows = merged(at, memory, selection, watch);
    let target = rows.clone();
    let restore = InPlace { dsn, tenant, uid, target, scratch: &scratch, memory, options: &options, note, watch };
    let session = restore.session().await?;
    // Before the rows that refer to them.
    let made = match objects {
        Some(o) => Some(large_takers::into_live(dsn, &session, o, request.dry_run).await?),
        None => None,
    };
    let (done, found) = match (restore.run(&session).await, made) {
        (Ok(done), made) => (done, made.map(|m| m.found)),
        (Err(e), Some(m)) if !e.is_code("commit_unknown") => {
            return Err(match m.take_back(&session).await {
                Ok(()) => e,
                Err(left) => e.hint(format!("large objects that were made for the rows are left behind: {left}")),
            });
        }
        (Err(e), _) => return Err(e),
    };
    let mut outcome = Outcome {
        tables: done.tables,
        bytes: done.bytes,
        undo: done.undo,
        warnings: done.warnings,
        ..Outcome::default()
    };
    let stats = rows.stats.lock().unwrap_or_else(PoisonError::into_inner).clone();
    outcome.incomplete = warnings_of(&[stats], &mut outcome.warnings);
    Ok(outcome.with(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_named_as_people_do() {
        let asked = |a: &str, q: &str| wanted(&[a.to_owned()], q);
        assert!(wanted(&[], "public.a"));
        assert!(asked("a", "public.a") && asked("public.a", "public.a"));
        assert!(
            asked("S.My \"t\"", "\"S\".\"My \"\"t\"\"\"") && asked("\"S\".\"My \"\"t\"\"\"", "\"S\".\"My \"\"t\"\"\"")
        );
        assert!(!asked("b", "public.a") && !asked("other.a", "public.a") && !asked("ublic.a", "public.a"));
    }
}
