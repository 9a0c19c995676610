//! What a machine's kernels are worth in one table: decoding, prompts, packings, sparse kernels, compiling.
//!
//! Every part is a race of its own: the schedules that are worth measuring run a few rounds, the best of each kind then run
//! many rounds more, and only those count. What is compared with each other ran in the same rounds.

use std::fmt::Write as _;

use serde::Serialize;
use ternion_compiler::{Columns, Family, Feature, KernelSpec, MachineKind, Schedule, code_bytes, compile};
use ternion_tuner::{Stopwatch, Workers};

use crate::row::cpu_name;
use crate::{Bench, BenchError, Case, Entrant, Row, Shape, Weights, spec};

/// Rounds in which the best are found.
const SCREENING: usize = 5;

/// Schedules of each kind that run on.
const KEPT: usize = 3;

/// Times that each kernel is compiled; the median counts.
const COMPILATIONS: usize = 9;

/// The two projections of BitNet b1.58 2B4T that decide how fast it decodes: down, and gate and up.
const DOWN: Shape = Shape { m: 2560, k: 6912 };
const UP: Shape = Shape { m: 6912, k: 2560 };

/// The matrix and the columns of the prompt.
const PROMPT: (Shape, usize) = (Shape { m: 2560, k: 2560 }, 128);

/// What is left out where: rows of the up-projection, columns of the down-projection.
const SPARSE: [(Shape, Columns); 2] = [(UP, Columns::ListedRows), (DOWN, Columns::ListedColumns)];

/// Records that are left out, in percent.
const ZEROS: [u8; 2] = [0, 70];

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Aim {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was measured.
    pub what: String,
    /// From the medians of all rounds.
    pub value: f64,
    /// From the fastest rounds, where that is another figure.
    pub fastest: Option<f64>,
    /// Its unit.
    pub unit: &'static str,
    /// What it should be.
    pub aim: Option<Aim>,
    /// Whose figure it is.
    pub schedule: Option<Schedule>,
}

/// The table of a machine.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The CPU.
    pub cpu: String,
    /// Threads that count as all cores.
    pub threads: usize,
    /// Rounds behind each figure.
    pub rounds: usize,
    /// Memory as all threads read it, in GB/s.
    pub read_gb_per_s: Option<f64>,
    /// The clock, in GHz.
    pub ghz: Option<f64>,
    /// The lines.
    pub findings: Vec<Finding>,
    /// Everything behind them.
    pub rows: Vec<Row>,
}

