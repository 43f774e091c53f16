"""Another endpoint after a failure, for each kind of call: when, when not, and what the caller sees."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlb import NoEndpoints, Retry
from meshlb._proto.echo_pb2_grpc import EchoStub
from tests.grpc.aio.servers import Request, Server, unused_address
from tests.grpc.aio.test_contract import outcome, texts
from tests.support.wait import eventually_async

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
IDEMPOTENT = Retry(idempotent_methods=("/meshlb.demo.v1.Echo/*",))
Run = Callable[[EchoStub], Awaitable[Any]]


async def say(stub: EchoStub) -> Any:
    return (await stub.Say(Request(text="a"))).text


async def put(stub: EchoStub) -> Any:
    return (await stub.Put(Request(text="a"))).text


async def watch(stub: EchoStub) -> Any:
    return "".join([reply.text async for reply in stub.Watch(Request(text="a"))])


async def watch_read(stub: EchoStub) -> Any:
    call = stub.Watch(Request(text="a"))
    return (await call.read()).text + str(await call.read() is grpc.aio.EOF)


async def collect_async_iterator(stub: EchoStub) -> Any:
    return (await stub.Collect(texts("a", "b"))).text


async def collect_iterator(stub: EchoStub) -> Any:
    return (await stub.Collect(iter([Request(text="a"), Request(text="b")]))).text


async def collect_write(stub: EchoStub) -> Any:
    call = stub.Collect()
    for text in "ab":
        await call.write(Request(text=text))
    await call.done_writing()
    return (await call).text


async def collect_nothing(stub: EchoStub) -> Any:
    call = stub.Collect()
    await call.done_writing()
    return (await call).text + (await stub.Collect(())).text


async def connect_first(stub: EchoStub) -> Any:
    call = stub.Chat()
    await call.wait_for_connection()
    await call.done_writing()
    return await call.read() is grpc.aio.EOF


async def chat(stub: EchoStub) -> Any:
    call = stub.Chat()
    await call.write(Request(text="a"))
    first = (await call.read()).text
    await call.write(Request(text="b"))
    await call.done_writing()
    return first + (await call.read()).text + str(await call.read() is grpc.aio.EOF)


async def chat_iterator(stub: EchoStub) -> Any:
    return "".join([reply.text async for reply in stub.Chat(texts("a", "b"))])


RUNS = [say, put, watch, watch_read, collect_async_iterator, collect_iterator, collect_write, chat, chat_iterator]
ANSWERS = dict(zip(RUNS, ["a", "a", "a", "aTrue", "a b", "a b", "a b", "abTrue", "ab"], strict=True))
with_all_of_it = pytest.mark.parametrize("run", [*RUNS, collect_nothing, connect_first], ids=lambda run: run.__name__)
ANSWERS |= {collect_nothing: "", connect_first: True}
all_kinds = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)


class Dead(Server):
    """An endpoint that refuses connections."""

    @property
    def address(self) -> str:
        return self._address

    def __init__(self) -> None:
        super().__init__("dead")
        self._address = unused_address()


@with_all_of_it
async def test_a_refused_connection_is_nobodys_concern(run: Run, serve: Any, channel_to: Any) -> None:
    """Nothing was sent, so every kind of call goes elsewhere, idempotent or not."""
    (server,) = await serve()
    stub = EchoStub(await channel_to([Dead(), server, Dead()], breaker=None))
    assert [await run(stub) for _ in range(4)] == [ANSWERS[run]] * 4


@all_kinds
async def test_unavailable_before_the_answer(run: Run, serve: Any, channel_to: Any) -> None:
    bad, good = await serve(2)
    bad.code, bad.details = UNAVAILABLE, "shutting down"
    stub = EchoStub(await channel_to([bad, good], retry=IDEMPOTENT, breaker=None))
    assert [await run(stub) for _ in range(3)] == [ANSWERS[run]] * 3
    assert bad.calls  # the bad one was met, and hidden


@all_kinds
async def test_not_again_if_it_may_do_harm(run: Run, serve: Any, channel_to: Any) -> None:
    bad, good = await serve(2)
    bad.code, bad.details = UNAVAILABLE, "shutting down"
    stub = EchoStub(await channel_to([bad, good], breaker=None))
    results = [await outcome(run(stub)) for _ in range(4)]
    if run is say:  # its .proto says that it has no side effects
        assert results == ["a"] * 4
    else:
        assert results.count(ANSWERS[run]) == 2
        failed = {result[1] for result in results if isinstance(result, tuple)}
        # A message that is being written when the status comes: grpc.aio forgets the status.
        assert failed <= {UNAVAILABLE, grpc.StatusCode.INTERNAL}


@all_kinds
async def test_the_last_error_is_grpcs_own(run: Run, serve: Any, channel_to: Any) -> None:
    servers = await serve(2)
    for server in servers:
        server.code, server.details, server.trailers = UNAVAILABLE, "down", (("x-tail", "1"),)
    stub = EchoStub(await channel_to(servers, retry=IDEMPOTENT, breaker=None))
    expected = [("AioRpcError", UNAVAILABLE, "down", (("x-tail", "1"),))]
    if run not in (say, put, watch, watch_read):  # as above: a message was being written
        expected += [("AioRpcError", grpc.StatusCode.INTERNAL, "Internal error from Core", ())]
    assert await outcome(run(stub)) in expected
    assert sum(sum(server.calls.values()) for server in servers) == 3  # max_attempts


async def test_retries_can_be_switched_off(serve: Any, channel_to: Any) -> None:
    bad, good = await serve(2)
    bad.code = UNAVAILABLE
    stub = EchoStub(await channel_to([bad, good], retry=None, breaker=None))
    results = [await outcome(stub.Say(Request(text="a"))) for _ in range(4)]
    assert results.count("a") == 2


class Seen(grpc.aio.UnaryUnaryClientInterceptor):
    """Notes the metadata of each attempt: grpc's servers do not show this one to handlers."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        self.metadata.append(dict(client_call_details.metadata))
        return await continuation(client_call_details, request)


