"""Attacks a server of one's own, on loopback, and asks after each attack whether it still serves.

    python attacks.py PROGRAM

starts `PROGRAM serve` twice, open and with keys, tries what is listed below, and prints a line for each attempt: what was
tried and what happened. Every loop is bounded. An attempt passes if the answers are those that are expected, a bystander's
request is answered in the meantime, and nothing is left running. Needs nothing but Python. The exit code is 1 if an attempt
failed, if a pass failed, or if the server did not end by itself.
"""

import json
import os
import random
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ATTEMPTS = []


def attempt(what: str):
    """Adds a function to the list; it returns what happened, in words, or fails an assertion."""

    def add(function):
        ATTEMPTS.append((what, function))
        return function

    return add


class Server:
    def __init__(self, program: str, *options: str):
        command = [program, "serve", "--port", "0", "--patience", "3s", "--body-time", "3s", "--parallel", "4", "--queue", "64", *options]
        self.said = []
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise SystemExit(f"{command}: {self.said}")
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def raw(self, data: bytes, limit: float = 120) -> bytes:
        """All that comes back for these bytes until the server closes; empty if it closes without a word."""
        with self.connect() as connection:
            connection.settimeout(limit)
            answer = b""
            try:
                connection.sendall(data)
                while piece := connection.recv(65536):
                    answer += piece
            except OSError:
                pass
            return answer

    def ask(self, method: str, path: str, body=None, headers=()) -> tuple[int, str, str]:
        """Status, head and body. The body may be an object, text or bytes."""
        if not isinstance(body, bytes):
            body = b"" if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}", *headers]
        answer = self.raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        head, _, content = answer.partition(b"\r\n\r\n")
        code = int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else 0
        return code, head.decode("latin-1"), content.decode("utf-8", "replace")

    def post(self, path: str, body, headers=()) -> tuple[int, dict]:
        code, _, content = self.ask("POST", path, body, headers)
        return code, json.loads(content)

    def metrics(self, headers=()) -> dict[str, float]:
        lines = self.ask("GET", "/metrics", headers=headers)[2].splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#")) if name}

    def sum(self, name: str) -> float:
        return sum(value for series, value in self.metrics().items() if series.partition("{")[0] == name)

    def is_idle(self) -> bool:
        return self.sum("ternion_running_texts") == 0 and self.sum("ternion_queue_length") == 0

    def bystander(self) -> float:
        start = time.monotonic()
        code, answer = self.post(COMPLETIONS, {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0})
        assert code == 200 and answer["usage"]["completion_tokens"] == 4, f"a bystander got {code}: {answer}"
        return time.monotonic() - start

    def settled(self, seconds: float = 120):
        end = time.monotonic() + seconds
        while not self.is_idle():
            assert time.monotonic() < end, f"still busy after {seconds} s"
            time.sleep(0.1)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def counted(codes) -> str:
    return ", ".join(f"{count} × {code or 'closed'}" for code, count in sorted(Counter(codes).items()))


def code_of(answer: bytes) -> int:
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


@attempt("300 connections that send random bytes")
def garbage(server):
    random.seed(1)
    codes = [code_of(server.raw(random.randbytes(random.randrange(1, 4096)), 5)) for _ in range(300)]
    assert set(codes) <= {0, 400}, codes
    return counted(codes)


@attempt("a TLS handshake where there is no TLS")
def tls_hello(server):
    try:
        ssl._create_unverified_context().wrap_socket(server.connect())
    except (ssl.SSLError, OSError):
        return "refused"
    raise AssertionError("shook hands")


