//! Keys and values of finished texts, so that a text that begins like one of them need not be read from its start.

use std::collections::VecDeque;

use ternion_runtime::model::Sequence;

/// Fewer common tokens are not worth the search.
const WORTHWHILE: usize = 16;

/// Finished texts, those first that have been of no use for longest.
#[derive(Debug)]
pub(super) struct PrefixCache {
    /// Bytes that their keys and values may take.
    capacity: usize,
    kept: VecDeque<Sequence>,
}

/// How many tokens two texts begin with in common.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl PrefixCache {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, kept: VecDeque::new() }
    }

    /// Bytes of all keys and values.
    pub(super) fn bytes(&self) -> usize {
        self.kept.iter().map(Sequence::kv_bytes).sum()
    }

    pub(super) fn keep(&mut self, sequence: Sequence) {
        if sequence.kv_bytes() > self.capacity || sequence.tokens().len() < WORTHWHILE {
            return;
        }
        // What the new one begins with is in the new one.
        self.kept.retain(|old| common(old.tokens(), sequence.tokens()) < old.tokens().len());
        self.kept.push_back(sequence);
        let mut bytes = self.bytes();
        while bytes > self.capacity
            && let Some(oldest) = self.kept.pop_front()
        {
            bytes -= oldest.kv_bytes();
        }
    }

    /// A sequence that has read as much of the beginning of `prompt` as any kept or `running` one, at least one token
    /// less than all of it.
    pub(super) fn find<'a>(&mut self, prompt: &[u32], running: impl Iterator<Item = &'a Sequence>) -> Option<Sequence> {
        let usable = |sequence: &Sequence| common(sequence.tokens(), prompt).min(prompt.len() - 1);
        let running = running.map(|sequence| (usable(sequence), sequence)).max_by_key(|(common, _)| *common);
        let kept = self.kept.iter().map(usable).enumerate().max_by_key(|(_, common)| *common);
        let best = kept.map_or(0, |(_, common)| common);
        if let Some((common, sequence)) = running.filter(|(common, _)| *common > best && *common >= WORTHWHILE) {
            return Some(sequence.fork(common));
        }
        let (at, common) = kept.filter(|(_, common)| *common >= WORTHWHILE)?;
        let used = self.kept.remove(at)?;
        let found = used.fork(common);
        self.kept.push_back(used);
        Some(found)
    }
}
