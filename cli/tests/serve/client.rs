//! A server of the test's own, and a client that speaks to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::Agent;
use ureq::http::HeaderMap;

/// Longest wait for anything: far more than it takes, so that a busy machine fails no test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// A running `ternion serve` on a port of its own; killed when it goes out of scope.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    /// What it says on standard error from the moment that it listens.
    said: Mutex<Receiver<String>>,
    agent: Agent,
    key: Option<String>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// The body of a success.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }

    /// Demands an error of OpenAI's shape with this status and code; returns its message.
    #[track_caller]
    pub(crate) fn refused(&self, status: u16, code: &str) -> String {
        let error = &self.json()["error"];
        assert_eq!((self.status, error["code"].as_str()), (status, Some(code)), "{self:?}");
        assert!(error["type"].is_string() && error.get("param").is_some(), "{self:?}");
        error["message"].as_str().expect("a message").to_owned()
    }
}

/// The program, with a cache of kernels that all tests share.
pub(crate) fn ternion(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternion"));
    command.args(arguments).env("TERNION_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    command.stdin(Stdio::null());
    command
}

/// The library that gives a process another clock, if it is installed; says so if not.
pub(crate) fn faketime() -> Option<PathBuf> {
    let libraries = std::fs::read_dir("/usr/lib").into_iter().flatten().map_while(Result::ok);
    let found = libraries.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1")).find(|path| path.is_file());
    if found.is_none() {
        println!("skipped: there is no libfaketime (Debian: apt-get install libfaketime)");
    }
    found
}

impl Server {
    /// Starts one; requests are not counted unless `arguments` say so. One thread: on a machine that does many other things
    /// the threads of a team would wait for each other.
    #[track_caller]
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::run(ternion(&Self::arguments(arguments)))
    }

    /// The arguments of [`start`](Self::start), completed.
    pub(crate) fn arguments<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["serve", "--port", "0", "--no-page"];
        if !arguments.contains(&"--rate-limit") {
            all.extend(["--rate-limit", "0"]);
        }
        if !arguments.contains(&"--threads") {
            all.extend(["--threads", "1"]);
        }
        all.extend(arguments);
        all
    }

    /// Starts one with these arguments alone.
    #[track_caller]
    pub(crate) fn of(arguments: &[&str]) -> Self {
        Self::run(ternion(arguments))
    }

    /// Runs this command, which starts one.
    #[track_caller]
    pub(crate) fn run(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary runs");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let mut before = Vec::new();
        let address = loop {
            match lines.next() {
                Some(Ok(line)) => match line.split_once("listening on ").and_then(|(_, url)| url.split_once("://")) {
                    Some((_, address)) => break address.parse().expect("an address"),
                    None => before.push(line),
                },
                _ => panic!("it does not listen: {before:?}"),
            }
        };
        let (sender, said) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        let config = Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build();
        Self { child, address, said: Mutex::new(said), agent: config.into(), key: None }
    }

    /// Sends this key from now on.
    pub(crate) fn with_key(&mut self, key: Option<&str>) {
        self.key = key.map(|key| format!("Bearer {key}"));
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.get_with(path, &[])
    }

    pub(crate) fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Reply {
        let mut request = self.agent.get(self.url(path));
        for (name, value) in self.key.iter().map(|key| ("authorization", key.as_str())).chain(headers.iter().copied()) {
            request = request.header(name, value);
        }
        read(request.call().expect("an answer"))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    pub(crate) fn post_with(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Reply {
        read(self.send(path, body.to_string().as_bytes(), headers))
    }

    pub(crate) fn post_bytes(&self, path: &str, body: &[u8]) -> Reply {
        read(self.send(path, body, &[]))
    }

    fn send(&self, path: &str, body: &[u8], headers: &[(&str, &str)]) -> ureq::http::Response<ureq::Body> {
        let mut request = self.agent.post(self.url(path)).header("content-type", "application/json");
        for (name, value) in self.key.iter().map(|key| ("authorization", key.as_str())).chain(headers.iter().copied()) {
            request = request.header(name, value);
        }
        request.send(body).expect("an answer")
    }

    /// The events of a stream, up to and without `[DONE]`, which has to come last.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let reply = self.post(path, body);
        assert_eq!((reply.status, &reply.headers["content-type"]), (200, &"text/event-stream".parse().unwrap()));
        let mut events: Vec<&str> =
            reply.text.split("\n\n").filter(|event| !event.is_empty()).map(|event| &event["data: ".len()..]).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{reply:?}");
        events.into_iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }

    /// A stream whose events are read one at a time.
    pub(crate) fn open(&self, path: &str, body: &Value) -> impl Iterator<Item = String> + use<> {
        let reply = self.send(path, body.to_string().as_bytes(), &[]);
        assert_eq!(reply.status(), 200);
        let lines = BufReader::new(reply.into_body().into_reader()).lines();
        lines.map_while(Result::ok).filter_map(|line| line.strip_prefix("data: ").map(str::to_owned))
    }

    /// A request to be made later, by whoever: its events, or the lines of its answer.
    pub(crate) fn open_later(&self, path: &str, body: Value) -> impl FnOnce() -> Vec<String> + Send + use<> {
        let request = self.agent.post(self.url(path)).header("content-type", "application/json");
        move || {
            let reply = read(request.send(body.to_string()).expect("an answer"));
            let lines = reply.text.lines().filter(|line| !line.is_empty());
            lines.map(|line| line.strip_prefix("data: ").unwrap_or(line).to_owned()).collect()
        }
    }

    /// A metric's value, of all its labels together.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text;
        let values =
            text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        values.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a value")).sum()
    }

    /// Waits until it is so.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < end, "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends bytes as they are; returns what comes back until the server closes the connection.
    pub(crate) fn raw(&self, pieces: &[&[u8]], pause: Duration) -> String {
        let mut stream = TcpStream::connect(self.address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time");
        for piece in pieces {
            if stream.write_all(piece).is_err() {
                break;
            }
            std::thread::sleep(pause);
        }
        let mut answer = Vec::new();
        // A connection that is reset has been closed too.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().expect("kill runs").success());
    }

    /// Waits for its end; returns what it said since it listened.
    pub(crate) fn wait(mut self) -> (ExitStatus, String) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return (status, self.said.get_mut().expect("no panic").iter().collect::<Vec<_>>().join("\n"));
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(reply: ureq::http::Response<ureq::Body>) -> Reply {
    let (head, mut body) = reply.into_parts();
    let text = body.read_to_string().expect("a body");
    Reply { status: head.status.as_u16(), headers: head.headers, text }
}
