//! The wide x86 machine: AVX2 and AVX-512 code, which Cranelift's IR has no vectors for.
//!
//! Operations are written down ([`program`]), given physical registers ([`allocate`]) and assembled ([`assemble`]).
//! Instructions work on 128-bit parts where ours work on whole vectors; where that differs, a permutation follows.

mod allocate;
mod assemble;
mod encoding;
mod program;

use iced_x86::Code as X86;

use self::allocate::{Assignment, allocate};
use self::encoding::{Isa, Operation};
use self::program::{
    Address, Class, Constant, Counting, Instruction, Load, MakeConstants, MemoryForm, Op, Operand, Program, Register,
    View,
};
use super::{Argument, Code, Int, IntVariable, Loop, Machine, Vector, VectorVariable};
use crate::{Cpu, Feature, MachineKind};

/// Registers of one kind ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfRegisters {
    /// Which registers.
    pub(crate) kind: &'static str,
    /// How many the function keeps live at once.
    pub(crate) needed: usize,
    /// How many there are.
    pub(crate) available: usize,
}

/// A wide machine on a CPU that has what it needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    isa: Isa,
    /// The four-way dot product at this width.
    dot: X86,
}

impl Target {
    /// The target of a machine; `None` if it is no wide one.
    pub(crate) const fn new(machine: MachineKind, cpu: &Cpu) -> Option<Self> {
        match machine {
            MachineKind::Clif128 => None,
            // Without AVX-VNNI the AVX-512 encoding does the same with the same sixteen registers.
            MachineKind::Avx2 if cpu.has(Feature::AvxVnni) => {
                Some(Self { isa: Isa::Avx2, dot: X86::VEX_Vpdpbusd_ymm_ymm_ymmm256 })
            }
            MachineKind::Avx2 => Some(Self { isa: Isa::Avx2, dot: X86::EVEX_Vpdpbusd_ymm_k1z_ymm_ymmm256b32 }),
            MachineKind::Avx512 => Some(Self { isa: Isa::Avx512, dot: X86::EVEX_Vpdpbusd_zmm_k1z_zmm_zmmm512b32 }),
        }
    }

    /// Vector registers that there are.
    pub(crate) const fn vector_registers(self) -> usize {
        self.isa.registers()
    }
}

/// Compiles the function that `emit` describes.
pub(crate) fn compile(target: Target, emit: impl FnOnce(&mut dyn Machine)) -> Result<Code, String> {
    let (program, assignment) = record(target, emit).map_err(|error| format!("{error:?}"))?;
    assemble::assemble(target.isa, &program, &assignment).map_err(|error| error.to_string())
}

/// Whether the function that `emit` describes has enough registers.
pub(crate) fn fits(target: Target, emit: impl FnOnce(&mut dyn Machine)) -> Result<(), OutOfRegisters> {
    record(target, emit).map(drop)
}

fn record(target: Target, emit: impl FnOnce(&mut dyn Machine)) -> Result<(Program, Assignment), OutOfRegisters> {
    let mut machine = Wide { target, program: Program::default(), open: Vec::new() };
    machine.program.register(Class::Int);
    emit(&mut machine);
    debug_assert!(machine.open.is_empty(), "every loop is closed");
    let mut program = machine.program;
    program.tidy();
    // Constants stay in registers if there is room for them.
    assign(target, program.clone(), MakeConstants::BeforeLoops)
        .or_else(|_| assign(target, program, MakeConstants::EachTime))
}

fn assign(
    target: Target,
    mut program: Program,
    constants: MakeConstants,
) -> Result<(Program, Assignment), OutOfRegisters> {
    program.place_constants(constants);
    let assignment = allocate(&program);
    for (class, kind, available) in [
        (Class::Int, "general-purpose", assemble::INT_REGISTERS.len()),
        (Class::Vector, "vector", target.isa.registers()),
    ] {
        let needed = assignment.used(&program, class);
        if needed > available {
            return Err(OutOfRegisters { kind, needed, available });
        }
    }
    Ok((program, assignment))
}

