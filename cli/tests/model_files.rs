//! Models in and out through the real binary: made up, planned, exported, read again, and looked for on a hub.

use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

fn ternion(arguments: &[&str], directory: &Path) -> Output {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    Command::new(env!("CARGO_BIN_EXE_ternion"))
        .args(arguments)
        .current_dir(directory)
        .env("TERNION_CACHE", cache)
        .env("HF_HUB_CACHE", directory.join("hub"))
        .env_remove("HF_ENDPOINT")
        .output()
        .expect("the binary runs")
}

#[track_caller]
fn stdout(arguments: &[&str], directory: &Path) -> String {
    let output = ternion(arguments, directory);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[track_caller]
fn refused(arguments: &[&str], directory: &Path, code: i32, words: &str) {
    let output = ternion(arguments, directory);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.lines().count() == 1 && error.contains(words), "{error}");
}

#[test]
fn the_embedded_model_goes_out_and_comes_back_with_the_same_text() {
    let directory = TempDir::new().unwrap();
    let at = directory.path();
    let story = |model: &[&str]| {
        let arguments =
            [&["run"], model, &["-p", "Once upon a time", "-n", "12", "-q", "--temp", "0", "--repeat-penalty", "1"]]
                .concat();
        stdout(&arguments, at)
    };
    let expected = story(&[]);
    stdout(&["export", "--gguf", "f16.gguf", "--type", "f16"], at);
    stdout(&["export", "--gguf", "tq2.gguf"], at);
    stdout(&["export", "--gguf", "i2s.gguf", "--type", "i2_s"], at);
    stdout(&["export", "--hf", "directory"], at);
    // GGUF has no place for sampling defaults, so without chance. A type with scales of 16 bits rounds them; these few
    // tokens stay.
    for model in ["f16.gguf", "tq2.gguf", "i2s.gguf", "directory"] {
        assert_eq!(story(&[model]), expected, "{model}");
    }
    refused(&["export", "--hf", "directory"], at, 1, "there is something already");
    refused(&["export"], at, 2, "--gguf");
    refused(&["export", "--gguf", "x", "--type", "tl1"], at, 2, "tl1");
    // Read in another order, the same bytes are another model.
    assert_ne!(story(&["i2s.gguf", "--i2s-layout", "64"]), expected);
}

#[test]
fn what_would_be_written_is_said_and_not_written() {
    let directory = TempDir::new().unwrap();
    let at = directory.path();
    stdout(&["export", "--gguf", "model.gguf"], at);
    let plan = stdout(&["prepare", "model.gguf", "-o", "model.tern", "--dry-run"], at);
    assert!(plan.contains("42 ternary matrices") && !at.join("model.tern").exists(), "{plan}");
    stdout(&["prepare", "model.gguf", "-o", "model.tern"], at);
    let megabytes = std::fs::metadata(at.join("model.tern")).unwrap().len() as f64 / 1e6;
    assert!(plan.contains(&format!("a file of {megabytes:.1} MB")), "{plan}");
    let plan = stdout(&["synth", "100B", "--dry-run"], at);
    assert!(plan.contains("72 layers") && plan.contains("GB"), "{plan}");
    refused(&["synth", "7B", "-o", "x.tern"], at, 2, "2B-4T");
    refused(&["synth", "125M"], at, 2, "--output");
    refused(&["synth", "3B", "--ffn-sparsity", "0.8", "--dry-run"], at, 1, "relu²");
    assert_eq!(std::fs::read_dir(at).unwrap().count(), 2);
}

#[test]
fn a_made_up_model_runs() {
    let directory = TempDir::new().unwrap();
    let arguments = ["synth", "125M", "--layers", "1", "--seed", "3", "--ffn-sparsity", "0.9", "-o", "small.tern"];
    let output = ternion(&arguments, directory.path());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    // What was asked for is what results, and is measured: of 16 tokens' 49152 gates 90 %, within three standard deviations.
    let line = said.lines().last().unwrap();
    let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [zeros, tokens, gates, _, inputs, _] = numbers[..] else { panic!("{said}") };
    assert!(zeros == 45.0 && tokens == 16.0 && (88.0..92.0).contains(&gates) && inputs > gates, "{said}");
    let silu = ["synth", "125M", "--layers", "1", "--zeros", "0.3", "--silu", "-o", "silu.tern"];
    let said = String::from_utf8(ternion(&silu, directory.path()).stderr).unwrap();
    assert!(said.ends_with("\n30.0 % of the weights are 0\n"), "{said}");
    stdout(&["run", "small.tern", "-p", "Once", "-n", "3", "-q"], directory.path());
}

#[test]
fn a_name_that_has_not_been_pulled_is_no_file_and_says_how_to_get_it() {
    let directory = TempDir::new().unwrap();
    let at = directory.path();
    refused(&["run", "someone/model", "-p", "x"], at, 1, "ternion pull someone/model");
    refused(&["pull", "someone/model", "--offline"], at, 1, "someone/model");
    refused(&["pull", "no-name"], at, 1, "OWNER/NAME");
    // Nobody listens there.
    let output = ternion(&["pull", "someone/model", "--endpoint", "http://127.0.0.1:9"], at);
    assert_eq!(output.status.code(), Some(1));
    // What an earlier pull left is opened by its name.
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = at.join("hub/models--someone--model/snapshots").join(commit);
    std::fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
    stdout(&["export", "--hf", snapshot.to_str().unwrap()], at);
    let refs = at.join("hub/models--someone--model/refs");
    std::fs::create_dir_all(&refs).unwrap();
    std::fs::write(refs.join("main"), commit).unwrap();
    assert_eq!(stdout(&["pull", "someone/model", "--offline"], at).trim(), snapshot.to_str().unwrap());
    stdout(&["run", "someone/model", "-p", "Once", "-n", "2", "-q"], at);
}
