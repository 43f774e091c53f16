"""The channel itself, on grpc.aio's own and on ours: state, close, interceptors."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

import meshlb.grpc.aio
from meshlb._proto.echo_pb2_grpc import EchoStub
from tests.grpc.aio.servers import Request, Server, unused_address
from tests.grpc.aio.test_contract import end_of, numbers, outcome, texts

READY = grpc.ChannelConnectivity.READY
MakeChannel = Callable[..., Any]


@pytest.fixture(params=["grpc", "mesh"])
def make_channel(request: pytest.FixtureRequest, make_mesh: Any) -> MakeChannel:
    """A channel to an address, of grpc's own kind or of ours."""

    def make(address: str, **arguments: Any) -> Any:
        if request.param == "grpc":
            return grpc.aio.insecure_channel(address, **arguments)
        mesh = make_mesh([address], retry=None)
        mesh.cluster("echo").wait_ready(5)
        return meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh, **arguments)

    return make


async def test_is_a_channel(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    channel = make_channel(server.address)
    assert isinstance(channel, grpc.aio.Channel)
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        multicallable = getattr(channel, kind)("/a.B/C", None, None, True)
        abstract = getattr(grpc.aio, "".join(part.title() for part in kind.split("_")) + "MultiCallable")
        assert isinstance(multicallable, abstract)
        ours, theirs = inspect.signature(multicallable.__call__), inspect.signature(abstract.__call__)
        assert [p.name for p in ours.parameters.values()] == [p.name for p in theirs.parameters.values()][1:]
    await channel.close()


async def test_without_serializers(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    async with make_channel(server.address) as channel:
        raw = await channel.unary_unary("/meshlb.demo.v1.Echo/Say")(Request(text="a").SerializeToString())
        assert isinstance(raw, bytes)
        assert await outcome(channel.unary_unary("/meshlb.demo.v1.Echo/None")(b"")) == (
            "AioRpcError", grpc.StatusCode.UNIMPLEMENTED, "Method not found!", ()
        )  # fmt: skip


async def test_states(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    channel = make_channel(server.address)
    assert channel.get_state() is grpc.ChannelConnectivity.IDLE
    # grpc.aio leaves a watch behind for every wait that is given up, so neither is.
    changed = asyncio.ensure_future(channel.wait_for_state_change(grpc.ChannelConnectivity.IDLE))
    await asyncio.wait_for(channel.channel_ready(), 5)
    assert channel.get_state() is READY
    await asyncio.wait_for(changed, 5)
    await channel.close()
    assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    for late in (channel.wait_for_state_change(READY), channel.channel_ready()):
        with pytest.raises(grpc.aio.UsageError, match=r"Channel is closed\."):
            await late


async def test_state_without_a_server(make_channel: MakeChannel) -> None:
    async with make_channel(unused_address()) as channel:
        await outcome(EchoStub(channel).Say(Request()))
        assert channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE


async def test_channel_ready_waits_for_a_late_server(make_channel: MakeChannel) -> None:
    server = Server("late")
    async with server:
        pass  # now it has a port
    async with make_channel(server.address, options=[("grpc.initial_reconnect_backoff_ms", 50)]) as channel:
        ready = asyncio.ensure_future(channel.channel_ready())
        done, _ = await asyncio.wait({ready}, timeout=0.05)
        assert not done
        async with server:
            await asyncio.wait_for(ready, 10)


async def test_used_after_close(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    channel = make_channel(server.address)
    stub = EchoStub(channel)
    await stub.Say(Request())
    await channel.close()
    await channel.close()
    for make in (stub.Say, stub.Put, stub.Watch):
        with pytest.raises(grpc.aio.UsageError, match=r"Channel is closed\."):
            make(Request())
    for make in (stub.Collect, stub.Chat):
        with pytest.raises(grpc.aio.UsageError, match=r"Channel is closed\."):
            make()
    EchoStub(channel)  # a stub can still be made


async def test_close_cancels(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    channel = make_channel(server.address)
    stub = EchoStub(channel)
    say, watch, chat = stub.Say(Request(text="hang")), stub.Watch(Request(count=9, interval_seconds=9)), stub.Chat()
    await watch.read()
    await channel.close()
    assert [await outcome(say), await outcome(watch.read()), await outcome(chat.read())] == [("CancelledError", "")] * 3
    assert [(await end_of(call))[:3] for call in (say, watch, chat)] == [(True, True, grpc.StatusCode.CANCELLED)] * 3


async def test_close_with_grace(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    channel = make_channel(server.address)
    stub = EchoStub(channel)
    short, hanging = stub.Say(Request(text="a", delay_seconds=0.05)), stub.Say(Request(text="hang"))
    closing = asyncio.ensure_future(channel.close(grace=0.3))
    await asyncio.sleep(0)
    with pytest.raises(grpc.aio.UsageError):
        stub.Say(Request())
    await closing
    assert await outcome(short) == "a"
    assert await outcome(hanging) == ("CancelledError", "")


async def test_negative_grace(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    async with make_channel(server.address) as channel:
        with pytest.raises(ValueError, match="grace must be non-negative"):
            await channel.close(-1)
        assert await outcome(EchoStub(channel).Say(Request(text="a"))) == "a"


# -- interceptors --------------------------------------------------------------------------------------------------


class Recorder:
    """An interceptor of one kind that notes what it sees and adds metadata."""

    def __init__(self, log: list[Any], name: str) -> None:
        self.log = log
        self.name = name

    async def note(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add("x-by", self.name)
        self.log.append((self.name, details.method, details.timeout, tuple(details.metadata or ())))
        return await continuation(details._replace(metadata=metadata), request)


class UnaryUnary(Recorder, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self.note(continuation, client_call_details, request)


class UnaryStream(Recorder, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self.note(continuation, client_call_details, request)


class StreamUnary(Recorder, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self.note(continuation, client_call_details, request_iterator)


class StreamStream(Recorder, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self.note(continuation, client_call_details, request_iterator)


KINDS = (UnaryUnary, UnaryStream, StreamUnary, StreamStream)


@asynccontextmanager
async def intercepted(make_channel: MakeChannel, server: Server, *interceptors: Any) -> AsyncIterator[EchoStub]:
    async with make_channel(server.address, interceptors=interceptors) as channel:
        yield EchoStub(channel)


def test_what_is_no_interceptor(make_mesh: Any) -> None:
    with pytest.raises(ValueError, match="must be UnaryUnaryClientInterceptor or"):
        meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=make_mesh([]), interceptors=[object()])


async def test_interceptors_of_all_kinds(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    log: list[Any] = []
    both = [kind(log, name) for name in ("outer", "inner") for kind in KINDS]
    async with intercepted(make_channel, server, *both) as stub:
        replies = [await stub.Say(Request(text="a"), timeout=5, metadata=(("x-own", "1"),))]
        watching = stub.Watch(Request(count=2), compression=grpc.Compression.Gzip)
        replies += [reply async for reply in watching]
        replies += [await stub.Collect(texts("a", "b"))]
        writing = stub.Collect()
        await writing.write(Request(text="w"))
        await writing.done_writing()
        replies += [await writing]
        chat = stub.Chat()
        await chat.write(Request(text="c"))
        replies += [await chat.read()]
        await chat.done_writing()
        assert await chat.read() is grpc.aio.EOF
        ends = [(await end_of(call))[:3] for call in (watching, writing, chat)]
    assert ends == [(True, False, grpc.StatusCode.OK)] * 3
    # The outer one first, and what it added is seen by the inner one.
    assert [(entry[0], dict(entry[3]).get("x-by")) for entry in log] == [("outer", None), ("inner", "outer")] * 5
    assert log[0][1:] == (b"/meshlb.demo.v1.Echo/Say", 5, (("x-own", "1"),))
    assert dict(log[2][3])["grpc-internal-encoding-request"] == "gzip"
    assert {reply.metadata["x-by"] for reply in replies} <= {"inner", "outer"}
    assert len(replies) == 6


class Answering(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self.answer(continuation, client_call_details, request)


async def test_an_interceptor_that_answers_itself(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()

    async def answer(continuation: Any, details: Any, request: Any) -> Any:
        return "mine"

    async with intercepted(make_channel, server, Answering(answer)) as stub:
        call = stub.Say(Request())
        assert (await call, await call.code(), call.done()) == ("mine", grpc.StatusCode.OK, True)
    assert not server.calls


async def test_an_interceptor_that_raises(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()

    async def fail(continuation: Any, details: Any, request: Any) -> Any:
        raise ValueError("mine")

    async with intercepted(make_channel, server, Answering(fail)) as stub:
        assert await outcome(stub.Say(Request())) == ("ValueError", "mine")


async def test_an_interceptor_that_tries_twice(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()

    async def twice(continuation: Any, details: Any, request: Any) -> Any:
        first = await continuation(details, Request(fail_code=5))
        assert await first.code() is grpc.StatusCode.NOT_FOUND
        return await continuation(details, request)

    async with intercepted(make_channel, server, Answering(twice)) as stub:
        assert (await stub.Say(Request(text="a"))).text == "a"
    assert server.calls["Say"] == 2


async def test_an_interceptor_that_changes_the_method(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()

    async def rename(continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details._replace(method=b"/meshlb.demo.v1.Echo/Put"), request)

    async with intercepted(make_channel, server, Answering(rename)) as stub:
        assert (await stub.Say(Request(text="a"))).text == "a"
    assert server.calls == {"Put": 1}


async def test_an_intercepted_call_is_cancelled(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    log: list[Any] = []
    async with intercepted(make_channel, server, *(kind(log, "x") for kind in KINDS)) as stub:
        call = stub.Say(Request(text="hang"))
        while not server.calls["Say"]:
            await asyncio.sleep(0.005)
        assert call.cancel()
        assert await outcome(call) == ("CancelledError", "")
        watch = stub.Watch(Request(text="hang"))
        reading = asyncio.ensure_future(outcome(numbers(watch, [])))
        while not server.calls["Watch"]:
            await asyncio.sleep(0.005)
        assert watch.cancel()
        assert await reading == ("CancelledError", "")


async def test_an_intercepted_error(serve: Any, make_channel: MakeChannel) -> None:
    (server,) = await serve()
    async with intercepted(make_channel, server, UnaryUnary([], "x")) as stub:
        call = stub.Say(Request(fail_code=5, fail_details="none"))
        expected = ("AioRpcError", grpc.StatusCode.NOT_FOUND, "none", ())
        assert await outcome(call) == expected
        assert await end_of(call) == (True, False, grpc.StatusCode.NOT_FOUND, "none", (), False)
        called: list[Any] = []
        call.add_done_callback(called.append)
        assert called == [call]
        with pytest.raises(NotImplementedError):
            call.time_remaining()


async def test_attempt_interceptors_run_for_each_attempt(serve: Any, make_mesh: Any) -> None:
    (server,) = await serve()
    log: list[Any] = []
    mesh = make_mesh([unused_address(), server.address], breaker=None)
    per_attempt = [kind(log, "attempt") for kind in KINDS]
    per_call = [kind(log, "call") for kind in KINDS]
    async with meshlb.grpc.aio.insecure_channel(
        "consul:///echo", mesh=mesh, interceptors=per_call, attempt_interceptors=per_attempt
    ) as channel:
        stub = EchoStub(channel)
        for run in (
            lambda: stub.Say(Request(text="a")),
            lambda: first_of(stub.Watch(Request(text="a"))),
            lambda: stub.Collect(texts("a")),
            lambda: first_of(stub.Chat(texts("a"))),
        ):
            log.clear()
            before = attempts(mesh)
            assert [(await run()).text, (await run()).text] == ["a", "a"]
            names = [entry[0] for entry in log]
            assert names[0] == "call"
            assert names.count("call") == 2
            assert names.count("attempt") == attempts(mesh) - before > 2  # round robin: some at the dead endpoint


def attempts(mesh: Any) -> int:
    return sum(node.calls for node in mesh.cluster("echo").nodes)


async def first_of(call: Any) -> Any:
    async for reply in call:
        first = reply
    return first


async def test_an_attempt_interceptor_that_raises(serve: Any, make_mesh: Any) -> None:
    (server,) = await serve()

    async def fail(continuation: Any, details: Any, request: Any) -> Any:
        raise ValueError("mine")

    mesh = make_mesh([server.address])
    async with meshlb.grpc.aio.insecure_channel(
        "consul:///echo", mesh=mesh, attempt_interceptors=[Answering(fail)]
    ) as channel:
        call = EchoStub(channel).Say(Request())
        assert await outcome(call) == ("ValueError", "mine")
        assert call.done()
