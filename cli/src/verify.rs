//! `ternion verify`: one digest of all logits, however the model is run.

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use ternion_compiler::{Cpu, Feature};
use ternion_runtime::team::available_threads;
use ternion_runtime::verify::{Run as Verified, VerifyOptions, verify as verify_model};

use crate::arguments::Verify;
use crate::model::{cpu, open};
use crate::output::{self, print};
use crate::terminal::Bar;

/// Without `-t`, as many threads as there are processors, but not fewer than this.
const FEWEST: usize = 3;

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
    cpu: String,
    /// The widest vectors of `cpu`.
    #[serde(skip)]
    vectors: &'static str,
    threads: usize,
    pass: String,
    skips_zeros: bool,
    digest: String,
}

impl From<&Verified> for Run {
    fn from(Verified { way, digest }: &Verified) -> Self {
        Self {
            kernels: way.family.to_string(),
            cpu: way.cpu.to_string(),
            vectors: vectors(way.cpu),
            threads: way.threads,
            pass: way.pass.to_string(),
            skips_zeros: !way.whole,
            digest: format!("{digest:016x}"),
        }
    }
}

/// The widest vectors that a CPU has.
fn vectors(cpu: Cpu) -> &'static str {
    let known = [Feature::Avx512f, Feature::Avx2, Feature::Ssse3, Feature::DotProd];
    known.into_iter().find(|feature| cpu.has(*feature)).map_or("none", Feature::name)
}

pub(crate) fn verify(options: &Verify) -> Result<ExitCode> {
    let checkpoint = open(options.model.as_deref(), &options.read)?;
    let sections_checked = checkpoint.verify_checksums()?;
    checkpoint.verify_derived()?;
    let threads = options.threads.map_or_else(|| available_threads().max(FEWEST), usize::from);
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
        runs: verified.runs.iter().map(Run::from).collect(),
        digest: format!("{:016x}", verified.digest),
    };
    if options.json {
        output::json(&report)?
    } else {
        print(&page(&report))?
    }
    Ok(ExitCode::SUCCESS)
}

/// The report as text: one line per way to run the model.
fn page(report: &Report) -> String {
    let Report { model, tokens, logits_per_run, kv, digest, runs, .. } = report;
    let mut page = format!("{model}: {tokens} tokens, {kv} cache, {logits_per_run} logits per run\n");
    // Writing to a string cannot fail.
    if report.sections_checked > 0 {
        let _ = writeln!(page, "checksums of {} sections match", report.sections_checked);
    }
    let line = |[kernels, vectors, threads, pass, zeros, digest]: [&str; 6]| {
        format!("{kernels:<10}{vectors:<9}{threads:<9}{pass:<33}{zeros:<9}{digest}\n")
    };
    page += &line(["kernels", "vectors", "threads", "tokens at a time", "zeros", "digest of all logits"]);
    page += &line(["reference", "", "1", "1", "read", digest]);
    for run in runs {
        let zeros = if run.skips_zeros { "skipped" } else { "read" };
        let pass = run.pass.strip_prefix("chunks of ").unwrap_or(&run.pass);
        page += &line([&run.kernels, run.vectors, &run.threads.to_string(), pass, zeros, &run.digest]);
    }
    let _ = writeln!(page, "identical: {} ways to run it, one digest", runs.len());
    page
}
