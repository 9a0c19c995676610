//! From virtual to physical registers.
//!
//! Three steps, all over the list in order. *Liveness*: walking backwards, a register is live from a write to the last
//! read of what was written; what is live where a loop starts is live at its end too, so the walk is repeated until
//! that settles (once per level of nesting). *Interference*: a write must not hit a register that is live after it,
//! unless the write is a copy of that very register. *Colouring*: the two sides of a copy become one register if they
//! do not interfere, and then each register, in the order of first writes, takes the first physical one that no
//! interfering register has. For values that live from one write to a last read this order needs as many registers as
//! values are live at once, no more.
//!
//! Nothing is ever spilled: a program that needs too many registers is refused.

use super::program::{Class, Counting, Op, Program, Register};

/// Physical numbers of virtual registers.
pub(super) struct Assignment {
    numbers: Vec<u8>,
}

impl Assignment {
    /// The number of the physical register, within its class.
    pub(super) fn number(&self, register: Register) -> usize {
        self.numbers[register.index()].into()
    }

    /// How many physical registers of `class` are in use.
    pub(super) fn used(&self, program: &Program, class: Class) -> usize {
        let of_class = program.classes.iter().zip(&self.numbers).filter(|(c, n)| **c == class && **n != NONE);
        of_class.map(|(_, number)| usize::from(*number) + 1).max().unwrap_or(0)
    }
}

/// The number of a register that is never written.
const NONE: u8 = u8::MAX;

/// Assigns numbers from 0 to the registers of each class, as few as it finds.
pub(super) fn allocate(program: &Program) -> Assignment {
    let mut numbers = vec![NONE; program.classes.len()];
    for class in [Class::Int, Class::Vector] {
        let nodes = Nodes::new(program, class);
        let mut interference = interference(program, &nodes);
        let group = coalesce(program, &nodes, &mut interference);
        let colours = colour(program, &nodes, &interference, &group);
        for (node, register) in nodes.registers.iter().enumerate() {
            numbers[register.index()] = colours[group[node]];
        }
    }
    Assignment { numbers }
}

/// The registers of one class, numbered without gaps.
struct Nodes {
    registers: Vec<Register>,
    of: Vec<Option<usize>>,
}

impl Nodes {
    fn new(program: &Program, class: Class) -> Self {
        let all = (0..program.classes.len() as u32).map(Register);
        let registers: Vec<_> = all.filter(|register| program.classes[register.index()] == class).collect();
        let mut of = vec![None; program.classes.len()];
        for (node, register) in registers.iter().enumerate() {
            of[register.index()] = Some(node);
        }
        Self { registers, of }
    }

    fn of(&self, register: Register) -> Option<usize> {
        self.of[register.index()]
    }
}

/// Sets of nodes, one row of bits each.
#[derive(Clone)]
struct Sets {
    /// 64-bit words of a row.
    words: usize,
    bits: Vec<u64>,
}

impl Sets {
    fn new(sets: usize, nodes: usize) -> Self {
        let words = nodes.div_ceil(64);
        Self { words, bits: vec![0; sets * words] }
    }

    fn row(&self, set: usize) -> &[u64] {
        &self.bits[set * self.words..][..self.words]
    }

    fn row_mut(&mut self, set: usize) -> &mut [u64] {
        &mut self.bits[set * self.words..][..self.words]
    }
}

fn insert(set: &mut [u64], node: usize) {
    set[node / 64] |= 1 << (node % 64);
}

fn remove(set: &mut [u64], node: usize) {
    set[node / 64] &= !(1 << (node % 64));
}

fn contains(set: &[u64], node: usize) -> bool {
    set[node / 64] >> (node % 64) & 1 != 0
}

/// Adds the nodes of `other`; returns whether that changed anything.
fn extend(set: &mut [u64], other: &[u64]) -> bool {
    set.iter_mut().zip(other).fold(false, |changed, (word, other)| {
        let old = *word;
        *word |= other;
        changed | (*word != old)
    })
}

