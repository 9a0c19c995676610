//! Keys and values of the positions so far, laid out for attention.
//!
//! A page holds blocks of [`KEY_BLOCK`] positions of all layers, so memory follows the length of the text: the first holds
//! one, the next ones as many as all before, up to [`LARGEST`]. Long contexts read hundreds of megabytes per token, so pages lie
//! on the system's huge pages where they are large enough, and what attention reads one after the other lies so: the blocks of a
//! layer and key-value head, each with its keys, then its values. Keys lie in groups of sixteen positions and values in groups of
//! sixteen dimensions, so that attention works on sixteen sums at once ([`CachedBlock`]). Keys and values of int8 have a step
//! per position and head behind them.
//!
//! Texts that begin alike share their pages: a fork takes no time and no memory, and a page that several caches hold is
//! copied by the first of them that is to write into it.

use std::fmt::{self, Debug};
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ternion_kernels_ref::attention::KEY_BLOCK;
use ternion_kernels_ref::lanes::LANES;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::formats::ModelConfig;
use crate::memory::PageBuffer;
use crate::ops::{self, CachedBlock, QuantizedQueries, Running};

/// The precision of cached keys and values. It is an input of a model's results, unlike kernels or threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// IEEE half.
    #[default]
    F16,
    /// IEEE single: what the published models were trained and are judged with.
    F32,
    /// Eight bits and a step per position and head: a vector is rounded as activations are before a projection
    /// ([`ternion_kernels_ref::QuantizedRow`]), to `round(x · q)` with `q = 127 / max|x|`, and read as `element / q`.
    Int8,
}

impl KvType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F16, Self::F32, Self::Int8];

    /// Bytes that the cache of a text of so many positions takes.
    #[must_use]
    pub fn bytes(self, config: &ModelConfig, positions: usize) -> u64 {
        let pages = pages_for(positions);
        (blocks_in(pages) as u64).saturating_mul(self.block_bytes(config))
    }

    /// The longest text whose cache takes at most so many bytes, in positions.
    #[must_use]
    pub fn positions(self, config: &ModelConfig, bytes: u64) -> usize {
        let blocks = usize::try_from(bytes / self.block_bytes(config)).unwrap_or(usize::MAX);
        blocks_in(Place::of(blocks).page).saturating_mul(KEY_BLOCK)
    }

    /// Bytes of one block of all layers.
    fn block_bytes(self, config: &ModelConfig) -> u64 {
        let shape = Shape { layers: config.layers, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let head = match self {
            Self::F16 => Page::<u16>::block_bytes(shape),
            Self::F32 => Page::<f32>::block_bytes(shape),
            Self::Int8 => Page::<i8>::block_bytes(shape),
        };
        (head as u64).saturating_mul(shape.layers as u64).saturating_mul(shape.kv_heads as u64).max(1)
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Int8 => "int8",
        })
    }
}

/// A word that names no type of the cache.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no type of a KV cache: expected f16, f32 or int8")]
pub struct ParseKvTypeError(String);

impl FromStr for KvType {
    type Err = ParseKvTypeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|kind| kind.to_string() == text);
        known.ok_or_else(|| ParseKvTypeError(text.to_owned()))
    }
}

/// Sizes of keys and values.
#[derive(Clone, Copy, Debug)]
struct Shape {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Shape {
    /// Elements from one position's values to the next.
    const fn width(self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }
}

/// What a cache stores a number as.
trait Element: FromBytes + IntoBytes + Immutable + Copy + Default + Debug + Send + Sync + 'static {
    const KIND: KvType;
    /// Whether a vector has a step beside its elements.
    const STEPS: bool;
    /// How many of the elements of a key that are summed over lie side by side.
    const KEYS_ALONG: usize;
    /// As `KEYS_ALONG`, of the values of a dimension.
    const VALUES_ALONG: usize;
    /// How many groups of sums lie side by side.
    const ROW: usize;

    /// Rounds one vector; returns the step that its elements are to be multiplied with.
    fn round(vector: &[f32], elements: &mut [Self]) -> f32;

