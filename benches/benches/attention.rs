//! Attention of one token's query heads over a long context, on one thread and from memory: 2B4T's sizes, a layer after the
//! other, block by block, as decoding reads a cache.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;
use ternion_runtime::model::KvType;
use ternion_runtime::model::kv_cache::{KvCache, Queries};
use ternion_runtime::ops::{self, QuantizedQueries, Running};

const LAYERS: usize = 30;
const KV_HEADS: usize = 5;
const HEAD_DIM: usize = 128;
/// Query heads that share a key-value head.
const GROUP: usize = 4;
const BLOCKS: usize = 31;

fn numbers(count: usize, step: usize) -> Vec<f32> {
    (0..count).map(|i| (i * step % 101) as f32 * 0.02 - 1.0).collect()
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    let positions = BLOCKS * KEY_BLOCK;
    let queries = numbers(GROUP * HEAD_DIM, 57);
    let mut rounded = vec![0; queries.len()];
    let rows = queries.chunks_exact(HEAD_DIM).zip(rounded.chunks_exact_mut(HEAD_DIM));
    let (steps, sums): (Vec<_>, Vec<_>) = rows.map(|(query, rounded)| ops::quantize_query(query, rounded)).unzip();
    let quantized = QuantizedQueries { values: &rounded, steps: &steps, sums: &sums };
    let queries = Queries { floats: &queries, quantized };
    let row = numbers(KV_HEADS * HEAD_DIM, 37);
    let (mut max, mut sum, mut values) = ([0.0; GROUP], [[0.0; LANES]; GROUP], [0.0; GROUP * HEAD_DIM]);
    for kind in KvType::ALL {
        let mut cache = KvCache::new(kind, LAYERS, KV_HEADS, HEAD_DIM);
        cache.reserve(0..positions).expect("memory");
        for (layer, position) in (0..LAYERS).flat_map(|layer| (0..positions).map(move |position| (layer, position))) {
            cache.store(layer, position, &row, &row);
        }
        group.throughput(Throughput::Bytes(cache.bytes() as u64));
        group.bench_function(BenchmarkId::from_parameter(kind), |bencher| {
            bencher.iter(|| {
                for (layer, head) in (0..LAYERS).flat_map(|layer| (0..KV_HEADS).map(move |head| (layer, head))) {
                    let mut running = Running { max: &mut max, sum: &mut sum, values: &mut values };
                    running.clear(0.0);
                    for block in 0..BLOCKS {
                        cache.attend(layer, head, block, 0..positions, queries, running.again());
                    }
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    targets = benches
}
criterion_main!(all);
