//! `coffer init`: makes the keyring and the repository, and touches neither when one exists.

use crate::clock::SystemClock;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::keyring::{Kek, Keyring};
use crate::repository::{Repository, refuse_existing};
use std::sync::Arc;

/// Makes what the configuration names. Everything is tried before anything is written; what was written is taken back
/// when a later step fails.
pub async fn run(config: &Config, create_kek: bool, json: bool) -> Result<()> {
    if config.store.is_empty() {
        return Err(Error::usage("the configuration has no [[store]] section")
            .hint("add one: name, url = \"file:///…\" or \"s3://…\""));
    }
    refuse_existing(config).await?;
    Keyring::refuse_existing(&config.keys).await?;
    let kek = if create_kek { Kek::create_file(&config.keys)? } else { Kek::load(&config.keys).await? };
    let clock = Arc::new(SystemClock);
    let keyring = Keyring::create(&config.keys, clock.clone()).await?;
    let repository = match Repository::create(config, keyring.clone(), clock).await {
        Ok(r) => r,
        Err(e) => {
            keyring.take_back().await;
            return Err(e);
        }
    };
    report(config, &repository, &keyring, &kek, create_kek, json)
}

fn report(
    config: &Config,
    repository: &Repository,
    keyring: &Keyring,
    kek: &Kek,
    create_kek: bool,
    json: bool,
) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let places: Vec<String> = keyring.places().iter().map(|p| p.shown().to_owned()).collect();
    let done = if json {
        let stores: Vec<_> = repository
            .stores()
            .map(|s| serde_json::json!({"name": s.name(), "url": s.shown(), "required": s.required()}))
            .collect();
        writeln!(
            out,
            "{}",
            serde_json::json!({"version": 1, "repository": repository.uid(), "stores": stores, "keyring": places,
                "kek": kek.id(), "kek_created": create_kek})
        )
    } else {
        let mut text = format!("repository {}\n", repository.uid());
        for s in repository.stores() {
            let kind = if s.required() { "required" } else { "optional" };
            text.push_str(&format!("store {} ({kind}): {}\n", s.name(), s.shown()));
        }
        for p in &places {
            text.push_str(&format!("keyring: {p}\n"));
        }
        if create_kek && let Some(path) = &config.keys.path {
            text.push_str(&format!("KEK {} made: {}\n", kek.id(), path.display()));
            text.push_str("Keep a copy of this file elsewhere: without it no backup can be read.\n");
        }
        if places.len() == 1 {
            text.push_str("The keyring has one place only: if it is lost, so is every backup. Add a second one.\n");
        }
        out.write_all(text.as_bytes())
    };
    done.map_err(|e| Error::new(Kind::Other, "cannot write to standard output").source(e))
}
