"""Hash keys of gRPC calls: equal keys meet, over real servers, in calls of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

import meshlb.grpc
import meshlb.grpc.aio
from meshlb import Header, Mesh, Retry, ServiceConfig, hash_key
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc._keys import KeyRequest
from tests.support.backends import Backend, grpc_backends
from tests.support.keyed import USERS, expected, mesh_of
from tests.support.wait import eventually


@pytest.fixture(scope="module")
def rpc_backends() -> Iterator[list[Backend]]:
    with grpc_backends(4) as backends:
        yield backends


def test_grpc_metadata_as_a_request():
    request = KeyRequest("/a.B/C", (("x-user", "u1"), ("x-user", "u2"), ("x-id-bin", b"\xff")))
    assert (request.method, request.path) == ("/a.B/C", "/a.B/C")
    assert request.header("X-User") == "u1, u2"
    assert request.header("x-id-bin") == "\xff"
    assert request.header("x-none") is None
    assert KeyRequest("/a.B/C", (("cookie", "a=b"), ("cookie", "sid=1"))).header("cookie") == "a=b; sid=1"
    assert request.query("user") is None
    assert KeyRequest("/a.B/C", None).header("x-user") is None


Say = echo_pb2.EchoRequest(text="hello")


def say(stub: Any, style: str, metadata: Any = None) -> str:
    """The backend that answered."""
    if style == "blocking":
        return str(stub.Say(Say, metadata=metadata, timeout=10).backend)
    if style == "with_call":
        return str(stub.Say.with_call(Say, metadata=metadata, timeout=10)[0].backend)
    if style == "future":
        return str(stub.Say.future(Say, metadata=metadata, timeout=10).result().backend)
    if style == "unary_stream":
        return str(next(stub.Watch(Say, metadata=metadata, timeout=10)).backend)
    if style == "stream_unary":
        return str(stub.Collect(iter([Say]), metadata=metadata, timeout=10).backend)
    return str(next(stub.Chat(iter([Say]), metadata=metadata, timeout=10)).backend)


STYLES = ("blocking", "with_call", "future", "unary_stream", "stream_unary", "stream_stream")


@pytest.mark.parametrize("style", STYLES)
def test_grpc_calls_with_equal_keys_meet(rpc_backends: list[Backend], style: str):
    source = Header("X-User")
    with (
        mesh_of(rpc_backends, hash_on=source) as mesh,
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel,
    ):
        stub = echo_pb2_grpc.EchoStub(channel)
        belongs = expected(mesh, rpc_backends, USERS)
        assert [say(stub, style, (("x-user", user),)) for user in USERS] == belongs
        assert [say(stub, style, iter([("x-user", user)])) for user in USERS] == belongs
        got = []
        for user in USERS:
            with hash_key(user):
                got.append(say(stub, style))
        assert got == belongs


def test_grpc_keys_from_the_method_and_a_function(rpc_backends: list[Backend]):
    with (
        mesh_of(rpc_backends, hash_on=lambda request: request.method) as mesh,
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel,
    ):
        stub = echo_pb2_grpc.EchoStub(channel)
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        with cluster.lease(key="/meshlb.demo.v1.Echo/Say") as lease:
            address = lease.endpoint.address
        belongs = next(backend.id for backend in rpc_backends if backend.address == address)
        assert {say(stub, "blocking") for _ in range(8)} == {belongs}


class LateDiscovery(StaticDiscovery):
    """Answers when it is told to."""

    def __init__(self, services: dict[str, list[str]]) -> None:
        super().__init__(services)
        self.released = threading.Event()

    async def watch(self, query: Any, sink: Any) -> None:
        while not self.released.is_set():
            await asyncio.sleep(0.01)
        await super().watch(query, sink)


def test_the_key_is_that_of_the_moment_of_the_call_however_late_it_starts(rpc_backends: list[Backend]):
    discovery = LateDiscovery({"orders": [backend.address for backend in rpc_backends]})
    with (
        Mesh(discovery, defaults=ServiceConfig(policy="consistent_hash")) as mesh,
        meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel,
    ):
        stub = echo_pb2_grpc.EchoStub(channel)
        futures, streams = [], []
        for user in USERS:
            with hash_key(user):
                futures.append(stub.Say.future(Say, timeout=20))
                streams.append(stub.Watch(Say, timeout=20))
        assert not any(future.done() for future in futures)
        discovery.released.set()
        got = [future.result().backend for future in futures]
        assert got == expected(mesh, rpc_backends, USERS)
        assert [next(stream).backend for stream in streams] == got
        for stream in streams:
            stream.cancel()


@contextlib.asynccontextmanager
async def aio_stub(mesh: Mesh, **options: Any) -> Any:
    async with meshlb.grpc.aio.insecure_channel("consul:///orders", mesh=mesh, **options) as channel:
        yield echo_pb2_grpc.EchoStub(channel)


class Passing(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds metadata, as interceptors do."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        await asyncio.sleep(0)
        return await continuation(client_call_details, request)


async def say_async(stub: Any, style: str, metadata: Any = None) -> str:
    if style in ("unary_unary", "intercepted"):
        return str((await stub.Say(Say, metadata=metadata, timeout=10)).backend)
    if style == "stream_unary":
        return str((await stub.Collect(iter([Say]), metadata=metadata, timeout=10)).backend)
    call = (
        stub.Watch(Say, metadata=metadata, timeout=10)
        if style == "unary_stream"
        else stub.Chat(iter([Say]), metadata=metadata, timeout=10)
    )
    replies = [reply async for reply in call]
    return str(replies[0].backend)


@pytest.mark.parametrize("style", ["unary_unary", "unary_stream", "stream_unary", "stream_stream", "intercepted"])
def test_grpc_aio_calls_with_equal_keys_meet(rpc_backends: list[Backend], style: str):
    async def main(mesh: Mesh) -> None:
        belongs = await asyncio.to_thread(expected, mesh, rpc_backends, USERS)
        async with aio_stub(mesh, interceptors=[Passing()] if style == "intercepted" else None) as stub:
            assert [await say_async(stub, style, (("x-user", user),)) for user in USERS] == belongs

            async def within(user: str) -> str:
                with hash_key(user):
                    return await say_async(stub, style)

            assert await asyncio.gather(*map(within, USERS)) == belongs

            # Made in the block, awaited after it.
            if style in ("unary_unary", "intercepted"):
                calls = []
                for user in USERS:
                    with hash_key(user):
                        calls.append(stub.Say(Say, timeout=10))
                assert [(await call).backend for call in calls] == belongs

    with mesh_of(rpc_backends, hash_on=Header("x-user")) as mesh:
        asyncio.run(main(mesh))


def test_an_aio_call_keeps_its_key_until_it_can_start(rpc_backends: list[Backend]):
    discovery = LateDiscovery({"orders": [backend.address for backend in rpc_backends]})

    async def main(mesh: Mesh) -> list[str]:
        async with aio_stub(mesh) as stub:
            calls = []
            for user in USERS:
                with hash_key(user):
                    calls.append(stub.Say(Say, timeout=20))
            discovery.released.set()
            return [(await call).backend for call in calls]

    with Mesh(discovery, defaults=ServiceConfig(policy="consistent_hash")) as mesh:
        assert asyncio.run(main(mesh)) == expected(mesh, rpc_backends, USERS)


def test_a_grpc_retry_goes_to_the_next_best_for_its_key(rpc_backends: list[Backend]):
    retry = Retry(idempotent_methods=["meshlb.demo.v1.Echo/*"], budget=None)
    with mesh_of(rpc_backends, hash_on=Header("x-user"), breaker=None, retry=retry) as mesh:
        mesh.cluster("orders").wait_ready(5)
        with meshlb.grpc.insecure_channel("consul:///orders", mesh=mesh) as channel:
            stub = echo_pb2_grpc.EchoStub(channel)
            metadata = (("x-user", "user-1"),)
            best = say(stub, "blocking", metadata)
            broken = next(backend for backend in rpc_backends if backend.id == best)
            broken.behave(code="UNAVAILABLE")
            try:
                second = {style: say(stub, style, metadata) for style in ("blocking", "future", "unary_stream")}
                assert len(set(second.values())) == 1
                assert best not in second.values()
            finally:
                broken.behave()
            eventually(lambda: all(node.in_flight == 0 for node in mesh.cluster("orders").nodes))