/// The nodes of a set in order.
fn members(set: &[u64]) -> impl Iterator<Item = usize> {
    set.iter().enumerate().flat_map(|(at, word)| {
        let mut left = *word;
        std::iter::from_fn(move || {
            let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(64 * at + bit)
        })
    })
}

/// For every node, those that must not share its physical register.
fn interference(program: &Program, nodes: &Nodes) -> Sets {
    let count = nodes.registers.len();
    let mut at_start = Sets::new(program.loops.len(), count);
    while walk(program, nodes, &mut at_start, |_, _, _| {}) {}
    let mut interference = Sets::new(count, count);
    walk(program, nodes, &mut at_start, |written, copied, live| {
        for other in members(live).filter(|other| *other != written && Some(*other) != copied) {
            insert(interference.row_mut(written), other);
            insert(interference.row_mut(other), written);
        }
    });
    interference
}

/// Walks the list backwards once with what is live where each loop starts, as far as it is known; `write` is called
/// with every node that is written, the node that it is a copy of, and what is live after. Returns whether the walk
/// found more live where a loop starts.
fn walk(
    program: &Program,
    nodes: &Nodes,
    at_start: &mut Sets,
    mut write: impl FnMut(usize, Option<usize>, &[u64]),
) -> bool {
    let mut live = vec![0; at_start.words];
    // What is live after the loops that the walk is inside of.
    let mut after = Vec::new();
    let mut grown = false;
    for op in program.ops.iter().rev() {
        if let Some(written) = op.writes().and_then(|register| nodes.of(register)) {
            let copied = if let Op::Copy { from, .. } = op { nodes.of(*from) } else { None };
            write(written, copied, &live);
            remove(&mut live, written);
        }
        match op {
            Op::Run(instruction) => {
                instruction.reads().filter_map(|read| nodes.of(read)).for_each(|node| insert(&mut live, node));
            }
            Op::Copy { from, .. } => {
                if let Some(node) = nodes.of(*from) {
                    insert(&mut live, node);
                }
            }
            Op::Constant { .. } => {}
            Op::End(at) | Op::Begin(at) => {
                if matches!(op, Op::End(_)) {
                    after.push(live.clone());
                    extend(&mut live, at_start.row(*at));
                } else {
                    grown |= extend(at_start.row_mut(*at), &live);
                    let after = after.pop();
                    // Such a loop may not run at all.
                    if let (Counting::While { .. }, Some(after)) = (program.loops[*at], after) {
                        extend(&mut live, &after);
                    }
                }
                if let Some(node) = nodes.of(program.loops[*at].register()) {
                    insert(&mut live, node);
                }
            }
        }
    }
    grown
}

/// Merges the two sides of every copy that allows it; returns the representative of every node.
fn coalesce(program: &Program, nodes: &Nodes, interference: &mut Sets) -> Vec<usize> {
    let mut group: Vec<_> = (0..nodes.registers.len()).collect();
    let find = |group: &[usize], mut node: usize| {
        while group[node] != node {
            node = group[node];
        }
        node
    };
    for op in &program.ops {
        let Op::Copy { to, from } = op else { continue };
        let (Some(to), Some(from)) = (nodes.of(*to), nodes.of(*from)) else { continue };
        let (to, from) = (find(&group, to), find(&group, from));
        // The smaller number was written first; it keeps the place in the order of colouring.
        let (kept, merged) = (to.min(from), to.max(from));
        if kept == merged || contains(interference.row(kept), merged) {
            continue;
        }
        group[merged] = kept;
        let others = interference.row(merged).to_vec();
        members(&others).for_each(|other| insert(interference.row_mut(other), kept));
        extend(interference.row_mut(kept), &others);
    }
    (0..group.len()).map(|node| find(&group, node)).collect()
}

