//! Large buffers to measure on: huge pages asked for, filled by the threads that will read them.

use ternion_kernels_ref::SplitMix64;

use crate::Workers;
use crate::workers::fill_shared;

/// A huge page: buffers start at a multiple of it, and no two threads fill the same one.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes that one thread fills before the time is looked at again.
const STEP: usize = 2 * HUGE_PAGE;

/// Memory that has been written page by page, so that reading it reads memory and not the system's page of zeros.
pub struct Buffer {
    storage: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// Up to `bytes` bytes of pseudo-random ternary codes (every two bits are 0, 1 or 2), as a packed matrix has them.
    /// Once it has `at_least` so many, it ends early where `enough` says so, which is asked every few megabytes; `None`
    /// if the system does not give the memory.
    pub fn of_codes(
        bytes: usize,
        at_least: usize,
        workers: &dyn Workers,
        mut enough: impl FnMut() -> bool,
    ) -> Option<Self> {
        let length = bytes.checked_next_multiple_of(64)?;
        let room = length.checked_add(HUGE_PAGE)?;
        // Asks first, since a failing `vec!` ends the process; the zeros below are then pages that nobody has touched.
        Vec::<u8>::new().try_reserve_exact(room).ok()?;
        let mut storage = vec![0u8; room];
        let start = storage.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        let target = &mut storage[start..start + length];
        advise_huge_pages(target);
        let step = STEP.saturating_mul(workers.threads().max(1));
        let mut filled = 0;
        for target in target.chunks_mut(step) {
            if filled >= at_least && enough() {
                break;
            }
            fill_shared(workers, target, HUGE_PAGE, &|at, part| fill_with_codes((filled + at) as u64, part));
            filled += target.len();
        }
        Some(Self { storage, start, length: filled })
    }

    /// What has been filled; starts at a multiple of 64 bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.storage[self.start..][..self.length]
    }
}

/// Random codes from a seed, with every code 3 lowered to 2.
fn fill_with_codes(seed: u64, target: &mut [u8]) {
    let mut random = SplitMix64::new(seed);
    for word in target.as_chunks_mut::<8>().0 {
        let bits = random.next_u64();
        *word = (bits & !(bits >> 1 & 0x5555_5555_5555_5555)).to_ne_bytes();
    }
}

/// Asks for huge pages under a range that nobody has written yet. They save the page walks that otherwise cost a
/// streaming read up to a quarter of its speed; it is only advice, so its result does not matter.
#[cfg(target_os = "linux")]
fn advise_huge_pages(range: &mut [u8]) {
    if range.as_ptr().addr().is_multiple_of(HUGE_PAGE) {
        // SAFETY: the range is memory of ours, borrowed exclusively, and this advice changes no byte of it.
        unsafe { libc::madvise(range.as_mut_ptr().cast(), range.len(), libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: &mut [u8]) {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::test_team::Scoped;

    #[test]
    fn a_buffer_holds_ternary_codes_and_nothing_else() {
        let buffer = Buffer::of_codes(1 << 20, 0, &Scoped(2), || false).unwrap();
        assert_eq!(buffer.bytes().len(), 1 << 20);
        assert!(buffer.bytes().iter().all(|byte| byte & byte >> 1 & 0x55 == 0), "code 3");
        assert!(buffer.bytes().chunks(64).all(|line| line.iter().any(|byte| *byte != 0)));
    }

    #[test]
    fn filling_ends_when_it_is_enough() {
        let filled = |at_least| Buffer::of_codes(4 * STEP, at_least, &Scoped(1), || true).unwrap().bytes().len();
        assert_eq!([0, 1, STEP + 1, 9 * STEP].map(filled), [0, STEP, 2 * STEP, 4 * STEP]);
    }
}
