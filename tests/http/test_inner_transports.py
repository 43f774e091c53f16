"""Inner transports of the user's own: for tests without a network, and for whatever else sends requests."""

from __future__ import annotations

from typing import Any

import pytest

from meshlb import Endpoint
from tests.http.drivers import Driver, in_flight, mesh_of


def test_response_that_is_complete_already(driver: Driver):
    """Its stream is never read nor closed, but the attempt has ended."""
    module, kept = driver.module, []

    def factory(endpoint: Endpoint) -> Any:
        return module.MockTransport(lambda request: module.Response(200, text="fine"))

    with mesh_of(Endpoint("10.0.0.1", 1)) as mesh:
        with driver.client(driver.transport(mesh, transport_factory=factory)) as client:
            kept += [client.get("http://orders/"), client.stream("GET", "http://orders/")]
            assert [response.text for response in kept] == ["fine", "fine"]
            assert in_flight(mesh) == 0
        assert mesh.cluster("orders").nodes[0].successes == 2


@pytest.mark.parametrize("kind", ["sync"])
def test_wsgi_application(driver: Driver):
    def application(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("content-type", "text/plain")])
        return [environ["HTTP_HOST"].encode(), environ["PATH_INFO"].encode()]

    with mesh_of(Endpoint("10.0.0.1", 1)) as mesh:
        transport = driver.transport(mesh, transport_factory=lambda endpoint: driver.module.WSGITransport(application))
        with driver.client(transport) as client:
            assert client.get("http://orders/path").text == "orders/path"
        assert in_flight(mesh) == 0


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
def test_asgi_application(driver: Driver):
    async def application(scope: Any, receive: Any, send: Any) -> None:
        host = dict(scope["headers"])[b"host"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": host + scope["path"].encode()})

    with mesh_of(Endpoint("10.0.0.1", 1)) as mesh:
        transport = driver.transport(mesh, transport_factory=lambda endpoint: driver.module.ASGITransport(application))
        with driver.client(transport) as client:
            assert client.get("http://orders/path").text == "orders/path"
        assert in_flight(mesh) == 0


def test_transport_with_exceptions_of_its_own(driver: Driver):
    """OSError is judged like the package's errors; anything else is a bug, and no endpoint's fault."""
    module = driver.module

    def factory(endpoint: Endpoint) -> Any:
        def handler(request: Any) -> Any:
            if endpoint.port == 1:
                raise ConnectionRefusedError
            if endpoint.port == 2:
                raise ZeroDivisionError
            return module.Response(200)

        return module.MockTransport(handler)

    with mesh_of(Endpoint("10.0.0.1", 1), Endpoint("10.0.0.1", 3)) as mesh:
        with driver.client(driver.transport(mesh, transport_factory=factory)) as client:
            assert client.post("http://orders/").status_code == 200
        assert (mesh.cluster("orders").nodes[0].failures, in_flight(mesh)) == (1, 0)
    with mesh_of(Endpoint("10.0.0.1", 2), Endpoint("10.0.0.1", 3)) as mesh:
        with (
            driver.client(driver.transport(mesh, transport_factory=factory)) as client,
            pytest.raises(ZeroDivisionError),
        ):
            client.get("http://orders/")
        assert (mesh.cluster("orders").nodes[0].ignored, in_flight(mesh)) == (1, 0)
