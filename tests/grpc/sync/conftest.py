"""Servers, meshes and channels of a test. At its end no lease may be open and no sub-channel left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from meshlb import Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel, secure_channel
from tests.grpc.sync.servers import Server
from tests.support.wait import eventually

Serve = Callable[..., list[Server]]
MakeMesh = Callable[..., Mesh]
ChannelTo = Callable[..., Any]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start so many servers, to be stopped after the test."""
    with ExitStack() as stack:

        def start(count: int = 1, **options: Any) -> list[Server]:
            return [stack.enter_context(Server(f"s{number}", **options)) for number in range(count)]

        yield start


@pytest.fixture
def make_mesh() -> Iterator[MakeMesh]:
    """A mesh with the service "echo" at these addresses."""
    meshes: list[Mesh] = []

    def make(addresses: list[str], **config: Any) -> Mesh:
        config.setdefault("policy", "round_robin")
        mesh = Mesh(StaticDiscovery({"echo": addresses}), defaults=ServiceConfig(**config))
        meshes.append(mesh)
        return mesh

    yield make
    for mesh in meshes:
        if not mesh.closed:
            eventually(lambda mesh=mesh: in_flight(mesh) == 0, message=lambda mesh=mesh: f"open: {mesh.snapshot()}")
            mesh.close()


@pytest.fixture
def channel_to(make_mesh: MakeMesh) -> Iterator[ChannelTo]:
    """A mesh channel to these servers (or addresses), closed after the test."""
    channels: list[Any] = []

    def connect(
        servers: list[Any], *, options: Any = None, credentials: Any = None, compression: Any = None, **config: Any
    ) -> Any:
        mesh = make_mesh([getattr(server, "address", server) for server in servers], **config)
        if credentials is None:
            channel = insecure_channel("consul:///echo", options, compression, mesh=mesh)
        else:
            channel = secure_channel("consul:///echo", credentials, options, compression, mesh=mesh)
        channels.append(channel)
        if servers:
            mesh.cluster("echo").wait_ready(5)
        return channel

    yield connect
    for channel in channels:
        channel.close()
        assert len(channel._resources) == 0


def in_flight(mesh: Mesh) -> int:
    return sum(endpoint["in_flight"] for service in mesh.snapshot() for endpoint in service["endpoints"])
