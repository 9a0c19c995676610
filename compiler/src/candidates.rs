//! Which schedules are worth measuring.

use crate::{Columns, Cpu, Family, KernelSpec, Layout, MachineKind, Multiply, Schedule};

impl Schedule {
    /// The schedules for `spec` on `cpu` that are worth measuring, the ones that most often win first.
    ///
    /// All are legal. Left out are those that have never won anywhere: `multiply=pairs` where the machine has `dot`,
    /// narrow vectors of a wide machine's CPU in great variety, and what Cranelift turns into spills.
    #[must_use]
    pub fn candidates(spec: &KernelSpec, cpu: &Cpu) -> Vec<Self> {
        let mut candidates = Vec::new();
        for machine in [MachineKind::Avx512, MachineKind::Avx2, MachineKind::Clif128] {
            let probe = mad(machine, Layout::Rows { rows: 4, chunk: 64 }, Multiply::Dot, 1);
            let one = KernelSpec { columns: Columns::One, ..*spec };
            let multiply = if probe.check(&one, cpu).is_ok() { Multiply::Dot } else { Multiply::Pairs };
            match spec.columns {
                Columns::One => decoding(machine, multiply, &mut candidates),
                Columns::Many => prompts(machine, multiply, &mut candidates),
                Columns::ListedRows | Columns::ListedColumns => {
                    sparse(machine, multiply, spec.columns, &mut candidates);
                }
            }
        }
        candidates.retain(|schedule| schedule.check(spec, cpu).is_ok());
        candidates
    }
}

fn mad(machine: MachineKind, layout: Layout, multiply: Multiply, unroll: u8) -> Schedule {
    Schedule { family: Family::Mad, machine, layout, multiply, unroll, ntile: 1, prefetch: 0 }
}

fn tl1(machine: MachineKind, rows: u8, unroll: u8) -> Schedule {
    let layout = Layout::Lanes { rows, group: 1 };
    Schedule { family: Family::Tl1, machine, layout, multiply: Multiply::Pairs, unroll, ntile: 1, prefetch: 0 }
}

fn t5(machine: MachineKind, vectors: usize, multiply: Multiply, unroll: u8) -> Schedule {
    let layout = Layout::Fives { rows: (vectors * machine.vector_bytes() / 4) as u8 };
    Schedule { family: Family::T5, ..mad(machine, layout, multiply, unroll) }
}

/// With `vectors` vectors of rows.
fn tl2(machine: MachineKind, vectors: usize, unroll: u8) -> Schedule {
    // More rows than a tile can have are refused with all else that is not legal.
    let rows = (vectors * machine.vector_bytes()).try_into().unwrap_or(u8::MAX);
    Schedule { family: Family::Tl2, ..mad(machine, Layout::Threes { rows }, Multiply::Pairs, unroll) }
}

/// `lanes<R>x4` with 1, 2, 4 … vectors of rows.
fn lanes(machine: MachineKind, vectors: usize) -> Layout {
    Layout::Lanes { rows: (vectors * machine.vector_bytes() / 4) as u8, group: 4 }
}

/// For one column, where memory is the limit: enough asked for ahead to hide its latency.
///
/// With a prefetch first: Intel's cores read half as fast without one. AMD's have been measured with the other order only.
fn decoding(machine: MachineKind, multiply: Multiply, candidates: &mut Vec<Schedule>) {
    let (prefetches, tiles): (&[u16], _) = match machine {
        MachineKind::Avx512 => (&[4096, 0], [(1, 2), (2, 2), (2, 1), (4, 1), (1, 4), (1, 1)]),
        MachineKind::Avx2 => (&[4096, 0], [(1, 2), (2, 2), (2, 1), (8, 1), (1, 4), (1, 1)]),
        MachineKind::Clif128 => (&[0], [(2, 2), (2, 1), (1, 2), (8, 1), (1, 4), (1, 1)]),
    };
    for (vectors, unroll) in tiles {
        for prefetch in prefetches {
            candidates
                .push(Schedule { prefetch: *prefetch, ..mad(machine, lanes(machine, vectors), multiply, unroll) });
        }
    }
    let vector = machine.vector_bytes() as u8;
    for (rows, vectors, unroll) in [(8, 1, 2), (4, 1, 2), (8, 1, 1), (4, 1, 1), (4, 2, 1), (8, 2, 1)] {
        let Some(chunk @ ..=64) = vector.checked_mul(vectors) else { continue };
        // More than a vector of a row per turn makes Cranelift's `dot` spill.
        if machine == MachineKind::Clif128 && multiply == Multiply::Dot && unroll * vectors > 1 {
            continue;
        }
        for prefetch in prefetches {
            candidates
                .push(Schedule { prefetch: *prefetch, ..mad(machine, Layout::Rows { rows, chunk }, multiply, unroll) });
        }
    }
    if machine == MachineKind::Avx512 {
        for (vectors, unroll) in [(1, 2), (2, 1), (1, 1), (2, 2), (1, 4)] {
            for prefetch in [4096, 0] {
                candidates.push(Schedule { prefetch, ..t5(machine, vectors, multiply, unroll) });
            }
        }
    }
    if machine == MachineKind::Clif128 && multiply == Multiply::Pairs {
        for (rows, chunk, unroll) in [(4, 16, 4), (8, 64, 1), (4, 64, 1), (4, 64, 4)] {
            candidates.push(mad(machine, Layout::Rows { rows, chunk }, multiply, unroll));
        }
    }
    for unroll in [4, 2, 8, 16] {
        candidates.extend([128, 64, 32, 48, 16].map(|rows| tl1(machine, rows, unroll)));
    }
    if machine != MachineKind::Avx512 {
        candidates.push(t5(machine, 1, multiply, 1));
    }
    for (vectors, unroll) in [(2, 1), (3, 1), (1, 1), (1, 2), (4, 1)] {
        for prefetch in prefetches {
            candidates.push(Schedule { prefetch: *prefetch, ..tl2(machine, vectors, unroll) });
        }
    }
}

