//! `ternion lab plot`: a sweep as a page.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use ternion_lab::{Axes, Log, Parameter};

use crate::output;
use crate::terminal::note;

#[derive(Debug, Args)]
pub(super) struct Plot {
    /// Files that `lab sweep` has written, .csv or .jsonl
    #[arg(required = true)]
    sweeps: Vec<PathBuf>,
    /// The page to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Parameter from left to right in the heat map [default: one that varies most]
    #[arg(long, value_name = "PARAMETER")]
    x: Option<Parameter>,
    /// Parameter from top to bottom [default: one that varies most]
    #[arg(long, value_name = "PARAMETER")]
    y: Option<Parameter>,
}

pub(super) fn plot(options: &Plot) -> Result<()> {
    let mut rows = Vec::new();
    for path in &options.sweeps {
        rows.extend(Log::read(path)?);
    }
    if rows.iter().all(|row| row.median_us.is_none()) {
        bail!("{}: nothing was measured yet", options.sweeps[0].display());
    }
    let page = ternion_lab::plot(&rows, Axes { x: options.x, y: options.y });
    output::write_file(&options.output, page.as_bytes())?;
    note(&format!("wrote {}", options.output.display()));
    Ok(())
}
