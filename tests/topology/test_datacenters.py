"""Two real Consul datacenters: instances that fail in one of them, and agents that do."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from meshlb import Breaker, Failover, Mesh, ServiceConfig, Zones
from meshlb.discovery import ConsulDiscovery
from meshlb.httpx import MeshTransport
from tests.support.backends import Backend, http_backends
from tests.support.consul_datacenters import ConsulDatacenters, DatacenterServer
from tests.support.wait import eventually

pytestmark = pytest.mark.consul


@pytest.fixture(scope="module")
def datacenters() -> Iterator[list[DatacenterServer]]:
    with ConsulDatacenters("dc1", "dc2", node_meta={"zone": "a"}) as servers:
        yield servers


@pytest.fixture
def backends() -> Iterator[list[Backend]]:
    with http_backends(4) as started:
        yield started


class Caller:
    """Calls a service over and over on a thread of its own, and counts who answered, and what went wrong."""

    def __init__(self, mesh: Mesh, service: str) -> None:
        self.answers: Counter[str] = Counter()
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._client = httpx.Client(transport=MeshTransport(mesh), timeout=20)
        self._url = f"http://{service}/"
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                response = self._client.get(self._url)
            except Exception as error:
                self.errors.append(repr(error))
            else:
                self.answers[response.headers["x-backend"]] += 1
                if response.status_code != 200:
                    self.errors.append(f"{response.status_code} from {response.headers['x-backend']}")
            self._stop.wait(0.002)

    def goes_to(self, *backends: Backend) -> bool:
        """Wait until the next twenty calls go to these alone."""

        def settled() -> bool:
            before = Counter(self.answers)
            eventually(
                lambda: self.answers.total() >= before.total() + 20, timeout=30, message=lambda: str(self.errors)
            )
            return set(self.answers - before) <= {backend.id for backend in backends}

        return eventually(settled, timeout=40, message=lambda: f"{self.answers}, {self.errors}")

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


@contextlib.contextmanager
def service(
    datacenters: list[DatacenterServer], backends: list[Backend], name: str, failover: Failover
) -> Iterator[tuple[Mesh, Caller]]:
    """Two instances in each datacenter, called from the first one."""
    dc1, dc2 = datacenters
    for i, backend in enumerate(backends):
        (dc1, dc2)[i // 2].register(name, f"{name}-{i}", backend.host, backend.port)
    config = ServiceConfig(policy="round_robin", failover=failover, breaker=Breaker(open_time=0.2, max_open_time=0.5))
    try:
        with Mesh(ConsulDiscovery(dc1.address, min_refresh_interval=0), defaults=config) as mesh:
            mesh.cluster(name).wait_ready(30)
            with Caller(mesh, name) as caller:
                yield mesh, caller
    finally:
        for i in range(len(backends)):
            (dc1, dc2)[i // 2].deregister(f"{name}-{i}")


def share(mesh: Mesh, name: str, tier: int = 0) -> float:
    tiers = mesh.cluster(name).snapshot()["tiers"]
    found: float = tiers[tier]["share"]
    return found


def test_failing_over_and_back(datacenters: list[DatacenterServer], backends: list[Backend], service_name: str) -> None:
    """By the registry and by dead instances; while the primary flaps, nothing moves; and nobody sees an error."""
    dc1, _ = datacenters
    failover = Failover(datacenters=["dc1", "dc2"], failback_delay=3.0, ramp=0.5)
    with service(datacenters, backends, service_name, failover) as (mesh, caller):
        assert caller.goes_to(*backends[:2])
        assert share(mesh, service_name) == 1.0

        # One of two instances is less than 1 / 1.4: the second datacenter is asked, and gets nothing yet.
        dc1.set_status(f"{service_name}-0", "critical")
        eventually(lambda: mesh.cluster(service_name).snapshot()["tiers"][1]["healthy"] == 2, timeout=30)
        assert caller.goes_to(backends[1])
        backends[1].kill()
        assert caller.goes_to(*backends[2:])
        dc1.set_status(f"{service_name}-1", "critical")  # its check has noticed
        eventually(lambda: mesh.cluster(service_name).snapshot()["tiers"][0]["healthy"] == 0, timeout=30)

        # The primary flaps: one instance comes and goes. (On a host that stands still it may be up for longer than the
        # delay; what happens then is not looked at.)
        for _ in range(8):
            up_since = time.monotonic()
            dc1.set_status(f"{service_name}-0", "passing")
            seen = caller.answers.total()
            eventually(lambda: caller.answers.total() > seen + 100, timeout=30)  # noqa: B023  # called at once
            now = share(mesh, service_name)
            assert now == 0.0 or time.monotonic() - up_since > failover.failback_delay
            dc1.set_status(f"{service_name}-0", "critical")
            eventually(lambda: mesh.cluster(service_name).snapshot()["tiers"][0]["healthy"] == 0, timeout=30)
            assert caller.goes_to(*backends[2:])

        # It comes back for good.
        backends[1].restart()
        dc1.set_status(f"{service_name}-0", "passing")
        dc1.set_status(f"{service_name}-1", "passing")
        assert caller.goes_to(*backends[:2])
        eventually(lambda: share(mesh, service_name) == 1.0, timeout=30)
        assert caller.errors == []


def test_the_agents_death_changes_nothing(backends: list[Backend], service_name: str) -> None:
    failover = Failover(datacenters=["dc1", "dc2"], failback_delay=1.0, ramp=0.0, prefetch=True)
    with (
        ConsulDatacenters("dc1", "dc2") as servers,
        service(servers, backends, service_name, failover) as (mesh, caller),
    ):
        cluster = mesh.cluster(service_name)
        eventually(lambda: [tier["healthy"] for tier in cluster.snapshot()["tiers"]] == [2, 2], timeout=30)
        servers[0].kill()
        eventually(lambda: cluster.snapshot()["last_error"], timeout=30)
        assert caller.goes_to(*backends[:2])
        # Nobody is there to say that the instances die, and the other datacenter is known all the same.
        for backend in backends[:2]:
            backend.kill()
        assert caller.goes_to(*backends[2:])
        for backend in backends[:2]:
            backend.restart()
        assert caller.goes_to(*backends[:2])
        assert caller.errors == []
        servers[0].restart()


def test_active_active_by_weight(
    datacenters: list[DatacenterServer], backends: list[Backend], service_name: str
) -> None:
    weights = {"dc1": 3.0, "dc2": 1.0}
    failover = Failover(datacenters=["dc1", "dc2"], mode="active_active", weights=weights)
    with service(datacenters, backends, service_name, failover) as (mesh, caller):
        eventually(lambda: share(mesh, service_name, 1) == 0.25, timeout=30)
        before = Counter(caller.answers)
        eventually(lambda: caller.answers.total() >= before.total() + 200, timeout=60)
        counts = caller.answers - before
        first = counts[backends[0].id] + counts[backends[1].id]
        assert abs(first / counts.total() - 0.75) < 0.05
        datacenters[0].set_status(f"{service_name}-0", "critical")
        datacenters[0].set_status(f"{service_name}-1", "critical")
        assert caller.goes_to(*backends[2:])
        assert caller.errors == []


def test_a_primary_that_nobody_knows_of(
    datacenters: list[DatacenterServer], backends: list[Backend], service_name: str
) -> None:
    """A datacenter that does not exist, and one that has no such service, are passed over at the first call."""
    _, dc2 = datacenters
    dc2.register(service_name, "only", backends[3].host, backends[3].port)
    try:
        for order in (["nowhere", "dc1", "dc2"], ["dc1", "dc2"]):
            config = ServiceConfig(failover=Failover(datacenters=order))
            with (
                Mesh(ConsulDiscovery(datacenters[0].address), defaults=config) as mesh,
                httpx.Client(transport=MeshTransport(mesh)) as client,
            ):
                assert client.get(f"http://{service_name}/").headers["x-backend"] == backends[3].id
                assert share(mesh, service_name, len(order) - 1) == 1.0
    finally:
        dc2.deregister("only")


def test_the_loss_of_a_zone_spills(
    datacenters: list[DatacenterServer], backends: list[Backend], service_name: str
) -> None:
    """This process's zone is its agent's; its own service has a caller in each zone, so all its calls may stay."""
    dc1, _ = datacenters
    own = f"{service_name}-caller"
    for port, zone in enumerate("ab", 9):
        dc1.register(own, f"{own}-{zone}", "127.0.0.1", port, meta={"zone": zone})
    for i, backend in enumerate(backends):
        dc1.register(service_name, f"{service_name}-{i}", backend.host, backend.port, meta={"zone": "ab"[i // 2]})
    config = ServiceConfig(policy="round_robin", zones=Zones(peers=own, min_cluster_size=2))
    try:
        with (
            Mesh(ConsulDiscovery(dc1.address, min_refresh_interval=0), defaults=config) as mesh,
            Caller(mesh, service_name) as caller,
        ):
            assert caller.goes_to(*backends[:2])
            dc1.set_status(f"{service_name}-0", "critical")
            # A third of the endpoints for half of the callers: a third of its calls goes over.
            eventually(lambda: _local(mesh, service_name) == pytest.approx(0.6666), timeout=30)
            dc1.set_status(f"{service_name}-1", "critical")
            assert caller.goes_to(*backends[2:])
            dc1.set_status(f"{service_name}-0", "passing")
            dc1.set_status(f"{service_name}-1", "passing")
            assert caller.goes_to(*backends[:2])
            assert caller.errors == []
    finally:
        for i in range(len(backends)):
            dc1.deregister(f"{service_name}-{i}")
        for zone in "ab":
            dc1.deregister(f"{own}-{zone}")


def _local(mesh: Mesh, name: str) -> float:
    layout = mesh.cluster(name).view.layout
    return 0.0 if layout is None else next((g.share for g in layout.groups if g.name == "all/a"), 0.0)


def test_nearest_by_consuls_coordinates(
    datacenters: list[DatacenterServer], backends: list[Backend], service_name: str
) -> None:
    """The node of this process's agent is here; one without a coordinate is unknown, and last."""
    dc1, _ = datacenters
    dc1.register(service_name, f"{service_name}-0", backends[0].host, backends[0].port)
    stray = {"Service": service_name, "ID": f"{service_name}-1", "Address": backends[1].host, "Port": backends[1].port}
    dc1.catalog_register("stray", "127.0.0.1", stray)
    config = ServiceConfig(failover=Failover(by="nearest"))
    try:
        with (
            Mesh(ConsulDiscovery(dc1.address, min_refresh_interval=0), defaults=config) as mesh,
            Caller(mesh, service_name) as caller,
        ):
            assert caller.goes_to(backends[0])
            tiers = mesh.cluster(service_name).snapshot()["tiers"]
            assert [(tier["name"], tier["share"]) for tier in tiers] == [("up to 2 ms", 1.0), ("unknown", 0.0)]
            dc1.set_status(f"{service_name}-0", "critical")
            assert caller.goes_to(backends[1])
            assert caller.errors == []
    finally:
        dc1.deregister(f"{service_name}-0")
        dc1.catalog_deregister("stray")
