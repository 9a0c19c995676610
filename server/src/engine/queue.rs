//! The queue: each client has its own, and they take turns, so that one with many requests does not make others wait.

use std::collections::{HashMap, VecDeque};

/// Items of many clients.
#[derive(Debug)]
pub(super) struct FairQueue<T> {
    lines: HashMap<u64, VecDeque<T>>,
    /// Clients with something in their line, next first.
    turns: VecDeque<u64>,
}

impl<T> FairQueue<T> {
    pub(super) fn new() -> Self {
        Self { lines: HashMap::new(), turns: VecDeque::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    pub(super) fn push(&mut self, client: u64, item: T) {
        let line = self.lines.entry(client).or_default();
        if line.is_empty() {
            self.turns.push_back(client);
        }
        line.push_back(item);
    }

    /// The oldest item of the client whose turn it is.
    pub(super) fn pop(&mut self) -> Option<T> {
        let client = self.turns.pop_front()?;
        let line = self.lines.get_mut(&client)?;
        let item = line.pop_front();
        if line.is_empty() {
            self.lines.remove(&client);
        } else {
            self.turns.push_back(client);
        }
        item
    }

    /// Takes out the items that `leaves` says so of.
    pub(super) fn take_out(&mut self, mut leaves: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut out = Vec::new();
        for line in self.lines.values_mut() {
            let (gone, stay): (Vec<T>, VecDeque<T>) =
                line.drain(..).fold(Default::default(), |(mut gone, mut stay), item| {
                    if leaves(&item) {
                        gone.push(item)
                    } else {
                        stay.push_back(item)
                    }
                    (gone, stay)
                });
            *line = stay;
            out.extend(gone);
        }
        self.lines.retain(|_, line| !line.is_empty());
        self.turns.retain(|client| self.lines.contains_key(client));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns_and_their_own_items_stay_in_order() {
        let mut queue = FairQueue::new();
        for item in ["a1", "a2", "a3"] {
            queue.push(1, item);
        }
        queue.push(2, "b1");
        queue.push(3, "c1");
        queue.push(2, "b2");
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3"]);
        assert!(queue.is_empty());
    }

    #[test]
    fn what_is_taken_out_leaves_the_rest_in_order() {
        let mut queue = FairQueue::new();
        for item in 0..6 {
            queue.push(item % 2, item);
        }
        let mut out = queue.take_out(|item| [0, 2, 3, 4].contains(item));
        out.sort_unstable();
        assert_eq!(out, [0, 2, 3, 4]);
        assert_eq!([queue.pop(), queue.pop(), queue.pop()], [Some(1), Some(5), None]);
    }
}