@attempt("requests that two parsers would read differently (both lengths, two lengths, a bent length, chunks of nonsense)")
def smuggling(server):
    heads = [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "Content-Length: +2\r\n\r\n{}",
        "Content-Length: 99999999999999999999999\r\n\r\n{}",
        "Transfer-Encoding: xchunked\r\n\r\n{}",
        "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n{}",
        "Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n",
    ]
    answers = [server.raw(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{head}".encode(), 8) for head in heads]
    assert all(answer.count(b"HTTP/1.1 ") <= 1 for answer in answers), "one request was answered twice"
    codes = [code_of(answer) for answer in answers]
    assert set(codes) <= {0, 400, 408, 413}, codes
    return counted(codes)


@attempt("a head of 1 MB, 10,000 headers, a path of 1 MB")
def large_heads(server):
    codes = [
        code_of(server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n", 8)),
        code_of(server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 10_000 + b"\r\n", 8)),
        code_of(server.raw(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 8)),
    ]
    assert set(codes) <= {0, 400, 404, 414, 431}, codes
    return counted(codes)


@attempt("slowloris: 200 connections that send a byte of their head each half second")
def slowloris(server):
    connections = [server.connect() for _ in range(200)]
    closed, slowest, start = 0, 0.0, time.monotonic()
    head = f"GET /health HTTP/1.1\r\nX: {'a' * 100}".encode()
    for at in range(16):
        for connection in list(connections):
            try:
                connection.send(head[at : at + 1])
                connection.setblocking(False)
                if connection.recv(1024) == b"":
                    raise ConnectionResetError
            except BlockingIOError:
                pass
            except OSError:
                connections.remove(connection)
                closed += 1
        slowest = max(slowest, server.bystander())
        time.sleep(0.5)
    for connection in connections:
        connection.close()
    assert closed == 200, f"{len(connections)} are still open after {time.monotonic() - start:.0f} s"
    return f"all closed within {time.monotonic() - start:.0f} s (--patience 3s); bystanders waited {1000 * slowest:.0f} ms at most"


@attempt("bodies that come a byte each half second")
def slow_bodies(server):
    codes = []

    def one():
        with server.connect() as connection:
            connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n".encode())
            connection.settimeout(0.5)
            for _ in range(20):
                try:
                    connection.send(b" ")
                    if answer := connection.recv(65536):
                        return codes.append(code_of(answer))
                except TimeoutError:
                    pass
                except OSError:
                    return codes.append(0)
        codes.append(-1)

    threads = [threading.Thread(target=one) for _ in range(50)]
    for thread in threads:
        thread.start()
    waited = server.bystander()
    for thread in threads:
        thread.join()
    assert set(codes) <= {0, 408}, codes
    return f"{counted(codes)} (--body-time 3s); a bystander waited {1000 * waited:.0f} ms"


@attempt("a body said to have 100 GB, one of 8 MB, and chunks without end")
def large_bodies(server):
    codes = [
        code_of(server.raw(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000000\r\n\r\n".encode(), 8)),
        server.ask("POST", COMPLETIONS, b"[" + b" " * 8_000_000 + b"]")[0],
        code_of(server.raw(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 200, 8)),
    ]
    assert set(codes) <= {0, 408, 413}, codes
    return counted(codes)


@attempt("40 clients that ask for long streams and never read them")
def deaf_readers(server):
    body = json.dumps({"prompt": "Once", "max_tokens": 256, "ignore_eos": True, "stream": True, "logprobs": 5, "n": 4}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = []
    for _ in range(40):
        connection = server.connect()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head + body)
        connections.append(connection)
    time.sleep(6)
    waited = None
    for _ in range(120):
        code, _ = server.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 2})
        assert code in (200, 503), code
        if code == 200:
            waited = server.bystander()
            break
        time.sleep(1)
    assert waited is not None, "bystanders were turned away for two minutes"
    server.settled()
    for connection in connections:
        connection.close()
    return f"their slots were free again; a bystander waited {1000 * waited:.0f} ms"


@attempt("60 clients that ask and go away at once")
def runaways(server):
    before = server.sum("ternion_cancelled_total")
    body = json.dumps({"prompt": "Once", "max_tokens": 1024, "ignore_eos": True, "stream": True}).encode()
    for _ in range(60):
        with server.connect() as connection:
            connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.settled()
    return f"nothing left running, {server.sum('ternion_cancelled_total') - before:.0f} cancelled while they ran"


NUMBERS = [
    "max_tokens", "max_completion_tokens", "n", "best_of", "logprobs", "top_k", "top_p", "min_p", "temperature", "seed",
    "repetition_penalty", "frequency_penalty", "presence_penalty",
]
VALUES = [
    "-1", "-9223372036854775808", "-9223372036854775809", "9223372036854775807", "18446744073709551615", "18446744073709551616",
    "340282366920938463463374607431768211456", "1e308", "-1e308", "1e-400", "0.5", "-0.0", "NaN", "Infinity", "-Infinity", "1e999", "1e99999999",
    "0x10", "01", '"5"', "[]", "[1]", "{}", "true", "null", '"' + "9" * 10_000 + '"', "9" * 5_000,
]


@attempt(f"{len(NUMBERS)} numeric fields × {len(VALUES)} values: negative, huge, NaN, fractions, strings, lists")
def numbers(server):
    codes = Counter()
    for field in NUMBERS:
        for value in VALUES:
            limit = "" if field.startswith("max_") else ', "max_tokens": 1'
            code, answer = server.post(COMPLETIONS, f'{{"prompt": "Once"{limit}, "{field}": {value}}}')
            assert code in (200, 400), f"{field} = {value[:40]}: {code} {answer}"
            # What is out of range must not be taken for something else.
            if code == 200 and field in ("n", "max_tokens", "max_completion_tokens", "logprobs", "top_k"):
                assert value == "null" or field in ("top_k", "logprobs") and value in ("0", "-0.0"), f"{field} = {value[:40]} was accepted"
            codes[code] += 1
    for field in ["dimensions"]:
        for value in VALUES:
            code, _ = server.post("/v1/embeddings", f'{{"input": "a", "{field}": {value}}}')
            assert code in (200, 400), f"{field} = {value[:40]}: {code}"
            codes[code] += 1
    return counted(codes.elements())


@attempt("JSON that is nested 100,000 deep, cut off, doubled, not UTF-8, with lone surrogates, with 10,000 fields")
def json_bombs(server):
    bodies = [
        b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "Once"', b"", b"null", b"\xff\xfe{\x00}\x00", b'{"prompt": "\xc3\x28"}',
        b'{"prompt": "\\ud800"}', b'{"prompt": {"prompt": []}}', b'{"prompt": []}', b'{"prompt": [[]]}',
        b'{"prompt": [1, "a", [2]]}', b'{"prompt": [99999999]}', b'{"prompt": [-1]}', b'{"prompt": [1.5]}', b'{"prompt": [4294967296]}',
        b'{"messages": [{"role": "root", "content": "a"}]}', b'{"prompt": "a", "stop": [' + b",".join([b'"x"'] * 10_000) + b"]}",
        b'{"prompt": "a", "stop": ""}', b'{"prompt": "a", "model": "../../etc/passwd"}', b'{"prompt": "' + b"a " * 1_000_000 + b'"}',
        b'{"prompt": [' + b",".join([b'"a"'] * 100_000) + b"]}",
    ]
    codes = [server.ask("POST", COMPLETIONS, body)[0] for body in bodies]
    wrong = [(code, body[:40]) for code, body in zip(codes, bodies) if code not in (400, 404)]
    assert not wrong, wrong
    many = json.dumps({"prompt": "Once", "max_tokens": 1, **{f"x{at}": at for at in range(10_000)}})
    assert server.post(COMPLETIONS, many)[0] in (200, 400)
    doubled = server.post(COMPLETIONS, '{"prompt": "Once", "max_tokens": 1, "max_tokens": -1}')[0]
    assert doubled == 400, doubled
    return counted(codes)


@attempt("JSON schemas that are bombs: deep, recursive, vast, with hungry patterns, with references to files and hosts")
def schema_bombs(server):
    deep = {"type": "string"}
    for _ in range(90):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    schemas = [
        deep,
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "pattern": "(a{1000}){1000}"},
        {"type": "string", "pattern": "(" * 500},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000_000},
        {"type": "string", "minLength": 1_000_000_000},
        {"enum": [f"value {at}" for at in range(50_000)]},
        {"type": "object", "properties": {f"p{at}": {"type": "string", "maxLength": 50} for at in range(2_000)}},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"type": "nonsense"},
        {"allOf": [{"type": "string"}, {"type": "number"}]},
    ]
    codes, slowest = [], 0.0
    for schema in schemas:
        start = time.monotonic()
        format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        code, answer = server.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 16, "response_format": format})
        assert code in (200, 400), f"{json.dumps(schema)[:80]}: {code} {answer}"
        assert "root:" not in json.dumps(answer)
        codes.append(code)
        slowest = max(slowest, time.monotonic() - start)
        server.bystander()
    assert slowest < 30, f"one took {slowest:.0f} s"
    return f"{counted(codes)}; the slowest took {slowest:.1f} s"


