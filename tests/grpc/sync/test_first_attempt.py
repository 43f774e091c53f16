"""Calls that are nothing but their first attempt until that fails: who notices its end, what a driver takes over."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from meshlb import Retry
from meshlb._proto import echo_pb2_grpc
from tests.grpc.sync.conftest import ChannelTo, Serve, in_flight
from tests.grpc.sync.servers import Request
from tests.support.wait import eventually

Code = grpc.StatusCode
RETRIES = Retry(budget=None, idempotent_methods=("/meshlb.demo.v1.Echo/*",))


def stub_of(channel: Any) -> Any:
    return echo_pb2_grpc.EchoStub(channel)


def end_of(call: Any) -> Any:
    """The code, for those who only look at whether the call is done."""
    eventually(call.done)
    return call.code()


ASKING: dict[str, Callable[[Any], Any]] = {
    "result": lambda call: call.result(10) and Code.OK,
    "exception": lambda call: call.exception(10) or Code.OK,
    "traceback": lambda call: call.traceback(10) or Code.OK,
    "code": lambda call: call.code(),
    "details": lambda call: call.details() or Code.OK,
    "trailing metadata": lambda call: call.trailing_metadata() or Code.OK,
    "initial metadata": lambda call: call.initial_metadata() or call.code(),
    "done": end_of,
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING.keys())
@pytest.mark.parametrize("failing", [False, True])
def test_whoever_asks_finds_the_call_ended_and_nothing_open(
    ask: Any, failing: bool, serve: Serve, channel_to: ChannelTo
) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE if failing else None
    channel = channel_to(servers, breaker=None, retry=RETRIES)
    for _ in range(10):
        call = stub_of(channel).Say.future(Request(), timeout=10)
        assert call.time_remaining() > 0
        assert ask(call) is Code.OK
        assert (call.done(), call.running(), call.is_active(), call.cancelled()) == (True, False, False, False)
        assert in_flight(channel.mesh) == 0
        assert call.cancel() is False
        assert call.add_callback(lambda: None) is False
        assert call.result().backend in (("s1",) if failing else ("s0", "s1"))


@pytest.mark.parametrize("failing", [False, True])
def test_callbacks_come_after_the_end_and_in_order(failing: bool, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE if failing else None
    channel = channel_to(servers, breaker=None, retry=RETRIES)
    for number in range(20):
        told: list[Any] = []
        call = stub_of(channel).Say.future(Request(), timeout=10)

        def tell(name: str, done: Any, told: list[Any] = told) -> None:
            told.append((name, done.done(), done.code(), in_flight(channel.mesh)))

        call.add_done_callback(functools.partial(tell, "a"))
        call.add_done_callback(functools.partial(tell, "b"))
        if number % 2:
            call.result()
        eventually(lambda told=told: len(told) == 2)
        assert told == [("a", True, Code.OK, 0), ("b", True, Code.OK, 0)]


def test_waits_that_end_too_early_leave_the_end_to_the_callback(serve: Serve, channel_to: ChannelTo) -> None:
    channel = channel_to(serve(1))
    calls = [stub_of(channel).Say.future(Request(delay_seconds=0.05), timeout=20) for _ in range(10)]
    for turn in range(400):
        with contextlib.suppress(grpc.FutureTimeoutError):
            calls[turn % 10].result(0)
    eventually(lambda: in_flight(channel.mesh) == 0)
    assert all(call.done() for call in calls)


def test_an_interrupted_wait_leaves_nothing_counted(serve: Serve, channel_to: ChannelTo) -> None:
    """What Ctrl-C does, at a known place: gRPC's own wait raises."""

    class Interrupted:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def result(self, timeout: float | None = None) -> Any:
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    channel = channel_to(serve(1))
    for delay in (0.0, 0.2):
        call = stub_of(channel).Say.future(Request(delay_seconds=delay), timeout=20)
        inner, call._inner = call._inner, Interrupted(call._inner)
        if not delay:
            eventually(inner.done)
        with pytest.raises(KeyboardInterrupt):
            call.result()
        eventually(lambda: in_flight(channel.mesh) == 0)
        assert call.code() is Code.OK


def test_the_end_of_a_stream_that_is_not_read_on_is_noticed(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    channel = channel_to(servers)
    calls = []
    for _ in range(20):
        call = stub_of(channel).Watch(Request(count=1), timeout=20)
        assert next(call).backend == "s0"
        calls.append(call)
    eventually(lambda: in_flight(channel.mesh) == 0)
    assert {call.code() for call in calls} == {Code.OK}
    [node] = channel.cluster.nodes
    assert node.successes == 20


def test_a_reader_and_others_who_ask_at_once(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE
    channel = channel_to(servers, breaker=None, retry=RETRIES)
    for _ in range(20):
        call = stub_of(channel).Watch(Request(count=3), timeout=20)
        codes: list[Any] = []
        others = [
            threading.Thread(target=lambda ask=ask, call=call, codes=codes: codes.append(ask(call)))
            for ask in (ASKING["code"], ASKING["initial metadata"], ASKING["done"])
        ]
        for other in others:
            other.start()
        assert [reply.backend for reply in call] == ["s1"] * 3
        for other in others:
            other.join(20)
        assert codes == [Code.OK] * 3
        assert in_flight(channel.mesh) == 0


def test_a_call_taken_over_is_cancelled_when_it_is_dropped(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    channel = channel_to(servers)
    told = threading.Event()
    call = stub_of(channel).Say.future(Request(text="hang"))
    assert call.add_callback(told.set)
    eventually(lambda: servers[0].total)
    gone = weakref.ref(call)
    del call
    assert gone() is None
    assert told.wait(20)
    eventually(lambda: in_flight(channel.mesh) == 0)


@pytest.mark.parametrize("config", [{}, {"timeout": 10.0}, {"stream_idle_timeout": 10.0}])
def test_with_or_without_a_driver_it_is_the_same(config: Any, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    stub = stub_of(channel_to(servers, **config))
    plain = [stub.Say.future(Request()), stub.Watch(Request(count=3)), stub.Chat(iter([Request()] * 3))]
    assert plain[0].result().backend == "s0"
    assert [[reply.sequence for reply in call] for call in plain[1:]] == [[0, 1, 2]] * 2
    assert [repr(call) for call in plain] == [
        f"<{type(call).__name__} of RPC that terminated with: StatusCode.OK ''>" for call in plain
    ]
