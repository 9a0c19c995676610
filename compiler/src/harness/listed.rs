//! The harness for kernels that read a list of records.
//!
//! Records lie with as much foreign memory between them as they are long, the last one at the end of its buffer. Which of
//! them are listed follows from the problem's seed: none, all, or some.

use std::time::Duration;

use ternion_kernels_ref::{QuantizedRow, gemm};

use super::buffer::Buffer;
use super::problem::Random;
use super::{Data, Fault, Placement, Problem};
use crate::check::Mismatch;
use crate::kernel::KernelArgs;
use crate::listed::GROUP;
use crate::{Activations, Columns, Kernel, RecordList};

/// As [`check_and_time`](super::check_and_time), on the problem's first column.
pub(super) fn check_and_time(
    kernel: &Kernel,
    problem: &Problem,
    placement: Placement,
    repeats: usize,
    clock: &mut dyn FnMut() -> Duration,
) -> Result<Vec<Duration>, Fault> {
    let run = Run::new(kernel, problem, placement)?;
    run.check()?;
    let mut times = Vec::with_capacity(repeats);
    let mut results = Buffer::poisoned(run.results(run.list.groups()), placement)?;
    if let Some((args, _keep)) = run.arguments(0..run.list.groups(), &mut results)? {
        for _ in 0..repeats {
            let start = clock();
            // SAFETY: as in `compute`.
            unsafe { kernel.enter(args.elements().as_ptr()) };
            times.push(clock().saturating_sub(start));
        }
    }
    Ok(times)
}

struct Run<'a> {
    kernel: &'a Kernel,
    problem: &'a Problem,
    placement: Placement,
    weights: Buffer<u8>,
    activations: Buffer<u8>,
    sum: Buffer<i32>,
    list: RecordList,
    /// Indices of the records that are listed.
    listed: Vec<usize>,
}

impl<'a> Run<'a> {
    fn new(kernel: &'a Kernel, problem: &'a Problem, placement: Placement) -> Result<Self, Fault> {
        let (layout, k) = (kernel.layout(), kernel.spec().k);
        let by_rows = kernel.spec().columns == Columns::ListedRows;
        let (packed, records) = if by_rows {
            assert_eq!(problem.k(), k, "a problem with rows of the kernel's length");
            (problem.pack(layout), problem.m())
        } else {
            assert_eq!(problem.m(), k, "a problem with columns of the kernel's length");
            (problem.pack_transposed(layout), problem.k())
        };
        let record = layout.row_bytes(k);
        let mut random = Random::new(problem.seed());
        let mut weights: Vec<u8> = Vec::new();
        for (i, bytes) in packed.chunks_exact(record).enumerate() {
            weights.extend(std::iter::repeat_with(|| random.next() as u8).take(if i == 0 { 0 } else { record }));
            weights.extend(bytes);
        }
        let share = [0, 2, 5, 8][(random.next() % 4) as usize];
        let listed: Vec<_> = (0..records).filter(|_| random.next() % 8 < share).collect();
        let column = &problem.columns()[0];
        let factor = |i: usize| if by_rows { 0 } else { column.values()[i] };
        let mut list = RecordList::default();
        list.fill(listed.iter().map(|i| ((2 * i * record) as u32, factor(*i))));

        let format = kernel.activation_format();
        let activations = if by_rows {
            let mut prepared = vec![0; format.bytes(k)];
            format.prepare(column.values(), &mut prepared);
            prepared
        } else {
            list.factors().iter().map(|factor| factor.cast_unsigned()).collect()
        };
        let sum = if by_rows { column.sum() } else { list.factors().iter().map(|factor| i32::from(*factor)).sum() };
        Ok(Self {
            kernel,
            problem,
            placement,
            weights: Buffer::read_only(&weights, placement)?,
            activations: Buffer::read_only(&activations, placement)?,
            sum: Buffer::read_only(&[sum], placement)?,
            list,
            listed,
        })
    }

