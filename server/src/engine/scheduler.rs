//! The loop of an engine: let in, run a pass, choose tokens, let out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use ternion_runtime::formats::Pooling;
use ternion_runtime::model::{Batch, Candidate, HeadScratch, ModelError, Part, Sequence};
use ternion_runtime::team::Team;

use super::prefix::{PrefixCache, Step, step};
use super::queue::FairQueue;
use super::slot::{Progress, Slot};
use super::{Event, Failure, Shared, Submitted, Task};
use crate::trace::End;

/// Candidates of all texts from which on it is worth waking the team to choose among them.
const MANY: usize = 1 << 14;

/// Runs until nobody can submit anything more and all that was submitted is done.
pub(super) fn run(shared: &Shared, jobs: &Receiver<Vec<Submitted>>) {
    let mut engine = Scheduler {
        shared,
        batch: None,
        head: HeadScratch::default(),
        lists: Vec::new(),
        slots: Vec::new(),
        queue: FairQueue::new(),
        prefixes: PrefixCache::new(shared.options.prefix_bytes),
    };
    while engine.receive(jobs) {
        engine.let_out();
        engine.let_in();
        if engine.slots.is_empty() {
            engine.observe();
            continue;
        }
        // A bug in a pass costs those who are in it, and nobody else.
        if catch_unwind(AssertUnwindSafe(|| engine.pass())).is_err() {
            shared.metrics.failed_passes.inc();
            fail(&mut engine.slots, Failure::Internal);
            engine.batch = None;
            engine.prefixes = PrefixCache::new(shared.options.prefix_bytes);
        }
        engine.observe();
    }
    engine.observe();
}

/// Ends all without success.
fn fail(slots: &mut Vec<Slot<'_>>, failure: Failure) {
    for mut slot in slots.drain(..) {
        slot.fail(failure);
    }
}

struct Scheduler<'a> {
    shared: &'a Shared,
    /// Made with the first pass, and anew after one that failed.
    batch: Option<Batch>,
    head: HeadScratch,
    /// Candidates, a list for each text.
    lists: Vec<Vec<Candidate>>,
    slots: Vec<Slot<'a>>,
    queue: FairQueue<Submitted>,
    prefixes: PrefixCache,
}

