//! Pulling from a hub on the loopback address that redirects, continues, refuses, cuts off and lies.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ternion_hub::{Hub, HubError};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Trouble {
    #[default]
    None,
    /// Closes the connection after 100000 bytes of a file, so many times.
    Cut(usize),
    /// Answers ranges with the whole file.
    NoRanges,
    /// Sends other bytes than it lists.
    Lies,
    /// Wants a token.
    Private,
    /// Lists a file that lies elsewhere.
    Escape,
    /// Answers with this status, so many times.
    Status(u16, usize),
}

#[derive(Default)]
struct State {
    trouble: Trouble,
    /// Method, path, `Range` and `Authorization` of each request.
    requests: Vec<[String; 3]>,
}

struct Server {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

const CONFIG: &[u8] = b"{\"architectures\": [\"BitNetForCausalLM\"]}";

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Server {
    fn start(trouble: Trouble) -> Self {
        // Files come from another host than the hub.
        let files = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let elsewhere = format!("http://localhost:{}", files.local_addr().unwrap().port());
        let endpoint = format!("http://{}", hub.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { trouble, ..State::default() }));
        for listener in [hub, files] {
            let (state, elsewhere) = (state.clone(), elsewhere.clone());
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (state, elsewhere) = (state.clone(), elsewhere.clone());
                    thread::spawn(move || while answer(&stream, &state, &elsewhere).is_some() {});
                }
            });
        }
        Self { endpoint, state }
    }

    fn hub(&self, cache: &tempfile::TempDir) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            cache: cache.path().to_owned(),
            token: None,
            offline: false,
            retries: 2,
            wait: Duration::from_millis(10),
        }
    }

    fn requests(&self) -> Vec<[String; 3]> {
        self.state.lock().unwrap().requests.clone()
    }
}

/// Answers one request; `None` closes the connection.
fn answer(mut stream: &TcpStream, state: &Mutex<State>, elsewhere: &str) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|count| *count > 0)?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let trouble = {
        let mut state = state.lock().unwrap();
        state.requests.push([path.clone(), header("range"), header("authorization")]);
        state.trouble
    };
    let mut send = |status: &str, extra: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{extra}\r\n", body.len());
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok()
    };
    if trouble == Trouble::Private && !path.starts_with("/cdn") && header("authorization") != "Bearer secret" {
        return send("401 Unauthorized", "", b"");
    }
    if let Trouble::Status(status, times @ 1..) = trouble {
        state.lock().unwrap().trouble = Trouble::Status(status, times - 1);
        return send(&format!("{status} Trouble"), "", b"");
    }
    if ["main", COMMIT].iter().any(|it| path == format!("/api/models/someone/model/revision/{it}?blobs=true")) {
        let git = hex(Sha1::digest([format!("blob {}\0", CONFIG.len()).as_bytes(), CONFIG].concat()));
        let name = if trouble == Trouble::Escape { "../../config.json" } else { "config.json" };
        let json = format!(
            r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"{name}","size":{},"blobId":"{git}"}},
            {{"rfilename":"model.safetensors","size":300000,"blobId":"{COMMIT}","lfs":{{"sha256":"{}","size":300000}}}},
            {{"rfilename":"README.md","size":3,"blobId":"{COMMIT}"}},
            {{"rfilename":"tokenizer.json","size":{},"blobId":"{git}"}}]}}"#,
            CONFIG.len(),
            hex(Sha256::digest(weights())),
            CONFIG.len(),
        );
        return send("200 OK", "", json.as_bytes());
    }
    // The tokenizer's content is of no interest here.
    if ["config.json", "tokenizer.json"].iter().any(|it| path == format!("/someone/model/resolve/{COMMIT}/{it}")) {
        return send("200 OK", "", CONFIG);
    }
    if path == format!("/someone/model/resolve/{COMMIT}/model.safetensors") {
        return send("302 Found", &format!("Location: {elsewhere}/cdn/weights\r\n"), b"");
    }
    if path == "/cdn/weights" {
        let mut body = weights();
        if trouble == Trouble::Lies {
            body[150_000] ^= 1;
        }
        let from = header("range").strip_prefix("bytes=").and_then(|range| range.trim_end_matches('-').parse().ok());
        let from: usize = from.filter(|_| trouble != Trouble::NoRanges).unwrap_or(0);
        let (status, extra) = match from {
            0 => ("200 OK", String::new()),
            from => ("206 Partial Content", format!("Content-Range: bytes {from}-299999/300000\r\n")),
        };
        if let Trouble::Cut(times @ 1..) = trouble {
            state.lock().unwrap().trouble = Trouble::Cut(times - 1);
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{extra}\r\n", body.len() - from);
            stream.write_all(head.as_bytes()).ok()?;
            stream.write_all(&body[from..from + 100_000]).ok()?;
            stream.shutdown(std::net::Shutdown::Both).ok()?;
            return None;
        }
        return send(status, &extra, &body[from..]);
    }
    send("404 Not Found", "", b"")
}