async def test_attempts_say_how_many_came_before(serve: Any, channel_to: Any) -> None:
    servers = await serve(3)
    for server in servers:
        server.code = UNAVAILABLE
    seen = Seen()
    stub = EchoStub(await channel_to(servers, {"attempt_interceptors": [seen]}, breaker=None))
    await outcome(stub.Say(Request(), metadata=(("x-own", "1"),)))
    assert seen.metadata == [
        {"x-own": "1"},
        {"x-own": "1", "grpc-previous-rpc-attempts": "1", "meshlb-previous-attempts": "1"},
        {"x-own": "1", "grpc-previous-rpc-attempts": "2", "meshlb-previous-attempts": "2"},
    ]


async def test_metadata_from_an_iterator(serve: Any, channel_to: Any) -> None:
    bad, good = await serve(2)
    bad.code = UNAVAILABLE
    stub = EchoStub(await channel_to([bad, good], breaker=None))
    for _ in range(2):
        reply = await stub.Say(Request(), metadata=(pair for pair in [("x-own", "1")]))
        assert reply.metadata["x-own"] == "1"


async def test_a_stream_that_was_read_from_is_not_begun_again(serve: Any, channel_to: Any) -> None:
    servers = await serve(2)
    stub = EchoStub(await channel_to(servers, retry=IDEMPOTENT))
    call = stub.Watch(Request(count=3, fail_code=14, fail_details="broke", fail_after=1))
    assert (await call.read()).sequence == 0
    assert await outcome(call.read()) == ("AioRpcError", UNAVAILABLE, "broke", ())
    assert sum(server.calls["Watch"] for server in servers) == 1


async def test_a_stream_whose_metadata_was_seen_is_not_begun_again(serve: Any, channel_to: Any) -> None:
    servers = await serve(2)
    stub = EchoStub(await channel_to(servers, retry=IDEMPOTENT))
    call = stub.Watch(Request(text="head", delay_seconds=0.05, fail_code=14, fail_details="broke"))
    assert dict(await call.initial_metadata())["x-head"] == "1"
    assert await outcome(call.read()) == ("AioRpcError", UNAVAILABLE, "broke", ())
    assert sum(server.calls["Watch"] for server in servers) == 1


