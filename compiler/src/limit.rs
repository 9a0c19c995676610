//! How fast the arithmetic of a kernel could be: the operation at its heart, repeated with nothing else around it.
//!
//! A limit is measured by code like a kernel's own, emitted over the same [`Machine`], so it holds for exactly the vectors
//! and instructions that the kernel has. Twelve sums are under way at once, which hides the latency of every operation
//! here on CPUs that start up to two per cycle. One more operation, an addition that waits for the one before, takes one
//! cycle on every CPU that ternion emits for: it tells the clock.
//!
//! Such code is a family of its own, so it passes the checks of all others: it computes the product of four columns of
//! weights, and repeats its operation on the zeros behind the activations, which add nothing to it.

use ternion_kernels_ref::matrix::ZERO_BYTE;

use crate::emit::{Family, Rules, Tile, for_each_tile};
use crate::machine::{Argument, Machine, Vector, repeat};
use crate::{
    ActivationFormat, Activations, Columns, CompileError, Cpu, Kernel, KernelSpec, Layout, MachineKind, Multiply,
    OutRows, Schedule, ScheduleError, compile,
};

/// The operation that does a kernel's arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Heart {
    /// Four products of bytes are added to each 32-bit lane.
    Dot,
    /// Two products of bytes become a 16-bit lane and are added to another.
    Pairs,
    /// A row of a table is loaded and added to 16-bit lanes, for four weights in each.
    TableRow,
    /// A byte shuffle looks up one of the two parts of a sum of two products, which is added to byte lanes.
    Lookup,
}

impl Heart {
    /// Multiply-adds that one operation on a vector of `bytes` bytes stands for.
    const fn macs(self, bytes: usize) -> usize {
        match self {
            Self::Dot | Self::Pairs | Self::Lookup => bytes,
            Self::TableRow => 4 * bytes / 2,
        }
    }
}

impl Schedule {
    /// The operation at the heart of this schedule's kernels; `None` if no single one is.
    #[must_use]
    pub fn heart(&self) -> Option<Heart> {
        self.family.rules().heart(self)
    }
}

/// Code that repeats one operation.
#[derive(Clone, Debug)]
pub struct Limit {
    kernel: Kernel,
    /// What one call does: multiply-adds, or cycles.
    count: u64,
}

impl Limit {
    /// The multiply-adds of `heart` on `machine`.
    ///
    /// # Errors
    /// If `cpu` cannot do that.
    pub fn of(heart: Heart, machine: MachineKind, cpu: &Cpu) -> Result<Self, CompileError> {
        let rules: &'static Repeated = match heart {
            Heart::Dot => &Repeated { name: "limit-dot", heart: Some(Heart::Dot) },
            Heart::Pairs => &Repeated { name: "limit-pairs", heart: Some(Heart::Pairs) },
            Heart::TableRow => &Repeated { name: "limit-table-row", heart: Some(Heart::TableRow) },
            Heart::Lookup => &Repeated { name: "limit-lookup", heart: Some(Heart::Lookup) },
        };
        Self::compile(rules, machine, heart.macs(machine.vector_bytes()), cpu)
    }

    /// Cycles of the clock.
    ///
    /// # Errors
    /// If the system gives no memory for the code.
    pub fn clock(cpu: &Cpu) -> Result<Self, CompileError> {
        Self::compile(&Repeated { name: "limit-clock", heart: None }, MachineKind::Clif128, 1, cpu)
    }

    fn compile(rules: &'static Repeated, machine: MachineKind, each: usize, cpu: &Cpu) -> Result<Self, CompileError> {
        // SAFETY: the code reads the first five cache lines of activations, which is what a column of four has, and what
        // `for_each_tile` hands out; it writes the rows of its tiles, since no sum of numbers of 32 bits is negative.
        let family = unsafe { Family::of(rules) };
        let layout = Layout::Lanes { rows: (machine.vector_bytes() / 4) as u8, group: 4 };
        let schedule =
            Schedule { family, machine, layout, multiply: Multiply::Pairs, unroll: 1, ntile: 1, prefetch: 0 };
        let kernel = compile(&[(KernelSpec { k: K, columns: Columns::One }, schedule)], cpu)?.remove(0);
        Ok(Self { kernel, count: (TURNS * SUMS * each) as u64 })
    }

    /// Multiply-adds, or cycles, of one [`run`](Self::run).
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Runs the code once, on this thread: some hundred microseconds.
    pub fn run(&self) {
        let layout = self.kernel.layout();
        let weights = vec![ZERO_BYTE; layout.tile_bytes(K)];
        let column = vec![0; self.kernel.activation_format().bytes(K)];
        let activations = Activations { columns: &column, stride: column.len(), sums: &[0] };
        let mut results = vec![0; layout.tile_rows()];
        let out = OutRows::new(&mut results, layout.tile_rows());
        // SAFETY: nobody else has `out`.
        unsafe { self.kernel.run(&weights, 0..1, &activations, &out) };
    }
}