    fn attend(queries: Queries<'_>, block: CachedBlock<'_, Self>, scale: f32, running: Running<'_>);
}

impl Element for u16 {
    const KIND: KvType = KvType::F16;
    const STEPS: bool = false;
    const KEYS_ALONG: usize = 1;
    const VALUES_ALONG: usize = 1;
    const ROW: usize = ops::F16_ROW;

    fn round(vector: &[f32], elements: &mut [Self]) -> f32 {
        ops::narrow_f16(vector, elements);
        1.0
    }

    fn attend(queries: Queries<'_>, block: CachedBlock<'_, Self>, scale: f32, running: Running<'_>) {
        ops::attend_block_f16(queries.floats, block, scale, running);
    }
}

impl Element for f32 {
    const KIND: KvType = KvType::F32;
    const STEPS: bool = false;
    const KEYS_ALONG: usize = 1;
    const VALUES_ALONG: usize = 1;
    const ROW: usize = ops::F32_ROW;

    fn round(vector: &[f32], elements: &mut [Self]) -> f32 {
        elements.copy_from_slice(vector);
        1.0
    }

    fn attend(queries: Queries<'_>, block: CachedBlock<'_, Self>, scale: f32, running: Running<'_>) {
        ops::attend_block_f32(queries.floats, block, scale, running);
    }
}

impl Element for i8 {
    const KIND: KvType = KvType::Int8;
    const STEPS: bool = true;
    const KEYS_ALONG: usize = ops::INT8_KEYS_ALONG;
    const VALUES_ALONG: usize = ops::INT8_VALUES_ALONG;
    const ROW: usize = ops::INT8_ROW;

    fn round(vector: &[f32], elements: &mut [Self]) -> f32 {
        1.0 / ops::quantize(vector, elements)
    }

    fn attend(queries: Queries<'_>, block: CachedBlock<'_, Self>, scale: f32, running: Running<'_>) {
        ops::attend_block_int8(queries.quantized, block, scale, running);
    }
}

/// Blocks of the largest pages, a power of two. Larger ones are read faster, but more of the last is without use.
const LARGEST: usize = 4;

/// Blocks of the first so many pages.
const fn blocks_in(pages: usize) -> usize {
    match pages {
        0 => 0,
        _ if pages <= LARGEST.ilog2() as usize => 1 << (pages - 1),
        _ => LARGEST * (pages - LARGEST.ilog2() as usize),
    }
}

/// How many pages so many positions take.
const fn pages_for(positions: usize) -> usize {
    match positions {
        0 => 0,
        _ => Place::of((positions - 1) / KEY_BLOCK).page + 1,
    }
}

/// Where a block lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    page: usize,
    /// Its number in the page.
    within: usize,
}

impl Place {
    const fn of(block: usize) -> Self {
        let page = match block {
            0 => 0,
            LARGEST.. => block / LARGEST + LARGEST.ilog2() as usize,
            _ => block.ilog2() as usize + 1,
        };
        Self { page, within: block - blocks_in(page) }
    }
}

/// Some blocks of all layers.
#[derive(Debug)]
struct Page<E> {
    /// `[layers, kv_heads, blocks]`; a block is keys as in a [`CachedBlock`], their steps as `f32` for types that have them,
    /// values and their steps.
    bytes: PageBuffer,
    blocks: usize,
    _elements: PhantomData<E>,
}

impl<E: Element> Page<E> {
    /// Bytes of the steps of a block's keys or values.
    const STEP_BYTES: usize = if E::STEPS { KEY_BLOCK * size_of::<f32>() } else { 0 };

    fn new(shape: Shape, blocks: usize) -> io::Result<Self> {
        let bytes = PageBuffer::zeroed(shape.layers * shape.kv_heads * blocks * Self::block_bytes(shape))?;
        Ok(Self { bytes, blocks, _elements: PhantomData })
    }

