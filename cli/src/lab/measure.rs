//! What `lab run` and `lab sweep` have in common: which matrices, how many columns, which schedules, on which threads.

use std::num::NonZeroUsize;

use anyhow::Result;
use clap::{Args, ValueEnum};
use ternion_compiler::{Family, MachineKind};
use ternion_lab::{Condition, Filter, Shape, Weights};
use ternion_runtime::team::{Team, available_threads};

use crate::UsageError;
use crate::arguments::Threads;

#[derive(Debug, Args)]
pub(super) struct Matrices {
    /// Rows x row length of the matrix, as in W[m, k]; may be given several times
    #[arg(long, value_name = "MxK", required = true)]
    shape: Vec<Shape>,
    /// Columns per product; may be given several times
    #[arg(short, long, value_name = "COLUMNS", default_value = "1")]
    n: Vec<NonZeroUsize>,
    /// Where the weights are when they are read: cold in memory, or hot in a cache [default: cold for one column]
    #[arg(long, value_enum)]
    weights: Option<WeightsName>,
    /// Records that families with a list leave out, in percent; may be given several times [default: 0]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=99))]
    zeros: Vec<u8>,
    #[command(flatten)]
    threads: Threads,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WeightsName {
    Cold,
    Hot,
}

#[derive(Debug, Args)]
pub(super) struct Schedules {
    /// Only schedules of this family; may be given several times
    #[arg(long)]
    family: Vec<Family>,
    /// Only schedules of this machine: clif128, avx2 or avx512; may be given several times
    #[arg(long)]
    machine: Vec<MachineKind>,
    /// Only schedules whose parameter has one of these values, for example prefetch=0,4096; may be given several times
    #[arg(long = "where", value_name = "PARAMETER=VALUE[,VALUE]")]
    conditions: Vec<Condition>,
}

impl Schedules {
    pub(super) fn filter(&self) -> Filter {
        Filter { families: self.family.clone(), machines: self.machine.clone(), conditions: self.conditions.clone() }
    }
}

impl Matrices {
    /// Every matrix with every number of columns.
    pub(super) fn products(&self) -> impl Iterator<Item = (Shape, usize)> {
        self.shape.iter().flat_map(|shape| self.n.iter().map(|n| (*shape, n.get())))
    }

    pub(super) fn weights(&self, n: usize) -> Weights {
        match self.weights {
            Some(WeightsName::Cold) => Weights::Cold,
            Some(WeightsName::Hot) => Weights::Hot,
            None if n == 1 => Weights::Cold,
            None => Weights::Hot,
        }
    }

    /// Shares of zeros for a family.
    pub(super) fn zeros(&self, family: Family) -> Vec<u8> {
        if family.list().is_none() || self.zeros.is_empty() { vec![0] } else { self.zeros.clone() }
    }

    /// Whether `--zeros` means anything to one of these families.
    pub(super) fn check_zeros(&self, mut families: impl Iterator<Item = Family>) -> Result<()> {
        if self.zeros.is_empty() || families.any(|family| family.list().is_some()) {
            return Ok(());
        }
        Err(UsageError(
            "--zeros: no schedule here reads a list; take --family sparse-rows or sparse-columns".to_owned(),
        )
        .into())
    }

    pub(super) fn team(&self) -> Result<Team> {
        Ok(Team::new(self.threads.threads.map_or_else(available_threads, NonZeroUsize::get))?)
    }
}
