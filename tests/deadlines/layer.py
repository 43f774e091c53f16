"""One of several layers, as a program: `python -m tests.deadlines.layer ADDRESS,...` calls those for each request.

Without an address it is the last layer, which answers what the path says (`/503`). It prints its own address. Each
answer's header `x-seen` holds how many attempts this layer has got, the milliseconds that the first said it had, and
which attempts they said they were; what the layers below said follows.
"""

from __future__ import annotations

import socket
import sys

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from meshlb import Mesh, Retry, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import AsyncMeshTransport
from meshlb.server.asgi import LoadReportMiddleware

HEADER = "x-envoy-expected-rq-timeout-ms"


class Layer:
    def __init__(self, below: list[str]) -> None:
        self.seen = 0
        self.first: str | None = None
        self.counts: list[str] = []
        self.client: httpx.AsyncClient | None = None
        if below:
            config = ServiceConfig(deadline_header=HEADER, retry=Retry(max_attempts=3))
            mesh = Mesh(StaticDiscovery({"below": below}), defaults=config)
            self.client = httpx.AsyncClient(transport=AsyncMeshTransport(mesh), timeout=60)

    async def answer(self, request: Request) -> Response:
        self.seen += 1
        self.first = self.first or request.headers.get(HEADER, "none")
        self.counts.append(request.headers.get("x-envoy-attempt-count", "-"))
        status = int(request.url.path[1:])
        below = ""
        if self.client is not None:
            try:
                answer = await self.client.get(f"http://below{request.url.path}")
            except httpx.HTTPError as error:
                return PlainTextResponse(str(error), 504, {"x-seen": self.say()})
            status, below = answer.status_code, answer.headers["x-seen"]
        return PlainTextResponse("done", status, {"x-seen": f"{self.say()} {below}".strip()})

    def say(self) -> str:
        return f"{self.seen}/{self.first}/{'+'.join(self.counts)}"


def main() -> None:
    layer = Layer(sys.argv[1].split(",") if sys.argv[1:] else [])
    app = LoadReportMiddleware(Starlette(routes=[Route("/{status:int}", layer.answer)]), deadline_header=HEADER)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, lifespan="off", http="h11", ws="none", log_config=None)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
