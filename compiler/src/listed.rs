//! Lists of records, for kernels that read a part of a matrix.
//!
//! A record is a row of [`Layout::Rows`](crate::Layout::Rows) with one row to a tile, or a column of
//! [`Layout::Columns`](crate::Layout::Columns). Where each begins is up to the caller: records of two matrices may lie
//! side by side, so that whoever reads one has asked for the other.

use std::ops::Range;

use crate::kernel::KernelArgs;
use crate::{Activations, Columns, Kernel};

/// Places of a list that a kernel works on at once are a part of this many, so lists are divided in such groups.
pub const GROUP: usize = 8;

/// Some records of a matrix, in the order in which they are to be read, and an activation for each.
///
/// The list is padded to whole groups with a record that exists and activations of 0, and then by
/// [`LOOK_AHEAD`](Self::LOOK_AHEAD) places that kernels may ask the cache for.
#[derive(Clone, Debug, Default)]
pub struct RecordList {
    /// Where records begin, in bytes from the start of the weights.
    offsets: Vec<u32>,
    /// Activations, of whole groups.
    factors: Vec<i8>,
    records: usize,
    /// The largest offset.
    last: u32,
}

impl RecordList {
    /// How many places ahead a kernel may look.
    pub const LOOK_AHEAD: usize = 64;

    /// An empty list that has room for `records` records before it allocates.
    #[must_use]
    pub fn with_capacity(records: usize) -> Self {
        let places = records.next_multiple_of(GROUP);
        let (offsets, factors) = (Vec::with_capacity(places + Self::LOOK_AHEAD), Vec::with_capacity(places));
        Self { offsets, factors, records: 0, last: 0 }
    }

    /// Replaces the list by these records: where each begins, in bytes from the start of the weights, and its activation,
    /// which kernels for listed rows do not read.
    pub fn fill(&mut self, records: impl Iterator<Item = (u32, i8)>) {
        self.offsets.clear();
        self.factors.clear();
        for (offset, factor) in records {
            self.offsets.push(offset);
            self.factors.push(factor);
        }
        self.records = self.offsets.len();
        self.last = self.offsets.iter().copied().max().unwrap_or(0);
        let places = self.records.next_multiple_of(GROUP);
        self.factors.resize(places, 0);
        self.offsets.resize(places + Self::LOOK_AHEAD, self.offsets.last().copied().unwrap_or(0));
    }

    /// Number of records.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.records
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// All offsets, padding and all.
    #[must_use]
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// All activations, padded to whole groups.
    #[must_use]
    pub fn factors(&self) -> &[i8] {
        &self.factors
    }

    /// Number of [groups](GROUP), the last of them perhaps padded.
    #[must_use]
    pub const fn groups(&self) -> usize {
        self.records.div_ceil(GROUP)
    }
}

impl Kernel {
    /// Computes the products of the records in `groups` of the list, one result after the other into `out`, which has
    /// [`GROUP`] elements for each group. `weights` is what offsets count from.
    ///
    /// # Panics
    /// If the kernel is none for listed rows, a record does not lie within `weights`, or a slice is too short.
    pub fn run_listed_rows(
        &self,
        weights: &[u8],
        list: &RecordList,
        groups: Range<usize>,
        activations: &Activations<'_>,
        out: &mut [i32],
    ) {
        if let Some(args) = self.listed_rows(weights, list, groups, activations, out) {
            // SAFETY: `listed_rows` has checked every slice, and `out` is borrowed exclusively.
            unsafe { self.enter(&raw const args) }
        }
    }

    /// Computes `Σ a · column` over the records in `groups` of the list into `out`, which has four elements for every byte
    /// of a record. Sums over several ranges of groups may be added up.
    ///
    /// # Panics
    /// If the kernel is none for listed columns, a record does not lie within `weights`, or `out` has another length.
    pub fn run_listed_columns(&self, weights: &[u8], list: &RecordList, groups: Range<usize>, out: &mut [i32]) {
        let factors = &list.factors[groups.start * GROUP..groups.end * GROUP];
        let sum = factors.iter().map(|factor| i32::from(*factor)).sum();
        let args = self.listed_columns(weights, list, groups, &sum, out);
        // SAFETY: as above; the sum lives until the call returns.
        unsafe { self.enter(&raw const args) }
    }

    /// The record that [`run_listed_rows`](Self::run_listed_rows) hands to the code, or `None` for no groups.
    pub(crate) fn listed_rows(
        &self,
        weights: &[u8],
        list: &RecordList,
        groups: Range<usize>,
        activations: &Activations<'_>,
        out: &mut [i32],
    ) -> Option<KernelArgs> {
        assert_eq!(self.spec().columns, Columns::ListedRows, "a kernel for listed rows");
        self.check_records(weights, list, &groups);
        assert!(activations.columns.len() >= self.activation_format().bytes(self.spec().k), "a whole column");
        assert_eq!((activations.sums.len(), out.len()), (1, groups.len() * GROUP), "one column and its results");
        (!groups.is_empty()).then(|| KernelArgs {
            activations: activations.columns.as_ptr(),
            sums: activations.sums.as_ptr(),
            ..self.list_args(weights, list, groups, out)
        })
    }

