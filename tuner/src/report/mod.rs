//! What a search found, in figures that say how good it is: speeds, distance from the roofline, gains.

mod explain;
mod html;

use std::collections::BTreeMap;

use serde::Serialize;
use ternion_compiler::Schedule;

use crate::request::{Choices, ClassResult, Found, Phases, Problem, Request, Source, Trial};
use crate::{Class, CpuProfile};

pub use explain::explain;

/// The two limits of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roofline {
    /// Memory read bandwidth of all threads together, in bytes per second.
    pub bandwidth: Option<f64>,
    /// Multiply-adds per second of the fastest kernel that was measured, of all threads together.
    pub peak: Option<f64>,
}

impl Roofline {
    /// Seconds that a product cannot be faster than: its weights have to be read and its multiply-adds to be done.
    fn least(&self, bytes: f64, macs: f64) -> Option<f64> {
        let (memory, arithmetic) = (self.bandwidth.map(|roof| bytes / roof), self.peak.map(|roof| macs / roof));
        memory.into_iter().chain(arithmetic).reduce(f64::max)
    }
}

/// One line of the report: the winner of one class of one shape.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The shape and how often the model has it.
    #[serde(flatten)]
    pub problem: Problem,
    /// Columns.
    pub class: Class,
    /// The winner.
    pub schedule: Schedule,
    /// Median time of one product, in microseconds.
    pub us: f64,
    /// Energy of one product in joules, if it was measured.
    pub joules: Option<f64>,
    /// Bytes of weights per second, in GB/s.
    pub gb_per_s: f64,
    /// Multiply-adds per second, in billions.
    pub gmac_per_s: f64,
    /// The roofline's time over the measured one, in percent.
    pub roofline_percent: Option<f64>,
    /// How many times faster than the guess of an untuned start.
    pub gain_over_guess: Option<f64>,
    /// Whether it is slower than that beyond noise, so that all classes together are faster.
    pub pays: bool,
    /// How many times faster than the median of all that was measured.
    pub gain_over_median: f64,
    /// How many times faster than the slowest.
    pub gain_over_worst: f64,
    /// Schedules that were measured.
    pub tried: usize,
}

/// The report of a search.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The machine.
    pub machine: CpuProfile,
    /// Threads.
    pub threads: usize,
    /// Its limits.
    pub roofline: Roofline,
    /// Bytes that a token reads besides the matrices.
    pub beside: usize,
    /// One row per shape and class that was measured.
    pub rows: Vec<Row>,
    /// Wall time in seconds.
    pub spent_s: f64,
    /// And of its parts.
    pub phases: Phases,
    /// Everything that was measured.
    pub trials: Vec<Trial>,
    /// What went wrong.
    pub warnings: Vec<String>,
}

impl Report {
    /// The report of `choices` for `request` on `machine`, whose memory reads `bandwidth` bytes per second.
    #[must_use]
    pub fn new(
        request: &Request,
        choices: &Choices,
        machine: CpuProfile,
        threads: usize,
        bandwidth: Option<f64>,
    ) -> Self {
        let mut roofline = Roofline { bandwidth, peak: None };
        let mut rows: Vec<Row> =
            choices.found.iter().filter(|found| found.source != Source::Guess).flat_map(rows).collect();
        let speeds = rows.iter().map(|row| row.gmac_per_s * 1e9);
        let tried = choices.trials.iter().map(|trial| macs(trial.m, trial.k, trial.class) / (trial.us * 1e-6));
        roofline.peak = speeds.chain(tried).filter(|speed| speed.is_finite()).reduce(f64::max);
        for row in &mut rows {
            let Problem { m, k, .. } = row.problem;
            let least = roofline.least(bytes(m, k, &row.schedule), macs(m, k, row.class));
            row.roofline_percent = least.map(|least| 100.0 * least / (row.us * 1e-6));
        }
        Self {
            machine,
            threads,
            roofline,
            beside: request.beside,
            rows,
            spent_s: choices.spent.as_secs_f64(),
            phases: choices.phases,
            trials: choices.trials.clone(),
            warnings: choices.warnings.iter().map(ToString::to_string).collect(),
        }
    }

    /// One self-contained page.
    #[must_use]
    pub fn html(&self) -> String {
        html::page(self)
    }

    /// A table for the terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let mut lines = vec![
            "shape        n       µs/product      speed         roofline  × guess  × median  × worst  of     schedule"
                .to_owned(),
        ];
        for row in &self.rows {
            let Problem { m, k, .. } = row.problem;
            let speed = if row.class == Class::One {
                format!("{:.1} GB/s", row.gb_per_s)
            } else {
                format!("{:.0} GMAC/s", row.gmac_per_s)
            };
            let percent = row.roofline_percent.map_or("-".to_owned(), |percent| format!("{percent:.0} %"));
            let guess = row.gain_over_guess.map_or("-".to_owned(), |gain| format!("{gain:.2}"));
            lines.push(format!(
                "{:<12} {:<7} {:>10.1} {:>16} {percent:>11} {guess:>8} {:>9.2} {:>8.2}  {:<5}  {}",
                format!("{m}x{k}"),
                row.class.name(),
                row.us,
                speed,
                row.gain_over_median,
                row.gain_over_worst,
                row.tried,
                row.schedule
            ));
        }
        lines.extend(self.remarks());
        lines.join("\n") + "\n"
    }

    /// What the figures alone do not say.
    fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let mut paying: BTreeMap<(usize, usize), Vec<&str>> = BTreeMap::new();
        for row in self.rows.iter().filter(|row| row.pays) {
            paying.entry((row.problem.m, row.problem.k)).or_default().push(row.class.name());
        }
        remarks.extend(paying.into_iter().map(|((m, k), classes)| {
            let classes = classes.join(", ");
            format!("{m}x{k}: n={classes} slower than the guess for the others' sake: together they are faster in this layout")
        }));
        let weights: f64 = self
            .rows
            .iter()
            .filter(|row| row.class == Class::One)
            .map(|row| bytes(row.problem.m, row.problem.k, &row.schedule) * row.problem.count as f64)
            .sum();
        let weights = if weights > 0.0 { weights + self.beside as f64 } else { 0.0 };
        let cache = self.machine.last_level_bytes() as f64;
        if weights > 0.0 && weights <= cache {
            let [weights, cache] = [weights, cache].map(|bytes| bytes / 1e6);
            remarks.push(format!(
                "the last-level cache ({cache:.1} MB) holds all {weights:.1} MB of weights: they were measured from there, as they will be read"
            ));
        }
        remarks
    }
}

