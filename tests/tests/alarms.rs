//! Alarms of what the agent does by schedule: each comes when what it watches is broken, and goes when that is mended.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::{restored, wait_for};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

on_majors! {
    fulls_and_incrementals: fulls_and_incrementals;
    views: views;
}

/// Two tenants, and an agent that makes fulls and incrementals every other second.
fn begin(major: u32) -> (Cluster, Agent) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
         INSERT INTO a SELECT t, i, 'v' || i FROM generate_series(1, 2) t, generate_series(1, 50) i;
         SELECT * FROM coffer.discover('tenant', apply => true)",
    );
    let more = "[schedule]\nincremental = \"*/2 * * * * *\"\nfull = \"*/2 * * * * *\"\n[verify]\nscrub_rate = \"0\"";
    let mut agent = Agent::new(&Setup { more: more.into(), ..Setup::of(&cluster, "shop") });
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    (cluster, agent)
}

fn raised(agent: &Agent, code: &str) -> Value {
    wait_for(code, 60, || agent.alarms(code).into_iter().next())
}

fn cleared(agent: &Agent, codes: &[&str]) {
    wait_for(&format!("{codes:?} to be cleared"), 60, || {
        let page = agent.page("/healthz");
        (page.starts_with("HTTP/1.0 200") && codes.iter().all(|c| agent.alarms(c).is_empty())).then_some(())
    });
}

/// A tenant's folder in the store.
fn folder(agent: &Agent, tenant: &str) -> PathBuf {
    let uid = restored::listed(agent, tenant)["uid"].as_str().expect("a uid").replace('-', "");
    let sources = std::fs::read_dir(agent.repository().join("s")).expect("the sources");
    sources.map(|s| s.expect("a source").path().join("t").join(&uid)).find(|p| p.is_dir()).expect("the tenant's folder")
}

/// Changes the last byte of a file; a second time it is what it was.
fn flip(file: &Path) {
    let mut bytes = std::fs::read(file).expect("an object");
    *bytes.last_mut().expect("bytes") ^= 1;
    std::fs::write(file, bytes).expect("written");
}

fn fulls_and_incrementals(major: u32) {
    let (cluster, mut agent) = begin(major);
    let tenant = folder(&agent, "1");
    let both = ["fulls_failed", "incrementals_failed"];
    let made = || {
        let backups = restored::listed(&agent, "2")["backups"].as_array().expect("backups").clone();
        let scheduled = |b: &&Value| b["trigger"] == "schedule" || b["kind"] == "incremental";
        backups.iter().filter(scheduled).count()
    };
    wait_for("a full by schedule", 60, || (made() > 0).then_some(()));
    cleared(&agent, &both);

    // What one tenant changed cannot be read, and was not worked on yet.
    let before = made();
    let mut damaged = BTreeSet::new();
    let alarm = wait_for("both alarms", 60, || {
        cluster.psql("shop", "UPDATE a SET v = v || '+'");
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        for object in std::fs::read_dir(tenant.join("c")).expect("changesets") {
            let path = object.expect("an object").path();
            if damaged.insert(path.clone()) {
                flip(&path);
            }
        }
        both.iter().map(|code| agent.alarms(code).into_iter().next()).collect::<Option<Vec<Value>>>()
    });
    for alarm in alarm {
        assert!(alarm["message"].as_str().is_some_and(|m| m.contains("of 1 tenants failed")), "{alarm}");
        assert_eq!(alarm["scope"], "shop", "{alarm}");
    }
    assert!(agent.page("/healthz").starts_with("HTTP/1.0 503"));
    wait_for("the other tenant's, all the same", 60, || (made() > before).then_some(()));
    damaged.iter().for_each(|d| flip(d));
    cleared(&agent, &both);

    // A catalog that cannot be read: nobody's are made.
    let record = tenant.join("k").join(format!("{:020}", 0));
    flip(&record);
    for code in both {
        let alarm = raised(&agent, code);
        assert!(alarm["message"].as_str().is_some_and(|m| m.starts_with("no ") && m.contains("/k/")), "{alarm}");
    }
    flip(&record);
    cleared(&agent, &both);
    assert_eq!(agent.stop(), Some(0));
}

fn views(major: u32) {
    let (cluster, mut agent) = begin(major);
    wait_for("the views", 60, || {
        (cluster.psql("shop", "SELECT count(*) > 0 FROM coffer.backups") == "t").then_some(())
    });
    cleared(&agent, &["views_failed"]);
    // The fulls by schedule are news for the views, all the time.
    cluster.psql("shop", "ALTER TABLE coffer.backup_entries RENAME TO elsewhere");
    cluster.psql("shop", "UPDATE a SET v = v || '+'");
    let alarm = raised(&agent, "views_failed");
    assert!(alarm["message"].as_str().is_some_and(|m| m.contains("backup_entries")), "{alarm}");
    cluster.psql("shop", "ALTER TABLE coffer.elsewhere RENAME TO backup_entries");
    cleared(&agent, &["views_failed"]);
    assert_eq!(agent.stop(), Some(0));
}
