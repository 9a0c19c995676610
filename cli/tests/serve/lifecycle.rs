//! Clients that leave, servers that are stopped or killed, many connections: everything that was accepted ends in an
//! answer or an error, and nothing is left behind.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Server, faketime, ternion};

const TEXT: &str = "/v1/completions";

/// A request that takes a while: sixteen texts, one after the other where one runs at a time.
fn long() -> Value {
    json!({"prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": true, "n": 16, "temperature": 1, "stream": true})
}

#[test]
fn a_client_that_leaves_makes_room_at_once() {
    let server = Server::start(&["--parallel", "1", "--response-cache", "0"]);
    for _ in 0..3 {
        let mut stream = server.open(TEXT, &long());
        stream.next().expect("it has begun");
        drop(stream);
        server.post(TEXT, &json!({"prompt": "A", "max_tokens": 1})).ok();
    }
    server.until("all have been noticed", |server| {
        server.metric("ternion_running_texts") + server.metric("ternion_queue_length") == 0.0
    });
    assert!(server.metric("ternion_cancelled_total") >= 3.0);
    let tokens = server.metric("ternion_completion_tokens_total");
    assert!(tokens < 3.0 * 16.0 * 480.0, "they were not generated to the end: {tokens}");
    // One that leaves while it waits.
    let mut running = server.open(TEXT, &long());
    running.next().expect("it has begun");
    let before = server.metric("ternion_cancelled_total");
    let stream = TcpStream::connect(server.address).expect("a connection");
    let body = json!({"prompt": "B", "max_tokens": 1}).to_string();
    let head = format!("POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    std::io::Write::write_all(&mut &stream, format!("{head}{body}").as_bytes()).expect("sent");
    server.until("it has come", |server| server.metric("ternion_connections") >= 3.0);
    std::thread::sleep(Duration::from_millis(100));
    drop(stream);
    server.until("it has been noticed", |server| server.metric("ternion_cancelled_total") == before + 1.0);
    drop(running);
}

#[test]
fn a_server_that_is_told_to_stop_answers_what_it_has_accepted() {
    let server = Server::start(&["--parallel", "2", "--drain-delay", "3s", "--drain", "10m"]);
    let streams: Vec<_> = (0..6)
        .map(|at| {
            let prompt = format!("Story number {at}");
            let body = json!({"prompt": prompt, "max_tokens": 40, "n": 8, "temperature": 1, "stream": true, "ignore_eos": true});
            std::thread::spawn(server.open_later(TEXT, body))
        })
        .collect();
    // The last of them have begun, and are not done.
    let begun = "ternion_requests_total{route=\"/v1/completions\",status=\"200\"} 6";
    server.until("all have begun", |server| server.get("/metrics").text.contains(begun));
    server.signal("-TERM");
    // Load balancers hear of it while requests are still taken.
    server.until("it says so", |server| server.get("/health/ready").status == 503);
    assert_eq!(server.get("/health/live").status, 200);
    let address = server.address;
    for stream in streams {
        let events = stream.join().expect("a stream");
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
        assert!(events.iter().all(|event| !event.contains("\"error\"")), "{events:?}");
    }
    let (status, said) = server.wait();
    assert!(status.success() && said.contains("all requests were answered"), "{status} {said}");
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
}

#[test]
fn what_a_stopping_server_cannot_wait_for_is_told_so() {
    let server = Server::start(&["--parallel", "1", "--drain", "50ms"]);
    let mut running = server.open(TEXT, &long());
    running.next().expect("it has begun");
    let waiting =
        std::thread::spawn(server.open_later(TEXT, json!({"prompt": "A", "max_tokens": 400, "ignore_eos": true})));
    server.until("one more is there", |server| server.metric("ternion_connections") >= 3.0);
    std::thread::sleep(Duration::from_millis(100));
    server.signal("-TERM");
    let events: Vec<String> = running.collect();
    assert!(events.iter().any(|event| event.contains("OVERLOADED")), "{:?}", events.last());
    assert!(waiting.join().expect("an answer").concat().contains("OVERLOADED"));
    let (status, said) = server.wait();
    assert_eq!(status.code(), Some(1), "{said}");
}

#[test]
fn after_a_kill_the_next_server_has_the_port_at_once() {
    let server = Server::start(&[]);
    let mut stream = server.open(TEXT, &long());
    stream.next().expect("it has begun");
    let port = server.address.port().to_string();
    server.signal("-KILL");
    assert!(!server.wait().0.success());
    drop(stream);
    let again = Server::of(&["serve", "--port", &port, "--no-page"]);
    again.post(TEXT, &json!({"prompt": "A", "max_tokens": 1})).ok();
    // The port is taken now, which is said before a model is loaded.
    let taken = ternion(&["serve", "--port", &port]).output().expect("the binary runs");
    let error = String::from_utf8_lossy(&taken.stderr).into_owned();
    assert!(taken.status.code() == Some(1) && error.contains("cannot listen") && error.lines().count() == 1, "{error}");
}

#[test]
fn many_connections_and_many_requests_leave_nothing_behind() {
    let server =
        Server::start(&["--connections", "1100", "--parallel", "8", "--response-cache", "0", "--prefix-cache", "0"]);
    let idle: Vec<TcpStream> = (0..1000).map(|_| TcpStream::connect(server.address).expect("a connection")).collect();
    server.until("all are there", |server| server.metric("ternion_connections") >= 1000.0);
    let burst = |requests: usize| {
        std::thread::scope(|scope| {
            for client in 0..8 {
                let server = &server;
                scope.spawn(move || {
                    for request in 0..requests / 8 {
                        let body = json!({"prompt": format!("{client} {request}"), "max_tokens": 1});
                        server.post(TEXT, &body).ok();
                    }
                });
            }
        });
        resident(server.id())
    };
    let before = burst(400);
    drop(idle);
    let after = burst(800);
    server.until("connections are closed", |server| server.metric("ternion_connections") <= 9.0);
    assert!(after < before + 16_000_000, "memory grew from {before} to {after}");
    for gauge in ["ternion_running_texts", "ternion_queue_length", "ternion_kv_bytes"] {
        server.until(gauge, |server| server.metric(gauge) == 0.0);
    }
    assert_eq!(server.metric("ternion_failed_passes_total"), 0.0);
}

#[test]
fn a_clock_that_jumps_changes_the_time_of_day_and_nothing_else() {
    let Some(library) = faketime() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let (file, log) = (directory.path().join("offset"), directory.path().join("log"));
    let jump = |offset: &str| std::fs::write(&file, offset).expect("a file");
    jump("+0");
    let log_argument = log.to_str().expect("UTF-8");
    let options = ["--parallel", "1", "--request-time", "10m", "--response-cache", "0", "--log", log_argument];
    let mut command = ternion(&Server::arguments(&options));
    command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", &file);
    command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let server = Server::run(command);
    let mut running = server.open(TEXT, &long());
    running.next().expect("it has begun");
    let year = 365.0 * 86_400.0;
    let start = server.metric("process_start_time_seconds");
    for (offset, years) in [("-3650d", -10.0), ("+3650d", 10.0), ("-20000d", -54.8)] {
        jump(offset);
        // The log tells the time of day, which shows that the clock has jumped.
        let is_there = |server: &Server| {
            server.get("/v1/models").ok();
            let log = std::fs::read_to_string(&log).expect("a log");
            let last: Value = serde_json::from_str(log.lines().last().expect("a line")).expect("JSON");
            let jumped = last["time"].as_f64().expect("a time") - start;
            (jumped / year - years).abs() < 1.0
        };
        server.until("the clock has jumped", is_there);
        // So does the date of an answer, forwards and back.
        let date = server.get("/health/ready").headers["date"].to_str().expect("a date").to_owned();
        let told: f64 = date.split(' ').nth(3).and_then(|year| year.parse().ok()).expect("a year");
        assert!((told - 1970.0 - start / year - years).abs() < 2.0, "{date}");
        // Deadlines, rates and health know nothing of it.
        server.get("/health/ready").ok();
        server.get("/admin/report.json").ok();
    }
    let events: Vec<String> = running.collect();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert!(events.iter().all(|event| !event.contains("\"error\"")), "{events:?}");
    server.post(TEXT, &json!({"prompt": "A", "max_tokens": 1})).ok();
    assert!(server.metric("process_cpu_seconds_total") < 3600.0);
    server.signal("-TERM");
    let (status, said) = server.wait();
    assert!(status.success() && !said.contains("panicked"), "{said}");
}

/// Bytes of memory of a process.
fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn long_prompts_do_not_hold_up_running_texts() {
    let server = Server::start(&["--parallel", "4", "--chunk", "8", "--prefix-cache", "0", "--response-cache", "0"]);
    let text = json!({"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": true, "stream": true});
    let running = server.open(TEXT, &text);
    let begun = Instant::now();
    let prompt = "a b c d e f g h ".repeat(20);
    server.post(TEXT, &json!({"prompt": prompt, "max_tokens": 1})).ok();
    // The prompt took many passes, and the running text had a token in each.
    assert_eq!(running.last().as_deref(), Some("[DONE]"), "{:?}", begun.elapsed());
    let passes = server.metric("ternion_pass_seconds_count");
    let most = server.metric("ternion_batch_tokens_sum");
    assert!(passes >= 200.0 && most > passes, "{most} tokens in {passes} passes");
}
