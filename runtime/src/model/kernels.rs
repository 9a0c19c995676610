//! Which schedules a model's matrices run on.

use std::collections::BTreeMap;

use ternion_compiler::{Columns, Cpu, Family, Kernel, KernelSpec, Layout, Schedule, compile};
use ternion_tuner::{Budget, Choice, Choices, Class, Held, Problem, Request, SparseChoice, SparseShape};

use super::ModelError;
use crate::formats::{Activation, Checkpoint, ModelConfig, Projection};
use crate::screen;

/// Where the schedules come from. They change how fast a model runs and nothing else.
#[derive(Clone, Debug)]
pub enum KernelChoice {
    /// What the tuner found for every shape of [`problems`].
    Tuned(Choices),
    /// The best guess within one family; where it serves only one or only many columns, the other comes from another.
    Family(Family),
    /// The same schedules for every shape.
    Schedules(Choice),
}

impl KernelChoice {
    /// The schedules of `[m, k]` matrices on `cpu`.
    ///
    /// # Errors
    /// If there are none, or they read more than two layouts.
    pub fn of(&self, m: usize, k: usize, cpu: &Cpu) -> Result<Choice, ModelError> {
        let choice = match self {
            Self::Tuned(choices) => choices.get(m, k),
            Self::Schedules(choice) => Some(*choice),
            Self::Family(family) => {
                let best = best_of(*family, k, cpu);
                return best.ok_or(ModelError::NoKernel { family: *family, k, cpu: *cpu });
            }
        };
        choice.filter(|choice| choice.layouts().len() <= COPIES).ok_or(ModelError::NotChosen { m, k })
    }
}

impl KernelChoice {
    /// What the tuner found for lists of records.
    pub(super) const fn sparse(&self) -> Option<&SparseChoice> {
        match self {
            Self::Tuned(choices) => choices.sparse.as_ref(),
            Self::Family(_) | Self::Schedules(_) => None,
        }
    }
}

/// The feed-forwards of a model that makes zeros, for the tuner; `None` for others.
#[must_use]
pub fn sparse_shape(config: &ModelConfig) -> Option<SparseShape> {
    (config.activation == Activation::Relu2).then_some(SparseShape { ffn: config.ffn, hidden: config.hidden })
}

/// Copies of a matrix, in different layouts, at most.
const COPIES: usize = 2;

/// The first schedules of a family that share a layout. A family that serves only one or only many columns is completed
/// by another that reads its layout.
fn best_of(family: Family, k: usize, cpu: &Cpu) -> Option<Choice> {
    let candidates = |columns| Schedule::candidates(&KernelSpec { k, columns }, cpu);
    let (ones, many) = (candidates(Columns::One), candidates(Columns::Many));
    let first = |one_is: &dyn Fn(Family) -> bool, many_is: &dyn Fn(Family) -> bool| {
        ones.iter().filter(|one| one_is(one.family)).find_map(|one| {
            let many = many.iter().find(|many| many_is(many.family) && many.layout == one.layout)?;
            Some(Choice::pair(*one, *many))
        })
    };
    let (this, any) = (&|other| other == family, &|_| true);
    first(this, this).or_else(|| first(any, this)).or_else(|| first(this, any))
}

/// The shapes of a model's matrices and how many it has of each: what the tuner wants to know.
#[must_use]
pub fn problems(config: &ModelConfig) -> Vec<Problem> {
    let mut counts: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for projection in Projection::ALL {
        *counts.entry(projection.shape(config)).or_default() += config.layers;
    }
    counts.into_iter().map(|((m, k), count)| Problem { m, k, count }).collect()
}

/// What to ask the tuner for: kernels for a model's matrices, and for lists of records if there are zeros to skip.
#[must_use]
pub fn request(config: &ModelConfig, budget: Budget) -> Request {
    let head =
        if config.pooling.is_none() { screen::Shape::new(config.vocabulary, config.hidden).extent() } else { None };
    let beside = head.map_or(0, |(_, end)| end);
    Request { beside, sparse: sparse_shape(config), ..Request::new(problems(config), budget) }
}

/// What a start asks the tuner for: what is known, or a short race, and no conversion that is not worth it.
#[must_use]
pub fn start_request(checkpoint: &Checkpoint) -> Request {
    Request { held: held(checkpoint), ..request(checkpoint.config(), Budget::RACE) }
}

