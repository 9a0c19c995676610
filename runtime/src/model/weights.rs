//! A model's weights in memory: ternary matrices in the layout of their kernels, everything else as in the file.
//!
//! A matrix that a prepared file already holds in its kernel's layout is used where it is mapped. All others are
//! repacked into one buffer on huge pages, each by whichever thread is free.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ternion_compiler::{Cpu, Layout, Schedule, StepKernel};
use ternion_tuner::Workers;

use super::kernels::{Kernels, compile_all};
use super::low_rank::LowRank;
use super::sparse::SparseFfn;
use super::steps::Steps;
use super::{Head, KernelChoice, ModelError};
use crate::formats::{Bytes, Checkpoint, FloatMatrix, LayerNorm, ModelConfig, Projection};
use crate::memory::PageBuffer;
use crate::screen::Screen;
use crate::team::SharedSlice;

/// Where repacked matrices begin in their buffer: a multiple of every vector and of a page.
const ALIGNMENT: usize = 4096;

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Matrices that are ready.
    pub done: usize,
    /// Matrices in all.
    pub matrices: usize,
}

/// What loading did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Time to compile and check all kernels.
    pub compile: Duration,
    /// Time to read and repack all weights.
    pub weights: Duration,
    /// Different kernels.
    pub kernels: usize,
    /// Bytes of machine code.
    pub code_bytes: usize,
    /// Bytes of ternary matrices that were repacked into memory of our own.
    pub packed_bytes: usize,
    /// Bytes of ternary matrices that are used where the file is mapped.
    pub mapped_bytes: usize,
    /// Bytes of the up- and down-projections as records.
    pub record_bytes: usize,
    /// Those of them that are used where the file is mapped.
    pub mapped_record_bytes: usize,
    /// Bytes of the head's screen.
    pub screen_bytes: usize,
    /// Those of them that the file had, and that were copied to memory of our own.
    pub stored_screen_bytes: usize,
}

impl LoadReport {
    /// Bytes of weights that are used as the file has them.
    #[must_use]
    pub const fn stored(&self) -> usize {
        self.mapped_bytes + self.mapped_record_bytes + self.stored_screen_bytes
    }

    /// Bytes of weights that were computed from others.
    #[must_use]
    pub const fn converted(&self) -> usize {
        self.packed_bytes + self.mapped_bytes + self.record_bytes + self.screen_bytes - self.stored()
    }
}

/// Where a matrix lies.
#[derive(Debug)]
pub(super) enum Place {
    File(Bytes),
    Buffer(Range<usize>),
}

impl Place {
    /// The bytes of the matrix, `buffer` being what others were packed into.
    pub(super) fn bytes<'a>(&'a self, buffer: &'a [u8]) -> &'a [u8] {
        match self {
            Self::File(bytes) => bytes,
            Self::Buffer(range) => &buffer[range.clone()],
        }
    }

    /// Bytes that are used where the file is mapped.
    pub(super) fn mapped(&self) -> usize {
        if let Self::File(bytes) = self { bytes.len() } else { 0 }
    }
}

/// One ternary projection, bound to its kernels.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) m: usize,
    pub(super) scale: f32,
    pub(super) kernels: Kernels,
    /// `[m]`, or empty if the model has no such bias.
    pub(super) bias: Vec<f32>,
    /// In the order in which they are added.
    pub(super) adapters: Vec<LowRank>,
    /// One copy for each layout that a kernel reads.
    copies: Vec<(Layout, Place)>,
}

impl Linear {
    /// Length of a row.
    pub(super) fn k(&self) -> usize {
        self.kernels.of(1).spec().k
    }
}

/// The weights of one layer.
#[derive(Debug)]
pub(super) struct Layer {
    norms: [Vec<f32>; LayerNorm::ALL.len()],
    projections: Vec<Linear>,
    /// Which of the model's sets of frequencies turn its heads.
    pub(super) rope: usize,
    /// Number of positions that a query sees, its own included.
    pub(super) window: usize,
}

impl Layer {
    /// Weights of a norm; empty if the model has no such norm.
    pub(super) fn norm(&self, norm: LayerNorm) -> &[f32] {
        &self.norms[norm.index()]
    }