impl Report {
    /// Measures everything: on `all` threads what is bound by memory, on `one` what is counted per core. `step` is told
    /// what comes next and ends the measurement by returning false.
    ///
    /// # Errors
    /// If there is nothing or no memory to measure on.
    pub fn measure(
        all: &dyn Workers,
        one: &dyn Workers,
        stopwatch: &dyn Stopwatch,
        rounds: usize,
        step: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Self, BenchError> {
        let mut report = Self { cpu: cpu_name(), rounds, ..Self::default() };
        {
            let mut bench = Bench::new(all, stopwatch)?;
            report.threads = bench.threads();
            for shape in [DOWN, UP] {
                if step(&format!("decoding {shape}")) {
                    report.decoding(&mut bench, shape);
                }
            }
            for (shape, listed) in SPARSE {
                if step(&format!("sparse {shape}")) {
                    report.sparse(&mut bench, shape, listed);
                }
            }
        }
        let mut bench = Bench::new(one, stopwatch)?;
        if step("prompts") {
            report.prompts(&mut bench, PROMPT);
        }
        if bench.threads() != report.threads {
            for (shape, listed) in SPARSE {
                if step(&format!("sparse {shape} on one thread")) {
                    report.sparse(&mut bench, shape, listed);
                }
            }
        }
        if step("compiling") {
            report.compiling(&bench);
        }
        Ok(report)
    }

    /// One column, weights cold.
    fn decoding(&mut self, bench: &mut Bench<'_>, shape: Shape) {
        let cases = cases(bench, shape, 1, Weights::Cold);
        let rows = race(bench, &cases, self.rounds, &|row| (row.family.clone(), row.machine == "clif128"));
        self.read_gb_per_s = rows.iter().find_map(|row| row.read_gb_per_s).or(self.read_gb_per_s);
        self.ghz = rows.iter().find_map(|row| row.ghz).or(self.ghz);
        let bandwidth = |what: &str, row: Option<&Row>, aim| {
            let row = row?;
            Some(Finding {
                what: format!("decode {shape}, cold, {}: {what}", threads(bench)),
                value: 100.0 * row.of_read?,
                fastest: row.of_read_fastest.map(|part| 100.0 * part),
                unit: "% of read bandwidth",
                aim: Some(Aim::AtLeast(aim)),
                schedule: Some(row.schedule),
            })
        };
        // Bytes are what memory limits: of two packings the one that reads faster has the better kernel.
        let fullest = |keep: &dyn Fn(&Row) -> bool| best(&rows, keep, |row| row.gb_per_s);
        self.findings.extend(bandwidth("best", fullest(&|_| true), 85.0));
        let portable = MachineKind::Clif128.to_string();
        self.findings.extend(bandwidth("best of clif128", fullest(&|row| row.machine == portable), 60.0));
        let bits = |row: &Row| 8.0 * row.bytes / (row.m as f64 * row.k as f64);
        let fastest = |keep: &dyn Fn(&Row) -> bool| best(&rows, keep, |row| row.gweights_per_s);
        let two_bits = fastest(&|row| bits(row) >= 1.9);
        let fewer = fastest(&|row| bits(row) < 1.9);
        let names = [("2 bits per weight", two_bits, None), ("fewer bits per weight", fewer, two_bits)];
        for (what, row, rival) in names {
            let Some((row, value)) = row.and_then(|row| Some((row, row.gweights_per_s?))) else { continue };
            let aim = rival.and_then(|rival| rival.gweights_per_s).map(Aim::AtLeast);
            self.findings.push(Finding {
                what: format!("decode {shape}, cold, {}: best of {what}", threads(bench)),
                value,
                fastest: None,
                unit: "Gweights/s",
                aim,
                schedule: Some(row.schedule),
            });
        }
        self.rows.extend(rows);
    }

    /// Many columns: arithmetic is the limit.
    fn prompts(&mut self, bench: &mut Bench<'_>, (shape, n): (Shape, usize)) {
        let cases = cases(bench, shape, n, Weights::Hot);
        let rows = race(bench, &cases, self.rounds, &|row| row.family.clone());
        let wide = bench.cpu().has(Feature::Avx512vnni) && bench.cpu().has(Feature::Avx512bw);
        let aim = Aim::AtLeast(if wide { 180.0 } else { 70.0 });
        let mut families: Vec<_> = rows.iter().map(|row| row.schedule.family).collect();
        families.sort_unstable();
        families.dedup();
        let overall = best(&rows, &|_| true, |row| row.gmac_per_s).map(|row| row.schedule.family);
        for family in families {
            let row = best(&rows, &|row| row.schedule.family == family, |row| row.gmac_per_s);
            let Some((row, value)) = row.and_then(|row| Some((row, row.gmac_per_s?))) else { continue };
            self.findings.push(Finding {
                what: format!("prompt of {n}, {shape}, {}: best {family}", threads(bench)),
                value,
                fastest: row.fastest_us.map(|us| row.case().macs() / us * 1e-3),
                unit: "GMAC/s",
                aim: (overall == Some(family)).then_some(aim),
                schedule: Some(row.schedule),
            });
        }
        self.rows.extend(rows);
    }

    /// Listed records against the best dense kernel, in the same rounds.
    fn sparse(&mut self, bench: &mut Bench<'_>, shape: Shape, listed: Columns) {
        let mut cases = cases(bench, shape, 1, Weights::Cold);
        for family in Family::ALL.into_iter().filter(|family| family.list() == Some(listed)) {
            for schedule in Schedule::candidates(&spec(family, shape, false), bench.cpu()) {
                let case = |zeros| Case { shape, n: 1, schedule, weights: Weights::Cold, zeros };
                cases.extend(ZEROS.map(case));
            }
        }
        let rows = race(bench, &cases, self.rounds, &|row| (row.schedule.family.list().is_some(), row.zeros));
        let time = |zeros: Option<u8>, of: fn(&Row) -> Option<f64>| {
            let is_it = |row: &Row| match zeros {
                None => row.schedule.family.list().is_none(),
                Some(zeros) => row.schedule.family.list().is_some() && row.zeros == zeros,
            };
            let row = best(&rows, &is_it, |row| row.median_us.map(|us| -us))?;
            Some((of(row)?, row.schedule))
        };
        for (zeros, aim) in ZEROS.into_iter().zip([1.1, 0.5]) {
            let ratio = |of| Some(time(Some(zeros), of)?.0 / time(None, of)?.0);
            let fastest = time(Some(zeros), |row| row.median_us);
            let (Some(value), Some((_, schedule))) = (ratio(|row| row.median_us), fastest) else { continue };
            self.findings.push(Finding {
                what: format!("{} of {shape}, {zeros} % zeros, {}", schedule.family, threads(bench)),
                value,
                fastest: ratio(|row| row.fastest_us),
                unit: "of the dense time",
                aim: Some(Aim::AtMost(aim)),
                schedule: Some(schedule),
            });
        }
        self.rows.extend(rows);
    }

    /// The kernels of a model, as the tuner would choose them before it has measured anything.
    fn compiling(&mut self, bench: &Bench<'_>) {
        let dense =
            [DOWN, UP].into_iter().flat_map(|shape| [Columns::One, Columns::Many].map(|columns| (shape, columns)));
        let jobs: Vec<_> = dense
            .chain(SPARSE)
            .filter_map(|(shape, columns)| {
                let k = if columns == Columns::ListedColumns { shape.m } else { shape.k };
                let spec = KernelSpec { k, columns };
                Some((spec, *Schedule::candidates(&spec, bench.cpu()).first()?))
            })
            .collect();
        let milliseconds = |work: &dyn Fn() -> bool| {
            let mut times: Vec<_> = (0..COMPILATIONS)
                .filter_map(|_| {
                    let start = bench.stopwatch().elapsed();
                    work().then(|| bench.stopwatch().elapsed().saturating_sub(start).as_secs_f64() * 1e3)
                })
                .collect();
            times.sort_unstable_by(f64::total_cmp);
            times.get(times.len() / 2).copied()
        };
        let slowest = jobs
            .iter()
            .filter_map(|(spec, schedule)| {
                let time = milliseconds(&|| code_bytes(spec, schedule, bench.cpu()).is_ok())?;
                Some((time, *schedule))
            })
            .max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((value, schedule)) = slowest {
            self.findings.push(Finding {
                what: "compiling one kernel of a model, the slowest".to_owned(),
                value,
                fastest: None,
                unit: "ms",
                aim: Some(Aim::AtMost(2.0)),
                schedule: Some(schedule),
            });
        }
        if let Some(value) = milliseconds(&|| compile(&jobs, bench.cpu()).is_ok()) {
            self.findings.push(Finding {
                what: format!("compiling and checking all {} kernels of a model", jobs.len()),
                value,
                fastest: None,
                unit: "ms",
                aim: Some(Aim::AtMost(100.0)),
                schedule: None,
            });
        }
    }

    /// The table, as Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!("{}, {} threads", self.cpu, self.threads);
        let number = |value: Option<f64>, unit| value.map_or(String::new(), |value| format!(", {value:.1} {unit}"));
        text += &number(self.read_gb_per_s, "GB/s read by all threads");
        text += &number(self.ghz, "GHz");
        let _ = write!(
            text,
            "; medians of {} interleaved rounds, in parentheses the fastest round\n\n| what | measured | aim | | schedule |\n|---|---|---|---|---|\n",
            self.rounds
        );
        for Finding { what, value, fastest, unit, aim, schedule } in &self.findings {
            let digits = if *value < 10.0 { 2 } else { 0 };
            let fastest = fastest.map_or(String::new(), |fastest| format!(" ({fastest:.digits$})"));
            let (words, met) = match aim {
                None => (String::new(), ""),
                Some(Aim::AtLeast(aim)) => (format!("≥ {aim:.digits$}"), if value >= aim { "yes" } else { "no" }),
                Some(Aim::AtMost(aim)) => (format!("≤ {aim}"), if value <= aim { "yes" } else { "no" }),
            };
            let schedule = schedule.map_or(String::new(), |schedule| format!("`{schedule}`"));
            let _ = writeln!(text, "| {what} | {value:.digits$}{fastest} {unit} | {words} | {met} | {schedule} |");
        }
        text
    }
}

