"""The same function on gRPC's own channel and on ours: what comes out must be the same."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.experimental
import pytest

from meshlb._proto import echo_pb2_grpc
from tests.grpc.sync.conftest import ChannelTo, Serve
from tests.grpc.sync.servers import SAY, WATCH, Reply, Request, Server
from tests.support.wait import eventually

Scenario = Callable[[Any, Server], Any]
SCENARIOS: list[Scenario] = []
ADDRESS = re.compile(r"127[.\d]+:\d+")
FAMILIES = (grpc.RpcError, grpc.Call, grpc.Future, grpc.RpcContext, Exception)


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


def families(thing: object) -> list[str]:
    return [family.__name__ for family in FAMILIES if isinstance(thing, family)]


def plain(value: Any) -> Any:
    if isinstance(value, Reply):
        return ("reply", value.text, value.sequence, len(value.payload))
    if isinstance(value, grpc.RpcError) and hasattr(value, "code"):
        return ("rpc error", families(value), value.code(), details_of(value),
                metadata_of(value.initial_metadata()), metadata_of(value.trailing_metadata()))  # fmt: skip
    if isinstance(value, BaseException):
        return (type(value).__name__, str(value))
    return value


def details_of(call: Any) -> str:
    """Without what differs from one run of grpc's own to the next: the port, and where the core noticed the end."""
    details = ADDRESS.sub("ADDRESS", call.details() or "")
    return re.sub(r"^Stream removed \((.*)\)$", r"\1", details)


def metadata_of(metadata: Any) -> Any:
    return None if metadata is None else tuple((key, value) for key, value in metadata)


def outcome(function: Callable[[], Any]) -> Any:
    """What a call gives, as plain data."""
    try:
        return plain(function())
    except BaseException as error:
        return plain(error)


def call_state(call: Any) -> Any:
    """What an ended call says of itself."""
    return (
        families(call),
        call.code(),
        details_of(call),
        metadata_of(call.initial_metadata()),
        metadata_of(call.trailing_metadata()),
        call.is_active(),
        call.cancel(),
        call.cancelled() or call.add_callback(lambda: None),  # after a cancel it depends on gRPC's threads
        (call.done(), call.running(), call.cancelled()),
    )


def requests(*texts: str, **last: Any) -> Iterator[Request]:
    for text in texts[:-1]:
        yield Request(text=text)
    yield Request(text=texts[-1], **last)


# -- unary-unary ---------------------------------------------------------------------------------------------------


@scenario
def unary(stub: Any, server: Server) -> Any:
    return outcome(lambda: stub.Say(Request(text="a", payload_bytes=100), timeout=5))


@scenario
def unary_with_call(stub: Any, server: Server) -> Any:
    request = Request(text="head", trailing_metadata={"x-tail": "2"})
    reply, call = stub.Say.with_call(request, timeout=5, metadata=(("x-a", "b"), ("x-b-bin", b"\x01")))
    return plain(reply), reply.metadata["x-a"], call_state(call)


