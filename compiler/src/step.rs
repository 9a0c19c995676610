//! What is done to the activations of one token before a product, as a value.

use std::fmt;
use std::str::FromStr;

use crate::{ActivationFormat, Cpu, Feature, KernelSpec, MachineKind, Schedule, ScheduleError, emit};

/// One thing that is done to the activations of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// From `f32` to int8 by the largest magnitude, as [`ternion_kernels_ref::QuantizedRow::new`].
    Quantize,
    /// RMSNorm ([`ternion_kernels_ref::norm::rms_norm`]), then [`Quantize`](Self::Quantize).
    NormQuantize,
    /// From int8 to what a kernel family reads, as [`ActivationFormat::prepare`].
    Prepare(ActivationFormat),
}

impl Step {
    /// All of them, with the words they print to.
    const WORDS: [(Self, &'static str); 7] = [
        (Self::Quantize, "quantize"),
        (Self::NormQuantize, "norm-quantize"),
        (Self::Prepare(ActivationFormat::Plain), "prepare-plain"),
        (Self::Prepare(ActivationFormat::Planes), "prepare-planes"),
        (Self::Prepare(ActivationFormat::FivePlanes), "prepare-five-planes"),
        (Self::Prepare(ActivationFormat::PairTables), "prepare-pair-tables"),
        (Self::Prepare(ActivationFormat::TripleTables), "prepare-triple-tables"),
    ];

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::WORDS.into_iter().map(|(step, _)| step)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::WORDS.iter().find(|(step, _)| step == self);
        f.write_str(known.map_or("", |(_, word)| word))
    }
}

impl FromStr for Step {
    type Err = ParseStepError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::WORDS.into_iter().find(|(_, word)| *word == text);
        known.map(|(step, _)| step).ok_or_else(|| ParseStepError(text.to_owned()))
    }
}

/// A step for rows of `k` activations, which is compiled in. Prints to one line and parses back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StepSpec {
    /// What is done.
    pub step: Step,
    /// Activations of a token.
    pub k: usize,
}

impl StepSpec {
    /// Bytes of scratch memory that a call needs, for the last activations of rows that are no multiple of 64.
    pub const SCRATCH: usize = emit::STEP_SCRATCH;

    /// Whether `machine` carries it out on `cpu`.
    ///
    /// # Errors
    /// The first reason why not.
    pub fn check(&self, machine: MachineKind, cpu: &Cpu) -> Result<(), ScheduleError> {
        if self.k == 0 || self.k > KernelSpec::MAX_K {
            return Err(ScheduleError::RowLength(self.k));
        }
        machine.check(cpu)?;
        match (self.step, machine) {
            (Step::NormQuantize, MachineKind::Avx2) if !cpu.has(Feature::Fma) => {
                let (what, needs) = ("norm-quantize under avx2", Feature::Fma.name());
                Err(ScheduleError::MissingFeature { what, needs, cpu: *cpu })
            }
            (Step::Prepare(ActivationFormat::FivePlanes), MachineKind::Clif128) => {
                Schedule::check_lookup(cpu, "prepare-five-planes")
            }
            (Step::Prepare(ActivationFormat::FivePlanes), _) => {
                let (name, value) = ("bytes of a vector", machine.vector_bytes());
                Err(ScheduleError::Parameter { name, value, expected: "16 for prepare-five-planes" })
            }
            _ => Ok(()),
        }
    }

    /// The machine with the widest vectors of those that carry it out on `cpu`. Everything is in the first-level cache,
    /// so there is nothing to search: wider is at least about as fast.
    #[must_use]
    pub fn machine(&self, cpu: &Cpu) -> Option<MachineKind> {
        MachineKind::ALL.into_iter().rev().find(|machine| self.check(*machine, cpu).is_ok())
    }
}

impl fmt::Display for StepSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} k={}", self.step, self.k)
    }
}

/// A text that describes no step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no step: expected one of {words}", words = Step::WORDS.map(|(_, word)| word).join(", "))]
pub struct ParseStepError(String);

impl FromStr for StepSpec {
    type Err = ParseStepError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (step, k) = text.split_once(" k=").ok_or_else(|| ParseStepError(text.to_owned()))?;
        Ok(Self { step: step.parse()?, k: k.parse().map_err(|_| ParseStepError(text.to_owned()))? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_prints_and_parses_back() {
        for step in Step::all() {
            let spec = StepSpec { step, k: 6912 };
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        assert_eq!(StepSpec { step: Step::NormQuantize, k: 2560 }.to_string(), "norm-quantize k=2560");
        for text in ["", "quantize", "quantize k=", "quantise k=4", "prepare k=4"] {
            assert!(text.parse::<StepSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_a_cpu_lacks_is_refused_by_name_and_a_narrower_machine_takes_over() {
        let norm = StepSpec { step: Step::NormQuantize, k: 64 };
        let five = StepSpec { step: Step::Prepare(ActivationFormat::FivePlanes), k: 64 };
        let cpu = |text: &str| text.parse::<Cpu>().unwrap();
        let (bare, ssse3, avx2) = (cpu("x86-64"), cpu("x86-64 +ssse3"), cpu("x86-64 +ssse3 +avx +avx2"));
        let with_fma = avx2.with(Feature::Fma);
        assert!(norm.check(MachineKind::Avx2, &avx2).unwrap_err().to_string().contains("fma"));
        assert_eq!(norm.machine(&avx2), Some(MachineKind::Clif128));
        assert_eq!(norm.machine(&with_fma), Some(MachineKind::Avx2));
        assert_eq!(five.machine(&with_fma), Some(MachineKind::Clif128));
        assert_eq!(five.machine(&ssse3), Some(MachineKind::Clif128));
        assert_eq!(five.machine(&bare), None);
        assert!(norm.check(MachineKind::Avx512, &with_fma).unwrap_err().to_string().contains("avx512f"));
        assert_eq!(StepSpec { k: 0, ..norm }.machine(&bare), None);
    }
}
