//! The real binary, as a user meets it: text, chats, files, and one clear line for everything that goes wrong.

#[path = "../../runtime/tests/support/mod.rs"]
mod support;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};
use support::{Damage, Dress, HuggingFaceFixture};
use tempfile::TempDir;

/// One cache for all tests, so that only the first ones race.
fn cache() -> &'static Path {
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    CACHE.get_or_init(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"))
}

fn ternion(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternion"));
    command.args(arguments).env("TERNION_CACHE", cache()).stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Output {
    ternion(arguments).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("output is UTF-8")
}

/// Standard output of a run that must succeed.
fn stdout(arguments: &[&str]) -> String {
    let output = output(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout).to_owned()
}

/// Demands exit code `code`, nothing on standard output, and exactly one line of error that holds all of `words`.
#[track_caller]
fn refused(output: &Output, code: i32, words: &[&str]) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    let lines: Vec<&str> = error.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(lines.len(), 1, "{error}");
    assert!(!error.contains("panicked"), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` in: {error}");
    }
}

/// A model directory, sound or damaged.
fn directory(model: HuggingFaceFixture) -> TempDir {
    let target = TempDir::new().expect("a temporary directory");
    model.write(&support::embedded(), target.path());
    target
}

fn path(directory: &TempDir) -> &str {
    directory.path().to_str().expect("a path in UTF-8")
}

#[test]
fn the_embedded_model_tells_a_story() {
    let story = stdout(&["run", "-p", "Once upon a time", "-n", "24"]);
    assert!(story.starts_with("Once upon a time"), "{story}");
    assert!(story.split_whitespace().count() > 12, "{story}");
}

#[test]
fn the_same_seed_gives_the_same_text_with_any_threads_and_kernels() {
    let story = |extra: &[&str]| {
        let arguments = [&["run", "-p", "The old king", "-n", "40", "--seed", "7"], extra].concat();
        stdout(&arguments)
    };
    let expected = story(&["-t", "1"]);
    for extra in [
        &["-t", "2"][..],
        &["-t", "3", "--kernel", "tl1"],
        &["--kernel", "mad"],
        &["--kernel", "mad/clif128 layout=rows4x16 multiply=pairs unroll=2 ntile=2"],
    ] {
        assert_eq!(story(extra), expected, "{extra:?}");
    }
    assert_ne!(stdout(&["run", "-p", "The old king", "-n", "40", "--seed", "8"]), expected);
}

#[test]
fn sampling_options_change_the_text() {
    let greedy =
        |extra: &[&str]| stdout(&[&["run", "-p", "Once upon a time", "-n", "30", "--temp", "0"], extra].concat());
    assert_eq!(greedy(&["--seed", "1", "--top-k", "5"]), greedy(&["--seed", "2"]), "greedy needs no random numbers");
    assert_ne!(greedy(&["--repeat-penalty", "1"]), greedy(&["--repeat-penalty", "1.5"]));
    let sampled =
        |extra: &[&str]| stdout(&[&["run", "-p", "Once upon a time", "-n", "30", "--seed", "3"], extra].concat());
    let plain = sampled(&["--temp", "1.5", "--top-k", "0", "--top-p", "1"]);
    for extra in [["--top-k", "1"], ["--top-p", "0.1"], ["--min-p", "0.9"]] {
        let mut arguments = vec!["--temp", "1.5"];
        for off in [["--top-k", "0"], ["--top-p", "1"]].iter().filter(|off| off[0] != extra[0]) {
            arguments.extend(off);
        }
        arguments.extend(extra);
        assert_ne!(sampled(&arguments), plain, "{extra:?}");
    }
}

#[test]
fn a_prompt_comes_from_standard_input_too() {
    let mut command = ternion(["run", "-p", "-", "-n", "8", "--temp", "0"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"Once upon a time").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), stdout(&["run", "-p", "Once upon a time", "-n", "8", "--temp", "0"]));
}

#[test]
fn json_lines_hold_the_text_the_tokens_and_the_outcome() {
    let lines = stdout(&["run", "-p", "Once upon a time", "-n", "12", "--temp", "0", "--json"]);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let (done, pieces) = lines.split_last().unwrap();
    let texts: String = pieces.iter().map(|piece| piece["text"].as_str().unwrap()).collect();
    let tokens: usize = pieces.iter().map(|piece| piece["tokens"].as_array().unwrap().len()).sum();
    let plain = stdout(&["run", "-p", "Once upon a time", "-n", "12", "--temp", "0", "--no-echo"]);
    assert_eq!(format!("{texts}\n"), plain);
    assert_eq!(
        (tokens, &done["done"]["generated_tokens"], &done["done"]["reason"]),
        (12, &12.into(), &"length".into())
    );
    for figure in ["load_s", "tune_s", "compile_s", "prompt_s", "decode_s"] {
        assert!(done["done"][figure].as_f64().unwrap() >= 0.0, "{figure}");
    }
}

#[test]
fn a_chat_answers_every_line_until_the_input_ends() {
    for spelling in ["--chat", "-cnv"] {
        let mut command = ternion(["run", spelling, "--system", "You tell stories.", "-n", "10", "--json"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"Hello\nAnd then?\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let done = text(&output.stdout).lines().filter(|line| line.starts_with("{\"done\"")).count();
        assert_eq!(done, 2, "{spelling}: {}", text(&output.stdout));
    }
}

#[test]
fn a_directory_runs_like_the_prepared_file_made_from_it() {
    let source = directory(HuggingFaceFixture { shards: 3, ..HuggingFaceFixture::new(Dress::PackedInverse) });
    let place = TempDir::new().unwrap();
    let run = |model: &str| stdout(&["run", model, "-p", "Once upon a time", "-n", "16", "--temp", "0"]);
    let from_directory = run(path(&source));
    for (name, extra) in [("plain.tern", &[][..]), ("mine.tern", &["--for-this-machine", "--budget", "300ms"])] {
        let file = place.path().join(name);
        let file = file.to_str().unwrap();
        stdout(&[&["prepare", path(&source), "-o", file], extra].concat());
        assert_eq!(run(file), from_directory);
    }
}

#[test]
fn setup_prepares_tunes_and_says_what_to_do_next() {
    let source = directory(HuggingFaceFixture::new(Dress::PackedDirect));
    let place = TempDir::new().unwrap();
    let setup = |model: &str, extra: &[&str]| {
        let mut command = ternion([&["setup", model, "--budget", "200ms"], extra].concat());
        command.env("TERNION_CACHE", place.path().join("cache")).current_dir(&place).output().unwrap()
    };
    let first = setup(path(&source), &[]);
    let notes = text(&first.stderr);
    assert!(first.status.success(), "{notes}");
    assert!(notes.contains("tuned for") && notes.contains("next: ternion run"), "{notes}");
    let name = source.path().file_name().unwrap().to_str().unwrap();
    let file = place.path().join(format!("{name}.tern"));
    assert!(file.is_file() && notes.contains("fastest form for this machine"), "{notes}");

    // Again in its own place. A busy machine may find other kernels, the model stays the same.
    let file = file.to_str().unwrap();
    let again = setup(file, &[]);
    let notes = text(&again.stderr);
    assert!(again.status.success() && notes.contains("fastest form for this machine"), "{notes}");
    // Rounding would lose the model's own head.
    refused(&setup(file, &["--head", "int8"]), 2, &["source itself"]);
    let mut names = std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.all(|name| !name.ends_with(".part")), "nothing unfinished is left");

    // What the file has is used as it lies; from a directory everything is converted.
    let run = |model: &str| output(&["run", model, "-p", "Once", "-n", "12"]);
    let (ready, plain) = (run(file), run(path(&source)));
    assert!(ready.status.success() && ready.stdout == plain.stdout);
    assert!(text(&plain.stderr).contains("as in the file: nothing"), "{}", text(&plain.stderr));
    assert!(text(&ready.stderr).contains("as in the file: "), "{}", text(&ready.stderr));
    assert!(output(&["setup", "--budget", "100ms"]).status.success(), "the embedded model only needs tuning");
}

#[test]
fn verify_finds_one_digest_whatever_runs_the_model() {
    let digest = |arguments: &[&str]| {
        let report: Value = serde_json::from_str(&stdout(arguments)).expect("JSON");
        let runs = report["runs"].as_array().expect("runs");
        assert!(runs.len() >= 24 && runs.iter().all(|run| run["digest"] == report["digest"]), "{report}");
        for zeros in [true, false] {
            assert!(runs.iter().any(|run| run["skips_zeros"] == zeros), "{report}");
        }
        report["digest"].as_str().expect("a digest").to_owned()
    };
    let two = digest(&["verify", "-t", "2", "-n", "8", "--json"]);
    assert_eq!(two, digest(&["verify", "-t", "1", "-n", "8", "--json"]));
    assert_ne!(two, digest(&["verify", "-t", "1", "-n", "8", "--kv", "f32", "--json"]));
    let table = stdout(&["verify", "-t", "1", "-n", "8"]);
    assert!(table.lines().filter(|line| line.ends_with(&two)).count() >= 25, "{table}");
}

#[test]
fn verify_finds_a_damaged_section() {
    let place = TempDir::new().unwrap();
    let file = place.path().join("damaged.tern");
    let mut bytes = std::fs::read(support::embedded_path()).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    refused(&output(&["verify", file.to_str().unwrap()]), 1, &["damaged.tern", "checksum"]);
}

/// The binary with a cache of its own.
fn with_cache(directory: &TempDir, arguments: &[&str]) -> Output {
    ternion(arguments).env("TERNION_CACHE", directory.path()).output().expect("the binary runs")
}

#[test]
fn tune_finds_remembers_explains_and_hands_on() {
    let cache = TempDir::new().unwrap();
    let page = cache.path().join("page.html");
    let tuned = with_cache(&cache, &["tune", "--budget", "2s", "-t", "1", "--json", "--html", page.to_str().unwrap()]);
    assert!(tuned.status.success(), "{}", text(&tuned.stderr));
    let report: Value = serde_json::from_slice(&tuned.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert!(!rows.is_empty() && rows.iter().all(|row| row["us"].as_f64().unwrap() > 0.0));
    assert!(std::fs::read_to_string(&page).unwrap().ends_with("</html>\n"));
    assert!(text(&tuned.stderr).contains("recommended batch size 1"));

    let shown = with_cache(&cache, &["tune", "--show", "-t", "1"]);
    assert!(text(&shown.stdout).contains("33-128"), "{}", text(&shown.stdout));
    let run = with_cache(&cache, &["run", "-p", "Once", "-n", "4", "-t", "1"]);
    assert!(text(&run.stderr).contains("schedules"), "known, not raced: {}", text(&run.stderr));

    let file = cache.path().join("exported.json");
    let file = file.to_str().unwrap();
    assert!(with_cache(&cache, &["tune", "--export", file, "-t", "1"]).status.success());
    assert!(text(&with_cache(&cache, &["tune", "--forget", "-t", "1"]).stderr).contains("forgotten"));
    refused(&with_cache(&cache, &["tune", "--export", file, "-t", "1"]), 2, &["nothing is known"]);
    for how in ["--import", "--merge"] {
        assert!(with_cache(&cache, &["tune", how, file, "-t", "1"]).status.success());
        assert_eq!(with_cache(&cache, &["tune", "--show", "-t", "1"]).stdout, shown.stdout);
    }
    // What was refused, by this machine or another, is listed with its reason.
    let mut profile: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let schedule = "naught/clif128 layout=lanes16x4 multiply=pairs unroll=1 ntile=1";
    profile["refused"] = json!([{ "spec": "k=256 n=1", "schedule": schedule, "reason": "wrong with seed 0x1" }]);
    std::fs::write(file, profile.to_string()).unwrap();
    assert!(with_cache(&cache, &["tune", "--merge", file, "-t", "1"]).status.success());
    let page = with_cache(&cache, &["doctor", "-t", "1"]);
    assert!(text(&page.stdout).contains("  refused       naught/clif128"), "{}", text(&page.stdout));
    assert!(text(&page.stdout).contains("wrong with seed 0x1"));

    std::fs::write(file, "{}").unwrap();
    refused(&with_cache(&cache, &["tune", "--import", file, "-t", "1"]), 1, &["not a usable machine profile"]);
    refused(&with_cache(&cache, &["tune", "--shapes", "nothing"]), 2, &["no shape is called nothing"]);
    refused(&with_cache(&cache, &["tune", "--only", "3x5"]), 2, &["--only 3x5: the model's matrices are"]);
}

#[test]
fn a_choice_is_checked_against_the_guess_the_median_and_a_saved_profile() {
    let cache = TempDir::new().unwrap();
    let file = cache.path().join("first.json");
    let file = file.to_str().unwrap();
    let tune = ["tune", "--budget", "1s", "-t", "1"];
    assert!(with_cache(&cache, &[&tune[..], &["--save", file]].concat()).status.success());
    let checked = with_cache(&cache, &[&tune[..], &["--check", "--against", file]].concat());
    assert!(checked.status.success(), "{}", text(&checked.stderr));
    let table = text(&checked.stdout);
    for rival in ["against the median of a sample of all legal", "against the guess, 10", "first.json, 10"] {
        assert!(table.contains(rival), "{rival} in {table}");
    }
    refused(&with_cache(&cache, &[&tune[..], &["--against", file]].concat()), 2, &["--check"]);
}

#[test]
fn a_run_can_be_told_what_it_is_for_and_how_much_memory_it_gets() {
    let story = |extra: &[&str]| stdout(&[&["run", "-p", "The old king", "-n", "8"], extra].concat());
    let expected = story(&[]);
    assert_eq!(story(&["--for", "mobile"]), expected);
    assert_eq!(story(&["--for", "cloud", "-t", "1", "-c", "100"]), expected);
    refused(&output(&["run", "-p", "x", "--memory-limit", "1"]), 2, &["the model needs", "limit of 1 MB"]);
    let long = ["run", "-p", "x", "--memory-limit", "40", "-c", "1000000"];
    refused(&output(&long), 2, &["a context of 1000000 tokens needs", "--memory-limit, or -c"]);
}

#[test]
fn bench_prints_prompts_and_generation_in_three_formats() {
    let arguments = ["bench", "-p", "8", "-n", "3", "-t", "1,2", "-r", "2"];
    let table = stdout(&arguments);
    for test in ["| 1 | pp8 |", "| 1 | tg3 |", "| 2 | pp8 |", "| 2 | tg3 |", " ± "] {
        assert!(table.contains(test), "{test} in {table}");
    }
    let with = |option| stdout(&[&arguments[..], &[option]].concat());
    assert_eq!(with("--csv").lines().count(), 5);
    assert!(with("--kernels").contains("| down |"));
    let json: Value = serde_json::from_str(&with("--json")).unwrap();
    let lines = json["lines"].as_array().unwrap();
    assert_eq!(lines.len(), 4);
    for line in lines {
        assert!(line["tokens_per_s"].as_f64().unwrap() > 0.0);
        assert_eq!(line["samples"].as_array().unwrap().len(), 2);
        assert_eq!(line["bytes_per_token"].is_u64(), line["test"] == "tg3");
    }
    for start in json["starts"].as_array().unwrap() {
        assert!(start["schedules_ms"].as_f64().unwrap() >= 0.0 && start["compile_ms"].as_f64().unwrap() > 0.0);
    }
    refused(&output(&["bench", "-p", "0", "-n", "0"]), 2, &["nothing to measure"]);
    refused(&output(&["bench", "-p", "1000000"]), 2, &["context"]);
}

#[test]
fn doctor_knows_the_machine() {
    let page = stdout(&["doctor"]);
    for word in ["CPU", "features", "memory read", "GB/s", "huge pages", "cache"] {
        assert!(page.contains(word), "{word} in {page}");
    }
    let findings: Value = serde_json::from_str(&stdout(&["doctor", "--json", "-t", "1"])).expect("JSON");
    assert!(findings["machine"]["cores"]["available"].as_u64().unwrap() >= 1);
    assert!(findings["bandwidth"][0]["bytes_per_second"].as_f64().unwrap() > 1e8);
}

#[test]
fn what_cannot_be_a_model_is_refused_in_one_line() {
    let run = |model: &str| output(&["run", model, "-p", "x", "-n", "1"]);
    refused(&run("/no/such/model"), 1, &["/no/such/model"]);
    refused(&run("/dev/null"), 1, &["/dev/null"]);
    let empty = TempDir::new().unwrap();
    refused(&run(path(&empty)), 1, &["config.json"]);
    for (damage, words) in [
        (Damage::UnknownArchitecture, &["unknown architecture"][..]),
        (Damage::MissingTensor, &["missing"]),
        (Damage::WrongShape, &["[33, 256]"]),
        (Damage::Code3, &["code 3"]),
        (Damage::Truncated, &["model.safetensors"]),
        (Damage::HeaderBeyondFile, &["model.safetensors"]),
        (Damage::BrokenConfig, &["config.json"]),
    ] {
        let model = directory(HuggingFaceFixture::damaged(damage));
        refused(&run(path(&model)), 1, words);
    }
    let place = TempDir::new().unwrap();
    for (name, bytes) in
        [("foreign.tern", &b"GGUF is something else"[..]), ("empty.tern", b""), ("short.tern", b"TERNION\0")]
    {
        let file = place.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        refused(&run(file.to_str().unwrap()), 1, &[name]);
    }
    let whole = std::fs::read(support::embedded_path()).unwrap();
    for length in [20, 5000, whole.len() - 1] {
        let file = place.path().join("truncated.tern");
        std::fs::write(&file, &whole[..length]).unwrap();
        refused(&run(file.to_str().unwrap()), 1, &["truncated.tern"]);
    }
}

#[test]
fn mistakes_on_the_command_line_exit_with_2() {
    for (arguments, word) in [
        (&["run", "-p", "x", "-n", "0"][..], "-n"),
        (&["run", "-p", "x", "-t", "0"], "--threads"),
        (&["run"], "--prompt"),
        (&["run", "-p", "x", "--temp", "-1"], "temp"),
        (&["run", "-p", "x", "--top-p", "2"], "top-p"),
        (&["run", "-p", "x", "--top-p", "nan"], "top-p"),
        (&["run", "-p", "x", "--kernel", "fft"], "--kernel"),
        (&["run", "-p", "x", "--kernel", "mad/clif128 layout=rows4x64"], "--kernel"),
        (&["run", "-p", "x", "--kv", "f8"], "--kv"),
        (&["setup", "--budget", "soon"], "--budget"),
        (&["tune", "--only", "wide"], "--only"),
        (&["fly"], "fly"),
    ] {
        let output = output(arguments);
        refused(&output, 2, &[word]);
        assert_eq!(text(&output.stderr).lines().count(), 1, "{arguments:?}: {}", text(&output.stderr));
    }
}

#[test]
fn prompts_that_cannot_be_read_are_refused() {
    let prompt = OsStr::from_bytes(b"caf\xe9");
    refused(&ternion([OsStr::new("run"), OsStr::new("-p"), prompt]).output().unwrap(), 2, &["UTF-8"]);
    let long = "word ".repeat(400);
    refused(&output(&["run", "-p", &long, "-n", "1"]), 1, &["256"]);
    refused(&output(&["run", "-p", "x", "-c", "100000"]), 1, &["100000", "256"]);
}

#[test]
fn a_file_that_cannot_be_written_leaves_nothing_behind() {
    let source = directory(HuggingFaceFixture::new(Dress::PackedDirect));
    refused(&output(&["prepare", path(&source), "-o", "/no/such/place/out.tern"]), 1, &["/no/such/place/out.tern"]);

    // A full disk, in the shape of a limit on the size of files.
    let place = TempDir::new().unwrap();
    let file = place.path().join("out.tern");
    let mut command = ternion(["prepare", path(&source), "-o", file.to_str().unwrap()]);
    // SAFETY: both calls are async-signal-safe and touch nothing of this process.
    let command = unsafe {
        command.pre_exec(|| {
            let limit = libc::rlimit { rlim_cur: 100_000, rlim_max: 100_000 };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            Ok(())
        })
    };
    refused(&command.output().unwrap(), 1, &["out.tern", "nothing was left behind"]);
    assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0);

    let own = support::embedded_path();
    refused(&output(&["prepare", own.to_str().unwrap(), "-o", own.to_str().unwrap()]), 2, &["source itself"]);
}

#[test]
fn ctrl_c_ends_generation_and_keeps_what_is_there() {
    let mut command = ternion(["run", "-p", "Once upon a time", "--temp", "1", "--repeat-penalty", "1"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The first text is out: the signal's handler is in place.
    let mut first = [0; 4];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    // SAFETY: the child is ours and has not been waited for.
    unsafe { libc::kill(child.id().try_into().unwrap(), libc::SIGINT) };
    let output = child.wait_with_output().unwrap();
    // So short a story may have been over before the signal came.
    assert!(matches!(output.status.code(), Some(0 | 130)), "{:?}", output.status);
    assert_eq!(output.status.signal(), None);
    assert!(text(&output.stderr).contains("tokens/s"), "{}", text(&output.stderr));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut command = ternion(["run", "-p", "Once upon a time"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && !text(&output.stderr).contains("error"), "{}", text(&output.stderr));
}

#[test]
fn a_broken_cache_is_replaced_with_a_warning() {
    let place = TempDir::new().unwrap();
    let run = || ternion(["run", "-p", "x", "-n", "1", "-t", "1"]).env("TERNION_CACHE", place.path()).output().unwrap();
    assert!(run().status.success());
    for entry in std::fs::read_dir(&place).unwrap() {
        std::fs::write(entry.unwrap().path(), "{ not a profile").unwrap();
    }
    let second = run();
    assert!(second.status.success());
    // A busy machine may not have remembered anything; what was there must have been complained about.
    if std::fs::read_dir(&place).unwrap().any(|entry| entry.unwrap().path().extension() == Some(OsStr::new("json"))) {
        assert!(text(&second.stderr).contains("warning:"), "{}", text(&second.stderr));
    }
}