    pub(super) fn linear(&self, projection: Projection) -> &Linear {
        &self.projections[projection as usize]
    }
}

/// A model that is ready to run: immutable, shared by any number of sessions.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    pub(super) embedding: FloatMatrix,
    head: Head,
    pub(super) final_norm: Vec<f32>,
    pub(super) layers: Vec<Layer>,
    /// The feed-forward's matrices once more, for activations that make zeros.
    pub(super) sparse: Option<SparseFfn>,
    /// From floats to what kernels read.
    pub(super) steps: Steps,
    /// Rotary frequencies, `[sets][head_dim / 2]`.
    pub(super) frequencies: Vec<Vec<f32>>,
    /// Whether all layers are ternary products, sub-norms and an activation function, and nothing else.
    plain: bool,
    packed: PageBuffer,
    report: LoadReport,
}

impl Model {
    /// Loads a checkpoint for `cpu`, with all threads of `workers`. `progress` is called from any of them.
    ///
    /// # Errors
    /// If the checkpoint is damaged, a kernel cannot be compiled, or memory runs out.
    pub fn load(
        checkpoint: &Checkpoint,
        kernels: &KernelChoice,
        cpu: &Cpu,
        workers: &dyn Workers,
        progress: &(dyn Fn(LoadProgress) + Sync),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let start = Instant::now();
        let lists = kernels.sparse();
        let kernels = compile_all(&config, kernels, cpu)?;
        let compile = start.elapsed();

        let start = Instant::now();
        let embedding = checkpoint.embedding()?;
        let head = checkpoint.head()?.unwrap_or_else(|| embedding.clone());
        for (what, matrix) in [("embedding", &embedding), ("head", &head)] {
            let (rows, columns) = (config.vocabulary, config.hidden);
            check_elements(what, matrix.columns, columns)?;
            check_elements(what, matrix.bytes.len(), rows * matrix.row_bytes())?;
            check_elements(what, matrix.rows, rows)?;
        }
        let final_norm = checkpoint.final_norm()?;
        check_elements("final norm", final_norm.len(), config.hidden)?;
        let rows = head.rows * head.columns;
        // An embedding model's head is only there because its embedding is.
        let out_of_memory = |source| ModelError::Memory { bytes: rows, source };
        let head = if config.pooling.is_some() {
            Head::with_screen(head, false, workers).map_err(out_of_memory)?
        } else if let Some((shape, stored)) = checkpoint.stored_screen()? {
            let found = stored.len();
            let screen = Screen::stored(&stored, shape, workers).map_err(out_of_memory)?;
            let screen = screen.ok_or(ModelError::Elements { what: "head's screen", found, expected: rows })?;
            Head::with_stored(head, screen)
        } else {
            Head::new(head, workers).map_err(out_of_memory)?
        };
        let (packed, mut linears) = pack_all(checkpoint, &kernels, workers, progress)?;
        let mut frequencies: Vec<Vec<f32>> = Vec::new();
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let mut norms = LayerNorm::ALL.map(|_| Vec::new());
            for (norm, weights) in LayerNorm::ALL.into_iter().zip(&mut norms) {
                *weights = checkpoint.norm(layer, norm)?;
                check_elements("layer norm", weights.len(), norm.width(&config))?;
            }
            let projections = linears.by_ref().take(Projection::ALL.len()).collect();
            let turned_by = config.inverse_frequencies(layer);
            let rope = frequencies.iter().position(|known| *known == turned_by).unwrap_or(frequencies.len());
            if rope == frequencies.len() {
                frequencies.push(turned_by);
            }
            layers.push(Layer { norms, projections, rope, window: config.window(layer).unwrap_or(usize::MAX) });
        }
        let mut report = LoadReport { compile, weights: start.elapsed(), ..LoadReport::default() };
        report.screen_bytes = head.screen_bytes();
        report.stored_screen_bytes = head.stored_screen_bytes();
        let kernels = kernels.values().flat_map(Kernels::all);
        let different: BTreeMap<_, _> =
            kernels.map(|kernel| ((kernel.spec(), kernel.schedule()), kernel.code_bytes())).collect();
        report.kernels = different.len();
        report.code_bytes = different.values().sum();
        let linears = layers.iter().flat_map(|layer| &layer.projections);
        for (_, place) in linears.flat_map(|linear| &linear.copies) {
            match place {
                Place::File(bytes) => report.mapped_bytes += bytes.len(),
                Place::Buffer(range) => report.packed_bytes += range.len(),
            }
        }
        let sparse = SparseFfn::load(checkpoint, lists, cpu, workers)?;
        report.mapped_record_bytes = sparse.as_ref().map_or(0, SparseFfn::mapped);
        report.record_bytes = report.mapped_record_bytes + sparse.as_ref().map_or(0, SparseFfn::bytes);
        report.weights = start.elapsed();
        let start = Instant::now();
        let linears = layers.iter().flat_map(|layer| &layer.projections);
        let read = linears.flat_map(|linear| linear.activation_formats().map(|format| (linear.k(), format)));
        let listed = sparse.iter().map(|sparse| (sparse.rows().spec().k, sparse.rows().activation_format()));
        let steps = Steps::compile(read.chain(listed), cpu)?;
        report.compile += start.elapsed();
        report.kernels += steps.all().count();
        report.code_bytes += steps.all().map(StepKernel::code_bytes).sum::<usize>();
        let plain = !config.qk_norm
            && !config.post_norms
            && config.projection_norm_eps.is_none()
            && layers.iter().flat_map(|layer| &layer.projections).all(|linear| linear.bias.is_empty());
        Ok(Self { config, embedding, head, final_norm, layers, sparse, steps, frequencies, plain, packed, report })
    }

    /// Adds to a projection what `addition` computes, after everything added before.
    pub(crate) fn add_low_rank(&mut self, layer: usize, projection: Projection, addition: LowRank) {
        self.layers[layer].projections[projection as usize].adapters.push(addition);
        self.plain = false;
    }

    /// Whether a single token leaves out those parts of the feed-forward that its zeros make irrelevant.
    #[must_use]
    pub const fn skips_zeros(&self) -> bool {
        self.sparse.is_some()
    }

    /// Reads whole matrices from now on, whatever is zero. Only time and memory change.
    pub fn read_whole(&mut self) {
        self.sparse = None;
        (self.report.record_bytes, self.report.mapped_record_bytes) = (0, 0);
    }

    /// Whether every layer can take the fused path.
    pub(super) const fn is_plain(&self) -> bool {
        self.plain
    }

    /// Sizes and constants.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What loading it did and how long it took.
    #[must_use]
    pub const fn report(&self) -> LoadReport {
        self.report
    }

    /// The schedule of a projection's kernel for `n` tokens at once, the same in all layers.
    ///
    /// # Panics
    /// If the model has no layers.
    #[must_use]
    pub fn schedule(&self, projection: Projection, n: usize) -> Schedule {
        self.layers[0].linear(projection).kernels.of(n).schedule()
    }

    /// The head.
    #[must_use]
    pub const fn head(&self) -> &Head {
        &self.head
    }

    /// The packed bytes of a projection, in a layout that one of its kernels reads.
    pub(super) fn weights<'a>(&'a self, linear: &'a Linear, layout: Layout) -> &'a [u8] {
        let copy = linear.copies.iter().find(|(of, _)| *of == layout);
        copy.map_or(&[], |(_, place)| place.bytes(&self.packed))
    }

    /// All projections.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| &layer.projections)
    }
}

