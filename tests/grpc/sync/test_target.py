"""Which targets are the mesh's, and what is said of those that make no sense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import meshlb.grpc
from meshlb import ConfigError, Mesh, MeshClosed, ServiceConfig
from meshlb._proto import echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc._channel import MeshChannel
from meshlb.grpc._options import subchannel_options
from meshlb.grpc._target import parse
from tests.grpc.sync.conftest import Serve
from tests.grpc.sync.servers import Request


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
        ("consul://agent:8500/orders", "ConsulDiscovery('http://agent:8500')"),
        ("consul:///orders?tags=v2", "'tags'"),
        ("consul:///orders?tag=a&tag=b", "'tag'"),
        ("consul:///orders?tag=", "'tag'"),
        ("consul:///orders?tag", "tag"),
        ("consul:///orders?policy=random", "policy='random'"),
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
