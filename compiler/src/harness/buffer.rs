//! Memory around which nothing may be touched: guard pages next to it, poison in what is left of its own pages.

use std::alloc::Layout;

use region::{Allocation, Protection};

/// Where in its pages a buffer lies, which decides what kind of mistake is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Placement {
    /// On the heap, with poison after it: cheap, notices writes.
    Heap,
    /// On the heap, aligned to no more than its elements are, with poison after it.
    Unaligned,
    /// Directly before a page that cannot be accessed: a read or write past the end faults.
    BeforeGuard,
    /// Directly after a page that cannot be accessed: a read or write before the start faults.
    AfterGuard,
}

impl Placement {
    /// All placements.
    pub const ALL: [Self; 4] = [Self::Heap, Self::Unaligned, Self::BeforeGuard, Self::AfterGuard];
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Heap => "heap",
            Self::Unaligned => "unaligned",
            Self::BeforeGuard => "before-guard",
            Self::AfterGuard => "after-guard",
        })
    }
}

/// The byte that memory holds where nobody has written.
pub(super) const POISON: u8 = 0xa5;

/// Poisoned bytes after a buffer on the heap.
const MARGIN: usize = 128;

/// A fixed number of elements, any bits of which are a value, placed as a [`Placement`] says.
pub(super) struct Buffer<T> {
    pages: Pages,
    /// Bytes from the first accessible one to the first element.
    start: usize,
    len: usize,
    _elements: std::marker::PhantomData<T>,
}

enum Pages {
    /// Accessible as a whole.
    Heap(Vec<Line>),
    /// Accessible but for one page at either end.
    Guarded { allocation: Allocation, page: usize },
}

/// Memory as aligned as any element may ask for.
#[derive(Clone, Copy)]
#[repr(align(64))]
#[expect(dead_code, reason = "its bytes are reached through pointers")]
pub(super) struct Line([u8; 64]);

impl Pages {
    fn first(&self) -> *const u8 {
        match self {
            Self::Heap(lines) => lines.as_ptr().cast(),
            Self::Guarded { allocation, page } => allocation.as_ptr::<u8>().wrapping_add(*page),
        }
    }

    fn first_mut(&mut self) -> *mut u8 {
        match self {
            Self::Heap(lines) => lines.as_mut_ptr().cast(),
            Self::Guarded { allocation, page } => allocation.as_mut_ptr::<u8>().wrapping_add(*page),
        }
    }

    /// Accessible bytes.
    fn len(&self) -> usize {
        match self {
            Self::Heap(lines) => size_of_val(lines.as_slice()),
            Self::Guarded { allocation, page } => allocation.len() - 2 * page,
        }
    }
}

/// Elements for which any bits are a value, so that poison is one too.
///
/// # Safety
/// As the first line says.
pub(super) unsafe trait Plain: Copy {}
// SAFETY: any byte is an `u8`.
unsafe impl Plain for u8 {}
// SAFETY: any four bytes are an `i32`.
unsafe impl Plain for i32 {}
// SAFETY: any four bytes are an `u32`.
unsafe impl Plain for u32 {}
// SAFETY: any four bytes are an `f32`.
unsafe impl Plain for f32 {}
// SAFETY: bytes.
unsafe impl Plain for Line {}
// SAFETY: raw pointers, which may hold any address.
unsafe impl Plain for crate::step_kernel::StepArgs {}
// SAFETY: integers and raw pointers, which may hold any address.
unsafe impl Plain for crate::kernel::KernelArgs {}

impl<T: Plain> Buffer<T> {
    /// A buffer of `len` poisoned elements.
    pub(super) fn poisoned(len: usize, placement: Placement) -> Result<Self, region::Error> {
        let element = Layout::new::<T>();
        let bytes = len * element.size();
        let (pages, start) = match placement {
            Placement::Heap | Placement::Unaligned => {
                let start = if placement == Placement::Heap { 0 } else { element.align() };
                (Pages::Heap(vec![Line([POISON; 64]); (start + bytes + MARGIN).div_ceil(64)]), start)
            }
            Placement::BeforeGuard | Placement::AfterGuard => {
                let page = region::page::size();
                let accessible = bytes.max(1).next_multiple_of(page);
                let allocation = region::alloc(accessible + 2 * page, Protection::READ_WRITE)?;
                let first = allocation.as_ptr::<u8>();
                for guard in [first, first.wrapping_add(page + accessible)] {
                    // SAFETY: a page of the allocation above, which nobody uses yet.
                    unsafe { region::protect(guard, page, Protection::NONE)? };
                }
                let start = if placement == Placement::BeforeGuard { accessible - bytes } else { 0 };
                (Pages::Guarded { allocation, page }, start)
            }
        };
        let mut buffer = Self { pages, start, len, _elements: std::marker::PhantomData };
        // SAFETY: all accessible bytes of a new buffer.
        unsafe { buffer.pages.first_mut().write_bytes(POISON, buffer.pages.len()) };
        Ok(buffer)
    }

