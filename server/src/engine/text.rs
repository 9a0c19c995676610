//! The text of a running job on its way out: what may still turn out to be a stop text or to be filtered waits.

use crate::filter::Filter;

use super::Finish;

/// Bytes that wait as long as a content filter is on: a match that is longer may be let out in part.
const FILTER_WINDOW: usize = 256;

/// Text that has been generated and not yet let out.
#[derive(Debug)]
pub(super) struct Gate {
    stop: Vec<String>,
    /// The end of the whole text: what has been let out lately, for the filter to see, and then what waits.
    text: String,
    /// Where the waiting part begins.
    waiting: usize,
}

impl Gate {
    pub(super) fn new(stop: Vec<String>) -> Self {
        Self { stop, text: String::new(), waiting: 0 }
    }

    /// Takes a piece; returns what may go out, and whether the text ends here.
    pub(super) fn push(&mut self, piece: &str, filter: &Filter) -> (String, Option<Finish>) {
        self.text.push_str(piece);
        let waiting = &self.text[self.waiting..];
        let stop = self.stop.iter().filter_map(|stop| waiting.find(stop.as_str())).min();
        if let Some(at) = stop {
            self.text.truncate(self.waiting + at);
        }
        if let Some(at) = filter.find(&self.text) {
            let out = self.text.get(self.waiting..at).unwrap_or_default().to_owned();
            self.text.truncate(self.waiting);
            return (out, Some(Finish::ContentFilter));
        }
        if stop.is_some() {
            return (self.let_out(self.text.len()), Some(Finish::Stop));
        }
        let waiting = &self.text[self.waiting..];
        let partial = self.stop.iter().map(|stop| partial_match(waiting, stop)).max().unwrap_or(0);
        let hold = partial.max(if filter.is_empty() { 0 } else { FILTER_WINDOW });
        let mut end = self.text.len().saturating_sub(hold).max(self.waiting);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        (self.let_out(end.max(self.waiting)), None)
    }

    /// The rest, when no more comes.
    pub(super) fn finish(&mut self) -> String {
        self.let_out(self.text.len())
    }

    fn let_out(&mut self, end: usize) -> String {
        let out = self.text[self.waiting..end].to_owned();
        self.waiting = end;
        let mut forget = end.saturating_sub(FILTER_WINDOW);
        while !self.text.is_char_boundary(forget) {
            forget -= 1;
        }
        self.text.drain(..forget);
        self.waiting -= forget;
        out
    }
}

/// Length of the longest end of `text` that `stop` begins with.
fn partial_match(text: &str, stop: &str) -> usize {
    let lengths = (1..stop.len()).rev().filter(|len| stop.is_char_boundary(*len));
    lengths.into_iter().find(|len| text.ends_with(&stop[..*len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], filter: &str, pieces: &[&str]) -> (Vec<String>, Option<Finish>) {
        let filter = Filter::parse(filter).unwrap();
        let mut gate = Gate::new(stop.iter().map(|stop| (*stop).to_owned()).collect());
        let mut out = Vec::new();
        for piece in pieces {
            let (text, finish) = gate.push(piece, &filter);
            out.push(text);
            if finish.is_some() {
                return (out, finish);
            }
        }
        out.push(gate.finish());
        (out, None)
    }

    #[test]
    fn a_stop_text_never_goes_out_even_in_parts() {
        assert_eq!(
            run(&["END"], "", &["a E", "N", "D b"]),
            (vec!["a ".into(), "".into(), "".into()], Some(Finish::Stop))
        );
        assert_eq!(run(&["END"], "", &["a E", "NE"]), (vec!["a ".into(), "EN".into(), "E".into()], None));
        assert_eq!(run(&["ué", "x"], "", &["bu", "éx"]), (vec!["b".into(), "".into()], Some(Finish::Stop)));
    }

    #[test]
    fn the_earliest_stop_text_counts() {
        assert_eq!(run(&["cd", "b"], "", &["abcd"]), (vec!["a".into()], Some(Finish::Stop)));
    }

    #[test]
    fn what_the_filter_finds_never_goes_out() {
        let (out, finish) = run(&[], "(?i)secret \\d+", &["the Sec", "ret ", "42 is"]);
        assert_eq!((out.concat().as_str(), finish), ("the ", Some(Finish::ContentFilter)));
        let long = "é".repeat(400);
        let (out, finish) = run(&[], "secret", &[&long, " se", "cret"]);
        assert_eq!((out.concat(), finish), (format!("{long} "), Some(Finish::ContentFilter)));
        assert_eq!(run(&[], "secret", &["harm", "less"]).0.concat(), "harmless");
    }
}