/// The recorder.
struct Wide {
    target: Target,
    program: Program,
    /// Numbers of the loops that are open.
    open: Vec<usize>,
}

impl Wide {
    fn push(&mut self, instruction: Instruction) {
        self.program.ops.push(Op::Run(instruction));
    }

    /// A whole vector as an operand.
    fn whole(&self, vector: Vector) -> Operand {
        Operand::Register(Register(vector.0), self.target.isa.view())
    }

    fn instruction<const N: usize>(&self, operation: Operation, operands: [Operand; N]) -> Instruction {
        let encoding = operation.encoding(self.target.isa);
        let mut instruction = Instruction::new(encoding.code, None, operands);
        (instruction.commutes, instruction.memory) = (encoding.commutes, encoding.memory);
        instruction
    }

    /// Records an instruction that writes a new vector.
    fn compute_as<const N: usize>(&mut self, view: View, operation: Operation, operands: [Operand; N]) -> Vector {
        let register = self.program.register(Class::Vector);
        let mut instruction = self.instruction(operation, operands);
        instruction.target = Some((register, view));
        instruction.load = match operation {
            Operation::Load => Some(Load::Vector),
            Operation::LoadSplat32 => Some(Load::Splat32),
            _ => None,
        };
        self.push(instruction);
        Vector(register.0)
    }

    fn compute<const N: usize>(&mut self, operation: Operation, operands: [Operand; N]) -> Vector {
        self.compute_as(self.target.isa.view(), operation, operands)
    }

    fn binary(&mut self, operation: Operation, a: Vector, b: Vector) -> Vector {
        self.compute(operation, [self.whole(a), self.whole(b)])
    }

    fn shift(&mut self, operation: Operation, a: Vector, bits: u8) -> Vector {
        self.compute(operation, [self.whole(a), Operand::Immediate8(bits)])
    }

    fn widen(&mut self, operation: Operation, a: Vector) -> [Vector; 2] {
        let half = self.target.isa.half();
        let upper = self.compute_as(half, Operation::UpperHalf, [self.whole(a), Operand::Immediate8(1)]);
        [a, upper].map(|part| self.compute(operation, [Operand::Register(Register(part.0), half)]))
    }

    fn permute128(&mut self, a: Vector, b: Vector, order: u8) -> Vector {
        self.compute(Operation::Permute128, [self.whole(a), self.whole(b), Operand::Immediate8(order)])
    }

    fn vector_constant(&mut self, constant: Constant) -> Vector {
        Vector(self.program.constant(constant).0)
    }

    /// Records an instruction that changes a copy of `start`.
    fn change(&mut self, code: X86, memory: MemoryForm, start: Vector, operands: [Operand; 2]) -> Vector {
        let register = self.program.register(Class::Vector);
        self.program.ops.push(Op::Copy { to: register, from: Register(start.0) });
        let mut instruction = Instruction::new(code, Some((register, self.target.isa.view())), operands);
        (instruction.reads_target, instruction.memory) = (true, memory);
        self.push(instruction);
        Vector(register.0)
    }

    /// Records an instruction that writes a new integer.
    fn compute_int(&mut self, code: X86, address: Address) -> Int {
        let register = self.program.register(Class::Int);
        let operand = Operand::Memory { address, splat32: false };
        self.push(Instruction::new(code, Some((register, View::Int)), [operand]));
        Int(register.0)
    }

    fn copy(&mut self, class: Class, from: u32) -> Register {
        let to = self.program.register(class);
        self.program.ops.push(Op::Copy { to, from: Register(from) });
        to
    }

    fn begin(&mut self, counting: Counting) -> Loop {
        let number = self.program.loops.len();
        self.program.loops.push(counting);
        self.program.ops.push(Op::Begin(number));
        self.open.push(number);
        Loop(number)
    }
}

fn memory(address: Int, offset: i32) -> Operand {
    Operand::Memory { address: Address { base: Register(address.0), index: None, offset }, splat32: false }
}

