//! `coffer backup`: asks the running agent for a full backup of one tenant, through the same job as `coffer.backup()`.
//!
//! The point is a commit at the source, so the source is asked, and the agent that streams it does the work.

use super::progress::Progress;
use crate::config::Config;
use crate::dial;
use crate::dsn::Dsn;
use crate::error::{Context, Error, Kind, Result};
use crate::primary;
use crate::sql::{self, SqlClient, SqlContext};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

/// How often the job is looked at.
const POLL: Duration = Duration::from_millis(300);
/// An agent that has not reported for so long is taken for absent.
const SILENT: Duration = Duration::from_secs(30);
/// How often an absent agent is spoken of.
const REMIND: Duration = Duration::from_secs(10);

#[derive(clap::Args, Debug)]
pub struct BackupArgs {
    /// The tenant: the text of its tenant column
    #[arg(long, value_name = "KEY")]
    pub tenant: String,
    /// Why, for whoever reads the list later
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// manual, pre-migration, pre-maintenance, incident (held until released), compliance or archive (complete by itself)
    #[arg(long, value_name = "KIND", default_value = "manual",
        value_parser = ["manual", "pre-migration", "pre-maintenance", "incident", "compliance", "archive"])]
    pub kind: String,
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
}

/// Asks for a backup and, with `--wait`, waits for it.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &BackupArgs) -> Result<()> {
    dial::install_crypto_provider();
    let (name, source) = config.pick_source(source)?;
    let dsn = Dsn::parse(&source.url).map_err(|e| e.during(format_args!("[source.{name}] url")))?;
    // Nobody carries out what a primary that was left behind is asked for.
    let dsn = primary::newest(&dsn).await?;
    let client = sql::connect(&dsn.with_application_name("coffer backup")).await?;
    let row = client
        .query_one("SELECT coffer._agent_backup($1, $2, $3, $4)", &[&args.tenant, &args.reason, &args.kind, &actor()])
        .await
        .map_err(refused)?;
    let job: i64 = row.get(0);
    let backup = if args.wait { wait(&client, job, json).await? } else { Value::Null };
    let document = json!({"version": 1, "job": job, "source": name, "tenant": args.tenant, "backup": backup});
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let written = if json { writeln!(out, "{document}") } else { out.write_all(text(&document).as_bytes()) };
    written.context(Kind::Other, "cannot write to standard output")
}

/// Who asks: the operating system's user, as the environment names it.
fn actor() -> String {
    let user = ["USER", "LOGNAME"].iter().find_map(|v| std::env::var(v).ok().filter(|u| !u.is_empty()));
    match user {
        Some(u) => format!("coffer backup by {u}"),
        None => "coffer backup".to_owned(),
    }
}

/// What the source refused, with the exit code that the command line has for it.
fn refused(e: tokio_postgres::Error) -> Error {
    let (kind, said) = match e.as_db_error() {
        Some(db) if db.code().code() == "42704" => (Kind::NotFound, db),
        Some(db) if db.code().code() == "22023" => (Kind::Usage, db),
        _ => return sql::sql_error(e, "cannot ask for a backup"),
    };
    let error = Error::new(kind, said.message());
    match said.hint() {
        Some(h) => error.hint(h),
        None => error,
    }
}

/// Waits for the job; the backup that it made.
async fn wait(client: &SqlClient, job: i64, json: bool) -> Result<Value> {
    let progress = Progress::of_parts("backing up", json);
    let mut reminded: Option<Instant> = None;
    loop {
        let row = client
            .query_one(
                "SELECT j.state, j.progress, j.message, j.result, j.error, \
                 pg_catalog.date_part('epoch', coffer._silence())::float8 FROM coffer.jobs j WHERE j.job = $1",
                &[&job],
            )
            .await
            .sql("cannot look at the job")?;
        let (state, done, message): (&str, Option<f64>, Option<&str>) = (row.get(0), row.get(1), row.get(2));
        let result: Option<Value> = row.get(3);
        match state {
            "done" => return Ok(result.unwrap_or(Value::Null)),
            "failed" => return Err(failure(job, result.as_ref(), row.get::<_, Option<&str>>(4))),
            "cancelled" => {
                return Err(Error::new(Kind::Refused, format!("job {job} was cancelled")).code("cancelled"));
            }
            _ => progress.part(done.unwrap_or(0.0), message.unwrap_or(state)),
        }
        let silent = row.get::<_, Option<f64>>(5).is_none_or(|s| s > SILENT.as_secs_f64());
        if silent && reminded.is_none_or(|t| t.elapsed() > REMIND) {
            reminded = Some(Instant::now());
            tracing::warn!("job {job} is {state}, and no agent has reported for 30 s: is `coffer run` running?");
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The error that the agent met, with its exit code.
fn failure(job: i64, result: Option<&Value>, said: Option<&str>) -> Error {
    let said = said.unwrap_or("the job does not say why");
    let (message, hint) = said.split_once("\nhint: ").unwrap_or((said, ""));
    let exit = result.and_then(|r| r["error"]["exit"].as_u64()).unwrap_or(1);
    let kind = Kind::ALL.into_iter().find(|k| u64::from(k.exit_code()) == exit).unwrap_or(Kind::Other);
    let error = Error::new(kind, format!("job {job}: {message}"));
    if hint.is_empty() { error } else { error.hint(hint) }
}

fn text(d: &Value) -> String {
    let s = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let (job, b) = (&d["job"], &d["backup"]);
    if b.is_null() {
        return format!("job {job} is queued; SELECT * FROM coffer.wait({job}) waits for it\n");
    }
    format!(
        "backup {} of tenant {} at {} ({}), {} rows, {} new bytes\n",
        s(&b["id"]),
        s(&d["tenant"]),
        s(&b["point_time"]),
        s(&b["point_lsn"]),
        b["rows"],
        b["bytes"]
    )
}
