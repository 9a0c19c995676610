//! What this machine is: the CPU's name and features, its caches, the cores this process may use, memory and pages.
//!
//! Nothing here is measured and nothing fails: what a system does not tell is `None` or an empty list.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::linux::Linux;

/// The machine as this process sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuProfile {
    /// Instruction set: `x86_64` or `aarch64`.
    pub architecture: String,
    /// Vendor as the CPU spells it: `AuthenticAMD`; on ARM the implementer's number.
    pub vendor: String,
    /// Marketing name, or empty.
    pub brand: String,
    /// Family number (on ARM: the variant).
    pub family: Option<u32>,
    /// Model number (on ARM: the part).
    pub model: Option<u32>,
    /// Stepping (on ARM: the revision).
    pub stepping: Option<u32>,
    /// Vector and bit features that CPU and system both support, in a fixed order.
    pub features: Vec<String>,
    /// Data and unified caches, by level.
    pub caches: Vec<Cache>,
    /// Cores.
    pub cores: Cores,
    /// Main memory.
    pub memory: Memory,
    /// Huge pages.
    pub huge_pages: HugePages,
}

/// One kind of cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// 1, 2, 3.
    pub level: u8,
    /// Bytes of one such cache.
    pub bytes: u64,
    /// Logical CPUs that share one.
    pub shared_by: usize,
    /// How many such caches the CPUs of this process have.
    pub instances: usize,
}

/// The cores of the machine and of this process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cores {
    /// Logical CPUs that are switched on.
    pub online: usize,
    /// Logical CPUs that this process may run on.
    pub allowed: usize,
    /// Physical cores that those lie on.
    pub physical: Option<usize>,
    /// CPUs' worth of time that the control group grants, if it limits them.
    pub quota: Option<f64>,
    /// Threads that make sense here: affinity and quota respected, at least 1.
    pub available: usize,
}

/// Main memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All of it.
    pub total: Option<u64>,
    /// What can still be had without swapping, limits of the control group respected.
    pub available: Option<u64>,
    /// Size of an ordinary page.
    pub page: Option<u64>,
}

/// Huge pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    /// Transparent huge pages: `always`, `madvise` or `never`.
    pub transparent: Option<String>,
    /// Bytes of a reserved huge page.
    pub page: Option<u64>,
    /// Reserved huge pages.
    pub total: Option<u64>,
    /// Reserved huge pages that are free.
    pub free: Option<u64>,
}

/// Looks at this machine. Takes about a millisecond.
#[must_use]
pub fn probe() -> CpuProfile {
    let linux = Linux::host();
    let identity = identity(&linux);
    CpuProfile {
        architecture: std::env::consts::ARCH.to_owned(),
        vendor: identity.vendor,
        brand: identity.brand,
        family: identity.family,
        model: identity.model,
        stepping: identity.stepping,
        features: features(),
        caches: caches(&linux),
        cores: cores(&linux),
        memory: Memory {
            total: linux.meminfo("MemTotal"),
            available: linux.available_memory(),
            page: linux.page_bytes(),
        },
        huge_pages: HugePages {
            transparent: linux.transparent_huge_pages(),
            page: linux.meminfo("Hugepagesize"),
            total: linux.meminfo("HugePages_Total"),
            free: linux.meminfo("HugePages_Free"),
        },
    }
}

impl CpuProfile {
    /// One line that names the CPU, the same on every run: what a machine profile is keyed by.
    #[must_use]
    pub fn signature(&self) -> String {
        let number = |number: Option<u32>| number.map_or("?".to_owned(), |number| number.to_string());
        format!(
            "{} {} family {} model {} stepping {} {}",
            self.architecture,
            self.vendor,
            number(self.family),
            number(self.model),
            number(self.stepping),
            self.brand
        )
        .trim_end()
        .to_owned()
    }

    /// The data or unified cache of a level.
    #[must_use]
    pub fn cache(&self, level: u8) -> Option<Cache> {
        self.caches.iter().copied().find(|cache| cache.level == level)
    }