impl Machine for Wide {
    fn vector_bytes(&self) -> usize {
        self.target.isa.vector_bytes()
    }

    fn argument(&mut self, argument: Argument) -> Int {
        let offset = 8 * argument as i32;
        self.compute_int(X86::Mov_r64_rm64, Address { base: Program::RECORD, index: None, offset })
    }

    fn add(&mut self, a: Int, b: Int) -> Int {
        self.compute_int(X86::Lea_r64_m, Address { base: Register(a.0), index: Some(Register(b.0)), offset: 0 })
    }

    fn constant(&mut self, value: i32) -> Int {
        let register = self.program.register(Class::Int);
        let operand = Operand::Immediate32(value);
        self.push(Instruction::new(X86::Mov_rm64_imm32, Some((register, View::Int)), [operand]));
        Int(register.0)
    }

    fn min(&mut self, a: Int, b: Int) -> Int {
        let register = self.copy(Class::Int, a.0);
        let operands = [register, Register(b.0)].map(|register| Operand::Register(register, View::Int));
        self.push(Instruction::new(X86::Cmp_r64_rm64, None, operands));
        let mut smaller = Instruction::new(X86::Cmovg_r64_rm64, Some((register, View::Int)), [operands[1]]);
        smaller.reads_target = true;
        self.push(smaller);
        Int(register.0)
    }

    fn shift_left(&mut self, a: Int, bits: u8) -> Int {
        let register = self.copy(Class::Int, a.0);
        let target = Some((register, View::Int));
        let mut shift = Instruction::new(X86::Shl_rm64_imm8, target, [Operand::Immediate8(bits)]);
        shift.reads_target = true;
        self.push(shift);
        Int(register.0)
    }

    fn load_byte(&mut self, address: Int, offset: i32) -> Int {
        self.compute_int(X86::Movzx_r64_rm8, Address { base: Register(address.0), index: None, offset })
    }

    fn load32(&mut self, address: Int, offset: i32) -> Int {
        let register = self.program.register(Class::Int);
        let target = Some((register, View::Int32));
        self.push(Instruction::new(X86::Mov_r32_rm32, target, [memory(address, offset)]));
        Int(register.0)
    }

    fn copy32(&mut self, from: Int, from_offset: i32, to: Int, to_offset: i32) {
        let register = self.program.register(Class::Int);
        let target = Some((register, View::Int32));
        self.push(Instruction::new(X86::Mov_r32_rm32, target, [memory(from, from_offset)]));
        let operands = [memory(to, to_offset), Operand::Register(register, View::Int32)];
        self.push(Instruction::new(X86::Mov_rm32_r32, None, operands));
    }

    fn add_constant(&mut self, a: Int, constant: i32) -> Int {
        self.compute_int(X86::Lea_r64_m, Address { base: Register(a.0), index: None, offset: constant })
    }

    fn int_variable(&mut self, initial: Int) -> IntVariable {
        IntVariable(self.copy(Class::Int, initial.0).0)
    }

    fn get_int(&mut self, variable: IntVariable) -> Int {
        Int(self.copy(Class::Int, variable.0).0)
    }

    fn set_int(&mut self, variable: IntVariable, value: Int) {
        self.program.ops.push(Op::Copy { to: Register(variable.0), from: Register(value.0) });
    }

    fn vector_variable(&mut self, initial: Vector) -> VectorVariable {
        VectorVariable(self.copy(Class::Vector, initial.0).0)
    }

    fn get(&mut self, variable: VectorVariable) -> Vector {
        Vector(self.copy(Class::Vector, variable.0).0)
    }

    fn set(&mut self, variable: VectorVariable, value: Vector) {
        self.program.ops.push(Op::Copy { to: Register(variable.0), from: Register(value.0) });
    }

    fn begin_repeat(&mut self, count: i32) -> Loop {
        let counter = Register(self.constant(count).0);
        self.begin(Counting::Repeat { counter })
    }

    fn begin_while_at_least(&mut self, variable: IntVariable, bound: i32) -> Loop {
        self.begin(Counting::While { variable: Register(variable.0), bound })
    }

