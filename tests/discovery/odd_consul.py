"""A real HTTP server on loopback that answers as a broken, overloaded or very old Consul might."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.parse
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

HANG = b"hang"
"""Say nothing until the caller goes away."""


@dataclass
class Request:
    """What came in."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def params(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def index(self) -> str | None:
        return self.params.get("index")


@dataclass
class OddConsul:
    """Give ``answers`` one after the other, then the ``last`` one for ever; bytes on the wire, or a function of them.

    ``requests`` are those for /v1/health; everything else is answered with 404, as by a Consul that does not know it.
    """

    last: bytes = HANG
    answers: list[bytes] = field(default_factory=list)
    elsewhere: Callable[[Request], bytes] | None = None
    requests: list[Request] = field(default_factory=list)
    gone: int = 0
    """Callers that went away while they were made to hang."""
    address: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while request := await self._read(reader):
                answer = self._answer(request)
                if answer is HANG:
                    await reader.read()
                    self.gone += 1
                    break
                writer.write(answer)
                await writer.drain()
                if b"Connection: close" in answer or not answer.startswith(b"HTTP/1.1 "):
                    break
        writer.close()

    def _answer(self, request: Request) -> bytes:
        if not request.path.startswith("/v1/health/"):
            return reply(404, b"") if self.elsewhere is None else self.elsewhere(request)
        self.requests.append(request)
        return self.answers.pop(0) if self.answers else self.last

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, *lines = head.decode().split("\r\n")
        method, target, _ = line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines) if name}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(method, target, headers, body)


@contextlib.asynccontextmanager
async def odd_consul(
    last: bytes = HANG, answers: list[bytes] | None = None, *, socket: str | None = None, port: int = 0
) -> AsyncIterator[OddConsul]:
    """Serve for the length of the block, on a unix socket if ``socket`` is its path."""
    consul = OddConsul(last, list(answers or []))
    if socket is None:
        server = await asyncio.start_server(consul.serve, "127.0.0.1", port)
        consul.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    else:
        server = await asyncio.start_unix_server(consul.serve, socket)
        consul.address = f"unix://{socket}"
    tasks = asyncio.all_tasks()
    try:
        yield consul
    finally:
        server.close()
        for task in asyncio.all_tasks() - tasks:
            if getattr(task.get_coro(), "__qualname__", "") == "OddConsul.serve":
                task.cancel()


def reply(status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> bytes:
    """One HTTP/1.1 answer."""
    fields = {"Content-Length": str(len(body) if length is None else length)} | (headers or {})
    lines = [f"HTTP/1.1 {status} Text", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def good(index: int | str | None, *ports: int, headers: dict[str, str] | None = None) -> bytes:
    """A good answer: one instance per port."""
    entries = [
        {
            "Node": {"Node": "n1", "Address": "127.0.0.1", "Datacenter": "dc1"},
            "Service": {"ID": f"web-{port}", "Service": "web", "Port": port},
            "Checks": [],
        }
        for port in ports
    ]
    found = {} if index is None else {"X-Consul-Index": str(index)}
    return reply(200, json.dumps(entries).encode(), found | (headers or {}))
