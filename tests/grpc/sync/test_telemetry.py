"""Spans and metrics of attempts, as the adapter reports them to a real SDK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meshlb import Mesh, Retry, ServiceConfig
from meshlb._proto import echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from tests.grpc.sync.conftest import Serve, in_flight
from tests.grpc.sync.servers import Request
from tests.support.wait import eventually

CALLS: dict[str, Callable[[Any], Any]] = {
    "Say": lambda stub: stub.Say(Request(text="x"), timeout=10),
    "Say.with_call": lambda stub: stub.Say.with_call(Request(text="x"), timeout=10),
    "Say.future": lambda stub: stub.Say.future(Request(text="x"), timeout=10).result(),
    "Watch": lambda stub: list(stub.Watch(Request(text="x"), timeout=10)),
    "Collect": lambda stub: stub.Collect(iter([Request(text="x")]), timeout=10),
    "Chat": lambda stub: list(stub.Chat(iter([Request(text="x")]), timeout=10)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_attempt_is_a_span_of_its_own_under_the_callers(name: str, serve: Serve) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    servers = serve(2)
    servers[0].code = grpc.StatusCode.UNAVAILABLE
    config = ServiceConfig(policy="round_robin", retry=Retry(idempotent_methods=("*",)), breaker=None)
    discovery = StaticDiscovery({"echo": [server.address for server in servers]})
    with (
        Mesh(discovery, defaults=config, tracer_provider=provider) as mesh,
        insecure_channel("echo", mesh=mesh) as channel,
    ):
        mesh.cluster("echo").wait_ready(5)
        stub = echo_pb2_grpc.EchoStub(channel)

        def spans_of_a_retry() -> Any:
            exporter.clear()
            with trace.get_tracer("test", tracer_provider=provider).start_as_current_span("caller") as caller:
                CALLS[name](stub)
            eventually(lambda: in_flight(mesh) == 0)
            attempts = [span for span in exporter.get_finished_spans() if span.name != "caller"]
            return (caller, attempts) if len(attempts) > 1 else None

        caller, (failed, answered) = eventually(spans_of_a_retry)
        method = name.partition(".")[0]
        for span, server, status in ((failed, servers[0], "UNAVAILABLE"), (answered, servers[1], "OK")):
            assert span.parent.span_id == caller.get_span_context().span_id
            assert span.name == f"meshlb.demo.v1.Echo/{method}"
            assert span.attributes["network.peer.address"] == server.host
            assert span.attributes["network.peer.port"] == server.port
            assert span.attributes["rpc.response.status_code"] == status
            expected = f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-"
            assert server.metadata[-1]["traceparent"].startswith(expected)
        assert servers[1].metadata[-1]["meshlb-previous-attempts"] == "1"


def test_a_cancelled_stream_ends_its_span(serve: Serve) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    [server] = serve()
    mesh = Mesh(StaticDiscovery({"echo": [server.address]}), tracer_provider=provider)
    with mesh, insecure_channel("echo", mesh=mesh) as channel:
        stream = echo_pb2_grpc.EchoStub(channel).Watch(Request(count=1000, interval_seconds=0.02))
        next(stream)
        stream.cancel()
        [span] = eventually(exporter.get_finished_spans)
        assert span.status.is_ok or span.status.is_unset
        exporter.clear()
        stream = echo_pb2_grpc.EchoStub(channel).Watch(Request(count=1000, interval_seconds=0.02))
        next(stream)
        del stream
        eventually(exporter.get_finished_spans)
