//! The form of a prepared file that a model is used from as it lies there.

use ternion_compiler::Cpu;

use super::{Head, KernelChoice, ModelError, problems, sparse};
use crate::formats::Checkpoint;
use crate::formats::tern::{Form, HeadType};

/// The form in which loading a model for these kernels has nothing left to compute: second copies where kernels read two
/// layouts, records of the feed-forward for a model that makes zeros, and the screen of a head that is worth one. The first
/// copies' layout is [`Choice::layout`](ternion_tuner::Choice::layout).
///
/// # Errors
/// If a matrix has no kernel, or the type of the head's rows cannot be told.
pub fn ready_form(
    checkpoint: &Checkpoint,
    kernels: &KernelChoice,
    cpu: &Cpu,
    head: HeadType,
) -> Result<Form, ModelError> {
    let config = checkpoint.config();
    let mut copies = Vec::new();
    for problem in problems(config) {
        let layouts = kernels.of(problem.m, problem.k, cpu)?.layouts();
        copies.extend(layouts.get(1).map(|layout| ((problem.m, problem.k), *layout)));
    }
    let records = sparse::jobs(config, kernels.sparse(), cpu).map(|jobs| jobs.map(|(_, schedule)| schedule.layout));
    let (embedding, own) = checkpoint.token_row_types()?;
    // Bounded by `ModelConfig::check`, far below any overflow.
    let rows = config.vocabulary * head.of(own.unwrap_or(embedding)).row_bytes(config.hidden);
    Ok(Form { head, screen: config.pooling.is_none() && Head::is_screened(rows), copies, records })
}
