//! Keys and values of the positions so far, laid out for attention.
//!
//! A page holds [`KEY_BLOCK`] positions of all layers, so memory follows the length of the text and a page is one block
//! of attention's fixed order. Long contexts read hundreds of megabytes per token, so pages lie on the system's huge pages
//! where they are large enough. Within a page, per layer and key-value head, keys lie in groups of sixteen positions and values
//! in groups of sixteen dimensions, so that attention works on sixteen sums at once ([`CachedBlock`]). Keys and values of
//! int8 have a step per position and head beside them.
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

use crate::memory::PageBuffer;
use crate::ops::{self, CachedBlock, Running, WideQueries};

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

    /// Elements of one head's keys in a page.
    const fn keys(self) -> usize {
        self.head_dim * KEY_BLOCK
    }

    /// Elements of one head's values in a page.
    const fn values(self) -> usize {
        self.width() * KEY_BLOCK
    }
}

/// What a cache stores a number as.
trait Element: FromBytes + IntoBytes + Immutable + Copy + Default + Debug + Send + Sync + 'static {
    const KIND: KvType;
    /// Whether a vector has a step beside its elements.
    const STEPS: bool;
    /// How many of the elements that are summed over lie side by side.
    const ALONG: usize;

    /// Rounds one vector; returns the step that its elements are to be multiplied with.
    fn round(vector: &[f32], elements: &mut [Self]) -> f32;

    fn attend(queries: Queries<'_>, block: CachedBlock<'_, Self>, scale: f32, running: Running<'_>);
}

impl Element for u16 {
    const KIND: KvType = KvType::F16;
    const STEPS: bool = false;
    const ALONG: usize = 1;

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
    const ALONG: usize = 1;

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
    const ALONG: usize = 2;

    fn round(vector: &[f32], elements: &mut [Self]) -> f32 {
        1.0 / ops::quantize(vector, elements)
    }

    fn attend(queries: Queries<'_>, block: CachedBlock<'_, Self>, scale: f32, running: Running<'_>) {
        ops::attend_block_int8(queries.wide, block, scale, running);
    }
}

/// [`KEY_BLOCK`] positions of all layers.
#[derive(Debug)]
struct Page<E> {
    /// Per layer and key-value head the keys and the values as in a [`CachedBlock`]. Then, for types that have them, the
    /// steps of keys and values as `f32`, `[layers, kv_heads, 2, KEY_BLOCK]`.
    bytes: PageBuffer,
    _elements: PhantomData<E>,
}

impl<E: Element> Page<E> {
    fn new(shape: Shape) -> io::Result<Self> {
        let heads = shape.layers * shape.kv_heads;
        let steps = if E::STEPS { heads * 2 * KEY_BLOCK * size_of::<f32>() } else { 0 };
        let bytes = PageBuffer::zeroed(heads * Self::head_bytes(shape) + steps)?;
        Ok(Self { bytes, _elements: PhantomData })
    }

    /// One of the same content.
    fn copy(&self) -> io::Result<Self> {
        let mut bytes = PageBuffer::zeroed(self.bytes.len())?;
        bytes.copy_from_slice(&self.bytes);
        Ok(Self { bytes, _elements: PhantomData })
    }

    /// Bytes of one head's keys and values.
    const fn head_bytes(shape: Shape) -> usize {
        (shape.keys() + shape.values()) * size_of::<E>()
    }

    /// Where an element lies that is number `along` of `len` in a sum and belongs to sum `across`:
    /// `[across / 16, len / ALONG, 16, ALONG]`.
    const fn place(along: usize, len: usize, across: usize) -> usize {
        let group = across / LANES * (len / E::ALONG) + along / E::ALONG;
        (group * LANES + across % LANES) * E::ALONG + along % E::ALONG
    }

    /// Stores the key and value of one position of one head of all layers'.
    fn store(&mut self, shape: Shape, head: usize, position: usize, [key, value]: [&[f32]; 2], rounded: &mut [E]) {
        let (elements, steps) = self.bytes.split_at_mut(shape.layers * shape.kv_heads * Self::head_bytes(shape));
        let elements = &mut elements[head * Self::head_bytes(shape)..][..Self::head_bytes(shape)];
        let (keys, values) = elements_mut::<E>(elements).split_at_mut(shape.keys());
        let key_step = E::round(key, rounded);
        for (d, k) in rounded.iter().enumerate() {
            keys[Self::place(d, shape.head_dim, position)] = *k;
        }
        let value_step = E::round(value, rounded);
        for (d, v) in rounded.iter().enumerate() {
            values[Self::place(position, KEY_BLOCK, d)] = *v;
        }
        if E::STEPS {
            let steps = &mut elements_mut::<f32>(steps)[head * 2 * KEY_BLOCK..][..2 * KEY_BLOCK];
            (steps[position], steps[KEY_BLOCK + position]) = (key_step, value_step);
        }
    }

