//! Intervals of logits, from what a screen says of rows and states.

use super::SCREEN_ROWS;
use super::lanes::Lanes;

/// Rows whose bounds lie together, and that are read for all states before the next: they stay in a core's cache.
pub const SCREEN_BLOCK: usize = 4 * SCREEN_ROWS;

/// More than the rounding of the estimate's products.
const ROUNDING: f64 = 1e-15;
/// More than the rounding of a norm's sum of squares, of its square root and of the products with it.
pub(crate) const SLACK: f64 = 1.0 + 1e-9;
/// More than what rounding an end to `f32` changes, as a part of what it was made of.
const NARROW: f64 = f32::EPSILON as f64;

/// What bounds need to know of the rows of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(64))]
pub struct RowBounds {
    /// `s` of each.
    pub scale: [f32; SCREEN_BLOCK],
    /// What `‖x‖` is multiplied with in the bound: `‖e‖ + γₙ·‖w‖`, rounded up.
    pub error: [f32; SCREEN_BLOCK],
    /// And `‖d‖`: `s·‖q‖`, rounded up.
    pub form: [f32; SCREEN_BLOCK],
}

/// What they need to know of a state.
#[derive(Clone, Copy, Debug)]
pub struct StateBounds {
    /// `t`
    pub scale: f64,
    /// `‖x‖`, or a little more.
    pub norm: f64,
    /// `‖d‖`, or a little more.
    pub error: f64,
    /// Rows of a larger scale have no bound: partial sums of their logit might overflow.
    pub largest: f64,
    /// What products that underflow may add up to.
    pub underflow: f64,
}

#[inline(always)]
fn intervals_body(
    state: &StateBounds,
    sums: &[[i32; SCREEN_ROWS]],
    rows: &RowBounds,
    lower: &mut [f32],
    upper: &mut [f32],
) {
    assert_eq!(lower.len(), upper.len(), "intervals: as many lower as upper ends");
    assert!(lower.len() <= SCREEN_BLOCK && lower.len() <= SCREEN_ROWS * sums.len(), "intervals: sums of every row");
    let sums = sums.as_flattened().iter().zip(&rows.scale);
    let norms = rows.error.iter().zip(&rows.form);
    for ((lower, upper), ((sum, scale), (error, form))) in lower.iter_mut().zip(upper).zip(sums.zip(norms)) {
        let scale = f64::from(*scale);
        let estimate = state.scale * scale * f64::from(*sum);
        let bound = (state.norm * f64::from(*error) + state.error * f64::from(*form)) * SLACK
            + estimate.abs() * ROUNDING
            + state.underflow;
        // What is rounded to `f32` is rounded outwards.
        let bound = bound + (estimate.abs() + bound) * NARROW + f64::from(f32::from_bits(1));
        // A NaN is not known either.
        let known = bound < f64::INFINITY && scale <= state.largest;
        *lower = if known { (estimate - bound) as f32 } else { f32::NEG_INFINITY };
        *upper = if known { (estimate + bound) as f32 } else { f32::INFINITY };
    }
}

#[inline(always)]
fn largest_body(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = values.as_chunks();
    let mut largest = Lanes::splat(f32::NEG_INFINITY);
    for values in chunks {
        largest = largest.zip(Lanes(*values), larger);
    }
    rest.iter().copied().fold(largest.largest(), larger)
}

for_every_level! {
    /// Writes the ends of the intervals of a state's logits: `sums` are its `p·q` with the rows of a block, `lower` and
    /// `upper` have a place for each row that there is. A logit without a bound lies between the infinities.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn intervals(
        state: &StateBounds,
        sums: &[[i32; SCREEN_ROWS]],
        rows: &RowBounds,
        lower: &mut [f32],
        upper: &mut [f32],
    ) = intervals_body;

    /// The largest of some values, none of which is NaN; −∞ if there are none.
    pub fn largest(values: &[f32]) -> f32 = largest_body;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Intervals = fn(&StateBounds, &[[i32; SCREEN_ROWS]], &RowBounds, &mut [f32], &mut [f32]);

    proptest! {
        #[test]
        fn every_level_finds_the_same_ends_around_the_estimate(
            sums in prop::collection::vec(prop::array::uniform8(-1_000_000i32..1_000_000), 4),
            scales in prop::collection::vec((0f32..1.0, 0f32..1.0, 0f32..1.0), SCREEN_BLOCK),
            (len, norm, error) in (0..=SCREEN_BLOCK, 0f64..100.0, 0f64..1.0),
        ) {
            let mut rows = RowBounds::default();
            for (at, (scale, error, form)) in scales.iter().enumerate() {
                (rows.scale[at], rows.error[at], rows.form[at]) = (*scale, *error, *form);
            }
            // Of a larger scale nothing is known, nor of what is not finite.
            (rows.scale[1], rows.error[2], rows.form[3]) = (3.0, f32::INFINITY, f32::NAN);
            let state = StateBounds { scale: 0.01, norm, error, largest: 2.0, underflow: 1e-40 };
            let ends = |intervals: Intervals| {
                let (mut lower, mut upper) = (vec![0.0; len], vec![0.0; len]);
                intervals(&state, &sums, &rows, &mut lower, &mut upper);
                (lower, upper)
            };
            let (lower, upper) = ends(intervals);
            prop_assert_eq!(&(lower.clone(), upper.clone()), &ends(intervals_body));
            for (at, (lower, upper)) in lower.iter().zip(&upper).enumerate() {
                let estimate = 0.01 * f64::from(rows.scale[at]) * f64::from(sums[at / SCREEN_ROWS][at % SCREEN_ROWS]);
                let bound = norm * f64::from(rows.error[at]) + error * f64::from(rows.form[at]);
                let ends = if (1..4).contains(&at) { [f64::NEG_INFINITY, f64::INFINITY] } else { [estimate - bound, estimate + bound] };
                prop_assert!(f64::from(*lower) <= ends[0] && f64::from(*upper) >= ends[1], "{at}: {lower} {upper} {ends:?}");
                let slack = 1e-6 * (estimate.abs() + bound) + 1e-30;
                prop_assert!((1..4).contains(&at) || f64::from(upper - lower) <= 2.0 * (bound + slack), "{at}: too wide");
            }
        }

        #[test]
        fn the_largest_is_the_largest(values in prop::collection::vec(prop_oneof![-9f32..9.0, Just(f32::NEG_INFINITY)], 0..70)) {
            let expected = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!([largest(&values), largest_body(&values)], [expected; 2]);
        }
    }
}
