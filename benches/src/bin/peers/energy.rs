//! Energy that the processor has used, where Linux tells (RAPL).

use std::path::PathBuf;

/// A package's counter.
#[derive(Clone, Debug)]
pub(crate) struct Counter {
    directory: PathBuf,
    microjoules: u64,
}

impl Counter {
    /// Joules since it was read; it starts anew at its range.
    fn since(&self) -> Option<f64> {
        let now = number(self.directory.join("energy_uj"))?;
        let used = match now.checked_sub(self.microjoules) {
            Some(used) => used,
            None => now + number(self.directory.join("max_energy_range_uj"))?.checked_sub(self.microjoules)?,
        };
        Some(used as f64 / 1e6)
    }
}

/// The counters of all packages; `None` if there are none that may be read.
pub(crate) fn now() -> Option<Vec<Counter>> {
    let read = |directory: PathBuf| {
        let name = std::fs::read_to_string(directory.join("name")).ok()?;
        let package = name.trim().starts_with("package");
        package.then_some(())?;
        Some(Counter { microjoules: number(directory.join("energy_uj"))?, directory })
    };
    let domains = std::fs::read_dir("/sys/class/powercap").ok()?;
    let counters: Vec<Counter> = domains.flatten().filter_map(|domain| read(domain.path())).collect();
    (!counters.is_empty()).then_some(counters)
}

/// Joules since the counters were read.
pub(crate) fn since(counters: Option<Vec<Counter>>) -> Option<f64> {
    counters?.iter().map(Counter::since).sum()
}

fn number(path: PathBuf) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
