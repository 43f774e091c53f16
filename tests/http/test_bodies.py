"""What can be sent again, and that it arrives whole when it is."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshlb import Endpoint
from meshlb._http.body import TrackedBody, rewinder
from tests.http.drivers import Driver, in_flight, mesh_of
from tests.http.raw_server import RawServer, answering
from tests.support.backends import Backend
from tests.support.ports import free_port, loopback_host

_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def _generator() -> Iterator[bytes]:
    yield b"some "
    yield b"bytes"


async def _async_generator() -> AsyncIterator[bytes]:
    yield b"some "
    yield b"bytes"


class _Unseekable(io.RawIOBase):
    """A pipe, say."""

    def __init__(self) -> None:
        self._left = b"some bytes"

    def read(self, size: int = -1) -> bytes:
        data, self._left = self._left, b""
        return data


def _started_file() -> io.BytesIO:
    file = io.BytesIO(b"skipped some bytes")
    file.read(8)
    return file


# name: (how to make the arguments, whether it can be sent again after the server has seen it, for which clients)
BODIES: dict[str, tuple[Any, bool, str]] = {
    "bytes": (lambda: {"content": b"some bytes"}, True, "both"),
    "text": (lambda: {"content": "some bytes"}, True, "both"),
    "form": (lambda: {"data": {"some": "bytes"}}, True, "both"),
    "json": (lambda: {"json": {"some": "bytes"}}, True, "both"),
    "multipart of bytes": (lambda: {"files": {"f": b"some bytes"}}, True, "both"),
    "multipart of a file": (lambda: {"files": {"f": io.BytesIO(b"some bytes")}}, True, "both"),
    "list": (lambda: {"content": [b"some ", b"bytes"]}, True, "sync"),
    "file": (lambda: {"content": io.BytesIO(b"some bytes")}, True, "sync"),
    "generator": (lambda: {"content": _generator()}, False, "sync"),
    "iterator": (lambda: {"content": iter([b"some ", b"bytes"])}, False, "sync"),
    "pipe": (lambda: {"content": _Unseekable()}, False, "sync"),
    "async generator": (lambda: {"content": _async_generator()}, False, "async"),
}


def _bodies(driver: Driver) -> dict[str, tuple[Any, bool]]:
    wanted = ("both", "async" if driver.is_async else "sync")
    return {name: (make, replayable) for name, (make, replayable, where) in BODIES.items() if where in wanted}


def _arrived_whole(body: str) -> bool:
    return "some" in body and "bytes" in body


def test_unsent_body_goes_to_another_endpoint_whatever_it_is(driver: Driver, backends: list[Backend]):
    nobody = Endpoint(loopback_host(), free_port())
    for name, (make, _) in _bodies(driver).items():
        with mesh_of(nobody, backends[0]) as mesh, driver.client(driver.transport(mesh)) as client:
            response = client.post("http://orders/", **make())
            assert _arrived_whole(response.json()["body"]), name
            assert response.extensions["meshlb"]["attempts"] == 2
            assert in_flight(mesh) == 0


def test_body_that_was_seen_is_sent_again_only_if_it_can_be_read_again(driver: Driver, backends: list[Backend]):
    with RawServer(answering(_UNAVAILABLE)) as server:
        for name, (make, replayable) in _bodies(driver).items():
            backends[0].stats(clear=True)
            with (
                mesh_of(Endpoint.parse(server.address), backends[0]) as mesh,
                driver.client(driver.transport(mesh)) as client,
            ):
                response = client.request("PUT", "http://orders/", **make())
                if replayable:
                    assert response.status_code == 200, name
                    assert _arrived_whole(response.json()["body"]), name
                else:
                    assert response.status_code == 503, name
                    assert backends[0].requests() == 0, name
                assert in_flight(mesh) == 0


@pytest.mark.parametrize("kind", ["sync"])
def test_file_is_sent_again_from_where_it_stood(driver: Driver, backends: list[Backend]):
    with (
        RawServer(answering(_UNAVAILABLE)) as server,
        mesh_of(Endpoint.parse(server.address), backends[0]) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        response = client.request("PUT", "http://orders/", content=_started_file(), headers={"content-length": "10"})
        assert response.json()["body"] == "some bytes"


def test_error_of_the_callers_own_body(driver: Driver, backends: list[Backend]):
    class MyError(Exception):
        pass

    def failing() -> Iterator[bytes]:
        yield b"some "
        raise MyError

    async def failing_async() -> AsyncIterator[bytes]:
        yield b"some "
        raise MyError

    with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(MyError):
            client.request("PUT", "http://orders/", content=failing_async() if driver.is_async else failing())
        node = mesh.cluster("orders").nodes[0]
        assert (node.ignored, node.failures, node.in_flight) == (1, 0, 0)


@pytest.mark.parametrize("kind", ["sync"])
def test_response_of_another_call_as_body(driver: Driver, backends: list[Backend]):
    """When it breaks off, that is not the fault of the endpoint that it is sent to."""
    broken = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    with (
        RawServer(answering(broken)) as server,
        mesh_of(backends[0], services={"source": [server.address]}) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        source = client.stream("GET", "http://source/")
        with pytest.raises(driver.module.RemoteProtocolError):
            client.request("PUT", "http://orders/", content=source.iter_raw())
        driver.close(source)
        assert [node.failures for node in mesh.cluster("orders").nodes] == [0]
        assert [node.failures for node in mesh.cluster("source").nodes] == [1]
        assert in_flight(mesh) == 0


class _Stream(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b"some bytes"


def test_stream_of_the_users_own_is_not_trusted_to_be_replayable():
    body = TrackedBody(_Stream())
    assert body.rewind(), "untouched"
    body.started = True
    assert not body.rewind()


def test_file_that_was_closed_meanwhile_cannot_be_rewound():
    file = io.BytesIO(b"some bytes")
    body = TrackedBody(httpx.Request("PUT", "http://orders", content=file).stream)
    body.started = True
    assert body.rewind()
    file.close()
    assert not body.rewind()


def test_multipart_with_a_pipe_cannot_be_replayed(tmp_path: Path):
    """httpx would send an empty part the second time."""

    def stream(file: Any) -> Any:
        return httpx.Request("PUT", "http://orders", files={"f": file}).stream

    (tmp_path / "file").write_bytes(b"some bytes")
    with (tmp_path / "file").open("rb") as file:
        assert rewinder(stream(file)) is not None
    assert rewinder(stream(_Unseekable())) is None
