"""Targets, as the asyncio factories take them: the parsing is tests/grpc/sync/test_target.py's."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest

import meshlb.grpc.aio
from meshlb import ConfigError, Mesh, ServiceConfig
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.discovery import StaticDiscovery
from meshlb.grpc.aio._channel import MeshChannel
from tests.grpc.aio.servers import Request


async def test_a_list(serve: Any) -> None:
    servers = await serve(2)
    target = f"static:///{','.join(server.address for server in servers)}?policy=round_robin"
    async with Mesh(StaticDiscovery({}), defaults=ServiceConfig(connect_timeout=10)) as mesh:
        async with meshlb.grpc.aio.insecure_channel(target, mesh=mesh) as channel:
            assert isinstance(channel, MeshChannel)
            stub = EchoStub(channel)
            assert {(await stub.Say(Request(text="a"), timeout=20)).backend for _ in range(4)} == {"s0", "s1"}
        with pytest.raises(ConfigError, match="'tag'"):
            meshlb.grpc.aio.insecure_channel(f"{target}&tag=x", mesh=mesh)


class Passing(grpc.aio.UnaryStreamClientInterceptor, grpc.aio.StreamStreamClientInterceptor):
    """Adds nothing, but makes grpc's call an intercepted one, all of whose methods wait for one future."""

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details, request)

    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await continuation(details, requests)


async def test_a_stream_whose_attempts_are_intercepted(serve: Any) -> None:
    [server] = await serve()
    async with Mesh(StaticDiscovery({"echo": [server.address]})) as mesh:
        channel = meshlb.grpc.aio.insecure_channel("echo", mesh=mesh, attempt_interceptors=[Passing()])
        async with channel:
            stub = EchoStub(channel)
            for _ in range(3):
                replies = [reply.sequence async for reply in stub.Watch(Request(text="a", count=3), timeout=30)]
                assert replies == [0, 1, 2]
