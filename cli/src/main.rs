//! The `ternion` program: arguments in, text out, one line per error.

#![forbid(unsafe_code)]

mod arguments;
mod bench;
mod doctor;
mod embed;
mod embedded;
mod eval;
mod export;
mod interrupt;
mod lab;
mod model;
mod output;
mod plot;
mod prepare;
mod pull;
mod purpose;
mod run;
#[cfg(feature = "server")]
mod serve;
mod synth;
mod terminal;
mod tune;
mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::arguments::{Arguments, Command};

/// Exit code of a mistake on the command line; clap uses the same.
const USAGE: u8 = 2;

/// A mistake in how the program was called, found after the arguments were parsed.
#[derive(Debug)]
struct UsageError(String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments::of_process()) {
        Ok(arguments) => arguments,
        Err(error) => return mistake(&error),
    };
    interrupt::watch();
    match execute(&arguments.command) {
        Ok(code) => code,
        Err(error) if output::reader_went_away(&error) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::note(&format!("error: {}", one_line(&error)));
            match () {
                () if error.is::<UsageError>() => ExitCode::from(USAGE),
                () if tune::was_interrupted(&error) => ExitCode::from(interrupt::EXIT_CODE),
                () => ExitCode::FAILURE,
            }
        }
    }
}

/// Help and version as clap prints them; a mistake in one line.
fn mistake(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // Where help cannot be printed there is nobody to tell.
        let _ = error.print();
        return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
    }
    let message = error.to_string();
    // What is wrong comes first; an empty line ends it.
    let wrong = message.lines().take_while(|line| !line.is_empty()).map(str::trim).collect::<Vec<_>>().join(" ");
    terminal::note(&format!("{wrong}; --help explains the options"));
    ExitCode::from(USAGE)
}

fn execute(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Run(options) => run::run(options),
        #[cfg(feature = "server")]
        Command::Serve(options) => serve::serve(options),
        Command::Setup(options) => prepare::setup(options),
        Command::Prepare(options) => prepare::prepare(options),
        Command::Eval(options) => eval::eval(options),
        Command::Embed(options) => embed::embed(options),
        Command::Pull(options) => pull::pull(options),
        Command::Export(options) => export::export(options),
        Command::Synth(options) => synth::synth(options),
        Command::Verify(options) => verify::verify(options),
        Command::Tune(options) => tune::tune(options),
        Command::Bench(options) => bench::bench(options),
        Command::TuneWorker => tune::work(),
        Command::Lab(options) => lab::lab(options).map(|()| ExitCode::SUCCESS),
        Command::Doctor(options) => doctor::doctor(options).map(|()| ExitCode::SUCCESS),
    }
}

/// An error and its causes in one line; a cause that the line already says is not said again.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.contains(&cause) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&cause);
        }
    }
    line.replace(['\n', '\r'], " ")
}
