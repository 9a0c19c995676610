//! What an emitter may ask of a machine: a few vector operations, counted loops, pointers.
//!
//! Kernel families are written once, over [`Machine`]. Vectors are untyped registers of
//! [`vector_bytes`](Machine::vector_bytes) bytes; every operation says how it reads its lanes, always in order from the
//! lowest address. Values are immutable; what changes from one loop iteration to the next is a variable. A machine that
//! lacks an operation is kept away from it by [`Schedule::check`](crate::Schedule::check).

pub(crate) mod clif;
pub(crate) mod disassembly;
#[cfg(test)]
mod features;
pub(crate) mod wide;

/// Machine code of one function, free of relocations, and what it needs to run.
pub(crate) struct Code {
    /// The instructions, and then the constants that they read.
    pub(crate) bytes: Vec<u8>,
    /// Bytes of the instructions.
    pub(crate) instructions: usize,
    /// Required alignment of the first byte.
    pub(crate) alignment: u64,
}

/// An immutable vector value.
#[derive(Clone, Copy, Debug)]
pub struct Vector(pub(crate) u32);

/// An immutable 64-bit integer or address.
#[derive(Clone, Copy, Debug)]
pub struct Int(pub(crate) u32);

/// A vector that loops may change.
#[derive(Clone, Copy, Debug)]
pub struct VectorVariable(pub(crate) u32);

/// An integer that loops may change.
#[derive(Clone, Copy, Debug)]
pub struct IntVariable(pub(crate) u32);

/// An open loop; give it back to [`Machine::end_loop`].
#[derive(Debug)]
#[must_use]
pub struct Loop(pub(crate) usize);

/// A field of [`KernelArgs`](crate::kernel::KernelArgs), in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Argument {
    /// Address of the first tile of weights.
    Weights,
    /// Number of tiles, at least 1; of places of the list for kernels that read one.
    Tiles,
    /// Address of the first prepared column.
    Activations,
    /// Number of columns, at least 1.
    Columns,
    /// Address of `Σa` of the first column, `i32` each.
    Sums,
    /// Address of the result of the first row in the first column, `i32` each.
    Out,
    /// Bytes from one column of results to the next.
    OutStride,
    /// Address of the last prepared column.
    LastColumn,
    /// Address of memory that the kernel may use as it likes, aligned to 64 bytes.
    Scratch,
    /// Address of the list: where records begin, in bytes from the weights, `u32` each.
    List,
}

/// A field of the argument record of a [`Step`](crate::Step), in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ActivationArgument {
    /// Address of the activations: `k` floats, or int8 values padded with zeros to 64.
    Input,
    /// Address of `k` weights of the norm, `f32`.
    Weights,
    /// Address of the norm's epsilon, `f32`.
    Epsilon,
    /// Address of the results.
    Output,
    /// Address of the scale q, `f32`, followed by `Σa`, `i32`.
    Result,
    /// Address of scratch memory for the last activations of rows that are no multiple of 64.
    Scratch,
}

/// The operations that emitters are written in.
pub trait Machine {
    /// Bytes of a vector.
    fn vector_bytes(&self) -> usize;

    /// Reads the argument record's field of eight bytes with this number.
    fn field(&mut self, number: usize) -> Int;
    /// Reads a field of the argument record of a kernel on weights.
    fn argument(&mut self, argument: Argument) -> Int {
        self.field(argument as usize)
    }
    /// `a + b`.
    fn add(&mut self, a: Int, b: Int) -> Int;
    /// A number.
    fn constant(&mut self, value: i32) -> Int;
    /// The smaller of two addresses or counts.
    fn min(&mut self, a: Int, b: Int) -> Int;
    /// `a · 2^bits`.
    fn shift_left(&mut self, a: Int, bits: u8) -> Int;
    /// An unsigned byte of weights.
    fn load_byte(&mut self, address: Int, offset: i32) -> Int;
    /// An unsigned 32-bit number of an input.
    fn load32(&mut self, address: Int, offset: i32) -> Int;
    /// Copies 32 bits from one address to another, after the stores before it.
    fn copy32(&mut self, from: Int, from_offset: i32, to: Int, to_offset: i32);
    /// `a + constant`.
    fn add_constant(&mut self, a: Int, constant: i32) -> Int;

    /// A new integer variable.
    fn int_variable(&mut self, initial: Int) -> IntVariable;
    /// Its value now.
    fn get_int(&mut self, variable: IntVariable) -> Int;
    /// Changes it.
    fn set_int(&mut self, variable: IntVariable, value: Int);
    /// A new vector variable.
    fn vector_variable(&mut self, initial: Vector) -> VectorVariable;
    /// Its value now.
    fn get(&mut self, variable: VectorVariable) -> Vector;
    /// Changes it.
    fn set(&mut self, variable: VectorVariable, value: Vector);

    /// Opens a loop that runs `count ≥ 1` times.
    fn begin_repeat(&mut self, count: i32) -> Loop;
    /// Opens a loop that runs while `variable ≥ bound`, tested before each turn.
    fn begin_while_at_least(&mut self, variable: IntVariable, bound: i32) -> Loop;
    /// Closes the loop that was opened last.
    fn end_loop(&mut self, open: Loop);

