//! `ternion lab`: which kernels there are, and what they look like as code.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand, ValueEnum};
use ternion_compiler::{Cpu, Family, Schedule};
use ternion_lab::{Form, Shape, catalogue, choose, emit, spec};

use crate::UsageError;
use crate::output::{self, print};

#[derive(Debug, Args)]
pub(crate) struct Lab {
    #[command(subcommand)]
    command: Experiment,
}

#[derive(Debug, Subcommand)]
enum Experiment {
    /// List kernel families and machines, how many schedules are worth measuring, and why a CPU allows none
    List(List),
    /// Write a kernel as Cranelift IR, assembly, bytes or an object file; it is not run
    Emit(Emit),
}

#[derive(Debug, Args)]
struct List {
    /// Rows x row length of the matrix, as in W[m, k]
    #[arg(long, value_name = "MxK", default_value = "2560x2560")]
    shape: Shape,
    /// List for this CPU, for example "x86-64 +avx2" or aarch64, with exactly these features [default: this one]
    #[arg(long)]
    cpu: Option<Cpu>,
    /// Print one JSON array instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Emit {
    /// Rows x row length of the matrix, as in W[m, k]; only the row length is compiled in
    #[arg(long, value_name = "MxK")]
    shape: Shape,
    /// Columns per call; families that read a list always take one
    #[arg(short, long, value_enum, default_value = "1")]
    n: ColumnCount,
    /// The family's schedule that is most often the fastest
    #[arg(long, required_unless_present = "schedule", conflicts_with = "schedule")]
    family: Option<Family>,
    /// This very schedule, for example "mad/avx2 layout=lanes16x4 multiply=pairs unroll=2 ntile=1"
    #[arg(long)]
    schedule: Option<Schedule>,
    /// What to write
    #[arg(long = "as", value_enum, default_value = "asm")]
    form: FormName,
    /// The file to write instead of standard output; bytes are hexadecimal only on a terminal
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Emit for this CPU, for example "x86-64 +avx2" or aarch64, with exactly these features [default: this one]
    #[arg(long)]
    cpu: Option<Cpu>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ColumnCount {
    #[value(name = "1")]
    One,
    Many,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FormName {
    /// Cranelift's intermediate representation
    Clif,
    /// x86-64 assembly
    Asm,
    /// Machine code and its constants
    Bytes,
    /// A relocatable ELF file with the function `ternion_kernel`
    Object,
}

pub(crate) fn lab(options: &Lab) -> Result<()> {
    match &options.command {
        Experiment::List(options) => list(options),
        Experiment::Emit(options) => emit_kernel(options),
    }
}

/// The CPU that was asked for, or this one.
fn cpu(asked: Option<Cpu>) -> Result<Cpu> {
    asked.or_else(Cpu::host).ok_or_else(|| anyhow!("ternion emits no code for this CPU: name another with --cpu"))
}

fn list(options: &List) -> Result<()> {
    let entries = catalogue(options.shape.k, &cpu(options.cpu)?);
    if options.json {
        return output::json(&entries);
    }
    let mut table = format!("{:<15} {:<8} {:<40} schedules\n", "family", "machine", "kernel");
    for entry in entries {
        let what = entry.refusal.unwrap_or_else(|| entry.candidates.to_string());
        writeln!(table, "{:<15} {:<8} {:<40} {what}", entry.family, entry.machine, entry.spec)?;
    }
    print(&table)
}

fn emit_kernel(options: &Emit) -> Result<()> {
    let cpu = cpu(options.cpu)?;
    let family = options.schedule.map(|schedule| schedule.family).or(options.family);
    let family = family.ok_or_else(|| UsageError("--family or --schedule: one is needed".to_owned()))?;
    let many = matches!(options.n, ColumnCount::Many);
    if many && family.list().is_some() {
        return Err(UsageError(format!("-n many: {family} reads a list and takes one column")).into());
    }
    let spec = spec(family, options.shape.k, many);
    let schedule = options.schedule.map_or_else(|| choose(family, &spec, &cpu), Ok)?;
    let form = match options.form {
        FormName::Clif => Form::Clif,
        FormName::Asm => Form::Asm,
        FormName::Bytes => Form::Bytes,
        FormName::Object => Form::Object,
    };
    let kernel = emit(&spec, &schedule, &cpu, form)?;
    if let Some(path) = &options.output {
        return output::write_file(path, &kernel);
    }
    let terminal = std::io::stdout().is_terminal();
    match form {
        Form::Object if terminal => {
            Err(UsageError("an object file is nothing for a terminal: name a file with -o".to_owned()).into())
        }
        Form::Bytes if terminal => {
            let mut hex = String::new();
            for line in kernel.chunks(32) {
                line.iter().try_for_each(|byte| write!(hex, "{byte:02x}"))?;
                hex.push('\n');
            }
            print(&hex)
        }
        _ => output::write(&kernel),
    }
}
