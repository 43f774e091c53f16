"""What OpenTelemetry sees of a call: one span an attempt, with the trace context of its own in the request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from meshlb import Mesh, ServiceConfig
from meshlb.discovery import StaticDiscovery
from tests.http.drivers import Driver, InOrder
from tests.support.backends import Backend
from tests.support.wait import eventually


class Recorder:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def spans(self, count: int) -> list[ReadableSpan]:
        eventually(lambda: len(self._exporter.get_finished_spans()) >= count)
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.provider.shutdown()


def _mesh(recorder: Recorder, backends: list[Backend]) -> Mesh:
    discovery = StaticDiscovery({"orders": [backend.address for backend in backends]})
    return Mesh(discovery, defaults=ServiceConfig(policy=InOrder()), tracer_provider=recorder.provider)


def test_span_for_each_attempt(driver: Driver, backends: list[Backend], recorder: Recorder):
    backends[0].behave(status=503)
    with _mesh(recorder, backends) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.get("http://orders:8080/path?x=1", headers={"x-mine": "kept"})
        first, second = recorder.spans(2)
        assert {first.kind, second.kind} == {SpanKind.CLIENT}
        for span, backend, status in ((first, backends[0], 503), (second, backends[1], 200)):
            attributes = dict(span.attributes or {})
            assert attributes["network.peer.address"] == backend.host
            assert attributes["network.peer.port"] == backend.port
            assert attributes["http.response.status_code"] == status
            assert attributes["url.full"] == "http://orders:8080/path?x=1"
            assert attributes["server.port"] == 8080
            assert attributes["network.protocol.version"] == "1.1"
        assert "http.request.resend_count" not in (first.attributes or {})
        assert (second.attributes or {})["http.request.resend_count"] == 1
        assert (first.status.status_code, second.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
        received = response.json()["headers"]
        assert received["traceparent"].startswith(_traceparent(second)), "the attempt's own"
        assert received["x-mine"] == "kept"
        assert "traceparent" not in response.request.headers, "what the caller made is not touched"


def test_attempt_is_a_child_of_the_call(driver: Driver, backends: list[Backend], recorder: Recorder):
    tracer = recorder.provider.get_tracer("test")
    with _mesh(recorder, backends) as mesh, driver.client(driver.transport(mesh)) as client:
        with tracer.start_as_current_span("caller") as caller:
            client.get("http://orders/")
        spans = {span.name: span for span in recorder.spans(2)}
        assert spans["GET"].parent is not None
        assert spans["GET"].parent.span_id == caller.get_span_context().span_id


def test_span_ends_with_the_body(driver: Driver, backends: list[Backend], recorder: Recorder):
    with _mesh(recorder, backends) as mesh, driver.client(driver.transport(mesh)) as client:
        response = client.stream("GET", "http://orders/")
        assert recorder.spans(0) == []
        driver.close(response)
        assert len(recorder.spans(1)) == 1
        with pytest.raises(driver.module.LocalProtocolError):
            client.get("http://orders/", headers={"bad name": "x"})
        assert len(recorder.spans(2)) == 2


def test_error_is_named(driver: Driver, backends: list[Backend], recorder: Recorder):
    backends[0].behave(reset=True)
    with _mesh(recorder, backends[:1]) as mesh, driver.client(driver.transport(mesh)) as client:
        with pytest.raises(driver.module.TransportError) as caught:
            client.post("http://orders/")
        (span,) = recorder.spans(1)
        assert (span.attributes or {})["error.type"] == type(caught.value).__name__
        assert "http.response.status_code" not in (span.attributes or {})


def _traceparent(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-"
