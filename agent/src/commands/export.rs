//! `coffer export`: a tenant's rows as files, at the newest durable point unless another is named.

use super::restore::{self, RestoreArgs, class};
use crate::clock::parse_duration;
use crate::config::Config;
use crate::error::Result;
use crate::opened::Reserved;
use crate::restore::Mode;
use crate::restore::files::Format;
use crate::restore::keys::RowKey;
use coffer_wire::Class;
use std::time::Duration;

#[derive(clap::Args, Debug)]
pub struct ExportArgs {
    /// The tenant: the text of its tenant column
    #[arg(long, value_name = "KEY", required_unless_present = "reserved")]
    pub tenant: Option<String>,
    /// Rows of no tenant instead
    #[arg(long, value_enum, conflicts_with = "tenant")]
    pub reserved: Option<Reserved>,
    /// The point: an RFC 3339 time, an LSN, name:RESTORE_POINT, backup:ID, or latest
    #[arg(long, value_name = "WHEN", default_value = "latest")]
    pub to: String,
    /// The folder: absent or empty
    #[arg(long, value_name = "DIR")]
    pub target: String,
    #[arg(long, value_enum, default_value = "copy")]
    pub format: Format,
    /// Only this table (name or schema.name); may be repeated
    #[arg(long = "table", value_name = "TABLE")]
    pub tables: Vec<String>,
    /// Only the row of this --table with this key: a value, or a JSON object of the key's columns; may be repeated
    #[arg(long = "where-key", value_name = "KEY", requires = "tables")]
    pub keys: Vec<RowKey>,
    /// Only tables of this class: data, config, accounts, customization or audit; may be repeated
    #[arg(long = "class", value_name = "CLASS", value_parser = class)]
    pub classes: Vec<Class>,
    /// Read from this store alone, as it is
    #[arg(long, value_name = "STORE")]
    pub from: Option<String>,
    /// Wait this long for the point to become durable, for example 60s
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub wait: Option<Duration>,
    /// Leave values NULL that came with a row from another tenant and are not in this one's backup (exit code 9)
    #[arg(long)]
    pub allow_incomplete: bool,
    /// Count what would be written, per table; write nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Writes the files; the exit code. It changes no data, so it asks for no confirmation.
pub async fn run(config: &Config, source: Option<&str>, json: bool, args: &ExportArgs) -> Result<u8> {
    let args = RestoreArgs {
        tenant: args.tenant.clone(),
        reserved: args.reserved,
        to: Some(args.to.clone()),
        undo: None,
        mode: Some(Mode::Files),
        target: Some(args.target.clone()),
        format: args.format,
        tables: args.tables.clone(),
        keys: args.keys.clone(),
        classes: args.classes.clone(),
        other_key: None,
        tenant_column: None,
        roles: false,
        from: args.from.clone(),
        wait: args.wait,
        allow_incomplete: args.allow_incomplete,
        dry_run: args.dry_run,
        confirm: !args.dry_run,
    };
    restore::run(config, source, json, &args).await
}
