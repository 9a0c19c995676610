//! How a server is laid out: threads, texts at once, context and caches, from what the machine has and what it is for.

use std::fmt;

use ternion_runtime::formats::ModelConfig;
use ternion_runtime::model::KvType;
use ternion_runtime::team::available_threads;
use ternion_tuner::CpuProfile;

use crate::purpose::{Preset, model_bytes};

/// Part of the free memory that keys and values may take, unless a limit is given: other programs want some too.
const SHARE: u64 = 2;

/// What the user has decided.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wishes {
    pub(crate) preset: Option<Preset>,
    pub(crate) threads: Option<usize>,
    pub(crate) parallel: Option<usize>,
    pub(crate) context: Option<usize>,
    /// Bytes.
    pub(crate) prefix_cache: Option<u64>,
    /// Bytes for everything.
    pub(crate) memory: Option<u64>,
    /// Tokens that a request may have, read and generated.
    pub(crate) request: usize,
}

/// A value and why it was chosen.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chosen {
    pub(crate) value: usize,
    pub(crate) reason: String,
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.value, self.reason)
    }
}

/// How one model is served.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    pub(crate) parallel: Chosen,
    pub(crate) context: Chosen,
    /// In MB.
    pub(crate) prefix_cache: Chosen,
}

/// A user's own choice, or what `choose` says.
fn or(asked: Option<usize>, choose: impl FnOnce() -> Chosen) -> Chosen {
    asked.map_or_else(choose, |value| Chosen { value, reason: "as asked".to_owned() })
}

/// What a machine is good for.
pub(crate) fn preset(wishes: &Wishes, machine: &CpuProfile) -> (Preset, String) {
    if let Some(preset) = wishes.preset {
        return (preset, "as asked".to_owned());
    }
    let threads = wishes.threads.unwrap_or_else(available_threads);
    let gigabytes = machine.memory.available.map_or(0.0, |bytes| bytes as f64 / 1e9);
    let preset = match (threads, gigabytes) {
        (_, ..1.0) => Preset::Mobile,
        (_, ..3.0) => Preset::Edge,
        (..16, _) => Preset::Server,
        _ => Preset::Cloud,
    };
    (preset, format!("{threads} threads and {gigabytes:.1} GB of free memory"))
}

/// Threads for all models together.
pub(crate) fn threads(wishes: &Wishes) -> Chosen {
    let available = available_threads();
    or(wishes.threads, || match wishes.preset {
        Some(preset) if preset.threads() < available => {
            Chosen { value: preset.threads(), reason: format!("for {}", preset.name()) }
        }
        _ => Chosen { value: available, reason: "all processors that this process may use".to_owned() },
    })
}

/// How a model is served on a machine that also has to hold `models` models.
pub(crate) fn plan(wishes: &Wishes, config: &ModelConfig, kv: KvType, machine: &CpuProfile, models: usize) -> Plan {
    let (preset, _) = preset(wishes, machine);
    let context = or(wishes.context, || {
        let wanted = wishes.request.min(preset.serving_context());
        if config.context <= wanted {
            Chosen { value: config.context, reason: "the model's own".to_owned() }
        } else {
            Chosen { value: wanted, reason: format!("requests of up to that, for {}", preset.name()) }
        }
    });
    let limit = wishes.memory.or(wishes.preset.map(|preset| preset.memory_mb() * 1_000_000));
    let free = machine.memory.available.unwrap_or(1 << 30);
    let room = match limit {
        Some(limit) => limit.saturating_sub(model_bytes(config)),
        None => free.saturating_sub(model_bytes(config)) / SHARE,
    } / models.max(1) as u64;
    let each = kv.bytes(config, context.value).max(1);
    let megabytes = |bytes: u64| bytes.div_ceil(1_000_000);
    let parallel = or(wishes.parallel, || {
        let fit = usize::try_from(room / each).unwrap_or(usize::MAX).max(1);
        let texts = format!("texts of {} tokens, {} MB each", context.value, megabytes(each));
        if fit < preset.batch() {
            Chosen { value: fit, reason: format!("{texts}: {} MB hold no more", megabytes(room)) }
        } else {
            Chosen { value: preset.batch(), reason: format!("{texts}, for {}", preset.name()) }
        }
    });
    let prefix_cache =
        or(wishes.prefix_cache.map(|bytes| usize::try_from(bytes / 1_000_000).unwrap_or(usize::MAX)), || {
            let taken = each.saturating_mul(parallel.value as u64);
            // As much as the running texts take, if there is room.
            let value = room.saturating_sub(taken).min(taken) / 1_000_000;
            let reason = "MB for texts that may be gone on with, of what the running ones leave".to_owned();
            Chosen { value: usize::try_from(value).unwrap_or(usize::MAX), reason }
        });
    Plan { parallel, context, prefix_cache }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_runtime::formats::synth::Recipe;
    use ternion_tuner::probe;

    fn machine(gigabytes: u64) -> CpuProfile {
        let mut machine = probe();
        machine.memory.available = Some(gigabytes * 1_000_000_000);
        machine
    }

    fn config() -> ModelConfig {
        Recipe::preset("2B4T").expect("a published shape").config
    }

    #[test]
    fn a_large_machine_serves_many_and_a_small_one_what_fits() {
        let wishes = Wishes { request: 5120, threads: Some(8), ..Wishes::default() };
        let large = plan(&wishes, &config(), KvType::F16, &machine(64), 1);
        assert_eq!((large.parallel.value, large.context.value), (8, 4096));
        let small = plan(&wishes, &config(), KvType::F16, &machine(4), 1);
        assert!((1..8).contains(&small.parallel.value), "{small:?}");
        let eight_bits = plan(&wishes, &config(), KvType::Int8, &machine(4), 1);
        assert!(eight_bits.parallel.value > small.parallel.value, "{eight_bits:?}");
        let shared = plan(&wishes, &config(), KvType::F16, &machine(4), 2);
        assert!(shared.parallel.value < small.parallel.value, "{shared:?}");
    }

    #[test]
    fn what_is_asked_for_is_done() {
        let wishes = Wishes {
            request: 5120,
            preset: Some(Preset::Mobile),
            parallel: Some(3),
            context: Some(77),
            prefix_cache: Some(5_000_000),
            ..Wishes::default()
        };
        let plan = plan(&wishes, &config(), KvType::F16, &machine(4), 1);
        assert_eq!((plan.parallel.value, plan.context.value, plan.prefix_cache.value), (3, 77, 5));
        assert!(threads(&wishes).value <= 2);
        assert_eq!(preset(&Wishes::default(), &machine(0)).0, Preset::Mobile);
    }
}
