"""Which targets are the mesh's, and what is said of those that make no sense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import meshlb.grpc
from meshlb import ConfigError, Mesh, MeshClosed, ServiceConfig
from meshlb._proto import echo_pb2_grpc
from meshlb.discovery import ConsulDiscovery, StaticDiscovery
from meshlb.grpc._channel import MeshChannel
from meshlb.grpc._options import subchannel_options
from meshlb.grpc._target import parse
from tests.grpc.sync.conftest import Serve
from tests.grpc.sync.servers import Request
from tests.support.consul_agent import ConsulAgent


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with Mesh(StaticDiscovery({"orders": ["127.0.0.1:1"]}), defaults=ServiceConfig(policy="round_robin")) as mesh:
        yield mesh


@pytest.mark.parametrize(
    ("target", "query"),
    [
        ("consul:///orders", ("orders", None, None, None)),
        ("CONSUL:///Orders", ("orders", None, None, None)),
        ("consul:orders", ("orders", None, None, None)),
        ("consul:///orders?dc=dc2&tag=v2", ("orders", "v2", "dc2", None)),
        ("consul:///orders?filter=Service.Meta.zone%20%3D%3D%20a", ("orders", None, None, "Service.Meta.zone == a")),
        ("consul:///orders?policy=round_robin", ("orders", None, None, None)),
        ("orders", ("orders", None, None, None)),
        ("v2.orders.service.dc2.consul", ("orders", "v2", "dc2", None)),
        (b"orders", ("orders", None, None, None)),
    ],
)
def test_services(target: Any, query: tuple[Any, ...], mesh: Mesh) -> None:
    cluster = parse(target, mesh)
    assert cluster is not None
    got = cluster.query
    assert (got.service, got.tag, got.datacenter, got.filter) == query


@pytest.mark.parametrize(
    "target",
    [
        "dns:///orders:80",
        "dns:orders",
        "ipv4:127.0.0.1:80",
        "ipv6:[::1]:80",
        "unix:/tmp/socket",
        "unix:///tmp/socket",
        "localhost",
        "localhost:80",
        "orders:80",
        "consul:8502",
        "static:80",
        "127.0.0.1",
        "[::1]:80",
        "api.example.com",
        "xds:///orders",
    ],
)
def test_grpcs_own(target: str, mesh: Mesh) -> None:
    assert parse(target, mesh) is None
    channel = meshlb.grpc.insecure_channel(target, mesh=mesh)
    assert not isinstance(channel, MeshChannel)
    channel.close()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("", "expected"),
        (None, "expected"),
        ("consul://", "service"),
        ("consul:///", "service"),
        ("consul:///a/b", "service"),
        ("consul:///orders#x", "service"),
        ("consul://agent:8500/", "service"),
        ("consul://agent:port/orders", "address"),
        ("consul://user:secret@agent/orders", "credentials"),
        ("consul://[::1/orders", "Invalid IPv6"),
        ("consul://agent:8500/orders?token=x", "'token'"),
        ("consul://agent:8500/orders?consistency=sometimes", "consistency"),
        ("consul:///orders?namespace=x", "ConsulDiscovery(namespace=...)"),
        ("static:///", "addresses"),
        ("static:///a", "'a'"),
        ("static:///a:1,,b:2", "''"),
        ("static:///a:1,b:99999", "99999"),
        ("static:///a:1?dc=x", "'dc'"),
        ("static://orders", "addresses"),
        ("consul:///orders?tags=v2", "'tags'"),
        ("consul:///orders?tag=a&tag=b", "'tag'"),
        ("consul:///orders?tag=", "'tag'"),
        ("consul:///orders?tag", "tag"),
        ("consul:///orders?policy=best", "unknown"),
        ("lb:///orders", "'lb'"),
        ("http://orders", "'http'"),
    ],
)
def test_bad_targets(target: Any, said: str, mesh: Mesh) -> None:
    with pytest.raises(ConfigError) as raised:
        meshlb.grpc.insecure_channel(target, mesh=mesh)
    assert said in str(raised.value)
    assert repr(target) in str(raised.value) or "policy" in target


def test_a_policy_of_the_targets_own(mesh: Mesh) -> None:
    configured, own = parse("consul:///orders", mesh), parse("consul:///orders?policy=random", mesh)
    assert configured is not None
    assert own is not None
    assert (configured.policy.name, own.policy.name) == ("round_robin", "random")
    assert parse("consul:///orders?policy=round_robin", mesh) is configured
    assert parse("consul:///orders?policy=random", mesh) is own
    own.wait_ready(20)
    assert own.config.breaker == configured.config.breaker


@pytest.mark.parametrize("target", ["static:///127.0.0.1:1,[::1]:2", "static:127.0.0.1:1,[::1]:2"])
def test_a_list_without_a_name(target: str, mesh: Mesh) -> None:
    cluster = parse(target, mesh)
    assert cluster is not None
    cluster.wait_ready(20)
    assert [node.endpoint.address for node in cluster.nodes] == ["127.0.0.1:1", "[::1]:2"]
    assert parse(target, mesh) is cluster
    assert parse(target + "?policy=random", mesh) is not cluster
    assert cluster is not parse("static:///127.0.0.1:1", mesh)
    assert "grpc.default_authority" not in dict(subchannel_options((), cluster.config, cluster.service))


def test_a_list_with_the_name_and_so_the_settings_of_a_service() -> None:
    with Mesh(StaticDiscovery({}), services={"orders": ServiceConfig(policy="random", timeout=7)}) as mesh:
        cluster = parse("static://Orders/127.0.0.1:1", mesh)
        assert cluster is not None
        assert (cluster.service, cluster.policy.name, cluster.config.timeout) == ("orders", "random", 7)
        assert "static:127.0.0.1:1" in str(cluster.query)
        cluster.wait_ready(20)


def test_calls_through_a_list_need_no_registry(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "127.0.0.1:1")
    servers = serve(2)
    with Mesh(defaults=ServiceConfig(policy="round_robin")) as mesh:
        target = f"static:///{','.join(server.address for server in servers)}"
        with meshlb.grpc.insecure_channel(target, mesh=mesh) as channel:
            stub = echo_pb2_grpc.EchoStub(channel)
            assert {stub.Say(Request(), timeout=20).backend for _ in range(4)} == {"s0", "s1"}
        assert meshlb.grpc.MeshInterceptor(mesh, target).close() is None


def test_another_consul(
    serve: Serve, consul_agent: ConsulAgent, service_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, two registries: the mesh's own knows nothing of the service."""
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "any")  # the rest of the settings are the environment's
    [server] = serve(1)
    host, _, port = server.address.rpartition(":")
    consul_agent.register(service_name, "one", host, int(port), tags=["v2"])
    with Mesh(StaticDiscovery({}), defaults=ServiceConfig(discovery_timeout=20)) as mesh:
        agent = consul_agent.address.removeprefix("http://")
        target = f"consul://{agent}/{service_name}"
        with meshlb.grpc.insecure_channel(f"{target}?tag=v2&policy=random", mesh=mesh) as channel:
            assert isinstance(channel, MeshChannel)
            assert echo_pb2_grpc.EchoStub(channel).Say(Request(), timeout=20).backend == "s0"
            assert channel.cluster.policy.name == "random"
            assert f"source={consul_agent.address}" in str(channel.cluster.query)
        plain = parse(target, mesh)
        assert plain is parse(f"{target}?scheme=http", mesh)
        stale = parse(f"{target}?consistency=stale", mesh)
        assert stale is not None
        assert stale is not plain
        stale.wait_ready(20)
        assert "consistency=stale" in str(stale.query)
        connections = [discovery for discovery in mesh._sources._others.values() if discovery._held]  # type: ignore[attr-defined]  # both are Consul's
        assert len(connections) == 2
    assert not any(discovery._held for discovery in connections)  # type: ignore[attr-defined]