fn pull(hub: &Hub) -> Result<PathBuf, HubError> {
    hub.pull("someone/model", "main", None, &mut |_, _, _| ControlFlow::Continue(()))
}

fn assert_complete(path: &std::path::Path) {
    assert!(path.ends_with(format!("models--someone--model/snapshots/{COMMIT}")));
    assert_eq!(fs::read(path.join("config.json")).unwrap(), CONFIG);
    assert!(fs::read(path.join("model.safetensors")).unwrap() == weights());
    assert!(!path.join("README.md").exists());
}

#[test]
fn a_model_is_fetched_through_redirects_once_and_found_offline_afterwards() {
    let (server, cache) = (Server::start(Trouble::None), tempfile::tempdir().unwrap());
    let hub = server.hub(&cache);
    let mut told = Vec::new();
    let mut progress = |file: &str, done: u64, total: u64| {
        told.push((file.to_owned(), done, total));
        ControlFlow::Continue(())
    };
    assert_complete(&hub.pull("someone/model", "main", None, &mut progress).unwrap());
    assert!(told.contains(&("model.safetensors".to_owned(), 300_000, 300_000)));
    let requests = server.requests().len();
    assert_complete(&pull(&hub).unwrap());
    assert_eq!(server.requests().len(), requests + 1, "only the list is asked for again");

    let offline = Hub { offline: true, endpoint: "http://127.0.0.1:1".to_owned(), ..hub };
    assert_complete(&pull(&offline).unwrap());
    let error = offline.pull("someone/other", "main", None, &mut |_, _, _| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
}

#[test]
fn a_connection_that_is_cut_is_taken_up_where_it_was() {
    let (server, cache) = (Server::start(Trouble::Cut(2)), tempfile::tempdir().unwrap());
    assert_complete(&pull(&server.hub(&cache)).unwrap());
    let ranges: Vec<String> =
        server.requests().into_iter().filter(|[path, ..]| path == "/cdn/weights").map(|[_, range, _]| range).collect();
    assert_eq!(ranges, ["", "bytes=100000-", "bytes=200000-"]);
}

#[test]
fn what_arrived_before_giving_up_is_kept_for_the_next_time() {
    let (server, cache) = (Server::start(Trouble::Cut(1)), tempfile::tempdir().unwrap());
    let hub = Hub { retries: 0, ..server.hub(&cache) };
    let error = pull(&hub).unwrap_err();
    assert!(matches!(error, HubError::Transfer { .. }) && !error.to_string().contains('\n'), "{error}");
    assert!(matches!(pull(&Hub { offline: true, ..hub.clone() }), Err(HubError::Offline { .. })));
    assert_complete(&pull(&hub).unwrap());
    assert!(server.requests().iter().any(|[path, range, _]| path == "/cdn/weights" && range == "bytes=100000-"));
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let (server, cache) = (Server::start(Trouble::NoRanges), tempfile::tempdir().unwrap());
    let blobs = cache.path().join("models--someone--model/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", hex(Sha256::digest(weights())))), [0; 1000]).unwrap();
    assert_complete(&pull(&server.hub(&cache)).unwrap());
}

