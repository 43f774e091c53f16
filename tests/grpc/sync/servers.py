"""A gRPC server of the Echo service in the test's own process, told by requests and attributes how to behave."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from meshlb._proto import echo_pb2, echo_pb2_grpc
from tests.support.ports import loopback_host

CODES = {code.value[0]: code for code in grpc.StatusCode}
Request = echo_pb2.EchoRequest
Reply = echo_pb2.EchoReply
SAY, PUT, WATCH, COLLECT, CHAT = (f"/meshlb.demo.v1.Echo/{name}" for name in ("Say", "Put", "Watch", "Collect", "Chat"))


class Echo(echo_pb2_grpc.EchoServicer):
    """Beyond what the request says: the text "head" sends initial metadata, "hang" waits until the call is over."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def Say(self, request: Request, context: Any) -> Reply:  # noqa: N802 - the proto's names
        self._behave("Say", request, context)
        return self._reply(request, context, request.fail_after)

    def Put(self, request: Request, context: Any) -> Reply:  # noqa: N802
        self._behave("Put", request, context)
        return self._reply(request, context, request.fail_after)

    def Watch(self, request: Request, context: Any) -> Iterator[Reply]:  # noqa: N802
        self._behave("Watch", request, context)
        for sequence in range(max(1, request.count)):
            if sequence:
                self.server.over.wait(request.interval_seconds)
            if not context.is_active():
                return
            yield self._reply(request, context, sequence)

    def Collect(self, requests: Iterator[Request], context: Any) -> Reply:  # noqa: N802
        seen = list(requests)
        last = seen[-1] if seen else Request()
        self._behave("Collect", last, context)
        reply = self._reply(last, context, len(seen))
        reply.text = " ".join(request.text for request in seen)
        return reply

    def Chat(self, requests: Iterator[Request], context: Any) -> Iterator[Reply]:  # noqa: N802
        for sequence, request in enumerate(requests):
            self._behave("Chat", request, context)
            yield self._reply(request, context, sequence)

    def _behave(self, method: str, request: Request, context: Any) -> None:
        server = self.server
        server.calls[method] += 1
        server.metadata.append(dict(context.invocation_metadata()))
        server.authorities.append(context._rpc_event.call_details.host)  # nothing public tells
        if request.text == "head":
            context.send_initial_metadata((("x-head", "1"), ("x-head-bin", b"\x00\xff")))
        trailing = (*request.trailing_metadata.items(), *server.trailers)
        if trailing:
            context.set_trailing_metadata(trailing)
        if server.hang or request.text == "hang":
            ended = threading.Event()
            context.add_callback(ended.set)
            server.released.wait_for(lambda: server.over.is_set() or ended.is_set())
            server.given_up += ended.is_set()
        if request.delay_seconds:
            server.over.wait(request.delay_seconds)
        if server.code is not None:
            context.abort(server.code, server.details)

    def _reply(self, request: Request, context: Any, sequence: int) -> Reply:
        if request.fail_code and sequence >= request.fail_after:
            context.abort(CODES[request.fail_code], request.fail_details or "asked for")
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        return Reply(
            text=request.text,
            backend=self.server.id,
            sequence=sequence,
            metadata=metadata,
            payload=b"x" * request.payload_bytes,
        )


class _Polled:
    """Waits for several things at once, by looking."""

    def __init__(self) -> None:
        self._tick = threading.Event()

    def wait_for(self, condition: Any) -> None:
        while not condition():
            self._tick.wait(0.01)


class Server:
    """One server; a context manager. It can be stopped and started again on the same port."""

    def __init__(
        self,
        id: str = "s",
        *,
        credentials: grpc.ServerCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        handler: grpc.GenericRpcHandler | None = None,
        host: str | None = None,
        **server_options: Any,
    ) -> None:
        self.id = id
        self.host = host or loopback_host()
        self.port = 0
        self.calls: Counter[str] = Counter()
        self.metadata: list[dict[str, Any]] = []
        self.authorities: list[Any] = []
        self.code: grpc.StatusCode | None = None
        self.details = "told to fail"
        self.trailers: tuple[tuple[str, str], ...] = ()
        self.hang = False
        self.given_up = 0  # calls that hung until their client ended them
        self.over = threading.Event()
        self.released = _Polled()
        self._credentials = credentials
        self._options = options
        self._handler = handler
        self._server_options = server_options
        self._server: grpc.Server | None = None
        self._executor: ThreadPoolExecutor | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def total(self) -> int:
        return sum(self.calls.values())

    def start(self) -> Server:
        self.over.clear()
        self._executor = ThreadPoolExecutor(32)
        server = grpc.server(self._executor, options=[("grpc.so_reuseport", 0), *self._options], **self._server_options)
        if self._handler is None:
            echo_pb2_grpc.add_EchoServicer_to_server(Echo(self), server)
        else:
            server.add_generic_rpc_handlers((self._handler,))
        if self._credentials is None:
            self.port = server.add_insecure_port(self.address)
        else:
            self.port = server.add_secure_port(self.address, self._credentials)
        server.start()
        self._server = server
        return self

    def stop(self, grace: float | None = None) -> None:
        self.over.set()
        if self._server is not None:
            self._server.stop(grace).wait()
            self._server = None
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def refusing_address() -> str:
    """An address that refuses connections: port 1 of a loopback host of the test's own."""
    return f"{loopback_host()}:1"
