//! Bits per weight against work per weight: every family's decoding kernels, interleaved, weights cold.
//!
//! What counts is weights per second. Two-bit packings, `tl2` (1.67 bits) and `t5` (1.6 bits) read ever fewer bytes and
//! take ever more instructions, so which of them wins says what a machine is short of. Every round runs every kernel once,
//! each on weights of its own, which nobody has read since the round before; the table has the best schedules of each family with the minimum and the median
//! of the rounds, in weights per second and relative to the best two-bit kernel. `cargo bench -p ternion-benches --bench
//! packings -- avx2 no-avx512vnni` measures only the machines named, on a CPU without the features named.

use std::time::Instant;

use ternion_benches::Matrix;
use ternion_compiler::{Columns, Cpu, Family, Feature, KernelSpec, MachineKind, Schedule, compile_each};
use ternion_kernels_ref::matrix::ZERO_BYTE;
use ternion_runtime::memory::PageBuffer;
use ternion_runtime::team::{Team, available_threads};

/// Bytes of the weights of all kernels.
const COLD_BYTES: usize = 640 << 20;
const SHAPES: [(usize, usize); 2] = [(2560, 6912), (6912, 2560)];
const ROUNDS: usize = 25;
/// Schedules of a family that are shown.
const SHOWN: usize = 3;

fn main() {
    let host = Cpu::host().expect("a CPU that ternion emits code for");
    let cpu = std::env::args().fold(host, |cpu, word| {
        let lost = Feature::ALL.iter().find(|feature| word.strip_prefix("no-") == Some(feature.name()));
        lost.map_or(cpu, |feature| cpu.without(*feature))
    });
    let named: Vec<MachineKind> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let mut weights = PageBuffer::zeroed(COLD_BYTES).expect("memory for cold weights");
    weights.fill(ZERO_BYTE);
    for threads in (0..).map(|power| 1 << power).take_while(|threads| *threads <= available_threads()) {
        let team = Team::new(threads).expect("threads to measure on");
        for (m, k) in SHAPES {
            println!("{m}x{k}, {threads} threads");
            let spec = KernelSpec { k, columns: Columns::One };
            let mut jobs: Vec<_> = Schedule::candidates(&spec, &cpu).into_iter().map(|s| (spec, s)).collect();
            jobs.retain(|(_, schedule)| named.is_empty() || named.contains(&schedule.machine));
            let kernels: Vec<_> = compile_each(&jobs, &cpu).into_iter().filter_map(Result::ok).collect();
            let own = weights.len() / kernels.len().max(1) / 64 * 64;
            let each = kernels.iter().zip(weights.chunks_exact(own));
            let mut runs: Vec<_> = each.map(|(kernel, own)| (Matrix::new(kernel, m, 1, own), vec![])).collect();
            for _ in 0..ROUNDS {
                for (matrix, times) in &mut runs {
                    let start = Instant::now();
                    matrix.run_copy(&team, 0);
                    times.push(start.elapsed().as_secs_f64());
                }
            }
            let mut speeds: Vec<_> = kernels
                .iter()
                .zip(&mut runs)
                .map(|(kernel, (matrix, times))| {
                    times.sort_by(f64::total_cmp);
                    let [best, middle] = [times[0], times[times.len() / 2]].map(|time| (m * k) as f64 / time / 1e9);
                    let bytes = matrix.weight_bytes() as f64 / (m * k) as f64;
                    (kernel.schedule(), best, middle, bytes)
                })
                .collect();
            speeds.sort_by(|a, b| b.2.total_cmp(&a.2));
            let two_bit = |schedule: &Schedule| [Family::Mad, Family::Tl1].contains(&schedule.family);
            let floor =
                speeds.iter().find(|(schedule, ..)| two_bit(schedule)).map_or(f64::NAN, |(_, _, middle, _)| *middle);
            for family in Family::dense() {
                for (schedule, best, middle, bytes) in speeds.iter().filter(|(s, ..)| s.family == family).take(SHOWN) {
                    let (ratio, rate) = (middle / floor, middle * bytes);
                    println!("    {best:6.1} G/s, median {middle:6.1} G/s ({rate:4.1} GB/s, {ratio:.2})  {schedule}");
                }
            }
        }
    }
}