#[test]
fn a_file_that_is_not_what_the_hub_says_is_refused_and_thrown_away() {
    let (server, cache) = (Server::start(Trouble::Lies), tempfile::tempdir().unwrap());
    let error = pull(&server.hub(&cache)).unwrap_err();
    assert!(matches!(&error, HubError::Checksum { file, .. } if file == "model.safetensors"), "{error}");
    server.state.lock().unwrap().trouble = Trouble::None;
    assert_complete(&pull(&server.hub(&cache)).unwrap());
}

#[test]
fn a_token_opens_private_models_and_stays_with_the_hub() {
    let (server, cache) = (Server::start(Trouble::Private), tempfile::tempdir().unwrap());
    let hub = server.hub(&cache);
    let error = pull(&hub).unwrap_err();
    assert!(matches!(error, HubError::Access { status: 401, .. }) && error.to_string().contains("HF_TOKEN"));
    assert_complete(&pull(&Hub { token: Some("secret".to_owned()), ..hub }).unwrap());
    let elsewhere = server.requests().into_iter().find(|[path, ..]| path == "/cdn/weights").unwrap();
    assert_eq!(elsewhere[2], "", "the token went to another host");
}

#[test]
fn what_does_not_exist_is_said_not_to() {
    let (server, cache) = (Server::start(Trouble::None), tempfile::tempdir().unwrap());
    let hub = server.hub(&cache);
    let pull = |name: &str, revision: &str, file| {
        hub.pull(name, revision, file, &mut |_, _, _| ControlFlow::Continue(())).unwrap_err()
    };
    assert!(matches!(pull("someone/nothing", "main", None), HubError::NotFound { .. }));
    assert!(matches!(pull("someone/model", "v2", None), HubError::NotFound { .. }));
    assert!(matches!(pull("someone/model", "main", Some("m.gguf")), HubError::NotFound { .. }));
    assert!(matches!(pull("nobody", "main", None), HubError::Name(_)));
    // Nothing is tried again there.
    let hub = Hub { endpoint: "huggingface.co".to_owned(), ..server.hub(&cache) };
    assert!(matches!(self::pull(&hub).unwrap_err(), HubError::Endpoint(_)));
}

#[test]
fn a_list_with_files_elsewhere_is_not_followed() {
    let (server, cache) = (Server::start(Trouble::Escape), tempfile::tempdir().unwrap());
    let error = pull(&server.hub(&cache)).unwrap_err();
    assert!(matches!(error, HubError::Answer { .. }), "{error}");
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}

