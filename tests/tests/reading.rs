//! `coffer.changes()` beside the agent that archives the same log: it reads a copy of the slot and consumes nothing.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database};

on_majors! {
    changes_beside_the_agent: changes_beside_the_agent;
}

fn changes_beside_the_agent(major: u32) {
    let cluster = Cluster::start(major);
    cluster.create_protected_db("shop");
    cluster.script(
        "shop",
        "CREATE TABLE t (tenant int NOT NULL, id int, v text, PRIMARY KEY (tenant, id)); SELECT coffer.discover('tenant', true);
         INSERT INTO t SELECT t, 0, 'base' FROM generate_series(1, 2) t;",
    );
    // What is not archived yet is what is to be read: a ship comes when the test is done.
    let mut agent = Agent::new(&Setup { ship_interval: "20s".into(), ..Setup::of(&cluster, "shop") });
    agent.start();
    restored::wait_windows(&mut agent, &["1", "2"]);
    cluster.psql("shop", "SELECT coffer.wait_durable()");
    let slot = || {
        cluster.psql(
            "shop",
            "SELECT concat_ws(' ', slot_name, active, confirmed_flush_lsn, active_pid) FROM pg_replication_slots WHERE slot_type = 'logical'",
        )
    };
    let before = slot();
    assert!(before.starts_with("coffer_shop t "), "{before}");
    cluster.script(
        "shop",
        "INSERT INTO t VALUES (1, 1, 'a'), (2, 1, 'of another'); UPDATE t SET v = 'b' WHERE id = 1;
         BEGIN; DELETE FROM t WHERE id = 0; INSERT INTO t VALUES (1, 3, 'c'); COMMIT;",
    );
    let changes = |tenant: u32| {
        cluster.psql(
            "shop",
            &format!(
                "SELECT string_agg(concat_ws(':', op, key ->> 'id', new ->> 'v'), ' ' ORDER BY n) FROM \
            (SELECT *, row_number() OVER () AS n FROM coffer.changes('{tenant}')) c"
            ),
        )
    };
    for _ in 0..3 {
        assert_eq!(changes(1), "insert:1:a update:1:b delete:0 insert:3:c");
        assert_eq!(changes(2), "insert:1:of another update:1:b delete:0");
        // The agent's slot is the only one again, it is where it was, and the agent is at it still.
        assert_eq!(slot(), before);
    }
    // The agent got all of it.
    cluster.script("shop", "SELECT coffer.restore_point('all'); SELECT coffer.wait_durable();");
    let made = Database::restore(&agent, &cluster, "1", "name:all");
    assert_eq!(cluster.psql(&made.name, "SELECT string_agg(id || v, ' ' ORDER BY id) FROM t"), "1b 3c");
    assert_eq!(agent.json(&["verify"])["ok"], true);
    assert_ne!(slot(), before);
}
