"""Streams beyond what the contract says: the endpoint goes while they are read or written, silence, interceptors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from meshlb import DeadlineExceeded, Retry
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.grpc._idempotency import is_declared
from tests.grpc.aio.conftest import in_flight
from tests.grpc.aio.servers import Request, Server
from tests.grpc.aio.test_contract import outcome, texts
from tests.grpc.aio.test_retry import ANSWERS, Dead, Run, all_kinds
from tests.support.wait import eventually_async

ANY = Retry(idempotent_methods=("*",))


@contextmanager
def silent() -> Iterator[Server]:
    """An endpoint whose kernel takes connections, where nobody speaks."""
    server = Server("silent")
    with socket.create_server((server.host, 0)) as listener:
        server.port = listener.getsockname()[1]
        yield server


class Requests:
    """An iterator of requests that notes what it is made to see."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.cancellations = 0
        self.given: list[str] = []

    async def __aiter__(self) -> AsyncIterator[Request]:
        for text in self.texts:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                self.cancellations += 1
                raise
            task = asyncio.current_task()
            assert task is not None
            self.cancellations += task.cancelling()
            self.given.append(text)
            yield Request(text=text)


def leave(channel: Any, *others: Server) -> None:
    """Replace the endpoints of the service by these; with drain_timeout 0 their calls are cut at once."""
    kind = type(channel.cluster.nodes[0].endpoint)
    channel.cluster.update([kind(server.host, server.port) for server in others])


# -- the request, before there is a connection ---------------------------------------------------------------------


async def test_an_iterator_goes_on_with_another_endpoint(serve: Any, channel_to: Any) -> None:
    (good,) = await serve()
    with silent() as first, silent() as second:
        channel = await channel_to([first], drain_timeout=0.0, connect_timeout=30.0, retry=ANY)
        requests = Requests("a", "b", "c")
        call = EchoStub(channel).Collect(requests)
        for others in ([second], [good]):
            await eventually_async(lambda: requests.given and in_flight(channel.mesh) == 1)
            leave(channel, *others)
            await eventually_async(lambda others=others: call._lease.endpoint.port == others[0].port)
        assert (await asyncio.wait_for(call, 20)).text == "a b c"
        assert requests.cancellations == 0
        assert good.calls == {"Collect": 1}


@pytest.mark.parametrize("kind", ["Collect", "Chat"])
async def test_an_iterator_ends_with_its_call(kind: str, channel_to: Any) -> None:
    """grpc.aio would let it wait for ever."""
    with silent() as server:
        channel = await channel_to([server], drain_timeout=0.0, connect_timeout=30.0, retry=None)
        requests = Requests("a", "b")
        call = getattr(EchoStub(channel), kind)(requests)
        await eventually_async(lambda: requests.given)
        leave(channel)
        result = await outcome(call if kind == "Collect" else call.read())
        assert result[:2] == ("AioRpcError", grpc.StatusCode.UNAVAILABLE)
        assert "closed under the call" in result[2]
        await eventually_async(call._consumer.done)
        assert (requests.given, requests.cancellations) == (["a"], 0)
        assert not call._consumer.cancelled()


@pytest.mark.parametrize("kind", ["Collect", "Chat"])
async def test_a_call_is_cancelled_before_its_connection(kind: str, channel_to: Any) -> None:
    with silent() as server:
        channel = await channel_to([server], connect_timeout=30.0)
        requests = Requests("a", "b")
        call = getattr(EchoStub(channel), kind)(requests)
        await eventually_async(lambda: requests.given)
        assert call.cancel()
        assert await outcome(call if kind == "Collect" else call.read()) == ("CancelledError", "")
        await eventually_async(call._consumer.done)
        assert requests.given == ["a"]


# -- the request, with one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("idempotent", [True, False])
async def test_a_long_request(idempotent: bool, serve: Any, channel_to: Any) -> None:
    """Messages of a method that is not idempotent are not remembered once a connection has one."""
    servers = await serve(2)
    channel = await channel_to(servers, retry=ANY if idempotent else Retry())
    stub = EchoStub(channel)
    many = [str(number) for number in range(100)]
    for requests in (Requests(*many), [Request(text=text) for text in many]):
        call = stub.Collect(requests)
        assert (await call).text == " ".join(many)
        assert (call._last is None) is idempotent
        assert len(call._log or ()) == (100 if idempotent else 0)
    assert [reply.text async for reply in stub.Chat(Requests(*many))] == many


