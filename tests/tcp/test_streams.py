"""What a stream's own end says of its endpoint."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute

from meshlb import tcp
from tests.support.wait import eventually_async
from tests.tcp.conftest import ClusterOf, in_flight
from tests.tcp.servers import Server

Serve = Callable[..., list[Server]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_reset_counts_against_the_endpoint(serve: Serve, cluster_of: ClusterOf) -> None:
    [server] = serve()
    cluster = cluster_of(server)
    reader, writer = await tcp.open_connection(cluster)
    assert await reader.readline() == b"s0\n"
    server.reset()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    await eventually_async(lambda: in_flight(cluster) == 0)
    assert cluster.nodes[0].last_failure == "ConnectionResetError"
    writer.close()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_broken_stream_counts_against_the_endpoint(serve: Serve, cluster_of: ClusterOf) -> None:
    [server] = serve()
    cluster = cluster_of(server)
    async with await tcp.open_stream(cluster) as stream:
        assert await stream.receive() == b"s0\n"
        assert stream.extra(SocketAttribute.remote_address)[1] == stream.lease.endpoint.port
        await stream.send(b"x")
        assert await stream.receive() == b"x"
        server.reset()
        with pytest.raises(anyio.BrokenResourceError):
            await stream.receive()
        assert in_flight(cluster) == 1
    await stream.aclose()
    assert in_flight(cluster) == 0
    assert cluster.nodes[0].last_failure == "ConnectionResetError"


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_half_closed(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    async with await tcp.open_stream(cluster) as stream:
        await stream.send(b"last\n")
        await stream.send_eof()
        got = b""
        async for chunk in stream:
            got += chunk
        assert got == b"s0\nlast\n"
    assert cluster.nodes[0].successes == 1


async def test_asyncios_own_options(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())
    reader, writer = await tcp.open_connection(cluster, limit=8, happy_eyeballs_delay=0.1)
    writer.write(b"far too long a line\n")
    assert await reader.readline() == b"s0\n"
    with pytest.raises(ValueError, match="limit"):
        await reader.readline()
    writer.transport.abort()
    await eventually_async(lambda: in_flight(cluster) == 0)
    assert cluster.nodes[0].failures == 0


def test_a_loop_that_ended_with_an_open_connection(serve: Serve, cluster_of: ClusterOf) -> None:
    cluster = cluster_of(*serve())

    async def forget() -> Any:
        _, writer = await tcp.open_connection(cluster)
        assert in_flight(cluster) == 1
        return writer.transport

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asyncio's "unclosed transport", as of any other
        asyncio.run(forget())
        gc.collect()

        def gone() -> bool:
            gc.collect()
            return in_flight(cluster) == 0

        asyncio.run(eventually_async(gone, 20))
    assert cluster.nodes[0].failures == 0
