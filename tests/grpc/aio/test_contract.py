"""The same coroutine on grpc.aio's own channel and on ours: what comes out must be the same."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlb._proto.echo_pb2_grpc import EchoStub
from tests.grpc.aio.servers import Request, Server

Scenario = Callable[[EchoStub, Server], Awaitable[Any]]
SCENARIOS: list[Scenario] = []
PORT = re.compile(r"127[.\d]+:\d+")
WRAPPED = re.compile(r"Stream removed \((.*)\)")


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


def plain(details: str | None) -> str:
    """Details without what varies: addresses, and whether gRPC's core was in the middle of something."""
    return WRAPPED.sub(r"\1", PORT.sub("ADDRESS", details or ""))


def described(error: BaseException) -> Any:
    """An error as plain data."""
    if isinstance(error, grpc.aio.AioRpcError):
        details = plain(error.details())
        return ("AioRpcError", error.code(), details, tuple(error.trailing_metadata() or ()))
    return (type(error).__name__, str(error))


async def outcome(awaitable: Awaitable[Any]) -> Any:
    """What awaiting gives, as plain data."""
    try:
        value = await awaitable
    except BaseException as error:
        return described(error)
    return value.text if hasattr(value, "text") else value


async def end_of(call: Any) -> Any:
    """What an ended call says of itself."""
    return (
        call.done(),
        call.cancelled(),
        await call.code(),
        plain(await call.details()),
        tuple(await call.trailing_metadata() or ()),
        call.cancel(),
    )


async def numbers(call: Any, seen: list[Any]) -> None:
    async for reply in call:
        seen.append(reply.sequence)  # noqa: PERF401 - what came before an error counts


async def texts(*values: str) -> Any:
    for value in values:
        await asyncio.sleep(0)
        yield Request(text=value)


async def quietly(call: Any) -> None:
    with suppress(BaseException):
        await call


# -- one request, one response -------------------------------------------------------------------------------------


@scenario
async def unary(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="a"))
    return await outcome(call), await outcome(call), await end_of(call), isinstance(call, grpc.aio.UnaryUnaryCall)


@scenario
async def unary_metadata(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(
        Request(text="head", trailing_metadata={"x-tail": "2"}),
        metadata=(("x-one", "1"), ("x-one", "2"), ("x-bin", b"\x00\x01")),
    )
    reply = await call
    seen = {key: value for key, value in reply.metadata.items() if key.startswith("x-")}
    return seen, tuple(await call.initial_metadata()), tuple(await call.trailing_metadata())


@scenario
async def unary_metadata_object(stub: EchoStub, server: Server) -> Any:
    reply = await stub.Say(Request(), metadata=grpc.aio.Metadata(("x-one", "1"), ("x-two", "2")))
    return {key: value for key, value in reply.metadata.items() if key.startswith("x-")}


@scenario
async def unary_error(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(fail_code=3, fail_details="no: \u00fc", trailing_metadata={"x-tail": "2"}))
    return await outcome(call), await outcome(call), await end_of(call), tuple(await call.initial_metadata())


@scenario
async def unary_error_not_awaited(stub: EchoStub, server: Server) -> Any:
    call = stub.Put(Request(fail_code=5, fail_details="gone"))
    return await end_of(call)


@scenario
async def unary_deadline(stub: EchoStub, server: Server) -> Any:
    call = stub.Put(Request(text="hang"), timeout=0.1)
    remaining = call.time_remaining()
    return await outcome(call), await end_of(call), 0 < remaining <= 0.1, call.time_remaining()


@scenario
async def unary_past_deadline(stub: EchoStub, server: Server) -> Any:
    return described_code(await outcome(stub.Say(Request(), timeout=-1)))


def described_code(result: Any) -> Any:
    return result[:2]


@scenario
async def unary_without_deadline(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request())
    return call.time_remaining(), await outcome(call)


@scenario
async def unary_cancelled_at_once(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="hang"))
    return call.cancel(), call.cancel(), await outcome(call), await outcome(call), await end_of(call)


