//! How a kernel computes it, as a value; and the one place that knows what is legal.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::activations::ActivationFormat;
use crate::emit::mad_lanes::max_pair_groups;
use crate::emit::tl1::MAX_UNROLL;
use crate::listed::GROUP;
use crate::machine::wide;
use crate::{Arch, Columns, Cpu, Feature, KernelSpec, Layout, RecordList, emit};

/// The idea behind a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Unpack two-bit codes, multiply-add bytes, subtract `Σa` once.
    Mad,
    /// Two trits are an index into a table of their sums, looked up by byte shuffles.
    Tl1,
    /// As [`Mad`](Self::Mad), with five trits in a byte.
    T5,
    /// For many columns at once: the weight byte is the row of a table of the sums of four activations.
    Vlut,
    /// One column times the rows that a list names.
    SparseRows,
    /// The weighted sum of the columns that a list names.
    SparseColumns,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 6] = [Self::Mad, Self::Tl1, Self::T5, Self::Vlut, Self::SparseRows, Self::SparseColumns];

    /// Whether it multiplies, so that [`Multiply`] says how.
    const fn multiplies(self) -> bool {
        !matches!(self, Self::Tl1 | Self::Vlut)
    }

    /// The families that read whole matrices.
    pub fn dense() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|family| family.list().is_none())
    }

    /// What it is called with: `None` for one column and for many.
    #[must_use]
    pub const fn list(self) -> Option<Columns> {
        match self {
            Self::SparseRows => Some(Columns::ListedRows),
            Self::SparseColumns => Some(Columns::ListedColumns),
            Self::Mad | Self::Tl1 | Self::T5 | Self::Vlut => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mad => "mad",
            Self::Tl1 => "tl1",
            Self::T5 => "t5",
            Self::Vlut => "vlut",
            Self::SparseRows => "sparse-rows",
            Self::SparseColumns => "sparse-columns",
        })
    }
}

