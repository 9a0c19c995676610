//! Families times machines, and what a CPU allows of them.

use serde::Serialize;
use ternion_compiler::{Cpu, Family, Feature, KernelSpec, MachineKind, Schedule, Step, StepSpec};

use crate::{Shape, spec};

/// A family on a machine, for one kind of kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// The family, or the step on activations.
    pub family: String,
    /// The machine.
    pub machine: String,
    /// The kernel, as [`KernelSpec`] or [`StepSpec`] prints.
    pub spec: String,
    /// Schedules that are worth measuring on this CPU: [`Schedule::candidates`]; a step has one way of doing it.
    pub candidates: usize,
    /// Why there are none.
    pub refusal: Option<String>,
}

/// All families, and then all steps on activations, on all machines for a matrix.
#[must_use]
pub fn catalogue(shape: Shape, cpu: &Cpu) -> Vec<Entry> {
    let able = Feature::ALL.iter().fold(*cpu, |cpu, feature| cpu.with(*feature));
    let mut entries = Vec::new();
    for family in Family::ALL {
        let mut specs = vec![spec(family, shape, false), spec(family, shape, true)];
        specs.dedup();
        for spec in specs {
            let here = Schedule::candidates(&spec, cpu);
            let elsewhere = Schedule::candidates(&spec, &able);
            entries.extend(MachineKind::ALL.map(|machine| {
                let is_it = |schedule: &&Schedule| schedule.family == family && schedule.machine == machine;
                let candidates = here.iter().filter(is_it).count();
                let refusal = (candidates == 0).then(|| why_not(elsewhere.iter().find(is_it), &spec, cpu));
                let (family, machine, spec) = (family.to_string(), machine.to_string(), spec.to_string());
                Entry { family, machine, spec, candidates, refusal }
            }));
        }
    }
    entries.extend(Step::all().map(|step| StepSpec { step, k: shape.k }).flat_map(|spec| {
        MachineKind::ALL.map(|machine| {
            let refusal = spec.check(machine, cpu).err().map(|error| error.to_string());
            let (family, candidates) = (spec.step.to_string(), usize::from(refusal.is_none()));
            Entry { family, machine: machine.to_string(), spec: spec.to_string(), candidates, refusal }
        })
    }));
    entries
}

/// What keeps `cpu` from a schedule that a CPU of its architecture with every feature would be offered.
fn why_not(schedule: Option<&Schedule>, spec: &KernelSpec, cpu: &Cpu) -> String {
    match schedule.map(|schedule| schedule.check(spec, cpu)) {
        Some(Err(error)) => error.to_string(),
        Some(Ok(())) => "legal, but not worth measuring on this CPU".to_owned(),
        None => "not worth measuring on any CPU of this architecture".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_and_machine_is_offered_or_refused_with_a_reason() {
        for cpu in ["x86-64", "x86-64 +sse3 +ssse3 +sse4.1 +avx +avx2", "aarch64"] {
            let entries = catalogue(Shape { m: 2560, k: 2560 }, &cpu.parse().unwrap());
            for family in Family::ALL {
                let machines = entries.iter().filter(|entry| entry.family == family.to_string());
                assert!(machines.count() >= MachineKind::ALL.len(), "{family}");
            }
            for step in Step::all() {
                let able = entries.iter().filter(|entry| entry.family == step.to_string() && entry.candidates == 1);
                assert!(able.count() >= 1 || cpu == "x86-64", "{step}");
            }
            assert!(entries.iter().all(|entry| (entry.candidates == 0) == entry.refusal.is_some()));
        }
    }

    #[test]
    fn a_missing_feature_is_the_reason() {
        let entries = catalogue(Shape { m: 2560, k: 2560 }, &"x86-64 +sse3 +ssse3 +sse4.1".parse().unwrap());
        let wide = entries.iter().find(|entry| entry.family == "mad" && entry.machine == "avx2").unwrap();
        assert!(wide.refusal.as_ref().unwrap().contains("avx2 needs"), "{wide:?}");
    }
}
