//! The portable machine: Cranelift's IR with 128-bit vectors, on x86-64 and aarch64.
//!
//! Cranelift types its vectors and ours are untyped, so each operation bit-casts its operands to the lanes it reads;
//! casts between vectors cost nothing. Where an architecture has one instruction for an operation, Cranelift finds it
//! by pattern; the patterns are noted where they matter.

use std::collections::BTreeMap;

use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::immediates::V128Imm;
use cranelift_codegen::ir::{
    AbiParam, Block, ConstantData, DebugTag, Endianness, Function, InstBuilder, MemFlagsData, Signature, Type,
    UserFuncName, Value, types,
};
use cranelift_codegen::isa::{self, CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{CodegenError, Context};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext, Variable};

use iced_x86::{Decoder, DecoderOptions, OpKind};

use super::{Code, Int, IntVariable, Loop, LoopNote, Machine, Vector, VectorVariable, splat_float};
use crate::{Arch, Cpu, Feature};

/// The target that Cranelift compiles for: `cpu` with exactly its features.
pub(crate) fn isa(cpu: &Cpu) -> Result<OwnedTargetIsa, CodegenError> {
    let unsupported = |error: &dyn std::fmt::Display| CodegenError::Unsupported(error.to_string());
    let mut flags = settings::builder();
    for (name, value) in [
        ("opt_level", "speed"),
        ("is_pic", "false"),
        ("use_colocated_libcalls", "false"),
        ("unwind_info", "false"),
        ("enable_probestack", "false"),
        ("enable_verifier", if cfg!(debug_assertions) { "true" } else { "false" }),
    ] {
        flags.set(name, value).map_err(|error| unsupported(&error))?;
    }
    let name = match cpu.arch() {
        Arch::X86_64 => "x86_64-unknown-linux-gnu",
        Arch::Aarch64 => "aarch64-unknown-linux-gnu",
    };
    let mut builder = isa::lookup_by_name(name).map_err(|error| unsupported(&error))?;
    for setting in cpu.features().filter_map(Feature::cranelift_setting) {
        builder.enable(setting).map_err(|error| unsupported(&error))?;
    }
    builder.finish(settings::Flags::new(flags))
}

/// Compiles the function that `emit` describes.
pub(crate) fn compile(cpu: &Cpu, emit: impl FnOnce(&mut dyn Machine)) -> Result<Code, CodegenError> {
    let isa = isa(cpu)?;
    let (function, loops) = function(&isa, cpu, Marks::None, emit);
    let mut context = Context::for_function(function);
    let compiled = context.compile(&*isa, &mut ControlPlane::default()).map_err(|error| error.inner)?;
    if !compiled.buffer.relocs().is_empty() {
        return Err(CodegenError::Unsupported("a kernel that calls other code".to_owned()));
    }
    let bytes = compiled.code_buffer().to_vec();
    Ok(Code { instructions: bytes.len(), bytes, alignment: compiled.buffer.alignment.into(), loops })
}

/// Finds the loops of `code`, which is what `emit` describes, if it is for x86-64.
///
/// It is compiled once more with a mark at the start of each loop. A mark is no instruction, but it may change which
/// registers are taken, and so where everything lies. It does not change the order of blocks, in which only loops go back:
/// the first place that is branched back to is the first that is marked, and so on.
pub(crate) fn locate_loops(
    cpu: &Cpu,
    emit: impl FnOnce(&mut dyn Machine),
    code: &mut Code,
) -> Result<(), CodegenError> {
    if cpu.arch() != Arch::X86_64 {
        return Ok(());
    }
    let isa = isa(cpu)?;
    let mut context = Context::for_function(function(&isa, cpu, Marks::Loops, emit).0);
    let marked = context.compile(&*isa, &mut ControlPlane::default()).map_err(|error| error.inner)?;
    let mut marks: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for tags in marked.buffer.debug_tags() {
        let numbers = tags.tags.iter().filter_map(|tag| match tag {
            DebugTag::User(number) => Some(*number as usize),
            _ => None,
        });
        marks.entry(tags.offset).or_default().extend(numbers);
    }
    // From where is gone back to, to the end of the last branch that does.
    let mut loops = BTreeMap::new();
    for branch in Decoder::new(64, &code.bytes, DecoderOptions::NONE) {
        if branch.op0_kind() == OpKind::NearBranch64 && branch.near_branch_target() <= branch.ip() {
            loops.insert(branch.near_branch_target() as usize, branch.next_ip() as usize);
        }
    }
    if marks.len() == loops.len() {
        for (numbers, (start, end)) in marks.into_values().zip(loops) {
            for number in numbers {
                if let Some(note) = code.loops.get_mut(number) {
                    note.code = Some(start..end);
                }
            }
        }
    }
    Ok(())
}

