//! How a kernel computes it, as a value; and the one place that knows what is legal.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::activations::ActivationFormat;
use crate::machine::wide;
use crate::{Arch, Columns, Cpu, Family, Feature, KernelSpec, Layout, RecordList, emit};

/// The machine under the emitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MachineKind {
    /// Cranelift's 128-bit vectors: runs everywhere.
    Clif128,
    /// 256-bit vectors of AVX2.
    Avx2,
    /// 512-bit vectors of AVX-512 (F, BW, DQ and VL).
    Avx512,
}

impl MachineKind {
    /// All machines.
    pub const ALL: [Self; 3] = [Self::Clif128, Self::Avx2, Self::Avx512];

    /// Bytes of a vector.
    #[must_use]
    pub const fn vector_bytes(self) -> usize {
        match self {
            Self::Clif128 => 16,
            Self::Avx2 => 32,
            Self::Avx512 => 64,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Clif128 => "clif128",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The features without which it runs nothing.
    const fn features(self) -> &'static [Feature] {
        match self {
            Self::Clif128 => &[],
            Self::Avx2 => &[Feature::Avx2],
            Self::Avx512 => &[Feature::Avx512f, Feature::Avx512bw, Feature::Avx512dq, Feature::Avx512vl],
        }
    }

    /// Whether it runs on `cpu` at all.
    pub(crate) fn check(self, cpu: &Cpu) -> Result<(), ScheduleError> {
        let missing = self.features().iter().find(|feature| !cpu.has(**feature));
        missing.map_or(Ok(()), |missing| {
            let (what, needs) = (self.name(), missing.name());
            Err(ScheduleError::MissingFeature { what, needs, cpu: *cpu })
        })
    }
}

impl fmt::Display for MachineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for MachineKind {
    type Err = ParseScheduleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|machine| machine.name() == text);
        known.ok_or_else(|| ParseScheduleError(format!("machine `{text}`: expected clif128, avx2 or avx512")))
    }
}

/// The instruction that multiplies and adds bytes in [`Family::Mad`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Multiply {
    /// Pairs of bytes to 16-bit sums (`pmaddubsw` or its equivalent), widened to 32 bits in time.
    Pairs,
    /// Four bytes to 32-bit sums at once (`vpdpbusd`, `sdot`).
    Dot,
}

/// How a kernel is built. Prints to one line and parses back, for example
/// `mad/clif128 layout=rows4x64 multiply=pairs unroll=1 ntile=1`.
///
/// Any value may be built; [`check`](Self::check) says whether it is legal for a spec on a CPU, and nothing is emitted
/// without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Schedule {
    /// The idea.
    pub family: Family,
    /// What emits it.
    pub machine: MachineKind,
    /// The order of the weights in memory; its tile is the number of rows in flight.
    pub layout: Layout,
    /// The multiplication of `mad`; [`Multiply::Pairs`] where nothing is multiplied.
    pub multiply: Multiply,
    /// Steps per loop iteration: chunks or groups of a row for `mad`, bytes of a row for `tl1` and `vlut`, blocks of 24
    /// weights for `tl2`.
    pub unroll: u8,
    /// Columns that share one pass over a tile; the 16-bit lanes of a vector for `vlut`.
    pub ntile: u8,
    /// How far ahead of the weights in use the cache is asked for more: in bytes, or in places of the list for families
    /// that read one; 0 for not at all.
    pub prefetch: u16,
}

/// The most columns that may share a pass over a tile.
const MAX_NTILE: u8 = 32;

/// Largest sum of the products of `vectors` vectors of codes, each a `pmaddubsw` pair of code ≤ 2 and |activation| ≤ 127.
const fn pairs_bound(vectors: usize) -> usize {
    vectors * 2 * 2 * 127
}

