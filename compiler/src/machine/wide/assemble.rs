//! From a program with registers to bytes.
//!
//! Instructions first, then the constants that they read relative to the instruction pointer. All jumps are of the long
//! form, so that addresses do not depend on each other: one pass finds them, a second one writes them.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code as X86, Encoder, IcedError, Instruction as X86Instruction, OpKind, Register as X86Register};

use super::allocate::Assignment;
use super::encoding::{Isa, Operation};
use super::program::{Class, Constant, Counting, Instruction, Op, Operand, Program, Register, View};
use crate::machine::Code;

/// General-purpose registers in the order in which they are given out: the argument first, then those that a function
/// may overwrite, then those that it must give back as they were. The stack pointer is none of them.
pub(super) const INT_REGISTERS: [X86Register; 15] = [
    X86Register::RDI,
    X86Register::RSI,
    X86Register::RDX,
    X86Register::RCX,
    X86Register::R8,
    X86Register::R9,
    X86Register::R10,
    X86Register::R11,
    X86Register::RAX,
    X86Register::RBX,
    X86Register::RBP,
    X86Register::R12,
    X86Register::R13,
    X86Register::R14,
    X86Register::R15,
];

/// How many of them need not be given back.
const FREE_INT_REGISTERS: usize = 9;

/// Alignment of the first instruction and of constants.
const ALIGNMENT: usize = 64;

/// Alignment of the first instruction of a loop.
const LOOP_ALIGNMENT: usize = 32;

/// A place in the code that jumps go to: the start of a loop, and what follows it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Start(usize),
    After(usize),
}

/// What the code consists of before addresses are known.
enum Item {
    Instruction(X86Instruction),
    Jump(X86, Label),
    /// Reads a constant, the byte with this number in the pool.
    Constant(X86Instruction, usize),
    Align,
    Place(Label),
}

/// Machine code of a whole program.
pub(super) fn assemble(isa: Isa, program: &Program, assignment: &Assignment) -> Result<Code, IcedError> {
    let mut assembler =
        Assembler { isa, program, assignment, items: Vec::new(), pool: Vec::new(), at: BTreeMap::new() };
    assembler.run()?;
    assembler.layout()
}

struct Assembler<'a> {
    isa: Isa,
    program: &'a Program,
    assignment: &'a Assignment,
    items: Vec<Item>,
    /// Bytes of the constants.
    pool: Vec<u8>,
    /// Where each constant is in `pool`.
    at: BTreeMap<Constant, usize>,
}

