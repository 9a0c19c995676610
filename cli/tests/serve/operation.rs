//! What an operator sees: health, metrics, reports, the log, the description of the interface.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::channel;

use serde_json::{Value, json};

use crate::client::{Server, faketime, ternion};

const TEXT: &str = "/v1/completions";

#[test]
fn metrics_are_prometheus_text_and_count_what_happened() {
    let server = Server::start(&[]);
    server.post(TEXT, &json!({"prompt": "Once upon a time", "max_tokens": 7, "ignore_eos": true})).ok();
    server.post(TEXT, &json!({})).refused(400, "INVALID_INPUT");
    let reply = server.get("/metrics");
    assert!(reply.headers["content-type"].to_str().is_ok_and(|kind| kind.starts_with("text/plain; version=0.0.4")));
    let mut types = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for line in reply.text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("name and kind");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            types.insert(name.to_owned(), kind.to_owned());
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').expect("series and value");
            value.parse::<f64>().unwrap_or_else(|error| panic!("{error}: {line}"));
            let name = series.split('{').next().expect("a name");
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let family = family.filter(|family| types.contains_key(*family)).unwrap_or(name);
            assert!(types.contains_key(family), "{line} has a type");
            assert!(seen.insert(series.to_owned()), "{line} comes once");
            assert!(!series.contains('{') || series.ends_with('}') && series.contains("=\""), "{line}");
        }
    }
    let expected = [
        ("ternion_requests_total", "counter"),
        ("ternion_request_seconds", "histogram"),
        ("ternion_errors_total", "counter"),
        ("ternion_prompt_tokens_total", "counter"),
        ("ternion_completion_tokens_total", "counter"),
        ("ternion_first_token_seconds", "histogram"),
        ("ternion_token_seconds", "histogram"),
        ("ternion_queue_length", "gauge"),
        ("ternion_queue_seconds", "histogram"),
        ("ternion_batch_texts", "histogram"),
        ("ternion_running_texts", "gauge"),
        ("ternion_kv_bytes", "gauge"),
        ("ternion_response_cache_hits_total", "counter"),
        ("ternion_response_cache_misses_total", "counter"),
        ("process_resident_memory_bytes", "gauge"),
        ("process_cpu_seconds_total", "counter"),
    ];
    for (name, kind) in expected {
        assert_eq!(types.get(name).map(String::as_str), Some(kind), "{name}");
    }
    assert_eq!(server.metric("ternion_completion_tokens_total"), 7.0);
    assert_eq!(server.metric("ternion_first_token_seconds_count"), 1.0);
    assert_eq!(server.metric("ternion_token_seconds_count"), 6.0);
    assert!(reply.text.contains("ternion_errors_total{code=\"INVALID_INPUT\"} 1"), "{}", reply.text);
    assert!(
        reply.text.contains("ternion_requests_total{route=\"/v1/completions\",status=\"200\"} 1"),
        "{}",
        reply.text
    );
}

