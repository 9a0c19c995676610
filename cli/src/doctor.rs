//! `ternion doctor`: what this machine is, what is known about it, and what would make it faster.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;
use ternion_compiler::{Cpu, Feature};
use ternion_runtime::team::Team;
use ternion_tuner::{CacheDir, Class, CpuProfile, MachineProfile, SystemStopwatch, probe};

use crate::arguments::Doctor;
use crate::output::{self, print};
use crate::terminal::{bytes, time};

/// All that doctor finds out.
#[derive(Serialize)]
struct Findings {
    ternion: &'static str,
    machine: CpuProfile,
    /// Features that kernels are compiled for.
    kernels_use: String,
    bandwidth: Vec<Bandwidth>,
    cache_directory: Option<String>,
    profiles: Vec<Known>,
    warnings: Vec<String>,
    advice: Vec<String>,
}

#[derive(Serialize)]
struct Bandwidth {
    threads: usize,
    bytes_per_second: Option<f64>,
}

#[derive(Serialize)]
struct Known {
    path: String,
    profile: MachineProfile,
    /// Whether this machine and this version of the compiler made it.
    current: bool,
}

pub(crate) fn doctor(options: &Doctor) -> Result<()> {
    let cpu = Cpu::host().context("ternion emits code for x86-64 and aarch64 only, and this CPU is neither")?;
    let machine = probe();
    let most = options.threads.threads.map_or(machine.cores.available, usize::from);
    let bandwidth = thread_counts(most)
        .into_iter()
        .map(|threads| {
            let team = Team::new(threads)?;
            let bytes_per_second = machine.memory_bandwidth(&team, &SystemStopwatch::start());
            Ok(Bandwidth { threads, bytes_per_second })
        })
        .collect::<Result<_>>()?;
    let cache = CacheDir::default();
    let (profiles, warnings) = cache.profiles();
    let profiles = profiles
        .into_iter()
        .map(|(path, profile)| {
            let current = profile.key.cpu == machine.signature()
                && profile.key.features == cpu.to_string()
                && profile.key.compiler == ternion_compiler::FINGERPRINT;
            Known { path: path.display().to_string(), profile, current }
        })
        .collect();
    let mut findings = Findings {
        ternion: env!("CARGO_PKG_VERSION"),
        machine,
        kernels_use: cpu.to_string(),
        bandwidth,
        cache_directory: cache.path().map(|path| path.display().to_string()),
        profiles,
        warnings: warnings.iter().map(ToString::to_string).collect(),
        advice: Vec::new(),
    };
    findings.advice = advice(&findings, &cpu);
    if options.json { output::json(&findings) } else { print(&page(&findings)) }
}

/// 1, 2, 4 … and `most`.
fn thread_counts(most: usize) -> Vec<usize> {
    let doubled = std::iter::successors(Some(1usize), |threads| threads.checked_mul(2));
    let mut counts: Vec<usize> = doubled.take_while(|threads| *threads < most).collect();
    counts.push(most);
    counts
}

/// What would make it faster, most important first.
fn advice(findings: &Findings, cpu: &Cpu) -> Vec<String> {
    let mut advice = Vec::new();
    let machine = &findings.machine;
    if cfg!(debug_assertions) {
        advice.push("this is a debug build: build with --release".to_owned());
    }
    if !findings.profiles.iter().any(|known| known.current) {
        advice.push("no tuned kernels for this machine yet: run `ternion setup MODEL`".to_owned());
    }
    if findings.cache_directory.is_none() {
        advice.push("no cache directory: set TERNION_CACHE, so that tuning is remembered".to_owned());
    }
    match machine.huge_pages.transparent.as_deref() {
        Some("never") => advice.push(
            "transparent huge pages are off: `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled` lets weights use them"
                .to_owned(),
        ),
        None if cfg!(target_os = "linux") => advice.push("this kernel has no transparent huge pages".to_owned()),
        _ => {}
    }
    if machine.cores.available < machine.cores.online {
        advice.push(format!(
            "only {} of {} processors may be used: affinity or the control group's quota limits this process",
            machine.cores.available, machine.cores.online
        ));
    }
    if let Some(physical) = machine.cores.physical.filter(|physical| *physical < machine.cores.available) {
        advice.push(format!("the processors are {physical} cores with several threads each: try -t {physical}"));
    }
    if let [one, .., all] = &findings.bandwidth[..]
        && let (Some(one), Some(best)) = (one.bytes_per_second, all.bytes_per_second)
        && best < 1.15 * one
    {
        advice.push(format!(
            "one thread reads memory about as fast as {}: decoding gains little from more threads, prompts do",
            all.threads
        ));
    }
    if cpu.arch() == ternion_compiler::Arch::X86_64 && !cpu.has(Feature::Ssse3) {
        advice.push("without SSSE3 only the slowest kernels run".to_owned());
    }
    advice
}

