//! Retention by the command line: what is kept and why, holds, removals with their grace, and what is left behind by a
//! prune that dies in the middle.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Out};
use coffer_tests::truth::{self, Truth, Watched};
use coffer_tests::{block_on, wait_for};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

on_majors! {
    holds: holds;
    readers_beside_pruning: readers_beside_pruning;
    days: days;
    year: year;
}

const DAYS: usize = 10;
/// Three days, and a window whose start is in the middle of one.
const POLICY: &str = "[retention]\npitr = \"36h\"\ndaily = 3\nweekly = 0\nmonthly = 0\nannual = 0\n";

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

/// Objects of fulls and their manifests in a store's directory.
fn stored(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for e in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = e.path();
        let folder = path.parent().and_then(Path::file_name).is_some_and(|f| f == "f" || f == "m");
        match path.is_dir() {
            true => found.extend(stored(&path)),
            false if folder => {
                found.insert(path);
            }
            false => {}
        }
    }
    found
}

/// One day of a tenant's life: what it had, and the full of the day.
struct Day {
    truth: Truth,
    full: String,
    time: String,
}

/// A source of ten days, a full of each, by the clock of the command line.
async fn ten_days(cluster: &Cluster, agent: &mut Agent) -> Vec<Day> {
    let mut client = cluster.connect("shop").await;
    let mut days = Vec::new();
    for day in 0..DAYS {
        let sql = format!(
            "UPDATE a SET v = 'day {day}' WHERE id % {} = 0; INSERT INTO a SELECT t, {day} * 100 + i, 'new' FROM generate_series(1, 2) t, \
             generate_series(1000, 1010) i; DELETE FROM a WHERE id = {day} + 1",
            day + 2
        );
        cluster.script("shop", &sql);
        let truth = truth::take(&mut client, &watched(), &format!("day {day}")).await;
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        today(agent, day);
        let doc = wait_for("a full of every tenant", 60, || {
            let out = agent.coffer(&["--json", "compact"]);
            let doc: Value = serde_json::from_slice(&out.stdout).expect("JSON");
            (out.status.success() && doc["skipped"] == json!([])).then_some(doc)
        });
        let fulls = doc["fulls"].as_array().expect("fulls");
        let full = fulls.iter().find(|f| f["tenant"] == "1").unwrap_or_else(|| panic!("tenant 1 has no full: {doc}"));
        let text = |key: &str| full[key].as_str().expect("a text").to_owned();
        days.push(Day { truth, full: text("id"), time: text("point_time") });
    }
    days
}

/// Sets the clock of the verbs that follow to some days from now.
fn today(agent: &mut Agent, day: usize) {
    set(agent, "COFFER_TEST_CLOCK", &format!("{day}d"));
}

fn set(agent: &mut Agent, name: &str, value: &str) {
    agent.env.retain(|(n, _)| n != name);
    if !value.is_empty() {
        agent.env.push((name.to_owned(), value.to_owned()));
    }
}

fn watched() -> Vec<Watched> {
    vec![Watched::new("a", "tenant")]
}

/// The days whose full `coffer list` has.
fn listed_days(agent: &Agent, days: &[Day]) -> Vec<usize> {
    let listed = restored::listed(agent, "1");
    let ids: Vec<&str> =
        listed["backups"].as_array().expect("backups").iter().filter_map(|b| b["id"].as_str()).collect();
    (0..days.len()).filter(|n| ids.contains(&days[*n].full.as_str())).collect()
}

