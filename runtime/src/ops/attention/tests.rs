use super::floats::{attend, widen_f32};
use super::int8::attend_portable;
use super::*;
use crate::ops::half;
use crate::ops::tests::{assert_same_bits, floats_within};
use proptest::prelude::*;
use ternion_kernels_ref::attention::{Cached, QuantizedRows, Rows, attention_from};
use ternion_kernels_ref::{QuantizedRow, widen};

type Attend<E> = fn(&[f32], CachedBlock<'_, E>, f32, Running<'_>);

/// Merging and finishing at one level.
#[derive(Clone, Copy)]
struct Level {
    int8: Attend<i8>,
    f16: Attend<u16>,
    f32: Attend<f32>,
    merge: fn(Running<'_>, &Running<'_>),
    finish: fn(f32, &[f32], &mut [f32]),
}

/// Rounds queries for `attend`.
fn widened(
    queries: &[f32],
    block: CachedBlock<'_, i8>,
    running: Running<'_>,
    attend: fn(WideQueries<'_>, CachedBlock<'_, i8>, f32, Running<'_>),
) {
    let head_dim = queries.len() / running.max.len();
    let mut values = vec![0; queries.len()];
    let rows = queries.chunks_exact(head_dim).zip(values.chunks_exact_mut(head_dim));
    let steps: Vec<f32> = rows.map(|(query, values)| widen_query(query, values)).collect();
    attend(WideQueries { values: &values, steps: &steps }, block, SCALE, running);
}

/// What this CPU chooses, and what others would.
fn levels() -> Vec<Level> {
    let chosen = Level {
        int8: |queries, block, _, running| widened(queries, block, running, attend_block_int8),
        f16: attend_block_f16,
        f32: attend_block_f32,
        merge: merge_attention,
        finish: finish_attention,
    };
    let portable = Level {
        int8: |queries, block, _, running| widened(queries, block, running, attend_portable),
        f16: |queries, block, scale, running| attend::<_, 4, 2, 1>(queries, block, scale, running, half::widen_lanes),
        f32: |queries, block, scale, running| attend::<_, 4, 2, 1>(queries, block, scale, running, widen_f32),
        merge: merge_body,
        finish: finish_body,
    };
    let mut levels = vec![chosen, portable];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2") {
        let int8: Attend<i8> = |queries, block, _, running| {
            // SAFETY: the CPU has these features.
            widened(queries, block, running, |q, b, s, r| unsafe { int8::attend_avx2(q, b, s, r) });
        };
        levels.push(Level { int8, ..chosen });
    }
    levels
}

const SCALE: f32 = 0.37;

/// Keys and values of some positions, `[positions, head_dim]`, with steps if there are any.
struct Cache<E> {
    head_dim: usize,
    /// How many of the elements that are summed over lie side by side.
    along: usize,
    keys: Vec<E>,
    values: Vec<E>,
    key_steps: Vec<f32>,
    value_steps: Vec<f32>,
}

/// Keys, values, their steps and the number of positions of one block.
type TestBlock<E> = (Vec<E>, Vec<E>, [Vec<f32>; 2], usize);

impl<E: Copy> Cache<E> {
    /// One of the two after the other in cached order; what lies past the end is `nan`.
    fn blocks(&self, nan: E) -> Vec<TestBlock<E>> {
        let (head_dim, width) = (self.head_dim, self.head_dim.next_multiple_of(LANES));
        let count = self.keys.len() / head_dim;
        let starts = (0..count).step_by(KEY_BLOCK);
        let blocks = starts.map(|start| {
            let positions = KEY_BLOCK.min(count - start);
            let (mut keys, mut values) = (vec![nan; head_dim * KEY_BLOCK], vec![nan; width * KEY_BLOCK]);
            for position in 0..positions {
                for d in 0..head_dim {
                    let at = (start + position) * head_dim + d;
                    // `[across / 16, len / along, 16, along]`
                    let place = |i: usize, len: usize, across: usize| {
                        let group = across / LANES * (len / self.along) + i / self.along;
                        (group * LANES + across % LANES) * self.along + i % self.along
                    };
                    keys[place(d, head_dim, position)] = self.keys[at];
                    values[place(position, KEY_BLOCK, d)] = self.values[at];
                }
            }
            let steps = [&self.key_steps, &self.value_steps].map(|steps| match &steps[..] {
                [] => Vec::new(),
                steps => {
                    let mut block = steps[start..start + positions].to_vec();
                    block.resize(KEY_BLOCK, f32::NAN);
                    block
                }
            });
            (keys, values, steps, positions)
        });
        blocks.collect()
    }