async def test_everything_written_is_replayed(serve: Any, channel_to: Any) -> None:
    """The failing endpoint takes several messages before it fails; the next one is given all of them."""
    servers = await serve(2)
    channel = await channel_to(servers, retry=IDEMPOTENT, breaker=None)
    call = EchoStub(channel).Collect()
    for number in range(20):
        await call.write(Request(text=str(number)))
    await eventually_async(lambda: any(server.calls for server in servers))
    first = next(server for server in servers if server.calls)
    await first.stop()
    await call.write(Request(text="last"))
    await call.done_writing()
    reply = await call
    assert reply.text.split() == [*map(str, range(20)), "last"]
    assert reply.backend != first.id


async def test_a_chat_is_replayed_until_it_was_answered(serve: Any, channel_to: Any) -> None:
    servers = await serve(2)
    channel = await channel_to(servers, retry=IDEMPOTENT, breaker=None)
    for server in servers:
        server.hang = True
    call = EchoStub(channel).Chat()
    await call.write(Request(text="a"))
    await eventually_async(lambda: any(server.calls for server in servers))
    first, second = sorted(servers, key=lambda server: not server.calls)
    second.hang = False
    reading = asyncio.ensure_future(call.read())
    await call.write(Request(text="b"))
    await first.stop()
    assert (await reading).backend == second.id
    await call.done_writing()
    assert (await call.read()).text == "b"


async def test_more_than_can_be_remembered_is_not_replayed(serve: Any, channel_to: Any) -> None:
    servers = await serve(2)
    channel = await channel_to(servers, retry=IDEMPOTENT, breaker=None)
    call = EchoStub(channel).Collect()
    for _ in range(10):
        await call.write(Request(text="x" * 40_000))
    await eventually_async(lambda: any(server.calls for server in servers))
    first = next(server for server in servers if server.calls)
    await first.stop()
    await call.done_writing()
    result = await outcome(call)
    assert result[0] == "AioRpcError"
    assert sum(server.calls["Collect"] for server in servers) == 1


async def test_pushback_is_honoured(serve: Any, channel_to: Any) -> None:
    bad, good = await serve(2)
    bad.code, bad.trailers = UNAVAILABLE, (("grpc-retry-pushback-ms", "-1"),)
    stub = EchoStub(await channel_to([bad, good], breaker=None))
    results = [await outcome(stub.Say(Request(text="a"))) for _ in range(4)]
    assert results.count("a") == 2
    bad.trailers = (("grpc-retry-pushback-ms", "10"),)
    assert [await outcome(stub.Say(Request(text="a"))) for _ in range(4)] == ["a"] * 4


async def test_a_call_between_two_attempts(serve: Any, channel_to: Any) -> None:
    """While the next attempt is waited for, the call is neither done nor deaf."""
    (server,) = await serve()
    server.code, server.trailers = UNAVAILABLE, (("grpc-retry-pushback-ms", "20000"),)
    channel = await channel_to([server], retry=IDEMPOTENT, breaker=None)
    stub = EchoStub(channel)
    call = stub.Say(Request())
    called: list[Any] = []
    call.add_done_callback(called.append)
    waiting = asyncio.ensure_future(outcome(call))
    asking = asyncio.ensure_future(call.code())
    await eventually_async(lambda: channel.cluster.nodes[0].failures)
    assert (call.done(), call.cancelled(), waiting.done(), asking.done(), called) == (False,) * 4 + ([],)
    assert call.cancel()
    assert await waiting == ("CancelledError", "")
    assert (call.done(), call.cancelled(), await asking, called) == (True, True, grpc.StatusCode.CANCELLED, [call])
    assert await call.details() == "Locally cancelled by application!"
    assert not await call.trailing_metadata()
    # The task that awaits it is cancelled in between.
    other = stub.Watch(Request())
    reading = asyncio.ensure_future(other.read())
    await eventually_async(lambda: channel.cluster.nodes[0].failures == 2)
    reading.cancel()
    await asyncio.wait({reading})
    assert reading.cancelled()
    assert other.cancelled()