#[test]
fn a_cancelled_pull_says_so() {
    let (server, cache) = (Server::start(Trouble::None), tempfile::tempdir().unwrap());
    let stop = &mut |file: &str, _, _| {
        if file == "model.safetensors" { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let error = server.hub(&cache).pull("someone/model", "main", None, stop).unwrap_err();
    assert!(matches!(error, HubError::Cancelled { .. }), "{error}");
    assert_complete(&pull(&server.hub(&cache)).unwrap());
}

#[test]
fn trouble_that_may_pass_is_waited_out() {
    for status in [500, 503, 429, 408] {
        let (server, cache) = (Server::start(Trouble::Status(status, 2)), tempfile::tempdir().unwrap());
        let start = Instant::now();
        assert_complete(&pull(&server.hub(&cache)).unwrap());
        assert!(start.elapsed() >= Duration::from_millis(10 + 20), "{status}");
    }
    let (server, cache) = (Server::start(Trouble::Status(503, 3)), tempfile::tempdir().unwrap());
    let error = pull(&server.hub(&cache)).unwrap_err();
    assert!(matches!(error, HubError::Transfer { .. }) && error.to_string().contains("503"), "{error}");
    assert_eq!(server.requests().len(), 3);
    // Nobody listens.
    let hub = Hub { endpoint: "http://127.0.0.1:1".to_owned(), ..server.hub(&cache) };
    assert!(matches!(pull(&hub), Err(HubError::Transfer { .. })));
}

#[test]
fn what_asking_again_does_not_change_is_asked_once() {
    for status in [400, 401, 403, 404, 410, 451] {
        let (server, cache) = (Server::start(Trouble::Status(status, 1)), tempfile::tempdir().unwrap());
        let error = pull(&server.hub(&cache)).unwrap_err();
        assert!(!matches!(error, HubError::Transfer { .. }) && !error.to_string().contains('\n'), "{status}: {error}");
        assert_eq!(server.requests().len(), 1, "{status}");
    }
}

#[test]
fn waiting_can_be_cancelled() {
    let (server, cache) = (Server::start(Trouble::Status(503, 9)), tempfile::tempdir().unwrap());
    let hub = Hub { wait: Duration::from_secs(3600), ..server.hub(&cache) };
    let error = hub.pull("someone/model", "main", None, &mut |_, _, _| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, HubError::Cancelled { .. }), "{error}");
}

#[test]
fn a_commit_that_is_fetched_in_part_is_no_model_offline() {
    let (server, cache) = (Server::start(Trouble::Cut(1)), tempfile::tempdir().unwrap());
    let hub = Hub { retries: 0, ..server.hub(&cache) };
    let offline = Hub { offline: true, ..hub.clone() };
    let of_commit = |hub: &Hub| hub.pull("someone/model", COMMIT, None, &mut |_, _, _| ControlFlow::Continue(()));
    of_commit(&hub).unwrap_err();
    let snapshot = cache.path().join("models--someone--model/snapshots").join(COMMIT);
    assert!(snapshot.join("config.json").exists());
    assert!(matches!(of_commit(&offline), Err(HubError::Offline { .. })));
    // Other programs write the revision down before everything is there.
    let refs = cache.path().join("models--someone--model/refs");
    fs::create_dir_all(&refs).unwrap();
    fs::write(refs.join("main"), COMMIT).unwrap();
    assert!(matches!(pull(&offline), Err(HubError::Offline { .. })));
    // A file that is there is whole.
    let config = offline.pull("someone/model", COMMIT, Some("config.json"), &mut |_, _, _| ControlFlow::Continue(()));
    assert_eq!(config.unwrap(), snapshot.join("config.json"));

    assert_complete(&of_commit(&hub).unwrap());
    assert_complete(&of_commit(&offline).unwrap());
    assert_complete(&pull(&offline).unwrap());
}

#[test]
fn two_at_once_fetch_a_file_once() {
    let (server, cache) = (Server::start(Trouble::None), tempfile::tempdir().unwrap());
    let hub = server.hub(&cache);
    thread::scope(|scope| {
        let first = scope.spawn(|| {
            hub.pull("someone/model", "main", None, &mut |file, done, total| {
                // In the middle of the file, the other has time to come.
                if file == "model.safetensors" && done < total {
                    thread::sleep(Duration::from_millis(300));
                }
                ControlFlow::Continue(())
            })
        });
        let second = scope.spawn(|| pull(&hub));
        for pulled in [first, second] {
            assert_complete(&pulled.join().unwrap().unwrap());
        }
    });
    let fetched = server.requests().into_iter().filter(|[path, ..]| path == "/cdn/weights").count();
    assert_eq!(fetched, 1);
    let blobs = fs::read_dir(cache.path().join("models--someone--model/blobs")).unwrap();
    assert!(blobs.flatten().all(|blob| !blob.file_name().to_string_lossy().ends_with(".incomplete")));
}