/// Why a schedule cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// The row is empty or too long.
    #[error("k={0}: rows of 1 to {max} weights can be compiled", max = KernelSpec::MAX_K)]
    RowLength(usize),
    /// The family cannot read the layout.
    #[error("{family} cannot read layout {layout}: it needs {needs}")]
    Layout {
        /// The family.
        family: Family,
        /// The layout that was asked for.
        layout: Layout,
        /// What it reads.
        needs: &'static str,
    },
    /// The CPU lacks an instruction.
    #[error("{what} needs {needs}, which this CPU ({cpu}) lacks")]
    MissingFeature {
        /// What needs it.
        what: &'static str,
        /// The feature.
        needs: &'static str,
        /// The CPU.
        cpu: Cpu,
    },
    /// A parameter is outside its range.
    #[error("{name}={value}: expected {expected}")]
    Parameter {
        /// Name of the parameter.
        name: &'static str,
        /// Its value.
        value: usize,
        /// What is allowed.
        expected: &'static str,
    },
    /// The family computes something else.
    #[error("{family} does not compute {spec}: {expected}")]
    Spec {
        /// The family.
        family: Family,
        /// What was to be computed.
        spec: KernelSpec,
        /// What it computes.
        expected: &'static str,
    },
    /// The layout is narrower than the machine's vectors.
    #[error("layout {layout} under {machine}: {bytes} bytes of it must fill whole vectors of {vector_bytes} bytes")]
    VectorWidth {
        /// The layout.
        layout: Layout,
        /// The machine.
        machine: MachineKind,
        /// Bytes that lie together in the layout.
        bytes: usize,
        /// Bytes of a vector.
        vector_bytes: usize,
    },
    /// The kernel keeps more values at hand than the machine has registers.
    #[error(
        "{machine} has {available} {kind} registers, this schedule needs {needed}: lower ntile or the rows of a tile"
    )]
    Registers {
        /// The machine.
        machine: MachineKind,
        /// `vector` or `general-purpose`.
        kind: &'static str,
        /// Registers that are in use at once.
        needed: usize,
        /// Registers that there are.
        available: usize,
    },
    /// 16-bit sums could overflow.
    #[error(
        "{vectors} vectors between flushes sum to up to {bound}, more than 16 bits hold (32767): lower unroll or the chunk"
    )]
    Overflow {
        /// Vectors summed before they are widened.
        vectors: usize,
        /// Largest possible sum.
        bound: usize,
    },
}

impl Schedule {
    /// Whether this schedule computes `spec` correctly on `cpu`.
    ///
    /// # Errors
    /// The first reason why not.
    pub fn check(&self, spec: &KernelSpec, cpu: &Cpu) -> Result<(), ScheduleError> {
        if spec.k == 0 || spec.k > KernelSpec::MAX_K {
            return Err(ScheduleError::RowLength(spec.k));
        }
        self.check_machine(cpu)?;
        let parameter =
            |name, value: u8, expected| Err(ScheduleError::Parameter { name, value: value.into(), expected });
        if self.family.list() != Some(spec.columns).filter(|columns| columns.are_listed()) {
            let expected = match self.family.list() {
                None => "it reads no list",
                Some(Columns::ListedRows) => "it needs rows=listed",
                Some(_) => "it needs columns=listed",
            };
            return Err(ScheduleError::Spec { family: self.family, spec: *spec, expected });
        }
        match (spec.columns, self.ntile) {
            (Columns::Many, 1..=MAX_NTILE) | (_, 1) => {}
            (Columns::One | Columns::ListedRows | Columns::ListedColumns, ntile) => {
                return parameter("ntile", ntile, "1 for n=1");
            }
            (Columns::Many, ntile) => return parameter("ntile", ntile, "1 to 32"),
        }
        if self.prefetch != 0 && !self.family.rules().prefetches() {
            let expected = "0: this family does not prefetch";
            return Err(ScheduleError::Parameter { name: "prefetch", value: self.prefetch.into(), expected });
        }
        if self.multiply != Multiply::Pairs && !self.family.multiplies() {
            return parameter("multiply", self.multiply as u8, "none: this family does not multiply");
        }
        self.family.rules().check(self, cpu)?;
        self.check_registers(spec, cpu)
    }

