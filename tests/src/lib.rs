//! What the out-of-process tests share: private PostgreSQL clusters, real S3 servers, real agents, the truth to compare
//! with. The tests reach the extension through SQL and the agent through its command line only.
//!
//! `make test` sets the environment (target/env.sh says where the servers and the binaries are).

pub mod agent;
pub mod cluster;
pub mod generate;
pub mod proxy;
pub mod restored;
pub mod s3;
pub mod sql_proxy;
pub mod stall;
pub mod truth;
pub mod workload;

use std::path::PathBuf;

/// A variable that target/env.sh sets.
pub fn env_path(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(v) => v.into(),
        None => panic!("{name} is not set: run the tests by `make test`, or `. target/env.sh` first"),
    }
}

/// The PostgreSQL majors that tests run on: 15 always, 18 too (`COFFER_TEST_MAJORS=15` restricts a run by hand).
pub fn majors() -> Vec<u32> {
    match std::env::var("COFFER_TEST_MAJORS") {
        Ok(v) => v.split(',').map(|m| m.trim().parse().expect("COFFER_TEST_MAJORS is a list of numbers")).collect(),
        Err(_) => vec![15, 18],
    }
}

/// The seed of a random test: `SEED` or a random one, printed so that a failure can be repeated.
pub fn seed() -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("SEED={seed}");
    seed
}

/// Runs an asynchronous test; what it spawns goes on while the test itself blocks on processes.
pub fn block_on<F: std::future::Future>(test: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(test)
}

/// A free TCP port on the loopback, below those that the kernel gives to outgoing connections: nobody takes it before it
/// is listened at.
pub fn free_port() -> u16 {
    loop {
        let port = 10_000 + rand::random::<u16>() % 20_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Waits until `check` yields a value; panics with `what` after `seconds`. Polls every 50 ms.
pub fn wait_for<T>(what: &str, seconds: u64, mut check: impl FnMut() -> Option<T>) -> T {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    loop {
        if let Some(v) = check() {
            return v;
        }
        assert!(std::time::Instant::now() < end, "waited {seconds} s in vain for {what}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
