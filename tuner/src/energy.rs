//! What work costs in energy, where the system says: RAPL counters of the processor, or the gauge of a battery.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Stopwatch;

/// Where the system shows its counters.
const SYSTEM: &str = "/sys/class";

/// A way to read power.
#[derive(Debug)]
pub(crate) enum EnergyMeter {
    /// Counters of processor packages in microjoules, and where they wrap around.
    Rapl(Vec<(PathBuf, u64)>),
    /// Files whose product is the power of a discharging battery, and what makes it watts.
    Battery(Vec<PathBuf>, f64),
}

impl EnergyMeter {
    /// The meter of this machine.
    ///
    /// # Errors
    /// Why there is none, in a few words.
    pub(crate) fn find() -> Result<Self, String> {
        Self::find_in(Path::new(SYSTEM))
    }

    fn find_in(class: &Path) -> Result<Self, String> {
        let zones: Vec<PathBuf> = entries(&class.join("powercap"))
            .into_iter()
            .filter(|zone| text(&zone.join("name")).is_some_and(|name| name.starts_with("package")))
            .collect();
        let counters: Vec<(PathBuf, u64)> = zones
            .iter()
            .map(|zone| (zone.join("energy_uj"), number(&zone.join("max_energy_range_uj")).unwrap_or(u64::MAX)))
            .filter(|(counter, _)| number(counter).is_some())
            .collect();
        if !counters.is_empty() {
            return Ok(Self::Rapl(counters));
        }
        for supply in entries(&class.join("power_supply")) {
            if text(&supply.join("status")).is_none_or(|status| status != "Discharging") {
                continue;
            }
            let [power, current, voltage] = ["power_now", "current_now", "voltage_now"].map(|name| supply.join(name));
            if number(&power).is_some() {
                return Ok(Self::Battery(vec![power], 1e-6));
            }
            if number(&current).is_some() && number(&voltage).is_some() {
                return Ok(Self::Battery(vec![current, voltage], 1e-12));
            }
        }
        Err(match zones.first() {
            Some(zone) => format!("{} cannot be read: run as root", zone.join("energy_uj").display()),
            None => "neither RAPL nor a discharging battery".to_owned(),
        })
    }

    /// Watts while `work` is called again and again for at least `time`. `None` if a counter cannot be read any more.
    pub(crate) fn watts(&self, time: Duration, stopwatch: &dyn Stopwatch, work: &mut dyn FnMut()) -> Option<f64> {
        let (begin, before) = (stopwatch.elapsed(), self.read()?);
        work();
        while stopwatch.elapsed().saturating_sub(begin) < time {
            work();
        }
        let (seconds, after) = (stopwatch.elapsed().saturating_sub(begin).as_secs_f64(), self.read()?);
        let watts = match self {
            Self::Rapl(counters) => {
                let used = |((_, range), (before, after)): (&(PathBuf, u64), (&f64, &f64))| {
                    // The counter starts again at 0 behind its range.
                    if after >= before { after - before } else { after - before + *range as f64 }
                };
                counters.iter().zip(before.iter().zip(&after)).map(used).sum::<f64>() * 1e-6 / seconds
            }
            Self::Battery(_, unit) => unit * (before.iter().product::<f64>() + after.iter().product::<f64>()) / 2.0,
        };
        (seconds > 0.0).then_some(watts)
    }

    fn read(&self) -> Option<Vec<f64>> {
        let read = |path: &PathBuf| number(path).map(|value| value as f64);
        match self {
            Self::Rapl(counters) => counters.iter().map(|(path, _)| read(path)).collect(),
            Self::Battery(files, _) => files.iter().map(read).collect(),
        }
    }
}

/// What lies in a directory, in order.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort();
    entries
}

fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stopwatch::scripted::ScriptedStopwatch;

    fn write(root: &Path, file: &str, value: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value).unwrap();
    }

    /// Ten calls of 10 ms each, around which `counter` goes from one value to another.
    fn watts(root: &Path, counter: &str, before: &str, after: &str) -> f64 {
        write(root, counter, before);
        let meter = EnergyMeter::find_in(root).unwrap();
        let clock = ScriptedStopwatch::default();
        let mut work = || {
            clock.advance(Duration::from_millis(10));
            write(root, counter, after);
        };
        meter.watts(Duration::from_millis(100), &clock, &mut work).unwrap()
    }

    #[test]
    fn rapl_counts_microjoules_and_wraps_around() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(EnergyMeter::find_in(root).unwrap_err(), "neither RAPL nor a discharging battery");
        write(root, "powercap/intel-rapl:0/name", "package-0\n");
        assert!(EnergyMeter::find_in(root).unwrap_err().contains("run as root"));
        write(root, "powercap/intel-rapl:0/max_energy_range_uj", "1000000000\n");
        let counter = "powercap/intel-rapl:0/energy_uj";
        assert!((watts(root, counter, "5000000\n", "7000000\n") - 20.0).abs() < 1e-9);
        assert!((watts(root, counter, "999000000\n", "1000000\n") - 20.0).abs() < 1e-9);
    }

    #[test]
    fn a_discharging_battery_tells_power() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        write(root, "power_supply/BAT0/status", "Charging");
        write(root, "power_supply/BAT0/voltage_now", "10000000");
        write(root, "power_supply/BAT0/current_now", "500000");
        assert!(EnergyMeter::find_in(root).is_err());
        write(root, "power_supply/BAT0/status", "Discharging\n");
        // 10 V by 0.4 to 0.6 A.
        let used = watts(root, "power_supply/BAT0/current_now", "400000", "600000");
        assert!((used - 5.0).abs() < 1e-9, "{used}");
    }
}
