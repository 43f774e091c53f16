"""For the tests of programs that use meshlb: a mesh without registry, network or threads, under a clock that you move.

::

    from meshlb.testing import Answer, FakeClock, LocalMesh, ScriptedEndpoints

    def test_my_client_survives_a_bad_instance():
        with LocalMesh({"orders": ["10.0.0.1:80", "10.0.0.2:80"]}) as mesh:
            endpoints = ScriptedEndpoints({"10.0.0.1:80": 503, "10.0.0.2:80": Answer(200, json={"id": 42})})
            client = httpx.Client(transport=MeshTransport(mesh, transport_factory=endpoints))
            assert my_code(client) == 42
            mesh.clock.advance(30)            # breakers, drains and idle connections, without waiting

Everything is as in production (policies, leases, retries, breakers, panic), except for who provides instances, time and
the last hop.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json as json_module
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, Final

from meshlb.discovery import StaticDiscovery
from meshlb.mesh import Mesh

if TYPE_CHECKING:
    from meshlb.config import ServiceConfig
    from meshlb.discovery import ServiceQuery, Sink
    from meshlb.model import Endpoint
    from meshlb.watch import ClusterSink, PeersSink

__all__ = ["Answer", "FakeClock", "FakeTimer", "LocalMesh", "ScriptedEndpoints"]

_START: Final = 1_000.0
"""Seconds. Not 0, which would hide mistakes with times that were never set."""


class FakeTimer:
    """A callback that a FakeClock will make, unless cancelled first."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def fire(self) -> None:
        """Make the callback, once."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class FakeClock:
    """A monotonic clock (seconds) that stands still until it is told to ``advance``, and the timers that run by it."""

    def __init__(self, now: float = _START) -> None:
        self._now = now
        self._numbers = itertools.count()
        self._set: deque[tuple[float, int, FakeTimer]] = deque()
        self._due: list[tuple[float, int, FakeTimer]] = []

    def __call__(self) -> float:
        return self._now

    def call_later(self, delay: float, callback: Callable[[], object]) -> FakeTimer:
        """Have ``callback`` made once the clock has advanced by ``delay`` seconds, at the earliest by the next
        ``advance``. Takes no lock, so that even the garbage collector may call it."""
        timer = FakeTimer(callback)
        self._set.append((self._now + max(0.0, delay), next(self._numbers), timer))
        return timer

    def advance(self, seconds: float = 0.0) -> None:
        """Let time pass. Timers are made in order, each at its own time, on this thread; what they raise comes out
        here. ``advance()`` without time does what is due already. For one thread at a time.

        Raises ValueError for a negative time.
        """
        if seconds < 0:
            raise ValueError(f"seconds: {seconds!r} is negative, and a monotonic clock never goes back")
        until = self._now + seconds
        while True:
            while self._set:
                heapq.heappush(self._due, self._set.popleft())
            if not self._due or self._due[0][0] > until:
                break
            when, _, timer = heapq.heappop(self._due)
            self._now = max(self._now, when)
            timer.fire()
        self._now = max(self._now, until)


class _LocalDiscovery(StaticDiscovery):
    """A static list that needs no event loop to be watched."""

    def attach(self, query: ServiceQuery, sink: Sink) -> None:
        """Report the instances now, and again after each ``update``."""
        with self._lock:
            self._watches.append((query, sink))
            self._report(query, sink)


class LocalMesh(Mesh):
    """A mesh over fixed instances that starts no thread: what the control loop would do happens in ``clock.advance``.

    ``services``: as for ``StaticDiscovery``; ``update`` changes them. ``seed``: of everything that is drawn at random,
    so that a test always goes the same way. ``settings``: further arguments of ``Mesh`` (``defaults``, ``services``
    as ``configs``, ``tracer_provider``, ...). Active health checks are not made: endpoints are as good as their status.

    Pauses between attempts on one and the same endpoint are really slept (25 to 250 ms); ``Retry(wait=wait_none())``
    takes them out. For gRPC futures and streams, whose timeouts and retries need a control loop, take a
    ``Mesh(StaticDiscovery(...))``.
    """

    clock: FakeClock
    """Moves only when told to."""

    def __init__(
        self,
        services: Mapping[str, Iterable[str | Endpoint]],
        *,
        clock: FakeClock | None = None,
        seed: int = 1,
        configs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self._instances = _LocalDiscovery(services)
        super().__init__(
            self._instances,
            services=configs,
            clock=FakeClock() if clock is None else clock,
            random=Random(seed),
            **settings,
        )

    def update(self, service: str, addresses: Iterable[str | Endpoint]) -> None:
        """Replace the instances of a service, as the registry would report it."""
        self._instances.update(service, addresses)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> bool:
        """Call in the next ``clock.advance``."""
        self.clock.call_later(0.0, lambda: callback(*args))
        return True

    def call_later(self, delay: float, callback: Callable[[], object]) -> Any:
        """Call once the clock has advanced by ``delay`` seconds; returns a FakeTimer."""
        return self.clock.call_later(delay, callback)

    def _config_of(self, query: ServiceQuery) -> ServiceConfig:
        # Nobody makes active checks here, which a service that waits for its first ones would do for ever.
        return dataclasses.replace(super()._config_of(query), health_check=None)

    def _watch(
        self,
        query: ServiceQuery,
        sink: ClusterSink | PeersSink,
        key: ServiceQuery | PeersSink,
        watch: Callable[..., Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._instances.attach(query, sink)


class Answer:
    """What a scripted endpoint does with a request: respond with ``status``, or raise ``error``.

    ``latency``: seconds that pass on the clock before. The body is ``content``, or ``json`` as JSON.
    """

    __slots__ = ("content", "error", "headers", "latency", "status")

    def __init__(
        self,
        status: int = 200,
        *,
        content: bytes = b"",
        json: object = None,
        headers: Mapping[str, str] | None = None,
        latency: float = 0.0,
        error: BaseException | type[BaseException] | None = None,
    ) -> None:
        self.status = status
        self.content = content
        self.headers = dict(headers or {})
        self.latency = latency
        self.error = error
        if json is not None:
            self.content = json_module.dumps(json).encode()
            self.headers.setdefault("Content-Type", "application/json")


Step = Answer | int | BaseException | type[BaseException]
"""One answer of a script; a status or an exception alone stands for the Answer with it."""


class ScriptedEndpoints:
    """Endpoints without sockets: ``MeshTransport(mesh, transport_factory=ScriptedEndpoints({...}))``.

    Serves ``meshlb.httpx`` and ``meshlb.httpx2``, sync and async. ``scripts`` maps an address ("10.0.0.1:80") to a
    step, or to a list of them that are taken in order, the last one for ever. An address without a script answers 200.
    ``clock``: what an ``Answer``'s latency passes on; without one it takes no time.

    ``calls``: the address and the request of every attempt so far, in order.
    """

    def __init__(self, scripts: Mapping[str, Step | Iterable[Step]] | None = None, *, clock: FakeClock | None = None):
        self.calls: list[tuple[str, Any]] = []
        self._clock = clock
        self._lock = threading.Lock()
        self._scripts: dict[str, deque[Answer]] = {}
        for address, steps in (scripts or {}).items():
            self.script(address, *(steps if isinstance(steps, Iterable) else (steps,)))

    def script(self, address: str, *steps: Step) -> None:
        """Say what an endpoint does from now on."""
        if not steps:
            raise ValueError(f"the script of {address} has no step")
        with self._lock:
            self._scripts[address] = deque(_answer(step) for step in steps)

    @property
    def addresses(self) -> list[str]:
        """The address of every attempt so far, in order."""
        return [address for address, _ in self.calls]

    def __call__(self, endpoint: Endpoint) -> ScriptedTransport:
        """The inner transport for an endpoint."""
        return ScriptedTransport(self, endpoint.address)

    def answer(self, address: str, request: Any) -> Any:
        """Do the next step of an endpoint's script: the response, or what is raised."""
        with self._lock:
            self.calls.append((address, request))
            steps = self._scripts.get(address)
            step = _OK if not steps else steps[0] if len(steps) == 1 else steps.popleft()
        if step.latency and self._clock is not None:
            self._clock.advance(step.latency)
        error = step.error
        if error is not None:
            # A class is given what httpx's want: a message. An object may be raised many times.
            raise error("scripted") if isinstance(error, type) else error.with_traceback(None)
        library = sys.modules[type(request).__module__.partition(".")[0]]  # httpx or httpx2: whoever asks
        headers = {"Content-Length": str(len(step.content)), **step.headers}
        # As a stream, so that the attempt ends when the response is read or closed, as it does with a real server.
        return library.Response(step.status, headers=headers, stream=library.ByteStream(step.content))


class ScriptedTransport:
    """One endpoint's inner transport, sync and async."""

    def __init__(self, endpoints: ScriptedEndpoints, address: str) -> None:
        self._endpoints = endpoints
        self._address = address

    def handle_request(self, request: Any) -> Any:
        return self._endpoints.answer(self._address, request)

    async def handle_async_request(self, request: Any) -> Any:
        return self._endpoints.answer(self._address, request)

    def close(self) -> None:
        """Nothing to close."""

    async def aclose(self) -> None:
        """Nothing to close."""


_OK: Final = Answer()


def _answer(step: Step) -> Answer:
    if isinstance(step, Answer):
        return step
    return Answer(step) if isinstance(step, int) else Answer(error=step)
