//! One running text: its sequence, what is to be read, and the way of its tokens to the client.

use std::time::Instant;

use ternion_runtime::embedding::normalise;
use ternion_runtime::formats::Pooling;
use ternion_runtime::model::{Candidate, Query, Sequence, Wanted};
use ternion_runtime::sampling::Sampler;
use ternion_runtime::text::Detokenizer;
use tokio::sync::mpsc::UnboundedSender;

use super::prefix::Beginning;
use super::text::Gate;
use super::{Done, Event, Failure, Finish, Generation, Job, Shared, Task, TokenLogprob};
use crate::trace::End;

/// A text that is being generated.
struct Running<'a> {
    asked: Generation,
    sampler: Sampler,
    text: Detokenizer<'a>,
    gate: Gate,
    generated: usize,
}

/// What a slot does.
enum Work<'a> {
    Generate(Box<Running<'a>>),
    /// Sums of the states so far.
    Embed(Vec<f64>),
}

/// One running text.
pub(super) struct Slot<'a> {
    shared: &'a Shared,
    job: Job,
    events: UnboundedSender<Event>,
    /// What has been sent, if the answer may be kept.
    sent: Vec<Event>,
    pub(super) sequence: Sequence,
    /// The tokens to be read next: the rest of the prompt, or the last one chosen.
    next: Vec<u32>,
    /// How many of `next` have been read.
    read: usize,
    cached: usize,
    /// Whether it may go on from what another text has read.
    shares: bool,
    work: Work<'a>,
    last_token: Option<Instant>,
}

/// How a slot goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// It does.
    Goes,
    /// It does not.
    Ended,
}

impl<'a> Slot<'a> {
    /// `sequence` may have read a part of the prompt; `shares`: whether another one may do that.
    pub(super) fn new(
        shared: &'a Shared,
        mut job: Job,
        events: UnboundedSender<Event>,
        sequence: Sequence,
        shares: bool,
    ) -> Self {
        let cached = sequence.tokens().len();
        let next = job.prompt[cached..].to_vec();
        let work = match std::mem::replace(&mut job.task, Task::Embed) {
            Task::Generate(mut asked) => Work::Generate(Box::new(Running {
                sampler: Sampler::new(asked.sampling, asked.sequence, &job.prompt),
                text: shared.tokenizer.detokenizer(),
                gate: Gate::new(std::mem::take(&mut asked.stop)),
                generated: 0,
                asked: *asked,
            })),
            Task::Embed => Work::Embed(Vec::new()),
        };
        job.trace.started(job.prompt.len());
        shared.metrics.queue_time.observe(job.since.elapsed().as_secs_f64());
        shared.metrics.prompt_tokens.inc_by(job.prompt.len() as u64);
        shared.metrics.cached_tokens.inc_by(cached as u64);
        Self { shared, job, events, sent: Vec::new(), sequence, next, read: 0, cached, shares, work, last_token: None }
    }

