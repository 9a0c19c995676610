//! `ternion lab report`: what this machine's kernels are worth, in one table.

use std::num::NonZeroUsize;

use anyhow::Result;
use clap::Args;
use ternion_lab::Report;
use ternion_runtime::team::{Team, available_threads};
use ternion_tuner::SystemStopwatch;

use crate::arguments::Threads;
use crate::terminal::note;
use crate::{interrupt, output};

#[derive(Debug, Args)]
pub(super) struct ReportOptions {
    #[command(flatten)]
    threads: Threads,
    /// Rounds behind each figure
    #[arg(long, default_value = "41")]
    rounds: NonZeroUsize,
    /// Print one JSON object, with every kernel that was measured, instead of a table in Markdown
    #[arg(long)]
    json: bool,
}

pub(super) fn report(options: &ReportOptions) -> Result<()> {
    let all = Team::new(options.threads.threads.map_or_else(available_threads, NonZeroUsize::get))?;
    let one = Team::new(1)?;
    let step = &mut |what: &str| {
        let goes_on = !interrupt::requested();
        if goes_on {
            note(&format!("measuring {what}"));
        }
        goes_on
    };
    let report = Report::measure(&all, &one, &SystemStopwatch::start(), options.rounds.get(), step)?;
    if options.json { output::json(&report) } else { output::print(&report.table()) }
}
