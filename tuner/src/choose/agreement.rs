//! Whether searches agree with each other and with the whole space, on machines that the cost model knows nothing of.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use ternion_compiler::{Cpu, Family, Layout, Schedule};

use super::tests::{Run, SHAPES, unknown};
use crate::request::{Budget, Found, Problem};
use crate::space::legal;
use crate::stopwatch::scripted::Noise;
use crate::{Class, Workload};

/// Machines, and searches on each of them.
const MACHINES: u64 = 50;
const SEARCHES: u64 = 2;

/// Where their seeds begin: nothing about a search was fitted to these.
const FIRST_SEED: u64 = 0xa9ee_0000;

/// How close is close, and what must be so of every hundred.
const CLOSE: f64 = 1.05;
const ENOUGH: usize = 95;

/// A number in -1..1 that depends on nothing but a seed and a value.
fn random(seed: u64, what: &dyn Fn(&mut Fnv)) -> f64 {
    let mut hash = Fnv(seed ^ 0xcbf2_9ce4_8422_2325);
    what(&mut hash);
    2.0 * Noise::new(hash.0).uniform() - 1.0
}

struct Fnv(u64);

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A machine on which every parameter's value, and some pairs of values, make a kernel faster or slower at random: by up
/// to four times all together.
fn rugged(seed: u64, problem: &Problem, class: Class, s: &Schedule) -> Duration {
    let many = class != Class::One;
    let random = |what: &dyn Fn(&mut Fnv)| random(seed, what);
    let single = 0.3 * random(&|h| (1, s.family, s.machine, many).hash(h))
        + 0.3 * random(&|h| (2, s.layout, many).hash(h))
        + 0.1 * random(&|h| (3, s.multiply, class).hash(h))
        + 0.15 * random(&|h| (4, s.unroll, many).hash(h))
        + 0.15 * random(&|h| (5, s.ntile, class).hash(h))
        + 0.1 * random(&|h| (6, s.prefetch).hash(h));
    let pairs = 0.1 * random(&|h| (7, s.layout, s.unroll).hash(h))
        + 0.05 * random(&|h| (8, s.family, s.ntile, s.layout).hash(h));
    // As much of a prompt as a sample takes.
    let work = (problem.m * problem.k * class.measured()).min(1 << 24) as f64 / if many { 300e9 } else { 60e9 };
    Duration::from_secs_f64(work * (single + pairs).exp())
}

/// The weighted total of a set of times.
fn total(times: [f64; 6]) -> f64 {
    times.iter().zip(Workload::default().weights()).map(|(time, weight)| time * weight).sum()
}

/// The total of the best set that shares a layout.
fn best(cpu: &Cpu, seed: u64, problem: &Problem) -> f64 {
    let mut best: BTreeMap<Layout, [f64; 6]> = BTreeMap::new();
    for class in Class::ALL {
        let space = legal(&Family::ALL, &class.spec(2560), cpu, &Budget::EXHAUSTIVE, Duration::ZERO);
        for schedule in space.iter() {
            let best = &mut best.entry(schedule.layout).or_insert([f64::INFINITY; 6])[class.index()];
            *best = best.min(rugged(seed, problem, class, schedule).as_secs_f64());
        }
    }
    best.into_values().map(total).fold(f64::INFINITY, f64::min)
}

/// What the searches of a machine have lost to the best of its whole space, as ratios.
fn losses(cpu: &Cpu, machine: u64) -> Vec<f64> {
    let problem = SHAPES[machine as usize % SHAPES.len()];
    let best = best(cpu, FIRST_SEED + machine, &problem);
    let time = |problem: &Problem, class, schedule: &Schedule| rugged(FIRST_SEED + machine, problem, class, schedule);
    let search = |nth| {
        let seed = FIRST_SEED + SEARCHES * machine + nth;
        // The last of four shapes: the others have had their part of the time.
        let run = Run {
            budget: Budget::search(Duration::from_secs(20)),
            begin: Duration::from_secs(15),
            shapes: &[problem],
            seed,
            restless: true,
            held: &[],
            compiling: Duration::from_millis(40),
        };
        let run = run.on(cpu, &unknown(), &time, &|_| false);
        assert!(run.spent <= Duration::from_millis(20_500), "{:?}", run.spent);
        let Found { choice, .. } = &run.found[0];
        let found = total(Class::ALL.map(|class| time(&problem, class, &choice.of(class)).as_secs_f64()));
        found / best
    };
    (0..SEARCHES).map(search).collect()
}

#[test]
fn searches_agree_with_each_other_and_with_the_best_of_the_whole_space() {
    // One whose space is listed at once; before anybody has to wait for it.
    let cpu: Cpu = "x86-64 +ssse3 +sse4.1".parse().unwrap();
    for class in [Class::One, Class::Chunk] {
        legal(&Family::ALL, &class.spec(2560), &cpu, &Budget::EXHAUSTIVE, Duration::ZERO);
    }
    let half = |first: u64| (first..MACHINES).step_by(2).map(|machine| losses(&cpu, machine)).collect::<Vec<_>>();
    let losses = std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        let mut all = half(0);
        all.extend(other.join().unwrap());
        all
    });
    let close = |ratio: &&f64| **ratio < CLOSE;
    let mut all = losses.concat();
    all.sort_by(f64::total_cmp);
    let good = all.iter().filter(close).count();
    assert!(100 * good >= ENOUGH * all.len(), "{good} of {}: {all:?}", all.len());
    let agree = losses.iter().filter(|pair| pair[0].max(pair[1]) < CLOSE * pair[0].min(pair[1])).count();
    assert!(100 * agree >= ENOUGH * losses.len(), "{agree} of {}", losses.len());
}
