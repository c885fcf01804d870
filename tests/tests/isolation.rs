//! No plaintext, key or name of one tenant in what belongs to another, and none at all in the stores.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

on_majors! {
    markers: markers;
}

const KEYS: [&str; 4] = ["acme-rockets", "globex-corp", "initech-tps", "umbrella-labs"];

/// What is planted in every value of a tenant's rows.
fn marker(key: &str) -> String {
    format!("MARK<{}>", key.to_uppercase())
}

/// Every file below a folder.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.is_dir() { out.extend(files(&path)) } else { out.push(path) }
    }
    out.sort();
    out
}

fn contains(hay: &[u8], needle: &str) -> bool {
    hay.windows(needle.len()).any(|w| w == needle.as_bytes())
}

fn markers(major: u32) {
    block_on(async {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE a (tenant text NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
             CREATE TABLE b (id int PRIMARY KEY, tenant text NOT NULL, v text);
             CREATE TABLE c (tenant text NOT NULL, v text);
             SELECT * FROM coffer.add_table('a', 'tenant'); SELECT * FROM coffer.add_table('b', 'tenant');
             SELECT * FROM coffer.add_table('c', 'tenant');",
        );
        let plant = |from: usize, to: usize| {
            for (n, key) in KEYS.iter().enumerate() {
                let m = marker(key);
                cluster.script(
                    "shop",
                    &format!(
                        "INSERT INTO a SELECT '{key}', i, '{m}' || i FROM generate_series({from}, {to}) i;
                         INSERT INTO b SELECT i * 10 + {n}, '{key}', '{m}' || i FROM generate_series({from}, {to}) i;
                         INSERT INTO c SELECT '{key}', '{m}' || i FROM generate_series({from}, {to}) i;"
                    ),
                );
            }
        };
        plant(1, 20);
        let mut agent = Agent::new(&Setup::of(&cluster, "shop"));
        agent.start();
        restored::wait_windows(&mut agent, &KEYS);
        plant(21, 40);
        // One transaction over all tenants, a row that moves, deletes and updates with old values, a rolled back one.
        cluster.script(
            "shop",
            "BEGIN; UPDATE a SET v = v || '+' WHERE id % 2 = 0; UPDATE b SET v = v || '+'; DELETE FROM b WHERE id % 30 < 10;
             UPDATE c SET v = v || '+' WHERE v LIKE '%3'; DELETE FROM c WHERE v LIKE '%7'; DELETE FROM a WHERE id % 3 = 0; COMMIT;
             BEGIN; UPDATE a SET v = 'never'; ROLLBACK; TRUNCATE c;",
        );
        plant(41, 45);
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let list = agent.json(&["list"]);
        assert_eq!(agent.stop(), Some(0));

        let uids: BTreeMap<String, String> = list["tenants"]
            .as_array()
            .expect("tenants")
            .iter()
            .filter_map(|t| Some((t["uid"].as_str()?.replace('-', ""), t["tenant"].as_str()?.to_owned())))
            .collect();
        assert!(KEYS.iter().all(|k| uids.values().any(|v| v == k)), "{list}");

        let repository = agent.repository();
        let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
        for file in files(&repository) {
            let path = file.strip_prefix(&repository).expect("inside").to_str().expect("ASCII").to_owned();
            let raw = std::fs::read(&file).expect("a file");
            for key in KEYS {
                assert!(!path.contains(key), "a path names tenant {key}: {path}");
                assert!(!contains(&raw, key) && !contains(&raw, &marker(key)), "plaintext of {key} in {path}");
            }
            let Some((_, owner)) = uids.iter().find(|(uid, _)| path.contains(uid.as_str())) else { continue };
            let out = agent.coffer(&["show", "--object", &path, "--plaintext"]);
            assert!(out.status.success(), "{path}: {}", String::from_utf8_lossy(&out.stderr));
            assert!(
                contains(&out.stdout, &marker(owner)) || path.ends_with(".json") || out.stdout.len() < 4096,
                "{path} has nothing of {owner}"
            );
            for key in KEYS.into_iter().filter(|k| k != owner) {
                assert!(!contains(&out.stdout, &marker(key)), "{path} of {owner} has a row of {key}");
                assert!(!contains(&out.stdout, key), "{path} of {owner} names {key}");
            }
            for (uid, _) in uids.iter().filter(|(_, k)| *k != owner) {
                assert!(!contains(&out.stdout, uid), "{path} of {owner} has another tenant's uid");
            }
            *opened.entry(KEYS.into_iter().find(|k| k == owner).unwrap_or("reserved")).or_default() += 1;
        }
        for key in KEYS {
            assert!(opened.get(key).is_some_and(|n| *n >= 2), "too few objects of {key} were opened: {opened:?}");
        }
        for file in files(&agent.dir().join("keyring")).into_iter().chain(files(&agent.dir().join("spool"))) {
            let raw = std::fs::read(&file).expect("a file");
            for key in KEYS {
                assert!(
                    !contains(&raw, key) && !contains(&raw, &marker(key)),
                    "plaintext of {key} in {}",
                    file.display()
                );
            }
        }
        println!("PostgreSQL {major}: opened {opened:?}");
    });
}