async def test_a_retry_strategy_that_raises(serve: Any, channel_to: Any, caplog: Any) -> None:
    (server,) = await serve()
    server.code, server.details = UNAVAILABLE, "down"

    def wait(state: Any) -> float:
        raise ValueError("mine")

    stub = EchoStub(await channel_to([server], retry=Retry(wait=wait), breaker=None))
    assert (await outcome(stub.Say(Request())))[:3] == ("AioRpcError", UNAVAILABLE, "down")
    assert "mine" in caplog.text


# -- time ----------------------------------------------------------------------------------------------------------


@all_kinds
async def test_per_try_timeout_leaves_a_hung_endpoint(run: Run, serve: Any, channel_to: Any) -> None:
    hung, good = await serve(2)
    hung.hang = True
    retry = Retry(idempotent_methods=IDEMPOTENT.idempotent_methods, per_try_timeout=0.1)
    stub = EchoStub(await channel_to([hung, good], retry=retry, breaker=None))
    if run is chat:
        return  # it waits for an answer before its request is complete, so nothing limits the attempt
    assert [await run(stub) for _ in range(2)] == [ANSWERS[run]] * 2
    assert sum(hung.calls.values())


async def test_per_try_timeout_of_the_last_attempt(serve: Any, channel_to: Any) -> None:
    servers = await serve(2)
    for server in servers:
        server.hang = True
    retry = Retry(idempotent_methods=IDEMPOTENT.idempotent_methods, per_try_timeout=0.05, max_attempts=2)
    stub = EchoStub(await channel_to(servers, retry=retry, breaker=None))
    for call in (stub.Say(Request()), stub.Collect(texts("a"))):
        with pytest.raises(grpc.aio.AioRpcError, match="Deadline Exceeded") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stream = stub.Watch(Request())
    with pytest.raises(grpc.aio.AioRpcError, match="per_try_timeout"):
        await stream.read()


