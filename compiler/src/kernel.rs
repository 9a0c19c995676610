//! Compiled kernels: their calling convention, their memory, and the safe side of calling them.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

use cranelift_jit::JITModule;

use crate::{ActivationFormat, Columns, KernelSpec, Layout, Schedule};

/// The one argument of every kernel. Fields are eight bytes each, in the order of
/// [`Argument`](crate::machine::Argument).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct KernelArgs {
    pub(crate) weights: *const u8,
    pub(crate) tiles: u64,
    pub(crate) activations: *const u8,
    pub(crate) columns: u64,
    pub(crate) sums: *const i32,
    pub(crate) out: *mut i32,
    pub(crate) out_stride: u64,
    pub(crate) last_column: *const u8,
    pub(crate) scratch: *mut u8,
    pub(crate) list: *const u32,
}

#[cfg(target_arch = "x86_64")]
type Entry = unsafe extern "sysv64" fn(*const KernelArgs);
#[cfg(not(target_arch = "x86_64"))]
type Entry = unsafe extern "C" fn(*const KernelArgs);

/// Executable memory of one batch of kernels, given back when the last of them is dropped.
struct CodeMemory {
    module: ManuallyDrop<JITModule>,
}

// SAFETY: after `finalize_definitions` the module is never touched again, except by `drop`, which has it alone.
unsafe impl Send for CodeMemory {}
// SAFETY: as above; there is no way to reach the module through a shared reference.
unsafe impl Sync for CodeMemory {}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: `module` is taken once, here. Kernels keep an `Arc` of this memory, so none of them exists any more.
        unsafe { ManuallyDrop::take(&mut self.module).free_memory() }
    }
}

/// A kernel in executable memory, checked against `kernels-ref`. Cheap to clone; shared by threads.
#[derive(Clone)]
pub struct Kernel {
    spec: KernelSpec,
    schedule: Schedule,
    entry: Entry,
    code_bytes: usize,
    _memory: Arc<CodeMemory>,
}

/// Prepared columns of activations, as [`ActivationFormat::prepare`] makes them.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    /// The columns, one every `stride` bytes.
    pub columns: &'a [u8],
    /// Bytes from one column to the next, which kernels take to be [`ActivationFormat::bytes`].
    pub stride: usize,
    /// `Σ a` of each column; its length is the number of columns.
    pub sums: &'a [i32],
}

/// Where results go: column `c`, row `r` at index `c · stride + r`. Threads share it, each with other rows.
#[derive(Debug)]
pub struct OutRows<'a> {
    first: *mut i32,
    len: usize,
    stride: usize,
    _results: PhantomData<&'a mut [i32]>,
}

// SAFETY: the pointer is only written through `Kernel::run`, whose contract gives concurrent calls disjoint rows.
unsafe impl Send for OutRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for OutRows<'_> {}

impl<'a> OutRows<'a> {
    /// Results go to `results`, with `stride` elements from one column to the next. A stride is at least the number of
    /// rows padded to whole tiles: padding rows are written too.
    #[must_use]
    pub fn new(results: &'a mut [i32], stride: usize) -> Self {
        Self { first: results.as_mut_ptr(), len: results.len(), stride, _results: PhantomData }
    }
}

impl Kernel {
    /// What it computes.
    #[must_use]
    pub const fn spec(&self) -> KernelSpec {
        self.spec
    }

    /// How it computes it.
    #[must_use]
    pub const fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// The order of weights that it reads.
    #[must_use]
    pub const fn layout(&self) -> Layout {
        self.schedule.layout
    }

    /// The form of activations that it reads.
    #[must_use]
    pub fn activation_format(&self) -> ActivationFormat {
        self.schedule.activation_format()
    }

    /// Bytes of machine code.
    #[must_use]
    pub const fn code_bytes(&self) -> usize {
        self.code_bytes
    }

    /// The same code, said to be something that it is not.
    #[cfg(test)]
    pub(crate) fn mislabelled(&self, spec: KernelSpec, schedule: Schedule) -> Self {
        Self { spec, schedule, ..self.clone() }
    }

    /// Computes the rows of `tiles` for all columns. `weights` is the whole matrix in this kernel's layout.
    ///
    /// # Safety
    /// Calls that run at the same time with the same `out` must have disjoint `tiles`, and nothing else may read or
    /// write these rows of `out` meanwhile.
    ///
    /// # Panics
    /// If a slice is too short for the tiles, columns and strides that are asked for, or the number of columns is not
    /// what the kernel was compiled for.
    pub unsafe fn run(&self, weights: &[u8], tiles: Range<usize>, activations: &Activations<'_>, out: &OutRows<'_>) {
        let mut start = tiles.start;
        for count in self.parts(tiles) {
            let part = start..start + count;
            start = part.end;
            with_scratch(self.schedule.scratch_bytes(count), |scratch| {
                if let Some(args) = self.arguments(weights, part, activations, out, scratch) {
                    // SAFETY: `arguments` has checked the slices, the scratch is as long as it has to be, and the
                    // caller keeps other threads off these rows.
                    unsafe { self.enter(&raw const args) }
                }
            });
        }
    }

