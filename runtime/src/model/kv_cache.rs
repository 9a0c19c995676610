//! Keys and values of the positions so far, laid out for attention.
//!
//! A page holds [`KEY_BLOCK`] positions of one layer, so memory follows the length of the text and a page is one block
//! of attention's fixed order. Within a page, per key-value head: keys transposed in groups of sixteen positions
//! (`[4, head_dim, 16]`), so that attention works on sixteen positions at once, and values position by position,
//! padded to whole groups of sixteen.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;

use crate::ops::{self, Running};

/// The precision of cached keys and values. It is an input of a model's results, unlike kernels or threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// IEEE half.
    #[default]
    F16,
    /// IEEE single: what the published models were trained and are judged with.
    F32,
}

impl KvType {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::F16, Self::F32];

    const fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        })
    }
}

/// A word that names no type of the cache.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no type of a KV cache: expected f16 or f32")]
pub struct ParseKvTypeError(String);

impl FromStr for KvType {
    type Err = ParseKvTypeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|kind| kind.to_string() == text);
        known.ok_or_else(|| ParseKvTypeError(text.to_owned()))
    }
}

/// Sizes of one layer's keys and values.
#[derive(Clone, Copy, Debug)]
struct Shape {
    kv_heads: usize,
    head_dim: usize,
}

impl Shape {
    /// Elements from one position's values to the next.
    const fn width(self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of one head's keys in a page.
    const fn keys(self) -> usize {
        self.head_dim * KEY_BLOCK
    }

    /// Elements of one head's values in a page.
    const fn values(self) -> usize {
        self.width() * KEY_BLOCK
    }
}

/// [`KEY_BLOCK`] positions of one layer.
#[derive(Clone, Debug)]
struct Page<E> {
    /// `[kv_heads, KEY_BLOCK / 16, head_dim, 16]`
    keys: Box<[E]>,
    /// `[kv_heads, KEY_BLOCK, width]`
    values: Box<[E]>,
}

impl<E: Copy + Default> Page<E> {
    fn new(shape: Shape) -> Self {
        let zeros = |len| vec![E::default(); len].into_boxed_slice();
        Self { keys: zeros(shape.kv_heads * shape.keys()), values: zeros(shape.kv_heads * shape.values()) }
    }

    /// Stores the key and value (`[kv_heads, head_dim]`) of one position.
    fn store(&mut self, shape: Shape, position: usize, key: &[E], value: &[E]) {
        let head_dim = shape.head_dim;
        let first = position / LANES * head_dim * LANES + position % LANES;
        for (head, key) in key.chunks_exact(head_dim).enumerate() {
            let places = self.keys[head * shape.keys() + first..].iter_mut().step_by(LANES);
            places.zip(key).for_each(|(place, k)| *place = *k);
        }
        for (head, value) in value.chunks_exact(head_dim).enumerate() {
            self.values[head * shape.values() + position * shape.width()..][..head_dim].copy_from_slice(value);
        }
    }

    fn head(&self, shape: Shape, head: usize) -> (&[E], &[E]) {
        (&self.keys[head * shape.keys()..][..shape.keys()], &self.values[head * shape.values()..][..shape.values()])
    }
}

/// The pages of all layers.
#[derive(Debug)]
enum Pages {
    F16(Vec<Vec<Page<u16>>>),
    F32(Vec<Vec<Page<f32>>>),
}

/// The cache of one sequence.
#[derive(Debug)]
pub struct KvCache {
    shape: Shape,
    pages: Pages,
    /// One position's key and value as halves, before they are stored.
    narrow: [Vec<u16>; 2],
}

impl KvCache {
    /// An empty cache for `layers` layers of `kv_heads` heads.
    #[must_use]
    pub fn new(kind: KvType, layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        let pages = match kind {
            KvType::F16 => Pages::F16((0..layers).map(|_| Vec::new()).collect()),
            KvType::F32 => Pages::F32((0..layers).map(|_| Vec::new()).collect()),
        };
        let narrow = match kind {
            KvType::F16 => [vec![0; kv_heads * head_dim], vec![0; kv_heads * head_dim]],
            KvType::F32 => [Vec::new(), Vec::new()],
        };
        Self { shape: Shape { kv_heads, head_dim }, pages, narrow }
    }

