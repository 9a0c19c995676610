//! The bounded version of the soak test: memory stays flat over seconds of continuous generation. Speed is not judged.

#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::Command;

#[test]
fn memory_is_flat_over_ten_seconds_of_generation() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/ternary-tales.tern");
    let cache = std::env::temp_dir().join(format!("ternion-endurance-{}", std::process::id()));
    let mut endurance = Command::new(env!("CARGO_BIN_EXE_endurance"));
    endurance.arg(model).args(["-t", "2", "-m", "0.17", "-c", "24", "--draft", "4", "--every", "2"]);
    let output = endurance.env("TERNION_CACHE", &cache).output().unwrap();
    // It may not be there: then nothing was remembered.
    let _ = std::fs::remove_dir_all(&cache);
    let (report, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{report}{errors}");
    assert!(report.contains(": flat") && report.contains("last tenth"), "{report}{errors}");
    assert!(report.lines().any(|line| line.starts_with(' ')), "no line on the way: {report}");
}