    /// What it is to others whose prompts begin like it.
    pub(super) fn beginning(&self) -> Beginning<'_> {
        let (prompt, read) = (&self.job.prompt[..], self.sequence.tokens());
        let tokens = if read.len() < prompt.len() { prompt } else { read };
        Beginning { tokens, read: read.len(), shares: self.shares }
    }

    /// Goes on from a sequence that has read more of the prompt than its own.
    pub(super) fn go_on_from(&mut self, sequence: Sequence) {
        let (before, now) = (self.sequence.tokens().len(), sequence.tokens().len());
        self.shared.metrics.cached_tokens.inc_by((now - before) as u64);
        self.cached += now - before;
        (self.next, self.read) = (self.job.prompt[now..].to_vec(), 0);
        self.sequence = sequence;
    }

    /// Tokens to be read before something can be chosen.
    pub(super) fn unread(&self) -> usize {
        self.next.len() - self.read
    }

    /// The sequence, and the next `n` of the tokens that it is to read.
    pub(super) fn part(&mut self, n: usize) -> (&mut Sequence, &[u32]) {
        (&mut self.sequence, &self.next[self.read..self.read + n])
    }

    /// Tells that `n` tokens have been read, which left these states behind.
    pub(super) fn has_read(&mut self, n: usize, states: impl FnOnce() -> Vec<f32>) {
        self.read += n;
        let pooling = self.shared.model.config().pooling;
        if let (Work::Embed(sums), Some(Pooling::Mean)) = (&mut self.work, pooling) {
            let hidden = self.shared.model.config().hidden;
            sums.resize(hidden, 0.0);
            for state in states().chunks_exact(hidden) {
                sums.iter_mut().zip(state).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
    }

    /// Which logits it needs now, if any.
    pub(super) fn query(&self) -> Option<Query<'_>> {
        let Work::Generate(running) = &self.work else { return None };
        if self.unread() > 0 {
            return None;
        }
        let all = running.asked.grammar.is_some() || running.asked.logprobs.is_some();
        let wanted = if all { Wanted::All } else { running.sampler.wanted(0) };
        Some(Query { state: self.sequence.state(), wanted, always: running.sampler.penalised() })
    }

    /// Whether it waits for its vector.
    pub(super) fn embeds(&self) -> bool {
        matches!(self.work, Work::Embed(_)) && self.unread() == 0
    }

    /// Sends the vector.
    pub(super) fn embed(&mut self) -> Progress {
        let Work::Embed(sums) = &self.work else { return Progress::Goes };
        let mut vector: Vec<f32> = if sums.is_empty() {
            self.sequence.state().to_vec()
        } else {
            sums.iter().map(|sum| (sum / self.job.prompt.len() as f64) as f32).collect()
        };
        normalise(&mut vector);
        self.send(Event::Embedding(vector));
        self.end(Finish::Stop, 0)
    }

    /// Chooses the next token.
    pub(super) fn choose(&mut self, candidates: &mut Vec<Candidate>) -> Progress {
        let Work::Generate(running) = &mut self.work else { return Progress::Goes };
        let Running { asked, sampler, text, gate, generated } = &mut **running;
        // Of the model itself, before a grammar takes its choice away.
        let distribution = asked.logprobs.map(|top| Distribution::new(candidates, top));
        if let Some(grammar) = &mut asked.grammar
            && (grammar.constrain(candidates).is_err() || candidates.is_empty())
        {
            return self.fail(Failure::Grammar);
        }
        let Some(token) = sampler.sample(candidates) else { return self.fail(Failure::Internal) };
        *generated += 1;
        let now = Instant::now();
        let metrics = &self.shared.metrics;
        match self.last_token.replace(now) {
            None => metrics.first_token_time.observe(self.job.since.elapsed().as_secs_f64()),
            Some(last) => metrics.token_time.observe((now - last).as_secs_f64()),
        }
        metrics.completion_tokens.inc();
        self.job.trace.token();
        let complete = match &mut asked.grammar {
            Some(grammar) => grammar.accept(token),
            None => Ok(false),
        };
        let Ok(complete) = complete else { return self.fail(Failure::Grammar) };
        let generated = *generated;
        if self.shared.stop_tokens.contains(&token) && !(asked.ignore_eos && asked.grammar.is_none()) {
            return self.end_text(Finish::Stop, generated, None);
        }
        sampler.accept(token);
        let logprobs: Vec<TokenLogprob> = distribution.map(|d| d.of(token)).into_iter().collect();
        let (out, finish) = gate.push(text.push(token), &self.shared.filter);
        let full = generated >= asked.limit || self.sequence.room() == 0;
        if finish.is_none() && (complete || full) {
            let reason = if complete { Finish::Stop } else { Finish::Length };
            return self.end_text(reason, generated, Some((out, logprobs)));
        }
        if !out.is_empty() || !logprobs.is_empty() {
            self.send(Event::Text { text: out, logprobs });
        }
        match finish {
            Some(finish) => self.end(finish, generated),
            None => {
                self.next.clear();
                self.next.push(token);
                self.read = 0;
                Progress::Goes
            }
        }
    }

    /// Lets out what waits, and ends.
    fn end_text(&mut self, finish: Finish, generated: usize, last: Option<(String, Vec<TokenLogprob>)>) -> Progress {
        let Work::Generate(running) = &mut self.work else { return Progress::Ended };
        let (mut out, logprobs) = last.unwrap_or_default();
        let (more, found) = running.gate.push(running.text.finish(), &self.shared.filter);
        out.push_str(&more);
        if found.is_none() {
            out.push_str(&running.gate.finish());
        }
        if !out.is_empty() || !logprobs.is_empty() {
            self.send(Event::Text { text: out, logprobs });
        }
        self.end(found.unwrap_or(finish), generated)
    }

    fn end(&mut self, finish: Finish, completion_tokens: usize) -> Progress {
        self.job.trace.ended(End::Finished(finish.name()), self.cached);
        let done = Event::Done(Done { finish, completion_tokens, cached_tokens: self.cached });
        // Before the reader has it: who asks again at once finds it kept.
        if let Some(key) = self.job.key.take() {
            self.sent.push(done.clone());
            self.shared.responses.keep(key, std::mem::take(&mut self.sent));
        }
        self.send(done);
        Progress::Ended
    }

    /// Ends without success.
    pub(super) fn fail(&mut self, failure: Failure) -> Progress {
        self.job.key = None;
        self.job.trace.ended(End::Failed(failure.name()), self.cached);
        self.send(Event::Failed(failure));
        Progress::Ended
    }

    fn send(&mut self, event: Event) {
        if self.job.key.is_some() {
            self.sent.push(event.clone());
        }
        // A reader that has gone is noticed before the next pass.
        let _ = self.events.send(event);
    }

    /// Whether the client has gone.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    pub(super) fn is_late(&self, now: Instant) -> bool {
        now >= self.job.deadline
    }
}

/// Logarithmic probabilities of all tokens: the k most likely, and what it takes to compute the others.
struct Distribution {
    logits: Vec<Candidate>,
    /// `log Σ e^logit`
    normaliser: f64,
    top: usize,
}

impl Distribution {
    fn new(candidates: &[Candidate], top: usize) -> Self {
        let largest = candidates.iter().map(|(logit, _)| f64::from(*logit)).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = candidates.iter().map(|(logit, _)| (f64::from(*logit) - largest).exp()).sum();
        Self { logits: candidates.to_vec(), normaliser: largest + sum.ln(), top }
    }

    fn of(mut self, token: u32) -> TokenLogprob {
        let normaliser = self.normaliser;
        let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
        let own = self.logits.iter().find(|(_, other)| *other == token).map_or(f32::MIN, |(logit, _)| logprob(*logit));
        let order = |a: &Candidate, b: &Candidate| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if self.top > 0 && self.top < self.logits.len() {
            self.logits.select_nth_unstable_by(self.top, order);
        }
        self.logits.truncate(self.top);
        self.logits.sort_unstable_by(order);
        let top = self.logits.iter().map(|(logit, token)| (*token, logprob(*logit))).collect();
        TokenLogprob { token, logprob: own, top }
    }
}
