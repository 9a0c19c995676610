//! Large zeroed buffers on huge pages where the system has them.
//!
//! Decoding streams through hundreds of megabytes per token; with 4 KiB pages it would spend a good part of its time
//! looking up addresses. Memory is touched first by whoever fills it, in parallel.

use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Size of a huge page on x86-64 and on aarch64 with 4 KiB pages.
const HUGE_PAGE: usize = 2 << 20;

/// Zeroed bytes that start on a page: a huge one if there is room for one.
#[derive(Debug)]
pub struct PageBuffer {
    map: Option<MmapMut>,
    start: usize,
    len: usize,
}

impl PageBuffer {
    /// A buffer of `len` zero bytes.
    ///
    /// # Errors
    /// If the system has not that much memory.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        if len == 0 {
            return Ok(Self { map: None, start: 0, len });
        }
        let room = if len < HUGE_PAGE { len } else { len.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)? };
        let map = MmapMut::map_anon(room)?;
        let start = if len < HUGE_PAGE { 0 } else { map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE) };
        #[cfg(target_os = "linux")]
        if len >= HUGE_PAGE {
            // Only advice: without huge pages everything works the same, a little slower.
            let _ = map.advise_range(memmap2::Advice::HugePage, start, len);
        }
        Ok(Self { map: Some(map), start, len })
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_ref().map_or(&[], |map| &map[self.start..][..self.len])
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.as_mut().map_or(&mut [], |map| &mut map[self.start..][..self.len])
    }
}

/// Bytes of a cache line on every machine that matters; elsewhere a prefetch asks for too much or too little.
const CACHE_LINE: usize = 64;

/// Asks the first cache for memory that will be read within less than a microsecond. It has no effect but on speed.
#[inline(always)]
pub fn prefetch<T>(values: &[T]) {
    let first = values.as_ptr().cast::<u8>();
    for line in 0..size_of_val(values).div_ceil(CACHE_LINE) {
        let address = first.wrapping_add(line * CACHE_LINE);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint reads nothing, whatever the address is; SSE is there on every x86-64.
        unsafe {
            core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(address.cast());
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a hint reads nothing, whatever the address is.
        unsafe {
            core::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let _ = address;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_all_sizes_are_zero_and_begin_on_a_page() {
        for len in [0, 1, 4096, HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE + 5] {
            let mut buffer = PageBuffer::zeroed(len).unwrap();
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|byte| *byte == 0));
            let page = if len < HUGE_PAGE { 4096 } else { HUGE_PAGE };
            assert!(len == 0 || buffer.as_ptr().align_offset(page) == 0);
            buffer.fill(1);
        }
    }

    #[test]
    fn more_than_there_is_is_refused() {
        assert!(PageBuffer::zeroed(usize::MAX).is_err());
        assert!(PageBuffer::zeroed(usize::MAX / 2).is_err());
    }
}
