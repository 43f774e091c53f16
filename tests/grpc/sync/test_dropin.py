"""What only a program that swaps one line would notice: each case on gRPC's own channel and on ours, compared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf import any_pb2
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

import meshlb.grpc
from tests.grpc.sync.conftest import ChannelTo, MakeMesh, Serve
from tests.grpc.sync.servers import CHAT, COLLECT, SAY, WATCH, Request, Server
from tests.grpc.sync.test_contract import natively, outcome, stub_of
from tests.grpc.sync.test_tls import client_credentials, server_credentials
from tests.support.wait import eventually

TOO_SMALL = [(b"grpc.max_send_message_length", 5), ("grpc.primary_user_agent", b"mine")]
"""Options with a name, and with a value, of bytes."""

BAD_METADATA = [
    (("Upper-Case", "x"),),
    (("with space", "x"),),
    (("x-umlaut", "\u00fc"),),
    (("x-number", 7),),
    (("three", "in", "one"),),
    ("no-pair",),
    7,
]


@pytest.mark.parametrize("metadata", BAD_METADATA, ids=repr)
def test_invalid_metadata(metadata: Any, serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()

    def call(stub: Any) -> Any:
        request: Any = b"request"
        channel = stub.channel
        return [
            outcome(lambda: channel.unary_unary(SAY)(request, metadata=metadata, timeout=5)),
            outcome(lambda: channel.unary_unary(SAY).with_call(request, metadata=metadata, timeout=5)),
            outcome(lambda: channel.unary_unary(SAY).future(request, metadata=metadata, timeout=5).result()),
            outcome(lambda: list(channel.unary_stream(WATCH)(request, metadata=metadata, timeout=5))),
            outcome(lambda: channel.stream_unary(COLLECT)(iter([request]), metadata=metadata, timeout=5)),
            outcome(lambda: channel.stream_unary(COLLECT).with_call(iter([request]), metadata=metadata, timeout=5)),
            outcome(
                lambda: channel.stream_unary(COLLECT).future(iter([request]), metadata=metadata, timeout=5).result()
            ),
            outcome(lambda: list(channel.stream_stream(CHAT)(iter([request]), metadata=metadata, timeout=5))),
        ]

    assert call(stub_of(channel_to([server], breaker=None))) == natively(server, call)
    assert server.total == 0


def test_options_in_bytes(serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()

    def call(stub: Any) -> Any:
        agent = server_agent(stub, server)
        return agent, outcome(lambda: stub.Say(Request(text="longer than that"), timeout=5))

    ours = call(stub_of(channel_to([server], options=TOO_SMALL)))
    assert ours == natively(server, call, options=TOO_SMALL)
    assert ours[0] == "mine"
    assert ours[1][2] is grpc.StatusCode.RESOURCE_EXHAUSTED


def server_agent(stub: Any, server: Server) -> str:
    """The first word of the user agent that the server sees."""
    stub.Say(Request(), timeout=5)
    return str(server.metadata[-1]["user-agent"]).split()[0]


def test_tls_name_override(serve: Serve, make_mesh: MakeMesh) -> None:
    """Of a list without a service's name, too; and the server is called by that name, as gRPC does it."""
    authority = trustme.CA()
    [server] = serve(credentials=server_credentials(authority, "orders.internal"))
    options = [("grpc.ssl_target_name_override", "orders.internal")]
    credentials = client_credentials(authority)
    mesh = make_mesh([])
    with (
        grpc.secure_channel(server.address, credentials, options) as native,
        meshlb.grpc.secure_channel(f"static:///{server.address}", credentials, options, mesh=mesh) as ours,
    ):
        expected, got = (call_by_name(stub_of(channel), server) for channel in (native, ours))
    assert got == expected == ("s0", b"orders.internal")


def call_by_name(stub: Any, server: Server) -> Any:
    reply = stub.Say(Request(), timeout=10)
    return reply.backend, server.authorities[-1]


class Rich(grpc.GenericRpcHandler):
    """Every method fails with a status that has details; a response stream after its first message."""

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method == WATCH:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._refuse)

    def _refuse(self, request: bytes, context: Any) -> bytes:
        context.abort_with_status(rpc_status.to_status(rich_status()))
        raise AssertionError  # abort does not return

    def _stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield b"first"
        self._refuse(request, context)


def rich_status() -> status_pb2.Status:
    detail = any_pb2.Any()
    detail.Pack(status_pb2.Status(message="which one"))
    return status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message="naïve ünicode", details=[detail])


def test_rich_status(serve: Serve, channel_to: ChannelTo) -> None:
    """grpcio-status finds what the server has packed into the trailing metadata, whatever raised it."""
    [server] = serve(handler=Rich())

    def call(stub: Any) -> Any:
        channel = stub.channel
        future = channel.unary_unary(SAY).future(b"", timeout=5)
        stream = channel.unary_stream(WATCH)(b"", timeout=5)
        assert next(stream) == b"first"
        errors = [
            raised_by(lambda: channel.unary_unary(SAY)(b"", timeout=5)),
            raised_by(future.result),
            raised_by(lambda: list(stream)),
        ]
        return [rpc_status.from_call(error) for error in (*errors, future, stream)]

    ours = call(stub_of(channel_to([server], breaker=None)))
    assert ours == natively(server, call) == [rich_status()] * 5


def raised_by(function: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        function()
    return raised.value


def test_subscribe_and_unsubscribe(serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()

    def watch(stub: Any) -> Any:
        threads_before = set(threading.enumerate())
        channel, seen, ready, dropped = stub.channel, [], threading.Event(), []

        def note(state: grpc.ChannelConnectivity) -> None:
            seen.append(state)
            if state is grpc.ChannelConnectivity.READY:
                ready.set()

        channel.subscribe(dropped.append)
        eventually(lambda: dropped)  # a subscriber is told of the state as it is
        channel.unsubscribe(dropped.append)
        channel.subscribe(note, try_to_connect=True)
        assert ready.wait(20)
        channel.unsubscribe(note)
        channel.unsubscribe(note)
        grpc.channel_ready_future(channel).result(timeout=20)
        # gRPC's own thread that watches a channel would raise if it looked once more after the channel is closed.
        eventually(lambda: not set(threading.enumerate()) - threads_before)
        return dropped, seen[0] is not grpc.ChannelConnectivity.READY, seen[-1], len(seen) == len(set(seen))

    assert watch(stub_of(channel_to([server]))) == natively(server, watch)
