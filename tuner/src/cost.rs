//! What a product should cost: a model of each kind of kernel, fitted to what has been measured so far.
//!
//! The time of a product is taken to be a sum of a few kinds of work, counted from shape and schedule: bytes of weights
//! that come from memory, vectors that are unpacked, multiplied and loaded, and turns of the loop. Each kind of kernel
//! (family, machine, one or many columns) has its own price for each. Prices start from a guess of the machine (a stream
//! of 10 GB/s, one vector operation per cycle) and are fitted by least squares to relative errors, held to the guess by
//! a little weight where samples are few. What a layout does to a kind of kernel is more than these counts say, so the
//! latest errors of each layout correct what is expected of it. The model only orders candidates: what wins is what was
//! measured.

use std::collections::BTreeMap;

use ternion_compiler::{Columns, Family, Layout, MachineKind, Schedule};

use crate::{Class, Problem};

/// Kinds of work that have a price.
const TERMS: usize = 5;

/// Prices before anything is measured, in nanoseconds: a byte of weights, a vector unpacked, a vector multiplied, a
/// vector of activations loaded, a turn of the loop.
const GUESS: [f64; TERMS] = [0.1, 0.8, 0.3, 0.15, 0.5];

/// How much the guess counts against one sample.
const GUESS_WEIGHT: f64 = 0.02;

/// How much of what earlier errors of a layout weigh is left with each new one: prices move, and errors with them.
const MEMORY: f64 = 0.8;

/// What is fitted together.
type Kind = (Family, MachineKind, Columns);

/// What errors are remembered for.
type Place = (Kind, Layout, Class);

/// Counts of each kind of work in one product on one thread of `threads`.
fn work(problem: &Problem, class: Class, schedule: &Schedule, threads: usize) -> [f64; TERMS] {
    let layout = schedule.layout;
    let vector = schedule.machine.vector_bytes() as f64;
    let passes = passes(class.measured(), schedule.ntile);
    // The lanes of `vlut` are all filled, whatever the columns.
    let columns = if schedule.family == Family::Vlut { passes * usize::from(schedule.ntile) } else { class.measured() };
    let [passes, columns] = [passes, columns].map(|count| count as f64);
    let tiles = layout.tiles(problem.m).div_ceil(threads.max(1)) as f64;
    let bytes = tiles * layout.tile_bytes(problem.k) as f64;
    let products = tiles * (layout.tile_rows() * problem.k) as f64 * columns / vector;
    // A vector of activations serves as many rows as there are in flight.
    let rows = layout.tile_rows() as f64;
    let steps = problem.k as f64 / step(layout) / f64::from(schedule.unroll.max(1));
    [bytes, passes * bytes / vector, products, products / rows, tiles * passes * steps]
}

/// Passes over a tile for so many columns: `ntile` at a time, then what is left by halves of that.
fn passes(columns: usize, ntile: u8) -> usize {
    let (mut passes, mut left) = (0, columns);
    let mut width = usize::from(ntile.max(1));
    while width > 0 {
        (passes, left) = (passes + left / width, left % width);
        width /= 2;
    }
    passes
}

/// Weights of a row that one step of the loop takes.
fn step(layout: Layout) -> f64 {
    match layout {
        Layout::Rows { chunk, .. } => 4.0 * f64::from(chunk),
        Layout::Lanes { group, .. } => 4.0 * f64::from(group),
        _ => 20.0,
    }
}

/// Prices, and the samples that they come from.
#[derive(Default)]
pub(crate) struct CostModel {
    kinds: BTreeMap<Kind, Fit>,
    /// Sums of logarithms of measured over expected times, their weights, and how many there were.
    errors: BTreeMap<Place, (f64, f64, usize)>,
}

/// Normal equations of one kind, with every sample scaled to a time of 1.
#[derive(Clone, Copy)]
struct Fit {
    products: [[f64; TERMS]; TERMS],
    targets: [f64; TERMS],
    prices: [f64; TERMS],
}

impl Default for Fit {
    fn default() -> Self {
        Self { products: [[0.0; TERMS]; TERMS], targets: [0.0; TERMS], prices: GUESS }
    }
}

impl CostModel {
    /// Learns that a product took so many seconds.
    pub(crate) fn learn(&mut self, problem: &Problem, class: Class, schedule: &Schedule, threads: usize, seconds: f64) {
        if seconds > 0.0 && seconds.is_finite() {
            let work = work(problem, class, schedule, threads);
            let fit = self.kinds.entry(kind(class, schedule)).or_default();
            fit.learn(work.map(|count| count / (seconds * 1e9)));
            let error = (seconds / fit.predict(work)).ln();
            if error.is_finite() {
                let (sum, weight, count) = self.errors.entry(place(class, schedule)).or_default();
                (*sum, *weight, *count) = (MEMORY * *sum + error, MEMORY * *weight + 1.0, *count + 1);
            }
        }
    }

    /// Samples of the same kind, layout and class.
    pub(crate) fn samples(&self, class: Class, schedule: &Schedule) -> usize {
        self.errors.get(&place(class, schedule)).map_or(0, |(_, _, count)| *count)
    }

