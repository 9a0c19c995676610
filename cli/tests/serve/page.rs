//! The web page in headless Chromium, against the real server.

use std::path::Path;
use std::process::Command;

/// `TERNION_PAGE_PYTHON` names a Python that has what `server/tests/requirements.txt` lists.
#[test]
fn people_can_use_the_page() {
    let Some(python) = std::env::var_os("TERNION_PAGE_PYTHON") else {
        return println!("skipped: TERNION_PAGE_PYTHON names no Python with playwright");
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("server").join("tests/page/page_test.py");
    let status = Command::new(python).arg(script).arg(env!("CARGO_BIN_EXE_ternion")).status().expect("that Python");
    assert!(status.success(), "the page test says what failed above");
}
