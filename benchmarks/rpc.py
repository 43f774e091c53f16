"""gRPC: a bare channel against meshlb's, sync and aio, one call at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

import meshlb.grpc
import meshlb.grpc.aio
from benchmarks.measure import interleave, interleave_async, report
from benchmarks.servers import server
from meshlb import Mesh, ServiceConfig
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery

_REQUEST = echo_pb2.EchoRequest(text="ok")


def run(*, rounds: int, batch: int) -> None:
    with server("grpc", 3) as addresses, Mesh(StaticDiscovery({"echo": addresses})) as mesh:
        with (
            grpc.insecure_channel(addresses[0]) as bare,
            grpc.intercept_channel(grpc.insecure_channel(addresses[0]), _Nothing()) as intercepted,
            meshlb.grpc.insecure_channel("consul:///echo", mesh=mesh) as meshed,
        ):
            calls = {
                "grpcio, bare": echo_pb2_grpc.EchoStub(bare).Say,
                "grpcio + an interceptor of no use": echo_pb2_grpc.EchoStub(intercepted).Say,
                "meshlb, 3 endpoints": echo_pb2_grpc.EchoStub(meshed).Say,
            }
            variants = {name: (lambda call=call: call(_REQUEST)) for name, call in calls.items()}
            report("grpcio sync, unary", interleave(variants, rounds=rounds, batch=batch))
            timed = {name: (lambda call=call: call(_REQUEST, timeout=5)) for name, call in calls.items()}
            report("grpcio sync, unary, with a deadline", interleave(timed, rounds=rounds, batch=batch))
            for kind in _KINDS:
                variants = {
                    "grpcio, bare": _call_of(bare, kind),
                    "meshlb, 3 endpoints": _call_of(meshed, kind),
                }
                report(f"grpcio sync, {kind}", interleave(variants, rounds=rounds, batch=batch // 3))
        asyncio.run(_run_aio(addresses, mesh, rounds, batch))
    with (
        server("grpc", 3) as addresses,
        Mesh(
            StaticDiscovery({"echo": addresses}), defaults=ServiceConfig(policy="round_robin", retry=None, breaker=None)
        ) as mesh,
        grpc.insecure_channel(addresses[0]) as bare,
        meshlb.grpc.insecure_channel("consul:///echo", mesh=mesh) as meshed,
    ):
        calls = {
            "grpcio, bare": echo_pb2_grpc.EchoStub(bare).Say,
            "meshlb, round robin, nothing else": echo_pb2_grpc.EchoStub(meshed).Say,
        }
        variants = {name: (lambda call=call: call(_REQUEST)) for name, call in calls.items()}
        report("grpcio sync, unary, least of meshlb", interleave(variants, rounds=rounds, batch=batch))


async def _run_aio(addresses: list[str], mesh: Mesh, rounds: int, batch: int) -> None:
    async with (
        grpc.aio.insecure_channel(addresses[0]) as bare,
        meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh) as meshed,
    ):
        bare_say = echo_pb2_grpc.EchoStub(bare).Say
        mesh_say = echo_pb2_grpc.EchoStub(meshed).Say

        async def call_bare() -> None:
            await bare_say(_REQUEST)

        async def call_meshed() -> None:
            await mesh_say(_REQUEST)

        samples = await interleave_async(
            {"grpc.aio, bare": call_bare, "meshlb, 3 endpoints": call_meshed}, rounds=rounds, batch=batch
        )
        report("grpc.aio, unary", samples)
        for kind in _KINDS[1:]:
            variants = {"grpc.aio, bare": _aio_call_of(bare, kind), "meshlb, 3 endpoints": _aio_call_of(meshed, kind)}
            samples = await interleave_async(variants, rounds=rounds, batch=batch // 3)
            report(f"grpc.aio, {kind}", samples)


_KINDS = ("unary, future", "response stream of 3", "request stream of 3", "both streams, 3 messages")
"""The calls other than a blocking one; the first has no counterpart on asyncio."""


def _call_of(channel: grpc.Channel, kind: str) -> Callable[[], object]:
    stub: Any = echo_pb2_grpc.EchoStub(channel)
    match kind:
        case "unary, future":
            return lambda: stub.Say.future(_REQUEST).result()
        case "response stream of 3":
            return lambda: list(stub.Watch(_REQUEST))
        case "request stream of 3":
            return lambda: stub.Collect(iter([_REQUEST] * 3))
    return lambda: list(stub.Chat(iter([_REQUEST] * 3)))


def _aio_call_of(channel: grpc.aio.Channel, kind: str) -> Callable[[], Awaitable[object]]:
    stub: Any = echo_pb2_grpc.EchoStub(channel)

    async def requests() -> AsyncIterator[echo_pb2.EchoRequest]:
        for _ in range(3):
            yield _REQUEST

    async def watch() -> object:
        return [reply async for reply in stub.Watch(_REQUEST)]

    async def collect() -> object:
        return await stub.Collect(requests())

    async def chat() -> object:
        return [reply async for reply in stub.Chat(requests())]

    return {_KINDS[1]: watch, _KINDS[2]: collect, _KINDS[3]: chat}[kind]


class _Nothing(grpc.UnaryUnaryClientInterceptor):
    def intercept_unary_unary(self, continuation, client_call_details, request):
        return continuation(client_call_details, request)