fn threads(bench: &Bench<'_>) -> String {
    if bench.threads() == 1 { "1 thread".to_owned() } else { format!("{} threads", bench.threads()) }
}

/// The dense schedules that are worth measuring.
fn cases(bench: &Bench<'_>, shape: Shape, n: usize, weights: Weights) -> Vec<Case> {
    let columns = if n > 1 { Columns::Many } else { Columns::One };
    let schedules = Schedule::candidates(&KernelSpec { k: shape.k, columns }, bench.cpu());
    schedules.into_iter().map(|schedule| Case { shape, n, schedule, weights, zeros: 0 }).collect()
}

/// Measures `cases` in a few rounds, and the best of each `kind` in `rounds` more. The rows are those of the latter.
fn race<K: PartialEq>(bench: &mut Bench<'_>, cases: &[Case], rounds: usize, kind: &dyn Fn(&Row) -> K) -> Vec<Row> {
    let cpu = cpu_name();
    // A kernel that was refused is no rival; `lab run` says why.
    let mut entrants: Vec<Entrant> = bench.prepare(cases).into_iter().filter_map(Result::ok).collect();
    let samples = bench.measure(&mut entrants, SCREENING, &mut |_| false);
    let rows = Row::of(bench, &entrants, &samples, &cpu);
    let mut order: Vec<_> = (0..rows.len()).collect();
    let time = |at: usize| rows[at].fastest_us.unwrap_or(f64::INFINITY);
    order.sort_by(|a, b| time(*a).total_cmp(&time(*b)));
    let mut kept = vec![false; rows.len()];
    for at in &order {
        let of_kind = order.iter().filter(|other| kept[**other] && kind(&rows[**other]) == kind(&rows[*at])).count();
        kept[*at] = of_kind < KEPT;
    }
    let mut kept = kept.into_iter();
    entrants.retain(|_| kept.next() == Some(true));
    let samples = bench.measure(&mut entrants, rounds, &mut |_| false);
    Row::of(bench, &entrants, &samples, &cpu)
}

