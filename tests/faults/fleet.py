"""A service under load, while somebody breaks parts of it, and the account of what its callers saw."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from meshlb import Breaker, Endpoint, Mesh, Retry, ServiceConfig
from meshlb._proto.echo_pb2 import EchoRequest
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.cluster import Cluster
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from meshlb.httpx import MeshTransport
from tests.support.backends import Backend, Kind, grpc_backends, http_backends
from tests.support.wait import eventually

PATIENCE = 30.0
"""Seconds until something must have happened that usually takes one."""

CALL_TIMEOUT = 30.0
"""Seconds for a call. No test waits for it: an endpoint that hangs is left by the time of one attempt."""


@dataclass
class Trial:
    """What came of a number of calls."""

    calls: int = 0
    errors: list[BaseException] = field(default_factory=list)
    answered_by: Counter[str] = field(default_factory=Counter)
    attempts: int = 0

    @property
    def attempts_per_call(self) -> float:
        """The load that was made of the callers'."""
        return self.attempts / self.calls


class Fleet:
    """One service, its callers in this process, and how they are protected."""

    def __init__(self, kind: Kind, mesh: Mesh, call: Callable[[], str]) -> None:
        self.kind: Kind = kind
        self.mesh = mesh
        self.cluster: Cluster = mesh.cluster("shop")
        self.cluster.wait_ready(PATIENCE)  # so that a test may change the set without being overtaken by the first one
        self.call = call
        """Make one call; the id of the server that answered."""

    def run(self, calls: int, threads: int = 4) -> Trial:
        """Make so many calls from several threads."""
        trial, lock = Trial(), threading.Lock()
        before = self.attempts()

        def one(_: int) -> None:
            try:
                backend = self.call()
            except Exception as error:
                with lock:
                    trial.errors.append(error)
            else:
                with lock:
                    trial.answered_by[backend] += 1

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(calls)))
        trial.calls = calls
        trial.attempts = self.attempts() - before
        return trial

    def run_until(self, condition: Callable[[], object], what: str) -> Trial:
        """Call on until something has happened."""
        total = Trial()

        def step() -> object:
            trial = self.run(20)
            total.calls += trial.calls
            total.errors += trial.errors
            total.answered_by += trial.answered_by
            total.attempts += trial.attempts
            return condition()

        eventually(step, PATIENCE, 0.0, what)
        return total

    def attempts(self) -> int:
        """Attempts begun so far, on whomever."""
        return sum(node.calls for node in self.cluster.nodes)

    def row(self, backend: Backend) -> dict[str, Any]:
        """What the snapshot says of a server."""
        (row,) = [row for row in self.cluster.snapshot()["endpoints"] if row["id"] == backend.id]
        return row

    def state(self, backend: Backend) -> str:
        return str(self.row(backend)["state"])

    def is_out(self, backend: Backend) -> bool:
        """Whether it gets no calls for what calls met with there (it may be probed at this moment)."""
        return self.state(backend) in {"open", "half_open", "ejected"}

    def assert_nothing_is_held(self) -> None:
        """Every lease has been closed, and every probe's place is free."""

        def held() -> dict[str, int]:
            return {
                row["address"]: row["in_flight"] for row in self.cluster.snapshot()["endpoints"] if row["in_flight"]
            }

        eventually(lambda: not held(), PATIENCE, 0.02, lambda: f"still in flight: {held()}")


def config(**changes: Any) -> ServiceConfig:
    """Protected as a service of short calls should be: an attempt that hangs is left after a time that a busy test
    machine needs for none that is well."""
    given: dict[str, Any] = {
        "retry": Retry(per_try_timeout=5.0, max_attempts=4),
        "breaker": Breaker(open_time=0.2, max_open_time=1.0),
    }
    return ServiceConfig(**(given | changes))


def start(kind: Kind, count: int) -> Any:
    """So many servers, as a context manager."""
    return (http_backends if kind == "http" else grpc_backends)(count)


def endpoints(backends: Iterable[Backend]) -> list[Endpoint]:
    return [Endpoint(backend.host, backend.port, id=backend.id) for backend in backends]


@contextmanager
def fleet(kind: Kind, backends: Sequence[Backend], settings: ServiceConfig | None = None) -> Iterator[Fleet]:
    """Callers of these servers; at the end nothing may be held any more."""
    settings = config() if settings is None else settings
    with Mesh(StaticDiscovery({"shop": endpoints(backends)}), defaults=settings) as mesh:
        if kind == "http":
            with httpx.Client(transport=MeshTransport(mesh), timeout=CALL_TIMEOUT) as client:

                def get() -> str:
                    answer = client.get("http://shop/").raise_for_status()
                    return str(answer.json()["backend"])

                running = Fleet(kind, mesh, get)
                yield running
                running.assert_nothing_is_held()
        else:
            with insecure_channel("consul:///shop", mesh=mesh) as channel:
                stub = EchoStub(channel)

                def say() -> str:
                    return str(stub.Say(EchoRequest(text="hello"), timeout=CALL_TIMEOUT).backend)

                running = Fleet(kind, mesh, say)
                yield running
                running.assert_nothing_is_held()
