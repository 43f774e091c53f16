"""What every program here shares: clients made at import, as programs do, and one call through each of them.

The instances are in the environment: ORDERS (HTTP) and ECHO (gRPC), as host:port,host:port.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os

import httpx

import meshlb.grpc
import meshlb.grpc.aio
from meshlb import Mesh, ServiceConfig
from meshlb._proto.echo_pb2 import EchoRequest
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import AsyncMeshTransport, MeshTransport
from tests.process_life.programs import DUMP

faulthandler.register(DUMP, file=2)  # by number: a server may have put something else into sys.stderr's place

mesh = Mesh(
    StaticDiscovery({"orders": os.environ["ORDERS"].split(","), "echo": os.environ["ECHO"].split(",")}),
    defaults=ServiceConfig(policy="round_robin", connect_timeout=20, discovery_timeout=30),
)
client = httpx.Client(transport=MeshTransport(mesh), timeout=30)
stub = EchoStub(meshlb.grpc.insecure_channel("consul:///echo", mesh=mesh))
aio_stub = EchoStub(meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh))


def order() -> str:
    response = client.get("http://orders/")
    assert response.status_code == 200, response
    return response.headers["x-backend"]


def echo() -> str:
    assert stub.Say.future(EchoRequest(text="x"), timeout=30).result().text == "x"
    assert len(list(stub.Watch(EchoRequest(text="x", count=2), timeout=30))) == 2
    return str(stub.Say(EchoRequest(text="x"), timeout=30).backend)


async def concurrently() -> set[str]:
    async with httpx.AsyncClient(transport=AsyncMeshTransport(mesh), timeout=30) as async_client:
        responses = await asyncio.gather(*(async_client.get("http://orders/") for _ in range(4)))
    replies = await asyncio.gather(*(aio_stub.Say(EchoRequest(text="x"), timeout=30) for _ in range(4)))
    return {response.headers["x-backend"] for response in responses} | {reply.backend for reply in replies}


def everything() -> list[str]:
    """Call through all clients, sync and asyncio; who answered."""
    return sorted({order(), order(), echo(), echo()} | asyncio.run(concurrently()))
