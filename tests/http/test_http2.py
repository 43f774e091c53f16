"""HTTP/2: many calls on one connection, and its own ways of saying "not processed"."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import RequestReceived, StreamEnded

from meshlb import Endpoint
from tests.http.drivers import Driver, in_flight, mesh_of, patient
from tests.http.raw_server import Handler, RawServer


def http2(answer: Callable[[H2Connection, int], object]) -> Handler:
    """A server without TLS, by prior knowledge; ``answer(connection, stream)`` for each complete request."""

    def handle(connection: socket.socket) -> None:
        http = H2Connection(H2Configuration(client_side=False))
        http.initiate_connection()
        connection.sendall(http.data_to_send())
        while data := connection.recv(65536):
            for event in http.receive_data(data):
                if isinstance(event, RequestReceived):
                    assert dict(event.headers)[b":authority"] == b"orders"
                if isinstance(event, StreamEnded):
                    answer(http, event.stream_id)
            connection.sendall(http.data_to_send())

    return handle


def fine(http: H2Connection, stream: int) -> None:
    http.send_headers(stream, [(":status", "200")])
    http.send_data(stream, b"fine", end_stream=True)


def refuse(http: H2Connection, stream: int) -> None:
    http.reset_stream(stream, ErrorCodes.REFUSED_STREAM)


def break_off(http: H2Connection, stream: int) -> None:
    http.reset_stream(stream, ErrorCodes.INTERNAL_ERROR)


def _transport(driver: Driver, mesh: object) -> object:
    return driver.transport(mesh, http1=False, http2=True)


def test_calls_share_a_connection(driver: Driver):
    with RawServer(http2(fine)) as server, mesh_of(Endpoint.parse(server.address)) as mesh:
        with driver.client(_transport(driver, mesh)) as client:
            for _ in range(5):
                response = client.post("http://orders/", content=b"some bytes")
                assert (response.text, response.http_version) == ("fine", "HTTP/2")
        assert server.accepted == 1
        assert in_flight(mesh) == 0


def test_refused_stream_was_not_processed(driver: Driver):
    """RFC 9113 8.7: so even a POST may be sent elsewhere."""
    with RawServer(http2(refuse)) as refusing, RawServer(http2(fine)) as good:
        endpoints = [Endpoint.parse(server.address) for server in (refusing, good)]
        with mesh_of(*endpoints) as mesh, driver.client(_transport(driver, mesh)) as client:
            assert client.post("http://orders/", content=b"once").text == "fine"
            node = mesh.cluster("orders").nodes[0]
            assert (node.failures, node.last_failure, in_flight(mesh)) == (1, "REFUSED_STREAM", 0)


def test_stream_that_breaks_off_may_have_been_processed(driver: Driver):
    with RawServer(http2(break_off)) as breaking, RawServer(http2(fine)) as good:
        endpoints = [Endpoint.parse(server.address) for server in (breaking, good)]
        with mesh_of(*endpoints, retry=patient()) as mesh, driver.client(_transport(driver, mesh)) as client:
            assert client.get("http://orders/").text == "fine"
            with pytest.raises(driver.module.RemoteProtocolError):
                client.post("http://orders/", content=b"once")
            assert in_flight(mesh) == 0