async def test_what_is_written_after_the_answer_has_begun(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    call = EchoStub(await channel_to([server], retry=ANY)).Chat()
    for text in "abc":
        await call.write(Request(text=text))
        assert (await call.read()).text == text
    assert call._log is None  # no other endpoint can take over, so nothing is remembered
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


# -- the response --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Watch", "Chat"])
async def test_an_endpoint_is_gone_while_its_stream_is_iterated(kind: str, serve: Any, channel_to: Any) -> None:
    """It is no cancellation of the task that iterates."""
    (server,) = await serve()
    channel = await channel_to([server], drain_timeout=0.0)
    stub = EchoStub(channel)
    seen: list[str] = []
    call = stub.Watch(Request(text="a", count=2, interval_seconds=60)) if kind == "Watch" else stub.Chat(slowly("a"))

    async def iterate() -> None:
        async for reply in call:
            seen.append(reply.text)  # noqa: PERF401 - what came before the error counts

    iterating = asyncio.ensure_future(outcome(iterate()))
    await eventually_async(lambda: seen)
    leave(channel)
    result = await iterating
    assert result[:2] == ("AioRpcError", grpc.StatusCode.UNAVAILABLE)
    assert "closed under the call" in result[2]
    await iterate()  # it has ended
    assert seen == ["a"]


async def slowly(text: str) -> AsyncIterator[Request]:
    yield Request(text=text)
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("iterated", [True, False])
async def test_silence(iterated: bool, serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    stub = EchoStub(await channel_to([server], stream_idle_timeout=0.2, breaker=None))

    async def next_of(call: Any) -> Any:
        return await anext(aiter(call)) if iterated else await call.read()

    call = stub.Watch(Request(count=2, interval_seconds=60))
    assert (await next_of(call)).sequence == 0
    with pytest.raises(DeadlineExceeded, match="stream_idle_timeout"):
        await next_of(call)
    # The time between two reads is the reader's.
    call = stub.Watch(Request(count=2))
    assert (await next_of(call)).sequence == 0
    await asyncio.sleep(0.5)
    assert (await next_of(call)).sequence == 1


async def test_a_limited_stream_is_broken_off_and_resumed(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    call = EchoStub(await channel_to([server], stream_idle_timeout=60.0)).Watch(Request(count=4))
    seen = []
    for _ in range(3):
        async for reply in call:
            seen.append(reply.sequence)
            break
    assert seen + [reply.sequence async for reply in call] == [0, 1, 2, 3]


# -- attempt interceptors ------------------------------------------------------------------------------------------


class PassUnary(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(client_call_details, request)


class PassWatch(grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(client_call_details, request)


class PassCollect(grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(client_call_details, request_iterator)


class PassChat(grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(client_call_details, request_iterator)


@all_kinds
async def test_attempt_interceptors_change_nothing(run: Run, serve: Any, channel_to: Any) -> None:
    bad, good = await serve(2)
    bad.code, bad.details = grpc.StatusCode.UNAVAILABLE, "shutting down"
    passing = {"attempt_interceptors": [PassUnary(), PassWatch(), PassCollect(), PassChat()]}
    stub = EchoStub(await channel_to([Dead(), bad, good], passing, retry=ANY, breaker=None))
    assert [await run(stub) for _ in range(3)] == [ANSWERS[run]] * 3
    # With an interceptor a task of grpc.aio's waits for further messages of a call that is written to, even if that has
    # failed (so it does on grpc's own channel): it would be found when the loop is closed.
    left = [task for task in asyncio.all_tasks() if "_consume_request_iterator" in repr(task.get_coro())]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


# -- what is declared of a method ----------------------------------------------------------------------------------


async def test_a_method_is_declared_after_its_first_call(serve: Any, channel_to: Any) -> None:
    (server,) = await serve()
    channel = await channel_to([server])
    method = channel.unary_unary("/meshlb.test.aio.Late/Get")
    assert not method.idempotent
    assert not is_declared(method.path)
    file = descriptor_pb2.FileDescriptorProto(name="meshlb_test_aio_late.proto", package="meshlb.test.aio")
    file.message_type.add(name="Nothing")
    late = file.service.add(name="Late").method.add(
        name="Get", input_type=".meshlb.test.aio.Nothing", output_type=".meshlb.test.aio.Nothing"
    )
    late.options.idempotency_level = descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
    descriptor_pool.Default().Add(file)
    assert method.idempotent
    assert is_declared(method.path)
    put = channel.unary_unary("/meshlb.demo.v1.Echo/Put")
    assert not put.idempotent
    assert put._idempotent is False  # which it stays: nothing of it is looked up again


async def test_a_request_from_a_generator_that_calls(serve: Any, channel_to: Any) -> None:
    """An error of a call that the iterator makes is the iterator's, not this call's."""
    (server,) = await serve()
    stub = EchoStub(await channel_to([server], retry=None))

    async def failing(*before: str) -> AsyncIterator[Request]:
        async for request in texts(*before):
            yield request
        await stub.Put(Request(fail_code=3, fail_details="mine"))

    for before in ((), ("a",), ("a", "b")):
        call = stub.Collect(failing(*before))
        assert await outcome(call) == ("CancelledError", "")
        assert call.cancelled()
