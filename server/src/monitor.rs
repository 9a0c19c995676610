//! The last 24 hours in minutes, and alerts when something goes beyond its threshold.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::metrics::Totals;
use crate::outgoing;
use crate::process::Usage;

/// Minutes that are remembered.
const MINUTES: usize = 24 * 60;
const MINUTE: Duration = Duration::from_secs(60);
/// Time for a webhook to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// When to raise an alert. What is `None` raises none.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    /// MB of memory above those at the start.
    pub memory_mb: Option<f64>,
    /// Percent of all processors.
    pub cpu_percent: Option<f64>,
    /// Tokens per second and text, at least.
    pub tokens_per_second: Option<f64>,
    /// Percent of requests that ended with a server's error.
    pub error_percent: Option<f64>,
    /// Milliseconds of a request, on average.
    pub latency_ms: Option<f64>,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            memory_mb: Some(1024.0),
            cpu_percent: Some(80.0),
            tokens_per_second: Some(5.0),
            error_percent: Some(5.0),
            latency_ms: Some(5000.0),
        }
    }
}

/// A threshold that was passed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alert {
    /// What was measured.
    pub what: &'static str,
    /// How much it was.
    pub value: f64,
    /// How much it may be.
    pub threshold: f64,
}

impl fmt::Display for Alert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was {:.1} in the last minute, beyond {}", self.what, self.value, self.threshold)
    }
}

/// One minute, or several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Minute {
    /// Requests.
    pub requests: u64,
    /// Of those, the ones that ended with a server's error.
    pub errors: u64,
    /// Seconds of all of them together.
    pub seconds: f64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Seconds from token to token, all together, and how many there are.
    pub token_seconds: f64,
    /// Number of those.
    pub token_steps: u64,
    /// Most bytes of memory.
    pub memory_bytes: u64,
    /// Percent of all processors, on average.
    pub cpu_percent: f64,
}

impl Minute {
    fn add(&mut self, other: &Self, minutes_before: usize) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.seconds += other.seconds;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.token_seconds += other.token_seconds;
        self.token_steps += other.token_steps;
        self.memory_bytes = self.memory_bytes.max(other.memory_bytes);
        self.cpu_percent += (other.cpu_percent - self.cpu_percent) / (minutes_before + 1) as f64;
    }

    fn alerts(&self, thresholds: &Thresholds, baseline: u64) -> Vec<Alert> {
        let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let grown = self.memory_bytes.saturating_sub(baseline) as f64 / 1e6;
        let errors = 100.0 * ratio(self.errors as f64, self.requests as f64);
        let latency = 1e3 * ratio(self.seconds, self.requests as f64);
        let above = [
            ("memory_mb_over_baseline", grown, thresholds.memory_mb),
            ("cpu_percent", self.cpu_percent, thresholds.cpu_percent),
            ("error_percent", errors, thresholds.error_percent),
            ("latency_ms", latency, thresholds.latency_ms),
        ];
        let mut alerts: Vec<Alert> = above
            .into_iter()
            .filter_map(|(what, value, threshold)| Some(Alert { what, value, threshold: threshold? }))
            .filter(|alert| alert.value > alert.threshold)
            .collect();
        let speed = ratio(self.token_steps as f64, self.token_seconds);
        if let Some(threshold) = thresholds.tokens_per_second.filter(|least| self.token_steps > 0 && speed < *least) {
            alerts.push(Alert { what: "tokens_per_second", value: speed, threshold });
        }
        alerts
    }
}

/// What is looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Time since the monitor's start, by a clock that never jumps.
    pub time: Duration,
    /// This process.
    pub usage: Usage,
    /// All engines together.
    pub totals: Totals,
}

#[derive(Debug)]
struct History {
    minutes: VecDeque<Minute>,
    current: Minute,
    /// When the minute began.
    begun: Sample,
    last: Sample,
}

/// Watches.
#[derive(Debug)]
pub struct Monitor {
    thresholds: Thresholds,
    /// Bytes of memory at the start.
    baseline: u64,
    processors: f64,
    history: Mutex<History>,
}

/// What `/admin/report.json` says.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Seconds since the start.
    pub uptime_seconds: u64,
    /// Bytes of memory when all models were loaded.
    pub baseline_memory_bytes: u64,
    /// All that is remembered, at most 24 hours, together.
    pub total: Minute,
    /// The finished minutes, oldest first.
    pub minutes: Vec<Minute>,
    /// Thresholds that the minute in progress is beyond.
    pub alerts: Vec<Alert>,
}

impl Monitor {
    /// Starts with what there is now, on a machine of so many processors: its memory is the baseline.
    #[must_use]
    pub fn new(thresholds: Thresholds, usage: Usage, processors: usize) -> Self {
        let begun = Sample { usage, ..Sample::default() };
        let history = History { minutes: VecDeque::new(), current: Minute::default(), begun, last: begun };
        let processors = processors.max(1) as f64;
        Self { thresholds, baseline: usage.memory, processors, history: Mutex::new(history) }
    }

    /// Counts a request that has been answered.
    pub fn request(&self, status: u16, time: Duration) {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.current.requests += 1;
        history.current.errors += u64::from(status >= 500);
        history.current.seconds += time.as_secs_f64();
    }

