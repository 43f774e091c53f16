"""A standard gRPC service config, acted upon by meshlb. Vectors: grpc/grpc-go ``test/retry_test.go``."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import meshlb
from meshlb import AdaptiveThrottling, ConfigError, Mesh, Retry, RetryBudget, ServiceConfig
from meshlb._proto import echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from meshlb.grpc._errors import Throttled
from tests.grpc.sync.conftest import Serve, in_flight
from tests.grpc.sync.servers import Request, Server
from tests.http.drivers import InOrder
from tests.support.wait import eventually

ECHO = "meshlb.demo.v1.Echo"


def retrying(*codes: str, **changes: Any) -> dict[str, Any]:
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.02s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": list(codes or ("UNAVAILABLE",)),
        **changes,
    }
    return {"methodConfig": [{"name": [{"service": ECHO}], "retryPolicy": policy}]}


@pytest.fixture
def connect() -> Iterator[Any]:
    """A channel to these servers, with a service config; (channel, stub)."""
    open_channels: list[Any] = []
    meshes: list[Mesh] = []

    def make(servers: list[Server], service_config: Any = None, options: Any = None, **settings: Any) -> Any:
        settings = {"policy": InOrder(), "breaker": None, "retry": Retry(budget=None), **settings}
        known = {"echo": [server.address for server in servers]}
        mesh = Mesh(StaticDiscovery(known), defaults=ServiceConfig(**settings))
        meshes.append(mesh)
        channel = insecure_channel("consul:///echo", options, mesh=mesh, service_config=service_config)
        open_channels.append(channel)
        return channel, echo_pb2_grpc.EchoStub(channel)

    yield make
    for channel in open_channels:
        channel.close()
    for mesh in meshes:
        eventually(lambda mesh=mesh: in_flight(mesh) == 0, 20)
        mesh.close()


def code_of(call: Any, request: Request | None = None, **options: Any) -> str:
    try:
        call(request or Request(), timeout=60, **options)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


class Scripted(Server):
    """Answers the n-th call of all, from 0, with what ``script`` says of n."""

    def __init__(self, id: str, script: Any) -> None:
        self.script = script
        super().__init__(id)

    @property
    def served(self) -> int:
        return self.total - 1

    @property
    def code(self) -> Any:
        name = self.script(self.served)
        return None if name == "OK" else grpc.StatusCode[name]

    @code.setter
    def code(self, value: Any) -> None:
        """Only the script counts."""


WAYS = ["argument", "json", "option", "ServiceConfig"]


@pytest.mark.parametrize("way", WAYS)
def test_grpc_go_unary(connect: Any, way: str) -> None:
    """maxAttempts 4: OK at {0, 2, 5}, INTERNAL (fatal) at {6, 8, 11}, else retryable. Put is not idempotent: the policy
    says that it may be sent again."""

    def script(index: int) -> str:
        return "OK" if index in (0, 2, 5) else "INTERNAL" if index in (6, 8, 11) else "UNAVAILABLE"

    config = retrying()
    with Scripted("s0", script) as server:
        given: dict[str, Any] = {
            "argument": {"service_config": config},
            "json": {"service_config": json.dumps(config)},
            "option": {"options": [("grpc.service_config", json.dumps(config))]},
            "ServiceConfig": {"settings": {"service_config": config}},
        }[way]
        settings = given.pop("settings", {})
        _, stub = connect([server], **given, **settings)
        found = []
        for _ in range(7):
            code = code_of(stub.Put)
            found.append((code, server.served))
        assert found == [
            ("OK", 0), ("OK", 2), ("OK", 5), ("INTERNAL", 6), ("INTERNAL", 8), ("INTERNAL", 11), ("UNAVAILABLE", 15),
        ]  # fmt: skip


def test_grpc_go_throttling(connect: Any) -> None:
    ok = {0, 3, 6, *range(10, 15), 16, 18}
    config = {**retrying(), "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.5}}
    with Scripted("s0", lambda index: "OK" if index in ok else "UNAVAILABLE") as server:
        channel, stub = connect([server], config)
        throttle = channel.cluster.retry_throttle(channel.policies.config.retry_throttling)
        found = [(code_of(stub.Put), server.served, throttle.tokens) for _ in range(12)]
    assert found == [
        ("OK", 0, 10), ("OK", 3, 8.5), ("OK", 6, 7), ("UNAVAILABLE", 8, 5), ("UNAVAILABLE", 9, 4), ("OK", 10, 4.5),
        ("OK", 11, 5), ("OK", 12, 5.5), ("OK", 13, 6), ("OK", 14, 6.5), ("OK", 16, 6), ("UNAVAILABLE", 17, 5),
    ]  # fmt: skip


def test_connections_make_no_retries_of_their_own(connect: Any, serve: Serve) -> None:
    servers = serve(1)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    option = ("grpc.service_config", json.dumps(retrying()))
    _, stub = connect(servers, options=[option], retry=None)
    assert code_of(stub.Say) == "UNAVAILABLE"
    assert servers[0].total == 1


def test_other_methods_keep_the_services_own_rules(connect: Any, serve: Serve) -> None:
    servers = serve(2)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    config = {"methodConfig": [{**retrying()["methodConfig"][0], "name": [{"service": ECHO, "method": "Put"}]}]}
    _, stub = connect(servers, config)
    assert code_of(stub.Put) == "OK"
    before = servers[1].total
    assert code_of(stub.Collect, iter([Request()])) == "UNAVAILABLE"
    assert servers[1].total == before


def test_codes_narrow_and_widen(connect: Any, serve: Serve) -> None:
    servers = serve(2)
    _, stub = connect(servers, retrying("INTERNAL", "ABORTED"))
    for name, retried in (("INTERNAL", True), ("ABORTED", True), ("UNAVAILABLE", False), ("NOT_FOUND", False)):
        servers[0].code = grpc.StatusCode[name]
        assert code_of(stub.Put) == ("OK" if retried else name)


@pytest.mark.parametrize(("pushback", "attempts"), [("-1", 1), ("xxx", 1), ("0", 4)])
def test_pushback(connect: Any, serve: Serve, pushback: str, attempts: int) -> None:
    servers = serve(1)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    servers[0].trailers = (("grpc-retry-pushback-ms", pushback),)
    _, stub = connect(servers, retrying())
    assert code_of(stub.Put) == "UNAVAILABLE"
    assert servers[0].total == attempts


def test_streams_are_retried_until_their_first_message(connect: Any, serve: Serve) -> None:
    servers = serve(2)
    _, stub = connect(servers, retrying("UNAVAILABLE"))
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    assert [reply.backend for reply in stub.Watch(Request(count=2), timeout=60)] == ["s1", "s1"]
    servers[0].code = None
    stream = stub.Watch(Request(count=3, fail_code=14, fail_after=1, interval_seconds=1), timeout=60)
    assert next(stream).backend == "s0"
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_timeout_is_the_shorter_one(connect: Any, serve: Serve) -> None:
    servers = serve(1)
    config = {"methodConfig": [{"name": [{}], "timeout": "0.3s"}]}
    _, stub = connect(servers, config)
    for call in (
        lambda: stub.Say(Request(text="hang")),
        lambda: stub.Say(Request(text="hang"), timeout=60),
        lambda: stub.Say.future(Request(text="hang")).result(),
        lambda: list(stub.Watch(Request(count=1000, interval_seconds=0.1))),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_wait_for_ready(connect: Any) -> None:
    with Server("s0") as server:
        pass
    config = {"methodConfig": [{"name": [{}], "waitForReady": True}]}
    channel, stub = connect([server], config, connect_timeout=0.1)
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(code_of(stub.Say)))
    thread.start()
    eventually(lambda: any(node.calls >= 2 for node in channel.cluster.nodes), 20)
    assert code_of(stub.Say, wait_for_ready=False) == "UNAVAILABLE", "the caller's own word comes first"
    with server:
        thread.join(60)
        assert answers == ["OK"]


def test_message_sizes(connect: Any, serve: Serve) -> None:
    servers = serve(1)
    config = {
        "methodConfig": [
            {"name": [{"service": ECHO, "method": "Say"}], "maxRequestMessageBytes": 10},
            {"name": [{"service": ECHO, "method": "Put"}], "maxResponseMessageBytes": "200"},
        ]
    }
    channel, stub = connect(servers, config)
    assert code_of(stub.Say, Request(text="x" * 100)) == "RESOURCE_EXHAUSTED"
    assert code_of(stub.Put, Request(payload_bytes=1000)) == "RESOURCE_EXHAUSTED"
    assert code_of(stub.Say, Request(text="x")) == "OK"
    assert channel.cluster.nodes[0].failures == 0


def test_hedging(connect: Any, serve: Serve) -> None:
    servers = serve(3)
    servers[0].hang = True
    servers[1].code = grpc.StatusCode.ABORTED
    policy = {"maxAttempts": 3, "hedgingDelay": "0.02s", "nonFatalStatusCodes": ["ABORTED"]}
    throttling = {"maxTokens": 10, "tokenRatio": 0.5}
    config = {"methodConfig": [{"name": [{"service": ECHO}], "hedgingPolicy": policy}], "retryThrottling": throttling}
    channel, stub = connect(servers, config)
    assert stub.Put(Request(), timeout=60).backend == "s2", "whoever writes a hedgingPolicy says that it is safe"
    tokens = channel.cluster.retry_throttle(channel.policies.config.retry_throttling).tokens
    assert tokens == 9.5, "one failure, one success"
    servers[1].code = grpc.StatusCode.UNAVAILABLE
    assert code_of(stub.Put) == "UNAVAILABLE", "not named, so fatal"


def test_hedges_stop_while_throttled(connect: Any, serve: Serve) -> None:
    servers = serve(2)
    policy = {"maxAttempts": 2, "hedgingDelay": "0.01s", "nonFatalStatusCodes": ["ABORTED"]}
    config = {
        "methodConfig": [{"name": [{}], "hedgingPolicy": policy}],
        "retryThrottling": {"maxTokens": 4, "tokenRatio": 0.001},
    }
    _, stub = connect(servers, config)
    for server in servers:
        server.code = grpc.StatusCode.ABORTED
    for _ in range(3):
        assert code_of(stub.Put) == "ABORTED"
    for server in servers:
        server.code = None
        server.calls.clear()
    stub.Put(Request(delay_seconds=0.3), timeout=60)
    assert (servers[0].total, servers[1].total) == (1, 0)


def test_refused_here(connect: Any, serve: Serve) -> None:
    servers = serve(1)
    servers[0].code = grpc.StatusCode.RESOURCE_EXHAUSTED
    channel, stub = connect(servers, retry=None, throttling=AdaptiveThrottling())
    refused: dict[str, int] = {}
    calls: dict[str, Any] = {
        "blocking": lambda: stub.Say(Request(), timeout=60),
        "future": lambda: stub.Say.future(Request(), timeout=60).result(),
        "stream": lambda: list(stub.Watch(Request(), timeout=60)),
    }
    for name, call in calls.items():
        for _ in range(60):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            if isinstance(caught.value, Throttled):
                assert isinstance(caught.value, meshlb.Throttled)
                refused[name] = refused.get(name, 0) + 1
    assert set(refused) == set(calls)
    assert servers[0].total == 180 - sum(refused.values())
    assert channel.cluster.nodes[0].calls == servers[0].total


def test_retry_that_is_cancelled_in_its_pause_is_paid_back(connect: Any, serve: Serve) -> None:
    servers = serve(1)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    wait = retrying(initialBackoff="60s", maxBackoff="60s")
    channel, stub = connect(servers, wait, retry=Retry(budget=RetryBudget(0, 1)))
    budget = channel.cluster.budget
    future = stub.Put.future(Request())
    eventually(lambda: budget.balance == 9, 20)
    assert future.cancel()
    assert budget.balance == 10
    stream = stub.Watch(Request())
    eventually(lambda: budget.balance == 9, 20)
    del stream
    eventually(lambda: budget.balance == 10, 20)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            stub.Put(Request())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    eventually(lambda: budget.balance == 9, 20)
    channel.close()
    thread.join(30)
    assert errors
    assert budget.balance == 10


def test_budget_holds_beside_it(connect: Any, serve: Serve) -> None:
    servers = serve(1)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    _, stub = connect(servers, retrying(), retry=Retry(budget=RetryBudget(0, 0.2)))
    for _ in range(3):
        assert code_of(stub.Put) == "UNAVAILABLE"
    assert servers[0].total == 5


def test_what_is_wrong_fails_where_it_is_given(connect: Any, serve: Serve) -> None:
    servers = serve(1)
    wrong = retrying(maxAttempts=1)
    with pytest.raises(ConfigError, match="maxAttempts"):
        connect(servers, wrong)
    with pytest.raises(ConfigError, match="maxAttempts"):
        connect(servers, options=[("grpc.service_config", json.dumps(wrong))])
    with pytest.raises(ConfigError, match="maxAttempts"):
        ServiceConfig(service_config=wrong)


def test_a_target_of_grpcs_own_gets_it_too(serve: Serve) -> None:
    servers = serve(1)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    with insecure_channel(servers[0].address, service_config=retrying()) as channel:
        assert code_of(echo_pb2_grpc.EchoStub(channel).Put) == "UNAVAILABLE"
    assert servers[0].total == 4