    /// One of the same content.
    fn copy(&self) -> io::Result<Self> {
        let mut bytes = PageBuffer::zeroed(self.bytes.len())?;
        bytes.copy_from_slice(&self.bytes);
        Ok(Self { bytes, blocks: self.blocks, _elements: PhantomData })
    }

    /// Elements of a key, with zeros up to whole groups of those side by side.
    const fn key_len(shape: Shape) -> usize {
        shape.head_dim.next_multiple_of(E::KEYS_ALONG)
    }

    /// Bytes of one block's keys and of its values.
    const fn part_bytes(shape: Shape) -> [usize; 2] {
        [Self::key_len(shape) * KEY_BLOCK * size_of::<E>(), shape.width() * KEY_BLOCK * size_of::<E>()]
    }

    /// Bytes of one block of one head.
    const fn block_bytes(shape: Shape) -> usize {
        let [keys, values] = Self::part_bytes(shape);
        keys + values + 2 * Self::STEP_BYTES
    }

    /// Where a block of one head of all layers' lies: its keys, their steps, its values and their steps.
    fn parts(&self, shape: Shape, head: usize, block: usize) -> [Range<usize>; 4] {
        let [keys, values] = Self::part_bytes(shape);
        let mut end = (head * self.blocks + block) * Self::block_bytes(shape);
        [keys, Self::STEP_BYTES, values, Self::STEP_BYTES].map(|bytes| {
            end += bytes;
            end - bytes..end
        })
    }

    /// Where an element lies that is number `i` of `len` in a sum, of which `along` lie side by side, and belongs to sum
    /// `across` of `of`: `[of / 16 ROW, len / along, ROW, 16, along]`, and groups of sixteen that make no row come one after
    /// the other.
    const fn place((i, len, along): (usize, usize, usize), (across, of): (usize, usize)) -> usize {
        let group = across / LANES;
        let row = if group < of / LANES / E::ROW * E::ROW { E::ROW } else { 1 };
        let before = group / row * (len / along) + i / along;
        ((before * row + group % row) * LANES + across % LANES) * along + i % along
    }

    /// Stores the key and value of one head of all layers' for a position of a block, with room for a vector.
    fn store(
        &mut self,
        shape: Shape,
        head: usize,
        (block, position): (usize, usize),
        [key, value]: [&[f32]; 2],
        rounded: &mut [E],
    ) {
        let [keys, key_steps, values, value_steps] = self.parts(shape, head, block);
        let key_step = E::round(key, rounded);
        let keys = elements_mut::<E>(&mut self.bytes[keys]);
        for (d, k) in rounded.iter().enumerate() {
            keys[Self::place((d, Self::key_len(shape), E::KEYS_ALONG), (position, KEY_BLOCK))] = *k;
        }
        let value_step = E::round(value, rounded);
        let values = elements_mut::<E>(&mut self.bytes[values]);
        for (d, v) in rounded.iter().enumerate() {
            values[Self::place((position, KEY_BLOCK, E::VALUES_ALONG), (d, shape.width()))] = *v;
        }
        if E::STEPS {
            elements_mut::<f32>(&mut self.bytes[key_steps])[position] = key_step;
            elements_mut::<f32>(&mut self.bytes[value_steps])[position] = value_step;
        }
    }

    /// Some positions of a block of one head of all layers'.
    fn block(&self, shape: Shape, head: usize, block: usize, positions: Range<usize>) -> CachedBlock<'_, E> {
        let parts = self.parts(shape, head, block).map(|part| &self.bytes[part]);
        let [keys, values] = [parts[0], parts[2]].map(elements);
        let [key_steps, value_steps] = [parts[1], parts[3]].map(elements);
        let (first, positions, next_keys) = (positions.start, positions.end, &[][..]);
        CachedBlock { keys, values, key_steps, value_steps, next_keys, first, positions }
    }

    /// The keys of a block of one head of all layers'.
    fn keys(&self, shape: Shape, head: usize, block: usize) -> &[E] {
        let [keys, ..] = self.parts(shape, head, block);
        elements(&self.bytes[keys])
    }
}

