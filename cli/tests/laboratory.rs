//! The laboratory through the real binary: what there is, what it looks like, how fast it is. Nothing here judges a time.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternion"));
    command.arg("lab").args(arguments);
    command
}

fn lab(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the binary runs")
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

/// A schedule that every CPU runs.
const PORTABLE: &str = "mad/clif128 layout=rows4x16 multiply=pairs unroll=1 ntile=1";

#[test]
fn a_run_says_how_fast_kernels_are_and_what_limits_them() {
    let run = ["run", "--shape", "64x256", "--rounds", "3", "--threads", "2"];
    let json = text(&[&run[..], &["--family", "mad", "--machine", "clif128", "--json"]].concat());
    let rows: Vec<Value> = serde_json::from_str(&json).expect("JSON");
    assert!(rows.len() > 1, "{json}");
    for row in &rows {
        assert_eq!((&row["m"], &row["k"], &row["n"], &row["threads"]), (&64.into(), &256.into(), &1.into(), &2.into()));
        assert_eq!((&row["family"], &row["weights"], &row["samples"]), (&"mad".into(), &"cold".into(), &3.into()));
        let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
        assert!(number("fastest_us") <= number("median_us"));
        let speed = number("bytes") / number("median_us") * 1e-3;
        assert!((number("gb_per_s") / speed - 1.0).abs() < 1e-6, "{row}");
        assert!((number("of_read") * number("read_gb_per_s") / speed - 1.0).abs() < 1e-6, "{row}");
        assert!((number("of_limit") * number("limit_gmac_per_s") / number("gmac_per_s") - 1.0).abs() < 1e-6, "{row}");
        let cycles = number("ghz") * 1e3 * number("median_us") * 2.0 / number("bytes");
        assert!((number("cycles_per_byte") / cycles - 1.0).abs() < 1e-6, "{row}");
    }
    let table = text(&[&run[..], &["--schedule", PORTABLE, "-n", "3", "--schedule"], &[PORTABLE]].concat());
    assert_eq!(table.lines().filter(|line| line.contains("rows4x16")).count(), 2, "{table}");
    assert!(table.contains("weights hot") && table.contains("memory reads"), "{table}");
    let guess = text(&[&run[..], &["--choose", "guess", "--json"]].concat());
    assert_eq!(serde_json::from_str::<Vec<Value>>(&guess).expect("JSON").len(), 1, "{guess}");
}

#[test]
fn a_list_with_zeros_reads_fewer_weights() {
    for family in ["sparse-rows", "sparse-columns"] {
        let json = text(&[
            "run",
            "--shape",
            "256x512",
            "--rounds",
            "2",
            "--family",
            family,
            "--machine",
            "clif128",
            "--zeros",
            "0",
            "--zeros",
            "75",
            "--json",
        ]);
        let rows: Vec<Value> = serde_json::from_str(&json).expect("JSON");
        let bytes = |zeros: u64| {
            let row = rows.iter().find(|row| row["zeros"] == zeros).unwrap_or_else(|| panic!("{json}"));
            row["bytes"].as_f64().expect("a number")
        };
        assert_eq!(bytes(75), bytes(0) / 4.0);
    }
}

#[test]
fn what_cannot_be_measured_is_refused_in_one_line() {
    let run = |rest: &[&'static str]| [&["run", "--shape", "64x256", "--rounds", "1"], rest].concat();
    refused(
        &run(&["--schedule", "mad/clif128 layout=lanes16 unroll=1 ntile=1 multiply=pairs"]),
        1,
        "cannot read layout",
    );
    refused(&run(&["--family", "mad", "--zeros", "50"]), 2, "--zeros");
    refused(&run(&["--where", "colour=red"]), 2, "colour");
    refused(&run(&["--family", "mad", "--where", "unroll=99"]), 1, "no schedule");
    refused(&run(&["-n", "0"]), 2, "'0'");
    // A shape that nobody has tuned.
    refused(&["run", "--shape", "63x255", "--choose", "tuned"], 1, "nothing is known of 63x255");
    refused(&["run"], 2, "--shape");
    refused(&["run", "--shape", "100000000x1000000", "--schedule", PORTABLE], 1, "take a smaller matrix");
    refused(&run(&["-n", "100000000", "--schedule", PORTABLE]), 1, "take fewer columns");
    refused(&["sweep", "--shape", "64x256", "-o", "sweep.txt", "--family", "mad"], 1, ".csv or .jsonl");
    refused(&["plot", "/nowhere/sweep.csv", "-o", "page.html"], 1, "/nowhere/sweep.csv");
}

fn sweep(path: &Path, more: &[&str]) -> String {
    let path = path.to_str().expect("UTF-8");
    let family = ["sweep", "--shape", "64x256", "--family", "mad", "--machine", "clif128", "--rounds", "2", "-o", path];
    let output = lab(&[&family[..], more].concat());
    let error = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(output.status.success() && output.stdout.is_empty(), "{error}");
    error
}

#[test]
fn a_sweep_goes_on_where_it_was_interrupted_and_is_drawn() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["sweep.csv", "sweep.jsonl"] {
        let path = directory.path().join(name);
        let lines = || std::fs::read_to_string(&path).unwrap().lines().count() - usize::from(name.ends_with("csv"));
        assert!(sweep(&path, &["--where", "unroll=1", "--seed", "1"]).contains(" 0 known before, 0 left"));
        let first = lines();
        // Interrupted in the middle of a line.
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 40]).unwrap();
        let known = format!("1 measured (0 of them refused), {} known before, 0 left", first - 1);
        let said = sweep(&path, &["--where", "unroll=1", "--seed", "1"]);
        assert!(said.contains(&known), "{said}");
        assert_eq!(lines(), first);
        // More of the space: what is there already is not measured again.
        let said = sweep(&path, &["--where", "unroll=1,2", "--seed", "2"]);
        assert!(said.contains(&format!(" {first} known before")) && lines() > first, "{said}");
        assert!(sweep(&path, &["--budget", "0s"]).contains("goes on"));

        let page = directory.path().join("page.html");
        let (from, to) = (path.to_str().unwrap(), page.to_str().unwrap());
        text(["plot", from, "-o", to, "--x", "unroll", "--y", "layout"].as_slice());
        let page = std::fs::read_to_string(page).unwrap();
        for part in ["aria-label=\"roofline\"", "unroll and layout", "aria-label=\"ranked bars\"", "64 × 256 · n = 1"]
        {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("src=") && !page.contains("<script"));
    }
    refused(
        &["plot", directory.path().join("sweep.csv").to_str().unwrap(), "-o", "p.html", "--x", "colour"],
        2,
        "colour",
    );
}