    /// A buffer that holds `elements` and may only be read, where the system can see to it.
    pub(super) fn read_only(elements: &[T], placement: Placement) -> Result<Self, region::Error> {
        let mut buffer = Self::poisoned(elements.len(), placement)?;
        buffer.elements_mut().copy_from_slice(elements);
        if let Pages::Guarded { .. } = buffer.pages {
            // SAFETY: the accessible pages of this buffer, which from now on is only lent out for reading: `elements_mut`
            // is private to this module and `poisoned` buffers.
            unsafe { region::protect(buffer.pages.first(), buffer.pages.len(), Protection::READ)? };
        }
        Ok(buffer)
    }

    pub(super) fn elements(&self) -> &[T] {
        // SAFETY: `len` elements from `start` are accessible, aligned (a page or 64 bytes plus a multiple of the
        // element's alignment) and hold values, since any bits are one.
        unsafe { std::slice::from_raw_parts(self.pages.first().wrapping_add(self.start).cast(), self.len) }
    }

    /// The elements of a [`poisoned`](Self::poisoned) buffer.
    pub(super) fn elements_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `elements`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pages.first_mut().wrapping_add(self.start).cast(), self.len) }
    }

    /// Where around the elements a byte has been written, in bytes from the first element.
    pub(super) fn stray_write(&self) -> Option<isize> {
        // SAFETY: all accessible bytes; they have been written since they were allocated.
        let bytes = unsafe { std::slice::from_raw_parts(self.pages.first(), self.pages.len()) };
        let end = self.start + self.len * size_of::<T>();
        let written = |(at, byte): (usize, &u8)| (*byte != POISON).then_some(at);
        let before = bytes[..self.start].iter().enumerate().find_map(written);
        let after = || bytes[end..].iter().enumerate().find_map(written).map(|at| end + at);
        before.or_else(after).map(|at| at.cast_signed() - self.start.cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_kept_and_what_lies_around_them_is_watched() {
        for placement in Placement::ALL {
            for len in [1, 3, 1000, 1024, 5000] {
                let values: Vec<i32> = (0..len).collect();
                let inputs = Buffer::read_only(&values, placement).unwrap();
                assert_eq!((inputs.elements(), inputs.stray_write()), (values.as_slice(), None));
                let mut outputs = Buffer::<u8>::poisoned(values.len(), placement).unwrap();
                outputs.elements_mut().fill(1);
                assert_eq!(outputs.stray_write(), None);
            }
        }
    }

    #[test]
    fn a_write_beside_the_elements_is_found() {
        for placement in [Placement::Heap, Placement::Unaligned, Placement::AfterGuard] {
            let mut buffer = Buffer::<u8>::poisoned(7, placement).unwrap();
            // SAFETY: poison after the elements, of the same accessible pages.
            unsafe { buffer.elements_mut().as_mut_ptr().add(9).write(0) };
            assert_eq!(buffer.stray_write(), Some(9), "{placement}");
        }
        let mut buffer = Buffer::<u8>::poisoned(7, Placement::BeforeGuard).unwrap();
        // SAFETY: as above, before the elements.
        unsafe { buffer.elements_mut().as_mut_ptr().sub(2).write(0) };
        assert_eq!(buffer.stray_write(), Some(-2));
    }

    #[test]
    fn buffers_lie_at_the_edge_of_their_pages() {
        let page = region::page::size();
        let place = |placement| Buffer::<u8>::poisoned(100, placement).unwrap().elements().as_ptr_range();
        assert!(place(Placement::BeforeGuard).end.addr().is_multiple_of(page));
        assert!(place(Placement::AfterGuard).start.addr().is_multiple_of(page));
        assert!(!place(Placement::Unaligned).start.addr().is_multiple_of(2));
    }
}