    /// The record that [`run_listed_columns`](Self::run_listed_columns) hands to the code.
    pub(crate) fn listed_columns(
        &self,
        weights: &[u8],
        list: &RecordList,
        groups: Range<usize>,
        sum: &i32,
        out: &mut [i32],
    ) -> KernelArgs {
        assert_eq!(self.spec().columns, Columns::ListedColumns, "a kernel for listed columns");
        self.check_records(weights, list, &groups);
        assert_eq!(out.len(), 4 * self.layout().row_bytes(self.spec().k), "a result for every weight of a record");
        KernelArgs {
            activations: list.factors[groups.start * GROUP..].as_ptr().cast(),
            sums: sum,
            ..self.list_args(weights, list, groups, out)
        }
    }

    /// Whether all records lie within `weights` and the groups within the list.
    fn check_records(&self, weights: &[u8], list: &RecordList, groups: &Range<usize>) {
        assert!(groups.start <= groups.end && groups.end <= list.groups(), "groups of the list");
        let record = self.layout().row_bytes(self.spec().k);
        let end = (list.last as usize).checked_add(record);
        assert!(groups.is_empty() || end.is_some_and(|end| end <= weights.len()), "records within the weights");
    }

    fn list_args(&self, weights: &[u8], list: &RecordList, groups: Range<usize>, out: &mut [i32]) -> KernelArgs {
        // Past the last group there are places to look ahead, and as many for any group.
        let offsets = list.offsets.get(groups.start * GROUP..).unwrap_or_default();
        KernelArgs {
            weights: weights.as_ptr(),
            tiles: (groups.len() * GROUP) as u64,
            activations: std::ptr::null(),
            columns: 1,
            sums: std::ptr::null(),
            out: out.as_mut_ptr(),
            out_stride: 0,
            last_column: std::ptr::null(),
            scratch: std::ptr::null_mut(),
            list: offsets.as_ptr(),
        }
    }
}

#[cfg(test)]
mod tests {
    use ternion_kernels_ref::{QuantizedRow, TernaryMatrix, Trit};

    use super::*;
    use crate::{Cpu, KernelSpec, Schedule, compile};

    const K: usize = 100;

    /// A kernel, records for it, and their trits.
    fn records(columns: Columns) -> (Kernel, Vec<u8>, TernaryMatrix) {
        let (spec, cpu) = (KernelSpec { k: K, columns }, Cpu::host().expect("tests run where ternion emits code"));
        let kernel = compile(&[(spec, Schedule::candidates(&spec, &cpu)[0])], &cpu).expect("a candidate").remove(0);
        let matrix = TernaryMatrix::from_fn(5, K, |r, c| Trit::ALL[(r * r + 2 * r * c + c) % 3]);
        (kernel.clone(), kernel.layout().pack(matrix.view()), matrix)
    }

    fn list(kernel: &Kernel, listed: &[(u32, i8)]) -> RecordList {
        let record = kernel.layout().row_bytes(K) as u32;
        let mut list = RecordList::default();
        list.fill(listed.iter().map(|(at, factor)| (at * record, *factor)));
        list
    }

    #[test]
    fn columns_count_as_often_as_they_are_listed_and_parts_add_up() {
        let (kernel, weights, matrix) = records(Columns::ListedColumns);
        let listed: Vec<_> =
            [3, 3, 0, 4, 1, 1, 2, 0, 3, 4].into_iter().zip([127, -127, 5, 0, 7, 7, -1, 2, 9, 1]).collect();
        let list = list(&kernel, &listed);
        assert_eq!((list.len(), list.groups()), (10, 2));
        let run = |groups| {
            let mut out = vec![i32::MIN; 4 * kernel.layout().row_bytes(K)];
            kernel.run_listed_columns(&weights, &list, groups, &mut out);
            out
        };
        let (whole, first, second, none) = (run(0..2), run(0..1), run(1..2), run(0..0));
        for at in 0..K {
            let expected: i32 =
                listed.iter().map(|(record, a)| i32::from(*a) * matrix.trit(*record as usize, at) as i32).sum();
            assert_eq!((whole[at], first[at] + second[at], none[at]), (expected, expected, 0));
        }
    }

    #[test]
    fn rows_come_in_the_order_of_the_list_as_often_as_they_are_listed() {
        let (kernel, weights, matrix) = records(Columns::ListedRows);
        let listed = [4, 0, 4, 2, 2, 1, 3, 0, 4];
        let list = list(&kernel, &listed.map(|record| (record, 0)));
        let column = QuantizedRow::new(&(0..K).map(|i| i as f32 - 40.0).collect::<Vec<_>>());
        let mut prepared = vec![0; kernel.activation_format().bytes(K)];
        kernel.activation_format().prepare(column.values(), &mut prepared);
        let activations = Activations { columns: &prepared, stride: prepared.len(), sums: &[column.sum()] };
        let mut out = [i32::MIN; 2 * GROUP];
        kernel.run_listed_rows(&weights, &list, 0..2, &activations, &mut out);
        for (record, found) in listed.into_iter().zip(out) {
            let terms = column
                .values()
                .iter()
                .enumerate()
                .map(|(at, a)| i32::from(*a) * matrix.trit(record as usize, at) as i32);
            assert_eq!(found, terms.sum::<i32>());
        }
    }

    #[test]
    #[should_panic(expected = "records within the weights")]
    fn a_record_past_the_weights_is_refused() {
        let (kernel, weights, _) = records(Columns::ListedColumns);
        let list = list(&kernel, &[(1, 1), (5, 1), (0, 1)]);
        let mut out = vec![0; 4 * kernel.layout().row_bytes(K)];
        kernel.run_listed_columns(&weights, &list, 0..1, &mut out);
    }
}