    /// The precision of its elements.
    #[must_use]
    pub const fn kind(&self) -> KvType {
        match self.pages {
            Pages::F16(_) => KvType::F16,
            Pages::F32(_) => KvType::F32,
        }
    }

    /// Makes room for `positions` positions in every layer.
    pub fn reserve(&mut self, positions: usize) {
        fn grow<E: Copy + Default>(layers: &mut [Vec<Page<E>>], shape: Shape, pages: usize) {
            for layer in layers {
                while layer.len() < pages {
                    layer.push(Page::new(shape));
                }
            }
        }
        let pages = positions.div_ceil(KEY_BLOCK);
        match &mut self.pages {
            Pages::F16(layers) => grow(layers, self.shape, pages),
            Pages::F32(layers) => grow(layers, self.shape, pages),
        }
    }

    /// Gives back the memory of what lies beyond `positions` positions.
    pub fn release(&mut self, positions: usize) {
        let pages = positions.div_ceil(KEY_BLOCK);
        match &mut self.pages {
            Pages::F16(layers) => layers.iter_mut().for_each(|layer| layer.truncate(pages)),
            Pages::F32(layers) => layers.iter_mut().for_each(|layer| layer.truncate(pages)),
        }
    }

    /// A cache of its own that begins with the first `positions` positions of this one.
    #[must_use]
    pub fn fork(&self, positions: usize) -> Self {
        fn begin<E: Copy + Default>(layers: &[Vec<Page<E>>], pages: usize) -> Vec<Vec<Page<E>>> {
            layers.iter().map(|layer| layer[..pages.min(layer.len())].to_vec()).collect()
        }
        let pages = positions.div_ceil(KEY_BLOCK);
        let pages = match &self.pages {
            Pages::F16(layers) => Pages::F16(begin(layers, pages)),
            Pages::F32(layers) => Pages::F32(begin(layers, pages)),
        };
        Self { shape: self.shape, pages, narrow: self.narrow.clone() }
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let pages: usize = match &self.pages {
            Pages::F16(layers) => layers.iter().map(Vec::len).sum(),
            Pages::F32(layers) => layers.iter().map(Vec::len).sum(),
        };
        pages * self.shape.kv_heads * (self.shape.keys() + self.shape.values()) * self.kind().bytes()
    }

    /// Stores key and value of one position, `[kv_heads, head_dim]` each.
    ///
    /// # Panics
    /// If there is no such layer, no room for the position ([`reserve`](Self::reserve)), or a length is wrong.
    pub fn store(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let (page, within) = (position / KEY_BLOCK, position % KEY_BLOCK);
        match &mut self.pages {
            Pages::F16(layers) => {
                let [narrow_key, narrow_value] = &mut self.narrow;
                ops::narrow_f16(key, narrow_key);
                ops::narrow_f16(value, narrow_value);
                layers[layer][page].store(self.shape, within, narrow_key, narrow_value);
            }
            Pages::F32(layers) => layers[layer][page].store(self.shape, within, key, value),
        }
    }

    /// Attention of `output.len() / head_dim` query heads that share the key-value head `head`, over `positions` of a
    /// layer. `queries` and `output` are `[heads, head_dim]`.
    ///
    /// # Panics
    /// If there is no such layer or head, fewer positions have been stored, or `scratch` is for fewer heads.
    pub fn attend(
        &self,
        layer: usize,
        head: usize,
        positions: Range<usize>,
        queries: &[f32],
        output: &mut [f32],
        scratch: &mut AttentionScratch,
    ) {
        let head_dim = self.shape.head_dim;
        let scale = attention_scale(head_dim);
        let mut running = scratch.start(queries.len() / head_dim, self.shape.width());
        let blocks = (positions.start / KEY_BLOCK..positions.end.div_ceil(KEY_BLOCK)).map(|page| {
            let start = page * KEY_BLOCK;
            (page, positions.start.saturating_sub(start)..KEY_BLOCK.min(positions.end - start))
        });
        match &self.pages {
            Pages::F16(layers) => {
                for (page, positions) in blocks {
                    let (keys, values) = layers[layer][page].head(self.shape, head);
                    ops::attend_block_f16(queries, keys, values, positions, scale, running.again());
                }
            }
            Pages::F32(layers) => {
                for (page, positions) in blocks {
                    let (keys, values) = layers[layer][page].head(self.shape, head);
                    ops::attend_block_f32(queries, keys, values, positions, scale, running.again());
                }
            }
        }
        let heads = output.chunks_exact_mut(head_dim).zip(running.values.chunks_exact(self.shape.width()));
        for ((output, values), sum) in heads.zip(&*running.sum) {
            ops::finish_attention(*sum, values, output);
        }
    }
}

/// What scores are multiplied with: `1 / √head_dim`, rounded once.
#[must_use]
pub fn attention_scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}

