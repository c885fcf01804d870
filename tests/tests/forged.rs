//! Messages that others put into the log: every role may, and none of them is believed. Each is well-formed but for its
//! MAC; written under the right key the very same bytes do what they say, which shows that nothing else keeps them out.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database};
use coffer_tests::wait_for;
use coffer_wire::TenantKind;
use coffer_wire::tag::{self, Fill, MacKey, Tag, TagOp, TagTenant};
use serde_json::Value;

on_majors! {
    forged: forged;
    unattributed: unattributed;
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn of(key: &str) -> TagTenant<'_> {
    TagTenant { kind: TenantKind::Normal, key: key.as_bytes() }
}

struct World {
    cluster: Cluster,
    tagged: u32,
    keyed: u32,
}

impl World {
    fn new(major: u32) -> Self {
        let cluster = Cluster::start(major);
        cluster.create_protected_db("shop");
        cluster.script(
            "shop",
            "CREATE TABLE tagged (id int PRIMARY KEY, tenant text NOT NULL, v text);
             CREATE TABLE keyed (tenant text NOT NULL, id int NOT NULL, v text, PRIMARY KEY (tenant, id));
             SELECT coffer.discover('tenant', true);
             INSERT INTO tagged SELECT i, CASE WHEN i < 10 THEN 'victim' ELSE 'mallory' END, 'x' FROM generate_series(1, 12) i;
             INSERT INTO keyed VALUES ('victim', 1, 'theirs'), ('mallory', 1, 'own');
             CREATE ROLE mallory; GRANT SELECT, UPDATE, DELETE ON tagged, keyed TO mallory;
             DO $$BEGIN IF EXISTS (SELECT FROM pg_settings WHERE name = 'output_plugin_libraries') THEN
                 EXECUTE 'ALTER ROLE postgres SET output_plugin_libraries = pg_coffer'; END IF; END$$;",
        );
        let relid = |t: &str| cluster.psql("shop", &format!("SELECT '{t}'::regclass::oid")).parse().expect("an OID");
        let (tagged, keyed) = (relid("tagged"), relid("keyed"));
        Self { cluster, tagged, keyed }
    }

    /// In a transaction of a role that may not do anything but use the tables: a message, and a statement behind it.
    fn emit(&self, message: &[u8], then: &str) {
        self.cluster.script(
            "shop",
            &format!(
                "SET ROLE mallory; BEGIN; SELECT pg_logical_emit_message(true, 'pg_coffer', '\\x{}'::bytea); {then}; COMMIT;",
                hex(message)
            ),
        );
    }

    /// Whether DELETEs of `tagged` write their tag; past the guard that puts the trigger back.
    fn genuine_tags(&self, enabled: bool) {
        let how = if enabled { 'A' } else { 'D' };
        self.cluster.script(
            "shop",
            &format!(
                "UPDATE pg_trigger SET tgenabled = '{how}' WHERE tgrelid = 'tagged'::regclass AND tgname = 'zzz_coffer_tag_delete';
                 SELECT coffer._invalidate('tagged'::regclass);"
            ),
        );
    }

    /// What came since the last look: operation, kind of tenant, tenant, and the marker's kind.
    fn seen(&self) -> Vec<String> {
        let lines = self
            .cluster
            .psql("shop", "SELECT data FROM pg_logical_slot_get_changes('look', NULL, NULL, 'format', 'json')");
        let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
        let one = |line: &str| {
            let d: Value = serde_json::from_str(line).expect("a document");
            match d["op"].as_str() {
                Some("marker") => format!("marker {}", text(&d["kind"])),
                _ => format!("{} {} {}", text(&d["op"]), text(&d["tenant_kind"]), text(&d["tenant"])),
            }
        };
        lines.lines().map(one).collect()
    }

    fn delete_tag(&self, key: &MacKey, id: u32) -> Vec<u8> {
        let row = id.to_string();
        let tag =
            Tag { relid: self.tagged, op: TagOp::Delete, key: row.as_bytes(), old: Some(of("mallory")), new: None };
        tag::encode_tag(key, &tag)
    }

    /// A row of mallory's is said to come from the victim: its UPDATE would delete the victim's row with that key.
    fn move_tag(&self, key: &MacKey, id: u32) -> Vec<u8> {
        let row = id.to_string();
        let (old, new) = (Some(of("victim")), Some(of("mallory")));
        tag::encode_tag(key, &Tag { relid: self.tagged, op: TagOp::Update, key: row.as_bytes(), old, new })
    }

    /// A value for a row of the victim's.
    fn fill(&self, key: &MacKey) -> Vec<u8> {
        let fill = Fill { relid: self.keyed, key: b"victim\t1", tenant: of("victim"), attnum: 3, field: b"forged" };
        tag::encode_fill(key, &fill)
    }

    /// The table is said to be dropped.
    fn drop_marker(&self, key: &MacKey) -> Vec<u8> {
        tag::encode_marker(key, "drop", format!("{{\"relids\":[{}]}}", self.keyed).as_bytes())
    }

