"""Errors that belong to both families."""

from __future__ import annotations

import importlib
import pickle
from types import ModuleType
from typing import Any

import anyio
import pytest

import meshlb
from meshlb import Breaker, Endpoint, Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from tests.http.drivers import Driver, in_flight, mesh_of
from tests.support.ports import free_port, loopback_host
from tests.support.wait import eventually

FAMILY = {
    "ConfigError": ("LocalProtocolError", ValueError),
    "MeshClosed": ("ConnectError", RuntimeError),
    "DiscoveryError": ("ConnectError", Exception),
    "DiscoveryTimeout": ("ConnectTimeout", TimeoutError),
    "NoEndpoints": ("ConnectError", Exception),
    "CircuitOpen": ("ConnectError", Exception),
    "DeadlineExceeded": ("TimeoutException", TimeoutError),
}


@pytest.fixture
def module(package: str) -> ModuleType:
    return importlib.import_module(package)


@pytest.mark.parametrize("name", FAMILY)
def test_class_of_both_families(module: ModuleType, package: str, name: str):
    native, builtin = FAMILY[name]
    kind = getattr(importlib.import_module(f"meshlb.{package}"), name)
    request = module.Request("GET", "http://orders/")
    error = kind("what happened", request=request)
    assert isinstance(error, (getattr(meshlb, name)))
    assert isinstance(error, (getattr(module, native)))
    assert isinstance(error, module.TransportError)
    assert isinstance(error, builtin)
    assert (str(error), error.args, error.request) == ("what happened", ("what happened",), request)
    with pytest.raises(RuntimeError, match="request property has not been set"):
        _ = kind("what happened").request


@pytest.mark.parametrize("name", FAMILY)
def test_pickled(module: ModuleType, package: str, name: str):
    kind = getattr(importlib.import_module(f"meshlb.{package}"), name)
    error = kind("what happened", request=module.Request("GET", "http://orders/path"))
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), str(again.request.url)) == (kind, "what happened", "http://orders/path")
    assert again.__notes__ == ["a note"]


def test_circuit_open_is_a_no_endpoints_in_both(package: str):
    adapter = importlib.import_module(f"meshlb.{package}")
    assert issubclass(adapter.CircuitOpen, adapter.NoEndpoints)


def test_nobody_to_call(driver: Driver):
    with mesh_of() as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(driver.adapter.NoEndpoints, match=r"service 'orders'.*no instance") as caught:
            client.get("http://orders/path")
        assert str(caught.value.request.url) == "http://orders/path"
        assert caught.value.__cause__ is None


def test_error_knows_the_logical_request_without_a_client_too(driver: Driver):
    nobody = Endpoint(loopback_host(), free_port())
    with mesh_of(nobody, retry=None) as mesh:
        transport = driver.transport(mesh)
        send = transport.handle_async_request if driver.is_async else transport.handle_request
        request = driver.module.Request("GET", "http://orders/path")
        with pytest.raises(driver.module.ConnectError) as caught:
            driver.run(send, request)
        assert caught.value.request is request
        driver.run(transport.aclose if driver.is_async else transport.close)


def test_everybody_is_out_of_rotation(driver: Driver):
    nobody = Endpoint(loopback_host(), free_port())
    settings = {"breaker": Breaker(consecutive_failures=1), "panic_threshold": 0, "retry": None}
    with mesh_of(nobody, **settings) as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(driver.module.ConnectError) as first:
            client.get("http://orders/")
        assert type(first.value) is driver.module.ConnectError, "an attempt was made: its error is the caller's"
        eventually(lambda: not mesh.cluster("orders").view.nodes)
        with pytest.raises(driver.adapter.CircuitOpen, match="1 open") as caught:
            client.get("http://orders/")
        assert isinstance(caught.value, meshlb.CircuitOpen)
        assert in_flight(mesh) == 0


class _Silent:
    """A registry that does not answer, or answers with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def watch(self, query: Any, sink: Any) -> None:
        if self._error is not None:
            sink.failed(self._error)
        await anyio.sleep_forever()

    async def aclose(self) -> None: ...

    def knows(self, service: str) -> bool:
        return False


def test_registry_that_does_not_answer(driver: Driver):
    defaults = ServiceConfig(discovery_timeout=0.2)
    with Mesh(_Silent(), defaults=defaults) as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(driver.adapter.DiscoveryTimeout):
            client.get("http://orders/")
        with pytest.raises(driver.module.ConnectTimeout):
            client.get("http://orders/", extensions={"meshlb": {"timeout": 0.05}})


def test_registry_that_fails(driver: Driver):
    discovery = _Silent(OSError("403"))
    with (
        Mesh(discovery, defaults=ServiceConfig(discovery_timeout=0.2)) as mesh,
        driver.client(driver.transport(mesh)) as client,
        pytest.raises(driver.adapter.DiscoveryError, match="403"),
    ):
        client.get("http://orders/")


def test_mesh_that_has_been_closed(driver: Driver):
    mesh = Mesh(StaticDiscovery({"orders": ["127.0.0.1:1"]}))
    with driver.client(driver.transport(mesh)) as client:
        with pytest.raises(driver.module.ConnectError):
            client.get("http://orders/")
        mesh.close()
        for host in ("orders", "users"):
            with pytest.raises(driver.adapter.MeshClosed, match="closed"):
                client.get(f"http://{host}/")