/// Restores every day whose full is there, and asks for every other.
async fn check(agent: &Agent, cluster: &Cluster, days: &[Day], there: &[usize]) {
    assert_eq!(listed_days(agent, days), there);
    for (n, day) in days.iter().enumerate() {
        let to = format!("backup:{}", day.full);
        if there.contains(&n) {
            let db = Database::restore(agent, cluster, "1", &to);
            let wrong = day.truth.differences(&db.connect().await, &watched(), "1").await;
            assert!(wrong.is_empty(), "day {n}: {wrong:#?}");
        } else {
            let out = Out::new();
            let (code, doc) = agent.json_err(&restored::args_now("1", &to, out.arg()));
            assert_eq!((code, &doc["error"]["code"]), (4, &json!("removed")), "day {n}: {doc}");
            assert!(!doc["error"]["window"].as_array().expect("a window").is_empty(), "{doc}");
        }
    }
    let verified = agent.json(&["verify"]);
    assert_eq!(verified["ok"], true, "{verified}");
}

fn days(major: u32) {
    block_on(async {
        let regions = tempfile::tempdir().expect("a folder");
        let store = |name: &str, more: &str| {
            format!("[[store]]\nname = \"{name}\"\nurl = \"file://{}/{name}\"\n{more}", regions.path().display())
        };
        let more = format!("[compact]\npart = \"8KiB\"\n{POLICY}");
        let (cluster, mut agent) = begin(major, &more, &(store("eu", "") + &store("us", "")));
        let days = ten_days(&cluster, &mut agent).await;
        let tables = || [stored(&regions.path().join("eu")), stored(&regions.path().join("us"))];

        // A plan is only that.
        let before = tables();
        assert_eq!(before[0].len(), before[1].len());
        let plan = prune(&agent, &["--tenant", "1"]);
        let backups = of(&plan, "1")["backups"].as_array().expect("backups");
        let kept: Vec<bool> = backups.iter().map(|b| b["keep"] == json!(true)).collect();
        assert_eq!(kept, [false, false, false, false, false, false, false, true, true, true], "{plan}");
        assert!(backups.iter().all(|b| !b["reasons"].as_array().expect("reasons").is_empty()));
        assert_eq!(tables(), before);
        assert_eq!(listed_days(&agent, &days).len(), DAYS);

        // Held days stay; a tenant with a policy of its own keeps by that.
        let (from, to) = (&days[2].time, &days[3].time);
        let placed = agent.json(&["hold", "--tenant", "1", "--reason", "case 7", "--from", from, "--to", to]);
        let done = prune(&agent, &["--confirm", "--grace", "1d"]);
        assert_eq!(of(&done, "1")["recorded"]["backups"], 4, "{done}");
        assert_eq!(of(&done, "1")["deleted"]["objects"], 0, "within the grace: {done}");
        assert_eq!(tables(), before);
        // The hold begins at the very point of day 2, which day 1 is before by more than a clock's step.
        let there = [1, 2, 3, 7, 8, 9];
        check(&agent, &cluster, &days, &there).await;

        // A day later they go; a deletion that fails, and one that dies, are finished by the next run.
        today(&mut agent, DAYS);
        set(&mut agent, "COFFER_STORE_FAULTS", "us/delete:503:@2");
        let (code, doc) = agent.json_err(&["prune", "--tenant", "1", "--confirm", "--grace", "1d"]);
        assert_eq!(code, 8, "{doc}");
        set(&mut agent, "COFFER_STORE_FAULTS", "");
        for point in ["prune-after-delete=abort", "prune-before-removed=abort"] {
            set(&mut agent, "COFFER_FAILPOINTS", point);
            assert!(
                !agent.coffer(&["prune", "--tenant", "1", "--confirm", "--grace", "1d"]).status.success(),
                "{point}"
            );
            set(&mut agent, "COFFER_FAILPOINTS", "");
            assert_eq!(agent.json(&["verify"])["ok"], true, "{point}");
        }
        let done = prune(&agent, &["--tenant", "1", "--confirm", "--grace", "1d"]);
        assert!(tables()[0].len() < before[0].len() && tables()[0].len() == tables()[1].len(), "{done}");

        // The hold is over: what only it kept goes at once, when the grace is none, though the first attempt dies.
        agent.json(&["release", placed["hold"].as_str().expect("an id")]);
        today(&mut agent, DAYS - 1);
        set(&mut agent, "COFFER_FAILPOINTS", "prune-after-record=abort");
        assert!(!agent.coffer(&["prune", "--tenant", "1", "--confirm", "--grace", "0s"]).status.success());
        set(&mut agent, "COFFER_FAILPOINTS", "");
        let done = prune(&agent, &["--tenant", "1", "--confirm", "--grace", "0s"]);
        assert_eq!(
            of(&done, "1")["pending"].as_array().expect("pending").iter().filter(|p| p["due"] == true).count(),
            0,
            "{done}"
        );
        let there: Vec<usize> = listed_days(&agent, &days);
        assert!(there.len() >= 3 && there.ends_with(&[8, 9]) && !there.contains(&2), "{there:?}");
        check(&agent, &cluster, &days, &there).await;
        below_the_floor(&agent, &cluster, &days, &there).await;
        losses(&agent, &regions.path().join("eu"));
    });
}