@scenario
def unary_future(stub: Any, server: Server) -> Any:
    call = stub.Say.future(Request(text="head", trailing_metadata={"x-tail": "2"}), timeout=5)
    return (
        families(call),
        metadata_of(call.initial_metadata()),
        plain(call.result(5)),
        call.exception(),
        call.traceback(),
        call_state(call),
    )


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
def test_every_code_of_the_application(code: grpc.StatusCode, serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()

    def fail(stub: Any) -> Any:
        request = Request(fail_code=code.value[0], fail_details="naïve ünicode", trailing_metadata={"x-tail": "1"})
        return [
            outcome(lambda: stub.Put(request, timeout=5)),
            outcome(lambda: stub.Put.with_call(request, timeout=5)),
            outcome(lambda: stub.Put.future(request, timeout=5).result()),
            outcome(lambda: stub.Put.future(request, timeout=5).exception()),
            outcome(lambda: list(stub.Watch(request, timeout=5))),
            outcome(lambda: stub.Collect(iter([request]), timeout=5)),
            outcome(lambda: list(stub.Chat(iter([request]), timeout=5))),
        ]

    assert fail(stub_of(channel_to([server], breaker=None))) == natively(server, fail)


@scenario
def unary_errors(stub: Any, server: Server) -> Any:
    return [
        outcome(lambda: stub.Say(Request(text="head", fail_code=5), timeout=5)),
        outcome(lambda: stub.Say(Request(text="hang"), timeout=0.2)),
        outcome(lambda: stub.Say(Request(), timeout=-1))[:3],  # the details may say more than gRPC's
        outcome(lambda: stub.Say.future(Request(text="hang"), timeout=0.2).result()),
        outcome(lambda: stub.Say.future(Request(), timeout=-1).exception().code()),
    ]


@scenario
def bad_arguments(stub: Any, server: Server) -> Any:
    return [
        outcome(lambda: stub.Say("no message", timeout=5)),
        outcome(lambda: stub.Say.future("no message", timeout=5)),
        outcome(lambda: stub.Watch("no message", timeout=5)),
        outcome(lambda: stub.Collect(iter(["no message"]), timeout=5)),
        outcome(lambda: list(stub.Chat(iter(["no message"]), timeout=5))),
        outcome(lambda: stub.Collect([Request()], timeout=5)),  # no iterator
        outcome(lambda: stub.Collect(7, timeout=5)),
        outcome(lambda: stub.Say(Request(), timeout=5, metadata=(("Bad Key", "x"),))),
        outcome(lambda: stub.Say.future(Request(), timeout=5, metadata=(("Bad Key", "x"),)).code()),
        outcome(lambda: stub.Say(Request(), timeout=5, metadata=(("x", 5),))),
        outcome(lambda: stub.Say(Request(), timeout="soon"))[0],
        outcome(lambda: stub.Say(Request(), 5, None, None, None, None, "too many"))[0],
    ]


@scenario
def metadata_as_a_list(stub: Any, server: Server) -> Any:
    return stub.Say(Request(), timeout=5, metadata=[("x-a", "b")]).metadata["x-a"]


@scenario
def future_cancelled(stub: Any, server: Server) -> Any:
    call = stub.Say.future(Request(text="hang"), timeout=10)
    told = threading.Event()
    order: list[Any] = []
    call.add_done_callback(lambda done: order.append(done is call))
    call.add_done_callback(lambda _: told.set())
    before = (call.done(), call.running(), call.cancelled(), call.is_active(), call.time_remaining() > 5)
    cancelled = call.cancel()
    after = [outcome(call.result), outcome(call.exception), outcome(call.traceback), call_state(call)]
    return before, cancelled, after, told.wait(5), order


@scenario
def future_callbacks(stub: Any, server: Server) -> Any:
    call = stub.Say.future(Request(text="a", delay_seconds=0.3), timeout=5)  # not over before the callbacks are there
    told: list[Any] = []
    ended = threading.Event()
    call.add_done_callback(lambda done: told.append((done is call, done.code(), plain(done.result()))))
    call.add_done_callback(lambda done: 1 / 0)
    call.add_done_callback(lambda done: ended.set())
    call.result()
    assert ended.wait(5)
    call.add_done_callback(lambda done: told.append("late"))
    return told


@scenario
def future_not_done_in_time(stub: Any, server: Server) -> Any:
    call = stub.Say.future(Request(text="hang"), timeout=10)
    results = [outcome(lambda: call.result(0.05)), outcome(lambda: call.exception(0.05))]
    call.cancel()
    return results


@scenario
def future_kept_alive_by_its_callback(stub: Any, server: Server) -> Any:
    told: list[Any] = []
    stub.Say.future(Request(text="a", delay_seconds=0.05), timeout=5).add_done_callback(lambda c: told.append(c.code()))
    eventually(lambda: told)
    return told


# -- response streams ----------------------------------------------------------------------------------------------


@scenario
def response_stream(stub: Any, server: Server) -> Any:
    call = stub.Watch(Request(text="head", count=3, trailing_metadata={"x-tail": "2"}), timeout=5)
    return families(call), metadata_of(call.initial_metadata()), [plain(reply) for reply in call], call_state(call)


@scenario
def response_stream_read_on_after_the_end(stub: Any, server: Server) -> Any:
    call = stub.Watch(Request(count=1), timeout=5)
    return [outcome(lambda: next(call)) for _ in range(3)], iter(call) is call, plain(call.result())


@scenario
def response_stream_without_reading(stub: Any, server: Server) -> Any:
    call = stub.Watch(Request(fail_code=7), timeout=5)
    return call.code(), call.details(), plain(call.exception())


@scenario
def response_stream_fails_in_the_middle(stub: Any, server: Server) -> Any:
    call = stub.Watch(Request(count=3, fail_code=14, fail_after=2), timeout=5)
    return [outcome(lambda: next(call)) for _ in range(4)], call_state(call)


@scenario
def response_stream_cancelled(stub: Any, server: Server) -> Any:
    call = stub.Watch(Request(count=1000, interval_seconds=0.05), timeout=20)
    first = plain(next(call))
    cancelled = call.cancel()
    return first, cancelled, outcome(lambda: next(call)), call_state(call), outcome(call.result)


@scenario
def response_stream_cancelled_before_the_first(stub: Any, server: Server) -> Any:
    call = stub.Watch(Request(text="hang"), timeout=20)
    told = threading.Event()
    added = call.add_callback(told.set)
    return added, call.cancel(), call.cancel(), outcome(lambda: next(call)), told.wait(5)


@scenario
def response_stream_deadline(stub: Any, server: Server) -> Any:
    call = stub.Watch(Request(count=1000, interval_seconds=0.1), timeout=0.45)
    first = plain(next(call))
    return first, outcome(lambda: [None for _ in call]), call.code()


@scenario
def response_that_cannot_be_read(stub: Any, server: Server) -> Any:
    def refuse(data: bytes) -> Any:
        raise ValueError

    serializer = Request.SerializeToString
    say = stub.channel.unary_unary(SAY, serializer, refuse)
    watch = stub.channel.unary_stream(WATCH, serializer, refuse)
    return [
        outcome(lambda: say(Request(), timeout=5)),
        outcome(lambda: say.future(Request(), timeout=5).result()),
        outcome(lambda: next(watch(Request(count=1000, interval_seconds=0.05), timeout=5))),
    ]


# -- request streams -----------------------------------------------------------------------------------------------


@scenario
def request_stream(stub: Any, server: Server) -> Any:
    reply, call = stub.Collect.with_call(requests("a", "b", "c"), timeout=5)
    return plain(reply), call_state(call), outcome(lambda: stub.Collect(iter(()), timeout=5))


@scenario
def request_stream_future(stub: Any, server: Server) -> Any:
    call = stub.Collect.future(requests("a", "b", trailing_metadata={"x-tail": "2"}), timeout=5)
    return families(call), plain(call.result()), call_state(call)


@scenario
def request_stream_that_fails(stub: Any, server: Server) -> Any:
    def broken() -> Iterator[Request]:
        yield Request(text="a")
        raise ValueError("no more")

    return [
        outcome(lambda: stub.Collect(broken(), timeout=5)),
        outcome(lambda: stub.Collect.future(broken(), timeout=5).result()),
        outcome(lambda: [None for _ in stub.Chat(broken(), timeout=5)]),
    ]


@scenario
def both_streams(stub: Any, server: Server) -> Any:
    asked: list[int] = []
    proceed = threading.Semaphore(1)

    def ask() -> Iterator[Request]:
        for number in range(4):
            proceed.acquire()
            asked.append(number)
            yield Request(text=str(number))

    replies = []
    call = stub.Chat(ask(), timeout=10)
    for reply in call:
        replies.append((plain(reply), len(asked)))  # ping-pong: nothing is asked before the last answer is here
        proceed.release()
    return replies, call_state(call)


@scenario
def both_streams_cancelled(stub: Any, server: Server) -> Any:
    release = threading.Event()

    def ask() -> Iterator[Request]:
        yield Request(text="a")
        release.wait(10)

    call = stub.Chat(ask(), timeout=10)
    first = plain(next(call))
    cancelled = call.cancel()
    release.set()
    return first, cancelled, outcome(lambda: next(call)), call.code()


def natively(server: Server, function: Callable[..., Any], *args: Any, options: Any = ()) -> Any:
    with grpc.insecure_channel(server.address, options=(("grpc.use_local_subchannel_pool", 1), *options)) as channel:
        return function(stub_of(channel), *args)


def stub_of(channel: Any) -> Any:
    stub: Any = echo_pb2_grpc.EchoStub(channel)
    stub.channel = channel
    return stub


@pytest.mark.parametrize("function", SCENARIOS, ids=lambda function: function.__name__)
def test_same_as_grpc(function: Scenario, serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()
    ours = function(stub_of(channel_to([server], breaker=None)), server)
    assert ours == natively(server, function, server)


@pytest.mark.parametrize(
    "function",
    [response_stream, response_stream_fails_in_the_middle, response_stream_read_on_after_the_end],
    ids=lambda function: function.__name__,
)
def test_same_as_grpc_on_a_single_thread(function: Scenario, serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()
    options = ((grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),)
    ours = function(stub_of(channel_to([server], options=options)), server)
    assert ours == natively(server, function, server, options=options)


def test_single_threaded_stream_does_not_block_for_its_end(serve: Serve, channel_to: ChannelTo) -> None:
    [server] = serve()
    options = ((grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),)

    def ask(stub: Any) -> Any:
        call = stub.Watch(Request(count=2), timeout=5)
        return [outcome(call.code), outcome(call.details), outcome(call.result), outcome(call.trailing_metadata)]

    assert ask(stub_of(channel_to([server], options=options))) == natively(server, ask, options=options)
