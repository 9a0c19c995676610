//! Proof on this machine that nothing about how a model is run changes a single bit of its logits.
//!
//! A seeded sequence of tokens goes through the scalar reference once, token by token, and then through compiled kernels
//! in some two dozen [`Way`]s: kernel families, parts of the CPU's features, threads, chunks, other texts in the same
//! passes, drafts that are taken back, zeros skipped or not. Threads also share out the key-value cache: by heads, and
//! texts of more than 128 tokens by blocks of positions.

mod ways;

use std::sync::Arc;

use ternion_compiler::Cpu;
use xxhash_rust::xxh3::Xxh3;

use crate::formats::Checkpoint;
use crate::model::reference::{Precision, Reference};
use crate::model::{Batch, KernelChoice, KvType, Model, ModelError, Part, Sequence, Session, SessionOptions, Wanted};
use crate::team::{Team, TeamError};

pub use ways::{OTHERS, Pass, Way};

/// What to compare.
#[derive(Clone, Copy, Debug)]
pub struct VerifyOptions {
    /// Tokens of the sequence; as many as the context holds if that is less.
    pub tokens: usize,
    /// Teams of 1, 2, 3 and this many threads, none larger than this.
    pub threads: usize,
    /// Type of the key-value cache.
    pub kv: KvType,
}

/// A way that was compared, and what it gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The way.
    pub way: Way,
    /// XXH3-64 of the bits of all its logits, little-endian, position after position.
    pub digest: u64,
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
    /// The reference's digest.
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
        "{way}: the logit of token {token} at position {position} is {found:?}, the reference says {expected:?}; \
         please report this as a bug"
    )]
    Difference {
        /// How the model was run.
        way: Box<Way>,
        /// Position in the sequence.
        position: usize,
        /// Index of the logit.
        token: usize,
        /// What the run says.
        found: f32,
        /// What the reference says.
        expected: f32,
    },
    /// A way that did not give logits for every token.
    #[error("{way}: logits for {found} of {expected} tokens; please report this as a bug")]
    Missing {
        /// How the model was run.
        way: Box<Way>,
        /// Tokens that have logits.
        found: usize,
        /// Tokens.
        expected: usize,
    },
}

/// Compares every way to run the model with the reference. `progress` is told the runs that are done and all runs, the
/// reference's among them.
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
    let tokens = some_tokens(options.tokens.clamp(1, config.context), config.vocabulary, 0);
    let ways = ways::ways(config, cpu, options.threads.max(1));
    let total = 1 + ways.len();
    progress(0, total);
    let expected = reference(checkpoint, &tokens, options.kv)?;
    let (logits, digest) = (expected.len(), digest(&expected));
    let mut verified = Verified { tokens: tokens.len(), logits, runs: Vec::with_capacity(ways.len()), digest };
    for ways in ways.chunk_by(|a, b| (a.family, a.cpu) == (b.family, b.cpu)) {
        let (kernels, loaders) = (KernelChoice::Family(ways[0].family), Team::new(options.threads.max(1))?);
        let mut model = Arc::new(Model::load(checkpoint, &kernels, &ways[0].cpu, &loaders, &|_| {})?);
        for way in ways {
            progress(1 + verified.runs.len(), total);
            // Runs that skip zeros come first. Sessions are gone after their run, so the model is ours alone.
            if let Some(model) = Arc::get_mut(&mut model).filter(|_| way.whole) {
                model.read_whole();
            }
            let way = Way { whole: !model.skips_zeros(), ..*way };
            let digest = compare(&model, &way, options.kv, &tokens, &expected)?;
            verified.runs.push(Run { way, digest });
        }
    }
    progress(total, total);
    Ok(verified)
}

/// Runs a model in one way and compares its logits; returns their digest.
fn compare(model: &Arc<Model>, way: &Way, kv: KvType, tokens: &[u32], expected: &[f32]) -> Result<u64, VerifyError> {
    let (mut seen, mut difference, mut hash) = (0, None, Xxh3::new());
    run(model, way, kv, tokens, &mut |position, logits| {
        seen += usize::from(position == seen);
        let expected = &expected[position * logits.len()..][..logits.len()];
        let differs = logits.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(token) = differs.filter(|_| difference.is_none()) {
            let (way, found, expected) = (Box::new(*way), logits[token], expected[token]);
            difference = Some(VerifyError::Difference { way, position, token, found, expected });
        }
        update(&mut hash, logits);
    })?;
    match difference {
        Some(difference) => Err(difference),
        None if seen < tokens.len() => {
            Err(VerifyError::Missing { way: Box::new(*way), found: seen, expected: tokens.len() })
        }
        None => Ok(hash.digest()),
    }
}

