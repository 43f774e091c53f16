"""Everything that happens to a service in its life, with a real Consul agent and five real servers, under load: the
callers of idempotent calls notice nothing as long as two endpoints live."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import pytest

import meshlb
from meshlb import Cluster, Mesh, Retry, ServiceConfig
from meshlb.discovery import ConsulDiscovery
from tests.end_to_end.load import KINDS, Load, call_once, protocol
from tests.end_to_end.sockets import connections_to
from tests.support import leaks
from tests.support.backends import Backend, grpc_backends, http_backends
from tests.support.consul_agent import ConsulAgent
from tests.support.wait import eventually

SERVICE = "shop"
OTHER_NODE = "node-2"
CONFIG = ServiceConfig(retry=Retry(per_try_timeout=1.0))
"""per_try_timeout: an endpoint that hangs is left after so long."""


def ids(*backends: Backend) -> set[str]:
    return {backend.id for backend in backends}


class Registry:
    """The service's instances in Consul: on the agent's own node, or on another one."""

    def __init__(self, consul: ConsulAgent) -> None:
        self.consul = consul

    def add(self, *backends: Backend) -> None:
        for backend in backends:
            self.consul.register(SERVICE, backend.id, backend.host, backend.port)

    def remove(self, *backends: Backend) -> None:
        for backend in backends:
            self.consul.deregister(backend.id)

    def add_elsewhere(self, *backends: Backend) -> None:
        for backend in backends:
            service = {"Service": SERVICE, "ID": backend.id, "Address": backend.host, "Port": backend.port}
            self.consul.catalog_register(OTHER_NODE, "10.0.0.2", service)

    def remove_elsewhere(self, *backends: Backend) -> None:
        for backend in backends:
            self.consul.catalog_deregister(OTHER_NODE, backend.id)


@pytest.fixture
def consul() -> Iterator[ConsulAgent]:
    with ConsulAgent(mode="server") as agent:  # unlike -dev it keeps its data over a restart
        yield agent


@contextlib.contextmanager
def five(kind: str) -> Iterator[list[Backend]]:
    with http_backends(5) if protocol(kind) == "http" else grpc_backends(5) as backends:
        yield backends


def new_mesh(consul: ConsulAgent) -> Mesh:
    return Mesh(ConsulDiscovery(consul.address, empty_grace=1.0), defaults=CONFIG)


@pytest.mark.parametrize("kind", KINDS)
def test_life_of_a_service(kind: str, consul: ConsulAgent):
    registry = Registry(consul)
    with five(kind) as (a, b, c, d, e):
        registry.add(a, b, c)
        registry.add_elsewhere(d)
        warm_up(kind, consul)
        threads, files = set(threading.enumerate()), leaks.open_files()

        with new_mesh(consul) as mesh:
            cluster = mesh.cluster(SERVICE)
            with Load(kind, mesh, SERVICE) as load:
                load.settles(ids(a, b, c, d))

                # Registered.
                registry.add_elsewhere(e)
                load.reaches(e.id)
                load.settles(ids(a, b, c, d, e))

                # Critical, and passing again.
                consul.set_status(a.id, "critical", "by a test")
                load.settles(ids(b, c, d, e))
                consul.set_status(a.id, "passing")
                load.reaches(a.id)

                # Maintenance of a service, and of a whole node.
                consul.service_maintenance(b.id, True)
                load.settles(ids(a, c, d, e))
                consul.service_maintenance(b.id, False)
                load.reaches(b.id)
                consul.node_maintenance(True)
                load.settles(ids(d, e))
                consul.node_maintenance(False)
                load.settles(ids(a, b, c, d, e))

                # Killed while Consul thinks it is well, and back on its port.
                before = failures(cluster, c)
                c.kill()
                eventually(lambda: failures(cluster, c) > before, 20)
                load.settles(ids(a, b, d, e))
                c.restart()
                load.reaches(c.id, 40)

                # Frozen: it takes connections and calls, and answers none.
                before = failures(cluster, d)
                d.freeze()
                eventually(lambda: failures(cluster, d) > before, 20)
                load.settles(ids(a, b, c, e))
                d.thaw()
                load.reaches(d.id, 40)

                # The agent is restarted under the watch.
                consul.restart(wait=False)
                load.make(100)
                consul.wait_leader()
                load.settles(ids(a, b, c, d, e), 30)

                # The agent is gone; an endpoint dies meanwhile.
                consul.kill()
                load.make(100)
                before = failures(cluster, b)
                b.kill()
                eventually(lambda: failures(cluster, b) > before, 20)
                load.settles(ids(a, c, d, e))
                b.restart()
                consul.start()
                load.reaches(b.id, 40)

                # De-registered: the last connection to it is closed.
                registry.remove(a)
                load.settles(ids(b, c, d, e), 30)
                eventually(lambda: connections_to(a) == 0, 15, message="connections to a de-registered endpoint")
                assert connections_to(b) > 0
                load.check()

            assert load.left_tasks == []
            snapshot = cluster.snapshot()
            assert [row["in_flight"] for row in snapshot["endpoints"]] == [0] * 4, snapshot
            assert sum(row["calls"] for row in snapshot["endpoints"]) <= load.calls + snapshot["retries"]

            # All gone, and back.
            registry.remove(b, c)
            registry.remove_elsewhere(d, e)
            error = eventually(lambda: nobody_answers(kind, mesh), 30)
            assert f"'{SERVICE}'" in str(error)
            registry.add(a, b)
            with Load(kind, mesh, SERVICE) as load:
                load.settles(ids(a, b), 30)

        assert load.left_tasks == []
        assert_nothing_is_left(threads, files, [a, b, c, d, e])


def failures(cluster: Cluster, backend: Backend) -> int:
    """How many attempts on a backend have failed."""
    [row] = [row for row in cluster.snapshot()["endpoints"] if row["id"] == backend.id]
    return int(row["failures"])


def warm_up(kind: str, consul: ConsulAgent) -> None:
    """What libraries open once a process (gRPC's pollers, a resolver) is there before anything is counted."""
    with new_mesh(consul) as mesh, Load(kind, mesh, SERVICE) as load:
        load.make(20)


def nobody_answers(kind: str, mesh: Mesh) -> meshlb.NoEndpoints | None:
    try:
        call_once(kind, mesh, SERVICE)
    except meshlb.NoEndpoints as error:
        return error
    return None


def assert_nothing_is_left(threads: set[threading.Thread], files: int, backends: list[Backend]) -> None:
    gc.collect()
    eventually(lambda: set(threading.enumerate()) <= threads, message=lambda: str(threading.enumerate()))
    eventually(lambda: [connections_to(backend) for backend in backends] == [0] * len(backends))
    eventually(lambda: leaks.open_files() <= files, message=lambda: f"{leaks.open_files()} files, {files} before")
