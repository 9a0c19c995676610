//! Answers that have been given before. An answer is a function of the model, the prompt, the settings and the seed,
//! so whoever asks the same gets the same, without a pass.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use crate::engine::Event;

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
}

/// The latest answers.
#[derive(Debug)]
pub struct Responses {
    capacity: usize,
    kept: Mutex<Kept>,
}

impl Responses {
    /// Keeps up to `capacity` answers; 0 keeps none.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, kept: Mutex::default() }
    }

    /// Whether anything is kept.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.capacity > 0
    }

    /// The answer to this very question.
    pub fn get(&self, key: &Key) -> Option<Arc<[Event]>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).answers.get(key).cloned()
    }

    /// Keeps an answer, and forgets the oldest if there are too many.
    pub fn keep(&self, key: Key, answer: Vec<Event>) {
        if self.capacity == 0 {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.answers.insert(key.clone(), answer.into()).is_none() {
            kept.order.push_back(key);
        }
        if kept.order.len() > self.capacity
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.answers.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_answer_is_forgotten_first() {
        let responses = Responses::new(2);
        let key = |name: &str| Key::new(&[name.as_bytes()]);
        for name in ["a", "b", "c"] {
            responses.keep(key(name), Vec::new());
        }
        assert_eq!(["a", "b", "c"].map(|name| responses.get(&key(name)).is_some()), [false, true, true]);
        assert_ne!(Key::new(&[b"ab", b"c"]), Key::new(&[b"a", b"bc"]));
    }
}
