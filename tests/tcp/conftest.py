"""A service of TCP servers, and the three ways to connect to it behind one face."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trustme

from meshlb import Cluster, Mesh, ServiceConfig, tcp
from meshlb.discovery import StaticDiscovery
from tests.support.wait import eventually
from tests.tcp.servers import BUSY_TIMEOUT, Server

ClusterOf = Callable[..., Cluster]


@pytest.fixture
def cluster_of() -> Iterator[ClusterOf]:
    """A cluster of these servers (or addresses). At the end nothing may be in flight."""
    meshes: list[Mesh] = []

    def make(*servers: Any, **config: Any) -> Cluster:
        config = {"policy": "round_robin", "connect_timeout": BUSY_TIMEOUT, "discovery_timeout": 20, **config}
        addresses = [getattr(server, "address", server) for server in servers]
        mesh = Mesh(StaticDiscovery({"cache": addresses}), defaults=ServiceConfig(**config))
        meshes.append(mesh)
        cluster = mesh.cluster("cache")
        cluster.wait_ready(20)
        return cluster

    yield make
    for mesh in meshes:
        eventually(lambda mesh=mesh: sum(in_flight(cluster) for cluster in mesh.clusters) == 0, 20)
        mesh.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., list[Server]]]:
    """Start so many servers, to be stopped after the test."""
    with ExitStack() as stack:

        def start(count: int = 1, tls: ssl.SSLContext | None = None) -> list[Server]:
            return [stack.enter_context(Server(f"s{number}", tls)) for number in range(count)]

        yield start


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def server_tls(authority: trustme.CA) -> Callable[[str], ssl.SSLContext]:
    """The TLS of a server with a certificate of that name."""

    def make(name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name).configure_cert(context)
        return context

    return make


def in_flight(cluster: Cluster) -> int:
    return sum(node.in_flight for node in cluster.nodes)


class Way:
    """One way to connect: ``async with way.connected(cluster, ...) as talk``, ``await talk(b"x")`` says what came back.
    The first line is the server's name."""

    @asynccontextmanager
    async def connected(self, cluster: Cluster, **options: Any) -> AsyncIterator[Callable[[bytes], Any]]:
        raise NotImplementedError
        yield


class Sockets(Way):
    @asynccontextmanager
    async def connected(self, cluster: Cluster, **options: Any) -> AsyncIterator[Callable[[bytes], Any]]:
        sock = await anyio.to_thread.run_sync(lambda: tcp.connect(cluster, **options))
        try:
            sock.settimeout(30)
            file = sock.makefile("rb")

            def line(data: bytes) -> bytes:
                if data:
                    sock.sendall(data)
                return file.readline()

            async def talk(data: bytes) -> bytes:
                return await anyio.to_thread.run_sync(line, data)

            yield talk
        finally:
            sock.close()
            file.close()


class Asyncio(Way):
    @asynccontextmanager
    async def connected(self, cluster: Cluster, **options: Any) -> AsyncIterator[Callable[[bytes], Any]]:
        reader, writer = await tcp.open_connection(cluster, **options)
        try:

            async def talk(data: bytes) -> bytes:
                if data:
                    writer.write(data)
                return await reader.readline()

            yield talk
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except OSError:
                pass  # what had ended the connection


class Streams(Way):
    @asynccontextmanager
    async def connected(self, cluster: Cluster, **options: Any) -> AsyncIterator[Callable[[bytes], Any]]:
        if "ssl" in options:
            options["tls_standard_compatible"] = False
        async with await tcp.open_stream(cluster, **options) as stream:

            async def talk(data: bytes) -> bytes:
                if data:
                    await stream.send(data)
                got = b""
                try:
                    while not got.endswith(b"\n"):
                        got += await stream.receive()
                except anyio.EndOfStream:
                    pass
                return got

            yield talk


_WAYS = {
    "connect": ("asyncio", Sockets),  # threads are the same under both
    "open_connection": ("asyncio", Asyncio),
    "open_stream, asyncio": ("asyncio", Streams),
    "open_stream, trio": ("trio", Streams),
}


@pytest.fixture(params=list(_WAYS))
def way_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def way(way_name: str) -> Way:
    return _WAYS[way_name][1]()


@pytest.fixture
def anyio_backend(way_name: str) -> str:
    return _WAYS[way_name][0]