    fn end_loop(&mut self, open: Loop) {
        debug_assert_eq!(Some(&open.0), self.open.last(), "the loop that was opened last is closed first");
        self.open.pop();
        self.program.ops.push(Op::End(open.0));
    }

    fn zero(&mut self) -> Vector {
        self.splat32(0)
    }

    fn splat8(&mut self, value: u8) -> Vector {
        self.splat32(i32::from_le_bytes([value; 4]))
    }

    fn splat16(&mut self, value: u16) -> Vector {
        let [low, high] = value.to_le_bytes();
        self.splat32(i32::from_le_bytes([low, high, low, high]))
    }

    fn splat32(&mut self, value: i32) -> Vector {
        self.vector_constant(Constant::Splat32(value.cast_unsigned()))
    }

    fn load(&mut self, address: Int, offset: i32) -> Vector {
        self.compute(Operation::Load, [memory(address, offset)])
    }

    fn load_table(&mut self, address: Int, offset: i32) -> Vector {
        self.compute(Operation::LoadSplat128, [memory(address, offset)])
    }

    fn load_splat32(&mut self, address: Int, offset: i32) -> Vector {
        self.compute(Operation::LoadSplat32, [memory(address, offset)])
    }

    fn load_result(&mut self, address: Int, offset: i32) -> Vector {
        let vector = self.compute(Operation::Load, [memory(address, offset)]);
        if let Some(Op::Run(instruction)) = self.program.ops.last_mut() {
            instruction.load = Some(Load::Result);
        }
        vector
    }

    fn load_widened8(&mut self, address: Int, offset: i32) -> Vector {
        self.compute(Operation::WidenSigned8, [memory(address, offset)])
    }

    fn store(&mut self, address: Int, offset: i32, value: Vector) {
        let instruction = self.instruction(Operation::Store, [memory(address, offset), self.whole(value)]);
        self.push(instruction);
    }

    fn store64(&mut self, address: Int, offset: i32, value: Vector, part: usize) {
        let value = match part / 2 {
            0 => value,
            place => {
                let operands = [self.whole(value), Operand::Immediate8(place as u8)];
                self.compute_as(View::Xmm, Operation::Extract128, operands)
            }
        };
        let operation = [Operation::StoreLow64, Operation::StoreNext64][part % 2];
        let operands = [memory(address, offset), Operand::Register(Register(value.0), View::Xmm)];
        let instruction = self.instruction(operation, operands);
        self.push(instruction);
    }

    fn store_low128(&mut self, address: Int, offset: i32, value: Vector) {
        let operands = [memory(address, offset), self.whole(value), Operand::Immediate8(0)];
        let instruction = self.instruction(Operation::StoreLow128, operands);
        self.push(instruction);
    }

    fn prefetch(&mut self, address: Int, offset: i32) {
        self.push(Instruction::new(X86::Prefetcht0_m8, None, [memory(address, offset)]));
    }

    fn prefetch_second_level(&mut self, address: Int, offset: i32) {
        self.push(Instruction::new(X86::Prefetcht1_m8, None, [memory(address, offset)]));
    }