/// The window begins at the full that it needs: from there on every point is exact, before it only fulls are left.
async fn below_the_floor(agent: &Agent, cluster: &Cluster, days: &[Day], there: &[usize]) {
    let plan = prune(agent, &["--tenant", "1"]);
    let floor = of(&plan, "1")["log"]["floor"].as_str().unwrap_or_else(|| panic!("no floor: {plan}")).to_owned();
    let listed = restored::listed(agent, "1");
    let all = listed["backups"].as_array().expect("backups");
    let at =
        |id: &str| all.iter().find(|b| b["id"] == id).unwrap_or_else(|| panic!("{id}: {listed}"))["point_lsn"].clone();
    let first = *there.iter().find(|n| at(&days[**n].full) == floor).expect("a full that the floor stands at");
    assert_eq!(listed["window"][0]["from_lsn"], floor, "{listed}");
    assert!(all.iter().all(|b| b["trigger"] != "base"), "{listed}");
    for (n, day) in days.iter().enumerate() {
        if n > first {
            let wrong = Database::check(agent, cluster, &day.truth, &watched(), "1").await;
            assert!(wrong.is_empty(), "day {n}: {wrong:#?}");
            continue;
        }
        let out = Out::new();
        let (code, doc) = agent.json_err(&restored::args_now("1", &format!("name:{}", day.truth.name), out.arg()));
        assert_eq!((code, &doc["error"]["code"]), (4, &json!("removed")), "day {n}: {doc}");
        assert!(doc["error"]["message"].as_str().expect("a message").contains(&floor), "{doc}");
        assert!(doc["error"]["hint"].as_str().expect("a hint").contains("backup:"), "{doc}");
    }
    let db = Database::restore(agent, cluster, "1", &floor);
    let wrong = days[first].truth.differences(&db.connect().await, &watched(), "1").await;
    assert!(wrong.is_empty(), "{wrong:#?}");
    let wrong = Database::check(agent, cluster, &days[days.len() - 1].truth, &watched(), "2").await;
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Any changeset that is lost above the floor is damage, whatever was removed below it.
fn losses(agent: &Agent, store: &Path) {
    let listed = restored::listed(agent, "1");
    let uid = listed["uid"].as_str().expect("a uid").replace('-', "");
    let source = std::fs::read_dir(store.join("s")).expect("sources").next().expect("one").expect("a folder").path();
    let mut changes: Vec<PathBuf> = std::fs::read_dir(source.join("t").join(uid).join("c"))
        .expect("changesets")
        .map(|e| e.expect("an entry").path())
        .collect();
    changes.sort();
    assert!(!changes.is_empty() && changes.len() < DAYS * 2, "{changes:?}");
    for lost in [&changes[0], &changes[changes.len() - 1]] {
        let aside = store.join("aside");
        std::fs::rename(lost, &aside).expect("it goes");
        let (code, doc) = agent.json_err(&["verify"]);
        let name = lost.file_name().and_then(|n| n.to_str()).expect("a name");
        let found = doc["failures"].as_array().expect("failures");
        assert!(code == 5 && found.len() == 1 && found[0]["kind"] == "missing", "{doc}");
        assert!(found[0]["object"].as_str().expect("a path").ends_with(name), "{doc}");
        std::fs::rename(&aside, lost).expect("it comes back");
    }
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// The document of a prune.
fn prune(agent: &Agent, args: &[&str]) -> Value {
    let doc = agent.json(&[&["prune"], args].concat());
    assert_eq!(doc["version"], 1, "{doc}");
    doc["sources"][0].clone()
}

/// What the agent's status page says to Prometheus.
fn metrics_of(agent: &Agent) -> String {
    use std::io::{Read, Write};
    let mut s = std::net::TcpStream::connect(("127.0.0.1", agent.status_port)).expect("the status page");
    s.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("a request");
    let mut answer = String::new();
    s.read_to_string(&mut answer).expect("an answer");
    answer
}

/// A tenant's part of it.
fn of<'d>(doc: &'d Value, tenant: &str) -> &'d Value {
    let all = doc["tenants"].as_array().expect("tenants");
    all.iter().find(|t| t["tenant"] == tenant).unwrap_or_else(|| panic!("no tenant {tenant}: {doc}"))
}

