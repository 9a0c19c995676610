//! What a CPU can do, as a value: emitters and schedules ask it, tests lower it, nothing else detects features.

use std::fmt;
use std::str::FromStr;

/// An instruction set that ternion emits code for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 64-bit ARM.
    Aarch64,
}

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $arch:ident, $setting:expr;)*) => {
        /// An optional instruction set extension.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Feature { $($(#[$doc])* $name,)* }

        impl Feature {
            /// All that ternion makes use of, weaker ones first.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name that `/proc/cpuinfo` and Rust use.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The architecture that has it.
            #[must_use]
            pub const fn arch(self) -> Arch {
                match self { $(Self::$name => Arch::$arch,)* }
            }

            /// Cranelift's setting for it, if Cranelift knows it.
            pub(crate) const fn cranelift_setting(self) -> Option<&'static str> {
                match self { $(Self::$name => $setting,)* }
            }
        }
    };
}

features! {
    /// Horizontal adds of SSE3.
    Sse3 = "sse3", X86_64, Some("has_sse3");
    /// Byte shuffles (`pshufb`) and byte multiply-add (`pmaddubsw`).
    Ssse3 = "ssse3", X86_64, Some("has_ssse3");
    /// Widening loads and moves.
    Sse41 = "sse4.1", X86_64, Some("has_sse41");
    /// SSE4.2.
    Sse42 = "sse4.2", X86_64, Some("has_sse42");
    /// Three-operand vector instructions.
    Avx = "avx", X86_64, Some("has_avx");
    /// 256-bit integer vectors.
    Avx2 = "avx2", X86_64, Some("has_avx2");
    /// Fused multiply-add.
    Fma = "fma", X86_64, Some("has_fma");
    /// 512-bit vectors.
    Avx512f = "avx512f", X86_64, Some("has_avx512f");
    /// 512-bit instructions on doublewords.
    Avx512dq = "avx512dq", X86_64, Some("has_avx512dq");
    /// 512-bit instructions on bytes and words.
    Avx512bw = "avx512bw", X86_64, None;
    /// AVX-512 instructions on shorter vectors.
    Avx512vl = "avx512vl", X86_64, Some("has_avx512vl");
    /// Byte permutations across a 512-bit vector.
    Avx512vbmi = "avx512vbmi", X86_64, Some("has_avx512vbmi");
    /// Four-way byte dot product, AVX-512 encoding.
    Avx512vnni = "avx512vnni", X86_64, Some("has_avx512vnni");
    /// Four-way byte dot product, VEX encoding.
    AvxVnni = "avxvnni", X86_64, Some("has_avx_vnni");
    /// Four-way byte dot product (`sdot`).
    DotProd = "dotprod", Aarch64, Some("has_dotprod");
}

/// A CPU: its architecture and the features that may be used.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cpu {
    arch: Arch,
    features: u32,
}

impl Cpu {
    /// An architecture without optional features.
    #[must_use]
    pub const fn baseline(arch: Arch) -> Self {
        Self { arch, features: 0 }
    }

    /// The CPU that this program runs on; `None` if ternion emits no code for it.
    #[must_use]
    pub fn host() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! detect {
                ($($name:tt => $feature:ident),* $(,)?) => {{
                    let mut cpu = Self::baseline(Arch::X86_64);
                    $(if std::is_x86_feature_detected!($name) { cpu = cpu.with(Feature::$feature); })*
                    Some(cpu)
                }};
            }
            detect!(
                "sse3" => Sse3, "ssse3" => Ssse3, "sse4.1" => Sse41, "sse4.2" => Sse42, "avx" => Avx, "avx2" => Avx2,
                "fma" => Fma, "avx512f" => Avx512f, "avx512dq" => Avx512dq, "avx512bw" => Avx512bw,
                "avx512vl" => Avx512vl, "avx512vbmi" => Avx512vbmi, "avx512vnni" => Avx512vnni, "avxvnni" => AvxVnni,
            )
        }
        #[cfg(target_arch = "aarch64")]
        {
            let cpu = Self::baseline(Arch::Aarch64);
            Some(if std::arch::is_aarch64_feature_detected!("dotprod") { cpu.with(Feature::DotProd) } else { cpu })
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        None
    }

    /// The architecture.
    #[must_use]
    pub const fn arch(self) -> Arch {
        self.arch
    }

    /// Whether `feature` may be used.
    #[must_use]
    pub const fn has(self, feature: Feature) -> bool {
        self.features >> feature as u32 & 1 != 0
    }

    /// The same CPU with `feature`; a feature of another architecture changes nothing.
    #[must_use]
    pub fn with(mut self, feature: Feature) -> Self {
        if feature.arch() == self.arch {
            self.features |= 1 << feature as u32;
        }
        self
    }

    /// The same CPU without `feature`.
    #[must_use]
    pub const fn without(mut self, feature: Feature) -> Self {
        self.features &= !(1 << feature as u32);
        self
    }

    /// The features that may be used.
    pub fn features(self) -> impl Iterator<Item = Feature> {
        Feature::ALL.iter().copied().filter(move |feature| self.has(*feature))
    }

    /// Whether a four-way dot product of unsigned and signed bytes exists at 128 bits.
    #[must_use]
    pub const fn has_dot(self) -> bool {
        match self.arch {
            Arch::X86_64 => self.has(Feature::AvxVnni) || self.has(Feature::Avx512vnni) && self.has(Feature::Avx512vl),
            Arch::Aarch64 => self.has(Feature::DotProd),
        }
    }

    /// Whether a 16-byte table can be looked up by a vector of indices.
    #[must_use]
    pub const fn has_table_lookup(self) -> bool {
        match self.arch {
            Arch::X86_64 => self.has(Feature::Ssse3),
            Arch::Aarch64 => true,
        }
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.arch {
            Arch::X86_64 => "x86-64",
            Arch::Aarch64 => "aarch64",
        })?;
        self.features().try_for_each(|feature| write!(f, " +{}", feature.name()))
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpu({self})")
    }
}

/// A text that describes no CPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` in a CPU description: expected x86-64 or aarch64, then features such as +avx2")]
pub struct ParseCpuError(String);

impl FromStr for Cpu {
    type Err = ParseCpuError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split_whitespace();
        let mut cpu = match words.next() {
            Some("x86-64") => Self::baseline(Arch::X86_64),
            Some("aarch64") => Self::baseline(Arch::Aarch64),
            other => return Err(ParseCpuError(other.unwrap_or_default().to_owned())),
        };
        for word in words {
            let feature = word
                .strip_prefix('+')
                .and_then(|name| Feature::ALL.iter().find(|f| f.name() == name && f.arch() == cpu.arch))
                .ok_or_else(|| ParseCpuError(word.to_owned()))?;
            cpu = cpu.with(*feature);
        }
        Ok(cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_prints_and_parses_back() {
        let host = Cpu::host().expect("tests run where ternion emits code");
        assert_eq!(host.to_string().parse(), Ok(host));
    }

    #[test]
    fn features_can_be_taken_away_and_belong_to_their_architecture() {
        let cpu: Cpu = "x86-64 +ssse3 +avx2".parse().unwrap();
        assert!(cpu.has(Feature::Avx2) && !cpu.without(Feature::Avx2).has(Feature::Avx2));
        assert!(!cpu.with(Feature::DotProd).has(Feature::DotProd));
        for text in ["", "mips", "x86-64 avx2", "x86-64 +dotprod", "x86-64 +warp"] {
            assert!(text.parse::<Cpu>().is_err(), "{text}");
        }
    }
}
