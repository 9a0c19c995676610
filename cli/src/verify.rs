//! `ternion verify`: the same bits from every kernel, with every number of threads, in every chunk.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use ternion_runtime::team::available_threads;
use ternion_runtime::verify::{CHUNKS, VerifyOptions, verify as verify_model};

use crate::arguments::Verify;
use crate::model::{cpu, open};
use crate::output::{self, print};
use crate::terminal::Bar;

/// What was compared, under `--json`.
#[derive(Serialize)]
struct Report {
    model: String,
    sections_checked: usize,
    kv: String,
    tokens: usize,
    logits_per_run: usize,
    runs: Vec<Run>,
    digest: String,
}

#[derive(Serialize)]
struct Run {
    kernels: String,
    threads: usize,
    chunk: usize,
}

pub(crate) fn verify(options: &Verify) -> Result<ExitCode> {
    let checkpoint = open(options.model.as_deref(), &options.read)?;
    let sections_checked = checkpoint.verify_checksums()?;
    let threads = options.threads.map_or_else(|| available_threads().max(2), usize::from);
    let verify_options = VerifyOptions { tokens: options.n.into(), threads, kv: options.kv };
    let mut bar = None;
    let verified = verify_model(&checkpoint, &cpu()?, &verify_options, &mut |done, total| {
        bar.get_or_insert_with(|| Bar::count("verifying", total as u64)).set(done as u64);
    })?;
    drop(bar);
    let report = Report {
        model: checkpoint.name(),
        sections_checked,
        kv: options.kv.to_string(),
        tokens: verified.tokens,
        logits_per_run: verified.logits,
        runs: verified
            .runs
            .iter()
            .map(|run| Run { kernels: run.family.to_string(), threads: run.threads, chunk: run.chunk })
            .collect(),
        digest: format!("{:016x}", verified.digest),
    };
    if options.json {
        output::json(&report)?
    } else {
        print(&page(&report))?
    }
    Ok(ExitCode::SUCCESS)
}

/// The report as text: one line per kernel family.
fn page(report: &Report) -> String {
    let Report { model, tokens, logits_per_run, kv, digest, .. } = report;
    let mut page = format!("{model}: {tokens} tokens, {kv} cache, {logits_per_run} logits per run\n");
    // Writing to a string cannot fail.
    if report.sections_checked > 0 {
        let _ = writeln!(page, "checksums      {} sections match", report.sections_checked);
    }
    let _ = writeln!(page, "reference      scalar kernels, token by token");
    let mut families: Vec<&str> = report.runs.iter().map(|run| run.kernels.as_str()).collect();
    families.dedup();
    for family in families {
        let runs: Vec<&Run> = report.runs.iter().filter(|run| run.kernels == family).collect();
        let threads = runs.iter().map(|run| run.threads).max().unwrap_or(1);
        let _ = writeln!(
            page,
            "{family:<15}identical with 1 to {threads} threads and chunks of {CHUNKS:?} tokens ({} runs)",
            runs.len()
        );
    }
    let _ = writeln!(page, "digest         {digest}");
    page
}
