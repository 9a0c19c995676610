//! What the recorder writes down: a straight list of instructions over virtual registers, with loops as brackets.
//!
//! A register that holds a value is written once; a register that holds a variable may be written again by a copy.
//! Before registers are assigned the list is tidied: values that nobody reads are not computed, a load with a single
//! reader becomes its memory operand, and constants are made where they cost least.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::Code;

use crate::machine::LoopNote;

/// A virtual register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Register(pub(super) u32);

impl Register {
    pub(super) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The two files of physical registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// General purpose, 64 bits.
    Int,
    /// Vectors of the machine's width.
    Vector,
}

/// How much of a register an instruction names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    Int,
    Int32,
    Xmm,
    Ymm,
    Zmm,
}

/// `base + index + offset`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) base: Register,
    pub(super) index: Option<Register>,
    pub(super) offset: i32,
}

/// What an instruction reads, or the address that it writes to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operand {
    Register(Register, View),
    Memory { address: Address, splat32: bool },
    Immediate8(u8),
    Immediate32(i32),
}

/// What the last operand of an instruction may be instead of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MemoryForm {
    /// Nothing.
    No,
    /// A whole vector in memory.
    Vector,
    /// A whole vector, or 32 bits for every lane.
    VectorOrSplat32,
}

impl MemoryForm {
    /// The form where 32 bits for every lane cannot be encoded.
    pub(super) const fn without_splat(self) -> Self {
        match self {
            Self::No => Self::No,
            Self::Vector | Self::VectorOrSplat32 => Self::Vector,
        }
    }
}

/// What a load brings, as far as it matters for folding it into its reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// A whole vector that no store changes.
    Vector,
    /// 32 bits in every lane, which no store changes.
    Splat32,
    /// A whole vector that stores change.
    Result,
}

/// One machine instruction over virtual registers. Operands are in the order of its encoding, the target apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Instruction {
    pub(super) code: Code,
    pub(super) target: Option<(Register, View)>,
    /// Whether the target is an operand too.
    pub(super) reads_target: bool,
    pub(super) operands: [Option<Operand>; 3],
    /// Whether the two operands may change places.
    pub(super) commutes: bool,
    pub(super) memory: MemoryForm,
    pub(super) load: Option<Load>,
}

impl Instruction {
    /// An instruction without a memory form.
    pub(super) fn new<const N: usize>(code: Code, target: Option<(Register, View)>, operands: [Operand; N]) -> Self {
        let operands = std::array::from_fn(|i| operands.get(i).copied());
        let (commutes, memory) = (false, MemoryForm::No);
        Self { code, target, reads_target: false, operands, commutes, memory, load: None }
    }

    /// The registers that it reads.
    pub(super) fn reads(&self) -> impl Iterator<Item = Register> {
        let target = self.target.filter(|_| self.reads_target).map(|(register, _)| register);
        let operands = self.operands.into_iter().flatten().flat_map(|operand| match operand {
            Operand::Register(register, _) => [Some(register), None],
            Operand::Memory { address, .. } => [Some(address.base), address.index],
            Operand::Immediate8(_) | Operand::Immediate32(_) => [None, None],
        });
        target.into_iter().chain(operands.flatten())
    }
}

/// A vector that is known when the code is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Constant {
    /// The same in every 32-bit lane.
    Splat32(u32),
    /// Any bytes, of which a vector takes as many as it has.
    Bytes([u8; 64]),
}

/// When constants are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MakeConstants {
    /// Before the loop that reads them if that loop has no loop inside, else where they are first read between one loop
    /// and the next, so that they occupy no register meanwhile.
    BeforeLoops,
    /// Each time they are read.
    EachTime,
}

/// How a loop counts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Counting {
    /// Down from a count to 0, tested after each turn.
    Repeat { counter: Register },
    /// While the variable is at least the bound, tested before each turn.
    While { variable: Register, bound: i32 },
}

impl Counting {
    /// The register that decides.
    pub(super) const fn register(self) -> Register {
        match self {
            Self::Repeat { counter } => counter,
            Self::While { variable, .. } => variable,
        }
    }
}

/// One entry of the list.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Run(Instruction),
    Copy {
        to: Register,
        from: Register,
    },
    Constant {
        to: Register,
        constant: Constant,
    },
    /// Start of the loop with this number.
    Begin(usize),
    /// Its end.
    End(usize),
}

impl Op {
    /// The register that it writes. (The end of a loop also lowers the loop's counter.)
    pub(super) const fn writes(&self) -> Option<Register> {
        match self {
            Self::Run(Instruction { target: Some((register, _)), .. })
            | Self::Copy { to: register, .. }
            | Self::Constant { to: register, .. } => Some(*register),
            Self::Run(_) | Self::Begin(_) | Self::End(_) => None,
        }
    }
}