/// Length of the rows of a limit's own product.
const K: usize = 4;

/// Bytes from one plane of activations to the next. All but the first byte of a plane, and the line behind the planes,
/// are 0.
const PLANE: usize = 64;

/// Sums that are under way at once.
const SUMS: usize = 12;

/// Times that each of them is changed.
const TURNS: usize = 20_000;

/// The family of a limit.
struct Repeated {
    name: &'static str,
    /// `None` for the clock.
    heart: Option<Heart>,
}

impl Rules for Repeated {
    fn name(&self) -> &'static str {
        self.name
    }

    fn activation_format(&self) -> ActivationFormat {
        ActivationFormat::Planes
    }

    fn check(&self, schedule: &Schedule, cpu: &Cpu) -> Result<(), ScheduleError> {
        schedule.check_width(4 * schedule.layout.tile_rows())?;
        match self.heart {
            Some(Heart::Dot) => Schedule { multiply: Multiply::Dot, ..*schedule }.check_multiply(1, cpu),
            Some(Heart::Lookup) => Schedule::check_lookup(cpu, self.name),
            Some(Heart::Pairs | Heart::TableRow) | None => Ok(()),
        }
    }

    fn layouts(&self, machine: MachineKind) -> Vec<Layout> {
        vec![Layout::Lanes { rows: (machine.vector_bytes() / 4) as u8, group: 4 }]
    }

    fn unrolls(&self) -> Vec<u8> {
        vec![1]
    }

    fn ntiles(&self, _: MachineKind) -> Vec<u8> {
        vec![1]
    }

    fn emit(&self, m: &mut dyn Machine, spec: &KernelSpec, schedule: &Schedule) {
        let nothing = match self.heart {
            Some(heart) => repeated(m, heart),
            None => chained(m),
        };
        let nothing = m.vector_variable(nothing);
        for_each_tile(m, spec, schedule, |m, tile| {
            let product = product(m, tile);
            let nothing = m.get(nothing);
            let product = m.add32(product, nothing);
            m.store(tile.out, 0, product);
        });
    }
}

/// A vector of zeros that no compiler knows to be zeros, from many operations.
fn repeated(m: &mut dyn Machine, heart: Heart) -> Vector {
    let activations = m.argument(Argument::Activations);
    let zeros = m.load(activations, 4 * PLANE as i32);
    let step = m.load32(activations, 4 * PLANE as i32);
    let sums: [_; SUMS] = std::array::from_fn(|_| m.vector_variable(zeros));
    let address = m.int_variable(activations);
    repeat(m, TURNS, |m| {
        // An address that is another one in each turn, as far as anyone can tell.
        let from = m.get_int(address);
        for (i, sum) in sums.iter().enumerate() {
            let (value, other) = (m.get(*sum), m.get(sums[(i + 1) % SUMS]));
            let next = match heart {
                Heart::Dot => m.dot(value, zeros, other),
                Heart::Pairs => {
                    let pairs = m.multiply_add_pairs(zeros, other);
                    m.add16(value, pairs)
                }
                Heart::TableRow => {
                    let row = m.load_result(from, zeros_at(i, m.vector_bytes()));
                    m.add16(value, row)
                }
                Heart::Lookup => {
                    let found = m.lookup(zeros, other);
                    m.add8(value, found)
                }
            };
            m.set(*sum, next);
        }
        let next = m.add(from, step);
        m.set_int(address, next);
    });
    sums.map(|sum| m.get(sum)).into_iter().reduce(|a, b| m.add32(a, b)).unwrap_or(zeros)
}

