"""Makes many requests of every kind and looks at what they leave behind.

    python leaks.py PROGRAM [--requests 10000] [--clients 16]

starts `PROGRAM serve` on loopback, asks a tenth as often to warm it up, notes its memory, open files and threads, makes the
requests (whole answers, streams, streams that are left in the middle, embeddings, schemas, errors), waits until nothing
runs, and notes them again. Prints one JSON object; the exit code is 1 if a request was not answered as it should be, if a slot is still
taken, if files or threads have grown by more than 8, or memory by more than 64 MB. Needs nothing but Python and /proc.
"""

import argparse
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

TEXT = "/v1/completions"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}}


class Server:
    def __init__(self, program: str):
        # Answers are not kept, so that every request is worked on; beginnings are, within the usual bounds.
        self.process = subprocess.Popen(
            [program, "serve", "--port", "0", "--rate-limit", "0", "--parallel", "8", "--response-cache", "0", "--connections", "256"],
            stderr=subprocess.PIPE, text=True,
        )
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise SystemExit("it does not listen")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def ask(self, method: str, path: str, body=None, pieces: int | None = None) -> tuple[int, bytes]:
        """Status and body, or as many lines of it as are wanted before the connection is cut."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if pieces is None:
                return answer.status, answer.read()
            return answer.status, b"".join(answer.readline() for _ in range(pieces))
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[ {{]", line))

    def settled(self):
        end = time.monotonic() + 120
        while self.metric("ternion_running_texts") + self.metric("ternion_queue_length") > 0 or self.metric("ternion_connections") > 1:
            if time.monotonic() > end:
                raise SystemExit("something still runs after 120 s")
            time.sleep(0.1)

    def state(self) -> dict[str, int]:
        home = Path("/proc") / str(self.process.pid)
        status = dict(line.split(":", 1) for line in (home / "status").read_text().splitlines())
        return {
            "resident_kb": int(status["VmRSS"].split()[0]), "files": len(list((home / "fd").iterdir())),
            "threads": int(status["Threads"]), "kv_bytes": int(self.metric("ternion_kv_bytes")),
        }


def one(server: Server, number: int) -> str:
    """Makes a request; returns its kind, or what is wrong with the answer."""
    prompt = f"Story {number} of {number * 7919 % 1009}"
    kind = number % 8
    if kind < 3:
        code, body = server.ask("POST", TEXT, {"prompt": prompt, "max_tokens": 4, "seed": number, "temperature": 0.9})
        return "whole" if code == 200 and b'"usage"' in body else f"whole: {code} {body!r}"
    if kind == 3:
        code, body = server.ask("POST", TEXT, {"prompt": prompt, "max_tokens": 8, "stream": True, "n": 2})
        return "stream" if code == 200 and body.endswith(b"data: [DONE]\n\n") else f"stream: {code} {body!r}"
    if kind == 4:
        code, body = server.ask("POST", TEXT, {"prompt": prompt, "max_tokens": 200, "stream": True, "ignore_eos": True}, pieces=1)
        return "left" if code == 200 and body.startswith(b"data: ") else f"left: {code} {body!r}"
    if kind == 5:
        code, body = server.ask("POST", "/v1/embeddings", {"input": [prompt, prompt[::-1]]})
        return "embedding" if code == 200 else f"embedding: {code} {body!r}"
    if kind == 6:
        chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "response_format": SCHEMA}
        code, body = server.ask("POST", "/v1/chat/completions", chat)
        return "schema" if code == 200 else f"schema: {code} {body!r}"
    code, body = server.ask("POST", TEXT, {"prompt": prompt, "n": -number})
    return "refused" if code == 400 else f"refused: {code} {body!r}"


def burst(server: Server, numbers: range, clients: int) -> Counter:
    outcomes, left, lock = Counter(), iter(numbers), threading.Lock()

    def client():
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            try:
                outcome = one(server, number)
            except (OSError, http.client.HTTPException) as error:
                outcome = repr(error)
            with lock:
                outcomes[outcome] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.settled()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    server = Server(arguments.program)
    try:
        warm = arguments.requests // 10
        wrong = burst(server, range(warm), arguments.clients)
        before, start = server.state(), time.monotonic()
        outcomes = burst(server, range(warm, warm + arguments.requests), arguments.clients)
        seconds, after = time.monotonic() - start, server.state()
        failed_passes = server.metric("ternion_failed_passes_total")
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(timeout=60)
    finally:
        server.process.kill()
    kinds = {"whole", "stream", "left", "embedding", "schema", "refused"}
    wrong = {outcome: count for outcome, count in (wrong + outcomes).items() if outcome not in kinds}
    print(json.dumps({
        "requests": outcomes.total(), "seconds": round(seconds), "outcomes": dict(outcomes), "before": before, "after": after,
        "failed_passes": failed_passes, "exit_code": code,
    }))
    grown = {name: after[name] - before[name] for name in before}
    bad = wrong or code or failed_passes or grown["files"] > 8 or grown["threads"] > 8 or grown["resident_kb"] > 64_000
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
