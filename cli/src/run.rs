//! `ternion run`: text from a prompt, or a conversation.

use std::ffi::OsStr;
use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;
use ternion_runtime::formats::Checkpoint;
use ternion_runtime::generate::{GenerateOptions, Generated, StopReason, generate};
use ternion_runtime::model::{Session, SessionOptions};
use ternion_runtime::sampling::{Sampling, SamplingOptions};
use ternion_runtime::text::{Message, Tokenizer};

use crate::arguments::Run;
use crate::model::{Ready, ReadyTimes, origin, ready_to_generate};
use crate::output::{self, print};
use crate::terminal::{note, time};
use crate::{UsageError, interrupt};

/// A piece of output under `--json`.
#[derive(Serialize)]
struct Piece<'a> {
    text: &'a str,
    tokens: &'a [u32],
}

/// The last line of output under `--json`.
#[derive(Serialize)]
struct Done {
    done: Summary,
}

/// What happened, in numbers. Times are in seconds, speeds in tokens per second.
#[derive(Serialize)]
struct Summary {
    reason: &'static str,
    prompt_tokens: usize,
    generated_tokens: usize,
    load_s: f64,
    /// Bytes of weights that are used as they lie in the file, and of those that were computed from others.
    stored_bytes: usize,
    converted_bytes: usize,
    tune_s: f64,
    compile_s: f64,
    prompt_s: f64,
    decode_s: f64,
    prompt_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    drafted_tokens: usize,
    accepted_tokens: usize,
}

pub(crate) fn run(options: &Run) -> Result<ExitCode> {
    let prompt = options.prompt.as_deref().map(read_prompt).transpose()?;
    let Ready { checkpoint, model, team, times } = ready_to_generate(&options.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let sampling = sampling(options, &checkpoint)?;
    let mut stop = checkpoint.generation().eos.clone();
    if stop.is_empty() {
        stop.extend(tokenizer.eos());
    }
    let kv = options.model.kv;
    let context = options.model.room.context(checkpoint.config(), kv, options.context.map(usize::from))?;
    let session_options = SessionOptions { kv, context, ..SessionOptions::default() };
    let mut talk = Talk {
        options,
        tokenizer: &tokenizer,
        settings: GenerateOptions {
            sampling,
            sequence: 0,
            limit: options.n.map(usize::from),
            stop,
            draft: options.draft,
        },
        session: Session::new(model, team, &session_options)?,
        times,
    };
    if options.chat {
        return talk.chat(&checkpoint, prompt);
    }
    let prompt = prompt.unwrap_or_default();
    let tokens = tokenizer.encode(&prompt, tokenizer.adds_bos())?;
    let echo = if options.json || options.no_echo { "" } else { &prompt };
    let generated = talk.answer(&tokens, echo)?;
    talk.end(&generated)?;
    Ok(exit_code(&generated))
}

/// The prompt as text; `-` stands for standard input.
fn read_prompt(prompt: &OsStr) -> Result<String> {
    if prompt == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes).context("standard input cannot be read")?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            UsageError(format!("the prompt on standard input is not UTF-8 (byte {at}): convert it first"))
        })?;
        return Ok(text);
    }
    match prompt.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(UsageError("-p: the prompt is not UTF-8: convert it first".to_owned()).into()),
    }
}

/// The settings of the command line, completed by the model's.
fn sampling(options: &Run, checkpoint: &Checkpoint) -> Result<Sampling> {
    let asked = &options.sampling;
    let options = SamplingOptions {
        temperature: asked.temperature,
        top_k: asked.top_k,
        top_p: asked.top_p,
        min_p: asked.min_p,
        repetition_penalty: asked.repeat_penalty,
        seed: asked.seed,
        ..SamplingOptions::default()
    };
    Sampling::new(&options, checkpoint.generation()).map_err(|error| UsageError(error.to_string()).into())
}

fn exit_code(generated: &Generated) -> ExitCode {
    match generated.reason {
        StopReason::Cancelled => ExitCode::from(interrupt::EXIT_CODE),
        StopReason::Stop | StopReason::Length => ExitCode::SUCCESS,
    }
}

/// One text or conversation.
struct Talk<'a> {
    options: &'a Run,
    tokenizer: &'a Tokenizer,
    settings: GenerateOptions,
    session: Session,
    times: ReadyTimes,
}

