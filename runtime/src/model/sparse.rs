//! The part of a relu² feed-forward that has to be computed for one token.
//!
//! `relu²(gate)` is 0 for every gate at or below 0, so rows of the up-projection for such gates are not read: 0 times
//! anything that they could give is 0. Then int8 activations of the down-projection that are 0 contribute nothing, so
//! their columns are not read either. In a trained model that leaves a fifth of one matrix and a tenth of the other.
//! Nothing is approximated: what is left out are zeros.
//!
//! Both matrices are kept a second time as records for this, row by row and column by column: where a prepared file has
//! them mapped, or else in memory of our own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use ternion_compiler::listed::GROUP;
use ternion_compiler::{Activations, Columns, Cpu, Kernel, KernelSpec, Layout, RecordList, Schedule, compile};
use ternion_tuner::{ListChoice, SparseChoice, Workers};

use super::ModelError;
use super::weights::Place;
use crate::formats::{Activation, Bytes, Checkpoint, ModelConfig, Projection};
use crate::memory::PageBuffer;
use crate::ops;
use crate::team::{PART_BYTES, SharedSlice, Team, share};

/// The up- and down-projections of all layers as records, and the kernels that read them.
#[derive(Debug)]
pub(super) struct SparseFfn {
    rows: Kernel,
    columns: Kernel,
    /// For every layer where its up-projection is, and its down-projection.
    layers: Vec<[Place; 2]>,
    /// Those that were packed when the model was loaded.
    records: PageBuffer,
    /// The largest shares of rows and of columns for which lists are read.
    worth: [f64; 2],
}

/// The largest shares of rows and of columns for which reading them one by one is faster than reading the whole matrix,
/// where this machine has not been measured: scattered records come at a half to a third of the speed of a stream.
const WORTH: [f64; 2] = [0.35, 0.4];

/// The kernels for rows and for columns of a model whose activation makes zeros: those of `choice`, or the best guess; `None`
/// for other models.
pub(super) fn jobs(
    config: &ModelConfig,
    choice: Option<&SparseChoice>,
    cpu: &Cpu,
) -> Option<[(KernelSpec, Schedule); 2]> {
    let job = |columns, tuned: Option<&ListChoice>| {
        let spec = KernelSpec { k: config.hidden, columns };
        let tuned = tuned.map(|choice| choice.schedule).filter(|schedule| schedule.check(&spec, cpu).is_ok());
        let schedule = tuned.or_else(|| Schedule::candidates(&spec, cpu).first().copied());
        schedule.map(|schedule| (spec, schedule))
    };
    let rows = job(Columns::ListedRows, choice.map(|choice| &choice.rows))?;
    let columns = job(Columns::ListedColumns, choice.map(|choice| &choice.columns))?;
    (config.activation == Activation::Relu2).then_some([rows, columns])
}

