//! Engines and how they are run.

use std::fmt;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::models::{Workshop, script};

/// One entry of the table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Engine {
    pub(crate) name: String,
    pub(crate) runner: Runner,
    pub(crate) weights: Weights,
    /// A `llama-bench`.
    pub(crate) program: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Runner {
    Ternion,
    LlamaCppPython,
    LlamaBench,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum Weights {
    #[serde(rename = "relu2-trained")]
    Relu2Trained,
    #[serde(rename = "relu2-random")]
    Relu2Random,
    #[serde(rename = "silu")]
    Silu,
    #[serde(rename = "TQ2_0")]
    Tq2_0,
    #[serde(rename = "TQ1_0")]
    Tq1_0,
    #[serde(rename = "Q4_0")]
    Q4_0,
    #[serde(rename = "I2_S")]
    I2S,
}

impl Weights {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Relu2Trained => "relu2-trained",
            Self::Relu2Random => "relu2-random",
            Self::Silu => "silu",
            Self::Tq2_0 => "TQ2_0",
            Self::Tq1_0 => "TQ1_0",
            Self::Q4_0 => "Q4_0",
            Self::I2S => "I2_S",
        }
    }

    pub(crate) const fn extension(self) -> &'static str {
        match self {
            Self::Relu2Trained | Self::Relu2Random | Self::Silu => "tern",
            Self::Tq2_0 | Self::Tq1_0 | Self::Q4_0 | Self::I2S => "gguf",
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    engine: Vec<Engine>,
}

/// Reads a table of engines.
pub(crate) fn read(path: &Path) -> Result<Vec<Engine>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let table: Table = toml::from_str(&text).with_context(|| format!("{} is no table of engines", path.display()))?;
    for engine in &table.engine {
        let bench = engine.runner == Runner::LlamaBench;
        ensure!(bench == engine.program.is_some(), "{}: llama-bench needs a program, others have none", engine.name);
        let prepared = engine.weights.extension() == "tern";
        let ternion = engine.runner == Runner::Ternion;
        ensure!(prepared == ternion, "{}: ternion reads prepared files, others GGUF", engine.name);
    }
    Ok(table.engine)
}

/// What is measured; `prompt-128` or `generate-64` on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Tokens read at once.
    Prompt(usize),
    /// Tokens read one by one, with the head after each.
    Generate(usize),
}

impl Task {
    pub(crate) const fn tokens(self) -> usize {
        match self {
            Self::Prompt(tokens) | Self::Generate(tokens) => tokens,
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prompt(tokens) => write!(f, "prompt {tokens}"),
            Self::Generate(tokens) => write!(f, "generate {tokens}"),
        }
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, tokens) = text.split_once('-').unwrap_or((text, ""));
        // The runners' contexts hold 1024 tokens.
        match (kind, tokens.parse()) {
            ("prompt", Ok(tokens @ 1..=512)) => Ok(Self::Prompt(tokens)),
            ("generate", Ok(tokens @ 1..=1024)) => Ok(Self::Generate(tokens)),
            _ => Err("expected prompt-N, N at most 512, or generate-N, N at most 1024".to_owned()),
        }
    }
}

/// Bytes of a process.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// Most that was resident at a time.
    pub(crate) peak: u64,
    /// Resident and not a page of a file.
    pub(crate) anonymous: u64,
    /// Resident pages of files, which the system may drop and read again.
    pub(crate) file: u64,
}

/// An engine that has loaded its model, or a program that loads it for each task.
pub(crate) enum Running {
    Server { child: Child, input: ChildStdin, output: BufReader<ChildStdout>, load: Duration },
    Program { program: PathBuf, model: PathBuf, threads: usize },
}

#[derive(Deserialize)]
struct Answer {
    seconds: f64,
}

/// Of `llama-bench -o json`.
#[derive(Deserialize)]
struct BenchRow {
    avg_ns: u64,
}

impl Running {
    pub(crate) fn start(engine: &Engine, model: &Path, threads: usize, workshop: &Workshop) -> Result<Self> {
        let mut command = match (engine.runner, &engine.program) {
            (Runner::LlamaBench, Some(program)) => {
                return Ok(Self::Program { program: program.clone(), model: model.to_owned(), threads });
            }
            (Runner::LlamaCppPython, _) => {
                let mut command = Command::new(&workshop.python);
                command.arg(script());
                command
            }
            _ => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg("serve");
                command
            }
        };
        let start = Instant::now();
        command.arg(model).arg(threads.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (input, output) = (child.stdin.take().context("no input")?, child.stdout.take().context("no output")?);
        let mut output = BufReader::new(output);
        let mut ready = String::new();
        if output.read_line(&mut ready)? == 0 {
            bail!("{} did not start: {}", engine.name, child.wait()?);
        }
        Ok(Self::Server { child, input, output, load: start.elapsed() })
    }

    /// Time until the model was loaded, where that is seen.
    pub(crate) const fn load(&self) -> Option<Duration> {
        match self {
            Self::Server { load, .. } => Some(*load),
            Self::Program { .. } => None,
        }
    }

    /// Time of a task, from an empty context.
    pub(crate) fn run(&mut self, task: Task) -> Result<Duration> {
        match self {
            Self::Server { input, output, .. } => {
                writeln!(input, "{task}")?;
                input.flush()?;
                let mut line = String::new();
                ensure!(output.read_line(&mut line)? > 0, "the engine went away");
                let Answer { seconds } = serde_json::from_str(&line)?;
                Ok(Duration::from_secs_f64(seconds))
            }
            Self::Program { program, model, threads } => {
                let (prompt, generate) = match task {
                    Task::Prompt(tokens) => (tokens, 0),
                    Task::Generate(tokens) => (0, tokens),
                };
                let mut command = Command::new(program);
                command.arg("-m").arg(model).args(["-r", "1", "-o", "json"]);
                for (option, value) in [("-t", *threads), ("-p", prompt), ("-n", generate)] {
                    command.arg(option).arg(value.to_string());
                }
                let output = command.stderr(Stdio::null()).output()?;
                ensure!(output.status.success(), "llama-bench failed: {}", output.status);
                let rows: Vec<BenchRow> = serde_json::from_slice(&output.stdout).context("not llama-bench's JSON")?;
                let row = rows.first().context("llama-bench measured nothing")?;
                Ok(Duration::from_nanos(row.avg_ns))
            }
        }
    }

    /// Memory of the process, where it lives on between tasks and the system tells.
    pub(crate) fn memory(&self) -> Option<Memory> {
        let Self::Server { child, .. } = self else { return None };
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(1024 * line.trim_end_matches("kB").trim().parse::<u64>().ok()?)
        };
        Some(Memory { peak: field("VmHWM:")?, anonymous: field("RssAnon:")?, file: field("RssFile:")? })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Self::Server { child, .. } = self {
            // It may be gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
