from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from typing import Any

import anyio
import pytest

from meshlb import (
    Cluster,
    ConfigError,
    DiscoveryError,
    Lease,
    Mesh,
    MeshClosed,
    NoEndpoints,
    ServiceConfig,
    control,
)
from meshlb.discovery import ServiceQuery, Sink, StaticDiscovery
from tests.core.parts import endpoint
from tests.support.leaks import running_threads
from tests.support.wait import eventually, eventually_async


def static(*names: str) -> StaticDiscovery:
    return StaticDiscovery({name: [endpoint(0), endpoint(1)] for name in names or ("orders",)})


class Discovery:
    """Whatever a test's own discovery does not say otherwise: knows nobody, reports nothing."""

    closed = 0

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        await asyncio.sleep(3600)

    async def aclose(self) -> None:
        self.closed += 1

    def knows(self, service: str) -> bool:
        return False


# -- names and settings


def test_one_cluster_a_query_however_it_is_written() -> None:
    with Mesh(static()) as mesh:
        cluster = mesh.cluster("orders")
        for name in ("Orders", "ORDERS.", "orders.service.consul", "Orders.Service.Consul."):
            assert mesh.cluster(name) is cluster
            assert mesh.find(name) is cluster
        assert mesh.clusters == (cluster,)
        assert mesh.cluster("orders", tag="v2") is not cluster
        assert mesh.cluster("orders", tag="v2") is mesh.find("v2.orders.service.consul")
        assert mesh.cluster("orders", datacenter="dc2") is mesh.find("orders.service.dc2.consul")


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "::1", "[::1]", "localhost", "example.com", "orders.example.com", "", "."]
)
def test_hosts_that_are_no_service(host: str) -> None:
    with Mesh(static()) as mesh:
        assert mesh.find(host) is None
        assert mesh.clusters == ()


def test_names_that_discovery_or_settings_know_are_services_with_or_without_dots() -> None:
    discovery = StaticDiscovery({"api.example.com": ["10.0.0.1:80"], "10.0.0.9": ["10.0.0.1:80"]})
    with Mesh(discovery, services={"localhost": ServiceConfig()}) as mesh:
        for host in ("api.example.com", "API.example.com.", "10.0.0.9", "localhost"):
            cluster = mesh.find(host)
            assert cluster is not None
            assert cluster.service == host.lower().rstrip(".")


def test_a_name_under_the_domain_that_is_no_services() -> None:
    with Mesh(static()) as mesh:
        for find in (mesh.find, mesh.cluster):
            with pytest.raises(ConfigError, match=r"web\.node\.consul"):
                find("web.node.consul")


@pytest.mark.parametrize("name", ["", "a b", "a/b", b"orders", None, 3])
def test_names_that_cannot_be(name: Any) -> None:
    with Mesh(static()) as mesh, pytest.raises(ConfigError, match="is not a service name"):
        mesh.cluster(name)


@pytest.mark.parametrize("field", ["tag", "datacenter", "filter"])
def test_bytes_for_a_string(field: str) -> None:
    with Mesh(static()) as mesh, pytest.raises(ConfigError, match=field):
        mesh.cluster("orders", **{field: b"v2"})  # type: ignore[arg-type]


def test_settings_are_found_however_the_service_is_written() -> None:
    mine = {
        name: ServiceConfig(connect_timeout=number)
        for number, name in enumerate(
            (
                "Orders",
                "stock.service.consul",
                "v2.stock.service.consul",
                "Stock.service.dc2.consul",
                "api.example.com",
            ),
            1,
        )
    }
    with Mesh(static("orders", "stock"), services=mine) as mesh:

        def found(name: str, **query: str) -> float:
            assert mesh.config_of(name).connect_timeout == mesh.cluster(name).config.connect_timeout
            return mesh.cluster(name, **query).config.connect_timeout

        assert found("orders") == found("ORDERS.service.consul") == found("v2.orders.service.consul") == 1
        assert found("stock") == found("stock.service.consul") == found("stock", datacenter="dc3") == 2
        assert found("stock", tag="v2") == found("v2.stock.service.dc2.consul") == 3
        assert found("stock", datacenter="dc2") == 4
        assert found("api.example.com") == 5
        assert found("users") == mesh.defaults.connect_timeout