impl Talk<'_> {
    /// Works through the prompt and prints what follows, as it comes, after `echo`: that is not printed before the prompt
    /// has been accepted.
    fn answer(&mut self, prompt: &[u32], echo: &str) -> Result<Generated> {
        let mut text = self.tokenizer.detokenizer();
        let json = self.options.json;
        let mut failed = None;
        let mut pending: Vec<u32> = Vec::new();
        let show = |piece: &str, tokens: &mut Vec<u32>| {
            let shown = if json { output::json(&Piece { text: piece, tokens }) } else { print(piece) };
            tokens.clear();
            shown
        };
        let mut echo = Some(echo).filter(|echo| !echo.is_empty());
        let generated = generate(&mut self.session, prompt, &self.settings, &mut |token| {
            let echoed = echo.take().map_or(Ok(()), print);
            pending.push(token);
            let piece = text.push(token);
            let shown = if piece.is_empty() { Ok(()) } else { show(piece, &mut pending) };
            if let Err(error) = echoed.and(shown) {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        echo.take().map_or(Ok(()), print)?;
        let rest = text.finish();
        if !rest.is_empty() || !pending.is_empty() {
            show(rest, &mut pending)?;
        }
        if !json {
            print("\n")?;
        }
        Ok(generated)
    }

    /// The last line under `--json`, and the summary on standard error.
    fn end(&self, generated: &Generated) -> Result<()> {
        let ReadyTimes { load, tune, compile, raced } = self.times;
        if self.options.json {
            output::json(&Done {
                done: Summary {
                    reason: generated.reason.name(),
                    prompt_tokens: generated.prompt_tokens,
                    generated_tokens: generated.tokens.len(),
                    load_s: load.as_secs_f64(),
                    stored_bytes: self.session.model().report().stored(),
                    converted_bytes: self.session.model().report().converted(),
                    tune_s: tune.as_secs_f64(),
                    compile_s: compile.as_secs_f64(),
                    prompt_s: generated.prompt_time.as_secs_f64(),
                    decode_s: generated.decode_time.as_secs_f64(),
                    prompt_tokens_per_s: generated.prompt_speed(),
                    decode_tokens_per_s: generated.decode_speed(),
                    drafted_tokens: generated.drafted,
                    accepted_tokens: generated.accepted,
                },
            })?;
        }
        if !self.options.quiet {
            let speed = |speed: Option<f64>| speed.map_or("-".to_owned(), |speed| format!("{speed:.0} tokens/s"));
            note(&origin(&self.session.model().report()));
            note(&format!(
                "load {} · {} {} · compile {} · prompt {} ({}) · generate {} ({}) · {}",
                time(load),
                if raced { "tune" } else { "schedules" },
                time(tune),
                time(compile),
                speed(generated.prompt_speed()),
                generated.prompt_tokens,
                speed(generated.decode_speed()),
                generated.tokens.len(),
                generated.reason.name(),
            ));
        }
        Ok(())
    }

    /// Turns until the input ends. `first` is the first message, if it came with the command.
    fn chat(&mut self, checkpoint: &Checkpoint, first: Option<String>) -> Result<ExitCode> {
        let template = checkpoint.chat()?;
        let mut messages: Vec<Message> =
            self.options.system.iter().map(|system| Message::new("system", system)).collect();
        let mut next = first;
        loop {
            let Some(said) = next.take().map_or_else(read_turn, |said| Ok(Some(said)))? else { break };
            messages.push(Message::new("user", said));
            let rendered = template.render(&messages, true)?;
            // The template writes its own BOS. What the session holds already is not read again.
            let tokens = self.tokenizer.encode(&rendered, false)?;
            let known = self.session.reuse(&tokens);
            interrupt::clear();
            let generated = self.answer(&tokens[known..], "")?;
            messages.push(Message::new("assistant", self.tokenizer.decode(&generated.tokens)));
            self.end(&generated)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// One line from the user; `None` at the end of input.
fn read_turn() -> Result<Option<String>> {
    if std::io::stdin().is_terminal() {
        let mut terminal = std::io::stderr().lock();
        // A prompt that cannot be shown is no reason to stop.
        let _ = write!(terminal, "> ").and_then(|()| terminal.flush());
    }
    let mut line = String::new();
    match std::io::stdin().read_line(&mut line) {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err(UsageError("standard input is not UTF-8: convert it first".to_owned()).into())
        }
        Err(error) => Err(error).context("standard input cannot be read"),
    }
}
