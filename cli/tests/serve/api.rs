//! What is answered.

use serde_json::{Value, json};

use crate::client::{Server, ternion};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// What the command line generates.
fn run(arguments: &[&str]) -> String {
    let output = ternion(&[&["run", "--no-echo", "--quiet"], arguments].concat()).output().expect("the binary runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8").trim_end_matches('\n').to_owned()
}

fn text(reply: &Value) -> &str {
    reply["choices"][0]["text"].as_str().expect("a text")
}

fn seeded(prompt: &str, seed: u64) -> Value {
    json!({"prompt": prompt, "seed": seed, "temperature": 0.8, "top_p": 0.95, "max_tokens": 24})
}

#[test]
fn a_seeds_text_is_the_command_lines_alone_and_among_others_with_any_cache() {
    let prompts = [
        "Once upon a time",
        "The old king had a secret that nobody in the whole wide country knew except the little mouse under his chair",
        "Lily",
    ];
    for kv in ["f16", "int8"] {
        let expected: Vec<String> = (0..3)
            .map(|at| {
                let seed = (7 + at).to_string();
                let sampling = ["--kv", kv, "--seed", &seed, "--temp", "0.8", "--top-p", "0.95", "-n", "24"];
                run(&[&["-p", prompts[at]], &sampling[..]].concat())
            })
            .collect();
        let server =
            Server::start(&["--kv", kv, "--threads", "2", "--parallel", "8", "--chunk", "5", "--response-cache", "0"]);
        let ask = |at: usize| text(&server.post(TEXT, &seeded(prompts[at % 3], 7 + at as u64 % 3)).ok()).to_owned();
        let ask = &ask;
        assert_eq!(ask(0), expected[0], "alone, {kv}");
        std::thread::scope(|scope| {
            let asked: Vec<_> = (0..9).map(|at| scope.spawn(move || ask(at))).collect();
            for (at, asked) in asked.into_iter().enumerate() {
                assert_eq!(asked.join().expect("an answer"), expected[at % 3], "among others, {kv}");
            }
        });
        // Somebody has read this beginning before.
        assert_eq!(ask(1), expected[1], "again, {kv}");
        let most = server.metric("ternion_batch_texts_sum") / server.metric("ternion_batch_texts_count");
        assert!(most > 1.0, "they ran together: {most}");
        assert!(server.metric("ternion_prefix_cached_tokens_total") > 0.0, "beginnings were not read again");
    }
}

