//! What is refused, and what it takes to be let in.

use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{Server, ternion};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A request that takes a while: sixteen texts, one after the other where one runs at a time.
fn long() -> Value {
    json!({"prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": true, "n": 16, "temperature": 1, "stream": true})
}

#[test]
fn fields_out_of_range_are_named_and_nothing_else_happens() {
    let server = Server::start(&[]);
    let with = |name: &str, value: Value| {
        let mut body = json!({"prompt": "A", "max_tokens": 1});
        body[name] = value;
        body
    };
    let huge: Value = serde_json::from_str("123456789012345678901234567890").expect("a number");
    let whole = ["max_tokens", "max_completion_tokens", "n", "top_k", "logprobs", "best_of"];
    for name in whole {
        for value in [json!(-1), json!(1.5), json!("1"), json!(1u64 << 40), json!(i64::MIN), json!([]), huge.clone()] {
            let message = server.post(TEXT, &with(name, value.clone())).refused(400, "INVALID_INPUT");
            assert!(message.starts_with(name), "{name} {value}: {message}");
        }
    }
    for name in ["max_tokens", "n", "logprobs"] {
        server.post(TEXT, &with(name, json!(-1.0))).refused(400, "INVALID_INPUT");
    }
    for name in ["max_tokens", "n"] {
        server.post(TEXT, &with(name, json!(0))).refused(400, "INVALID_INPUT");
    }
    for name in ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"] {
        for value in [json!(-2.01), json!(100.5), json!(1e300), json!("0.5"), json!(true), huge.clone()] {
            let message = server.post(TEXT, &with(name, value.clone())).refused(400, "INVALID_INPUT");
            assert!(message.starts_with(name), "{name} {value}: {message}");
        }
    }
    for (name, value) in [
        ("seed", json!(1.5)),
        ("stream", json!("yes")),
        ("stop", json!([""])),
        ("stop", json!("x".repeat(257))),
        ("stop", json!(vec!["a"; 17])),
        ("prompt", json!([])),
        ("prompt", json!([1, "a"])),
        ("prompt", json!([4_294_967_296u64])),
        ("prompt", json!([-1])),
        ("prompt", json!([99_999_999])),
        ("prompt", json!({"a": 1})),
        ("prompt", Value::Null),
        ("logit_bias", json!({"1": 5})),
        ("tools", json!([{"type": "function"}])),
        ("echo", json!(true)),
        ("model", json!(5)),
        ("stream_options", json!(5)),
        ("stream_options", json!({"include_usage": "yes"})),
    ] {
        let message = server.post(TEXT, &with(name, value.clone())).refused(400, "INVALID_INPUT");
        assert!(message.starts_with(name), "{name} {value}: {message}");
    }
    // Numbers that JSON does not have.
    for number in ["NaN", "Infinity", "-Infinity", "1e999", "0x10", "1."] {
        let body = format!(r#"{{"prompt": "A", "temperature": {number}}}"#);
        server.post_bytes(TEXT, body.as_bytes()).refused(400, "INVALID_INPUT");
    }
    for (name, value) in [
        ("messages", json!([])),
        ("messages", json!("hello")),
        ("messages", json!([{"role": "tool", "content": "a"}])),
        ("messages", json!([{"role": "user"}])),
        ("messages", json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}])),
        ("top_logprobs", json!(3)),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "A"}], "max_tokens": 1});
        body[name] = value.clone();
        let message = server.post(CHAT, &body).refused(400, "INVALID_INPUT");
        assert!(message.starts_with(name), "{name} {value}: {message}");
    }
    assert_eq!(server.metric("ternion_completion_tokens_total"), 0.0);
    assert!(server.metric("ternion_errors_total") > 100.0);
    server.post(TEXT, &with("user", json!("x"))).ok();
    // Languages with one type of number write whole ones so.
    server.post(TEXT, &with("n", json!(1.0))).ok();
}