    /// Bytes of last-level cache that the CPUs of this process can fill together; 32 MiB if the system does not say.
    #[must_use]
    pub fn last_level_bytes(&self) -> u64 {
        let last = self.caches.iter().max_by_key(|cache| cache.level);
        last.map_or(32 << 20, |cache| cache.bytes.saturating_mul(cache.instances as u64))
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{} {} KiB", self.level, self.bytes >> 10)?;
        match self.shared_by {
            0 | 1 => write!(f, ", one per CPU")?,
            shared => write!(f, ", shared by {shared} CPUs")?,
        }
        write!(f, ", {} in use", self.instances)
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} usable of {} online", self.available, self.online)?;
        if let Some(physical) = self.physical.filter(|physical| *physical != self.allowed) {
            write!(f, ", on {physical} physical cores")?;
        }
        if self.allowed < self.online {
            write!(f, ", affinity allows {}", self.allowed)?;
        }
        match self.quota {
            Some(quota) => write!(f, ", control group grants {quota:.2}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "transparent: {}", self.transparent.as_deref().unwrap_or("unknown"))?;
        match (self.total, self.free) {
            (Some(total), Some(free)) => write!(f, ", reserved: {total}, free: {free}"),
            _ => Ok(()),
        }
    }
}

/// Who made this CPU and which one it is.
#[derive(Default)]
struct Identity {
    vendor: String,
    brand: String,
    family: Option<u32>,
    model: Option<u32>,
    stepping: Option<u32>,
}

#[cfg(target_arch = "x86_64")]
fn identity(_: &Linux) -> Identity {
    let cpuid = raw_cpuid::CpuId::new();
    let info = cpuid.get_feature_info();
    Identity {
        vendor: cpuid.get_vendor_info().map(|vendor| vendor.as_str().to_owned()).unwrap_or_default(),
        brand: cpuid.get_processor_brand_string().map(|brand| brand.as_str().trim().to_owned()).unwrap_or_default(),
        family: info.as_ref().map(|info| info.family_id().into()),
        model: info.as_ref().map(|info| info.model_id().into()),
        stepping: info.as_ref().map(|info| info.stepping_id().into()),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn identity(linux: &Linux) -> Identity {
    let number = |name: &str| {
        let text = linux.cpuinfo(name)?;
        match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        }
    };
    Identity {
        vendor: linux.cpuinfo("CPU implementer").unwrap_or_default(),
        brand: linux.cpuinfo("model name").unwrap_or_default(),
        family: number("CPU variant"),
        model: number("CPU part"),
        stepping: number("CPU revision"),
    }
}

/// The names in `$name` that `$detected` finds.
macro_rules! detected {
    ($detected:path: $($name:tt)*) => {{
        use $detected as has_feature;
        [$(($name, has_feature!($name))),*].into_iter().filter(|(_, has)| *has).map(|(name, _)| name.to_owned()).collect()
    }};
}

/// The standard library's detection asks the CPU and whether the system saves the wide registers.
#[cfg(target_arch = "x86_64")]
fn features() -> Vec<String> {
    detected!(std::is_x86_feature_detected:
        "sse2" "sse3" "ssse3" "sse4.1" "sse4.2" "popcnt" "avx" "f16c" "fma" "bmi1" "bmi2" "lzcnt" "avx2" "avxvnni"
        "avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl" "avx512ifma" "avx512vbmi" "avx512vbmi2" "avx512vnni"
        "avx512bitalg" "avx512vpopcntdq" "avx512bf16" "gfni" "vaes" "vpclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<String> {
    detected!(std::arch::is_aarch64_feature_detected:
        "neon" "fp16" "dotprod" "i8mm" "bf16" "sve" "sve2")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<String> {
    Vec::new()
}

fn cores(linux: &Linux) -> Cores {
    // Respects affinity and quota on the systems that have them, but rounds a quota of 1.5 down; so do we.
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let allowed = linux.allowed_cpus();
    Cores {
        online: linux.online_cpus().map_or(available, |cpus| cpus.len()),
        physical: allowed.as_ref().and_then(|cpus| linux.physical_cores(cpus)),
        allowed: allowed.map_or(available, |cpus| cpus.len()),
        quota: linux.cpu_quota(),
        available,
    }
}

fn caches(linux: &Linux) -> Vec<Cache> {
    let mut caches: Vec<Cache> = Vec::new();
    let allowed = linux.allowed_cpus().unwrap_or_default();
    for found in linux.caches(&allowed).into_iter().filter(|cache| cache.kind != "Instruction") {
        match caches.iter_mut().find(|cache| cache.level == found.level) {
            // Unequal cores: the largest cache of a level describes it.
            Some(cache) => {
                cache.instances += 1;
                if found.bytes > cache.bytes {
                    (cache.bytes, cache.shared_by) = (found.bytes, found.cpus.len());
                }
            }
            None => {
                caches.push(Cache { level: found.level, bytes: found.bytes, shared_by: found.cpus.len(), instances: 1 })
            }
        }
    }
    if caches.is_empty() { caches_of_cpu() } else { caches }
}

/// The caches as the CPU itself describes them, where no system does.
#[cfg(target_arch = "x86_64")]
fn caches_of_cpu() -> Vec<Cache> {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let Some(caches) = raw_cpuid::CpuId::new().get_cache_parameters() else { return Vec::new() };
    let data =
        caches.filter(|cache| matches!(cache.cache_type(), raw_cpuid::CacheType::Data | raw_cpuid::CacheType::Unified));
    data.map(|cache| {
        let ways = cache.associativity() as u64 * cache.physical_line_partitions() as u64;
        let shared_by = cache.max_cores_for_cache().max(1);
        Cache {
            level: cache.level(),
            bytes: ways * cache.coherency_line_size() as u64 * cache.sets() as u64,
            shared_by,
            instances: available.div_ceil(shared_by),
        }
    })
    .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn caches_of_cpu() -> Vec<Cache> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_twice_gives_the_same_signature_and_at_least_one_core() {
        let (first, second) = (probe(), probe());
        assert_eq!(first.signature(), second.signature());
        assert!(first.signature().starts_with(std::env::consts::ARCH));
        assert!(first.cores.available >= 1);
        assert!(first.last_level_bytes() > 0);
    }

    #[test]
    fn a_profile_survives_json() {
        let profile = probe();
        let text = serde_json::to_string(&profile).unwrap();
        assert_eq!(serde_json::from_str::<CpuProfile>(&text).unwrap(), profile);
    }

    #[test]
    fn the_parts_print_to_one_line_each() {
        let cache = Cache { level: 3, bytes: 32 << 20, shared_by: 2, instances: 1 };
        assert_eq!(cache.to_string(), "L3 32768 KiB, shared by 2 CPUs, 1 in use");
        let cores = Cores { online: 8, allowed: 4, physical: Some(2), quota: Some(1.5), available: 1 };
        let text = "1 usable of 8 online, on 2 physical cores, affinity allows 4, control group grants 1.50";
        assert_eq!(cores.to_string(), text);
        let pages = HugePages { transparent: Some("madvise".into()), page: None, total: Some(0), free: Some(0) };
        assert_eq!(pages.to_string(), "transparent: madvise, reserved: 0, free: 0");
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_x86_64_has_sse2_and_a_vendor() {
        let profile = probe();
        assert!(profile.features.contains(&"sse2".to_owned()));
        assert!(!profile.vendor.is_empty());
    }
}
