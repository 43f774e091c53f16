"""Each fault of the table brought about for real: what the caller sees, what the endpoint's state learns, and whether
another endpoint is asked."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from meshlb import Endpoint, Mesh
from tests.http.drivers import Driver, in_flight, mesh_of
from tests.http.raw_server import RawServer, answering, read_request, reset, wait_for_close
from tests.support.backends import Backend
from tests.support.ports import free_port, loopback_host
from tests.support.processes import REPO

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"


def refusing(stack: ExitStack) -> str:
    return f"{loopback_host()}:{free_port()}"


def unresolvable(stack: ExitStack) -> str:
    return "nowhere.invalid:80"


def black_hole(stack: ExitStack) -> str:
    """SYNs get no answer: the queue of a listener that never accepts is full."""
    listener = stack.enter_context(socket.create_server((loopback_host(), 0), backlog=0))
    for _ in range(2):
        filler = stack.enter_context(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
    host, port = listener.getsockname()
    return f"{host}:{port}"


def raw(handler: Callable[[socket.socket], None]) -> Callable[[ExitStack], str]:
    return lambda stack: stack.enter_context(RawServer(handler)).address


def read_then_reset(connection: socket.socket) -> None:
    read_request(connection)
    reset(connection)


# name: (what is wrong, what httpx raises, whether a POST that met it may be sent again)
FAULTS: dict[str, tuple[Callable[[ExitStack], str], str, bool]] = {
    "refused": (refusing, "ConnectError", True),
    "unresolvable": (unresolvable, "ConnectError", True),
    "black hole": (black_hole, "ConnectTimeout", True),
    "closes unanswered": (raw(answering(b"")), "RemoteProtocolError|ReadError", False),
    "reset unanswered": (raw(read_then_reset), "ReadError|RemoteProtocolError", False),
    "garbage": (raw(answering(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")), "RemoteProtocolError|ReadError", False),
    "silent": (raw(wait_for_close), "ReadTimeout", False),
    "half a header": (raw(answering(b"HTTP/1.1 200 OK\r\nContent-Le")), "RemoteProtocolError|ReadError", False),
}


def _calling(driver: Driver, mesh: Mesh) -> Any:
    timeout = driver.module.Timeout(30, read=1.0)
    return driver.client(driver.transport(mesh), timeout=timeout)


@pytest.mark.parametrize("fault", FAULTS)
def test_idempotent_request_goes_elsewhere(driver: Driver, backends: list[Backend], fault: str):
    with ExitStack() as stack:
        bad = Endpoint.parse(FAULTS[fault][0](stack))
        mesh = stack.enter_context(mesh_of(bad, *backends, connect_timeout=1.0))
        client = stack.enter_context(_calling(driver, mesh))
        response = client.get("http://orders/")
        assert response.headers["x-backend"] == backends[0].id
        assert response.extensions["meshlb"] == {"endpoint": backends[0].address, "attempts": 2}
        bad_node, good_node = mesh.cluster("orders").nodes[:2]
        assert (bad_node.failures, good_node.successes) == (1, 1)
        assert in_flight(mesh) == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_post_goes_elsewhere_only_if_it_was_not_sent(driver: Driver, backends: list[Backend], fault: str):
    make, error_names, unsent = FAULTS[fault]
    with ExitStack() as stack:
        mesh = stack.enter_context(mesh_of(Endpoint.parse(make(stack)), *backends, connect_timeout=1.0))
        client = stack.enter_context(_calling(driver, mesh))
        if unsent:
            assert client.post("http://orders/", content=b"once").json()["body"] == "once"
        else:
            with pytest.raises(driver.module.TransportError) as caught:
                client.post("http://orders/", content=b"once")
            assert type(caught.value).__name__ in error_names.split("|")
            assert type(caught.value).__module__ == driver.module.__name__, "untouched"
            assert str(caught.value.request.url) == "http://orders/"
            assert sum(backend.requests() for backend in backends) == 0
        assert mesh.cluster("orders").nodes[0].failures == 1
        assert in_flight(mesh) == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_without_another_endpoint_the_error_is_the_packages_own(driver: Driver, fault: str):
    make, error_names, _ = FAULTS[fault]
    with ExitStack() as stack:
        mesh = stack.enter_context(mesh_of(Endpoint.parse(make(stack)), connect_timeout=0.2, retry=None))
        client = stack.enter_context(_calling(driver, mesh))
        with pytest.raises(driver.module.TransportError) as caught:
            client.get("http://orders/path")
        assert type(caught.value).__name__ in error_names.split("|")
        assert str(caught.value.request.url) == "http://orders/path"
        assert in_flight(mesh) == 0


@pytest.mark.parametrize("handler", [answering(_HEAD + b"half"), answering(_HEAD + b"half", then=reset)])
def test_body_that_breaks_off_is_the_callers_error_and_the_endpoints_failure(
    driver: Driver, backends: list[Backend], handler: Callable[[socket.socket], None]
):
    with RawServer(handler) as server, mesh_of(Endpoint.parse(server.address), *backends) as mesh:
        with driver.client(driver.transport(mesh)) as client, pytest.raises(driver.module.TransportError) as caught:
            client.get("http://orders/")
        assert type(caught.value).__name__ in ("RemoteProtocolError", "ReadError")
        assert str(caught.value.request.url) == "http://orders/"
        assert server.accepted == 1, "nothing is sent again once the answer has begun"
        node = mesh.cluster("orders").nodes[0]
        assert (node.failures, node.successes, in_flight(mesh)) == (1, 0, 0)


def test_stale_keep_alive_connection(driver: Driver, backends: list[Backend]):
    """The server closes the idle connection at the moment when the client uses it again."""

    def one_answer_then_close(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        read_request(connection)  # takes the second request, and closes

    with (
        RawServer(one_answer_then_close) as server,
        mesh_of(Endpoint.parse(server.address), backends[0]) as mesh,
        driver.client(driver.transport(mesh)) as client,
    ):
        assert client.get("http://orders/").extensions["meshlb"]["endpoint"] == server.address
        assert client.get("http://orders/").headers["x-backend"] == backends[0].id
        assert client.get("http://orders/").extensions["meshlb"]["endpoint"] == server.address
        with pytest.raises(driver.module.RemoteProtocolError):
            client.post("http://orders/")
        assert in_flight(mesh) == 0


def test_full_pool_is_no_endpoints_fault(driver: Driver, backends: list[Backend]):
    limits = driver.module.Limits(max_connections=1)
    timeout = driver.module.Timeout(5, pool=0.1)
    with (
        mesh_of(backends[0], backends[1]) as mesh,
        driver.client(driver.transport(mesh, limits=limits), timeout=timeout) as client,
    ):
        held = client.stream("GET", "http://orders/bytes?size=100000000")
        with pytest.raises(driver.module.PoolTimeout):
            client.get("http://orders/")
        node = mesh.cluster("orders").nodes[0]
        assert (node.ignored, node.failures, node.in_flight) == (1, 0, 1)
        assert backends[1].requests() == 0, "asking elsewhere would spread a local shortage"
        driver.close(held)
        assert client.get("http://orders/").status_code == 200
        assert in_flight(mesh) == 0


def test_wrong_request_is_no_endpoints_fault(driver: Driver, backends: list[Backend]):
    with mesh_of(*backends) as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(driver.module.LocalProtocolError):
            client.get("http://orders/", headers={"bad name": "x"})
        with pytest.raises(driver.module.UnsupportedProtocol):
            client.get("ftp://orders/")
        nodes = mesh.cluster("orders").nodes
        assert [(node.failures, node.in_flight) for node in nodes] == [(0, 0)] * 3
        assert sum(node.ignored for node in nodes) == 2


_NO_FILES = """
import asyncio, contextlib, os, resource
import {package} as module
import meshlb
from meshlb.discovery import StaticDiscovery
from meshlb.{package} import AsyncMeshTransport, MeshTransport