    /// Counts an answer that broke off with an error after it had begun.
    pub fn broke_off(&self) {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).current.errors += 1;
    }

    /// Takes a sample and closes the minute if it is over; returns the alerts of a minute that is.
    pub fn tick(&self, sample: Sample) -> Vec<Alert> {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let since = sample.time.saturating_sub(history.begun.time);
        let totals = sample.totals - history.begun.totals;
        let used = sample.usage.cpu.saturating_sub(history.begun.usage.cpu).as_secs_f64();
        history.last = sample;
        let current = &mut history.current;
        (current.prompt_tokens, current.completion_tokens) = (totals.prompt_tokens, totals.completion_tokens);
        (current.token_seconds, current.token_steps) = (totals.token_seconds, totals.token_steps);
        current.memory_bytes = current.memory_bytes.max(sample.usage.memory);
        current.cpu_percent = 100.0 * used / since.as_secs_f64().max(1e-3) / self.processors;
        if since < MINUTE {
            return Vec::new();
        }
        let minute = std::mem::take(&mut history.current);
        history.begun = sample;
        if history.minutes.len() == MINUTES {
            history.minutes.pop_front();
        }
        history.minutes.push_back(minute);
        minute.alerts(&self.thresholds, self.baseline)
    }

    /// All that is remembered.
    #[must_use]
    pub fn report(&self) -> Report {
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let mut total = Minute::default();
        for (before, minute) in history.minutes.iter().chain([&history.current]).enumerate() {
            total.add(minute, before);
        }
        Report {
            uptime_seconds: history.last.time.as_secs(),
            baseline_memory_bytes: self.baseline,
            total,
            minutes: history.minutes.iter().copied().collect(),
            alerts: history.current.alerts(&self.thresholds, self.baseline),
        }
    }
}

/// Sends an alert to a webhook. What the other side says to it is of no interest.
pub(crate) fn post(url: &str, alert: &Alert) {
    if let Ok(body) = serde_json::to_string(alert) {
        let _ = outgoing::agent(PATIENCE).post(url).header("Content-Type", "application/json").send(body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufReader, Read as _, Write as _};
    use std::net::TcpListener;

    #[test]
    fn each_threshold_raises_its_alert_and_a_quiet_minute_none() {
        let thresholds = Thresholds::default();
        assert_eq!(Minute::default().alerts(&thresholds, 0), []);
        let good = Minute {
            requests: 100,
            errors: 5,
            seconds: 400.0,
            token_steps: 60,
            token_seconds: 12.0,
            ..Minute::default()
        };
        assert_eq!(good.alerts(&thresholds, 0), []);
        let bad = Minute {
            requests: 100,
            errors: 6,
            seconds: 501.0,
            token_steps: 4,
            token_seconds: 1.0,
            memory_bytes: 2_100_000_000,
            cpu_percent: 81.0,
            ..Minute::default()
        };
        let what: Vec<_> = bad.alerts(&thresholds, 1_000_000_000).into_iter().map(|alert| alert.what).collect();
        assert_eq!(
            what,
            ["memory_mb_over_baseline", "cpu_percent", "error_percent", "latency_ms", "tokens_per_second"]
        );
    }

    #[test]
    fn a_scripted_day_raises_alerts_when_they_are_due_and_is_remembered_for_24_hours() {
        let start = Usage { memory: 1_000_000_000, cpu: Duration::ZERO };
        let monitor = Monitor::new(Thresholds::default(), start, 2);
        let mut alerts = Vec::new();
        let mut sample = Sample { usage: start, ..Sample::default() };
        // 25 hours: in minute 3 memory doubles for a while, in minute 5 both processors are busy, in minute 7 half of the
        // requests fail and in minute 9 tokens take a second each.
        for second in 1..=25 * 3600u64 {
            let minute = (second - 1) / 60;
            sample.time = Duration::from_secs(second);
            sample.usage.memory = if minute == 3 { 2_100_000_000 } else { 1_000_000_000 };
            sample.usage.cpu += Duration::from_millis(if minute == 5 { 1900 } else { 100 });
            sample.totals.completion_tokens += 1;
            sample.totals.token_steps += 1;
            sample.totals.token_seconds += if minute == 9 { 1.0 } else { 0.01 };
            monitor.request(if minute == 7 && second % 2 == 0 { 500 } else { 200 }, Duration::from_millis(20));
            alerts.extend(monitor.tick(sample).into_iter().map(|alert| (minute, alert.what)));
        }
        let expected =
            [(3, "memory_mb_over_baseline"), (5, "cpu_percent"), (7, "error_percent"), (9, "tokens_per_second")];
        assert_eq!(alerts, expected);
        let report = monitor.report();
        assert_eq!((report.minutes.len(), report.uptime_seconds), (24 * 60, 25 * 3600));
        assert_eq!((report.total.requests, report.total.completion_tokens), (24 * 3600, 24 * 3600));
        // What happened in the first hour has been forgotten.
        assert_eq!((report.total.errors, report.total.memory_bytes), (0, 1_000_000_000));
        assert!(report.alerts.is_empty());
    }

    #[test]
    fn an_alert_is_posted_as_json() {
        let hook = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/alerts", hook.local_addr().unwrap());
        let received = std::thread::spawn(move || {
            let (mut stream, _) = hook.accept().unwrap();
            let mut text = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while !text.ends_with('}') {
                let mut byte = [0];
                reader.read_exact(&mut byte).unwrap();
                text.push(char::from(byte[0]));
            }
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
            text
        });
        post(&url, &Alert { what: "latency_ms", value: 6000.5, threshold: 5000.0 });
        let text = received.join().unwrap();
        assert!(text.starts_with("POST /alerts HTTP/1.1\r\n"), "{text}");
        assert!(text.ends_with(r#"{"what":"latency_ms","value":6000.5,"threshold":5000.0}"#), "{text}");
    }
}
