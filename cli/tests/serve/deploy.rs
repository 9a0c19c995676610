//! What lies in `deploy/` fits the program: it can be read, and names only options, routes and metrics that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::client::{Server, ternion};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy")
}

/// Every file of `deploy/`, with its text.
fn files() -> Vec<(PathBuf, String)> {
    let (mut files, mut directories) = (Vec::new(), vec![deploy()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else if let Ok(text) = fs::read_to_string(&path) {
                files.push((path, text));
            }
        }
    }
    files
}

fn has_extension(path: &Path, any: &[&str]) -> bool {
    path.extension().is_some_and(|extension| any.iter().any(|one| extension == *one))
}

/// Words of PromQL that may be names of metrics or of recorded sums.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split(|char: char| !char.is_ascii_alphanumeric() && char != '_' && char != ':')
        .filter(|word| word.starts_with("ternion_") || word.starts_with("process_") || word.contains(":ternion_"))
}

/// Strings anywhere in a value, with the key that they stand under.
fn strings<'a>(value: &'a Value, key: &'a str, found: &mut Vec<(&'a str, &'a str)>) {
    match value {
        Value::String(text) => found.push((key, text)),
        Value::Array(items) => items.iter().for_each(|item| strings(item, key, found)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| strings(value, key, found)),
        _ => {}
    }
}

fn yaml(path: &Path, text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_file_can_be_read() {
    let (mut yamls, mut jsons) = (0, 0);
    for (path, text) in files() {
        if has_extension(&path, &["yaml", "yml"]) {
            let documents = yaml(&path, &text);
            assert!(documents.iter().all(Value::is_object), "{}: expected objects", path.display());
            yamls += 1;
        } else if has_extension(&path, &["json"]) {
            serde_json::from_str::<Value>(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            jsons += 1;
        }
    }
    assert!(yamls >= 10 && jsons >= 1, "{yamls} YAML and {jsons} JSON files");
    let listed = yaml(&deploy(), &fs::read_to_string(deploy().join("kubernetes/kustomization.yaml")).expect("a file"));
    for resource in listed[0]["resources"].as_array().expect("a list") {
        let path = deploy().join("kubernetes").join(resource.as_str().expect("a name"));
        assert!(path.is_file(), "{} is not there", path.display());
    }
}

/// Every `serve` with options, as an argument list.
#[test]
fn every_command_line_is_accepted() {
    let mut commands = 0;
    for (path, text) in files() {
        for line in text.lines() {
            let words: Vec<&str> = line
                .split(|char: char| char.is_whitespace() || "\"'`,[]".contains(char))
                .filter(|word| !word.is_empty())
                .collect();
            let Some(serve) = words.iter().position(|word| *word == "serve") else { continue };
            let options = &words[serve + 1..];
            if !options.first().is_some_and(|first| first.starts_with("--")) {
                continue;
            }
            // Up to what a program puts there itself.
            let known = options.iter().take_while(|word| !word.contains("str(") && !word.starts_with('*'));
            let mut known: Vec<&str> = known.copied().collect();
            if known.last() == Some(&"--port") {
                known.push("8080");
            }
            // Arguments are read in order, so what is wrong comes before the help.
            let output = ternion(&["serve"]).args(&known).arg("--help").output();
            let output = output.expect("the program");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: serve {}: {stderr}", path.display(), known.join(" "));
            commands += 1;
        }
    }
    assert!(commands >= 5, "{commands} command lines");
}

#[test]
fn every_metric_and_probe_is_there() {
    let server = Server::start(&[]);
    // What is counted by label appears with the first of its kind.
    server.post("/v1/completions", &json!({"prompt": "Once", "max_tokens": 2})).ok();
    server.post("/v1/completions", &json!({})).refused(400, "INVALID_INPUT");
    let text = server.get("/metrics").text;
    let mut known = BTreeSet::new();
    for line in text.lines() {
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) else { continue };
        known.insert(name.to_owned());
        if kind == "histogram" {
            known.extend(["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")));
        }
    }
    assert!(known.len() > 40, "{known:?}");

    let (mut used, mut probes) = (BTreeSet::new(), BTreeSet::new());
    let mut recorded = BTreeSet::new();
    for (path, text) in files() {
        let values = match () {
            () if has_extension(&path, &["yaml", "yml"]) => yaml(&path, &text),
            () if has_extension(&path, &["json"]) => vec![serde_json::from_str(&text).expect("JSON")],
            () => Vec::new(),
        };
        for value in &values {
            let mut found = Vec::new();
            strings(value, "", &mut found);
            for (key, text) in found {
                let told = || (path.display().to_string(), text.to_owned());
                match key {
                    "record" => drop(recorded.insert(text.to_owned())),
                    "expr" | "query" | "definition" | "series" | "seriesQuery" | "metricsQuery" | "as" | "name" => {
                        used.extend(names(text).map(|name| (name.to_owned(), told())));
                    }
                    "path" if text.starts_with("/health") || text == "/metrics" => drop(probes.insert(text.to_owned())),
                    "prometheus.io/path" => drop(probes.insert(text.to_owned())),
                    _ => {}
                }
            }
        }
        // The proxies and the image have their own formats.
        if values.is_empty() {
            let words = text.split(|char: char| char.is_whitespace() || "'\"".contains(char));
            probes.extend(words.filter(|word| word.starts_with("/health/")).map(str::to_owned));
        }
    }
    let (mut metrics, mut sums) = (0, 0);
    for (name, told) in used {
        if name.contains(':') {
            assert!(recorded.contains(&name), "{name} is recorded by no rule: {told:?}");
            sums += 1;
        } else {
            assert!(known.contains(&name), "the server has no metric {name}: {told:?}");
            metrics += 1;
        }
    }
    assert!(metrics > 40 && sums >= 3, "{metrics} metrics and {sums} sums are used");
    assert!(probes.len() >= 3, "{probes:?}");
    for path in probes {
        assert_eq!(server.get(&path).status, 200, "{path}");
    }
}

#[test]
fn prometheus_accepts_its_files() {
    let directory = deploy().join("prometheus");
    let checks =
        [["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]];
    for check in checks {
        match Command::new("promtool").args(check).current_dir(&directory).output() {
            Ok(output) => {
                let told =
                    [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
                assert!(output.status.success(), "promtool {}: {told}", check.join(" "));
            }
            Err(_) => return eprintln!("skipped: there is no promtool (Debian: apt-get install prometheus)"),
        }
    }
}