impl Assembler<'_> {
    fn run(&mut self) -> Result<(), IcedError> {
        let saved: Vec<_> = INT_REGISTERS
            .into_iter()
            .take(self.assignment.used(self.program, Class::Int))
            .skip(FREE_INT_REGISTERS)
            .collect();
        for register in &saved {
            self.items.push(Item::Instruction(X86Instruction::with1(X86::Push_r64, *register)?));
        }
        for op in &self.program.ops {
            match op {
                Op::Run(instruction) => self.instruction(instruction)?,
                Op::Copy { to, from } => self.copy(*to, *from)?,
                Op::Constant { to, constant } => self.constant(*to, *constant)?,
                Op::Begin(number) => self.begin(*number)?,
                Op::End(number) => self.end(*number)?,
            }
        }
        // Upper halves that stay in use would slow down the caller's older vector code.
        self.items.push(Item::Instruction(X86Instruction::with(X86::VEX_Vzeroupper)));
        for register in saved.iter().rev() {
            self.items.push(Item::Instruction(X86Instruction::with1(X86::Pop_r64, *register)?));
        }
        self.items.push(Item::Instruction(X86Instruction::with(X86::Retnq)));
        Ok(())
    }

    fn physical(&self, register: Register, view: View) -> X86Register {
        let number = self.assignment.number(register);
        match view {
            View::Int => INT_REGISTERS[number],
            View::Int32 => X86Register::EAX + (INT_REGISTERS[number] as u32 - X86Register::RAX as u32),
            View::Xmm => X86Register::XMM0 + number as u32,
            View::Ymm => X86Register::YMM0 + number as u32,
            View::Zmm => X86Register::ZMM0 + number as u32,
        }
    }

    fn instruction(&mut self, instruction: &Instruction) -> Result<(), IcedError> {
        let mut x86 = X86Instruction::new();
        x86.set_code(instruction.code);
        let target = instruction.target.map(|(register, view)| Operand::Register(register, view));
        for (i, operand) in target.into_iter().chain(instruction.operands.into_iter().flatten()).enumerate() {
            let i = i as u32;
            match operand {
                Operand::Register(register, view) => {
                    x86.try_set_op_kind(i, OpKind::Register)?;
                    x86.try_set_op_register(i, self.physical(register, view))?;
                }
                Operand::Memory { address, splat32 } => {
                    x86.try_set_op_kind(i, OpKind::Memory)?;
                    x86.set_memory_base(self.physical(address.base, View::Int));
                    if let Some(index) = address.index {
                        x86.set_memory_index(self.physical(index, View::Int));
                    }
                    if address.offset != 0 {
                        // The shortest form that holds it.
                        x86.set_memory_displ_size(1);
                        x86.set_memory_displacement64(i64::from(address.offset).cast_unsigned());
                    }
                    x86.set_is_broadcast(splat32);
                }
                Operand::Immediate8(value) => {
                    x86.try_set_op_kind(i, OpKind::Immediate8)?;
                    x86.set_immediate8(value);
                }
                Operand::Immediate32(value) => {
                    x86.try_set_op_kind(i, OpKind::Immediate32to64)?;
                    x86.set_immediate32to64(value.into());
                }
            }
        }
        self.items.push(Item::Instruction(x86));
        Ok(())
    }

    fn copy(&mut self, to: Register, from: Register) -> Result<(), IcedError> {
        let (code, view) = match self.program.classes[to.index()] {
            Class::Int => (X86::Mov_r64_rm64, View::Int),
            Class::Vector => (Operation::Move.encoding(self.isa).code, self.isa.view()),
        };
        let (to, from) = (self.physical(to, view), self.physical(from, view));
        if to != from {
            self.items.push(Item::Instruction(X86Instruction::with2(code, to, from)?));
        }
        Ok(())
    }

    fn constant(&mut self, to: Register, constant: Constant) -> Result<(), IcedError> {
        let to = self.physical(to, self.isa.view());
        if constant == Constant::Splat32(0) {
            let clear = Operation::Clear.encoding(self.isa).code;
            self.items.push(Item::Instruction(X86Instruction::with3(clear, to, to, to)?));
            return Ok(());
        }
        let (operation, bytes) = match &constant {
            Constant::Splat32(value) => (Operation::LoadSplat32, &value.to_le_bytes()[..]),
            Constant::Bytes(bytes) => (Operation::Load, &bytes[..self.isa.vector_bytes()]),
        };
        let pool = &mut self.pool;
        let at = *self.at.entry(constant).or_insert_with(|| {
            pool.resize(pool.len().next_multiple_of(bytes.len()), 0);
            pool.extend_from_slice(bytes);
            pool.len() - bytes.len()
        });
        let mut x86 = X86Instruction::new();
        x86.set_code(operation.encoding(self.isa).code);
        x86.try_set_op_kind(0, OpKind::Register)?;
        x86.try_set_op_register(0, to)?;
        x86.try_set_op_kind(1, OpKind::Memory)?;
        x86.set_memory_base(X86Register::RIP);
        x86.set_memory_displ_size(8);
        self.items.push(Item::Constant(x86, at));
        Ok(())
    }

    fn begin(&mut self, number: usize) -> Result<(), IcedError> {
        if let Counting::While { .. } = self.program.loops[number] {
            self.compare(number)?;
            self.items.push(Item::Jump(X86::Jl_rel32_64, Label::After(number)));
        }
        self.items.push(Item::Align);
        self.items.push(Item::Place(Label::Start(number)));
        Ok(())
    }

    fn end(&mut self, number: usize) -> Result<(), IcedError> {
        match self.program.loops[number] {
            Counting::Repeat { counter } => {
                let counter = self.physical(counter, View::Int);
                self.items.push(Item::Instruction(X86Instruction::with2(X86::Sub_rm64_imm8, counter, 1)?));
                self.items.push(Item::Jump(X86::Jne_rel32_64, Label::Start(number)));
            }
            Counting::While { .. } => {
                self.compare(number)?;
                self.items.push(Item::Jump(X86::Jge_rel32_64, Label::Start(number)));
            }
        }
        self.items.push(Item::Place(Label::After(number)));
        Ok(())
    }

    /// Compares the variable of a loop with its bound.
    fn compare(&mut self, number: usize) -> Result<(), IcedError> {
        if let Counting::While { variable, bound } = self.program.loops[number] {
            let variable = self.physical(variable, View::Int);
            self.items.push(Item::Instruction(X86Instruction::with2(X86::Cmp_rm64_imm32, variable, bound)?));
        }
        Ok(())
    }

    /// Finds all addresses and writes the bytes.
    fn layout(self) -> Result<Code, IcedError> {
        let mut labels = BTreeMap::new();
        let mut loops = self.program.notes.clone();
        let mut instructions = 0_usize;
        let mut bytes = Vec::new();
        for _ in 0..2 {
            let pool = instructions.next_multiple_of(ALIGNMENT);
            let mut encoder = Encoder::new(64);
            let mut address = 0_usize;
            for item in &self.items {
                let instruction = match item {
                    Item::Instruction(instruction) => *instruction,
                    Item::Jump(code, label) => {
                        let target = labels.get(label).copied().unwrap_or(0);
                        let jump = X86Instruction::with_branch(*code, target as u64)?;
                        address += encoder.encode(&jump, address as u64)?;
                        if let Label::Start(number) = label
                            && let Some(note) = loops.get_mut(*number)
                        {
                            note.code = Some(target..address);
                        }
                        continue;
                    }
                    Item::Constant(instruction, at) => {
                        let mut instruction = *instruction;
                        instruction.set_memory_displacement64((pool + at) as u64);
                        instruction
                    }
                    Item::Align => {
                        let end = address.next_multiple_of(LOOP_ALIGNMENT);
                        while address < end {
                            let length = (end - address).min(NOPS.len());
                            NOPS[length - 1].iter().for_each(|byte| encoder.write_u8(*byte));
                            address += length;
                        }
                        continue;
                    }
                    Item::Place(label) => {
                        labels.insert(*label, address);
                        continue;
                    }
                };
                address += encoder.encode(&instruction, address as u64)?;
            }
            instructions = address;
            bytes = encoder.take_buffer();
        }
        if !self.pool.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
            bytes.extend(&self.pool);
        }
        for (number, note) in loops.iter_mut().enumerate() {
            let carried = self.program.carried(number);
            let numbers: BTreeSet<_> = carried.into_iter().map(|register| self.assignment.number(register)).collect();
            note.carried = ranges(&numbers, self.isa.view());
        }
        Ok(Code { bytes, instructions, alignment: ALIGNMENT as u64, loops })
    }
}

/// Names of registers, those with numbers in a row as `first-last`.
fn ranges(numbers: &BTreeSet<usize>, view: View) -> Vec<String> {
    let letter = if view == View::Zmm { 'z' } else { 'y' };
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    let name = |(first, last)| match last - first {
        0 => format!("{letter}mm{first}"),
        _ => format!("{letter}mm{first}-{letter}mm{last}"),
    };
    ranges.into_iter().map(name).collect()
}

/// The recommended instructions of 1 to 9 bytes that do nothing.
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];
