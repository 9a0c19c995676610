//! Traces, as a collector receives them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::json;

use crate::client::Server;

const TEXT: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// A collector that keeps what it is sent.
struct Collector {
    address: SocketAddr,
    bodies: Receiver<Vec<u8>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (sender, bodies) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let sender = sender.clone();
                std::thread::spawn(move || collect(&stream, &sender));
            }
        });
        Self { address, bodies }
    }

    fn endpoint(&self) -> String {
        format!("http://{}/", self.address)
    }
}

/// Takes requests until the connection ends. A request counts as received before it is answered.
fn collect(stream: &TcpStream, bodies: &Sender<Vec<u8>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut head, mut length) = (Vec::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).map_or(true, |read| read == 0) {
                return;
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
            if line.is_empty() {
                break;
            }
            head.push(line);
        }
        assert_eq!(head[0], "post /v1/traces http/1.1");
        assert!(head.contains(&"content-type: application/x-protobuf".to_owned()), "{head:?}");
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("a body");
        bodies.send(body).expect("the test listens");
        let mut writer = stream;
        writer.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").expect("an answer");
    }
}

fn value<'a>(attributes: &'a [KeyValue], name: &str) -> Option<&'a Any> {
    let found = attributes.iter().find(|attribute| attribute.key == name)?;
    found.value.as_ref()?.value.as_ref()
}

#[track_caller]
fn number(span: &Span, name: &str) -> i64 {
    match value(&span.attributes, name) {
        Some(Any::IntValue(number)) => *number,
        other => panic!("{name} of {}: {other:?}", span.name),
    }
}

#[track_caller]
fn word<'a>(attributes: &'a [KeyValue], name: &str) -> &'a str {
    match value(attributes, name) {
        Some(Any::StringValue(word)) => word,
        Some(Any::ArrayValue(words)) => match &words.values[0].value {
            Some(Any::StringValue(word)) => word,
            other => panic!("{name}: {other:?}"),
        },
        other => panic!("{name}: {other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_request_is_traced_from_the_door_to_the_last_token_and_nothing_that_was_said_is_in_it() {
    let collector = Collector::start();
    let server = Server::start(&["--otlp-endpoint", &collector.endpoint(), "--parallel", "4", "--response-cache", "8"]);
    let (trace, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let secret = "Zanzibar pineapple";
    let body = json!({"prompt": secret, "max_tokens": 7, "ignore_eos": true, "n": 2, "temperature": 1, "stream": true});
    let traced = |flags: &str| format!("00-{trace}-{parent}-{flags}");
    assert_eq!(server.post_with(TEXT, &body, &[("traceparent", &traced("01"))]).status, 200);
    // Whoever asks for no trace gets none.
    assert_eq!(server.post_with(TEXT, &body, &[("traceparent", &traced("00"))]).status, 200);
    server.post(CHAT, &json!({"messages": [{"role": "user", "content": secret}], "max_tokens": 3})).ok();
    server.post(TEXT, &json!({"prompt": secret, "n": -1})).refused(400, "INVALID_INPUT");
    server.post("/v1/embeddings", &json!({"input": secret})).ok();
    // The answer is known.
    assert_eq!(server.post(TEXT, &body).status, 200);
    // Nobody wants to see these.
    server.get("/health").ok();
    server.metric("ternion_connections");
    server.signal("-TERM");
    assert!(server.wait().0.success());

    let bodies: Vec<Vec<u8>> = collector.bodies.try_iter().collect();
    let contains = |what: &str| bodies.iter().any(|body| body.windows(what.len()).any(|part| part == what.as_bytes()));
    assert!(contains("ternary-tales") && !contains("Zanzibar") && !contains("pineapple"));
    let batches: Vec<_> =
        bodies.iter().map(|body| ExportTraceServiceRequest::decode(&body[..]).expect("OTLP")).collect();
    let resources = || batches.iter().flat_map(|batch| &batch.resource_spans);
    for resource in resources() {
        let attributes = &resource.resource.as_ref().expect("a resource").attributes;
        assert_eq!(word(attributes, "service.name"), "ternion");
        assert_eq!(word(attributes, "service.version"), env!("CARGO_PKG_VERSION"));
    }
    let spans: Vec<&Span> = resources().flat_map(|one| &one.scope_spans).flat_map(|one| &one.spans).collect();
    let roots: Vec<&&Span> = spans.iter().filter(|span| span.name.starts_with("POST ")).collect();
    let names: Vec<&str> = roots.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(roots.len(), 5, "{names:?}");
    let root = |name: &str, is: &dyn Fn(&Span) -> bool| {
        let mut found = roots.iter().filter(|span| span.name == name && is(span));
        let root = **found.next().expect("a request");
        assert!(found.next().is_none(), "one {name}");
        root
    };
    let children = |root: &Span| -> Vec<&Span> {
        spans.iter().filter(|span| span.parent_span_id == root.span_id).copied().collect()
    };

    // The one that was on a trace already.
    let stream = root("POST /v1/completions", &|span| hex(&span.trace_id) == trace);
    assert_eq!(hex(&stream.parent_span_id), parent);
    assert_eq!(number(stream, "http.response.status_code"), 200);
    assert_eq!(word(&stream.attributes, "http.route"), TEXT);
    assert_eq!(word(&stream.attributes, "gen_ai.request.model"), "ternary-tales");
    let parts = children(stream);
    assert_eq!(parts.len(), 6, "{parts:?}");
    for text in 0..2 {
        let parts: Vec<&&Span> = parts.iter().filter(|span| number(span, "ternion.text") == text).collect();
        let names: Vec<&str> = parts.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, ["queue", "prefill", "decode"]);
        assert!(number(parts[1], "gen_ai.usage.input_tokens") > 1);
        assert_eq!(number(parts[2], "gen_ai.usage.output_tokens"), 7);
        assert_eq!(word(&parts[2].attributes, "gen_ai.response.finish_reasons"), "length");
        for (part, next) in parts.iter().zip(&parts[1..]) {
            assert_eq!(part.end_time_unix_nano, next.start_time_unix_nano, "one after the other");
        }
        assert!(parts.iter().all(|part| part.trace_id == stream.trace_id));
        assert!(parts.iter().all(|part| part.start_time_unix_nano <= part.end_time_unix_nano));
    }

    let chat = root("POST /v1/chat/completions", &|_| true);
    assert!(chat.parent_span_id.is_empty() && hex(&chat.trace_id) != trace);
    assert_eq!(children(chat).len(), 3);
    let refused = root("POST /v1/completions", &|span| number(span, "http.response.status_code") == 400);
    assert_eq!(word(&refused.attributes, "error.type"), "INVALID_INPUT");
    assert!(children(refused).is_empty());
    let embedded = root("POST /v1/embeddings", &|_| true);
    let names: Vec<&str> = children(embedded).iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["queue", "prefill"]);
    let known = root("POST /v1/completions", &|span| value(&span.attributes, "ternion.response_cached").is_some());
    assert!(children(known).is_empty());
}