#[test]
fn a_chat_is_the_same_at_once_and_in_pieces() {
    let server = Server::start(&["--response-cache", "0"]);
    let mut body = json!({
        "model": "ternary-tales", "max_tokens": 20, "seed": 5, "temperature": 0.7,
        "messages": [
            {"role": "system", "content": "Tell short stories."},
            {"role": "user", "content": [{"type": "text", "text": "A story about "}, {"type": "text", "text": "a dog"}]},
        ],
    });
    let whole = server.post(CHAT, &body).ok();
    assert_eq!((&whole["object"], &whole["model"]), (&json!("chat.completion"), &json!("ternary-tales")));
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    let content = choice["message"]["content"].as_str().expect("text");
    assert!(!content.is_empty());
    assert!(whole["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")));

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let events = server.stream(CHAT, &body);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    let pieces: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(pieces, content);
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], choice["finish_reason"]);
    let usage = &events[events.len() - 1]["usage"];
    for of in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(usage[of], whole["usage"][of], "{of}");
    }
    assert_eq!(
        usage["total_tokens"].as_u64(),
        usage["prompt_tokens"].as_u64().zip(usage["completion_tokens"].as_u64()).map(|(a, b)| a + b)
    );
    // Without being asked for, there is no usage.
    body["stream_options"] = Value::Null;
    assert!(server.stream(CHAT, &body).iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn several_texts_differ_and_the_first_is_the_only_one_of_one() {
    let server = Server::start(&["--parallel", "4", "--response-cache", "0"]);
    let mut body = seeded("Once upon a time there was", 3);
    let one = text(&server.post(TEXT, &body).ok()).to_owned();
    body["n"] = json!(3);
    let several = server.post(TEXT, &body).ok();
    let texts: Vec<&str> = (0..3).map(|at| several["choices"][at]["text"].as_str().expect("a text")).collect();
    assert_eq!(texts[0], one);
    assert!(texts[1] != texts[0] && texts[2] != texts[1], "{texts:?}");
    // Two prompts, two texts each: prompts come first.
    body["prompt"] = json!(["Once upon a time there was", "A cat"]);
    body["n"] = json!(2);
    let four = server.post(TEXT, &body).ok();
    assert_eq!(four["choices"].as_array().map(Vec::len), Some(4));
    assert_eq!(text(&four), one);
    assert_eq!(four["choices"][1]["text"], texts[1]);
    // A list of tokens is a prompt like its text.
    let tokens = server.post("/tokenize", &json!({"content": "Once upon a time there was", "add_special": true})).ok();
    body["prompt"] = tokens["tokens"].clone();
    assert_eq!(text(&server.post(TEXT, &body).ok()), one);
}

#[test]
fn what_prompts_have_in_common_is_read_once_though_they_come_together() {
    let server = Server::start(&[
        "--parallel",
        "8",
        "--chunk",
        "16",
        "--prefix-cache",
        "0",
        "--response-cache",
        "0",
        "--threads",
        "2",
    ]);
    let beginning =
        "Once upon a time there was a little girl who lived with her dog in a small house near the forest. ".repeat(2);
    let prompts =
        ["She", "One day it rained", "The dog", "Her mother said that"].map(|end| format!("{beginning}{end}"));
    let tokens = prompts.each_ref().map(|prompt| {
        let reply = server.post("/tokenize", &json!({"content": prompt, "add_special": true})).ok();
        reply["tokens"].as_array().expect("tokens").clone()
    });
    let common = (0..).take_while(|at| tokens.iter().all(|one| one.get(*at) == tokens[0].get(*at))).count();
    let alone = prompts.each_ref().map(|prompt| text(&server.post(TEXT, &seeded(prompt, 3)).ok()).to_owned());
    assert_eq!(server.metric("ternion_prefix_cached_tokens_total"), 0.0, "each was read alone");
    let mut body = seeded("", 3);
    body["prompt"] = json!(prompts);
    let together = server.post(TEXT, &body).ok();
    for (at, alone) in alone.iter().enumerate() {
        assert_eq!(together["choices"][at]["text"], *alone, "text {at}");
    }
    assert_eq!(server.metric("ternion_prefix_cached_tokens_total"), 3.0 * common as f64);
    assert_eq!(together["usage"]["prompt_tokens_details"]["cached_tokens"], 3 * common);
    // The same prompt for several texts: all but one of them read its last token only.
    let several = |n: usize| {
        let mut body = seeded(&prompts[0], 3);
        body["n"] = json!(n);
        server.post(TEXT, &body).ok()
    };
    let (few, before) = (several(2), server.metric("ternion_prefix_cached_tokens_total"));
    let many = several(6);
    assert_eq!(text(&many), alone[0]);
    assert_eq!(many["choices"][1]["text"], few["choices"][1]["text"]);
    let spared = server.metric("ternion_prefix_cached_tokens_total") - before;
    assert_eq!(spared, 5.0 * (tokens[0].len() - 1) as f64);
    assert_eq!(
        many["usage"]["prompt_tokens_details"]["cached_tokens"], 0,
        "the request as a whole has read its prompt"
    );
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_in_it() {
    let server = Server::start(&[]);
    let body = |stop: Value| json!({"prompt": "Once upon a time", "max_tokens": 40, "stop": stop, "ignore_eos": true});
    let whole = server.post(TEXT, &body(Value::Null)).ok();
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 40);
    let whole = text(&whole).to_owned();
    let word = whole.split_whitespace().nth(5).expect("words").to_owned();
    let stopped = server.post(TEXT, &body(json!(["no such text", word]))).ok();
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(text(&stopped), &whole[..whole.find(&word).expect("it is there")]);
}

#[test]
fn logprobs_are_those_of_the_tokens_that_were_chosen() {
    let server = Server::start(&[]);
    let body = json!({
        "messages": [{"role": "user", "content": "A story"}], "max_tokens": 8, "logprobs": true, "top_logprobs": 3,
        "temperature": 0,
    });
    let reply = server.post(CHAT, &body).ok();
    let choice = &reply["choices"][0];
    let tokens = choice["logprobs"]["content"].as_array().expect("tokens");
    let mut bytes = Vec::new();
    for token in tokens {
        let logprob = token["logprob"].as_f64().expect("a number");
        let top = token["top_logprobs"].as_array().expect("alternatives");
        assert_eq!(top.len(), 3);
        // At temperature 0 the most likely one is taken.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]));
        assert!(logprob <= 0.0 && top[1]["logprob"].as_f64().is_some_and(|other| other <= logprob), "{token}");
        bytes.extend(token["bytes"].as_array().expect("bytes").iter().map(|byte| byte.as_u64().expect("a byte") as u8));
    }
    assert!(String::from_utf8_lossy(&bytes).contains(choice["message"]["content"].as_str().expect("text")));
    let old = server.post(TEXT, &json!({"prompt": "A story", "max_tokens": 4, "logprobs": 2})).ok();
    let logprobs = &old["choices"][0]["logprobs"];
    for of in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[of].as_array().map(Vec::len), Some(4), "{of}");
    }
    assert_eq!(logprobs["text_offset"][0], 0);
    let without = server.post(CHAT, &json!({"messages": body["messages"], "max_tokens": 2})).ok();
    assert!(without["choices"][0]["logprobs"].is_null());
}