/// The IR of the function that `emit` describes.
pub(crate) fn text(cpu: &Cpu, emit: impl FnOnce(&mut dyn Machine)) -> Result<String, CodegenError> {
    Ok(function(&isa(cpu)?, cpu, Marks::None, emit).0.display().to_string())
}

/// What is marked in a function.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Marks {
    None,
    /// The start of loop i of the list with tag i.
    Loops,
}

/// Builds the IR of the function that `emit` describes, and the list of its loops.
fn function(
    isa: &OwnedTargetIsa,
    cpu: &Cpu,
    marks: Marks,
    emit: impl FnOnce(&mut dyn Machine),
) -> (Function, Vec<LoopNote>) {
    let convention = match cpu.arch() {
        Arch::X86_64 => CallConv::SystemV,
        Arch::Aarch64 => isa.default_call_conv(),
    };
    let mut signature = Signature::new(convention);
    signature.params.push(AbiParam::new(types::I64));
    let mut function = Function::with_name_signature(UserFuncName::default(), signature);
    let mut context = FunctionBuilderContext::new();
    let mut builder = FunctionBuilder::new(&mut function, &mut context);
    let entry = builder.create_block();
    builder.append_block_params_for_function_params(entry);
    builder.switch_to_block(entry);
    let record = builder.block_params(entry)[0];
    let mut machine = Clif { builder, cpu: *cpu, record, loops: Vec::new(), notes: Vec::new(), next_name: None, marks };
    emit(&mut machine);
    let Clif { mut builder, loops, notes, .. } = machine;
    debug_assert!(loops.is_empty(), "every loop is closed");
    builder.ins().return_(&[]);
    builder.seal_all_blocks();
    builder.finalize(isa.frontend_config());
    (function, notes)
}

/// An open loop: where it turns, where it goes on, and its counter.
struct OpenLoop {
    head: Block,
    exit: Block,
    counter: Option<Variable>,
}

struct Clif<'a> {
    builder: FunctionBuilder<'a>,
    cpu: Cpu,
    record: Value,
    loops: Vec<OpenLoop>,
    /// All loops so far.
    notes: Vec<LoopNote>,
    next_name: Option<&'static str>,
    marks: Marks,
}

/// Vectors are only ever reinterpreted, in memory order.
fn cast_flags() -> MemFlagsData {
    MemFlagsData::new().with_endianness(Endianness::Little)
}

/// What a kernel reads and never writes: Cranelift may then place the load where its value is needed. Without that, all
/// loads of a loop body come first, in order, and their values spill.
fn input_flags() -> MemFlagsData {
    memory_flags().with_readonly().with_can_move()
}

/// Kernels read and write only what [`Kernel::run`](crate::Kernel::run) has checked; nothing is assumed aligned.
fn memory_flags() -> MemFlagsData {
    MemFlagsData::new().with_notrap().with_endianness(Endianness::Little)
}