/// Where the `i`-th vector of zeros begins, in bytes from the activations.
fn zeros_at(i: usize, bytes: usize) -> i32 {
    // The line behind the planes, and the planes but for the vector that begins each.
    let in_plane = PLANE / bytes - 1;
    let at = if in_plane == 0 || i < PLANE / bytes {
        4 * PLANE + i * bytes % PLANE
    } else {
        let i = (i - PLANE / bytes) % (4 * in_plane);
        i / in_plane * PLANE + bytes * (1 + i % in_plane)
    };
    at as i32
}

/// The same from additions that wait for each other.
fn chained(m: &mut dyn Machine) -> Vector {
    let activations = m.argument(Argument::Activations);
    let step = m.load32(activations, 4 * PLANE as i32);
    let sum = m.int_variable(step);
    repeat(m, TURNS, |m| {
        let mut value = m.get_int(sum);
        for _ in 0..SUMS {
            value = m.add(value, step);
        }
        m.set_int(sum, value);
    });
    let (value, zero) = (m.get_int(sum), m.constant(0));
    let offset = m.min(value, zero);
    let address = m.add(activations, offset);
    m.load(address, 4 * PLANE as i32)
}

/// One tile, of one vector, times one column.
fn product(m: &mut dyn Machine, tile: &Tile) -> Vector {
    let bytes = m.load(tile.weights, 0);
    let mask = m.splat8(3);
    let sum = m.load_splat32(tile.sums, 0);
    let places: [_; 4] = std::array::from_fn(|place| {
        let shifted = m.shift_right16(bytes, 2 * place as u8);
        let codes = m.and(shifted, mask);
        let activations = m.load_splat32(tile.activations, (place * PLANE) as i32);
        let pairs = m.multiply_add_pairs(codes, activations);
        m.sum_pairs16(pairs)
    });
    let total = places.into_iter().reduce(|a, b| m.add32(a, b)).unwrap_or(sum);
    m.sub32(total, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_that_this_cpu_has_gives_code_that_computes_the_right_thing() {
        let cpu = Cpu::host().expect("tests run where ternion emits code");
        let hearts = [Heart::Dot, Heart::Pairs, Heart::TableRow, Heart::Lookup];
        for (machine, heart) in MachineKind::ALL.into_iter().flat_map(|machine| hearts.map(|heart| (machine, heart))) {
            match Limit::of(heart, machine, &cpu) {
                Ok(limit) => {
                    limit.run();
                    assert_eq!(limit.count() % (machine.vector_bytes() * SUMS * TURNS) as u64, 0);
                }
                Err(error) => assert!(matches!(error, CompileError::Schedule { .. }), "{error}"),
            }
        }
        assert_eq!(Limit::clock(&cpu).expect("integers").count(), (SUMS * TURNS) as u64);
        assert!(Limit::of(Heart::Dot, MachineKind::Clif128, &Cpu::baseline(cpu.arch())).is_err());
    }

    #[test]
    fn zeros_lie_within_a_column_and_off_its_activations() {
        for bytes in [16, 32, 64] {
            for i in 0..SUMS {
                let at = zeros_at(i, bytes) as usize;
                assert!(at + bytes <= ActivationFormat::Planes.bytes(K) && (at >= 4 * PLANE || at % PLANE >= bytes));
            }
        }
    }

    #[test]
    fn the_compiled_operation_is_there_as_often_as_it_counts() {
        let cpu: Cpu = "x86-64 +ssse3 +avx2 +avx512f +avx512bw +avx512dq +avx512vl +avx512vnni".parse().expect("a CPU");
        for (heart, instruction) in [
            (Heart::Dot, "vpdpbusd"),
            (Heart::Pairs, "vpmaddubsw"),
            (Heart::TableRow, "vpaddw"),
            (Heart::Lookup, "vpshufb"),
        ] {
            let rules: &'static Repeated = Box::leak(Box::new(Repeated { name: "limit", heart: Some(heart) }));
            let text = crate::asm_text(
                &KernelSpec { k: K, columns: Columns::One },
                &Schedule {
                    // SAFETY: nothing is run.
                    family: unsafe { Family::of(rules) },
                    machine: MachineKind::Avx512,
                    layout: rules.layouts(MachineKind::Avx512)[0],
                    multiply: Multiply::Pairs,
                    unroll: 1,
                    ntile: 1,
                    prefetch: 0,
                },
                &cpu,
            );
            let text = text.expect("legal").expect("x86-64");
            let own = if heart == Heart::Pairs { 4 } else { 0 };
            assert_eq!(text.matches(instruction).count(), SUMS + own, "{text}");
        }
    }
}
