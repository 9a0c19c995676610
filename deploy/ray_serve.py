"""ternion as a Ray Serve application: `serve run deploy.ray_serve:app`.

Each replica starts its own `ternion serve` on a free port of its node, waits until it is ready, and passes requests on as
they are, streams included. Ray routes, restarts and scales by the number of requests that wait. Needs `ray[serve]` and
`httpx`; settings come from the environment:

    TERNION            the program (default: ternion)
    TERNION_ARGUMENTS  what follows `serve`, for example "--threads 4 --model /models/2b4t.tern"
"""

import asyncio
import os
import shlex
import signal
import socket
import subprocess

import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_to_end(headers) -> dict:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}


@serve.deployment(
    ray_actor_options={"num_cpus": 4},
    max_ongoing_requests=64,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=90,
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 8},
)
class Ternion:
    async def __init__(self):
        port = free_port()
        program = os.environ.get("TERNION", "ternion")
        arguments = shlex.split(os.environ.get("TERNION_ARGUMENTS", ""))
        command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), *arguments]
        self.process = subprocess.Popen(command)
        # The server has its own limit of time.
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=httpx.Timeout(5, read=None))
        while not await self.is_ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"{shlex.join(command)} ended with code {self.process.returncode}")
            await asyncio.sleep(0.1)

    async def is_ready(self) -> bool:
        try:
            return (await self.client.get("/health/ready")).status_code == 200
        except httpx.HTTPError:
            return False

    async def check_health(self):
        if self.process.poll() is not None or not await self.is_ready():
            raise RuntimeError("the server is not ready")

    async def __call__(self, request: Request) -> Response:
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        passed = self.client.build_request(
            request.method, path, headers=end_to_end(request.headers), content=await request.body()
        )
        answer = await self.client.send(passed, stream=True)

        async def pieces():
            # A reader that goes away ends this generator, which closes the connection and frees the server's slot.
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()

        return StreamingResponse(pieces(), status_code=answer.status_code, headers=end_to_end(answer.headers))

    def __del__(self):
        process = getattr(self, "process", None)
        if process and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=80)


app = Ternion.bind()
