"""One way to drive all the clients: httpx and httpx2, blocking, on asyncio and on trio.

A test is written once, with blocking calls; the async clients run on a loop in a thread of their own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from meshlb import Endpoint, Mesh, Retry, ServiceConfig
from meshlb.discovery import StaticDiscovery


@dataclass(frozen=True)
class Driver:
    """``module``: httpx or httpx2; ``adapter``: meshlb's module for it; ``portal``: None for blocking clients."""

    module: ModuleType
    adapter: ModuleType
    portal: BlockingPortal | None

    @property
    def is_async(self) -> bool:
        return self.portal is not None

    def transport(self, *args: Any, **options: Any) -> Any:
        kind = self.adapter.AsyncMeshTransport if self.is_async else self.adapter.MeshTransport
        return kind(*args, **options)

    @contextlib.contextmanager
    def client(self, transport: Any = None, **options: Any) -> Iterator[Client]:
        kind = self.module.AsyncClient if self.is_async else self.module.Client
        options.setdefault("timeout", 30)
        client = kind(transport=transport, **options)
        try:
            yield Client(self, client)
        finally:
            self.run(client.aclose if self.is_async else client.close)

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a method of the client, or of something that it gave."""
        if self.portal is None:
            return function(*args, **options)
        return self.portal.call(functools.partial(function, *args, **options))

    def close(self, response: Any) -> None:
        self.run(response.aclose if self.is_async else response.close)

    def read(self, response: Any) -> bytes:
        body: bytes = self.run(response.aread if self.is_async else response.read)
        return body

    def first_chunk(self, response: Any) -> bytes:
        """Begin to read a streamed body, and keep the iterator alive in the response."""
        if not self.is_async:
            response.chunks = response.iter_raw()
            chunk: bytes = next(response.chunks)
            return chunk

        async def first() -> bytes:
            response.chunks = response.aiter_raw()
            chunk: bytes = await anext(response.chunks)
            return chunk

        return bytes(self.run(first))


class Client:
    """A client of whatever kind, with blocking methods."""

    def __init__(self, driver: Driver, client: Any) -> None:
        self.driver = driver
        self.client = client

    def request(self, method: str, url: str, **options: Any) -> Any:
        return self.driver.run(self.client.request, method, url, **options)

    def get(self, url: str, **options: Any) -> Any:
        return self.request("GET", url, **options)

    def post(self, url: str, **options: Any) -> Any:
        return self.request("POST", url, **options)

    def stream(self, method: str, url: str, **options: Any) -> Any:
        """A response whose body has not been read; the test closes it."""
        return self.driver.run(self.client.send, self.client.build_request(method, url, **options), stream=True)


@contextlib.contextmanager
def drive(package: str, kind: str) -> Iterator[Driver]:
    """``kind``: sync, asyncio or trio."""
    import importlib

    module, adapter = importlib.import_module(package), importlib.import_module(f"meshlb.{package}")
    if kind == "sync":
        yield Driver(module, adapter, None)
        return
    with start_blocking_portal(kind) as portal:
        yield Driver(module, adapter, portal)


def mesh_of(*backends: Any, services: dict[str, Any] | None = None, **settings: Any) -> Mesh:
    """A mesh whose service "orders" is the backends, tried in this order (see InOrder)."""
    settings.setdefault("policy", InOrder())
    settings.setdefault("breaker", None)
    settings.setdefault("connect_timeout", 10.0)  # on a busy machine, a second may pass before loopback answers
    known = {"orders": [backend if isinstance(backend, Endpoint) else backend.address for backend in backends]}
    return Mesh(StaticDiscovery({**known, **(services or {})}), defaults=ServiceConfig(**settings))


def patient(**settings: Any) -> Retry:
    """A Retry without a budget, for tests that fail more than a program may."""
    return Retry(**{"budget": None, **settings})


def in_flight(mesh: Mesh) -> int:
    """Leases that are open, in all services."""
    return sum(endpoint["in_flight"] for snapshot in mesh.snapshot() for endpoint in snapshot["endpoints"])


@dataclass(frozen=True)
class InOrder:
    """A policy of the user's own: the first endpoint of the list that has not been tried. So a test knows who is."""

    name = "in_order"

    def build(self, candidates: Any, environment: Any, previous: Any) -> Any:
        return InOrderPicker(candidates)


class InOrderPicker:
    def __init__(self, candidates: Any) -> None:
        self._candidates = tuple(candidates)

    def pick(self, call: Any) -> Any:
        return next((candidate for candidate in self._candidates if candidate not in call.excluded), None)
