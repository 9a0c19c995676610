//! Which schedules a model's matrices run on.

use std::collections::BTreeMap;

use ternion_compiler::{Columns, Cpu, Family, Kernel, KernelSpec, Schedule, compile};
use ternion_tuner::{Choice, Choices, Problem};

use super::ModelError;
use crate::formats::{ModelConfig, Projection};

/// Where the schedules come from. They change how fast a model runs and nothing else.
#[derive(Clone, Debug)]
pub enum KernelChoice {
    /// What the tuner found for every shape of [`problems`].
    Tuned(Choices),
    /// The best guess within one family; where it serves only one or only many columns, the other comes from another.
    Family(Family),
    /// The same two schedules for every shape.
    Schedules(Choice),
}

impl KernelChoice {
    /// The schedules of `[m, k]` matrices on `cpu`.
    ///
    /// # Errors
    /// If there are none, or they read different layouts.
    pub fn of(&self, m: usize, k: usize, cpu: &Cpu) -> Result<Choice, ModelError> {
        let choice = match self {
            Self::Tuned(choices) => choices.get(m, k),
            Self::Schedules(choice) => Some(*choice),
            Self::Family(family) => {
                let best = best_of(*family, k, cpu);
                return best.ok_or(ModelError::NoKernel { family: *family, k, cpu: *cpu });
            }
        };
        choice.filter(|choice| choice.one.layout == choice.many.layout).ok_or(ModelError::NotChosen { m, k })
    }
}

/// The first schedules of a family that share a layout. A family that serves only one or only many columns is completed
/// by another that reads its layout.
fn best_of(family: Family, k: usize, cpu: &Cpu) -> Option<Choice> {
    let candidates = |columns| Schedule::candidates(&KernelSpec { k, columns }, cpu);
    let (ones, many) = (candidates(Columns::One), candidates(Columns::Many));
    let first = |one_is: &dyn Fn(Family) -> bool, many_is: &dyn Fn(Family) -> bool| {
        ones.iter().filter(|one| one_is(one.family)).find_map(|one| {
            let many = many.iter().find(|many| many_is(many.family) && many.layout == one.layout)?;
            Some(Choice { one: *one, many: *many })
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

/// The two kernels of one shape.
#[derive(Clone, Debug)]
pub(super) struct Kernels {
    /// For one column.
    pub(super) one: Kernel,
    /// For many.
    pub(super) many: Kernel,
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
        let Choice { one, many } = choice.of(m, k, cpu)?;
        shapes.push((m, k));
        jobs.push((KernelSpec { k, columns: Columns::One }, one));
        jobs.push((KernelSpec { k, columns: Columns::Many }, many));
    }
    let kernels = compile(&jobs, cpu)?;
    let pairs = kernels.as_chunks().0.iter().cloned().map(|[one, many]| Kernels { one, many });
    Ok(shapes.into_iter().zip(pairs).collect())
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
                assert!(choice.one.family == family || choice.many.family == family, "{choice:?}");
                assert_eq!(choice.one.layout, choice.many.layout);
            }
        }
    }

    #[test]
    fn schedules_with_different_layouts_are_refused() {
        let cpu = Cpu::host().expect("a CPU that ternion compiles for");
        let of = |family| KernelChoice::Family(family).of(8, 256, &cpu).unwrap();
        let mixed = Choice { one: of(Family::Mad).one, many: of(Family::Tl1).many };
        let error = KernelChoice::Schedules(mixed).of(8, 256, &cpu).unwrap_err();
        assert!(matches!(error, ModelError::NotChosen { m: 8, k: 256 }));
    }
}