/// A recorded function.
#[derive(Clone, Debug, Default)]
pub(super) struct Program {
    pub(super) ops: Vec<Op>,
    pub(super) loops: Vec<Counting>,
    /// What is known of each loop.
    pub(super) notes: Vec<LoopNote>,
    /// The class of every register. Register 0 is the address of the argument record.
    pub(super) classes: Vec<Class>,
    /// For every register the constant that it stands for, if it has no instruction of its own yet.
    constants: Vec<Option<Constant>>,
}

impl Program {
    /// The argument record.
    pub(super) const RECORD: Register = Register(0);

    pub(super) fn register(&mut self, class: Class) -> Register {
        self.classes.push(class);
        self.constants.push(None);
        Register(self.classes.len() as u32 - 1)
    }

    /// A register that stands for a constant.
    pub(super) fn constant(&mut self, constant: Constant) -> Register {
        let register = self.register(Class::Vector);
        self.constants[register.index()] = Some(constant);
        register
    }

    /// Everything that makes the list shorter or its values shorter-lived.
    pub(super) fn tidy(&mut self) {
        self.drop_unread();
        self.fold_addresses();
        self.fold_loads();
    }

    /// The vector registers that a loop changes and that had a value before it: those that it carries from turn to turn.
    pub(super) fn carried(&self, number: usize) -> BTreeSet<Register> {
        let mut ops = self.ops.iter();
        let before: BTreeSet<_> = ops
            .by_ref()
            .take_while(|op| !matches!(op, Op::Begin(at) if *at == number))
            .filter_map(Op::writes)
            .collect();
        let within = ops.take_while(|op| !matches!(op, Op::End(at) if *at == number));
        let copies = within.filter_map(|op| if let Op::Copy { to, .. } = op { Some(*to) } else { None });
        copies.filter(|to| self.classes[to.index()] == Class::Vector && before.contains(to)).collect()
    }

    /// How often each register is read.
    fn reads(&self) -> Vec<u32> {
        let mut reads = vec![0; self.classes.len()];
        for op in &self.ops {
            match op {
                Op::Run(instruction) => instruction.reads().for_each(|register| reads[register.index()] += 1),
                Op::Copy { from, .. } => reads[from.index()] += 1,
                Op::Begin(at) | Op::End(at) => reads[self.loops[*at].register().index()] += 1,
                Op::Constant { .. } => {}
            }
        }
        reads
    }

    /// Removes values that nobody reads, and then what only they read.
    fn drop_unread(&mut self) {
        let mut reads = self.reads();
        let mut kept = Vec::with_capacity(self.ops.len());
        while let Some(op) = self.ops.pop() {
            if op.writes().is_none_or(|register| reads[register.index()] > 0) {
                kept.push(op);
            } else if let Op::Run(instruction) = op {
                instruction.reads().for_each(|register| reads[register.index()] -= 1);
            } else if let Op::Copy { from, .. } = op {
                reads[from.index()] -= 1;
            }
        }
        kept.reverse();
        self.ops = kept;
    }

    /// Turns a sum of two registers with a single reader, an access to memory in the same loop, into its address.
    fn fold_addresses(&mut self) {
        let reads = self.reads();
        // The sums of this stretch without loops, by target, with their places in the list.
        let mut sums: Vec<Option<(usize, Address)>> = vec![None; self.classes.len()];
        let mut loop_edge = 0;
        let mut folded = vec![false; self.ops.len()];
        for (at, op) in self.ops.iter_mut().enumerate() {
            let instruction = match op {
                Op::Run(instruction) => instruction,
                Op::Begin(_) | Op::End(_) => {
                    loop_edge = at;
                    continue;
                }
                Op::Copy { .. } | Op::Constant { .. } => continue,
            };
            for operand in instruction.operands.iter_mut().flatten() {
                let Operand::Memory { address, .. } = operand else { continue };
                let sum = sums[address.base.index()].filter(|(sum, _)| address.index.is_none() && *sum >= loop_edge);
                if let Some((sum, parts)) = sum {
                    *address = Address { offset: address.offset, ..parts };
                    folded[sum] = true;
                }
            }
            if let (Code::Lea_r64_m, Some((target, _)), Some(Operand::Memory { address, .. })) =
                (instruction.code, instruction.target, instruction.operands[0])
                && address.index.is_some()
                && reads[target.index()] == 1
            {
                sums[target.index()] = Some((at, address));
            }
        }
        let mut folded = folded.into_iter();
        self.ops.retain(|_| folded.next() != Some(true));
    }

