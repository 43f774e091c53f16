"""gRPC: a bare channel against meshlb's, sync and aio, one call at a time."""

from __future__ import annotations

import asyncio

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


class _Nothing(grpc.UnaryUnaryClientInterceptor):
    def intercept_unary_unary(self, continuation, client_call_details, request):
        return continuation(client_call_details, request)
