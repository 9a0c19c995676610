"""Restarts replicas one after the other under load, behind a real proxy; no request may fail.

    python rolling_restart.py PROGRAM --proxy nginx|haproxy [--clients 16] [--rounds 2]

starts two replicas and the proxy with the configuration in `deploy/` (other ports, all on loopback), lets clients ask
without pause, half of them for streams, and sends each replica a SIGTERM, waits until it has ended and starts it anew,
round by round. An answer counts if its status is 200 and it is whole. Prints one JSON object; the exit code is 1 if a
request failed or a replica did not end with code 0. Needs nothing but Python and the proxy (Debian: nginx-light, haproxy).
"""

import argparse
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

DEPLOY = Path(__file__).parents[3] / "deploy"
PROXIES = {
    "nginx": ("nginx.conf", lambda file, home: ["nginx", "-p", str(home), "-c", str(file), "-g", "daemon off; pid nginx.pid; error_log stderr;"]),
    "haproxy": ("haproxy.cfg", lambda file, home: ["haproxy", "-q", "-f", str(file)]),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def wait_until(ready, what: str, seconds: float = 120):
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {seconds} s")
        time.sleep(0.05)


class Replica:
    def __init__(self, program: str, port: int):
        self.command = [
            program, "serve", "--port", str(port), "--rate-limit", "0", "--threads", "1", "--parallel", "8",
            "--drain-delay", "2s", "--drain", "60s",
        ]
        self.port = port
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        wait_until(lambda: status(self.port, "/health/ready") == 200, f"replica at {self.port}")

    def restart(self) -> tuple[int, float]:
        """Its exit code, and the seconds that it took to end."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=90)
        seconds = time.monotonic() - start
        self.start()
        return code, seconds


class Client(threading.Thread):
    """Asks without pause, over connections that are used for a few requests each, as real clients do."""

    def __init__(self, port: int, number: int, stop: threading.Event):
        super().__init__(daemon=True)
        self.port, self.number, self.stop = port, number, stop
        self.outcomes, self.times = Counter(), []

    def run(self):
        connection, asked = None, 0
        while not self.stop.is_set():
            if asked % 5 == 0:
                if connection:
                    connection.close()
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            asked += 1
            stream = self.number % 2 == 0
            body = {"prompt": "Once upon a time", "max_tokens": 200, "seed": self.number * 100_000 + asked, "temperature": 0.9, "stream": stream}
            start = time.monotonic()
            try:
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
                whole = content.rstrip().endswith(b"data: [DONE]") and b'"error"' not in content if stream else b'"usage"' in content
                self.outcomes["ok" if answer.status == 200 and whole else f"status {answer.status}: {content[-200:]!r}"] += 1
            except (OSError, http.client.HTTPException) as error:
                self.outcomes[repr(error)] += 1
                connection.close()
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            self.times.append(time.monotonic() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--proxy", choices=PROXIES, default="nginx")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    name, command = PROXIES[arguments.proxy]
    public, *ports = (free_port() for _ in range(3))
    text = (DEPLOY / name).read_text()
    for known, port in zip(["8080", "8081", "8082"], [public, *ports]):
        text = re.sub(rf"127\.0\.0\.1:{known}\b", f"127.0.0.1:{port}", text)
    replicas, proxy, clients, stop = [], None, [], threading.Event()
    with tempfile.TemporaryDirectory() as home:
        try:
            replicas = [Replica(arguments.program, port) for port in ports]
            (Path(home) / name).write_text(text)
            proxy = subprocess.Popen(command(Path(home) / name, home), stderr=subprocess.DEVNULL)
            wait_until(lambda: status(public, "/health/ready") == 200, arguments.proxy, 10)
            for path in ["/metrics", "/admin/report.json"]:
                assert status(public, path) == 403, f"{path} can be read through {arguments.proxy}"
            clients = [Client(public, number, stop) for number in range(arguments.clients)]
            for client in clients:
                client.start()
            time.sleep(3)
            restarts = [replica.restart() for _ in range(arguments.rounds) for replica in replicas]
            time.sleep(3)
            stop.set()
            for client in clients:
                client.join(timeout=120)
        finally:
            for process in [proxy, *(replica.process for replica in replicas)]:
                if process and process.poll() is None:
                    process.terminate()
                    process.wait(timeout=90)
    outcomes = sum((client.outcomes for client in clients), Counter())
    times = sorted(time for client in clients for time in client.times)
    good = outcomes.pop("ok", 0)
    print(json.dumps({
        "proxy": arguments.proxy, "clients": arguments.clients, "restarts": len(restarts), "requests": len(times), "whole": good,
        "failed": dict(outcomes), "exit_codes": sorted({code for code, _ in restarts}),
        "seconds_to_end": [round(seconds, 1) for _, seconds in restarts],
        "p50_ms": round(1000 * times[len(times) // 2]), "p99_ms": round(1000 * times[len(times) * 99 // 100]),
    }))
    return int(bool(outcomes) or good == 0 or any(code for code, _ in restarts))


if __name__ == "__main__":
    sys.exit(main())
