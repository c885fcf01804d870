//! The scrub: each kind of damage in a store is found while the agent runs, told, and forgotten when it is mended.

use crate::isolation::files;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use coffer_tests::wait_for;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

on_majors! {
    finds_damage: finds_damage;
    brings_a_base: brings_a_base;
    goes_on: goes_on;
    no_faster_than_it_may: no_faster_than_it_may;
}

fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
         SELECT * FROM coffer.add_table('a', 'tenant');
         INSERT INTO a SELECT t, i, 'a' || i FROM generate_series(1, 2) t, generate_series(1, 200) i;",
    );
    cluster
}

/// Files of a tenant's folder (`f` fulls, `m` manifests, `k` catalog) in a store, in the order of their names.
fn of_tenant(agent: &Agent, store: &Path, tenant: &str, kind: &str) -> Vec<PathBuf> {
    let uid = restored::listed(agent, tenant)["uid"].as_str().expect("a uid").replace('-', "");
    let folder = format!("/t/{uid}/{kind}/");
    let mut all: Vec<PathBuf> =
        files(store).into_iter().filter(|f| f.to_str().is_some_and(|f| f.contains(&folder))).collect();
    all.sort();
    all
}

/// The words of the alarm about a store.
fn alarm(agent: &Agent, store: &str) -> Option<String> {
    let all = agent.alarms("damaged_object");
    let a = all.iter().find(|a| a["scope"] == format!("shop/{store}"))?;
    Some(a["message"].as_str()?.to_owned())
}

/// Of each of a tenant's fulls, oldest first: whether retention takes it for the last good one.
fn last_good(agent: &Agent, tenant: &str) -> Vec<bool> {
    let planned = agent.json(&["prune", "--tenant", tenant]);
    let backups = planned["sources"][0]["tenants"][0]["backups"].as_array().expect("backups");
    backups.iter().map(|b| b["reasons"].to_string().contains("the last good full")).collect()
}

fn name(file: &Path) -> &str {
    file.file_name().and_then(|n| n.to_str()).expect("ASCII")
}

/// Damages, waits for the alarm that names the object, mends, waits until it is gone; what the alarm said.
fn seen(agent: &Agent, store: &str, file: &Path, damage: impl Fn(&Path)) -> String {
    let whole = std::fs::read(file).expect("an object");
    damage(file);
    let said = wait_for(&format!("the alarm about {}", file.display()), 60, || {
        alarm(agent, store).filter(|m| m.contains(name(file)))
    });
    std::fs::write(file, whole).expect("our store");
    wait_for("the alarm to be gone", 60, || alarm(agent, store).is_none().then_some(()));
    said
}

