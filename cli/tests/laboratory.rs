//! The laboratory through the real binary: what there is, and what it looks like.

use std::process::{Command, Output};

fn lab(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ternion")).arg("lab").args(arguments).output().expect("the binary runs")
}

#[track_caller]
fn stdout(arguments: &[&str]) -> Vec<u8> {
    let output = lab(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[track_caller]
fn text(arguments: &[&str]) -> String {
    String::from_utf8(stdout(arguments)).expect("UTF-8")
}

#[track_caller]
fn refused(arguments: &[&str], code: i32, words: &str) {
    let output = lab(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.lines().count() == 1 && error.contains(words), "{error}");
}

#[test]
fn every_family_is_listed_with_what_a_cpu_allows() {
    let table = text(&["list", "--cpu", "x86-64 +ssse3"]);
    for family in ["mad", "tl1", "t5", "vlut", "sparse-rows", "sparse-columns"] {
        assert!(table.lines().any(|line| line.starts_with(family)), "{table}");
    }
    assert!(table.contains("avx512 needs"), "{table}");
    let json = text(&["list", "--cpu", "aarch64 +dotprod", "--json"]);
    let entries: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let some = entries.as_array().expect("an array").iter().any(|entry| entry["candidates"].as_u64() > Some(0));
    assert!(some, "{json}");
}

#[test]
fn kernels_are_emitted_for_any_cpu_in_every_form() {
    let wide = "x86-64 +ssse3 +avx2 +avx512f +avx512bw +avx512dq +avx512vl +avx512vnni";
    let asm = text(&["emit", "--shape", "64x256", "--family", "mad", "--cpu", wide]);
    assert!(asm.starts_with("; ternary-gemm k=256 n=1\n; mad/avx512 ") && asm.contains("vpdpbusd"), "{asm}");
    let step = text(&["emit", "--shape", "64x256", "--step", "norm-quantize", "--cpu", wide]);
    assert!(step.starts_with("; norm-quantize k=256\n; avx512\n") && step.contains("vsqrtps"), "{step}");
    let clif = text(&["emit", "--shape", "64x256", "--step", "quantize", "--cpu", "aarch64", "--as", "clif"]);
    assert!(clif.contains("fmul") && clif.contains("f32x4"), "{clif}");
    let narrow = ["emit", "--shape", "64x256", "--family", "tl1", "--cpu", "x86-64 +ssse3"];
    assert!(text(&[&narrow[..], &["--as", "clif"]].concat()).contains("function"));
    let bytes = stdout(&[&narrow[..], &["--as", "bytes"]].concat());
    assert!(bytes.len() > 64 && !bytes.starts_with(b";"));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kernel.o");
    let object =
        ["emit", "--shape", "64x256", "--family", "mad", "-n", "many", "--cpu", "aarch64", "--as", "object", "-o"];
    text(&[&object[..], &[path.to_str().unwrap()]].concat());
    assert!(std::fs::read(&path).unwrap().starts_with(b"\x7fELF"));
}

#[test]
fn what_cannot_be_emitted_is_refused_in_one_line() {
    let avx2 = "mad/avx2 layout=lanes16x4 multiply=pairs unroll=2 ntile=1";
    let emit = |rest: &[&'static str]| [&["emit", "--shape", "64x256"], rest].concat();
    refused(&emit(&["--schedule", avx2, "--cpu", "x86-64"]), 1, "avx2");
    refused(&emit(&["--schedule", avx2, "--cpu", "x86-64 +avx2", "--as", "clif"]), 1, "--as asm");
    refused(&emit(&["--family", "mad", "--cpu", "aarch64"]), 1, "--as object");
    refused(&emit(&["--family", "sparse-rows", "-n", "many", "--cpu", "x86-64 +ssse3"]), 2, "takes one column");
    refused(&emit(&["--family", "tl9"]), 2, "tl9");
    refused(&emit(&["--step", "quantise"]), 2, "norm-quantize");
    refused(&emit(&["--step", "prepare-five-planes", "--cpu", "x86-64"]), 1, "ssse3");
    refused(&["emit", "--shape", "64", "--family", "mad"], 2, "2560x6912");
}
