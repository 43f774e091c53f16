"""A gRPC server of the Echo service in the test's own event loop, told by requests and attributes how to behave."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from meshlb._proto import echo_pb2, echo_pb2_grpc
from tests.support.ports import loopback_host

CODES = {code.value[0]: code for code in grpc.StatusCode}
Request = echo_pb2.EchoRequest
Reply = echo_pb2.EchoReply


class Echo(echo_pb2_grpc.EchoServicer):
    """Beyond what the request says: the text "head" sends initial metadata, "hang" never answers."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def Say(self, request: Request, context: Any) -> Reply:  # noqa: N802 - the proto's names
        await self._begin("Say", request, context)
        return await self._reply(request, context, request.fail_after)

    async def Put(self, request: Request, context: Any) -> Reply:  # noqa: N802
        await self._begin("Put", request, context)
        return await self._reply(request, context, request.fail_after)

    async def Watch(self, request: Request, context: Any) -> AsyncIterator[Reply]:  # noqa: N802
        with self._open_stream():
            await self._begin("Watch", request, context)
            for sequence in range(max(1, request.count)):
                if sequence:
                    await asyncio.sleep(request.interval_seconds)
                yield await self._reply(request, context, sequence)

    async def Collect(self, requests: AsyncIterator[Request], context: Any) -> Reply:  # noqa: N802
        self.server.calls["Collect"] += 1
        seen = []
        async for request in requests:
            await self._behave(request, context)
            seen.append(request)
        last = seen[-1] if seen else Request()
        reply = await self._reply(last, context, len(seen))
        reply.text = " ".join(request.text for request in seen)
        return reply

    async def Chat(self, requests: AsyncIterator[Request], context: Any) -> AsyncIterator[Reply]:  # noqa: N802
        self.server.calls["Chat"] += 1
        sequence = 0
        with self._open_stream():
            async for request in requests:
                await self._behave(request, context)
                yield await self._reply(request, context, sequence)
                sequence += 1

    @contextmanager
    def _open_stream(self) -> Iterator[None]:
        self.server.streams += 1
        try:
            yield
        finally:
            self.server.streams -= 1

    async def _begin(self, method: str, request: Request, context: Any) -> None:
        self.server.calls[method] += 1
        await self._behave(request, context)

    async def _behave(self, request: Request, context: Any) -> None:
        server = self.server
        if request.text == "head":
            await context.send_initial_metadata((("x-head", "1"), ("x-head-bin", b"\x00\xff")))
        if request.trailing_metadata:
            context.set_trailing_metadata(tuple(request.trailing_metadata.items()))
        if server.hang or request.text == "hang":
            await asyncio.get_running_loop().create_future()
        if server.delay or request.delay_seconds:
            await asyncio.sleep(server.delay or request.delay_seconds)
        if server.code is not None:
            await context.abort(server.code, server.details, server.trailers)

    async def _reply(self, request: Request, context: Any, sequence: int) -> Reply:
        if request.fail_code and sequence >= request.fail_after:
            trailing = tuple(request.trailing_metadata.items())
            await context.abort(CODES[request.fail_code], request.fail_details, trailing)
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        return Reply(
            text=request.text,
            backend=self.server.id,
            sequence=sequence,
            metadata=metadata,
            payload=b"x" * request.payload_bytes,
        )


class Server:
    """One server; an async context manager."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.host = loopback_host()
        self.port = 0
        self.calls: Counter[str] = Counter()
        self.streams = 0  # Watch and Chat under way
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailers: tuple[tuple[str, str], ...] = ()
        self.delay = 0.0
        self.hang = False
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def start(self) -> Server:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        echo_pb2_grpc.add_EchoServicer_to_server(Echo(self), self._server)
        self.port = self._server.add_insecure_port(self.address)
        await self._server.start()
        return self

    async def stop(self, grace: float | None = None) -> None:
        """Close the port and the connections; a later ``start`` takes the same port."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace)

    async def __aenter__(self) -> Server:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


def unused_address() -> str:
    """An address that refuses connections: port 1 of a loopback host of the test's own."""
    return f"{loopback_host()}:1"
