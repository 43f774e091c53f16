from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshlb import (
    ConfigError,
    DiscoveryError,
    Mesh,
    NoEndpoints,
    ServiceConfig,
)
from meshlb.discovery import ServiceQuery, Sink, StaticDiscovery
from tests.core.parts import endpoint
from tests.support.leaks import running_threads


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