impl SparseFfn {
    /// For a checkpoint whose activation makes zeros; `None` for others. Kernels and break-evens are those of `choice`, or
    /// the best guess.
    pub(super) fn load(
        checkpoint: &Checkpoint,
        choice: Option<&SparseChoice>,
        cpu: &Cpu,
        workers: &dyn Workers,
    ) -> Result<Option<Self>, ModelError> {
        let Some(jobs) = jobs(checkpoint.config(), choice, cpu) else { return Ok(None) };
        let worth = choice.map_or(WORTH, |choice| [&choice.rows, &choice.columns].map(|list| list.worth));
        let [rows, columns] = <[Kernel; 2]>::try_from(compile(&jobs, cpu)?).expect("a kernel for each job");
        let layouts = [rows.layout(), columns.layout()];
        let (layers, bytes) = places(checkpoint, layouts);
        let mut records = PageBuffer::zeroed(bytes).map_err(|source| ModelError::Memory { bytes, source })?;

        let (next, failed, shared) = (AtomicUsize::new(0), Mutex::new(None), SharedSlice::new(&mut records));
        workers.run(&|_| {
            while let Some(at) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < 2 * layers.len()) {
                let (layer, which) = (at / 2, at % 2);
                let Place::Buffer(room) = &layers[layer][which] else { continue };
                // SAFETY: the places of different matrices are disjoint, and each number is taken by one thread.
                let room = unsafe { shared.part(room.clone()) };
                let projection = [Projection::Up, Projection::Down][which];
                match checkpoint.projection(layer, projection) {
                    Ok(tensor) => tensor.pack_records(layouts[which], which == 1, room),
                    Err(error) => drop(failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error)),
                }
            }
        });
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error.into()),
            None => Ok(Some(Self { rows, columns, layers, records, worth })),
        }
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.records.len()
    }

    /// Bytes that are used where the file is mapped.
    pub(super) fn mapped(&self) -> usize {
        self.layers.iter().flatten().map(Place::mapped).sum()
    }

    fn weights(&self, layer: usize, which: usize) -> &[u8] {
        self.layers[layer][which].bytes(&self.records)
    }

    /// The kernel for listed rows.
    pub(super) const fn rows(&self) -> &Kernel {
        &self.rows
    }

    /// Results that [`down`](Self::down) adds up per thread.
    pub(super) fn results(&self) -> usize {
        4 * self.columns.layout().row_bytes(self.columns.spec().k)
    }

    /// `activation(gate) · up` of one token into `gated`, `[ffn]`, reading the rows that count; false, with nothing done,
    /// if that does not pay. The gate comes as integer sums, and with the steps of both; its own is above 0.
    pub(super) fn up(
        &self,
        layer: usize,
        team: &Team,
        (gate, [gate_step, up_step]): (&[i32], [f32; 2]),
        activations: &Activations<'_>,
        scratch: &mut SparseScratch,
        gated: &mut [f32],
    ) -> bool {
        let SparseScratch { list, listed, gates, results, values, .. } = scratch;
        listed.clear();
        listed.extend((0..).zip(gate).filter(|(_, sum)| **sum > 0).map(|(neuron, _): (u32, _)| neuron));
        if listed.len() as f64 > self.worth[0] * gate.len() as f64 {
            return false;
        }
        let record = self.rows.layout().row_bytes(self.rows.spec().k) as u32;
        list.fill(listed.iter().map(|neuron| (neuron * record, 0)));
        let shared = SharedSlice::new(results);
        let weights = self.weights(layer, 0);
        team.share_out(list.groups(), PART_BYTES / (GROUP * record as usize), &|groups| {
            // SAFETY: every group is in one part of the work.
            let results = unsafe { shared.part(groups.start * GROUP..groups.end * GROUP) };
            self.rows.run_listed_rows(weights, list, groups, activations, results);
        });
        gates.clear();
        gates.extend(listed.iter().map(|neuron| gate[*neuron as usize]));
        let values = &mut values[..listed.len()];
        ops::gated(Activation::Relu2, (gates, gate_step), (&results[..listed.len()], up_step), values);
        gated.fill(0.0);
        for (neuron, value) in listed.iter().zip(values) {
            gated[*neuron as usize] = *value;
        }
        true
    }

    /// The integer sums of the down-projection of one token into `sums`, reading the columns that count; false, with
    /// nothing done, if that does not pay.
    pub(super) fn down(
        &self,
        layer: usize,
        team: &Team,
        values: &[i8],
        scratch: &mut SparseScratch,
        sums: &mut [i32],
    ) -> bool {
        let SparseScratch { list, partial, .. } = scratch;
        let count = values.iter().filter(|value| **value != 0).count();
        if count as f64 > self.worth[1] * values.len() as f64 {
            return false;
        }
        let record = self.columns.layout().row_bytes(self.columns.spec().k) as u32;
        let listed = (0..).zip(values).filter(|(_, value)| **value != 0);
        list.fill(listed.map(|(column, value): (u32, _)| (column * record, *value)));
        let (width, shared) = (self.results(), SharedSlice::new(partial));
        let weights = self.weights(layer, 1);
        team.divide(team.threads(), &|part| {
            // SAFETY: every part has results of its own.
            let results = unsafe { shared.part(part * width..(part + 1) * width) };
            self.columns.run_listed_columns(weights, list, share(list.groups(), team.threads(), part), results);
        });
        let sums = &mut sums[..self.columns.spec().k];
        sums.copy_from_slice(&partial[..sums.len()]);
        for partial in partial.chunks_exact(width).skip(1) {
            sums.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
        }
        true
    }
}

/// What one token needs on its way.
#[derive(Debug)]
pub(super) struct SparseScratch {
    list: RecordList,
    /// Neurons whose rows are read.
    listed: Vec<u32>,
    /// Their gates, as integer sums.
    gates: Vec<i32>,
    /// Their products with the up-projection.
    results: Vec<i32>,
    /// Their `activation(gate) · up`.
    values: Vec<f32>,
    /// Sums over each thread's columns, `[threads, results]`.
    partial: Vec<i32>,
}

impl SparseScratch {
    pub(super) fn new(ffn: usize, results: usize, threads: usize) -> Self {
        Self {
            list: RecordList::with_capacity(ffn),
            listed: Vec::with_capacity(ffn),
            gates: Vec::with_capacity(ffn),
            results: vec![0; ffn.next_multiple_of(GROUP)],
            values: vec![0.0; ffn],
            partial: vec![0; threads * results],
        }
    }
}

/// Where every layer's matrices are, and how many bytes have to be packed. The two of a layer follow each other.
fn places(checkpoint: &Checkpoint, layouts: [Layout; 2]) -> (Vec<[Place; 2]>, usize) {
    let config = checkpoint.config();
    let mut end = 0;
    let mut place = |stored: Option<Bytes>, layout: Layout| match stored {
        Some(bytes) => Place::File(bytes),
        None => {
            let start = end;
            end += config.ffn * layout.row_bytes(config.hidden);
            Place::Buffer(start..end)
        }
    };
    let mut of_layer = |layer| {
        [(Projection::Up, layouts[0]), (Projection::Down, layouts[1])]
            .map(|(projection, layout)| place(checkpoint.stored_records(layer, projection, layout), layout))
    };
    let layers = (0..config.layers).map(&mut of_layer).collect();
    (layers, end)
}