    fn by_rows(&self) -> bool {
        self.kernel.spec().columns == Columns::ListedRows
    }

    /// Results of a call for so many groups.
    fn results(&self, groups: usize) -> usize {
        if self.by_rows() { groups * GROUP } else { 4 * self.kernel.layout().row_bytes(self.kernel.spec().k) }
    }

    /// The argument record of a call for `groups`, and the list that it points to; `None` if there is nothing to do.
    #[expect(clippy::type_complexity, reason = "two buffers, used at once")]
    fn arguments(
        &self,
        groups: std::ops::Range<usize>,
        results: &mut Buffer<i32>,
    ) -> Result<Option<(Buffer<KernelArgs>, Buffer<u32>)>, Fault> {
        let (weights, out) = (self.weights.elements(), results.elements_mut());
        let (list, sum) = (&self.list, self.sum.elements());
        let args = if self.by_rows() {
            let columns = self.activations.elements();
            let activations = Activations { columns, stride: columns.len(), sums: sum };
            self.kernel.listed_rows(weights, list, groups.clone(), &activations, out)
        } else {
            let args = self.kernel.listed_columns(weights, list, groups.clone(), &sum[0], out);
            Some(KernelArgs { activations: self.activations.elements()[groups.start * GROUP..].as_ptr(), ..args })
        };
        let Some(args) = args else { return Ok(None) };
        let offsets = Buffer::read_only(&self.list.offsets()[groups.start * GROUP..], self.placement)?;
        let args = KernelArgs { list: offsets.elements().as_ptr(), ..args };
        Ok(Some((Buffer::read_only(&[args], self.placement)?, offsets)))
    }

    fn compute(&self, groups: std::ops::Range<usize>) -> Result<Buffer<i32>, Fault> {
        let mut results = Buffer::poisoned(self.results(groups.len()), self.placement)?;
        if let Some((args, _list)) = self.arguments(groups, &mut results)? {
            // SAFETY: the record points to buffers of `self` and to ones that live until the end of the block.
            unsafe { self.kernel.enter(args.elements().as_ptr()) }
        }
        match results.stray_write() {
            Some(offset) => Err(Fault::StrayWrite { offset }),
            None => Ok(results),
        }
    }

    fn check(&self) -> Result<(), Fault> {
        let groups = self.list.groups();
        if !self.by_rows() {
            let found = self.compute(0..groups)?;
            let column = &self.problem.columns()[0];
            let mut values = vec![0; column.values().len()];
            self.listed.iter().for_each(|i| values[*i] = column.values()[*i]);
            let masked = QuantizedRow::from_values(values).expect("values of a column");
            let expected = || gemm::gemm(self.problem.weights(), &[masked]);
            return self.compare(found.elements(), expected, |at| at);
        }
        // In two calls.
        let middle = groups / 2;
        let (first, second) = (self.compute(0..middle)?, self.compute(middle..groups)?);
        let found = [first.elements(), second.elements()].concat();
        let expected = || {
            let all = self.problem.expected().unwrap_or_default();
            self.listed.iter().map(|row| all[*row]).collect()
        };
        self.compare(&found, expected, |at| self.listed[at])
    }

    fn compare(
        &self,
        found: &[i32],
        expected: impl FnOnce() -> Vec<i32>,
        row: impl Fn(usize) -> usize,
    ) -> Result<(), Fault> {
        if self.problem.data() == Data::InvalidCodes {
            return Ok(());
        }
        let pairs = found.iter().copied().zip(expected());
        match pairs.enumerate().find(|(_, (found, expected))| found != expected) {
            None => Ok(()),
            Some((at, (found, expected))) => {
                let (seed, row) = (self.problem.seed(), row(at));
                Err(Fault::Mismatch(Mismatch { seed, row, column: 0, expected, found }))
            }
        }
    }
}
