//! Sixteen `f32` lanes: one register of 512 bits, two of 256 or four of 128. LLVM sees loops of fixed length.

use std::hint::black_box;

use ternion_kernels_ref::lanes::LANES;

/// Sixteen values, worked on together.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Lanes(pub(super) [f32; LANES]);

impl Lanes {
    /// All zero.
    pub(super) const ZERO: Self = Self([0.0; LANES]);

    /// `value` in every lane.
    #[inline(always)]
    pub(super) fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    /// `f` of every lane.
    #[inline(always)]
    pub(super) fn map(self, f: impl Fn(f32) -> f32) -> Self {
        let mut result = self;
        for lane in &mut result.0 {
            *lane = f(*lane);
        }
        result
    }

    /// `f` of every pair of lanes.
    #[inline(always)]
    pub(super) fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut result = self;
        for (lane, other) in result.0.iter_mut().zip(other.0) {
            *lane = f(*lane, other);
        }
        result
    }

    /// `self · factor + addend`, rounded once.
    #[inline(always)]
    pub(super) fn mul_add(self, factor: Self, addend: Self) -> Self {
        let mut result = self;
        for ((lane, factor), addend) in result.0.iter_mut().zip(factor.0).zip(addend.0) {
            *lane = lane.mul_add(factor, addend);
        }
        result
    }

    /// Itself, as a whole: what is done with single lanes from here on does not tear up what was done with all before.
    #[inline(always)]
    pub(super) fn whole(self) -> Self {
        black_box(self)
    }

    /// The largest lane, none of which may be NaN.
    #[inline(always)]
    pub(super) fn largest(self) -> f32 {
        let mut lanes = self.whole().0;
        // In pairs rather than one after the other: fewer comparisons wait for each other.
        let mut count = LANES / 2;
        while count > 0 {
            for i in 0..count {
                lanes[i] = if lanes[i + count] > lanes[i] { lanes[i + count] } else { lanes[i] };
            }
            count /= 2;
        }
        lanes[0]
    }

    /// Adds the lanes in the pairwise tree of [`ternion_kernels_ref::lanes::tree_sum`].
    #[inline(always)]
    pub(super) fn tree_sum(self) -> f32 {
        let l = self.whole().0;
        let quarter = |i: usize| (l[i] + l[i + 1]) + (l[i + 2] + l[i + 3]);
        (quarter(0) + quarter(4)) + (quarter(8) + quarter(12))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_tree_is_the_references(lanes in prop::array::uniform16(-1e10f32..1e10)) {
            prop_assert_eq!(Lanes(lanes).largest(), lanes.into_iter().fold(f32::NEG_INFINITY, f32::max));
            let expected = ternion_kernels_ref::lanes::tree_sum(lanes);
            prop_assert_eq!(Lanes(lanes).tree_sum().to_bits(), expected.to_bits());
        }
    }
}
