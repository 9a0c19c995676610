//! The memory that a command really takes: anonymous pages, which no file backs. Linux tells it, other systems do not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Time between two looks: the peaks of a preparation last longer.
const INTERVAL: Duration = Duration::from_millis(5);

/// Watches this process's anonymous memory.
pub(crate) struct Watch {
    state: Arc<(AtomicBool, AtomicU64)>,
    watcher: Option<JoinHandle<()>>,
}

impl Watch {
    pub(crate) fn start() -> Self {
        let state = Arc::new((AtomicBool::new(false), AtomicU64::new(0)));
        let shared = state.clone();
        let watcher = thread::spawn(move || {
            while let Some(bytes) = anonymous_bytes().filter(|_| !shared.0.load(Ordering::Relaxed)) {
                shared.1.fetch_max(bytes, Ordering::Relaxed);
                thread::sleep(INTERVAL);
            }
        });
        Self { state, watcher: Some(watcher) }
    }

    /// The most that was seen, in bytes; `None` where the system does not tell.
    pub(crate) fn peak(mut self) -> Option<u64> {
        self.stop();
        Some(self.state.1.load(Ordering::Relaxed)).filter(|bytes| *bytes > 0)
    }

    fn stop(&mut self) {
        self.state.0.store(true, Ordering::Relaxed);
        // A watcher that failed has nothing to say.
        let _ = self.watcher.take().map(JoinHandle::join);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

fn anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}