    /// Whether the machine runs on `cpu` and can do what every family asks of it.
    fn check_machine(&self, cpu: &Cpu) -> Result<(), ScheduleError> {
        self.machine.check(cpu)?;
        let expected = match self.machine {
            MachineKind::Clif128 if self.prefetch != 0 => "0: clif128 cannot prefetch",
            _ if self.family.list().is_some() && usize::from(self.prefetch) > RecordList::LOOK_AHEAD => {
                "at most 64 places of the list"
            }
            _ if self.family.list().is_none() && !self.prefetch.is_multiple_of(64) => "a multiple of 64 bytes",
            _ => return Ok(()),
        };
        Err(ScheduleError::Parameter { name: "prefetch", value: self.prefetch.into(), expected })
    }

    /// Whether the products of `vectors` vectors of codes can be summed as this schedule does.
    ///
    /// # Errors
    /// If `unroll` is out of range, 16 bits cannot hold the sum, or the CPU cannot multiply so.
    pub fn check_multiply(&self, vectors: usize, cpu: &Cpu) -> Result<(), ScheduleError> {
        if !matches!(self.unroll, 1 | 2 | 4) {
            let (name, value) = ("unroll", self.unroll.into());
            return Err(ScheduleError::Parameter { name, value, expected: "1, 2 or 4 chunks or groups" });
        }
        let bound = pairs_bound(vectors);
        match self.multiply {
            Multiply::Pairs if bound > i16::MAX as usize => Err(ScheduleError::Overflow { vectors, bound }),
            Multiply::Pairs => Ok(()),
            Multiply::Dot => self.check_dot(cpu),
        }
    }

    /// Whether `bytes` that lie together fill whole vectors.
    ///
    /// # Errors
    /// If they do not.
    pub fn check_width(&self, bytes: usize) -> Result<(), ScheduleError> {
        let vector_bytes = self.machine.vector_bytes();
        if bytes.is_multiple_of(vector_bytes) {
            return Ok(());
        }
        Err(ScheduleError::VectorWidth { layout: self.layout, machine: self.machine, bytes, vector_bytes })
    }

    /// Whether `cpu` looks bytes up in a vector, which `what` needs.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_lookup(cpu: &Cpu, what: &'static str) -> Result<(), ScheduleError> {
        let needs = Feature::Ssse3.name();
        if cpu.has_table_lookup() { Ok(()) } else { Err(ScheduleError::MissingFeature { what, needs, cpu: *cpu }) }
    }

    /// Whether `cpu` multiplies and adds four bytes at once in vectors of the machine's width.
    fn check_dot(&self, cpu: &Cpu) -> Result<(), ScheduleError> {
        let (has, needs) = match (self.machine, cpu.arch()) {
            (MachineKind::Avx512, _) => (cpu.has(Feature::Avx512vnni), Feature::Avx512vnni.name()),
            (_, Arch::X86_64) => (cpu.has_dot(), "AVX-VNNI, or AVX-512 VNNI with VL"),
            (_, Arch::Aarch64) => (cpu.has_dot(), "the dot product extension"),
        };
        if has { Ok(()) } else { Err(ScheduleError::MissingFeature { what: "multiply=dot", needs, cpu: *cpu }) }
    }

    /// Whether the wide machines have enough registers, as the family says, or else by assigning them. Cranelift spills
    /// instead.
    fn check_registers(&self, spec: &KernelSpec, cpu: &Cpu) -> Result<(), ScheduleError> {
        let Some(target) = wide::Target::new(self.machine, cpu) else { return Ok(()) };
        let outcome = match self.family.rules().registers(self) {
            None => wide::fits(target, |m| emit::emit(m, spec, self)),
            Some(needed) if needed > target.vector_registers() => {
                Err(wide::OutOfRegisters { kind: "vector", needed, available: target.vector_registers() })
            }
            Some(_) => Ok(()),
        };
        outcome.map_err(|wide::OutOfRegisters { kind, needed, available }| ScheduleError::Registers {
            machine: self.machine,
            kind,
            needed,
            available,
        })
    }

    /// The error for a layout that is not what the family reads.
    #[must_use]
    pub fn layout_error(&self, needs: &'static str) -> ScheduleError {
        ScheduleError::Layout { family: self.family, layout: self.layout, needs }
    }

    /// Bytes of scratch memory, aligned to 64, that a call for `tiles` tiles needs.
    #[must_use]
    pub fn scratch_bytes(&self, tiles: usize) -> usize {
        self.family.rules().scratch_bytes(self, tiles)
    }

    /// How the activations of one column must be laid out for this schedule.
    #[must_use]
    pub fn activation_format(&self) -> ActivationFormat {
        self.family.rules().activation_format()
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, machine, layout, multiply, unroll, ntile, prefetch } = self;
        write!(f, "{family}/{machine} layout={layout}")?;
        if family.multiplies() {
            let multiply = match multiply {
                Multiply::Pairs => "pairs",
                Multiply::Dot => "dot",
            };
            write!(f, " multiply={multiply}")?;
        }
        write!(f, " unroll={unroll} ntile={ntile}")?;
        if *prefetch == 0 { Ok(()) } else { write!(f, " prefetch={prefetch}") }
    }
}

