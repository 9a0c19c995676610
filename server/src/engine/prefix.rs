//! Common beginnings: texts that begin alike read that only once, whether one has ended, runs, or is still to be read.

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

/// A text as far as its beginning is of use to others, and theirs to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beginning<'a> {
    /// Its prompt as long as that is not read, then all of it.
    pub(super) tokens: &'a [u32],
    /// How many of them have been read.
    pub(super) read: usize,
    /// Whether it may go on from what another one has read: not if it needs every state itself.
    pub(super) shares: bool,
}

/// How a text goes on that has to read its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// By itself.
    Read,
    /// Later: another text is about to read what it needs.
    Wait,
    /// From the first `tokens` of text `from`.
    Fork {
        /// Number of the other text.
        from: usize,
        /// Tokens of it.
        tokens: usize,
    },
}

/// How text `at` goes on. Texts wait only for those that are further, or as far and before them, so that of all that wait for one
/// another one reads.
pub(super) fn step(texts: &[Beginning<'_>], at: usize) -> Step {
    let Beginning { tokens: prompt, read, shares } = texts[at];
    if !shares || read >= prompt.len() {
        return Step::Read;
    }
    // The last token is its own: what follows it is wanted.
    let usable = |other: &Beginning<'_>| common(other.tokens, prompt).min(prompt.len() - 1);
    let others = || texts.iter().enumerate().filter(|(other, _)| *other != at);
    let (there, from) = others().map(|(other, text)| (usable(text).min(text.read), other)).max().unwrap_or((0, at));
    let is_ahead = |other: usize, text: &Beginning<'_>| text.read > read || text.read == read && other < at;
    let coming = others().filter(|(other, text)| is_ahead(*other, text)).map(|(_, text)| usable(text)).max();
    if coming.is_some_and(|coming| coming > there && coming >= read + WORTHWHILE) {
        Step::Wait
    } else if there >= read + WORTHWHILE {
        Step::Fork { from, tokens: there }
    } else {
        Step::Read
    }
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

    /// A sequence that has read as much of the beginning of `prompt` as any kept one, at least one token less than all of
    /// it.
    pub(super) fn find(&mut self, prompt: &[u32]) -> Option<Sequence> {
        let usable = |sequence: &Sequence| common(sequence.tokens(), prompt).min(prompt.len() - 1);
        let kept = self.kept.iter().map(usable).enumerate().max_by_key(|(_, common)| *common);
        let (at, common) = kept.filter(|(_, common)| *common >= WORTHWHILE)?;
        let used = self.kept.remove(at)?;
        let found = used.fork(common);
        self.kept.push_back(used);
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many tokens are read in all when these prompts are, `chunk` tokens of each in a pass.
    fn read(prompts: &[Vec<u32>], chunk: usize) -> usize {
        let (mut read, mut total) = (vec![0; prompts.len()], 0);
        while read.iter().zip(prompts).any(|(read, prompt)| *read < prompt.len()) {
            let before = total;
            for at in 0..prompts.len() {
                let texts = prompts.iter().zip(&read);
                let texts = texts.map(|(tokens, read)| Beginning { tokens, read: *read, shares: true });
                match step(&texts.collect::<Vec<_>>(), at) {
                    Step::Wait => continue,
                    Step::Fork { from, tokens } => {
                        assert!(tokens <= read[from] && prompts[from][..tokens] == prompts[at][..tokens]);
                        read[at] = tokens;
                    }
                    Step::Read => {}
                }
                let more = chunk.min(prompts[at].len() - read[at]);
                (read[at], total) = (read[at] + more, total + more);
            }
            assert!(total > before, "somebody reads in every pass");
        }
        total
    }

    fn prompt(common: u32, own: std::ops::Range<u32>) -> Vec<u32> {
        (0..common).chain(own).collect()
    }

    #[test]
    fn what_texts_begin_with_is_read_once() {
        for chunk in [1, 7, 64, 1000] {
            let same = vec![prompt(100, 0..0); 8];
            assert_eq!(read(&same, chunk), 100 + 7, "all but the last token, which is each one's own");
            let tails: Vec<_> = (1..5).map(|at| prompt(50, 1000 * at..1000 * at + 20)).collect();
            assert_eq!(read(&tails, chunk), 50 + 4 * 20);
            let nested = [prompt(20, 0..0), prompt(40, 0..0), prompt(80, 0..0)];
            assert!(read(&nested, chunk) <= 80 + 2 + 2 * WORTHWHILE);
            let apart = [prompt(10, 100..140), prompt(10, 200..240), prompt(0, 300..320)];
            assert_eq!(read(&apart, chunk), 50 + 50 + 20, "a few common tokens are not waited for");
        }
    }

    #[test]
    fn whoever_needs_every_state_reads_alone_and_others_go_on_from_it() {
        let tokens = &prompt(100, 0..0)[..];
        let (alone, other) =
            (Beginning { tokens, read: 0, shares: false }, Beginning { tokens, read: 0, shares: true });
        assert_eq!((step(&[alone, alone], 1), step(&[alone, other], 1)), (Step::Read, Step::Wait));
        let done = Beginning { read: 100, ..alone };
        assert_eq!(
            (step(&[done, other], 1), step(&[done, alone], 1)),
            (Step::Fork { from: 0, tokens: 99 }, Step::Read)
        );
        assert_eq!(step(&[other, done], 1), Step::Read);
    }
}
