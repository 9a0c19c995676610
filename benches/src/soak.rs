//! Load on a server: many clients that ask one thing after the other, and what became of it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};
use ureq::Agent;

/// What is asked, by how many, and for how long.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where the server is, for example `http://127.0.0.1:8080`.
    pub url: String,
    /// Its key, if it wants one.
    pub key: Option<String>,
    /// Clients at the same time.
    pub clients: usize,
    /// For how long they begin new requests.
    pub time: Duration,
    /// Tokens to generate with each request.
    pub tokens: usize,
    /// Temperature that they are chosen with.
    pub temperature: f32,
}

/// What became of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Clients at the same time.
    pub clients: usize,
    /// Seconds until the last answer.
    pub seconds: f64,
    /// Requests that were answered to the end.
    pub answered: usize,
    /// Requests that were told to come back (429 and 503), by status.
    pub turned_away: BTreeMap<u16, usize>,
    /// Everything else, by what went wrong.
    pub failed: BTreeMap<String, usize>,
    /// Generated tokens, of all clients.
    pub tokens: u64,
    /// Of all clients together.
    pub tokens_per_second: f64,
    /// From a request to its first piece, and to its end, in milliseconds: 50 and 99 of 100 took no longer.
    pub first_ms: [f64; 2],
    /// As `first_ms`.
    pub whole_ms: [f64; 2],
    /// Bytes of the server's memory at the start, in the middle and at the end.
    pub memory: [u64; 3],
}

/// One answer's times.
struct Answer {
    first: Duration,
    whole: Duration,
    tokens: u64,
}

/// What one client got.
#[derive(Default)]
struct Client {
    answers: Vec<Answer>,
    turned_away: BTreeMap<u16, usize>,
    failed: BTreeMap<String, usize>,
}

/// Puts the load on.
///
/// # Errors
/// If the server is not there to begin with.
pub fn soak(load: &Load) -> Result<Outcome> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(600)))
        .max_idle_connections_per_host(load.clients)
        .max_idle_connections(load.clients);
    let agent: Agent = config.build().into();
    let first = memory(&agent, load)?;
    let begin = Instant::now();
    let (clients, middle) = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..load.clients)
            .map(|client| {
                scope.spawn({
                    let agent = agent.clone();
                    move || ask_until(&agent, load, client, begin + load.time)
                })
            })
            .collect();
        std::thread::sleep(load.time / 2);
        let middle = memory(&agent, load);
        (clients.into_iter().map(|client| client.join().unwrap_or_default()).collect::<Vec<_>>(), middle)
    });
    let seconds = begin.elapsed().as_secs_f64();
    let mut outcome = Outcome { clients: load.clients, seconds, ..Outcome::default() };
    let (mut firsts, mut wholes) = (Vec::new(), Vec::new());
    for client in clients {
        client.turned_away.into_iter().for_each(|(status, n)| *outcome.turned_away.entry(status).or_default() += n);
        client.failed.into_iter().for_each(|(what, n)| *outcome.failed.entry(what).or_default() += n);
        for Answer { first, whole, tokens } in client.answers {
            outcome.answered += 1;
            outcome.tokens += tokens;
            firsts.push(first);
            wholes.push(whole);
        }
    }
    outcome.tokens_per_second = outcome.tokens as f64 / seconds;
    (outcome.first_ms, outcome.whole_ms) = (percentiles(firsts), percentiles(wholes));
    outcome.memory = [first, middle?, memory(&agent, load)?];
    Ok(outcome)
}

/// 50 and 99 of 100, in milliseconds.
fn percentiles(mut times: Vec<Duration>) -> [f64; 2] {
    times.sort_unstable();
    let at = |part: usize| times.get((times.len() * part / 100).min(times.len().saturating_sub(1)));
    [50, 99].map(|part| at(part).map_or(0.0, |time| time.as_secs_f64() * 1e3))
}

fn ask_until(agent: &Agent, load: &Load, client: usize, end: Instant) -> Client {
    let mut outcome = Client::default();
    let mut number = 0;
    while Instant::now() < end {
        number += 1;
        match ask(agent, load, client, number) {
            Ok(Ok(answer)) => outcome.answers.push(answer),
            Ok(Err((status, wait))) => {
                *outcome.turned_away.entry(status).or_default() += 1;
                std::thread::sleep(wait.min(end.saturating_duration_since(Instant::now())));
            }
            Err(error) => *outcome.failed.entry(format!("{error:#}")).or_default() += 1,
        }
    }
    outcome
}

/// One request, as a stream; the status and how long to wait if it was turned away.
fn ask(agent: &Agent, load: &Load, client: usize, number: usize) -> Result<Result<Answer, (u16, Duration)>> {
    let body = json!({
        "messages": [{"role": "user", "content": format!("Story {number} of client {client}: a dog")}],
        "max_tokens": load.tokens, "temperature": load.temperature, "seed": number, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let mut request =
        agent.post(format!("{}/v1/chat/completions", load.url)).header("content-type", "application/json");
    if let Some(key) = &load.key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let begin = Instant::now();
    let reply = request.send(body.to_string())?;
    let status = reply.status().as_u16();
    if matches!(status, 429 | 503) {
        let wait = reply.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        return Ok(Err((status, Duration::from_secs(wait.context("no Retry-After")?))));
    }
    if status != 200 {
        bail!("status {status}");
    }
    let (mut first, mut tokens, mut done) = (None, None, false);
    for line in BufReader::new(reply.into_body().into_reader()).lines() {
        let line = line.context("the stream broke off")?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        first.get_or_insert_with(|| begin.elapsed());
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let event: Value = serde_json::from_str(data).context("an event that is no JSON")?;
        if let Some(code) = event["error"]["code"].as_str() {
            bail!("error event {code}");
        }
        tokens = event["usage"]["completion_tokens"].as_u64().or(tokens);
    }
    match (first, tokens, done) {
        (Some(first), Some(tokens), true) => Ok(Ok(Answer { first, whole: begin.elapsed(), tokens })),
        _ => bail!("the stream ended early"),
    }
}

/// Bytes of memory that the server says it has.
fn memory(agent: &Agent, load: &Load) -> Result<u64> {
    let mut request = agent.get(format!("{}/metrics", load.url));
    if let Some(key) = &load.key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let text = request.call().with_context(|| format!("{} is not there", load.url))?.body_mut().read_to_string()?;
    let line = text.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes "));
    let bytes: f64 = line.context("no memory among the metrics")?.parse()?;
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_occurred() {
        let times = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(percentiles(times), [101.0, 199.0]);
        assert_eq!(percentiles(vec![Duration::from_millis(5)]), [5.0, 5.0]);
        assert_eq!(percentiles(Vec::new()), [0.0, 0.0]);
    }
}
