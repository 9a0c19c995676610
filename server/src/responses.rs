//! Answers that have been given before. An answer is a function of the model, the prompt, the settings and the seed,
//! so whoever asks the same gets the same, without a pass.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use crate::engine::Event;
use crate::metrics::Metrics;

/// What an answer depends on, as a digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// Of everything that an answer depends on, written out.
    #[must_use]
    pub fn new(parts: &[&[u8]]) -> Self {
        let mut digest = Sha256::new();
        for part in parts {
            // With lengths, so that no two lists of parts are the same bytes.
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        Self(digest.finalize().into())
    }
}

#[derive(Debug, Default)]
struct Kept {
    answers: HashMap<Key, Arc<[Event]>>,
    /// Oldest first.
    order: VecDeque<Key>,
    bytes: usize,
}

/// The latest answers.
pub struct Responses {
    /// Bytes that they may take.
    capacity: usize,
    kept: Mutex<Kept>,
    metrics: Metrics,
}

/// Bytes that an answer takes, its key included.
fn size(answer: &[Event]) -> usize {
    answer.iter().map(Event::bytes).sum::<usize>() + 2 * size_of::<Key>()
}

impl Responses {
    /// Keeps answers of up to `capacity` bytes; 0 keeps none.
    #[must_use]
    pub fn new(capacity: usize, metrics: Metrics) -> Self {
        Self { capacity, kept: Mutex::default(), metrics }
    }

    /// Whether anything is kept.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.capacity > 0
    }

    /// The answer to this very question.
    pub fn get(&self, key: &Key) -> Option<Arc<[Event]>> {
        let found = self.kept.lock().unwrap_or_else(PoisonError::into_inner).answers.get(key).cloned();
        let count = if found.is_some() { &self.metrics.cache_hits } else { &self.metrics.cache_misses };
        count.inc();
        found
    }

    /// Keeps an answer, and forgets the oldest if they become too large.
    pub fn keep(&self, key: Key, answer: Vec<Event>) {
        let bytes = size(&answer);
        if bytes > self.capacity {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.answers.insert(key.clone(), answer.into()) {
            Some(old) => kept.bytes -= size(&old),
            None => kept.order.push_back(key),
        }
        kept.bytes += bytes;
        while kept.bytes > self.capacity
            && let Some(oldest) = kept.order.pop_front()
        {
            let gone = kept.answers.remove(&oldest);
            kept.bytes -= gone.map_or(0, |answer| size(&answer));
        }
        self.metrics.cache_bytes.set(i64::try_from(kept.bytes).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_answer_is_forgotten_first() {
        let answer = || vec![Event::Text { text: "x".repeat(100), logprobs: Vec::new() }];
        let metrics = Metrics::default();
        let responses = Responses::new(2 * size(&answer()), metrics.clone());
        let key = |name: &str| Key::new(&[name.as_bytes()]);
        for name in ["a", "b", "b", "c"] {
            responses.keep(key(name), answer());
        }
        assert_eq!(["a", "b", "c"].map(|name| responses.get(&key(name)).is_some()), [false, true, true]);
        assert_eq!((metrics.cache_hits.get(), metrics.cache_misses.get()), (2, 1));
        assert_eq!(metrics.cache_bytes.get() as usize, 2 * size(&answer()));
        responses.keep(key("large"), [answer(), answer(), answer()].concat());
        assert!(responses.get(&key("large")).is_none() && responses.get(&key("c")).is_some());
    }

    #[test]
    fn a_key_tells_its_parts_apart() {
        assert_ne!(Key::new(&[b"ab", b"c"]), Key::new(&[b"a", b"bc"]));
    }
}
