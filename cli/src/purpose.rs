//! What a model is to be used for, in the words that users know, and what follows from it.

use anyhow::Result;
use clap::{Args, ValueEnum};
use ternion_compiler::Layout;
use ternion_runtime::formats::{Activation, ModelConfig, Projection};
use ternion_runtime::model::KvType;
use ternion_runtime::team::available_threads;
use ternion_tuner::{Class, Workload};

use crate::UsageError;
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

/// The machine that a model gets.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct Room {
    /// Settings for this use: threads (at most what this process may use), memory limit and context, and for tuning batch
    /// sizes and prompt share
    #[arg(long = "for", value_name = "USE")]
    pub(crate) preset: Option<Preset>,
    /// Memory in MB for the model and its key-value cache, and where that leaves some, for second copies of weights, each
    /// for other batch sizes [default: what --for says, or else no limit, and nothing new takes a second copy]
    #[arg(long, value_name = "MB")]
    pub(crate) memory_limit: Option<u64>,
}

/// What is tuned for.
#[derive(Debug, Args)]
pub(crate) struct Purpose {
    #[command(flatten)]
    pub(crate) room: Room,
    /// Prompt tokens among all tokens, from 0 to 1 [default: 0.33, or what --for says]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    pub(crate) prompt_share: Option<f64>,
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

const MB: u64 = 1_000_000;

impl Room {
    /// Threads: as many as were asked for, or as the preset says and the process may use, or all of these.
    pub(crate) fn threads(&self, asked: &Threads) -> usize {
        let available = available_threads();
        let preset = || self.preset.map_or(available, |preset| preset.threads().min(available));
        asked.threads.map_or_else(preset, usize::from)
    }

    /// The limit in bytes.
    fn limit(&self) -> Option<u64> {
        self.memory_limit.or(self.preset.map(Preset::memory_mb)).map(|mb| mb.saturating_mul(MB))
    }

    /// Bytes that are left for second copies of weights, if there is a limit.
    pub(crate) fn second_copies(&self, config: &ModelConfig) -> Option<u64> {
        let needed = resident_bytes(config).saturating_add(KvType::F16.bytes(config, config.context.min(CONTEXT)));
        self.limit().map(|limit| limit.saturating_sub(needed))
    }

    /// The context to run with: what was asked for, if it fits the memory limit, or else as much as the model has and the
    /// limit holds beside it, up to 4096 tokens.
    ///
    /// # Errors
    /// If the model, or the context that was asked for, needs more memory than the limit.
    pub(crate) fn context(&self, config: &ModelConfig, kv: KvType, asked: Option<usize>) -> Result<Option<usize>> {
        let Some(limit) = self.limit() else { return Ok(asked) };
        let model = resident_bytes(config);
        let fits = kv.positions(config, limit.saturating_sub(model));
        let needs = |what: String, bytes: u64| {
            let (bytes, limit) = (bytes.div_ceil(MB), limit / MB);
            UsageError(format!(
                "{what} needs {bytes} MB, more than the limit of {limit} MB: give a larger --memory-limit"
            ))
        };
        if fits == 0 {
            return Err(needs("the model".to_owned(), model.saturating_add(kv.bytes(config, 1))).into());
        }
        if let Some(asked) = asked.filter(|asked| *asked > fits) {
            let bytes = model.saturating_add(kv.bytes(config, asked));
            let what = format!("the model with a context of {asked} tokens");
            return Err(UsageError(format!("{}, or -c {fits}", needs(what, bytes))).into());
        }
        Ok(asked.or(Some(config.context.min(CONTEXT).min(fits))))
    }
}

impl Purpose {
    pub(crate) fn workload(&self) -> Workload {
        let usual = Workload::default();
        let preset = self.room.preset;
        Workload {
            prompt_share: self.prompt_share.or(preset.map(Preset::prompt_share)).unwrap_or(usual.prompt_share),
            batch: preset.map_or(usual.batch, Preset::batch),
        }
    }

    /// The batch size to serve with, and why.
    pub(crate) fn recommendation(&self, config: &ModelConfig, speeds: &[(Class, f64)]) -> String {
        let limit = self.room.limit();
        let batch = self.workload().batch;
        let (model, sequence) = (resident_bytes(config), KvType::F16.bytes(config, config.context.min(CONTEXT)));
        let room = limit.map(|limit| limit.saturating_sub(model) / sequence.max(1));
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
                limit / MB,
                model / MB
            ),
            Some(limit) if model.saturating_add(sequence) > limit => {
                format!("; the model needs {} MB, more than {}", (model + sequence).div_ceil(MB), limit / MB)
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

/// Bytes that a running model takes, its key-value cache apart: what is in the file, the head once more for its
/// screen, at most a byte an element, and for a relu² model the up- and down-projections once more as records.
fn resident_bytes(config: &ModelConfig) -> u64 {
    let screen = if config.pooling.is_none() { config.vocabulary.saturating_mul(config.hidden) } else { 0 };
    let record = Layout::Rows { rows: 1, chunk: 64 }.bytes(1, config.hidden).unwrap_or(usize::MAX);
    let records = if config.activation == Activation::Relu2 {
        record.saturating_mul(2).saturating_mul(config.ffn).saturating_mul(config.layers)
    } else {
        0
    };
    model_bytes(config).saturating_add(screen as u64).saturating_add(records as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_runtime::formats::synth::Recipe;

    fn context(mb: u64, kv: KvType, asked: Option<usize>) -> Result<Option<usize>, String> {
        let config = Recipe::preset("2b4t").unwrap().config;
        let room = Room { preset: None, memory_limit: Some(mb) };
        room.context(&config, kv, asked).map_err(|error| error.to_string())
    }

    #[test]
    fn a_context_fits_the_memory_that_the_model_leaves() {
        assert_eq!(context(100_000, KvType::F16, None), Ok(Some(4096)));
        assert_eq!(context(100_000, KvType::F16, Some(77)), Ok(Some(77)));
        let config = Recipe::preset("2b4t").unwrap().config;
        let mb = resident_bytes(&config).div_ceil(MB) + 40;
        let few = context(mb, KvType::F16, None).unwrap().unwrap();
        assert!((400..600).contains(&few), "{few} tokens in 40 MB");
        let more = context(mb, KvType::Int8, None).unwrap().unwrap();
        assert!(more > few && context(mb, KvType::F32, None).unwrap().unwrap() < few);
        let refused = context(mb, KvType::F16, Some(few + 20)).unwrap_err();
        assert!(refused.contains("--memory-limit, or -c"), "{refused}");
        assert!(context(512, KvType::F16, None).unwrap_err().starts_with("the model needs"));
    }

    #[test]
    fn without_a_limit_nothing_is_limited_and_a_preset_has_one() {
        let config = Recipe::preset("2b4t").unwrap().config;
        assert_eq!(Room::default().context(&config, KvType::F16, Some(9)).unwrap(), Some(9));
        assert_eq!(Room::default().second_copies(&config), None);
        let mobile = Room { preset: Some(Preset::Mobile), memory_limit: None };
        assert!(mobile.context(&config, KvType::F16, None).is_err());
        assert_eq!(mobile.second_copies(&config), Some(0));
        let cloud = Room { preset: Some(Preset::Cloud), memory_limit: None };
        assert!(cloud.second_copies(&config) > Some(1_000_000_000));
        assert!(mobile.threads(&Threads { threads: None }) <= 2);
    }
}