async def ask_async(surroundings):
    async with module.AsyncClient(transport=AsyncMeshTransport(mesh)) as client:
        with surroundings:
            try:
                await client.get("http://orders/")
            except module.ConnectError as error:
                return error

def ask(surroundings):
    with module.Client(transport=MeshTransport(mesh)) as client:
        with surroundings:
            try:
                client.get("http://orders/")
            except module.ConnectError as error:
                return error

@contextlib.contextmanager
def exhausted():
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    yield
    for number in held:
        os.close(number)

def totals():
    return [sum(getattr(node, name) for node in nodes) for name in ("ignored", "failures", "in_flight")]

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with meshlb.Mesh(StaticDiscovery({{"orders": ["127.0.0.1:1", "127.0.0.1:2"]}})) as mesh:
    mesh.cluster("orders").wait_ready(5)
    nodes = mesh.cluster("orders").nodes
    run = (lambda surroundings: asyncio.run(ask_async(surroundings))) if {is_async} else ask
    run(contextlib.nullcontext())  # imports whatever is imported late
    before = totals()
    error = run(exhausted())
    print(type(error).__name__, [now - then for now, then in zip(totals(), before)])
"""


@pytest.mark.parametrize("is_async", [False, True])
def test_no_file_descriptor_left_is_no_endpoints_fault(package: str, is_async: bool):
    script = _NO_FILES.format(package=package, is_async=is_async)
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["ConnectError [1, 0, 0]"], done.stderr


def test_connection_reset_as_soon_as_it_is_accepted(driver: Driver, backends: list[Backend]):
    """Depending on who is faster, connecting fails, writing or reading."""
    with RawServer(reset) as server, mesh_of(Endpoint.parse(server.address), backends[0]) as mesh:
        with driver.client(driver.transport(mesh)) as client:
            for _ in range(5):
                assert client.get("http://orders/").headers["x-backend"] == backends[0].id
        assert mesh.cluster("orders").nodes[0].failures == 5
        assert in_flight(mesh) == 0