@attempt("one request for 256 prompts × 16 texts, twice the queue many times over")
def floods(server):
    code, answer = server.post(COMPLETIONS, {"prompt": ["Once"] * 256, "n": 16, "max_tokens": 64})
    assert code in (200, 400, 503), (code, answer)
    server.settled()
    return f"{code} {answer.get('error', {}).get('code', '')}".strip()


@attempt("200 clients at once, where 4 texts run and 64 may wait")
def crowd(server):
    codes = []

    def one():
        code, head, _ = server.ask("POST", COMPLETIONS, {"prompt": "Once", "max_tokens": 128, "ignore_eos": True, "seed": random.randrange(10**9)})
        assert code != 503 or "retry-after" in head.lower()
        codes.append(code)

    threads = [threading.Thread(target=one) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(codes) == 200 and set(codes) <= {200, 503}, counted(codes)
    server.settled()
    return counted(codes)


@attempt("1,000 connections that say nothing, where 512 may be open")
def idle_connections(server):
    connections = [server.connect() for _ in range(1000)]
    time.sleep(8)
    waited = server.bystander()
    for connection in connections:
        connection.close()
    return f"a bystander behind them was answered {1000 * waited:.0f} ms after their time was over (--patience 3s)"


@attempt("special tokens, templates and control characters in chat content")
def injection(server):
    def tokens(content: str) -> tuple[int, int]:
        code, answer = server.post(CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0})
        return code, answer.get("usage", {}).get("prompt_tokens", 0)

    specials = ["<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "[INST]", "<<SYS>>"]
    plain = tokens("hello")[1]
    told = []
    for special in specials:
        code, many = tokens("hello" + special * 8)
        assert code == 200, (special, code)
        # A special token counts one; text that only looks like it takes more.
        assert many - plain > 8, f"{special} × 8 took {many - plain} tokens: it was taken for a special token"
        told.append(many - plain)
    for content in ["{{ messages }}{% for x in range(1000000000) %}a{% endfor %}", "\0\1\2\x1b[2J\x7f", "\u202e\u200b\ufeff", "😀" * 200]:
        assert tokens(content)[0] in (200, 400)
    assert server.post(CHAT, {"messages": [{"role": "user\n<|system|>", "content": "a"}]})[0] == 400
    assert server.post(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]})[0] == 400
    return f"text stays text: 8 look-alikes take {min(told)} to {max(told)} tokens"


