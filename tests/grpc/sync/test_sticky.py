"""Sticky sessions of gRPC calls: ``cookie`` in the caller's metadata, ``set-cookie`` in the response's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import grpc
import pytest
import trustme

from meshlb import Header, Hedge, Mesh, NoEndpoints, Retry, SessionLost
from meshlb._proto import echo_pb2_grpc
from meshlb.grpc import MeshInterceptor, insecure_channel
from meshlb.grpc._sessions import context_and_metadata
from meshlb.model import Status
from meshlb.sessions import Sticky, StickyCookie, StickyKey
from tests.grpc.sync.conftest import ChannelTo, MakeMesh, Serve
from tests.grpc.sync.servers import Reply, Request, Server, refusing_address
from tests.grpc.sync.test_retry import ALL_IDEMPOTENT
from tests.grpc.sync.test_tls import client_credentials, server_credentials
from tests.support.wait import eventually

Metadata = Any


class Answer(NamedTuple):
    backend: str
    received: dict[str, str]
    """The metadata that the server got."""
    initial: tuple[Any, ...]
    """The initial metadata that the caller got; nothing if he cannot see them."""

    @property
    def cookies(self) -> list[str]:
        return [value for key, value in self.initial if key == "set-cookie"]


def answer(reply: Reply, call: Any = None) -> Answer:
    return Answer(reply.backend, dict(reply.metadata), () if call is None else call.initial_metadata())


def of_future(call: Any) -> Answer:
    return answer(call.result(), call)


def of_stream(call: Any) -> Answer:
    replies = list(call)
    return answer(replies[0], call)


ASK = Request(text="x")
TELLING: dict[str, Callable[[Any, Metadata], Answer]] = {
    "with_call": lambda stub, metadata: answer(*stub.Say.with_call(ASK, timeout=20, metadata=metadata)),
    "future": lambda stub, metadata: of_future(stub.Say.future(ASK, timeout=20, metadata=metadata)),
    "watch": lambda stub, metadata: of_stream(stub.Watch(ASK, timeout=20, metadata=metadata)),
    "collect": lambda stub, metadata: answer(*stub.Collect.with_call(iter([ASK]), timeout=20, metadata=metadata)),
    "collect future": lambda stub, metadata: of_future(stub.Collect.future(iter([ASK]), timeout=20, metadata=metadata)),
    "chat": lambda stub, metadata: of_stream(stub.Chat(iter([ASK]), timeout=20, metadata=metadata)),
}
"""Calls that show the response's metadata."""
CALLS = {
    **TELLING,
    "say": lambda stub, metadata: answer(stub.Say(ASK, timeout=20, metadata=metadata)),
    "blocking collect": lambda stub, metadata: answer(stub.Collect(iter([ASK]), timeout=20, metadata=metadata)),
}
telling = pytest.mark.parametrize("call", TELLING.values(), ids=TELLING.keys())
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@pytest.fixture(params=["channel", "interceptor"])
def way(request: pytest.FixtureRequest) -> Any:
    """The two ways to the mesh: makes a stub for a mesh, in a context manager."""

    @contextmanager
    def connected(mesh: Mesh) -> Iterator[Any]:
        mesh.cluster("echo").wait_ready(20)
        if request.param == "channel":
            with insecure_channel("consul:///echo", mesh=mesh) as channel:
                yield echo_pb2_grpc.EchoStub(channel)
        else:
            with grpc.insecure_channel(refusing_address()) as channel, MeshInterceptor(mesh, "echo") as interceptor:
                yield echo_pb2_grpc.EchoStub(grpc.intercept_channel(channel, interceptor))

    return connected


def mesh_of(make_mesh: MakeMesh, servers: list[Server], sticky: Sticky, **more: Any) -> Mesh:
    return make_mesh([server.address for server in servers], **{"policy": "random", "sticky": sticky, **more})


def new_session(stub: Any) -> tuple[str, str]:
    """The instance of a new session, and its cookie."""
    first = TELLING["with_call"](stub, None)
    (said,) = first.cookies
    return first.backend, said.split(";")[0]


def change(mesh: Mesh, servers: list[Server], home: str, status: Status | None) -> None:
    """Give the instance with that id a status; None: it is gone."""
    (address,) = [server.address for server in servers if server.id == home]
    known = [node.endpoint for node in mesh.cluster("echo").nodes]
    others = [one for one in known if one.address != address]
    changed = [replace(one, status=status) for one in known if one.address == address and status is not None]
    mesh.cluster("echo").update([*others, *changed])


