"""A failed attempt goes on elsewhere, where that is safe: all four kinds, blocking and not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import tenacity

from meshlb import Breaker, Retry, RetryBudget
from meshlb._proto import echo_pb2_grpc
from tests.grpc.sync.conftest import ChannelTo, Serve
from tests.grpc.sync.servers import Request, refusing_address
from tests.support.wait import eventually

Code = grpc.StatusCode
ALL_IDEMPOTENT = Retry(max_attempts=3, budget=None, idempotent_methods=("/meshlb.demo.v1.Echo/*",))

# Each makes one call and returns the ids of the servers that its replies come from.
CALLS: dict[str, Callable[[Any, Request], list[str]]] = {
    "say": lambda stub, request: [stub.Say(request, timeout=10).backend],
    "say with call": lambda stub, request: [stub.Say.with_call(request, timeout=10)[0].backend],
    "say future": lambda stub, request: [stub.Say.future(request, timeout=10).result(10).backend],
    "watch": lambda stub, request: [reply.backend for reply in stub.Watch(request, timeout=10)],
    "collect": lambda stub, request: [stub.Collect(iter([Request(text="first"), request]), timeout=10).backend],
    "collect future": lambda stub, request: [
        stub.Collect.future(iter([Request(text="first"), request]), timeout=10).result(10).backend
    ],
    "chat": lambda stub, request: [reply.backend for reply in stub.Chat(iter([request, request]), timeout=10)],
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def stub_of(channel: Any) -> Any:
    return echo_pb2_grpc.EchoStub(channel)


@every_call
def test_refused_connections_are_never_seen(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    good = serve(1)
    # Put, Collect, Chat and Watch are not declared idempotent: nothing was sent, so that does not matter.
    stub = stub_of(channel_to([refusing_address(), *good, refusing_address()], breaker=None))
    assert {id for _ in range(6) for id in call(stub, Request(text="x"))} == {"s0"}


@every_call
def test_failures_are_never_seen_by_idempotent_calls(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    servers[0].code = servers[1].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    assert {id for _ in range(6) for id in call(stub, Request(text="x"))} == {"s2"}
    assert servers[0].total + servers[1].total >= 6


@every_call
def test_a_request_that_may_have_been_processed_is_not_repeated(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    for server in servers:
        server.code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None))
    stub.Say = stub.Put  # Say is declared to have no side effects
    with pytest.raises(grpc.RpcError) as raised:
        call(stub, Request())
    assert raised.value.code() is Code.UNAVAILABLE
    assert raised.value.details() == "told to fail"
    assert sum(server.total for server in servers) == 1


@every_call
def test_the_last_native_error_is_what_the_caller_gets(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(4)
    for server in servers:
        server.code, server.trailers = Code.UNAVAILABLE, (("x-server", server.id),)
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    with pytest.raises(grpc.RpcError) as raised:
        call(stub, Request())
    assert type(raised.value).__module__ == "grpc._channel"  # gRPC's own, untouched
    assert raised.value.code() is Code.UNAVAILABLE
    [last] = [server for server in servers if ("x-server", server.id) in raised.value.trailing_metadata()]
    assert sum(server.total for server in servers) == 3
    assert last.total == 1
    assert "attempt 3" in raised.value.__notes__[0]
    assert last.address in raised.value.__notes__[0]


def test_declared_idempotency_is_enough(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None))
    assert {stub.Say(Request(), timeout=5).backend for _ in range(4)} == {"s1"}


def test_without_retry_the_first_error_is_the_callers(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=None))
    codes = [stub.Say.future(Request(), timeout=5).code() for _ in range(4)]
    assert sorted(code.name for code in codes) == ["OK", "OK", "UNAVAILABLE", "UNAVAILABLE"]


def test_not_every_code_is_worth_a_retry(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    for code in (Code.INTERNAL, Code.NOT_FOUND, Code.UNKNOWN, Code.ABORTED):
        with pytest.raises(grpc.RpcError):
            stub.Say(Request(fail_code=code.value[0]), timeout=5)
    assert sum(server.total for server in servers) == 4


@every_call
def test_attempts_say_how_many_came_before(call: Any, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    servers[0].code = servers[1].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    seen: set[str | None] = set()

    def all_seen() -> bool:
        call(stub, Request(text="x"))
        seen.update(sent.get("meshlb-previous-attempts") for server in servers for sent in server.metadata)
        return seen == {None, "1", "2"}

    eventually(all_seen)


def test_grpcs_own_name_for_it_arrives_if_cores_retries_are_off(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, options=[("grpc.enable_retries", 0)]))
    for _ in range(2):
        stub.Say(Request(), timeout=5)
    assert "1" in [sent.get("grpc-previous-rpc-attempts") for sent in servers[1].metadata]


def test_the_callers_metadata_are_sent_with_each_attempt_unchanged(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    servers[0].code = servers[1].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    metadata = [("x-a", "1"), ("x-b-bin", b"\x00")]
    for _ in range(3):
        stub.Say(Request(), timeout=5, metadata=metadata)
        stub.Say.future(Request(), timeout=5, metadata=iter(metadata)).result()
    assert metadata == [("x-a", "1"), ("x-b-bin", b"\x00")]
    sent = [headers for server in servers for headers in server.metadata]
    assert all((headers["x-a"], headers["x-b-bin"]) == ("1", b"\x00") for headers in sent)


# -- hints and budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "attempts"), [(("0",), 3), (("-1",), 1), (("later",), 1), ((), 3), (("100000000",), 1)]
)
@pytest.mark.parametrize("kind", ["say", "say future", "watch", "collect"])
def test_pushback(values: tuple[str, ...], attempts: int, kind: str, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    for server in servers:
        server.code = Code.UNAVAILABLE
        server.trailers = tuple(("grpc-retry-pushback-ms", value) for value in values)
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    with pytest.raises(grpc.RpcError):
        CALLS[kind](stub, Request())
    assert sum(server.total for server in servers) == attempts


@pytest.mark.parametrize("kind", ["say", "say future", "watch"])
def test_a_hint_beyond_the_deadline_ends_the_call_at_once(kind: str, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    for server in servers:
        server.code, server.trailers = Code.UNAVAILABLE, (("grpc-retry-pushback-ms", "20000"),)
    stub = stub_of(channel_to(servers, breaker=None))
    with pytest.raises(grpc.RpcError) as raised:
        CALLS[kind](stub, Request())
    assert raised.value.code() is Code.UNAVAILABLE
    assert sum(server.total for server in servers) == 1


def test_an_empty_budget_ends_retries(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    for server in servers:
        server.code = Code.UNAVAILABLE
    budget = RetryBudget(ratio=0.0, min_per_second=0.2, ttl=10.0)
    stub = stub_of(channel_to(servers, breaker=None, retry=Retry(max_attempts=2, budget=budget)))
    for _ in range(10):
        with pytest.raises(grpc.RpcError):
            stub.Say(Request(), timeout=5)
    assert 10 < sum(server.total for server in servers) <= 13


def test_a_strategy_that_raises_costs_the_retry_alone(serve: Serve, channel_to: ChannelTo) -> None:
    def broken(state: Any) -> float:
        raise ZeroDivisionError

    servers = serve(1)
    servers[0].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=Retry(wait=broken)))
    for call in (CALLS["say"], CALLS["say future"]):
        with pytest.raises(grpc.RpcError) as raised:
            call(stub, Request())
        assert raised.value.details() == "told to fail"


def test_tenacity_waits_between_attempts_on_the_same_endpoint(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    servers[0].code = Code.UNAVAILABLE
    retry = Retry(max_attempts=4, wait=tenacity.wait_none())
    stub = stub_of(channel_to(servers, breaker=None, retry=retry))
    for call in (CALLS["say"], CALLS["say future"]):
        with pytest.raises(grpc.RpcError):
            call(stub, Request())
    assert servers[0].total == 8


# -- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CALLS)
def test_per_try_timeout_leaves_a_server_that_hangs(kind: str, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].hang = True
    retry = Retry(per_try_timeout=0.15, idempotent_methods=("/meshlb.demo.v1.Echo/*",))
    stub = stub_of(channel_to(servers, breaker=None, retry=retry))
    assert {id for _ in range(2) for id in CALLS[kind](stub, Request(text="x"))} == {"s1"}
    assert servers[0].total >= 1


def test_per_try_timeout_does_not_end_a_stream_that_has_begun(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    retry = Retry(per_try_timeout=0.2, idempotent_methods=("/meshlb.demo.v1.Echo/*",))
    stub = stub_of(channel_to(servers, breaker=None, retry=retry, timeout=0.2))
    replies = list(stub.Watch(Request(count=4, interval_seconds=0.15)))
    assert [reply.sequence for reply in replies] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["say", "say future", "collect"])
def test_the_deadline_is_the_calls_not_the_attempts(kind: str, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    for server in servers:
        server.hang = True
    retry = Retry(per_try_timeout=0.2, idempotent_methods=("/meshlb.demo.v1.Echo/*",))
    stub = stub_of(channel_to(servers, breaker=None, retry=retry, timeout=0.3))
    with pytest.raises(grpc.RpcError) as raised:
        CALLS[kind](stub, Request(text="x"))  # its timeout of 10 s is above the configured one
    assert raised.value.code() is Code.DEADLINE_EXCEEDED
    assert sum(server.total for server in servers) == 2  # the second attempt had 0.1 s left, and there was no third


def test_no_response_in_time_ends_a_stream(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    servers[0].hang = True
    stub = stub_of(channel_to(servers, breaker=None, timeout=0.15))
    call = stub.Watch(Request())
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    assert raised.value.code() is Code.DEADLINE_EXCEEDED
    assert call.code() is Code.DEADLINE_EXCEEDED
    assert call.done()


# -- streams -------------------------------------------------------------------------------------------------------


def test_a_response_that_was_seen_is_never_followed_by_another_attempt(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    call = stub.Watch(Request(count=3, fail_code=14, fail_after=2), timeout=5)
    assert [next(call).sequence, next(call).sequence] == [0, 1]
    with pytest.raises(grpc.RpcError):
        next(call)
    assert sum(server.total for server in servers) == 1


def test_initial_metadata_that_were_seen_commit_too(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    call = stub.Watch(Request(text="head", delay_seconds=0.3, fail_code=14), timeout=5)
    assert ("x-head", "1") in call.initial_metadata()
    with pytest.raises(grpc.RpcError):
        next(call)
    assert sum(server.total for server in servers) == 1


@pytest.mark.parametrize("method", ["Collect", "Chat"])
def test_requests_are_sent_again_from_the_first(method: str, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    servers[0].code = servers[1].code = Code.UNAVAILABLE
    texts = [str(number) for number in range(50)]
    for _ in range(3):
        message = Request()

        def reused(message: Request = message) -> Iterator[Request]:
            for text in texts:  # generators like to yield one message again and again
                message.text = text
                yield message

        if method == "Collect":
            assert stub.Collect(reused(), timeout=10).text.split() == texts
        else:
            assert [reply.text for reply in stub.Chat(reused(), timeout=10)] == texts


def test_a_message_changed_after_the_call_changes_no_retry(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    for start in (stub.Say.future, stub.Watch):
        message = Request(text="as it was", delay_seconds=0.1)
        calls = [start(message, timeout=10) for _ in range(2)]
        message.text = "changed"
        for call in calls:
            assert (next(call) if start is stub.Watch else call.result()).text == "as it was"


def test_a_long_request_stream_is_not_kept(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    for server in servers:
        server.code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))

    def long() -> Iterator[Request]:
        for _ in range(40):
            yield Request(text="x" * 10_000)

    with pytest.raises(grpc.RpcError):
        stub.Collect(long(), timeout=10)
    assert sum(server.total for server in servers) == 1


def test_an_iterator_that_is_waiting_gives_to_the_next_attempt(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    for _ in range(2):
        proceed = threading.Event()

        def slow(proceed: threading.Event = proceed) -> Iterator[Request]:
            yield Request(text="first")
            proceed.wait(10)  # the first attempt's consumer thread is in here when the attempt has failed
            yield Request(text="second")

        before = servers[1].total
        call = stub.Chat(slow(), timeout=10)
        assert next(call).text == "first"
        assert servers[1].total == before + 1
        proceed.set()
        assert [reply.text for reply in call] == ["second"]


def test_failures_before_the_first_response_are_dealt_with_without_a_reader(
    serve: Serve, channel_to: ChannelTo
) -> None:
    servers = serve(2)
    for server in servers:
        server.code = Code.UNAVAILABLE
    stub = stub_of(channel_to(servers, breaker=None, retry=ALL_IDEMPOTENT))
    call = stub.Watch(Request(), timeout=10)
    assert call.code() is Code.UNAVAILABLE
    assert sum(server.total for server in servers) == 3


# -- the breaker ---------------------------------------------------------------------------------------------------


def test_an_endpoint_that_comes_back_is_found_by_the_first_probe(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    # A sub-channel of gRPC's would not try to connect again for a minute.
    patience = [("grpc.initial_reconnect_backoff_ms", 60_000), ("grpc.max_reconnect_backoff_ms", 60_000)]
    channel = channel_to(servers, options=patience)
    stub = stub_of(channel)
    node = next(node for node in channel.cluster.nodes if node.endpoint.address == servers[0].address)
    stub.Say(Request(), timeout=5)
    servers[0].stop()

    def opened() -> bool:
        stub.Say(Request(), timeout=5)
        return node.is_open

    eventually(opened)
    servers[0].start()
    failures = node.failures

    def back() -> bool:
        stub.Say(Request(), timeout=5)
        return not node.ejected

    eventually(back)
    assert servers[0].total >= 1
    assert node.failures == failures  # no failed probe: the back-off of the old sub-channel was not asked


def test_exhausted_server_is_overloaded_not_broken(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = Code.RESOURCE_EXHAUSTED
    channel = channel_to(servers, breaker=Breaker(failure_rate=None))  # in the rate it does count
    stub = stub_of(channel)
    for _ in range(20):
        stub.Say(Request(), timeout=5)
    node = next(node for node in channel.cluster.nodes if node.endpoint.address == servers[0].address)
    assert node.overloads > 0
    assert not node.ejected
