//! `coffer hold` and `coffer release`: legal holds on what a tenant can be restored to.

use crate::catalog::{self, Catalog, Entry, Hold};
use crate::clock::rfc3339;
use crate::config::Config;
use crate::crypto::random;
use crate::error::{Context, Error, Kind, Result};
use crate::history::When;
use crate::jobs::HOLDER;
use crate::opened::Opened;
use crate::tenant::Tenant;
use serde_json::{Value, json};
use uuid::Uuid;

/// Longest reason.
const REASON_BYTES: usize = 4096;

#[derive(clap::Args, Debug)]
pub struct HoldArgs {
    /// The tenant
    #[arg(long, value_name = "KEY")]
    pub tenant: String,
    /// Why; it is shown wherever the hold is
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
    /// Keep what points from here on are restored from; without it, from the beginning
    #[arg(long, value_name = "WHEN")]
    pub from: Option<When>,
    /// Up to here; without it, whatever comes is held, too
    #[arg(long, value_name = "WHEN")]
    pub to: Option<When>,
}

#[derive(clap::Args, Debug)]
pub struct ReleaseArgs {
    /// The hold's id as `coffer list` shows it, or the number that coffer.hold() gave it; or the id of an incident's backup
    #[arg(value_name = "HOLD")]
    pub hold: String,
    /// Look only at this tenant
    #[arg(long, value_name = "KEY")]
    pub tenant: Option<String>,
}

/// Places a hold.
pub async fn hold(config: &Config, source: Option<&str>, json: bool, args: &HoldArgs) -> Result<()> {
    let reason = args.reason.trim();
    if reason.is_empty() || reason.len() > REASON_BYTES {
        return Err(Error::usage(format!("--reason: between 1 and {REASON_BYTES} bytes of text")));
    }
    let opened = Opened::for_writing(config).await?;
    let (name, uid) = opened.source(config, source).await?;
    let tenant = opened.tenant((&name, uid), &Tenant::normal(&args.tenant)).await?;
    let from_us = time_of(&opened, uid, args.from.as_ref()).await?;
    let to_us = time_of(&opened, uid, args.to.as_ref()).await?;
    if let (Some(from), Some(to)) = (from_us, to_us)
        && from > to
    {
        return Err(Error::usage(format!("--from {} is after --to {}", rfc3339(from), rfc3339(to))));
    }
    let hold = Hold {
        id: random::uuid(),
        number: 0,
        reason: reason.to_owned(),
        from_us,
        to_us,
        by: actor(),
        at_us: opened.repo.clock().now_us(),
        n: 0,
        until_us: None,
    };
    place(&opened, uid, tenant.uid, &hold).await?;
    let mut document = to_json(&hold);
    document["version"] = json!(1);
    document["source"] = json!(name);
    document["tenant"] = json!(args.tenant);
    let text = format!("hold {} on tenant {}: {}", hold.id, args.tenant, described(&hold));
    print(&document, &text, json)
}

/// Records a hold in the tenant's catalog.
pub async fn place(opened: &Opened, source: Uuid, tenant: Uuid, hold: &Hold) -> Result<()> {
    let mut catalog = Catalog::open(&opened.repo, source, tenant, None).await?;
    let Hold { id, number, reason, from_us, to_us, by, until_us, .. } = hold.clone();
    catalog.append(Entry::Hold { id, number, reason, from_us, to_us, by, until_us }).await.map(drop)
}