    /// The record that [`run`](Self::run) hands to the code, or `None` for no tiles.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub(crate) fn arguments(
        &self,
        weights: &[u8],
        tiles: Range<usize>,
        activations: &Activations<'_>,
        out: &OutRows<'_>,
        scratch: *mut u8,
    ) -> Option<KernelArgs> {
        let (layout, k) = (self.schedule.layout, self.spec.k);
        let columns = activations.sums.len();
        match self.spec.columns {
            Columns::One => assert_eq!(columns, 1, "a kernel for one column"),
            Columns::Many => assert!(columns >= 1, "at least one column"),
            Columns::ListedRows | Columns::ListedColumns => panic!("a kernel that reads a list is called with one"),
        }
        if tiles.is_empty() {
            return None;
        }
        let fits = |last: usize, stride: usize, item: usize, len: usize| {
            last.checked_mul(stride).and_then(|at| at.checked_add(item)).is_some_and(|end| end <= len)
        };
        let tile_bytes = layout.tile_bytes(k);
        let rows = tiles.end.checked_mul(layout.tile_rows()).expect("rows of the tiles");
        assert!(fits(tiles.end, tile_bytes, 0, weights.len()), "weights of all tiles");
        let column_bytes = self.activation_format().bytes(k);
        assert!(activations.stride == column_bytes || columns == 1, "one column right after the other");
        assert!(fits(columns - 1, activations.stride, column_bytes, activations.columns.len()), "all columns");
        assert!(out.stride >= rows || columns == 1, "columns of results do not overlap");
        assert!(fits(columns - 1, out.stride, rows, out.len), "results of all rows and columns");
        Some(KernelArgs {
            weights: weights[tiles.start * tile_bytes..].as_ptr(),
            tiles: tiles.len() as u64,
            activations: activations.columns.as_ptr(),
            columns: columns as u64,
            sums: activations.sums.as_ptr(),
            out: out.first.wrapping_add(tiles.start * layout.tile_rows()),
            out_stride: 4 * out.stride as u64,
            last_column: activations.columns[(columns - 1) * column_bytes..].as_ptr(),
            scratch,
            list: std::ptr::null(),
        })
    }

    /// Runs the code.
    ///
    /// # Safety
    /// `args` points to what [`arguments`](Self::arguments), or its like for lists, returned for slices that still exist, its scratch has
    /// [`scratch_bytes`](Schedule::scratch_bytes) that nothing else uses, and the contract of [`run`](Self::run) holds.
    pub(crate) unsafe fn enter(&self, args: *const KernelArgs) {
        // SAFETY: the code was compiled for this CPU and checked; it reads `tiles.len()` tiles of weights, `columns`
        // columns of activations and sums, and writes whole tiles of rows in every column, all of which the assertions
        // of `arguments` place inside their slices whatever the bytes are, and the scratch that its schedule says it
        // needs. The caller keeps other threads off these rows.
        unsafe { (self.entry)(args) }
    }

    /// How many tiles to pass to the code at a time: all of them, or, if it keeps sums of all rows in its scratch, as
    /// many as leave that in the second-level cache.
    fn parts(&self, tiles: Range<usize>) -> impl Iterator<Item = usize> {
        let most =
            if self.schedule.scratch_bytes(1) == 0 { usize::MAX } else { SCRATCH_ROWS / self.layout().tile_rows() };
        let parts = tiles.len().div_ceil(most.max(1));
        (0..parts).map(move |part| (part + 1) * tiles.len() / parts - part * tiles.len() / parts)
    }
}

/// Rows that a kernel keeps sums of at a time.
const SCRATCH_ROWS: usize = 2048;

/// Calls `work` with the address of at least `bytes` bytes that this thread may write until it returns.
fn with_scratch(bytes: usize, work: impl FnOnce(*mut u8)) {
    /// 64 bytes, aligned as kernels expect.
    #[derive(Clone, Copy)]
    #[repr(align(64))]
    struct Line {
        _bytes: [u8; 64],
    }

    thread_local! {
        static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|lines| {
        let needed = bytes.div_ceil(64);
        if lines.len() < needed {
            lines.resize(needed, Line { _bytes: [0; 64] });
        }
        work(lines.as_mut_ptr().cast());
    });
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernel({}, {})", self.spec, self.schedule)
    }
}

/// A batch of kernels whose code has been placed but not yet checked.
pub(crate) fn place(module: JITModule, functions: Vec<(KernelSpec, Schedule, *const u8, usize)>) -> Vec<Kernel> {
    let memory = Arc::new(CodeMemory { module: ManuallyDrop::new(module) });
    functions
        .into_iter()
        .map(|(spec, schedule, address, code_bytes)| Kernel {
            spec,
            schedule,
            // SAFETY: `address` is a finalised function of the module, emitted with the signature of `Entry`.
            entry: unsafe { std::mem::transmute::<*const u8, Entry>(address) },
            code_bytes,
            _memory: Arc::clone(&memory),
        })
        .collect()
}
