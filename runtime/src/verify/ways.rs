//! Ways to run a model that must all come to the same logits.

use std::fmt;

use ternion_compiler::{Cpu, Family, Feature};

use crate::formats::ModelConfig;
use crate::model::{KernelChoice, problems};

/// How the tokens of a text go through the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// This many at a time.
    Chunks(usize),
    /// This many at a time, each time together with tokens of [`OTHERS`] other texts.
    Among(usize),
    /// One at a time, with up to this many drafts behind it, some of which are wrong and taken back.
    Drafts(usize),
}

/// Texts that share the passes of [`Pass::Among`].
pub const OTHERS: usize = 3;

impl Pass {
    /// All that are compared.
    pub const ALL: [Self; 6] =
        [Self::Chunks(1), Self::Chunks(7), Self::Chunks(64), Self::Among(1), Self::Among(7), Self::Drafts(4)];
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chunks(tokens) => write!(f, "chunks of {tokens}"),
            Self::Among(tokens) => write!(f, "chunks of {tokens} among {OTHERS} other texts"),
            Self::Drafts(tokens) => write!(f, "1 and up to {tokens} drafts"),
        }
    }
}

/// One way to run a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Kernels.
    pub family: Family,
    /// What the kernels may use of this CPU.
    pub cpu: Cpu,
    /// Threads.
    pub threads: usize,
    /// How tokens go through the layers.
    pub pass: Pass,
    /// Whether a single token reads whole feed-forward matrices even where its zeros would spare it parts of them.
    pub whole: bool,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, cpu, threads, pass, whole } = self;
        let whole = if *whole { ", whole matrices" } else { "" };
        write!(f, "{family} kernels for {cpu} on {threads} threads, {pass}{whole}")
    }
}

/// Every family with every pass. What else may differ goes round in such a way that all pairs of choices meet, for the
/// usual numbers of choices; those with kernels in common follow each other.
pub(super) fn ways(config: &ModelConfig, cpu: &Cpu, threads: usize) -> Vec<Way> {
    let counts = thread_counts(threads);
    let mut ways = Vec::new();
    for (f, family) in Family::dense().enumerate() {
        let runs = |cpu: &Cpu| {
            problems(config).iter().all(|problem| KernelChoice::Family(family).of(problem.m, problem.k, cpu).is_ok())
        };
        let mut levels = levels(cpu);
        levels.retain(|level| level == cpu || runs(level));
        let pass = |(p, pass): (usize, &Pass)| {
            let level = (f + 2 * p) % levels.len();
            let way = Way {
                family,
                cpu: levels[level],
                threads: counts[(f + p) % counts.len()],
                pass: *pass,
                whole: (f + p / 3) % 2 == 1,
            };
            (level, way)
        };
        let mut of_family: Vec<(usize, Way)> = Pass::ALL.iter().enumerate().map(pass).collect();
        of_family.sort_by_key(|(level, way)| (*level, way.whole));
        ways.extend(of_family.into_iter().map(|(_, way)| way));
    }
    ways
}

/// Up to three threads, and as many as there may be.
fn thread_counts(most: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = [1, 2, 3, most].into_iter().filter(|threads| *threads <= most).collect();
    counts.dedup();
    counts
}

/// `cpu`, and what is left of it without its widest vectors, step by step.
fn levels(cpu: &Cpu) -> Vec<Cpu> {
    use Feature::{Avx, Avx2, Avx512bw, Avx512dq, Avx512f, Avx512vbmi, Avx512vl, Avx512vnni, AvxVnni, DotProd, Fma};
    const STEPS: [&[Feature]; 2] =
        [&[Avx512f, Avx512dq, Avx512bw, Avx512vl, Avx512vbmi, Avx512vnni], &[Avx, Avx2, Fma, AvxVnni, DotProd]];
    let mut levels = vec![*cpu];
    let mut cpu = *cpu;
    for step in STEPS {
        cpu = step.iter().fold(cpu, |cpu, feature| cpu.without(*feature));
        levels.push(cpu);
    }
    levels.dedup();
    levels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::synth::Recipe;

    #[test]
    fn on_a_wide_cpu_there_are_30_ways_and_every_pair_of_choices_meets() {
        let config = Recipe::preset("125M").unwrap().config;
        let cpu = "x86-64 +sse3 +ssse3 +sse4.1 +sse4.2 +avx +avx2 +fma +avx512f +avx512dq +avx512bw +avx512vl +avx512vbmi \
                   +avx512vnni";
        let ways = ways(&config, &cpu.parse().unwrap(), 3);
        assert_eq!(ways.len(), 30);
        let choices = ways.iter().map(|way| {
            [
                way.family.to_string(),
                way.cpu.to_string(),
                way.threads.to_string(),
                way.pass.to_string(),
                way.whole.to_string(),
            ]
        });
        let choices: Vec<[String; 5]> = choices.collect();
        let distinct = |axes: &[usize]| {
            let of = |way: &[String; 5]| axes.iter().map(|axis| way[*axis].clone()).collect::<Vec<_>>();
            choices.iter().map(of).collect::<std::collections::BTreeSet<_>>().len()
        };
        assert_eq!([0, 1, 2, 3, 4].map(|axis| distinct(&[axis])), [5, 3, 3, 6, 2]);
        for a in 0..5 {
            for b in 0..a {
                assert_eq!(distinct(&[a, b]), distinct(&[a]) * distinct(&[b]), "choices {a} and {b}");
            }
        }
    }

    #[test]
    fn a_cpu_without_vectors_has_one_level_and_there_are_no_more_threads_than_asked_for() {
        let cpu: Cpu = "x86-64 +sse3 +ssse3".parse().unwrap();
        assert_eq!(levels(&cpu), [cpu]);
        assert_eq!([1, 2, 3, 8].map(thread_counts), [vec![1], vec![1, 2], vec![1, 2, 3], vec![1, 2, 3, 8]]);
    }
}