fn finds_damage(major: u32) {
    let cluster = database(major);
    let mut setup = Setup::of(&cluster, "shop");
    setup.more = "[verify]\nscrub_period = \"4s\"\nscrub_rate = \"1GiB\"\n".to_owned();
    let mut agent = Agent::unready(&setup);
    let d = agent.dir().to_owned();
    setup.stores =
        ["one", "two"].map(|s| format!("[[store]]\nname = \"{s}\"\nurl = \"file://{}/{s}\"\n", d.display())).concat();
    agent.configure(&setup);
    agent.init();
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    // A full of what did not change since the base would have no object of its own.
    for _ in 0..2 {
        cluster.psql("shop", "UPDATE a SET v = v || '!'");
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        agent.json(&["compact"]);
    }
    let (one, two) = (d.join("one"), d.join("two"));
    wait_for("a round", 60, || (agent.metric("coffer_scrub_round_timestamp_seconds") > 0.0).then_some(()));
    assert_eq!(agent.alarms("damaged_object"), Vec::<Value>::new());
    let fulls = of_tenant(&agent, &one, "1", "f");
    let newest = fulls.last().expect("a full");
    assert!(fulls.len() >= 3, "a base and two fulls: {fulls:?}");

    // Lost in one store, sound in the other: to be mended, and no reason to count the backup out.
    let gone = |f: &Path| std::fs::remove_file(f).expect("our store");
    let said = seen(&agent, "one", newest, gone);
    assert!(said.contains("missing") && said.contains("store two has it as it was"), "{said}");
    assert_eq!(cluster.psql("shop", "SELECT count(*) FROM coffer.verifications"), "0");

    // Nor is it for the job that reads everything back.
    let copy = two.join(newest.strip_prefix(&one).expect("in the store"));
    let said = seen(&agent, "two", &copy, |f| {
        gone(f);
        let job = cluster.psql("shop", "SELECT coffer.verify('1')");
        let row = wait_for("the job to end", 60, || {
            let row = cluster.psql("shop", &format!("SELECT state, error FROM coffer.jobs WHERE job = {job}"));
            (row.starts_with("done") || row.starts_with("failed")).then_some(row)
        });
        assert!(row.starts_with("failed|") && row.contains("store two") && row.contains("missing"), "{row}");
        let noted = || cluster.psql("shop", "SELECT what, ok FROM coffer.verifications ORDER BY verified_at");
        let noted = wait_for("what it noted", 60, || Some(noted()).filter(|n| n.contains("live")));
        assert_eq!(noted, "live|t");
        assert_eq!(last_good(&agent, "1"), [false, true]);
    });
    assert!(said.contains("store one has it as it was"), "{said}");

    // One bit, in a changeset.
    let changeset = of_tenant(&agent, &two, "2", "c").pop().expect("a changeset");
    let flip = |f: &Path| {
        let mut b = std::fs::read(f).expect("our store");
        let at = b.len() / 2;
        b[at] ^= 4;
        std::fs::write(f, b).expect("our store");
    };
    let said = seen(&agent, "two", &changeset, flip);
    assert!(said.contains("corrupt"), "{said}");

    // Changes that no store has sound are in no full: none counts out, and the views say so.
    let copies = [&one, &two].map(|s| {
        let f = of_tenant(&agent, s, "2", "c").pop().expect("a changeset");
        (std::fs::read(&f).expect("an object"), f)
    });
    copies.iter().for_each(|(_, f)| flip(f));
    let check = "SELECT tenant, ok, what, backup IN (SELECT backup FROM coffer.backups) FROM coffer.verifications \
        ORDER BY verified_at DESC LIMIT 1";
    wait_for("the record of it", 60, || (cluster.psql("shop", check) == "2|f|read_back|f").then_some(()));
    assert_eq!(last_good(&agent, "2"), [false, true]);
    // Points that only they lead to are promised to nobody; those from the next full on are.
    let gaps = |tenant: &str| restored::listed(&agent, tenant)["gaps"].as_array().cloned().expect("gaps");
    let all = gaps("2");
    let reason = all.first().and_then(|g| g["reason"].as_str()).unwrap_or_default();
    assert!(all.len() == 1 && reason.starts_with("damaged: ") && reason.ends_with(name(&copies[0].1)), "{all:?}");
    assert_eq!(gaps("1"), Vec::<Value>::new());
    restored::shown_in_sql(&cluster, &agent, "2");
    copies.iter().for_each(|(whole, f)| std::fs::write(f, whole).expect("our store"));
    wait_for("the record of it", 60, || (cluster.psql("shop", check) == "2|t|read_back|f").then_some(()));
    assert_eq!(gaps("2"), Vec::<Value>::new());
    restored::shown_in_sql(&cluster, &agent, "2");
    wait_for("the alarms to be gone", 60, || agent.alarms("damaged_object").is_empty().then_some(()));

    // An older full in the place of the newer one, both sound in themselves.
    let older = fulls[fulls.len() - 2].clone();
    let said = seen(&agent, "one", newest, |f| {
        std::fs::copy(&older, f).expect("our store");
    });
    assert!(said.contains("1 objects in store one are not as they were written"), "{said}");

    // Records of the chains.
    let record = of_tenant(&agent, &two, "2", "k").remove(0);
    let said = seen(&agent, "two", &record, gone);
    assert!(said.contains("chain_gap"), "{said}");
    let of_log = |f: &PathBuf| f.to_str().is_some_and(|f| f.contains("/log/"));
    let mut log: Vec<PathBuf> = files(&two).into_iter().filter(of_log).collect();
    log.sort();
    let said = seen(&agent, "two", &log[2], gone);
    assert!(said.contains("chain_gap"), "{said}");

    // Damaged everywhere: the full counts no more, as long as it is.
    let copies = [&one, &two].map(|s| {
        let f = of_tenant(&agent, s, "2", "f").pop().expect("a full");
        (std::fs::read(&f).expect("an object"), f)
    });
    copies.iter().for_each(|(_, f)| flip(f));
    for store in ["one", "two"] {
        wait_for("the alarm", 60, || alarm(&agent, store));
    }
    let check = "SELECT tenant, ok, what FROM coffer.verifications v JOIN coffer.backups b USING (tenant, backup) \
        WHERE b.kind = 'full' AND b.trigger = 'schedule' ORDER BY v.verified_at DESC LIMIT 1";
    wait_for("the record of it", 60, || (cluster.psql("shop", check) == "2|f|read_back").then_some(()));
    assert_eq!(
        last_good(&agent, "2"),
        [true, false],
        "the newest full is damaged, the one before is the last good one"
    );
    copies.iter().for_each(|(whole, f)| std::fs::write(f, whole).expect("our store"));
    wait_for("the record of it", 60, || (cluster.psql("shop", check) == "2|t|read_back").then_some(()));
    wait_for("the alarms to be gone", 60, || agent.alarms("damaged_object").is_empty().then_some(()));
    assert_eq!(agent.json(&["verify"])["ok"], true);
    assert!(agent.metric("coffer_scrub_objects_total") > 20.0 && agent.metric("coffer_scrub_bytes_total") > 1e3);
    assert!(agent.page("/").contains("objects read back since"), "{}", agent.page("/"));
}