/// Who reads back while pruning removes: what is gone by right is not missed, and what is being compared stays.
fn readers_beside_pruning(major: u32) {
    let (cluster, mut agent) =
        begin(major, "[retention]\npitr = \"0s\"\ndaily = 1\nweekly = 0\nmonthly = 0\nannual = 0\n", "");
    let other = agent.twin();
    let known = "SELECT count(*) FROM coffer.tenants WHERE tenant = '2'";
    wait_for("the tenant to be known", 60, || (cluster.psql("shop", known) == "1").then_some(()));
    let hold = cluster.psql("shop", "SELECT coffer.hold('2', 'without an end')");
    wait_for("the hold", 60, || (cluster.psql("shop", "SELECT state FROM coffer.holds") == "held").then_some(()));
    // Fulls until one lies so far behind another that no point of the window needs it.
    wait_for("a full that may go", 60, || {
        cluster.psql("shop", "UPDATE a SET v = v || '.'");
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        agent.json(&["compact"]);
        let plan = prune(&other, &["--tenant", "1", "--grace", "0s"]);
        let backups = of(&plan, "1")["backups"].as_array().expect("backups").clone();
        backups.iter().any(|b| b["keep"] == false).then_some(())
    });
    // The other tenant had the same fulls, all of them after its hold was placed.
    let held = prune(&other, &["--tenant", "2", "--confirm", "--grace", "0s"]);
    let backups = of(&held, "2")["backups"].as_array().expect("backups");
    let by_hold = |b: &Value| b["keep"] == true && b["reasons"].to_string().contains("without an end");
    assert!(backups.len() > 2 && backups.iter().all(by_hold), "{held}");
    assert_eq!(of(&held, "2")["deleted"]["objects"], 0, "{held}");
    let listed = format!(
        "SELECT count(*), bool_and(holds = ARRAY[{hold}::bigint]) FROM coffer.backups WHERE tenant = '2' AND trigger = 'schedule'"
    );
    let want = format!("{}|t", backups.len());
    wait_for("the fulls to be listed as held", 90, || (cluster.psql("shop", &listed) == want).then_some(()));
    cluster.psql("shop", &format!("SELECT coffer.release({hold})"));
    wait_for("the release", 60, || {
        (cluster.psql("shop", "SELECT state FROM coffer.holds") == "released").then_some(())
    });
    let plan = prune(&other, &["--tenant", "2", "--grace", "0s"]);
    assert!(of(&plan, "2")["backups"].as_array().expect("backups").iter().any(|b| b["keep"] == false), "{plan}");
    set(&mut agent, "COFFER_FAILPOINTS", "verify-after-list=sleep(5000)");
    std::thread::scope(|scope| {
        let verified = scope.spawn(|| agent.json(&["verify", "--tenant", "1"]));
        std::thread::sleep(std::time::Duration::from_millis(2000));
        let done = prune(&other, &["--tenant", "1", "--confirm", "--grace", "0s"]);
        assert!(of(&done, "1")["deleted"]["objects"].as_u64().is_some_and(|n| n > 0), "{done}");
        let said = verified.join().expect("verified");
        assert_eq!(said["ok"], true, "{said}");
    });
    set(&mut agent, "COFFER_FAILPOINTS", "");

    // A comparison with the live rows that waits for the repository to catch up.
    assert_eq!(agent.stop(), Some(0));
    std::thread::scope(|scope| {
        let compared = scope.spawn(|| other.json(&["verify", "--tenant", "1", "--against-live"]));
        wait_for("a reader that keeps all backups", 60, || {
            let plan = prune(&agent, &["--tenant", "1"]);
            let backups = of(&plan, "1")["backups"].as_array().expect("backups").clone();
            let running =
                |b: &Value| b["reasons"].as_array().expect("reasons").iter().any(|r| r["code"] == "restore_running");
            backups.iter().all(running).then_some(())
        });
        let mut running = other.twin();
        running.start();
        let said = compared.join().expect("compared");
        assert_eq!((&said["ok"], &said["live"][0]["ok"]), (&json!(true), &json!(true)), "{said}");
        assert_eq!(running.stop(), Some(0));
    });
}

