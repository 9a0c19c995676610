//! Families times machines, and what a CPU allows of them.

use serde::Serialize;
use ternion_compiler::{Columns, Cpu, Family, Feature, KernelSpec, MachineKind, Schedule};

/// A family on a machine, for one kind of kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// The family.
    pub family: String,
    /// The machine.
    pub machine: String,
    /// The kernel, as [`KernelSpec`] prints.
    pub spec: String,
    /// Schedules that are worth measuring on this CPU: [`Schedule::candidates`].
    pub candidates: usize,
    /// Why there are none.
    pub refusal: Option<String>,
}

/// The kernel of `family` with rows of `k` weights: for one column or many, unless the family reads a list, which
/// leaves it no choice.
#[must_use]
pub fn spec(family: Family, k: usize, many: bool) -> KernelSpec {
    let dense = if many { Columns::Many } else { Columns::One };
    KernelSpec { k, columns: family.list().unwrap_or(dense) }
}

/// All families on all machines with rows of `k` weights.
#[must_use]
pub fn catalogue(k: usize, cpu: &Cpu) -> Vec<Entry> {
    let able = Feature::ALL.iter().fold(*cpu, |cpu, feature| cpu.with(*feature));
    let mut entries = Vec::new();
    for family in Family::ALL {
        let mut specs = vec![spec(family, k, false), spec(family, k, true)];
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
            let entries = catalogue(2560, &cpu.parse().unwrap());
            for family in Family::ALL {
                let machines = entries.iter().filter(|entry| entry.family == family.to_string());
                assert!(machines.count() >= MachineKind::ALL.len(), "{family}");
            }
            assert!(entries.iter().all(|entry| (entry.candidates == 0) == entry.refusal.is_some()));
        }
    }

    #[test]
    fn a_missing_feature_is_the_reason() {
        let entries = catalogue(2560, &"x86-64 +sse3 +ssse3 +sse4.1".parse().unwrap());
        let wide = entries.iter().find(|entry| entry.family == "mad" && entry.machine == "avx2").unwrap();
        assert!(wide.refusal.as_ref().unwrap().contains("avx2 needs"), "{wide:?}");
    }
}