#[test]
fn penalties_and_samplers_change_what_is_said() {
    let server = Server::start(&["--response-cache", "0"]);
    let ask = |name: &str, value: Value| {
        let mut body = json!({"prompt": "Once upon a time", "max_tokens": 32, "temperature": 1.0, "seed": 1});
        body[name] = value;
        text(&server.post(TEXT, &body).ok()).to_owned()
    };
    let plain = ask("user", json!("somebody"));
    for (name, value) in [
        ("temperature", json!(0)),
        ("top_k", json!(1)),
        ("top_p", json!(0.05)),
        ("min_p", json!(1)),
        ("frequency_penalty", json!(2)),
        ("presence_penalty", json!(2)),
        ("repetition_penalty", json!(1.9)),
        ("seed", json!(-2)),
    ] {
        assert_ne!(ask(name, value), plain, "{name}");
    }
    assert_eq!(ask("top_k", json!(1)), ask("temperature", json!(0)));
}

#[test]
fn embeddings_are_those_of_the_command_line() {
    let server = Server::start(&[]);
    let texts = ["A small dog", "Once upon a time there was a little girl"];
    let reply = server.post("/v1/embeddings", &json!({"input": texts})).ok();
    for (at, text) in texts.iter().enumerate() {
        let output = ternion(&["embed", "-p", text]).output().expect("the binary runs");
        let line: Value = serde_json::from_slice(&output.stdout).expect("a line");
        let vector = |json: &Value| -> Vec<f32> {
            json["embedding"].as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number") as f32).collect()
        };
        assert_eq!(vector(&reply["data"][at]), vector(&line), "{text}");
        assert_eq!(reply["data"][at]["index"], at);
    }
    let coded = server.post("/v1/embeddings", &json!({"input": texts[0], "encoding_format": "base64"})).ok();
    let coded = coded["data"][0]["embedding"].as_str().expect("a text").to_owned();
    let width = reply["data"][0]["embedding"].as_array().map_or(0, Vec::len);
    assert_eq!(coded.len(), (4 * width).div_ceil(3) * 4);
    server.post("/v1/embeddings", &json!({"input": []})).refused(400, "INVALID_INPUT");
}

#[test]
fn models_are_chosen_by_name() {
    let tales = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/ternary-tales.tern");
    let server = Server::start(&["--model", &format!("first={tales}"), "--model", tales, "--response-cache", "0"]);
    let models = server.get("/v1/models").ok();
    let names: Vec<_> = models["data"].as_array().expect("a list").iter().map(|model| &model["id"]).collect();
    assert_eq!(names, ["first", "ternary-tales"]);
    assert_eq!(server.get("/v1/models/first").ok()["kind"], "generation");
    let ask = |model: Value| server.post(TEXT, &json!({"prompt": "A", "max_tokens": 4, "model": model}));
    assert_eq!(ask(json!("ternary-tales")).ok()["model"], "ternary-tales");
    assert_eq!(ask(Value::Null).ok()["model"], "first");
    assert_eq!(text(&ask(json!("first")).ok()), text(&ask(json!("ternary-tales")).ok()));
    assert!(ask(json!("gpt-4")).refused(404, "MODEL_NOT_FOUND").contains("first, ternary-tales"));
    server.get("/v1/models/gpt-4").refused(404, "MODEL_NOT_FOUND");
}