/// The layouts that a file holds all matrices of a shape in, and all records: loading need not convert them.
#[must_use]
pub fn held(checkpoint: &Checkpoint) -> Held {
    let config = checkpoint.config();
    let mut matrices: BTreeMap<(usize, usize), Vec<Layout>> = BTreeMap::new();
    let mut records = [None; 2];
    for (layer, projection) in (0..config.layers).flat_map(|layer| Projection::ALL.map(|of| (layer, of))) {
        let (layouts, of_records) = checkpoint.stored_layouts(layer, projection);
        let known = matrices.entry(projection.shape(config)).or_insert_with(|| layouts.clone());
        known.retain(|layout| layouts.contains(layout));
        let at = match projection {
            Projection::Up => 0,
            Projection::Down => 1,
            _ => continue,
        };
        records[at] = if layer == 0 { of_records } else { records[at].filter(|known| Some(*known) == of_records) };
    }
    let [rows, columns] = records;
    Held { matrices: matrices.into_iter().collect(), rows, columns }
}

/// The kernels of one shape, one per class of numbers of columns.
#[derive(Clone, Debug)]
pub(super) struct Kernels([Kernel; Class::ALL.len()]);

impl Kernels {
    /// The kernel for `n` columns.
    pub(super) fn of(&self, n: usize) -> &Kernel {
        &self.0[Class::of(n).index()]
    }

    /// All of them; classes may share one.
    pub(super) fn all(&self) -> &[Kernel] {
        &self.0
    }

    /// The layouts that they read, each once: as many copies of the weights there are.
    pub(super) fn layouts(&self) -> Vec<Layout> {
        let mut layouts: Vec<Layout> = self.0.iter().map(Kernel::layout).collect();
        // The order of the classes is kept: few layouts, so no set is needed.
        let mut known = Vec::with_capacity(COPIES);
        layouts.retain(|layout| {
            !known.contains(layout) && {
                known.push(*layout);
                true
            }
        });
        layouts
    }
}

/// Compiles the kernels of every shape of a model, all at once.
pub(super) fn compile_all(
    config: &ModelConfig,
    choice: &KernelChoice,
    cpu: &Cpu,
) -> Result<BTreeMap<(usize, usize), Kernels>, ModelError> {
    let mut shapes = Vec::new();
    let mut jobs = Vec::new();
    for Problem { m, k, .. } in problems(config) {
        let choice = choice.of(m, k, cpu)?;
        shapes.push((m, k));
        jobs.extend(Class::ALL.map(|class| (class.spec(k), choice.of(class))));
    }
    let kernels = compile(&jobs, cpu)?;
    let kernels = kernels.as_chunks().0.iter().cloned().map(Kernels);
    Ok(shapes.into_iter().zip(kernels).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_pair_of_schedules_that_share_a_layout() {
        let cpu = Cpu::host().expect("a CPU that ternion compiles for");
        for family in Family::dense() {
            for k in [256, 768, 2560, 6912, 37] {
                let choice = KernelChoice::Family(family).of(8, k, &cpu).unwrap();
                assert!(choice.schedules.iter().any(|schedule| schedule.family == family), "{choice:?}");
                assert_eq!(choice.layouts().len(), 1);
            }
        }
    }

    #[test]
    fn schedules_with_more_than_two_layouts_are_refused() {
        let cpu = Cpu::host().expect("a CPU that ternion compiles for");
        let many = Schedule::candidates(&Class::Chunk.spec(256), &cpu);
        let layouts: BTreeMap<Layout, Schedule> = many.iter().map(|schedule| (schedule.layout, *schedule)).collect();
        let mut choice = KernelChoice::Family(Family::Mad).of(8, 256, &cpu).unwrap();
        let first = choice.layout();
        let mut others = layouts.values().filter(|other| other.layout != first).copied();
        choice.schedules[3] = others.next().unwrap();
        assert!(KernelChoice::Schedules(choice).of(8, 256, &cpu).is_ok());
        choice.schedules[4] = others.next().unwrap();
        let error = KernelChoice::Schedules(choice).of(8, 256, &cpu).unwrap_err();
        assert!(matches!(error, ModelError::NotChosen { m: 8, k: 256 }));
    }
}
