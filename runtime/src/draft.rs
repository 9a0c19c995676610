//! Lossless drafting: guesses of the next tokens from the text so far, checked in one pass over the weights.
//!
//! Texts repeat themselves: names, quotations, code, whatever the prompt asks to be worked on. The tokens that followed
//! the last occurrence of the latest few are a guess that costs nothing. A pass over several tokens reads the weights
//! once, and because a token's results depend neither on the batch nor on what comes after it, a guess that the sampler
//! would have chosen itself is accepted with the very bits of single steps; the rest is forgotten.

/// Longest and shortest run of tokens whose earlier occurrence is looked for.
const RUN: std::ops::RangeInclusive<usize> = 2..=4;

/// Proposes tokens, fewer when they are not accepted.
#[derive(Clone, Debug)]
pub struct Drafter {
    /// Most tokens at a time.
    most: usize,
    /// Tokens to propose next time.
    length: usize,
    /// Steps to wait before the next proposal, and how many it was the last time.
    pause: usize,
    last_pause: usize,
    tokens: Vec<u32>,
}

impl Drafter {
    /// Proposes at most `most` tokens at a time; none at all for 0.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { most, length: most.min(2), pause: 0, last_pause: 0, tokens: Vec::with_capacity(most) }
    }

    /// What may follow `text`, at most `room` tokens; empty if nothing comes to mind.
    pub fn propose(&mut self, text: &[u32], room: usize) -> &[u32] {
        self.tokens.clear();
        if self.pause > 0 {
            self.pause -= 1;
        } else if let Some(start) = continuation(text) {
            let length = self.length.min(room).min(text.len() - start);
            self.tokens.extend_from_slice(&text[start..start + length]);
        }
        &self.tokens
    }

    /// How many of the tokens last proposed were right.
    pub fn judge(&mut self, accepted: usize) {
        match self.tokens.len() {
            0 => {}
            all if accepted == all => {
                (self.length, self.last_pause) = ((self.length * 2).min(self.most), 0);
            }
            // A wrong guess makes a pass dearer: after several in a row, it is longer until the next.
            _ if accepted == 0 => {
                self.length = self.length.min(2);
                self.pause = self.last_pause;
                self.last_pause = (2 * self.last_pause + 1).min(64);
            }
            _ => (self.length, self.last_pause) = ((accepted + 1).min(self.most), 0),
        }
    }
}

/// Where the tokens begin that followed the last earlier occurrence of the longest possible run that ends `text`.
fn continuation(text: &[u32]) -> Option<usize> {
    RUN.rev().find_map(|run| {
        let (earlier, last) = text.split_at(text.len().checked_sub(run)?);
        // Occurrences may overlap with the end, but must be followed by something.
        let starts = (0..earlier.len()).rev();
        starts.map(|start| start + run).find(|end| text[end - run..*end] == *last)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_last_occurrence_of_the_longest_run_is_proposed() {
        let mut drafter = Drafter::new(2);
        // The run 3 4 occurs twice; 2 3 4 only in the first place.
        assert_eq!(drafter.propose(&[2, 3, 4, 5, 6, 9, 3, 4, 7, 2, 3, 4], 8), [5, 6]);
        assert_eq!(drafter.propose(&[3, 4, 5, 3, 4, 6, 3, 4], 8), [6, 3]);
        assert_eq!(drafter.propose(&[3, 4, 5, 3, 4], 1), [5]);
        assert!(drafter.propose(&[3, 4, 5], 8).is_empty());
        assert!(drafter.propose(&[3], 8).is_empty());
        // A run may overlap with itself.
        assert_eq!(drafter.propose(&[1, 1, 1], 8), [1]);
        assert!(Drafter::new(0).propose(&[1, 1, 1], 8).is_empty());
    }

    #[test]
    fn right_guesses_make_longer_ones_and_wrong_ones_a_pause() {
        let text: Vec<u32> = (0..40).chain(0..4).collect();
        let mut drafter = Drafter::new(7);
        for expected in [2, 4, 7, 7] {
            assert_eq!(drafter.propose(&text, 20).len(), expected);
            drafter.judge(expected);
        }
        drafter.propose(&text, 20);
        drafter.judge(3);
        assert_eq!(drafter.propose(&text, 20).len(), 4);
        // The first wrong guess is forgiven, then pauses grow.
        for pause in [0, 1, 3, 7] {
            drafter.judge(0);
            for _ in 0..pause {
                assert!(drafter.propose(&text, 20).is_empty());
                drafter.judge(0);
            }
            assert_eq!(drafter.propose(&text, 20).len(), 2);
        }
        drafter.judge(2);
        drafter.judge(0);
        assert_eq!(drafter.propose(&text, 20).len(), 2);
    }
}