/// For a list of records, where the latency of memory is the limit: what is asked for far enough ahead is there in time.
fn sparse(machine: MachineKind, multiply: Multiply, columns: Columns, candidates: &mut Vec<Schedule>) {
    let (family, layout) = match columns {
        Columns::ListedRows => (Family::SparseRows, Layout::Rows { rows: 1, chunk: 64 }),
        _ => (Family::SparseColumns, Layout::Columns { chunk: machine.vector_bytes() as u8 }),
    };
    let prefetches: &[u16] = if machine == MachineKind::Clif128 { &[0] } else { &[16, 8, 32, 0] };
    for unroll in [2, 1, 4] {
        for prefetch in prefetches {
            candidates.push(Schedule { family, prefetch: *prefetch, ..mad(machine, layout, multiply, unroll) });
        }
    }
}

/// For many columns, where arithmetic is the limit: as many sums in registers as there are.
fn prompts(machine: MachineKind, multiply: Multiply, candidates: &mut Vec<Schedule>) {
    let (vectors, ntiles): (&[usize], &[u8]) = match machine {
        MachineKind::Avx512 => (&[1, 2, 4], &[16, 8, 12, 6, 4, 24, 2]),
        MachineKind::Avx2 => (&[1, 2, 4], &[8, 4, 6, 12, 2]),
        MachineKind::Clif128 => (&[8, 4, 2], &[6, 4, 8]),
    };
    for vectors in vectors {
        for ntile in ntiles {
            // Also here the weights come from memory, once for each tile of columns.
            let ways: &[(u8, u16)] =
                if machine == MachineKind::Clif128 { &[(1, 0)] } else { &[(2, 2048), (1, 2048), (2, 0), (1, 0)] };
            for (unroll, prefetch) in ways {
                let schedule = mad(machine, lanes(machine, *vectors), multiply, *unroll);
                candidates.push(Schedule { ntile: *ntile, prefetch: *prefetch, ..schedule });
            }
        }
    }
    let vector = machine.vector_bytes() as u8;
    for ntile in [4, 2, 8, 1] {
        for rows in [8, 4] {
            let layout = Layout::Rows { rows, chunk: vector };
            let unroll = if machine == MachineKind::Clif128 && multiply == Multiply::Pairs { 2 } else { 1 };
            candidates.push(Schedule { ntile, ..mad(machine, layout, multiply, unroll) });
        }
    }
    candidates.extend([64, 128, 32, 16].map(|rows| tl1(machine, rows, 4)));
    if machine != MachineKind::Avx512 {
        candidates.push(Schedule { ntile: 4, ..t5(machine, 1, multiply, 1) });
    } else {
        for (vectors, ntile) in [(1, 16), (1, 8), (2, 8), (2, 4), (4, 4)] {
            for prefetch in [2048, 0] {
                candidates.push(Schedule { ntile, prefetch, ..t5(machine, vectors, multiply, 1) });
            }
        }
    }
    for rows in [16, 32] {
        for unroll in [4, 8, 16] {
            let (layout, multiply) = (Layout::Lanes { rows, group: 4 }, Multiply::Pairs);
            let ntile = vector / 2;
            candidates.push(Schedule { family: Family::Vlut, machine, layout, multiply, unroll, ntile, prefetch: 0 });
        }
    }
    candidates.extend([2, 3, 1, 4].map(|vectors| tl2(machine, vectors, 1)));
}