/// Reads `tokens` in one way; `visit` sees the logits after each of them, with its position.
fn run(
    model: &Arc<Model>,
    way: &Way,
    kv: KvType,
    tokens: &[u32],
    visit: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), VerifyError> {
    let (model, team) = (Arc::clone(model), Arc::new(Team::new(way.threads)?));
    let session = |chunk| {
        let options = SessionOptions { kv, chunk, ..SessionOptions::default() };
        Session::new(Arc::clone(&model), Arc::clone(&team), &options)
    };
    match way.pass {
        Pass::Chunks(chunk) => session(chunk)?.prefill_all(tokens, visit)?,
        Pass::Among(chunk) => among(&model, &team, kv, chunk, tokens, visit)?,
        Pass::Drafts(most) => drafted(&mut session(most + 1)?, most, tokens, visit)?,
    }
    Ok(())
}

/// Reads `tokens` in passes that also read other texts, each from a position of its own.
fn among(
    model: &Arc<Model>,
    team: &Arc<Team>,
    kv: KvType,
    chunk: usize,
    tokens: &[u32],
    visit: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), ModelError> {
    let config = model.config();
    let others: usize = (1..=OTHERS).sum();
    let mut batch = Batch::new(Arc::clone(model), Arc::clone(team), chunk + others)?;
    let mut sequences = Vec::new();
    for _ in 0..=OTHERS {
        sequences.push(Sequence::new(model, kv, None)?);
    }
    let mut logits = vec![0.0; chunk * config.vocabulary];
    for (step, tokens) in tokens.chunks(chunk).enumerate() {
        // The first text reads one token in each pass, the second two: their positions drift apart.
        let texts: Vec<Vec<u32>> =
            (1..=OTHERS).map(|other| some_tokens(other.min(config.context), config.vocabulary, step + other)).collect();
        let [first, rest @ ..] = &mut sequences[..] else { return Ok(()) };
        for (sequence, text) in rest.iter_mut().zip(&texts) {
            if sequence.room() < text.len() {
                sequence.truncate(0);
            }
        }
        let start = first.tokens().len();
        let mut parts: Vec<Part<'_>> =
            rest.iter_mut().zip(&texts).map(|(sequence, tokens)| Part { sequence, tokens }).collect();
        parts.insert(1, Part { sequence: first, tokens });
        batch.forward(&mut parts)?;
        let before = texts[0].len();
        let logits = &mut logits[..tokens.len() * config.vocabulary];
        model.head().logits(team, batch.states(before..before + tokens.len()), logits);
        for (i, logits) in logits.chunks_exact(config.vocabulary).enumerate() {
            visit(start + i, logits);
        }
    }
    Ok(())
}

/// Reads `tokens` one by one with `most` drafts behind each, of which none, one, two … are right.
fn drafted(
    session: &mut Session,
    most: usize,
    tokens: &[u32],
    visit: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), ModelError> {
    let vocabulary = session.model().config().vocabulary;
    let (mut at, mut round, mut found, mut logits) = (0, 0, Vec::new(), vec![0.0; vocabulary]);
    while at < tokens.len() {
        let right = (round % (most + 1)).min(tokens.len() - at - 1);
        let mut read = tokens[at..=at + right].to_vec();
        // What would have come next, off by one.
        let wrong = tokens[at..].iter().map(|token| (token + 1) % vocabulary as u32);
        read.extend(wrong.take(most.min(session.room() - 1) - right));
        session.explore(&read, |_| Wanted::All, &[], &mut found)?;
        session.keep(1 + right);
        for (i, found) in found[..=right].iter().enumerate() {
            logits.fill(f32::NAN);
            found.iter().for_each(|(logit, token)| logits[*token as usize] = *logit);
            visit(at + i, &logits);
        }
        (at, round) = (at + 1 + right, round + 1);
    }
    Ok(())
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

/// Tokens from all over a vocabulary, the same on every machine (a Weyl sequence). Another `seed` gives others.
#[must_use]
pub fn some_tokens(length: usize, vocabulary: usize, seed: usize) -> Vec<u32> {
    let step = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let first = 1 + 1000 * seed as u64;
    (first..first + length as u64).map(|i| (step(i) % vocabulary.max(1) as u64) as u32).collect()
}

fn update(hash: &mut Xxh3, logits: &[f32]) {
    for logit in logits {
        hash.update(&logit.to_bits().to_le_bytes());
    }
}

fn digest(logits: &[f32]) -> u64 {
    let mut hash = Xxh3::new();
    update(&mut hash, logits);
    hash.digest()
}
