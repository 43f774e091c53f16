"""gRPC servers that are registered while they serve."""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc
import grpc.aio

from meshlb.registration.registration import Registration


class GracefulHealth(Protocol):
    """``grpc_health.v1.health.HealthServicer``."""

    def enter_graceful_shutdown(self) -> None: ...


class AioGracefulHealth(Protocol):
    """``grpc_health.v1.health.aio.HealthServicer``."""

    async def enter_graceful_shutdown(self) -> None: ...


def serve(
    server: grpc.Server, registration: Registration, *, grace: float | None = 30.0, health: GracefulHealth | None = None
) -> None:
    """Start ``server``, register it, and block until it ends: by its own ``stop``, or by an exception in this thread
    (SIGTERM after the registration's drain, Ctrl-C).

    Then it leaves Consul, ``health`` says NOT_SERVING, and calls under way get ``grace`` seconds (30: the grace that
    orchestrators give a stopping process; None: none). Raises what entering the registration raises; the server is
    stopped then.
    """
    server.start()
    try:
        with registration:
            try:
                server.wait_for_termination()
            finally:
                if health is not None:
                    health.enter_graceful_shutdown()
    finally:
        server.stop(grace).wait()


async def serve_aio(
    server: grpc.aio.Server,
    registration: Registration,
    *,
    grace: float | None = 30.0,
    health: AioGracefulHealth | None = None,
) -> None:
    """``serve`` for grpc.aio: until the server ends or this task is cancelled."""
    await server.start()
    try:
        async with registration:
            try:
                await server.wait_for_termination()
            finally:
                if health is not None:
                    await health.enter_graceful_shutdown()
    finally:
        await asyncio.shield(asyncio.ensure_future(server.stop(grace)))
