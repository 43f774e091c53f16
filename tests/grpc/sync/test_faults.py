"""Five real servers under load while one of them is killed, frozen, restarted: idempotent calls see nothing of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from meshlb import Mesh, Retry, ServiceConfig
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from tests.grpc.sync.conftest import in_flight
from tests.support.backends import Backend, grpc_backends
from tests.support.wait import eventually

REQUEST = echo_pb2.EchoRequest(text="x", count=3)
RETRY = Retry(per_try_timeout=1.0, budget=None, idempotent_methods=("/meshlb.demo.v1.Echo/*",))
CALLS: tuple[Callable[[Any], Any], ...] = (
    lambda stub: stub.Say(REQUEST, timeout=20).backend,
    lambda stub: stub.Say.future(REQUEST, timeout=20).result().backend,
    # Short streams: one that has begun cannot be saved.
    lambda stub: next(iter(stub.Watch(REQUEST, timeout=20))).backend,
    lambda stub: stub.Collect(iter([REQUEST, REQUEST]), timeout=20).backend,
    lambda stub: next(iter(stub.Chat(iter([REQUEST]), timeout=20))).backend,
)


class Load:
    """Threads that call until told to stop."""

    def __init__(self, stub: Any) -> None:
        self.errors: list[BaseException] = []
        self.backends: Counter[str] = Counter()
        self._stub = stub
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(4)]

    def _run(self, number: int) -> None:
        while not self._over.is_set():
            for call in CALLS:
                try:
                    self.backends[call(self._stub)] += 1
                except BaseException as error:
                    self.errors.append(error)

    def more(self, calls: int = 60) -> None:
        """Wait until so many further calls have been made."""
        goal = self.backends.total() + calls
        eventually(lambda: self.backends.total() >= goal or self.errors, timeout=40)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def loaded(policy: str = "least_response_time") -> Iterator[tuple[list[Backend], Load, Any]]:
    with grpc_backends(5) as backends:
        addresses = [backend.address for backend in backends]
        config = ServiceConfig(policy=policy, retry=RETRY)
        with Mesh(StaticDiscovery({"echo": addresses}), defaults=config) as mesh:
            mesh.cluster("echo").wait_ready(5)
            with insecure_channel("echo", mesh=mesh) as channel:
                with Load(echo_pb2_grpc.EchoStub(channel)) as load:
                    load.more()
                    yield backends, load, channel
                    load.more()
                assert load.errors == []
                eventually(lambda: in_flight(mesh) == 0)
                assert len(channel._resources) <= 5
            assert len(channel._resources) == 0


def gets_calls_again(load: Load, backend: Backend) -> None:
    before = load.backends[backend.id]
    eventually(lambda: load.backends[backend.id] > before or load.errors, timeout=40)


@pytest.mark.parametrize("policy", ["round_robin", "least_response_time"])
def test_killed_and_restarted(policy: str) -> None:
    with loaded(policy) as (backends, load, _):
        backends[0].kill()
        load.more()
        backends[0].start()
        gets_calls_again(load, backends[0])
        backends[1].restart()
        gets_calls_again(load, backends[1])


def test_frozen_and_thawed() -> None:
    with loaded() as (backends, load, channel):
        node = next(node for node in channel.cluster.nodes if node.endpoint.address == backends[0].address)
        backends[0].freeze()
        eventually(lambda: node.ejected or load.errors, timeout=40)
        load.more()
        backends[0].thaw()
        gets_calls_again(load, backends[0])


def test_fails_fast_and_attracts_nothing() -> None:
    with loaded() as (backends, load, _):
        backends[0].behave(code="UNAVAILABLE")
        load.more(300)
        backends[0].stats(clear=True)
        load.more(300)
        assert backends[0].requests() < 100
        backends[0].behave()
        gets_calls_again(load, backends[0])


def test_rolling_restart() -> None:
    with loaded() as (backends, load, _):
        for backend in backends[:3]:
            backend.terminate()
            backend.restart()
            gets_calls_again(load, backend)
