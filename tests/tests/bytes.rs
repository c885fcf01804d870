//! Bytes that are not what was written: an error that names the object, never a wrong row.

use crate::isolation::files;
use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Out, Scratch};
use coffer_tests::truth::{self, Truth, Watched};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::path::PathBuf;

on_majors! {
    damage: damage;
}

const DDL: &str = "
CREATE TABLE a (tenant int NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
CREATE TABLE b (id int PRIMARY KEY, tenant int NOT NULL, v text);
CREATE TABLE c (tenant int NOT NULL, v text);
";

/// Kind -> the objects of that kind, in the order of their names, which is the order of their LSNs.
type Kinds = BTreeMap<&'static str, Vec<PathBuf>>;

struct Bench<'c> {
    agent: Agent,
    truth: Truth,
    tables: Vec<Watched>,
    scratch: Scratch<'c>,
    /// What was refused and what was untouched by the damage, per kind.
    tally: BTreeMap<String, (u32, u32)>,
}

fn damage(major: u32) {
    block_on(async {
        let mut rng = StdRng::seed_from_u64(coffer_tests::seed());
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script("shop", DDL);
        for t in ["a", "b", "c"] {
            cluster.psql("shop", &format!("SELECT * FROM coffer.add_table('{t}', 'tenant')"));
        }
        cluster.script(
            "shop",
            "INSERT INTO a SELECT t, i, 'a' || i FROM generate_series(1, 3) t, generate_series(1, 200) i;
             INSERT INTO b SELECT i, 1 + i % 3, 'b' || i FROM generate_series(1, 300) i;",
        );
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &["1", "2", "3"]);
        for n in 0..4 {
            cluster.script(
                "shop",
                &format!(
                    "UPDATE a SET v = 'round {n} ' || id WHERE id % 10 = {n}; INSERT INTO b SELECT 1000 * ({n} + 1) + i, 1 + i % 3, 'x'
                     FROM generate_series(1, 30) i; INSERT INTO c SELECT t, 'c{n}' FROM generate_series(1, 3) t;"
                ),
            );
            if n == 1 {
                cluster.psql("shop", "TRUNCATE c");
            }
            cluster.psql("shop", "SELECT coffer.wait_durable()");
        }
        let mut db = cluster.connect("shop").await;
        let tables: Vec<Watched> = ["a", "b", "c"].map(|t| Watched::new(t, "tenant")).to_vec();
        let truth = truth::take(&mut db, &tables, "p").await;
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let list = agent.json(&["list"]);
        assert_eq!(agent.stop(), Some(0));
        let uid = |tenant: &str| {
            let t =
                list["tenants"].as_array().expect("tenants").iter().find(|t| t["tenant"] == tenant).expect("listed");
            t["uid"].as_str().expect("a uid").replace('-', "")
        };
        let (mine, other) = (uid("1"), uid("2"));
        let scratch = Scratch::new(&cluster, DDL).await;
        let mut bench = Bench { agent, truth, tables, scratch, tally: BTreeMap::new() };
        assert!(bench.restore_is_refused("undamaged").await.is_none(), "the undamaged repository is refused");

        let repository = bench.agent.repository();
        let kind_of = |path: &PathBuf, tenant: &str| -> Option<&'static str> {
            let name = path.strip_prefix(&repository).expect("inside").to_str().expect("ASCII").to_owned();
            let whose = |kind: &str| name.contains(&format!("/t/{tenant}/{kind}/"));
            Some(match () {
                () if name.contains("/log/") => "log",
                () if name.contains("/common/") => "common",
                () if name.contains("/schema/") => "schema",
                () if whose("c") => "changeset",
                () if whose("f") => "full",
                () if name == "coffer-repository" => "descriptor",
                () => return None,
            })
        };
        let kinds = |tenant: &str| {
            let mut kinds = Kinds::new();
            for f in files(&repository) {
                if let Some(k) = kind_of(&f, tenant) {
                    kinds.entry(k).or_default().push(f);
                }
            }
            kinds
        };
        let (ours, theirs) = (kinds(&mine), kinds(&other));
        for kind in ["log", "common", "changeset", "full", "schema", "descriptor"] {
            assert!(ours.contains_key(kind), "no {kind} among {:?}", files(&repository));
        }

        for (kind, objects) in &ours {
            // Neither the first nor, in the log, the last: a record that nobody has seen is not missed.
            let victim = objects[objects.len() / 2].clone();
            let whole = std::fs::read(&victim).expect("an object");
            for spot in [0, whole.len() / 2, whole.len() - 1, rng.random_range(0..whole.len())] {
                let mut bytes = whole.clone();
                bytes[spot] ^= 1 << rng.random_range(0..8);
                bench.with(kind, &format!("bit flipped at {spot} of {}", whole.len()), &[(&victim, Some(bytes))]).await;
            }
            for keep in [0, 20.min(whole.len() / 3), whole.len() / 2, whole.len() - 1] {
                bench
                    .with(
                        kind,
                        &format!("cut to {keep} of {}", whole.len()),
                        &[(&victim, Some(whole[..keep].to_vec()))],
                    )
                    .await;
            }
            let mut longer = whole.clone();
            longer.push(0);
            bench.with(kind, "a byte appended", &[(&victim, Some(longer))]).await;
            bench.with(kind, "missing", &[(&victim, None)]).await;
            if objects.len() > 1 {
                let older = &objects[objects.len() / 2 - 1];
                let old = std::fs::read(older).expect("an object");
                bench.with(kind, "an older one replayed", &[(&victim, Some(old.clone()))]).await;
                bench.with(kind, "two swapped", &[(&victim, Some(old)), (older, Some(whole.clone()))]).await;
            }
            if matches!(*kind, "changeset" | "full") {
                let foreign = theirs[kind].last().expect("the other tenant has one");
                let bytes = std::fs::read(foreign).expect("an object");
                bench
                    .with(kind, "swapped across tenants", &[(&victim, Some(bytes)), (foreign, Some(whole.clone()))])
                    .await;
            }
        }

        // The keyring: every entry lost or replaced in its turn, then the KEK.
        let keyring = files(&bench.agent.dir().join("keyring"));
        assert!(keyring.len() >= 4, "three tenants and the repository have keys: {keyring:?}");
        for (n, entry) in keyring.iter().enumerate() {
            let whole = std::fs::read(entry).expect("an entry");
            let mut bytes = whole.clone();
            bytes[whole.len() / 2] ^= 4;
            let kind = if entry.to_string_lossy().contains(&mine) { "keyring, ours" } else { "keyring" };
            bench.with(kind, "bit flipped", &[(entry, Some(bytes))]).await;
            bench.with(kind, "missing", &[(entry, None)]).await;
            bench.with(kind, "cut", &[(entry, Some(whole[..whole.len() / 2].to_vec()))]).await;
            let neighbour = &keyring[(n + 1) % keyring.len()];
            let foreign = std::fs::read(neighbour).expect("an entry");
            bench.with(kind, "swapped", &[(entry, Some(foreign)), (neighbour, Some(whole))]).await;
        }
        let kek = bench.agent.dir().join("kek");
        let other_kek = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n";
        bench.with("kek", "wrong", &[(&kek, Some(other_kek.into()))]).await;
        bench.with("kek", "missing", &[(&kek, None)]).await;
        bench.with("kek", "not base64", &[(&kek, Some(b"hunter2\n".to_vec()))]).await;

        assert!(bench.restore_is_refused("undamaged, again").await.is_none(), "the repository was not put back");
        println!("PostgreSQL {major}: refused, not concerned: {:#?}", bench.tally);
        for kind in ["log", "changeset", "full", "keyring, ours", "kek"] {
            assert!(bench.tally[kind].0 > 0, "no damage of {kind} ever mattered: {:?}", bench.tally);
        }
    });
}

