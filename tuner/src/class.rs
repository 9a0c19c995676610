//! How many columns a product has, in the few classes that deserve a schedule of their own, and how often each is met.

use std::fmt;

use serde::{Deserialize, Serialize};
use ternion_compiler::{Columns, Cpu, KernelSpec, Layout, Schedule};

/// A range of numbers of columns (tokens) that share a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Class {
    /// One column: a single sequence is decoded.
    #[serde(rename = "1")]
    One,
    /// 2 to 4: drafts, or a few sequences at once.
    #[serde(rename = "2-4")]
    Few,
    /// 5 to 8.
    #[serde(rename = "5-8")]
    Small,
    /// 9 to 32: batches, short prompts.
    #[serde(rename = "9-32")]
    Batch,
    /// 33 to 128: the chunks of a prompt.
    #[serde(rename = "33-128")]
    Chunk,
    /// More than 128.
    #[serde(rename = ">128")]
    Bulk,
}

impl Class {
    /// All classes, from few columns to many.
    pub const ALL: [Self; 6] = [Self::One, Self::Few, Self::Small, Self::Batch, Self::Chunk, Self::Bulk];

    /// The class of `n` columns.
    #[must_use]
    pub const fn of(n: usize) -> Self {
        match n {
            0 | 1 => Self::One,
            2..=4 => Self::Few,
            5..=8 => Self::Small,
            9..=32 => Self::Batch,
            33..=128 => Self::Chunk,
            _ => Self::Bulk,
        }
    }

    /// Place in [`ALL`](Self::ALL).
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Columns that the class is measured with.
    #[must_use]
    pub const fn measured(self) -> usize {
        [1, 4, 8, 32, 64, 256][self.index()]
    }

    /// What a kernel for it is compiled for.
    #[must_use]
    pub const fn columns(self) -> Columns {
        match self {
            Self::One => Columns::One,
            _ => Columns::Many,
        }
    }

    /// The kernel for rows of `k` weights.
    #[must_use]
    pub const fn spec(self, k: usize) -> KernelSpec {
        KernelSpec { k, columns: self.columns() }
    }

    /// The number of columns in words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        ["1", "2-4", "5-8", "9-32", "33-128", ">128"][self.index()]
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The schedules of one shape, one per class. They read one layout, so that one copy of the weights serves all, or at
/// most two where a second copy is affordable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Choice {
    /// In the order of [`Class::ALL`].
    pub schedules: [Schedule; 6],
}

impl Choice {
    /// `one` for a single column, `many` for everything else.
    #[must_use]
    pub const fn pair(one: Schedule, many: Schedule) -> Self {
        Self { schedules: [one, many, many, many, many, many] }
    }

    /// The schedule of a class.
    #[must_use]
    pub const fn of(&self, class: Class) -> Schedule {
        self.schedules[class.index()]
    }

    /// The layout of the copy that decoding reads.
    #[must_use]
    pub const fn layout(&self) -> Layout {
        self.schedules[0].layout
    }

    /// All layouts, that of decoding first: as many copies of the weights as there must be.
    #[must_use]
    pub fn layouts(&self) -> Vec<Layout> {
        let mut layouts = Vec::new();
        for schedule in self.schedules {
            if !layouts.contains(&schedule.layout) {
                layouts.push(schedule.layout);
            }
        }
        layouts
    }

    /// Whether all schedules are legal for rows of `k` weights on `cpu` and read at most two layouts; if not, why.
    pub(crate) fn check(&self, k: usize, cpu: &Cpu) -> Result<(), String> {
        for class in Class::ALL {
            self.of(class).check(&class.spec(k), cpu).map_err(|error| error.to_string())?;
        }
        match self.layouts().len() {
            0..=2 => Ok(()),
            copies => Err(format!("its schedules read {copies} different layouts")),
        }
    }
}

/// What a model is used for: how often each class is met.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Prompt tokens among all tokens that go through the model, from 0 to 1.
    pub prompt_share: f64,
    /// Sequences that are decoded at once.
    pub batch: usize,
}

impl Default for Workload {
    /// A chat: the key-value cache holds the conversation so far, so only the user's last words are a prompt, and answers
    /// are longer than questions.
    fn default() -> Self {
        Self { prompt_share: 1.0 / 3.0, batch: 1 }
    }
}

/// Of the prompt tokens, how many go through the model in each class: most in full chunks, the rest in what is left over.
const PROMPT_TOKENS: [f64; 6] = [0.0, 0.02, 0.03, 0.2, 0.65, 0.1];

impl Workload {
    /// Whether it is the same as another, but for what a text makes of its numbers.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.batch == other.batch && (self.prompt_share - other.prompt_share).abs() < 1e-6
    }

    /// Products of one matrix per token, by class: tokens of the class over the columns that share a product. No class
    /// is quite without weight, since a choice has a schedule for each.
    #[must_use]
    pub fn weights(&self) -> [f64; 6] {
        let share = self.prompt_share.clamp(0.0, 1.0);
        // A batch fills and drains: all sizes up to the full one are met.
        let sizes = Class::of(self.batch).index() + 1;
        Class::ALL.map(|class| {
            let decoded = if class.index() < sizes { (1.0 - share) / sizes as f64 } else { 0.0 };
            let tokens = (share * PROMPT_TOKENS[class.index()] + decoded).max(0.005);
            tokens / class.measured() as f64
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_columns_is_in_one_class_that_is_measured_with_one_of_its_own() {
        let mut last = Class::One;
        for n in 1..400 {
            let class = Class::of(n);
            assert!(class >= last);
            last = class;
        }
        for class in Class::ALL {
            assert_eq!(Class::of(class.measured()), class);
            let text = serde_json::to_string(&class).unwrap();
            assert_eq!(text, format!("\"{class}\""));
        }
    }

    #[test]
    fn decoding_weighs_most_in_a_chat_and_prompts_where_prompts_are_all() {
        let chat = Workload::default().weights();
        assert!(chat[0] > chat[1..].iter().sum());
        let prompts = Workload { prompt_share: 1.0, batch: 1 }.weights();
        assert!(prompts[4] > prompts[0]);
        let server = Workload { prompt_share: 0.5, batch: 8 }.weights();
        assert!(server[2] > chat[2] && server.iter().all(|weight| *weight > 0.0));
    }
}