#[test]
fn bodies_that_are_no_requests_are_told_so() {
    let server = Server::start(&["--max-body", "2"]);
    let nested = format!("{}1{}", "[".repeat(900), "]".repeat(900));
    let bodies: [&[u8]; 7] =
        [b"", b"{", b"[]", b"\"text\"", b"{\"prompt\": \"\xff\xfe\"}", nested.as_bytes(), b"\0\0\0\0"];
    for body in bodies {
        server.post_bytes(TEXT, body).refused(400, "INVALID_INPUT");
    }
    server.post(TEXT, &json!({"prompt": "x".repeat(2000)})).refused(413, "INVALID_INPUT");
    server.get(TEXT).refused(405, "INVALID_INPUT");
    server.get("/v1/nothing").refused(404, "INVALID_INPUT");
    server.get("/v1/models/%ff").refused(404, "INVALID_INPUT");
    server.post("/", &json!({})).refused(404, "INVALID_INPUT");
}

#[test]
fn prompts_and_answers_have_their_limits() {
    let server = Server::start(&["--max-input", "8", "--max-output", "5"]);
    let message = server.post(TEXT, &json!({"prompt": "one two three four five six seven eight nine ten"}));
    assert!(message.refused(400, "INVALID_INPUT").contains("at most 8"));
    assert!(server.post(TEXT, &json!({"prompt": "A", "max_tokens": 6})).refused(400, "INVALID_INPUT").contains("to 5"));
    let reply = server.post(TEXT, &json!({"prompt": "A", "ignore_eos": true})).ok();
    assert_eq!(reply["usage"]["completion_tokens"], 5);
}

