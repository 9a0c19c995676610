//! The threads that measure: the same team that will run the model.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// A team of threads. Implemented by whoever owns the threads, so that tuning measures what generation will meet.
pub trait Workers: Sync {
    /// Threads of the team, at least 1.
    fn threads(&self) -> usize;

    /// Calls `work(0)`, … `work(threads − 1)` at the same time, each once on a thread of its own, and returns when all
    /// have returned.
    fn run(&self, work: &(dyn Fn(usize) + Sync));

    /// Wakes whoever has gone to sleep, so that what is timed next meets a team that is as awake as within a token.
    fn wake(&self) {
        self.run(&|_| {});
    }
}

/// The part of `0..total` that belongs to `thread` when `threads` share it evenly and in order.
#[must_use]
pub fn share(total: usize, threads: usize, thread: usize) -> Range<usize> {
    let at = |thread: usize| (total as u128 * thread as u128 / threads.max(1) as u128) as usize;
    at(thread)..at(thread + 1)
}

/// Hands each thread its part of `data` (the parts of [`share`] over whole units of `unit` elements) to fill; `fill` gets
/// the place of the part's first element and the part.
pub fn fill_shared<T: Send>(
    workers: &dyn Workers,
    data: &mut [T],
    unit: usize,
    fill: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    let threads = workers.threads().max(1);
    let units = data.len().div_ceil(unit);
    let mut parts = Vec::with_capacity(threads);
    let (mut rest, mut start) = (data, 0);
    for thread in 0..threads {
        let end = (share(units, threads, thread).end * unit).min(start + rest.len());
        let (part, tail) = rest.split_at_mut(end - start);
        parts.push(Mutex::new((start, part)));
        (rest, start) = (tail, end);
    }
    workers.run(&|thread| {
        if let Some(part) = parts.get(thread) {
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            let (start, part) = &mut *part;
            fill(*start, part);
        }
    });
}

#[cfg(test)]
pub(crate) mod test_team {
    use super::*;

    /// Threads that live for one call.
    pub(crate) struct Scoped(pub(crate) usize);

    impl Workers for Scoped {
        fn threads(&self) -> usize {
            self.0
        }

        fn run(&self, work: &(dyn Fn(usize) + Sync)) {
            std::thread::scope(|scope| {
                for thread in 1..self.0 {
                    scope.spawn(move || work(thread));
                }
                work(0);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once_and_in_order() {
        for (total, threads) in [(0, 1), (1, 3), (10, 3), (7, 7), (usize::MAX, 2)] {
            let mut next = 0;
            for thread in 0..threads {
                let part = share(total, threads, thread);
                assert_eq!(part.start, next);
                next = part.end;
            }
            assert_eq!(next, total);
        }
    }

    #[test]
    fn every_element_is_filled_by_exactly_one_thread() {
        let mut data = vec![0usize; 103];
        fill_shared(&test_team::Scoped(3), &mut data, 10, &|start, part| {
            for (i, value) in part.iter_mut().enumerate() {
                *value += start + i;
            }
        });
        assert!(data.iter().enumerate().all(|(i, value)| i == *value));
    }
}