/// The physical number of every representative.
fn colour(program: &Program, nodes: &Nodes, interference: &Sets, group: &[usize]) -> Vec<u8> {
    let mut colours = vec![NONE; group.len()];
    let writes = program.ops.iter().filter_map(Op::writes);
    for node in [Program::RECORD].into_iter().chain(writes).filter_map(|register| nodes.of(register)) {
        let node = group[node];
        if colours[node] != NONE {
            continue;
        }
        let mut free = [true; NONE as usize + 1];
        members(interference.row(node)).for_each(|other| free[usize::from(colours[group[other]])] = false);
        colours[node] = free.iter().take(NONE.into()).position(|free| *free).map_or(NONE - 1, |free| free as u8);
    }
    colours
}

#[cfg(test)]
mod tests {
    use super::super::program::{Instruction, Operand, View};
    use super::*;
    use iced_x86::Code;

    /// A program of `vectors` registers and nothing else.
    fn program(vectors: usize) -> Program {
        let mut program = Program::default();
        program.register(Class::Int);
        for _ in 0..vectors {
            program.register(Class::Vector);
        }
        program
    }

    fn add(to: u32, a: u32, b: u32) -> Op {
        let operands = [a, b].map(|register| Operand::Register(Register(register), View::Ymm));
        Op::Run(Instruction::new(Code::VEX_Vpaddb_ymm_ymm_ymmm256, Some((Register(to), View::Ymm)), operands))
    }

    fn copy(to: u32, from: u32) -> Op {
        Op::Copy { to: Register(to), from: Register(from) }
    }

    #[test]
    fn a_value_that_dies_makes_room_and_a_live_one_does_not() {
        let mut program = program(4);
        program.ops = vec![add(1, 1, 1), add(2, 1, 1), add(3, 1, 2), add(4, 3, 1)];
        let assignment = allocate(&program);
        let number = |register| assignment.number(Register(register));
        assert_ne!(number(1), number(2));
        assert_eq!(number(3), number(2), "2 dies where 3 is written");
        assert_eq!(assignment.used(&program, Class::Vector), 2);
    }

    #[test]
    fn a_sum_in_a_loop_is_one_register_from_its_start_to_its_last_use() {
        // 1 starts the sum, 2 is the variable; each turn reads it as 3, writes 4 and copies that back.
        let mut program = program(5);
        program.loops.push(Counting::Repeat { counter: Program::RECORD });
        program.ops = vec![
            add(1, 1, 1),
            copy(2, 1),
            Op::Begin(0),
            copy(3, 2),
            add(4, 3, 3),
            copy(2, 4),
            Op::End(0),
            add(5, 2, 2),
        ];
        let assignment = allocate(&program);
        for register in 2..=4 {
            assert_eq!(assignment.number(Register(register)), assignment.number(Register(1)));
        }
        assert_eq!(assignment.used(&program, Class::Vector), 1);
    }

    #[test]
    fn an_old_value_of_a_variable_outlives_its_change() {
        // 3 reads variable 2, which is changed to 4 before 3 is used.
        let mut program = program(5);
        program.ops = vec![add(1, 1, 1), copy(2, 1), copy(3, 2), add(4, 2, 2), copy(2, 4), add(5, 3, 2)];
        let assignment = allocate(&program);
        assert_ne!(assignment.number(Register(3)), assignment.number(Register(2)));
    }

    #[test]
    fn what_a_loop_reads_from_outside_keeps_its_register_through_the_loop() {
        let mut program = program(3);
        program.loops.push(Counting::Repeat { counter: Program::RECORD });
        program.ops = vec![add(1, 1, 1), Op::Begin(0), add(2, 1, 1), add(3, 2, 2), Op::End(0)];
        let assignment = allocate(&program);
        assert_ne!(assignment.number(Register(2)), assignment.number(Register(1)));
        assert_ne!(assignment.number(Register(3)), assignment.number(Register(1)), "the next turn reads 1 again");
    }
}