/// How far the scrub is, as it notes it for itself.
fn noted(agent: &Agent) -> Option<Value> {
    let text = std::fs::read(agent.dir().join("spool").join("scrub-shop.json")).ok()?;
    serde_json::from_slice(&text).ok()
}

/// A restart goes on where the round was; without the note, it begins again; what was found is told at once.
fn goes_on(major: u32) {
    let cluster = database(major);
    let mut setup = Setup::of(&cluster, "shop");
    setup.more = "[verify]\nscrub_period = \"40s\"\n".to_owned();
    let mut agent = Agent::new(&setup);
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    let first = wait_for("some of a round", 60, || noted(&agent).filter(|n| n["place"].as_u64() > Some(0)));
    agent.stop();
    agent.start();
    let later = wait_for("more of it", 60, || noted(&agent).filter(|n| n["place"].as_u64() > first["place"].as_u64()));
    assert_eq!(later["began_us"], first["began_us"], "the round began anew: {first} {later}");
    let file = of_tenant(&agent, &agent.repository(), "1", "f").pop().expect("a full");
    let whole = std::fs::read(&file).expect("an object");
    std::fs::remove_file(&file).expect("our store");
    wait_for("the alarm", 90, || alarm(&agent, "main"));
    agent.stop();
    agent.start();
    wait_for("the alarm, before anything was read", 20, || alarm(&agent, "main"));
    std::fs::write(&file, whole).expect("our store");
    wait_for("the alarm to be gone", 60, || alarm(&agent, "main").is_none().then_some(()));
    agent.stop();
    std::fs::remove_file(agent.dir().join("spool").join("scrub-shop.json")).expect("the note");
    agent.start();
    let anew = wait_for("a new round", 60, || noted(&agent).filter(|n| n["place"].as_u64() > Some(0)));
    assert!(anew["began_us"].as_i64() > first["began_us"].as_i64(), "{anew}");
}