#[test]
fn a_client_may_ask_so_often_and_is_told_when_to_come_back() {
    let server = Server::start(&["--rate-limit", "3"]);
    for _ in 0..3 {
        server.get("/v1/models").ok();
    }
    let refused = server.get("/v1/models");
    refused.refused(429, "RATE_LIMIT_EXCEEDED");
    let wait: u64 = refused.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!((1..=21).contains(&wait), "{wait}");
    // Whoever looks after the server is not counted.
    for path in ["/health", "/health/live", "/version", "/metrics", "/admin/report.json", "/openapi.json"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}

#[test]
fn where_there_are_keys_only_they_open() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("keys");
    let file = file.to_str().expect("UTF-8");
    let add = |arguments: &[&str]| {
        let output = ternion(&[&["serve", "--api-key-file", file, "--add-key"], arguments].concat()).output();
        let output = output.expect("the binary runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    };
    let (user, admin) = (add(&["alice"]), add(&["root", "--admin"]));
    let kept = std::fs::read_to_string(file).expect("a file");
    assert!(!kept.contains(&user[3..]) && !kept.contains(&admin[3..]), "only digests are kept");
    let twice = ternion(&["serve", "--api-key-file", file, "--add-key", "alice"]).output().expect("the binary runs");
    assert!(!twice.status.success());

    let mut server = Server::start(&["--api-key-file", file, "--rate-limit", "20"]);
    server.get("/health").ok();
    let last = if user.ends_with('0') { '1' } else { '0' };
    let wrong = format!("{}{last}", &user[..user.len() - 1]);
    for key in [None, Some(""), Some("tn-"), Some(wrong.as_str())] {
        server.with_key(key);
        server.get("/v1/models").refused(401, "INVALID_API_KEY");
        server.get("/metrics").refused(401, "INVALID_API_KEY");
    }
    server.with_key(Some(&user));
    server.post(TEXT, &json!({"prompt": "A", "max_tokens": 1})).ok();
    server.get("/admin/report.json").refused(403, "FORBIDDEN");
    // The name of the scheme may be written in any way (RFC 9110, 11.1).
    server.with_key(None);
    server.get_with("/v1/models", &[("authorization", &format!("bearer {user}"))]).ok();
    server.get_with("/v1/models", &[("authorization", &format!("Basic {user}"))]).refused(401, "INVALID_API_KEY");
    server.with_key(Some(&admin));
    server.get("/admin/report.json").ok();
    server.get("/admin/live.json").ok();
    // Keys are guessed in vain, and not for long.
    server.with_key(Some("tn-guess"));
    let codes: Vec<u16> = (0..30).map(|_| server.get("/v1/models").status).collect();
    assert!(codes.contains(&429), "{codes:?}");
    server.with_key(Some(&user));
    server.get("/v1/models").ok();
}

#[test]
fn the_filter_refuses_requests_and_cuts_answers_off() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("filter");
    std::fs::write(&file, "# words\n(?i)forbidden +word\n").expect("a file");
    let plain = Server::start(&[]);
    let whole = plain.post(TEXT, &json!({"prompt": "Once upon a time", "max_tokens": 40})).ok();
    let whole = whole["choices"][0]["text"].as_str().expect("a text").to_owned();
    let word = whole.split_whitespace().nth(6).expect("words").to_owned();
    std::fs::write(&file, format!("(?i)forbidden +word\n{}\n", regex_literal(&word))).expect("a file");
    let server = Server::start(&["--filter", file.to_str().expect("UTF-8")]);
    for content in ["a FORBIDDEN word", "a for\u{0}bidden word"] {
        let body = json!({"messages": [{"role": "user", "content": content}]});
        server.post(CHAT, &body).refused(400, "CONTENT_FILTERED");
        server.post(TEXT, &json!({"prompt": content})).refused(400, "CONTENT_FILTERED");
        server.post("/v1/embeddings", &json!({"input": content})).refused(400, "CONTENT_FILTERED");
    }
    let cut = server.post(TEXT, &json!({"prompt": "Once upon a time", "max_tokens": 40})).ok();
    assert_eq!(cut["choices"][0]["finish_reason"], "content_filter");
    assert_eq!(cut["choices"][0]["text"], whole[..whole.find(&word).expect("it is there")]);
}

/// A pattern that matches this word and nothing else.
fn regex_literal(word: &str) -> String {
    word.chars()
        .map(|char| if char.is_alphanumeric() { char.to_string() } else { format!("\\x{{{:x}}}", char as u32) })
        .collect()
}

#[test]
fn when_the_queue_is_full_others_are_told_to_come_back() {
    let server = Server::start(&["--parallel", "1", "--queue", "16"]);
    let mut running = server.open(TEXT, &long());
    running.next().expect("it has begun");
    let refused = server.post(TEXT, &json!({"prompt": "A", "max_tokens": 1, "n": 16}));
    refused.refused(503, "OVERLOADED");
    assert!(refused.headers.contains_key("retry-after"));
    // A request that was refused has left nothing in the queue, so there is still room for one.
    let one = std::thread::spawn(server.open_later(TEXT, json!({"prompt": "A", "max_tokens": 1})));
    server.until("it waits, or has been answered", |server| server.metric("ternion_prompt_tokens_total") > 0.0);
    drop(running);
    assert!(one.join().expect("an answer").concat().contains("text_completion"));
}

#[test]
fn what_takes_too_long_ends_with_an_error_that_says_so() {
    let server = Server::start(&["--parallel", "1", "--request-time", "150ms"]);
    let mut body = long();
    let events = server.stream(TEXT, &body);
    assert_eq!(events.last().expect("an event")["error"]["code"], "TIMEOUT");
    body["stream"] = json!(false);
    server.post(TEXT, &body).refused(504, "TIMEOUT");
    assert_eq!(server.metric("ternion_errors_total"), 2.0);
    server.until("nothing runs", |server| server.metric("ternion_running_texts") == 0.0);
}

#[test]
fn slow_and_senseless_clients_are_given_up_and_others_do_not_notice() {
    let server = Server::start(&["--patience", "400ms", "--body-time", "400ms", "--connections", "4"]);
    let pause = Duration::from_millis(100);
    let drops: Vec<&[u8]> = vec![b"x"; 30];
    std::thread::scope(|scope| {
        // A head that comes byte by byte, and a body that does.
        let head = scope.spawn(|| server.raw(&drops, pause));
        let body = scope.spawn(|| {
            let start = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n";
            server.raw(&[&[&start[..]], &drops[..]].concat(), pause)
        });
        // Somebody who says nothing at all.
        let silent = scope.spawn(|| server.raw(&[], pause));
        server.get("/v1/models").ok();
        let head = head.join().expect("closed");
        assert!(head.is_empty() || head.starts_with("HTTP/1.1 4"), "{head}");
        let body = body.join().expect("closed");
        assert!(body.starts_with("HTTP/1.1 408") && body.contains("TIMEOUT"), "{body}");
        silent.join().expect("closed");
    });
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%ff%fe/../..//etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    ] {
        let answer = server.raw(&[garbage], Duration::from_millis(10));
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    let header = format!("GET / HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    let answer = server.raw(&[header.as_bytes()], Duration::from_millis(10));
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    server.get("/v1/models").ok();
    server.until("all are gone", |server| server.metric("ternion_connections") <= 1.0);
}

#[test]
fn pages_of_other_origins_may_ask_only_if_they_are_let() {
    let closed = Server::start(&[]);
    for site in ["cross-site", "same-site"] {
        closed.get_with("/v1/models", &[("sec-fetch-site", site)]).refused(403, "FORBIDDEN");
    }
    // A browser that does not mark its requests names the page's origin.
    for origin in ["https://example.org", "http://127.0.0.1:1", "null"] {
        closed.get_with("/v1/models", &[("origin", origin)]).refused(403, "FORBIDDEN");
    }
    closed.get_with("/v1/models", &[("origin", &closed.url(""))]).ok();
    let own = closed.get_with("/v1/models", &[("sec-fetch-site", "same-origin")]);
    own.ok();
    assert!(!own.headers.contains_key("access-control-allow-origin"));
    // A page whose name has come to mean this machine is of the same origin.
    let port = closed.address.port();
    let rebound = [("host", format!("evil.example:{port}")), ("origin", format!("http://evil.example:{port}"))];
    let rebound = rebound.each_ref().map(|(name, value)| (*name, value.as_str()));
    let rebound = [&rebound[..], &[("sec-fetch-site", "same-origin")]].concat();
    for path in ["/v1/models", "/metrics", "/admin/report.json"] {
        let message = closed.get_with(path, &rebound).refused(403, "FORBIDDEN");
        assert!(message.contains("--allow-host"), "{message}");
    }
    closed.get_with("/v1/models", &[("host", &format!("localhost:{port}"))]).ok();
    let named = Server::start(&["--allow-host", "evil.example", "--allow-host", "other.example"]);
    named.get_with("/v1/models", &[("host", "Evil.Example"), ("sec-fetch-site", "same-origin")]).ok();
    named.get_with("/v1/models", &[("host", "third.example")]).refused(403, "FORBIDDEN");
    let open = Server::start(&["--cors", "https://example.org"]);
    let from = |origin| [("sec-fetch-site", "cross-site"), ("origin", origin)];
    let reply = open.get_with("/v1/models", &from("https://example.org"));
    reply.ok();
    assert_eq!(reply.headers["access-control-allow-origin"], "https://example.org");
    // It is one origin that is let, and neither others nor pages that do not say theirs.
    open.get_with("/v1/models", &from("https://example.com")).refused(403, "FORBIDDEN");
    open.get_with("/v1/models", &from("https://example.org")[..1]).refused(403, "FORBIDDEN");
    Server::start(&["--cors", "*"]).get_with("/v1/models", &from("https://example.com")).ok();
    let asked = open.raw(
        &[b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"],
        Duration::ZERO,
    );
    // Whatever headers a client sends besides: that of a key is not among the star's.
    assert!(asked.starts_with("HTTP/1.1 204") && asked.contains("allow-headers: authorization, *"), "{asked}");
    assert!(asked.contains("expose-headers: retry-after"), "{asked}");
}
