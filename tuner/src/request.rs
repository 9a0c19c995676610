//! What is asked of the tuner and what it answers.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use ternion_compiler::{Cpu, Layout, Schedule};

use crate::contest::Figures;
use crate::profile::Warning;
use crate::{Choice, Class, SparseChoice, SparseShape, Workload};

/// One shape of matrix and how many of them the model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Problem {
    /// Rows.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// Matrices of this shape in the model.
    pub count: usize,
}

impl Problem {
    /// Bytes of all its matrices at two bits a weight.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.m.saturating_mul(self.k.div_ceil(4)).saturating_mul(self.count.max(1))
    }
}

/// How thorough a search is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    /// What is known, or a guess.
    Nothing,
    /// Eight schedules, one column and a batch.
    Race,
    /// Every class, and as many schedules as time allows, the most promising first.
    Search,
    /// Every class and every legal schedule.
    Exhaustive,
}

/// How long choosing may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Wall time of everything, compiling included; kept within about a tenth.
    pub time: Duration,
    /// What to do in it.
    pub effort: Effort,
}

impl Budget {
    /// No time at all: known choices and guesses.
    pub const NONE: Self = Self { time: Duration::ZERO, effort: Effort::Nothing };

    /// The short race of a first start: 300 ms, eight schedules per shape.
    pub const RACE: Self = Self { time: Duration::from_millis(300), effort: Effort::Race };

    /// Everything, however long it takes.
    pub const EXHAUSTIVE: Self = Self { time: Duration::from_secs(7 * 24 * 3600), effort: Effort::Exhaustive };

    /// A thorough search for as long as the user has patience.
    #[must_use]
    pub const fn search(time: Duration) -> Self {
        Self { time, effort: Effort::Search }
    }

    pub(crate) fn milliseconds(&self) -> u64 {
        u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX)
    }

    /// Schedules that a search starts from; a short race has no others.
    pub(crate) const fn seeds(&self) -> usize {
        match self.effort {
            Effort::Nothing => 2,
            Effort::Race => 8,
            Effort::Search | Effort::Exhaustive => 16,
        }
    }

    /// Whether schedules beyond the seeds are looked for.
    pub(crate) const fn explores(&self) -> bool {
        matches!(self.effort, Effort::Search | Effort::Exhaustive)
    }
}

/// What is to be chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The shapes.
    pub problems: Vec<Problem>,
    /// Bytes that a token reads besides these matrices, of the head for example: a cache that holds the matrices alone is no
    /// place to measure them.
    #[serde(default)]
    pub beside: usize,
    /// How long it may take.
    pub budget: Budget,
    /// What the model is used for.
    pub workload: Workload,
    /// Bytes that second copies of weights, in another layout for other classes, may take together. If not given, nothing
    /// new is chosen that needs one, and what is known is taken as it is.
    pub second_copies: Option<u64>,
    /// Measure even what is known.
    pub again: bool,
    /// The feed-forwards, if they make zeros that need not be read.
    #[serde(default)]
    pub sparse: Option<SparseShape>,
    /// Of schedules that are nearly as fast as the fastest, choose the one that takes least energy.
    pub energy: bool,
    /// What a file holds already: of layouts that are nearly as fast as the fastest, one that is there is used.
    #[serde(default)]
    pub held: Held,
}

/// The layouts that weights lie in already, so that nothing has to be converted before the first token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// Of all matrices of a shape, `(m, k)`.
    pub matrices: Vec<((usize, usize), Vec<Layout>)>,
    /// Of the records of up-projections.
    pub rows: Option<Layout>,
    /// Of the records of down-projections.
    pub columns: Option<Layout>,
}

impl Held {
    /// The layouts of `[m, k]` matrices.
    #[must_use]
    pub fn layouts(&self, m: usize, k: usize) -> &[Layout] {
        self.matrices.iter().find(|(shape, _)| *shape == (m, k)).map_or(&[], |(_, layouts)| layouts)
    }
}

/// The best choice that reads another layout than the one that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// Its schedules.
    pub choice: Choice,
    /// How many times slower it was, all classes together.
    pub slower: f64,
}

/// Up to how many times slower kernels may be if their weights need not be converted first.
pub(crate) const NEARLY: f64 = 1.05;

impl Request {
    /// What is known, or else what `budget` finds, for the usual workload and one copy of the weights.
    #[must_use]
    pub fn new(problems: Vec<Problem>, budget: Budget) -> Self {
        Self {
            problems,
            beside: 0,
            budget,
            workload: Workload::default(),
            second_copies: None,
            again: false,
            sparse: None,
            energy: false,
            held: Held::default(),
        }
    }
}

/// How a choice was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Remembered from an earlier race.
    Known,
    /// Measured now.
    Raced,
    /// Not measured here: shipped with ternion for this CPU.
    Shipped,
    /// There was no time to measure.
    Guess,
}