/// Part of a page as elements of one type.
fn elements<T: FromBytes + IntoBytes + Immutable>(bytes: &[u8]) -> &[T] {
    <[T]>::ref_from_bytes(bytes).expect("parts of a page are aligned and whole")
}

/// As [`elements`].
fn elements_mut<T: FromBytes + IntoBytes>(bytes: &mut [u8]) -> &mut [T] {
    <[T]>::mut_from_bytes(bytes).expect("parts of a page are aligned and whole")
}

/// The pages of a cache, whatever their elements are.
trait Pages: Debug + Send + Sync {
    fn kind(&self) -> KvType;
    /// Has these pages, and for itself.
    fn own(&mut self, pages: Range<usize>) -> io::Result<()>;
    /// The first `pages` pages, shared.
    fn fork(&self, pages: usize) -> Box<dyn Pages>;
    /// Has at most `pages` pages.
    fn shrink(&mut self, pages: usize);
    fn bytes(&self) -> usize;
    fn store(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]);
    /// Merges some positions of a block: `of` is a layer and a head.
    fn attend(
        &self,
        of: (usize, usize),
        block: usize,
        positions: Range<usize>,
        queries: Queries<'_>,
        scale: f32,
        running: Running<'_>,
    );
}

#[derive(Debug)]
struct PagesOf<E> {
    shape: Shape,
    pages: Vec<Arc<Page<E>>>,
    /// One head's key or value, rounded, before it is stored.
    rounded: Vec<E>,
}

impl<E: Element> PagesOf<E> {
    fn boxed(shape: Shape, pages: &[Arc<Page<E>>]) -> Box<dyn Pages> {
        Box::new(Self { shape, pages: pages.to_vec(), rounded: vec![E::default(); shape.head_dim] })
    }
}

impl<E: Element> Pages for PagesOf<E> {
    fn kind(&self) -> KvType {
        E::KIND
    }

    fn own(&mut self, pages: Range<usize>) -> io::Result<()> {
        for page in self.pages.iter_mut().take(pages.end).skip(pages.start) {
            if Arc::get_mut(page).is_none() {
                *page = Arc::new(page.copy()?);
            }
        }
        while self.pages.len() < pages.end {
            let page = self.pages.len();
            self.pages.push(Arc::new(Page::new(self.shape, blocks_in(page + 1) - blocks_in(page))?));
        }
        Ok(())
    }

    fn fork(&self, pages: usize) -> Box<dyn Pages> {
        Self::boxed(self.shape, &self.pages[..pages])
    }

    fn shrink(&mut self, pages: usize) {
        self.pages.truncate(pages);
    }

    fn bytes(&self) -> usize {
        self.pages.iter().map(|page| page.bytes.len()).sum()
    }

    fn store(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        let Shape { layers, kv_heads, head_dim } = self.shape;
        assert!(layer < layers, "store: one of the layers");
        assert!([key, value].iter().all(|row| row.len() == kv_heads * head_dim), "store: a vector of every head");
        let heads = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
        for (head, (key, value)) in heads.enumerate() {
            let (place, head) = (Place::of(position / KEY_BLOCK), layer * kv_heads + head);
            let page = Arc::get_mut(&mut self.pages[place.page]).expect("store: a reserved position");
            page.store(self.shape, head, (place.within, position % KEY_BLOCK), [key, value], &mut self.rounded);
        }
    }

    fn attend(
        &self,
        (layer, head): (usize, usize),
        block: usize,
        positions: Range<usize>,
        queries: Queries<'_>,
        scale: f32,
        running: Running<'_>,
    ) {
        let Shape { layers, kv_heads, .. } = self.shape;
        assert!(layer < layers && head < kv_heads, "attend: one of the layers and heads");
        let (head, place, next) = (layer * kv_heads + head, Place::of(block), Place::of(block + 1));
        let next_keys = self.pages.get(next.page).map_or(&[][..], |page| page.keys(self.shape, head, next.within));
        let block = self.pages[place.page].block(self.shape, head, place.within, positions);
        E::attend(queries, CachedBlock { next_keys, ..block }, scale, running);
    }
}

