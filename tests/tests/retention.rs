//! Retention by the command line: what is kept and why, holds, removals with their grace, and what is left behind by a
//! prune that dies in the middle.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use serde_json::{Value, json};

on_majors! {
    holds: holds;
}

const DDL: &str = "
CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
INSERT INTO a SELECT t, i, 'v' || i FROM generate_series(1, 2) t, generate_series(1, 50) i;
";

/// A source with two tenants whose bases are there; the agent still runs.
fn begin(major: u32, more: &str, stores: &str) -> (Cluster, Agent) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script("shop", DDL);
    cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
    let setup = Setup { more: more.to_owned(), stores: stores.to_owned(), ..Setup::of(&cluster, "shop") };
    let mut agent = Agent::new(&setup);
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    (cluster, agent)
}

/// The document of a prune.
fn prune(agent: &Agent, args: &[&str]) -> Value {
    let doc = agent.json(&[&["prune"], args].concat());
    assert_eq!(doc["version"], 1, "{doc}");
    doc["sources"][0].clone()
}

/// A tenant's part of it.
fn of<'d>(doc: &'d Value, tenant: &str) -> &'d Value {
    let all = doc["tenants"].as_array().expect("tenants");
    all.iter().find(|t| t["tenant"] == tenant).unwrap_or_else(|| panic!("no tenant {tenant}: {doc}"))
}

fn holds(major: u32) {
    block_on(async {
        let (cluster, mut agent) = begin(major, "", "");
        let placed = agent.json(&["hold", "--tenant", "1", "--reason", "case 7", "--from", "2026-01-01T00:00:00Z"]);
        assert_eq!(
            (&placed["tenant"], &placed["reason"], &placed["to"]),
            (&json!("1"), &json!("case 7"), &Value::Null)
        );
        assert_eq!(placed["from"], "2026-01-01T00:00:00.000000Z");
        let id = placed["hold"].as_str().expect("an id").to_owned();
        let listed = restored::listed(&agent, "1");
        assert_eq!(listed["holds"][0]["hold"], json!(id), "{listed}");
        assert!(listed["backups"].as_array().expect("backups").iter().all(|b| b["holds"] == json!([id])), "{listed}");
        assert_eq!(restored::listed(&agent, "2")["holds"], json!([]));

        // What cannot be is said, and nothing is placed.
        for (args, code) in [
            (&["hold", "--tenant", "nobody", "--reason", "x"][..], 3),
            (&["hold", "--tenant", "1", "--reason", "  "], 2),
            (&["hold", "--tenant", "1", "--reason", "x", "--from", "latest", "--to", "2020-01-01T00:00:00Z"], 2),
            (&["hold", "--tenant", "1", "--reason", "x", "--from", "name:never"], 3),
            (&["release", "what"], 2),
            (&["release", "7"], 3),
            (&["release", &id, "--tenant", "2"], 3),
        ] {
            let (found, doc) = agent.json_err(args);
            assert_eq!(found, code, "{args:?}: {doc}");
        }
        assert_eq!(restored::listed(&agent, "1")["holds"].as_array().expect("holds").len(), 1);

        // Without fulls of the catalog there is nothing to remove; the log is kept, and says so.
        let plan = prune(&agent, &["--tenant", "1"]);
        assert_eq!(of(&plan, "1")["log"]["reasons"][0]["code"], "log", "{plan}");
        assert_eq!(of(&plan, "1")["policy"]["daily"], 30);
        assert_eq!(agent.stop(), Some(0));

        agent.json(&["release", &id]);
        assert_eq!(restored::listed(&agent, "1")["holds"], json!([]));
        let (code, doc) = agent.json_err(&["release", &id]);
        assert_eq!(code, 3, "{doc}");
        drop(cluster);
        // The source's clock is compared before anything is removed.
        let (code, doc) = agent.json_err(&["prune", "--confirm"]);
        assert_eq!(code, 8, "{doc}");
    });
}
