//! What the other tests lean on does what it says.

use coffer_tests::block_on;
use coffer_tests::cluster::Cluster;
use coffer_tests::truth;
use coffer_tests::workload::{self, TENANTS, Workload};
use std::time::Duration;

on_majors! {
    the_writers_write: the_writers_write;
}

fn the_writers_write(major: u32) {
    block_on(async {
        let seed = coffer_tests::seed();
        let cluster = Cluster::start(major);
        workload::prepare(&cluster, "shop");
        let tables = workload::watched();
        let mut observer = workload::observer(&cluster, "shop").await;
        let load = Workload::start(&cluster, "shop", 8, seed, Duration::from_millis(5));
        load.after(150).await;
        let one = truth::take(&mut observer, &tables, "one").await;
        load.after(150).await;
        cluster.kill9();
        cluster.up();
        load.after(150).await;
        let mut observer = workload::observer(&cluster, "shop").await;
        let two = truth::take(&mut observer, &tables, "two").await;
        load.freeze(1);
        let still = truth::take(&mut observer, &tables, "still").await;
        load.after(100).await;
        let wrong = still.differences(&observer, &tables, "1").await;
        assert!(wrong.is_empty(), "a tenant that is left alone changed: {wrong:#?}");
        let (committed, failed) = load.stop().await;
        println!("{committed} committed, {failed} failed");
        assert!(failed * 4 < committed, "{failed} of {committed} transactions failed");
        for tenant in TENANTS {
            assert!(one.tenants[tenant].len() >= 5, "tenant {tenant} has rows in few tables");
            assert!(one.tenants[tenant] != two.tenants[tenant], "tenant {tenant} did not change");
        }
        assert_eq!(cluster.psql("shop", "SELECT count(*) FROM pg_prepared_xacts"), "0");
    });
}
