//! Restores beside pruning: what is being read stays until it is read, and goes then.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Out, Scratch};
use coffer_tests::truth::{self, Watched};
use coffer_tests::wait_for;
use serde_json::Value;

on_majors! {
    a_restore_keeps_what_it_reads: a_restore_keeps_what_it_reads;
}

const DDL: &str = "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));";
/// A full may go as soon as another one stands for its day.
const MORE: &str = "[retention]\npitr = \"0s\"\ndaily = 1\nweekly = 0\nmonthly = 0\nannual = 0\n\
    [schedule]\nfull = \"0 0 1 1 *\"\nprune = \"0 0 1 1 *\"\n";

/// What a plan, or a run with more arguments, says of the one tenant.
fn pruned(agent: &Agent, more: &[&str]) -> Value {
    let doc = agent.json(&[&["prune", "--tenant", "1"], more].concat());
    doc["sources"][0]["tenants"][0].clone()
}

/// A backup's entry of that.
fn backup<'a>(pruned: &'a Value, id: &str) -> &'a Value {
    let all = pruned["backups"].as_array().expect("backups");
    all.iter().find(|b| b["id"] == id).unwrap_or_else(|| panic!("no backup {id}: {pruned}"))
}

fn a_restore_keeps_what_it_reads(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", DDL);
        cluster.psql("shop", "SELECT * FROM coffer.discover('tenant', apply => true)");
        cluster.psql("shop", "INSERT INTO a SELECT 1, i, 'v' || i FROM generate_series(1, 500) i");
        let mut agent = Agent::new(&Setup { more: MORE.to_owned(), ..Setup::of(&cluster, "shop") });
        agent.start();
        restored::wait_windows(&mut agent, &["1"]);
        let watched = [Watched::new("a", "tenant")];
        let mut client = cluster.connect("shop").await;
        let mut fulls = Vec::new();
        let (truth, old) = loop {
            assert!(fulls.len() < 40, "no full may go");
            cluster.psql("shop", "UPDATE a SET v = v || '.'");
            let truth = truth::take(&mut client, &watched, &format!("full {}", fulls.len())).await;
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            let doc = agent.json(&["compact", "--tenant", "1"]);
            fulls.push((truth, doc["fulls"][0]["id"].as_str().expect("an id").to_owned()));
            let plan = pruned(&agent, &["--grace", "0s"]);
            if let Some(found) = fulls.iter().position(|(_, id)| backup(&plan, id)["keep"] == false) {
                break fulls.swap_remove(found);
            }
        };

        // It has its list of objects, and has opened none of them.
        let mut reader = agent.twin();
        reader.env = vec![("COFFER_FAILPOINTS".into(), "restore-after-inputs=sleep(7000)".into())];
        let (to, out) = (format!("backup:{old}"), Out::new());
        std::thread::scope(|s| {
            let restoring = s.spawn(|| reader.json(&restored::args("1", &to, "files", out.arg())));
            wait_for("a restore that keeps the full", 30, || {
                let plan = pruned(&agent, &["--grace", "0s"]);
                let reasons = backup(&plan, &old)["reasons"].as_array().expect("reasons").clone();
                reasons.iter().any(|r| r["code"] == "restore_running").then_some(())
            });
            let (code, done) = agent.json_err(&["prune", "--tenant", "1", "--confirm", "--grace", "0s"]);
            let deleted = &done["sources"][0]["tenants"][0]["deleted"];
            assert_eq!((code, &deleted["objects"]), (6, &0.into()), "{done}");
            let done = restoring.join().expect("the restore");
            assert_eq!(done["tables"][0]["inserted"], 500, "{done}");
        });
        let scratch = Scratch::new(&cluster, DDL).await;
        scratch.load(&out).await;
        let wrong = truth.differences(&scratch.client, &watched, "1").await;
        assert!(wrong.is_empty(), "{wrong:#?}");

        // It is over.
        let done = pruned(&agent, &["--confirm", "--grace", "0s"]);
        assert!(done["deleted"]["objects"].as_u64() > Some(0), "{done}");
        let (code, said) = agent.json_err(&restored::args_now("1", &to, Out::new().arg()));
        assert_eq!((code, &said["error"]["code"]), (4, &"removed".into()), "{said}");
    });
}