/// Queries of some heads that share a key-value head, in the forms that caches multiply with.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[heads, head_dim]`
    pub floats: &'a [f32],
    /// The same rounded, which an int8 cache alone needs.
    pub quantized: QuantizedQueries<'a>,
}

/// The cache of one sequence.
#[derive(Debug)]
pub struct KvCache {
    head_dim: usize,
    pages: Box<dyn Pages>,
}

impl KvCache {
    /// An empty cache for `layers` layers of `kv_heads` heads.
    #[must_use]
    pub fn new(kind: KvType, layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        let shape = Shape { layers, kv_heads, head_dim };
        let pages = match kind {
            KvType::F16 => PagesOf::<u16>::boxed(shape, &[]),
            KvType::F32 => PagesOf::<f32>::boxed(shape, &[]),
            KvType::Int8 => PagesOf::<i8>::boxed(shape, &[]),
        };
        Self { head_dim, pages }
    }

    /// The precision of its elements.
    #[must_use]
    pub fn kind(&self) -> KvType {
        self.pages.kind()
    }

    /// Makes room in every layer for `positions`, which are to be stored next.
    ///
    /// # Errors
    /// If memory runs out. What there was is still there.
    pub fn reserve(&mut self, positions: Range<usize>) -> io::Result<()> {
        self.pages.own(Place::of(positions.start / KEY_BLOCK).page..pages_for(positions.end))
    }

    /// A cache that begins with the first `positions` positions of this one and shares their pages.
    ///
    /// # Panics
    /// If fewer have been reserved.
    #[must_use]
    pub fn fork(&self, positions: usize) -> Self {
        Self { head_dim: self.head_dim, pages: self.pages.fork(pages_for(positions)) }
    }

    /// Gives back the memory of what lies beyond `positions` positions.
    pub fn release(&mut self, positions: usize) {
        self.pages.shrink(pages_for(positions));
    }

    /// Bytes that it takes, with those that it shares.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// Stores key and value of one position, `[kv_heads, head_dim]` each.
    ///
    /// # Panics
    /// If there is no such layer, no room for the position ([`reserve`](Self::reserve)), or a length is wrong.
    pub fn store(&mut self, layer: usize, position: usize, key: &[f32], value: &[f32]) {
        self.pages.store(layer, position, key, value);
    }

    /// Merges block `block`, that is positions `128 · block` on, into the attention of `running.max.len()` query heads that
    /// share the key-value head `head` and see these `positions`.
    ///
    /// # Panics
    /// If there is no such layer or head, none of the positions is in the block, or fewer have been reserved.
    pub fn attend(
        &self,
        layer: usize,
        head: usize,
        block: usize,
        positions: Range<usize>,
        queries: Queries<'_>,
        running: Running<'_>,
    ) {
        let start = block * KEY_BLOCK;
        let positions = positions.start.saturating_sub(start)..KEY_BLOCK.min(positions.end.saturating_sub(start));
        self.pages.attend((layer, head), block, positions, queries, attention_scale(self.head_dim), running);
    }
}