    /// Turns loads with a single reader in the same loop into that reader's memory operand.
    fn fold_loads(&mut self) {
        let reads = self.reads();
        // The loads of this stretch without loops, by target: their place in the list, kind and operand.
        let mut loads: Vec<Option<(usize, Load, Operand)>> = vec![None; self.classes.len()];
        let (mut loop_edge, mut store) = (0, 0);
        let mut folded = vec![false; self.ops.len()];
        for (at, op) in self.ops.iter_mut().enumerate() {
            let instruction = match op {
                Op::Run(instruction) => instruction,
                Op::Begin(_) | Op::End(_) => {
                    loop_edge = at;
                    continue;
                }
                Op::Copy { .. } | Op::Constant { .. } => continue,
            };
            if instruction.target.is_none() {
                store = at;
            }
            if let (Some(load), Some((target, _)), Some(Operand::Memory { address, .. })) =
                (instruction.load, instruction.target, instruction.operands[0])
                && reads[target.index()] == 1
            {
                let operand = Operand::Memory { address, splat32: load == Load::Splat32 };
                loads[target.index()] = Some((at, load, operand));
                continue;
            }
            let fits = |operand: Option<Operand>| {
                let Some(Operand::Register(register, _)) = operand else { return None };
                loads[register.index()].filter(|(at, load, _)| {
                    let allowed = match instruction.memory {
                        MemoryForm::No => false,
                        MemoryForm::Vector => *load != Load::Splat32,
                        MemoryForm::VectorOrSplat32 => true,
                    };
                    allowed && *at >= loop_edge && (*load != Load::Result || *at >= store)
                })
            };
            let Some(last) = instruction.operands.iter().rposition(|o| matches!(o, Some(Operand::Register(..)))) else {
                continue;
            };
            if fits(instruction.operands[last]).is_none() && instruction.commutes && last == 1 {
                if fits(instruction.operands[0]).is_none() {
                    continue;
                }
                instruction.operands.swap(0, 1);
            }
            if let Some((load, _, source)) = fits(instruction.operands[last]) {
                instruction.operands[last] = Some(source);
                folded[load] = true;
            }
        }
        let mut folded = folded.into_iter();
        self.ops.retain(|_| folded.next() != Some(true));
    }

    /// Gives every constant an instruction, as `when` says.
    pub(super) fn place_constants(&mut self, when: MakeConstants) {
        let ops = std::mem::take(&mut self.ops);
        // The loops without loops inside, with the constants that they read.
        let mut hoisted: BTreeMap<usize, BTreeSet<Constant>> = BTreeMap::new();
        let mut begun = None;
        for op in &ops {
            match op {
                Op::Begin(at) if when == MakeConstants::BeforeLoops => begun = Some((*at, BTreeSet::new())),
                Op::End(_) => hoisted.extend(begun.take()),
                Op::Run(instruction) => {
                    if let Some((_, constants)) = &mut begun {
                        constants.extend(instruction.reads().filter_map(|register| self.constants[register.index()]));
                    }
                }
                Op::Begin(_) | Op::Copy { .. } | Op::Constant { .. } => {}
            }
        }
        // The constants that have a register here.
        let mut made = BTreeMap::new();
        for op in ops {
            match op {
                Op::Begin(at) => {
                    made.clear();
                    for constant in hoisted.get(&at).into_iter().flatten() {
                        self.make(*constant, &mut made);
                    }
                    self.ops.push(op);
                }
                Op::End(_) => {
                    made.clear();
                    self.ops.push(op);
                }
                Op::Copy { to, from } => self.ops.push(match self.constants[from.index()] {
                    Some(constant) => Op::Constant { to, constant },
                    None => op,
                }),
                Op::Constant { .. } => self.ops.push(op),
                Op::Run(mut instruction) => {
                    for operand in instruction.operands.iter_mut().flatten() {
                        let Operand::Register(register, _) = operand else { continue };
                        let Some(constant) = self.constants[register.index()] else { continue };
                        if when == MakeConstants::EachTime {
                            made.clear();
                        }
                        *register = self.make(constant, &mut made);
                    }
                    self.ops.push(Op::Run(instruction));
                }
            }
        }
    }

    /// The register that holds `constant`, which is made now unless it is among those already `made`.
    fn make(&mut self, constant: Constant, made: &mut BTreeMap<Constant, Register>) -> Register {
        if let Some(register) = made.get(&constant) {
            return *register;
        }
        let to = self.register(Class::Vector);
        self.ops.push(Op::Constant { to, constant });
        made.insert(constant, to);
        to
    }
}