@attempt("paths out of the tree: dots, encoded dots, double slashes, absolute addresses, null bytes")
def traversal(server):
    paths = [
        "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/page.css/../../Cargo.toml", "/./page.css%00.txt",
        "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/v1/models/" + "a" * 10_000, "http://example.org/etc/passwd", "/admin/../metrics", "\\..\\..", "*",
    ]
    codes = []
    for path in paths:
        code, _, content = server.ask("GET", path)
        assert code in (0, 400, 404, 405) and "root:" not in content, f"{path[:60]}: {code}"
        codes.append(code)
    return counted(codes)


@attempt("methods that are not meant: TRACE, CONNECT, PUT, DELETE, PATCH, nonsense; upgrades to h2c and WebSocket")
def methods(server):
    codes = [server.ask(method, COMPLETIONS, "{}")[0] for method in ["TRACE", "PUT", "DELETE", "PATCH", "GET", "NONSENSE"]]
    codes.append(code_of(server.raw(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\nConnection: close\r\n\r\n", 8)))
    assert set(codes) <= {400, 404, 405}, codes
    for upgrade in ["h2c", "websocket"]:
        assert server.ask("GET", "/health", headers=[f"Upgrade: {upgrade}", "HTTP2-Settings: AAMAAABkAAQAAP__"])[0] == 200
    assert code_of(server.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 8)) in (0, 400, 404, 505)
    return f"{counted(codes)}; upgrades are not taken up"


@attempt("500 paths and 500 model names that do not exist (labels without end would fill the metrics)")
def cardinality(server):
    before = len(server.metrics())
    codes = Counter()
    for at in range(500):
        codes[server.ask("GET", f"/nowhere/{at}")[0]] += 1
        codes[server.post(COMPLETIONS, {"prompt": "a", "model": f"model-{at}"})[0]] += 1
    assert set(codes) == {404}, codes
    grown = len(server.metrics()) - before
    assert grown < 50, f"{grown} more series"
    return f"1000 × 404, {grown} more series"


@attempt("a page of another origin that asks (no preflight is needed for text/plain)")
def other_origins(server):
    code, head, _ = server.ask("POST", COMPLETIONS, {"prompt": "a", "max_tokens": 1}, ["Origin: http://evil.example", "Content-Type: text/plain"])
    assert "access-control-allow-origin" not in head.lower()
    preflight, head, _ = server.ask("OPTIONS", COMPLETIONS, headers=["Origin: http://evil.example", "Access-Control-Request-Method: POST"])
    assert "access-control-allow-origin" not in head.lower()
    assert code == preflight == 403, (code, preflight)
    return f"{code}; its preflight {preflight}"


@attempt("another name for this machine (DNS rebinding): Host: evil.example")
def rebinding(server):
    answer = server.raw(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nOrigin: http://evil.example\r\nConnection: close\r\n\r\n")
    assert code_of(answer) == 403, answer
    return f"{code_of(answer)}"


KEYED = []


def attempt_with_keys(what: str):
    def add(function):
        KEYED.append((what, function))
        return function

    return add


@attempt_with_keys("no key, wrong keys, a key's digest, a key in the address, another scheme")
def wrong_keys(server, keys):
    digest = keys["file"].read_text().split()[1]
    tries = [[], ["Authorization: Bearer wrong"], ["Authorization: Bearer "], [f"Authorization: Bearer {digest}"], [f"Authorization: Basic {keys['user']}"], ["Authorization: Bearer " + "a" * 8000], [f"X-Api-Key: {keys['user']}"], [b"Authorization: Bearer \xff\xfe".decode("latin-1")]]
    codes = [server.ask("GET", path, headers=headers)[0] for headers in tries for path in ["/v1/models", "/metrics", "/admin/report.json"]]
    codes.append(server.ask("GET", f"/v1/models?key={keys['user']}")[0])
    assert set(codes) <= {400, 401, 429}, codes
    return counted(codes)


@attempt_with_keys("a user's key at the operator's door")
def roles(server, keys):
    user, admin = ([f"Authorization: Bearer {keys[name]}"] for name in ("user", "admin"))
    codes = [server.ask("GET", path, headers=user)[0] for path in ["/admin/report.json", "/admin/live.json", "/admin/nothing"]]
    assert set(codes) == {403}, codes
    assert server.ask("GET", "/admin/report.json", headers=admin)[0] == 200
    return counted(codes)


@attempt_with_keys("300 guesses of a key, with another X-Forwarded-For each time")
def guesses(server, keys):
    codes = [server.ask("GET", "/v1/models", headers=[f"Authorization: Bearer guess-{at}", f"X-Forwarded-For: 10.0.0.{at % 250}"])[0] for at in range(300)]
    assert set(codes) == {401, 429} and codes.count(429) > 200, counted(codes)
    # Whoever has a key does not stand in the guessers' queue.
    assert server.ask("GET", "/v1/models", headers=[f"Authorization: Bearer {keys['user']}"])[0] == 200
    return f"{counted(codes)}; a client with a key is not held up by it"


@attempt_with_keys("line breaks and quotes in paths, to forge lines of the log")
def log_injection(server, keys):
    for path in ['/a%0a{"event":"ok"}', '/a"b', "/a\\u000ab", "/%1b[2J"]:
        server.ask("GET", path)
    lines = keys["log"].read_text().splitlines()
    assert lines and all(json.loads(line)["status"] for line in lines)
    secrets = [line for line in lines if keys["user"] in line or keys["admin"] in line or "127.0.0.1" in line]
    assert not secrets, "the log tells keys or addresses"
    return f"{len(lines)} lines, each a JSON object; no key and no address in them"


def attack(server, attempts, *more) -> int:
    failed = 0
    for what, function in attempts:
        start = time.monotonic()
        try:
            happened = function(server, *more)
            if not more:
                server.bystander()
                server.settled()
            verdict = "ok"
        except Exception as error:
            happened, verdict, failed = f"{type(error).__name__}: {error}"[:400], "FAILED", failed + 1
        print(f"{verdict} | {what} | {happened} | {time.monotonic() - start:.1f} s", flush=True)
        if server.process.poll() is not None:
            print(f"FAILED | the server ended with code {server.process.returncode}: {''.join(server.said[-5:])}")
            return failed + 1
    return failed


def main() -> int:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    program = sys.argv[1]
    failed = 0
    server = Server(program, "--rate-limit", "0")
    server.bystander()
    before = server.sum("process_resident_memory_bytes")
    failed += attack(server, ATTEMPTS)
    grown = (server.sum("process_resident_memory_bytes") - before) / 1e6
    passes = server.sum("ternion_failed_passes_total")
    panics = [line for line in server.said if "panick" in line]
    code = server.stop()
    good = passes == 0 and not panics and code == 0 and grown < 512
    print(f"{'ok' if good else 'FAILED'} | afterwards | {grown:.0f} MB more memory, {passes:.0f} failed passes, {len(panics)} panics, exit code {code}")
    failed += not good

    with tempfile.TemporaryDirectory() as home:
        keys = {"file": Path(home) / "keys", "log": Path(home) / "log.jsonl"}
        for name, more in [("user", []), ("admin", ["--admin"])]:
            made = subprocess.run([program, "serve", "--api-key-file", keys["file"], "--add-key", name, *more], capture_output=True, text=True, check=True)
            keys[name] = made.stdout.strip()
        assert keys["user"] not in keys["file"].read_text(), "the key file holds keys"
        assert os.stat(keys["file"]).st_mode & 0o077 == 0, "others may read the key file"
        server = Server(program, "--api-key-file", str(keys["file"]), "--log", str(keys["log"]))
        failed += attack(server, KEYED, keys)
        failed += server.stop() != 0
    total = len(ATTEMPTS) + len(KEYED) + 1
    print(f"{total - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
