"""Deadlines and the word between layers, over gRPC: sync and asyncio, clients and interceptors."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import pytest
from anyio.from_thread import start_blocking_portal

import meshlb
import meshlb.grpc
import meshlb.grpc.aio
from meshlb import Mesh, Retry, ServiceConfig
from meshlb.discovery import StaticDiscovery
from meshlb.server.grpc import AioLoadReportInterceptor, LoadReportInterceptor
from meshlb.serving import ATTEMPT_METADATA, PUSHBACK, surroundings
from tests.support.ports import loopback_host

METHOD = "/layers.Layer/Get"
STREAM = "/layers.Layer/Watch"
CONFIG = ServiceConfig(retry=Retry(idempotent_methods=(METHOD, STREAM)), breaker=None, connect_timeout=10.0)


class Service:
    """A server that notes what it gets, and answers UNAVAILABLE, or what a call of the service below it ends with."""

    def __init__(self, below: list[str] | None = None) -> None:
        self.calls = 0
        self.left: list[float | None] = []
        self.noted: list[float | None] = []
        self.previous: list[str | None] = []
        self.over = threading.Event()
        self.mesh = None if below is None else Mesh(StaticDiscovery({"below": below}), defaults=CONFIG)
        self.address = ""

    def note(self, context: Any) -> None:
        self.calls += 1
        self.left.append(context.time_remaining())
        around = surroundings()
        self.noted.append(None if around is None else around.limited(None))
        metadata = dict(context.invocation_metadata())
        self.previous.append(next((metadata[name] for name in ATTEMPT_METADATA if name in metadata), None))

    def get(self, request: bytes, context: Any) -> bytes:
        self.note(context)
        if self.mesh is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not today")
        with meshlb.grpc.insecure_channel("consul:///below", mesh=self.mesh) as channel:
            try:
                channel.unary_unary(METHOD)(request)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
        return b""

    async def get_async(self, request: bytes, context: Any) -> bytes:
        self.note(context)
        if self.mesh is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not today")
        async with meshlb.grpc.aio.insecure_channel("consul:///below", mesh=self.mesh) as channel:
            try:
                await channel.unary_unary(METHOD)(request)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details())
        return b""

    def watch(self, request: bytes, context: Any) -> Iterator[bytes]:
        self.note(context)
        yield b"first"
        self.over.wait(60)

    def handlers(self, get: Any) -> grpc.GenericRpcHandler:
        handlers = {
            "Get": grpc.unary_unary_rpc_method_handler(get),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
        }
        return grpc.method_handlers_generic_handler("layers.Layer", handlers)


@contextlib.contextmanager
def serve(style: str, below: list[str] | None = None, **options: Any) -> Iterator[Service]:
    service = Service(below)
    try:
        with (_sync if style == "sync" else _aio)(service, style, **options):
            yield service
    finally:
        if service.mesh is not None:
            service.mesh.close()


@contextlib.contextmanager
def _sync(service: Service, style: str, **options: Any) -> Iterator[None]:
    server = grpc.server(ThreadPoolExecutor(8), interceptors=[LoadReportInterceptor(**options)])
    server.add_generic_rpc_handlers((service.handlers(service.get),))
    service.address = f"{(host := loopback_host())}:{server.add_insecure_port(f'{host}:0')}"
    server.start()
    try:
        yield
    finally:
        service.over.set()
        server.stop(None).wait()


@contextlib.contextmanager
def _aio(service: Service, style: str, **options: Any) -> Iterator[None]:
    async def start() -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[AioLoadReportInterceptor(**options)])
        get = service.get_async if style == "coroutine" else service.get
        server.add_generic_rpc_handlers((service.handlers(get),))
        service.address = f"{(host := loopback_host())}:{server.add_insecure_port(f'{host}:0')}"
        await server.start()
        return server

    with start_blocking_portal("asyncio") as portal:
        server = portal.call(start)
        try:
            yield
        finally:
            service.over.set()
            portal.call(server.stop, None)


def call(mesh: Mesh, *, aio: bool, timeout: float | None = None) -> Any:
    """The error that a call ends with."""

    async def make() -> Any:
        async with meshlb.grpc.aio.insecure_channel("consul:///front", mesh=mesh) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary(METHOD)(b"", timeout=timeout)
            return caught.value

    if aio:
        return asyncio.run(make())
    with meshlb.grpc.insecure_channel("consul:///front", mesh=mesh) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(METHOD)(b"", timeout=timeout)
    return caught.value


@pytest.mark.parametrize("aio", [False, True], ids=["sync-client", "aio-client"])
@pytest.mark.parametrize("style", ["sync", "coroutine", "blocking"])
def test_attempts_do_not_multiply_and_the_deadline_shrinks(style: str, aio: bool):
    with contextlib.ExitStack() as stack:
        last = stack.enter_context(serve(style))
        front = [stack.enter_context(serve(style, [last.address])) for _ in range(2)]
        mesh = stack.enter_context(
            Mesh(StaticDiscovery({"front": [server.address for server in front]}), defaults=CONFIG)
        )
        error = call(mesh, aio=aio, timeout=40)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(error.trailing_metadata())[PUSHBACK] == "-1"
        assert sum(server.calls for server in front) == 1
        assert last.calls == 3
        assert last.previous == [None, "1", "2"]
        asked = next(server for server in front if server.calls)
        assert 0 < asked.noted[0] <= 40.5  # gRPC rounds what it passes on
        assert 0 < last.left[0] <= asked.left[0] + 0.5


@pytest.mark.parametrize("style", ["sync", "coroutine"])
def test_opted_out(style: str):
    with contextlib.ExitStack() as stack:
        last = stack.enter_context(serve(style))
        options = {"inherit_deadline": False, "stop_amplification": False}
        front = stack.enter_context(serve(style, [last.address], **options))
        mesh = stack.enter_context(Mesh(StaticDiscovery({"front": [front.address]}), defaults=CONFIG))
        error = call(mesh, aio=False, timeout=40)
        assert PUSHBACK not in dict(error.trailing_metadata())
        assert front.calls == 3
        assert last.calls == 9
        assert front.noted == [None] * 3


@pytest.mark.parametrize("aio", [False, True], ids=["sync", "aio"])
def test_no_call_begins_without_time(aio: bool):
    with serve("sync") as server, Mesh(StaticDiscovery({"front": [server.address]}), defaults=CONFIG) as mesh:
        with meshlb.deadline(0):
            error = call(mesh, aio=aio)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert isinstance(error, meshlb.DeadlineExceeded)
        assert server.calls == 0
        with meshlb.deadline(20):
            call(mesh, aio=aio)
            call(mesh, aio=aio, timeout=10)
        assert server.left[0] <= 20.5 and server.left[-1] <= 10.5
        assert all(entry["in_flight"] == 0 for entry in mesh.cluster("front").snapshot()["endpoints"])


@pytest.mark.parametrize("aio", [False, True], ids=["sync", "aio"])
def test_a_stream_ends_with_the_inherited_deadline(aio: bool):
    """A configured timeout is about its first message; a deadline is about all of it."""
    with serve("sync") as server, Mesh(StaticDiscovery({"front": [server.address]}), defaults=CONFIG) as mesh:
        with meshlb.deadline(2):
            error = read(mesh, aio=aio)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert server.left[0] <= 2.5


@pytest.mark.parametrize("aio", [False, True], ids=["sync", "aio"])
def test_a_silent_stream_is_given_up(aio: bool):
    config = ServiceConfig(stream_idle_timeout=0.2, breaker=None, connect_timeout=10.0)
    with serve("sync") as server, Mesh(StaticDiscovery({"front": [server.address]}), defaults=config) as mesh:
        error = read(mesh, aio=aio)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert isinstance(error, meshlb.DeadlineExceeded)
        assert "stream_idle_timeout" in error.details()
        cluster = mesh.cluster("front")
        assert all(entry["in_flight"] == 0 for entry in cluster.snapshot()["endpoints"])
        assert cluster.nodes[0].last_failure == "stream idle"


def read(mesh: Mesh, *, aio: bool) -> Any:
    """The error that a stream ends with, after its first message."""

    async def read_async() -> Any:
        async with meshlb.grpc.aio.insecure_channel("consul:///front", mesh=mesh) as channel:
            messages = aiter(channel.unary_stream(STREAM)(b""))
            assert await anext(messages) == b"first"
            with pytest.raises(grpc.RpcError) as caught:
                await anext(messages)
            return caught.value

    if aio:
        return asyncio.run(read_async())
    with meshlb.grpc.insecure_channel("consul:///front", mesh=mesh) as channel:
        messages = channel.unary_stream(STREAM)(b"")
        assert next(messages) == b"first"
        with pytest.raises(grpc.RpcError) as caught:
            next(messages)
        return caught.value
