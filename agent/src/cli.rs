//! The command line: flags become values here, `main` reads top to bottom.

use crate::commands;
use clap::{CommandFactory, Parser, Subcommand};
use std::path::PathBuf;

/// Continuous, encrypted, per-tenant backup of PostgreSQL
///
/// `coffer run` is the sidecar that streams, encrypts and ships; the other verbs look at the repository and restore
/// from it. Exit codes: 0 done, 1 other, 2 usage, 3 not found, 4 outside the recovery window, 5 verification or
/// authentication failed, 6 fenced or locked, 7 wrong or missing key, 8 store or server unreachable, 9 partly done,
/// 10 refused and nothing changed, 11 unhealthy.
#[derive(Parser, Debug)]
#[command(name = "coffer", version, max_term_width = 110, disable_help_subcommand = true)]
pub struct Cli {
    /// The configuration
    #[arg(long, global = true, env = "COFFER_CONFIG", default_value = crate::config::DEFAULT_PATH, value_name = "FILE")]
    pub config: PathBuf,
    /// The [source.NAME] to act on; needed when several are configured
    #[arg(long, global = true, value_name = "NAME")]
    pub source: Option<String>,
    /// Print one JSON document (JSON lines for streams); logs and progress go to standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Only errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// More about what is done; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Create the repository and the keyring; refuses to touch existing ones
    Init {
        /// Make the key-encryption key's file too (32 random bytes, base64, mode 0600)
        #[arg(long)]
        create_kek: bool,
    },
    /// The sidecar: stream, encrypt, ship, take bases; until SIGTERM
    Run,
    /// What the agent is doing, and how far it is; exit code 11 when something needs attention
    Status,
    /// Every precondition, with the statement or the setting that repairs it; exit code 11 when one is not met
    Doctor,
    /// A full backup of one tenant, as of now, made by the running agent; kept by its kind
    Backup(commands::backup::BackupArgs),
    /// Bring one tenant back to a point: into the live database, a new one, or files
    Restore(commands::restore::RestoreArgs),
    /// What changed of a tenant since a point, per table and per row; changes nothing
    Diff(commands::diff::DiffArgs),
    /// A tenant's rows as files, at the newest durable point or another
    Export(commands::export::ExportArgs),
    /// Tenants, what each can be restored to, and its backups
    List(commands::list::ListArgs),
    /// One backup, or one object of a store
    Show(commands::show::ShowArgs),
    /// Make a synthetic full of each tenant: restores begin there, and read fewer objects. Reads nothing from the database
    Compact(commands::compact::CompactArgs),
    /// Read back and authenticate everything that the log names; exit code 5 or 7 when something is not as written
    Verify(commands::verify::VerifyArgs),
    /// What retention keeps and what goes, with a reason for each; removes with --confirm
    Prune(commands::prune::PruneArgs),
    /// Keep what a tenant's points of a span are restored from, whatever the retention policy says
    Hold(commands::hold::HoldArgs),
    /// End a hold
    Release(commands::hold::ReleaseArgs),
    /// A private cluster, real traffic, a disaster, one tenant restored to a point in time, proof
    Demo(commands::demo::DemoArgs),
    /// Print a completion script for a shell
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff; `coffer man | man -l -`)
    Man,
}

/// Writes a completion script to standard output.
pub fn completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "coffer", &mut std::io::stdout());
}

/// Writes the manual: the page of `coffer`, then one section per verb.
pub fn man() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let command = Cli::command();
    clap_mangen::Man::new(command.clone()).render(&mut out)?;
    for verb in command.get_subcommands() {
        clap_mangen::Man::new(verb.clone().bin_name(format!("coffer {}", verb.get_name()))).render(&mut out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
