//! Steps on activations: the same rules as for kernels on weights, on floats of every kind.

use std::fmt;

use ternion_kernels_ref::{QuantizedRow, norm};

use super::buffer::{Buffer, Line};
use super::problem::Random;
use super::{Fault, Placement};
use crate::step_kernel::{Quantized, StepArgs};
use crate::{ActivationFormat, Step, StepKernel, StepSpec};

/// What the activations of a row are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FloatData {
    /// `random`: magnitudes from 2⁻¹² to 2³.
    Random,
    /// `largest`: plus or minus the largest number, whose squares overflow.
    Largest,
    /// `zeros`: 0 and −0.
    Zeros,
    /// `spike`: one large number among small ones, so that the rest become 0.
    Spike,
    /// `subnormal`: below the smallest normal number, 0 among them.
    Subnormal,
    /// `infinite`: random, with infinities of both signs.
    Infinite,
    /// `nan`: random, with NaN of both signs and all payloads.
    Nan,
    /// `any`: any 32 bits.
    Any,
    /// `ties`: halves between whole numbers of up to 127, which is the largest of them: q is 1.
    Ties,
}

impl FloatData {
    /// All kinds of data.
    pub const ALL: [Self; 9] = [
        Self::Random,
        Self::Largest,
        Self::Zeros,
        Self::Spike,
        Self::Subnormal,
        Self::Infinite,
        Self::Nan,
        Self::Any,
        Self::Ties,
    ];

    fn float(self, at: usize, random: &mut Random) -> f32 {
        let bits = random.next();
        let sign = if bits & 1 == 0 { 1.0 } else { -1.0 };
        let ordinary = sign * f32::from_bits(((115 + (bits >> 1) % 15) << 23 | bits >> 40 & 0x7f_ffff) as u32);
        match self {
            Self::Random => ordinary,
            Self::Largest => sign * f32::MAX,
            Self::Zeros => sign * 0.0,
            Self::Spike if at == 0 => 1e4,
            Self::Spike => ordinary * 1e-3,
            Self::Subnormal => sign * f32::from_bits((bits >> 41) as u32 >> (bits >> 1 & 15)),
            Self::Infinite if bits >> 60 == 0 => sign * f32::INFINITY,
            Self::Nan if bits >> 60 < 4 => f32::from_bits((bits >> 8) as u32 | 0x7f80_0001),
            Self::Infinite | Self::Nan => ordinary,
            Self::Any => f32::from_bits((bits >> 8) as u32),
            Self::Ties if at == 0 => 127.0,
            Self::Ties => f32::from((bits >> 8) as u8) - 127.5,
        }
    }
}

impl fmt::Display for FloatData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Largest => "largest",
            Self::Zeros => "zeros",
            Self::Spike => "spike",
            Self::Subnormal => "subnormal",
            Self::Infinite => "infinite",
            Self::Nan => "nan",
            Self::Any => "any",
            Self::Ties => "ties",
        })
    }
}

/// A row of activations, the weights and epsilon of a norm. All of it follows from the three values that
/// [`Display`](fmt::Display) prints.
#[derive(Clone, Debug)]
pub struct FloatRow {
    data: FloatData,
    seed: u64,
    x: Vec<f32>,
    weights: Vec<f32>,
    epsilon: f32,
}

impl FloatRow {
    /// Makes the numbers. Weights are ordinary ones, except that they are any where the activations are; epsilon is 10⁻⁵
    /// or, for odd seeds, 0.
    #[must_use]
    pub fn new(data: FloatData, k: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let weight = if data == FloatData::Any { data } else { FloatData::Random };
        let x = (0..k).map(|at| data.float(at, &mut random)).collect();
        let weights = (0..k).map(|at| weight.float(at, &mut random)).collect();
        Self { data, seed, x, weights, epsilon: if seed.is_multiple_of(2) { 1e-5 } else { 0.0 } }
    }

    /// Activations of a row.
    #[must_use]
    pub fn k(&self) -> usize {
        self.x.len()
    }

    /// The activations.
    #[must_use]
    pub fn x(&self) -> &[f32] {
        &self.x
    }

    /// The weights of the norm.
    #[must_use]
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The epsilon of the norm.
    #[must_use]
    pub const fn epsilon(&self) -> f32 {
        self.epsilon
    }

