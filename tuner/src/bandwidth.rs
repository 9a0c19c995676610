//! How fast threads together read main memory: the roofline that decoding is measured against.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::buffer::Buffer;
use crate::workers::share;
use crate::{CpuProfile, Stopwatch, Workers};

/// Passes over the buffer end after this time, or after [`MAX_PASSES`].
const READING_TIME: Duration = Duration::from_millis(120);
const MAX_PASSES: usize = 12;

/// Filling ends after this time, if there is enough to read by then.
const FILLING_TIME: Duration = Duration::from_millis(150);

/// One load of a pass: a cache line, summed in one register lane per word.
type Line = [u64; 8];

impl CpuProfile {
    /// Measured read bandwidth of main memory in bytes per second, with all `workers` reading at once: the best of
    /// several passes over a buffer of four times the last-level cache, or twice if memory or time (about 0.3 s) allow no
    /// more. `None` if not even that can be had.
    #[must_use]
    pub fn memory_bandwidth(&self, workers: &dyn Workers, stopwatch: &dyn Stopwatch) -> Option<f64> {
        let cache = self.last_level_bytes();
        let spare = self.memory.available.unwrap_or(1 << 30) / 2;
        let least = cache.checked_mul(2).filter(|least| *least <= spare)?;
        let wanted = cache.saturating_mul(4).max(256 << 20).min(spare);
        let begin = stopwatch.elapsed();
        let enough = || stopwatch.elapsed().saturating_sub(begin) > FILLING_TIME;
        let (wanted, least) = (usize::try_from(wanted).ok()?, usize::try_from(least).ok()?);
        let buffer = Buffer::of_codes(wanted, least, workers, enough)?;
        best_pass(buffer.bytes(), workers, stopwatch)
    }
}

/// The speed of the fastest pass, in bytes per second.
fn best_pass(bytes: &[u8], workers: &dyn Workers, stopwatch: &dyn Stopwatch) -> Option<f64> {
    let begin = stopwatch.elapsed();
    let mut best: Option<Duration> = None;
    for pass in 0..MAX_PASSES {
        let start = stopwatch.elapsed();
        // The first two passes must be made whatever they take: the first may meet sleeping cores.
        if pass >= 2 && start.saturating_sub(begin) > READING_TIME {
            break;
        }
        read(bytes, if pass % 2 == 0 { Streams::One } else { Streams::Two }, workers);
        let time = stopwatch.elapsed().saturating_sub(start);
        best = Some(best.map_or(time, |best| best.min(time)));
    }
    let seconds = best?.as_secs_f64();
    (seconds > 0.0).then(|| (bytes.len() / 64 * 64) as f64 / seconds)
}

/// In how many places each thread reads at once. Some memory systems like one stream per thread best, others two: of two
/// passes the better one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// Its part from start to end.
    One,
    /// Both halves of its part side by side.
    Two,
}

/// Reads all whole cache lines of `bytes` once, all `workers` sharing them evenly: what measuring how fast memory can be
/// read takes the time of.
pub fn read(bytes: &[u8], streams: Streams, workers: &dyn Workers) {
    let threads = workers.threads().max(1);
    let (lines, _) = bytes.as_chunks::<64>();
    let checksum = AtomicU64::new(0);
    workers.run(&|thread| {
        let lines = &lines[share(lines.len(), threads, thread)];
        let sum = match streams {
            Streams::One => sum::<1>(lines),
            Streams::Two => sum::<2>(lines),
        };
        checksum.fetch_xor(sum, Ordering::Relaxed);
    });
    black_box(checksum);
}

/// The sum of all words, read in `STREAMS` streams side by side.
fn sum<const STREAMS: usize>(lines: &[[u8; 64]]) -> u64 {
    let length = lines.len() / STREAMS;
    let streams: [&[[u8; 64]]; STREAMS] = std::array::from_fn(|stream| &lines[stream * length..][..length]);
    let mut sums = [[0u64; 8]; STREAMS];
    for at in 0..length {
        for (sums, stream) in sums.iter_mut().zip(&streams) {
            add(sums, &stream[at]);
        }
    }
    for line in &lines[STREAMS * length..] {
        add(&mut sums[0], line);
    }
    sums.as_flattened().iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

#[inline(always)]
fn add(sums: &mut Line, line: &[u8; 64]) {
    for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
        *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stopwatch::scripted::ScriptedStopwatch;
    use std::sync::Mutex;

    /// One thread whose every run takes the next scripted time.
    struct ScriptedTeam<'a> {
        clock: &'a ScriptedStopwatch,
        times: Mutex<Vec<u64>>,
    }

    impl Workers for ScriptedTeam<'_> {
        fn threads(&self) -> usize {
            1
        }

        fn run(&self, work: &(dyn Fn(usize) + Sync)) {
            work(0);
            self.clock.advance(Duration::from_millis(self.times.lock().unwrap().pop().unwrap_or(20)));
        }
    }

    #[test]
    fn reading_touches_every_line_once() {
        let lines: Vec<[u8; 64]> = (0..23u8).map(|i| [i; 64]).collect();
        let sum = (0..23u64).map(|i| i.wrapping_mul(0x0101_0101_0101_0101).wrapping_mul(8)).fold(0, u64::wrapping_add);
        assert_eq!((super::sum::<1>(&lines), super::sum::<2>(&lines)), (sum, sum));
    }

    #[test]
    fn the_fastest_pass_counts() {
        let clock = ScriptedStopwatch::default();
        let team = ScriptedTeam { clock: &clock, times: Mutex::new(vec![10, 30]) };
        let bytes = vec![1u8; 1 << 20];
        let speed = best_pass(&bytes, &team, &clock).unwrap();
        assert_eq!(speed.round(), (f64::from(1 << 20) / 0.010).round());
    }
}
