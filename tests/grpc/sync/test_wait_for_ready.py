"""wait_for_ready, and calls that are there before the registry or the servers are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from meshlb import Mesh, ServiceConfig
from meshlb._proto import echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from tests.grpc.sync.conftest import ChannelTo, Serve
from tests.grpc.sync.servers import Request, Server, refusing_address
from tests.grpc.sync.test_calls import silent_channel
from tests.support.wait import eventually

Code = grpc.StatusCode
CALLS: dict[str, Callable[..., Any]] = {
    "say": lambda stub, **options: stub.Say(Request(), **options).backend,
    "future": lambda stub, **options: stub.Say.future(Request(), **options).result().backend,
    "watch": lambda stub, **options: next(stub.Watch(Request(), **options)).backend,
    "collect": lambda stub, **options: stub.Collect(iter([Request()]), **options).backend,
    "chat": lambda stub, **options: next(stub.Chat(iter([Request()]), **options)).backend,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_call
@pytest.mark.parametrize("retry", ["with retry", "without"])
def test_a_server_that_is_late(call: Any, retry: str, serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()
    server.stop()
    channel = channel_to([server, refusing_address()], **({} if retry == "with retry" else {"retry": None}))
    stub = echo_pb2_grpc.EchoStub(channel)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call(stub, wait_for_ready=True, timeout=20)))
    thread.start()
    eventually(lambda: sum(node.failures for node in channel.cluster.nodes) >= 2)
    server.start()
    thread.join(20)
    assert results == ["s0"]


@every_call
def test_nobody_comes_before_the_deadline(call: Any, channel_to: ChannelTo) -> None:
    stub = echo_pb2_grpc.EchoStub(channel_to([refusing_address()], breaker=None))
    with pytest.raises(grpc.RpcError) as raised:
        call(stub, wait_for_ready=True, timeout=0.4)
    assert raised.value.code() is Code.DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as raised:
        call(stub, wait_for_ready=False, timeout=5)
    assert raised.value.code() is Code.UNAVAILABLE
    assert raised.value.details().startswith("failed to connect")


@every_call
def test_an_empty_service_that_gets_an_instance(call: Any, serve: Serve) -> None:
    [server] = serve()
    discovery = StaticDiscovery({"echo": []})
    with Mesh(discovery, defaults=ServiceConfig()) as mesh, insecure_channel("echo", mesh=mesh) as channel:
        stub = echo_pb2_grpc.EchoStub(channel)
        with pytest.raises(grpc.RpcError):
            call(stub, timeout=5)
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(call(stub, wait_for_ready=True, timeout=20)))
        thread.start()
        eventually(lambda: channel._waiters)
        discovery.update("echo", [server.address])
        thread.join(20)
        assert results == ["s0"]


def test_wait_for_ready_does_not_wait_for_a_dead_endpoint_while_another_lives(
    serve: Serve, channel_to: ChannelTo
) -> None:
    stub = echo_pb2_grpc.EchoStub(channel_to([refusing_address(), *serve(1)], breaker=None))
    assert {stub.Put(Request(), wait_for_ready=True, timeout=10).backend for _ in range(6)} == {"s0"}


@every_call
def test_a_registry_that_does_not_answer(call: Any) -> None:
    channel = silent_channel()
    try:
        with pytest.raises(grpc.RpcError) as raised:
            call(echo_pb2_grpc.EchoStub(channel), timeout=0.2)
        assert raised.value.code() is Code.DEADLINE_EXCEEDED
    finally:
        channel.close()
        channel.mesh.close()


def test_frozen_start(serve: Serve) -> None:
    """The first call is made before the registry has answered."""
    with Server() as server:
        mesh = Mesh(StaticDiscovery({"echo": [server.address]}))
        with mesh, insecure_channel("echo", mesh=mesh) as channel:
            stub = echo_pb2_grpc.EchoStub(channel)
            calls = [stub.Say.future(Request(), timeout=10) for _ in range(5)]
            assert [call.result().backend for call in calls] == ["s"] * 5