#[test]
fn what_fails_and_who_leaves_is_said() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    let server =
        Server::start(&["--otlp-endpoint", &endpoint, "--parallel", "1", "--drain", "50ms", "--response-cache", "0"]);
    let long = json!({"prompt": "A", "max_tokens": 480, "ignore_eos": true, "n": 16, "temperature": 1, "stream": true});
    let mut left = server.open(TEXT, &long);
    left.next().expect("it has begun");
    drop(left);
    server.until("it has been noticed", |server| server.metric("ternion_cancelled_total") == 16.0);
    let mut broken = server.open(TEXT, &long);
    broken.next().expect("it has begun");
    server.signal("-TERM");
    assert!(broken.any(|event| event.contains("OVERLOADED")));
    let (_, said) = server.wait();
    let batches = collector.bodies.try_iter().map(|body| ExportTraceServiceRequest::decode(&body[..]).expect("OTLP"));
    let spans: Vec<Span> = batches
        .flat_map(|batch| batch.resource_spans)
        .flat_map(|one| one.scope_spans)
        .flat_map(|one| one.spans)
        .collect();
    let mut roots: Vec<&Span> = spans.iter().filter(|span| span.name == "POST /v1/completions").collect();
    roots.sort_by_key(|span| span.start_time_unix_nano);
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(roots.len(), 2, "{names:?} {said}");
    let ends = |root: &Span, cause: &str| {
        let is =
            |span: &&Span| matches!(value(&span.attributes, "error.type"), Some(Any::StringValue(it)) if it == cause);
        let children = spans.iter().filter(|span| span.parent_span_id == root.span_id);
        children.filter(is).map(|span| span.name.as_str()).collect::<Vec<_>>()
    };
    let cancelled = ends(roots[0], "cancelled");
    assert!(cancelled.len() == 16 && cancelled.contains(&"decode") && cancelled.contains(&"queue"), "{cancelled:?}");
    // The first text that fails ends the answer: the others are cancelled with it, if they have not failed yet.
    assert!(ends(roots[1], "draining").contains(&"decode"));
    assert_eq!(ends(roots[1], "draining").len() + ends(roots[1], "cancelled").len(), 16);
    assert_eq!(word(&roots[1].attributes, "error.type"), "draining");
}

#[test]
fn a_collector_that_is_away_costs_one_warning_and_no_answer() {
    // A port that nobody listens at: it was free a moment ago, and stays bound without being listened at.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let server = Server::start(&["--otlp-endpoint", &endpoint]);
    for at in 0..20 {
        server.post(TEXT, &json!({"prompt": format!("{at}"), "max_tokens": 1})).ok();
    }
    server.signal("-TERM");
    let (status, said) = server.wait();
    assert!(status.success(), "{said}");
    let warnings: Vec<&str> = said.lines().filter(|line| line.contains("traces do not arrive")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains(&endpoint), "{said}");
}
