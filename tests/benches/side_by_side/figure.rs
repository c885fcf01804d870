//! What a benchmark found: medians, their ratio, the bar; the table on the terminal and `bench.json`.

use serde_json::json;

/// Seconds of one repetition: elapsed, and the processor time of the process that does the work.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    pub seconds: f64,
    pub cpu: f64,
}

impl Took {
    /// Of what nobody counted the processor time.
    pub fn seconds(seconds: f64) -> Self {
        Self { seconds, cpu: 0.0 }
    }
}

/// What the runs count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Seconds,
    /// In [`Took::seconds`], too.
    Megabytes,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Megabytes => "MB",
        }
    }
}

/// One line of the result.
pub struct Figure {
    pub name: &'static str,
    pub unit: Unit,
    /// Ours at or below this share of the peer's time. `None`: nothing was promised.
    pub bar: Option<f64>,
    /// What each side ran.
    pub ours: String,
    pub peer: String,
    pub ours_runs: Vec<Took>,
    pub peer_runs: Vec<Took>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    assert!(n > 0, "no repetition was made");
    if n % 2 == 1 { values[n / 2] } else { (values[n / 2 - 1] + values[n / 2]) / 2.0 }
}

fn seconds(runs: &[Took]) -> f64 {
    median(runs.iter().map(|t| t.seconds).collect())
}

fn cpu(runs: &[Took]) -> f64 {
    median(runs.iter().map(|t| t.cpu).collect())
}

impl Figure {
    pub fn ratio(&self) -> f64 {
        seconds(&self.ours_runs) / seconds(&self.peer_runs)
    }

    /// Name, ratio and bar, when the bar is not met.
    pub fn miss(&self) -> Option<String> {
        let bar = self.bar?;
        // One that is no number has not met it.
        let is_met = self.ratio() <= bar;
        (!is_met).then(|| format!("{} ({:.3}, its bar is {bar:.2})", self.name, self.ratio()))
    }
}

/// The table.
pub fn print(figures: &[Figure]) {
    println!(
        "\n{:<12} {:>6} {:>6}      {:>8} {:>8}   {:>10} {:>10}",
        "", "ratio", "bar", "ours", "peer", "ours CPU", "peer CPU"
    );
    for f in figures {
        println!(
            "{:<12} {:>6.2} {:>6} {:<4} {:>6.2} {unit:<2}{:>6.2} {unit:<2}  {:>8.2} s {:>8.2} s   median of {}",
            f.name,
            f.ratio(),
            f.bar.map_or_else(|| "-".to_owned(), |b| format!("{b:.2}")),
            f.bar.map_or("", |_| if f.miss().is_none() { "met" } else { "MISS" }),
            seconds(&f.ours_runs),
            seconds(&f.peer_runs),
            cpu(&f.ours_runs),
            cpu(&f.peer_runs),
            f.ours_runs.len(),
            unit = f.unit.name(),
        );
    }
    for f in figures {
        println!("\n{}\n  ours: {}\n  peer: {}", f.name, f.ours, f.peer);
        for (who, runs) in [("ours", &f.ours_runs), ("peer", &f.peer_runs)] {
            let all: Vec<String> = runs.iter().map(|t| format!("{:.2}", t.seconds)).collect();
            println!("  {who} ({}): {}", f.unit.name(), all.join(" "));
        }
    }
}

/// `target/bench.json`, or where `COFFER_BENCH_JSON` says.
pub fn write(figures: &[Figure]) {
    let round = |x: f64| (x * 1000.0).round() / 1000.0;
    let raw = |runs: &[Took]| runs.iter().map(|t| round(t.seconds)).collect::<Vec<_>>();
    let document: Vec<_> = figures
        .iter()
        .map(|f| {
            json!({
                "name": f.name, "unit": f.unit.name(), "ratio": round(f.ratio()), "bar": f.bar.map(round),
                "ours_s": round(seconds(&f.ours_runs)), "peer_s": round(seconds(&f.peer_runs)),
                "ours": f.ours, "peer": f.peer,
                "ours_cpu_s": round(cpu(&f.ours_runs)), "peer_cpu_s": round(cpu(&f.peer_runs)),
                "ours_runs_s": raw(&f.ours_runs), "peer_runs_s": raw(&f.peer_runs),
            })
        })
        .collect();
    let path = std::env::var("COFFER_BENCH_JSON").unwrap_or_else(|_| "target/bench.json".into());
    let text = serde_json::to_string_pretty(&document).expect("plain values");
    std::fs::write(&path, text + "\n").unwrap_or_else(|e| panic!("cannot write {path}: {e}"));
    println!("\nwritten: {path}");
}
