//! `ternion tune --check`: whether what was found is as good as it should be, by samples that nothing was chosen by.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use ternion_compiler::Cpu;
use ternion_runtime::team::Team;
use ternion_tuner::{
    Budget, CacheDir, Choice, Choices, Class, Comparison, Gain, Request, compare, exhaustive_cost, gains, guess, known,
};

use crate::output::{self, print};
use crate::terminal::{note, time};
use crate::tune::search;

/// What is checked.
pub(crate) struct Check<'a> {
    pub(crate) request: &'a Request,
    pub(crate) choices: &'a Choices,
    pub(crate) cpu: &'a Cpu,
    pub(crate) threads: usize,
    pub(crate) json: bool,
}

/// The schedules of each shape, `[m, k]`.
type Shapes = BTreeMap<(usize, usize), Choice>;

/// Against the median legal schedule, the guess, and whatever else was asked for.
pub(crate) fn check(check: &Check<'_>, against: Option<&Path>) -> Result<()> {
    let Check { request, choices, cpu, threads, json } = *check;
    // Searches first: they have teams of their own, and two at once would disturb each other.
    let other = against.map(|against| rival(check, against)).transpose()?;
    let team = Team::new(threads)?;
    show_gains(&gains(request, choices, cpu, &team), json)?;
    let mut rivals = vec![("guess".to_owned(), guess(request, cpu))];
    rivals.extend(other);
    for (name, rival) in &rivals {
        show(name, &compare(request, choices, rival, cpu, &team), json)?;
    }
    Ok(())
}

/// The choices that `--against` names.
fn rival(check: &Check<'_>, against: &Path) -> Result<(String, Shapes)> {
    let shapes = |choices: &Choices| {
        choices.found.iter().map(|found| ((found.problem.m, found.problem.k), found.choice)).collect()
    };
    let request = match against.to_str() {
        Some("again") => Request { again: true, ..check.request.clone() },
        Some("exhaustive") => Request { budget: Budget::EXHAUSTIVE, again: false, ..check.request.clone() },
        _ => {
            let profile = CacheDir::read_exported(against)?;
            let shapes = profile.shapes.iter().map(|entry| ((entry.m, entry.k), entry.choice)).collect();
            return Ok((against.display().to_string(), shapes));
        }
    };
    if !request.again && known(&request, check.cpu, check.threads, &CacheDir::default())?.is_none() {
        let (schedules, takes) = exhaustive_cost(&request, check.choices, check.cpu);
        let takes = takes.map_or(String::new(), |takes| format!(", about {} at the pace of this search", time(takes)));
        note(&format!(
            "exhaustive search of {schedules} schedules{takes}; interrupted, it goes on from there next time"
        ));
    }
    let name = if request.again { "second search" } else { "exhaustive search" };
    Ok((name.to_owned(), shapes(&search(&request, check.cpu, check.threads)?)))
}

fn show_gains(gains: &[Gain], json: bool) -> Result<()> {
    if json {
        return output::json(&gains);
    }
    print("\nagainst the median of a sample of all legal schedules\n")?;
    for Gain { m, k, class, ours_us, median_us, gain, legal, measured } in gains {
        let shape = format!("{m}x{k}");
        let class = class.name();
        print(&format!(
            "{shape:<12} {class:<7} {ours_us:>9.1} {median_us:>9.1} µs  {gain:>5.2}×  {measured} of {legal}\n"
        ))?;
    }
    Ok(())
}

fn show(name: &str, compared: &[Comparison], json: bool) -> Result<()> {
    if json {
        return output::json(&compared);
    }
    print(&format!("\nagainst the {name}, 10 held-out interleaved rounds (times of 95 % confidence)\n"))?;
    for Comparison { m, k, class, ours_us, theirs_us, ratio, verdict } in compared {
        print(&format!(
            "{:<12} {:<7} {:>9.1} ± {:<7.1} {:>9.1} ± {:<7.1} µs  {ratio:>5.2}×  {verdict}\n",
            format!("{m}x{k}"),
            class.map_or("all", Class::name),
            ours_us.0,
            ours_us.1,
            theirs_us.0,
            theirs_us.1,
        ))?;
    }
    Ok(())
}
