//! The settings that chat and plain completions share, from a request's fields to jobs for the engine.

use std::time::Instant;

use serde_json::{Value, json};
use ternion_runtime::sampling::{Sampling, SamplingOptions};

use super::stream::Merged;
use super::{ApiError, Client, Fields};
use crate::engine::{Generation, Job, Refused, Task};
use crate::responses::Key;
use crate::trace::TextTrace;
use crate::{App, Served};

/// Most texts of one request.
const MOST_CHOICES: usize = 16;
/// Most alternatives to a token.
pub(super) const MOST_ALTERNATIVES: usize = 20;
/// Most stop texts, and the longest one in bytes.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 256;

/// How a request wants its texts to be generated and sent.
#[derive(Debug)]
pub(super) struct Settings {
    generation: Generation,
    /// The JSON schema that the texts conform to, written out.
    schema: String,
    /// Texts for each prompt.
    pub n: usize,
    /// Whether the answer is streamed.
    pub stream: bool,
    /// Whether a stream ends with the number of tokens.
    pub include_usage: bool,
}

impl Settings {
    /// Reads everything but the prompt. A large schema takes a moment. `logprobs` is how many alternatives are wanted with each token, if any.
    ///
    /// # Errors
    /// The first field that is out of its range or not supported.
    pub(super) fn read(app: &App, served: &Served, fields: &Fields, logprobs: Option<usize>) -> Result<Self, ApiError> {
        for name in ["tools", "functions", "logit_bias", "suffix", "audio", "echo", "prediction", "web_search_options"]
        {
            fields.unsupported(name)?;
        }
        let most = app.options.limits.output_tokens;
        let old = fields.integer("max_tokens", 1..=most)?;
        let limit = fields.integer("max_completion_tokens", 1..=most)?.or(old).unwrap_or(most);
        let named = fields.seed("seed")?.or(app.options.seed);
        let seed = named.map_or_else(getrandom::u64, Ok).map_err(|_| ApiError::internal())?;
        let options = SamplingOptions {
            temperature: fields.number("temperature", 0.0..=2.0)?,
            top_k: fields.integer("top_k", 0..=1_000_000)?,
            top_p: fields.number("top_p", 0.0..=1.0)?,
            min_p: fields.number("min_p", 0.0..=1.0)?,
            repetition_penalty: fields.number("repetition_penalty", 0.01..=100.0)?,
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            seed,
        };
        let sampling = Sampling::new(&options, &served.generation).map_err(|error| {
            ApiError::field(
                error.name.replace([' ', '-'], "_"),
                format!("{}: expected {}", error.value, error.expected),
            )
        })?;
        let stream = fields.boolean("stream")?;
        let include_usage = match fields.get("stream_options") {
            None => false,
            Some(Value::Object(options)) => match options.get("include_usage") {
                None | Some(Value::Null) => false,
                Some(Value::Bool(include)) => *include,
                Some(_) => return Err(ApiError::field("stream_options.include_usage", "expected true or false")),
            },
            Some(_) => return Err(ApiError::field("stream_options", "expected an object")),
        };
        let schema = response_format(fields)?;
        let grammar = schema.as_ref().map(|schema| {
            let grammars = served.grammars().map_err(|error| ApiError::field("response_format", error.to_string()))?;
            let unfit = |error| ApiError::field("response_format", format!("this schema cannot be followed: {error}"));
            grammars.json(schema).map_err(unfit)
        });
        let generation = Generation {
            sampling,
            sequence: 0,
            limit,
            stop: stops(fields)?,
            ignore_eos: fields.boolean("ignore_eos")?,
            logprobs,
            grammar: grammar.transpose()?,
        };
        let n = fields.integer("n", 1..=MOST_CHOICES)?.unwrap_or(1);
        if fields.integer("best_of", 1..=n)?.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::field("best_of", "is not supported unless it is n"));
        }
        Ok(Self {
            generation,
            schema: schema.map_or(String::new(), |schema| schema.to_string()),
            n,
            stream,
            include_usage,
        })
    }

    /// Whether tokens come with their probabilities.
    pub(super) fn logprobs(&self) -> bool {
        self.generation.logprobs.is_some()
    }

    /// The `n` jobs for a prompt.
    ///
    /// # Errors
    /// If the prompt is empty or too long.
    pub(super) fn jobs(
        &self,
        app: &App,
        served: &Served,
        client: &Client,
        prompt: &[u32],
    ) -> Result<Vec<Job>, ApiError> {
        check_prompt(app, served, prompt)?;
        let room = served.engine.options().context - prompt.len();
        if room == 0 {
            return Err(ApiError::invalid("the prompt fills the model's context: nothing can follow it"));
        }
        let job = |sequence| {
            let mut generation = self.generation.clone();
            generation.sequence = sequence;
            // The last token of a text need not fit into the context: nothing follows it.
            generation.limit = generation.limit.min(room + 1);
            let key = app.responses.is_on().then(|| {
                let prompt: Vec<u8> = prompt.iter().flat_map(|token| token.to_le_bytes()).collect();
                let settings = format!("{generation:?}");
                Key::new(&[served.name.as_bytes(), &prompt, settings.as_bytes(), self.schema.as_bytes()])
            });
            job(app, client, prompt, Task::Generate(Box::new(generation)), key)
        };
        Ok((0..self.n as u64).map(job).collect())
    }
}

