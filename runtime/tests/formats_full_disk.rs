//! A disk that fills up while preparing leaves nothing behind. A process of its own: the limit that stands for the
//! full disk holds for all its files.
#![cfg(unix)]

mod support;

use std::ops::ControlFlow;

use ternion_compiler::Layout;
use ternion_runtime::formats::tern;

#[test]
fn a_full_disk_leaves_nothing_under_any_name() {
    let directory = tempfile::tempdir().unwrap();
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: both calls only change how the kernel answers this process's writes; `limit` outlives its call.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
    let output = directory.path().join("out.tern");
    let layout = |_, _, _, _| Layout::Canonical;
    let result = tern::write(&support::embedded(), &output, &layout, &mut |_, _| ControlFlow::Continue(()));
    let message = result.unwrap_err().to_string();
    assert!(message.starts_with("cannot write") && message.contains("out.tern"), "{message}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}
