//! A team of threads that live as long as it does and start work within a microsecond.
//!
//! The caller is one of the team. Between two calls the others spin for a short while, since the next call of a forward
//! pass is microseconds away, and then park. A call allocates nothing and takes no lock that is ever waited for.
//!
//! Work comes in parts, and every thread has a row of them that it begins with. With [`Team::divide`] a thread that is done
//! takes over what others have not begun, so that neither a core which another program holds nor one whose memory is slower
//! delays more than a part; [`Workers::run`] gives every thread its own part whatever happens, which is what measuring needs.
//!
//! [`SharedSlice`] lets the threads write to disjoint parts of one slice.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};

pub use ternion_tuner::{Workers, share};

/// Turns of the waiting loop before a thread offers its core to others: a few microseconds.
const SPINS: usize = 256;
/// Turns in which it does so before it parks: some tens of microseconds if nobody else wants the core. Where another
/// program, or a thread of this very team, does want it, it gets it at once instead of at the end of a time slice.
const YIELDS: usize = 128;

/// Threads that this process may run at the same time: its affinity and its cgroup's quota, at least 1.
#[must_use]
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Why a team could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TeamError {
    /// A team of nobody.
    #[error("0 threads cannot run anything: ask for at least 1")]
    NoThreads,
    /// The operating system refused a thread.
    #[error("cannot start thread {thread} of {threads}: {source}; ask for fewer")]
    Spawn {
        /// The thread that could not be started, from 1.
        thread: usize,
        /// Threads asked for.
        threads: usize,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Parts that [`Team::share_out`] makes per thread at most.
const PARTS: usize = 16;

/// Bytes of weights that are worth a part for themselves: reading them takes microseconds, claiming them a few dozen
/// nanoseconds.
pub const PART_BYTES: usize = 128 << 10;

/// Work of one call.
#[derive(Clone, Copy)]
struct Job {
    /// What is called with the number of every part. Its lifetime is erased; see [`Team::call`].
    work: *const (dyn Fn(usize) + Sync),
    parts: usize,
    /// Whether threads may take over parts of others.
    taking_over: bool,
}

/// Something that has a cache line for itself.
#[repr(align(64))]
struct Line<T>(T);

/// Which parts of a thread's row can still be claimed, as one number: the call that they belong to, and the first and the end
/// of them within the row, eight bits each.
struct Row(AtomicU64);

impl Row {
    /// Parts of a row at most.
    const MOST: usize = u8::MAX as usize;

    fn fill(&self, epoch: u64, parts: usize) {
        self.0.store(epoch << 16 | parts as u64, Ordering::SeqCst);
    }

    /// Claims the next part for a call; `None` if there is none, or this call is over.
    fn claim(&self, epoch: u64) -> Option<usize> {
        let next = |row: u64| {
            let of_call = (row ^ epoch << 16) >> 16 == 0;
            (of_call && row >> 8 & 0xff < row & 0xff).then_some(row + (1 << 8))
        };
        let row = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).ok()?;
        Some((row >> 8 & 0xff) as usize)
    }
}

struct Shared {
    /// Counts calls; a thread that sees a new number looks for work.
    epoch: Line<AtomicU64>,
    /// The work of the current epoch. Written only while no part is left to do.
    job: UnsafeCell<Option<Job>>,
    /// The parts that each thread begins with.
    rows: Vec<Line<Row>>,
    /// Parts of the current epoch that are not finished.
    remaining: Line<AtomicUsize>,
    stop: AtomicBool,
    /// Whether each worker is parked, or about to be.
    parked: Vec<AtomicBool>,
    /// Whether the caller is parked, or about to be, and who that is.
    caller_parked: AtomicBool,
    caller: Mutex<Option<Thread>>,
    /// What the first part to panic said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only part that is not `Sync` by itself. It is written by the one caller (which holds
// `Team::calling`) before it publishes a new epoch, and read by threads that have claimed a part of that epoch and not
// yet finished it. A part can be claimed once, and the caller waits until all are finished before it returns.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is to a `Sync` closure.
unsafe impl Send for Shared {}

/// A team of threads, the caller included.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held during a call, so that calls from several threads take turns.
    calling: Mutex<()>,
}

impl Team {
    /// A team of `threads`: the caller and `threads − 1` new ones.
    ///
    /// # Errors
    /// If `threads` is 0 or the operating system refuses a thread.
    pub fn new(threads: usize) -> Result<Self, TeamError> {
        if threads == 0 {
            return Err(TeamError::NoThreads);
        }
        let shared = Arc::new(Shared {
            epoch: Line(AtomicU64::new(0)),
            job: UnsafeCell::new(None),
            rows: (0..threads).map(|_| Line(Row(AtomicU64::new(0)))).collect(),
            remaining: Line(AtomicUsize::new(0)),
            stop: AtomicBool::new(false),
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            caller_parked: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
        });
        let mut team = Self { shared, workers: Vec::new(), calling: Mutex::new(()) };
        for thread in 1..threads {
            let shared = Arc::clone(&team.shared);
            let worker = std::thread::Builder::new()
                .name(format!("ternion-{thread}"))
                .spawn(move || shared.work(thread))
                // What has been started stops when `team` is dropped.
                .map_err(|source| TeamError::Spawn { thread, threads, source })?;
            team.workers.push(worker);
        }
        Ok(team)
    }

    /// Publishes a new epoch and wakes whoever is parked.
    fn announce(&self) {
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        for (worker, parked) in self.workers.iter().zip(&self.shared.parked) {
            if parked.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Calls `work(0)`, `work(1)`, … `work(parts - 1)` once each, on as many threads as are there to do it; each begins with
    /// its [`share`] of the parts, in order. `work` must not wait for another part, nor call the same team again. Calls from
    /// several threads take turns.
    ///
    /// # Panics
    /// If there are more than 255 parts per thread, or if `work` panics for one of them, once all of them are finished.
    pub fn divide(&self, parts: usize, work: &(dyn Fn(usize) + Sync)) {
        self.call(parts, work, true);
    }

    /// Calls `work` for ranges that together are `0..items`, each of about `least` items or more: as many as take far longer
    /// than claiming them does. Results must not depend on where the ranges end.
    ///
    /// # Panics
    /// As [`divide`](Self::divide).
    pub fn share_out(&self, items: usize, least: usize, work: &(dyn Fn(Range<usize>) + Sync)) {
        let threads = self.threads();
        if threads == 1 {
            return work(0..items);
        }
        let parts = (items / least.max(1)).clamp(threads, PARTS * threads).next_multiple_of(threads);
        self.divide(parts, &|part| {
            let range = share(items, parts, part);
            if !range.is_empty() {
                work(range);
            }
        });
    }

    fn call(&self, parts: usize, work: &(dyn Fn(usize) + Sync), taking_over: bool) {
        if self.workers.is_empty() {
            return (0..parts).for_each(work);
        }
        assert!(parts <= Row::MOST * self.threads(), "divide: at most {} parts per thread", Row::MOST);
        if parts == 0 {
            return;
        }
        let turn = lock(&self.calling);
        // SAFETY: the lifetime is erased so that threads that outlive this call can hold the pointer. They follow it
        // only for a part that they have claimed, and this function does not return before all are finished.
        let work = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work) };
        // SAFETY: `turn` makes this the only caller, and all parts of the last call are finished, so nobody reads it.
        unsafe { *self.shared.job.get() = Some(Job { work, parts, taking_over }) };
        self.shared.remaining.0.store(parts, Ordering::SeqCst);
        let epoch = self.shared.epoch.0.load(Ordering::SeqCst) + 1;
        for (thread, row) in self.shared.rows.iter().enumerate() {
            row.0.fill(epoch, share(parts, self.threads(), thread).len());
        }
        self.announce();
        self.shared.do_parts(epoch, 0);
        self.shared.wait_for_parts();
        let panic = lock(&self.shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Workers for Team {
    fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work(0)` on the calling thread and `work(1)`, … on the others, at the same time. Calls from several
    /// threads take turns; `work` must not call the same team again.
    ///
    /// # Panics
    /// If `work` panics on one of the threads, once all of them have finished.
    fn run(&self, work: &(dyn Fn(usize) + Sync)) {
        self.call(self.threads(), work, false);
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.announce();
        for worker in self.workers.drain(..) {
            // A worker catches what its work panics with, so it ends well.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Team({} threads)", self.threads())
    }
}

impl Shared {
    /// The life of one worker.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_epoch_after(seen, thread);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            self.do_parts(seen, thread);
        }
    }

    /// Does the parts of an epoch that this thread begins with and nobody else has begun, and then what others have not, if
    /// that is allowed.
    fn do_parts(&self, epoch: u64, thread: usize) {
        let (threads, mut done) = (self.rows.len(), 0);
        for owner in (thread..threads).chain(0..thread) {
            let mut taking_over = true;
            while let Some(at) = self.rows[owner].0.claim(epoch) {
                // SAFETY: `job` was written before parts could be claimed, and is not written again before this one is
                // counted below. It is there, since only stopping publishes an epoch without, and that has no parts.
                let Some(Job { work, parts, taking_over: may }) = (unsafe { *self.job.get() }) else { return };
                // SAFETY: the caller keeps the closure alive until this part is counted.
                let work = unsafe { &*work };
                let part = share(parts, threads, owner).start + at;
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(part))) {
                    lock(&self.panic).get_or_insert(panic);
                }
                (done, taking_over) = (done + 1, may);
            }
            // Who comes late finds its row begun by others, or empty; it may still help.
            if !taking_over {
                break;
            }
        }
        if done > 0
            && self.remaining.0.fetch_sub(done, Ordering::SeqCst) == done
            && self.caller_parked.load(Ordering::SeqCst)
            && let Some(caller) = &*lock(&self.caller)
        {
            caller.unpark();
        }
    }

    fn wait_for_epoch_after(&self, seen: u64, thread: usize) -> u64 {
        let is_new = || self.epoch.0.load(Ordering::SeqCst) != seen;
        if !waits_briefly(&is_new) {
            // Announcing sets the epoch and then looks at the flag; here it is the other way round. One of the two
            // sees what the other did, so nobody sleeps through an epoch.
            let parked = &self.parked[thread - 1];
            parked.store(true, Ordering::SeqCst);
            while !is_new() {
                std::thread::park();
            }
            parked.store(false, Ordering::SeqCst);
        }
        self.epoch.0.load(Ordering::SeqCst)
    }

    fn wait_for_parts(&self) {
        let done = || self.remaining.0.load(Ordering::SeqCst) == 0;
        if waits_briefly(&done) {
            return;
        }
        *lock(&self.caller) = Some(std::thread::current());
        self.caller_parked.store(true, Ordering::SeqCst);
        while !done() {
            std::thread::park();
        }
        self.caller_parked.store(false, Ordering::SeqCst);
    }
}

/// Waits for `condition` without giving up the core for long; false if it has not come true.
fn waits_briefly(condition: &impl Fn() -> bool) -> bool {
    for _ in 0..SPINS {
        if condition() {
            return true;
        }
        std::hint::spin_loop();
    }
    for _ in 0..YIELDS {
        if condition() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

/// Locks, whoever may have panicked before: what these mutexes hold is never left half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice that threads of a team write to, each in parts of its own.
#[derive(Debug)]
pub struct SharedSlice<'a, T> {
    first: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose parts are handed to threads; that parts are disjoint is the contract of `part`.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    /// Shares `slice` for as long as it is borrowed.
    #[must_use]
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { first: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// One part.
    ///
    /// # Safety
    /// While the result lives, no other part that overlaps `range` may be alive on any thread.
    ///
    /// # Panics
    /// If `range` does not lie inside the slice.
    #[must_use]
    #[allow(clippy::mut_from_ref)] // the contract above is what makes it exclusive
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part: a range of the slice");
        // SAFETY: the range lies inside the slice, which is mutably borrowed by this value; the caller keeps it to
        // itself.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_thread_works_once_per_call_and_calls_follow_each_other() {
        for threads in [1, 2, 3, 5] {
            let team = Team::new(threads).unwrap();
            assert_eq!(team.threads(), threads);
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for call in 1..=2000 {
                team.run(&|thread| {
                    counts[thread].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == call));
            }
        }
    }

    #[test]
    fn every_part_is_done_once_whoever_does_it() {
        for threads in [1, 2, 5] {
            let team = Team::new(threads).unwrap();
            let counts: Vec<AtomicUsize> = (0..3 * threads + 1).map(|_| AtomicUsize::new(0)).collect();
            let mut expected = vec![0; counts.len()];
            for call in 1..=3000 {
                let work = |part: usize| {
                    counts[part].fetch_add(1, Ordering::Relaxed);
                };
                // All kinds of calls may follow each other.
                let parts = match call % 3 {
                    0 => threads,
                    1 => counts.len(),
                    _ => call % counts.len(),
                };
                if call % 3 == 0 {
                    team.run(&work)
                } else {
                    team.divide(parts, &work)
                }
                expected[..parts].iter_mut().for_each(|count| *count += 1);
                assert!(counts.iter().zip(&expected).all(|(count, n)| count.load(Ordering::Relaxed) == *n));
            }
        }
    }

    #[test]
    fn a_thread_that_is_held_up_keeps_nothing_but_the_part_it_is_at() {
        let team = Team::new(2).unwrap();
        let (begun, parts) = (AtomicUsize::new(0), 8);
        team.divide(parts, &|part| {
            // The first part waits for all others, whichever thread's they are.
            begun.fetch_add(1, Ordering::SeqCst);
            while part == 0 && begun.load(Ordering::SeqCst) < parts {
                std::thread::yield_now();
            }
        });
        assert_eq!(begun.into_inner(), parts);
    }

    #[test]
    fn what_is_shared_out_is_done_once() {
        for threads in [1, 2, 3] {
            let team = Team::new(threads).unwrap();
            for (items, least) in [(0, 1), (1, 1), (7, 2), (100, 1), (1000, 0), (1000, 999), (5, 100)] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                team.share_out(items, least, &|range| {
                    counts[range].iter().for_each(|count| {
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{items} items");
            }
        }
    }

    #[test]
    fn parked_threads_wake_up_and_a_parked_caller_is_woken() {
        let team = Team::new(3).unwrap();
        for slow in 0..3 {
            std::thread::sleep(Duration::from_millis(20));
            let done = AtomicUsize::new(0);
            team.run(&|thread| {
                if thread == slow {
                    std::thread::sleep(Duration::from_millis(30));
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 3);
        }
    }

    #[test]
    fn a_panic_of_any_thread_reaches_the_caller_and_the_team_works_on() {
        let team = Team::new(3).unwrap();
        for bad in 0..3 {
            let panic = catch_unwind(AssertUnwindSafe(|| {
                team.run(&|thread| assert!(thread != bad, "thread {thread} fails"));
            }));
            let message = panic.expect_err("it panicked");
            assert_eq!(message.downcast_ref::<String>(), Some(&format!("thread {bad} fails")));
            let done = AtomicUsize::new(0);
            team.run(&|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 3);
        }
    }

    #[test]
    fn calls_from_several_threads_take_turns() {
        let team = Team::new(2).unwrap();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        team.run(&|thread| {
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                            std::hint::black_box(thread);
                            inside.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
    }

    #[test]
    fn a_team_of_nobody_is_refused() {
        assert!(matches!(Team::new(0), Err(TeamError::NoThreads)));
    }

    #[test]
    fn threads_fill_their_parts_of_a_shared_slice() {
        let team = Team::new(3).unwrap();
        let mut numbers = vec![0; 100];
        let shared = SharedSlice::new(&mut numbers);
        team.run(&|thread| {
            let range = share(100, 3, thread);
            // SAFETY: shares of different threads are disjoint.
            let part = unsafe { shared.part(range.clone()) };
            part.iter_mut().zip(range).for_each(|(number, i)| *number = i);
        });
        assert!(numbers.iter().enumerate().all(|(i, number)| i == *number));
    }
}
