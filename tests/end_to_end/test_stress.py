"""32 threads and 4 event loops on one mesh, while endpoints come and go in Consul: every count adds up."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

from meshlb import Cluster, Mesh, ServiceConfig
from meshlb.discovery import ConsulDiscovery
from meshlb.node import Node
from tests.end_to_end.load import Load
from tests.support.backends import Backend, grpc_backends, http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.registered import registered
from tests.support.wait import eventually

CHANGES = 60
THREADS = 16
TASKS = 16
PACE = 0.05


class Witness:
    """Every endpoint state that a cluster ever had: those in the set, and those that have left it for good."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._gone: list[Node] = []
        cluster.add_listener(self)

    def endpoint_removed(self, node: Node) -> None:
        self._gone.append(node)

    def nodes(self) -> set[Node]:
        return {*self._gone, *self._cluster.nodes}

    def total(self, count: str) -> int:
        return sum(getattr(node, count) for node in self.nodes())


@contextlib.contextmanager
def loads(mesh: Mesh) -> Iterator[dict[str, list[Load]]]:
    """Sync and async callers of both services: 32 threads that call, and 4 event loops."""
    http = [
        Load("httpx", mesh, "stress-http", callers=THREADS, pace=PACE),
        Load("httpx-async", mesh, "stress-http", callers=TASKS, loops=2, pace=PACE),
    ]
    grpc = [
        Load("grpc", mesh, "stress-grpc", callers=THREADS, pace=PACE),
        Load("grpc-aio", mesh, "stress-grpc", callers=TASKS, loops=2, pace=PACE),
    ]
    with contextlib.ExitStack() as stack:
        for load in [*http, *grpc]:
            stack.enter_context(load)
        yield {"stress-http": http, "stress-grpc": grpc}


def come_and_go(consul: ConsulAgent, services: dict[str, list[Backend]], running: list[Load]) -> None:
    """Take the instances out and put them back, one or two at a time, a few calls apart."""
    for change, number in zip(range(CHANGES), itertools.cycle(range(5)), strict=False):
        for service, backends in services.items():
            consul.deregister(backends[number].id)
            back = backends[number - 1]
            consul.register(service, back.id, back.host, back.port)
        if change % 10 == 0:
            for load in running:
                load.make(5)


def test_every_count_adds_up(consul_agent: ConsulAgent):
    with (
        http_backends(5) as http,
        grpc_backends(5) as grpc,
        registered(consul_agent, "stress-http", http),
        registered(consul_agent, "stress-grpc", grpc),
        Mesh(
            ConsulDiscovery(consul_agent.address, min_refresh_interval=0),  # every change is seen
            defaults=ServiceConfig(connect_timeout=20),  # on a busy machine a second may not be enough
        ) as mesh,
    ):
        services = {"stress-http": http, "stress-grpc": grpc}
        witnesses = {service: Witness(mesh.cluster(service)) for service in services}
        with loads(mesh) as running:
            everybody = [load for group in running.values() for load in group]
            for load in everybody:
                load.make(10)
            come_and_go(consul_agent, services, everybody)
            for load in everybody:
                load.make(10)
                load.check()

        for service, backends in services.items():
            witness, cluster = witnesses[service], mesh.cluster(service)
            eventually(lambda witness=witness: witness.total("in_flight") == 0)
            calls = sum(load.calls for load in running[service])
            assert cluster.snapshot()["version"] > CHANGES / 2, "the endpoints did not come and go"
            assert witness.total("successes") == calls
            assert witness.total("failures") == witness.total("overloads") == 0
            assert witness.total("calls") == calls + cluster.snapshot()["retries"]
            assert witness.total("calls") == witness.total("successes") + witness.total("ignored")
            assert sum(backend.requests() for backend in backends) == calls
        assert [load.left_tasks for load in everybody] == [[]] * 4