/// The row with the largest figure among those to keep.
fn best<'a>(rows: &'a [Row], keep: &dyn Fn(&Row) -> bool, of: fn(&Row) -> Option<f64>) -> Option<&'a Row> {
    let kept = rows.iter().filter(|row| keep(row)).filter_map(|row| Some((row, of(row)?)));
    kept.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(row, _)| row)
}

#[cfg(test)]
mod tests {
    use ternion_tuner::SystemStopwatch;

    use super::*;

    /// The caller alone.
    struct Alone;

    impl Workers for Alone {
        fn threads(&self) -> usize {
            1
        }

        fn run(&self, work: &(dyn Fn(usize) + Sync)) {
            work(0);
        }
    }

    #[test]
    fn every_part_finds_something_and_says_whose_it_is() {
        let stopwatch = SystemStopwatch::start();
        let mut bench = Bench::new(&Alone, &stopwatch).expect("a machine to measure on");
        let mut report = Report { rounds: 2, ..Report::default() };
        let shape = Shape { m: 64, k: 256 };
        report.decoding(&mut bench, shape);
        report.prompts(&mut bench, (shape, 8));
        for (_, listed) in SPARSE {
            report.sparse(&mut bench, shape, listed);
        }
        report.compiling(&bench);
        for words in
            ["best of clif128", "2 bits", "best mad", "sparse-rows of 64x256, 70", "sparse-columns of 64x256, 0 %"]
        {
            let finding = report.findings.iter().find(|finding| finding.what.contains(words));
            let finding = finding.unwrap_or_else(|| panic!("{words}: {}", report.table()));
            assert!(finding.value > 0.0 && finding.schedule.is_some(), "{words}");
        }
        let compiled = report.findings.iter().filter(|finding| finding.what.starts_with("compiling"));
        assert_eq!(compiled.count(), 2);
        assert!(report.rows.iter().all(|row| row.samples == 2), "only the last rounds count");
    }

    #[test]
    fn a_finding_says_whether_the_aim_is_met() {
        let finding = |value, aim| Finding {
            what: "it".to_owned(),
            value,
            fastest: None,
            unit: "ms",
            aim: Some(aim),
            schedule: None,
        };
        let findings = vec![
            finding(84.0, Aim::AtLeast(85.0)),
            finding(86.0, Aim::AtLeast(85.0)),
            finding(1.9, Aim::AtMost(2.0)),
            finding(2.1, Aim::AtMost(2.0)),
        ];
        let table = Report { findings, ..Report::default() }.table();
        let met: Vec<_> = table.lines().skip(4).map(|line| line.contains("| yes |")).collect();
        assert_eq!(met, [false, true, true, false], "{table}");
        assert!(table.contains("| it | 1.90 ms | ≤ 2 | yes |  |"), "{table}");
    }
}