impl Scheduler<'_> {
    /// Takes what has been submitted, waiting if there is nothing to do. `false`: all is done.
    fn receive(&mut self, jobs: &Receiver<Vec<Submitted>>) -> bool {
        loop {
            match jobs.try_recv() {
                Ok(together) => self.enqueue(together),
                Err(TryRecvError::Empty) if !self.slots.is_empty() || !self.queue.is_empty() => return true,
                Err(TryRecvError::Empty) => match jobs.recv() {
                    Ok(together) => self.enqueue(together),
                    Err(_) => return false,
                },
                Err(TryRecvError::Disconnected) => return !self.slots.is_empty() || !self.queue.is_empty(),
            }
        }
    }

    fn enqueue(&mut self, together: Vec<Submitted>) {
        together.into_iter().for_each(|submitted| self.queue.push(submitted.job.client, submitted));
    }

    /// Ends what has lost its client or is late, or everything if the server can wait no longer.
    fn let_out(&mut self) {
        let now = Instant::now();
        let metrics = &self.shared.metrics;
        let giving_up = self.shared.giving_up.load(Ordering::SeqCst);
        let failure = if giving_up { Failure::Draining } else { Failure::Timeout };
        let leaves = |waiting: &Submitted| giving_up || waiting.events.is_closed() || now >= waiting.job.deadline;
        for mut gone in self.queue.take_out(leaves) {
            metrics.waiting.dec();
            if gone.events.is_closed() {
                metrics.cancelled.inc();
            } else {
                gone.job.trace.ended(End::Failed(failure.name()), 0);
            }
            // Whoever has gone does not hear it.
            let _ = gone.events.send(Event::Failed(failure));
        }
        if giving_up {
            fail(&mut self.slots, failure);
        }
        for mut slot in self.slots.extract_if(.., |slot| slot.is_cancelled() || slot.is_late(now)) {
            if slot.is_cancelled() {
                metrics.cancelled.inc();
            } else {
                slot.fail(Failure::Timeout);
            }
            self.prefixes.keep(slot.sequence);
        }
    }

    /// Starts what waits, as long as there is room.
    fn let_in(&mut self) {
        while self.slots.len() < self.shared.options.parallel {
            let Some(Submitted { mut job, events }) = self.queue.pop() else { break };
            self.shared.metrics.waiting.dec();
            let options = &self.shared.options;
            // A mean needs the states of all tokens.
            let all = matches!(job.task, Task::Embed) && self.shared.model.config().pooling == Some(Pooling::Mean);
            let known = if all { None } else { self.prefixes.find(&job.prompt) };
            let sequence =
                known.map_or_else(|| Sequence::new(&self.shared.model, options.kv, Some(options.context)), Ok);
            match sequence {
                Ok(sequence) => self.slots.push(Slot::new(self.shared, job, events, sequence, !all)),
                Err(_) => {
                    job.trace.ended(End::Failed(Failure::Internal.name()), 0);
                    drop(events.send(Event::Failed(Failure::Internal)));
                }
            }
        }
    }

    /// One pass over the weights: a token of every running text, and a piece of the prompts.
    fn pass(&mut self) {
        let Self { shared, batch, head, lists, slots, .. } = self;
        let options = &shared.options;
        if batch.is_none() {
            let capacity = options.parallel + options.chunk;
            *batch = Batch::new(shared.model.clone(), shared.team.clone(), capacity).ok();
        }
        let Some(batch) = batch else {
            return fail(slots, Failure::Memory);
        };
        let counts = shares(&ready(slots), options.chunk);
        let mut parts: Vec<Part<'_>> = Vec::with_capacity(slots.len());
        for (slot, count) in slots.iter_mut().zip(&counts).filter(|(_, count)| **count > 0) {
            let (sequence, tokens) = slot.part(*count);
            parts.push(Part { sequence, tokens });
        }
        let size: usize = counts.iter().sum();
        let start = Instant::now();
        if let Err(error) = batch.forward(&mut parts) {
            // Every token was checked before it was let in, so it can only be memory.
            let memory = matches!(error, ModelError::CacheMemory { .. });
            self.prefixes = PrefixCache::new(options.prefix_bytes);
            return fail(slots, if memory { Failure::Memory } else { Failure::Internal });
        }
        let mut end = 0;
        for (slot, count) in slots.iter_mut().zip(counts) {
            let range = end..end + count;
            end += count;
            slot.has_read(count, || batch.states(range).to_vec());
        }
        let texts = slots.iter().filter(|slot| slot.unread() == 0).count();
        let asking: Vec<usize> = (0..slots.len()).filter(|at| slots[*at].query().is_some()).collect();
        let queries: Vec<_> = asking.iter().filter_map(|at| slots[*at].query()).collect();
        lists.resize_with(queries.len().max(lists.len()), Vec::new);
        shared.model.head().candidates(&shared.team, queries.iter().copied(), head, &mut lists[..asking.len()]);
        // Before anyone hears of it: who has an answer finds its passes counted.
        shared.metrics.pass(size, texts, start.elapsed());
        let mut ended = vec![false; slots.len()];
        let asked = slots.iter_mut().zip(&mut ended).enumerate().filter(|(at, _)| asking.binary_search(at).is_ok());
        choose(&shared.team, asked.map(|(_, asked)| asked).zip(lists));
        for (slot, ended) in slots.iter_mut().zip(&mut ended).filter(|(slot, _)| slot.embeds()) {
            *ended = slot.embed() == Progress::Ended;
        }
        let mut ended = ended.into_iter();
        for slot in self.slots.extract_if(.., |_| ended.next().unwrap_or(false)) {
            self.prefixes.keep(slot.sequence);
        }
    }

    fn observe(&self) {
        let metrics = &self.shared.metrics;
        metrics.running.set(i64::try_from(self.slots.len()).unwrap_or(i64::MAX));
        let bytes = self.slots.iter().map(|slot| slot.sequence.kv_bytes()).sum::<usize>() + self.prefixes.bytes();
        metrics.kv_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

/// Chooses each text's next token and notes whether it has ended. Where there is much to choose from, the texts are shared
/// among the team: sorting a vocabulary takes long, and so do grammars and logarithmic probabilities of all of it.
fn choose<'a: 's, 's>(
    team: &Team,
    texts: impl Iterator<Item = ((&'s mut Slot<'a>, &'s mut bool), &'s mut Vec<Candidate>)>,
) {
    let texts: Vec<_> = texts.collect();
    let candidates: usize = texts.iter().map(|(_, candidates)| candidates.len()).sum();
    let texts: Vec<_> = texts.into_iter().map(Mutex::new).collect();
    let one = |at: usize| {
        // Each is in one part of the work, so nobody waits.
        let ((slot, ended), candidates) = &mut *texts[at].lock().unwrap_or_else(PoisonError::into_inner);
        **ended = slot.choose(candidates) == Progress::Ended;
    };
    if candidates < MANY {
        (0..texts.len()).for_each(one);
    } else {
        team.share_out(texts.len(), 1, &|texts| texts.for_each(one));
    }
}

/// How many tokens each text could read now. Those that begin like another one go on from what that has read, or wait for
/// it.
fn ready(slots: &mut [Slot<'_>]) -> Vec<usize> {
    let mut counts: Vec<usize> = slots.iter().map(Slot::unread).collect();
    // A text that has one token to read has nothing to share.
    for at in (0..slots.len()).filter(|at| slots[*at].unread() > 1).collect::<Vec<_>>() {
        let beginnings: Vec<_> = slots.iter().map(Slot::beginning).collect();
        match step(&beginnings, at) {
            Step::Read => {}
            Step::Wait => counts[at] = 0,
            Step::Fork { from, tokens } => {
                let sequence = slots[from].sequence.fork(tokens);
                slots[at].go_on_from(sequence);
                counts[at] = slots[at].unread();
            }
        }
    }
    counts
}

/// How many of its unread tokens each text reads in a pass. A running text has one and always reads it; prompts share
/// `chunk` evenly, and what one does not need goes to the others.
fn shares(unread: &[usize], chunk: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = unread.iter().map(|unread| usize::from(*unread == 1)).collect();
    let mut left = chunk;
    let mut prompts: Vec<usize> = (0..unread.len()).filter(|at| unread[*at] > 1).collect();
    // The short ones first: what they leave is for those after them.
    prompts.sort_by_key(|at| (unread[*at], *at));
    let mut others = prompts.len();
    for at in prompts {
        let share = left.div_ceil(others).min(unread[at]);
        counts[at] = share;
        left -= share;
        others -= 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::shares;

    #[test]
    fn running_texts_always_go_on_and_prompts_share_the_rest() {
        assert_eq!(shares(&[1, 1, 1000, 1], 64), [1, 1, 64, 1]);
        assert_eq!(shares(&[300, 10, 300], 64), [27, 10, 27]);
        assert_eq!(shares(&[5, 1, 7], 64), [5, 1, 7]);
        assert_eq!(shares(&[9, 9, 9], 2), [1, 1, 0]);
        assert_eq!(shares(&[], 64), [0; 0]);
    }
}
