//! A disk that fills up while preparing leaves nothing behind. A process of its own: the limit that stands for the
//! full disk holds for all its files.
#![cfg(unix)]

mod support;

use std::ops::ControlFlow;

use ternion_compiler::Layout;
use ternion_runtime::formats::{FormatError, tern};

/// Two files: one for which there is no room from the start, and one whose room was there when it was begun, so that it is a
/// positioned write in its middle that fails.
#[test]
fn a_full_disk_leaves_nothing_under_any_name() {
    let directory = tempfile::tempdir().unwrap();
    let [output, begun] = ["out.tern", "begun.tern"].map(|name| directory.path().join(name));
    let layout = |_, _, _, _| Layout::Canonical;
    std::fs::write(&begun, "before").unwrap();
    let stopped = tern::write(&support::embedded(), &begun, &layout, &mut |done, _| {
        if done > 100_000 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(stopped, Err(FormatError::Cancelled { .. })), "{stopped:?}");

    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: both calls only change how the kernel answers this process's writes; `limit` outlives its call.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
    let mut written = 0;
    for path in [&output, &begun] {
        let result = tern::write(&support::embedded(), path, &layout, &mut |done, _| {
            written = done;
            ControlFlow::Continue(())
        });
        let message = result.unwrap_err().to_string();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(message.starts_with("cannot write") && message.contains(name), "{message}");
    }
    assert!(written > 100_000, "the second file is not begun anew: {written}");
    let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["begun.tern"]);
    assert_eq!(std::fs::read(&begun).unwrap(), b"before");
}
