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
    finish: fn(&[f32; LANES], &[f32], &mut [f32]),
}

/// Rounds queries for `attend`.
fn quantized(
    queries: &[f32],
    block: CachedBlock<'_, i8>,
    running: Running<'_>,
    attend: fn(QuantizedQueries<'_>, CachedBlock<'_, i8>, f32, Running<'_>),
) {
    let head_dim = queries.len() / running.max.len();
    let len = head_dim.next_multiple_of(INT8_KEYS_ALONG);
    let mut values = vec![99; running.max.len() * len];
    let rows = queries.chunks_exact(head_dim).zip(values.chunks_exact_mut(len));
    let (steps, sums): (Vec<_>, Vec<_>) = rows.map(|(query, values)| quantize_query(query, values)).unzip();
    attend(QuantizedQueries { values: &values, steps: &steps, sums: &sums }, block, SCALE, running);
}

/// What this CPU chooses, and what others would.
fn levels() -> Vec<Level> {
    let chosen = Level {
        int8: |queries, block, _, running| quantized(queries, block, running, attend_block_int8),
        f16: attend_block_f16,
        f32: attend_block_f32,
        merge: merge_attention,
        finish: finish_attention,
    };
    let portable = Level {
        int8: |queries, block, _, running| quantized(queries, block, running, attend_portable),
        f16: |queries, block, scale, running| {
            attend::<_, F16_ROW, 4, 2, 1>(queries, block, scale, running, half::widen_lanes)
        },
        f32: |queries, block, scale, running| attend::<_, F32_ROW, 4, 2, 1>(queries, block, scale, running, widen_f32),
        merge: merge_body,
        finish: finish_body,
    };
    let mut levels = vec![chosen, portable];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2") {
        let int8: Attend<i8> = |queries, block, _, running| {
            // SAFETY: the CPU has these features.
            quantized(queries, block, running, |q, b, s, r| unsafe { int8::attend_avx2(q, b, s, r) });
        };
        levels.push(Level { int8, ..chosen });
    }
    levels
}

const SCALE: f32 = 0.37;

/// Keys and values of some positions, `[positions, head_dim]`, with steps if there are any.
struct Cache<E> {
    head_dim: usize,
    /// How many of the elements of keys and of values that are summed over lie side by side.
    along: [usize; 2],
    /// Groups in a row.
    row: usize,
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
            let [keys_along, values_along] = self.along;
            let len = head_dim.next_multiple_of(keys_along);
            // What a key's padding is multiplied with is 0.
            let (mut keys, mut values) = (vec![nan; len * KEY_BLOCK], vec![nan; width * KEY_BLOCK]);
            for position in 0..positions {
                for d in 0..head_dim {
                    let at = (start + position) * head_dim + d;
                    // `[of / 16 row, len / along, row, 16, along]`, and what makes no row with `row` 1.
                    let place = |(i, len, along): (usize, usize, usize), across: usize, of: usize| {
                        let (group, rows) = (across / LANES, of / LANES / self.row * self.row);
                        let row = if group < rows { self.row } else { 1 };
                        let before = group / row * (len / along) + i / along;
                        ((before * row + group % row) * LANES + across % LANES) * along + i % along
                    };
                    keys[place((d, len, keys_along), position, KEY_BLOCK)] = self.keys[at];
                    values[place((position, KEY_BLOCK, values_along), d, width)] = self.values[at];
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

    /// Attention of `heads` heads at one level; blocks from the `split`th on are worked out for themselves and then merged.
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
        let results = || (vec![f32::NAN; heads], vec![[f32::NAN; LANES]; heads], vec![f32::NAN; heads * width]);
        let (mut max, mut sum, mut values) = results();
        let mut running = Running { max: &mut max, sum: &mut sum, values: &mut values };
        running.clear(0.0);
        let blocks = self.blocks(nan);
        let blocks = blocks.iter().enumerate().skip(first / KEY_BLOCK);
        let blocks = blocks.map(|(i, (keys, values, [key_steps, value_steps], positions))| {
            let (first, positions) = (first.saturating_sub(i * KEY_BLOCK), *positions);
            CachedBlock { keys, values, key_steps, value_steps, next_keys: keys, first, positions }
        });
        let blocks: Vec<_> = blocks.collect();
        let (together, single) = blocks.split_at(split.min(blocks.len()));
        together.iter().for_each(|block| attend(queries, *block, SCALE, running.again()));
        // Of each of the rest, all merged at once.
        let (mut max, mut sum, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for block in single {
            let (mut block_max, mut block_sum, mut block_values) = results();
            let mut single = Running { max: &mut block_max, sum: &mut block_sum, values: &mut block_values };
            single.clear(-0.0);
            attend(queries, *block, SCALE, single);
            max.extend(block_max);
            sum.extend(block_sum);
            values.extend(block_values);
        }
        (level.merge)(running.again(), &Running { max: &mut max, sum: &mut sum, values: &mut values });
        let Running { sum, values, .. } = running;
        let mut output = vec![0.0; heads * self.head_dim];
        for (h, output) in output.chunks_exact_mut(self.head_dim).enumerate() {
            (level.finish)(&sum[h], &values[h * width..], output);
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
        (head_dim, heads, queries, cache, first) in (1usize..160, 1usize..8, 1usize..400)
            .prop_flat_map(|(head_dim, heads, positions)| {
                let queries = floats_within(heads * head_dim, 4.0);
                let first = prop_oneof![Just(0), 0..positions];
                (Just(head_dim), Just(heads), queries, floats_within(positions * 2 * head_dim, 4.0), first)
            }),
        split in 0usize..5,
    ) {
        let (keys, values) = cache.split_at(cache.len() / 2);
        let halves = |all: &[f32]| -> Vec<u16> { all.iter().map(|x| widen::f32_to_f16(*x)).collect() };
        let quantized = |all: &[f32]| -> (Vec<Vec<i8>>, Vec<f32>) {
            let rows = all.chunks_exact(head_dim).map(QuantizedRow::new);
            rows.map(|row| (row.values().to_vec(), 1.0 / row.q())).unzip()
        };
        let floats = |keys: &[f32], values: &[f32]| expected(&queries, head_dim, Rows(keys), Rows(values), first);
        let none = || (Vec::new(), Vec::new());
        let ((key_steps, value_steps), along) = (none(), [1, 1]);
        let (half_keys, half_values) = (halves(keys), halves(values));
        let wide = |all: &[u16]| -> Vec<f32> { all.iter().map(|x| widen::f16_to_f32(*x)).collect() };
        let expected_f16 = floats(&wide(&half_keys), &wide(&half_values));
        let f16 = Cache { head_dim, along, row: F16_ROW, keys: half_keys, values: half_values, key_steps, value_steps };
        let (key_steps, value_steps) = none();
        let expected_f32 = floats(keys, values);
        let f32 = Cache { head_dim, along, row: F32_ROW, keys: keys.to_vec(), values: values.to_vec(), key_steps, value_steps };
        let ((keys, key_steps), (values, value_steps)) = (quantized(keys), quantized(values));
        let (keys, values) = (keys.concat(), values.concat());
        let expected_int8 = expected(
            &queries,
            head_dim,
            QuantizedRows { elements: &keys, steps: &key_steps },
            QuantizedRows { elements: &values, steps: &value_steps },
            first,
        );
        let int8 = Cache { head_dim, along: [INT8_KEYS_ALONG, INT8_VALUES_ALONG], row: INT8_ROW, keys, values, key_steps, value_steps };
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
