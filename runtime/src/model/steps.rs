//! From floats to what kernels read, compiled for every length of a row that a model has.

use std::collections::{BTreeMap, BTreeSet};

use ternion_compiler::{ActivationFormat, Cpu, Step, StepKernel, StepSpec, compile_steps};

use super::ModelError;

/// The steps on the activations of one model.
#[derive(Debug)]
pub(super) struct Steps(BTreeMap<StepSpec, StepKernel>);

impl Steps {
    /// Quantising, with and without a norm, for every length of a row that kernels read, and preparing in every format
    /// that they read it in.
    pub(super) fn compile(
        read: impl Iterator<Item = (usize, ActivationFormat)>,
        cpu: &Cpu,
    ) -> Result<Self, ModelError> {
        let specs: BTreeSet<StepSpec> = read
            .flat_map(|(k, format)| {
                [Step::Quantize, Step::NormQuantize, Step::Prepare(format)].map(|step| StepSpec { step, k })
            })
            .collect();
        let specs: Vec<_> = specs.into_iter().collect();
        let kernels = compile_steps(&specs, cpu)?;
        Ok(Self(specs.into_iter().zip(kernels).collect()))
    }

    /// The kernel of a step for rows of `k` that some kernel reads.
    pub(super) fn of(&self, step: Step, k: usize) -> &StepKernel {
        &self.0[&StepSpec { step, k }]
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = &StepKernel> {
        self.0.values()
    }
}