    /// Bytes that are known now, as many as a vector has.
    fn constant_bytes(&mut self, bytes: &[u8]) -> Vector;
    /// All bits zero.
    fn zero(&mut self) -> Vector;
    /// Every byte `value`.
    fn splat8(&mut self, value: u8) -> Vector;
    /// Every 16-bit lane `value`.
    fn splat16(&mut self, value: u16) -> Vector;
    /// Every 32-bit lane `value`.
    fn splat32(&mut self, value: i32) -> Vector;
    /// Loads a vector of weights or activations, which no store changes, from `address + offset`; no alignment needed.
    fn load(&mut self, address: Int, offset: i32) -> Vector;
    /// Loads 16 bytes into every 128 bits of a vector.
    fn load_table(&mut self, address: Int, offset: i32) -> Vector;
    /// Loads 32 bits into every 32-bit lane.
    fn load_splat32(&mut self, address: Int, offset: i32) -> Vector;
    /// Loads a vector of results or scratch, after the stores before it.
    fn load_result(&mut self, address: Int, offset: i32) -> Vector;
    /// Loads half a vector of signed bytes of scratch into 16-bit lanes, after the stores before it.
    fn load_widened8(&mut self, address: Int, offset: i32) -> Vector;
    /// Stores a vector.
    fn store(&mut self, address: Int, offset: i32, value: Vector);
    /// Stores 8 bytes of a vector, the ones from `8 · part`.
    fn store64(&mut self, address: Int, offset: i32, value: Vector, part: usize);
    /// Stores 16 bytes of a vector, the ones from `16 · part`.
    fn store128(&mut self, address: Int, offset: i32, value: Vector, part: usize);
    /// Stores the lowest 32 bits of a vector.
    fn store32(&mut self, address: Int, offset: i32, value: Vector);

    /// Asks for the 64 bytes around `address + offset`, which need not exist, to be in the cache soon.
    fn prefetch(&mut self, address: Int, offset: i32);
    /// As [`prefetch`](Self::prefetch), but no nearer than the second-level cache.
    fn prefetch_second_level(&mut self, address: Int, offset: i32);

    /// Bitwise and.
    fn and(&mut self, a: Vector, b: Vector) -> Vector;
    /// Adds bytes, wrapping.
    fn add8(&mut self, a: Vector, b: Vector) -> Vector;
    /// Subtracts bytes, wrapping.
    fn sub8(&mut self, a: Vector, b: Vector) -> Vector;
    /// The smaller of unsigned bytes.
    fn min8(&mut self, a: Vector, b: Vector) -> Vector;
    /// Adds 16-bit lanes, wrapping.
    fn add16(&mut self, a: Vector, b: Vector) -> Vector;
    /// Subtracts 16-bit lanes, wrapping.
    fn sub16(&mut self, a: Vector, b: Vector) -> Vector;
    /// Adds 32-bit lanes, wrapping.
    fn add32(&mut self, a: Vector, b: Vector) -> Vector;
    /// Subtracts 32-bit lanes, wrapping.
    fn sub32(&mut self, a: Vector, b: Vector) -> Vector;
    /// Shifts 16-bit lanes left.
    fn shift_left16(&mut self, a: Vector, bits: u8) -> Vector;
    /// Shifts 16-bit lanes right, zeros coming in.
    fn shift_right16(&mut self, a: Vector, bits: u8) -> Vector;
    /// Shifts 32-bit lanes left.
    fn shift_left32(&mut self, a: Vector, bits: u8) -> Vector;
    /// Shifts 32-bit lanes right, copies of the sign coming in.
    fn shift_right_signed32(&mut self, a: Vector, bits: u8) -> Vector;
    /// Multiplies 32-bit lanes, wrapping.
    fn multiply32(&mut self, a: Vector, b: Vector) -> Vector;

    /// 16-bit lane i: `unsigned[2i]·signed[2i] + unsigned[2i+1]·signed[2i+1]`. The caller sees to it that the sum
    /// fits: codes are at most 3, or the lane may hold anything but nothing else happens.
    fn multiply_add_pairs(&mut self, unsigned: Vector, signed: Vector) -> Vector;
    /// 32-bit lane i: sum of the signed 16-bit lanes 2i and 2i+1.
    fn sum_pairs16(&mut self, a: Vector) -> Vector;
    /// 32-bit lane i: `sum[i] + Σ unsigned[4i+j]·signed[4i+j]`, j in 0..4, wrapping; `unsigned` at most 127, unless
    /// [`dot_takes_any_byte`](Self::dot_takes_any_byte).
    fn dot(&mut self, sum: Vector, unsigned: Vector, signed: Vector) -> Vector;
    /// Whether the unsigned bytes of [`dot`](Self::dot) may be up to 255.
    fn dot_takes_any_byte(&self) -> bool;
    /// The sums of all 32-bit lanes of each of four vectors, in the lowest four 32-bit lanes.
    fn sum_lanes32(&mut self, vectors: [Vector; 4]) -> Vector;

