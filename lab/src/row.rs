//! What is known of one case after it was measured: a line of a table, a CSV file or a JSON lines file.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use ternion_compiler::{FINGERPRINT, Heart, MachineKind, Multiply, Schedule};
use ternion_tuner::probe;

use crate::bench::{Limits, Samples};
use crate::{Bench, BenchError, Case, Entrant, Shape, Weights};

/// One case. Fields that were not measured are `None`; all are if the kernel was [`refused`](Self::refused).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Rows of the matrix.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// Columns.
    pub n: usize,
    /// Threads.
    pub threads: usize,
    /// Where the weights were.
    pub weights: Weights,
    /// Records that the list left out, in percent.
    pub zeros: u8,
    /// How it was computed.
    pub schedule: Schedule,
    /// The schedule's parts, so that a table can be grouped by them.
    pub family: String,
    /// The machine.
    pub machine: String,
    /// The layout.
    pub layout: String,
    /// The multiplication, if the family multiplies.
    pub multiply: Option<String>,
    /// Steps per loop turn.
    pub unroll: u8,
    /// Columns that share a pass.
    pub ntile: u8,
    /// How far ahead the cache is asked.
    pub prefetch: u16,
    /// Times of one product in microseconds: the fastest, the quartiles, and how many there were.
    pub fastest_us: Option<f64>,
    /// First quartile.
    pub lower_us: Option<f64>,
    /// Median. Speeds are computed from it.
    pub median_us: Option<f64>,
    /// Third quartile.
    pub upper_us: Option<f64>,
    /// Number of samples.
    pub samples: usize,
    /// Bytes of weights that a product reads, padding included.
    pub bytes: f64,
    /// They per second, in 10⁹.
    pub gb_per_s: Option<f64>,
    /// Weights that are read per second, in 10⁹.
    pub gweights_per_s: Option<f64>,
    /// Multiply-adds per second, in 10⁹.
    pub gmac_per_s: Option<f64>,
    /// What the same threads read from main memory in the same rounds, in GB/s: the better median of one and of two
    /// streams per thread.
    pub read_gb_per_s: Option<f64>,
    /// The same from the cache that holds the first matrix of the measurement.
    pub read_hot_gb_per_s: Option<f64>,
    /// Speed of the product over that of reading, from where its weights were. From medians.
    pub of_read: Option<f64>,
    /// The same of the fastest product and the fastest reading.
    pub of_read_fastest: Option<f64>,
    /// What the operation at the kernel's heart does alone, in GMAC/s of all threads.
    pub limit_gmac_per_s: Option<f64>,
    /// The part of it that the kernel reaches.
    pub of_limit: Option<f64>,
    /// The clock, in GHz.
    pub ghz: Option<f64>,
    /// Cycles of one thread per byte of its weights.
    pub cycles_per_byte: Option<f64>,
    /// Bytes of machine code.
    pub code_bytes: Option<usize>,
    /// Why it was not measured.
    pub refused: Option<String>,
    /// The CPU.
    pub cpu: String,
    /// The compiler.
    pub compiler: String,
}

/// What is measured where: cases of equal keys would give the same row, but for noise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    case: Case,
    threads: usize,
    cpu: String,
    compiler: String,
}

impl Key {
    /// `case` on this machine.
    #[must_use]
    pub fn here(case: Case, threads: usize, cpu: &str) -> Self {
        Self { case, threads, cpu: cpu.to_owned(), compiler: FINGERPRINT.to_owned() }
    }
}

/// The CPU's name in rows.
#[must_use]
pub fn cpu_name() -> String {
    probe().signature()
}

impl Row {
    /// A row with nothing measured.
    fn new(case: &Case, threads: usize, cpu: &str) -> Self {
        let Case { shape: Shape { m, k }, n, schedule, weights, zeros } = *case;
        let multiplies = matches!(schedule.heart(), Some(Heart::Dot | Heart::Pairs));
        let multiply = multiplies.then(|| match schedule.multiply {
            Multiply::Pairs => "pairs".to_owned(),
            Multiply::Dot => "dot".to_owned(),
        });
        Self {
            m,
            k,
            n,
            threads,
            weights,
            zeros,
            schedule,
            family: schedule.family.to_string(),
            machine: schedule.machine.to_string(),
            layout: schedule.layout.to_string(),
            multiply,
            unroll: schedule.unroll,
            ntile: schedule.ntile,
            prefetch: schedule.prefetch,
            fastest_us: None,
            lower_us: None,
            median_us: None,
            upper_us: None,
            samples: 0,
            bytes: case.read_bytes(),
            gb_per_s: None,
            gweights_per_s: None,
            gmac_per_s: None,
            read_gb_per_s: None,
            read_hot_gb_per_s: None,
            of_read: None,
            of_read_fastest: None,
            limit_gmac_per_s: None,
            of_limit: None,
            ghz: None,
            cycles_per_byte: None,
            code_bytes: None,
            refused: None,
            cpu: cpu.to_owned(),
            compiler: FINGERPRINT.to_owned(),
        }
    }