/// A line that describes no schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("schedule: {0}")]
pub struct ParseScheduleError(pub(crate) String);

impl FromStr for Schedule {
    type Err = ParseScheduleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split_whitespace();
        let (family, machine) = words
            .next()
            .and_then(|word| word.split_once('/'))
            .ok_or_else(|| ParseScheduleError(format!("`{text}` does not start with family/machine")))?;
        let (mut layout, mut multiply, mut unroll, mut ntile, mut prefetch) = (None, None, None, None, None);
        for word in words {
            let bad = || {
                let names = "layout=, multiply=, unroll=, ntile=, prefetch=";
                ParseScheduleError(format!("`{word}` is no parameter ({names})"))
            };
            let (name, value) = word.split_once('=').ok_or_else(bad)?;
            let set = match name {
                "layout" => {
                    let value = value.parse().map_err(|error| ParseScheduleError(format!("{error}")))?;
                    layout.replace(value).is_none()
                }
                "multiply" => {
                    let value = match value {
                        "pairs" => Multiply::Pairs,
                        "dot" => Multiply::Dot,
                        _ => return Err(bad()),
                    };
                    multiply.replace(value).is_none()
                }
                "unroll" => unroll.replace(value.parse().map_err(|_| bad())?).is_none(),
                "ntile" => ntile.replace(value.parse().map_err(|_| bad())?).is_none(),
                "prefetch" => prefetch.replace(value.parse().map_err(|_| bad())?).is_none(),
                _ => return Err(bad()),
            };
            if !set {
                return Err(ParseScheduleError(format!("{name} is given twice")));
            }
        }
        let family: Family = family.parse()?;
        let missing = |name| ParseScheduleError(format!("{name}= is missing"));
        let multiply = match (family, multiply) {
            (family, multiply) if family.multiplies() => multiply.ok_or_else(|| missing("multiply"))?,
            (_, None) => Multiply::Pairs,
            (_, Some(_)) => return Err(ParseScheduleError(format!("{family} has no multiply="))),
        };
        Ok(Self {
            family,
            machine: machine.parse()?,
            layout: layout.ok_or_else(|| missing("layout"))?,
            multiply,
            unroll: unroll.ok_or_else(|| missing("unroll"))?,
            ntile: ntile.ok_or_else(|| missing("ntile"))?,
            prefetch: prefetch.unwrap_or(0),
        })
    }
}

impl From<Schedule> for String {
    fn from(schedule: Schedule) -> Self {
        schedule.to_string()
    }
}

impl TryFrom<String> for Schedule {
    type Error = ParseScheduleError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}