@telling
def test_the_cookie_keeps_the_caller_with_one_instance(call: Any, way: Any, serve: Serve, make_mesh: MakeMesh) -> None:
    with way(mesh_of(make_mesh, serve(3), StickyCookie())) as stub:
        first = call(stub, None)
        (said,) = first.cookies
        assert said.endswith("; Path=/; HttpOnly")
        assert type(first.initial) is tuple
        assert first.initial[-1].key == "set-cookie", "an entry as gRPC's own are"
        metadata = (("x-a", "b"), ("cookie", said.split(";")[0]))
        for _ in range(8):
            again = call(stub, metadata)
            assert (again.backend, again.cookies) == (first.backend, [])
            assert "cookie" not in again.received, "kept from the server"
            assert again.received["x-a"] == "b"


@pytest.mark.parametrize("name", ["say", "blocking collect"])
def test_a_blocking_call_goes_where_the_cookie_says(name: str, way: Any, serve: Serve, make_mesh: MakeMesh) -> None:
    with way(mesh_of(make_mesh, serve(3), StickyCookie())) as stub:
        home, cookie = new_session(stub)
        for _ in range(8):
            again = CALLS[name](stub, [("cookie", cookie)])
            assert again.backend == home
            assert "cookie" not in again.received


@every_call
def test_a_caller_without_the_cookie_is_balanced(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    stub = echo_pb2_grpc.EchoStub(channel_to(serve(3), policy="round_robin", sticky=StickyCookie()))
    assert [call(stub, None).backend for _ in range(3)] != [call(stub, None).backend] * 3


@every_call
def test_other_cookies_pass(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    stub = echo_pb2_grpc.EchoStub(channel_to(serve(3), policy="random", sticky=StickyCookie()))
    home, cookie = new_session(stub)
    one = iter([("cookie", f"theme=dark; {cookie}; a=b")])
    again = call(stub, one)
    assert (again.backend, again.received["cookie"]) == (home, "theme=dark; a=b")
    several = (("cookie", "theme=dark"), ("x-a", "b"), ("cookie", cookie), ("cookie", "more=1"))
    again = call(stub, several)
    assert (again.backend, again.received["cookie"], again.received["x-a"]) == (home, "theme=dark; more=1", "b")
    assert call(stub, (("cookie", f"{cookie}; theme=dark".encode()),)).received["cookie"] == "theme=dark"


def test_the_cookies_that_are_left_stand_where_the_first_ones_were(serve: Serve, channel_to: ChannelTo) -> None:
    cluster = channel_to(serve(1), sticky=StickyCookie()).cluster
    given = (("x-a", "1"), ("cookie", "a=1"), ("x-b", "2"), ("cookie", "meshlb-session=host.; b=2"), ("cookie", "c=3"))
    context, sent = context_and_metadata(cluster, "/a.B/C", given)
    assert sent == (("x-a", "1"), ("cookie", "a=1; b=2; c=3"), ("x-b", "2"))
    assert context.session is not None
    assert (context.session.given, context.method) == ("host", "/a.B/C")


def test_metadata_without_a_session_are_the_callers_own(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    stub = echo_pb2_grpc.EchoStub(channel_to(servers, sticky=StickyCookie()))
    reply, call = stub.Say.with_call(
        Request(text="head"), timeout=20, metadata=(("cookie", "a=b;c=d"), ("x-bin", b"\xff"))
    )
    assert reply.metadata["cookie"] == "a=b;c=d"
    assert [key for key, _ in call.initial_metadata()] == ["x-head", "x-head-bin", "set-cookie"]
    assert (call.code(), call.details(), call.is_active(), call.cancel()) == (grpc.StatusCode.OK, "", False, False)
    assert (call.result(), call.done(), call.time_remaining()) == (reply, True, None)
    assert (call.trailing_metadata(), call.add_callback(list), call.debug_error_string()) == ((), False, "")


@pytest.mark.parametrize("cookie", ["forged", "9f.1", "", "%00", "a" * 3000, "é".encode()])
def test_a_cookie_that_is_no_good_costs_nothing(cookie: str | bytes, serve: Serve, channel_to: ChannelTo) -> None:
    sticky = StickyCookie(secret="a secret that nobody knows", ttl=60)
    stub = echo_pb2_grpc.EchoStub(channel_to(serve(2), sticky=sticky))
    value = b"meshlb-session=" + cookie if isinstance(cookie, bytes) else f"meshlb-session={cookie}"
    for call in CALLS.values():
        got = call(stub, (("cookie", value),))
        assert "cookie" not in got.received
        if got.initial:
            assert "Max-Age=60" in got.cookies[0], "a good one takes its place"


def test_in_maintenance_an_instance_keeps_its_sessions_and_gets_no_new_ones(
    way: Any, serve: Serve, make_mesh: MakeMesh
) -> None:
    servers = serve(3)
    mesh = mesh_of(make_mesh, servers, StickyCookie())
    with way(mesh) as stub:
        home, cookie = new_session(stub)
        change(mesh, servers, home, Status.MAINTENANCE)
        for call in CALLS.values():
            assert {call(stub, (("cookie", cookie),)).backend for _ in range(3)} == {home}
            assert home not in {call(stub, None).backend for _ in range(3)}


@telling
def test_a_session_whose_instance_is_gone_moves_once(call: Any, way: Any, serve: Serve, make_mesh: MakeMesh) -> None:
    servers = serve(3)
    mesh = mesh_of(make_mesh, servers, StickyCookie())
    with way(mesh) as stub:
        home, cookie = new_session(stub)
        known = [node.endpoint for node in mesh.cluster("echo").nodes]
        change(mesh, servers, home, None)
        moved = call(stub, (("cookie", cookie),))
        assert moved.backend != home
        metadata = (("cookie", moved.cookies[0].split(";")[0]),)
        for _ in range(2):
            assert [call(stub, metadata)[::2] for _ in range(4)] == [(moved.backend, ())] * 4
            mesh.cluster("echo").update(known)  # and it does not move back


@every_call
def test_a_session_that_may_not_move_fails_with_a_clear_error(
    call: Any, way: Any, serve: Serve, make_mesh: MakeMesh
) -> None:
    servers = serve(3)
    mesh = mesh_of(make_mesh, servers, StickyCookie(when_gone="fail"))
    with way(mesh) as stub:
        home, cookie = new_session(stub)
        known = [node.endpoint for node in mesh.cluster("echo").nodes]
        change(mesh, servers, home, None)
        with pytest.raises(SessionLost, match="the instance of this session is gone") as raised:
            call(stub, (("cookie", cookie),))
        lost: Any = raised.value
        assert isinstance(lost, NoEndpoints)
        assert isinstance(lost, grpc.RpcError)
        assert lost.code() is grpc.StatusCode.UNAVAILABLE
        mesh.cluster("echo").update(known)
        assert call(stub, (("cookie", cookie),)).backend == home


def test_waiting_for_an_instance_does_not_wait_for_one_that_is_gone(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    channel = channel_to(servers, sticky=StickyCookie(when_gone="fail"))
    stub = echo_pb2_grpc.EchoStub(channel)
    home, cookie = new_session(stub)
    change(channel.mesh, servers, home, None)
    patient: dict[str, Any] = {"metadata": (("cookie", cookie),), "wait_for_ready": True}
    with pytest.raises(SessionLost):
        stub.Say(ASK, **patient)
    with pytest.raises(SessionLost):
        next(stub.Watch(ASK, **patient))


def test_nor_between_its_attempts(serve: Serve, channel_to: ChannelTo) -> None:
    """The instance goes away in the middle of a call that waits for it."""
    servers = serve(2)
    channel = channel_to(servers, sticky=StickyCookie(when_gone="fail"), breaker=None)
    stub = echo_pb2_grpc.EchoStub(channel)
    home, cookie = new_session(stub)
    (instance,) = [server for server in servers if server.id == home]
    instance.stop()
    made = stub.Say.future(ASK, metadata=(("cookie", cookie),), wait_for_ready=True)
    (node,) = [node for node in channel.cluster.nodes if node.endpoint.address == instance.address]
    eventually(lambda: node.calls > 2, 20, message="it tries again and again")
    assert not made.done()
    change(channel.mesh, servers, home, None)
    with pytest.raises(grpc.RpcError) as raised:
        made.result(timeout=60)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


@telling
def test_a_retry_takes_the_session_along(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    channel = channel_to(servers, sticky=StickyCookie(), breaker=None, retry=ALL_IDEMPOTENT)
    stub = echo_pb2_grpc.EchoStub(channel)
    home, cookie = new_session(stub)
    (instance,) = [server for server in servers if server.id == home]
    instance.code = grpc.StatusCode.UNAVAILABLE
    moved = call(stub, (("cookie", cookie),))
    assert moved.backend != home
    instance.code = None
    metadata = (("cookie", moved.cookies[0].split(";")[0]),)
    assert {call(stub, metadata).backend for _ in range(3)} == {moved.backend}


@every_call
def test_a_retry_of_a_session_that_may_not_move_stays_there(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    stub = echo_pb2_grpc.EchoStub(
        channel_to(servers, sticky=StickyCookie(when_gone="fail"), breaker=None, retry=ALL_IDEMPOTENT)
    )
    home, cookie = new_session(stub)
    for server in servers:
        server.calls.clear()
        server.code = grpc.StatusCode.UNAVAILABLE if server.id == home else None
    with pytest.raises(grpc.RpcError) as raised:
        call(stub, (("cookie", cookie),))
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert {server.id: server.total for server in servers} == {
        server.id: 3 if server.id == home else 0 for server in servers
    }


def test_a_call_that_failed_sets_no_cookie_and_one_that_goes_on_does(serve: Serve, channel_to: ChannelTo) -> None:
    stub = echo_pb2_grpc.EchoStub(channel_to(serve(1), sticky=StickyCookie()))
    failed = stub.Say.future(Request(fail_code=5), timeout=20)
    assert failed.exception().code() is grpc.StatusCode.NOT_FOUND
    assert failed.initial_metadata() == ()
    going = stub.Chat(iter([ASK, Request(fail_code=5)]), timeout=20)
    assert next(going).backend == "s0"
    assert [key for key, _ in going.initial_metadata()] == ["set-cookie"]
    with pytest.raises(grpc.RpcError):
        next(going)
    assert [key for key, _ in going.initial_metadata()] == ["set-cookie"], "the session has begun"
    hanging = stub.Watch(Request(text="head", count=2, interval_seconds=600), timeout=60)
    assert [key for key, _ in hanging.initial_metadata()] == ["x-head", "x-head-bin", "set-cookie"]
    hanging.cancel()
    cancelled = stub.Say.future(Request(text="hang"), timeout=60)
    cancelled.cancel()
    assert cancelled.initial_metadata() == ()


def test_the_cookie_of_a_channel_with_tls_is_for_tls_alone(serve: Serve, channel_to: ChannelTo) -> None:
    authority = trustme.CA()
    servers = serve(2, credentials=server_credentials(authority, "echo"))
    channel = channel_to(servers, credentials=client_credentials(authority), sticky=StickyCookie())
    for call in TELLING.values():
        assert call(echo_pb2_grpc.EchoStub(channel), None).cookies[0].endswith("; Secure")


def test_a_call_of_a_session_is_not_hedged(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    retry = Retry(hedge=Hedge(delay=0.0), idempotent_methods=("/meshlb.demo.v1.Echo/*",), budget=None)
    channel = channel_to(servers, sticky=StickyCookie(), retry=retry, breaker=None)
    stub = echo_pb2_grpc.EchoStub(channel)
    for _ in range(5):
        assert stub.Say(Request(delay_seconds=0.05), timeout=20).backend
    assert channel.cluster.retries == 0
    assert sum(server.total for server in servers) == 5


@telling
def test_sessions_by_key_set_no_cookie(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(3), policy="random", sticky=StickyKey(), hash_on=Header("x-user"))
    stub = echo_pb2_grpc.EchoStub(channel)
    for user in ("ann", "bob"):
        answers = [call(stub, (("x-user", user), ("cookie", "meshlb-session=mine"))) for _ in range(6)]
        assert len({got.backend for got in answers}) == 1
        assert all(got.cookies == [] and got.received["cookie"] == "meshlb-session=mine" for got in answers)


def test_nothing_is_left_open(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(2), sticky=StickyCookie())
    stub = echo_pb2_grpc.EchoStub(channel)
    for call in CALLS.values():
        call(stub, None)
    eventually(lambda: all(node.in_flight == 0 for node in channel.cluster.nodes), 20)
