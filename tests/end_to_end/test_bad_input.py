"""What a user gets to see who has made a mistake, or whose Consul has: the class in both families, and a message that
says where and what to do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import httpx
import pytest

import meshlb
from meshlb import Breaker, Endpoint, Mesh, Retry, RetryBudget, ServiceConfig
from meshlb.discovery import ConsulDiscovery, StaticDiscovery
from tests.end_to_end.load import ASYNC, KINDS, SYNC, call_once, protocol
from tests.end_to_end.not_consul import NotConsul
from tests.support.backends import Backend
from tests.support.consul_agent import ConsulAgent
from tests.support.ports import free_port, loopback_host
from tests.support.registered import registered
from tests.support.wait import eventually

IMPATIENT = ServiceConfig(discovery_timeout=0.2)


def error_of(kind: str, mesh: Mesh, service: str = "orders") -> BaseException:
    """What a call raises; it belongs to the tree of the library that it was made with."""
    with pytest.raises(meshlb.MeshError) as raised:
        call_once(kind, mesh, service)
    error = raised.value
    if protocol(kind) == "http":
        assert isinstance(error, httpx.TransportError)
        assert isinstance(error, httpx.HTTPError)
        assert str(error.request.url) == f"http://{service}/load"
    else:
        assert isinstance(error, grpc.RpcError)
        assert error.details() == str(error)
    return error


def code_of(error: BaseException) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.RpcError) else None


# -- settings ----------------------------------------------------------------------------------------------------------


WRONG_SETTINGS: list[tuple[Callable[[], object], str]] = [
    (lambda: ServiceConfig(policy="least_conections"), "least_conections"),
    (lambda: ServiceConfig(policy=3), "policy"),
    (lambda: ServiceConfig(timeout=-1), "ServiceConfig.timeout"),
    (lambda: ServiceConfig(timeout=0), "ServiceConfig.timeout"),
    (lambda: ServiceConfig(timeout=math.nan), "ServiceConfig.timeout"),
    (lambda: ServiceConfig(connect_timeout=-0.5), "ServiceConfig.connect_timeout"),
    (lambda: ServiceConfig(discovery_timeout="soon"), "ServiceConfig.discovery_timeout"),
    (lambda: ServiceConfig(panic_threshold=50), "ServiceConfig.panic_threshold"),
    (lambda: ServiceConfig(retry=3), "ServiceConfig.retry"),
    (lambda: Retry(per_try_timeout=-1), "Retry.per_try_timeout"),
    (lambda: Retry(max_attempts=0), "Retry.max_attempts"),
    (lambda: Retry(wait=0.1), "Retry.wait"),
    (lambda: RetryBudget(ratio=-0.1), "RetryBudget.ratio"),
    (lambda: Breaker(consecutive_failures=0), "Breaker.consecutive_failures"),
    (lambda: Breaker(open_time=-1), "Breaker.open_time"),
    (lambda: Endpoint("10.0.0.1", 0), "Endpoint.port"),
    (lambda: Endpoint("10.0.0.1", 80, weight=-1), "Endpoint.weight"),
    (lambda: Endpoint("http://10.0.0.1", 80), "Endpoint.host"),
    (lambda: StaticDiscovery({"orders": ["10.0.0.1"]}), "orders"),
    (lambda: StaticDiscovery({"orders": "10.0.0.1:80"}), "orders"),
    (lambda: StaticDiscovery({"orders": ["10.0.0.1:http"]}), "10.0.0.1:http"),
    (lambda: ConsulDiscovery("ftp://127.0.0.1:8500"), "ftp"),
    (lambda: ConsulDiscovery("http://127.0.0.1:port"), "127.0.0.1:port"),
    (lambda: ConsulDiscovery(wait=-1), "wait"),
    (lambda: ConsulDiscovery(consistency="eventual"), "consistency"),
    (lambda: Mesh(StaticDiscovery({}), defaults={"timeout": 3}), "Mesh.defaults"),
    (lambda: Mesh(StaticDiscovery({}), services={"orders": None}), "services['orders']"),
    (lambda: Mesh("127.0.0.1:8500"), "discovery"),
]


@pytest.mark.parametrize(("make", "named"), WRONG_SETTINGS, ids=[named for _, named in WRONG_SETTINGS])
def test_a_wrong_setting_fails_at_construction_and_is_named(make: Callable[[], object], named: str):
    with pytest.raises(meshlb.ConfigError) as raised:
        make()
    assert named in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_an_unknown_policy_is_answered_with_those_that_exist():
    with pytest.raises(meshlb.ConfigError) as raised:
        ServiceConfig(policy="least_conections")
    for policy in ("round_robin", "random", "least_connections", "least_response_time"):
        assert policy in str(raised.value)


@pytest.mark.parametrize("variable", ["CONSUL_HTTP_ADDR"])
def test_a_wrong_variable_is_named(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "http://127.0.0.1:nonsense")
    with pytest.raises(meshlb.ConfigError, match=variable):
        Mesh()


# -- services ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_service_that_nobody_has_registered(kind: str, consul_agent: ConsulAgent):
    with Mesh(ConsulDiscovery(consul_agent.address)) as mesh:
        error = error_of(kind, mesh, "odrers")
    assert isinstance(error, meshlb.NoEndpoints)
    assert not isinstance(error, meshlb.CircuitOpen)
    assert code_of(error) in (None, grpc.StatusCode.UNAVAILABLE)
    assert "'odrers'" in str(error)
    assert "check the name" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_service_whose_instances_are_all_in_maintenance(kind: str, consul_agent: ConsulAgent, service_name: str):
    with Backend(protocol(kind)) as backend, registered(consul_agent, service_name, [backend]):
        consul_agent.service_maintenance(backend.id, True)
        with Mesh(ConsulDiscovery(consul_agent.address)) as mesh:
            error = error_of(kind, mesh, service_name)
    assert isinstance(error, meshlb.NoEndpoints)
    assert f"'{service_name}'" in str(error)
    assert "1 maintenance" in str(error)
    assert "snapshot()" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_used_after_close(kind: str):
    with Backend(protocol(kind)) as backend:
        mesh = Mesh(StaticDiscovery({"orders": [backend.address]}))
        assert call_once(kind, mesh, "orders") == backend.id
        mesh.close()
        error = error_of(kind, mesh)
        assert isinstance(error, meshlb.MeshClosed)
        assert code_of(error) in (None, grpc.StatusCode.CANCELLED)
        assert "closed" in str(error)
        assert "'orders'" in str(error)
        assert "new Mesh" in str(error)


@pytest.mark.parametrize("kind", list(SYNC))
def test_a_client_used_after_its_mesh_was_closed(kind: str):
    with (
        Backend(protocol(kind)) as backend,
        Mesh(StaticDiscovery({"orders": [backend.address]})) as mesh,
        SYNC[kind](mesh, "orders") as call,
    ):
        assert call() == backend.id
        mesh.close()
        with pytest.raises(meshlb.MeshClosed, match="orders"):
            call()


@pytest.mark.parametrize("kind", list(ASYNC))
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_async_client_used_after_its_mesh_was_closed(kind: str):
    with Backend(protocol(kind)) as backend:
        mesh = Mesh(StaticDiscovery({"orders": [backend.address]}))
        async with ASYNC[kind](mesh, "orders") as call:
            assert await call() == backend.id
            await mesh.aclose()
            with pytest.raises(meshlb.MeshClosed, match="orders"):
                await call()


# -- Consul ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """What Consul answers, and what the caller's error has to say about it."""

    status: int
    body: bytes = b""
    content_type: str = "text/plain"
    says: tuple[str, ...] = ()