/// What one thread needs for [`KvCache::attend`].
#[derive(Clone, Debug)]
pub struct AttentionScratch {
    max: Vec<f32>,
    sum: Vec<f32>,
    values: Vec<f32>,
}

impl AttentionScratch {
    /// For at most `heads` query heads at a time.
    #[must_use]
    pub fn new(heads: usize, head_dim: usize) -> Self {
        let width = head_dim.next_multiple_of(LANES);
        Self { max: vec![0.0; heads], sum: vec![0.0; heads], values: vec![0.0; heads * width] }
    }

    fn start(&mut self, heads: usize, width: usize) -> Running<'_> {
        let (max, sum, values) = (&mut self.max[..heads], &mut self.sum[..heads], &mut self.values[..heads * width]);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        values.fill(0.0);
        Running { max, sum, values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternion_kernels_ref::{attention, widen};

    const HEADS: usize = 2;
    const HEAD_DIM: usize = 6;

    /// Key or value of a position, some numbers.
    fn row(position: usize, of: usize) -> Vec<f32> {
        (0..HEADS * HEAD_DIM).map(|i| ((position * 31 + i * 17 + of * 7) % 101) as f32 * 0.03 - 1.5).collect()
    }

    fn filled(kind: KvType, positions: usize) -> KvCache {
        let mut cache = KvCache::new(kind, 2, HEADS, HEAD_DIM);
        for position in 0..positions {
            cache.reserve(position + 1);
            cache.store(1, position, &row(position, 0), &row(position, 1));
        }
        cache
    }

    fn expected(kind: KvType, head: usize, seen: Range<usize>, queries: &[f32]) -> Vec<f32> {
        let rounded = |x: f32| match kind {
            KvType::F16 => widen::f16_to_f32(widen::f32_to_f16(x)),
            KvType::F32 => x,
        };
        let all = |of: usize| -> Vec<f32> {
            let rows = (0..seen.end).map(|position| row(position, of));
            rows.flat_map(|row| row[head * HEAD_DIM..][..HEAD_DIM].to_vec()).map(rounded).collect()
        };
        let (keys, values) = (all(0), all(1));
        let scale = attention_scale(HEAD_DIM);
        let heads = queries.chunks_exact(HEAD_DIM);
        heads.flat_map(|q| attention::attention_from(q, &keys, &values, seen.start, scale)).collect()
    }

    #[test]
    fn attention_over_pages_is_the_references_for_every_length_and_type() {
        let queries: Vec<f32> = (0..3 * HEAD_DIM).map(|i| i as f32 * 0.2 - 1.0).collect();
        let mut scratch = AttentionScratch::new(3, HEAD_DIM);
        for kind in KvType::ALL {
            let cache = filled(kind, 200);
            let ends = [1, 2, 15, 16, 17, 63, 64, 65, 128, 199, 200];
            let windows = [3..4, 10..70, 63..64, 64..65, 64..200, 130..199].into_iter();
            for seen in ends.into_iter().map(|end| 0..end).chain(windows) {
                for head in 0..HEADS {
                    let mut output = vec![0.0; queries.len()];
                    cache.attend(1, head, seen.clone(), &queries, &mut output, &mut scratch);
                    assert_eq!(output, expected(kind, head, seen.clone(), &queries), "{kind} head {head} of {seen:?}");
                }
            }
        }
    }

    #[test]
    fn memory_follows_the_positions_in_use() {
        let mut cache = filled(KvType::F16, 129);
        // Keys take 6 elements a position and values 16, padded; two layers of two heads, two bytes each.
        let page = 2 * HEADS * KEY_BLOCK * (6 + 16) * 2;
        assert_eq!(cache.bytes(), 3 * page);
        cache.release(64);
        assert_eq!(cache.bytes(), page);
        assert_eq!(filled(KvType::F32, 1).bytes(), 2 * page);
    }

    #[test]
    fn a_type_prints_and_parses_back() {
        for kind in KvType::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("f8".parse::<KvType>().is_err());
    }
}