/// What scores are multiplied with: `1 / √head_dim`, rounded once.
#[must_use]
pub fn attention_scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::synth::Recipe;
    use ternion_kernels_ref::attention::{QuantizedRows, Rows, attention_from};
    use ternion_kernels_ref::{QuantizedRow, widen};

    const HEADS: usize = 2;
    const HEAD_DIM: usize = 6;

    /// Key or value of a position, some numbers.
    fn row(position: usize, of: usize) -> Vec<f32> {
        (0..HEADS * HEAD_DIM).map(|i| ((position * 31 + i * 17 + of * 7) % 101) as f32 * 0.03 - 1.5).collect()
    }

    fn filled(kind: KvType, positions: usize) -> KvCache {
        let mut cache = KvCache::new(kind, 2, HEADS, HEAD_DIM);
        for position in 0..positions {
            cache.reserve(position..position + 1).unwrap();
            cache.store(1, position, &row(position, 0), &row(position, 1));
        }
        cache
    }

    fn expected(kind: KvType, head: usize, seen: Range<usize>, queries: &[f32]) -> Vec<f32> {
        let all = |of: usize| -> Vec<Vec<f32>> {
            (0..seen.end).map(|position| row(position, of)[head * HEAD_DIM..][..HEAD_DIM].to_vec()).collect()
        };
        let (keys, values, scale) = (all(0), all(1), attention_scale(HEAD_DIM));
        let queries = queries.chunks_exact(HEAD_DIM);
        if kind == KvType::Int8 {
            let quantized = |rows: &[Vec<f32>]| -> (Vec<i8>, Vec<f32>) {
                let rows: Vec<_> = rows.iter().map(|row| QuantizedRow::new(row)).collect();
                (
                    rows.iter().flat_map(QuantizedRow::values).copied().collect(),
                    rows.iter().map(|r| 1.0 / r.q()).collect(),
                )
            };
            let ((keys, key_steps), (values, value_steps)) = (quantized(&keys), quantized(&values));
            let keys = QuantizedRows { elements: &keys, steps: &key_steps };
            let values = QuantizedRows { elements: &values, steps: &value_steps };
            return queries.flat_map(|q| attention_from(q, keys, values, seen.start, scale)).collect();
        }
        let rounded = |x: f32| if kind == KvType::F16 { widen::f16_to_f32(widen::f32_to_f16(x)) } else { x };
        let [keys, values] = [keys, values].map(|rows| rows.concat().into_iter().map(rounded).collect::<Vec<f32>>());
        queries.flat_map(|q| attention_from(q, Rows(&keys), Rows(&values), seen.start, scale)).collect()
    }

    fn attend(cache: &KvCache, head: usize, seen: Range<usize>, queries: &[f32]) -> Vec<f32> {
        let heads = queries.len() / HEAD_DIM;
        let (mut max, mut sum, mut values) = (vec![0.0; heads], vec![[0.0; LANES]; heads], vec![0.0; heads * LANES]);
        let len = HEAD_DIM.next_multiple_of(ops::INT8_KEYS_ALONG);
        let mut rounded = vec![0; heads * len];
        let rows = queries.chunks_exact(HEAD_DIM).zip(rounded.chunks_exact_mut(len));
        let (steps, sums): (Vec<_>, Vec<_>) = rows.map(|(query, rounded)| ops::quantize_query(query, rounded)).unzip();
        let quantized = QuantizedQueries { values: &rounded, steps: &steps, sums: &sums };
        let all = Queries { floats: queries, quantized };
        let mut running = Running { max: &mut max, sum: &mut sum, values: &mut values };
        running.clear(0.0);
        for block in seen.start / KEY_BLOCK..seen.end.div_ceil(KEY_BLOCK) {
            cache.attend(1, head, block, seen.clone(), all, running.again());
        }
        let mut output = vec![0.0; queries.len()];
        for ((output, values), sum) in output.chunks_exact_mut(HEAD_DIM).zip(values.chunks_exact(LANES)).zip(&sum) {
            ops::finish_attention(sum, values, output);
        }
        output
    }

    #[test]
    fn attention_over_pages_is_the_references_for_every_length_and_type() {
        let queries: Vec<f32> = (0..3 * HEAD_DIM).map(|i| i as f32 * 0.2 - 1.0).collect();
        for kind in KvType::ALL {
            let cache = filled(kind, 1400);
            let ends = [1, 2, 15, 16, 17, 127, 128, 129, 256, 399, 400, 1400];
            let windows = [3..4, 10..140, 127..128, 128..129, 128..400, 260..399, 1000..1300].into_iter();
            for seen in ends.into_iter().map(|end| 0..end).chain(windows) {
                for head in 0..HEADS {
                    let found = attend(&cache, head, seen.clone(), &queries);
                    assert_eq!(found, expected(kind, head, seen.clone(), &queries), "{kind} head {head} of {seen:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_written_into_a_fork_or_its_origin_stays_out_of_the_other() {
        let queries: Vec<f32> = (0..3 * HEAD_DIM).map(|i| i as f32 * 0.2 - 1.0).collect();
        let other = |position: usize, of| row(position + 1000, of);
        for kind in KvType::ALL {
            for common in [0, 1, 127, 128, 129, 300] {
                let mut origin = filled(kind, 400);
                let mut fork = origin.fork(common);
                fork.reserve(common..310).unwrap();
                origin.reserve(200..400).unwrap();
                (common..310).for_each(|at| fork.store(1, at, &other(at, 0), &other(at, 1)));
                (200..400).for_each(|at| origin.store(1, at, &row(at, 0), &row(at, 1)));
                let mut alone = filled(kind, common);
                alone.reserve(common..310).unwrap();
                (common..310).for_each(|at| alone.store(1, at, &other(at, 0), &other(at, 1)));
                for head in 0..HEADS {
                    assert_eq!(attend(&fork, head, 0..310, &queries), attend(&alone, head, 0..310, &queries), "{kind}");
                    assert_eq!(
                        attend(&origin, head, 0..400, &queries),
                        expected(kind, head, 0..400, &queries),
                        "{kind}"
                    );
                }
            }
        }
    }

    #[test]
    fn memory_follows_the_positions_in_use() {
        // Keys take 6 elements a position and values 16, padded; two layers of two heads, two bytes each.
        let block = 2 * HEADS * KEY_BLOCK * (6 + 16) * 2;
        let mut cache = filled(KvType::F16, 1025);
        for (positions, blocks) in
            [(1025, 12), (1024, 8), (513, 8), (512, 4), (257, 4), (256, 2), (129, 2), (128, 1), (1, 1)]
        {
            cache.release(positions);
            assert_eq!(cache.bytes(), blocks * block, "{positions}");
        }
        cache.release(0);
        assert_eq!(cache.bytes(), 0);
        assert_eq!(filled(KvType::F32, 1).bytes(), 2 * block);
        // Keys of int8 take 8 elements, whole quads.
        let int8 = 2 * HEADS * KEY_BLOCK * (8 + 16 + 2 * 4);
        assert_eq!(filled(KvType::Int8, 1).bytes(), int8);
    }

    #[test]
    fn bytes_are_those_that_a_cache_takes() {
        let config =
            ModelConfig { layers: 2, kv_heads: HEADS, head_dim: HEAD_DIM, ..Recipe::preset("125M").unwrap().config };
        for kind in KvType::ALL {
            for positions in [0, 1, 128, 129, 300, 513, 2000] {
                let mut cache = KvCache::new(kind, 2, HEADS, HEAD_DIM);
                cache.reserve(0..positions).unwrap();
                let bytes = cache.bytes() as u64;
                assert_eq!(kind.bytes(&config, positions), bytes, "{kind}, {positions} positions");
                let fits = kind.positions(&config, bytes);
                assert!(fits >= positions && kind.bytes(&config, fits) == bytes, "{kind}: {fits}");
                assert!(kind.bytes(&config, fits + 1) > bytes, "{kind}: {fits}");
            }
            assert_eq!(kind.positions(&config, kind.bytes(&config, 1) - 1), 0);
            assert_eq!(kind.positions(&config, u64::MAX) % KEY_BLOCK, 0);
        }
    }

    #[test]
    fn every_block_has_its_own_place() {
        let blocks = |page| blocks_in(page + 1) - blocks_in(page);
        assert_eq!([0, 1, 2, 3, 4].map(blocks), [1, 1, 2, LARGEST, LARGEST]);
        let mut expected = (0..).flat_map(|page| (0..blocks(page)).map(move |within| (page, within)));
        for block in 0..40 {
            let Place { page, within } = Place::of(block);
            assert_eq!(Some((page, within)), expected.next(), "{block}");
        }
    }

    #[test]
    fn a_type_prints_and_parses_back() {
        for kind in KvType::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("f8".parse::<KvType>().is_err());
    }
}