    fn and(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::And, a, b)
    }

    fn add8(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::Add8, a, b)
    }

    fn sub8(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::Sub8, a, b)
    }

    fn min8(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::Min8, a, b)
    }

    fn add16(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::Add16, a, b)
    }

    fn sub16(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::Sub16, a, b)
    }

    fn add32(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::Add32, a, b)
    }

    fn sub32(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::Sub32, a, b)
    }

    fn shift_left16(&mut self, a: Vector, bits: u8) -> Vector {
        self.shift(Operation::ShiftLeft16, a, bits)
    }

    fn shift_right16(&mut self, a: Vector, bits: u8) -> Vector {
        self.shift(Operation::ShiftRight16, a, bits)
    }

    fn shift_left32(&mut self, a: Vector, bits: u8) -> Vector {
        self.shift(Operation::ShiftLeft32, a, bits)
    }

    fn shift_right_signed32(&mut self, a: Vector, bits: u8) -> Vector {
        self.shift(Operation::ShiftRightSigned32, a, bits)
    }

    fn multiply32(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(Operation::Multiply32, a, b)
    }

    fn multiply_add_pairs(&mut self, unsigned: Vector, signed: Vector) -> Vector {
        self.binary(Operation::MultiplyAddBytes, unsigned, signed)
    }

    fn sum_pairs16(&mut self, a: Vector) -> Vector {
        let ones = self.splat16(1);
        self.binary(Operation::MultiplyAddWords, a, ones)
    }

    fn dot(&mut self, sum: Vector, unsigned: Vector, signed: Vector) -> Vector {
        let memory = match self.target.isa {
            Isa::Avx2 => MemoryForm::Vector,
            Isa::Avx512 => MemoryForm::VectorOrSplat32,
        };
        let operands = [self.whole(unsigned), self.whole(signed)];
        self.change(self.target.dot, memory, sum, operands)
    }

    fn dot_takes_any_byte(&self) -> bool {
        true
    }

    fn sum_lanes32(&mut self, [a, b, c, d]: [Vector; 4]) -> Vector {
        // Two lanes of `a` and of `b` in turn, then one of each of the four, in every 128 bits.
        let [ab, cd] = [(a, b), (c, d)].map(|(a, b)| {
            let (low, high) = (self.binary(Operation::UnpackLow32, a, b), self.binary(Operation::UnpackHigh32, a, b));
            self.add32(low, high)
        });
        let (low, high) = (self.binary(Operation::UnpackLow64, ab, cd), self.binary(Operation::UnpackHigh64, ab, cd));
        let mut sums = self.add32(low, high);
        // Then the 128-bit parts on top of each other.
        let folds: &[u8] = match self.target.isa {
            Isa::Avx2 => &[0b01],
            Isa::Avx512 => &[0b01_00_11_10, 0b10_11_00_01],
        };
        for order in folds {
            let other = self.permute128(sums, sums, *order);
            sums = self.add32(sums, other);
        }
        sums
    }

    fn lookup(&mut self, table: Vector, index: Vector) -> Vector {
        self.binary(Operation::ShuffleBytes, table, index)
    }

    fn lookup128(&mut self, table: &[u8; 128], index: Vector) -> Vector {
        if let (Isa::Avx512, [low, high]) = (self.target.isa, table.as_chunks::<64>().0) {
            let [low, high] = [low, high].map(|half| self.vector_constant(Constant::Bytes(*half)));
            let operands = [self.whole(low), self.whole(high)];
            return self.change(X86::EVEX_Vpermi2b_zmm_k1z_zmm_zmmm512, MemoryForm::No, index, operands);
        }
        // Sixteen entries at a time. Adding 0x70, saturating, sets the top bit of an index beyond them, and the shuffle
        // then gives 0.
        let parts = table.as_chunks::<16>().0.iter().enumerate().filter(|(_, part)| **part != [0; 16]);
        let beyond = self.splat8(0x70);
        let mut result = self.zero();
        for (i, part) in parts {
            let first = self.splat8(16 * i as u8);
            let index = self.sub8(index, first);
            let index = self.binary(Operation::AddSaturating8, index, beyond);
            let part = self.vector_constant(Constant::Bytes(std::array::from_fn(|at| part[at % 16])));
            let found = self.lookup(part, index);
            result = self.binary(Operation::Or, result, found);
        }
        result
    }

    fn interleave16(&mut self, a: Vector, b: Vector) -> [Vector; 2] {
        // Parts 0, 2, 4 … of the result, and parts 1, 3, 5 ….
        let (even, odd) = (self.binary(Operation::UnpackLow16, a, b), self.binary(Operation::UnpackHigh16, a, b));
        match self.target.isa {
            Isa::Avx2 => [0x20, 0x31].map(|order| self.permute128(even, odd, order)),
            Isa::Avx512 => [0, 2].map(|first| {
                // Two parts of each, then these four in turn.
                let parts = self.permute128(even, odd, if first == 0 { 0b01_00_01_00 } else { 0b11_10_11_10 });
                self.permute128(parts, parts, 0b11_01_10_00)
            }),
        }
    }

    fn interleave8(&mut self, a: Vector, b: Vector) -> [Vector; 2] {
        [self.binary(Operation::UnpackLow8, a, b), self.binary(Operation::UnpackHigh8, a, b)]
    }

    fn interleave16_within(&mut self, a: Vector, b: Vector) -> [Vector; 2] {
        [self.binary(Operation::UnpackLow16, a, b), self.binary(Operation::UnpackHigh16, a, b)]
    }

    fn widen16(&mut self, a: Vector) -> [Vector; 2] {
        self.widen(Operation::Widen16, a)
    }

    fn widen_signed16(&mut self, a: Vector) -> [Vector; 2] {
        self.widen(Operation::WidenSigned16, a)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use iced_x86::{CpuidFeature, Decoder, DecoderOptions};

    use super::*;
    use crate::{Columns, KernelSpec, Schedule, emit};

    /// The features that the wide machines may rely on without asking: those of `name`.
    fn allowed(cpu: &Cpu) -> BTreeSet<CpuidFeature> {
        let features = cpu.features().flat_map(|feature| match feature {
            // Every CPU with AVX2 or AVX-512 has AVX.
            Feature::Avx2 => vec![CpuidFeature::AVX, CpuidFeature::AVX2],
            Feature::Avx512f => vec![CpuidFeature::AVX, CpuidFeature::AVX512F],
            Feature::Avx512dq => vec![CpuidFeature::AVX512DQ],
            Feature::Avx512bw => vec![CpuidFeature::AVX512BW],
            Feature::Avx512vl => vec![CpuidFeature::AVX512VL],
            Feature::Avx512vbmi => vec![CpuidFeature::AVX512_VBMI],
            Feature::Avx512vnni => vec![CpuidFeature::AVX512_VNNI],
            Feature::AvxVnni => vec![CpuidFeature::AVX_VNNI],
            _ => Vec::new(),
        });
        let every_x64 = [CpuidFeature::INTEL8086, CpuidFeature::INTEL386, CpuidFeature::X64, CpuidFeature::CMOV];
        features.chain(every_x64).chain([CpuidFeature::SSE, CpuidFeature::MULTIBYTENOP]).collect()
    }

    #[test]
    fn no_instruction_needs_a_feature_that_the_cpu_lacks() {
        let mut cpu: Cpu =
            "x86-64 +ssse3 +avx2 +avx512f +avx512dq +avx512bw +avx512vl +avx512vbmi +avx512vnni +avxvnni"
                .parse()
                .expect("a CPU");
        let mut seen = BTreeSet::new();
        for lost in [
            None,
            Some(Feature::AvxVnni),
            Some(Feature::Avx512vnni),
            Some(Feature::Avx512vbmi),
            Some(Feature::Avx512vl),
        ] {
            cpu = lost.map_or(cpu, |feature| cpu.without(feature));
            let allowed = allowed(&cpu);
            for columns in [Columns::One, Columns::Many] {
                let spec = KernelSpec { k: 1028, columns };
                for schedule in Schedule::candidates(&spec, &cpu) {
                    let Some(target) = Target::new(schedule.machine, &cpu) else { continue };
                    let code = compile(target, |m| emit::emit(m, &spec, &schedule)).expect("a legal schedule");
                    for instruction in Decoder::new(64, &code.bytes[..code.instructions], DecoderOptions::NONE).iter() {
                        for feature in instruction.cpuid_features() {
                            assert!(allowed.contains(feature), "{schedule} on {cpu}: {feature:?} for {instruction:?}");
                            seen.insert(*feature);
                        }
                    }
                }
            }
        }
        assert!(seen.contains(&CpuidFeature::AVX512_VNNI) && seen.contains(&CpuidFeature::AVX_VNNI), "{seen:?}");
    }
}
