"""Cancelling at every stage, dropping, closing: whatever the caller does, the leases come back."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.experimental
import pytest

from meshlb import MeshClosed, MeshError, NoEndpoints, Retry
from meshlb._proto import echo_pb2_grpc
from tests.grpc.sync.conftest import ChannelTo, MakeMesh, Serve, in_flight
from tests.grpc.sync.servers import Request, refusing_address
from tests.support.wait import eventually

Code = grpc.StatusCode


def stub_of(channel: Any) -> Any:
    return echo_pb2_grpc.EchoStub(channel)


def idle(channel: Any) -> None:
    eventually(lambda: in_flight(channel.mesh) == 0, message=lambda: str(channel.mesh.snapshot()))


def test_answers_are_counted_as_what_they_were(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(1), retry=None, breaker=None)
    stub = stub_of(channel)
    stub.Say(Request(), timeout=5)
    stub.Say.with_call(Request(), timeout=5)
    stub.Say.future(Request(), timeout=5).result()
    list(stub.Watch(Request(count=3), timeout=5))
    stub.Collect(iter([Request()]), timeout=5)
    list(stub.Chat(iter([Request()]), timeout=5))
    for code in (5, 14, 8):  # NOT_FOUND, UNAVAILABLE, RESOURCE_EXHAUSTED
        for call in (stub.Say, lambda request, timeout: list(stub.Watch(request, timeout=timeout))):
            with pytest.raises(grpc.RpcError):
                call(Request(fail_code=code), timeout=5)
    for call in (stub.Say, stub.Watch):
        with pytest.raises(grpc.RpcError):
            call(7, timeout=5)
    stub.Say.future(Request(text="hang"), timeout=5).cancel()
    idle(channel)
    [node] = channel.cluster.nodes
    assert (node.calls, node.successes, node.failures, node.overloads, node.ignored) == (15, 8, 2, 2, 3)


# -- cancel --------------------------------------------------------------------------------------------------------


def test_cancel_while_waiting_for_the_registry(make_mesh: MakeMesh) -> None:
    channel = silent_channel()
    try:
        for start in (stub_of(channel).Say.future, stub_of(channel).Watch):
            call = start(Request())
            told = threading.Event()
            call.add_done_callback(lambda _, told=told: told.set())
            assert call.running()
            assert call.cancel()
            assert not call.cancel()
            assert call.cancelled()
            assert call.code() is Code.CANCELLED
            assert call.details() == "Locally cancelled by application!"
            with pytest.raises(grpc.FutureCancelledError):
                call.result()
            assert told.wait(5)
        with pytest.raises(grpc.RpcError):
            next(call)
    finally:
        channel.mesh.close()


def test_cancel_between_two_attempts(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    servers[0].code, servers[0].trailers = Code.UNAVAILABLE, (("grpc-retry-pushback-ms", "20000"),)
    channel = channel_to(servers, breaker=None)
    for start in (stub_of(channel).Say.future, stub_of(channel).Say.future):
        before = servers[0].total
        call = start(Request())
        told = threading.Event()
        call.add_done_callback(lambda _, told=told: told.set())
        eventually(lambda before=before: servers[0].total > before)
        idle(channel)
        assert not call.done()
        assert call.cancel()
        assert call.code() is Code.CANCELLED
        assert told.wait(5)
    assert servers[0].total == 2


def test_cancel_at_any_moment(serve: Serve, channel_to: ChannelTo) -> None:
    """Cancels race with failures and retries; every call ends, once, and no lease stays open."""
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE
    retry = Retry(budget=None, idempotent_methods=("*",))
    channel = channel_to([*servers, refusing_address()], breaker=None, retry=retry)
    stub = stub_of(channel)
    ended: list[Any] = []
    for number in range(200):
        start = stub.Say.future if number % 2 else stub.Watch
        call = start(Request(), timeout=10)
        call.add_done_callback(ended.append)
        canceller = threading.Timer(number % 20 / 2000, call.cancel)
        canceller.start()
        if number % 3:
            call.cancelled() or call.exception if number % 2 else None
        canceller.join()
        assert call.cancel() is False
        assert call.code() in (Code.OK, Code.CANCELLED)
    eventually(lambda: len(ended) == 200)
    idle(channel)


def test_cancel_from_a_callback_and_twice(serve: Serve, channel_to: ChannelTo) -> None:
    stub = stub_of(channel_to(serve(1)))
    results: list[Any] = []
    call = stub.Say.future(Request(), timeout=5)
    call.add_done_callback(lambda done: results.append((done.cancel(), done.result().backend)))
    eventually(lambda: results)
    assert results == [(False, "s0")]


# -- dropping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single_threaded", [False, True])
def test_a_dropped_stream_is_cancelled(single_threaded: bool, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    options = ((grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),) if single_threaded else ()
    channel = channel_to(servers, options=options)
    stub = stub_of(channel)
    for _ in stub.Watch(Request(count=1000, interval_seconds=0.02)):
        break  # the iterator of the for statement was the only reference
    idle(channel)
    call = stub.Watch(Request(text="hang"))
    eventually(lambda: servers[0].total == 2)
    del call
    idle(channel)
    [node] = channel.cluster.nodes
    assert (node.failures, node.ignored) == (0, 2)


def test_a_dropped_future_is_cancelled_and_garbage_goes(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    channel = channel_to(servers)
    call = stub_of(channel).Say.future(Request(text="hang"))
    gone = weakref.ref(call)
    eventually(lambda: servers[0].total)
    del call
    assert gone() is None
    idle(channel)


def test_a_call_dropped_between_attempts_or_before_the_first(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    servers[0].code, servers[0].trailers = Code.UNAVAILABLE, (("grpc-retry-pushback-ms", "300"),)
    channel = channel_to(servers, breaker=None)
    call = stub_of(channel).Say.future(Request())
    eventually(lambda: servers[0].total)
    idle(channel)
    assert not call.done()
    del call
    silent = silent_channel()
    waiting = stub_of(silent).Say.future(Request())
    gone = weakref.ref(waiting)
    del waiting
    assert gone() is None
    silent.mesh.close()
    servers[0].code = None
    assert stub_of(channel).Say(Request(), timeout=5).backend == "s0"
    assert servers[0].total == 2


def test_a_dropped_channel_closes_its_connections(serve: Serve, make_mesh: MakeMesh) -> None:
    from meshlb.grpc import insecure_channel

    servers = serve(2)
    mesh = make_mesh([server.address for server in servers])
    channel: Any = insecure_channel("echo", mesh=mesh)
    stub_of(channel).Say(Request(), timeout=5)
    resources = channel._resources
    assert len(resources) == 1
    del channel
    gc.collect()
    eventually(lambda: len(resources) == 0)


def test_nothing_is_kept_of_calls_that_are_over(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE
    channel = channel_to(servers, breaker=None, retry=Retry(budget=None))
    stub = stub_of(channel)

    def once() -> None:
        stub.Say(Request(), timeout=5)
        stub.Say.future(Request(), timeout=5).result()
        list(stub.Watch(Request(), timeout=5)) if servers[0].code is None else None
        with pytest.raises(grpc.RpcError):
            stub.Say(Request(fail_code=5), timeout=5)

    for _ in range(5):
        once()
    gc.collect()
    idle(channel)
    before = len(gc.get_objects())
    for _ in range(50):
        once()
    idle(channel)
    gc.collect()
    assert len(gc.get_objects()) - before < 500
    assert not channel._waiters


# -- closing -------------------------------------------------------------------------------------------------------


def test_close_cancels_the_calls_under_way(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    channel = channel_to(servers)
    stub = stub_of(channel)
    release = threading.Event()

    def ask() -> Iterator[Request]:
        yield Request(text="hang")
        release.wait(10)

    errors: list[Any] = []

    def block(call: Any) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=block, args=(call,))
        for call in (lambda: stub.Say(Request(text="hang")), lambda: stub.Collect(ask()))
    ]
    for thread in threads:
        thread.start()
    future, stream, chat = stub.Say.future(Request(text="hang")), stub.Watch(Request(text="hang")), stub.Chat(ask())
    eventually(lambda: in_flight(channel.mesh) == 5)
    eventually(lambda: sum(server.total for server in servers) == 4)  # Collect waits for its requests
    channel.close()
    channel.close()
    release.set()
    for thread in threads:
        thread.join(10)
    assert [(error.code(), error.details()) for error in errors] == [(Code.CANCELLED, "Channel closed!")] * 2
    for call in (future, stream, chat):
        assert (call.code(), call.details()) == (Code.CANCELLED, "Channel closed!")
    assert channel.cluster.retries == 0
    idle(channel)


def test_close_ends_calls_that_wait(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    servers[0].code, servers[0].trailers = Code.UNAVAILABLE, (("grpc-retry-pushback-ms", "20000"),)
    pausing = channel_to(servers, breaker=None)
    silent = silent_channel()
    for channel in (pausing, silent):
        errors: list[Any] = []

        def block(channel: Any = channel, errors: list[Any] = errors) -> None:
            with pytest.raises(grpc.RpcError) as raised:
                stub_of(channel).Say(Request())
            errors.append(raised.value)

        thread = threading.Thread(target=block)
        thread.start()
        calls = [stub_of(channel).Say.future(Request()), stub_of(channel).Say.future(Request())]
        if channel is pausing:
            eventually(lambda: servers[0].total == 3)
            idle(channel)
        else:
            eventually(lambda channel=channel: len(channel._waiters) == 3)
        channel.close()
        thread.join(10)
        for call in (*calls, *errors):
            assert (call.code(), call.details()) == (Code.CANCELLED, "Channel closed!")
        assert not channel._waiters
    silent.mesh.close()


def test_use_after_close(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(1))
    stub = stub_of(channel)
    stub.Say(Request(), timeout=5)
    with channel as same:
        assert same is channel
    for call in (stub.Say, stub.Say.with_call, stub.Say.future, stub.Watch):
        with pytest.raises(ValueError, match="Cannot invoke RPC"):
            call(Request())
    for call in (stub.Collect, stub.Collect.with_call, stub.Collect.future, stub.Chat):
        with pytest.raises(ValueError, match="Cannot invoke RPC"):
            call(iter([Request()]))
    with pytest.raises(ValueError, match="Cannot invoke RPC"):
        channel.unary_unary("/a/b")(b"")
    idle(channel)


def test_a_closed_mesh(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    channel = channel_to(servers)
    stub = stub_of(channel)
    stub.Say(Request(), timeout=5)
    stream = stub.Watch(Request(text="hang"))
    eventually(lambda: servers[0].total == 2)
    channel.mesh.close()
    for call in (
        lambda: stub.Say(Request()),
        lambda: stub.Say.future(Request()).result(),
        lambda: next(stub.Watch(Request())),
    ):
        with pytest.raises(MeshClosed) as raised:
            call()
        assert isinstance(raised.value, grpc.RpcError)
        assert raised.value.code() is Code.CANCELLED
    assert stream.code() is Code.CANCELLED


def test_mesh_closed_while_calls_wait(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    servers[0].code, servers[0].trailers = Code.UNAVAILABLE, (("grpc-retry-pushback-ms", "20000"),)
    pausing, silent = channel_to(servers, breaker=None), silent_channel()
    calls = [stub_of(pausing).Say.future(Request()), stub_of(silent).Say.future(Request())]
    eventually(lambda: servers[0].total == 1)
    idle(pausing)
    pausing.mesh.close()
    silent.mesh.close()
    assert [call.code() for call in calls] == [Code.UNAVAILABLE, Code.CANCELLED]


# -- nobody to call ------------------------------------------------------------------------------------------------


def test_nobody_to_call(make_mesh: MakeMesh) -> None:
    from meshlb.grpc import insecure_channel

    channel: Any = insecure_channel("echo", mesh=make_mesh([]))
    stub = stub_of(channel)
    for call in (
        lambda: stub.Say(Request(), timeout=5),
        lambda: stub.Say.with_call(Request(), timeout=5),
        lambda: stub.Say.future(Request(), timeout=5).result(),
        lambda: next(stub.Watch(Request(), timeout=5)),
        lambda: stub.Collect(iter([Request()]), timeout=5),
        lambda: next(stub.Chat(iter([Request()]), timeout=5)),
    ):
        with pytest.raises(NoEndpoints) as raised:
            call()
        error = raised.value
        assert isinstance(error, MeshError)
        assert isinstance(error, grpc.RpcError)
        assert isinstance(error, grpc.Call)
        assert error.code() is Code.UNAVAILABLE
        assert "echo" in error.details()
        assert error.trailing_metadata() == ()
    call = stub.Watch(Request(), timeout=5)
    told = threading.Event()
    call.add_done_callback(lambda _: told.set())
    assert told.is_set() or told.wait(5)
    assert call.code() is Code.UNAVAILABLE
    assert isinstance(call.exception(), NoEndpoints)
    channel.close()


def silent_channel() -> Any:
    """A channel whose registry never answers."""
    import asyncio

    from meshlb import Mesh
    from meshlb.grpc import insecure_channel

    class Silent:
        def knows(self, name: str) -> bool:
            return True

        async def watch(self, query: Any, sink: Any) -> None:
            await asyncio.get_running_loop().create_future()

        async def aclose(self) -> None:
            pass

    return insecure_channel("echo", mesh=Mesh(Silent()))
