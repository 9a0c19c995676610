//! `eval`, `embed` and `--lora` through the real binary.

#[path = "../../runtime/tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use support::{Tensor, safetensors};
use tempfile::TempDir;

fn ternion(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternion"));
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    command.args(arguments).env("TERNION_CACHE", cache).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("output is UTF-8")
}

/// Standard output of a run that must succeed.
#[track_caller]
fn stdout(arguments: &[&str]) -> String {
    let output = ternion(arguments).output().expect("the binary runs");
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout).to_owned()
}

fn json_of(arguments: &[&str]) -> Value {
    serde_json::from_str(&stdout(arguments)).expect("JSON")
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// Demands exit code `code`, nothing on standard output, and exactly one line of error that holds all of `words`.
#[track_caller]
fn refused(arguments: &[&str], code: i32, words: &[&str]) {
    let Output { status, stdout, stderr } = ternion(arguments).output().expect("the binary runs");
    let error = text(&stderr);
    assert_eq!(status.code(), Some(code), "{error}");
    assert!(stdout.is_empty(), "{}", text(&stdout));
    assert_eq!(error.lines().filter(|line| line.starts_with("error:")).count(), 1, "{error}");
    assert!(!error.contains("panicked"), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` in: {error}");
    }
}

/// Files of a test.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::new().expect("a temporary directory"))
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("a path in UTF-8").to_owned()
    }

    fn write(&self, name: &str, content: &str) -> String {
        std::fs::write(self.0.path().join(name), content).expect("a file of the test");
        self.path(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.path().join(name)).expect("a file of the test")
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("the test's directory");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort_unstable();
        names
    }
}

/// Some 500 tokens of held-out text.
fn story(place: &Place) -> String {
    let text = std::fs::read_to_string(support::fixture("val.txt")).expect("held-out text");
    place.write("story.txt", &text[..text.floor_char_boundary(1500)])
}

#[test]
fn a_loss_is_the_same_for_any_threads_and_kernels_and_the_sum_of_its_tokens() {
    let place = Place::new();
    let story = story(&place);
    let logprobs = place.path("logprobs.jsonl");
    let report = json_of(&["eval", "--text", &story, "--json", "-t", "1", "--logprobs", &logprobs]);
    for extra in [["-t", "2"], ["-t", "3"], ["--kernel", "tl1"], ["--kernel", "vlut"]] {
        assert_eq!(json_of(&[&["eval", "--text", &story, "--json"][..], &extra].concat()), report, "{extra:?}");
    }
    let figures = &report["text"];
    let (predicted, loss) = (figures["predicted"].as_u64().unwrap(), figures["loss"].as_f64().unwrap());
    assert!((2.0..4.5).contains(&loss), "{loss}");
    assert!((figures["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-9);
    let tokens = lines(text(&place.read("logprobs.jsonl")));
    assert_eq!(tokens.len() as u64, predicted);
    let total: f64 = tokens.iter().map(|token| token["logprob"].as_f64().unwrap()).sum();
    assert_eq!(-total / predicted as f64, loss);
    let greedy = tokens.iter().filter(|token| token["greedy"] == true).count();
    assert_eq!(greedy as f64 / predicted as f64, figures["greedy"].as_f64().unwrap());
    // One window's tokens, put together, are the text.
    let pieces: String = tokens[..100].iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert!(text(&place.read("story.txt")).starts_with(&pieces), "{pieces}");

    let more = json_of(&["eval", "--text", &story, "--json", "--stride", "64"]);
    assert_eq!(more["text"]["predicted"].as_u64().unwrap() + 1, more["text"]["tokens"].as_u64().unwrap());
    assert!(more["text"]["loss"].as_f64().unwrap() < loss, "seeing more helps");
    let less = json_of(&["eval", "--text", &story, "--json", "--context", "16"]);
    assert!(less["text"]["loss"].as_f64().unwrap() > loss, "seeing less does not");
}

#[test]
fn questions_are_answered_with_accuracies_and_standard_errors() {
    let place = Place::new();
    let questions = place.write(
        "questions.jsonl",
        &[
            json!({"context": "Once upon a time there was a", "choices": ["king", "computer"], "gold": 0}),
            json!({"query": "The old woman said to the", "choices": ["transistor", "fox"], "gold": 1}),
            json!({"context": "Once upon a time there was a", "choices": ["king", "computer"], "gold": 1}),
        ]
        .map(|line| line.to_string())
        .join("\n"),
    );
    let answers = place.path("answers.jsonl");
    let report = json_of(&["eval", "--choices", &questions, "--json", "--answers", &answers]);
    let figures = &report["choices"];
    assert_eq!((&figures["questions"], figures["acc"].as_f64().unwrap()), (&json!(3), 2.0 / 3.0));
    assert!((figures["acc_stderr"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-12);
    let answers = lines(text(&place.read("answers.jsonl")));
    assert_eq!((&answers[1]["gold"], &answers[1]["likeliest"]), (&json!(1), &json!(1)));
    assert_eq!(answers[0]["logprobs"], answers[2]["logprobs"]);
    assert!(stdout(&["eval", "--choices", &questions]).contains("66.67 ± 33.33 %"));
    // Without the space between them, context and choice are other tokens.
    let other =
        json_of(&["eval", "--choices", &questions, "--json", "--delimiter", "", "--answers", &place.path("b.jsonl")]);
    assert_eq!(other["choices"]["questions"], 3);
    assert_ne!(lines(text(&place.read("b.jsonl")))[0]["logprobs"], answers[0]["logprobs"]);
}

#[test]
fn statistics_are_a_table_an_object_and_a_chart() {
    let place = Place::new();
    let story = story(&place);
    let (svg, html) = (place.path("zeros.svg"), place.path("zeros.html"));
    let report = json_of(&["eval", "--stats", "--text", &story, "--json", "--plot", &svg]);
    let layers = report["statistics"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    for layer in layers {
        assert!((0.7..0.9).contains(&layer["gate_not_positive"].as_f64().unwrap()), "{layer}");
        assert!((0.8..0.97).contains(&layer["zero_inputs"][6].as_f64().unwrap()), "{layer}");
        assert!((0.3..0.7).contains(&layer["zero_weights"][0].as_f64().unwrap()), "{layer}");
    }
    let chart = place.read("zeros.svg");
    assert!(text(&chart).starts_with("<svg") && text(&chart).contains("gate ≤ 0"), "{}", text(&chart));
    // Weights need no text.
    let page = stdout(&["eval", "--stats", "--plot", &html]);
    assert!(page.contains("zeros among the weights") && !page.contains("gate ≤ 0"), "{page}");
    let page = place.read("zeros.html");
    assert!(text(&page).starts_with("<!doctype html>") && text(&page).contains("<svg"));
    assert_eq!(place.names(), ["story.txt", "zeros.html", "zeros.svg"]);
}

/// A NumPy file's type, shape and data.
fn numpy(bytes: &[u8]) -> (String, &[u8]) {
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!((10 + length) % 64, 0);
    (text(&bytes[10..10 + length]).trim_end().to_owned(), &bytes[10 + length..])
}

#[test]
fn texts_become_vectors_of_length_one_in_every_form() {
    let place = Place::new();
    let vectors = lines(&stdout(&["embed", "-p", "the king", "-p", "the queen", "-t", "1"]));
    let floats = |line: &Value| -> Vec<f64> { serde_json::from_value(line["embedding"].clone()).unwrap() };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    assert_eq!((vectors.len(), &vectors[1]["index"], floats(&vectors[0]).len()), (2, &json!(1), 256));
    let [king, queen] = [&vectors[0], &vectors[1]].map(floats);
    assert!((dot(&king, &king) - 1.0).abs() < 1e-6);
    assert!(dot(&king, &queen) < 0.999);

    let file = place.write("texts.jsonl", "\"the king\"\n{\"text\": \"the queen\"}\n");
    assert_eq!(lines(&stdout(&["embed", "--file", &file, "--kernel", "tl1", "-t", "2"])), vectors);
    let file = place.write("texts.txt", "the king\nthe queen\n");
    let output = place.path("vectors.npy");
    assert_eq!(stdout(&["embed", "--file", &file, "-o", &output]), "");
    let bytes = place.read("vectors.npy");
    let (header, data) = numpy(&bytes);
    assert_eq!(header, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 256), }");
    let stored: Vec<f32> = data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert!(stored.iter().zip(king.iter().chain(&queen)).all(|(a, b)| *a == *b as f32) && stored.len() == 512);

    let int8 = lines(&stdout(&["embed", "--file", &file, "--quantize", "int8"]));
    let (values, scale) = (floats(&int8[0]), int8[0]["scale"].as_f64().unwrap());
    assert!(values.iter().all(|value| value.abs() <= 127.0 && value.fract() == 0.0));
    assert!(values.iter().zip(&king).all(|(value, x)| (value * scale - x).abs() <= scale * 0.51));
    let output = place.path("bits.npy");
    stdout(&["embed", "--file", &file, "--quantize", "binary", "-o", &output]);
    let bytes = place.read("bits.npy");
    let (header, data) = numpy(&bytes);
    assert_eq!(header, "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 32), }");
    assert!((0..256).all(|i| (data[i / 8] >> (7 - i % 8) & 1 == 1) == (king[i] > 0.0)));
}

#[test]
fn an_embedding_model_embeds_and_does_not_generate() {
    let place = Place::new();
    let source =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/tests/fixtures/families/bitnet-embedding-gemma3");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), place.0.path().join(name)).unwrap();
    }
    place.write("tokenizer.json", &support::small_tokenizer().to_string());
    let config = |add_eos: bool| json!({"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": add_eos}).to_string();
    let model = place.0.path().to_str().unwrap().to_owned();
    let embed = |extra: &[&str]| lines(&stdout(&[&["embed", &model, "-p", "a text"], extra].concat()));
    place.write("tokenizer_config.json", &config(false));
    let plain = embed(&[]);
    assert_eq!(plain[0]["tokens"], 6);
    place.write("tokenizer_config.json", &config(true));
    let ended = embed(&[]);
    assert_eq!(ended[0]["tokens"], 7);
    assert_ne!(plain[0]["embedding"], ended[0]["embedding"]);

    // Where nothing names it, the tokenizer's own post-processor appends it: it need not be the EOS token.
    let mut appending = support::small_tokenizer();
    appending["post_processor"] = json!({
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [], "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    });
    place.write("tokenizer.json", &appending.to_string());
    place.write("tokenizer_config.json", &json!({"bos_token": "<s>", "eos_token": "<s>"}).to_string());
    assert_eq!(embed(&[]), ended);

    // A prepared file embeds alike.
    let prepared = place.path("model.tern");
    stdout(&["prepare", &model, "-o", &prepared]);
    assert_eq!(lines(&stdout(&["embed", &prepared, "-p", "a text"])), ended);

    // A context that is too short cuts the text, not the token that ends it.
    let cut = embed(&["-c", "4", "--truncate"]);
    assert_eq!(cut[0]["tokens"], 4);
    assert_eq!(lines(&stdout(&["embed", &model, "-p", "a t"]))[0]["embedding"], cut[0]["embedding"]);
    refused(&["embed", &model, "-p", "a text", "-c", "4"], 1, &["text 1 has 7 tokens", "--truncate"]);
    refused(&["run", &model, "-p", "a text"], 1, &["embedding model", "ternion embed"]);
    refused(&["eval", &model, "--text", &prepared], 2, &["not UTF-8"]);
    let story = story(&place);
    refused(&["eval", &model, "--text", &story], 1, &["embedding model"]);
}

/// An adapter of the embedded model's layer 0: `B·A` is `size` everywhere in the value projection.
fn adapter(place: &Place, name: &str, size: f32) -> PathBuf {
    let directory = place.0.path().join(name);
    std::fs::create_dir(&directory).unwrap();
    let config = json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "target_modules": ["v_proj"],
    });
    std::fs::write(directory.join("adapter_config.json"), config.to_string()).unwrap();
    let tensor = |part: &str, shape: [usize; 2], value: f32| Tensor {
        name: format!("base_model.model.model.layers.0.self_attn.v_proj.lora_{part}.weight"),
        dtype: "F32",
        shape: shape.to_vec(),
        bytes: (0..shape[0] * shape[1]).flat_map(|_| value.to_le_bytes()).collect(),
    };
    let tensors = [tensor("A", [2, 256], 0.5), tensor("B", [128, 2], size)];
    std::fs::write(directory.join("adapter_model.safetensors"), safetensors(&tensors)).unwrap();
    directory
}

#[test]
fn adapters_change_what_a_model_says_and_embeds() {
    let place = Place::new();
    let [one, other] = [("one", 0.5), ("other", -0.25)].map(|(name, size)| adapter(&place, name, size));
    let (one, other) = (one.to_str().unwrap(), other.to_str().unwrap());
    let run = |loras: &[&str]| {
        let adapters = loras.iter().flat_map(|lora| ["--lora", lora]);
        let arguments: Vec<&str> =
            ["run", "-p", "The old king", "-n", "24", "--temp", "0"].into_iter().chain(adapters).collect();
        stdout(&arguments)
    };
    let (plain, adapted) = (run(&[]), run(&[one]));
    assert_ne!(plain, adapted);
    assert_eq!(run(&[&format!("{one}:0")]), plain);
    // Half of one undoes the other.
    assert_eq!(run(&[&format!("{one}:0.5"), other]), plain);
    assert_eq!(run(&[one, &format!("{other}:0")]), adapted);
    let threads = ["run", "-p", "The old king", "-n", "24", "--temp", "0", "--lora", one, "-t", "3", "--kernel", "tl1"];
    assert_eq!(stdout(&threads), adapted);

    let story = story(&place);
    let loss = |extra: &[&str]| {
        json_of(&[&["eval", "--text", &story, "--json"], extra].concat())["text"]["loss"].as_f64().unwrap()
    };
    assert_ne!(loss(&[]), loss(&["--lora", one]));
    assert_ne!(stdout(&["embed", "-p", "king"]), stdout(&["embed", "-p", "king", "--lora", one]));

    refused(&["run", "-p", "x", "--lora", "/no/such/adapter"], 1, &["/no/such/adapter", "adapter_config.json"]);
    refused(&["run", "-p", "x", "--lora", &format!("{one}:inf")], 2, &["--lora"]);
    let second = Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime/tests/fixtures/lora/second");
    refused(&["run", "-p", "x", "--lora", second.to_str().unwrap()], 1, &["3x64", "another model"]);
}

#[test]
fn mistakes_are_one_line_and_leave_nothing_behind() {
    let place = Place::new();
    let story = story(&place);
    refused(&["eval"], 2, &["--text", "--choices", "--stats"]);
    refused(&["eval", "--text", "/no/such/file"], 1, &["/no/such/file"]);
    refused(&["eval", "--text", &story, "--stride", "300"], 2, &["--stride", "256"]);
    refused(&["eval", "--text", &story, "--context", "1"], 1, &["at least 2"]);
    refused(&["eval", "--text", &story, "--context", "1000"], 1, &["1000", "256"]);
    refused(&["eval", "--stats", "--plot", "zeros.png"], 2, &["--plot", ".svg"]);
    refused(&["eval", "--text", &story, "--logprobs", "/no/such/place/x"], 1, &["/no/such/place/x"]);
    refused(&["eval", "--text", &story, "--logprobs", "/dev/null"], 1, &["/dev/null"]);
    let questions =
        place.write("q.jsonl", "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"gold\": 0}\nnonsense\n");
    refused(&["eval", "--choices", &questions], 1, &["q.jsonl, line 2"]);
    let (empty, logprobs) = (place.write("empty.txt", ""), place.path("out.jsonl"));
    refused(&["eval", "--text", &empty, "--logprobs", &logprobs], 1, &["1 tokens"]);
    refused(&["embed"], 2, &["--prompt"]);
    refused(&["embed", "-p", "x", "--file", &story], 2, &["--file"]);
    refused(&["embed", "-p", "x", "--quantize", "int4"], 2, &["int4"]);
    refused(&["embed", "-p", "x", "-o", "vectors.txt"], 2, &[".npy"]);
    refused(&["embed", "--file", &empty], 1, &["empty"]);
    refused(&["embed", "--file", &questions], 1, &["line 1"]);
    let vectors = place.path("vectors.npy");
    refused(&["embed", "-p", &"word ".repeat(400), "-o", &vectors], 1, &["text 1", "256"]);
    assert_eq!(place.names(), ["empty.txt", "q.jsonl", "story.txt"]);
}