impl Bench<'_> {
    /// Damages, asserts, and puts everything back.
    async fn with(&mut self, kind: &str, what: &str, damage: &[(&PathBuf, Option<Vec<u8>>)]) {
        let saved: Vec<_> = damage.iter().map(|(path, _)| (path, std::fs::read(path).expect("an object"))).collect();
        if damage.iter().zip(&saved).all(|((_, new), (_, old))| new.as_ref() == Some(old)) {
            return; // a swap of equal bytes is none
        }
        for (path, bytes) in damage {
            match bytes {
                Some(b) => std::fs::write(path, b).expect("our file"),
                None => std::fs::remove_file(path).expect("our file"),
            }
        }
        let title = format!("{kind}, {what}: {}", damage[0].0.display());

        let out = self.agent.coffer(&["--json", "verify"]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        let code = out.status.code().unwrap_or(-1);
        assert!(code == 5 || code == 7, "{title}\nverify: exit {code}, {said}");
        // The object is named, by its own name or, a key, by its tenant's.
        if kind != "kek" {
            let named = damage.iter().any(|(path, _)| {
                let leaf = path.file_name().expect("a name").to_string_lossy().into_owned();
                let folder =
                    path.parent().and_then(|p| p.file_name()).expect("a folder").to_string_lossy().into_owned();
                let dashed = uuid_with_dashes(&folder);
                said.contains(&leaf) || folder.len() == 32 && (said.contains(&folder) || said.contains(&dashed))
            });
            assert!(named, "{title}\nverify does not name it: {said}");
        }
        let refused = self.restore_is_refused(&title).await;
        let count = self.tally.entry(kind.to_owned()).or_default();
        match refused {
            Some(_) => count.0 += 1,
            None => count.1 += 1,
        }
        for (path, bytes) in saved {
            std::fs::write(path, bytes).expect("our file");
            // A KEK that others may read is refused, and a file made anew would be one.
            std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("our file");
        }
    }

    /// Restores tenant 1: the exit code of a refusal, which left nothing; or the rows are exactly right.
    async fn restore_is_refused(&self, title: &str) -> Option<i32> {
        let out = Out::new();
        let args =
            ["restore", "--tenant", "1", "--to", "name:p", "--mode", "files", "--target", out.arg(), "--confirm"];
        let done = self.agent.coffer(&args);
        match done.status.code() {
            Some(0) => {
                self.scratch.load(&out).await;
                let wrong = self.truth.differences(&self.scratch.client, &self.tables, "1").await;
                assert!(wrong.is_empty(), "{title}: WRONG ROWS: {wrong:#?}");
                None
            }
            Some(code @ (5 | 7)) => {
                assert!(out.names().is_empty(), "{title}: a refused restore left {:?}", out.names());
                Some(code)
            }
            code => panic!("{title}\nrestore: exit {code:?}, {}", String::from_utf8_lossy(&done.stderr)),
        }
    }
}

fn uuid_with_dashes(simple: &str) -> String {
    if simple.len() != 32 {
        return simple.to_owned();
    }
    [&simple[..8], &simple[8..12], &simple[12..16], &simple[16..20], &simple[20..]].join("-")
}
