//! Compiling who may race, as far as time allows.

use std::time::Duration;

use ternion_compiler::CompileError;

use crate::bench::{Bench, Job};
use crate::contest::Entrant;
use crate::shortlist::Shortlist;
use crate::{Problem, Stopwatch};

/// Of the time that there is, compiling takes at most this part.
const COMPILING_SHARE: f64 = 0.6;

/// What a batch may cost beyond what the one before it did, for each of its kernels.
const COMPILING_MARGIN: f64 = 1.25;

pub(crate) fn job(problem: &Problem, entrant: &Entrant) -> Job {
    (entrant.class.spec(problem.k), entrant.schedule)
}

/// Every different kernel that `lists` want to race: all the first places, then all the second, and so on, so that time
/// is shared fairly. Shapes with equal rows want the same kernels.
fn jobs(lists: &[(Problem, Shortlist)]) -> Vec<Job> {
    let longest = lists.iter().map(|(_, list)| list.entrants.len()).max().unwrap_or(0);
    let mut jobs = Vec::new();
    // By pairs: a schedule without its partner cannot race.
    for place in (0..longest).step_by(2) {
        for (problem, list) in lists {
            for entrant in list.entrants.iter().skip(place).take(2) {
                let job = job(problem, entrant);
                if !jobs.contains(&job) {
                    jobs.push(job);
                }
            }
        }
    }
    jobs
}

/// Compiles the kernels of `lists`, first places first and `batch` at a time, in its part of the time until `deadline`.
/// Returns the errors of those that the compiler refused. `progress` is told how many of how many are done.
pub(crate) fn compile(
    lists: &[(Problem, Shortlist)],
    bench: &mut dyn Bench,
    stopwatch: &dyn Stopwatch,
    deadline: Duration,
    batch: usize,
    progress: &dyn Fn(usize, usize),
) -> Vec<CompileError> {
    let begin = stopwatch.elapsed();
    let end = begin + deadline.saturating_sub(begin).mul_f64(COMPILING_SHARE);
    let jobs = jobs(lists);
    let mut refused = Vec::new();
    // Nothing is known of the first batch; afterwards the last one tells what the next will cost.
    let mut cost_per_job = Duration::ZERO;
    let mut done = 0;
    // An even number, for the pairs.
    for batch in jobs.chunks(batch.next_multiple_of(2).max(2)) {
        let start = stopwatch.elapsed();
        if start + (cost_per_job * batch.len() as u32).mul_f64(COMPILING_MARGIN) >= end {
            break;
        }
        progress(done, jobs.len());
        refused.extend(bench.compile(batch));
        cost_per_job = stopwatch.elapsed().saturating_sub(start) / batch.len() as u32;
        done += batch.len();
    }
    refused
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_compiler::Cpu;

    #[test]
    fn kernels_are_compiled_pair_by_pair_in_turn_of_the_shapes_and_each_once() {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        let list = |m, k| (Problem { m, k, count: 1 }, Shortlist::new(k, &cpu, 8, &|_, _| false));
        let jobs = jobs(&[list(10, 256), list(20, 256), list(30, 512)]);
        assert_eq!(jobs.iter().map(|(spec, _)| spec.k).collect::<Vec<_>>(), [256, 256, 512, 512].repeat(4));
        let (_, first) = list(10, 256);
        assert_eq!((jobs[0].1, jobs[1].1), (first.entrants[0].schedule, first.entrants[1].schedule));
    }
}
