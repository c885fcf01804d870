//! With the source and the agent's host gone: one region of two, the keyring and the KEK are enough.

use coffer_tests::agent::{Agent, Setup};
use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::restored::{self, Database, Scratch};
use coffer_tests::truth;
use coffer_tests::workload::{self, TENANTS, Workload};
use std::time::Duration;

on_majors! {
    one_region_is_enough: one_region_is_enough;
}

fn one_region_is_enough(major: u32) {
    block_on(async {
        let seed = coffer_tests::seed();
        let regions = tempfile::tempdir().expect("a folder");
        let store = |name: &str| {
            format!("[[store]]\nname = \"{name}\"\nurl = \"file://{}/{name}\"\n", regions.path().display())
        };
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let tables = workload::watched();
        let mut setup = Setup::of(&cluster, "shop");
        setup.stores = store("eu") + &store("us");
        let mut agent = Agent::new(&setup);
        agent.start();
        restored::wait_windows(&mut agent, &TENANTS);
        let mut observer = workload::observer(&cluster, "shop").await;
        let load = Workload::start(&cluster, "shop", 4, seed, Duration::from_millis(10));
        load.after(300).await;
        let earlier = truth::take(&mut observer, &tables, "earlier").await;
        load.after(100).await;
        load.stop().await;
        let truth = truth::take(&mut observer, &tables, "last").await;
        cluster.psql("shop", "SELECT coffer.wait_durable()");
        agent.kill9();
        drop(observer);
        cluster.stop("immediate");

        // Another machine: only the second region, the keyring and the KEK come along.
        std::fs::remove_dir_all(regions.path().join("eu")).expect("the first region is gone");
        std::fs::remove_dir_all(agent.dir().join("spool")).ok();
        setup.stores = store("us");
        agent.configure(&setup);
        let other = Cluster::start(major);
        let scratch = Scratch::new(&other, workload::DDL).await;
        let mut wrong = Vec::new();
        for tenant in TENANTS {
            for truth in [&earlier, &truth] {
                wrong.extend(scratch.check(&agent, truth, &tables, tenant).await);
            }
            wrong.extend(Database::check(&agent, &other, &truth, &tables, tenant).await);
        }
        assert!(wrong.is_empty(), "SEED={seed}: {wrong:#?}");
        let verify = agent.json(&["verify"]);
        assert_eq!(verify["ok"], true, "{verify}");

        // The full configuration with the first region gone: an error, unless the second one is named.
        setup.stores = store("eu") + &store("us");
        agent.configure(&setup);
        let out = restored::Out::new();
        let mut args = restored::args("3", "name:last", "files", out.arg());
        let (code, doc) = agent.json_err(&args);
        assert_eq!(code, 8, "a required region is missing: {doc}");
        assert!(out.names().is_empty());
        args.extend(["--from", "us"]);
        agent.json(&args);
        scratch.load(&out).await;
        let wrong = truth.differences(&scratch.client, &tables, "3").await;
        assert!(wrong.is_empty(), "{wrong:#?}");
    });
}