def test_a_services_filter_is_part_of_the_query() -> None:
    with Mesh(Discovery(), services={"orders": ServiceConfig(filter='Service.Meta.env == "a"')}) as mesh:
        assert mesh.cluster("orders").query.filter == 'Service.Meta.env == "a"'
        assert mesh.cluster("orders", filter="other").query.filter == "other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"discovery": "127.0.0.1:8500"}, "Mesh.discovery"),
        ({"discovery": object()}, "no watch, aclose, knows"),
        ({"defaults": {"policy": "random"}}, "Mesh.defaults"),
        ({"services": {"orders": {}}}, r"Mesh.services\['orders'\]"),
        ({"services": ["orders"]}, "Mesh.services"),
        ({"services": {b"orders": ServiceConfig()}}, "is not a service name"),
        ({"services": {"Orders": ServiceConfig(), "orders.service.consul": ServiceConfig()}}, "twice"),
        ({"services": {"web.node.consul": ServiceConfig()}}, r"web\.node\.consul"),
        ({"consul_domain": ""}, "Mesh.consul_domain"),
        ({"consul_domain": b"consul"}, "Mesh.consul_domain"),
        ({"consul_domain": "..."}, "Mesh.consul_domain"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mesh(**{"discovery": static(), **arguments})


def test_nothing_starts_before_the_first_use() -> None:
    before = running_threads()
    mesh = Mesh(static(), consul_domain=".Corp.Internal.")
    assert mesh.find("example.com") is None
    assert running_threads() == before
    cluster = mesh.find("orders.service.corp.internal")
    assert cluster is not None
    cluster.wait_ready(5)
    assert mesh.snapshot()[0]["service"] == "orders"
    assert "orders" in repr(mesh)
    mesh.close()
    assert running_threads() == before
    assert "closed" in repr(mesh)


# -- watching


def test_unknown_services_are_told_apart_by_what_is_known() -> None:
    with Mesh(static("stock", "users")) as mesh, pytest.raises(NoEndpoints, match=r"it has: stock, users"):
        mesh.cluster("orders").start()


def test_a_filter_that_static_discovery_cannot_read_fails_at_once() -> None:
    config = ServiceConfig(filter="x == 1", discovery_timeout=3600)
    with Mesh(static(), defaults=config) as mesh, pytest.raises(DiscoveryError, match="no filter language"):
        mesh.cluster("orders").start()


def test_a_watch_that_fails_is_started_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from meshlb import watch

    monkeypatch.setattr(watch, "_RESTART_PAUSE", 0.01)

    class Failing(Discovery):
        attempts = 0

        async def watch(self, query: ServiceQuery, sink: Sink) -> None:
            self.attempts += 1
            if self.attempts < 3:
                raise ValueError("a bug")
            sink.update([endpoint(0)])
            await asyncio.sleep(3600)

    with Mesh(Failing()) as mesh:
        mesh.cluster("orders").wait_ready(10)
    assert caplog.text.count("ValueError: a bug") == 2


# -- closing


def test_closing_ends_everything_and_again_is_nothing() -> None:
    discovery = Discovery()
    mesh = Mesh(discovery)
    cluster = mesh.cluster("orders")
    mesh.close()
    mesh.close()
    assert mesh.closed
    assert cluster.closed
    assert discovery.closed == 1
    with pytest.raises(MeshClosed):
        mesh.cluster("orders").start()
    for name in ("stock", "users"):
        with pytest.raises(MeshClosed, match=name):
            mesh.cluster(name)
    with pytest.raises(MeshClosed):
        mesh.find("stock")
    assert not mesh.call_soon(print)


async def test_closing_from_a_task() -> None:
    discovery = Discovery()
    async with Mesh(discovery) as mesh:
        mesh.cluster("orders")
    await mesh.aclose()
    assert discovery.closed == 1
    assert control._current is None
    async with Mesh(static()):
        pass


class Stubborn(Discovery):
    """A watch that does not let itself be cancelled, and a close that never ends."""

    def __init__(self) -> None:
        self.release = threading.Event()

    async def watch(self, query: ServiceQuery, sink: Sink) -> None:
        sink.update([endpoint(0)])
        await self._endless()

    async def aclose(self) -> None:
        await self._endless()

    async def _endless(self) -> None:
        while not self.release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass


@pytest.mark.parametrize("services", [1, 5])
def test_closing_does_not_wait_for_a_watch_that_ignores_it(services: int, caplog: pytest.LogCaptureFixture) -> None:
    discovery = Stubborn()
    mesh = Mesh(discovery)
    for number in range(services):
        mesh.cluster(f"s{number}").wait_ready(5)
    began = time.monotonic()
    mesh.close()
    took = time.monotonic() - began
    assert took < control.CLOSE_TIMEOUT + 2  # not a matter of speed: it would be five seconds, or for ever
    discovery.release.set()
    eventually(lambda: not running_threads())
    assert "did not end in time" in caplog.text


async def test_closing_from_a_task_does_not_wait_for_it_either() -> None:
    discovery = Stubborn()
    mesh = Mesh(discovery)
    await mesh.cluster("orders").wait_ready_async(5)
    with anyio.fail_after(control.CLOSE_TIMEOUT + 5):
        await mesh.aclose()
    discovery.release.set()
    await eventually_async(lambda: not running_threads())


def test_closing_does_not_wait_for_a_watch_that_blocks_the_control_loop() -> None:
    blocked, release = threading.Event(), threading.Event()

    class Blocking(Discovery):
        async def watch(self, query: ServiceQuery, sink: Sink) -> None:
            blocked.set()
            release.wait(30)

    discovery = Blocking()
    mesh = Mesh(discovery)
    mesh.cluster("orders")
    assert blocked.wait(5)
    began = time.monotonic()
    mesh.close()
    assert time.monotonic() - began < control.CLOSE_TIMEOUT + 2
    release.set()
    eventually(lambda: not running_threads())
    assert discovery.closed == 1  # the rest has followed by itself


def test_a_cancelled_close_goes_on_by_itself() -> None:
    discovery = Discovery()
    mesh = Mesh(discovery)
    mesh.cluster("orders")

    async def main() -> None:
        with anyio.move_on_after(0):
            await mesh.aclose()

    anyio.run(main)
    eventually(lambda: discovery.closed == 1)
    eventually(lambda: not running_threads())


def test_closing_on_the_control_loops_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CLOSE_TIMEOUT", 3600)  # it must not wait for itself
    discovery = Discovery()
    mesh = Mesh(discovery)
    mesh.cluster("orders")
    assert mesh.call_soon(mesh.close)
    eventually(lambda: discovery.closed == 1)
    eventually(lambda: not running_threads())


def test_a_watch_that_closes_its_own_mesh() -> None:
    class Suicidal(Discovery):
        mesh: Mesh

        async def watch(self, query: ServiceQuery, sink: Sink) -> None:
            await self.mesh.aclose()
            await asyncio.sleep(3600)

    discovery = Suicidal()
    discovery.mesh = Mesh(discovery)
    with pytest.raises(MeshClosed):
        discovery.mesh.cluster("orders").start(patient=True)
    eventually(lambda: discovery.closed == 1)
    eventually(lambda: not running_threads())


def test_another_mesh_keeps_the_control_loop() -> None:
    shared = static("orders", "stock")
    with Mesh(shared) as first, Mesh(shared) as second:
        a, b = first.cluster("orders"), second.cluster("orders")
        for cluster in (a, b):
            cluster.wait_ready(5)
        assert len(shared._watches) == 2
        first.close()
        eventually(lambda: len(shared._watches) == 1)
        shared.update("orders", [endpoint(7)])
        assert [node.endpoint for node in b.nodes] == [endpoint(7)]
        assert a.nodes == ()
    assert shared._watches == []


def test_closing_while_threads_start_leases() -> None:
    for _ in range(5):
        mesh = Mesh(static())
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        go = threading.Barrier(33)
        wrong: list[object] = []

        def call(cluster: Cluster = cluster, go: threading.Barrier = go, wrong: list[object] = wrong) -> None:
            go.wait()
            while True:
                try:
                    with cluster.lease() as lease:
                        if not isinstance(lease, Lease):
                            wrong.append(lease)
                except MeshClosed:
                    return
                except BaseException as error:
                    wrong.append(error)
                    return

        threads = [threading.Thread(target=call) for _ in range(32)]
        for thread in threads:
            thread.start()
        nodes = cluster.nodes
        go.wait()
        mesh.close()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        assert [node.in_flight for node in nodes] == [0, 0]


def test_threads_that_close_together_all_find_it_closed() -> None:
    discovery = Discovery()
    mesh = Mesh(discovery)
    mesh.cluster("orders")
    closed: list[int] = []

    def close() -> None:
        mesh.close()
        closed.append(discovery.closed)

    threads = [threading.Thread(target=close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert closed == [1] * 8


# -- dropping


def dropped(mesh: Mesh) -> weakref.ref[Mesh]:
    return weakref.ref(mesh)


@pytest.mark.parametrize("shared", [False, True], ids=["own loop", "shared loop"])
def test_a_mesh_dropped_without_close_ends_by_itself(shared: bool) -> None:
    other = Mesh(static())
    if shared:
        other.cluster("orders").wait_ready(5)
    discovery = Discovery()
    mesh = Mesh(discovery)
    cluster = mesh.cluster("orders")
    cluster.update([endpoint(0), endpoint(1)])
    cluster.start().close()
    held = cluster.start()
    cluster.update([endpoint(1)])  # one that drains, with a timer of its own
    held.close()
    reference = weakref.ref(mesh)
    del mesh, cluster, held

    def gone() -> bool:
        gc.collect()
        return reference() is None

    eventually(gone)
    eventually(lambda: discovery.closed == 1)
    other.close()
    eventually(lambda: not running_threads())


def test_whoever_has_a_cluster_keeps_its_mesh() -> None:
    discovery = static()
    cluster = Mesh(discovery).cluster("orders")
    cluster.wait_ready(5)
    gc.collect()
    discovery.update("orders", [endpoint(9)])
    assert cluster.start().endpoint == endpoint(9)
    assert isinstance(cluster._background, Mesh)
    cluster._background.close()


def test_a_program_that_ends_without_closing() -> None:
    program = """
        import meshlb, threading
        from meshlb.discovery import StaticDiscovery
        mesh = meshlb.Mesh(StaticDiscovery({"orders": ["127.0.0.1:80"]}))
        mesh.cluster("orders").wait_ready(5)
        lease = mesh.cluster("orders").start()
        print("end", threading.active_count())
    """
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("end 2\n", "", 0)


def test_the_level_of_an_ordinary_life_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "meshlb"), Mesh(static()) as mesh:
        mesh.cluster("orders").wait_ready(5)
        with mesh.cluster("orders").lease():
            pass
    assert caplog.records == []
