"""MeshInterceptor: the calls of a channel that the program already has go to the instances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from meshlb import ConfigError, Mesh, NoEndpoints
from meshlb._proto import echo_pb2_grpc
from meshlb.grpc import MeshInterceptor
from tests.grpc.sync.conftest import MakeMesh, Serve
from tests.grpc.sync.servers import SAY, Reply, Request, refusing_address
from tests.grpc.sync.test_retry import ALL_IDEMPOTENT, CALLS


@contextmanager
def intercepted(mesh: Mesh, address: str, **options: Any) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel, MeshInterceptor(mesh, "echo", **options) as interceptor:
        yield grpc.intercept_channel(channel, interceptor)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_calls_go_to_the_instances(call: Callable[..., Any], serve: Serve, make_mesh: MakeMesh) -> None:
    servers = serve(3)
    servers[0].code = servers[1].code = grpc.StatusCode.UNAVAILABLE
    mesh = make_mesh([server.address for server in servers], breaker=None, retry=ALL_IDEMPOTENT)
    with intercepted(mesh, refusing_address()) as channel:
        stub = echo_pb2_grpc.EchoStub(channel)
        assert {id for _ in range(3) for id in call(stub, Request(text="x"))} == {"s2"}


def test_everything_is_passed_on_and_errors_come_back(serve: Serve, make_mesh: MakeMesh) -> None:
    [server] = serve(1)
    with intercepted(make_mesh([server.address]), refusing_address()) as channel:
        stub = echo_pb2_grpc.EchoStub(channel)
        reply, call = stub.Say.with_call(Request(text="head"), timeout=5, metadata=(("x-a", "b"),))
        assert (type(reply), reply.metadata["x-a"], call.code()) == (Reply, "b", grpc.StatusCode.OK)
        assert ("x-head", "1") in call.initial_metadata()
        for call in (stub.Say, stub.Say.with_call, lambda *args, **options: stub.Say.future(*args, **options).result()):
            with pytest.raises(grpc.RpcError) as raised:
                call(Request(fail_code=5, fail_details="none"), timeout=5)
            assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.NOT_FOUND, "none")
        with pytest.raises(grpc.RpcError) as raised:
            stub.Say(Request(text="hang"), timeout=0.2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        stream = stub.Watch(Request(count=1000, interval_seconds=0.02), timeout=20)
        next(stream)
        assert stream.cancel()


def test_the_original_channel_if_the_service_is_unknown(serve: Serve, make_mesh: MakeMesh) -> None:
    [server] = serve(1)
    mesh = make_mesh([])
    assert mesh.cluster("echo").age is None or not mesh.cluster("echo").nodes
    with intercepted(mesh, server.address) as channel, pytest.raises(NoEndpoints):
        echo_pb2_grpc.EchoStub(channel).Say(Request(), timeout=5)
    with intercepted(mesh, server.address, fallback=True) as channel:
        stub = echo_pb2_grpc.EchoStub(channel)
        assert {id for call in CALLS.values() for id in call(stub, Request(text="x"))} == {"s0"}


def test_response_classes(serve: Serve, make_mesh: MakeMesh) -> None:
    [server] = serve(1)
    mesh = make_mesh([server.address])
    with intercepted(mesh, refusing_address()) as channel, pytest.raises(ConfigError, match=r"/a\.b/C"):
        channel.unary_unary("/a.b/C")(b"", timeout=5)

    class Raw:
        @staticmethod
        def FromString(data: bytes) -> int:  # noqa: N802 - protobuf's name
            return len(data)

    with intercepted(mesh, refusing_address(), responses={SAY: Raw}) as channel:
        assert channel.unary_unary(SAY)(Request(text="x").SerializeToString(), timeout=5) > 0


def test_what_is_no_service(make_mesh: MakeMesh) -> None:
    with pytest.raises(ConfigError, match="dns:///a"):
        MeshInterceptor(make_mesh([]), "dns:///a")