def test_the_consul_that_the_mesh_asks_anyway() -> None:
    with Mesh(ConsulDiscovery("127.0.0.1:1")) as mesh:
        assert parse("consul://127.0.0.1:1/orders", mesh) is parse("consul:///orders", mesh)
        assert parse("consul://127.0.0.1:2/orders", mesh) is not parse("consul:///orders", mesh)


def test_a_target_of_grpcs_makes_no_default_mesh(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlb.grpc._target.default_mesh", lambda: pytest.fail("a default mesh was made"))
    [server] = serve()
    with meshlb.grpc.insecure_channel(server.address) as channel:
        assert echo_pb2_grpc.EchoStub(channel).Say(Request(), timeout=5).backend == "s0"


def test_the_default_mesh(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlb.grpc._target.default_mesh", lambda: mesh)
    monkeypatch.setattr("meshlb.grpc._channel.default_mesh", lambda: mesh)
    channel = meshlb.grpc.insecure_channel("consul:///orders")
    assert isinstance(channel, MeshChannel)
    assert channel.mesh is mesh
    assert isinstance(channel, grpc.Channel)
    channel.close()


def test_a_closed_mesh(mesh: Mesh) -> None:
    mesh.close()
    with pytest.raises(MeshClosed):
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh)


def test_bad_options_and_credentials(mesh: Mesh) -> None:
    for options in (5, ["grpc.x"], [(1, 2)], [("a", 1, 2)]):
        with pytest.raises(ConfigError, match="options"):
            meshlb.grpc.insecure_channel("orders", options, mesh=mesh)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ConfigError, match="credentials"):
        meshlb.grpc.secure_channel("orders", None, mesh=mesh)  # type: ignore[arg-type]  # on purpose


def test_options_of_the_caller_win() -> None:
    own = (("grpc.max_reconnect_backoff_ms", 7), ("grpc.enable_http_proxy", 1), ("mine", "x"))
    options = subchannel_options(own, ServiceConfig(connect_timeout=0.5), "orders")
    assert dict(options) == {
        "grpc.use_local_subchannel_pool": 1,
        "grpc.enable_http_proxy": 1,
        "grpc.service_config_disable_resolution": 1,
        "grpc.min_reconnect_backoff_ms": 500,
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 7,
        "grpc.default_authority": "orders",
        "mine": "x",
    }
    assert len(options) == 8