fn macs(m: usize, k: usize, class: Class) -> f64 {
    m as f64 * k as f64 * class.measured() as f64
}

fn bytes(m: usize, k: usize, schedule: &Schedule) -> f64 {
    schedule.layout.bytes(m, k).unwrap_or(0) as f64
}

fn rows(found: &Found) -> impl Iterator<Item = Row> {
    let Found { problem, choice, results, .. } = found;
    results.iter().map(move |result| {
        let ClassResult { class, figures, tried, median_us, worst_us, guess_us, joules, pays } = *result;
        let (schedule, us) = (choice.of(class), figures.median_us);
        Row {
            problem: *problem,
            class,
            schedule,
            us,
            joules,
            gb_per_s: bytes(problem.m, problem.k, &schedule) / us * 1e-3,
            gmac_per_s: macs(problem.m, problem.k, class) / us * 1e-3,
            roofline_percent: None,
            gain_over_guess: guess_us.map(|guess| guess / us),
            pays,
            gain_over_median: median_us / us,
            gain_over_worst: worst_us / us,
            tried,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Budget, Choice, Figures, probe};
    use std::time::Duration;

    fn report() -> Report {
        report_of(0)
    }

    /// With so many bytes beside the matrices.
    fn report_of(beside: usize) -> Report {
        let schedule: Schedule = "mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1".parse().unwrap();
        let choice = Choice::pair(schedule, schedule);
        let figures = Figures { minimum_us: 90.0, median_us: 100.0, samples: 9 };
        let result = |class| ClassResult {
            class,
            figures,
            joules: None,
            tried: 3,
            median_us: 150.0,
            worst_us: 400.0,
            guess_us: Some(120.0),
            pays: class == Class::Chunk,
        };
        let problem = Problem { m: 1000, k: 4000, count: 2 };
        let found = Found {
            problem,
            choice,
            source: Source::Raced,
            results: vec![result(Class::One), result(Class::Chunk)],
            raced: 3,
            alternatives: Vec::new(),
        };
        let trial = |us| Trial { m: 1000, k: 4000, class: Class::One, schedule, us };
        let choices = Choices {
            found: vec![found],
            spent: Duration::from_secs(1),
            phases: Phases { racing: Duration::from_millis(600), ..Phases::default() },
            sparse: None,
            trials: vec![trial(100.0), trial(150.0), trial(400.0)],
            warnings: Vec::new(),
        };
        let mut machine = probe();
        // 32 MiB are assumed.
        machine.caches.clear();
        let request = Request { beside, ..Request::new(vec![problem], Budget::RACE) };
        Report::new(&request, &choices, machine, 2, Some(20e9))
    }

    #[test]
    fn a_row_says_speed_distance_from_the_roofline_and_gains() {
        let report = report();
        let row = &report.rows[0];
        // 1000 rows of 1008 bytes (whole vectors) in 100 µs, where 20 GB/s would take 50.4.
        assert!((row.gb_per_s - 10.08).abs() < 0.1, "{row:?}");
        assert!((row.roofline_percent.unwrap() - 50.4).abs() < 1.0, "{row:?}");
        assert_eq!(row.gain_over_guess, Some(1.2));
        assert_eq!((row.gain_over_median, row.gain_over_worst, row.tried), (1.5, 4.0, 3));
        // The fastest kernel is the peak itself.
        assert!((report.rows[1].roofline_percent.unwrap() - 100.0).abs() < 1.0);
        let table = report.table();
        assert_eq!(table.lines().count(), 5);
        assert!(table.contains("1000x4000: n=33-128 slower than the guess"));
        assert!(table.contains("holds all 2.0 MB of weights"), "{table}");
        let with_head = report_of(40 << 20).table();
        assert!(!with_head.contains("of weights"), "{with_head}");
    }

    #[test]
    fn the_page_is_self_contained_and_escapes_what_it_quotes() {
        let mut report = report();
        report.warnings.push("<script>alert(1)</script>".to_owned());
        let page = report.html();
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        for reference in ["src=", "href=\"http", "url(", "<script", "@import"] {
            assert!(!page.contains(reference), "{reference}");
        }
        assert!(page.contains("&lt;script&gt;"));
        assert!(report.remarks().iter().all(|remark| page.contains(remark)), "what the table says below it");
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    }
}