fn check_elements(what: &'static str, found: usize, expected: usize) -> Result<(), ModelError> {
    if found == expected { Ok(()) } else { Err(ModelError::Elements { what, found, expected }) }
}

/// One copy of a matrix to load: which, and the part of the buffer that it gets if it has to be repacked.
struct Plan<'a> {
    layer: usize,
    projection: Projection,
    m: usize,
    k: usize,
    kernels: &'a Kernels,
    layout: Layout,
    /// Where the file has it in this layout.
    stored: Option<Bytes>,
    room: Range<usize>,
}

/// Loads all projections, layer by layer in the order of [`Projection::ALL`].
fn pack_all(
    checkpoint: &Checkpoint,
    kernels: &BTreeMap<(usize, usize), Kernels>,
    workers: &dyn Workers,
    progress: &(dyn Fn(LoadProgress) + Sync),
) -> Result<(PageBuffer, impl Iterator<Item = Linear>), ModelError> {
    let config = checkpoint.config();
    let mut plans = Vec::new();
    let mut end = 0usize;
    for layer in 0..config.layers {
        for projection in Projection::ALL {
            let (m, k) = projection.shape(config);
            let kernels = kernels.get(&(m, k)).ok_or(ModelError::NotChosen { m, k })?;
            for layout in kernels.layouts() {
                let needs = layout.bytes(m, k).ok_or(ModelError::NotChosen { m, k })?;
                let stored = checkpoint.stored(layer, projection, layout).filter(|bytes| bytes.len() == needs);
                let bytes = if stored.is_some() { 0 } else { needs };
                let start = end.next_multiple_of(ALIGNMENT);
                end = start.saturating_add(bytes);
                plans.push(Plan { layer, projection, m, k, kernels, layout, stored, room: start..end });
            }
        }
    }
    let mut buffer = PageBuffer::zeroed(end).map_err(|source| ModelError::Memory { bytes: end, source })?;

    let shared = SharedSlice::new(&mut buffer);
    let (next, done, failed) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(None));
    let loaded: Vec<Mutex<Option<Linear>>> = plans.iter().map(|_| Mutex::new(None)).collect();
    workers.run(&|_| {
        while let Some(at) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < plans.len()) {
            let plan = &plans[at];
            // SAFETY: the rooms of different plans are disjoint, and each plan is taken by one thread.
            let room = unsafe { shared.part(plan.room.clone()) };
            match load(checkpoint, plan, room) {
                Ok(linear) => {
                    *loaded[at].lock().unwrap_or_else(PoisonError::into_inner) = Some(linear);
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    progress(LoadProgress { done, matrices: plans.len() });
                }
                Err(error) => {
                    next.store(plans.len(), Ordering::Relaxed);
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    // Without an error every plan has been carried out. Second copies follow the first.
    let loaded = loaded.into_iter().filter_map(|linear| linear.into_inner().unwrap_or_else(PoisonError::into_inner));
    let mut linears: Vec<Linear> = Vec::new();
    let mut last = None;
    for (linear, Plan { layer, projection, .. }) in loaded.zip(&plans) {
        match linears.last_mut() {
            Some(first) if last == Some((*layer, *projection)) => first.copies.extend(linear.copies),
            _ => linears.push(linear),
        }
        last = Some((*layer, *projection));
    }
    Ok((buffer, linears.into_iter()))
}

fn load(checkpoint: &Checkpoint, plan: &Plan<'_>, room: &mut [u8]) -> Result<Linear, ModelError> {
    let Plan { layer, projection, m, k, kernels, layout, .. } = plan;
    let (layer, projection, m, k) = (*layer, *projection, *m, *k);
    let tensor = checkpoint.projection(layer, projection)?;
    if (tensor.m, tensor.k) != (m, k) || tensor.layout.bytes(m, k) != Some(tensor.bytes.len()) {
        return Err(ModelError::Shape { layer, projection, m, k, bytes: tensor.bytes.len() });
    }
    let place = match &plan.stored {
        Some(bytes) => Place::File(bytes.clone()),
        None => {
            tensor.layout.repack_tiles(*layout, [m, k], &tensor.bytes, 0..layout.tiles(m), room);
            Place::Buffer(plan.room.clone())
        }
    };
    let bias = checkpoint.bias(layer, projection)?;
    if projection.has_bias(checkpoint.config()) {
        check_elements("bias", bias.len(), m)?;
    }
    Ok(Linear {
        m,
        scale: tensor.scale,
        kernels: (*kernels).clone(),
        bias,
        adapters: Vec::new(),
        copies: vec![(*layout, place)],
    })
}
