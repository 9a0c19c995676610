//! What a model is to be used for, in the words that users know, and what follows from it.

use clap::{Args, ValueEnum};
use ternion_compiler::Layout;
use ternion_runtime::formats::{ModelConfig, Projection};
use ternion_runtime::team::available_threads;
use ternion_tuner::{Class, Workload};

use crate::arguments::Threads;

/// A kind of machine and use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preset {
    /// A phone: 2 threads, 512 MB, one user
    Mobile,
    /// A small computer: 4 threads, 1024 MB, one user
    Edge,
    /// A server: 8 threads, 2048 MB, batches of up to 8
    Server,
    /// A large server: 16 threads, 4096 MB, batches of up to 32
    Cloud,
}

/// What is tuned for.
#[derive(Debug, Args)]
pub(crate) struct Purpose {
    /// Tune for this use: sets threads (at most what this process may use), memory limit, batch sizes and prompt share
    #[arg(long = "for", value_name = "USE")]
    pub(crate) preset: Option<Preset>,
    /// Prompt tokens among all tokens, from 0 to 1 [default: 0.33, or what --for says]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    pub(crate) prompt_share: Option<f64>,
    /// Memory for the model in MB; what is left over may hold second copies of weights, each for other batch sizes
    /// [default: one copy, or what --for says]
    #[arg(long, value_name = "MB")]
    pub(crate) memory_limit: Option<u64>,
    /// Of kernels that are nearly as fast as the fastest, choose those that take least energy (needs RAPL or a battery)
    #[arg(long)]
    pub(crate) energy: bool,
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

impl Preset {
    pub(crate) const fn threads(self) -> usize {
        [2, 4, 8, 16][self as usize]
    }

    pub(crate) const fn memory_mb(self) -> u64 {
        [512, 1024, 2048, 4096][self as usize]
    }

    pub(crate) const fn batch(self) -> usize {
        [1, 1, 8, 32][self as usize]
    }

    /// As it is written on the command line.
    #[cfg(feature = "server")]
    pub(crate) const fn name(self) -> &'static str {
        ["mobile", "edge", "server", "cloud"][self as usize]
    }

    /// Tokens that a text on a server of this kind may have, unless asked otherwise.
    #[cfg(feature = "server")]
    pub(crate) const fn serving_context(self) -> usize {
        [1024, 2048, 8192, 32_768][self as usize]
    }

    const fn prompt_share(self) -> f64 {
        [0.25, 0.33, 0.5, 0.6][self as usize]
    }
}

/// Tokens of context that memory is set aside for.
const CONTEXT: usize = 4096;

impl Purpose {
    pub(crate) fn threads(&self, asked: &Threads) -> usize {
        let available = available_threads();
        let preset = || self.preset.map_or(available, |preset| preset.threads().min(available));
        asked.threads.map_or_else(preset, usize::from)
    }

    pub(crate) fn workload(&self) -> Workload {
        let usual = Workload::default();
        Workload {
            prompt_share: self.prompt_share.or(self.preset.map(Preset::prompt_share)).unwrap_or(usual.prompt_share),
            batch: self.preset.map_or(usual.batch, Preset::batch),
        }
    }

    /// Bytes that are left for second copies of weights.
    pub(crate) fn second_copies(&self, config: &ModelConfig) -> u64 {
        let limit = self.memory_limit.or(self.preset.map(Preset::memory_mb)).map(|mb| mb.saturating_mul(1_000_000));
        limit.map_or(0, |limit| limit.saturating_sub(model_bytes(config) + kv_bytes(config)))
    }

    /// The batch size to serve with, and why.
    pub(crate) fn recommendation(&self, config: &ModelConfig, speeds: &[(Class, f64)]) -> String {
        let limit = self.memory_limit.or(self.preset.map(Preset::memory_mb)).map(|mb| mb.saturating_mul(1_000_000));
        let batch = self.workload().batch;
        let room = limit.map(|limit| limit.saturating_sub(model_bytes(config)) / kv_bytes(config).max(1));
        let fits = room.map_or(usize::MAX, |room| usize::try_from(room).unwrap_or(usize::MAX));
        // More columns pay as long as a token becomes cheaper by a tenth.
        let mut best: Option<(Class, f64)> = None;
        for (class, per_token) in speeds.iter().copied().filter(|(class, _)| class.measured() <= batch.max(1)) {
            if best.is_none_or(|(_, known)| per_token < 0.9 * known) {
                best = Some((class, per_token));
            }
        }
        let wanted = best.map_or(batch, |(class, _)| class.measured().min(batch));
        let size = wanted.min(fits).max(1);
        let one = speeds.iter().find(|(class, _)| *class == Class::One).map(|(_, per_token)| *per_token);
        let gain = one.zip(best).filter(|(_, (class, _))| *class != Class::One).map_or(
            String::new(),
            |(one, (class, best))| {
                format!(": with {class} at once the matrices take {:.1} times less per token than with one", one / best)
            },
        );
        let memory = match limit {
            Some(limit) if fits < wanted => format!(
                "; {} MB hold the model ({} MB) and {fits} sequences of {CONTEXT} tokens",
                limit / 1_000_000,
                model_bytes(config) / 1_000_000
            ),
            Some(limit) if model_bytes(config) + kv_bytes(config) > limit => {
                format!("; the model needs more than {} MB", limit / 1_000_000)
            }
            _ => String::new(),
        };
        let alone = if batch == 1 { ": one user at a time (--for server or cloud serves more)" } else { "" };
        format!("recommended batch size {size}{alone}{gain}{memory}")
    }
}

/// Bytes of a model in memory: ternary matrices, embedding and head in half precision.
pub(crate) fn model_bytes(config: &ModelConfig) -> u64 {
    let layer: usize = Projection::ALL
        .iter()
        .map(|projection| {
            let (m, k) = projection.shape(config);
            Layout::Rows { rows: 4, chunk: 64 }.bytes(m, k).unwrap_or(usize::MAX)
        })
        .fold(0, usize::saturating_add);
    let copies = if config.tied_head { 1 } else { 2 };
    let rows = config.vocabulary.saturating_mul(config.hidden).saturating_mul(2 * copies);
    layer.saturating_mul(config.layers).saturating_add(rows) as u64
}

/// Bytes of the key-value cache of one sequence.
fn kv_bytes(config: &ModelConfig) -> u64 {
    let tokens = config.context.min(CONTEXT);
    (tokens.saturating_mul(config.layers).saturating_mul(2 * 2 * config.kv_heads * config.head_dim)) as u64
}
