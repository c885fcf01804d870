//! The `coffer` binary: parse, load, run the verb, report the error once.

use clap::Parser;
use coffer::cli::{self, Cli, Verb};
use coffer::commands;

use coffer::config::Config;
use coffer::error::{Context, Error, Kind, Result};
use std::process::ExitCode;

fn main() -> ExitCode {
    coffer::allocator::bound();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let code = if e.use_stderr() { Kind::Usage.exit_code() } else { 0 };
            // Nothing was parsed, so the flag is looked for by hand: whoever asked for JSON gets it for this error too.
            if e.use_stderr() && std::env::args().any(|a| a == "--json") {
                let text = e.render().to_string();
                println!("{}", Error::usage(text.trim_start_matches("error: ").trim_end()).to_json());
            } else {
                // A closed pipe is the only way that printing can fail; there is nobody left to tell.
                let _ = e.print();
            }
            return ExitCode::from(code);
        }
    };
    start_logging(&cli);
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
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

/// Runs the verb; the exit code of what ended well, which for a report of ill health is not 0.
fn run(cli: &Cli) -> Result<u8> {
    match &cli.verb {
        Verb::Demo(args) => commands::demo::run(args).map(done),
        Verb::Completions { shell } => {
            cli::completions(*shell);
            Ok(0)
        }
        Verb::Man => cli::man().context(Kind::Other, "cannot print the manual").map(done),
        verb => with_configuration(cli, verb),
    }
}

/// The verbs that need a configuration and a runtime.
fn with_configuration(cli: &Cli, verb: &Verb) -> Result<u8> {
    let config = Config::load(&cli.config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context(Kind::Other, "cannot start the runtime")?;
    let source = cli.source.as_deref();
    runtime.block_on(async {
        match verb {
            Verb::Init { create_kek } => commands::init::run(&config, *create_kek, cli.json).await.map(done),
            Verb::Run => commands::run::run(config).await.map(done),
            Verb::Status => commands::status::run(&config, source, cli.json).await.map(health),
            Verb::Doctor => commands::doctor::run(&config, source, cli.json).await.map(health),
            Verb::Backup(args) => commands::backup::run(&config, source, cli.json, args).await.map(done),
            Verb::Restore(args) => commands::restore::run(&config, source, cli.json, args).await,
            Verb::Diff(args) => commands::diff::run(&config, source, cli.json, args).await.map(done),
            Verb::Export(args) => commands::export::run(&config, source, cli.json, args).await,
            Verb::List(args) => commands::list::run(&config, source, cli.json, args).await.map(done),
            Verb::Show(args) => commands::show::run(&config, source, cli.json, args).await.map(done),
            Verb::Compact(args) => commands::compact::run(&config, source, cli.json, args).await,
            Verb::Verify(args) => commands::verify::run(&config, source, cli.json, args).await,
            Verb::Prune(args) => commands::prune::run(&config, source, cli.json, args).await,
            Verb::Hold(args) => commands::hold::hold(&config, source, cli.json, args).await.map(done),
            Verb::Release(args) => commands::hold::release(&config, source, cli.json, args).await.map(done),
            Verb::Demo(_) | Verb::Completions { .. } | Verb::Man => Ok(0),
        }
    })
}

fn done((): ()) -> u8 {
    0
}

fn health(ok: bool) -> u8 {
    if ok { 0 } else { Kind::Unhealthy.exit_code() }
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