/// Ends a hold.
pub async fn release(config: &Config, source: Option<&str>, json: bool, args: &ReleaseArgs) -> Result<()> {
    let asked = Asked::parse(&args.hold)?;
    let opened = Opened::for_writing(config).await?;
    let mut found = Vec::new();
    for (name, uid) in opened.sources(source).await? {
        let tenants: Vec<Uuid> = match &args.tenant {
            Some(key) => vec![opened.tenant((&name, uid), &Tenant::normal(key)).await?.uid],
            None => catalog::tenants(&opened.repo, uid, None).await?.into_keys().collect(),
        };
        for tenant in tenants {
            let catalog = Catalog::open(&opened.repo, uid, tenant, None).await?;
            let ids: Vec<Uuid> = asked.matches(&catalog);
            found.extend(ids.into_iter().map(|id| (name.clone(), uid, tenant, id)));
        }
    }
    let (name, uid, tenant, id) = match found.as_slice() {
        [one] => one,
        [] => {
            return Err(Error::new(Kind::NotFound, format!("there is no hold {}", args.hold))
                .hint("`coffer list` shows the holds of each tenant"));
        }
        _ => {
            return Err(Error::usage(format!("{} is the number of several holds", args.hold))
                .hint("name the hold by its id, which `coffer list` shows, or add --source"));
        }
    };
    let mut catalog = Catalog::open(&opened.repo, *uid, *tenant, None).await?;
    // Somebody else may have released it meanwhile; then it is released, which is all that was asked for.
    catalog.append_if(Entry::Release { id: *id, by: actor() }, |s| asked.is_standing(s, *id)).await?;
    let key = opened.keyring.by_uid(*tenant).map(|t| t.tenant.key);
    let document = json!({"version": 1, "source": name, "tenant": key, "released": id});
    let text = format!("released {id} on tenant {}", key.unwrap_or_else(|| tenant.to_string()));
    print(&document, &text, json)
}

/// How a hold is named.
enum Asked {
    Id(Uuid),
    Number(i64),
}

impl Asked {
    fn parse(text: &str) -> Result<Self> {
        let number = text.parse().ok().filter(|n| *n > 0).map(Self::Number);
        number.or_else(|| Uuid::try_parse(text).ok().map(Self::Id)).ok_or_else(|| {
            Error::usage(format!("'{text}' is neither a hold's id nor its number")).hint("`coffer list` shows them")
        })
    }

    fn matches(&self, catalog: &Catalog) -> Vec<Uuid> {
        let state = catalog.state();
        match self {
            Self::Number(n) => state.holds.iter().filter(|h| h.number == *n).map(|h| h.id).collect(),
            Self::Id(id) if self.is_standing(state, *id) => vec![hold_of_incident(state, *id).unwrap_or(*id)],
            Self::Id(_) => Vec::new(),
        }
    }

    fn is_standing(&self, state: &catalog::State, id: Uuid) -> bool {
        let incident = |id| state.full(id).is_some_and(|f| f.trigger == "incident") && !state.released.contains(&id);
        state.holds.iter().any(|h| h.id == id) || incident(id)
    }
}

/// The hold that came with an incident's backup, while it stands: releasing it releases the backup.
fn hold_of_incident(state: &catalog::State, backup: Uuid) -> Option<Uuid> {
    let at = Some(state.full(backup).filter(|f| f.trigger == "incident")?.point_time_us);
    let own = |h: &&Hold| (h.from_us, h.to_us) == (at, at) && h.by.starts_with(HOLDER);
    state.holds.iter().find(own).map(|h| h.id)
}

/// A point as a time.
async fn time_of(opened: &Opened, source: Uuid, when: Option<&When>) -> Result<Option<i64>> {
    match when {
        None => Ok(None),
        // It may lie in the future, or before everything.
        Some(When::Time(us)) => Ok(Some(*us)),
        Some(when) => Ok(Some(opened.history(source).await?.resolve(when).await?.time_us)),
    }
}

/// A hold as documents have it.
pub fn to_json(h: &Hold) -> Value {
    json!({"hold": h.id, "number": (h.number > 0).then_some(h.number), "reason": h.reason, "from": h.from_us.map(rfc3339),
        "to": h.to_us.map(rfc3339), "by": h.by, "at": rfc3339(h.at_us), "until": h.until_us.map(rfc3339)})
}

/// The same in words.
pub fn described(h: &Hold) -> String {
    let end = |us: Option<i64>, none: &str| us.map_or_else(|| none.to_owned(), rfc3339);
    format!("from {} to {}: {} ({})", end(h.from_us, "the beginning"), end(h.to_us, "whatever comes"), h.reason, h.by)
}

/// Who calls: the account of the operating system.
pub fn actor() -> String {
    let name = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|v| std::env::var(v).ok()).filter(|n| !n.is_empty());
    format!("{}@command-line", name.unwrap_or_else(|| "unknown".to_owned()))
}

fn print(document: &Value, text: &str, json: bool) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let written = if json { writeln!(out, "{document}") } else { writeln!(out, "{text}") };
    written.context(Kind::Other, "cannot write to standard output")
}