    /// Some positions of one head of all layers'.
    fn block(&self, shape: Shape, head: usize, positions: Range<usize>) -> CachedBlock<'_, E> {
        let (all, steps) = self.bytes.split_at(shape.layers * shape.kv_heads * Self::head_bytes(shape));
        let (keys, values) =
            elements::<E>(&all[head * Self::head_bytes(shape)..][..Self::head_bytes(shape)]).split_at(shape.keys());
        let steps = if E::STEPS { &elements(steps)[head * 2 * KEY_BLOCK..][..2 * KEY_BLOCK] } else { &[][..] };
        let (key_steps, value_steps) = steps.split_at(steps.len() / 2);
        let (first, positions, next_keys) = (positions.start, positions.end, &[][..]);
        CachedBlock { keys, values, key_steps, value_steps, next_keys, first, positions }
    }

    /// The keys of one head of all layers'.
    fn keys(&self, shape: Shape, head: usize) -> &[E] {
        elements::<E>(&self.bytes[head * Self::head_bytes(shape)..][..shape.keys() * size_of::<E>()])
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
    /// Merges some positions of a page: `of` is a layer and a head, `seen` the page and which positions.
    fn attend(
        &self,
        of: (usize, usize),
        seen: (usize, Range<usize>),
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
            self.pages.push(Arc::new(Page::new(self.shape)?));
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
            let (page, head) = (&mut self.pages[position / KEY_BLOCK], layer * kv_heads + head);
            let page = Arc::get_mut(page).expect("store: a reserved position");
            page.store(self.shape, head, position % KEY_BLOCK, [key, value], &mut self.rounded);
        }
    }

    fn attend(
        &self,
        (layer, head): (usize, usize),
        (page, positions): (usize, Range<usize>),
        queries: Queries<'_>,
        scale: f32,
        running: Running<'_>,
    ) {
        let Shape { layers, kv_heads, .. } = self.shape;
        assert!(layer < layers && head < kv_heads, "attend: one of the layers and heads");
        let head = layer * kv_heads + head;
        let next_keys = self.pages.get(page + 1).map_or(&[][..], |next| next.keys(self.shape, head));
        let block = CachedBlock { next_keys, ..self.pages[page].block(self.shape, head, positions) };
        E::attend(queries, block, scale, running);
    }
}

/// Queries of some heads that share a key-value head, in the forms that caches multiply with.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[heads, head_dim]`
    pub floats: &'a [f32],
    /// The same rounded, which an int8 cache alone needs.
    pub wide: WideQueries<'a>,
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
        self.pages.own(positions.start / KEY_BLOCK..positions.end.div_ceil(KEY_BLOCK))
    }

    /// A cache that begins with the first `positions` positions of this one and shares their pages.
    ///
    /// # Panics
    /// If fewer have been reserved.
    #[must_use]
    pub fn fork(&self, positions: usize) -> Self {
        Self { head_dim: self.head_dim, pages: self.pages.fork(positions.div_ceil(KEY_BLOCK)) }
    }

    /// Gives back the memory of what lies beyond `positions` positions.
    pub fn release(&mut self, positions: usize) {
        self.pages.shrink(positions.div_ceil(KEY_BLOCK));
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

    /// Merges block `block`, that is positions `64 · block` on, into the attention of `running.max.len()` query heads that
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
        let positions = positions.start.saturating_sub(start)..KEY_BLOCK.min(positions.end - start);
        self.pages.attend((layer, head), (block, positions), queries, attention_scale(self.head_dim), running);
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
        let (mut max, mut sum, mut values) = (vec![0.0; heads], vec![0.0; heads], vec![0.0; heads * LANES]);
        let mut wide = vec![0; queries.len()];
        let rows = queries.chunks_exact(HEAD_DIM).zip(wide.chunks_exact_mut(HEAD_DIM));
        let steps: Vec<f32> = rows.map(|(query, wide)| ops::widen_query(query, wide)).collect();
        let all = Queries { floats: queries, wide: WideQueries { values: &wide, steps: &steps } };
        let mut running = Running { max: &mut max, sum: &mut sum, values: &mut values };
        running.clear(0.0);
        for block in seen.start / KEY_BLOCK..seen.end.div_ceil(KEY_BLOCK) {
            cache.attend(1, head, block, seen.clone(), all, running.again());
        }
        let mut output = vec![0.0; queries.len()];
        for ((output, values), sum) in output.chunks_exact_mut(HEAD_DIM).zip(values.chunks_exact(LANES)).zip(sum) {
            ops::finish_attention(sum, values, output);
        }
        output
    }

    #[test]
    fn attention_over_pages_is_the_references_for_every_length_and_type() {
        let queries: Vec<f32> = (0..3 * HEAD_DIM).map(|i| i as f32 * 0.2 - 1.0).collect();
        for kind in KvType::ALL {
            let cache = filled(kind, 200);
            let ends = [1, 2, 15, 16, 17, 63, 64, 65, 128, 199, 200];
            let windows = [3..4, 10..70, 63..64, 64..65, 64..200, 130..199].into_iter();
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
            for common in [0, 1, 63, 64, 65, 100] {
                let mut origin = filled(kind, 130);
                let mut fork = origin.fork(common);
                fork.reserve(common..110).unwrap();
                origin.reserve(90..130).unwrap();
                (common..110).for_each(|at| fork.store(1, at, &other(at, 0), &other(at, 1)));
                (90..130).for_each(|at| origin.store(1, at, &row(at, 0), &row(at, 1)));
                let mut alone = filled(kind, common);
                alone.reserve(common..110).unwrap();
                (common..110).for_each(|at| alone.store(1, at, &other(at, 0), &other(at, 1)));
                for head in 0..HEADS {
                    assert_eq!(attend(&fork, head, 0..110, &queries), attend(&alone, head, 0..110, &queries), "{kind}");
                    assert_eq!(
                        attend(&origin, head, 0..130, &queries),
                        expected(kind, head, 0..130, &queries),
                        "{kind}"
                    );
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
        let steps = 2 * HEADS * KEY_BLOCK * 2 * 4;
        assert_eq!(filled(KvType::Int8, 1).bytes(), page / 2 + steps);
    }

    #[test]
    fn a_type_prints_and_parses_back() {
        for kind in KvType::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("f8".parse::<KvType>().is_err());
    }
}