    /// What the agent would close windows, take bases or raise alarms for.
    fn events(&self) -> [(&'static str, String); 7] {
        let t = self.keyed;
        [
            ("registry", format!("{{\"relid\":{t},\"action\":\"remove\",\"rebase\":false}}")),
            ("registry", format!("{{\"relid\":{t},\"action\":\"add\",\"rebase\":true}}")),
            ("rewrite", format!("{{\"relid\":{t}}}")),
            ("ddl", format!("{{\"tag\":\"ALTER TABLE\",\"objects\":[{t}],\"relations\":[]}}")),
            ("definitions", "{\"tag\":\"CREATE VIEW\"}".into()),
            ("base", "0123456789abcdef".into()),
            ("claim", format!("{{\"relid\":{t}}}")),
        ]
    }
}

fn forged(major: u32) {
    let world = World::new(major);
    let cluster = &world.cluster;
    let mut agent = Agent::new(&Setup::of(cluster, "shop"));
    agent.start();
    restored::wait_windows(&mut agent, &["victim", "mallory"]);
    cluster.psql("shop", "SELECT pg_create_logical_replication_slot('look', 'pg_coffer')");

    let wrong: MacKey = [0x5a; 16];
    for message in
        [world.fill(&wrong), world.drop_marker(&wrong), tag::encode_marker(&wrong, "restore_point", b"forged")]
    {
        world.emit(&message, "UPDATE keyed SET v = v WHERE false");
    }
    let state = || {
        let bases = agent.log().matches("bases are recorded").count();
        let registry = cluster.psql("shop", "SELECT string_agg(r::text, ' ' ORDER BY r.relid) FROM coffer.rules r");
        let window = |tenant| {
            let mut listed = restored::listed(&agent, tenant);
            // The moving end of an open window.
            for w in listed["window"].as_array_mut().expect("a window") {
                w.as_object_mut().expect("a span").retain(|k, _| k.starts_with("from"));
            }
            (listed["window"].clone(), listed["gaps"].clone())
        };
        (bases, registry, window("victim"), window("mallory"))
    };
    let before = state();
    for (kind, payload) in world.events() {
        world.emit(&tag::encode_marker(&wrong, kind, payload.as_bytes()), "UPDATE keyed SET v = v WHERE false");
    }
    world.emit(&world.move_tag(&wrong, 10), "UPDATE tagged SET v = 'y' WHERE id = 10");
    assert_eq!(world.seen(), ["update normal mallory"]);
    cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '1min')");
    assert_eq!(state(), before, "{}", agent.log());
    assert!(agent.alarms("claim_contradicted").is_empty());
    // Bases come in the log's order: one that is asked for behind all this is the first, and has the rows of its table only.
    cluster.psql("shop", "CREATE TABLE late AS SELECT 'victim' AS tenant, i AS id FROM generate_series(1, 7) i");
    let bases = wait_for("the base of a new table", 60, || {
        let log = agent.log();
        let bases: Vec<_> = log.lines().filter(|l| l.contains("bases are recorded")).skip(before.0).collect();
        (!bases.is_empty()).then(|| bases.join("\n"))
    });
    assert!(bases.lines().count() == 1 && bases.contains(r#""rows":7}"#), "{bases}");
    cluster.psql("shop", "SELECT coffer.restore_point('unharmed')");
    let (code, said) = agent.json_err(&restored::args_now("victim", "name:forged", "/nonexistent/forged"));
    assert!(matches!(code, 3 | 4), "{code} {said}");
    let made = Database::restore(&agent, cluster, "victim", "name:unharmed");
    let rows = "SELECT concat_ws(' ', (SELECT count(*) FROM tagged), (SELECT v FROM keyed))";
    assert_eq!(cluster.psql(&made.name, rows), "9 theirs");
    assert!(agent.alarms("unresolved_rows").is_empty());

    // Without the genuine tag behind it a forged one is no tag: the row is nobody's to guess, and that is told.
    world.genuine_tags(false);
    world.emit(&world.delete_tag(&wrong, 1), "DELETE FROM tagged WHERE id = 1");
    assert!(world.seen().contains(&"opaque unresolved -".to_owned()));
    wait_for("the alarm", 60, || (!agent.alarms("unresolved_rows").is_empty()).then_some(()));
    assert_eq!(agent.stop(), Some(0));

    // The same under the right key.
    let key = cluster.psql("shop", "SELECT encode(mac_key, 'hex') FROM coffer.secret");
    let digit = |i: usize| u8::from_str_radix(&key[2 * i..2 * i + 2], 16).expect("hex");
    let right: MacKey = std::array::from_fn(digit);
    world.seen();
    world.emit(&world.delete_tag(&right, 2), "DELETE FROM tagged WHERE id = 2");
    assert_eq!(world.seen(), ["delete normal mallory"]);
    // It is about its own row, operation and table: beside any other change it is no tag.
    let (row, old) = (5.to_string(), Some(of("mallory")));
    let of_row = Tag { relid: world.tagged, op: TagOp::Delete, key: row.as_bytes(), old, new: None };
    let (update, elsewhere) = (Tag { op: TagOp::Update, new: old, ..of_row }, Tag { relid: world.keyed, ..of_row });
    for (message, id) in [
        (world.delete_tag(&right, 3), 4),
        (tag::encode_tag(&right, &update), 5),
        (tag::encode_tag(&right, &elsewhere), 5),
    ] {
        world.emit(&message, &format!("DELETE FROM tagged WHERE id = {id}"));
        assert_eq!(world.seen(), ["opaque unresolved -"], "{id}");
        world.cluster.psql("shop", &format!("INSERT INTO tagged VALUES ({id}, 'victim', 'again')"));
        world.seen();
    }
    world.genuine_tags(true);
    world.seen();
    world.emit(&world.move_tag(&right, 10), "UPDATE tagged SET v = 'z' WHERE id = 10");
    assert_eq!(world.seen(), ["delete normal victim", "insert normal mallory"]);
    world.emit(&world.fill(&right), "UPDATE keyed SET v = v WHERE false");
    assert_eq!(world.seen(), ["update normal victim"]);
    world.emit(&world.drop_marker(&right), "UPDATE keyed SET v = v WHERE false");
    assert_eq!(world.seen(), ["marker drop"]);
    for (kind, payload) in world.events() {
        world.emit(&tag::encode_marker(&right, kind, payload.as_bytes()), "UPDATE keyed SET v = v WHERE false");
        assert_eq!(world.seen(), [format!("marker {kind}")]);
    }
}

/// Rows that nobody can say whose they are close the table for every tenant, until its next base: on either side of what lies
/// between there is a restore, and in it none that has the table.
fn unattributed(major: u32) {
    let world = World::new(major);
    let cluster = &world.cluster;
    let mut agent = Agent::new(&Setup::of(cluster, "shop"));
    let release = agent.dir().join("release");
    agent.env = vec![("COFFER_FAILPOINTS".into(), format!("base-after-horizon@2=hold({})", release.display()))];
    agent.start();
    restored::wait_windows(&mut agent, &["victim", "mallory"]);
    let point = |name: &str| cluster.psql("shop", &format!("SELECT coffer.restore_point('{name}')"));
    let durable = || cluster.psql("shop", "SELECT coffer.wait_durable(timeout => '1min')");
    let counts = |db: &str| {
        cluster.psql(db, "SELECT concat_ws(' ', (SELECT count(*) FROM tagged), (SELECT count(*) FROM keyed))")
    };
    point("before");
    world.genuine_tags(false);
    cluster.psql("shop", "DELETE FROM tagged WHERE id IN (1, 10)");
    world.genuine_tags(true);
    point("between");
    durable();
    for tenant in ["victim", "mallory"] {
        let listed = restored::listed(&agent, tenant);
        let (windows, gaps) = (listed["window"].as_array().expect("spans"), listed["gaps"].as_array().expect("gaps"));
        assert_eq!((windows.len(), gaps.len()), (1, 1), "{listed}");
        assert_eq!(gaps[0]["reason"], "unresolved_rows: public.tagged", "{listed}");
        let (code, said) = agent.json_err(&restored::args_now(tenant, "name:between", "/nonexistent/between"));
        assert!(code == 4, "{code} {said}");
    }
    std::fs::write(release, "").expect("our folder");
    wait_for("the window to open again", 60, || {
        let spans = |t| restored::listed(&agent, t)["window"].as_array().map(Vec::len);
        (spans("victim") == Some(2) && spans("mallory") == Some(2)).then_some(())
    });
    cluster.psql("shop", "DELETE FROM tagged WHERE id IN (2, 11)");
    point("after");
    for (tenant, before, after) in [("victim", "9 1", "7 1"), ("mallory", "3 1", "1 1")] {
        for (name, want) in [("before", before), ("after", after)] {
            let made = Database::restore(&agent, cluster, tenant, &format!("name:{name}"));
            assert_eq!(counts(&made.name), want, "{tenant} {name}");
        }
        // The gap stays what it was, and the point in it, and the other table is not concerned.
        let listed = restored::listed(&agent, tenant);
        assert_eq!(listed["gaps"].as_array().map(Vec::len), Some(1), "{listed}");
        let (code, said) = agent.json_err(&restored::args_now(tenant, "name:between", "/nonexistent/between"));
        assert!(code == 4, "{code} {said}");
        let out = restored::Out::new();
        let mut args = restored::args_now(tenant, "name:between", out.arg());
        args.extend(["--table", "keyed"]);
        agent.json(&args);
    }
    // The row that was deleted meanwhile is back with its tenant only.
    agent.json(&restored::in_place("victim", "name:before"));
    assert_eq!(
        cluster.psql("shop", "SELECT string_agg(id::text, ' ' ORDER BY id) FROM tagged"),
        "1 2 3 4 5 6 7 8 9 12"
    );
    assert_eq!(agent.stop(), Some(0));
}
