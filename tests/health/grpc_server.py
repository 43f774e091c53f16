"""Real gRPC servers with a health service, in this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from tests.support.ports import loopback_host

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(HealthServicer):
    """The reference implementation, with counts, and with faults on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.checks = 0
        self.watches = 0
        self.metadata: dict[str, Any] = {}
        self.code: grpc.StatusCode | None = None
        """Abort every Check with it."""
        self.watch_code: grpc.StatusCode | None = None
        """Abort every Watch with it."""
        self.hang = False
        self.released = threading.Event()

    @property
    def watched(self) -> bool:
        """Whether somebody watches now."""
        return any(self._send_response_callbacks.values())

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  # the RPC's name
        self.checks += 1
        self.metadata = dict(context.invocation_metadata())
        if self.hang:
            self.released.wait(60)
        if self.code is not None:
            context.abort(self.code, "told to fail")
        return super().Check(request, context)

    def Watch(self, request: Any, context: grpc.ServicerContext, send_response_callback: Any = None) -> Any:  # noqa: N802
        self.watches += 1
        if self.watch_code is not None:
            context.abort(self.watch_code, "told to fail")
        return super().Watch(request, context, send_response_callback)


@contextlib.contextmanager
def health_server(
    health: HealthServicer | None, credentials: grpc.ServerCredentials | None = None, port: int = 0
) -> Iterator[str]:
    """A server on loopback; its address. ``health`` None: without a health service."""
    pool = ThreadPoolExecutor(16)
    server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
    if health is not None:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address = f"{loopback_host()}:{port}"
    bound = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    server.start()
    try:
        yield f"{loopback_host()}:{bound}"
    finally:
        if isinstance(health, Health):
            health.released.set()
        server.stop(None).wait()
        pool.shutdown()
