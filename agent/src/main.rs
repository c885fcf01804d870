//! The `coffer` binary: parse, load, run the verb, report the error once.

use clap::Parser;
use coffer::cli::{self, Cli, Verb};
use coffer::commands;

use coffer::error::{Context, Kind, Result};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let code = if e.use_stderr() { Kind::Usage.exit_code() } else { 0 };
            // A closed pipe is the only way that printing can fail; there is nobody left to tell.
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    start_logging(&cli);
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            if cli.json {
                println!("{}", e.to_json());
            } else {
                eprintln!("{}", e.report());
            }
            ExitCode::from(e.kind().exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.verb {
        Verb::Demo(args) => commands::demo::run(args),
        Verb::Completions { shell } => {
            cli::completions(*shell);
            Ok(())
        }
        Verb::Man => cli::man().context(Kind::Other, "cannot print the manual"),
    }
}

/// Logs go to standard error: text for a terminal, JSON lines otherwise.
fn start_logging(cli: &Cli) {
    use std::io::IsTerminal;
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => "error",
        (_, 0) => "warn,coffer=info",
        (_, 1) => "info,coffer=debug",
        _ => "debug,coffer=trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("COFFER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    if std::io::stderr().is_terminal() {
        builder.init();
    } else {
        builder.json().flatten_event(true).init();
    }
}