    /// What a step reads, in bytes.
    #[must_use]
    pub fn input(&self, step: Step) -> Vec<u8> {
        match step {
            Step::Quantize | Step::NormQuantize => self.x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Step::Prepare(_) => plain(QuantizedRow::new(&self.x).values()),
        }
    }

    /// What the reference says that a step writes: a column, and scale and sum if it quantises.
    #[must_use]
    pub fn expected(&self, step: Step) -> (Vec<u8>, Option<Quantized>) {
        let quantised = |x: &[f32]| {
            let row = QuantizedRow::new(x);
            (plain(row.values()), Some(Quantized { q: row.q(), sum: row.sum() }))
        };
        match step {
            Step::Quantize => quantised(&self.x),
            Step::NormQuantize => quantised(&norm::rms_norm(&self.x, &self.weights, self.epsilon)),
            Step::Prepare(format) => (column(format, QuantizedRow::new(&self.x).values()), None),
        }
    }
}

impl fmt::Display for FloatRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "data={} k={} seed={:#x}", self.data, self.k(), self.seed)
    }
}

fn column(format: ActivationFormat, values: &[i8]) -> Vec<u8> {
    let mut column = vec![0; format.bytes(values.len())];
    format.prepare(values, &mut column);
    column
}

fn plain(values: &[i8]) -> Vec<u8> {
    column(ActivationFormat::Plain, values)
}

/// Runs `kernel` on `row` and compares every byte, with all that it reads and writes in buffers of their own.
///
/// # Errors
/// The first fault that is found.
///
/// # Panics
/// If the row is not as long as the kernel's.
pub fn check_step(kernel: &StepKernel, row: &FloatRow, placement: Placement) -> Result<(), Fault> {
    let step = kernel.spec().step;
    assert_eq!(row.k(), kernel.spec().k, "a row of the kernel's length");
    let (expected, quantised) = row.expected(step);
    // Floats lie as aligned as they are for a caller.
    let (floats, bytes);
    let input = match step {
        Step::Prepare(_) => {
            bytes = Buffer::read_only(&row.input(step), placement)?;
            bytes.elements().as_ptr()
        }
        Step::Quantize | Step::NormQuantize => {
            floats = Buffer::read_only(&row.x, placement)?;
            floats.elements().as_ptr().cast()
        }
    };
    let weights = Buffer::read_only(if step == Step::NormQuantize { &row.weights } else { &[] }, placement)?;
    let epsilon = Buffer::read_only(&[row.epsilon], placement)?;
    let mut output = Buffer::<u8>::poisoned(expected.len(), placement)?;
    let mut result = Buffer::<i32>::poisoned(if quantised.is_some() { 2 } else { 0 }, placement)?;
    let mut scratch = Buffer::<Line>::poisoned(StepSpec::SCRATCH / size_of::<Line>(), placement)?;
    let args = StepArgs {
        input,
        weights: weights.elements().as_ptr(),
        epsilon: epsilon.elements().as_ptr(),
        output: output.elements_mut().as_mut_ptr(),
        result: result.elements_mut().as_mut_ptr().cast(),
        scratch: scratch.elements_mut().as_mut_ptr().cast(),
    };
    let args = Buffer::read_only(&[args], placement)?;
    // SAFETY: buffers of the lengths that the step's contract names.
    unsafe { kernel.enter(args.elements().as_ptr()) }

    if let Some(offset) = output.stray_write().or(result.stray_write()) {
        return Err(Fault::StrayWrite { offset });
    }
    if let Some(offset) = scratch.stray_write() {
        return Err(Fault::StrayScratch { offset });
    }
    let differs = |what, at, expected, found| Err(Fault::Differs { what, at, expected, found });
    if let (Some(quantised), [q, sum]) = (quantised, result.elements()) {
        let expected = quantised.q.to_bits();
        if q.cast_unsigned() != expected {
            return differs("bits of the scale", 0, expected.into(), q.cast_unsigned().into());
        }
        if *sum != quantised.sum {
            return differs("the sum", 0, quantised.sum.into(), (*sum).into());
        }
    }
    let found = output.elements().iter().zip(&expected).position(|(found, expected)| found != expected);
    match found {
        Some(at) => differs("byte", at, expected[at].into(), output.elements()[at].into()),
        None => Ok(()),
    }
}
