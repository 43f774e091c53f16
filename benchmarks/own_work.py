"""What meshlb itself does around a call: the same call, on a stand-in that answers at once, without and with it.

Without a network there is no waiting, so the processor's caches stay warm and the figures hardly vary. Around a real
call the same work takes about five times as long, and so does all other Python: an interceptor that does nothing adds
more. ``python -m benchmarks grpc http`` shows that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import grpc
import grpc.aio
import httpx

import meshlb.grpc
import meshlb.grpc.aio
from benchmarks.measure import Samples, interleave, interleave_async
from benchmarks.stand_ins import AioChannel, Answering, Channel
from meshlb import Mesh
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.httpx import AsyncMeshTransport, MeshTransport

_SHORT = 10
"""How many calls of a microsecond take the place of a longer one: a batch begins with cold caches."""

_REQUEST = echo_pb2.EchoRequest(text="ok")


def run(*, rounds: int, batch: int) -> None:
    print(
        "\nmeshlb's own work, on a stand-in that answers at once; 3 endpoints, default settings; a stream has 1 message"
    )
    print(f"  {'':34} {'without us':>11} {'with us':>9} {'added us':>9}")
    addresses = [f"127.0.0.{number}:1" for number in (1, 2, 3)]
    with Mesh(StaticDiscovery({"echo": addresses})) as mesh, ExitStack() as stack:
        mesh.cluster("echo").wait_ready(5)
        stack.enter_context(patch.object(grpc, "insecure_channel", lambda *_: Channel()))
        stack.enter_context(patch.object(grpc.aio._channel, "insecure_channel", lambda *_: AioChannel()))
        with meshlb.grpc.insecure_channel("consul:///echo", mesh=mesh) as meshed:
            bare, ours = _calls(Channel()), _calls(meshed)
            for kind, call in bare.items():
                variants = {"without": call, "with": ours[kind]}
                _print(f"gRPC, {kind}", interleave(variants, rounds=rounds, batch=batch * _SHORT))
        with (
            httpx.Client(transport=Answering()) as direct,
            httpx.Client(transport=MeshTransport(mesh, transport_factory=lambda _: Answering())) as through,
        ):
            variants = {
                "without": lambda: direct.get("http://echo/v1/42"),
                "with": lambda: through.get("http://echo/v1/42"),
            }
            _print("httpx.Client, GET", interleave(variants, rounds=rounds, batch=batch))
        asyncio.run(_run_async(mesh, rounds, batch))


async def _run_async(mesh: Mesh, rounds: int, batch: int) -> None:
    async with (
        httpx.AsyncClient(transport=Answering()) as direct,
        httpx.AsyncClient(transport=AsyncMeshTransport(mesh, transport_factory=lambda _: Answering())) as through,
    ):
        variants = {
            "without": lambda: direct.get("http://echo/v1/42"),
            "with": lambda: through.get("http://echo/v1/42"),
        }
        _print("httpx.AsyncClient, GET", await interleave_async(variants, rounds=rounds, batch=batch))
    async with meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh) as meshed:
        bare, ours = _aio_calls(AioChannel()), _aio_calls(meshed)
        for kind, call in bare.items():
            samples = await interleave_async({"without": call, "with": ours[kind]}, rounds=rounds, batch=batch * _SHORT)
            _print(f"grpc.aio, {kind}", samples)


def _calls(channel: Any) -> dict[str, Callable[[], object]]:
    stub: Any = echo_pb2_grpc.EchoStub(channel)
    return {
        "unary": lambda: stub.Say(_REQUEST),
        "unary, future": lambda: stub.Say.future(_REQUEST).result(),
        "response stream": lambda: list(stub.Watch(_REQUEST)),
        "request stream": lambda: stub.Collect(iter([_REQUEST])),
        "both streams": lambda: list(stub.Chat(iter([_REQUEST]))),
    }


def _aio_calls(channel: Any) -> dict[str, Callable[[], Awaitable[object]]]:
    stub: Any = echo_pb2_grpc.EchoStub(channel)

    async def requests() -> AsyncIterator[Any]:
        yield _REQUEST

    async def say() -> object:
        return await stub.Say(_REQUEST)

    async def watch() -> object:
        return [reply async for reply in stub.Watch(_REQUEST)]

    async def collect() -> object:
        return await stub.Collect(requests())

    async def chat() -> object:
        return [reply async for reply in stub.Chat(requests())]

    return {"unary": say, "response stream": watch, "request stream": collect, "both streams": chat}


def _print(title: str, samples: dict[str, Samples]) -> None:
    without, ours = (median(samples[name].cpu) * 1e6 for name in ("without", "with"))
    print(f"  {title:34} {without:11.1f} {ours:9.1f} {ours - without:9.1f}")