/// However much is due: no more is read in a second than `scrub_rate` says, and no less for long.
fn no_faster_than_it_may(major: u32) {
    const RATE: f64 = 16.0 * 1024.0;
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
         SELECT * FROM coffer.add_table('a', 'tenant');
         INSERT INTO a SELECT t, i, md5(random()::text) FROM generate_series(1, 12) t, generate_series(1, 500) i;",
    );
    let mut setup = Setup::of(&cluster, "shop");
    // All of it is due every second.
    setup.more = "[verify]\nscrub_period = \"1s\"\nscrub_rate = \"16KiB\"\n".to_owned();
    let mut agent = Agent::new(&setup);
    agent.start();
    restored::wait_windows(&mut agent, &["1", "12"]);
    let bytes = || agent.metric("coffer_scrub_bytes_total");
    let first = wait_for("something to be read", 60, || Some(bytes()).filter(|b| *b > 0.0));
    let begun = Instant::now();
    let read = wait_for("seven seconds' worth", 60, || Some(bytes() - first).filter(|b| *b > 7.0 * RATE));
    let took = begun.elapsed();
    println!("PostgreSQL {major}: {read} bytes in {took:?}");
    // A second may be saved up, and an object is counted when all of it was read.
    assert!(took > Duration::from_secs(4), "{read} bytes were read in {took:?}");
    assert!(took < Duration::from_secs(30), "{read} bytes took {took:?}");
}

/// What no store has any more, and nothing later stands for, would be in the way of every full and every restore to come:
/// whoever meets it says so, and a new base is taken.
fn brings_a_base(major: u32) {
    let cluster = database(major);
    let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.psql("shop", "UPDATE a SET v = v || '!'");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let store = agent.repository();
    let changeset = of_tenant(&agent, &store, "1", "c").pop().expect("a changeset");
    std::fs::remove_file(&changeset).expect("our store");
    cluster.psql("shop", "UPDATE a SET v = v || '?' WHERE id > 100");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let bases = || {
        let log = agent.log();
        log.matches("bases are recorded").count()
    };
    assert_eq!(bases(), 1, "nobody has read it yet");

    let backup = |tenant: &str| {
        let job = cluster.psql("shop", &format!("SELECT coffer.backup('{tenant}', 'before a migration')"));
        let state = format!("SELECT state, error FROM coffer.jobs WHERE job = {job}");
        wait_for("the job to end", 60, || {
            Some(cluster.psql("shop", &state)).filter(|r| r.starts_with("done") || r.starts_with("failed"))
        })
    };
    let said = backup("1");
    assert!(said.starts_with("failed|") && said.contains(name(&changeset)), "{said}");
    wait_for("the alarm", 60, || alarm(&agent, "main").filter(|m| m.contains(name(&changeset))));
    wait_for("a new base", 60, || (bases() == 2).then_some(()));
    cluster.psql("shop", "DELETE FROM a WHERE id > 190");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    for tenant in ["1", "2"] {
        assert!(backup(tenant).starts_with("done"), "of tenant {tenant}");
    }
    let rows = |tenant: &str, to: &str| {
        let out = restored::to_files(&agent, tenant, to);
        let manifest = out.manifest();
        let file = manifest["tables"][0]["file"].as_str().expect("a file").to_owned();
        let text = std::fs::read_to_string(out.dir.join(file)).expect("rows");
        let mut rows: Vec<String> = text.lines().map(str::to_owned).collect();
        rows.sort();
        rows
    };
    for tenant in ["1", "2"] {
        let live = cluster.psql("shop", &format!("COPY (SELECT * FROM a WHERE tenant = {tenant}) TO STDOUT"));
        let mut live: Vec<&str> = live.lines().collect();
        live.sort_unstable();
        assert_eq!(rows(tenant, "latest"), live);
    }

    // What lay between is lost to one, and to nobody else.
    let gaps = |tenant: &str| restored::listed(&agent, tenant)["gaps"].as_array().cloned().expect("gaps");
    let of_one = gaps("1");
    let reason = of_one.first().and_then(|g| g["reason"].as_str()).unwrap_or_default();
    assert!(of_one.len() == 1 && reason.starts_with("damaged: ") && reason.ends_with(name(&changeset)), "{of_one:?}");
    assert_eq!(gaps("2"), Vec::<Value>::new());
    for tenant in ["1", "2"] {
        restored::shown_in_sql(&cluster, &agent, tenant);
    }
    assert_eq!(bases(), 2, "one base is enough");
}
