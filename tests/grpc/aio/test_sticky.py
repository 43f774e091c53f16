"""Sticky sessions of grpc.aio calls: ``cookie`` in the caller's metadata, ``set-cookie`` in the response's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
import trustme

import meshlb.grpc.aio
from meshlb import Header, Hedge, Mesh, NoEndpoints, Retry, SessionLost
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.grpc.aio import AioMeshInterceptor
from meshlb.model import Status
from meshlb.sessions import Sticky, StickyCookie, StickyKey
from tests.grpc.aio.conftest import MakeMesh, Serve
from tests.grpc.aio.servers import Request, Server, unused_address
from tests.grpc.sync.test_retry import ALL_IDEMPOTENT
from tests.support.backends import Certificate, grpc_backend
from tests.support.wait import eventually_async

Metadata = Any
ASK = Request(text="x")


class Answer(NamedTuple):
    backend: str
    received: dict[str, str]
    """The metadata that the server got."""
    initial: Any
    """The initial metadata that the caller got."""

    @property
    def cookies(self) -> list[str]:
        return [value for key, value in self.initial if key == "set-cookie"]


async def of_unary(call: Any) -> Answer:
    reply = await call
    return Answer(reply.backend, dict(reply.metadata), await call.initial_metadata())


async def of_stream(call: Any) -> Answer:
    replies = [reply async for reply in call]
    return Answer(replies[0].backend, dict(replies[0].metadata), await call.initial_metadata())


async def written(call: Any) -> Answer:
    """A stream that is written to, by a caller who looks at the head before he reads."""
    await call.write(ASK)
    initial = await call.initial_metadata()
    reply = await call.read()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return Answer(reply.backend, dict(reply.metadata), initial)


CALLS: dict[str, Callable[[Any, Metadata], Awaitable[Answer]]] = {
    "say": lambda stub, metadata: of_unary(stub.Say(ASK, timeout=20, metadata=metadata)),
    "watch": lambda stub, metadata: of_stream(stub.Watch(ASK, timeout=20, metadata=metadata)),
    "collect": lambda stub, metadata: of_unary(stub.Collect(iter([ASK]), timeout=20, metadata=metadata)),
    "chat": lambda stub, metadata: of_stream(stub.Chat(iter([ASK]), timeout=20, metadata=metadata)),
    "written chat": lambda stub, metadata: written(stub.Chat(timeout=20, metadata=metadata)),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


class Passing(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds metadata, as interceptors do."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()), ("x-passed", "1"))
        return await continuation(client_call_details._replace(metadata=metadata), request)


@pytest.fixture(params=["channel", "interceptor"])
def way(request: pytest.FixtureRequest) -> Any:
    """The two ways to the mesh: makes a stub for a mesh, in a context manager."""

    @asynccontextmanager
    async def connected(mesh: Mesh) -> AsyncIterator[Any]:
        await mesh.cluster("echo").wait_ready_async(20)
        async with AsyncExitStack() as stack:
            if request.param == "channel":
                channel = meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh)
            else:
                interceptors = AioMeshInterceptor.all(mesh, "echo")
                stack.push_async_callback(interceptors[0].close)
                channel = grpc.aio.insecure_channel(unused_address(), interceptors=interceptors)
            yield EchoStub(await stack.enter_async_context(channel))

    return connected


def mesh_of(make_mesh: MakeMesh, servers: list[Server], sticky: Sticky, **more: Any) -> Mesh:
    return make_mesh([server.address for server in servers], **{"policy": "random", "sticky": sticky, **more})


async def new_session(stub: Any) -> tuple[str, str]:
    """The instance of a new session, and its cookie."""
    first = await CALLS["say"](stub, None)
    (said,) = first.cookies
    return first.backend, said.split(";")[0]


def change(mesh: Mesh, servers: list[Server], home: str, status: Status | None) -> None:
    """Give the instance with that id a status; None: it is gone."""
    (address,) = [server.address for server in servers if server.id == home]
    known = [node.endpoint for node in mesh.cluster("echo").nodes]
    others = [one for one in known if one.address != address]
    changed = [replace(one, status=status) for one in known if one.address == address and status is not None]
    mesh.cluster("echo").update([*others, *changed])


@every_call
async def test_the_cookie_keeps_the_caller_with_one_instance(
    call: Any, way: Any, serve: Serve, make_mesh: MakeMesh
) -> None:
    async with way(mesh_of(make_mesh, await serve(3), StickyCookie())) as stub:
        first = await call(stub, None)
        (said,) = first.cookies
        assert said.endswith("; Path=/; HttpOnly")
        assert type(first.initial) is grpc.aio.Metadata
        metadata = grpc.aio.Metadata(("x-a", "b"), ("cookie", said.split(";")[0]))
        for _ in range(8):
            again = await call(stub, metadata)
            assert (again.backend, again.cookies) == (first.backend, [])
            assert "cookie" not in again.received, "kept from the server"
            assert again.received["x-a"] == "b"


@every_call
async def test_a_caller_without_the_cookie_is_balanced(call: Any, serve: Serve, channel_to: Any) -> None:
    stub = EchoStub(await channel_to(await serve(3), sticky=StickyCookie()))
    assert len({(await call(stub, None)).backend for _ in range(3)}) == 3


@every_call
async def test_other_cookies_pass(call: Any, serve: Serve, channel_to: Any) -> None:
    stub = EchoStub(await channel_to(await serve(3), policy="random", sticky=StickyCookie()))
    home, cookie = await new_session(stub)
    several = (("cookie", f"theme=dark; {cookie}"), ("x-a", "b"), ("cookie", "more=1"))
    again = await call(stub, several)
    assert (again.backend, again.received["cookie"], again.received["x-a"]) == (home, "theme=dark; more=1", "b")
    assert (await call(stub, (("cookie", "a=b;c=d"),))).received["cookie"] == "a=b;c=d", "as it was"


async def test_the_servers_own_metadata_stay(serve: Serve, channel_to: Any) -> None:
    stub = EchoStub(await channel_to(await serve(1), sticky=StickyCookie()))
    for call in (stub.Say(Request(text="head"), timeout=20), stub.Watch(Request(text="head"), timeout=20)):
        initial = await call.initial_metadata()
        assert [key for key, _ in initial] == ["x-head", "x-head-bin", "set-cookie"]
        assert initial["set-cookie"].startswith("meshlb-session=")
        call.cancel()


@pytest.mark.parametrize("cookie", ["forged", "9f.1", "", "%00", "a" * 3000])
async def test_a_cookie_that_is_no_good_costs_nothing(cookie: str, serve: Serve, channel_to: Any) -> None:
    sticky = StickyCookie(secret="a secret that nobody knows", ttl=60)
    stub = EchoStub(await channel_to(await serve(2), sticky=sticky))
    for call in CALLS.values():
        got = await call(stub, (("cookie", f"meshlb-session={cookie}"),))
        assert "cookie" not in got.received
        assert "Max-Age=60" in got.cookies[0], "a good one takes its place"


async def test_in_maintenance_an_instance_keeps_its_sessions_and_gets_no_new_ones(
    way: Any, serve: Serve, make_mesh: MakeMesh
) -> None:
    servers = await serve(3)
    mesh = mesh_of(make_mesh, servers, StickyCookie())
    async with way(mesh) as stub:
        home, cookie = await new_session(stub)
        change(mesh, servers, home, Status.MAINTENANCE)
        for call in CALLS.values():
            assert {(await call(stub, (("cookie", cookie),))).backend for _ in range(3)} == {home}
            assert home not in {(await call(stub, None)).backend for _ in range(3)}


@every_call
async def test_a_session_whose_instance_is_gone_moves_once(
    call: Any, way: Any, serve: Serve, make_mesh: MakeMesh
) -> None:
    servers = await serve(3)
    mesh = mesh_of(make_mesh, servers, StickyCookie())
    async with way(mesh) as stub:
        home, cookie = await new_session(stub)
        known = [node.endpoint for node in mesh.cluster("echo").nodes]
        change(mesh, servers, home, None)
        moved = await call(stub, (("cookie", cookie),))
        assert moved.backend != home
        metadata = (("cookie", moved.cookies[0].split(";")[0]),)
        for _ in range(2):
            for _ in range(4):
                again = await call(stub, metadata)
                assert (again.backend, again.cookies) == (moved.backend, [])
            mesh.cluster("echo").update(known)  # and it does not move back


@pytest.mark.parametrize(
    "name", ["say", "watch", "collect", "chat"]
)  # grpc.aio's interceptors hide what a write raises
async def test_a_session_that_may_not_move_fails_with_a_clear_error(
    name: str, way: Any, serve: Serve, make_mesh: MakeMesh
) -> None:
    call = CALLS[name]
    servers = await serve(3)
    mesh = mesh_of(make_mesh, servers, StickyCookie(when_gone="fail"))
    async with way(mesh) as stub:
        home, cookie = await new_session(stub)
        known = [node.endpoint for node in mesh.cluster("echo").nodes]
        change(mesh, servers, home, None)
        with pytest.raises(SessionLost, match="the instance of this session is gone") as raised:
            await call(stub, (("cookie", cookie),))
        lost: Any = raised.value
        assert isinstance(lost, NoEndpoints)
        assert isinstance(lost, grpc.aio.AioRpcError)
        assert lost.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(SessionLost):  # no more for a call that would wait for an instance
            await stub.Say(ASK, metadata=(("cookie", cookie),), wait_for_ready=True)
        mesh.cluster("echo").update(known)
        assert (await call(stub, (("cookie", cookie),))).backend == home


@pytest.mark.parametrize("name", ["say", "watch", "collect", "chat"])
async def test_a_retry_takes_the_session_along(name: str, serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    stub = EchoStub(await channel_to(servers, sticky=StickyCookie(), breaker=None, retry=ALL_IDEMPOTENT))
    home, cookie = await new_session(stub)
    (instance,) = [server for server in servers if server.id == home]
    instance.code = grpc.StatusCode.UNAVAILABLE
    moved = await CALLS[name](stub, (("cookie", cookie),))
    assert moved.backend != home
    instance.code = None
    metadata = (("cookie", moved.cookies[0].split(";")[0]),)
    assert {(await CALLS[name](stub, metadata)).backend for _ in range(3)} == {moved.backend}


@every_call
async def test_a_retry_of_a_session_that_may_not_move_stays_there(call: Any, serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    sticky = StickyCookie(when_gone="fail")
    stub = EchoStub(await channel_to(servers, sticky=sticky, breaker=None, retry=ALL_IDEMPOTENT))
    home, cookie = await new_session(stub)
    for server in servers:
        server.calls.clear()
        server.code = grpc.StatusCode.UNAVAILABLE if server.id == home else None
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(stub, (("cookie", cookie),))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert {server.id: sum(server.calls.values()) for server in servers} == {
        server.id: 3 if server.id == home else 0 for server in servers
    }


async def test_a_call_that_failed_sets_no_cookie_and_one_that_goes_on_does(serve: Serve, channel_to: Any) -> None:
    stub = EchoStub(await channel_to(await serve(1), sticky=StickyCookie()))
    failed = stub.Say(Request(fail_code=5), timeout=20)
    assert await failed.code() is grpc.StatusCode.NOT_FOUND
    assert list(await failed.initial_metadata()) == []
    going = stub.Chat(iter([ASK, Request(fail_code=5)]), timeout=20)
    assert (await going.read()).backend == "s0"
    assert [key for key, _ in await going.initial_metadata()] == ["set-cookie"]
    with pytest.raises(grpc.aio.AioRpcError):
        await going.read()
    assert [key for key, _ in await going.initial_metadata()] == ["set-cookie"], "the session has begun"
    cancelled = stub.Say(Request(text="hang"), timeout=60)
    cancelled.cancel()
    assert list(await cancelled.initial_metadata()) == []


async def test_the_cookie_of_a_channel_with_tls_is_for_tls_alone(tmp_path: Any, make_mesh: MakeMesh) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("echo")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with grpc_backend(tls=Certificate(tmp_path / "cert.pem", tmp_path / "key.pem")) as backend:
        mesh = make_mesh([backend.address], sticky=StickyCookie())
        async with meshlb.grpc.aio.secure_channel("consul:///echo", credentials, mesh=mesh) as channel:
            for call in CALLS.values():
                assert (await call(EchoStub(channel), None)).cookies[0].endswith("; Secure")


async def test_a_call_of_a_session_is_not_hedged(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    retry = Retry(hedge=Hedge(delay=0.0), idempotent_methods=("/meshlb.demo.v1.Echo/*",), budget=None)
    channel = await channel_to(servers, sticky=StickyCookie(), retry=retry, breaker=None)
    for _ in range(5):
        call = EchoStub(channel).Say(Request(delay_seconds=0.05), timeout=20)
        assert (await call).backend
        assert [key for key, _ in await call.initial_metadata()] == ["set-cookie"]
    assert channel.cluster.retries == 0
    assert sum(server.calls["Say"] for server in servers) == 5


@every_call
async def test_sessions_by_key_set_no_cookie(call: Any, serve: Serve, channel_to: Any) -> None:
    stub = EchoStub(await channel_to(await serve(3), policy="random", sticky=StickyKey(), hash_on=Header("x-user")))
    for user in ("ann", "bob"):
        answers = [await call(stub, (("x-user", user), ("cookie", "meshlb-session=mine"))) for _ in range(6)]
        assert len({got.backend for got in answers}) == 1
        assert all(got.cookies == [] and got.received["cookie"] == "meshlb-session=mine" for got in answers)


async def test_behind_interceptors_of_the_channel(serve: Serve, channel_to: Any) -> None:
    channel = await channel_to(
        await serve(3), channel={"interceptors": [Passing()]}, policy="random", sticky=StickyCookie()
    )
    stub = EchoStub(channel)
    home, cookie = await new_session(stub)
    for _ in range(6):
        again = await CALLS["say"](stub, (("cookie", cookie),))
        assert (again.backend, again.cookies, again.received["x-passed"]) == (home, [], "1")
        assert "cookie" not in again.received
    await eventually_async(lambda: all(node.in_flight == 0 for node in channel.cluster.nodes), 20)
