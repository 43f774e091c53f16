"""grpc.aio knows asyncio alone. Servers of a test live in its own event loop, so that nothing else is left behind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import pytest

import meshlb.grpc.aio
from meshlb import Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from tests.grpc.aio.servers import Server, unused_address
from tests.support.wait import eventually

Serve = Callable[..., Awaitable[list[Server]]]
MakeMesh = Callable[..., Mesh]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start so many servers, to be stopped after the test."""
    async with AsyncExitStack() as stack:

        async def start(count: int = 1) -> list[Server]:
            return [await stack.enter_async_context(Server(f"s{number}")) for number in range(count)]

        yield start
        await settle()


async def settle() -> None:
    """Make one more RPC, so that what gRPC's core still has to say of the cancelled ones is said to this event loop.

    grpc.aio has one queue for all loops of a process, and an event for a loop that is closed by then ("Event loop is
    closed") is reported in the one that comes next: in another test.
    """
    async with grpc.aio.insecure_channel(unused_address()) as channel:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await channel.unary_unary("/none")(b"", timeout=10)


@pytest.fixture
def make_mesh() -> Iterator[MakeMesh]:
    """A mesh with the service "echo" at these addresses; at the end no lease may be open."""
    meshes: list[Mesh] = []

    def make(addresses: list[str], **config: Any) -> Mesh:
        config.setdefault("policy", "round_robin")
        mesh = Mesh(StaticDiscovery({"echo": addresses}), defaults=ServiceConfig(**config))
        meshes.append(mesh)
        return mesh

    yield make
    try:
        for mesh in meshes:
            eventually(lambda mesh=mesh: in_flight(mesh) == 0, message=lambda mesh=mesh: f"open: {mesh.snapshot()}")
    finally:
        for mesh in meshes:
            mesh.close()


@pytest.fixture
async def channel_to(make_mesh: MakeMesh) -> AsyncIterator[Callable[..., Any]]:
    """A mesh channel to these servers, closed after the test."""
    async with AsyncExitStack() as stack:

        async def connect(servers: list[Server], channel: dict[str, Any] | None = None, **config: Any) -> Any:
            mesh = make_mesh([server.address for server in servers], **config)
            mesh.cluster("echo").wait_ready(5)
            made = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh, **(channel or {}))
            return await stack.enter_async_context(made)

        yield connect
    await settle()


def in_flight(mesh: Mesh) -> int:
    return sum(endpoint["in_flight"] for service in mesh.snapshot() for endpoint in service["endpoints"])
