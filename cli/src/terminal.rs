//! What the terminal gets besides data: progress bars, notes and the end of a run. All of it goes to standard error.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A progress bar on standard error; nothing where that is no terminal.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// A bar of `total` bytes with the time left.
    pub(crate) fn bytes(title: &'static str, total: u64) -> Self {
        Self::new(title, total, "{prefix} [{wide_bar}] {bytes}/{total_bytes}, {eta} left")
    }

    /// A bar of `total` things.
    pub(crate) fn count(title: &'static str, total: u64) -> Self {
        Self::new(title, total, "{prefix} [{wide_bar}] {pos}/{len}")
    }

    /// A bar of `total` milliseconds; the message says what is going on.
    pub(crate) fn time(title: &'static str, total: Duration) -> Self {
        let total = u64::try_from(total.as_millis()).unwrap_or(u64::MAX);
        Self::new(title, total, "{prefix} [{wide_bar}] {msg}")
    }

    fn new(title: &'static str, total: u64, template: &str) -> Self {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target).with_prefix(title);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }

    /// Moves the bar.
    pub(crate) fn set(&self, done: u64) {
        self.0.set_position(done);
    }

    /// Moves the bar and says what is going on.
    pub(crate) fn say(&self, done: u64, message: String) {
        self.0.set_position(done);
        self.0.set_message(message);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// One line for the user, on standard error.
pub(crate) fn note(line: &str) {
    // Where not even standard error can be written, nobody can be told.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// `1.2 GB`, `34 MB`, `5 kB`: powers of ten, as disks and memory bandwidths are given.
pub(crate) fn bytes(count: u64) -> String {
    let count = count as f64;
    match count {
        ..1e3 => format!("{count:.0} B"),
        ..1e6 => format!("{:.0} kB", count / 1e3),
        ..1e9 => format!("{:.1} MB", count / 1e6),
        _ => format!("{:.2} GB", count / 1e9),
    }
}

/// `1.23 s`, `45.6 ms`, `7.8 µs`.
pub(crate) fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        1.0.. => format!("{seconds:.2} s"),
        1e-3.. => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{:.1} µs", seconds * 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_few_digits() {
        assert_eq!([0, 999, 12_345, 2_346_789, 1 << 30].map(bytes), ["0 B", "999 B", "12 kB", "2.3 MB", "1.07 GB"]);
        assert_eq!(time(Duration::from_nanos(1500)), "1.5 µs");
        assert_eq!(time(Duration::from_micros(1500)), "1.5 ms");
        assert_eq!(time(Duration::from_millis(1500)), "1.50 s");
    }
}