#[test]
fn a_sweep_that_is_killed_loses_nothing_that_it_has_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sweep.jsonl");
    let name = path.to_str().expect("UTF-8");
    let sweep = ["sweep", "--shape", "64x2560", "--family", "mad", "--machine", "clif128", "--rounds", "5", "-o", name];
    let mut child = command(&sweep).stderr(Stdio::null()).spawn().expect("the binary runs");
    let rows = || std::fs::read_to_string(&path).map_or(0, |text| text.matches('\n').count());
    while rows() < 20 {
        assert!(child.try_wait().expect("a child").is_none(), "it was to be killed half way");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().and_then(|()| child.wait().map(drop)).expect("it ends");
    let written = rows();
    let output = lab(&[&sweep[..], &["--budget", "0s"]].concat());
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(output.status.success() && said.contains(&format!(" {written} known before")), "{said}");
}

/// perf's map: `START SIZE NAME`, numbers in hexadecimal.
#[test]
#[cfg(target_os = "linux")]
fn profilers_are_told_the_names_of_kernels_on_request() {
    let run = ["run", "--shape", "64x256", "--rounds", "1", "--schedule", PORTABLE];
    let child = |value: &str| {
        let mut command = command(&run);
        command.env("TERNION_PERF_MAP", value).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().expect("the binary runs");
        let map = format!("/tmp/perf-{}.map", child.id());
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = std::fs::read_to_string(&map).ok();
        let _ = std::fs::remove_file(map);
        text
    };
    let map = child("1").expect("a map");
    let mut functions: Vec<_> = map
        .lines()
        .map(|line| {
            let mut words = line.split(' ');
            let mut number = || u64::from_str_radix(words.next().expect("a word"), 16).expect("a number");
            let (start, bytes) = (number(), number());
            let name = words.next().expect("a name");
            assert!(words.next().is_none() && bytes > 0 && start > 0, "{line}");
            (start, bytes, name)
        })
        .collect();
    let name = "ternion::mad_k256_n1_clif128_rows4x16_pairs_unroll1_ntile1";
    assert_eq!(functions.iter().filter(|(_, _, other)| *other == name).count(), 1, "{map}");
    functions.sort_unstable();
    assert!(child("0").is_none(), "nobody asked for it");
}

#[test]
fn the_kernel_that_the_book_takes_apart_is_the_one_that_is_emitted() {
    let wide = "x86-64 +avx512f +avx512bw +avx512dq +avx512vl +avx512vnni";
    let schedule = "mad/avx512 layout=lanes16x4 multiply=dot unroll=1 ntile=1";
    let listing = text(&["emit", "--shape", "2560x2560", "--as", "asm", "--cpu", wide, "--schedule", schedule]);
    assert_eq!(listing, include_str!("../../docs/src/anatomy/mad-avx512.asm"));
    let chapter = include_str!("../../docs/src/anatomy.md");
    assert!(
        chapter.contains("{{#include anatomy/mad-avx512.asm}}") && chapter.contains(schedule) && chapter.contains(wide)
    );
}

#[test]
fn listings_say_which_loop_is_which() {
    let emit = |form, schedule| {
        text(&["emit", "--shape", "64x1024", "--schedule", schedule, "--cpu", "x86-64 +ssse3 +avx2", "--as", form])
    };
    let asm = emit("asm", "mad/avx2 layout=lanes16x4 multiply=pairs unroll=1 ntile=1");
    assert!(
        asm.contains("; loop 1: tiles of rows") && asm.contains("carries ymm") && asm.contains("; back to loop 1"),
        "{asm}"
    );
    let clif = emit("clif", PORTABLE);
    assert!(clif.contains("; loop 2: chunks of k, unroll at a time, 16 turns\nblock"), "{clif}");
}