/// The findings as a page of text.
fn page(findings: &Findings) -> String {
    let mut page = String::new();
    let mut line = |name: &str, text: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "{name:<16}{text}");
    };
    let machine = &findings.machine;
    line("ternion", format!("{} (compiler {})", findings.ternion, ternion_compiler::FINGERPRINT));
    line("CPU", machine.signature());
    line("features", machine.features.join(" "));
    line("kernels use", findings.kernels_use.clone());
    for cache in &machine.caches {
        let shared = if cache.shared_by > 1 { format!(", shared by {}", cache.shared_by) } else { String::new() };
        line(&format!("L{} cache", cache.level), format!("{} × {}{shared}", cache.instances, bytes(cache.bytes)));
    }
    let cached = bytes(machine.last_level_bytes());
    line("", format!("ternary weights of up to {cached} stay in the cache: such models are measured from there"));
    let cores = &machine.cores;
    let quota = cores.quota.map_or(String::new(), |quota| format!(", quota {quota:.1}"));
    let physical = cores.physical.map_or(String::new(), |physical| format!(" on {physical} cores"));
    line("processors", format!("{} usable of {}{physical}{quota}", cores.available, cores.online));
    let memory = [machine.memory.available, machine.memory.total].map(|b| b.map_or("?".to_owned(), bytes));
    line("memory", format!("{} available of {}", memory[0], memory[1]));
    for bandwidth in &findings.bandwidth {
        let threads =
            if bandwidth.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", bandwidth.threads) };
        let speed = bandwidth.bytes_per_second.map_or("not measured".to_owned(), |b| format!("{:.1} GB/s", b / 1e9));
        line("memory read", format!("{speed} with {threads}"));
    }
    let pages = &machine.huge_pages;
    let reserved = pages
        .total
        .filter(|total| *total > 0)
        .map_or(String::new(), |total| format!(", {} of {total} reserved pages free", pages.free.unwrap_or(0)));
    line("huge pages", format!("{}{reserved}", pages.transparent.as_deref().unwrap_or("not known")));
    line("cache", findings.cache_directory.clone().unwrap_or_else(|| "none".to_owned()));
    for known in &findings.profiles {
        let state = if known.current { "" } else { " (another machine or version: not used)" };
        let key = &known.profile.key;
        line(
            "  profile",
            format!("{} shapes with {} threads, {}{state}", known.profile.shapes.len(), key.threads, known.path),
        );
        if known.current {
            for shape in &known.profile.shapes {
                let decode = shape.results.first().map_or(String::new(), |result| {
                    let median = std::time::Duration::from_secs_f64(result.figures.median_us * 1e-6);
                    format!(" ({})", time(median))
                });
                line("", format!("  {}x{}: {}{decode}", shape.m, shape.k, shape.choice.of(Class::One)));
            }
        }
        for refusal in &known.profile.refused {
            line("  refused", format!("{} for {}: {}", refusal.schedule, refusal.spec, refusal.reason));
        }
    }
    for warning in &findings.warnings {
        line("warning", warning.clone());
    }
    for advice in &findings.advice {
        line("advice", advice.clone());
    }
    page
}
