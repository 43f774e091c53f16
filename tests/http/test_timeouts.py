"""Timeouts of phases, attempts and whole calls."""

from __future__ import annotations

import socket
import threading
import time

import pytest

import meshlb
from meshlb import Endpoint
from tests.http.drivers import Driver, in_flight, mesh_of, patient
from tests.http.raw_server import RawServer, read_request, wait_for_close
from tests.support.backends import Backend


def test_per_try_timeout_lets_a_call_escape_from_a_hung_endpoint(driver: Driver, backends: list[Backend]):
    backends[0].behave(hang=True)
    with mesh_of(*backends, retry=patient(per_try_timeout=0.5)) as mesh:
        with driver.client(driver.transport(mesh), timeout=30) as client:
            response = client.get("http://orders/")
        assert response.headers["x-backend"] == backends[1].id
        assert mesh.cluster("orders").nodes[0].last_failure in ("ReadTimeout", "ConnectTimeout")
        assert in_flight(mesh) == 0


def test_per_try_timeout_ends_with_the_start_of_the_response(driver: Driver, backends: list[Backend]):
    """A body may take its time: for it, the caller's own read timeout counts."""
    backends[0].behave(chunks=2, interval=1.5)
    with mesh_of(*backends, retry=patient(per_try_timeout=1.0)) as mesh:
        with driver.client(driver.transport(mesh), timeout=30) as client:
            response = client.get("http://orders/")
            assert (response.json()["backend"], response.extensions["meshlb"]["attempts"]) == (backends[0].id, 1)
        with driver.client(driver.transport(mesh), timeout=0.3) as client, pytest.raises(driver.module.ReadTimeout):
            client.get("http://orders/")
        assert in_flight(mesh) == 0


@pytest.mark.parametrize("kind", ["asyncio", "trio"])
def test_per_try_timeout_bounds_an_attempt_as_a_whole(driver: Driver, backends: list[Backend]):
    """An endpoint that sends its headers a byte at a time never exceeds a read timeout."""
    stopped = threading.Event()

    def trickle(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not stopped.wait(0.05):
            connection.sendall(b"x")

    with RawServer(trickle) as server:
        mesh = mesh_of(Endpoint.parse(server.address), backends[0], retry=patient(per_try_timeout=0.5))
        with mesh, driver.client(driver.transport(mesh), timeout=30) as client:
            assert client.get("http://orders/").headers["x-backend"] == backends[0].id
            node = mesh.cluster("orders").nodes[0]
            assert (node.failures, node.last_failure, in_flight(mesh)) == (1, "ReadTimeout", 0)
        stopped.set()


def test_hung_everywhere_gives_the_packages_read_timeout(driver: Driver):
    retry = patient(per_try_timeout=0.1, max_attempts=2)
    with (
        RawServer(wait_for_close) as server,
        mesh_of(Endpoint.parse(server.address), retry=retry) as mesh,
        driver.client(driver.transport(mesh), timeout=30) as client,
    ):
        with pytest.raises(driver.module.ReadTimeout) as caught:
            client.get("http://orders/")
        assert str(caught.value.request.url) == "http://orders/"
        assert server.accepted == 2
        assert in_flight(mesh) == 0


@pytest.mark.parametrize("where", ["config", "extension"])
def test_timeout_of_the_whole_call(driver: Driver, where: str):
    config, extensions = ({"timeout": 0.4}, {}) if where == "config" else ({}, {"meshlb": {"timeout": 0.4}})
    with RawServer(wait_for_close) as server:
        retry = patient(per_try_timeout=0.25, max_attempts=100)
        with mesh_of(Endpoint.parse(server.address), retry=retry, **config) as mesh:
            with driver.client(driver.transport(mesh), timeout=30) as client:
                started = time.monotonic()
                with pytest.raises(driver.module.TimeoutException):
                    client.get("http://orders/", extensions=extensions)
                assert time.monotonic() - started < 5, "neither 30 s nor 100 attempts"
            assert server.accepted <= 3  # none, where the server was not even scheduled in time
            assert in_flight(mesh) == 0


def test_timeout_of_the_whole_call_includes_the_body(driver: Driver, backends: list[Backend]):
    backends[0].behave(chunks=100, interval=0.1)
    with mesh_of(backends[0]) as mesh, driver.client(driver.transport(mesh), timeout=30) as client:
        with pytest.raises(driver.module.TimeoutException) as caught:
            client.get("http://orders/bytes?size=1000", extensions={"meshlb": {"timeout": 0.5}})
        assert isinstance(caught.value, meshlb.DeadlineExceeded)
        assert isinstance(caught.value, TimeoutError)
        assert "GET http://orders/bytes" in str(caught.value)
        assert str(caught.value.request.url).startswith("http://orders/")
        node = mesh.cluster("orders").nodes[0]
        assert (node.failures, node.last_failure, node.in_flight) == (1, "DeadlineExceeded", 0)
        assert client.get("http://orders/bytes?size=10", timeout=30).status_code == 200, (
            "without a deadline, it has time"
        )


def test_slow_start_of_a_body_is_bounded_too(driver: Driver, backends: list[Backend]):
    backends[0].behave(chunks=2, interval=30)
    with mesh_of(backends[0], timeout=0.5) as mesh, driver.client(driver.transport(mesh), timeout=60) as client:
        with pytest.raises(driver.module.TimeoutException):
            client.get("http://orders/bytes?size=1000")
        assert in_flight(mesh) == 0


def test_connect_timeout_is_the_services(driver: Driver, backends: list[Backend]):
    """What a client allows for a host at the other end of the world is too long in a network of one's own."""
    seen = []

    def factory(endpoint: Endpoint) -> object:
        module = driver.module

        def handler(request: object) -> object:
            seen.append(request.extensions["timeout"])
            return module.Response(200)

        return module.MockTransport(handler)

    with mesh_of(backends[0], connect_timeout=0.7) as mesh:
        transport = driver.transport(mesh, transport_factory=factory)
        with driver.client(transport, timeout=driver.module.Timeout(9, connect=5)) as client:
            client.get("http://orders/")
            client.get("http://orders/", timeout=0.3)
            client.get("http://orders/", timeout=None)
            request = client.client.build_request("GET", "http://orders/")
            del request.extensions["timeout"]  # as with a transport that is used without a client
            driver.run(transport.handle_async_request if driver.is_async else transport.handle_request, request)
    assert seen == [
        {"connect": 0.7, "read": 9, "write": 9, "pool": 9},
        dict.fromkeys(("connect", "read", "write", "pool"), 0.3),
        {"connect": 0.7, "read": None, "write": None, "pool": None},
        {"connect": 0.7},
    ]