async def test_a_long_stream_outlives_per_try_timeout(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    stub = EchoStub(await channel_to([server], retry=Retry(per_try_timeout=0.1)))
    seen = [reply.sequence async for reply in stub.Watch(Request(count=5, interval_seconds=0.05))]
    assert seen == [0, 1, 2, 3, 4]


async def test_the_deadline_spans_all_attempts(serve: Any, channel_to: Any) -> None:
    servers = await serve(3)
    for server in servers:
        server.hang = True
    retry = Retry(per_try_timeout=0.1, max_attempts=100, budget=None)
    stub = EchoStub(await channel_to(servers, retry=retry, breaker=None))
    loop = asyncio.get_running_loop()
    started = loop.time()
    call = stub.Say(Request(), timeout=0.35)
    assert 0 < call.time_remaining() <= 0.35
    result = await outcome(call)
    assert result[:2] == ("AioRpcError", grpc.StatusCode.DEADLINE_EXCEEDED)
    assert loop.time() - started >= 0.15  # more than one attempt's time
    assert sum(server.calls["Say"] for server in servers) >= 2


@pytest.mark.parametrize("timeout", [0, -1, -0.5])
async def test_no_time_at_all(timeout: float, serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    stub = EchoStub(await channel_to([server]))
    for call in (
        stub.Say(Request(), timeout=timeout),
        stub.Collect(texts("a"), timeout=timeout),
        stub.Watch(Request(), timeout=timeout),
        stub.Chat(timeout=timeout),
    ):
        result = await outcome(call.read() if hasattr(call, "read") else call)
        assert result[1] is grpc.StatusCode.DEADLINE_EXCEEDED
        assert call.done()
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not server.calls


async def test_the_configured_timeout(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    stub = EchoStub(await channel_to([server], timeout=0.1, breaker=None))
    for timeout in (None, 60):
        result = await outcome(stub.Say(Request(text="hang"), timeout=timeout))
        assert result[:2] == ("AioRpcError", grpc.StatusCode.DEADLINE_EXCEEDED)
    assert stub.Say(Request(text="hang"), timeout=0.05).time_remaining() <= 0.05
    # Of a stream it limits the time to the first message.
    for call in (stub.Watch(Request(text="hang")), stub.Chat(texts("hang")), stub.Chat()):
        assert call.time_remaining() is None
        result = await outcome(call.read())
        assert result[:2] == ("AioRpcError", grpc.StatusCode.DEADLINE_EXCEEDED)
        assert "the configured timeout (0.1 s)" in result[2]
    call = stub.Watch(Request(count=4, interval_seconds=0.05), timeout=60)
    assert call.time_remaining() > 50
    assert [reply.sequence async for reply in call] == [0, 1, 2, 3]


# -- nobody to call ------------------------------------------------------------------------------------------------


async def test_nobody_to_call(channel_to: Any) -> None:
    stub = EchoStub(await channel_to_nobody(channel_to))
    call = stub.Say(Request())
    with pytest.raises(NoEndpoints, match="the registry knows no instance") as caught:
        await call
    assert isinstance(caught.value, grpc.aio.AioRpcError)
    assert caught.value.code() is UNAVAILABLE
    assert await call.code() is UNAVAILABLE
    assert "registry" in await call.details()
    with pytest.raises(NoEndpoints):
        await stub.Watch(Request()).read()
    with pytest.raises(NoEndpoints):
        await stub.Collect(texts("a"))
    writing = stub.Chat()
    with pytest.raises(NoEndpoints):
        await writing.write(Request())
    with pytest.raises(NoEndpoints):
        await stub.Say(Request()).wait_for_connection()


async def channel_to_nobody(channel_to: Any) -> Any:
    from meshlb.discovery import StaticDiscovery

    channel = await channel_to([Dead()])
    discovery = channel.mesh.discovery
    assert isinstance(discovery, StaticDiscovery)
    channel.cluster.update([])
    return channel


# -- wait_for_ready ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["say", "watch", "collect", "chat"])
async def test_wait_for_ready_waits_for_a_server(run: str, channel_to: Any) -> None:
    late = Server("late")
    async with late:
        pass  # now it has a port
    channel = await channel_to([late])
    stub = EchoStub(channel)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "say": lambda: stub.Say(Request(text="a"), wait_for_ready=True, timeout=30),
        "watch": lambda: stub.Watch(Request(text="a"), wait_for_ready=True, timeout=30).read(),
        "collect": lambda: stub.Collect(texts("a"), wait_for_ready=True, timeout=30),
        "chat": lambda: stub.Chat(texts("a"), wait_for_ready=True, timeout=30).read(),
    }
    waiting = asyncio.ensure_future(calls[run]())
    await eventually_async(lambda: channel.cluster.nodes[0].failures >= 2)
    assert not waiting.done()
    async with late:
        assert (await waiting).text == "a"
        await channel.close()


async def test_wait_for_ready_waits_for_an_instance(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    channel = await channel_to([server])
    nodes = [node.endpoint for node in channel.cluster.nodes]
    channel.cluster.update([])
    call = EchoStub(channel).Say(Request(text="a"), wait_for_ready=True)
    await asyncio.sleep(0)
    assert not call.done()
    channel.cluster.update(nodes)
    assert (await call).text == "a"


async def test_wait_for_ready_ends_with_the_deadline(channel_to: Any) -> None:
    stub = EchoStub(await channel_to([Dead()]))
    result = await outcome(stub.Say(Request(), wait_for_ready=True, timeout=0.2))
    assert result[:2] == ("AioRpcError", grpc.StatusCode.DEADLINE_EXCEEDED)
    empty = EchoStub(await channel_to_nobody(channel_to))
    result = await outcome(empty.Say(Request(), wait_for_ready=True, timeout=0.1))
    assert result[:2] == ("AioRpcError", grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_wait_for_ready_can_be_cancelled(channel_to: Any) -> None:
    channel = await channel_to([Dead()])
    call = EchoStub(channel).Say(Request(), wait_for_ready=True)
    await eventually_async(lambda: channel.cluster.nodes[0].failures >= 1)
    assert call.cancel()
    assert await outcome(call) == ("CancelledError", "")


async def test_wait_for_ready_does_not_wait_for_a_failing_server(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    server.code, server.details = UNAVAILABLE, "no"
    stub = EchoStub(await channel_to([server], retry=None))
    assert (await outcome(stub.Say(Request(), wait_for_ready=True)))[1] is UNAVAILABLE
