"""Hedged unary calls under asyncio, and a service config's rules there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import grpc.aio
import pytest

import meshlb
from meshlb import AdaptiveThrottling, Hedge, Retry, RetryBudget
from meshlb._proto import echo_pb2_grpc
from meshlb.grpc.aio._errors import Throttled
from meshlb.sessions import StickyKey
from tests.grpc.aio.conftest import Serve, in_flight
from tests.grpc.aio.servers import Request
from tests.http.drivers import InOrder
from tests.support.wait import eventually_async

SAY = "/meshlb.demo.v1.Echo/Say"
ECHO = "meshlb.demo.v1.Echo"


def hedge(delay: float = 0.02, **settings: Any) -> dict[str, Any]:
    """Settings of a service whose servers are tried in order and whose Say is hedged."""
    settings = {"budget": None, "idempotent_methods": (SAY,), **settings}
    return {"retry": Retry(hedge=Hedge(delay=delay), **settings), "policy": InOrder(), "breaker": None}


def stub_of(channel: Any) -> Any:
    return echo_pb2_grpc.EchoStub(channel)


async def code_of(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def none_is_left(channel: Any) -> None:
    await eventually_async(lambda: in_flight(channel.mesh) == 0, 20)


async def test_hung_server_is_outrun(serve: Serve, channel_to: Any) -> None:
    servers = await serve(3)
    servers[0].hang = True
    channel = await channel_to(servers, **hedge())
    call = stub_of(channel).Say(Request(), timeout=60)
    assert (await call).backend == "s1"
    assert await call.code() is grpc.StatusCode.OK
    assert call.done()
    await none_is_left(channel)
    slow, fast, _ = channel.cluster.nodes
    assert (slow.failures, slow.ignored, slow.calls) == (0, 1, 1)
    assert (fast.successes, fast.calls, channel.cluster.retries) == (1, 1, 1)
    assert slow.latency.has_history


async def test_whoever_waits_gets_the_winner(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    servers[0].hang = True
    channel = await channel_to(servers, **hedge(0.2))
    call = stub_of(channel).Say(Request(text="head"), timeout=60)
    done: list[Any] = []
    call.add_done_callback(done.append)

    async def metadata() -> Any:
        return dict(await call.initial_metadata())

    async def reply() -> Any:
        return await call

    found = await asyncio.gather(reply(), reply(), call.code(), call.trailing_metadata(), return_exceptions=True)
    assert [found[0].backend, found[1].backend, found[2]] == ["s1", "s1", grpc.StatusCode.OK]
    assert done == [call]


async def test_first_answer_in_time_and_first_after_all(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    servers[1].hang = True
    channel = await channel_to(servers, **hedge(0.02))
    assert (await stub_of(channel).Say(Request(delay_seconds=1), timeout=60)).backend == "s0"
    await none_is_left(channel)
    assert channel.cluster.nodes[1].ignored == 1


async def test_what_is_not_hedged(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    channel = await channel_to(servers, **hedge(0.01))
    stub = stub_of(channel)
    slow = Request(delay_seconds=0.3)
    assert (await stub.Put(slow, timeout=60)).backend == "s0", "not idempotent"
    assert [reply.backend async for reply in stub.Watch(slow, timeout=60)] == ["s0"]
    assert (await stub.Collect(iter([slow]), timeout=60)).backend == "s0"
    assert sum(servers[1].calls.values()) == 0


async def test_failure_brings_the_next_attempt_forward(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    channel = await channel_to(servers, **hedge(30))
    assert (await stub_of(channel).Say(Request(), timeout=60)).backend == "s1"
    assert channel.cluster.nodes[0].failures == 1


async def test_fatal_status_wins(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    servers[0].hang = True
    servers[1].code = grpc.StatusCode.NOT_FOUND
    channel = await channel_to(servers, **hedge())
    assert await code_of(stub_of(channel).Say(Request(), timeout=60)) == "NOT_FOUND"
    await none_is_left(channel)


async def test_slow_success_beats_a_fast_failure(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    servers[0].delay = 0.4
    servers[1].code = grpc.StatusCode.UNAVAILABLE
    channel = await channel_to(servers, **hedge(0.02, max_attempts=2))
    assert (await stub_of(channel).Say(Request(), timeout=60)).backend == "s0"
    await none_is_left(channel)


async def test_pushback_that_forbids_ends_the_hedging(serve: Serve, channel_to: Any) -> None:
    servers = await serve(3)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    servers[0].trailers = (("grpc-retry-pushback-ms", "-1"),)
    channel = await channel_to(servers, **hedge(30))
    assert await code_of(stub_of(channel).Say(Request(), timeout=60)) == "UNAVAILABLE"
    assert not servers[1].calls


async def test_all_fail(serve: Serve, channel_to: Any) -> None:
    servers = await serve(3)
    for server in servers:
        server.code = grpc.StatusCode.UNAVAILABLE
    channel = await channel_to(servers, **hedge())
    assert await code_of(stub_of(channel).Say(Request(), timeout=60)) == "UNAVAILABLE"
    assert [server.calls["Say"] for server in servers] == [1, 1, 1]


async def test_budget_pays(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    channel = await channel_to(servers, **hedge(0.01, budget=RetryBudget(0, 0.1)))
    for _ in range(3):
        await stub_of(channel).Say(Request(delay_seconds=0.3), timeout=60)
    assert channel.cluster.retries == 1
    assert channel.cluster.budget.balance == 0


async def test_deadline_and_cancellation_while_all_hang(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    for server in servers:
        server.hang = True
    channel = await channel_to(servers, **hedge())
    assert await code_of(stub_of(channel).Say(Request(), timeout=0.8)) == "DEADLINE_EXCEEDED"
    await none_is_left(channel)
    for by_task in (False, True):
        for server in servers:
            server.calls.clear()
        call = stub_of(channel).Say(Request(), timeout=60)

        async def wait(call: Any = call) -> Any:
            return await call

        task = asyncio.ensure_future(wait())
        await eventually_async(lambda: servers[1].calls["Say"] == 1, 20)
        assert task.cancel() if by_task else call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.cancelled()
        await none_is_left(channel)
    assert [node.successes for node in channel.cluster.nodes] == [0, 0]


async def test_percentile(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    retry = Retry(hedge=Hedge(percentile=0.9), budget=None, idempotent_methods=(SAY,))
    channel = await channel_to(servers, retry=retry, policy=InOrder(), breaker=None)
    for _ in range(25):
        await stub_of(channel).Say(Request(), timeout=60)
    servers[0].hang = True
    assert (await stub_of(channel).Say(Request(), timeout=60)).backend == "s1"


def retrying(**changes: Any) -> dict[str, Any]:
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.02s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
        **changes,
    }
    return {"methodConfig": [{"name": [{"service": ECHO}], "retryPolicy": policy}]}


@pytest.mark.parametrize("way", ["argument", "option", "ServiceConfig"])
async def test_service_config_retries(serve: Serve, channel_to: Any, way: str) -> None:
    servers = await serve(1)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    config = {**retrying(), "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.5}}
    channel: dict[str, Any] = {}
    settings: dict[str, Any] = {"retry": Retry(budget=None), "breaker": None}
    if way == "argument":
        channel = {"service_config": config}
    elif way == "option":
        channel = {"options": [("grpc.service_config", json.dumps(config))]}
    else:
        settings["service_config"] = config
    made = await channel_to(servers, channel, **settings)
    assert await code_of(stub_of(made).Put(Request(), timeout=60)) == "UNAVAILABLE"
    assert servers[0].calls["Put"] == 4
    throttle = made.cluster.retry_throttle(made.policies.config.retry_throttling)
    assert throttle.tokens == 6
    servers[0].code = None
    assert await code_of(stub_of(made).Put(Request(), timeout=60)) == "OK"
    assert throttle.tokens == 6.5


async def test_service_config_timeout_hedging_and_wait_for_ready(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    servers[0].hang = True
    policy = {"maxAttempts": 2, "hedgingDelay": "0.02s"}
    config: dict[str, Any] = {
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.5},
        "methodConfig": [
            {"name": [{"service": ECHO, "method": "Put"}], "hedgingPolicy": policy},
            {"name": [{}], "timeout": "0.3s", "waitForReady": True},
        ],
    }
    settings: dict[str, Any] = {"policy": InOrder(), "breaker": None, "connect_timeout": 0.1}
    channel = await channel_to(servers, {"service_config": config}, **settings)
    throttle = channel.cluster.retry_throttle(channel.policies.config.retry_throttling)
    throttle.failed()
    assert (await stub_of(channel).Put(Request(), timeout=60)).backend == "s1"
    assert throttle.tokens == 9.5
    assert await code_of(stub_of(channel).Say(Request(), timeout=60)) == "DEADLINE_EXCEEDED"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub_of(channel).Watch(Request(text="hang")):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for server in servers:
        await server.stop()
    assert await code_of(stub_of(channel).Say(Request())) == "DEADLINE_EXCEEDED", "it waits for a server"
    assert await code_of(stub_of(channel).Say(Request(), wait_for_ready=False)) == "UNAVAILABLE"


async def test_retry_that_is_cancelled_in_its_pause_is_paid_back(serve: Serve, channel_to: Any) -> None:
    servers = await serve(1)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    retry = Retry(wait=lambda state: 60.0, budget=RetryBudget(0, 1), idempotent_methods=(SAY,))
    channel = await channel_to(servers, retry=retry, breaker=None)
    call = stub_of(channel).Say(Request())
    await eventually_async(lambda: channel.cluster.budget.balance == 9, 20)
    assert call.cancel()
    assert channel.cluster.budget.balance == 10


async def test_refused_here(serve: Serve, channel_to: Any) -> None:
    servers = await serve(1)
    servers[0].code = grpc.StatusCode.RESOURCE_EXHAUSTED
    channel = await channel_to(servers, retry=None, breaker=None, throttling=AdaptiveThrottling())
    refused = 0
    for _ in range(100):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub_of(channel).Say(Request(), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(caught.value, Throttled) == isinstance(caught.value, meshlb.Throttled)
        refused += isinstance(caught.value, Throttled)
    assert servers[0].calls["Say"] == 100 - refused
    assert refused > 40


async def test_a_session_is_one_instance(serve: Serve, channel_to: Any) -> None:
    servers = await serve(2)
    settings = {**hedge(0.01), "sticky": StickyKey()}
    channel = await channel_to(servers, **settings)
    for _ in range(2):
        with meshlb.hash_key("user-42"):
            call = stub_of(channel).Say(Request(delay_seconds=0.3), timeout=60)
        assert (await call).backend == "s0"
    assert not servers[1].calls
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    with meshlb.hash_key("user-42"):
        assert (await stub_of(channel).Say(Request(), timeout=60)).backend == "s1", "retried all the same"