#[test]
fn reports_say_what_was_done_and_the_panel_what_is_being_done() {
    let server = Server::start(&[]);
    server.post(TEXT, &json!({"prompt": "Once upon a time", "max_tokens": 50, "ignore_eos": true})).ok();
    server.until("it has been counted", |server| {
        server.get("/admin/report.json").ok()["total"]["completion_tokens"] == 50
    });
    let report = server.get("/admin/report.json").ok();
    assert!(report["total"]["requests"].as_u64().is_some_and(|requests| requests >= 1), "{report}");
    assert!(report["baseline_memory_bytes"].as_u64().is_some_and(|bytes| bytes > 1_000_000), "{report}");
    assert!(report["minutes"].is_array() && report["alerts"].is_array(), "{report}");
    let live = server.get("/admin/live.json").ok();
    let model = &live["models"][0];
    assert_eq!(
        (&model["name"], &model["running"], &model["completion_tokens"]),
        (&json!("ternary-tales"), &json!(0), &json!(50))
    );
    let kernels = model["kernels"].as_array().expect("kernels");
    assert!(kernels.iter().all(|kernel| kernel["schedules"].as_array().map(Vec::len) == Some(6)), "{live}");
    let projections: usize = kernels.iter().map(|kernel| kernel["projections"].as_array().map_or(0, Vec::len)).sum();
    assert_eq!(projections, 7, "{live}");
    assert_eq!(server.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    let description = server.get("/openapi.json").ok();
    assert_eq!(description["openapi"], "3.1.0");
    // What is described as a GET without parameters is there.
    for (path, methods) in description["paths"].as_object().expect("paths") {
        if methods.get("get").is_some() && !path.contains('{') {
            assert_eq!(server.get(path).status, 200, "{path}");
        }
    }
}

#[test]
fn the_log_says_who_and_what_and_never_what_was_said() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("log");
    let server = Server::start(&["--log", path.to_str().expect("UTF-8")]);
    server.post(TEXT, &json!({"prompt": "my secret words", "max_tokens": 3})).ok();
    server.post(TEXT, &json!({"prompt": "my secret words", "n": -1})).refused(400, "INVALID_INPUT");
    server.get("/v1/nothing?token=secret").refused(404, "INVALID_INPUT");
    let text = std::fs::read_to_string(&path).expect("a log");
    let entries: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let events: Vec<_> = entries.iter().map(|entry| (entry["event"].as_str(), entry["status"].as_u64())).collect();
    assert_eq!(
        events,
        [(Some("ok"), Some(200)), (Some("INVALID_INPUT"), Some(400)), (Some("INVALID_INPUT"), Some(404))]
    );
    assert!(!text.contains("secret") && !text.contains("127.0.0.1"), "{text}");
    assert!(entries.iter().all(|entry| entry["client"] == entries[0]["client"] && entry["time"].is_number()));
}

#[test]
fn a_full_disk_costs_lines_of_the_log_and_no_answer() {
    let server = Server::start(&["--log", "/dev/full"]);
    for _ in 0..3 {
        server.post(TEXT, &json!({"prompt": "A", "max_tokens": 1})).ok();
    }
    assert!(server.metric("ternion_log_failures_total") >= 3.0);
}

