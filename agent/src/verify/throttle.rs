//! A bound of what is read from the stores in a second, for readers on threads of their own.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What was not read for so long may not be caught up with at once.
const LONGEST_CREDIT: Duration = Duration::from_secs(1);
/// A sleep in one piece: it may be ended.
const NAP: Duration = Duration::from_millis(100);

/// Shared by all readers that it bounds.
pub struct Throttle {
    /// Bytes a second.
    rate: u64,
    /// When what was read so far is paid for.
    paid: Mutex<Instant>,
    /// Whoever reads is to stop.
    over: Arc<AtomicBool>,
}

impl Throttle {
    pub fn new(rate: u64, over: Arc<AtomicBool>) -> Self {
        Self { rate: rate.max(1), paid: Mutex::new(Instant::now()), over }
    }

    /// Waits until `bytes` more may be read. False: they are wanted no more.
    fn take(&self, bytes: u64) -> bool {
        let until = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let earliest = Instant::now().checked_sub(LONGEST_CREDIT).unwrap_or(*paid);
            *paid = (*paid).max(earliest) + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            *paid
        };
        loop {
            if self.over.load(Ordering::Relaxed) {
                return false;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

/// Reads no faster than a [`Throttle`] has it.
pub struct Throttled<R> {
    inner: R,
    throttle: Arc<Throttle>,
}

impl<R> Throttled<R> {
    pub fn new(inner: R, throttle: Arc<Throttle>) -> Self {
        Self { inner, throttle }
    }
}

impl<R: Read> Read for Throttled<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(out)?;
        if n > 0 && !self.throttle.take(n as u64) {
            return Err(io::Error::other("the agent is stopping"));
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_takes_as_long_as_the_rate_says_and_ends_when_it_is_told() {
        let over = Arc::new(AtomicBool::new(false));
        let throttle = Arc::new(Throttle::new(100_000, over.clone()));
        let began = Instant::now();
        let mut read = Throttled::new(&[7u8; 40_000][..], throttle.clone());
        let mut to = Vec::new();
        read.read_to_end(&mut to).unwrap();
        assert_eq!(to.len(), 40_000);
        assert!(began.elapsed() >= Duration::from_millis(395), "{:?}", began.elapsed());
        over.store(true, Ordering::Relaxed);
        assert!(Throttled::new(&[7u8; 10][..], throttle).read_to_end(&mut to).is_err());
    }
}
