//! Profiles that are shipped with ternion, for the CPUs that the project has met: hints until this machine is tuned.
//!
//! They are keyed by the CPU alone. Another compiler may have written them, so every schedule is checked again, and what
//! is no longer legal is no hint. Adding a machine is adding the file that `ternion tune --save` wrote to this list.

use std::sync::LazyLock;

use ternion_compiler::Cpu;

use crate::{Alternative, Choice, CpuProfile, MachineProfile, Problem};

/// The files, as saved: `include_str!("../profiles/NAME.json")`.
const FILES: &[&str] = &[
    include_str!("../profiles/amd-zen4-1-thread.json"),
    include_str!("../profiles/amd-zen4-2-threads.json"),
    include_str!("../profiles/amd-zen5-1-thread.json"),
    include_str!("../profiles/amd-zen5-2-threads.json"),
    include_str!("../profiles/intel-sapphire-rapids-1-thread.json"),
    include_str!("../profiles/intel-sapphire-rapids-2-threads.json"),
];

static PROFILES: LazyLock<Vec<MachineProfile>> =
    LazyLock::new(|| FILES.iter().filter_map(|file| serde_json::from_str(file).ok()).collect());

/// The hint for a shape, if this CPU is one of those: from a profile with this many threads, or else with the nearest
/// number, and from the same shape, or else the nearest one with rows of the same length. With it, what was nearly as fast there,
/// for files that hold another layout.
pub(crate) fn choice(
    machine: &CpuProfile,
    cpu: &Cpu,
    threads: usize,
    problem: Problem,
) -> Option<(Choice, Vec<Alternative>)> {
    find(&PROFILES, &machine.signature(), cpu, threads, problem)
}

fn find(
    profiles: &[MachineProfile],
    signature: &str,
    cpu: &Cpu,
    threads: usize,
    problem: Problem,
) -> Option<(Choice, Vec<Alternative>)> {
    let mut profiles: Vec<_> = profiles.iter().filter(|profile| profile.key.cpu == signature).collect();
    profiles.sort_by_key(|profile| profile.key.threads.abs_diff(threads));
    let legal = |choice: &Choice| choice.layouts().len() == 1 && choice.check(problem.k, cpu).is_ok();
    profiles.into_iter().find_map(|profile| {
        let mut shapes: Vec<_> = profile.shapes.iter().filter(|entry| entry.k == problem.k).collect();
        shapes.sort_by_key(|entry| entry.m.abs_diff(problem.m));
        let entry = shapes.into_iter().find(|entry| legal(&entry.choice))?;
        let alternatives = entry.alternatives.iter().filter(|other| legal(&other.choice));
        Some((entry.choice, alternatives.copied().collect()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Class;
    use crate::profile::{ProfileKey, ShapeEntry};
    use crate::shortlist::Shortlist;

    #[test]
    fn every_shipped_file_is_a_profile_and_its_schedules_parse() {
        assert_eq!(PROFILES.len(), FILES.len());
        for profile in PROFILES.iter() {
            assert!(!profile.shapes.is_empty(), "{}", profile.key.cpu);
            assert!(profile.shapes.iter().all(|entry| !entry.provisional), "{}: a busy machine", profile.key.cpu);
        }
    }

    #[test]
    fn a_hint_is_for_this_cpu_and_legal_here() {
        let cpu: Cpu = "x86-64 +ssse3".parse().unwrap();
        let choice = Shortlist::new(256, &cpu, 8, &|_, _| false).guess().unwrap();
        let key = |threads| ProfileKey { cpu: "A".into(), features: "f".into(), compiler: "c".into(), threads };
        let mut profile = MachineProfile::new(key(2));
        let other = |unroll| {
            let mut choice = choice;
            choice.schedules[Class::Few.index()].unroll = unroll;
            Alternative { choice, slower: 1.02 }
        };
        let known = other(choice.schedules[Class::Few.index()].unroll);
        let alternatives = vec![other(77), known];
        let entry = ShapeEntry { choice, alternatives, ..crate::profile::tests::entry(64, 256, 1) };
        profile.insert(entry.clone());
        let problem = Problem { m: 128, k: 256, count: 1 };
        let found = |profile: &MachineProfile, cpu: &str, problem| {
            find(std::slice::from_ref(profile), cpu, &"x86-64 +ssse3".parse().unwrap(), 8, problem)
        };
        assert_eq!(found(&profile, "A", problem), Some((choice, vec![known])), "77 times unrolled is not legal");
        assert_eq!(found(&profile, "B", problem), None);
        assert_eq!(found(&profile, "A", Problem { k: 512, ..problem }), None);
        let mut illegal = MachineProfile::new(key(2));
        let mut bad = entry;
        bad.choice.schedules[Class::Few.index()].unroll = 77;
        illegal.insert(bad);
        assert_eq!(found(&illegal, "A", problem), None);
    }
}