    /// The row of a case that cannot be measured.
    #[must_use]
    pub fn refused(case: &Case, threads: usize, cpu: &str, error: &BenchError) -> Self {
        Self { refused: Some(error.to_string()), ..Self::new(case, threads, cpu) }
    }

    /// The row of what was measured of one entrant.
    fn measured(entrant: &Entrant, times: &[f64], limits: &Limits, threads: usize, cpu: &str) -> Self {
        let (case, times) = (entrant.case(), sorted(times));
        let mut row = Self::new(case, threads, cpu);
        row.samples = times.len();
        row.code_bytes = Some(entrant.code_bytes());
        row.read_gb_per_s = better(&limits.cold, median).map(|speed| speed * 1e-9);
        row.read_hot_gb_per_s = better(&limits.hot, median).map(|speed| speed * 1e-9);
        row.ghz = limits.clock(median).map(|clock| clock * 1e-9);
        row.limit_gmac_per_s = limits.heart(&case.schedule).map(|speed| speed * 1e-9);
        let (Some(fastest), Some(median_s)) = (times.first().copied(), median(&times)) else { return row };
        let reading = if case.weights == Weights::Cold { &limits.cold } else { &limits.hot };
        row.fastest_us = Some(fastest * 1e6);
        row.lower_us = Some(times[times.len() / 4] * 1e6);
        row.median_us = Some(median_s * 1e6);
        row.upper_us = Some(times[(3 * times.len() / 4).min(times.len() - 1)] * 1e6);
        let speed = row.bytes / median_s;
        row.gb_per_s = Some(speed * 1e-9);
        row.gweights_per_s = Some(case.read_weights() / median_s * 1e-9);
        row.gmac_per_s = Some(case.macs() / median_s * 1e-9);
        row.of_read = better(reading, median).map(|reading| speed / reading);
        row.of_read_fastest = better(reading, largest).map(|reading| row.bytes / fastest / reading);
        row.of_limit = row.limit_gmac_per_s.map(|limit| case.macs() / median_s * 1e-9 / limit);
        row.cycles_per_byte =
            limits.clock(median).filter(|_| row.bytes > 0.0).map(|clock| clock * median_s * threads as f64 / row.bytes);
        row
    }

    /// The rows of a measurement.
    #[must_use]
    pub fn of(bench: &Bench<'_>, entrants: &[Entrant], samples: &Samples, cpu: &str) -> Vec<Self> {
        let each = entrants.iter().zip(&samples.products);
        each.map(|(entrant, times)| Self::measured(entrant, times, &samples.limits, bench.threads(), cpu)).collect()
    }

    /// What this row is about.
    #[must_use]
    pub fn case(&self) -> Case {
        let Self { m, k, n, schedule, weights, zeros, .. } = *self;
        Case { shape: Shape { m, k }, n, schedule, weights, zeros }
    }

    /// What was measured where.
    #[must_use]
    pub fn key(&self) -> Key {
        Key { case: self.case(), threads: self.threads, cpu: self.cpu.clone(), compiler: self.compiler.clone() }
    }

    /// Half the distance between the quartiles, in percent of the median.
    #[must_use]
    pub fn spread_percent(&self) -> Option<f64> {
        Some(50.0 * (self.upper_us? - self.lower_us?) / self.median_us?)
    }
}

impl Limits {
    fn clock(&self, of: fn(&[f64]) -> Option<f64>) -> Option<f64> {
        of(&sorted(&self.clock))
    }

    fn heart(&self, schedule: &Schedule) -> Option<f64> {
        let which: (MachineKind, Heart) = (schedule.machine, schedule.heart()?);
        median(&sorted(self.hearts.get(&which)?))
    }
}