TROUBLES = {
    "403": Trouble(403, b"Permission denied", says=("403", "Permission denied", "CONSUL_HTTP_TOKEN")),
    "429": Trouble(429, b"", says=("429", "http_max_conns_per_client")),
    "500": Trouble(500, b"No cluster leader", says=("500", "No cluster leader", "stale")),
    "HTML": Trouble(200, b"<html><body>Welcome to nginx!</body></html>", "text/html", ("nginx", "Consul agent")),
    "half a JSON": Trouble(200, b'[{"Node": {"Node": "n", "Addre', "application/json", ("200", "Addre", "cut")),
}


def wait_for_trouble(mesh: Mesh) -> None:
    """Until Consul has been asked: a first call waits for good news until its time is up, and then tells the bad."""
    eventually(lambda: mesh.cluster("orders").snapshot()["last_error"])


def assert_says(error: BaseException, *words: str) -> None:
    for word in ("'orders'", *words):
        assert word in str(error), str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_consul_answers_nonsense(trouble: Trouble, kind: str):
    with (
        NotConsul(trouble.status, trouble.body, trouble.content_type) as consul,
        Mesh(ConsulDiscovery(consul.address), defaults=IMPATIENT) as mesh,
    ):
        wait_for_trouble(mesh)
        error = error_of(kind, mesh)
        assert isinstance(error, meshlb.DiscoveryError)
        assert code_of(error) in (None, grpc.StatusCode.UNAVAILABLE)
        assert_says(error, consul.address, *trouble.says)


@pytest.mark.parametrize("kind", KINDS)
def test_consul_does_not_answer(kind: str):
    with (
        NotConsul(0) as consul,
        Mesh(ConsulDiscovery(consul.address), defaults=ServiceConfig(discovery_timeout=0.3)) as mesh,
    ):
        error = error_of(kind, mesh)
        assert isinstance(error, meshlb.DiscoveryTimeout)
        assert isinstance(error, TimeoutError)
        assert_says(error, "0.3 s", "discovery_timeout")


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_listens_at_consuls_address(kind: str):
    address = f"http://{loopback_host()}:{free_port()}"
    with Mesh(ConsulDiscovery(address), defaults=IMPATIENT) as mesh:
        wait_for_trouble(mesh)
        error = error_of(kind, mesh)
        assert isinstance(error, meshlb.DiscoveryError)
        assert_says(error, address, "refused", "CONSUL_HTTP_ADDR")


def test_a_mesh_closes_at_once_while_consul_hangs():
    with NotConsul(0) as consul, contextlib.suppress(meshlb.DiscoveryTimeout):
        mesh = Mesh(ConsulDiscovery(consul.address))
        try:
            mesh.cluster("orders").wait_ready(0.2)
        finally:
            mesh.close()
    # The fixture nothing_left_behind fails if its thread is still there.
