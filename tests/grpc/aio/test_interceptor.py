"""The mesh under a channel that the program already has."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest

from meshlb import ConfigError
from meshlb._proto import echo_pb2
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.grpc.aio import AioMeshInterceptor
from tests.grpc.aio.servers import Request, unused_address
from tests.grpc.aio.test_contract import outcome, texts


async def use(stub: EchoStub) -> list[str]:
    """One call of each kind; the backends that answered."""
    seen = [(await stub.Say(Request(text="a"), timeout=5)).backend]
    seen += [reply.backend async for reply in stub.Watch(Request(count=2))]
    seen += [(await stub.Collect(texts("a", "b"))).backend]
    call = stub.Chat()
    await call.write(Request(text="a"))
    seen += [(await call.read()).backend]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return seen


async def test_all_kinds(serve: Any, make_mesh: Any) -> None:
    own, *servers = await serve(3)
    mesh = make_mesh([unused_address(), *(server.address for server in servers)])
    interceptors = AioMeshInterceptor.all(mesh, "echo")
    async with grpc.aio.insecure_channel(own.address, interceptors=interceptors) as channel:
        stub = EchoStub(channel)
        assert {backend for _ in range(3) for backend in await use(stub)} == {server.id for server in servers}
        assert await outcome(stub.Say(Request(fail_code=5, fail_details="none"))) == (
            "AioRpcError", grpc.StatusCode.NOT_FOUND, "none", ()
        )  # fmt: skip
    assert not own.calls
    await interceptors[0].close()
    assert not mesh.cluster("echo")._listeners


async def test_fallback(serve: Any, make_mesh: Any) -> None:
    own, other = await serve(2)
    mesh = make_mesh([other.address])
    await mesh.cluster("echo").wait_ready_async(5)
    async with grpc.aio.insecure_channel(
        own.address, interceptors=AioMeshInterceptor.all(mesh, "echo", fallback=True)
    ) as channel:
        assert set(await use(EchoStub(channel))) == {other.id}
        mesh.cluster("echo").update([])
        assert set(await use(EchoStub(channel))) == {own.id}


async def test_response_classes(serve: Any, make_mesh: Any) -> None:
    own, server = await serve(2)
    mesh = make_mesh([server.address])
    path = "/meshlb.demo.v1.Echo/Other"
    for responses in (None, {path: echo_pb2.EchoReply}):
        interceptors = AioMeshInterceptor.all(mesh, "echo", responses=responses)
        async with grpc.aio.insecure_channel(own.address, interceptors=interceptors) as channel:
            call = channel.unary_unary(path, Request.SerializeToString, echo_pb2.EchoReply.FromString)(Request())
            if responses is None:
                with pytest.raises(ConfigError, match="response class of /meshlb"):
                    await call
            else:
                assert (await outcome(call))[1] is grpc.StatusCode.UNIMPLEMENTED


def test_no_service(make_mesh: Any) -> None:
    with pytest.raises(ConfigError, match="not a service"):
        AioMeshInterceptor.all(make_mesh([]), "127.0.0.1:80")
