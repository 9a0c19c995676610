//! Proof on this machine that kernels, threads and prompt chunks do not change a single bit of the logits.
//!
//! A seeded sequence of tokens goes through the scalar reference once, token by token, and then through compiled kernels
//! in every combination of family, number of threads and chunk. Chunks of one token run the decoding kernels, longer
//! ones those for prompts.

use std::sync::Arc;

use ternion_compiler::{Cpu, Family};
use xxhash_rust::xxh3::Xxh3;

use crate::formats::Checkpoint;
use crate::model::reference::{Precision, Reference};
use crate::model::{KernelChoice, KvType, Model, ModelError, Session, SessionOptions};
use crate::team::{Team, TeamError};

/// Prompt chunks that are compared, in tokens.
pub const CHUNKS: [usize; 3] = [1, 7, 64];

/// What to compare.
#[derive(Clone, Copy, Debug)]
pub struct VerifyOptions {
    /// Tokens of the sequence; as many as the context holds if that is less.
    pub tokens: usize,
    /// Teams of 1 to this many threads.
    pub threads: usize,
    /// Type of the key-value cache.
    pub kv: KvType,
}

/// One way to run the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Kernels.
    pub family: Family,
    /// Threads.
    pub threads: usize,
    /// Tokens that go through the layers together.
    pub chunk: usize,
}

/// What was compared, without a difference.
#[derive(Clone, Debug)]
pub struct Verified {
    /// Tokens of the sequence.
    pub tokens: usize,
    /// Logits per run.
    pub logits: usize,
    /// All runs that equal the reference.
    pub runs: Vec<Run>,
    /// XXH3-64 of the bits of all logits, little-endian, position after position.
    pub digest: u64,
}

/// Why a model could not be verified, or the first difference.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The threads.
    #[error(transparent)]
    Team(#[from] TeamError),
    /// A logit that is not the reference's.
    #[error(
        "{} kernels with {} threads and chunks of {}: the logit of token {token} at position {position} is {found:?}, \
         the reference says {expected:?}; please report this as a bug", run.family, run.threads, run.chunk
    )]
    Difference {
        /// The run.
        run: Run,
        /// Position in the sequence.
        position: usize,
        /// Index of the logit.
        token: usize,
        /// What the run says.
        found: f32,
        /// What the reference says.
        expected: f32,
    },
}

/// Compares every combination of kernel family, threads and chunk with the reference. `progress` is told the runs that
/// are done and all runs, the reference's among them.
///
/// # Errors
/// The first difference, or why the model cannot be run.
pub fn verify(
    checkpoint: &Checkpoint,
    cpu: &Cpu,
    options: &VerifyOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Verified, VerifyError> {
    let config = checkpoint.config();
    let tokens = sequence(options.tokens.clamp(1, config.context), config.vocabulary);
    let total = 1 + Family::dense().count() * options.threads * CHUNKS.len();
    progress(0, total);
    let expected = reference(checkpoint, &tokens, options.kv)?;
    let mut verified = Verified {
        tokens: tokens.len(),
        logits: expected.len(),
        runs: Vec::with_capacity(total),
        digest: digest(&expected),
    };
    for family in Family::dense() {
        for threads in 1..=options.threads {
            let team = Arc::new(Team::new(threads)?);
            let model = Arc::new(Model::load(checkpoint, &KernelChoice::Family(family), cpu, &*team, &|_| {})?);
            for chunk in CHUNKS {
                progress(1 + verified.runs.len(), total);
                let run = Run { family, threads, chunk };
                let session_options = SessionOptions { kv: options.kv, chunk, ..SessionOptions::default() };
                let mut session = Session::new(Arc::clone(&model), Arc::clone(&team), &session_options)?;
                let mut difference = None;
                session.prefill_all(&tokens, &mut |position, logits| {
                    let expected = &expected[position * logits.len()..][..logits.len()];
                    let differs = logits.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
                    if let Some(token) = differs.filter(|_| difference.is_none()) {
                        let (found, expected) = (logits[token], expected[token]);
                        difference = Some(VerifyError::Difference { run, position, token, found, expected });
                    }
                })?;
                if let Some(difference) = difference {
                    return Err(difference);
                }
                verified.runs.push(run);
            }
        }
    }
    progress(total, total);
    Ok(verified)
}

/// The reference's logits after every token, `[tokens, vocabulary]`.
fn reference(checkpoint: &Checkpoint, tokens: &[u32], kv: KvType) -> Result<Vec<f32>, ModelError> {
    let reference = Reference::load(checkpoint)?;
    let mut session = reference.session(kv, Precision::Int8);
    let mut logits = Vec::with_capacity(tokens.len() * checkpoint.config().vocabulary);
    for token in tokens {
        logits.extend(session.step(*token)?);
    }
    Ok(logits)
}

/// Tokens from all over the vocabulary, the same on every machine (a Weyl sequence).
fn sequence(length: usize, vocabulary: usize) -> Vec<u32> {
    let step = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (1..=length as u64).map(|i| (step(i) % vocabulary.max(1) as u64) as u32).collect()
}

fn digest(logits: &[f32]) -> u64 {
    let mut hash = Xxh3::new();
    for logit in logits {
        hash.update(&logit.to_bits().to_le_bytes());
    }
    hash.digest()
}