    /// Seconds that a product should take.
    pub(crate) fn predict(&self, problem: &Problem, class: Class, schedule: &Schedule, threads: usize) -> f64 {
        let work = work(problem, class, schedule, threads);
        let expected = self.kinds.get(&kind(class, schedule)).copied().unwrap_or_default().predict(work);
        // One error that is not known counts as none.
        let error = self.errors.get(&place(class, schedule)).map_or(0.0, |(sum, weight, _)| sum / (weight + 1.0));
        expected * error.exp()
    }
}

fn place(class: Class, schedule: &Schedule) -> Place {
    (kind(class, schedule), schedule.layout, class)
}

fn kind(class: Class, schedule: &Schedule) -> Kind {
    (schedule.family, schedule.machine, class.columns())
}

impl Fit {
    /// Seconds that so much work should take.
    fn predict(&self, work: [f64; TERMS]) -> f64 {
        self.prices.iter().zip(work).map(|(price, count)| price * count).sum::<f64>() * 1e-9
    }

    fn learn(&mut self, sample: [f64; TERMS]) {
        for (row, value) in sample.iter().enumerate() {
            self.targets[row] += value;
            for (column, other) in sample.iter().enumerate() {
                self.products[row][column] += value * other;
            }
        }
        // The guess is a sample for each price alone, as large as the others' samples are on the average.
        let mut matrix = self.products;
        let mut targets = self.targets;
        for term in 0..TERMS {
            let hold = GUESS_WEIGHT * (self.products[term][term] + 1e-12);
            matrix[term][term] += hold;
            targets[term] += hold * GUESS[term];
        }
        if let Some(prices) = solve(matrix, targets) {
            // Work is not negative: what a fit makes so is noise.
            self.prices = prices.map(|price| price.max(0.0));
        }
    }
}

/// Solves a symmetric positive definite system by elimination with pivots.
fn solve(mut matrix: [[f64; TERMS]; TERMS], mut targets: [f64; TERMS]) -> Option<[f64; TERMS]> {
    for column in 0..TERMS {
        let pivot = (column..TERMS).max_by(|a, b| matrix[*a][column].abs().total_cmp(&matrix[*b][column].abs()))?;
        matrix.swap(column, pivot);
        targets.swap(column, pivot);
        let scale = matrix[column][column];
        if scale.abs() < f64::MIN_POSITIVE {
            return None;
        }
        for row in column + 1..TERMS {
            let factor = matrix[row][column] / scale;
            let above = matrix[column];
            matrix[row].iter_mut().zip(above).skip(column).for_each(|(value, above)| *value -= factor * above);
            targets[row] -= factor * targets[column];
        }
    }
    let mut solution = [0.0; TERMS];
    for row in (0..TERMS).rev() {
        let known: f64 = (row + 1..TERMS).map(|at| matrix[row][at] * solution[at]).sum();
        solution[row] = (targets[row] - known) / matrix[row][row];
    }
    Some(solution)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stopwatch::scripted::Noise;
    use ternion_compiler::Cpu;

    const PROBLEM: Problem = Problem { m: 2560, k: 2560, count: 30 };

    fn schedules(class: Class) -> Vec<Schedule> {
        let cpu: Cpu = "x86-64 +ssse3 +sse4.1 +avx2 +avxvnni".parse().unwrap();
        Schedule::candidates(&class.spec(PROBLEM.k), &cpu)
    }

    #[test]
    fn columns_that_are_left_take_a_pass_for_each_half() {
        // 8 = 5 + 2 + 1, and 32 = 12 + 12 + 6 + 1 + 1.
        let counts = [(8, 5), (32, 12), (32, 8), (4, 16), (1, 1)].map(|(columns, ntile)| passes(columns, ntile));
        assert_eq!(counts, [3, 5, 4, 1, 1]);
    }

    #[test]
    fn prices_are_found_from_noisy_samples_and_order_what_was_never_measured() {
        let prices = [0.05, 0.2, 0.6, 0.1, 2.0];
        let truth = |class, schedule: &Schedule| {
            let work = work(&PROBLEM, class, schedule, 2);
            prices.iter().zip(work).map(|(price, count)| price * count * 1e-9).sum::<f64>()
        };
        let (mut model, mut noise) = (CostModel::default(), Noise::new(7));
        for class in [Class::One, Class::Chunk] {
            for schedule in schedules(class).iter().step_by(2) {
                let seconds = truth(class, schedule) * (1.0 + 0.03 * noise.normal());
                model.learn(&PROBLEM, class, schedule, 2, seconds);
            }
            let mut errors: Vec<f64> = schedules(class)
                .iter()
                .skip(1)
                .step_by(2)
                .map(|schedule| (model.predict(&PROBLEM, class, schedule, 2) / truth(class, schedule) - 1.0).abs())
                .collect();
            errors.sort_by(f64::total_cmp);
            assert!(errors[errors.len() / 2] < 0.1, "{class}: {errors:?}");
        }
    }

    #[test]
    fn without_samples_it_still_says_something_that_grows_with_the_work() {
        let model = CostModel::default();
        let small = Problem { m: 640, ..PROBLEM };
        for class in Class::ALL {
            for schedule in schedules(class) {
                let [small, large] = [small, PROBLEM].map(|problem| model.predict(&problem, class, &schedule, 1));
                assert!(small > 0.0 && large > small, "{schedule}");
            }
        }
    }
}