/// What was measured for one class of a shape. Times are those of one product of the whole matrix with the columns that
/// the class is [measured](Class::measured) with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassResult {
    /// The class.
    pub class: Class,
    /// Times of the winner.
    pub figures: Figures,
    /// Energy of one product of the winner, in joules, if it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joules: Option<f64>,
    /// Schedules that were measured.
    pub tried: usize,
    /// Median over all of them, in microseconds.
    pub median_us: f64,
    /// The slowest of them, in microseconds.
    pub worst_us: f64,
    /// The guess that an untuned start would have used, in microseconds.
    pub guess_us: Option<f64>,
    /// Whether the winner is slower than the guess beyond noise: the guess has another layout, in which all classes
    /// together are slower.
    #[serde(default)]
    pub pays: bool,
}

/// One schedule that was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Rows.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// The class.
    pub class: Class,
    /// The schedule.
    pub schedule: Schedule,
    /// Time of one product, in microseconds.
    pub us: f64,
}

/// The choice for one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// The shape.
    pub problem: Problem,
    /// Its schedules.
    pub choice: Choice,
    /// Where they come from.
    pub source: Source,
    /// What was measured, by class; empty if nothing was.
    pub results: Vec<ClassResult>,
    /// Schedules that raced.
    pub raced: usize,
    /// The best of other layouts, the fastest first.
    #[serde(default)]
    pub alternatives: Vec<Alternative>,
}

impl Found {
    /// Takes the fastest alternative whose layouts are all `held`, if the choice's are not and it is nearly as fast.
    pub(crate) fn prefer(&mut self, held: &[Layout]) {
        let is_held = |choice: &Choice| choice.layouts().iter().all(|layout| held.contains(layout));
        if is_held(&self.choice) {
            return;
        }
        if let Some(other) = self.alternatives.iter().find(|other| other.slower <= NEARLY && is_held(&other.choice)) {
            self.choice = other.choice;
            // Of the fastest.
            self.results.clear();
        }
    }

    /// What was measured for a class.
    #[must_use]
    pub fn result(&self, class: Class) -> Option<&ClassResult> {
        self.results.iter().find(|result| result.class == class)
    }
}

/// Wall time of the parts of a search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phases {
    /// Making the buffer of weights, and all else before the first kernel.
    pub preparing: Duration,
    /// Compiling kernels and checking their results.
    pub compiling: Duration,
    /// Measuring candidates in search of better ones.
    pub exploring: Duration,
    /// The final rounds.
    pub racing: Duration,
}

/// The choices for a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choices {
    /// One per different shape, the one with most work first.
    pub found: Vec<Found>,
    /// How lists of records are read, if that was asked for and has been measured.
    #[serde(default)]
    pub sparse: Option<SparseChoice>,
    /// Wall time of it all.
    pub spent: Duration,
    /// And of its parts.
    pub phases: Phases,
    /// Every schedule that was measured, if this was a search.
    pub trials: Vec<Trial>,
    /// What went wrong on the way without stopping it.
    pub warnings: Vec<Warning>,
}

impl Choices {
    /// The schedules of an `[m, k]` matrix.
    #[must_use]
    pub fn get(&self, m: usize, k: usize) -> Option<Choice> {
        self.found.iter().find(|found| (found.problem.m, found.problem.k) == (m, k)).map(|found| found.choice)
    }

    /// Whether all of them were known.
    #[must_use]
    pub fn all_known(&self) -> bool {
        self.found.iter().all(|found| found.source == Source::Known)
    }
}

/// What is going on, for a progress bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Time spent so far, of everything.
    pub spent: Duration,
}

/// A step of the way to a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Kernels are compiled and checked.
    Compiling {
        /// How many are done.
        done: usize,
        /// How many there are if time allows.
        total: usize,
    },
    /// Kernels of one shape are tried out.
    Exploring {
        /// The shape.
        problem: Problem,
        /// Which one of `shapes` it is, from 0.
        shape: usize,
        /// Shapes to race in all.
        shapes: usize,
        /// Schedules tried.
        tried: usize,
        /// Legal schedules.
        legal: usize,
    },
    /// The best kernels of one shape race.
    Racing {
        /// The shape.
        problem: Problem,
        /// Which one of `shapes` it is, from 0.
        shape: usize,
        /// Shapes to race in all.
        shapes: usize,
        /// How many schedules have not retired yet.
        left: usize,
    },
}

/// A shape for which nothing can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no kernel for a {m}x{k} matrix on this CPU ({cpu}): rows of 1 to 1048576 weights can be compiled")]
pub struct NoSchedule {
    /// Rows.
    pub m: usize,
    /// Length of a row.
    pub k: usize,
    /// The CPU.
    pub cpu: Cpu,
}
