"""A service with a method of each kind, written in every style that gRPC takes, and calls to it over a bare channel.

The request says what to do: ``ok``; ``abort``; ``status`` (abort_with_status); ``raise``; ``code`` (set_code, return);
``own`` (a report of the handler's own); ``caller`` (answers with the caller's address); ``wait`` (for the gate).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
import grpc.aio
from anyio.from_thread import start_blocking_portal

from meshlb.affinity import current_caller_address
from meshlb.balancing.orca import TEXT_HEADER
from tests.support.ports import loopback_host

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
STYLES = ("sync", "coroutine", "writer", "blocking")
"""``sync`` runs on grpc.server, the others on grpc.aio.server: ``writer`` answers by ``context.write()``, ``blocking``
are plain functions in its thread pool."""

OWN = (("x-own", "1"), ("x-own-bin", b"\x00\xff"))
OWN_REPORT = (TEXT_HEADER, "TEXT cpu_utilization=0.9")


class Status(collections.namedtuple("Status", ("code", "details", "trailing_metadata")), grpc.Status):
    """What abort_with_status takes."""


class Gate:
    """What ``wait`` waits for; opened once."""

    def __init__(self) -> None:
        self.waiting = 0
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    def wait(self) -> None:
        self.waiting += 1
        self._event.wait(20)

    async def wait_async(self) -> None:
        self.waiting += 1
        while not self._event.is_set():
            await asyncio.sleep(0.01)


def act(request: bytes, context: Any, gate: Gate) -> bytes:
    context.set_trailing_metadata((*OWN, OWN_REPORT) if request == b"own" else OWN)
    if request == b"abort":
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "was told to")
    elif request == b"status":
        context.abort_with_status(Status(grpc.StatusCode.ABORTED, "was told to", (("x-status", "1"),)))
    elif request == b"raise":
        raise ValueError("was told to")
    elif request == b"code":
        context.set_code(grpc.StatusCode.NOT_FOUND)
        context.set_details("was told to")
    elif request == b"wait":
        gate.wait()
    return str(current_caller_address()).encode() if request == b"caller" else b"done"


async def act_async(request: bytes, context: Any, gate: Gate) -> bytes:
    context.set_trailing_metadata((*OWN, OWN_REPORT) if request == b"own" else OWN)
    if request == b"abort":
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "was told to")
    elif request == b"status":
        await context.abort_with_status(Status(grpc.StatusCode.ABORTED, "was told to", (("x-status", "1"),)))
    elif request == b"wait":
        await gate.wait_async()
    else:
        await asyncio.sleep(0)
        return act(request, context, gate)
    return b"done"


def plain_handlers(gate: Gate) -> dict[str, Callable[..., Any]]:
    def unary_unary(request: bytes, context: Any) -> bytes:
        return act(request, context, gate)

    def unary_stream(request: bytes, context: Any) -> Iterator[bytes]:
        yield b"first"
        yield act(request, context, gate)

    def stream_unary(requests: Iterator[bytes], context: Any) -> bytes:
        return act(list(requests)[-1], context, gate)

    def stream_stream(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for request in requests:
            yield b"first"
            yield act(request, context, gate)

    return {handler.__name__: handler for handler in (unary_unary, unary_stream, stream_unary, stream_stream)}


def coroutine_handlers(gate: Gate) -> dict[str, Callable[..., Any]]:
    async def unary_unary(request: bytes, context: Any) -> bytes:
        return await act_async(request, context, gate)

    async def unary_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield await act_async(request, context, gate)

    async def stream_unary(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return await act_async([request async for request in requests][-1], context, gate)

    async def stream_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield b"first"
            yield await act_async(request, context, gate)

    return {handler.__name__: handler for handler in (unary_unary, unary_stream, stream_unary, stream_stream)}


def writer_handlers(gate: Gate) -> dict[str, Callable[..., Any]]:
    async def unary_stream(request: bytes, context: Any) -> None:
        await context.write(b"first")
        await context.write(await act_async(request, context, gate))

    async def stream_stream(requests: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(b"first")
            await context.write(await act_async(request, context, gate))

    return {**coroutine_handlers(gate), "unary_stream": unary_stream, "stream_stream": stream_stream}


def generic_handler(style: str, gate: Gate) -> grpc.GenericRpcHandler:
    make = {"coroutine": coroutine_handlers, "writer": writer_handlers}.get(style, plain_handlers)
    methods = {kind: getattr(grpc, f"{kind}_rpc_method_handler")(handler) for kind, handler in make(gate).items()}
    return grpc.method_handlers_generic_handler("test.Service", methods)


@contextlib.contextmanager
def serving(style: str, gate: Gate, *interceptors: Any, threads: int = 8, **options: Any) -> Iterator[str]:
    """Serve until the block ends; gives host:port."""
    settings = {"interceptors": interceptors, "options": [("grpc.so_reuseport", 0)], **options}
    if style == "sync":
        with ThreadPoolExecutor(threads) as pool:
            server = grpc.server(pool, [generic_handler(style, gate)], **settings)
            port = server.add_insecure_port(f"{loopback_host()}:0")
            server.start()
            try:
                yield f"{loopback_host()}:{port}"
            finally:
                gate.open()
                server.stop(None).wait()
        return
    with start_blocking_portal("asyncio") as portal, ThreadPoolExecutor(threads) as pool:

        async def start() -> tuple[Any, int]:
            server = grpc.aio.server(pool, [generic_handler(style, gate)], **settings)
            port = server.add_insecure_port(f"{loopback_host()}:0")
            await server.start()
            return server, port

        aio_server, port = portal.call(start)
        try:
            yield f"{loopback_host()}:{port}"
        finally:
            gate.open()
            portal.call(aio_server.stop, None)


class Answer(NamedTuple):
    """What came of a call."""

    responses: list[bytes]
    code: grpc.StatusCode
    details: str
    trailers: list[tuple[str, Any]]


def start(channel: grpc.Channel, kind: str, request: bytes, metadata: Any = None) -> Any:
    """Begin a call; its native future, or its stream."""
    method = getattr(channel, kind)(f"/test.Service/{kind}")
    argument = iter([request]) if kind.startswith("stream") else request
    call = method if kind.endswith("stream") else method.future
    return call(argument, timeout=20, metadata=metadata)


def finish(call: Any, kind: str) -> Answer:
    """Wait for its end."""
    responses: list[bytes] = []
    with contextlib.suppress(grpc.RpcError):
        if kind.endswith("stream"):
            for response in call:
                responses.append(response)  # noqa: PERF402 - those before an error count
        else:
            responses.append(call.result())
    return Answer(responses, call.code(), call.details(), [tuple(entry) for entry in call.trailing_metadata()])


def call(channel: grpc.Channel, kind: str, request: bytes, metadata: Any = None) -> Answer:
    return finish(start(channel, kind, request, metadata), kind)