/// The better of two kinds of reading.
fn better(speeds: &[Vec<f64>; 2], of: fn(&[f64]) -> Option<f64>) -> Option<f64> {
    speeds.iter().filter_map(|speeds| of(&sorted(speeds))).reduce(f64::max)
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

fn median(sorted: &[f64]) -> Option<f64> {
    sorted.get(sorted.len() / 2).copied()
}

fn largest(sorted: &[f64]) -> Option<f64> {
    sorted.last().copied()
}

/// A table for the terminal, one line per row, and under it what the speeds are compared with.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let head = [
        "shape",
        "n",
        "zeros",
        "µs",
        "±",
        "fastest",
        "GB/s",
        "Gweights/s",
        "GMAC/s",
        "of read",
        "at best",
        "of limit",
        "cycles/B",
        "schedule",
    ];
    let mut lines = vec![head.map(str::to_owned)];
    let number = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    let percent = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{:.0} %", 100.0 * value));
    for row in rows {
        let spread = row.spread_percent().map_or("-".to_owned(), |spread| format!("{spread:.1} %"));
        let schedule = match &row.refused {
            Some(reason) => reason.clone(),
            None => row.schedule.to_string(),
        };
        lines.push([
            format!("{}x{}", row.m, row.k),
            row.n.to_string(),
            if row.schedule.family.list().is_some() { format!("{} %", row.zeros) } else { "-".to_owned() },
            number(row.median_us, 1),
            spread,
            number(row.fastest_us, 1),
            number(row.gb_per_s, 1),
            number(row.gweights_per_s, 1),
            number(row.gmac_per_s, 1),
            percent(row.of_read),
            percent(row.of_read_fastest),
            percent(row.of_limit),
            number(row.cycles_per_byte, 3),
            schedule,
        ]);
    }
    aligned(&lines) + &footer(rows)
}

/// Columns as wide as they must be; all but the first and the last end at the same place.
fn aligned<const N: usize>(lines: &[[String; N]]) -> String {
    let width = |at: usize| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..N).map(width).collect();
    let mut text = String::new();
    for line in lines {
        for (at, cell) in line.iter().enumerate() {
            let width = widths[at];
            text += &match at {
                0 => format!("{cell:<width$}"),
                _ if at + 1 == N => format!("  {cell}"),
                _ => format!("  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    text
}

fn footer(rows: &[Row]) -> String {
    let Some(first) = rows.iter().find(|row| row.refused.is_none()) else { return String::new() };
    let mut facts = vec![format!("{} threads", first.threads)];
    let weights: BTreeSet<_> = rows.iter().map(|row| row.weights).collect();
    facts.extend(weights.iter().map(|weights| match weights {
        Weights::Cold => "weights cold".to_owned(),
        Weights::Hot => "weights hot".to_owned(),
    }));
    facts.extend(first.read_gb_per_s.map(|speed| format!("memory reads {speed:.1} GB/s")));
    facts.extend(first.read_hot_gb_per_s.map(|speed| format!("the cache {speed:.1} GB/s")));
    facts.extend(first.ghz.map(|clock| format!("clock {clock:.2} GHz")));
    format!("{}; medians of {} rounds\n", facts.join(", "), first.samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> Case {
        let schedule = "mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1".parse().unwrap();
        Case { shape: Shape { m: 1000, k: 4096 }, n: 1, schedule, weights: Weights::Cold, zeros: 0 }
    }

    #[test]
    fn a_row_survives_json_and_csv() {
        let error = BenchError::Memory(7);
        let refused = Row::refused(&case(), 2, "a CPU, with a comma", &error);
        let row = Row { median_us: Some(1.5), ghz: Some(3.25), ..Row::new(&case(), 2, "CPU") };
        for row in [refused, row] {
            let json = serde_json::to_string(&row).unwrap();
            assert_eq!(serde_json::from_str::<Row>(&json).unwrap(), row);
            let mut writer = csv::Writer::from_writer(Vec::new());
            writer.serialize(&row).unwrap();
            let bytes = writer.into_inner().unwrap();
            let read: Vec<Row> = csv::Reader::from_reader(&bytes[..]).deserialize().map(Result::unwrap).collect();
            assert_eq!(read, [row]);
        }
    }

    #[test]
    fn speeds_are_those_of_the_median_and_limits_those_of_the_same_rounds() {
        let limits = Limits {
            cold: [vec![20e9, 10e9, 20e9], vec![15e9]],
            hot: [vec![], vec![]],
            hearts: [((MachineKind::Clif128, Heart::Pairs), vec![100e9])].into(),
            clock: vec![2e9],
        };
        let mut row = Row::new(&case(), 2, "CPU");
        assert_eq!(row.bytes, 1_024_000.0);
        assert_eq!(better(&limits.cold, median), Some(20e9));
        assert_eq!(limits.heart(&row.schedule), Some(100e9));
        assert_eq!(limits.clock(median), Some(2e9));
        (row.lower_us, row.median_us, row.upper_us) = (Some(90.0), Some(100.0), Some(120.0));
        assert_eq!(row.spread_percent(), Some(15.0));
        let text = table(&[row]);
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains("1000x4096") && text.contains("15.0 %") && text.contains("rows4x16"), "{text}");
    }
}