@scenario
async def unary_cancelled_under_way(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="hang"))
    waiting = asyncio.ensure_future(outcome(call))
    while not server.calls["Say"]:
        await asyncio.sleep(0.005)
    return call.cancel(), await waiting, await end_of(call)


@scenario
async def unary_task_cancelled(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="hang"))
    task = asyncio.ensure_future(quietly_await(call))
    while not server.calls["Say"]:
        await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait({task})
    return task.cancelled(), await end_of(call)


async def quietly_await(call: Any) -> Any:
    return await call


@scenario
async def unary_wait_for(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="hang"))
    try:
        await asyncio.wait_for(call, 0.1)
    except TimeoutError:
        return "timed out", await end_of(call)
    return None


@scenario
async def unary_cancelled_after_the_end(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="a"))
    await call
    return call.cancel(), call.cancelled(), await outcome(call)


@scenario
async def unary_waiting_for_code_can_be_cancelled(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="a", delay_seconds=0.05))
    task = asyncio.ensure_future(call.code())
    await asyncio.sleep(0)
    task.cancel()
    return await outcome(task), await outcome(call)


@scenario
async def unary_callbacks(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Say(Request(text="a"))
    call.add_done_callback(lambda done: seen.append(("first", done is call, done.done())))
    call.add_done_callback(lambda done: seen.append(("second", done is call, done.done())))
    before = list(seen)
    await call
    call.add_done_callback(lambda done: seen.append(("late", done is call)))
    return before, seen


@scenario
async def unary_callbacks_on_cancel(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Say(Request(text="hang"))
    call.add_done_callback(lambda done: seen.append(done.cancelled()))
    call.cancel()
    return list(seen), await outcome(call), seen


@scenario
async def unary_wait_for_connection(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="a"))
    return await outcome(call.wait_for_connection()), await outcome(call)


@scenario
async def unary_concurrent_awaits(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(text="a", delay_seconds=0.02))
    return await asyncio.gather(outcome(call), outcome(call), outcome(call.code()))


@scenario
async def unary_starts_when_made(stub: EchoStub, server: Server) -> Any:
    stub.Say(Request(text="a"))  # nobody holds it
    while not server.calls["Say"]:
        await asyncio.sleep(0.005)
    return True


@scenario
async def unary_compressed(stub: EchoStub, server: Server) -> Any:
    return await outcome(stub.Say(Request(text="a" * 1000), compression=grpc.Compression.Gzip))


@scenario
async def unary_call_credentials_without_tls(stub: EchoStub, server: Server) -> Any:
    try:
        stub.Say(Request(), credentials=grpc.access_token_call_credentials("t"))
    except Exception as error:
        return described(error)
    return None


@scenario
async def unary_bad_arguments(stub: EchoStub, server: Server) -> Any:
    seen = []
    for arguments in ({"timeout": "soon"}, {"metadata": 5}, {"metadata": ("a",)}):
        try:
            await stub.Say(Request(), **arguments)
        except Exception as error:
            seen.append(type(error).__name__)
    return seen


@scenario
async def unary_bad_metadata_key(stub: EchoStub, server: Server) -> Any:
    call = stub.Say(Request(), metadata=(("Bad Key", "x"),))
    return (await outcome(call))[0], (await outcome(call))[0]


@scenario
async def unary_message_too_large(stub: EchoStub, server: Server) -> Any:
    return await outcome(stub.Say(Request(payload_bytes=5 * 1024 * 1024)))


# -- a stream of responses -----------------------------------------------------------------------------------------


@scenario
async def watch(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Watch(Request(text="head", count=3, trailing_metadata={"x-tail": "2"}))
    head = tuple(await call.initial_metadata())
    await numbers(call, seen)
    again: list[Any] = []
    await numbers(call, again)
    return head, seen, again, await end_of(call), isinstance(call, grpc.aio.UnaryStreamCall)


@scenario
async def watch_read(stub: EchoStub, server: Server) -> Any:
    call = stub.Watch(Request(count=2))
    seen = [(await call.read()).sequence, (await call.read()).sequence]
    ends = [await call.read() is grpc.aio.EOF, await call.read() is grpc.aio.EOF]
    return seen, ends, await end_of(call)


@scenario
async def watch_styles_do_not_mix(stub: EchoStub, server: Server) -> Any:
    call = stub.Watch(Request(count=100, interval_seconds=0.01))
    await call.read()
    try:
        call.__aiter__()
    except Exception as error:
        first = described(error)
    call.cancel()
    other = stub.Watch(Request(count=100, interval_seconds=0.01))
    async for _ in other:
        break
    second = await outcome(other.read())
    other.cancel()
    return first, second


@scenario
async def watch_error_first(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Watch(Request(count=3, fail_code=9, fail_details="not now"))
    first = await outcome(numbers(call, seen))
    second = await outcome(numbers(call, seen))
    return first, second, seen, await end_of(call), await outcome(call.read())


@scenario
async def watch_error_later(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Watch(Request(count=5, fail_code=14, fail_details="broke", fail_after=2))
    return await outcome(numbers(call, seen)), seen, await end_of(call)


@scenario
async def watch_error_read(stub: EchoStub, server: Server) -> Any:
    call = stub.Watch(Request(count=5, fail_code=13, fail_details="broke", fail_after=1))
    return await outcome(call.read()), await outcome(call.read()), await outcome(call.read()), await end_of(call)


@scenario
async def watch_cancel(stub: EchoStub, server: Server) -> Any:
    call = stub.Watch(Request(count=100, interval_seconds=0.01))
    await call.read()
    return call.cancel(), await outcome(call.read()), await end_of(call)


@scenario
async def watch_cancel_while_iterating(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Watch(Request(count=100, interval_seconds=0.02))
    task = asyncio.ensure_future(outcome(numbers(call, seen)))
    while not seen:
        await asyncio.sleep(0.005)
    return call.cancel(), await task, await end_of(call)


@scenario
async def watch_cancel_before_the_first(stub: EchoStub, server: Server) -> Any:
    call = stub.Watch(Request(text="hang"))
    task = asyncio.ensure_future(outcome(call.read()))
    while not server.calls["Watch"]:
        await asyncio.sleep(0.005)
    return call.cancel(), await task, await end_of(call)


@scenario
async def watch_reading_task_cancelled(stub: EchoStub, server: Server) -> Any:
    call = stub.Watch(Request(text="hang"))
    task = asyncio.ensure_future(call.read())
    while not server.calls["Watch"]:
        await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait({task})
    return task.cancelled(), await end_of(call)


@scenario
async def watch_deadline(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Watch(Request(count=100, interval_seconds=0.2), timeout=0.1)
    return await outcome(numbers(call, seen)), seen, await end_of(call)


@scenario
async def watch_broken_off_and_resumed(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Watch(Request(count=4))
    async for reply in call:
        seen.append(reply.sequence)
        break
    await numbers(call, seen)
    return seen, await end_of(call)


@scenario
async def watch_callbacks(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Watch(Request(count=1))
    call.add_done_callback(lambda done: seen.append(done is call))
    await numbers(call, seen)
    return seen


@scenario
async def watch_wait_for_connection(stub: EchoStub, server: Server) -> Any:
    seen: list[Any] = []
    call = stub.Watch(Request(count=2))
    return await outcome(call.wait_for_connection()), await outcome(numbers(call, seen)), seen


# -- a stream of requests ------------------------------------------------------------------------------------------


@scenario
async def collect_async_iterator(stub: EchoStub, server: Server) -> Any:
    call = stub.Collect(texts("a", "b", "c"))
    return await outcome(call), await outcome(call), await end_of(call), isinstance(call, grpc.aio.StreamUnaryCall)


@scenario
async def collect_iterator(stub: EchoStub, server: Server) -> Any:
    return await outcome(stub.Collect(iter([Request(text="a"), Request(text="b")]))), await outcome(stub.Collect([]))


@scenario
async def collect_write(stub: EchoStub, server: Server) -> Any:
    call = stub.Collect()
    for text in "abc":
        await call.write(Request(text=text))
    await call.done_writing()
    await call.done_writing()
    late = await outcome(call.write(Request()))
    return late, await outcome(call), await outcome(call.write(Request())), await end_of(call)


@scenario
async def collect_nothing(stub: EchoStub, server: Server) -> Any:
    call = stub.Collect()
    await call.done_writing()
    return await outcome(call), await end_of(call)


@scenario
async def collect_styles_do_not_mix(stub: EchoStub, server: Server) -> Any:
    call = stub.Collect(texts("a"))
    return await outcome(call.write(Request())), await outcome(call.done_writing()), await outcome(call)


@scenario
async def collect_iterator_raises(stub: EchoStub, server: Server) -> Any:
    async def failing() -> Any:
        yield Request(text="a")
        raise ValueError("mine")

    call = stub.Collect(failing())
    return await outcome(call), await end_of(call)


@scenario
async def collect_error(stub: EchoStub, server: Server) -> Any:
    call = stub.Collect(iter([Request(text="a", fail_code=7, fail_details="no")]))
    return await outcome(call), await end_of(call)


@scenario
async def collect_cancel(stub: EchoStub, server: Server) -> Any:
    call = stub.Collect()
    await call.write(Request(text="a"))
    return call.cancel(), await outcome(call), await outcome(call.write(Request())), await end_of(call)


@scenario
async def collect_deadline(stub: EchoStub, server: Server) -> Any:
    call = stub.Collect(timeout=0.1)
    await call.write(Request(text="a"))
    return await outcome(call), await outcome(call.write(Request())), await end_of(call)


@scenario
async def collect_wait_for_connection(stub: EchoStub, server: Server) -> Any:
    call = stub.Collect()
    connected = await outcome(call.wait_for_connection())
    await call.done_writing()
    return connected, await outcome(call)


# -- streams in both directions ------------------------------------------------------------------------------------


@scenario
async def chat(stub: EchoStub, server: Server) -> Any:
    call = stub.Chat()
    seen = []
    for text in "abc":
        await call.write(Request(text=text))
        seen.append((await call.read()).text)
    await call.done_writing()
    end = await call.read() is grpc.aio.EOF
    late = await outcome(call.write(Request()))
    return seen, end, late, await end_of(call), isinstance(call, grpc.aio.StreamStreamCall)


@scenario
async def chat_iterators(stub: EchoStub, server: Server) -> Any:
    call = stub.Chat(texts("a", "b"))
    return [reply.text async for reply in call], await end_of(call)


@scenario
async def chat_iterator_and_read(stub: EchoStub, server: Server) -> Any:
    call = stub.Chat(iter([Request(text="a")]))
    return (await call.read()).text, await call.read() is grpc.aio.EOF, await outcome(call.write(Request()))


@scenario
async def chat_error(stub: EchoStub, server: Server) -> Any:
    call = stub.Chat()
    await call.write(Request(text="a"))
    first = await outcome(call.read())
    await call.write(Request(text="b", fail_code=10, fail_details="stop"))
    second = await outcome(call.read())
    return first, second, await end_of(call), await outcome(call.write(Request()))


@scenario
async def chat_cancel(stub: EchoStub, server: Server) -> Any:
    call = stub.Chat()
    await call.write(Request(text="a"))
    await call.read()
    return call.cancel(), await outcome(call.read()), await outcome(call.write(Request())), await end_of(call)


@scenario
async def chat_iterator_raises(stub: EchoStub, server: Server) -> Any:
    async def failing() -> Any:
        yield Request(text="a")
        raise ValueError("mine")

    call = stub.Chat(failing())
    seen: list[Any] = []
    result = await outcome(numbers(call, seen))
    return result, await end_of(call)


@pytest.mark.parametrize("run", SCENARIOS, ids=lambda function: function.__name__)
async def test_same_as_grpc(run: Scenario, serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    async with grpc.aio.insecure_channel(server.address) as native:
        expected = await run(EchoStub(native), server)
    server.calls.clear()
    # Retries would only hide what the server says; those are another test's subject.
    channel = await channel_to([server], retry=None)
    assert await run(EchoStub(channel), server) == expected