impl FromStr for Family {
    type Err = ParseScheduleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|family| family.to_string() == text);
        known.ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(ToString::to_string).collect();
            ParseScheduleError(format!("family `{text}`: expected one of {}", names.join(", ")))
        })
    }
}

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
    /// Steps per loop iteration: chunks or groups of a row for `mad`, bytes of a row for `tl1` and `vlut`.
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
        if self.prefetch != 0 && !self.family.multiplies() {
            let expected = "0: only families that multiply prefetch";
            return Err(ScheduleError::Parameter { name: "prefetch", value: self.prefetch.into(), expected });
        }
        if self.multiply != Multiply::Pairs && !self.family.multiplies() {
            return parameter("multiply", self.multiply as u8, "none: tl1 and vlut do not multiply");
        }
        match self.family {
            Family::Mad => {
                // Vectors of codes whose products are summed in 16 bits before they are widened.
                let vectors = match self.layout {
                    Layout::Rows { rows: 4 | 8, chunk } => {
                        self.check_width(chunk.into())?;
                        4 * usize::from(chunk) / self.machine.vector_bytes() * usize::from(self.unroll)
                    }
                    Layout::Lanes { rows: rows @ 1..=64, group: 4 } => {
                        self.check_width(4 * usize::from(rows))?;
                        4 * max_pair_groups(4)
                    }
                    _ => return Err(self.layout_error("rows4x…, rows8x… or lanes4x4 to lanes64x4")),
                };
                self.check_multiply(vectors, cpu)?;
            }
            Family::SparseRows => {
                let Layout::Rows { rows: 1, chunk: 64 } = self.layout else {
                    return Err(self.layout_error("rows1x64"));
                };
                self.check_multiply(4 * usize::from(self.unroll), cpu)?;
            }
            Family::SparseColumns => {
                let Layout::Columns { chunk } = self.layout else {
                    return Err(self.layout_error("columns16, columns32 or columns64"));
                };
                if usize::from(chunk) != self.machine.vector_bytes() {
                    return self.check_width(chunk.into()).and(Err(self.layout_error("columns<bytes of a vector>")));
                }
                if emit::sparse_columns::records(self) > GROUP {
                    return parameter("unroll", self.unroll, "1 or 2 times four records");
                }
                self.check_multiply(self.unroll.into(), cpu)?;
            }
            Family::T5 => {
                let Layout::Fives { rows: rows @ 1..=64 } = self.layout else {
                    return Err(self.layout_error("fives4 to fives64"));
                };
                self.check_width(4 * usize::from(rows))?;
                if self.machine != MachineKind::Avx512 {
                    Self::check_lookup(cpu, "t5")?;
                } else if !cpu.has(Feature::Avx512vbmi) {
                    let needs = Feature::Avx512vbmi.name();
                    return Err(ScheduleError::MissingFeature { what: "t5", needs, cpu: *cpu });
                }
                self.check_multiply(5 * max_pair_groups(5), cpu)?;
            }
            Family::Tl1 => {
                let Layout::Lanes { rows: rows @ (16 | 32 | 48 | 64 | 128), group: 1 } = self.layout else {
                    return Err(self.layout_error("lanes16, lanes32, lanes48, lanes64 or lanes128"));
                };
                self.check_width(rows.into())?;
                Self::check_lookup(cpu, "tl1")?;
                if self.unroll == 0 || !self.unroll.is_multiple_of(2) || usize::from(self.unroll) > MAX_UNROLL {
                    return parameter("unroll", self.unroll, "an even number of bytes up to 18");
                }
                if self.ntile != 1 {
                    return parameter("ntile", self.ntile, "1: a table serves one column");
                }
            }
            Family::Vlut => {
                let Layout::Lanes { rows: 1..=32, .. } = self.layout else {
                    return Err(self.layout_error("lanes<R> or lanes<R>x4 with at most 32 rows"));
                };
                if usize::from(self.ntile) != self.machine.vector_bytes() / 2 {
                    return parameter("ntile", self.ntile, "8, 16 or 32: the 16-bit lanes of the machine's vectors");
                }
                if !matches!(self.unroll, 4 | 8 | 16 | 32) {
                    return parameter("unroll", self.unroll, "4, 8, 16 or 32 groups");
                }
            }
        }
        self.check_registers(spec, cpu)
    }

    /// Whether the machine runs on `cpu` and can do what every family asks of it.
    fn check_machine(&self, cpu: &Cpu) -> Result<(), ScheduleError> {
        if let Some(missing) = self.machine.features().iter().find(|feature| !cpu.has(**feature)) {
            let (what, needs) = (self.machine.name(), missing.name());
            return Err(ScheduleError::MissingFeature { what, needs, cpu: *cpu });
        }
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
    fn check_multiply(&self, vectors: usize, cpu: &Cpu) -> Result<(), ScheduleError> {
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
    fn check_width(&self, bytes: usize) -> Result<(), ScheduleError> {
        let vector_bytes = self.machine.vector_bytes();
        if bytes.is_multiple_of(vector_bytes) {
            return Ok(());
        }
        Err(ScheduleError::VectorWidth { layout: self.layout, machine: self.machine, bytes, vector_bytes })
    }

    /// Whether `cpu` looks bytes up in a vector, which `what` needs.
    fn check_lookup(cpu: &Cpu, what: &'static str) -> Result<(), ScheduleError> {
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

    /// Whether the wide machines have enough registers, by assigning them. Cranelift spills instead.
    fn check_registers(&self, spec: &KernelSpec, cpu: &Cpu) -> Result<(), ScheduleError> {
        let Some(target) = wide::Target::new(self.machine, cpu) else { return Ok(()) };
        wide::fits(target, |m| emit::emit(m, spec, self)).map_err(|wide::OutOfRegisters { kind, needed, available }| {
            ScheduleError::Registers { machine: self.machine, kind, needed, available }
        })
    }

    fn layout_error(&self, needs: &'static str) -> ScheduleError {
        ScheduleError::Layout { family: self.family, layout: self.layout, needs }
    }

    /// Bytes of scratch memory, aligned to 64, that a call for `tiles` tiles needs.
    #[must_use]
    pub fn scratch_bytes(&self, tiles: usize) -> usize {
        match self.family {
            Family::Mad | Family::Tl1 | Family::T5 | Family::SparseRows | Family::SparseColumns => 0,
            Family::Vlut => emit::vlut::scratch_bytes(self, tiles),
        }
    }

    /// How the activations of one column must be laid out for this schedule.
    #[must_use]
    pub const fn activation_format(&self) -> ActivationFormat {
        match self.family {
            Family::Mad | Family::Vlut | Family::SparseRows => ActivationFormat::Planes,
            Family::SparseColumns => ActivationFormat::Plain,
            Family::T5 => ActivationFormat::FivePlanes,
            Family::Tl1 => ActivationFormat::PairTables,
        }
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
pub struct ParseScheduleError(String);

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
