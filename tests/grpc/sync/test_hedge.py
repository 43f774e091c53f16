"""Hedged unary calls: the first answer wins, the others are cancelled and blamed for nothing."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meshlb import Hedge, Mesh, Retry, RetryBudget, ServiceConfig
from meshlb._proto import echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from tests.grpc.sync.conftest import ChannelTo, Serve, in_flight
from tests.grpc.sync.servers import SAY, Request, Server, refusing_address
from tests.http.drivers import InOrder
from tests.support.wait import eventually


def hedge(delay: float = 0.02, **settings: Any) -> dict[str, Any]:
    """Settings of a service whose servers are tried in order and whose Say is hedged."""
    settings = {"budget": None, "idempotent_methods": (SAY,), **settings}
    return {"retry": Retry(hedge=Hedge(delay=delay), **settings), "policy": InOrder(), "breaker": None}


def stub_of(channel: Any) -> Any:
    return echo_pb2_grpc.EchoStub(channel)


def test_hung_server_is_outrun(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    servers[0].hang = True
    channel = channel_to(servers, **hedge())
    assert stub_of(channel).Say(Request(text="hi"), timeout=60).backend == "s1"
    slow, fast, _ = channel.cluster.nodes
    eventually(lambda: in_flight(channel.mesh) == 0, 20)
    assert (slow.failures, slow.ignored, slow.calls) == (0, 1, 1)
    assert (fast.successes, fast.calls, channel.cluster.retries) == (1, 1, 1)
    assert slow.latency.has_history
    eventually(lambda: servers[0].given_up == 1, 20, message="the loser is cancelled at its server, too")
    assert servers[1].metadata[-1]["meshlb-previous-attempts"] == "1"


def test_with_call_gives_the_winners(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].hang = True
    servers[1].trailers = (("x-who", "s1"),)
    channel = channel_to(servers, **hedge())
    reply, call = stub_of(channel).Say.with_call(Request(), timeout=60)
    assert (reply.backend, call.code()) == ("s1", grpc.StatusCode.OK)
    assert dict(call.trailing_metadata())["x-who"] == "s1"


def test_what_is_not_hedged(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    channel = channel_to(servers, **hedge(0.01))
    stub = stub_of(channel)
    slow = Request(delay_seconds=0.3)
    assert stub.Put(slow, timeout=60).backend == "s0", "not idempotent"
    assert stub.Say.future(slow, timeout=60).result().backend == "s0"
    assert [reply.backend for reply in stub.Watch(slow, timeout=60)] == ["s0"]
    assert stub.Collect(iter([slow]), timeout=60).backend == "s0"
    assert servers[1].total == 0


def test_answer_in_time_is_not_hedged(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    channel = channel_to(servers, **hedge(30))
    for _ in range(5):
        assert stub_of(channel).Say(Request(), timeout=60).backend == "s0"
    assert servers[1].total == 0


def test_failure_brings_the_next_attempt_forward(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    channel = channel_to(servers, **hedge(30))
    assert stub_of(channel).Say(Request(), timeout=60).backend == "s1"
    assert channel.cluster.nodes[0].failures == 1


def test_fatal_status_wins(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].hang = True
    servers[1].code = grpc.StatusCode.NOT_FOUND
    channel = channel_to(servers, **hedge())
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(channel).Say(Request(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    eventually(lambda: in_flight(channel.mesh) == 0, 20)
    assert channel.cluster.nodes[0].failures == 0


@pytest.mark.parametrize("pushback", ["-1", "soon"])
def test_pushback_that_forbids_ends_the_hedging(serve: Serve, channel_to: ChannelTo, pushback: str) -> None:
    servers = serve(3)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    servers[0].trailers = (("grpc-retry-pushback-ms", pushback),)
    channel = channel_to(servers, **hedge(30))
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(channel).Say(Request(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert servers[1].total == 0


def test_pushback_moves_the_next_hedge(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    servers[0].trailers = (("grpc-retry-pushback-ms", "700"),)
    channel = channel_to(servers, **hedge(30))
    clock = channel.cluster.clock
    began = clock()
    assert stub_of(channel).Say(Request(), timeout=60).backend == "s1"
    assert clock() - began >= 0.7


def test_all_fail(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(3)
    for server in servers:
        server.code = grpc.StatusCode.UNAVAILABLE
    channel = channel_to(servers, **hedge())
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(channel).Say(Request(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "told to fail"
    assert [server.total for server in servers] == [1, 1, 1]


def test_budget_pays(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    channel = channel_to(servers, **hedge(0.01, budget=RetryBudget(0, 0.1)))
    for _ in range(3):
        stub_of(channel).Say(Request(delay_seconds=0.3), timeout=60)
    assert channel.cluster.retries == 1
    assert channel.cluster.budget.balance == 0


def test_deadline_while_all_hang(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    for server in servers:
        server.hang = True
    channel = channel_to(servers, **hedge())
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(channel).Say(Request(), timeout=0.8)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: in_flight(channel.mesh) == 0, 20)


def test_wait_for_ready_goes_on_when_nobody_can_be_reached(channel_to: ChannelTo) -> None:
    server = Server("late")
    server.start()
    server.stop()
    settings = {**hedge(), "connect_timeout": 0.1}
    channel = channel_to([server.address, refusing_address()], **settings)
    call = channel.unary_unary(SAY, Request.SerializeToString, lambda data: data)
    import threading

    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(call(Request(), timeout=60, wait_for_ready=True)))
    thread.start()
    eventually(lambda: channel.cluster.nodes[1].failures >= 1, 20)
    with server:
        thread.join(60)
    assert answers


def test_closing_the_channel_ends_it(serve: Serve) -> None:
    import threading

    servers = serve(2)
    for server in servers:
        server.hang = True
    addresses = [server.address for server in servers]
    with Mesh(StaticDiscovery({"echo": addresses}), defaults=ServiceConfig(**hedge())) as mesh:
        channel = insecure_channel("consul:///echo", mesh=mesh)
        errors: list[BaseException] = []

        def call() -> None:
            try:
                stub_of(channel).Say(Request(), timeout=60)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        eventually(lambda: servers[1].total == 1, 20)
        channel.close()
        thread.join(30)
        (error,) = errors
        assert isinstance(error, grpc.RpcError | ValueError)
        eventually(lambda: in_flight(mesh) == 0, 20)
        assert [node.failures for node in mesh.cluster("echo").nodes] == [0, 0]


def test_each_attempt_has_its_span(serve: Serve) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    servers = serve(2)
    servers[0].hang = True
    known = {"echo": [server.address for server in servers]}
    config = ServiceConfig(**hedge())
    with (
        Mesh(StaticDiscovery(known), defaults=config, tracer_provider=provider) as mesh,
        insecure_channel("consul:///echo", mesh=mesh) as channel,
    ):
        assert stub_of(channel).Say(Request(), timeout=60).backend == "s1"
        eventually(lambda: len(exporter.get_finished_spans()) == 2, 20)
        lost, won = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        assert (lost.attributes or {})["meshlb.outcome"] == "ignored"
        assert (won.attributes or {})["rpc.response.status_code"] == "OK"
        assert servers[0].metadata[-1]["traceparent"] != servers[1].metadata[-1]["traceparent"]
    provider.shutdown()


def test_percentile(serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(2)
    retry = Retry(hedge=Hedge(percentile=0.9), budget=None, idempotent_methods=(SAY,))
    channel = channel_to(servers, retry=retry, policy=InOrder(), breaker=None)
    for _ in range(25):
        assert stub_of(channel).Say(Request(), timeout=60)
    servers[0].hang = True
    assert stub_of(channel).Say(Request(), timeout=60).backend == "s1"