#[test]
fn tokens_go_there_and_back_and_special_ones_cannot_be_smuggled_into_a_chat() {
    let server = Server::start(&[]);
    let tokens = |content: &str| server.post("/tokenize", &json!({"content": content})).ok();
    let content = "Grüße, \"Lily\"!\n";
    let found = tokens(content);
    assert_eq!(found["tokens"].as_array().map(Vec::len), found["count"].as_u64().map(|count| count as usize));
    let back = server.post("/detokenize", &json!({"tokens": found["tokens"]})).ok();
    assert_eq!(back["content"], content);
    // The names of special tokens are those whose text is one token that is no text.
    let vocabulary = server.get("/v1/models").ok()["data"][0]["vocabulary"].as_u64().expect("a number");
    let names =
        ["<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"];
    let special: Vec<&str> = names.into_iter().filter(|name| tokens(name)["count"] == 1).collect();
    assert!(!special.is_empty(), "the embedded model has special tokens ({vocabulary} tokens)");
    let length = |content: &str| {
        let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 1});
        server.post(CHAT, &body).ok()["usage"]["prompt_tokens"].as_u64().expect("a number")
    };
    for name in special {
        let (plain, with) = (length("a b"), length(&format!("a {name} b")));
        assert!(with > plain + 2, "{name} is text in a chat: {with} tokens, {plain} without");
    }
}

#[test]
fn an_answer_conforms_to_its_schema() {
    let server = Server::start(&[]);
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "likes"],
        "properties": {
            "name": {"enum": ["Lily", "Tom", "Sue"]},
            "age": {"type": "integer", "minimum": 3, "maximum": 12},
            "likes": {"type": "array", "items": {"enum": ["dogs", "cats"]}, "minItems": 1, "maxItems": 2},
        },
    });
    for seed in 0..4 {
        let reply = server.post(
            CHAT,
            &json!({
                "messages": [{"role": "user", "content": "Who is it?"}], "max_tokens": 200, "temperature": 1.5, "seed": seed,
                "response_format": {"type": "json_schema", "json_schema": {"name": "child", "strict": true, "schema": schema}},
            }),
        );
        let reply = reply.ok();
        let content = reply["choices"][0]["message"]["content"].as_str().expect("text");
        let child: Value = serde_json::from_str(content).unwrap_or_else(|error| panic!("{error}: {content}"));
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
        assert!(["Lily", "Tom", "Sue"].iter().any(|name| child["name"] == *name), "{child}");
        assert!(child["age"].as_i64().is_some_and(|age| (3..=12).contains(&age)), "{child}");
        assert!(matches!(child["likes"].as_array().map(Vec::len), Some(1 | 2)), "{child}");
        assert_eq!(child.as_object().map(serde_json::Map::len), Some(3));
    }
    let ask = |format: Value| {
        let body = json!({"prompt": "A", "max_tokens": 8, "response_format": format});
        server.post(TEXT, &body)
    };
    let object = ask(json!({"type": "json_object"})).ok();
    assert!(text(&object).trim_start().starts_with('{'), "{object}");
    for wrong in [
        json!("json"),
        json!({"type": "xml"}),
        json!({"type": "json_schema"}),
        json!({"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}),
        json!({"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}),
    ] {
        let message = ask(wrong).refused(400, "INVALID_INPUT");
        assert!(message.contains("response_format"), "{message}");
    }
}

#[test]
fn what_has_been_answered_is_answered_again_without_a_pass() {
    let server = Server::start(&["--seed", "random"]);
    let body = seeded("Once upon a time", 9);
    let first = server.post(TEXT, &body).ok();
    let passes = server.metric("ternion_pass_seconds_count");
    let again = server.post(TEXT, &body).ok();
    assert_eq!((text(&first), &first["usage"]), (text(&again), &again["usage"]));
    assert_eq!(server.metric("ternion_pass_seconds_count"), passes);
    assert_eq!(server.metric("ternion_response_cache_hits_total"), 1.0);
    assert!(server.metric("ternion_response_cache_bytes") > 0.0);
    // Another seed is another question, and without one each asks for something new here.
    let mut other = body.clone();
    other["seed"] = json!(10);
    assert_ne!(text(&server.post(TEXT, &other).ok()), text(&first));
    other["seed"] = Value::Null;
    let texts = [0, 1].map(|_| text(&server.post(TEXT, &other).ok()).to_owned());
    assert_ne!(texts[0], texts[1]);
    assert_eq!(server.metric("ternion_response_cache_hits_total"), 1.0);
}
