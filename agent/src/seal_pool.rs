//! Threads for work that only computes: compressing and sealing. Async tasks hand it over and wait.

use crate::error::{Error, Result};
use crossbeam_channel::Sender;
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// A fixed number of threads. They end when the pool is dropped and its queue is empty.
pub struct SealPool {
    tx: Sender<Job>,
}

impl SealPool {
    /// One thread per core, but not fewer than two: sealing and the demultiplexer share the machine with the source.
    pub fn new() -> Result<Self> {
        let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
        // Jobs hold their buffers, which are bounded elsewhere; a short queue keeps the order of arrival meaningful.
        let (tx, rx) = crossbeam_channel::unbounded::<Job>();
        for i in 0..threads {
            let rx = rx.clone();
            std::thread::Builder::new()
                .name(format!("seal {i}"))
                .spawn(move || rx.iter().for_each(|job| job()))
                .map_err(|e| Error::other("cannot start a thread").source(e))?;
        }
        Ok(Self { tx })
    }

    /// Runs `work` on one of the threads.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (done, result) = oneshot::channel();
        let job = Box::new(move || {
            // The task that waited may be gone; then so is the use of the result.
            let _ = done.send(work());
        });
        self.tx.send(job).map_err(|_| Error::other("the sealing threads have stopped"))?;
        result.await.map_err(|_| Error::other("a sealing thread panicked"))
    }
}
