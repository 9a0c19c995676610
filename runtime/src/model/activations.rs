//! Quantised activations of a chunk of tokens, in every form that kernels read.

use ternion_compiler::{ActivationFormat, Activations, Kernel, Quantized, Step, StepKernel};

use super::steps::Steps;
use crate::memory::PageBuffer;
use crate::team::SharedSlice;

/// The most formats that the kernels of one model read.
const FORMATS: usize = 4;

/// Room for the activations of some tokens. One is enough for a whole forward pass: activations are used up before the
/// next are made.
#[derive(Debug)]
pub(super) struct ActivationBuffer {
    /// Int8 values before they are prepared, a [`plain`](ActivationFormat::Plain) column per token.
    values: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    /// One buffer per format, `[tokens, bytes]`.
    prepared: Vec<(ActivationFormat, PageBuffer)>,
}

impl ActivationBuffer {
    /// For up to `tokens` rows of up to `longest` activations, in all of `formats`.
    ///
    /// # Errors
    /// If memory runs out.
    pub(super) fn new(
        tokens: usize,
        longest: usize,
        formats: impl Iterator<Item = ActivationFormat>,
    ) -> std::io::Result<Self> {
        let mut prepared: Vec<(ActivationFormat, PageBuffer)> = Vec::new();
        for format in formats {
            if prepared.iter().all(|(known, _)| *known != format) {
                prepared.push((format, PageBuffer::zeroed(tokens * format.bytes(longest))?));
            }
        }
        assert!(prepared.len() <= FORMATS, "as many formats as a writer has room for");
        let values = vec![0; tokens * ActivationFormat::Plain.bytes(longest)];
        Ok(Self { values, scales: vec![0.0; tokens], sums: vec![0; tokens], prepared })
    }

    /// Opens the buffer for rows of `k` activations that `readers` will read.
    pub(super) fn writer<'a, 'b>(
        &'a mut self,
        k: usize,
        steps: &'a Steps,
        readers: impl Iterator<Item = &'b Kernel> + Clone,
    ) -> ActivationWriter<'a> {
        let is_read = |format| readers.clone().any(|kernel| kernel.activation_format() == format);
        let mut prepared = self.prepared.iter_mut().filter(|(format, _)| is_read(*format));
        ActivationWriter {
            k,
            values: SharedSlice::new(&mut self.values),
            scales: SharedSlice::new(&mut self.scales),
            sums: SharedSlice::new(&mut self.sums),
            prepared: [(); FORMATS].map(|()| {
                let (format, bytes) = prepared.next()?;
                Some((*format, steps.of(Step::Prepare(*format), k), SharedSlice::new(bytes)))
            }),
        }
    }

    /// The int8 values of one token, of rows of `k`.
    pub(super) fn values(&self, token: usize, k: usize) -> &[i8] {
        &self.values[token * ActivationFormat::Plain.bytes(k)..][..k]
    }

    /// The scale q of one token.
    pub(super) fn scale(&self, token: usize) -> f32 {
        self.scales[token]
    }

    /// The first `n` tokens' activations as `kernel` reads them.
    pub(super) fn read(&self, n: usize, kernel: &Kernel) -> Activations<'_> {
        let format = kernel.activation_format();
        let columns = self.prepared.iter().find(|(known, _)| *known == format).map_or(&[][..], |(_, bytes)| bytes);
        Activations { columns, stride: format.bytes(kernel.spec().k), sums: &self.sums[..n] }
    }
}

/// An [`ActivationBuffer`] that the threads of a team fill, each with tokens of its own.
pub(super) struct ActivationWriter<'a> {
    k: usize,
    values: SharedSlice<'a, i8>,
    scales: SharedSlice<'a, f32>,
    sums: SharedSlice<'a, i32>,
    prepared: [Option<(ActivationFormat, &'a StepKernel, SharedSlice<'a, u8>)>; FORMATS],
}

impl ActivationWriter<'_> {
    /// Stores what `quantize` makes of one token, a plain column, prepared for its readers.
    ///
    /// # Safety
    /// No other thread may write the same token at the same time.
    pub(super) unsafe fn write(&self, token: usize, quantize: impl FnOnce(&mut [i8]) -> Quantized) {
        let row = |width: usize| token * width..(token + 1) * width;
        // SAFETY: rows of different tokens are disjoint, and this token is the caller's alone.
        let (values, scale, sum) = unsafe {
            (
                self.values.part(row(ActivationFormat::Plain.bytes(self.k))),
                self.scales.part(row(1)),
                self.sums.part(row(1)),
            )
        };
        let quantised = quantize(values);
        (scale[0], sum[0]) = (quantised.q, quantised.sum);
        for (format, kernel, bytes) in self.prepared.iter().flatten() {
            // SAFETY: as above.
            let target = unsafe { bytes.part(row(format.bytes(self.k))) };
            kernel.prepare(values, target);
        }
    }
}
