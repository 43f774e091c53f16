"""Spans and headers as an adapter makes them, and as a server finds them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent import futures
from contextvars import ContextVar
from typing import Any

import grpc
import httpx
from opentelemetry.sdk.trace import ReadableSpan

from meshlb import Mesh, Retry, ServiceConfig
from meshlb.discovery import ServiceQuery, Sink, StaticDiscovery
from meshlb.grpc import insecure_channel
from meshlb.httpx import AsyncMeshTransport, MeshTransport
from meshlb.testing import ScriptedEndpoints
from tests.telemetry.rig import Rig


def span_ids(spans: Sequence[ReadableSpan]) -> list[str]:
    return [f"{span.context.span_id:016x}" for span in spans]


def check_two_http_attempts(rig: Rig, endpoints: ScriptedEndpoints) -> None:
    *attempts, call = rig.spans.get_finished_spans()
    assert call.name == "call"
    assert {span.parent.span_id for span in attempts if span.parent} == {call.context.span_id}
    assert [span.attributes["http.response.status_code"] for span in attempts] == [503, 200]
    assert [span.attributes.get("http.request.resend_count") for span in attempts] == [None, 1]
    peers = [(span.attributes["network.peer.address"], span.attributes["network.peer.port"]) for span in attempts]
    assert [f"{host}:{port}" for host, port in peers] == endpoints.addresses
    assert {span.attributes["url.full"] for span in attempts} == {"http://orders/v1?q=1"}
    sent = [request.headers["traceparent"].split("-")[2] for _, request in endpoints.calls]
    assert sent == span_ids(attempts)
    points = rig.points("http.client.request.duration")
    assert {point.attributes["http.response.status_code"]: point.count for point in points} == {200: 1, 503: 1}


def test_httpx(rig: Rig):
    endpoints = ScriptedEndpoints()
    endpoints.script(next_endpoint(rig), 503)
    with httpx.Client(transport=MeshTransport(rig.mesh, transport_factory=endpoints)) as client:
        with rig.tracers.get_tracer("program").start_as_current_span("call"):
            response = client.get("http://orders/v1?q=1")
        assert "traceparent" not in response.request.headers
    check_two_http_attempts(rig, endpoints)


async def test_httpx_async(rig: Rig):
    endpoints = ScriptedEndpoints()
    endpoints.script(next_endpoint(rig), 503)
    async with httpx.AsyncClient(transport=AsyncMeshTransport(rig.mesh, transport_factory=endpoints)) as client:
        with rig.tracers.get_tracer("program").start_as_current_span("call"):
            await client.get("http://orders/v1?q=1")
    check_two_http_attempts(rig, endpoints)


def next_endpoint(rig: Rig) -> str:
    """Whom round robin will pick next: of two, not the one it picks now."""
    lease = rig.cluster.start()
    lease.close()
    (other,) = (node.endpoint.address for node in rig.cluster.nodes if node is not lease.node)
    return other


class Server(grpc.GenericRpcHandler):
    """Answers every unary call with its request, and notes the trace that it came with. Fails the first one."""

    def __init__(self) -> None:
        self.traces: list[str] = []

    def service(self, details: Any) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            metadata = dict(context.invocation_metadata())
            self.traces.append(str(metadata["traceparent"]).split("-")[2])
            if len(self.traces) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
            return request

        return grpc.unary_unary_rpc_method_handler(answer)


def test_grpc():
    handler = Server()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    config = ServiceConfig(policy="round_robin", retry=Retry(idempotent_methods=("/shop.Orders/Get",)))
    try:
        with (
            Rig() as rig,
            Mesh(
                StaticDiscovery({"orders": [f"127.0.0.1:{port}"]}),
                defaults=config,
                tracer_provider=rig.tracers,
                meter_provider=rig.meters,
            ) as mesh,
            insecure_channel("consul:///orders", mesh=mesh) as channel,
        ):
            call = channel.unary_unary("/shop.Orders/Get")
            with rig.tracers.get_tracer("program").start_as_current_span("call"):
                assert call(b"x", timeout=10) == b"x"
            *attempts, caller = rig.spans.get_finished_spans()
            assert {span.name for span in attempts} == {"shop.Orders/Get"}
            assert [span.attributes["rpc.response.status_code"] for span in attempts] == ["UNAVAILABLE", "OK"]
            assert {span.parent.span_id for span in attempts if span.parent} == {caller.context.span_id}
            assert {span.attributes["network.peer.port"] for span in attempts} == {port}
            assert handler.traces == span_ids(attempts)
            points = rig.points("rpc.client.call.duration")
            assert {point.attributes["rpc.response.status_code"]: point.count for point in points} == {
                "UNAVAILABLE": 1,
                "OK": 1,
            }
    finally:
        server.stop(0).wait(5)


REQUEST: ContextVar[str] = ContextVar("REQUEST")


def test_a_watch_does_not_run_in_the_context_of_the_call_that_started_it():
    seen: list[str | None] = []

    class Noting(StaticDiscovery):
        async def watch(self, query: ServiceQuery, sink: Sink) -> None:
            seen.append(REQUEST.get(None))
            await super().watch(query, sink)

    token = REQUEST.set("the first request")
    try:
        with Mesh(Noting({"orders": ["127.0.0.1:1"]})) as mesh:
            mesh.cluster("orders").wait_ready(5)
    finally:
        REQUEST.reset(token)
    assert seen == [None]
