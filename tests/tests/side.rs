//! What is not in the replication stream: where sequences stand.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database};
use coffer_tests::wait_for;

on_majors! {
    sequences: sequences;
    sequences_of_locked_tables: sequences_of_locked_tables;
}

/// A protected database with a table whose tenants are 1 and 2, and sequences that no column owns.
fn database(major: u32) -> Cluster {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE a (tenant int NOT NULL, id serial, v text, PRIMARY KEY (tenant, id));
         CREATE SEQUENCE numbers; CREATE SEQUENCE \"Quoted name\" START 7; CREATE SEQUENCE down INCREMENT -1;
         SELECT * FROM coffer.add_table('a', 'tenant');
         INSERT INTO a (tenant, v) SELECT 1 + i % 2, 'v' || i FROM generate_series(1, 10) i;
         SELECT setval('numbers', 41);",
    );
    cluster
}

fn started(cluster: &Cluster) -> Agent {
    let mut agent = Agent::new(&Setup::of(cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    agent
}

/// `last_value` and `is_called` of the sequences, in a fixed order.
fn state(cluster: &Cluster, db: &str) -> String {
    ["numbers", "\"Quoted name\"", "down", "a_id_seq"]
        .map(|s| cluster.psql(db, &format!("SELECT last_value || ' ' || is_called FROM {s}")))
        .join(", ")
}

fn sequences(major: u32) {
    let cluster = database(major);
    let mut agent = started(&cluster);
    let bases = || restored::listed(&agent, "1")["backups"].as_array().expect("backups").len();
    let before = bases();
    // Beyond any row: nothing but the sequences says so.
    let mut points = Vec::new();
    for n in 0..3 {
        cluster.psql("shop", &format!("SELECT coffer.restore_point('p{n}')"));
        points.push((format!("name:p{n}"), state(&cluster, "shop")));
        cluster.psql(
            "shop",
            "SELECT nextval('numbers'), nextval('\"Quoted name\"'), nextval('down'), nextval('a_id_seq') \
             FROM generate_series(1, 100)",
        );
    }
    assert_eq!(points[0].1, "41 true, 7 false, -1 false, 10 true");
    assert_eq!(points[2].1, "241 true, 206 true, -200 true, 210 true");
    for (to, want) in &points {
        let restored = Database::restore(&agent, &cluster, "1", to);
        assert_eq!(&state(&cluster, &restored.name), want, "{to}");
    }

    // Points without a name: the newest reading below them, and at the end the newest of all.
    let now = state(&cluster, "shop");
    let read = || {
        cluster.psql("shop", "UPDATE a SET v = v || '.'");
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        let restored = Database::restore(&agent, &cluster, "1", "latest");
        (state(&cluster, &restored.name) == now).then_some(())
    };
    wait_for("the sequences to be archived without a restore point", 60, read);
    let at = cluster.psql("shop", "SELECT pg_current_wal_insert_lsn()");
    cluster.psql("shop", "SELECT setval('numbers', 5000); UPDATE a SET v = 'x' WHERE id = 1");
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let restored = Database::restore(&agent, &cluster, "1", &at);
    assert_eq!(state(&cluster, &restored.name), now);
    assert_eq!(bases(), before, "a new base would have told");

    // In place nothing moves back.
    let now = state(&cluster, "shop");
    agent.json(&restored::in_place("1", "name:p0"));
    assert_eq!(state(&cluster, "shop"), now);

    // Another process of the agent reads them anew.
    agent.kill9();
    cluster.psql("shop", "SELECT setval('numbers', 9000), coffer.restore_point('away')");
    agent.start();
    let restored = Database::restore(&agent, &cluster, "1", "name:away");
    assert_eq!(cluster.psql(&restored.name, "SELECT nextval('numbers')"), "9001");
    assert_eq!(agent.json(&["verify"])["ok"], true);
}

/// A migration that holds sequences locked holds up neither ships nor restore points.
fn sequences_of_locked_tables(major: u32) {
    block_on(async {
        let cluster = database(major);
        let agent = started(&cluster);
        let migration = cluster.connect("shop").await;
        let locks = "BEGIN; ALTER SEQUENCE numbers INCREMENT BY 2; ALTER SEQUENCE a_id_seq RESTART WITH 77";
        migration.batch_execute(locks).await.expect("the migration begins");
        cluster.psql("shop", "SELECT nextval('down')");
        cluster.psql("shop", "SELECT coffer.restore_point('meanwhile')");
        cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '20s')");
        migration.batch_execute("ROLLBACK").await.expect("the migration ends");
        let restored = Database::restore(&agent, &cluster, "1", "name:meanwhile");
        assert_eq!(state(&cluster, &restored.name), "41 true, 7 false, -1 true, 10 true");
    });
}