/// A job that begins now.
pub(super) fn job(app: &App, client: &Client, prompt: &[u32], task: Task, key: Option<Key>) -> Job {
    let since = Instant::now();
    let deadline = since + app.options.limits.request_time;
    let trace = TextTrace::default();
    Job { prompt: prompt.to_vec(), task, deadline, client: client.number, key, since, trace }
}

/// Hands in the jobs of a request, which are traced from now on.
///
/// # Errors
/// If the queue has no room for all, or the server is about to stop.
pub(super) fn submit(served: &Served, client: &Client, mut jobs: Vec<Job>) -> Result<Merged, Refused> {
    client.trace.model(&served.name);
    for (number, job) in (0..).zip(&mut jobs) {
        job.trace = client.trace.text(number);
    }
    Ok(Merged::new(served.engine.submit(jobs)?))
}

/// Whether a prompt may be read.
///
/// # Errors
/// If it is empty, too long, or has tokens that the model does not have.
pub(super) fn check_prompt(app: &App, served: &Served, prompt: &[u32]) -> Result<(), ApiError> {
    let most = app.options.limits.input_tokens.min(served.engine.options().context);
    if prompt.is_empty() {
        return Err(ApiError::invalid("the prompt is empty: give at least one token"));
    }
    if prompt.len() > most {
        return Err(ApiError::invalid(format!("the prompt has {} tokens: at most {most} are read", prompt.len())));
    }
    match prompt.iter().find(|token| **token as usize >= served.vocabulary) {
        Some(token) => Err(ApiError::invalid(format!("the model has no token {token}"))),
        None => Ok(()),
    }
}

/// `stop`: a string or up to [`MOST_STOPS`] of them.
fn stops(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) => {
            let text = |stop: &Value| stop.as_str().map(str::to_owned);
            stops.iter().map(text).collect::<Option<_>>().ok_or_else(|| ApiError::field("stop", "expected strings"))?
        }
        Some(_) => return Err(ApiError::field("stop", "expected a string or a list of strings")),
    };
    if stops.len() > MOST_STOPS || stops.iter().any(|stop| stop.is_empty() || stop.len() > LONGEST_STOP) {
        let expected = format!("expected at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} bytes");
        return Err(ApiError::field("stop", expected));
    }
    Ok(stops)
}

/// The schema that `response_format` asks for.
fn response_format(fields: &Fields) -> Result<Option<Value>, ApiError> {
    let Some(format) = fields.get("response_format") else { return Ok(None) };
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({"type": "object"}))),
        Some("json_schema") => match &format["json_schema"]["schema"] {
            schema @ (Value::Object(_) | Value::Bool(_)) => Ok(Some(schema.clone())),
            _ => Err(ApiError::field("response_format.json_schema.schema", "expected a JSON schema")),
        },
        _ => Err(ApiError::field("response_format.type", "expected text, json_object or json_schema")),
    }
}