    /// Byte i: `table[index[i]]`, `index[i] ≤ 15`, from the table in the same 128 bits; 0 for an index of 128 or more.
    fn lookup(&mut self, table: Vector, index: Vector) -> Vector;
    /// Byte i: `table[index[i]]`, `index[i] ≤ 127`.
    fn lookup128(&mut self, table: &[u8; 128], index: Vector) -> Vector;
    /// Loads a table of 16 bytes for [`lookup_signed`](Self::lookup_signed).
    fn load_signed_table(&mut self, address: Int, offset: i32) -> Vector;
    /// Byte i of each result: the byte of that table at `index[i] mod 16`, with all of its bits flipped where bit `bit` of
    /// `signs[i]` is 0.
    fn lookup_signed(&mut self, tables: [Vector; 2], index: Vector, signs: Vector, bit: u8) -> [Vector; 2];
    /// The 16-bit lanes of `a` and `b` in turn, `a` first: the first half of the result, then the second.
    fn interleave16(&mut self, a: Vector, b: Vector) -> [Vector; 2];
    /// The bytes of `a` and `b` in turn, within every 128 bits: from their lower halves, then from their upper halves.
    fn interleave8(&mut self, a: Vector, b: Vector) -> [Vector; 2];
    /// The 16-bit lanes of `a` and `b` in turn, within every 128 bits: from their lower halves, then from their upper halves.
    fn interleave16_within(&mut self, a: Vector, b: Vector) -> [Vector; 2];
    /// The bytes at even places of `a` and then of `b`; and those at odd places.
    fn deinterleave8(&mut self, a: Vector, b: Vector) -> [Vector; 2];
    /// 32-bit lane i: lane `i xor distance`, `distance` a power of two below the number of lanes.
    fn exchange32(&mut self, a: Vector, distance: usize) -> Vector;
    /// Widens unsigned 16-bit lanes to 32 bits: the first half, then the second.
    fn widen16(&mut self, a: Vector) -> [Vector; 2];
    /// Widens signed 16-bit lanes to 32 bits: the first half, then the second.
    fn widen_signed16(&mut self, a: Vector) -> [Vector; 2];

    /// `a + b` of `f32` lanes, rounded as IEEE 754 says, like all that follow.
    fn add_float(&mut self, a: Vector, b: Vector) -> Vector;
    /// `a · b` of `f32` lanes.
    fn multiply_float(&mut self, a: Vector, b: Vector) -> Vector;
    /// `a / b` of `f32` lanes.
    fn divide_float(&mut self, a: Vector, b: Vector) -> Vector;
    /// `√a` of `f32` lanes.
    fn square_root_float(&mut self, a: Vector) -> Vector;
    /// `a · b + c` of `f32` lanes, rounded once.
    fn multiply_add_float(&mut self, a: Vector, b: Vector, c: Vector) -> Vector;
    /// `f32` lanes: `a` where it is greater than `b`, else `b`. So a NaN in `a` takes no part.
    fn larger_float(&mut self, a: Vector, b: Vector) -> Vector;
    /// The whole numbers next to `f32` lanes of at most 2²¹ in magnitude, ties to even, in the lower 16 bits of the 32-bit
    /// lanes, whose upper bits may be anything. NaN gives 0.
    fn round_float(&mut self, a: Vector) -> Vector;
}

/// Emits `body` once, in a loop that runs `count` times; no loop for a count of 1, nothing for 0.
pub fn repeat(m: &mut dyn Machine, count: usize, body: impl FnOnce(&mut dyn Machine)) {
    match count {
        0 => {}
        1 => body(m),
        _ => {
            let open = m.begin_repeat(count as i32);
            body(m);
            m.end_loop(open);
        }
    }
}

/// Emits `body` once, in a loop that runs while the variable is at least `bound`; the body lowers it.
pub fn while_at_least(m: &mut dyn Machine, variable: IntVariable, bound: i32, body: impl FnOnce(&mut dyn Machine)) {
    let open = m.begin_while_at_least(variable, bound);
    body(m);
    m.end_loop(open);
}

/// Every `f32` lane `value`.
pub fn splat_float(m: &mut dyn Machine, value: f32) -> Vector {
    m.splat32(value.to_bits().cast_signed())
}

/// Every 32-bit lane what `operation` makes of all of them: of neighbours first, then of what these gave.
pub fn fold_lanes(
    m: &mut dyn Machine,
    value: Vector,
    operation: fn(&mut dyn Machine, Vector, Vector) -> Vector,
) -> Vector {
    let (mut value, mut distance) = (value, 1);
    while distance < m.vector_bytes() / 4 {
        let other = m.exchange32(value, distance);
        value = operation(m, value, other);
        distance *= 2;
    }
    value
}

/// `variable += constant`.
pub fn advance(m: &mut dyn Machine, variable: IntVariable, constant: i32) {
    let value = m.get_int(variable);
    let next = m.add_constant(value, constant);
    m.set_int(variable, next);
}