fn holds(major: u32) {
    block_on(async {
        let (cluster, mut agent) = begin(major, "[schedule]\nprune = \"* * * * *\"", "");
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

        // Inside the agent, by schedule.
        wait_for("a scheduled run", 90, || {
            let metrics = metrics_of(&agent);
            metrics.lines().any(|l| l.starts_with("coffer_prune_runs_total") && l.contains("\"ok\"")).then_some(())
        });
        assert!(agent.log().contains("pruned: 0 backups"), "the log says so");

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

/// Steps of a year, and the days of each.
const STEPS: usize = 25;
const STEP_DAYS: usize = 15;

/// How many changesets a store has. (Each restore point of this test makes a common object one with events, which stays.)
fn changes_stored(dir: &Path) -> usize {
    in_folders(dir, &["c"])
}

/// How many files folders of these names have.
fn in_folders(dir: &Path, names: &[&str]) -> usize {
    let mut count = 0;
    for e in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = e.path();
        if path.is_dir() {
            count += in_folders(&path, names);
        } else if path.parent().and_then(Path::file_name).is_some_and(|f| names.iter().any(|n| f == *n)) {
            count += 1;
        }
    }
    count
}

/// A year of changes and fulls, pruned after each, by processes that die at every place in turn.
fn year(major: u32) {
    block_on(async {
        let more = "[retention]\npitr = \"20d\"\ndaily = 3\nweekly = 0\nmonthly = 4\nannual = 1\n";
        let (cluster, mut agent) = begin(major, more, "");
        let mut client = cluster.connect("shop").await;
        let dies = [
            "prune-after-record",
            "prune-after-delete",
            "prune-before-removed",
            "catalog-after-sequencer",
            "checkpoint-after-write",
            "checkpoint-before-remove",
        ];
        agent.stop();
        set(&mut agent, "COFFER_TEST_PACK", "4");
        agent.start();
        let mut days: Vec<Day> = Vec::new();
        let (mut sizes, mut logs) = (Vec::new(), Vec::new());
        for step in 0..STEPS {
            let sql = format!(
                "UPDATE a SET v = 'step {step}' WHERE id % 7 = {step} % 7; DELETE FROM a WHERE id = {step} + 1;
                 INSERT INTO a SELECT t, {step} * 100 + i, 'new' FROM generate_series(1, 2) t, generate_series(1000, 1010) i"
            );
            cluster.script("shop", &sql);
            // In a ship by itself: that of a restore point stays.
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            let truth = truth::take(&mut client, &watched(), &format!("step {step}")).await;
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            today(&mut agent, step * STEP_DAYS);
            let doc = agent.json(&["compact"]);
            let full = doc["fulls"].as_array().expect("fulls").iter().find(|f| f["tenant"] == "1").expect("a full");
            let text = |key: &str| full[key].as_str().expect("a text").to_owned();
            days.push(Day { truth, full: text("id"), time: text("point_time") });
            if step % 2 == 1 {
                set(&mut agent, "COFFER_FAILPOINTS", &format!("{}=abort", dies[step / 2 % dies.len()]));
                agent.coffer(&["prune", "--confirm", "--grace", "1d"]);
                set(&mut agent, "COFFER_FAILPOINTS", "");
            }
            prune(&agent, &["--confirm", "--grace", "1d"]);
            sizes.push(changes_stored(&agent.repository()));
            logs.push(in_folders(&agent.repository(), &["log", "packs"]));
            if step % 12 == 11 || step + 1 == STEPS {
                promised(&agent, &cluster, &days).await;
            }
        }
        // The last two fulls before the window's start, what is due next, and what came since: it does not grow.
        let most = sizes[6..10].iter().max().copied().expect("sizes");
        assert!(sizes[10..].iter().all(|s| *s <= most + 8), "{sizes:?}");
        // Nor does what the log is read from.
        let most = logs[6..10].iter().max().copied().expect("sizes");
        assert!(logs[10..].iter().all(|s| *s <= most + 8), "{logs:?}");
        assert_eq!(in_folders(&agent.repository(), &["checkpoints"]), 1);
        println!("objects of the log after each step: {logs:?}");
        // An agent that begins with the checkpoint knows which tables have a base, and takes that of another.
        set(&mut agent, "COFFER_TEST_CLOCK", "");
        agent.stop();
        agent.start();
        cluster.script(
            "shop",
            "CREATE TABLE late (tenant int, id int, v text, PRIMARY KEY (tenant, id));
             INSERT INTO late SELECT 1 + i % 2, i, 'late' FROM generate_series(1, 20) i; SELECT coffer.add_table('late', 'tenant')",
        );
        let both = [watched(), vec![Watched::new("late", "tenant")]].concat();
        let mut known = None;
        for n in 0..60 {
            let truth = truth::take(&mut client, &both, &format!("late {n}")).await;
            cluster.psql("shop", "SELECT coffer.wait_durable()");
            let out = Out::new();
            let at = format!("name:{}", truth.name);
            if agent.coffer(&restored::args_now("1", &at, out.arg())).status.success() {
                known = Some(truth);
                break;
            }
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
        let truth = known.expect("a base of the new table within a minute");
        let wrong = Database::check(&agent, &cluster, &truth, &both, "1").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}

/// Whatever `coffer list` has can be restored: each point of the window and each full, exactly.
async fn promised(agent: &Agent, cluster: &Cluster, days: &[Day]) {
    assert_eq!(agent.json(&["verify"])["ok"], true);
    let there = listed_days(agent, days);
    let window = restored::listed(agent, "1")["window"].as_array().expect("a window").clone();
    assert_eq!(window.len(), 1, "{window:?}");
    for n in &there {
        let db = Database::restore(agent, cluster, "1", &format!("backup:{}", days[*n].full));
        let wrong = days[*n].truth.differences(&db.connect().await, &watched(), "1").await;
        assert!(wrong.is_empty(), "full of step {n}: {wrong:#?}");
    }
    // Twenty days are a step and a bit: the third full from the end stands at the window's start, or one before it.
    let last = days.len() - 1;
    for day in &days[last - 1..] {
        let wrong = Database::check(agent, cluster, &day.truth, &watched(), "1").await;
        assert!(wrong.is_empty(), "{}: {wrong:#?}", day.truth.name);
    }
    assert!(there.ends_with(&[last - 2, last - 1, last]), "{there:?}");
    let out = Out::new();
    let (code, doc) = agent.json_err(&restored::args_now("1", &format!("name:{}", days[1].truth.name), out.arg()));
    assert_eq!((code, &doc["error"]["code"]), (4, &json!("removed")), "{doc}");
}