impl Clif<'_> {
    fn typed(&mut self, vector: Vector, lanes: Type) -> Value {
        let value = Value::from_u32(vector.0);
        if self.builder.func.dfg.value_type(value) == lanes {
            value
        } else {
            self.builder.ins().bitcast(lanes, cast_flags(), value)
        }
    }

    fn binary(
        &mut self,
        lanes: Type,
        a: Vector,
        b: Vector,
        operation: impl FnOnce(&mut FunctionBuilder<'_>, Value, Value) -> Value,
    ) -> Vector {
        let (a, b) = (self.typed(a, lanes), self.typed(b, lanes));
        vector(operation(&mut self.builder, a, b))
    }

    fn vector_constant(&mut self, bytes: [u8; 16]) -> Vector {
        let constant = self.builder.func.dfg.constants.insert(ConstantData::from(V128Imm(bytes).0.as_slice()));
        vector(self.builder.ins().vconst(types::I8X16, constant))
    }

    fn load_typed(&mut self, lanes: Type, address: Int, offset: i32) -> Value {
        self.builder.ins().load(lanes, input_flags(), Value::from_u32(address.0), offset)
    }

    /// The bytes of `a` and `b` in another order: `byte(first, i)` is the number of byte i of a result, with `first` 0
    /// for one result and 8 for the other.
    fn shuffle(&mut self, a: Vector, b: Vector, byte: impl Fn(usize, usize) -> usize) -> [Vector; 2] {
        let (a, b) = (self.typed(a, types::I8X16), self.typed(b, types::I8X16));
        [0, 8].map(|first| {
            let bytes = std::array::from_fn::<u8, 16, _>(|i| byte(first, i) as u8);
            let mask = self.builder.func.dfg.immediates.push(ConstantData::from(bytes.as_slice()));
            vector(self.builder.ins().shuffle(a, b, mask))
        })
    }

    /// `a · b + c` of the lower two lanes, as `f32` in the lower two lanes.
    ///
    /// Products of two `f32` are exact in `f64`. So is the sum's error, found by Knuth's two-sum. If there is one, the sum
    /// is made odd in its last bit (rounded to odd): then rounding it once more, to `f32`, is as good as rounding once
    /// (Boldo and Melquiond, 2008).
    fn multiply_add_wide(&mut self, abc: [Value; 3]) -> Vector {
        let [a, b, c] = abc.map(|v| self.builder.ins().fvpromote_low(v));
        let product = self.builder.ins().fmul(a, b);
        let sum = self.builder.ins().fadd(product, c);
        let of_product = self.builder.ins().fsub(sum, c);
        let of_c = self.builder.ins().fsub(sum, of_product);
        let (lost_product, lost_c) = (self.builder.ins().fsub(product, of_product), self.builder.ins().fsub(c, of_c));
        let error = self.builder.ins().fadd(lost_product, lost_c);

        // One step of the last bit towards the error, if there is an error (no NaN, as of an infinite sum) and the bit is 0.
        let [sum_bits, error_bits] = [sum, error].map(|v| self.builder.ins().bitcast(types::I64X2, cast_flags(), v));
        let signs = self.builder.ins().bxor(sum_bits, error_bits);
        let differ = self.builder.ins().ushr_imm_u(signs, 63);
        let twice = self.builder.ins().iadd(differ, differ);
        let [zero, one] = [0, 1].map(|value| {
            let value = self.builder.ins().iconst(types::I64, value);
            self.builder.ins().splat(types::I64X2, value)
        });
        let step = self.builder.ins().isub(one, twice);
        let last = self.builder.ins().band(sum_bits, one);
        let even = self.builder.ins().icmp(IntCC::Equal, last, zero);
        let exact = self.builder.ins().bitcast(types::F64X2, cast_flags(), zero);
        let error = self.builder.ins().fabs(error);
        let inexact = self.builder.ins().fcmp(FloatCC::GreaterThan, error, exact);
        let step = self.builder.ins().band(step, even);
        let step = self.builder.ins().band(step, inexact);
        let odd = self.builder.ins().iadd(sum_bits, step);
        let odd = self.builder.ins().bitcast(types::F64X2, cast_flags(), odd);
        vector(self.builder.ins().fvdemote(odd))
    }

    /// Writes down a loop whose code is what comes next.
    fn open(&mut self, head: Block, exit: Block, counter: Option<Variable>, turns: Option<i32>) -> Loop {
        self.loops.push(OpenLoop { head, exit, counter });
        if self.marks == Marks::Loops {
            let mark = self.builder.ins().sequence_point();
            self.builder.func.debug_tags.set(mark, [DebugTag::User(self.notes.len() as u32)]);
        }
        let turns = turns.and_then(|turns| u32::try_from(turns).ok());
        let (name, block) = (self.next_name.take(), Some(head.as_u32()));
        self.notes.push(LoopNote { name, turns, block, ..LoopNote::default() });
        Loop(self.loops.len())
    }
}

