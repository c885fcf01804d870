//! Progress of a long verb: a bar on a terminal, nothing elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(200);

/// A counter that a bar follows until it is dropped.
pub struct Progress {
    pub count: Arc<AtomicU64>,
    bar: ProgressBar,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Progress {
    /// `what` is being done; `total` 0: not known.
    pub fn new(what: &str, unit: &str, total: u64, json: bool) -> Self {
        let count = Arc::new(AtomicU64::new(0));
        if json || !std::io::stderr().is_terminal() {
            return Self { count, bar: ProgressBar::hidden(), task: None };
        }
        let bar = if total == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total) };
        let template = if total == 0 {
            format!("{{spinner}} {what}: {{human_pos}} {unit}, {{elapsed}}")
        } else {
            format!("{what} [{{bar:30}}] {{human_pos}}/{{human_len}} {unit}, {{eta}} left")
        };
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        let (b, c) = (bar.clone(), count.clone());
        let task = tokio::spawn(async move {
            loop {
                b.set_position(c.load(Ordering::Relaxed));
                b.tick();
                tokio::time::sleep(TICK).await;
            }
        });
        Self { count, bar, task: Some(task) }
    }

    /// A bar of something whose parts are not counted: [`Self::part`] says how much of it is done.
    pub fn of_parts(what: &str, json: bool) -> Self {
        let count = Arc::new(AtomicU64::new(0));
        if json || !std::io::stderr().is_terminal() {
            return Self { count, bar: ProgressBar::hidden(), task: None };
        }
        let bar = ProgressBar::new(1000);
        if let Ok(style) =
            ProgressStyle::with_template(&format!("{what} [{{bar:30}}] {{percent}} % {{msg}}, {{elapsed}}"))
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        Self { count, bar, task: None }
    }

    /// How much is done, 0 to 1, and in words.
    pub fn part(&self, done: f64, message: &str) {
        self.bar.set_position((done.clamp(0.0, 1.0) * 1000.0) as u64);
        self.bar.set_message(message.to_owned());
    }

    pub fn add(&self, n: u64) {
        self.count.fetch_add(n, Ordering::Relaxed);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(t) = &self.task {
            t.abort();
        }
        self.bar.finish_and_clear();
    }
}
