//! Ctrl-C: the first one asks generation to end, the second one ends the process.

use std::sync::atomic::{AtomicUsize, Ordering};

use ternion_hub::HubError;
use ternion_runtime::formats::FormatError;

static SIGNALS: AtomicUsize = AtomicUsize::new(0);

/// The exit code that shells expect of an interrupted program.
pub(crate) const EXIT_CODE: u8 = 130;

/// Watches for Ctrl-C from now on.
pub(crate) fn watch() {
    // Without a handler Ctrl-C ends the process at once, which is no reason not to start.
    let _ = ctrlc::set_handler(|| {
        if SIGNALS.fetch_add(1, Ordering::SeqCst) > 0 {
            std::process::exit(EXIT_CODE.into());
        }
    });
}

/// Whether Ctrl-C has been pressed.
pub(crate) fn requested() -> bool {
    SIGNALS.load(Ordering::SeqCst) > 0
}

/// Whether it is what ended the writing or fetching of a file.
pub(crate) fn ended(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(FormatError::Cancelled { .. }))
        || matches!(error.downcast_ref(), Some(HubError::Cancelled { .. }))
}

/// Forgets it, so that a chat can go on.
pub(crate) fn clear() {
    SIGNALS.store(0, Ordering::SeqCst);
}