    /// Attention of `heads` heads at one level; blocks from `split` on are worked out for themselves and then merged.
    fn attend(
        &self,
        level: Level,
        attend: Attend<E>,
        queries: &[f32],
        heads: usize,
        nan: E,
        (split, first): (usize, usize),
    ) -> Vec<f32> {
        let width = self.head_dim.next_multiple_of(LANES);
        let results = || (vec![f32::NAN; heads], vec![f32::NAN; heads], vec![f32::NAN; heads * width]);
        let (mut max, mut sum, mut values) = results();
        let mut running = Running { max: &mut max, sum: &mut sum, values: &mut values };
        running.clear(0.0);
        let blocks = self.blocks(nan);
        for (i, (keys, values, [key_steps, value_steps], positions)) in
            blocks.iter().enumerate().skip(first / KEY_BLOCK)
        {
            let (first, positions) = (first.saturating_sub(i * KEY_BLOCK), *positions);
            let block = CachedBlock { keys, values, key_steps, value_steps, next_keys: keys, first, positions };
            if i < split {
                attend(queries, block, SCALE, running.again());
            } else {
                let (mut max, mut sum, mut values) = results();
                let mut single = Running { max: &mut max, sum: &mut sum, values: &mut values };
                single.clear(-0.0);
                attend(queries, block, SCALE, single.again());
                (level.merge)(running.again(), &single);
            }
        }
        let mut output = vec![0.0; heads * self.head_dim];
        for (h, output) in output.chunks_exact_mut(self.head_dim).enumerate() {
            (level.finish)(sum[h], &values[h * width..], output);
        }
        output
    }
}

/// The same by the reference.
fn expected<C: Cached>(queries: &[f32], head_dim: usize, keys: C, values: C, first: usize) -> Vec<f32> {
    queries.chunks_exact(head_dim).flat_map(|q| attention_from(q, keys, values, first, SCALE)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn heads_attend_as_in_the_reference_in_all_cache_types(
        (head_dim, heads, queries, cache, first) in (1usize..40, 1usize..8, 1usize..200)
            .prop_flat_map(|(half, heads, positions)| {
                let head_dim = 2 * half;
                let queries = floats_within(heads * head_dim, 4.0);
                let first = prop_oneof![Just(0), 0..positions];
                (Just(head_dim), Just(heads), queries, floats_within(positions * 2 * head_dim, 4.0), first)
            }),
        split in 0usize..4,
    ) {
        let (keys, values) = cache.split_at(cache.len() / 2);
        let halves = |all: &[f32]| -> Vec<u16> { all.iter().map(|x| widen::f32_to_f16(*x)).collect() };
        let quantized = |all: &[f32]| -> (Vec<Vec<i8>>, Vec<f32>) {
            let rows = all.chunks_exact(head_dim).map(QuantizedRow::new);
            rows.map(|row| (row.values().to_vec(), 1.0 / row.q())).unzip()
        };
        let floats = |keys: &[f32], values: &[f32]| expected(&queries, head_dim, Rows(keys), Rows(values), first);
        let none = || (Vec::new(), Vec::new());
        let ((key_steps, value_steps), along) = (none(), 1);
        let (half_keys, half_values) = (halves(keys), halves(values));
        let wide = |all: &[u16]| -> Vec<f32> { all.iter().map(|x| widen::f16_to_f32(*x)).collect() };
        let expected_f16 = floats(&wide(&half_keys), &wide(&half_values));
        let f16 = Cache { head_dim, along, keys: half_keys, values: half_values, key_steps, value_steps };
        let (key_steps, value_steps) = none();
        let expected_f32 = floats(keys, values);
        let f32 = Cache { head_dim, along, keys: keys.to_vec(), values: values.to_vec(), key_steps, value_steps };
        let ((keys, key_steps), (values, value_steps)) = (quantized(keys), quantized(values));
        let (keys, values) = (keys.concat(), values.concat());
        let expected_int8 = expected(
            &queries,
            head_dim,
            QuantizedRows { elements: &keys, steps: &key_steps },
            QuantizedRows { elements: &values, steps: &value_steps },
            first,
        );
        let int8 = Cache { head_dim, along: 2, keys, values, key_steps, value_steps };
        for level in levels() {
            let found = f16.attend(level, level.f16, &queries, heads, 0x7e00, (split, first));
            assert_same_bits(&found, &expected_f16);
            let found = f32.attend(level, level.f32, &queries, heads, f32::NAN, (split, first));
            assert_same_bits(&found, &expected_f32);
            let found = int8.attend(level, level.int8, &queries, heads, 99, (split, first));
            assert_same_bits(&found, &expected_int8);
        }
    }
}