#[test]
fn files_and_settings_that_cannot_be_used_are_named_before_anything_is_loaded() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    };
    let (filter, keys, empty) = (file("filter", "ok\n(\n"), file("keys", "alice 12\n"), file("empty", "# none\n"));
    let tales = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/ternary-tales.tern");
    let cases: [(&[&str], i32, &str); 14] = [
        (&["--filter", &filter], 1, "line 2"),
        (&["--api-key-file", &keys], 1, "line 1"),
        (&["--api-key-file", &empty], 1, "--add-key"),
        (&["--log", "/nowhere/log"], 1, "/nowhere/log"),
        (&["--tls-cert", &keys, "--tls-key", &keys], 1, &keys),
        (&["--model", "/nowhere.tern"], 1, "/nowhere.tern"),
        (&["--model", tales, "--model", tales], 1, "ternary-tales"),
        (&["--context", "100000"], 1, "context"),
        (&["--cors", "example.org"], 2, "--cors"),
        (&["--allow-host", "example.org:80"], 2, "--allow-host"),
        (&["--otlp-endpoint", "localhost:4318"], 2, "--otlp-endpoint"),
        (&["--parallel", "0"], 2, "--parallel"),
        (&["--alert-cpu", "nan"], 2, "--alert-cpu"),
        (&["--seed", "x"], 2, "--seed"),
    ];
    for (arguments, code, word) in cases {
        let output = ternion(&[&["serve", "--port", "0"], arguments].concat()).output().expect("the binary runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(word) && !error.contains("panicked"), "{arguments:?}: {error}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn the_layout_is_chosen_and_said_with_its_reason() {
    let start = |arguments: &[&str]| {
        let mut child = ternion(&[&["serve", "--port", "0", "--no-page"], arguments].concat());
        let mut child = child.stderr(std::process::Stdio::piped()).spawn().expect("the binary runs");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
        let said: Vec<String> = lines.by_ref().take_while(|line| !line.contains("listening on")).collect();
        child.kill().and_then(|()| child.wait()).expect("it ends");
        said.join("\n")
    };
    let phone = start(&["--for", "mobile"]);
    assert!(phone.contains("for mobile: as asked") && phone.contains("parallel 1 ("), "{phone}");
    let server = start(&["--for", "server", "--threads", "1", "--context", "100"]);
    assert!(server.contains("threads 1 (as asked)") && server.contains("context 100 (as asked)"), "{server}");
    assert!(server.contains("parallel 8 ("), "{server}");
    let own = start(&[]);
    assert!(own.contains("free memory") && own.contains("(the model's own)"), "{own}");
}

#[test]
fn what_is_beyond_its_threshold_is_reported() {
    let server = Server::start(&["--alert-latency", "0.000001", "--alert-memory", "0"]);
    server.post(TEXT, &json!({"prompt": "A", "max_tokens": 1})).ok();
    let report = server.get("/admin/report.json").ok();
    let alerts = report["alerts"].as_array().expect("alerts");
    assert!(alerts.iter().any(|alert| alert["what"] == "latency_ms" && alert["threshold"] == 0.000001), "{report}");
    assert!(alerts.iter().all(|alert| alert["what"] != "memory_mb_over_baseline"), "{report}");
}

#[test]
fn an_alert_is_said_and_sent_to_the_webhook() {
    let Some(library) = faketime() else { return };
    let hook = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/alerts", hook.local_addr().expect("an address"));
    let (sender, alerts) = channel();
    std::thread::spawn(move || {
        for stream in hook.incoming().map_while(Result::ok) {
            let mut lines = BufReader::new(&stream).split(b'}').map_while(Result::ok);
            drop(sender.send(String::from_utf8(lines.next().unwrap_or_default()).expect("UTF-8")));
            // Whether the server waits for it is its affair.
            drop((&stream).write_all(b"HTTP/1.1 204 No Content\r\n\r\n"));
        }
    });
    // A minute takes a second, and so all other times are longer.
    let options = ["--alert-latency", "0.000001", "--alert-webhook", &url, "--patience", "60m", "--drain", "60m"];
    let mut command = ternion(&Server::arguments(&options));
    command.env("LD_PRELOAD", library).env("FAKETIME", "+0 x60");
    let server = Server::run(command);
    let sent = Cell::new(String::new());
    server.until("an alert is sent", |server| {
        server.get("/v1/models").ok();
        alerts.try_recv().map(|alert| sent.set(alert)).is_ok()
    });
    let alert = sent.take();
    assert!(alert.starts_with("POST /alerts HTTP/1.1"), "{alert}");
    assert!(alert.contains(r#"{"what":"latency_ms","value":"#) && alert.ends_with(r#""threshold":1e-6"#), "{alert}");
    server.signal("-TERM");
    let (status, said) = server.wait();
    assert!(status.success() && said.contains("alert: latency_ms was "), "{said}");
}

#[test]
fn connections_can_be_encrypted() {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/serve/");
    let (certificate, key) = (format!("{data}localhost.pem"), format!("{data}localhost.key"));
    let server = Server::start(&["--tls-cert", &certificate, "--tls-key", &key]);
    let curl = std::process::Command::new("curl")
        .args(["--silent", "--cacert", &certificate, "--resolve"])
        .arg(format!("localhost:{}:127.0.0.1", server.address.port()))
        .arg(format!("https://localhost:{}/v1/models", server.address.port()))
        .output();
    match curl {
        Ok(output) => {
            let reply: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            assert_eq!(reply["data"][0]["id"], "ternary-tales");
        }
        Err(error) => println!("skipped: no curl ({error})"),
    }
    // Whoever speaks no TLS gets nothing, and hurts nobody.
    let mut stream = std::net::TcpStream::connect(server.address).expect("a connection");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}