fn vector(value: Value) -> Vector {
    Vector(value.as_u32())
}

fn int(value: Value) -> Int {
    Int(value.as_u32())
}

impl Machine for Clif<'_> {
    fn vector_bytes(&self) -> usize {
        16
    }

    fn field(&mut self, number: usize) -> Int {
        let offset = 8 * number as i32;
        int(self.builder.ins().load(types::I64, input_flags(), self.record, offset))
    }

    fn add(&mut self, a: Int, b: Int) -> Int {
        int(self.builder.ins().iadd(Value::from_u32(a.0), Value::from_u32(b.0)))
    }

    fn constant(&mut self, value: i32) -> Int {
        int(self.builder.ins().iconst(types::I64, i64::from(value)))
    }

    fn min(&mut self, a: Int, b: Int) -> Int {
        int(self.builder.ins().smin(Value::from_u32(a.0), Value::from_u32(b.0)))
    }

    fn shift_left(&mut self, a: Int, bits: u8) -> Int {
        int(self.builder.ins().ishl_imm_u(Value::from_u32(a.0), i64::from(bits)))
    }

    fn load_byte(&mut self, address: Int, offset: i32) -> Int {
        int(self.builder.ins().uload8(types::I64, input_flags(), Value::from_u32(address.0), offset))
    }

    fn load32(&mut self, address: Int, offset: i32) -> Int {
        int(self.builder.ins().uload32(input_flags(), Value::from_u32(address.0), offset))
    }

    fn copy32(&mut self, from: Int, from_offset: i32, to: Int, to_offset: i32) {
        let value = self.builder.ins().load(types::I32, memory_flags(), Value::from_u32(from.0), from_offset);
        self.builder.ins().store(memory_flags(), value, Value::from_u32(to.0), to_offset);
    }

    fn add_constant(&mut self, a: Int, constant: i32) -> Int {
        int(self.builder.ins().iadd_imm_s(Value::from_u32(a.0), i64::from(constant)))
    }

    fn int_variable(&mut self, initial: Int) -> IntVariable {
        let variable = self.builder.declare_var(types::I64);
        self.builder.def_var(variable, Value::from_u32(initial.0));
        IntVariable(variable.as_u32())
    }

    fn get_int(&mut self, variable: IntVariable) -> Int {
        int(self.builder.use_var(Variable::from_u32(variable.0)))
    }

    fn set_int(&mut self, variable: IntVariable, value: Int) {
        self.builder.def_var(Variable::from_u32(variable.0), Value::from_u32(value.0));
    }

    fn vector_variable(&mut self, initial: Vector) -> VectorVariable {
        let variable = self.builder.declare_var(types::I8X16);
        let initial = self.typed(initial, types::I8X16);
        self.builder.def_var(variable, initial);
        VectorVariable(variable.as_u32())
    }

    fn get(&mut self, variable: VectorVariable) -> Vector {
        vector(self.builder.use_var(Variable::from_u32(variable.0)))
    }

    fn set(&mut self, variable: VectorVariable, value: Vector) {
        let value = self.typed(value, types::I8X16);
        self.builder.def_var(Variable::from_u32(variable.0), value);
    }

    fn name_loop(&mut self, name: Option<&'static str>) {
        self.next_name = name;
    }

    fn begin_repeat(&mut self, turns: i32) -> Loop {
        let counter = self.builder.declare_var(types::I64);
        let count = self.builder.ins().iconst(types::I64, i64::from(turns));
        self.builder.def_var(counter, count);
        let (head, exit) = (self.builder.create_block(), self.builder.create_block());
        self.builder.ins().jump(head, &[]);
        self.builder.switch_to_block(head);
        self.open(head, exit, Some(counter), Some(turns))
    }

    fn begin_while_at_least(&mut self, variable: IntVariable, bound: i32) -> Loop {
        let (head, body, exit) =
            (self.builder.create_block(), self.builder.create_block(), self.builder.create_block());
        self.builder.ins().jump(head, &[]);
        self.builder.switch_to_block(head);
        let open = self.open(head, exit, None, None);
        let value = self.builder.use_var(Variable::from_u32(variable.0));
        let more = self.builder.ins().icmp_imm_s(IntCC::SignedGreaterThanOrEqual, value, i64::from(bound));
        self.builder.ins().brif(more, body, &[], exit, &[]);
        self.builder.switch_to_block(body);
        open
    }

    fn end_loop(&mut self, open: Loop) {
        debug_assert_eq!(open.0, self.loops.len(), "the loop that was opened last is closed first");
        let Some(OpenLoop { head, exit, counter }) = self.loops.pop() else { return };
        match counter {
            None => {
                self.builder.ins().jump(head, &[]);
            }
            Some(counter) => {
                let value = self.builder.use_var(counter);
                let value = self.builder.ins().iadd_imm_s(value, -1);
                self.builder.def_var(counter, value);
                self.builder.ins().brif(value, head, &[], exit, &[]);
            }
        }
        self.builder.switch_to_block(exit);
    }

    fn constant_bytes(&mut self, bytes: &[u8]) -> Vector {
        self.vector_constant(std::array::from_fn(|i| bytes[i]))
    }

    fn zero(&mut self) -> Vector {
        self.vector_constant([0; 16])
    }

    fn splat8(&mut self, value: u8) -> Vector {
        self.vector_constant([value; 16])
    }

    fn splat16(&mut self, value: u16) -> Vector {
        let bytes = value.to_le_bytes();
        self.vector_constant(std::array::from_fn(|i| bytes[i % 2]))
    }

    fn splat32(&mut self, value: i32) -> Vector {
        let bytes = value.to_le_bytes();
        self.vector_constant(std::array::from_fn(|i| bytes[i % 4]))
    }

    fn load(&mut self, address: Int, offset: i32) -> Vector {
        vector(self.load_typed(types::I8X16, address, offset))
    }

    fn load_table(&mut self, address: Int, offset: i32) -> Vector {
        self.load(address, offset)
    }

    fn load_splat32(&mut self, address: Int, offset: i32) -> Vector {
        let value = self.load_typed(types::I32, address, offset);
        vector(self.builder.ins().splat(types::I32X4, value))
    }

    fn load_result(&mut self, address: Int, offset: i32) -> Vector {
        vector(self.builder.ins().load(types::I8X16, memory_flags(), Value::from_u32(address.0), offset))
    }

    fn load_widened8(&mut self, address: Int, offset: i32) -> Vector {
        vector(self.builder.ins().sload8x8(memory_flags(), Value::from_u32(address.0), offset))
    }

    fn store(&mut self, address: Int, offset: i32, value: Vector) {
        self.builder.ins().store(memory_flags(), Value::from_u32(value.0), Value::from_u32(address.0), offset);
    }

    fn store64(&mut self, address: Int, offset: i32, value: Vector, part: usize) {
        let value = self.typed(value, types::I64X2);
        let value = self.builder.ins().extractlane(value, part as u8);
        self.builder.ins().store(memory_flags(), value, Value::from_u32(address.0), offset);
    }

    fn store128(&mut self, address: Int, offset: i32, value: Vector, _part: usize) {
        self.store(address, offset, value);
    }

    fn store32(&mut self, address: Int, offset: i32, value: Vector) {
        let value = self.typed(value, types::I32X4);
        let value = self.builder.ins().extractlane(value, 0);
        self.builder.ins().store(memory_flags(), value, Value::from_u32(address.0), offset);
    }

    fn prefetch(&mut self, _address: Int, _offset: i32) {
        // Cranelift has no such instruction; `Schedule::check` allows no distance here.
    }

    fn prefetch_second_level(&mut self, address: Int, offset: i32) {
        self.prefetch(address, offset);
    }

    fn and(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I8X16, a, b, |builder, a, b| builder.ins().band(a, b))
    }

    fn add8(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I8X16, a, b, |builder, a, b| builder.ins().iadd(a, b))
    }

    fn sub8(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I8X16, a, b, |builder, a, b| builder.ins().isub(a, b))
    }

    fn min8(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I8X16, a, b, |builder, a, b| builder.ins().umin(a, b))
    }

    fn add16(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I16X8, a, b, |builder, a, b| builder.ins().iadd(a, b))
    }

    fn sub16(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I16X8, a, b, |builder, a, b| builder.ins().isub(a, b))
    }

    fn add32(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I32X4, a, b, |builder, a, b| builder.ins().iadd(a, b))
    }

    fn sub32(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I32X4, a, b, |builder, a, b| builder.ins().isub(a, b))
    }

    fn shift_left16(&mut self, a: Vector, bits: u8) -> Vector {
        let a = self.typed(a, types::I16X8);
        vector(self.builder.ins().ishl_imm_u(a, i64::from(bits)))
    }

    fn shift_right16(&mut self, a: Vector, bits: u8) -> Vector {
        let a = self.typed(a, types::I16X8);
        vector(self.builder.ins().ushr_imm_u(a, i64::from(bits)))
    }

    fn shift_left32(&mut self, a: Vector, bits: u8) -> Vector {
        let a = self.typed(a, types::I32X4);
        vector(self.builder.ins().ishl_imm_u(a, i64::from(bits)))
    }

    fn shift_right_signed32(&mut self, a: Vector, bits: u8) -> Vector {
        let a = self.typed(a, types::I32X4);
        vector(self.builder.ins().sshr_imm_u(a, i64::from(bits)))
    }

    fn multiply32(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::I32X4, a, b, |builder, a, b| builder.ins().imul(a, b))
    }

    fn multiply_add_pairs(&mut self, unsigned: Vector, signed: Vector) -> Vector {
        let x86 = self.cpu.arch() == Arch::X86_64 && self.cpu.has(Feature::Ssse3);
        self.binary(types::I8X16, unsigned, signed, |builder, unsigned, signed| {
            if x86 {
                return builder.ins().x86_pmaddubsw(signed, unsigned);
            }
            // With both operands widened signed, which is the same for codes, aarch64 has one instruction per half (`smull`).
            let (low, high) = (builder.ins().swiden_low(unsigned), builder.ins().swiden_high(unsigned));
            let (signed_low, signed_high) = (builder.ins().swiden_low(signed), builder.ins().swiden_high(signed));
            let (low, high) = (builder.ins().imul(low, signed_low), builder.ins().imul(high, signed_high));
            builder.ins().iadd_pairwise(low, high)
        })
    }

    fn sum_pairs16(&mut self, a: Vector) -> Vector {
        // Matched as one `pmaddwd` with ones, or `saddlp`.
        let a = self.typed(a, types::I16X8);
        let (low, high) = (self.builder.ins().swiden_low(a), self.builder.ins().swiden_high(a));
        vector(self.builder.ins().iadd_pairwise(low, high))
    }

    fn dot(&mut self, sum: Vector, unsigned: Vector, signed: Vector) -> Vector {
        // Cranelift has no such operation; it recognises this tree as `vpdpbusd` (signed operand first, the other widened
        // unsigned) or as `sdot` (both widened signed, which is the same for values up to 127).
        let x86 = self.cpu.arch() == Arch::X86_64;
        let sum = self.typed(sum, types::I32X4);
        let (unsigned, signed) = (self.typed(unsigned, types::I8X16), self.typed(signed, types::I8X16));
        let builder = &mut self.builder;
        let (u_low, u_high) = if x86 {
            (builder.ins().uwiden_low(unsigned), builder.ins().uwiden_high(unsigned))
        } else {
            (builder.ins().swiden_low(unsigned), builder.ins().swiden_high(unsigned))
        };
        let (s_low, s_high) = (builder.ins().swiden_low(signed), builder.ins().swiden_high(signed));
        let halves = [builder.ins().imul(s_low, u_low), builder.ins().imul(s_high, u_high)];
        let [low, high] = halves.map(|products| {
            let (low, high) = (builder.ins().swiden_low(products), builder.ins().swiden_high(products));
            builder.ins().iadd_pairwise(low, high)
        });
        let dot = builder.ins().iadd_pairwise(low, high);
        vector(builder.ins().iadd(dot, sum))
    }

    fn dot_takes_any_byte(&self) -> bool {
        // `sdot` does not.
        self.cpu.arch() == Arch::X86_64
    }

    fn sum_lanes32(&mut self, vectors: [Vector; 4]) -> Vector {
        let [a, b, c, d] = vectors.map(|v| self.typed(v, types::I32X4));
        let (low, high) = (self.builder.ins().iadd_pairwise(a, b), self.builder.ins().iadd_pairwise(c, d));
        vector(self.builder.ins().iadd_pairwise(low, high))
    }

    fn lookup(&mut self, table: Vector, index: Vector) -> Vector {
        let x86 = self.cpu.arch() == Arch::X86_64;
        self.binary(types::I8X16, table, index, |builder, table, index| {
            // `swizzle` gives 0 for indices over 15, which costs `pshufb` a correction that nobody needs here.
            if x86 { builder.ins().x86_pshufb(table, index) } else { builder.ins().swizzle(table, index) }
        })
    }

    fn lookup128(&mut self, table: &[u8; 128], index: Vector) -> Vector {
        // Sixteen entries at a time; `swizzle` gives 0 where the index is not among them.
        let parts = table.as_chunks().0.iter().enumerate().filter(|(_, part)| **part != [0; 16]);
        let mut result = self.zero();
        for (i, part) in parts {
            let first = self.splat8(16 * i as u8);
            let index = self.sub8(index, first);
            let part = self.vector_constant(*part);
            let found =
                self.binary(types::I8X16, part, index, |builder, part, index| builder.ins().swizzle(part, index));
            result = self.binary(types::I8X16, result, found, |builder, a, b| builder.ins().bor(a, b));
        }
        result
    }

    fn load_signed_table(&mut self, address: Int, offset: i32) -> Vector {
        self.load_table(address, offset)
    }

    fn lookup_signed(&mut self, tables: [Vector; 2], index: Vector, signs: Vector, bit: u8) -> [Vector; 2] {
        let nibble = self.splat8(15);
        let index = self.and(index, nibble);
        // With the sign on top of its byte, one comparison makes it all bits of the byte; what comes in from below does not
        // matter.
        let signs = if bit == 7 { signs } else { self.shift_left16(signs, 7 - bit) };
        let minus_one = self.splat8(255);
        let flipped = self.binary(types::I8X16, signs, minus_one, |builder, signs, minus_one| {
            builder.ins().icmp(IntCC::SignedGreaterThan, signs, minus_one)
        });
        tables.map(|table| {
            let entries = self.lookup(table, index);
            self.binary(types::I8X16, entries, flipped, |builder, a, b| builder.ins().bxor(a, b))
        })
    }

    fn interleave16(&mut self, a: Vector, b: Vector) -> [Vector; 2] {
        // Lane pairs (a₀ b₀ a₁ b₁ …) of two bytes each; bytes of `b` are numbered from 16.
        self.shuffle(a, b, |first, i| first + i / 4 * 2 + i % 2 + i / 2 % 2 * 16)
    }

    fn interleave8(&mut self, a: Vector, b: Vector) -> [Vector; 2] {
        self.shuffle(a, b, |first, i| first + i / 2 + i % 2 * 16)
    }

    fn interleave16_within(&mut self, a: Vector, b: Vector) -> [Vector; 2] {
        self.shuffle(a, b, |first, i| first + i / 4 * 2 + i % 2 + i / 2 % 2 * 16)
    }

    fn deinterleave8(&mut self, a: Vector, b: Vector) -> [Vector; 2] {
        if self.cpu.arch() == Arch::Aarch64 {
            // `uzp1` and `uzp2`.
            return self.shuffle(a, b, |first, i| 2 * i + first / 8);
        }
        let bytes = self.splat16(0xff);
        let (even_a, even_b) = (self.and(a, bytes), self.and(b, bytes));
        let (odd_a, odd_b) = (self.shift_right16(a, 8), self.shift_right16(b, 8));
        [(even_a, even_b), (odd_a, odd_b)]
            .map(|(a, b)| self.binary(types::I16X8, a, b, |builder, a, b| builder.ins().unarrow(a, b)))
    }

    fn exchange32(&mut self, a: Vector, distance: usize) -> Vector {
        let [exchanged, _] = self.shuffle(a, a, |_, i| i ^ (4 * distance));
        exchanged
    }

    fn widen16(&mut self, a: Vector) -> [Vector; 2] {
        let a = self.typed(a, types::I16X8);
        [self.builder.ins().uwiden_low(a), self.builder.ins().uwiden_high(a)].map(vector)
    }

    fn widen_signed16(&mut self, a: Vector) -> [Vector; 2] {
        let a = self.typed(a, types::I16X8);
        [self.builder.ins().swiden_low(a), self.builder.ins().swiden_high(a)].map(vector)
    }

    fn add_float(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::F32X4, a, b, |builder, a, b| builder.ins().fadd(a, b))
    }

    fn multiply_float(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::F32X4, a, b, |builder, a, b| builder.ins().fmul(a, b))
    }

    fn divide_float(&mut self, a: Vector, b: Vector) -> Vector {
        self.binary(types::F32X4, a, b, |builder, a, b| builder.ins().fdiv(a, b))
    }

    fn square_root_float(&mut self, a: Vector) -> Vector {
        let a = self.typed(a, types::F32X4);
        vector(self.builder.ins().sqrt(a))
    }

    fn multiply_add_float(&mut self, a: Vector, b: Vector, c: Vector) -> Vector {
        let [a, b, c] = [a, b, c].map(|v| self.typed(v, types::F32X4));
        if self.cpu.arch() == Arch::Aarch64 || self.cpu.has(Feature::Fma) {
            return vector(self.builder.ins().fma(a, b, c));
        }
        // Without the instruction Cranelift would call a function.
        let upper = [a, b, c].map(|v| {
            let [upper, _] = self.shuffle(vector(v), vector(v), |_, i| (i + 8) % 16);
            self.typed(upper, types::F32X4)
        });
        let (low, high) = (self.multiply_add_wide([a, b, c]), self.multiply_add_wide(upper));
        let [halves, _] = self.shuffle(low, high, |_, i| i % 8 + i / 8 * 16);
        halves
    }

    fn larger_float(&mut self, a: Vector, b: Vector) -> Vector {
        // Matched as one `maxps`, whose rule for NaN this is.
        self.binary(types::F32X4, a, b, |builder, a, b| {
            let less = builder.ins().fcmp(FloatCC::LessThan, b, a);
            let less = builder.ins().bitcast(types::F32X4, cast_flags(), less);
            builder.ins().bitselect(less, a, b)
        })
    }

    fn round_float(&mut self, a: Vector) -> Vector {
        // Numbers from 2²³ to 2²⁴ have no fraction: adding 1.5·2²³ rounds, and leaves the number in the low bits.
        let a = self.typed(a, types::F32X4);
        let is_number = self.builder.ins().fcmp(FloatCC::Ordered, a, a);
        let a = self.and(vector(a), vector(is_number));
        let whole = splat_float(self, 12_582_912.0);
        self.add_float(a, whole)
    }
}
